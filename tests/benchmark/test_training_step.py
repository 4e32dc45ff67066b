"""A training step of ours and of the built-in: the same loss, the same gradient, then seconds and memory."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_workloads import SMALL

from hf_perceiver.benchmark import __main__ as benchmark
from hf_perceiver.benchmark import comparison as benchmark_comparison
from hf_perceiver.benchmark import measures as benchmark_measures
from hf_perceiver.benchmark import training as benchmark_training
from hf_perceiver.benchmark.training import TrainingComparison, loss_and_gradient, mean_square, train_step

TRAINABLE = [name for name, workload in SMALL.items() if workload.output_points is None]


@pytest.fixture
def no_memory(monkeypatch):
    """Without the processes in which memory is measured: each answers 100 bytes for ours and 400 for the built-in; and
    without the large product of the peak.
    """
    monkeypatch.setitem(benchmark_measures.SQUARE, "cpu", 64)
    monkeypatch.setattr(
        benchmark_training, "in_fresh_process", lambda *asked: {"memory": 400 if asked[-1] is None else 100}
    )


@pytest.mark.parametrize("model", TRAINABLE)
def test_both_sides_have_the_same_loss_and_gradient(model, no_memory, tmp_path):
    path = tmp_path / "rows.json"
    asked = ["--training", "--models", model, "--against", "builtin", "--dtypes", "float32", "bfloat16"]
    assert benchmark.main([*asked, "--repeats", "2", "--json", str(path)], SMALL) == 0
    rows = json.loads(path.read_text())
    assert [(row["work"], row["dtype"], row["builtin_dtype"]) for row in rows] == [
        ("training", dtype, dtype) for dtype in ("float32", "bfloat16")
    ]
    for row in rows:
        # Relative; sums in another order, in float32 or bfloat16.
        assert row["max_error"] < (1e-5 if row["dtype"] == "float32" else 5e-2)
        assert row["ratio"] == row["builtin_seconds"] / row["seconds"] and row["memory_ratio"] == 0.25
        assert 0 < row["seconds"] <= row["median_seconds"] and row["peak_fraction"] > 0
        # The backward pass of sdpa makes the scores once more.
        assert row["direct_flops"] <= row["executed_flops"] < 1.2 * row["direct_flops"]
    # Forward, and twice that backward, but for the gradients of inputs and positions, which nobody asks for.
    inference = benchmark_comparison.Comparison(model, SMALL[model])
    if model != "multimodal":
        assert 2 < rows[0]["direct_flops"] / inference.direct_flops <= 3
    else:
        # 6 pixels, 3 patches of sound and a label.
        assert rows[0]["sizes"]["outputs"] == 10 and rows[0]["direct_flops"] < inference.direct_flops


def test_a_wrong_gradient_is_not_timed(no_memory, monkeypatch):
    comparison = TrainingComparison("masked-lm", SMALL["masked-lm"], against="builtin", repeats=1)
    loss, gradient = comparison.wanted
    comparison.wanted = [loss, gradient * 1.001]
    (row,) = comparison.rows("float32")
    assert row["seconds"] is None and "max_error 1.0e-03 is above 1e-04" in row["error"]


def test_a_step_changes_no_weight_and_leaves_no_gradient():
    comparison = TrainingComparison("optical-flow", SMALL["optical-flow"], repeats=1)
    before = {name: p.detach().clone() for name, p in comparison.ours.named_parameters()}
    inputs = comparison._inputs(torch.float32)
    assert loss_and_gradient(comparison.ours, inputs, "cpu", "float32")[1] > 0
    train_step(comparison.ours, comparison._optimizer, inputs, "cpu", "float32")
    state = comparison._optimizer.state
    assert all(state[p]["exp_avg_sq"].any() for p in comparison.ours.parameters())  # it did step
    for name, parameter in comparison.ours.named_parameters():
        assert parameter.grad is None and torch.equal(parameter, before[name])


def test_the_loss_is_the_mean_square_of_every_output():
    assert mean_square(torch.tensor([1.0, 3.0])) == 5
    assert mean_square({"a": torch.tensor([1.0, 3.0]), "b": torch.tensor([2.0])}) == 9


def test_a_built_in_that_finds_no_memory_costs_its_side_only(monkeypatch):
    def measure(function, workload, dtype, device, threads, way):
        return {"memory": 7} if way else {"error": "RuntimeError: not enough memory"}

    monkeypatch.setattr(benchmark_training, "in_fresh_process", measure)
    comparison = TrainingComparison("optical-flow", SMALL["optical-flow"], against="builtin", repeats=1)
    (row,) = comparison.rows("float32")
    assert row["seconds"] > 0 and row["memory"] == 7 and row["ratio"] is None and row["builtin_seconds"] is None
    assert row["error"] == "the built-in: RuntimeError: not enough memory"


def test_what_finds_no_memory_is_not_timed(monkeypatch):
    monkeypatch.setattr(benchmark_training, "in_fresh_process", lambda *asked: None)
    monkeypatch.setattr(TrainingComparison, "_answer", lambda self, row: pytest.fail("it was run"))
    (row,) = TrainingComparison("optical-flow", SMALL["optical-flow"], repeats=1).rows("float32")
    assert row["error"] == "its process died, out of memory" and row["seconds"] is None


@pytest.mark.medium
@pytest.mark.parametrize("way", [("sdpa", "auto", False), None], ids=["ours", "built-in"])
def test_memory_of_a_step_is_that_of_gradients_and_optimizer_at_least(way, monkeypatch):
    monkeypatch.setattr(benchmark_training, "limit_memory", lambda: None)  # this process goes on
    workload = replace(SMALL["masked-lm"], recipe=_wide_config)
    found = benchmark_training.memory_of_step(workload, "float32", "cpu", torch.get_num_threads(), way)
    if found["memory"] is None:
        pytest.skip("the peak of a process can be set back on Linux only")
    # A gradient and two moments for every parameter; activations of 6 latents are small beside them.
    weights = 4 * workload.ours().num_parameters()
    assert 2.5 * weights < found["memory"] < 4.5 * weights


def test_a_step_may_take_what_is_free(monkeypatch):
    if not Path("/proc/meminfo").exists():
        pytest.skip("memory can be limited on Linux only")
    import resource

    limits = []
    monkeypatch.setattr(resource, "setrlimit", lambda what, limit: limits.append((what, limit[0])))
    benchmark_training.limit_memory()
    ((what, limit),) = limits
    total = 1024 * int(re.search(r"MemTotal:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    assert what == resource.RLIMIT_DATA and 0 < limit < total


@pytest.mark.medium
def test_a_step_without_room_says_so(monkeypatch):
    """With 64 MiB more than there is."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("memory can be limited on Linux only")
    import resource

    before = resource.getrlimit(resource.RLIMIT_DATA)

    def limit():
        data = 1024 * int(re.search(r"VmData:\s+(\d+)", status.read_text())[1])
        resource.setrlimit(resource.RLIMIT_DATA, (data + (64 << 20), before[1]))

    monkeypatch.setattr(benchmark_training, "limit_memory", limit)
    workload = replace(SMALL["masked-lm"], recipe=_wide_config)
    try:
        found = benchmark_training.memory_of_step(
            workload, "float32", "cpu", torch.get_num_threads(), ("sdpa", "auto", False)
        )
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)
    assert found["error"].startswith("RuntimeError: ") and "alloc" in found["error"]


def _wide_config():
    config = SMALL["masked-lm"].recipe()
    config.d_latents = config.qk_channels = config.v_channels = 1024
    return config
