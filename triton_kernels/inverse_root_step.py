"""The fused Shampoo step."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from spectral_kernels._backend import operator
from spectral_kernels._options import ShampooLists, ShampooOptions, takes
from spectral_kernels._step_checks import check_shampoo
from torch import Tensor

from ._batch import from_both_sides
from ._checks import TRITON
from ._config import architecture
from ._factor_lists import Columns, FactorListing, Plans, Working, listing_of
from ._fused import Fused, Moments, rates_of
from ._graft import Graft, between_roots
from ._known import KnownLists
from ._list_step import (
    Stack,
    column,
    finite,
    flags_of,
    length,
    moved,
    outside_range,
    rate_of,
    stacks_of,
)
from .inverse_root import NON_FINITE, STAGNATED, roots_of
from .kron_factor import updated


class _Factors(NamedTuple):
    """Factors and roots of a batch; None where a side is absent."""

    left: Tensor | None
    right: Tensor | None
    left_root: Tensor | None
    right_root: Tensor | None


_COLUMNS = Columns((0, 1, 2, 7), lefts=(3, 5), rights=(4, 6))

_KNOWN: KnownLists[ShampooLists, ShampooOptions, Plans] = KnownLists(
    lambda lists, options: check_shampoo(lists, options, TRITON), lambda lists, options: Plans()
)


def _listing(
    lists: ShampooLists, plans: Plans, flags: tuple[bool, ...], *, alike: bool
) -> FactorListing:
    def make() -> FactorListing:
        apart = [not alike or flag for flag in flags]
        moments = lists.momentum_buffers, lists.graft_squares
        keys = lists.grads, lists.lefts, lists.rights, flags
        counts = lists.step_counts
        stacks = stacks_of(lists.params, counts, *keys, moments=moments, apart=apart)
        return listing_of(lists, _COLUMNS, apart, stacks)

    return plans.of((flags, alike, architecture(lists.params[0].device)), make)


@operator
@takes(ShampooLists, ShampooOptions)
def shampoo_step_(lists: ShampooLists, options: ShampooOptions) -> None:
    """One Shampoo or KL-Shampoo step; see `spectral_kernels.shampoo_step_`.

    Roots are taken by iteration, whatever `root_method` says, and there is no second attempt: a
    root that is not accepted keeps the old one and is counted.
    """
    flags = flags_of(options.refresh)
    key = flags, options.squares, options.graft == "adagrad"
    plans, addresses = _KNOWN.of(lists, options, key)
    if not lists.params:
        return
    alike = options.nonfinite != "propagate" and not options.kl
    listing = _listing(lists, plans, flags, alike=alike)
    work = Working(listing, addresses, lists.params[0].device)
    if listing.groups:
        _fused(work, lists.lr, options)
    for stack in listing.stacks:
        _stacked(stack, work, lists, options, refresh=stack.option(flags))
    work.count(lists.skipped)


def _fused(work: Working, lr: Tensor, options: ShampooOptions) -> None:
    """Matrices that stay between their roots."""
    squares, beta1, beta2 = options.squares, options.beta1, options.graft_beta2
    debias = options.debias, options.graft == "adam"
    rates = rates_of(work.steps(), lr, options.weight_decay, (beta1, beta2), debias=debias)
    second = (1.0, 1.0) if options.graft == "adagrad" else (beta2, 1.0 - beta2)
    moments = Moments(beta1, 1.0 - beta1, *second)
    relative = options.graft_eps_mode == "relative"
    graft = Graft(options.graft == "none", squares, options.graft_eps, relative)

    # In a function, so that what one group needed is gone before the next.
    def step_of(fused: Fused) -> None:
        x = fused.packed(negate=options.maximize, bounded=options.relative_ridge > 0.0)
        fused.check_factors(x, beta=options.beta2, weight=options.weight)
        update, own = between_roots(fused, x, moments, graft)
        fused.write(update, x, moments, own, squares=squares)
        fused.add_to_factors(x, beta=options.beta2, weight=options.weight)

    for group in work.listing.groups:
        step_of(Fused(group, work.table, work.states, rates))


def _stacked(
    stack: Stack, work: Working, lists: ShampooLists, options: ShampooOptions, *, refresh: bool
) -> None:
    """Matrices of one shape that are refreshed, or take an option without a kernel."""
    params, grads, momentum_buffers, lefts, rights, left_roots, right_roots = lists[:7]
    graft_squares, root_failures, step_counts = lists[7:10]
    bounded = options.relative_ridge > 0.0 or options.kl
    checked = options.nonfinite != "propagate"
    states = (lefts, rights, left_roots, right_roots)
    m, g = stack.take_moment(momentum_buffers), stack.take(grads)
    assert m is not None and g is not None
    g = -g.float() if options.maximize else g.float()
    t = stack.steps(step_counts)
    kept = torch.zeros(len(g), dtype=torch.bool, device=g.device)
    if bounded:
        kept = kept | outside_range(g)
    if checked:
        kept = kept | ~finite(g, m)
    old = _Factors(*(stack.take(x) for x in states))
    squares = stack.take_moment(graft_squares) if options.squares else None
    new, failed = _refreshed(old, g, t, options, refresh=refresh)
    new_squares = _new_squares(squares, g, options)
    new_m = options.beta1 * m + (1.0 - options.beta1) * g
    update = _update(new_m, new_squares, new, t, options)
    rate = rate_of(lists.lr, len(g), g.device)
    w = stack.take(params)
    assert w is not None
    new_w = moved(w, update, rate=rate, decay=1.0 - rate * options.weight_decay)
    if checked:
        kept = kept | ~finite(new_m, new_squares, *new, new_w)
    stack.put_(params, w, new_w, ~kept)
    stack.put_moment_(momentum_buffers, m, new_m, ~kept, t)
    stack.put_moment_(graft_squares, squares, new_squares, ~kept, t)
    for tensors, before, after in zip(states, old, new, strict=True):
        stack.put_(tensors, before, after, ~kept)
    failures = stack.take(root_failures, 1)
    assert failures is not None
    stack.put_(root_failures, failures, failures + failed, ~kept)
    stack.note_(work.states, kept)


def _refreshed(
    old: _Factors, g: Tensor, t: Tensor, step: ShampooOptions, *, refresh: bool
) -> tuple[_Factors, Tensor]:
    """New factors and roots, and int64 (count, 2): the failed roots of each side."""
    none = torch.zeros(len(g), 2, dtype=torch.int64, device=g.device)
    if step.kl:
        return _kl(old, g, step, none, refresh=refresh)
    left, right = (
        None if x is None else updated(x, g, side, beta=step.beta2, weight=step.weight)
        for x, side in ((old.left, -2), (old.right, -1))
    )
    if not refresh:
        return old._replace(left=left, right=right), none
    bias = 1.0 - step.beta2**t if step.debias and step.beta2 < 1.0 else torch.ones_like(t)
    left_root, left_failed = _new_root(left, old.left_root, bias, step, none[:, 0])
    right_root, right_failed = _new_root(right, old.right_root, bias, step, none[:, 0])
    failed = torch.stack([left_failed, right_failed], 1)
    return _Factors(left, right, left_root, right_root), failed


def _new_root(
    factor: Tensor | None, old: Tensor | None, bias: Tensor, step: ShampooOptions, none: Tensor
) -> tuple[Tensor | None, Tensor]:
    """The root of factor / bias, or the old one and 1 where it fails."""
    if factor is None or old is None:
        return old, none
    found = roots_of(
        factor / column(bias, factor),
        step.root,
        ridge=step.ridge,
        relative_ridge=step.relative_ridge,
    )
    zero = (factor == 0.0).all(-1).all(-1)
    failed = (found.status == STAGNATED) | (found.status == NON_FINITE)
    failed = (failed | ~finite(found.root)) & ~zero
    return torch.where((failed | zero)[:, None, None], old, found.root), failed.long()


def _kl(
    old: _Factors, g: Tensor, step: ShampooOptions, none: Tensor, *, refresh: bool
) -> tuple[_Factors, Tensor]:
    m, n = g.shape[-2:]
    left, right, left_root, right_root = _kl_start(old, g, step)
    bias = torch.ones(len(g), dtype=torch.float64, device=g.device)

    def new_left(root: Tensor | None) -> Tensor | None:
        x = from_both_sides(g, None, root)
        return (
            left if left is None else updated(left, x, -2, beta=step.beta2, weight=step.weight / n)
        )

    def new_right(root: Tensor | None) -> Tensor | None:
        x = from_both_sides(g, root, None)
        return (
            right
            if right is None
            else updated(right, x, -1, beta=step.beta2, weight=step.weight / m)
        )

    if not refresh:
        factors = _Factors(new_left(right_root), new_right(left_root), left_root, right_root)
        return factors, none
    if step.kl_order == "simultaneous":
        left, right = new_left(right_root), new_right(left_root)
        left_root, left_failed = _new_root(left, left_root, bias, step, none[:, 0])
        right_root, right_failed = _new_root(right, right_root, bias, step, none[:, 0])
    elif m <= n:
        left = new_left(right_root)
        left_root, left_failed = _new_root(left, left_root, bias, step, none[:, 0])
        right = new_right(left_root)
        right_root, right_failed = _new_root(right, right_root, bias, step, none[:, 0])
    else:
        right = new_right(left_root)
        right_root, right_failed = _new_root(right, right_root, bias, step, none[:, 0])
        left = new_left(right_root)
        left_root, left_failed = _new_root(left, left_root, bias, step, none[:, 0])
    factors = _rebalanced(_Factors(left, right, left_root, right_root))
    return factors, torch.stack([left_failed, right_failed], 1)


def _kl_start(old: _Factors, g: Tensor, step: ShampooOptions) -> _Factors:
    """lam0 I on both sides at the first gradient that is not zero."""
    present = [x for x in (old.left, old.right) if x is not None]
    fresh = torch.stack([(x == 0.0).all(-1).all(-1) for x in present]).all(0) if present else None
    if fresh is None:
        return old
    lam0 = length(g) / math.sqrt(g[0].numel())
    fresh = fresh & (lam0 != 0.0) & lam0.isfinite()
    root = (lam0 + (step.relative_ridge * lam0).clamp(min=step.ridge)) ** -0.5

    def started(x: Tensor | None, value: Tensor) -> Tensor | None:
        if x is None:
            return None
        eye = torch.eye(x.shape[-1], dtype=torch.float32, device=x.device)
        return torch.where(fresh[:, None, None], column(value, x) * eye, x)

    return _Factors(*(started(x, v) for x, v in zip(old, (lam0, lam0, root, root), strict=True)))


def _rebalanced(factors: _Factors) -> _Factors:
    left, right, left_root, right_root = factors
    if left is None or right is None or left_root is None or right_root is None:
        return factors
    means = [x.diagonal(dim1=-2, dim2=-1).double().mean(-1) for x in (left, right)]
    usable = torch.stack([(x > 0.0) & x.isfinite() for x in means]).all(0)
    s = torch.where(usable, (means[0] / means[1]).sqrt(), 1.0)
    root = column(s.sqrt(), left)
    s = column(s, left)
    return _Factors(left / s, right * s, left_root * root, right_root / root)


def _new_squares(squares: Tensor | None, g: Tensor, step: ShampooOptions) -> Tensor | None:
    if squares is None:
        return None
    if step.graft == "adagrad":
        return squares + g * g
    return step.graft_beta2 * squares + (1.0 - step.graft_beta2) * (g * g)


def _update(
    m: Tensor, squares: Tensor | None, factors: _Factors, t: Tensor, step: ShampooOptions
) -> Tensor:
    mhat = m / column(1.0 - step.beta1**t, m) if step.debias else m
    p = from_both_sides(mhat, factors.left_root, factors.right_root)
    if step.graft == "none":
        return p
    size = length(p)
    graft = length(_graft_direction(mhat, squares, t, step))
    return p * column(torch.where(size == 0.0, 0.0, graft / size), p)


def _graft_direction(
    mhat: Tensor, squares: Tensor | None, t: Tensor, step: ShampooOptions
) -> Tensor:
    if squares is None:
        return mhat
    bias = column(1.0 - step.graft_beta2**t, mhat) if step.graft == "adam" else 1.0
    root = (squares / bias).sqrt()
    if step.graft_eps_mode == "relative":
        eps = column(step.graft_eps * length(root) / math.sqrt(root[0].numel()), root)
        divisor = root + eps
    else:
        divisor = root + step.graft_eps
    return torch.where(divisor == 0.0, 0.0, mhat / divisor)
