"""What one run costs: seconds, bytes, operations; and the peak that they are held against."""

import os

import pytest
import torch
import torch.nn.functional as F
from helpers import config_of, grid
from torch import nn

from hf_perceiver import PerceiverIOModel
from hf_perceiver.benchmark import measures as benchmark_measures
from hf_perceiver.benchmark.measures import count_bytes, count_flops, fill_rates, matmul_gflops, peak_products
from hf_perceiver.benchmark.report import COUNTED
from hf_perceiver.benchmark.workloads import choose, run_ours
from hf_perceiver.products import apply


def test_memory_is_what_a_run_holds_at_its_peak():
    def run():
        for _ in range(3):
            torch.ones(64 << 18)  # 64 MiB of float32, one after the other

    measured = benchmark_measures.measure_memory(run, "cpu")
    if measured is None:
        pytest.skip("the peak of a process can be set back on Linux only")
    # An allocator may keep what is free; it does not take three times as much.
    assert 60 << 20 < measured < 140 << 20


def test_a_process_that_dies_measures_nothing():
    # As the kernel ends one that takes too much memory: without a word.
    assert benchmark_measures.in_fresh_process(os._exit, 9) is None


def test_memory_that_is_free_can_be_given_back():
    benchmark_measures.release_memory()  # whatever the system, it does not fail


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.inference_mode()
def test_operations_are_a_multiplication_and_an_addition_each(dtype):
    linear = nn.Linear(5, 7).to(dtype).requires_grad_(False)
    assert count_flops(lambda: linear(torch.ones(3, 5, dtype=dtype)))[0] == 2 * 3 * 5 * 7
    x = torch.ones(1, 4, 6, 6, dtype=dtype)
    assert count_flops(lambda: F.conv2d(x, torch.ones(8, 4, 3, 3, dtype=dtype)))[0] == 2 * (4 * 4) * (4 * 9) * 8


def test_attention_on_the_cpu_is_counted_forward_and_backward():
    """Scores and sums forward; backward their four gradients, and scores once more, as torch counts it."""
    q = torch.randn(1, 2, 30, 8, requires_grad=True)
    k, v = torch.randn(1, 2, 50, 8, requires_grad=True), torch.randn(1, 2, 50, 8, requires_grad=True)
    product = 2 * 2 * 30 * 50 * 8
    with torch.no_grad():
        assert count_flops(lambda: F.scaled_dot_product_attention(q, k, v))[0] == 2 * product
    flops, _ = count_flops(lambda: F.scaled_dot_product_attention(q, k, v).sum().backward())
    assert flops == (2 + 5) * product


def test_a_whole_models_operations_are_those_of_its_sizes():
    """By hand, all widths from the config: 8 x 9 pixels of 3 channels, 5 latents of 16, one block of two layers, one
    query, 4 classes. A position code of 2 axes and 2 bands has 2 x (2 x 2 + 1) channels.
    """
    pixels, channels, latents, width, query, classes = 72, 3 + 10, 5, 16, 12, 4
    config = config_of(
        preprocessor=grid(
            {"kind": "pixels", "in_channels": 3}, {"kind": "fourier", "num_bands": 2, "max_resolution": [8, 9]}
        ),
        num_latents=latents,
        d_latents=width,
        num_blocks=1,
        num_self_attends_per_block=2,
        num_self_attention_heads=2,
        num_cross_attention_heads=1,
        qk_channels=None,
        v_channels=None,
        decoder_num_heads=1,
        decoder_qk_channels=None,
        decoder_v_channels=None,
        self_attention_widening_factor=2,
        cross_attention_widening_factor=1,
        decoder_widening_factor=1,
        num_labels=classes,
        output_query={"kind": "tasks", "channels": query},
        postprocessor={"kind": "classification"},
    )

    def attention(queries, keys, query_width, key_width, qk):
        projections = queries * query_width * qk + 2 * keys * key_width * qk + queries * qk * query_width
        return projections + 2 * queries * keys * qk

    read = attention(latents, pixels, width, channels, channels) + 2 * latents * width * width
    think = attention(latents, latents, width, width, width) + 2 * latents * width * 2 * width
    write = attention(1, latents, query, width, width) + 2 * query * query
    expected = 2 * (read + 2 * think + write + query * classes)
    for device in ("cpu", "meta"):
        with torch.device(device):
            model = PerceiverIOModel(config).eval().requires_grad_(False)
            inputs = {"inputs": torch.zeros(1, 3, 8, 9)}
        for backend in ("eager", "sdpa"):
            choose(model, backend, "never")
            assert count_flops(lambda m=model, i=inputs: run_ours(m, i))[0] == expected, (device, backend)


def test_the_peak_is_the_fastest_product(monkeypatch):
    """With a clock on which every run takes a millisecond: 2 x 30 x 40 x 50 operations are 0.12 GFLOP/s."""
    monkeypatch.setattr(benchmark_measures, "measure_seconds", lambda run, device: 1e-3 + 0 * run().sum().item())
    assert matmul_gflops([(3, 4, 5), (30, 40, 50)], torch.float32, "cpu") == pytest.approx(0.12)


def test_the_peak_is_looked_for_in_a_square_and_in_the_latent_tower(monkeypatch):
    monkeypatch.setitem(benchmark_measures.SQUARE, "cpu", 99)
    with torch.device("meta"):
        model = PerceiverIOModel(config_of(num_latents=6, d_latents=16, self_attention_widening_factor=2))
    assert peak_products(model, "cpu") == [(99, 99, 99), (6, 16, 32), (6, 32, 16)]


def test_rates_follow_from_operations_and_seconds():
    row = dict.fromkeys(COUNTED) | {"seconds": 2.0, "direct_flops": 8 * 10**9, "executed_flops": 3 * 10**9}
    fill_rates(row, 6.0)
    assert row["direct_gflops_per_second"] == 4 and row["executed_gflops_per_second"] == 1.5
    assert row["peak_gflops_per_second"] == 6 and row["peak_fraction"] == 0.25


def test_bytes_are_those_of_all_outputs():
    assert count_bytes({"a": torch.zeros(2, 3), "b": {"c": torch.zeros(5, dtype=torch.bfloat16)}}) == 24 + 10


# --- a GPU, without one


def test_a_gpus_clock_waits_for_what_was_started(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: events.append("wait"))
    benchmark_measures.measure_seconds(lambda: events.append("run"), "cuda")
    assert events == ["wait", "run", "wait"]


def test_a_gpus_memory_is_what_it_allocated_beyond_what_it_held(monkeypatch):
    events = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: events.append("reset"))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 100)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 170)
    assert benchmark_measures.measure_memory(lambda: events.append("run"), "cuda") == 70
    assert events == ["reset", "run"]


def test_tf32_is_a_switch():
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        for on in (True, False):
            benchmark_measures.use_tf32(on)
            assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32) == (on, on)
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_products_by_onednn_are_counted():
    """torch's counter does not know them: 200 rows of 5 channels to 6, a multiplication and an addition each."""
    layer, x = torch.nn.Linear(5, 6), torch.randn(200, 5)
    with torch.no_grad():
        assert count_flops(lambda: apply(layer, x))[0] == 2 * 200 * 5 * 6
