"""How fresh weights are drawn: as DeepMind's ("deepmind"), as transformers' ("normal"), or aligned to positions.

"position_aligned" is "deepmind" plus a start where attention is local. The latents are spread over the input and hold the
Fourier code of their place, and each head begins with a place of its own around the one that asks: the encoder's read
with the elements there, a self-attend with the latents next to it, the decoder with the latents that surround the query.
So a fresh model reads, thinks and answers like a convolution, where a random one has to discover where things are before
it can learn what they are. `docs/initialization.md` has the measurements.

It is exact and needs no data: for a Fourier code c, c(x + offset) is a rotation of c(x), and <A c(x), A c(y)> with
orthogonal, scaled A is a function of x - y whose Fourier series the scales are: here a bell.

Tensors that came from a checkpoint are left alone (transformers.initialization).
"""

import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .attention import MLP, Attention, CrossAttentionLayer
from .configuration_perceiver_io import PerceiverIOConfig
from .output_queries import InputQuery
from .position_encoding import FourierPositionEncoding, truncated_normal_

# Standard deviation of a normal cut at two standard deviations: Haiku's VarianceScaling divides by it.
TRUNCATED_STD = 0.87962566103423978

# Mean square of the latents' rows that the codes make up, and what all layers together add to it by the end, roughly:
# together they say how large a layer norm leaves the codes.
CODE_POWER, ADDED_POWER = 0.5, 0.5
# A head's score at its place, above ln(number of places on the axis): how much of its attention stays there.
PEAK = 3.0
# Of the distance between two heads' places: the standard deviation of a head's attention around its own.
WIDTH = 1 / 3
# Steps, in latents, to the neighbours that heads of a self-attend look at. Heads beyond those stay free.
NEIGHBOURS = (1, 2, 4)
# What the other channels of aligned queries and keys keep of their usual size.
OTHER_GAIN = 0.3


def init_module(module: nn.Module, config: PerceiverIOConfig) -> None:
    """Draw the parameters that `module` itself holds."""
    if config.initializer == "normal":
        if hasattr(module, "reset_own_parameters"):
            for parameter in module.parameters(recurse=False):
                init.normal_(parameter, std=config.initializer_range)
        return
    if isinstance(module, (nn.Linear, nn.Conv2d)):
        truncated_normal_(module.weight, module.weight[0].numel() ** -0.5)
    elif isinstance(module, nn.Embedding):
        truncated_normal_(module.weight, 1.0)
    elif isinstance(module, (Attention, MLP)):
        for linear in module.children():
            if isinstance(linear, nn.Linear):
                truncated_normal_(linear.weight, linear.in_features**-0.5 / TRUNCATED_STD)
    if hasattr(module, "reset_own_parameters"):
        module.reset_own_parameters()  # type: ignore[operator]


def align_positions(model: Any) -> None:
    """Start attention local in a PerceiverIOModel; ValueError when it has no Fourier code to align to."""
    code = _code_of(model)
    table, channels = model.encoder.latents.weight, model.preprocessor.channels
    if table.is_meta:
        return
    places, cells = spread_latents(len(table), code)
    places, cells = places.to(table.device), cells.to(table.device)
    resolution = torch.tensor(code.max_resolution, dtype=torch.float32, device=table.device)
    cell = (resolution / cells).clamp(min=1)  # elements per latent, along each axis
    power = code.num_axes * (code.num_bands + code.concat_pos / 3)  # of a code: sum of squares, on average
    code_size = math.sqrt(CODE_POWER * table.shape[1] / power)
    if not _loaded(table):
        table[:, : code.channels] = code_size * code.encode_at(places, dtype=table.dtype).dense(0, len(places))[0]
    # How large norms leave the codes; the features of inputs are taken to have unit variance.
    in_inputs = math.sqrt(channels / (channels - code.channels + power))
    layers = _layers(model.encoder)
    depth = len(layers)

    def in_latents(layers_before: int) -> float:
        return code_size / math.sqrt(CODE_POWER + ADDED_POWER * layers_before / depth)

    for before, layer in enumerate(layers):
        if layer in layers[:before]:
            continue  # weights that are used again
        if isinstance(layer, CrossAttentionLayer):
            attention, heads = layer.cross_attn, model.config.num_cross_attention_heads
            corners = around(heads, code.num_axes).to(table.device)
            step = (cell / 2).clamp(min=1)
            # Straight ahead a head sees the whole cell.
            widths = torch.where(corners == 0, cell, step) * WIDTH
            starts, scales = (0, channels - code.channels), (in_latents(before), in_inputs)
            look_at(attention, code, corners * step, widths, resolution.log() + PEAK, starts=starts, scales=scales)
        else:
            attention, heads = layer.self_attn, model.config.num_self_attention_heads
            offsets = neighbours(heads, cells).to(table.device) * cell
            widths = (cell * WIDTH).expand(len(offsets), -1)
            scales = (in_latents(before), in_latents(before))
            look_at(attention, code, offsets, widths, cells.log() + PEAK, starts=(0, 0), scales=scales)
        # What each layer adds is small enough for the codes to outlast them all; GPT-2 scales alike.
        for weight in (attention.o_proj.weight, layer.mlp.down_proj.weight):
            if not _loaded(weight):
                weight.mul_((2 * depth) ** -0.5)
    # An input that asks brings its own code.
    asking = code if isinstance(model.output_query, InputQuery) else getattr(model.output_query, "position", None)
    if isinstance(asking, FourierPositionEncoding) and _same_code(asking, code):
        attention, width = model.decoder.cross_attend.cross_attn, model.output_query.channels
        offsets = around(model.config.decoder_num_heads, code.num_axes).to(table.device) * cell
        widths = (cell * WIDTH).expand(len(offsets), -1)
        starts = (width - code.channels, 0)
        scales = (math.sqrt(width / (width - code.channels + power)), in_latents(depth))
        look_at(attention, code, offsets, widths, cells.log() + PEAK, starts=starts, scales=scales)


def spread_latents(count: int, code: FourierPositionEncoding) -> tuple[Tensor, Tensor]:
    """Coordinates (count, d) spread evenly over a code's elements, and into how many cells each axis is cut, (d,).

    A grid, as near to square cells as `count` allows; where one side of a cell would be over twice as long as another, a
    Kronecker sequence, whose cells are counted in fractions.
    """
    resolution: tuple[int, ...] = code.max_resolution  # type: ignore[assignment]
    sides = _grid_of(count, resolution)
    size = torch.tensor(resolution, dtype=torch.float32)
    if sides is not None:
        axes = [(torch.arange(side, dtype=torch.float32) + 0.5) / side for side in sides]
        shares = torch.cartesian_prod(*axes).reshape(count, len(sides))
        cells = torch.tensor(sides, dtype=torch.float32)
    else:
        ratio = 1.5
        for _ in range(40):  # the root of x ** (d + 1) = x + 1, the golden ratio's generalisation
            ratio = (1 + ratio) ** (1 / (len(resolution) + 1))
        steps = torch.tensor([ratio ** -(axis + 1) for axis in range(len(resolution))], dtype=torch.float64)
        shares = ((0.5 + torch.arange(count)[:, None] * steps) % 1).float()
        cells = (size / (size.prod() / count) ** (1 / len(resolution))).clamp(min=1)
    # From the first element's middle to the last one's; what coordinates those have, the code's rule says.
    elements = torch.minimum((shares * size - 0.5).clamp(min=0), size - 1)
    return elements * _unit(code) - 1, cells


def around(heads: int, num_axes: int) -> Tensor:
    """(heads, num_axes) places around 0, in steps: the corners at 0.5, at 1.5 ...; then those of fewer axes, then 0.

    In one axis -0.5, 0.5, -1.5, 1.5 ..., in two the corners of squares, in three those of cubes.
    """
    offsets: list[tuple[float, ...]] = []
    for axes in range(num_axes, 0, -1):
        reach = 0.5
        while heads - len(offsets) >= 2**axes:
            offsets += [(0.0,) * (num_axes - axes) + c for c in itertools.product((-reach, reach), repeat=axes)]
            reach += 1
    offsets += [(0.0,) * num_axes] * (heads - len(offsets))
    return torch.tensor(offsets, dtype=torch.float32).reshape(heads, num_axes)


def neighbours(heads: int, cells: Tensor) -> Tensor:
    """(at most heads, d) steps to the latents next to one: whole rings only, along axes that are cut in two or more.

    The two, four or six straight neighbours at 1, 2 and 4 latents, and the four or eight diagonal ones.
    """
    axes = [axis for axis, count in enumerate(cells.tolist()) if count >= 2]
    offsets: list[Tensor] = []
    unit = torch.eye(len(cells))[axes].cpu()
    for step in NEIGHBOURS:
        straight = [sign * step * row for row in unit for sign in (-1, 1)]
        diagonal = [step * (torch.tensor(signs) @ unit) for signs in itertools.product((-1.0, 1.0), repeat=len(axes))]
        for ring in (straight, diagonal if len(axes) > 1 else []):
            inside = all((row.abs() < cells.cpu()).all() for row in ring)
            if inside and len(offsets) + len(ring) <= heads:
                offsets += ring
    return torch.stack(offsets) if offsets else torch.zeros(0, len(cells))


def look_at(
    attention: Attention,
    code: FourierPositionEncoding,
    offsets: Tensor,
    widths: Tensor,
    peaks: Tensor,
    *,
    starts: tuple[int, int],
    scales: tuple[float, float],
) -> None:
    """Let head h of a query at place x start out looking at x + offsets[h]; heads beyond the offsets stay as they are.

    offsets, widths (h, d): in elements; of the attention, which is a bell. peaks (d,): scores there, over all others'.
    starts: the codes' first channels in queries and in keys; scales: how large norms leave them there.
    """
    q, k = attention.q_proj.weight, attention.k_proj.weight
    if _loaded(q) or _loaded(k):
        return
    device, head_dim, bands = q.device, attention.qk_head_dim, code.num_bands
    count = code.num_axes * bands
    frequencies = torch.stack(
        [torch.linspace(1.0, size / 2, bands, device=device, dtype=torch.float32) for size in code.max_resolution or ()]
    )
    unit = _unit(code).to(device)
    first = code.channels - 2 * count
    for head, (offset, width) in enumerate(zip(offsets, widths, strict=True)):
        # exp(a bell of height p and width w) is itself much like a bell of width w / sqrt(p).
        bell = -((math.pi * frequencies * (width * unit * peaks.sqrt())[:, None]) ** 2) / 2
        shares = bell.softmax(dim=1) * peaks[:, None]  # (d, bands), of the score
        sizes = (shares.flatten() * math.sqrt(head_dim) / (scales[0] * scales[1])).sqrt()
        angles = (math.pi * frequencies * (offset * unit)[:, None]).flatten()
        mixed = torch.empty(head_dim, 2 * count, device=device, dtype=torch.float32)
        nn.init.orthogonal_(mixed, gain=max(1.0, 2 * count / head_dim) ** 0.5)
        sine, cosine = mixed[:, :count] * sizes, mixed[:, count:] * sizes
        turned = (sine * angles.cos() - cosine * angles.sin(), sine * angles.sin() + cosine * angles.cos())
        rows = slice(head * head_dim, (head + 1) * head_dim)
        for weight, start, parts in ((q, starts[0], turned), (k, starts[1], (sine, cosine))):
            weight[rows] *= OTHER_GAIN
            weight[rows, start : start + first] = 0
            weight[rows, start + first : start + code.channels] = torch.cat(parts, dim=1).to(weight.dtype)


def _grid_of(count: int, resolution: tuple[int, ...]) -> tuple[int, ...] | None:
    """Factors of `count` that cut the axes into cells as near to cubes as can be; None if they are far from it"""
    divisors = [n for n in range(1, count + 1) if count % n == 0]
    cuts = [c for c in itertools.product(divisors, repeat=len(resolution)) if math.prod(c) == count]

    def lengths(cut: tuple[int, ...]) -> list[float]:
        return [size / n for size, n in zip(resolution, cut, strict=True)]

    def unevenness(cut: tuple[int, ...]) -> float:
        logs = [math.log(length) for length in lengths(cut)]
        return sum((log - sum(logs) / len(logs)) ** 2 for log in logs)

    best = min(cuts, key=unevenness)
    shortest_cut = min([length for length, n in zip(lengths(best), best, strict=True) if n > 1], default=math.inf)
    return best if max(lengths(best)) <= 2 * shortest_cut else None


def _unit(code: FourierPositionEncoding) -> Tensor:
    """(d,) coordinates from one element to the next"""
    sizes = code.max_resolution or ()
    return torch.tensor([2 / max(size - 1, 1) if code.rule == "dense" else 2 / size for size in sizes])


def _code_of(model: Any) -> FourierPositionEncoding:
    position = getattr(model.preprocessor, "position", None)
    concatenated = getattr(model.preprocessor, "combine", "concat") == "concat"
    code = position if isinstance(position, FourierPositionEncoding) and concatenated else None
    if code is None or code.channels > model.config.d_latents:
        width = "none" if code is None else str(code.channels)
        raise ValueError(
            "initializer='position_aligned' needs one modality whose position is of kind 'fourier', at most as wide as "
            f"the latents ({model.config.d_latents}); its width here: {width}. Use initializer='deepmind'"
        )
    if code.sine_only or code.max_resolution is None:
        raise ValueError(
            "initializer='position_aligned' needs a fourier position with cosines and with max_resolution; here "
            f"sine_only={code.sine_only}, max_resolution={code.max_resolution}. Set them, or use initializer='deepmind'"
        )
    if not model.config.use_query_residual:
        raise ValueError(
            "initializer='position_aligned' needs use_query_residual=True: without it the latents lose the positions that "
            "they hold. Use initializer='deepmind'"
        )
    return code


def _same_code(a: FourierPositionEncoding, b: FourierPositionEncoding) -> bool:
    names = ("num_bands", "max_resolution", "num_axes", "sine_only", "concat_pos")
    return all(getattr(a, name) == getattr(b, name) for name in names)


def _layers(encoder: Any) -> list[Any]:
    """All that change the latents, in running order"""
    runs = [[encoder.cross_attends[i]] if step == "read" else list(encoder.blocks[i]) for step, i in encoder.plan]
    return [layer for run in runs for layer in run]


def _loaded(weight: Tensor) -> bool:
    return getattr(weight, "_is_hf_initialized", False)
