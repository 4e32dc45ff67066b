"""Kinds: the table from a spec's `kind` to the class that it names, one table per side of the model.

A spec is a dict: `kind` names the class, every other entry is a keyword argument of its constructor. The constructor's
signature is the schema, so an unknown option is told which ones exist.
"""

import inspect
import json
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

# Integer options of this package's parts that may be 0; all others count from 1.
MAY_BE_ZERO = frozenset({"feature_channels", "min_padding_size", "num_extra_mlps"})


class Registry:
    """Kinds of one part of the model: `registry.register("kind")(cls)`, `registry.build(spec, ...)`."""

    def __init__(self, part: str, context: tuple[str, ...] = ()):
        self.part = part
        # What the model gives to a constructor that asks for it by name; never an option of a spec.
        self.context = context
        self.classes: dict[str, type[nn.Module]] = {}
        self.packaged: set[str] = set()

    def register(self, kind: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
        """Class decorator that makes `kind` usable in a spec.

        Raises ValueError if the kind is empty or belongs to a part that ships with this package; a user's own kind may
        be registered again, so that a notebook cell can be run twice.
        """
        if not isinstance(kind, str) or not kind:
            raise ValueError(f"a {self.part} kind is a non-empty string, not {kind!r}")

        def add(cls: type[nn.Module]) -> type[nn.Module]:
            if kind in self.packaged and not _same_class(self.classes[kind], cls):
                raise ValueError(f"{self.part} kind {kind!r} ships with hf_perceiver; choose another name")
            self.classes[kind] = cls
            return cls

        return add

    def seal(self) -> None:
        """Mark every kind registered so far as shipped with the package."""
        self.packaged = set(self.classes)

    def options(self, kind: str) -> dict[str, inspect.Parameter]:
        """Keyword arguments a spec of this kind may hold, by name."""
        parameters = inspect.signature(self.classes[kind].__init__).parameters.values()
        named = (p for p in parameters if p.kind in (p.KEYWORD_ONLY, p.POSITIONAL_OR_KEYWORD))
        return {p.name: p for p in named if p.name != "self" and p.name not in self.context}

    def build(self, spec: dict[str, Any], **context: Any) -> nn.Module:
        """The module a spec describes.

        `context` is what the model knows and no spec repeats (`config`, channel widths); a constructor gets those it
        names. Raises ValueError for an unknown kind, an unknown or missing option, or one of another type.
        """
        check_spec(self.part, spec)
        kind = spec["kind"]
        if kind not in self.classes:
            raise ValueError(
                f"unknown {self.part} kind {kind!r}; known kinds: {', '.join(sorted(self.classes))}. If it is your own "
                f"part, import the module that registers it first (register_{self.part.replace(' ', '_')}({kind!r})); "
                "save_with_code() takes that module along with the weights"
            )
        options = {name: value for name, value in spec.items() if name != "kind"}
        known = self.options(kind)
        takes_any = any(
            p.kind is p.VAR_KEYWORD for p in inspect.signature(self.classes[kind].__init__).parameters.values()
        )
        if not takes_any:
            for name in options:
                if name not in known:
                    raise ValueError(
                        f"unknown option {name!r} for {self.part} kind {kind!r}; its options: "
                        f"{', '.join(known) or 'none'}"
                    )
        for name, parameter in known.items():
            if name not in options:
                if parameter.default is parameter.empty:
                    raise ValueError(f"{self.part} kind {kind!r} needs the option {name!r}")
            elif not _is_of_type(options[name], parameter.annotation):
                wanted_type = inspect.formatannotation(parameter.annotation).replace("collections.abc.", "")
                raise ValueError(
                    f"option {name!r} of {self.part} kind {kind!r} must be of type {wanted_type}, not {options[name]!r}"
                )
            elif kind in self.packaged:
                _check_sizes(f"of {self.part} kind {kind!r}", name, options[name], parameter.annotation)
        wanted = inspect.signature(self.classes[kind].__init__).parameters
        return self.classes[kind](**options, **{name: value for name, value in context.items() if name in wanted})


def check_spec(part: str, spec: Any) -> None:
    """Raise ValueError unless `spec` is a JSON-able dict with a `kind`; the message names the part."""
    if not isinstance(spec, dict):
        raise ValueError(f"the {part} is described by a dict such as {{'kind': ...}}, not {spec!r}")
    if not isinstance(spec.get("kind"), str):
        raise ValueError(f"the {part} spec {spec!r} needs a 'kind' that is a string")
    try:
        json.dumps(spec, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the {part} spec must fit into config.json: {error} in {spec!r}") from None


def _is_of_type(value: Any, annotation: Any) -> bool:
    """Whether a spec's value has the annotated type; an annotation that JSON has no word for lets anything through."""
    origin, arguments = typing.get_origin(annotation) or annotation, typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return any(_is_of_type(value, a) for a in arguments)
    if origin in (None, types.NoneType):
        return value is None
    if origin in (int, float):
        return isinstance(value, int if origin is int else int | float) and not isinstance(value, bool)
    if origin in (str, bool):
        return isinstance(value, origin)
    if origin is typing.Literal:
        return value in arguments
    if origin in (list, tuple, Sequence):
        return isinstance(value, list | tuple) and all(_is_of_type(v, a) for a in arguments[:1] for v in value)
    if origin in (dict, Mapping):
        return isinstance(value, dict) and all(_is_of_type(v, a) for a in arguments[1:] for v in value.values())
    return True


def _check_sizes(where: str, name: str, value: Any, annotation: Any) -> None:
    """Raise ValueError for a width, a count or a grid too small to build; in this package's parts every integer is one."""
    if name in MAY_BE_ZERO and value == 0:
        return
    if isinstance(value, int) and _is_of_type(0, annotation) and not _is_of_type(0.5, annotation) and value < 1:
        least = 0 if name in MAY_BE_ZERO else 1
        none = "; leave it out, or null, for none" if _is_of_type(None, annotation) else ""
        raise ValueError(f"option {name!r} {where} must be at least {least}, not {value}{none}")
    sizes = value if isinstance(value, list | tuple) and _is_of_type([0], annotation) else [1]
    if not sizes or min(sizes) < 1:
        raise ValueError(f"option {name!r} {where} must hold sizes of at least 1, one or more, not {list(value)}")


def _same_class(a: type, b: type) -> bool:
    # Code from the Hub is imported as another module; by the names of file and class it is the same.
    return (a.__module__.split(".")[-1], a.__qualname__) == (b.__module__.split(".")[-1], b.__qualname__)


STEMS = Registry("stem")
POSITION_ENCODINGS = Registry("position encoding")
PREPROCESSORS = Registry("preprocessor", context=("config",))
OUTPUT_QUERIES = Registry("output query", context=("config", "preprocessor"))
POSTPROCESSORS = Registry("postprocessor", context=("config", "preprocessor", "in_channels"))

register_stem = STEMS.register
register_position_encoding = POSITION_ENCODINGS.register
register_preprocessor = PREPROCESSORS.register
register_output_query = OUTPUT_QUERIES.register
register_postprocessor = POSTPROCESSORS.register
