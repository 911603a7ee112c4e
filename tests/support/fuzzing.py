"""Generated inputs, and the instruction sets that the CPU kernels run with."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings, strategies as st
from spectral_kernels import _extension


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
