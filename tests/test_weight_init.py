import math

import pytest
import torch
from helpers import CLASSES, PIXELS, TINY, VOCAB, config_of, fourier, grid, tiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel

from hf_perceiver import PerceiverIOForMaskedLM, PerceiverIOForSequenceClassification, PerceiverIOModel
from hf_perceiver.attention import MLP, Attention
from hf_perceiver.position_encoding import FourierPositionEncoding
from hf_perceiver.weight_init import TRUNCATED_STD, around, neighbours, spread_latents


def wide(**changes):
    """Wide enough that statistics are sharp: 64 x 128 latents over text."""
    fields = {
        "num_latents": 64,
        "d_latents": 128,
        "num_blocks": 1,
        "num_self_attends_per_block": 1,
        "vocab_size": 400,
        "preprocessor": {
            "kind": "text",
            "channels": 96,
            "position": {"kind": "trainable", "num_positions": 256, "channels": 96},
        },
        "output_query": {"kind": "position", "position": {"kind": "trainable", "num_positions": 256, "channels": 96}},
        "postprocessor": {"kind": "tokens", "tied": False},
    }
    return config_of(**{**fields, **changes})


def assert_truncated_normal(tensor, std):
    """`std` before the cut at two of them."""
    assert tensor.abs().max() <= 2 * std * (1 + 1e-6)
    assert tensor.abs().max() > 1.9 * std
    # The standard error of a standard deviation of n numbers is about std / sqrt(2 n).
    error = 4 / math.sqrt(2 * tensor.numel())
    assert tensor.std().item() == pytest.approx(std * TRUNCATED_STD, rel=error)
    assert abs(tensor.mean().item()) < 4 * std / math.sqrt(tensor.numel())


@pytest.fixture
def dirty_memory():
    """Leaves freed memory full of huge numbers, so that an uninitialised tensor is seen."""
    for size in (4, 16, 64, 256, 1024, 4096):
        junk = [torch.full((size,), 1e30) for _ in range(200)]
        del junk


@pytest.mark.parametrize("initializer", ["deepmind", "normal"])
@pytest.mark.parametrize("name", TINY)
def test_every_parameter_is_drawn(name, initializer, dirty_memory):
    """A parameter that nothing draws holds whatever was in memory."""
    case = tiny(name)
    first = case.model(large=False, initializer=initializer)
    for parameter, value in first.named_parameters():
        assert torch.isfinite(value).all() and value.abs().max() < 10, parameter
    again = case.model(large=False, initializer=initializer)
    for (parameter, value), other in zip(first.named_parameters(), again.parameters(), strict=True):
        assert torch.equal(value, other), f"{parameter} does not follow the seed"


def test_deepminds_projections_are_variance_scaled():
    """Haiku's VarianceScaling(1.0): a normal cut at two standard deviations, divided by what the cut takes."""
    model = PerceiverIOModel(wide())
    found = 0
    for module in model.modules():
        if isinstance(module, (Attention, MLP)):
            for linear in module.children():
                if isinstance(linear, nn.Linear):
                    assert_truncated_normal(linear.weight, linear.in_features**-0.5 / TRUNCATED_STD)
                    assert (linear.bias == 0).all()
                    found += 1
    assert found == 3 * 6


def test_deepminds_other_tensors():
    model = PerceiverIOModel(wide(latents_init_scale=0.05))
    assert_truncated_normal(model.encoder.latents.weight, 0.05)
    assert_truncated_normal(model.preprocessor.embedding.weight, 1.0)
    assert_truncated_normal(model.preprocessor.position.embeddings, 0.02)
    assert_truncated_normal(model.output_query.position.embeddings, 0.02)
    # Haiku's default for a linear outside attention: no division by what the cut takes.
    assert_truncated_normal(model.postprocessor.output_embedding.weight, 96**-0.5)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert norms and all((m.weight == 1).all() and (m.bias == 0).all() for m in norms)


def test_convolutions_count_their_whole_window():
    stem = {"kind": "conv", "in_channels": 3, "channels": 96}
    model = PerceiverIOModel(config_of(preprocessor=grid(stem, fourier(8, 8)), **CLASSES))
    assert_truncated_normal(model.preprocessor.stem.convs[0].weight, (3 * 49) ** -0.5)
    norm = model.preprocessor.stem.norms[0]
    assert (norm.weight == 1).all() and (norm.running_mean == 0).all() and (norm.running_var == 1).all()


@pytest.mark.parametrize("name", ["flow", "original_shared"])
def test_flow_and_average_heads_start_at_zero(name):
    model = tiny(name).model(large=False)
    head = model.postprocessor.projection if name == "flow" else model.postprocessor.classifier
    assert (head.weight == 0).all() and (head.bias == 0).all()
    assert (model(**tiny(name).inputs()).logits == 0).all()


def test_paddings_and_mask_tokens_are_small():
    model = tiny("multimodal").model(large=False)
    drawn = [
        *model.preprocessor.padding.parameters(),
        *model.preprocessor.mask_tokens.parameters(),
        *model.output_query.padding.parameters(),
    ]
    assert all(0 < p.abs().max() <= 0.04 for p in drawn)


def test_normal_draws_everything_as_transformers_does():
    model = PerceiverIOModel(wide(initializer="normal", initializer_range=0.1))
    drawn = [p for n, p in model.named_parameters() if p.ndim > 1]
    assert len(drawn) == 3 * 6 + 5
    for parameter in drawn:
        assert parameter.std().item() == pytest.approx(0.1, rel=0.05)
        assert parameter.abs().max() > 0.25
    flow = tiny("flow").model(large=False, initializer="normal")
    assert flow.postprocessor.projection.weight.std() > 0


# --- a checkpoint that lacks a tensor


def without(model, folder, *names):
    """Save `model` less these tensors."""
    model.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    for name in names:
        state.pop(name)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


MISSING = {
    "encoder.latents.weight": 0.02,
    "preprocessor.embedding.weight": 1.0,
    "preprocessor.position.embeddings": 0.02,
    "encoder.blocks.0.0.self_attn.q_proj.weight": 128**-0.5 / TRUNCATED_STD,
    "encoder.cross_attends.0.mlp.up_proj.weight": 128**-0.5 / TRUNCATED_STD,
    "decoder.cross_attend.cross_attn.k_proj.weight": 128**-0.5 / TRUNCATED_STD,
    "output_query.position.embeddings": 0.02,
    "postprocessor.output_embedding.weight": 96**-0.5,
}


@pytest.mark.parametrize("name", MISSING)
def test_a_missing_weight_is_drawn_as_in_training_and_the_others_are_kept(name, tmp_path, caplog):
    source = PerceiverIOModel(wide())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.fill_(7.0)
    without(source, tmp_path, name)
    loaded, info = PerceiverIOModel.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {name}
    for parameter, value in loaded.named_parameters():
        if parameter == name:
            assert_truncated_normal(value, MISSING[name])
        else:
            assert (value == 7).all(), parameter


def test_missing_modality_tokens_are_drawn_and_zero_heads_are_zero(tmp_path, dirty_memory):
    source = tiny("multimodal").model()
    without(source, tmp_path, "preprocessor.mask_tokens.label", "output_query.padding.image")
    loaded = PerceiverIOModel.from_pretrained(tmp_path)
    for drawn in (loaded.preprocessor.mask_tokens("label"), loaded.output_query.padding("image")):
        assert 0 < drawn.abs().max() <= 0.04
    assert torch.equal(loaded.preprocessor.mask_tokens("audio"), source.preprocessor.mask_tokens("audio"))
    flow = tiny("flow").model()
    without(flow, tmp_path, "postprocessor.projection.weight")
    loaded = PerceiverIOModel.from_pretrained(tmp_path)
    assert (loaded.postprocessor.projection.weight == 0).all()
    assert torch.equal(loaded.postprocessor.projection.bias, flow.postprocessor.projection.bias)


def test_a_new_head_is_drawn_as_in_training(tmp_path):
    PerceiverIOForMaskedLM(wide(postprocessor={"kind": "tokens"})).save_pretrained(tmp_path)
    model = PerceiverIOForSequenceClassification.from_pretrained(tmp_path, num_labels=200)
    assert_truncated_normal(model.perceiver.postprocessor.classifier.weight, 96**-0.5)
    queries = model.perceiver.output_query.task_queries
    assert queries.shape == (1, 96) and 0 < queries.abs().max() <= 0.04


# --- aligned to positions


def aligned(**changes):
    """Text of 128 bytes, 64 latents of 128 channels, 2 self-attends, 8 heads."""
    position = fourier(128, bands=16, rule="index")
    fields = {
        "num_latents": 64,
        "d_latents": 128,
        "num_blocks": 1,
        "num_self_attention_heads": 8,
        "num_cross_attention_heads": 8,
        "decoder_num_heads": 8,
        "qk_channels": 128,
        "v_channels": 128,
        "preprocessor": {"kind": "text", "channels": 63, "position": position, "combine": "concat"},
        "output_query": {"kind": "position", "position": position},
        "postprocessor": {"kind": "tokens", "tied": False},
        "initializer": "position_aligned",
    }
    return config_of(**{**fields, **changes})


def on_grid(stem, position, heads, **changes):
    sides = {"preprocessor": grid(stem, position), "output_query": {"kind": "input"}}
    fields = {"num_self_attention_heads": 8, "num_cross_attention_heads": heads, "decoder_num_heads": heads}
    post = {"kind": "projection", "num_outputs": 2}
    return aligned(**fields, **sides, postprocessor=post, **changes)


FRAMES = {"kind": "patches", "in_channels": 3, "temporal_downsample": 2, "project": 40}
VIDEO = {"kind": "pixels", "in_channels": 3}
# Over 12 draws of so many inputs a share of attention differs by 0.06, of two by 0.16.
EXAMPLES = 16
# name -> config, an input, its elements along each axis, and the cells that the latents cut them into
ALIGNED = {
    "text": (aligned(), {"input_ids": torch.randint(6, VOCAB, (EXAMPLES, 128))}, (128,), (64,)),
    "text, one head": (
        aligned(num_cross_attention_heads=1, decoder_num_heads=1, num_latents=32),
        {"input_ids": torch.randint(6, VOCAB, (EXAMPLES, 128))},
        (128,),
        (32,),
    ),
    "image": (
        on_grid(PIXELS, fourier(12, 16, bands=8), 4, num_latents=48),
        {"pixel_values": torch.randn(EXAMPLES, 3, 12, 16)},
        (12, 16),
        (6, 8),
    ),
    "flow": (
        on_grid(FRAMES, fourier(8, 12, bands=6), 8, num_latents=24),
        {"pixel_values": torch.randn(EXAMPLES, 2, 3, 8, 12)},
        (8, 12),
        (4, 6),
    ),
    "video": (
        on_grid(VIDEO, fourier(8, 6, 8, bands=5), 8, num_latents=48),
        {"pixel_values": torch.randn(EXAMPLES, 8, 3, 6, 8)},
        (8, 6, 8),
        (4, 3, 4),
    ),
}


def cells_of(sides, cuts):
    """Middles of the cells that each axis is cut into, in elements."""
    return torch.cartesian_prod(
        *[(torch.arange(cut) + 0.5) * side / cut - 0.5 for side, cut in zip(sides, cuts, strict=True)]
    ).view(-1, len(sides))


def share_near(weights, queries, keys, offsets, reach):
    """(heads, N, M), places in elements -> (heads,) mean attention within `reach` of query + offset, there is a key."""
    shares = []
    for head, offset in zip(weights, offsets, strict=False):
        away = (keys[None] - (queries + offset)[:, None]).abs()
        near = (away <= reach + 1e-4).all(-1)
        inside = near.any(-1)
        assert inside.any()
        shares.append((head * near).sum(-1)[inside].mean())
    return torch.stack(shares)


def attentions(config, inputs, seed=0):
    torch.manual_seed(seed)
    model = PerceiverIOModel(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        outputs = model(**inputs, output_attentions=True)
    return [w.mean(0) for w in (outputs.cross_attentions[0], outputs.attentions[-1], outputs.cross_attentions[-1])]


@pytest.mark.parametrize("name", ALIGNED)
def test_every_head_begins_with_a_place_of_its_own(name):
    """Reads, the last self-attend and the decoder; a head that knew no places would have 0.01 to 0.2 there."""
    config, inputs, sides, cuts = ALIGNED[name]
    read, think, ask = attentions(config, inputs)
    elements, latents = cells_of(sides, sides), cells_of(sides, cuts)
    cell = torch.tensor(sides) / torch.tensor(cuts)
    step = (cell / 2).clamp(min=1)
    corners = around(config.num_cross_attention_heads, len(sides))
    widths = torch.where(corners == 0, cell, step)
    # Half the distance to the next head's place; where there is none, the latent's own cell.
    reads = share_near(read, latents, elements, corners * step, widths.amax(0) / 2)
    steps = neighbours(config.num_self_attention_heads, torch.tensor(cuts))
    thinks = share_near(think, latents, latents, steps * cell, cell / 2)
    asks = share_near(ask, elements, latents, around(config.decoder_num_heads, len(sides)) * cell, cell)
    assert reads.min() > 0.4
    assert len(steps) >= 6 and thinks.min() > 0.4
    assert asks.min() > 0.4


def test_heads_beyond_the_neighbours_stay_free():
    config, inputs, sides, cuts = ALIGNED["text"]
    _, think, _ = attentions(config, inputs)
    assert len(neighbours(8, torch.tensor(cuts))) == 6
    largest = think.amax(-1).mean(-1)
    assert largest[:6].min() > 0.4 and largest[6:].max() < 0.3


def test_every_read_of_several_is_local():
    config, inputs, sides, cuts = ALIGNED["text"]
    several = aligned(num_blocks=2, cross_attend_before_blocks=[0, 1], cross_attend_sharing="none")
    torch.manual_seed(0)
    model = PerceiverIOModel(several).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        reads = model(**inputs, output_attentions=True).cross_attentions[:2]
    for read in reads:
        near = share_near(read.mean(0), cells_of(sides, cuts), cells_of(sides, sides), around(8, 1), 0.5)
        assert near.min() > 0.5


def test_codes_are_as_large_as_half_of_a_latent_and_layers_add_little():
    model = PerceiverIOModel(aligned()).eval()
    with torch.no_grad():
        states = model(input_ids=torch.randint(6, VOCAB, (2, 128)), output_hidden_states=True).hidden_states
    assert model.encoder.latents.weight.square().mean().item() == pytest.approx(0.5, rel=0.05)
    # Three layers add 0.5 in all, whatever their number: see ADDED_POWER.
    assert 0.7 < states[-1].square().mean().item() < 1.3


def test_class_queries_and_their_decoder_are_deepminds():
    config = aligned(preprocessor=grid(PIXELS, fourier(8, 8, bands=8)), **CLASSES)
    model = PerceiverIOModel(config)
    assert_truncated_normal(model.decoder.cross_attend.cross_attn.q_proj.weight, 16**-0.5 / TRUNCATED_STD)
    assert model.output_query.task_queries.abs().max() <= 0.04


def test_an_aligned_model_is_loaded_as_it_was_saved(tmp_path):
    model = PerceiverIOModel(aligned())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PerceiverIOModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


@pytest.mark.parametrize(
    "name",
    [
        "encoder.latents.weight",
        "encoder.cross_attends.0.cross_attn.k_proj.weight",
        "encoder.blocks.0.1.self_attn.q_proj.weight",
        "encoder.blocks.0.0.mlp.down_proj.weight",
        "decoder.cross_attend.cross_attn.q_proj.weight",
    ],
)
def test_alignment_leaves_alone_what_a_checkpoint_has(name, tmp_path):
    source = PerceiverIOModel(aligned())
    with torch.no_grad():
        for parameter in source.parameters():
            parameter.fill_(7.0)
    without(source, tmp_path, name)
    for parameter, value in PerceiverIOModel.from_pretrained(tmp_path).named_parameters():
        assert (value == 7).all() == (parameter != name), parameter


def test_a_new_head_goes_on_an_aligned_checkpoint(tmp_path):
    source = PerceiverIOForMaskedLM(aligned(tie_word_embeddings=False))
    source.save_pretrained(tmp_path)
    model = PerceiverIOForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert torch.equal(model.perceiver.encoder.latents.weight, source.perceiver.encoder.latents.weight)
    q = "encoder.cross_attends.0.cross_attn.q_proj.weight"
    assert torch.equal(model.perceiver.get_parameter(q), source.perceiver.get_parameter(q))


def test_aligned_models_can_be_made_in_half_precision_and_on_the_meta_device():
    half = AutoModel.from_config(aligned(), dtype=torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 and torch.isfinite(p).all() for p in half.parameters())
    with torch.device("meta"):
        assert PerceiverIOModel(aligned()).device.type == "meta"


def test_aligned_models_follow_the_seed():
    models = []
    for _ in range(2):
        torch.manual_seed(5)
        models.append(PerceiverIOModel(aligned()))
    assert all(torch.equal(a, b) for a, b in zip(*(m.parameters() for m in models), strict=True))


@pytest.mark.parametrize("name", ["language", "multimodal", "imagenet_learned", "added_positions", "vector"])
def test_alignment_without_a_fourier_code_is_refused(name):
    with pytest.raises(
        ValueError, match=r"position_aligned' needs one modality whose position is of kind 'fourier'.*none"
    ):
        tiny(name).model(large=False, initializer="position_aligned")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"d_latents": 32, "qk_channels": 32, "v_channels": 32}, r"at most as wide as the latents \(32\).* here: 33"),
        ({"sine_only": True}, "with cosines and with max_resolution; here sine_only=True"),
        ({"max_resolution": None, "num_axes": 1, "rule": "dense"}, "max_resolution=None. Set them"),
        ({"use_query_residual": False}, "needs use_query_residual=True"),
    ],
)
def test_what_cannot_be_aligned_is_refused(changes, message):
    config = aligned()
    for name, value in changes.items():
        if hasattr(config, name):
            setattr(config, name, value)
        else:
            config.preprocessor["position"][name] = config.output_query["position"][name] = value
    with pytest.raises(ValueError, match=message):
        PerceiverIOModel(config)


@pytest.mark.parametrize(
    ("count", "sides", "cuts"),
    [
        (64, (128,), (64,)),
        (7, (10,), (7,)),
        (1, (8, 8), (1, 1)),
        (48, (12, 16), (6, 8)),
        (32, (8, 8), (4, 8)),
        (2048, (368, 496), (32, 64)),
        (784, (16, 56, 56), (4, 14, 14)),
        (20, (1, 4, 5), (1, 4, 5)),
        (10, (8, 8), None),
        (20, (8, 8, 8), None),
    ],
)
def test_latents_are_spread_evenly(count, sides, cuts):
    code = FourierPositionEncoding(num_bands=4, max_resolution=sides)
    places, cells = spread_latents(count, code)
    assert places.shape == (count, len(sides)) and places.abs().max() <= 1
    elements = (places + 1) * (torch.tensor(sides) - 1) / 2
    if cuts is not None:
        assert cells.tolist() == list(cuts)
        torch.testing.assert_close(elements, cells_of(sides, cuts), rtol=0, atol=1e-4)
        return
    # A Kronecker sequence: no two on one place, none farther from the next than a sparse grid would have it.
    assert cells.prod().item() == pytest.approx(count, rel=1e-4)
    gaps = torch.cdist(elements, elements).fill_diagonal_(99).amin(dim=1)
    assert gaps.min() > 0.4 * sides[0] / count ** (1 / len(sides))


def test_places_around_one():
    assert sorted(around(6, 1)[:, 0].tolist()) == [-2.5, -1.5, -0.5, 0.5, 1.5, 2.5]
    assert around(1, 2).tolist() == [[0, 0]]
    assert sorted(around(3, 2).tolist()) == [[0, -0.5], [0, 0], [0, 0.5]]
    assert {tuple(row.abs().tolist()) for row in around(8, 2)} == {(0.5, 0.5), (1.5, 1.5)}
    assert len(around(8, 3).unique(dim=0)) == 8 and (around(8, 3).abs() == 0.5).all()


def test_neighbours_are_whole_rings_along_axes_that_are_cut():
    assert neighbours(8, torch.tensor([64]))[:, 0].tolist() == [-1, 1, -2, 2, -4, 4]
    assert len(neighbours(1, torch.tensor([64]))) == 0
    ring = neighbours(8, torch.tensor([6, 8]))
    assert len(ring.unique(dim=0)) == 8 and (ring.abs().amax(1) == 1).all()
    assert len(neighbours(8, torch.tensor([2, 3, 4]))) == 6  # the faces of a cube; its corners are eight more
    assert (neighbours(8, torch.tensor([1, 6, 8]))[:, 0] == 0).all()
    assert len(neighbours(8, torch.tensor([1, 1]))) == 0
