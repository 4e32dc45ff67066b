"""The fast forms of reading and writing equal the direct ones on every kind, and step aside where they may not stand in.

In float64 the two differ by rounding alone, some 1e-15; a wrong term would show at 1e-2.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import PIXELS, TINY, assert_same, config_of, fourier, grid, tiny
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from hf_perceiver import InputArray, PerceiverIOForOpticalFlow, PerceiverIOModel, fast_reading, fast_writing
from hf_perceiver.fast_attention import can_replace
from hf_perceiver.fast_reading import read
from hf_perceiver.fast_writing import FastWriter

# Which of the tiny models have queries made of separable pieces to write. Every input can be read fast but points, whose
# coordinates differ by example.
WRITES = {
    "flow",
    "flow_separate",
    "flow_upsampled",
    "multimodal",
    "video",
    "audio",
    "values",
    "text_fourier",
    "added_positions",
    "concat_query",
}


@pytest.fixture
def taken(monkeypatch):
    """Counts of fast reads and writes that gave an answer."""
    counts = {"read": 0, "write": 0}

    def counted(name, function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            counts[name] += result is not None
            return result

        return call

    monkeypatch.setattr("hf_perceiver.modeling_perceiver_io.read", counted("read", read))
    monkeypatch.setattr(FastWriter, "write", counted("write", FastWriter.write))
    return counts


def answers(model, inputs, **kwargs):
    with torch.no_grad():
        return model(**inputs, **kwargs)


def in_double(inputs):
    if isinstance(inputs, dict):
        return {name: in_double(value) for name, value in inputs.items()}
    return inputs.double() if isinstance(inputs, torch.Tensor) and inputs.is_floating_point() else inputs


def both(case, dtype=torch.float64, **changes):
    """The same model with the fast forms and without."""
    models = [case.model(fast_attention=how, **changes).to(dtype) for how in ("always", "never")]
    models[1].load_state_dict(models[0].state_dict())
    return models


@pytest.mark.parametrize("name", TINY)
def test_every_kind_of_model_answers_the_same(name, taken):
    case = tiny(name)
    fast, direct = both(case)
    inputs = in_double(case.inputs(batch=3))
    got, want = answers(fast, inputs), answers(direct, inputs)
    assert (taken["read"] > 0, taken["write"] > 0) == ("points" not in name, name in WRITES)
    assert_same(got.last_hidden_state, want.last_hidden_state, rtol=0, atol=1e-11)
    if want.logits is not None:
        assert_same(got.logits, want.logits, rtol=0, atol=1e-11)


# Reading and writing


def flow_case(**changes):
    case = tiny("flow")
    case.config = config_of(**{
        "num_blocks": 1,
        "preprocessor": grid({"kind": "patches", "in_channels": 3, "temporal_downsample": 2, "project": 5}, fourier(9, 14)),
        "output_query": {"kind": "input"},
        "postprocessor": {"kind": "flow"},
        **changes,
    })  # fmt: skip
    return case


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize("v_channels", [4, 60])
def test_heads_widths_and_residuals(heads, v_channels, residual, taken):
    """Values narrower and wider than queries: the folds differ. Each with a mask that differs by example."""
    case = flow_case(
        num_cross_attention_heads=heads,
        decoder_num_heads=heads,
        qk_channels=8,
        v_channels=4 * v_channels,
        decoder_qk_channels=6,
        decoder_v_channels=v_channels,
        use_query_residual=residual,
        decoder_use_query_residual=residual,
        cross_attention_widening_factor=2,
        decoder_widening_factor=3,
    )
    fast, direct = both(case)
    inputs = {"pixel_values": torch.randn(3, 2, 3, 9, 14).double(), "attention_mask": torch.rand(3, 9, 14) > 0.4}
    inputs["attention_mask"][1] = False
    assert_same(answers(fast, inputs).logits, answers(direct, inputs).logits, rtol=0, atol=1e-11)
    assert taken == {"read": 1, "write": 1}


@pytest.mark.parametrize("rows", [1, 4, 10**6])
def test_the_tiles_do_not_matter(rows, monkeypatch):
    case = flow_case()
    fast, direct = both(case)
    inputs = {"pixel_values": 3 * torch.randn(2, 2, 3, 9, 14).double()}
    want = answers(direct, inputs).logits
    monkeypatch.setattr(fast_reading, "READ_ROWS", rows)
    monkeypatch.setattr(fast_reading, "READ_ELEMENTS", 14 * rows)
    monkeypatch.setattr(fast_writing, "WRITE_SCORES", 14 * 8 * rows)
    assert_same(answers(fast, inputs).logits, want, rtol=0, atol=1e-11)
    assert_same(answers(fast, inputs, chunk_size=1).logits, want, rtol=0, atol=1e-11)
    assert_same(answers(fast, inputs, chunk_size=37).logits, want, rtol=0, atol=1e-11)


def test_a_softmax_that_grows_over_the_tiles_does_not_overflow(monkeypatch):
    """Scores of thousands, larger in each row of the image than in the one before."""
    case = flow_case()
    fast, direct = both(case)
    monkeypatch.setattr(fast_reading, "READ_ELEMENTS", 14)
    for model in (fast, direct):
        model.encoder.cross_attends[0].cross_attn.k_proj.weight.data *= 500
    inputs = {"pixel_values": torch.randn(2, 2, 3, 9, 14).double() * torch.arange(1.0, 10)[:, None]}
    got, want = answers(fast, inputs), answers(direct, inputs)
    assert torch.isfinite(want.logits).all()
    assert_same(got.last_hidden_state, want.last_hidden_state, rtol=0, atol=1e-9)


def test_a_softmax_that_grows_from_one_modality_to_the_next_keeps_what_came_before():
    """The first modality's sums are on the shift of its own maximum, beyond the range of float32's weights by the last."""
    case = tiny("multimodal")
    fast, direct = both(case)
    for model in (fast, direct):
        layer = model.encoder.cross_attends[0]
        # What tells modalities apart, trained padding, decides by little; so the keys are large where it is read.
        layer.cross_attn.k_proj.weight.data *= 60
    inputs = in_double(case.inputs(batch=3))
    with torch.no_grad():
        array = fast.preprocessor(inputs["inputs"], None)
        # Each order in turn: in one of them every modality comes after one with lower scores.
        for names in itertools.permutations(array.parts):
            ordered = InputArray({name: array.parts[name] for name in names})
            assert_same(fast.encoder(ordered), direct.encoder(ordered), rtol=0, atol=1e-9)


def test_float16_weights_that_grow_do_not_overflow(monkeypatch):
    """Up to 2^60 over the first tile's maximum, where float16 ends at 2^16."""
    case = flow_case()
    fast, exact = both(case, torch.float16)[0], both(case)[1]
    exact.load_state_dict(fast.state_dict())
    monkeypatch.setattr(fast_reading, "READ_ELEMENTS", 14)
    for model in (fast, exact):
        model.encoder.cross_attends[0].cross_attn.k_proj.weight.data *= 30
    inputs = {"pixel_values": (torch.randn(2, 2, 3, 9, 14) * torch.arange(1.0, 10)[:, None]).half()}
    got, want = answers(fast, inputs).last_hidden_state, answers(exact, in_double(inputs)).last_hidden_state
    assert torch.isfinite(got).all()
    assert (got - want).norm() / want.norm() < 2e-2


def test_features_far_from_zero_lose_no_more_than_the_direct_form_does():
    """LayerNorm's variance from sums of squares would lose all digits: 1e4 squared against 1, in float32."""
    case = flow_case()
    fast, direct = both(case, torch.float32)
    exact = both(case)[1]
    exact.load_state_dict(fast.state_dict())
    inputs = {"pixel_values": 1e4 + torch.randn(1, 2, 3, 9, 14)}
    want = answers(exact, in_double(inputs)).last_hidden_state
    errors = [float((answers(m, inputs).last_hidden_state - want).norm() / want.norm()) for m in (fast, direct)]
    assert errors[0] < 5 * errors[1] + 1e-6, errors


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 4e-2), (torch.float16, 5e-3)])
def test_half_precision_stays_near_double(dtype, bound):
    """Bounds are a few roundings of the dtype (6e-8, 4e-3, 5e-4), as large as the direct form's own error."""
    case = flow_case()
    fast = both(case, dtype)[0]
    exact = both(case)[1]
    exact.load_state_dict(fast.state_dict())
    inputs = {"pixel_values": torch.randn(2, 2, 3, 9, 14).to(dtype)}
    got, want = answers(fast, inputs).logits, answers(exact, in_double(inputs)).logits
    assert got.dtype == dtype
    assert (got - want).norm() / want.norm() < bound


def test_one_axis_two_and_three():
    for stem, shape, position in [
        ({"kind": "values", "channels": 4}, (2, 11, 4), fourier(11)),
        ({"kind": "values", "channels": 4}, (2, 5, 3, 4), fourier(5, 3)),
        ({"kind": "values", "channels": 4}, (2, 2, 5, 3, 4), fourier(2, 5, 3)),
        (PIXELS, (2, 2, 3, 5, 4), fourier(2, 5, 4, concat_pos=False)),
    ]:
        case = flow_case(preprocessor=grid(stem, position))
        fast, direct = both(case)
        inputs = {"inputs": torch.randn(*shape).double()}
        assert_same(answers(fast, inputs).logits, answers(direct, inputs).logits, rtol=0, atol=1e-11)


def test_modalities_masked_missing_and_replaced_share_one_softmax(taken):
    case = tiny("multimodal")
    fast, direct = both(case)
    inputs = in_double(case.inputs(batch=3))["inputs"]
    masks = {"audio": torch.tensor([[1, 0], [0, 0], [1, 1]]), "image": torch.rand(3, 12) > 0.5}
    asked = {"image": None, "label": None}
    for given in (inputs, {n: v for n, v in inputs.items() if n != "audio"}):
        mask = {name: m for name, m in masks.items() if name in given}
        kwargs = {"attention_mask": mask, "output_points": asked}
        got, want = (answers(model, {"inputs": given}, **kwargs).logits for model in (fast, direct))
        assert_same(got, want, rtol=0, atol=1e-11)
    assert taken["read"] == 2


@pytest.mark.parametrize("which", ["some", "all", "none", "all of one example"])
def test_elements_that_a_token_stands_in_for_are_read_as_the_token(which):
    """Random elements, a whole modality (one element that counts 12 times), none; with a mask and without."""
    case = tiny("multimodal")
    fast, direct = both(case)
    inputs = in_double(case.inputs(batch=3))["inputs"]
    for masked in (False, True):
        results = []
        for model in (fast, direct):
            with torch.no_grad():
                array = model.preprocessor(inputs, None)
                part = array.parts["image"]
                torch.manual_seed(1)
                replaced = torch.rand(3, part.length) < 0.5
                replaced = {"some": replaced, "all": replaced | True, "none": replaced & False}.get(which, replaced)
                if which == "all of one example":
                    replaced = (torch.arange(3) == 1)[:, None].expand(-1, part.length)
                token = torch.linspace(-1, 1, model.preprocessor.channels, dtype=torch.float64)
                mask = torch.rand(3, part.length) < 0.7 if masked else None
                array.parts["image"] = replace(part, token=token, replaced=replaced, mask=mask)
                results.append(model.encoder(array))
        assert_same(*results, rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["video", "flow", "audio"])
def test_chosen_points_agree_and_those_that_differ_by_example_take_the_direct_form(name, taken):
    case = tiny(name)
    fast, direct = both(case)
    inputs = in_double(case.inputs(batch=2))
    for points in ([0, 3, 3, 1], [[0, 2], [4, 1]], []):
        asked = {"output_points": torch.tensor(points)}
        got, want = answers(fast, inputs, **asked).logits, answers(direct, inputs, **asked).logits
        assert_same(got, want, rtol=0, atol=1e-11)
    assert taken["write"] == 1


def test_free_coordinates_take_the_direct_form_and_agree(taken):
    case = tiny("video")
    fast, direct = both(case)
    inputs = in_double(case.inputs(batch=2))
    asked = {"coordinates": torch.rand(2, 5, 3).double() * 2 - 1}
    assert_same(answers(fast, inputs, **asked).logits, answers(direct, inputs, **asked).logits, rtol=0, atol=1e-11)
    assert taken["write"] == 0


class Largest(TorchDispatchMode):
    """Numbers in the largest tensor that was made."""

    numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in torch.utils._pytree.tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.numbers = max([self.numbers, *(x.untyped_storage().nbytes() // x.itemsize for x in made)])
        return out


@pytest.mark.parametrize("shape", [(2, 5000, 4), (2, 100, 50, 4)])
def test_long_arrays_and_few_latents_make_no_large_tensors(shape, taken):
    """None larger than the dense array of one example; elements times elements would be 25,000,000 numbers."""
    position = fourier(*shape[1:-1])
    preprocessor = grid({"kind": "values", "channels": 4}, position)
    case = flow_case(preprocessor=preprocessor, postprocessor={"kind": "projection", "num_outputs": 2})
    model = case.model(fast_attention="always")
    with Largest() as largest:
        answers(model, {"inputs": torch.randn(*shape)})
    assert taken == {"read": 1, "write": 1}
    assert largest.numbers <= 5000 * model.preprocessor.channels


# Where it steps aside


def layer_of(model):
    return model.encoder.cross_attends[0]


def test_by_default_it_is_chosen_by_cost(taken):
    """A class query is cheaper asked directly; a grid of 60 x 80 pixels is cheaper read fast, six are not."""
    changes = {"preprocessor": grid(PIXELS, fourier(60, 80, bands=40)), "d_latents": 64, "num_latents": 4}
    model = tiny("imagenet_fourier").model(**changes)
    answers(model, {"pixel_values": torch.randn(1, 3, 60, 80)})
    assert taken == {"read": 1, "write": 0}
    answers(tiny("language").model(), tiny("language").inputs())
    assert taken == {"read": 1, "write": 0}


def test_one_switch_turns_it_off(taken):
    answers(tiny("flow").model(fast_attention="never"), tiny("flow").inputs())
    assert taken == {"read": 0, "write": 0}
    with pytest.raises(ValueError, match="fast_attention"):
        config_of(fast_attention="sometimes")


def test_training_and_gradients_take_the_direct_form(taken):
    model = tiny("flow").model(fast_attention="always")
    model(**tiny("flow").inputs())
    model.train()
    answers(model, tiny("flow").inputs())
    assert taken == {"read": 0, "write": 0}


def test_attention_maps_are_still_given_when_asked_for_and_only_then_slow(taken):
    model = tiny("flow").model(PerceiverIOForOpticalFlow, fast_attention="always")
    model.set_attn_implementation("eager")
    inputs = tiny("flow").inputs()
    want = answers(model, inputs)
    assert taken == {"read": 1, "write": 1}
    maps = answers(model, inputs, output_attentions=True)
    assert taken == {"read": 1, "write": 1}
    assert [m.shape[-2:] for m in maps.cross_attentions] == [(4, 24), (24, 4)]
    assert_same(maps.logits, want.logits, rtol=1e-4, atol=1e-5)
    answers(model, inputs)
    assert taken == {"read": 2, "write": 2}


def changed(model, change):
    layer = layer_of(model)
    if change == "hook":
        layer.cross_attn.k_proj.register_forward_hook(lambda module, args, out: 2 * out)
    elif change == "subclass":
        layer.cross_attn.v_proj.__class__ = type("Adapted", (nn.Linear,), {})
    elif change == "quantised":
        layer.cross_attn.v_proj.weight = nn.Parameter(
            layer.cross_attn.v_proj.weight.to(torch.int8), requires_grad=False
        )
    return layer


@pytest.mark.parametrize("change", ["hook", "subclass", "quantised"])
def test_watched_and_changed_layers_take_the_direct_form(change):
    with torch.no_grad():
        assert can_replace(layer_of(tiny("flow").model(fast_attention="always")))
        assert not can_replace(changed(tiny("flow").model(fast_attention="always"), change))


def test_adapters_on_the_read_out_are_heard():
    """A read-out that is not a plain linear is called, not folded."""
    model = tiny("flow").model(fast_attention="always")
    inputs = tiny("flow").inputs()
    before = answers(model, inputs).logits
    model.postprocessor.projection.register_forward_hook(lambda module, args, out: 2 * out)
    assert_same(answers(model, inputs).logits, 2 * before, rtol=1e-4, atol=1e-5)


def test_the_meta_device_has_shapes_only():
    with torch.device("meta"):
        model = tiny("flow").model(large=False, fast_attention="always")
    inputs = {name: value.to("meta") for name, value in tiny("flow").inputs().items()}
    assert answers(model, inputs).logits.shape == (2, 4, 6, 2)


def test_autocast_takes_the_direct_form(taken):
    model = tiny("flow").model(fast_attention="always")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers(model, tiny("flow").inputs())
    assert taken == {"read": 0, "write": 0}


def test_it_is_never_traced():
    model = tiny("flow").model(fast_attention="always")
    inputs = tiny("flow").inputs(batch=1)
    with torch.no_grad():
        exported = torch.export.export(model, (), inputs)
        assert_same(exported.module()(**inputs).logits, model(**inputs).logits, rtol=1e-4, atol=1e-5)


def test_it_survives_a_round_trip(tmp_path):
    model = tiny("flow").model(fast_attention="always")
    model.save_pretrained(tmp_path)
    assert PerceiverIOModel.from_pretrained(tmp_path).config.fast_attention == "always"
