"""Time, memory and error of the released architectures, beside transformers' built-in Perceiver if asked:

    python -m hf_perceiver.benchmark --models optical-flow --against builtin --json flow.json

Weights are random, the same on both sides, and rounded to bfloat16 in every dtype. What the two compute is compared
first; a row whose `max_error` is above the bound of its dtype is not timed, has an `error`, and the exit code is 1. Then
both run in turns. Memory is what one run in a process of its own holds at its peak beyond what it held before, with
weights and inputs loaded; where the built-in needs several passes, what one of them holds.

--json writes a list of rows; what was not measured is null:

    model, dtype             what ran
    backend, fast_attention  how: the attention implementation, and the config's `fast_attention`
    seconds                  one example, its whole output: the fastest repeat; median_seconds: the median
    builtin_seconds          the same of the built-in, and builtin_median_seconds
    builtin_dtype            what the built-in ran in: float32 where it fails in `dtype`
    builtin_passes           how many passes it needs; builtin_passes_timed of them are timed, and scaled to all
    ratio                    builtin_seconds / seconds
    max_error, error_bound   the largest difference from the built-in in float32 / the largest value of that output
    memory, builtin_memory   bytes; memory_ratio = memory / builtin_memory
    error                    why the row is incomplete
    sizes, repeats, threads, device, torch, transformers     what it was measured on
"""

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from tqdm import tqdm
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .arrays import InputArray, QueryArray
from .builtin import builtin_config, export_builtin
from .checkpoint_names import apply_numerics
from .configuration_perceiver_io import PerceiverIOConfig
from .heads_multimodal import PerceiverIOForMultimodalAutoencoding
from .heads_text import PerceiverIOForMaskedLM
from .heads_vision import PerceiverIOForImageClassification, PerceiverIOForOpticalFlow
from .recipes import (
    imagenet_conv,
    imagenet_fourier,
    imagenet_learned,
    language_bytes,
    multimodal_autoencoder,
    optical_flow,
)

# Two right answers differ by about 1e-5 in float32, and by what bfloat16 keeps, 2^-8, a few times over.
ERROR_BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}

Inputs = dict[str, Any]
Row = dict[str, Any]


@dataclass(frozen=True)
class Workload:
    """A released architecture and one example of the size it was released for.

    builtin_passes: in how many passes the built-in answers all its queries, each of which reads the inputs again.
    """

    recipe: Callable[[], PerceiverIOConfig]
    head: Callable[[PerceiverIOConfig], Any]
    make_inputs: Callable[[], Inputs]
    builtin_passes: int = 1

    def ours(self) -> Any:
        """Our model, initialised as always, with the numerics that the built-in has."""
        return self.head(apply_numerics(self.recipe(), "builtin")).eval()

    def builtin(self) -> Any:
        """The built-in of these sizes, with weights of its own."""
        architecture, config = builtin_config(apply_numerics(self.recipe(), "builtin"))
        return getattr(transformers, architecture)(config).eval()


def make_text(length: int, vocab_size: int) -> Inputs:
    """Token ids (1, length), as a tokenizer gives them with their mask."""
    return {"inputs": torch.randint(0, vocab_size, (1, length)), "attention_mask": torch.ones(1, length).long()}


def make_grid(*shape: int) -> Inputs:
    """Normal numbers (1, *shape), rounded to bfloat16."""
    return {"inputs": torch.randn(1, *shape).bfloat16().float()}


def make_clip(frames: int, side: int, samples: int, classes: int) -> Inputs:
    """Video, sound, and the empty label that the documentation gives."""
    image, audio = make_grid(frames, 3, side, side)["inputs"], make_grid(samples, 1)["inputs"]
    return {"inputs": {"image": image, "audio": audio, "label": torch.zeros(1, classes)}}


WORKLOADS = {
    "masked-lm": Workload(language_bytes, PerceiverIOForMaskedLM, partial(make_text, 2048, 262)),
    "imagenet-learned": Workload(imagenet_learned, PerceiverIOForImageClassification, partial(make_grid, 3, 224, 224)),
    "imagenet-fourier": Workload(imagenet_fourier, PerceiverIOForImageClassification, partial(make_grid, 3, 224, 224)),
    "imagenet-conv": Workload(imagenet_conv, PerceiverIOForImageClassification, partial(make_grid, 3, 224, 224)),
    "optical-flow": Workload(optical_flow, PerceiverIOForOpticalFlow, partial(make_grid, 2, 27, 368, 496)),
    "multimodal": Workload(
        multimodal_autoencoder,
        PerceiverIOForMultimodalAutoencoding,
        partial(make_clip, 16, 224, 30_720, 700),
        # As its documentation does; it fails on all queries at once.
        builtin_passes=128,
    ),
}


@torch.no_grad()
def redraw(model: nn.Module) -> None:
    """Random weights with which every part shapes the output, rounded to bfloat16, so that dtypes share them.

    Those a model starts with are so small, or zero, that two models agree even when one of them is wrong.
    """
    for name, parameter in model.named_parameters():
        module, noise = model.get_submodule(name.rpartition(".")[0]), torch.randn(parameter.shape)
        if isinstance(module, (nn.LayerNorm, nn.BatchNorm2d)) and name.endswith("weight"):
            noise = 1 + 0.1 * noise
        elif name.endswith("bias"):
            noise = 0.1 * noise
        elif isinstance(module, (nn.Linear, nn.Conv2d)):
            noise = noise / math.sqrt(parameter[0].numel())
        parameter.copy_(noise.bfloat16())


def builtin_of(model: Any) -> Any:
    """transformers' own Perceiver with the weights of our `model`."""
    architecture, _ = builtin_config(model.config)
    with tempfile.TemporaryDirectory() as folder:
        export_builtin(model, folder)
        return getattr(transformers, architecture).from_pretrained(folder).eval()


def cast(inputs: Any, device: str, dtype: torch.dtype) -> Any:
    """The tensors of nested dicts on a device, floating point ones in a dtype."""
    if isinstance(inputs, dict):
        return {name: cast(value, device, dtype) for name, value in inputs.items()}
    return inputs.to(device, dtype if inputs.is_floating_point() else None)


def chunk_points(config: Any, index: int, passes: int) -> dict[str, Tensor | None]:
    """What the built-in is asked in pass `index`: a stretch of the pixels and of the audio patches, and the label."""
    patches = config.num_frames * config.audio_samples_per_frame // config.samples_per_patch
    counts = {"audio": patches, "image": math.prod(config.output_shape)}
    stretches = {name: torch.arange(n * index // passes, n * (index + 1) // passes) for name, n in counts.items()}
    return {**stretches, "label": None}


@torch.inference_mode()
def run_ours(model: Any, inputs: Inputs) -> Any:
    """Our logits, whole."""
    return model(**inputs).logits


@torch.inference_mode()
def run_builtin(model: Any, inputs: Inputs, index: int, passes: int) -> Any:
    """The built-in's logits of one pass."""
    if passes == 1:
        return model(**inputs).logits
    return model(**inputs, subsampled_output_points=chunk_points(model.config, index, passes)).logits


def part_of(logits: Any, config: Any, index: int, passes: int) -> Any:
    """What the built-in answers in one pass, out of our logits."""
    if passes == 1:
        return logits
    points = chunk_points(config, index, passes)
    audio = logits["audio"].unflatten(1, (-1, config.samples_per_patch))[:, points["audio"]].flatten(1)
    return {"audio": audio, "image": logits["image"].flatten(1, -2)[:, points["image"]], "label": logits["label"]}


def largest_error(got: Any, want: Any) -> float:
    """The largest difference as a part of the largest wanted value; of several outputs, the worst. NaN is the worst."""
    if isinstance(want, dict):
        errors = [largest_error(got[name], want[name]) for name in want]
        return math.nan if any(map(math.isnan, errors)) else max(errors)
    if got.shape != want.shape:
        return math.nan
    want = want.float()
    return float((got.float() - want).abs().max() / want.abs().max())


def measure_seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def measure_memory(run: Callable[[], Any], device: str) -> int | None:
    """Bytes that this process, or the GPU, held at the peak of a run beyond what it held before.

    None where the operating system is not Linux: its peak cannot be set back elsewhere.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return torch.cuda.max_memory_allocated() - before
    status, peak = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not peak.exists():
        return None

    def held(what: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(what))
        return 1024 * int(line.split()[1])

    peak.write_text("5")
    before = held("VmRSS")
    run()
    return held("VmHWM") - before


def choose(model: Any, backend: str, fast_attention: str) -> None:
    """Have our model run by these from now on."""
    model.set_attn_implementation(backend)
    model.config.fast_attention = fast_attention


def zeros(make: Callable[[], Any], device: str, dtype: str) -> Any:
    """A model all of whose weights are 0, made without a trace of how weights are drawn in the memory it leaves."""
    with torch.device("meta"):
        model = make().to(getattr(torch, dtype))
    model.to_empty(device=device)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.zero_()
    return model


def memory_of_ours(
    workload: Workload, dtype: str, device: str, threads: int, backend: str, fast_attention: str
) -> int | None:
    """Memory of one pass of our model; for a process of its own."""
    torch.set_num_threads(threads)
    model = zeros(workload.ours, device, dtype)
    choose(model, backend, fast_attention)
    inputs = cast(workload.make_inputs(), device, model.dtype)
    return measure_memory(partial(run_ours, model, inputs), device)


def memory_of_builtin(workload: Workload, dtype: str, device: str, threads: int) -> int | None:
    """Memory of one pass of the built-in; for a process of its own."""
    torch.set_num_threads(threads)
    model = zeros(workload.builtin, device, dtype)
    inputs = cast(workload.make_inputs(), device, model.dtype)
    return measure_memory(partial(run_builtin, model, inputs, 0, workload.builtin_passes), device)


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process that has done nothing before; None if that dies, out of memory for one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


@torch.inference_mode()
def count_sizes(model: Any, inputs: Inputs) -> dict[str, Any]:
    """Parameters, and how many elements are read, thought with and asked."""
    inner = model.perceiver
    array: Any = InputArray.of(inner.preprocessor(inputs["inputs"], inputs.get("attention_mask")))
    return {
        "parameters": model.num_parameters(),
        "batch": array.batch_size,
        "inputs": array.length,
        "latents": [model.config.num_latents, model.config.d_latents],
        "outputs": QueryArray.of(inner.output_query(array)).length,
    }


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {torch.backends.cpu.get_cpu_capability()}"


def spread(count: int, chosen: int) -> list[int]:
    """`chosen` of `count` passes, evenly, from the first to the last."""
    return [0] if chosen == 1 else [i * (count - 1) // (chosen - 1) for i in range(chosen)]


WHAT = ("model", "dtype", "backend", "fast_attention")
MEASURED = (
    *("seconds", "median_seconds", "builtin_seconds", "builtin_median_seconds", "builtin_dtype", "ratio"),
    *("max_error", "error_bound", "memory", "builtin_memory", "memory_ratio", "error"),
)


def empty_row(*what: str) -> Row:
    """A row of this model, dtype, backend and fast_attention, with nothing measured yet."""
    return dict(zip(WHAT, what, strict=True)) | dict.fromkeys(MEASURED)


def title(row: Row) -> str:
    return " ".join(row[field] for field in WHAT)


class Comparison:
    """One model, ours and the built-in if asked (`against`), and its rows; `step` is told what is done next."""

    def __init__(
        self,
        name: str,
        workload: Workload,
        *,
        against: str | None = None,
        device: str = "cpu",
        repeats: int = 3,
        builtin_passes_timed: int = 4,
        step: Callable[[str], None] = lambda what: None,
    ):
        self.name, self.workload, self.device, self.repeats, self.step = name, workload, device, repeats, step
        step(f"{name}: random weights")
        torch.manual_seed(0)
        self.ours: Any = workload.ours()
        self.theirs: Any = None
        redraw(self.ours)
        self.inputs = workload.make_inputs()
        passes = workload.builtin_passes
        self.indices = spread(passes, min(builtin_passes_timed, passes))
        if against == "builtin":
            step(f"{name}: the built-in's answers")
            self.theirs = builtin_of(self.ours).to(device)
            inputs = cast(self.inputs, device, torch.float32)
            self.wanted = [run_builtin(self.theirs, inputs, index, passes) for index in self.indices]
        self.ours.to(device)
        self.measured_on = {
            "builtin_passes": passes if self.theirs else None,
            "builtin_passes_timed": len(self.indices) if self.theirs else None,
            "sizes": count_sizes(self.ours, cast(self.inputs, device, torch.float32)),
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "device": device_name(device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def rows(
        self, dtype: str, backends: Sequence[str] = ("sdpa",), fast_attention: Sequence[str] = ("auto",)
    ) -> list[Row]:
        """A row for each backend and each choice of fast attention, complete but for those that fail."""
        ways = [(backend, fast) for backend in backends for fast in fast_attention]
        rows = [empty_row(self.name, dtype, *way) | self.measured_on for way in ways]
        inputs = cast(self.inputs, self.device, getattr(torch, dtype))
        self.ours.to(getattr(torch, dtype))
        for row in rows:
            self.step(f"{title(row)}: {'comparing' if self.theirs else 'trying'}")
            self._compare(row, inputs)
        complete = [row for row in rows if row["error"] is None]
        if complete:
            builtin_dtype = self._builtin_dtype(dtype) if self.theirs else None
            self._time(complete, inputs, builtin_dtype)
            self._weigh(complete, builtin_dtype)
        return rows

    def _compare(self, row: Row, inputs: Inputs) -> None:
        try:
            choose(self.ours, row["backend"], row["fast_attention"])
            logits = run_ours(self.ours, inputs)
        except (ImportError, RuntimeError, ValueError) as error:
            row["error"] = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
            return
        if self.theirs is None:
            return
        config, passes = self.theirs.config, self.workload.builtin_passes
        parts = (part_of(logits, config, index, passes) for index in self.indices)
        errors = [largest_error(got, want) for got, want in zip(parts, self.wanted, strict=True)]
        worst = math.nan if any(map(math.isnan, errors)) else max(errors)
        row["error_bound"] = ERROR_BOUNDS[row["dtype"]]
        row["max_error"] = worst if math.isfinite(worst) else None
        if not worst <= row["error_bound"]:
            row["error"] = f"max_error {worst:.1e} is above {row['error_bound']:.0e}; a wrong answer is not timed"

    def _builtin_dtype(self, dtype: str) -> str:
        """This dtype, or float32 if the built-in fails in it; its weights are left in what is returned."""
        self.step(f"{self.name} {dtype}: trying the built-in")
        inputs = cast(self.inputs, self.device, getattr(torch, dtype))
        try:
            run_builtin(self.theirs.to(getattr(torch, dtype)), inputs, 0, self.workload.builtin_passes)
        except RuntimeError:
            self.theirs.to(torch.float32)
            return "float32"
        return dtype

    def _time(self, rows: list[Row], inputs: Inputs, builtin_dtype: str | None) -> None:
        # In turns, so that all see the same moods of the machine.
        taken: list[list[float]] = [[] for _ in rows]
        taken_by_builtin: list[float] = []
        for repeat in range(1, self.repeats + 1):
            for row, seconds in zip(rows, taken, strict=True):
                self.step(f"{title(row)}: repeat {repeat} of {self.repeats}")
                choose(self.ours, row["backend"], row["fast_attention"])
                seconds.append(measure_seconds(partial(run_ours, self.ours, inputs), self.device))
            if builtin_dtype is not None:
                self.step(f"{self.name} built-in {builtin_dtype}: repeat {repeat} of {self.repeats}")
                taken_by_builtin.append(self._builtin_seconds(builtin_dtype))
        for row, seconds in zip(rows, taken, strict=True):
            row["seconds"], row["median_seconds"] = min(seconds), statistics.median(seconds)
            if builtin_dtype is not None:
                row["builtin_dtype"] = builtin_dtype
                row["builtin_seconds"] = min(taken_by_builtin)
                row["builtin_median_seconds"] = statistics.median(taken_by_builtin)
                row["ratio"] = row["builtin_seconds"] / row["seconds"]

    def _builtin_seconds(self, dtype: str) -> float:
        inputs, passes = cast(self.inputs, self.device, getattr(torch, dtype)), self.workload.builtin_passes
        runs = [partial(run_builtin, self.theirs, inputs, index, passes) for index in self.indices]
        return sum(measure_seconds(run, self.device) for run in runs) * passes / len(runs)

    def _weigh(self, rows: list[Row], builtin_dtype: str | None) -> None:
        builtin_memory = None
        if builtin_dtype is not None:
            self.step(f"{self.name} built-in {builtin_dtype}: memory")
            asked = (self.workload, builtin_dtype, self.device, torch.get_num_threads())
            builtin_memory = in_fresh_process(memory_of_builtin, *asked)
        for row in rows:
            self.step(f"{title(row)}: memory")
            asked = (self.workload, row["dtype"], self.device, torch.get_num_threads())
            row["memory"] = in_fresh_process(memory_of_ours, *asked, row["backend"], row["fast_attention"])
            row["builtin_memory"] = builtin_memory
            if row["memory"] and builtin_memory:
                row["memory_ratio"] = row["memory"] / builtin_memory


# Heading, field, format and unit of the table's columns of numbers.
NUMBERS = [
    ("seconds", "seconds", ".3f", 1),
    ("median", "median_seconds", ".3f", 1),
    ("built-in", "builtin_seconds", ".3f", 1),
    ("ratio", "ratio", ".2f", 1),
    ("max error", "max_error", ".0e", 1),
    ("MiB", "memory", ".0f", 2**20),
    ("built-in MiB", "builtin_memory", ".0f", 2**20),
    ("memory ratio", "memory_ratio", ".2f", 1),
]


def table(rows: list[Row]) -> str:
    """Rows as aligned text, a dash where nothing was measured; then why, where something went wrong."""
    lines = [[*WHAT, *(heading for heading, *_ in NUMBERS)]]
    for row in rows:
        numbers = ["-" if row[f] is None else format(row[f] / unit, form) for _, f, form, unit in NUMBERS]
        lines.append([row[field] for field in WHAT] + numbers)
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    aligned = ["<"] * len(WHAT) + [">"] * len(NUMBERS)
    shown = [
        "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(line, aligned, widths, strict=True))
        for line in lines
    ]
    return "\n".join([*shown, *(f"{title(row)}: {row['error']}" for row in rows if row["error"])])


def write_json(rows: list[Row], path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)


def parse(argv: Sequence[str] | None, workloads: dict[str, Workload]) -> argparse.Namespace:
    """Checked arguments; exits with code 2 and one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_perceiver.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--models", nargs="+", choices=list(workloads), default=list(workloads), metavar="MODEL")
    parser.add_argument("--dtypes", nargs="+", choices=list(ERROR_BOUNDS), default=["float32"], metavar="DTYPE")
    parser.add_argument("--backends", nargs="+", default=["sdpa"], metavar="BACKEND", help="attention implementations")
    parser.add_argument(
        "--fast-attention",
        nargs="+",
        choices=["auto", "always", "never"],
        default=["auto"],
        metavar="WHEN",
        help="when the exact cheaper forms of reading and writing are taken: auto, always, never",
    )
    parser.add_argument("--against", choices=["builtin"], help="compare with transformers' own Perceiver")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads; by default torch's choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--builtin-chunks", type=int, default=4, help="multimodal: how many of its 128 passes are timed"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where the rows are written")
    arguments = parser.parse_args(argv)
    for name in ("models", "dtypes", "backends", "fast_attention"):
        setattr(arguments, name, list(dict.fromkeys(getattr(arguments, name))))
    known = ["eager", *sorted(ALL_ATTENTION_FUNCTIONS.valid_keys())]
    for backend in arguments.backends:
        if backend not in known:
            parser.error(f"unknown backend {backend!r}; transformers has {', '.join(known)}")
    for name in ("threads", "repeats", "builtin_chunks"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            parser.error(f"--{name.replace('_', '-')} is a whole number from 1, not {value}")
    if arguments.builtin_chunks > (most := max(workload.builtin_passes for workload in workloads.values())):
        parser.error(f"--builtin-chunks is at most {most}, not {arguments.builtin_chunks}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here; leave the option out to run on the CPU")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.absolute().parent.is_dir()):
        parser.error(f"--json {arguments.json}: is a folder or lies in none; name a file in a folder that exists")
    return arguments


def main(argv: Sequence[str] | None = None, workloads: dict[str, Workload] = WORKLOADS) -> int:
    arguments = parse(argv, workloads)
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    rows: list[Row] = []
    with tqdm(file=sys.stderr, bar_format="{elapsed} {desc}") as progress:
        for name in arguments.models:
            comparison = Comparison(
                name,
                workloads[name],
                against=arguments.against,
                device=arguments.device,
                repeats=arguments.repeats,
                builtin_passes_timed=arguments.builtin_chunks,
                step=progress.set_description_str,
            )
            for dtype in arguments.dtypes:
                rows += comparison.rows(dtype, arguments.backends, arguments.fast_attention)
                if arguments.json is not None:
                    write_json(rows, arguments.json)
    print(table(rows))
    return int(any(row["error"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
