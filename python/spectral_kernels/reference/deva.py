"""DeVA: variance adaptation fused with orthogonalization."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from spectral_kernels._backend import (
    check_choice,
    check_device,
    check_list,
    check_writable,
    operator,
)

from ._shared import (
    Progress,
    absent,
    check_factors,
    check_full_precision,
    check_range,
    check_state,
    check_step,
    finite,
    matrices,
    moved,
    optional,
    outside_range,
    raise_nonfinite,
    sign,
)
from .eigenbasis import (
    Bases,
    accumulated,
    adam_bias,
    initialised,
    refreshed,
    rms_normalized,
    rotate,
    rotate_back,
    uninitialised,
)
from .newton_schulz import orthogonalize

_NORMS = ("schatten", "linf")
_VARIANCES = ("momentum", "gradient", "instant", "low_memory", "none")
_EPS_MODES = ("relative", "outside", "inside")
# Of DeVASchattenNorm and its sign-stabilised form, DeVASchattenNormIns, and DeVAEuclideanNorm. The
# public low-memory class calls a function that does not exist.
_PUBLIC_VARIANCES = {"schatten": ("momentum", "instant"), "linf": ("momentum",)}


@dataclass(frozen=True)
class _Deva:
    """The options of a DeVA step."""

    beta1: float
    beta2: float
    eps: float
    eps_mode: str
    norm: str
    variance: str
    nesterov: bool
    sign: bool
    correct_bias: bool
    rows: Sequence[Sequence[float]]
    compute_dtype: torch.dtype


@operator
def deva_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    lefts: Sequence[Tensor],
    rights: Sequence[Tensor],
    left_bases: Sequence[Tensor],
    right_bases: Sequence[Tensor],
    step_counts: Sequence[Tensor],
    skipped: Tensor,
    lr: Tensor,
    *,
    beta1: float,
    beta2: float,
    shampoo_beta: float,
    eps: float,
    eps_mode: str,
    weight_decay: float,
    norm: str,
    variance: str,
    nesterov: bool,
    sign: bool,
    correct_bias: bool,
    normalize_grads: bool,
    rows: Sequence[Sequence[float]],
    scales: Sequence[float],
    compute_dtype: torch.dtype,
    reference: bool,
    maximize: bool,
    nonfinite: str,
    refresh: Sequence[int],
) -> None:
    """One DeVA step over a list of matrices, W <- W - lr (variance adaptation) o (direction).

    For step t of a matrix, in the dtype of its exp_avg, W rounded once:

        G' = Q_L^T G Q_R;  M <- beta1 M + (1 - beta1) G'                           (M, V rotated)
        N = beta1 M + (1 - beta1) G' if nesterov, else M
        O = newton_schulz(N), or of sign(N) if `sign`          (norm "schatten", Schatten-8 scaled)
            sign(N)                                            (norm "linf")
        U = Q_L (scale Gamma o O) Q_R^T;  U <- U / (rms(U) + 1e-30) if normalize_grads
        W <- (1 - lr weight_decay) W - lr U
        L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G,  b = shampoo_beta
        where refresh: new Q_L, Q_R (`refresh_eigenbasis`), M <- (Q_L,new^T Q_L) M (Q_R^T Q_R,new);
            column j follows column j, so V stays

    Gamma, with Mhat = M / (1 - beta1^t) and Vhat = V / (1 - beta2^t) if correct_bias, else M and V,
    and the energy e(X) = r c^T of row norms r and column norms c ("schatten"), X o X ("linf"):
        "momentum":   V <- EMA e(Mhat),  Gamma = sqrt(e(Mhat) / Vhat)     (S-infinity)
        "gradient":   V <- EMA e(G'),    Gamma = sqrt(e(Mhat) / Vhat)
        "instant":    V <- EMA e(G'),    Gamma = sqrt(e(G') / Vhat)
        "low_memory": v_r, v_c <- EMA of the row and column sums of G'^2, packed in this order,
                      Gamma_ij = (r_i^2 / vhat_r,i  c_j^2 / vhat_c,j)^(1/4), r, c of Mhat;
                      "schatten" only
        "none":       Gamma = 1
    where EMA_beta2 x of y is beta2 x + (1 - beta2) y, and every sqrt(e / v) has its eps:
        "relative" sqrt(e / (v + eps mean(v))), mean over the matrix (or over v_r, over v_c);
        "inside" sqrt(e / (v + eps)); "outside" sqrt(e) / (sqrt(v) + eps); 1 where that is 0 / 0.

    The first call of a matrix, known by bases of zeros, sets L = (1 - b) G G^T, R likewise and the
    bases from `eigenbasis`, and takes the step in them; it neither updates the factors again nor
    refreshes. With G = 0 it leaves the bases at zero, decays W and counts the step.

    Limits: "linf" with "gradient", eps_mode "outside", correct_bias and not nesterov is Adam;
    "linf" with "none" is Signum. A size-0 factor and basis stand for the identity.

    `reference` is the trajectory of the public classes. It departs from the above in that M and V
    are not debiased, and with "schatten"
        U is multiplied by sqrt(1 - beta2^t) / (1 - beta1^t) if correct_bias;
        W <- (1 - lr weight_decay) (W - lr U);
        the first call only sets factors and bases: no update, no decay, no step;
        a refresh sorts the columns and permutes V with them;
    while "linf" ignores correct_bias. Needs eps_mode "inside" and variance "momentum", or "instant"
    with "schatten". So at t = 1 U is 1 / (1 - beta1) times too large, and it changes with the scale
    of G where eps is not small beside V.

    A matrix is skipped, with every bit of it and its state kept, no step counted and `skipped`
    raised, if max |G| is not 0 and outside 2^-50 .. 2^50, unless reference, another eps_mode than
    "relative", or variance "none" without factors. So it is, unless nonfinite="propagate", if its
    gradient or momentum is not finite or its new state or parameter would not be.

    Args:
        params, grads: entry i is (..., m_i, n_i).
        exp_avgs: M, shapes of the params, float32 or float64.
        exp_avg_sqs: V, shapes of the params; (..., m + n) for "low_memory"; unused for "none".
        lefts, left_bases: (..., m, m) each, or size 0.
        rights, right_bases: (..., n, n) each, or size 0.
        step_counts: 0-dim or the batch's shape.
        skipped: one int64.
        lr: one number.
        beta1, beta2, shampoo_beta: in [0, 1).
        eps, weight_decay: at least 0.
        eps_mode, norm, variance, nesterov, sign, correct_bias, normalize_grads: see above.
        rows: (a, b, c) of every Newton-Schulz step.
        scales: one factor an entry; the papers' is 0.2 sqrt(max(m, n)).
        compute_dtype: of the Newton-Schulz products; float64 parameters use float64.
        reference: see above.
        maximize: G <- -G.
        nonfinite: "skip"; "propagate", without a test; or "raise", before anything is written, for
            gradients, states and parameters that are not finite.
        refresh: one int an entry, not 0 where its bases are refreshed after the update.

    Raises:
        TypeError, ValueError: bad input, before anything is written.

    Source: DeVA, arXiv 2602.06880, and its public code, commit 2e4d26e.
    """
    check_step(params, grads, step_counts, skipped, lr, nonfinite)
    check_state("exp_avgs", exp_avgs, params)
    check_factors(params, lefts, rights, left_bases, right_bases, "bases")
    _check_options(eps_mode, norm, variance, rows, compute_dtype, reference)
    _check_squares(exp_avg_sqs, params, variance)
    check_list("scales", scales, len(params))
    check_list("refresh", refresh, len(params))
    for name, beta in (("beta1", beta1), ("beta2", beta2), ("shampoo_beta", shampoo_beta)):
        check_range(name, beta, 0.0, 1.0)
    check_range("eps", eps)
    check_range("weight_decay", weight_decay)
    raise_nonfinite(
        nonfinite,
        grads=grads,
        exp_avgs=exp_avgs,
        exp_avg_sqs=() if variance == "none" else [_rows(v, variance) for v in exp_avg_sqs],
        lefts=lefts,
        rights=rights,
        left_bases=left_bases,
        right_bases=right_bases,
        params=params,
    )
    rate = float(lr)
    decay = 1.0 - rate * weight_decay
    public_schatten = reference and norm == "schatten"
    for i, param in enumerate(params):
        step = _Deva(
            beta1=beta1,
            beta2=beta2,
            eps=eps,
            eps_mode=eps_mode,
            norm=norm,
            variance=variance,
            nesterov=nesterov,
            sign=sign,
            correct_bias=correct_bias and not reference,
            rows=rows,
            compute_dtype=torch.float64 if param.dtype == torch.float64 else compute_dtype,
        )
        progress = Progress(step_counts[i], skipped)
        factors = not (absent(lefts[i]) and absent(rights[i]))
        bounded = not reference and eps_mode == "relative" and (variance != "none" or factors)
        for index in matrices(param) if param.numel() else ():
            m, v = exp_avgs[i][index], optional(exp_avg_sqs[i], index)
            g = grads[i][index].to(m.dtype) * (-1.0 if maximize else 1.0)
            if (bounded and outside_range(g)) or (nonfinite != "propagate" and not finite(g, m)):
                progress.skip()
                continue
            old = Bases(*(optional(x[i], index) for x in (lefts, rights, left_bases, right_bases)))
            first = uninitialised(old)
            idle = first and public_schatten
            t = progress.next_step(index)
            new = initialised(old, g, shampoo_beta) if first else old
            new_m, new_v = m, v
            if not idle:
                rotated = rotate(g, new.left_basis, new.right_basis)
                new_m = beta1 * m + (1.0 - beta1) * rotated
                new_v, gamma = _adaptation(new_m, rotated, v, t, step)
                update = scales[i] * gamma * _direction(new_m, rotated, step)
                update = rotate_back(update, new.left_basis, new.right_basis)
            if not first:
                new = accumulated(new, g, shampoo_beta)
                if refresh[i]:
                    new, new_m, new_v = refreshed(new, new_m, new_v, permute=public_schatten)
            new_w = param[index]
            if not idle:
                if normalize_grads:
                    update = rms_normalized(update)
                size = rate
                if public_schatten:
                    size *= decay * (adam_bias(beta1, beta2, t) if correct_bias else 1.0)
                new_w = moved(new_w, update, rate=size, decay=decay)
            states, values = [m, *old], [new_m, *new]
            if variance != "none":
                states, values = [*states, v], [*values, new_v]
            if nonfinite != "propagate" and not (finite(*values) and (idle or finite(new_w))):
                progress.skip()
                continue
            for state, value in zip(states, values, strict=True):
                state.copy_(value)
            if not idle:
                param[index].copy_(new_w)
                progress.update(index)
        progress.finish()


def _rows(squares: Tensor, variance: str) -> Tensor:
    """The state of the variance as matrices: that of "low_memory" is one row of a matrix each."""
    return squares.unsqueeze(-2) if variance == "low_memory" else squares


def _direction(m: Tensor, g: Tensor, step: _Deva) -> Tensor:
    """O, the matrix sign or the elementwise one."""
    n = step.beta1 * m + (1.0 - step.beta1) * g if step.nesterov else m
    if step.norm == "linf":
        return sign(n)
    return orthogonalize(
        sign(n) if step.sign else n,
        step.rows,
        method="standard",
        restarts=(),
        compute_dtype=step.compute_dtype,
        eps=0.0,
        norm="schatten8",
        norm_factor=1.0,
    )


def _adaptation(m: Tensor, g: Tensor, v: Tensor, t: float, step: _Deva) -> tuple[Tensor, Tensor]:
    """The new V and Gamma."""
    if step.variance == "none":
        return v, torch.ones_like(m)
    mhat = m / (1.0 - step.beta1**t) if step.correct_bias else m
    bias = 1.0 - step.beta2**t if step.correct_bias else 1.0
    if step.variance == "low_memory":
        observed = torch.cat([(g * g).sum(1), (g * g).sum(0)])
        v = step.beta2 * v + (1.0 - step.beta2) * observed
        v_r, v_c = (v / bias).split(list(m.shape))
        r = _ratio((mhat * mhat).sum(1), v_r, step)
        c = _ratio((mhat * mhat).sum(0), v_c, step)
        return v, r.sqrt()[:, None] * c.sqrt()
    observed = _energy(mhat if step.variance == "momentum" else g, step)
    scale = _energy(g if step.variance == "instant" else mhat, step)
    v = step.beta2 * v + (1.0 - step.beta2) * observed
    return v, _ratio(scale, v / bias, step)


def _energy(x: Tensor, step: _Deva) -> Tensor:
    """r c^T of the row and column norms, or the elementwise square."""
    if step.norm == "linf":
        return x * x
    return torch.outer((x * x).sum(1).sqrt(), (x * x).sum(0).sqrt())


def _ratio(energy: Tensor, v: Tensor, step: _Deva) -> Tensor:
    """sqrt(energy / v) with its eps; 1 for 0 / 0."""
    if step.eps_mode == "outside":
        top, bottom = energy.sqrt(), v.sqrt() + step.eps
    else:
        eps = step.eps * v.mean() if step.eps_mode == "relative" else step.eps
        top, bottom = energy.sqrt(), (v + eps).sqrt()
    return torch.where((bottom == 0.0) & (top == 0.0), 1.0, top / bottom)


def _check_options(
    eps_mode: str,
    norm: str,
    variance: str,
    rows: Sequence[Sequence[float]],
    compute_dtype: torch.dtype,
    reference: bool,
) -> None:
    check_choice("eps_mode", eps_mode, _EPS_MODES)
    check_choice("norm", norm, _NORMS)
    check_choice("variance", variance, _VARIANCES)
    if norm == "linf" and variance == "low_memory":
        raise ValueError("variance='low_memory' keeps row and column sums, which norm='linf' lacks")
    if norm == "schatten" and (not rows or any(len(row) != 3 for row in rows)):
        raise ValueError(f"rows must hold (a, b, c) for every step, not {rows!r}")
    if compute_dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise TypeError(
            f"compute_dtype must be float64, float32, bfloat16 or float16, not {compute_dtype}"
        )
    if reference and eps_mode != "inside":
        raise ValueError(f"reference=True has its eps inside the root, not eps_mode={eps_mode!r}")
    if reference and variance not in _PUBLIC_VARIANCES[norm]:
        raise ValueError(
            f"reference=True with norm={norm!r} has variance "
            f"{' or '.join(_PUBLIC_VARIANCES[norm])}, not {variance!r}"
        )


def _check_squares(squares: Sequence[Tensor], params: Sequence[Tensor], variance: str) -> None:
    if variance != "low_memory":
        if variance != "none":
            check_state("exp_avg_sqs", squares, params)
        return check_list("exp_avg_sqs", squares, len(params))
    check_list("exp_avg_sqs", squares, len(params))
    for i, (v, param) in enumerate(zip(squares, params, strict=True)):
        expected = (*param.shape[:-2], param.shape[-2] + param.shape[-1])
        if v.shape != expected:
            raise ValueError(
                f"exp_avg_sqs[{i}] must have shape {expected} for low_memory, not {tuple(v.shape)}"
            )
        check_full_precision(f"exp_avg_sqs[{i}]", v)
        check_writable(f"exp_avg_sqs[{i}]", v)
        check_device(f"exp_avg_sqs[{i}]", v, param)
