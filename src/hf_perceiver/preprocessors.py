"""Preprocessors: a modality's tensors -> the input array (B, M, C), as parts.

A preprocessor of your own is an nn.Module with `channels` (C) whose forward takes `(inputs, mask=None)` and returns a
(B, M, C) tensor, an ArrayPart or an InputArray; `@register_preprocessor("kind")` makes it usable in a config.
Source: deepmind-research perceiver/io_processors.py.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .arrays import ArrayPart, InputArray, PerceiverArray
from .configuration_perceiver_io import PerceiverIOConfig
from .losses import IGNORED, check_classes
from .position_encoding import PositionEncoding, build_position_encoding, truncated_normal_
from .registry import PREPROCESSORS, STEMS, register_preprocessor
from .stems import Stem

COMBINE = ("concat", "add")


class Preprocessor(nn.Module):
    """Base of preprocessors.

    channels: C of the input array. num_elements: M where it is the same for every input, None otherwise.
    main_input_name: the model's keyword for this input.
    """

    channels: int
    num_elements: int | None = None
    main_input_name = "inputs"

    def forward(self, inputs: Any, mask: Any = None, **kwargs: Any) -> InputArray | ArrayPart | Tensor:
        raise NotImplementedError


@register_preprocessor("text")
class TextPreprocessor(Preprocessor):
    """Token ids (B, L) -> embedding and position, concatenated or added: (B, L, C)

    Raises ValueError for ids outside the vocabulary and for texts longer than the positions.
    """

    main_input_name = "input_ids"

    def __init__(self, *, config: PerceiverIOConfig, channels: int, position: dict | None = None, combine: str = "add"):
        super().__init__()
        self.embedding = nn.Embedding(config.vocab_size, channels)
        self.position = build_position_encoding(position)
        self.combine = combine
        self.channels = combined_channels(channels, self.position, combine)

    def forward(
        self, inputs: Tensor, mask: Tensor | None = None, coordinates: Tensor | None = None, **kwargs: Any
    ) -> ArrayPart:
        check_tensor("text", inputs)
        if inputs.ndim != 2 or inputs.dtype.is_floating_point or inputs.dtype == torch.bool:
            raise ValueError(
                f"text is token ids (batch, length) of an integer type, not {tuple(inputs.shape)} {inputs.dtype}"
            )
        if inputs.shape[1] == 0:
            raise ValueError("a text of length 0 has nothing to read; give at least one token")
        if values_known(inputs):
            low, high = int(inputs.min()), int(inputs.max())
            if low < 0 or high >= self.embedding.num_embeddings:
                raise ValueError(
                    f"token ids {low}..{high} do not fit a vocabulary of {self.embedding.num_embeddings}; use the "
                    "checkpoint's own tokenizer, or resize_token_embeddings()"
                )
        features = self.embedding(inputs.long())
        return place(features, self.position, self.combine, element_mask(mask, inputs.shape), coordinates)


@register_preprocessor("grid")
class GridPreprocessor(Preprocessor):
    """A stem's features on a grid of any size, with positions: images, video, sound, any array. -> (B, M, C)

    stem, position: specs. combine: "concat" or "add" the position.
    """

    main_input_name = "pixel_values"

    def __init__(self, *, stem: dict, position: dict | None = None, combine: str = "concat"):
        super().__init__()
        self.stem: Stem = STEMS.build(stem)  # type: ignore[assignment]
        self.position = build_position_encoding(position)
        self.combine = combine
        self.channels = combined_channels(self.stem.channels, self.position, combine)

    def forward(
        self,
        inputs: Tensor,
        mask: Tensor | None = None,
        coordinates: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> ArrayPart:
        """mask (B, M) or (B, n_1, ..., n_d) over the stem's grid; coordinates (M, d) or (B, M, d) replace the grid's."""
        check_tensor("a grid", inputs)
        dtype = inputs.dtype if inputs.is_floating_point() else torch.get_default_dtype()
        # A stem with weights wants theirs; quantised ones are no floats, their biases are.
        dtype = next((p.dtype for p in self.stem.parameters() if p.is_floating_point()), dtype)
        features = self.stem(inputs.to(dtype))
        if isinstance(mask, Tensor) and isinstance(self.stem, Stem):
            mask = self.stem.element_mask(mask, inputs)
        grid = tuple(features.shape[1:-1])
        if not all(grid):
            raise ValueError(f"an input of {tuple(inputs.shape)} has nothing to read; no axis may be empty")
        return place(
            features.flatten(1, -2),
            self.position,
            self.combine,
            element_mask(mask, features.shape[:-1]),
            coordinates,
            grid,
            interpolate_pos_encoding,
        )


@register_preprocessor("vector")
class VectorPreprocessor(Preprocessor):
    """One element per example, such as a one-hot label: (B, channels) -> (B, 1, channels)

    Class indices (B,) of an integer type become one-hot; -100 is no class, a masked element. Source: deepmind-research,
    OneHotPreprocessor.
    """

    num_elements = 1

    def __init__(self, *, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, inputs: Tensor, mask: Tensor | None = None, **kwargs: Any) -> ArrayPart:
        check_tensor("a vector", inputs)
        refuse_coordinates("a vector", kwargs)
        valid = element_mask(mask, (inputs.shape[0], 1))
        if inputs.ndim == 1 and not inputs.is_floating_point():
            check_classes(inputs, self.channels)
            known = (inputs != IGNORED)[:, None]
            valid = known if valid is None else known & valid
            inputs = nn.functional.one_hot(inputs.long().where(known[:, 0], 0), self.channels).to(
                torch.get_default_dtype()
            )
        if inputs.ndim != 2 or inputs.shape[1] != self.channels:
            raise ValueError(
                f"a vector is (batch, {self.channels}) or class indices (batch,), not {tuple(inputs.shape)}"
            )
        return ArrayPart(features=inputs[:, None], mask=valid, grid=(1,))


@register_preprocessor("points")
class PointPreprocessor(Preprocessor):
    """A set of points: coordinates first, then features, (B, M, d + F) -> [F ; code of the coordinates]

    position: a fourier spec of d axes, or None for a set without coordinates (then d = 0). feature_channels: F.
    Coordinates are expected in [-1, 1]. Source: the original Perceiver on ModelNet40 (fourier, max_resolution 2240).
    """

    def __init__(self, *, position: dict | None = None, feature_channels: int = 0):
        super().__init__()
        self.position = build_position_encoding(position)
        num_axes = 0 if self.position is None else self.position.num_axes
        if num_axes is None:
            raise ValueError("points need a position that codes coordinates, such as kind 'fourier'")
        self.num_axes = num_axes
        self.feature_channels = feature_channels
        self.channels = feature_channels + (0 if self.position is None else self.position.channels)
        if not self.channels:
            raise ValueError("points need a position, feature_channels, or both")

    def forward(self, inputs: Tensor, mask: Tensor | None = None, **kwargs: Any) -> ArrayPart:
        check_tensor("a set of points", inputs)
        refuse_coordinates("a set of points, which brings its own,", kwargs)
        if inputs.ndim != 3 or inputs.shape[-1] != self.num_axes + self.feature_channels:
            raise ValueError(
                f"points are (batch, points, {self.num_axes} coordinates + {self.feature_channels} features), not "
                f"{tuple(inputs.shape)}"
            )
        position = None
        if self.position is not None:
            position = self.position.encode_at(inputs[..., : self.num_axes], dtype=inputs.dtype)
        features = inputs[..., self.num_axes :] if self.feature_channels else None
        return ArrayPart(features=features, position=position, mask=element_mask(mask, inputs.shape[:2]))


class Vectors(nn.Module):
    """Trained vectors by name, (width,) each. A module that is called, so that weights that are offloaded are there."""

    def __init__(self, widths: dict[str, int]):
        super().__init__()
        for name, width in widths.items():
            self.register_parameter(name, nn.Parameter(torch.empty(width)))

    def reset_own_parameters(self) -> None:
        for parameter in self.parameters():
            truncated_normal_(parameter, 0.02)

    def forward(self, name: str) -> Tensor:
        return self.get_parameter(name)


@register_preprocessor("multimodal")
class MultimodalPreprocessor(Preprocessor):
    """A dict of modalities -> one array, each padded with its own trained vector to a common width, in sorted order.

    modalities: name -> preprocessor spec. min_padding_size: the widest modality is padded by that many channels.
    mask_probs: name -> probability with which, in training, an element is replaced by the modality's mask token; None
    for no tokens. masked_at_inference: modalities wholly replaced outside training; by default those with probability 1.
    dropout_probs: name -> probability with which, in training, an example's whole modality is masked out; an example
    that would lose all of its content keeps one modality, by equal chance (Perceiver, section 4.2: 0.3 of the videos).
    A modality may be missing from the inputs, or by its mask from some examples: it is left out, or its mask token
    stands in where it is replaced and has the same number of elements in every input (`num_elements`).
    Source: deepmind-research, MultimodalPreprocessor (which draws its masks at inference too).
    """

    def __init__(
        self,
        *,
        config: PerceiverIOConfig,
        modalities: dict[str, dict],
        min_padding_size: int = 2,
        mask_probs: dict[str, float] | None = None,
        masked_at_inference: list[str] | None = None,
        dropout_probs: dict[str, float] | None = None,
    ):
        super().__init__()
        if not modalities:
            raise ValueError("a multimodal preprocessor needs at least one modality")
        for name in modalities:
            check_modality_name(name)
        names = sorted(modalities)
        built: dict[str, Any] = {name: PREPROCESSORS.build(modalities[name], config=config) for name in names}
        self.modalities = nn.ModuleDict(built)
        self.channels = max(module.channels for module in built.values()) + min_padding_size
        self.padding = Vectors({name: self.channels - module.channels for name, module in built.items()})
        self.mask_probs = mask_probs
        self.dropout_probs = {name: p for name, p in (dropout_probs or {}).items() if p}
        for option, given in (("mask_probs", mask_probs), ("dropout_probs", dropout_probs)):
            for name, probability in (given or {}).items():
                if name not in modalities:
                    raise ValueError(f"{option} names {name!r}; the modalities are {', '.join(names)}")
                if not 0 <= probability <= 1:
                    raise ValueError(f"{option}[{name!r}] is a probability, not {probability}")
        self.mask_tokens = Vectors({} if mask_probs is None else dict.fromkeys(names, self.channels))
        if masked_at_inference is None:
            masked_at_inference = [name for name, p in (mask_probs or {}).items() if p == 1]
        elif mask_probs is None and masked_at_inference:
            raise ValueError("masked_at_inference needs mask tokens: give mask_probs, with probability 0 if need be")
        for name in masked_at_inference:
            if name not in modalities:
                raise ValueError(f"masked_at_inference names {name!r}; the modalities are {', '.join(names)}")
        self.masked_at_inference = frozenset(masked_at_inference)

    def forward(self, inputs: Any, mask: Any = None, coordinates: Any = None, **kwargs: Any) -> InputArray:
        """inputs, mask and coordinates: dicts by modality name; mask and coordinates may leave modalities out.

        A mask is over the modality's elements, (B, M), or over the examples, (B,); True or 1 = there.
        """
        if not isinstance(inputs, Mapping):
            raise ValueError(
                f"a multimodal model reads a dict of {', '.join(self.modalities)}, not {type(inputs).__name__}"
            )
        for what, given in (("input", inputs), ("mask", mask), ("coordinates", coordinates)):
            if given is not None and not isinstance(given, Mapping):
                raise ValueError(
                    f"the {what} of a multimodal model must be a dict by modality, not {type(given).__name__}; known: "
                    f"{', '.join(self.modalities)}"
                )
            for name in given or ():
                if name not in self.modalities:
                    raise ValueError(f"unknown modality {name!r} in the {what}; known: {', '.join(self.modalities)}")
        if not any(inputs.get(name) is not None for name in self.modalities):
            raise ValueError(f"no modality given; known: {', '.join(self.modalities)}")
        parts = {}
        for name, module in self.modalities.items():
            if inputs.get(name) is not None:
                at = (coordinates or {}).get(name)
                options = kwargs if at is None else {**kwargs, "coordinates": at}
                parts[name] = self._part(name, module, inputs[name], (mask or {}).get(name), options)
        batch_size = max(part.batch_size for part in parts.values())
        # No set of sizes: traced ones cannot be hashed.
        if any(part.batch_size not in (1, batch_size) for part in parts.values()):
            raise ValueError(f"modalities disagree on the batch size: { {n: p.batch_size for n, p in parts.items()} }")
        if self.mask_probs is not None:
            for name, module in self.modalities.items():
                self._replace(name, parts, getattr(module, "num_elements", None), batch_size)
        if self.training and self.dropout_probs:
            self._drop(parts, batch_size)
        return InputArray({name: parts[name] for name in self.modalities if name in parts})

    def _part(self, name: str, module: nn.Module, given: Any, mask: Any, options: dict[str, Any]) -> ArrayPart:
        of_examples = isinstance(mask, Tensor) and mask.ndim == 1
        part = PerceiverArray.of(module(given, None if of_examples else mask, **options)).part
        if of_examples:
            if len(mask) not in (1, part.batch_size):
                raise ValueError(f"the mask of {name!r} is for {len(mask)} examples, the batch has {part.batch_size}")
            hide(part, (mask == 0).to(self.padding(name).device), part.batch_size)
        part.constant = self.padding(name)
        return part

    def _replace(self, name: str, parts: dict[str, ArrayPart], num_elements: int | None, batch_size: int) -> None:
        """Put mask tokens in place of a modality's elements, also of those that are not there."""
        probability = (self.mask_probs or {}).get(name, 0.0)
        always = probability == 1 if self.training else name in self.masked_at_inference
        part, token = parts.get(name), self.mask_tokens(name)
        if part is not None:
            part.token = token
        elif num_elements is None:
            return
        if not always and not (self.training and probability):
            return
        shape = (batch_size, num_elements or 0) if part is None else (part.batch_size, part.length)
        replaced = torch.ones(shape, dtype=torch.bool, device=token.device)
        if not always:
            replaced = torch.rand(shape, device=token.device) < probability
        if part is None:
            everywhere = torch.ones_like(replaced[:1])
            parts[name] = ArrayPart(token=token, replaced=everywhere, mask=None if always else replaced)
            return
        part.replaced = replaced
        if num_elements is not None and part.mask is not None:
            part.mask = None if always else part.mask | replaced

    def _drop(self, parts: dict[str, ArrayPart], batch_size: int) -> None:
        """Mask out whole modalities, of each example by chance."""
        device = self.padding(next(iter(parts))).device
        content = torch.stack([has_content(part, device).expand(batch_size) for part in parts.values()], dim=1)
        probabilities = torch.tensor([self.dropout_probs.get(name, 0.0) for name in parts], device=device)
        dropped = torch.rand(content.shape, device=device) < probabilities
        bare = ~(content & ~dropped).any(dim=1)
        kept = torch.rand(content.shape, device=device).masked_fill(~content, -1.0).argmax(dim=1)
        dropped &= ~(bare[:, None] & (torch.arange(len(parts), device=device) == kept[:, None]))
        for index, (name, part) in enumerate(parts.items()):
            if name in self.dropout_probs:
                hide(part, dropped[:, index], batch_size)


def hide(part: ArrayPart, hidden: Tensor, batch_size: int) -> None:
    """Mask out the examples (1 or B,) of a part that are `hidden`."""
    shown = ~hidden[:, None].expand(batch_size, part.length)
    part.mask = shown if part.mask is None else part.mask & shown


def has_content(part: ArrayPart, device: torch.device) -> Tensor:
    """(1 or B,) bool: whether any element is neither masked out nor replaced by a mask token"""
    shown = torch.ones(1, part.length, dtype=torch.bool, device=device)
    if part.mask is not None:
        shown = shown & part.mask
    if part.replaced is not None:
        shown = shown & ~part.replaced
    return shown.any(dim=1)


def place(
    features: Tensor,
    position: PositionEncoding | None,
    combine: str,
    mask: Tensor | None,
    coordinates: Tensor | None = None,
    grid: tuple[int, ...] | None = None,
    interpolate: bool = False,
) -> ArrayPart:
    """(B, M, F) features and where they are, as an ArrayPart; `grid` defaults to one axis."""
    grid = grid or (features.shape[1],)
    code: Any = None
    if coordinates is not None:
        if position is None:
            raise ValueError("coordinates were given to a modality without positions")
        code = position.encode_at(as_tensor("coordinates", coordinates, features.device), dtype=features.dtype)
        if code.length != features.shape[1]:
            raise ValueError(f"{code.length} coordinates for {features.shape[1]} elements; each element needs one")
        if code.batch_size != 1 and features.shape[0] not in (1, code.batch_size):
            raise ValueError(
                f"coordinates for {code.batch_size} examples, in a batch of {features.shape[0]}; give one set for all, "
                "or one for each"
            )
    elif position is not None:
        code = position.encode(grid, device=features.device, dtype=features.dtype, interpolate=interpolate)
    return ArrayPart(features=features, position=code, combine=combine, mask=mask, grid=grid)


def combined_channels(features: int, position: PositionEncoding | None, combine: str) -> int:
    """Width of features and position together; ValueError for another word or widths that cannot be added."""
    if combine not in COMBINE:
        raise ValueError(f"combine={combine!r} must be one of {', '.join(COMBINE)}")
    if position is None:
        return features
    if combine == "concat":
        return features + position.channels
    if features != position.channels:
        raise ValueError(
            f"combine='add' needs features and position of one width, not {features} and {position.channels}; "
            "project the position (kind 'projected') or use combine='concat'"
        )
    return features


def element_mask(mask: Tensor | None, shape: tuple[int, ...] | torch.Size) -> Tensor | None:
    """Any 0/1 mask (B, ...) over the elements -> (B, M) bool, True = valid; ValueError for another shape."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor):
        raise ValueError(f"a mask is a tensor over {tuple(shape)} elements, 1 = valid, not {type(mask).__name__}")
    length = 1
    for n in shape[1:]:
        length *= n
    if mask.ndim < 2 or mask.shape[0] not in (1, shape[0]) or mask.flatten(1).shape[1] != length:
        raise ValueError(f"a mask over {tuple(shape)} elements has that shape, not {tuple(mask.shape)}")
    return mask.flatten(1).expand(shape[0], -1) != 0


def check_tensor(what: str, value: Any) -> None:
    """Raise ValueError unless `value` is a tensor."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{what} is a torch tensor, not {type(value).__name__}; convert it with torch.as_tensor()")


def refuse_coordinates(what: str, given: Mapping[str, Any]) -> None:
    """Raise ValueError where coordinates are given that nothing would read."""
    if given.get("coordinates") is not None:
        raise ValueError(f"{what} takes no input_coordinates; leave them out")


def as_tensor(what: str, value: Any, device: torch.device) -> Tensor:
    """Numbers as a tensor on `device`; ValueError for what is no array of numbers."""
    try:
        return torch.as_tensor(value, device=device)
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"{what} must be a tensor or a list of numbers, not {value!r}") from None


def values_known(tensor: Tensor) -> bool:
    """Whether values may be looked at: not while tracing, on the meta device, or where it would stall an accelerator."""
    return tensor.numel() > 0 and tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def check_modality_name(name: Any) -> None:
    """Raise ValueError unless `name` can name a submodule."""
    taken = isinstance(name, str) and hasattr(nn.ModuleDict(), name)
    if not isinstance(name, str) or not name or "." in name or taken:
        raise ValueError(f"modality name {name!r} must be a non-empty word without dots that torch does not use itself")


PREPROCESSORS.seal()
