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


def test_flow_options_have_defaults_that_read_old_configs():
    module = built({"kind": "flow"})
    assert (module.rescale_factor, module.scale_factor, module.flow_loss, module.num_loss_points) == (
        100.0,
        20.0,
        "epe",
        None,
    )


@pytest.mark.parametrize("kind", ["flow", "convex_upsampling"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rescale_factor": 0}, "rescale_factor must not be 0"),
        ({"scale_factor": 0.0}, r"scale_factor=0\.0 turns logits into pixels; it must be more than 0"),
        ({"scale_factor": -20}, "scale_factor=-20 turns logits into pixels"),
        ({"flow_loss": "l2"}, r"option 'flow_loss' of postprocessor kind '.*' must be of type .*'epe'.*not 'l2'"),
    ],
)
def test_bad_flow_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        built({"kind": kind, **options})


# --- convex upsampling


def convex(**options):
    return built({"kind": "convex_upsampling", "channels": 5, "factor": 2, "rescale_factor": 10.0, **options})


def test_convex_upsampling_computes_what_it_says():
    """Fine flow by fine flow: softmax over those of the nine neighbours that are inside the grid."""
    module, decoded, (height, width) = convex(factor=3), torch.randn(2, 12, 6, dtype=torch.float64), (3, 4)
    module.double()
    out = answer(module, decoded, (height, width))
    assert out.shape == (2, 9, 12, 2)
    features = module.features(decoded).unflatten(1, (height, width))
    flow, scores = module.flow(features) / 10.0, module.weights(features).unflatten(-1, (3, 3, 3, 3)) / 4
    for y in range(9):
        for x in range(12):
            top, left = y // 3, x // 3
            total, weighted = 0, 0
            for i in range(3):
                for j in range(3):
                    r, c = top - 1 + i, left - 1 + j
                    if 0 <= r < height and 0 <= c < width:
                        weight = scores[:, top, left, i, j, y % 3, x % 3].exp()[:, None]
                        total, weighted = total + weight, weighted + weight * flow[:, r, c]
            torch.testing.assert_close(out[:, y, x], weighted / total, rtol=1e-10, atol=1e-12)


def test_constant_flow_stays_constant_up_to_the_border():
    """RAFT pads with zeros, which draws the border towards no motion."""
    module = convex()
    nn.init.zeros_(module.flow.weight)
    out = answer(module, torch.randn(2, 12, 6), (3, 4))
    torch.testing.assert_close(out, (module.flow.bias / 10).expand(2, 6, 8, 2))


def test_upsampled_flow_lies_between_its_neighbours():
    module, decoded = convex(factor=4), torch.randn(2, 12, 6)
    coarse = module.read_out(decoded)[..., :2].unflatten(1, (3, 4)).movedim(-1, 1)
    out = answer(module, decoded, (3, 4)).movedim(-1, 1)
    enlarged = [
        nn.functional.interpolate(sign * nn.functional.max_pool2d(sign * coarse, 3, 1, 1), scale_factor=4)
        for sign in (-1, 1)
    ]
    assert (enlarged[0] - 1e-6 <= out).all() and (out <= enlarged[1] + 1e-6).all()


def test_a_factor_of_one_and_a_grid_of_one_point_are_upsampled_too():
    assert answer(convex(factor=1), torch.randn(2, 12, 6), (3, 4)).shape == (2, 3, 4, 2)
    module, decoded = convex(), torch.randn(2, 1, 6)
    out = answer(module, decoded, (1, 1))
    torch.testing.assert_close(out, module.read_out(decoded)[:, None, :, :2].expand(2, 2, 2, 2))


def test_chosen_points_have_no_neighbours():
    with pytest.raises(ValueError, match="chosen points have none; leave out output_points, or use"):
        answer(convex(), torch.randn(2, 12, 6))
    with pytest.raises(ValueError, match="a grid of 3 axes have none"):
        answer(convex(), torch.randn(2, 12, 6), (2, 2, 3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_convex_upsampling_works_in_half_precision(dtype):
    module, decoded = convex(), torch.randn(2, 12, 6)
    want = answer(module, decoded, (3, 4))
    out = answer(module.to(dtype), decoded.to(dtype), (3, 4))
    assert out.dtype == dtype
    # bfloat16 keeps 8 bits, and softmax scores of size 10 are off by 0.04 in it.
    assert (out.float() - want).norm() <= 0.1 * want.norm()


def test_the_upsampled_flow_starts_at_zero():
    module = POSTPROCESSORS.build({"kind": "convex_upsampling"}, config=config_of(), in_channels=6)
    module.reset_own_parameters()
    assert (module.flow.weight == 0).all()
    assert module.features.out_features == 64 and module.weights.out_features == 9 * 16


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


@pytest.mark.parametrize("kind", ["projection", "classification", "identity", "audio", "flow", "convex_upsampling"])
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


# Several tasks

THREE_TASKS = {"b": ["yes", "no"], "a": ["x", "y", "z"], "c": []}


def asked(module, decoded):
    return module(decoded, query(decoded.shape[1], grid=(decoded.shape[1],)))


def test_each_task_reads_out_its_own_query_by_its_own_head():
    module = built({"kind": "multitask", "tasks": THREE_TASKS, "hidden": 7})
    assert module.names == ["a", "b", "c"], "by name, as config.json gives dicts back"
    decoded = torch.randn(2, 3, 6)
    scores = asked(module, decoded)
    assert scores.shape == (2, 3, 3)
    for index, (name, count) in enumerate({"a": 3, "b": 2, "c": 1}.items()):
        head = module.tasks[name]
        own = head.classifier(torch.tanh(head.hidden(decoded[:, index])))
        torch.testing.assert_close(scores[:, index, :count], own)
        assert (scores[:, index, count:] == -torch.inf).all()


def test_one_query_is_read_out_by_every_task():
    module = built({"kind": "multitask", "tasks": THREE_TASKS})
    assert module.tasks["a"].hidden.out_features == 6, "as wide as the queries"
    decoded = torch.randn(2, 1, 6)
    torch.testing.assert_close(asked(module, decoded), asked(module, decoded.expand(-1, 3, -1)))
    at_first = built({"kind": "multitask", "tasks": THREE_TASKS, "at_first_token": True})
    tokens = torch.randn(2, 5, 6)
    torch.testing.assert_close(asked(at_first, tokens), asked(at_first, tokens[:, :1]))
    with pytest.raises(ValueError, match=r"5 queries on the grid \(5,\) for 3 tasks; ask all of them, or one"):
        asked(module, tokens)
    with pytest.raises(ValueError, match="3 queries on the grid None"):  # chosen, and in which order nobody knows
        module(decoded.expand(-1, 3, -1), query(3))


@pytest.mark.parametrize(
    ("tasks", "message"),
    [
        ({}, "at least one task"),
        ({"a": ["one"]}, r"task 'a' has the classes \['one'\]; give at least two different ones, or \[\] for a number"),
        ({"a": ["one", "one"]}, "at least two different ones"),
        ({"a.b": []}, "without dots"),
    ],
)
def test_tasks_that_cannot_have_a_head_are_refused(tasks, message):
    with pytest.raises(ValueError, match=message):
        built({"kind": "multitask", "tasks": tasks})
