"""Fine-tune a Perceiver IO to tell the class of a text.

    python -m hf_perceiver.training.text_classification --model bundled:language --train_file train.csv \\
        --validation_file val.csv --output_dir OUT --optimizer adamw --learning_rate 5e-4 --bf16

Files: CSV, TSV or JSON lines with a text and a label column, or a folder with a folder of .txt files for each class. A text
that is longer than the model reads is cut, or, with `--stride`, read in overlapping windows whose scores are averaged.
"""

import csv
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_softmax
from sklearn.metrics import accuracy_score, f1_score
from transformers import DataCollatorWithPadding

from ..heads_text import PerceiverIOForSequenceClassification
from .recipe import ModelArguments, RecipeArguments, RecipeTrainer, open_model, parse, run, start
from .storage import write_text
from .text_tasks import (
    FineTuning,
    TextArguments,
    check_labels,
    class_names,
    json_lines,
    label_fields,
    open_tokenizer,
    predict,
    prepare_smoke_test,
    window_length,
)

SEPARATORS = {".csv": ",", ".tsv": "\t"}


@dataclass
class ClassificationArguments(TextArguments):
    """TextArguments with the columns' names."""

    text_column: str = field(default="text", metadata={"help": "column, or JSON field, of the text"})
    label_column: str = field(default="label", metadata={"help": "column, or JSON field, of the class"})
    stride: int | None = field(
        default=None,
        metadata={"help": "read long texts in windows that share so many tokens; by default they are cut"},
    )


class Example(NamedTuple):
    """label: None in a test set that has none."""

    text: str
    label: str | None


def read_examples(
    place: str | Path, text_column: str = "text", label_column: str = "label", *, labelled: bool = True
) -> list[Example]:
    """The examples of a .csv, .tsv, .jsonl or .json (lines) file, or of a folder with a folder of .txt files per class.

    labelled=False lets labels be missing. Raises ValueError, with the line, for what is no example, and for no examples.
    """
    path = Path(place)
    if path.is_dir():
        files = sorted(path.glob("*/*.txt"))
        records = [
            (str(file), {text_column: file.read_text("utf-8"), label_column: file.parent.name}) for file in files
        ]
    elif path.suffix in (".jsonl", ".json"):
        records = [(f"{path}:{line}", record) for line, record in json_lines(path)]
    elif path.suffix in SEPARATORS:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, delimiter=SEPARATORS[path.suffix])
            records = [(f"{path}:{reader.line_num}", record) for record in reader]
    else:
        raise ValueError(f"{path} is neither a folder with a folder per class nor a .csv, .tsv, .jsonl or .json file")
    examples = [_example(*record, text_column, label_column, labelled) for record in records]
    if not examples:
        raise ValueError(f"{path} holds no examples; a folder needs CLASS/NAME.txt files, a table a header and rows")
    return examples


def encode(
    tokenizer: Any,
    examples: Sequence[Example],
    names: Sequence[str],
    max_length: int,
    stride: int | None = None,
) -> list[dict[str, Any]]:
    """Rows for Trainer: input_ids, attention_mask, labels, and `example`, the number of the one they are of.

    stride: tokens that neighbouring windows of a long text share; None keeps its first window only.
    """
    windows = tokenizer(
        [example.text for example in examples],
        truncation=True,
        max_length=max_length,
        stride=stride or 0,
        return_overflowing_tokens=stride is not None,
    )
    of_example = windows.get("overflow_to_sample_mapping", range(len(examples)))
    index = {name: i for i, name in enumerate(names)}
    rows = []
    for ids, mask, number in zip(windows["input_ids"], windows["attention_mask"], of_example, strict=True):
        row = {"input_ids": ids, "attention_mask": mask, "example": number}
        label = examples[number].label
        rows.append(row if label is None else {**row, "labels": index[label]})
    return rows


def average_windows(logits: np.ndarray, examples: Sequence[int]) -> np.ndarray:
    """Scores of windows (W, K) and the example of each (W,) -> mean log probability of each example (examples, K)."""
    known = log_softmax(np.asarray(logits, np.float64), axis=-1)
    number = np.asarray(examples)
    count = np.bincount(number)
    return np.stack([np.bincount(number, column) / count for column in known.T], axis=1)


def scores(true: Any, guessed: Any) -> dict[str, float]:
    """Classes of n texts, true and guessed -> accuracy, and F1 averaged over the classes, each counting alike."""
    return {
        "accuracy": float(accuracy_score(true, guessed)),
        "macro_f1": float(f1_score(true, guessed, average="macro", zero_division=0)),
    }


def metrics_of(rows: Sequence[dict[str, Any]]) -> Callable[[Any], dict[str, float]]:
    """Trainer's compute_metrics on these rows: windows averaged, then `scores`."""
    examples = [row["example"] for row in rows]
    true = {row["example"]: row["labels"] for row in rows}

    def compute(prediction: Any) -> dict[str, float]:
        averaged = average_windows(prediction.predictions, examples)
        return scores([true[i] for i in range(len(averaged))], averaged.argmax(-1))

    return compute


def make_trainer(
    model: Any,
    tokenizer: Any,
    training: RecipeArguments,
    train: Sequence[dict[str, Any]] | None,
    evaluation: Sequence[dict[str, Any]] | None = None,
) -> RecipeTrainer:
    """A Trainer for rows of `encode`."""
    return RecipeTrainer(
        model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorWithPadding(tokenizer),
        processing_class=tokenizer,
        compute_metrics=metrics_of(evaluation) if evaluation else None,
    )


def made_up_examples(count: int, seed: int = 0) -> list[Example]:
    """Sentences on weather or on food, for the smoke test."""
    rng = np.random.default_rng(seed)
    words = {"weather": "rain snow wind clouds".split(), "food": "bread soup apples cheese".split()}
    labels = [list(words)[i % 2] for i in range(count)]
    return [Example(f"Today there is {rng.choice(words[label])}, says Zoë.", label) for label in labels]


def main(arguments: list[str] | None = None) -> dict[str, float]:
    kinds = (ClassificationArguments, ModelArguments, FineTuning)
    data, models, training = parse(kinds, arguments, "Fine-tune a Perceiver IO to tell the class of a text.")
    resume = start(training)
    prepare_smoke_test(models, training)
    data.check(training)
    columns = (data.text_column, data.label_column)
    train = read_examples(data.train_file, *columns) if data.train_file else None
    validation = read_examples(data.validation_file, *columns) if data.validation_file else None
    test = read_examples(data.test_file, *columns, labelled=False) if data.test_file else None
    if training.smoke_test and train is None:
        train, validation = made_up_examples(32), made_up_examples(16, seed=1)
    found = [e.label for e in train or validation or [] if e.label is not None]
    names = class_names(models, PerceiverIOForSequenceClassification, found)
    for part in (validation, test):
        check_labels({e.label for e in part or [] if e.label is not None}, names, "the classes are")
    model = open_model(PerceiverIOForSequenceClassification, models, **label_fields(names))
    tokenizer = open_tokenizer(models, model.config, data.tokenizer)
    length = window_length(model.config, tokenizer, data.max_length, data.stride or 0)

    def rows(examples: list[Example] | None) -> list[dict[str, Any]] | None:
        return None if examples is None else encode(tokenizer, examples, names, length, data.stride)

    trainer = make_trainer(model, tokenizer, training, rows(train), rows(validation))
    metrics = run(trainer, resume, saved=[tokenizer])
    if test is not None:
        test_rows = encode(tokenizer, test, names, length, data.stride)
        trainer.compute_metrics = metrics_of(test_rows) if all(e.label is not None for e in test) else None
        predicted = predict(trainer, test_rows)
        averaged = average_windows(predicted.predictions, [row["example"] for row in test_rows])
        if trainer.is_world_process_zero():
            lines = [
                {"label": names[i], "probability": float(np.exp(p).max() / np.exp(p).sum())}
                for i, p in zip(averaged.argmax(-1), averaged, strict=True)
            ]
            write_text(Path(training.output_dir) / "predictions.jsonl", "".join(f"{json.dumps(x)}\n" for x in lines))
        metrics |= {key: value for key, value in predicted.metrics.items() if key.startswith("test_")}
    return metrics


def _example(where: str, record: dict[str, Any], text_column: str, label_column: str, labelled: bool) -> Example:
    text, label = record.get(text_column), record.get(label_column)
    if not isinstance(text, str) or not text.strip():
        raise ValueError(
            f"{where} has no text in {text_column!r}, only {', '.join(map(str, record))}; name the column with --text_column"
        )
    if label is None or label == "":
        if labelled:
            raise ValueError(
                f"{where} has no label in {label_column!r}; give it one, or name the column with --label_column"
            )
        return Example(text, None)
    # A class by number is a name like any other.
    if not isinstance(label, (str, int)):
        raise ValueError(f"{where}: the label {label!r} is no name; one class per text, as a string or a whole number")
    return Example(text, str(label))


if __name__ == "__main__":
    main()
