"""Permuted pixels, as in the first Perceiver paper (section 4.1), on scikit-learn's digits: who still learns?

    python -m hf_perceiver.training.permuted_digits --output_dir DIR [--epochs 10] [--seeds 0 1 2]

A third of the bundled digits model, and a small convolutional network, with true and with permuted pixels, on the same
four fifths, measured on the fifth that is held out. Runs that are there already are not repeated.
"""

import argparse
import csv
import io
import itertools
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import set_seed

from ..heads_vision import PerceiverIOForImageClassification
from ..position_encoding import FourierPositionEncoding
from ..stems import draw_permutation
from .image_augmentation import GentleAugmentation
from .image_classification import (
    ImageArguments,
    ImageTrainer,
    ImageTrainingArguments,
    PictureCollator,
    TrainingCollator,
    image_trainer,
    open_processor,
)
from .image_data import read_digits
from .recipe import run
from .storage import write_text
from .train_digits import digits_config

PERCEIVER, CONVOLUTIONS = "Perceiver", "convolutions"
# What is trained on which pixels: positions made before they are permuted (the paper's), or after.
VARIANTS = (
    (PERCEIVER, "none"),
    (PERCEIVER, "pixels_and_positions"),
    (PERCEIVER, "pixels"),
    (CONVOLUTIONS, "none"),
    (CONVOLUTIONS, "pixels_and_positions"),
)
PIXELS = {
    "none": "true",
    "pixels_and_positions": "permuted, with their positions",
    "pixels": "permuted, positions in place",
}
SEEDS = (0, 1, 2)
EPOCHS = 10
PERMUTATION_SEED = 1
COLUMNS = ("model", "pixels", "seed", "epoch", "top1")


class ConvolutionalNetwork(nn.Module):
    """Three 3x3 convolutions and an average, of pixels and their Fourier codes: (B, 3, 8, 8) -> (B, 10)

    The contrast: as the paper's ResNet, it is told where each pixel was, but looks at neighbours in the array.
    """

    def __init__(self) -> None:
        super().__init__()
        self.position = FourierPositionEncoding(num_bands=8, max_resolution=[8, 8])
        widths = (3 + self.position.channels, 32, 64, 64)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], 10))

    def forward(self, pixel_values: Tensor, input_coordinates: Tensor, labels: Tensor) -> dict[str, Tensor]:
        code = self.position.encode_at(input_coordinates, dtype=pixel_values.dtype)
        places = code.dense(0, code.length).transpose(1, 2).unflatten(-1, pixel_values.shape[-2:])
        logits = self.layers(torch.cat([pixel_values, places.expand(len(pixel_values), -1, -1, -1)], dim=1))
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


def perceiver() -> PerceiverIOForImageClassification:
    """The bundled model with 16 latents of 64 channels and one self-attend after each read, 0.13 M parameters."""
    config = digits_config()
    narrow = dict.fromkeys(("d_latents", "qk_channels", "v_channels", "decoder_qk_channels", "decoder_v_channels"), 64)
    config.update({**narrow, "num_latents": 16, "num_self_attends_per_block": 1})
    config.output_query = {"kind": "tasks", "channels": 64}
    config.problem_type = "single_label_classification"
    return PerceiverIOForImageClassification(config)


def run_one(name: str, permute: Any, seed: int, epochs: int, output: Path) -> list[dict[str, Any]]:
    """Train one model, unless its folder is there already; -> rows of COLUMNS, its held-out accuracy by epoch."""
    if not (output / "metrics.json").is_file():
        arguments = ImageTrainingArguments(
            output_dir=str(output),
            seed=seed,
            num_train_epochs=epochs,
            optimizer="adamw",
            learning_rate=3e-3,
            flat_share=0.0,
            warmup_steps=0.1,
            weight_decay=0.05,
            max_grad_norm=1.0,
            label_smoothing_factor=0.0,
            per_device_train_batch_size=64,
            per_device_eval_batch_size=360,
            eval_strategy="steps",
            eval_steps=46,  # 23 steps are an epoch
            save_strategy="no",
            report_to=[],
            use_cpu=True,
        )
        set_seed(seed)
        train, held_out = read_digits()
        processor = open_processor(None, None, "digits")
        if name == CONVOLUTIONS:
            permutation = torch.arange(64) if permute == "none" else draw_permutation(64, PERMUTATION_SEED)
            trainer = ImageTrainer(
                ConvolutionalNetwork(),
                args=arguments,
                train_dataset=train,
                eval_dataset=held_out,
                data_collator=PictureCollator(processor, 10, permutation),
                train_collator=TrainingCollator(processor, 10, permutation, augment=GentleAugmentation()),
            )
        else:
            images = ImageArguments(
                dataset="digits", augmentation="gentle", mix="none", permute=permute, permute_seed=PERMUTATION_SEED
            )
            trainer = image_trainer(perceiver(), processor, arguments, train, held_out, images)
        run(trainer, None)
    curve = csv.DictReader(io.StringIO((output / "learning_curve.csv").read_text()))
    measured = {round(float(row["epoch"])): float(row["eval_top1"]) for row in curve if row["eval_top1"]}
    return [
        dict(zip(COLUMNS, (name, PIXELS[permute], seed, epoch, top1), strict=True)) for epoch, top1 in measured.items()
    ]


def summary(rows: list[dict[str, Any]]) -> str:
    """A Markdown table of the accuracies after the last epoch: each seed's, and their mean."""
    last = max(row["epoch"] for row in rows)
    lines = ["| model | pixels | held-out accuracy by seed | mean |", "|---|---|---|---|"]
    for name, permute in VARIANTS:
        final = [r["top1"] for r in rows if (r["model"], r["pixels"], r["epoch"]) == (name, PIXELS[permute], last)]
        if final:
            seeds = ", ".join(f"{top1:.1%}" for top1 in final)
            lines.append(f"| {name} | {PIXELS[permute]} | {seeds} | {sum(final) / len(final):.1%} |")
    return "\n".join(lines)


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """The curves as a picture: means over the seeds, and their range."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    names = list(dict.fromkeys(name for name, _ in VARIANTS))
    colours = dict(zip(PIXELS.values(), ("tab:blue", "tab:orange", "tab:green"), strict=True))
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names, strict=True):
        for pixels, colour in colours.items():
            curves: dict[int, list[float]] = {}
            for row in rows:
                if (row["model"], row["pixels"]) == (name, pixels):
                    curves.setdefault(int(row["epoch"]), []).append(row["top1"])
            if not curves:
                continue
            epochs = sorted(curves)
            mean = [sum(curves[n]) / len(curves[n]) for n in epochs]
            dashed = "--" if pixels == PIXELS["pixels_and_positions"] else "-"
            axes.plot(epochs, mean, dashed, color=colour, label=f"{pixels}: {mean[-1]:.1%}")
            low, high = [min(curves[n]) for n in epochs], [max(curves[n]) for n in epochs]
            axes.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.set(title=name, xlabel="epoch", ylim=(0.4, 1.0))
        if axes.lines:
            axes.legend(loc="lower right", fontsize=8, title="pixels")
    figure.axes[0].set_ylabel("held-out accuracy")
    partial = path.with_name(path.stem + ".partial.png")
    figure.savefig(partial, dpi=80, metadata={"Software": None})
    os.replace(partial, path)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="folder for every run, the figures and the picture"
    )
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    given = parser.parse_args(arguments)
    rows: list[dict[str, Any]] = []
    for name, permute in VARIANTS:
        for seed in given.seeds:
            folder = given.output_dir / f"{name.replace(', ', '-').lower()}-{permute}-{seed}"
            rows += run_one(name, permute, seed, given.epochs, folder)
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(given.output_dir / "curves.csv", text.getvalue())
    draw(rows, given.output_dir / "curves.png")
    result = summary(rows)
    write_text(given.output_dir / "results.md", result + "\n")
    print(json.dumps({"epochs": given.epochs, "seeds": list(given.seeds)}))
    print(result)


if __name__ == "__main__":
    main()
