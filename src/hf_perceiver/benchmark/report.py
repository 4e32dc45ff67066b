"""Rows of the benchmark: empty, on disk, as a table, as a picture."""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# What was run, and how.
WHAT = ("work", "model", "dtype", "backend", "fast_attention", "compiled", "tf32")
COUNTED = (
    *("direct_flops", "executed_flops", "direct_gflops_per_second", "executed_gflops_per_second"),
    *("peak_gflops_per_second", "peak_fraction"),
)
MEASURED = (
    *("seconds", "median_seconds", "builtin_seconds", "builtin_median_seconds", "builtin_dtype", "ratio"),
    *("max_error", "error_bound", "memory", "builtin_memory", "memory_ratio", *COUNTED, "error"),
)


def empty_row(*what: Any) -> Row:
    """A row of what `WHAT` lists, with nothing measured yet."""
    return dict(zip(WHAT, what, strict=True)) | dict.fromkeys(MEASURED)


def title(row: Row) -> str:
    """Which row it is, in a few words."""
    words = [row[field] for field in ("model", "dtype", "backend", "fast_attention")]
    words += [switch for switch in ("compiled", "tf32") if row[switch]]
    return " ".join([*words, *(["training"] if row["work"] == "training" else [])])


def first_line(error: Exception) -> str:
    """What went wrong, for a row."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def write_json(rows: list[Row], path: Path) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(rows, indent=1) + "\n")
    os.replace(temporary, path)


def read_json(paths: Iterable[Path]) -> list[Row]:
    """The rows of several files, in their order; ValueError for a file that the benchmark did not write."""
    rows: list[Row] = []
    for path in paths:
        try:
            found = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} cannot be read as rows of this benchmark: {first_line(error)}") from error
        if not isinstance(found, list) or not all(isinstance(row, dict) and {*WHAT} <= {*row} for row in found):
            raise ValueError(f"{path} holds no rows of this benchmark; name files that its --json wrote")
        rows += found
    return rows


def slope(xs: Sequence[float], ys: Sequence[float | None]) -> float | None:
    """The exponent p of y ~ x^p over the upper half of the range of x, on a log scale; None for fewer than two points.

    Over the lower half, what costs the same at every size still weighs. None and what is not positive is left out.
    """
    middle = math.sqrt(min(xs) * max(xs)) if xs else 0.0
    logs = [(math.log(x), math.log(y)) for x, y in zip(xs, ys, strict=True) if x >= middle and y is not None and y > 0]
    if len({x for x, _ in logs}) < 2:
        return None
    return statistics.linear_regression(*zip(*logs, strict=True)).slope


def curves(rows: list[Row]) -> dict[tuple[str, str], list[Row]]:
    """Scaling rows by (axis, how they ran), in order of size."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((row["axis"], title(row).removeprefix(f"{row['model']} ")), []).append(row)
    return {key: sorted(curve, key=lambda row: row[row["axis"]]) for key, curve in found.items()}


def curve_slopes(axis: str, curve: list[Row]) -> tuple[float | None, float | None]:
    """Slopes of seconds and of memory beyond the output."""
    xs = [row[axis] for row in curve]
    return slope(xs, [row["seconds"] for row in curve]), slope(xs, [row["memory_beyond_output"] for row in curve])


# --- tables

# Heading, field, format and unit of a table's columns; texts have no format.
Column = tuple[str, str, str, float]
WHO: list[Column] = [(field, field, "", 1) for field in ("model", "dtype", "backend", "fast_attention")]
COMPARED: list[Column] = [
    ("seconds", "seconds", ".3f", 1),
    ("median", "median_seconds", ".3f", 1),
    ("built-in", "builtin_seconds", ".3f", 1),
    ("ratio", "ratio", ".2f", 1),
    ("max error", "max_error", ".0e", 1),
    ("MiB", "memory", ".0f", 2**20),
    ("built-in MiB", "builtin_memory", ".0f", 2**20),
    ("memory ratio", "memory_ratio", ".2f", 1),
    ("direct GFLOP", "direct_flops", ".1f", 1e9),
    ("GFLOP", "executed_flops", ".1f", 1e9),
    ("GFLOP/s", "executed_gflops_per_second", ".0f", 1),
    ("peak GFLOP/s", "peak_gflops_per_second", ".0f", 1),
    ("of peak", "peak_fraction", ".0%", 1),
]
SCALED: list[Column] = [
    ("inputs", "inputs", ",", 1),
    ("outputs", "outputs", ",", 1),
    ("latents", "latents", ",", 1),
    ("seconds", "seconds", ".3f", 1),
    ("median", "median_seconds", ".3f", 1),
    ("MiB beyond output", "memory_beyond_output", ".1f", 2**20),
    ("output MiB", "output_bytes", ".1f", 2**20),
    ("direct GFLOP", "direct_flops", ".1f", 1e9),
    ("GFLOP", "executed_flops", ".1f", 1e9),
    ("GFLOP/s", "executed_gflops_per_second", ".0f", 1),
    ("peak GFLOP/s", "peak_gflops_per_second", ".0f", 1),
    ("of peak", "peak_fraction", ".0%", 1),
]


def cell(row: Row, column: Column) -> str:
    _, field, form, unit = column
    value = row[field]
    if value is None:
        return "-"
    return format(value if unit == 1 else value / unit, form) if form else str(value)


def aligned(rows: list[Row], columns: list[Column]) -> str:
    """Texts to the left, numbers to the right, a dash where nothing was measured."""
    lines = [[heading for heading, *_ in columns], *([cell(row, column) for column in columns] for row in rows)]
    widths = [max(map(len, texts)) for texts in zip(*lines, strict=True)]
    sides = [">" if form else "<" for _, _, form, _ in columns]
    return "\n".join(
        "  ".join(f"{text:{side}{width}}" for text, side, width in zip(line, sides, widths, strict=True))
        for line in lines
    )


def table(rows: list[Row]) -> str:
    """A table for each kind of work; then why, where something went wrong, and the slopes of what was scaled."""
    parts = []
    for work in dict.fromkeys(row["work"] for row in rows):
        chosen = [row for row in rows if row["work"] == work]
        switches = [switch for switch in ("compiled", "tf32") if any(row[switch] for row in chosen)]
        shown = [row | {switch: "yes" if row[switch] else "no" for switch in switches} for row in chosen]
        columns = [
            *WHO,
            *((switch, switch, "", 1) for switch in switches),
            *(SCALED if work == "scaling" else COMPARED),
        ]
        heading = [] if work == "inference" else [f"{work}:"]
        errors = [f"{title(row)}: {row['error']}" for row in chosen if row["error"]]
        parts += [*heading, aligned(shown, columns), *errors]
        if work == "scaling":
            parts += slope_lines(chosen)
    return "\n".join(parts)


def slope_lines(rows: list[Row]) -> list[str]:
    """How cost grows along each curve, in words."""
    lines = []
    for (axis, how), curve in curves(rows).items():
        seconds, memory = ("-" if s is None else f"{axis}^{s:.2f}" for s in curve_slopes(axis, curve))
        largest = max(row[axis] for row in curve)
        lines.append(f"{axis} up to {largest:,}, {how}: seconds ~ {seconds}, memory beyond the output ~ {memory}")
    return lines


# --- pictures

OURS, BUILTIN = "tab:blue", "0.7"


def check_plot(path: Path, rows: list[Row]) -> None:
    """ValueError where no picture of these rows can be drawn there."""
    works = sorted({row["work"] for row in rows})
    if len(works) > 1:
        raise ValueError(f"a plot shows one kind of work, not {' and '.join(works)}; draw each by itself")
    if path.suffix not in (".png", ".svg"):
        raise ValueError(f"{path}: a plot ends in .png or .svg")
    if find_spec("matplotlib") is None:
        raise ValueError("a plot needs matplotlib: pip install hf-perceiver[train]")


def plot(rows: list[Row], path: Path) -> None:
    """Write a picture of rows, all of one kind of work: bars beside the built-in's, or curves of cost against size."""
    check_plot(path, rows)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(layout="constrained")
    FigureCanvasAgg(figure)
    draw: Callable[[Any, list[Row]], None] = draw_scaling if rows[0]["work"] == "scaling" else draw_bars
    draw(figure, rows)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    try:
        figure.savefig(partial, dpi=100)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def draw_bars(figure: Any, rows: list[Row]) -> None:
    """Seconds of each row, and of the built-in below, which bears how many times ours that is."""
    rows = [row for row in rows if row["seconds"] is not None]
    words = [title(row).split() for row in rows]
    # What all rows share says nothing beside each of them.
    common = set.intersection(*map(set, words)) if len(words) > 1 else set()
    names = [" ".join(word for word in row if word not in common) for row in words]
    figure.set_size_inches(8, 1.2 + 0.55 * len(rows))
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh([p - 0.2 for p in places], [row["seconds"] for row in rows], 0.38, color=OURS, label="hf-perceiver")
    for place, row in zip(places, rows, strict=True):
        _note(axes, place - 0.2, row["seconds"], f" {row['seconds']:.3g} s")
    compared = [(place, row) for place, row in zip(places, rows, strict=True) if row["builtin_seconds"] is not None]
    if compared:
        seconds = [row["builtin_seconds"] for _, row in compared]
        axes.barh([p + 0.2 for p, _ in compared], seconds, 0.38, color=BUILTIN, label="transformers' built-in")
    for place, row in compared:
        stand_in = "" if row["builtin_dtype"] == row["dtype"] else f" ({row['builtin_dtype']})"
        _note(
            axes, place + 0.2, row["builtin_seconds"], f" {row['builtin_seconds']:.3g} s: {row['ratio']:.2f}x{stand_in}"
        )
    axes.set_yticks(list(places), names)
    axes.invert_yaxis()
    shared = ", ".join(word for word in words[0] if word in common)
    axes.set(xscale="log", xlabel=f"seconds ({shared})" if shared else "seconds")
    every = [row[field] for row in rows for field in ("seconds", "builtin_seconds") if row[field] is not None]
    axes.set_xlim(10 ** math.floor(math.log10(min(every)) - 0.3), 9 * max(every))
    figure.legend(loc="outside upper right", ncols=2, fontsize=8)


def _note(axes: Any, place: float, end: float, text: str) -> None:
    axes.annotate(text, (end, place), va="center", fontsize=8)


def draw_scaling(figure: Any, rows: list[Row]) -> None:
    """Seconds and memory against each axis, log-log, slopes in the legends."""
    found = curves(rows)
    names = list(dict.fromkeys(axis for axis, _ in found))
    figure.set_size_inches(4.2 * len(names), 6.4)
    grid = figure.subplots(2, len(names), squeeze=False)
    for column, axis in enumerate(names):
        for (of_axis, how), curve in found.items():
            if of_axis != axis:
                continue
            xs = [row[axis] for row in curve]
            for axes, field, unit, exponent in zip(
                grid[:, column], ("seconds", "memory_beyond_output"), (1, 2**20), curve_slopes(axis, curve), strict=True
            ):
                ys = [math.nan if not row[field] or row[field] < 0 else row[field] / unit for row in curve]
                label = how if exponent is None else f"{how}: slope {exponent:.2f}"
                axes.plot(xs, ys, "o-", markersize=3, label=label)
        sizes = {row[axis]: row["output_bytes"] / 2**20 for row in rows if row["axis"] == axis and row["output_bytes"]}
        grid[1, column].plot(list(sizes), list(sizes.values()), "--", color="0.5", label="the output itself")
        for axes, what in zip(grid[:, column], ("seconds", "MiB beyond weights, inputs and output"), strict=True):
            axes.set(xscale="log", yscale="log", xlabel=axis, ylabel=what)
            axes.grid(alpha=0.3)
            axes.legend(fontsize=7)
