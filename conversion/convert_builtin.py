"""A checkpoint of transformers' built-in Perceiver -> a Hub folder of this package.

    python -m conversion.convert_builtin SOURCE --output DIR

SOURCE is a folder or a Hub id, with safetensors or an old pytorch_model.bin, which is read with weights_only=True. Every
weight must have its place and every place its weight. Exit code 2: refused, with one line that says why.
"""

import argparse
import json
import pickle
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from tqdm import tqdm

import hf_perceiver
from hf_perceiver import PerceiverIOConfig
from hf_perceiver.checkpoint_names import NUMERICS, is_builtin_config

from .repository import Provenance, check_options, check_output, sha256_of, write_repository
from .unpickle import CheckpointError

# The task of each built-in class, as repository.TASKS names it.
TASKS = {
    "PerceiverForMaskedLM": "masked-lm",
    "PerceiverForSequenceClassification": "sequence-classification",
    "PerceiverForImageClassificationLearned": "imagenet-learned",
    "PerceiverForImageClassificationFourier": "imagenet-fourier",
    "PerceiverForImageClassificationConvProcessing": "imagenet-conv",
    "PerceiverForOpticalFlow": "optical-flow",
    "PerceiverForMultimodalAutoencoding": "multimodal",
    "PerceiverModel": "features",
}
UNSWAPPABLE = "PerceiverForImageClassificationConvProcessing"

# In the order in which transformers looks for them.
WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# What torch and safetensors raise for files that are damaged or hold more than tensors.
UNREADABLE = (SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError, KeyError, AttributeError, TypeError)

UNSWAP_NOTE = (
    "height and width of the stem's 7x7 kernel were exchanged (`--unswap-conv-kernel`): the script that made the "
    "published checkpoint seems to have swapped them. That is inferred from the script, not measured"
)


@dataclass(frozen=True)
class Source:
    """A checkpoint on this disk. name: a Hub id, or the folder's name; files: the weights, in one or several."""

    folder: Path
    name: str
    files: tuple[Path, ...]
    config: dict[str, Any]
    is_hub_id: bool

    def sha256(self) -> tuple[str | None, tuple[str, ...]]:
        """The digest of a single file of weights, or None and a sentence for each shard."""
        if len(self.files) == 1:
            return sha256_of(self.files[0]), ()
        return None, tuple(f"shard `{path.name}`: sha256 `{sha256_of(path)}`" for path in self.files)

    def notes(self) -> tuple[str, ...]:
        # A revision is the name of the folder in the Hub's cache.
        return (f"revision `{self.folder.name}`",) if self.is_hub_id else ()


MEASURED = (
    "With the built-in's numerics, latents and logits of all seven task classes are within 4e-15 of transformers' own on "
    "random weights in float64. For this file itself nothing was measured."
)


def find_source(source: str) -> Source:
    """The files of a folder, or of a Hub id, which are fetched if they are not in the cache.

    Raises ValueError if there is no such checkpoint, CheckpointError if its files are damaged.
    """
    path = Path(source)
    is_hub_id = not path.exists()
    if not is_hub_id and not path.is_dir():
        raise ValueError(f"{source} is a file; give the folder that holds config.json and the weights")
    if is_hub_id and (path.is_absolute() or source.startswith((".", "~")) or source.count("/") > 1):
        raise ValueError(f"there is no folder {source}, and it cannot be a Hub id, which looks like someone/model")
    config_file = find_file(source, path, is_hub_id, "config.json")
    if config_file is None:
        raise ValueError(f"{source} has no config.json" if not is_hub_id else _no_repository(source))
    config = _read_json(config_file)
    for name in WEIGHTS:
        found = find_file(source, path, is_hub_id, name)
        if found is None:
            continue
        if not name.endswith(".index.json"):
            return Source(config_file.parent, _name(path, source, is_hub_id), (found,), config, is_hub_id)
        weight_map = _read_json(found).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{found.name} has no weight_map")
        shards = []
        for shard in sorted({str(shard) for shard in weight_map.values()}):
            if Path(shard).name != shard or not shard.endswith((".safetensors", ".bin")):
                raise CheckpointError(f"{found.name} names {shard!r}, which is no file of weights beside it")
            file = find_file(source, path, is_hub_id, shard)
            if file is None:
                raise CheckpointError(f"{found.name} names {shard}, which is missing")
            shards.append(file)
        return Source(config_file.parent, _name(path, source, is_hub_id), tuple(shards), config, is_hub_id)
    raise ValueError(f"{source} holds no weights; one of {', '.join(WEIGHTS)} is needed")


def load_strictly(model_class: Any, source: Source, **kwargs: Any) -> Any:
    """from_pretrained in which every weight of the file has its place and every place its weight, in the file's dtype.

    Raises CheckpointError that lists what is left over, missing, or of another shape, and for unreadable files.
    """
    with tqdm(total=1, desc="loading", unit="model") as progress:
        try:
            model, info = model_class.from_pretrained(
                source.folder,
                dtype="auto",
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported below, by name
                local_files_only=True,
                use_safetensors=source.files[0].suffix == ".safetensors",
                **kwargs,
            )
        except UNREADABLE as error:
            raise CheckpointError(f"{source.name}: the weights cannot be read: {_first_line(error)}") from error
        progress.update()
    problems = []
    for kind, told in (
        ("missing_keys", "missing from the file"),
        ("unexpected_keys", "of the file have no place in the model"),
        ("mismatched_keys", "of another shape"),
    ):
        names = sorted(_key(key) for key in info[kind])
        if names:
            more = f" and {len(names) - 10} more" if len(names) > 10 else ""
            problems.append(f"{len(names)} {told}: {', '.join(names[:10])}{more}")
    if info.get("error_msgs"):
        problems.append(_first_line(info["error_msgs"]))
    if problems:
        raise CheckpointError(f"{source.name} and its config.json do not fit: {'; '.join(problems)}")
    return model.eval()


def convert_builtin(
    source: str,
    output: str | Path,
    *,
    numerics: str = "builtin",
    architecture: str | None = None,
    unswap_conv_kernel: bool = False,
    dtype: str | None = None,
    max_shard_size: str = "2GB",
    push_to_hub: str | None = None,
    private: bool = False,
    command: str = "conversion.convert_builtin.convert_builtin(...)",
) -> None:
    """What the command does; see there. dtype: by default that of the file.

    Raises ValueError (CheckpointError for contents) and OSError; `output` is then as it was, but for a PushError.
    """
    check_output(output)
    options = {"max_shard_size": max_shard_size, "push_to_hub": push_to_hub, "private": private}
    check_options(dtype=dtype or "float32", **options)  # type: ignore[arg-type]
    if unswap_conv_kernel and numerics != "deepmind":
        raise ValueError(
            "--unswap-conv-kernel is for --numerics deepmind; transformers' numbers need the kernel as it is"
        )
    found = find_source(source)
    if not is_builtin_config(found.config):
        raise ValueError(
            f"{source} is of model_type {found.config.get('model_type')!r}, not 'perceiver', transformers' own"
            + ("; this package loads it as it is" if found.config.get("model_type") == "perceiver_io" else "")
        )
    kwargs = {} if architecture is None else {"architecture": architecture}
    config = PerceiverIOConfig.from_pretrained(found.folder, numerics=numerics, **kwargs)
    named = [architecture] if architecture else found.config.get("architectures") or ["PerceiverModel"]
    builtin_class = next(name for name in named if name in TASKS)
    if unswap_conv_kernel and builtin_class != UNSWAPPABLE:
        raise ValueError(f"--unswap-conv-kernel is for {UNSWAPPABLE}; {source} is a {builtin_class}")
    model = load_strictly(getattr(hf_perceiver, config.architectures[0]), found, config=config)
    notes = (f"class there: `{builtin_class}`", f"numerics: `{numerics}`", *found.notes())
    if unswap_conv_kernel:
        unswap(model)
        notes += (UNSWAP_NOTE,)
    digest, shards = found.sha256()
    write_repository(
        model,
        output,
        task=TASKS[builtin_class],
        provenance=Provenance("transformers", found.name, digest, command, notes + shards, MEASURED),
        dtype=dtype or str(model.dtype).removeprefix("torch."),
        processors=_own_processors(found, TASKS[builtin_class]),
        **options,  # type: ignore[arg-type]
    )


def unswap(model: Any) -> None:
    """Exchange height and width of the conv stem's kernels, in place."""
    stem = getattr(model, "perceiver", model).preprocessor.stem
    with torch.no_grad():
        for conv in stem.convs:
            conv.weight.copy_(conv.weight.transpose(-1, -2).clone())


def run_command(work: Any) -> int:
    """Call a command's work; what the user can mend is one line on stderr and exit code 2."""
    try:
        work()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("error: interrupted", file=sys.stderr)
        return 2
    return 0


def described(module: str, argv: Sequence[str], source: str) -> str:
    """The command for a model card: folders' names alone, the output as DIR."""
    words, after_output = [], False
    for word in argv:
        if after_output:
            word = "DIR"
        elif word.startswith("--output="):
            word = "--output=DIR"
        elif word == source:
            word = Path(word).resolve().name if Path(word).exists() else word
        words.append(word)
        after_output = word == "--output"
    return f"python -m conversion.{module} {' '.join(words)}"


def main(argv: Sequence[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        prog="python -m conversion.convert_builtin",
        description="A checkpoint of transformers' built-in Perceiver becomes a Hub folder of hf-perceiver.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id; safetensors or an old .bin")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must be new or empty")
    parser.add_argument(
        "--numerics",
        choices=NUMERICS,
        default="builtin",
        help="whose numbers the model computes: transformers' (default) or DeepMind's original",
    )
    parser.add_argument("--architecture", choices=sorted(TASKS), help="where config.json does not name the class")
    parser.add_argument(
        "--unswap-conv-kernel",
        action="store_true",
        help="with --numerics deepmind, for the conv model: exchange height and width of its 7x7 kernel, which the "
        "published checkpoint probably holds swapped (inferred from the script that made it, not measured)",
    )
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: that of the file")
    parser.add_argument("--max-shard-size", default="2GB", metavar="SIZE", help="of a file of weights (default 2GB)")
    parser.add_argument("--push-to-hub", metavar="REPO", help="also push there, as the user who is logged in")
    parser.add_argument("--private", action="store_true", help="make that repository a private one")
    options = vars(parser.parse_args(argv))
    source, output = options.pop("source"), options.pop("output")
    command = described("convert_builtin", argv, source)
    return run_command(lambda: convert_builtin(source, output, command=command, **options))


def _own_processors(source: Source, task: str) -> list[Any] | None:
    """An image processor that a fine-tuned checkpoint brought along; None for the task's own."""
    if not task.startswith("imagenet") or find_file(source.name, source.folder, source.is_hub_id, PROCESSOR) is None:
        return None
    from transformers import PerceiverImageProcessorPil

    return [PerceiverImageProcessorPil.from_pretrained(source.folder)]


PROCESSOR = "preprocessor_config.json"


def find_file(source: str, folder: Path, is_hub_id: bool, name: str) -> Path | None:
    """One file of a folder or a Hub repository, None if there is none of that name."""
    if not is_hub_id:
        return folder / name if (folder / name).is_file() else None
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    try:
        return Path(hf_hub_download(source, name))
    except HFValidationError as error:
        raise ValueError(f"there is no folder {source}, and it is no Hub id: {error}") from error
    except RepositoryNotFoundError as error:
        raise ValueError(_no_repository(source)) from error
    except LocalEntryNotFoundError as error:
        # Offline, the cache alone answers, and what it lacks may be missing there as well.
        if name == "config.json":
            raise ValueError(
                f"there is no folder {source}, and the Hub was not reached: {_first_line(error)}"
            ) from error
        return None
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", None) == 404:
            return None
        raise


def _no_repository(source: str) -> str:
    return f"there is no folder {source}, and no model of that name that you may read on the Hub"


def _name(path: Path, source: str, is_hub_id: bool) -> str:
    return source if is_hub_id else path.resolve().name


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path.name} must hold a mapping, not a {type(value).__name__}")
    return value


def _key(key: Any) -> str:
    """Names stand alone, or with their two shapes."""
    if isinstance(key, str):
        return key
    name, *shapes = key
    return f"{name} ({', there '.join(str(tuple(shape)) for shape in shapes)})"


def _first_line(error: object) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


if __name__ == "__main__":
    sys.exit(main())
