"""Text files, documents and data sets -> rows of at most so many tokens, in memory or as an endless stream.

documents (strings; bytes for byte models) -> `Encoder` -> `Window`s, cut by `windows` -> `TextWindows`, which has a length,
or `TextStream`, whose memory is bounded. Row `i` of epoch `e` has a number of its own, `example_id`, so that masks and
order depend on the seed alone.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from glob import glob
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from torch.utils.data import Dataset, IterableDataset, Sampler, get_worker_info

from ..tokenization_perceiver_io import encode_bytes
from .whole_words import NO_WORD, byte_words, encode_words, is_byte_tokenizer

Document = str | bytes
Per = Literal["file", "line", "paragraph"]
Undecodable = Literal["error", "replace", "keep"]
Packing = Literal["pack", "split", "truncate"]

# What is read of a folder; a file or a pattern that is named is read whatever its ending.
SUFFIXES = (".md", ".markdown", ".rst", ".text", ".txt")
TOGETHER = 64  # documents that a fast tokenizer gets at once


class Window(NamedTuple):
    """Token ids (n,) without special tokens at the ends, and word numbers (n,), None where the ids tell."""

    ids: np.ndarray
    words: np.ndarray | None


def find_files(places: Sequence[str]) -> list[Path]:
    """Files, folders (their .txt, .md, .rst ... at any depth) and patterns (`**` too) -> files, sorted, each once.

    Raises ValueError for a place where there is nothing to read.
    """
    found: set[Path] = set()
    for place in places:
        path = Path(place).expanduser()
        if path.is_dir():
            here = {file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file()}
        elif path.is_file():
            here = {path}
        else:
            here = {Path(file) for file in glob(str(path), recursive=True) if Path(file).is_file()}
        if not here:
            raise ValueError(
                f"{place} holds no text: neither a file, nor a folder with {', '.join(SUFFIXES)} files, nor a pattern that "
                "matches one; name other endings by a pattern, 'folder/**/*.py'"
            )
        found |= here
    return sorted(found)


def read_files(paths: Iterable[Path], per: Per = "file", undecodable: Undecodable = "error") -> Iterator[Document]:
    """The documents of text files in UTF-8: each file, each of its lines, or each paragraph (up to an empty line).

    Memory is that of the largest document. undecodable: bytes that are no UTF-8 are an error, become U+FFFD, or are kept,
    in which case documents are bytes, for byte models.
    Raises ValueError for a file that is no text (zero bytes in it) and for what is no UTF-8, with its place.
    """
    for path in paths:
        for place, raw in _pieces(path, per):
            document = raw.removeprefix(b"\xef\xbb\xbf") if place == 0 else raw
            if not document.strip():
                continue
            _check_text(path, document)
            yield document if undecodable == "keep" else _decode(path, place, document, undecodable)


def check_files(paths: Iterable[Path], undecodable: Undecodable = "error", size: int = 65_536) -> None:
    """Look at the beginning of each file, for a stream that would meet it late. Raises ValueError as `read_files`."""
    for path in paths:
        with path.open("rb") as file:
            head = file.read(size)
        _check_text(path, head)
        if undecodable == "error":
            _decode(path, 0, head, undecodable, whole=len(head) < size)


def texts_of(rows: Iterable[Any], column: str = "text") -> Iterator[Document]:
    """Documents out of strings, bytes, or dicts with them in `column`, as `datasets` yields them; empty ones are left out."""
    for row in rows:
        text = row
        if isinstance(row, Mapping):
            if column not in row:
                raise ValueError(
                    f"a row of the data has no column {column!r}, only {', '.join(map(str, row))}; name its text"
                )
            text = row[column]
        if text is not None and not isinstance(text, str | bytes):
            raise ValueError(f"a document is a string, not {type(text).__name__}; name the column that holds the text")
        if text and not text.isspace():
            yield text


def is_held_out(document: Document, share: float) -> bool:
    """Whether a document belongs to the held-out share: by its content, so that copies of it are on one side."""
    raw = document if isinstance(document, bytes) else document.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "big") / 2**64 < share


class Encoder:
    """Documents -> windows of their tokens, and what the tokenizer puts around a text and between two.

    Raises ValueError for a slow tokenizer that is none of bytes.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.of_bytes = is_byte_tokenizer(tokenizer)
        encode_words(tokenizer, ["a"])  # a tokenizer that cannot do this says so now
        inner = list(tokenizer("a", add_special_tokens=False)["input_ids"])
        whole = list(tokenizer("a")["input_ids"])
        starts = [i for i in range(len(whole) - len(inner) + 1) if whole[i : i + len(inner)] == inner]
        if not starts:
            raise ValueError(
                f"{type(tokenizer).__name__} encodes 'a' as {inner} alone and as {whole} with special tokens"
            )
        self.before, self.after = whole[: starts[0]], whole[starts[0] + len(inner) :]
        between = [tokenizer.sep_token_id, tokenizer.eos_token_id]
        found = next(([id_] for id_ in between if id_ is not None), None)
        self.between = found or list(tokenizer("\n", add_special_tokens=False)["input_ids"])
        self.dtype = np.dtype(np.uint16 if len(tokenizer) < 2**16 else np.int32)

    def __call__(self, documents: Iterable[Document]) -> Iterator[Window]:
        """One window per document, as long as it is."""
        if self.of_bytes:
            for document in documents:
                yield Window(encode_bytes(document).astype(self.dtype), None)
            return
        source = iter(documents)
        while texts := list(itertools.islice(source, TOGETHER)):
            for ids, words in encode_words(self.tokenizer, texts):
                yield Window(ids.astype(self.dtype), words.astype(np.int32))

    def separator(self) -> Window:
        ids = np.array(self.between, self.dtype)
        return Window(ids, None if self.of_bytes else np.full(len(ids), NO_WORD, np.int32))

    def room(self, length: int) -> int:
        """Tokens of text in a row of `length`. Raises ValueError where none are left."""
        room = length - len(self.before) - len(self.after)
        if room < 1:
            raise ValueError(
                f"max_length={length} leaves no room for text beside {len(self.before) + len(self.after)} special tokens"
            )
        return room

    def row(self, window: Window, example_id: int) -> dict[str, Any]:
        """What the collator takes: with the tokenizer's special tokens around the text."""
        row: dict[str, Any] = {
            "input_ids": np.concatenate([self.before, window.ids, self.after]).astype(np.int64),
            "example_id": example_id,
        }
        if window.words is not None:
            around = [np.full(len(ids), NO_WORD) for ids in (self.before, self.after)]
            row["word_ids"] = np.concatenate([around[0], window.words, around[1]])
        return row


def windows(
    documents: Iterable[Document], encoder: Encoder, length: int, packing: Packing = "pack"
) -> Iterator[Window]:
    """Documents cut for rows of `length` tokens; windows without a word are left out.

    "pack": one document after the other, the tokenizer's separator between two, cut wherever a row is full; so that rows
    need no padding but the last. "split": a row never holds two documents, long ones take several. "truncate": only the
    beginning of each.
    """
    room = encoder.room(length)
    made = (
        _packed(encoder(documents), encoder.separator(), room)
        if packing == "pack"
        else _split(encoder(documents), room, first_only=packing == "truncate")
    )
    for window in made:
        words = byte_words(window.ids[None].astype(np.int64)) if window.words is None else window.words
        if (words != NO_WORD).any():
            yield window


class TextWindows(Dataset):
    """Windows in memory. Index `epoch * len + i` is row i, with that number as its `example_id`."""

    def __init__(self, made: Iterable[Window], encoder: Encoder):
        self.encoder = encoder
        ids: list[np.ndarray] = []
        words: list[np.ndarray] = []
        for window in made:
            ids.append(window.ids)
            if window.words is not None:
                words.append(window.words)
        self.ends = np.cumsum([len(i) for i in ids])
        self.ids = np.concatenate(ids) if ids else np.zeros(0, encoder.dtype)
        self.words = np.concatenate(words) if words else None

    def __len__(self) -> int:
        return len(self.ends)

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        place = index % len(self)
        part = slice(self.ends[place - 1] if place else 0, self.ends[place])
        return self.encoder.row(Window(self.ids[part], None if self.words is None else self.words[part]), index)


class EpochSampler(Sampler[int]):
    """Each epoch in an order of its own, by (seed, epoch); the indices go on from epoch to epoch, for TextWindows."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __iter__(self) -> Iterator[int]:
        order = np.random.default_rng([self.seed, self.epoch]).permutation(self.length)
        yield from (self.epoch * self.length + order).tolist()

    def __len__(self) -> int:
        return self.length


class TextStream(IterableDataset):
    """Rows without end, pass after pass, of which `buffer` windows are in memory to be shuffled.

    documents: pass number -> its documents, read anew each time. Workers share them out.
    Raises ValueError where a pass gives no row.
    """

    def __init__(
        self,
        documents: Callable[[int], Iterable[Document]],
        encoder: Encoder,
        length: int,
        *,
        packing: Packing = "pack",
        buffer: int = 1024,
        seed: int = 0,
    ):
        if buffer < 1:
            raise ValueError(f"a shuffle buffer holds at least 1 window, not {buffer}")
        self.documents, self.encoder, self.length, self.packing = documents, encoder, length, packing
        self.buffer, self.seed = buffer, seed

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        own, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        number = own
        for turn in itertools.count():
            before = number
            documents = itertools.islice(self.documents(turn), own, None, workers)
            made = windows(documents, self.encoder, self.length, self.packing)
            for window in shuffled(made, self.buffer, np.random.default_rng([self.seed, turn, own])):
                yield self.encoder.row(window, number)
                number += workers
            if number == before:
                raise ValueError(
                    f"pass {turn + 1} over the stream gave no text to worker {own + 1} of {workers}; give at least as many "
                    "documents as workers, and something that can be gone through again"
                )


def shuffled(items: Iterable[Any], buffer: int, rng: np.random.Generator) -> Iterator[Any]:
    """Each item leaves a buffer of that size at random, when the next one comes in or nothing is left."""
    held: list[Any] = []
    for item in items:
        if len(held) < buffer:
            held.append(item)
            continue
        place = int(rng.integers(buffer))
        held[place], item = item, held[place]
        yield item
    for place in rng.permutation(len(held)):
        yield held[place]


def _pieces(path: Path, per: Per) -> Iterator[tuple[int, bytes]]:
    """(byte offset, bytes) of each document of a file"""
    if per == "file":
        yield 0, path.read_bytes()
        return
    place, begin = 0, 0
    lines: list[bytes] = []
    with path.open("rb") as file:
        for line in file:
            if per == "line":
                yield place, line.rstrip(b"\r\n")
            elif line.strip():
                begin = begin if lines else place
                lines.append(line)
            elif lines:
                yield begin, b"".join(lines)
                lines = []
            place += len(line)
    if lines:
        yield begin, b"".join(lines)


def _check_text(path: Path, raw: bytes) -> None:
    if b"\0" in raw:
        raise ValueError(
            f"{path} is no text in UTF-8: it holds zero bytes, as binary files and UTF-16 do; leave it out, or convert it"
        )


def _decode(path: Path, place: int, raw: bytes, undecodable: Undecodable, whole: bool = True) -> str:
    try:
        return raw.decode("utf-8", errors="replace" if undecodable == "replace" else "strict")
    except UnicodeDecodeError as error:
        if not whole and error.end == len(raw):
            return ""  # the last character goes on
        raise ValueError(
            f"{path} is no UTF-8: byte 0x{raw[error.start]:02x} at {place + error.start}; convert the file, or choose "
            'undecodable="replace" (U+FFFD instead) or, for byte models, "keep" (the bytes as they are)'
        ) from error


def _split(encoded: Iterable[Window], room: int, *, first_only: bool) -> Iterator[Window]:
    for whole in encoded:
        for start in range(0, min(len(whole.ids), 1) if first_only else len(whole.ids), room):
            yield _part(whole, start, start + room)


def _packed(encoded: Iterable[Window], separator: Window, room: int) -> Iterator[Window]:
    rest: list[Window] = []
    filled = 0
    for whole in encoded:
        if filled:
            rest.append(separator)
            filled += len(separator.ids)
        rest.append(whole)
        filled += len(whole.ids)
        if filled < room:
            continue
        joined = _joined(rest)
        full = filled // room * room
        for start in range(0, full, room):
            yield _part(joined, start, start + room)
        filled -= full
        rest = [_part(joined, full, full + filled)] if filled else []
    if filled:
        yield _joined(rest)


def _joined(parts: Sequence[Window]) -> Window:
    words = None if parts[0].words is None else np.concatenate([part.words for part in parts if part.words is not None])
    return Window(np.concatenate([part.ids for part in parts]), words)


def _part(whole: Window, start: int, stop: int) -> Window:
    # Copies: a view would keep the whole document in memory.
    return Window(whole.ids[start:stop].copy(), None if whole.words is None else whole.words[start:stop].copy())
