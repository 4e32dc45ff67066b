"""DeepMind's Perceiver checkpoints (.pystate, .pickle) -> numpy arrays, without running anything from the file.

A pickle is a program. The one here that reads it is not Python's: it knows the few operations that a mapping of
mappings of arrays needs, and the names in the file (`numpy.dtype`, Haiku's containers, JAX's arrays) stand for checks
in this module. Nothing is imported, looked up or called because the file says so; Haiku and JAX are not needed.

Three steps, each bounded by the size of the file:
1. the operations are run; array data is not read, only its place in the file is noted and its length compared with
   shape and dtype;
2. the result must be a mapping module path -> name -> array, or {"params": such a mapping, "state": such a mapping};
3. each array is read from the file straight into its own memory.

Protocols 0 and 1 are refused, and so are empty arrays of protocol 2: Python writes them with a call of `bytes`, which
is not on the list because no checkpoint holds an empty array.

Whatever is wrong with the contents is a `CheckpointError`. A file that is missing, a directory or not readable is the
usual OSError.
"""

import codecs
import math
import os
import pickletools
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import numpy as np

Arrays = dict[str, dict[str, np.ndarray]]

# An array takes about 40 operations, the largest released checkpoint holds 457 arrays. A file that is nothing but
# operations is refused after about a second and 60 MiB; only that may be more than three times a file's size.
MAX_OPERATIONS = 500_000
# Pickle writes mappings in batches of 1000 pairs, here at most four levels deep.
MAX_STACK = 20_000
MAX_NESTING = 20
MAX_DIMENSIONS = 32
# Longer texts and byte strings stay in the file until an array needs them. No name is that long.
SHORT = 1024
# An array without elements has no data to compare its other dimensions with.
MAX_EMPTY_BYTES = 1 << 40
# Text is decoded in parts that stay in the processor's cache.
CHUNK = 1 << 16

NUMBERS = ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")
OTHER_KINDS = {"O": "object", "V": "structured", "S": "byte string", "a": "byte string", "U": "text", "c": "complex"}
OTHER_FILES = {
    b"PK\x03\x04": "a zip (a torch file, or an .npz)",
    b"\x1f\x8b": "gzip, to be unpacked first",
    b"\x93NUMPY": "an .npy file",
    b"version https://git-lfs": "a Git LFS pointer, not the file itself: git lfs pull",
    b"<": "a web page or XML, probably in place of the download",
}


class CheckpointError(ValueError):
    """The file is not a Haiku checkpoint, is damaged, or asks for something that no checkpoint needs."""


class ArrayEntry(NamedTuple):
    """What is known of an array without its values; `dtype` as stored ("bfloat16" is loaded as float32)."""

    section: str  # "params" or "state"
    module: str
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def path(self) -> str:
        """module path/name"""
        return f"{self.module}/{self.name}"


@dataclass
class HaikuCheckpoint:
    """`params[module path][name]` and `state[module path][name]`: C-contiguous arrays in the machine's byte order.

    `state` is empty for models without batch norm. An array that stands at two places in the file is one array here.
    """

    params: Arrays
    state: Arrays = field(default_factory=dict)


def load_haiku_checkpoint(path: str | os.PathLike[str]) -> HaikuCheckpoint:
    """Raises CheckpointError for anything but a checkpoint, OSError if the file cannot be read.

    Takes about the memory of the arrays, twice for one array at a time where its byte order or layout is changed.
    """
    with _opened(path) as source:
        sections = _read_sections(source)
        _check_total(sections, source.size)
        loaded: dict[_Array, np.ndarray] = {}
        checkpoint = HaikuCheckpoint({})
        for section, modules in sections.items():
            target: Arrays = getattr(checkpoint, section)
            for module, arrays in modules.items():
                target[module] = {}
                for name, array in arrays.items():
                    if array not in loaded:
                        try:
                            loaded[array] = _load(array, source)
                        except CheckpointError as error:
                            raise CheckpointError(f"{section} of {_say(module)}, {_say(name)}: {error}") from None
                    target[module][name] = loaded[array]
        return checkpoint


def read_entries(path: str | os.PathLike[str]) -> list[ArrayEntry]:
    """What the file holds, in its order; no array is read. Raises as `load_haiku_checkpoint` does.

    Of protocol 2, where array data is text, only the possible range of its length is checked.
    """
    with _opened(path) as source:
        sections = _read_sections(source)
        _check_total(sections, source.size)
        return [
            ArrayEntry(section, module, name, array.shape, array.dtype.name)
            for section, modules in sections.items()
            for module, arrays in modules.items()
            for name, array in arrays.items()
        ]


def describe(checkpoint: HaikuCheckpoint) -> Iterator[ArrayEntry]:
    """Every array of a loaded checkpoint, parameters first."""
    for section, modules in (("params", checkpoint.params), ("state", checkpoint.state)):
        for module, arrays in modules.items():
            for name, array in arrays.items():
                yield ArrayEntry(section, module, name, array.shape, array.dtype.name)


# --- what stands for the objects of the file


@dataclass(frozen=True, eq=False)
class _Global:
    """A name of the allow-list; `make` checks the arguments of a call and returns what stands for the result."""

    name: str
    make: Callable[[tuple], object] | None = None


@dataclass(frozen=True, eq=False)
class _Text:
    """Text that is still in the file: too long for a name, but protocol 2 writes array data so."""

    offset: int
    length: int


@dataclass(frozen=True, eq=False)
class _Blob:
    """Bytes that are still in the file, as they are or as latin-1 text, where each takes one or two bytes of UTF-8."""

    offset: int
    length: int
    is_text: bool = False


@dataclass(eq=False)
class _Dtype:
    code: str  # one of NUMBERS, or "bfloat16"
    order: str | None = None  # "<" or ">", once its state is known

    @property
    def itemsize(self) -> int:
        return 2 if self.code == "bfloat16" else int(self.code[1])

    @property
    def stored(self) -> np.dtype:
        return np.dtype(f"{self.order}{'u2' if self.code == 'bfloat16' else self.code}")

    @property
    def name(self) -> str:
        return self.code if self.code == "bfloat16" else self.stored.name


@dataclass(eq=False)
class _Array:
    """Data in C order of `stored_shape`, whose axes are then permuted by `axes`."""

    dtype: _Dtype = field(default_factory=lambda: _Dtype(""))
    stored_shape: tuple[int, ...] = ()
    axes: tuple[int, ...] = ()
    data: bytes | _Blob | None = None  # None until its state is known

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.stored_shape[axis] for axis in self.axes)

    @property
    def nbytes(self) -> int:
        return math.prod(self.stored_shape) * self.dtype.itemsize


class _Tuple(tuple):
    depth = 1


def _say(value: object) -> str:
    """A value from the file for a message: short, ASCII, and without walking through it."""
    if value is None or isinstance(value, bool | int):
        return str(value)
    if isinstance(value, str | bytes):
        text = ascii(value[:80])
        return text if len(value) <= 80 else f"{text}..."
    if isinstance(value, _Global):
        return value.name
    kinds = {dict: "a mapping", _Tuple: "a tuple", _Text: "a long text", _Blob: "a long byte string", _Dtype: "a dtype"}
    return kinds.get(type(value), "an array")


def _is_flag(value: object) -> bool:
    return isinstance(value, bool | int) and value in (0, 1)


def _is_number(value: object, number: int) -> bool:
    # Not `==` alone: False is 0 and True is 1 for Python, but not for numpy.
    return type(value) is int and value == number


def _sizes(value: object, what: str) -> tuple[int, ...]:
    if type(value) is not _Tuple or any(type(size) is not int for size in value):
        raise CheckpointError(f"{what} is {_say(value)}; it must be a tuple of integers")
    if len(value) > MAX_DIMENSIONS:
        raise CheckpointError(f"{what} has {len(value)} dimensions; at most {MAX_DIMENSIONS} are allowed")
    return tuple(value)


# --- what the names of the allow-list do


def _make_mapping(arguments: tuple) -> object:
    if len(arguments) != 1 or type(arguments[0]) is not dict:
        raise CheckpointError("a Haiku container must be made from one mapping")
    return arguments[0]


def _make_bytes(arguments: tuple) -> object:
    if len(arguments) != 2 or arguments[1] != "latin1":
        raise CheckpointError("_codecs.encode is allowed with a text and 'latin1' only")
    text = arguments[0]
    if type(text) is str:
        return text.encode("latin1")
    if type(text) is _Text:
        return _Blob(text.offset, text.length, is_text=True)
    raise CheckpointError(f"_codecs.encode is called with {_say(text)}; only text can be encoded")


def _make_dtype(arguments: tuple) -> object:
    # "Aligned" is about structures only, and false wherever numpy writes it.
    if len(arguments) != 3 or not _is_flag(arguments[1]) or arguments[1] or not _is_flag(arguments[2]):
        raise CheckpointError("numpy.dtype must be called with a code, False and a flag, as numpy writes it")
    code = arguments[0]
    if code is _BFLOAT16:
        return _Dtype("bfloat16")
    if type(code) is not str or code not in NUMBERS:
        kind = f" ({OTHER_KINDS[code[0]]} dtype)" if type(code) is str and code[:1] in OTHER_KINDS else ""
        raise CheckpointError(f"dtype {_say(code)}{kind} is refused; allowed are {', '.join(NUMBERS)} and bfloat16")
    return _Dtype(code)


def _make_empty(arguments: tuple) -> object:
    is_right = len(arguments) == 3 and arguments[0] is _NDARRAY and arguments[2] == b"b"
    if not is_right or _sizes(arguments[1], "an empty array's shape") != (0,):
        raise CheckpointError("numpy's _reconstruct must be called with (numpy.ndarray, (0,), b'b')")
    return _Array()


def _make_scalar(arguments: tuple) -> object:
    if len(arguments) != 2:
        raise CheckpointError("numpy's scalar must be called with a dtype and its bytes")
    return _set_data(_Array(), arguments[0], (), (), arguments[1])


def _make_from_buffer(arguments: tuple) -> object:
    if len(arguments) not in (4, 5):
        raise CheckpointError("numpy's _frombuffer must be called with a buffer, a dtype, a shape and an order")
    data, dtype, shape_argument, order, *rest = arguments
    shape = _sizes(shape_argument, "an array's shape")
    if order == "C" and not rest:
        return _set_data(_Array(), dtype, shape, tuple(range(len(shape))), data)
    if order == "F" and not rest:
        return _set_data(_Array(), dtype, shape[::-1], tuple(range(len(shape)))[::-1], data)
    if order == "K" and rest:
        axes = _sizes(rest[0], "an array's order of axes")
        if sorted(axes) == list(range(len(shape))):
            return _set_data(_Array(), dtype, shape, axes, data)
    raise CheckpointError(f"array order {_say(order)} is refused; allowed are 'C', 'F', and 'K' with its axes")


def _make_from_jax(arguments: tuple) -> object:
    if len(arguments) != 4:
        raise CheckpointError("a JAX array must be made from numpy's function, arguments and state, and its own")
    function, function_arguments, state, own_state = arguments
    if type(function) is not _Global or function.make is not _make_empty or type(function_arguments) is not _Tuple:
        raise CheckpointError(f"a JAX array must be made by numpy's _reconstruct, not {_say(function)}")
    if type(own_state) is not dict or any(
        value != {} if type(value) is dict else not _is_flag(value) for value in own_state.values()
    ):
        raise CheckpointError("a JAX array's own state must be flags, such as {'weak_type': False}")
    return _set_array_state(_make_empty(function_arguments), state)


def _set_dtype_state(dtype: _Dtype, state: object) -> None:
    if dtype.order is not None:
        raise CheckpointError("a dtype's state is set twice")
    if type(state) is not _Tuple or len(state) != 8 or not _is_number(state[0], 3):
        raise CheckpointError("a dtype's state must be a tuple of 8 that starts with 3, as numpy writes it")
    _, order, subdtype, names, fields, itemsize, alignment, flags = state
    if not subdtype is names is fields is None:
        raise CheckpointError("structured dtypes are refused; only plain numbers are allowed")
    if type(order) is not str or order not in (("<", ">", "|") if dtype.itemsize == 1 else ("<", ">")):
        raise CheckpointError(f"byte order {_say(order)} of dtype {dtype.code!r} is refused; allowed are '<' and '>'")
    sizes = (-1, dtype.itemsize)
    # bfloat16's flags (0x10 to 0x40, by version) say that single values are read by a function. The lower ones, which
    # say that the memory holds objects or pointers, are nobody's here.
    allowed_flags = tuple(range(0, 0x80, 0x10)) if dtype.code == "bfloat16" else (0,)
    for value, allowed in ((itemsize, sizes), (alignment, sizes), (flags, allowed_flags)):
        if type(value) is not int or value not in allowed:
            raise CheckpointError(f"size, alignment or flags {_say(value)} do not belong to dtype {dtype.code!r}")
    dtype.order = "<" if order == "|" else order


def _set_array_state(array: object, state: object) -> _Array:
    assert type(array) is _Array
    if array.data is not None:
        raise CheckpointError("an array's state is set twice")
    if type(state) is not _Tuple or len(state) != 5 or not _is_number(state[0], 1) or not _is_flag(state[3]):
        raise CheckpointError("an array's state must be (1, shape, dtype, is Fortran order, bytes), as numpy writes it")
    shape = _sizes(state[1], "an array's shape")
    axes = tuple(range(len(shape)))
    if state[3]:
        return _set_data(array, state[2], shape[::-1], axes[::-1], state[4])
    return _set_data(array, state[2], shape, axes, state[4])


def _set_data(array: _Array, dtype: object, stored_shape: tuple, axes: tuple, data: object) -> _Array:
    """Compares length with shape and dtype, so that nothing larger than the file is ever asked for."""
    if type(dtype) is not _Dtype or dtype.order is None:
        raise CheckpointError(f"an array's dtype is {_say(dtype)}; it must be a numpy.dtype with its byte order")
    if not isinstance(data, bytes | _Blob):
        raise CheckpointError(f"an array's data is {_say(data)}; it must be bytes")
    shape = tuple(stored_shape[axis] for axis in axes)
    if any(size < 0 for size in shape):
        raise CheckpointError(f"shape {_say_shape(shape)} has a negative dimension")
    needed = math.prod(shape) * dtype.itemsize
    if needed == 0 and math.prod(size or 1 for size in shape) * dtype.itemsize > MAX_EMPTY_BYTES:
        raise CheckpointError(f"shape {_say_shape(shape)} of an empty array is absurd")
    if isinstance(data, _Blob):
        length = data.length
        # A character of latin-1 text is one or two bytes of the file; which, is seen when it is read.
        fits = needed <= length <= (2 * needed if data.is_text else needed)
    else:
        length = len(data)
        fits = length == needed
    if not fits:
        raise CheckpointError(
            f"an array of shape {_say_shape(shape)} and dtype {dtype.name} needs {needed} bytes, "
            f"the file gives it {length}"
        )
    array.dtype, array.stored_shape, array.axes, array.data = dtype, stored_shape, axes, data
    return array


def _say_shape(shape: tuple[int, ...]) -> str:
    return str(shape) if len(shape) <= 8 else f"{str(shape[:8])[:-1]}, ...)"


_NDARRAY = _Global("numpy.ndarray")
_BFLOAT16 = _Global("ml_dtypes.bfloat16")

# By module and name as they stand in the file. Nothing of these modules is looked up.
ALLOWED_GLOBALS = {
    ("numpy", "ndarray"): _NDARRAY,
    ("ml_dtypes", "bfloat16"): _BFLOAT16,
    **{
        (module, name): _Global(f"{module}.{name}", make)
        for modules, names, make in (
            (("haiku._src.data_structures",), ("FlatMapping", "FlatMap", "frozendict"), _make_mapping),
            (("_codecs",), ("encode",), _make_bytes),
            (("numpy",), ("dtype",), _make_dtype),
            (("numpy.core.multiarray", "numpy._core.multiarray"), ("_reconstruct",), _make_empty),
            (("numpy.core.multiarray", "numpy._core.multiarray"), ("scalar",), _make_scalar),
            (("numpy.core.numeric", "numpy._core.numeric"), ("_frombuffer",), _make_from_buffer),
            (("jax._src.array",), ("_reconstruct_array",), _make_from_jax),
            (("jax._src.device_array",), ("reconstruct_device_array",), _make_from_jax),
        )
        for module in modules
        for name in names
    },
}


# --- the file and its operations


class _Source:
    """The file, its size and how far it has been read."""

    def __init__(self, file: BinaryIO, size: int):
        self.file = file
        self.size = size
        self.position = 0

    def _advance(self, count: int) -> int:
        start = self.position
        if count > self.size - start:
            raise CheckpointError(
                f"{count} bytes are announced and {self.size - start} are left: "
                "the file is truncated or lies about a length"
            )
        self.position = start + count
        return start

    def take(self, count: int) -> bytes:
        self._advance(count)
        data = self.file.read(count)
        if len(data) != count:
            raise CheckpointError("the file became shorter while it was read")
        return data

    def number(self, width: int) -> int:
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        data = self.file.readline(256)
        self._advance(len(data))
        if not data.endswith(b"\n"):
            raise CheckpointError("a name is longer than 255 bytes, or the file is truncated")
        return data[:-1].decode("latin1")

    def skip(self, count: int) -> int:
        """The offset of what is skipped."""
        start = self._advance(count)
        self.file.seek(self.position)
        return start

    def read_into(self, blob: _Blob, target: memoryview) -> None:
        """Fills `target`, as long as the blob."""
        self.file.seek(blob.offset)
        done = 0
        while done < len(target):
            count = self.file.readinto(target[done:])  # type: ignore[attr-defined]
            if not count:
                raise CheckpointError("the file became shorter while it was read")
            done += count

    def decode_into(self, blob: _Blob, target: np.ndarray) -> None:
        """Fills `target`, uint8, with the characters of the text; raises if there are fewer or more."""
        self.file.seek(blob.offset)
        decoder = codecs.getincrementaldecoder("utf-8")()
        done, left = 0, blob.length
        while left:
            data = self.file.read(min(left, CHUNK))
            if not data:
                raise CheckpointError("the file became shorter while it was read")
            left -= len(data)
            try:
                part = decoder.decode(data, final=not left).encode("latin1")
            except UnicodeError as error:
                raise CheckpointError(f"array data is not latin-1 text: {error.reason}") from None  # type: ignore[attr-defined]
            if len(part) > len(target) - done:
                raise CheckpointError(f"array data is longer than the {len(target)} bytes of its shape and dtype")
            target[done : done + len(part)] = np.frombuffer(part, np.uint8)
            done += len(part)
        if done != len(target):
            raise CheckpointError(f"array data has {done} of the {len(target)} bytes of its shape and dtype")


class _Machine:
    """The operations of pickle protocols 2 to 5 that a checkpoint needs, on values of this module only."""

    def __init__(self, source: _Source):
        self.source = source
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below the open marks
        self.held = 0  # values on those
        self.memo: dict[int, Any] = {}
        self.frame_end = 0

    def run(self) -> object:
        source = self.source
        for _ in range(MAX_OPERATIONS):
            start = source.position
            try:
                if start == source.size:
                    raise CheckpointError("the file ends before its pickle does: it is truncated")
                code = source.take(1)
                if code == b".":
                    return self._stop()
                if code not in OPERATIONS:
                    self._refuse(code)
                operation, *arguments = OPERATIONS[code]
                operation(self, *arguments)
                if start < self.frame_end < source.position:
                    raise CheckpointError(f"the frame that ends at byte {self.frame_end} ends inside an operation")
                if len(self.stack) + self.held > MAX_STACK:
                    raise CheckpointError(f"more than {MAX_STACK} values are piled up")
            except CheckpointError as error:
                raise CheckpointError(f"byte {start}: {error}") from None
        raise CheckpointError(f"more than {MAX_OPERATIONS} operations; no checkpoint needs them")

    def _stop(self) -> object:
        source = self.source
        if source.position != source.size:
            raise CheckpointError(f"{source.size - source.position} bytes follow the end of the pickle")
        if self.frame_end > source.position:
            raise CheckpointError("the last frame is longer than the file")
        if self.marked:
            raise CheckpointError("the pickle ends inside a mapping or tuple")
        if len(self.stack) != 1:
            raise CheckpointError(f"the pickle ends with {len(self.stack)} values instead of one")
        return self.stack[0]

    def _refuse(self, code: bytes) -> None:
        name = OPERATION_NAMES.get(code.decode("latin1"))
        if name is None:
            raise CheckpointError(f"{code!r} is not a pickle operation; the file is damaged or not a pickle")
        what = f"INST of {_say(self.source.line() + '.' + self.source.line())}" if name == "INST" else name
        raise CheckpointError(f"operation {what} is refused: {REFUSED.get(name, 'no checkpoint needs it')}")

    def pop(self) -> Any:
        if not self.stack:
            raise CheckpointError("an operation needs a value and there is none")
        return self.stack.pop()

    def pop_to_mark(self) -> list[Any]:
        if not self.marked:
            raise CheckpointError("an operation needs a mark and there is none")
        items, self.stack = self.stack, self.marked.pop()
        self.held -= len(self.stack)
        return items

    # Each is an entry of OPERATIONS.

    def mark(self) -> None:
        if len(self.marked) == MAX_NESTING:
            raise CheckpointError(f"more than {MAX_NESTING} values are nested in each other")
        self.held += len(self.stack)
        self.marked.append(self.stack)
        self.stack = []

    def frame(self) -> None:
        start = self.source.position - 1
        length = self.source.number(8)
        if start < self.frame_end:
            raise CheckpointError("a frame starts inside another")
        if length > self.source.size - self.source.position:
            raise CheckpointError(
                f"a frame of {length} bytes is announced and {self.source.size - self.source.position} are left: "
                "the file is truncated or lies about a length"
            )
        self.frame_end = self.source.position + length

    def constant(self, value: object) -> None:
        self.stack.append(value)

    def integer(self, width: int, signed: bool) -> None:
        self.stack.append(int.from_bytes(self.source.take(width), "little", signed=signed))

    def long_integer(self) -> None:
        width = self.source.number(1)
        if width > 8:
            raise CheckpointError(f"an integer of {width} bytes is refused; 8 are enough for any size")
        self.integer(width, True)

    def text(self, width: int) -> None:
        length = self.source.number(width)
        if length > SHORT:
            self.stack.append(_Text(self.source.skip(length), length))
            return
        data = self.source.take(length)
        try:
            text = data.decode("utf-8")
        except UnicodeError:
            raise CheckpointError(f"text {_say(data)} is not UTF-8") from None
        if text and max(text) > "\xff":
            raise CheckpointError(f"text {_say(text)} has characters that are neither a name's nor a byte's")
        self.stack.append(text)

    def byte_string(self, width: int) -> None:
        length = self.source.number(width)
        if length > SHORT:
            self.stack.append(_Blob(self.source.skip(length), length))
        else:
            self.stack.append(self.source.take(length))

    def empty_dict(self) -> None:
        self.stack.append({})

    def fixed_tuple(self, count: int) -> None:
        self._push_tuple([self.pop() for _ in range(count)][::-1])

    def marked_tuple(self) -> None:
        self._push_tuple(self.pop_to_mark())

    def _push_tuple(self, items: list[Any]) -> None:
        value = _Tuple(items)
        value.depth = 1 + max((item.depth for item in items if type(item) is _Tuple), default=0)
        if value.depth > MAX_NESTING:
            raise CheckpointError(f"more than {MAX_NESTING} tuples are nested in each other")
        self.stack.append(value)

    def set_item(self) -> None:
        value = self.pop()
        self._set_items([self.pop(), value])

    def set_items(self) -> None:
        self._set_items(self.pop_to_mark())

    def _set_items(self, items: list[Any]) -> None:
        if not self.stack or type(self.stack[-1]) is not dict:
            what = _say(self.stack[-1]) if self.stack else "nothing"
            raise CheckpointError(f"items are set in {what}; only a mapping has items")
        if len(items) % 2:
            raise CheckpointError("a mapping gets a key without a value")
        target = self.stack[-1]
        for key, value in zip(items[::2], items[1::2], strict=True):
            if type(key) is not str:
                raise CheckpointError(f"{_say(key)} is a mapping's key; keys must be text")
            if key in target:
                raise CheckpointError(f"the key {_say(key)} is set twice")
            target[key] = value

    def put(self, width: int | None) -> None:
        index = len(self.memo) if width is None else self.source.number(width)
        if not self.stack:
            raise CheckpointError("nothing is there to remember")
        if index > MAX_OPERATIONS or index in self.memo:
            raise CheckpointError(f"memo entry {index} is {'used twice' if index in self.memo else 'absurdly high'}")
        self.memo[index] = self.stack[-1]

    def get(self, width: int) -> None:
        index = self.source.number(width)
        if index not in self.memo:
            raise CheckpointError(f"memo entry {index} is asked for before it is set")
        self.stack.append(self.memo[index])

    def line_global(self) -> None:
        module = self.source.line()
        self._push_global(module, self.source.line())

    def stack_global(self) -> None:
        name = self.pop()
        self._push_global(self.pop(), name)

    def _push_global(self, module: object, name: object) -> None:
        if type(module) is not str or type(name) is not str:
            raise CheckpointError(f"a global is named by {_say(module)} and {_say(name)}, not by text")
        if (module, name) not in ALLOWED_GLOBALS:
            raise CheckpointError(
                f"the global {_say(f'{module}.{name}')} is refused; checkpoints need Haiku's mappings and numpy's or "
                "JAX's arrays only (if you trust the file, pickle it again as a dict of dicts of numpy arrays)"
            )
        self.stack.append(ALLOWED_GLOBALS[module, name])

    def reduce(self) -> None:
        arguments = self.pop()
        function = self.pop()
        if type(function) is not _Global or function.make is None:
            raise CheckpointError(f"REDUCE calls {_say(function)}, which is refused")
        if type(arguments) is not _Tuple:
            raise CheckpointError(f"REDUCE calls {function.name} with {_say(arguments)} instead of a tuple")
        self.stack.append(function.make(arguments))

    def build(self) -> None:
        state = self.pop()
        target = self.pop()
        if type(target) is _Dtype:
            _set_dtype_state(target, state)
        elif type(target) is _Array:
            _set_array_state(target, state)
        else:
            raise CheckpointError(f"BUILD sets the state of {_say(target)}, which is refused")
        self.stack.append(target)


# What Python's and C's picklers write for mappings, arrays, flags and sizes.
OPERATIONS: dict[bytes, tuple] = {
    b"(": (_Machine.mark,),
    b"\x95": (_Machine.frame,),
    b"N": (_Machine.constant, None),
    b"\x88": (_Machine.constant, True),
    b"\x89": (_Machine.constant, False),
    b")": (_Machine.constant, _Tuple()),
    b"J": (_Machine.integer, 4, True),
    b"K": (_Machine.integer, 1, False),
    b"M": (_Machine.integer, 2, False),
    b"\x8a": (_Machine.long_integer,),
    b"\x8c": (_Machine.text, 1),
    b"X": (_Machine.text, 4),
    b"\x8d": (_Machine.text, 8),
    b"C": (_Machine.byte_string, 1),
    b"B": (_Machine.byte_string, 4),
    b"\x8e": (_Machine.byte_string, 8),
    b"\x96": (_Machine.byte_string, 8),
    b"}": (_Machine.empty_dict,),
    b"\x85": (_Machine.fixed_tuple, 1),
    b"\x86": (_Machine.fixed_tuple, 2),
    b"\x87": (_Machine.fixed_tuple, 3),
    b"t": (_Machine.marked_tuple,),
    b"s": (_Machine.set_item,),
    b"u": (_Machine.set_items,),
    b"q": (_Machine.put, 1),
    b"r": (_Machine.put, 4),
    b"\x94": (_Machine.put, None),
    b"h": (_Machine.get, 1),
    b"j": (_Machine.get, 4),
    b"c": (_Machine.line_global,),
    b"\x93": (_Machine.stack_global,),
    b"R": (_Machine.reduce,),
    b"b": (_Machine.build,),
}

OPERATION_NAMES = {operation.code: operation.name for operation in pickletools.opcodes}

REFUSED = {
    **dict.fromkeys(("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"), "it makes an instance of a class"),
    **dict.fromkeys(("PERSID", "BINPERSID"), "it asks for an object outside the file"),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), "it asks copyreg for a global"),
    **dict.fromkeys(("NEXT_BUFFER", "READONLY_BUFFER"), "its data is outside the file"),
    "LONG4": "no size needs an integer that long",
    "PROTO": "the protocol stands at the start of the file only",
}


# --- from the file to the arrays


@contextmanager
def _opened(path: str | os.PathLike[str]) -> Iterator[_Source]:
    """Puts the file's name in front of every CheckpointError."""
    try:
        # Opening a pipe would wait for its writer.
        mode = os.stat(path).st_mode
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise CheckpointError("not a regular file")
        with open(path, "rb") as file:
            yield _Source(file, os.fstat(file.fileno()).st_size)
    except CheckpointError as error:
        raise CheckpointError(f"{os.fspath(path)}: {error}") from None


def _read_sections(source: _Source) -> dict[str, dict[str, dict[str, _Array]]]:
    _check_start(source)
    return _to_sections(_Machine(source).run())


def _check_start(source: _Source) -> None:
    start = source.take(min(32, source.size))
    source.position = 2
    source.file.seek(2)
    for magic, what in OTHER_FILES.items():
        if start.startswith(magic):
            raise CheckpointError(f"not a pickle, but {what}")
    if len(start) < 2 or start[:1] != b"\x80":
        raise CheckpointError("not a pickle of protocol 2 to 5: it does not start with a protocol number")
    if not 2 <= start[1] <= 5:
        raise CheckpointError(f"pickle protocol {start[1]} is refused; 2 to 5 are allowed")


def _to_sections(result: object) -> dict[str, dict[str, dict[str, _Array]]]:
    if type(result) is not dict:
        raise CheckpointError(f"the file holds {_say(result)}; it must be a mapping of module paths")
    params = result.get("params")
    is_split = type(params) is dict and all(type(value) is dict for value in params.values())
    for key in result if is_split else ():
        if key not in ("params", "state"):
            raise CheckpointError(f"{_say(key)} stands beside 'params'; only 'state' is allowed there")
    sections = result if is_split else {"params": result}
    seen: set[int] = set()
    for section, modules in sections.items():
        _check_mapping(modules, section, seen)
        for module, arrays in modules.items():
            _check_mapping(arrays, f"{section} of {_say(module)}", seen)
            for name, array in arrays.items():
                for key in (module, name):
                    if not key or not key.isascii() or not key.isprintable():
                        raise CheckpointError(f"{_say(key)} is not a name; names are printable ASCII")
                if type(array) is not _Array or array.data is None:
                    what = "an array without its data" if type(array) is _Array else _say(array)
                    raise CheckpointError(f"{section} of {_say(module)}, {_say(name)}, is {what}; it must be an array")
    if not any(sections["params"].values()):
        raise CheckpointError("the file holds no parameters")
    return sections


def _check_mapping(value: object, what: str, seen: set[int]) -> None:
    if type(value) is not dict:
        raise CheckpointError(f"{what} is {_say(value)}; it must be a mapping (module path -> name -> array)")
    # A few mappings that hold each other many times would become more entries than the file has bytes.
    if id(value) in seen:
        raise CheckpointError(f"{what} is a mapping that stands at another place too (a memo bomb, or a damaged file)")
    seen.add(id(value))


def _check_total(sections: dict[str, dict[str, dict[str, _Array]]], size: int) -> None:
    arrays = {array for modules in sections.values() for named in modules.values() for array in named.values()}
    total = sum(array.nbytes for array in arrays)
    if total > size:
        raise CheckpointError(f"arrays of {total} bytes share data in a file of {size} bytes (a memo bomb)")


def _load(array: _Array, source: _Source) -> np.ndarray:
    stored = np.empty(array.stored_shape, array.dtype.stored)
    raw = stored.reshape(-1).view(np.uint8)
    if type(array.data) is bytes:
        raw[:] = np.frombuffer(array.data, np.uint8)
    elif type(array.data) is _Blob and array.data.is_text:
        source.decode_into(array.data, raw)
    elif type(array.data) is _Blob:
        source.read_into(array.data, raw.data)
    if array.dtype.code == "b1" and raw.size and raw.max() > 1:
        raise CheckpointError(f"a bool array holds the byte {raw.max()}; only 0 and 1 are allowed")
    permuted = stored.transpose(array.axes)
    if array.dtype.code == "bfloat16":
        # bfloat16 is the upper half of float32.
        wide = permuted.astype(np.uint32, order="C")
        wide <<= 16
        return wide.view(np.float32)
    return np.asarray(permuted, permuted.dtype.newbyteorder("="), order="C")
