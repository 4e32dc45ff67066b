"""One training step, ours beside the built-in: forward, backward, AdamW.

The loss is the mean square of the logits, taken outside the model on both sides; of several outputs, the sum. A step
takes one example, as inference does; video autoencoding learns from 512 pixels and 512 audio patches, as in the paper.
float32 is float32 all through; bfloat16 is autocast over float32 weights. Compared are the loss and the norm of all
gradients, in the first step. Memory is what a step holds at its peak beyond weights and inputs: activations, gradients,
and the optimizer's state. It is measured first, and what finds no room is not timed.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..builtin import builtin_config
from ..checkpoint_names import apply_numerics
from .comparison import FAILURES, Comparison
from .measures import count_flops, in_fresh_process, measure_memory
from .report import Row, first_line, title
from .workloads import Inputs, Workload, cast, choose, on_meta, output_counts, zeros

TRAINING_DTYPES = ("float32", "bfloat16")


def mean_square(logits: Any) -> Tensor:
    """A tensor, or a dict of them -> one number"""
    tensors = logits.values() if isinstance(logits, dict) else [logits]
    return torch.stack([tensor.float().square().mean() for tensor in tensors]).sum()


def backward(model: Any, inputs: Inputs, device: str, dtype: str) -> Tensor:
    """Forward and backward; the loss."""
    with torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"):
        logits = model(**inputs).logits
    loss = mean_square(logits)
    loss.backward()
    return loss.detach()


def train_step(model: Any, optimizer: torch.optim.Optimizer, inputs: Inputs, device: str, dtype: str) -> None:
    backward(model, inputs, device, dtype)
    optimizer.step()
    optimizer.zero_grad()


def make_optimizer(model: Any) -> torch.optim.Optimizer:
    """With steps of length 0, which take as long, so that every row starts from the same weights."""
    return torch.optim.AdamW(model.parameters(), lr=0.0)


def loss_and_gradient(model: Any, inputs: Inputs, device: str, dtype: str) -> tuple[float, float]:
    """The loss, and the norm of all gradients, which are gone afterwards."""
    loss = backward(model, inputs, device, dtype)
    norms = [parameter.grad.double().norm() for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return loss.item(), torch.stack(norms).norm().item()


def learnt_points(workload: Workload) -> dict[str, Tensor | None]:
    """The places that a step learns from, by output; none where it learns from all."""
    if not workload.training_points:
        return {}
    _, config = builtin_config(apply_numerics(workload.recipe(), "builtin"))
    counts = output_counts(config)
    chosen = {
        name: torch.arange(0, counts[name], max(counts[name] // n, 1))[:n] for name, n in workload.training_points
    }
    return {**chosen, "label": None}


def training_inputs(workload: Workload, inputs: Inputs, *, ours: bool) -> Inputs:
    """Inputs, and what is asked, by the name that it has there."""
    points = learnt_points(workload)
    return inputs | ({"output_points" if ours else "subsampled_output_points": points} if points else {})


def limit_memory() -> None:
    """Have this process fail where memory runs out, rather than the operating system end one of its choice."""
    found = Path("/proc/meminfo")
    if found.exists():
        import resource  # where there is such a file, there is this module

        line = next(line for line in found.read_text().splitlines() if line.startswith("MemAvailable"))
        # In KiB; a tenth is left to the process that asked, which will run this too.
        resource.setrlimit(resource.RLIMIT_DATA, (1024 * int(line.split()[1]) * 9 // 10, resource.RLIM_INFINITY))


def memory_of_step(
    workload: Workload, dtype: str, device: str, threads: int, way: tuple[str, str, bool] | None
) -> dict[str, Any]:
    """Memory of one step of our model run some way, or of the built-in for None; for a process of its own."""
    torch.set_num_threads(threads)
    model = zeros(workload.builtin if way is None else workload.ours, device, "float32").train()
    inputs = training_inputs(workload, workload.make_inputs(), ours=way is not None)
    inputs = cast(inputs, device, torch.float32)
    if device == "cpu":
        limit_memory()
    called, optimizer = model, make_optimizer(model)
    try:
        if way is not None:
            choose(model, *way[:2])
        if way is not None and way[2]:
            called = torch.compile(model, dynamic=False)
            loss_and_gradient(called, inputs, device, dtype)  # what the compiler takes is no part of a step
        return {"memory": measure_memory(partial(train_step, called, optimizer, inputs, device, dtype), device)}
    except FAILURES as error:
        return {"error": first_line(error)}


class TrainingComparison(Comparison):
    """As Comparison, of training steps."""

    work = "training"

    def rows(
        self,
        dtype: str,
        backends: Sequence[str] = ("sdpa",),
        fast_attention: Sequence[str] = ("auto",),
        compiled: Sequence[bool] = (False,),
    ) -> list[Row]:
        rows = self._empty_rows(dtype, backends, fast_attention, compiled)
        for row in rows:
            self.step(f"{title(row)}: memory")
            found = self._memory(dtype, (row["backend"], row["fast_attention"], row["compiled"]))
            row["memory"], row["error"] = found.get("memory"), found.get("error")
            if row["error"] is None:
                self.step(f"{title(row)}: {'comparing' if self.theirs else 'trying'}")
                self._try(row)
        complete = [row for row in rows if row["error"] is None]
        if complete:
            builtin_dtype = self._builtin_dtype(dtype) if self.theirs else None
            self._time(complete, builtin_dtype)
            for row in complete:
                if builtin_dtype is not None:
                    row["builtin_memory"] = self._builtin_memory(builtin_dtype).get("memory")
                if row["memory"] and row["builtin_memory"]:
                    row["memory_ratio"] = row["memory"] / row["builtin_memory"]
                row["error"] = self.builtin_error
        return rows

    builtin_error: str | None = None

    def _prepare(self, model: Any) -> Any:
        return model.train()

    def _inputs(self, dtype: torch.dtype) -> Inputs:
        return cast(training_inputs(self.workload, self.inputs, ours=True), self.device, torch.float32)

    def _memory(self, dtype: str, way: tuple[str, str, bool] | None) -> dict[str, Any]:
        found = in_fresh_process(memory_of_step, self.workload, dtype, self.device, torch.get_num_threads(), way)
        return {"error": "its process died, out of memory"} if found is None else found

    def _builtin_memory(self, dtype: str) -> dict[str, Any]:
        if dtype not in self._builtin_memories:
            self.step(f"{self.name} training built-in {dtype}: memory")
            self._builtin_memories[dtype] = self._memory(dtype, None)
        return self._builtin_memories[dtype]

    @cached_property
    def _builtin_memories(self) -> dict[str, dict[str, Any]]:
        return {}

    @cached_property
    def _optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.ours)

    @cached_property
    def _builtin_optimizer(self) -> torch.optim.Optimizer:
        return make_optimizer(self.theirs)

    def _run(self, row: Row) -> Callable[[], Any]:
        model = self._model(row)
        return partial(train_step, model, self._optimizer, self._inputs(torch.float32), self.device, row["dtype"])

    def _builtin_runs(self, dtype: str) -> list[Callable[[], Any]]:
        inputs = cast(training_inputs(self.workload, self.inputs, ours=False), self.device, torch.float32)
        return [partial(train_step, self.theirs, self._builtin_optimizer, inputs, self.device, dtype)]

    def _builtin_answers(self) -> list[Any]:
        error = self._builtin_memory("float32").get("error")
        if error is not None:
            self.theirs, self.builtin_error = None, f"the built-in: {error}"
            return []
        inputs = cast(training_inputs(self.workload, self.inputs, ours=False), self.device, torch.float32)
        return [*loss_and_gradient(self.theirs, inputs, self.device, "float32")]

    def _builtin_dtype(self, dtype: str) -> str:
        return "float32" if "error" in self._builtin_memory(dtype) else dtype

    def _count_direct(self) -> int:
        model = self._prepare(on_meta(self.workload.ours))
        choose(model, "eager", "never")
        inputs = cast(self._inputs(torch.float32), "meta", torch.float32)
        return count_flops(partial(backward, model, inputs, "cpu", "float32"))[0]

    def _answer(self, row: Row) -> tuple[float, float]:
        return loss_and_gradient(self._model(row), self._inputs(torch.float32), self.device, row["dtype"])

    def _errors(self, got: Any) -> list[float]:
        return [abs(g - w) / abs(w) for g, w in zip(got, self.wanted, strict=True)]
