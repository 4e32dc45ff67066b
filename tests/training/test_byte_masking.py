import numpy as np
import pytest
import torch

from hf_perceiver.training.byte_masking import (
    CLS,
    IGNORED,
    MASK,
    PAD,
    SEP,
    ByteMasker,
    Windows,
    WindowSampler,
    cut_windows,
    held_out_windows,
    is_space,
    mask_bytes,
    mask_words,
)

TEXT = "\n".join(f"Paragraph {n} tells what one can do with the words of which it is made." for n in range(200))


def windows_of(*texts: str) -> Windows:
    length = max(map(len, texts))
    table = np.zeros((len(texts), length), np.uint8)
    for row, text in zip(table, texts, strict=True):
        row[: len(text)] = np.frombuffer(text.encode(), np.uint8)
    return Windows(table, np.array([len(t) for t in texts]))


def texts_of(windows: Windows) -> list[str]:
    return [bytes(row[:n]).decode() for row, n in zip(windows.text, windows.lengths, strict=True)]


def test_windows_begin_and_end_at_words():
    words = set(TEXT.split())
    windows = WindowSampler([TEXT], 40).sample(200, np.random.default_rng(0))
    for text in texts_of(windows):
        assert 0 < len(text) <= 40
        assert set(text.split()) <= words
        assert text == text.strip()


def test_a_word_longer_than_the_window_is_cut():
    data = np.frombuffer(b"x" * 50 + b" end", np.uint8)
    windows = cut_windows(data, np.array([0]), np.array([20]), 20)
    assert texts_of(windows) == ["x" * 20]


def test_some_windows_are_shorter_and_some_begin_with_a_paragraph():
    rng = np.random.default_rng(0)
    full = WindowSampler([TEXT], 60, shorter=0.0, paragraph_starts=0.0).sample(500, rng)
    short = WindowSampler([TEXT], 60, shorter=1.0, paragraph_starts=1.0).sample(500, rng)
    assert full.lengths.min() > 40 > short.lengths.min()  # no word of TEXT is longer than 9
    assert all(t.startswith("Paragraph") for t in texts_of(short))
    assert not all(t.startswith("Paragraph") for t in texts_of(full))


def test_held_out_windows_are_fixed_and_do_not_overlap():
    one, two = (held_out_windows([TEXT], 50, count=1000, seed=3) for _ in range(2))
    assert (one.text == two.text).all()
    # Everything is in there once, but for the white space between windows.
    assert " ".join(texts_of(one)).split() == TEXT.split()
    few = held_out_windows([TEXT], 50, count=20, seed=3)
    assert set(texts_of(few)) < set(texts_of(one)) and len(few.text) == 20


def test_masks_have_the_rate_asked_for_and_stay_inside():
    windows = WindowSampler([TEXT], 100).sample(2000, np.random.default_rng(0))
    inside = windows.inside()
    bytes_ = mask_bytes(windows, 0.15, np.random.default_rng(1))
    words = mask_words(windows, 0.15, np.random.default_rng(2))
    assert not (bytes_ & ~inside).any() and not (words & ~inside).any()
    # 170,000 bytes: standard deviation 0.001; at least one per window adds to the words of short windows.
    assert bytes_.sum() / inside.sum() == pytest.approx(0.15, abs=0.01)
    assert words.sum() / (inside & ~is_space(windows.text)).sum() == pytest.approx(0.155, abs=0.015)
    assert bytes_.any(1).all() and words.any(1).all()


def test_word_masks_cover_whole_words_only():
    windows = windows_of("one two, three", "a bc")
    seen = set()
    for seed in range(50):
        for row, mask, n in zip(
            windows.text, mask_words(windows, 0.3, np.random.default_rng(seed)), (14, 4), strict=True
        ):
            text = bytes(row[:n]).decode()
            shown = "".join("_" if hidden else c for c, hidden in zip(text, mask, strict=False))
            for word, part in zip(text.split(" "), shown.split(" "), strict=True):
                assert part in (word, "_" * len(word))
                seen.add(part)
    assert {"one", "two,", "three", "___", "____", "_____", "bc", "__"} <= seen


def test_the_masker_speaks_the_tokenizers_ids():
    from hf_perceiver.tokenization_perceiver_io import PerceiverIOTokenizer

    windows = windows_of("Some text.", "Longer text here.")
    none = np.zeros(windows.text.shape, bool)
    expected = PerceiverIOTokenizer(model_max_length=24)(
        ["Some text.", "Longer text here."], padding="max_length", return_tensors="pt"
    )
    batch = ByteMasker(24)(windows, none)
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert (batch["labels"] == IGNORED).all()


def test_labels_stand_where_masks_do_with_and_without_special_tokens():
    windows = windows_of("ab cd", "ef")
    masked = np.zeros(windows.text.shape, bool)
    masked[0, 3] = masked[1, 0] = True
    batch = ByteMasker(8)(windows, masked, special_tokens=np.array([True, False]))
    a = [ord(c) + 6 for c in "ab cdef"]
    assert batch["input_ids"].tolist() == [
        [CLS, a[0], a[1], a[2], MASK, a[4], SEP, PAD],
        [MASK, a[6], PAD, PAD, PAD, PAD, PAD, PAD],
    ]
    assert batch["labels"].tolist() == [[-100] * 4 + [a[3]] + [-100] * 3, [a[5]] + [-100] * 7]
    assert batch["attention_mask"].sum(1).tolist() == [7, 2]


def test_replacement_shares():
    windows = WindowSampler([TEXT], 100, shorter=0.0).sample(1000, np.random.default_rng(0))
    masked = mask_bytes(windows, 0.5, np.random.default_rng(1))
    batch = ByteMasker(102, replacement=(0.8, 0.1, 0.1))(windows, masked, np.random.default_rng(2))
    asked = batch["labels"] != IGNORED
    ids, labels = batch["input_ids"][asked], batch["labels"][asked]
    # About 48,000 bytes: standard deviation 0.002.
    assert (ids == MASK).float().mean().item() == pytest.approx(0.8, abs=0.01)
    assert (ids == labels).float().mean().item() == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: WindowSampler([TEXT], 8), "8 bytes hold too little"),
        (lambda: WindowSampler(["tiny"], 40), "4 bytes of documents are too few"),
        (lambda: mask_bytes(windows_of("abc"), 1.0, np.random.default_rng()), "rate of 1.0"),
        (lambda: mask_words(windows_of("abc"), 0.0, np.random.default_rng()), "rate of 0.0"),
        (lambda: ByteMasker(8, replacement=(0.5, 0.1, 0.1)), "add up to 1"),
        (lambda: ByteMasker(4)(windows_of("abc"), np.zeros((1, 3), bool)), "needs 5 tokens"),
        (lambda: ByteMasker(8, (0.8, 0.1, 0.1))(windows_of("abc"), np.ones((1, 3), bool)), "needs rng"),
        (lambda: held_out_windows(["  "], 20, 5), "no text"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
