"""Newton-Schulz iterations and the fused Muon step.

Matrices are grouped by how they are iterated on; a group shares its launches whatever the shapes
in it. A group of the standard form takes 3 launches a step, one of the Gram form up to 4 a step,
and one of small matrices a single launch for all steps; three more read the input, and products
that end in the caller's tensors are launched once for every orientation in the group.
"""

from __future__ import annotations

import math

import torch
from spectral_kernels._backend import operator
from spectral_kernels._options import (
    MuonLists,
    MuonOptions,
    NewtonSchulzOptions,
    iterates,
    takes,
)
from spectral_kernels._step_checks import check_muon
from torch import Tensor

from ._addresses import Addresses
from ._batch import flattened
from ._checks import TRITON
from ._config import Config, architecture, config_for, precision_of
from ._device import STRIDED, launch
from ._groups import Kind, Plan, Rule, groups_of_one, layout_for, rule_of, table_of
from ._layout import SHORT, WIDE, Layout, kept, upload
from ._matmul import Delivery, Operand, RepeatedWide, delivery_of, wide
from ._muon_lists import listing_of, scales_of
from ._neurons import Averages, by_neurons, check_moments
from ._newton_schulz_kernels import _doubtful_kernel, _powers_kernel, _small_kernel
from ._pack import Mix, Summary, pack, settle, summarize
from ._reach import Reach, most_of
from .symmetric_matmul import Repeated, Terms, symmetric

# Powers of the scale that the Schatten-8 norm adds, as columns of a table.
_POWERS = 5


def orthogonalize(
    layout: Layout,
    plan: Plan,
    rule: Rule,
    x: Tensor,
    summary: Summary,
    out: Delivery | None,
) -> Tensor | None:
    """Iterates on the matrices of one group.

    Args:
        layout, plan: of the group.
        rule: what is iterated.
        x: the wide workspace, of norm 1; it is overwritten.
        summary: of the same matrices.
        out: where the result goes; None: into a workspace, which is returned.
    """
    if plan.form == "small":
        return _small(layout, plan, rule, x, summary, out)
    iteration = _Iteration(layout, plan, rule, x, summary)
    return iteration.gram(out) if plan.form == "gram" else iteration.standard(out)


def _small(
    layout: Layout, plan: Plan, rule: Rule, x: Tensor, summary: Summary, out: Delivery | None
) -> Tensor | None:
    arguments, constants, launches = delivery_of(out, layout)
    rows = _rows(rule.rows, layout.device)
    for unit, chosen in launches:
        matrices = _indices(layout, chosen)
        launch(
            _small_kernel,
            matrices.shape[0],
            x,
            layout.table,
            matrices,
            rows,
            len(rule.rows),
            sum(1 << t for t in plan.restarts),
            summary.floor,
            rule.norm_factor,
            *arguments,
            SCHATTEN=rule.schatten8,
            PLACED_UNIT=unit,
            DELIVER=out is not None,
            **constants,
            PRECISION=precision_of(architecture(layout.device)),
            **plan.config.options(),
        )
    if out is not None and out.doubts:
        launch(
            _doubtful_kernel,
            layout.count,
            x,
            layout.table,
            *arguments,
            PLACED_UNIT=STRIDED.value,
            **constants,
            TILE=plan.config.tile,
            DEPTH=plan.config.depth,
        )
    return x if out is None else None


@kept(256)
def _rows(rows: tuple[tuple[float, float, float], ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(rows, dtype=torch.float32, device="cpu"), device)


@kept()
def _indices(layout: Layout, chosen: tuple[int, ...] | None) -> Tensor:
    found = range(layout.count) if chosen is None else chosen
    return upload(torch.tensor(found, dtype=torch.int32, device="cpu"), layout.device)


class _Iteration:
    """Both forms on the workspaces of one group, a launch a product."""

    def __init__(self, layout: Layout, plan: Plan, rule: Rule, x: Tensor, summary: Summary) -> None:
        self._layout, self._config, self._restarts = layout, plan.config, plan.restarts
        self._full_config = config_for(architecture(layout.device), torch.float32, layout.shortest)
        self._rule, self._summary = rule, summary
        self._x, self._next = x, layout.empty(WIDE, x.dtype)

    def standard(self, out: Delivery | None) -> Tensor | None:
        """X <- a X + (b R + c R^2) X, R = X X^T in X's dtype."""
        layout, config = self._layout, self._config
        r, z = (layout.empty(SHORT, self._x.dtype) for _ in range(2))
        powers = self._powers_of_gram() if self._rule.schatten8 else None
        gram = Repeated(layout, config, WIDE)
        square, product = Repeated(layout, config, has_c=True), RepeatedWide(layout, config)
        for t, (a, b, c) in enumerate(self._rule.rows):
            powers = powers if t == 0 else None
            gram(self._x, self._x, r)
            factor, alpha = (z, 1.0) if c else (r, b)
            if c and powers is None:
                square(r, r, z, c, b, r)
            elif c:
                self._square(r, z, c, b, powers, config)
            last = t + 1 == len(self._rule.rows)
            if powers is None and not (last and out is not None):
                product(factor, self._x, self._next, alpha, a, self._x)
            else:
                wide(
                    layout,
                    config,
                    Operand(factor, SHORT),
                    Operand(self._x),
                    out if last and out is not None else self._next,
                    alpha=alpha,
                    beta=a,
                    c=self._x,
                    factors=powers,
                    # b R of a cubic row takes the third power of the scale, Z has its own already.
                    columns=(1 if c else 3, 1),
                )
            self._x, self._next = self._next, self._x
        return self._x if out is None else None

    def gram(self, out: Delivery | None) -> Tensor | None:
        """Q <- Q (a I + Z), R <- (a I + Z) R (a I + Z), Z = b R + c R^2; Q = unit I + q."""
        layout, config = self._layout, self._full_config
        r, half = (layout.empty(SHORT, torch.float32) for _ in range(2))
        self._gram(r)
        # Until X is written again, it and R lack the scale that only R tells.
        powers = pending = self._powers_of_gram(r) if self._rule.schatten8 else None
        unit, q, taken = 1.0, None, 0
        for t, (a, b, c) in enumerate(self._rule.rows):
            ends = t + 1 == len(self._rule.rows)
            closing = ends or t + 1 in self._restarts
            # The factor of a step by itself is rounded to X's dtype.
            alone = taken == 0 and closing
            z = layout.empty(SHORT, self._x.dtype if alone else torch.float32)
            self._square(r, z, c, b, powers, config)
            if q is None:
                q = z
            else:
                product = layout.empty(SHORT, torch.float32)
                # Over several steps unit I and q nearly cancel: q takes it in.
                whole = unit * a if closing else 0.0
                terms = Terms(beta=a, c=q, gamma=whole, delta=unit, d=z)
                symmetric(layout, config, q, z, product, terms)
                q = product
            unit *= a
            taken += 1
            if not closing:
                terms = Terms(beta=a, c=r, factors=powers, columns=(2, 2, 0))
                symmetric(layout, config, r, z, half, terms)
                symmetric(layout, config, half, z, r, Terms(beta=a, c=half))
                powers = None
                continue
            target = self._next if out is None or not ends else out
            if alone:
                self._apply(q, target, pending, unit, self._x)
            else:
                self._apply_whole(q, target, pending)
            self._x, self._next = self._next, self._x
            if not ends:
                self._gram(r)
                powers, pending, unit, q, taken = None, None, 1.0, None, 0
        return self._x if out is None else None

    def _apply_whole(self, q: Tensor, out: Tensor | Delivery, powers: Tensor | None) -> None:
        """Q X with Q in fp32.

        On a null space Q is the product of the slopes, hundreds of times what it is elsewhere, and
        X is exactly 0 there where rows or columns repeat: one 16-bit Q would add the rounding of
        the large part. Two of them hold enough; what the low one adds may be rounded.
        """
        if self._x.dtype == torch.float32:
            return self._apply(q, out, powers)
        high = q.to(self._x.dtype)
        self._apply((q - high.float()).to(self._x.dtype), self._next, powers)
        self._apply(high, out, powers, 1.0, self._next, column=0)
        return None

    def _apply(
        self,
        q: Tensor,
        out: Tensor | Delivery,
        powers: Tensor | None,
        beta: float = 0.0,
        c: Tensor | None = None,
        column: int = 1,
    ) -> None:
        """Q X + beta C, times the scale that is pending (C: unless `column` is 0)."""
        wide(
            self._layout,
            self._config,
            Operand(q, SHORT),
            Operand(self._x),
            out,
            beta=beta,
            c=c,
            factors=powers,
            columns=(1, column),
        )

    def _gram(self, r: Tensor) -> None:
        symmetric(self._layout, self._config, self._x, self._x, r, space=WIDE)

    def _square(
        self, r: Tensor, z: Tensor, c: float, b: float, powers: Tensor | None, config: Config
    ) -> None:
        """Z = b R + c R^2."""
        terms = Terms(alpha=c, beta=b, c=r, factors=powers, columns=(4, 2, 0))
        symmetric(self._layout, config, r, r, z, terms)

    def _powers_of_gram(self, r: Tensor | None = None) -> Tensor:
        """Powers of the scale from R^2's Frobenius norm, in fp32."""
        layout = self._layout
        if r is None:
            r = layout.empty(SHORT, torch.float32)
            self._gram(r)
        squares = torch.empty(
            len(layout.triangle(SHORT, self._full_config.tile)),
            dtype=torch.float64,
            device=layout.device,
        )
        scratch = layout.empty(SHORT, torch.float32)
        symmetric(layout, self._full_config, r, r, scratch, squares=squares)
        powers = torch.empty(layout.count, _POWERS, dtype=torch.float32, device=layout.device)
        launch(
            _powers_kernel,
            layout.count,
            layout.triangle_spans(SHORT, self._full_config.tile),
            squares,
            self._summary.floor,
            powers,
            self._rule.norm_factor,
            COUNT=_POWERS,
            BLOCK=256,
        )
        return powers


@operator
@iterates
def newton_schulz(x: Tensor, options: NewtonSchulzOptions) -> Tensor:
    """Polynomials of X / norm(X); see `spectral_kernels.newton_schulz`."""
    options.check(1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    rule, arch = rule_of(options), architecture(x.device)
    kinds = Kind.of(x), Kind.of(out)
    groups, rows = groups_of_one(kinds, rule, tuple(options.restarts), arch)
    table = table_of(rows, Addresses.of((x, out)), x.device)
    for group in groups:
        layout = layout_for(group, x.device)
        mix = Mix(group.places(table, 0))
        summary = _summary(mix, layout, rule)
        packed = pack(mix, layout, summary, rule.compute_dtype, propagate=True)
        delivery = Delivery(group.places(table, 1))
        orthogonalize(layout, group.plan, rule, packed, summary, delivery)
    return out


@operator
def polar(x: Tensor) -> Tensor:
    """The polar factor; see `spectral_kernels.polar`.

    No kernel of this room: `torch.linalg.svd` in float64, matrix by matrix so that the bits do not
    depend on the batch. Waits for the device.
    """
    if not x.numel():
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return torch.stack([_polar_of(one) for one in flattened(x)]).reshape(x.shape)


def _polar_of(x: Tensor) -> Tensor:
    wide = x.double()
    largest = float(wide.abs().max())
    if not math.isfinite(largest):
        return torch.full_like(x, math.nan)
    if largest == 0.0:
        return torch.zeros_like(x)
    u, s, vh = torch.linalg.svd(wide * 2.0 ** -math.frexp(largest)[1], full_matrices=False)
    kept = s > max(x.shape) * torch.finfo(torch.float32).eps * s[0]
    return ((u * kept) @ vh).to(x.dtype)


@operator
@takes(MuonLists, MuonOptions)
def muon_step_(lists: MuonLists, options: MuonOptions) -> None:
    """One Muon step over a list of matrices; see `spectral_kernels.muon_step_`."""
    if not lists.params:
        check_muon(lists, options, TRITON)
        return
    listing, addresses = listing_of(lists, options)
    counters, lr, beta2 = listing.counters, lists.lr, options.beta2
    device, rule = lists.params[0].device, rule_of(options)
    table = table_of(listing.rows, addresses, device)
    propagate = options.nonfinite == "propagate"
    states = torch.empty(counters.size, dtype=torch.int32, device=device)
    most = most_of(rule.rows, rule.norm_factor)
    steps = counters.steps(table, device) if listing.narrow else None
    scales = scales_of(listing, device)
    for group in listing.groups:
        layout, slots = layout_for(group, device), group.slots
        weights, gradients, buffers = (group.places(table, i) for i in range(3))
        beside = None if propagate else weights
        mix = Mix(gradients, buffers, options.momentum, options.nesterov, options.maximize, beside)
        state, decay, factors = states[slots], options.weight_decay, scales[slots]
        delivery = Delivery(weights, lr, decay, factors, state, propagate, options.cautious)
        moments = None if beta2 is None else group.places(table, 3)
        reach = Reach(delivery, most, moments is not None, options.hyperball)
        summary = _summary(mix, layout, rule, state, None if propagate else reach)
        if moments is not None and not propagate:
            check_moments(layout, moments, state)
        own = None if steps is None else steps[slots]
        packed = pack(mix, layout, summary, rule.compute_dtype, propagate=propagate, steps=own)
        if moments is None and not options.hyperball:
            orthogonalize(layout, group.plan, rule, packed, summary, delivery)
        else:
            directions = orthogonalize(layout, group.plan, rule, packed, summary, None)
            assert directions is not None
            averages = None
            if moments is not None and beta2 is not None:
                averages = Averages(moments, beta2, options.neuron_eps)
            tile, sphere = group.plan.config.tile, options.hyperball
            by_neurons(layout, tile, directions, averages, delivery, sphere=sphere)
        if not propagate:
            settle(mix, layout, state, own)
    counters.advance_(table, states, lists.skipped, propagate=propagate)


def _summary(
    mix: Mix,
    layout: Layout,
    rule: Rule,
    state: Tensor | None = None,
    reach: Reach | None = None,
) -> Summary:
    return summarize(
        mix,
        layout,
        state,
        norm_factor=rule.norm_factor,
        eps=rule.eps,
        floored=not rule.schatten8,
        reach=reach,
    )
