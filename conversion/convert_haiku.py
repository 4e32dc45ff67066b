"""One of DeepMind's checkpoints (a Haiku pickle) -> a Hub folder with safetensors.

    python -m conversion.convert_haiku CHECKPOINT --model MODEL --output DIR [--reference FILE.npz]

Nothing from the file is run (unpickle.py); every name is accounted for, both ways (haiku_names.py). With reference
outputs of the original for this checkpoint, the folder is compared with them before it appears (verify.py). Exit status:
0 the folder is complete, 1 it does not give the reference's numbers, 2 it cannot be made; with 1 and 2 it is not there.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from conversion.deepmind_config import WIRINGS, config_from_deepmind
from conversion.haiku_names import ConversionError, convert_params
from conversion.inspect import RELEASED, which_released
from conversion.repository import (
    Provenance,
    check_options,
    check_output,
    make_processors,
    sha256_of,
    write_repository,
)
from conversion.unpickle import HaikuCheckpoint, describe, load_haiku_checkpoint
from conversion.verify import TOLERANCE, described, load_reference, verify
from hf_perceiver import (
    PerceiverIOConfig,
    PerceiverIOForImageClassification,
    PerceiverIOForMaskedLM,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForOpticalFlow,
    PerceiverIOModel,
)

HEADS: dict[str, type] = {
    "masked-lm": PerceiverIOForMaskedLM,
    "imagenet-learned": PerceiverIOForImageClassification,
    "imagenet-fourier": PerceiverIOForImageClassification,
    "imagenet-conv": PerceiverIOForImageClassification,
    "optical-flow": PerceiverIOForOpticalFlow,
    "multimodal": PerceiverIOForMultimodalAutoencoding,
}


# Relative L2 of logits and latents between DeepMind's unmodified code and this conversion, on the small reference models
# (tests/reference/parity); `python -m conversion.verify` prints them.
PARITY = {
    "masked-lm": ("4.2e-7", "4.5e-7"),
    "imagenet-learned": ("2.8e-7", "3.1e-7"),
    "imagenet-fourier": ("3.7e-7", "9.4e-7"),
    "imagenet-conv": ("2.4e-7", "1.5e-7"),
    "optical-flow": ("6.7e-7", "5.6e-7"),
    "multimodal": ("5.1e-7", "6.4e-7"),
    "dense": ("5.2e-7", "6.0e-7"),
}
MEASURED = (
    "On a small model of this kind with random weights, DeepMind's own code and this conversion differ by a relative L2 of "
    "{} in the output and {} in the latents (float32, CPU). For this file itself nothing was measured."
)
VERIFIED = (
    "Measured on this file, in float32 on a CPU, against DeepMind's own results for it (`{}`), by `conversion.verify` with "
    "`--tolerance {:g}`:\n\n```\n{}\n```"
)


class NotVerifiedError(Exception):
    """The converted model does not give the reference's numbers; the text is the whole comparison."""


def make_config(
    model: str,
    arguments: Mapping[str, Any] | None,
    image_size: tuple[int, int] | None,
    params: Mapping[str, Mapping[str, Any]],
) -> PerceiverIOConfig:
    """The config of DeepMind's constructor arguments, or of the released model where there are none."""
    if arguments is not None:
        return config_from_deepmind(model, arguments, image_size=image_size, params=params)
    if model not in RELEASED:
        raise ValueError(f"--model {model} is no released model; give its sizes with --deepmind-config FILE.json")
    config = RELEASED[model]()
    if image_size is not None:
        _record_grid(config, image_size)
    return config


def _record_grid(config: PerceiverIOConfig, size: tuple[int, int]) -> None:
    """Write down the grid of trained image positions; other positions take theirs from each image."""
    position = config.preprocessor.get("position") or {}
    while "position" in position:
        position = position["position"]
    if position.get("kind") != "trainable":
        print("note: --image-size is recorded for trained image positions only; this model has none", file=sys.stderr)
    elif math.prod(size) != position["num_positions"]:
        raise ValueError(
            f"--image-size {size[0]} {size[1]} has {math.prod(size)} points, the model {position['num_positions']} "
            "trained positions"
        )
    else:
        position["grid"] = list(size)


def read_arguments(path: Path) -> dict[str, Any]:
    """Keyword arguments of DeepMind's constructors: the whole JSON file, or what stands under "config" in it."""
    try:
        given = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path.name} is not JSON: {error}") from None
    if isinstance(given, dict) and "config" in given:
        given = given["config"]
    if not isinstance(given, dict):
        raise ValueError(f"{path.name} must hold an object, the keyword arguments of DeepMind's constructors")
    return given


class _Once:
    """An array that is let go when it is taken, so that a checkpoint and its copy are not both in memory."""

    def __init__(self, array: np.ndarray):
        self.array: np.ndarray | None = array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array, self.array = self.array, None
        assert array is not None, "taken twice"
        return array


def build_model(model: str, config: PerceiverIOConfig, checkpoint: HaikuCheckpoint) -> Any:
    """The model with the checkpoint's weights: the head of the task, or PerceiverIOModel for every other output.

    Takes the arrays out of the checkpoint, which is empty afterwards. Raises ConversionError.
    """
    built = _on_meta(HEADS.get(model, PerceiverIOModel), config)
    if (built.config.output_query, built.config.postprocessor) != (config.output_query, config.postprocessor):
        # A head that would put its own output side in place of the checkpoint's.
        built = _on_meta(PerceiverIOModel, config)
    sections = []
    for arrays in (checkpoint.params, checkpoint.state):
        sections.append({m: {n: _Once(value) for n, value in named.items()} for m, named in arrays.items()})
        arrays.clear()
    built.load_state_dict(convert_params(sections[0], sections[1], built), strict=True, assign=True)
    built.tie_weights()
    left = [name for name, tensor in (*built.named_parameters(), *built.named_buffers()) if tensor.is_meta]
    if left:
        raise ConversionError(f"nothing gives {', '.join(left)}")
    return built.eval()


def _on_meta(model_class: Any, config: PerceiverIOConfig) -> Any:
    with torch.device("meta"):
        return model_class(config)


def check_reference(reference: Path | None, tolerance: float | None) -> None:
    """Raise ValueError or OSError, before long work, for what no comparison can be made with."""
    if reference is None:
        if tolerance is not None:
            raise ValueError("--tolerance is about the comparison with a --reference; give that too")
        return
    if tolerance is not None and not 0 < tolerance < 1:
        raise ValueError(f"--tolerance {tolerance} must lie between 0 and 1, for instance {TOLERANCE}")
    load_reference(reference)


def measure(folder: Path, reference: Path, tolerance: float) -> str:
    """What a card says about the parity of a folder.

    Raises NotVerifiedError where a stage is above its bound, ValueError where the comparison cannot be made.
    """
    try:
        report = verify(folder, reference, tolerance)
    except Exception as error:
        # Anything may go wrong in a model that the file does not belong to.
        raise ValueError(f"it cannot be compared with {reference.name}: {error or type(error).__name__}") from error
    if not report.holds:
        raise NotVerifiedError(described(report))
    return VERIFIED.format(reference.name, tolerance, described(report))


def convert(given: argparse.Namespace, command: str) -> None:
    """What the command does. Raises ValueError, OSError or NotVerifiedError; nothing is written then."""
    check_output(given.output)
    target = {"push_to_hub": given.push_to_hub, "private": given.private}
    check_options(task=given.model, dtype=given.dtype, max_shard_size=given.max_shard_size, **target)
    if given.image_size is not None and min(given.image_size) < 1:
        raise ValueError(
            f"--image-size {given.image_size[0]} {given.image_size[1]} must be a height and a width from 1"
        )
    reference, tolerance = given.reference, TOLERANCE if given.tolerance is None else given.tolerance
    check_reference(reference, given.tolerance)
    arguments = None if given.deepmind_config is None else read_arguments(given.deepmind_config)
    _say(f"reading {given.checkpoint.name}")
    checkpoint = load_haiku_checkpoint(given.checkpoint)
    entries = list(describe(checkpoint))
    size = None if given.image_size is None else tuple(given.image_size)
    config = make_config(given.model, arguments, size, checkpoint.params)
    _say(f"converting {len(entries)} arrays to {given.model}")
    try:
        model = build_model(given.model, config, checkpoint)
    except ConversionError as error:
        raise ConversionError(f"{error}{_hint(given.model, entries, arguments is not None)}") from None
    provenance = Provenance(
        origin="deepmind",
        source=given.checkpoint.name,
        sha256=sha256_of(given.checkpoint),
        command=command,
        notes=_notes(given, model),
        parity=MEASURED.format(*PARITY[given.model]),
    )
    write_repository(
        model,
        given.output,
        task=given.model,
        provenance=provenance,
        dtype=given.dtype,
        max_shard_size=given.max_shard_size,
        processors=make_processors(model.config, given.model, arguments),
        measure=None if reference is None else lambda folder: measure(folder, reference, tolerance),
        **target,
    )
    if reference is not None:
        _say(f"wrote {given.output}, which gives the numbers of {reference.name}")
    else:
        _say(f"wrote {given.output}; compare it: python -m conversion.verify {given.output} --reference FILE.npz")


def _hint(model: str, entries: list[Any], has_config: bool) -> str:
    same, related = which_released(entries)
    if same and model not in same:
        return f"\nthese are the names and sizes of {' or '.join(same)}: --model {same[0]}"
    if related and model not in related:
        return f"\nthese are the names of {' or '.join(related)}: --model {related[0]}"
    if related and not has_config:
        return "\nthe sizes are not the released ones: give them with --deepmind-config FILE.json"
    return ""


def _notes(given: argparse.Namespace, model: Any) -> tuple[str, ...]:
    notes = []
    if given.deepmind_config is not None:
        notes.append(f"Sizes and options are those of {given.deepmind_config.name}, not the released ones.")
    if given.dtype != "float32":
        notes.append(f"Weights were rounded from float32 to {given.dtype}.")
    if given.model in HEADS and isinstance(model, PerceiverIOModel):
        notes.append("The output side is not that of the task's head; AutoModel loads the whole model.")
    return tuple(notes)


def _say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_haiku",
        description="Convert one of DeepMind's checkpoints to a Hub folder with safetensors. Nothing in the file is run.",
        epilog="Exit status: 0 the folder is complete, 1 it does not give the reference's numbers, 2 it cannot be made; "
        "with 1 and 2 it is not there.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", type=Path, help="the pickle (.pystate, .pickle)")
    parser.add_argument(
        "--model",
        required=True,
        choices=list(WIRINGS),
        help="which of DeepMind's models it is; dense: the plain decoder over any image preprocessor",
    )
    parser.add_argument(
        "--deepmind-config",
        metavar="FILE.json",
        type=Path,
        help='keyword arguments of the original constructors, bare or under "config" (default: the released sizes)',
    )
    parser.add_argument(
        "--image-size",
        metavar=("H", "W"),
        type=int,
        nargs=2,
        help="the grid of trained image positions, so that they can be interpolated (default: not recorded, or the "
        "released 224 224)",
    )
    parser.add_argument(
        "--output", metavar="DIR", type=Path, required=True, help="folder to be written; new or empty, else refused"
    )
    parser.add_argument(
        "--reference",
        metavar="FILE.npz",
        type=Path,
        help="results of the original for this checkpoint, as conversion.verify takes them: the folder appears only if it "
        "gives these numbers, and its card says them",
    )
    parser.add_argument(
        "--tolerance", type=float, help=f"of that comparison, relative L2 of every stage (default: {TOLERANCE:g})"
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default="float32",
        help="of the weights written (default: %(default)s, which is the checkpoint's)",
    )
    parser.add_argument(
        "--max-shard-size", default="2GB", help="of each safetensors file, for instance 500MB (default: %(default)s)"
    )
    parser.add_argument(
        "--push-to-hub", metavar="REPO", help="upload the folder to this Hub repository (user/name) too"
    )
    parser.add_argument("--private", action="store_true", help="make the Hub repository private")
    return parser


def command_line(given: argparse.Namespace) -> str:
    """The command as the card shows it: file names without their folders."""
    words = ["python -m conversion.convert_haiku", given.checkpoint.name, "--model", given.model]
    if given.deepmind_config is not None:
        words += ["--deepmind-config", given.deepmind_config.name]
    if given.image_size is not None:
        words += ["--image-size", *map(str, given.image_size)]
    words += ["--output", given.output.resolve().name]
    if given.dtype != "float32":
        words += ["--dtype", given.dtype]
    if given.reference is not None:
        words += ["--reference", given.reference.name]
    if given.tolerance is not None:
        words += ["--tolerance", f"{given.tolerance:g}"]
    return " ".join(words)


def main(arguments: list[str] | None = None) -> int:
    given = make_parser().parse_args(arguments)
    try:
        convert(given, command_line(given))
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 2
    except NotVerifiedError as error:
        refused = f"error: {given.output} was not written: it does not give the numbers of {given.reference.name}"
        print(f"{error}\n{refused}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
