"""Postprocessors: decoded queries (B, O, E) -> what the user asked for; the read-out always sits here.

`read_out` works on each point by itself, so that long outputs can be decoded chunk by chunk; `arrange` gives the whole
its shape. A postprocessor of your own is a Postprocessor with these two methods, or any nn.Module with
`forward(decoded, query)`, which then sees the whole at once; `@register_postprocessor("kind")` makes it usable.
Source: deepmind-research perceiver/io_processors.py and perceiver.py.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .arrays import QueryArray
from .configuration_perceiver_io import PerceiverIOConfig
from .preprocessors import check_modality_name
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

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:
            raise TypeError(
                f"{cls.__name__}: a Postprocessor defines read_out and arrange; forward is for plain nn.Modules"
            )


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

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Tensor:
        return only(points).flatten(1)


@register_postprocessor("flow")
class FlowPostprocessor(Postprocessor):
    """(B, H*W, E) -> (B, H, W, 2) flow, x then y; times 20 it is in pixels. (B, n, 2) when points are chosen.

    rescale_factor: the read-out is divided by it. Source: deepmind-research perceiver.py, FlowDecoder.
    """

    def __init__(self, *, in_channels: int, rescale_factor: float | int = 100.0, num_outputs: int = 2):
        super().__init__()
        if not rescale_factor:
            raise ValueError("rescale_factor must not be 0")
        self.rescale_factor = rescale_factor
        self.projection = nn.Linear(in_channels, num_outputs)

    def reset_own_parameters(self) -> None:
        init.zeros_(self.projection.weight)

    def read_out(self, decoded: Tensor, modality: str = "") -> Tensor:
        return self.projection(decoded) / self.rescale_factor

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> Tensor:
        values, grid = only(points), query.part.grid
        return values if grid is None else values.unflatten(1, grid)


@register_postprocessor("multimodal")
class MultimodalPostprocessor(Postprocessor):
    """A dict of outputs by modality, each through its own postprocessor after a shared linear to `channels`.

    modalities: name -> postprocessor spec; channels=None leaves the shared linear out.
    """

    def __init__(
        self, *, config: PerceiverIOConfig, in_channels: int, modalities: dict[str, dict], channels: int | None = None
    ):
        super().__init__()
        for name in modalities:
            check_modality_name(name)
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

    def arrange(self, points: dict[str, Tensor], query: QueryArray) -> dict[str, Tensor]:
        return {
            name: self.modalities[name].arrange({"": values}, QueryArray({"": query.parts[name]}))  # type: ignore[operator]
            for name, values in points.items()
        }


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


POSTPROCESSORS.seal()
