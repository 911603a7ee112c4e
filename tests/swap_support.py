"""What the tests of swap_in share: modules to swap, gradients, runs."""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, _muon

DOUBLES = Path(__file__).parent / "swap_doubles"
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


@functools.cache
def gradient(shape: Sequence[int], seed: int) -> Tensor:
    """A matrix with singular values from 1 to 2 (float64), so that factors are well-conditioned."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if x.ndim < 2:
        return x
    u, s, vh = torch.linalg.svd(x.flatten(1), full_matrices=False)
    return ((u * torch.linspace(2, 1, len(s), dtype=torch.float64)) @ vh).reshape(shape)


def parameters(
    shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.float32
) -> list[torch.nn.Parameter]:
    """Parameters of about unit norm."""
    return [
        torch.nn.Parameter((0.1 * gradient(shape, 1000 + i)).to(dtype))
        for i, shape in enumerate(shapes)
    ]


def steps(
    optimizer: Optimizer,
    params: Sequence[Tensor],
    count: int,
    *,
    start: int = 0,
    gradients: Callable[[Sequence[int], int], Tensor] = gradient,
) -> None:
    """Steps with given gradients, the same whatever the parameters are."""
    for t in range(start, start + count):
        for i, p in enumerate(params):
            p.grad = gradients(p.shape, 10 * t + i).to(p.dtype, copy=True)
        optimizer.step()


def moved(
    make: Callable[[Sequence[Tensor]], Optimizer],
    shapes: Sequence[Sequence[int]],
    count: int,
    dtype: torch.dtype = torch.float32,
    gradients: Callable[[Sequence[int], int], Tensor] = gradient,
) -> list[Tensor]:
    """How far each parameter moved (float64)."""
    params = parameters(shapes, dtype)
    initial = [p.detach().clone().double() for p in params]
    steps(make(params), params, count, gradients=gradients)
    return [p.detach().double() - old for p, old in zip(params, initial, strict=True)]


def distance(mine: Tensor, theirs: Tensor) -> float:
    """The difference of two moves, relative to the second."""
    return float((mine - theirs).norm() / theirs.norm())
