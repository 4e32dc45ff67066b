import csv

import pytest
import torch

from hf_perceiver.training import initialization_curves
from hf_perceiver.training.initialization_curves import (
    COLUMNS,
    INITIALIZERS,
    TABLE,
    TASKS,
    Data,
    compare,
    main,
    read_table,
    run,
)


@pytest.fixture(scope="module")
def images():
    return TASKS["images"].load()


@pytest.mark.parametrize("name", TASKS)
def test_every_task_can_start_in_all_three_ways(name):
    for initializer in INITIALIZERS:
        config = TASKS[name].config()
        config.initializer = initializer
        model = TASKS[name].head(config)
        assert model.num_parameters() < 1_000_000


def test_batches_depend_on_seed_and_step_alone(images):
    first, again = images.batch(0, 3), images.batch(0, 3)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["pixel_values"], images.batch(0, 4)["pixel_values"])
    assert not torch.equal(first["pixel_values"], images.batch(1, 3)["pixel_values"])


def test_a_run_repeats_from_its_seed_and_is_measured_before_it_begins(images):
    small = Data(images.batch, lambda model: next(model.parameters()).sum().item())
    one, two = (run(TASKS["images"], small, "deepmind", 0, 2) for _ in range(2))
    assert one == two
    assert [row["step"] for row in one] == [0, 1, 2]
    assert len({row["score"] for row in one}) == 3  # each step trains, the first row is of the fresh model


def test_runs_that_are_there_are_not_repeated(images, tmp_path, monkeypatch):
    made = []

    def count(task, data, initializer, seed, steps):
        made.append((initializer, seed, steps))
        return [{"step": step, "loss": 2.0 - step, "score": 0.5} for step in range(steps + 1)]

    monkeypatch.setattr(initialization_curves, "run", count)
    compare(tmp_path, ["images"], [0], 2)
    assert made == [(initializer, 0, 2) for initializer in INITIALIZERS]
    compare(tmp_path, ["images"], [0, 1], 2)
    assert made[3:] == [(initializer, 1, 2) for initializer in INITIALIZERS]
    rows = compare(tmp_path, ["images"], [0, 1], 2)
    assert len(made) == 6 and len(rows) == 18
    assert (tmp_path / "init_images.png").stat().st_size < 100_000
    assert read_table(tmp_path / TABLE) == rows


def test_another_file_of_that_name_is_not_overwritten(tmp_path):
    (tmp_path / TABLE).write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"columns \['a', 'b'\].*choose another folder"):
        main(["--output", str(tmp_path), "--tasks", "images", "--smoke-test"])


@pytest.mark.medium
def test_the_smoke_test_writes_the_table_and_a_picture(tmp_path, capsys):
    main(["--output", str(tmp_path), "--tasks", "flow", "--smoke-test"])
    with open(tmp_path / TABLE, newline="") as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3 * 5
    assert {p.name for p in tmp_path.iterdir()} == {TABLE, "init_flow.png"}
    assert capsys.readouterr().out.count("after 4 steps") == 3


@pytest.mark.slow
@pytest.mark.parametrize("name", ["text", "images"])
def test_the_smoke_test_runs_on(name, tmp_path):
    """Text reads the standard library's documentation, which takes many seconds."""
    main(["--output", str(tmp_path), "--tasks", name, "--smoke-test"])
    assert len(read_table(tmp_path / TABLE)) == 3 * 5


@pytest.mark.parametrize("given", [["--steps", "0"], ["--seeds", "-1"], ["--tasks", "sound"]])
def test_impossible_options_are_refused(given, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--output", str(tmp_path), *given])
    assert given[0].lstrip("-") in capsys.readouterr().err
