"""Seconds, bytes and floating point operations of one run, and what the machine reaches at most."""

import ctypes
import gc
import math
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from ..products import HAS_ONEDNN, product

# A product (rows, inner) x (inner, columns).
Product = tuple[int, int, int]
# Large enough that starting a product costs nothing beside it.
SQUARE = {"cpu": 2048, "cuda": 8192}
# What torch does not count: attention outside its GPU kernels, and oneDNN's products. Shapes come in place of tensors.
UNCOUNTED: dict[Any, Any] = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, v, *_, **__: (
        sdpa_backward_flop_count(out, q, k, v)
    ),
}
if HAS_ONEDNN:
    UNCOUNTED[torch.ops.mkldnn._linear_pointwise] = lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]


def measure_seconds(run: Callable[[], Any], device: str) -> float:
    """Wall time of one run."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def release_memory() -> None:
    """Give the operating system what is free in this process, lest a run take it unseen; where that can be asked."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


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

    release_memory()
    peak.write_text("5")
    before = held("VmRSS")
    run()
    return held("VmHWM") - before


def in_fresh_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """What the function returns in a process that has done nothing before; None if that dies, out of memory for one."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        try:
            return pool.submit(function, *arguments).result()
        except BrokenProcessPool:
            return None


def count_flops(run: Callable[[], Any]) -> tuple[int, Any]:
    """Floating point operations of the matrix products, convolutions and attentions of a run; and what it returns.

    A multiplication and an addition are two. Sums, exponentials and kernels of other packages are not seen.
    """
    counter = FlopCounterMode(display=False, custom_mapping=UNCOUNTED)
    with counter:
        returned = run()
    return counter.get_total_flops(), returned


@torch.inference_mode()
def matmul_gflops(products: Sequence[Product], dtype: torch.dtype, device: str, runs: int = 5) -> float:
    """The most GFLOP/s that one of these products, as our linear layers compute it, reaches in a few runs."""
    best = 0.0
    for rows, inner, columns in products:
        x, weight = (torch.ones(n, inner, dtype=dtype, device=device) for n in (rows, columns))
        seconds = min(measure_seconds(partial(product, x, weight), device) for _ in range(runs))
        best = max(best, 2e-9 * rows * inner * columns / seconds)
    return best


def peak_products(model: Any, device: str) -> list[Product]:
    """Where the machine's peak is looked for: a large square, and the latent tower's own shapes."""
    side, config = SQUARE[device], model.config
    widest = config.d_latents * config.self_attention_widening_factor
    return [
        (side, side, side),
        (config.num_latents, config.d_latents, widest),
        (config.num_latents, widest, config.d_latents),
    ]


def fill_rates(row: dict[str, Any], peak: float | None) -> None:
    """GFLOP/s of a row from its operations and seconds, and which part of the peak was in use."""
    for form in ("direct", "executed"):
        if row[f"{form}_flops"] is not None:
            row[f"{form}_gflops_per_second"] = 1e-9 * row[f"{form}_flops"] / row["seconds"]
    row["peak_gflops_per_second"] = peak
    if peak is not None and row["executed_gflops_per_second"] is not None:
        row["peak_fraction"] = row["executed_gflops_per_second"] / peak


def use_tf32(on: bool) -> None:
    """Whether a GPU may multiply float32 matrices with 10 bits of mantissa."""
    torch.backends.cuda.matmul.allow_tf32 = on
    torch.backends.cudnn.allow_tf32 = on


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {torch.backends.cpu.get_cpu_capability()}"


def count_bytes(outputs: Any) -> int:
    """Size of a tensor, or of all tensors in a dict."""
    if isinstance(outputs, Tensor):
        return outputs.nbytes
    return sum(count_bytes(value) for value in outputs.values())
