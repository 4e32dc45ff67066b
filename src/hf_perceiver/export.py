"""A checkpoint as a file that runs without this package, ONNX or torch.export:

    python -m hf_perceiver.export DIR --format onnx --output FILE

DIR is a checkpoint's folder or a Hub name. Sizes that the model allows to vary may vary in the file too; what may and
what is fixed is printed. The file is run beside the model at two sizes before it gets its name: an answer that is off by
more than 1e-4 of the largest value is no answer, and there is no file then.

Exit code 1: the file's answers differ from the model's; 2: something is wrong with what was asked for.
"""

import argparse
import importlib.util
import logging
import math
import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from torch.export import Dim, ExportedProgram
from torch.utils._pytree import tree_unflatten

from .configuration_perceiver_io import PerceiverIOConfig
from .export_inputs import Axis, Input, axes_of, choose_axes, inputs_of, nest
from .heads_multimodal import (
    PerceiverIOForAudioClassification,
    PerceiverIOForAudioVisualClassification,
    PerceiverIOForMultimodalAutoencoding,
    PerceiverIOForVideoClassification,
)
from .heads_text import (
    PerceiverIOForMaskedLM,
    PerceiverIOForMultipleChoice,
    PerceiverIOForMultitaskSequenceClassification,
    PerceiverIOForQuestionAnswering,
    PerceiverIOForSequenceClassification,
    PerceiverIOForTokenClassification,
)
from .heads_vision import PerceiverIOForImageClassification, PerceiverIOForOpticalFlow
from .modeling_perceiver_io import PerceiverIOModel, PerceiverIOPreTrainedModel
from .traced_attention import traced_forms

FORMATS = ("onnx", "torch")
# Relative to the largest value of an output; two right answers differ by about 1e-5 in float32.
ERROR_BOUND = 1e-4
ONNX_PACKAGES = ("onnx", "onnxscript", "onnxruntime")
OUTPUTS = ("logits", "start_logits", "end_logits")
FEATURES = ("logits", "last_hidden_state", "pooler_output")
# A file of ONNX cannot be larger than 2 GiB; weights of more lie beside it.
LARGEST_ONNX = 2**31 - 2**27

CLASSES: dict[str, type[PerceiverIOPreTrainedModel]] = {
    cls.__name__: cls
    for cls in (
        PerceiverIOModel,
        PerceiverIOForMaskedLM,
        PerceiverIOForSequenceClassification,
        PerceiverIOForTokenClassification,
        PerceiverIOForQuestionAnswering,
        PerceiverIOForMultipleChoice,
        PerceiverIOForMultitaskSequenceClassification,
        PerceiverIOForImageClassification,
        PerceiverIOForOpticalFlow,
        PerceiverIOForMultimodalAutoencoding,
        PerceiverIOForAudioClassification,
        PerceiverIOForVideoClassification,
        PerceiverIOForAudioVisualClassification,
    )
}

Say = Callable[[str], None]
Run = Callable[[Sequence[Tensor]], Mapping[str, Tensor]]

TRACING_ERRORS = (TorchDynamoException, torch.fx.experimental.symbolic_shapes.ConstraintViolationError)


class Mismatch(RuntimeError):
    """The exported file answers otherwise than the model."""


@dataclass
class Exported:
    """What was written: `file`, and `data` beside it where the weights are there; inputs with their axes, output names.

    errors: by what was run, the largest difference from the model as a part of the largest value.
    """

    file: Path
    data: Path | None
    inputs: list[Input]
    outputs: list[str]
    errors: dict[str, float] = field(default_factory=dict)


class NamedOutputs(nn.Module):
    """A model as it is exported: tensors in, a dict of tensors out, "logits.image" for the entry of a dict."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.outputs = FEATURES if type(model) is PerceiverIOModel else OUTPUTS

    def forward(
        self,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        input_values: Tensor | None = None,
        inputs: Any = None,
        attention_mask: Any = None,
    ) -> dict[str, Tensor]:
        given = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "input_values": input_values,
            "inputs": inputs,
            "attention_mask": attention_mask,
        }
        outputs = self.model(**{name: value for name, value in given.items() if value is not None}, return_dict=True)
        return flatten({name: outputs[name] for name in self.outputs if outputs.get(name) is not None})


def flatten(outputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """{"logits": {"image": x}} -> {"logits.image": x}"""
    flat = {}
    for name, value in outputs.items():
        if isinstance(value, Mapping):
            flat.update({f"{name}.{key}": entry for key, entry in value.items()})
        else:
            flat[name] = value
    return flat


def export_model(
    model: Any,
    file: str | Path,
    *,
    format: str = "onnx",
    dynamic: Sequence[str] | None = None,
    sizes: Mapping[str, int] | None = None,
    masks: bool | None = None,
    say: Say = lambda text: None,
) -> Exported:
    """Write a model or head to `file`, after its answers were compared with the model's.

    format: "onnx", or "torch" for a program of torch.export. dynamic: names of the axes whose size may vary, None for
    all that may; sizes: by name, what a fixed axis is, and what a dynamic one is traced at. masks: see `inputs_of`.
    say: is told what is done. Raises ValueError for what cannot be exported, before anything is traced, and Mismatch,
    leaving no file, where the answers differ by more than 1e-4 of the largest value.
    """
    file = check_file(file)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(FORMATS)}")
    if format == "onnx":
        require_onnx()
    check_model(model)
    inputs = choose_axes(inputs_of(model, masks), dynamic, sizes)
    for line in describe(inputs):
        say(line)
    draft = file.with_name(f".{file.name}.{os.getpid()}.tmp")
    with evaluating(model):
        say("tracing")
        named = NamedOutputs(model)
        # torch cannot save a traced loop over rows of sizes that vary, so its own format has the direct form.
        program = trace(named, inputs, cheaper=format == "onnx")
        structure = program.call_spec.out_spec
        outputs: list[str] = list(tree_unflatten(range(structure.num_leaves), structure))
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        try:
            say(f"writing {format}")
            WRITERS[format](program, draft / file.name, inputs, outputs, metadata(model))
            del program
            run, errors = RUNNERS[format](draft / file.name, inputs, outputs), {}
            for what, chosen in sizes_to_check(inputs):
                say(f"running the file and the model: {what}")
                values = [given.draw(chosen) for given in inputs]
                errors[what] = largest_error(run(values), answers(named, inputs, values))
                if not errors[what] <= ERROR_BOUND:
                    raise Mismatch(
                        f"the file's answers are off by {errors[what]:.1e} of the largest value at {what}, more than "
                        f"{ERROR_BOUND:.0e}; it was not kept"
                    )
            return Exported(file, publish(draft, file), inputs, outputs, errors)
        finally:
            shutil.rmtree(draft, ignore_errors=True)


def check_file(file: str | Path) -> Path:
    """The path; ValueError where nothing can be written there."""
    path = Path(file)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"{path} is a folder or lies in none; name a file in a folder that exists")
    return path


def require_onnx() -> None:
    """Raise ValueError unless the packages that write and run ONNX are there."""
    missing = [name for name in ONNX_PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"ONNX needs {', '.join(missing)}; pip install hf-perceiver[export]")


def check_model(model: Any) -> None:
    """Raise ValueError for a model that is none of this package, or not in float32 on the CPU."""
    if type(model).__name__ not in CLASSES:
        raise ValueError(f"{type(model).__name__} is none of {', '.join(CLASSES)}")
    for name, parameter in model.named_parameters():
        if parameter.dtype != torch.float32 or parameter.device.type != "cpu":
            raise ValueError(
                f"{name} is {parameter.dtype} on {parameter.device}; what is exported is float32 on the CPU: "
                "model.float().cpu()"
            )


def describe(inputs: Sequence[Input]) -> list[str]:
    """What is read, what may vary and what is fixed, a line each."""
    axes = axes_of(inputs).values()
    shapes = [
        f"{given.name} ({', '.join(str(a) if isinstance(a, int) else a.name for a in given.axes)})" for given in inputs
    ]
    fixed = [f"{axis}{f' ({axis.fixed})' if axis.fixed else ''}" for axis in axes if not axis.dynamic]
    return [
        f"inputs: {', '.join(shapes)}",
        f"dynamic: {'; '.join(str(axis) for axis in axes if axis.dynamic) or 'nothing'}",
        f"fixed: {'; '.join(fixed) or 'nothing'}",
    ]


@contextmanager
def evaluating(model: Any) -> Iterator[None]:
    """The model in evaluation mode, without gradients, with torch's own attention; then as it was."""
    training, attention = model.training, model.config._attn_implementation
    model.eval()
    model.set_attn_implementation("sdpa")
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


def example(inputs: Sequence[Input]) -> list[Tensor]:
    """Random values of the sizes that are traced; of dynamic axes at least two multiples, for torch fixes a size of 1, and
    different ones, for it takes equal sizes for one.
    """
    sizes: dict[str, int] = {}
    for name, axis in axes_of(inputs).items():
        size, step = axis.size, axis.multiple
        if axis.dynamic:
            start = max(size, 2 * step)
            upward = range(start, start + (len(sizes) + 1) * step, step)
            possible = [n for n in (*upward, *range(start, 1, -step)) if axis.most is None or n <= axis.most]
            size = next((n for n in possible if n not in sizes.values()), start)
        sizes[name] = size
    return [given.draw(sizes) for given in inputs]


def answers(named: NamedOutputs, inputs: Sequence[Input], values: Sequence[Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        return named(**nest(inputs, values))


def trace(named: NamedOutputs, inputs: Sequence[Input], cheaper: bool = True) -> ExportedProgram:
    """The program of torch.export, its dynamic axes named; cheaper: with the forms of traced_attention.py."""
    dims: dict[str, Any] = {}
    for axis in axes_of(inputs).values():
        if axis.dynamic and axis.divided:
            # Not multiple * Dim(...), of which torch cannot trace a loop; and what it cannot prove is checked at run time.
            dims[axis.name] = Dim.DYNAMIC(min=axis.least, max=axis.most)
        elif axis.dynamic:
            dims[axis.name] = Dim(axis.label, min=axis.least, max=axis.most)
    shapes = [
        {i: dims[axis.name] for i, axis in enumerate(given.axes) if isinstance(axis, Axis) and axis.name in dims}
        for given in inputs
    ]
    keywords = nest(inputs, example(inputs))
    inner = getattr(named.model, named.model.base_model_prefix, named.model)
    fixed_size = not set(dims) - {"batch"}
    forms = traced_forms(inner, example_of_one(inputs), fixed_size) if cheaper else nullcontext()
    with forms, quiet():
        try:
            return torch.export.export(named, (), keywords, dynamic_shapes=nest(inputs, shapes), strict=True)
        except TRACING_ERRORS as error:
            raise ValueError(f"torch.export cannot trace this model: {error}") from error


def example_of_one(inputs: Sequence[Input]) -> dict[str, Any]:
    """One random example of the usual sizes, as keyword arguments of the model."""
    sizes = {name: axis.size for name, axis in axes_of(inputs).items()} | {"batch": 1}
    return nest(inputs, [given.draw(sizes) for given in inputs])


def sizes_to_check(inputs: Sequence[Input]) -> list[tuple[str, dict[str, int]]]:
    """Sets of sizes, with a name: what the model is made for, one example; about half of it, three examples; the least."""
    axes = axes_of(inputs)
    whole = {name: axis.size for name, axis in axes.items()}
    half, least = dict(whole), dict(whole)
    for name, axis in axes.items():
        if axis.dynamic:
            half[name] = max(axis.least, (axis.size // 2 + 1) // axis.multiple * axis.multiple)
            least[name] = axis.least
    if axes["batch"].dynamic:
        whole["batch"], half["batch"] = 1, 3
    named = {", ".join(f"{name} {size}" for name, size in sizes.items()): sizes for sizes in (whole, half, least)}
    return list(named.items())


def write_onnx(
    program: ExportedProgram, file: Path, inputs: Sequence[Input], outputs: Sequence[str], about: dict[str, str]
) -> None:
    """An ONNX file; weights of more than 2 GiB beside it, in FILE.data."""
    names = {"input_names": [given.name for given in inputs], "output_names": list(outputs)}
    with quiet():
        try:
            onnx_program: Any = torch.onnx.export(program, dynamo=True, verbose=False, **names)  # type: ignore[arg-type]
        except torch.onnx.errors.OnnxExporterError as error:
            raise ValueError(f"torch.onnx cannot convert this model: {error}") from error
    name_axes(onnx_program.model.graph, inputs)
    # Each would carry the lines it was traced from, with this machine's paths: megabytes.
    for part in (onnx_program.model.graph, *onnx_program.model.functions.values()):
        for node in part.all_nodes():
            node.metadata_props.clear()
    onnx_program.model.metadata_props.update(about)
    weights = sum(value.const_value.nbytes for value in onnx_program.model.graph.initializers.values())
    onnx_program.save(file, external_data=weights > LARGEST_ONNX)


def name_axes(graph: Any, inputs: Sequence[Input]) -> None:
    """Call the sizes that vary by our names, where torch has its own, also in what is computed from them."""
    names = {
        str(size): axis.label
        for value, given in zip(graph.inputs, inputs, strict=True)
        for size, axis in zip(value.shape, given.axes, strict=True)
        if isinstance(axis, Axis) and axis.dynamic
    }
    for value in (*graph.inputs, *graph.outputs):
        sizes = [size if isinstance(size, int) else re.sub(r"\w+", _look_up(names), str(size)) for size in value.shape]
        value.shape = type(value.shape)(sizes)


def _look_up(names: Mapping[str, str]) -> Callable[[re.Match[str]], str]:
    return lambda found: names.get(found.group(), found.group())


def write_torch(
    program: ExportedProgram, file: Path, inputs: Sequence[Input], outputs: Sequence[str], about: dict[str, str]
) -> None:
    """A program for torch.export.load."""
    with file.open("wb") as stream:  # by name, torch asks for one that ends in .pt2
        torch.export.save(program, stream, extra_files=dict(about))


def run_onnx(file: Path, inputs: Sequence[Input], outputs: Sequence[str]) -> Run:
    from onnxruntime import InferenceSession

    session = InferenceSession(str(file), providers=["CPUExecutionProvider"])
    there = {given.name for given in session.get_inputs()}

    def run(values: Sequence[Tensor]) -> dict[str, Tensor]:
        feed = {given.name: value.numpy() for given, value in zip(inputs, values, strict=True) if given.name in there}
        found = session.run(list(outputs), feed)
        return {name: torch.from_numpy(array) for name, array in zip(outputs, found, strict=True)}

    return run


def run_torch(file: Path, inputs: Sequence[Input], outputs: Sequence[str]) -> Run:
    with file.open("rb") as stream:
        module = torch.export.load(stream).module()

    def run(values: Sequence[Tensor]) -> dict[str, Tensor]:
        with torch.no_grad():
            return module(**nest(inputs, values))

    return run


WRITERS = {"onnx": write_onnx, "torch": write_torch}
RUNNERS = {"onnx": run_onnx, "torch": run_torch}


def metadata(model: Any) -> dict[str, str]:
    """What is kept with the program: the config's JSON has the labels, and what the processor needs to know."""
    config = model.config.to_json_string(use_diff=False)
    return {"model_type": model.config.model_type, "class": type(model).__name__, "config": config}


def largest_error(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> float:
    """The largest difference as a part of the largest value of that output; infinite where shapes or infinities differ."""
    errors = []
    for name, wanted in want.items():
        if got[name].shape != wanted.shape or not torch.equal(got[name].isfinite(), wanted.isfinite()):
            return math.inf
        # Scores that a task does not have are -inf.
        finite = wanted.isfinite()
        largest = wanted[finite].abs().max()
        errors.append(float((got[name] - wanted)[finite].abs().max() / largest))
    return max(errors)


def publish(draft: Path, file: Path) -> Path | None:
    """Move the draft's files to their places, `file` last; the path of the weights where they are beside it."""
    beside = [path for path in draft.iterdir() if path.name != file.name]
    for path in beside:
        os.replace(path, file.with_name(path.name))
    os.replace(draft / file.name, file)
    return file.with_name(beside[0].name) if beside else None


@contextmanager
def quiet() -> Iterator[None]:
    """Without torch's remarks on packages that are not needed and on its own internals."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def load(source: str, head: str | None = None) -> Any:
    """The model of a folder or Hub name, as the class that its config names, or as `head`, in float32.

    Raises ValueError for what is no checkpoint of this package, and for weights that are missing.
    """
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; give the folder of a checkpoint, as save_pretrained writes it")
    found, _ = PerceiverIOConfig.get_config_dict(source)
    if found.get("model_type") != PerceiverIOConfig.model_type:
        raise ValueError(
            f"{source} is of model_type {found.get('model_type')!r}, not {PerceiverIOConfig.model_type!r}; give a "
            "checkpoint of hf_perceiver"
        )
    name = head or next(iter(found.get("architectures") or ()), None)
    if name not in CLASSES:
        raise ValueError(f"{name!r} is no class to export; name one with --head: {', '.join(CLASSES)}")
    model, info = CLASSES[name].from_pretrained(source, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{source} has no weights for {len(missing)} tensors of {name}, such as {missing[0]}; a head without "
            "training is not exported"
        )
    return model


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    """Checked arguments; exits with code 2 and one line that says what is wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m hf_perceiver.export",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", metavar="DIR", help="a checkpoint's folder or a Hub name")
    parser.add_argument("--format", choices=FORMATS, default="onnx")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE")
    parser.add_argument("--head", choices=list(CLASSES), metavar="CLASS", help="by default the checkpoint's own class")
    parser.add_argument(
        "--dynamic", nargs="*", metavar="AXIS", help="axes whose size may vary: all that may by default; none if empty"
    )
    parser.add_argument(
        "--sizes",
        nargs="+",
        default=[],
        metavar="AXIS=N",
        help="what a fixed axis is, and what a dynamic one is traced at",
    )
    parser.add_argument(
        "--masks",
        action=argparse.BooleanOptionalAction,
        help="whether masks are inputs; by default for texts, sounds and points",
    )
    arguments = parser.parse_args(argv)
    sizes = {}
    for given in arguments.sizes:
        name, _, size = given.partition("=")
        if not size.isdecimal() or int(size) < 1:
            parser.error(f"--sizes takes AXIS=N with a whole number from 1, not {given!r}")
        sizes[name] = int(size)
    arguments.sizes = sizes
    return arguments


def main(argv: Sequence[str] | None = None) -> int:
    arguments = parse(argv)

    def say(text: str) -> None:
        print(text, flush=True)

    try:
        # Before the weights are loaded.
        check_file(arguments.output)
        if arguments.format == "onnx":
            require_onnx()
        model = load(arguments.source, arguments.head)
        exported = export_model(
            model,
            arguments.output,
            format=arguments.format,
            dynamic=arguments.dynamic,
            sizes=arguments.sizes,
            masks=arguments.masks,
            say=say,
        )
    except Mismatch as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for what, off in exported.errors.items():
        say(f"largest relative error {off:.1e} at {what}")
    files = [path for path in (exported.file, exported.data) if path is not None]
    say(f"written: {', '.join(f'{path} ({path.stat().st_size / 2**20:.1f} MiB)' for path in files)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
