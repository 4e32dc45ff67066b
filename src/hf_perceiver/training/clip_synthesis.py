"""Generated clips: a textured shape that moves over a textured background, and the tone that goes with it.

The class is shape x motion. What the shape is decides the tone's pitch range and timbre, how it moves decides how pitch
and loudness change, so that pictures and sound tell the same thing. Held-out clips come from other seeds and from
texture families that training never draws.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

SHAPES = ("disc", "square", "triangle", "cross")
MOTIONS = ("slide", "bounce", "orbit", "pulse")
CLASSES = tuple(f"{shape}, {motion}" for shape in SHAPES for motion in MOTIONS)

# Texture families by split; a held-out clip has none that training draws.
TEXTURES = {"train": ("stripes", "checks", "dots", "waves"), "held_out": ("rings", "plaid")}

# Of each shape: lowest pitch in Hz, and the strengths of its first harmonics.
PITCHES = (130.0, 170.0, 220.0, 285.0)
HARMONICS = ((1.0, 0.0, 0.0), (1.0, 0.0, 0.5), (1.0, 0.4, 0.0), (0.7, 0.6, 0.4))

FRAMES_PER_SECOND = 25

# Numbers that a batch is drawn from, one stream for each split.
_STREAMS = {"train": 0, "held_out": 1}


@dataclass(frozen=True)
class ClipShape:
    """Frames, their side in pixels, and sound samples for each frame; the sampling rate is 25 times that."""

    num_frames: int = 16
    size: int = 32
    samples_per_frame: int = 320

    def __post_init__(self) -> None:
        if self.num_frames < 2 or self.size < 8 or self.samples_per_frame < 1:
            raise ValueError(
                f"num_frames={self.num_frames}, size={self.size}, samples_per_frame={self.samples_per_frame}: clips have at "
                "least 2 frames of 8x8 pixels and 1 sample for each"
            )

    @property
    def num_samples(self) -> int:
        return self.num_frames * self.samples_per_frame

    @property
    def sampling_rate(self) -> int:
        return FRAMES_PER_SECOND * self.samples_per_frame


def make_clips(
    count: int, seed: int, batch: int = 0, split: str = "train", shape: ClipShape | None = None
) -> dict[str, np.ndarray]:
    """`count` clips: image (B, T, 3, H, W) in [0, 1], audio (B, samples, 1) in [-1, 1], both float32, label (B,)

    The same (seed, batch, split) gives the same clips. Raises ValueError for an unknown split.
    """
    if split not in TEXTURES:
        raise ValueError(f"split={split!r} must be one of {', '.join(TEXTURES)}")
    shape = shape or ClipShape()
    rng = np.random.default_rng([seed, _STREAMS[split], batch])
    label = rng.integers(len(CLASSES), size=count)
    kind, motion = label // len(MOTIONS), label % len(MOTIONS)
    path = _draw_path(rng, motion, shape)
    image = _draw_frames(rng, kind, path, split, shape)
    return {"image": image, "audio": _draw_sound(rng, kind, motion, path, shape), "label": label}


class Clips(IterableDataset):
    """An endless stream of examples for Trainer: {"inputs": image, audio and label by name}.

    Batch k of the stream depends on (seed, k) alone, also where several workers take turns. start: the first batch, to go
    on after so many.
    """

    def __init__(
        self,
        seed: int,
        *,
        batch_size: int = 32,
        start: int = 0,
        split: str = "train",
        shape: ClipShape | None = None,
    ):
        super().__init__()
        if batch_size < 1 or start < 0:
            raise ValueError(f"batch_size={batch_size} must be at least 1, and start={start} at least 0")
        self.seed, self.batch_size, self.start, self.split = seed, batch_size, start, split
        self.shape = shape or ClipShape()

    def __iter__(self) -> Iterator[dict[str, Any]]:
        worker = get_worker_info()
        batch, step = (self.start, 1) if worker is None else (self.start + worker.id, worker.num_workers)
        while True:
            clips = make_clips(self.batch_size, self.seed, batch, self.split, self.shape)
            tensors = {name: torch.from_numpy(values) for name, values in clips.items()}
            for i in range(self.batch_size):
                yield {"inputs": {name: values[i] for name, values in tensors.items()}}
            batch += step


def _draw_path(rng: np.random.Generator, motion: np.ndarray, shape: ClipShape) -> dict[str, np.ndarray]:
    """Centre x, y, radius (units of half a frame), angle, and phase of the motion, all (B, T) but the last three."""
    count = len(motion)

    def draw(low: float, high: float) -> np.ndarray:
        return rng.uniform(low, high, (count, 1))

    time = np.linspace(0, 1, shape.num_frames)[None]  # (1, T)
    direction = rng.choice([-1.0, 1.0], (count, 1))
    phase = direction * 2 * np.pi * draw(0.75, 1.0) * time + draw(0, 2 * np.pi)
    # From one side towards the other, past the middle.
    along = direction * (time * 2 - 1) * draw(0.35, 0.55)
    x, y = draw(-0.2, 0.2), draw(-0.2, 0.2)
    reach = draw(0.28, 0.42)
    radius = draw(0.42, 0.58) + 0 * time
    slide, bounce, orbit, pulse = ((motion == k)[:, None] for k in range(len(MOTIONS)))
    x = x + slide * along + orbit * reach * np.cos(phase)
    y = y + bounce * (2 * np.abs(np.sin(phase / 2)) - 1) * 0.45 + orbit * reach * np.sin(phase)
    radius = radius * (1 + pulse * 0.4 * np.sin(phase))
    angle = draw(0, 2 * np.pi) + 0 * time
    return {"x": x, "y": y, "radius": radius, "angle": angle, "phase": phase, "direction": direction}


def _draw_frames(
    rng: np.random.Generator, kind: np.ndarray, path: dict[str, np.ndarray], split: str, shape: ClipShape
) -> np.ndarray:
    """Shapes over backgrounds, edges blended over one pixel: (B, T, 3, H, W) float32"""
    count, size = len(kind), shape.size
    axis = ((np.arange(size) + 0.5) / size * 2 - 1).astype(np.float32)
    x, y = axis[None, None, None, :], axis[None, None, :, None]

    def of_frames(name: str) -> np.ndarray:
        return path[name].astype(np.float32)[:, :, None, None]

    u, v = x - of_frames("x"), y - of_frames("y")  # (B, T, H, W)
    cosine, sine = np.cos(of_frames("angle")), np.sin(of_frames("angle"))
    u, v = (u * cosine + v * sine) / of_frames("radius"), (v * cosine - u * sine) / of_frames("radius")
    distance = np.empty_like(u)
    for k, signed_distance in enumerate(_DISTANCES):
        chosen = kind == k
        distance[chosen] = signed_distance(u[chosen], v[chosen])
    cover = np.clip(0.5 - distance * of_frames("radius") * (size / 2), 0, 1)[:, :, None]  # (B, T, 1, H, W)
    front = _texture(rng, u, v, split, wavelengths=(0.45, 0.8))[:, :, None]
    flat_x, flat_y = np.broadcast_arrays(x, y)
    shape_of_background = (count, 1, size, size)
    back = _texture(
        rng,
        np.broadcast_to(flat_x, shape_of_background),
        np.broadcast_to(flat_y, shape_of_background),
        split,
        wavelengths=(0.3, 0.6),
    )[:, :, None]
    dark, light = _draw_colours(rng, count, contrast=(0.45, 0.8))
    front = dark + (light - dark) * front
    dark, light = _draw_colours(rng, count, contrast=(0.2, 0.5))
    back = dark + (light - dark) * back
    return (back + (front - back) * cover).astype(np.float32)


def _draw_colours(rng: np.random.Generator, count: int, contrast: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Two tinted greys that far apart, in either order: (B, 1, 3, 1, 1) twice, in [0, 1]"""
    between = rng.uniform(*contrast, (count, 1))
    low = rng.uniform(0, 1, (count, 1)) * (1 - between)
    pair = [np.clip(grey + rng.uniform(-0.12, 0.12, (count, 3)), 0, 1) for grey in (low, low + between)]
    swap = rng.random((count, 1)) < 0.5
    pair = [np.where(swap, pair[1], pair[0]), np.where(swap, pair[0], pair[1])]
    return tuple(colour.astype(np.float32)[:, None, :, None, None] for colour in pair)  # type: ignore[return-value]


def _texture(
    rng: np.random.Generator, u: np.ndarray, v: np.ndarray, split: str, wavelengths: tuple[float, float]
) -> np.ndarray:
    """Pattern values in [0, 1] at places (B, T, H, W), one family and direction for each clip."""
    count = len(u)
    families = TEXTURES[split]
    chosen = rng.integers(len(families), size=count)
    number = (2 * np.pi / rng.uniform(*wavelengths, count)).astype(np.float32)[:, None, None, None]
    angle, first, second = rng.uniform(0, 2 * np.pi, (3, count)).astype(np.float32)[
        :, :, None, None, None
    ]  # 3 x (B, 1, 1, 1)
    values = np.empty(u.shape, np.float32)
    for k, family in enumerate(families):
        of = chosen == k
        if not of.any():
            continue
        along = (u[of] * np.cos(angle[of]) + v[of] * np.sin(angle[of])) * number[of]
        across = (v[of] * np.cos(angle[of]) - u[of] * np.sin(angle[of])) * number[of]
        values[of] = _PATTERNS[family](along + first[of], across + second[of])
    # Steep flanks, about a pixel wide, instead of a sine's.
    return np.clip(values * 1.5 + 0.5, 0, 1)


def _draw_sound(
    rng: np.random.Generator, kind: np.ndarray, motion: np.ndarray, path: dict[str, np.ndarray], shape: ClipShape
) -> np.ndarray:
    """Slide: the pitch glides; bounce: it swings; orbit: loudness swings; pulse: both follow the size. (B, S, 1)"""
    count, samples = len(kind), shape.num_samples
    frames = np.linspace(0, 1, shape.num_frames)
    at = np.linspace(0, 1, samples)
    swing = np.stack([np.interp(at, frames, row) for row in np.sin(path["phase"])])  # (B, S)
    slide, bounce, orbit, pulse = ((motion == k)[:, None] for k in range(len(MOTIONS)))
    octaves = slide * path["direction"] * (at - 0.5) * 0.3 + bounce * swing * 0.15 - pulse * swing * 0.1
    loudness = 1 + orbit * swing * 0.5 + pulse * swing * 0.5
    pitch = np.asarray(PITCHES)[kind][:, None] * 2 ** (rng.uniform(0, 0.25, (count, 1)) + octaves)
    phase = 2 * np.pi * np.cumsum(pitch, axis=1) / shape.sampling_rate + rng.uniform(0, 2 * np.pi, (count, 1))
    strengths = np.asarray(HARMONICS)[kind]
    tone = sum(strengths[:, h, None] * np.sin((h + 1) * phase) for h in range(strengths.shape[1]))
    # Loudest at about 0.85.
    return (tone * loudness * rng.uniform(0.2, 0.33, (count, 1))).astype(np.float32)[..., None]


def _triangle_distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    sides = [-v, 0.8660254 * u + 0.5 * v, -0.8660254 * u + 0.5 * v]
    return np.maximum(np.maximum(sides[0], sides[1]), sides[2]) - 0.6


def _cross_distance(u: np.ndarray, v: np.ndarray) -> np.ndarray:
    a, b = np.abs(u), np.abs(v)
    return np.minimum(np.maximum(a - 1.05, b - 0.38), np.maximum(a - 0.38, b - 1.05))


# Signed distances from each shape's edge, in its radius: negative inside.
_DISTANCES: tuple[Callable[[np.ndarray, np.ndarray], np.ndarray], ...] = (
    lambda u, v: np.sqrt(u * u + v * v) - 1,
    lambda u, v: np.maximum(np.abs(u), np.abs(v)) - 0.86,
    _triangle_distance,
    _cross_distance,
)

# Patterns of two phases, about -1 to 1.
_PATTERNS: dict[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "stripes": lambda a, b: np.sin(a),
    "checks": lambda a, b: 1.5 * np.sin(a) * np.sin(b),
    "dots": lambda a, b: np.cos(a) + np.cos(b) - 0.5,
    "waves": lambda a, b: np.sin(a + np.sin(b)),
    "rings": lambda a, b: np.sin(np.sqrt(a * a + b * b)),
    "plaid": lambda a, b: np.maximum(np.sin(a), np.sin(b)),
}
