"""Frames -> the flow model's features, and its flow of tiles -> flow of frames, in pixels.

Source: DeepMind's optical_flow.ipynb (normalisation, 3x3 patches, tiles of the training size, their weights).
"""

import contextlib
import difflib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from torch import Tensor
from transformers.image_processing_base import BatchFeature
from transformers.image_processing_utils import BaseImageProcessor
from transformers.image_utils import is_pil_image

# One grey level of 8 bits in [-1, 1]: contrast below it is noise and not stretched further.
LEAST_CONTRAST = 2 / 255


class FlowImagesKwargs(TypedDict, total=False):
    tile_size: dict[str, int]
    min_overlap: int
    patch_size: int
    flow_scale_factor: float
    contrast_normalize: bool


class PerceiverIOFlowImageProcessor(BaseImageProcessor):
    """Two or more frames of any size -> `pixel_values` (tiles, 2, 27, h, w), and the model's flow of them back to frames.

    A frame is a PIL image, numpy array or torch tensor. Integers are 0..255 (uint16: 0..65535), floats are 0..1. Grey
    becomes RGB, alpha is dropped. Channels are looked for in the last axis of numpy arrays and in the first of tensors,
    then in the other one; `input_data_format` ("channels_first", "channels_last") says it where that is wrong.

    tile_size: what the model reads at once, its training size. A smaller frame is continued by its last row and column,
        below and to the right, and the flow there is cut off. A larger one is read in tiles: every tile-minus-overlap
        pixels, the last one flush with the frame's end.
    min_overlap: pixels that neighbouring tiles share at least. Their flows are averaged, weighted by the distance to
        their tile's nearest edge.
    patch_size: 3 gives each pixel its 3x3 neighbours, (ph, pw, c) = 27 channels, zeros beyond the tile; 1 gives RGB.
    flow_scale_factor: the model's flow times this is in pixels; `post_process_optical_flow` multiplies once.
    contrast_normalize: the two frames of a pair get mean 0 and standard deviation 1, together. DeepMind's do not.

    DeepMind's positions, without its faults: it repeats a tile where the frame ends with one (its flow then counts
    twice), and fails where the last but one would leave the frame, at 697 to 715 rows for one.
    """

    valid_kwargs = FlowImagesKwargs
    model_input_names = ["pixel_values"]

    def __init__(
        self,
        tile_size: dict[str, int] | None = None,
        min_overlap: int = 20,
        patch_size: int = 3,
        flow_scale_factor: float | int = 20.0,
        contrast_normalize: bool = False,
        **kwargs: Any,
    ):
        for name in kwargs:
            if close := difflib.get_close_matches(name, FlowImagesKwargs.__annotations__, n=1, cutoff=0.8):
                raise ValueError(f"{type(self).__name__} has no option {name!r}; did you mean {close[0]!r}?")
        # The file that it names is written by save_with_code alone; a plain save does not promise it.
        kwargs.pop("auto_map", None)
        super().__init__(**kwargs)
        self.tile_size = dict(tile_size or {"height": 368, "width": 496})
        self.min_overlap = min_overlap
        self.patch_size = patch_size
        self.flow_scale_factor = flow_scale_factor
        self.contrast_normalize = contrast_normalize
        self._tile()
        if patch_size not in (1, 3):
            raise ValueError(f"patch_size={patch_size!r} is 3, each pixel with its neighbours, or 1")
        if not 0 < flow_scale_factor < float("inf"):
            raise ValueError(f"flow_scale_factor={flow_scale_factor} turns flow into pixels; it is more than 0")

    def preprocess(
        self,
        images: Any,
        return_tensors: str | None = None,
        input_data_format: str | None = None,
    ) -> BatchFeature:
        """A pair of frames, n frames (n - 1 pairs), or pairs of frames -> `pixel_values` (tiles, 2, C, h, w) of all.

        Pair after pair, tiles in the order of `tile_corners`. Frames of one pair have one size, pairs may differ.
        For what does not fit into memory at once there are `pairs`, `tiles` and `stitcher`.
        """
        if is_pil_image(images) or getattr(images, "ndim", None) in (2, 3):
            raise ValueError("one frame is given, and flow needs two; give a pair, or frames in order")
        pairs = list(self.pairs(images, input_data_format))
        num_tiles = sum(len(self.tile_corners(*first.shape[1:])) for first, _ in pairs)
        height, width = self._tile()
        shape = (num_tiles, 2, 3 * self.patch_size**2, height, width)
        check_memory(
            4 * int(np.prod(shape, dtype=object)),
            f"the features of {num_tiles} tiles of {height}x{width}",
            "give fewer pairs at a time, or take one tile at a time from `tiles`",
        )
        features = np.empty(shape, np.float32)
        made = (tile for pair in pairs for tile in self.tiles(*pair))
        for index, tile in enumerate(made):
            features[index] = tile
        return BatchFeature({"pixel_values": features}, tensor_type=return_tensors)

    def post_process_optical_flow(self, outputs: Any, target_sizes: Any = None) -> list[Tensor]:
        """The model's output, or its logits (tiles, h, w, 2) -> for each pair its flow (H, W, 2) in pixels, float32

        target_sizes: (H, W) of each pair's frames, or one for all pairs; None if they have the tile's size.
        """
        logits = torch.as_tensor(getattr(outputs, "logits", outputs))
        height, width = self._tile()
        if logits.shape[1:] != (height, width, 2):
            raise ValueError(f"flow of tiles is (tiles, {height}, {width}, 2), not {tuple(logits.shape)}")
        sizes = np.asarray((height, width) if target_sizes is None else target_sizes).tolist()
        if sizes and not isinstance(sizes[0], list):
            sizes = [sizes] * max(len(logits) // len(self.tile_corners(*sizes)), 1)
        counts = [len(self.tile_corners(*size)) for size in sizes]
        if sum(counts) != len(logits):
            shown = ", ".join(f"{h}x{w}" for h, w in sizes[:8]) + (", ..." if len(sizes) > 8 else "")
            raise ValueError(f"{len(logits)} tiles are given; frames of {shown} have {sum(counts)}")
        flows = []
        for size, tiles in zip(sizes, logits.split(counts), strict=True):
            stitcher = self.stitcher(*size)
            for tile in tiles:
                stitcher.add(tile)
            flows.append(stitcher.flow())
        return flows

    def read_frame(self, frame: Any, input_data_format: str | None = None) -> np.ndarray:
        """Any one frame -> (3, H, W) float32 in [-1, 1]

        Raises ValueError for what is no frame, is empty, has other channels or values than the class says, or NaN.
        """
        channels_first = isinstance(frame, Tensor)
        if isinstance(frame, Tensor):
            frame = frame.detach().cpu()
            frame = (frame.float() if frame.dtype == torch.bfloat16 else frame).numpy()
        elif is_pil_image(frame):
            frame, input_data_format = _pillow_pixels(frame), "channels_last"
        elif isinstance(frame, (str, bytes, os.PathLike)):
            raise ValueError(f"{frame!r} is no frame but its name; open it first, or use the pipeline, which does")
        pixels = _channels_last(np.asarray(frame), channels_first, input_data_format)
        pixels = _rescaled(pixels[..., :1] if pixels.shape[-1] < 3 else pixels[..., :3])
        return np.ascontiguousarray(np.broadcast_to(np.moveaxis(pixels, -1, 0), (3, *pixels.shape[:2])))

    def pairs(
        self, frames: Iterable[Any], input_data_format: str | None = None
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Frames in order, or pairs of frames -> pairs of (3, H, W) from `read_frame`, one at a time, each read once.

        Raises ValueError that names the frame or pair, from 0, when it comes to one that cannot be used.
        """
        items = iter(frames)
        previous: np.ndarray | None = None
        what, count = "", 0
        while True:
            try:
                item = next(items)
            except StopIteration:
                break
            except Exception as error:
                raise ValueError(f"{what or 'frame'} {count} cannot be had (the first is 0): {error}") from error
            found = "pair" if is_pair(item) else "frame"
            try:
                if found != (what or found):
                    raise ValueError(f"it is a {found}, and a {what} came before; give only frames, or only pairs")
                what = found
                if what == "pair":
                    if len(item) != 2:
                        raise ValueError(f"it has {len(item)} frames; a pair has two")
                    previous = self.read_frame(item[0], input_data_format)
                frame = self.read_frame(item[1] if what == "pair" else item, input_data_format)
                if previous is not None:
                    _check_same_size(previous, frame)
            except Exception as error:
                raise ValueError(f"{found} {count} cannot be used (the first is 0): {error}") from error
            if previous is not None:
                yield previous, frame
            previous = frame if what == "frame" else None
            count += 1
        if count < (1 if what == "pair" else 2):
            raise ValueError(f"{count or 'no'} frame{'s' * (count != 1)} given, and flow needs two")

    def tile_corners(self, height: int, width: int) -> list[tuple[int, int]]:
        """(top, left) of the tiles of a frame, row by row."""
        if height < 1 or width < 1:
            raise ValueError(f"a frame is (height, width) pixels, at least 1x1, not {height}x{width}")
        tops, lefts = (
            [*range(0, size - tile, tile - self.min_overlap), max(size - tile, 0)]
            for size, tile in zip((height, width), self._tile(), strict=True)
        )
        return [(top, left) for top in tops for left in lefts]

    def tiles(self, first: np.ndarray, second: np.ndarray) -> Iterator[np.ndarray]:
        """Two frames of `read_frame`, (3, H, W) -> each tile's features (2, C, h, w), in the order of `tile_corners`"""
        _check_same_size(first, second)
        pair = np.stack([first, second])  # (2, 3, H, W)
        if self.contrast_normalize:
            pair -= pair.mean(dtype=np.float64)
            pair /= max(pair.std(dtype=np.float64), LEAST_CONTRAST)
        height, width = self._tile()
        below, right = max(height - pair.shape[2], 0), max(width - pair.shape[3], 0)
        corners = self.tile_corners(*pair.shape[2:])
        if below or right:
            pair = np.pad(pair, ((0, 0), (0, 0), (0, below), (0, right)), mode="edge")
        return (self._patches(pair[:, :, y : y + height, x : x + width]) for y, x in corners)

    def stitcher(self, height: int, width: int) -> "FlowStitcher":
        """What puts the flow of a pair's tiles together, for frames of this size."""
        return FlowStitcher((height, width), self._tile(), self.tile_corners(height, width), self.flow_scale_factor)

    def _tile(self) -> tuple[int, int]:
        """(height, width), checked each time: attributes may be set."""
        size = self.tile_size
        if set(size) != {"height", "width"} or not all(type(n) is int and n > 0 for n in size.values()):
            raise ValueError(f"tile_size is {{'height': 368, 'width': 496}} or other pixels, at least 1x1, not {size}")
        if type(self.min_overlap) is not int or not 0 <= self.min_overlap < min(size.values()):
            raise ValueError(
                f"min_overlap={self.min_overlap!r} is a whole number of pixels from 0, less than a tile's side; "
                f"tiles are {size['height']}x{size['width']}"
            )
        return size["height"], size["width"]

    def _patches(self, tile: np.ndarray) -> np.ndarray:
        """(2, 3, h, w) -> (2, 27, h, w), or as it is"""
        if self.patch_size == 1:
            return tile
        padded = np.pad(tile, ((0, 0), (0, 0), (1, 1), (1, 1)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # (2, 3, h, w, 3, 3)
        return windows.transpose(0, 4, 5, 1, 2, 3).reshape(2, 27, *tile.shape[2:])


class FlowStitcher:
    """Flow of one pair, put together tile by tile: `add` each in order, then `flow`.

    The sums are float64, so that equal tiles, and a single one, give their own float32 values bit for bit.
    """

    def __init__(self, size: tuple[int, int], tile_size: tuple[int, int], corners: list[tuple[int, int]], scale: float):
        self.size, self.tile_size, self.corners, self.scale = size, tile_size, corners, scale
        self.added = 0
        self.total = torch.zeros(*size, 2, dtype=torch.float64)
        self.weight = torch.zeros(*size, 1)
        y, x = (torch.minimum(torch.arange(n) + 1, n - torch.arange(n)) for n in tile_size)
        self.tile_weight = torch.minimum(y[:, None], x[None, :])[..., None].float()  # (h, w, 1), 1 at the edge

    @property
    def complete(self) -> bool:
        return self.added == len(self.corners)

    def add(self, tile: Tensor) -> None:
        """The model's flow of the next tile, (h, w, 2)"""
        if self.complete:
            raise ValueError(f"all {self.added} tiles of a {self.size[0]}x{self.size[1]} frame are there already")
        if tile.shape != (*self.tile_size, 2):
            raise ValueError(f"the flow of a tile is {(*self.tile_size, 2)}, not {tuple(tile.shape)}")
        top, left = self.corners[self.added]
        # What was padded lies beyond the frame.
        height, width = min(self.tile_size[0], self.size[0] - top), min(self.tile_size[1], self.size[1] - left)
        weight = self.tile_weight[:height, :width]
        here = (slice(top, top + height), slice(left, left + width))
        self.total[here] += tile[:height, :width].detach().cpu().double() * weight
        self.weight[here] += weight
        self.added += 1

    def flow(self) -> Tensor:
        """(H, W, 2) float32, x then y, in pixels"""
        if not self.complete:
            raise ValueError(f"{self.added} of {len(self.corners)} tiles were added; add the others first")
        return (self.total / self.weight * self.scale).float()


def is_pair(item: Any) -> bool:
    """Is this several frames, not one?"""
    return isinstance(item, (list, tuple)) or getattr(item, "ndim", 0) == 4


def check_memory(needed: int, what: str, way_out: str, limit: int | None = None) -> None:
    """Raise ValueError where something needs more bytes than the limit, by default all memory of the machine."""
    limit = memory_limit() if limit is None else limit
    if limit is not None and needed > limit:
        raise ValueError(
            f"{what}: {needed / 2**30:,.1f} GiB of memory would be needed, of {limit / 2**30:,.1f} GiB; {way_out}"
        )


def memory_limit() -> int | None:
    """Bytes of memory the machine, or the container, has; None where the system does not say."""
    limits = []
    if hasattr(os, "sysconf"):
        limits.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    with contextlib.suppress(OSError, ValueError):  # no container, or one without a limit
        limits.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(limits, default=None)


def _check_same_size(first: np.ndarray, second: np.ndarray) -> None:
    if first.shape != second.shape:
        (h1, w1), (h2, w2) = first.shape[1:], second.shape[1:]
        raise ValueError(f"the two frames of a pair are {h1}x{w1} and {h2}x{w2}; crop or resize them to one size")


def _pillow_pixels(image: Any) -> np.ndarray:
    """(H, W) or (H, W, channels) of a PIL image of any mode"""
    if image.mode == "I":
        # Pillow's 32 bits are how it opens some 16-bit files.
        pixels = np.asarray(image)
        if pixels.size and not 0 <= pixels.min() <= pixels.max() <= 65535:
            raise ValueError(f"a PIL image of mode I holds 0..65535, not {pixels.min()}..{pixels.max()}; convert it")
        return pixels.astype(np.uint16)
    keeps = image.mode in ("L", "LA", "RGB", "RGBA", "F") or image.mode.startswith("I;16")
    return np.asarray(image if keeps else image.convert("RGB"))


def _channels_last(pixels: np.ndarray, channels_first: bool, input_data_format: str | None) -> np.ndarray:
    """-> (H, W, 1 to 4)"""
    if pixels.ndim == 2:
        pixels = pixels[..., None]
        axes: tuple[int, ...] = (-1,)
    elif input_data_format is not None:
        known = {"channels_first": 0, "channels_last": -1}
        if input_data_format not in known:
            raise ValueError(f"input_data_format={input_data_format!r} is one of {', '.join(known)}")
        axes = (known[input_data_format],)
    else:
        axes = (0, -1) if channels_first else (-1, 0)
    axis = next((a for a in axes if pixels.ndim == 3 and 1 <= pixels.shape[a] <= 4), None)
    if axis is None:
        raise ValueError(
            f"a frame is (H, W), or has 1 (grey), 2 (grey, alpha), 3 (RGB) or 4 (RGBA) channels, last or first; this has "
            f"the shape {pixels.shape}"
        )
    pixels = np.moveaxis(pixels, axis, -1)
    if not pixels.size:
        raise ValueError(f"the frame is empty, {pixels.shape[0]}x{pixels.shape[1]}")
    return pixels


def _rescaled(pixels: np.ndarray) -> np.ndarray:
    """Levels or floats -> float32 in [-1, 1]"""
    kind = pixels.dtype.kind
    if kind not in "uif":
        raise ValueError(f"a frame holds integers 0..255 or floats 0..1, not {pixels.dtype}")
    top = 65535 if kind == "u" and pixels.dtype.itemsize == 2 else 255 if kind != "f" else 1
    if kind == "f" and not (finite := np.isfinite(pixels)).all():
        raise ValueError(f"the frame holds NaN or infinity, {(~finite).sum():,} values of {pixels.size:,}")
    low, high = pixels.min(), pixels.max()
    if low < 0 or high > top:
        raise ValueError(
            f"a frame of {pixels.dtype} holds 0..{top}, and this has {low}..{high}; "
            "integers are 0..255 (uint16: 0..65535), floats 0..1: divide by the largest value that there can be, or clip"
        )
    if kind == "f":
        return (pixels.astype(np.promote_types(pixels.dtype, np.float32)) * 2 - 1).astype(np.float32)
    # In float64, then rounded once, as numpy does it in the notebook.
    return (np.arange(top + 1) / top * 2 - 1).astype(np.float32)[pixels]
