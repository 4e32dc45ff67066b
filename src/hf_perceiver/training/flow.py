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

import json
import math
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info
from tqdm import tqdm
from transformers import HfArgumentParser, set_seed

from ..configuration_perceiver_io import PerceiverIOConfig
from ..flow_files import kitti_pairs, read_flow, sintel_pairs
from ..flow_metrics import FlowMetrics
from ..heads_vision import PerceiverIOForOpticalFlow
from ..image_processing_perceiver_io import PerceiverIOFlowImageProcessor
from ..losses import IGNORED
from .flow_augmentation import FlowAugmentation, flip
from .flow_start import start_matching
from .flow_synthesis import HELD_OUT_FAMILIES, PHOTOS, FlowPair, FlowPairs, Scene, TextureBank
from .recipe import AS_DEEPMIND, Lamb
from .storage import write_text
from .timed_run import BEST, begin, publish_best, read_course, run_facts, step_of, train_by_clock

TILE = (48, 64)  # rows and columns of pixels that the model reads at once
LATENT_GRID = (12, 16)  # a latent for each 4x4 pixels
# Largest motion as shares of the tile's width: what is trained on, and what the two held-out sets have.
LARGEST_MOTION = 0.15
MOTIONS = {"small motion": 0.05, "large motion": 0.15}
HELD_OUT_PAIRS, HELD_OUT_SEED, VALIDATION_SEED = 200, 30_000, 40_000
RATES = {"lamb": 4e-4, "adamw": 1e-3}


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
    batch_size: int = field(default=16, metadata={"help": "pairs per step; the paper's is 512"})
    optimizer: Literal["lamb", "adamw"] = field(
        default="lamb", metadata={"help": "the paper's LAMB; small batches on a CPU learn faster with adamw"}
    )
    learning_rate: float | None = field(
        default=None,
        metadata={"help": f"default: {RATES['lamb']:g} (the paper's) for lamb, {RATES['adamw']:g} for adamw"},
    )
    warmup_steps: int = field(default=100, metadata={"help": "the learning rate rises over so many steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "of matrices"})
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
        "num_blocks": 2,
        "num_self_attends_per_block": 2,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 4,
        "qk_channels": 256,
        "v_channels": 256,
        "self_attention_widening_factor": 2,
        # Fetch the first frame, match it with the second, think, match again, think.
        "cross_attend_before_blocks": [0, 0, 1],
        "cross_attend_sharing": "none",
        "block_sharing": "none",
        "decoder_num_heads": 4,
        "decoder_qk_channels": 128,
        "decoder_v_channels": 128,
        "decoder_widening_factor": 2,
        "decoder_use_query_residual": True,
        "preprocessor": {
            "kind": "grid",
            "stem": {
                "kind": "patches",
                "in_channels": 3,
                "spatial_downsample": 2,
                "temporal_downsample": 2,
                "project": 32,
                "kernel_size": 10,
                "normalize": True,
            },
            # Fewer and lower bands than there are tokens: of these a distance's square can be made.
            "position": {"kind": "fourier", "num_bands": 8, "max_resolution": [10, 14]},
        },
        "output_query": {"kind": "input"},
        "postprocessor": {"kind": "convex_upsampling", "factor": 2, "channels": 64, "rescale_factor": 1.0},
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


def training_scene(index: int) -> Scene:
    """What pair `index` is drawn from: slow and fast pairs side by side, up to the largest motion."""
    spread = index * 0.6180339887 % 1.0
    return Scene(LARGEST_MOTION * TILE[1] * (0.1 + 0.9 * spread))


def training_pairs(recipe: FlowRecipe, start: int = 0) -> TrainingPairs:
    """The stream of a run, from pair `start` on."""
    bank = TextureBank(seed=recipe.seed, count=recipe.textures)
    pairs = FlowPairs(
        bank,
        height=TILE[0],
        width=TILE[1],
        schedule=training_scene,
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


def train(recipe: FlowRecipe) -> dict[str, Any]:
    """Train from scratch, or go on; write model, processor, metrics, curves and card to the folder. -> the metrics"""
    recipe, output, last = begin(recipe)
    set_seed(recipe.seed)
    model = new_model(recipe, started=last is None)
    collate = FlowCollator(image_processor())
    pairs = validation_pairs(recipe.validation_pairs)
    batches = {name: [collate([_example(p) for p in pairs[part::2]])] for part, name in enumerate(MOTIONS)}
    zero = {name: batch[0]["labels"].norm(dim=-1).mean().item() for name, batch in batches.items()}

    def score(row: dict[str, float]) -> float:
        # Errors as shares of zero flow's: slow pairs count as much as fast ones.
        return -sum(row[name] / zero[name] for name in zero)

    steps, seconds = train_by_clock(
        model,
        recipe,
        output,
        last,
        optimizer=new_optimizer(model, recipe),
        dataset=training_pairs(recipe, start=step_of(last) * recipe.batch_size // 2),
        collator=collate,
        measure=lambda trained: {name: end_point_error(trained, batch) for name, batch in batches.items()},
        score=score,
        show=lambda row: ", ".join(f"{name} {row[name]:.3f} px (zero flow {zero[name]:.3f})" for name in zero),
    )
    return write_result(output, recipe, steps, seconds)


def new_model(recipe: FlowRecipe, *, started: bool = True) -> PerceiverIOForOpticalFlow:
    """Fresh weights that start out matching, or those to start from. started=False leaves the start out."""
    # Eager attention is faster than sdpa on a CPU for arrays this short.
    if recipe.start_from:
        return PerceiverIOForOpticalFlow.from_pretrained(recipe.start_from, attn_implementation="eager")
    config = flow_config()
    config._attn_implementation = "eager"
    model = PerceiverIOForOpticalFlow(config)
    if not started:
        return model
    stream = training_pairs(replace(recipe, textures=min(recipe.textures, 48)))
    batch = FlowCollator(image_processor())([e for i in range(16) for e in stream.examples(10**6 + i)])
    start_matching(model, LATENT_GRID, batch["pixel_values"])
    return model


def new_optimizer(model: torch.nn.Module, recipe: FlowRecipe) -> torch.optim.Optimizer:
    """LAMB or AdamW; biases, norms and latents do not decay."""
    decayed: list[Tensor] = []
    kept: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (decayed if parameter.ndim >= 2 and "latents" not in name else kept).append(parameter)
    groups = [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    if recipe.optimizer == "lamb":
        return Lamb(groups, lr=recipe.rate, **AS_DEEPMIND)
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
    best = output / BEST
    image_processor().save_pretrained(best)
    metrics: dict[str, Any] = {
        **run_facts(PerceiverIOForOpticalFlow.from_pretrained(best), recipe, steps, seconds),
        "held_out": evaluate(best, count=4 if recipe.smoke_test else HELD_OUT_PAIRS),
    }
    publish_best(output)
    write_text(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    draw_curves(output)
    write_text(output / "README.md", model_card(metrics))
    return metrics


def draw_curves(output: Path) -> None:
    """curves.png of learning_curve.csv."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_course(output)
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name in MOTIONS:
        axes.plot([row["step"] for row in rows], [row[name] for row in rows], label=f"validation, {name}")
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
PyTorch {metrics["torch"]}. {recipe["optimizer"].upper()}, learning rate {rate:g}, falling as a cosine. No augmentation, and
each scene both ways, up to scene {first:,}; then augmentation that grows to severity {recipe["max_severity"]:g} over
{recipe["augment_over"]:,} scenes. Loss: the end-point error. The weights are those that did best on validation pairs, which
are neither trained on nor held out. They start out matching patches, see `hf_perceiver.training.flow_start`; step 0 of
the curves is that start. All settings: `metrics.json`; the course: `learning_curve.csv`.

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


def _open(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")


if __name__ == "__main__":
    main()
