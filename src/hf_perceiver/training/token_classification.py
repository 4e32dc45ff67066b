"""Fine-tune a Perceiver IO to tell the class of each word, on bytes or on any tokens with offsets.

    python -m hf_perceiver.training.token_classification --model bundled:language --train_file train.jsonl \\
        --validation_file val.jsonl --output_dir OUT --optimizer adamw --learning_rate 5e-4 --bf16

Files: JSON lines with {"tokens": [...], "labels": [...]} or {"text": ..., "spans": [{"start", "end", "label"}]}, places in
characters, end exclusive; or CoNLL, a word and its label on each line (the first and the last column), an empty line
between texts. Labels may be B-X, I-X and O, or plain names.

A word's label goes to all of its tokens, and to the blank between two words of one span, so that
`pipeline("token-classification", ..., aggregation_strategy="simple")` gives whole spans; B-X goes on as I-X.
`--no_label_all_tokens` leaves all tokens but a word's first out of the loss, as is usual for sub-word tokens. A word's
prediction is that of its first token, in the window where most text stands around it.
"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from sklearn.metrics import accuracy_score, f1_score
from transformers import DataCollatorForTokenClassification

from ..heads_text import PerceiverIOForTokenClassification
from ..losses import IGNORED
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

OUTSIDE = "O"


@dataclass
class TokenArguments(TextArguments):
    """TextArguments with what labels and windows ask for."""

    label_all_tokens: bool = field(
        default=True, metadata={"help": "every token of a word carries its label, else the first one alone"}
    )
    stride: int = field(default=32, metadata={"help": "tokens that two windows of a long text share"})


class Example(NamedTuple):
    """A text, its words as (start, end) in characters, and a label for each word; [] where they are not known."""

    text: str
    words: list[tuple[int, int]]
    labels: list[str]


def read_examples(place: str | Path, *, labelled: bool = True) -> list[Example]:
    """The examples of a JSON lines file (.jsonl, .json), or of a CoNLL file with any other ending.

    labelled=False lets labels be missing: JSON lines with "tokens" or "text" alone.
    Raises ValueError, with the line, for what is no example, and for no examples.
    """
    path = Path(place)
    if path.suffix in (".jsonl", ".json"):
        examples = []
        for line, record in json_lines(path):
            try:
                examples.append(example_of(record, labelled=labelled))
            except ValueError as error:
                raise ValueError(f"{path}:{line}: {error}") from error
    else:
        examples = list(_conll(path))
    if not examples:
        raise ValueError(f"{path} holds no examples")
    return examples


def example_of(record: dict[str, Any], *, labelled: bool = True) -> Example:
    """A record with tokens and labels, or with a text and spans. Raises ValueError where the two do not fit."""
    if "tokens" in record:
        return example_of_words(record["tokens"], record.get("labels", None if labelled else []))
    if not isinstance(record.get("text"), str):
        raise ValueError(f'neither "tokens" and "labels" nor "text" and "spans", but {", ".join(record) or "nothing"}')
    if "spans" not in record and labelled:
        raise ValueError('a "text" without "spans"; give [] where there are none')
    example = example_of_spans(record["text"], record.get("spans", []))
    return example if "spans" in record else example._replace(labels=[])


def example_of_words(words: Any, labels: Any) -> Example:
    """Words and their labels, joined by a blank. labels=[] where they are not known."""
    if not isinstance(words, list) or not words or not all(isinstance(w, str) and w.strip() for w in words):
        raise ValueError(f"tokens are a list of words, none of them empty, not {words!r}")
    if not isinstance(labels, list) or len(labels) not in ({len(words)} if labels else {0}):
        count = len(labels) if isinstance(labels, list) else "no"
        raise ValueError(f"{len(words)} tokens and {count} labels; each token has one")
    if wrong := [label for label in labels if not isinstance(label, str) or not label]:
        raise ValueError(f"the label {wrong[0]!r} is no name; write class numbers as names")
    ends = np.cumsum([len(word) + 1 for word in words]) - 1
    return Example(" ".join(words), [(int(e) - len(w), int(e)) for e, w in zip(ends, words, strict=True)], labels)


def example_of_spans(text: str, spans: Sequence[dict[str, Any]]) -> Example:
    """A text whose words are cut where spans begin and end; a word in a span has its label, the others "O"."""
    if not text.strip():
        raise ValueError("the text is empty")
    inside = [""] * len(text)
    borders = {0, len(text)}
    for span in spans:
        begin, end, label = (span.get(name) for name in ("start", "end", "label"))
        if type(begin) is not int or type(end) is not int or not 0 <= begin < end <= len(text):
            raise ValueError(f"the span {span} does not lie in the text, 0 to {len(text)} characters")
        if not isinstance(label, str) or not label or label == OUTSIDE or not text[begin:end].strip():
            raise ValueError(f"the span {span} has no label of its own, or nothing but white space in it")
        if any(inside[begin:end]):
            raise ValueError(f"the span {span} overlaps another one")
        inside[begin:end] = [label] * (end - begin)
        borders |= {begin, end}
    edges = sorted(borders)
    words = [
        (begin + m.start(), begin + m.end())
        for begin, end in pairwise(edges)
        for m in re.finditer(r"\S+", text[begin:end])
    ]
    return Example(text, words, [inside[begin] or OUTSIDE for begin, _ in words])


def encode(
    tokenizer: Any,
    examples: Sequence[Example],
    names: Sequence[str],
    max_length: int,
    stride: int = 0,
    *,
    label_all_tokens: bool = True,
) -> list[dict[str, Any]]:
    """Rows for Trainer, one per window: input_ids, attention_mask and labels, -100 where there is nothing to learn.

    Besides `example`, its number, and `first_tokens`: (word, token, tokens up to the window's nearer end) of the words
    that begin in this window.
    Raises ValueError for a word that has no token.
    """
    rows: list[dict[str, Any]] = []
    for number, example in enumerate(examples):
        whole = tokenizer(
            example.text, return_offsets_mapping=True, return_special_tokens_mask=True, truncation=False, verbose=False
        )
        of_text = np.flatnonzero(np.array(whole["special_tokens_mask"]) == 0)
        begin, end = int(of_text[0]), int(of_text[-1]) + 1
        before, body, after = (whole["input_ids"][part] for part in (slice(begin), slice(begin, end), slice(end, None)))
        # Each byte of a character has the whole character's offsets, so a word's first token is its first byte.
        of_word = words_of_tokens(example.words, whole["offset_mapping"][begin:end])
        first: dict[int, int] = {}
        for token, word in enumerate(of_word):
            if word is not None:
                first.setdefault(word, token)
        if lost := [word for word in range(len(example.words)) if word not in first]:
            begin, end = example.words[lost[0]]
            raise ValueError(
                f"the word {example.text[begin:end]!r} of example {number} has no token of its own with this tokenizer; "
                "take one of bytes, or remove the word"
            )
        labels = token_labels(example, names, of_word, set(first.values()), every=label_all_tokens)
        room = max_length - len(before) - len(after)
        for head in range(0, max(len(body) - stride, 1), room - stride):
            part = slice(head, min(head + room, len(body)))
            row: dict[str, Any] = {"input_ids": [*before, *body[part], *after], "example": number}
            row["attention_mask"] = [1] * len(row["input_ids"])
            row["first_tokens"] = [
                (word, len(before) + token - head, min(token - head, part.stop - 1 - token))
                for word, token in first.items()
                if head <= token < part.stop
            ]
            if example.labels:
                row["labels"] = [IGNORED] * len(before) + labels[part] + [IGNORED] * len(after)
            rows.append(row)
    return rows


def words_of_tokens(words: Sequence[tuple[int, int]], offsets: Sequence[tuple[int, int]]) -> list[int | None]:
    """The word that each token overlaps, the first one of several; None for blanks between words."""
    found: list[int | None] = []
    word = 0
    for begin, end in offsets:
        while word < len(words) and words[word][1] <= begin:
            word += 1
        found.append(word if word < len(words) and words[word][0] < end and begin < end else None)
    return found


def token_labels(
    example: Example, names: Sequence[str], of_word: Sequence[int | None], first: set[int], *, every: bool
) -> list[int]:
    """A class for each token, -100 where there is none; every: see the recipe's label_all_tokens. first: the words' own."""
    index = {name: i for i, name in enumerate(names)}
    if not example.labels:
        return [IGNORED] * len(of_word)
    going_on = [f"I-{label[2:]}" if label.startswith("B-") else label for label in example.labels]
    found, last = [], -1
    for token, word in enumerate(of_word):
        last = last if word is None else word
        following = last + 1
        if token in first and word is not None:
            label: str | None = example.labels[word]
        elif not every:
            label = None
        elif word is not None:
            label = going_on[word] if going_on[word] in index else example.labels[word]
        else:
            # A blank belongs to a span that goes on after it, else to nothing.
            within = last >= 0 and following < len(going_on) and going_on[last] == example.labels[following]
            label = going_on[last] if within and going_on[last] in index else OUTSIDE
        found.append(IGNORED if label is None else index.get(label, IGNORED))
    return found


def word_labels(
    rows: Sequence[dict[str, Any]], predicted: np.ndarray, examples: Sequence[Example], names: Sequence[str]
) -> list[list[str]]:
    """Predicted classes of the rows' tokens (W, L) -> a label for each word of each example."""
    best: list[list[tuple[int, int]]] = [[(-1, 0)] * len(example.words) for example in examples]
    for row, classes in zip(rows, predicted, strict=True):
        held = best[row["example"]]
        for word, token, margin in row["first_tokens"]:
            if margin > held[word][0]:
                held[word] = (margin, int(classes[token]))
    return [[names[label] for _, label in words] for words in best]


def spans_of(labels: Sequence[str]) -> set[tuple[str, int, int]]:
    """(kind, first word, word after the last) of each span. As CoNLL's own script: I-X after anything but X begins one.

    Plain names, without B- and I-, are spans as long as they repeat.
    """
    found, begin, kind = set(), 0, OUTSIDE
    for i, label in enumerate([*labels, OUTSIDE]):
        mark, _, rest = label.partition("-")
        named = rest if mark in ("B", "I") and rest else label
        if named != kind or (mark == "B" and rest):
            if kind != OUTSIDE:
                found.add((kind, begin, i))
            begin, kind = i, named
    return found


def scores(true: Sequence[Sequence[str]], guessed: Sequence[Sequence[str]]) -> dict[str, float]:
    """Per word: accuracy and F1 averaged over the classes. Per span: precision, recall and F1, borders and kind right.

    The span figures are 0 where there is nothing to divide by.
    """
    words = [[label for labels in side for label in labels] for side in (true, guessed)]
    wanted, given = (
        {(i, *span) for i, labels in enumerate(side) for span in spans_of(labels)} for side in (true, guessed)
    )
    right = len(wanted & given)
    return {
        "word_accuracy": float(accuracy_score(*words)),
        "word_macro_f1": float(f1_score(*words, average="macro", zero_division=0)),
        "span_precision": right / max(len(given), 1),
        "span_recall": right / max(len(wanted), 1),
        "span_f1": 2 * right / max(len(given) + len(wanted), 1),
    }


def metrics_of(
    rows: Sequence[dict[str, Any]], examples: Sequence[Example], names: Sequence[str]
) -> Callable[[Any], dict[str, float]]:
    """Trainer's compute_metrics on these rows: tokens back to words, then `scores`."""
    true = [example.labels for example in examples]
    return lambda prediction: scores(true, word_labels(rows, prediction.predictions, examples, names))


def make_trainer(
    model: Any,
    tokenizer: Any,
    training: RecipeArguments,
    train: Sequence[dict[str, Any]] | None,
    evaluation: Sequence[dict[str, Any]] | None = None,
    compute_metrics: Callable[[Any], dict[str, float]] | None = None,
) -> RecipeTrainer:
    """A Trainer for rows of `encode`; its predictions are classes (W, L), not scores."""
    return RecipeTrainer(
        model,
        args=training,
        train_dataset=train,
        eval_dataset=evaluation,
        data_collator=DataCollatorForTokenClassification(tokenizer),
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        preprocess_logits_for_metrics=lambda logits, labels: logits.argmax(-1),
    )


def made_up_examples(count: int, seed: int = 0) -> list[Example]:
    """Sentences with a person and a town, for the smoke test."""
    rng = np.random.default_rng(seed)
    people, towns = ("Zoë Müller", "Ada Lovelace", "José Á."), ("Köln", "Paris", "漢口")
    examples = []
    for _ in range(count):
        person, town = str(rng.choice(people)), str(rng.choice(towns))
        labels = ["B-PER", *["I-PER"] * person.count(" "), "O", "O", "B-LOC", "O"]
        examples.append(example_of_words([*person.split(), "lives", "in", town, "."], labels))
    return examples


def main(arguments: list[str] | None = None) -> dict[str, float]:
    kinds = (TokenArguments, ModelArguments, FineTuning)
    data, models, training = parse(kinds, arguments, "Fine-tune a Perceiver IO to tell the class of each word.")
    resume = start(training)
    prepare_smoke_test(models, training)
    data.check(training)
    train = read_examples(data.train_file) if data.train_file else None
    validation = read_examples(data.validation_file) if data.validation_file else None
    test = read_examples(data.test_file, labelled=False) if data.test_file else None
    if training.smoke_test and train is None:
        train, validation = made_up_examples(32), made_up_examples(16, seed=1)
    learnt = {label for e in train or validation or [] for label in e.labels}
    if data.label_all_tokens:
        # A word of several bytes goes on, even where no span has several words.
        learnt |= {f"I-{label[2:]}" for label in learnt if label.startswith("B-") and train}
    names = class_names(models, PerceiverIOForTokenClassification, learnt)
    for part in (validation, test):
        check_labels({label for e in part or [] for label in e.labels}, names, "the classes are")
    model = open_model(PerceiverIOForTokenClassification, models, **label_fields(names))
    tokenizer = open_tokenizer(models, model.config, data.tokenizer)
    length = window_length(model.config, tokenizer, data.max_length, data.stride)

    def rows(examples: list[Example] | None) -> list[dict[str, Any]]:
        options = {"label_all_tokens": data.label_all_tokens}
        return encode(tokenizer, examples or [], names, length, data.stride, **options)

    train_rows, validation_rows, test_rows = rows(train), rows(validation), rows(test)
    measure = metrics_of(validation_rows, validation, names) if validation else None
    trainer = make_trainer(model, tokenizer, training, train_rows or None, validation_rows or None, measure)
    metrics = run(trainer, resume, saved=[tokenizer])
    if test is not None:
        known = all(example.labels for example in test)
        trainer.compute_metrics = metrics_of(test_rows, test, names) if known else None
        found = predict(trainer, test_rows)
        if trainer.is_world_process_zero():
            write_predictions(
                Path(training.output_dir) / "predictions.jsonl",
                test,
                word_labels(test_rows, found.predictions, test, names),
            )
        metrics |= {key: value for key, value in found.metrics.items() if key.startswith("test_")}
    return metrics


def write_predictions(path: Path, examples: Sequence[Example], labels: Sequence[Sequence[str]]) -> None:
    """JSON lines, {"tokens", "labels"} of each example."""
    records = [
        {"tokens": [example.text[begin:end] for begin, end in example.words], "labels": list(guessed)}
        for example, guessed in zip(examples, labels, strict=True)
    ]
    write_text(path, "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))


def _conll(path: Path) -> Iterator[Example]:
    """The sentences of a CoNLL file"""
    words: list[str] = []
    labels: list[str] = []
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate([*file, ""], 1):
            columns = line.split()
            if columns and columns[0] != "-DOCSTART-":
                if len(columns) < 2:
                    raise ValueError(
                        f"{path}:{number}: {line.strip()!r} has no label; each line is a word and its label"
                    )
                words.append(columns[0])
                labels.append(columns[-1])
            elif words:
                yield example_of_words(words, labels)
                words, labels = [], []
