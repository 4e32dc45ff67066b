"""What fine-tuning the bundled language model is worth, on two tasks made of installed documentation, beside baselines.

    python -m hf_perceiver.training.documentation_tasks package --output DIR
    python -m hf_perceiver.training.documentation_tasks code --output DIR

package: which package's documentation a passage of at most 126 bytes is from, the names of all packages struck out.
code: which bytes of such a passage are code, told by its author's markup (`x`, ``x``, :role:`x`) and doctest prompts, all
of which are struck out.

Test passages are from files that the language model did not see in its own training; it has seen the prose of the other
files, but no labels. Each method's result is written as soon as it is there, and is not made again: a run that was broken
off goes on with the same command.
"""

import argparse
import csv
import hashlib
import io
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax
from sklearn.feature_extraction import FeatureHasher
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import confusion_matrix, f1_score
from transformers import set_seed

from ..bundled import bundled_checkpoint
from ..heads_text import PerceiverIOForSequenceClassification, PerceiverIOForTokenClassification
from ..tokenization_perceiver_io import PerceiverIOTokenizer
from . import text_classification, token_classification
from .documentation import (
    COMMON_WORDS,
    Document,
    Documentation,
    distribution_strings,
    read_documentation,
    split_documents,
)
from .recipe import RecipeArguments
from .storage import write_text
from .text_tasks import label_fields
from .train_language import MAX_LENGTH, language_config

BYTES = MAX_LENGTH - 2  # of a passage, beside [CLS] and [SEP]
HELD_OUT_FRACTION = 0.03  # as for the language model, so that the same files are held out
VALIDATION_SHARE = 0.1
CODE_PACKAGES = ("numpy", "scipy", "scikit-learn", "networkx", "sympy")

# The packages with over 20,000 held-out bytes, and what tells each by name.
PACKAGES = {
    "fonttools": ("fonttools",),
    "python": ("python",),
    "scikit-learn": ("scikit", "sklearn"),
    "scipy": ("scipy",),
    "sympy": ("sympy",),
    "torch": ("torch",),
    "transformers": ("transformers", "hugging"),
}
_NAMES = re.compile(rf"\w*(?:{'|'.join(name for names in PACKAGES.values() for name in names)})\w*", re.IGNORECASE)

_MARKED = re.compile(r"(?::[a-z:+-]+:)?(?P<ticks>`{1,2})~?(?P<code>[^`]+?)(?P=ticks)(?!_)")
_STRUCK = (
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{1,2}"), r"\1"),  # links
    (re.compile(r"\s?\[[\w\d]{1,12}\]_"), ""),  # citations
    (re.compile(r"(?<![\w*`])\*{1,2}([^*\s`][^*`]*)\*{1,2}(?![\w*`])"), r"\1"),  # emphasis
)
_PROMPT = re.compile(r"\s*(?:>>>|\.\.\.) (.*)")


class Passage(NamedTuple):
    """label: a class's name, or for each byte whether it is code; document: the file that it is from."""

    text: str
    label: Any
    document: str


Split = dict[str, list[Passage]]  # train, validation, test


@dataclass
class Result:
    """probabilities (n, K) on the test set, of passages or of bytes; the validation figure; the learning curve."""

    probabilities: np.ndarray
    validation: float
    curve: list[dict[str, float]]
    note: str


# Data


def package_passages(documentation: Documentation, per_package: int, seed: int) -> Split:
    """Passages by package, at most `per_package` of each to train on and a twentieth as many to choose by.

    Training and validation passages are of different files, test passages of the files that are held out.
    Raises ValueError for a package that has no documentation, or none held out.
    """
    rng = np.random.default_rng(seed)
    found: dict[tuple[str, str], list[Passage]] = defaultdict(list)
    for part, documents in (("train", documentation.train), ("test", documentation.held_out)):
        for document in documents:
            package = document.name.split("/")[0]
            if package in PACKAGES:
                split = "validation" if part == "train" and _share(document.name) < VALIDATION_SHARE else part
                found[split, package] += package_pieces(document, package)
    if lacking := [f"{name} ({part})" for part in ("train", "test") for name in PACKAGES if not found[part, name]]:
        raise ValueError(f"no documentation of {', '.join(lacking)}; install the packages of constraints.txt")
    limits = {"train": per_package, "validation": max(per_package // 20, 1), "test": None}
    return {
        part: [
            found[part, package][i]
            for package in PACKAGES
            for i in sorted(rng.permutation(len(found[part, package]))[:limit])
        ]
        for part, limit in limits.items()
    }


def package_pieces(document: Document, package: str) -> Iterator[Passage]:
    """The passages of one file, 60 to 126 bytes, each within a paragraph, the packages' names struck out."""
    for paragraph in document.text.split("\n"):
        for text in _cut(_NAMES.sub("", paragraph).split(), least=60):
            yield Passage(text, package, document.name)


def code_passages(per_part: int, seed: int, packages: Sequence[str] = CODE_PACKAGES) -> Split:
    """Passages with their bytes marked as code or not, at most `per_part` to train on and a twelfth as many to choose by."""
    rng = np.random.default_rng(seed)
    items: dict[str, list[tuple[str, str]]] = {}
    for package in packages:
        for name, strings in distribution_strings(metadata.distribution(package)):
            items[name] = [item for string in strings for item in code_items(string)]
    # As for the language model: by file, and without what stands in a training file too.
    kept, held_out = split_documents(
        [Document(name, "\n".join(text for text, _ in found)) for name, found in items.items() if found],
        HELD_OUT_FRACTION,
    )
    split: Split = {"train": [], "validation": [], "test": []}
    for documents, is_test in ((kept, False), (held_out, True)):
        for document in documents:
            part = "test" if is_test else "validation" if _share(document.name) < VALIDATION_SHARE else "train"
            wanted = set(document.text.split("\n"))
            split[part] += [
                p for item in items[document.name] if item[0] in wanted for p in code_pieces(*item, document.name)
            ]
    limits = {"train": per_part, "validation": max(per_part // 12, 1), "test": None}
    return {part: [split[part][i] for i in sorted(rng.permutation(len(split[part]))[:n])] for part, n in limits.items()}


def code_items(string: str) -> Iterator[tuple[str, str]]:
    """(text, marks) of a doc string's paragraphs that hold marked code, with the doctest lines that follow them.

    marks has a "c" for each character of code and a "." for each other one. At most two doctest lines of a run are taken,
    so that passages mix the two; their output is left out.
    """
    for block in re.split(r"\n\s*\n(?!\s*>>>)", string.expandtabs()):
        lines = [line for line in block.splitlines() if line.strip()]
        # Blanks are single, so that a passage stands in its paragraph as it is.
        prose = " ".join(" ".join(takewhile(lambda line: not _PROMPT.match(line), lines)).split())
        for pattern, replacement in _STRUCK:
            prose = pattern.sub(replacement, prose)
        text = marks = ""
        end = 0
        for match in _MARKED.finditer(prose):
            code = match["code"].split("<")[0].strip() or match["code"]
            before_it = prose[end : match.start()]
            text, marks = text + before_it + code, marks + "." * len(before_it) + "c" * len(code)
            end = match.end()
        text, marks = text + prose[end:], marks + "." * len(prose[end:])
        if "c" not in marks or not _reads_like_prose(text):
            continue
        for line in [" ".join(m[1].split()) for line in lines if (m := _PROMPT.match(line))][:2]:
            if line:
                text, marks = f"{text} {line}", f"{marks}.{'c' * len(line)}"
        if text.isascii() and "`" not in text:
            yield text, marks


def code_pieces(text: str, marks: str, document: str) -> Iterator[Passage]:
    """A paragraph's passages of 60 to 126 bytes with some code, each byte with its mark."""
    place = 0
    for piece in _cut(text.split(), least=60):
        place = text.index(piece, place)
        # Where an author marks nothing, code may stand unmarked.
        if "c" in (own := marks[place : place + len(piece)]):
            yield Passage(piece, own, document)


def example_of(passage: Passage) -> token_classification.Example:
    """A passage of `code` as the token recipe reads it."""
    runs = [{"start": m.start(), "end": m.end(), "label": "code"} for m in re.finditer("c+", passage.label)]
    return token_classification.example_of_spans(passage.text, runs)


# Baselines


def tfidf(split: Split, names: Sequence[str], analyzer: str) -> Result:
    """TF-IDF of words and word pairs, or of 2 to 5 characters, and logistic regression, its strength chosen on validation."""
    options: dict[str, Any] = {"ngram_range": (1, 2)} if analyzer == "word" else {"ngram_range": (2, 5), "min_df": 2}
    vectorizer = TfidfVectorizer(analyzer="word" if analyzer == "word" else "char_wb", sublinear_tf=True, **options)
    features = {part: [p.text for p in split[part]] for part in split}
    train = vectorizer.fit_transform(features["train"])
    validation, test = (vectorizer.transform(features[part]) for part in ("validation", "test"))
    wanted = {part: [names.index(p.label) for p in split[part]] for part in split}
    return _best_logistic(train, wanted["train"], validation, wanted["validation"], test, (1.0, 3.0, 10.0))


def character_windows(split: Split, radius: int = 8, share: int = 4) -> Result:
    """Logistic regression on the characters around each byte: each of 8 on either side, and pairs and triples near it.

    Trained on every `share`-th byte: neighbours are much alike.
    """
    hasher = FeatureHasher(n_features=2**18, input_type="string")

    def features(passages: Sequence[Passage], step: int) -> Any:
        rows = []
        for passage in passages:
            padded = " " * radius + passage.text + " " * radius
            for place in range(radius, radius + len(passage.text), step):
                row = [f"{o}{padded[place + o]}" for o in range(-radius, radius + 1)]
                row += [f"{o}{padded[place + o : place + o + n]}" for n in (2, 3) for o in range(-4, 6 - n)]
                begin, end = padded.rfind(" ", 0, place) + 1, padded.find(" ", place)
                row += [f"word {padded[begin:end]}"]
                rows.append(row)
        return hasher.transform(rows)

    def marks(passages: Sequence[Passage], step: int) -> np.ndarray:
        return np.concatenate([_code_bytes(p)[::step] for p in passages])

    train, validation, test = split["train"], split["validation"], split["test"]
    return _best_logistic(
        features(train, share),
        marks(train, share),
        features(validation, share),
        marks(validation, share),
        features(test, 1),
        (0.1, 0.3),
    )


def _best_logistic(
    train: Any, wanted: Any, validation: Any, wanted_there: Any, test: Any, strengths: Sequence[float]
) -> Result:
    tried = []
    for strength in strengths:
        model = LogisticRegression(C=strength, max_iter=200).fit(train, wanted)
        reached = f1_score(wanted_there, model.predict(validation), average="macro")
        tried.append((float(reached), strength, model))
    reached, strength, model = max(tried, key=lambda entry: entry[0])
    return Result(model.predict_proba(test), reached, [], f"C={strength:g}")


# Perceivers


@dataclass
class Training:
    """What a run of fine-tuning depends on, besides its data."""

    steps: int
    batch_size: int
    learning_rate: float
    seed: int

    def arguments(self, output: Path) -> RecipeArguments:
        # Files are written elsewhere: nothing is saved on the way, and the folder stays empty.
        return RecipeArguments(
            output_dir=str(output),
            optimizer="adamw",
            learning_rate=self.learning_rate,
            weight_decay=0.01,
            warmup_steps=0.1,
            max_steps=self.steps,
            per_device_train_batch_size=self.batch_size,
            per_device_eval_batch_size=64,
            seed=self.seed,
            logging_steps=max(self.steps // 25, 1),
            eval_strategy="steps",
            eval_steps=max(self.steps // 5, 1),
            save_strategy="no",
            bf16=True,
            use_cpu=True,
            report_to="none",
        )


def open_perceiver(head: Any, start: str, names: Sequence[str], **fields: Any) -> Any:
    """start: "bundled", the language model, or "scratch", its architecture with fresh weights."""
    fields = {**label_fields(names), **fields}
    if start == "bundled":
        model = head.from_pretrained(bundled_checkpoint("language"), **fields)
    else:
        model = head(language_config(**fields))
    # In bfloat16 on a CPU the fused attention's backward pass is several times slower than the plain one.
    model.set_attn_implementation("eager")
    return model


def package_perceiver(split: Split, names: Sequence[str], start: str, training: Training, output: Path) -> Result:
    """Fine-tune on passages; classes are read from the mean latent, which needs no new query."""
    read_out = {"output_query": None, "postprocessor": {"kind": "average"}}
    set_seed(training.seed)
    model = open_perceiver(PerceiverIOForSequenceClassification, start, names, **read_out)
    tokenizer = PerceiverIOTokenizer(model_max_length=MAX_LENGTH)
    rows = {
        part: text_classification.encode(
            tokenizer, [text_classification.Example(p.text, p.label) for p in split[part]], names, MAX_LENGTH
        )
        for part in split
    }
    trainer = text_classification.make_trainer(
        model, tokenizer, training.arguments(output), rows["train"], rows["validation"]
    )
    curve = _train(trainer, "eval_macro_f1")
    trainer.compute_metrics = None
    logits = trainer.predict(rows["test"]).predictions
    note = f"{training.steps} x {training.batch_size} windows, learning rate {training.learning_rate:g}"
    return Result(softmax(logits, axis=-1), curve[-1]["validation"], curve, note)


def code_perceiver(split: Split, names: Sequence[str], start: str, training: Training, output: Path) -> Result:
    """Fine-tune on bytes."""
    set_seed(training.seed)
    model = open_perceiver(PerceiverIOForTokenClassification, start, names)
    tokenizer = PerceiverIOTokenizer(model_max_length=MAX_LENGTH)
    rows = {
        part: token_classification.encode(tokenizer, [example_of(p) for p in split[part]], names, MAX_LENGTH)
        for part in split
    }

    def validation_f1(prediction: Any) -> dict[str, float]:
        known = prediction.label_ids >= 0
        chosen = prediction.predictions.argmax(-1)[known]
        return {"macro_f1": float(f1_score(prediction.label_ids[known], chosen, average="macro"))}

    trainer = token_classification.make_trainer(
        model, tokenizer, training.arguments(output), rows["train"], rows["validation"], validation_f1
    )
    trainer.preprocess_logits_for_metrics = None
    curve = _train(trainer, "eval_macro_f1")
    trainer.compute_metrics = None
    found = trainer.predict(rows["test"])
    note = f"{training.steps} x {training.batch_size} windows, learning rate {training.learning_rate:g}"
    return Result(softmax(found.predictions, axis=-1)[found.label_ids >= 0], curve[-1]["validation"], curve, note)


def _train(trainer: Any, figure: str) -> list[dict[str, float]]:
    """-> rows of step, loss and validation, the figure; where one of the two was not taken it is left out."""
    trainer.train()
    rows: dict[int, dict[str, float]] = {}
    for entry in trainer.state.log_history:
        row = rows.setdefault(entry["step"], {"step": entry["step"]})
        row |= {new: entry[old] for old, new in (("loss", "loss"), (figure, "validation")) if old in entry}
    return [rows[step] for step in sorted(rows)]


# Figures


def package_figures(split: Split, names: Sequence[str], result: Result) -> dict[str, float]:
    """On test passages, and on whole test files, whose passages' log probabilities are averaged."""
    true = [names.index(p.label) for p in split["test"]]
    documents = {name: i for i, name in enumerate(dict.fromkeys(p.document for p in split["test"]))}
    numbers = [documents[p.document] for p in split["test"]]
    averaged = text_classification.average_windows(np.log(result.probabilities + 1e-9), numbers)
    of_document = {number: label for number, label in zip(numbers, true, strict=True)}
    whole = text_classification.scores([of_document[i] for i in range(len(averaged))], averaged.argmax(-1))
    figures = text_classification.scores(true, result.probabilities.argmax(-1))
    return {**figures, "file_accuracy": whole["accuracy"]}


def code_figures(split: Split, names: Sequence[str], result: Result) -> dict[str, float]:
    """On test bytes: accuracy, F1 averaged over the two classes, F1 of code; runs of code with both borders right."""
    true = np.concatenate([_code_bytes(p) for p in split["test"]])
    guessed = result.probabilities[:, 1] > 0.5
    figures = text_classification.scores(true, guessed.astype(int))
    wanted, given = [], []
    place = 0
    for passage in split["test"]:
        stop = place + len(passage.text)
        wanted.append(["code" if mark == "c" else "O" for mark in passage.label])
        given.append(["code" if mark else "O" for mark in guessed[place:stop]])
        place = stop
    runs = token_classification.scores(wanted, given)["span_f1"]
    return {**figures, "code_f1": float(f1_score(true, guessed)), "run_f1": runs}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Figures of the methods as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({k: f"{v:.4f}" if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    return text.getvalue()


def draw_curves(path: Path, results: dict[str, Result], title: str) -> None:
    """The validation figure of the runs over their steps, and of the baselines as lines."""
    figure, axes = _canvas(6.4, 3.8)
    for name, result in results.items():
        points = [(row["step"], row["validation"]) for row in result.curve if "validation" in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
        else:
            axes.axhline(result.validation, linestyle="--", color="grey")
            axes.annotate(name, (0.01, result.validation), xycoords=("axes fraction", "data"), va="bottom", fontsize=8)
    axes.set(xlabel="step", ylabel="macro F1 on validation passages", title=title)
    axes.legend(loc="lower right")
    _save(figure, path)


def draw_confusion(path: Path, split: Split, names: Sequence[str], results: dict[str, Result]) -> None:
    """Which package's test passages are taken for which, in percent of the true one's."""
    true = [names.index(p.label) for p in split["test"]]
    figure, all_axes = _canvas(5.2 * len(results), 4.6, len(results))
    for axes, (name, result) in zip(np.atleast_1d(all_axes), results.items(), strict=True):
        shares = 100 * confusion_matrix(true, result.probabilities.argmax(-1), normalize="true")
        axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
        for (row, column), share in np.ndenumerate(shares):
            colour = "white" if share > 50 else "black"
            axes.text(column, row, f"{share:.0f}", ha="center", va="center", color=colour, fontsize=8)
        axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
        axes.set_yticks(range(len(names)), names)
        axes.set(title=name, xlabel="told", ylabel="true")
    _save(figure, path)


def _canvas(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(1, columns)


def _save(figure: Any, path: Path) -> None:
    partial = path.with_name(f"{path.stem}.partial.png")
    figure.savefig(partial, dpi=90, metadata={"Software": None})
    os.replace(partial, path)


# The command


def data_sha256(split: Split) -> str:
    """Of all passages and labels, so that figures can say what they were measured on."""
    return hashlib.sha256(json.dumps(split).encode()).hexdigest()


def kept(path: Path, data: str, make: Callable[[], Result]) -> Result:
    """The result that is written at `path`, else the one that `make` makes, written there.

    Raises ValueError where that one is of other data.
    """
    if path.is_file():
        with np.load(path) as held:
            about = json.loads(str(held["about"]))
            if about["data"] != data:
                raise ValueError(f"{path} was measured on other data or settings; give another --output, or remove it")
            return Result(held["probabilities"], about["validation"], about["curve"], about["note"])
    result = make()
    about = {"data": data, "validation": result.validation, "curve": result.curve, "note": result.note}
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial.npz")
    np.savez_compressed(partial, probabilities=result.probabilities.astype(np.float32), about=json.dumps(about))
    os.replace(partial, path)
    return result


def measure(task: str, split: Split, output: Path, training: Training) -> list[dict[str, Any]]:
    """Every method on one task: TASK.csv, TASK_curve.csv and pictures in `output` -> the table's rows."""
    methods: dict[str, Callable[[], Result]]
    names: list[str] = list(PACKAGES) if task == "package" else ["O", "code"]
    perceiver = package_perceiver if task == "package" else code_perceiver
    runs: dict[str, Callable[[], Result]] = {
        f"{kind} Perceiver": partial(perceiver, split, names, kind, training, output / "empty")
        for kind in ("scratch", "bundled")
    }
    if task == "package":
        methods = {f"TF-IDF of {kind}s": partial(tfidf, split, names, kind) for kind in ("word", "character")}
    else:
        methods = {"character windows": partial(character_windows, split)}
    data = data_sha256(split)
    results, rows = {}, []
    for name, make in {**methods, **runs}.items():
        print(f"{name} ...", flush=True)
        settings = f"{data} {training}" if name in runs else data
        result = results[name] = kept(output / f"{task} {name}.npz", settings, make)
        figures = (package_figures if task == "package" else code_figures)(split, names, result)
        rows.append({"method": name, **figures, "validation_macro_f1": result.validation, "settings": result.note})
        print(f"{name}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
    write_text(output / f"{task}.csv", table(rows))
    curve = [{"method": name, **row} for name in runs for row in results[name].curve if "validation" in row]
    write_text(output / f"{task}_curve.csv", table([{"loss": "", **row} for row in curve]))
    draw_curves(output / f"text_{task}_curves.png", results, f"{task}, seed {training.seed}")
    if task == "package":
        shown = {name: results[name] for name in ("bundled Perceiver", "TF-IDF of characters")}
        draw_confusion(output / "text_package_confusion.png", split, names, shown)
    return rows


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m hf_perceiver.training.documentation_tasks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", choices=["package", "code"])
    parser.add_argument("--output", type=Path, required=True, help="folder to write; finished methods in it are kept")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of passages, fresh weights and order")
    parser.add_argument(
        "--passages", type=int, help="to train on: of each package (default 1000), or in all for code (default 4000)"
    )
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    given = parser.parse_args(arguments)
    training = Training(given.steps, given.batch_size, given.learning_rate, given.seed)
    if given.task == "package":
        print("reading the documentation of the installed packages ...", flush=True)
        split = package_passages(read_documentation(), given.passages or 1000, given.seed)
    else:
        split = code_passages(given.passages or 4000, given.seed)
    counts = {
        part: f"{len(passages)} passages of {len({p.document for p in passages})} files"
        for part, passages in split.items()
    }
    print(
        ", ".join(f"{part}: {count}" for part, count in counts.items()), f"sha256 {data_sha256(split)[:16]}", flush=True
    )
    given.output.mkdir(parents=True, exist_ok=True)
    measure(given.task, split, given.output, training)


def _cut(words: Iterable[str], least: int) -> Iterator[str]:
    """Words joined by blanks, as many as go into a passage; what is shorter than `least` is left out."""
    held = ""
    for word in [*words, None]:
        joined = held if word is None else f"{held} {word}".strip()
        if word is not None and len(joined) <= BYTES:
            held = joined
            continue
        if len(held) >= least:
            yield held
        held = (word or "")[:BYTES]


def _share(name: str) -> float:
    """A file's place in [0, 1), by its name; another one than the language model's split has."""
    return int.from_bytes(hashlib.sha256(f"validation {name}".encode()).digest()[:8], "big") / 2**64


def _code_bytes(passage: Passage) -> np.ndarray:
    """1 for each byte of code, blanks within it too."""
    return np.array([mark == "c" for mark in passage.label], int)


def _reads_like_prose(text: str) -> bool:
    words = re.findall(r"[A-Za-z']+", text)
    return len(words) >= 10 and sum(w.lower() in COMMON_WORDS for w in words) / len(words) >= 0.2


if __name__ == "__main__":
    main()
