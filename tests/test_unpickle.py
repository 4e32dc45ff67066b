"""conversion/unpickle.py: every real format loads with the right values, everything else is refused and never run.

tests/reference/pickles holds samples as Haiku, JAX and numpy of 2021 and of today write them, all of one imagenet_conv
model (d_* are single arrays); tests/reference/parity holds two more models, each as 2021's and as today's software
writes it, with the shapes that the original code gave. Values are compared with what Python's own pickle makes of these
files, which are trusted here, with stand-ins for Haiku's and JAX's names.
"""

import io
import json
import os
import pickle
import pickletools
import random
import subprocess
import sys
import time
import tracemalloc
import types
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from conversion.unpickle import (
    ALLOWED_GLOBALS,
    CheckpointError,
    HaikuCheckpoint,
    describe,
    load_haiku_checkpoint,
    read_entries,
)

REFERENCE = Path(__file__).parent / "reference"
PICKLES = REFERENCE / "pickles"
SAMPLES = sorted(PICKLES.glob("*.pystate"))
MODEL_SAMPLES = [path for path in SAMPLES if not path.name.startswith("d_")]
PARITY = [
    REFERENCE / "parity" / f"{model}.{ending}"
    for model in ("imagenet_fourier_a", "extra_concat_query_a")
    for ending in ("pystate", "current_hk.pystate")
]

Tree = dict[str, dict[str, dict[str, np.ndarray]]]


# --- Python's own pickle, for trusted files


def from_jax(function, arguments, state, own_state):
    array = function(*arguments)
    array.__setstate__(state)
    return array


class Trusting(pickle.Unpickler):
    """Calls numpy as the file says; only for files that were made here, or that our reader has accepted."""

    def find_class(self, module: str, name: str):
        assert (module, name) in ALLOWED_GLOBALS
        if module.startswith("haiku."):
            return dict
        if module.startswith("jax."):
            return from_jax
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def trusted(data: bytes) -> Tree:
    tree = Trusting(io.BytesIO(data)).load()
    return tree if set(tree) <= {"params", "state"} else {"params": tree}


def same_values(checkpoint: HaikuCheckpoint, tree: Tree) -> bool:
    """The same names, shapes, dtypes up to byte order, and bits."""
    pairs = zip(*entries_and_arrays(checkpoint), strict=True)
    ours = {f"{entry.section} {entry.path}": array for entry, array in pairs}
    theirs = {
        f"{section} {module}/{name}": np.asarray(array)
        for section, modules in tree.items()
        for module, arrays in modules.items()
        for name, array in arrays.items()
    }
    return list(ours) == list(theirs) and all(
        ours[key].shape == value.shape
        and ours[key].dtype == value.dtype.newbyteorder("=")
        and ours[key].tobytes() == value.astype(value.dtype.newbyteorder("=")).tobytes()
        for key, value in theirs.items()
    )


def entries_and_arrays(checkpoint: HaikuCheckpoint):
    sections = (checkpoint.params, checkpoint.state)
    arrays = [array for modules in sections for names in modules.values() for array in names.values()]
    return list(describe(checkpoint)), arrays


# --- writing pickles


@pytest.fixture
def save(tmp_path):
    """`save(bytes)` is the path of a file that holds them."""

    return lambda data: write_new(tmp_path / "checkpoint.pystate", data)


def write_new(path: Path, data: bytes) -> Path:
    # Some file systems write to the disk at once, milliseconds each time, when a file is emptied and filled again.
    path.unlink(missing_ok=True)
    path.write_bytes(data)
    return path


class JaxArray:
    """Pickles as a jax.Array does."""

    def __init__(self, value: np.ndarray, function: str = "_reconstruct_array"):
        self.value = value
        self.function = function

    def __reduce__(self):
        return _standin(f"jax._src.{'array' if self.function[0] == '_' else 'device_array'}", self.function), (
            *self.value.__reduce__(),
            {"weak_type": False, "named_shape": {}},
        )


class Container(dict):
    """Pickles as one of Haiku's mappings does."""

    kind = "FlatMapping"

    def __reduce__(self):
        return _standin("haiku._src.data_structures", self.kind), (dict(self),)


def _standin(module: str, name: str):
    return getattr(sys.modules[module], name)


@pytest.fixture(scope="module")
def standins() -> Iterator[None]:
    """Pickle writes a function's name only if the name can be imported."""
    names = {
        "haiku._src.data_structures": ("FlatMapping", "FlatMap", "frozendict"),
        "jax._src.array": ("_reconstruct_array",),
        "jax._src.device_array": ("reconstruct_device_array",),
    }
    with pytest.MonkeyPatch.context() as patch:
        for package in ("haiku", "haiku._src", "jax", "jax._src"):
            patch.setitem(sys.modules, package, types.ModuleType(package))
        for module, functions in names.items():
            standin = types.ModuleType(module)
            for name in functions:
                function = types.FunctionType((lambda: None).__code__, {}, name)
                function.__module__, function.__qualname__ = module, name
                setattr(standin, name, function)
            patch.setitem(sys.modules, module, standin)
        yield


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + len(data).to_bytes(4, "little") + data


def name_of(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def stacked(module: str, name: str) -> bytes:
    return text(module) + text(name) + b"\x93"


def integer(value: int) -> bytes:
    return b"\x8a\x08" + value.to_bytes(8, "little", signed=True)


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def called(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def dtype(code: str = "f4", state: bytes | None = None, kind: bytes | None = None) -> bytes:
    state = text("<") + b"NNN" + integer(-1) + integer(-1) + b"K\x00" if state is None else state
    return called(name_of("numpy", "dtype"), kind or text(code), b"\x89", b"\x88") + b"(K\x03" + state + b"tb"


EMPTY = called(name_of("numpy.core.multiarray", "_reconstruct"), name_of("numpy", "ndarray"), sizes(0), b"C\x01b")


def array(
    shape: bytes = sizes(2), kind: bytes | None = None, data: bytes = b"C\x08" + bytes(8), fortran: bytes = b"\x89"
) -> bytes:
    return EMPTY + b"(K\x01" + shape + (kind or dtype()) + fortran + data + b"tb"


def program(body: bytes, protocol: int = 4) -> bytes:
    return b"\x80" + bytes([protocol]) + body + b"."


def holding(leaf: bytes) -> bytes:
    """A checkpoint {'m': {'w': leaf}}."""
    return program(b"}" + text("m") + b"}" + text("w") + leaf + b"ss")


# --- what loads


def test_there_are_thirteen_samples():
    assert len(SAMPLES) == 13  # copied from the set that the issue names


@pytest.mark.parametrize("path", [*SAMPLES, *PARITY], ids=lambda path: path.name)
def test_samples_load_with_the_values_that_python_reads(path):
    checkpoint = load_haiku_checkpoint(path)
    entries, arrays = entries_and_arrays(checkpoint)
    assert all(type(value) is np.ndarray and value.flags.c_contiguous and value.flags.writeable for value in arrays)
    assert [entry[:4] for entry in read_entries(path)] == [entry[:4] for entry in entries]
    if "bf16" in path.name:
        # Written as ones.
        assert read_entries(path)[0].dtype == "bfloat16"
        assert checkpoint.params["m"]["w"].dtype == np.float32
        np.testing.assert_array_equal(checkpoint.params["m"]["w"], np.ones((2, 3)))
    else:
        assert same_values(checkpoint, trusted(path.read_bytes()))


def test_all_writers_of_one_model_give_the_same_arrays():
    first, *others = [load_haiku_checkpoint(path) for path in MODEL_SAMPLES]
    assert len(others) == 9
    # "bare" files aside, which are not among the samples, each has the batch norm's state.
    assert len(first.params) == 39 and len(first.state) == 2
    for other in others:
        assert same_values(other, {"params": first.params, "state": first.state})


def test_numpy_scalar_is_an_array_without_dimensions():
    counter = load_haiku_checkpoint(PICKLES / "d_numpy_scalar_p4.pystate").params["m"]["counter"]
    assert type(counter) is np.ndarray and counter.shape == () and counter.dtype == np.int32 and counter == 3


@pytest.mark.parametrize("path", PARITY, ids=lambda path: path.name)
def test_names_and_shapes_are_those_of_the_original_code(path):
    expected = json.loads((path.parent / f"{path.name.split('.')[0]}.json").read_text())
    checkpoint = load_haiku_checkpoint(path)
    for section in ("params", "state"):
        modules = getattr(checkpoint, section)
        shapes = {module: {name: list(array.shape) for name, array in modules[module].items()} for module in modules}
        assert shapes == expected.get(section, {})


def test_samples_need_only_names_of_the_allow_list():
    needed = json.loads((PICKLES / "globals.json").read_text())
    assert {tuple(name) for sample in needed for name in sample["globals"]} <= set(ALLOWED_GLOBALS)


def awkward_arrays() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((3, 4, 5)).astype(np.float32)
    arrays = {
        "c": values,
        "fortran": np.asfortranarray(values),
        "transposed": values.transpose(1, 0, 2),
        "strided": values[:, ::2],
        "big_endian": values.astype(">f4"),
        "big_endian_fortran": np.asfortranarray(values.astype(">f8")),
        "no_dimensions": np.array(2.5, np.float32),
        "scalar": np.float64(1.5),
        "long": rng.standard_normal((700, 700)).astype(np.float32),  # in protocol 2, text of many chunks
        "long_fortran": np.asfortranarray(rng.standard_normal((70, 700))),
        "long_big_endian": rng.integers(-9, 9, 4000).astype(">i8"),
        "bool": np.array([True, False]),
        **{code: np.arange(5).astype(code) for code in "i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split()},
    }
    return arrays


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
@pytest.mark.parametrize("writer", ["numpy", "jax", "old_jax", "FlatMapping", "FlatMap", "frozendict"])
def test_every_layout_byte_order_and_container_is_read_right(writer, protocol, save, standins):
    arrays = awkward_arrays()
    if protocol > 2:
        arrays["empty"] = np.zeros((0, 3), np.float32)
    expected: Tree = {"params": {"m": arrays}, "state": {"n/~/o": {"average": np.ones(3, np.float32)}}}
    tree: dict = expected
    if writer.endswith("jax"):
        function = "_reconstruct_array" if writer == "jax" else "reconstruct_device_array"
        tree = {
            s: {m: {n: JaxArray(np.asarray(a), function) for n, a in arrays.items()} for m, arrays in modules.items()}
            for s, modules in expected.items()
        }
    elif writer != "numpy":
        kind = type(writer, (Container,), {"kind": writer})
        tree = {s: kind({m: kind(arrays) for m, arrays in modules.items()}) for s, modules in expected.items()}
    assert same_values(load_haiku_checkpoint(save(pickle.dumps(tree, protocol=protocol))), expected)


def test_bfloat16_in_any_byte_order_becomes_float32(save):
    values = np.array([[1, -2.5, np.inf], [3e38, 1e-40, 0]], np.float32)
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    for order in "<>":
        state = text(order) + b"NNN" + integer(2) + integer(2) + integer(64)
        kind = dtype(state=state, kind=name_of("ml_dtypes", "bfloat16"))
        data = upper.T.astype(order + "u2").tobytes()
        leaf = array(sizes(2, 3), kind, b"C" + bytes([len(data)]) + data, fortran=b"\x88")
        loaded = load_haiku_checkpoint(save(holding(leaf))).params["m"]["w"]
        assert loaded.dtype == np.float32 and loaded.flags.c_contiguous
        np.testing.assert_array_equal(loaded.view(np.uint32), upper.astype(np.uint32) << 16)


def test_a_mapping_without_sections_is_parameters_alone(save):
    value = np.ones(2, np.float32)
    bare = load_haiku_checkpoint(save(pickle.dumps({"linear": {"w": value}})))
    assert list(bare.params) == ["linear"] and bare.state == {}
    # A module may be called as the section is.
    named = load_haiku_checkpoint(save(pickle.dumps({"params": {"w": value}, "linear": {"w": value}})))
    assert list(named.params) == ["params", "linear"]
    empty_state = load_haiku_checkpoint(save(pickle.dumps({"params": {"linear": {"w": value}}, "state": {}})))
    assert list(empty_state.params) == ["linear"] and empty_state.state == {}


def test_an_array_at_two_places_stays_one_array(save):
    value = np.ones(2, np.float32)
    params = load_haiku_checkpoint(save(pickle.dumps({"a": {"w": value}, "b": {"w": value}}))).params
    assert params["a"]["w"] is params["b"]["w"]


def test_missing_files_and_directories_are_os_errors(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_haiku_checkpoint(tmp_path / "missing.pystate")
    with pytest.raises(IsADirectoryError):
        load_haiku_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="not a regular file"):
        load_haiku_checkpoint(tmp_path / "pipe")


# --- what is refused

RUN = text("touch was-run") + b"\x85R"
SYSTEM = name_of("os", "system")
BIG = 2**62

CALLS = {
    "os.system": (holding(SYSTEM + RUN), r"os\.system"),
    "posix.system": (holding(name_of("posix", "system") + RUN), r"posix\.system"),
    "subprocess": (holding(stacked("subprocess", "Popen") + RUN), r"subprocess\.Popen"),
    "eval": (holding(name_of("builtins", "eval") + RUN), r"builtins\.eval"),
    "exec": (holding(name_of("builtins", "exec") + RUN), r"builtins\.exec"),
    "python2 eval": (holding(name_of("__builtin__", "eval") + RUN), r"__builtin__\.eval"),
    "import": (holding(name_of("builtins", "__import__") + RUN), r"builtins\.__import__"),
    "getattr": (holding(name_of("builtins", "getattr") + RUN), r"builtins\.getattr"),
    "numpy.load": (holding(name_of("numpy", "load") + RUN), r"numpy\.load"),
    "numpy.fromfile": (holding(name_of("numpy", "fromfile") + RUN), r"numpy\.fromfile"),
    "runstring": (holding(name_of("numpy.testing._private.utils", "runstring") + RUN), "runstring"),
    "copyreg": (holding(name_of("copyreg", "_reconstructor") + RUN), r"copyreg\._reconstructor"),
    "bytes": (holding(name_of("builtins", "bytes") + b")R"), r"builtins\.bytes"),
    "a name with dots": (holding(stacked("numpy", "os.system") + RUN), r"numpy\.os\.system"),
    "a dotted way to globals": (
        holding(stacked("numpy.core.multiarray", "_reconstruct.__globals__")),
        "_reconstruct.__globals__",
    ),
    "a dotted module": (holding(stacked("numpy.dtype", "__class__")), r"numpy\.dtype\.__class__"),
    "another name of haiku": (
        holding(name_of("haiku._src.data_structures", "to_haiku_dict") + RUN),
        r"data_structures\.to_haiku_dict",
    ),
    "another name of jax": (holding(name_of("jax._src.array", "np") + RUN), r"jax\._src\.array\.np"),
    "a long name": (holding(f"c{'x' * 300}\n".encode()), "longer than 255 bytes"),
    "a name that is no text": (holding(b"K\x01K\x02\x93"), "global is named by 2 and 1|global is named by 1 and 2"),
    "terminal codes in a name": (holding(stacked("\x1b[2J", "x")), r"'\\x1b\[2J\.x'"),
    "INST": (holding(b"(" + text("touch was-run") + b"ios\nsystem\n"), r"INST of 'os\.system'"),
    "OBJ": (holding(b"(" + name_of("numpy", "dtype") + text("f4") + b"o"), "operation OBJ"),
    "NEWOBJ": (holding(name_of("numpy", "ndarray") + sizes(2) + b"\x81"), "operation NEWOBJ"),
    "NEWOBJ_EX": (holding(name_of("numpy", "ndarray") + b")}\x92"), "operation NEWOBJ_EX"),
    "REDUCE of ndarray": (holding(called(name_of("numpy", "ndarray"), sizes(BIG))), r"REDUCE calls numpy\.ndarray"),
    "REDUCE of bfloat16": (holding(called(name_of("ml_dtypes", "bfloat16"), b"K\x01")), "REDUCE calls ml_dtypes"),
    "REDUCE of a mapping": (holding(called(b"}")), "REDUCE calls a mapping"),
    "REDUCE of a text": (holding(called(text("os.system"))), "REDUCE calls 'os.system'"),
    "REDUCE of an array": (holding(called(array())), "REDUCE calls an array"),
    "REDUCE without a tuple": (holding(name_of("numpy", "dtype") + text("f4") + b"R"), "instead of a tuple"),
    "BUILD of a mapping": (
        holding(b"}" + b"}" + text("__setstate__") + b"Nsb"),
        "BUILD sets the state of a mapping",
    ),
    "BUILD of a global": (holding(name_of("numpy", "dtype") + b"}b"), r"BUILD sets the state of numpy\.dtype"),
    "BUILD of a tuple": (holding(b")}b"), "BUILD sets the state of a tuple"),
    "BUILD of an array with a mapping": (holding(EMPTY + b"}" + text("__class__") + b"Nsb"), "array's state must be"),
    "BUILD of a dtype with a mapping": (
        holding(called(name_of("numpy", "dtype"), text("f4"), b"\x89", b"\x88") + b"}b"),
        "dtype's state must be",
    ),
    "BUILD twice": (holding(array() + b"(K\x01" + sizes(2) + dtype() + b"\x89C\x08" + bytes(8) + b"tb"), "set twice"),
    "BUILD of a dtype twice": (
        holding(array(kind=dtype() + b"(K\x03" + text("<") + b"NNN" + integer(-1) * 2 + b"K\x00" + b"tb")),
        "set twice",
    ),
    "persistent id": (holding(b"Pfile\n"), "PERSID"),
    "persistent id from the stack": (holding(text("file") + b"Q"), "BINPERSID"),
    "EXT1": (holding(b"\x82\x01"), "EXT1"),
    "EXT2": (holding(b"\x83\x01\x00"), "EXT2"),
    "EXT4": (holding(b"\x84\x01\x00\x00\x00"), "EXT4"),
    "a buffer outside the file": (holding(b"\x97"), "NEXT_BUFFER"),
    "a read-only buffer": (holding(b"\x98"), "READONLY_BUFFER"),
    "encode with another codec": (
        holding(array(data=called(name_of("_codecs", "encode"), text("x" * 8), text("rot13")))),
        "'latin1' only",
    ),
    "encode without a codec": (holding(called(name_of("_codecs", "encode"), text("x"))), "'latin1' only"),
    "encode of bytes": (holding(called(name_of("_codecs", "encode"), b"C\x01x", text("latin1"))), "only text"),
    "jax with another function": (
        holding(called(name_of("jax._src.array", "_reconstruct_array"), name_of("numpy", "dtype"), b"))}")),
        "a JAX array must be made by numpy's _reconstruct",
    ),
    "jax with os.system": (
        holding(called(name_of("jax._src.array", "_reconstruct_array"), SYSTEM, text("x") + b"\x85", b")}")),
        r"os\.system",
    ),
    "jax with a state of objects": (
        holding(
            called(
                name_of("jax._src.array", "_reconstruct_array"),
                name_of("numpy.core.multiarray", "_reconstruct"),
                name_of("numpy", "ndarray") + b"K\x00\x85C\x01b\x87",
                b"(K\x01" + sizes(2) + dtype() + b"\x89C\x08" + bytes(8) + b"t",
                b"}" + text("aval") + array() + b"s",
            )
        ),
        "JAX array's own state",
    ),
    "_reconstruct of another class": (
        holding(called(name_of("numpy.core.multiarray", "_reconstruct"), name_of("numpy", "dtype"), b")C\x01b")),
        "_reconstruct must be called with",
    ),
    "_reconstruct of a large array": (
        holding(
            called(name_of("numpy.core.multiarray", "_reconstruct"), name_of("numpy", "ndarray"), sizes(BIG), b"C\x01b")
        ),
        "_reconstruct must be called with",
    ),
    "_reconstruct of a flag": (
        holding(
            called(
                name_of("numpy.core.multiarray", "_reconstruct"), name_of("numpy", "ndarray"), b"\x89\x85", b"C\x01b"
            )
        ),
        "tuple of integers",
    ),
    "a container of a tuple": (
        holding(called(name_of("haiku._src.data_structures", "FlatMapping"), b")")),
        "container must be made from one mapping",
    ),
}

ARRAYS = {
    "object dtype": (holding(array(kind=dtype("O8"))), r"dtype 'O8' \(object dtype\)"),
    "object dtype without a size": (holding(array(kind=dtype("O"))), "object dtype"),
    "raw dtype": (holding(array(kind=dtype("V8"))), "structured dtype"),
    "text dtype": (holding(array(kind=dtype("U2"))), "text dtype"),
    "complex dtype": (holding(array(kind=dtype("c8"))), "complex dtype"),
    "date dtype": (holding(array(kind=dtype("M8"))), "dtype 'M8'"),
    "aligned dtype": (
        holding(array(kind=called(name_of("numpy", "dtype"), text("f4"), b"\x88", b"\x88"))),
        "a code, False and a flag",
    ),
    "dtype of several": (holding(array(kind=dtype("f4,O"))), "dtype 'f4,O'"),
    "dtype of a mapping": (holding(array(kind=dtype(kind=b"}"))), "dtype a mapping"),
    "dtype of a list of fields": (
        holding(array(kind=dtype("f4", text("<") + b"N" + text("f") + b"\x85}" + integer(-1) * 2 + b"K\x00"))),
        "structured dtypes",
    ),
    "dtype with a subdtype": (
        holding(array(kind=dtype("f4", text("<") + dtype() + sizes(2) + b"\x86NN" + integer(-1) * 2 + b"K\x00"))),
        "structured dtypes",
    ),
    "dtype with an object's flags": (
        holding(array(kind=dtype("f4", text("<") + b"NNN" + integer(-1) * 2 + integer(63)))),
        "63 do not belong to dtype 'f4'",
    ),
    "dtype of a false size": (
        holding(array(kind=dtype("f4", text("<") + b"NNN" + integer(800) + integer(-1) + b"K\x00"))),
        "800 do not belong to dtype 'f4'",
    ),
    "dtype of no byte order": (
        holding(array(kind=dtype("f4", text("=") + b"NNN" + integer(-1) * 2 + b"K\x00"))),
        "byte order '='",
    ),
    "dtype without a state": (
        holding(array(kind=called(name_of("numpy", "dtype"), text("f4"), b"\x89", b"\x88"))),
        "with its byte order",
    ),
    "no dtype": (holding(array(kind=text("f4"))), "dtype is 'f4'"),
    "shape larger than the data": (holding(array(sizes(3))), r"shape \(3,\).* needs 12 bytes.* gives it 8"),
    "shape smaller than the data": (holding(array(sizes(1))), r"shape \(1,\).* needs 4 bytes.* gives it 8"),
    "negative shape": (holding(array(sizes(-2))), "negative dimension"),
    "two negative dimensions": (holding(array(sizes(-1, -2))), "negative dimension"),
    "absurd shape": (holding(array(sizes(BIG, BIG, BIG))), "needs [0-9]{50,} bytes"),
    "shape that overflows to the right size": (holding(array(sizes(2**32, 2**31, 2))), "needs [0-9]{20} bytes"),
    "absurd empty shape": (holding(array(sizes(0, BIG), data=b"C\x00")), "empty array is absurd"),
    "shape of 33 dimensions": (holding(array(sizes(*[1] * 33))), "33 dimensions"),
    "shape of flags": (holding(array(b"\x88\x85")), "tuple of integers"),
    "shape that is a number": (holding(array(b"K\x02")), "tuple of integers"),
    "data that is text": (holding(array(data=text("x" * 8))), "must be bytes"),
    "long data that is text": (holding(array(sizes(500), data=text("x" * 2000))), "data is a long text"),
    "data that is a mapping": (holding(array(data=b"}")), "data is a mapping"),
    "data beyond latin-1": (
        holding(array(sizes(500), data=called(name_of("_codecs", "encode"), text("€" * 1000), text("latin1")))),
        "not latin-1|longer than",
    ),
    "text data that is too short": (
        holding(array(sizes(500), data=called(name_of("_codecs", "encode"), text("é" * 1500), text("latin1")))),
        "1500 of the 2000 bytes",
    ),
    "text data that is too long": (
        holding(array(sizes(300), data=called(name_of("_codecs", "encode"), text("x" * 2000), text("latin1")))),
        "longer than the 1200 bytes",
    ),
    "bool that is neither": (
        holding(array(kind=dtype("b1", text("|") + b"NNN" + integer(-1) * 2 + b"K\x00"), data=b"C\x02\x01\x02")),
        "bool array holds the byte 2",
    ),
    "array without its data": (holding(EMPTY), "an array without its data"),
    "scalar of too many bytes": (
        holding(called(name_of("numpy.core.multiarray", "scalar"), dtype(), b"C\x08" + bytes(8))),
        "needs 4 bytes",
    ),
    "scalar of an object": (
        holding(called(name_of("numpy.core.multiarray", "scalar"), dtype("O8"), b"C\x08" + bytes(8))),
        "object dtype",
    ),
    "buffer in an unknown order": (
        holding(
            called(name_of("numpy.core.numeric", "_frombuffer"), b"C\x08" + bytes(8), dtype(), sizes(2), text("A"))
        ),
        "array order 'A'",
    ),
    "buffer with axes that are no permutation": (
        holding(
            called(
                name_of("numpy._core.numeric", "_frombuffer"),
                b"C\x08" + bytes(8),
                dtype(),
                sizes(1, 2),
                text("K"),
                sizes(0, 0),
            )
        ),
        "array order 'K'",
    ),
    "a leaf of text": (holding(text("weights")), "'weights'; it must be an array"),
    "a leaf of nothing": (holding(b"N"), "None; it must be an array"),
    "a leaf of a dtype": (holding(dtype()), "a dtype; it must be an array"),
    "a leaf of a global": (holding(name_of("numpy", "ndarray")), r"numpy\.ndarray; it must be an array"),
    "a mapping of four levels": (
        program(b"}" + text("params") + b"}" + text("m") + b"}" + text("n") + b"}" + text("w") + array() + b"ssss"),
        "a mapping; it must be an array",
    ),
}

STRUCTURES = {
    "an empty file": (b"", "does not start with a protocol"),
    "one byte": (b"\x80", "does not start with a protocol"),
    "protocol 0": (pickle.dumps({"m": {"w": np.ones(2)}}, protocol=0), "does not start with a protocol"),
    "protocol 1": (program(b"}", 1), "protocol 1 is refused"),
    "protocol 6": (program(b"}", 6), "protocol 6 is refused"),
    "a second protocol": (holding(b"\x80\x04" + array()), "PROTO"),
    "a torch file": (b"PK\x03\x04" + bytes(40), "a zip"),
    "a gzip": (b"\x1f\x8b\x08\x00" + bytes(40), "gzip"),
    "a web page": (b"<!DOCTYPE html><title>404</title>", "web page"),
    "a Git LFS pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "git lfs pull"),
    "an unknown operation": (program(b"\xff"), "is not a pickle operation"),
    "a list": (program(b"]"), "EMPTY_LIST"),
    "a set": (program(b"\x8f"), "EMPTY_SET"),
    "a float": (program(b"G" + bytes(8)), "BINFLOAT"),
    "a NaN as a key": (program(b"}G\x7f\xf8\x00\x00\x00\x00\x00\x00Ns"), "BINFLOAT"),
    "DUP": (program(b"}2"), "DUP"),
    "POP": (program(b"}0"), "POP"),
    "text GET": (program(b"}g0\n"), "GET"),
    "no mapping": (program(b"K\x01"), "holds 1; it must be a mapping"),
    "an array alone": (program(array()), "holds an array; it must be a mapping"),
    "one level": (program(b"}" + text("w") + array() + b"s"), "params of 'w' is an array"),
    "an empty mapping": (program(b"}"), "no parameters"),
    "modules without arrays": (program(b"}" + text("m") + b"}s"), "no parameters"),
    "another section": (
        program(b"}(" + text("params") + b"}" + text("m") + b"}s" + text("optimizer") + b"}u"),
        "'optimizer' stands beside 'params'",
    ),
    "a number as a key": (program(b"}K\x01}s"), "1 is a mapping's key"),
    "nothing as a key": (program(b"}N}s"), "None is a mapping's key"),
    "a tuple as a key": (program(b"})}s"), "a tuple is a mapping's key"),
    "bytes as a key": (program(b"}C\x01m}s"), "b'm' is a mapping's key"),
    "a long key": (program(b"}" + text("m" * 2000) + b"}s"), "a long text is a mapping's key"),
    "an empty name": (program(b"}" + text("") + b"}" + text("w") + array() + b"ss"), "'' is not a name"),
    "terminal codes in a key": (
        program(b"}" + text("\x1b[2J") + b"}" + text("w") + array() + b"ss"),
        r"'\\x1b\[2J' is not a name",
    ),
    "a key twice": (program(b"}(" + text("m") + b"}" + text("m") + b"}u"), "'m' is set twice"),
    "a key without a value": (program(b"}(" + text("m") + b"u"), "key without a value"),
    "items in a number": (program(b"K\x01" + text("m") + b"Ns"), "items are set in 1"),
    "items in nothing": (program(text("m") + b"Ns"), "items are set in nothing"),
    "too little on the stack": (program(b"s"), "needs a value"),
    "a stack that is short for a tuple": (program(b"N\x87"), "needs a value"),
    "a mark that is not there": (program(b"Nt"), "needs a mark"),
    "a mark that stays": (program(b"}("), "ends inside a mapping or tuple"),
    "two values": (program(b"}}"), "ends with 2 values"),
    "no value": (program(b""), "ends with 0 values"),
    "bytes after the end": (holding(array()) + b"x", "1 bytes follow"),
    "a second pickle after the end": (holding(array()) * 2, "follow the end of the pickle"),
    "no end": (holding(array())[:-1], "truncated"),
    "text that is not UTF-8": (program(b"X\x02\x00\x00\x00\xff\xfe"), "is not UTF-8"),
    "text beyond latin-1": (program(text("€")), "neither a name's nor a byte's"),
}


def size(value: int, width: int) -> bytes:
    return value.to_bytes(width, "little")


def frame(length: int, content: bytes) -> bytes:
    return b"\x95" + size(length, 8) + content


def doubling_tuples(level: int) -> bytes:
    """Of 40 levels, a billion times a thousand elements, if somebody walked through them."""
    return b"".join(b"(" + (b"h" + size(i, 1)) * 2 + b"t\x94" for i in range(level))


def doubling_mappings(levels: int, level: int = 0) -> bytes:
    if level == levels:
        return b"}\x94"
    inner = doubling_mappings(levels, level + 1)
    return b"}\x94" + text("a") + inner + b"s" + text("b") + b"h" + size(level + 1, 1) + b"s"


def one_module_often() -> bytes:
    often = b"".join(text(f"m{i}") + b"h\x00" for i in range(99))
    return b"}" + text("m") + b"}\x94" + text("w") + array() + b"ss(" + often + b"u"


def one_buffer_often() -> bytes:
    first = array(sizes(25_000), data=b"B" + size(100_000, 4) + bytes(100_000) + b"\x94")
    often = b"".join(text(f"w{i}") + array(sizes(25_000), data=b"h\x00") for i in range(20))
    return b"}" + text("m") + b"}(" + text("w") + first + often + b"us"


BOMBS = {
    "a frame longer than the file": (program(frame(99, b"}")), "frame of 99 bytes"),
    "a frame of 2^64 bytes": (program(frame(2**64 - 1, b"}")), "frame of 18446744073709551615 bytes"),
    "a frame in a frame": (program(frame(12, b"}" + frame(0, b"NN"))), "inside another"),
    "a frame that ends inside an operation": (program(frame(3, b"}" + text("module"))), "ends inside an operation"),
    "an integer of 255 bytes": (program(b"\x8a\xff" + bytes(255)), "integer of 255 bytes"),
    "LONG4": (program(b"\x8b\xff\xff\xff\x7f"), "LONG4"),
    **{
        f"{name} of a false length": (
            program(code + size(2 ** (8 * width - 1), width) + b"x"),
            f"{2 ** (8 * width - 1)} bytes are announced and 2 are left",
        )
        for name, code, width in (
            ("BINBYTES", b"B", 4),
            ("BINBYTES8", b"\x8e", 8),
            ("BYTEARRAY8", b"\x96", 8),
            ("BINUNICODE", b"X", 4),
            ("BINUNICODE8", b"\x8d", 8),
        )
    },
    "a high memo entry": (program(b"}r\xff\xff\xff\x7f"), "memo entry 2147483647 is absurdly high"),
    "a memo entry twice": (program(b"}q\x00q\x00"), "memo entry 0 is used twice"),
    "a memo entry that is not there": (program(b"h\x07"), "memo entry 7 is asked for"),
    "an empty memo": (program(b"\x94"), "nothing is there to remember"),
    "doubling tuples": (program(b")\x94" + doubling_tuples(40)), "tuples are nested"),
    "doubling mappings": (program(doubling_mappings(40)), "params of 'a', 'a', is a mapping"),
    "one module under many names": (program(one_module_often()), "stands at another place too"),
    "a mapping in itself": (program(b"}\x94" + text("m") + b"h\x00s"), "stands at another place too"),
    "one buffer in many arrays": (program(one_buffer_often()), "arrays of 2100000 bytes share data in a file of"),
    "deep marks": (program(b"(" * 10_000), "nested in each other"),
    "deep mappings": (program(b"}" + (text("a") + b"}") * 30_000), "values are piled up"),
    "deep tuples": (program(b"N" + b"\x85" * 10_000), "tuples are nested"),
    "a wide stack": (program(b"N" * 1_000_000), "values are piled up"),
    "nothing but operations": (program(b"}" + b"(u" * 300_000), "more than 500000 operations"),
}

ATTACKS = {**CALLS, **ARRAYS, **STRUCTURES, **BOMBS}


@pytest.mark.parametrize("name", ATTACKS)
def test_it_is_refused_with_the_offence_named_and_nothing_run(name, save, tmp_path, monkeypatch):
    data, message = ATTACKS[name]
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match=message) as error:
        load_haiku_checkpoint(save(data))
    assert str(error.value).startswith(str(tmp_path)) and str(error.value).isascii() and len(str(error.value)) < 500
    assert not Path("was-run").exists()


AUDIT = """
import sys
from pathlib import Path
from conversion.unpickle import CheckpointError, load_haiku_checkpoint

here, warm_up = Path(sys.argv[1]), sys.argv[2]
files = sorted(here.iterdir())
load_haiku_checkpoint(warm_up)  # what is imported on first use is imported now
events, watching = [], True
sys.addaudithook(lambda event, arguments: watching and events.append((event, arguments)))
for path in files:
    try:
        load_haiku_checkpoint(path)
    except CheckpointError:
        pass
watching = False
opened = [str(arguments[0]) for event, arguments in events if event == "open"]
others = sorted({event for event, _ in events} - {"open", "builtins.id"})
print(len(files), opened == [str(path) for path in files], others)
"""


def test_the_interpreter_sees_nothing_but_the_file_being_opened(tmp_path):
    """Python reports imports, compilation, exec, processes, sockets and pickle's own look-ups to audit hooks."""
    here = tmp_path / "files"
    here.mkdir()
    for number, (data, _) in enumerate(ATTACKS.values()):
        (here / f"{number}.pystate").write_bytes(data)
    for path in SAMPLES:
        (here / path.name).write_bytes(path.read_bytes())
    command = [sys.executable, "-c", AUDIT, str(here), str(PICKLES / "b_dict_numpy_p2.pystate")]
    result = subprocess.run(command, cwd=REFERENCE.parent.parent, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == f"{len(ATTACKS) + len(SAMPLES)} True []"


@pytest.mark.parametrize("name", ["d_bf16_jax_p4", "d_bf16_numpy_p4", "d_numpy_scalar_p4"])
def test_it_is_refused_wherever_it_is_cut(name, save):
    data = (PICKLES / f"{name}.pystate").read_bytes()
    for length in range(len(data)):
        with pytest.raises(CheckpointError):
            load_haiku_checkpoint(save(data[:length]))


@pytest.mark.parametrize("name", ["b_dict_numpy_p2", "b_dict_numpy_p5", "c_2021style_flatmap_numpy_p4"])
def test_a_large_file_is_refused_wherever_it_is_cut(name, save):
    data = (PICKLES / f"{name}.pystate").read_bytes()
    for length in range(0, len(data), 1009):
        with pytest.raises(CheckpointError):
            load_haiku_checkpoint(save(data[:length]))


def peak_memory(path: Path) -> int:
    """Bytes that loading takes at its peak, arrays included; refused or not."""
    tracemalloc.start()
    try:
        load_haiku_checkpoint(path)
    except CheckpointError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    return peak


# Beyond what the arrays need: up to 20,000 values (BOMBS), a chunk of text, numpy's and the file's buffers.
OVERHEAD = 4 << 20


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_are_read_into_their_own_memory_at_once(protocol, save):
    value = np.random.default_rng(0).standard_normal((16, 500_000)).astype(np.float32)  # 32 MB
    path = save(pickle.dumps({"m": {"a": value[:8], "b": value[8:]}}, protocol=protocol))
    assert peak_memory(path) < value.nbytes + OVERHEAD


def test_changing_layout_and_byte_order_takes_one_array_more(save):
    value = np.asfortranarray(np.random.default_rng(0).standard_normal((16, 250_000)).astype(">f4"))  # 16 MB
    assert peak_memory(save(pickle.dumps({"m": {"a": value, "b": value.copy("F")}}))) < 3 * value.nbytes + OVERHEAD


@pytest.mark.parametrize("name", [*ARRAYS, *(name for name in BOMBS if name != "nothing but operations")])
def test_refused_files_take_no_more_memory_than_three_times_their_size(name, save):
    data, _ = ATTACKS[name]
    assert peak_memory(save(data)) < 3 * len(data) + OVERHEAD


@pytest.mark.slow  # seconds under tracemalloc
def test_a_small_file_of_many_values_takes_64_megabytes_at_most(save):
    pile = b"".join(b"(" + b"N\x85" * 19_000 + b"t" for _ in range(14))  # the most that 500,000 operations can hold
    assert peak_memory(save(program(pile))) < 64 << 20
    assert peak_memory(save(program(b"}" + b"".join(text(f"{i:06}") + b"}\x94s" for i in range(130_000))))) < 64 << 20


# --- damaged at random


def seeds_to_damage() -> list[bytes]:
    """Small checkpoints by every writer and protocol: damage hits what decides, and many can be read in a second."""
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.standard_normal((2, 3)).astype(np.float32),
        "fortran": np.asfortranarray(rng.standard_normal((2, 2))),
        "big": np.arange(3, dtype=">i4"),
        "counter": np.array(3, np.int32),
        "bool": np.array([True]),
    }
    long = {"long": rng.standard_normal(300).astype(np.float32)}
    small = {"params": {"linear": arrays, "linear_1": {"w": arrays["w"]}}, "state": {"norm/~/ema": long}}

    def wrapped(mapping, leaf):
        return Container({k: wrapped(v, leaf) if isinstance(v, dict) else leaf(v) for k, v in mapping.items()})

    trees = [small, small["params"], wrapped(small, lambda v: v), wrapped(small["params"], JaxArray)]
    return [
        *(pickle.dumps(tree, protocol=protocol) for tree in trees for protocol in (2, 3, 4, 5)),
        *(path.read_bytes() for path in SAMPLES if path.name.startswith("d_")),
    ]


def operations_of(data: bytes) -> list[bytes]:
    starts = [position for _, _, position in pickletools.genops(data)]
    return [data[start:end] for start, end in zip(starts, [*starts[1:], len(data)], strict=True)]


TOKENS = [
    *(opcode.code.encode("latin1") for opcode in pickletools.opcodes),
    *(name_of(*pair) for pair in ALLOWED_GLOBALS),
    *(name_of(*pair) for pair in (("os", "system"), ("builtins", "eval"), ("copyreg", "__newobj__"))),
    *(b"h" + bytes([i]) for i in range(20)),
    *(integer(value) for value in (-1, 0, 1, 2, 255, 2**31, 2**62)),
    b"\xff\xff\xff\xff",
    bytes(8),
    dtype(),
    dtype("O8"),
    array(),
    EMPTY,
    sizes(0),
    sizes(2**40, 0),
    b"}" + text("m") + b"Ns",
]


class Damage:
    """Seeded: byte flips, cuts, insertions and splices, on bytes and on whole operations, one to a few at a time."""

    def __init__(self, seeds: list[bytes], seed: int):
        self.random = random.Random(seed)
        self.seeds = seeds
        # Without frames, which would end in the wrong place after any change and stop the reader there.
        self.operations = [[op for op in operations_of(data) if op[:1] != b"\x95"] for data in seeds]

    def __call__(self) -> bytes:
        number = self.random.randrange(len(self.seeds))
        if self.random.random() < 0.5:
            parts: list = list(self.operations[number])
            donor: list = self.operations[self.random.randrange(len(self.seeds))]
            for _ in range(self.random.choice((1, 1, 2, 4))):
                self.change(parts, donor, [self.random.choice(TOKENS)])
            return b"".join(parts)
        data = bytearray(self.seeds[number])
        donor_bytes = self.seeds[self.random.randrange(len(self.seeds))]
        for _ in range(self.random.choice((1, 1, 2, 4, 16))):
            if self.random.random() < 0.5 and data:
                position = self.random.randrange(len(data))
                data[position] = self.random.choice((data[position] ^ 1 << self.random.randrange(8), 0, 255, 128))
            else:
                self.change(data, donor_bytes, self.random.choice(TOKENS))
        return bytes(data)

    def change(self, target, donor, token) -> None:
        """Deletes, repeats, inserts, replaces or splices a short run of elements."""
        start = self.random.randrange(len(target) + 1)
        end = min(len(target), start + self.random.choice((0, 1, 1, 2, 4, 30)))
        donor_start = self.random.randrange(len(donor))
        donor_end = donor_start + self.random.choice((1, 2, 10, 60))
        what = self.random.choice(("delete", "repeat", "insert", "splice", "swap", "head", "cut"))
        if what == "delete":
            del target[start:end]
        elif what == "repeat":
            target[start:start] = target[start:end] * self.random.choice((1, 2, 50))
        elif what == "insert":
            target[start:start] = token
        elif what == "splice":
            target[start:end] = donor[donor_start:donor_end]
        elif what == "swap":
            target[start:end] = token
        elif what == "head":
            target[start:] = donor[donor_start:]
        else:
            del target[self.random.randrange(len(target) + 1) :]


def check_damaged(path: Path, data: bytes) -> bool:
    """Only CheckpointError comes out; what loads is small, plain, and what Python's pickle makes of it."""
    write_new(path, data)
    start = time.perf_counter()
    try:
        checkpoint = load_haiku_checkpoint(path)
    except CheckpointError:
        checkpoint = None
    # A few kilobytes take a few milliseconds; the rest is for a machine with other work.
    assert time.perf_counter() - start < 5
    if checkpoint is None:
        return False
    entries, arrays = entries_and_arrays(checkpoint)
    assert all(type(key) is str and key.isascii() for entry in entries for key in (entry.module, entry.name))
    assert all(type(value) is np.ndarray and value.dtype.kind in "biuf" for value in arrays)
    assert sum({id(value): value.nbytes for value in arrays}.values()) <= 2 * len(data)
    if b"bfloat16" not in data:
        assert same_values(checkpoint, trusted(data))
    return True


def check_many(count: int, seed: int, folder: Path) -> int:
    """How many of `count` damaged files still loaded."""
    damage = Damage(seeds_to_damage(), seed)
    return sum(check_damaged(folder / "damaged.pystate", damage()) for _ in range(count))


@pytest.mark.medium
def test_damaged_files_raise_nothing_else_and_load_nothing_wrong(tmp_path, standins):
    loaded = check_many(2000, 0, tmp_path)
    # Damage to data and names goes unseen; if nothing loaded, or everything did, the damage would be of no use.
    assert 100 < loaded < 1500


@pytest.mark.slow
def test_ten_times_as_many_damaged_files(tmp_path, standins):
    assert 1000 < check_many(20_000, 1, tmp_path) < 15_000


def test_damaged_files_take_no_more_memory_than_three_times_their_size(tmp_path, standins):
    damage = Damage(seeds_to_damage(), 2)
    path = tmp_path / "damaged.pystate"
    for _ in range(300):
        data = damage()
        write_new(path, data)
        assert peak_memory(path) < 3 * len(data) + OVERHEAD


def test_damaged_models_raise_nothing_else(tmp_path):
    damage = Damage([path.read_bytes() for path in MODEL_SAMPLES], 3)
    for _ in range(100):
        check_damaged(tmp_path / "damaged.pystate", damage())
