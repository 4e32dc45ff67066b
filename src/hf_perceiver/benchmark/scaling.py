"""How cost grows with the number of inputs, of outputs and of latents, each varied by itself, up to a million.

The model is of optical flow's kind: two frames of pixels projected to 64 channels beside Fourier positions of 32 bands
(194 channels), 256 latents of 256 channels, 4 self-attends of 8 heads, and a Fourier query per output that is read out as
2 numbers. 4,096 inputs and outputs while the other grows, 65,536 of both while the latents do. On one AVX-512 core a
million inputs take the direct form some 10 s and 3.3 GiB, a million outputs 7 s.

Rows have what those of inference have, and: `axis`, what is varied; `inputs`, `outputs`, `latents`; `output_bytes`, the size
of what the model returns; `memory_beyond_output` = memory - output_bytes. Slopes are those of straight lines through the
upper half of a curve, log-log.
"""

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
import transformers

from ..configuration_perceiver_io import PerceiverIOConfig
from ..modeling_perceiver_io import PerceiverIOModel
from .comparison import FAILURES
from .measures import (
    count_bytes,
    count_flops,
    device_name,
    fill_rates,
    in_fresh_process,
    matmul_gflops,
    measure_memory,
    measure_seconds,
    peak_products,
)
from .report import Row, empty_row, first_line, title
from .workloads import Inputs, cast, choose, make_grid, on_meta, run_ours, zeros

# How many of each, by what is varied.
SIZES = {
    "inputs": [2**k for k in range(12, 21)],
    "outputs": [2**k for k in range(12, 21)],
    "latents": [2**k for k in range(6, 13)],
}
FIXED = {
    "inputs": {"outputs": 2**12, "latents": 2**8},
    "outputs": {"inputs": 2**12, "latents": 2**8},
    "latents": {"inputs": 2**16, "outputs": 2**16},
}


@dataclass(frozen=True)
class Size:
    """How many inputs, outputs and latents, each a power of 2."""

    inputs: int
    outputs: int
    latents: int

    def config(self) -> PerceiverIOConfig:
        position = {"kind": "fourier", "num_bands": 32, "max_resolution": [1024, 1024]}
        stem = {"kind": "patches", "in_channels": 3, "temporal_downsample": 2, "project": 64}
        return PerceiverIOConfig(
            num_latents=self.latents,
            d_latents=256,
            num_blocks=1,
            num_self_attends_per_block=4,
            num_self_attention_heads=8,
            num_cross_attention_heads=1,
            qk_channels=None,
            v_channels=None,
            decoder_num_heads=1,
            decoder_qk_channels=None,
            decoder_v_channels=None,
            decoder_use_query_residual=False,
            preprocessor={"kind": "grid", "stem": stem, "position": position},
            output_query={"kind": "position", "position": position, "grid": list(sides(self.outputs))},
            postprocessor={"kind": "projection", "num_outputs": 2},
        )

    def model(self) -> Any:
        return PerceiverIOModel(self.config()).eval().requires_grad_(False)

    def make_inputs(self) -> Inputs:
        """Two frames (1, 2, 3, H, W)"""
        return make_grid(2, 3, *sides(self.inputs))


def sides(count: int) -> tuple[int, int]:
    """A grid of so many places, a power of 2, as square as can be."""
    power = count.bit_length() - 1
    return 2 ** (power // 2), 2 ** (power - power // 2)


def memory_of_size(size: Size, dtype: str, device: str, threads: int, way: tuple[str, str, bool]) -> int | None:
    """Memory of one pass; for a process of its own."""
    torch.set_num_threads(threads)
    model = zeros(size.model, device, dtype)
    choose(model, *way[:2])
    inputs = cast(size.make_inputs(), device, model.dtype)
    run = partial(run_ours, torch.compile(model, dynamic=False) if way[2] else model, inputs)
    if way[2]:
        run()  # what the compiler takes is no part of a run
    return measure_memory(run, device)


def scaling_rows(
    axes: Sequence[str],
    dtypes: Sequence[str] = ("float32",),
    backends: Sequence[str] = ("sdpa",),
    fast_attention: Sequence[str] = ("auto",),
    compiled: Sequence[bool] = (False,),
    *,
    largest: int | None = None,
    device: str = "cpu",
    tf32: bool = False,
    repeats: int = 3,
    step: Callable[[str], None] = lambda what: None,
) -> Iterator[list[Row]]:
    """The rows of each size of each axis, from the smallest; `largest` leaves out what is larger."""
    for axis, dtype in product(axes, dtypes):
        for count in SIZES[axis]:
            if largest is None or count <= largest:
                size = Size(**{axis: count}, **FIXED[axis])
                ways = list(product(backends, fast_attention, compiled))
                yield measure_size(axis, size, dtype, ways, device=device, tf32=tf32, repeats=repeats, step=step)


def measure_size(
    axis: str,
    size: Size,
    dtype: str,
    ways: Sequence[tuple[str, str, bool]],
    *,
    device: str,
    tf32: bool,
    repeats: int,
    step: Callable[[str], None],
) -> list[Row]:
    """A row for each way to run a model of this size, all in turns."""
    name = f"{axis} {getattr(size, axis):,}"
    step(f"{name}: random weights")
    torch.manual_seed(0)
    model = size.model().to(device, getattr(torch, dtype))
    compiled_model = None
    if any(compiled for *_, compiled in ways):
        torch.compiler.reset()  # compiled code is kept a few times over; each size starts afresh
        compiled_model = torch.compile(model, dynamic=False)
    inputs = cast(size.make_inputs(), device, model.dtype)
    direct = count_direct(size)

    def run_as(row: Row) -> Callable[[], Any]:
        choose(model, row["backend"], row["fast_attention"])
        return partial(run_ours, compiled_model if row["compiled"] else model, inputs)

    rows = []
    for way in ways:
        row = empty_row("scaling", name, dtype, *way, tf32) | {
            "axis": axis,
            "inputs": size.inputs,
            "outputs": size.outputs,
            "latents": size.latents,
            "direct_flops": direct,
            "output_bytes": None,
            "memory_beyond_output": None,
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "device": device_name(device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }
        rows.append(row)
        step(f"{title(row)}: trying")
        try:
            flops, logits = (direct, run_as(row)()) if row["compiled"] else count_flops(run_as(row))
        except FAILURES as error:
            row["error"] = first_line(error)
            continue
        row["executed_flops"], row["output_bytes"] = flops, count_bytes(logits)
    complete = [row for row in rows if row["error"] is None]
    taken: list[list[float]] = [[] for _ in complete]
    peak = 0.0
    for repeat in range(1, repeats + 1):
        for row, seconds in zip(complete, taken, strict=True):
            step(f"{title(row)}: repeat {repeat} of {repeats}")
            seconds.append(measure_seconds(run_as(row), device))
        peak = max(peak, matmul_gflops(peak_products(model, device), model.dtype, device))
    for row, seconds in zip(complete, taken, strict=True):
        row["seconds"], row["median_seconds"] = min(seconds), statistics.median(seconds)
        fill_rates(row, peak)
        step(f"{title(row)}: memory")
        way = (row["backend"], row["fast_attention"], row["compiled"])
        row["memory"] = in_fresh_process(memory_of_size, size, dtype, device, torch.get_num_threads(), way)
        if row["memory"] is not None:
            row["memory_beyond_output"] = row["memory"] - row["output_bytes"]
    return rows


def count_direct(size: Size) -> int:
    """Floating point operations of the direct form."""
    model = on_meta(size.model)
    choose(model, "eager", "never")
    return count_flops(partial(run_ours, model, cast(size.make_inputs(), "meta", torch.float32)))[0]
