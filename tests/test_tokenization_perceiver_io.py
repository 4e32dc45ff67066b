"""The standard is transformers' own `PerceiverTokenizer`, whose ids ours must equal one by one."""

import json
import os
import pickle
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, PerceiverTokenizer, PreTrainedTokenizerFast

import hf_perceiver
from hf_perceiver.tokenization_perceiver_io import (
    BYTE_CHARACTERS,
    SPECIAL_TOKENS,
    PerceiverIOTokenizer,
    decode_bytes,
    encode_bytes,
)

# Two, three and four bytes; NUL; a byte order mark; emoji joined by U+200D; specials and what only looks like one.
TEXTS = [
    "This is an incomplete sentence where some words are missing.",
    "",
    " ",
    "  two  blanks \t\n and lines\r\n",
    "naïve Größe Ωmega Жук",
    "日本語のテキスト",
    "family 👨‍👩‍👧‍👦 and flag 🇨🇭",
    "a\0b\x7f\x80\xad",
    "\ufeffstarts with a mark",
    "é is not e\u0301",
    "fill [MASK] here[MASK][MASK] and [CLS] there [SEP]",
    "[mask] [MAS K] [[MASK]] [PAD [BOS][EOS]",
    "\U0010ffff\ud7ff\ue000",
]
PAIRS = [("first", "second"), ("", "only the second"), ("[MASK] é", "👍\0"), ("a " * 20, "b" * 25)]

PIECES = [*SPECIAL_TOKENS, "[", "[MASK", "\0", " ", "  ", "\n", "\u3000"]
TEXT = st.lists(st.sampled_from(PIECES) | st.text()).map("".join)


@pytest.fixture(scope="module")
def ours() -> PerceiverIOTokenizer:
    return PerceiverIOTokenizer()


@pytest.fixture(scope="module")
def builtin() -> PerceiverTokenizer:
    return PerceiverTokenizer()


def test_ids_are_bytes_plus_six_between_cls_and_sep(ours):
    assert ours("Aé").input_ids == [4, 65 + 6, 0xC3 + 6, 0xA9 + 6, 5]


def test_specials_have_the_ids_the_released_model_was_trained_with(ours):
    # DeepMind's bytes_tokenizer: pad, bos, eos, mask, cls, sep, in this order.
    names = ["pad", "bos", "eos", "mask", "cls", "sep"]
    assert [getattr(ours, f"{name}_token") for name in names] == ["[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]"]
    assert [getattr(ours, f"{name}_token_id") for name in names] == [0, 1, 2, 3, 4, 5]


def test_every_byte_has_its_own_entry(ours):
    assert len(ours) == ours.vocab_size == 262
    assert [ours.convert_tokens_to_ids(character) for character in BYTE_CHARACTERS] == list(range(6, 262))


def test_defaults_are_the_language_models(ours):
    assert ours.model_max_length == 2048
    assert ours.padding_side == "right"
    assert list(ours("a")) == ["input_ids", "attention_mask"]
    assert ours.is_fast


@pytest.mark.parametrize("text", TEXTS)
def test_ids_equal_the_builtin_tokenizer(ours, builtin, text):
    assert dict(ours(text)) == {k: v for k, v in builtin(text).items() if k in ours.model_input_names}
    assert ours(text, add_special_tokens=False).input_ids == builtin(text, add_special_tokens=False).input_ids


@settings(max_examples=300)
@given(text=TEXT)
def test_ids_and_decoded_text_equal_the_builtin_on_random_unicode(text):
    ours, builtin = PerceiverIOTokenizer(), PerceiverTokenizer()
    ids = ours(text).input_ids
    assert ids == builtin(text).input_ids
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == builtin.decode(ids, skip_special_tokens=skip)
    assert ours.decode(ids[1:-1]) == text


@settings(max_examples=300)
@given(ids=st.lists(st.integers(0, 261)))
def test_any_bytes_decode_as_the_builtin_decodes_them(ids):
    """Broken UTF-8 included: both put U+FFFD where the bytes are none."""
    ours, builtin = PerceiverIOTokenizer(), PerceiverTokenizer()
    for skip in (True, False):
        assert ours.decode(ids, skip_special_tokens=skip) == builtin.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("truncation", [False, "only_first", "only_second"])
def test_pairs_equal_the_builtin(ours, builtin, pair, truncation):
    # Only the long pair, 40 + 25 + 3 tokens, is cut: by 8.
    limit = {"max_length": 60, "truncation": truncation} if truncation else {}
    assert ours(*pair, **limit).input_ids == builtin(*pair, **limit).input_ids


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize(
    "options",
    [
        {"padding": True},
        {"padding": "max_length", "max_length": 80},
        {"padding": True, "truncation": True, "max_length": 16},
        {"padding": True, "pad_to_multiple_of": 32},
        {"padding": "max_length", "truncation": True, "max_length": 16, "add_special_tokens": False},
    ],
    ids=str,
)
def test_batches_equal_the_builtin(ours, builtin, options, padding_side):
    got = ours(TEXTS, padding_side=padding_side, **options)
    expected = builtin(TEXTS, padding_side=padding_side, **options)
    assert got.input_ids == expected.input_ids
    assert got.attention_mask == expected.attention_mask


def test_special_tokens_mask_equals_the_builtin(ours, builtin):
    # The built-in marks only what it adds; a [MASK] in the text is text to both.
    for text in TEXTS:
        expected = builtin(text, return_special_tokens_mask=True)["special_tokens_mask"]
        assert ours(text, return_special_tokens_mask=True)["special_tokens_mask"] == expected


def test_the_two_known_differences_from_the_builtin_are_the_documented_ones(ours, builtin):
    # In 45,000 random comparisons 807 differed, all of them in one of these two.
    assert builtin("a", "").input_ids == [4, 103, 5, 5]
    assert ours("a", "").input_ids == [4, 103, 5]
    assert ours(["a"], [""]).input_ids == [[4, 103, 5, 5]]

    def kept(tokenizer, first: int, second: int, max_length: int) -> tuple[int, int]:
        ids = tokenizer("a" * first, "b" * second, truncation="longest_first", max_length=max_length).input_ids
        return ids.count(ord("a") + 6), ids.count(ord("b") + 6)

    # Three of 20 are specials, which leaves 17.
    assert kept(ours, 30, 31, 20) == (8, 9) and kept(builtin, 30, 31, 20) == (9, 8)
    # An even total, or one text short enough to be kept whole, leaves nothing to choose.
    assert kept(ours, 30, 31, 21) == kept(builtin, 30, 31, 21) == (9, 9)
    assert kept(ours, 5, 60, 20) == kept(builtin, 5, 60, 20) == (5, 12)


def test_offsets_of_each_byte_span_its_character(ours):
    text = "aé😀 [MASK]"
    encoding = ours(text, return_offsets_mapping=True)
    characters = [text[start:end] for start, end in encoding["offset_mapping"]]
    assert characters == ["", "a", "é", "é", "😀", "😀", "😀", "😀", " ", "[MASK]", ""]
    assert encoding.char_to_token(2) == 4
    assert [encoding.token_to_sequence(i) for i in (0, 1, 10)] == [None, 0, None]


@settings(max_examples=200)
@given(text=TEXT)
def test_offsets_cover_the_text_without_a_gap(text):
    spans = PerceiverIOTokenizer()(text, return_offsets_mapping=True)["offset_mapping"][1:-1]
    position = 0
    for previous, (start, end) in zip([(0, 0), *spans], spans, strict=False):
        assert (start, end) == previous or start == position
        position = end
    assert position == len(text)


@pytest.mark.parametrize("text", ["one", "two words", " a  b\tc\nd ", "é😀 x\u3000y z.", "\n\nlast one\n\n"])
def test_word_ids_count_the_words_between_white_space(ours, text):
    encoding = ours(text)
    words = encoding.word_ids()
    assert words[0] is None and words[-1] is None
    spans = [encoding.word_to_chars(word) for word in sorted(set(words[1:-1]))]
    assert [text[span.start : span.end].strip() for span in spans] == text.split()
    assert "".join(text[span.start : span.end] for span in spans) == text


def test_words_given_one_by_one_keep_their_numbers(ours, builtin):
    # Token classification aligns its labels so; " b c" stays the one word that it was given as.
    words = ["a", " b c", "é"]
    encoding = ours(words, is_split_into_words=True)
    assert encoding.word_ids() == [None, 0, 1, 1, 1, 1, 2, 2, None]
    assert encoding.input_ids == builtin(words, is_split_into_words=True).input_ids


def test_long_white_space_takes_no_longer_than_text(ours):
    # A pattern that tries again from every blank took 0.87 s for 20,000, so two minutes for these; ours 0.1 s.
    start = time.perf_counter()
    assert len(ours(" " * 250_000, verbose=False).input_ids) == 250_002
    assert time.perf_counter() - start < 10


def test_special_names_in_untrusted_text_can_be_read_as_text(ours):
    expected = [4, *encode_bytes("[MASK]").tolist(), 5]
    assert ours("[MASK]", split_special_tokens=True).input_ids == expected
    assert ours("[MASK]").input_ids == [4, 3, 5]


# Without [CLS] and [SEP]


def test_text_stands_alone_without_cls_and_sep():
    # As in DeepMind's notebook: the bytes, [MASK], nothing else.
    tokenizer = PerceiverIOTokenizer(add_cls_and_sep=False)
    assert tokenizer("a[MASK]").input_ids == [103, 3]
    assert tokenizer("a", "b").input_ids == [103, 104]
    assert tokenizer.num_special_tokens_to_add() == 0
    assert tokenizer("a", padding="max_length", max_length=3).input_ids == [103, 0, 0]


def test_cls_and_sep_can_be_switched_on_an_existing_tokenizer(tmp_path):
    tokenizer = PerceiverIOTokenizer()
    tokenizer.add_cls_and_sep = False
    assert tokenizer("a").input_ids == [103]
    tokenizer.save_pretrained(tmp_path)
    assert PerceiverIOTokenizer.from_pretrained(tmp_path)("a").input_ids == [103]
    tokenizer.add_cls_and_sep = True
    assert tokenizer("a").input_ids == [4, 103, 5]


def test_an_argument_outranks_what_was_saved(tmp_path):
    PerceiverIOTokenizer(add_cls_and_sep=False).save_pretrained(tmp_path)
    assert PerceiverIOTokenizer.from_pretrained(tmp_path, add_cls_and_sep=True)("a").input_ids == [4, 103, 5]
    PerceiverIOTokenizer().save_pretrained(tmp_path)
    assert PerceiverIOTokenizer.from_pretrained(tmp_path, add_cls_and_sep=False)("a").input_ids == [103]


# Saving and loading


@pytest.mark.parametrize("add_cls_and_sep", [True, False])
def test_saving_and_loading_keeps_everything(tmp_path, add_cls_and_sep):
    tokenizer = PerceiverIOTokenizer(add_cls_and_sep=add_cls_and_sep, model_max_length=64, cls_token="<my cls>")
    tokenizer.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    tokenizer.add_tokens(["word"])
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert type(loaded) is PerceiverIOTokenizer, f"{hf_perceiver.__name__} registers it"
    assert loaded.add_cls_and_sep == add_cls_and_sep
    assert loaded.model_max_length == 64
    assert loaded.cls_token_id == 4
    assert len(loaded) == 264
    texts = [*TEXTS, "a<extra>word <my cls>[CLS]"]
    assert loaded(texts).input_ids == tokenizer(texts).input_ids
    assert loaded.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()


@pytest.mark.medium
def test_autotokenizer_loads_it_in_a_process_without_this_package(tmp_path):
    """A user who only has transformers; the folder is a model's, whose model_type that transformers does not know."""
    variants = {"with": PerceiverIOTokenizer(), "without": PerceiverIOTokenizer(add_cls_and_sep=False)}
    variants["without"].add_special_tokens({"extra_special_tokens": ["<extra>"]})
    texts = [*TEXTS, "<extra>"]
    for name, tokenizer in variants.items():
        tokenizer.save_pretrained(tmp_path / name)
        (tmp_path / name / "config.json").write_text('{"model_type": "perceiver_io"}')
    script = """
import json, sys
sys.modules["hf_perceiver"] = None  # even where it is installed
from transformers import AutoTokenizer
folder, name, texts = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
result = {}
for name in ("with", "without"):
    tokenizer = AutoTokenizer.from_pretrained(f"{folder}/{name}")
    batch = tokenizer(texts, padding="max_length", truncation=True, max_length=24, return_offsets_mapping=True)
    result[name] = dict(batch) | {
        "words": [batch.word_ids(i) for i in range(len(texts))],
        "pair": tokenizer("a", "b").input_ids,
        "decoded": [tokenizer.decode(ids) for ids in batch["input_ids"]],
        "class": type(tokenizer).__name__,
        "size": [len(tokenizer), tokenizer.vocab_size, tokenizer.model_max_length],
        "mask": tokenizer.mask_token_id,
    }
print(json.dumps(result))
"""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    # NUL cannot travel in an argument, json writes it as \\u0000.
    arguments = [sys.executable, "-c", script, str(tmp_path), "-", json.dumps(texts)]
    run = subprocess.run(arguments, capture_output=True, text=True, env=environment, cwd=tmp_path, timeout=120)
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout.splitlines()[-1])

    for name, tokenizer in variants.items():
        got = result[name]
        batch = tokenizer(texts, padding="max_length", truncation=True, max_length=24, return_offsets_mapping=True)
        assert got["class"] == "TokenizersBackend"
        assert got["input_ids"] == batch["input_ids"]
        assert got["attention_mask"] == batch["attention_mask"]
        assert [[tuple(span) for span in row] for row in got["offset_mapping"]] == batch["offset_mapping"]
        assert got["words"] == [batch.word_ids(i) for i in range(len(texts))]
        assert got["pair"] == tokenizer("a", "b").input_ids
        assert got["decoded"] == tokenizer.batch_decode(batch["input_ids"])
        assert got["size"] == [len(tokenizer), 262, 2048]
        assert got["mask"] == 3


def test_a_saved_builtin_tokenizer_loads_as_ours(tmp_path, ours):
    """A folder of the built-in has no tokenizer.json; tokens that a user added come along."""
    builtin = PerceiverTokenizer(model_max_length=512)
    builtin.add_special_tokens({"extra_special_tokens": ["<extra>"]})
    builtin.add_tokens(["word"])
    builtin.save_pretrained(tmp_path)
    loaded = PerceiverIOTokenizer.from_pretrained(tmp_path)
    assert len(loaded) == len(builtin) == 264
    assert loaded.model_max_length == 512
    text = "a<extra> word[MASK]"
    assert loaded(text).input_ids == builtin(text).input_ids


def test_it_travels_to_worker_processes(ours):
    assert pickle.loads(pickle.dumps(ours))(TEXTS).input_ids == ours(TEXTS).input_ids


# More tokens


def test_added_tokens_follow_the_bytes():
    tokenizer = PerceiverIOTokenizer()
    assert tokenizer.add_special_tokens({"extra_special_tokens": ["<a>", "<b>"]}) == 2
    assert tokenizer.add_tokens(["word"]) == 1
    # What model.resize_token_embeddings(len(tokenizer)) needs; the ids of the bytes stay.
    assert len(tokenizer) == 265
    assert tokenizer("x<b>word").input_ids == [4, ord("x") + 6, 263, 264, 5]
    assert tokenizer.decode([262, 126, 264], skip_special_tokens=True) == "xword"


def test_a_new_cls_token_counts_at_once_and_after_loading(tmp_path):
    tokenizer = PerceiverIOTokenizer()
    tokenizer.add_special_tokens({"cls_token": "<new>"})
    tokenizer.save_pretrained(tmp_path)
    assert tokenizer("a").input_ids == PerceiverIOTokenizer.from_pretrained(tmp_path)("a").input_ids == [262, 103, 5]


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"vocab": {"a": 0}}, "another tokenizer's vocabulary; load it with AutoTokenizer"),
        ({"merges": [("a", "b")]}, "1 merges: a byte tokenizer has none"),
        ({"pad_token": "a"}, "261 entries instead of 262"),
        ({"pad_token": "[CLS]"}, "261 entries instead of 262"),
        ({"cls_token": None}, "cls_token=None .* set add_cls_and_sep=False"),
        ({"add_bos_token": True}, "add_bos_token=True .* leave them out"),
    ],
    ids=str,
)
def test_what_is_no_byte_tokenizer_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        PerceiverIOTokenizer(**arguments)


def test_another_models_file_is_refused(tmp_path):
    other = PerceiverIOTokenizer().backend_tokenizer
    state = json.loads(other.to_str())
    state["model"]["vocab"] = {"a": 0, "b": 1}
    state["added_tokens"] = []
    state["post_processor"] = None
    (tmp_path / "tokenizer.json").write_text(json.dumps(state))
    PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))  # it is a fine file for others
    with pytest.raises(ValueError, match="another tokenizer's vocabulary"):
        PerceiverIOTokenizer.from_pretrained(tmp_path)


def test_a_token_without_a_name_keeps_its_id():
    tokenizer = PerceiverIOTokenizer(bos_token=None)
    assert tokenizer.bos_token is None
    assert tokenizer("a[MASK]").input_ids == [4, 103, 3, 5]


# encode_bytes, decode_bytes


@pytest.mark.parametrize("text", TEXTS)
def test_encode_bytes_gives_the_tokenizers_ids_of_plain_text(ours, text):
    ids = encode_bytes(text)
    assert ids.dtype == np.int64 and ids.shape == (len(text.encode()),)
    assert ids.tolist() == ours(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert encode_bytes(text.encode()).tolist() == ids.tolist()
    assert decode_bytes(ids) == text


def test_encode_bytes_result_can_be_written_to():
    ids = encode_bytes(b"ab")
    ids[0] = 3
    assert ids.tolist() == [3, 104]


def test_decode_bytes_leaves_out_specials_and_replaces_broken_utf8():
    assert decode_bytes([4, 103, 3, 104, 5, 0, 0]) == "ab"
    assert decode_bytes(encode_bytes(b"a\xffb")) == "a\ufffdb"
    assert decode_bytes([]) == ""
    assert decode_bytes(torch.tensor([103])) == "a"


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([103, 262], "id 262 is not in 0 to 261; .*tokenizer's decode"),
        ([-100, 103], "id -100 is not in 0 to 261"),
        ([[103]], r"shape \(1, 1\).*integers of one text"),
        ([1.5], "float64; give integers"),
    ],
)
def test_decode_bytes_refuses_what_is_no_id(ids, message):
    with pytest.raises(ValueError, match=message):
        decode_bytes(ids)


def test_encode_bytes_refuses_what_utf8_cannot_express():
    with pytest.raises(ValueError, match=r"'\\ud800' at position 2 .*errors=\"replace\""):
        encode_bytes("ab\ud800")
    with pytest.raises(ValueError, match="cannot encode a list"):
        encode_bytes(["a"])
