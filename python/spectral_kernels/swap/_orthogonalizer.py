"""What the targets share of which one function is replaced: a Newton-Schulz iteration."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _checks, coefficients as _coefficients
from ._adapter import Adapter
from ._points import Point, agree, trial_matrix, unfit

Row = tuple[float, float, float]

# What most of them iterate with: 5 steps of one row, or 5 rows.
SIMPLE: Row = _coefficients.resolve("muon").rows[0]
QUINTIC: tuple[Row, ...] = _coefficients.resolve("quintic").rows
# Two correct codes with products in bfloat16 differ by some percent.
BOUND = 0.1
_TRIALS = ((4, 6), (6, 4))


class Orthogonalizer(Adapter):
    """A target whose module defines a function that takes a matrix to an orthogonal one.

    Attributes:
        functions: its names there.
        arguments: what a trial passes beside the matrix.
    """

    functions: ClassVar[tuple[str, ...]]
    arguments: ClassVar[dict[str, Any]] = {}

    @classmethod
    def holds(cls, module: ModuleType) -> bool:
        """Whether a module of that name defines one of the functions."""
        return cls.wants(module.__name__) and any(cls.defined(module))

    @classmethod
    def defined(cls, module: ModuleType) -> list[str]:
        """The functions that a module defines and does not just import."""
        return [
            name
            for name in cls.functions
            if getattr(vars(module).get(name), "__module__", None) == module.__name__
        ]

    def points(self, module: ModuleType) -> list[Point]:
        """The functions, also where they have been imported by name."""
        self.module = module
        return [
            Point(
                module,
                name,
                getattr(self, name),
                getattr(self, f"{name}_declines"),
                imported_by_name=True,
            )
            for name in self.defined(module)
        ]

    def prove(self, points: list[Point]) -> None:
        """A wide and a tall matrix each."""
        for point in points:
            own = point.check()
            for shape in _TRIALS:
                # Some write what they are given.
                mine, theirs = (trial_matrix(*shape) for _ in range(2))
                # Nothing is worth compiling for one call, and some round at random.
                with torch.compiler.set_stance("force_eager"), torch.random.fork_rng(devices=[]):
                    expected = own(theirs, **self.arguments)
                agree(str(point), point.fast(own, mine, **self.arguments), expected, BOUND)

    def declines_matrix(
        self, x: Tensor, *, dtypes: Sequence[torch.dtype] = _checks.FLOATS
    ) -> str | None:
        """Anything but plain matrices and batches of them."""
        return unfit(x, self.options, dtypes=dtypes, batches=True)
