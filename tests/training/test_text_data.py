"""Text files and documents -> rows: what a document is, how documents are cut, epochs, streams, and files that are no text."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import trained
from torch.utils.data import DataLoader

from hf_perceiver.tokenization_perceiver_io import PerceiverIOTokenizer, decode_bytes, encode_bytes
from hf_perceiver.training.text_data import (
    Encoder,
    EpochSampler,
    TextStream,
    TextWindows,
    check_files,
    find_files,
    is_held_out,
    read_files,
    shuffled,
    texts_of,
    windows,
)

SEP = 5


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(PerceiverIOTokenizer())


@pytest.fixture(scope="module")
def pieces() -> Encoder:
    return Encoder(trained("unigram"))


def texts(rows) -> list[str]:
    return [decode_bytes(row["input_ids"]) for row in rows]


# Files


def test_folders_patterns_and_files_are_found_once(tmp_path):
    for name in ("a.txt", "deep/er/b.md", "c.RST", "d.py", "e.bin"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    names = [p.name for p in find_files([str(tmp_path), str(tmp_path / "**/*.py"), str(tmp_path / "a.txt")])]
    assert sorted(names) == ["a.txt", "b.md", "c.RST", "d.py"]


@pytest.mark.parametrize("place", ["nothing.txt", "*.nothing", "empty"])
def test_a_place_without_text_is_an_error(tmp_path, place):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"holds no text: neither a file.*\.rst.*name other endings by a pattern"):
        find_files([str(tmp_path / place)])


@pytest.mark.parametrize(
    ("per", "documents"),
    [
        ("file", ["one\ntwo\n\n \nthree\r\n", "ä"]),
        ("line", ["one", "two", "three", "ä"]),
        ("paragraph", ["one\ntwo\n", "three\r\n", "ä"]),
    ],
)
def test_a_document_is_a_file_a_line_or_a_paragraph(tmp_path, per, documents):
    first, second, third = (tmp_path / name for name in "abc")
    first.write_bytes(b"\xef\xbb\xbfone\ntwo\n\n \nthree\r\n")  # with a byte order mark
    second.write_bytes(b" \n\n")
    third.write_bytes("ä".encode())
    assert list(read_files([first, second, third], per)) == documents


def test_bytes_that_are_no_utf8_are_an_error_replaced_or_kept(tmp_path):
    path = tmp_path / "latin"
    path.write_bytes("fine\nGrüße\n".encode("latin-1"))
    with pytest.raises(ValueError, match=r'latin is no UTF-8: byte 0xfc at 7; convert the file, or choose.*"keep"'):
        list(read_files([path], "line"))
    with pytest.raises(ValueError, match="byte 0xfc at 7"):
        check_files([path])
    check_files([path], "replace")
    assert list(read_files([path], "line", "replace")) == ["fine", "Gr\ufffd\ufffde"]
    assert list(read_files([path], "line", "keep")) == [b"fine", b"Gr\xfc\xdfe"]


def test_what_is_no_text_is_an_error(tmp_path):
    path = tmp_path / "picture.txt"
    path.write_bytes(b"\x89PNG\0\0")
    for undecodable in ("error", "replace", "keep"):
        with pytest.raises(ValueError, match=r"picture.txt is no text in UTF-8: it holds zero bytes"):
            list(read_files([path], undecodable=undecodable))
        with pytest.raises(ValueError, match="zero bytes"):
            check_files([path], undecodable)


def test_a_character_may_be_cut_where_the_look_at_a_file_ends(tmp_path):
    path = tmp_path / "long"
    path.write_text("aaä", encoding="utf-8")
    check_files([path], size=3)
    path.write_bytes(b"aa\xc3")
    with pytest.raises(ValueError, match="byte 0xc3 at 2"):
        check_files([path], size=4)


def test_documents_of_data_sets_are_in_a_column():
    rows = [{"text": "one", "id": 1}, {"text": None}, {"text": " "}, "two", b"three", {"text": "four"}]
    assert list(texts_of(rows)) == ["one", "two", b"three", "four"]
    assert list(texts_of([{"body": "one"}], "body")) == ["one"]
    with pytest.raises(ValueError, match=r"no column 'text', only body, id; name its text"):
        list(texts_of([{"body": "one", "id": 1}]))
    with pytest.raises(ValueError, match="a document is a string, not list"):
        list(texts_of([{"text": ["one"]}]))


def test_documents_are_held_out_by_their_content():
    documents = [f"document {i}" for i in range(4_000)]
    held = [d for d in documents if is_held_out(d, 0.1)]
    assert abs(len(held) / 4_000 - 0.1) < 4 * (0.1 * 0.9 / 4_000) ** 0.5
    assert all(is_held_out(d.encode(), 0.1) for d in held)
    assert set(held) <= {d for d in documents if is_held_out(d, 0.2)}
    assert not any(is_held_out(d, 0) for d in documents)


# Rows


def test_packed_rows_are_full_and_lose_nothing(encoder):
    documents = ["first document", "second", "a third one that is longer than the rest", "x"]
    rows = TextWindows(windows(documents, encoder, 16), encoder)
    ids = [row["input_ids"].tolist() for row in (rows[i] for i in range(len(rows)))]
    assert all(len(row) == 16 for row in ids[:-1])
    assert all(row[0] == 4 and row[-1] == SEP for row in ids)
    text = [token for row in ids for token in row[1:-1]]
    # A row that begins with a document has no separator before it; here none does but the first.
    want = encode_bytes(documents[0]).tolist()
    for document in documents[1:]:
        want += ([SEP] if len(want) % 14 else []) + encode_bytes(document).tolist()
    assert text == want


@settings(max_examples=30)
@given(
    documents=st.lists(st.text(alphabet="ab", min_size=1, max_size=40), min_size=1, max_size=8),
    length=st.integers(3, 30),
)
def test_packed_text_is_the_documents_one_after_the_other(encoder, documents, length):
    made = list(windows(documents, encoder, length))
    joined = np.concatenate([window.ids for window in made])
    assert decode_bytes(joined[joined != SEP]) == "".join(documents)
    assert [len(window.ids) for window in made[:-1]] == [length - 2] * (len(made) - 1)


def test_split_rows_never_hold_two_documents(encoder):
    rows = TextWindows(windows(["one two", "three"], encoder, 6, "split"), encoder)
    assert texts(rows[i] for i in range(len(rows))) == ["one ", "two", "thre", "e"]


def test_truncated_rows_are_the_beginning_of_each(encoder):
    rows = TextWindows(windows(["one two", "three"], encoder, 6, "truncate"), encoder)
    assert texts(rows[i] for i in range(len(rows))) == ["one ", "thre"]


def test_windows_without_a_word_are_left_out(encoder):
    assert [decode_bytes(w.ids) for w in windows(["ab" + " " * 20 + "c"], encoder, 6, "split")] == ["ab  ", "  c"]


def test_rows_of_pieces_bring_their_words(pieces):
    documents = ["white space and words", "the fox jumps over it"]
    for packing in ("pack", "split"):
        rows = TextWindows(windows(documents, pieces, 9, packing), pieces)
        for i in range(len(rows)):
            row = rows[i]
            assert len(row["word_ids"]) == len(row["input_ids"])
            separator = row["input_ids"] == pieces.tokenizer.sep_token_id
            assert (row["word_ids"][separator] == -1).all()
            assert row["input_ids"].dtype == np.int64
    # Words of neighbouring documents are told apart by the separator between them.
    (window,) = windows(["white", "space"], pieces, 100)
    begins = np.flatnonzero(np.diff(window.words, prepend=-1))
    assert (window.words[begins] == 0).sum() == 2


def test_a_row_needs_room_for_text(encoder):
    with pytest.raises(ValueError, match="max_length=2 leaves no room for text beside 2 special tokens"):
        list(windows(["text"], encoder, 2))


def test_a_tokenizer_without_special_tokens_adds_none():
    bare = Encoder(PerceiverIOTokenizer(add_cls_and_sep=False))
    rows = TextWindows(windows(["ab", "c"], bare, 4), bare)
    assert rows[0]["input_ids"].tolist() == [103, 104, SEP, 105]


# Epochs


def test_each_epoch_has_an_order_and_numbers_of_its_own(encoder):
    rows = TextWindows(windows([f"text {i}" for i in range(10)], encoder, 20, "split"), encoder)
    sampler = EpochSampler(len(rows), seed=1)
    first = list(sampler)
    sampler.epoch = 1
    second = list(sampler)
    assert sorted(first) == list(range(10))
    assert sorted(second) == list(range(10, 20))
    assert [i - 10 for i in second] != first
    assert rows[13]["example_id"] == 13
    assert rows[13]["input_ids"].tolist() == rows[3]["input_ids"].tolist()
    assert list(EpochSampler(len(rows), seed=1)) == first


# Streams


class Counted:
    """Documents that count how many of them were read."""

    def __init__(self, count):
        self.count, self.read = count, 0

    def __call__(self, turn):
        for i in range(self.count):
            self.read += 1
            yield f"text {i}"


def stream(documents, encoder, **options) -> TextStream:
    return TextStream(documents, encoder, 32, packing="split", **{"buffer": 8, **options})


def test_a_stream_gives_each_row_once_a_pass_in_another_order(encoder):
    rows = list(itertools.islice(stream(Counted(20), encoder), 40))
    first, second = texts(rows[:20]), texts(rows[20:])
    assert sorted(first) == sorted(second) == sorted(f"text {i}" for i in range(20))
    assert first != second
    assert first != sorted(first)
    assert [row["example_id"] for row in rows] == list(range(40))
    assert texts(itertools.islice(stream(Counted(20), encoder), 40)) == first + second


def test_a_stream_reads_no_further_than_its_buffer(encoder):
    documents = Counted(100_000)
    for taken, _ in enumerate(itertools.islice(stream(documents, encoder), 50)):
        assert documents.read <= taken + 1 + 8


def test_workers_share_a_stream_out(encoder):
    loader = DataLoader(stream(_twenty, encoder), batch_size=1, num_workers=2, collate_fn=lambda rows: rows[0])
    rows = list(itertools.islice(loader, 40))
    # Ten documents each a pass, in turn.
    assert sorted(texts(rows)) == sorted([f"text {i}" for i in range(20)] * 2)
    assert sorted(row["example_id"] for row in rows) == list(range(40))


def _twenty(turn):
    return (f"text {i}" for i in range(20))


def test_a_stream_that_has_nothing_says_so(encoder):
    once = iter(["text"])
    rows = iter(stream(lambda turn: once, encoder))
    next(rows)
    with pytest.raises(ValueError, match=r"pass 2 over the stream gave no text to worker 1 of 1; give at least"):
        next(rows)
    with pytest.raises(ValueError, match="at least 1 window, not 0"):
        stream(Counted(1), encoder, buffer=0)


def test_shuffling_loses_nothing():
    rng = np.random.default_rng(0)
    for count, buffer in ((0, 3), (2, 3), (3, 3), (50, 3), (5, 1)):
        assert sorted(shuffled(range(count), buffer, rng)) == list(range(count))
    # A buffer of one keeps the order.
    assert list(shuffled(range(5), 1, rng)) == list(range(5))
