"""SOAP: Adam in the eigenbasis of Shampoo's factors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._options import SoapOptions, chosen
from . import _diagnostics, _rules
from ._base import MatrixOptimizer, Params
from ._forms import Form, Layout, Slot, side, step_slot
from ._groups import Values
from ._work import Part


class EigenbasisOptimizer(MatrixOptimizer):
    """What SOAP and DeVA share: bases, their refresh, and the state of their public classes."""

    _structure: ClassVar[tuple[str, ...]] = ("max_precond_dim",)

    def _squares(self, form: Form, values: Values) -> Slot:
        """V's slot."""
        return Slot(None, narrow=values["state_dtype"])

    def _has_sides(self, values: Values) -> bool:
        """Whether there are bases at all."""
        return True

    def _layout(self, form: Form, values: Values) -> Layout:
        *batch, m, n = form.shape
        limit = values["max_precond_dim"] if self._has_sides(values) else 0
        left, right = (side(batch, size, present=size <= limit) for size in (m, n))
        return {
            "step": step_slot(form),
            "exp_avg": Slot(None, narrow=values["state_dtype"]),
            "exp_avg_sq": self._squares(form, values),
            "left": left,
            "right": right,
            "left_basis": left,
            "right_basis": right,
        }

    def _call(self, part: Part, grads: list[Tensor], lr: Tensor, values: Values) -> None:
        part.options["refresh"] = (
            self._due(part, values, stagger=self._staggered(values))
            if self._has_sides(values)
            else [0] * len(grads)
        )
        super()._call(part, grads, lr, values)
        if values["precondition_frequency"] > 1:
            # Whether the refresh was taken; bases have been waited for, and the next step need not.
            pairs = zip(part.lists[-1], part.options["refresh"], strict=True)
            self._counts.read([x for x, flag in pairs if flag and x.device.type != "cpu"])

    def _side_figures(
        self, name: str, state: Values, block: int, values: Values
    ) -> tuple[float | None, float | None]:
        factor, basis = state[name], state[f"{name}_basis"]
        if not factor.numel():
            return None, None
        return _diagnostics.condition(factor), _diagnostics.basis_residual(basis, factor)

    def _staggered(self, values: Values) -> bool:
        return bool(values["stagger"])

    def _adopt_values(self, values: dict[str, Any]) -> dict[str, Any]:
        for name in ("merge_dims", "precondition_1d"):
            if values.get(name):
                raise ValueError(f"state that was saved with {name}=True does not fit")
        if values.get("shampoo_beta", 0.0) is not None and values.get("shampoo_beta", 0.0) < 0.0:
            values["shampoo_beta"] = None
        return values

    def _adopt_state(self, name: str, state: dict[str, Any], form: Form) -> dict[str, Any]:
        factors, bases = state.pop("GG", None), state.pop("Q", None)
        if factors is None or bases is None:
            return state
        if len(factors) != 2 or len(form.order) != 2:
            raise ValueError(
                f"{name} was saved with {len(factors)} factors, one a dimension; here it is a "
                f"matrix of shape {form.shape}"
            )
        return {
            **state,
            **{
                key: x
                if isinstance(x, Tensor)
                else torch.zeros(0, dtype=torch.float32, device="cpu")
                for key, x in zip(
                    ("left", "right", "left_basis", "right_basis"),
                    (*factors, *bases),
                    strict=True,
                )
            },
        }


class SOAP(EigenbasisOptimizer):
    """SOAP for matrices, AdamW for everything else.

        G' = Q_L^T G Q_R
        M <- beta1 M + (1 - beta1) G';  V <- beta2 V + (1 - beta2) G'^2         (M, V rotated)
        W <- (1 - lr weight_decay) (W - lr c Q_L (M / (sqrt(V) + eps)) Q_R^T)
            c = sqrt(1 - beta2^t) / (1 - beta1^t) if correct_bias, else 1
        L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G,  b = shampoo_beta
        every precondition_frequency steps: new Q_L, Q_R

    The first seven arguments, their order and defaults are those of nikhilvyas/SOAP, whose state
    loads. As there, a matrix's first call sets its factors and bases and does nothing else; other
    than there, closures, float64, 16-bit and non-finite values work, and a changed
    precondition_frequency counts. Its precondition_1d (vectors take AdamW), merge_dims and
    data_format are not supported; convolution weights are flattened to (out, rest) instead.

    Args:
        params: see `Muon`.
        lr: a number, or a tensor of one number.
        betas: beta1 and beta2, in [0, 1).
        shampoo_beta: in [0, 1); default beta2.
        eps: at least 0, absolute, so updates depend on the gradient's scale.
        weight_decay: decoupled, after the update.
        precondition_frequency: steps from refresh to refresh.
        max_precond_dim: a longer side has no factor; fixed by a parameter's first step.
        normalize_grads: divide every update by its root mean square.
        correct_bias: see above.
        skip_first: False takes the first step in the first gradient's own bases.
        stagger: spread the refreshes of different parameters evenly over the steps.
        state_dtype: None, or torch.bfloat16 for exp_avg and exp_avg_sq in 2 bytes an element
            (float64 parameters keep theirs), rounded at random as `Muon`'s momentum: means are
            those of exact moments, runs repeat, and the error of a moment has a standard deviation
            of at most 2^-8 / sqrt(1 - beta^2) of its largest norm so far, element by element too
            where no refresh turns it. Factors and bases stay in full precision.
        maximize: ascend.
        nonfinite: "skip" leaves a matrix, or a tensor of AdamW's, with a non-finite gradient alone
            and counts it in `skipped`; "propagate" lets it become NaN; "raise" raises before
            anything is written.
        capturable: `step` may be recorded in a CUDA graph, see `MatrixOptimizer.step`.
        adamw: AdamW's own lr, betas, eps, weight_decay, amsgrad, maximize; see `add_param_group`.
            Without them AdamW's lr and maximize are those above, its betas, eps and weight_decay
            too where they are given, and the rest is as in torch.optim.AdamW.
        distributed: see `Muon`.

    Raises:
        TypeError, ValueError: a parameter or value that cannot work, with its place.

    State of a matrix: step, exp_avg and exp_avg_sq (rotated), left, right, left_basis, right_basis
    (size 0 where a side has none); float32, float64 under float64, and the first two state_dtype.

    Source: Vyas et al., arXiv 2409.11321; github.com/nikhilvyas/SOAP.
    """

    _operator = "soap_step_"
    _shared = ("weight_decay", "betas", "eps")
    _own_rules: ClassVar[Mapping[str, _rules.Rule]] = {
        "betas": _rules.betas(),
        "shampoo_beta": _rules.optional(_rules.real(0.0, 1.0)),
        **_rules.of(SoapOptions, "eps", "normalize_grads", "correct_bias", "skip_first"),
        "precondition_frequency": _rules.whole(1),
        "max_precond_dim": _rules.whole(0),
        "stagger": _rules.flag,
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: Sequence[float] = _rules.unwritten((0.95, 0.95)),
        shampoo_beta: float | None = None,
        eps: float = _rules.unwritten(1e-8),
        weight_decay: float = _rules.unwritten(0.01),
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        normalize_grads: bool = False,
        correct_bias: bool = True,
        skip_first: bool = True,
        stagger: bool = False,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        nonfinite: str = "skip",
        capturable: bool = False,
        adamw: Mapping[str, Any] | None = None,
        distributed: Any = None,
    ) -> None:
        super().__init__(params, _rules.arguments(locals()), adamw, distributed)

    def _options(self, values: Values, part: Part) -> dict[str, Any]:
        beta1, beta2 = values["betas"]
        shampoo_beta = values["shampoo_beta"]
        return chosen(
            SoapOptions,
            values,
            beta1=beta1,
            beta2=beta2,
            shampoo_beta=beta2 if shampoo_beta is None else shampoo_beta,
        )
