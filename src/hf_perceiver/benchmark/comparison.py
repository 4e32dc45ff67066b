"""One architecture at inference, ours beside the built-in: the same answer, then seconds, operations and memory."""

import math
import statistics
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from itertools import product
from typing import Any

import torch
import transformers

from .measures import (
    count_flops,
    device_name,
    fill_rates,
    in_fresh_process,
    matmul_gflops,
    measure_memory,
    measure_seconds,
    peak_products,
    use_tf32,
)
from .report import Row, empty_row, first_line, title
from .workloads import (
    Inputs,
    Workload,
    builtin_of,
    cast,
    choose,
    count_sizes,
    largest_error,
    on_meta,
    part_of,
    redraw,
    run_builtin,
    run_ours,
    worst_of,
    zeros,
)

# Two right answers differ by about 1e-5 in float32, and by what bfloat16 keeps, 2^-8, a few times over.
ERROR_BOUNDS = {"float32": 1e-4, "bfloat16": 5e-2, "float16": 1e-2}
# What a row may fail with: a package, a GPU, a compiler or memory that is not there, an option that does not fit.
FAILURES = (ImportError, RuntimeError, ValueError)


def memory_of_ours(
    workload: Workload, dtype: str, device: str, threads: int, backend: str, fast_attention: str, compiled: bool
) -> int | None:
    """Memory of one pass of our model; for a process of its own."""
    torch.set_num_threads(threads)
    model = zeros(workload.ours, device, dtype)
    choose(model, backend, fast_attention)
    inputs = cast(workload.make_inputs() | workload.question(), device, model.dtype)
    run = partial(run_ours, torch.compile(model, dynamic=False) if compiled else model, inputs)
    if compiled:
        run()  # what the compiler takes is no part of a run
    return measure_memory(run, device)


def memory_of_builtin(workload: Workload, dtype: str, device: str, threads: int) -> int | None:
    """Memory of one pass of the built-in; for a process of its own."""
    torch.set_num_threads(threads)
    model = zeros(workload.builtin, device, dtype)
    inputs = cast(workload.builtin_inputs(workload.make_inputs()), device, model.dtype)
    return measure_memory(partial(run_builtin, model, inputs, 0, workload.builtin_passes), device)


def spread(count: int, chosen: int) -> list[int]:
    """`chosen` of `count` passes, evenly, from the first to the last."""
    return [0] if chosen == 1 else [i * (count - 1) // (chosen - 1) for i in range(chosen)]


class Comparison:
    """One model, ours and the built-in if asked (`against`), and its rows; `step` is told what is done next."""

    work = "inference"

    def __init__(
        self,
        name: str,
        workload: Workload,
        *,
        against: str | None = None,
        device: str = "cpu",
        tf32: bool = False,
        repeats: int = 3,
        builtin_passes_timed: int = 4,
        step: Callable[[str], None] = lambda what: None,
    ):
        self.name, self.workload, self.device, self.repeats, self.step = name, workload, device, repeats, step
        self.tf32 = tf32
        use_tf32(False)
        step(f"{name}: random weights")
        torch.manual_seed(0)
        self.ours: Any = self._prepare(workload.ours())
        self.theirs: Any = None
        redraw(self.ours)
        self.inputs = workload.make_inputs()
        # A step of training asks for what one pass answers.
        self.passes = passes = workload.builtin_passes if self.work == "inference" else 1
        self.indices = spread(passes, min(builtin_passes_timed, passes))
        if against == "builtin":
            step(f"{name}: the built-in's answers")
            self.theirs = self._prepare(builtin_of(self.ours)).to(device)
            self.wanted = self._builtin_answers()
        use_tf32(tf32)
        self.ours.to(device)
        step(f"{name}: counting operations")
        self.direct_flops = self._count_direct()
        self.measured_on = {
            "builtin_passes": passes if self.theirs else None,
            "builtin_passes_timed": len(self.indices) if self.theirs else None,
            "sizes": count_sizes(self.ours, self._inputs(torch.float32)),
            "repeats": repeats,
            "threads": torch.get_num_threads(),
            "device": device_name(device),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }

    def rows(
        self,
        dtype: str,
        backends: Sequence[str] = ("sdpa",),
        fast_attention: Sequence[str] = ("auto",),
        compiled: Sequence[bool] = (False,),
    ) -> list[Row]:
        """A row for each backend and each choice of fast attention, complete but for those that fail."""
        rows = self._empty_rows(dtype, backends, fast_attention, compiled)
        self.ours.to(getattr(torch, dtype))
        for row in rows:
            self.step(f"{title(row)}: {'comparing' if self.theirs else 'trying'}")
            self._try(row)
        complete = [row for row in rows if row["error"] is None]
        if complete:
            builtin_dtype = self._builtin_dtype(dtype) if self.theirs else None
            self._time(complete, builtin_dtype)
            self._weigh(complete, builtin_dtype)
        return rows

    def _prepare(self, model: Any) -> Any:
        # torch's counter of operations stumbles over parameters in inference mode that want gradients.
        return model.requires_grad_(False)

    def _empty_rows(self, dtype: str, *ways: Sequence[Any]) -> list[Row]:
        if self.__dict__.pop("_compiled", None) is not None:
            torch.compiler.reset()  # compiled code is kept a few times over; each dtype starts afresh
        rows = [empty_row(self.work, self.name, dtype, *way, self.tf32) for way in product(*ways)]
        return [row | self.measured_on | {"direct_flops": self.direct_flops} for row in rows]

    def _inputs(self, dtype: torch.dtype) -> Inputs:
        return cast(self.inputs | self.workload.question(), self.device, dtype)

    @cached_property
    def _compiled(self) -> Any:
        return torch.compile(self.ours, dynamic=False)

    def _model(self, row: Row) -> Any:
        """Our model, set to run as this row says."""
        choose(self.ours, row["backend"], row["fast_attention"])
        return self._compiled if row["compiled"] else self.ours

    def _run(self, row: Row) -> Callable[[], Any]:
        """What is timed for a row."""
        return partial(run_ours, self._model(row), self._inputs(getattr(torch, row["dtype"])))

    def _answer(self, row: Row) -> Any:
        """What is compared of a row."""
        return self._run(row)()

    def _builtin_runs(self, dtype: str) -> list[Callable[[], Any]]:
        """What is timed of the built-in."""
        inputs = cast(self.workload.builtin_inputs(self.inputs), self.device, getattr(torch, dtype))
        return [partial(run_builtin, self.theirs, inputs, index, self.passes) for index in self.indices]

    def _builtin_answers(self) -> list[Any]:
        answers = [run() for run in self._builtin_runs("float32")]
        points = self.workload.output_points
        return answers if points is None else [answer[:, list(points)] for answer in answers]

    def _count_direct(self) -> int:
        model = self._prepare(on_meta(self.workload.ours))
        choose(model, "eager", "never")
        return count_flops(partial(run_ours, model, cast(self._inputs(torch.float32), "meta", torch.float32)))[0]

    def _try(self, row: Row) -> None:
        """Run a row once, count what it does, and compare it."""
        try:
            if row["compiled"]:
                row["executed_flops"], got = self.direct_flops, self._answer(row)
            else:
                row["executed_flops"], got = count_flops(partial(self._answer, row))
        except FAILURES as error:
            row["error"] = first_line(error)
            return
        if self.theirs is not None:
            self._judge(row, self._errors(got))

    def _errors(self, logits: Any) -> list[float]:
        parts = (part_of(logits, self.theirs.config, index, self.passes) for index in self.indices)
        return [largest_error(got, want) for got, want in zip(parts, self.wanted, strict=True)]

    def _judge(self, row: Row, errors: list[float]) -> None:
        worst = worst_of(errors)
        # TF32 has as many bits of mantissa as float16.
        row["error_bound"] = ERROR_BOUNDS["float16" if self.tf32 and row["dtype"] == "float32" else row["dtype"]]
        row["max_error"] = worst if math.isfinite(worst) else None
        if not worst <= row["error_bound"]:
            row["error"] = f"max_error {worst:.1e} is above {row['error_bound']:.0e}; a wrong answer is not timed"

    def _builtin_dtype(self, dtype: str) -> str:
        """This dtype, or float32 if the built-in fails in it; its weights are left in what is returned."""
        self.step(f"{self.name} {dtype}: trying the built-in")
        self.theirs.to(getattr(torch, dtype))
        try:
            self._builtin_runs(dtype)[0]()
        except RuntimeError:
            self.theirs.to(torch.float32)
            return "float32"
        return dtype

    def _time(self, rows: list[Row], builtin_dtype: str | None) -> None:
        # In turns, so that all see the same moods of the machine.
        taken: list[list[float]] = [[] for _ in rows]
        taken_by_builtin: list[float] = []
        peak, products = 0.0, peak_products(self.ours, self.device)
        for repeat in range(1, self.repeats + 1):
            for row, seconds in zip(rows, taken, strict=True):
                self.step(f"{title(row)}: repeat {repeat} of {self.repeats}")
                seconds.append(measure_seconds(self._run(row), self.device))
            if builtin_dtype is not None:
                self.step(f"{self.name} {self.work} built-in {builtin_dtype}: repeat {repeat} of {self.repeats}")
                runs = self._builtin_runs(builtin_dtype)
                seconds_timed = sum(measure_seconds(run, self.device) for run in runs)
                taken_by_builtin.append(seconds_timed * self.passes / len(runs))
            self.step(f"{self.name} {rows[0]['dtype']}: the machine's peak, repeat {repeat} of {self.repeats}")
            peak = max(peak, matmul_gflops(products, getattr(torch, rows[0]["dtype"]), self.device))
        for row, seconds in zip(rows, taken, strict=True):
            row["seconds"], row["median_seconds"] = min(seconds), statistics.median(seconds)
            fill_rates(row, peak)
            if builtin_dtype is not None:
                row["builtin_dtype"] = builtin_dtype
                row["builtin_seconds"] = min(taken_by_builtin)
                row["builtin_median_seconds"] = statistics.median(taken_by_builtin)
                row["ratio"] = row["builtin_seconds"] / row["seconds"]

    def _weigh(self, rows: list[Row], builtin_dtype: str | None) -> None:
        builtin_memory = None
        asked = (self.device, torch.get_num_threads())
        if builtin_dtype is not None:
            self.step(f"{self.name} built-in {builtin_dtype}: memory")
            builtin_memory = in_fresh_process(memory_of_builtin, self.workload, builtin_dtype, *asked)
        for row in rows:
            self.step(f"{title(row)}: memory")
            way = (row["backend"], row["fast_attention"], row["compiled"])
            row["memory"] = in_fresh_process(memory_of_ours, self.workload, row["dtype"], *asked, *way)
            row["builtin_memory"] = builtin_memory
            if row["memory"] and builtin_memory:
                row["memory_ratio"] = row["memory"] / builtin_memory
