"""The experiment with permuted digits: that its runs differ in nothing else, and what it writes."""

import csv
import json

import pytest
import torch

from hf_perceiver.training import permuted_digits
from hf_perceiver.training.permuted_digits import (
    COLUMNS,
    CONVOLUTIONS,
    PERCEIVER,
    PIXELS,
    ConvolutionalNetwork,
    draw,
    main,
    run_one,
    summary,
)

ROWS = [
    dict(zip(COLUMNS, (PERCEIVER, PIXELS[permute], seed, epoch, top1), strict=True))
    for permute, tops in {"none": (0.5, 0.9), "pixels": (0.4, 0.8)}.items()
    for seed in (0, 1)
    for epoch, top1 in zip((1, 2), tops, strict=True)
]


def test_the_contrast_is_told_where_pixels_were_and_looks_at_neighbours():
    """Moved together, pixels and positions are to a convolution another picture."""
    torch.manual_seed(0)
    network = ConvolutionalNetwork().eval()
    pixels, labels = torch.randn(2, 3, 8, 8), torch.tensor([1, 2])
    axis = torch.linspace(-1, 1, 8)
    places, order = torch.cartesian_prod(axis, axis), torch.randperm(64)
    true = network(pixels, places, labels)["logits"]
    moved = network(pixels.flatten(2)[..., order].unflatten(-1, (8, 8)), places[order], labels)["logits"]
    elsewhere = network(pixels, places[order], labels)["logits"]
    assert not torch.allclose(true, moved, atol=1e-3) and not torch.allclose(true, elsewhere, atol=1e-3)


def test_the_table_has_each_seed_after_the_last_epoch():
    lines = summary(ROWS).splitlines()
    assert lines[2] == "| Perceiver | true | 90.0%, 90.0% | 90.0% |"
    assert lines[3] == "| Perceiver | permuted, positions in place | 80.0%, 80.0% | 80.0% |"
    assert len(lines) == 4, "what was not run has no line"


def test_the_picture_is_written_whole_and_small(tmp_path):
    draw(ROWS, tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir()] == ["curves.png"]
    assert (tmp_path / "curves.png").stat().st_size < 100_000


@pytest.mark.medium
def test_a_perceiver_learns_the_same_from_pixels_that_move_with_their_positions(tmp_path):
    """Same seed, same batches, same augmentation: after an epoch of 23 steps rounding has moved the loss by less than 1e-3."""
    for permute in ("none", "pixels_and_positions"):
        run_one(PERCEIVER, permute, 0, 1, tmp_path / permute)
    true, moved = (json.loads((tmp_path / p / "metrics.json").read_text()) for p in ("none", "pixels_and_positions"))
    assert moved["eval_loss"] == pytest.approx(true["eval_loss"], abs=1e-3)


@pytest.mark.medium
def test_the_command_writes_figures_and_does_not_repeat_what_is_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(permuted_digits, "VARIANTS", ((CONVOLUTIONS, "none"),))
    command = ["--output_dir", str(tmp_path), "--epochs", "2", "--seeds", "0"]
    main(command)
    with open(tmp_path / "curves.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [2] and 0.1 < float(rows[0]["top1"]) <= 1
    before = (tmp_path / "convolutions-none-0" / "metrics.json").stat().st_mtime_ns
    main(command)
    assert (tmp_path / "convolutions-none-0" / "metrics.json").stat().st_mtime_ns == before
    assert "| convolutions | true |" in capsys.readouterr().out
