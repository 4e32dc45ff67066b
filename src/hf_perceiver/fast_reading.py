"""Reading the input array by its exact cheaper form: an online softmax over tiles, without keys and values.

See fast_attention.py, and docs/performance.md for the algebra.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrays import ArrayPart, InputArray
from .attention import CrossAttentionLayer
from .fast_attention import GRID_ROWS, PASSES, Pieces, Tile, can_replace, pays, wide_dtype
from .products import apply

# Tiles that stay in the caches: scores of so many rows (heads x latents) for so many elements.
READ_ROWS, READ_ELEMENTS = 512, 1024
# Weights are powers of two over the first tile's maximum; where their sum is beyond this they are scaled anew.
LARGEST_WEIGHT = 2.0**60
# torch's exp2 takes a third of the time of its exp, so scores are logarithms to base 2.
LOG2_E = 1 / math.log(2)


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
