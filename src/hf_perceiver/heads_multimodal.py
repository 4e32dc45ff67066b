"""Heads that read several modalities at once, or sound, or video."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from transformers.modeling_outputs import ModelOutput
from transformers.utils import can_return_tuple

from .arrays import QueryArray
from .configuration_perceiver_io import PerceiverIOConfig
from .losses import draw_points, has_target, modality_loss, targets_of_points
from .modeling_perceiver_io import (
    Encoding,
    PerceiverIOHead,
    PerceiverIOHeadOutput,
    classify,
    head_output,
    one_input,
)
from .position_encoding import Grid, take_rows

# Trainer counts the elements of the tensor of a model's main input, and fails at a dict; of a name that is not in the
# batch it counts none.
NO_TENSOR = "no_tensor"


@dataclass
class PerceiverIOMultimodalOutput(ModelOutput):
    """loss: the weighted sum of `losses`, one by modality; logits: a dict by modality; the rest as PerceiverIOOutput."""

    loss: Tensor | None = None
    logits: dict[str, Tensor] | None = None
    losses: dict[str, Tensor] | None = None
    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None


@dataclass
class AskedPoints:
    """What was asked of one output: of `length` points on `grid`, those drawn, (B, n) flat indices, or all if None."""

    length: int
    grid: Grid | None = None
    drawn: Tensor | None = None


class PerceiverIOForMultimodalAutoencoding(PerceiverIOHead):
    """A dict of modalities -> a dict of outputs: their reconstructions, or anything else that the output query asks for.

    The released model: image (B, 16, 3, 224, 224), audio (B, 30720, 1), label (B, 700) -> image (B, 16, 224, 224, 3),
    audio (B, 30720), label (B, 700). Names and kinds of inputs and outputs are free: depth, motion and text may give
    an action's class and the points of a path.

    Labels are a dict too; for autoencoding they are the inputs themselves. The multimodal postprocessor's spec holds the
    losses, their weights, and how many points are drawn in training (`num_loss_points`).
    """

    main_input_name = "inputs"
    preprocessor_kinds = ("multimodal",)
    query_kind = "multimodal"
    postprocessor_kinds = ("multimodal",)
    # Trainer cannot count the items of a dict. Losses are means over the examples, so that it may divide them by the
    # number of batches it accumulates.
    accepts_loss_kwargs = False

    def __init__(self, config: PerceiverIOConfig):
        super().__init__(config)
        self.main_input_name = NO_TENSOR

    @classmethod
    def _default_sides(cls, config: PerceiverIOConfig) -> tuple[dict[str, Any] | None, dict[str, Any]]:
        raise ValueError(
            "PerceiverIOForMultimodalAutoencoding cannot guess what to reconstruct; give the config output_query and "
            "postprocessor of kind 'multimodal', as hf_perceiver.recipes.multimodal_autoencoder() does"
        )

    @can_return_tuple
    def forward(
        self,
        inputs: dict[str, Tensor] | None = None,
        attention_mask: dict[str, Tensor] | None = None,
        labels: dict[str, Tensor] | None = None,
        output_points: dict[str, Any] | None = None,
        coordinates: dict[str, Tensor] | None = None,
        chunk_size: int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOMultimodalOutput:
        """attention_mask by modality, of its elements or of the examples that have it. output_points and coordinates
        choose what is decoded, see PerceiverIOModel.decode.

        labels by output: values laid out as the output or as the input, or class indices, of the whole or of the points
        that are asked for; what is left out or None adds nothing, and neither does -100 (a class, or all values of a
        point). In training only what has labels is decoded, at `num_loss_points` drawn points where the config gives a
        number, and logits hold no more than that.
        """
        asked: dict[str, AskedPoints] = {}
        targets = {} if labels is None else self._check_labels(labels, output_points, coordinates)
        choose: Any = output_points
        if labels is not None:

            def choose(encoding: Encoding) -> dict[str, Any] | None:
                asked.update(self._ask(encoding, targets, output_points, coordinates, **kwargs))
                if output_points is not None or coordinates is not None or not self.training:
                    return output_points
                return {name: where.drawn for name, where in asked.items()}

        outputs = self.perceiver(
            inputs=inputs,
            attention_mask=attention_mask,
            output_points=choose,
            coordinates=coordinates,
            chunk_size=chunk_size,
            **kwargs,
        )
        losses = loss = None
        if labels is not None:
            losses = {name: self._loss(name, targets[name], asked[name], outputs.logits[name]) for name in asked}
            loss = sum(self.perceiver.postprocessor.loss_weights[name] * value for name, value in losses.items())
        return PerceiverIOMultimodalOutput(**head_output(outputs, loss, logits=outputs.logits, losses=losses))

    def _check_labels(
        self, labels: Any, output_points: Mapping[str, Any] | None, coordinates: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        """The labels that are not None; ValueError where they cannot be compared with what is asked."""
        head, known_losses = type(self).__name__, getattr(self.perceiver.postprocessor, "losses", None)
        if known_losses is None:
            raise ValueError(
                f"{head} has losses for a postprocessor of kind 'multimodal', not for {self.config.postprocessor}; leave "
                "out labels and compute a loss from the logits"
            )
        known = ", ".join(sorted(known_losses))
        if not isinstance(labels, Mapping):
            raise ValueError(f"labels of {head} are a dict by output, not {type(labels).__name__}; known: {known}")
        given = {name: labels[name] for name in sorted(labels) if labels[name] is not None}
        chosen = {*(output_points or ()), *(coordinates or ())}
        for name, values in given.items():
            if name not in known_losses:
                raise ValueError(f"unknown output {name!r} in the labels; known: {known}")
            if chosen and name not in chosen:
                raise ValueError(
                    f"labels hold {name!r}, which output_points and coordinates leave out; ask for it too, or leave its "
                    "labels out"
                )
            if not isinstance(values, Tensor) or not values.ndim:
                raise ValueError(f"labels of {name!r} are a tensor with an entry for each example, not {values!r}")
        if not given:
            raise ValueError(f"labels name no output; known: {known}")
        return given

    def _ask(
        self,
        encoding: Encoding,
        labels: Mapping[str, Tensor],
        output_points: Mapping[str, Any] | None,
        coordinates: Mapping[str, Any] | None,
        interpolate_pos_encoding: bool = False,
        **kwargs: Any,
    ) -> dict[str, AskedPoints]:
        """What is asked of each output that has labels; points are drawn here, in training."""
        query: Any = self.perceiver.output_query
        batch = encoding.latents.shape[0]
        draws = self.training and output_points is None and coordinates is None
        options = {"interpolate_pos_encoding": True} if interpolate_pos_encoding else {}
        asked = {}
        for name, values in labels.items():
            if len(values) != batch:
                raise ValueError(f"labels of {name!r} are for {len(values)} examples, and the batch has {batch}")
            points, places = (output_points or {}).get(name), (coordinates or {}).get(name)
            part = QueryArray.of(query(encoding.input_array, {name: points}, {name: places}, **options)).part
            asked[name] = AskedPoints(part.length, part.grid)
            count = self.perceiver.postprocessor.num_loss_points.get(name)
            if draws and count is not None and count < part.length:
                asked[name].drawn = draw_points(part.length, count, batch, encoding.latents.device)
        return asked

    def _loss(self, name: str, labels: Tensor, asked: AskedPoints, logits: Tensor) -> Tensor:
        kind, drawn = self.perceiver.postprocessor.losses[name], asked.drawn
        count = asked.length if drawn is None else drawn.shape[1]
        predicted = logits.reshape(len(logits), count, -1)
        try:
            targets = targets_of_points(kind, labels, asked.length, predicted.shape[-1], asked.grid).to(logits.device)
            share = has_target(targets).float().mean(dim=1)
            if drawn is not None:
                rows = targets if targets.ndim == 3 else targets[..., None]
                targets = take_rows(rows, drawn).reshape(len(rows), count, *targets.shape[2:])
            return modality_loss(kind, predicted, targets, share)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


class PerceiverIOForAudioClassification(PerceiverIOHead):
    """Sound (B, samples), or its spectrogram (B, time, bands) -> class scores (B, num_labels)"""

    main_input_name = "input_values"
    preprocessor_kinds = ("grid",)
    query_kind = "tasks"
    postprocessor_kinds = ("classification", "average")

    @can_return_tuple
    def forward(
        self,
        input_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        input_features: Tensor | None = None,
        inputs: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """input_values, input_features: feature extractors' names for samples and spectrograms; the same here.

        attention_mask (B, samples) or (B, time). labels (B,), or (B, num_labels) soft or multi-label.
        """
        sound = one_input(input_values=input_values, input_features=input_features, inputs=inputs)
        outputs = self.perceiver(inputs=sound, attention_mask=attention_mask, **kwargs)
        loss = classify(self.config, outputs.logits, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))


class PerceiverIOForVideoClassification(PerceiverIOHead):
    """Videos (B, T, 3, H, W) -> class scores (B, num_labels)"""

    main_input_name = "pixel_values"
    preprocessor_kinds = ("grid",)
    query_kind = "tasks"
    postprocessor_kinds = ("classification", "average")

    def __init__(self, config: PerceiverIOConfig):
        super().__init__(config)
        if getattr(self.config, "num_frames", None) is None:
            self.config.num_frames = trained_frames(config)  # transformers' pipeline samples as many

    @can_return_tuple
    def forward(
        self,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs: Tensor | None = None,
        interpolate_pos_encoding: bool = False,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """labels (B,), or (B, num_labels) soft or multi-label; interpolate_pos_encoding resizes trained positions."""
        video = one_input(pixel_values=pixel_values, inputs=inputs)
        if isinstance(video, Tensor) and video.ndim != 5:
            raise ValueError(f"videos are (batch, time, channels, height, width), not {tuple(video.shape)}")
        outputs = self.perceiver(
            pixel_values=video,
            attention_mask=attention_mask,
            interpolate_pos_encoding=interpolate_pos_encoding,
            **kwargs,
        )
        loss = classify(self.config, outputs.logits, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))


class PerceiverIOForAudioVisualClassification(PerceiverIOHead):
    """A dict of modalities, such as audio (B, samples, 1) and image (B, T, 3, H, W) -> class scores (B, num_labels)"""

    main_input_name = "inputs"
    preprocessor_kinds = ("multimodal",)
    query_kind = "tasks"
    postprocessor_kinds = ("classification", "average")

    def __init__(self, config: PerceiverIOConfig):
        super().__init__(config)
        self.main_input_name = NO_TENSOR

    @can_return_tuple
    def forward(
        self,
        inputs: dict[str, Tensor] | None = None,
        attention_mask: dict[str, Tensor] | None = None,
        labels: Tensor | None = None,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> PerceiverIOHeadOutput:
        """attention_mask by modality, of its elements or of the examples that have it.

        labels (B,), or (B, num_labels) soft or multi-label.
        """
        outputs = self.perceiver(inputs=inputs, attention_mask=attention_mask, **kwargs)
        loss = classify(self.config, outputs.logits, labels, num_items_in_batch)
        return PerceiverIOHeadOutput(**head_output(outputs, loss, logits=outputs.logits))


def trained_frames(config: PerceiverIOConfig) -> int | None:
    """How many frames a video is long whose grid the positions' resolution is made for; None where nothing says it."""
    if config.preprocessor["kind"] != "grid":
        return None
    position: dict[str, Any] = config.preprocessor.get("position") or {}
    position = position.get("position", position)  # a projected one holds another
    sizes = position.get("max_resolution") or position.get("grid") or []
    return sizes[0] * config.preprocessor["stem"].get("temporal_downsample", 1) if len(sizes) == 3 else None
