"""What a checkpoint holds, without loading it into a model.

    python -m conversion.inspect CHECKPOINT

CHECKPOINT is one of DeepMind's pickles, or a folder with safetensors (or an old .bin) of this package or of
transformers' built-in Perceiver. Prints every name, shape and dtype, the counts, and which released model it is.
"""

import argparse
import json
import struct
import sys
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from conversion.haiku_names import ConversionError, match_names
from conversion.unpickle import ArrayEntry, CheckpointError, read_entries
from hf_perceiver import PerceiverIOConfig, PerceiverIOModel, recipes
from hf_perceiver.checkpoint_names import builtin_to_config, is_builtin_config

Shapes = dict[str, tuple[int, ...]]

# convert_haiku's --model -> the released configuration.
RELEASED = {
    "masked-lm": recipes.language_bytes,
    "imagenet-learned": recipes.imagenet_learned,
    "imagenet-fourier": recipes.imagenet_fourier,
    "imagenet-conv": recipes.imagenet_conv,
    "optical-flow": recipes.optical_flow,
    "multimodal": recipes.multimodal_autoencoder,
}
# No header of a checkpoint of this size is longer.
MAX_HEADER = 100 << 20


class Tensor(NamedTuple):
    """One line of the listing; `where` is the section of a pickle or the file of a folder."""

    where: str
    name: str
    shape: tuple[int, ...]
    dtype: str


# --- which released model


@cache
def released_shapes(model: str) -> Shapes:
    """Our names and shapes of a released model; a second name of a tied weight is left out."""
    return _shapes_of(RELEASED[model]())


def _shapes_of(config: PerceiverIOConfig) -> Shapes:
    with torch.device("meta"):
        model = PerceiverIOModel(config)
    tied = set(getattr(model, "_tied_weights_keys", None) or ())
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}


def which_released(entries: Iterable[ArrayEntry]) -> tuple[list[str], list[str]]:
    """Haiku arrays -> released models of these names and shapes, and those of these names in other sizes or depths."""
    theirs = {(entry.module, entry.name): entry.shape for entry in entries}
    same, related = [], []
    for model in RELEASED:
        ours = released_shapes(model)
        if _converted_shapes(theirs, ours) == ours:
            same.append(model)
            continue
        # The number of layers is a size, too.
        ends = {path: shape for path, shape in theirs.items() if "/~/self_attention" not in path[0]}
        if _converted_shapes(ends, _without_blocks(ours)) is not None:
            related.append(model)
    return same, related


def _without_blocks(shapes: Shapes) -> Shapes:
    return {name: shape for name, shape in shapes.items() if not name.startswith("encoder.blocks.")}


def _converted_shapes(theirs: Mapping[tuple[str, str], tuple[int, ...]], ours: Iterable[str]) -> Shapes | None:
    """Our names with the shapes that the Haiku arrays give; None where names are left over on either side."""
    try:
        moves = match_names(theirs, ours)
    except ConversionError:
        return None
    return {move.target: _converted_shape(theirs[move.module, move.name], move) for move in moves if move.target}


def _converted_shape(shape: tuple[int, ...], move: Any) -> tuple[int, ...]:
    # A view of one number: no memory, whatever the shape says.
    return move.leaf.convert(np.broadcast_to(np.float32(0), shape)).shape


def _say_released(same: list[str], related: list[str]) -> str:
    if same:
        return f"released model: {' or '.join(same)}"
    if related:
        return f"released model: none; the names are those of {' or '.join(related)}, the sizes are others"
    return "released model: none; neither names nor sizes are those of one"


# --- pickles


def inspect_pickle(path: Path) -> tuple[list[Tensor], list[str]]:
    """Every array, and what is to be said of them. Raises CheckpointError."""
    entries = read_entries(path)
    sections = sorted({entry.section for entry in entries})
    said = [
        f"file: Haiku pickle, {'params and state' if sections == ['params', 'state'] else 'params'}",
        _say_released(*which_released(entries)),
    ]
    return [Tensor(entry.section, entry.path, entry.shape, entry.dtype) for entry in entries], said


# --- folders


def inspect_folder(folder: Path) -> tuple[list[Tensor], list[str]]:
    """Every tensor of a folder's weights by their headers, and what is to be said of them. Raises CheckpointError."""
    tensors = _weights(folder)
    config = _config(folder)
    if config is None:
        return tensors, ["file: weights without a config.json", "released model: not known without a config.json"]
    if is_builtin_config(config):
        fields = builtin_to_config(config)
        said = f"transformers' built-in Perceiver, {fields['architectures'][0].replace('PerceiverIO', 'Perceiver')}"
        # The file's own names are the built-in's; its config says which model that is.
        shapes = _shapes_of(PerceiverIOConfig.from_dict(fields))
        by = "by its config; "
    elif config.get("model_type") == "perceiver_io":
        said = f"this package's {(config.get('architectures') or ['PerceiverIOModel'])[0]}"
        shapes = {tensor.name.removeprefix("perceiver."): tensor.shape for tensor in tensors}
        by = ""
    else:
        raise CheckpointError(f"config.json says model_type={config.get('model_type')!r}; this is no Perceiver")
    same = [model for model in RELEASED if released_shapes(model) == shapes]
    ends = _without_blocks(shapes).keys()
    related = [model for model in RELEASED if _without_blocks(released_shapes(model)).keys() == ends]
    return tensors, [f"file: {said}", by + _say_released(same, related)]


def _config(folder: Path) -> dict[str, Any] | None:
    path = folder / "config.json"
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"config.json is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise CheckpointError("config.json is not an object")
    return config


def _weights(folder: Path) -> list[Tensor]:
    tensors: list[Tensor] = []
    for path in sorted(folder.glob("*.safetensors")):
        tensors += _safetensors_header(path)
    if tensors:
        return tensors
    for path in sorted(folder.glob("pytorch_model*.bin")):
        state = torch.load(path, map_location="meta", weights_only=True)
        if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
            raise CheckpointError(f"{path.name} is not a mapping of tensors")
        dtypes = {name: str(value.dtype).removeprefix("torch.") for name, value in state.items()}
        tensors += [Tensor(path.name, name, tuple(value.shape), dtypes[name]) for name, value in state.items()]
    if not tensors:
        raise CheckpointError(f"{folder.name} holds no *.safetensors and no pytorch_model*.bin")
    return tensors


def _safetensors_header(path: Path) -> list[Tensor]:
    """Eight bytes of length, then JSON: name -> dtype, shape, place. Tensors are not read."""
    with open(path, "rb") as file:
        start = file.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if not 0 < length <= min(MAX_HEADER, path.stat().st_size - 8):
            raise CheckpointError(f"{path.name} is not a whole safetensors file")
        try:
            header = json.loads(file.read(length))
            end = max((entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"), default=0)
            tensors = [
                Tensor(path.name, name, tuple(entry["shape"]), str(entry["dtype"]))
                for name, entry in header.items()
                if name != "__metadata__"
            ]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise CheckpointError(f"{path.name}: its header is damaged ({error})") from None
    if end != path.stat().st_size - 8 - length:
        raise CheckpointError(f"{path.name} is cut off: its header speaks of {end} bytes")
    return tensors


# --- the command


def report(tensors: list[Tensor], said: list[str]) -> str:
    """The listing, the counts, and what is to be said."""
    width = max(len(tensor.name) for tensor in tensors)
    shapes = [str(list(tensor.shape)) for tensor in tensors]
    wide = max(map(len, shapes))
    lines = [
        f"{tensor.name:<{width}}  {shape:<{wide}}  {tensor.dtype:<8}  {tensor.where}"
        for tensor, shape in zip(tensors, shapes, strict=True)
    ]
    lines.append("")
    for where in dict.fromkeys(tensor.where for tensor in tensors):
        there = [tensor for tensor in tensors if tensor.where == where]
        numbers = sum(int(np.prod(tensor.shape, dtype=object)) for tensor in there)
        lines.append(f"{where}: {len(there)} arrays, {numbers:,} numbers")
    return "\n".join([*lines, *said])


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.inspect",
        description="List what a checkpoint holds (names, shapes, dtypes, counts) and which released model it is. "
        "Nothing from the file is run, no tensor is loaded into a model.",
    )
    parser.add_argument(
        "checkpoint",
        metavar="CHECKPOINT",
        type=Path,
        help="a pickle (.pystate, .pickle) of DeepMind's, or a folder with safetensors or pytorch_model.bin",
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = make_parser().parse_args(arguments)
    try:
        is_folder = given.checkpoint.is_dir()
        tensors, said = (inspect_folder if is_folder else inspect_pickle)(given.checkpoint)
    except Exception as error:
        if not isinstance(error, (ValueError, OSError, RuntimeError)) and type(error).__name__ != "UnpicklingError":
            raise
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(report(tensors, said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
