"""An interpolated byte n-gram, the baseline of the byte language model.

Witten-Bell smoothing: P_k(b | c) = (n(c b) + t(c) P_{k-1}(b | c')) / (n(c) + t(c)), where c is the last k bytes, c' the
last k - 1, n counts and t(c) is how many different bytes were seen after c. P_{-1} is uniform.
Source: Witten and Bell 1991, method C; Chen and Goodman 1998, section 2.5.
"""

import numpy as np

WHITESPACE = np.array([9, 10, 11, 12, 13, 32])


class ByteNGram:
    """Next byte from up to `order` bytes before it (1 to 6); order 5 counts sequences of six bytes.

    Trained by `fit`; a million bytes take about a second and 60 MB.
    """

    def __init__(self, order: int = 5):
        if not 1 <= order <= 6:
            raise ValueError(
                f"order={order} must be 1 to 6: a sequence and its next byte are counted in 64-bit numbers"
            )
        self.order = order
        self.unigram = np.full(256, 1 / 256)
        self._counts: list[tuple[np.ndarray, np.ndarray]] = []  # per context length from 1: (sorted sequences, counts)

    def fit(self, data: bytes | np.ndarray) -> "ByteNGram":
        """Count all sequences of a text. Raises ValueError if it is not longer than `order`."""
        data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else np.asarray(data, np.uint8)
        if len(data) <= self.order:
            raise ValueError(f"{len(data)} bytes are too few for order {self.order}; give a longer text")
        counts = np.bincount(data, minlength=256)
        seen = np.count_nonzero(counts)
        self.unigram = (counts + seen / 256) / (len(data) + seen)
        self._counts = []
        sequences = data.astype(np.int64)
        for length in range(1, self.order + 1):
            sequences = sequences[:-1] << 8 | data[length:]
            self._counts.append(np.unique(sequences, return_counts=True))
        return self

    def probabilities(self, contexts: np.ndarray) -> np.ndarray:
        """(Q, order) bytes, the last one nearest, -1 where the text had not begun -> (Q, 256)"""
        contexts = np.asarray(contexts, np.int64)
        if contexts.ndim != 2 or contexts.shape[1] != self.order:
            raise ValueError(f"contexts of shape {contexts.shape} should be (Q, {self.order}), one row per question")
        result = np.tile(self.unigram, (len(contexts), 1))
        code = np.zeros(len(contexts), np.int64)
        known = np.ones(len(contexts), bool)
        for length, (sequences, counts) in enumerate(self._counts, start=1):
            byte = contexts[:, -length]
            known &= byte >= 0
            code |= np.where(known, byte, 0) << 8 * (length - 1)
            first = np.searchsorted(sequences, code << 8)
            after = np.where(known, np.searchsorted(sequences, (code << 8) + 256), first)
            types = after - first
            rows = np.repeat(np.arange(len(contexts)), types)
            places = np.arange(types.sum()) - np.repeat(np.cumsum(types) - types, types) + np.repeat(first, types)
            found = np.zeros_like(result)
            found[rows, sequences[places] & 255] = counts[places]
            result = (found + types[:, None] * result) / np.maximum(found.sum(1) + types, 1)[:, None] * (types > 0)[
                :, None
            ] + result * (types == 0)[:, None]
        return result

    def predict_bytes(self, windows: np.ndarray, masked: np.ndarray, chunk_size: int = 8192) -> np.ndarray:
        """Likeliest byte at each masked place, given the true bytes on its left.

        (n, L) windows, (n, L) bool -> (masked.sum(),), in row-major order.
        """
        rows, columns = np.nonzero(masked)
        found = np.zeros(len(rows), np.uint8)
        for start in range(0, len(rows), chunk_size):
            part = slice(start, start + chunk_size)
            contexts = self._contexts(windows, rows[part], columns[part])
            found[part] = self.probabilities(contexts).argmax(1)
        return found

    def fill_words(self, windows: np.ndarray, masked: np.ndarray, whitespace: bool = False) -> np.ndarray:
        """The same with its own guesses in place of masked bytes further left, from left to right.

        Masked words hold no white space; `whitespace=False` tells the n-gram so, which helps it.
        """
        filled = np.array(windows, np.uint8)
        for column in np.flatnonzero(masked.any(0)):
            rows = np.flatnonzero(masked[:, column])
            probabilities = self.probabilities(self._contexts(filled, rows, np.full(len(rows), column)))
            if not whitespace:
                probabilities[:, WHITESPACE] = 0
            filled[rows, column] = probabilities.argmax(1)
        return filled[masked]

    def _contexts(self, windows: np.ndarray, rows: np.ndarray, columns: np.ndarray) -> np.ndarray:
        places = columns[:, None] + np.arange(-self.order, 0)
        contexts = windows[rows[:, None], np.maximum(places, 0)].astype(np.int64)
        # A window begins at a word, so a space stands before it; what is further left is unknown to the model too.
        contexts[places == -1] = 32
        contexts[places < -1] = -1
        return contexts
