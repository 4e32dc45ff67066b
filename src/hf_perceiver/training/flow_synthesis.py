"""Synthetic pairs of frames with exact optical flow: textured layers that move apart, after AutoFlow's idea.

A background and polygons in front of it, each with a texture of its own (made up, or cut from a photo), move by an
affine map and a smooth warp. The flow is what moved them, so it is exact, forward and backward, and so is which pixels
are hidden. Pair i of a stream depends on (seed, i) alone: streams can be cut, resumed and shared among workers.

    pairs = FlowPairs(TextureBank(seed=0), height=64, width=96, max_motion=14.4, seed=0)
    pair = pairs.pair(0)  # pair.frames (2, H, W, 3) uint8, pair.flow (H, W, 2) pixels, pair.occluded (H, W)

Needs OpenCV and scikit-learn (its two sample photos), the extra `train`.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

TEXTURE_SIZE = 256
PHOTOS = ("china.jpg", "flower.jpg")
# Families of textures; the last is never trained on.
TRAIN_FAMILIES, HELD_OUT_FAMILIES = ("clouds", "leaves", "weave"), ("clouds", "leaves", "weave", "cells")
# A smooth warp's slope stays below this, so that it has an inverse, found by this many fixed-point steps.
MAX_SLOPE, INVERSE_STEPS = 0.3, 12


@dataclass
class FlowPair:
    """Two frames and the flow between them.

    frames (2, H, W, 3) uint8; flow (H, W, 2) float32 pixels, x then y, from the first frame to the second;
    backward_flow the same from the second to the first; occluded (H, W) bool: pixels of the first frame that are hidden
    in the second or leave it; backward_occluded those of the second.
    """

    frames: np.ndarray
    flow: np.ndarray
    backward_flow: np.ndarray
    occluded: np.ndarray
    backward_occluded: np.ndarray

    def reversed(self) -> "FlowPair":
        """The pair fed the other way round; its flow is the exact inverse, not an estimate."""
        return FlowPair(self.frames[::-1], self.backward_flow, self.flow, self.backward_occluded, self.occluded)


@dataclass(frozen=True)
class Scene:
    """How hard the pairs are. Each layer's largest displacement is drawn from 0 to `max_motion` pixels.

    max_layers: polygons in front of the background, at most. affine, smooth: shares (0 to 1) of the layers that also
    turn, scale and shear, and that also warp.
    """

    max_motion: float
    max_layers: int = 4
    affine: float = 0.7
    smooth: float = 0.5

    def __post_init__(self) -> None:
        if self.max_motion < 0 or self.max_layers < 0:
            raise ValueError(f"max_motion={self.max_motion} and max_layers={self.max_layers} must be 0 or more")
        for name in ("affine", "smooth"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} is a share of the layers, 0 to 1")


class TextureBank:
    """Square colour pictures to cover layers with, made once: (count, 256, 256, 3) uint8.

    photos: which of scikit-learn's sample photos a share of the layers is cut from; () for none.
    """

    def __init__(
        self,
        *,
        seed: int = 0,
        count: int = 96,
        photos: Sequence[str] = PHOTOS[:1],
        families: Sequence[str] = TRAIN_FAMILIES,
        photo_share: float = 0.4,
    ):
        if count < 1:
            raise ValueError(f"count={count}: a bank needs at least one texture")
        for name in families:
            if name not in _FAMILIES:
                raise ValueError(f"unknown texture family {name!r}; known: {', '.join(_FAMILIES)}")
        rng = np.random.default_rng([seed, 1])
        pictures = [_load_photo(name) for name in photos]
        made = []
        for i in range(count):
            if pictures and rng.random() < photo_share:
                made.append(_cut(rng, pictures[rng.integers(len(pictures))]))
            else:
                made.append(_FAMILIES[families[i % len(families)]](rng))
        self.textures = np.stack(made)

    def __len__(self) -> int:
        return len(self.textures)

    def draw(self, rng: np.random.Generator) -> np.ndarray:
        """One of the textures, (256, 256, 3)."""
        return self.textures[rng.integers(len(self.textures))]


class Motion:
    """How a layer moves: x -> x + displacement(x), affine about `centre` plus waves; exact, and invertible.

    matrix (2, 2): what the affine part adds to x; shift (2,); waves: (direction (2,), wave vector (2,), phase) each.
    """

    def __init__(self, centre: np.ndarray, matrix: np.ndarray, shift: np.ndarray, waves: Sequence[tuple] = ()):
        self.centre, self.matrix, self.shift, self.waves = centre, matrix, shift, list(waves)
        self._inverse = np.linalg.inv(np.eye(2) + matrix).astype(np.float32)

    @classmethod
    def draw(
        cls, rng: np.random.Generator, *, box: tuple[float, float, float, float], size: float, scene: Scene
    ) -> "Motion":
        """A motion whose largest displacement in `box` (x0, y0, x1, y1) is as long as a vector drawn evenly from a disc.

        The disc's radius is scene.max_motion. An affine part alone may turn out smaller.

        size: the frame's longer side, which waves are measured by.
        """
        x0, y0, x1, y1 = box
        centre = np.array([(x0 + x1) / 2, (y0 + y1) / 2])
        largest = scene.max_motion * math.sqrt(rng.random())
        angle = rng.uniform(0, 2 * math.pi)
        shift = np.array([math.cos(angle), math.sin(angle)]) * largest
        matrix, waves = np.zeros((2, 2)), []
        if rng.random() < scene.affine:
            turn, grow, shear = rng.normal(0, 1, 3) * (0.12, 0.10, 0.05)
            linear = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
            matrix = linear @ np.array([[1 + grow, shear], [0, 1 + grow]]) - np.eye(2)
            # Turning may be all of the motion, or part of it.
            shift = shift * rng.random()
        if rng.random() < scene.smooth:
            for _ in range(2):
                length = size * rng.uniform(0.5, 1.5)
                turn, along = rng.uniform(0, 2 * math.pi, 2)
                amplitude = rng.random() * min(MAX_SLOPE / 2 * length / (2 * math.pi), largest / 2)
                direction = amplitude * np.array([math.cos(along), math.sin(along)])
                vector = 2 * math.pi / length * np.array([math.cos(turn), math.sin(turn)])
                waves.append((direction, vector, rng.uniform(0, 2 * math.pi)))
        corners = np.array([[x, y] for x in (x0, x1) for y in (y0, y1)]) - centre
        bound = np.linalg.norm(corners @ matrix.T + shift, axis=1).max() + sum(np.linalg.norm(w[0]) for w in waves)
        scale = largest / bound if bound > 0 else 0.0
        # Never stretched: an affine part that is far smaller than asked for stays so.
        scale = min(scale, 1.0) if matrix.any() else scale
        waves = [(direction * min(scale, 1.0), vector, phase) for direction, vector, phase in waves]
        return cls(centre, matrix * scale, shift * scale, waves)

    def forward(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) in the first frame -> where they are in the second"""
        moved = points + (points - self.centre) @ self.matrix.T + self.shift
        return (moved + self._wave(points)).astype(np.float32)

    def backward(self, points: np.ndarray) -> np.ndarray:
        """(..., 2) in the second frame -> where they were in the first"""
        target = (points - self.centre - self.shift).astype(np.float32)
        found = target @ self._inverse.T + self.centre.astype(np.float32)
        for _ in range(INVERSE_STEPS if self.waves else 0):
            found = (target - self._wave(found)) @ self._inverse.T + self.centre.astype(np.float32)
        return found.astype(np.float32)

    def _wave(self, points: np.ndarray) -> np.ndarray:
        total = np.zeros(points.shape, np.float32)
        for direction, vector, phase in self.waves:
            wave = np.sin(points @ vector.astype(np.float32) + np.float32(phase))
            total += wave[..., None] * direction.astype(np.float32)
        return total


def draw_pair(rng: np.random.Generator, bank: TextureBank, height: int, width: int, scene: Scene) -> FlowPair:
    """One pair of frames of `scene`, drawn by `rng`."""
    grid = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).astype(np.float32)  # (H, W, 2)
    size = float(max(height, width))
    frames = np.zeros((2, height, width, 3), np.uint8)
    flow, backward_flow = np.zeros((2, height, width, 2), np.float32)
    tops = np.zeros((2, height, width), np.int8)
    for layer in range(1 + int(rng.integers(scene.max_layers + 1))):
        outline = _polygon(rng, height, width) if layer else None
        ends = np.array([[0, 0], [width - 1, height - 1]]) if outline is None else (outline.min(0), outline.max(0))
        low, high = np.clip(ends, 0, [width - 1, height - 1])
        motion = Motion.draw(rng, box=(*low, *high), size=size, scene=scene)
        was = motion.backward(grid)  # where the second frame's pixels were
        texture, place = bank.draw(rng), _placement(rng)
        pictures = [_cover(texture, place(points)) for points in (grid, was)]
        moved = motion.forward(grid)
        for frame, (picture, displacement) in enumerate(zip(pictures, (moved - grid, was - grid), strict=True)):
            field = backward_flow if frame else flow
            if outline is None:
                frames[frame], field[:] = picture, displacement
                continue
            alpha = _fill(motion.forward(outline) if frame else outline, height, width)
            inside = alpha >= 128
            frames[frame] = _blend(frames[frame], picture, alpha)
            field[inside], tops[frame][inside] = displacement[inside], layer
    return FlowPair(
        frames,
        flow,
        backward_flow,
        _hidden(grid + flow, tops[0], tops[1]),
        _hidden(grid + backward_flow, tops[1], tops[0]),
    )


class FlowPairs(IterableDataset):
    """An endless stream of pairs, cut among a DataLoader's workers; `pair(i)` is the i-th.

    max_motion: pixels, for the default Scene; or schedule: pair number -> Scene, for a curriculum.
    transform: (pair, rng, i) -> what the stream gives instead of the pair. start: the first pair's number.
    """

    def __init__(
        self,
        bank: TextureBank,
        *,
        height: int,
        width: int,
        max_motion: float | None = None,
        schedule: Callable[[int], Scene] | None = None,
        transform: Callable[[FlowPair, np.random.Generator, int], Any] | None = None,
        seed: int = 0,
        start: int = 0,
    ):
        if height < 8 or width < 8:
            raise ValueError(f"frames of {height}x{width} are too small for layers; at least 8x8")
        if (max_motion is None) == (schedule is None):
            raise ValueError("give either max_motion or a schedule")
        self.bank, self.height, self.width = bank, height, width
        self.scene = None if max_motion is None else Scene(max_motion)
        self.schedule, self.transform, self.seed, self.start = schedule, transform, seed, start

    def pair(self, index: int) -> Any:
        """Pair number `index`, after `transform`."""
        rng = np.random.default_rng([self.seed, index])
        scene = self.scene if self.schedule is None else self.schedule(index)
        pair = draw_pair(rng, self.bank, self.height, self.width, scene)  # type: ignore[arg-type]
        return pair if self.transform is None else self.transform(pair, rng, index)

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info()
        index, step = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            yield self.pair(index)
            index += step


def _polygon(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(n, 2) outline around a place in the frame: corners, or a smooth blob of many points"""
    centre = rng.uniform([0, 0], [width, height])
    radius = rng.uniform(0.12, 0.4) * min(height, width)
    corners = int(rng.integers(3, 9))
    angles = np.sort(rng.uniform(0, 2 * math.pi, corners))
    radii = radius * rng.uniform(0.6, 1.3, corners)
    # Points along the edges follow a warp, corners alone would not.
    around = np.linspace(0, 2 * math.pi, 64, endpoint=False)
    if rng.random() < 0.5:
        lengths = np.interp(around, angles, radii, period=2 * math.pi)
        kernel = np.hanning(11) / np.hanning(11).sum()
        lengths = np.convolve(np.tile(lengths, 3), kernel, mode="same")[64:128]
        points = np.stack([np.cos(around), np.sin(around)], axis=1) * lengths[:, None]
    else:
        ends = np.stack([np.cos(angles), np.sin(angles)], axis=1) * radii[:, None]
        share = np.linspace(0, 1, 8, endpoint=False)[None, :, None]
        points = (ends[:, None] * (1 - share) + np.roll(ends, -1, axis=0)[:, None] * share).reshape(-1, 2)
    stretch = np.exp(rng.normal(0, 0.3))
    return (points * [stretch, 1 / stretch] + centre).astype(np.float32)


def _fill(outline: np.ndarray, height: int, width: int) -> np.ndarray:
    """(n, 2) outline -> (H, W) uint8 coverage with smooth edges"""
    alpha = np.zeros((height, width), np.uint8)
    cv2.fillPoly(alpha, [np.round(outline * 16).astype(np.int32)], 255, lineType=cv2.LINE_AA, shift=4)
    return alpha


def _blend(below: np.ndarray, above: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    weight = alpha[..., None].astype(np.float32) / 255
    return np.round(below + (above - below.astype(np.float32)) * weight).astype(np.uint8)


def _placement(rng: np.random.Generator) -> Callable[[np.ndarray], np.ndarray]:
    """How a layer's pixels lie on its texture: turned, scaled and shifted at random."""
    angle, zoom = rng.uniform(0, 2 * math.pi), math.exp(rng.uniform(math.log(0.7), math.log(1.8)))
    matrix = zoom * np.array([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    matrix, shift = matrix.astype(np.float32), rng.uniform(0, TEXTURE_SIZE, 2).astype(np.float32)
    return lambda points: points @ matrix.T + shift


def _cover(texture: np.ndarray, places: np.ndarray) -> np.ndarray:
    # The texture goes on as its own mirror image.
    return cv2.remap(texture, places[..., 0], places[..., 1], cv2.INTER_LINEAR, borderMode=cv2.BORDER_REFLECT)


def _hidden(target: np.ndarray, tops: np.ndarray, other_tops: np.ndarray) -> np.ndarray:
    """Whether what is seen here (tops) cannot be seen at `target` (H, W, 2) of the other frame."""
    height, width = tops.shape
    x, y = target[..., 0], target[..., 1]
    outside = (x < 0) | (y < 0) | (x > width - 1) | (y > height - 1)
    hidden = outside
    left, top = np.clip(np.floor(x), 0, width - 1).astype(int), np.clip(np.floor(y), 0, height - 1).astype(int)
    # A pixel partly under a layer in front counts as hidden: its colour is mixed.
    for right, below in ((0, 0), (1, 0), (0, 1), (1, 1)):
        at = other_tops[np.minimum(top + below, height - 1), np.minimum(left + right, width - 1)]
        hidden = hidden | (at > tops)
    return hidden


def _load_photo(name: str) -> np.ndarray:
    if name not in PHOTOS:
        raise ValueError(f"scikit-learn has the sample photos {' and '.join(PHOTOS)}, not {name!r}")
    from sklearn.datasets import load_sample_image

    return np.ascontiguousarray(load_sample_image(name))


def _cut(rng: np.random.Generator, photo: np.ndarray) -> np.ndarray:
    """A square of a photo at a random scale, (256, 256, 3)."""
    side = int(rng.integers(TEXTURE_SIZE, min(photo.shape[:2]) + 1))
    y, x = (int(rng.integers(n - side + 1)) for n in photo.shape[:2])
    cut = cv2.resize(photo[y : y + side, x : x + side], (TEXTURE_SIZE,) * 2, interpolation=cv2.INTER_AREA)
    return cut[:, ::-1].copy() if rng.random() < 0.5 else cut


def _colours(rng: np.random.Generator, field: np.ndarray) -> np.ndarray:
    """(256, 256) in [0, 1] -> colours between a few random ones"""
    stops = int(rng.integers(2, 5))
    palette = rng.uniform(0, 255, (stops, 3))
    at = np.linspace(0, 1, stops)
    return np.stack([np.interp(field, at, palette[:, c]) for c in range(3)], axis=-1)


def _noise(rng: np.random.Generator, cells: int) -> np.ndarray:
    """Smooth noise with about `cells` bumps a side, mean 0 and deviation about 1."""
    coarse = rng.normal(0, 1, (cells, cells)).astype(np.float32)
    return cv2.resize(coarse, (TEXTURE_SIZE,) * 2, interpolation=cv2.INTER_CUBIC)


def _clouds(rng: np.random.Generator) -> np.ndarray:
    """Noise of several scales."""
    fall = rng.uniform(0.4, 1.0)
    layers = [
        np.stack([_noise(rng, cells) * fall**i for i, cells in enumerate((8, 16, 32, 64, 128))]) for _ in range(4)
    ]
    fields = np.stack([layer.sum(0) for layer in layers])
    shared = _colours(rng, _unit(fields[0]))
    own = np.stack([_unit(field) * 255 for field in fields[1:]], axis=-1)
    return _finish(rng, shared + rng.uniform(0, 0.7) * (own - 128))


def _leaves(rng: np.random.Generator) -> np.ndarray:
    """Discs and boxes of all sizes on top of each other."""
    picture = np.full((TEXTURE_SIZE, TEXTURE_SIZE, 3), rng.uniform(0, 255, 3), np.float32)
    for _ in range(600):
        size = float(3 / rng.uniform(0.12, 1.0))
        x, y = rng.uniform(0, TEXTURE_SIZE, 2)
        colour = tuple(float(c) for c in rng.uniform(0, 255, 3))
        if rng.random() < 0.5:
            cv2.circle(picture, (int(x), int(y)), max(int(size), 1), colour, -1)
        else:
            box = cv2.boxPoints(((x, y), (2 * size, size * float(rng.uniform(0.5, 2))), float(rng.uniform(0, 180))))
            cv2.fillPoly(picture, [box.astype(np.int32)], colour)
    return _finish(rng, picture)


def _weave(rng: np.random.Generator) -> np.ndarray:
    """Crossed gratings bent by noise, so that no place looks quite like another."""
    axes = np.arange(TEXTURE_SIZE, dtype=np.float32)
    x, y = np.meshgrid(axes, axes)
    bend = rng.uniform(3, 8) * _noise(rng, 12)
    field = np.zeros_like(x)
    for _ in range(int(rng.integers(2, 4))):
        angle, length = rng.uniform(0, math.pi), rng.uniform(8, 30)
        field += np.sin(2 * math.pi / length * (x * math.cos(angle) + y * math.sin(angle) + bend))
    return _finish(rng, _colours(rng, _unit(field + 0.5 * _noise(rng, 40))))


def _cells(rng: np.random.Generator) -> np.ndarray:
    """Areas around random points, each of one colour (Voronoi), with darker edges."""
    points = rng.uniform(0, TEXTURE_SIZE, (int(rng.integers(150, 500)), 2)).astype(np.float32)
    axes = np.arange(TEXTURE_SIZE, dtype=np.float32)
    to_x, to_y = (axes[:, None] - points[:, axis] for axis in range(2))
    distance = to_y[:, None] ** 2 + to_x[None] ** 2  # (256, 256, points)
    nearest, second = np.partition(distance, 1, axis=-1)[..., :2].transpose(2, 0, 1)
    picture = rng.uniform(20, 255, (len(points), 3))[distance.argmin(-1)]
    edge = np.clip((np.sqrt(second) - np.sqrt(nearest)) / 3, 0, 1)
    return _finish(rng, picture * (0.5 + 0.5 * edge[..., None]))


_FAMILIES: dict[str, Callable[[np.random.Generator], np.ndarray]] = {
    "clouds": _clouds,
    "leaves": _leaves,
    "weave": _weave,
    "cells": _cells,
}


def _unit(field: np.ndarray) -> np.ndarray:
    low, high = np.percentile(field, (1, 99))
    return np.clip((field - low) / max(high - low, 1e-6), 0, 1)


def _finish(rng: np.random.Generator, picture: np.ndarray) -> np.ndarray:
    # Grain, so that no area is without anything to match; then a blur, for what is sharper than a pixel would change its
    # look with every sub-pixel shift.
    grain = rng.normal(0, rng.uniform(5, 25), (TEXTURE_SIZE, TEXTURE_SIZE, 1))
    picture = picture + cv2.blur(grain, (2, 2))[..., None]
    blurred = cv2.GaussianBlur(picture.astype(np.float32), (0, 0), float(rng.uniform(0.7, 1.5)))
    return np.clip(np.round(blurred), 0, 255).astype(np.uint8)
