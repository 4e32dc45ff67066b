"""The text-classification recipe: files to rows, windows to one score per text, metrics, a run that a pipeline reads."""

import json

import numpy as np
import pytest
from helpers import config_of, trainable
from transformers import pipeline

from hf_perceiver import PerceiverIOForMaskedLM, PerceiverIOTokenizer
from hf_perceiver.training.text_classification import (
    Example,
    average_windows,
    encode,
    main,
    read_examples,
    scores,
)


@pytest.fixture(scope="module")
def language_model(tmp_path_factory):
    """A folder with a random tiny language model of 40 bytes and its tokenizer."""
    folder = tmp_path_factory.mktemp("tiny")
    position = trainable(40, 16)
    config = config_of(
        vocab_size=262,
        preprocessor={"kind": "text", "channels": 16, "position": position},
        output_query={"kind": "position", "position": position},
        postprocessor={"kind": "tokens"},
    )
    PerceiverIOForMaskedLM(config).save_pretrained(folder)
    PerceiverIOTokenizer(model_max_length=40).save_pretrained(folder)
    return str(folder)


WANTED = [Example('a "b", c', "x"), Example("dä\ne", "1")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.csv", 'text,label\n"a ""b"", c",x\n"dä\ne",1\n'),
        ("a.tsv", 'label\ttext\nx\t"a ""b"", c"\n1\t"dä\ne"\n'),
        ("a.jsonl", '{"text": "a \\"b\\", c", "label": "x"}\n{"text": "dä\\ne", "label": 1}\n'),
    ],
)
def test_every_format_gives_the_same_examples(name, text, tmp_path):
    (tmp_path / name).write_text(text, encoding="utf-8")
    assert read_examples(tmp_path / name) == WANTED


def test_a_folder_per_class_is_read(tmp_path):
    for label, text in (("x", "one"), ("y", "two")):
        (tmp_path / label).mkdir()
        (tmp_path / label / "a.txt").write_text(text)
    assert read_examples(tmp_path) == [Example("one", "x"), Example("two", "y")]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "text,label\n", "holds no examples"),
        ("a.csv", "words,label\na,b\n", "a.csv:2 has no text in 'text', only words, label"),
        ("a.csv", "text,label\na,\n", "a.csv:2 has no label"),
        ("a.jsonl", '{"text": "a", "label": [1]}', r"a.jsonl:1: the label \[1\] is no name"),
        ("a.txt", "a", "neither a folder with a folder per class nor"),
    ],
)
def test_what_is_no_example_is_named_with_its_line(name, text, message, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_examples(tmp_path / name)


def test_labels_may_be_missing_where_they_are_not_needed(tmp_path):
    (tmp_path / "a.csv").write_text("text\na\n")
    assert read_examples(tmp_path / "a.csv", labelled=False) == [Example("a", None)]


def test_long_texts_are_cut_or_read_in_windows_that_overlap():
    tokenizer = PerceiverIOTokenizer(model_max_length=8)
    examples = [Example("abcdefgh", "x"), Example("é", "y")]
    cut = encode(tokenizer, examples, ["x", "y"], 8)
    assert [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in cut] == ["abcdef", "é"]
    windows = encode(tokenizer, examples, ["x", "y"], 8, stride=3)
    texts = [tokenizer.decode(row["input_ids"], skip_special_tokens=True) for row in windows]
    assert texts == ["abcdef", "defgh", "é"]
    assert [(row["example"], row["labels"]) for row in windows] == [(0, 0), (0, 0), (1, 1)]


def test_windows_of_a_text_are_averaged_as_log_probabilities():
    """By hand: probabilities (0.9, 0.1) and (0.2, 0.8) have the geometric means 0.42 and 0.28."""
    logits = np.log([[0.9, 0.1], [0.5, 0.5], [0.2, 0.8]])
    averaged = np.exp(average_windows(logits, [0, 1, 0]))
    np.testing.assert_allclose(averaged, [[0.18**0.5, 0.08**0.5], [0.5, 0.5]])


def test_classes_count_alike_in_macro_f1():
    """By hand: F1 of 0 is 6/7 and of 1 is 0."""
    assert scores([0, 0, 0, 1], [0, 0, 0, 0]) == {"accuracy": 0.75, "macro_f1": pytest.approx(3 / 7)}


@pytest.mark.medium
def test_a_run_learns_writes_predictions_and_a_pipeline_reads_it(language_model, tmp_path):
    """Whether a text begins with a or b, by heart: this seed ends at 100 %."""
    rows = [f"{'ab'[i % 2]}{i * 7919 % 1000}x,{'ab'[i % 2].upper()}\n" for i in range(64)]
    (tmp_path / "train.csv").write_text("text,label\n" + "".join(rows))
    (tmp_path / "test.csv").write_text("text\na1x\nb2x\n")
    out = tmp_path / "out"
    files = [f"--train_file={tmp_path / 'train.csv'}", f"--validation_file={tmp_path / 'train.csv'}"]
    options = (
        "--optimizer adamw --learning_rate 1e-2 --max_steps 60 --warmup_steps 5 --use_cpu --save_strategy no".split()
    )
    metrics = main(
        [*files, f"--test_file={tmp_path / 'test.csv'}", f"--model={language_model}", f"--output_dir={out}", *options]
    )
    assert metrics["eval_accuracy"] == 1 and metrics["eval_macro_f1"] == 1
    told = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert [line["label"] for line in told] == ["A", "B"] and all(line["probability"] > 0.5 for line in told)
    assert [result["label"] for result in pipeline("text-classification", model=str(out))(["a1x", "b2x"])] == ["A", "B"]


def test_labels_that_training_does_not_have_stop_a_run_early(language_model, tmp_path):
    (tmp_path / "a.csv").write_text("text,label\na,x\nb,y\n")
    (tmp_path / "b.csv").write_text("text,label\na,z\n")
    files = [f"--train_file={tmp_path / 'a.csv'}", f"--validation_file={tmp_path / 'b.csv'}"]
    with pytest.raises(ValueError, match="unknown labels 'z'; the classes are x, y"):
        main([*files, f"--model={language_model}", f"--output_dir={tmp_path / 'out'}", "--use_cpu"])


@pytest.mark.medium
def test_the_smoke_test_needs_no_file(tmp_path):
    metrics = main(["--smoke_test", f"--output_dir={tmp_path / 'out'}", "--use_cpu"])
    assert {"eval_accuracy", "eval_macro_f1", "train_loss"} <= set(metrics)


def test_without_data_or_model_the_way_out_is_said(tmp_path):
    with pytest.raises(ValueError, match="give --train_file, or --smoke_test"):
        main([f"--output_dir={tmp_path}", "--use_cpu"])
