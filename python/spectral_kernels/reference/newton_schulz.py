"""Newton-Schulz iterations towards the polar factor, the polar factor, and the fused Muon step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from spectral_kernels._backend import check_matrix, operator
from spectral_kernels._options import (
    MuonLists,
    MuonOptions,
    NewtonSchulzOptions,
    iterates,
    takes,
)

from .._step_checks import check_muon
from ._shared import (
    REFERENCE,
    Progress,
    exponent_of,
    finite,
    matrices,
    max_abs,
    moved,
    norm,
    optional,
    scaled,
    store,
    widened,
)
from .symmetric_matmul import product


@operator
@iterates
def newton_schulz(x: Tensor, options: NewtonSchulzOptions) -> Tensor:
    """p_K(... p_1(X / max(norm_factor nu(X), eps))), p_t(X) = a X + b (XX^T) X + c (XX^T)^2 X.

    p_t acts on the singular values as a s + b s^3 + c s^5. A tall matrix is iterated on transposed.

    "standard" (algorithm A1):
        R = XX^T;  Z = b R + c R^2;  X <- a X + Z X
    "gram" (A4), equal in exact arithmetic, with R and Q small (s x s):
        R = XX^T;  Q = I
        step t:  if t in restarts:  X <- Q X;  R <- XX^T;  Q <- I
                 W = a I + b R + c R^2;  Q <- Q W;  R <- W R W
        result Q X
    with a step between two restarts done as in "standard".
    "auto" is "standard" here; another backend may choose.

    The matrix is scaled by a power of two so that its largest element is in [1, 2), and its norm nu
    and the division are in float64, so X 2^k gives the same bits as X where no element becomes
    subnormal (and eps does not act). The result is rounded to compute_dtype, in which all products
    are done; with a 16-bit compute_dtype torch accumulates in float32 and rounds each product, and
    "gram" keeps R, W and Q in float32 (the mixed variant), also where Q meets X: on a null space Q
    is hundreds of times what it is elsewhere, and a rounded Q would not keep it out.

    Args:
        x: (..., m, n), any float dtype.
        rows: one (a, b, c) a step.
        method: "standard", "gram" or "auto".
        restarts: steps, counted from 0, before which "gram" forms X and R anew.
        compute_dtype: float64, float32, bfloat16 or float16.
        eps: floor of the norm, as in torch.optim.Muon.
        norm: "frobenius", or "schatten8" for (sum s^8)^(1/8) = ||(XX^T)^2||_F^(1/4).
        norm_factor: what the coefficients ask the norm to be multiplied by.

    Returns:
        The shape and dtype of x. Zero gives zero; a matrix with a non-finite element gives NaN.

    Raises:
        TypeError, ValueError: an argument out of its range.

    Source: Jordan, "Muon" (2024); Gram form: Dao-AILab/gram-newton-schulz; Schatten-8 norm: Su,
    kexue.fm/archives/10922.
    """
    check_matrix("x", x)
    options.check(1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    for index in matrices(x):
        out[index] = orthogonalize(x[index], options)
    return out


@operator
def polar(x: Tensor) -> Tensor:
    """The polar factor U V^T of X = U S V^T over the singular values that are not null.

    A singular value counts as null up to max(m, n) * eps * (the largest one), eps that of x's dtype
    (of float32 for 16-bit x); U V^T is 0 on the null space. Computed in float64.

    Args:
        x: (..., m, n), any float dtype.

    Returns:
        The shape and dtype of x. Zero gives zero; a matrix with a non-finite element gives NaN.

    Raises:
        TypeError, ValueError: x is not a dense float batch of matrices.
    """
    check_matrix("x", x)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    eps = torch.finfo(x.dtype if x.dtype == torch.float64 else torch.float32).eps
    for index in matrices(x) if x.numel() else ():
        matrix = x[index].double()
        if not finite(matrix):
            out[index] = math.nan
        elif max_abs(matrix) == 0.0:
            out[index] = 0.0
        else:
            u, s, vh = torch.linalg.svd(_unit_scale(matrix)[0], full_matrices=False)
            kept = s > max(matrix.shape) * eps * s[0]
            out[index] = (u[:, kept] @ vh[kept]).to(x.dtype)
    return out


@operator
@takes(MuonLists, MuonOptions)
def muon_step_(lists: MuonLists, options: MuonOptions) -> None:
    """One Muon step over a list of matrices.

        M <- momentum M + (1 - momentum) G
        N = (1 - momentum) G + momentum M if nesterov, else M
        O = newton_schulz(N)
        W <- (1 - lr weight_decay) W - lr scale O

    in the dtype of M, W rounded once; float64 parameters iterate in float64 whatever compute_dtype
    says. With beta2 every row i of O, a neuron, has a second moment (NorMuon), and what is
    subtracted is U in the place of O:

        v_i <- beta2 v_i + (1 - beta2) mean_j O_ij^2
        D_ij = O_ij / (sqrt(v_i) + neuron_eps)
        U = D |O|_F / |D|_F

    With `cautious` weight decay is that of the elements with U_ij W_ij >= 0 alone. With `hyperball`
    W keeps its length (MuonH): the direction, O or U, has no length of its own, so `scales` are
    without effect, and there is no decay:

        W' = W - lr |W|_F U / |U|_F
        W <- |W|_F W' / |W'|_F

    where U = 0 or W = 0, W stays. M in bfloat16 is computed in float32 and rounded at random, see
    `rounded_at_random`; what is iterated on is M before that.

    Args:
        params, grads: entry i is (..., m_i, n_i); a 4-D weight is flattened by the caller.
        momentum_buffers: shapes of the params, float32 or float64; bfloat16 of params that are not
            float64.
        second_moments: (..., m_i, 1), float64 of float64 params, else float32; size 0 without
            beta2.
        step_counts: 0-dim or the batch's shape; counts the applied steps.
        skipped: one int64; counts the matrices that were skipped.
        lr: one number.
        momentum, weight_decay: numbers.
        nesterov: whether N looks one step ahead.
        beta2: in [0, 1), or None.
        neuron_eps, cautious, hyperball: see above; hyperball takes weight_decay=0.
        rows, method, compute_dtype, eps, norm, norm_factor: see `newton_schulz`.
        restarts: those of every entry, or empty for none at all.
        scales: one factor an entry, from the shape of its matrices.
        maximize: G <- -G.
        nonfinite: a matrix whose gradient, momentum or second moment is not finite, or whose new
            parameter would not be, keeps every bit and is counted ("skip"), goes through the
            formula and becomes NaN ("propagate"), or raises ("raise": gradients, state and
            parameters; what becomes non-finite in the step itself is kept and counted).

    Raises:
        TypeError, ValueError: bad input, before anything is written.

    Source: Jordan, "Muon" (2024); torch.optim.Muon; NorMuon: arXiv 2510.05491, with the length of O
    kept as in its public code (the paper's is 0.2 sqrt(mn)); cautious decay: arXiv 2510.12402;
    hyperball: Wen et al., "Fantastic Pretraining Optimizers and Where to Find Them 2.1" (2025).
    """
    check_muon(lists, options, REFERENCE)
    params, skipped, lr = lists.params, lists.skipped, lists.lr
    rate, propagate = float(lr), options.nonfinite == "propagate"
    momentum, beta2 = options.momentum, options.beta2
    entries = zip(*lists[:5], options.scales, options.restarts_of(len(params)), strict=True)
    for param, grad, buffer, second, count, scale, steps in entries:
        progress, iteration = Progress(count, skipped), options.iteration_of(param, steps)
        for index in matrices(param) if param.numel() else ():
            m = widened(buffer[index])
            g = grad[index].to(m.dtype) * (-1.0 if options.maximize else 1.0)
            v = optional(second, index)
            if not propagate and not finite(g, m, v):
                progress.skip()
                continue
            new_m = momentum * m + (1.0 - momentum) * g
            n = (1.0 - momentum) * g + momentum * new_m if options.nesterov else new_m
            direction = orthogonalize(n, iteration)
            new_v = v
            if beta2 is not None:
                direction, new_v = by_neurons(direction, v, beta2, options.neuron_eps)
            decay = 1.0 - rate * options.weight_decay
            if options.hyperball:
                new_w = on_sphere(param[index], direction, rate)
            else:
                new_w = moved(param[index], direction, rate=rate * scale, decay=decay)
            if options.cautious and not options.hyperball:
                undecayed = moved(param[index], direction, rate=rate * scale, decay=1.0)
                new_w = torch.where(against(direction, param[index]), undecayed, new_w)
            if not propagate and not finite(new_m, new_w):
                progress.skip()
                continue
            store(buffer[index], new_m, progress.next_step(index) - 1.0)
            v.copy_(new_v)
            param[index].copy_(new_w)
            progress.update(index)
        progress.finish()


def by_neurons(o: Tensor, v: Tensor, beta2: float, eps: float) -> tuple[Tensor, Tensor]:
    """Rows over the roots of their second moments, the length kept; and the new second moments."""
    v = beta2 * v + (1.0 - beta2) * o.square().mean(dim=-1, keepdim=True)
    d = o / (v.sqrt() + eps)
    length = torch.linalg.norm(d)
    # Without a direction there is no length to keep.
    return (d * (torch.linalg.norm(o) / length) if length != 0.0 else o), v


def on_sphere(w: Tensor, u: Tensor, rate: float) -> Tensor:
    """W - rate |W| U / |U|, brought back to the length of W."""
    wide = w.to(u.dtype)
    length, size = norm(wide), norm(u)
    if length == 0.0 or size == 0.0:
        return w.clone()
    moved = wide - (rate * length / size) * u
    return (moved * (length / norm(moved))).to(w.dtype)


def against(u: Tensor, w: Tensor) -> Tensor:
    """Where two tensors differ in sign, 0 with neither; products of small numbers vanish."""
    return ((u > 0) & (w < 0)) | ((u < 0) & (w > 0))


def orthogonalize(x: Tensor, options: NewtonSchulzOptions) -> Tensor:
    """`newton_schulz` of one matrix."""
    if x.numel() == 0:
        return x.clone()
    if not finite(x):
        return torch.full_like(x, math.nan)
    if max_abs(x) == 0.0:
        return torch.zeros_like(x)
    wide = x if x.shape[0] <= x.shape[1] else x.mT
    iterate, exponent = _unit_scale(wide.double())
    nu = torch.linalg.norm(iterate)
    if options.norm == "schatten8":
        gram = iterate @ iterate.mT
        nu = torch.linalg.norm(gram @ gram) ** 0.25
    floor = scaled(nu.new_tensor(options.eps), -exponent)
    iterate = iterate / torch.maximum(options.norm_factor * nu, floor)
    iterate = iterate.to(options.compute_dtype)
    if options.method == "gram":
        result = _gram(iterate, options.rows, options.restarts)
    else:
        result = _standard(iterate, options.rows)
    return (result if wide is x else result.mT).to(x.dtype)


def _standard(x: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    for a, b, c in rows:
        r = product(x, x.mT)
        z = b * r if c == 0.0 else torch.addmm(r, r, r, beta=b, alpha=c)
        x = torch.addmm(x, z, x, beta=a)
    return x


def _gram(x: Tensor, rows: Sequence[Sequence[float]], restarts: Sequence[int]) -> Tensor:
    cuts = [0, *sorted(set(restarts)), len(rows)]
    for begin, end in itertools.pairwise(cuts):
        x = (_standard if end - begin == 1 else _segment)(x, rows[begin:end])
    return x


def _segment(x: Tensor, rows: Sequence[Sequence[float]]) -> Tensor:
    """All steps on R alone."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    eye = torch.eye(len(x), dtype=wide.dtype, device=x.device)
    r, q = product(wide, wide.mT), eye
    for a, b, c in rows:
        w = a * eye + b * r + c * product(r, r)
        q = product(q, w)
        r = product(product(w, r), w)
    return (q @ wide).to(x.dtype)


def _unit_scale(x: Tensor) -> tuple[Tensor, int]:
    """X 2^-e with the largest element in [1, 2), and e."""
    exponent = exponent_of(max_abs(x))
    return scaled(x, -exponent), exponent
