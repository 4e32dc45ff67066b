"""What a model reads, for export: its inputs by name, their axes, and which sizes each axis may have.

A grid of Fourier positions may have any size; trained ones label one grid, or texts up to their number.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .heads_text import PerceiverIOForMultipleChoice
from .heads_vision import PerceiverIOForOpticalFlow
from .output_queries import MultimodalQuery, PositionQuery
from .position_encoding import (
    FourierPositionEncoding,
    PositionEncoding,
    ProjectedPositionEncoding,
    TrainablePositionEncoding,
)
from .preprocessors import (
    GridPreprocessor,
    MultimodalPreprocessor,
    PointPreprocessor,
    TextPreprocessor,
    VectorPreprocessor,
)
from .stems import (
    AudioPatchStem,
    Conv1x1Stem,
    ConvStem,
    ImageStem,
    PatchStem,
    PermutedStem,
    PixelStem,
    SpectrogramStem,
    ValueStem,
)

# Sizes at which an axis is traced that no position encoding has a size for.
USUAL_SIZES = {"batch": 2, "choices": 4, "length": 512, "points": 1024, "frames": 16, "samples": 16_384, "time": 64}
USUAL_SIDE = 224
LONGEST_SOUND = 200_000


@dataclass(frozen=True)
class Axis:
    """An axis of an input: `size` is what it is fixed to, or traced at; `fixed` is why it cannot be dynamic, if so.

    A dynamic one may be any multiple of `multiple` from `least` to `most` (None: any).
    """

    name: str
    size: int
    multiple: int = 1
    least: int = 1
    most: int | None = None
    fixed: str | None = None
    dynamic: bool = False

    @property
    def short_name(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def divided(self) -> bool:
        """Whether the stem makes it smaller."""
        return self.least > 2

    @property
    def label(self) -> str:
        """The name as a word."""
        return re.sub(r"\W", "_", self.name)

    def __str__(self) -> str:
        if not self.dynamic:
            return f"{self.name} {self.size}"
        upper = "" if self.most is None else f" to {self.most}"
        steps = f", multiples of {self.multiple}" if self.multiple > 1 else ""
        return f"{self.name} from {self.least}{upper}{steps}"

    def check(self, size: int) -> None:
        """Raise ValueError for a size that the axis cannot have."""
        if size < self.least or size % self.multiple or (self.most is not None and size > self.most):
            raise ValueError(f"{self.name}={size} cannot be; it is {replace(self, dynamic=True)}")
        if self.fixed is not None and size != self.size:
            raise ValueError(f"{self.name}={size} cannot be, it is {self.size}: {self.fixed}")


@dataclass(frozen=True)
class Input:
    """A tensor that the model reads: `keyword` of its forward, entry `modality` of that dict if not None.

    values: "tokens" (below `high`), "mask" or "numbers".
    """

    keyword: str
    axes: tuple[Axis | int, ...]
    values: str = "numbers"
    high: int = 0
    modality: str | None = None

    @property
    def name(self) -> str:
        return self.keyword if self.modality is None else f"{self.keyword}.{self.modality}"

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        return tuple(axis if isinstance(axis, int) else sizes[axis.name] for axis in self.axes)

    def draw(self, sizes: Mapping[str, int]) -> Tensor:
        """Random values of these sizes, by axis name: numbers in [-1, 1]; a mask leaves at least one element."""
        shape = self.shape(sizes)
        if self.values == "tokens":
            return torch.randint(0, self.high, shape)
        if self.values == "numbers":
            return 2 * torch.rand(shape) - 1
        if len(shape) == 1:
            return torch.ones(shape, dtype=torch.long)
        valid = torch.randint(1, shape[-1] + 1, shape[:-1])
        return (torch.arange(shape[-1]) < valid[..., None]).long()


def axes_of(inputs: Iterable[Input]) -> dict[str, Axis]:
    """Every axis once, by name, the batch first."""
    return {axis.name: axis for given in inputs for axis in given.axes if isinstance(axis, Axis)}


def nest(inputs: Iterable[Input], values: Iterable[Any]) -> dict[str, Any]:
    """Values in the order of the inputs -> keyword arguments of the model, dicts by modality where it reads them."""
    keywords: dict[str, Any] = {}
    for given, value in zip(inputs, values, strict=True):
        if given.modality is None:
            keywords[given.keyword] = value
        else:
            keywords.setdefault(given.keyword, {})[given.modality] = value
    return keywords


def inputs_of(model: Any, masks: bool | None = None) -> list[Input]:
    """The inputs that a model or head reads, in order.

    masks: whether element masks are inputs too; None: where examples of a batch differ in length, texts, sounds, sets
    of points. Of several modalities a mask (B,) says which examples have one. A modality that a mask token always stands
    in for is no input. Raises ValueError for a preprocessor or stem that does not ship with the package.
    """
    inner = getattr(model, model.base_model_prefix, model)
    preprocessor, query = inner.preprocessor, inner.output_query
    batch = Axis("batch", USUAL_SIZES["batch"])
    if isinstance(preprocessor, MultimodalPreprocessor):
        return list(_modalities(preprocessor, query, batch, bool(masks)))
    keyword = "input_values" if model.main_input_name == "input_values" else preprocessor.main_input_name
    leading: tuple[Axis, ...] = (batch,)
    if isinstance(model, PerceiverIOForMultipleChoice):
        leading = (batch, Axis("choices", USUAL_SIZES["choices"]))
    read = _read(preprocessor, query, leading, keyword)
    if isinstance(model, PerceiverIOForOpticalFlow):
        read = _fix(read, "frames", 2, "flow is the motion between two frames")
    mask = _mask(preprocessor, read)
    if masks and mask is None:
        raise ValueError(f"{read.name} has no mask to export: masks are for texts, sounds and points; leave masks out")
    return [read] if mask is None or masks is False else [read, mask]


def _modalities(preprocessor: MultimodalPreprocessor, query: Any, batch: Axis, masks: bool) -> Iterator[Input]:
    asked: Any = query.modalities if isinstance(query, MultimodalQuery) else {}
    names = [
        name
        for name, module in preprocessor.modalities.items()
        if name not in preprocessor.masked_at_inference or getattr(module, "num_elements", None) is None
    ]
    for name in names or list(preprocessor.modalities):
        # A ModuleDict has no get.
        own = asked[name] if name in asked else None  # noqa: SIM401
        read = _read(preprocessor.modalities[name], own, (batch,), "inputs")
        axes = [replace(a, name=f"{name}.{a.name}") if isinstance(a, Axis) and a != batch else a for a in read.axes]
        yield replace(read, axes=tuple(axes), modality=name)
    for name in names if masks else ():
        yield Input("attention_mask", (batch,), values="mask", modality=name)


def _read(preprocessor: Any, query: Any, leading: tuple[Axis, ...], keyword: str) -> Input:
    """The input of one modality; query: the output query that takes its grid from it, or another or None."""
    if isinstance(preprocessor, TextPreprocessor):
        length = _line("length", preprocessor.position, query, 1)
        return Input(keyword, (*leading, length), "tokens", preprocessor.embedding.num_embeddings)
    if isinstance(preprocessor, PointPreprocessor):
        width = preprocessor.num_axes + preprocessor.feature_channels
        return Input(keyword, (*leading, Axis("points", USUAL_SIZES["points"]), width))
    if isinstance(preprocessor, VectorPreprocessor):
        return Input(keyword, (*leading, preprocessor.channels))
    if isinstance(preprocessor, GridPreprocessor):
        return Input(keyword, (*leading, *_grid_axes(preprocessor.stem, preprocessor.position, query)))
    raise ValueError(
        f"what a {type(preprocessor).__name__} reads is not known here; export models whose preprocessor ships with "
        "hf_perceiver"
    )


def _mask(preprocessor: Any, read: Input) -> Input | None:
    """The mask of an input whose elements lie in a line, None for others."""
    stem = getattr(preprocessor, "stem", None)
    if isinstance(preprocessor, TextPreprocessor):
        return Input("attention_mask", read.axes, values="mask")
    if isinstance(preprocessor, PointPreprocessor) or isinstance(stem, (AudioPatchStem, SpectrogramStem)):
        return Input("attention_mask", read.axes[:2], values="mask")
    return None


def _fix(read: Input, name: str, size: int, why: str) -> Input:
    axes = [
        replace(a, size=size, least=size, most=size, fixed=why) if isinstance(a, Axis) and a.name == name else a
        for a in read.axes
    ]
    return replace(read, axes=tuple(axes))


def _grid_axes(stem: Any, position: PositionEncoding | None, query: Any) -> list[Axis | int]:
    if isinstance(stem, PermutedStem):
        axes = _grid_axes(stem.stem, position, query)
        sides = dict(zip(("height", "width"), stem.grid, strict=True))
        why = "the pixels of one grid are permuted"
        return [
            replace(a, size=sides[a.name], least=1, most=None, fixed=why)
            if isinstance(a, Axis) and a.name in sides
            else a
            for a in axes
        ]
    if isinstance(stem, AudioPatchStem):
        samples = _line("samples", position, query, stem.channels)
        # The released autoencoder's resolution counts samples, not patches.
        whole = samples.size // stem.channels if samples.size > LONGEST_SOUND else samples.size
        return [replace(samples, size=max(whole // stem.channels, 1) * stem.channels), 1]
    if isinstance(stem, SpectrogramStem):
        if stem.flatten:
            # How long the line is follows from both; the bands are the spectrogram's.
            line = _line("time", position, query, 1)
            bands = Axis("bands", 80, fixed="a spectrogram of one kind has as many bands")
            most = None if line.most is None else line.most // bands.size
            return [replace(line, size=max(line.size // bands.size, 1), most=most), bands]
        return list(_axes(("time", "bands"), (1, 1), position, query))
    if isinstance(stem, ValueStem):
        count = getattr(position, "num_axes", None) or 1
        return [*_axes([f"axis{i + 1}" for i in range(count)], (1,) * count, position, query), stem.channels]
    if isinstance(stem, ImageStem):
        return _image_axes(stem, position, query)
    raise ValueError(
        f"what a {type(stem).__name__} reads is not known here; export models whose stem ships with hf_perceiver"
    )


def _image_axes(stem: ImageStem, position: PositionEncoding | None, query: Any) -> list[Axis | int]:
    merged = getattr(stem, "temporal_downsample", 1)
    count = getattr(position, "num_axes", None) or (3 if merged > 1 else 2)
    factor = side_factor(stem)
    # Pixels that are left out may be any number; patches are whole.
    multiple = factor if isinstance(stem, PatchStem) else getattr(stem, "multiple", 1)
    of_sides = _axes(("height", "width"), (factor, factor), position, query, skip=count - 2)
    sides = [replace(axis, multiple=multiple, least=2 * factor) for axis in of_sides]
    if count == 2:
        frames = (
            [] if merged == 1 else [Axis("frames", merged, merged, merged, merged, f"{merged} frames are one image")]
        )
        return [*frames, stem.in_channels, *sides]
    (frames_axis,) = _axes(("frames",), (merged,), position, query, of=3)
    whole = merged if isinstance(stem, (PatchStem, ConvStem)) else 1
    return [replace(frames_axis, multiple=whole, least=2 * merged), stem.in_channels, *sides]


def side_factor(stem: ImageStem) -> int:
    """By how much a stem makes the sides of an image smaller."""
    if isinstance(stem, ConvStem):
        return 4 ** len(stem.convs)
    if isinstance(stem, (PixelStem, Conv1x1Stem, PatchStem)):
        return stem.spatial_downsample
    return 1


def _line(name: str, position: PositionEncoding | None, query: Any, factor: int) -> Axis:
    (axis,) = _axes((name,), (factor,), position, query)
    return replace(axis, multiple=factor, least=1 if name == "length" else 2 * factor)


def _axes(
    names: Sequence[str],
    factors: Sequence[int],
    position: PositionEncoding | None,
    query: Any,
    skip: int = 0,
    of: int | None = None,
) -> list[Axis]:
    """Axes `skip` to `skip + len(names)` of a grid of `of` axes, each `factors` times as long at the boundary."""
    count = of or skip + len(names)
    axes = []
    for index, (name, factor) in enumerate(zip(names, factors, strict=True), start=skip):
        size, most, fixed = None, None, None
        for encoding, scale in _encodings(position, query):
            limit = _limit(encoding, count, index)
            if size is None and limit[0] is not None:
                size = limit[0] // (scale[index] if scale and index < len(scale) else 1)
            most = limit[1] if most is None or limit[1] is None else min(most, limit[1])
            fixed = fixed or limit[2]
        if isinstance(query, PositionQuery) and query.grid is not None and query.scale is None:
            if query.concat_input and index < len(query.grid):
                size, fixed = query.grid[index], "each output point is asked with the input at its place"
            elif query.use_input_mask and count == len(query.grid) == 1:
                most = query.grid[0] if most is None else min(most, query.grid[0])
        if size is None:
            size = max(USUAL_SIZES.get(name, USUAL_SIDE) // factor, 1)
        size = size if most is None else min(size, most)
        axes.append(Axis(name, size * factor, most=None if most is None else most * factor, fixed=fixed))
    return axes


def _encodings(
    position: PositionEncoding | None, query: Any
) -> Iterator[tuple[PositionEncoding, tuple[int, ...] | None]]:
    """The encodings that label this input's grid, or that grid with each side times a number."""
    if position is not None:
        yield position, None
    if isinstance(query, PositionQuery) and (query.grid is None or query.scale is not None):
        yield query.position, query.scale


def _limit(encoding: PositionEncoding, count: int, index: int) -> tuple[int | None, int | None, str | None]:
    """Of one axis of a grid of `count`: its usual number of places, the most it may have, and why it has no other."""
    if isinstance(encoding, ProjectedPositionEncoding):
        return _limit(encoding.position, count, index)
    if isinstance(encoding, FourierPositionEncoding):
        known = encoding.max_resolution
        return (
            (None, None, None)
            if known is None
            else (known[index], known[index] if encoding.rule == "index" else None, None)
        )
    if isinstance(encoding, TrainablePositionEncoding):
        if count == 1:
            return encoding.num_positions, encoding.num_positions, None
        layout = encoding.grid or encoding._guess(count)
        return layout[index], None, "its positions are trained for one grid"
    return None, None, f"how a {type(encoding).__name__} labels other sizes is not known here"


def choose_axes(
    inputs: Sequence[Input], dynamic: Sequence[str] | None = None, sizes: Mapping[str, int] | None = None
) -> list[Input]:
    """The inputs with their axes made dynamic or fixed.

    dynamic: names of axes, "image.height" or "height" of every modality; None: every one that may be. sizes: by such
    names, what an axis is fixed to or traced at. Raises ValueError for unknown names and impossible sizes.
    """
    axes = axes_of(inputs)
    for name, size in (sizes or {}).items():
        for found in _find(name, axes):
            axes[found].check(size)
            axes[found] = replace(axes[found], size=size)
    wanted = [name for name, axis in axes.items() if axis.fixed is None]
    if dynamic is not None:
        wanted = [found for name in dynamic for found in _find(name, axes)]
        for name in wanted:
            if axes[name].fixed is not None:
                raise ValueError(f"{name} cannot be dynamic, it is {axes[name].size}: {axes[name].fixed}")
    for name in wanted:
        axes[name] = replace(axes[name], dynamic=True)
    return [
        replace(given, axes=tuple(axes[a.name] if isinstance(a, Axis) else a for a in given.axes)) for given in inputs
    ]


def _find(name: str, axes: Mapping[str, Axis]) -> list[str]:
    found = [full for full, axis in axes.items() if name in (full, axis.short_name)]
    if not found:
        raise ValueError(f"unknown axis {name!r}; the inputs have {', '.join(axes)}")
    return found
