"""Who owns which matrix, and which of them travel together."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from ..._options import DEVA_VARIANTS
from ...coefficients import resolve
from .._forms import Form
from .._split import sizes_of

Entry = TypeVar("Entry")

# What a matrix costs whatever its size, in floating-point operations of a core: some 20 us.
_OVERHEAD = 1_000_000
# So many ranks are looked at for one entry, those that have least.
_CHOICES = 16


@dataclass(frozen=True)
class Cost:
    """What a parameter costs its owner.

    Attributes:
        flops: floating-point operations of a step, roughly, a refresh by its share.
        bytes: of the parameter.
        refreshes: of every step of a schedule, as (frequency, remainder), those of the refreshes
            that fall on it, in full.
    """

    flops: int
    bytes: int
    refreshes: Mapping[tuple[int, int], int] = field(default_factory=dict)


def cost(
    operator: str, form: Form, values: Mapping[str, Any], size: int, offset: int | None
) -> Cost:
    """That of one parameter, from shapes and options alone, so that it is the same on every rank.

    It decides who owns what and nothing else.

    Args:
        operator, form, values: of its step.
        size: its bytes.
        offset: its place in a staggered schedule, None where all refresh at once.
    """
    *batch, m, n = form.shape
    count = math.prod(batch)
    step, refreshes = _COSTS[operator](m, n, values)
    frequency = values.get("precondition_frequency", 1)
    falls: dict[tuple[int, int], int] = {}
    for block, refresh in enumerate(refreshes):
        # Entry i is i steps ahead.
        when = frequency, 0 if offset is None else (offset + block) % frequency
        falls[when] = falls.get(when, 0) + count * int(refresh)
    each = int(step + sum(refreshes) / frequency)
    falls = {when: flops for when, flops in falls.items() if flops}
    return Cost(count * (each + _OVERHEAD), size, falls if frequency > 1 else {})


# Of a matrix the step without refreshes, and the refreshes of its blocks.
_Parts = tuple[float, list[float]]


def _polynomials(m: int, n: int, steps: int) -> float:
    """Newton-Schulz: X X^T and A A, of which one triangle is computed, and B X."""
    s, wide = sorted((m, n))
    return steps * (3.0 * s * s * wide + 1.0 * s**3)


def _muon(m: int, n: int, values: Mapping[str, Any]) -> _Parts:
    if values["coefficients"] is not None:
        steps = len(resolve(values["coefficients"]).rows)
    else:
        steps = len(resolve(values["ns_coefficients"], values["ns_steps"]).rows)
    return sum(_polynomials(rows, n, steps) for rows in sizes_of(m, values["split"])), []


def _sides(m: int, n: int, limit: int | None) -> list[int]:
    """The sides that have a factor."""
    return [size for size in (m, n) if limit is None or size <= limit]


def _two_sided(m: int, n: int, sides: Sequence[int], products: int) -> float:
    """A factor's update, of which one triangle is computed, and products with all of its matrix."""
    return sum((1.0 + 2.0 * products) * m * n * size for size in sides)


def _shampoo(m: int, n: int, values: Mapping[str, Any]) -> _Parts:
    block = values["block_size"] or max(m, n, 1)
    which = values["sides"]
    if which == "shorter":
        which = "left" if m <= n else "right"
    step, refreshes = 0.0, []
    for rows in _pieces(m, block):
        for cols in _pieces(n, block):
            sides = {"left": [rows], "right": [cols]}.get(which, [rows, cols])
            step += _two_sided(rows, cols, sides, 1)
            # A root is about twenty products of one triangle each.
            refreshes.append(sum(20.0 * size**3 for size in sides))
    return step, refreshes


def _pieces(size: int, block: int) -> list[int]:
    return [min(block, size - start) for start in range(0, size, block)]


def _eigenbases(m: int, n: int, values: Mapping[str, Any]) -> _Parts:
    sides = _sides(m, n, values["max_precond_dim"])
    # A refresh is a product, a QR decomposition and the transport of the state.
    refresh = sum(6.0 * size**3 + 4.0 * m * n * size for size in sides)
    return _two_sided(m, n, sides, 2), [refresh]


def _deva(m: int, n: int, values: Mapping[str, Any]) -> _Parts:
    if (values["norm"] or DEVA_VARIANTS[values["variant"]][0]) == "linf":
        return 0.0, []
    step, refreshes = _eigenbases(m, n, values)
    rows = resolve(values["coefficients"], values["steps"]).rows
    return step + _polynomials(m, n, len(rows)), refreshes


_COSTS: Mapping[str, Callable[[int, int, Mapping[str, Any]], _Parts]] = {
    "muon_step_": _muon,
    "shampoo_step_": _shampoo,
    "soap_step_": _eigenbases,
    "deva_step_": _deva,
}


@dataclass
class Load:
    """What a rank has so far.

    Attributes:
        flops, bytes, refreshes: sums of those of what it owns.
    """

    flops: int = 0
    bytes: int = 0
    refreshes: Counter[tuple[int, int]] = field(default_factory=Counter)

    def add(self, more: Cost) -> None:
        """Takes one more."""
        self.flops += more.flops
        self.bytes += more.bytes
        self.refreshes.update(more.refreshes)

    def with_refreshes(self, more: Cost) -> int:
        """The most of a step on which one more refreshes, once that is here."""
        return max((self.refreshes[when] + x for when, x in more.refreshes.items()), default=0)

    def copy(self) -> Load:
        """The same, to be changed by itself."""
        return Load(self.flops, self.bytes, self.refreshes.copy())


def assign(costs: Mapping[str, Cost], loads: Sequence[Load]) -> dict[str, int]:
    """The owner of every entry: the longest first, each to a rank with no more than the mean.

    Of those it is the one that has least to refresh on the same steps, then the one that has least
    in all. So the fullest rank has at most the mean and one entry, no step has all the refreshes on
    one rank, and only names, costs and schedules matter, not the order of parameters.

    Args:
        costs: by name.
        loads: of every rank; changed.
    """
    heap = [(load.flops, load.bytes, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    total = sum(load.flops for load in loads)
    owners = {}
    for name in in_order(costs):
        more = costs[name]
        # The first one always has no more than the mean.
        free = [heapq.heappop(heap)]
        while more.refreshes and heap and len(free) < _CHOICES and heap[0][0] * len(loads) <= total:
            free.append(heapq.heappop(heap))
        best = min(free, key=lambda each: (loads[each[-1]].with_refreshes(more), each))
        owners[name] = best[-1]
        loads[best[-1]].add(more)
        total += more.flops
        for *_, rank in free:
            heapq.heappush(heap, (loads[rank].flops, loads[rank].bytes, rank))
    return owners


def in_order(costs: Mapping[str, Cost]) -> list[str]:
    """Names, the dearest first."""
    return sorted(costs, key=lambda name: (-costs[name].flops, -costs[name].bytes, name))


def buckets(entries: Sequence[tuple[Entry, int]], most: int, ranks: int) -> list[list[Entry]]:
    """Entries in their order, cut where a bucket has work for every rank and enough bytes.

    Args:
        entries: those, with their bytes.
        most: bytes of a bucket.
        ranks: the least number of entries in a bucket, but for the last one.
    """
    found: list[list[Entry]] = []
    size = 0
    for entry, more in entries:
        if not found or (size + more > most and len(found[-1]) >= ranks):
            found.append([])
            size = 0
        found[-1].append(entry)
        size += more
    return found
