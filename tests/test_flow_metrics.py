"""End-point errors and outliers, against a restatement pixel by pixel."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_perceiver.flow_metrics import FlowMetrics, flow_metrics

NAMES = ["epe", "1px", "3px", "5px", "fl_all", "epe_s0_10", "epe_s10_40", "epe_s40", "num_pixels"]


def random_pair(seed, height=9, width=11, error=3.0):
    """Lengths from 0 to about 100 pixels, so that every range of speeds has some."""
    rng = np.random.default_rng(seed)
    target = rng.normal(size=(height, width, 2)) * rng.choice([1, 15, 60], size=(height, width, 1))
    return target + rng.normal(size=target.shape) * error, target, rng.random((height, width)) < 0.7


def pixel_by_pixel(pairs):
    """The metrics over all pixels of (predicted, target, valid), by a double loop."""
    kept = {name: [] for name in NAMES[:-1]}
    for predicted, target, valid in pairs:
        for y, x in np.ndindex(valid.shape):
            if not valid[y, x]:
                continue
            error = math.dist(predicted[y, x], target[y, x])
            length = math.hypot(*target[y, x])
            kept["epe"].append(error)
            for limit in (1, 3, 5):
                kept[f"{limit}px"].append(error > limit)
            kept["fl_all"].append(error > 3 and (length == 0 or error / length > 0.05))
            kept["epe_s0_10" if length < 10 else "epe_s10_40" if length < 40 else "epe_s40"].append(error)
    means = {name: sum(values) / len(values) if values else None for name, values in kept.items()}
    return {**means, "num_pixels": len(kept["epe"])}


def assert_equal(metrics, wanted):
    assert {name for name in metrics if metrics[name] is None} == {name for name in wanted if wanted[name] is None}
    given = {name: value for name, value in metrics.items() if value is not None}
    # Sums of the same float64 numbers in another order.
    assert given == pytest.approx({name: wanted[name] for name in given}, rel=1e-12)


@given(st.integers(0, 10_000), st.sampled_from([0.1, 1.0, 3.0, 8.0]))
def test_metrics_equal_a_loop_over_pixels(seed, error):
    pair = random_pair(seed, 4, 6, error)
    assert_equal(flow_metrics(*pair), pixel_by_pixel([pair]))


def test_known_errors_give_known_numbers():
    target = np.array([[[0, 0], [30, 40], [100, 0], [6, 8], [0, 39]]], float)
    predicted = target + np.array([[[0, 0], [0, 2], [3.5, 0], [3, 4], [1.2, 0]]])
    assert flow_metrics(predicted, target) == {
        "epe": pytest.approx((0 + 2 + 3.5 + 5 + 1.2) / 5),
        "1px": 4 / 5,
        "3px": 2 / 5,
        "5px": 0,  # exactly 5 is not more than 5
        "fl_all": 1 / 5,  # 3.5 px are 3.5 % of 100 px
        "epe_s0_10": 0,
        "epe_s10_40": pytest.approx((5 + 1.2) / 2),  # 10 px are in the second range
        "epe_s40": pytest.approx((2 + 3.5) / 2),
        "num_pixels": 5,
    }


def test_an_exact_prediction_has_no_error():
    _, target, valid = random_pair(0)
    metrics = flow_metrics(target, target, valid)
    assert [metrics[name] for name in NAMES] == [0] * 8 + [valid.sum()]


def test_what_is_over_no_pixel_is_none():
    metrics = flow_metrics(np.zeros((2, 2, 2)), np.ones((2, 2, 2)))
    assert metrics["epe_s10_40"] is None and metrics["epe_s40"] is None
    metrics = flow_metrics(np.zeros((2, 2, 2)), np.full((2, 2, 2), np.nan), np.zeros((2, 2)))
    assert metrics == {**dict.fromkeys(NAMES[:-1]), "num_pixels": 0}


def test_float32_flow_is_measured_in_float64():
    predicted, target, valid = random_pair(0)
    predicted, target = predicted.astype(np.float32), target.astype(np.float32)
    wide = predicted.astype(np.float64), target.astype(np.float64), valid
    # Equal to 1e-12; differences taken in float32 are off by 1e-8 and more.
    assert_equal(flow_metrics(predicted, target, valid), pixel_by_pixel([wide]))


def test_torch_tensors_are_measured_too():
    import torch

    predicted, target, valid = random_pair(0)
    tensors = [torch.from_numpy(array) for array in (predicted, target, valid)]
    assert flow_metrics(*tensors) == flow_metrics(predicted, target, valid)


def test_a_data_set_is_averaged_over_pixels_or_over_pairs():
    pairs = [random_pair(0), random_pair(1, 3, 5, 8.0), random_pair(2, 6, 2, 0.5)]
    metrics = FlowMetrics()
    each = [metrics.update(*pair) for pair in pairs]
    assert each == [flow_metrics(*pair) for pair in pairs]
    assert_equal(metrics.per_pixel(), pixel_by_pixel(pairs))
    per_pair = metrics.per_pair()
    assert per_pair["epe"] == pytest.approx(np.mean([pair["epe"] for pair in each]))
    assert per_pair["fl_all"] == pytest.approx(np.mean([pair["fl_all"] for pair in each]))
    assert per_pair["num_pixels"] == sum(int(valid.sum()) for _, _, valid in pairs)
    assert abs(per_pair["epe"] - metrics.per_pixel()["epe"]) > 0.01


def test_a_pair_without_a_pixel_for_a_metric_is_left_out_of_it():
    slow, fast = np.ones((2, 2, 2)), np.full((2, 2, 2), 50.0)
    metrics = FlowMetrics()
    metrics.update(slow + np.array([1, 0]), slow)
    metrics.update(fast + np.array([3, 0]), fast)
    metrics.update(slow, slow, np.zeros((2, 2)))
    assert metrics.per_pair() == {**metrics.per_pixel(), "num_pixels": 8}
    assert metrics.per_pair()["epe"] == 2 and metrics.per_pair()["epe_s40"] == 3
    assert metrics.per_pair()["epe_s10_40"] is None


def test_no_pair_has_no_average():
    for average in (FlowMetrics().per_pixel, FlowMetrics().per_pair):
        with pytest.raises(ValueError, match="no pair was measured yet; call update"):
            average()


@pytest.mark.parametrize(
    ("predicted", "target", "message"),
    [
        (np.zeros((2, 3, 2)), np.zeros((3, 2, 2)), r"\(2, 3, 2\), the target flow \(3, 2, 2\)"),
        (np.zeros((2, 2, 3)), np.zeros((2, 3, 2)), r"predicted flow is \(H, W, 2\), x then y, not \(2, 2, 3\)"),
        (np.zeros((2, 3, 2)), np.zeros((1, 2, 3, 2)), r"target flow is \(H, W, 2\)"),
    ],
)
def test_flows_of_another_shape_are_refused(predicted, target, message):
    with pytest.raises(ValueError, match=message):
        flow_metrics(predicted, target)


def test_a_prediction_that_is_not_finite_is_located_wherever_it_is():
    predicted, target = np.zeros((4, 5, 2)), np.zeros((4, 5, 2))
    predicted[2, 3, 1] = np.nan
    for valid in (None, np.zeros((4, 5))):
        with pytest.raises(ValueError, match=r"predicted flow is \[0.0, nan\] at row 2, column 3"):
            flow_metrics(predicted, target, valid)


def test_a_failed_pair_is_not_counted():
    metrics = FlowMetrics()
    metrics.update(np.zeros((1, 1, 2)), np.ones((1, 1, 2)))
    with pytest.raises(ValueError, match=r"target flow is .* mark pixels without a known flow"):
        metrics.update(np.zeros((1, 1, 2)), np.full((1, 1, 2), np.nan))
    assert metrics.per_pixel()["num_pixels"] == 1
