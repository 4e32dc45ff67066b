"""Fine-tune a Perceiver IO to find the answer to a question in a text.

    python -m hf_perceiver.training.question_answering --model bundled:language --train_file train-v2.0.json \\
        --validation_file dev-v2.0.json --output_dir OUT --optimizer adamw --learning_rate 5e-4 --bf16

Files are SQuAD's, version 1.1 or 2.0 (questions without an answer). A long text is read in windows that overlap, each after
the question; [CLS] as first and last token says that a window holds no answer. transformers 5 has no question-answering
pipeline any more: `answer_questions` takes its place.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from tqdm.auto import tqdm
from transformers import DataCollatorWithPadding

from ..heads_text import PerceiverIOForQuestionAnswering
from .recipe import ModelArguments, RecipeArguments, RecipeTrainer, open_model, parse, run, start
from .storage import write_text
from .text_tasks import (
    FineTuning,
    TextArguments,
    checkpoint_fields,
    open_tokenizer,
    predict,
    prepare_smoke_test,
    window_length,
)


@dataclass
class DecodingArguments:
    """How scores become an answer."""

    n_best: int = field(default=20, metadata={"help": "first and last tokens of a window that are paired"})
    max_answer_length: int = field(default=200, metadata={"help": "characters of the longest answer"})
    no_answer: bool = field(default=False, metadata={"help": "questions may have no answer, as in SQuAD 2.0"})
    no_answer_threshold: float = field(
        default=0.0, metadata={"help": "an answer is given where its score beats no answer's by more than this"}
    )

    def __post_init__(self) -> None:
        if self.n_best < 1 or self.max_answer_length < 1:
            raise ValueError(f"n_best={self.n_best} and max_answer_length={self.max_answer_length}: at least 1")


@dataclass
class QuestionArguments(TextArguments, DecodingArguments):
    """TextArguments with the windows' overlap, and DecodingArguments."""

    doc_stride: int = field(default=32, metadata={"help": "tokens of the text that two of its windows share"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.doc_stride < 0:
            raise ValueError(f"doc_stride={self.doc_stride} is a number of tokens from 0")


class Question(NamedTuple):
    """answers: (first character, text), several where people disagree, none where the text has no answer."""

    id: str
    question: str
    context: str
    answers: list[tuple[int, str]]


def read_questions(place: str | Path) -> list[Question]:
    """The questions of a SQuAD file, version 1.1 or 2.0.

    Raises ValueError, with the question's id, for an answer that does not stand where it says, for an id that occurs
    twice and for no questions.
    """
    path = Path(place)
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        found = [
            Question(
                str(asked["id"]),
                asked["question"].strip(),
                paragraph["context"],
                []
                if asked.get("is_impossible")
                else [(a["answer_start"], a["text"]) for a in asked.get("answers", [])],
            )
            for article in articles
            for paragraph in article["paragraphs"]
            for asked in paragraph["qas"]
        ]
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not in SQuAD's format, data > paragraphs > qas: {error!r}") from error
    if not found:
        raise ValueError(f"{path} holds no questions")
    ids: set[str] = set()
    for question in found:
        check_question(question)
        if question.id in ids:
            raise ValueError(f"{path}: the id {question.id!r} occurs twice")
        ids.add(question.id)
    return found


def check_question(question: Question) -> None:
    """Raise ValueError for a question or text that is empty, and for an answer that does not stand where it says."""
    if not question.question.strip() or not question.context.strip():
        raise ValueError(f"question {question.id}: the question or its text is empty")
    for begin, text in question.answers:
        there = question.context[begin : begin + len(text)] if type(begin) is int and begin >= 0 else None
        if not text or there != text:
            raise ValueError(
                f"question {question.id}: the answer {text!r} does not stand at character {begin} of the text, but "
                f"{there!r}; places count characters, not bytes"
            )


def encode(tokenizer: Any, questions: Sequence[Question], max_length: int, doc_stride: int) -> list[dict[str, Any]]:
    """Rows for Trainer, one per window: input_ids, attention_mask, start_positions and end_positions.

    Besides `question`, its number, and `places` (L, 2): the characters of the text that each token covers, -1 where it is
    no token of the text. The target is the first answer, [CLS] where a window does not hold it.
    Raises ValueError for a tokenizer without [CLS], and where a question leaves no room for its text.
    """
    rows = []
    for number, question in enumerate(tqdm(questions, desc="questions -> windows", disable=len(questions) < 1000)):
        alone = len(tokenizer(question.question, add_special_tokens=False, verbose=False)["input_ids"])
        room = max_length - alone - tokenizer.num_special_tokens_to_add(pair=True)
        if room <= doc_stride:
            raise ValueError(
                f"question {question.id} has {alone} tokens: windows of {max_length} leave {max(room, 0)} to its text, and "
                f"two of them share {doc_stride}; raise max_length, lower doc_stride, or shorten the question"
            )
        windows = tokenizer(
            question.question,
            question.context,
            truncation="only_second",
            max_length=max_length,
            stride=doc_stride,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        for window, ids in enumerate(windows["input_ids"]):
            if ids[0] != tokenizer.cls_token_id:
                raise ValueError(
                    "the tokenizer puts no [CLS] before a text; the place for no answer: set its cls_token"
                )
            of_text = np.array([part == 1 for part in windows.sequence_ids(window)])
            places = np.where(of_text[:, None], np.array(windows["offset_mapping"][window]), -1)
            begin, end = target(places, question.answers)
            rows.append(
                {
                    "input_ids": ids,
                    "attention_mask": windows["attention_mask"][window],
                    "start_positions": begin,
                    "end_positions": end,
                    "question": number,
                    "places": places,
                }
            )
    return rows


def target(places: np.ndarray, answers: Sequence[tuple[int, str]]) -> tuple[int, int]:
    """First and last token of the first answer; (0, 0), [CLS], where the window does not hold all of it."""
    if not answers:
        return 0, 0
    start, end = answers[0][0], answers[0][0] + len(answers[0][1])
    begins, ends = places.T
    # Each byte of a character covers all of it: an answer goes from its first character's first byte to its last's last.
    first = np.flatnonzero((begins <= start) & (start < ends))
    last = np.flatnonzero((begins < end) & (end <= ends))
    return (int(first[0]), int(last[-1])) if len(first) and len(last) else (0, 0)


class Answer(NamedTuple):
    """text "" is no answer; start and end are characters of the context, 0 and 0 without one."""

    text: str
    score: float
    start: int
    end: int


def best_answers(
    rows: Sequence[dict[str, Any]],
    start_logits: np.ndarray,
    end_logits: np.ndarray,
    questions: Sequence[Question],
    decoding: DecodingArguments,
) -> list[list[Answer]]:
    """Scores of the rows' tokens (W, L) -> for each question its best answers over all windows, best first.

    score: the logits of first and last token summed; where questions may have no answer, less no answer's own, those of
    [CLS] in the window that speaks least for it. The answer "" then has the threshold as its score.
    """
    found: list[dict[tuple[int, int], float]] = [{} for _ in questions]
    nothing = np.full(len(questions), np.inf)
    for row, starts, ends in zip(rows, start_logits, end_logits, strict=True):
        places, number = row["places"], row["question"]
        starts, ends = starts[: len(places)], ends[: len(places)]
        nothing[number] = min(nothing[number], float(starts[0] + ends[0]))
        of_text = np.flatnonzero(places[:, 0] >= 0)
        firsts, lasts = (
            of_text[np.argsort(-side[of_text], kind="stable")[: decoding.n_best]] for side in (starts, ends)
        )
        for first in firsts:
            for last in lasts:
                begin, end = int(places[first, 0]), int(places[last, 1])
                if first <= last and begin < end <= begin + decoding.max_answer_length:
                    score = float(starts[first] + ends[last])
                    # Windows overlap, and the bytes of a character share its place: the best score of a place counts.
                    found[number][begin, end] = max(score, found[number].get((begin, end), -np.inf))
    answers = []
    for number, question in enumerate(questions):
        less = nothing[number] if decoding.no_answer else 0.0
        of_question = [Answer(question.context[b:e], score - less, b, e) for (b, e), score in found[number].items()]
        if decoding.no_answer or not of_question:
            of_question.append(Answer("", decoding.no_answer_threshold, 0, 0))
        # Of equals, no answer first: it has to be beaten.
        answers.append(sorted(of_question, key=lambda a: (-a.score, a.end, a.start))[: decoding.n_best])
    return answers


def scores(questions: Sequence[Question], answers: Sequence[str]) -> dict[str, float]:
    """Exact match and F1 in percent, by SQuAD's rules; of questions with and without an answer too, where there are both."""
    # An import of seconds, which nothing else here needs.
    from torchmetrics.functional.text import squad

    def measured(chosen: Sequence[int]) -> dict[str, float]:
        given: list[Any] = [{"id": questions[i].id, "prediction_text": answers[i]} for i in chosen]
        wanted: list[Any] = [
            {
                "id": questions[i].id,
                "answers": {
                    "text": [text for _, text in questions[i].answers] or [""],
                    "answer_start": [start for start, _ in questions[i].answers] or [0],
                },
            }
            for i in chosen
        ]
        return {name: float(value) for name, value in squad(given, wanted).items()}

    has = [i for i, question in enumerate(questions) if question.answers]
    hasnt = [i for i, question in enumerate(questions) if not question.answers]
    figures = measured(range(len(questions)))
    for name, chosen in (("has_answer", has), ("no_answer", hasnt)):
        if has and hasnt:
            figures |= {f"{name}_{key}": value for key, value in measured(chosen).items()}
    return figures


def metrics_of(
    rows: Sequence[dict[str, Any]], questions: Sequence[Question], decoding: DecodingArguments
) -> Callable[[Any], dict[str, float]]:
    """Trainer's compute_metrics on these rows: scores of windows to answers, then `scores`."""

    def compute(prediction: Any) -> dict[str, float]:
        answers = best_answers(rows, prediction.predictions[0], prediction.predictions[1], questions, decoding)
        return scores(questions, [best[0].text for best in answers])

    return compute


@torch.no_grad()
def answer_questions(
    model: Any,
    tokenizer: Any,
    questions: Sequence[tuple[str, str]],
    *,
    doc_stride: int = 32,
    batch_size: int = 16,
    decoding: DecodingArguments | None = None,
) -> list[list[Answer]]:
    """(question, text) pairs -> each one's best answers, best first; what the question-answering pipeline was."""
    asked = [Question(str(i), question, context, []) for i, (question, context) in enumerate(questions)]
    for question in asked:
        check_question(question)
    rows = encode(tokenizer, asked, window_length(model.config, tokenizer, None), doc_stride)
    collate = DataCollatorWithPadding(tokenizer)
    starts, ends = [], []
    model.eval()
    for first in range(0, len(rows), batch_size):
        batch = collate(
            [{k: row[k] for k in ("input_ids", "attention_mask")} for row in rows[first : first + batch_size]]
        )
        outputs = model(**batch.to(model.device))
        starts += list(outputs.start_logits.float().cpu().numpy())
        ends += list(outputs.end_logits.float().cpu().numpy())
    return best_answers(rows, starts, ends, asked, decoding or DecodingArguments())  # type: ignore[arg-type]


def make_trainer(
    model: Any,
    tokenizer: Any,
    training: RecipeArguments,
    train: Sequence[dict[str, Any]] | None,
    evaluation: Sequence[dict[str, Any]] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
) -> RecipeTrainer:
    """A Trainer for rows of `encode`."""
    training.label_names = ["start_positions", "end_positions"]
    return RecipeTrainer(
        model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
    )


def made_up_questions(count: int, seed: int = 0) -> list[Question]:
    """Who lives where, for the smoke test; every fourth question has no answer."""
    rng = np.random.default_rng(seed)
    towns = ("Köln", "Paris", "漢口", "São Paulo")
    found = []
    for i in range(count):
        town = str(rng.choice(towns))
        context = f"Zoë has lived in {town} for {rng.integers(2, 90)} years, and she means to stay there. " * 2
        asked, answers = ("Where is Zoë?", [(context.index(town), town)]) if i % 4 else ("Who is Ada?", [])
        found.append(Question(str(i), asked, context, answers))
    return found


def main(arguments: list[str] | None = None) -> dict[str, float]:
    kinds = (QuestionArguments, ModelArguments, FineTuning)
    data, models, training = parse(kinds, arguments, "Fine-tune a Perceiver IO to find answers in a text.")
    resume = start(training)
    prepare_smoke_test(models, training)
    data.check(training)
    train = read_questions(data.train_file) if data.train_file else []
    validation = read_questions(data.validation_file) if data.validation_file else []
    test = read_questions(data.test_file) if data.test_file else []
    if training.smoke_test and not train:
        train, validation = made_up_questions(32), made_up_questions(16, seed=1)
        data.no_answer = True
    if not data.no_answer and (without := [q.id for q in train + validation if not q.answers]):
        raise ValueError(
            f"{len(without)} questions have no answer, {without[0]} for one; give --no_answer, as for SQuAD 2.0"
        )
    checkpoint_fields(models)
    model = open_model(PerceiverIOForQuestionAnswering, models)
    tokenizer = open_tokenizer(models, model.config, data.tokenizer)
    length = window_length(model.config, tokenizer, data.max_length, data.doc_stride)
    train_rows, validation_rows, test_rows = (
        encode(tokenizer, questions, length, data.doc_stride) for questions in (train, validation, test)
    )
    measure = metrics_of(validation_rows, validation, data) if validation else None
    trainer = make_trainer(model, tokenizer, training, train_rows or None, validation_rows or None, measure)
    metrics = run(trainer, resume, saved=[tokenizer])
    if test:
        trainer.compute_metrics = metrics_of(test_rows, test, data) if any(q.answers for q in test) else None
        found = predict(trainer, test_rows)
        answers = best_answers(test_rows, found.predictions[0], found.predictions[1], test, data)
        if trainer.is_world_process_zero():
            write_answers(Path(training.output_dir), dict(zip((q.id for q in test), answers, strict=True)))
        metrics |= {key: value for key, value in found.metrics.items() if key.startswith("test_")}
    return metrics


def write_answers(output: Path, answers: Mapping[str, Sequence[Answer]]) -> None:
    """predictions.json, question -> answer, as SQuAD's evaluation reads it; n_best.json with probabilities."""
    texts = {name: best[0].text for name, best in answers.items()}
    write_text(output / "predictions.json", json.dumps(texts, indent=1, ensure_ascii=False) + "\n")
    listed = {}
    for name, best in answers.items():
        shares = softmax([answer.score for answer in best])
        listed[name] = [a._asdict() | {"probability": float(p)} for a, p in zip(best, shares, strict=True)]
    write_text(output / "n_best.json", json.dumps(listed, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
