"""Runs of the bundled models' recipes: by steps or by time, validated as they go, taken up again where they stopped.

A run's folder holds recipe.json, learning_curve.csv and state/ while it goes on; the best weights so far stand in
state/best.
"""

import csv
import io
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .storage import save_halved, write_text

STATE, BEST = "clock.json", Path("state") / "best"
# Where a run is written and what is only measured: all other options are what it can be repeated from.
PLACES = ("output", "resume", "evaluate", "sintel", "kitti")


class Clock(TrainerCallback):
    """How much of a run is done, by its steps or by its time, which goes on where an interrupted run stopped.

    A run by time has a bar of its seconds; one by steps has Trainer's.
    """

    def __init__(self, steps: int | None, minutes: float | None):
        if (steps is None) == (minutes is None):
            raise ValueError(f"a run ends by steps or by minutes, not by steps={steps} and minutes={minutes}")
        self.steps, self.minutes = steps, minutes
        self.before, self.started = 0.0, time.monotonic()
        self.bar: Any = None

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def done(self, step: int) -> float:
        """0 at the start, 1 at the end"""
        share = step / self.steps if self.steps is not None else self.seconds / (60 * self.minutes)  # type: ignore[operator]
        return min(share, 1.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.started = time.monotonic()
        if self.minutes is not None:
            form = "{l_bar}{bar}| {n:.0f}/{total:.0f} s{postfix}"
            self.bar = tqdm(total=60 * self.minutes, initial=self.before, bar_format=form, file=sys.stderr)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.set_postfix_str(f"step {state.global_step}", refresh=False)
            self.bar.update(min(self.seconds, self.bar.total) - self.bar.n)
        if self.done(state.global_step) >= 1:
            control.should_save = control.should_training_stop = True

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.bar is not None:
            self.bar.close()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        write_text(folder / STATE, json.dumps({"seconds": self.seconds}) + "\n")


class Validation(TrainerCallback):
    """Measures the model at the start and beside every saved state, keeps the best weights, and writes down the course.

    measure: model -> its figures; score: a row of the course -> the higher the better; show: a row -> what is printed.
    """

    def __init__(
        self,
        output: Path,
        clock: Clock,
        measure: Callable[[Any], dict[str, float]],
        score: Callable[[dict[str, float]], float],
        show: Callable[[dict[str, float]], str],
    ):
        self.output, self.clock = output, clock
        self.measure, self.score, self.show = measure, score, show
        self.course = read_course(output)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if not self.course:
            self.note(state, model)

    def on_save(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.note(state, model)

    def note(self, state: Any, model: Any) -> None:
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        figures = self.measure(model)
        self.course = [row for row in self.course if row["step"] < state.global_step]
        loss = losses[-1] if losses else math.nan
        row = {"step": state.global_step, "seconds": round(self.clock.seconds), "loss": loss, **figures}
        self.course.append(row)
        lines = [",".join(row), *(",".join(f"{value:.5g}" for value in each.values()) for each in self.course)]
        write_text(self.output / "learning_curve.csv", "\n".join(lines) + "\n")
        minutes = row["seconds"] / 60
        tqdm.write(f"step {row['step']}, {minutes:.1f} min: loss {loss:.4f}, {self.show(row)}", file=sys.stderr)
        if self.score(row) >= max(map(self.score, self.course)):
            save_halved(model, self.output / BEST)


def read_course(output: Path) -> list[dict[str, float]]:
    """learning_curve.csv, a row for each validation; the first is before the first step. Empty where there is none yet."""
    path = output / "learning_curve.csv"
    rows = csv.DictReader(io.StringIO(path.read_text())) if path.is_file() else []
    return [{name: float(value) for name, value in row.items()} for row in rows]


def begin(recipe: Any) -> tuple[Any, Path, str | None]:
    """(recipe, folder, last state or None) of a run that begins, or that goes on with `resume`.

    recipe: a dataclass with output, resume, steps and minutes. Raises ValueError where the folder of a new run holds
    something, and where there is nothing to go on with.
    """
    output = Path(recipe.resume or recipe.output)
    if recipe.resume:
        path = output / "recipe.json"
        last = get_last_checkpoint(str(output / "state")) if (output / "state").is_dir() else None
        if not path.is_file() or last is None:
            raise ValueError(f"{output} holds no interrupted run; start one with --output {output}")
        return type(recipe)(resume=str(output), **json.loads(path.read_text())), output, last
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"{output} is not empty; choose another folder, or go on with it by --resume {output}")
    if recipe.steps is None and recipe.minutes is None:
        recipe = replace(recipe, minutes=60.0)
    write_text(output / "recipe.json", json.dumps(kept(recipe), indent=1) + "\n")
    return recipe, output, None


def kept(recipe: Any) -> dict[str, Any]:
    """What a run can be repeated from: all options but where it is written."""
    return {name: value for name, value in asdict(recipe).items() if name not in PLACES}


def step_of(last: str | None) -> int:
    """The step of a saved state, 0 at the start."""
    return 0 if last is None else int(Path(last).name.split("-")[-1])


def train_by_clock(
    model: Any,
    recipe: Any,
    output: Path,
    last: str | None,
    *,
    optimizer: torch.optim.Optimizer,
    dataset: Any,
    collator: Any,
    measure: Callable[[Any], dict[str, float]],
    score: Callable[[dict[str, float]], float],
    show: Callable[[dict[str, float]], str],
) -> tuple[int, float]:
    """Train with a rate that rises over `warmup_steps` and falls as a cosine of what is left -> (steps, seconds).

    dataset: a stream that begins where the run stopped. The rest is as in `Validation`.
    """
    clock = Clock(None if recipe.minutes is not None else recipe.steps, recipe.minutes)
    if last is not None:
        clock.before = json.loads((Path(last) / STATE).read_text())["seconds"]
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda at: min((at + 1) / recipe.warmup_steps, 1.0) * 0.5 * (1 + math.cos(math.pi * clock.done(at))),
    )
    arguments = TrainingArguments(
        output_dir=str(output / "state"),
        per_device_train_batch_size=recipe.batch_size,
        max_steps=recipe.steps if recipe.minutes is None else 10_000_000,
        bf16=recipe.mixed_precision,
        use_cpu=not torch.accelerator.is_available(),
        max_grad_norm=1.0,
        logging_steps=min(50, recipe.save_every),
        save_steps=recipe.save_every,
        save_total_limit=2,
        dataloader_num_workers=recipe.workers,
        ignore_data_skip=True,
        remove_unused_columns=False,
        report_to=[],
        seed=recipe.seed,
        disable_tqdm=recipe.minutes is not None,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=dataset,
        data_collator=collator,
        optimizers=(optimizer, schedule),
        callbacks=[clock, Validation(output, clock, measure, score, show)],
    )
    trainer.train(resume_from_checkpoint=last)
    return trainer.state.global_step, clock.seconds


def run_facts(model: nn.Module, recipe: Any, steps: int, seconds: float) -> dict[str, Any]:
    """What metrics.json says of every run."""
    return {
        "steps": steps,
        "seconds": round(seconds),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "recipe": kept(recipe),
    }


def publish_best(output: Path) -> None:
    """Copy the best weights, and what was saved beside them, to the run's folder; each file appears whole."""
    for file in sorted((output / BEST).iterdir()):
        partial = output / (file.name + ".partial")
        shutil.copyfile(file, partial)
        os.replace(partial, output / file.name)
