import copy
import io
import json
import pickle
import re

import pytest
import torch
from helpers import (
    CHECKPOINTING,
    CLASSES,
    HEADS,
    LENGTH,
    TINY,
    VOCAB,
    assert_same,
    config_of,
    fourier,
    grid,
    head_inputs,
    tensors,
    text_inputs,
    tiny,
    trainable,
)
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForMultipleChoice,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from hf_perceiver import (
    OutputQuery,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForMultipleChoice,
    PerceiverIOForOpticalFlow,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
    PerceiverIOModel,
    PositionEncoding,
    Postprocessor,
    Preprocessor,
    Stem,
    register_output_query,
    register_position_encoding,
    register_postprocessor,
    register_preprocessor,
    register_stem,
)
from hf_perceiver.position_encoding import TableCode
from hf_perceiver.registry import OUTPUT_QUERIES, POSITION_ENCODINGS, POSTPROCESSORS, PREPROCESSORS, STEMS

TEXT_HEADS = {
    AutoModelForMaskedLM: PerceiverIOForMaskedLM,
    AutoModelForSequenceClassification: PerceiverIOForSequenceClassification,
    AutoModelForTokenClassification: PerceiverIOForTokenClassification,
    AutoModelForQuestionAnswering: PerceiverIOForQuestionAnswering,
    AutoModelForMultipleChoice: PerceiverIOForMultipleChoice,
}
TEXTS = [name for name in TINY if "input_ids" in tiny(name).inputs()]
ASKED = [
    name for name in TINY if tiny(name).config.output_query is not None and name not in ("multimodal", "flow_upsampled")
]

REPLACED = "of the config are for another task; using"

# Two orders of summation in float64, through a dozen layers.
SHARP = {"rtol": 1e-9, "atol": 1e-9}


def double(given):
    """Inputs for a float64 model."""
    if isinstance(given, dict):
        return {name: double(value) for name, value in given.items()}
    return given.double() if isinstance(given, torch.Tensor) and given.is_floating_point() else given


def rows_of(given, rows):
    """Some examples of a batch of inputs."""
    if isinstance(given, dict):
        return {name: rows_of(value, rows) for name, value in given.items()}
    return given[rows]


def read(case, batch=2):
    """Positional input and mask of encode()."""
    given = case.inputs(batch)
    mask = given.pop("attention_mask", None)
    (value,) = given.values()
    return {"inputs": value, "attention_mask": mask}


def by_point(answer, batch):
    """(B, O, K) of any one-modality output."""
    return lambda count: answer.reshape(batch, count, -1)


# --- shapes

LOGITS = {
    "language": (9, VOCAB),
    "imagenet_learned": (5,),
    "imagenet_fourier": (5,),
    "imagenet_conv": (5,),
    "flow": (4, 6, 2),
    "flow_separate": (4, 6, 2),
    "flow_upsampled": (8, 12, 2),
    "original_shared": (5,),
    "original_unshared": (5,),
    "reads_by_list": (5,),
    "text_fourier": (9, VOCAB),
    "text_untied": (9, VOCAB),
    "text_classes": (5,),
    "text_average": (5,),
    "text_tasks": (3, 5),
    "text_set": (9, 5),
    "concat_query": (6, 5, 2),
    "added_positions": (12, 1),
    "deep_conv": (5,),
    "video": (4, 2, 3, 3),
    "audio": (15,),
    "values": (12, 5),
    "points": (7, 5),
    "bare_points": (5,),
    "vector": (5,),
}


def test_every_tiny_model_has_its_shape_here():
    assert {*LOGITS, "multimodal", "features_only"} == set(TINY)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", LOGITS)
def test_outputs_have_the_size_of_the_queries(name, batch):
    case = tiny(name)
    out = case.model()(**case.inputs(batch))
    assert tuple(out.logits.shape) == (batch, *LOGITS[name])
    assert tuple(out.last_hidden_state.shape) == (batch, 4, 16)
    assert torch.equal(out.pooler_output, out.last_hidden_state.mean(dim=1))
    assert torch.isfinite(out.logits).all()


def test_latents_come_first():
    """The feature-extraction pipeline takes the first output."""
    out = tiny("language").model()(**tiny("language").inputs())
    assert next(iter(out)) == "last_hidden_state"
    assert torch.equal(out[0], out.last_hidden_state)


def test_features_alone_need_no_output_side():
    case = tiny("features_only")
    model = case.model()
    assert model(**case.inputs()).logits is None
    with pytest.raises(ValueError, match="no postprocessor; there is nothing to decode, use encode"):
        model.decode(model.encode(**read(case)))


def test_decoding_can_be_left_out():
    case = tiny("language")
    model = case.model()
    out = model(**case.inputs(), decode=False)
    assert out.logits is None
    assert torch.equal(out.last_hidden_state, model(**case.inputs()).last_hidden_state)


@pytest.mark.parametrize("name", TINY)
def test_inputs_is_another_name_for_every_input(name):
    case = tiny(name)
    given = case.inputs()
    renamed = {("inputs" if n in ("input_ids", "pixel_values") else n): v for n, v in given.items()}
    model = case.model()
    assert_same(list(model(**renamed).values()), list(model(**given).values()))


def test_one_input_is_given_not_two_and_not_none():
    model = tiny("language").model()
    ids = torch.full((1, 4), 7)
    with pytest.raises(
        ValueError, match="give exactly one of input_ids, pixel_values, inputs; got input_ids and inputs"
    ):
        model(input_ids=ids, inputs=ids)
    with pytest.raises(ValueError, match="got none of them"):
        model()


@pytest.mark.parametrize(
    ("name", "wanted"), [("language", "input_ids"), ("imagenet_conv", "pixel_values"), ("multimodal", "inputs")]
)
def test_a_model_knows_the_name_of_its_input(name, wanted):
    others = [tiny(other).model() for other in ("language", "imagenet_conv", "multimodal")]
    assert tiny(name).model().main_input_name == wanted
    assert [m.main_input_name for m in others] == [
        "input_ids",
        "pixel_values",
        "inputs",
    ]  # one model's is not the others'
    assert all(head.main_input_name == wanted for head in tiny(name).heads)


@pytest.mark.parametrize("name", TINY)
def test_forward_is_encode_then_decode(name):
    case = tiny(name)
    model = case.model()
    out = model(**case.inputs())
    encoding = model.encode(**read(case))
    assert torch.equal(encoding.latents, out.last_hidden_state)
    if out.logits is not None:
        assert_same(model.decode(encoding), out.logits)


# --- any length, any size


@pytest.mark.parametrize("name", TEXTS)
@pytest.mark.parametrize("length", [1, 2, LENGTH])
def test_texts_of_any_length_are_read(name, length):
    case = tiny(name)
    out = case.model()(**text_inputs(2, length))
    if out.logits is not None and out.logits.shape[1:] != (5,) and name != "text_tasks":
        assert out.logits.shape[1] == length
    assert torch.isfinite(out.last_hidden_state).all()


def test_a_text_longer_than_the_positions_is_an_error_that_says_so():
    with pytest.raises(
        ValueError, match=f"{LENGTH + 1} elements are more than the {LENGTH} trained positions; shorten"
    ):
        tiny("language").model()(**text_inputs(2, LENGTH + 1))
    with pytest.raises(ValueError, match=f"{LENGTH + 1} positions are more than the {LENGTH} of max_resolution"):
        tiny("text_fourier").model()(**text_inputs(2, LENGTH + 1))


@pytest.mark.parametrize(
    "name", ["imagenet_fourier", "imagenet_conv", "deep_conv", "original_shared", "added_positions"]
)
@pytest.mark.parametrize("size", [(1, 1), (7, 3), (32, 5), (9, 16)])
def test_images_of_any_size_are_read(name, size):
    case = tiny(name)
    out = case.model()(pixel_values=torch.randn(2, 3, *size))
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (8, 5)])
def test_flow_of_any_size_comes_back_at_that_size(size):
    case = tiny("flow")
    assert case.model()(pixel_values=torch.randn(2, 2, 27, *size)).logits.shape == (2, *size, 2)


def test_sizes_of_every_modality_are_free():
    case = tiny("multimodal")
    inputs = {"image": torch.randn(2, 3, 3, 6, 2), "audio": torch.randn(2, 20, 1), "label": torch.randn(2, 5)}
    shapes = {n: tuple(v.shape) for n, v in case.model()(inputs=inputs).logits.items()}
    assert shapes == {"audio": (2, 20), "image": (2, 3, 6, 2, 3), "label": (2, 5)}


@pytest.mark.parametrize("size", [(8, 7), (3, 9), (6, 5)])
def test_other_image_sizes_than_trained_are_interpolated_on_request(size):
    case = tiny("imagenet_learned")
    model = case.model(PerceiverIOForImageClassification)
    pixels = torch.randn(2, 3, *size)
    if size == (6, 5):
        assert torch.equal(
            model(pixel_values=pixels).logits, model(pixel_values=pixels, interpolate_pos_encoding=True).logits
        )
        return
    with pytest.raises(
        ValueError, match="resize the input so that its grid is 6x5, or pass interpolate_pos_encoding=True"
    ):
        model(pixel_values=pixels)
    assert torch.isfinite(model(pixel_values=pixels, interpolate_pos_encoding=True).logits).all()


def test_trained_queries_are_interpolated_with_the_input():
    config = tiny("imagenet_learned").config
    config.output_query = {"kind": "position", "position": trainable(30, 8, grid=[6, 5])}
    config.postprocessor = {"kind": "projection", "num_outputs": 2, "on_grid": True}
    out = PerceiverIOModel(config)(pixel_values=torch.randn(1, 3, 8, 7), interpolate_pos_encoding=True)
    assert out.logits.shape == (1, 8, 7, 2)


# --- batches


@pytest.mark.parametrize("name", TEXTS)
def test_texts_of_unequal_length_in_a_batch_equal_single_ones(name):
    case = tiny(name)
    model, given = case.model().double(), case.inputs(4)
    together = model(**given)
    for row in range(4):
        length = int(given["attention_mask"][row].sum())
        alone = model(input_ids=given["input_ids"][row : row + 1, :length])
        torch.testing.assert_close(together.last_hidden_state[row : row + 1], alone.last_hidden_state, **SHARP)
        if together.logits is None:
            continue
        mine = together.logits[row : row + 1]
        per_token = mine.shape[1] == given["input_ids"].shape[1]
        torch.testing.assert_close(mine[:, :length] if per_token else mine, alone.logits, **SHARP)


@pytest.mark.parametrize("name", [name for name in TINY if name not in TEXTS])
def test_a_batch_equals_its_items(name):
    case = tiny(name)
    model, given = case.model().double(), double(case.inputs(3))
    together = model(**given)
    for row in range(3):
        alone = model(**rows_of(given, slice(row, row + 1)))
        assert_same(list(alone.values()), list(rows_of(dict(together), slice(row, row + 1)).values()), **SHARP)


def test_points_of_unequal_number_in_a_batch_equal_single_ones():
    case = tiny("points")
    model, given = case.model().double(), double(case.inputs(3))
    together = model(**given)
    for row in range(3):
        valid = given["attention_mask"][row].bool()
        alone = model(inputs=given["inputs"][row : row + 1, valid])
        torch.testing.assert_close(together.logits[row, valid], alone.logits[0], **SHARP)


def test_a_point_set_has_no_order():
    case = tiny("points")
    model, given = case.model().double(), double(case.inputs(2))
    order = torch.randperm(7)
    shuffled = {name: value[:, order] for name, value in given.items()}
    torch.testing.assert_close(model(**shuffled).logits, model(**given).logits[:, order], **SHARP)


def test_what_stands_in_masked_places_makes_no_difference():
    case = tiny("language")
    model, given = case.model(), case.inputs(3)
    other = {**given, "input_ids": torch.where(given["attention_mask"].bool(), given["input_ids"], 5)}
    assert_same(list(model(**given).values()), list(model(**other).values()))


def test_logits_of_padding_depend_on_the_position_only():
    """DeepMind passes the input mask as query mask: the output bias alone reaches a masked query."""
    case = tiny("language")
    logits = case.model()(**case.inputs(3)).logits
    torch.testing.assert_close(logits[1, 7:], logits[2, 7:], rtol=1e-5, atol=1e-5)
    assert not torch.allclose(logits[1, 0], logits[2, 0], atol=0.1)


@pytest.mark.parametrize("value", [1, 0])
def test_a_mask_of_one_value_is_no_mask_or_nothing_at_all(value):
    case = tiny("language")
    model, ids = case.model(), case.inputs()["input_ids"]
    out = model(input_ids=ids, attention_mask=torch.full_like(ids, value))
    assert torch.isfinite(out.logits).all()
    if value:
        torch.testing.assert_close(out.logits, model(input_ids=ids).logits, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(out.last_hidden_state[0], out.last_hidden_state[1])  # nothing was read


# --- attention backends


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", TINY)
def test_sdpa_equals_eager(name, dtype):
    case = tiny(name)
    given = double(case.inputs(3)) if dtype == torch.float64 else case.inputs(3)
    if "attention_mask" in given:
        given["attention_mask"][1] = 0  # a row with nothing to read
    model = case.model().to(dtype)
    results = []
    for implementation in ("eager", "sdpa"):
        model.set_attn_implementation(implementation)
        assert model.config._attn_implementation == implementation
        results.append(list(model(**given).values()))
    # Values reach about 30 here, through up to nine attentions.
    tolerance = {"rtol": 1e-3, "atol": 1e-3} if dtype == torch.float32 else SHARP
    assert_same(*results, **tolerance)


def test_the_backend_is_chosen_at_loading(tmp_path):
    case = tiny("language")
    case.model().save_pretrained(tmp_path)
    for implementation in ("eager", "sdpa"):
        model = AutoModel.from_pretrained(tmp_path, attn_implementation=implementation)
        assert model.encoder.blocks[0][0].self_attn.config._attn_implementation == implementation


# --- gradients

# The gradient of these is zero, and why.
NO_GRADIENT = {
    "multimodal": {
        "preprocessor.mask_tokens.audio": "masked with probability 0",
        "preprocessor.mask_tokens.image": "masked with probability 0",
        "preprocessor.padding.label": "every label is masked, its padding included",
    },
    "vector": {
        name: "attention over a single element is 1 whatever the query and the key"
        for name in (
            "encoder.cross_attends.0.cross_attn.q_proj.weight",
            "encoder.cross_attends.0.cross_attn.q_proj.bias",
            "encoder.cross_attends.0.cross_attn.k_proj.weight",
            "encoder.cross_attends.0.query_norm.weight",
            "encoder.cross_attends.0.query_norm.bias",
        )
    },
}


def checkpoint(model, options=None):
    getattr(model, f"{CHECKPOINTING}_enable")(options)


def backward(model, given):
    """Gradients of a random linear function of all outputs, by parameter."""
    model.zero_grad()
    out = model(**given)
    outputs = tensors(out.logits) if out.logits is not None else [out.last_hidden_state]
    generator = torch.Generator().manual_seed(5)
    loss = sum((t * torch.randn(t.shape, generator=generator, dtype=t.dtype)).sum() for t in outputs)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("name", TINY)
def test_gradients_reach_every_parameter(name):
    case = tiny(name)
    model = case.model().double().train()
    _, gradients = backward(model, double(case.inputs(3)))
    exceptions = NO_GRADIENT.get(name, {})
    assert set(exceptions) <= set(gradients)
    for parameter, gradient in gradients.items():
        if parameter in exceptions:
            assert gradient is None or gradient.abs().max() < 1e-12, parameter
        elif parameter.endswith("k_proj.bias"):
            # Added to every score of a query alike, which softmax takes away again.
            assert gradient.abs().max() < 1e-9, parameter
        else:
            assert gradient is not None and gradient.abs().max() > 1e-9, parameter


@pytest.mark.parametrize("name", TINY)
def test_gradient_checkpointing_changes_nothing(name):
    case = tiny(name)
    given = case.inputs(2)
    model = case.model().train()
    plain = copy.deepcopy(model)
    checkpoint(model)
    assert model.is_gradient_checkpointing
    calls = []
    # On a module inside the layer: the layer's own hooks stay outside of what is run again.
    model.encoder.cross_attends[0].cross_attn.register_forward_pre_hook(lambda *_: calls.append(1))
    loss, gradients = backward(model, given)
    wanted_loss, wanted = backward(plain, given)
    assert len(calls) > len([step for step, index in model.encoder.plan if (step, index) == ("read", 0)])  # run again
    assert torch.equal(loss, wanted_loss)
    for parameter, gradient in gradients.items():
        if wanted[parameter] is not None:
            torch.testing.assert_close(gradient, wanted[parameter], rtol=1e-5, atol=1e-5, msg=parameter)


@pytest.mark.parametrize("name", ["language", "imagenet_fourier", "flow", "multimodal"])
def test_adapters_on_a_frozen_model_get_gradients(name):
    """What PEFT does: freeze, checkpoint, enable_input_require_grads()."""
    case = tiny(name)
    model = case.model().train()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    checkpoint(model, {"use_reentrant": True})
    model.enable_input_require_grads()
    adapter = nn.Parameter(torch.zeros(16, 16))
    linear = model.encoder.blocks[0][0].self_attn.o_proj
    linear.register_forward_hook(lambda module, args, out: out + out @ adapter)
    out = model(**case.inputs())
    sum(t.sum() for t in tensors(out.logits)).backward()
    assert adapter.grad.abs().max() > 0
    model.disable_input_require_grads()
    assert not model(**case.inputs()).last_hidden_state.requires_grad or adapter.requires_grad


# --- what a model tells about itself


@pytest.mark.parametrize("name", TINY)
def test_hidden_states_and_attentions_of_every_call(name):
    case = tiny(name)
    model = case.model()
    model.set_attn_implementation("eager")
    config, given = case.config, case.inputs(3)
    out = model(**given, output_hidden_states=True, output_attentions=True)
    layers = config.num_blocks * config.num_self_attends_per_block
    reads = len(config.cross_attend_before_blocks)
    asks = 0 if model.decoder is None else len(tensors(out.logits)) if name == "multimodal" else 1
    assert len(out.hidden_states) == layers + 1
    assert all(h.shape == (3, 4, 16) for h in out.hidden_states)
    assert torch.equal(out.hidden_states[-1], out.last_hidden_state)
    assert [tuple(a.shape) for a in out.attentions] == [(3, config.num_self_attention_heads, 4, 4)] * layers
    assert len(out.cross_attentions) == reads + asks
    encoding = model.encode(**read(case, 3))
    for attention in out.cross_attentions[:reads]:
        assert attention.shape == (3, config.num_cross_attention_heads, 4, encoding.input_array.length)
    for attention in out.cross_attentions[reads:]:
        assert attention.shape[:2] == (3, config.decoder_num_heads) and attention.shape[3] == 4
    for attention in (*out.attentions, *out.cross_attentions):
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
    plain = model(**given)
    assert plain.hidden_states is None and plain.attentions is None and plain.cross_attentions is None
    assert_same(
        list(plain.values()),
        [out.last_hidden_state, out.pooler_output, out.logits]
        if asks or out.logits is not None
        else [out.last_hidden_state, out.pooler_output],
    )


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_a_tuple_has_what_the_dict_has(name, head):
    case = tiny(name)
    model, given = case.model(head), head_inputs(case, head, labels=True)
    as_dict, as_tuple = model(**given), model(**given, return_dict=False)
    assert isinstance(as_tuple, tuple)
    assert_same(list(as_tuple), list(as_dict.values()))


@pytest.mark.parametrize("name", TINY)
def test_the_base_models_tuple_has_what_the_dict_has(name):
    case = tiny(name)
    model = case.model()
    assert_same(list(model(**case.inputs(), return_dict=False)), list(model(**case.inputs()).values()))


@pytest.mark.parametrize("name", TINY)
def test_models_and_outputs_can_be_copied_and_pickled(name):
    case = tiny(name)
    model = case.model()
    out = model(**case.inputs())
    twin = copy.deepcopy(model)
    assert_same(list(twin(**case.inputs()).values()), list(out.values()))
    again = pickle.loads(pickle.dumps(out))
    assert type(again) is type(out)
    assert_same(list(again.values()), list(out.values()))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    assert_same(list(torch.load(buffer, weights_only=False)(**case.inputs()).values()), list(out.values()))
    encoding = pickle.loads(pickle.dumps(model.encode(**read(case))))
    if out.logits is not None:
        assert_same(model.decode(encoding), out.logits)


def test_a_copys_tied_weights_are_its_own():
    model = tiny("language").model()
    twin = copy.deepcopy(model)
    assert twin.get_input_embeddings().weight is twin.get_output_embeddings().weight
    assert twin.get_input_embeddings().weight is not model.get_input_embeddings().weight


@pytest.mark.parametrize("name", TINY)
def test_parameters_are_counted_once(name):
    model = tiny(name).model()
    assert model.num_parameters() == sum(p.numel() for p in model.parameters())
    assert model.num_parameters(only_trainable=True) == model.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) <= model.num_parameters()


# --- asking


@pytest.mark.parametrize("chunk_size", [1, 4, 5, 1000])
@pytest.mark.parametrize("name", [name for name in TINY if tiny(name).config.postprocessor is not None])
def test_chunks_equal_the_whole(name, chunk_size):
    case = tiny(name)
    model = case.model().double()
    given = {n: double(v) for n, v in read(case, 3).items()}
    encoding = model.encode(**given)
    assert_same(model.decode(encoding, chunk_size=chunk_size), model.decode(encoding), **SHARP)


@pytest.mark.parametrize("chunk_size", [0, -3, 2.5, True, "4"])
def test_a_chunk_has_a_query(chunk_size):
    case = tiny("language")
    with pytest.raises(ValueError, match=f"chunk_size is a whole number of queries from 1, .*not {chunk_size!r}"):
        case.model()(**case.inputs(), chunk_size=chunk_size)


def _dense_model():
    """Two outputs for every pixel of a 6 x 4 grid."""
    position = fourier(6, 4)
    query, answer = {"kind": "position", "position": position}, {"kind": "projection", "num_outputs": 2}
    pixels = grid({"kind": "pixels", "in_channels": 3}, position)
    return PerceiverIOModel(config_of(preprocessor=pixels, output_query=query, postprocessor=answer)).eval()


@pytest.mark.parametrize(
    "asked", [{"coordinates": torch.zeros(3, 5, 2)}, {"output_points": torch.zeros(3, 5, dtype=torch.long)}]
)
def test_questions_are_for_all_or_for_each(asked):
    model = _dense_model()
    encoding = model.encode(torch.rand(2, 3, 6, 4))
    with pytest.raises(ValueError, match="for 3 examples, and an encoding of 2; give one set for all, or one for each"):
        model.decode(encoding, **asked)
    # An encoding of one example answers any number of sets.
    assert model.decode(model.encode(torch.rand(1, 3, 6, 4)), **asked).shape == (3, 5, 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"inputs": [[1.0]]}, "a grid is a torch tensor, not list"),
        ({"attention_mask": [[1] * 24] * 2}, "a mask is a tensor over .* elements, 1 = valid, not list"),
        ({"input_coordinates": torch.zeros(3, 24, 2)}, "coordinates for 3 examples, in a batch of 2"),
        ({"input_coordinates": torch.zeros(24)}, r"coordinates are \(n, axes\) or \(batch, n, axes\), not \(24,\)"),
        ({"coordinates": "here"}, "coordinates must be a tensor or a list of numbers, not 'here'"),
        ({"output_points": {"image": [1]}}, "output_points must be a tensor or a list of numbers, not {'image'"),
        ({"query_mask": {"image": torch.ones(2, 24)}}, "no named modality; give the mask as one tensor"),
        ({"inputs": torch.rand(2, 3, 0, 4)}, "has nothing to read; no axis may be empty"),
    ],
)
def test_what_is_no_array_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        _dense_model()(**{"inputs": torch.rand(2, 3, 6, 4), **given})


def test_an_empty_list_asks_no_point():
    model = _dense_model()
    assert model(inputs=torch.rand(2, 3, 6, 4), output_points=[]).logits.shape == (2, 0, 2)


@pytest.mark.parametrize("chunk_size", [None, 2])
@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("name", ASKED)
def test_chosen_points_are_rows_of_the_whole(name, by_example, chunk_size):
    case = tiny(name)
    model = case.model().double()
    encoding = model.encode(**{n: double(v) for n, v in read(case, 2).items()})
    query = model.output_query(encoding.input_array)
    count = query.length
    whole = model.decode(encoding).reshape(2, count, -1)
    points = torch.randint(0, count, (2, 3) if by_example else (3,))
    chosen = model.decode(encoding, output_points=points, chunk_size=chunk_size).reshape(2, 3, -1)
    want = torch.stack([whole[b, points[b] if by_example else points] for b in range(2)])
    torch.testing.assert_close(chosen, want, **SHARP)


def test_no_point_gives_an_empty_answer():
    case = tiny("language")
    model = case.model(PerceiverIOForMaskedLM)
    for shape in ((0,), (2, 0)):
        labels = torch.zeros(2, 0, dtype=torch.long)
        out = model(**case.inputs(), output_points=torch.zeros(shape, dtype=torch.long), labels=labels)
        assert out.logits.shape == (2, 0, VOCAB)
        assert out.loss == 0


@pytest.mark.parametrize("points", [[9], [-1], [[0], [99]]])
def test_points_outside_the_output_are_refused(points):
    case = tiny("language")
    with pytest.raises(ValueError, match="lie outside the output grid of 9 points"):
        case.model()(**case.inputs(), output_points=torch.tensor(points))


def coordinates_of(name, count):
    """Where the points of a tiny model's output grid lie, by its rule."""
    grids = {
        "text_fourier": ([-1 + 2 * torch.arange(9) / LENGTH],),
        "added_positions": ([torch.linspace(-1, 1, 4), torch.linspace(-1, 1, 3)],),
        "video": ([-1 + 2 * torch.arange(n) / n for n in (4, 2, 3)],),
        "audio": ([-1 + 2 * torch.arange(5) / 5],),
    }
    (axes,) = grids[name]
    points = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).reshape(-1, len(axes))
    assert len(points) == count
    return points


@pytest.mark.parametrize("by_example", [False, True])
@pytest.mark.parametrize("name", ["text_fourier", "added_positions", "video", "audio"])
def test_coordinates_of_the_grid_give_what_the_grid_gives(name, by_example):
    case = tiny(name)
    model = case.model().double()
    given = {n: double(v) for n, v in read(case, 2).items()}
    given["attention_mask"] = None  # free coordinates are never masked
    encoding = model.encode(**given)
    count = model.output_query(encoding.input_array).length
    coordinates = coordinates_of(name, count)
    if by_example:
        coordinates = torch.stack([coordinates, coordinates.flip(0)])
    at = model.decode(encoding, coordinates=coordinates, chunk_size=4).reshape(2, count, -1)
    whole = model.decode(encoding).reshape(2, count, -1)
    want = torch.stack([whole[0], whole[1].flip(0)]) if by_example else whole
    # Codes are float32: a rounding of 1e-7 times pi times half the resolution.
    torch.testing.assert_close(at, want, rtol=1e-4, atol=1e-4)


def test_a_finer_grid_passes_through_the_coarse_one():
    case = tiny("added_positions")
    model = case.model().double()
    encoding = model.encode(**{n: double(v) for n, v in read(case, 2).items()})
    axes = [torch.linspace(-1, 1, 7), torch.linspace(-1, 1, 5)]
    fine = model.decode(encoding, coordinates=torch.cartesian_prod(*axes)).unflatten(1, (7, 5))
    torch.testing.assert_close(fine[:, ::2, ::2].flatten(1, 2), model.decode(encoding), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(fine[:, 1], fine[:, 0])


def test_modalities_are_asked_by_name():
    case = tiny("multimodal")
    model = case.model().double()
    encoding = model.encode(double(case.inputs(2)["inputs"]))
    whole = model.decode(encoding)
    assert list(whole) == ["audio", "image", "label"]
    points = {"image": torch.tensor([0, 47, 5]), "audio": torch.tensor([[1], [0]]), "label": None}
    some = model.decode(encoding, output_points=points, chunk_size=2)
    torch.testing.assert_close(some["image"], whole["image"].flatten(1, 3)[:, [0, 47, 5]], **SHARP)
    audio = whole["audio"].reshape(2, 2, 4)
    torch.testing.assert_close(some["audio"], torch.stack([audio[0, 1], audio[1, 0]]), **SHARP)
    torch.testing.assert_close(some["label"], whole["label"], **SHARP)
    assert list(model.decode(encoding, output_points={"label": None})) == ["label"]
    times = {"audio": -1 + 2 * torch.arange(2)[:, None] / 2}
    torch.testing.assert_close(model.decode(encoding, coordinates=times)["audio"], whole["audio"], rtol=1e-4, atol=1e-4)


def test_a_missing_modality_can_still_be_asked_for_where_its_grid_is_known():
    case = tiny("multimodal")
    given = case.inputs(2)["inputs"]
    model = case.model()
    silent = {"image": given["image"]}
    with pytest.raises(ValueError, match=r"has none here .* a missing modality"):
        model(inputs=silent)
    encoding = model.encode(silent)
    assert encoding.input_array.sizes == {"image": 12, "label": 1}
    out = model.decode(encoding, {"image": None, "label": None}, {"audio": torch.zeros(3, 1)})
    assert {n: tuple(v.shape) for n, v in out.items()} == {"audio": (2, 12), "image": (2, 2, 4, 6, 3), "label": (2, 5)}
    case.config.output_query["modalities"]["audio"]["grid"] = [2]
    assert case.model()(inputs=silent).logits["audio"].shape == (2, 8)


def test_the_label_of_the_autoencoder_may_be_missing():
    case = tiny("multimodal")
    model, given = case.model(PerceiverIOForMultimodalAutoencoding), case.inputs(2)["inputs"]
    without = {name: value for name, value in given.items() if name != "label"}
    for mode in (model.eval(), model.train()):
        assert_same(mode(inputs=without).logits, mode(inputs=given).logits)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        ({"inputs": {"depth": torch.zeros(1)}}, "unknown modality 'depth' in the input; known: audio, image, label"),
        ({"output_points": {"depth": None}}, "unknown modality 'depth' in output_points; known: audio, image, label"),
        ({"coordinates": {"depth": torch.zeros(1, 1)}}, "unknown modality 'depth' in coordinates"),
        ({"attention_mask": {"depth": torch.zeros(1, 1)}}, "unknown modality 'depth' in the mask"),
        ({"inputs": torch.zeros(1, 3)}, "a multimodal model reads a dict of audio, image, label, not Tensor"),
        ({"output_points": torch.tensor([0])}, "output_points of a multimodal model is a dict by modality, not Tensor"),
    ],
)
def test_unknown_modalities_are_refused(call, message):
    case = tiny("multimodal")
    with pytest.raises(ValueError, match=message):
        case.model(PerceiverIOForMultimodalAutoencoding)(**{**case.inputs(), **call})


def test_a_modality_without_a_read_out_is_refused():
    case = tiny("multimodal")
    del case.config.postprocessor["modalities"]["audio"]
    with pytest.raises(
        ValueError, match="asks for audio, which the postprocessor does not read out; it has image, label"
    ):
        case.model()


def test_masks_of_a_modality_hide_its_elements():
    case = tiny("multimodal")
    model, given = case.model(), case.inputs(2)["inputs"]
    mask = {"audio": torch.tensor([[1, 0], [1, 0]])}
    other = {**given, "audio": torch.cat([given["audio"][:, :4], torch.randn(2, 4, 1)], dim=1)}
    assert torch.equal(model.encode(given, mask).latents, model.encode(other, mask).latents)
    assert not torch.equal(model.encode(given).latents, model.encode(other).latents)


def test_training_masks_are_drawn_and_inference_is_deterministic():
    case = tiny("multimodal")
    case.config.preprocessor["mask_probs"]["image"] = 0.5
    model, given = case.model(), case.inputs(2)
    assert_same(model(**given).logits, model(**given).logits)
    model.train()
    torch.manual_seed(0)
    first, second = model(**given).logits["image"], model(**given).logits["image"]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(model(**given).logits["image"], first)


# --- the input's own places


def test_an_image_can_stand_at_given_coordinates():
    case = tiny("imagenet_fourier")
    model, pixels = case.model().double(), case.inputs(2)["pixel_values"].double()
    axes = torch.meshgrid(torch.linspace(-1, 1, 6), torch.linspace(-1, 1, 5), indexing="ij")
    coordinates = torch.stack(axes, dim=-1).reshape(-1, 2)
    usual = model(pixel_values=pixels).logits
    torch.testing.assert_close(
        model(pixel_values=pixels, input_coordinates=coordinates).logits, usual, rtol=1e-4, atol=1e-4
    )
    # Flipping the places is flipping the picture; each example has its own.
    each = torch.stack([coordinates, coordinates.flip(0)])
    got = model(pixel_values=pixels, input_coordinates=each).logits
    flipped = model(pixel_values=pixels.flip(2, 3)).logits
    torch.testing.assert_close(got, torch.stack([usual[0], flipped[1]]), rtol=1e-4, atol=1e-4)


def test_coordinates_of_one_modality_go_by_name():
    case = tiny("multimodal")
    model, given = case.model(), case.inputs(2)["inputs"]
    usual = model.encode(given).latents
    same = model.encode(given, input_coordinates={"audio": torch.tensor([[-1.0], [1.0]])}).latents
    torch.testing.assert_close(same, usual, rtol=1e-4, atol=1e-4)
    moved = model.encode(given, input_coordinates={"audio": torch.tensor([[-1.0], [0.2]])}).latents
    assert not torch.allclose(moved, usual, atol=1e-2)


# --- latents given at run time


@pytest.mark.parametrize("name", ["language", "multimodal", "original_shared", "reads_by_list"])
def test_latents_can_be_given(name):
    case = tiny(name)
    model, given = case.model(), case.inputs(2)
    trained = model.encoder.latents.weight
    assert_same(list(model(**given, latents=trained).values()), list(model(**given).values()))
    for latents in (torch.randn(7, 16), torch.randn(1, 7, 16), torch.randn(2, 7, 16)):
        out = model(**given, latents=latents)
        assert out.last_hidden_state.shape == (2, 7, 16)
        assert [t.shape for t in tensors(out.logits)] == [t.shape for t in tensors(model(**given).logits)]


def test_one_input_can_be_read_into_several_latent_arrays():
    case = tiny("language")
    model, given = case.model(), case.inputs(1)
    latents = torch.randn(3, 4, 16)
    together = model(**given, latents=latents)
    assert together.logits.shape == (3, 9, VOCAB)
    for row in range(3):
        torch.testing.assert_close(
            together.logits[row], model(**given, latents=latents[row]).logits[0], rtol=1e-4, atol=1e-4
        )


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((4, 15), r"latents are \(batch, N, 16\), not \(1, 4, 15\)"),
        ((16,), "latents are .batch, N, 16."),
        ((3, 4, 16), "3 latent arrays for a batch of 2; give one, or one for each"),
    ],
)
def test_bad_latents_are_refused(shape, message):
    case = tiny("language")
    with pytest.raises(ValueError, match=message):
        case.model()(**case.inputs(2), latents=torch.zeros(shape))


# --- nothing is computed twice


def count_calls(module):
    calls = []
    module.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("name", ["language", "flow", "multimodal"])
def test_keys_and_values_of_the_latents_are_projected_once_per_decode(name):
    case = tiny(name)
    model = case.model()
    attention = model.decoder.cross_attend.cross_attn
    keys, values, queries = (count_calls(m) for m in (attention.k_proj, attention.v_proj, attention.q_proj))
    encoder, preprocessor = count_calls(model.encoder), count_calls(model.preprocessor)
    encoding = model.encode(**read(case))
    model.decode(encoding, chunk_size=1)
    assert len(keys) == len(values) == 1
    assert len(queries) == model.output_query(encoding.input_array).length
    model.decode(encoding)
    assert len(keys) == len(values) == 2
    assert len(encoder) == len(preprocessor) == 1


# --- reading more than once

SHARINGS = [("all", 1), ("after_first", 2), ("none", 3), ([0, 1, 0], 2)]


@pytest.mark.parametrize(("reads", "held_reads"), SHARINGS)
@pytest.mark.parametrize(("blocks", "held_blocks"), SHARINGS)
def test_shared_weights_are_held_once_and_saved_once(reads, held_reads, blocks, held_blocks, tmp_path):
    case = tiny("original_shared")
    case.config.cross_attend_sharing, case.config.block_sharing = reads, blocks
    model = case.model()
    assert len(model.encoder.cross_attends) == held_reads
    assert len(model.encoder.blocks) == held_blocks
    one_read = sum(p.numel() for p in model.encoder.cross_attends[0].parameters())
    one_block = sum(p.numel() for p in model.encoder.blocks[0].parameters())
    rest = 4 * 16 + 16 * 5 + 5
    assert model.num_parameters() == held_reads * one_read + held_blocks * one_block + rest
    model.save_pretrained(tmp_path)
    loaded = PerceiverIOModel.from_pretrained(tmp_path)
    assert_same(list(loaded(**case.inputs()).values()), list(model(**case.inputs()).values()))


@pytest.mark.parametrize(("reads", "held_reads"), SHARINGS)
def test_unshared_weights_of_equal_values_give_what_shared_ones_give(reads, held_reads):
    shared = tiny("original_shared")
    shared.config.cross_attend_sharing, shared.config.block_sharing = reads, reads
    free = tiny("original_unshared")
    a, b = shared.model(), free.model()
    of_read, of_block = shared.config.weight_indices("cross_attend"), shared.config.weight_indices("block")
    for position in range(3):
        b.encoder.cross_attends[position].load_state_dict(a.encoder.cross_attends[of_read[position]].state_dict())
        b.encoder.blocks[position].load_state_dict(a.encoder.blocks[of_block[position]].state_dict())
    b.encoder.latents.load_state_dict(a.encoder.latents.state_dict())
    b.postprocessor.load_state_dict(a.postprocessor.state_dict())
    assert_same(list(a(**shared.inputs()).values()), list(b(**shared.inputs()).values()))


def test_reads_stand_where_the_config_says():
    model = tiny("reads_by_list").model()
    assert model.encoder.plan == [
        ("read", 0),
        ("read", 1),
        ("block", 0),
        ("block", 1),
        ("read", 0),
        ("read", 2),
        ("block", 0),
    ]


def test_a_model_may_only_read():
    config = tiny("language").config
    config.num_self_attends_per_block = 0
    model = PerceiverIOModel(config).eval()
    given = tiny("language").inputs()
    latents = model.encoder.latents()
    array = model.preprocessor(given["input_ids"], given["attention_mask"])
    want = model.encoder.cross_attends[0](latents, array.dense(), array.mask)
    assert torch.equal(model(**given).last_hidden_state, want)


@pytest.mark.parametrize("width", ["kv", "q"])
def test_whose_width_the_first_attention_takes(width):
    case = tiny("imagenet_fourier")  # 17 channels in, 16 in a latent
    case.config.cross_attention_shape_for_attention = width
    attention = case.model().encoder.cross_attends[0].cross_attn
    assert attention.q_proj.out_features == attention.v_proj.out_features == {"kv": 17, "q": 16}[width]


def test_the_original_perceiver_projects_the_mean_latent():
    case = tiny("original_shared")
    model = case.model()
    out = model(**case.inputs())
    assert model.decoder is None and model.output_query is None
    torch.testing.assert_close(out.logits, model.postprocessor.classifier(out.pooler_output))
    for question in ({"output_points": torch.tensor([0])}, {"coordinates": torch.zeros(1, 2)}):
        with pytest.raises(ValueError, match="reads its output from the latents, not from queries"):
            model(**case.inputs(), **question)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"postprocessor": {"kind": "average"}}, "'average' reads the latents themselves; set output_query=None"),
        ({"output_query": None}, "'tokens' reads decoded queries; give the config an output_query"),
        ({"preprocessor": {"kind": "txt"}}, "unknown preprocessor kind 'txt'; known kinds: .*text"),
        ({"output_query": {"kind": "positions"}}, "unknown output query kind 'positions'; known kinds: .*position"),
        ({"postprocessor": {"kind": "token"}}, "unknown postprocessor kind 'token'; known kinds: .*tokens"),
        ({"preprocessor": {"kind": "text", "channel": 12}}, "unknown option 'channel' for preprocessor kind 'text'"),
        ({"preprocessor": {"kind": "text", "channels": "12"}}, "option 'channels' .* must be of type int, not '12'"),
        (
            {"preprocessor": {"kind": "text", "channels": 12, "position": {"kind": "foo"}}},
            "unknown position encoding kind 'foo'",
        ),
        ({"postprocessor": {"kind": "tokens", "tied": "yes"}}, "option 'tied' .* must be of type bool, not 'yes'"),
    ],
)
def test_architectures_that_cannot_be_built_are_refused(changes, message):
    config = tiny("language").config
    for field, value in changes.items():
        setattr(config, field, value)
    with pytest.raises(ValueError, match=message):
        PerceiverIOModel(config)


# --- number formats


@pytest.mark.parametrize("cast_inputs", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", TINY)
def test_other_number_formats_stay_near_float32(name, dtype, cast_inputs):
    case = tiny(name)
    given = case.inputs(2)
    wide = case.model(large=False)
    with torch.no_grad():
        for head in (getattr(wide.postprocessor, n, None) for n in ("projection", "classifier")):
            if head is not None:
                head.weight.normal_(std=0.25)  # flow and average heads start at zero
    model = copy.deepcopy(wide).to(dtype)
    cast = (
        (
            lambda v: (
                {n: cast(x) for n, x in v.items()}
                if isinstance(v, dict)
                else v.to(dtype)
                if v.is_floating_point()
                else v
            )
        )
        if cast_inputs
        else (lambda v: v)
    )
    out, want = model(**cast(given)), wide(**given)
    # bfloat16 keeps 8 bits, float16 11; a dozen layers make errors a few times as large.
    tolerance = {torch.bfloat16: 0.05, torch.float16: 0.01, torch.float64: 1e-5}[dtype]
    for a, b in zip(tensors(list(out.values())), tensors(list(want.values())), strict=True):
        assert a.dtype == dtype
        assert (a.double() - b.double()).norm() <= tolerance * b.double().norm()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_positions_of_a_half_precision_model_are_float32_positions_rounded(dtype):
    case = tiny("flow")
    case.config.preprocessor["position"] = fourier(368, 496, bands=64)
    wide = case.model()
    half = copy.deepcopy(wide).to(dtype)
    pixels = torch.randn(1, 2, 27, 40, 30)
    codes = [m.preprocessor(pixels.to(t)).position.dense(0, 1200) for m, t in ((wide, torch.float32), (half, dtype))]
    assert codes[1].dtype == dtype
    assert torch.equal(codes[1], codes[0].to(dtype))


@pytest.mark.parametrize("name", ["language", "imagenet_conv", "multimodal"])
def test_a_checkpoint_is_loaded_in_another_number_format(name, tmp_path):
    case = tiny(name)
    case.model().save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert torch.isfinite(model.eval()(**case.inputs()).last_hidden_state).all()


def test_autocast_trains():
    case = tiny("flow")
    model = case.model().train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(**case.inputs())
    out.logits.float().sum().backward()
    assert all(p.grad is None or torch.isfinite(p.grad).all() for p in model.parameters())


# --- save and load


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert set(a) == set(b)
    for name in a:
        assert torch.equal(a[name], b[name]) and a[name].dtype == b[name].dtype, name


def reloaded(model):
    # Loaded tensors lie in the file's memory, where other addresses make convolutions take other paths.
    return copy.deepcopy(model).eval()


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("shards", ["5GB", "10KB"])
def test_a_model_is_loaded_bitwise(name, shards, tmp_path):
    case = tiny(name)
    model = case.model()
    model.save_pretrained(tmp_path, max_shard_size=shards)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shards == "10KB")
    loaded, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(loaded) is PerceiverIOModel
    assert_same_state(model, loaded)
    assert_same(list(reloaded(loaded)(**case.inputs()).values()), list(model(**case.inputs()).values()))
    wanted = {k: v for k, v in model.config.to_dict().items() if k != "_name_or_path"}
    assert {k: v for k, v in loaded.config.to_dict().items() if k != "_name_or_path"} == wanted


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_a_head_is_loaded_bitwise(name, head, tmp_path, caplog):
    case = tiny(name)
    model, given = case.model(head), head_inputs(case, head, labels=True)
    caplog.clear()
    model.save_pretrained(tmp_path)
    loaded, info = head.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert REPLACED not in caplog.text
    assert_same_state(model, loaded)
    assert_same(list(reloaded(loaded)(**given).values()), list(model(**given).values()))
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == [head.__name__]


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_a_heads_checkpoint_is_a_base_models_and_the_other_way_round(name, head, tmp_path):
    case = tiny(name)
    model = case.model(head)
    model.save_pretrained(tmp_path / "head")
    base, info = PerceiverIOModel.from_pretrained(tmp_path / "head", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_state(model.perceiver, base)
    base.save_pretrained(tmp_path / "base")
    again, info = head.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert_same_state(model, again)


@pytest.mark.parametrize(("auto", "head"), TEXT_HEADS.items())
def test_auto_classes_know_every_text_head(auto, head, tmp_path):
    tiny("language").model(head).save_pretrained(tmp_path)
    assert type(auto.from_pretrained(tmp_path)) is head


def test_the_auto_class_knows_the_image_head(tmp_path):
    tiny("imagenet_conv").model(PerceiverIOForImageClassification).save_pretrained(tmp_path)
    assert type(AutoModelForImageClassification.from_pretrained(tmp_path)) is PerceiverIOForImageClassification


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
@pytest.mark.parametrize("name", ["language", "multimodal", "imagenet_learned"])
def test_a_device_map_places_the_model(name, device_map, tmp_path):
    case = tiny(name)
    model = case.model()
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path, device_map=device_map).eval()
    assert_same(list(loaded(**case.inputs()).values()), list(model(**case.inputs()).values()), rtol=1e-5, atol=1e-5)


def test_the_encoder_can_be_offloaded(tmp_path):
    case = tiny("language")
    model = case.model()
    model.save_pretrained(tmp_path / "model")
    places = {name: "disk" if name == "encoder" else "cpu" for name, _ in model.named_children()}
    loaded = AutoModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off").eval()
    assert loaded.encoder.latents.weight.device.type == "meta"
    assert_same(list(loaded(**case.inputs()).values()), list(model(**case.inputs()).values()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["preprocessor", "encoder", "output_query", "decoder", "postprocessor"])
def test_trained_positions_can_be_offloaded(side, tmp_path):
    """Weights on the disk come back when their module is called, and positions are asked through `encode`."""
    case = tiny("text_untied")
    model = case.model()
    model.save_pretrained(tmp_path / "model")
    places = {child: "disk" if child == side else "cpu" for child, _ in model.named_children()}
    loaded = AutoModel.from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "off").eval()
    assert all(parameter.is_meta for parameter in getattr(loaded, side).parameters())
    assert_same(list(loaded(**case.inputs()).values()), list(model(**case.inputs()).values()), rtol=1e-5, atol=1e-5)


# --- embeddings


@pytest.mark.parametrize("cls", [PerceiverIOModel, PerceiverIOForMaskedLM])
@pytest.mark.parametrize("size", [VOCAB + 7, VOCAB - 5])
@pytest.mark.parametrize("name", ["language", "text_untied"])
def test_token_embeddings_can_be_resized(name, size, cls, tmp_path):
    case = tiny(name)
    model = case.model(cls)
    kept = min(size, VOCAB)
    given = {**case.inputs(), "input_ids": torch.randint(0, kept, (2, 9))}
    before = model(**given).logits
    old = [p.clone() for p in (model.get_input_embeddings().weight, *model.get_output_embeddings().parameters())]
    model.resize_token_embeddings(size)
    head = model.get_output_embeddings()
    for was, now in zip(old, (model.get_input_embeddings().weight, *head.parameters()), strict=True):
        assert now.shape[0] == size
        assert torch.equal(now[:kept], was[:kept])
    assert model.config.vocab_size == size
    assert (head.weight is model.get_input_embeddings().weight) == (name == "language")
    out = model(**given)
    assert out.logits.shape[-1] == size
    torch.testing.assert_close(out.logits[..., :kept], before[..., :kept], rtol=1e-4, atol=1e-4)
    model.save_pretrained(tmp_path)
    loaded = cls.from_pretrained(tmp_path).eval()
    assert loaded.config.vocab_size == size
    assert_same(loaded(**given).logits, out.logits)


@pytest.mark.parametrize("cls", [PerceiverIOModel, PerceiverIOForMaskedLM])
def test_tied_tokens_are_one_tensor_saved_once(cls, tmp_path):
    model = tiny("language").model(cls)
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    model.save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        names = set(file.keys())
    prefix = "" if cls is PerceiverIOModel else "perceiver."
    assert f"{prefix}preprocessor.embedding.weight" in names
    assert f"{prefix}postprocessor.output_embedding.weight" not in names
    assert f"{prefix}postprocessor.output_embedding.bias" in names
    loaded = cls.from_pretrained(tmp_path)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight


@pytest.mark.parametrize("cls", [PerceiverIOModel, PerceiverIOForMaskedLM])
def test_tying_can_be_switched_off(cls):
    model = tiny("text_untied").model(cls)
    assert model.get_output_embeddings().weight is not model.get_input_embeddings().weight
    assert len({id(p) for p in model.parameters()}) == len(list(model.parameters()))


def test_models_without_tokens_have_no_embeddings():
    model = tiny("imagenet_conv").model()
    assert model.get_input_embeddings() is None
    assert model.get_output_embeddings() is None


# --- a new head on an old checkpoint


def body(model):
    """The tensors that every head on the same input shares."""
    return {
        n: p
        for n, p in model.state_dict().items()
        if "preprocessor." in n.replace("postprocessor", "") or "encoder." in n
    }


@pytest.mark.parametrize("old", [PerceiverIOModel, *TEXT_HEADS.values()])
@pytest.mark.parametrize("new", TEXT_HEADS.values())
def test_any_text_head_goes_on_any_text_checkpoint(old, new, tmp_path, caplog):
    case = tiny("language")
    source = case.model(old)
    source.save_pretrained(tmp_path / "old")
    caplog.clear()
    model = new.from_pretrained(tmp_path / "old", num_labels=7, ignore_mismatched_sizes=True).eval()
    carried, kept = body(source), body(model)
    assert carried
    for name, value in carried.items():
        name = name if name in kept else f"perceiver.{name}"
        assert torch.equal(kept[name], value), name
    out = model(**head_inputs(case, new))
    wanted = {
        PerceiverIOForMaskedLM: (2, 9, VOCAB),
        PerceiverIOForSequenceClassification: (2, 7),
        PerceiverIOForTokenClassification: (2, 9, 7),
        PerceiverIOForQuestionAnswering: (2, 9),
        PerceiverIOForMultipleChoice: (2, 2),
    }[new]
    assert tuple(out[0].shape) == wanted
    # Said once where the output side is another; never where it fits.
    same = old is new or (old is PerceiverIOModel and new is PerceiverIOForMaskedLM)
    assert caplog.text.count(REPLACED) == (0 if same else 1)
    # Written back: the next loading finds it in order.
    model.save_pretrained(tmp_path / "new")
    caplog.clear()
    again, info = new.from_pretrained(tmp_path / "new", output_loading_info=True)
    assert REPLACED not in caplog.text
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert again.config.num_labels == 7
    assert_same_state(model, again)
    # And the plain model built from it is the same model.
    assert_same_state(PerceiverIOModel.from_pretrained(tmp_path / "new"), model.perceiver)


@pytest.mark.parametrize("name", ["text_classes", "text_average", "text_fourier", "text_untied"])
@pytest.mark.parametrize("head", TEXT_HEADS.values())
def test_heads_go_on_other_text_models_too(name, head, tmp_path):
    """Queries of another width than the embedding, no queries at all, tokens that are not tied."""
    case = tiny(name)
    model = PerceiverIOForSequenceClassification(case.config)
    model.save_pretrained(tmp_path / "old")
    new = head.from_pretrained(tmp_path / "old", ignore_mismatched_sizes=True).eval()
    assert all(torch.isfinite(t).all() for t in new(**head_inputs(case, head)).values())
    new.save_pretrained(tmp_path / "new")
    assert_same_state(head.from_pretrained(tmp_path / "new"), new)


@pytest.mark.parametrize("name", ["imagenet_fourier", "original_shared"])
def test_another_number_of_classes_needs_permission_and_keeps_the_rest(name, tmp_path):
    case = tiny(name)
    source = case.model(PerceiverIOForImageClassification)
    source.save_pretrained(tmp_path)
    with pytest.raises(RuntimeError, match="ignore_mismatched_sizes"):
        PerceiverIOForImageClassification.from_pretrained(tmp_path, num_labels=9)
    model = PerceiverIOForImageClassification.from_pretrained(
        tmp_path, num_labels=9, ignore_mismatched_sizes=True
    ).eval()
    assert model(**case.inputs()).logits.shape == (2, 9)
    for key, value in model.state_dict().items():
        if "classifier" not in key:
            assert torch.equal(value, source.state_dict()[key]), key


def test_an_explicit_width_gives_way_to_num_labels():
    """num_labels lives at the top level only; a head's read-out of another width is another task's."""
    config = tiny("text_classes").config
    config.postprocessor = {"kind": "classification", "num_outputs": 3, "hidden": 7}
    model = PerceiverIOForSequenceClassification(config)
    assert model.config.postprocessor == {"kind": "classification", "hidden": 7}
    assert model(**text_inputs(2)).logits.shape == (2, 5)


def test_a_head_does_not_change_the_config_it_is_given():
    config = tiny("language").config
    before = copy.deepcopy(config.to_dict())
    head = PerceiverIOForSequenceClassification(config)
    assert config.to_dict() == before
    assert head.config.postprocessor == {"kind": "classification"}
    assert head.perceiver.config is head.config
    assert PerceiverIOForMaskedLM(config)(**text_inputs(2)).logits.shape == (2, 9, VOCAB)


@pytest.mark.parametrize(
    ("head", "name", "message"),
    [
        (
            PerceiverIOForMaskedLM,
            "imagenet_conv",
            "PerceiverIOForMaskedLM reads text input, .* of kind 'grid'; .*recipes",
        ),
        (PerceiverIOForImageClassification, "language", "reads grid or points or multimodal input, .* of kind 'text'"),
        (PerceiverIOForOpticalFlow, "language", "reads grid input"),
        (PerceiverIOForMultimodalAutoencoding, "flow", "reads multimodal input"),
        (PerceiverIOForMaskedLM, "text_set", "asks at the input's positions, and .* has none to copy"),
    ],
)
def test_a_head_that_cannot_read_the_input_is_refused(head, name, message):
    config = tiny(name).config
    if name == "text_set":
        config.preprocessor.pop("position")
    with pytest.raises(ValueError, match=message):
        head(config)


def test_an_autoencoder_does_not_guess_what_to_reconstruct():
    config = tiny("multimodal").config
    config.output_query, config.postprocessor = None, None
    with pytest.raises(ValueError, match=r"cannot guess what to reconstruct; .*recipes.multimodal_autoencoder"):
        PerceiverIOForMultimodalAutoencoding(config)


def test_a_new_image_head_asks_with_one_class_query():
    config = tiny("flow").config
    model = PerceiverIOForImageClassification(config)
    assert model.config.output_query == {"kind": "tasks", "channels": model.perceiver.preprocessor.channels}


# --- losses


@pytest.mark.parametrize(
    ("name", "head"), [(n, h) for n, h in HEADS if "labels" in head_inputs(tiny(n), h, labels=True)]
)
def test_accumulated_losses_add_up(name, head):
    """Trainer gives the number of labels of all accumulated batches."""
    case = tiny(name)
    model = case.model(head).double()
    given = double(head_inputs(case, head, batch=4, labels=True))
    whole = model(**given).loss
    count = int((given["labels"] != -100).sum())
    parts = [model(**rows_of(given, slice(i, i + 2)), num_items_in_batch=count).loss for i in (0, 2)]
    torch.testing.assert_close(sum(parts), whole, **SHARP)


@pytest.mark.parametrize(("name", "head"), HEADS)
def test_the_loss_comes_first_and_only_with_labels(name, head):
    case = tiny(name)
    model = case.model(head)
    assert "loss" not in model(**head_inputs(case, head))
    out = model(**head_inputs(case, head, labels=True))
    if head is not PerceiverIOForMultimodalAutoencoding:
        assert next(iter(out)) == "loss"
        out.loss.backward()
        assert torch.isfinite(out.loss)


def test_masked_tokens_alone_can_be_learned():
    case = tiny("language")
    model, given = case.model(PerceiverIOForMaskedLM).double(), case.inputs(2)
    points = torch.tensor([[0, 3], [2, 5]])
    labels = torch.randint(0, VOCAB, (2, 9))
    ignored = torch.full_like(labels, -100).scatter(1, points, labels.gather(1, points))
    some = model(**given, output_points=points, labels=labels.gather(1, points)).loss
    torch.testing.assert_close(some, model(**given, labels=ignored).loss, **SHARP)


@pytest.mark.parametrize(
    ("num_labels", "labels", "problem"),
    [
        (5, torch.tensor([1, 4]), "single_label_classification"),
        (5, torch.tensor([[0.0, 1, 0, 0, 1], [1, 0, 0, 0, 0]]), "multi_label_classification"),
        (1, torch.tensor([0.3, -2.0]), "regression"),
    ],
)
@pytest.mark.parametrize("name", ["text_classes", "imagenet_fourier"])
def test_the_loss_follows_the_labels(name, num_labels, labels, problem):
    case = tiny(name)
    model = case.model(case.heads[0], num_labels=num_labels)
    out = model(**case.inputs(2), labels=labels)
    assert model.config.problem_type == problem
    functions = {
        "single_label_classification": nn.functional.cross_entropy,
        "multi_label_classification": nn.functional.binary_cross_entropy_with_logits,
        "regression": lambda x, y: nn.functional.mse_loss(x[:, 0], y),
    }
    torch.testing.assert_close(out.loss, functions[problem](out.logits, labels))


def test_answers_outside_the_text_are_left_out():
    case = tiny("language")
    model, given = case.model(PerceiverIOForQuestionAnswering), case.inputs(2)
    out = model(**given, start_positions=torch.tensor([1, 9]), end_positions=torch.tensor([[2], [-100]]))
    start = nn.functional.cross_entropy(out.start_logits[:1], torch.tensor([1]))
    end = nn.functional.cross_entropy(out.end_logits[:1], torch.tensor([2]))
    torch.testing.assert_close(out.loss, (start + end) / 2)
    assert model(**given, start_positions=torch.tensor([9, 9]), end_positions=torch.tensor([9, 9])).loss == 0


def test_choices_are_scored_one_by_one():
    case = tiny("language")
    model = case.model(PerceiverIOForMultipleChoice).double()
    given = head_inputs(case, PerceiverIOForMultipleChoice, batch=3)
    scores = model(**given).logits
    assert scores.shape == (3, 2)
    swapped = model(**{name: value.flip(1) for name, value in given.items()}).logits
    torch.testing.assert_close(swapped, scores.flip(1), **SHARP)
    with pytest.raises(ValueError, match=r"multiple choice reads \(batch, choices, length\) tokens, not \(2, 9\)"):
        model(**case.inputs(2))


# --- parts of one's own


@register_stem("test_rows")
class RowStem(Stem):
    """(B, C, H, W) -> (B, H, W * C)"""

    def __init__(self, *, width: int):
        super().__init__()
        self.channels = width
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return x.permute(0, 2, 3, 1).flatten(2) * self.scale


@register_position_encoding("test_ramp")
class RampEncoding(PositionEncoding):
    """How far along a single axis, times a trained vector."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels
        self.direction = nn.Parameter(torch.empty(channels))

    def reset_own_parameters(self):
        nn.init.normal_(self.direction)

    def encode(self, grid, *, device, dtype, interpolate=False):
        steps = torch.linspace(0, 1, grid[0], device=device, dtype=dtype)
        return TableCode((steps[:, None] * self.direction)[None])


@register_preprocessor("test_cloud")
class CloudPreprocessor(Preprocessor):
    """Point clouds (B, points, 3) -> (B, points, channels)"""

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels
        self.lift = nn.Linear(3, channels)

    def forward(self, inputs, mask=None):
        return self.lift(inputs)


@register_output_query("test_mean")
class MeanQuery(OutputQuery):
    """The input's mean asks, once for each of `repeats` trained offsets."""

    def __init__(self, *, preprocessor, repeats: int = 2):
        super().__init__()
        self.channels = preprocessor.channels
        self.offsets = nn.Parameter(torch.zeros(repeats, self.channels))

    def forward(self, input_array, output_points=None, coordinates=None):
        return input_array.dense().mean(dim=1, keepdim=True) + self.offsets


@register_postprocessor("test_norms")
class NormPostprocessor(Postprocessor):
    """The length of each decoded query, projected."""

    def __init__(self, *, in_channels: int, config):
        super().__init__()
        self.projection = nn.Linear(in_channels, config.num_labels)

    def read_out(self, decoded, modality=""):
        return self.projection(decoded).abs()


@register_postprocessor("test_whole")
class WholePostprocessor(nn.Module):
    """A plain module, which sees everything at once."""

    def __init__(self, *, in_channels: int):
        super().__init__()
        self.projection = nn.Linear(in_channels, 2)

    def forward(self, decoded, query):
        return self.projection(decoded).softmax(dim=1)


OWN = {
    "stem": (
        {"preprocessor": grid({"kind": "test_rows", "width": 15}, fourier(6)), **CLASSES},
        {"pixel_values": torch.randn(2, 3, 6, 5)},
        (2, 5),
    ),
    "position encoding": (
        {
            "preprocessor": {"kind": "text", "channels": 8, "position": {"kind": "test_ramp", "channels": 8}},
            "output_query": {"kind": "position", "position": {"kind": "test_ramp", "channels": 6}},
            "postprocessor": {"kind": "projection"},
        },
        {"input_ids": torch.arange(18).reshape(2, 9)},
        (2, 9, 5),
    ),
    # The README's example: a point cloud in, a label for each point out.
    "preprocessor": (
        {
            "preprocessor": {"kind": "test_cloud", "channels": 8},
            "output_query": {"kind": "input"},
            "postprocessor": {"kind": "projection"},
        },
        {"inputs": torch.randn(2, 11, 3)},
        (2, 11, 5),
    ),
    "output query": (
        {
            "preprocessor": {"kind": "text", "channels": 8},
            "output_query": {"kind": "test_mean", "repeats": 3},
            "postprocessor": {"kind": "projection"},
        },
        {"input_ids": torch.arange(18).reshape(2, 9)},
        (2, 3, 5),
    ),
    "postprocessor": (
        {
            "preprocessor": {"kind": "text", "channels": 8},
            "output_query": {"kind": "tasks", "channels": 8, "num_tasks": 4},
            "postprocessor": {"kind": "test_norms"},
        },
        {"input_ids": torch.arange(18).reshape(2, 9)},
        (2, 4, 5),
    ),
    "postprocessor of a plain module": (
        {
            "preprocessor": {"kind": "text", "channels": 8},
            "output_query": {"kind": "tasks", "channels": 8, "num_tasks": 4},
            "postprocessor": {"kind": "test_whole"},
        },
        {"input_ids": torch.arange(18).reshape(2, 9)},
        (2, 4, 2),
    ),
}
TABLES = {
    "test_rows": STEMS,
    "test_ramp": POSITION_ENCODINGS,
    "test_cloud": PREPROCESSORS,
    "test_mean": OUTPUT_QUERIES,
    "test_norms": POSTPROCESSORS,
    "test_whole": POSTPROCESSORS,
}


@pytest.mark.parametrize("part", OWN)
def test_a_part_of_ones_own_runs_saves_and_is_rebuilt(part, tmp_path):
    fields, given, shape = OWN[part]
    torch.manual_seed(0)
    model = PerceiverIOModel(config_of(**fields)).eval()
    out = model(**given)
    assert tuple(out.logits.shape) == shape
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert_same_state(model, loaded)
    assert_same(list(reloaded(loaded)(**given).values()), list(out.values()))
    assert_same(model(**given, chunk_size=2).logits, out.logits, rtol=1e-5, atol=1e-5)
    model.train()
    (out.last_hidden_state.sum() + out.logits.square().sum()).backward()
    own = [p for m in model.modules() if type(m).__module__ == __name__ for p in m.parameters()]
    assert own and all(p.grad is not None for p in own)


@pytest.mark.parametrize("kind", TABLES)
def test_loading_a_part_that_nothing_registered_says_which(kind, tmp_path, monkeypatch):
    fields, _, _ = next(f for f in OWN.values() if f'"{kind}"' in json.dumps(f[0]))
    PerceiverIOModel(config_of(**fields)).save_pretrained(tmp_path)
    monkeypatch.delitem(TABLES[kind].classes, kind)
    with pytest.raises(ValueError, match=f"{kind}"):
        AutoModel.from_pretrained(tmp_path)


def test_a_head_keeps_a_read_out_of_ones_own():
    fields, _, _ = OWN["postprocessor"]
    model = PerceiverIOForSequenceClassification(config_of(**fields))
    assert model.config.postprocessor == {"kind": "test_norms"}


def test_a_users_own_parameters_are_drawn_when_missing(tmp_path):
    from safetensors.torch import load_file, save_file

    fields, _, _ = OWN["position encoding"]
    PerceiverIOModel(config_of(**fields)).save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["preprocessor.position.direction"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    loaded = PerceiverIOModel.from_pretrained(tmp_path)
    drawn = loaded.preprocessor.position.direction
    assert torch.isfinite(drawn).all() and 0.1 < drawn.abs().max() < 10
    assert torch.equal(loaded.output_query.position.direction, state["output_query.position.direction"])


def test_every_message_of_a_bad_input_tells_the_value():
    """Errors of the tables above name what was given; here the sentence itself is looked at once."""
    with pytest.raises(ValueError) as error:
        tiny("language").model()(input_ids=torch.full((1, LENGTH + 3), 7))
    assert re.fullmatch(r"15 elements are more than the 12 trained positions; shorten the input", str(error.value))


def test_a_masked_query_attends_to_nothing():
    """As DeepMind's query_mask: the row changes, the others do not; the same through decode and in chunks."""
    case = tiny("concat_query")
    model, inputs = case.model().eval(), case.inputs()
    with torch.no_grad():
        whole = model(**inputs).logits.flatten(1, 2)
        mask = torch.ones(whole.shape[:2], dtype=torch.long)
        mask[:, 3] = 0
        masked = model(**inputs, query_mask=mask, chunk_size=4).logits.flatten(1, 2)
        again = model.decode(model.encode(next(iter(inputs.values()))), query_mask=mask).flatten(1, 2)
    torch.testing.assert_close(masked[:, :3], whole[:, :3], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked[:, 4:], whole[:, 4:], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked, again, atol=1e-5, rtol=1e-5)
    assert (masked[:, 3] - whole[:, 3]).abs().max() > 1e-3


def test_a_query_mask_of_another_shape_or_modality_is_refused():
    case = tiny("concat_query")
    with pytest.raises(ValueError, match="mask over"):
        case.model()(**case.inputs(), query_mask=torch.ones(1, 5))
    case = tiny("multimodal")
    with pytest.raises(ValueError, match="unknown modality 'smell' in the query mask"):
        case.model()(**case.inputs(), query_mask={"smell": torch.ones(2, 1)})
    with torch.no_grad():
        hidden = case.model().eval()(**case.inputs(), query_mask={"label": torch.zeros(2, 1)}).logits["label"]
    torch.testing.assert_close(hidden[0], hidden[1])


def test_a_class_query_may_be_a_position_of_one_point():
    query = {"kind": "position", "position": {"kind": "trainable", "num_positions": 1, "channels": 16}, "grid": [1]}
    config = tiny("imagenet_fourier").config
    config.output_query = {**query, "position": {**query["position"], "channels": config.d_latents}}
    model = PerceiverIOForImageClassification(config)
    assert model.config.output_query["kind"] == "position"
    assert model(**tiny("imagenet_fourier").inputs()).logits.shape[-1] == config.num_labels


def test_damaged_weights_are_said_with_the_way_out(tmp_path):
    tiny("imagenet_fourier").model().save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"damaged.*download it again"):
        PerceiverIOModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("side", ["preprocessor", "encoder", "output_query", "decoder", "postprocessor"])
@pytest.mark.parametrize("name", ["multimodal", "imagenet_learned"])
def test_sides_of_the_model_can_be_offloaded(name, side, tmp_path):
    case = tiny(name)
    model = case.model().eval()
    model.save_pretrained(tmp_path)
    sides = ("preprocessor", "encoder", "output_query", "decoder", "postprocessor")
    places = {part: "disk" if part == side else "cpu" for part in sides}
    loaded = PerceiverIOModel.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    with torch.no_grad():
        want, got = model(**case.inputs()).logits, loaded(**case.inputs()).logits
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["language", "imagenet_fourier", "multimodal", "flow"])
def test_an_empty_batch_is_refused(name):
    case = tiny(name)
    empty = {k: {n: v[:0] for n, v in x.items()} if isinstance(x, dict) else x[:0] for k, x in case.inputs().items()}
    with pytest.raises(ValueError, match="the batch is empty"):
        case.model()(**empty)
