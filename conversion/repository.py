"""A converted model -> a complete Hub folder: config with labels, safetensors, code, processor, model card; pushed if asked.

check_output(output)  # before any work
write_repository(model, output, task="masked-lm", provenance=Provenance(...))
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from hf_perceiver import PerceiverIOFlowImageProcessor, PerceiverIOModel, PerceiverIOTokenizer, save_with_code
from hf_perceiver.feature_extraction_perceiver_io import PerceiverIOFeatureExtractor
from hf_perceiver.processing_perceiver_io import PerceiverIOProcessor
from hf_perceiver.tokenization_perceiver_io import VOCAB_SIZE
from hf_perceiver.video_processing_perceiver_io import PerceiverIOVideoProcessor

LABELS = Path(__file__).parent / "labels"
CHUNK = 1 << 22
DTYPES = ("float32", "bfloat16", "float16", "float64")
ORIGINS = ("deepmind", "transformers")


@dataclass(frozen=True)
class Task:
    """What a card says about one of the models, and the labels it was trained with where it has that many.

    pipeline: a task of this package, and a line of code that uses it.
    """

    title: str
    auto_class: str
    tag: str | None = None
    labels: str | None = None
    image: bool = False
    pipeline: tuple[str, str] | None = None


def _image_classifier(how: str) -> Task:
    title = f"image classifier as trained on ImageNet, {how}"
    return Task(title, "AutoModelForImageClassification", "image-classification", labels="imagenet1k", image=True)


TASKS = {
    "masked-lm": Task("masked language model on UTF-8 bytes", "AutoModelForMaskedLM", "fill-mask"),
    "imagenet-learned": _image_classifier("learned positions"),
    "imagenet-fourier": _image_classifier("Fourier positions"),
    "imagenet-conv": _image_classifier("convolutional stem"),
    "optical-flow": Task(
        "optical flow between two frames",
        "AutoModelForImageToImage",
        pipeline=("optical-flow", 'flow = pipe((frame, next_frame))["flow"]  # (H, W, 2) in pixels, x then y'),
    ),
    "multimodal": Task(
        "video, audio and label autoencoder",
        "AutoModelForPreTraining",
        labels="kinetics700",
        pipeline=("multimodal-autoencoding", 'result = pipe("clip.mp4", output_file="reconstruction.mp4")'),
    ),
    "dense": Task("dense prediction", "AutoModel"),
    # Not among DeepMind's released models; transformers has them.
    "sequence-classification": Task(
        "text classifier on UTF-8 bytes", "AutoModelForSequenceClassification", "text-classification"
    ),
    "features": Task("encoder; its output are the latents", "AutoModel", "feature-extraction"),
}


@dataclass(frozen=True)
class Provenance:
    """Where weights come from, for the model card.

    origin: "deepmind" (a Haiku pickle) or "transformers" (its built-in Perceiver). source: a file's name or a Hub id,
    no path. sha256: of the file. command: what was run. notes: sentences. parity: what was measured, None if nothing.
    """

    origin: str
    source: str
    sha256: str | None
    command: str
    notes: tuple[str, ...] = ()
    parity: str | None = None


class PushError(OSError):
    """The folder is complete, the Hub has not got it."""


def write_repository(
    model: Any,
    output: str | Path,
    *,
    task: str,
    provenance: Provenance,
    dtype: str = "float32",
    max_shard_size: str = "2GB",
    push_to_hub: str | None = None,
    private: bool = False,
    processors: Sequence[Any] | None = None,
    measure: Callable[[Path], str] | None = None,
) -> None:
    """Write a head, or a PerceiverIOModel, as a Hub repository that loads with this package and without it.

    The model itself is cast to `dtype` and given the task's labels, where it has none of its own. processors: to save
    instead of the task's own. measure: is given the folder, complete but for its card, and returns what that says about
    parity; where it raises, nothing is written. The folder is built under a hidden name beside `output`,
    `.NAME.PID.tmp`, and renamed when it is complete; only a kill leaves that behind.
    Raises ValueError for arguments that it cannot use, before anything is written, OSError for what the disk refuses,
    and PushError where only the push failed.
    """
    output = check_output(output)
    check_options(task=task, dtype=dtype, max_shard_size=max_shard_size, push_to_hub=push_to_hub, private=private)
    if provenance.origin not in ORIGINS:
        raise ValueError(f"origin={provenance.origin!r} must be one of {', '.join(ORIGINS)}")
    set_labels(model.config, task)
    if processors is None:
        processors = make_processors(model.config, task)
    output.parent.mkdir(parents=True, exist_ok=True)
    draft = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        with tqdm(total=3 if measure is None else 4, desc="casting", unit="step") as progress:
            model.to(getattr(torch, dtype))
            model.config.dtype = getattr(torch, dtype)
            _step(progress, "writing weights")
            save_with_code(model, draft, processors=processors, max_shard_size=max_shard_size)
            if measure is not None:
                _step(progress, "verifying")
                provenance = replace(provenance, parity=measure(draft))
            _step(progress, "writing the card")
            card = model_card(model, draft, task=task, provenance=provenance, repo_id=push_to_hub or output.name)
            (draft / "README.md").write_text(card, encoding="utf-8")
            # Works for a name that is free and for an empty folder; anything else that came up meanwhile is an error.
            os.replace(draft, output)
            _step(progress, "complete")
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if push_to_hub is not None:
        push(output, push_to_hub, private=private)


def check_output(output: str | Path) -> Path:
    """The absolute path of a folder that may be written: new, or empty.

    Raises ValueError for anything else; nothing is ever overwritten.
    """
    path = Path(output).resolve()
    if not path.name:
        raise ValueError(f"{output} cannot be an output folder; give a new one")
    if path.is_dir():
        if any(path.iterdir()):
            raise ValueError(f"{output} exists and is not empty; choose another folder or remove it first")
    elif path.exists():
        raise ValueError(f"{output} is a file; give a folder")
    return path


def check_options(
    *,
    task: str = "dense",
    dtype: str = "float32",
    max_shard_size: str = "2GB",
    push_to_hub: str | None = None,
    private: bool = False,
) -> None:
    """Raise ValueError, before long work, for options that write_repository cannot use."""
    if task not in TASKS:
        raise ValueError(f"task={task!r} must be one of {', '.join(TASKS)}")
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(DTYPES)}")
    size = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)?", max_shard_size, flags=re.IGNORECASE)
    if size is None or float(size[1]) == 0:
        raise ValueError(f"max_shard_size={max_shard_size!r} must be a size like 2GB or 500MB")
    if push_to_hub is None:
        if private:
            raise ValueError("private is about the repository to push to; give its name with --push-to-hub")
        return
    if not re.fullmatch(r"(?:[\w.-]+/)?[\w.-]+", push_to_hub, flags=re.ASCII):
        raise ValueError(f"push_to_hub={push_to_hub!r} must be a repository's name, like someone/a-perceiver")
    from huggingface_hub.utils import validate_repo_id

    validate_repo_id(push_to_hub)


def push(folder: Path, repo_id: str, *, private: bool) -> str:
    """Upload a complete folder and return the repository's full name. Raises PushError, which says how to go on."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        repo_id = api.create_repo(repo_id, private=private or None, exist_ok=True).repo_id
        if private and api.repo_info(repo_id).private is False:
            raise PushError("it exists and is public, which private=True was to prevent")
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Converted by hf-perceiver")
    except Exception as error:  # its clients raise errors of many libraries
        raise PushError(
            f"{folder} is complete, but pushing it to {repo_id} failed: {error}. When that is solved, "
            f"`hf upload {repo_id} {folder}` pushes it without converting again"
        ) from error
    return repo_id


def sha256_of(path: str | Path) -> str:
    """Hex digest of a file, read in parts; a bar on stderr for files that take a while."""
    path, digest = Path(path), hashlib.sha256()
    size = path.stat().st_size
    with (
        open(path, "rb") as file,
        tqdm(total=size, desc="sha256", unit="B", unit_scale=True, disable=size < 16 * CHUNK) as progress,
    ):
        while part := file.read(CHUNK):
            digest.update(part)
            progress.update(len(part))
    return digest.hexdigest()


# Labels and processors


def read_labels(name: str) -> list[str]:
    """The names of "imagenet1k" or "kinetics700", in the order of DeepMind's read-outs (its notebooks)."""
    return (LABELS / f"{name}.txt").read_text(encoding="utf-8").splitlines()


def set_labels(config: Any, task: str) -> None:
    """Give a config the names its model was trained with; one with names of its own, or another number, keeps them."""
    generic = all(label == f"LABEL_{i}" for i, label in config.id2label.items())
    if TASKS[task].labels is None or not generic:
        return
    names = read_labels(TASKS[task].labels)  # type: ignore[arg-type]
    if len(names) != config.num_labels:
        return
    config.id2label = dict(enumerate(names))
    # Two classes of ImageNet are called "crane", the bird and the machine; the name gives the first.
    config.label2id = {name: i for i, name in reversed(list(enumerate(names)))}


def make_processors(config: Any, task: str, deepmind: Mapping[str, Any] | None = None) -> list[Any]:
    """What turns files into the model's inputs: one processor, or none where the config does not say enough.

    deepmind: the original constructors' arguments, where they are known; their sizes go before those of the positions.
    """
    kind, deepmind = config.preprocessor["kind"], deepmind or {}
    if kind == "text":
        if config.vocab_size != VOCAB_SIZE:
            return []  # words or pieces of another tokenizer
        length = trained_positions(config)
        return [PerceiverIOTokenizer() if length is None else PerceiverIOTokenizer(model_max_length=length)]
    if TASKS[task].image:
        return _image_processors(config)
    if task == "optical-flow" and kind == "grid":
        return _flow_processors(config, deepmind)
    if task == "multimodal" and kind == "multimodal":
        return _clip_processors(config, deepmind)
    return []


def _image_processors(config: Any) -> list[Any]:
    from transformers import PerceiverImageProcessorPil

    height, width = input_size(config.preprocessor) or (224, 224)
    # DeepMind crops 224/256 of the shorter side before it resizes; the processor takes the quotient of the two sizes.
    crop = {"height": round(height * 256 / 224), "width": round(width * 256 / 224)}
    return [PerceiverImageProcessorPil(size={"height": height, "width": width}, crop_size=crop)]


def _flow_processors(config: Any, deepmind: Mapping[str, Any]) -> list[Any]:
    patch_size = {27: 3, 3: 1}.get(config.preprocessor["stem"].get("in_channels", 3))
    size = deepmind.get("train_size") or input_size(config.preprocessor)
    if patch_size is None or size is None:
        return []
    tile = {"height": int(size[0]), "width": int(size[1])}
    # The notebook's 20 pixels; of tiles that are not much larger, half.
    overlap = min(20, min(tile.values()) // 2)
    factor = (config.postprocessor or {}).get("scale_factor", 20.0)
    return [
        PerceiverIOFlowImageProcessor(
            tile_size=tile, min_overlap=overlap, patch_size=patch_size, flow_scale_factor=factor
        )
    ]


def _clip_processors(config: Any, deepmind: Mapping[str, Any]) -> list[Any]:
    modalities = config.preprocessor["modalities"]
    image, audio, label = (modalities.get(name) for name in ("image", "audio", "label"))
    if image is None or audio is None or set(modalities) - {"image", "audio", "label"}:
        return []
    size, num_frames = input_size(image), deepmind.get("num_frames") or _num_frames(image)
    per_frame = deepmind.get("audio_samples_per_frame")
    num_samples = num_frames * per_frame if per_frame and num_frames else _num_samples(audio)
    if size is None or num_frames is None or num_samples is None:
        return []
    # As the notebook's clips: 25 frames a second, exactly so where that makes a whole number of samples.
    rate = max(round(25 * num_samples / num_frames), 1)
    return [
        PerceiverIOProcessor(
            PerceiverIOVideoProcessor(
                size={"height": size[0], "width": size[1]},
                num_frames=num_frames,
                frames_per_second=rate * num_frames / num_samples,
            ),
            PerceiverIOFeatureExtractor(num_samples=num_samples, sampling_rate=rate),
            num_labels=None if label is None else label["channels"],
        )
    ]


def trained_positions(config: Any) -> int | None:
    """How many tokens a text model has positions for, None where they are computed."""
    return _innermost(config.preprocessor).get("num_positions")


def input_size(grid: Any) -> tuple[int, int] | None:
    """Height and width of the images that a preprocessor of kind "grid" was made for, None if it does not say."""
    points = _grid(grid)
    if points is None or len(points) < 2:
        return None
    stem = grid["stem"]
    stride = 4 ** stem.get("num_layers", 1) if stem["kind"] == "conv" else stem.get("spatial_downsample", 1)
    return points[-2] * stride, points[-1] * stride


def _num_frames(grid: Any) -> int | None:
    """Of the videos that it was made for; their frames may be merged into one image."""
    points = _grid(grid)
    merged = grid["stem"].get("temporal_downsample", 1)
    if points is not None and len(points) == 2:
        return merged
    return None if points is None or len(points) != 3 else points[0] * merged


def _num_samples(grid: Any) -> int | None:
    """Of the sound that it was made for; DeepMind's highest band is that of the samples, not of their patches."""
    position = _innermost(grid)
    if "num_positions" in position:
        return position["num_positions"] * grid["stem"]["samples_per_patch"]
    return (position.get("max_resolution") or [None])[0]


def _grid(grid: Any) -> list[int] | None:
    position = _innermost(grid)
    return position.get("grid") or position.get("max_resolution")


def _innermost(spec: Any) -> Mapping[str, Any]:
    """The position encoding of a preprocessor, without the projections around it."""
    position = spec.get("position") or {}
    while position.get("position"):
        position = position["position"]
    return position


# The model card

_LICENCE = {
    "deepmind": """The weights are DeepMind's, released with the
[Perceiver IO code](https://github.com/google-deepmind/deepmind-research/tree/master/perceiver) under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/): name the authors when you use them (below). They were changed in
format only, not trained further. If the file was not one of the six that DeepMind released, its own terms apply instead.""",
    "transformers": """Weights of the published checkpoints are DeepMind's. The Hub's cards of transformers' Perceiver
checkpoints say Apache-2.0; the authors' bucket, which they were converted from, says [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/)
(name the authors, below). Both are stated because neither was checked with the authors. A checkpoint that someone
trained further has the terms of its own card.""",
}

_CODE_LICENCE = "The Python files beside the weights are hf-perceiver's, under Apache-2.0."

_CITATION = """```bibtex
@article{jaegle2021perceiverio,
  title = {Perceiver IO: A General Architecture for Structured Inputs & Outputs},
  author = {Jaegle, Andrew and Borgeaud, Sebastian and Alayrac, Jean-Baptiste and others},
  journal = {arXiv preprint arXiv:2107.14795},
  year = {2021}
}
```"""


def model_card(model: Any, folder: Path, *, task: str, provenance: Provenance, repo_id: str) -> str:
    """The text of README.md for a folder that holds everything else."""
    config, about = model.config, TASKS[task]
    header = {"library_name": "transformers", "tags": ["perceiver", "hf-perceiver"]}
    if provenance.origin == "deepmind":
        header["license"] = "cc-by-4.0"
    else:
        # One word would choose between two statements.
        header |= {"license": "other", "license_name": "see-model-card"}
    if about.tag:
        header["pipeline_tag"] = about.tag
    tensors = model.state_dict()
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()})
    digest = f"sha256 `{provenance.sha256}`" if provenance.sha256 else "no single file, hence no sha256"
    origin = {"deepmind": "DeepMind's checkpoint", "transformers": "transformers' built-in Perceiver,"}[
        provenance.origin
    ]
    sizes = [
        f"{model.num_parameters():,} parameters, stored in {', '.join(dtypes)}",
        f"{config.num_latents} latents of {config.d_latents} channels",
        f"{config.num_blocks} block(s) of {config.num_self_attends_per_block} self-attends, "
        f"{config.num_self_attention_heads} heads",
    ]
    if about.image and (size := input_size(config.preprocessor)):
        sizes.append(f"images of {size[0]}x{size[1]} pixels")
    if config.preprocessor["kind"] == "text":
        sizes.append(f"{config.vocab_size} token ids, {trained_positions(config) or 'any number of'} positions")
    if about.labels or task == "sequence-classification":
        sizes.append(f"{config.num_labels} labels")
    parity = provenance.parity or "Not measured for this file."
    has_weights = ", ".join(f"`{p.name}`" for p in sorted(folder.glob("*.safetensors")))
    sections = [
        "---\n" + "\n".join(f"{k}: {json.dumps(v)}" for k, v in sorted(header.items())) + "\n---",
        f"# {repo_id.rsplit('/', 1)[-1]}\n\nPerceiver IO, {about.title}: {origin} `{provenance.source}`, as safetensors for "
        "hf-perceiver.",
        "\n".join(f"- {line}" for line in sizes),
        _usage(model, folder, about, repo_id),
        f"## Where it comes from\n\n- source: `{provenance.source}`, {digest}\n- command: `{provenance.command}`\n"
        f"- weights: {has_weights}" + "".join(f"\n- {note}" for note in provenance.notes),
        "## Parity\n\n"
        f"{parity}\n\n"
        "To measure it yourself, with reference outputs of the original for this checkpoint (arrays as in the project's\n"
        "`tests/reference`), run in a checkout of the project:\n\n"
        "```\npython -m conversion.verify DIR --reference FILE.npz\n```",
        f"## Licence\n\n{_LICENCE[provenance.origin]}\n\n{_CODE_LICENCE}\n\n{_CITATION}",
    ]
    return "\n\n".join(sections) + "\n"


# File of a processor -> how it is loaded, and its name in the code.
_PROCESSORS = {
    "tokenizer_config.json": ("AutoTokenizer", "tokenizer"),
    "processor_config.json": ("AutoProcessor", "processor"),
    "preprocessor_config.json": ("AutoImageProcessor", "processor"),
}


def _usage(model: Any, folder: Path, about: Task, repo_id: str) -> str:
    auto_class = "AutoModel" if isinstance(model, PerceiverIOModel) else about.auto_class
    imports, lines = [auto_class], [f'model = {auto_class}.from_pretrained("{repo_id}")']
    found = next((how for file, how in _PROCESSORS.items() if (folder / file).is_file()), None)
    more = ""
    if found is not None:
        imports.append(found[0])
        lines.append(f'{found[1]} = {found[0]}.from_pretrained("{repo_id}")')
    elif model.config.preprocessor["kind"] == "text":
        more = "\n\nNo tokenizer is included: the vocabulary is not that of UTF-8 bytes."
    else:
        more = "\n\nNo processor is included: the model takes tensors."
    if found is not None and about.pipeline is not None and auto_class == about.auto_class:
        task, line = about.pipeline
        imports.append("pipeline")
        lines += ["", f'pipe = pipeline("{task}", model="{repo_id}")', line]
        more = " The pipeline is not, it needs the package."
    code = "\n".join(
        [
            f"from transformers import {', '.join(sorted(imports))}",
            "import hf_perceiver  # registers the model",
            "",
            *lines,
        ]
    )
    return (
        f"## Use\n\n```python\n{code}\n```\n\nWithout the package, leave out its import and add "
        f"`trust_remote_code=True`: the code is included.{more}"
    )


def _step(progress: Any, description: str) -> None:
    progress.update()
    progress.set_description(description)
