"""Refresh of the eigenbasis of a Kronecker factor, rotation, and the fused SOAP step."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from spectral_kernels._backend import is_capturing, operator
from spectral_kernels._options import BasisLists, SoapOptions, takes
from spectral_kernels._step_checks import check_soap
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from ._batch import flattened, from_both_sides, gram, product, scaled_by
from ._checks import TRITON
from ._config import architecture
from ._device import read
from ._energies import dots, energies
from ._factor_lists import Columns, FactorListing, Plans, Working, listing_of
from ._fused import INTO, OUT_OF, Fused, Moments, rates_of
from ._known import KnownLists
from ._list_step import (
    Apart,
    Stack,
    basis_stacks,
    column,
    finite,
    flags_of,
    length,
    moved,
    rate_of,
)
from .kron_factor import updated

_U = 2.0**-24
_FIRST_ORDER, _LAST = 0.03, 2e-3
_LIMIT = 5e-6
_PASSES = 6


@operator
def refresh_eigenbasis(q: Tensor, a: Tensor, *, sort: bool) -> tuple[Tensor, Tensor]:
    """One round of orthogonal iteration; see `spectral_kernels.refresh_eigenbasis`.

    How many passes matrices need is read from the device, for all of a batch together.
    """
    if not a.numel():
        return a.new_empty(a.shape[:-1]), torch.empty_like(q)
    values, new, _ = refreshed_bases(flattened(q), flattened(a), sort=sort)
    return values.reshape(a.shape[:-1]), new.reshape(q.shape).contiguous()


def refreshed_bases(
    q: Tensor, a: Tensor, *, sort: bool, where: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Values, new bases and the order of the old columns, of a batch (count, n, n).

    Matrices that are not chosen by `where` keep their bases. The device is waited for once here,
    once a pass for all matrices together, and once at the end.
    """
    count, n, _ = a.shape
    sizes = a.abs().flatten(1).amax(1)
    sound = sizes.isfinite() & q.isfinite().flatten(1).all(1)
    values = torch.where(sound[:, None], a.new_zeros(count, n), math.nan)
    new = torch.where(sound[:, None, None], q, math.nan)
    order = torch.arange(n, dtype=torch.int64, device=a.device).expand(count, n).contiguous()
    moves = sound & (sizes != 0.0) if where is None else where & sound & (sizes != 0.0)
    chosen = [i for i, moved in enumerate(read(moves)) if moved]
    if not chosen:
        return values, new, order
    found = _refreshed(*(torch.stack([x[i] for i in chosen]) for x in (q, a)), sort=sort)
    if len(chosen) == count:
        return found
    for result, part in zip((values, new, order), found, strict=True):
        for i, one in zip(chosen, part, strict=True):
            result[i] = one
    return values, new, order


def _refreshed(q: Tensor, a: Tensor, *, sort: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The same of finite matrices that are not 0."""
    n = a.shape[-1]
    exponent = torch.frexp(a.abs().flatten(1).amax(1)).exponent - 1
    a = scaled_by(a, -exponent[:, None, None])
    p = product(0.5 * (a + a.mT), q)
    lengths = energies(p, rows=False).sqrt()
    null = lengths <= _U * math.sqrt(n) * lengths.amax(1, keepdim=True)
    values = torch.where(null, 0.0, dots(q, p, rows=False)).float()
    p = torch.where(null[:, None, :], q, p)
    order = values.argsort(dim=1, descending=True, stable=True)
    at = order[:, None, :].expand_as(p)
    new = _orthonormal(p.gather(2, at), q.gather(2, at))
    values = scaled_by(values, exponent[:, None])
    if sort:
        return values.gather(1, order), new, order
    return values, torch.empty_like(new).scatter_(2, at, new), order


class _Pass:
    """Adaptive CholeskyQR of one matrix, between passes.

    Attributes:
        p: its columns.
        count: of passes, up to now.
        shift: of the last factorization.
        before, gram: what p came from, with columns of length 1.
        done: no further passes.
    """

    def __init__(self, p: Tensor) -> None:
        self.p = self.before = self.gram = p
        self.count = 0
        self.shift = 0.0
        self.done = False

    def decide(self, p: Tensor, gram: Tensor, error: float, *, failed: bool, least: float) -> str:
        """What comes next: "first order", "factorize", or "" for nothing more.

        Args:
            p, gram, error: of the columns, with lengths of 1.
            failed: whether the factorization that they came by has not worked.
            least: of the shifts.
        """
        if failed:
            if self.shift >= 1.0:
                self.p, self.done = self.before, True
                return ""
            self.shift = max(8.0 * self.shift, least)
            return "factorize"
        if self.count == _PASSES:
            self.done = True
            return ""
        self.count += 1
        self.before, self.gram = p, gram
        if error < _FIRST_ORDER:
            self.done = error < _LAST
            return "first order"
        self.shift = 0.0 if error < 0.5 else least
        return "factorize"


def _orthonormal(p: Tensor, q: Tensor) -> Tensor:
    """Orthonormal factors of a batch by adaptive CholeskyQR; q is kept where nothing works."""
    n = p.shape[-1]
    shift = 8.0 * _U * math.sqrt(n)
    eye = torch.eye(n, dtype=torch.float32, device=p.device)
    every = [_Pass(one) for one in p]
    infos = torch.zeros(len(every), dtype=torch.int32, device=p.device)
    worked = list(infos.unbind())
    while active := [i for i, one in enumerate(every) if not one.done]:
        columns = torch.stack([every[i].p for i in active])
        columns = columns / energies(columns, rows=False).sqrt().float()[:, None, :]
        products = gram(columns)
        errors = (products - eye).double().square().flatten(1).sum(1).sqrt()
        found = read(torch.stack([errors, torch.stack([worked[i] for i in active]).double()]))
        right: dict[int, Tensor] = {}
        for k, i in enumerate(active):
            failed = found[1][k] != 0.0
            error, one = found[0][k], every[i]
            step = one.decide(columns[k], products[k], error, failed=failed, least=shift)
            worked[i] = infos[i]
            if step == "first order":
                right[i] = eye - one.gram.triu(1)
            elif step:
                r, worked[i] = torch.linalg.cholesky_ex(one.gram + one.shift * eye, upper=True)
                right[i] = torch.linalg.solve_triangular(r, eye, upper=True)
        if right:
            before = torch.stack([every[i].before for i in right])
            after = product(before, torch.stack(list(right.values())))
            for i, new in zip(right, after, strict=True):
                every[i].p = new
    return _checked(torch.stack([one.p for one in every]), p, q)


def _checked(new: Tensor, p: Tensor, q: Tensor) -> Tensor:
    """Matrices that are orthonormal; else Householder's of p, or q."""
    failed = [i for i, fits in enumerate(read(_are_orthonormal(new))) if not fits]
    if not failed:
        return new
    # One by one: bits of a batch may be others.
    factors = [torch.linalg.qr(p[i]) for i in failed]
    others = torch.stack([x * torch.where(r.diagonal() < 0.0, -1.0, 1.0) for x, r in factors])
    found = list(new)
    for i, other, fits in zip(failed, others, read(_are_orthonormal(others)), strict=True):
        found[i] = other if fits else q[i]
    return torch.stack(found)


def _are_orthonormal(p: Tensor) -> Tensor:
    off = gram(p) - torch.eye(p.shape[-1], dtype=torch.float32, device=p.device)
    return off.abs().flatten(1).amax(1) <= _LIMIT


@operator
def eigenbasis(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors; see `spectral_kernels.eigenbasis`.

    No kernel of this room: `torch.linalg.eigh` in float64, matrix by matrix so that the bits do not
    depend on the batch. Waits for the device.
    """
    if not a.numel():
        return a.new_empty(a.shape[:-1]), torch.empty_like(a)
    values, vectors = eigenbases_of(flattened(a))
    return values.reshape(a.shape[:-1]), vectors.reshape(a.shape).contiguous()


def eigenbases_of(a: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues of a batch, descending, and vectors, the largest element of each positive."""
    found = [_eigenbasis_of(one) for one in a]
    values, vectors = (torch.stack(list(x)) for x in zip(*found, strict=True))
    return values, vectors


def _eigenbasis_of(a: Tensor) -> tuple[Tensor, Tensor]:
    failed = a.new_full(a.shape[-1:], math.nan), torch.full_like(a, math.nan)
    wide = a.double()
    if not bool(wide.isfinite().all()):
        return failed
    try:
        values, vectors = torch.linalg.eigh(0.5 * wide + 0.5 * wide.mT)
    except torch.linalg.LinAlgError:
        return failed
    values, order = values.sort(descending=True, stable=True)
    vectors = vectors[:, order]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return values.to(a.dtype), (vectors * largest.sign()).to(a.dtype)


class Bases(NamedTuple):
    """Factors and bases of a batch; None where a side is absent."""

    left: Tensor | None
    right: Tensor | None
    left_basis: Tensor | None
    right_basis: Tensor | None


def rotate(x: Tensor, bases: Bases) -> Tensor:
    """Q_L^T X Q_R."""
    left = bases.left_basis
    return from_both_sides(x, None if left is None else left.mT, bases.right_basis)


def rotate_back(x: Tensor, bases: Bases) -> Tensor:
    """Q_L X Q_R^T."""
    right = bases.right_basis
    return from_both_sides(x, bases.left_basis, None if right is None else right.mT)


def accumulated(bases: Bases, g: Tensor, beta: float) -> Bases:
    """L <- beta L + (1 - beta) G G^T and R likewise."""
    left, right = (
        None if x is None else updated(x, g, side, beta=beta, weight=1.0 - beta)
        for x, side in ((bases.left, -2), (bases.right, -1))
    )
    return bases._replace(left=left, right=right)


def chosen_of(where: Tensor, new: Bases, old: Bases) -> Bases:
    """`new` for the chosen matrices, else `old`."""
    pairs = zip(new, old, strict=True)
    return Bases(
        *(None if x is None or y is None else torch.where(_wide(where), x, y) for x, y in pairs)
    )


def _wide(where: Tensor) -> Tensor:
    return where[:, None, None]


# Bases that were seen not to be zeros. Looking costs a wait for the device, so it is done once.
_initialised = WeakTensorKeyDictionary()


def beginning(lists: BasisLists, plans: Plans) -> tuple[tuple[bool, ...] | None, ...]:
    """Of every entry which matrices have bases of zeros, which no basis is; None if none has."""
    bases = [*lists.left_bases, *lists.right_bases]
    count = len(lists.params)
    if plans.begun.holds(bases):
        return (None,) * count
    # Without an element there is nothing that could begin.
    pairs = [
        [x for x in (bases[i], bases[count + i]) if x.numel() and lists.params[i].numel()]
        for i in range(count)
    ]
    unknown = [i for i, both in enumerate(pairs) if any(x not in _initialised for x in both)]
    if unknown and is_capturing():
        raise RuntimeError(
            "a CUDA graph is being recorded, and bases have not been seen yet that may still be "
            "zero: take a step, or with skip_first two, outside of the graph before"
        )
    firsts: list[tuple[bool, ...] | None] = [None] * count
    zeros = [
        torch.stack([(x == 0.0).flatten(-2).all(-1).flatten() for x in pairs[i]]).all(0)
        for i in unknown
    ]
    found = iter(read(torch.cat(zeros)) if zeros else ())
    for i, own in zip(unknown, zeros, strict=True):
        first = tuple(itertools.islice(found, len(own)))
        if any(first):
            firsts[i] = first
        else:
            _initialised.update((x, True) for x in pairs[i])
    if not any(firsts):
        plans.begun.set(bases)
    return tuple(firsts)


def initialised(bases: Bases, g: Tensor, first: Tensor, beta: float) -> tuple[Bases, Tensor]:
    """Factors and eigenbases of first gradients that are not zero, and which those are."""
    starts = first & (g != 0.0).flatten(1).any(1) & finite(g)
    new = accumulated(bases, g, beta)
    chosen = starts.nonzero().flatten()

    def basis(factor: Tensor | None, old: Tensor | None) -> Tensor | None:
        if factor is None or old is None or not len(chosen):
            return old
        return old.index_copy(0, chosen, eigenbases_of(factor[chosen])[1])

    new = new._replace(
        left_basis=basis(new.left, bases.left_basis),
        right_basis=basis(new.right, bases.right_basis),
    )
    return chosen_of(starts, new, bases), starts


def refreshed(
    bases: Bases, moment: Tensor, squares: Tensor | None, where: Tensor, *, permute: bool
) -> tuple[Bases, Tensor, Tensor | None]:
    """New bases of the chosen matrices, their moments in them, and their squares.

    With `permute` columns are sorted and the squares with them, else column follows column.
    """
    new, kept = bases, squares
    if bases.left is not None and bases.left_basis is not None:
        _, basis, order = refreshed_bases(bases.left_basis, bases.left, sort=permute, where=where)
        new = new._replace(left_basis=basis)
        if permute and kept is not None:
            kept = kept.gather(1, order[:, :, None].expand_as(kept))
    if bases.right is not None and bases.right_basis is not None:
        _, basis, order = refreshed_bases(bases.right_basis, bases.right, sort=permute, where=where)
        new = new._replace(right_basis=basis)
        if permute and kept is not None:
            kept = kept.gather(2, order[:, None, :].expand_as(kept))
    moment = torch.where(_wide(where), rotate(rotate_back(moment, bases), new), moment)
    if squares is not None and kept is not None:
        squares = torch.where(where.view((-1,) + (1,) * (squares.ndim - 1)), kept, squares)
    return chosen_of(where, new, bases), moment, squares


COLUMNS = Columns((0, 1, 2, 3), lefts=(4, 6), rights=(5, 7))

_KNOWN: KnownLists[BasisLists, SoapOptions, Plans] = KnownLists(
    lambda lists, options: check_soap(lists, options, TRITON), lambda lists, options: Plans()
)


def basis_listing(
    lists: BasisLists,
    plans: Plans,
    firsts: tuple[tuple[bool, ...] | None, ...],
    flags: tuple[bool, ...],
    *,
    alike: bool,
    iterated: torch.dtype = torch.float32,
) -> FactorListing:
    """What a step launches for; those that are `alike` but for what begins or is refreshed."""

    def apart_of(entry: int) -> Apart:
        first = firsts[entry]
        if not alike or flags[entry] or (first is not None and all(first)):
            return True
        # A batch of several dimensions is not cut.
        return False if first is None else lists.params[entry].ndim > 3 or first

    def make() -> FactorListing:
        apart = [apart_of(entry) for entry in range(len(lists.params))]
        stacks = basis_stacks(lists, flags, apart)
        return listing_of(lists, COLUMNS, apart, stacks, iterated)

    key = firsts, flags, alike, iterated, architecture(lists.params[0].device)
    return plans.of(key, make)


@operator
@takes(BasisLists, SoapOptions)
def soap_step_(lists: BasisLists, options: SoapOptions) -> None:
    """One SOAP step over a list of matrices; see `spectral_kernels.soap_step_`.

    Waits for the device where bases are refreshed, and until those of a list have been set.
    """
    flags = flags_of(options.refresh)
    plans, addresses = _KNOWN.of(lists, options, flags)
    if not lists.params:
        return
    firsts = beginning(lists, plans)
    alike = options.nonfinite != "propagate" and not options.normalize_grads
    listing = basis_listing(lists, plans, firsts, flags, alike=alike)
    work = Working(listing, addresses, lists.params[0].device)
    if listing.groups:
        _fused(work, lists.lr, options)
    for stack in listing.stacks:
        _stacked(stack, work, lists, options, firsts)
    work.count(lists.skipped)


def _fused(work: Working, lr: Tensor, options: SoapOptions) -> None:
    """Matrices that stay in their bases."""
    beta1, beta2, beta = options.beta1, options.beta2, options.shampoo_beta
    moments = Moments(beta1, 1.0 - beta1, beta2, 1.0 - beta2)
    rates = rates_of(
        work.steps(),
        lr,
        options.weight_decay,
        (beta1, beta2),
        times_kept=True,
        bias=options.correct_bias,
    )

    # In a function, so that what one group needed is gone before the next.
    def step_of(fused: Fused) -> None:
        x = fused.packed(negate=options.maximize)
        fused.check_factors(x, beta=beta, weight=1.0 - beta)
        rotated = fused.turned(x, INTO)
        update = fused.turned(fused.adam(rotated, moments, options.eps), OUT_OF)
        fused.write(update, rotated, moments, fused.rates.rates)
        fused.add_to_factors(x, beta=beta, weight=1.0 - beta)

    for group in work.listing.groups:
        step_of(Fused(group, work.table, work.states, rates))


def _stacked(
    stack: Stack,
    work: Working,
    lists: BasisLists,
    options: SoapOptions,
    firsts: Sequence[tuple[bool, ...] | None],
) -> None:
    """Matrices of one shape that begin, are refreshed, or take an option without a kernel."""
    params, grads, exp_avgs, exp_avg_sqs, lefts, rights, left_bases, right_bases = lists[:8]
    beta1, beta2, shampoo_beta = options.beta1, options.beta2, options.shampoo_beta
    checked = options.nonfinite != "propagate"
    states = (lefts, rights, left_bases, right_bases)
    m, v = stack.take_moment(exp_avgs), stack.take_moment(exp_avg_sqs)
    g = stack.take(grads)
    assert m is not None and v is not None and g is not None
    g = -g.float() if options.maximize else g.float()
    none = torch.zeros(len(g), dtype=torch.bool, device=g.device)
    kept = ~finite(g, m) if checked else none
    t = stack.steps(lists.step_counts)
    old = Bases(*(stack.take(x) for x in states))
    first = stack.chosen(firsts)
    new = old if first is None else initialised(old, g, first & ~kept, shampoo_beta)[0]
    rotated = rotate(g, new)
    new_m = beta1 * m + (1.0 - beta1) * rotated
    new_v = beta2 * v + (1.0 - beta2) * (rotated * rotated)
    divisor = new_v.sqrt() + options.eps
    update = torch.where(divisor == 0.0, 0.0, new_m / divisor)
    update = rotate_back(update, new)
    idle = none if first is None or not options.skip_first else first
    later = ~none if first is None else ~first
    if not stack.all_chosen(firsts):
        new = chosen_of(later, accumulated(new, g, shampoo_beta), new)
        if stack.option(options.refresh) and any(x is not None for x in new):
            chosen = later & ~kept & finite(*new)
            permute = options.permute_squares
            new, new_m, new_v_ = refreshed(new, new_m, new_v, chosen, permute=permute)
            assert new_v_ is not None
            new_v = new_v_
    new_m, new_v = torch.where(_wide(idle), m, new_m), torch.where(_wide(idle), v, new_v)
    if options.normalize_grads:
        update = rms_normalized(update)
    rate = rate_of(lists.lr, len(g), g.device)
    decay = 1.0 - rate * options.weight_decay
    bias = adam_bias(beta1, beta2, t) if options.correct_bias else torch.ones_like(t)
    w = stack.take(params)
    assert w is not None
    new_w = moved(w, update, rate=decay * rate * bias, decay=decay)
    if checked:
        kept = kept | ~finite(new_m, new_v, *new) | ~(finite(new_w) | idle)
    stepped = ~kept & ~idle
    stack.put_(params, w, new_w, stepped)
    stack.put_moment_(exp_avgs, m, new_m, ~kept, t)
    stack.put_moment_(exp_avg_sqs, v, new_v, ~kept, t)
    for tensors, before, after in zip(states, old, new, strict=True):
        stack.put_(tensors, before, after, ~kept)
    stack.note_(work.states, kept, None if first is None else idle)


def rms_normalized(update: Tensor) -> Tensor:
    """U / (rms(U) + 1e-30)."""
    rms = length(update) / math.sqrt(update[0].numel())
    return update / column(rms + 1e-30, update)


def adam_bias(beta1: float, beta2: float, t: Tensor) -> Tensor:
    """sqrt(1 - beta2^t) / (1 - beta1^t), the bias corrections as a factor of the step size."""
    return (1.0 - beta2**t).sqrt() / (1.0 - beta1**t)
