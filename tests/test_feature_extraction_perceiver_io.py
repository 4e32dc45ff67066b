"""Sound -> samples and spectrograms, as the original's; files, rates, masks, windows, save and load, the pipeline."""

import numpy as np
import pytest
import torch
from helpers import CLASSES, config_of, enlarge, fourier, grid
from numpy.testing import assert_allclose, assert_array_equal
from transformers import AutoFeatureExtractor, pipeline

from hf_perceiver import PerceiverIOFeatureExtractor, PerceiverIOForAudioClassification
from hf_perceiver.media_files import resample, write_wav


def noise(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-0.5, 0.5, shape).astype(np.float32)


def test_one_window_is_the_notebooks():
    """`audio[None, :16 * 1920, 0:1]` of a stereo file, integers of 16 bits divided by 2^15."""
    sound = noise(40_000, 2)
    made = PerceiverIOFeatureExtractor()(sound, sampling_rate=48_000, return_tensors="np")
    assert_array_equal(made["input_values"], sound[None, : 16 * 1920, 0:1])
    assert made["attention_mask"].all() and made["attention_mask"].shape == (1, 30_720)
    integers = np.random.default_rng(0).integers(-(2**15), 2**15, (40_000, 2), dtype=np.int16)
    made = PerceiverIOFeatureExtractor()(integers, sampling_rate=48_000, return_tensors="np")
    assert_array_equal(made["input_values"], (integers.astype(np.float32) / 2**15)[None, : 16 * 1920, 0:1])


def test_a_short_sound_is_followed_by_silence_and_the_mask_says_so():
    sounds = [noise(5), noise(12, seed=1), noise(30, seed=2)]
    made = PerceiverIOFeatureExtractor(num_samples=12)(sounds, sampling_rate=48_000, return_tensors="pt")
    values, mask = made["input_values"], made["attention_mask"]
    assert values.shape == (3, 12, 1) and values.dtype == torch.float32
    assert_array_equal(values[0, :5, 0], sounds[0])
    assert not values[0, 5:].any()
    assert_array_equal(values[2, :, 0], sounds[2][:12])
    assert mask.sum(dim=1).tolist() == [5, 12, 12] and mask[0, :5].all()
    assert "attention_mask" not in PerceiverIOFeatureExtractor()(noise(9), 48_000, return_attention_mask=False)


def test_another_rate_is_resampled():
    pytest.importorskip("soxr")
    sound = noise(9_000)
    made = PerceiverIOFeatureExtractor(num_samples=24_000)(sound, sampling_rate=16_000, return_tensors="np")
    assert_array_equal(made["input_values"][0, :, 0], resample(sound, 16_000, 48_000)[:24_000])


def test_channels_are_chosen_or_averaged():
    sound = noise(30, 2)
    mean = PerceiverIOFeatureExtractor(num_samples=30, channel="mean")(sound, 48_000, return_tensors="np")
    assert_allclose(mean["input_values"][0, :, 0], sound.mean(axis=1), atol=1e-7)  # float32


@pytest.mark.parametrize("kind", [list, torch.from_numpy, np.float64, lambda s: torch.from_numpy(s).to(torch.float16)])
def test_a_sound_may_be_of_any_kind(kind):
    sound = noise(20)
    made = PerceiverIOFeatureExtractor(num_samples=20)(kind(sound), 48_000, return_tensors="np")
    assert made["input_values"].dtype == np.float32
    assert_allclose(made["input_values"][0, :, 0], sound, atol=2**-11)  # half precision has 11 bits


def test_files_are_read_at_their_own_rate(tmp_path):
    pytest.importorskip("av")
    sound = noise(48_000)
    write_wav(tmp_path / "a.wav", sound, 24_000)
    extractor = PerceiverIOFeatureExtractor(num_samples=30_000)
    made = extractor([tmp_path / "a.wav", str(tmp_path / "a.wav")], return_tensors="np")["input_values"]
    assert_array_equal(made[0], made[1])
    # 16 bits, and the streamed resampler.
    assert_allclose(made[0, :, 0], resample(sound, 24_000, 48_000)[:30_000], atol=1e-4)


def test_a_long_file_is_not_read_to_its_end(tmp_path, monkeypatch):
    from hf_perceiver import feature_extraction_perceiver_io as module

    taken = []

    def endless(path, rate):
        while True:
            taken.append(path)
            yield noise(1_000, 1)

    monkeypatch.setattr(module, "stream_sound", endless)
    made = PerceiverIOFeatureExtractor(num_samples=2_500)("endless.wav", return_tensors="np")
    assert made["input_values"].shape == (1, 2_500, 1) and len(taken) == 3


def test_the_rate_is_asked_for(caplog):
    PerceiverIOFeatureExtractor(num_samples=20, sampling_rate=47_999)(noise(20))
    assert "taken to have the model's, 47999 Hz" in caplog.text


# Spectrograms


def dmvr_log_mel(samples: np.ndarray) -> np.ndarray:
    """google-deepmind/dmvr's compute_audio_spectrogram with its defaults, as its TensorFlow calls are documented."""
    count = -(-len(samples) // 1024)  # pad_end: a window for each step
    padded = np.concatenate([samples.astype(np.float64), np.zeros(2048)])
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(2048) / 2048)  # periodic Hann
    spectra = np.stack([np.abs(np.fft.rfft(window * padded[k * 1024 : k * 1024 + 2048])) for k in range(count)])

    def mel(hertz):
        return 1127.0 * np.log(1.0 + hertz / 700.0)

    bins = mel(np.linspace(0.0, 24_000.0, 1025))[1:]  # without the constant part
    edges = np.linspace(mel(80.0), mel(7600.0), 82)
    weights = [
        np.clip(np.minimum((bins - low) / (middle - low), (high - bins) / (high - middle)), 0, None)
        for low, middle, high in zip(edges, edges[1:], edges[2:], strict=False)
    ]
    return np.log(spectra[:, 1:] @ np.stack(weights, axis=1) + 1e-6)


def test_log_mel_is_dmvrs():
    """60 x 80 values of 61,440 samples are the papers' 4,800."""
    sound = noise(61_440)
    extractor = PerceiverIOFeatureExtractor(feature="log_mel", num_samples=61_440)
    made = extractor(sound, sampling_rate=48_000, return_tensors="np")
    assert made["input_features"].shape == (1, 60, 80) and made["input_features"].dtype == np.float32
    # Their mel scales are 1127 and 1126.99 times the logarithm; measured 3e-4.
    assert_allclose(made["input_features"][0], dmvr_log_mel(sound), atol=1e-3)
    assert extractor.model_input_names == ["input_features", "attention_mask"]


def test_the_mask_of_a_spectrogram_counts_windows_that_begin_in_the_sound():
    extractor = PerceiverIOFeatureExtractor(feature="log_mel", num_samples=61_440)
    made = extractor([noise(1024 * 3 + 1), noise(1024 * 3)], sampling_rate=48_000, return_tensors="pt")
    assert made["attention_mask"].shape == (2, 60) and made["attention_mask"].sum(1).tolist() == [4, 3]


def test_silence_is_no_nan():
    extractor = PerceiverIOFeatureExtractor(feature="log_mel", num_samples=4_096)
    made = extractor(np.zeros(4_096), sampling_rate=48_000, return_tensors="np")["input_features"]
    assert_allclose(made, np.log(1e-6), rtol=1e-6)
    assert_array_equal(extractor.silence(), made[0])


def test_bands_that_the_rate_cannot_have_are_refused():
    with pytest.raises(ValueError, match=r"80.0 to 7600.0 Hz do not fit a sound of 8000 Hz"):
        PerceiverIOFeatureExtractor(feature="log_mel", sampling_rate=8_000)
    PerceiverIOFeatureExtractor(feature="raw", sampling_rate=8_000)


# Windows


@pytest.mark.parametrize(("samples", "counts"), [(25, [10, 10, 5]), (20, [10, 10]), (3, [3])])
def test_windows_follow_one_another(samples, counts):
    sound = noise(samples)
    windows = list(PerceiverIOFeatureExtractor(num_samples=10).windows(sound))
    assert [count for _, count in windows] == counts
    assert all(values.shape == (10, 1) for values, _ in windows)
    assert_array_equal(np.concatenate([values[:count, 0] for values, count in windows]), sound)
    assert not windows[-1][0][counts[-1] :].any()


def test_windows_of_a_file_are_those_of_its_sound(tmp_path):
    pytest.importorskip("av")
    write_wav(tmp_path / "a.wav", noise(60_000), 24_000)
    extractor = PerceiverIOFeatureExtractor(num_samples=30_720, feature="log_mel")
    windows = list(extractor.windows(tmp_path / "a.wav"))
    assert [count for _, count in windows] == [30_720, 30_720, 30_720, 120_000 - 3 * 30_720]
    whole = extractor.read(tmp_path / "a.wav")
    assert_array_equal(windows[1][0], extractor(whole[30_720:61_440], 48_000)["input_features"][0])


# Saving, loading, the pipeline


@pytest.mark.parametrize("options", [{}, {"feature": "log_mel", "num_samples": 61_440, "num_mel_bins": 64}])
def test_it_is_saved_and_found_beside_a_model(options, tmp_path):
    extractor = PerceiverIOFeatureExtractor(**options)
    extractor.save_pretrained(tmp_path)
    loaded = AutoFeatureExtractor.from_pretrained(tmp_path)
    assert type(loaded) is PerceiverIOFeatureExtractor
    assert loaded.to_dict() == extractor.to_dict()
    assert AutoFeatureExtractor.from_pretrained(tmp_path, num_samples=2_048).num_samples == 2_048


def saved_sound_model(folder, stem: dict, resolution: tuple[int, ...]):
    labels = ("bark", "hum", "song")
    config = config_of(
        preprocessor=grid(stem, fourier(*resolution)),
        **CLASSES,
        num_labels=3,
        id2label=dict(enumerate(labels)),
        label2id={name: i for i, name in enumerate(labels)},
    )
    model = enlarge(PerceiverIOForAudioClassification(config)).eval()
    model.save_pretrained(folder)
    return model


@pytest.mark.parametrize("feature", ["raw", "log_mel"])
def test_audio_classification_gives_the_models_own_scores_in_batches_too(feature, tmp_path):
    if feature == "raw":
        model = saved_sound_model(tmp_path, {"kind": "audio_patches", "samples_per_patch": 4}, (5,))
        extractor = PerceiverIOFeatureExtractor(num_samples=20, sampling_rate=100)
    else:
        model = saved_sound_model(tmp_path, {"kind": "spectrogram"}, (5, 4))
        extractor = PerceiverIOFeatureExtractor(
            feature="log_mel",
            num_samples=20,
            sampling_rate=100,
            frame_length=16,
            hop_length=4,
            num_mel_bins=4,
            min_frequency=5,
            max_frequency=50,
        )
    extractor.save_pretrained(tmp_path)
    classify = pipeline("audio-classification", model=str(tmp_path), top_k=None)
    sounds = [noise(20), noise(7, seed=1), noise(50, seed=2)]
    single = [classify(sound) for sound in sounds]
    for sound, results in zip(sounds, single, strict=True):
        logits = model(**extractor(sound, sampling_rate=100, return_tensors="pt")).logits[0]
        expected = dict(zip(("bark", "hum", "song"), logits.softmax(-1).tolist(), strict=True))
        assert {r["label"]: r["score"] for r in results} == pytest.approx(expected, abs=1e-5)  # float32
    assert len({round(results[0]["score"], 3) for results in single}) == 3, "sounds must tell apart"
    for together, alone in zip(classify(sounds, batch_size=3), single, strict=True):
        assert {r["label"]: r["score"] for r in together} == pytest.approx(
            {r["label"]: r["score"] for r in alone}, abs=1e-5
        )


# Bad input


@pytest.mark.parametrize(
    ("sound", "message"),
    [
        (np.zeros(0), "the sound is empty"),
        ([], "no sound given"),
        (np.array([0.0, np.nan]), "not finite at sample 1"),
        (np.zeros((2, 4_800)), r"not \(2, 4800\); transpose"),
        (np.zeros((2, 3, 4)), "a sound is|sound is"),
        (np.array([0.0, 3_000.0]), r"in \[-1, 1\], and this reaches 3000"),
        (np.zeros(5, np.int32), "sound is .* floats"),
        ([np.zeros(5), np.array([np.inf])], "sound 1: .*not finite"),
        ("nowhere.wav", "there is no file nowhere.wav"),
    ],
)
def test_what_is_no_sound_is_refused(sound, message):
    pytest.importorskip("av")
    with pytest.raises(ValueError, match=message):
        PerceiverIOFeatureExtractor(num_samples=20)(sound, sampling_rate=48_000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_sample": 20}, "no option 'num_sample'; did you mean 'num_samples'"),
        ({"num_samples": 0}, "num_samples=0 is a whole number from 1"),
        ({"num_samples": 2.5}, "num_samples=2.5 is a whole number from 1"),
        ({"sampling_rate": -1}, "sampling_rate=-1 is a whole number from 1"),
        ({"feature": "mel"}, "feature='mel' must be one of raw, log_mel"),
        ({"channel": "left"}, "channel='left' must be one of first, mean"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        PerceiverIOFeatureExtractor(**options)


def test_options_may_be_set_and_are_checked_again():
    extractor = PerceiverIOFeatureExtractor()
    extractor.num_samples = 20
    assert extractor(noise(9), 48_000, return_tensors="np")["input_values"].shape == (1, 20, 1)
    extractor.channel = "left"
    with pytest.raises(ValueError, match="channel='left'"):
        extractor(noise(9), 48_000)


@pytest.mark.parametrize("rate", [0, 44.1])
def test_a_wrong_rate_is_refused(rate):
    with pytest.raises(ValueError, match="sampling rate is a whole number"):
        PerceiverIOFeatureExtractor()(noise(9), sampling_rate=rate)
