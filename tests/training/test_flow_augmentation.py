"""Augmentation of pairs: colours may change, the flow stays exact."""

import cv2
import numpy as np
import pytest

from hf_perceiver.training.flow_augmentation import FlowAugmentation, flip, resize_and_crop
from hf_perceiver.training.flow_synthesis import FlowPair, FlowPairs, Scene, TextureBank, draw_pair

HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def bank():
    return TextureBank(seed=0, count=4)


@pytest.fixture(scope="module")
def pair(bank):
    return FlowPairs(bank, height=HEIGHT, width=WIDTH, max_motion=6.0, seed=3).pair(0)


def whole(pair: FlowPair) -> np.ndarray:
    return np.ones(pair.flow.shape[:2], bool)


def warped_back(pair: FlowPair) -> np.ndarray:
    ys, xs = np.mgrid[: pair.flow.shape[0], : pair.flow.shape[1]].astype(np.float32)
    frame = np.ascontiguousarray(pair.frames[1])
    return cv2.remap(frame, xs + pair.flow[..., 0], ys + pair.flow[..., 1], cv2.INTER_LINEAR).astype(float)


def photometric_error(pair: FlowPair, valid: np.ndarray) -> float:
    seen = valid & ~pair.occluded
    return float(np.median(np.abs(warped_back(pair) - pair.frames[0]).mean(axis=-1)[seen]))


@pytest.mark.parametrize(("left_right", "upside_down"), [(True, False), (False, True), (True, True)])
def test_flips_turn_the_flow_with_the_frames(pair, left_right, upside_down):
    flipped, valid = flip(pair, whole(pair), left_right, upside_down)
    assert valid.all()
    # Mirrored pixels are the same numbers, so that the error is the unflipped pair's.
    assert photometric_error(flipped, valid) == pytest.approx(photometric_error(pair, valid), abs=0.2)
    again, _ = flip(flipped, valid, left_right, upside_down)
    np.testing.assert_array_equal(again.frames, pair.frames)
    np.testing.assert_array_equal(again.flow, pair.flow)
    np.testing.assert_array_equal(again.backward_occluded, pair.backward_occluded)


def test_flow_of_a_shift_grows_with_the_scale_of_each_axis(bank):
    shift = draw_pair(np.random.default_rng(2), bank, HEIGHT, WIDTH, Scene(4.0, max_layers=0, affine=0, smooth=0))
    scaled, valid = resize_and_crop(shift, (HEIGHT * 2, WIDTH * 3), (10, 20))
    assert scaled.frames.shape == shift.frames.shape and valid.all()
    np.testing.assert_allclose(scaled.flow, shift.flow * np.float32([3, 2]), atol=1e-4)
    np.testing.assert_allclose(scaled.backward_flow, shift.backward_flow * np.float32([3, 2]), atol=1e-4)


def test_flow_of_a_scaled_pair_fits_its_frames_where_it_is_valid(pair):
    scaled, valid = resize_and_crop(pair, (60, 77), (6, 5))
    assert photometric_error(scaled, valid) < 3  # levels of 255, of frames interpolated three times
    assert 0.3 < valid.mean() < 1  # edges between layers have no label


def test_pixels_that_leave_the_cut_are_occluded(bank):
    shift = draw_pair(np.random.default_rng(2), bank, HEIGHT, WIDTH, Scene(4.0, max_layers=0, affine=0, smooth=0))
    scaled, _ = resize_and_crop(shift, (HEIGHT * 2, WIDTH * 2), (20, 30))
    ys, xs = np.mgrid[:HEIGHT, :WIDTH]
    x, y = xs + scaled.flow[..., 0], ys + scaled.flow[..., 1]
    gone = (x < 0) | (y < 0) | (x > WIDTH - 1) | (y > HEIGHT - 1)
    assert gone.any() and (scaled.occluded[gone]).all()


def test_no_severity_flips_and_changes_nothing_else(pair):
    augment = FlowAugmentation(flips=(0, 0))
    for seed in range(5):
        same, valid = augment(pair, np.random.default_rng(seed), severity=0.0)
        np.testing.assert_array_equal(same.frames, pair.frames)
        np.testing.assert_array_equal(same.flow, pair.flow)
        assert valid.all()


def test_colours_change_alike_in_both_frames_unless_asymmetric(bank):
    still = draw_pair(np.random.default_rng(1), bank, HEIGHT, WIDTH, Scene(0.0, max_layers=0))
    symmetric = FlowAugmentation(asymmetric=0, eraser=0, spatial=0, flips=(0, 0))
    changed, _ = symmetric(still, np.random.default_rng(0))
    np.testing.assert_array_equal(changed.frames[0], changed.frames[1])
    assert not np.array_equal(changed.frames[0], still.frames[0])
    each = FlowAugmentation(asymmetric=1, eraser=0, spatial=0, flips=(0, 0))
    apart, _ = each(still, np.random.default_rng(0))
    assert not np.array_equal(apart.frames[0], apart.frames[1])
    np.testing.assert_array_equal(apart.flow, still.flow)


def test_eraser_paints_boxes_of_the_second_frame_alone(pair):
    erase = FlowAugmentation(brightness=0, contrast=0, saturation=0, hue=0, eraser=1, spatial=0, flips=(0, 0))
    erased, _ = erase(pair, np.random.default_rng(0))
    # Colours that are not changed still go through floats and back.
    assert np.abs(erased.frames[0].astype(int) - pair.frames[0]).max() <= 1
    touched = (np.abs(erased.frames[1].astype(int) - pair.frames[1]) > 1).any(axis=-1)
    assert 0 < touched.mean() < 0.25


def test_severity_scales_how_much_changes(pair):
    def change(severity):
        augment = FlowAugmentation(asymmetric=0, eraser=0, spatial=0, flips=(0, 0))
        made = [augment(pair, np.random.default_rng(seed), severity)[0].frames for seed in range(10)]
        return np.mean([np.abs(frames.astype(int) - pair.frames).mean() for frames in made])

    # Ranges grow in proportion; clipped colours bend it.
    assert change(0.2) < 0.5 * change(1.0)


def test_scaled_pairs_keep_their_size_and_never_show_beyond_the_frame(pair):
    augment = FlowAugmentation(spatial=1.0, scale=(-1.0, 1.0))
    for seed in range(8):
        made, valid = augment(pair, np.random.default_rng(seed))
        assert made.frames.shape == pair.frames.shape and valid.shape == pair.flow.shape[:2]
        assert np.isfinite(made.flow).all()


def test_severity_beyond_one_is_refused(pair):
    with pytest.raises(ValueError, match=r"severity=1.5 goes from 0 to 1"):
        FlowAugmentation()(pair, np.random.default_rng(0), severity=1.5)
