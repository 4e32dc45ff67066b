"""Stems: from a modality's tensor at the boundary to features on a grid, channels last.

Images come as (B, C, H, W), videos and frame pairs as (B, T, C, H, W), sound as (B, samples, 1).
Source: deepmind-research perceiver/io_processors.py (ImagePreprocessor, Conv2DDownsample, space_to_depth).
"""

import itertools
import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .registry import STEMS, register_stem

PADDINGS = ("same", "builtin")


class Stem(nn.Module):
    """Base of stems; a subclass sets `channels`, the width of the features it gives."""

    channels: int

    def forward(self, x: Tensor) -> Tensor:
        """Tensor at the boundary -> (B, n_1, ..., n_d, channels)"""
        raise NotImplementedError

    def element_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """A mask (B, ...) over the tensor at the boundary -> one over the elements; others are left as they are."""
        return mask


class ImageStem(Stem):
    """Base of stems for (B, C, H, W) and (B, T, C, H, W); `in_channels` is C."""

    def __init__(self, in_channels: int):
        super().__init__()
        self.in_channels = in_channels

    def channels_last(self, x: Tensor) -> Tensor:
        """(B, C, H, W) or (B, T, C, H, W) -> (B, H, W, C) or (B, T, H, W, C); ValueError for another rank or C."""
        axis = x.ndim - 3
        if x.ndim not in (4, 5) or x.shape[axis] != self.in_channels:
            hint = "; channels come before height and width" if x.shape[-1] == self.in_channels else ""
            raise ValueError(
                f"images are (batch, {self.in_channels}, height, width) and videos (batch, time, {self.in_channels}, "
                f"height, width) here, not {tuple(x.shape)}{hint}"
            )
        return x.movedim(axis, -1)


@register_stem("pixels")
class PixelStem(ImageStem):
    """Every pixel as it is, or every `spatial_downsample`-th and every `temporal_downsample`-th frame."""

    def __init__(self, *, in_channels: int = 3, spatial_downsample: int = 1, temporal_downsample: int = 1):
        super().__init__(in_channels)
        _check_positive(spatial_downsample=spatial_downsample, temporal_downsample=temporal_downsample)
        self.spatial_downsample, self.temporal_downsample = spatial_downsample, temporal_downsample
        self.channels = in_channels

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels_last(x)
        if x.ndim == 5:
            x = x[:, :: self.temporal_downsample]
        elif self.temporal_downsample != 1:
            raise ValueError(f"temporal_downsample={self.temporal_downsample} needs a video, not an image")
        return x[..., :: self.spatial_downsample, :: self.spatial_downsample, :]


@register_stem("conv")
class ConvStem(ImageStem):
    """`num_layers` times 7x7/2 convolution, BatchNorm, relu, 3x3/2 max-pool: 4 ** num_layers smaller each side.

    padding "same" is JAX's SAME at run-time sizes (224 -> 112 -> 56); "builtin" is transformers' (224 -> 112 -> 55).
    Frames of a video are taken one by one, or `temporal_downsample` of them as the channels of one, in the order (t, c);
    one left becomes an image, as in the flow model. exact_sizes: refuse sides that are no multiple of 4 ** num_layers, so
    that what is upsampled again has the input's size. Raises ValueError for them.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        channels: int = 64,
        num_layers: int = 1,
        use_batchnorm: bool = True,
        padding: str = "same",
        temporal_downsample: int = 1,
        exact_sizes: bool = False,
    ):
        super().__init__(in_channels)
        _check_positive(num_layers=num_layers, channels=channels, temporal_downsample=temporal_downsample)
        if padding not in PADDINGS:
            raise ValueError(f"padding={padding!r} must be one of {', '.join(PADDINGS)}")
        self.padding, self.channels = padding, channels
        self.temporal_downsample = temporal_downsample
        self.multiple = 4**num_layers if exact_sizes else 1
        widths = [in_channels * temporal_downsample] + [channels] * num_layers
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, kernel_size=7, stride=2, bias=False) for a, b in itertools.pairwise(widths)
        )
        # DeepMind's decay 0.9 is torch's momentum 0.1.
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(channels, eps=1e-5, momentum=0.1) if use_batchnorm else nn.Identity()
            for _ in range(num_layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self._merge_frames(self.channels_last(x))
        frames = x.flatten(0, 1) if x.ndim == 5 else x
        frames = frames.movedim(-1, 1)  # (frames, C, H, W)
        self._check_sizes(*frames.shape[-2:])
        for conv, norm in zip(self.convs, self.norms, strict=True):
            frames = F.relu(norm(conv(self._pad(frames, kernel=7, value=0.0))))
            # Zeros pad as well as minus infinity would: relu has left nothing below zero.
            frames = F.max_pool2d(self._pad(frames, kernel=3, value=0.0), kernel_size=3, stride=2)
        frames = frames.movedim(1, -1)
        return frames.unflatten(0, x.shape[:2]) if x.ndim == 5 else frames

    def _merge_frames(self, x: Tensor) -> Tensor:
        if self.temporal_downsample == 1:
            return x
        if x.ndim == 4:
            raise ValueError(f"temporal_downsample={self.temporal_downsample} needs a video, not an image")
        x = space_to_depth(x, (self.temporal_downsample, 1, 1))
        return x[:, 0] if x.shape[1] == 1 else x

    def _check_sizes(self, height: int, width: int) -> None:
        if height % self.multiple or width % self.multiple:
            padded = "x".join(str(math.ceil(n / self.multiple) * self.multiple) for n in (height, width))
            raise ValueError(
                f"{height}x{width} pixels are no multiples of {self.multiple}; pad them below and on the right to {padded} "
                "and crop the answer, or let the image processor do both"
            )

    def _pad(self, x: Tensor, kernel: int, value: float) -> Tensor:
        if self.padding == "builtin":
            return F.pad(x, (3, 3, 3, 3)) if kernel == 7 else x
        (top, bottom), (left, right) = (same_padding(n, kernel, stride=2) for n in x.shape[-2:])
        return F.pad(x, (left, right, top, bottom), value=value)


@register_stem("conv1x1")
class Conv1x1Stem(ImageStem):
    """A linear map of each pixel's channels, of every `spatial_downsample`-th pixel."""

    def __init__(self, *, in_channels: int = 3, channels: int = 64, spatial_downsample: int = 1):
        super().__init__(in_channels)
        _check_positive(spatial_downsample=spatial_downsample, channels=channels)
        self.spatial_downsample, self.channels = spatial_downsample, channels
        self.conv = nn.Conv2d(in_channels, channels, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels_last(x)[..., :: self.spatial_downsample, :: self.spatial_downsample, :]
        frames = x.flatten(0, 1) if x.ndim == 5 else x
        frames = self.conv(frames.movedim(-1, 1)).movedim(1, -1)
        return frames.unflatten(0, x.shape[:2]) if x.ndim == 5 else frames


@register_stem("patches")
class PatchStem(ImageStem):
    """Space to depth: patches of (temporal, spatial, spatial) pixels, channels in the order (t, h, w, c).

    `project` adds a linear to that many channels. One frame left after temporal downsampling becomes an image, as in
    the flow model. Raises ValueError for sizes that are no multiple of the patch.

    kernel_size: windows of so many pixels a side around each patch, which overlap, with zeros outside the frame. Each
    frame's are projected by themselves, all by one linear, so what frames show can be compared; then frames are merged:
    (t, project) channels. normalize: a LayerNorm follows the linear.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        spatial_downsample: int = 1,
        temporal_downsample: int = 1,
        project: int | None = None,
        kernel_size: int | None = None,
        normalize: bool = False,
    ):
        super().__init__(in_channels)
        _check_positive(spatial_downsample=spatial_downsample, temporal_downsample=temporal_downsample)
        if kernel_size is not None:
            _check_positive(kernel_size=kernel_size)
            if kernel_size < spatial_downsample:
                raise ValueError(
                    f"kernel_size={kernel_size} leaves pixels out between windows that are {spatial_downsample} apart; "
                    f"give at least spatial_downsample={spatial_downsample}"
                )
        if not project and (normalize or kernel_size is not None):
            option = "normalize" if normalize else "kernel_size"
            raise ValueError(f"{option} acts on what is projected; give project=..., the number of channels")
        self.spatial_downsample, self.temporal_downsample = spatial_downsample, temporal_downsample
        self.kernel_size = kernel_size
        of_frame = in_channels * (kernel_size or spatial_downsample) ** 2
        width = of_frame * (1 if kernel_size else temporal_downsample)
        self.linear = nn.Linear(width, project) if project else None
        self.norm = nn.LayerNorm(project) if project and normalize else None
        self.channels = (project or width) * (temporal_downsample if kernel_size else 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.channels_last(x)
        if x.ndim == 4 and self.temporal_downsample != 1:
            raise ValueError(f"temporal_downsample={self.temporal_downsample} needs a video, not an image")
        block: tuple[int, ...] = (self.spatial_downsample,) * 2
        if x.ndim == 5:
            block = (self.temporal_downsample, *block)
        if self.kernel_size is None:
            x = self._project(space_to_depth(x, block))
        else:
            check_divides(x.shape[1:-1], block)
            x = self._project(windows(x, self.kernel_size, self.spatial_downsample))
            x = space_to_depth(x, (self.temporal_downsample, 1, 1)) if x.ndim == 5 else x
        return x[:, 0] if x.ndim == 5 and x.shape[1] == 1 else x

    def _project(self, x: Tensor) -> Tensor:
        x = x if self.linear is None else self.linear(x)
        return x if self.norm is None else self.norm(x)


@register_stem("audio_patches")
class AudioPatchStem(Stem):
    """(B, samples, 1) or (B, samples) -> (B, samples / samples_per_patch, samples_per_patch)

    Raises ValueError for a number of samples that is no multiple of the patch.
    """

    def __init__(self, *, samples_per_patch: int = 96):
        super().__init__()
        _check_positive(samples_per_patch=samples_per_patch)
        self.channels = samples_per_patch

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim not in (2, 3):
            raise ValueError(f"sound is (batch, samples, channels), not {tuple(x.shape)}")
        samples = x.flatten(1)
        if samples.shape[1] % self.channels or not samples.shape[1]:
            more = -samples.shape[1] % self.channels or self.channels
            raise ValueError(
                f"{samples.shape[1]} samples are not a whole number of patches of {self.channels}; pad with {more} more"
            )
        return samples.unflatten(1, (-1, self.channels))

    def element_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """(B, samples) -> (B, patches): a patch is there when any of its samples is"""
        of_samples = mask.ndim == 2 and mask.shape[1] == x.shape[1] and x.shape[1] % self.channels == 0
        return (mask != 0).unflatten(1, (-1, self.channels)).any(dim=-1) if of_samples else mask


@register_stem("spectrogram")
class SpectrogramStem(Stem):
    """Every value of (B, time, bands) an element of one channel, on the grid (time, bands), or in one row if `flatten`.

    Source: the original Perceiver, section 4.2: a log-mel spectrogram of 60 x 80 is 4,800 inputs, once flattened.
    """

    channels = 1

    def __init__(self, *, flatten: bool = False):
        super().__init__()
        self.flatten = flatten

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 3:
            raise ValueError(f"a spectrogram is (batch, time, bands), not {tuple(x.shape)}")
        return (x.flatten(1) if self.flatten else x)[..., None]

    def element_mask(self, mask: Tensor, x: Tensor) -> Tensor:
        """(B, time) -> (B, time, bands)"""
        return mask[..., None].expand(-1, -1, x.shape[2]) if mask.shape[1:] == x.shape[1:2] else mask


@register_stem("permuted")
class PermutedStem(Stem):
    """Another stem behind one permutation of the pixels, the same for every image: what stood at place p[i] comes to i.

    Positions stay with the places. The permutation of `grid`, (height, width), is drawn from `seed` and kept with the
    weights. Raises ValueError for images of another size. Source: Perceiver, section 4.1, permuted ImageNet, where the
    positions are made first and move with the pixels; for a Perceiver that would change nothing.
    """

    def __init__(self, *, stem: dict, grid: Sequence[int], seed: int = 1):
        super().__init__()
        self.stem: Stem = STEMS.build(stem)  # type: ignore[assignment]
        self.channels = self.stem.channels
        self.grid = tuple(grid)
        # Buffers are not drawn anew where weights are loaded onto the meta device, so this one is never there.
        self.permutation: Tensor
        self.register_buffer("permutation", draw_permutation(math.prod(self.grid), seed))

    def forward(self, x: Tensor) -> Tensor:
        if tuple(x.shape[-2:]) != self.grid:
            raise ValueError(
                f"pixels are permuted on a grid of {'x'.join(map(str, self.grid))}, and the input is {tuple(x.shape)}; "
                "resize it to that grid"
            )
        return self.stem(permute_places(x, self.permutation))


def draw_permutation(length: int, seed: int) -> Tensor:
    """(length,) on the CPU, the same for the same seed"""
    return torch.randperm(length, generator=torch.Generator().manual_seed(seed), device="cpu")


def permute_places(x: Tensor, permutation: Tensor) -> Tensor:
    """(..., H, W) -> the same shape, with what stood at flat place permutation[i] at place i"""
    return x.flatten(-2)[..., permutation].unflatten(-1, x.shape[-2:])


@register_stem("values")
class ValueStem(Stem):
    """Features that already stand on a grid, channels last: (B, n_1, ..., n_d, channels) as it is."""

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim < 3 or x.shape[-1] != self.channels:
            raise ValueError(f"values are (batch, ..., {self.channels}), not {tuple(x.shape)}")
        return x


def space_to_depth(x: Tensor, block: Sequence[int]) -> Tensor:
    """(B, n_1, ..., n_d, C) -> (B, n_1 / b_1, ..., n_d / b_d, b_1 * ... * b_d * C), block offsets before channels"""
    grid = x.shape[1:-1]
    check_divides(grid, block)
    d = len(grid)
    split = [size for n, b in zip(grid, block, strict=True) for size in (n // b, b)]
    # Whether other strides can be split may depend on the batch size, which a traced program then checks.
    x = x.contiguous() if torch.compiler.is_compiling() else x
    x = x.reshape(x.shape[0], *split, x.shape[-1])
    outer, inner = [1 + 2 * i for i in range(d)], [2 + 2 * i for i in range(d)]
    return x.permute(0, *outer, *inner, 2 * d + 1).flatten(d + 1)


def check_divides(grid: Sequence[int], block: Sequence[int]) -> None:
    """Raise ValueError, with the nearest sizes, unless a grid is a whole number of blocks along each axis."""
    if any(n % b for n, b in zip(grid, block, strict=True)) or not all(grid):
        nearest = "x".join(str(max(n // b, 1) * b) for n, b in zip(grid, block, strict=True))
        raise ValueError(
            f"a grid of {'x'.join(map(str, grid))} does not divide into patches of {'x'.join(map(str, block))}; "
            f"resize or crop it, for instance to {nearest}"
        )


def windows(x: Tensor, kernel: int, stride: int) -> Tensor:
    """(..., H, W, C) -> (..., H / stride, W / stride, kernel * kernel * C), each around its patch, zeros outside"""
    (top, bottom), (left, right) = (same_padding(n, kernel, stride) for n in x.shape[-3:-1])
    x = F.pad(x, (0, 0, left, right, top, bottom)).unfold(-3, kernel, stride).unfold(-3, kernel, stride)
    return x.movedim(-3, -1).flatten(-3)  # (..., h, w, C, kernel, kernel) until here


def same_padding(size: int, kernel: int, stride: int) -> tuple[int, int]:
    """Zeros before and after, as TensorFlow's and JAX's SAME; the larger half goes after."""
    total = kernel - stride + -size % stride
    if kernel < stride:
        total = max(total, 0)
    return total // 2, total - total // 2


def _check_positive(**options: int) -> None:
    for name, value in options.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a whole number from 1, not {value!r}")


STEMS.seal()
