"""Exact cheaper forms of the two large cross-attentions, for inference: reading the input array, and writing the output.

An element of an array is [features ; one Fourier code per axis of its grid ; constant]. A LayerNorm followed by a linear
map of it is a sum of one term per piece, so scores need neither the dense array nor its keys and values: a few channels
of features, and for each axis a table of (latents, points on that axis). LayerNorm's mean disappears when the other side
of the product is centred over the channels; what is left of it is one number per element. Equal to the direct form up to
rounding; docs/performance.md has the algebra.

A fast form is taken where its conditions hold and it costs less by count. Training, attention maps, watched or changed
layers (hooks, adapters, quantised weights) take the direct form.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrays import ArrayPart, InputArray
from .attention import MLP, Attention, CrossAttentionLayer
from .position_encoding import AxisCode, unravel
from .products import apply, is_watched, product

Linear = tuple[Tensor, Tensor]  # weight (K, E), bias (K,)

# Tiles that stay in the caches: scores of so many rows (heads x latents) for so many elements, in so many rows of the
# grid at most, each of which is a column of the matrix products.
READ_ROWS, READ_ELEMENTS = 512, 1024
GRID_ROWS = 16
# Queries written at a time: so many scores.
WRITE_SCORES = 1 << 19
# Numbers that the activation function makes at a time, few enough for memory that the process already has.
ACTIVATED = 1 << 15
# Weights are sums of powers of two over the first tile's maximum; beyond this they are scaled anew.
LARGEST_WEIGHT = 2.0**60
# torch's exp2 takes a third of the time of its exp, so the reader's scores are logarithms to base 2.
LOG2_E = 1 / math.log(2)
# The passes over a score (adding, exponential, sums) cost as much as so many channels of a matrix product. Measured on
# two cores.
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


@dataclass
class GridReading:
    """A part read by its pieces."""

    pieces: Pieces

    @property
    def elements(self) -> int:
        return self.pieces.rows * self.pieces.width

    @property
    def tile(self) -> int:
        """Elements at a time, whole rows of the grid."""
        rows = min(max(READ_ELEMENTS // self.pieces.width, 1), GRID_ROWS, self.pieces.rows)
        return rows * self.pieces.width

    @property
    def channels(self) -> int:
        """Of the matrix products."""
        return self.pieces.feature_channels

    def mask(self, b: int) -> Tensor | None:
        mask = self.pieces.mask
        return None if mask is None else mask[min(b, len(mask) - 1)]

    def tiles(self, b: int, norm: nn.LayerNorm, dtype: torch.dtype, wide: torch.dtype) -> Iterator[Tile]:
        pieces, mask = self.pieces, self.mask(b)
        features = pieces.example(b)
        inverse_of = pieces.inverse_deviations(norm.normalized_shape[0], norm.eps, wide)
        step = self.tile // pieces.width
        for start in range(0, pieces.rows, step):
            rows = slice(start, min(start + step, pieces.rows))
            tile = slice(start * pieces.width, rows.stop * pieces.width)
            of_tile = None if features is None else features[tile].to(dtype)
            yield Tile.of(of_tile, None if mask is None else mask[tile], wide, rows, inverse_of(rows, of_tile))


@dataclass
class DenseReading:
    """A part read element by element, without its keys and values; elements that are all alike count `copies` times."""

    part: ArrayPart
    channels: int
    copies: int = 1

    @classmethod
    def of(cls, part: ArrayPart, channels: int) -> "DenseReading | None":
        """None where positions differ by example."""
        if part.mask is None and part.token is not None and part.replaced is not None and bool(part.replaced.all()):
            return cls(ArrayPart(features=part.token[None, None]), channels, copies=part.length)
        return None if part.position is not None and part.position.batch_size != 1 else cls(part, channels)

    @property
    def elements(self) -> int:
        return self.part.length

    @property
    def tile(self) -> int:
        """Elements at a time."""
        return min(READ_ELEMENTS, self.elements)

    def mask(self, b: int) -> Tensor | None:
        return _example(self.part.mask, b, 0)

    def tiles(self, b: int, norm: nn.LayerNorm, dtype: torch.dtype, wide: torch.dtype) -> Iterator[Tile]:
        part, mask = self.part, self.mask(b)
        one = replace(part, features=_example(part.features, b), replaced=_example(part.replaced, b), mask=None)
        for start in range(0, self.elements, self.tile):
            tile = slice(start, start + self.tile)
            x = one.dense(start, min(tile.stop, self.elements))[0].to(dtype)
            normed = F.layer_norm(x, norm.normalized_shape, eps=norm.eps)
            yield Tile.of(normed, None if mask is None else mask[tile], wide)


def _example(tensor: Tensor | None, b: int, keep: int = 1) -> Tensor | None:
    """One example of (1 or B, ...), as a batch of one or (keep=0) without its batch axis."""
    if tensor is None:
        return None
    b = min(b, len(tensor) - 1)
    return tensor[b : b + 1] if keep else tensor[b]


def read(layer: CrossAttentionLayer, latents: Tensor, input_array: InputArray, **kwargs: Any) -> Tensor | None:
    """What `layer` gives for latents (1 or B, N, D) and the input array, (B, N, D); None where the direct form is due."""
    if not can_replace(layer, **kwargs):
        return None
    attention = layer.cross_attn
    heads, num_latents = attention.q_proj.out_features // attention.qk_head_dim, latents.shape[1]
    channels = attention.k_proj.in_features
    parts: list[GridReading | DenseReading] = []
    for _, part in input_array:
        pieces = Pieces.of(part)
        # Of a single axis, a table of scores by axis would be all scores.
        reading = DenseReading.of(part, channels) if pieces is None or pieces.width == 1 else GridReading(pieces)
        if reading is None:
            return None
        parts.append(reading)
    width = attention.k_proj.out_features + attention.v_proj.out_features
    direct = input_array.length * width * (channels + num_latents)
    fast = sum(heads * num_latents * part.elements * (2 * part.channels + PASSES) for part in parts)
    if not pays(layer, fast, direct):
        return None
    batch = max(len(latents), input_array.batch_size)
    # (1 or B, heads * N, C), centred over the channels
    latents = latents.to(layer.query_norm.weight.dtype)
    wanted = _asked_channels(layer, latents)
    read_by_example = [_read_example(layer, wanted[min(b, len(wanted) - 1)], parts, b) for b in range(batch)]
    if any(values is None for values in read_by_example):
        return None
    values = torch.stack(read_by_example)  # type: ignore[arg-type] # (B, heads * N, V / heads)
    values = values.unflatten(1, (heads, num_latents)).transpose(1, 2).flatten(2)  # (B, N, V)
    attended = apply(attention.o_proj, values.to(latents.dtype))
    x = latents + attended if layer.use_query_residual else attended
    return x + layer.mlp(layer.mlp_norm(x))


def _asked_channels(layer: CrossAttentionLayer, latents: Tensor) -> Tensor:
    """What each head of each latent looks for in the input's channels: (1 or B, heads * N, C), in the wide dtype.

    Keys' bias and LayerNorm's bias add the same to every score of a latent, which a softmax does not see.
    """
    attention, norm = layer.cross_attn, layer.context_norm
    wide = wide_dtype(latents.dtype)
    queries = attention.q_proj(layer.query_norm(latents)).to(wide) * attention.scaling  # (B, N, H * E)
    head_dim = attention.qk_head_dim
    queries = queries.unflatten(-1, (-1, head_dim)).transpose(1, 2)  # (B, H, N, E)
    weight = attention.k_proj.weight.to(wide).unflatten(0, (-1, head_dim))  # (H, E, C)
    asked = (queries @ weight).flatten(1, 2) * norm.weight.to(wide)
    return asked - asked.mean(-1, keepdim=True)


def _read_example(
    layer: CrossAttentionLayer, asked: Tensor, parts: list[GridReading | DenseReading], b: int
) -> Tensor | None:
    """(heads * N, C) and the input -> values (heads * N, V / heads) before the output projection; None for no input."""
    attention, norm = layer.cross_attn, layer.context_norm
    wide = asked.dtype
    # float16 has no room for weights that are not yet divided by their sum.
    dtype = wide if norm.weight.dtype == torch.float16 else norm.weight.dtype
    channels = norm.weight.shape[0]
    if all((mask := part.mask(b)) is not None and not bool(mask.any()) for part in parts):
        if not attention.config.zero_masked_rows:
            return None
        return asked.new_zeros(len(asked), attention.v_head_dim)
    # Used again and again: fresh memory costs as much as what is written to it.
    memory = asked.new_empty(min(len(asked), READ_ROWS) * max(part.tile for part in parts))
    half_memory = torch.empty_like(memory, dtype=dtype) if dtype != wide else memory
    readers = [Reader(rows * LOG2_E, memory, half_memory) for rows in asked.split(READ_ROWS)]
    for part in parts:
        for reader in readers:
            reader.open(part)
        for tile in part.tiles(b, norm, dtype, wide):
            if tile.mask is None or bool(tile.mask.any()):
                for reader in readers:
                    reader.add(tile)
        for reader in readers:
            reader.close(part)
    sums = torch.cat([reader.total / reader.weights for reader in readers])
    # The mean over channels that LayerNorm takes from every element is taken once, from their sum.
    sums = (sums - sums.mean(-1, keepdim=True)) * norm.weight.to(wide)
    weight = attention.v_proj.weight.to(wide)
    heads = len(weight) // attention.v_head_dim
    values = sums.view(heads, -1, channels) @ weight.view(heads, -1, channels).transpose(1, 2)  # (H, N, V / H)
    offset = F.linear(norm.bias.to(wide), weight, attention.v_proj.bias.to(wide))
    return (values + offset.view(heads, 1, -1)).flatten(0, 1)


class Reader:
    """Rows (n, C) of what latents look for, and their softmax over tile after tile.

    total / weights is the attention-weighted mean of the elements over their deviations, (n, C), LayerNorm's mean over
    the channels still in it. Between `open` and `close` of a part its sums stand apart: of features, and on a grid for
    each row and each place within a row.
    """

    def __init__(self, asked: Tensor, memory: Tensor, half_memory: Tensor):
        """memory, half_memory: room for the scores of a tile, in the wide dtype and in that of the products."""
        self.asked, self.memory, self.half_memory = asked, memory, half_memory
        self.shift: Tensor | None = None  # (n, 1), what weights are powers of two above
        self.weights = asked.new_zeros(len(asked), 1)
        self.total = torch.zeros_like(asked)

    def open(self, part: GridReading | DenseReading) -> None:
        asked, count = self.asked, len(self.asked)
        self.looked_for = asked[:, : part.channels]
        self.looked_for_in_half = self.looked_for.to(self.half_memory.dtype)
        self.feature_sums = asked.new_zeros(count, part.channels)
        self.boost = 0.0
        self.row_sums = self.place_sums = asked.new_zeros(count, 0)
        self.of_rows = self.of_places = asked.new_zeros(count, 0)
        if isinstance(part, DenseReading):
            self.boost = math.log2(part.copies)
            return
        pieces = part.pieces
        constant = asked.new_zeros(count)
        if pieces.constant is not None:
            constant = asked[:, pieces.constant[0]] @ pieces.constant[1].to(asked)
        tables = [axis.table.to(asked) @ asked[:, axis.channels].T for axis in pieces.axes]
        of_rows, of_places = pieces.on_grid(tables, constant)
        self.of_rows, self.of_places = of_rows.T.contiguous(), of_places.T.contiguous()  # (n, rows), (n, width)
        self.row_sums, self.place_sums = torch.zeros_like(self.of_rows), torch.zeros_like(self.of_places)

    def add(self, tile: Tile) -> None:
        on_grid = tile.rows.stop - tile.rows.start
        sums = None
        if self.shift is not None:
            scores = self._scores(tile, self.shift).exp2_()
            sums = tile.lines @ scores.T  # (r + 1 + F, n); the other way round takes up to five times as long
            if not bool(sums[on_grid].max() <= LARGEST_WEIGHT):
                sums = None
        if sums is None:
            scores = self._scores(tile, None)
            shift = self._raise_shift(scores.amax(dim=1, keepdim=True))
            sums = tile.lines @ scores.sub_(shift).exp2_().T
        self.weights += sums[on_grid, :, None]
        if tile.half is None:
            self.feature_sums += sums[on_grid + 1 :].T
        else:
            self.feature_sums += self.half_memory[: scores.numel()].view(scores.shape).copy_(scores) @ tile.half
        if tile.inverse is not None:
            self.row_sums[:, tile.rows] = sums[:on_grid].T
            for row, inverse in zip(scores.view(len(scores), *tile.inverse.shape).unbind(1), tile.inverse, strict=True):
                self.place_sums.addcmul_(row, inverse)

    def _scores(self, tile: Tile, shift: Tensor | None) -> Tensor:
        """(n, m), less the shift"""
        less = self.weights.new_full(self.weights.shape, self.boost) if shift is None else self.boost - shift
        rows = [self.of_rows[:, tile.rows], less]
        if tile.half is None:
            rows.append(self.looked_for)
        left = torch.cat(rows, dim=1)
        count, elements = len(left), tile.lines.shape[1]
        scores = self.memory[: count * elements].view(count, elements)
        places = None if tile.inverse is None else scores.view(count, *tile.inverse.shape)
        if tile.half is not None:
            in_half = self.half_memory[: scores.numel()].view(scores.shape)
            scores.copy_(torch.mm(self.looked_for_in_half, tile.half.T, out=in_half))
            if places is not None:
                places.addcmul_(self.of_places[:, None], tile.inverse)  # type: ignore[arg-type]
            scores.addmm_(left, tile.lines)
        elif places is not None:
            torch.mul(self.of_places[:, None], tile.inverse, out=places)  # type: ignore[arg-type]
            scores.addmm_(left, tile.lines)
        else:
            torch.mm(left, tile.lines, out=scores)
        if tile.mask is not None:
            scores.masked_fill_(~tile.mask, -torch.inf)
        return scores

    def _raise_shift(self, highest: Tensor) -> Tensor:
        if self.shift is not None:
            highest = torch.maximum(highest, self.shift)
            factor = torch.exp2(self.shift - highest)
            for sums in (self.weights, self.total, self.feature_sums, self.row_sums, self.place_sums):
                sums *= factor
        self.shift = highest
        return highest

    def close(self, part: GridReading | DenseReading) -> None:
        total = self.total
        total[:, : part.channels] += self.feature_sums
        if isinstance(part, DenseReading):
            return
        for axis in part.pieces.axes:
            if axis.index is None:
                of_axis = self.place_sums
            else:
                of_axis = total.new_zeros(len(total), len(axis.table)).index_add_(1, axis.index, self.row_sums)
            total[:, axis.channels] += of_axis @ axis.table.to(total)
        if part.pieces.constant is not None:
            channels, values = part.pieces.constant
            total[:, channels] += self.row_sums.sum(1, keepdim=True) * values.to(total)


class FastWriter:
    """A decoder's cross-attention for queries made of pieces, with the read-out that follows folded into it.

    keys and values (B, H, N, .) are the latents', projected. Use `make`, then `write` for each modality.
    """

    def __init__(self, layer: CrossAttentionLayer, keys: Tensor, values: Tensor):
        self.layer, self.dtype = layer, layer.query_norm.weight.dtype
        self.wide = wide_dtype(self.dtype)
        self.batch, self.heads, self.num_latents, self.head_dim = keys.shape
        self.keys, self.values = keys, values.to(self.dtype)

    @cached_property
    def asked(self) -> tuple[Tensor, Tensor]:
        """What each latent answers to in the queries' channels, centred (B, H * N, C), and what it adds (B, H * N)"""
        attention, norm = self.layer.cross_attn, self.layer.query_norm
        weight = attention.q_proj.weight.to(self.wide).unflatten(0, (self.heads, self.head_dim))  # (H, E, C)
        bias = attention.q_proj.bias.to(self.wide).view(self.heads, 1, self.head_dim)
        keys = self.keys.to(self.wide) * attention.scaling
        asked = keys @ weight  # (B, H, N, C)
        offset = asked @ norm.bias.to(self.wide) + (bias * keys).sum(-1)
        asked = asked * norm.weight.to(self.wide)
        return (asked - asked.mean(-1, keepdim=True)).flatten(1, 2), offset.flatten(1)

    @classmethod
    def make(cls, layer: CrossAttentionLayer, keys: Tensor, values: Tensor, **kwargs: Any) -> "FastWriter | None":
        """None where the direct form is due; kwargs: those of the model's call."""
        return cls(layer, keys, values) if can_replace(layer, **kwargs) else None

    def write(
        self,
        part: ArrayPart,
        linear: Linear | None,
        then: Callable[[Tensor], Tensor] | None = None,
        limit: int | None = None,
    ) -> Tensor | None:
        """Queries of a part -> what they decode to, (B, O, K); None where the direct form is due.

        linear: the read-out, where it is one linear map; `then`: any other, (1, o, E) -> (1, o, K). limit: queries at a
        time, but at least one row of their grid.
        """
        pieces = Pieces.of(part)
        if pieces is None or not self._pays(pieces, linear):
            return None
        read_out = ReadOut(self.layer, self.heads, linear)
        values = self.values if read_out.fold is None else F.linear(self.values, read_out.fold)
        values = values.transpose(2, 3).contiguous()
        asked, offset = self.asked
        tile = WRITE_SCORES // (self.heads * self.num_latents)
        step = max(min(tile, limit or tile) // pieces.width, 1)
        if pieces.width > 1:
            step = min(step, GRID_ROWS)
        out = None
        for b in range(max(self.batch, part.batch_size)):
            i = min(b, self.batch - 1)
            for rows, answers in self._answers(pieces, part, b, asked[i], offset[i], values[i], read_out, step):
                answers = answers if then is None else then(answers[None])[0]
                if out is None:
                    out = answers.new_empty(max(self.batch, part.batch_size), part.length, answers.shape[-1])
                out[b, rows] = answers
        return out

    def _pays(self, pieces: Pieces, linear: Linear | None) -> bool:
        attention, mlp = self.layer.cross_attn, self.layer.mlp
        qk, channels = attention.q_proj.out_features, attention.q_proj.in_features
        v, hidden = attention.v_proj.out_features, mlp.up_proj.out_features
        direct = channels * qk + self.num_latents * (qk + v) + v * channels + 2 * channels * hidden
        fast = self.heads * self.num_latents * (pieces.feature_channels + PASSES) + self.num_latents * v
        fast += v * channels + channels * hidden * (2 if linear is None else 1)
        before = self.num_latents * qk * channels + (0 if linear is None else v * channels * hidden)
        elements = pieces.rows * pieces.width
        return pays(self.layer, fast * elements + before, direct * elements)

    def _answers(
        self,
        pieces: Pieces,
        part: ArrayPart,
        b: int,
        asked: Tensor,
        offset: Tensor,
        values: Tensor,
        read_out: "ReadOut",
        step: int,
    ) -> Iterator[tuple[slice, Tensor]]:
        """asked (H * N, C), offset (H * N,), values (H, V, N) of one example -> its answers (o, K), tile by tile"""
        features = pieces.example(b)
        inverse_of = pieces.inverse_deviations(asked.shape[1], self.layer.query_norm.eps, self.wide)
        constant = asked.new_zeros(len(asked))
        if pieces.constant is not None:
            constant = asked[:, pieces.constant[0]] @ pieces.constant[1].to(asked)
        tables = [axis.table.to(asked) @ asked[:, axis.channels].T for axis in pieces.axes]
        looked_for = asked[:, : pieces.feature_channels].T
        looked_for_in_half = looked_for.to(self.dtype)
        one_product = features is not None and self.dtype == self.wide and pieces.width > 1
        # Memory that is used again and again: fresh memory costs as much as what is written to it.
        scores_of_tile, weights_of_tile = asked.new_empty(2, min(step, pieces.rows) * pieces.width, len(asked))
        half_of_tile = torch.empty_like(scores_of_tile, dtype=self.dtype) if self.dtype != self.wide else None
        for start in range(0, pieces.rows, step):
            rows = slice(start, min(start + step, pieces.rows))
            tile = slice(start * pieces.width, rows.stop * pieces.width)
            of_rows, of_places = pieces.on_grid(tables, constant, rows.start, rows.stop)
            of_tile = None if features is None else features[tile].to(self.dtype)
            inverse = inverse_of(rows, of_tile)
            scores, weights = scores_of_tile[: inverse.numel()], weights_of_tile[: inverse.numel()]
            on_grid = scores.unflatten(0, inverse.shape)
            if one_product:
                right = torch.cat([of_rows, offset[None], looked_for])
                torch.mul(of_places, inverse[..., None], out=on_grid)
                scores.addmm_(Tile.of(of_tile, None, self.wide, rows, inverse).lines.T, right)
            else:
                # A product of so few channels would take longer than these passes.
                torch.add(of_rows[:, None], of_places, out=on_grid)
                if of_tile is not None and half_of_tile is not None:
                    scores += weights.copy_(torch.mm(of_tile, looked_for_in_half, out=half_of_tile[: len(scores)]))
                elif of_tile is not None:
                    scores.addmm_(of_tile, looked_for)
                scores, weights = torch.addcmul(offset, scores, inverse.view(-1, 1), out=weights), scores
            by_head = (self.heads, self.num_latents)
            weights = torch.softmax(scores.unflatten(1, by_head), dim=-1, out=weights.unflatten(1, by_head))
            if half_of_tile is not None:
                weights = half_of_tile[: len(weights)].view(weights.shape).copy_(weights)
            attended = torch.cat([product(w, v) for w, v in zip(weights.unbind(1), values, strict=True)], dim=1)
            if pieces.mask is not None:
                attended = attended.masked_fill(~pieces.mask[min(b, len(pieces.mask) - 1), tile, None], 0.0)
            query = None
            if self.layer.use_query_residual:
                query = part.dense(tile.start, tile.stop)
                query = query[min(b, len(query) - 1)].to(self.dtype)
            yield tile, read_out(attended, query)


class ReadOut:
    """What follows the decoder's attention: (m, V) attended values, (m, E) query -> (m, K)

    No nonlinearity follows the MLP's second linear, so it and the read-out's linear are one matrix. Without a query
    residual the attention's output is linear in the values, which are narrower where this pays: then it is never made,
    and the deviation that the MLP's LayerNorm needs is the length of a product with a triangular matrix.
    """

    def __init__(self, layer: CrossAttentionLayer, heads: int, linear: Linear | None):
        attention, norm, mlp = layer.cross_attn, layer.mlp_norm, layer.mlp
        self.act = mlp.act
        self.eps = norm.eps
        channels, v_channels = attention.o_proj.out_features, attention.o_proj.in_features
        dtype = norm.weight.dtype
        wide = wide_dtype(dtype)

        def w(tensor: Tensor) -> Tensor:
            return tensor.to(wide)

        identity = linear is None
        last = torch.eye(channels, dtype=wide, device=norm.weight.device) if linear is None else w(linear[0])
        self.channels = len(last)
        up, output = w(mlp.up_proj.weight) * w(norm.weight), w(attention.o_proj.weight)
        up_bias = w(mlp.up_proj.weight) @ w(norm.bias) + w(mlp.up_proj.bias)
        down = w(mlp.down_proj.weight) if identity else last @ w(mlp.down_proj.weight)
        bias = last @ w(mlp.down_proj.bias)
        if linear is not None:
            bias = bias + w(linear[1])
        self.triangle = self.fold = None
        if not layer.use_query_residual and v_channels < channels and not identity:
            centred = torch.cat([output, w(attention.o_proj.bias)[:, None]], dim=1)
            centred = centred - centred.mean(0)  # (E, V + 1)
            triangle = torch.linalg.qr(centred, mode="r").R / math.sqrt(channels)
            self.triangle = (triangle[:, :-1].to(dtype).contiguous(), triangle[:, -1].to(dtype))
            self.hidden = (up @ centred).to(dtype)
            bias = bias + last @ w(attention.o_proj.bias)
            last = last @ output
        elif heads == 1 and channels <= v_channels:
            # A softmax sums to one, so the output projection may come before it.
            self.fold = attention.o_proj.weight
        self.output = (None if self.fold is not None else attention.o_proj.weight, attention.o_proj.bias)
        self.residual = None if identity else last.to(dtype)
        self.up, self.up_bias = up.to(dtype), up_bias.to(dtype)
        self.down, self.bias = down.to(dtype), bias.to(dtype)

    def __call__(self, attended: Tensor, query: Tensor | None) -> Tensor:
        if self.triangle is not None:
            squares = product(attended, *self.triangle).square_()
            variance = squares.sum(-1, keepdim=True, dtype=wide_dtype(attended.dtype))
            inverse = torch.rsqrt(variance + self.eps).to(attended.dtype)
            into_hidden = torch.cat([attended * inverse, inverse], dim=-1)
            up = self.hidden
            x = attended
        else:
            weight, bias = self.output
            x = attended + bias if weight is None else product(attended, weight, bias)
            if query is not None:
                x = x + query
            into_hidden = F.layer_norm(x, x.shape[-1:], eps=self.eps)
            up = self.up
        hidden = product(into_hidden, up, self.up_bias)
        for some in hidden.split(max(ACTIVATED // hidden.shape[1], 1)):
            some.copy_(self.act(some))
        out = product(hidden, self.down, self.bias)
        return out + (x if self.residual is None else product(x, self.residual))
