"""DeVA: variance adaptation fused with orthogonalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _dispatch
from . import coefficients as _coefficients
from ._lists import NONFINITE, counters, scales_of
from .newton_schulz import CoefficientsLike

__all__ = ["deva_step_"]

NORMS = ("schatten", "linf")
VARIANCES = ("momentum", "gradient", "instant", "low_memory", "none")
EPS_MODES = ("relative", "outside", "inside")

# Of the public classes DeVASchattenNorm and its sign-stabilised form, DeVASchattenNormIns, and
# DeVAEuclideanNorm; the low-memory one calls a function that does not exist.
_PUBLIC_VARIANCES = {"schatten": ("momentum", "instant"), "linf": ("momentum",)}


def deva_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor | None],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    left_bases: Sequence[Tensor | None],
    right_bases: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float = 0.95,
    beta2: float = 0.95,
    shampoo_beta: float | None = None,
    eps: float = 1e-8,
    eps_mode: str | None = None,
    weight_decay: float = 0.0,
    norm: str = "schatten",
    variance: str = "momentum",
    nesterov: bool = True,
    sign: bool = False,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    coefficients: CoefficientsLike = "muon",
    steps: int | None = None,
    scale: str | float | Sequence[float] | None = None,
    compute_dtype: torch.dtype | None = None,
    reference: bool = False,
    maximize: bool = False,
    nonfinite: str = "skip",
    refresh: bool | Sequence[bool | int] = True,
    step_counts: Sequence[Tensor] | None = None,
    skipped: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One DeVA step over a list of matrices of mixed shapes, in place.

        G' = Q_L^T G Q_R;  M <- beta1 M + (1 - beta1) G'                        (M, V rotated)
        N = beta1 M + (1 - beta1) G' if nesterov, else M
        O = newton_schulz(N), or of sign(N) if `sign`          (norm "schatten", Schatten-8 scaled)
            sign(N)                                            (norm "linf")
        W <- (1 - lr weight_decay) W - lr Q_L (scale Gamma o O) Q_R^T
        L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G,  b = shampoo_beta
        where refresh: new Q_L, Q_R (`refresh_eigenbasis`), and M moved into them

    Gamma adapts to the variance, with Mhat and Vhat debiased if correct_bias and the energy
    e(X) = r c^T of row norms r and column norms c ("schatten"), or X o X ("linf"):

        variance "momentum":   V <- EMA e(Mhat), Gamma = sqrt(e(Mhat) / Vhat)
                 "gradient":   V <- EMA e(G'),   Gamma = sqrt(e(Mhat) / Vhat)
                 "instant":    V <- EMA e(G'),   Gamma = sqrt(e(G') / Vhat)
                 "low_memory": row and column sums only, Gamma = (r^2 / vhat_r  c^2 / vhat_c)^(1/4)
                 "none":       Gamma = 1

    norm "linf" with variance "gradient", eps_mode "outside" and no Nesterov is Adam, with variance
    "none" Signum. The first call of a matrix, known by bases of zeros, sets its factors and bases
    and takes the step in them.

    Args:
        params, grads: (..., m, n) each, of one shape; leading dimensions are a batch of matrices.
        exp_avgs: M, shapes of the params, float32 (float64 for float64).
        exp_avg_sqs: V, shapes of the params; (..., m + n) for "low_memory"; None for "none".
        lefts, left_bases: L and Q_L, (..., m, m), or None (or size 0) for no left side. Bases start
            as zeros.
        rights, right_bases: R and Q_R, (..., n, n), likewise.
        lr: a number or a tensor of one number, at least 0 and finite. A tensor on a device is not
            waited for: one that is not finite makes every update so, see `nonfinite`.
        beta1, beta2: in [0, 1).
        shampoo_beta: in [0, 1); default beta2.
        eps: at least 0.
        eps_mode: "relative" sqrt(e / (V + eps mean(V))), "inside" sqrt(e / (V + eps)), "outside"
            sqrt(e) / (sqrt(V) + eps); default "relative", or "inside" with `reference`.
        weight_decay: decoupled, applied before the update.
        norm, variance, nesterov, sign, correct_bias: see above.
        normalize_grads: divide the update by its root mean square.
        coefficients, steps: see `newton_schulz`.
        scale: see `muon_step_`; default "match_rms_adamw", "none" for norm "linf".
        compute_dtype: of the Newton-Schulz products; None: bfloat16. float64 params use float64.
        reference: follow the trajectory of the public classes: M and V not debiased, eps inside the
            root, and for "schatten" Adam's bias correction of the step size, decay after the
            update, an idle first call, sorted bases with V permuted. Variance "momentum", or
            "instant" for "schatten", only.
        maximize: ascend.
        nonfinite: a matrix whose gradient or momentum is not finite, or whose state or parameter
            would not stay so, keeps every bit ("skip"), becomes NaN ("propagate"), or raises before
            anything is written ("raise": if something given is not finite; a matrix that becomes so
            in the step is skipped).
        refresh: whether bases are refreshed after the update, one for all entries or one for each.
        step_counts: one tensor an entry, 0-dim or of the batch's shape, advanced by applied steps.
        skipped: one int64, advanced by skipped matrices.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Raises:
        TypeError, ValueError: bad input, naming the value, before anything is written.
        RuntimeError: the backend that was asked for cannot run.

    Accuracy: as `newton_schulz` and `refresh_eigenbasis`. With eps_mode "relative" a gradient
    scaled by a power of two gives the same update while max |G| is in 2^-50 .. 2^50 (its square has
    to fit into the state); outside of that the matrix is skipped and counted.

    Source: DeVA, arXiv 2602.06880, with the moments debiased before the ratio is taken; the public
    code, commit 2e4d26e, for `reference`.
    """
    counts, skips = counters(params, step_counts, skipped)
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs)):
        _checks.tensors(name, tensors, len(params))
    rows = _coefficients.resolve(coefficients, steps)
    beta2 = _checks.number("beta2", beta2, 0.0, 1.0)
    reference = _checks.flag("reference", reference)
    if eps_mode is None:
        eps_mode = "inside" if reference else "relative"
    check_variant(norm=norm, variance=variance, eps_mode=eps_mode, reference=reference)
    if scale is None:
        scale = "none" if norm == "linf" else "match_rms_adamw"
    if compute_dtype is not None and compute_dtype not in _checks.FLOATS:
        raise TypeError(
            f"compute_dtype must be float64, float32, bfloat16 or float16, not {compute_dtype!r}"
        )
    _dispatch.run_step(
        "deva_step_",
        backend,
        params,
        grads,
        exp_avgs,
        _checks.factor_list("exp_avg_sqs", exp_avg_sqs, params),
        _checks.factor_list("lefts", lefts, params),
        _checks.factor_list("rights", rights, params),
        _checks.factor_list("left_bases", left_bases, params),
        _checks.factor_list("right_bases", right_bases, params),
        counts,
        skips,
        _checks.learning_rate(lr),
        beta1=_checks.number("beta1", beta1, 0.0, 1.0),
        beta2=beta2,
        shampoo_beta=_checks.number(
            "shampoo_beta", beta2 if shampoo_beta is None else shampoo_beta, 0.0, 1.0
        ),
        eps=_checks.number("eps", eps),
        eps_mode=eps_mode,
        weight_decay=_checks.number("weight_decay", weight_decay),
        norm=norm,
        variance=variance,
        nesterov=_checks.flag("nesterov", nesterov),
        sign=_checks.flag("sign", sign),
        correct_bias=_checks.flag("correct_bias", correct_bias),
        normalize_grads=_checks.flag("normalize_grads", normalize_grads),
        rows=rows.rows,
        scales=scales_of(params, scale),
        compute_dtype=torch.bfloat16 if compute_dtype is None else compute_dtype,
        reference=reference,
        maximize=_checks.flag("maximize", maximize),
        nonfinite=_checks.choice("nonfinite", nonfinite, NONFINITE),
        refresh=_checks.flags("refresh", refresh, len(params)),
    )


def check_variant(*, norm: str, variance: str, eps_mode: str, reference: bool) -> None:
    """The combinations of options that DeVA has."""
    _checks.choice("norm", norm, NORMS)
    _checks.choice("variance", variance, VARIANCES)
    _checks.choice("eps_mode", eps_mode, EPS_MODES)
    if norm == "linf" and variance == "low_memory":
        raise ValueError("variance='low_memory' keeps row and column sums, which norm='linf' lacks")
    if reference and eps_mode != "inside":
        raise ValueError(f"reference=True has its eps inside the root, not eps_mode={eps_mode!r}")
    if reference and variance not in _PUBLIC_VARIANCES[norm]:
        raise ValueError(
            f"reference=True with norm={norm!r} has variance "
            f"{' or '.join(_PUBLIC_VARIANCES[norm])}, not {variance!r}"
        )
