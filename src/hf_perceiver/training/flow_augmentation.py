"""Augmentation of pairs of frames for optical flow, with RAFT's ranges, and a severity for a curriculum.

Colours change for both frames alike or, now and then, for each by itself; boxes of the second frame are painted over;
frames are scaled, stretched, flipped and cut, and their flow with them. Ranges: RAFT's, as AutoFlow's public code
repeats them; sizes that RAFT gives in pixels of 368 x 496 are shares of the frame here. Needs kornia and OpenCV, the
extra `train`.
"""

import math
from dataclasses import dataclass, replace

import cv2
import kornia.enhance
import numpy as np
import torch
from torch import Tensor

from .flow_synthesis import FlowPair

# Flow is interpolated where it is smooth; where neighbours differ by more pixels than this, it has an edge, and no label.
EDGE = 1.0


@dataclass
class FlowAugmentation:
    """(pair, rng, severity) -> an augmented pair with flow for each of its pixels, and which of them are valid.

    brightness, contrast, saturation: factors are drawn within 1 -+ so much; hue: radians; asymmetric: share of the pairs
    whose frames get colours by themselves. eraser: share of the pairs whose second frame loses one or two boxes, with
    sides of `eraser_size` (least, most) of the frame's. spatial: share of the pairs that are scaled by 2^U(`scale`), and
    of these `stretch_share` by 2^U(-stretch, stretch) more on each axis. flips: shares turned left-right and upside down.

    severity, 0 to 1: multiplies the ranges of colour and scale, and the shares but for flips. 0 changes nothing else.
    """

    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.4
    hue: float = 0.5
    asymmetric: float = 0.2
    eraser: float = 0.5
    eraser_size: tuple[float, float] = (50 / 368, 100 / 368)
    spatial: float = 0.8
    scale: tuple[float, float] = (-0.2, 0.6)
    stretch_share: float = 0.8
    stretch: float = 0.2
    flips: tuple[float, float] = (0.5, 0.1)

    def __call__(self, pair: FlowPair, rng: np.random.Generator, severity: float = 1.0) -> tuple[FlowPair, np.ndarray]:
        """-> the pair, and valid (H, W) bool: pixels whose flow is exact"""
        if not 0 <= severity <= 1:
            raise ValueError(f"severity={severity} goes from 0 to 1")
        valid = np.ones(pair.flow.shape[:2], bool)
        if rng.random() < self.spatial * severity:
            pair, valid = self._resize(pair, rng, severity)
        pair, valid = flip(pair, valid, *(rng.random() < share for share in self.flips))
        if severity > 0:
            pair = replace(pair, frames=self._recolour(pair.frames, rng, severity))
            if rng.random() < self.eraser * severity:
                pair = replace(pair, frames=self._erase(pair.frames, rng))
        return pair, valid

    def _resize(self, pair: FlowPair, rng: np.random.Generator, severity: float) -> tuple[FlowPair, np.ndarray]:
        """Scale by random factors and cut out the old size; never smaller than that."""
        scale = rng.uniform(*self.scale) * severity
        stretch = np.zeros(2)
        if rng.random() < self.stretch_share:
            stretch = rng.uniform(-self.stretch, self.stretch, 2) * severity
        factor_x, factor_y = np.maximum(2 ** (scale + stretch), 1.0)
        height, width = pair.flow.shape[:2]
        tall, wide = math.ceil(height * factor_y), math.ceil(width * factor_x)
        top, left = int(rng.integers(tall - height + 1)), int(rng.integers(wide - width + 1))
        return resize_and_crop(pair, (tall, wide), (top, left))

    def _recolour(self, frames: np.ndarray, rng: np.random.Generator, severity: float) -> np.ndarray:
        pictures = torch.from_numpy(np.ascontiguousarray(frames)).movedim(-1, 1).float() / 255  # (2, 3, H, W)
        if rng.random() < self.asymmetric * severity:
            pictures = torch.cat([self._jitter(picture[None], rng, severity) for picture in pictures])
        else:
            pictures = self._jitter(pictures, rng, severity)
        return torch.round(pictures.movedim(1, -1) * 255).to(torch.uint8).numpy()

    def _jitter(self, pictures: Tensor, rng: np.random.Generator, severity: float) -> Tensor:
        ranges = np.array([self.brightness, self.contrast, self.saturation, self.hue]) * severity
        change = rng.uniform(-1, 1, 4) * ranges
        steps = (
            lambda p: kornia.enhance.adjust_brightness_accumulative(p, 1 + change[0]),
            lambda p: kornia.enhance.adjust_contrast_with_mean_subtraction(p, 1 + change[1]),
            lambda p: kornia.enhance.adjust_saturation_with_gray_subtraction(p, 1 + change[2]),
            lambda p: kornia.enhance.adjust_hue(p, float(change[3])),
        )
        for i in rng.permutation(len(steps)):
            pictures = steps[i](pictures).clamp(0, 1)
        return pictures

    def _erase(self, frames: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        """Paint boxes of the second frame in its mean colour: what is there has lost its match."""
        frames = np.ascontiguousarray(frames).copy()
        height, width = frames.shape[1:3]
        colour = frames[1].reshape(-1, 3).mean(axis=0).round().astype(np.uint8)
        for _ in range(int(rng.integers(1, 3))):
            top, left = int(rng.integers(height)), int(rng.integers(width))
            tall, wide = (max(round(rng.uniform(*self.eraser_size) * n), 1) for n in (height, width))
            frames[1, top : top + tall, left : left + wide] = colour
        return frames


def flip(pair: FlowPair, valid: np.ndarray, left_right: bool, upside_down: bool) -> tuple[FlowPair, np.ndarray]:
    """The pair and its mask mirrored, flow and all."""
    for axis, do in ((1, left_right), (0, upside_down)):
        if not do:
            continue
        sign = np.array([-1, 1] if axis == 1 else [1, -1], np.float32)
        pair = FlowPair(
            np.flip(pair.frames, axis + 1),
            np.flip(pair.flow, axis) * sign,
            np.flip(pair.backward_flow, axis) * sign,
            np.flip(pair.occluded, axis),
            np.flip(pair.backward_occluded, axis),
        )
        valid = np.flip(valid, axis)
    return pair, valid


def resize_and_crop(pair: FlowPair, size: tuple[int, int], corner: tuple[int, int]) -> tuple[FlowPair, np.ndarray]:
    """Stretch a pair to `size` (height, width) and cut its old size out at `corner` (top, left).

    -> the pair, and valid (H, W): False where the flow has an edge, as it cannot be interpolated there. What leaves the
    cut counts as occluded.
    """
    height, width = pair.flow.shape[:2]
    factor = np.array([size[1] / width, size[0] / height], np.float32)  # x, y
    here = (slice(corner[0], corner[0] + height), slice(corner[1], corner[1] + width))

    def stretched(picture: np.ndarray, how: int) -> np.ndarray:
        return cv2.resize(np.ascontiguousarray(picture), size[::-1], interpolation=how)[here]

    def moved(flow: np.ndarray, occluded: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        flow = stretched(flow, cv2.INTER_LINEAR) * factor
        ys, xs = np.mgrid[:height, :width]
        x, y = xs + flow[..., 0], ys + flow[..., 1]
        outside = (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1)
        return flow, outside | (stretched(occluded.astype(np.uint8), cv2.INTER_NEAREST) > 0)

    flow, occluded = moved(pair.flow, pair.occluded)
    backward_flow, backward_occluded = moved(pair.backward_flow, pair.backward_occluded)
    frames = np.stack([stretched(frame, cv2.INTER_LINEAR) for frame in pair.frames])
    # A pixel takes its flow from up to 2x2 old ones.
    kernel = np.ones((3, 3), np.uint8)
    source = np.ascontiguousarray(pair.flow)
    edge = (cv2.dilate(source, kernel) - cv2.erode(source, kernel)).max(axis=-1) > EDGE
    valid = stretched(edge.astype(np.uint8), cv2.INTER_NEAREST) == 0
    return FlowPair(frames, flow, backward_flow, occluded, backward_occluded), valid
