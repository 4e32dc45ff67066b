import numpy as np
import pytest
import torch

from hf_perceiver.configuration_perceiver_io import PerceiverIOConfig
from hf_perceiver.heads_text import PerceiverIOForMaskedLM
from hf_perceiver.training.local_start import (
    ASK_OFFSETS,
    LATENT_OFFSETS,
    READ_OFFSETS,
    attention_by_distance,
    start_local,
)
from hf_perceiver.training.train_language import language_config

COUNTS = np.arange(256)


def fresh_model(**changes) -> PerceiverIOForMaskedLM:
    torch.manual_seed(0)
    model = PerceiverIOForMaskedLM(language_config(num_self_attends_per_block=2, **changes))
    model.set_attn_implementation("eager")
    return model.eval()


def looks(model: PerceiverIOForMaskedLM) -> dict[str, torch.Tensor]:
    """Mean attention of each layer by kind, (H, N, M), on random text."""
    ids = torch.randint(6, 262, (4, 128), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = model(input_ids=ids, output_attentions=True)
    read, ask = outputs.cross_attentions
    return {"read": read.mean(0), "think": outputs.attentions[0].mean(0), "ask": ask.mean(0)}


@pytest.mark.parametrize(
    ("kind", "offsets", "half_width"),
    [("read", READ_OFFSETS, 1.0), ("think", LATENT_OFFSETS, 1.0), ("ask", ASK_OFFSETS, 2.0)],
)
def test_each_head_looks_at_its_own_neighbour(kind, offsets, half_width):
    model = fresh_model()
    start_local(model, COUNTS)
    latents, inputs = 2.0 * torch.arange(64) + 1.0, torch.arange(128.0)
    query_places = {"read": latents, "think": latents, "ask": inputs}[kind]
    key_places = {"read": inputs, "think": latents, "ask": latents}[kind]
    weights = looks(model)[kind]
    inner = (query_places > 16) & (query_places < 112)  # nothing to look at beyond the ends
    for head, offset in enumerate(offsets):
        away = key_places[None, :] - query_places[inner][:, None] - offset
        near = (weights[head, inner] * (away.abs() <= half_width)).sum(-1).mean().item()
        # A uniform head would give 0.02, 0.02 and 0.04. Measured: 0.36 to 0.43, 0.91 to 0.92, 0.20 to 0.25.
        assert near > {"read": 0.3, "think": 0.8, "ask": 0.15}[kind], (head, near)


def test_the_position_aligned_initialiser_alone_gives_all_heads_one_place():
    model = fresh_model()
    places = attention_by_distance(looks(model)["read"], 2.0 * torch.arange(64) + 1.0, torch.arange(128.0))
    assert places.std().item() < 1.0  # offsets from -4 to 3 have 2.4


def test_the_first_guess_is_the_bytes_frequency():
    model = fresh_model()
    counts = np.zeros(256)
    counts[[32, 101]] = 900, 100
    start_local(model, counts)
    with torch.no_grad():
        logits = model(input_ids=torch.randint(6, 262, (2, 128))).logits
    assert (logits.argmax(-1) == 32 + 6).float().mean() > 0.95
    # The bias alone gives 0.72: 901 of 1,262 with one for each token.
    assert logits.softmax(-1)[..., 32 + 6].mean().item() == pytest.approx(0.72, abs=0.1)


def test_what_has_no_fourier_code_is_an_error():
    table = {"kind": "trainable", "num_positions": 32, "channels": 16}
    config = PerceiverIOConfig(
        num_latents=4,
        d_latents=32,
        qk_channels=32,
        v_channels=32,
        num_self_attends_per_block=1,
        decoder_qk_channels=32,
        decoder_v_channels=32,
        preprocessor={"kind": "text", "channels": 16, "position": table},
        output_query={"kind": "position", "position": table},
    )
    with pytest.raises(ValueError, match="needs a Fourier position of one axis"):
        start_local(PerceiverIOForMaskedLM(config), COUNTS)
