"""Fresh flow models look at neighbourhoods, through patches of even size."""

import pytest
import torch

from hf_perceiver.heads_vision import PerceiverIOForOpticalFlow
from hf_perceiver.training.flow import LATENT_GRID, TILE, TOKENS, flow_config
from hf_perceiver.training.flow_start import ASKS, LATENTS, READS, level_patches, start_flow


def fresh_model(**changes) -> PerceiverIOForOpticalFlow:
    torch.manual_seed(0)
    model = PerceiverIOForOpticalFlow(flow_config(num_self_attends_per_block=2, **changes))
    model.set_attn_implementation("eager")
    return model.eval()


def some_pairs(count: int = 4) -> torch.Tensor:
    return torch.randn(count, 2, 3, *TILE, generator=torch.Generator().manual_seed(1))


def places(rows: int, columns: int) -> torch.Tensor:
    """(rows * columns, 2) places in tokens, y then x, of a grid of cells over the tokens"""
    axes = [(torch.arange(n) + 0.5) * tokens / n - 0.5 for n, tokens in zip((rows, columns), TOKENS, strict=True)]
    return torch.cartesian_prod(*axes)


@pytest.fixture(scope="module")
def looks() -> dict[str, torch.Tensor]:
    """Attention (H, N, M) of each layer, on two random pairs."""
    model = fresh_model()
    frames = some_pairs()
    start_flow(model, LATENT_GRID, frames)
    with torch.no_grad():
        outputs = model(pixel_values=frames, output_attentions=True)
    near, around, ask = outputs.cross_attentions
    return {
        "near": near.mean(0),
        "around": around.mean(0),
        "latents": outputs.attentions[0].mean(0),
        "ask": ask.mean(0),
    }


@pytest.mark.parametrize(
    ("kind", "offsets"), [("near", READS[0][0]), ("around", READS[1][0]), ("latents", LATENTS[0]), ("ask", ASKS[0])]
)
def test_each_head_looks_at_its_own_place(looks, kind, offsets):
    queries = places(*TOKENS) if kind == "ask" else places(*LATENT_GRID)
    keys = places(*TOKENS) if kind in ("near", "around") else places(*LATENT_GRID)
    weights = looks[kind]
    for head, offset in enumerate(offsets):
        wanted = queries + torch.tensor(offset)
        # Where the offset leads out of the frame there is nothing to look at.
        inside = ((wanted >= 1) & (wanted <= torch.tensor(TOKENS) - 2)).all(-1)
        looked = weights[head] @ keys
        error = (looked - wanted)[inside].norm(dim=-1).mean()
        # In tokens; latents stand two apart, and outputs between them ask several.
        assert error < 0.8, (kind, head, float(error))


def test_without_the_start_attention_is_spread_over_the_frame():
    model = fresh_model()
    frames = torch.randn(2, 2, 3, *TILE)
    with torch.no_grad():
        read = model(pixel_values=frames, output_attentions=True).cross_attentions[0]
    looked = read.mean(0) @ places(*TOKENS)
    assert looked.std(dim=1).max() < 1.5  # tokens: every latent sees the middle


def test_a_started_model_says_that_nothing_moves():
    model = fresh_model()
    start_flow(model, LATENT_GRID, some_pairs())
    with torch.no_grad():
        flow = model(pixel_values=torch.randn(1, 2, 3, *TILE)).logits
    assert flow.abs().max() * 20 < 0.01  # pixels


def test_patches_become_their_components_the_first_no_larger_than_the_next():
    model = fresh_model()
    stem = model.perceiver.preprocessor.stem
    generator = torch.Generator().manual_seed(0)
    # Frames that differ most in their mean colours, as frames do.
    frames = torch.randn(64, 2, 3, *TILE, generator=generator) + 5 * torch.randn(64, 1, 3, 1, 1, generator=generator)
    level_patches(stem, frames, kept=3)
    with torch.no_grad():
        features = stem(frames).flatten(0, -2)
    covariance = torch.cov(features.T)
    sizes = covariance.diagonal()
    assert sizes[:3].max() <= sizes[3] * 1.01
    # Principal components are uncorrelated; what is left is float32's.
    assert (covariance - torch.diag(sizes)).abs().max() < 1e-3 * sizes.max()
    assert features.mean(dim=0).abs().max() < 1e-3
    assert features.std().item() == pytest.approx(1, abs=0.05)


def test_models_that_cannot_start_locally_are_refused():
    with pytest.raises(ValueError, match=r"a grid of 5x5 .* does not fit 48 latents"):
        start_flow(fresh_model(), (5, 5), some_pairs())
    with pytest.raises(ValueError, match="1 reads are given, the model has 2"):
        start_flow(fresh_model(), LATENT_GRID, some_pairs(), reads=READS[:1])
    stem = flow_config().preprocessor["stem"]
    bare = fresh_model(preprocessor={"kind": "grid", "stem": stem}, decoder_use_query_residual=False)
    with pytest.raises(ValueError, match="needs a Fourier position of two axes"):
        start_flow(bare, LATENT_GRID, some_pairs())
