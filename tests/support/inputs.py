"""Matrices to test with, and generated ones."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from spectral_kernels import _extension
from spectral_kernels.coefficients import resolve
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
FULL = (torch.float64, torch.float32)

MUON = resolve("muon").rows

# Powers of two and their neighbours (tile edges), primes, single rows and columns, long strips.
SHAPES = (
    *((n, n) for n in (1, 2, 3, 5, 8, 15, 16, 17, 31, 32, 33)),
    *(
        (m, n)
        for m, n in ((1, 9), (9, 1), (2, 31), (31, 2), (4, 257), (257, 4), (5, 123), (123, 5))
    ),
    *((47, 48), (49, 47), (63, 65), (97, 13), (127, 130), (129, 128), (19, 255), (256, 37)),
)
# The shapes that other projects' kernels fell over: NaN from a tuned product, and misalignment.
AWKWARD_SHAPES = ((18, 2304), (512, 1408))


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed), dtype=torch.float64).to(dtype)


def integers(
    *shape: int, most: int = 3, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Tensor:
    """Integers in -most .. most."""
    return torch.randint(-most, most + 1, shape, generator=generator(seed)).to(dtype)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(gaussian(n, n, dtype=torch.float64, seed=seed))[0]


def with_singular_values(m: int, n: int, values: Tensor, seed: int = 0) -> Tensor:
    """A float64 m x n matrix of random singular vectors."""
    s = min(m, n)
    return orthogonal(m, seed)[:, :s] * values.double() @ orthogonal(n, seed + 1)[:, :s].mT


def decaying(count: int, condition: float) -> Tensor:
    """1 .. 1 / condition, equally spaced in the logarithm."""
    return torch.logspace(0.0, -math.log10(condition), count, dtype=torch.float64)


def semidefinite(n: int, condition: float, seed: int = 0) -> Tensor:
    """A float64 symmetric matrix of random eigenvectors with the eigenvalues 1 .. 1 / condition."""
    return with_eigenvalues(decaying(n, condition), seed)


def semidefinites(count: int, n: int, condition: float, seed: int = 0) -> Tensor:
    """A batch of `semidefinite` matrices."""
    return torch.stack([semidefinite(n, condition, seed + 3 * i) for i in range(count)])


def with_eigenvalues(values: Tensor, seed: int = 0) -> Tensor:
    q = orthogonal(len(values), seed)
    a = (q * values.double()) @ q.mT
    return 0.5 * (a + a.mT)


def refusal(isa: str) -> str | None:
    """Why the CPU kernels cannot run with an instruction set here; None if they can."""
    if isa in _extension.MODULE.supported_isas():
        return None
    refused = dict(_extension.MODULE.refused_isas())
    return refused.get(isa, "not compiled for this processor")


@contextlib.contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """The CPU kernels run with this set."""
    _extension.MODULE.set_isa_cap(name)
    try:
        yield
    finally:
        _extension.MODULE.set_isa_cap("")


# Of a campaign that is the same everywhere and keeps what it finds in the test itself.
CAMPAIGN: dict[str, Any] = {
    "derandomize": True,
    "database": None,
    "phases": (Phase.generate, Phase.shrink),
    "suppress_health_check": list(HealthCheck),
}


def fuzzed(
    strategy: st.SearchStrategy[Any], *, cases: int = 200, long: int = 5000, **options: Any
) -> Callable[[Any], Any]:
    """A check of one generated input becomes a test of many, and of `long` in the long run.

    The former are the same at every run, so that whoever sees a failure can repeat it; the latter
    are new ones each time. The instruction set belongs to the input, so the examples are spread
    over all of them. `options` are hypothesis' settings.
    """

    def decorate(check: Callable[[Any], None]) -> Any:
        @pytest.mark.parametrize("backend", ["cpu"], indirect=True)
        @pytest.mark.parametrize("examples", [cases, pytest.param(long, marks=pytest.mark.long)])
        def test(backend: object, examples: int) -> None:
            def example(isa: str, drawn: Any) -> None:
                with instruction_set(isa):
                    check(drawn)

            # The name goes into hypothesis' database and into its fixed seed.
            example.__name__ = example.__qualname__ = check.__name__
            isas = st.sampled_from(_extension.MODULE.supported_isas())
            fixed = {"derandomize": True, "database": None} if examples == cases else {}
            limits = settings(max_examples=examples, **{**fixed, **options})
            limits(given(isa=isas, drawn=strategy)(example))()

        test.__doc__ = check.__doc__
        return test

    return decorate


def state_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32
