"""What travels, and along which ways."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from spectral_kernels.optim._distributed import checksum
from torch import Tensor

from ranks.layouts import full, local
from ranks.nets import Net, give, gradients, weights
from ranks.runs import OPTIMIZERS, STEPS, different, made


def changed_by_others(layout: str, hops: str) -> tuple[dict[str, list[str]], list[int]]:
    """Weights that somebody else changes between steps, of which owners have kept copies.

    Returns:
        What differs from one process, and the bytes that this rank sends in every step of Muon.
    """
    found, sent = {}, []
    for name in OPTIMIZERS:
        net, optimizer = made(name, layout, keep_weights=True, hops=hops)
        one = Net(weights(torch.float32))
        reference = OPTIMIZERS[name](one.named_parameters())
        for step in range(STEPS):
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
