"""Video with its sound, and a label -> the multimodal models' inputs, and their reconstructions back to files.

Source: DeepMind's video_autoencoding.ipynb: windows of 16 frames and 1,920 samples for each, an empty label.
"""

import difflib
import inspect
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, ProcessorMixin
from transformers.utils import logging

from .feature_extraction_perceiver_io import PerceiverIOFeatureExtractor
from .media_files import VideoWriter, video_info, write_wav
from .video_processing_perceiver_io import PerceiverIOVideoProcessor

logger = logging.get_logger(__name__)


class MultimodalBatch(BatchFeature):
    """A BatchFeature whose values are dicts by modality; `to` moves and casts the tensors in them."""

    data: dict[str, Any]

    def to(self, *args: Any, **kwargs: Any) -> "MultimodalBatch":
        self.data = {name: BatchFeature(dict(values)).to(*args, **kwargs).data for name, values in self.data.items()}
        return self


@dataclass
class ClipWindow:
    """One window of a clip: the model's inputs for a batch of 1, and how much of it is the clip's.

    num_frames, num_samples: the rest is padding, the last frame repeated and silence. attention_mask: what is missing
    altogether, None where nothing is.
    """

    index: int
    inputs: dict[str, Tensor]
    attention_mask: dict[str, Tensor] | None
    num_frames: int
    num_samples: int


class PerceiverIOProcessor(ProcessorMixin):
    """Clips -> `inputs`, a dict of image (B, T, 3, H, W), audio (B, samples, 1) and label (B, num_labels).

    image_processor: a PerceiverIOVideoProcessor. feature_extractor: a PerceiverIOFeatureExtractor whose `num_samples`
        are as long as the `num_frames` frames; by default 16 of 224x224 and 1,920 samples for each at 48 kHz.
    image_name, audio_name, label_name: what the model calls them.
    num_labels: classes of the label; None leaves it out. Without a label it is zeros, as in the original, where its mask
        token takes its place.
    require_sound: a clip without sound is an error; otherwise its sound is silence, and masked by `attention_mask`.
    """

    def __init__(
        self,
        image_processor: Any = None,
        feature_extractor: Any = None,
        image_name: str = "image",
        audio_name: str = "audio",
        label_name: str = "label",
        num_labels: int | None = 700,
        require_sound: bool = True,
        **kwargs: Any,
    ):
        known = inspect.signature(PerceiverIOProcessor).parameters
        for name in kwargs:
            if close := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                raise ValueError(f"{type(self).__name__} has no option {name!r}; did you mean {close[0]!r}?")
        super().__init__(
            PerceiverIOVideoProcessor() if image_processor is None else image_processor,
            PerceiverIOFeatureExtractor() if feature_extractor is None else feature_extractor,
            **kwargs,
        )
        self.image_name, self.audio_name, self.label_name = image_name, audio_name, label_name
        self.num_labels = num_labels
        self.require_sound = require_sound
        self._check()

    @property
    def model_input_names(self) -> list[str]:
        return ["inputs", "attention_mask"]

    def __call__(
        self,
        videos: Any = None,
        audio: Any = None,
        labels: Any = None,
        *,
        frames_per_second: float | None = None,
        sampling_rate: int | None = None,
    ) -> MultimodalBatch:
        """The first window of a clip, or of each of a list -> `inputs`, and `attention_mask` where sound is missing.

        videos: paths, arrays (T, H, W, 3), tensors (T, 3, H, W), or lists of frames, see PerceiverIOVideoProcessor.
        audio: paths or arrays, one for each video; None takes the sound of a video file. labels: class indices.
        frames_per_second, sampling_rate: of what is no file; the options' by default. For the other windows of longer
        clips see `windows`. Raises ValueError that names the clip.
        """
        if videos is None:
            raise ValueError("no video given; a clip is frames and sound")
        several = isinstance(videos, (list, tuple)) and bool(videos) and not _is_frame(videos[0])
        several = several or getattr(videos, "ndim", 0) == 5
        clips = list(videos) if several else [videos]
        sounds = [None] * len(clips) if audio is None else list(audio) if several else [audio]
        chosen = [None] * len(clips) if labels is None else _listed(labels)
        for name, given in (("sounds", sounds), ("labels", chosen)):
            if len(given) != len(clips):
                raise ValueError(f"{len(given)} {name} for {len(clips)} clips; give one for each")
        windows = []
        for index, (video, sound, label) in enumerate(zip(clips, sounds, chosen, strict=True)):
            try:
                window = next(self.windows(video, sound, label, frames_per_second, sampling_rate))
            except ValueError as error:
                raise ValueError(f"clip {index}: {error}" if several else str(error)) from error
            if window.num_frames < self.image_processor.num_frames:
                logger.warning(
                    f"clip {index} has {window.num_frames} frames; the last one is repeated to make "
                    f"{self.image_processor.num_frames}"
                )
            windows.append(window)
        data = {"inputs": _stacked([window.inputs for window in windows])}
        if any(window.attention_mask is not None for window in windows):
            length = data["inputs"][self.audio_name].shape[1]
            heard = torch.tensor([[window.attention_mask is None] for window in windows])
            data["attention_mask"] = {self.audio_name: heard.expand(-1, length).long()}
        return MultimodalBatch(data)

    def windows(
        self,
        video: Any,
        sound: Any = None,
        label: int | None = None,
        frames_per_second: float | None = None,
        sampling_rate: int | None = None,
    ) -> Iterator[ClipWindow]:
        """A clip of any length -> its windows, one after another, in bounded memory where it is a file or an iterator.

        Arguments as for one clip in `__call__`. There are as many windows as the frames need; sound that is shorter goes
        on with silence, what is longer is left out.
        """
        self._check()
        one_hot = self._one_hot(label)
        sounds = self._sounds(video, sound, sampling_rate)
        for index, (frames, num_frames) in enumerate(self.image_processor.windows(video, frames_per_second)):
            silent = (self.feature_extractor.silence(), 0)
            values, num_samples = silent if sounds is None else next(sounds, silent)
            inputs = {self.image_name: frames, self.audio_name: values}
            tensors = {name: torch.from_numpy(array)[None] for name, array in inputs.items()}
            if one_hot is not None:
                tensors[self.label_name] = one_hot
            mask = {self.audio_name: torch.zeros(1, len(values), dtype=torch.long)} if sounds is None else None
            yield ClipWindow(index, tensors, mask, num_frames, num_samples)

    def to_frames(self, outputs: Any) -> np.ndarray:
        """The model's logits, or those of the video (..., H, W, 3) -> (..., H, W, 3) uint8"""
        return self.image_processor.to_frames(_of(outputs, self.image_name))

    def to_sound(self, outputs: Any) -> np.ndarray:
        """The model's logits, or those of the sound (..., samples) -> (..., samples, 1) float32, clipped to [-1, 1]

        Raises ValueError for NaN, and where the model reads spectrograms, which cannot be heard.
        """
        if self.feature_extractor.feature != "raw":
            raise ValueError("a spectrogram has no way back to sound; use a model of raw samples")
        samples = torch.as_tensor(_of(outputs, self.audio_name)).detach().cpu().float()
        if not samples.isfinite().all():
            raise ValueError(f"the sound holds NaN or infinity, {int((~samples.isfinite()).sum()):,} values")
        return samples.clamp(-1, 1).numpy()[..., None]

    def write_clip(self, path: str | os.PathLike, frames: Any = None, sound: Any = None) -> None:
        """Frames (T, H, W, 3) uint8 and sound (samples,) or (samples, 1), at the options' rates -> a video file, or a .wav

        A .wav holds the sound alone; in a video file the sound may be left out.
        """
        rate = self.feature_extractor.sampling_rate
        if Path(path).suffix.lower() == ".wav":
            if sound is None:
                raise ValueError(f"{os.fspath(path)} holds sound; give it")
            write_wav(path, sound, rate)
            return
        if frames is None:
            raise ValueError(f"{os.fspath(path)} holds frames; give them, or write the sound to a .wav")
        fps = self.image_processor.frames_per_second
        with VideoWriter(path, frames_per_second=fps, sampling_rate=None if sound is None else rate) as writer:
            for frame in frames:
                writer.write_frame(frame)
            if sound is not None:
                writer.write_sound(sound)

    def _sounds(self, video: Any, sound: Any, sampling_rate: int | None) -> Iterator[tuple[np.ndarray, int]] | None:
        """Windows of sound; None where there is none and that is allowed."""
        if sound is None and isinstance(video, (str, os.PathLike)) and video_info(video).sampling_rate is not None:
            sound = video
        if sound is not None:
            return self.feature_extractor.windows(sound, sampling_rate)
        if self.require_sound:
            what = (
                f"{os.fspath(video)} has no sound in it" if isinstance(video, (str, os.PathLike)) else "no sound given"
            )
            raise ValueError(f"{what}; give the sound, or set require_sound=False for silence that is masked")
        return None

    def _one_hot(self, label: Any) -> Tensor | None:
        """-> (1, num_labels), zeros without a label; None where there are no labels"""
        if self.num_labels is None:
            if label is not None:
                raise ValueError(f"label {label!r} for a processor without labels; set num_labels")
            return None
        values = torch.zeros(1, self.num_labels)
        if label is not None:
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)) or not 0 <= label < self.num_labels:
                raise ValueError(f"a label is a class index from 0 to {self.num_labels - 1}, not {label!r}")
            values[0, label] = 1
        return values

    def _check(self) -> None:
        """Options of both parts may be set after they were made."""
        video, sound = self.image_processor, self.feature_extractor
        for part, needed in ((video, "prepare"), (sound, "silence")):
            if not hasattr(part, needed):
                raise ValueError(
                    f"a PerceiverIOVideoProcessor and a PerceiverIOFeatureExtractor are needed, not a {type(part).__name__}"
                )
        expected = video.num_frames * sound.sampling_rate / video.frames_per_second
        if abs(sound.num_samples - expected) >= 1:
            raise ValueError(
                f"{video.num_frames} frames at {video.frames_per_second:g} a second are as long as {expected:,.0f} samples "
                f"at {sound.sampling_rate} Hz, not num_samples={sound.num_samples:,}; set one of them"
            )
        names = [self.image_name, self.audio_name] + ([] if self.num_labels is None else [self.label_name])
        if len(set(names)) < len(names):
            raise ValueError(f"image_name, audio_name and label_name must differ, not {', '.join(names)}")
        if self.num_labels is not None and (type(self.num_labels) is not int or self.num_labels < 1):
            raise ValueError(f"num_labels={self.num_labels!r} is a whole number from 1, or None for no label")


def _is_frame(item: Any) -> bool:
    """Is this a picture of a video, and not a video?"""
    return not isinstance(item, (str, os.PathLike, list, tuple)) and getattr(item, "ndim", 3) in (2, 3)


def _listed(labels: Any) -> list[Any]:
    if isinstance(labels, (Tensor, np.ndarray)):
        return np.atleast_1d(np.asarray(labels)).tolist()
    return list(labels) if isinstance(labels, Sequence) else [labels]


def _stacked(examples: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    return {name: torch.cat([example[name] for example in examples]) for name in examples[0]}


def _of(outputs: Any, name: str) -> Any:
    outputs = getattr(outputs, "logits", outputs)
    if not isinstance(outputs, Mapping):
        return outputs
    if name not in outputs:
        raise ValueError(f"the model was not asked for {name!r}; there is {', '.join(outputs) or 'nothing'}")
    return outputs[name]
