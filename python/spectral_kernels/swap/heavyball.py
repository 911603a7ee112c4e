"""HeavyBall (3.2.0, commit 07887bd) on fast kernels.

`inplace_orthogonal_` of heavyball.utils, outside of what HeavyBall compiles: its Muon and the other
optimizers that orthogonalize updates. It rounds to bfloat16 at random and the replacement to
nearest, so that it draws no random numbers, and the numbers of a later dropout differ. Batches,
which HeavyBall divides by norms of the wrong shape, and decompositions stay its own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import _checks
from ..newton_schulz import newton_schulz
from ._orthogonalizer import QUINTIC, SIMPLE, Orthogonalizer
from ._points import Point, Refused

_MODE = "zeroth_power_mode"
_EPS = 1e-7
_GRAFT_FLOOR = 1e-6
_SCALES = ("none", "scale", "graft")


class HeavyBall(Orthogonalizer):
    """The module heavyball.utils."""

    name = "heavyball"
    modules = ("heavyball.utils",)
    functions = ("inplace_orthogonal_",)

    def points(self, module: ModuleType) -> list[Point]:
        """inplace_orthogonal_, once the module's default mode is where it was."""
        for name in (_MODE, "set_"):
            if not hasattr(module, name):
                raise Refused(f"{module.__name__} has no {name} any more")
        return super().points(module)

    def inplace_orthogonal_(
        self,
        own: Callable[..., Tensor | None],
        x: Tensor,
        mode: Any = None,
        out: Tensor | None = None,
        scale_mode: Any = "none",
    ) -> Tensor | None:
        """Five steps in bfloat16, or float64 for float64; scaled as asked."""
        rows: Sequence[Any] = QUINTIC
        if x.shape[0] == x.shape[1] and self._mode(mode) == "legacy_newtonschulz":
            rows = [SIMPLE] * 5
        y = newton_schulz(
            x,
            coefficients=rows,
            eps=_EPS,
            compute_dtype=x.dtype if x.dtype == torch.float64 else torch.bfloat16,
            backend=self.options.backend,
        )
        kind = _value(scale_mode)
        if kind == "scale":
            y *= max(1, x.shape[-2] / x.shape[-1]) ** 0.5
        elif kind == "graft":
            y *= x.norm() / y.norm().clamp(min=_GRAFT_FLOOR)
        if out is None:
            return y
        self.module.set_(out, y)
        return None

    def inplace_orthogonal__declines(
        self, x: Tensor, mode: Any = None, out: Tensor | None = None, scale_mode: Any = "none"
    ) -> str | None:
        """Decompositions, unknown modes, and what is no matrix."""
        if _value(scale_mode) not in _SCALES:
            return f"scale_mode={scale_mode!r}"
        if x.ndim != 2:
            return f"{x.ndim}-D"
        known = self._mode(mode) in ("newtonschulz", "legacy_newtonschulz")
        if not known and x.shape[0] == x.shape[1]:
            return f"mode={self._mode(mode)!r}"
        return self.declines_matrix(x, dtypes=_checks.FLOATS)

    def _mode(self, mode: Any) -> str:
        return _value(mode or getattr(self.module, _MODE))


def _value(option: Any) -> str:
    """An option that is a string or an enumeration of strings."""
    return str(getattr(option, "value", option))
