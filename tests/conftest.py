"""What every test starts from: no Hub, fixed seeds, threads as the environment says, and the stored references."""

import os

# Read once by huggingface_hub and matplotlib, when they are imported.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from collections.abc import Callable
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

REFERENCE_DIR = Path(__file__).parent / "reference"

# torch takes its threads from OMP_NUM_THREADS. Where that says nothing, the processes of pytest-xdist have one each:
# with more they would only wait for one another.
if "PYTEST_XDIST_WORKER" in os.environ and "OMP_NUM_THREADS" not in os.environ:
    torch.set_num_threads(1)

# The same examples on every run, so that a failure is found again; no deadline on shared machines.
hypothesis.settings.register_profile("project", deadline=None, derandomize=True)
hypothesis.settings.load_profile("project")


class Reference:
    """The arrays of one stored .npz, as tensors: `ref.outputs`, or `ref["a/b"]` for names that are no identifiers."""

    def __init__(self, path: Path):
        with np.load(path) as arrays:
            # Text has no tensor and stays a numpy array.
            self.arrays = {k: v if v.dtype.kind in "US" else torch.from_numpy(v) for k, v in arrays.items()}
        self.path = path

    def __getitem__(self, name: str) -> torch.Tensor:
        if name not in self.arrays:
            raise KeyError(f"{self.path.name} has no {name!r}; it has {sorted(self.arrays)}")
        return self.arrays[name]

    def __getattr__(self, name: str) -> torch.Tensor:
        if name.startswith("__") or name in ("arrays", "path"):
            raise AttributeError(name)
        return self[name]

    def __contains__(self, name: str) -> bool:
        return name in self.arrays


@pytest.fixture(autouse=True)
def seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def reference() -> Callable[[str], Reference]:
    """`reference("masked_lm_a")` reads tests/reference/masked_lm_a.npz."""

    def load(name: str) -> Reference:
        path = REFERENCE_DIR / f"{name}.npz"
        if not path.is_file():
            known = sorted(p.stem for p in REFERENCE_DIR.glob("*.npz"))
            raise FileNotFoundError(f"no reference {name!r} in tests/reference; it holds {known}")
        return Reference(path)

    return load
