import math

import pytest
import torch
from helpers import CLASSES, TINY, config_of, fourier, grid, tiny
from safetensors.torch import load_file, save_file
from torch import nn

from hf_perceiver import PerceiverIOForMaskedLM, PerceiverIOForSequenceClassification, PerceiverIOModel
from hf_perceiver.attention import MLP, Attention
from hf_perceiver.weight_init import TRUNCATED_STD, spread_positions


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


def aligned(initializer="position_aligned", positions=128, **changes):
    position = {"kind": "fourier", "num_bands": 32, "max_resolution": [positions], "rule": "index"}
    fields = {
        "num_latents": 64,
        "d_latents": 128,
        "num_blocks": 1,
        "num_self_attends_per_block": 0,
        "num_cross_attention_heads": 4,
        "decoder_num_heads": 4,
        "qk_channels": 128,
        "v_channels": 128,
        "preprocessor": {"kind": "text", "channels": 63, "position": position, "combine": "concat"},
        "output_query": {"kind": "position", "position": position},
        "postprocessor": {"kind": "tokens", "tied": False},
        "initializer": initializer,
    }
    model = PerceiverIOModel(config_of(**{**fields, **changes})).eval()
    model.set_attn_implementation("eager")
    return model


def mean_distance(weights, queries, keys):
    """How far from its own place a query looks, in [-1, 1]; two random places are 2/3 apart."""
    return (weights * (queries[:, None] - keys[None]).abs()).sum(-1).mean().item()


def distances(model, positions=128):
    """Of the first read and of the decoder."""
    with torch.no_grad():
        attentions = model(input_ids=torch.randint(6, 30, (2, positions)), output_attentions=True).cross_attentions
    x = -1 + 2 * torch.arange(positions) / positions
    z = (torch.arange(64) + 0.5) / 64 * 2 - 1
    return mean_distance(attentions[0], z, x), mean_distance(attentions[-1], x, z)


def test_attention_is_local_at_the_start():
    usual = distances(aligned("deepmind"))
    assert min(usual) > 0.6  # near 2/3: anywhere
    read, ask = distances(aligned())
    # Measured 0.08 and 0.39; after self-attends the decoder's is nearer to the usual.
    assert read < 0.15
    assert ask < 0.5


def test_every_read_of_several_is_local():
    model = aligned(num_blocks=2, cross_attend_before_blocks=[0, 1], cross_attend_sharing="none")
    with torch.no_grad():
        reads = model(input_ids=torch.randint(6, 30, (2, 128)), output_attentions=True).cross_attentions[:2]
    x, z = -1 + 2 * torch.arange(128) / 128, (torch.arange(64) + 0.5) / 64 * 2 - 1
    assert mean_distance(reads[0], z, x) < 0.15
    assert mean_distance(reads[1], z, x) < 0.5


def test_images_are_read_locally_too():
    stem = {"kind": "pixels", "in_channels": 3}
    fields = {
        "num_latents": 16,
        "d_latents": 64,
        "num_cross_attention_heads": 1,
        "preprocessor": grid(stem, fourier(8, 8, bands=8)),
    }
    config = config_of(initializer="position_aligned", **fields, **CLASSES)
    model = PerceiverIOModel(config).eval()
    model.set_attn_implementation("eager")
    with torch.no_grad():
        weights = model(pixel_values=torch.randn(1, 3, 8, 8), output_attentions=True).cross_attentions[0][0, 0]
    side = torch.linspace(-1, 1, 8)
    pixels = torch.cartesian_prod(side, side)
    reached = weights @ pixels  # where each latent looks on average
    assert (reached - spread_positions(16, 2)).norm(dim=-1).mean() < 0.4


def test_an_aligned_model_is_loaded_as_it_was_saved(tmp_path):
    model = aligned()
    with torch.no_grad():
        model.encoder.latents.weight.add_(1.0)
    model.save_pretrained(tmp_path)
    loaded = PerceiverIOModel.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_aligned_models_can_be_made_on_the_meta_device():
    with torch.device("meta"):
        assert aligned().device.type == "meta"


@pytest.mark.parametrize("name", ["language", "multimodal", "imagenet_learned", "added_positions", "vector"])
def test_alignment_without_a_fourier_code_is_refused(name):
    with pytest.raises(
        ValueError, match=r"position_aligned' needs one modality whose position is of kind 'fourier'.*none"
    ):
        tiny(name).model(large=False, initializer="position_aligned")


def test_alignment_to_a_code_wider_than_the_latents_is_refused():
    with pytest.raises(ValueError, match=r"at most as wide as the latents \(64\); its width here: 65"):
        aligned(d_latents=64, qk_channels=64, v_channels=64)


@pytest.mark.parametrize(("count", "axes"), [(1, 1), (64, 1), (7, 1), (16, 2), (10, 2), (27, 3), (20, 3)])
def test_positions_are_spread_evenly(count, axes):
    spread = spread_positions(count, axes)
    assert spread.shape == (count, axes)
    assert spread.abs().max() < 1
    assert spread.mean(dim=0).abs().max() < 0.5 if count > 1 else True
    if count > 1:
        # No two on one place, none farther apart than a sparse grid would have it.
        gaps = torch.cdist(spread, spread).fill_diagonal_(9).amin(dim=1)
        assert gaps.min() > 0.4 * 2 / count ** (1 / axes)
