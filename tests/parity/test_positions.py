"""Full-size Fourier positions against JAX's own.

tests/reference/parity/fullsize/fourier_reference.npz holds rows of each released model's positions as the original
makes them eagerly and under jit, its bands, and its coordinates.

Bound: coordinates and bands agree to about one unit in the last place, and the sine's argument multiplies that by
pi * f, f up to max_resolution / 2. JAX differs from itself (eager, jit) by up to half the bound, and by more than we do
from the exact positions.
"""

import math

import numpy as np
import pytest
import torch
from parity.deepmind import PARITY

from hf_perceiver.position_encoding import FourierPositionEncoding

# name -> grid, bands, max_resolution
GRIDS = {
    "imagenet_fourier": ((224, 224), 64, (224, 224)),
    "imagenet_conv": ((56, 56), 64, (56, 56)),
    "optical_flow": ((368, 496), 64, (368, 496)),
    "multimodal_audio": ((1920,), 192, (30_720,)),
    "multimodal_image": ((16, 56, 56), 32, (16, 56, 56)),
}
# Sub-sampled output points: -1 + 2 i / n, bands of another resolution than the grid's.
QUERIES = {
    "multimodal_image_query": ((16, 224, 224), 32, (16, 56, 56)),
    "multimodal_audio_query": ((1920,), 192, (30_720,)),
}


def rounding(max_resolution: tuple[int, ...]) -> float:
    return 4e-7 * math.pi * max(max_resolution) / 2


@pytest.fixture(scope="module")
def jax() -> dict[str, torch.Tensor]:
    with np.load(PARITY / "fullsize" / "fourier_reference.npz") as arrays:
        return {name: torch.from_numpy(value) for name, value in arrays.items()}


@pytest.mark.parametrize("name", GRIDS)
def test_grids_have_jax_positions_up_to_rounding(name, jax):
    grid, bands, resolution = GRIDS[name]
    encoding = FourierPositionEncoding(num_bands=bands, max_resolution=resolution)
    code = encoding.encode(grid, device=torch.device("cpu"), dtype=torch.float32)
    rows = jax[f"{name}/rows"]
    ours = code.select(rows).dense(0, len(rows))[0]
    for theirs in (jax[f"{name}/eager"], jax[f"{name}/jit"]):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=rounding(resolution))
    for axis, n in enumerate(grid):
        torch.testing.assert_close(torch.linspace(-1, 1, n), jax[f"{name}/linspace_{axis}"], rtol=0, atol=2.5e-7)


@pytest.mark.parametrize("name", QUERIES)
def test_sub_sampled_points_have_jax_positions_up_to_rounding(name, jax):
    grid, bands, resolution = QUERIES[name]
    encoding = FourierPositionEncoding(num_bands=bands, max_resolution=resolution, rule="sampled")
    code = encoding.encode(grid, device=torch.device("cpu"), dtype=torch.float32)
    points = jax[f"{name}/points"].long()
    ours = code.select(points).dense(0, len(points))[0]
    torch.testing.assert_close(ours[:, : len(grid)], jax[f"{name}/pos"], rtol=0, atol=2.5e-7)
    torch.testing.assert_close(ours, jax[f"{name}/eager"], rtol=0, atol=rounding(resolution))


@pytest.mark.parametrize("name", GRIDS)
def test_ours_are_as_near_the_exact_positions_as_jaxs(name, jax):
    grid, bands, resolution = GRIDS[name]
    encoding = FourierPositionEncoding(num_bands=bands, max_resolution=resolution)
    rows = jax[f"{name}/rows"]
    ours = encoding.encode(grid, device=torch.device("cpu"), dtype=torch.float32).select(rows).dense(0, len(rows))[0]
    indices = torch.from_numpy(np.stack(np.unravel_index(rows.numpy(), grid), axis=-1))
    steps = torch.tensor([max(n - 1, 1) for n in grid], dtype=torch.float64)
    positions = -1 + 2 * indices / steps  # (n, d), float64
    angles = [
        math.pi * positions[:, axis, None] * torch.linspace(1, r / 2, bands, dtype=torch.float64)
        for axis, r in enumerate(resolution)
    ]
    exact = torch.cat([positions, *(a.sin() for a in angles), *(a.cos() for a in angles)], dim=-1)
    error, theirs = (ours - exact).abs().max(), (jax[f"{name}/jit"] - exact).abs().max()
    assert error <= 1.5 * theirs
