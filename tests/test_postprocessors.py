import pytest
import torch
from helpers import VOCAB, config_of, trainable
from torch import nn

from hf_perceiver.arrays import ArrayPart, QueryArray
from hf_perceiver.postprocessors import Postprocessor
from hf_perceiver.registry import POSTPROCESSORS, PREPROCESSORS


def built(spec, in_channels=6, preprocessor=None, **changes):
    config = config_of(**changes)
    reads = None if preprocessor is None else PREPROCESSORS.build(preprocessor, config=config)
    module = POSTPROCESSORS.build(spec, config=config, in_channels=in_channels, preprocessor=reads)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def query(length, grid=None, name=""):
    return QueryArray({name: ArrayPart(features=torch.zeros(1, length, 1), grid=grid)})


def answer(module, decoded, grid=None):
    """Read out in two chunks, then arranged, as the model does."""
    half = decoded.shape[1] // 2
    points = torch.cat([module.read_out(decoded[:, :half]), module.read_out(decoded[:, half:])], dim=1)
    return module.arrange({"": points}, query(decoded.shape[1], grid))


def test_tokens_are_scores_of_the_vocabulary():
    text = {"kind": "text", "channels": 6, "position": trainable(8, 6)}
    module = built({"kind": "tokens"}, preprocessor=text)
    decoded = torch.randn(2, 5, 6)
    want = decoded @ module.output_embedding.weight.T + module.output_embedding.bias
    torch.testing.assert_close(answer(module, decoded), want)
    assert want.shape == (2, 5, VOCAB)


def test_tied_tokens_need_the_embeddings_width():
    text = {"kind": "text", "channels": 8, "position": trainable(8, 8)}
    with pytest.raises(ValueError, match=r"queries as wide as the token embedding: 6 and 8; .* or use tied=False"):
        built({"kind": "tokens"}, preprocessor=text)
    with pytest.raises(ValueError, match="queries as wide as the token embedding: 6 and None"):
        built({"kind": "tokens"}, preprocessor={"kind": "vector", "channels": 6})
    assert built({"kind": "tokens", "tied": False}, preprocessor=text).output_embedding.in_features == 6


def test_one_query_gives_one_row_of_class_scores_and_several_give_several():
    module = built({"kind": "classification"}, num_labels=4)
    assert answer(module, torch.randn(2, 1, 6)).shape == (2, 4)
    assert answer(module, torch.randn(2, 3, 6)).shape == (2, 3, 4)
    assert answer(built({"kind": "classification", "num_outputs": 7}), torch.randn(2, 1, 6)).shape == (2, 7)


def test_the_hidden_layer_is_a_tanh():
    module = built({"kind": "classification", "hidden": 9})
    decoded = torch.randn(2, 1, 6)
    torch.testing.assert_close(answer(module, decoded), module.classifier(torch.tanh(module.hidden(decoded)))[:, 0])


@pytest.mark.parametrize("kind", ["classification", "projection"])
def test_dropout_acts_in_training_only(kind):
    module = built({"kind": kind, "dropout": 0.5})
    decoded = torch.randn(2, 3, 6)
    assert torch.equal(module.read_out(decoded), module.read_out(decoded))
    module.train()
    assert not torch.equal(module.read_out(decoded), module.read_out(decoded))


def test_a_projection_can_come_back_on_its_grid():
    decoded = torch.randn(2, 12, 6)
    flat = built({"kind": "projection", "num_outputs": 3})
    assert answer(flat, decoded, grid=(3, 4)).shape == (2, 12, 3)
    on_grid = built({"kind": "projection", "num_outputs": 3, "on_grid": True})
    assert answer(on_grid, decoded, grid=(3, 4)).shape == (2, 3, 4, 3)
    assert torch.equal(answer(on_grid, decoded, grid=(3, 4)).flatten(1, 2), answer(on_grid, decoded))
    assert built({"kind": "projection"}, num_labels=4).projection.out_features == 4


def test_sound_patches_become_samples_in_order():
    module = built({"kind": "audio", "samples_per_patch": 4})
    decoded = torch.randn(2, 5, 6)
    want = torch.cat([module.projection(decoded[:, i]) for i in range(5)], dim=1)
    torch.testing.assert_close(answer(module, decoded), want)


def test_flow_is_scaled_down_and_laid_out():
    module = built({"kind": "flow", "rescale_factor": 50})
    decoded = torch.randn(2, 12, 6)
    torch.testing.assert_close(answer(module, decoded, (3, 4)), module.projection(decoded).unflatten(1, (3, 4)) / 50)
    assert answer(module, decoded).shape == (2, 12, 2)
    with pytest.raises(ValueError, match="rescale_factor must not be 0"):
        built({"kind": "flow", "rescale_factor": 0})


def test_the_average_read_out_is_the_projected_mean_latent():
    module = built({"kind": "average"}, in_channels=16, num_labels=4)
    latents = torch.randn(2, 5, 16)
    assert module.reads_latents
    torch.testing.assert_close(module.read_out(latents), module.classifier(latents.mean(dim=1)))


def test_every_modality_has_its_own_read_out_after_a_shared_linear():
    spec = {
        "kind": "multimodal",
        "channels": 5,
        "modalities": {
            "sound": {"kind": "audio", "samples_per_patch": 4},
            "image": {"kind": "projection", "num_outputs": 3, "on_grid": True},
        },
    }
    module = built(spec)
    decoded = {"image": torch.randn(2, 6, 6), "sound": torch.randn(2, 3, 6)}
    asked = QueryArray({**query(6, (2, 3), "image").parts, **query(3, (3,), "sound").parts})
    out = module.arrange({n: module.read_out(d, n) for n, d in decoded.items()}, asked)
    assert list(module.modalities) == ["image", "sound"]
    torch.testing.assert_close(
        out["image"], module.modalities["image"].projection(module.shared(decoded["image"])).unflatten(1, (2, 3))
    )
    torch.testing.assert_close(
        out["sound"], module.modalities["sound"].projection(module.shared(decoded["sound"])).flatten(1)
    )
    with pytest.raises(ValueError, match="no postprocessor for modality 'label'; known: image, sound"):
        module.read_out(decoded["image"], "label")
    assert built({**spec, "channels": None}).shared is None


def test_bad_modality_names_are_refused():
    with pytest.raises(ValueError, match=r"modality name 'a\.b'"):
        built({"kind": "multimodal", "modalities": {"a.b": {"kind": "projection"}}})


def test_a_postprocessor_with_a_forward_is_told_what_to_define():
    with pytest.raises(TypeError, match="Mine: a Postprocessor defines read_out and arrange"):

        class Mine(Postprocessor):
            def forward(self, decoded, query):
                return decoded


def test_the_identity_gives_decoded_queries():
    decoded = torch.randn(2, 4, 6)
    assert torch.equal(answer(built({"kind": "identity"}), decoded), decoded)


@pytest.mark.parametrize("kind", ["projection", "classification", "identity", "audio", "flow"])
def test_one_read_out_takes_no_several_modalities(kind):
    module = built({"kind": kind})
    points = {name: module.read_out(torch.randn(2, 3, 6)) for name in ("a", "b")}
    asked = QueryArray({name: ArrayPart(features=torch.zeros(1, 3, 1)) for name in points})
    with pytest.raises(ValueError, match="reads out one modality, and the queries have a, b; use kind 'multimodal'"):
        module.arrange(points, asked)


def test_what_reads_everything_at_once_is_no_modalitys():
    with pytest.raises(ValueError, match="'average' cannot read modality 'a': it needs all queries, or the latents"):
        built({"kind": "multimodal", "modalities": {"a": {"kind": "average"}}})


def test_a_model_without_labels_scores_none():
    with pytest.raises(ValueError, match="num_labels=0 must be at least 1"):
        built({"kind": "classification"}, num_labels=0)
