"""Fast tokenizers of about a hundred pieces, trained on a few sentences: none of them is on this machine otherwise."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

TEXT = (
    "A word stands between white space, its punctuation included; Grüße aus Köln, and 漢字 too.\n\tNext line (of two)!"
)
CORPUS = [TEXT, "white space and words, words and white space", "the quick brown fox's jumps over it; twice."] * 4
SPECIAL = {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>", "sep_token": "</s>", "cls_token": "<s>"}


def trained(kind: str, vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """A tokenizer of about 120 pieces: as SentencePiece (the blank in the piece), byte BPE, or WordPiece."""
    specials = list(SPECIAL.values())
    if kind == "unigram":
        raw = Tokenizer(models.Unigram())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=120, special_tokens=specials, unk_token="<unk>", show_progress=False
        )
    elif kind == "bpe":
        raw = Tokenizer(models.BPE())
        raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
        )
    else:
        raw = Tokenizer(models.WordPiece(unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # cuts at punctuation, as the rule does not
        trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=specials, show_progress=False)
    raw.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, **SPECIAL)
