"""Learning curves of the three initialisers on text, images and flow: small models, the same data and seeds for each.

    python -m hf_perceiver.training.initialization_curves --output DIR [--tasks text images flow] [--seeds 0 1]

text: 15 % of the bytes of 64-byte windows of the standard library's documentation are masked; share told right.
images: scikit-learn's 8x8 digits, read pixel by pixel; share of the held-out fifth told right.
flow: pairs of 12x16 tiles whose texture is shifted by up to 1.5 pixels; mean end-point error, other textures.

What a step draws depends on (seed, step) alone, so the initialisers see the same batches in the same order. Writes
`learning_curves.csv` after each run, and a picture for each task; runs that the file already holds are not repeated.
"""

import argparse
import csv
import io
import math
import os
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..configuration_perceiver_io import PerceiverIOConfig
from ..heads_text import PerceiverIOForMaskedLM
from ..heads_vision import PerceiverIOForImageClassification, PerceiverIOForOpticalFlow
from .storage import write_text

INITIALIZERS = ("deepmind", "normal", "position_aligned")
TABLE = "learning_curves.csv"
COLUMNS = ("task", "initializer", "seed", "step", "loss", "score")
HELD_OUT_SEED = 900_000  # never a run's
EVALUATIONS = 10  # in a run, spread evenly
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Data:
    """batch: (seed, step) -> what a model is trained on; score: of a model, on data that is never trained on."""

    batch: Callable[[int, int], Batch]
    score: Callable[[Any], float]


@dataclass(frozen=True)
class Task:
    """What is learned, by which head, for how many steps; score: what is measured."""

    head: type
    config: Callable[[], PerceiverIOConfig]
    load: Callable[[], Data]
    steps: int
    learning_rate: float
    score: str


def text_config() -> PerceiverIOConfig:
    """32 latents of 128 channels for 64 bytes, 3 self-attends, 0.56 M parameters."""
    position = {"kind": "fourier", "num_bands": 16, "max_resolution": [64], "rule": "index"}
    return PerceiverIOConfig(
        num_latents=32,
        d_latents=128,
        num_self_attends_per_block=3,
        qk_channels=128,
        v_channels=128,
        decoder_qk_channels=128,
        decoder_v_channels=128,
        decoder_use_query_residual=True,
        preprocessor={"kind": "text", "channels": 95, "position": position, "combine": "concat"},
        output_query={"kind": "position", "position": dict(position), "concat_input": True},
        postprocessor={"kind": "tokens", "tied": False},
        tie_word_embeddings=False,
    )


def flow_config() -> PerceiverIOConfig:
    """48 latents of 128 channels for 12x16 pixels with their 3x3 neighbours, 2 self-attends, 0.41 M parameters."""
    stem = {"kind": "patches", "in_channels": 27, "temporal_downsample": 2, "project": 94}
    return PerceiverIOConfig(
        num_latents=48,
        d_latents=128,
        num_self_attends_per_block=2,
        qk_channels=128,
        v_channels=128,
        decoder_qk_channels=128,
        decoder_v_channels=128,
        decoder_use_query_residual=True,
        preprocessor={
            "kind": "grid",
            "stem": stem,
            "position": {"kind": "fourier", "num_bands": 8, "max_resolution": [12, 16]},
        },
        output_query={"kind": "input"},
        postprocessor={"kind": "flow", "rescale_factor": 1.0, "num_loss_points": 64},
    )


def image_config() -> PerceiverIOConfig:
    """That of the bundled digits."""
    from .train_digits import digits_config

    return digits_config()


def load_text(batch_size: int = 32, held_out: int = 384) -> Data:
    from .byte_masking import IGNORED, ByteMasker, WindowSampler, held_out_windows, mask_bytes
    from .documentation import read_documentation

    documentation = read_documentation(packages=())
    sampler = WindowSampler([d.text for d in documentation.train], 62)
    masker = ByteMasker(64)

    def batch(seed: int, step: int) -> Batch:
        rng = np.random.default_rng([seed, step])
        windows = sampler.sample(batch_size, rng)
        return masker(windows, mask_bytes(windows, 0.15, rng))

    windows = held_out_windows([d.text for d in documentation.held_out], 62, held_out, HELD_OUT_SEED)
    shown = masker(windows, mask_bytes(windows, 0.15, np.random.default_rng(HELD_OUT_SEED)))
    labels = shown.pop("labels")

    def score(model: Any) -> float:
        told, asked = model(**shown).logits.argmax(-1), labels != IGNORED
        return (told[asked] == labels[asked]).float().mean().item()

    return Data(batch, score)


def load_images(batch_size: int = 32) -> Data:
    from .train_digits import accuracy, augment, load_digits, to_pixels

    digits = load_digits()
    pixels, labels = to_pixels(digits["train_images"]), torch.from_numpy(digits["train_labels"])

    def batch(seed: int, step: int) -> Batch:
        drawn = torch.from_numpy(np.random.default_rng([seed, step]).integers(len(labels), size=batch_size))
        generator = torch.Generator().manual_seed(1_000_003 * seed + step)
        return {"pixel_values": augment(pixels[drawn], generator), "labels": labels[drawn]}

    return Data(batch, lambda model: accuracy(model, digits["test_images"], digits["test_labels"]))


def load_flow(batch_size: int = 32, held_out: int = 192) -> Data:
    from ..image_processing_perceiver_io import PerceiverIOFlowImageProcessor
    from .flow_synthesis import HELD_OUT_FAMILIES, PHOTOS, FlowPair, FlowPairs, Scene, TextureBank

    processor = PerceiverIOFlowImageProcessor(
        tile_size={"height": 12, "width": 16}, min_overlap=4, contrast_normalize=True
    )
    bank = TextureBank(seed=0, count=32)
    shift = Scene(1.5, max_layers=0, affine=0.0, smooth=0.0)

    def pairs(bank: TextureBank, seed: int) -> FlowPairs:
        return FlowPairs(bank, height=12, width=16, schedule=lambda index: shift, seed=seed)

    def collate(drawn: list[FlowPair]) -> Batch:
        frames = processor([(pair.frames[0], pair.frames[1]) for pair in drawn], return_tensors="pt")
        return {**frames, "labels": torch.from_numpy(np.stack([pair.flow for pair in drawn]))}

    def batch(seed: int, step: int) -> Batch:
        source = pairs(bank, seed)
        return collate([source.pair(step * batch_size + i) for i in range(batch_size)])

    others = TextureBank(seed=HELD_OUT_SEED, count=16, photos=PHOTOS[1:], families=HELD_OUT_FAMILIES)
    shown = collate([pairs(others, HELD_OUT_SEED).pair(i) for i in range(held_out)])

    def score(model: Any) -> float:
        flow = model(pixel_values=shown["pixel_values"]).logits * model.perceiver.postprocessor.scale_factor
        return (flow - shown["labels"]).norm(dim=-1).mean().item()

    return Data(batch, score)


TASKS = {
    "text": Task(PerceiverIOForMaskedLM, text_config, load_text, 350, 1.5e-3, "held-out masked bytes told right"),
    "images": Task(
        PerceiverIOForImageClassification, image_config, load_images, 250, 1.5e-3, "held-out digits told right"
    ),
    "flow": Task(PerceiverIOForOpticalFlow, flow_config, load_flow, 400, 2e-3, "end-point error, pixels"),
}


def run(task: Task, data: Data, initializer: str, seed: int, steps: int) -> list[dict[str, float]]:
    """Train one model; rows of step, mean loss since the last row (at step 0 the first batch's) and held-out score."""
    config = task.config()
    config.initializer = initializer  # type: ignore[assignment]
    torch.manual_seed(seed)
    model = task.head(config)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}], lr=task.learning_rate
    )
    warmup = max(steps // 20, 1)
    torch.manual_seed(seed)  # what is drawn in training, whatever the initialiser has drawn
    rows: list[dict[str, float]] = []
    losses: list[float] = []
    shown = {round(steps * i / EVALUATIONS) for i in range(1, EVALUATIONS + 1)}
    progress = tqdm(range(1, steps + 1), desc=f"{initializer}, seed {seed}", file=sys.stderr)
    for step in progress:
        for group in optimizer.param_groups:
            # Up, level, and down to nothing over the last quarter.
            left = min(4 * (steps - step + 1) / steps, 1.0)
            group["lr"] = task.learning_rate * min(step / warmup, 1.0) * left
        model.train()
        loss = model(**data.batch(seed, step)).loss
        losses.append(loss.item())
        if not math.isfinite(losses[-1]):
            raise ValueError(f"the loss is {losses[-1]} at step {step} of initializer={initializer!r}, seed {seed}")
        if step == 1:
            rows.append({"step": 0, "loss": losses[0], "score": _score(model, data)})
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in shown:
            rows.append({"step": step, "loss": statistics.fmean(losses), "score": _score(model, data)})
            progress.set_postfix(loss=f"{rows[-1]['loss']:.3f}", score=f"{rows[-1]['score']:.3f}")
            losses = []
    return rows


@torch.no_grad()
def _score(model: Any, data: Data) -> float:
    model.eval()
    return data.score(model)


def compare(output: Path, tasks: Sequence[str], seeds: Sequence[int], steps: int | None = None) -> list[dict[str, Any]]:
    """Run what `output` does not hold yet, write the table and the pictures, return all rows."""
    rows = read_table(output / TABLE)
    for name in tasks:
        task = TASKS[name]
        wanted = [(initializer, seed) for seed in seeds for initializer in INITIALIZERS]
        count = task.steps if steps is None else steps
        missing = [w for w in wanted if not any(_of(row, name, *w) and row["step"] == count for row in rows)]
        data = task.load() if missing else None
        for initializer, seed in missing:
            made = run(task, data, initializer, seed, count)  # type: ignore[arg-type]
            rows = [row for row in rows if not _of(row, name, initializer, seed)]
            rows += [{"task": name, "initializer": initializer, "seed": seed, **row} for row in made]
            write_table(output / TABLE, rows)
        plot(output / f"init_{name}.png", [row for row in rows if row["task"] == name], task)
    return rows


def _of(row: dict[str, Any], task: str, initializer: str, seed: int) -> bool:
    return (row["task"], row["initializer"], row["seed"]) == (task, initializer, seed)


def read_table(path: Path) -> list[dict[str, Any]]:
    """The rows of an earlier run, [] where there is none; ValueError for another file."""
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} has the columns {reader.fieldnames}, not {list(COLUMNS)}; choose another folder")
        kinds: tuple[Any, ...] = (str, str, int, int, float, float)
        return [{name: kind(row[name]) for name, kind in zip(COLUMNS, kinds, strict=True)} for row in reader]


def write_table(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """All rows as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: f"{v:.5g}" if isinstance(v, float) else v for name, v in row.items()})
    write_text(path, text.getvalue())


def plot(path: Path, rows: Sequence[dict[str, Any]], task: Task) -> None:
    """One task's curves: a line for each seed, a strong one for their median."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for initializer, color in zip(INITIALIZERS, ("tab:blue", "tab:gray", "tab:orange"), strict=True):
        own = [row for row in rows if row["initializer"] == initializer]
        curves = [[row for row in own if row["seed"] == seed] for seed in sorted({row["seed"] for row in own})]
        for curve in curves:
            axes.plot([r["step"] for r in curve], [r["score"] for r in curve], color=color, linewidth=0.8, alpha=0.5)
        if curves:
            median = [statistics.median(r["score"] for r in at) for at in zip(*curves, strict=False)]
            axes.plot([r["step"] for r in curves[0]][: len(median)], median, color=color, label=initializer)
    axes.set(xlabel="step", ylabel=task.score, ylim=(0, None))
    axes.legend(title="initializer")
    partial = path.with_suffix(".partial.png")
    figure.savefig(partial, dpi=100, metadata={"Software": None})
    os.replace(partial, path)


def summary(rows: Sequence[dict[str, Any]]) -> str:
    """The last score of each run, a line for each task and initialiser."""
    lines = []
    for name, task in TASKS.items():
        for initializer in INITIALIZERS:
            own = [row for row in rows if (row["task"], row["initializer"]) == (name, initializer)]
            if own:
                last = max(row["step"] for row in own)
                scores = [f"{row['score']:.3f}" for row in own if row["step"] == last]
                lines.append(f"{name:<8}{initializer:<18}{task.score} after {last} steps: {', '.join(scores)}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the table and the pictures")
    parser.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="of weights and training data")
    parser.add_argument("--steps", type=int, help="of each run; by default each task's own")
    parser.add_argument("--smoke-test", action="store_true", help="a few steps of each, to see that all works")
    given = parser.parse_args(arguments)
    steps = 4 if given.smoke_test else given.steps
    if steps is not None and steps < 1:
        parser.error(f"--steps {steps}: at least 1")
    if any(not 0 <= seed < HELD_OUT_SEED for seed in given.seeds):
        parser.error(f"--seeds {given.seeds}: each from 0 to {HELD_OUT_SEED - 1}")
    print(summary(compare(given.output, given.tasks, given.seeds, steps)))


if __name__ == "__main__":
    main()
