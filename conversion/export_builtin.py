"""A checkpoint of this package -> a folder that transformers' own Perceiver classes load, with the same numbers.

    python -m conversion.export_builtin SOURCE --output DIR

SOURCE is a folder or a Hub id. What transformers' classes cannot express is refused, with the list of it. Exit code 2:
refused, with one line that says why.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

import hf_perceiver
from hf_perceiver import PerceiverIOConfig, PerceiverIOForImageClassification
from hf_perceiver.builtin import export_builtin
from hf_perceiver.modeling_perceiver_io import PerceiverIOPreTrainedModel
from hf_perceiver.tokenization_perceiver_io import VOCAB_SIZE

from .convert_builtin import PROCESSOR, find_file, find_source, load_strictly, run_command
from .repository import check_output, trained_positions


def export(source: str, output: str | Path) -> None:
    """What the command does. Raises ValueError (CheckpointError for contents) and OSError; `output` is then as it was.

    Beside config and weights it writes transformers' tokenizer, for a model of bytes, and an image classifier's processor.
    """
    target = check_output(output)
    found = find_source(source)
    if found.config.get("model_type") != PerceiverIOConfig.model_type:
        raise ValueError(
            f"{source} is of model_type {found.config.get('model_type')!r}, not {PerceiverIOConfig.model_type!r}"
            + ("; it is transformers' own already" if found.config.get("model_type") == "perceiver" else "")
        )
    model = load_strictly(_model_class(found.config.get("architectures")), found)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with tqdm(total=1, desc="writing", unit="model") as progress:
            export_builtin(model, draft)
            processor = find_file(found.name, found.folder, found.is_hub_id, PROCESSOR)
            # transformers has an image processor for these alone; that of optical flow is this package's.
            if processor is not None and isinstance(model, PerceiverIOForImageClassification):
                shutil.copyfile(processor, draft / PROCESSOR)
            if model.config.preprocessor["kind"] == "text" and model.config.vocab_size == VOCAB_SIZE:
                from transformers import PerceiverTokenizer

                PerceiverTokenizer(model_max_length=trained_positions(model.config)).save_pretrained(draft)
            os.replace(draft, target)
            progress.update()
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _model_class(architectures: object) -> type[PerceiverIOPreTrainedModel]:
    named = architectures if isinstance(architectures, list) else []
    for name in named:
        found = getattr(hf_perceiver, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, PerceiverIOPreTrainedModel):
            return found
    raise ValueError(f"architectures={architectures} in config.json names no class of this package")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.export_builtin",
        description="A checkpoint of hf-perceiver becomes one that transformers' own Perceiver classes load.",
        allow_abbrev=False,
    )
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write; must be new or empty")
    options = parser.parse_args(argv)
    return run_command(lambda: export(options.source, options.output))


if __name__ == "__main__":
    sys.exit(main())
