"""Runs of the bundled models' recipes: their clock, the course they write down, the folder they begin and go on in."""

import json
import math
import time
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_perceiver.training import timed_run
from hf_perceiver.training.timed_run import (
    BEST,
    Clock,
    Validation,
    begin,
    kept,
    publish_best,
    read_course,
    run_facts,
    step_of,
)


@dataclass
class Recipe:
    output: str | None = None
    resume: str | None = None
    steps: int | None = None
    minutes: float | None = None
    seed: int = 0


def control():
    return SimpleNamespace(should_save=False, should_training_stop=False)


def test_a_run_by_steps_ends_with_its_last_step():
    clock = Clock(steps=10, minutes=None)
    assert [clock.done(step) for step in (0, 5, 10, 11)] == [0.0, 0.5, 1.0, 1.0]
    for step, over in ((9, False), (10, True)):
        flags = control()
        clock.on_step_end(None, SimpleNamespace(global_step=step), flags)
        assert flags.should_save is over and flags.should_training_stop is over
    assert clock.bar is None


def test_a_run_by_time_ends_when_the_time_is_over_and_shows_how_much_is(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock = Clock(steps=None, minutes=1.0)
    clock.before = 15.0  # of an interrupted run
    clock.on_train_begin(None, SimpleNamespace(global_step=0), control())
    now[0] += 15.0
    assert clock.seconds == 30.0 and clock.done(step=3) == 0.5
    clock.on_step_end(None, SimpleNamespace(global_step=3), control())
    assert clock.bar.n == 30.0
    now[0] += 45.0
    flags = control()
    clock.on_step_end(None, SimpleNamespace(global_step=4), flags)
    clock.on_train_end(None, None, None)
    assert flags.should_training_stop and clock.bar.n == 60.0
    assert "/60 s" in capsys.readouterr().err


@pytest.mark.parametrize("ends", [(None, None), (5, 1.0)])
def test_a_run_has_one_end(ends):
    with pytest.raises(ValueError, match="ends by steps or by minutes"):
        Clock(*ends)


def test_the_clock_is_saved_with_each_state(tmp_path):
    (tmp_path / "checkpoint-7").mkdir()
    clock = Clock(steps=10, minutes=None)
    clock.before = 100.0
    clock.on_save(SimpleNamespace(output_dir=str(tmp_path)), SimpleNamespace(global_step=7), None)
    assert json.loads((tmp_path / "checkpoint-7" / "clock.json").read_text())["seconds"] >= 100


def validation(folder, figures, monkeypatch):
    """A validation of a model that has one figure after the other; what it keeps is written as a plain file."""
    saved = []
    monkeypatch.setattr(timed_run, "save_halved", lambda model, directory: saved.append(directory))
    values = iter(figures)
    made = Validation(
        folder,
        Clock(steps=9, minutes=None),
        measure=lambda model: {"error": next(values)},
        score=lambda row: -row["error"],
        show=lambda row: f"error {row['error']:.2f}",
    )
    return made, saved


def test_the_course_is_written_and_the_best_weights_are_kept(tmp_path, monkeypatch, capsys):
    made, saved = validation(tmp_path, [3.0, 1.0, 2.0], monkeypatch)
    made.on_train_begin(None, SimpleNamespace(global_step=0, log_history=[]), None)
    for step in (4, 8):
        made.on_save(None, SimpleNamespace(global_step=step, log_history=[{"loss": step / 10}, {"rate": 1}]), None)
    course = read_course(tmp_path)
    assert [(row["step"], row["error"]) for row in course] == [(0, 3.0), (4, 1.0), (8, 2.0)]
    assert math.isnan(course[0]["loss"]) and course[2]["loss"] == 0.8
    assert saved == [tmp_path / BEST] * 2  # at the start and at step 4, not at 8
    assert "step 8, 0.0 min: loss 0.8000, error 2.00" in capsys.readouterr().err


def test_a_resumed_run_writes_over_what_came_after_its_state(tmp_path, monkeypatch):
    (tmp_path / "learning_curve.csv").write_text("step,seconds,loss,error\n0,0,nan,3\n4,1,1,1\n8,2,1,2\n")
    made, saved = validation(tmp_path, [2.5], monkeypatch)
    made.on_train_begin(None, SimpleNamespace(global_step=4, log_history=[]), None)  # its start is there already
    made.on_save(None, SimpleNamespace(global_step=6, log_history=[]), None)
    assert [row["step"] for row in read_course(tmp_path)] == [0, 4, 6]
    assert saved == []


def test_a_new_run_writes_down_its_options(tmp_path):
    recipe, output, last = begin(Recipe(output=str(tmp_path / "run"), seed=5))
    assert (recipe.minutes, output, last) == (60.0, tmp_path / "run", None)
    assert (
        json.loads((output / "recipe.json").read_text()) == kept(recipe) == {"steps": None, "minutes": 60.0, "seed": 5}
    )


def test_a_resumed_run_has_the_options_it_began_with(tmp_path):
    begin(Recipe(output=str(tmp_path), steps=9, seed=5))
    (tmp_path / "state" / "checkpoint-4").mkdir(parents=True)
    (tmp_path / "state" / "checkpoint-8").mkdir()
    recipe, output, last = begin(Recipe(resume=str(tmp_path)))
    assert (recipe.steps, recipe.seed, output, step_of(last)) == (9, 5, tmp_path, 8)
    assert step_of(None) == 0


def test_folders_that_cannot_be_used_are_named(tmp_path):
    with pytest.raises(ValueError, match="holds no interrupted run; start one with --output"):
        begin(Recipe(resume=str(tmp_path)))
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"is not empty; choose another folder, or go on with it by --resume"):
        begin(Recipe(output=str(tmp_path)))


def test_the_best_is_copied_whole(tmp_path):
    (tmp_path / BEST).mkdir(parents=True)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / BEST / name).write_text(name)
    publish_best(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors", "state"]
    assert (tmp_path / "config.json").read_text() == "config.json"


def test_facts_of_a_run_count_parameters_and_name_versions():
    facts = run_facts(nn.Linear(3, 2), Recipe(output="a", steps=4), 4, 12.4)
    assert (facts["parameters"], facts["steps"], facts["seconds"], facts["torch"]) == (8, 4, 12, torch.__version__)
    assert facts["recipe"] == {"steps": 4, "minutes": None, "seed": 0}
