"""The exact cheaper forms of reading and writing (see fast_attention.py) as a program that can be exported.

What is different: no decision depends on values, and the loop over the rows of the grid is one operator, so the program
is short, holds one step's scores at a time, and may have any number of rows. Each step is a softmax of its own; what it
gives is weighed by its log-sum-exp.

`traced_forms` puts them in place of the layers that pay for them while a model is exported.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._higher_order_ops.scan import scan

from .arrays import ArrayPart, InputArray, QueryArray
from .attention import CrossAttentionLayer
from .fast_attention import can_replace
from .fast_writing import Linear, ReadOut
from .modeling_perceiver_io import linear_read_out
from .position_encoding import AxisCode
from .preprocessors import TextPreprocessor

# From so many scores (heads x latents x elements) on, which the direct form holds at once: 64 MiB of them.
FEWEST_SCORES = 1 << 24
# Scores of one step, for each example; what is done between two products stays in the cache.
STEP_SCORES = 1 << 20


def is_on_grid(part: ArrayPart) -> bool:
    """Whether a part is features and the code of a grid of two axes or more, the same for every example."""
    code = part.position
    return (
        isinstance(code, AxisCode)
        and code.points is None
        and len(code.grid) > 1
        and part.combine == "concat"
        and part.mask is None
        and part.replaced is None
    )


class GridPieces:
    """A part on a grid by its pieces, for arrays of `asked` (1 or B, n, C), centred over the channels.

    rows: points of all axes but the last; width: of the last.
    """

    def __init__(self, part: ArrayPart, eps: float, channels: int):
        code: Any = part.position
        self.grid, self.blocks = code.grid, code.blocks
        self.lead, self.width = code.grid[:-1], code.grid[-1]
        self.rows = math.prod(self.lead)
        self.constant = part.constant if part.constant is not None and part.constant.numel() else None
        self.features = None
        if part.features is not None:
            # (rows, 1 or B, width, F): what is gone through comes first.
            self.features = part.features.unflatten(1, (self.rows, self.width)).transpose(0, 1)
        self.num_features = 0 if part.features is None else part.features.shape[-1]
        self.inverse = self._inverse_deviation(eps, channels)  # (rows, 1 or B, width)

    def _sums(self, of: Callable[[Tensor], Tensor]) -> Tensor:
        """of: (n, k) -> (n,), of each axis' table -> their sum at every point, (rows, 1, width), without features"""
        total = torch.zeros((), dtype=self.blocks[0][1].dtype)
        if self.constant is not None:
            total = of(self.constant[None])[0]
        for axis, table in self.blocks:
            shape = [1] * len(self.grid)
            shape[axis] = -1
            total = total + of(table).view(shape)
        return total.expand(self.grid).reshape(self.rows, 1, self.width)

    def _inverse_deviation(self, eps: float, channels: int) -> Tensor:
        sums, squares = self._sums(lambda table: table.sum(1)), self._sums(lambda table: table.square().sum(1))
        if self.features is None:
            mean = sums / channels
            squares = squares - channels * mean.square()
        else:
            mean = (sums + self.features.sum(-1)) / channels
            others = channels - self.num_features
            squares = squares - 2 * mean * sums + others * mean.square()
            squares = squares + (self.features - mean[..., None]).square().sum(-1)
        return torch.rsqrt(squares.clamp(min=0) / channels + eps)

    def scores(self, asked: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """asked (b, n, C) -> its share of the features (b, n, F), of the rows (b, n, rows), of the places (b, n, width)"""
        start = self.num_features
        of_axis: dict[int, Tensor] = {}
        for axis, table in self.blocks:
            found = asked[..., start : start + table.shape[1]] @ table.T  # (b, n, points of the axis)
            of_axis[axis] = found if axis not in of_axis else of_axis[axis] + found
            start += table.shape[1]
        of_rows = asked.new_zeros(())
        if self.constant is not None:
            of_rows = (asked[..., start:] @ self.constant).view(*asked.shape[:2], *[1] * len(self.lead))
        for axis in range(len(self.lead)):
            if axis in of_axis:
                shape = [1] * len(self.lead)
                shape[axis] = -1
                of_rows = of_rows + of_axis[axis].view(*asked.shape[:2], *shape)
        of_rows = of_rows.expand(*asked.shape[:2], *self.lead).flatten(2)
        return asked[..., : self.num_features], of_rows, of_axis[len(self.lead)]

    def means(self, features: Tensor, rows: Tensor, places: Tensor) -> Tensor:
        """Sums of weight / deviation: times features (B, n, F), by row (B, n, rows), by place -> by channel (B, n, C)"""
        of_grid = rows.unflatten(2, self.lead)
        columns = [features] if self.num_features else []
        for axis, table in self.blocks:
            of_axis = places
            if axis < len(self.lead):
                others = [2 + other for other in range(len(self.lead)) if other != axis]
                of_axis = of_grid.sum(others) if others else of_grid
            columns.append(of_axis @ table)
        if self.constant is not None:
            columns.append(rows.sum(-1, keepdim=True) * self.constant)
        return torch.cat(columns, dim=-1)

    def rows_at_a_time(self, scores_of_element: int) -> int:
        """A divisor of the number of rows."""
        most = max(STEP_SCORES // (scores_of_element * self.width), 1)
        return max(n for n in range(1, min(most, self.rows) + 1) if self.rows % n == 0)


class TracedReader:
    """An encoder's cross-attention, (1 or B, N, D) and an array with a part on a grid -> (B, N, D)

    fixed_size: whether the grid is what it is when traced; then a step may take several rows of it.
    """

    def __init__(self, layer: CrossAttentionLayer, fixed_size: bool):
        self.layer, self.fixed_size = layer, fixed_size

    def __call__(self, latents: Tensor, input_array: InputArray) -> Tensor:
        layer, attention, norm = self.layer, self.layer.cross_attn, self.layer.context_norm
        heads, channels = heads_of(layer), norm.normalized_shape[0]
        queries = attention.q_proj(layer.query_norm(latents)) * attention.scaling
        queries = queries.unflatten(-1, (heads, -1)).transpose(1, 2)  # (b, H, N, E)
        weight = attention.k_proj.weight.unflatten(0, (heads, -1))  # (H, E, C)
        asked = (queries @ weight).flatten(1, 2) * norm.weight  # (b, H * N, C)
        asked = asked - asked.mean(-1, keepdim=True)
        found = [
            self._grid(asked, GridPieces(part, norm.eps, channels))
            if is_on_grid(part)
            else self._dense(asked, part.dense(), norm.eps)
            for _, part in input_array
        ]
        means, _ = found[0]
        if len(found) > 1:
            batch = max(len(mean) for mean, _ in found)
            shares = torch.cat([size.expand(batch, -1, -1) for _, size in found], dim=-1).softmax(-1)
            means = torch.stack([mean * shares[..., i : i + 1] for i, (mean, _) in enumerate(found)]).sum(0)
        means = (means - means.mean(-1, keepdim=True)) * norm.weight
        weight = attention.v_proj.weight.unflatten(0, (heads, -1))  # (H, V / H, C)
        values = means.unflatten(1, (heads, -1)) @ weight.transpose(1, 2)  # (B, H, N, V / H)
        values = values.transpose(1, 2).flatten(2)
        values = values + F.linear(norm.bias, attention.v_proj.weight, attention.v_proj.bias)
        attended = attention.o_proj(values)
        x = latents + attended if layer.use_query_residual else attended
        return x + layer.mlp(layer.mlp_norm(x))

    @staticmethod
    def _dense(asked: Tensor, rows: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """(b, n, C), (1 or B, M, C) -> the rows' mean, normalised (B, n, C), and their log-sum-exp (B, n, 1)"""
        rows = F.layer_norm(rows, rows.shape[-1:], eps=eps)
        scores = asked @ rows.transpose(1, 2)
        return scores.softmax(-1) @ rows, scores.logsumexp(-1, keepdim=True)

    def _grid(self, asked: Tensor, pieces: GridPieces) -> tuple[Tensor, Tensor]:
        """The same of a part on a grid."""
        of_features, of_rows, of_places = pieces.scores(asked)
        count, width = asked.shape[1], pieces.width
        step = pieces.rows_at_a_time(count) if self.fixed_size else 1
        inverse = pieces.inverse.unflatten(0, (-1, step)).transpose(1, 2)  # (steps, B, step, width)
        # A step's elements: features / deviation, and for each of its rows 1 / deviation.
        own = torch.eye(step, dtype=asked.dtype)[:, None].expand(-1, width, -1) * inverse[..., None]
        elements = own.flatten(2, 3)  # (steps, B, step * width, step)
        if pieces.features is not None:
            features = pieces.features.unflatten(0, (-1, step)).transpose(1, 2) * inverse[..., None]
            elements = torch.cat([features.flatten(2, 3), elements], dim=-1)
        of_rows = of_rows.unflatten(2, (-1, step)).permute(2, 0, 1, 3)  # (steps, b, n, step)
        batch = max(len(asked), elements.shape[1])

        def add(carry: tuple[Tensor, ...], row: tuple[Tensor, ...]) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
            size, features, places = carry
            elements, inverse, of_rows = row
            looked_for = torch.cat([of_features, of_rows], dim=-1)
            scores = looked_for @ elements.transpose(1, 2)  # (B, n, step * width)
            # Sizes that vary cannot be split in here, and need not be.
            if step == 1:
                scores = scores + of_places * inverse
            else:
                scores = scores + (of_places[:, :, None] * inverse[:, None]).flatten(2)
            weights = scores.softmax(-1)
            own_size = scores.amax(-1, keepdim=True) - weights.amax(-1, keepdim=True).log()
            new_size = torch.logaddexp(size, own_size)
            kept, share = (size - new_size).exp(), (own_size - new_size).exp()
            sums = weights @ elements  # (B, n, F + step)
            features = features * kept + sums[..., : pieces.num_features] * share
            if step == 1:
                of_step = weights * inverse
            else:
                of_step = (weights.unflatten(2, (step, -1)) * inverse[:, None]).sum(2)
            return (new_size, features, places * kept + of_step * share), (sums[..., pieces.num_features :], own_size)

        start = (
            asked.new_full((batch, count, 1), -1e30),
            asked.new_zeros(batch, count, pieces.num_features),
            asked.new_zeros(batch, count, width),
        )
        (size, features, places), (rows, sizes) = scan(add, start, (elements, inverse, of_rows))
        rows = (rows * (sizes - size).exp()).permute(1, 2, 0, 3).flatten(2)  # (B, n, rows)
        return pieces.means(features, rows, places), size


class TracedWriter:
    """A decoder's cross-attention for queries on a grid, with what follows folded: -> (B, O, K)

    linear: the read-out, where it is one linear map; `then`: any other. Without a query residual. fixed_size: as of a
    TracedReader.
    """

    def __init__(
        self,
        layer: CrossAttentionLayer,
        linear: Linear | None,
        then: Callable[[Tensor], Tensor] | None,
        fixed_size: bool,
    ):
        self.layer, self.then, self.fixed_size = layer, then, fixed_size
        self.heads = heads_of(layer)
        self.folded = ReadOut(layer, self.heads, linear)
        # Tensors that share memory cannot be read inside a traced loop.
        vars(self.folded).update({name: _copy(value) for name, value in vars(self.folded).items()})

    def __call__(self, part: ArrayPart, keys: Tensor, values: Tensor) -> Tensor:
        attention, norm = self.layer.cross_attn, self.layer.query_norm
        pieces = GridPieces(part, norm.eps, norm.normalized_shape[0])
        keys = keys * attention.scaling  # (B, H, N, E)
        asked = keys @ attention.q_proj.weight.unflatten(0, (self.heads, -1))  # (B, H, N, C)
        bias = attention.q_proj.bias.view(self.heads, 1, -1)
        offset = (asked @ norm.bias + (bias * keys).sum(-1)).flatten(1)[:, None]  # (B, 1, H * N)
        asked = (asked * norm.weight).flatten(1, 2)
        asked = asked - asked.mean(-1, keepdim=True)
        if self.folded.fold is not None:
            values = F.linear(values, self.folded.fold)
        of_features, of_rows, of_places = pieces.scores(asked)
        count, width, heads = asked.shape[1], pieces.width, self.heads
        step = pieces.rows_at_a_time(count) if self.fixed_size else 1
        inverse = pieces.inverse.unflatten(0, (-1, step)).transpose(1, 2)  # (steps, B, step, width)
        own = torch.eye(step, dtype=asked.dtype)[:, None].expand(-1, width, -1) * inverse[..., None]
        elements = own.flatten(2, 3)  # (steps, B, step * width, step)
        if pieces.features is not None:
            features = pieces.features.unflatten(0, (-1, step)).transpose(1, 2) * inverse[..., None]
            elements = torch.cat([features.flatten(2, 3), elements], dim=-1)
        elements = F.pad(elements, (0, 1), value=1.0)
        of_rows = of_rows.unflatten(2, (-1, step)).permute(2, 0, 3, 1)  # (steps, B, step, H * N)
        of_features, of_places = of_features.transpose(1, 2), of_places.transpose(1, 2)

        def write(carry: Tensor, row: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
            elements, inverse, of_rows = row
            looked_for = torch.cat([of_features, of_rows, offset], dim=1)  # (B, F + step + 1, H * N)
            scores = elements @ looked_for  # (B, step * width, H * N)
            if step == 1:
                scores = scores + of_places * inverse.transpose(1, 2)
            else:
                scores = scores + (of_places[:, None] * inverse[..., None]).flatten(1, 2)
            weights = scores.unflatten(2, (heads, -1)).transpose(1, 2).softmax(-1)  # (B, H, step * width, N)
            attended = (weights @ values).transpose(1, 2).flatten(2)
            answer = self._read_out(attended)
            return carry.clone(), answer if self.then is None else self.then(answer)

        _, answers = scan(write, asked.new_zeros(1), (elements, inverse, of_rows))  # (steps, B, step * width, K)
        return answers.transpose(0, 1).flatten(1, 2)

    def _read_out(self, attended: Tensor) -> Tensor:
        """As ReadOut, which writes into memory of its own: (B, m, V) -> (B, m, K)"""
        folded = self.folded
        if folded.triangle is not None:
            squares = F.linear(attended, *folded.triangle).square().sum(-1, keepdim=True)
            inverse = torch.rsqrt(squares + folded.eps)
            x = attended
            hidden = F.linear(torch.cat([attended * inverse, inverse], dim=-1), folded.hidden, folded.up_bias)
        else:
            weight, bias = folded.output
            x = attended + bias if weight is None else F.linear(attended, weight, bias)
            hidden = F.linear(F.layer_norm(x, x.shape[-1:], eps=folded.eps), folded.up, folded.up_bias)
        out = F.linear(folded.act(hidden), folded.down, folded.bias)
        return out + (x if folded.residual is None else F.linear(x, folded.residual))


@contextmanager
def traced_forms(inner: Any, inputs: Any, fixed_size: bool) -> Iterator[list[str]]:
    """While it is open, the layers of a PerceiverIOModel that pay for them are traced in these forms; gives their names.

    inputs: keyword arguments of the model, one example of the usual size.
    """
    changed: list[tuple[Any, str, Any]] = []
    # Text has no grid, and masks are the direct form's.
    if not isinstance(inner.preprocessor, TextPreprocessor) and "attention_mask" not in inputs:
        with torch.no_grad():
            array: Any = InputArray.of(inner.preprocessor(*inputs.values()))
            readers = [(layer, "traced_reader", TracedReader(layer, fixed_size)) for layer in _readers(inner, array)]
            changed += readers
            if inner.decoder is not None and inner.postprocessor is not None:
                query: Any = QueryArray.of(inner.output_query(array))
                writers = dict(_writers(inner, query, fixed_size))
                changed += [(inner.decoder, "traced_writers", writers)] if writers else []
    for module, name, form in changed:
        setattr(module, name, form)
    try:
        yield [name for _, name, _ in changed]
    finally:
        for module, name, _ in changed:
            delattr(module, name)


def _copy(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_copy, value))
    return value.detach().clone() if isinstance(value, Tensor) else value


def _readers(inner: Any, array: InputArray) -> Iterator[CrossAttentionLayer]:
    if any(is_on_grid(part) for _, part in array) and array.mask() is None:
        for layer in inner.encoder.cross_attends:
            scores = heads_of(layer) * inner.config.num_latents * array.length
            if scores >= FEWEST_SCORES and can_replace(layer):
                yield layer


def heads_of(layer: CrossAttentionLayer) -> int:
    return layer.cross_attn.q_proj.out_features // layer.cross_attn.qk_head_dim


def _writers(inner: Any, query: QueryArray, fixed_size: bool) -> Iterator[tuple[str, TracedWriter]]:
    layer, read_out = inner.decoder.cross_attend, getattr(inner.postprocessor, "read_out", None)
    if layer.use_query_residual or not can_replace(layer):
        return
    for name, part in query:
        if is_on_grid(part) and heads_of(layer) * inner.config.num_latents * part.length >= FEWEST_SCORES:
            linear = linear_read_out(inner.postprocessor, name)
            then = None if read_out is None or linear is not None else partial(read_out, modality=name)
            yield name, TracedWriter(layer, linear, then, fixed_size)
