"""DeVA: variance adaptation fused with orthogonalization."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _dispatch, _options, coefficients as _coefficients
from ._lists import check_counted, counters, scales_of
from ._options import EPS_MODES, DevaOptions, check_variant
from .newton_schulz import CoefficientsLike

__all__ = ["deva_step_"]


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
        exp_avgs: M, shapes of the params, float32 (float64 for float64), or bfloat16 as the
            momentum of `muon_step_`.
        exp_avg_sqs: V, likewise; (..., m + n) for "low_memory", not in bfloat16; None for "none".
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
    given = locals()
    counts, skips = counters(params, step_counts, skipped)
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs)):
        _checks.tensors(name, tensors, len(params))
    _checks.tensors("exp_avg_sqs", exp_avg_sqs, len(params), optional=True)
    check_counted(step_counts, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    rows = _coefficients.resolve(coefficients, steps)
    if shampoo_beta is None:
        shampoo_beta = _checks.number("beta2", beta2, 0.0, 1.0)
    reference = _checks.flag("reference", reference)
    if eps_mode is None:
        eps_mode = "inside" if reference else "relative"
    if scale is None:
        scale = "none" if norm == "linf" else "match_rms_adamw"
    options = _options.checked(
        DevaOptions,
        given,
        shampoo_beta=_checks.number("shampoo_beta", shampoo_beta, 0.0, 1.0),
        eps_mode=_checks.choice("eps_mode", eps_mode, EPS_MODES),
        rows=rows.rows,
        scales=scales_of(params, scale),
        refresh=_checks.flags("refresh", refresh, len(params)),
    )
    check_variant(norm, variance, eps_mode, reference=reference)
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
        **options,
    )
