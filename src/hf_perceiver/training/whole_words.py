"""Masking of whole words for masked language models, on bytes and on any fast tokenizer.

A word is what stands between white space, its punctuation included, whatever pieces a tokenizer cuts it into: the rule of
Perceiver IO (section 4.1), for bytes and SentencePiece alike. White space is ASCII's: a no-break space keeps words together.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor
from torch.utils.data import get_worker_info
from transformers import PerceiverTokenizer

from ..losses import IGNORED
from ..tokenization_perceiver_io import NUM_SPECIAL_TOKENS, PerceiverIOTokenizer, encode_bytes
from .byte_masking import check_rate, is_space

NO_WORD = -1


class WholeWordMaskingCollator:
    """Rows of token ids -> `input_ids`, `attention_mask`, `labels` (B, L), each word masked with `mlm_probability`.

    Words are chosen independently, so that short rows have the same rate as long ones; special tokens, padding and white
    space are never chosen. Of the chosen words a share `mask_share` becomes mask tokens, `random_share` random tokens, the
    rest stays; all of a word shares its fate, or its other pieces would give it away. (The paper states no shares; these
    are BERT's.)

    A row has `input_ids`, and besides
    - `word_ids`, a number for each token, the same within a word, -1 or None for none: see `encode_words`. Byte tokenizers
      need none. With Trainer, set remove_unused_columns=False, or it takes them away;
    - `example_id`, a number that is new in each epoch: the mask then depends on (seed, example_id) alone, whatever the
      batch, the process or the worker, and a resumed run masks as a straight one. Without it rows are counted;
    - `attention_mask`, where rows come padded.

    only_masked: `labels` (B, n) and `output_points` (B, n) of the n masked tokens instead, for models that can be asked at
    points; places over have the label -100.
    Raises ValueError for a tokenizer without a mask token, for ids that it does not have, and for a batch without a word.
    A batch of which chance chose no word at all teaches nothing: then one word is chosen.
    """

    def __init__(
        self,
        tokenizer: Any,
        mlm_probability: float = 0.15,
        *,
        mask_share: float = 0.8,
        random_share: float = 0.1,
        seed: int = 0,
        only_masked: bool = False,
    ):
        check_rate(mlm_probability)
        if min(mask_share, random_share) < 0 or mask_share + random_share > 1 + 1e-9:
            raise ValueError(
                f"mask_share={mask_share} and random_share={random_share} are shares of the chosen words: each at least 0, "
                "together at most 1; what is left over stays as it is"
            )
        if tokenizer.mask_token_id is None:
            raise ValueError(
                f"{type(tokenizer).__name__} has no mask token; add one with "
                'tokenizer.add_special_tokens({"mask_token": "[MASK]"}), before the model is made'
            )
        self.mlm_probability, self.mask_share, self.random_share = mlm_probability, mask_share, random_share
        self.seed, self.only_masked = seed, only_masked
        self.kind = type(tokenizer).__name__
        self.of_bytes = is_byte_tokenizer(tokenizer)
        self.mask_id, self.pad_id = tokenizer.mask_token_id, tokenizer.pad_token_id
        self.pads_left = tokenizer.padding_side == "left"
        special = np.zeros(len(tokenizer), bool)
        special[tokenizer.all_special_ids] = True
        self.ordinary = np.flatnonzero(~special)
        # What can be in a word: of bytes that is known for good, of other tokens it comes with the row.
        self.in_words = ~special
        if self.of_bytes:
            self.in_words &= byte_words(np.arange(len(special))[None])[0] != NO_WORD
        self.rows_seen = 0

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        ids, valid, words = self._pad(rows)
        keys = self._keys(rows)
        starts, ends = spans(valid & self.in_words[ids], words)
        if not len(starts):
            raise ValueError(
                f"there is no word in this batch of {len(rows)} rows, only special tokens and white space; leave such rows out"
            )
        # One draw decides whether a word is chosen and, where it is, what becomes of it.
        word_rows, number = count_in_rows(starts, ids.shape)
        draws = uniform(keys[word_rows], number) / self.mlm_probability
        if draws.min() >= 1:
            draws[draws.argmin()] = 0.0
        chosen = draws < 1
        places = expand(starts[chosen], ends[chosen])
        fate = np.repeat(draws[chosen], (ends - starts)[chosen])
        truth = ids.ravel()[places]
        hidden = np.where(fate < self.mask_share, self.mask_id, truth)
        swapped = (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        rows_of, columns = np.divmod(places[swapped], ids.shape[1])
        # Counters that no word of a row has.
        other = uniform(keys[rows_of], 2**32 + columns) * len(self.ordinary)
        hidden[swapped] = self.ordinary[other.astype(np.int64)]
        ids.ravel()[places] = hidden
        batch = {"input_ids": ids, "attention_mask": valid.astype(np.int64)}
        if self.only_masked:
            rows_of, slots = count_in_rows(places, ids.shape)
            points = np.zeros((len(ids), int(slots.max()) + 1), np.int64)
            labels = np.full_like(points, IGNORED)
            points[rows_of, slots] = places % ids.shape[1]
            labels[rows_of, slots] = truth
            batch["output_points"] = points
        else:
            labels = np.full_like(ids, IGNORED)
            labels.ravel()[places] = truth
        batch["labels"] = labels
        return {name: torch.from_numpy(value) for name, value in batch.items()}

    def _pad(self, rows: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
        """-> ids and whether there is a token, (B, L) each; word numbers (B, L), None where ids tell"""
        given = [np.asarray(row["input_ids"], np.int64) for row in rows]
        lengths = np.array([len(ids) for ids in given])
        shape = (len(rows), int(lengths.max()))
        if lengths.min() < shape[1] and self.pad_id is None:
            raise ValueError(
                f"rows of {lengths.min()} and {shape[1]} tokens need padding, and {self.kind} has no pad token; set "
                "tokenizer.pad_token, or give rows of one length"
            )
        begin = shape[1] - lengths if self.pads_left else np.zeros_like(lengths)
        columns = np.arange(shape[1])
        inside = (columns >= begin[:, None]) & (columns < (begin + lengths)[:, None])
        ids = fill(given, inside, self.pad_id or 0)
        if ids.min() < 0 or ids.max() >= len(self.in_words):
            raise ValueError(
                f"token ids {ids.min()}..{ids.max()} are not of this {self.kind}, which has {len(self.in_words)}; encode "
                "the text with the collator's tokenizer"
            )
        valid = inside
        if "attention_mask" in rows[0]:
            valid = fill([np.asarray(row["attention_mask"], bool) for row in rows], inside, False)
        if self.of_bytes and "word_ids" not in rows[0]:
            return ids, valid, None
        return ids, valid, fill([self._word_ids(row) for row in rows], inside, NO_WORD)

    def _word_ids(self, row: Mapping[str, Any]) -> np.ndarray:
        if "word_ids" not in row:
            raise ValueError(
                f"a row has {', '.join(row)} but no word_ids, and the ids of {self.kind} do not tell where words are; encode "
                "with encode_words, and set remove_unused_columns=False if Trainer makes the batches"
            )
        words = row["word_ids"]
        if not isinstance(words, np.ndarray):
            words = np.array([NO_WORD if word is None else int(word) for word in words])
        if len(words) != len(row["input_ids"]):
            raise ValueError(f"{len(words)} word_ids for {len(row['input_ids'])} input_ids; each token needs one")
        return words

    def _keys(self, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        """(B,) uint64, what the draws of each row begin with"""
        seed = self.seed
        if all("example_id" in row for row in rows):
            examples = np.array([int(row["example_id"]) for row in rows], np.uint64)
        else:
            examples = np.arange(self.rows_seen, self.rows_seen + len(rows), dtype=np.uint64)
            self.rows_seen += len(rows)
            worker = get_worker_info()
            # Workers begin to count anew in each epoch; torch gives them another seed then.
            seed = seed if worker is None else seed + worker.seed
        start = scramble(np.array([seed % 2**64], np.uint64))
        return scramble(start + scramble(examples))


def encode_words(tokenizer: Any, texts: Sequence[str | bytes]) -> list[tuple[np.ndarray, np.ndarray]]:
    """For each text its token ids (n,) and the number of the word that each token belongs to (n,), -1 for none.

    Without special tokens. Bytes are for byte tokenizers, which need no valid UTF-8. A token that reaches over white
    space joins the words it touches.
    Raises ValueError for a tokenizer without offsets, a slow one.
    """
    if is_byte_tokenizer(tokenizer):
        encoded = [encode_bytes(text) for text in texts]
        return [(ids, byte_words(ids[None])[0]) for ids in encoded]
    if not tokenizer.is_fast:
        raise ValueError(
            f"{type(tokenizer).__name__} is a slow tokenizer, which does not say where its tokens stand in the text; take "
            "its fast form (AutoTokenizer gives it where there is one)"
        )
    strings = [text if isinstance(text, str) else text.decode("utf-8") for text in texts]
    found = tokenizer(
        strings,
        add_special_tokens=False,
        return_offsets_mapping=True,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    return [
        (np.asarray(ids, np.int64), token_words(text, np.asarray(offsets, np.int64).reshape(-1, 2)))
        for text, ids, offsets in zip(strings, found["input_ids"], found["offset_mapping"], strict=True)
    ]


def is_byte_tokenizer(tokenizer: Any) -> bool:
    """Whether ids are UTF-8 bytes + 6: this package's tokenizer, or transformers' for its Perceiver."""
    return isinstance(tokenizer, PerceiverIOTokenizer | PerceiverTokenizer)


def byte_words(ids: np.ndarray) -> np.ndarray:
    """(B, L) byte ids -> (B, L) number of each byte's word in its row, -1 for white space and special tokens"""
    inside = (ids >= NUM_SPECIAL_TOKENS) & ~is_space(ids - NUM_SPECIAL_TOKENS)
    begins = inside.copy()
    begins[:, 1:] &= ~inside[:, :-1]
    return np.where(inside, np.cumsum(begins, axis=1, dtype=np.int32) - 1, NO_WORD)


def token_words(text: str, offsets: np.ndarray) -> np.ndarray:
    """Offsets (n, 2) of tokens in `text` -> (n,) number of each token's word, -1 for one of white space alone"""
    characters = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32)
    inside = np.concatenate([[False], ~is_space(characters), [False]])
    starts = np.flatnonzero(inside[1:] & ~inside[:-1])
    ends = np.flatnonzero(inside[:-1] & ~inside[1:])
    first = np.searchsorted(ends, offsets[:, 0], side="right")
    last = np.searchsorted(starts, offsets[:, 1], side="left") - 1
    in_word = (first <= last) & (offsets[:, 1] > offsets[:, 0])
    # A token begins a word where none before it reached that far.
    reached = np.maximum.accumulate(np.concatenate([[-1], np.where(in_word, last, -1)]))[:-1]
    begins = in_word & (first > reached)
    return np.where(in_word, np.cumsum(begins, dtype=np.int32) - 1, NO_WORD)


def spans(in_word: np.ndarray, words: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """(B, L) whether a token is in a word and, where neighbours may be of two words, its number -> flat starts and ends"""
    if words is None:
        begins, ends = in_word.copy(), in_word.copy()
        begins[:, 1:] &= ~in_word[:, :-1]
        ends[:, :-1] &= ~in_word[:, 1:]
    else:
        in_word = in_word & (words != NO_WORD)
        begins, ends = in_word.copy(), in_word.copy()
        differ = words[:, 1:] != words[:, :-1]
        begins[:, 1:] &= ~in_word[:, :-1] | differ
        ends[:, :-1] &= ~in_word[:, 1:] | differ
    return np.flatnonzero(begins), np.flatnonzero(ends) + 1


def count_in_rows(places: np.ndarray, shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Rising flat places in (B, L) -> the row of each, and how many came before it in its row"""
    first = np.searchsorted(places, np.arange(shape[0]) * shape[1])
    rows = places // shape[1]
    return rows, np.arange(len(places)) - first[rows]


def expand(starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """All flat places from each start up to its end."""
    lengths = ends - starts
    before = np.cumsum(lengths) - lengths
    return np.repeat(starts - before, lengths) + np.arange(lengths.sum())


def fill(rows: Sequence[np.ndarray], inside: np.ndarray, padding: Any) -> np.ndarray:
    """Rows one after the other where `inside` (B, L) says, `padding` elsewhere."""
    if inside.all():
        return np.stack(rows)
    filled = np.full(inside.shape, padding, rows[0].dtype)
    filled[inside] = np.concatenate(rows)
    return filled


def uniform(keys: np.ndarray, counters: ArrayLike) -> np.ndarray:
    """Numbers in [0, 1), for each key and counter (broadcast) always the same one.

    The counters-th output of SplitMix64 (Steele, Lea and Flood, 2014) that was seeded with the key. A generator of numpy
    for each row would take longer than all the rest.
    """
    steps = (np.asarray(counters).astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (scramble(keys + steps, step=False) >> np.uint64(11)) * 2.0**-53


def scramble(values: np.ndarray, step: bool = True) -> np.ndarray:
    """SplitMix64's output function on uint64 arrays, after a step of its counter."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15) if step else values
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))
