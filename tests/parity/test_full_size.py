"""Three released sizes against DeepMind's JAX, with weights regenerated from their names; and all six parameter trees.

tests/reference/parity/fullsize holds values of the original code (jax 0.10.2, float32, CPU) at 1,000 to 2,200 places of
each array, statistics of the whole output, and checksums of the regenerated weights and inputs.
tests/reference/parity/manifests holds the parameter tree of each released model.

Tolerance: the issue's 1e-5, relative L2, on outputs, latents and what lies between. A right model is at most at 5e-6;
GELU in its erf form, the nearest wrong model, is at 1.8e-4. Fourier positions themselves cannot be had so exactly: a
rounding of 1e-7 in a coordinate is amplified by pi * max_resolution / 2, in JAX as here (test_positions.py).
"""

import hashlib
import json
import math
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from parity.deepmind import PARITY, at_the_boundary, flow_patches, relative, run
from torch import Tensor

from conversion.haiku_names import KINDS, convert_params, match_names
from hf_perceiver import PerceiverIOModel, recipes

RECIPES = {
    "masked_lm": recipes.language_bytes,
    "imagenet_learned": recipes.imagenet_learned,
    "imagenet_fourier": recipes.imagenet_fourier,
    "imagenet_conv": recipes.imagenet_conv,
    "optical_flow": recipes.optical_flow,
    "multimodal": recipes.multimodal_autoencoder,
}
TOLERANCE = 1e-5
# 2: trained positions, nothing to amplify.
MAX_RESOLUTION = {"masked_lm": 2, "imagenet_fourier": 224, "optical_flow": 496}


def manifest(name: str) -> dict[str, Any]:
    return json.loads((PARITY / "manifests" / f"{name}.json").read_text())


def arrays_of(tree: dict[str, Any]) -> dict[tuple[str, str], tuple[int, ...]]:
    return {(m, n): tuple(entry["shape"]) for m, names in tree.items() for n, entry in names.items()}


# --- every name and shape, on the meta device


@pytest.mark.parametrize("name", RECIPES)
def test_every_released_parameter_has_its_place_and_shape(name):
    with torch.device("meta"):
        model = PerceiverIOModel(RECIPES[name]())
    shapes = {n: tuple(t.shape) for n, t in model.state_dict().items()}
    if name == "masked_lm":
        del shapes["postprocessor.output_embedding.weight"]  # the embedding's
    theirs = arrays_of(manifest(name)["params"]) | arrays_of(manifest(name)["state"])
    moves = match_names(theirs, shapes)

    def layout(shape: tuple[int, ...], convert: Any) -> tuple[int, ...]:
        # A view: no memory for 200 million numbers.
        return convert(np.broadcast_to(np.float32(0), shape)).shape

    kept = [move for move in moves if move.target is not None]
    assert {m.target: layout(theirs[m.module, m.name], m.leaf.convert) for m in kept} == shapes
    assert {move.name for move in moves if move.target is None} <= {"hidden", "counter"}
    assert sum(p.numel() for p in model.parameters()) == manifest(name)["total_params"]


def test_every_dropped_array_has_its_reason():
    dropped = [leaf for kind in KINDS.values() for leaf in kind.values() if leaf.dropped]
    assert len(dropped) == 3 and all(len(leaf.dropped) > 20 for leaf in dropped)


# --- the numbers


def regenerate(tree: dict[str, Any]) -> tuple[dict[str, dict[str, np.ndarray]], str]:
    """The weights that the reference was made with, and their checksum."""
    params: dict[str, dict[str, np.ndarray]] = {}
    sums = []
    for (module, name), shape in sorted(arrays_of(tree).items(), key=lambda item: "/".join(item[0])):
        random = np.random.default_rng(zlib.crc32(f"{module}/{name}".encode()))
        value = random.standard_normal(shape, dtype=np.float32)
        if name == "w":
            value = value * np.float32(float(math.prod(shape[:-1])) ** -0.5)
        elif name == "scale":
            value = np.float32(1.0) + np.float32(0.1) * value
        else:
            value = np.float32(0.1) * value
        params.setdefault(module, {})[name] = value
        sums.append(f"{module}/{name} {hashlib.sha256(value.tobytes()).hexdigest()}")
    return params, hashlib.sha256("\n".join(sums).encode()).hexdigest()


def reference_inputs(name: str) -> dict[str, np.ndarray]:
    random = np.random.default_rng(zlib.crc32(f"input/{name}".encode()))
    if name == "imagenet_fourier":
        return {"images": random.standard_normal((1, 224, 224, 3), dtype=np.float32)}
    if name == "optical_flow":
        frames = random.random((1, 2, 368, 496, 3), dtype=np.float32)
        return {"images": frames * np.float32(2) - np.float32(1)}
    sentence = np.frombuffer(b"This is an incomplete sentence where some words are missing.", np.uint8)
    ids = np.zeros((2, 2048), np.int32)
    ids[0, :60] = sentence.astype(np.int32) + 6
    ids[0, 51:60] = 3
    ids[1] = random.integers(6, 262, 2048)
    mask = np.ones((2, 2048), np.int32)
    mask[0, 60:] = 0
    return {"inputs": ids, "input_mask": mask}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "wiring"),
    [("masked_lm", "masked-lm"), ("imagenet_fourier", "imagenet-fourier"), ("optical_flow", "optical-flow")],
)
def test_a_released_size_gives_deepminds_numbers(name, wiring, capsys):
    with np.load(PARITY / "fullsize" / f"{name}.npz") as stored:
        ref = dict(stored)
    params, checksum = regenerate(manifest(name)["params"])
    assert checksum == str(ref["sha256_all_params"]), "numpy draws other weights than those of the reference"
    inputs = reference_inputs(name)
    for what, value in inputs.items():
        assert hashlib.sha256(value.tobytes()).hexdigest() == str(ref[f"sha256_input_{what}"])

    model = PerceiverIOModel(RECIPES[name]()).eval()
    model.load_state_dict(convert_params(params, None, model), strict=True)
    del params
    rms: list[float] = []

    def keep(what: str, x: Tensor) -> Tensor | None:
        if what.startswith("z_after_self"):
            rms.append(float(x.double().square().mean().sqrt()))
        index = ref.get(f"{what}_index")
        if index is None:
            return None
        assert tuple(x.shape) == tuple(ref[f"{what}_shape"])
        return x.reshape(-1)[torch.from_numpy(index)].clone()

    got = run(model, keep=keep, **at_the_boundary(wiring, {n: torch.from_numpy(v) for n, v in inputs.items()}))
    out = got["outputs"] * (20 if name == "optical_flow" else 1)  # the notebook's scale: pixels
    assert tuple(out.shape) == tuple(ref["out_shape"])
    at = torch.from_numpy(ref["out_index"])
    errors = {"out": relative(out.reshape(-1)[at], torch.from_numpy(ref["out"]))}
    for what in ("z_after_cross", "z", "decoder_cross_out"):
        errors[what] = relative(got[what], torch.from_numpy(ref[what]))
    for what in ("encoder_inputs", "decoder_query"):
        rounding = 4e-7 * math.pi * MAX_RESOLUTION[name] / 2
        torch.testing.assert_close(got[what], torch.from_numpy(ref[what]), rtol=0, atol=rounding)
    worst = float((out.reshape(-1)[at] - torch.from_numpy(ref["out"])).abs().max())
    with capsys.disabled():
        print(f"\n{name}: max abs {worst:.1e}; relative L2 " + ", ".join(f"{n} {e:.1e}" for n, e in errors.items()))
    if name == "masked_lm":
        pieces = {"row 0 valid": (0, 800), "row 0 padded": (800, 1000), "row 1": (1000, 2200)}
        values, theirs = out.reshape(-1)[at], torch.from_numpy(ref["out"])
        for piece, (start, stop) in pieces.items():
            errors[piece] = relative(values[start:stop], theirs[start:stop])
            with capsys.disabled():
                print(f"  {piece}: {errors[piece]:.1e}")
    assert max(errors.values()) <= TOLERANCE, errors

    # The places are a sample; the statistics are of everything. 1e-5 of the spread, as above.
    x, spread = out.double(), float(ref["out_std"])
    for ours, theirs in (
        (x.mean(), ref["out_mean"]),
        (x.std(correction=0), ref["out_std"]),
        (x.min(), ref["out_min"]),
        (x.max(), ref["out_max"]),
    ):
        assert abs(float(ours) - float(theirs)) <= 1e-5 * spread
    channels = x.reshape(-1, x.shape[-1]).mean(dim=0)
    torch.testing.assert_close(channels, torch.from_numpy(ref["out_per_channel_mean"]), rtol=0, atol=1e-5 * spread)
    np.testing.assert_allclose(rms, ref["self_rms"], rtol=1e-5)


def test_flow_patches_are_each_pixels_neighbourhood():
    # What the references' inputs go through here: pixel (h, w), then neighbour row, column, colour.
    frames = torch.arange(2 * 3 * 4 * 5.0).reshape(1, 2, 3, 4, 5)
    patches = flow_patches(frames).reshape(1, 2, 3, 3, 3, 4, 5)
    assert torch.equal(patches[:, :, 1, 1], frames)
    assert torch.equal(patches[0, 1, 0, 2, :, 2, 1], frames[0, 1, :, 1, 2])
    assert not patches[:, :, 0, :, :, 0].any()
