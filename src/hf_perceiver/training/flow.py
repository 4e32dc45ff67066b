"""Train an optical-flow Perceiver on synthetic pairs, from a seed, and measure one on synthetic or real pairs.

    python -m hf_perceiver.training.flow --output DIR --minutes 60 --optimizer adamw
    python -m hf_perceiver.training.flow --resume DIR
    python -m hf_perceiver.training.flow --evaluate DIR [--sintel ROOT] [--kitti ROOT]
    python -m hf_perceiver.training.flow --output DIR --smoke-test

Pairs come from `flow_synthesis`, endless and exact. As in Perceiver IO's recipe, the first phase has no augmentation and
feeds each pair forward and reversed; then augmentation grows, see `flow_augmentation`. The learning rate rises, then
falls as a cosine; `--minutes` lets it fall with the time that is left, `--steps` with the steps. Pair i depends on
(seed, i) alone, so a resumed run goes on with the pairs that it would have had.
"""

import csv
import io
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytorch_optimizer
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import HfArgumentParser, Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from ..configuration_perceiver_io import PerceiverIOConfig
from ..flow_files import kitti_pairs, read_flow, sintel_pairs
from ..flow_metrics import FlowMetrics
from ..heads_vision import PerceiverIOForOpticalFlow
from ..image_processing_perceiver_io import PerceiverIOFlowImageProcessor
from ..losses import IGNORED
from .flow_augmentation import FlowAugmentation, flip
from .flow_start import level_patches, start_flow
from .flow_synthesis import HELD_OUT_FAMILIES, PHOTOS, FlowPair, FlowPairs, Scene, TextureBank
from .storage import save_halved, write_text

TILE = (48, 64)  # rows and columns of pixels that the model reads at once
TOKENS = (12, 16)  # patches of 4x4 pixels of both frames
LATENT_GRID = (6, 8)
# Largest motion as shares of the tile's width: what is trained on, and what the two held-out sets have.
LARGEST_MOTION = 0.15
MOTIONS = {"small motion": 0.05, "large motion": 0.15}
HELD_OUT_PAIRS, HELD_OUT_SEED, VALIDATION_SEED = 200, 30_000, 40_000
RATES = {"lamb": 4e-4, "adamw": 1.5e-3}
STATE = "clock.json"


@dataclass
class FlowRecipe:
    """What a run depends on. Written to recipe.json, which --resume reads."""

    output: str | None = field(default=None, metadata={"help": "folder to write; must be new or empty"})
    resume: str | None = field(default=None, metadata={"help": "folder of an interrupted run to go on with"})
    evaluate: str | None = field(
        default=None, metadata={"help": "folder of a trained model to measure, beside Farneback"}
    )
    sintel: str | None = field(
        default=None, metadata={"help": "with --evaluate: MPI Sintel's folder, to measure on it"}
    )
    kitti: str | None = field(default=None, metadata={"help": "with --evaluate: KITTI 2015's folder, to measure on it"})
    smoke_test: bool = field(default=False, metadata={"help": "a run of 20 steps, to see that all works"})
    start_from: str | None = field(default=None, metadata={"help": "folder of a trained model to start from, not anew"})
    seed: int = field(default=0, metadata={"help": "of weights and pairs"})
    steps: int | None = field(default=None, metadata={"help": "train so many steps"})
    minutes: float | None = field(default=None, metadata={"help": "train so long (60 where no steps are given)"})
    batch_size: int = field(default=32, metadata={"help": "pairs per step; the paper's is 512"})
    optimizer: Literal["lamb", "adamw"] = field(
        default="lamb", metadata={"help": "the paper's LAMB; small batches on a CPU learn faster with adamw"}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"default: {RATES['lamb']:g} (the paper's) for lamb, {RATES['adamw']:g} for adamw"},
    )
    warmup_steps: int = field(default=100, metadata={"help": "the learning rate rises over so many steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "of matrices"})
    shift_pairs: int = field(
        default=8_000,
        metadata={"help": "so many pairs first are one layer that is shifted: what moves is learnt from these"},
    )
    curriculum_pairs: int = field(
        default=16_000, metadata={"help": "over so many more, turns, warps and layers come in, up to what is tested"}
    )
    augment_from: int = field(
        default=48_000, metadata={"help": "from this pair on there is augmentation; before, each pair is fed both ways"}
    )
    augment_over: int = field(default=96_000, metadata={"help": "its severity grows from 0 over so many pairs"})
    max_severity: float = field(default=1.0, metadata={"help": "up to this; 1 is RAFT's full range, 0 for none"})
    textures: int = field(default=192, metadata={"help": "how many textures are made to cover layers with"})
    workers: int = field(default=0, metadata={"help": "processes that make pairs beside the training"})
    save_every: int = field(default=200, metadata={"help": "steps between validations, each with a saved state"})
    validation_pairs: int = field(default=64, metadata={"help": "pairs of each validation, half slow and half fast"})
    mixed_precision: bool = field(default=True, metadata={"help": "bfloat16 autocast"})

    def __post_init__(self) -> None:
        if sum(where is not None for where in (self.output, self.resume, self.evaluate)) != 1:
            raise ValueError("give one of --output DIR, --resume DIR and --evaluate DIR")
        if (self.sintel or self.kitti) and not self.evaluate:
            raise ValueError("--sintel and --kitti say what to measure on; give --evaluate DIR with them")
        if self.batch_size < 2 or self.batch_size % 2:
            raise ValueError(f"batch_size={self.batch_size} must be even: pairs are fed forward and reversed")
        if not 0 <= self.max_severity <= 1:
            raise ValueError(f"max_severity={self.max_severity} goes from 0 to 1")
        for name in ("steps", "minutes"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        if self.smoke_test:
            self.steps, self.minutes, self.batch_size, self.warmup_steps = 20, None, 8, 5
            self.textures, self.save_every, self.validation_pairs = 6, 10, 4

    @property
    def rate(self) -> float:
        return RATES[self.optimizer] if self.learning_rate is None else self.learning_rate


def flow_config(**changes: Any) -> PerceiverIOConfig:
    """The bundled model's architecture, for tiles of 48 x 64; `changes` are fields of the config."""
    fields_: dict[str, Any] = {
        "num_latents": LATENT_GRID[0] * LATENT_GRID[1],
        "d_latents": 256,
        "num_blocks": 1,
        "num_self_attends_per_block": 5,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 8,
        "qk_channels": 256,
        "v_channels": 256,
        "self_attention_widening_factor": 2,
        "cross_attend_before_blocks": [0, 0],
        "cross_attend_sharing": "none",
        "decoder_num_heads": 8,
        "decoder_qk_channels": 256,
        "decoder_v_channels": 256,
        "decoder_widening_factor": 4,
        "decoder_use_query_residual": True,
        "preprocessor": {
            "kind": "grid",
            "stem": {
                "kind": "patches",
                "in_channels": 3,
                "spatial_downsample": 4,
                "temporal_downsample": 2,
                "project": 94,
            },
            "position": {"kind": "fourier", "num_bands": 8, "max_resolution": list(TOKENS)},
        },
        "output_query": {"kind": "input"},
        "postprocessor": {"kind": "convex_upsampling", "factor": 4, "channels": 128, "rescale_factor": 1.0},
    }
    return PerceiverIOConfig(**{**fields_, **changes})


def image_processor() -> PerceiverIOFlowImageProcessor:
    """Frames of any size -> tiles of 48 x 64 pixels of contrast-normalised RGB."""
    return PerceiverIOFlowImageProcessor(
        tile_size={"height": TILE[0], "width": TILE[1]}, min_overlap=20, patch_size=1, contrast_normalize=True
    )


class TrainingPairs(IterableDataset):
    """Examples (frames, flow, valid) without end: each synthetic pair forward and reversed, then augmented ones."""

    def __init__(self, recipe: FlowRecipe, pairs: FlowPairs, start: int = 0):
        self.recipe, self.pairs, self.start = recipe, pairs, start
        self.augmentation = FlowAugmentation()

    def severity(self, index: int) -> float:
        """Of the augmentation of pair `index`, 0 in the first phase."""
        past = (index - self.recipe.augment_from) / max(self.recipe.augment_over, 1)
        return self.recipe.max_severity * min(max(past, 0.0), 1.0)

    def examples(self, index: int) -> list[dict[str, Any]]:
        """The two examples that pair `index` gives."""
        pair, severity = self.pairs.pair(index), self.severity(index)
        made = []
        for order, one in enumerate((pair, pair.reversed())):
            rng = np.random.default_rng([self.recipe.seed, index, 1 + order])
            if severity > 0:
                one, valid = self.augmentation(one, rng, severity)
            else:
                # A mirror image is as good as new, and changes no colour.
                one, valid = flip(one, np.ones(one.flow.shape[:2], bool), rng.random() < 0.5, rng.random() < 0.5)
            # A tile of a larger picture has less or more contrast than the whole, which is what is normalised.
            gain, offset = math.exp(rng.uniform(math.log(0.4), math.log(1.3))), rng.uniform(-0.5, 0.5)
            if rng.random() < 0.5:
                gain, offset = 1.0, 0.0
            made.append({"frames": one.frames, "flow": one.flow, "valid": valid, "gain": gain, "offset": offset})
        return made

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        index, step = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield from self.examples(index)
            index += step


class FlowCollator:
    """Examples of TrainingPairs -> `pixel_values` by the image processor, `labels` with -100 where there is no flow."""

    def __init__(self, processor: PerceiverIOFlowImageProcessor):
        self.processor = processor

    def __call__(self, examples: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        pixels = self.processor([(e["frames"][0], e["frames"][1]) for e in examples], return_tensors="pt").pixel_values
        gains, offsets = (torch.tensor([e.get(k, d) for e in examples]) for k, d in (("gain", 1.0), ("offset", 0.0)))
        pixels = pixels * gains.float()[:, None, None, None, None] + offsets.float()[:, None, None, None, None]
        labels = np.stack([np.where(e["valid"][..., None], e["flow"], np.float32(IGNORED)) for e in examples])
        return {"pixel_values": pixels, "labels": torch.from_numpy(labels)}


def training_scene(index: int, recipe: FlowRecipe) -> Scene:
    """What pair `index` is drawn from: shifts of one layer first; then layers, turns and warps come in.

    Slow and fast pairs always stand side by side: how much of the largest motion a pair may use is spread evenly.
    """
    grown = min(max(index - recipe.shift_pairs, 0) / max(recipe.curriculum_pairs, 1), 1.0)
    spread = index * 0.6180339887 % 1.0
    largest = LARGEST_MOTION * TILE[1] * (0.1 + 0.9 * spread)
    return Scene(largest, max_layers=round(4 * grown), affine=0.7 * grown, smooth=0.5 * grown)


def training_pairs(recipe: FlowRecipe, start: int = 0) -> TrainingPairs:
    """The stream of a run, from pair `start` on."""
    bank = TextureBank(seed=recipe.seed, count=recipe.textures)
    pairs = FlowPairs(
        bank,
        height=TILE[0],
        width=TILE[1],
        schedule=lambda index: training_scene(index, recipe),
        seed=recipe.seed,
    )
    return TrainingPairs(recipe, pairs, start)


def held_out_pairs(share: float, *, count: int = HELD_OUT_PAIRS, scale: int = 1) -> list[FlowPair]:
    """Pairs that training never saw: other seeds, other textures, the other sample photo, one more family.

    share: the largest motion, of the tile's width; scale: frames of so many tiles a side, with the same motion in pixels.
    """
    bank = TextureBank(seed=HELD_OUT_SEED, photos=PHOTOS[1:], families=HELD_OUT_FAMILIES)
    pairs = FlowPairs(
        bank, height=TILE[0] * scale, width=TILE[1] * scale, max_motion=share * TILE[1], seed=HELD_OUT_SEED
    )
    return [pairs.pair(index) for index in range(count)]


def validation_pairs(count: int) -> list[FlowPair]:
    """Pairs to choose a state by: like the held-out ones in motion, with the training's photo and families."""
    bank = TextureBank(seed=VALIDATION_SEED, count=48)
    halves = [
        FlowPairs(bank, height=TILE[0], width=TILE[1], max_motion=share * TILE[1], seed=VALIDATION_SEED)
        for share in MOTIONS.values()
    ]
    return [halves[index % 2].pair(index) for index in range(count)]


@torch.no_grad()
def predict_flow(
    model: PerceiverIOForOpticalFlow,
    processor: PerceiverIOFlowImageProcessor,
    first: Any,
    second: Any,
    *,
    batch_size: int = 32,
) -> np.ndarray:
    """Two frames of any size -> flow (H, W, 2) in pixels, tile by tile."""
    (pair,) = processor.pairs([(first, second)])
    stitcher = processor.stitcher(*pair[0].shape[1:])
    waiting: list[np.ndarray] = []

    def run() -> None:
        for tile in model(pixel_values=torch.from_numpy(np.stack(waiting)).to(model.device)).logits.float():
            stitcher.add(tile)
        waiting.clear()

    for tile in processor.tiles(*pair):
        waiting.append(tile)
        if len(waiting) == batch_size:
            run()
    if waiting:
        run()
    return stitcher.flow().numpy()


@torch.no_grad()
def end_point_error(model: PerceiverIOForOpticalFlow, batches: Sequence[dict[str, Tensor]]) -> float:
    """Mean over all pixels of the batches, in pixels."""
    was, errors = model.training, []
    model.eval()
    for batch in batches:
        flow = model(pixel_values=batch["pixel_values"].to(model.device)).logits.float().cpu() * _scale(model)
        errors.append((flow - batch["labels"]).norm(dim=-1).mean(dim=(1, 2)))
    model.train(was)
    return torch.cat(errors).mean().item()


class Clock(TrainerCallback):
    """How much of a run is done, by its steps or by its time, which goes on where an interrupted run stopped."""

    def __init__(self, steps: int | None, minutes: float | None):
        self.steps, self.minutes = steps, minutes
        self.before, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def done(self, step: int) -> float:
        """0 at the start, 1 at the end"""
        share = step / self.steps if self.minutes is None else self.seconds / (60 * self.minutes)  # type: ignore[operator]
        return min(share, 1.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.done(state.global_step) >= 1:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_text(folder / STATE, json.dumps({"seconds": self.seconds}) + "\n")


class Validation(TrainerCallback):
    """Measures the model beside every saved state, keeps the best weights, and writes down the course."""

    def __init__(self, output: Path, recipe: FlowRecipe, clock: Clock):
        self.output, self.clock = output, clock
        collate = FlowCollator(image_processor())
        pairs = validation_pairs(recipe.validation_pairs)
        self.batches = {name: [collate([_example(p) for p in pairs[part::2]])] for part, name in enumerate(MOTIONS)}
        self.zero = {name: (b[0]["labels"]).norm(dim=-1).mean().item() for name, b in self.batches.items()}
        self.course: list[dict[str, float]] = []
        if (output / "learning_curve.csv").exists():
            rows = csv.DictReader(io.StringIO((output / "learning_curve.csv").read_text()))
            self.course = [{name: float(value) for name, value in row.items()} for row in rows]

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        errors = {name: end_point_error(model, batches) for name, batches in self.batches.items()}
        self.course = [row for row in self.course if row["step"] < state.global_step]
        row = {
            "step": state.global_step,
            "seconds": round(self.clock.seconds),
            "loss": losses[-1] if losses else math.nan,
        }
        self.course.append({**row, **errors})
        lines = [",".join(self.course[0])]
        lines += [",".join(f"{value:.5g}" for value in row.values()) for row in self.course]
        write_text(self.output / "learning_curve.csv", "\n".join(lines) + "\n")
        shown = ", ".join(f"{name} {error:.3f} (zero flow {self.zero[name]:.3f})" for name, error in errors.items())
        tqdm.write(f"step {state.global_step}: end-point error in pixels: {shown}", file=sys.stderr)
        if self.score(self.course[-1]) <= min(self.score(row) for row in self.course):
            save_halved(model, self.output / "best")

    def score(self, row: dict[str, float]) -> float:
        """Errors as shares of zero flow's, on average: slow pairs count as much as fast ones."""
        return sum(row[name] / zero for name, zero in self.zero.items()) / len(self.zero)


def train(recipe: FlowRecipe) -> dict[str, Any]:
    """Train from scratch, or go on; write model, processor, metrics, curves and card to the folder. -> the metrics"""
    output = Path(recipe.resume or recipe.output)  # type: ignore[arg-type]
    last = None
    if recipe.resume:
        recipe, last = _resumed(recipe, output)
    else:
        if output.exists() and any(output.iterdir()):
            raise ValueError(f"{output} is not empty; choose another folder, or go on with it by --resume {output}")
        if recipe.steps is None and recipe.minutes is None:
            recipe = replace(recipe, minutes=60.0)
        write_text(output / "recipe.json", json.dumps(_kept(recipe), indent=1) + "\n")
    set_seed(recipe.seed)
    model = new_model(recipe)
    clock = Clock(recipe.steps, recipe.minutes)
    step = 0
    if last is not None:
        step = int(Path(last).name.split("-")[-1])
        clock.before = json.loads((Path(last) / STATE).read_text())["seconds"]
    optimizer = new_optimizer(model, recipe)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda at: min((at + 1) / recipe.warmup_steps, 1.0) * 0.5 * (1 + math.cos(math.pi * clock.done(at))),
    )
    arguments = TrainingArguments(
        output_dir=str(output / "state"),
        per_device_train_batch_size=recipe.batch_size,
        max_steps=recipe.steps if recipe.minutes is None else 10_000_000,
        bf16=recipe.mixed_precision,
        use_cpu=not torch.accelerator.is_available(),
        max_grad_norm=1.0,
        logging_steps=min(50, recipe.save_every),
        save_steps=recipe.save_every,
        save_total_limit=2,
        dataloader_num_workers=recipe.workers,
        # The stream itself begins where the run stopped.
        ignore_data_skip=True,
        remove_unused_columns=False,
        report_to=[],
        seed=recipe.seed,
        disable_tqdm=recipe.minutes is not None,
    )
    validation = Validation(output, recipe, clock)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=training_pairs(recipe, start=step * recipe.batch_size // 2),
        data_collator=FlowCollator(image_processor()),
        optimizers=(optimizer, schedule),
        callbacks=[clock, validation],
    )
    trainer.train(resume_from_checkpoint=last)
    return write_result(output, recipe, trainer.state.global_step, clock.seconds)


def new_model(recipe: FlowRecipe) -> PerceiverIOForOpticalFlow:
    """Fresh weights that start out looking at neighbourhoods, or those to start from."""
    # Eager attention is faster than sdpa on a CPU for arrays this short.
    if recipe.start_from:
        return PerceiverIOForOpticalFlow.from_pretrained(recipe.start_from, attn_implementation="eager")
    config = flow_config()
    config._attn_implementation = "eager"
    model = PerceiverIOForOpticalFlow(config)
    stream = training_pairs(replace(recipe, textures=min(recipe.textures, 48)))
    batch = FlowCollator(image_processor())([e for i in range(50) for e in stream.examples(10**6 + i)])
    level_patches(model.perceiver.preprocessor.stem, batch["pixel_values"])
    start_flow(model, LATENT_GRID, batch["pixel_values"])
    return model


def new_optimizer(model: torch.nn.Module, recipe: FlowRecipe) -> torch.optim.Optimizer:
    """LAMB or AdamW; biases, norms and latents do not decay."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "latents" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if recipe.optimizer == "lamb":
        return pytorch_optimizer.Lamb(groups, lr=recipe.rate)
    return torch.optim.AdamW(groups, lr=recipe.rate, betas=(0.9, 0.98), fused=True)


def evaluate(directory: Path, *, count: int = HELD_OUT_PAIRS) -> dict[str, Any]:
    """EPE in pixels on the held-out pairs: of the model as it is stored, of zero flow and of OpenCV's Farneback.

    {set: {method: {"all": pixels, "visible": without those that are hidden in the second frame}}}
    """
    model = PerceiverIOForOpticalFlow.from_pretrained(directory).eval()
    processor = PerceiverIOFlowImageProcessor.from_pretrained(directory)
    table: dict[str, Any] = {}
    sets = {name: held_out_pairs(share, count=count) for name, share in MOTIONS.items()}
    large = f"large motion, frames of {2 * TILE[0]}x{2 * TILE[1]} in tiles"
    sets[large] = held_out_pairs(MOTIONS["large motion"], count=count, scale=2)
    for name, pairs in sets.items():
        methods: dict[str, Any] = {
            "model": lambda pair: predict_flow(model, processor, *pair.frames),
            "zero flow": lambda pair: np.zeros_like(pair.flow),
        }
        methods |= {label: _farneback(**options) for label, options in FARNEBACK.items()}
        sums = {method: (FlowMetrics(), FlowMetrics()) for method in methods}
        for pair in tqdm(pairs, desc=name, file=sys.stderr):
            for method, estimate in methods.items():
                flow = estimate(pair)
                sums[method][0].update(flow, pair.flow)
                sums[method][1].update(flow, pair.flow, ~pair.occluded)
        table[name] = {
            method: {"all": everywhere.per_pixel()["epe"], "visible": visible.per_pixel()["epe"]}
            for method, (everywhere, visible) in sums.items()
        }
    return table


# OpenCV's own example, and settings around it: the best of them on each set is what the model has to beat.
FARNEBACK: dict[str, dict[str, Any]] = {
    "Farneback, OpenCV's example": {"winsize": 15, "levels": 3, "iterations": 3},
    "Farneback, small window": {"winsize": 9, "levels": 3, "iterations": 5},
    "Farneback, large window": {"winsize": 21, "levels": 5, "iterations": 5},
    "Farneback, more iterations": {"winsize": 13, "levels": 4, "iterations": 10},
}


def _farneback(winsize: int, levels: int, iterations: int) -> Any:
    import cv2

    def estimate(pair: FlowPair) -> np.ndarray:
        first, second = (cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_RGB2GRAY) for frame in pair.frames)
        flow = np.zeros_like(pair.flow)
        return cv2.calcOpticalFlowFarneback(first, second, flow, 0.5, levels, winsize, iterations, 5, 1.2, 0)

    return estimate


def evaluate_folder(directory: Path, name: Literal["sintel", "kitti"], root: str) -> dict[str, dict[str, float | None]]:
    """Metrics of `flow_metrics` on MPI Sintel's training split (clean and final), or KITTI 2015's, by what is measured."""
    model = PerceiverIOForOpticalFlow.from_pretrained(directory).eval()
    processor = PerceiverIOFlowImageProcessor.from_pretrained(directory)
    parts: dict[str, list[Any]]
    if name == "sintel":
        parts = {f"sintel {kind}": [*sintel_pairs(root, render_pass=kind)] for kind in ("clean", "final")}
    else:
        parts = {"kitti": [*kitti_pairs(root)]}
    results = {}
    for part, pairs in parts.items():
        metrics = FlowMetrics()
        for pair in tqdm(pairs, desc=part, file=sys.stderr):
            flow, valid = read_flow(pair.flow)
            first, second = _open(pair.frame1), _open(pair.frame2)
            metrics.update(predict_flow(model, processor, first, second), flow, valid)
        results[part] = (
            metrics.per_pixel() if name == "sintel" else {**metrics.per_pixel(), "epe": metrics.per_pair()["epe"]}
        )
    return results


def write_result(output: Path, recipe: FlowRecipe, steps: int, seconds: float) -> dict[str, Any]:
    """The best weights with their processor, measured, with curves and card; each file renamed into place whole."""
    best = output / "best"
    image_processor().save_pretrained(best)
    metrics: dict[str, Any] = {
        "steps": steps,
        "seconds": round(seconds),
        "parameters": PerceiverIOForOpticalFlow.from_pretrained(best).num_parameters(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe": _kept(recipe),
        "held_out": evaluate(best, count=4 if recipe.smoke_test else HELD_OUT_PAIRS),
    }
    for file in sorted(best.iterdir()):
        os.replace(file, output / file.name)
    best.rmdir()
    write_text(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    draw_curves(output)
    write_text(output / "README.md", model_card(metrics))
    return metrics


def draw_curves(output: Path) -> None:
    """curves.png of learning_curve.csv."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = list(csv.DictReader(io.StringIO((output / "learning_curve.csv").read_text())))
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in MOTIONS:
        axes.plot([float(r["step"]) for r in rows], [float(r[name]) for r in rows], label=f"validation, {name}")
    axes.set(xlabel="step", ylabel="end-point error (pixels)", ylim=(0, None))
    axes.legend()
    partial = output / "curves.partial.png"
    figure.savefig(partial, dpi=80, metadata={"Software": None})
    os.replace(partial, output / "curves.png")


def table(held_out: dict[str, Any]) -> str:
    """The measurements as a Markdown table: EPE over all pixels, and over those that are visible in both frames."""
    lines = ["| EPE in pixels, all (visible) | " + " | ".join(held_out) + " |", "|---" * (len(held_out) + 1) + "|"]
    for method in next(iter(held_out.values())):
        cells = [f"{row[method]['all']:.3f} ({row[method]['visible']:.3f})" for row in held_out.values()]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def model_card(metrics: dict[str, Any]) -> str:
    """README.md of a trained model; `metrics["note"]` is added, on how it came to be."""
    recipe = metrics["recipe"]
    rate = RATES[recipe["optimizer"]] if recipe["learning_rate"] is None else recipe["learning_rate"]
    changed = [
        f"--{f.name} {recipe[f.name]}"
        for f in fields(FlowRecipe)
        if f.name in recipe and recipe[f.name] not in (f.default, None) and f.name not in ("steps", "minutes")
    ]
    command = " ".join(["python -m hf_perceiver.training.flow --output DIR", *changed, f"--steps {metrics['steps']}"])
    small, large = (share * TILE[1] for share in MOTIONS.values())
    batch, minutes, first = recipe["batch_size"], metrics["seconds"] / 60, recipe["augment_from"]
    steps: int = metrics["steps"]
    shifts, growth = recipe["shift_pairs"], recipe["curriculum_pairs"]
    note = f"\n{metrics['note']}\n" if "note" in metrics else ""
    return f"""---
license: apache-2.0
library_name: transformers
tags: [perceiver, hf-perceiver, optical-flow]
---
# A small Perceiver IO for optical flow

{metrics["parameters"]:,} parameters, stored in bfloat16. It reads two frames in tiles of {TILE[0]} x {TILE[1]} pixels
and sees motion up to {LARGEST_MOTION:.0%} of a tile's width, {large:.1f} pixels; its image processor cuts larger
frames into tiles. It is an example to try the library with: the released model has 41 million parameters and learnt from
375,000 batches of 512 pairs.

```python
from hf_perceiver import PerceiverIOForOpticalFlow, bundled_checkpoint

model = PerceiverIOForOpticalFlow.from_pretrained(bundled_checkpoint("flow"))
```

## Measured

{HELD_OUT_PAIRS} held-out synthetic pairs each, with motion up to {small:.1f} pixels (small) and {large:.1f} (large), made from
other seeds, other textures, one family of textures that training never had, and scikit-learn's `{PHOTOS[1]}`,
which was held out:

{table(metrics["held_out"])}

Visible pixels are those that the second frame shows too. Zero flow says that nothing moves. Farneback is
OpenCV's `calcOpticalFlowFarneback` with four settings. All of it is measured by

```
python -m hf_perceiver.training.flow --evaluate DIR
```

## Data

Made by `hf_perceiver.training.flow_synthesis`, after AutoFlow's idea: up to four polygons in front of a
background, with made-up textures or cuts of scikit-learn's `{PHOTOS[0]}`, each under an affine map and a
smooth warp; the flow is exact.

## Recipe

{steps:,} steps of {batch} pairs ({batch * steps:,} in all) in {minutes:.0f} minutes on {metrics["threads"]} CPU thread(s),
PyTorch {metrics["torch"]}. {recipe["optimizer"].upper()}, learning rate {rate:g}, falling as a cosine. The first {shifts:,}
scenes are single layers that are shifted; over {growth:,} more come turns, warps and layers. No augmentation, and each
scene both ways, up to scene {first:,}; then augmentation that grows to severity {recipe["max_severity"]:g} over
{recipe["augment_over"]:,} scenes. Loss: the end-point error. The weights are those that did best on validation pairs, which
are neither trained on nor held out. The start is local, see `hf_perceiver.training.flow_start`. All settings:
`metrics.json`; the course: `learning_curve.csv`.

```
{command}
```

![end-point error by step](curves.png)
{note}
## Limits

It learnt from synthetic layers alone: on photos judge it by eye, and expect little where there is no texture.
Motion beyond {large:.1f} pixels is not seen; shrink the frames first. Tiles do not know of each other.
"""


def report(results: dict[str, dict[str, float | None]]) -> None:
    """Print metrics, one line for each set."""
    for name, metrics in results.items():
        shown = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items() if value is not None)
        print(f"{name}: {shown}")


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        FlowRecipe, prog="python -m hf_perceiver.training.flow", description=__doc__.split("\n")[0]
    )
    (given,) = parser.parse_args_into_dataclasses(arguments)
    recipe: FlowRecipe = given
    if recipe.evaluate is None:
        print(table(train(recipe)["held_out"]))
        return
    directory = Path(recipe.evaluate)
    if recipe.sintel:
        report(evaluate_folder(directory, "sintel", recipe.sintel))
    if recipe.kitti:
        report(evaluate_folder(directory, "kitti", recipe.kitti))
    if not (recipe.sintel or recipe.kitti):
        print(table(evaluate(directory)))


def _example(pair: FlowPair) -> dict[str, Any]:
    return {"frames": pair.frames, "flow": pair.flow, "valid": np.ones(pair.flow.shape[:2], bool)}


def _scale(model: PerceiverIOForOpticalFlow) -> float:
    return float(model.perceiver.postprocessor.scale_factor)


def _kept(recipe: FlowRecipe) -> dict[str, Any]:
    """What a run can be repeated from: all but where it is written."""
    return {k: v for k, v in asdict(recipe).items() if k not in ("output", "resume", "evaluate", "sintel", "kitti")}


def _resumed(recipe: FlowRecipe, output: Path) -> tuple[FlowRecipe, str]:
    """The recipe of an interrupted run, and its last state."""
    path = output / "recipe.json"
    last = get_last_checkpoint(str(output / "state")) if (output / "state").is_dir() else None
    if not path.is_file() or last is None:
        raise ValueError(f"{output} holds no interrupted run; start one with --output {output}")
    return FlowRecipe(resume=str(output), **json.loads(path.read_text())), last


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


if __name__ == "__main__":
    main()
