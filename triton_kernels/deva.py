"""DeVA: variance adaptation fused with orthogonalization.

The energies of momentum and gradient are one pass each over rows and columns, in a fixed order;
the variance, its adaptation and the scaling of the direction are one pass over the matrix.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from spectral_kernels._backend import operator
from spectral_kernels._options import BasisLists, DevaOptions, takes
from spectral_kernels._step_checks import check_deva
from torch import Tensor

from ._checks import TRITON
from ._config import PASS_WARPS
from ._device import block_of, blocks_of, launch
from ._energies import energies
from ._factor_lists import Plans, Working
from ._fused import INTO, OUT_OF, Fused, Moments, rates_of
from ._groups import Rule
from ._known import KnownLists
from ._list_step import (
    Stack,
    column,
    finite,
    flags_of,
    moved,
    numbers_of,
    outside_range,
    rate_of,
    sign,
)
from ._vary import Variation, varied
from .eigenbasis import (
    Bases,
    accumulated,
    adam_bias,
    basis_listing,
    beginning,
    chosen_of,
    initialised,
    refreshed,
    rms_normalized,
    rotate,
    rotate_back,
)
from .newton_schulz import newton_schulz

_BLOCK_ROWS = 32
_BLOCK_COLS = 128


@triton.jit
def _adapt_kernel(
    o, v, seen_rows, seen_cols, top_rows, top_cols, numbers, new_v, update,
    m, n, beta2, fresh, blocks, across,
    OUTSIDE: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    # V <- beta2 V + fresh s_r s_c^T, U = scale O sqrt(t_r t_c^T / Vhat) with its eps.
    matrix, rows, cols, at, inside = block_of(m, n, blocks, across, ROWS, COLS)
    seen = tl.load(seen_rows + matrix * m + rows, mask=rows < m, other=0.0)[:, None]
    seen = seen * tl.load(seen_cols + matrix * n + cols, mask=cols < n, other=0.0)[None, :]
    top = tl.load(top_rows + matrix * m + rows, mask=rows < m, other=0.0)[:, None]
    # One root of the product: two would not scale exactly with an odd power of two.
    top = tl.sqrt(top * tl.load(top_cols + matrix * n + cols, mask=cols < n, other=0.0)[None, :])
    value = beta2 * tl.load(v + at, mask=inside, other=0.0) + fresh * seen
    tl.store(new_v + at, value, mask=inside)
    hat = value * tl.load(numbers + matrix * 3)
    eps = tl.load(numbers + matrix * 3 + 1)
    bottom = tl.sqrt(hat) + eps if OUTSIDE else tl.sqrt(hat + eps)
    empty = (bottom == 0.0) & (top == 0.0)
    gamma = tl.where(empty, 1.0, top / tl.where(bottom == 0.0, 1.0, bottom))
    gamma = tl.where((bottom == 0.0) & (top != 0.0), float("inf"), gamma)
    result = tl.load(numbers + matrix * 3 + 2) * gamma * tl.load(o + at, mask=inside, other=0.0)
    tl.store(update + at, result, mask=inside)


_KNOWN: KnownLists[BasisLists, DevaOptions, Plans] = KnownLists(
    lambda lists, options: check_deva(lists, options, TRITON), lambda lists, options: Plans()
)


@operator
@takes(BasisLists, DevaOptions)
def deva_step_(lists: BasisLists, options: DevaOptions) -> None:
    """One DeVA step over a list of matrices; see `spectral_kernels.deva_step_`.

    Waits for the device where bases are refreshed, and until those of a list have been set.
    """
    flags = flags_of(options.refresh)
    plans, addresses = _KNOWN.of(lists, options, (flags, options.variance))
    if not lists.params:
        return
    firsts = beginning(lists, plans)
    alike = options.nonfinite != "propagate" and not options.normalize_grads
    alike = alike and options.norm == "schatten" and options.variance != "low_memory"
    dtype = options.compute_dtype
    listing = basis_listing(lists, plans, firsts, flags, alike=alike, iterated=dtype)
    work = Working(listing, addresses, lists.params[0].device)
    if listing.groups:
        _fused(work, lists.lr, options)
    for stack in listing.stacks:
        _stacked(stack, work, lists, options, firsts)
    work.count(lists.skipped)


def _fused(work: Working, lr: Tensor, options: DevaOptions) -> None:
    """Matrices that stay in their bases."""
    beta1, beta2, beta = options.beta1, options.beta2, options.shampoo_beta
    moments = Moments(beta1, 1.0 - beta1, beta2, 1.0 - beta2)
    public, varies = options.public_schatten, options.variance != "none"
    rates = rates_of(
        work.steps(),
        lr,
        options.weight_decay,
        (beta1, beta2),
        times_kept=public,
        bias=public and options.correct_bias,
        debias=(options.debiased,) * 2,
    )
    scales = numbers_of(work.listing.spread(options.scales), work.states.device)
    rows = tuple((float(a), float(b), float(c)) for a, b, c in options.rows)
    rule = Rule(rows, "standard", options.compute_dtype, norm="schatten8")
    relative = not options.reference and options.eps_mode == "relative"
    variation = Variation(
        options.variance, options.eps, options.eps_mode, options.nesterov, options.sign
    )

    # In a function, so that what one group needed is gone before the next.
    def step_of(fused: Fused) -> None:
        group = fused.group
        bounded = relative and (varies or group.short or group.long)
        x = fused.packed(negate=options.maximize, bounded=bounded)
        fused.check_factors(x, beta=beta, weight=1.0 - beta)
        rotated = fused.turned(x, INTO)
        own = scales[group.slots]
        varying, lines = varied(fused, rotated, moments, rule, variation, own)
        update = fused.turned(varying, OUT_OF)
        del varying
        fused.write(update, rotated, moments, fused.rates.rates, squares=varies, lines=lines)
        fused.add_to_factors(x, beta=beta, weight=1.0 - beta)

    for group in work.listing.groups:
        step_of(Fused(group, work.table, work.states, rates))


def _stacked(
    stack: Stack,
    work: Working,
    lists: BasisLists,
    options: DevaOptions,
    firsts: Sequence[tuple[bool, ...] | None],
) -> None:
    """Matrices of one shape that begin, are refreshed, or take an option without a kernel."""
    params, grads, exp_avgs, exp_avg_sqs, lefts, rights, left_bases, right_bases = lists[:8]
    step_counts, _, lr = lists[8:]
    beta1, shampoo_beta, variance = options.beta1, options.shampoo_beta, options.variance
    public_schatten = options.public_schatten
    bounded = not options.reference and options.eps_mode == "relative"
    checked = options.nonfinite != "propagate"
    states = (lefts, rights, left_bases, right_bases)
    m, g = stack.take_moment(exp_avgs), stack.take(grads)
    v = stack.take_moment(exp_avg_sqs, 1 if variance == "low_memory" else 2)
    v = None if variance == "none" else v
    assert m is not None and g is not None
    g = -g.float() if options.maximize else g.float()
    none = torch.zeros(len(g), dtype=torch.bool, device=g.device)
    kept = ~finite(g, m) if checked else none
    old = Bases(*(stack.take(x) for x in states))
    factors = old.left is not None or old.right is not None
    if bounded and (variance != "none" or factors):
        kept = kept | outside_range(g)
    t = stack.steps(step_counts)
    first = stack.chosen(firsts)
    new = old if first is None else initialised(old, g, first & ~kept, shampoo_beta)[0]
    rotated = rotate(g, new)
    new_m = beta1 * m + (1.0 - beta1) * rotated
    direction = _direction(new_m, rotated, options)
    scales = stack.spread(options.scales)
    new_v, update = _adapted(direction, new_m, rotated, v, t, scales, options)
    update = rotate_back(update, new)
    idle = none if first is None or not public_schatten else first
    later = ~none if first is None else ~first
    if not stack.all_chosen(firsts):
        new = chosen_of(later, accumulated(new, g, shampoo_beta), new)
        if stack.option(options.refresh):
            chosen = later & ~kept & finite(*new) if factors else none
            new, new_m, new_v = refreshed(new, new_m, new_v, chosen, permute=public_schatten)
    new_m = torch.where(idle[:, None, None], m, new_m)
    if v is not None and new_v is not None:
        new_v = torch.where(idle.view((-1,) + (1,) * (v.ndim - 1)), v, new_v)
    if options.normalize_grads:
        update = rms_normalized(update)
    rate = rate_of(lr, len(g), g.device)
    decay = 1.0 - rate * options.weight_decay
    if public_schatten:
        rate = rate * decay
        if options.correct_bias:
            rate = rate * adam_bias(beta1, options.beta2, t)
    w = stack.take(params)
    assert w is not None
    new_w = moved(w, update, rate=rate, decay=decay)
    if checked:
        kept = kept | ~finite(new_m, new_v, *new) | ~(finite(new_w) | idle)
    stepped = ~kept & ~idle
    stack.put_(params, w, new_w, stepped)
    stack.put_moment_(exp_avgs, m, new_m, ~kept, t)
    stack.put_moment_(exp_avg_sqs, v, new_v, ~kept, t)
    for tensors, before, after in zip(states, old, new, strict=True):
        stack.put_(tensors, before, after, ~kept)
    stack.note_(work.states, kept, None if first is None else idle)


def _direction(m: Tensor, g: Tensor, step: DevaOptions) -> Tensor:
    """O, the matrix sign or the elementwise one."""
    n = step.beta1 * m + (1.0 - step.beta1) * g if step.nesterov else m
    if step.norm == "linf":
        return sign(n)
    return newton_schulz(
        (sign(n) if step.sign else n).contiguous(),
        step.rows,
        method="standard",
        restarts=(),
        compute_dtype=step.compute_dtype,
        eps=0.0,
        norm="schatten8",
        norm_factor=1.0,
    )


def _adapted(
    o: Tensor, m: Tensor, g: Tensor, v: Tensor | None, t: Tensor, scales: Tensor, step: DevaOptions
) -> tuple[Tensor | None, Tensor]:
    """The new V, and scale Gamma o O."""
    scale = column(scales, o)
    if v is None:
        return None, scale * o
    one = torch.ones_like(t)
    m_bias = 1.0 - step.beta1**t if step.debiased else one
    v_bias = 1.0 - step.beta2**t if step.debiased else one
    if step.norm == "linf":
        mhat = m / column(m_bias, m)
        seen = mhat if step.variance == "momentum" else g
        top = g if step.variance == "instant" else mhat
        v = step.beta2 * v + (1.0 - step.beta2) * (seen * seen)
        hat = v / column(v_bias, v)
        return v, scale * _ratio(top.abs(), hat, step) * o
    m_rows, m_cols = (energies(m.contiguous(), rows=rows) for rows in (True, False))
    g_rows, g_cols = (energies(g.contiguous(), rows=rows) for rows in (True, False))
    square = (m_bias * m_bias)[:, None]
    m_rows, m_cols = m_rows / square, m_cols / square
    if step.variance == "low_memory":
        observed = torch.cat([g_rows, g_cols], 1).float()
        v = step.beta2 * v + (1.0 - step.beta2) * observed
        v_r, v_c = (v / column(v_bias, v)).split(list(m.shape[1:]), 1)
        row = _ratio(m_rows.float().sqrt(), v_r, step).sqrt()
        col = _ratio(m_cols.float().sqrt(), v_c, step).sqrt()
        return v, scale * (row[:, :, None] * col[:, None, :]) * o
    momentum = m_rows, m_cols
    seen_rows, seen_cols = momentum if step.variance == "momentum" else (g_rows, g_cols)
    top_rows, top_cols = (g_rows, g_cols) if step.variance == "instant" else momentum
    return _adapt(o, v, (seen_rows, seen_cols), (top_rows, top_cols), v_bias, scales, step)


def _adapt(
    o: Tensor,
    v: Tensor,
    seen: tuple[Tensor, Tensor],
    top: tuple[Tensor, Tensor],
    v_bias: Tensor,
    scales: Tensor,
    step: DevaOptions,
) -> tuple[Tensor, Tensor]:
    count, m, n = o.shape
    seen_norms = [x.sqrt() for x in seen]
    eps = torch.full_like(v_bias, step.eps)
    if step.eps_mode == "relative":
        total = step.beta2 * v.double().sum((1, 2))
        total = total + (1.0 - step.beta2) * seen_norms[0].sum(1) * seen_norms[1].sum(1)
        eps = step.eps * total / (m * n) / v_bias
    numbers = torch.stack([1.0 / v_bias, eps, scales.double()], 1).float()
    new_v, update = torch.empty_like(v), torch.empty_like(o)
    blocks, across = blocks_of(m, n, _BLOCK_ROWS, _BLOCK_COLS)
    launch(
        _adapt_kernel,
        count * blocks,
        o.contiguous(),
        v.contiguous(),
        *(x.float() for x in seen_norms),
        *(x.sqrt().float() for x in top),
        numbers,
        new_v,
        update,
        m,
        n,
        step.beta2,
        1.0 - step.beta2,
        blocks,
        across,
        OUTSIDE=step.eps_mode == "outside",
        ROWS=_BLOCK_ROWS,
        COLS=_BLOCK_COLS,
        num_warps=PASS_WARPS,
    )
    return new_v, update


def _ratio(top: Tensor, v: Tensor, step: DevaOptions) -> Tensor:
    """sqrt(e / v) with its eps from sqrt(e); 1 for 0 / 0."""
    if step.eps_mode == "outside":
        bottom = v.sqrt() + step.eps
    elif step.eps_mode == "relative":
        bottom = (v + column(step.eps * v.double().flatten(1).mean(1), v)).sqrt()
    else:
        bottom = (v + step.eps).sqrt()
    return torch.where((bottom == 0.0) & (top == 0.0), 1.0, top / bottom)
