"""Sound -> what the model reads of it: samples, or a log-mel spectrogram.

Source: DeepMind's video_autoencoding.ipynb (one channel, 48 kHz, floats in [-1, 1]); the spectrogram is that of
google-deepmind/dmvr, compute_audio_spectrogram, whose sizes are those of both papers' AudioSet models.
"""

import difflib
import functools
import inspect
import os
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from torch import Tensor
from transformers import BatchFeature, SequenceFeatureExtractor
from transformers.audio_utils import mel_filter_bank, spectrogram, window_function
from transformers.utils import logging

from .media_files import check_sound, resample, stream_sound

logger = logging.get_logger(__name__)

FEATURES = ("raw", "log_mel")
CHANNELS = ("first", "mean")
# More than resampling or a loud recording overshoots 1 by: such floats hold integers of 16 or more bits.
LOUDEST = 2.0
# A sound has fewer channels than that; what has more was meant as (channels, samples) or as a batch.
MOST_CHANNELS = 32


class PerceiverIOFeatureExtractor(SequenceFeatureExtractor):
    """Sounds of any rate -> `input_values` (B, num_samples, 1), or `input_features` (B, time, bands), and their mask.

    A sound is a path, or an array or tensor: (samples,) or (samples, channels), floats in [-1, 1] or 16-bit integers. A
    batch is a list of them. What is longer than `num_samples` is cut, what is shorter is followed by silence, where
    `attention_mask` (B, num_samples) or (B, time) is 0.

    sampling_rate: of the model, in Hz; sounds of another one are resampled.
    num_samples: 30,720 is one window of the released model; 61,440 that of AudioSet.
    channel: the "first", as the original takes it, or the "mean" of all.
    feature: "raw" samples, or "log_mel": log(mel + log_offset) of a spectrogram's absolute values, in `num_mel_bins`
        bands from `min_frequency` to `max_frequency` Hz, one Hann window of `frame_length` samples every `hop_length`,
        the last ones padded with silence. 61,440 samples become 60 x 80 values.
    """

    def __init__(
        self,
        feature_size: int = 1,
        sampling_rate: int = 48_000,
        padding_value: float = 0.0,
        num_samples: int = 30_720,
        channel: str = "first",
        feature: str = "raw",
        frame_length: int = 2048,
        hop_length: int = 1024,
        num_mel_bins: int = 80,
        min_frequency: float = 80.0,
        max_frequency: float = 7600.0,
        log_offset: float = 1e-6,
        return_attention_mask: bool = True,
        **kwargs: Any,
    ):
        for name in kwargs:
            known = inspect.signature(PerceiverIOFeatureExtractor).parameters
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                raise ValueError(f"{type(self).__name__} has no option {name!r}; did you mean {close[0]!r}?")
        # The file that it names is written by save_with_code alone; a plain save does not promise it.
        kwargs.pop("auto_map", None)
        super().__init__(
            feature_size=feature_size,
            sampling_rate=sampling_rate,
            padding_value=padding_value,
            return_attention_mask=return_attention_mask,
            **kwargs,
        )
        self.num_samples = num_samples
        self.channel, self.feature = channel, feature
        self.frame_length, self.hop_length, self.num_mel_bins = frame_length, hop_length, num_mel_bins
        self.min_frequency, self.max_frequency, self.log_offset = min_frequency, max_frequency, log_offset
        self._check()

    @property
    def model_input_names(self) -> list[str]:
        return ["input_features" if self.feature == "log_mel" else "input_values", "attention_mask"]

    def __call__(
        self,
        audio: Any,
        sampling_rate: int | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        num_samples: int | None = None,
    ) -> BatchFeature:
        """One sound or a list of them -> a batch, see the class.

        sampling_rate: of the arrays in `audio`, by default the model's (a warning says so); files know theirs.
        num_samples: in place of the option. Raises ValueError for an empty sound, NaN, and what is no sound.
        """
        self._check()
        length = self.num_samples if num_samples is None else num_samples
        _check_positive(num_samples=length)
        sounds = audio if isinstance(audio, (list, tuple)) and not _is_numbers(audio) else [audio]
        if not sounds:
            raise ValueError("no sound given; give one, or a list of them")
        if sampling_rate is None and not all(isinstance(sound, (str, os.PathLike)) for sound in sounds):
            logger.warning_once(
                f"sampling_rate is not given; the sounds are taken to have the model's, {self.sampling_rate} Hz"
            )
        lengths, padded = [], np.full((len(sounds), length), self.padding_value, np.float32)
        for index, sound in enumerate(sounds):
            try:
                samples = self.read(sound, sampling_rate, length)
            except ValueError as error:
                raise ValueError(f"sound {index}: {error}" if len(sounds) > 1 else str(error)) from error
            padded[index, : len(samples)] = samples
            lengths.append(len(samples))
        values, mask = self._features(padded, np.array(lengths))
        data = {self.model_input_names[0]: values}
        if self.return_attention_mask if return_attention_mask is None else return_attention_mask:
            data["attention_mask"] = mask
        return BatchFeature(data, tensor_type=return_tensors)

    def read(self, sound: Any, sampling_rate: int | None = None, num_samples: int | None = None) -> np.ndarray:
        """A path, or an array of `sampling_rate` (the model's by default) -> (samples,) float32 at the model's rate

        num_samples: no more than so many; a file is not read further.
        """
        if isinstance(sound, (str, os.PathLike)):
            blocks, count = [], 0
            for block in stream_sound(sound, self.sampling_rate):
                blocks.append(self._one_channel(block))
                count += len(block)
                if num_samples is not None and count >= num_samples:
                    break
            samples = np.concatenate(blocks)
        else:
            samples = resample(
                self._one_channel(as_samples(sound)),
                self.sampling_rate if sampling_rate is None else sampling_rate,
                self.sampling_rate,
            )
        return samples[:num_samples]

    def windows(self, sound: Any, sampling_rate: int | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """A path or an array -> ((num_samples, 1) or (time, bands), how many samples are sound), one window after another

        The last one is followed by silence. A file is read as the windows are taken.
        """
        self._check()
        blocks: Iterable[np.ndarray]
        if isinstance(sound, (str, os.PathLike)):
            blocks = stream_sound(sound, self.sampling_rate)
        else:
            blocks = [self.read(sound, sampling_rate)]
        kept = np.zeros(0, np.float32)
        for block in blocks:
            kept = np.concatenate([kept, self._one_channel(block)])
            while len(kept) >= self.num_samples:
                yield self._window(kept[: self.num_samples])
                kept = kept[self.num_samples :]
        if len(kept):
            yield self._window(kept)

    def silence(self) -> np.ndarray:
        """A window without sound, (num_samples, 1) or (time, bands)"""
        return self._window(np.zeros(0, np.float32))[0]

    def _window(self, samples: np.ndarray) -> tuple[np.ndarray, int]:
        padded = np.full((1, self.num_samples), self.padding_value, np.float32)
        padded[0, : len(samples)] = samples
        return self._features(padded, np.array([len(samples)]))[0][0], len(samples)

    def _features(self, samples: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(B, samples) and how many of them are sound -> the model's input and its mask"""
        if self.feature == "raw":
            return samples[..., None], (np.arange(samples.shape[1]) < lengths[:, None]).astype(np.int64)
        values = np.stack([self._log_mel(row) for row in samples])
        return values, (np.arange(values.shape[1]) * self.hop_length < lengths[:, None]).astype(np.int64)

    def _log_mel(self, samples: np.ndarray) -> np.ndarray:
        """(samples,) -> (time, bands)"""
        num_windows = -(-len(samples) // self.hop_length)
        padded = np.pad(samples, (0, (num_windows - 1) * self.hop_length + self.frame_length - len(samples)))
        mel = spectrogram(
            padded,
            window_function(self.frame_length, "hann"),
            self.frame_length,
            self.hop_length,
            power=1.0,
            center=False,
            mel_filters=_mel_filters(
                self.frame_length // 2 + 1,
                self.num_mel_bins,
                self.min_frequency,
                self.max_frequency,
                self.sampling_rate,
            ),
            mel_floor=0.0,
        )
        return np.log(mel.T + self.log_offset).astype(np.float32)

    def _one_channel(self, samples: np.ndarray) -> np.ndarray:
        """(samples,) or (samples, channels) -> (samples,)"""
        if samples.ndim == 1:
            return samples
        return samples[:, 0] if self.channel == "first" else samples.mean(axis=1)

    def _check(self) -> None:
        """Options may be set after it was made."""
        _check_positive(
            sampling_rate=self.sampling_rate,
            num_samples=self.num_samples,
            frame_length=self.frame_length,
            hop_length=self.hop_length,
            num_mel_bins=self.num_mel_bins,
        )
        for name, known in (("feature", FEATURES), ("channel", CHANNELS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {', '.join(known)}")
        if self.feature == "log_mel" and not 0 <= self.min_frequency < self.max_frequency <= self.sampling_rate / 2:
            raise ValueError(
                f"bands from {self.min_frequency} to {self.max_frequency} Hz do not fit a sound of {self.sampling_rate} Hz, "
                f"which has frequencies up to {self.sampling_rate / 2}; set min_frequency and max_frequency"
            )


def as_samples(sound: Any) -> np.ndarray:
    """An array, tensor or list of numbers -> (samples,) or (samples, channels) float32 in [-1, 1]; 16-bit integers too"""
    samples = np.asarray(sound.detach().cpu() if isinstance(sound, Tensor) else sound)
    if samples.dtype == np.int16:
        samples = samples.astype(np.float32) / 32768
    if samples.ndim in (1, 2) and not len(samples):
        raise ValueError("the sound is empty; give at least one sample")
    if samples.ndim == 2 and samples.shape[1] > MOST_CHANNELS:
        raise ValueError(
            f"a sound is (samples,) or (samples, channels), not {samples.shape}; transpose (channels, samples), and give "
            "a batch as a list of sounds"
        )
    checked = check_sound(samples)
    loudest = float(np.abs(checked).max(initial=0.0))
    if loudest > LOUDEST:
        raise ValueError(f"sound is in [-1, 1], and this reaches {loudest:g}; divide what 16 bits hold by 32768")
    return checked[:, 0] if samples.ndim == 1 else checked


@functools.lru_cache(maxsize=8)
def _mel_filters(*sizes: Any) -> np.ndarray:
    # As tf.signal.linear_to_mel_weight_matrix: triangles in mel, none of them normalised.
    return mel_filter_bank(*sizes, mel_scale="htk", triangularize_in_mel_space=True)


def _is_numbers(values: list | tuple) -> bool:
    return bool(values) and all(isinstance(value, (int, float, np.number)) for value in values)


def _check_positive(**sizes: Any) -> None:
    for name, size in sizes.items():
        if isinstance(size, bool) or not isinstance(size, (int, np.integer)) or size < 1:
            raise ValueError(f"{name}={size!r} is a whole number from 1")
