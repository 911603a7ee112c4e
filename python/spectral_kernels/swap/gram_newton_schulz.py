"""Dao-AILab's gram-newton-schulz (commit f08f25e) on fast kernels.

`GramNewtonSchulz.__call__`, which its StandardNewtonSchulz and its Muon use, for objects made
before the swap too. Operands are in float16 as there; the replacement keeps the Gram matrices in
float32, so that it needs no restarts, and does not write its argument, which the package normalises
in place if it is float32. Objects with the package's own GPU kernels keep them.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..newton_schulz import newton_schulz
from ._adapter import Adapter
from ._points import Point, Refused, agree, trial_matrix, unfit

_CLASS = "GramNewtonSchulz"
_BOUND = 0.05
_ATTRIBUTES = (
    "ns_coefficients",
    "ns_epsilon",
    "use_gram_newton_schulz",
    "_kernel_backend",
)


class GramNewtonSchulz(Adapter):
    """The class of its module gram_newton_schulz."""

    name = "gram-newton-schulz"
    modules = ("gram_newton_schulz.gram_newton_schulz",)

    @classmethod
    def holds(cls, module: ModuleType) -> bool:
        """Whether it defines the class."""
        return cls.wants(module.__name__) and isinstance(vars(module).get(_CLASS), type)

    def points(self, module: ModuleType) -> list[Point]:
        """Its call."""
        return [Point(getattr(module, _CLASS), "__call__", self.call, self.declines)]

    def call(self, own: Callable[..., Tensor], them: Any, X: Tensor) -> Tensor:
        """A matrix or a batch, in its own dtype."""
        return newton_schulz(
            X,
            coefficients=tuple(tuple(row) for row in them.ns_coefficients),
            method="gram" if them.use_gram_newton_schulz else "standard",
            eps=them.ns_epsilon,
            compute_dtype=torch.float16,
            backend=self.options.backend,
        )

    def declines(self, them: Any, X: Tensor) -> str | None:
        """Objects with kernels of their own, and what is no matrix."""
        if them._kernel_backend is not None:
            return "its own kernels"
        if not len(them.ns_coefficients) or them.ns_epsilon < 0.0:
            return f"{len(them.ns_coefficients)} rows, ns_epsilon={them.ns_epsilon}"
        return unfit(X, self.options, batches=True)

    def prove(self, points: list[Point]) -> None:
        """Both forms, of a wide and a tall matrix."""
        (point,) = points
        own: Any = point.check()
        owner: Any = point.owner
        for gram in (True, False):
            them = owner(ns_use_kernels=False, use_gram_newton_schulz=gram, compile_kwargs=None)
            missing = [name for name in _ATTRIBUTES if not hasattr(them, name)]
            if missing:
                raise Refused(f"{point.owner} has no {', '.join(missing)} any more")
            for shape in ((4, 6), (6, 4)):
                mine, theirs = (trial_matrix(*shape) for _ in range(2))
                agree(str(point), self.call(own, them, mine), own(them, theirs), _BOUND)
