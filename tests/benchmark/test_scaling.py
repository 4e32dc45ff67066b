"""Cost against the number of inputs, outputs and latents."""

import json

import pytest
import torch

from hf_perceiver.benchmark import __main__ as benchmark
from hf_perceiver.benchmark import measures as benchmark_measures
from hf_perceiver.benchmark import scaling as benchmark_scaling
from hf_perceiver.benchmark.scaling import FIXED, SIZES, Size, count_direct, sides


@pytest.fixture
def no_memory(monkeypatch):
    """Without the processes in which memory is measured, and the large product of the peak."""
    monkeypatch.setitem(benchmark_measures.SQUARE, "cpu", 64)
    monkeypatch.setattr(benchmark_scaling, "in_fresh_process", lambda *asked: 10**6)


def test_inputs_and_outputs_grow_to_a_million():
    assert SIZES["inputs"][-1] == SIZES["outputs"][-1] == 2**20
    for axis, counts in SIZES.items():
        assert {axis, *FIXED[axis]} == {"inputs", "outputs", "latents"}
        assert all(sides(count)[0] * sides(count)[1] == count for count in counts)
    assert sides(2**20) == (1024, 1024) and sides(2**13) == (64, 128)


def test_a_size_is_what_it_says():
    size = Size(inputs=32, outputs=64, latents=8)
    model = size.model()
    logits = model(size.make_inputs()["inputs"]).logits
    assert logits.shape == (1, 64, 2) or logits.shape == (1, 8, 8, 2)
    assert model.encode(size.make_inputs()["inputs"]).input_array.dense().shape == (1, 32, 64 + 2 * 65)
    assert model.config.num_latents == 8


@pytest.mark.parametrize("axis", ["inputs", "outputs"])
def test_the_direct_forms_work_is_linear(axis):
    """What a further 2^10 cost is the same everywhere, counted."""
    fixed = {"inputs": 64, "outputs": 64, "latents": 8}
    counts = [count_direct(Size(**fixed | {axis: 2**k})) for k in (10, 11, 12)]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0])


def test_rows_of_a_curve(no_memory, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "outputs", [64, 128, 256, 512])
    monkeypatch.setitem(FIXED, "outputs", {"inputs": 64, "latents": 8})
    path, picture = tmp_path / "rows.json", tmp_path / "rows.png"
    asked = ["--scaling", "outputs", "--fast-attention", "always", "never", "--repeats", "2", "--largest", "256"]
    assert benchmark.main([*asked, "--json", str(path), "--plot", str(picture)]) == 0
    rows = json.loads(path.read_text())
    assert [(row["outputs"], row["fast_attention"]) for row in rows] == [
        (count, way) for count in (64, 128, 256) for way in ("always", "never")
    ]
    for row in rows:
        assert (row["axis"], row["inputs"], row["latents"], row["repeats"]) == ("outputs", 64, 8, 2)
        assert row["output_bytes"] == 4 * 2 * row["outputs"]
        assert row["memory_beyond_output"] == 10**6 - row["output_bytes"]
        assert 0 < row["seconds"] <= row["median_seconds"] and row["error"] is None
        assert row["peak_fraction"] == row["executed_gflops_per_second"] / row["peak_gflops_per_second"]
    assert all(row["executed_flops"] == row["direct_flops"] for row in rows[1::2])
    printed = capsys.readouterr()
    assert "outputs up to 256, float32 sdpa never: seconds ~ outputs^" in printed.out
    assert "repeat 2 of 2" in printed.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["rows.json", "rows.png"]


def test_a_way_that_fails_costs_only_its_row(no_memory, monkeypatch, capsys):
    monkeypatch.setitem(SIZES, "inputs", [64])
    monkeypatch.setitem(FIXED, "inputs", {"outputs": 64, "latents": 8})
    assert benchmark.main(["--scaling", "inputs", "--backends", "flash_attention_2", "sdpa", "--repeats", "1"]) == 1
    assert "inputs 64 float32 flash_attention_2 auto: ImportError" in capsys.readouterr().out


@pytest.mark.medium
def test_memory_of_a_size_is_that_of_its_form():
    """Reading directly forms the dense array and its normed form, keys and values; by pieces none of them."""
    # Each of 97 MB: no allocator keeps so much to itself, so that this process is as good as a fresh one.
    size, dense = Size(inputs=2**17, outputs=64, latents=8), 4 * 2**17 * (64 + 2 * 65)
    direct, fast = (
        benchmark_scaling.memory_of_size(size, "float32", "cpu", torch.get_num_threads(), ("sdpa", way, False))
        for way in ("never", "always")
    )
    if direct is None:
        pytest.skip("the peak of a process can be set back on Linux only")
    assert 3 * dense < direct < 8 * dense and fast < direct / 2
