import numpy as np
import pytest

from hf_perceiver.training.ngram import ByteNGram


def witten_bell(text: bytes, context: bytes, byte: int) -> float:
    """The definition, by counting."""
    if not context:
        lower, count, total, types = 1 / 256, text.count(bytes([byte])), len(text), len(set(text))
    else:
        lower = witten_bell(text, context[1:], byte)
        after = [text[i + len(context)] for i in range(len(text) - len(context)) if text[i:].startswith(context)]
        count, total, types = after.count(byte), len(after), len(set(after))
        if not total:
            return lower
    return (count + types * lower) / (total + types)


def as_context(context: bytes, order: int) -> np.ndarray:
    padded = [-1] * (order - len(context)) + list(context)
    return np.array([padded])


@pytest.mark.parametrize("context", [b"", b"a", b"ab", b"bra", b"zab", b"zzz"])
def test_probabilities_are_witten_bells(context):
    text = b"abracadabra abrakadabra"
    found = ByteNGram(order=3).fit(text).probabilities(as_context(context, 3))[0]
    expected = [witten_bell(text, context, byte) for byte in range(256)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)  # float64, the same few sums
    assert found.sum() == pytest.approx(1, abs=1e-12)


def test_every_order_up_to_six_sums_to_one():
    text = bytes(np.random.default_rng(0).integers(97, 100, size=500, dtype=np.uint8))
    contexts = np.random.default_rng(1).integers(97, 101, size=(50, 6))
    found = ByteNGram(order=6).fit(text).probabilities(contexts)
    np.testing.assert_allclose(found.sum(1), 1, atol=1e-12)
    assert (found > 0).all()


def test_single_bytes_are_told_from_true_bytes_and_words_from_own_guesses():
    ngram = ByteNGram(order=4).fit(b"the cat sat. the cow sat. the cat ran. the cat sat. ")
    window = np.frombuffer(b"the cow sat.", np.uint8)[None]
    masked = np.zeros((1, 12), bool)
    masked[0, 4:7] = True
    # After "the " comes "c", mostly "ca": with true bytes on the left "co" leads on to "w".
    assert bytes(ngram.predict_bytes(window, masked)) == b"caw"
    assert bytes(ngram.fill_words(window, masked)) == b"cat"
    assert bytes(window[0]) == b"the cow sat."


def test_words_hold_no_white_space_unless_allowed():
    ngram = ByteNGram(order=2).fit(b"a  a  a  b  a  ")
    window = np.frombuffer(b"a bb", np.uint8)[None]
    masked = np.array([[False, False, True, True]])
    assert b" " not in bytes(ngram.fill_words(window, masked))
    assert b" " in bytes(ngram.fill_words(window, masked, whitespace=True))


def test_chunks_do_not_change_the_guesses():
    data = np.random.default_rng(0).integers(97, 105, size=2000, dtype=np.uint8)
    ngram = ByteNGram(order=3).fit(data)
    windows = data.reshape(20, 100)
    masked = np.random.default_rng(1).random(windows.shape) < 0.3
    assert (ngram.predict_bytes(windows, masked) == ngram.predict_bytes(windows, masked, chunk_size=7)).all()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ByteNGram(order=7), "order=7 must be 1 to 6"),
        (lambda: ByteNGram(order=3).fit(b"abc"), "3 bytes are too few for order 3"),
        (lambda: ByteNGram(order=3).fit(b"abcdef").probabilities(np.zeros((2, 2))), r"\(Q, 3\)"),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()
