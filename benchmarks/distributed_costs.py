"""What a step costs that is spread over ranks, from shapes and the figures of a machine.

    python -m spectral_kernels.benchmarks.distributed_costs [--to FOLDER]

Needs no GPU: with assumed figures of cards it writes distributed_costs.md, a model, not a
measurement. `spectral-kernels bench --ranks` compares the same arithmetic, with figures measured
where it runs, with steps of real processes.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import spectral_kernels as sk
import torch
from spectral_kernels.optim._distributed import owners
from spectral_kernels.optim._forms import form_of

Shape = tuple[int, int]

BUCKET = sk.optim.Distributed().bucket_bytes

ALGORITHMS: dict[str, Callable[..., Any]] = {
    "muon": sk.optim.Muon,
    "shampoo": sk.optim.Shampoo,
    "soap": sk.optim.SOAP,
    "deva": sk.optim.DeVA,
}


@functools.cache
def _optimizer(algorithm: str, shape: Shape) -> Any:
    """One of a matrix of this shape, which has no memory."""
    param = torch.nn.Parameter(torch.empty(shape, dtype=torch.float32, device="meta"))
    return ALGORITHMS[algorithm]([{"params": [param], "algorithm": "matrix"}])


def cost(
    algorithm: str, shape: Shape, place: int = 0, rates: owners.Rates | None = None
) -> owners.Cost:
    """What a matrix costs its owner that has this place among others, by default on a card."""
    optimizer = _optimizer(algorithm, shape)
    (group,) = optimizer.param_groups
    form = form_of(shape, batched=False, matrix_dims=None)
    offset = place if optimizer._staggered(group) else None
    return owners.cost(
        optimizer._operator, form, group, torch.float32, offset, rates or owners.CARD
    )


@functools.cache
def work(algorithm: str, shape: Shape) -> tuple[float, float]:
    """Operations of a matrix's step, a refresh by its share, and elements read or written."""
    optimizer = _optimizer(algorithm, shape)
    (group,) = optimizer.param_groups
    step, refreshes = owners.work(optimizer._operator, *shape, group, torch.float32)
    share = sum(refreshes) / group.get("precondition_frequency", 1)
    return step.products + step.polynomials + share, step.accesses


@functools.cache
def state_bytes(algorithm: str, shape: Shape) -> int:
    """Of a matrix."""
    return _optimizer(algorithm, shape).memory_estimate()


@dataclass(frozen=True)
class Layout:
    """How matrices lie on ranks: cut by rows over `shards` of them, the same on all `replicas`."""

    replicas: int
    shards: int

    @property
    def ranks(self) -> int:
        return self.replicas * self.shards


@dataclass(frozen=True)
class Wire:
    """Bytes of an element on the way: in as pieces go to the owner, out as they come back."""

    into: int
    out: int


EXACT = Wire(8, 4)
NARROW = Wire(2, 2)


@dataclass
class Bucket:
    """Matrices that travel together.

    Attributes:
        owned: of every rank.
        sent, received: elements that a rank sends to others and gets from them, each an array of
            (ranks,): on the way in, and on the way out.
        held: elements that each rank holds a part of or, where all hold all, those it owns.
    """

    owned: list[Counter[Shape]]
    sent: tuple[numpy.ndarray, numpy.ndarray]
    received: tuple[numpy.ndarray, numpy.ndarray]
    held: numpy.ndarray

    @functools.cached_property
    def elements(self) -> numpy.ndarray:
        """What every rank owns."""
        return numpy.array([_elements(each) for each in self.owned], dtype=float)


@functools.cache
def _rows(size: int, shards: int) -> numpy.ndarray:
    """How many of its rows every shard has."""
    step = -(-size // shards)
    return numpy.clip(size - step * numpy.arange(shards), 0, step)


def _elements(matrices: Counter[Shape]) -> int:
    return sum(count * m * n for (m, n), count in matrices.items())


def planned(
    algorithm: str,
    shapes: Sequence[Shape],
    layout: Layout,
    bucket_bytes: int = BUCKET,
    rates: owners.Rates | None = None,
) -> list[Bucket]:
    """Who owns what, and what travels: the choices that the optimizers make."""
    names = {f"{i:06}": shape for i, shape in enumerate(shapes)}
    costs = {
        name: cost(algorithm, shape, place, rates)
        for place, (name, shape) in enumerate(names.items())
    }
    who = owners.assign(costs, [owners.Load() for _ in range(layout.ranks)])
    entries = [(name, costs[name].bytes) for name in owners.in_order(costs)]
    found = []
    for bucket in owners.buckets(entries, bucket_bytes, layout.ranks):
        owned: list[Counter[Shape]] = [Counter() for _ in range(layout.ranks)]
        for name in bucket:
            owned[who[name]][names[name]] += 1
        found.append(_travelling(owned, layout))
    return found


def _travelling(owned: list[Counter[Shape]], layout: Layout) -> Bucket:
    replicas, shards = layout.replicas, layout.shards
    whole = numpy.array([_elements(each) for each in owned], dtype=float)
    if shards == 1:
        # All ranks hold all: owners have what they need, and as much comes from every rank as from
        # the fullest.
        ranks, nothing = layout.ranks, numpy.zeros(layout.ranks)
        out = numpy.full(ranks, whole.max() * (ranks - 1))
        return Bucket(owned, (nothing, out), (nothing, out), numpy.full(ranks, whole.sum()))
    of_row = numpy.zeros((replicas, shards))
    own_part = numpy.zeros(layout.ranks)
    for rank, matrices in enumerate(owned):
        for (m, n), count in matrices.items():
            parts = count * n * _rows(m, shards)
            of_row[rank // shards] += parts
            own_part[rank] += parts[rank % shards]
    held = numpy.tile(of_row.sum(0), replicas)
    return Bucket(
        owned,
        (of_row.reshape(-1) - own_part, replicas * whole - own_part),
        (whole - own_part, held - own_part),
        held,
    )


def moved(buckets: Sequence[Bucket], wire: Wire = EXACT) -> numpy.ndarray:
    """Bytes that every rank receives in a step."""
    return sum(wire.into * each.received[0] + wire.out * each.received[1] for each in buckets)


@dataclass(frozen=True)
class Costs:
    """The figures of a machine, in seconds.

    Attributes:
        step: of a matrix's step, by its shape.
        pieces: of an exchange of pieces, by the bytes of the rank that sends or receives most and
            the ranks that it sends to.
        everyone: the same where all send the same to all.
        copied: of a byte that is copied on a rank.
        begin: of what every step has, whatever its matrices: by the number of buckets.
        hidden: the part of the shorter of computing and exchanging that the other hides.
        cores: that the ranks have together; None: enough.
        in_place: what is received at an owner is received where it belongs, and not copied there.
    """

    step: Callable[[Shape], float]
    pieces: Callable[[float, int], float]
    everyone: Callable[[float, int], float]
    copied: float
    begin: float = 0.0
    hidden: float = 0.0
    cores: int | None = None
    in_place: bool = False


@dataclass(frozen=True)
class Prediction:
    """Seconds of a step, and of its parts.

    Attributes:
        total: of the step.
        computing: of the fullest owner.
        mean: of the mean owner.
        copying, exchanging, begin: as in `Costs`.
    """

    total: float
    computing: float
    mean: float
    copying: float
    exchanging: float
    begin: float


def predicted(
    buckets: Sequence[Bucket], layout: Layout, costs: Costs, wire: Wire = EXACT
) -> Prediction:
    """A step that goes through owners."""
    steps = {shape: costs.step(shape) for each in buckets for own in each.owned for shape in own}
    computing = numpy.zeros(layout.ranks)
    copying = numpy.zeros(layout.ranks)
    exchanging = 0.0
    for bucket in buckets:
        computing += [sum(k * steps[shape] for shape, k in own.items()) for own in bucket.owned]
        # Unpacked at the owner, or copied there, and written where they lie in the end.
        unpacked = 4 if layout.shards == 1 else wire.into
        copied = bucket.elements - (bucket.received[0] if costs.in_place else 0.0)
        copying += costs.copied * (4 * bucket.held + unpacked * copied)
        way = costs.everyone if layout.shards == 1 else costs.pieces
        peers = (layout.shards, layout.ranks)
        for i, width in enumerate((wire.into, wire.out)):
            most = width * max(bucket.sent[i].max(), bucket.received[i].max())
            if layout.ranks > 1 and (layout.shards > 1 or i == 1):
                exchanging += way(most, peers[i])
    busy = computing + copying
    longest = busy.max() if costs.cores is None else max(busy.max(), busy.sum() / costs.cores)
    hidden = costs.hidden * min(longest, exchanging)
    return Prediction(
        costs.begin + longest + exchanging - hidden,
        computing.max(),
        computing.mean(),
        copying.max(),
        exchanging,
        costs.begin,
    )


def replicated(shapes: Sequence[Shape], ranks: int, costs: Costs) -> Prediction:
    """A step that every rank takes for itself."""
    own = sum(costs.step(shape) for shape in shapes)
    longest = own if costs.cores is None else own * max(1.0, ranks / costs.cores)
    return Prediction(costs.begin + longest, own, own, 0.0, 0.0, costs.begin)


# Cards, on paper.


@dataclass(frozen=True)
class Cards:
    """Assumed figures of a cluster; nothing of it was measured.

    Attributes:
        rate: FLOP/s of 16-bit products at the side `full_side` and beyond.
        full_side: products of a shorter side s run at sqrt(s / full_side) of the rate.
        launch: seconds of a matrix whatever its size.
        node: cards that one link joins.
        link, network: bytes a second of a card, within a node and between nodes.
        latency, peer: seconds of an exchange, and of each rank that a rank sends to in it.
        memory: bytes a second of a copy, read and written.
        hidden: the part of the shorter of computing and exchanging that the other hides.
    """

    rate: float = 990e12 * 0.55
    full_side: int = 2048
    launch: float = 8e-6
    node: int = 8
    link: float = 300e9
    network: float = 40e9
    latency: float = 20e-6
    peer: float = 1e-6
    memory: float = 1.4e12
    hidden: float = 0.5

    def costs(self, algorithm: str) -> Costs:
        """As the model wants them."""

        def step(shape: Shape) -> float:
            full = min(1.0, min(shape) / self.full_side) ** 0.5
            operations, accesses = work(algorithm, shape)
            # A copy reads and writes.
            passes = accesses * 4 / (2 * self.memory)
            return operations / (self.rate * full) + passes + self.launch

        def way(most: float, ranks: int) -> float:
            near = (min(self.node, ranks) - 1) / (ranks - 1) if ranks > 1 else 1.0
            seconds = max(near * most / self.link, (1.0 - near) * most / self.network)
            return self.latency + self.peer * (ranks - 1) + seconds

        return Costs(step, way, way, 1.0 / self.memory, hidden=self.hidden)


@dataclass(frozen=True)
class Model:
    """The matrices of a model: those that go through owners, and experts that ranks hold whole."""

    name: str
    matrices: tuple[Shape, ...]
    experts: tuple[Shape, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(m * n for m, n in (*self.matrices, *self.experts))


def _llama(layers: int, width: int, keys: int, inner: int) -> tuple[Shape, ...]:
    attention = ((width, width), (keys, width), (keys, width), (width, width))
    return (*attention, (inner, width), (inner, width), (width, inner)) * layers


def _mixture() -> Model:
    """The shapes of Kimi K2: 61 layers, latent attention, 384 experts and a shared one."""
    width, inner, heads = 7168, 2048, 64
    attention = (
        (1536, width),
        (heads * 192, 1536),
        (576, width),
        (heads * 256, 512),
        (width, heads * 128),
    )
    expert = ((inner, width), (inner, width), (width, inner))
    dense = ((18432, width), (18432, width), (width, 18432))
    shared = (*attention, *expert, (384, width)) * 60
    return Model("1.0e12 mixture", (*attention, *dense, *shared), expert * (384 * 60))


GPT2 = Model("124M", ((2304, 768), (768, 768), (3072, 768), (768, 3072)) * 12)
DENSE_8B = Model("8B", _llama(32, 4096, 1024, 14336))
DENSE_405B = Model("405B", _llama(126, 16384, 1024, 53248))
MIXTURE = _mixture()

CASES: tuple[tuple[Model, Layout], ...] = (
    (GPT2, Layout(8, 1)),
    (DENSE_8B, Layout(8, 1)),
    (DENSE_8B, Layout(1, 8)),
    (DENSE_8B, Layout(8, 8)),
    (DENSE_405B, Layout(1, 256)),
    (DENSE_405B, Layout(1, 1024)),
    (DENSE_405B, Layout(16, 64)),
    (MIXTURE, Layout(16, 64)),
)
_SENSITIVE = ((DENSE_8B, Layout(1, 8)), (DENSE_8B, Layout(8, 8)), (DENSE_405B, Layout(1, 1024)))

_plan = functools.cache(planned)


@dataclass(frozen=True)
class Estimate:
    """A case on paper.

    Attributes:
        everywhere: seconds of a step that every rank takes for itself, without any exchange.
        step: that goes through owners, experts included.
        received: bytes of the rank that receives most.
        state: bytes of the owner that has most, and on average, experts included.
    """

    everywhere: float
    step: Prediction
    experts: float
    received: float
    state: tuple[float, float]


def estimated(
    algorithm: str, model: Model, layout: Layout, cards: Cards, wire: Wire = EXACT
) -> Estimate:
    """A case with a cluster's figures."""
    costs = cards.costs(algorithm)
    buckets = _plan(algorithm, model.matrices, layout)
    step = predicted(buckets, layout, costs, wire)
    # As many whole experts on every rank, which nothing is sent for.
    share = Counter(model.experts)
    experts = sum(count * costs.step(shape) for shape, count in share.items()) / layout.ranks
    of_experts = sum(count * state_bytes(algorithm, shape) for shape, count in share.items())
    state = numpy.zeros(layout.ranks) + of_experts / layout.ranks
    for bucket in buckets:
        state += [
            sum(count * state_bytes(algorithm, shape) for shape, count in own.items())
            for own in bucket.owned
        ]
    return Estimate(
        replicated(model.matrices, 1, costs).total + experts,
        dataclasses.replace(step, total=step.total + experts),
        experts,
        float(moved(buckets, wire).max()),
        (float(state.max()), float(state.mean())),
    )


def seconds(value: float) -> str:
    """Two or three digits."""
    return f"{value:.3g} s" if value >= 1.0 else f"{value * 1e3:.3g} ms"


def _name(layout: Layout) -> str:
    replicas, shards = layout.replicas, layout.shards
    if shards == 1:
        return f"{replicas}, DDP"
    return f"{shards}, FSDP2" if replicas == 1 else f"{layout.ranks} = {replicas} x {shards}, HSDP"


def table(algorithm: str, cards: Cards, cases: Sequence[tuple[Model, Layout]] = CASES) -> list[str]:
    """The cases, as lines of Markdown."""
    lines = [
        f"| {algorithm}: parameters | cards | each for itself | owners, max / mean | GB in | "
        "exchange | step | step in bfloat16 | state, GB, max / mean |",
        "|---" * 9 + "|",
    ]
    for model, layout in cases:
        found = estimated(algorithm, model, layout, cards)
        narrow = estimated(algorithm, model, layout, cards, NARROW)
        step = found.step
        experts = f" + {seconds(found.experts)} of experts" if found.experts else ""
        state = " / ".join(f"{each / 1e9:.2f}" for each in found.state)
        lines.append(
            f"| {model.name} | {_name(layout)} | {seconds(found.everywhere)} | "
            f"{seconds(step.computing)} / {seconds(step.mean)}{experts} | "
            f"{found.received / 1e9:.2f} | {seconds(step.exchanging)} | {seconds(step.total)} | "
            f"{seconds(narrow.step.total)} | {state} |"
        )
    return lines


_SAID = {
    "rate": "FLOP/s of products, 0.55 of 990e12",
    "full_side": "side from which products run at that rate; shorter ones at sqrt(s / side) of it",
    "launch": "seconds of a matrix whatever its size",
    "node": "cards on one link",
    "link": "bytes a second within a node",
    "network": "bytes a second between nodes, of a card",
    "latency": "seconds of an exchange",
    "peer": "seconds of an exchange for each rank that is sent to",
    "memory": "bytes a second of a copy, read and written",
    "hidden": "of the shorter of computing and exchanging, behind the other",
}


def sensitivity(algorithm: str, cards: Cards) -> list[str]:
    """The step's time when a figure is half and twice as large, as lines of Markdown."""
    heads = [f"{model.name} on {_name(layout)}" for model, layout in _SENSITIVE]
    lines = [
        f"| assumed | value | {' | '.join(heads)} |",
        "|---" * (2 + len(heads)) + "|",
    ]
    base = [estimated(algorithm, *case, cards).step.total for case in _SENSITIVE]
    for name, said in _SAID.items():
        value = getattr(cards, name)
        cells = []
        for case, usual in zip(_SENSITIVE, base, strict=True):
            both = (
                estimated(algorithm, *case, _changed(cards, name, factor)).step.total / usual - 1.0
                for factor in (0.5, 2.0)
            )
            cells.append(" / ".join(f"{each:+.0%}" for each in both))
        lines.append(f"| {said} | {value:.3g} | {' | '.join(cells)} |")
    return lines


def _changed(cards: Cards, name: str, factor: float) -> Cards:
    value = getattr(cards, name)
    return dataclasses.replace(cards, **{name: type(value)(value * factor)})


def page() -> str:
    """All of it."""
    cards = Cards()
    lines = [
        "On paper: no card has run any of this. Float32 on the way, 12 bytes an element, both ways "
        "together, but for the step in bfloat16, which is `wire=torch.bfloat16`. *Each for itself* "
        "is a step of all matrices on every rank, with nothing exchanged; *GB in* is what the rank "
        "that receives most receives in a step.",
        "",
        *table("muon", cards),
        "",
        "The others with their defaults, a refresh by its share. A QR decomposition counts as many "
        "products of the same rate, which flatters SOAP and DeVA on a card.",
        "",
        *itertools.chain.from_iterable(
            [*table(name, cards, CASES[2:4] + CASES[5:6]), ""] for name in list(ALGORITHMS)[1:]
        ),
        "What is assumed, and by how much Muon's step changes where it is half / twice as large:",
        "",
        *sensitivity("muon", cards),
    ]
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--to", type=Path, help="the folder for distributed_costs.md")
    options = parser.parse_args(argv)
    if options.to is None:
        print(page(), end="")
    else:
        (options.to / "distributed_costs.md").write_text(page())
    return 0


if __name__ == "__main__":
    sys.exit(main())
