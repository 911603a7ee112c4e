"""Inverse p-th roots of symmetric positive semidefinite matrices, and the fused Shampoo step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, overload

import torch
from torch import Tensor

from . import _checks, _dispatch, _options
from ._lists import check_counted, counters
from ._options import ROOT_METHODS, ShampooOptions, check_kl, check_root_method

__all__ = ["RootInfo", "inverse_root", "shampoo_step_"]


class RootInfo(NamedTuple):
    """How every root of a batch was found; tensors of the batch's shape on its device.

    Attributes:
        status: int64, 0 converged, 1 stagnated (also: the matrix is not semidefinite), 2 fell back
            from an iteration to an eigendecomposition or the other way, 3 rank-deficient (a
            pseudo-inverse root), 4 non-finite input.
        steps: int64, steps of the iteration that was accepted, 0 for an eigendecomposition.
        residual: ||(X^floor(p/2) (A + delta I) X^ceil(p/2) - I) Omega||_F / ||Omega||_F for a fixed
            n x 8 sign matrix Omega.
        delta: the ridge that was added.
    """

    status: Tensor
    steps: Tensor
    residual: Tensor
    delta: Tensor


@overload
def inverse_root(
    a: Tensor,
    p: int,
    *,
    ridge: float = ...,
    relative_ridge: float = ...,
    method: str = ...,
    return_info: Literal[False] = ...,
    backend: str | None = ...,
) -> Tensor: ...


@overload
def inverse_root(
    a: Tensor,
    p: int,
    *,
    ridge: float = ...,
    relative_ridge: float = ...,
    method: str = ...,
    return_info: Literal[True],
    backend: str | None = ...,
) -> tuple[Tensor, RootInfo]: ...


def inverse_root(
    a: Tensor,
    p: int,
    *,
    ridge: float = 0.0,
    relative_ridge: float = 0.0,
    method: str = "auto",
    return_info: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, RootInfo]:
    """(A + delta I)^(-1/p), delta = max(ridge, relative_ridge * max_i sum_j |A_ij|).

    A is symmetrised first, and scaled by a power of two, so that root(2^(p k) A) has the bits of
    root(A) with a relative ridge. With delta = 0 a singular A gets its pseudo-inverse root:
    eigenvalues up to max(4u, 4.4e-16 n) of the largest count as 0.

    Args:
        a: (..., n, n) float32 or float64, symmetric positive semidefinite; any strides.
        p: the root, 1 to 8. Rational exponents are powers of a root.
        ridge: an absolute ridge, at least 0.
        relative_ridge: a ridge relative to A's largest absolute row sum, at least 0.
        method: "iteration", products only: linear and then quadratic equi-oscillating rows;
            "eigen", a float64 eigendecomposition; "auto", the first where the ridge is large enough
            to bound the spectrum (delta >= 4 u ||A + delta I||) and n > 2, as rounding errors of
            two rows do not average out, else the second. On the CPU "auto" begins with one to four
            shifted inverses in float32, for p = 2 and 4 and n from 96 on, which takes half the
            time; "newton" and "newton_db" (p = 2, 4, 8),
            coupled Newton and Denman-Beavers for comparison, on backend
            "reference" only.
        return_info: also return how it went.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        (..., n, n) in a's dtype; with return_info the pair of it and a `RootInfo`. A zero matrix
        gives delta^(-1/p) I, or 0 if delta = 0; a matrix with a non-finite element gives NaN and
        leaves its batch-mates alone.

    Raises:
        TypeError, ValueError: an argument out of its range, naming the value.
        RuntimeError: a requires grad, or the backend that was asked for cannot run.

    Accuracy: first order, the relative error is some u cond(A + delta I) / p, and that of a block
    or of a range of eigenvalues some u times its own condition, wherever the rest of the spectrum
    ends. Every iteration is checked by its residual, at most 0.25 in fp32 and 1e-6 in float64, and
    by one that is weighted with A, at most 256u (p + cond^(1/p)), which the large eigenvalues
    dominate; a root that fails is iterated on for longer, and then replaced by an
    eigendecomposition.
    An eigendecomposition is in float64; on the CPU it is multiplied out on a few probes, and
    computed once more where it is wrong. With method="eigen", where LAPACK fails all the same, the
    iteration takes over if the ridge bounds the spectrum.

    Source: coupled iterations: Guo and Higham (2006); the rows: `spectral_kernels.coefficients`.
    """
    _checks.square("a", a)
    _checks.no_autograd("a", a, "inverse_root")
    return_info = _checks.flag("return_info", return_info)
    root, *info = _dispatch.run(
        "inverse_root",
        (a,),
        backend,
        a,
        _checks.integer("p", p, 1, 8),
        ridge=_checks.number("ridge", ridge),
        relative_ridge=_checks.number("relative_ridge", relative_ridge),
        method=_root_method("method", method, p),
    )
    return (root, RootInfo(*info)) if return_info else root


def shampoo_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    lefts: Sequence[Tensor | None],
    rights: Sequence[Tensor | None],
    left_roots: Sequence[Tensor | None],
    right_roots: Sequence[Tensor | None],
    graft_squares: Sequence[Tensor | None],
    *,
    lr: float | Tensor,
    beta1: float = 0.9,
    beta2: float = 0.95,
    graft_beta2: float | None = None,
    root: int | None = None,
    ridge: float = 0.0,
    relative_ridge: float = 1e-6,
    root_method: str = "auto",
    weight_decay: float = 0.0,
    graft: str = "adam",
    graft_eps: float = 1e-8,
    graft_eps_mode: str = "relative",
    kl: bool = False,
    kl_order: str = "sequential",
    debias: bool = True,
    maximize: bool = False,
    nonfinite: str = "skip",
    refresh: bool | Sequence[bool | int] = True,
    root_failures: Sequence[Tensor] | None = None,
    step_counts: Sequence[Tensor] | None = None,
    skipped: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One Shampoo or KL-Shampoo step over a list of matrices of mixed shapes, in place.

        L <- beta2 L + w G G^T;  R <- beta2 R + w G^T G          (w = 1 - beta2, or 1 if beta2 = 1)
        where refresh: X_L = (Lhat + delta I)^(-1/root), X_R likewise        (`inverse_root`)
        M <- beta1 M + (1 - beta1) G
        P = X_L Mhat X_R;  U = P ||D||_F / ||P||_F, D the grafted direction
        W <- (1 - lr weight_decay) W - lr U

    Hats are debiased values, x / (1 - beta^t); AdaGrad sums (beta2 = 1) and KL factors are not.
    With `kl` the increments are (G X_R)(G X_R)^T / n and (X_L G)^T (X_L G) / m, factors start at
    rms(G) I, and both sides are rebalanced to equal mean eigenvalues after a refresh. A root that
    fails keeps the old one and is counted.

    Args:
        params, grads: (..., m, n) each, of one shape; leading dimensions are a batch of matrices.
            A block of a matrix is an entry of its own, as a strided view.
        momentum_buffers: M, shapes of the params, float32 (float64 for float64), or bfloat16 as the
            momentum of `muon_step_`.
        lefts, left_roots: L and X_L, (..., m, m), or None (or size 0) for no left side. Roots start
            as the identity.
        rights, right_roots: R and X_R, (..., n, n), likewise.
        graft_squares: V, likewise, but not in bfloat16 for "adagrad"; None for graft "none" and
            "sgd".
        lr: a number or a tensor of one number, at least 0 and finite. A tensor on a device is not
            waited for: one that is not finite makes every update so, see `nonfinite`.
        beta1: in [0, 1).
        beta2: in [0, 1]; 1 is AdaGrad's sum.
        graft_beta2: in [0, 1); default beta2, or 0.999 if that is 1.
        root: p of the roots, 1 to 8; default 4, or 2 with `kl`, which needs 2.
        ridge, relative_ridge: see `inverse_root`.
        root_method: its `method`.
        weight_decay: decoupled, applied before the update.
        graft: "sgd" D = Mhat; "adagrad", "rmsprop", "adam" D = Mhat / (sqrt(V) + eps) with V a sum,
            a mean, a debiased mean of G^2; "none" U = P.
        graft_eps: eps, times rms(sqrt(V)) if graft_eps_mode is "relative", as it is if "absolute".
        kl: KL-Shampoo's factors.
        kl_order: where refreshed, "sequential" updates and re-roots the shorter side before the
            other uses it; "simultaneous" takes both from the old roots, as public code does.
        debias: see above; KL factors never are.
        maximize: ascend.
        nonfinite: a matrix whose gradient or momentum is not finite, or whose state or parameter
            would not stay so, keeps every bit ("skip"), becomes NaN ("propagate"), or raises before
            anything is written ("raise": if something given is not finite; a matrix that becomes so
            in the step is skipped).
        refresh: whether roots are taken anew, one for all entries or one for each.
        root_failures: one (..., 2) int64 tensor an entry, advanced by roots that failed, left and
            right.
        step_counts: one tensor an entry, 0-dim or of the batch's shape, advanced by applied steps.
        skipped: one int64, advanced by skipped matrices.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Raises:
        TypeError, ValueError: bad input, naming the value, before anything is written.
        RuntimeError: the backend that was asked for cannot run.

    Accuracy: factors accumulate in fp32; roots as `inverse_root`. A gradient scaled by a power of
    two gives the same update while max |G| is in 2^-50 .. 2^50 (its square has to fit into the
    state; outside of that the matrix is skipped and counted) if nothing absolute enters: ridge = 0
    or kl, and either a graft of "adagrad", "rmsprop" or "adam" with a relative eps, or "none" with
    kl or with a root of twice the number of sides. Otherwise the update scales as the formula does:
    with "sgd" as G, with "none" as G^(1 - 2 sides / root).

    Source: Gupta et al., arXiv 1802.09568; Shi et al., arXiv 2309.06497; KL: arXiv 2509.03378.
    """
    given = locals()
    counts, skips = counters(params, step_counts, skipped)
    kl = _checks.flag("kl", kl)
    root = (2 if kl else 4) if root is None else _checks.integer("root", root, 1, 8)
    check_kl(kl=kl, root=root)
    beta2 = _checks.number("beta2", beta2, 0.0, 1.0, include_high=True)
    if graft_beta2 is None:
        graft_beta2 = beta2 if beta2 < 1.0 else 0.999
    if root_failures is None:
        root_failures = [
            torch.zeros(*p.shape[:-2], 2, dtype=torch.int64, device=p.device) for p in params
        ]
    for name, tensors in (
        ("grads", grads),
        ("momentum_buffers", momentum_buffers),
        ("root_failures", root_failures),
    ):
        _checks.tensors(name, tensors, len(params))
    _checks.tensors("graft_squares", graft_squares, len(params), optional=True)
    check_counted(step_counts, momentum_buffers=momentum_buffers, graft_squares=graft_squares)
    _dispatch.run_step(
        "shampoo_step_",
        backend,
        params,
        grads,
        momentum_buffers,
        _checks.factor_list("lefts", lefts, params),
        _checks.factor_list("rights", rights, params),
        _checks.factor_list("left_roots", left_roots, params),
        _checks.factor_list("right_roots", right_roots, params),
        _checks.factor_list("graft_squares", graft_squares, params),
        root_failures,
        counts,
        skips,
        _checks.learning_rate(lr),
        **_options.checked(
            ShampooOptions,
            given,
            beta2=beta2,
            graft_beta2=_checks.number("graft_beta2", graft_beta2, 0.0, 1.0),
            root=root,
            root_method=_root_method("root_method", root_method, root),
            refresh=_checks.flags("refresh", refresh, len(params)),
        ),
    )


def _root_method(name: str, method: str, p: int) -> str:
    _checks.choice(name, method, ROOT_METHODS)
    check_root_method(method, p)
    return method
