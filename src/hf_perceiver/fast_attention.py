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
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .arrays import ArrayPart, InputArray
from .attention import MLP, Attention, CrossAttentionLayer
from .position_encoding import AxisCode, unravel

Linear = tuple[Tensor, Tensor]  # weight (K, E), bias (K,)

# Tiles that stay in a core's cache: scores of so many rows (heads x latents) for so many elements.
READ_ROWS, READ_ELEMENTS = 512, 1024
# Queries written at a time: so many scores.
WRITE_SCORES = 1 << 20
# The maximum a softmax is shifted by may be this much too small, so that accumulators are seldom rescaled.
SLACK = 8.0
# The passes over a score (adding, exponential, sums) cost as much as so many channels of a matrix product. Measured on
# two cores: half the time of a read with 64 channels of features.
PASSES = 64


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


def is_watched(module: nn.Module) -> bool:
    """Whether something hangs on the calls of a module."""
    # transformers leaves its recorders in place; they see nothing unless attention maps are asked for.
    hooks = [h for h in module._forward_hooks.values() if getattr(h, "__name__", "") != "output_capturing_hook"]
    return bool(hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


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


@dataclass
class Pieces:
    """A part of an array by its pieces, on a grid of rows x width; elements that are all alike count `copies` times.

    features (1 or B, rows * width, F) or None; constant: (channels it fills, values) or None; mask (B, rows * width) or
    None.
    """

    width: int
    rows: int
    features: Tensor | None
    axes: list[Axis]
    constant: tuple[Tensor, Tensor] | None
    mask: Tensor | None
    copies: int = 1

    @classmethod
    def of(cls, part: ArrayPart) -> "Pieces | None":
        """None for a part that is not made of such pieces."""
        if part.replaced is not None and part.token is not None and bool(part.replaced.any()):
            if not bool(part.replaced.all()) or part.mask is not None:
                return None
            everywhere = torch.arange(len(part.token), device=part.token.device)
            return cls(1, 1, None, [], (everywhere, part.token), None, copies=part.length)
        code = part.position
        if not isinstance(code, AxisCode) or code.batch_size != 1 or part.combine != "concat":
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

    def inverse_deviation(self, features: Tensor | None, channels: int, eps: float, wide: torch.dtype) -> Tensor:
        """LayerNorm's 1 / sqrt(variance + eps) of every element, (rows, width)"""
        device = self.device
        constant = torch.zeros(0, dtype=wide, device=device) if self.constant is None else self.constant[1].to(wide)
        tables = [axis.table.to(wide) for axis in self.axes]
        by_row, by_place = self.on_grid([table.sum(1) for table in tables], constant.sum())
        sums = by_row[:, None] + by_place  # (rows, width), without the features
        by_row, by_place = self.on_grid([table.square().sum(1) for table in tables], constant.square().sum())
        squares = by_row[:, None] + by_place
        others = channels - self.feature_channels
        if features is None:
            mean = sums / channels
            squares = squares - channels * mean.square()
        else:
            grid = features.to(wide).unflatten(0, (self.rows, self.width))
            mean = (sums + grid.sum(-1)) / channels
            # Codes and constants are of the order of one; features may lie far from zero, so they are centred first.
            squares = squares - 2 * mean * sums + others * mean.square() + (grid - mean[..., None]).square().sum(-1)
        return torch.rsqrt(squares.clamp(min=0) / channels + eps)


def read(layer: CrossAttentionLayer, latents: Tensor, input_array: InputArray, **kwargs: Any) -> Tensor | None:
    """What `layer` gives for latents (1 or B, N, D) and the input array, (B, N, D); None where the direct form is due."""
    if not can_replace(layer, **kwargs):
        return None
    attention = layer.cross_attn
    heads, num_latents = attention.q_proj.out_features // attention.qk_head_dim, latents.shape[1]
    parts = [Pieces.of(part) for _, part in input_array]
    if any(pieces is None for pieces in parts):
        return None
    elements = input_array.length
    width = attention.k_proj.out_features + attention.v_proj.out_features
    direct = elements * width * (attention.k_proj.in_features + num_latents)
    fast = sum(
        heads * num_latents * pieces.rows * pieces.width * (2 * pieces.feature_channels + PASSES)
        for pieces in parts
        if pieces is not None
    )
    if not pays(layer, fast, direct):
        return None
    batch = max(len(latents), input_array.batch_size)
    # (1 or B, heads * N, C), centred over the channels
    latents = latents.to(layer.query_norm.weight.dtype)
    wanted = _asked_channels(layer, latents)
    read_by_example = [
        _read_example(layer, wanted[min(b, len(wanted) - 1)], parts, b)  # type: ignore[arg-type]
        for b in range(batch)
    ]
    if any(values is None for values in read_by_example):
        return None
    values = torch.stack(read_by_example)  # type: ignore[arg-type] # (B, heads * N, V / heads)
    values = values.unflatten(1, (heads, num_latents)).transpose(1, 2).flatten(2)  # (B, N, V)
    attended = attention.o_proj(values.to(latents.dtype))
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


def _read_example(layer: CrossAttentionLayer, asked: Tensor, parts: list[Pieces], b: int) -> Tensor | None:
    """(heads * N, C) and the input -> values (heads * N, V / heads) before the output projection; None for no input."""
    attention, norm = layer.cross_attn, layer.context_norm
    wide, dtype = asked.dtype, norm.weight.dtype
    channels = norm.weight.shape[0]
    prepared = []
    for pieces in parts:
        features = pieces.example(b)
        features = None if features is None else features.to(dtype)
        inverse = pieces.inverse_deviation(features, channels, norm.eps, wide)
        mask = None if pieces.mask is None else pieces.mask[min(b, len(pieces.mask) - 1)]
        if mask is not None:
            mask = mask.view(pieces.rows, pieces.width)
        prepared.append((pieces, features, inverse, mask))
    if all(mask is not None and not bool(mask.any()) for *_, mask in prepared):
        if not attention.config.zero_masked_rows:
            return None
        return asked.new_zeros(len(asked), attention.v_head_dim)
    sums = torch.cat(
        [_read_rows(asked[rows : rows + READ_ROWS], prepared, dtype) for rows in range(0, len(asked), READ_ROWS)]
    )
    # The mean over channels that LayerNorm takes from every element is taken once, from their sum.
    sums = (sums - sums.mean(-1, keepdim=True)) * norm.weight.to(wide)
    weight = attention.v_proj.weight.to(wide)
    heads = len(weight) // attention.v_head_dim
    values = sums.view(heads, -1, channels) @ weight.view(heads, -1, channels).transpose(1, 2)  # (H, N, V / H)
    offset = F.linear(norm.bias.to(wide), weight, attention.v_proj.bias.to(wide))
    return (values + offset.view(heads, 1, -1)).flatten(0, 1)


def _read_rows(asked: Tensor, prepared: list[tuple[Pieces, Any, Tensor, Any]], dtype: torch.dtype) -> Tensor:
    """(n, C) -> the attention-weighted mean of the inputs over their deviations, (n, C); mean of channels still in it."""
    count, channels = asked.shape
    shift = asked.new_full((count, 1), -torch.inf)
    weights = asked.new_zeros(count, 1)
    accumulated = []
    for pieces, features, inverse, mask in prepared:
        # Sums of weight / deviation: times features, and for each row and each place of the grid.
        feature_sums = asked.new_zeros(count, pieces.feature_channels)
        row_sums, place_sums = asked.new_zeros(count, pieces.rows), asked.new_zeros(count, pieces.width)
        accumulated.append((feature_sums, row_sums, place_sums))
        looked_for = asked[:, : pieces.feature_channels].to(dtype)
        constant = asked.new_zeros(count)
        if pieces.constant is not None:
            constant = asked[:, pieces.constant[0]] @ pieces.constant[1].to(asked)
        tables = [axis.table.to(asked) @ asked[:, axis.channels].T for axis in pieces.axes]
        of_rows, of_places = pieces.on_grid(tables, constant)
        of_rows, of_places = of_rows.T, of_places.T  # (n, rows), (n, width)
        step = max(READ_ELEMENTS // pieces.width, 1)
        for start in range(0, pieces.rows, step):
            stop = min(start + step, pieces.rows)
            tile = slice(start * pieces.width, stop * pieces.width)
            scores = of_rows[:, start:stop, None] + of_places[:, None]  # (n, rows, width)
            if features is not None:
                scores += (looked_for @ features[tile].T).view(scores.shape)
            scores *= inverse[start:stop]
            if pieces.copies > 1:
                scores += math.log(pieces.copies)
            if mask is not None:
                if not bool(mask[start:stop].any()):
                    continue
                scores.masked_fill_(~mask[start:stop], -torch.inf)
            highest = scores.amax(dim=(1, 2))[:, None]
            if bool((highest > shift + SLACK).any()):
                higher = torch.maximum(highest, shift)
                factor = torch.exp(shift - higher)
                weights *= factor
                for sums in accumulated:
                    for array in sums:
                        array *= factor
                shift = higher
            scores = scores.sub_(shift[..., None]).exp_()
            weights += scores.sum(dim=(1, 2))[:, None]
            scores *= inverse[start:stop]
            if features is not None:
                feature_sums += scores.view(count, -1).to(dtype) @ features[tile]
            row_sums[:, start:stop] = scores.sum(2)
            for row in scores.unbind(1):  # a third of what a strided sum takes
                place_sums += row
    total = asked.new_zeros(count, channels)
    for (pieces, *_), (feature_sums, row_sums, place_sums) in zip(prepared, accumulated, strict=True):
        total[:, : pieces.feature_channels] += feature_sums
        for axis in pieces.axes:
            if axis.index is None:
                of_axis = place_sums
            else:
                of_axis = row_sums.new_zeros(count, len(axis.table)).index_add_(1, axis.index, row_sums)
            total[:, axis.channels] += of_axis @ axis.table.to(total)
        if pieces.constant is not None:
            total[:, pieces.constant[0]] += row_sums.sum(1, keepdim=True) * pieces.constant[1].to(total)
    return total / weights


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
        asked, offset = self.asked
        tile = WRITE_SCORES // (self.heads * self.num_latents)
        step = max(min(tile, limit or tile) // pieces.width, 1)
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
        """asked (H * N, C), offset (H * N,), values (H, N, V) of one example -> its answers (o, K), tile by tile"""
        features = pieces.example(b)
        features = None if features is None else features.to(self.dtype)
        inverse = pieces.inverse_deviation(features, asked.shape[1], self.layer.query_norm.eps, self.wide)
        constant = asked.new_zeros(len(asked))
        if pieces.constant is not None:
            constant = asked[:, pieces.constant[0]] @ pieces.constant[1].to(asked)
        tables = [axis.table.to(asked) @ asked[:, axis.channels].T for axis in pieces.axes]
        looked_for = asked[:, : pieces.feature_channels].to(self.dtype).T
        for start in range(0, pieces.rows, step):
            stop = min(start + step, pieces.rows)
            tile = slice(start * pieces.width, stop * pieces.width)
            of_rows, of_places = pieces.on_grid(tables, constant, start, stop)
            scores = of_rows[:, None] + of_places  # (rows, width, H * N)
            if features is not None:
                scores += (features[tile] @ looked_for).view(scores.shape)
            scores = torch.addcmul(offset, scores, inverse[start:stop, :, None])
            weights = scores.view(-1, self.heads, self.num_latents).softmax(-1).to(values.dtype)
            attended = (weights.transpose(0, 1) @ values).transpose(0, 1).flatten(1)  # (m, H * V)
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
            self.triangle = (triangle[:, :-1].to(dtype), triangle[:, -1].to(dtype))
            hidden = up @ centred
            self.hidden = (hidden[:, :-1].to(dtype), hidden[:, -1].to(dtype))
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
            deviation = F.linear(attended, *self.triangle)
            inverse = torch.rsqrt(deviation.square().sum(-1, keepdim=True, dtype=wide_dtype(attended.dtype)) + self.eps)
            hidden = F.linear(attended, *self.hidden) * inverse.to(attended.dtype) + self.up_bias
            x = attended
        else:
            weight, bias = self.output
            x = attended + bias if weight is None else F.linear(attended, weight, bias)
            if query is not None:
                x = x + query
            hidden = F.linear(F.layer_norm(x, x.shape[-1:], eps=self.eps), self.up, self.up_bias)
        out = F.linear(self.act(hidden), self.down, self.bias)
        return out + (x if self.residual is None else F.linear(x, self.residual))
