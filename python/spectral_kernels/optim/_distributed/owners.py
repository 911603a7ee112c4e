"""Who owns which matrix, and which of them travel together."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from ... import _extension, _restarts
from ..._options import DEVA_VARIANTS
from ...coefficients import Coefficients, resolve
from .._forms import Form
from .._split import sizes_of

Entry = TypeVar("Entry")

# So many ranks are looked at for one entry, those that have least.
_CHOICES = 16


@dataclass(frozen=True)
class Rates:
    """What work takes on some hardware, in the time of an operation of float32 products.

    Attributes:
        narrow: an operation of 16-bit products.
        wide: one of float64.
        access: an element of a matrix that is read or written.
        entry: a matrix, whatever its size.
        side: products of a shorter side s run at sqrt(s / side) of the rate.
    """

    narrow: float = 1.0
    wide: float = 2.0
    access: float = 50.0
    entry: float = 1e6
    side: int = 1

    def of(self, work: Work, shorter: int, dtype: torch.dtype) -> int:
        """Work on a matrix of this shorter side, and of this dtype."""
        state = self.wide if dtype == torch.float64 else 1.0
        products = state * work.products
        products += (self.narrow if work.narrow else state) * work.polynomials
        slower = math.sqrt(min(1.0, shorter / self.side)) if shorter else 1.0
        return int(products / slower + self.access * state * work.accesses)


# One core of a Xeon with AVX-512 and no 16-bit products, 2026-11-29: 65 GFLOP/s of float32, 30 of
# float64, 0.8 ns an element of 4 bytes. 16-bit products have twice the peak of float32 with
# AVX512-BF16 and 20 times with tiles, of which Newton-Schulz gets a quarter.
_CPUS = {"avx512bf16": Rates(narrow=0.5), "amx": Rates(narrow=0.2)}
# Assumed, since none was measured: an H100 with 60 TFLOP/s of float32, 545 of 16 bits, 8 us a
# matrix.
CARD = Rates(narrow=0.11, access=70.0, entry=5e8, side=2048)


def rates_of(device: torch.device) -> Rates:
    """Those of what this process computes on."""
    if device.type == "cuda":
        return CARD
    isa = "" if _extension.MODULE is None else _extension.MODULE.current_isa()
    return _CPUS.get(isa, Rates())


@dataclass(frozen=True)
class Work:
    """What is done, as numbers of operations and elements.

    Attributes:
        products: operations of products in the dtype of the state.
        polynomials: those of Newton-Schulz.
        narrow: the latter are of 16 bits.
        accesses: elements that are read or written.
    """

    products: float = 0.0
    polynomials: float = 0.0
    narrow: bool = False
    accesses: float = 0.0


@dataclass(frozen=True)
class Cost:
    """What a parameter costs its owner.

    Attributes:
        flops: of a step, in operations of float32 products, a refresh by its share.
        bytes: of the parameter.
        refreshes: of every step of a schedule, as (frequency, remainder), those of the refreshes
            that fall on it, in full.
    """

    flops: int
    bytes: int
    refreshes: Mapping[tuple[int, int], int] = field(default_factory=dict)


def cost(
    operator: str,
    form: Form,
    values: Mapping[str, Any],
    dtype: torch.dtype,
    offset: int | None,
    rates: Rates,
) -> Cost:
    """That of one parameter, from shapes, options and rates that all ranks know.

    It decides who owns what and nothing else.

    Args:
        operator, form, values, dtype: of its step.
        offset: its place in a staggered schedule, None where all refresh at once.
        rates: of the hardware.
    """
    *batch, m, n = form.shape
    count = math.prod(batch)
    step, refreshes = work(operator, m, n, values, dtype)
    frequency = values.get("precondition_frequency", 1)
    falls: dict[tuple[int, int], int] = {}
    each = rates.entry + rates.of(step, min(m, n), dtype)
    for block, refresh in enumerate(refreshes):
        # Entry i is i steps ahead.
        when = frequency, 0 if offset is None else (offset + block) % frequency
        taken = rates.of(Work(products=refresh), 0, dtype)
        falls[when] = falls.get(when, 0) + count * taken
        each += taken / frequency
    falls = {when: taken for when, taken in falls.items() if taken}
    size = math.prod(form.shape) * dtype.itemsize
    return Cost(count * int(each), size, falls if frequency > 1 else {})


# The step without refreshes, and the operations of the refreshes of its blocks.
_Parts = tuple[Work, list[float]]


def work(operator: str, m: int, n: int, values: Mapping[str, Any], dtype: torch.dtype) -> _Parts:
    """That of one matrix."""
    return _WORK[operator](m, n, values, dtype)


def _polynomials(m: int, n: int, rows: Coefficients, restarts: Sequence[int]) -> float:
    """Newton-Schulz: of X X^T and products of symmetric matrices one triangle is computed.

    A step by itself takes X X^T, R R and Z X. Several that stand on one X X^T take it and Q X once,
    R R in each step, Q W from the second and W R W up to the last but one.
    """
    s, wide = sorted((m, n))
    count = len(rows.rows)
    starts = [0, *restarts, count]
    lengths = [end - start for start, end in zip(starts, starts[1:], strict=False)]
    return sum(3.0 * s * s * wide + (4 * k - 3) * 1.0 * s**3 for k in lengths)


def _muon(m: int, n: int, values: Mapping[str, Any], dtype: torch.dtype) -> _Parts:
    if values["coefficients"] is not None:
        rows = resolve(values["coefficients"])
    else:
        rows = resolve(values["ns_coefficients"], values["ns_steps"])
    computed = torch.float64 if dtype == torch.float64 else values["compute_dtype"]
    computed = computed or torch.bfloat16
    operations = 0.0
    for part in sizes_of(m, values["split"]):
        like = torch.empty(part, n, device="meta", dtype=dtype)
        restarts = _restarts.restarts_for(like, rows, values["method"], computed)
        operations += _polynomials(part, n, rows, restarts)
    passes = 8.0
    # Averages of neurons read the update again, as norms of spheres do; bits of rounding at random
    # take a hash of every element.
    passes += 4.0 * (values["beta2"] is not None) + 4.0 * values["hyperball"]
    passes += 12.0 * (values["state_dtype"] is not None)
    return Work(0.0, operations, computed.itemsize == 2, passes * m * n), []


def _sides(m: int, n: int, limit: int | None) -> list[int]:
    """The sides that have a factor."""
    return [size for size in (m, n) if limit is None or size <= limit]


def _two_sided(m: int, n: int, sides: Sequence[int], products: int) -> float:
    """A factor's update, of which one triangle is computed, and products with all of its matrix."""
    return sum((1.0 + 2.0 * products) * m * n * size for size in sides)


def _shampoo(m: int, n: int, values: Mapping[str, Any], dtype: torch.dtype) -> _Parts:
    block = values["block_size"] or max(m, n, 1)
    which = values["sides"]
    if which == "shorter":
        which = "left" if m <= n else "right"
    products, squares, refreshes = 0.0, 0.0, []
    for rows in _pieces(m, block):
        for cols in _pieces(n, block):
            sides = {"left": [rows], "right": [cols]}.get(which, [rows, cols])
            products += _two_sided(rows, cols, sides, 1)
            squares += sum(size * size for size in sides)
            # A root is some thirty products of one triangle each.
            refreshes.append(sum(35.0 * size**3 for size in sides))
    return Work(products, accesses=10.0 * m * n + 3.0 * squares), refreshes


def _pieces(size: int, block: int) -> list[int]:
    return [min(block, size - start) for start in range(0, size, block)]


def _eigenbases(m: int, n: int, values: Mapping[str, Any], dtype: torch.dtype) -> _Parts:
    sides = _sides(m, n, values["max_precond_dim"])
    # A refresh is a product, a QR decomposition and the transport of the state.
    refresh = sum(9.0 * size**3 + 8.0 * m * n * size for size in sides)
    accesses = 12.0 * m * n + 6.0 * sum(size * size for size in sides)
    return Work(_two_sided(m, n, sides, 2), accesses=accesses), [refresh]


def _deva(m: int, n: int, values: Mapping[str, Any], dtype: torch.dtype) -> _Parts:
    if (values["norm"] or DEVA_VARIANTS[values["variant"]][0]) == "linf":
        return Work(accesses=12.0 * m * n), []
    step, refreshes = _eigenbases(m, n, values, dtype)
    rows = resolve(values["coefficients"], values["steps"])
    computed = torch.float64 if dtype == torch.float64 else values["compute_dtype"]
    narrow = (computed or torch.bfloat16).itemsize == 2
    # Every step by itself.
    operations = _polynomials(m, n, rows, range(1, len(rows.rows)))
    return Work(step.products, operations, narrow, step.accesses + 6.0 * m * n), refreshes


_WORK: Mapping[str, Callable[[int, int, Mapping[str, Any], torch.dtype], _Parts]] = {
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
