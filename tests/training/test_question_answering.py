"""The question-answering recipe: SQuAD files to windows, scores of windows to answers, a run, SQuAD's own figures."""

import json

import numpy as np
import pytest
import torch
from helpers import config_of, trainable

from hf_perceiver import PerceiverIOForMaskedLM, PerceiverIOForQuestionAnswering, PerceiverIOTokenizer
from hf_perceiver.training.question_answering import (
    DecodingArguments,
    Question,
    answer_questions,
    best_answers,
    encode,
    made_up_questions,
    main,
    read_questions,
    scores,
)

TEXT = "Zoë wohnt in Köln, 漢口 war früher."


def question(answer: str | None, text: str = TEXT, asked: str = "Wo?") -> Question:
    return Question("1", asked, text, [] if answer is None else [(text.index(answer), answer)])


def byte_tokenizer(length: int = 64, **options) -> PerceiverIOTokenizer:
    return PerceiverIOTokenizer(model_max_length=length, **options)


def one_hot(rows, length: int, bonus: float = 5.0) -> tuple[np.ndarray, np.ndarray]:
    """Logits that are high at each row's target."""
    starts, ends = np.zeros((len(rows), length)), np.zeros((len(rows), length))
    for i, row in enumerate(rows):
        starts[i, row["start_positions"]] = ends[i, row["end_positions"]] = bonus
    return starts, ends


def test_an_answer_goes_from_its_first_characters_first_byte_to_its_last_ones_last():
    tokenizer = byte_tokenizer()
    (row,) = encode(tokenizer, [question("Köln, 漢")], 64, 4)
    told = row["input_ids"][row["start_positions"] : row["end_positions"] + 1]
    assert tokenizer.decode(told) == "Köln, 漢"
    # [CLS] W o ? [SEP], then "Zoë wohnt in " of 14 bytes; "Köln, 漢" has 10
    assert (row["start_positions"], row["end_positions"]) == (5 + 14, 5 + 14 + 10 - 1)


@pytest.mark.parametrize("answer", ["Zoë", "Köln", "漢口", "früher", "ë wohnt in Köln, 漢", "."])
@pytest.mark.parametrize(("length", "stride"), [(64, 4), (40, 28), (41, 29)])
def test_what_windows_are_taught_is_what_is_decoded(answer, length, stride):
    """Windows cut characters of several bytes; those that do not hold the answer point to [CLS]."""
    asked = [question(answer), question(None, "Nothing here.")]
    rows = encode(byte_tokenizer(), asked, length, stride)
    assert max(len(row["input_ids"]) for row in rows) <= length
    assert any(row["start_positions"] for row in rows if row["question"] == 0)
    answers = best_answers(rows, *one_hot(rows, length), asked, DecodingArguments(no_answer=True))
    assert [best[0].text for best in answers] == [answer, ""]
    assert TEXT[answers[0][0].start : answers[0][0].end] == answer


def test_a_window_without_the_whole_answer_points_to_cls():
    rows = encode(byte_tokenizer(), [question("Köln")], 24, 2)
    assert len(rows) > 1
    held = [row for row in rows if row["start_positions"]]
    assert len(held) <= 1 and all(row["end_positions"] == 0 for row in rows if not row["start_positions"])


def test_no_answer_has_to_be_beaten_by_more_than_the_threshold():
    asked = [question("Köln")]
    rows = encode(byte_tokenizer(), asked, 64, 4)
    starts, ends = np.zeros((1, 64)), np.zeros((1, 64))
    starts[0, rows[0]["start_positions"]] = 2.0
    starts[0, 0] = 0.5  # the answer is ahead by 1.5

    def best(**options):
        return best_answers(rows, starts, ends, asked, DecodingArguments(max_answer_length=1, **options))[0][0].text

    assert best(no_answer=True, no_answer_threshold=1.4) == "K"
    assert best(no_answer=True, no_answer_threshold=1.5) == ""
    assert best(no_answer=False, no_answer_threshold=9.0) == "K"


def test_answers_are_the_best_allowed_pairs_of_all_windows_each_place_once():
    asked = [question("Köln")]
    rows = encode(byte_tokenizer(), asked, 40, 28)
    rng = np.random.default_rng(0)
    starts, ends = rng.normal(size=(2, len(rows), 40))
    found = best_answers(rows, starts, ends, asked, DecodingArguments(n_best=1000, max_answer_length=6))[0]
    wanted: dict = {}
    for row, start, end in zip(rows, starts, ends, strict=True):
        for i, (a, _) in enumerate(row["places"]):
            for j, (_, b) in enumerate(row["places"]):
                if a >= 0 and i <= j and row["places"][j, 0] >= 0 and 0 < b - a <= 6:
                    wanted[a, b] = max(wanted.get((a, b), -np.inf), start[i] + end[j])
    assert {(a.start, a.end): a.score for a in found} == pytest.approx(wanted)
    assert [a.score for a in found] == sorted(wanted.values(), reverse=True)
    few = best_answers(rows, starts, ends, asked, DecodingArguments(n_best=3, max_answer_length=6))[0]
    assert len(few) <= 3


def test_a_question_that_leaves_no_room_is_named():
    with pytest.raises(
        ValueError, match=r"question 1 has 30 tokens: windows of 40 leave 7 to its text, and two of them share 8"
    ):
        encode(byte_tokenizer(), [question("Zoë", asked="x" * 30)], 40, 8)
    with pytest.raises(ValueError, match="leave 0 to its text"):
        encode(byte_tokenizer(), [question("Zoë", asked="x" * 90)], 40, 0)


def test_a_tokenizer_without_cls_is_refused():
    with pytest.raises(ValueError, match="no \\[CLS\\]"):
        encode(byte_tokenizer(add_cls_and_sep=False), [question("Zoë")], 64, 4)


def squad(*questions: Question, **changes) -> str:
    asked = [
        {
            "id": q.id,
            "question": q.question,
            "answers": [{"answer_start": start, "text": text} for start, text in q.answers],
            "is_impossible": not q.answers,
            **changes,
        }
        for q in questions
    ]
    return json.dumps({"data": [{"paragraphs": [{"context": questions[0].context, "qas": asked}]}]})


def test_files_of_both_versions_are_read(tmp_path):
    path = tmp_path / "a.json"
    path.write_text(squad(question("Köln"), question(None)._replace(id="2")), "utf-8")
    assert read_questions(path) == [question("Köln"), question(None)._replace(id="2")]
    record = json.loads(squad(question("Köln")))
    del record["data"][0]["paragraphs"][0]["qas"][0]["is_impossible"]  # version 1.1
    path.write_text(json.dumps(record), "utf-8")
    assert read_questions(path) == [question("Köln")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not in SQuAD's format"),
        ('{"data": [{"paragraphs": [{"context": "a"}]}]}', "not in SQuAD's format.*qas"),
        ('{"data": []}', "holds no questions"),
        (squad(question(None)._replace(answers=[(14, "Köln")])), "answer 'Köln' does not stand at character 14"),
        (squad(question(None)._replace(answers=[(-1, ".")])), "does not stand at character -1"),
        (squad(question(None), question(None)), "the id '1' occurs twice"),
        (squad(question(None, asked=" ")), "question 1: the question or its text is empty"),
    ],
)
def test_bad_files_are_told_what_is_wrong(text, message, tmp_path):
    (tmp_path / "a.json").write_text(text, "utf-8")
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "a.json")


def test_questions_without_an_answer_need_the_option(tmp_path):
    (tmp_path / "a.json").write_text(squad(question(None)), "utf-8")
    with pytest.raises(ValueError, match="1 questions have no answer, 1 for one; give --no_answer"):
        main(
            [
                f"--train_file={tmp_path / 'a.json'}",
                "--model=bundled:language",
                f"--output_dir={tmp_path / 'o'}",
                "--use_cpu",
            ]
        )


@pytest.mark.medium
def test_scores_are_squads():
    """By hand. Articles, punctuation and case do not count; "in Köln" against "Köln": precision 1/2, recall 1."""
    asked = [
        question("Köln")._replace(id="a", answers=[(0, "The Köln!"), (0, "Zoë")]),
        question("Köln")._replace(id="b"),
        question(None)._replace(id="c"),
        question(None)._replace(id="d"),
    ]
    got = scores(asked, ["köln", "in Köln", "", "Zoë"])
    assert got["exact_match"] == 50 and got["f1"] == pytest.approx(100 * (1 + 2 / 3 + 1 + 0) / 4)
    assert got["has_answer_exact_match"] == 50 and got["has_answer_f1"] == pytest.approx(100 * (1 + 2 / 3) / 2)
    assert got["no_answer_exact_match"] == got["no_answer_f1"] == 50
    assert set(scores(asked[:1], ["köln"])) == {"exact_match", "f1"}


@pytest.mark.medium
def test_a_run_writes_squads_predictions_and_answers_alike_outside_of_it(tmp_path):
    """A random tiny model: what counts is that both ways to answers agree; float32 in other batches, hence 1e-4."""
    position = trainable(64, 16)
    config = config_of(
        vocab_size=262,
        preprocessor={"kind": "text", "channels": 16, "position": position},
        output_query={"kind": "position", "position": {**position}},
        postprocessor={"kind": "tokens"},
    )
    PerceiverIOForMaskedLM(config).save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    asked = [
        q._replace(context=TEXT * 3, answers=[(0, "Zoë")] if i % 2 else []) for i, q in enumerate(made_up_questions(6))
    ]
    (tmp_path / "a.json").write_text(squad(*asked), "utf-8")
    files = [f"--{part}_file={tmp_path / 'a.json'}" for part in ("train", "validation", "test")]
    options = (
        "--optimizer adamw --learning_rate 1e-2 --max_steps 4 --warmup_steps 1 --use_cpu --save_strategy no --no_answer"
    )
    out = tmp_path / "out"
    metrics = main([*files, f"--model={tmp_path / 'model'}", f"--output_dir={out}", *options.split()])
    assert {"eval_exact_match", "eval_no_answer_f1", "test_f1", "eval_loss"} <= set(metrics)
    told = json.loads((out / "predictions.json").read_text("utf-8"))
    assert list(told) == [q.id for q in asked]
    listed = json.loads((out / "n_best.json").read_text("utf-8"))
    assert all(sum(answer["probability"] for answer in best) == pytest.approx(1) for best in listed.values())

    model = PerceiverIOForQuestionAnswering.from_pretrained(out)
    pairs = [(q.question, q.context) for q in asked]
    again = answer_questions(model, byte_tokenizer(), pairs, decoding=DecodingArguments(no_answer=True), batch_size=4)
    for name, best in zip(told, again, strict=True):
        assert [a.score for a in best] == pytest.approx([a["score"] for a in listed[name]], abs=1e-4)


@pytest.mark.medium
def test_the_smoke_test_needs_no_file(tmp_path):
    metrics = main(["--smoke_test", f"--output_dir={tmp_path / 'out'}", "--use_cpu"])
    assert {"eval_f1", "eval_exact_match", "train_loss"} <= set(metrics)


def test_the_head_learns_an_answers_place():
    """One question by heart: the loss of a batch that repeats falls to a tenth within 60 steps."""
    position = trainable(64, 16)
    config = config_of(
        vocab_size=262,
        preprocessor={"kind": "text", "channels": 16, "position": position},
        output_query={"kind": "position", "position": {**position}},
        postprocessor={"kind": "projection", "num_outputs": 2},
    )
    model = PerceiverIOForQuestionAnswering(config)
    rows = encode(byte_tokenizer(), [question("Köln")], 64, 4)
    batch = {k: torch.tensor([rows[0][k]]) for k in ("input_ids", "attention_mask", "start_positions", "end_positions")}
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(60):
        loss = model(**batch).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 10
    assert answer_questions(model, byte_tokenizer(), [("Wo?", TEXT)], doc_stride=4)[0][0].text == "Köln"
