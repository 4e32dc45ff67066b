"""Train or go on training a masked language model with Perceiver IO's recipe, on bytes or with any fast tokenizer.

    python -m hf_perceiver.training.mlm --architecture language_bytes --train_files DIR --output_dir OUT
    python -m hf_perceiver.training.mlm --architecture language_sentencepiece --tokenizer NAME --train_files DIR ...
    python -m hf_perceiver.training.mlm --model bundled:language --dataset documentation --output_dir OUT
    python -m hf_perceiver.training.mlm --smoke_test --output_dir OUT

Each word of white space is masked with probability 0.15, the same for bytes and pieces; documents follow one another in
rows of 2,048 bytes or 512 pieces. LAMB at 1.25e-3 with weight decay 0.01 rises for 1,000 steps and falls as a cosine over
500,000; the paper's batch is 2,048 rows. What is written is a folder for `pipeline("fill-mask", OUT)`.
Source: Perceiver IO, 4.1 and F.3. It states neither clipping nor what replaces a masked word: here Trainer's norm of 1 and
BERT's 80/10/10.
"""

import functools
import itertools
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset, Sampler
from tqdm import tqdm
from transformers import AutoTokenizer, EvalPrediction, TrainerCallback

from ..configuration_perceiver_io import PerceiverIOConfig
from ..heads_text import PerceiverIOForMaskedLM
from ..losses import IGNORED
from ..tokenization_perceiver_io import VOCAB_SIZE, PerceiverIOTokenizer
from .documentation import read_documentation, split_documents, standard_library_strings, unique_documents
from .recipe import (
    ModelArguments,
    RecipeArguments,
    RecipeTrainer,
    fresh_config,
    model_folder,
    open_model,
    parse,
    run,
    start,
)
from .text_data import (
    Document,
    Encoder,
    EpochSampler,
    Packing,
    Per,
    TextStream,
    TextWindows,
    Undecodable,
    Window,
    check_files,
    find_files,
    is_held_out,
    read_files,
    texts_of,
    windows,
)
from .whole_words import WholeWordMaskingCollator, is_byte_tokenizer

PAPER_BATCH, PAPER_STEPS = 2048, 500_000
SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "mask_token_id", "cls_token_id", "sep_token_id")
# Tokenizers that know no limit say so with a number like 1e30.
UNLIMITED = 10**9

# The number of a pass -> its documents, read anew.
Documents = Callable[[int], Iterator[Document]]

SMOKE_LENGTH, SMOKE_FILES = 128, 60
SMOKE_CONFIG: dict[str, Any] = {
    "num_latents": 16,
    "d_latents": 64,
    "num_self_attends_per_block": 2,
    "qk_channels": 64,
    "v_channels": 64,
    "decoder_qk_channels": 64,
    "decoder_v_channels": 64,
    "preprocessor": {
        "kind": "text",
        "channels": 64,
        "position": {"kind": "trainable", "num_positions": SMOKE_LENGTH, "channels": 64},
    },
    "output_query": {
        "kind": "position",
        "position": {"kind": "trainable", "num_positions": SMOKE_LENGTH, "channels": 64},
        "use_input_mask": True,
    },
}


@dataclass
class TextArguments:
    """The text, how it is cut into rows, and what is masked."""

    train_files: list[str] = field(
        default_factory=list,
        metadata={"help": "text files, folders (.txt, .md, .rst at any depth) or patterns ('books/**/*.txt')"},
    )
    validation_files: list[str] = field(
        default_factory=list, metadata={"help": "the same to measure on, instead of a share of the documents"}
    )
    dataset: Literal["documentation"] | None = field(
        default=None,
        metadata={"help": "documentation: the doc strings of Python's standard library, nothing to download"},
    )
    dataset_name: str | None = field(
        default=None, metadata={"help": "a data set on the Hub, or a folder of one; needs the package datasets"}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "which configuration of --dataset_name"})
    dataset_split: str = field(default="train", metadata={"help": "which split of --dataset_name"})
    text_column: str = field(default="text", metadata={"help": "the column of --dataset_name that holds the text"})
    documents: Per = field(
        default="file", metadata={"help": "what a document is: a file, a line, or a paragraph (up to an empty line)"}
    )
    undecodable: Undecodable = field(
        default="error",
        metadata={
            "help": "bytes that are no UTF-8: an error, U+FFFD in their place (replace), or as they are (keep; for byte "
            "tokenizers)"
        },
    )
    validation_share: float = field(
        default=0.02, metadata={"help": "share of the documents, chosen by their content, to measure on; 0 for none"}
    )
    validation_rows: int = field(default=1024, metadata={"help": "measure on at most so many rows"})
    streaming: bool = field(
        default=False, metadata={"help": "read while training, in bounded memory, instead of before it"}
    )
    shuffle_buffer: int = field(default=4096, metadata={"help": "rows that --streaming holds to mix them"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or name on the Hub; by default the model's own, of bytes where fresh"}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "tokens in a row, the special ones included; by default all the model reads"}
    )
    packing: Packing = field(
        default="pack",
        metadata={
            "help": "pack: documents one after the other, no padding; split: each in rows of its own; truncate: the "
            "beginning of each"
        },
    )
    mlm_probability: float = field(default=0.15, metadata={"help": "probability with which a word is masked"})
    mask_share: float = field(default=0.8, metadata={"help": "share of the masked words that become mask tokens"})
    random_share: float = field(
        default=0.1, metadata={"help": "share that become random tokens; the rest stays as it is"}
    )
    only_masked: bool = field(
        default=True, metadata={"help": "decode masked tokens alone: the same loss for less work and memory"}
    )

    def __post_init__(self) -> None:
        if sum(map(bool, (self.train_files, self.dataset, self.dataset_name))) > 1:
            raise ValueError("give one of --train_files, --dataset and --dataset_name")
        if self.validation_files and self.dataset:
            raise ValueError(f"--dataset {self.dataset} has a held-out part of its own; leave --validation_files out")
        if not 0 <= self.validation_share < 1:
            raise ValueError(f"validation_share={self.validation_share} is a share of the documents, from 0 to below 1")
        if self.validation_rows < 1:
            raise ValueError(
                f"validation_rows={self.validation_rows} must be at least 1; --validation_share 0 for none"
            )


@dataclass
class MLMTraining(RecipeArguments):
    """RecipeArguments with the paper's recipe for masked language models."""

    learning_rate: float = field(default=1.25e-3, metadata={"help": "the highest learning rate"})
    warmup_steps: float = field(default=1000, metadata={"help": "steps (below 1: share of them) of linear warm-up"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay, not on biases and norms"})
    adam_epsilon: float = field(default=1e-6, metadata={"help": "epsilon of the optimizer, as in DeepMind's LAMB"})
    batch_size: int | None = field(
        default=None,
        metadata={
            "help": "rows per step over all devices, in parts of per_device_train_batch_size; by default the paper's "
            f"{PAPER_BATCH:,}, unless gradient_accumulation_steps is given"
        },
    )
    per_device_train_batch_size: int = field(default=16, metadata={"help": "rows that a device has in memory"})
    per_device_eval_batch_size: int = field(default=16, metadata={"help": "the same when measuring"})
    max_steps: int = field(
        default=-1,
        metadata={"help": f"steps; by default the paper's {PAPER_STEPS:,}, unless num_train_epochs is given"},
    )
    num_train_epochs: float = field(default=0.0, metadata={"help": "passes over the data, instead of max_steps"})
    eval_strategy: str = field(default="steps", metadata={"help": "when to measure: no, steps or epoch"})
    eval_steps: float | None = field(default=1000, metadata={"help": "steps between two measurements"})
    save_steps: float = field(default=1000, metadata={"help": "steps between two checkpoints"})
    batch_eval_metrics: bool = field(
        default=True, metadata={"help": "sum up while measuring, so that memory does not grow with the data"}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay False: the masks need columns that the model does not read"}
    )

    def __post_init__(self) -> None:
        accumulated = self.gradient_accumulation_steps != 1
        if self.smoke_test:
            self.batch_size, self.eval_steps = 4, 3
        elif self.max_steps <= 0 and self.num_train_epochs <= 0:
            self.max_steps = PAPER_STEPS
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns would take the words and numbers of rows away; leave it False")
        super().__post_init__()
        if self.batch_size is None and accumulated:
            return
        together = self.train_batch_size * self.world_size
        self.batch_size = self.batch_size or max(PAPER_BATCH // together, 1) * together
        if self.batch_size % together:
            raise ValueError(
                f"batch_size={self.batch_size} cannot be made of parts of {together} rows (per_device_train_batch_size="
                f"{self.per_device_train_batch_size} on {self.world_size} process(es)); choose a multiple"
            )
        self.gradient_accumulation_steps = self.batch_size // together


class MLMTrainer(RecipeTrainer):
    """RecipeTrainer whose rows and masks depend on the seed and the epoch alone, so that a resumed run has the same."""

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        if not isinstance(rows, TextWindows):
            return super()._get_train_sampler(train_dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler = EpochSampler(len(rows), seed)
        self.add_callback(_TellEpoch(sampler))
        return sampler


class _TellEpoch(TrainerCallback):
    # Accelerate tells a sampler its epoch too, but not every one: not that of several processes in a resumed run.
    def __init__(self, sampler: EpochSampler):
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sampler.epoch = int((state.epoch or 0) + 1e-6)


class MaskedMetrics:
    """Sums over batches -> `loss`, the mean over all masked tokens, `perplexity`, its exponential, and `masked_accuracy`.

    For Trainer with batch_eval_metrics, after `score_rows`. Per token: of bytes and of pieces they do not compare.
    """

    def __init__(self) -> None:
        self.sums = np.zeros(3)

    def __call__(self, batch: EvalPrediction, compute_result: bool = True) -> dict[str, float]:
        rows = batch.predictions.cpu().numpy() if isinstance(batch.predictions, Tensor) else batch.predictions
        self.sums += rows.astype(np.float64).sum(0)
        if not compute_result:
            return {}
        (surprise, right, count), self.sums = self.sums.tolist(), np.zeros(3)
        loss = surprise / max(count, 1)
        return {"loss": loss, "perplexity": float(np.exp(loss)), "masked_accuracy": right / max(count, 1)}


def score_rows(logits: Any, labels: Tensor) -> Tensor:
    """Logits (B, n, V) and labels (B, n) -> (B, 3): sum of the cross-entropy, right tokens and all, of the masked ones."""
    logits = logits[0] if isinstance(logits, tuple) else logits
    known = labels != IGNORED
    surprise = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == labels) & known
    return torch.stack([surprise.reshape(labels.shape).sum(1), right.sum(1).float(), known.sum(1).float()], dim=1)


def train(
    models: ModelArguments,
    texts: TextArguments,
    training: MLMTraining,
    *,
    documents: Iterable[Any] | None = None,
    validation_documents: Iterable[Any] | None = None,
) -> dict[str, float]:
    """Train, measure, and write the model, its tokenizer, metrics.json and learning_curve.csv -> the metrics

    documents, validation_documents: text from elsewhere, in place of what `texts` names: strings, or dicts with them in
    `text_column`, such as a data set or a stream of the package `datasets`.
    Raises ValueError before training for data, tokenizers, models and lengths that do not fit.
    """
    resume = start(training)
    if training.smoke_test:
        models, texts = smoke(models, texts, documents is not None)
    tokenizer = open_tokenizer(models, texts.tokenizer)
    collator = WholeWordMaskingCollator(
        tokenizer,
        texts.mlm_probability,
        mask_share=texts.mask_share,
        random_share=texts.random_share,
        seed=training.seed,
        only_masked=texts.only_masked,
    )
    encoder = Encoder(tokenizer)
    source = open_source(texts, tokenizer, documents, validation_documents, small=training.smoke_test)
    model = open_language_model(models, tokenizer, own=texts.tokenizer is None)
    length = row_length(model.config, tokenizer, texts.max_length)
    if models.architecture:
        # What is saved cuts texts to what the model reads.
        tokenizer.model_max_length = min(tokenizer.model_max_length, num_positions(model.config) or length)
    check_rows(model, collator, encoder, length)
    train_rows, validation = read_rows(source, encoder, length, texts, training)
    if validation is None:
        training.eval_strategy = "no"
    if isinstance(train_rows, TextStream):
        # The other way, the first process sends rows to all, wants batches of one shape, whose masked tokens differ.
        training.accelerator_config.dispatch_batches = False
    trainer = MLMTrainer(
        model,
        args=training,
        train_dataset=train_rows,
        eval_dataset=validation,
        data_collator=collator,
        processing_class=tokenizer,
        compute_metrics=MaskedMetrics(),
        preprocess_logits_for_metrics=score_rows,
    )
    return run(trainer, resume)


def smoke(models: ModelArguments, texts: TextArguments, given: bool) -> tuple[ModelArguments, TextArguments]:
    """A tiny model and a little text where none is named."""
    if not models.model and not models.architecture:
        models = replace(models, architecture="language_bytes", config_overrides=json.dumps(SMOKE_CONFIG))
    if not given and not (texts.train_files or texts.dataset or texts.dataset_name):
        texts = replace(texts, dataset="documentation")
    return models, replace(texts, validation_rows=min(texts.validation_rows, 16))


# Models and tokenizers


def open_tokenizer(models: ModelArguments, name: str | None) -> Any:
    """The tokenizer that is named, or the model's own; of bytes for a fresh model of their vocabulary.

    Raises ValueError where there is none, and for a model that is not named at all.
    """
    if name or models.model:
        own = {} if name else {"revision": models.revision, "trust_remote_code": models.trust_remote_code}
        try:
            return AutoTokenizer.from_pretrained(model_folder(name or models.model or ""), **own)
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(
                f"no tokenizer could be loaded from {name or models.model} ({error}); give --tokenizer"
            ) from error
    if not models.architecture:
        raise ValueError("give --model to go on with trained weights, or --architecture for fresh ones")
    config = fresh_config(models.architecture, models.config_overrides)
    if config.vocab_size != VOCAB_SIZE:
        raise ValueError(
            f"{models.architecture} has a vocabulary of {config.vocab_size:,}, whose tokenizer was not released; give one "
            "with --tokenizer, and the model is made for its vocabulary"
        )
    return PerceiverIOTokenizer(model_max_length=num_positions(config) or 2048)


def open_language_model(models: ModelArguments, tokenizer: Any, *, own: bool = False) -> PerceiverIOForMaskedLM:
    """A masked language model that fits the tokenizer: a fresh one is made for it, a trained one must have it already.

    own: the tokenizer came with the model.
    Raises ValueError, with both sizes, for a trained model of another vocabulary.
    """
    config: dict[str, Any] = {}
    if models.architecture:
        config = {name: getattr(tokenizer, name, None) for name in SPECIAL_IDS}
        if "vocab_size" not in json.loads(models.config_overrides or "{}"):
            config["vocab_size"] = len(tokenizer)
    model = open_model(PerceiverIOForMaskedLM, models, **config)
    size, known = model.config.vocab_size, len(tokenizer)
    # Some pad their embeddings; a tokenizer from elsewhere must be the very same.
    fits = known <= size if own or models.architecture else known == size
    if not fits:
        raise ValueError(
            f"the tokenizer has a vocabulary of {known:,} tokens, the model one of {size:,}: leave --tokenizer out to take "
            "the model's own, or train a fresh --architecture, which is made for its tokenizer"
        )
    if models.model and not own:
        check_same_vocabulary(models, tokenizer)
    return model


def check_same_vocabulary(models: ModelArguments, tokenizer: Any) -> None:
    """Raise ValueError if the model has a tokenizer of its own that gives its ids to other tokens."""
    try:
        own = open_tokenizer(models, None)
    except ValueError:
        return  # none to compare with
    there, here = own.get_vocab(), tokenizer.get_vocab()
    other = sorted(token for token in here if there.get(token) != here[token])
    if other:
        raise ValueError(
            f"{len(other):,} of the tokenizer's {len(here):,} tokens have another id in {models.model}'s own ({other[0]!r}: "
            f"{here[other[0]]} and {there.get(other[0])}): leave --tokenizer out, or train a fresh --architecture"
        )


def num_positions(config: PerceiverIOConfig) -> int | None:
    """How many tokens the model has positions for, None where its config does not tell."""
    position = config.preprocessor.get("position") or {}
    found = position.get("num_positions") or position.get("max_resolution")
    return int(found[0]) if isinstance(found, list) else found


def row_length(config: PerceiverIOConfig, tokenizer: Any, wanted: int | None) -> int:
    """`wanted`, or all that the model has positions for, or what the tokenizer says."""
    if wanted is not None:
        return wanted
    known = num_positions(config) or tokenizer.model_max_length
    if known > UNLIMITED:
        raise ValueError("neither the model nor the tokenizer says how many tokens a row may have; give --max_length")
    return int(known)


@torch.no_grad()
def check_rows(
    model: PerceiverIOForMaskedLM, collator: WholeWordMaskingCollator, encoder: Encoder, length: int
) -> None:
    """Raise ValueError if the model cannot read and answer a full row, masked as training masks it."""
    room = encoder.room(length)
    # The highest ids first; each token is a word.
    ids = np.resize(collator.ordinary[::-1], room).astype(encoder.dtype)
    window = Window(ids, None if encoder.of_bytes else np.arange(room, dtype=np.int32))
    was = model.training
    try:
        batch = collator([encoder.row(window, 0)])
        model.eval()(**{name: tensor.to(model.device) for name, tensor in batch.items()})
    except (ValueError, IndexError, RuntimeError) as error:
        more = "; a model that cannot be asked at points needs --no_only_masked" if collator.only_masked else ""
        raise ValueError(f"the model does not take rows of max_length={length} tokens: {error}{more}") from error
    finally:
        model.train(was)


# Text


@dataclass
class Source:
    """Where documents come from; validation None: a share of those to train on is held out."""

    train: Documents
    validation: Documents | None = None


def open_source(
    texts: TextArguments,
    tokenizer: Any,
    documents: Iterable[Any] | None = None,
    validation_documents: Iterable[Any] | None = None,
    *,
    small: bool = False,
) -> Source:
    """The text that `texts` names, or the given documents.

    small: the documentation of a few files alone. Raises ValueError for what cannot be read.
    """
    if texts.undecodable == "keep" and not is_byte_tokenizer(tokenizer):
        raise ValueError(
            f"undecodable='keep' needs a tokenizer of bytes, and {type(tokenizer).__name__} reads characters; take 'replace'"
        )
    if documents is not None:
        return Source(
            _again(documents, texts), None if validation_documents is None else _again(validation_documents, texts)
        )
    if texts.dataset == "documentation":
        held_in, held_out = documentation_texts(small)
        return Source(_again(held_in, texts), _again(held_out, texts))
    if texts.dataset_name:
        rows = load_named(texts)
        validation = _files(texts.validation_files, texts) if texts.validation_files else None
        return Source(_again(rows, texts), validation)
    if not texts.train_files:
        raise ValueError("there is no text: give --train_files, --dataset documentation, or --dataset_name")
    return Source(
        _files(texts.train_files, texts), _files(texts.validation_files, texts) if texts.validation_files else None
    )


def documentation_texts(small: bool = False) -> tuple[list[str], list[str]]:
    """The standard library's documentation, (train, held out); small: of its first files alone."""
    print("reading the documentation of Python's standard library ...", flush=True)
    if small:
        few = itertools.islice(standard_library_strings(), SMOKE_FILES)
        train_part, held_out = split_documents(list(unique_documents(few)), 0.1)
    else:
        found = read_documentation(packages=())
        train_part, held_out = found.train, found.held_out
    return [d.text for d in train_part], [d.text for d in held_out]


def load_named(texts: TextArguments) -> Iterable[Any]:
    """The rows of --dataset_name. Raises ValueError without the package `datasets`."""
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise ValueError(
            f"--dataset_name {texts.dataset_name} needs the package datasets: pip install datasets; text files need "
            "nothing: --train_files"
        ) from error
    return load_dataset(texts.dataset_name, texts.dataset_config, split=texts.dataset_split, streaming=texts.streaming)


def read_rows(
    source: Source, encoder: Encoder, length: int, texts: TextArguments, training: MLMTraining
) -> tuple[TextWindows | TextStream | None, TextWindows | None]:
    """Rows to train on (None with --no_do_train) and to measure on (None where nothing is held out).

    Raises ValueError where either would be empty, and for a schedule that does not fit the data.
    """
    share = texts.validation_share if source.validation is None else 0.0
    train_documents = functools.partial(_side, source.train, share, False)
    held_out = functools.partial(_side, source.train, share, True) if share else source.validation
    validation = None
    if held_out is not None:
        made = windows(_progress(held_out(0), "reading what is held out"), encoder, length, texts.packing)
        validation = TextWindows(itertools.islice(made, texts.validation_rows), encoder)
        if not len(validation):
            raise ValueError(_nothing_held_out(share))
    elif not training.do_train:
        raise ValueError("there is nothing to measure on: give --validation_files, or a --validation_share above 0")
    if not training.do_train:
        return None, validation
    if texts.streaming:
        check_schedule(training, None)
        stream = TextStream(
            train_documents,
            encoder,
            length,
            packing=texts.packing,
            buffer=texts.shuffle_buffer,
            seed=training.seed,
        )
        if next(windows(train_documents(0), encoder, length, texts.packing), None) is None:
            raise ValueError(_nothing_to_train_on(share))
        return stream, validation
    made = windows(_progress(train_documents(0), "reading"), encoder, length, texts.packing)
    rows = TextWindows(made, encoder)
    if not len(rows):
        raise ValueError(_nothing_to_train_on(share))
    held = f", {validation.num_tokens:,} held out" if validation is not None else ""
    print(f"{rows.num_tokens:,} tokens to train on in {len(rows):,} rows of up to {length}{held}", flush=True)
    check_schedule(training, len(rows))
    return rows, validation


def check_schedule(training: MLMTraining, rows: int | None) -> None:
    """Raise ValueError for epochs of a stream, and for a warm-up that is as long as the run. rows: None for a stream."""
    steps = training.max_steps
    if steps <= 0:
        if rows is None:
            raise ValueError("a stream has no end, and so no epochs: give --max_steps instead of --num_train_epochs")
        together = training.train_batch_size * training.world_size
        batches = -(-rows // together)
        steps = int(max(batches // training.gradient_accumulation_steps, 1) * training.num_train_epochs)
    if training.do_train and training.get_warmup_steps(steps) >= max(steps, 1):
        raise ValueError(
            f"warmup_steps={training.warmup_steps:g} is no less than the run's {steps} steps: the learning rate would never "
            "be reached; give a lower one, or a share (--warmup_steps 0.05), or more steps (a smaller --batch_size makes "
            "more of each epoch)"
        )


# Functions of the module, not within others: a stream is sent to the workers that read it.


def _side(documents: Documents, share: float, held_out: bool, turn: int) -> Iterator[Document]:
    return (d for d in documents(turn) if is_held_out(d, share) == held_out)


def _files(places: list[str], texts: TextArguments) -> Documents:
    paths = find_files(places)
    if texts.streaming:
        check_files(paths, texts.undecodable)
    return functools.partial(_read_files, paths, texts)


def _read_files(paths: list[Path], texts: TextArguments, turn: int) -> Iterator[Document]:
    # A stream's buffer mixes neighbours alone.
    order = np.random.default_rng(turn).permutation(len(paths)) if texts.streaming else range(len(paths))
    return read_files([paths[i] for i in order], texts.documents, texts.undecodable)


def _again(rows: Iterable[Any], texts: TextArguments) -> Documents:
    if isinstance(rows, Iterator):
        if texts.streaming:
            raise ValueError(
                "a generator can be gone through once, and a stream is gone through again and again; give something whose "
                "iter() begins anew, a list or a data set, or leave streaming out"
            )
        rows = list(rows)
    return functools.partial(_read_rows, rows, texts.text_column)


def _read_rows(rows: Iterable[Any], column: str, turn: int) -> Iterator[Document]:
    return texts_of(rows, column)


def _progress(documents: Iterable[Document], what: str) -> Iterator[Document]:
    return iter(tqdm(documents, desc=what, unit=" documents", delay=3))


def _nothing_held_out(share: float) -> str:
    if not share:
        return "what is named to measure on holds no text"
    return (
        f"validation_share={share:g} of the documents is none of these; make documents smaller (--documents paragraph or "
        "line), hold out more, name --validation_files, or do without: --validation_share 0"
    )


def _nothing_to_train_on(share: float) -> str:
    left = f" beside the {share:.0%} held out" if share else ""
    return (
        f"the data hold no text to train on{left}: no document with a word in it; name other files, or make documents "
        "smaller (--documents paragraph or line)"
    )


def main(arguments: list[str] | None = None) -> dict[str, float]:
    models, texts, training = parse((ModelArguments, TextArguments, MLMTraining), arguments, __doc__.split("\n")[0])
    return train(models, texts, training)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
