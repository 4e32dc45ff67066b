"""Windows of text and masks over them, for training and evaluating masked language models on bytes.

A window begins and ends at a word and is at most `length` bytes long. Token ids are byte + 6, as the tokenizer's.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

PAD, BOS, EOS, MASK, CLS, SEP = range(6)
NUM_SPECIAL = 6
IGNORED = -100  # torch's cross_entropy leaves this label out


class Windows(NamedTuple):
    """`text` (n, L) uint8, 0 after the end; `lengths` (n,)."""

    text: np.ndarray
    lengths: np.ndarray

    def inside(self) -> np.ndarray:
        """(n, L) True where there is text."""
        return np.arange(self.text.shape[1]) < self.lengths[:, None]

    def select(self, rows: Any) -> "Windows":
        return Windows(self.text[rows], self.lengths[rows])


class WindowSampler:
    """Random windows of documents; each place in the text is equally likely to begin one.

    shorter: the share of windows that are cut to a random length (at least 16 bytes), as users' inputs will be.
    paragraph_starts: the share that begins where a paragraph (a line) begins.
    Raises ValueError without text or for a length below 16.
    """

    def __init__(self, documents: Sequence[str], length: int, *, shorter: float = 0.2, paragraph_starts: float = 0.3):
        check_length(length)
        self.data = np.frombuffer("\n".join(documents).encode(), np.uint8)
        if len(self.data) <= length:
            raise ValueError(f"{len(self.data)} bytes of documents are too few for windows of {length}")
        self.length, self.shorter, self.paragraph_starts = length, shorter, paragraph_starts
        space = is_space(self.data)
        starts = np.flatnonzero(space[:-1] & ~space[1:]) + 1
        self.word_starts = starts[starts < len(self.data) - length]
        after_break = self.data[self.word_starts - 1] == 10
        self.line_starts = self.word_starts[after_break] if after_break.any() else self.word_starts

    def sample(self, count: int, rng: np.random.Generator) -> Windows:
        """`count` windows, with replacement."""
        words = self.word_starts[rng.integers(len(self.word_starts), size=count)]
        lines = self.line_starts[rng.integers(len(self.line_starts), size=count)]
        starts = np.where(rng.random(count) < self.paragraph_starts, lines, words)
        limits = np.where(rng.random(count) < self.shorter, rng.integers(16, self.length + 1, size=count), self.length)
        return cut_windows(self.data, starts, limits, self.length)


def held_out_windows(documents: Sequence[str], length: int, count: int, seed: int = 0) -> Windows:
    """Up to `count` windows that do not overlap, chosen by `seed` out of all that the documents hold."""
    check_length(length)
    data = np.frombuffer("\n".join(documents).encode(), np.uint8)
    space = is_space(data)
    starts = []
    place = 0
    while place < len(data):
        if space[place]:
            place += 1
            continue
        starts.append(place)
        _, (used,) = cut_windows(data, np.array([place]), np.array([length]), length)
        place += int(used)
    if not starts:
        raise ValueError("the documents hold no text to cut windows from")
    order = np.random.default_rng(seed).permutation(len(starts))[:count]
    chosen = np.array(starts)[np.sort(order)]
    return cut_windows(data, chosen, np.full(len(chosen), length), length)


def cut_windows(data: np.ndarray, starts: np.ndarray, limits: np.ndarray, length: int) -> Windows:
    """Windows from `starts`, at most `limits` long, shortened to the last whole word (if there is a shorter one)."""
    places = starts[:, None] + np.arange(length + 1)
    exists = places < len(data)
    text = np.where(exists, data[np.minimum(places, len(data) - 1)], 32).astype(np.uint8)
    # A window may end wherever the next byte is white space, and does not end in white space itself.
    space = is_space(text)
    may_end = np.zeros((len(starts), length + 1), bool)
    may_end[:, 1:] = space[:, 1:] & ~space[:, :-1]
    may_end &= np.arange(length + 1) <= limits[:, None]
    last = np.where(may_end, np.arange(length + 1), 0).max(1)
    lengths = np.where(last > 0, last, limits)
    lengths = np.minimum(lengths, np.maximum(len(data) - starts, 0))
    text = np.where(np.arange(length) < lengths[:, None], text[:, :length], 0).astype(np.uint8)
    return Windows(text, lengths.astype(np.int64))


def mask_bytes(windows: Windows, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(n, L) bool: each byte by itself with probability `rate`, at least one in a window."""
    check_rate(rate)
    draws = np.where(windows.inside(), rng.random(windows.text.shape), 1.0)
    return (draws < rate) | (draws == draws.min(1, keepdims=True))


def mask_words(windows: Windows, rate: float, rng: np.random.Generator) -> np.ndarray:
    """(n, L) bool: all bytes of each word with probability `rate`, at least one word in a window.

    A word is what stands between white space, its punctuation included.
    """
    check_rate(rate)
    space = is_space(windows.text) | ~windows.inside()
    begins = ~space & np.concatenate([np.ones((len(space), 1), bool), space[:, :-1]], axis=1)
    word = np.cumsum(begins, 1)  # (n, L), from 1
    draws = np.concatenate([np.ones((len(space), 1)), rng.random(space.shape)], axis=1)
    draws[np.arange(draws.shape[1]) > word[:, -1:]] = 1.0
    chosen = (draws < rate) | (draws == draws.min(1, keepdims=True))
    return np.take_along_axis(chosen, word, axis=1) & ~space


class ByteMasker:
    """Windows and a mask -> `input_ids`, `attention_mask`, `labels`, each (n, max_length).

    replacement: shares of masked bytes that become [MASK], a random byte, or stay; (1, 0, 0) hides all of them.
    special_tokens: put [CLS] before and [SEP] after, as the tokenizer does; a bool per window is taken too.
    """

    def __init__(self, max_length: int, replacement: tuple[float, float, float] = (1.0, 0.0, 0.0)):
        if min(replacement) < 0 or abs(sum(replacement) - 1) > 1e-6:
            raise ValueError(
                f"replacement={replacement} must be three shares that add up to 1, such as (0.8, 0.1, 0.1)"
            )
        self.max_length, self.replacement = max_length, replacement

    def __call__(
        self,
        windows: Windows,
        masked: np.ndarray,
        rng: np.random.Generator | None = None,
        special_tokens: bool | np.ndarray = True,
    ) -> dict[str, Tensor]:
        """Raises ValueError for a window that does not fit, or if chance is needed and there is no `rng`."""
        special = np.broadcast_to(np.asarray(special_tokens, bool), len(windows.text))
        longest = int((windows.lengths + 2 * special).max())
        if longest > self.max_length:
            raise ValueError(
                f"a window needs {longest} tokens, more than max_length={self.max_length}; cut shorter ones"
            )
        hidden = self._hide(windows, masked, rng)
        ids = np.full((len(hidden), self.max_length), PAD, np.int64)
        labels = np.full_like(ids, IGNORED)
        rows, columns = np.nonzero(windows.inside())
        places = columns + special[rows]
        ids[rows, places] = hidden[rows, columns]
        rows, columns = np.nonzero(masked)
        labels[rows, columns + special[rows]] = windows.text[rows, columns].astype(np.int64) + NUM_SPECIAL
        ends = np.flatnonzero(special)
        ids[ends, 0] = CLS
        ids[ends, windows.lengths[ends] + 1] = SEP
        attention = (ids != PAD).astype(np.int64)
        return {
            "input_ids": torch.from_numpy(ids),
            "attention_mask": torch.from_numpy(attention),
            "labels": torch.from_numpy(labels),
        }

    def _hide(self, windows: Windows, masked: np.ndarray, rng: np.random.Generator | None) -> np.ndarray:
        ids = windows.text.astype(np.int64) + NUM_SPECIAL
        as_mask, as_random, _ = self.replacement
        if as_mask == 1:
            return np.where(masked, MASK, ids)
        if rng is None:
            raise ValueError("replacement with chance needs rng")
        draws = rng.random(ids.shape)
        ids = np.where(masked & (draws < as_mask), MASK, ids)
        swapped = masked & (draws >= as_mask) & (draws < as_mask + as_random)
        return np.where(swapped, rng.integers(NUM_SPECIAL, NUM_SPECIAL + 256, size=ids.shape), ids)


def is_space(text: np.ndarray) -> np.ndarray:
    return (text == 32) | ((text >= 9) & (text <= 13))


def check_rate(rate: float) -> None:
    if not 0 < rate < 1:
        raise ValueError(f"a masking rate of {rate} must lie between 0 and 1; 0.15 is usual")


def check_length(length: int) -> None:
    if length < 16:
        raise ValueError(f"windows of {length} bytes hold too little text; use at least 16")
