"""What the recipes that fine-tune on text share: their options, tokenizer and lengths, class names, records of files."""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PretrainedConfig, PreTrainedModel, Trainer

from ..configuration_perceiver_io import PerceiverIOConfig
from ..tokenization_perceiver_io import VOCAB_SIZE, PerceiverIOTokenizer
from .recipe import BUNDLED, ModelArguments, RecipeArguments, model_folder
from .storage import write_text

# Ours, and transformers' built-in Perceiver, which loads directly.
MODEL_TYPES = ("perceiver_io", "perceiver")


@dataclass
class TextArguments:
    """Where the examples are, and how they become tokens."""

    train_file: str | None = field(default=None, metadata={"help": "examples to train on"})
    validation_file: str | None = field(default=None, metadata={"help": "examples to measure on"})
    test_file: str | None = field(default=None, metadata={"help": "examples to predict, into output_dir"})
    tokenizer: str | None = field(default=None, metadata={"help": "another tokenizer than the model's own"})
    max_length: int | None = field(
        default=None, metadata={"help": "tokens of a window; by default all that the model reads"}
    )

    def check(self, training: RecipeArguments) -> None:
        """Raise ValueError where a file that is needed is not named."""
        if training.do_train and not self.train_file and not training.smoke_test:
            raise ValueError("give --train_file, or --smoke_test for made-up data, or --no_do_train to measure only")


@dataclass
class FineTuning(RecipeArguments):
    """RecipeArguments with the paper's fine-tuning: LAMB's rate, warm-up and decay as for GLUE."""

    num_train_epochs: float = field(default=10.0, metadata={"help": "epochs"})
    learning_rate: float = field(
        default=5e-5, metadata={"help": "the paper tries 1e-4 to 1e-5 on GLUE; small models want more"}
    )
    per_device_train_batch_size: int = field(default=32, metadata={"help": "windows of a step"})
    warmup_steps: float = field(default=200, metadata={"help": "steps of linear warm-up; below 1, a share of them"})
    weight_decay: float = field(default=0.01, metadata={"help": "weight decay, not on biases and norms"})


def prepare_smoke_test(models: ModelArguments, training: RecipeArguments) -> None:
    """Let a smoke test start from the bundled language model, which needs no network."""
    if training.smoke_test and not (models.model or models.architecture):
        models.model = f"{BUNDLED}language"


def checkpoint_fields(models: ModelArguments) -> dict[str, Any]:
    """config.json of the model to start from, {} for fresh weights. Raises ValueError for another architecture."""
    if not models.model:
        return {}
    fields, _ = PretrainedConfig.get_config_dict(model_folder(models.model), revision=models.revision)
    if fields.get("model_type") not in MODEL_TYPES:
        raise ValueError(
            f"{models.model} is of model_type {fields.get('model_type')!r}, another architecture; start from one of "
            f"{' or '.join(MODEL_TYPES)}, bundled:language for example"
        )
    return fields


def class_names(models: ModelArguments, head: type[PreTrainedModel], found: Iterable[str]) -> list[str]:
    """The classes to learn: a trained head's own, in its order, else those `found` in the data, sorted, "O" first.

    Raises ValueError for fewer than two, and for labels that a trained head does not know.
    """
    given = sorted(set(found), key=lambda name: (name != "O", name))
    fields = checkpoint_fields(models)
    if head.__name__ in (fields.get("architectures") or []):
        known = [fields["id2label"][i] for i in sorted(fields["id2label"], key=int)]
        check_labels(given, known, f"{models.model} has learnt")
        return known
    if len(given) < 2:
        raise ValueError(f"the training data has {len(given)} classes ({', '.join(given)}); two are the least to tell")
    return given


def check_labels(found: Iterable[str], names: Sequence[str], where: str) -> None:
    """Raise ValueError for labels that are none of `names`; where: who has these, "the training data has"."""
    if unknown := sorted(set(found) - set(names)):
        shown = ", ".join(names[:20]) + (", ..." if len(names) > 20 else "")
        raise ValueError(f"unknown labels {', '.join(map(repr, unknown[:5]))}; {where} {shown}")


def label_fields(names: Sequence[str]) -> dict[str, Any]:
    """Fields of the config that name the classes."""
    return {"id2label": dict(enumerate(names)), "label2id": {name: i for i, name in enumerate(names)}}


def load_tokenizer(
    models: ModelArguments, config: PerceiverIOConfig, name: str | None = None, added: int = 0
) -> tuple[str, Any]:
    """Where it is from, and the tokenizer called `name`, the model's own, or the bytes' for fresh weights.

    added: so many ids that a fresh model may have beyond the bytes'. Raises ValueError for a vocabulary that none ships for.
    """
    if name or models.model:
        place = name or model_folder(models.model or "")
        # The revision is the model's, and of no other folder.
        own = {} if name else {"revision": models.revision}
        return place, AutoTokenizer.from_pretrained(place, trust_remote_code=models.trust_remote_code, **own)
    if config.vocab_size in (VOCAB_SIZE, VOCAB_SIZE + added):
        return "of bytes", PerceiverIOTokenizer(model_max_length=positions(config) or 2048)
    raise ValueError(
        f"no tokenizer ships for the {config.vocab_size} tokens of {models.architecture}; give --tokenizer"
    )


def open_tokenizer(models: ModelArguments, config: PerceiverIOConfig, name: str | None = None) -> Any:
    """As `load_tokenizer`. Raises ValueError where it does not fit the model, or cannot place labels."""
    place, tokenizer = load_tokenizer(models, config, name)
    if len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"tokenizer {place} has {len(tokenizer)} tokens, the model {config.vocab_size}: take the one that the model was "
            "trained with"
        )
    if not tokenizer.is_fast or tokenizer.pad_token_id is None:
        raise ValueError(
            f"tokenizer {place} is slow or has no padding token; labels are placed by the offsets of a fast one, with "
            "[PAD] set"
        )
    return tokenizer


def positions(config: PerceiverIOConfig) -> int | None:
    """How many tokens the model has positions for, None where any number."""
    position = config.preprocessor.get("position") or {}
    return position.get("num_positions") or (position.get("max_resolution") or [None])[0]


def window_length(config: PerceiverIOConfig, tokenizer: Any, wanted: int | None, stride: int = 0) -> int:
    """Tokens of a window, those of the tokenizer included.

    Raises ValueError for more than the model reads, and where windows that share `stride` tokens would not move on.
    """
    held = positions(config) or math.inf
    length = wanted or min(held, tokenizer.model_max_length)
    special = tokenizer.num_special_tokens_to_add()
    if not special < length <= held or length > 2**20:
        raise ValueError(f"max_length={wanted}: this model reads windows of {special + 1} to {held} tokens; choose one")
    if not 0 <= stride < length - special:
        raise ValueError(
            f"windows of {length} tokens, {special} of them special, cannot share {stride}; choose 0 to {length - special - 1}"
        )
    return int(length)


def json_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line, record) of a file with a JSON object on each line; ValueError for a line that is none."""
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}:{number} is not JSON: {error}") from error
            if not isinstance(record, dict):
                raise ValueError(f"{path}:{number} is not a JSON object but {type(record).__name__}")
            yield number, record


def predict(trainer: Trainer, rows: Sequence[dict[str, Any]]) -> Any:
    """The model's output for all rows, in their order, with what Trainer measured; adds the test_ figures to metrics.json."""
    found = trainer.predict(rows)
    if trainer.is_world_process_zero():
        path = Path(trainer.args.output_dir) / "metrics.json"
        held = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        write_text(path, json.dumps(held | found.metrics, indent=1, sort_keys=True) + "\n")
    return found
