"""English prose from the documentation that comes with Python and the installed packages.

Training text without a download: doc strings (read with `ast`, nothing is imported), `pydoc`'s topics and the
descriptions in the packages' metadata. Same Python and packages, same text: `Documentation.sha256` says so.
"""

import ast
import hashlib
import json
import re
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

# Well written and long. Order matters: of two equal paragraphs the first is kept.
PACKAGES = (
    "numpy",
    "scipy",
    "matplotlib",
    "scikit-learn",
    "torch",
    "transformers",
    "accelerate",
    "huggingface-hub",
    "tokenizers",
    "safetensors",
    "sympy",
    "networkx",
    "mpmath",
    "joblib",
    "pillow",
    "fonttools",
    "pydantic",
    "hypothesis",
    "pytest",
    "jinja2",
    "pygments",
    "pyparsing",
    "rich",
    "click",
    "typer",
    "fsspec",
    "filelock",
    "packaging",
    "psutil",
    "setuptools",
    "mypy",
    "python-dateutil",
    "tqdm",
    "regex",
    "narwhals",
    "sortedcontainers",
    "cloudpickle",
    "threadpoolctl",
)

SKIPPED_FOLDERS = {
    "test",
    "tests",
    "testing",
    "site-packages",
    "__pycache__",
    "idlelib",
    "lib2to3",
    "ensurepip",
    "_vendor",
}

# A paragraph of English has many of these; code, tables and lists of names have few.
COMMON_WORDS = frozenset(
    """a about all also an and any are as at be been before but by can could do does each for from given has have how
    if in instead into is it its may more most must not of on one only or other over same see should so some such than
    that the their them then there these they this those to two up use used uses using was we when where whether which
    while will with within without would you your""".split()
)

_TYPOGRAPHY = str.maketrans(
    {"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "-", "…": "...", "\u00a0": " ", "•": "-", "→": "->"}
)
_BULLET = re.compile(r"^(?:[-*+•]|\(?\d{1,2}[.)]|\(?[a-z]\))\s+")
_NAMED = re.compile(r"^[`*]{0,2}[A-Za-z_][\w.]*[`*]{0,2}\s?(?:\([^()]*(?:\([^()]*\)[^()]*)*\))?\s?:\s(?=\S+\s\S+\s\S)")
_MARKUP = (
    (re.compile(r"\[([^\]\[]+)\]\((?:https?:|\.|/|#)[^)]*\)"), r"\1"),  # Markdown link
    (re.compile(r"`([^`<]+?)\s*<[^`>]+>`_{1,2}"), r"\1"),  # reST link
    (re.compile(r":[a-z:+-]+:`~[\w.]*?(\w+(?:\(\))?)`"), r"\1"),  # reST role, last part of the name
    (re.compile(r":[a-z:+-]+:`!?([^`<]*?)(?:\s*<[^`>]*>)?`"), r"\1"),  # reST role
    (re.compile(r"\[`~[\w.]*?(\w+(?:\(\))?)`\](?!\()"), r"\1"),
    (re.compile(r"\[`?([\w.]+(?:\(\))?)`?\](?!\()"), r"\1"),  # transformers' cross-reference
    (re.compile(r"\s?\[[\w\d]{1,12}\]_"), ""),  # reST citation
    (re.compile(r"`{1,2}~?([^`]*)`{1,2}"), r"\1"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"\1"),
    (re.compile(r"(?<![\w*])\*([^*\s][^*]*)\*(?![\w*])"), r"\1"),
    (re.compile(r"\s+"), " "),
)
_NOT_PROSE = re.compile(
    r">>>|https?:|\{\{|\$|\\\w|::|==|\|\||@|[A-Za-z_]\w*\([^)]*=|</|%\(|%[sd]|\{\w*\}|_{3}|~~|\.\.\.\."
)


class Document(NamedTuple):
    """`name` is "package/path/of/file.py"; `text` holds one paragraph per line, ASCII only."""

    name: str
    text: str


@dataclass
class Documentation:
    """No paragraph of `held_out` occurs in `train`, nor does one with over a fifth of its 8-word sequences."""

    train: list[Document]
    held_out: list[Document]
    versions: dict[str, str] = field(default_factory=dict)

    def sha256(self) -> str:
        """Of names, texts and their order, so that a model card can say what was trained on."""
        digest = hashlib.sha256()
        for documents in (self.train, self.held_out):
            digest.update(json.dumps(documents).encode())
        return digest.hexdigest()

    def summary(self) -> dict:
        """Sizes, versions and fingerprint, ready for `json`."""
        return {
            "train_bytes": sum(len(d.text) for d in self.train),
            "held_out_bytes": sum(len(d.text) for d in self.held_out),
            "train_documents": len(self.train),
            "held_out_documents": len(self.held_out),
            "sha256": self.sha256(),
            "versions": self.versions,
        }


def read_documentation(
    packages: Sequence[str] = PACKAGES, held_out_fraction: float = 0.03, standard_library: bool = True
) -> Documentation:
    """Documentation of the standard library and of those `packages` that are installed, split by file.

    Takes a minute or two with PyTorch and transformers installed.
    Raises ValueError for a fraction outside (0, 1) or if nothing is installed that has text.
    """
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction must lie between 0 and 1, not {held_out_fraction}; 0.03 is usual")
    versions = {"python": sysconfig.get_config_var("py_version") or sysconfig.get_python_version()}
    raw = list(standard_library_strings()) if standard_library else []
    for package in packages:
        try:
            distribution = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        versions[package] = distribution.version
        raw.extend(distribution_strings(distribution))
    documents = list(unique_documents(raw))
    if not documents:
        raise ValueError("no English documentation found; is this Python installed without its source files?")
    train, held_out = split_documents(documents, held_out_fraction)
    return Documentation(train, held_out, versions)


def standard_library_strings() -> Iterator[tuple[str, list[str]]]:
    """("python/path.py", strings in source order) for each file of the standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        relative = path.relative_to(root)
        if _is_wanted(PurePosixPath(relative.as_posix())):
            yield f"python/{relative.as_posix()}", source_strings(_read(path))


def distribution_strings(distribution: metadata.Distribution) -> Iterator[tuple[str, list[str]]]:
    """The same for each source file of an installed package, after its metadata's description."""
    name = distribution.metadata["Name"]
    description = distribution.metadata.get_payload()  # type: ignore[attr-defined]
    if isinstance(description, str):
        yield f"{name}/README", [description]
    for file in sorted(distribution.files or [], key=lambda f: f.as_posix()):
        if file.suffix == ".py" and ".." not in file.parts and _is_wanted(file):
            path = Path(str(distribution.locate_file(file)))
            if path.is_file():
                yield f"{name}/{file.as_posix()}", source_strings(_read(path))


def source_strings(source: str) -> list[str]:
    """Doc strings and every other string of several lines, in source order; [] if the source does not parse.

    Others too, because numpy and PyTorch attach the documentation of compiled functions that way.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's sources
            tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return []
    found = [
        (node.lineno, node.col_offset, node.value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and len(node.value) >= 60
    ]
    return [value for _, _, value in sorted(found) if "\n" in value or value.rstrip().endswith((".", "!", "?"))]


def paragraphs(text: str) -> Iterator[str]:
    """Unwrapped paragraphs of one doc string, its markup removed; code, tables and headings are left out."""
    pending: list[str] = []
    indent = 0
    hanging = fenced = False
    for line in [*_dedent(text), ""]:
        stripped = line.strip()
        if stripped.startswith(("```", "~~~")):
            fenced = not fenced
            stripped = ""
        depth = len(line) - len(line.lstrip())
        starts = _BULLET.match(stripped) or _NAMED.match(stripped)
        # A bullet's or an argument's further lines stand deeper than its first.
        continues = bool(pending) and (depth == indent or (depth > indent and len(pending) == 1 and hanging))
        if not stripped or starts or not continues or fenced:
            if pending and (paragraph := _clean(" ".join(pending))):
                yield paragraph
            pending = []
        if stripped and not fenced:
            if not pending:
                hanging = bool(starts)
            indent = depth
            pending.append(stripped[starts.end() :] if starts else stripped)


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like English sentences: letters, common words, a capital first and a stop last."""
    if not 60 <= len(paragraph) <= 4000 or not paragraph.isascii() or _NOT_PROSE.search(paragraph):
        return False
    if not (paragraph[0].isupper() and paragraph[-1] in ".!?:)\"'") or "." not in paragraph:
        return False
    words = re.findall(r"[A-Za-z']+", paragraph)
    if len(words) < 10:
        return False
    letters = sum(c.isalpha() or c == " " for c in paragraph) / len(paragraph)
    common = sum(w.lower() in COMMON_WORDS for w in words) / len(words)
    return letters >= 0.9 and common >= 0.25


def unique_documents(raw: Iterable[tuple[str, list[str]]]) -> Iterator[Document]:
    """Each paragraph once over all files, the first time it is met; equal means equal letters, in any case."""
    seen: set[bytes] = set()
    for name, strings in raw:
        kept = []
        for string in strings:
            for paragraph in paragraphs(string):
                if not is_prose(paragraph):
                    continue
                letters = re.sub(r"[^a-z]", "", paragraph.lower())
                key = hashlib.blake2b(letters.encode(), digest_size=12).digest()
                if key not in seen:
                    seen.add(key)
                    kept.append(paragraph)
        if kept:
            yield Document(name, "\n".join(kept))


def split_documents(documents: Sequence[Document], held_out_fraction: float) -> tuple[list[Document], list[Document]]:
    """(train, held out) by a hash of the name; held-out paragraphs much like training ones are dropped."""
    train: list[Document] = []
    held_out: list[Document] = []
    for document in documents:
        share = int.from_bytes(hashlib.sha256(document.name.encode()).digest()[:8], "big") / 2**64
        (held_out if share < held_out_fraction else train).append(document)
    known = _sequences_of_words(d.text for d in train)
    filtered = []
    for document in held_out:
        fresh = []
        for paragraph in document.text.split("\n"):
            own = _word_sequences(paragraph)
            position = np.minimum(np.searchsorted(known, own), len(known) - 1)
            shared = known[position] == own if len(known) else np.zeros(len(own), bool)
            if shared.mean() <= 0.2:
                fresh.append(paragraph)
        if fresh:
            filtered.append(Document(document.name, "\n".join(fresh)))
    return train, filtered


def _word_sequences(paragraph: str, length: int = 8) -> np.ndarray:
    """One 64-bit hash per sequence of `length` words; a shorter paragraph is one sequence."""
    words = re.findall(r"[a-z]+", paragraph.lower())
    last = max(len(words) - length, 0)
    found = [
        int.from_bytes(hashlib.blake2b(" ".join(words[i : i + length]).encode(), digest_size=8).digest(), "big")
        for i in range(last + 1)
    ]
    return np.array(found, dtype=np.uint64)


def _sequences_of_words(texts: Iterable[str]) -> np.ndarray:
    found = [_word_sequences(paragraph) for text in texts for paragraph in text.split("\n")]
    return np.unique(np.concatenate(found)) if found else np.zeros(0, np.uint64)


def _clean(text: str) -> str:
    text = text.translate(_TYPOGRAPHY)
    for pattern, replacement in _MARKUP:
        text = pattern.sub(replacement, text)
    return text.strip()


def _dedent(text: str) -> list[str]:
    """Like inspect.cleandoc: the first line of a doc string has no indentation of its own."""
    lines = text.expandtabs().splitlines()
    margins = [len(line) - len(line.lstrip()) for line in lines[1:] if line.strip()]
    margin = min(margins, default=0)
    return [lines[0].strip(), *(line[margin:] for line in lines[1:])] if lines else []


def _is_wanted(path: PurePosixPath) -> bool:
    return not SKIPPED_FOLDERS.intersection(path.parts[:-1]) and not path.name.startswith(("test_", "conftest"))


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")
