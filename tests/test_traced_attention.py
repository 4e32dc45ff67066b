"""The forms of fast_attention.py that can be exported equal the direct one; they run as they are, too."""

import pytest
import torch
from helpers import tiny

from hf_perceiver import traced_attention
from hf_perceiver.arrays import InputArray, QueryArray
from hf_perceiver.modeling_perceiver_io import linear_read_out


@pytest.mark.medium
@pytest.mark.parametrize(
    ("name", "fixed_size"),
    [("flow", True), ("flow", False), ("flow_separate", True), ("multimodal", False), ("reads_by_list", True)],
)
def test_the_traced_forms_equal_the_direct_one(name, fixed_size):
    """Both in float64: the same algebra to rounding. Of a fixed size, all rows of these grids are one step."""
    case = tiny(name)
    model = case.model().double()
    given = case.inputs(2)
    (given,) = ({k: v.double() for k, v in x.items()} if isinstance(x, dict) else x.double() for x in given.values())
    with torch.no_grad():
        array = InputArray.of(model.preprocessor(given))
        for layer in model.encoder.cross_attends:
            latents = torch.randn(2, *model.encoder.latents.weight.shape, dtype=torch.float64)
            got = traced_attention.TracedReader(layer, fixed_size)(latents, array)
            torch.testing.assert_close(got, layer(latents, array.dense()), rtol=0, atol=1e-11)
        if model.output_query is None or model.decoder.cross_attend.use_query_residual:
            return
        key_value = model.decoder.project(torch.randn(2, *model.encoder.latents.weight.shape, dtype=torch.float64))
        for part_name, part in QueryArray.of(model.output_query(array)):
            if traced_attention.is_on_grid(part):
                linear = linear_read_out(model.postprocessor, part_name)
                writer = traced_attention.TracedWriter(model.decoder.cross_attend, linear, None, fixed_size)
                got = writer(part, *key_value)
                want = model.decoder(part.dense(), key_value)
                want = model.postprocessor.read_out(want, part_name)
                torch.testing.assert_close(got, want.expand_as(got), rtol=0, atol=1e-11)


def test_only_large_grids_without_masks_take_them(monkeypatch):
    model = tiny("flow").model()
    inputs = tiny("flow").inputs(1)
    with traced_attention.traced_forms(model, inputs, True) as forms:
        assert forms == []
    monkeypatch.setattr(traced_attention, "FEWEST_SCORES", 1)
    with traced_attention.traced_forms(model, inputs, True) as forms:
        assert forms == ["traced_reader", "traced_writers"]
    assert not hasattr(model.decoder, "traced_writers") and not hasattr(model.encoder.cross_attends[0], "traced_reader")
    with traced_attention.traced_forms(model, {**inputs, "attention_mask": None}, True) as forms:
        assert forms == []
