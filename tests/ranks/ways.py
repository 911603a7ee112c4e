"""What travels, and along which ways."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from spectral_kernels.optim._distributed import checksum, transport
from torch import Tensor

from ranks.layouts import LAYOUTS, full, local
from ranks.nets import Net, give, gradients, weights
from ranks.runs import FEW, OPTIMIZERS, STEPS, alone, different, made, options, stepped


def changed_by_others(layout: str, hops: str) -> tuple[dict[str, list[str]], list[int]]:
    """Weights that somebody else changes between steps, of which owners have kept copies.

    Returns:
        What differs from one process, and the bytes that this rank sends in every step of Muon.
    """
    found, sent = {}, []
    for name in FEW:
        net, optimizer = made(name, layout, keep_weights=True, hops=hops)
        one = Net(weights(torch.float32))
        reference = OPTIMIZERS[name](one.named_parameters())
        for step in range(6):
            if step == 3:
                # In a way that leaves sums and versions as they are.
                _swap_rows(net, one)
            for each in (net, one):
                give(each, gradients(step, torch.float32), ("conv",) if step == 2 else ())
            reference.step()
            with mock.patch.object(dist, "isend", _counting(moved := [])):
                optimizer.step()
            if name == "muon":
                sent.append(sum(moved))
            if step == 4:
                optimizer.load_state_dict(optimizer.state_dict())
        found[name] = different(net, dict(one.named_parameters()))
    return found, sent


def _swap_rows(net: Net, one: Net) -> None:
    """The rows that the last rank has of one matrix, in reversed order there and alone."""
    mine = local(net.tall)
    if dist.get_rank() == dist.get_world_size() - 1:
        mine.data.copy_(mine.flip(0))
    one.tall.data.copy_(full(net.tall))


def _counting(moved: list[int]) -> Any:
    real = dist.isend

    def message(part: Tensor, **more: Any) -> Any:
        moved.append(part.element_size() * part.numel())
        return real(part, **more)

    return message


def in_place(layout: str, how: dict[str, Any]) -> tuple[dict[str, list[str]], int, int]:
    """As if what is small here were large: every part travels by itself, in several messages.

    Returns:
        What differs from one process, how many messages there were, and how many of them were
        received where a whole tensor is.
    """
    messages = there = 0
    real = dist.irecv
    rooms: list[Tensor] = []

    def receive(part: Tensor, **more: Any) -> Any:
        nonlocal messages, there
        messages += 1
        there += any(part.untyped_storage().data_ptr() == x.data_ptr() for x in rooms)
        return real(part, **more)

    found = {}
    with (
        mock.patch.object(transport, "_SMALL", 8),
        mock.patch.object(transport, "_MESSAGE", 256),
        mock.patch.object(dist, "irecv", receive),
    ):
        for name in FEW:
            net, optimizer = made(name, layout, **how)
            rooms += [
                room
                for exchange in optimizer._spread.exchanges
                for turns in exchange.rooms.values()
                for room in turns
            ]
            stepped(net, optimizer, range(STEPS), torch.float32)
            found[name] = different(net, alone(name))
            rooms.clear()
    return found, messages, there


def in_many_buckets(layout: str, by_messages: bool) -> tuple[list[str], list[int]]:
    """More buckets than have places of their own, of which every rank owns a matrix.

    Returns:
        What differs from one process, and the sets of places.
    """
    shapes = {f"w{i}": (6 + i, 9) for i in range(5 * dist.get_world_size())}
    net, one = (Net(weights(torch.float32, shapes)) for _ in range(2))
    LAYOUTS[layout](net)
    kind = transport.Messages if by_messages else transport.Collectives
    with mock.patch.object(transport, "Messages", kind):
        optimizer = OPTIMIZERS["muon"](net.named_parameters(), **options(layout, bucket_bytes=1))
    reference = OPTIMIZERS["muon"](one.named_parameters())
    for step in range(3):
        for each, stepping in ((net, optimizer), (one, reference)):
            give(each, gradients(step, torch.float32, shapes))
            stepping.step()
    [exchange] = optimizer._spread.exchanges
    assert len(exchange.buckets) == 5
    return different(net, dict(one.named_parameters())), [
        len(rooms) for rooms in exchange.rooms.values()
    ]


def carried(sizes: list[list[int]], numbers: list[bool], small: int) -> list[list[Any]]:
    """Tensors of so many elements from every rank to every other, by each way of sending them.

    Returns:
        Of every way what has come, from every rank.
    """
    ranks, rank = dist.get_world_size(), dist.get_rank()

    def made(source: int, to: int) -> list[Tensor]:
        return [
            torch.arange(size, dtype=torch.float32) + 1000 * source + 100 * to + 7 * i
            for i, size in enumerate(sizes[source])
        ]

    found = []
    with mock.patch.object(transport, "_SMALL", small), mock.patch.object(transport, "_MESSAGE", 8):
        for kind in (transport.Messages, transport.Collectives):
            way = kind(dist.group.WORLD, torch.device("cpu"))
            for everyone in (False, True):
                places: list[list[Any]] = [
                    [
                        size if numbers[i % len(numbers)] else torch.full((size,), -1.0)
                        for i, size in enumerate(sizes[source])
                    ]
                    for source in range(ranks)
                ]
                if everyone:
                    flight = way.everyone(made(rank, 0), places, torch.float32)
                else:
                    send = [made(rank, to) for to in range(ranks)]
                    flight = way.exchange(send, places, torch.float32)
                come = flight.wait()
                expected = [made(source, 0 if everyone else rank) for source in range(ranks)]
                # What has a place is there, and nothing else comes for it.
                assert all(
                    (part is None) == isinstance(place, Tensor)
                    for parts, theirs in zip(come, places, strict=True)
                    for part, place in zip(parts, theirs, strict=True)
                )
                arrived = [
                    [place if part is None else part for part, place in zip(*each, strict=True)]
                    for each in zip(come, places, strict=True)
                ]
                same = [
                    torch.equal(x, y)
                    for mine, theirs in zip(arrived, expected, strict=True)
                    for x, y in zip(mine, theirs, strict=True)
                ]
                found.append(same)
    return found


def checksums_of_changes() -> list[str]:
    """Changes that a checksum does not see."""
    generator = torch.Generator().manual_seed(0)
    missed = []
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        for count in (1, 7, 1000, (1 << 15) + 3, 300_001):
            whole = torch.randn(count + 1, generator=generator, dtype=torch.float64).to(dtype)
            x = whole[1:]
            [before] = checksum.of([x])
            assert checksum.of([x.clone(), x]) == [before, before]
            places = torch.randint(count, (2,), generator=generator).tolist()
            changes = {
                "sign": x.index_fill(0, torch.tensor(places[:1]), -float(x[places[0]])),
                "order": x.flip(0),
                "turn": x.roll(1),
                "zeros": x * 0.0,
            }
            for name, other in changes.items():
                same = torch.equal(other, x)
                if (checksum.of([other])[0] == before) != same:
                    missed.append(f"{name} of {count} {dtype}")
    return missed
