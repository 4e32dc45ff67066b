"""Names: DeepMind's Haiku parameters -> ours, one table for every model that their classes make.

Nothing is left over on either side: a Haiku array without a row, a parameter of ours without an array, or another shape
is an error that lists them. What is left out on purpose stands in KINDS, with its reason.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_perceiver import PerceiverIOConfig, PerceiverIOModel, PerceiverIOPreTrainedModel

Arrays = Mapping[str, Mapping[str, Any]]

# kind, Haiku module, ours. `in` lines are prefixes of the rows below them, up to the next empty line.
# {a,b} is a or b; # a repeated module's number (Haiku: none, _1, _2, ...; ours: 0, 1, 2, ...); * a modality's name.
# Where a Haiku module fits several names of ours, the model has exactly one of them.
TABLE = """
table       embed                                                    preprocessor.embedding.weight
table       trainable_position_encoding                              preprocessor.position.embeddings
bias        embedding_decoder                                        postprocessor.output_embedding.bias

in          image_preprocessor                                       preprocessor{,.modalities.image}
linear      patches_linear                                           stem.linear
conv        ~/conv2_d                                                stem.conv
conv        ~/conv2_d_downsample/~/conv#                             stem.convs.#
batch_norm  ~/conv2_d_downsample/~/batchnorm#                        stem.norms.#
mean        ~/conv2_d_downsample/~/batchnorm#/~/mean_ema             stem.norms.#
variance    ~/conv2_d_downsample/~/batchnorm#/~/var_ema              stem.norms.#

in          image_preprocessor/~_build_network_inputs                preprocessor{,.modalities.image}.position
in          audio_preprocessor/~_build_network_inputs                preprocessor.modalities.audio.position
table       trainable_position_encoding                              {,position.}embeddings
linear      position_encoding_projector/linear                       project
linear      linear#                                                  extra.#

in          multimodal_preprocessor                                  preprocessor
vector      *_padding                                                padding.*
vector      *_mask_token                                             mask_tokens.*

table       {perceiver_,}encoder/~/trainable_position_encoding       encoder.latents.weight

in          {perceiver_,}encoder/~/cross_attention                   encoder.cross_attends.0
in          basic_decoder/cross_attention                            decoder.cross_attend
in          classification_decoder/~/basic_decoder/cross_attention   decoder.cross_attend
in          flow_decoder/~/basic_decoder/cross_attention             decoder.cross_attend
in          multimodal_decoder/~/basic_decoder/cross_attention       decoder.cross_attend
norm        layer_norm                                               query_norm
norm        layer_norm_1                                             context_norm
linear      attention/linear                                         cross_attn.q_proj
linear      attention/linear_1                                       cross_attn.k_proj
linear      attention/linear_2                                       cross_attn.v_proj
linear      attention/linear_3                                       cross_attn.o_proj
norm        layer_norm_2                                             mlp_norm
linear      mlp/linear                                               mlp.up_proj
linear      mlp/linear_1                                             mlp.down_proj

in          {perceiver_,}encoder/~/self_attention#                   encoder.blocks.0.#
norm        layer_norm                                               attn_norm
linear      attention/linear                                         self_attn.q_proj
linear      attention/linear_1                                       self_attn.k_proj
linear      attention/linear_2                                       self_attn.v_proj
linear      attention/linear_3                                       self_attn.o_proj
norm        layer_norm_1                                             mlp_norm
linear      mlp/linear                                               mlp.up_proj
linear      mlp/linear_1                                             mlp.down_proj

in          basic_decoder/~                                          output_query{,.modalities.audio}
in          classification_decoder/~/basic_decoder/~                 output_query{,.modalities.label}
in          basic_video_autoencoding_decoder/~/basic_decoder/~       output_query.modalities.image
table       trainable_position_encoding                              {task_queries,position.embeddings}
table       trainable_position_encoding                              position.position.embeddings
linear      position_encoding_projector/linear                       position.project

vector      multimodal_decoder/~decoder_query/*_padding              output_query.padding.*

linear      basic_decoder/output                                     postprocessor.projection
linear      flow_decoder/~/basic_decoder/output                      postprocessor.projection
linear      classification_decoder/~/basic_decoder/output            postprocessor.classifier
linear      projection_decoder/~/logits                              postprocessor.classifier
linear      multimodal_decoder/~/basic_decoder/output                postprocessor.shared
linear      audio_postprocessor/linear                               postprocessor.modalities.audio.projection
linear      projection_postprocessor/linear                          postprocessor.modalities.image.projection
linear      classification_postprocessor/linear                      postprocessor.modalities.label.classifier
"""


def _as_it_is(x: np.ndarray) -> np.ndarray:
    return x


def _transposed(x: np.ndarray) -> np.ndarray:
    """(in, out) -> (out, in)"""
    return x.T


def _kernel(x: np.ndarray) -> np.ndarray:
    """(height, width, in, out) -> (out, in, height, width)"""
    return x.transpose(3, 2, 0, 1) if x.ndim == 4 else x


def _flat(x: np.ndarray) -> np.ndarray:
    """(1, ..., 1, C) -> (C,)"""
    return x.reshape(-1) if x.ndim and x.size == x.shape[-1] else x


class Leaf(NamedTuple):
    """What becomes of one array of a Haiku module: suffix of our name and change of layout, or why it is dropped."""

    suffix: str = ""
    convert: Callable[[np.ndarray], np.ndarray] = _as_it_is
    dropped: str = ""


_HIDDEN = Leaf(dropped="the running average before its correction for the zero start; evaluation reads `average`")

KINDS: dict[str, dict[str, Leaf]] = {
    "linear": {"w": Leaf(".weight", _transposed), "b": Leaf(".bias")},
    "conv": {"w": Leaf(".weight", _kernel), "b": Leaf(".bias")},
    "norm": {"scale": Leaf(".weight"), "offset": Leaf(".bias")},
    "batch_norm": {"scale": Leaf(".weight", _flat), "offset": Leaf(".bias", _flat)},
    "mean": {
        "average": Leaf(".running_mean", _flat),
        "counter": Leaf(".num_batches_tracked"),
        "hidden": _HIDDEN,
    },
    "variance": {
        "average": Leaf(".running_var", _flat),
        "counter": Leaf(dropped="the mean's counter, which counts the same updates, is kept"),
        "hidden": _HIDDEN,
    },
    "table": {"embeddings": Leaf(), "pos_embs": Leaf()},
    "vector": {"pos_embs": Leaf("", _flat)},
    "bias": {"bias": Leaf()},
}


class ConversionError(ValueError):
    """Parameters of a checkpoint and of a model do not correspond one to one."""


class Move(NamedTuple):
    """One array: Haiku's module and name, our name (None: dropped on purpose), and what becomes of its layout."""

    module: str
    name: str
    target: str | None
    leaf: Leaf


class Row(NamedTuple):
    kind: str
    haiku: re.Pattern[str]
    ours: str


def _read_table(table: str) -> list[Row]:
    rows = []
    for block in table.strip().split("\n\n"):
        lines = [line.split() for line in block.splitlines()]
        prefixes = [(haiku + "/", ours + ".") for kind, haiku, ours in lines if kind == "in"] or [("", "")]
        rows += [
            Row(kind, _pattern(before + haiku), under + ours)
            for kind, haiku, ours in lines
            if kind != "in"
            for before, under in prefixes
        ]
    return rows


def _pattern(haiku: str) -> re.Pattern[str]:
    """A Haiku path of the table as a regular expression; `number` and `modality` are its groups."""
    pattern = re.escape(haiku)
    pattern = re.sub(r"\\\{(.*?)\\\}", lambda m: f"(?:{m[1].replace(',', '|')})", pattern)
    pattern = pattern.replace(r"\#", r"(?:_(?P<number>[1-9]\d*))?").replace(r"\*", "(?P<modality>[^/.]+)")
    return re.compile(pattern)


def _expand(ours: str) -> list[str]:
    """{a,b} written out."""
    pieces = [piece.split(",") for piece in re.split(r"[{}]", ours)]
    return ["".join(choice) for choice in product(*pieces)]


ROWS = _read_table(TABLE)


def candidates(module: str) -> list[tuple[str, str]]:
    """(kind, our name) for every row that fits a Haiku module path."""
    found = []
    for row in ROWS:
        match = row.haiku.fullmatch(module)
        if match:
            given = match.groupdict()
            names = [name.replace("#", given.get("number") or "0") for name in _expand(row.ours)]
            found += [(row.kind, name.replace("*", given.get("modality") or "")) for name in names]
    return found


def match_names(haiku: Iterable[tuple[str, str]], ours: Iterable[str]) -> list[Move]:
    """Pair (module path, name) of every Haiku array with our names, sorted by Haiku's.

    Raises ConversionError that lists what is left over on either side.
    """
    wanted = set(ours)
    moves: list[Move] = []
    problems: list[str] = []
    for module, name in sorted(haiku, key=lambda path: (_numbers_sorted(path[0]), path[1])):
        leaves = [(KINDS[kind][name], target) for kind, target in candidates(module) if name in KINDS[kind]]
        if leaves and all(leaf.dropped for leaf, _ in leaves):
            moves.append(Move(module, name, None, leaves[0][0]))
            continue
        fitting = [(leaf, target + leaf.suffix) for leaf, target in leaves if target + leaf.suffix in wanted]
        if len(fitting) == 1:
            moves.append(Move(module, name, fitting[0][1], fitting[0][0]))
        elif fitting:
            problems.append(f"{module}/{name} fits {' and '.join(target for _, target in fitting)}")
        elif leaves:
            known = " or ".join(target + leaf.suffix for leaf, target in leaves)
            problems.append(f"{module}/{name} belongs to {known}, which the model does not have")
        else:
            problems.append(f"{module}/{name} is in no row of the table")
    targets = [move.target for move in moves if move.target is not None]
    for target in sorted({target for target in targets if targets.count(target) > 1}, key=_numbers_sorted):
        sources = [f"{move.module}/{move.name}" for move in moves if move.target == target]
        problems.append(f"{target} would come from {' and '.join(sources)}")
    problems += [f"nothing gives {name}" for name in sorted(wanted - set(targets), key=_numbers_sorted)]
    _raise(problems, "is the config made for this checkpoint?")
    return moves


def convert_params(
    params: Arrays, state: Arrays | None, model_or_config: PerceiverIOConfig | PerceiverIOPreTrainedModel
) -> dict[str, Tensor]:
    """Haiku parameters and state -> a float32 state dict of the model, to be loaded strictly.

    A config stands for PerceiverIOModel; a head's names begin with "perceiver.". Tied weights appear under both names
    and share memory. Raises ConversionError that lists what is left over on either side and what has another shape.
    """
    model: nn.Module
    if isinstance(model_or_config, PerceiverIOConfig):
        with torch.device("meta"):
            model = PerceiverIOModel(model_or_config)
    else:
        model = model_or_config
    prefix = "" if isinstance(model, PerceiverIOModel) else "perceiver."
    tied = _tied_names(model)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    arrays = {
        (m, n): value for part in (params, state or {}) for m, names in part.items() for n, value in names.items()
    }
    moves = match_names(arrays, [name.removeprefix(prefix) for name in shapes if name not in tied])
    converted: dict[str, Tensor] = {}
    problems = []
    for move in moves:
        if move.target is None:
            continue
        source = np.asarray(arrays[move.module, move.name])
        value = move.leaf.convert(source)
        target = prefix + move.target
        if value.shape != shapes[target]:
            problems.append(
                f"{move.module}/{move.name} {source.shape} gives {target} {value.shape}, not {shapes[target]}"
            )
        integer = target.endswith("num_batches_tracked")
        converted[target] = torch.from_numpy(np.array(value, dtype=np.int64 if integer else np.float32, order="C"))
    _raise(problems, "the config is for other sizes")
    return {**converted, **{name: converted[other] for name, other in tied.items()}}


def _tied_names(model: nn.Module) -> dict[str, str]:
    """Second names of parameters that stand at two places -> their first names."""
    first: dict[int, str] = {}
    tied = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if id(parameter) in first:
            tied[name] = first[id(parameter)]
        first.setdefault(id(parameter), name)
    return tied


def _numbers_sorted(name: str) -> list[tuple[int, str]]:
    """Sort key that puts self_attention_2 before self_attention_10."""
    return [(int(piece), "") if piece.isdigit() else (-1, piece) for piece in re.split(r"(\d+)", name)]


def _raise(problems: list[str], hint: str, most: int = 20) -> None:
    if problems:
        more = [f"and {len(problems) - most} more"] if len(problems) > most else []
        raise ConversionError(
            f"checkpoint and model do not fit together ({hint}):\n  " + "\n  ".join(problems[:most] + more)
        )
