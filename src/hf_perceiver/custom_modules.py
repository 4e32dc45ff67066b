"""A user's parts in a config: which there are, which module registered them, and importing it from a checkpoint."""

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import cached_file

from .registry import OUTPUT_QUERIES, POSITION_ENCODINGS, POSTPROCESSORS, PREPROCESSORS, STEMS, Registry

# The names under which specs stand in a config, and in one another.
SPECS = {
    "preprocessor": PREPROCESSORS,
    "output_query": OUTPUT_QUERIES,
    "postprocessor": POSTPROCESSORS,
    "stem": STEMS,
    "position": POSITION_ENCODINGS,
}

# What from_pretrained passes on to every download.
DOWNLOAD = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")


def note_custom_modules(config: Any) -> None:
    """Write into the config which modules registered its parts, so that whoever lacks them is told what is missing.

    Raises ValueError when that is now: parts that no one registered, in a config that says who did.
    """
    known = list(config.custom_modules or [])
    missing = missing_kinds(config)
    if missing and known:
        source = config.name_or_path or "this config"
        raise ValueError(
            f"{source} uses {', '.join(missing)}, registered by {', '.join(known)}: import that first, or, if its file "
            "lies beside the weights (save_with_code puts it there), load with trust_remote_code=True to run it"
        )
    for cls in custom_classes(config):
        name = cls.__module__.removeprefix(f"{__package__}.")
        if name.rsplit(".", 1)[-1] not in {other.rsplit(".", 1)[-1] for other in known}:
            known.append(name)
            config.custom_modules = list(known)


def import_custom_modules(name_or_path: str | Path, config_class: Any, config: Any = None, **kwargs: Any) -> None:
    """Import the files that a checkpoint brings along, where its config names kinds that nobody has registered yet.

    They run as if they were modules of this package. Arguments as for `from_pretrained`; only for checkpoints that the
    user trusts.
    """
    download = {name: kwargs[name] for name in DOWNLOAD if name in kwargs}
    if not isinstance(config, PretrainedConfig):  # code from a folder has a config class of its own
        config = config_class.get_config_dict(config or name_or_path, **download)[0]
    if not missing_kinds(config):
        return
    for name in _fields(config).get("custom_modules") or []:
        path = cached_file(str(name_or_path), f"{name}.py", _raise_exceptions_for_missing_entries=False, **download)
        if path is None:
            continue  # the model says which kind is missing
        full_name = f"{__package__}.{name}"
        spec = importlib.util.spec_from_file_location(full_name, path)
        module = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        sys.modules[full_name] = module
        try:
            spec.loader.exec_module(module)  # type: ignore[union-attr]
        except BaseException:
            del sys.modules[full_name]
            raise


def custom_classes(config: Any) -> list[type]:
    """The classes of a config's parts that do not ship with this package."""
    found: dict[type, None] = {}
    for registries, kind in _kinds(config):
        found |= {r.classes[kind]: None for r in registries if kind in r.classes and kind not in r.packaged}
    return list(found)


def missing_kinds(config: Any) -> list[str]:
    """What a config names and nobody registered, such as "preprocessor kind 'points'"."""
    missing: dict[str, None] = {}
    for registries, kind in _kinds(config):
        if len(registries) == 1 and kind not in registries[0].classes:
            missing[f"{registries[0].part} kind {kind!r}"] = None
    return list(missing)


def _kinds(config: Any) -> Iterator[tuple[Sequence[Registry], str]]:
    for side in ("preprocessor", "output_query", "postprocessor"):
        yield from spec_kinds(_fields(config).get(side), [SPECS[side]])


def _fields(config: Any) -> dict[str, Any]:
    return config if isinstance(config, dict) else vars(config)


def spec_kinds(spec: Any, registries: Sequence[Registry]) -> Iterator[tuple[Sequence[Registry], str]]:
    """Every kind in a spec and the specs within it, each with the registries that may know it."""
    if not isinstance(spec, dict):
        return
    if isinstance(spec.get("kind"), str):
        yield registries, spec["kind"]
    for name, value in spec.items():
        if name in SPECS:
            yield from spec_kinds(value, [SPECS[name]])
        elif name == "modalities" and isinstance(value, dict):
            for modality in value.values():
                yield from spec_kinds(modality, registries)
        else:
            # A user's part may hold specs, or dicts that look like one, under names of its own.
            yield from spec_kinds(value, list(SPECS.values()))
