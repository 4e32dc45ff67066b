"""Clips -> the multimodal models' inputs, window by window, and back to files; save and load; bad clips."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy.testing import assert_allclose, assert_array_equal
from transformers import AutoProcessor

from hf_perceiver import (
    PerceiverIOFeatureExtractor,
    PerceiverIOForAudioVisualClassification,
    PerceiverIOProcessor,
    PerceiverIOTokenizer,
    PerceiverIOVideoProcessor,
    bundled_checkpoint,
    recipes,
)
from hf_perceiver.media_files import VideoWriter, read_frames, read_sound, video_info, write_wav


def pixels(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*shape, 3), dtype=np.uint8)


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def small(**options) -> PerceiverIOProcessor:
    """Windows of 4 frames of 6x6 and 8 samples: 25 frames and 50 samples a second."""
    return PerceiverIOProcessor(
        PerceiverIOVideoProcessor(size={"height": 6, "width": 6}, num_frames=4),
        PerceiverIOFeatureExtractor(num_samples=8, sampling_rate=50),
        **{"num_labels": 5, **options},
    )


def flat_frames(count: int) -> list[np.ndarray]:
    """Frame k is of the grey 8 k."""
    return [np.full((48, 64, 3), 8 * k, np.uint8) for k in range(count)]


def write_clip(path, count, samples=None, rate=48_000, frames_per_second=25.0):
    with VideoWriter(
        path, frames_per_second=frames_per_second, sampling_rate=None if samples is None else rate
    ) as writer:
        for frame in flat_frames(count):
            writer.write_frame(frame)
        if samples is not None:
            writer.write_sound(samples)
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """20 frames and as much sound."""
    pytest.importorskip("av")
    return write_clip(tmp_path_factory.mktemp("clip") / "clip.mp4", 20, noise(20 * 1920))


def test_a_window_is_the_notebooks():
    """16 frames over 255, 1,920 samples of one channel for each, an empty label; the sizes of the released model."""
    frames, sound = pixels(16, 224, 224), noise(40_000, 2)
    made = PerceiverIOProcessor()(frames, sound, sampling_rate=48_000)
    assert set(made) == {"inputs"}
    inputs = made["inputs"]
    assert_array_equal(inputs["image"], (frames / np.float32(255)).transpose(0, 3, 1, 2)[None])
    assert_array_equal(inputs["audio"], sound[None, :30_720, :1])
    assert inputs["label"].shape == (1, 700) and not inputs["label"].any()
    spec = recipes.multimodal_autoencoder().preprocessor["modalities"]
    assert set(inputs) == set(spec) and spec["label"]["channels"] == 700


def test_a_batch_is_its_clips_one_by_one():
    videos, sounds = [pixels(4, 6, 6, seed=k) for k in range(3)], [noise(8, seed=k) for k in range(3)]
    together = small()(videos, sounds, [4, 0, 2])["inputs"]
    assert together["label"].argmax(dim=1).tolist() == [4, 0, 2] and together["label"].sum() == 3
    for k in range(3):
        alone = small()(videos[k], sounds[k], [4, 0, 2][k])["inputs"]
        for name, values in alone.items():
            assert_array_equal(values[0], together[name][k])
    assert small()(videos, sounds, torch.tensor([4, 0, 2]))["inputs"]["label"].equal(together["label"])
    assert small()(np.stack(videos), sounds, np.array([4, 0, 2]))["inputs"]["image"].equal(together["image"])


def test_a_batch_moves_and_changes_its_type_as_a_whole():
    made = small(require_sound=False)([pixels(4, 6, 6)]).to(torch.bfloat16)
    assert {values.dtype for values in made["inputs"].values()} == {torch.bfloat16}
    assert made["attention_mask"]["audio"].dtype == torch.long
    assert {values.device.type for values in made.to("meta")["inputs"].values()} == {"meta"}


def test_a_file_brings_its_own_sound(clip):
    made = PerceiverIOProcessor(num_labels=None)(clip)["inputs"]
    assert set(made) == {"image", "audio"} and made["image"].shape == (1, 16, 3, 224, 224)
    greys = made["image"].mean(dim=(0, 2, 3, 4)) * 255
    # H.264 at a constant rate factor of 18 changes flat grey by a level or two.
    assert_allclose(greys, [8 * k for k in range(16)], atol=3)
    assert_array_equal(made["audio"][0, :, 0], read_sound(clip)[0][:30_720, 0])
    other = PerceiverIOProcessor(num_labels=None)([clip], [np.zeros(40_000)])["inputs"]
    assert not other["audio"].any() and other["image"].equal(made["image"])


# Windows


def test_windows_keep_frames_and_sound_together(clip):
    processor = small()
    processor.image_processor.num_frames, processor.feature_extractor.num_samples = 8, 15_360
    processor.feature_extractor.sampling_rate = 48_000
    windows = list(processor.windows(clip, label=3))
    assert [w.index for w in windows] == [0, 1, 2]
    assert [w.num_frames for w in windows] == [8, 8, 4]
    assert all(w.inputs["image"].shape == (1, 8, 3, 6, 6) and w.attention_mask is None for w in windows)
    assert all(w.inputs["label"][0].tolist() == [0, 0, 0, 1, 0] for w in windows)
    greys = torch.cat([w.inputs["image"][0, : w.num_frames].mean(dim=(1, 2, 3)) for w in windows]) * 255
    assert_allclose(greys, [8 * k for k in range(20)], atol=3)
    sound = np.concatenate([w.inputs["audio"][0, :, 0] for w in windows])[: 20 * 1920]
    assert_array_equal(sound, read_sound(clip)[0][: 20 * 1920, 0])
    # AAC comes in blocks of 1,024 samples.
    assert 20 * 1920 <= sum(w.num_samples for w in windows) < 20 * 1920 + 1024
    last = windows[-1].inputs["image"][0]
    assert (last[4:] == last[3]).all()


def test_sound_that_is_shorter_or_longer_than_the_frames():
    short = list(small().windows(pixels(12, 6, 6), noise(11)))
    assert [w.num_samples for w in short] == [8, 3, 0] and not short[2].inputs["audio"].any()
    assert all(w.attention_mask is None for w in short)
    assert len(list(small().windows(pixels(4, 6, 6), noise(80)))) == 1


def test_rates_of_frames_and_sound_are_matched():
    pytest.importorskip("soxr")
    windows = list(small().windows(pixels(16, 6, 6), noise(3_200), frames_per_second=50, sampling_rate=10_000))
    assert [(w.num_frames, w.num_samples) for w in windows] == [(4, 8), (4, 8)]


def test_windows_of_an_endless_stream_are_made_as_they_are_taken():
    def endless():
        while True:
            yield pixels(6, 6)

    windows = small(require_sound=False).windows(endless())
    assert [next(windows).index for _ in range(3)] == [0, 1, 2]


def test_a_short_clip_is_padded_and_said(caplog):
    made = small()([pixels(4, 6, 6), pixels(2, 6, 6)], [noise(8), noise(4)])
    assert made["inputs"]["image"].shape[:2] == (2, 4)
    assert "clip 1 has 2 frames; the last one is repeated to make 4" in caplog.text and "clip 0" not in caplog.text


def test_a_clip_without_sound_is_silent_and_masked_if_that_is_allowed(tmp_path):
    pytest.importorskip("av")
    silent = write_clip(tmp_path / "silent.mp4", 4)
    for video in (silent, pixels(4, 6, 6)):
        with pytest.raises(ValueError, match=r"no sound .*require_sound=False"):
            small()(video)
    made = small(require_sound=False)([silent, pixels(4, 6, 6)], [None, noise(8)])
    assert not made["inputs"]["audio"][0].any() and made["inputs"]["audio"][1].any()
    assert made["attention_mask"]["audio"].tolist() == [[0] * 8, [1] * 8]
    assert "attention_mask" not in small(require_sound=False)(pixels(4, 6, 6), noise(8))


def test_a_masked_sound_is_not_read():
    from helpers import CLASSES, config_of, enlarge, fourier, grid

    image = grid({"kind": "patches", "in_channels": 3, "spatial_downsample": 3}, fourier(4, 2, 2, bands=2))
    audio = grid({"kind": "audio_patches", "samples_per_patch": 4}, fourier(2, bands=2))
    config = config_of(preprocessor={"kind": "multimodal", "modalities": {"image": image, "audio": audio}}, **CLASSES)
    model = enlarge(PerceiverIOForAudioVisualClassification(config)).eval()
    made = small(require_sound=False, num_labels=None)(pixels(4, 6, 6))
    without = model(inputs={"image": made["inputs"]["image"]}).logits
    torch.testing.assert_close(model(**made).logits, without)
    made["inputs"]["audio"] += 1
    assert model(**made).logits.equal(model(**small(require_sound=False, num_labels=None)(pixels(4, 6, 6))).logits)


def test_spectrograms_are_windows_too():
    sound = PerceiverIOFeatureExtractor(num_samples=61_440, feature="log_mel")
    video = PerceiverIOVideoProcessor(size={"height": 6, "width": 6}, num_frames=32)
    processor = PerceiverIOProcessor(video, sound, num_labels=None, require_sound=False)
    samples = noise(61_440)
    made = processor([pixels(32, 6, 6), pixels(32, 6, 6)], [samples, None])
    assert made["inputs"]["audio"].shape == (2, 60, 80) and made["attention_mask"]["audio"].shape == (2, 60)
    assert_array_equal(made["inputs"]["audio"][0], sound(samples, 48_000)["input_features"][0])
    with pytest.raises(ValueError, match="a spectrogram has no way back to sound"):
        processor.to_sound(made["inputs"]["audio"])


# Back


def test_reconstructions_become_frames_and_sound():
    processor = small()
    values = torch.linspace(-0.5, 1.5, 4 * 6 * 6 * 3).reshape(1, 4, 6, 6, 3)
    samples = torch.linspace(-1.5, 1.5, 8)[None]
    logits = {"image": values, "audio": samples}
    for given in (logits, SimpleNamespace(logits=logits)):
        assert_array_equal(processor.to_frames(given), processor.image_processor.to_frames(values))
        assert_array_equal(processor.to_sound(given), samples.clamp(-1, 1).numpy()[..., None])
    assert_array_equal(processor.to_sound(samples[0]), samples[0].clamp(-1, 1).numpy()[:, None])
    with pytest.raises(ValueError, match="not asked for 'audio'; there is image"):
        processor.to_sound({"image": values})
    with pytest.raises(ValueError, match="the sound holds NaN or infinity, 1 values"):
        processor.to_sound(torch.tensor([0.0, np.nan]))


def test_clips_are_written(tmp_path):
    pytest.importorskip("av")
    processor = PerceiverIOProcessor()
    frames, sound = flat_frames(10), noise(10 * 1920)
    processor.write_clip(tmp_path / "clip.mp4", frames, sound)
    processor.write_clip(tmp_path / "silent.mp4", frames)
    processor.write_clip(tmp_path / "clip.wav", sound=sound)
    assert video_info(tmp_path / "clip.mp4").sampling_rate == 48_000
    assert video_info(tmp_path / "silent.mp4").sampling_rate is None
    greys = [frame.mean() for frame in read_frames(tmp_path / "clip.mp4")]
    assert_allclose(greys, [8 * k for k in range(10)], atol=3)
    assert_allclose(read_sound(tmp_path / "clip.wav")[0][:, 0], sound, atol=1e-4)  # 16 bits
    for name, message in (("x.mp4", "holds frames; give them"), ("x.wav", "holds sound; give it")):
        with pytest.raises(ValueError, match=message):
            processor.write_clip(tmp_path / name)


# Saving and loading


def test_it_is_saved_and_found_beside_a_model(tmp_path):
    processor = small(image_name="video", label_name="class", require_sound=False)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is PerceiverIOProcessor
    assert type(loaded.image_processor) is PerceiverIOVideoProcessor
    assert type(loaded.feature_extractor) is PerceiverIOFeatureExtractor
    assert loaded.to_dict() == processor.to_dict()
    assert set(loaded(pixels(4, 6, 6))["inputs"]) == {"video", "audio", "class"}
    assert AutoProcessor.from_pretrained(tmp_path, require_sound=True).require_sound


def test_a_text_checkpoint_keeps_its_tokenizer():
    """transformers takes a configuration's processor wherever no file names another one."""
    assert type(AutoProcessor.from_pretrained(bundled_checkpoint("language"))) is PerceiverIOTokenizer


# Bad input


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"videos": None}, "no video given"),
        ({"audio": [noise(8)] * 2, "videos": [pixels(4, 6, 6)]}, "2 sounds for 1 clips"),
        ({"labels": [1, 2]}, "2 labels for 1 clips"),
        ({"labels": 5}, "a label is a class index from 0 to 4, not 5"),
        ({"labels": -1}, "a label is a class index from 0 to 4, not -1"),
        ({"labels": 1.0}, "a label is a class index"),
        ({"videos": np.full((4, 6, 6, 3), np.nan)}, "frame 0 cannot be used: it holds NaN"),
        ({"audio": np.full(8, np.nan)}, "sound is not finite"),
        ({"sampling_rate": 0}, "sampling rate is a whole number"),
        ({"frames_per_second": -1}, "frames_per_second=-1 is a positive number"),
        ({"videos": [pixels(4, 6, 6), []], "audio": [noise(8)] * 2}, "clip 1: the video has no frames"),
        ({"videos": "nowhere.mp4"}, "there is no file nowhere.mp4"),
    ],
)
def test_what_cannot_be_a_clip_is_refused(arguments, message):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=message):
        small()(**{"videos": pixels(4, 6, 6), "audio": noise(8), **arguments})


def test_a_label_needs_classes():
    with pytest.raises(ValueError, match="label 3 for a processor without labels; set num_labels"):
        small(num_labels=None)(pixels(4, 6, 6), noise(8), 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_label": 5}, "no option 'num_label'; did you mean 'num_labels'"),
        ({"num_labels": 0}, "num_labels=0 is a whole number from 1"),
        ({"audio_name": "image"}, "must differ"),
        (
            {"feature_extractor": PerceiverIOFeatureExtractor(num_samples=30_000)},
            "16 frames at 25 a second are as long as 30,720 samples at 48000 Hz, not num_samples=30,000",
        ),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PerceiverIOProcessor(**options)


def test_sound_in_a_file_of_its_own(clip, tmp_path):
    write_wav(tmp_path / "sound.wav", noise(30_720, seed=5), 48_000)
    made = PerceiverIOProcessor()(clip, tmp_path / "sound.wav")["inputs"]
    assert_allclose(made["audio"][0, :, 0], noise(30_720, seed=5), atol=1e-4)  # 16 bits
