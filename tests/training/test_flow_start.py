"""Fresh flow models fetch, match, match again and answer; windows become their components."""

import pytest
import torch
import torch.nn.functional as F

from hf_perceiver.heads_vision import PerceiverIOForOpticalFlow
from hf_perceiver.training.flow import flow_config
from hf_perceiver.training.flow_start import AROUND, CELL, CORNERS, start_matching, start_windows

# Half the bundled model's tile: 12 x 16 tokens of 2 x 2 pixels, 6 x 8 latents.
HEIGHT, WIDTH, GRID = 24, 32, (6, 8)


def fresh_model(**changes) -> PerceiverIOForOpticalFlow:
    torch.manual_seed(0)
    model = PerceiverIOForOpticalFlow(flow_config(**{"num_latents": GRID[0] * GRID[1], **changes}))
    model.set_attn_implementation("eager")
    return model.eval()


def moved(shifts: list[tuple[int, int]], seed: int = 0) -> torch.Tensor:
    """Blurred noise, and the same moved by (x, y) pixels: (n, 2, 3, HEIGHT, WIDTH)"""
    generator = torch.Generator().manual_seed(seed)
    canvas = torch.randn(len(shifts), 3, HEIGHT + 16, WIDTH + 16, generator=generator)
    canvas = F.avg_pool2d(canvas, 3, stride=1, padding=1)
    canvas = canvas / canvas.std()

    def cut(picture, x, y):
        return picture[:, 8 - y : 8 - y + HEIGHT, 8 - x : 8 - x + WIDTH]

    pairs = [[cut(picture, 0, 0), cut(picture, *shift)] for picture, shift in zip(canvas, shifts, strict=True)]
    return torch.stack([torch.stack(pair) for pair in pairs])


def some_pairs() -> torch.Tensor:
    return moved([(0, 0), (2, 1), (-3, 2), (1, -4), (4, 4), (-2, -1)], seed=1)


def places(rows: int, columns: int, step: int) -> torch.Tensor:
    """(n, 2) y and x in tokens, from the middle"""
    axes = [(torch.arange(n) - (n - 1) / 2) * step for n in (rows, columns)]
    return torch.cartesian_prod(*axes)


TOKENS, LATENTS = places(12, 16, 1), places(*GRID, 2)


@pytest.fixture(scope="module")
def started() -> PerceiverIOForOpticalFlow:
    model = fresh_model()
    start_matching(model, GRID, some_pairs())
    return model


@pytest.fixture(scope="module")
def looks(started) -> dict[str, torch.Tensor]:
    """Attention (B, H, N, M) of each kind, on pairs that moved by (4, -2) pixels."""
    with torch.no_grad():
        outputs = started(pixel_values=moved([(4, -2)] * 4), output_attentions=True)
    fetch, match, again, ask = outputs.cross_attentions
    return {"fetch": fetch, "match": match, "again": again, "around": outputs.attentions[0], "ask": ask}


# Tolerances in tokens. Fetching takes one token; outputs stand half a token from the nearest latent, in y and in x.
@pytest.mark.parametrize(
    ("kind", "offsets", "tolerance"), [("fetch", CELL, 0.05), ("around", AROUND, 0.4), ("ask", CORNERS, 0.8)]
)
def test_each_head_looks_at_its_own_place(looks, kind, offsets, tolerance):
    queries = TOKENS if kind == "ask" else LATENTS
    keys = TOKENS if kind == "fetch" else LATENTS
    for head, offset in enumerate(offsets):
        wanted = queries + torch.tensor(offset)
        # Where the offset leads to the frame's edge, part of the look falls outside.
        inside = (wanted.abs() <= LATENTS.abs().max(dim=0).values - 1).all(-1) if kind != "fetch" else ...
        looked = looks[kind].mean(dim=0)[head] @ keys
        error = (looked - wanted)[inside].norm(dim=-1).mean()
        assert error < tolerance, (kind, head, float(error))


@pytest.mark.parametrize("kind", ["match", "again"])
def test_heads_that_match_look_where_it_went(looks, kind):
    for head, offset in enumerate(CELL):
        wanted = LATENTS + torch.tensor(offset) + torch.tensor([-1.0, 2.0])  # (4, -2) pixels, in tokens y and x
        inside = (wanted.abs() <= TOKENS.abs().max(dim=0).values - 1).all(-1)
        looked = looks[kind].mean(dim=0)[head] @ TOKENS
        # 2 tokens from the expected place the first time: the preference for near places draws matches back a little.
        error = (looked - wanted)[inside].norm(dim=-1).mean()
        assert error < {"match": 0.6, "again": 0.4}[kind], (kind, head, float(error))


@pytest.mark.parametrize("shift", [(0, 0), (3, 0), (0, -3), (-4, 2), (5, 4)])
def test_a_started_model_finds_how_far_a_textured_frame_moved(started, shift):
    with torch.no_grad():
        flow = started(pixel_values=moved([shift] * 4, seed=2)).logits * 20
    inside = flow[:, 8:-8, 8:-8]
    found = inside.mean(dim=(0, 1, 2))
    # Pixels: a token is two, and longer ways are drawn back by a tenth or two.
    assert (found - torch.tensor(shift)).norm() < 0.3 + 0.15 * torch.tensor(shift).float().norm(), found


def test_fresh_models_find_nothing_before_the_start():
    with torch.no_grad():
        flow = fresh_model()(pixel_values=moved([(4, 2)] * 2)).logits * 20
    assert flow.abs().max() < 1e-3


def test_windows_become_components_of_mean_0_and_size_1():
    model = fresh_model()
    stem = model.perceiver.preprocessor.stem
    # Frames that differ most in their mean colours, as frames do.
    frames = some_pairs() + 3 * torch.randn(6, 1, 3, 1, 1, generator=torch.Generator().manual_seed(0))
    start_windows(stem, frames)
    norm, stem.norm = stem.norm, torch.nn.Identity()
    with torch.no_grad():
        features = stem(frames).unflatten(-1, (2, -1)).flatten(0, -2)
    stem.norm = norm
    covariance = torch.cov(features.T)
    sizes = covariance.diagonal()
    # Uncorrelated up to float32, the largest ones evened out.
    assert (covariance - torch.diag(sizes)).abs().max() < 1e-3 * sizes.max()
    assert (sizes.diff() <= 1e-4).all() and sizes[0] / sizes[8] < 2.01
    assert features.mean(dim=0).abs().max() < 1e-3
    assert features.std().item() == pytest.approx(1, abs=0.05)


STEM = flow_config().preprocessor["stem"]


@pytest.mark.parametrize(
    ("changes", "grid", "message"),
    [
        ({}, (5, 5), r"a grid of 5x5 latents with 180 channels to fill does not fit 48 latents of 256"),
        ({"num_latents": 12}, (3, 4), r"3x4 latents are for 2x2 tokens each, and the input has \(12, 16\)"),
        ({"d_latents": 160}, GRID, "180 channels to fill does not fit 48 latents of 160"),
        ({"cross_attend_before_blocks": [0, 0]}, GRID, "three reads around two blocks .* has 2 and 2"),
        ({"num_cross_attention_heads": 8}, GRID, "a read that matches has 4 heads with 35 channels .* not 8 with 32"),
        ({"num_self_attention_heads": 4}, GRID, "a self-attend that matches has 8 heads with 32 .* not 4 with 64"),
        ({"decoder_num_heads": 8}, GRID, "a decoder that matches has 4 heads with 32 .* not 8 with 16"),
        (
            {"preprocessor": {"kind": "grid", "stem": STEM, "position": None}},
            GRID,
            "needs a Fourier position of two axes with max_resolution, not None",
        ),
        (
            {
                "preprocessor": {
                    **flow_config().preprocessor,
                    "stem": {**STEM, "kernel_size": None, "normalize": False, "project": 64},
                }
            },
            GRID,
            "matching compares windows; give the stem kernel_size and normalize=True",
        ),
    ],
)
def test_models_of_another_shape_are_refused(changes, grid, message):
    with pytest.raises(ValueError, match=message):
        start_matching(fresh_model(**changes), grid, some_pairs())
