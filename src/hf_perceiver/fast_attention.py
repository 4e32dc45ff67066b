"""Exact cheaper forms of the two large cross-attentions, for inference: reading the input array, and writing the output.

An element of an array is [features ; one Fourier code per axis of its grid ; constant]. A LayerNorm followed by a linear
map of it is a sum of one term per piece, so scores need neither the dense array nor its keys and values: a few channels
of features, and for each axis a table of (latents, points on that axis). LayerNorm's mean disappears when the other side
of the product is centred over the channels; what is left of it is one number per element. Equal to the direct form up to
rounding; docs/performance.md has the algebra.

A fast form is taken where its conditions hold and it costs less by count. Training, attention maps, watched or changed
layers (hooks, adapters, quantised weights) take the direct form.

This file has the conditions and what both share, an array by its pieces; `fast_reading.py` reads, `fast_writing.py` writes.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .arrays import ArrayPart
from .attention import MLP, Attention, CrossAttentionLayer
from .position_encoding import AxisCode, unravel
from .products import is_watched

# Rows of the grid in a tile at most: each is a column of the matrix products.
GRID_ROWS = 16
# The passes over a score (adding, exponential, sums) cost as much as so many channels of a matrix product: 0.6 ns and
# 0.02 ns, measured on one core.
PASSES = 32


def can_replace(layer: CrossAttentionLayer, **kwargs: Any) -> bool:
    """Whether a fast form may stand in for this layer: inference, plain weights, nothing that watches or changes it.

    kwargs: those of the model's call.
    """
    config = layer.cross_attn.config
    if config.fast_attention == "never" or kwargs.get("output_attentions", config.output_attentions):
        return False
    if layer.training or torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    device = layer.query_norm.weight.device.type
    if device == "meta" or torch.is_autocast_enabled(device):
        return False
    if type(layer) is not CrossAttentionLayer or type(layer.cross_attn) is not Attention or type(layer.mlp) is not MLP:
        return False
    for module in layer.modules():
        if is_watched(module):
            return False
        weight = getattr(module, "weight", None)
        plain = type(module) in (nn.Linear, nn.LayerNorm) and type(weight) is nn.Parameter
        if weight is not None and not (plain and weight.is_floating_point()):
            return False
    return True


def pays(layer: CrossAttentionLayer, fast: int, direct: int) -> bool:
    """Whether so many multiplications are few enough; on accelerators it is not known."""
    if layer.cross_attn.config.fast_attention == "always":
        return True
    return fast < direct and layer.query_norm.weight.device.type == "cpu"


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums and exponentials are computed in: float32, or float64 for float64."""
    return torch.float32 if dtype.itemsize < 4 else dtype


@dataclass
class Axis:
    """One axis' share of an array: `channels` (k,) it fills, `table` (n, k), and which entry each row has, (rows,).

    `index` is None for the last axis of a grid, whose entries are the places within a row.
    """

    channels: Tensor
    table: Tensor
    index: Tensor | None


def is_replaced(part: ArrayPart) -> bool:
    """Whether a token stands in for some element."""
    return part.replaced is not None and part.token is not None and bool(part.replaced.any())


@dataclass
class Pieces:
    """A part of an array by its pieces, on a grid of rows x width.

    features (1 or B, rows * width, F) or None; constant: (channels it fills, values) or None; mask (B, rows * width) or
    None.
    """

    width: int
    rows: int
    features: Tensor | None
    axes: list[Axis]
    constant: tuple[Tensor, Tensor] | None
    mask: Tensor | None

    @classmethod
    def of(cls, part: ArrayPart) -> "Pieces | None":
        """None for a part that is not made of such pieces."""
        code = part.position
        if not isinstance(code, AxisCode) or code.batch_size != 1 or part.combine != "concat" or is_replaced(part):
            return None
        start = 0 if part.features is None else part.features.shape[-1]
        channels: dict[int, list[Tensor]] = {}
        tables: dict[int, list[Tensor]] = {}
        for axis, table in code.blocks:
            stop = start + table.shape[1]
            channels.setdefault(axis, []).append(torch.arange(start, stop, device=table.device))
            tables.setdefault(axis, []).append(table)
            start = stop
        device = code.blocks[0][1].device
        # Of a single axis, and of chosen points, every element is a row.
        lead, width = (code.grid[:-1], code.grid[-1]) if len(code.grid) > 1 else (code.grid, 1)
        points = torch.arange(math.prod(lead), device=device)
        if code.points is not None:
            lead, width, points = code.grid, 1, code.points.flatten().to(device)
        rows = len(points)
        indices = unravel(points, lead)
        axes = [
            Axis(torch.cat(channels[a]), torch.cat(tables[a], dim=1), indices[a] if a < len(lead) else None)
            for a in sorted(channels)
        ]
        constant = None
        if part.constant is not None and part.constant.numel():
            constant = (torch.arange(start, start + len(part.constant), device=part.constant.device), part.constant)
        return cls(width, rows, part.features, axes, constant, part.mask)

    @property
    def feature_channels(self) -> int:
        return 0 if self.features is None else self.features.shape[-1]

    @property
    def device(self) -> torch.device:
        return self.axes[0].table.device if self.constant is None else self.constant[1].device

    def example(self, b: int) -> Tensor | None:
        """Features of one example, (rows * width, F)."""
        return None if self.features is None else self.features[min(b, len(self.features) - 1)]

    def on_grid(
        self, tables: list[Tensor], of_constant: Tensor, start: int = 0, stop: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """For each axis something (n, ...), (...) of the constant -> sums over rows (rows, ...) and places (width, ...)

        start, stop: which rows.
        """
        stop = self.rows if stop is None else stop
        by_row = of_constant.expand(stop - start, *of_constant.shape)
        by_place = torch.zeros_like(of_constant).expand(self.width, *of_constant.shape)
        for axis, table in zip(self.axes, tables, strict=True):
            if axis.index is None:
                by_place = table
            else:
                by_row = by_row + table[axis.index[start:stop]]
        return by_row, by_place

    def inverse_deviations(
        self, channels: int, eps: float, wide: torch.dtype
    ) -> Callable[[slice, Tensor | None], Tensor]:
        """LayerNorm's 1 / sqrt(variance + eps) as a function: rows, their features (r * width, F) or None -> (r, width)"""
        constant = (
            torch.zeros(0, dtype=wide, device=self.device) if self.constant is None else self.constant[1].to(wide)
        )
        tables = [axis.table.to(wide) for axis in self.axes]
        sums_of, squares_of = [table.sum(1) for table in tables], [table.square().sum(1) for table in tables]
        others = channels - self.feature_channels

        def inverse(rows: slice, features: Tensor | None) -> Tensor:
            by_row, by_place = self.on_grid(sums_of, constant.sum(), rows.start, rows.stop)
            sums = by_row[:, None] + by_place  # (r, width), without the features
            by_row, by_place = self.on_grid(squares_of, constant.square().sum(), rows.start, rows.stop)
            squares = by_row[:, None] + by_place
            if features is None:
                squares = squares - sums.square() / channels
            else:
                grid = features.to(wide).unflatten(0, sums.shape)
                mean = (sums + grid.sum(-1)) / channels
                # Codes and constants are of the order of one; features may lie far from zero, so they are centred first.
                squares = squares - 2 * mean * sums + others * mean.square() + (grid - mean[..., None]).square().sum(-1)
            return torch.rsqrt(squares.clamp(min=0) / channels + eps)

        return inverse


@dataclass
class Tile:
    """Some elements of a part, ready for the two matrix products of a read.

    lines (r + 1 + F, m), in the wide dtype: for each of r rows of the grid 1 / deviation of its elements and zero for
    others; ones; features / deviation, which in half precision are `half` (m, F) instead. inverse: 1 / deviation
    (r, width) on a grid, else None. mask (m,) or None.
    """

    lines: Tensor
    half: Tensor | None
    rows: slice
    inverse: Tensor | None
    mask: Tensor | None

    @classmethod
    def of(
        cls,
        features: Tensor | None,
        mask: Tensor | None,
        wide: torch.dtype,
        rows: slice = slice(0, 0),
        inverse: Tensor | None = None,
    ) -> "Tile":
        """features (m, F), on a grid without its rows' `inverse`."""
        lines = []
        if inverse is not None:
            by_row = torch.eye(len(inverse), dtype=wide, device=inverse.device)[..., None] * inverse
            lines = [by_row.flatten(1), torch.ones_like(inverse).view(1, -1)]
            features = None if features is None else (features * inverse.view(-1, 1)).to(features.dtype)
        elif features is not None:
            lines = [features.new_ones(1, len(features), dtype=wide)]
        half = features if features is not None and features.dtype != wide else None
        if features is not None and half is None:
            lines.append(features.T)
        return cls(torch.cat(lines), half, rows, inverse, mask)
