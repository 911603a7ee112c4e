"""Packages that swap_in replaces functions of: public code, and stand-ins."""

from __future__ import annotations

import contextlib
import importlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from torch.optim import _muon

DOUBLES = Path(__file__).parents[1] / "swap_doubles"
PEERS = "SPECTRAL_KERNELS_PEERS"
CLONES = ("SOAP", "Decoupled-Variance-Adaptation", "optimizers")
_PACKAGES = (
    "soap",
    "optimizers",
    "distributed_shampoo",
    "muon",
    "gram_newton_schulz",
    "dion",
    "emerging_optimizers",
    "heavyball",
    "pytorch_optimizer",
)


def public_code(clones: Sequence[str] = CLONES) -> list[Path]:
    """The clones of the public code; skips the test where there are none."""
    root = os.environ.get(PEERS, "")
    folders = [Path(root) / name for name in clones]
    if not root or not all(folder.is_dir() for folder in folders):
        pytest.skip(f"{PEERS} names no folder with clones called {', '.join(clones)}")
    return folders


@contextlib.contextmanager
def modules_of(folders: Sequence[Path]) -> Iterator[None]:
    """Imports come from these folders, and are forgotten afterwards."""

    def forget() -> None:
        for name in list(sys.modules):
            if name.partition(".")[0] in _PACKAGES:
                del sys.modules[name]

    path = list(sys.path)
    forget()
    sys.path[:0] = map(str, folders)
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = path
        forget()


@pytest.fixture(params=["double", "public"])
def code(request: pytest.FixtureRequest) -> Iterator[str]:
    """SOAP, DeVA and Distributed Shampoo: small stand-ins, and the public code where it is."""
    folders = [DOUBLES] if request.param == "double" else public_code()
    with modules_of(folders):
        yield request.param


@pytest.fixture
def doubles() -> Iterator[None]:
    """SOAP, DeVA and Distributed Shampoo as small stand-ins, not imported yet."""
    with modules_of([DOUBLES]):
        yield


@pytest.fixture
def nothing_left_behind() -> Iterator[None]:
    """A test puts back what it replaced."""
    before = dict(vars(_muon))
    finders = list(sys.meta_path)
    yield
    assert vars(_muon) == before
    assert sys.meta_path == finders
