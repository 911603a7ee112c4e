"""DeVA: variance adaptation fused with orthogonalization."""

from __future__ import annotations

import torch
from torch import Tensor

from spectral_kernels._backend import operator
from spectral_kernels._options import BasisLists, DevaOptions, takes

from .._step_checks import check_deva
from ._shared import (
    REFERENCE,
    Progress,
    absent,
    finite,
    matrices,
    moved,
    optional,
    outside_range,
    sign,
    store,
    widened,
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


@operator
@takes(BasisLists, DevaOptions)
def deva_step_(lists: BasisLists, options: DevaOptions) -> None:
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
        exp_avgs: M, shapes of the params, float32 or float64; bfloat16 of params that are not
            float64, rounded at random (`rounded_at_random`).
        exp_avg_sqs: V, likewise; (..., m + n) for "low_memory", not in bfloat16; unused for "none".
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
    check_deva(lists, options, REFERENCE)
    params, grads, exp_avgs, exp_avg_sqs, lefts, rights, left_bases, right_bases = lists[:8]
    step_counts, skipped, lr = lists[8:]
    variance = options.variance
    rate, propagate = float(lr), options.nonfinite == "propagate"
    decay = 1.0 - rate * options.weight_decay
    beta1, shampoo_beta = options.beta1, options.shampoo_beta
    public_schatten = options.public_schatten
    for i, param in enumerate(params):
        progress = Progress(step_counts[i], skipped)
        factors = not (absent(lefts[i]) and absent(rights[i]))
        bounded = factors or variance != "none"
        bounded = bounded and not options.reference and options.eps_mode == "relative"
        for index in matrices(param) if param.numel() else ():
            kept_m, kept_v = exp_avgs[i][index], optional(exp_avg_sqs[i], index)
            m, v = widened(kept_m), widened(kept_v)
            g = grads[i][index].to(m.dtype) * (-1.0 if options.maximize else 1.0)
            if (bounded and outside_range(g)) or (not propagate and not finite(g, m)):
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
                new_v, gamma = _adaptation(new_m, rotated, v, t, options)
                direction = _direction(new_m, rotated, options, param)
                update = options.scales[i] * gamma * direction
                update = rotate_back(update, new.left_basis, new.right_basis)
            if not first:
                new = accumulated(new, g, shampoo_beta)
                if options.refresh[i]:
                    new, new_m, new_v = refreshed(new, new_m, new_v, permute=public_schatten)
            new_w = param[index]
            if not idle:
                if options.normalize_grads:
                    update = rms_normalized(update)
                size = rate
                if public_schatten:
                    bias = adam_bias(beta1, options.beta2, t) if options.correct_bias else 1.0
                    size *= decay * bias
                new_w = moved(new_w, update, rate=size, decay=decay)
            states, values = [kept_m, *old], [new_m, *new]
            if variance != "none":
                states, values = [*states, kept_v], [*values, new_v]
            if not propagate and not (finite(*values) and (idle or finite(new_w))):
                progress.skip()
                continue
            for state, value in zip(states, values, strict=True):
                store(state, value, t - 1.0)
            if not idle:
                param[index].copy_(new_w)
                progress.update(index)
        progress.finish()


def _direction(m: Tensor, g: Tensor, step: DevaOptions, like: Tensor) -> Tensor:
    """O of a parameter, the matrix sign or the elementwise one."""
    n = step.beta1 * m + (1.0 - step.beta1) * g if step.nesterov else m
    if step.norm == "linf":
        return sign(n)
    return orthogonalize(sign(n) if step.sign else n, step.iteration_of(like))


def _adaptation(
    m: Tensor, g: Tensor, v: Tensor, t: float, step: DevaOptions
) -> tuple[Tensor, Tensor]:
    """The new V and Gamma."""
    if step.variance == "none":
        return v, torch.ones_like(m)
    mhat = m / (1.0 - step.beta1**t) if step.debiased else m
    bias = 1.0 - step.beta2**t if step.debiased else 1.0
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


def _energy(x: Tensor, step: DevaOptions) -> Tensor:
    """r c^T of the row and column norms, or the elementwise square."""
    if step.norm == "linf":
        return x * x
    return torch.outer((x * x).sum(1).sqrt(), (x * x).sum(0).sqrt())


def _ratio(energy: Tensor, v: Tensor, step: DevaOptions) -> Tensor:
    """sqrt(energy / v) with its eps; 1 for 0 / 0."""
    if step.eps_mode == "outside":
        top, bottom = energy.sqrt(), v.sqrt() + step.eps
    else:
        eps = step.eps * v.mean() if step.eps_mode == "relative" else step.eps
        top, bottom = energy.sqrt(), (v + eps).sqrt()
    return torch.where((bottom == 0.0) & (top == 0.0), 1.0, top / bottom)
