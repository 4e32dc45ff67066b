"""Checkpoints that bring their code along, for `trust_remote_code=True`: the model's own files and a user's parts.

transformers reads `from .module import name` lines to find the files that a file needs, so a user's module travels as a
copy whose imports have that one form, and the copied modeling file ends by importing it: loading the model registers
the parts.
"""

import ast
import graphlib
import json
import os
import re
import shutil
import sys
import sysconfig
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any

from transformers.dynamic_module_utils import get_relative_import_files
from transformers.feature_extraction_utils import FeatureExtractionMixin
from transformers.image_processing_utils import BaseImageProcessor
from transformers.processing_utils import ProcessorMixin

from .custom_modules import custom_classes

PACKAGE = "hf_perceiver"
CODE = Path(__file__).parent
MODELING = "modeling_perceiver_io"
# The files that config.json's auto_map may name; each imports the modeling file.
HEADS = ("heads_multimodal", "heads_text", "heads_vision")
# What travels of this package's processors: the Auto class that loads it, and the file that says where its code is. The
# tokenizer is not among them, transformers reads its file without code.
PROCESSORS = {
    BaseImageProcessor: ("AutoImageProcessor", "preprocessor_config.json"),
    FeatureExtractionMixin: ("AutoFeatureExtractor", "preprocessor_config.json"),
    ProcessorMixin: ("AutoProcessor", "processor_config.json"),
}
MARKER = "\n\n# Written by save_with_code: these files register parts that the config names.\n"


def save_with_code(
    model: Any,
    directory: str | Path,
    extra_modules: Iterable[ModuleType | str | Path] = (),
    processors: Iterable[Any] = (),
    repo_id: str | None = None,
    private: bool | None = None,
    max_shard_size: int | str = "50GB",
) -> None:
    """Save a model with the Python files it needs: `AutoModel.from_pretrained(directory, trust_remote_code=True)` then
    works where this package is not installed.

    Modules that register the model's own parts come along by themselves. extra_modules: others that those import, as
    modules or paths; each is one file, and what it imports from this package is rewritten in the copy. processors:
    tokenizers and others to save beside the model, with their code if they are this package's. repo_id: the folder is
    pushed there too (`private` as in `create_repo`).

    The folder appears complete or not at all; in one that exists, files of the same names are replaced.
    Raises ValueError for a model of another package, and for a module that cannot travel: one of a notebook, a package
    of several files, a name that is taken, an import that has no relative form.
    """
    modeling = sys.modules.get(type(model).__module__)
    if modeling is None or Path(modeling.__file__ or "") not in [CODE / f"{name}.py" for name in (MODELING, *HEADS)]:
        raise ValueError(
            f"save_with_code saves this package's models, not a {type(model).__module__}.{type(model).__name__}; "
            "unwrap models of other libraries, and for a class of your own see transformers' register_for_auto_class"
        )
    processors = list(processors)
    parts = [part for processor in processors for part in _parts(processor).values()]
    own = [path.stem for path in map(_own_code, parts) if path is not None]
    files, modules = code_files([*_defining_modules(model.config), *extra_modules], own)
    directory = Path(os.path.abspath(directory))
    directory.parent.mkdir(parents=True, exist_ok=True)
    draft = directory.with_name(f".{directory.name}.{os.getpid()}.tmp")
    shutil.rmtree(draft, ignore_errors=True)
    try:
        model.save_pretrained(draft, max_shard_size=max_shard_size)
        for processor in processors:
            processor.save_pretrained(draft)
            _name_code(processor, draft)
        for name, text in files.items():
            (draft / name).write_text(text, encoding="utf-8")
        config = json.loads((draft / "config.json").read_text(encoding="utf-8"))
        config["auto_map"] = {**config.get("auto_map", {}), **auto_map(model)}
        if modules:
            config["custom_modules"] = modules
        (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _publish(draft, directory)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    if repo_id is not None:
        from huggingface_hub import HfApi

        repo_id = HfApi().create_repo(repo_id, private=private, exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=repo_id, folder_path=directory)


def auto_map(model: Any) -> dict[str, str]:
    """What config.json says about remote code: Auto class -> file and class, for each class that reads this input."""
    from transformers.models.auto import modeling_auto

    config = model.config
    kind = config.preprocessor["kind"]
    found = {"AutoConfig": f"{type(config).__module__.rsplit('.', 1)[-1]}.{type(config).__name__}"}
    for name, auto_class in vars(modeling_auto).items():
        mapping = getattr(auto_class, "_model_mapping", None)
        if not name.startswith("AutoModel") or mapping is None or type(config) not in mapping:
            continue
        made = mapping[type(config)]
        for head in made if isinstance(made, tuple) else (made,):
            kinds = getattr(head, "preprocessor_kinds", ())
            if not kinds or kind in kinds or isinstance(model, head):
                found[name] = f"{head.__module__.rsplit('.', 1)[-1]}.{head.__name__}"
    return found


def _own_code(processor: Any) -> Path | None:
    """The file of this package that defines a processor, if it is to travel."""
    file = Path(getattr(sys.modules.get(type(processor).__module__), "__file__", None) or "")
    return file if isinstance(processor, tuple(PROCESSORS)) and file.parent == CODE else None


def _parts(processor: Any) -> dict[str, Any]:
    """A processor under "", and those that it is made of under their names in its file."""
    names = processor.get_attributes() if isinstance(processor, ProcessorMixin) else []
    return {"": processor, **{name: getattr(processor, name) for name in names}}


def _name_code(processor: Any, directory: Path) -> None:
    """Say in a saved processor's file which code it needs, and which its parts need."""
    own = {name: part for name, part in _parts(processor).items() if _own_code(part) is not None}
    if not own:
        return
    file = directory / _of_kind(processor)[1]
    saved = json.loads(file.read_text(encoding="utf-8"))
    for name, part in own.items():
        entry = saved[name] if name else saved
        entry["auto_map"] = {_of_kind(part)[0]: f"{type(part).__module__.rsplit('.', 1)[-1]}.{type(part).__name__}"}
    file.write_text(json.dumps(saved, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _of_kind(processor: Any) -> tuple[str, str]:
    return next(value for base, value in PROCESSORS.items() if isinstance(processor, base))


def code_files(modules: Iterable[ModuleType | str | Path], own: Iterable[str] = ()) -> tuple[dict[str, str], list[str]]:
    """File name -> text of all that a checkpoint with these custom modules needs, and the modules in import order.

    own: modules of this package that come along beside the model's.
    Raises ValueError as save_with_code does.
    """
    custom: dict[str, Path] = {}
    for module in modules:
        path = _source(module)
        taken = custom.setdefault(path.stem, path)
        if taken != path:
            raise ValueError(f"{taken} and {path} would both be {path.name} in the checkpoint; rename one of them")
    texts = {stem: _with_relative_imports(path, custom) for stem, path in custom.items()}
    modeling = (CODE / f"{MODELING}.py").read_text(encoding="utf-8")
    needed = {MODELING}.union(*({name, *_closure(name)} for name in (*HEADS, *own)))
    graph = {}
    for stem, text in texts.items():
        imports = set(re.findall(r"^\s*from\s+\.(\S+)\s+import", text, flags=re.MULTILINE))
        for name in imports - set(custom):
            if not (CODE / f"{name}.py").is_file():
                raise ValueError(
                    f"{custom[stem]} imports .{name}, which does not travel (a sentence of that form in a docstring "
                    f"counts, too: transformers reads it so); add {name}.py to extra_modules, or drop the import"
                )
            needed |= {name, *_closure(name)}
        graph[stem] = imports & set(custom)
    try:
        order = list(graphlib.TopologicalSorter(graph).static_order())
    except graphlib.CycleError as error:
        raise ValueError(f"custom modules import each other in a circle: {' -> '.join(error.args[1])}") from None
    if order:
        modeling += MARKER + "".join(f"from .{stem} import __name__ as _{stem}  # noqa: E402, F401\n" for stem in order)
    files = {f"{name}.py": (CODE / f"{name}.py").read_text(encoding="utf-8") for name in sorted(needed)}
    files |= {f"{stem}.py": text for stem, text in texts.items()}
    return {**files, f"{MODELING}.py": modeling}, order


def _defining_modules(config: Any) -> list[ModuleType]:
    # What came with a checkpoint goes on with it, files that its parts import included.
    names = [f"{__package__}.{name}" for name in config.custom_modules or []]
    found = [sys.modules[name] for name in names if name in sys.modules]
    for cls in custom_classes(config):
        module = sys.modules.get(cls.__module__)
        if module is None:
            raise ValueError(f"{cls.__name__} was defined in {cls.__module__}, which is gone; import it again")
        found.append(module)
    return found


def _source(module: ModuleType | str | Path) -> Path:
    """The one file of a custom module."""
    if isinstance(module, ModuleType):
        name, file = module.__name__, getattr(module, "__file__", None)
        if name == "__main__" or file is None:
            raise ValueError(
                f"{name} is a script or a notebook, or has no file: put its parts into a file of their own and import "
                "them from there"
            )
        path = Path(file)
    else:
        path = Path(module)
        if not path.is_file():
            raise ValueError(f"extra_modules: there is no file {path}; give modules, or paths of .py files")
    path = Path(os.path.abspath(path))  # not resolved: in the Hub's cache files are links to names without a suffix
    if path.suffix != ".py" or path.stem == "__init__":
        raise ValueError(f"{path} is a package or no Python source; custom modules are single .py files, name each")
    if not path.stem.isidentifier():
        raise ValueError(f"{path.name} cannot be imported by that name; rename it to a Python identifier")
    if (CODE / path.name).is_file():
        raise ValueError(
            f"{path.name} is a file of this package, which travels by itself; rename {path}, if it is yours"
        )
    return path


def _with_relative_imports(path: Path, custom: dict[str, Path]) -> str:
    """A module's text, importing this package's and the other custom modules' names as `from .module import name`."""
    source = path.read_bytes()
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    edits = []
    for node in ast.walk(ast.parse(source, filename=str(path))):
        if not isinstance(node, (ast.Import, ast.ImportFrom)):
            continue
        lines = _relative_form(node, path, custom)
        if lines is None:
            continue
        begin = starts[node.lineno - 1] + node.col_offset
        end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[operator]
        indent = source[starts[node.lineno - 1] : begin]
        if indent.strip() or source[end:].split(b"\n")[0].strip().startswith(b";"):
            raise ValueError(f"{path}, line {node.lineno}: put this import on a line of its own, so that it is seen")
        edits.append((begin, end, (b"\n" + indent).join(line.encode() for line in lines)))
    for begin, end, text in sorted(edits, reverse=True):
        source = source[:begin] + text + source[end:]
    return source.decode("utf-8")


def _relative_form(node: ast.Import | ast.ImportFrom, path: Path, custom: dict[str, Path]) -> list[str] | None:
    """The lines to write in place of an import, None where it stays."""
    where = f"{path}, line {node.lineno}"
    if isinstance(node, ast.Import):
        for alias in node.names:
            if alias.name.split(".")[0] == PACKAGE or _local_file(alias.name, path) is not None:
                raise ValueError(f"{where}: write `from {alias.name} import name`; `import {alias.name}` cannot travel")
        return None
    module = node.module or ""
    names = ", ".join(a.name if a.asname is None else f"{a.name} as {a.asname}" for a in node.names)
    if node.level:
        if node.level > 1 or not module or "." in module:
            raise ValueError(
                f"{where}: in a checkpoint all files lie in one folder; write `from .module import {names}`, not "
                f"`from {'.' * node.level}{module} import {names}`"
            )
        neighbour = path.with_name(f"{module}.py")
        # In a checkpoint with code the neighbours of this package's names are its copies.
        copied = path.with_name(f"{MODELING}.py").is_file() and (CODE / f"{module}.py").is_file()
        if not copied and neighbour.is_file() and custom.get(module) != neighbour:
            raise ValueError(f"{where}: .{module} is imported from {neighbour}; add that to extra_modules")
        return None
    if module == PACKAGE:
        return _from_package(node, where)
    if module.startswith(f"{PACKAGE}."):
        name = module.removeprefix(f"{PACKAGE}.")
        if not (CODE / f"{name}.py").is_file():
            raise ValueError(f"{where}: only the single files of {PACKAGE} travel, {name!r} is none of them")
        return [f"from .{name} import {names}"]
    local = _local_file(module, path)
    if local is None:
        return None
    if custom.get(local.stem) != local:
        raise ValueError(f"{where}: {module} is imported from {local}; add that to extra_modules")
    return [f"from .{local.stem} import {names}"]


def _from_package(node: ast.ImportFrom, where: str) -> list[str]:
    """`from hf_perceiver import ...` as imports from the files that define the names."""
    homes: dict[str, tuple[str, str]] = {}
    for statement in ast.parse((CODE / "__init__.py").read_text(encoding="utf-8")).body:
        if isinstance(statement, ast.ImportFrom) and statement.level == 1 and statement.module:
            homes |= {alias.asname or alias.name: (statement.module, alias.name) for alias in statement.names}
    lines = []
    for alias in node.names:
        if alias.name not in homes:
            raise ValueError(
                f"{where}: {alias.name!r} is not defined in one file of the package; import what you need from it as "
                "`from hf_perceiver.module import name`"
            )
        module, name = homes[alias.name]
        bound = alias.asname or alias.name
        lines.append(f"from .{module} import {name}" + (f" as {bound}" if bound != name else ""))
    return lines


def _local_file(module: str, path: Path) -> Path | None:
    """The file that `module` means for a user's file at `path`, if it lies in the user's own source tree."""
    root, top = path.parent, module.split(".")[0]
    while (root / "__init__.py").is_file():
        root = root.parent
    # Beside an installed file lie other people's packages; its own are those under its own name.
    if str(root) in sysconfig.get_paths().values() and top != path.relative_to(root).parts[0]:
        return None
    found = root.joinpath(*module.split("."))
    for file in (found.with_suffix(".py"), found / "__init__.py"):
        if file.is_file():
            return file
    return None


def _closure(name: str) -> set[str]:
    """Modules of this package that one of them needs."""
    return {Path(file).stem for file in get_relative_import_files(CODE / f"{name}.py")}


def _publish(draft: Path, directory: Path) -> None:
    """Rename a finished folder, or its files into a folder that exists, config.json last."""
    if not directory.exists():
        os.replace(draft, directory)
        return
    if not directory.is_dir():
        raise ValueError(f"{directory} is a file; give a folder")
    names = sorted((p.name for p in draft.iterdir()), key=lambda name: name == "config.json")
    for name in names:
        os.replace(draft / name, directory / name)
    # Left by an earlier save, the other form of the weights would be read in place of the new one.
    weights = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors(\.index\.json)?|pytorch_model.*\.bin(\.index\.json)?")
    for path in directory.iterdir():
        if weights.fullmatch(path.name) and path.name not in names:
            path.unlink()
