"""Newton-Schulz iterations towards the polar factor, and the fused Muon step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import _checks, _dispatch, _options, coefficients as _coefficients
from ._lists import check_counted, counters, scales_of
from ._options import COMPUTE_DTYPE, METHODS, NORMS, MuonOptions
from ._restarts import restarts_for, restarts_of

__all__ = ["muon_step_", "newton_schulz", "polar"]

CoefficientsLike = str | Sequence[float] | Sequence[Sequence[float]]


def newton_schulz(
    x: Tensor,
    *,
    coefficients: CoefficientsLike = "muon",
    steps: int | None = None,
    method: str = "auto",
    restarts: Sequence[int] | None = None,
    compute_dtype: torch.dtype | None = None,
    eps: float = 0.0,
    norm: str = "frobenius",
    backend: str | None = None,
) -> Tensor:
    """An approximate polar factor: every singular value s of X / |X| becomes p_K(... p_1(s)).

    With p_t(s) = a s + b s^3 + c s^5, a step is X <- a X + (b R + c R^2) X, R = X X^T. The Gram
    form iterates on R alone, W = a I + b R + c R^2, Q <- Q W, R <- W R W, and returns Q X; it is
    the same in exact arithmetic and cheaper for wide or tall matrices. X is first scaled by a power
    of two, so any scale of X gives the same bits, as long as eps does not act and nothing becomes
    subnormal.

    Args:
        x: (..., m, n) float64, float32, bfloat16 or float16; any strides. Tall matrices are
            iterated on transposed, without a copy.
        coefficients: a name of `spectral_kernels.coefficients.names()`, "polar_express(l0, steps)",
            one (a, b, c) for every step, or a sequence of rows.
        steps: number of steps of a named set or a single row (default: its length; 5). A sequence
            of rows fixes it.
        method: "standard", "gram", or "auto": the cheaper one that keeps the accuracy below.
        restarts: steps before which the Gram form recomputes X and R. None: before each but the
            last steps, those whose slopes a multiply to at most 12 (fp32, fp64), 1100 (bf16) or
            500 (fp16); a step by itself is that of the standard form. Where slopes multiply to more
            than 1100 between two given restarts, more are added: rounding noise would overflow.
        compute_dtype: what products are computed in, None: x's dtype. 16-bit means 16-bit operands
            with fp32 accumulation where the hardware has them, else fp32.
        eps: the norm's floor, X / max(|X|, eps), as in torch.optim.Muon.
        norm: "frobenius", or "schatten8", (sum s^8)^(1/8), which wastes less of the interval.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        The shape and dtype of x. Zero gives zero. A matrix with a non-finite element gives NaN
        throughout and leaves its batch-mates alone.

    Raises:
        TypeError, ValueError: an argument out of its range, naming the value.
        RuntimeError: x requires grad, or the backend that was asked for cannot run.

    Accuracy: the error against the same polynomial in float64 is at most twice that of the standard
    iteration in plain torch at the same storage dtype: about 2e-6 in fp32 and 1e-2 in bf16 on
    Gaussian input, more on spectra that decay. It holds for repeated, scaled and zero rows and
    columns, too. Singular values below the coefficients' range, and rounding noise in a null space,
    are not brought to 1.

    Source: Jordan, "Muon" (2024); the Gram form: Dao-AILab/gram-newton-schulz.
    """
    _checks.matrix("x", x)
    _checks.no_autograd("x", x, "newton_schulz")
    rows = _coefficients.resolve(coefficients, steps)
    dtype = (
        x.dtype if compute_dtype is None else COMPUTE_DTYPE.taken("compute_dtype", compute_dtype)
    )
    return _dispatch.run(
        "newton_schulz",
        (x,),
        backend,
        x,
        rows.rows,
        method=_checks.choice("method", method, METHODS),
        restarts=restarts_for(x, rows, method, dtype, restarts),
        compute_dtype=dtype,
        eps=_checks.number("eps", eps),
        norm=_checks.choice("norm", norm, NORMS),
        norm_factor=rows.norm_factor,
    )


def polar(x: Tensor, *, backend: str | None = None) -> Tensor:
    """The polar factor U V^T of X = U S V^T over the singular values that are not null.

    A singular value s counts as null up to max(m, n) eps s_max, with eps of x's dtype (of float32
    for 16-bit x). The result is a partial isometry: 0 on the null space.

    Args:
        x: (..., m, n) float64, float32, bfloat16 or float16; any strides.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        The shape and dtype of x. Zero gives zero; a matrix with a non-finite element gives NaN.

    Raises:
        TypeError, ValueError: x is not a dense floating-point batch of matrices.
        RuntimeError: x requires grad, or the backend that was asked for cannot run.

    Accuracy: computed by a singular value decomposition in float64 and rounded once.
    """
    _checks.matrix("x", x)
    _checks.no_autograd("x", x, "polar")
    return _dispatch.run("polar", (x,), backend, x)


def muon_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    cautious: bool = False,
    hyperball: bool = False,
    second_moments: Sequence[Tensor] | None = None,
    beta2: float = 0.95,
    coefficients: CoefficientsLike = "muon",
    steps: int | None = None,
    scale: str | float | Sequence[float] = "original",
    eps: float = 0.0,
    compute_dtype: torch.dtype | None = None,
    maximize: bool = False,
    method: str = "auto",
    restarts: Sequence[int] | None = None,
    norm: str = "frobenius",
    nonfinite: str = "skip",
    step_counts: Sequence[Tensor] | None = None,
    skipped: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One Muon step over a list of matrices of mixed shapes, in place.

        M <- momentum M + (1 - momentum) G
        N = (1 - momentum) G + momentum M if nesterov, else M
        O = newton_schulz(N)
        W <- (1 - lr weight_decay) W - lr scale O

    With second moments v of the rows, its neurons (NorMuon), W moves by U in the place of O:

        v_i <- beta2 v_i + (1 - beta2) mean_j O_ij^2
        D_ij = O_ij / (sqrt(v_i) + 1e-8)
        U = D |O|_F / |D|_F

    With `hyperball` (MuonH) W keeps its length instead, and the last line is

        W' = W - lr |W|_F O / |O|_F,    W <- |W|_F W' / |W'|_F

    Args:
        params, grads: (..., m, n) each, of one shape; leading dimensions are a batch of matrices.
            Flatten convolution weights first.
        momentum_buffers: shapes of the params, float32 (float64 for float64), or bfloat16 where
            params are not float64. In bfloat16 M is rounded at random, to each of the two numbers
            around it with the probability that keeps its mean, by a hash of step count, row, column
            and the bits that stay: the same anywhere. `step_counts` must be given then.
        lr: a number or a tensor of one number, at least 0 and finite. A tensor on a device is not
            waited for: one that is not finite makes every update so, see `nonfinite`.
        momentum: in [0, 1).
        nesterov: mix the gradient in once more.
        weight_decay: decoupled, applied before the update.
        cautious: elements of W whose sign is against that of O, or U, do not decay.
        hyperball: W stays on the sphere through it (MuonH). lr is the angle of a step, as the
            tangent if O is perpendicular to W; `scale` has no effect, weight_decay must be 0, and
            W = 0 stays 0. Rounding moves the length by some 1e-7 a step in float32.
        second_moments: (..., m, 1) for every param, float32 (float64 for float64), zeros at first.
        beta2: in [0, 1); how much of a second moment stays.
        coefficients, steps, method, restarts, norm, eps: see `newton_schulz`.
        scale: "original" sqrt(max(1, m / n)), "match_rms_adamw" 0.2 sqrt(max(m, n)),
            "spectral_unclamped" sqrt(m / n), "none" 1, one number, or one for every entry.
        compute_dtype: None: bfloat16, as torch.optim.Muon, but float64 for float64 params.
        maximize: ascend.
        nonfinite: a matrix whose gradient or state is not finite, or whose parameter would not
            stay so, keeps every bit ("skip"), becomes NaN ("propagate"), or raises before anything
            is written ("raise": if something given is not finite; a matrix that becomes so in the
            step is skipped).
        step_counts: one tensor an entry, 0-dim or of the batch's shape, advanced by applied steps.
        skipped: one int64, advanced by skipped matrices.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Raises:
        TypeError, ValueError: bad input, naming the value, before anything is written.
        RuntimeError: the backend that was asked for cannot run.

    Accuracy: as `newton_schulz`. Gradients are not modified. An element near 0 may be taken to
    agree in sign where exact arithmetic has it disagree: its decay is then lr weight_decay |W| off.

    Source: Jordan, "Muon" (2024); torch.optim.Muon; NorMuon: arXiv 2510.05491, with the length of O
    kept as in its public code (the paper's is 0.2 sqrt(mn)); cautious decay: arXiv 2510.12402;
    hyperball: Wen et al., "Fantastic Pretraining Optimizers and Where to Find Them 2.1" (2025).
    """
    given = locals()
    rows = _coefficients.resolve(coefficients, steps)
    dtype = COMPUTE_DTYPE.taken("compute_dtype", compute_dtype)
    counts, skips = counters(params, step_counts, skipped)
    for name, tensors in (("grads", grads), ("momentum_buffers", momentum_buffers)):
        _checks.tensors(name, tensors, len(params))
    check_counted(step_counts, momentum_buffers=momentum_buffers)
    _options.check_hyperball(
        hyperball=_checks.flag("hyperball", hyperball),
        weight_decay=_checks.number("weight_decay", weight_decay),
    )
    beta2 = _checks.number("beta2", beta2, 0.0, 1.0)
    moments = second_moments
    if moments is None:
        moments = [params[0].new_empty(0)] * len(params) if params else []
    _checks.tensors("second_moments", moments, len(params))
    _dispatch.run_step(
        "muon_step_",
        backend,
        params,
        grads,
        momentum_buffers,
        moments,
        counts,
        skips,
        _checks.learning_rate(lr),
        **_options.checked(
            MuonOptions,
            given,
            beta2=None if second_moments is None else beta2,
            rows=rows.rows,
            scales=scales_of(params, scale),
            restarts=restarts_of(params, rows, method, dtype, restarts),
            compute_dtype=dtype,
            norm_factor=rows.norm_factor,
        ),
    )
