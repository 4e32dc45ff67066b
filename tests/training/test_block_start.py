"""The start as a transform of blocks: who looks where, and what comes out before any training."""

import math

import pytest
import torch

from hf_perceiver.heads_multimodal import PerceiverIOForMultimodalAutoencoding
from hf_perceiver.training.block_start import (
    fit_linear,
    inputs_of,
    place_index,
    place_vectors,
    principal_components,
    start_from_blocks,
)
from hf_perceiver.training.clip_synthesis import make_clips
from hf_perceiver.training.video import COMPRESSIONS, mean_frame, psnr, reconstruct, video_config


def clips_of(count, **options):
    return {name: torch.from_numpy(values) for name, values in make_clips(count, **options).items()}


def started(compression, count):
    torch.manual_seed(0)
    config = video_config(compression)
    config._attn_implementation = "eager"
    model = PerceiverIOForMultimodalAutoencoding(config).eval()
    start_from_blocks(model, clips_of(count, seed=0), COMPRESSIONS[compression][0])
    return model


@pytest.fixture(scope="module")
def model():
    return started(88, 48)


@pytest.fixture(scope="module")
def attention(model):
    """Of the read, and of the questions: sound, every 37th pixel, the label. Heads first, means over two clips."""
    inputs = {name: value for name, value in clips_of(2, seed=1).items() if name != "label"}
    points = {"audio": None, "image": torch.arange(0, 16384, 37), "label": None}
    with torch.no_grad():
        weights = model(inputs=inputs, output_points=points, output_attentions=True).cross_attentions
    return [each.mean(0) for each in weights]


def test_each_latent_reads_its_block_or_its_stretch(attention):
    blocks, patches = (4, 4, 4), (8, 8, 8)
    read = attention[0]  # (8, 72, 32 + 512 + 1)
    within = place_vectors(blocks, blocks) @ place_vectors(patches, blocks).T == 3  # (64, 512)
    # By scores the next block gets e^-8 of one's own, and there are some thirty neighbours.
    assert ((read[:, :64, 32:544] * within).sum(-1) > 0.95).all()
    stretches = place_vectors((32,), (8,)).T
    assert ((read[:, 64:, :32] * stretches).sum(-1) > 0.95).all()


def test_the_heads_share_the_patches_of_a_block_among_them(attention):
    looked_at = attention[0][:, :64, 32:544].argmax(-1)  # (8, 64)
    assert all(len(set(looked_at[:, latent].tolist())) == 8 for latent in range(64))


def test_each_pixel_asks_its_block_and_each_patch_of_sound_its_stretch(attention):
    _, sound, pixels, label = attention
    within = place_vectors((16, 32, 32), (4, 4, 4))[::37] @ place_vectors((4, 4, 4), (4, 4, 4)).T == 3
    assert ((pixels[..., :64] * within).sum(-1) > 0.95).all()
    assert ((sound[..., 64:] * place_vectors((32,), (8,))).sum(-1) > 0.95).all()
    assert (label[..., 64:].sum(-1) > 0.95).all()  # the label asks all of the sound


def test_it_reconstructs_before_it_is_trained(model):
    clips = clips_of(3, seed=2)
    made = reconstruct(model, clips)
    # About 22.5 dB of video and 26 of sound where it is fitted to 48 clips; 24 and 28 with 384.
    assert psnr(made["image"], clips["image"]).mean() > psnr(mean_frame(clips["image"]), clips["image"]).mean() + 1.5
    silence = psnr(torch.zeros_like(clips["audio"]), clips["audio"], peak=2.0).mean()
    assert psnr(made["audio"], clips["audio"], peak=2.0).mean() > silence + 2
    # And the label starts undecided.
    assert torch.isfinite(made["label"]).all() and made["label"].abs().max() < 10


@pytest.mark.medium
@pytest.mark.parametrize("compression", [176, 352])
def test_every_compression_starts_with_a_picture(compression):
    clips = clips_of(2, seed=2)
    made = reconstruct(started(compression, 24), clips)
    grey = psnr(torch.full_like(clips["image"], 0.5), clips["image"]).mean()
    # 18.7 dB at 176 and 16.2 at 352, about the mean frame's, where grey is at 11.
    assert psnr(made["image"], clips["image"]).mean() > grey + 2


@pytest.mark.parametrize(
    ("changes", "blocks", "message"),
    [
        ({"num_latents": 70}, (4, 4, 4), "6 are left for 32 patches"),
        ({"num_cross_attention_heads": 4}, (4, 4, 4), "8 heads"),
        ({"decoder_widening_factor": 2}, (4, 4, 4), "hidden units are too few"),
        ({"decoder_v_channels": 64}, (4, 4, 4), "values as wide as the latents"),
    ],
)
def test_a_model_of_another_make_is_refused(changes, blocks, message):
    model = PerceiverIOForMultimodalAutoencoding(video_config(88, **changes))
    with pytest.raises(ValueError, match=message):
        start_from_blocks(model, clips_of(2, seed=0), blocks)


def test_places_are_one_hot_along_each_axis():
    places = place_vectors((4, 2), (2, 2))
    assert places.shape == (8, 4)
    assert places[0].tolist() == [1, 0, 1, 0] and places[-1].tolist() == [0, 1, 0, 1]
    assert (places.sum(1) == 2).all()


def test_the_middle_of_a_block_lies_in_it():
    grid, blocks = (16, 32, 32), (4, 4, 4)
    assert torch.equal(place_vectors(grid, blocks)[place_index(grid, blocks)], place_vectors(blocks, blocks))


def test_least_squares_finds_the_map_that_made_the_targets():
    generator = torch.Generator().manual_seed(0)
    rows, weight = torch.randn(200, 5, generator=generator), torch.randn(3, 5, generator=generator)
    found, bias = fit_linear(rows, rows @ weight.T + 2, ridge=1e-9)
    torch.testing.assert_close(found, weight, rtol=0, atol=1e-5)  # float64 within, float32 in and out
    torch.testing.assert_close(bias, torch.full((3,), 2.0), rtol=0, atol=1e-5)


def test_principal_components_are_orthonormal_and_sorted():
    rows = torch.randn(500, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, 7.0)
    components, mean, spread = principal_components(rows, 4)
    torch.testing.assert_close(components @ components.T, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(((rows - mean) @ components.T).std(dim=0, correction=0), spread)
    assert (spread.diff() < 0).all() and math.isclose(float(spread[0]), 6, rel_tol=0.1)


def test_what_a_module_is_given_in_pieces_is_put_together():
    linear, rows = torch.nn.Linear(2, 2), torch.randn(1, 5, 2)
    assert torch.equal(inputs_of(linear, lambda: (linear(rows[:, :3]), linear(rows[:, 3:]))), rows)
