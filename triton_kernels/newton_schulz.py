"""Newton-Schulz iterations and the fused Muon step.

Matrices are grouped by how they are iterated on; a group shares its launches whatever the shapes
in it. A group of the standard form takes 3 launches a step, one of the Gram form up to 4 a step,
and one of small matrices a single launch for all steps; three more read the input, and products
that end in the caller's tensors are launched once for every orientation in the group.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

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

from ._batch import flattened
from ._checks import TRITON
from ._config import (
    GROUP_ELEMENTS,
    Config,
    architecture,
    config_for,
    is_small,
    precision_of,
    small_config,
)
from ._device import NONFINITE, STRIDED, launch
from ._layout import (
    SHORT,
    WIDE,
    Layout,
    Place,
    Places,
    kept,
    layout_of,
    matrices_of,
    places_of,
    upload,
)
from ._list_step import Progress, numbers_of, steps_of
from ._matmul import Delivery, Operand, wide
from ._neurons import Averages, by_neurons, check_moments
from ._newton_schulz_kernels import _powers_kernel, _small_kernel
from ._pack import Mix, Summary, pack, summarize
from .symmetric_matmul import Terms, symmetric

# Powers of the scale that the Schatten-8 norm adds, as columns of a table.
_POWERS = 5


@dataclass(frozen=True)
class Rule:
    """What is iterated.

    Attributes:
        rows: (a, b, c) of every step.
        method: "auto", "standard" or "gram".
        compute_dtype: of X; 16-bit means 16-bit operands and fp32 sums.
        eps, norm, norm_factor: X is divided by max(norm_factor norm(X), eps).
    """

    rows: tuple[tuple[float, float, float], ...]
    method: str
    compute_dtype: torch.dtype
    eps: float = 0.0
    norm: str = "frobenius"
    norm_factor: float = 1.0

    @property
    def schatten8(self) -> bool:
        """Whether the norm needs the square of the Gram matrix."""
        return self.norm == "schatten8"


@dataclass(frozen=True)
class Plan:
    """How one matrix is iterated on: a function of its shape and the rule alone.

    Attributes:
        form: "small", "standard" or "gram".
        config: of its products; the tile of "small" is the padded short side.
        restarts: steps before which X and R are formed anew ("small": bits of a number).
    """

    form: str
    config: Config
    restarts: tuple[int, ...]


@functools.lru_cache(maxsize=4096)
def plan_of(m: int, n: int, rule: Rule, restarts: tuple[int, ...], arch: str) -> Plan:
    """The plan of an m x n matrix."""
    short, long = min(m, n), max(m, n)
    one_program = is_small(arch, rule.compute_dtype, short, long)
    gram = _is_gram(short, long, rule, restarts, one_program)
    if one_program:
        every = tuple(range(1, len(rule.rows)))
        config = small_config(arch, short)
        return Plan("small", config, restarts if gram else every)
    config = config_for(arch, rule.compute_dtype, short)
    return Plan("gram", config, restarts) if gram else Plan("standard", config, ())


# An fp32-grade product of the Gram form against a 16-bit one: three TF32 products at half the rate.
_FULL_PRECISION_COST = 6.0


def _is_gram(
    short: int, long: int, rule: Rule, restarts: tuple[int, ...], one_program: bool
) -> bool:
    if rule.method != "auto":
        return rule.method == "gram"
    full = rule.compute_dtype == torch.float32
    if full and not restarts:
        return False  # the Gram form would lose accuracy without
    if one_program:
        return True  # the passes over X are what counts
    rate = 1.0 if full else _FULL_PRECISION_COST
    square, product = float(short) ** 3, float(short) ** 2 * long
    cuts = [0, *sorted(set(restarts)), len(rule.rows)]
    standard = gram = 0.0
    for begin, end in itertools.pairwise(cuts):
        squares = sum(0.5 * square for _, _, c in rule.rows[begin:end] if c)
        alone = 1.5 * product * (end - begin) + squares
        standard += alone
        # Q Z and twice R; Q is two 16-bit numbers.
        gram += (
            alone
            if end - begin == 1
            else (1.5 if full else 2.5) * product
            + rate * (squares + 1.5 * square * (end - begin - 1))
        )
    return gram < standard


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
    none = Delivery(places_of((), torch.float32, layout.device))
    rows = _rows(rule.rows, layout.device)
    everything = {STRIDED.value: list(range(layout.count))}
    for unit, chosen in (out.by_unit(layout) if out is not None else everything).items():
        launch(
            _small_kernel,
            len(chosen),
            x,
            layout.table,
            _indices(tuple(chosen), layout.device),
            rows,
            len(rule.rows),
            sum(1 << t for t in plan.restarts),
            summary.floor,
            rule.norm_factor,
            *(out or none).arguments(layout),
            SCHATTEN=rule.schatten8,
            PLACED_UNIT=unit,
            DELIVER=out is not None,
            **(out or none).constants(),
            PRECISION=precision_of(architecture(layout.device)),
            **plan.config.options(),
        )
    return x if out is None else None


@kept(256)
def _rows(rows: tuple[tuple[float, float, float], ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(rows, dtype=torch.float32, device="cpu"), device)


@kept()
def _indices(chosen: tuple[int, ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(chosen, dtype=torch.int32, device="cpu"), device)


class _Iteration:
    """Both forms on the workspaces of one group, a launch a product."""

    def __init__(self, layout: Layout, plan: Plan, rule: Rule, x: Tensor, summary: Summary) -> None:
        self._layout, self._config, self._restarts = layout, plan.config, plan.restarts
        self._full_config = config_for(
            architecture(layout.device), torch.float32, min(map(min, layout.shapes))
        )
        self._rule, self._summary = rule, summary
        self._x, self._next = x, torch.empty_like(x)

    def standard(self, out: Delivery | None) -> Tensor | None:
        """X <- a X + (b R + c R^2) X, R = X X^T in X's dtype."""
        r, z = (self._layout.empty(SHORT, self._x.dtype) for _ in range(2))
        powers = self._powers_of_gram() if self._rule.schatten8 else None
        for t, (a, b, c) in enumerate(self._rule.rows):
            powers = powers if t == 0 else None
            self._gram(r)
            update = r, b
            if c:
                self._square(r, z, c, b, powers, self._config)
                update = z, 1.0
            # b R of a cubic row takes the third power of the scale, Z has its own already.
            alpha_column = 1 if c else 3
            last = t + 1 == len(self._rule.rows)
            target = out if last and out is not None else self._next
            wide(
                self._layout,
                self._config,
                Operand(update[0], SHORT),
                Operand(self._x),
                target,
                alpha=update[1],
                beta=a,
                c=self._x,
                factors=powers,
                columns=(alpha_column, 1),
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


@dataclass(frozen=True)
class Item:
    """One matrix of a list.

    Attributes:
        shape: (m, n).
        plan: how it is iterated on.
        index: its number in the list.
        entry: the number of its list entry.
        places: where its tensors are.
        dtypes: of those tensors.
    """

    shape: tuple[int, int]
    plan: Plan
    index: int
    entry: int
    places: tuple[Place, ...]
    dtypes: tuple[torch.dtype, ...]


def groups_of(items: Sequence[Item]) -> list[list[Item]]:
    """Items that share their launches: one plan, the same dtypes, workspaces of bounded size."""
    groups: dict[object, list[list[Item]]] = {}
    filled: dict[object, int] = {}
    for item in items:
        key = (item.plan, item.dtypes)
        size = item.shape[0] * item.shape[1]
        if key not in groups or filled[key] + size > GROUP_ELEMENTS:
            groups.setdefault(key, []).append([])
            filled[key] = 0
        groups[key][-1].append(item)
        filled[key] += size
    return [group for part in groups.values() for group in part]


def layout_for(group: Sequence[Item], device: torch.device) -> Layout:
    """Workspaces of a group."""
    plan = group[0].plan
    long = max(plan.config.tile, plan.config.depth)
    return layout_of(tuple(item.shape for item in group), (plan.config.tile, long), device)


def items_of(
    lists: Sequence[Sequence[Tensor]],
    rule: Rule,
    restarts: Sequence[tuple[int, ...]],
    arch: str,
) -> list[Item]:
    """Every matrix of lists whose entries belong together; entries without elements have none."""
    items: list[Item] = []
    for entry, tensors in enumerate(zip(*lists, strict=True)):
        if not tensors[0].numel():
            continue
        shape = (tensors[0].shape[-2], tensors[0].shape[-1])
        plan = plan_of(*shape, rule, restarts[entry], arch)
        dtypes = tuple(x.dtype for x in tensors)
        for places in zip(*map(matrices_of, tensors), strict=True):
            items.append(Item(shape, plan, len(items), entry, places, dtypes))
    return items


def places_in(group: Sequence[Item], which: int, device: torch.device) -> Places:
    """The matrices of the `which`-th list."""
    return places_of([item.places[which] for item in group], group[0].dtypes[which], device)


@operator
@iterates
def newton_schulz(x: Tensor, options: NewtonSchulzOptions) -> Tensor:
    """Polynomials of X / norm(X); see `spectral_kernels.newton_schulz`."""
    options.check(1)
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    if not x.numel():
        return out
    rule = rule_of(options)
    arch = architecture(x.device)
    for group in groups_of(items_of(([x], [out]), rule, [tuple(options.restarts)], arch)):
        layout, plan = layout_for(group, x.device), group[0].plan
        given, result = (places_in(group, i, x.device) for i in range(2))
        mix = Mix(given)
        summary = _summary(mix, layout, rule)
        packed = pack(mix, layout, summary, rule.compute_dtype, propagate=True)
        orthogonalize(layout, plan, rule, packed, summary, Delivery(result))
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
    check_muon(lists, options, TRITON)
    params, grads, momentum_buffers, second_moments, step_counts, skipped, lr = lists
    beta2 = options.beta2
    if not params:
        return
    device = params[0].device
    rule = rule_of(options)
    used = [params, grads, momentum_buffers] + ([] if beta2 is None else [second_moments])
    items = items_of(used, rule, options.restarts_of(len(params)), architecture(device))
    progress = Progress(items, step_counts, skipped, options.nonfinite)
    propagate = options.nonfinite == "propagate"
    for group in groups_of(items):
        layout, plan = layout_for(group, device), group[0].plan
        weights, gradients, buffers = (places_in(group, i, device) for i in range(3))
        factors = numbers_of(tuple(options.scales[item.entry] for item in group), device)
        beside = None if propagate else weights
        mix = Mix(gradients, buffers, options.momentum, options.nesterov, options.maximize, beside)
        summary = _summary(mix, layout, rule)
        if lr.device.type != "cpu" and not propagate:
            state = torch.where(lr.isfinite(), summary.state, NONFINITE.value)
            summary = replace(summary, state=state)
        moments = None if beta2 is None else places_in(group, 3, device)
        if moments is not None and not propagate:
            check_moments(layout, moments, summary.state)
        narrow = buffers.dtype == torch.bfloat16
        steps = steps_of(group, items, step_counts) if narrow else None
        packed = pack(mix, layout, summary, rule.compute_dtype, propagate=propagate, steps=steps)
        decay = options.weight_decay
        delivery = Delivery(weights, lr, decay, factors, summary.state, propagate, options.cautious)
        if moments is None and not options.hyperball:
            orthogonalize(layout, plan, rule, packed, summary, delivery)
        else:
            directions = orthogonalize(layout, plan, rule, packed, summary, None)
            assert directions is not None
            averages = None
            if moments is not None and beta2 is not None:
                averages = Averages(moments, beta2, options.neuron_eps)
            sphere = options.hyperball
            by_neurons(layout, plan.config.tile, directions, averages, delivery, sphere=sphere)
        progress.add(group, summary.state)
    progress.finish()


def rule_of(options: NewtonSchulzOptions | MuonOptions) -> Rule:
    """What is iterated, wherever restarts are."""
    return Rule(
        _triples(options.rows),
        options.method,
        options.compute_dtype,
        options.eps,
        options.norm,
        options.norm_factor,
    )


def _summary(mix: Mix, layout: Layout, rule: Rule) -> Summary:
    return summarize(
        mix,
        layout,
        norm_factor=rule.norm_factor,
        eps=rule.eps,
        floored=not rule.schatten8,
    )


def _triples(rows: Sequence[Sequence[float]]) -> tuple[tuple[float, float, float], ...]:
    return tuple((float(a), float(b), float(c)) for a, b, c in rows)
