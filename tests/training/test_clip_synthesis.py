"""Generated clips: what they hold, that the label is in picture and sound, and that the splits share nothing."""

import itertools
import time

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from hf_perceiver.training.clip_synthesis import (
    _PATTERNS,
    CLASSES,
    HARMONICS,
    MOTIONS,
    PITCHES,
    SHAPES,
    TEXTURES,
    Clips,
    ClipShape,
    make_clips,
)


@pytest.fixture(scope="module")
def clips():
    return make_clips(128, seed=3)


def test_clips_have_the_shapes_and_ranges_that_the_model_reads(clips):
    assert clips["image"].shape == (128, 16, 3, 32, 32) and clips["image"].dtype == np.float32
    assert clips["audio"].shape == (128, 5120, 1) and clips["audio"].dtype == np.float32
    assert clips["image"].min() >= 0 and clips["image"].max() <= 1
    assert np.abs(clips["audio"]).max() <= 1  # nothing is clipped
    assert clips["label"].shape == (128,) and set(clips["label"]) == set(range(16))  # 128 draws miss a class 1 in 200


def test_other_sizes_follow_the_clip_shape():
    shape = ClipShape(num_frames=4, size=16, samples_per_frame=80)
    made = make_clips(2, seed=0, shape=shape)
    assert made["image"].shape == (2, 4, 3, 16, 16) and made["audio"].shape == (2, 320, 1)
    assert shape.sampling_rate == 2000


def test_the_same_numbers_give_the_same_clips_and_others_give_others():
    first, again = make_clips(3, seed=5, batch=7), make_clips(3, seed=5, batch=7)
    for name in first:
        np.testing.assert_array_equal(first[name], again[name])
    for other in (make_clips(3, 6, 7), make_clips(3, 5, 8), make_clips(3, 5, 7, "held_out")):
        assert np.abs(first["image"] - other["image"]).max() > 0.1


def test_no_texture_family_is_in_both_splits():
    assert not set(TEXTURES["train"]) & set(TEXTURES["held_out"])
    assert set(TEXTURES["train"]) | set(TEXTURES["held_out"]) == set(_PATTERNS)


def test_every_class_is_a_shape_and_a_motion():
    assert list(CLASSES) == [f"{shape}, {motion}" for shape, motion in itertools.product(SHAPES, MOTIONS)]


def test_the_background_stands_still_and_the_shape_moves(clips):
    changed = np.abs(np.diff(clips["image"], axis=1)).max(axis=(1, 2)) > 0.02  # (B, H, W): at any time
    share = changed.mean(axis=(1, 2))
    assert share.min() > 0.02  # something moves in every clip
    assert share.max() < 0.9  # and never all of the picture


def test_only_the_pulse_changes_the_size_of_the_shape(clips):
    """Told from the tone, whose loudness follows the size: orbit swings too, slide and bounce are steady."""
    motion = clips["label"] % len(MOTIONS)
    loudness = np.sqrt((clips["audio"][..., 0].reshape(128, 16, 320) ** 2).mean(axis=2))
    swing = loudness.std(axis=1) / loudness.mean(axis=1)
    # A frame is 40 ms, some six periods of the lowest tone: its loudness is told to about a tenth.
    assert swing[motion <= 1].max() < 0.15 < swing[motion >= 2].min()


def test_the_pitch_tells_the_shape(clips):
    """The strongest frequency below the second harmonics lies in the shape's range, glides and swings included."""
    kind = clips["label"] // len(MOTIONS)
    spectrum = np.abs(np.fft.rfft(clips["audio"][..., 0] * np.hanning(5120), axis=1))
    pitch = spectrum.argmax(axis=1) * 8000 / 5120
    lowest = np.asarray(PITCHES)[kind]
    # A quarter octave of choice, 0.15 of an octave of glide or swing each way; the cross' two first harmonics are near.
    inside = (pitch > lowest * 2**-0.2) & (pitch < lowest * 2**0.45)
    assert inside[kind < 3].all()
    assert len(HARMONICS) == len(PITCHES) == len(SHAPES)


def test_edges_are_blended():
    """A shape's edge is not a staircase: some pixels lie between front and back, and moving it moves them."""
    made = make_clips(4, seed=1, shape=ClipShape(size=64, num_frames=4))
    values = made["image"][:, 0]
    # Hard edges would leave the two tones of shape and of background: 4 clips x 4 tones x 3 channels.
    assert len(np.unique(np.round(values, 3))) > 10 * 48


def test_the_stream_is_that_of_make_clips_whatever_the_workers():
    stream = list(itertools.islice(Clips(2, batch_size=3, start=4), 6))
    expected = [make_clips(3, 2, batch) for batch in (4, 5)]
    for i, example in enumerate(stream):
        np.testing.assert_array_equal(example["inputs"]["image"].numpy(), expected[i // 3]["image"][i % 3])
        assert int(example["inputs"]["label"]) == expected[i // 3]["label"][i % 3]


@pytest.mark.medium
def test_workers_give_the_same_batches_as_none():
    shape = ClipShape(num_frames=4, size=16, samples_per_frame=80)
    batches = []
    for workers in (0, 2):
        loader = DataLoader(Clips(2, batch_size=3, shape=shape), batch_size=3, num_workers=workers)
        batches.append([batch["inputs"]["image"] for batch in itertools.islice(loader, 4)])
    for one, other in zip(*batches, strict=True):
        assert torch.equal(one, other)


def test_clips_are_made_faster_than_they_are_trained_on():
    made = 0
    started = time.process_time()
    while time.process_time() - started < 0.3:
        make_clips(32, seed=0, batch=made)
        made += 32
    # About 570 a second of one core here; the goal is 100.
    assert made / (time.process_time() - started) > 100


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: make_clips(1, 0, split="test"), "split='test'"),
        (lambda: ClipShape(num_frames=1), "at least"),
        (lambda: Clips(0, batch_size=0), "batch_size=0"),
        (lambda: Clips(0, start=-1), "start=-1"),
    ],
)
def test_what_cannot_be_made_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
