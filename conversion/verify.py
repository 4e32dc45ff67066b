"""Does a converted folder give DeepMind's numbers? Its model beside stored arrays of the original, stage by stage.

    python -m conversion.verify DIR --reference FILE.npz [--tolerance 1e-5]

FILE.npz holds the original's inputs (`images`; `inputs` and `input_mask`; or `images`, `audio`, `label` and their
`subsample_*`), channels last, and its float32 results: `encoder_inputs`, `decoder_query`, `outputs` or `outputs_*`, and
as many stages between as there are (`z_after_cross`, `z`, `decoder_cross_out`, ...).

Two passes, because float32 positions cannot be bit-equal:
1. from the raw inputs: what the encoder reads and what the decoder is asked. Fourier positions are held to
   tolerance * max|reference| + 4 * 2^-23 * pi * max_resolution / 2 (max abs; times the largest gain of a linear that
   projects them): a coordinate is rounded by some 2^-23, the highest band multiplies that by pi * max_resolution / 2.
   All other columns are held to the tolerance (relative L2).
2. from the stored `encoder_inputs` and `decoder_query`: everything after them, at the tolerance (relative L2).
The whole way from raw inputs to the outputs is reported, and judged by the two passes only. Its outputs are what users
get, by the faster forms of attention where they apply; the stages before them are the direct form's.

Exit status: 0 everything holds, 1 a stage is above its bound, 2 it could not run.
"""

import argparse
import contextlib
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hf_perceiver import AUTO_CLASSES
from hf_perceiver.arrays import ArrayPart, InputArray, PerceiverArray, QueryArray
from hf_perceiver.output_queries import InputQuery
from hf_perceiver.position_encoding import FourierPositionEncoding, ProjectedPositionEncoding, TableCode

TOLERANCE = 1e-5
# Of a coordinate in [-1, 1]: two roundings in JAX, two here.
COORDINATE_ROUNDING = 4 * 2.0**-23
STAGES = {
    "latents_init": "latents at the start",
    "z_after_cross": "after the read",
    "z": "latents",
    "decoder_cross_out": "decoded",
    "decoder_out": "shared read-out",
    "outputs": "logits",
}
INPUT_ARRAYS = ("inputs", "input_mask", "images", "audio", "label", "pos", "subsample_image", "subsample_audio")


class VerificationError(ValueError):
    """The comparison cannot be made: folder and reference do not belong together, or one is not complete."""


class Row(NamedTuple):
    """One stage: what was found, and the bound of `measure` ("relative L2", "max abs"); None is not judged."""

    stage: str
    max_abs: float
    relative: float
    bound: float | None
    measure: str = "relative L2"

    @property
    def holds(self) -> bool:
        found = self.max_abs if self.measure == "max abs" else self.relative
        return self.bound is None or found <= self.bound  # a NaN does not hold


class Report(NamedTuple):
    """Rows of the two passes and of the whole way; `notes` say how they were compared."""

    positions: list[Row]
    core: list[Row]
    whole: list[Row]
    notes: list[str]

    @property
    def holds(self) -> bool:
        return all(row.holds for row in (*self.positions, *self.core))


# --- the comparison


def verify(folder: Path, reference: Path, tolerance: float = TOLERANCE) -> Report:
    """Raises VerificationError, OSError or the model's ValueError where it cannot run."""
    if not 0 < tolerance < 1:
        raise VerificationError(f"tolerance={tolerance} must lie between 0 and 1, for instance {TOLERANCE}")
    stored = load_reference(reference)
    model = load_model(folder)
    base = base_of(model)
    wiring = wiring_of(base.config)
    inputs = at_the_boundary(wiring, stored)
    if "pos" in stored:
        inputs["input_coordinates"] = stored["pos"]
    query = stored.get("decoder_query")
    if query is None and base.output_query is not None:
        raise VerificationError(
            f"{reference.name} has no decoder_query, which the second pass starts from; it has {_listed(stored)}"
        )

    parts: dict[str, PerceiverArray] = {}
    whole = run(model, parts=parts, **inputs)
    # A layer that is watched never takes its faster form; users' do.
    with torch.no_grad():
        whole |= answers(model(**inputs))
    core = run(model, encoder_inputs=stored["encoder_inputs"], decoder_query=query, **inputs)
    notes = []
    if wiring == "optical-flow":
        # Stored as the notebook shows it, in pixels, or as the model gives it: whichever is nearer.
        pixels = base.postprocessor.scale_factor
        scale = min((pixels, 1), key=lambda s: float((core["outputs"] * s - _like(core, stored, "outputs")).norm()))
        notes.append(f"logits are compared times {scale:g}" + (": the reference is in pixels" if scale != 1 else ""))
        whole["outputs"], core["outputs"] = whole["outputs"] * scale, core["outputs"] * scale
    later = [name for name in stored if name in STAGES or name.startswith(("outputs", "z_after_self_"))]
    if not any(name.startswith("outputs") for name in later):
        raise VerificationError(f"{reference.name} has no outputs; it has {_listed(stored)}")

    positions = []
    for what, stage in (("encoder_inputs", "encoder input"), ("decoder_query", "query")):
        if what in stored and what in parts:
            side = base.preprocessor if what == "encoder_inputs" else base.output_query
            positions += _by_part(stage, side, base.preprocessor, parts[what], stored[what], tolerance)
    for name in ("convnet_out", "image_without_pos"):
        if name in stored and name in whole:
            positions.insert(0, _row(f"stem ({name})", whole[name], _like(whole, stored, name), tolerance))
    return Report(
        positions,
        [_row(_stage(name), core[name], _like(core, stored, name), tolerance) for name in _in_order(later)],
        [_row(_stage(name), whole[name], _like(whole, stored, name), None) for name in _in_order(later)],
        notes,
    )


def load_reference(path: Path) -> dict[str, Tensor]:
    """The arrays of an .npz; VerificationError where those that no comparison can do without are missing."""
    try:
        with np.load(path) as arrays:
            stored = {name: torch.from_numpy(np.asarray(arrays[name])) for name in arrays.files}
    except (ValueError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
        raise VerificationError(f"{path.name} is not an .npz of number arrays: {error}") from None
    if "encoder_inputs" not in stored:
        raise VerificationError(f"{path.name} has no encoder_inputs; it has {_listed(stored)}")
    return stored


def load_model(folder: Path) -> Any:
    """The folder's model in float32, through the Auto class of the head that its config names."""
    if not (folder / "config.json").is_file():
        raise VerificationError(f"{folder} holds no config.json; give a folder that conversion.convert_haiku wrote")
    config = json.loads((folder / "config.json").read_text())
    if config.get("model_type") != "perceiver_io":
        raise VerificationError(
            f"config.json says model_type={config.get('model_type')!r}, not 'perceiver_io'; "
            "a checkpoint of transformers' Perceiver goes through conversion.convert_builtin first"
        )
    classes = {model_class.__name__: auto_class for auto_class, model_class in AUTO_CLASSES.items()}
    wanted = (config.get("architectures") or ["PerceiverIOModel"])[0]
    if wanted not in classes:
        raise VerificationError(f"config.json names architecture {wanted!r}; known: {', '.join(classes)}")
    auto_class: Any = classes[wanted]
    model, info = auto_class.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    wrong = {kind: sorted(map(str, names)) for kind, names in info.items() if names and kind.endswith("_keys")}
    if wrong:
        raise VerificationError(f"weights and config of {folder.name} do not fit together: {wrong}")
    return model.eval()


def wiring_of(config: Any) -> str:
    """How DeepMind's inputs reach a model of this config: a name as convert_haiku's --model has them."""
    if config.preprocessor["kind"] == "text":
        return "masked-lm"
    if config.preprocessor["kind"] == "multimodal":
        return "multimodal"
    if (config.postprocessor or {}).get("kind") == "flow":
        return "optical-flow"
    return "images"


def _by_part(
    stage: str, side: Any, preprocessor: Any, array: PerceiverArray, stored: Tensor, tolerance: float
) -> list[Row]:
    """Rows of each modality: what is made of Fourier positions, and everything else."""
    if array.length != stored.shape[1]:
        raise VerificationError(f"{stage}: ours has {array.length} elements, the reference {stored.shape[1]}")
    rows, start = [], 0
    for name, part in array:
        stop = start + part.length
        theirs = stored[:, start:stop]
        start = stop
        ours = part.dense().expand(len(theirs), -1, -1)
        if ours.shape != theirs.shape:
            raise VerificationError(f"{stage}: ours is {tuple(ours.shape)}, the reference {tuple(theirs.shape)}")
        label = f"{stage}, {name}" if name else stage
        position = _position_of(side, name)
        if isinstance(side, InputQuery):
            position = _position_of(preprocessor, name)  # the input itself asks
        amplified = _amplification(position, part)
        is_token = part.replaced is not None and bool(part.replaced.all())
        if not amplified or is_token:
            rows.append(_row(label, ours, theirs, tolerance))
            continue
        first = 0 if part.features is None else part.features.shape[-1]
        assert part.position is not None
        columns = torch.zeros(ours.shape[-1], dtype=torch.bool)
        columns[(0 if part.combine == "add" else first) :][: part.position.channels] = True
        bound = tolerance * float(theirs[..., columns].abs().max()) + COORDINATE_ROUNDING * amplified
        if not columns.all():
            rows.append(_row(f"{label}: the rest", ours[..., ~columns], theirs[..., ~columns], tolerance))
        rows.append(_row(f"{label}: positions", ours[..., columns], theirs[..., columns], bound, "max abs"))
    return rows


def _position_of(side: Any, name: str) -> Any:
    """The position encoding of a preprocessor or an output query, by modality where there are several."""
    if name and hasattr(side, "modalities"):
        side = side.modalities[name]
    return getattr(side, "position", None)


def _amplification(position: Any, part: ArrayPart) -> float:
    """What a rounded coordinate is multiplied by at most; 0 where none is rounded (trained positions)."""
    if isinstance(position, FourierPositionEncoding) and part.position is not None:
        return math.pi / 2 * max(position.max_resolution or part.grid or (part.length,))
    if isinstance(position, ProjectedPositionEncoding):
        linears = [linear for linear in (position.project, *position.extra) if linear is not None]
        gains = [float(linear.weight.detach().abs().sum(dim=1).max()) for linear in linears]
        return _amplification(position.position, part) * math.prod(max(gain, 1) for gain in gains)
    return 0.0


def relative(ours: Tensor, theirs: Tensor) -> float:
    """|ours - theirs| / |theirs|, L2 norms in float64; shapes must be equal."""
    if ours.shape != theirs.shape:
        raise VerificationError(f"ours is {tuple(ours.shape)}, the reference {tuple(theirs.shape)}")
    ours, theirs = ours.detach().double(), theirs.double()
    return float((ours - theirs).norm() / theirs.norm())


def _row(stage: str, ours: Tensor, theirs: Tensor, bound: float | None, measure: str = "relative L2") -> Row:
    if ours.shape != theirs.shape:
        raise VerificationError(f"{stage}: ours is {tuple(ours.shape)}, the reference {tuple(theirs.shape)}")
    ours, theirs = ours.detach(), theirs.detach()
    difference = (ours.double() - theirs.double()).abs()
    max_abs = float(difference.max()) if difference.numel() else 0.0
    # Nothing to divide by: zeros that are met are met.
    found = 0.0 if max_abs == 0 else relative(ours, theirs)
    return Row(stage, max_abs, found, bound, measure)


def _like(got: Mapping[str, Tensor], stored: Mapping[str, Tensor], name: str) -> Tensor:
    """The stored array in our shape: the original leaves some output grids flat."""
    if name not in got:
        raise VerificationError(f"the reference has {name}, which this model does not have; it has {_listed(got)}")
    ours, theirs = got[name], stored[name]
    if ours.shape[0] != theirs.shape[0] or ours.shape[-1] != theirs.shape[-1] or ours.numel() != theirs.numel():
        raise VerificationError(f"{name}: ours is {tuple(ours.shape)}, the reference {tuple(theirs.shape)}")
    return theirs.reshape(ours.shape)


def _stage(name: str) -> str:
    if name.startswith("outputs_"):
        return f"logits, {name.removeprefix('outputs_')}"
    if name.startswith("z_after_self_"):
        return f"after self-attend {int(name.removeprefix('z_after_self_')) + 1}"
    return STAGES[name]


def _in_order(names: list[str]) -> list[str]:
    order = ["latents_init", "z_after_cross", "z_after_self", "z", "decoder_cross_out", "decoder_out", "outputs"]

    def key(name: str) -> tuple[int, str]:
        kind = next(kind for kind in ("z_after_self", "outputs", name) if name.startswith(kind))
        return order.index(kind), name

    return sorted(names, key=key)


def _listed(names: Mapping[str, Any]) -> str:
    return ", ".join(sorted(names)) or "nothing"


# --- DeepMind's inputs at our boundary


def at_the_boundary(wiring: str, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    """DeepMind's input arrays, channels last -> keyword arguments of our model, channels first."""
    needed = {"masked-lm": ("inputs", "input_mask"), "multimodal": ()}.get(wiring, ("images",))
    missing = [name for name in needed if name not in arrays]
    if missing or not any(name in arrays for name in INPUT_ARRAYS):
        raise VerificationError(
            f"the reference has no {', '.join(missing or ['inputs'])}, which a {wiring} model reads; "
            f"it has {_listed(arrays)}"
        )
    if wiring == "masked-lm":
        return {"input_ids": arrays["inputs"].long(), "attention_mask": arrays["input_mask"]}
    mask = {"attention_mask": arrays["input_mask"]} if "input_mask" in arrays else {}
    images = arrays["images"].movedim(-1, -3) if "images" in arrays else None  # (B, ..., C, H, W)
    if wiring == "optical-flow":
        assert images is not None
        return {"pixel_values": flow_patches(images), **mask}
    if wiring != "multimodal":
        return {"pixel_values": images, **mask}
    inputs = {"image": images, "audio": arrays.get("audio"), "label": arrays.get("label")}
    points = {name: arrays.get(f"subsample_{name}") for name, given in inputs.items() if given is not None}
    return {"inputs": {name: given for name, given in inputs.items() if given is not None}, "output_points": points}


def flow_patches(frames: Tensor) -> Tensor:
    """(B, 2, 3, H, W) -> (B, 2, 27, H, W): the 3x3 neighbourhood of each pixel, zeros outside, in (h, w, c) order."""
    b, t, c, h, w = frames.shape
    patches = F.unfold(frames.flatten(0, 1), kernel_size=3, padding=1)  # (B*2, c*3*3, H*W)
    return patches.reshape(b, t, c, 9, h, w).transpose(2, 3).reshape(b, t, 9 * c, h, w)


# --- a forward pass and what lies between


class Stored(nn.Module):
    """In place of a preprocessor: its parts, with a stored encoder input (B, M, C) as their contents."""

    def __init__(self, preprocessor: nn.Module, encoder_inputs: Tensor):
        super().__init__()
        self.preprocessor, self.encoder_inputs = preprocessor, encoder_inputs

    def forward(self, *args: Any, **kwargs: Any) -> InputArray:
        parts, start = {}, 0
        for name, part in InputArray.of(self.preprocessor(*args, **kwargs)):
            rows = self.encoder_inputs[:, start : start + part.length]
            start += part.length
            if part.replaced is not None and part.replaced.all():
                parts[name] = part  # nothing but its mask token
                continue
            # Features and the rest stay apart: some output queries are made of the features alone.
            features, padding = part.features, part.constant
            assert features is not None
            width = features.shape[-1]
            if part.combine == "add":
                rest = rows[..., :width] - features
            else:
                features, rest, padding = rows[..., :width], rows[..., width:], None
            changes: dict[str, Any] = {"features": features, "position": TableCode(rest), "constant": padding}
            parts[name] = replace(part, token=None, replaced=None, **changes)
        if start != self.encoder_inputs.shape[1]:
            raise VerificationError(f"encoder_inputs has {self.encoder_inputs.shape[1]} elements, the input {start}")
        return InputArray(parts)


class StoredQuery(nn.Module):
    """In place of an output query: its parts, with a stored query array (B, O, E) as their contents."""

    def __init__(self, output_query: nn.Module, decoder_query: Tensor):
        super().__init__()
        self.output_query, self.decoder_query = output_query, decoder_query
        self.channels = output_query.channels

    def forward(self, *args: Any, **kwargs: Any) -> QueryArray:
        parts, start = {}, 0
        for name, part in QueryArray.of(self.output_query(*args, **kwargs)):
            rows = self.decoder_query[:, start : start + part.length]
            start += part.length
            empty: dict[str, Any] = dict.fromkeys(("position", "constant", "token", "replaced"))
            parts[name] = replace(part, features=rows, combine="concat", **empty)
        if start != self.decoder_query.shape[1]:
            raise VerificationError(f"decoder_query has {self.decoder_query.shape[1]} elements, the model asks {start}")
        return QueryArray(parts)


Keep = Callable[[str, Tensor], Any]


@torch.no_grad()
def run(
    model: Any,
    *,
    encoder_inputs: Tensor | None = None,
    decoder_query: Tensor | None = None,
    parts: dict[str, PerceiverArray] | None = None,
    keep: Keep = lambda name, x: x,
    **inputs: Any,
) -> dict[str, Any]:
    """A forward pass of a model or a head, and its intermediates under the names of the stored references.

    encoder_inputs and decoder_query replace what the preprocessor and the output query make. `keep` says what is left
    of each array; `parts` is filled with input and query array as they are before they are made dense.
    """
    got: dict[str, Any] = {}
    base = base_of(model)
    preprocessor, output_query = base.preprocessor, base.output_query
    if encoder_inputs is not None:
        base.preprocessor = Stored(preprocessor, encoder_inputs)
    if decoder_query is not None and output_query is not None:
        base.output_query = StoredQuery(output_query, decoder_query)
    try:
        with recording(base, got, keep, {} if parts is None else parts):
            outputs = model(**inputs)
    finally:
        base.preprocessor, base.output_query = preprocessor, output_query
    got["z"] = keep("z", outputs.last_hidden_state)
    for name in ("decoder_cross_out", "decoder_out"):
        if name in got:
            got[name] = keep(name, torch.cat(got[name], dim=1))
    return {**got, **answers(outputs)}


def answers(outputs: Any) -> dict[str, Tensor]:
    """What a model puts out, by the references' names: `outputs`, or `outputs_` and the modality."""
    logits = outputs.logits if isinstance(outputs.logits, dict) else {"": outputs.logits}
    return {f"outputs_{name}" if name else "outputs": value for name, value in logits.items()}


def base_of(model: Any) -> Any:
    """The PerceiverIOModel inside a head, or the model itself."""
    return getattr(model, "perceiver", model)


@contextlib.contextmanager
def recording(model: Any, got: dict[str, Any], keep: Keep, parts: dict[str, PerceiverArray]) -> Iterator[None]:
    """Fill `got` and `parts` while the model runs."""
    handles = []

    def on(module: nn.Module | None, take: Callable[[Any, Any], None]) -> None:
        if module is not None:
            handles.append(module.register_forward_hook(lambda module, args, output: take(args, output)))

    def put(name: str, value: Tensor) -> None:
        got[name] = keep(name, value)

    def stem(args: Any, output: Tensor) -> None:
        put("convnet_out", output)
        put("image_without_pos", output.flatten(1, -2))

    def preprocessed(args: Any, output: Any) -> None:
        for name, part in InputArray.of(output):
            put(f"preprocessed_{name or 'image'}", replace(part, constant=None, replaced=None).dense())

    def read(args: Any, output: Any) -> None:
        parts["encoder_inputs"] = args[0]
        put("encoder_inputs", args[0].dense().expand(args[0].batch_size, -1, -1))

    def latents(args: Any, output: Tensor) -> None:
        put("latents_init", args[0].expand(output.shape[0], -1, -1))
        put("z_after_cross", output)

    def layer(args: Any, output: Tensor) -> None:
        put(f"z_after_self_{sum(name.startswith('z_after_self') for name in got):03d}", output)

    def query(args: Any, output: Any) -> None:
        array, batch = QueryArray.of(output), args[0].batch_size
        parts["decoder_query"] = array
        put("decoder_query", array.dense().expand(batch, -1, -1))
        for name, part in array:
            # Without the padding.
            put(f"decoder_query_{name}", replace(part, constant=None).dense().expand(batch, -1, -1))

    def piece(name: str) -> Callable[[Any, Any], None]:
        return lambda args, output: got.setdefault(name, []).append(output)

    real = model.preprocessor.preprocessor if isinstance(model.preprocessor, Stored) else model.preprocessor
    modalities = getattr(real, "modalities", None)
    image = real if modalities is None else dict(modalities.items()).get("image")
    on(getattr(image, "stem", None), stem)
    on(real, preprocessed)
    on(model.encoder, read)
    on(model.encoder.cross_attends[0], latents)
    for self_attend in model.encoder.blocks[0]:
        on(self_attend, layer)
    on(model.output_query, query)
    on(getattr(model.decoder, "cross_attend", None), piece("decoder_cross_out"))
    on(getattr(model.postprocessor, "shared", None), piece("decoder_out"))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


# --- the command


def described(report: Report) -> str:
    """The tables of a report, and what they come to."""
    above = [row.stage for row in (*report.positions, *report.core) if not row.holds]
    return "\n".join(
        [
            "Pass 1, from the raw inputs. Fourier positions: max abs <= tolerance * max|reference|",
            f"+ {COORDINATE_ROUNDING:.1e} * pi * max_resolution / 2 (* the gain of a projection)",
            table(report.positions),
            "Pass 2, from the stored encoder_inputs and decoder_query",
            table(report.core),
            "The whole way from the raw inputs",
            table(report.whole),
            *report.notes,
            f"above its bound: {'; '.join(above)}" if above else "every stage is within its bound",
        ]
    )


def table(rows: list[Row]) -> str:
    """One line a stage: name, max abs, relative L2, bound, verdict."""
    lines = [f"  {'stage':<32} {'max abs':>9} {'relative L2':>12}  {'bound':<22} verdict"]
    for row in rows:
        bound = "" if row.bound is None else f"{row.bound:.1e} {row.measure}"
        verdict = "reported" if row.bound is None else "ok" if row.holds else "ABOVE ITS BOUND"
        lines.append(f"  {row.stage:<32} {row.max_abs:>9.1e} {row.relative:>12.1e}  {bound:<22} {verdict}")
    return "\n".join(lines)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m conversion.verify",
        description="Compare a converted folder with stored arrays of DeepMind's original, stage by stage.",
        epilog="Exit status: 0 everything holds, 1 a stage is above its bound, 2 it could not run.",
    )
    parser.add_argument("folder", metavar="DIR", type=Path, help="what convert_haiku or convert_builtin wrote")
    parser.add_argument(
        "--reference",
        metavar="FILE.npz",
        type=Path,
        required=True,
        help="inputs and float32 results of the original, named as in tests/reference/parity/*.npz",
    )
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="relative L2 of every stage (default: %(default)s)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    given = make_parser().parse_args(arguments)
    try:
        report = verify(given.folder, given.reference, given.tolerance)
    except KeyboardInterrupt:
        raise
    except Exception as error:
        # Whatever goes wrong in a model that the file does not belong to, the comparison could not be made.
        print(f"error: {error if str(error) else type(error).__name__}", file=sys.stderr)
        return 2
    print(described(report))
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(main())
