"""Writing the output by its exact cheaper form: queries by their pieces, with the read-out folded in.

See fast_attention.py, and docs/performance.md for the algebra.
"""

import math
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .arrays import ArrayPart
from .attention import CrossAttentionLayer
from .fast_attention import GRID_ROWS, PASSES, Pieces, Tile, can_replace, pays, wide_dtype
from .products import product

Linear = tuple[Tensor, Tensor]  # weight (K, E), bias (K,)

# Queries written at a time: so many scores.
WRITE_SCORES = 1 << 19
# Numbers that the activation function makes at a time, few enough for memory that the process already has.
ACTIVATED = 1 << 15


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
