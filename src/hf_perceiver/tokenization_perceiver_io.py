"""Text <-> ids, one per UTF-8 byte: the tokenizer, and two functions for data in bulk."""

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import TokenizersBackend

# In the order of their ids; byte b has the id b + 6.
SPECIAL_TOKENS = ("[PAD]", "[BOS]", "[EOS]", "[MASK]", "[CLS]", "[SEP]")
NUM_SPECIAL_TOKENS = len(SPECIAL_TOKENS)
VOCAB_SIZE = NUM_SPECIAL_TOKENS + 256

# A word takes along the white space before it, the last one also what follows. Without the branch for nothing but white
# space, a long run of blanks would be tried from each of its characters, for two minutes on 250,000.
_WORD = r"\s*\S+(?:\s+\z)?|\s+\z"


def _byte_characters() -> list[str]:
    """The 256 characters that stand for the bytes in a `tokenizers` vocabulary.

    Printable bytes of Latin-1 stand for themselves, the others for U+0100 onwards in order, as GPT-2 began it.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    stand_ins = iter(range(0x100, 0x200))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


class PerceiverIOTokenizer(TokenizersBackend):
    """Text -> [CLS], one id per UTF-8 byte (byte + 6), [SEP]; a pair is [CLS] first [SEP] second [SEP].

    The ids are those of transformers' `PerceiverTokenizer`; a fast tokenizer has offsets and word ids besides. What it
    saves loads through `AutoTokenizer` without this package as well, with the same ids.

    `add_cls_and_sep=False` leaves text without special tokens, as DeepMind's notebook does; it is saved with the
    tokenizer, and can be set on one that exists. `add_special_tokens=False` does the same for one call.

    Each byte of a character has the whole character's offsets. A word (`word_ids`) ends before white space, which
    belongs to the word after it; transformers' whole-word collator looks for gaps between offsets: bytes have none.
    With `is_split_into_words=True` words are joined without a blank: begin them with one where the model should see it.
    The token-classification pipeline's "first", "average" and "max" know words by the blank before them: they cut one
    that begins with a character of several bytes within that character. "none" and "simple" do not look for words.

    Two differences from `PerceiverTokenizer`: a pair whose second text is "" is a single text (unless it comes in a
    batch); and where `longest_first` cuts both texts of a pair to an odd total, the second keeps one byte more, not the
    first. `vocab_size` is 262 like `len`, not 256, and tokens as strings are written as GPT-2 writes bytes.
    """

    model_input_names = ["input_ids", "attention_mask"]
    model = BPE

    def __init__(
        self,
        vocab: dict[str, int] | None = None,
        merges: list | None = None,
        pad_token: str | AddedToken = "[PAD]",
        bos_token: str | AddedToken = "[BOS]",
        eos_token: str | AddedToken = "[EOS]",
        mask_token: str | AddedToken = "[MASK]",
        cls_token: str | AddedToken = "[CLS]",
        sep_token: str | AddedToken = "[SEP]",
        model_max_length: int = 2048,
        add_cls_and_sep: bool = True,
        **kwargs,
    ):
        """`vocab` and `merges` come from a saved tokenizer.json; without them the vocabulary is made here."""
        if vocab is None:
            specials = (pad_token, bos_token, eos_token, mask_token, cls_token, sep_token)
            # A token that is None still has its id: the embeddings of a checkpoint are counted so.
            names = [str(token or default) for token, default in zip(specials, SPECIAL_TOKENS, strict=True)]
            vocab = {name: i for i, name in enumerate(names)}
            vocab |= {character: byte + NUM_SPECIAL_TOKENS for byte, character in enumerate(BYTE_CHARACTERS)}
        _check_vocabulary(vocab, merges)

        self._tokenizer = Tokenizer(BPE(vocab=vocab, merges=[]))
        self._tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(_WORD), behavior="isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        )
        self._tokenizer.decoder = decoders.ByteLevel()

        self._add_cls_and_sep = add_cls_and_sep
        super().__init__(
            pad_token=pad_token,
            bos_token=bos_token,
            eos_token=eos_token,
            mask_token=mask_token,
            cls_token=cls_token,
            sep_token=sep_token,
            model_max_length=model_max_length,
            add_cls_and_sep=add_cls_and_sep,
            **kwargs,
        )
        # Not left to a file: an argument given to from_pretrained outranks what was saved.
        self.update_post_processor()

    @property
    def add_cls_and_sep(self) -> bool:
        return self._add_cls_and_sep

    @add_cls_and_sep.setter
    def add_cls_and_sep(self, value: bool) -> None:
        self._add_cls_and_sep = value
        self.init_kwargs["add_cls_and_sep"] = value
        self.update_post_processor()

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """Tokens -> their text; words among them, as the token-classification pipeline joins them, stay as they are."""
        # A byte's stand-in is one character: "ü" as a word would be read as the byte 0xFC.
        if any(self._tokenizer.token_to_id(token) is None for token in tokens):
            return "".join(tokens)
        return super().convert_tokens_to_string(tokens)

    def add_special_tokens(self, *args, **kwargs) -> int:
        added = super().add_special_tokens(*args, **kwargs)
        # A new [CLS] or [SEP] counts at once, as it does after saving and loading.
        self.update_post_processor()
        return added

    def update_post_processor(self) -> None:
        """Puts [CLS] and [SEP], as they are now called, around what is encoded from now on."""
        if self.add_bos_token or self.add_eos_token:
            raise ValueError(
                f"add_bos_token={self.add_bos_token} and add_eos_token={self.add_eos_token} have no place here: "
                "text stands between [CLS] and [SEP], or alone (add_cls_and_sep=False); leave them out"
            )
        if not self._add_cls_and_sep:
            single, pair, tokens = ["$A:0"], ["$A:0", "$B:1"], []
        elif self.cls_token is None or self.sep_token is None:
            raise ValueError(
                f"cls_token={self.cls_token!r} and sep_token={self.sep_token!r} cannot be put around a text; "
                "name both, or set add_cls_and_sep=False"
            )
        else:
            single = [f"{self.cls_token}:0", "$A:0", f"{self.sep_token}:0"]
            pair = [*single, "$B:1", f"{self.sep_token}:1"]
            tokens = [(self.cls_token, self.cls_token_id), (self.sep_token, self.sep_token_id)]
        self._tokenizer.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=tokens)


def _check_vocabulary(vocab: dict[str, int], merges: list | None) -> None:
    if merges:
        raise ValueError(f"{len(merges)} merges: a byte tokenizer has none; load this file with AutoTokenizer")
    for byte, character in enumerate(BYTE_CHARACTERS):
        if vocab.get(character) != byte + NUM_SPECIAL_TOKENS:
            raise ValueError(
                f"byte {byte} ({character!r}) has the id {vocab.get(character)}, not {byte + NUM_SPECIAL_TOKENS}: "
                "this is another tokenizer's vocabulary; load it with AutoTokenizer"
            )
    if sorted(vocab.values()) != list(range(VOCAB_SIZE)):
        raise ValueError(
            f"{len(vocab)} entries instead of {VOCAB_SIZE}: ids 0 to {NUM_SPECIAL_TOKENS - 1} belong to six special "
            "tokens, each of its own name; further tokens come with add_tokens or add_special_tokens"
        )


def encode_bytes(text: str | bytes) -> np.ndarray:
    """Text or UTF-8 bytes -> (n,) int64 ids, one per byte, without special tokens.

    Hundreds of times as fast as the tokenizer. A special token's name in the text is text like any other.
    Raises ValueError for a lone surrogate, which UTF-8 cannot express.
    """
    if isinstance(text, str):
        try:
            text = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise ValueError(
                f"character {text[error.start]!r} at position {error.start} has no UTF-8 form; "
                'remove it, or give bytes: text.encode("utf-8", errors="replace")'
            ) from error
    elif not isinstance(text, bytes | bytearray | memoryview):
        raise ValueError(f"cannot encode a {type(text).__name__}; give a str or bytes, one text at a time")
    return np.frombuffer(text, dtype=np.uint8).astype(np.int64) + NUM_SPECIAL_TOKENS


def decode_bytes(ids) -> str:
    """(n,) ids, an array, tensor or list -> text. Special tokens are left out, broken UTF-8 becomes U+FFFD.

    Raises ValueError for ids outside of 0 to 261, added tokens among them: the tokenizer's `decode` knows those.
    """
    ids = np.asarray(ids)
    if ids.size == 0:
        return ""
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise ValueError(f"ids of shape {ids.shape} and type {ids.dtype}; give integers of one text, (n,)")
    outside = ids[(ids < 0) | (ids >= VOCAB_SIZE)]
    if outside.size:
        raise ValueError(f"id {outside[0]} is not in 0 to {VOCAB_SIZE - 1}; added tokens need the tokenizer's decode")
    text = (ids[ids >= NUM_SPECIAL_TOKENS] - NUM_SPECIAL_TOKENS).astype(np.uint8).tobytes()
    return text.decode("utf-8", errors="replace")
