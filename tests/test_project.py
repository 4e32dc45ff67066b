"""The project's own promises: what it declares, what it must not contain, and which file may import which."""

import ast
import configparser
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

import hf_perceiver

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "hf_perceiver"

# A file imports from its own layer and those before it.
LAYERS = [
    [
        "configuration_perceiver_io",
        "registry",
        "custom_modules",
        "position_encoding",
        "stems",
        "arrays",
        "tiled_attention",
        "products",
        "attention",
        "fast_attention",
        "fast_reading",
        "fast_writing",
        "checkpoint_names",
        "checkpoint_weights",
    ],
    ["preprocessors", "output_queries", "postprocessors", "losses", "recipes", "weight_init"],
    ["modeling_perceiver_io"],
    ["heads_text", "heads_vision", "heads_multimodal"],
    ["builtin", "bundled", "hub", "flow_files", "flow_metrics"],
    [
        "pipeline_optical_flow",
        "pipeline_multimodal_autoencoding",
        "pipeline_fill_mask",
        "flow",
        "export",
        "export_inputs",
        "traced_attention",
    ],
]
# Files <-> tensors: beside the model, on the configuration alone.
PROCESSORS = [
    "tokenization_perceiver_io",
    "image_processing_perceiver_io",
    "feature_extraction_perceiver_io",
    "video_processing_perceiver_io",
    "processing_perceiver_io",
    "media_files",
]
# The standard library aside. A file may use more, but only inside a function: these are all that is sure to be there.
THIRD_PARTY = {"torch", "numpy", "transformers", "huggingface_hub", "safetensors", "tokenizers", "tqdm", "packaging"}

# Started with `python -m`, never copied to the Hub and imported by nothing, so free to import what it likes.
PROGRAMS = ["demo"]

FLAT_FILES = sorted(p for p in PACKAGE.glob("*.py") if p.stem not in ["__init__", *PROGRAMS])


def setup_cfg() -> configparser.ConfigParser:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return config


def relative_imports(path: Path) -> set[str]:
    """The modules of the package that a flat file imports, wherever in the file it does."""
    nodes = ast.walk(ast.parse(path.read_text()))
    return {(n.module or "") for n in nodes if isinstance(n, ast.ImportFrom) and n.level}


def allowed_imports(name: str) -> set[str]:
    if name in PROCESSORS:
        return {"configuration_perceiver_io", *PROCESSORS}
    depth = next(i for i, layer in enumerate(LAYERS) if name in layer)
    allowed = {other for layer in LAYERS[: depth + 1] for other in layer}
    # Pipelines and commands also handle files; the model never does.
    return allowed | set(PROCESSORS) if depth == len(LAYERS) - 1 else allowed


def tracked_files() -> list[Path]:
    """Every file that git tracks or would track; skips where there is no git, in an unpacked archive for one."""
    try:
        listing = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    return [ROOT / name for name in listing.split("\0") if name and (ROOT / name).is_file()]


def test_the_version_is_written_in_one_place():
    assert setup_cfg()["metadata"]["version"] == "attr: hf_perceiver.__version__"
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev\d+)?", hf_perceiver.__version__)


def test_the_changelog_knows_the_version():
    assert f"\n## {hf_perceiver.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_promised_extras_exist():
    extras = setup_cfg()["options.extras_require"]
    assert set(extras) == {"test", "train", "audio", "video", "peft", "export", "notebooks"}
    assert all(extras[name].strip() for name in extras)


def test_bundled_checkpoints_are_packaged():
    assert "checkpoints/*/*" in setup_cfg()["options.package_data"]["hf_perceiver"].split()


def test_every_folder_of_code_is_a_package_that_gets_installed():
    # setuptools' `find:` passes over folders without __init__.py, and only an installation would notice.
    folders = {path.parent for path in PACKAGE.rglob("*.py")}
    assert not [folder.name for folder in folders if not (folder / "__init__.py").is_file()]


def test_every_requirement_of_the_test_environment_is_pinned():
    config = setup_cfg()
    lines = config["options"]["install_requires"].splitlines() + config["options.extras_require"]["test"].splitlines()
    required = {re.split(r"[<>=!~ ]", line)[0] for line in lines if line}
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9.-]+==[0-9][0-9a-z.]*", pin) for pin in pins), "name==version, without a build tag"
    assert required <= {pin.split("==")[0] for pin in pins}


def test_no_tracked_file_names_a_path_of_one_machine():
    # Not preceded by a word or a dot: "docs/work" and "../tmp/x" are no absolute paths.
    machine_path = re.compile(r"(?:^|[^\w.])/(?:(?:work|farm)\b|(?:home|root|tmp)/[\w.])", re.MULTILINE)
    found = []
    for path in tracked_files():
        data = path.read_bytes()
        if b"\0" not in data:
            text = data.decode("utf-8", errors="replace")
            found += [f"{path.relative_to(ROOT)}: {match.group()}" for match in machine_path.finditer(text)]
    assert not found


def test_no_tracked_file_names_a_package_index():
    hosts = re.compile(rb"https?://[^\s\"')]*(?:/simple\b|/whl\b)|--(?:extra-)?index-url|--find-links")
    mine = Path(__file__).resolve()
    found = [p for p in tracked_files() if p.resolve() != mine and hosts.search(p.read_bytes())]
    assert not found


@pytest.mark.parametrize("path", FLAT_FILES, ids=lambda p: p.stem)
def test_imports_only_go_down(path):
    placed = {name for layer in [*LAYERS, PROCESSORS] for name in layer}
    assert path.stem in placed, "a new file needs its place in LAYERS, and in CONTRIBUTING.md"
    upward = relative_imports(path) - allowed_imports(path.stem)
    assert not upward, f"{path.name} may not import {sorted(upward)}"


def test_no_two_files_import_each_other():
    graph = {path.stem: relative_imports(path) for path in FLAT_FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, naming the files


@pytest.mark.parametrize("path", FLAT_FILES, ids=lambda p: p.stem)
def test_imports_have_the_one_form_that_travels_to_the_hub(path):
    """transformers copies a model's files by a regular expression: only `from .module import name` survives it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level <= 1, f"line {node.lineno}: the package is flat"
            assert node.module, f"line {node.lineno}: `from . import x` is not copied; write `from .x import name`"
            names = [node.module] if not node.level else []
            assert node.level == 0 or "." not in node.module, f"line {node.lineno}: no sub-package"
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            assert name.split(".")[0] != "hf_perceiver", f"line {node.lineno}: write `from .module import name`"

    # The expression reads docstrings as well: a sentence of that form would be taken for a file.
    seen = re.findall(r"^\s*from\s+\.(\S+)\s+import|^\s*import\s+\.(\S+)\s*$", path.read_text(), flags=re.MULTILINE)
    assert {first or second for first, second in seen} == relative_imports(path)


@pytest.mark.parametrize("path", FLAT_FILES, ids=lambda p: p.stem)
def test_importing_a_file_needs_nothing_but_transformers_and_its_dependencies(path):
    tree = ast.parse(path.read_text())
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    inside = {id(n) for function in functions for n in ast.walk(function)}
    needed = set()
    for node in ast.walk(tree):
        if id(node) in inside:
            continue
        if isinstance(node, ast.Import):
            needed |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            needed.add(node.module.split(".")[0])
    assert needed <= THIRD_PARTY | sys.stdlib_module_names


def test_no_file_of_the_library_imports_training_or_a_program():
    forbidden = {"training", "benchmark", *PROGRAMS}
    assert not [p.name for p in FLAT_FILES if forbidden & {name.split(".")[0] for name in relative_imports(p)}]


def test_configurations_keep_their_annotations_as_types():
    """With `from __future__ import annotations` they are strings, and @strict then checks nothing, silently."""
    for path in PACKAGE.glob("configuration_*.py"):
        futures = [n for n in ast.walk(ast.parse(path.read_text())) if getattr(n, "module", None) == "__future__"]
        assert not futures, path.name
