import math

import pytest
import torch
from helpers import fourier, trainable

from hf_perceiver.position_encoding import (
    AxisCode,
    CoordinateCode,
    FourierPositionEncoding,
    TableCode,
    build_position_encoding,
    take_rows,
    truncated_normal_,
    unravel,
)

CPU = {"device": torch.device("cpu"), "dtype": torch.float32}


def ready(spec):
    """A position encoding with drawn parameters."""
    module = build_position_encoding(spec)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter)
    return module


def dense(code):
    return code.dense(0, code.length)


def grid_coordinates(*sizes):
    axes = torch.meshgrid(*[torch.linspace(-1, 1, n) for n in sizes], indexing="ij")
    return torch.stack([axis.reshape(-1) for axis in axes], dim=-1)


def written_out(coordinates, num_bands, max_resolution, concat_pos=True, sine_only=False):
    """The formula of the paper's section on Fourier features, point by point and channel by channel, in float64."""
    rows = []
    for point in coordinates.double().tolist():
        bands = [[1 + k * (n / 2 - 1) / max(num_bands - 1, 1) for k in range(num_bands)] for n in max_resolution]
        angles = [math.pi * x * f for x, axis in zip(point, bands, strict=True) for f in axis]
        row = (point if concat_pos else []) + [math.sin(a) for a in angles]
        rows.append(row + ([] if sine_only else [math.cos(a) for a in angles]))
    return torch.tensor(rows, dtype=torch.float64)


# --- Fourier


@pytest.mark.parametrize("sizes", [(7,), (1,), (3, 5), (5, 1), (2, 3, 4)])
@pytest.mark.parametrize("concat_pos", [True, False])
@pytest.mark.parametrize("sine_only", [True, False])
@pytest.mark.parametrize("num_bands", [1, 3])
def test_fourier_codes_follow_the_formula(sizes, concat_pos, sine_only, num_bands):
    resolution = [11, 8, 6][: len(sizes)]
    module = FourierPositionEncoding(
        num_bands=num_bands, max_resolution=resolution, concat_pos=concat_pos, sine_only=sine_only
    )
    got = dense(module.encode(sizes, **CPU))
    want = written_out(grid_coordinates(*sizes), num_bands, resolution, concat_pos, sine_only)
    assert got.shape == (1, math.prod(sizes), module.channels)
    # A rounding of 1e-7 in a coordinate is amplified by pi * 11 / 2.
    torch.testing.assert_close(got[0].double(), want, rtol=0, atol=5e-6)


def test_released_bands_are_float32():
    """64 bands up to 112 are no short binary fractions, as those above are."""
    module = FourierPositionEncoding(num_bands=64, max_resolution=[224])
    want = written_out(grid_coordinates(50), 64, [224])
    # Roundings of 1e-7 in position and band, times pi * 112.
    torch.testing.assert_close(dense(module.encode((50,), **CPU))[0].double(), want, rtol=0, atol=1e-4)


def test_a_grid_is_coded_like_its_coordinates():
    module = ready(fourier(9, 7, bands=4))
    coordinates = grid_coordinates(4, 6)
    at = module.encode_at(coordinates, dtype=torch.float32)
    torch.testing.assert_close(dense(module.encode((4, 6), **CPU)), dense(at), rtol=0, atol=1e-6)


def test_coordinates_may_differ_by_example():
    module = ready(fourier(9, 7))
    coordinates = torch.rand(3, 5, 2) * 2 - 1
    together = module.encode_at(coordinates, dtype=torch.float32)
    assert together.batch_size == 3
    assert together.length == 5
    for row in range(3):
        alone = module.encode_at(coordinates[row], dtype=torch.float32)
        assert alone.batch_size == 1
        assert torch.equal(dense(together)[row], dense(alone)[0])


@pytest.mark.parametrize("n", [1, 4, 9])
def test_the_sampled_rule_divides_by_the_number_of_points(n):
    """DeepMind's -1 + 2 i / n for sub-sampled output points, which never reaches +1."""
    module = ready(fourier(16, bands=2, rule="sampled"))
    got = dense(module.encode((n,), **CPU))[0, :, 0]
    torch.testing.assert_close(got, torch.tensor([-1 + 2 * i / n for i in range(n)]))
    assert got.max() < 1


def test_the_dense_rule_reaches_both_ends():
    got = dense(ready(fourier(16)).encode((5,), **CPU))[0, :, 0]
    assert got.tolist() == [-1, -0.5, 0, 0.5, 1]


def test_the_index_rule_codes_a_point_alike_at_any_length():
    module = ready(fourier(16, rule="index"))
    assert torch.equal(dense(module.encode((16,), **CPU))[:, :5], dense(module.encode((5,), **CPU)))
    with pytest.raises(ValueError, match="17 positions are more than the 16 of max_resolution; shorten the input"):
        module.encode((17,), **CPU)


def test_max_resolution_may_differ_from_the_grid():
    """The released video queries: 16 x 224 x 224 points, bands for 16 x 56 x 56."""
    coarse, fine = ready(fourier(4, 4)), ready(fourier(8, 8))
    a, b = dense(coarse.encode((8, 8), **CPU)), dense(fine.encode((8, 8), **CPU))
    assert a.shape == b.shape
    assert torch.equal(a[..., :2], b[..., :2])
    assert not torch.equal(a[..., 2:], b[..., 2:])


def test_without_max_resolution_the_grid_gives_the_bands():
    module = ready({"kind": "fourier", "num_bands": 3, "num_axes": 2})
    assert torch.equal(dense(module.encode((4, 6), **CPU)), dense(ready(fourier(4, 6)).encode((4, 6), **CPU)))
    with pytest.raises(ValueError, match=r"coordinates have no grid to take the bands from; give .* max_resolution"):
        module.encode_at(torch.zeros(1, 2), dtype=torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_in_half_precision_are_float32_codes_rounded(dtype):
    """In bfloat16 itself, pi * 112 * x would be wrong by whole periods."""
    module = ready(fourier(224, 224, bands=64)).to(dtype)
    wide = dense(ready(fourier(224, 224, bands=64)).encode((20, 30), **CPU))
    assert torch.equal(dense(module.encode((20, 30), device=torch.device("cpu"), dtype=dtype)), wide.to(dtype))
    at = grid_coordinates(4, 5)
    wide_at = dense(module.encode_at(at, dtype=torch.float32))
    assert torch.equal(dense(module.encode_at(at, dtype=dtype)), wide_at.to(dtype))


def test_codes_for_float64_are_made_in_float32_too():
    """As transformers' built-in makes them, with which float64 models are compared."""
    module = ready(fourier(16, 16))
    got = dense(module.encode((5, 6), device=torch.device("cpu"), dtype=torch.float64))
    assert got.dtype == torch.float64
    assert torch.equal(got, dense(module.encode((5, 6), **CPU)).double())


def test_band_numbers_stand_where_the_bands_do():
    module = ready(fourier(8, 8, bands=3))
    assert module.code_channels().tolist() == [0, 0] + [1, 2, 3] * 4
    assert ready(fourier(8, bands=2, sine_only=True, concat_pos=False)).code_channels().tolist() == [1, 2]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bands": 2}, "needs max_resolution .one number per axis. or num_axes"),
        ({"num_bands": 0, "max_resolution": [4]}, "option 'num_bands' .* must be at least 1, not 0"),
        (
            {"num_bands": 2, "max_resolution": [4, 0]},
            r"'max_resolution' .* sizes of at least 1, one or more, not \[4, 0\]",
        ),
        ({"num_bands": 2, "max_resolution": []}, "'max_resolution' .* must hold sizes of at least 1, one or more"),
        ({"num_bands": 2, "num_axes": 0}, "'num_axes' .* must be at least 1, not 0; leave it out"),
        ({"num_bands": 2, "max_resolution": [4], "num_axes": 2}, r"max_resolution=\[4\] has not num_axes=2 entries"),
        ({"num_bands": 2, "max_resolution": [4], "rule": "even"}, "rule='even' must be one of dense, sampled, index"),
        ({"num_bands": 2, "num_axes": 1, "rule": "index"}, "rule='index' counts in steps of max_resolution"),
        ({"num_bands": 2, "max_resolution": 4}, "option 'max_resolution' .* must be of type .*Sequence.int"),
    ],
)
def test_bad_fourier_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_position_encoding({"kind": "fourier", **options})


def test_the_number_of_axes_is_checked():
    module = ready(fourier(8, 8))
    with pytest.raises(ValueError, match="a grid of 2x3x4 has 3 axes, the fourier position codes 2"):
        module.encode((2, 3, 4), **CPU)
    with pytest.raises(ValueError, match=r"coordinates of shape \(1, 5, 3\) has 3 axes"):
        module.encode_at(torch.zeros(5, 3), dtype=torch.float32)
    with pytest.raises(ValueError, match=r"coordinates are \(n, axes\) or \(batch, n, axes\), not \(2,\)"):
        module.encode_at(torch.zeros(2), dtype=torch.float32)


# --- trained


def test_a_shorter_input_uses_the_first_rows():
    module = ready(trainable(6, 4))
    assert torch.equal(dense(module.encode((4,), **CPU))[0], module.embeddings[:4])
    assert torch.equal(dense(module.encode((6,), **CPU))[0], module.embeddings)
    assert torch.equal(dense(module.encode((1,), **CPU))[0], module.embeddings[:1])


def test_a_longer_input_is_refused():
    with pytest.raises(ValueError, match="7 elements are more than the 6 trained positions; shorten the input"):
        ready(trainable(6, 4)).encode((7,), **CPU)


def test_another_grid_is_told_the_trained_one_and_how_to_interpolate():
    with pytest.raises(
        ValueError,
        match="64 trained positions cannot label a 7x9 grid; resize the input so that its grid is 8x8, or pass "
        "interpolate_pos_encoding=True",
    ):
        ready(trainable(64, 4)).encode((7, 9), **CPU)
    with pytest.raises(ValueError, match=r"cannot label a 4x6 grid; .* its grid is 6x4"):
        ready(trainable(24, 4, grid=[6, 4])).encode((4, 6), **CPU)


def test_a_way_out_that_is_none_is_not_offered():
    """2,048 positions are no square: nothing is known to interpolate from."""
    with pytest.raises(ValueError, match="2048 trained positions cannot label a 7x9 grid") as error:
        ready(trainable(2048, 1)).encode((7, 9), **CPU)
    assert "45" not in str(error.value)
    assert "interpolate" not in str(error.value)


@pytest.mark.parametrize("sizes", [(12,), (4, 3), (2, 3, 2)])
def test_interpolating_to_the_same_size_is_the_identity(sizes):
    module = ready(trainable(12, 5, grid=list(sizes)))
    got = dense(module.encode(sizes, **CPU, interpolate=True))
    assert torch.equal(got[0], module.embeddings)


@pytest.mark.parametrize(
    ("sizes", "other", "mode"),
    [
        ((4,), (9,), "linear"),
        ((4, 3), (7, 8), "bicubic"),
        ((4, 3), (2, 2), "bicubic"),
        ((2, 2, 3), (3, 4, 4), "trilinear"),
    ],
)
def test_interpolation_is_torchs_over_the_trained_grid(sizes, other, mode):
    module = ready(trainable(math.prod(sizes), 5, grid=list(sizes)))
    got = dense(module.encode(other, **CPU, interpolate=True))
    table = module.embeddings.T.reshape(1, 5, *sizes)
    want = torch.nn.functional.interpolate(table, size=other, mode=mode, align_corners=False)
    torch.testing.assert_close(got[0], want.reshape(5, -1).T, rtol=0, atol=0)
    got.sum().backward()
    assert module.embeddings.grad.abs().sum() > 0


def test_interpolation_keeps_the_dtype_and_works_in_float32():
    module = ready(trainable(12, 5, grid=[4, 3])).to(torch.bfloat16)
    got = dense(module.encode((5, 5), device=torch.device("cpu"), dtype=torch.bfloat16, interpolate=True))
    assert got.dtype == torch.bfloat16
    wide = ready(trainable(12, 5, grid=[4, 3]))
    wide.load_state_dict({"embeddings": module.embeddings.float()})
    assert torch.equal(got, dense(wide.encode((5, 5), **CPU, interpolate=True)).bfloat16())


def test_a_square_table_needs_no_grid_to_be_interpolated():
    module = ready(trainable(9, 4))
    assert dense(module.encode((4, 5), **CPU, interpolate=True)).shape == (1, 20, 4)
    with pytest.raises(ValueError, match=r"cannot interpolate 9 trained positions to \(2, 2, 2\): .* grid=\[...\]"):
        module.encode((2, 2, 2), **CPU, interpolate=True)
    with pytest.raises(ValueError, match="one to three axes, not 4"):
        ready(trainable(16, 4, grid=[2, 2, 2, 2])).encode((3, 3, 3, 3), **CPU, interpolate=True)


def test_trained_positions_have_no_coordinates():
    with pytest.raises(ValueError, match="cannot be asked at coordinates; a position of kind 'fourier' can"):
        ready(trainable(6, 4)).encode_at(torch.zeros(1, 1), dtype=torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_positions": 12, "channels": 4, "grid": [3, 3]}, r"grid=\[3, 3\] has 9 points, not num_positions=12"),
        ({"num_positions": 0, "channels": 4}, "must be at least 1"),
        ({"num_positions": 4, "channels": 0}, "must be at least 1"),
        ({"channels": 4}, "needs the option 'num_positions'"),
    ],
)
def test_bad_trainable_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build_position_encoding({"kind": "trainable", **options})


# --- projected


@pytest.mark.parametrize(("channels", "extra"), [(9, 0), (9, 1), (None, 2), (9, 3), (None, 0)])
def test_a_projection_is_a_linear_then_residual_linears(channels, extra):
    """DeepMind's loop: pos += linear(pos), a relu between two of them and none after the last."""
    base = fourier(6, 5)
    module = ready({"kind": "projected", "position": base, "channels": channels, "num_extra_mlps": extra})
    want = dense(ready(base).encode((4, 3), **CPU))
    if channels:
        want = torch.nn.functional.linear(want, module.project.weight, module.project.bias)
    for i, linear in enumerate(module.extra):
        want = want + linear(want)
        want = want.relu() if i < extra - 1 else want
    assert module.channels == (channels or 14)
    code = module.encode((4, 3), **CPU)
    assert (code.length, code.channels, code.batch_size) == (12, module.channels, 1)
    torch.testing.assert_close(dense(code), want)


def test_a_projection_takes_the_positions_own_width():
    module = ready({"kind": "projected", "position": trainable(12, 7), "channels": 3})
    assert module.project.in_features == 7


def test_a_projected_position_knows_what_its_position_knows():
    over_fourier = ready({"kind": "projected", "position": fourier(6, 5), "channels": 3})
    code = over_fourier.encode_at(torch.zeros(2, 4, 2), dtype=torch.float32)
    assert dense(code).shape == (2, 4, 3)
    assert code.batch_size == 2
    assert over_fourier.num_axes == 2
    over_table = ready({"kind": "projected", "position": trainable(12, 7, grid=[4, 3]), "channels": 3})
    assert dense(over_table.encode((5, 5), **CPU, interpolate=True)).shape == (1, 25, 3)
    with pytest.raises(ValueError, match="cannot be asked at coordinates"):
        over_table.encode_at(torch.zeros(1, 2), dtype=torch.float32)


@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float64])
def test_a_projection_casts_float32_codes_to_its_weights(weights):
    module = ready({"kind": "projected", "position": fourier(6, 5), "channels": 3}).to(weights)
    assert dense(module.encode((4, 3), **CPU)).dtype == weights


def test_no_position_is_none():
    assert build_position_encoding(None) is None
    assert build_position_encoding({"kind": "none"}) is None
    with pytest.raises(ValueError, match="needs a position to project, not kind 'none'"):
        build_position_encoding({"kind": "projected", "position": {"kind": "none"}, "channels": 3})


# --- codes: any part of them is the same part of the whole


def codes():
    module = ready(fourier(6, 5, rule="sampled"))
    projected = ready({"kind": "projected", "position": fourier(6, 5), "channels": 4})
    return {
        "axes": module.encode((4, 5), **CPU),
        "axes of points": module.encode((5, 8), **CPU).select(torch.arange(39, -1, -2)),
        "axes of points by example": module.encode((5, 8), **CPU).select(
            torch.stack([torch.arange(20), 39 - torch.arange(20)])
        ),
        "coordinates": module.encode_at(torch.rand(20, 2), dtype=torch.float32),
        "coordinates by example": module.encode_at(torch.rand(2, 20, 2), dtype=torch.float32),
        "table": TableCode(torch.randn(1, 20, 3)),
        "table by example": TableCode(torch.randn(2, 20, 3)),
        "projected": projected.encode((4, 5), **CPU),
    }


@pytest.mark.parametrize("name", codes())
def test_rows_of_a_code_are_rows_of_the_dense_code(name):
    code = codes()[name]
    whole = dense(code)
    assert (code.batch_size, code.length, code.channels) == tuple(whole.shape)
    for start, stop in ((0, 1), (3, 11), (19, 20), (7, 7), (0, 0)):
        torch.testing.assert_close(code.dense(start, stop), whole[:, start:stop], rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", codes())
@pytest.mark.parametrize("points", [torch.tensor([3, 0, 19, 3]), torch.tensor([[3, 0, 19, 3], [1, 2, 3, 4]])])
def test_chosen_points_of_a_code_are_rows_of_the_dense_code(name, points):
    code = codes()[name]
    whole = dense(code)
    chosen = code.select(points)
    assert chosen.length == 4
    assert chosen.channels == code.channels
    assert chosen.batch_size == max(code.batch_size, len(points) if points.ndim == 2 else 1)
    torch.testing.assert_close(dense(chosen), take_rows(whole, points), rtol=0, atol=1e-6)
    # Chosen again, chunk by chunk.
    again = chosen.select(torch.tensor([2, 0]))
    torch.testing.assert_close(dense(again), take_rows(whole, points)[:, [2, 0]], rtol=0, atol=1e-6)
    torch.testing.assert_close(chosen.dense(1, 3), take_rows(whole, points)[:, 1:3], rtol=0, atol=1e-6)


def test_a_code_of_a_grid_stays_small():
    code = ready(fourier(224, 224, bands=64)).encode((224, 224), **CPU)
    assert isinstance(code, AxisCode)
    assert sum(values.numel() for _, values in code.blocks) == 224 * 2 * 129
    assert isinstance(ready(fourier(8)).encode_at(torch.zeros(3, 1), dtype=torch.float32), CoordinateCode)


def test_flat_indices_count_the_last_axis_fastest():
    points = torch.arange(24)
    t, h, w = unravel(points, (2, 3, 4))
    assert torch.equal(t * 12 + h * 4 + w, points)
    assert t[-1] == 1 and h[-1] == 2 and w[-1] == 3


def test_rows_are_taken_for_all_or_for_each_example():
    table = torch.arange(12.0).reshape(2, 3, 2)
    assert torch.equal(take_rows(table, torch.tensor([2, 0])), table[:, [2, 0]])
    assert torch.equal(take_rows(table, torch.tensor([[2], [0]])), torch.stack([table[0, [2]], table[1, [0]]]))
    assert take_rows(table[:1], torch.tensor([[2], [0], [1]])).shape == (3, 1, 2)


def test_the_truncated_normal_is_cut_at_two_standard_deviations():
    tensor = torch.empty(100_000)
    truncated_normal_(tensor, 0.5)
    assert tensor.abs().max() <= 1.0
    # A normal cut at two standard deviations has 0.8796 of the uncut one's.
    assert abs(tensor.std().item() - 0.5 * 0.8796) < 5e-3
