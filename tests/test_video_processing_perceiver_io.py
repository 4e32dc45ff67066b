"""Frames -> windows of video as the original's, and back; files, rates, windows, save and load, the pipeline."""

import numpy as np
import pytest
import torch
from helpers import CLASSES, PIXELS, config_of, enlarge, fourier, grid
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from transformers import pipeline
from transformers.models.auto.image_processing_auto import AutoImageProcessor
from transformers.models.auto.video_processing_auto import AutoVideoProcessor

from hf_perceiver import PerceiverIOForVideoClassification, PerceiverIOVideoProcessor
from hf_perceiver.media_files import VideoWriter

SMALL = {"size": {"height": 6, "width": 5}, "num_frames": 4}


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def notebook_frame(frame: np.ndarray, interpolation: str = "bilinear") -> np.ndarray:
    """crop_center_square and cv2.resize as the notebook calls them, with its division by 255."""
    cv2 = pytest.importorskip("cv2")
    height, width = frame.shape[:2]
    side = min(height, width)
    top, left = height // 2 - side // 2, width // 2 - side // 2
    square = np.ascontiguousarray(frame[top : top + side, left : left + side])
    flags = {"bilinear": cv2.INTER_LINEAR, "bicubic": cv2.INTER_CUBIC}
    return cv2.resize(square, (224, 224), interpolation=flags[interpolation]) / 255.0


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("size", [(240, 320), (301, 257), (101, 99), (448, 448), (224, 224)])
def test_a_frame_is_the_notebooks(size, interpolation):
    frame = pixels(*size)
    made = PerceiverIOVideoProcessor(interpolation=interpolation)(frame[None].repeat(16, axis=0))["pixel_values"]
    assert made.shape == (1, 16, 3, 224, 224) and made.dtype == np.float32
    assert_allclose(made * 255, np.rint(made * 255), atol=1e-4, err_msg="whole levels, as cv2 gives them")
    # cv2 computes in fixed point: one of 255 levels at most.
    tolerance = 0 if size == (224, 224) else 1.01 / 255
    assert_allclose(made[0, 3].transpose(1, 2, 0), notebook_frame(frame, interpolation), atol=tolerance + 1e-7)


def test_antialiasing_averages_what_is_made_smaller():
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2] = 255
    options = {"size": {"height": 16, "width": 16}, "num_frames": 1}
    smooth = PerceiverIOVideoProcessor(antialias=True, **options)(stripes)["pixel_values"]
    assert smooth[..., 2:-2].std() < 0.01 and abs(smooth.mean() - 0.5) < 0.01


def test_other_shapes_are_cut_to_their_own():
    frames = np.zeros((1, 40, 60, 3), np.uint8)
    frames[:, :, 20:40] = 255  # the middle third
    processor = PerceiverIOVideoProcessor(size={"height": 20, "width": 10}, num_frames=1)
    assert processor(frames)["pixel_values"].min() == 1  # 40 x 20 of 40 x 60
    stretched = PerceiverIOVideoProcessor(size={"height": 20, "width": 10}, num_frames=1, do_center_crop=False)
    assert stretched(frames)["pixel_values"][..., 0].max() == 0


def test_frames_may_be_of_any_kind():
    video = pixels(4, 6, 5)
    expected = video.transpose(0, 3, 1, 2)[None] / np.float32(255)
    processor = PerceiverIOVideoProcessor(**SMALL, do_center_crop=False)
    kinds = {
        "array": video,
        "list of arrays": list(video),
        "PIL images": [Image.fromarray(frame) for frame in video],
        "tensor": torch.from_numpy(video).movedim(-1, 1),
        "channels-last tensor": torch.from_numpy(video),
        "floats": video.astype(np.float64) / 255,
        "integers": video.astype(np.int64),
        "RGBA": np.concatenate([video, 0 * video[..., :1]], axis=-1),
        "batch": video[None],
        "list of videos": [video],
    }
    for kind, given in kinds.items():
        made = processor(given, return_tensors="pt")["pixel_values"]
        assert isinstance(made, torch.Tensor) and made.dtype == torch.float32
        assert_allclose(made, expected, atol=1e-7, err_msg=kind)
    grey = processor(list(video[..., 0]))["pixel_values"]
    assert_array_equal(grey, processor(video[..., :1].repeat(3, axis=-1))["pixel_values"])


def test_a_longer_video_is_cut_and_a_shorter_one_goes_on_with_its_last_frame(caplog):
    processor = PerceiverIOVideoProcessor(**SMALL)
    video = pixels(9, 8, 8)
    assert_array_equal(processor(video)["pixel_values"], processor(video[:4])["pixel_values"])
    assert not caplog.text
    short = processor([video, video[:3]])["pixel_values"]
    assert "video 1 has 3 frames; the last one is repeated to make 4" in caplog.text
    assert_array_equal(short[1, 3], short[1, 2])
    assert_array_equal(short[1, :3], short[0, :3])
    assert processor(video, num_frames=6)["pixel_values"].shape[1] == 6
    assert processor(video, do_sample_frames=False)["pixel_values"].shape[1] == 9


def test_mean_and_deviation_are_taken_out_and_put_back():
    video = pixels(4, 6, 6)
    options = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.4]}
    processor = PerceiverIOVideoProcessor(size={"height": 6, "width": 6}, num_frames=4, **options)
    made = processor(video, return_tensors="pt")["pixel_values"]
    expected = (video / 255 - np.array(options["image_mean"])) / np.array(options["image_std"])
    assert_allclose(made[0].movedim(1, -1), expected, atol=1e-5)
    assert_array_equal(processor.to_frames(made.movedim(2, -1))[0], video)


def test_reconstructions_become_frames():
    processor = PerceiverIOVideoProcessor()
    values = torch.tensor([[-0.3, 0.0, 0.5], [1.0, 1.7, 0.499]]).reshape(1, 1, 2, 3)
    for dtype in (torch.float32, torch.bfloat16):
        frames = processor.to_frames(values.to(dtype))
        assert frames.dtype == np.uint8
        assert_allclose(frames.reshape(2, 3), [[0, 0, 128], [255, 255, 127]], atol=dtype == torch.bfloat16)
    with pytest.raises(ValueError, match="NaN or infinity, 2 values"):
        processor.to_frames(torch.tensor([np.nan, np.inf, 0.0]))
    with pytest.raises(ValueError, match=r"\(..., height, width, 3\), not \(2, 4\)"):
        processor.to_frames(torch.zeros(2, 4))


# Windows, rates, files


@pytest.mark.parametrize(("count", "counts"), [(9, [4, 4, 1]), (8, [4, 4]), (2, [2])])
def test_windows_follow_one_another(count, counts):
    video = pixels(count, 6, 6)
    processor = PerceiverIOVideoProcessor(size={"height": 6, "width": 6}, num_frames=4)
    windows = list(processor.windows(iter(video)))
    assert [real for _, real in windows] == counts
    assert all(window.shape == (4, 3, 6, 6) for window, _ in windows)
    joined = np.concatenate([window[:real] for window, real in windows])
    assert_array_equal(np.rint(joined.transpose(0, 2, 3, 1) * 255), video)
    last, real = windows[-1]
    assert (last[real:] == last[real - 1]).all()


def test_windows_are_made_as_they_are_taken():
    taken = []

    def endless():
        while True:
            taken.append(1)
            yield pixels(8, 8)

    next(PerceiverIOVideoProcessor(**SMALL).windows(endless()))
    assert len(taken) == 4


def test_frames_of_another_rate_are_resampled_in_time():
    video = np.arange(20, dtype=np.uint8)[:, None, None, None].repeat(3, axis=-1).repeat(6, axis=1).repeat(6, axis=2)
    processor = PerceiverIOVideoProcessor(size={"height": 6, "width": 6}, num_frames=10)
    (window, real), *rest = processor.windows(video, frames_per_second=50)
    assert not rest and real == 10
    assert np.rint(window[:, 0, 0, 0] * 255).tolist() == list(range(0, 20, 2))
    (_, first), (_, second), *_ = processor.windows(video[:10], frames_per_second=12.5)
    assert (first, second) == (10, 10)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """20 frames at 50 a second, each of its own grey."""
    pytest.importorskip("av")
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    with VideoWriter(path, frames_per_second=50) as writer:
        for k in range(20):
            writer.write_frame(np.full((36, 48, 3), 12 * k, np.uint8))
    return path


def test_a_file_is_read_at_the_models_rate(clip):
    processor = PerceiverIOVideoProcessor(size={"height": 8, "width": 8}, num_frames=10)
    made = processor([clip, str(clip)])["pixel_values"]
    assert made.shape == (2, 10, 3, 8, 8)
    # H.264 at a constant rate factor of 18 changes flat grey by a level or two.
    assert_allclose(made[0].mean(axis=(1, 2, 3)) * 255, [24 * k for k in range(10)], atol=4)


def test_a_variable_frame_rate_is_said(clip, caplog, monkeypatch):
    from dataclasses import replace

    from hf_perceiver import video_processing_perceiver_io as module

    info = module.video_info(clip)
    monkeypatch.setattr(module, "video_info", lambda path: replace(info, variable_frame_rate=True))
    PerceiverIOVideoProcessor(**SMALL)(clip)
    assert "has a variable frame rate; its frames are taken by their times, at 25 a second" in caplog.text


# Saving, loading, the pipeline


def test_both_auto_classes_find_it(tmp_path):
    processor = PerceiverIOVideoProcessor(**SMALL, image_mean=[0.5] * 3, image_std=[0.5] * 3, frames_per_second=12.5)
    processor.save_pretrained(tmp_path)
    for auto_class in (AutoImageProcessor, AutoVideoProcessor):
        loaded = auto_class.from_pretrained(tmp_path)
        assert type(loaded) is PerceiverIOVideoProcessor
        assert loaded.to_dict() == processor.to_dict()
    assert AutoImageProcessor.from_pretrained(tmp_path, num_frames=7).num_frames == 7


def test_video_classification_gives_the_models_own_scores(clip, tmp_path):
    labels = ("run", "sit", "swim")
    config = config_of(
        preprocessor=grid({**PIXELS, "temporal_downsample": 2}, fourier(2, 6, 5, bands=2)),
        **CLASSES,
        num_labels=3,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = enlarge(PerceiverIOForVideoClassification(config)).eval()
    processor = PerceiverIOVideoProcessor(**SMALL)
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    classify = pipeline("video-classification", model=str(tmp_path))
    expected = model(**processor(clip, return_tensors="pt")).logits[0].softmax(-1).tolist()
    assert max(expected) < 0.999, "scores must tell something"
    for results in (classify(str(clip)), *classify([str(clip)])):
        assert {r["label"]: r["score"] for r in results} == pytest.approx(
            dict(zip(labels, expected, strict=True)), abs=1e-5
        )


# Bad input


@pytest.mark.parametrize(
    ("video", "message"),
    [
        ([], "no video given"),
        (np.zeros((0, 8, 8, 3), np.uint8), "no frames"),
        (Image.new("RGB", (8, 8)), "list of frames"),
        (pixels(8, 8), r"a video is .*not \(8, 8, 3\)"),
        (np.zeros((4, 8, 8, 5), np.uint8), "frame 0 cannot be used: .*not .8, 8, 5."),
        (np.zeros((4, 0, 8, 3), np.uint8), "frame 0 cannot be used"),
        (np.full((4, 8, 8, 3), np.nan), "frame 0 cannot be used: it holds NaN or infinity, 192 values"),
        (np.full((4, 8, 8, 3), 1.5), r"frame 0 cannot be used: it holds 1.5..1.5"),
        (np.full((4, 8, 8, 3), 300), "it holds 300..300"),
        (np.zeros((4, 8, 8, 3), bool), "integers in 0..255 or floats"),
        ([pixels(8, 8), pixels(8, 9)], "frame 1 cannot be used: it is 8x9, those before are 8x8"),
        ([pixels(4, 8, 8), [pixels(8, 8), None]], "video 1: frame 1 cannot be used"),
        ("nowhere.mp4", "there is no file nowhere.mp4"),
        (3, "not int"),
    ],
)
def test_what_is_no_video_is_refused(video, message):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=message):
        PerceiverIOVideoProcessor(**SMALL)(video)


def test_a_batch_of_unequal_lengths_needs_sampling():
    with pytest.raises(ValueError, match="the videos of a batch have 4, 5 frames"):
        PerceiverIOVideoProcessor(**SMALL)([pixels(4, 8, 8), pixels(5, 8, 8)], do_sample_frames=False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_frame": 8}, "no option 'num_frame'; did you mean 'num_frames'"),
        ({"num_frames": 0}, "num_frames=0 is a whole number from 1"),
        ({"size": {"height": 8}}, "size is"),
        ({"size": {"height": 8, "width": 0}}, "width=0 is a whole number from 1"),
        ({"interpolation": "nearest"}, "interpolation='nearest' must be one of bilinear, bicubic"),
        ({"frames_per_second": 0}, "frames_per_second=0 is a positive number"),
        ({"image_mean": [0.5] * 3}, "image_mean and image_std go together"),
        ({"image_mean": [0.5] * 3, "image_std": [0.5, 0, 1]}, "image_std"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PerceiverIOVideoProcessor(**options)
