"""What 8-bit weights cost in accuracy and save in time on a CPU: `python -m hf_perceiver.training.quantization`.

Each bundled checkpoint is measured as its card does it, on held-out data, in float32, bfloat16 and quantised; the time
is that of one such measurement, the fastest of interleaved repeats. `--full-size` adds the released language model's
sizes with random weights: how far its logits move, and the time of 2,048 bytes.

Only the latents' self-attention is quantised. Most of the time goes there, and the two large cross-attentions keep the
cheaper forms of fast_reading.py and fast_writing.py, which need plain weights. Needs torchao for two of the schemes.
"""

import argparse
import copy
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from ..bundled import bundled_checkpoint
from ..flow_metrics import FlowMetrics
from ..heads_multimodal import PerceiverIOForMultimodalAutoencoding
from ..heads_text import PerceiverIOForMaskedLM
from ..heads_vision import PerceiverIOForImageClassification, PerceiverIOForOpticalFlow
from ..image_processing_perceiver_io import PerceiverIOFlowImageProcessor
from ..recipes import language_bytes
from .documentation import Documentation, read_documentation
from .flow import MOTIONS, held_out_pairs, predict_flow
from .train_digits import accuracy, load_digits
from .train_language import MAX_LENGTH, evaluate_model, evaluation_sets
from .video import held_out_clips, measure

Measure = Callable[[Any], float]


def is_of_tower(module: nn.Module, name: str) -> bool:
    """Whether a module is a linear layer of the latents' self-attention; for torchao's `quantize_`."""
    return isinstance(module, nn.Linear) and ".blocks." in f".{name}"


def quantize_with_torchao(model: Any, kind: str) -> Any:
    try:
        import torchao.quantization as torchao
    except ImportError as error:
        raise ValueError("int8 weights and int8 torchao need torchao: pip install torchao") from error
    torchao.quantize_(model, getattr(torchao, kind)(), filter_fn=is_of_tower)
    return model


def quantize_with_torch(model: Any) -> Any:
    """8-bit activations and weights by PyTorch's own CPU kernels, a scale for each output channel.

    Source: torch.ao.quantization, which PyTorch means to drop some day in favour of torchao.
    """
    with warnings.catch_warnings():
        # Of the module, and once more of the type that its weights are stored in.
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.filterwarnings("ignore", message=".*quantized tensor creation functions", category=UserWarning)
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        names = [name for name, module in model.named_modules() if is_of_tower(module, name)]
        return quantize_dynamic(model, dict.fromkeys(names, per_channel_dynamic_qconfig), torch.qint8, inplace=True)


SCHEMES: dict[str, Callable[[Any], Any]] = {
    "float32": lambda model: model,
    "bfloat16": lambda model: model.to(torch.bfloat16),
    "int8-weights": lambda model: quantize_with_torchao(model, "Int8WeightOnlyConfig"),
    "int8-torchao": lambda model: quantize_with_torchao(model, "Int8DynamicActivationInt8WeightConfig"),
    "int8-torch": quantize_with_torch,
}


def quantize(model: Any, scheme: str) -> Any:
    """A copy of a float32 model by one of SCHEMES. Raises ValueError for another, and where torchao is missing."""
    if scheme not in SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; there are: {', '.join(SCHEMES)}")
    return SCHEMES[scheme](copy.deepcopy(model).eval())


@dataclass(frozen=True)
class Task:
    """A checkpoint's head, what is measured of it, and how: prepare(folder, count) reads the held-out data once."""

    head: type
    metric: str
    prepare: Callable[[Path, int], Measure]


def of_language(folder: Path, count: int) -> Measure:
    return language_measure(read_documentation(), count)


def language_measure(documentation: Documentation, count: int) -> Measure:
    windows, masked = evaluation_sets(documentation, MAX_LENGTH, count)["single"]
    return lambda model: evaluate_model(model, windows, masked)["bytes"]


def of_digits(folder: Path, count: int) -> Measure:
    data = load_digits()
    images, labels = data["test_images"], data["test_labels"]
    return lambda model: accuracy(model, images, labels)


def of_flow(folder: Path, count: int) -> Measure:
    processor = PerceiverIOFlowImageProcessor.from_pretrained(folder)
    pairs = held_out_pairs(MOTIONS["small motion"], count=count)

    def end_point_error(model: Any) -> float:
        metrics = FlowMetrics()
        for pair in pairs:
            metrics.update(predict_flow(model, processor, *pair.frames), pair.flow)
        return metrics.per_pixel()["epe"]  # type: ignore[return-value]

    return end_point_error


def of_video(folder: Path, count: int) -> Measure:
    clips = held_out_clips(count)
    return lambda model: measure(model, clips)["video"]


TASKS = {
    "digits": Task(PerceiverIOForImageClassification, "accuracy", of_digits),
    "language": Task(PerceiverIOForMaskedLM, "accuracy of masked bytes", of_language),
    "flow": Task(PerceiverIOForOpticalFlow, "end-point error, pixels", of_flow),
    "video": Task(PerceiverIOForMultimodalAutoencoding, "PSNR, dB", of_video),
}


def full_size_model() -> PerceiverIOForMaskedLM:
    """The released language model's sizes, weights drawn so that every layer matters."""
    model = PerceiverIOForMaskedLM(language_bytes()).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.normal_(std=module.in_features**-0.5, generator=generator)
    return model


@torch.no_grad()
def of_full_size(model: Any) -> Measure:
    """Distance of the logits to the float32 model's, over their length."""
    tokens = torch.randint(6, 262, (1, 2048), generator=torch.Generator().manual_seed(1))
    wanted = model(input_ids=tokens).logits

    @torch.no_grad()
    def distance(other: Any) -> float:
        return float((other(input_ids=tokens).logits.float() - wanted).norm() / wanted.norm())

    return distance


def compare(
    model: Any, measure: Measure, schemes: Sequence[str], repeats: int, title: str
) -> dict[str, dict[str, float]]:
    """{scheme: {"value": what is measured, "seconds": fastest measurement, "megabytes": of weights}}"""
    models = {scheme: quantize(model, scheme) for scheme in schemes}
    rows = {s: {"value": 0.0, "seconds": float("inf"), "megabytes": weight_bytes(m) / 1e6} for s, m in models.items()}
    with tqdm(total=(repeats + 1) * len(models), desc=title, file=sys.stderr) as progress:
        for repeat in range(repeats + 1):
            for scheme, quantized in models.items():
                start = time.perf_counter()
                rows[scheme]["value"] = measure(quantized)
                if repeat:  # the first one warms up
                    rows[scheme]["seconds"] = min(rows[scheme]["seconds"], time.perf_counter() - start)
                progress.update()
    return rows


def weight_bytes(model: Any) -> int:
    """Of all tensors in the state dict, packed ones unpacked, shared ones once."""
    found: dict[int, int] = {}

    def add(value: Any) -> None:
        if isinstance(value, (tuple, list)):
            for inner in value:
                add(inner)
        elif isinstance(value, torch.Tensor):
            parts = value.__tensor_flatten__()[0] if hasattr(value, "__tensor_flatten__") else []
            for part in parts:
                add(getattr(value, part))
            if not parts:
                found[value.data_ptr()] = value.numel() * value.element_size()

    for value in model.state_dict().values():
        add(value)
    return sum(found.values())


def table(rows: dict[str, dict[str, float]], metric: str) -> str:
    seconds = rows["float32"]["seconds"] if "float32" in rows else None
    lines = [f"{'':<14}{metric:>26}{'seconds':>10}{'ratio':>8}{'MB':>8}"]
    for scheme, row in rows.items():
        ratio = "-" if seconds is None else f"{seconds / row['seconds']:.2f}"
        lines.append(f"{scheme:<14}{row['value']:>26.4f}{row['seconds']:>10.3f}{ratio:>8}{row['megabytes']:>8.1f}")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoints", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--schemes", nargs="+", choices=list(SCHEMES), default=list(SCHEMES))
    parser.add_argument("--count", type=int, default=64, help="held-out windows, pairs and clips; all digits are read")
    parser.add_argument("--repeats", type=int, default=3, help="timed measurements of each")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--full-size", action="store_true", help="the released language model's sizes too; 4 GB, minutes"
    )
    given = parser.parse_args(arguments)
    for name in ("count", "repeats", "threads"):
        if getattr(given, name) < 1:
            parser.error(f"--{name} {getattr(given, name)}: at least 1")
    torch.set_num_threads(given.threads)
    for name in given.checkpoints:
        folder, task = Path(bundled_checkpoint(name)), TASKS[name]
        model = task.head.from_pretrained(folder, dtype=torch.float32)  # type: ignore[attr-defined]
        rows = compare(model, task.prepare(folder, given.count), given.schemes, given.repeats, name)
        print(f"\n{name}\n{table(rows, task.metric)}", flush=True)
    if given.full_size:
        model = full_size_model()
        rows = compare(model, of_full_size(model), given.schemes, given.repeats, "language, full size")
        print(f"\nlanguage, full size, random weights\n{table(rows, 'error of the logits')}")


if __name__ == "__main__":
    main()
