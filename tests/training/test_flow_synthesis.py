"""Synthetic pairs: the flow is what moved the layers, the masks say what is hidden, a stream can be cut anywhere."""

import cv2
import numpy as np
import pytest
from torch.utils.data import DataLoader

from hf_perceiver.training.flow_synthesis import (
    HELD_OUT_FAMILIES,
    FlowPairs,
    Motion,
    Scene,
    TextureBank,
    draw_pair,
)

HEIGHT, WIDTH = 48, 64


@pytest.fixture(scope="module")
def bank():
    return TextureBank(seed=0, count=9)


@pytest.fixture(scope="module")
def pairs(bank):
    return FlowPairs(bank, height=HEIGHT, width=WIDTH, max_motion=9.6, seed=1)


def pixel_grid(height=HEIGHT, width=WIDTH):
    return np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)


def looked_up(picture, places):
    return cv2.remap(np.ascontiguousarray(picture), places[..., 0], places[..., 1], cv2.INTER_LINEAR).astype(float)


def away_from_edges(flow, by=2):
    """Pixels whose neighbours move alike: elsewhere the frames mix the colours of two layers."""
    kernel = np.ones((2 * by + 1,) * 2, np.uint8)
    flow = np.ascontiguousarray(flow)
    return (cv2.dilate(flow, kernel) - cv2.erode(flow, kernel)).max(axis=-1) < 1


@pytest.mark.parametrize("way", ["forward", "reversed"])
def test_second_frame_looked_up_along_the_flow_is_the_first_where_nothing_hides_it(pairs, way):
    errors, left_out = [], []
    for index in range(30):
        pair = pairs.pair(index) if way == "forward" else pairs.pair(index).reversed()
        seen = ~pair.occluded & away_from_edges(pair.flow)
        error = np.abs(looked_up(pair.frames[1], pixel_grid() + pair.flow) - pair.frames[0]).mean(axis=-1)
        errors.append(error[seen])
        left_out.append(np.abs(looked_up(pair.frames[1], pixel_grid()) - pair.frames[0]).mean(axis=-1)[seen])
    # Levels of 255. What is left is that of a texture interpolated twice; without the flow it is ten times as much.
    assert np.median(np.concatenate(errors)) < 1.5
    assert np.percentile(np.concatenate(errors), 95) < 8
    assert np.median(np.concatenate(left_out)) > 8


def test_flow_of_one_affine_layer_is_its_matrix(bank):
    scene = Scene(6.0, max_layers=0, affine=1.0, smooth=0.0)
    for seed in range(5):
        flow = draw_pair(np.random.default_rng(seed), bank, HEIGHT, WIDTH, scene).flow
        points = np.concatenate([pixel_grid(), np.ones((HEIGHT, WIDTH, 1))], axis=-1).reshape(-1, 3)
        fitted, *_ = np.linalg.lstsq(points, flow.reshape(-1, 2), rcond=None)
        # An affine map of the pixels' places to the last bit but float32's, which pixels up to 64 have 4e-6 of.
        np.testing.assert_allclose(points @ fitted, flow.reshape(-1, 2), atol=2e-5)


def test_flow_of_a_shift_is_the_same_everywhere_and_back(bank):
    scene = Scene(6.0, max_layers=0, affine=0.0, smooth=0.0)
    pair = draw_pair(np.random.default_rng(3), bank, HEIGHT, WIDTH, scene)
    assert np.ptp(pair.flow, axis=(0, 1)).max() < 2e-5
    np.testing.assert_allclose(pair.backward_flow, -pair.flow, atol=2e-5)
    inside = pixel_grid() + pair.flow
    outside = (inside < 0).any(-1) | (inside[..., 0] > WIDTH - 1) | (inside[..., 1] > HEIGHT - 1)
    np.testing.assert_array_equal(pair.occluded, outside)


def test_motions_are_inverted_to_a_hundredth_of_a_pixel():
    rng = np.random.default_rng(0)
    for _ in range(50):
        motion = Motion.draw(rng, box=(0, 0, 63, 47), size=64, scene=Scene(9.6, affine=1, smooth=1))
        found = motion.forward(motion.backward(pixel_grid()))
        np.testing.assert_allclose(found, pixel_grid(), atol=0.01)


def test_flow_and_backward_flow_lead_back_where_nothing_is_hidden(pairs):
    for index in range(20):
        pair = pairs.pair(index)
        there = pixel_grid() + pair.flow
        whole = looked_up(away_from_edges(pair.backward_flow).astype(np.float32), there) == 1
        seen = ~pair.occluded & away_from_edges(pair.flow) & whole
        back = np.stack([looked_up(pair.backward_flow[..., axis], there) for axis in range(2)], axis=-1)
        # Backward flow is interpolated between pixels, now and then of two layers that move almost alike.
        error = np.linalg.norm(pair.flow + back, axis=-1)[seen]
        assert np.quantile(error, 0.98) < 0.02, index


def test_largest_motion_is_kept_to_and_used(bank):
    for most in (3.0, 9.6):
        pairs = FlowPairs(bank, height=HEIGHT, width=WIDTH, max_motion=most)
        longest = [np.linalg.norm(pairs.pair(i).flow, axis=-1).max() for i in range(40)]
        # Anti-aliased edges reach half a pixel out of the polygon whose motion is bounded.
        assert max(longest) < most * 1.05
        assert max(longest) > most * 0.8


def test_what_a_front_layer_covers_is_occluded(bank):
    """By hand: where a pixel's own layer is in front again at the end of its flow, it is visible, else hidden."""
    found = 0
    for seed in range(10):
        pair = draw_pair(np.random.default_rng(seed), bank, HEIGHT, WIDTH, Scene(9.6, max_layers=3, affine=0, smooth=0))
        flow, backward = pair.flow, pair.backward_flow
        target = pixel_grid() + flow
        inside = ((target >= 0) & (target <= [WIDTH - 1, HEIGHT - 1])).all(-1)
        x, y = np.clip(np.rint(target), 0, [WIDTH - 1, HEIGHT - 1]).astype(int).transpose(2, 0, 1)
        same_layer = np.linalg.norm(backward[y, x] + flow, axis=-1) < 1e-3
        visible = inside & same_layer & away_from_edges(backward)[y, x] & away_from_edges(flow)
        hidden = inside & ~same_layer & away_from_edges(backward)[y, x] & away_from_edges(flow)
        assert not pair.occluded[visible].any()
        assert pair.occluded[hidden].all()
        found += hidden.sum()
    assert found > 50


def test_reversed_pair_swaps_everything(pairs):
    pair = pairs.pair(3)
    turned = pair.reversed()
    np.testing.assert_array_equal(turned.frames[0], pair.frames[1])
    np.testing.assert_array_equal(turned.flow, pair.backward_flow)
    np.testing.assert_array_equal(turned.occluded, pair.backward_occluded)
    np.testing.assert_array_equal(turned.reversed().flow, pair.flow)


def test_pairs_depend_on_seed_and_number_alone(bank, pairs):
    again = FlowPairs(bank, height=HEIGHT, width=WIDTH, max_motion=9.6, seed=1)
    again.pair(0)
    np.testing.assert_array_equal(again.pair(5).frames, pairs.pair(5).frames)
    other = FlowPairs(bank, height=HEIGHT, width=WIDTH, max_motion=9.6, seed=2)
    assert not np.array_equal(other.pair(5).frames, pairs.pair(5).frames)


def test_stream_begins_anywhere_and_is_shared_among_workers(bank):
    def stream(start):
        return FlowPairs(
            bank,
            height=16,
            width=16,
            max_motion=2.0,
            start=start,
            transform=lambda pair, rng, index: pair.flow[0, 0, 0],
        )

    def first(loader, n):
        return [float(value) for value, _ in zip(loader, range(n), strict=False)]

    whole = first(stream(0), 8)
    assert first(stream(3), 5) == whole[3:]
    shared = first(DataLoader(stream(0), batch_size=None, num_workers=2), 8)
    assert shared == whole


def test_schedule_says_what_each_pair_is_drawn_from(bank):
    pairs = FlowPairs(bank, height=HEIGHT, width=WIDTH, schedule=lambda i: Scene(0.0 if i < 2 else 8.0))
    assert not pairs.pair(1).flow.any() and pairs.pair(2).flow.any()


def test_banks_of_other_seeds_and_photos_share_no_texture():
    train = TextureBank(seed=0, count=6)
    held_out = TextureBank(seed=1, count=6, photos=("flower.jpg",), families=HELD_OUT_FAMILIES)
    assert not any(np.array_equal(a, b) for a in train.textures for b in held_out.textures)
    assert np.array_equal(train.textures, TextureBank(seed=0, count=6).textures)
    assert train.textures.shape == (6, 256, 256, 3) and train.textures.dtype == np.uint8


def test_every_texture_has_something_to_match_everywhere():
    for texture in TextureBank(seed=4, count=12, families=HELD_OUT_FAMILIES, photos=()).textures:
        blocks = texture.reshape(32, 8, 32, 8, 3).astype(float).std(axis=(1, 3)).mean(axis=-1)
        assert np.percentile(blocks, 5) > 0.5  # levels of 255


def test_bad_requests_are_named(bank):
    with pytest.raises(ValueError, match=r"count=0: .* at least one"):
        TextureBank(count=0)
    with pytest.raises(ValueError, match="unknown texture family 'tiles'; known: clouds"):
        TextureBank(families=("tiles",))
    with pytest.raises(ValueError, match=r"china.jpg and flower.jpg, not 'cat.jpg'"):
        TextureBank(photos=("cat.jpg",))
    with pytest.raises(ValueError, match=r"max_motion=-1"):
        Scene(-1)
    with pytest.raises(ValueError, match=r"smooth=2 is a share"):
        Scene(1, smooth=2)
    with pytest.raises(ValueError, match=r"frames of 4x64 are too small"):
        FlowPairs(bank, height=4, width=64, max_motion=1)
    with pytest.raises(ValueError, match="either max_motion or a schedule"):
        FlowPairs(bank, height=48, width=64)
