"""Frames of any size and rate -> the model's windows of video, and its reconstructions back to frames.

Source: DeepMind's video_autoencoding.ipynb (centre square, cv2.resize, values in [0, 1], 25 frames a second).
"""

import difflib
import os
from collections.abc import Iterable, Iterator
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import is_pil_image
from transformers.utils import logging

from .media_files import frames_at_rate, read_frames, video_info

logger = logging.get_logger(__name__)

INTERPOLATIONS = ("bilinear", "bicubic")


class VideosKwargs(TypedDict, total=False):
    size: dict[str, int]
    do_center_crop: bool
    interpolation: str
    antialias: bool
    num_frames: int
    frames_per_second: float
    image_mean: list[float] | None
    image_std: list[float] | None


class PerceiverIOVideoProcessor(BaseImageProcessor):
    """Videos -> `pixel_values` (B, num_frames, 3, height, width), and reconstructions back to frames.

    A video is a path, (T, H, W, 3), a tensor (T, 3, H, W), or a list of frames: PIL images, arrays and tensors, grey,
    RGB or RGBA (alpha is dropped), integers in 0..255 or floats in [0, 1]. A batch is a list of videos. Of each the
    first `num_frames` frames are taken; a shorter one goes on with its last frame, and a warning says so. See `windows`
    for the rest.

    size: height and width in pixels. do_center_crop: cut to the centre square first (to `size`'s shape, if that is none).
    interpolation: "bilinear" or "bicubic", without antialiasing as cv2.resize does it, to within one of 255 levels;
        antialias smooths what is made smaller.
    frames_per_second: videos in files are resampled to it in time.
    image_mean, image_std: of each channel, to subtract and to divide by; None leaves values in [0, 1].

    Both AutoImageProcessor and AutoVideoProcessor load it, without torchvision.
    """

    valid_kwargs = VideosKwargs
    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: dict[str, int] | None = None,
        do_center_crop: bool = True,
        interpolation: str = "bilinear",
        antialias: bool = False,
        num_frames: int = 16,
        frames_per_second: float = 25.0,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        **kwargs: Any,
    ):
        for name in kwargs:
            if close := difflib.get_close_matches(name, VideosKwargs.__annotations__, n=1, cutoff=0.8):
                raise ValueError(f"{type(self).__name__} has no option {name!r}; did you mean {close[0]!r}?")
        # The file that it names is written by save_with_code alone; a plain save does not promise it.
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.size = dict(size or {"height": 224, "width": 224})
        self.do_center_crop = do_center_crop
        self.interpolation, self.antialias = interpolation, antialias
        self.num_frames, self.frames_per_second = num_frames, frames_per_second
        self.image_mean, self.image_std = image_mean, image_std
        self._check()

    def preprocess(
        self,
        videos: Any,
        return_tensors: str | None = None,
        num_frames: int | None = None,
        do_sample_frames: bool = True,
    ) -> BatchFeature:
        """A video or a list of videos -> `pixel_values` (B, num_frames, 3, height, width), see the class.

        num_frames: in place of the option. do_sample_frames=False keeps all frames, as many in each video of a batch.
        Raises ValueError that names the video and the frame for what cannot be used.
        """
        self._check()
        length = self.num_frames if num_frames is None else num_frames
        _check_count("num_frames", length)
        batch = list(videos) if _is_batch(videos) else [videos]
        if not batch:
            raise ValueError("no video given; give one, or a list of them")
        made = []
        for index, video in enumerate(batch):
            try:
                frames = [
                    self.prepare(frame) for frame in _first(self.frames(video), length if do_sample_frames else None)
                ]
            except ValueError as error:
                raise ValueError(f"video {index}: {error}" if len(batch) > 1 else str(error)) from error
            if do_sample_frames and len(frames) < length:
                logger.warning(f"video {index} has {len(frames)} frames; the last one is repeated to make {length}")
                frames += [frames[-1]] * (length - len(frames))
            made.append(np.stack(frames))
        if len({len(video) for video in made}) > 1:
            raise ValueError(
                f"the videos of a batch have {', '.join(str(len(video)) for video in made)} frames; give videos of one "
                "length, or do_sample_frames=True"
            )
        return BatchFeature({"pixel_values": np.stack(made)}, tensor_type=return_tensors)

    def windows(self, video: Any, frames_per_second: float | None = None) -> Iterator[tuple[np.ndarray, int]]:
        """A video -> ((num_frames, 3, height, width), how many of them are the video's), ... one window after another.

        The last window goes on with the last frame. Files, and iterators of frames, are read as the windows are taken.
        frames_per_second: of frames that are given, the option's by default; others are resampled in time.
        """
        self._check()
        window: list[np.ndarray] = []
        for frame in self.frames(video, frames_per_second):
            window.append(self.prepare(frame))
            if len(window) == self.num_frames:
                yield np.stack(window), len(window)
                window = []
        if window:
            count = len(window)
            yield np.stack(window + [window[-1]] * (self.num_frames - count)), count

    def frames(self, video: Any, frames_per_second: float | None = None) -> Iterator[np.ndarray]:
        """A video -> its frames at the option's rate, (H, W, 3) uint8 or floats in [0, 1], one at a time."""
        if isinstance(video, (str, os.PathLike)):
            if video_info(video).variable_frame_rate:
                logger.warning(
                    f"{os.fspath(video)} has a variable frame rate; its frames are taken by their times, at "
                    f"{self.frames_per_second:g} a second"
                )
            yield from read_frames(video, frames_per_second=self.frames_per_second)
            return
        if is_pil_image(video) or getattr(video, "ndim", 4) != 4:
            shape = tuple(getattr(video, "shape", getattr(video, "size", ())))
            raise ValueError(f"a video is (T, H, W, 3), a tensor (T, 3, H, W) or a list of frames, not {shape}")
        if not isinstance(video, Iterable):
            raise ValueError(f"a video is a path, an array or frames, not {type(video).__name__}")
        frames = _read_frames(video)
        if frames_per_second is not None and frames_per_second != self.frames_per_second:
            if not 0 < frames_per_second < float("inf"):
                raise ValueError(f"frames_per_second={frames_per_second} is a positive number")
            timed = ((index / frames_per_second, frame) for index, frame in enumerate(frames))
            frames = frames_at_rate(timed, self.frames_per_second, 1 / frames_per_second)
        yield from frames

    def prepare(self, frame: np.ndarray) -> np.ndarray:
        """(H, W, 3) uint8 or floats in [0, 1] -> (3, height, width) float32"""
        size = self.size["height"], self.size["width"]
        if self.do_center_crop:
            frame = crop_center(frame, size)
        values = torch.from_numpy(np.ascontiguousarray(frame)).movedim(-1, 0)[None].float()  # (1, 3, H, W)
        if values.shape[2:] != size:
            values = F.interpolate(values, size, mode=self.interpolation, antialias=self.antialias, align_corners=False)
            # cv2 gives back what it was given: whole levels, none beyond the range.
            values = values.round().clamp(0, 255) if frame.dtype == np.uint8 else values.clamp(0, 1)
        if frame.dtype == np.uint8:
            values = values / 255
        if self.image_mean is not None:
            mean, std = (torch.tensor(v).float()[:, None, None] for v in (self.image_mean, self.image_std))
            values = (values - mean) / std
        return values[0].numpy()

    def to_frames(self, values: Any) -> np.ndarray:
        """A reconstruction, (..., H, W, 3) in the model's values -> (..., H, W, 3) uint8; what is beyond is clipped.

        Raises ValueError for NaN.
        """
        values = torch.as_tensor(values).detach().cpu().float()
        if not values.ndim or values.shape[-1] != 3:
            raise ValueError(f"frames are (..., height, width, 3), not {tuple(values.shape)}")
        if self.image_mean is not None:
            values = values * torch.tensor(self.image_std).float() + torch.tensor(self.image_mean).float()
        if not values.isfinite().all():
            raise ValueError(f"frames hold NaN or infinity, {int((~values.isfinite()).sum()):,} values")
        return (values * 255).round().clamp(0, 255).byte().numpy()

    def _check(self) -> None:
        """Options may be set after it was made."""
        if set(self.size) != {"height", "width"}:
            raise ValueError(f"size is {{'height': 224, 'width': 224}} or other pixels, not {self.size}")
        for name, count in (("num_frames", self.num_frames), *self.size.items()):
            _check_count(name, count)
        if self.interpolation not in INTERPOLATIONS:
            raise ValueError(f"interpolation={self.interpolation!r} must be one of {', '.join(INTERPOLATIONS)}")
        if not 0 < self.frames_per_second < float("inf"):
            raise ValueError(f"frames_per_second={self.frames_per_second} is a positive number")
        if (self.image_mean is None) != (self.image_std is None):
            raise ValueError("image_mean and image_std go together; give both or neither")
        for name in ("image_mean", "image_std"):
            given = getattr(self, name)
            if given is not None and (len(given) != 3 or (name == "image_std" and min(given) <= 0)):
                raise ValueError(f"{name}={given} is a number for each of 3 channels, a deviation more than 0")


def crop_center(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """(H, W, 3) -> its largest centre part of the shape of `size`: a square, where that is one"""
    height, width = frame.shape[:2]
    if size[0] * width > size[1] * height:
        new = height, max(1, height * size[1] // size[0])
    else:
        new = max(1, width * size[0] // size[1]), width
    # Halves are rounded down one by one, as the notebook does it.
    top, left = height // 2 - new[0] // 2, width // 2 - new[1] // 2
    return frame[top : top + new[0], left : left + new[1]]


def read_frame(frame: Any) -> np.ndarray:
    """A PIL image, array or tensor -> (H, W, 3), uint8 or float32 in [0, 1]"""
    first = isinstance(frame, Tensor)
    if is_pil_image(frame):
        frame = frame.convert("RGB")
    pixels = np.asarray(frame.detach().cpu() if isinstance(frame, Tensor) else frame)
    if pixels.ndim == 2:
        pixels = pixels[..., None]
    axis = next((a for a in ((0, -1) if first else (-1, 0)) if pixels.ndim == 3 and 1 <= pixels.shape[a] <= 4), None)
    if axis is None or not pixels.size:
        raise ValueError(f"it is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4), tensors (3, H, W), not {pixels.shape}")
    pixels = np.moveaxis(pixels, axis, -1)
    pixels = pixels[..., :3] if pixels.shape[-1] >= 3 else pixels[..., :1].repeat(3, axis=-1)
    top = {"u": 255, "i": 255, "f": 1}.get(pixels.dtype.kind)
    if top is None:
        raise ValueError(f"it holds integers in 0..255 or floats in [0, 1], not {pixels.dtype}")
    if not np.isfinite(pixels).all():
        raise ValueError(f"it holds NaN or infinity, {int((~np.isfinite(pixels)).sum()):,} values")
    if pixels.min() < 0 or pixels.max() > top:
        raise ValueError(
            f"it holds {pixels.min()}..{pixels.max()}, and {pixels.dtype} is in 0..{top}; integers are in 0..255, floats "
            "in [0, 1]"
        )
    return pixels.astype(np.float32 if pixels.dtype.kind == "f" else np.uint8)


def _read_frames(frames: Iterable[Any]) -> Iterator[np.ndarray]:
    """`read_frame` of each, all of one size, at least one; ValueError that names the frame."""
    shape = None
    for index, frame in enumerate(frames):
        try:
            pixels = read_frame(frame)
            if shape is not None and pixels.shape != shape:
                raise ValueError(f"it is {pixels.shape[0]}x{pixels.shape[1]}, those before are {shape[0]}x{shape[1]}")
        except ValueError as error:
            raise ValueError(f"frame {index} cannot be used: {error}") from error
        shape = pixels.shape
        yield pixels
    if shape is None:
        raise ValueError("the video has no frames; give at least one")


def _first(frames: Iterator[np.ndarray], count: int | None) -> Iterator[np.ndarray]:
    for index, frame in enumerate(frames):
        yield frame
        if index + 1 == count:
            return


def _is_batch(videos: Any) -> bool:
    """Are these several videos, not one?"""
    if isinstance(videos, (str, os.PathLike)) or is_pil_image(videos):
        return False
    if hasattr(videos, "ndim"):
        if videos.ndim not in (4, 5):
            raise ValueError(f"a video is (T, H, W, 3), a tensor (T, 3, H, W), not {tuple(videos.shape)}")
        return videos.ndim == 5
    if not isinstance(videos, (list, tuple)):
        raise ValueError(f"a video is a path, an array or a list of frames, not {type(videos).__name__}")
    first = videos[0] if videos else None
    return not videos or isinstance(first, (str, os.PathLike, list, tuple)) or getattr(first, "ndim", 0) == 4


def _check_count(name: str, count: Any) -> None:
    if isinstance(count, bool) or not isinstance(count, (int, np.integer)) or count < 1:
        raise ValueError(f"{name}={count!r} is a whole number from 1")
