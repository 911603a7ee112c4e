"""Who owns which matrix, and which of them travel together."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from .._forms import Form

Entry = TypeVar("Entry")

# What a matrix costs whatever its size, in floating-point operations of a core: some 20 us.
_OVERHEAD = 1_000_000


def flops(operator: str, form: Form, values: Mapping[str, Any]) -> int:
    """Floating-point operations of one step of a parameter's matrices, roughly.

    They decide who owns what and nothing else, so what matters is that they are the same on every
    rank: they come from shapes and options alone. A refresh counts as its share of a step.
    """
    *batch, m, n = form.shape
    each = _COSTS[operator](m, n, values)
    return math.prod(batch) * (int(each) + _OVERHEAD)


def _polynomials(m: int, n: int, steps: int) -> float:
    """Newton-Schulz: X X^T and A A, of which one triangle is computed, and B X."""
    s, wide = sorted((m, n))
    return steps * (3.0 * s * s * wide + 1.0 * s**3)


def _muon(m: int, n: int, values: Mapping[str, Any]) -> float:
    return _polynomials(m, n, values["ns_steps"] or 5)


def _sides(m: int, n: int, limit: int | None) -> list[int]:
    """The sides that have a factor."""
    return [size for size in (m, n) if limit is None or size <= limit]


def _two_sided(m: int, n: int, sides: Sequence[int], products: int) -> float:
    """A factor's update, of which one triangle is computed, and products with all of its matrix."""
    return sum((1.0 + 2.0 * products) * m * n * size for size in sides)


def _shampoo(m: int, n: int, values: Mapping[str, Any]) -> float:
    block = values["block_size"] or max(m, n, 1)
    total = 0.0
    for rows in _pieces(m, block):
        for cols in _pieces(n, block):
            # A root is about twenty products of one triangle each.
            roots = 20.0 * (rows**3 + cols**3) / values["precondition_frequency"]
            total += _two_sided(rows, cols, (rows, cols), 1) + roots
    return total


def _pieces(size: int, block: int) -> list[int]:
    return [min(block, size - start) for start in range(0, size, block)]


def _eigenbases(m: int, n: int, values: Mapping[str, Any]) -> float:
    sides = _sides(m, n, values["max_precond_dim"])
    # A refresh is a product, a QR decomposition and the transport of the state.
    refresh = sum(6.0 * size**3 + 4.0 * m * n * size for size in sides)
    return _two_sided(m, n, sides, 2) + refresh / values["precondition_frequency"]


def _deva(m: int, n: int, values: Mapping[str, Any]) -> float:
    return _eigenbases(m, n, values) + _polynomials(m, n, values["steps"] or 5)


_COSTS: Mapping[str, Callable[[int, int, Mapping[str, Any]], float]] = {
    "muon_step_": _muon,
    "shampoo_step_": _shampoo,
    "soap_step_": _eigenbases,
    "deva_step_": _deva,
}


def assign(costs: Mapping[str, tuple[int, int]], loads: list[int]) -> dict[str, int]:
    """The owner of every entry: the longest first, each to the rank that has the least so far.

    So the fullest rank has at most the mean and one entry, and the order of parameters does not
    matter, only their names.

    Args:
        costs: name -> its cost and its bytes.
        loads: of every rank, the cost that it has; changed.
    """
    heap = [(load, 0, rank) for rank, load in enumerate(loads)]
    heapq.heapify(heap)
    owners = {}
    for name in in_order(costs):
        load, size, rank = heapq.heappop(heap)
        owners[name] = rank
        cost, more = costs[name]
        loads[rank] = load + cost
        heapq.heappush(heap, (loads[rank], size + more, rank))
    return owners


def in_order(costs: Mapping[str, tuple[int, int]]) -> list[str]:
    """Names, the dearest first."""
    return sorted(costs, key=lambda name: (-costs[name][0], -costs[name][1], name))


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
