"""Postprocessors: decoded queries (B, O, E) -> what the user asked for; the read-out always sits here.

`read_out` works on each point by itself, so that long outputs can be decoded chunk by chunk; `arrange` gives the whole
its shape. A postprocessor of your own is a Postprocessor with these two methods, or any nn.Module with
`forward(decoded, query)`, which then sees the whole at once; `@register_postprocessor("kind")` makes it usable.
Source: deepmind-research perceiver/io_processors.py and perceiver.py.
"""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .arrays import QueryArray
from .configuration_perceiver_io import PerceiverIOConfig
from .fast_writing import Linear
from .losses import POINT_LOSSES
from .preprocessors import check_modality_name
from .products import is_watched
from .registry import POSTPROCESSORS, register_postprocessor


class Postprocessor(nn.Module):
    """Base of postprocessors. `reads_latents` ones get the latents (B, N, D) in place of decoded queries."""

    reads_latents = False

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        """(B, o, E) -> (B, o, K), each point by itself."""
        return decoded

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Any:
        """Read-out points by modality -> the model's output. By default the points of the only one."""
        return only(points)

    def linear_read_out(self, modality: str = "") -> Linear | None:
        """The weight (K, E) and bias (K,) that `read_out` is, where it is one linear map now; inference folds it."""
        return None

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__}: a Postprocessor defines read_out and arrange; forward is for plain nn.Modules"
            )


def plain_linear(module: nn.Module | None) -> Linear | None:
    """Weight and bias of a linear, None for one that is changed, quantised or watched."""
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter or is_watched(module):
        return None
    return (module.weight, module.bias) if module.weight.is_floating_point() else None


def after(first: Linear | None, second: Linear | None) -> Linear | None:
    """One linear map after another, as one."""
    if first is None or second is None:
        return None
    return second[0] @ first[0], second[0] @ first[1] + second[1]


def only(points: dict[str, Tensor]) -> Tensor:
    """The points of the only modality; ValueError where there are several, of which one would be taken."""
    if len(points) != 1:
        raise ValueError(
            f"this postprocessor reads out one modality, and the queries have {', '.join(points) or 'none'}; use kind "
            "'multimodal' with one postprocessor for each"
        )
    return next(iter(points.values()))


def count_outputs(num_outputs: int | None, config: PerceiverIOConfig) -> int:
    """`num_outputs`, or the config's number of labels; ValueError for less than one."""
    count = config.num_labels if num_outputs is None else num_outputs
    if count < 1:
        raise ValueError(f"num_labels={count} must be at least 1 for a model that scores labels; or set num_outputs")
    return count


@register_postprocessor("identity")
class IdentityPostprocessor(Postprocessor):
    """Decoded queries as they are, (B, O, E). Source: deepmind-research, IdentityPostprocessor."""

    def __init__(self) -> None:
        super().__init__()


@register_postprocessor("tokens")
class TokenPostprocessor(Postprocessor):
    """(B, L, E) -> (B, L, vocab_size) through the input embedding's weights and a bias of its own.

    project: a linear to that width comes first, for queries of another width than the embedding's. tied=False gives it
    weights of its own. Source: deepmind-research, EmbeddingDecoder after a BasicDecoder with or without final_project.
    """

    def __init__(
        self,
        *,
        config: PerceiverIOConfig,
        in_channels: int,
        preprocessor: Any = None,
        tied: bool = True,
        project: int | None = None,
    ):
        super().__init__()
        self.tied = tied
        embedding = getattr(preprocessor, "embedding", None)
        self.projection = nn.Linear(in_channels, project) if project else None
        width = project or in_channels
        if tied and (embedding is None or embedding.embedding_dim != width):
            wanted = None if embedding is None else embedding.embedding_dim
            raise ValueError(
                f"tied tokens need queries as wide as the token embedding: {width} and {wanted}; make the output "
                f"query's position that wide, project it (kind 'projected'), project what is decoded "
                f"(project={wanted}), or use tied=False"
            )
        self.output_embedding = nn.Linear(width, config.vocab_size)

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        return self.output_embedding(decoded if self.projection is None else self.projection(decoded))

    def linear_read_out(self, modality: str = "") -> Linear | None:
        tokens = plain_linear(self.output_embedding)
        return tokens if self.projection is None else after(plain_linear(self.projection), tokens)


@register_postprocessor("classification")
class ClassificationPostprocessor(Postprocessor):
    """The first query's (or, with several tasks, each query's) class scores: (B, O, E) -> (B, K) or (B, O, K)

    K is config.num_labels, or num_outputs. hidden: the paper's two-layer tanh head of that width for GLUE.
    """

    def __init__(
        self,
        *,
        config: PerceiverIOConfig,
        in_channels: int,
        num_outputs: int | None = None,
        hidden: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.hidden = nn.Linear(in_channels, hidden) if hidden else None
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Linear(hidden or in_channels, count_outputs(num_outputs, config))

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        if self.hidden is not None:
            decoded = torch.tanh(self.hidden(decoded))
        return self.classifier(self.dropout(decoded))

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Tensor:
        scores = only(points)
        return scores[:, 0] if scores.shape[1] == 1 else scores


@register_postprocessor("projection")
class ProjectionPostprocessor(Postprocessor):
    """A linear for each point: (B, O, E) -> (B, O, K); K is config.num_labels, or num_outputs.

    on_grid: a whole output grid comes back in its shape, (B, n_1, ..., n_d, K).
    """

    def __init__(
        self,
        *,
        config: PerceiverIOConfig,
        in_channels: int,
        num_outputs: int | None = None,
        on_grid: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.on_grid = on_grid
        self.projection = nn.Linear(in_channels, count_outputs(num_outputs, config))

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        return self.projection(self.dropout(decoded))

    def linear_read_out(self, modality: str = "") -> Linear | None:
        return None if self.training else plain_linear(self.projection)

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Tensor:
        values, grid = only(points), query.part.grid
        return values.unflatten(1, grid) if self.on_grid and grid is not None else values


@register_postprocessor("audio")
class AudioPostprocessor(Postprocessor):
    """(B, patches, E) -> samples (B, patches * samples_per_patch). Source: AudioPostprocessor."""

    def __init__(self, *, in_channels: int, samples_per_patch: int = 96):
        super().__init__()
        self.projection = nn.Linear(in_channels, samples_per_patch)

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        return self.projection(decoded)

    def linear_read_out(self, modality: str = "") -> Linear | None:
        return plain_linear(self.projection)

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Tensor:
        return only(points).flatten(1)


def _check_factors(rescale_factor: float, scale_factor: float) -> None:
    if not rescale_factor:
        raise ValueError("rescale_factor must not be 0")
    if scale_factor <= 0:
        raise ValueError(f"scale_factor={scale_factor} turns logits into pixels; it must be more than 0")


@register_postprocessor("flow")
class FlowPostprocessor(Postprocessor):
    """(B, H*W, E) -> (B, H, W, 2) flow, x then y; times `scale_factor` it is in pixels. (B, n, 2) for chosen points.

    rescale_factor: the read-out is divided by it. flow_loss: what is trained on, see `losses.flow_loss`.
    num_loss_points: in training, so many points of each example are decoded, drawn at random; None for all.
    Source: deepmind-research perceiver.py, FlowDecoder, and the notebook's FLOW_SCALE_FACTOR.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        rescale_factor: float | int = 100.0,
        scale_factor: float | int = 20.0,
        flow_loss: Literal["epe", "l1", "charbonnier"] = "epe",
        num_loss_points: int | None = None,
        num_outputs: int = 2,
    ):
        super().__init__()
        _check_factors(rescale_factor, scale_factor)
        self.scale_factor, self.flow_loss, self.num_loss_points = scale_factor, flow_loss, num_loss_points
        self.rescale_factor = rescale_factor
        self.projection = nn.Linear(in_channels, num_outputs)

    def reset_own_parameters(self) -> None:
        init.zeros_(self.projection.weight)

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        return self.projection(decoded) / self.rescale_factor

    def linear_read_out(self, modality: str = "") -> Linear | None:
        linear = plain_linear(self.projection)
        return None if linear is None else (linear[0] / self.rescale_factor, linear[1] / self.rescale_factor)

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Tensor:
        values, grid = only(points), query.part.grid
        return values if grid is None else values.unflatten(1, grid)


@register_postprocessor("convex_upsampling")
class ConvexUpsamplingPostprocessor(Postprocessor):
    """(B, h*w, E) -> (B, factor * h, factor * w, 2) flow, x then y; times `scale_factor` it is in pixels.

    A fine flow is a weighted mean of the 3x3 coarse flows around it; the weights are a softmax of what the coarse point
    reads out. Coarse flow is in the same unit as the output, full-size pixels / scale_factor; RAFT's is in coarse pixels
    and multiplied by its factor. Neighbours outside the grid get no weight, where RAFT's zeros draw the border's flow
    towards 0. Raises ValueError for chosen points, which have no neighbours.
    Source: Perceiver IO, appendix H: `channels`, then a linear to flow, then the upsampling of RAFT (Teed and Deng, 2020).
    It does not say what gives the weights: here one linear for each point, times 0.25 as in RAFT.
    """

    def __init__(
        self,
        *,
        in_channels: int,
        factor: int = 4,
        channels: int = 64,
        rescale_factor: float | int = 100.0,
        scale_factor: float | int = 20.0,
        flow_loss: Literal["epe", "l1", "charbonnier"] = "epe",
    ):
        super().__init__()
        _check_factors(rescale_factor, scale_factor)
        self.factor, self.rescale_factor = factor, rescale_factor
        self.scale_factor, self.flow_loss = scale_factor, flow_loss
        self.features = nn.Linear(in_channels, channels)
        self.flow = nn.Linear(channels, 2)
        self.weights = nn.Linear(channels, 9 * factor**2)

    def reset_own_parameters(self) -> None:
        init.zeros_(self.flow.weight)

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        """(B, o, E) -> (B, o, 2 + 9 * factor^2), coarse flow and scores of its neighbours"""
        features = self.features(decoded)
        return torch.cat([self.flow(features) / self.rescale_factor, 0.25 * self.weights(features)], dim=-1)

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Tensor:
        values, grid = only(points), query.part.grid
        if grid is None or len(grid) != 2:
            what = "chosen points" if grid is None else f"a grid of {len(grid)} axes"
            raise ValueError(
                f"convex upsampling makes each flow of its neighbours on an image, and {what} have none; leave out "
                "output_points, or use a postprocessor of kind 'flow'"
            )
        coarse, scores = values[..., :2], values[..., 2:].unflatten(-1, (9, self.factor**2))
        around = neighbours(coarse.unflatten(1, grid))  # (B, h*w, 9, 2)
        inside = neighbours(coarse.new_ones(1, *grid, 1)) > 0  # (1, h*w, 9, 1)
        wide = torch.float32 if scores.dtype.itemsize < 4 else None
        weights = scores.masked_fill(~inside, float("-inf")).softmax(dim=2, dtype=wide).to(scores.dtype)
        fine = weights.transpose(2, 3) @ around  # (B, h*w, factor^2, 2)
        fine = fine.unflatten(2, (self.factor, self.factor)).unflatten(1, grid)  # (B, h, w, factor, factor, 2)
        return fine.transpose(2, 3).flatten(3, 4).flatten(1, 2)


def neighbours(image: Tensor) -> Tensor:
    """(B, H, W, C) -> (B, H*W, 9, C), the 3x3 around each point row by row, zeros outside"""
    height, width = image.shape[1:3]
    padded = nn.functional.pad(image, (0, 0, 1, 1, 1, 1))
    shifted = [padded[:, i : i + height, j : j + width] for i in range(3) for j in range(3)]
    return torch.stack(shifted, dim=3).flatten(1, 2)


@register_postprocessor("multimodal")
class MultimodalPostprocessor(Postprocessor):
    """A dict of outputs by modality, each through its own postprocessor after a shared linear to `channels`.

    modalities: name -> postprocessor spec; channels=None leaves the shared linear out.
    For training, by name: losses "l1", "mse" or "cross_entropy", by default the last for kinds "classification" and
    "tokens" and "l1" for the others; loss_weights, 1 where none is given; num_loss_points, how many points of an output
    are drawn for each example and decoded, all where no number is given.
    """

    def __init__(
        self,
        *,
        config: PerceiverIOConfig,
        in_channels: int,
        modalities: dict[str, dict],
        channels: int | None = None,
        losses: dict[str, str] | None = None,
        loss_weights: dict[str, float] | None = None,
        num_loss_points: dict[str, int] | None = None,
    ):
        super().__init__()
        for name in modalities:
            check_modality_name(name)
        self.losses = {name: "cross_entropy" if of_classes(spec) else "l1" for name, spec in modalities.items()}
        self.losses.update(losses or {})
        self.loss_weights = {**dict.fromkeys(modalities, 1.0), **(loss_weights or {})}
        self.num_loss_points = dict(num_loss_points or {})
        options: dict[str, dict] = {
            "losses": self.losses,
            "loss_weights": self.loss_weights,
            "num_loss_points": self.num_loss_points,
        }
        for option, given in options.items():
            for name, value in given.items():
                if name not in modalities:
                    raise ValueError(f"{option} names {name!r}; the modalities are {', '.join(sorted(modalities))}")
                if option == "losses" and value not in POINT_LOSSES:
                    raise ValueError(f"losses[{name!r}]={value!r} must be one of {', '.join(POINT_LOSSES)}")
                if option == "loss_weights" and not 0 <= value < float("inf"):
                    raise ValueError(f"loss_weights[{name!r}] is a number from 0, not {value}")
                if option == "num_loss_points" and value < 1:
                    raise ValueError(f"num_loss_points[{name!r}] must be at least 1, not {value}; leave it out for all")
        self.shared = nn.Linear(in_channels, channels) if channels else None
        built = {
            name: POSTPROCESSORS.build(modalities[name], config=config, in_channels=channels or in_channels)
            for name in sorted(modalities)
        }
        for name, module in built.items():
            if not hasattr(module, "read_out") or getattr(module, "reads_latents", False):
                raise ValueError(
                    f"postprocessor kind {modalities[name]['kind']!r} cannot read modality {name!r}: it needs all queries, "
                    "or the latents, at once; use one that reads each point by itself"
                )
        self.modalities = nn.ModuleDict(built)

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        if modality not in self.modalities:
            raise ValueError(f"no postprocessor for modality {modality!r}; known: {', '.join(self.modalities)}")
        shared = decoded if self.shared is None else self.shared(decoded)
        return self.modalities[modality].read_out(shared, modality)  # type: ignore[operator]

    def linear_read_out(self, modality: str = "") -> Linear | None:
        found = getattr(self.modalities[modality], "linear_read_out", None)
        linear = None if found is None or is_watched(self.modalities[modality]) else found(modality)
        return linear if self.shared is None else after(plain_linear(self.shared), linear)

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> dict[str, Tensor]:
        return {
            name: self.modalities[name].arrange({"": values}, QueryArray({"": query.parts[name]}))  # type: ignore[operator]
            for name, values in points.items()
        }


def of_classes(spec: dict) -> bool:
    return spec.get("kind") in ("classification", "tokens")


@register_postprocessor("average")
class AveragePostprocessor(Postprocessor):
    """The original Perceiver's read-out: the mean latent through one linear, (B, N, D) -> (B, num_labels)

    zero_init starts the linear at zero, as DeepMind's ProjectionDecoder does.
    """

    reads_latents = True

    def __init__(
        self, *, config: PerceiverIOConfig, in_channels: int, num_outputs: int | None = None, zero_init: bool = True
    ):
        super().__init__()
        self.zero_init = zero_init
        self.classifier = nn.Linear(in_channels, count_outputs(num_outputs, config))

    def reset_own_parameters(self) -> None:
        if self.zero_init:
            init.zeros_(self.classifier.weight)

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        return self.classifier(decoded.mean(dim=1))


@register_postprocessor("multitask")
class MultitaskPostprocessor(nn.Module):
    """Several tasks, each with a two-layer tanh head of its own: (B, O, E) -> (B, T, K), K of the task with most classes.

    tasks: name -> its classes' names, or [] for one that predicts a number; ordered by name, once, and a task id is the
    place in that order. What a task has no score for is -inf; a number stands first.
    Of T queries (kind "tasks") the t-th is read out by the t-th head; a single one, chosen or shared, by every head.
    at_first_token: every head reads out the first query, that of the first token's place, however many there are.
    hidden: width of the tanh layer, by default the queries'. Source: Perceiver IO, sections 4.1 and F.4.
    """

    def __init__(
        self,
        *,
        config: PerceiverIOConfig,
        in_channels: int,
        tasks: dict[str, list[str]],
        hidden: int | None = None,
        at_first_token: bool = False,
        dropout: float = 0.0,
    ):
        super().__init__()
        if not tasks:
            raise ValueError("a multitask postprocessor needs at least one task: tasks={name: [class, ...]}")
        for name, classes in tasks.items():
            check_modality_name(name)
            if len(classes) == 1 or len(set(classes)) != len(classes):
                raise ValueError(
                    f"task {name!r} has the classes {classes}; give at least two different ones, or [] for a number"
                )
        self.at_first_token = at_first_token
        self.names = sorted(tasks)
        self.num_classes = [len(tasks[name]) for name in self.names]
        self.width = max(1, *self.num_classes)
        built = {
            name: ClassificationPostprocessor(
                config=config,
                in_channels=in_channels,
                num_outputs=len(tasks[name]) or 1,
                hidden=hidden or in_channels,
                dropout=dropout,
            )
            for name in self.names
        }
        self.tasks = nn.ModuleDict(built)

    def forward(self, decoded: Tensor, query: QueryArray) -> Tensor:
        asked, count = decoded.shape[1], len(self.names)
        shared = asked == 1 or (self.at_first_token and asked > 1)
        # Chosen points have no grid, and may be in another order.
        if not shared and query.part.grid != (count,):
            raise ValueError(
                f"{asked} queries on the grid {query.part.grid} for {count} tasks; ask all of them, or one"
            )
        scores = []
        for index, head in enumerate(self.tasks.values()):
            one = head.read_out(decoded[:, 0 if shared else index])  # type: ignore[operator]
            scores.append(nn.functional.pad(one, (0, self.width - one.shape[-1]), value=float("-inf")))
        return torch.stack(scores, dim=1)


POSTPROCESSORS.seal()
