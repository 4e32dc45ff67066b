"""GLUE's eight tasks from its own files: reading, metrics, the paper's average, files for the server, made-up examples.

The files are tab-separated and not quoted: a quotation mark is a character like any other. Wang et al., 2018 (arXiv
1804.07461); which figures count: Perceiver IO (arXiv 2107.14795), table 14.
"""

import csv
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from tqdm.auto import tqdm
from transformers.utils import logging

from ..recipes import GLUE_TASKS
from .storage import write_text

logger = logging.get_logger(__name__)

# STS-B's scores.
LOWEST, HIGHEST = 0.0, 5.0


class Example(NamedTuple):
    """One text or two; label: the index of a class, a number for STS-B, None in a test set."""

    task: str
    first: str
    second: str | None
    label: float | int | None


@dataclass(frozen=True)
class Task:
    """Where a task's texts and labels stand in its files, and what is measured; the first metric is the paper's.

    dev, test: name of the set -> its file. columns: those of a file without a header.
    """

    texts: tuple[str, ...]
    label: str
    metrics: tuple[str, ...]
    dev: Mapping[str, str]
    test: Mapping[str, str]
    columns: tuple[str, ...] = ()


def _one(name: str, texts: tuple[str, ...], label: str, metrics: tuple[str, ...], columns: Any = ()) -> Task:
    return Task(texts, label, metrics, {name: "dev.tsv"}, {name: "test.tsv"}, columns)


_PAIR = ("sentence1", "sentence2")
TASKS: dict[str, Task] = {
    "CoLA": _one("CoLA", ("sentence",), "label", ("matthews", "accuracy"), ("source", "label", "mark", "sentence")),
    "MNLI": Task(
        _PAIR,
        "gold_label",
        ("accuracy",),
        {"MNLI-m": "dev_matched.tsv", "MNLI-mm": "dev_mismatched.tsv"},
        {"MNLI-m": "test_matched.tsv", "MNLI-mm": "test_mismatched.tsv"},
    ),
    "MRPC": _one("MRPC", ("#1 String", "#2 String"), "Quality", ("accuracy", "f1")),
    "QNLI": _one("QNLI", ("question", "sentence"), "label", ("accuracy",)),
    "QQP": _one("QQP", ("question1", "question2"), "is_duplicate", ("accuracy", "f1")),
    "RTE": _one("RTE", _PAIR, "label", ("accuracy",)),
    "SST-2": _one("SST-2", ("sentence",), "label", ("accuracy",)),
    "STS-B": _one("STS-B", _PAIR, "score", ("pearson", "spearman")),
}
# MRPC as its authors distribute it; `dev_ids.tsv`, of GLUE, says which rows of the first are the dev set.
MRPC_TRAIN, MRPC_TEST, MRPC_DEV_IDS = "msr_paraphrase_train.txt", "msr_paraphrase_test.txt", "dev_ids.tsv"
# Classes that the files give by number; the others by name.
NUMBERED = {"CoLA", "MRPC", "QQP", "SST-2"}


def check_names(names: Sequence[str]) -> list[str]:
    """The tasks in the order of their ids; ValueError for an unknown one, or none."""
    unknown = [name for name in names if name not in TASKS]
    if unknown or not names:
        raise ValueError(f"tasks {list(unknown or names)}: choose at least one, among {', '.join(TASKS)}")
    return [name for name in TASKS if name in names]


def read_task(folder: str | Path, task: str, split: str, *, max_bad_share: float = 0.001) -> dict[str, list[Example]]:
    """Set name -> examples of `split` "train", "dev" or "test"; MNLI has two of the last two, matched and mismatched.

    folder: holds CoLA/, MNLI/ and so on. Bad rows are left out and counted, up to that share of a file; a test set has to
    be whole. Raises ValueError that names the file, and the line where one is to blame.
    """
    check_names([task])
    where, of = Path(folder) / task, TASKS[task]
    files = {"train": {task: "train.tsv"}, "dev": of.dev, "test": of.test}.get(split)
    if files is None:
        raise ValueError(f"split={split!r} must be train, dev or test")
    found = {}
    for name, file in files.items():
        wanted, dev_ids = find_file(where, file, task)
        rows = read_rows(
            wanted, task, labelled=split != "test", max_bad_share=0.0 if split == "test" else max_bad_share
        )
        kept = (row for row in rows if _in_split(row, split, dev_ids))
        found[name] = [_example(task, row, labelled=split != "test") for row in kept]
        if not found[name]:
            raise ValueError(f"{wanted} has no example of {task} for {split}")
    return found


def find_file(where: Path, file: str, task: str) -> tuple[Path, set[tuple[str, str]] | None]:
    """A task's file, and for MRPC's original one the ids of its dev set; ValueError that lists what was looked for."""
    looked = [where / file]
    if looked[0].is_file():
        return looked[0], None
    if task == "MRPC":
        original, ids = where / (MRPC_TEST if file == "test.tsv" else MRPC_TRAIN), where / MRPC_DEV_IDS
        if original.is_file() and file == "test.tsv":
            return original, None
        if original.is_file() and ids.is_file():
            lines = ids.read_text(encoding="utf-8").splitlines()
            return original, {tuple(line.split("\t")[:2]) for line in lines}  # type: ignore[misc]
        looked += [original] if file == "test.tsv" else [original, ids]
    there = sorted(path.name for path in where.iterdir())[:20] if where.is_dir() else None
    held = f"{where} is not there" if there is None else f"{where} holds {', '.join(there) or 'nothing'}"
    raise ValueError(
        f"{task} needs its files as GLUE distributes them; looked for {' or '.join(map(str, looked[:1]))}"
        + (f", or {' and '.join(path.name for path in looked[1:])}" if looked[1:] else "")
        + f"; {held}. Get them from gluebenchmark.com/tasks"
    )


def read_rows(path: Path, task: str, *, labelled: bool, max_bad_share: float = 0.0) -> Iterator[dict[str, str]]:
    """The good rows of a file as column -> text; bad ones are counted, and reported once the file is read."""
    of = TASKS[task]
    bad: list[str] = []
    count = 0
    wanted = [*of.texts, of.label] if labelled else list(of.texts)
    columns: list[str] = list(of.columns) if labelled else []
    with path.open("rb") as file:  # in bytes: only a line feed ends a line, and a broken line spoils no other
        for number, raw in enumerate(tqdm(file, desc=path.name, unit=" rows", leave=False, mininterval=1.0), 1):
            line = raw.rstrip(b"\r\n")
            if not line:
                continue
            try:
                cells = line.decode("utf-8-sig" if number == 1 else "utf-8").split("\t")
            except UnicodeDecodeError as error:
                count += 1
                bad.append(f"line {number}: byte {error.start} is not UTF-8")
                continue
            if not columns:
                columns = cells
                if missing := [column for column in wanted if column not in columns]:
                    raise ValueError(f"{path}, line 1: no column {missing}; it has {columns}")
                continue
            count += 1
            row = dict(zip(columns, cells, strict=False))
            if (problem := _problem(task, row, cells, columns, labelled)) is None:
                yield row
            else:
                bad.append(f"line {number}: {problem}")
    if len(bad) > max_bad_share * count:
        raise ValueError(
            f"{path}: {len(bad)} of {count} rows are bad ({'; '.join(bad[:3])}); mend them"
            + (f", or raise max_bad_share from {max_bad_share}" if labelled else ", a test set has to be whole")
        )
    if bad:
        logger.warning(f"{path}: {len(bad)} bad rows of {count} are left out ({'; '.join(bad[:3])})")


def _problem(
    task: str, row: Mapping[str, str], cells: Sequence[str], columns: Sequence[str], labelled: bool
) -> str | None:
    """What is wrong with a row, None for a good one."""
    of = TASKS[task]
    if len(cells) != len(columns):
        return f"{len(cells)} columns instead of {len(columns)}"
    if not labelled:
        return None  # the server wants an answer to an empty text, too
    if empty := [name for name in of.texts if not row[name].strip()]:
        return f"{empty[0]} is empty"
    label, classes = row[of.label], _classes_in_file(task)
    if classes:
        return None if label in classes else f"label {label!r} is not one of {', '.join(classes)}"
    try:
        good = LOWEST <= float(label) <= HIGHEST
    except ValueError:
        good = False
    return None if good else f"score {label!r} is not a number from {LOWEST:g} to {HIGHEST:g}"


def _classes_in_file(task: str) -> dict[str, int]:
    """Label in the file -> class index; empty for numbers."""
    return {str(i) if task in NUMBERED else name: i for i, name in enumerate(GLUE_TASKS[task])}


def _example(task: str, row: Mapping[str, str], labelled: bool) -> Example:
    of = TASKS[task]
    texts = [row[column] for column in of.texts]
    label: float | int | None = None
    if labelled:
        classes = _classes_in_file(task)
        label = classes[row[of.label]] if classes else float(row[of.label])
    return Example(task, texts[0], texts[1] if len(texts) > 1 else None, label)


def _in_split(row: Mapping[str, str], split: str, dev_ids: set[tuple[str, str]] | None) -> bool:
    return dev_ids is None or ((row["#1 ID"], row["#2 ID"]) in dev_ids) == (split == "dev")


def score(task: str, predictions: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """A task's metrics, from 0 to 1 (correlations from -1): predictions (N,) classes or numbers, labels (N,).

    A correlation with predictions that are all the same is counted as 0.
    """
    measured: dict[str, Any] = {
        "accuracy": accuracy_score,
        "f1": f1_score,
        "matthews": matthews_corrcoef,
        "pearson": lambda truth, guess: _correlation(pearsonr, truth, guess),
        "spearman": lambda truth, guess: _correlation(spearmanr, truth, guess),
    }
    return {name: float(measured[name](labels, predictions)) for name in TASKS[task].metrics}


def _correlation(measure: Any, truth: np.ndarray, guess: np.ndarray) -> float:
    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(guess) == 0:
        return 0.0
    return float(measure(truth, guess)[0])


def task_scores(metrics: Mapping[str, float], prefix: str = "eval") -> dict[str, float]:
    """Metrics under Trainer's names -> what the paper's table holds: one figure for each task, MNLI's two averaged first."""
    scores = {}
    for task, of in TASKS.items():
        found = [metrics.get(f"{prefix}_{name}_{of.metrics[0]}") for name in of.dev]
        if None not in found:
            scores[task] = sum(found) / len(found)  # type: ignore[arg-type]
    return scores


def average(scores: Mapping[str, float]) -> float:
    """The paper's average of one figure for each task, as `task_scores` gives them."""
    return math.fsum(scores.values()) / len(scores)


def write_predictions(path: Path, task: str, predictions: Sequence[float]) -> Path:
    """A set's file for GLUE's server: a header, then each row's number and its class, or its score from 0 to 5."""
    classes = list(_classes_in_file(task))
    rows = ["index\tprediction"]
    for index, prediction in enumerate(predictions):
        value = classes[int(prediction)] if classes else f"{min(max(prediction, LOWEST), HIGHEST):.3f}"
        rows.append(f"{index}\t{value}")
    write_text(path, "\n".join(rows) + "\n")
    return path


# Files of made-up sentences

_NOUNS = ("fox", "boat", "child", "teacher", "river", "clock", "garden", "train")
_VERBS = ("sees", "finds", "paints", "follows", "remembers", "carries")
_COLOURS = ("red", "old", "quiet", "small", "heavy", "green")
_MOODS = (("dull", "poor", "boring"), ("lovely", "bright", "clever"))
# As many columns as the real files have, with what is not read left as a dash.
_HEADERS = {
    "MNLI": (
        "index promptID pairID genre sentence1_binary_parse sentence2_binary_parse sentence1_parse sentence2_parse "
        "sentence1 sentence2 label1 gold_label"
    ).split(),
    "MRPC": ["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"],
    "QNLI": "index question sentence label".split(),
    "QQP": "id qid1 qid2 question1 question2 is_duplicate".split(),
    "RTE": "index sentence1 sentence2 label".split(),
    "SST-2": "sentence label".split(),
    "STS-B": "index genre filename year old_index source1 source2 sentence1 sentence2 score".split(),
}


def write_made_up(folder: str | Path, *, rows: int = 32, seed: int = 0) -> Path:
    """All eight tasks in GLUE's format, of made-up sentences, `rows` in each file: to try things, not to learn from."""
    random = np.random.default_rng(seed)
    for task, of in TASKS.items():
        files = {"train.tsv": True, **dict.fromkeys(of.dev.values(), True), **dict.fromkeys(of.test.values(), False)}
        for file, labelled in files.items():
            path = Path(folder) / task / file
            path.parent.mkdir(parents=True, exist_ok=True)
            header = list(of.columns) if task == "CoLA" else _HEADERS[task]
            if not labelled:
                header = ["index", *of.texts]
            with path.open("w", encoding="utf-8", newline="") as opened:
                writer = csv.writer(opened, delimiter="\t", quoting=csv.QUOTE_NONE, quotechar=None, lineterminator="\n")
                if not (task == "CoLA" and labelled):
                    writer.writerow(header)
                for index in range(rows):
                    texts, label = _made_up(task, index, random)
                    known = {**dict(zip(of.texts, texts, strict=True)), of.label: label, "index": index}
                    writer.writerow([known.get(column, "-") for column in header])
    return Path(folder)


def _made_up(task: str, index: int, random: np.random.Generator) -> tuple[list[str], str]:
    """Texts and the label as the file writes it; labels take turns."""
    sentence, other = _sentence(random), _sentence(random)
    classes = list(_classes_in_file(task))
    if task == "STS-B":
        shared = index % 6
        words = sentence.split()
        return [sentence, " ".join([*words[:shared], *other.split()[shared:]])], f"{shared:.3f}"
    label = index % len(classes)
    if task == "CoLA":
        words = sentence.split()
        return [" ".join(words if label else words[::-1])], classes[label]
    if task == "SST-2":
        return [f'a {random.choice(_MOODS[label])} film , "{sentence}"'], classes[label]
    if task in ("QNLI", "RTE", "MNLI"):
        second = [sentence, other, "no , " + sentence][label]
        return [f"is it true that {sentence} ?" if task == "QNLI" else sentence, second], classes[label]
    return [sentence, sentence + " again" if label else other], classes[label]


def _sentence(random: np.random.Generator) -> str:
    first, second = random.choice(_NOUNS, 2, replace=False)
    return f"the {random.choice(_COLOURS)} {first} {random.choice(_VERBS)} a {random.choice(_COLOURS)} {second}"
