"""NVIDIA's Emerging-Optimizers (0.5.0a0, commit fd77292) on fast kernels.

`newton_schulz` of its orthogonalized optimizers: Muon, its adaptive and hyperball variants, Scion,
SPEL. Rows and their order, cycles included, are the package's own; as there, products are in
bfloat16 where torch's float32 matmul precision is "medium", as its optimizers set it, else in
float32. Tensor-parallel calls stay, and so do its SOAP and PSGD.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor

from ..newton_schulz import newton_schulz
from ._orthogonalizer import Orthogonalizer
from ._points import Point, Refused, require_parameters

_SETS = "_COEFFICIENT_SETS"
_ITERATOR = "get_coefficient_iterator"
_REPEATED = ("polar_express", "cans", "deepseekv4")


class EmergingOptimizers(Orthogonalizer):
    """The module emerging_optimizers.orthogonalized_optimizers.muon_utils."""

    name = "emerging-optimizers"
    modules = ("emerging_optimizers.orthogonalized_optimizers.muon_utils",)
    functions = ("newton_schulz",)
    arguments: ClassVar[dict[str, Any]] = {"steps": 5}

    def points(self, module: ModuleType) -> list[Point]:
        """newton_schulz, once its tables are where they were."""
        for name in (_SETS, _ITERATOR):
            if not hasattr(module, name):
                raise Refused(f"{module.__name__} has no {name} any more")
        require_parameters(
            f"{module.__name__}.{_ITERATOR}",
            getattr(module, _ITERATOR),
            ("steps", "coefficient_sets", "mode"),
        )
        return super().points(module)

    def newton_schulz(
        self,
        own: Callable[..., Tensor],
        x: Tensor,
        steps: int,
        coefficient_type: str = "quintic",
        custom_coefficient_sets: Sequence[Sequence[float]] | None = None,
        eps: float = 1e-15,
        transpose: bool | None = None,
        tp_group: Any = None,
        use_syrk: bool = False,
        normalize_in_double: bool = False,
    ) -> Tensor:
        """float32 in and out."""
        rows = custom_coefficient_sets
        if coefficient_type != "custom":
            rows = getattr(self.module, _SETS)[coefficient_type]
        mode = "repeat_last" if coefficient_type in _REPEATED else "cycle"
        medium = torch.get_float32_matmul_precision() == "medium"
        return newton_schulz(
            x,
            coefficients=tuple(getattr(self.module, _ITERATOR)(steps, rows, mode)),
            eps=0.0 if normalize_in_double else eps,
            compute_dtype=torch.bfloat16 if medium else torch.float32,
            backend=self.options.backend,
        )

    def newton_schulz_declines(
        self,
        x: Tensor,
        steps: int,
        coefficient_type: str = "quintic",
        custom_coefficient_sets: Sequence[Sequence[float]] | None = None,
        eps: float = 1e-15,
        transpose: bool | None = None,
        tp_group: Any = None,
        use_syrk: bool = False,
        normalize_in_double: bool = False,
    ) -> str | None:
        """What the package rejects, iterates on the longer side, or shares among processes."""
        rows = getattr(self.module, _SETS).get(coefficient_type, custom_coefficient_sets)
        if tp_group is not None:
            return "tensor-parallel"
        if steps < 1 or eps < 0.0 or not rows:
            return f"steps={steps}, eps={eps}, coefficient_type={coefficient_type!r}"
        if coefficient_type == "cubic5" and steps != len(rows):
            return f"cubic5 with steps={steps}"
        if x.ndim > 3:
            return f"{x.ndim}-D"
        reason = self.declines_matrix(x, dtypes=(torch.float32,))
        if reason is None and transpose not in (None, x.shape[-2] > x.shape[-1]):
            return "iterated on the longer side"
        return reason
