"""DeVA: variance adaptation times an orthogonalized direction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import _lists, _options, coefficients as _coefficients, newton_schulz as _newton_schulz
from .._options import DevaOptions, chosen
from . import _rules
from ._base import Params
from ._forms import Form, Slot
from ._groups import Values
from ._work import Part
from .muon import coefficients_rule
from .soap import EigenbasisOptimizer

# DeVAEuclideanNorm saves no step and never debiases: by this one, debiasing has ended.
_WARM = 2.0**20


class DeVA(EigenbasisOptimizer):
    """DeVA for matrices, AdamW for everything else.

        G' = Q_L^T G Q_R;  M <- beta1 M + (1 - beta1) G'                        (M, V rotated)
        O = newton_schulz(N), N = beta1 M + (1 - beta1) G' if nesterov, else M
        V <- beta2 V + (1 - beta2) r c^T;  Gamma = sqrt(r c^T / (V + eps mean(V)))
            r, c the row and column norms of M (M, V debiased)
        W <- (1 - lr weight_decay) W - lr Q_L (scale Gamma o O) Q_R^T
        L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G,  b = shampoo_beta
        every precondition_frequency steps: new Q_L, Q_R

    for the variant "schatten"; `deva_step_` has the others. By default the paper's recursion with
    debiased moments and a relative eps: updates have their full size from the first step on and do
    not depend on the gradient's scale (while max |G| is in 2^-50 .. 2^50). The arguments up to
    max_precond_dim, their order and defaults are those of the public classes, whose state loads.

    Args:
        params: see `Muon`.
        lr: a number, or a tensor of one number.
        betas: beta1 and beta2, in [0, 1).
        shampoo_beta: in [0, 1); default beta2.
        eps: at least 0.
        weight_decay: decoupled.
        precondition_frequency: steps from refresh to refresh.
        max_precond_dim: a longer side has no factor; fixed by a parameter's first step.
        variant: "schatten" (DeVA-S), "instant" (r, c of G'), "sign" (O from sign(N)), "low_memory"
            ("sign" with row and column sums for V), "linf" (elementwise, without bases).
        norm, variance, sign: options of `deva_step_` in place of the variant's. norm "linf",
            variance "gradient", eps_mode "outside" is Adam; norm "linf", variance "none" is Signum.
        nesterov: see above; default True, False for norm "linf".
        correct_bias: debias M and V.
        normalize_grads: divide every update by its root mean square.
        eps_mode: see `deva_step_`; default "relative", or "inside" with `reference`.
        reference: follow the trajectory of the public classes, see `deva_step_`; for variants
            "schatten", "instant", "sign" and "linf".
        coefficients, steps: of `newton_schulz`.
        scale: "original", "match_rms_adamw", "spectral_unclamped", "none" or a number, see
            `muon_step_`; default "match_rms_adamw", "none" for norm "linf".
        compute_dtype: of the Newton-Schulz products; None is bfloat16, and float64 for float64
            parameters.
        stagger: spread the refreshes of different parameters evenly over the steps; default: unless
            `reference`.
        state_dtype: None, or torch.bfloat16 for exp_avg and exp_avg_sq in 2 bytes an element
            (float64 parameters keep theirs), rounded at random as `Muon`'s momentum: means are
            those of exact moments, runs repeat, and the error of a moment has a standard deviation
            of at most 2^-8 / sqrt(1 - beta^2) of its largest norm so far, element by element too
            where no refresh turns it. Factors, bases and the m + n numbers of "low_memory" stay in
            full precision.
        maximize: ascend.
        nonfinite: "skip" leaves a matrix, or a tensor of AdamW's, with a non-finite gradient alone
            and counts it in `skipped`; "propagate" lets it become NaN; "raise" raises before
            anything is written.
        capturable: `step` may be recorded in a CUDA graph, see `MatrixOptimizer.step`.
        adamw: AdamW's own lr, betas, eps, weight_decay, amsgrad, maximize; see `add_param_group`.
            Without them AdamW's lr and maximize are those above, its betas and weight_decay
            too where they are given, and the rest is as in torch.optim.AdamW. eps above is
            DeVA's alone.
        distributed: see `Muon`.

    Raises:
        TypeError, ValueError: a parameter or value that cannot work, with its place.

    State of a matrix: step, exp_avg and exp_avg_sq (rotated; exp_avg_sq holds m + n numbers for
    "low_memory"), left, right, left_basis, right_basis (size 0 where a side has none); float32,
    float64 under float64, and the first two state_dtype.

    Source: DeVA, arXiv 2602.06880, and its public code, commit 2e4d26e.
    """

    _operator = "deva_step_"
    _shared = ("weight_decay", "betas")
    _structure = ("max_precond_dim", "variant", "norm", "variance")
    _own_rules: ClassVar[Mapping[str, _rules.Rule]] = {
        "betas": _rules.betas(),
        "shampoo_beta": _rules.optional(_rules.real(0.0, 1.0)),
        **_rules.of(DevaOptions, "eps", "correct_bias", "normalize_grads", "reference"),
        "precondition_frequency": _rules.whole(1),
        "max_precond_dim": _rules.whole(0),
        "variant": _rules.choice(*_options.DEVA_VARIANTS),
        "norm": _rules.optional(_rules.choice(*_options.DEVA_NORMS)),
        "variance": _rules.optional(_rules.choice(*_options.VARIANCES)),
        "sign": _rules.optional(_rules.flag),
        "nesterov": _rules.optional(_rules.flag),
        "eps_mode": _rules.optional(_rules.choice(*_options.EPS_MODES)),
        "coefficients": coefficients_rule,
        "steps": _rules.optional(_rules.whole(1, 99)),
        "scale": _rules.optional(_rules.number_or(*_lists.SCALES)),
        **_rules.of(DevaOptions, "compute_dtype"),
        "stagger": _rules.optional(_rules.flag),
    }

    def __init__(
        self,
        params: Params,
        lr: float | Tensor = 3e-3,
        betas: Sequence[float] = _rules.unwritten((0.95, 0.95)),
        shampoo_beta: float | None = None,
        eps: float = 1e-8,
        weight_decay: float = _rules.unwritten(0.01),
        precondition_frequency: int = 10,
        max_precond_dim: int = 10000,
        *,
        variant: str = "schatten",
        norm: str | None = None,
        variance: str | None = None,
        sign: bool | None = None,
        nesterov: bool | None = None,
        correct_bias: bool = True,
        normalize_grads: bool = False,
        eps_mode: str | None = None,
        reference: bool = False,
        coefficients: _newton_schulz.CoefficientsLike = "muon",
        steps: int | None = None,
        scale: str | float | None = None,
        compute_dtype: torch.dtype | None = None,
        stagger: bool | None = None,
        state_dtype: torch.dtype | None = None,
        maximize: bool = False,
        nonfinite: str = "skip",
        capturable: bool = False,
        adamw: Mapping[str, Any] | None = None,
        distributed: Any = None,
    ) -> None:
        super().__init__(params, _rules.arguments(locals()), adamw, distributed)

    def _check_together(self, values: Values) -> None:
        norm, variance, _ = _variant(values)
        reference = values["reference"]
        _options.check_variant(norm, variance, _eps_mode(values), reference=reference)
        _coefficients.resolve(values["coefficients"], values["steps"])

    def _has_sides(self, values: Values) -> bool:
        return _variant(values)[0] != "linf"

    def _squares(self, form: Form, values: Values) -> Slot:
        *batch, m, n = form.shape
        variance = _variant(values)[1]
        if variance == "low_memory":
            return Slot((*batch, m + n))
        return Slot((0,)) if variance == "none" else super()._squares(form, values)

    def _staggered(self, values: Values) -> bool:
        return not values["reference"] if values["stagger"] is None else bool(values["stagger"])

    def _options(self, values: Values, part: Part) -> dict[str, Any]:
        beta1, beta2 = values["betas"]
        shampoo_beta = values["shampoo_beta"]
        norm, variance, sign = _variant(values)
        linf = norm == "linf"
        scale = values["scale"]
        if scale is None:
            scale = "none" if linf else "match_rms_adamw"
        return chosen(
            DevaOptions,
            values,
            beta1=beta1,
            beta2=beta2,
            shampoo_beta=beta2 if shampoo_beta is None else shampoo_beta,
            eps_mode=_eps_mode(values),
            norm=norm,
            variance=variance,
            nesterov=not linf if values["nesterov"] is None else values["nesterov"],
            sign=sign,
            rows=_coefficients.resolve(values["coefficients"], values["steps"]).rows,
            scales=_lists.scales_of(part.lists[0], scale),
            compute_dtype=values["compute_dtype"] or torch.bfloat16,
        )

    def _adopt_values(self, values: dict[str, Any]) -> dict[str, Any]:
        if "nestrov" in values:
            values["nesterov"] = values["nestrov"]
        return super()._adopt_values(values)

    def _adopt_state(self, name: str, state: dict[str, Any], form: Form) -> dict[str, Any]:
        if "second_momentum_buffer" in state:
            none = torch.zeros(0, dtype=torch.float32, device="cpu")
            return {
                "step": torch.full(form.shape[:-2], _WARM, dtype=torch.float32, device="cpu"),
                "exp_avg": state["momentum_buffer"],
                "exp_avg_sq": state["second_momentum_buffer"],
                **dict.fromkeys(("left", "right", "left_basis", "right_basis"), none),
            }
        return super()._adopt_state(name, state, form)


def _variant(values: Values) -> tuple[str, str, bool]:
    """norm, variance and sign, from the variant where they are not given."""
    norm, variance, sign = _options.DEVA_VARIANTS[values["variant"]]
    return (
        norm if values["norm"] is None else values["norm"],
        variance if values["variance"] is None else values["variance"],
        sign if values["sign"] is None else values["sign"],
    )


def _eps_mode(values: Values) -> str:
    if values["eps_mode"] is None:
        return "inside" if values["reference"] else "relative"
    return str(values["eps_mode"])
