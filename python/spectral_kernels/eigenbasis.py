"""Eigenbases of symmetric matrices, their cheap refresh, and the fused SOAP step."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from . import _checks, _dispatch, _options
from ._lists import check_counted, counters
from ._options import SoapOptions

__all__ = ["eigenbasis", "refresh_eigenbasis", "soap_step_"]


def eigenbasis(a: Tensor, *, backend: str | None = None) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors of (A + A^T) / 2: A ~ V diag(values) V^T.

    The basis is deterministic: every column has its element of largest magnitude positive, and a
    zero matrix has the identity.

    Args:
        a: (..., n, n) float32 or float64; any strides.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        values (..., n) and vectors (..., n, n) in a's dtype. A matrix with a non-finite element
        gives NaN and leaves its batch-mates alone.

    Raises:
        TypeError, ValueError: a is not a batch of square float32 or float64 matrices.
        RuntimeError: a requires grad, or the backend that was asked for cannot run.

    Accuracy: computed in float64 and rounded once.
    """
    _checks.square("a", a)
    _checks.no_autograd("a", a, "eigenbasis")
    values, vectors = _dispatch.run("eigenbasis", (a,), backend, a)
    return values, vectors


def refresh_eigenbasis(
    q: Tensor, a: Tensor, *, sort: bool = False, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """One round of orthogonal iteration: the orthonormal factor of A Q, column j after column j.

    Columns are made orthonormal in descending order of diag(Q^T A Q), as by QR with a positive
    diagonal, and put back in their places, so state that is kept in the basis needs no permutation.

    Args:
        q: (..., n, n) float32 or float64, orthogonal: the basis so far.
        a: (..., n, n), q's dtype; (A + A^T) / 2 counts.
        sort: leave the columns in descending order instead.
        backend: "cpu", "cuda", "triton", "reference"; None chooses.

    Returns:
        values (..., n), the Rayleigh quotients diag(Q^T A Q) in the order of the new columns, and
        the new basis (..., n, n). A zero A keeps q; a matrix with a non-finite element gives NaN.

    Raises:
        TypeError, ValueError: bad input, naming the value.
        RuntimeError: an input requires grad, or the backend that was asked for cannot run.

    Accuracy: max |Q^T Q - I| <= 5e-6 in float32 and 1e-13 sqrt(n) in float64, checked; CholeskyQR
    with Householder QR behind it.

    Source: Vyas et al., arXiv 2409.11321, algorithm 4.
    """
    for name, x in (("q", q), ("a", a)):
        _checks.square(name, x)
        _checks.no_autograd(name, x, "refresh_eigenbasis")
    if q.shape != a.shape:
        raise ValueError(f"q has shape {tuple(q.shape)}, a {tuple(a.shape)}")
    if q.dtype != a.dtype:
        raise TypeError(f"q is {q.dtype}, a {a.dtype}")
    _checks.same_device(q=q, a=a)
    sort = _checks.flag("sort", sort)
    values, vectors = _dispatch.run("refresh_eigenbasis", (a,), backend, q, a, sort=sort)
    return values, vectors


def soap_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
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
    weight_decay: float = 0.0,
    correct_bias: bool = True,
    normalize_grads: bool = False,
    skip_first: bool = True,
    permute_squares: bool = False,
    maximize: bool = False,
    nonfinite: str = "skip",
    refresh: bool | Sequence[bool | int] = True,
    step_counts: Sequence[Tensor] | None = None,
    skipped: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One SOAP step, Adam in Shampoo's eigenbasis, over a list of matrices, in place.

        G' = Q_L^T G Q_R
        M <- beta1 M + (1 - beta1) G';  V <- beta2 V + (1 - beta2) G'^2         (M, V rotated)
        W <- (1 - lr weight_decay) (W - lr c Q_L (M / (sqrt(V) + eps)) Q_R^T)
            c = sqrt(1 - beta2^t) / (1 - beta1^t) if correct_bias, else 1
        L <- b L + (1 - b) G G^T;  R <- b R + (1 - b) G^T G,  b = shampoo_beta
        where refresh: new Q_L, Q_R (`refresh_eigenbasis`), and M moved into them

    The first call of a matrix, known by bases of zeros, sets the factors and bases; with
    skip_first, as in the public code, it does nothing else.

    Args:
        params, grads: (..., m, n) each, of one shape; leading dimensions are a batch of matrices.
        exp_avgs, exp_avg_sqs: M and V, shapes of the params, float32 (float64 for float64), or
            bfloat16 as the momentum of `muon_step_`.
        lefts, left_bases: L and Q_L, (..., m, m), or None (or size 0) for no left side. Bases start
            as zeros.
        rights, right_bases: R and Q_R, (..., n, n), likewise.
        lr: a number or a tensor of one number, at least 0 and finite. A tensor on a device is not
            waited for: one that is not finite makes every update so, see `nonfinite`.
        beta1, beta2: in [0, 1).
        shampoo_beta: in [0, 1); default beta2.
        eps: at least 0, absolute, so the update depends on the gradient's scale.
        weight_decay: decoupled, applied after the update.
        correct_bias: see above.
        normalize_grads: divide the update by its root mean square.
        skip_first: see above.
        permute_squares: sort the columns of new bases and permute V with them, as the public code
            does, where by default column j follows column j.
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

    Accuracy: products in the state's dtype; bases as `refresh_eigenbasis`.

    Source: Vyas et al., arXiv 2409.11321, algorithm 3; github.com/nikhilvyas/SOAP.
    """
    given = locals()
    counts, skips = counters(params, step_counts, skipped)
    for name, tensors in (("grads", grads), ("exp_avgs", exp_avgs), ("exp_avg_sqs", exp_avg_sqs)):
        _checks.tensors(name, tensors, len(params))
    check_counted(step_counts, exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    if shampoo_beta is None:
        shampoo_beta = _checks.number("beta2", beta2, 0.0, 1.0)
    _dispatch.run_step(
        "soap_step_",
        backend,
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        _checks.factor_list("lefts", lefts, params),
        _checks.factor_list("rights", rights, params),
        _checks.factor_list("left_bases", left_bases, params),
        _checks.factor_list("right_bases", right_bases, params),
        counts,
        skips,
        _checks.learning_rate(lr),
        **_options.checked(
            SoapOptions,
            given,
            shampoo_beta=_checks.number("shampoo_beta", shampoo_beta, 0.0, 1.0),
            refresh=_checks.flags("refresh", refresh, len(params)),
        ),
    )
