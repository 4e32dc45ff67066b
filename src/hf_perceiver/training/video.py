"""Train a multimodal autoencoder on generated clips: video, sound and label in, all three out.

    python -m hf_perceiver.training.video --output DIR --minutes 60
    python -m hf_perceiver.training.video --resume DIR
    python -m hf_perceiver.training.video --evaluate DIR
    python -m hf_perceiver.training.video --output DIR --smoke-test

As in Perceiver IO (4.3): a weighted L1 on video, an L1 on sound, cross-entropy on the label, at points that are drawn
anew in every step; the label is masked half of the time in training, and always afterwards. Clips are made by
`clip_synthesis`, and the start is local, see `block_start`. The learning rate rises, then falls as a cosine; `--minutes`
lets it fall with the time that is left, `--steps` with the steps. Batch k of the clips depends on (seed, k) alone.
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import HfArgumentParser, set_seed

from ..configuration_perceiver_io import PerceiverIOConfig
from ..feature_extraction_perceiver_io import PerceiverIOFeatureExtractor
from ..heads_multimodal import PerceiverIOForMultimodalAutoencoding
from ..processing_perceiver_io import PerceiverIOProcessor
from ..video_processing_perceiver_io import PerceiverIOVideoProcessor
from .block_start import start_from_blocks
from .clip_synthesis import CLASSES, FRAMES_PER_SECOND, MOTIONS, SHAPES, TEXTURES, Clips, ClipShape, make_clips
from .modalities import ModalityCollator
from .recipe import AS_DEEPMIND, Lamb
from .storage import write_text
from .timed_run import BEST, begin, publish_best, read_course, run_facts, step_of, train_by_clock

CLIP = ClipShape(num_frames=16, size=32, samples_per_frame=320)
SAMPLES_PER_PATCH = 160
WIDTH = 128  # of the latents
# By compression: blocks of the video over t, y and x, stretches of sound, and how wide the decoder's MLP must be for them.
COMPRESSIONS = {88: ((4, 4, 4), 8, 4), 176: ((2, 4, 4), 4, 7), 352: ((1, 4, 4), 2, 13)}
HELD_OUT_CLIPS, HELD_OUT_SEED, VALIDATION_SEED = 256, 30_000, 40_000
RATES = {"adamw": 3e-4, "lamb": 1e-3}


@dataclass
class VideoRecipe:
    """What a run depends on. Written to recipe.json, which --resume reads."""

    output: str | None = field(default=None, metadata={"help": "folder to write; must be new or empty"})
    resume: str | None = field(default=None, metadata={"help": "folder of an interrupted run to go on with"})
    evaluate: str | None = field(
        default=None, metadata={"help": "folder of a trained model to measure, beside mean frames and bicubic sampling"}
    )
    smoke_test: bool = field(default=False, metadata={"help": "a run of 20 steps, to see that all works"})
    seed: int = field(default=0, metadata={"help": "of weights and clips"})
    steps: int | None = field(default=None, metadata={"help": "train so many steps"})
    minutes: float | None = field(default=None, metadata={"help": "train so long (60 where no steps are given)"})
    compression: int = field(
        default=88, metadata={"help": "as the paper counts it, 88, 176 or 352: 72, 36 or 18 latents of 128 channels"}
    )
    batch_size: int = field(default=16, metadata={"help": "clips per step; the paper's is 1,024"})
    optimizer: Literal["adamw", "lamb"] = field(
        default="adamw", metadata={"help": "small batches on a CPU learn faster with adamw"}
    )
    learning_rate: float | None = field(
        default=None, metadata={"help": f"default: {RATES['adamw']:g} for adamw, {RATES['lamb']:g} for lamb"}
    )
    thinking_rate: float = field(
        default=3.0, metadata={"help": "the latents' self-attends and the label learn so many times as fast"}
    )
    warmup_steps: int = field(default=200, metadata={"help": "the learning rate rises over so many steps"})
    weight_decay: float = field(default=0.01, metadata={"help": "of matrices"})
    image_weight: float = field(default=1.0, metadata={"help": "of the video's loss; the paper's is 0.03"})
    audio_weight: float = field(default=1.0, metadata={"help": "of the sound's loss; the paper's is 1"})
    label_weight: float = field(default=0.05, metadata={"help": "of the label's loss; the paper's is 0.0001, or 1"})
    pixels: int = field(default=256, metadata={"help": "pixels drawn from each clip; the paper's is 512"})
    start_clips: int = field(default=384, metadata={"help": "clips that the start is fitted to"})
    workers: int = field(default=0, metadata={"help": "processes that make clips beside the training"})
    save_every: int = field(default=250, metadata={"help": "steps between validations, each with a saved state"})
    validation_clips: int = field(default=32, metadata={"help": "clips of each validation"})
    mixed_precision: bool = field(default=True, metadata={"help": "bfloat16 autocast"})

    def __post_init__(self) -> None:
        if sum(where is not None for where in (self.output, self.resume, self.evaluate)) != 1:
            raise ValueError("give one of --output DIR, --resume DIR and --evaluate DIR")
        if self.compression not in COMPRESSIONS:
            raise ValueError(f"compression={self.compression} must be one of {', '.join(map(str, COMPRESSIONS))}")
        for name in ("steps", "minutes", "batch_size", "pixels", "start_clips", "save_every", "validation_clips"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be more than 0")
        if self.smoke_test:
            self.steps, self.minutes, self.batch_size, self.warmup_steps = 20, None, 4, 5
            self.start_clips, self.save_every, self.validation_clips = 24, 10, 4

    @property
    def rate(self) -> float:
        return RATES[self.optimizer] if self.learning_rate is None else self.learning_rate


def video_config(compression: int = 88, **changes: Any) -> PerceiverIOConfig:
    """The bundled model's architecture at a compression; `changes` are fields of the config.

    Queries are 96 channels of position, 128 for what the latents answer, 32 for the number of a patch of sound, and 8 for
    what is made of them.
    """
    blocks, stretches, widening = COMPRESSIONS[compression]
    frames, size = CLIP.num_frames, CLIP.size
    patches = CLIP.num_samples // SAMPLES_PER_PATCH
    fields_: dict[str, Any] = {
        "num_latents": math.prod(blocks) + stretches,
        "d_latents": WIDTH,
        "num_blocks": 1,
        "num_self_attends_per_block": 4,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 8,
        "qk_channels": 128,
        "v_channels": 384,
        "self_attention_widening_factor": 4,
        "cross_attention_widening_factor": 4,
        "decoder_num_heads": 16,
        "decoder_qk_channels": 256,
        "decoder_v_channels": WIDTH,
        "decoder_widening_factor": widening,
        "decoder_use_query_residual": True,
        "id2label": dict(enumerate(CLASSES)),
        "label2id": {name: index for index, name in enumerate(CLASSES)},
        "preprocessor": {
            "kind": "multimodal",
            "min_padding_size": 4,
            "mask_probs": {"image": 0.0, "audio": 0.0, "label": 0.5},
            "masked_at_inference": ["label"],
            "modalities": {
                "audio": {
                    "kind": "grid",
                    "stem": {"kind": "audio_patches", "samples_per_patch": SAMPLES_PER_PATCH},
                    "position": {"kind": "fourier", "num_bands": 16, "max_resolution": [patches], "rule": "sampled"},
                },
                "image": {
                    "kind": "grid",
                    "stem": {
                        "kind": "patches",
                        "in_channels": 3,
                        "temporal_downsample": 2,
                        "spatial_downsample": 4,
                        "project": 48,
                    },
                    "position": {
                        "kind": "fourier",
                        "num_bands": 4,
                        "max_resolution": [frames // 2, size // 4, size // 4],
                        "rule": "sampled",
                    },
                },
                "label": {"kind": "vector", "channels": len(CLASSES)},
            },
        },
        "output_query": {
            "kind": "multimodal",
            "min_padding_size": 8,
            "modalities": {
                "audio": {
                    "kind": "position",
                    "position": {"kind": "trainable", "num_positions": patches, "channels": 96 + WIDTH + patches},
                },
                "image": {
                    "kind": "position",
                    # Whole frequencies up to half the pixels: places within a block are sums of them.
                    "position": {
                        "kind": "fourier",
                        "num_bands": size // 2,
                        "max_resolution": [size, size, size],
                        "rule": "sampled",
                        "concat_pos": False,
                    },
                    "scale": [2, 4, 4],
                },
                "label": {"kind": "tasks", "channels": 64},
            },
        },
        "postprocessor": {
            "kind": "multimodal",
            "modalities": {
                "audio": {"kind": "audio", "samples_per_patch": SAMPLES_PER_PATCH},
                "image": {"kind": "projection", "num_outputs": 3, "on_grid": True},
                "label": {"kind": "classification"},
            },
        },
    }
    return PerceiverIOConfig(**{**fields_, **changes})


def clip_processor() -> PerceiverIOProcessor:
    """Clips of any size and rate -> windows of 16 frames of 32 x 32 pixels at 25 a second, and sound at 8 kHz."""
    return PerceiverIOProcessor(
        PerceiverIOVideoProcessor(
            size={"height": CLIP.size, "width": CLIP.size},
            num_frames=CLIP.num_frames,
            frames_per_second=float(FRAMES_PER_SECOND),
            antialias=True,
        ),
        PerceiverIOFeatureExtractor(sampling_rate=CLIP.sampling_rate, num_samples=CLIP.num_samples),
        num_labels=len(CLASSES),
    )


def psnr(reconstructed: Tensor, original: Tensor, peak: float = 1.0) -> Tensor:
    """(B, ...) twice -> (B,) in dB, 10 log10(peak^2 / mean squared error)"""
    return 10 * torch.log10(peak**2 / (reconstructed - original).square().flatten(1).mean(dim=1))


def mean_frame(image: Tensor) -> Tensor:
    """(B, T, 3, H, W) -> the same, every frame the clip's mean"""
    return image.mean(dim=1, keepdim=True).expand_as(image)


def bicubic(image: Tensor, grid: tuple[int, int]) -> Tensor:
    """Frames and side reduced to `grid`, antialiased, and enlarged again: (B, T, 3, H, W) -> the same, in [0, 1]"""
    frames, side = grid
    batch, length, channels, *size = image.shape
    smaller = _resized(image.flatten(0, 1), (side, side)).unflatten(0, (batch, length))
    # Time as the width of a picture with one row for each value.
    rows = smaller.movedim(1, -1).reshape(batch, 1, -1, length)
    rows = _resized(_resized(rows, (rows.shape[2], frames)), (rows.shape[2], length))
    smaller = rows.reshape(batch, channels, side, side, length).movedim(-1, 1)
    return _resized(smaller.flatten(0, 1), tuple(size)).unflatten(0, (batch, length)).clamp(0, 1)


def bicubic_grids(floats: int, clip: ClipShape = CLIP) -> list[tuple[int, int]]:
    """Ways to store at most that many floats of colour: frames, and the largest side that goes with them."""
    grids: list[tuple[int, int]] = []
    for frames in (16, 12, 8, 6, 4, 3, 2, 1):
        if frames <= clip.num_frames:
            side = min(math.isqrt(floats // (3 * frames)), clip.size)
            if side and not any(other == side and more >= frames for more, other in grids):
                grids.append((frames, side))
    return grids


@torch.no_grad()
def reconstruct(
    model: PerceiverIOForMultimodalAutoencoding, clips: dict[str, Tensor], *, batch_size: int = 8
) -> dict[str, Tensor]:
    """Clips as the model reads them -> image (B, T, 3, H, W) in [0, 1], audio (B, S, 1), label scores (B, classes)

    The label is masked, as it always is outside training, and here not even given.
    """
    was_training = model.training
    model.eval()
    parts: dict[str, list[Tensor]] = {"image": [], "audio": [], "label": []}
    for start in range(0, len(clips["image"]), batch_size):
        inputs = {name: clips[name][start : start + batch_size].to(model.device) for name in ("image", "audio")}
        logits = model(inputs=inputs).logits
        parts["image"].append(logits["image"].float().cpu().movedim(-1, 2).clamp(0, 1))
        parts["audio"].append(logits["audio"].float().cpu()[..., None].clamp(-1, 1))
        parts["label"].append(logits["label"].float().cpu())
    model.train(was_training)
    return {name: torch.cat(values) for name, values in parts.items()}


def measure(model: PerceiverIOForMultimodalAutoencoding, clips: dict[str, Tensor]) -> dict[str, float]:
    """Means over clips of the PSNR of video (peak 1) and sound (peak 2, from -1 to 1), and the label's accuracy."""
    made = reconstruct(model, clips)
    return {
        "video": psnr(made["image"], clips["image"]).mean().item(),
        "audio": psnr(made["audio"], clips["audio"], peak=2.0).mean().item(),
        "label": (made["label"].argmax(-1) == clips["label"]).float().mean().item(),
    }


def baselines(clips: dict[str, Tensor], floats: int) -> dict[str, dict[str, float | None]]:
    """What a model has to beat, measured as `measure` does: mean frame, bicubic sampling of `floats` numbers, silence."""
    image = clips["image"]
    values = {"mean frame of each clip": psnr(mean_frame(image), image)}
    for frames, side in bicubic_grids(floats, CLIP):
        values[f"bicubic, {frames} frames of {side}x{side}"] = psnr(bicubic(image, (frames, side)), image)
    rows: dict[str, dict[str, float | None]] = {
        name: {"video": each.mean().item(), "audio": None, "label": None} for name, each in values.items()
    }
    strictest = torch.stack(list(values.values())).max(dim=0).values
    rows["the best of these for each clip"] = {"video": strictest.mean().item(), "audio": None, "label": None}
    silence = psnr(torch.zeros_like(clips["audio"]), clips["audio"], peak=2.0).mean().item()
    rows["silence"] = {"video": None, "audio": silence, "label": None}
    rows["chance"] = {"video": None, "audio": None, "label": 1 / len(CLASSES)}
    return rows


def held_out_clips(count: int = HELD_OUT_CLIPS) -> dict[str, Tensor]:
    """Clips that training never saw: another seed, and textures of families that it never draws."""
    return _tensors(make_clips(count, HELD_OUT_SEED, split="held_out", shape=CLIP))


def evaluate(directory: Path, *, count: int = HELD_OUT_CLIPS) -> dict[str, Any]:
    """The model as it is stored, and what it has to beat, on the held-out clips; {row: {video, audio, label}}."""
    model = PerceiverIOForMultimodalAutoencoding.from_pretrained(directory)
    clips = held_out_clips(count)
    floats = model.config.num_latents * model.config.d_latents
    return {"this model": measure(model, clips), **baselines(clips, floats)}


def score(row: dict[str, float]) -> float:
    """What the best state is chosen by: dB of video and a fifth of those of sound, and a tenth for each percent of labels."""
    return row["video"] + 0.2 * row["audio"] + 10 * row["label"]


def show(row: dict[str, float]) -> str:
    """A validation's figures for the log."""
    return f"video {row['video']:.2f} dB, audio {row['audio']:.2f} dB, label {row['label']:.1%}"


def train(recipe: VideoRecipe) -> dict[str, Any]:
    """Train from scratch, or go on; write model, processor, metrics, curves and card to the folder. -> the metrics"""
    recipe, output, last = begin(recipe)
    set_seed(recipe.seed)
    model = new_model(recipe, fitted=last is None)
    validated = _tensors(make_clips(recipe.validation_clips, VALIDATION_SEED, shape=CLIP))
    steps, seconds = train_by_clock(
        model,
        recipe,
        output,
        last,
        optimizer=new_optimizer(model, recipe),
        dataset=Clips(recipe.seed, batch_size=recipe.batch_size, start=step_of(last), shape=CLIP),
        collator=ModalityCollator(reconstruct=["audio", "image", "label"]),
        measure=lambda trained: measure(trained, validated),
        score=score,
        show=show,
    )
    return write_result(output, recipe, steps, seconds)


def new_model(recipe: VideoRecipe, *, fitted: bool = True) -> PerceiverIOForMultimodalAutoencoding:
    """Fresh weights with the recipe's losses; `fitted` to a few clips of the training's kind."""
    config = video_config(recipe.compression)
    weights = {"image": recipe.image_weight, "audio": recipe.audio_weight, "label": recipe.label_weight}
    losses = {"loss_weights": weights, "num_loss_points": {"image": recipe.pixels}}
    config.postprocessor = {**(config.postprocessor or {}), **losses}
    config._attn_implementation = "eager"  # faster than sdpa on a CPU for arrays this short
    model = PerceiverIOForMultimodalAutoencoding(config)
    if fitted:
        # A batch number that no run gets to.
        clips = make_clips(recipe.start_clips, recipe.seed, batch=2**40, shape=CLIP)
        start_from_blocks(model, _tensors(clips), COMPRESSIONS[recipe.compression][0])
    return model


def new_optimizer(model: torch.nn.Module, recipe: VideoRecipe) -> torch.optim.Optimizer:
    """AdamW or LAMB; biases, norms and latents do not decay, and what starts from nothing learns faster."""
    groups: dict[tuple[bool, bool], list[Tensor]] = {}
    for name, parameter in model.named_parameters():
        fresh = "encoder.blocks" in name or "cross_attends.0.mlp" in name or "label" in name
        groups.setdefault((fresh, parameter.ndim >= 2 and "latents" not in name), []).append(parameter)
    listed = [
        {
            "params": parameters,
            "lr": recipe.rate * (recipe.thinking_rate if fresh else 1.0),
            "weight_decay": recipe.weight_decay if decayed else 0.0,
        }
        for (fresh, decayed), parameters in groups.items()
    ]
    if recipe.optimizer == "lamb":
        return Lamb(listed, lr=recipe.rate, **AS_DEEPMIND)
    return torch.optim.AdamW(listed, lr=recipe.rate, betas=(0.9, 0.98), fused=True)


def write_result(output: Path, recipe: VideoRecipe, steps: int, seconds: float) -> dict[str, Any]:
    """The best weights with their processor, measured, with curves and card; each file renamed into place whole."""
    best = output / BEST
    clip_processor().save_pretrained(best)
    model = PerceiverIOForMultimodalAutoencoding.from_pretrained(best)
    count = 4 if recipe.smoke_test else HELD_OUT_CLIPS
    set_seed(recipe.seed)
    start = measure(new_model(recipe), held_out_clips(count))
    metrics: dict[str, Any] = {
        **run_facts(model, recipe, steps, seconds),
        "latents": [model.config.num_latents, model.config.d_latents],
        "held_out": {**evaluate(best, count=count), "its start, before any training": start},
    }
    publish_best(output)
    write_text(output / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    draw_curves(output)
    write_text(output / "README.md", model_card(metrics))
    return metrics


def draw_curves(output: Path) -> None:
    """curves.png of learning_curve.csv: PSNR of both streams, and the label's accuracy beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = read_course(output)
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    steps = [row["step"] for row in rows]
    for name in ("video", "audio"):
        left.plot(steps, [row[name] for row in rows], label=name)
    left.set(xlabel="step", ylabel="validation PSNR (dB)")
    left.legend()
    right.plot(steps, [100 * row["label"] for row in rows])
    right.set(xlabel="step", ylabel="validation label accuracy (%)", ylim=(0, 100))
    partial = output / "curves.partial.png"
    figure.savefig(partial, dpi=80, metadata={"Software": None})
    os.replace(partial, output / "curves.png")


def contact_sheet(originals: Any, reconstructions: Any, path: Path, *, frames: int = 8, enlarge: int = 4) -> Path:
    """Clips (B, T, H, W, 3) uint8 twice -> a PNG: for each a row of evenly spaced frames, and its reconstruction below.

    Raises ValueError for clips of different shapes.
    """
    from PIL import Image

    above, below = np.asarray(originals), np.asarray(reconstructions)
    if above.shape != below.shape or above.ndim != 5 or above.shape[-1] != 3 or above.dtype != np.uint8:
        raise ValueError(
            f"clips are (clips, frames, height, width, 3) uint8 twice, not {above.shape} {above.dtype} and {below.shape}"
        )
    shown = np.linspace(0, above.shape[1] - 1, min(frames, above.shape[1])).round().astype(int)
    rows = []
    for one, other in zip(above, below, strict=True):
        for clip in (one, other):
            row = np.concatenate([np.pad(frame, ((0, 1), (0, 1), (0, 0))) for frame in clip[shown]], axis=1)
            rows.append(row.repeat(enlarge, axis=0).repeat(enlarge, axis=1))
        rows.append(np.zeros((2 * enlarge, *rows[-1].shape[1:]), np.uint8))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.stem + ".partial.png")
    Image.fromarray(np.concatenate(rows)).save(partial)
    os.replace(partial, path)
    return path


def table(held_out: dict[str, Any]) -> str:
    """The measurements as a Markdown table."""
    lines = ["| | video PSNR (dB) | sound PSNR (dB) | label accuracy |", "|---|---|---|---|"]
    for name, row in held_out.items():
        video, audio = ("" if row[part] is None else f"{row[part]:.2f}" for part in ("video", "audio"))
        label = "" if row["label"] is None else f"{row['label']:.1%}"
        lines.append(f"| {name} | {video} | {audio} | {label} |")
    return "\n".join(lines)


def model_card(metrics: dict[str, Any]) -> str:
    """README.md of a trained model."""
    recipe, held_out = metrics["recipe"], metrics["held_out"]
    clips = metrics["steps"] * recipe["batch_size"]
    count, width = metrics["latents"]
    floats = count * width
    values = CLIP.num_frames * CLIP.size**2 * 3 + CLIP.num_samples
    rate = RATES[recipe["optimizer"]] if recipe["learning_rate"] is None else recipe["learning_rate"]
    options = [
        f"--{f.name.replace('_', '-')} {recipe[f.name]}"
        for f in fields(VideoRecipe)
        if f.name in recipe and recipe[f.name] != f.default and f.name not in ("steps", "minutes")
    ]
    command = " ".join(["python -m hf_perceiver.training.video --output DIR", *options, f"--steps {metrics['steps']}"])
    to_beat = max(row["video"] for name, row in held_out.items() if name.startswith(("mean", "bicubic")))
    above = held_out["this model"]["video"] - to_beat
    louder = held_out["this model"]["audio"] - held_out["silence"]["audio"]
    note = f"\n{metrics['note']}\n" if "note" in metrics else ""
    trained_on, held_out_textures = (", ".join(TEXTURES[split]) for split in ("train", "held_out"))
    minutes, threads, optimizer = (
        metrics["seconds"] / 60,
        metrics["threads"],
        {"adamw": "AdamW", "lamb": "LAMB"}[recipe["optimizer"]],
    )
    first = held_out["its start, before any training"]
    seen, heard = (held_out["this model"][part] - first[part] for part in ("video", "audio"))
    return f"""---
license: apache-2.0
library_name: transformers
tags: [perceiver, hf-perceiver, video, audio]
---
# A small Perceiver IO autoencoder for video, sound and label

{metrics["parameters"]:,} parameters, stored in bfloat16. It reads {CLIP.num_frames} frames of {CLIP.size} x {CLIP.size} pixels
at {FRAMES_PER_SECOND} a second, with {CLIP.num_samples:,} samples of sound at {CLIP.sampling_rate:,} Hz,
into {count} latents of {width} channels, and gives all of it back, with a label that it was not told.
An example to try the library with: it knows moving textured shapes and their tones, and nothing else. The released model
has 20 million parameters and was trained on Kinetics.

```python
from hf_perceiver import PerceiverIOForMultimodalAutoencoding, PerceiverIOProcessor, bundled_checkpoint

model = PerceiverIOForMultimodalAutoencoding.from_pretrained(bundled_checkpoint("video"))
processor = PerceiverIOProcessor.from_pretrained(bundled_checkpoint("video"))
```

## Measured

{HELD_OUT_CLIPS} held-out clips, from another seed, with textures ({held_out_textures}) of families that training never
draws ({trained_on}). Means over clips; PSNR is 10 log10(peak^2 / MSE), with peak 1 for video in [0, 1]
and peak 2 for sound in [-1, 1]. The label is masked.

{table(held_out)}

Video is {above:.2f} dB above the best of the mean frame and bicubic sampling, sound {louder:.2f} dB above silence.
Bicubic sampling may store as many floats as all the latents hold, {floats:,}, for the video alone: it shrinks space
and time, antialiased, and enlarges them again. Measured by `python -m hf_perceiver.training.video --evaluate DIR`.

The latents hold {values / floats:.1f} times fewer floats than the clip. The paper's {recipe["compression"]}x counts
channels of position and padding too; in values of its clips it is {_paper_ratio(recipe["compression"]):.1f}.

## Data

Made by `hf_perceiver.training.clip_synthesis`: a shape with one texture moves over a background with another. The class
is shape ({", ".join(SHAPES)}) x motion ({", ".join(MOTIONS)}). The tone's pitch range and
timbre follow the shape; its pitch and loudness follow the motion.

## Recipe

{metrics["steps"]:,} steps of {recipe["batch_size"]} clips ({clips:,} in all, each seen once) in {minutes:.0f} minutes
on {threads} CPU thread(s), PyTorch {metrics["torch"]}. {optimizer}, learning rate {rate:g},
{recipe["thinking_rate"]:g} times that for self-attends and label, a cosine.
Loss: {recipe["image_weight"]:g} x L1 of video + {recipe["audio_weight"]:g} x L1 of sound +
{recipe["label_weight"]:g} x cross-entropy of the label, at {recipe["pixels"]} pixels of each clip, all patches of sound,
and the label. The weights are those with the best validation, on other clips of the training's kind.

The start is a linear transform of blocks (`hf_perceiver.training.block_start`): latents look at blocks, values are the
principal components of {recipe["start_clips"]} clips, and the decoder's MLP begins with a unit for each value of a block.
That start is most of the video's reconstruction: before the first step the held-out clips stand at {first["video"]:.2f} dB,
and training changes that by {seen:+.2f} dB, the sound by {heard:+.2f} dB, and the label's accuracy from
{first["label"]:.1%}. Early on training costs video what the label gains, and the falling learning rate wins it back. A
model that started local, but without the transform, was at 13.3 dB of video and 18.8 dB of sound after 140 steps.

```
{command}
```

All settings: `metrics.json`; the course: `learning_curve.csv`.

![validation by step](curves.png)
{note}
## Limits

Video of anything else comes out as far as blocks of generated clips can hold it; the label is one of the
{len(CLASSES)} classes whatever is shown. The start hides the label's input from the latents, so telling the model the label
does not help it. It knows pixels where they are: asked for places between them through `coordinates`, it answers
wrongly; enlarge its frames instead.
"""


def main(arguments: list[str] | None = None) -> None:
    parser = HfArgumentParser(
        VideoRecipe, prog="python -m hf_perceiver.training.video", description=__doc__.split("\n")[0]
    )
    (given,) = parser.parse_args_into_dataclasses(arguments)
    recipe: VideoRecipe = given
    held_out = train(recipe)["held_out"] if recipe.evaluate is None else evaluate(Path(recipe.evaluate))
    print(table(held_out))


def _tensors(clips: dict[str, np.ndarray]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in clips.items()}


def _resized(pictures: Tensor, size: Sequence[int]) -> Tensor:
    if tuple(pictures.shape[-2:]) == tuple(size):
        return pictures
    return F.interpolate(pictures, size=tuple(size), mode="bicubic", antialias=True)


def _paper_ratio(compression: int) -> float:
    """Values of the paper's clip for each float of its latents"""
    latents = {88: 784, 176: 392, 352: 196}[compression]
    return (16 * 224 * 224 * 3 + 30_720) / (latents * 512)


if __name__ == "__main__":
    main()
