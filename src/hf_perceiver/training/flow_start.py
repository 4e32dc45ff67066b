"""Fresh flow models that start out looking at neighbourhoods, through patches of unit scale.

Flow is a local question: where did what stands here go. The position-aligned initialiser makes every head look at its
own place; here each head of a cross- or self-attention looks at a place of its own around it, in two axes, so that the
model starts out like a small convolutional network and learns from there. What a token's patch holds is first turned
into its principal components, partly whitened: the differences between two frames, which flow is told by, are otherwise
far smaller than what the frames share.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..arrays import InputArray, QueryArray
from ..attention import Attention
from ..position_encoding import FourierPositionEncoding

Offsets = Sequence[tuple[float, float]]


def ring(step: float) -> list[tuple[float, float]]:
    """The eight (y, x) offsets around a place."""
    return [(y * step, x * step) for y in (-1, 0, 1) for x in (-1, 0, 1) if y or x]


def corners(*steps: float) -> list[tuple[float, float]]:
    """The four diagonal (y, x) offsets of each step."""
    return [(y * step, x * step) for step in steps for y in (-1, 1) for x in (-1, 1)]


# Where heads look, in tokens: the latents read near and around, then each other, and outputs ask the latents near them.
# One (offsets, width of the kernel in tokens, score at its peak) for each time the latents read.
READS = ((corners(0.5, 1.5), 0.6, 14.0), (ring(3.0), 1.3, 9.0))
LATENTS = (ring(2.0), 1.0, 10.0)
ASKS = (corners(0.5, 2.0), 1.0, 10.0)


@torch.no_grad()
def start_flow(
    model: Any,
    latent_grid: tuple[int, int],
    pixel_values: Tensor,
    *,
    reads: Sequence[tuple[Offsets, float, float]] = READS,
    latents: tuple[Offsets, float, float] = LATENTS,
    asks: tuple[Offsets, float, float] = ASKS,
    code_size: float = 2.0,
    residual_gain: float = 0.5,
) -> None:
    """Prepare a fresh PerceiverIOForOpticalFlow: latents spread over the frame, heads that look at chosen places.

    latent_grid: rows and columns of the latents. pixel_values: some inputs; how large the positions are next to what is
    read from these is measured at every layer, for it decides how sharply heads look. code_size: of the positions in the
    latents at first; residual_gain: of what layers add to the latents, a tenth of that in the position's channels.
    Raises ValueError unless the input's position is a Fourier code of two axes and the latents fill the grid.
    """
    perceiver = model.perceiver
    code = getattr(perceiver.preprocessor, "position", None)
    if not isinstance(code, FourierPositionEncoding) or code.num_axes != 2 or code.max_resolution is None:
        raise ValueError(f"a local start needs a Fourier position of two axes with max_resolution, not {code}")
    table = perceiver.encoder.latents.weight
    if latent_grid[0] * latent_grid[1] != len(table) or code.channels > table.shape[1]:
        raise ValueError(
            f"a grid of {latent_grid[0]}x{latent_grid[1]} with positions of {code.channels} channels does not fit "
            f"{len(table)} latents of {table.shape[1]}"
        )
    if len(reads) != len(perceiver.encoder.cross_attends):
        raise ValueError(f"{len(reads)} reads are given, the model has {len(perceiver.encoder.cross_attends)}")
    width = code.channels
    # The middle of each latent's cell, where tokens stand at the ends of [-1, 1].
    places = [
        ((torch.arange(cells) + 0.5) * tokens / cells - 0.5) * 2 / (tokens - 1) - 1
        for cells, tokens in zip(latent_grid, code.max_resolution, strict=True)
    ]
    spread = torch.cartesian_prod(*places)
    of_latents = code.encode_at(spread, dtype=table.dtype).dense(0, len(spread))[0]  # (N, width)
    table[:, :width] = code_size * of_latents
    input_array = InputArray.of(perceiver.preprocessor(pixel_values))
    context, z = input_array.dense(), table[None].expand(len(pixel_values), -1, -1)
    of_tokens = context[0, :, -width:]

    def sizes(queries: Tensor, query_code: Tensor, keys: Tensor, key_code: Tensor) -> tuple[float, float]:
        return _size(queries, query_code), _size(keys, key_code)

    for layer, look in zip(perceiver.encoder.cross_attends, reads, strict=True):
        _weaken(layer, layer.cross_attn.o_proj, width, residual_gain)
        query, key = layer.query_norm(z)[..., :width], layer.context_norm(context)[..., -width:]
        start = perceiver.preprocessor.channels - width
        scales = sizes(query, of_latents, key, of_tokens)
        look_at(layer.cross_attn, *look, code=code, starts=(0, start), scales=scales)
        z = layer(z, context)
    for layer in (layer for block in perceiver.encoder.blocks for layer in block):
        _weaken(layer, layer.self_attn.o_proj, width, residual_gain)
        both = layer.attn_norm(z)[..., :width]
        scales = sizes(both, of_latents, both, of_latents)
        look_at(layer.self_attn, *latents, code=code, starts=(0, 0), scales=scales)
        z = layer(z)
    decoder = perceiver.decoder.cross_attend
    asked = QueryArray.of(perceiver.output_query(input_array)).dense()
    query, key = decoder.query_norm(asked)[..., -width:], decoder.context_norm(z)[..., :width]
    start = perceiver.output_query.channels - width
    scales = sizes(query, of_tokens, key, of_latents)
    look_at(decoder.cross_attn, *asks, code=code, starts=(start, 0), scales=scales)
    # A fine flow starts as the plain mean of the coarse ones around it.
    for parameter in perceiver.postprocessor.weights.parameters():
        parameter.zero_()


def _size(normed: Tensor, code: Tensor) -> float:
    """How large a code (n, width) stands in what a norm makes of an array, (B, n, width)."""
    code = code - code.mean(dim=0)
    return float((normed.mean(dim=0) * code).sum() / code.square().sum())


def _weaken(layer: Any, out: torch.nn.Linear, width: int, gain: float) -> None:
    """Let a layer change the latents less than usual, and their positions hardly at all."""
    for weight in (out.weight, layer.mlp.down_proj.weight):
        weight *= gain
        weight[:width] *= 0.1


@torch.no_grad()
def look_at(
    attention: Attention,
    offsets: Offsets,
    width: float,
    peak: float,
    *,
    code: FourierPositionEncoding,
    starts: tuple[int, int],
    scales: tuple[float, float],
    other_gain: float = 0.3,
) -> None:
    """Let head k of a query at place x start out with scores like a bell of `width` and height `peak` at x + offsets[k].

    Exact for a Fourier code: a head's channels hold the code's own, those of the query turned by the offset. Where a head
    has fewer channels than the code, it takes every second band, or the lowest ones. offsets, width: in tokens.
    starts: the codes' first channels in queries and keys; scales: how large the norms make them. other_gain: what
    the other channels of queries and keys keep.
    """
    head_dim, bands = attention.qk_head_dim, code.num_bands
    resolution: Sequence[int] = code.max_resolution  # type: ignore[assignment]
    q, k = attention.q_proj.weight, attention.k_proj.weight
    if len(offsets) * head_dim > len(q):
        raise ValueError(f"{len(offsets)} offsets are more than the {len(q) // head_dim} heads")
    q *= other_gain
    k *= other_gain
    chosen = torch.arange(bands) if head_dim >= 4 * bands else torch.arange(bands)[::2][: head_dim // 4]
    first_sine, first_cosine = 2, 2 + 2 * bands
    for head, offset in enumerate(offsets):
        rows = slice(head * head_dim, (head + 1) * head_dim)
        q[rows, starts[0] : starts[0] + code.channels] = 0
        k[rows, starts[1] : starts[1] + code.channels] = 0
        row = head * head_dim
        for axis, tokens in enumerate(resolution):
            frequencies = torch.linspace(1.0, tokens / 2, bands)[chosen]
            unit = 2 / (tokens - 1)  # of a coordinate, per token
            shares = torch.exp(-((math.pi * frequencies * width * unit) ** 2) / 2)
            shares *= peak / 2 / shares.sum()
            sizes = (shares * math.sqrt(head_dim) / (scales[0] * scales[1])).sqrt()
            angles = math.pi * frequencies * offset[axis] * unit
            for band, size, angle in zip(chosen.tolist(), sizes.tolist(), angles.tolist(), strict=True):
                sine, cosine = first_sine + axis * bands + band, first_cosine + axis * bands + band
                k[row, starts[1] + sine] = k[row + 1, starts[1] + cosine] = size
                q[row, starts[0] + sine] = q[row + 1, starts[0] + cosine] = size * math.cos(angle)
                q[row, starts[0] + cosine] = size * math.sin(angle)
                q[row + 1, starts[0] + sine] = -size * math.sin(angle)
                row += 2


@torch.no_grad()
def level_patches(stem: Any, pixel_values: Tensor, *, kept: int = 3) -> None:
    """Let a patch stem's linear start as the principal components of these inputs' patches, the first `kept` made no
    larger than the next one: a patch's mean colours, which tell nothing of motion, would drown the others.
    """
    linear, stem.linear = stem.linear, None
    try:
        patches = stem(pixel_values).flatten(0, -2).float()
    finally:
        stem.linear = linear
    mean = patches.mean(dim=0)
    variances, axes = torch.linalg.eigh(torch.cov(patches.T))
    order = variances.argsort(descending=True)[: linear.out_features]
    variances = variances[order]
    weight = (axes[:, order] * (variances.clamp(max=variances[kept].item()) / variances).sqrt()).T
    weight /= ((patches - mean) @ weight.T).std()
    linear.weight[: len(weight)] = weight.to(linear.weight.dtype)
    linear.bias[: len(weight)] = -(weight @ mean).to(linear.bias.dtype)
