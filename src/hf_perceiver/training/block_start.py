"""Fresh video autoencoders that start as what they would first have to discover: a linear transform of blocks.

A random Perceiver has to find out where things are before it can learn what they are. Here each latent starts out
reading a block of the video (or a stretch of the sound), each head a part of it; its values are the principal
components of a few clips; each pixel asks the latent of its block, and each hidden unit of the decoder's MLP starts as
one pixel of a block. All of it are starting values of the ordinary weights, found by least squares on a batch of clips,
and all are trained.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

PLACE_SIZE = 3.0  # of a latent's place; its content starts with a tenth of the energy
SHARPNESS = 8.0  # score between one's own block and the next
# Of two channels that are the same for all elements, so that the norms leave the other channels as they are: in the input
# array and in the queries.
STEADY_INPUT, STEADY_QUERY = 12.0, 40.0
GATE, LIFT, SLOPE = 12.0, 5.0, 4.0  # of the hidden units: how far shut, how far open, and per unit of brightness


@torch.no_grad()
def start_from_blocks(model: Any, clips: dict[str, Tensor], blocks: tuple[int, int, int]) -> None:
    """Prepare a fresh model of `video_config`; clips: image (B, T, 3, H, W), audio (B, S, 1); blocks over t, y, x.

    Raises ValueError where blocks, stretches and widths do not fit.
    """
    was_training = model.training
    model.eval()
    perceiver = model.perceiver
    inputs = {name: clips[name] for name in ("image", "audio")}
    _fit_patches(perceiver, clips["image"])
    for name in ("audio", "image", "label"):
        _hold_steady(perceiver.preprocessor.padding(name), STEADY_INPUT)
    _hold_steady(perceiver.preprocessor.mask_tokens("label"), STEADY_INPUT)
    encoding = perceiver.encode(inputs)
    sizes = encoding.input_array.sizes
    input_grid = encoding.input_array.parts["image"].grid
    width, latents = perceiver.config.d_latents, perceiver.encoder.latents.weight
    num_blocks = math.prod(blocks)
    stretches = len(latents) - num_blocks
    places = sum(blocks) + 1
    if stretches < 1 or stretches >= places or sizes["audio"] % stretches:
        raise ValueError(
            f"{len(latents)} latents for blocks {blocks}: {stretches} are left for {sizes['audio']} patches of sound, which "
            "must divide into as many stretches"
        )
    of_blocks = torch.cat([place_vectors(blocks, blocks), torch.ones(num_blocks, 1)], dim=1)
    of_stretches = torch.zeros(stretches, places)
    of_stretches[:, :stretches], of_stretches[:, -1] = torch.eye(stretches), -1.0
    latent_places = torch.cat([of_blocks, of_stretches])  # (N, places)
    latents.zero_()
    latents[:, :places] = PLACE_SIZE * latent_places

    read = perceiver.encoder.cross_attends[0]
    for layer in itertools.chain([read], *perceiver.encoder.blocks):
        if layer is not read:
            layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    _fit_read(perceiver, encoding.input_array, latent_places, input_grid, blocks, stretches)
    heard = inputs_of(read.cross_attn.o_proj, lambda: perceiver.encode(inputs))  # (B, N, H * V)
    components, mean, spread = principal_components(heard[:, :num_blocks].flatten(0, 1), width - places)
    # Between raw and whitened: weak components stand out from rounding, strong ones still lead.
    components = components * spread[:, None] ** -0.5
    energy = ((heard[:, :num_blocks] - mean) @ components.T).square().sum(-1).mean()
    components *= (0.1 * (PLACE_SIZE**2) * len(blocks) / energy) ** 0.5
    output = read.cross_attn.o_proj
    output.weight.zero_()
    output.weight[places:] = components
    output.bias.zero_()
    output.bias[places:] = -components @ mean
    _fit_decoder(perceiver, clips, blocks, stretches, latent_places)
    model.train(was_training)


def place_vectors(grid: tuple[int, ...], blocks: tuple[int, ...]) -> Tensor:
    """(points, sum of blocks): for each point of a grid and each axis, which of the blocks it lies in, one-hot"""
    axes = [nn.functional.one_hot(torch.arange(n) * b // n, b) for n, b in zip(grid, blocks, strict=True)]
    rows = torch.cartesian_prod(*[torch.arange(n) for n in grid]).reshape(-1, len(grid))
    return torch.cat([axis[rows[:, i]] for i, axis in enumerate(axes)], dim=1).float()


def principal_components(rows: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """(n, d) -> components (count, d), the mean (d,), and each component's standard deviation (count,)"""
    mean = rows.mean(dim=0)
    covariance = (rows - mean).T.double() @ (rows - mean).double() / len(rows)
    values, vectors = torch.linalg.eigh(covariance)
    values = values.flip(0)[:count].clamp(min=float(values[-1]) * 1e-6)
    return vectors.flip(1)[:, :count].T.float().contiguous(), mean, values.sqrt().float()


def fit_linear(rows: Tensor, targets: Tensor, ridge: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(n, d), (n, k) -> weight (k, d) and bias (k,) of the least-squares map, small weights where there is a choice"""
    centre, level = rows.mean(dim=0).double(), targets.mean(dim=0).double()
    x, y = rows.double() - centre, targets.double() - level
    gram = x.T @ x
    gram.diagonal().add_(ridge * gram.diagonal().mean())
    weight = torch.linalg.solve(gram, x.T @ y).T
    return weight.float(), (level - weight @ centre).float()


def inputs_of(module: nn.Module, run: Callable[[], Any]) -> Tensor:
    """What `module` is given while `run` runs; along the second axis where that comes in pieces."""
    seen: list[Tensor] = []
    handle = module.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        run()
    finally:
        handle.remove()
    return torch.cat(seen, dim=1)


def _fit_patches(perceiver: Any, image: Tensor) -> None:
    """The stem's linear begins with the principal components of patches, half as large as the positions."""
    stem = perceiver.preprocessor.modalities["image"].stem
    patches = inputs_of(stem.linear, lambda: stem(image)).flatten(0, -2)
    components, mean, _ = principal_components(patches, stem.channels)
    size = 0.3 / float(((patches - mean) @ components.T).std())
    stem.linear.weight.copy_(size * components)
    stem.linear.bias.copy_(-size * components @ mean)


def _fit_read(
    perceiver: Any,
    input_array: Any,
    latent_places: Tensor,
    input_grid: tuple[int, ...],
    blocks: tuple[int, ...],
    stretches: int,
) -> None:
    """Latents look at their block; head h of them at one half of it along each axis, and at a quarter of a stretch."""
    layer = perceiver.encoder.cross_attends[0]
    attention = layer.cross_attn
    heads = len(attention.q_proj.weight) // attention.qk_head_dim
    places = latent_places.shape[1]
    if places + 3 > attention.qk_head_dim or heads != 8:
        raise ValueError(f"8 heads of at least {places + 3} channels look at blocks {blocks}, not {heads}")
    halves = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)  # (8, 3)
    of_image = torch.zeros(math.prod(input_grid), places + 3)
    of_image[:, : places - 1] = place_vectors(input_grid, blocks)
    rows = torch.cartesian_prod(*[torch.arange(n) for n in input_grid])
    finer = rows * torch.tensor(blocks) * 2 // torch.tensor(input_grid)
    of_image[:, places - 1], of_image[:, places:] = 1.0, (finer % 2) - 0.5
    patches = input_array.sizes["audio"]
    of_audio = torch.zeros(patches, places + 3)
    quarter = torch.arange(patches) * stretches * 4 // patches % 4
    of_audio[:, :stretches] = place_vectors((patches,), (stretches,))
    of_audio[:, places - 1] = -1.0
    of_audio[:, places + 1], of_audio[:, places + 2] = quarter // 2 - 0.5, quarter % 2 - 0.5
    tokens = layer.context_norm(input_array.dense()[:, : patches + len(of_image)])  # (B, M, C)
    targets = torch.cat([of_audio, of_image]).expand(len(tokens), -1, -1)
    # The label, told or masked, is nowhere.
    nowhere = layer.context_norm(_label_elements(perceiver.preprocessor)).repeat(len(tokens), 1)
    key, key_bias = fit_linear(
        torch.cat([tokens.flatten(0, 1), nowhere]),
        torch.cat([targets.flatten(0, 1), torch.zeros(len(nowhere), places + 3)]),
    )
    asked = latent_places.clone()
    asked[:, -1] *= 2.0
    latents = layer.query_norm(perceiver.encoder.latents()[0])
    size = SHARPNESS * math.sqrt(attention.qk_head_dim)
    for projection in (attention.q_proj, attention.k_proj):
        projection.weight.mul_(0.1)
        projection.bias.zero_()
    for head in range(heads):
        start = head * attention.qk_head_dim
        rows_of_head = slice(start, start + places + 3)
        asked_here = torch.cat([asked, halves[head].expand(len(asked), -1)], dim=1)
        weight, bias = fit_linear(latents, size * asked_here)
        attention.q_proj.weight[rows_of_head], attention.q_proj.bias[rows_of_head] = weight, bias
        attention.k_proj.weight[rows_of_head], attention.k_proj.bias[rows_of_head] = key, key_bias
    # Values: the patch's components in every head; what is heard beside them is a random mixture of its own in each.
    features = perceiver.preprocessor.modalities["image"].stem.channels
    taken = perceiver.preprocessor.modalities["image"].channels
    attention.v_proj.bias.zero_()
    scale = tokens[:, patches:].flatten(0, 1).std(dim=0)[:features].mean() / 0.3
    for head in range(heads):
        rows_of_head = slice(head * attention.v_head_dim, (head + 1) * attention.v_head_dim)
        weight = attention.v_proj.weight[rows_of_head]
        weight[:, features:taken] = 0
        weight[:, :features] = torch.eye(attention.v_head_dim, features) / scale
        weight[:, -2:] = 0
    # What is heard as strong as what is seen.
    values = attention.v_proj(tokens)
    attention.v_proj.weight[:, taken:] *= values[:, patches:].std() / values[:, :patches].std()


def _hold_steady(padding: Tensor, size: float) -> None:
    padding.zero_()
    padding[-2:] = torch.tensor([size, -size])


def _label_elements(preprocessor: Any) -> Tensor:
    """Rows of the input array that a label can be: each class, and the mask token. (classes + 1, C)"""
    classes = torch.eye(preprocessor.modalities["label"].channels)
    told = torch.cat([classes, preprocessor.padding("label").expand(len(classes), -1)], dim=1)
    return torch.cat([told, preprocessor.mask_tokens("label")[None]])


def _fit_decoder(
    perceiver: Any, clips: dict[str, Tensor], blocks: tuple[int, ...], stretches: int, latent_places: Tensor
) -> None:
    layer, query_module = perceiver.decoder.cross_attend, perceiver.output_query
    attention, postprocessor = layer.cross_attn, perceiver.postprocessor
    width, places = perceiver.config.d_latents, latent_places.shape[1]
    code = query_module.modalities["image"].channels
    colours, samples = 3, postprocessor.modalities["audio"].projection.out_features
    content = slice(code, code + width)
    channels = query_module.channels
    encoding = perceiver.encode({name: clips[name] for name in ("image", "audio")})
    grid = query_module(encoding.input_array, {"image": None}).parts["image"].grid
    patches = encoding.input_array.sizes["audio"]
    block = tuple(n // b for n, b in zip(grid, blocks, strict=True))
    units = math.prod(block) * colours
    subpatches = patches // stretches
    heard = (layer.mlp.up_proj.out_features - units) // subpatches
    numbers = slice(code + width, code + width + patches)  # where a patch of sound has its number
    painted = numbers.stop
    if painted + colours + 2 > channels or heard < 1 or heard > code or attention.v_proj.out_features != width:
        raise ValueError(
            f"queries of {channels} channels and {layer.mlp.up_proj.out_features} hidden units are too few for blocks of "
            f"{block} pixels: {painted + colours + 2} and more than {units} are needed, and values as wide as the latents"
        )
    # A patch of sound asks by a number of its own, where the queries of pixels hold nothing.
    table = query_module.modalities["audio"].position.embeddings
    table.zero_()
    table[:, numbers] = PLACE_SIZE * torch.eye(patches)
    for name in ("audio", "image", "label"):
        _hold_steady(query_module.padding(name), STEADY_QUERY)
    # The label asks all of the sound.
    query_module.padding("label")[numbers.start - query_module.modalities["label"].channels :][:patches] = (
        PLACE_SIZE / patches
    )
    queries = query_module(encoding.input_array, {"audio": None, "image": None}).dense()[0]
    normed = layer.query_norm(queries)
    asked_by_sound = torch.zeros(patches, places)
    asked_by_sound[:, :stretches], asked_by_sound[:, -1] = place_vectors((patches,), (stretches,)), -2.0
    asked_by_pixels = torch.cat([place_vectors(grid, blocks), torch.full((math.prod(grid), 1), 2.0)], dim=1)
    repeats = math.prod(grid) // patches
    balanced = torch.cat([normed[:patches].repeat(repeats, 1), normed[patches:]])
    asked = torch.cat([asked_by_sound.repeat(repeats, 1), asked_by_pixels])
    size = SHARPNESS * math.sqrt(attention.qk_head_dim)
    query, query_bias = fit_linear(balanced, size * asked)
    latents = layer.context_norm(encoding.latents)  # (B, N, D)
    key, key_bias = fit_linear(latents.flatten(0, 1), latent_places.repeat(len(latents), 1), ridge=1e-3)
    for projection, weight, bias in ((attention.q_proj, query, query_bias), (attention.k_proj, key, key_bias)):
        projection.weight.mul_(0.1)
        projection.bias.zero_()
        for start in range(0, len(projection.weight), attention.qk_head_dim):
            projection.weight[start : start + places] = weight
            projection.bias[start : start + places] = bias
    attention.v_proj.weight.copy_(torch.eye(width))
    attention.v_proj.bias.zero_()
    attention.o_proj.weight.zero_()
    attention.o_proj.bias.zero_()
    # Small beside the positions, so that the norm before the MLP leaves both as they are.
    attention.o_proj.weight[content] = 0.2 * torch.eye(width)

    up, down = layer.mlp.up_proj, layer.mlp.down_proj
    up.weight.zero_()
    down.weight.zero_()
    down.bias.zero_()
    one = perceiver.encode({name: clips[name][:1] for name in ("image", "audio")})
    everywhere = inputs_of(up, lambda: perceiver.decode(one, {"image": None}))[0]  # (T * H * W, E)
    # Which place within its block a pixel is, along each axis: gates that are open at one place only.
    within = torch.cartesian_prod(*[torch.arange(n) for n in grid]) % torch.tensor(block)
    hot = torch.cat([nn.functional.one_hot(within[:, i], n) for i, n in enumerate(block)], dim=1).float()
    gates, gate_bias = fit_linear(everywhere, hot)
    inside = torch.cartesian_prod(*[torch.arange(n) for n in block])  # (places in a block, 3)
    starts = torch.tensor([0, block[0], block[0] + block[1]])
    chosen = inside + starts
    unit_gate = gates[chosen].sum(dim=1)  # (places in a block, E)
    unit_bias = gate_bias[chosen].sum(dim=1) - len(block)
    # The colours there, told by the latent: what every pixel of the block finds in its content.
    t, h, w = block
    pixels = clips["image"].movedim(2, -1)  # (B, T, H, W, 3)
    pixels = pixels.reshape(len(pixels), blocks[0], t, blocks[1], h, blocks[2], w, colours)
    targets = pixels.permute(0, 1, 3, 5, 2, 4, 6, 7).reshape(-1, units)
    middles = place_index(grid, blocks)
    decoded = inputs_of(up, lambda: perceiver.decode(encoding, {"audio": None, "image": middles}))  # (B, O, E)
    found = decoded[:, patches:, content].flatten(0, 1)
    shades, shade_bias = fit_linear(found, targets - 0.5, ridge=1e-5)
    up.weight[:units] = GATE * unit_gate.repeat_interleave(colours, dim=0)
    up.weight[:units, content] += SLOPE * shades
    up.bias[:units] = LIFT + GATE * unit_bias.repeat_interleave(colours) + SLOPE * shade_bias
    for colour in range(colours):
        down.weight[painted + colour, colour:units:colours] = 1 / SLOPE
    read_out = postprocessor.modalities["image"].projection
    read_out.weight.zero_()
    read_out.weight[:, painted : painted + colours] = torch.eye(colours)
    read_out.bias.fill_(0.5 - LIFT / SLOPE)
    read_out.bias -= queries[patches, painted : painted + colours]
    _fit_sound(perceiver, clips["audio"], decoded[:, :patches], units, heard, samples, subpatches)


def _fit_sound(
    perceiver: Any, audio: Tensor, decoded: Tensor, units: int, heard: int, samples: int, subpatches: int
) -> None:
    """Units that are open at one patch of a stretch, for the strongest components of sound."""
    mlp, code = perceiver.decoder.cross_attend.mlp, perceiver.output_query.modalities["image"].channels
    batch, patches = decoded.shape[:2]
    waves = audio.reshape(batch, patches, samples)
    components, mean, spread = principal_components(waves.flatten(0, 1), heard)
    scores = (waves - mean) @ components.T / spread[0]  # (B, patches, heard)
    content = slice(code, code + perceiver.config.d_latents)
    hot = nn.functional.one_hot(torch.arange(patches) % subpatches, subpatches).float()
    gates, gate_bias = fit_linear(decoded.flatten(0, 1), hot.repeat(batch, 1), ridge=1e-4)
    for k in range(subpatches):
        rows = slice(units + k * heard, units + (k + 1) * heard)
        weight, bias = fit_linear(
            decoded[:, k::subpatches, content].flatten(0, 1), scores[:, k::subpatches].flatten(0, 1), ridge=1e-3
        )
        mlp.up_proj.weight[rows] = GATE * gates[k]
        mlp.up_proj.weight[rows, content] += weight
        mlp.up_proj.bias[rows] = LIFT + GATE * (gate_bias[k] - 1) + bias
        mlp.down_proj.weight[:heard, rows] += torch.eye(heard)
    # Content is small in there, and classes are read from it as it is.
    classifier = perceiver.postprocessor.modalities["label"].classifier
    classifier.weight[:, -2:] = 0
    classifier.weight[:, content] *= 30
    read_out = perceiver.postprocessor.modalities["audio"].projection
    read_out.weight.zero_()
    read_out.weight[:, :heard] = (components * spread[0]).T
    read_out.bias.copy_(mean - LIFT * read_out.weight[:, :heard].sum(dim=1))


def place_index(grid: tuple[int, ...], blocks: tuple[int, ...]) -> Tensor:
    """Flat index of a pixel in the middle of each block, blocks in order"""
    axes = [torch.arange(b) * (n // b) + n // b // 2 for n, b in zip(grid, blocks, strict=True)]
    rows = torch.cartesian_prod(*axes)
    return (rows[:, 0] * grid[1] + rows[:, 1]) * grid[2] + rows[:, 2]
