"""Output queries: what the decoder is asked, (B, O, E), as parts.

An output query of your own is an nn.Module with `channels` (E) whose forward takes `(input_array, output_points,
coordinates)` and returns a (1 or B, O, E) tensor, an ArrayPart or a QueryArray; register it with
`@register_output_query("kind")`. With interpolate_pos_encoding=True it gets that keyword too.
Source: deepmind-research perceiver/perceiver.py (decoder_query of each decoder).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .arrays import ArrayPart, InputArray, PerceiverArray, QueryArray
from .configuration_perceiver_io import PerceiverIOConfig
from .position_encoding import AxisCode, TableCode, build_position_encoding, truncated_normal_
from .preprocessors import Vectors, as_tensor, check_modality_name, values_known
from .registry import OUTPUT_QUERIES, register_output_query


class OutputQuery(nn.Module):
    """Base of output queries; a subclass sets `channels`, the width E of a query."""

    channels: int

    def forward(
        self, input_array: InputArray, output_points: Any = None, coordinates: Any = None, **kwargs: Any
    ) -> QueryArray | ArrayPart | Tensor:
        raise NotImplementedError


@register_output_query("position")
class PositionQuery(OutputQuery):
    """A query per point of the output grid: its position code, optionally after the input's features.

    grid: the output grid; None takes the input's, times `scale` (one factor per axis). With both, `grid` is for inputs
    that have none. use_input_mask: masked input elements are masked queries too, as in the language model, and an input
    shorter than `grid` asks its first points. concat_input: the features of the input element at the same place come
    first (DeepMind's concat_preprocessed_input).
    output_points (n,) or (B, n) ask only these flat indices; coordinates (n, d) or (B, n, d) any place in [-1, 1].
    """

    def __init__(
        self,
        *,
        position: dict,
        preprocessor: Any = None,
        grid: Sequence[int] | None = None,
        scale: Sequence[int] | None = None,
        use_input_mask: bool = False,
        concat_input: bool = False,
    ):
        super().__init__()
        encoding = build_position_encoding(position)
        if encoding is None:
            raise ValueError("a position query needs a position of kind 'fourier', 'trainable' or your own")
        self.position = encoding
        self.grid = None if grid is None else tuple(grid)
        self.scale = None if scale is None else tuple(scale)
        self.use_input_mask, self.concat_input = use_input_mask, concat_input
        feature_channels = 0
        if concat_input:
            before = getattr(getattr(preprocessor, "position", None), "channels", 0)
            combine = getattr(preprocessor, "combine", "concat")
            feature_channels = preprocessor.channels - (before if combine == "concat" else 0)
        self.channels = encoding.channels + feature_channels

    def forward(
        self,
        input_array: InputArray,
        output_points: Any = None,
        coordinates: Any = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ArrayPart:
        like = input_array.like
        device, dtype = like.device, like.dtype
        source = input_array.part if len(input_array.parts) == 1 else None
        if coordinates is not None:
            if output_points is not None:
                raise ValueError("give output_points or coordinates, not both")
            if self.concat_input:
                raise ValueError("a query that holds the input's features cannot be asked at free coordinates")
            code = self.position.encode_at(as_tensor("coordinates", coordinates, device), dtype=dtype)
            return ArrayPart(position=code)
        grid = self._grid(source)
        code = self.position.encode(grid, device=device, dtype=dtype, interpolate=interpolate_pos_encoding)
        part = ArrayPart(position=code, grid=grid)
        if self.use_input_mask and source is not None and len(grid) == 1 and source.length < part.length:
            # A text shorter than the grid that the model was trained on asks the first points of that grid.
            part = part.select(torch.arange(source.length, device=device))
        if self.use_input_mask and source is not None and source.mask is not None:
            if source.length != part.length:
                raise ValueError(f"use_input_mask: {source.length} input elements for {part.length} queries")
            part.mask = source.mask
        if self.concat_input:
            if source is None or source.features is None or source.length != part.length:
                have = 0 if source is None else source.length
                raise ValueError(f"concat_input needs one input element per query: {have} for {part.length}")
            part.features = source.features
        return part if output_points is None else part.select(check_points(output_points, part.length, device))

    def _grid(self, source: ArrayPart | None) -> tuple[int, ...]:
        if self.grid is not None and (self.scale is None or source is None or source.grid is None):
            return self.grid
        if source is None or source.grid is None:
            raise ValueError(
                "this output query takes its grid from the input, which has none here (a set, a missing modality, or "
                "several modalities); give the query the option grid=[...], or ask at coordinates"
            )
        if self.scale is None:
            return source.grid
        if len(self.scale) != len(source.grid):
            raise ValueError(f"scale={list(self.scale)} has not the {len(source.grid)} axes of the input's grid")
        return tuple(n * s for n, s in zip(source.grid, self.scale, strict=True))


@register_output_query("tasks")
class TaskQuery(OutputQuery):
    """`num_tasks` learned queries, one class query by default: (1, num_tasks, channels)

    Source: the ImageNet models' class query; Perceiver IO section 4.1, multitask query.
    """

    def __init__(self, *, channels: int, num_tasks: int = 1, init_scale: float = 0.02):
        super().__init__()
        if num_tasks < 1 or channels < 1:
            raise ValueError(f"num_tasks={num_tasks} and channels={channels} must be at least 1")
        if init_scale < 0:
            raise ValueError(f"init_scale is a standard deviation, 0 or more, not {init_scale}")
        self.channels, self.init_scale = channels, init_scale
        self.task_queries = nn.Parameter(torch.empty(num_tasks, channels))

    def reset_own_parameters(self) -> None:
        truncated_normal_(self.task_queries, self.init_scale)

    def forward(
        self, input_array: InputArray, output_points: Any = None, coordinates: Any = None, **kwargs: Any
    ) -> ArrayPart:
        if coordinates is not None:
            raise ValueError("task queries have no coordinates; choose tasks with output_points")
        part = ArrayPart(position=TableCode(self.task_queries[None]), grid=(self.task_queries.shape[0],))
        if output_points is None:
            return part
        return part.select(check_points(output_points, part.length, self.task_queries.device))


@register_output_query("input")
class InputQuery(OutputQuery):
    """The input array itself asks, position and all: (B, M, C). Source: FlowDecoder.

    first_frame: of a grid whose first axis is time, the elements of the first frame ask: (B, M / T, C), on the grid that
    is left. Source: Perceiver IO, appendix H, flow of separate frames.
    """

    def __init__(self, *, preprocessor: Any, use_input_mask: bool = True, first_frame: bool = False):
        super().__init__()
        self.channels = preprocessor.channels
        self.use_input_mask, self.first_frame = use_input_mask, first_frame

    def forward(
        self, input_array: InputArray, output_points: Any = None, coordinates: Any = None, **kwargs: Any
    ) -> ArrayPart:
        if coordinates is not None:
            raise ValueError("queries made of the input's features cannot be asked at free coordinates")
        part = replace(input_array.part)
        if not part.length:
            raise ValueError("queries made of the input's features need that input; it is missing here")
        if not self.use_input_mask:
            part.mask = None
        if self.first_frame:
            part = first_frame(part)
        if output_points is None:
            return part
        return part.select(check_points(output_points, part.length, input_array.like.device))


@register_output_query("multimodal")
class MultimodalQuery(OutputQuery):
    """One query per modality, each padded with its own trained vector to a common width, in sorted order.

    modalities: name -> output query spec; a name that is an input's too takes its grid from that input, and needs the
    option `grid` to be asked whole where that input is missing.
    output_points and coordinates are dicts by name; output_points also says which modalities are asked: a name with
    None is asked whole, an absent one not at all. None, or an empty dict, asks everything.
    """

    def __init__(
        self, *, config: PerceiverIOConfig, preprocessor: Any, modalities: dict[str, dict], min_padding_size: int = 2
    ):
        super().__init__()
        if not modalities:
            raise ValueError("a multimodal output query needs at least one modality")
        for name in modalities:
            check_modality_name(name)
        inputs = getattr(preprocessor, "modalities", {})
        self.input_names = frozenset(inputs)
        built: dict[str, Any] = {
            name: OUTPUT_QUERIES.build(
                modalities[name],
                config=config,
                preprocessor=inputs[name] if name in inputs else preprocessor,  # noqa: SIM401 - a ModuleDict has no get
            )
            for name in sorted(modalities)
        }
        self.modalities = nn.ModuleDict(built)
        self.channels = max(module.channels for module in built.values()) + min_padding_size
        self.padding = Vectors({name: self.channels - module.channels for name, module in built.items()})

    def forward(
        self, input_array: InputArray, output_points: Any = None, coordinates: Any = None, **kwargs: Any
    ) -> QueryArray:
        for what, given in (("output_points", output_points), ("coordinates", coordinates)):
            if given is None:
                continue
            if not isinstance(given, Mapping):
                raise ValueError(f"{what} of a multimodal model is a dict by modality, not {type(given).__name__}")
            for name in given:
                if name not in self.modalities:
                    raise ValueError(f"unknown modality {name!r} in {what}; known: {', '.join(self.modalities)}")
        asked = {**(output_points or {}), **(coordinates or {})} or self.modalities
        parts = {}
        for name, query in self.modalities.items():
            if name not in asked:
                continue
            source = self._source(name, input_array)
            made = query(source, (output_points or {}).get(name), (coordinates or {}).get(name), **kwargs)
            part = PerceiverArray.of(made).part
            # The mask token of an input that asks: its own channels, which come first, and this query's padding.
            token = None if part.token is None else torch.cat([part.token[: query.channels], self.padding(name)])
            parts[name] = replace(part, constant=self.padding(name), token=token)
        return QueryArray(parts)

    def _source(self, name: str, input_array: InputArray) -> InputArray:
        if name in input_array.parts:
            return InputArray({name: input_array.parts[name]})
        if name in self.input_names:
            # Missing: an empty set, not the grid of some other modality.
            return InputArray({name: ArrayPart(features=input_array.like[:, :0])})
        return input_array


def first_frame(part: ArrayPart) -> ArrayPart:
    """The elements of a video's first frame, (time, height, width) -> (height, width); ValueError for another grid."""
    if part.grid is None or len(part.grid) != 3:
        raise ValueError(
            f"first_frame asks with a grid (time, height, width), and the input has {part.grid}; give it a video whose "
            "frames the stem does not merge (temporal_downsample=1), or leave first_frame out"
        )
    grid = part.grid[1:]
    length = math.prod(grid)
    position = part.position
    if isinstance(position, AxisCode) and position.points is None:
        # One point of time is left, and the code stays one short table per axis.
        blocks = tuple((axis, values[:1] if axis == 0 else values) for axis, values in position.blocks)
        position = AxisCode(blocks, (1, *grid))
    elif position is not None:
        position = position.select(torch.arange(length, device=position.dense(0, 1).device))
    return replace(
        part,
        features=None if part.features is None else part.features[:, :length],
        position=position,
        mask=None if part.mask is None else part.mask[:, :length],
        replaced=None if part.replaced is None else part.replaced[:, :length],
        grid=grid,
    )


def check_points(points: Any, length: int, device: torch.device) -> Tensor:
    """Flat indices (n,) or (B, n) as a tensor; ValueError when one lies outside 0 .. length - 1."""
    points = as_tensor("output_points", points, device)
    if not points.numel():
        points = points.long()  # an empty list knows no type
    if points.ndim not in (1, 2) or points.is_floating_point() or points.dtype == torch.bool:
        raise ValueError(
            f"output_points are flat integer indices (n,) or (batch, n), not {tuple(points.shape)} {points.dtype}"
        )
    if values_known(points):
        low, high = int(points.min()), int(points.max())
        if low < 0 or high >= length:
            raise ValueError(f"output_points {low}..{high} lie outside the output grid of {length} points")
    return points.long()


OUTPUT_QUERIES.seal()
