"""Fresh flow models that start out matching patches, and learn from there.

Attention itself can find where something went: where queries hold what the first frame shows at a place, and keys what
the second frame shows, scores are correlations, and the mean of the keys' places is where it is now. A model started
here reads three times:

1. Each head fetches what the first frame shows at one of the four tokens in a latent's cell.
2. It looks for that in the second frame, near places first. What it finds, less the token's own place, is a displacement;
   the first self-attend takes the mean of those around.
3. It looks again, around what was found around.

The decoder starts by asking the latents around, and its answer is the flow. The projections are solved for by ridge
regression on some inputs, layer by layer, so that they are right behind the norms; all of it is trained on.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..arrays import InputArray, QueryArray
from ..attention import Attention
from ..position_encoding import FourierPositionEncoding
from ..stems import PatchStem, windows

# (y, x) offsets in tokens: of the four tokens of a latent's cell, one for each head of a read; of the places around a latent
# that the heads of a self-attend look at; and of those around an output that the decoder's heads ask.
CELL = tuple((y, x) for y in (-0.5, 0.5) for x in (-0.5, 0.5))
AROUND = tuple((y, x) for y in (-2.0, 0.0, 2.0) for x in (-2.0, 0.0, 2.0) if y or x)
CORNERS = tuple((y, x) for y in (-1.0, 1.0) for x in (-1.0, 1.0))
# How wide (standard deviation in tokens) heads look that look at a place, and their score at its peak.
FETCH_LOOK, WIDE_LOOK = (0.4, 36.0), (1.0, 10.0)
# Score of two patches that are the same, and how far (tokens) from the expected place a match loses 1/2; twice as far it
# loses four times that. The second time what is expected is what was found around, times TRUST.
SHARPNESS = 25.0
FIRST_REACH, SECOND_REACH, TRUST = 1.75, 1.5, 1.2
# Places and displacements stand in the latents in units of so many tokens.
UNIT = 5.0


@dataclass
class Layout:
    """What the channels hold. Latents: their code first, then what follows here; tokens: both frames, their code last."""

    code: FourierPositionEncoding
    features: int  # channels of one frame

    @property
    def placed(self) -> slice:
        """Latents: the code of the place."""
        return slice(0, self.code.channels)

    @property
    def seen(self) -> list[slice]:
        """Latents: what the first frame shows at each token of the cell."""
        return _slices(self.placed.stop, self.features, len(CELL))

    @property
    def found(self) -> list[slice]:
        """Latents: y and x of each head's displacement by the first matching."""
        return _slices(self.seen[-1].stop, 2, len(CELL))

    @property
    def found_again(self) -> list[slice]:
        """Latents: the same by the second."""
        return _slices(self.found[-1].stop, 2, len(CELL))

    @property
    def around(self) -> slice:
        """Latents: the mean displacement around by the first."""
        return slice(self.found_again[-1].stop, self.found_again[-1].stop + 2)

    @property
    def known(self) -> slice:
        """Latents: all of these."""
        return slice(0, self.around.stop)

    @property
    def frames(self) -> list[slice]:
        """Tokens: what each frame shows."""
        return _slices(0, self.features, 2)

    @property
    def token_placed(self) -> slice:
        """Tokens: the code of the place."""
        return slice(2 * self.features, 2 * self.features + self.code.channels)


@torch.no_grad()
def start_matching(model: Any, latent_grid: tuple[int, int], pixel_values: Tensor, *, gain: float = 0.3) -> None:
    """Prepare a fresh PerceiverIOForOpticalFlow whose latents stand on a grid, each for 2x2 tokens of both frames.

    latent_grid: rows and columns of the latents. pixel_values: inputs to solve on, 16 pairs are enough. gain: what layers
    keep of their usual size where they add to latent channels that have no meaning yet; they add nothing to the others.
    Raises ValueError for a model of another shape than `flow.flow_config` gives.
    """
    perceiver = model.perceiver
    layout = _layout(perceiver, latent_grid)
    start_windows(perceiver.preprocessor.stem, pixel_values)
    input_array = InputArray.of(perceiver.preprocessor(pixel_values))
    grid = input_array.part.grid
    if grid != tuple(2 * n for n in latent_grid):
        raise ValueError(f"{latent_grid[0]}x{latent_grid[1]} latents are for 2x2 tokens each, and the input has {grid}")
    tokens = input_array.dense()  # (B, M, C)
    places, cells = _centred(grid, 1.0), _centred(latent_grid, 2.0)  # y and x in tokens
    span = torch.tensor([(n - 1) / 2 for n in grid])

    table = perceiver.encoder.latents.weight
    code = layout.code.encode_at(cells / span, dtype=table.dtype)
    table[:, layout.known] = 0
    table[:, layout.placed] = 2 * code.dense(0, len(cells))[0]
    for channels, offset in zip([*layout.found, *layout.found_again], 2 * CELL, strict=True):
        # The reads add the place where it is now.
        table[:, channels] = -(cells + torch.tensor(offset)) / UNIT
    z = table[None].expand(len(tokens), -1, -1)

    fetch, match, match_again = perceiver.encoder.cross_attends
    queries, keys = fetch.query_norm(z), fetch.context_norm(tokens)
    asking, asked = (queries, layout.placed, cells), (keys, layout.token_placed, places)
    look(fetch.cross_attn, CELL, *FETCH_LOOK, layout.code, span, asking, asked)
    _quieten(fetch, fetch.cross_attn, layout, gain)
    first = layout.frames[0]
    for head, channels in enumerate(layout.seen):
        hand_on(fetch.cross_attn, head, keys, first, tokens[..., first], channels)
    z = fetch(z, tokens)

    _quieten(match, match.cross_attn, layout, gain)
    expected = cells.expand(len(z), -1, -1)
    compare(match, layout, z, tokens, layout.placed, expected, places, FIRST_REACH, layout.found)
    z = match(z, tokens)

    for again, block in enumerate(perceiver.encoder.blocks):
        if again:
            _quieten(match_again, match_again.cross_attn, layout, gain)
            expected = cells + TRUST * UNIT * z[..., layout.around]
            compare(match_again, layout, z, tokens, layout.known, expected, places, SECOND_REACH, layout.found_again)
            z = match_again(z, tokens)
        for depth, layer in enumerate(block):
            attention, normed = layer.self_attn, layer.attn_norm(z)
            latents = (normed, layout.placed, cells)
            look(attention, AROUND, *WIDE_LOOK, layout.code, span, latents, latents)
            _quieten(layer, attention, layout, gain)
            if not again and not depth:
                for head in range(len(AROUND)):
                    mean = _mean(z, layout.found)
                    hand_on(attention, head, normed, layout.known, mean, layout.around, 1 / len(AROUND))
            z = layer(z)

    layer, attention = perceiver.decoder.cross_attend, perceiver.decoder.cross_attend.cross_attn
    asking_array = QueryArray.of(perceiver.output_query(input_array)).dense()
    queries, keys = layer.query_norm(asking_array), layer.context_norm(z)
    asking, asked = (queries, layout.token_placed, places), (keys, layout.placed, cells)
    look(attention, CORNERS, *WIDE_LOOK, layout.code, span, asking, asked)
    layer.mlp.down_proj.weight *= gain
    answer = slice(layout.token_placed.start, layout.token_placed.start + 2)
    attention.o_proj.weight[answer] = 0
    for head in range(len(CORNERS)):
        mean = _mean(z, layout.found_again) * UNIT
        hand_on(attention, head, keys, layout.known, mean, answer, 1 / len(CORNERS))
    answered, _ = attention(queries, *layer.project(z))
    read_out, whole = perceiver.postprocessor, slice(0, asking_array.shape[-1])
    # The answer stands on top of the query; y and x become x and y.
    solve(read_out.features, slice(0, 2), layer(asking_array, z), whole, answered[..., answer].flip(-1))
    pixels_per_token = perceiver.preprocessor.stem.spatial_downsample
    size = pixels_per_token * read_out.rescale_factor / read_out.scale_factor
    read_out.flow.weight[:, :2] = size * torch.eye(2)
    # A fine flow starts as the plain mean of the coarse ones around it.
    for parameter in read_out.weights.parameters():
        parameter.zero_()


Side = tuple[Tensor, slice, Tensor]  # normed (B, n, C), the channels of the code in it, places (n, 2) in tokens


def look(
    attention: Attention,
    offsets: Sequence[tuple[float, float]],
    width: float,
    peak: float,
    code: FourierPositionEncoding,
    span: Tensor,
    asking: Side,
    asked: Side,
) -> None:
    """Let head i start out with scores like a bell around the place of the query plus offsets[i], (y, x) in tokens.

    width, peak: the bell's, in tokens and in scores. span: tokens from the middle to the edge, for y and x.
    """
    attention.q_proj.weight *= 0.3
    attention.k_proj.weight *= 0.3
    size = attention.qk_head_dim
    (queries, query_channels, at), (keys, key_channels, places) = asking, asked
    of_keys = bells(code, places / span, width / span, peak * math.sqrt(size))
    for head, offset in enumerate(offsets):
        rows = slice(head * size, head * size + of_keys.shape[1])
        moved = (at + torch.tensor(offset)) / span
        solve(attention.k_proj, rows, keys, key_channels, of_keys)
        of_queries = bells(code, moved, width / span, peak * math.sqrt(size))
        solve(attention.q_proj, rows, queries, query_channels, of_queries)


def bells(code: FourierPositionEncoding, points: Tensor, widths: Tensor, peak: float) -> Tensor:
    """(n, 2) points in [-1, 1] -> (n, 4 K), whose products are bells of the points' distance: cos cos + sin sin."""
    columns = []
    for axis, resolution in enumerate(code.max_resolution or ()):
        frequencies = torch.linspace(1.0, resolution / 2, code.num_bands)
        shares = torch.exp(-((math.pi * frequencies * widths[axis]) ** 2) / 2)
        sizes = (peak / 2 * shares / shares.sum()).sqrt()
        angles = math.pi * points[:, axis, None] * frequencies
        columns += [sizes * angles.sin(), sizes * angles.cos()]
    return torch.cat(columns, dim=1)


def compare(
    layer: Any,
    layout: Layout,
    z: Tensor,
    tokens: Tensor,
    known: slice,
    expected: Tensor,
    places: Tensor,
    reach: float,
    found: list[slice],
) -> None:
    """Let a read look for what the latents have seen, around expected (B, N, 2) + CELL, and add the places to `found`.

    A head's channels: the patch; the place, y and x; the place's distance from the middle. For the score is
    SHARPNESS * correlation - |p - e|^2 / (2 reach^2), and that is (p e - |p|^2 / 2) / reach^2 and what is the same for
    all places. known: the latents' channels that tell what is expected.
    """
    attention, second = layer.cross_attn, layout.frames[1]
    queries, keys = layer.query_norm(z), layer.context_norm(tokens)
    root = attention.qk_head_dim**0.25  # of what attention divides scores by
    sharp, near = root * math.sqrt(SHARPNESS / layout.features), root / reach
    attention.q_proj.weight.zero_()
    for head, offset in enumerate(CELL):
        start = head * attention.qk_head_dim
        rows = slice(start, start + layout.features)
        solve(attention.q_proj, rows, queries, layout.seen[head], sharp * z[..., layout.seen[head]])
        solve(attention.k_proj, rows, keys, second, sharp * tokens[..., second])
        rows = slice(rows.stop, rows.stop + 2)
        solve(attention.q_proj, rows, queries, known, near * (expected + torch.tensor(offset)))
        solve(attention.k_proj, rows, keys, layout.token_placed, near * places)
        rows = slice(rows.stop, rows.stop + 1)
        # Ten of one and a tenth of the other: both sides about as large as the rows above.
        attention.q_proj.bias[rows] = 10 * near
        far = places.square().sum(dim=-1, keepdim=True)
        solve(attention.k_proj, rows, keys, layout.token_placed, -near / 20 * far)
        hand_on(attention, head, keys, layout.token_placed, places / UNIT, found[head])


def hand_on(
    attention: Attention, head: int, keys: Tensor, channels: slice, wanted: Tensor, out: slice, share: float = 1.0
) -> None:
    """Let a head's first values be `wanted` (..., n), from these channels of the keys, and add them to `out`."""
    start, width = head * attention.v_head_dim, wanted.shape[-1]
    rows = slice(start, start + width)
    solve(attention.v_proj, rows, keys, channels, wanted)
    attention.o_proj.weight[out, rows] = share * torch.eye(width)


def solve(linear: torch.nn.Linear, rows: slice, inputs: Tensor, channels: slice, wanted: Tensor) -> None:
    """Let rows of a linear give `wanted` (..., n) of these channels of `inputs` (..., C), by ridge regression."""
    x = inputs[..., channels].double()
    y = wanted.expand(*x.shape[:-1], -1).double().flatten(0, -2)
    x = x.flatten(0, -2)
    x_mean, y_mean = x.mean(dim=0), y.mean(dim=0)
    x, y = x - x_mean, y - y_mean
    gram = x.T @ x
    gram.diagonal().add_(1e-4 * gram.diagonal().mean() + 1e-9)
    weight = torch.linalg.solve(gram, x.T @ y).T
    linear.weight[rows] = 0
    linear.weight[rows, channels] = weight.to(linear.weight.dtype)
    linear.bias[rows] = (y_mean - weight @ x_mean).to(linear.bias.dtype)


@torch.no_grad()
def start_windows(stem: Any, pixel_values: Tensor, *, levelled: float = 0.9, knee: int = 8) -> None:
    """Let a window stem's linear start as principal components of these inputs' windows, whitened down to the `knee`-th.

    levelled: how much of a window's mean colours is taken off first; they tell little of motion, and would drown the
    rest. Raises ValueError for a stem without windows.
    """
    if not isinstance(stem, PatchStem) or stem.kernel_size is None or stem.norm is None:
        raise ValueError(f"matching compares windows; give the stem kernel_size and normalize=True, not {stem}")
    linear: Any = stem.linear
    pixels = windows(stem.channels_last(pixel_values), stem.kernel_size, stem.spatial_downsample).flatten(0, -2).float()
    colours = stem.in_channels
    count = linear.in_features // colours
    level = torch.eye(linear.in_features) - levelled / count * torch.eye(colours).repeat(count, count)
    pixels = pixels @ level
    mean = pixels.mean(dim=0)
    variances, axes = torch.linalg.eigh(torch.cov(pixels.T))
    variances, axes = variances.flip(0)[: linear.out_features], axes.flip(1)[:, : linear.out_features]
    weight = (axes / (variances + variances[knee]).sqrt()).T
    weight /= ((pixels - mean) @ weight.T).std()
    linear.weight.copy_(weight @ level)
    linear.bias.copy_(-(weight @ mean))


def _layout(perceiver: Any, latent_grid: tuple[int, int]) -> Layout:
    """Where things go in this model, or ValueError."""
    code = getattr(perceiver.preprocessor, "position", None)
    if not isinstance(code, FourierPositionEncoding) or code.num_axes != 2 or code.max_resolution is None:
        raise ValueError(f"matching needs a Fourier position of two axes with max_resolution, not {code}")
    layout = Layout(code, (perceiver.preprocessor.channels - code.channels) // 2)
    encoder, decoder = perceiver.encoder, perceiver.decoder.cross_attend.cross_attn
    table = encoder.latents.weight
    if latent_grid[0] * latent_grid[1] != len(table) or layout.known.stop > table.shape[1]:
        raise ValueError(
            f"a grid of {latent_grid[0]}x{latent_grid[1]} latents with {layout.known.stop} channels to fill does not fit "
            f"{len(table)} latents of {table.shape[1]}"
        )
    if len(encoder.cross_attends) != 3 or len(encoder.blocks) != 2 or not len(encoder.blocks[0]):
        raise ValueError(
            f"matching takes three reads around two blocks of self-attends; the model has {len(encoder.cross_attends)} and "
            f"{len(encoder.blocks)}"
        )
    of_code = 4 * code.num_bands
    needed = [
        ("read", layer.cross_attn, len(CELL), max(layout.features + 3, of_code)) for layer in encoder.cross_attends
    ]
    needed += [("self-attend", layer.self_attn, len(AROUND), of_code) for block in encoder.blocks for layer in block]
    for name, attention, heads, width in [*needed, ("decoder", decoder, len(CORNERS), of_code)]:
        have = attention.q_proj.out_features // attention.qk_head_dim
        if have != heads or attention.qk_head_dim < width:
            raise ValueError(
                f"a {name} that matches has {heads} heads with {width} channels or more for queries and keys, not {have} "
                f"with {attention.qk_head_dim}"
            )
    return layout


def _centred(grid: Sequence[int], step: float) -> Tensor:
    """(n, 2) places of a grid, row by row, from its middle"""
    places = torch.cartesian_prod(*(torch.arange(float(n)) for n in grid)) * step
    return places - places.mean(dim=0)


def _mean(z: Tensor, parts: list[slice]) -> Tensor:
    return torch.stack([z[..., channels] for channels in parts]).mean(dim=0)


def _quieten(layer: Any, attention: Attention, layout: Layout, gain: float) -> None:
    for weight in (attention.o_proj.weight, layer.mlp.down_proj.weight):
        weight *= gain
        weight[layout.known] = 0


def _slices(start: int, width: int, count: int) -> list[slice]:
    return [slice(start + i * width, start + (i + 1) * width) for i in range(count)]
