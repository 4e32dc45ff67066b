"""Where an element is: coordinates, Fourier and trainable position encodings, per axis where they separate.

An encoding module gives a *code*: an object with `length`, `channels` and `dense(start, stop)` -> (1 or B, n, channels).
Codes stay small until they are made dense: a Fourier code of a grid is one short table per axis.
Source: deepmind-research perceiver/position_encoding.py; parity of float32 positions is bounded, not bitwise (a
rounding of 1e-7 in a coordinate is amplified by pi * max_resolution / 2).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import initialization as init

from .registry import POSITION_ENCODINGS, register_position_encoding

Grid = tuple[int, ...]
RULES = ("dense", "sampled", "index")


class Code(Protocol):
    """Positions of one array, dense on demand; `batch_size` is 1 where they are the same for every example."""

    @property
    def batch_size(self) -> int: ...

    @property
    def length(self) -> int: ...

    @property
    def channels(self) -> int: ...

    def dense(self, start: int, stop: int) -> Tensor: ...

    def select(self, points: Tensor) -> "Code": ...


@dataclass
class TableCode:
    """Any table of positions (1 or B, M, C)."""

    table: Tensor

    @property
    def batch_size(self) -> int:
        return self.table.shape[0]

    @property
    def length(self) -> int:
        return self.table.shape[1]

    @property
    def channels(self) -> int:
        return self.table.shape[2]

    def dense(self, start: int, stop: int) -> Tensor:
        return self.table[:, start:stop]

    def select(self, points: Tensor) -> "TableCode":
        return TableCode(take_rows(self.table, points))


@dataclass
class AxisCode:
    """Codes of a grid, one block of channels after the other; each block depends on one axis.

    `blocks` holds (axis, (n_axis, k)) in the order of the dense channels; `points` (n,) or (B, n) are flat indices into
    the grid, None for all of it.
    """

    blocks: tuple[tuple[int, Tensor], ...]
    grid: Grid
    points: Tensor | None = None

    @property
    def batch_size(self) -> int:
        return 1 if self.points is None or self.points.ndim == 1 else self.points.shape[0]

    @property
    def length(self) -> int:
        return math.prod(self.grid) if self.points is None else self.points.shape[-1]

    @property
    def channels(self) -> int:
        return sum(values.shape[1] for _, values in self.blocks)

    def dense(self, start: int, stop: int) -> Tensor:
        if self.points is None and (start, stop) == (0, self.length):
            return self._whole()
        if self.points is None and start == 0 and stop == 1:
            # The first point needs no division by sizes, which may be traced.
            return torch.cat([values[:1] for _, values in self.blocks], dim=-1)[None]
        device = self.blocks[0][1].device
        points = torch.arange(start, stop, device=device) if self.points is None else self.points[..., start:stop]
        indices = unravel(points.to(device), self.grid)
        dense = torch.cat([values[indices[axis]] for axis, values in self.blocks], dim=-1)
        return dense if dense.ndim == 3 else dense[None]

    def _whole(self) -> Tensor:
        columns = []
        for axis, values in self.blocks:
            shape = [1] * len(self.grid) + [values.shape[1]]
            shape[axis] = values.shape[0]
            columns.append(values.reshape(shape).expand(*self.grid, values.shape[1]))
        return torch.cat(columns, dim=-1).reshape(1, self.length, self.channels)

    def select(self, points: Tensor) -> "AxisCode":
        if self.points is not None:
            of_batch = points.ndim == 2
            points = self.points.expand(len(points), -1).gather(1, points) if of_batch else self.points[..., points]
        return AxisCode(self.blocks, self.grid, points)


@dataclass
class CoordinateCode:
    """Fourier code of any coordinates (1 or B, n, d), made when asked for."""

    coordinates: Tensor
    encoding: "FourierPositionEncoding"
    dtype: torch.dtype

    @property
    def batch_size(self) -> int:
        return self.coordinates.shape[0]

    @property
    def length(self) -> int:
        return self.coordinates.shape[1]

    @property
    def channels(self) -> int:
        return self.encoding.channels

    def dense(self, start: int, stop: int) -> Tensor:
        coordinates = self.coordinates[:, start:stop].to(torch.float32)
        columns = self.encoding.blocks(lambda axis: coordinates[..., axis], coordinates.device)
        return torch.cat([values for _, values in columns], dim=-1).to(self.dtype)

    def select(self, points: Tensor) -> "CoordinateCode":
        return CoordinateCode(take_rows(self.coordinates, points), self.encoding, self.dtype)


@dataclass
class ProjectedCode:
    """Another code, through a module that works on each position by itself."""

    base: Code
    module: "ProjectedPositionEncoding"

    @property
    def batch_size(self) -> int:
        return self.base.batch_size

    @property
    def length(self) -> int:
        return self.base.length

    @property
    def channels(self) -> int:
        return self.module.channels

    def dense(self, start: int, stop: int) -> Tensor:
        return self.module.project_rows(self.base.dense(start, stop))

    def select(self, points: Tensor) -> "ProjectedCode":
        return ProjectedCode(self.base.select(points), self.module)


class PositionEncoding(nn.Module):
    """Base of position encodings; a subclass sets `channels` and gives codes.

    `encode(grid, ...)` codes a whole grid, `encode_at(coordinates, ...)` any coordinates in [-1, 1].
    `num_axes` is how many axes it can code, None for any.
    """

    channels: int
    num_axes: int | None = None

    def encode(self, grid: Grid, *, device: torch.device, dtype: torch.dtype, interpolate: bool = False) -> Code:
        """(n_1, ..., n_d) -> code of n_1 * ... * n_d positions, the last axis fastest."""
        raise NotImplementedError

    def encode_at(self, coordinates: Tensor, *, dtype: torch.dtype) -> Code:
        """(n, d) or (B, n, d), each in [-1, 1] -> code of n positions."""
        raise ValueError(
            f"{type(self).__name__} knows a fixed set of positions and cannot be asked at coordinates; a position of "
            "kind 'fourier' can"
        )


@register_position_encoding("fourier")
class FourierPositionEncoding(PositionEncoding):
    """[x, sin(pi f x), cos(pi f x)] with K bands f from 1 to max_resolution / 2 per axis; d (2 K + 1) channels.

    max_resolution: points per axis at the highest band, one per axis; None takes the grid's size at run time.
    num_axes: needed only when max_resolution is None.
    rule: coordinates of index i on an axis of n points:
      "dense"    linspace(-1, 1, n), what DeepMind uses for whole grids;
      "sampled"  -1 + 2 i / n, what DeepMind uses for sub-sampled output points (never reaching +1);
      "index"    -1 + 2 i / max_resolution: the same code for point i whatever the length, for text.
    Codes are float32 whatever the model's dtype, then cast.
    Source: deepmind-research position_encoding.py, generate_fourier_features.
    """

    def __init__(
        self,
        *,
        num_bands: int,
        max_resolution: Sequence[int] | None = None,
        num_axes: int | None = None,
        sine_only: bool = False,
        concat_pos: bool = True,
        rule: str = "dense",
    ):
        super().__init__()
        if max_resolution is None and num_axes is None:
            raise ValueError("a fourier position needs max_resolution (one number per axis) or num_axes")
        if max_resolution is not None and num_axes not in (None, len(max_resolution)):
            raise ValueError(f"max_resolution={list(max_resolution)} has not num_axes={num_axes} entries")
        if num_bands < 1:
            raise ValueError(f"num_bands must be at least 1, not {num_bands}")
        if any(n < 1 for n in max_resolution or [num_axes or 0]):
            raise ValueError(
                f"max_resolution={max_resolution} and num_axes={num_axes}: there must be an axis, of 1 point or more"
            )
        if rule not in RULES:
            raise ValueError(f"rule={rule!r} must be one of {', '.join(RULES)}")
        if rule == "index" and max_resolution is None:
            raise ValueError("rule='index' counts in steps of max_resolution; give max_resolution")
        self.num_bands, self.sine_only, self.concat_pos, self.rule = num_bands, sine_only, concat_pos, rule
        self.max_resolution = None if max_resolution is None else tuple(max_resolution)
        self.num_axes: int = len(max_resolution) if max_resolution is not None else num_axes  # type: ignore[assignment]
        self.channels = self.num_axes * (num_bands * (1 if sine_only else 2) + (1 if concat_pos else 0))

    def encode(self, grid: Grid, *, device: torch.device, dtype: torch.dtype, interpolate: bool = False) -> AxisCode:
        if len(grid) != self.num_axes:  # a string of sizes that are being traced would fix them
            self._check_axes(len(grid), f"a grid of {'x'.join(map(str, grid))}")
        axes = [self._axis_coordinates(axis, n, device) for axis, n in enumerate(grid)]
        blocks = self.blocks(lambda axis: axes[axis], device, grid)
        return AxisCode(tuple((axis, values.to(dtype)) for axis, values in blocks), tuple(grid))

    def encode_at(self, coordinates: Tensor, *, dtype: torch.dtype) -> CoordinateCode:
        if coordinates.ndim not in (2, 3):
            raise ValueError(f"coordinates are (n, axes) or (batch, n, axes), not {tuple(coordinates.shape)}")
        coordinates = coordinates if coordinates.ndim == 3 else coordinates[None]
        self._check_axes(coordinates.shape[-1], f"coordinates of shape {tuple(coordinates.shape)}")
        if self.max_resolution is None:
            raise ValueError(
                "coordinates have no grid to take the bands from; give the fourier position max_resolution"
            )
        return CoordinateCode(coordinates, self, dtype)

    def blocks(self, coordinate: Any, device: torch.device, grid: Grid | None = None) -> list[tuple[int, Tensor]]:
        """Blocks of channels in DeepMind's order: every axis' coordinate, sines axis by axis, cosines axis by axis."""
        angles = []
        for axis in range(self.num_axes):
            resolution = self.max_resolution[axis] if self.max_resolution is not None else grid[axis]  # type: ignore[index]
            bands = linspace(1.0, resolution / 2, self.num_bands, device)
            angles.append(math.pi * (coordinate(axis)[..., None] * bands))
        blocks = [(axis, coordinate(axis)[..., None]) for axis in range(self.num_axes)] if self.concat_pos else []
        if exporting := torch.compiler.is_exporting():
            # Other runtimes are not exact in float32 for angles of hundreds, and some have no cosine in float64.
            angles = [angle.to(torch.float64) for angle in angles]
        sines, cosines = [torch.sin(angle) for angle in angles], []
        if not self.sine_only:
            cosines = [torch.sin(angle + math.pi / 2) if exporting else torch.cos(angle) for angle in angles]
        blocks += [(axis, wave.to(torch.float32)) for waves in (sines, cosines) for axis, wave in enumerate(waves)]
        return blocks

    def _axis_coordinates(self, axis: int, n: int, device: torch.device) -> Tensor:
        if self.rule == "dense":
            return linspace(-1.0, 1.0, n, device)
        # DeepMind divides by n, not n - 1: the last point never reaches +1, and the weights were trained so.
        steps = n if self.rule == "sampled" else self.max_resolution[axis]  # type: ignore[index]
        if n > steps:
            raise ValueError(f"{n} positions are more than the {steps} of max_resolution; shorten the input")
        return -1 + 2 * torch.arange(n, device=device, dtype=torch.float32) / steps

    def _check_axes(self, given: int, what: str) -> None:
        if given != self.num_axes:
            raise ValueError(
                f"{what} has {given} axes, the fourier position codes {self.num_axes} "
                f"(max_resolution={self.max_resolution})"
            )

    def code_channels(self) -> Tensor:
        """Band number of each channel, 0 for the coordinate itself; (channels,)."""
        bands = torch.arange(1, self.num_bands + 1).repeat(self.num_axes * (1 if self.sine_only else 2))
        raw = torch.zeros(self.num_axes if self.concat_pos else 0, dtype=bands.dtype)
        return torch.cat([raw, bands])


@register_position_encoding("trainable")
class TrainablePositionEncoding(PositionEncoding):
    """A trained row for each of `num_positions` positions.

    A one-axis input may be shorter: it uses the first rows. A grid must have exactly `num_positions` points, unless
    `grid` says how the table was laid out and `interpolate=True` resizes it (bicubic in two axes, linear in one, trilinear
    in three).
    Raises ValueError for a longer input or another grid. Source: deepmind-research, TrainablePositionEncoding.
    """

    def __init__(
        self, *, num_positions: int, channels: int, init_scale: float = 0.02, grid: Sequence[int] | None = None
    ):
        super().__init__()
        if grid is not None and math.prod(grid) != num_positions:
            raise ValueError(f"grid={list(grid)} has {math.prod(grid)} points, not num_positions={num_positions}")
        if num_positions < 1 or channels < 1:
            raise ValueError(f"num_positions={num_positions} and channels={channels} must be at least 1")
        if init_scale < 0:
            raise ValueError(f"init_scale is a standard deviation, 0 or more, not {init_scale}")
        self.num_positions, self.channels, self.init_scale = num_positions, channels, init_scale
        self.grid = None if grid is None else tuple(grid)
        self.embeddings = nn.Parameter(torch.empty(num_positions, channels))

    def reset_own_parameters(self) -> None:
        truncated_normal_(self.embeddings, self.init_scale)

    def forward(self) -> Tensor:
        """The table (num_positions, channels). Read through here: offloaded weights are fetched when a module is called."""
        return self.embeddings

    def encode(self, grid: Grid, *, device: torch.device, dtype: torch.dtype, interpolate: bool = False) -> TableCode:
        wanted = math.prod(grid)
        if len(grid) == 1 and wanted <= self.num_positions and not interpolate:
            return TableCode(self()[None, :wanted])
        if wanted == self.num_positions and self.grid in (None, tuple(grid)):
            return TableCode(self()[None])
        size = "x".join(map(str, grid))
        if interpolate:
            return TableCode(self._resize(tuple(grid)))
        if len(grid) == 1:
            raise ValueError(
                f"{wanted} elements are more than the {self.num_positions} trained positions; shorten the input"
            )
        layout = self.grid or self._guess(len(grid))
        if math.prod(layout) != self.num_positions:
            raise ValueError(
                f"{self.num_positions} trained positions cannot label a {size} grid; resize the input so that its grid "
                "has as many points"
            )
        raise ValueError(
            f"{self.num_positions} trained positions cannot label a {size} grid; resize the input so that its grid is "
            f"{'x'.join(map(str, layout))}, or pass interpolate_pos_encoding=True"
        )

    def _resize(self, grid: Grid) -> Tensor:
        layout = self.grid or self._guess(len(grid))
        if len(layout) != len(grid) or math.prod(layout) != self.num_positions:
            raise ValueError(
                f"cannot interpolate {self.num_positions} trained positions to {grid}: give the position encoding the "
                "option grid=[...], the layout it was trained on"
            )
        mode = {1: "linear", 2: "bicubic", 3: "trilinear"}.get(len(grid))
        if mode is None:
            raise ValueError(f"trained positions are interpolated over one to three axes, not {len(grid)}")
        exact = torch.promote_types(self.embeddings.dtype, torch.float32)
        table = self().to(exact).T.reshape(1, self.channels, *layout)
        table = F.interpolate(table, size=grid, mode=mode, align_corners=False)
        return table.reshape(1, self.channels, -1).transpose(1, 2).to(self.embeddings.dtype)

    def _guess(self, num_axes: int) -> Grid:
        side = round(self.num_positions ** (1 / num_axes))
        return (side,) * num_axes


@register_position_encoding("projected")
class ProjectedPositionEncoding(PositionEncoding):
    """Another position encoding, projected to `channels` and through `num_extra_mlps` residual linears.

    The projection's input is the position's own width. `channels=None` keeps it (then only the extra linears act).
    Source: deepmind-research, PositionEncodingProjector and n_extra_pos_mlp.
    """

    def __init__(self, *, position: dict, channels: int | None = None, num_extra_mlps: int = 0):
        super().__init__()
        self.position: PositionEncoding = build_position_encoding(position)  # type: ignore[assignment]
        if self.position is None:
            raise ValueError("kind 'projected' needs a position to project, not kind 'none'")
        self.num_axes = self.position.num_axes
        self.channels = channels or self.position.channels
        self.project = nn.Linear(self.position.channels, self.channels) if channels else None
        self.extra = nn.ModuleList(nn.Linear(self.channels, self.channels) for _ in range(num_extra_mlps))

    def project_rows(self, rows: Tensor) -> Tensor:
        """(..., width of the position) -> (..., channels)"""
        for linear in [m for m in (self.project, *self.extra) if m is not None][:1]:
            # A code has the input's dtype. The bias tells the weights' own, quantised or not.
            rows = rows.to(linear.bias.dtype)
        if self.project is not None:
            rows = self.project(rows)
        for i, linear in enumerate(self.extra):
            rows = rows + linear(rows)
            if i < len(self.extra) - 1:
                rows = F.relu(rows)
        return rows

    def encode(
        self, grid: Grid, *, device: torch.device, dtype: torch.dtype, interpolate: bool = False
    ) -> ProjectedCode:
        return ProjectedCode(self.position.encode(grid, device=device, dtype=dtype, interpolate=interpolate), self)

    def encode_at(self, coordinates: Tensor, *, dtype: torch.dtype) -> ProjectedCode:
        return ProjectedCode(self.position.encode_at(coordinates, dtype=dtype), self)


@register_position_encoding("none")
class NoPositionEncoding(PositionEncoding):
    """No positions: the input is a set."""

    channels = 0


def build_position_encoding(spec: dict | None) -> PositionEncoding | None:
    """The position encoding of a spec; None for None and for kind "none"."""
    if spec is None or spec.get("kind") == "none":
        return None
    module: PositionEncoding = POSITION_ENCODINGS.build(spec)  # type: ignore[assignment]
    return module


def truncated_normal_(tensor: Tensor, std: float) -> None:
    """Normal cut at two standard deviations, as Haiku's TruncatedNormal; leaves loaded tensors alone."""
    init.trunc_normal_(tensor, std=std, a=-2 * std, b=2 * std)


def linspace(start: float, stop: float, n: int, device: torch.device) -> Tensor:
    """torch.linspace in float32, also of numbers that are being traced, which torch's own would fix.

    Traced, it rounds as torch's does outside. Others do not: angles of the released audio bands, 48,000, would be off by
    0.004.
    """
    if not torch.compiler.is_compiling():
        return torch.linspace(start, stop, n, device=device, dtype=torch.float32)
    index = torch.arange(n, device=device, dtype=torch.float64)
    last = index[-1:].clamp(min=1)
    # As torch's own rounds: a step in float32, which is fused with what it is multiplied by, from both ends to the middle.
    step = ((stop - start) / last).to(torch.float32).to(torch.float64)
    return torch.where(2 * index + 1 <= last, start + step * index, stop - step * (last - index)).to(torch.float32)


def unravel(points: Tensor, grid: Grid) -> list[Tensor]:
    """Flat indices -> one index per axis, the last axis fastest."""
    indices = []
    for n in reversed(grid):
        indices.append(points % n)
        points = points // n
    return indices[::-1]


def take_rows(table: Tensor, points: Tensor) -> Tensor:
    """(1 or B, M, C) at (n,) or (B, n) -> (1 or B, n, C)"""
    points = points.to(table.device)
    if points.ndim == 1:
        return table[:, points]
    return table.expand(points.shape[0], -1, -1).gather(1, points[..., None].expand(-1, -1, table.shape[-1]))


POSITION_ENCODINGS.seal()
