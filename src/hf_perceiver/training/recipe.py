"""What the recipes share: their options, LAMB and its schedules, a model to start from, a run that can be taken up again.

A recipe is `python -m hf_perceiver.training.<name>`: its own options, `ModelArguments` and `RecipeArguments`, which are
transformers' TrainingArguments with other defaults, so that all of Trainer's options (bf16, FSDP, accumulation, pushing to
the Hub ...) and its launchers (torchrun, accelerate) work. `run` trains, evaluates and writes; a run that was broken off
goes on with `--resume_from_checkpoint last`.
"""

import csv
import io
import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytorch_optimizer
import torch
from torch import nn
from transformers import HfArgumentParser, PreTrainedModel, Trainer, TrainingArguments, set_seed
from transformers.optimization import get_wsd_schedule

from .. import recipes
from ..bundled import bundled_checkpoint
from ..configuration_perceiver_io import PerceiverIOConfig
from .storage import write_text

# Trainer writes this file of a checkpoint last: one without it was broken off.
WRITTEN_LAST = "trainer_state.json"
BUNDLED = "bundled:"


@dataclass
class ModelArguments:
    """Where the weights come from: a trained model, or a published architecture with fresh ones."""

    model: str | None = field(
        default=None,
        metadata={
            "help": "trained model to start from: a folder, a name on the Hub, or bundled:NAME for one that ships"
        },
    )
    architecture: str | None = field(
        default=None, metadata={"help": "fresh weights: a published architecture, see hf_perceiver.recipes"}
    )
    config_overrides: str | None = field(
        default=None, metadata={"help": 'with --architecture: fields of its config as JSON, {"num_latents": 64}'}
    )
    revision: str = field(default="main", metadata={"help": "branch, tag or commit of --model on the Hub"})
    trust_remote_code: bool = field(default=False, metadata={"help": "run code that --model brings along"})
    freeze_encoder: bool = field(
        default=False, metadata={"help": "train the output query, the decoder and the head alone"}
    )

    def __post_init__(self) -> None:
        if self.model and self.architecture:
            raise ValueError("give --model to start from trained weights or --architecture for fresh ones, not both")
        if self.config_overrides and not self.architecture:
            raise ValueError("--config_overrides changes an --architecture; a trained --model keeps its own config")


@dataclass
class RecipeArguments(TrainingArguments):
    """transformers' TrainingArguments, with the papers' LAMB and schedules."""

    do_train: bool = field(default=True, metadata={"help": "train; --no_do_train measures only"})
    do_eval: bool = field(default=True, metadata={"help": "measure at the end, where there is something to measure on"})
    optimizer: Literal["lamb", "adamw"] = field(
        default="lamb", metadata={"help": "the papers' LAMB; small batches often learn faster with adamw"}
    )
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "how the learning rate falls after the warm-up"})
    flat_share: float = field(
        default=0.0, metadata={"help": "share of the steps at the full learning rate, before the cosine begins"}
    )
    warmup_steps: float = field(
        default=0, metadata={"help": "steps (below 1: share of them) over which the learning rate rises"}
    )
    logging_steps: float = field(default=50, metadata={"help": "steps between two rows of learning_curve.csv"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints that are kept"})
    smoke_test: bool = field(default=False, metadata={"help": "a run of a few steps, to see that all works"})

    def __post_init__(self) -> None:
        if self.output_dir is None:
            raise ValueError("give --output_dir, the folder to write")
        if not 0 <= self.flat_share < 1:
            raise ValueError(f"flat_share={self.flat_share} is a share of the steps, from 0 to below 1")
        if self.flat_share and str(self.lr_scheduler_type) not in ("cosine", "SchedulerType.COSINE"):
            raise ValueError(f"flat_share goes with the cosine, not with lr_scheduler_type={self.lr_scheduler_type}")
        if self.smoke_test:
            self.max_steps, self.warmup_steps, self.logging_steps, self.gradient_accumulation_steps = 6, 2, 2, 1
            self.per_device_train_batch_size = self.per_device_eval_batch_size = 4
        if not torch.accelerator.is_available():
            # What --bf16 needs to hear; and pinned memory is an accelerator's.
            self.use_cpu, self.dataloader_pin_memory = True, False
        super().__post_init__()


class Lamb(pytorch_optimizer.Lamb):
    """LAMB whose step is the learning rate times the norm of the weights, of any norm. With AS_DEEPMIND it is DeepMind's.

    pytorch-optimizer's own takes at most 10 for that norm, so that a matrix of 1,280 x 1,280 learns four times slower than
    the papers', decays outside of the trusted update, and makes the first steps up to ten times as long.
    """

    clamp = math.inf


AS_DEEPMIND: dict[str, Any] = {"weight_decouple": False, "adam_debias": True}


class RecipeTrainer(Trainer):
    """Trainer with LAMB, a flat start of the cosine, and checkpoints that are whole or not there."""

    args: RecipeArguments

    def __init__(self, *arguments: Any, args: RecipeArguments, **options: Any):
        super().__init__(*arguments, args=args, optimizer_cls_and_kwargs=optimizer_of(args), **options)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        if getattr(self, "lr_scheduler", None) is None and self.args.flat_share:
            warmup = self.args.get_warmup_steps(num_training_steps)
            flat = round(self.args.flat_share * num_training_steps)
            self.lr_scheduler = get_wsd_schedule(
                self.optimizer if optimizer is None else optimizer,
                num_warmup_steps=warmup,
                num_stable_steps=max(flat - warmup, 0),
                num_decay_steps=num_training_steps - max(flat, warmup),
            )
            self._created_lr_scheduler = True
        return super().create_scheduler(num_training_steps, optimizer)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        try:
            super()._save_checkpoint(model, trial)
        except Exception as error:
            if not (folder / WRITTEN_LAST).is_file():
                shutil.rmtree(folder, ignore_errors=True)
            last = last_checkpoint(self.args.output_dir)
            kept = f"step {self.state.global_step} is lost; " + (
                f"{last} is whole" if last else "none was saved before"
            )
            raise OSError(
                f"{folder} could not be written ({error}); {kept}. Make room in {self.args.output_dir} and go on with "
                "--resume_from_checkpoint last"
            ) from error


def parse(kinds: Sequence[type], arguments: list[str] | None, description: str) -> tuple[Any, ...]:
    """The recipe's options, one object per dataclass; one JSON or YAML file may stand for them all."""
    parser = HfArgumentParser(list(kinds), description=description)
    given = sys.argv[1:] if arguments is None else arguments
    if len(given) == 1 and given[0].endswith((".json", ".yaml", ".yml")):
        read = parser.parse_json_file if given[0].endswith(".json") else parser.parse_yaml_file
        return read(given[0])
    return parser.parse_args_into_dataclasses(given)


def optimizer_of(arguments: RecipeArguments) -> tuple[Any, dict[str, Any]]:
    """Class and options, for Trainer. Decay leaves out biases and norms, as Trainer's own groups do."""
    betas = (arguments.adam_beta1, arguments.adam_beta2)
    if arguments.optimizer == "lamb":
        # Clipping is Trainer's, max_grad_norm.
        options = {"betas": betas, "eps": arguments.adam_epsilon, "max_grad_norm": 0.0, **AS_DEEPMIND}
        return Lamb, {"lr": arguments.learning_rate, **options}
    return torch.optim.AdamW, {"lr": arguments.learning_rate, "betas": betas, "eps": arguments.adam_epsilon}


def open_model(head: type[PreTrainedModel], arguments: ModelArguments, **config: Any) -> Any:
    """The model to train, a `head` (class): trained weights or fresh ones. config: fields to set, num_labels and so on.

    Raises ValueError for an unknown architecture, for overrides that are not fields, and for a checkpoint whose encoder
    is not the one that its config describes.
    """
    if arguments.model:
        model, found = head.from_pretrained(
            model_folder(arguments.model),
            revision=arguments.revision,
            trust_remote_code=arguments.trust_remote_code,
            output_loading_info=True,
            **config,
        )
        lacking = sorted(key for key in found["missing_keys"] if ".encoder." in f".{key}")
        if lacking:
            raise ValueError(
                f"{arguments.model} lacks {len(lacking)} weights of the encoder ({lacking[0]}, ...): it is of another "
                "architecture. Convert DeepMind's and transformers' checkpoints with the conversion scripts first"
            )
    elif arguments.architecture:
        model = head(fresh_config(arguments.architecture, arguments.config_overrides, **config))
    else:
        raise ValueError("give --model to start from trained weights, or --architecture for fresh ones")
    if arguments.freeze_encoder:
        model.freeze_encoder()
    return model


def model_folder(name: str) -> str:
    """`bundled:NAME` -> its folder; all else, a folder or a name on the Hub, as it is."""
    return bundled_checkpoint(name.removeprefix(BUNDLED)) if name.startswith(BUNDLED) else name


def fresh_config(architecture: str, overrides: str | None = None, **fields: Any) -> PerceiverIOConfig:
    """A published architecture with some fields changed: `overrides` as JSON, `fields` on top of them."""
    known = sorted(name for name, value in vars(recipes).items() if callable(value) and name[0].islower())
    if architecture not in known:
        raise ValueError(f"architecture {architecture!r} is not known; there are: {', '.join(known)}")
    try:
        changes = json.loads(overrides or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"config_overrides={overrides!r} is not JSON: {error}") from error
    config = getattr(recipes, architecture)().to_dict()
    unknown = sorted(set(changes) - set(config)) if isinstance(changes, dict) else [overrides]
    if unknown:
        raise ValueError(
            f"config_overrides: {unknown} are no fields of the config; there are: {', '.join(sorted(config))}"
        )
    return PerceiverIOConfig(**{**config, **changes, **fields})


def last_checkpoint(output: str | Path) -> Path | None:
    """The newest whole checkpoint of a run; one that was broken off is passed over."""
    whole = [path.parent for path in Path(output).glob(f"checkpoint-*/{WRITTEN_LAST}")]
    numbered = [path for path in whole if path.name.removeprefix("checkpoint-").isdecimal()]
    return max(numbered, key=lambda path: int(path.name.removeprefix("checkpoint-")), default=None)


def check_output(arguments: RecipeArguments) -> str | None:
    """The checkpoint to go on from, None at the start. To call before data and model are loaded.

    Raises ValueError where the folder holds something and the run is not to go on, and where there is nothing to go on from.
    """
    output = Path(arguments.output_dir)
    wanted = arguments.resume_from_checkpoint
    if wanted in (True, "True", "true", "last"):
        last = last_checkpoint(output)
        if last is None:
            raise ValueError(
                f"{output} holds no whole checkpoint to go on from; start without --resume_from_checkpoint"
            )
        return str(last)
    if wanted:
        if not (Path(wanted) / WRITTEN_LAST).is_file():
            raise ValueError(f"resume_from_checkpoint={wanted} is no whole checkpoint; it lacks {WRITTEN_LAST}")
        return str(wanted)
    if arguments.do_train and output.is_dir() and any(output.iterdir()):
        raise ValueError(
            f"output_dir={output} is not empty; choose another folder, or go on with --resume_from_checkpoint last"
        )
    return None


def check_room(model: nn.Module, arguments: RecipeArguments) -> None:
    """Raise ValueError where the disk has no room for the checkpoints that the run will keep, before it starts."""
    held = sum(p.numel() * p.element_size() for p in model.parameters())
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    each = held + (0 if arguments.save_only_model else 2 * trained)  # both optimizers keep two moments
    # The next one is written before the oldest goes; the final weights come on top.
    steps = arguments.max_steps if arguments.max_steps > 0 else None
    kept = (arguments.save_total_limit or 1) + 1
    if str(arguments.save_strategy).endswith("no") or (steps and steps < arguments.save_steps):
        kept = 1
    need = kept * each + held
    output = Path(arguments.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(output).free
    if free < need:
        raise ValueError(
            f"output_dir={output} has {free / 1e9:.1f} GB free; {kept} checkpoints of {each / 1e9:.2f} GB and the final "
            f"weights need {need / 1e9:.1f}. Make room, or lower save_total_limit, or set save_only_model"
        )


def run(trainer: RecipeTrainer, resume: str | None, *, saved: Sequence[Any] = ()) -> dict[str, float]:
    """Train, evaluate, and write the model, what belongs to it, metrics.json and learning_curve.csv to output_dir.

    resume: what `check_output` gave. saved: tokenizer or processor, for the same folder. -> the metrics
    """
    arguments = trainer.args
    output = Path(arguments.output_dir)
    metrics: dict[str, float] = {}
    if arguments.do_train:
        check_weights_come_whole(getattr(trainer.accelerator.state, "fsdp_plugin", None))
        check_room(trainer.model, arguments)
        trained = trainer.train(resume_from_checkpoint=resume)
        metrics |= {key: value for key, value in trained.metrics.items() if key.startswith("train_")}
        save_final(trainer, saved)
    if arguments.do_eval and trainer.eval_dataset is not None:
        measured = trainer.evaluate()
        metrics |= measured if isinstance(measured, dict) else {}
    if trainer.is_world_process_zero():
        metrics = {key: value for key, value in metrics.items() if isinstance(value, (int, float))}
        write_text(output / "metrics.json", json.dumps(metrics, indent=1, sort_keys=True) + "\n")
        if arguments.do_train:
            write_text(output / "learning_curve.csv", learning_curve(trainer.state.log_history))
        for key, value in sorted(metrics.items()):
            print(f"{key}: {value:.6g}")
    return metrics


def check_weights_come_whole(plugin: Any) -> None:
    """Raise ValueError where FSDP keeps its shards apart: Trainer would train, and then write no final weights."""
    kind = str(getattr(plugin, "state_dict_type", "FULL_STATE_DICT"))
    if "FULL_STATE_DICT" not in kind:
        raise ValueError(
            f"fsdp_state_dict_type {kind} leaves no weights to load; set FULL_STATE_DICT, as docs/accelerate/fsdp2.yaml does"
        )


def save_final(trainer: Trainer, saved: Sequence[Any]) -> None:
    """The weights and what belongs to them, in output_dir; each file appears whole, config.json last."""
    output = Path(trainer.args.output_dir)
    draft = output / ".final.tmp"
    first = trainer.is_world_process_zero()
    try:
        # Every process takes part in gathering sharded weights, the first one writes.
        trainer.save_model(str(draft))
        if first:
            for part in saved:
                part.save_pretrained(draft)
            for path in sorted(draft.iterdir(), key=lambda path: path.name == "config.json"):
                os.replace(path, output / path.name)
    finally:
        if first:
            shutil.rmtree(draft, ignore_errors=True)


def learning_curve(history: Sequence[dict[str, float]]) -> str:
    """Trainer's log as CSV: one row per step that was logged, empty where a figure was not measured."""
    rows: dict[int, dict[str, float]] = {}
    for entry in history:
        rows.setdefault(int(entry["step"]), {}).update(entry)
    names = sorted({name for row in rows.values() for name in row if not name.endswith(("_per_second", "_runtime"))})
    text = io.StringIO()
    writer = csv.DictWriter(
        text, ["step", *(n for n in names if n != "step")], extrasaction="ignore", lineterminator="\n"
    )
    writer.writeheader()
    writer.writerows(rows[step] for step in sorted(rows))
    return text.getvalue()


def start(arguments: RecipeArguments) -> str | None:
    """Check the output folder and set the seed -> the checkpoint to go on from."""
    resume = check_output(arguments)
    set_seed(arguments.seed)
    return resume
