"""Options that no released model uses, against DeepMind's JAX.

tests/reference/parity/options.{json,npz} were written by `conversion/dump_reference.py`, which ran the original,
unmodified code (jax 0.10.2, dm-haiku 0.0.17, float32, CPU, eager) on 55 small models: keyword arguments and parameter
shapes in the one, results in the other. Weights and inputs are drawn from their names, here as there.

Tolerance, relative L2: ours was at most at 6.8e-7; 3e-6 leaves room for another CPU's sums. The issue asks for 1e-5.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from parity.deepmind import PARITY, at_the_boundary, build, relative, run
from torch import Tensor

from conversion.dump_reference import CASES, draw_inputs, draw_weights

TOLERANCE = 3e-6
DESCRIBED: dict[str, Any] = json.loads((PARITY / "options.json").read_text())


@pytest.fixture(scope="module")
def results() -> Mapping[str, Mapping[str, Tensor]]:
    """case -> outputs (or outputs_<modality>), z, encoder_inputs, decoder_query"""
    found: dict[str, dict[str, Tensor]] = {name: {} for name in DESCRIBED}
    with np.load(PARITY / "options.npz") as arrays:
        for path, value in arrays.items():
            name, what = path.split("/")
            found[name][what] = torch.from_numpy(value)
    return found


def forward(name: str, **changes: Any) -> dict[str, Tensor]:
    case = DESCRIBED[name]
    arrays = {what: torch.from_numpy(value) for what, value in draw_inputs(name, case).items()}
    known = {"image_size": case["image_size"]} if "image_size" in case else {}
    model = build(case["wiring"], case["config"], *draw_weights(case["shapes"]), **known)
    inputs = at_the_boundary(case["wiring"], arrays)
    if "pos" in arrays:
        inputs["input_coordinates"] = arrays["pos"]
    got = run(model, **inputs, **changes)
    # A whole output grid has its shape here; the original leaves it flat, but for flow.
    return {what: x.flatten(1, -2) if what == "outputs_image" else x for what, x in got.items()}


def test_the_stored_cases_are_those_of_the_script():
    assert {name: {k: v for k, v in case.items() if k != "shapes"} for name, case in DESCRIBED.items()} == CASES


@pytest.mark.parametrize("name", DESCRIBED)
def test_from_raw_inputs_outputs_and_latents_equal_deepminds(name, results):
    got = forward(name)
    found = {what: relative(got[what], value) for what, value in results[name].items()}
    assert {"z", "encoder_inputs"} <= set(found) and any(what.startswith("outputs") for what in found)
    assert max(found.values()) <= TOLERANCE, found


@pytest.mark.parametrize("name", DESCRIBED)
def test_from_the_stored_encoder_inputs_outputs_and_latents_equal_deepminds(name, results):
    got = forward(name, encoder_inputs=results[name]["encoder_inputs"])
    found = {what: relative(got[what], value) for what, value in results[name].items()}
    assert max(found.values()) <= TOLERANCE, found


@torch.no_grad()
@pytest.mark.parametrize("name", ["text_fourier_query", "text_projected_query"])
def test_a_text_without_its_padding_gives_the_same_scores(name):
    # The original always asks the whole grid: a shorter text must ask the first of those positions, not its own grid.
    case = DESCRIBED[name]
    model = build(case["wiring"], case["config"], *draw_weights(case["shapes"]))
    ids = torch.from_numpy(draw_inputs(name, case)["inputs"]).long()
    mask = torch.ones_like(ids)
    mask[:, 13:] = 0
    padded, short = model(input_ids=ids, attention_mask=mask).logits, model(input_ids=ids[:, :13]).logits
    torch.testing.assert_close(short, padded[:, :13], rtol=0, atol=1e-5)


def test_weights_are_drawn_as_they_were():
    # Written down on the run that made the results: another stream would fail all the tests above, unexplained.
    params, state = draw_weights({"a/linear": {"w": [2, 3], "b": [3]}, "b/~/mean_ema": {"average": [1], "counter": []}})
    assert float(params["a/linear"]["b"][0]) == pytest.approx(0.08427467, abs=1e-7)
    assert params["a/linear"]["w"].shape == (2, 3) and state["b/~/mean_ema"]["counter"] == 7
