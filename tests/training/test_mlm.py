"""The recipe for masked language models: what it writes, resuming, masked tokens alone, measures, and bad input."""

import dataclasses
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from small_tokenizers import trained
from transformers import AutoTokenizer, EvalPrediction, pipeline

from hf_perceiver import PerceiverIOForMaskedLM, PerceiverIOTokenizer
from hf_perceiver.losses import IGNORED
from hf_perceiver.training import mlm
from hf_perceiver.training.mlm import (
    MaskedMetrics,
    MLMTraining,
    TextArguments,
    check_schedule,
    main,
    open_language_model,
    score_rows,
    smoke,
    train,
)
from hf_perceiver.training.recipe import ModelArguments, parse
from hf_perceiver.training.text_data import Encoder
from hf_perceiver.training.whole_words import WholeWordMaskingCollator, encode_words

LENGTH = 32
WORDS = "the list of all items is read when it was made and then each one of them can be used for what it does".split()


def position() -> dict:
    return {"kind": "trainable", "num_positions": LENGTH, "channels": 16}


TINY = {
    "num_latents": 4,
    "d_latents": 16,
    "num_self_attends_per_block": 1,
    "qk_channels": 16,
    "v_channels": 16,
    "decoder_qk_channels": 16,
    "decoder_v_channels": 16,
    "preprocessor": {"kind": "text", "channels": 16, "position": position()},
    "output_query": {"kind": "position", "position": position(), "use_input_mask": True},
}


def tiny(**changes) -> ModelArguments:
    return ModelArguments(architecture="language_bytes", config_overrides=json.dumps({**TINY, **changes}))


def training(folder, **options) -> MLMTraining:
    fields = {
        "max_steps": 4,
        "batch_size": 4,
        "per_device_train_batch_size": 4,
        "warmup_steps": 1,
        "logging_steps": 1,
        "eval_steps": 2,
        "save_steps": 100,
        "use_cpu": True,
        "disable_tqdm": True,
        "report_to": [],
    }
    return MLMTraining(output_dir=str(folder), **{**fields, **options})


def documents(count: int = 40) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, size=12)) for _ in range(count)]


def weights(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of four steps: its folder and metrics."""
    folder = tmp_path_factory.mktemp("mlm") / "out"
    texts = TextArguments(validation_share=0.3, max_length=LENGTH)
    return folder, train(tiny(), texts, training(folder), documents=documents())


# What a run writes


def test_a_run_writes_a_folder_for_the_fill_mask_pipeline(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "metrics.json", "learning_curve.csv"} <= names
    results = pipeline("fill-mask", model=str(folder), device="cpu")("the l[MASK]st", top_k=3)
    assert len(results) == 3
    assert all(r["sequence"].startswith("the l") and r["sequence"].endswith("st") for r in results)


def test_metrics_are_those_of_all_masked_tokens(finished):
    folder, metrics = finished
    assert json.loads((folder / "metrics.json").read_text())["eval_perplexity"] == metrics["eval_perplexity"]
    assert metrics["eval_perplexity"] == pytest.approx(np.exp(metrics["eval_loss"]))
    assert 0 <= metrics["eval_masked_accuracy"] <= 1
    header = (folder / "learning_curve.csv").read_text().splitlines()[0].split(",")
    assert {"step", "loss", "eval_masked_accuracy", "eval_perplexity"} <= set(header)


def test_a_trained_model_is_measured_again_without_training(finished, tmp_path):
    folder, metrics = finished
    texts = TextArguments(validation_share=0.3)
    again = train(ModelArguments(model=str(folder)), texts, training(tmp_path, do_train=False), documents=documents())
    for name in ("eval_loss", "eval_masked_accuracy"):
        assert again[name] == metrics[name]
    assert not (tmp_path / "model.safetensors").exists()


def test_documents_may_be_rows_of_a_data_set(tmp_path):
    rows = [{"id": i, "body": document} for i, document in enumerate(documents())]
    texts = TextArguments(text_column="body", validation_rows=2)
    metrics = train(
        tiny(),
        texts,
        training(tmp_path / "out", max_steps=2),
        documents=iter(rows[:30]),
        validation_documents=rows[30:],
    )
    assert metrics["eval_loss"] > 0


@pytest.mark.medium
def test_a_model_learns(tmp_path):
    texts = TextArguments(validation_share=0.0)
    options = {"max_steps": 60, "learning_rate": 1e-2, "optimizer": "adamw", "logging_steps": 20, "do_eval": False}
    train(tiny(), texts, training(tmp_path / "out", **options), documents=documents(400))
    curve = (tmp_path / "out/learning_curve.csv").read_text().splitlines()
    column = curve[0].split(",").index("loss")
    losses = [float(row.split(",")[column]) for row in curve[1:] if row.split(",")[column]]
    # To what the frequencies of single letters give, 2.9, and a little below.
    assert losses[-1] < 3.2 < losses[0]


@pytest.mark.medium
def test_the_smoke_test_needs_nothing_but_a_folder(tmp_path):
    metrics = main(["--smoke_test", "--output_dir", str(tmp_path / "out"), "--use_cpu", "--report_to", "none"])
    assert metrics["eval_loss"] > 0
    assert (tmp_path / "out/model.safetensors").is_file()


def test_a_smoke_test_keeps_what_is_named():
    models, texts = smoke(ModelArguments(model="here"), TextArguments(train_files=["there"]), False)
    assert (models.model, models.architecture, texts.train_files, texts.dataset) == ("here", None, ["there"], None)
    models, texts = smoke(ModelArguments(), TextArguments(), False)
    assert (models.architecture, texts.dataset) == ("language_bytes", "documentation")
    assert smoke(ModelArguments(), TextArguments(), True)[1].dataset is None


def test_files_of_the_command_line_are_read(tmp_path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts/a.txt").write_text("\n".join(documents()))
    (tmp_path / "held_out.txt").write_text("\n".join(documents(60)[40:]))
    command = f"""--architecture language_bytes --train_files {tmp_path}/texts --validation_files {tmp_path}/held_out.txt
        --documents line --packing split --output_dir {tmp_path}/out --max_steps 2 --warmup_steps 1 --batch_size 4
        --per_device_train_batch_size 2 --use_cpu --report_to none --disable_tqdm true"""
    metrics = main([*command.split(), "--config_overrides", json.dumps(TINY)])
    assert metrics["eval_loss"] > 0


def test_help_says_what_each_option_is_for(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    for kind in (TextArguments, MLMTraining, ModelArguments):
        for option in dataclasses.fields(kind):
            assert f"--{option.name}" in said
            if kind is not MLMTraining:
                assert option.metadata["help"]


def test_defaults_are_the_papers(tmp_path):
    # Perceiver IO, 4.1, F.3 and table 12, as cited at the top of mlm.py.
    _, texts, arguments = parse(
        (ModelArguments, TextArguments, MLMTraining), ["--output_dir", str(tmp_path), "--use_cpu"], ""
    )
    assert (arguments.optimizer, arguments.learning_rate, arguments.weight_decay) == ("lamb", 1.25e-3, 0.01)
    assert (arguments.warmup_steps, arguments.max_steps) == (1000, 500_000)
    assert arguments.lr_scheduler_type == "cosine"
    assert arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size == 2048
    assert (texts.mlm_probability, texts.packing) == (0.15, "pack")


# Rows that do not depend on chance


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_broken_off_and_resumed_equals_a_straight_one(tmp_path, streaming):
    # The checkpoint is in the midst of the second pass.
    texts = TextArguments(validation_share=0.3, streaming=streaming, shuffle_buffer=3)
    data = documents(10)
    options = {"max_steps": 8, "save_steps": 5, "seed": 5}
    straight = train(tiny(), texts, training(tmp_path / "straight", **options), documents=data)
    shutil.copytree(tmp_path / "straight/checkpoint-5", tmp_path / "resumed/checkpoint-5")
    resumed = train(
        tiny(), texts, training(tmp_path / "resumed", resume_from_checkpoint="last", **options), documents=data
    )
    want, got = weights(tmp_path / "straight"), weights(tmp_path / "resumed")
    assert all(torch.equal(want[name], got[name]) for name in want)
    assert resumed["eval_loss"] == straight["eval_loss"]
    before = load_file(tmp_path / "straight/checkpoint-5/model.safetensors")
    assert not all(torch.equal(want[name], before[name]) for name in want)
    if not streaming:  # which is all one epoch to Trainer
        epoch = json.loads((tmp_path / "straight/checkpoint-5/trainer_state.json").read_text())["epoch"]
        assert 1 < epoch < 2


def test_rows_are_masked_anew_in_each_epoch(tmp_path, monkeypatch):
    numbers = []

    class Noting(WholeWordMaskingCollator):
        def __call__(self, rows):
            numbers.append([row["example_id"] for row in rows])
            return super().__call__(rows)

    monkeypatch.setattr(mlm, "WholeWordMaskingCollator", Noting)
    texts = TextArguments(validation_share=0.0, packing="truncate")
    arguments = training(tmp_path / "out", max_steps=-1, num_train_epochs=3, do_eval=False)
    train(tiny(), texts, arguments, documents=documents(8))
    seen = [number for batch in numbers[1:] for number in batch]  # the first is the check of the model
    assert sorted(seen) == list(range(24))
    # Each epoch in an order of its own.
    assert [n % 8 for n in seen[:8]] != [n % 8 for n in seen[8:16]]


# Masked tokens alone


def model_and_rows():
    tokenizer = PerceiverIOTokenizer(model_max_length=LENGTH)
    torch.manual_seed(0)
    model = open_language_model(tiny(), tokenizer).eval()
    encoder = Encoder(tokenizer)
    rows = [
        encoder.row(window, i) for i, window in enumerate(encoder(d[: 20 + 2 * i] for i, d in enumerate(documents(6))))
    ]
    return tokenizer, model, rows


def test_masked_tokens_alone_have_the_same_loss_and_gradient():
    tokenizer, model, rows = model_and_rows()
    found = []
    for only_masked in (False, True):
        batch = WholeWordMaskingCollator(tokenizer, 0.3, only_masked=only_masked)(rows)
        loss = model(**batch).loss
        model.zero_grad()
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    (loss, gradient), (some_loss, some_gradient) = found
    # Sums in float32 in another order.
    assert some_loss == pytest.approx(loss, rel=1e-6)
    torch.testing.assert_close(some_gradient, gradient, rtol=1e-4, atol=1e-6)


def test_measures_do_not_depend_on_batches_or_on_what_is_decoded():
    tokenizer, model, rows = model_and_rows()
    found = []
    for only_masked, size in ((False, 6), (True, 6), (True, 4), (False, 1)):
        metrics = MaskedMetrics()
        collator = WholeWordMaskingCollator(tokenizer, 0.6, only_masked=only_masked)
        measured = {}
        for start in range(0, len(rows), size):
            batch = collator(rows[start : start + size])
            with torch.no_grad():
                scores = score_rows((model(**batch).logits,), batch["labels"])
            last = start + size >= len(rows)
            measured = metrics(EvalPrediction(scores.numpy(), batch["labels"].numpy()), compute_result=last)
            assert bool(measured) == last
        found.append(measured)
    for measured in found[1:]:
        assert measured == pytest.approx(found[0], rel=1e-5)
    # The sums began anew.
    assert metrics.sums.tolist() == [0, 0, 0]


def test_scores_are_of_masked_tokens():
    logits = torch.tensor([[[2.0, 0.0, 0.0], [0.0, 3.0, 0.0], [0.0, 0.0, 9.0]]])
    labels = torch.tensor([[0, 2, IGNORED]])
    surprise, right, count = score_rows(logits, labels)[0].tolist()
    want = -torch.log_softmax(logits[0], -1)[[0, 1], [0, 2]].sum().item()
    assert (surprise, right, count) == (pytest.approx(want, rel=1e-6), 1, 2)


# Tokenizers


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fresh_model_is_made_for_its_tokenizer(tmp_path, streaming):
    tokenizer = trained("unigram")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    models = tiny()
    texts = TextArguments(tokenizer=str(tmp_path / "tokenizer"), validation_share=0.2, streaming=streaming)
    train(models, texts, training(tmp_path / "out", max_steps=2), documents=documents(30))
    model = PerceiverIOForMaskedLM.from_pretrained(tmp_path / "out")
    saved = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert model.config.vocab_size == len(tokenizer) == len(saved)
    assert model.config.mask_token_id == tokenizer.mask_token_id
    assert saved.model_max_length == LENGTH
    assert encode_words(saved, ["the list"])[0][0].tolist() == encode_words(tokenizer, ["the list"])[0][0].tolist()


def test_a_trained_model_keeps_its_tokenizer(finished, tmp_path):
    folder, _ = finished
    trained("unigram").save_pretrained(tmp_path / "tokenizer")
    texts = TextArguments(tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=r"vocabulary of 64 tokens, the model one of 262: leave --tokenizer out"):
        train(ModelArguments(model=str(folder)), texts, training(tmp_path / "out"), documents=documents())


def test_a_tokenizer_of_the_same_size_with_other_ids_is_refused(finished, tmp_path):
    folder, _ = finished
    other = trained("bpe", vocab_size=262)
    assert len(other) == 262
    other.save_pretrained(tmp_path / "tokenizer")
    texts = TextArguments(tokenizer=str(tmp_path / "tokenizer"))
    with pytest.raises(ValueError, match=r"of the tokenizer's 262 tokens have another id in"):
        train(ModelArguments(model=str(folder)), texts, training(tmp_path / "out"), documents=documents())


def test_embeddings_may_have_room_for_more_tokens():
    tokenizer = PerceiverIOTokenizer()
    assert open_language_model(tiny(vocab_size=320), tokenizer).config.vocab_size == 320
    with pytest.raises(ValueError, match="vocabulary of 262 tokens, the model one of 100"):
        open_language_model(tiny(vocab_size=100), tokenizer)


# Bad input: an error that says what is wrong, and nothing written


BAD = [
    ({"models": ModelArguments()}, "give --model to go on with trained weights, or --architecture"),
    ({"models": ModelArguments(architecture="bert")}, "architecture 'bert' is not known"),
    ({"models": ModelArguments(architecture="imagenet_fourier")}, "reads text input.*'grid'"),
    (
        {"models": ModelArguments(architecture="language_sentencepiece")},
        "vocabulary of 32,000, whose tokenizer was not",
    ),
    ({"models": ModelArguments(model="nowhere/at-all")}, "no tokenizer could be loaded from nowhere/at-all"),
    ({"texts": {"max_length": LENGTH + 1}}, r"does not take rows of max_length=33 tokens: .*32"),
    ({"texts": {"max_length": 2}}, "max_length=2 leaves no room"),
    ({"texts": {"tokenizer": "TOKENIZER", "undecodable": "keep"}}, "'keep' needs a tokenizer of bytes"),
    (
        {"texts": {"validation_share": 1e-9}},
        r"validation_share=1e-09 of the documents is none of these; make documents",
    ),
    ({"documents": []}, "validation_share=0.02 of the documents is none of these"),
    ({"documents": [], "texts": {"validation_share": 0}}, "the data hold no text to train on: no document"),
    ({"documents": [" ", "\n"], "texts": {"validation_share": 0, "streaming": True}}, "the data hold no text"),
    ({"documents": [{"body": "text"}]}, "no column 'text', only body"),
    ({"documents": iter(["text"]), "texts": {"streaming": True}}, "a generator can be gone through once"),
    ({"documents": None}, "there is no text: give --train_files"),
    ({"documents": None, "texts": {"train_files": ["nowhere"]}}, "nowhere holds no text"),
    ({"training": {"warmup_steps": 4}}, "warmup_steps=4 is no less than the run's 4 steps"),
    ({"training": {"do_train": False}, "texts": {"validation_share": 0}}, "there is nothing to measure on"),
]


@pytest.mark.parametrize(("case", "message"), BAD, ids=[message[:40] for _, message in BAD])
def test_bad_input_is_an_error_before_anything_is_written(tmp_path, case, message):
    options = {"validation_share": 0.3, **case.get("texts", {})}
    if "validation_share" not in case.get("texts", {}) and "documents" in case:
        options["validation_share"] = 0.02
    if options.get("tokenizer"):
        trained("unigram").save_pretrained(tmp_path / "tokenizer")
        options["tokenizer"] = str(tmp_path / "tokenizer")
    arguments = training(tmp_path / "out", **case.get("training", {}))
    with pytest.raises(ValueError, match=message):
        train(
            case.get("models", tiny()),
            TextArguments(**options),
            arguments,
            documents=case.get("documents", documents()),
        )
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_files": ["a"], "dataset": "documentation"}, "give one of --train_files"),
        ({"validation_files": ["a"], "dataset": "documentation"}, "held-out part of its own"),
        ({"validation_share": 1.0}, "validation_share=1.0 is a share"),
        ({"validation_rows": 0}, "validation_rows=0 must be at least 1"),
    ],
)
def test_text_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        TextArguments(**options)


def test_a_data_set_of_the_hub_needs_its_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ValueError, match=r"--dataset_name some/set needs the package datasets: pip install datasets"):
        train(tiny(), TextArguments(dataset_name="some/set"), training(tmp_path / "out"))


def test_batches_are_made_of_whole_parts(tmp_path):
    assert training(tmp_path, batch_size=12).gradient_accumulation_steps == 3
    assert training(tmp_path, batch_size=None, gradient_accumulation_steps=5).gradient_accumulation_steps == 5
    with pytest.raises(ValueError, match=r"batch_size=10 cannot be made of parts of 4 rows"):
        training(tmp_path, batch_size=10)
    with pytest.raises(ValueError, match="leave it False"):
        training(tmp_path, remove_unused_columns=True)


def test_a_stream_has_no_epochs(tmp_path):
    epochs = training(tmp_path, max_steps=-1, num_train_epochs=2)
    with pytest.raises(ValueError, match="a stream has no end, and so no epochs: give --max_steps"):
        check_schedule(epochs, None)
    check_schedule(epochs, 16)
    with pytest.raises(ValueError, match="no less than the run's 2 steps"):
        check_schedule(training(tmp_path, max_steps=-1, num_train_epochs=2, warmup_steps=2), 4)
