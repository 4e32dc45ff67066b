import pytest
import torch
from helpers import VOCAB, config_of, fourier, grid, tiny, trainable
from torch import nn

from hf_perceiver.arrays import ArrayPart, InputArray
from hf_perceiver.preprocessors import Preprocessor, element_mask
from hf_perceiver.registry import PREPROCESSORS


def built(spec, **changes):
    """A preprocessor with drawn weights, in evaluation mode."""
    module = PREPROCESSORS.build(spec, config=config_of(**changes))
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module.eval()


def dense(made):
    return InputArray.of(made).dense() if not isinstance(made, InputArray) else made.dense()


# --- text

TEXT = {"kind": "text", "channels": 6, "position": trainable(8, 6)}


def test_text_is_embedding_plus_position():
    module = built(TEXT)
    ids = torch.randint(0, VOCAB, (2, 5))
    want = module.embedding.weight[ids] + module.position.embeddings[:5]
    assert torch.equal(dense(module(ids)), want)
    assert module.channels == 6
    assert module.main_input_name == "input_ids"


def test_text_can_be_embedding_beside_position():
    module = built({"kind": "text", "channels": 4, "position": trainable(8, 3), "combine": "concat"})
    ids = torch.randint(0, VOCAB, (2, 5))
    want = torch.cat([module.embedding.weight[ids], module.position.embeddings[None, :5].expand(2, -1, -1)], dim=-1)
    assert torch.equal(dense(module(ids)), want)
    assert module.channels == 7


def test_text_needs_no_position():
    module = built({"kind": "text", "channels": 4})
    ids = torch.randint(0, VOCAB, (2, 5))
    assert torch.equal(dense(module(ids)), module.embedding.weight[ids])


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8])
def test_text_takes_any_integers(dtype):
    module = built(TEXT)
    ids = torch.randint(0, VOCAB, (2, 5))
    assert torch.equal(dense(module(ids.to(dtype))), dense(module(ids)))


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.zeros(2, 5), r"token ids .* of an integer type, not \(2, 5\) torch.float32"),
        (torch.zeros(2, 5, dtype=torch.bool), "torch.bool"),
        (torch.zeros(5, dtype=torch.long), r"not \(5,\)"),
        (torch.zeros(2, 5, 1, dtype=torch.long), r"not \(2, 5, 1\)"),
        (torch.zeros(2, 0, dtype=torch.long), "a text of length 0 has nothing to read"),
        (
            torch.tensor([[3, VOCAB]]),
            f"token ids 3..{VOCAB} do not fit a vocabulary of {VOCAB}; .*resize_token_embeddings",
        ),
        (torch.tensor([[-1, 3]]), "token ids -1..3 do not fit"),
        (torch.zeros(1, 9, dtype=torch.long), "9 elements are more than the 8 trained positions; shorten the input"),
    ],
)
def test_bad_text_is_refused(ids, message):
    with pytest.raises(ValueError, match=message):
        built(TEXT)(ids)


def test_text_may_stand_at_given_places():
    module = built({"kind": "text", "channels": 4, "position": fourier(8), "combine": "concat"})
    ids = torch.randint(0, VOCAB, (2, 3))
    at_grid = dense(module(ids))
    at_coordinates = dense(module(ids, coordinates=torch.tensor([[-1.0], [0.0], [1.0]])))
    torch.testing.assert_close(at_grid, at_coordinates, rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="2 coordinates for 3 elements"):
        module(ids, coordinates=torch.zeros(2, 1))
    with pytest.raises(ValueError, match="coordinates were given to a modality without positions"):
        built({"kind": "text", "channels": 4})(ids, coordinates=torch.zeros(3, 1))


# --- grids

PIXELS = {"kind": "pixels", "in_channels": 3}


@pytest.mark.parametrize("sizes", [(6, 5), (3, 9), (1, 1), (1, 7)])
def test_a_grid_of_any_size_is_pixels_beside_their_position(sizes):
    module = built(grid(PIXELS, fourier(6, 5)))
    x = torch.randn(2, 3, *sizes)
    made = module(x)
    position = module.position.encode(sizes, device=x.device, dtype=x.dtype).dense(0, sizes[0] * sizes[1])
    want = torch.cat([x.flatten(2).transpose(1, 2), position.expand(2, -1, -1)], dim=-1)
    assert torch.equal(dense(made), want)
    assert made.grid == sizes
    assert module.main_input_name == "pixel_values"


def test_positions_can_be_added():
    module = built(grid({"kind": "values", "channels": 4}, trainable(6, 4, grid=[2, 3]), combine="add"))
    x = torch.randn(2, 2, 3, 4)
    assert torch.equal(dense(module(x)), x.flatten(1, 2) + module.position.embeddings)


def test_added_positions_of_another_width_are_refused():
    with pytest.raises(ValueError, match=r"one width, not 3 and 4; project the position .* or use combine='concat'"):
        built(grid(PIXELS, trainable(6, 4), combine="add"))
    with pytest.raises(ValueError, match="combine='sum' must be one of concat, add"):
        built(grid(PIXELS, trainable(6, 4), combine="sum"))


def test_every_example_may_have_its_own_coordinates():
    module = built(grid(PIXELS, fourier(6, 5)))
    x, coordinates = torch.randn(2, 3, 2, 3), torch.rand(2, 6, 2) * 2 - 1
    together = dense(module(x, coordinates=coordinates))
    for row in range(2):
        torch.testing.assert_close(
            together[row], dense(module(x[row : row + 1], coordinates=coordinates[row]))[0], rtol=0, atol=0
        )


def test_trained_positions_are_interpolated_on_request():
    module = built(grid(PIXELS, trainable(6, 4, grid=[2, 3])))
    x = torch.randn(1, 3, 4, 5)
    with pytest.raises(ValueError, match=r"cannot label a 4x5 grid; .* 2x3, or pass interpolate_pos_encoding=True"):
        module(x)
    assert dense(module(x, interpolate_pos_encoding=True)).shape == (1, 20, 7)
    same = torch.randn(1, 3, 2, 3)
    assert torch.equal(dense(module(same)), dense(module(same, interpolate_pos_encoding=True)))


@pytest.mark.parametrize("stem", [PIXELS, {"kind": "conv1x1", "channels": 4}])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("given", [torch.uint8, torch.float32, torch.bfloat16])
def test_pixels_of_any_type_are_read(stem, weights, given):
    module = built(grid(stem, fourier(6, 5))).to(weights)
    x = torch.randint(0, 255, (1, 3, 2, 3)).to(given)
    want = weights if stem is not PIXELS else (given if given.is_floating_point else torch.float32)
    assert dense(module(x)).dtype == want


# --- sound


def test_a_mask_over_samples_is_one_over_their_patches():
    """A patch is there when any of its samples is."""
    module = built(grid({"kind": "audio_patches", "samples_per_patch": 3}, fourier(4)))
    x, lengths = torch.randn(3, 12, 1), torch.tensor([12, 7, 6])
    mask = torch.arange(12) < lengths[:, None]
    want = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 0, 0]]).bool()
    assert torch.equal(module(x, mask.long()).mask, want)
    assert torch.equal(module(x, want).mask, want)


@pytest.mark.parametrize("flatten", [False, True])
def test_every_value_of_a_spectrogram_is_an_element(flatten):
    module = built(grid({"kind": "spectrogram", "flatten": flatten}, fourier(*([20] if flatten else [4, 5]))))
    x = torch.randn(2, 4, 5)
    made = module(x, torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0]]))
    assert made.grid == ((20,) if flatten else (4, 5))
    assert torch.equal(made.features, x.reshape(2, 20, 1))
    assert made.mask.sum(dim=1).tolist() == [15, 5]
    assert made.mask[0, :15].all() and made.mask[1, :5].all()
    with pytest.raises(ValueError, match=r"a spectrogram is \(batch, time, bands\), not \(2, 4, 5, 1\)"):
        module(x[..., None])


# --- vectors


def test_a_vector_is_one_element():
    module = built({"kind": "vector", "channels": 4})
    x = torch.randn(3, 4)
    assert torch.equal(dense(module(x)), x[:, None])
    assert module.num_elements == 1


def test_class_indices_become_one_hot():
    module = built({"kind": "vector", "channels": 4})
    assert torch.equal(dense(module(torch.tensor([2, 0]))), torch.eye(4)[[2, 0]][:, None])


def test_no_class_is_a_masked_element():
    made = built({"kind": "vector", "channels": 4})(torch.tensor([2, -100, 0]))
    assert torch.equal(made.mask, torch.tensor([[True], [False], [True]]))
    made = built({"kind": "vector", "channels": 4})(torch.tensor([2, -100, 0]), torch.tensor([[0], [1], [1]]))
    assert torch.equal(made.mask, torch.tensor([[False], [False], [True]]))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.tensor([2, 4]), "label 4 is outside 0..3; -100 marks what has no label"),
        (torch.tensor([-1]), "label -1 is outside 0..3"),
        (torch.zeros(2, 5), r"a vector is \(batch, 4\) or class indices \(batch,\), not \(2, 5\)"),
        (torch.zeros(2), r"not \(2,\)"),
        (torch.zeros(2, 1, 4), r"not \(2, 1, 4\)"),
    ],
)
def test_bad_vectors_are_refused(given, message):
    with pytest.raises(ValueError, match=message):
        built({"kind": "vector", "channels": 4})(given)


# --- points


def test_points_are_features_beside_the_code_of_their_coordinates():
    module = built({"kind": "points", "position": fourier(16, 16), "feature_channels": 3})
    x = torch.cat([torch.rand(2, 7, 2) * 2 - 1, torch.randn(2, 7, 3)], dim=-1)
    code = module.position.encode_at(x[..., :2], dtype=x.dtype).dense(0, 7)
    assert torch.equal(dense(module(x)), torch.cat([x[..., 2:], code], dim=-1))
    assert module.channels == 3 + 14


def test_points_without_features_keep_their_batch():
    module = built({"kind": "points", "position": fourier(16, 16)})
    made = module(torch.rand(3, 7, 2))
    assert (made.batch_size, made.length) == (3, 7)


def test_a_set_has_no_coordinates():
    module = built({"kind": "points", "feature_channels": 3})
    x = torch.randn(2, 7, 3)
    assert torch.equal(dense(module(x)), x)


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        ({"position": fourier(16, 16)}, (2, 7, 3), r"\(batch, points, 2 coordinates \+ 0 features\), not \(2, 7, 3\)"),
        ({"feature_channels": 3}, (7, 3), r"not \(7, 3\)"),
        ({}, (1, 1, 1), "points need a position, feature_channels, or both"),
        (
            {"position": trainable(4, 4)},
            (1, 1, 1),
            "points need a position that codes coordinates, such as kind 'fourier'",
        ),
    ],
)
def test_bad_points_are_refused(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        built({"kind": "points", **spec})(torch.zeros(shape))


# --- masks


@pytest.mark.parametrize("kind", ["bool", "long", "float"])
def test_a_mask_is_ones_where_elements_are_valid(kind):
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    made = built(TEXT)(torch.zeros(2, 3, dtype=torch.long), getattr(mask, kind)())
    assert torch.equal(made.mask, mask.bool())


def test_a_mask_may_have_the_grids_shape_or_one_row():
    module, x = built(grid(PIXELS, fourier(6, 5))), torch.randn(2, 3, 2, 3)
    mask = torch.rand(2, 2, 3) > 0.5
    assert torch.equal(module(x, mask).mask, mask.flatten(1))
    assert torch.equal(module(x, mask.flatten(1)).mask, mask.flatten(1))
    assert torch.equal(module(x, mask[:1]).mask, mask[:1].flatten(1).expand(2, -1))


@pytest.mark.parametrize("shape", [(2, 4), (3, 3), (3,), (2, 3, 2)])
def test_a_mask_of_another_shape_is_refused(shape):
    with pytest.raises(ValueError, match=r"a mask over \(2, 3\) elements has that shape, not"):
        element_mask(torch.ones(shape), (2, 3))


# --- several modalities


def multimodal(**options):
    spec = {
        "kind": "multimodal",
        "modalities": {
            "b": grid({"kind": "values", "channels": 4}),
            "a": {"kind": "vector", "channels": 3},
            "c": {"kind": "text", "channels": 5, "position": trainable(8, 5)},
        },
        **options,
    }
    return built(spec)


def several(batch=2):
    return {
        "a": torch.randn(batch, 3),
        "b": torch.randn(batch, 2, 2, 4),
        "c": torch.randint(0, VOCAB, (batch, 3)),
    }


def test_modalities_are_sorted_and_padded_to_a_common_width():
    module, x = multimodal(min_padding_size=2), several()
    assert list(module.modalities) == ["a", "b", "c"]
    assert module.channels == 5 + 2
    assert {name: p.shape[0] for name, p in module.padding.named_parameters()} == {"a": 4, "b": 3, "c": 2}
    made = module(x)
    assert made.sizes == {"a": 1, "b": 4, "c": 3}
    text = dense(module.modalities["c"](x["c"]))
    blocks = [("a", x["a"][:, None]), ("b", x["b"].flatten(1, 2)), ("c", text)]
    want = torch.cat(
        [torch.cat([rows, module.padding(n).expand(2, rows.shape[1], -1)], dim=-1) for n, rows in blocks], dim=1
    )
    assert torch.equal(made.dense(), want)


def test_without_masks_there_are_no_mask_tokens():
    module = multimodal()
    assert not list(module.mask_tokens.parameters())
    x = several()
    assert torch.equal(module.train()(x).dense(), module.eval()(x).dense())


def test_masks_are_drawn_in_training_only_with_their_probability():
    module = multimodal(mask_probs={"b": 0.3, "a": 0.0, "c": 1.0})
    x = {"a": torch.randn(200, 3), "b": torch.randn(200, 5, 5, 4), "c": torch.zeros(200, 3, dtype=torch.long)}
    torch.manual_seed(0)
    made = module.train()(x)
    rate = made.parts["b"].replaced.float().mean().item()
    # 5,000 draws: three standard deviations are 0.02.
    assert abs(rate - 0.3) < 0.02
    assert made.parts["a"].replaced is None
    assert made.parts["c"].replaced.all()
    again = module(x)
    assert not torch.equal(made.parts["b"].replaced, again.parts["b"].replaced)
    rows = made.parts["b"].dense()
    assert torch.equal(
        rows[made.parts["b"].replaced], module.mask_tokens("b").expand(int(made.parts["b"].replaced.sum()), -1)
    )


def test_at_inference_what_is_masked_is_fixed():
    module, x = multimodal(mask_probs={"a": 0.3, "b": 0.5, "c": 1.0}), several()
    assert torch.equal(module(x).dense(), module(x).dense())
    made = module(x)
    assert made.parts["c"].replaced.all()
    assert made.parts["a"].replaced is None and made.parts["b"].replaced is None
    module = multimodal(mask_probs={"a": 0.3, "b": 0.5, "c": 1.0}, masked_at_inference=["a"])
    made = module(x)
    assert made.parts["a"].replaced.all()
    assert made.parts["c"].replaced is None


def test_a_masked_modality_may_be_missing():
    """Its content makes no difference: the released autoencoder classifies without a label."""
    module, x = multimodal(mask_probs={"a": 1.0}), several()
    want = module(x).dense()
    for missing in ({n: v for n, v in x.items() if n != "a"}, {**x, "a": None}):
        assert torch.equal(module(missing).dense(), want)
        assert torch.equal(module.train()(missing).dense(), want)
        module.eval()


def test_an_unmasked_modality_that_is_missing_is_left_out():
    module, x = multimodal(mask_probs={"c": 1.0}), several()
    made = module({"b": x["b"]})
    # How long the masked text is, nothing tells.
    assert made.sizes == {"b": 4}


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (torch.zeros(1, 3), "a multimodal model reads a dict of a, b, c, not Tensor"),
        ({"d": torch.zeros(1, 3)}, "unknown modality 'd' in the input; known: a, b, c"),
        ({}, "no modality given; known: a, b, c"),
        ({"a": None}, "no modality given"),
        ({"a": torch.zeros(2, 3), "c": torch.zeros(3, 4, dtype=torch.long)}, "modalities disagree on the batch size"),
    ],
)
def test_bad_multimodal_inputs_are_refused(inputs, message):
    with pytest.raises(ValueError, match=message):
        multimodal()(inputs)


def test_a_masked_modality_may_be_missing_from_some_examples():
    """Where it is replaced, its token stands in, as for a batch that lacks it: every example is as if alone."""
    module, x = multimodal(mask_probs={"a": 1.0}), several()
    alone = module({n: v for n, v in x.items() if n != "a"})
    for mask in (torch.tensor([1, 0]), torch.tensor([[0], [1]])):
        made = module(x, {"a": mask})
        assert made.mask() is None
        assert torch.equal(made.dense(), alone.dense())


def test_in_training_a_token_stands_in_for_what_is_missing_as_often_as_it_is_masked():
    """The label of an example without one is seen as at inference in half of the draws, and left out in the others."""
    batch = 2000
    module = multimodal(mask_probs={"a": 0.5}, masked_at_inference=["a"]).train()
    inputs = {"a": torch.randn(batch, 3), "b": torch.randn(1, 2, 2, 4).expand(batch, -1, -1, -1)}
    for given, mask in ((inputs, {"a": torch.zeros(batch)}), ({"b": inputs["b"]}, None)):
        made = module(given, mask)
        part = made.parts["a"]
        # 2,000 draws: three standard deviations are 0.034.
        assert abs(part.mask.float().mean() - 0.5) < 0.034
        assert torch.equal(made.mask()[:, :1], part.mask)
        rows = part.dense().expand(batch, -1, -1)[part.mask[:, 0], 0]
        assert torch.equal(rows, module.mask_tokens("a").expand_as(rows))
    assert module.eval()({"b": inputs["b"]}).mask() is None


def test_a_mask_over_examples_is_one_over_all_their_elements():
    module, x = multimodal(), several(3)
    there = torch.tensor([True, False, True])
    made = module(x, {"b": there, "c": torch.tensor([[1, 1, 0]] * 3)})
    assert torch.equal(made.parts["b"].mask, there[:, None].expand(3, 4))
    with pytest.raises(ValueError, match="the mask of 'b' is for 2 examples, the batch has 3"):
        module(x, {"b": torch.ones(2)})


# --- modality dropout


def test_a_dropped_modality_is_a_masked_one():
    module, x = multimodal(dropout_probs={"b": 0.5}).train(), several(40)
    made = module(x)
    dropped = ~made.parts["b"].mask[:, 0]
    assert 0 < dropped.sum() < 40
    want = module.eval()(x, {"b": ~dropped})
    assert torch.equal(made.mask(), want.mask())
    assert torch.equal(made.dense(), want.dense())


def test_dropout_and_a_mask_both_hide():
    module, x = multimodal(dropout_probs={"c": 0.5}).train(), several(40)
    mask = torch.rand(40, 3) < 0.7
    part = module(x, {"c": mask}).parts["c"]
    rows = part.mask.any(dim=1)
    assert torch.equal(part.mask[rows], mask[rows])
    assert 0 < rows.sum() < mask.any(dim=1).sum()


def test_evaluation_drops_nothing():
    module, x = multimodal(dropout_probs={"a": 1.0, "b": 0.5}), several(40)
    assert module(x).mask() is None
    assert torch.equal(module(x).dense(), multimodal_like(module)(x).dense())


def multimodal_like(module):
    """The same without dropout."""
    other = multimodal()
    other.load_state_dict(module.state_dict())
    return other


def test_modalities_are_dropped_with_their_probabilities():
    """9,000 examples: three standard deviations of 0.3 are 0.0145, of 0.1 0.0095."""
    module, x = multimodal(dropout_probs={"b": 0.3, "a": 0.1}).train(), several(1)
    x = {name: value.expand(9000, *value.shape[1:]) for name, value in x.items()}
    made = module(x)
    assert made.parts["c"].mask is None
    assert abs(1 - made.parts["b"].mask[:, 0].float().mean() - 0.3) < 0.0145
    assert abs(1 - made.parts["a"].mask[:, 0].float().mean() - 0.1) < 0.0095


@pytest.mark.parametrize("missing", [None, "c"])
def test_an_example_never_loses_all_of_its_content(missing):
    """Each of those that would be left keeps one, by equal chance: 3,000 draws, three standard deviations."""
    batch = 3000
    module, x = multimodal(dropout_probs=dict.fromkeys("abc", 1.0)).train(), several(1)
    x = {name: value.expand(batch, *value.shape[1:]) for name, value in x.items()}
    mask = {missing: torch.zeros(batch)} if missing else None
    made = module(x, mask)
    shown = torch.stack([made.parts[name].mask.any(dim=1) for name in "abc"], dim=1)
    assert (shown.sum(dim=1) == 1).all()
    share = 1 / 3 if missing is None else 1 / 2
    kept = shown.float().mean(dim=0)
    assert (kept[:2] - share).abs().max() < 3 * (share * (1 - share) / batch) ** 0.5
    assert kept[2] == 0 or missing is None


def test_a_mask_token_is_no_content():
    """With its label masked, an example whose sound and video were both dropped would have nothing to learn from."""
    module = multimodal(mask_probs={"a": 1.0}, dropout_probs={"b": 1.0, "c": 1.0}).train()
    made = module(several(50))
    shown = torch.stack([made.parts[name].mask.any(dim=1) for name in "bc"], dim=1)
    assert (shown.sum(dim=1) == 1).all()


def test_where_nothing_is_left_to_drop_nothing_breaks():
    module = multimodal(dropout_probs={"a": 1.0}).train()
    made = module({"a": torch.randn(2, 3)}, {"a": torch.zeros(2)})
    assert not made.mask().any()


def test_masks_and_coordinates_go_by_modality():
    module, x = multimodal(), several()
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    made = module(x, {"c": mask})
    assert torch.equal(made.mask(), torch.cat([torch.ones(2, 5), mask], dim=1).bool())
    with pytest.raises(ValueError, match="unknown modality 'd' in the mask"):
        module(x, {"d": mask})
    with pytest.raises(ValueError, match="unknown modality 'd' in the coordinates"):
        module(x, coordinates={"d": mask})


def test_a_batch_of_one_modality_may_be_shared():
    module, x = multimodal(), several(2)
    x["b"] = x["b"][:1]
    made = module(x)
    assert made.batch_size == 2
    assert torch.equal(made.dense()[0, 1:5], made.dense()[1, 1:5])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"modalities": {}}, "needs at least one modality"),
        ({"mask_probs": {"d": 0.5}}, "mask_probs names 'd'; the modalities are a, b, c"),
        ({"mask_probs": {"a": 1.5}}, r"mask_probs\['a'\] is a probability, not 1.5"),
        ({"dropout_probs": {"d": 0.5}}, "dropout_probs names 'd'; the modalities are a, b, c"),
        ({"dropout_probs": {"a": -0.1}}, r"dropout_probs\['a'\] is a probability, not -0.1"),
        ({"masked_at_inference": ["a"]}, "masked_at_inference needs mask tokens: give mask_probs"),
        ({"mask_probs": {}, "masked_at_inference": ["d"]}, "masked_at_inference names 'd'"),
        ({"modalities": {"a.b": {"kind": "vector", "channels": 1}}}, "modality name 'a.b' must be"),
        ({"modalities": {"": {"kind": "vector", "channels": 1}}}, "modality name '' must be"),
        (
            {"modalities": {"keys": {"kind": "vector", "channels": 1}}},
            "modality name 'keys' must be .* torch does not use",
        ),
        ({"modalities": {"training": {"kind": "vector", "channels": 1}}}, "modality name 'training' must be"),
        ({"modalities": {"forward": {"kind": "vector", "channels": 1}}}, "modality name 'forward' must be"),
        ({"modalities": {"a": {"kind": "vectors"}}}, "unknown preprocessor kind 'vectors'"),
        ({"modalities": {"a": "vector"}}, "option 'modalities' .* must be of type"),
    ],
)
def test_bad_multimodal_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        multimodal(**options)


def test_a_users_preprocessor_in_a_dict_gets_inputs_and_mask_only():
    class Doubler(Preprocessor):
        channels = 4

        def forward(self, inputs, mask=None):
            return ArrayPart(features=2 * inputs)

    PREPROCESSORS.register("doubler")(Doubler)
    try:
        module = multimodal(modalities={"a": {"kind": "doubler"}, "b": {"kind": "vector", "channels": 3}})
        x = torch.randn(2, 5, 4)
        made = module({"a": x, "b": torch.randn(2, 3)})
        assert torch.equal(made.parts["a"].features, 2 * x)
    finally:
        del PREPROCESSORS.classes["doubler"]


def test_the_released_masks_replace_the_label():
    case = tiny("multimodal")
    model = case.model()
    given = case.inputs()["inputs"]
    other = {**given, "label": given["label"].flip(1)}
    assert torch.equal(model.encode(given).latents, model.encode(other).latents)


def test_a_multimodal_models_masks_and_coordinates_are_dicts():
    modalities = {"a": {"kind": "vector", "channels": 3}, "b": {"kind": "vector", "channels": 2}}
    module = built({"kind": "multimodal", "modalities": modalities})
    inputs = {"a": torch.rand(2, 3), "b": torch.rand(2, 2)}
    with pytest.raises(ValueError, match="the mask of a multimodal model must be a dict by modality, not Tensor"):
        module(inputs, torch.ones(2, 2))
    with pytest.raises(ValueError, match=r"the coordinates of a multimodal model must be a dict .* known: a, b"):
        module(inputs, coordinates=torch.ones(2, 2))


@pytest.mark.parametrize(
    ("spec", "inputs"),
    [
        ({"kind": "vector", "channels": 3}, torch.rand(2, 3)),
        ({"kind": "points", "position": fourier(6, 5)}, torch.rand(2, 4, 2)),
    ],
)
def test_coordinates_that_nothing_reads_are_refused(spec, inputs):
    with pytest.raises(ValueError, match="takes no input_coordinates; leave them out"):
        built(spec)(inputs, coordinates=torch.zeros(1, 2))
