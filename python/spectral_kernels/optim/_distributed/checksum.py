"""Checksums of tensors, by which a change that nobody has told of is seen."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

# 64-bit words that are multiplied by as many random numbers.
_WORDS = 1 << 15
# Rows of them at a time where products need memory.
_ROWS = 64


def of(tensors: Sequence[Tensor]) -> list[int]:
    """A number for every tensor, of its bits at their places.

    With words w_i of 64 bits, random odd numbers r_i and a random polynomial over rows of them, it
    is a sum modulo 2^64: another tensor of the shape has the same one by chance alone, one in some
    2^60, whether numbers differ or have changed places.
    """
    by_device: dict[torch.device, list[int]] = {}
    for i, x in enumerate(tensors):
        by_device.setdefault(x.device, []).append(i)
    found = [0] * len(tensors)
    for places in by_device.values():
        sums = torch.stack([_of(tensors[i].detach()) for i in places])
        for i, each in zip(places, sums.tolist(), strict=True):
            found[i] = each
    return found


def _of(x: Tensor) -> Tensor:
    words = _words(x)
    numbers = _numbers(x.device)
    full = len(words) // _WORDS * _WORDS
    rows, rest = words[:full].view(-1, _WORDS), words[full:]
    sums = [_products(part, numbers) for part in rows.split(_ROWS)]
    sums.append((rest * numbers[: len(rest)]).sum(dim=0, keepdim=True))
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for each in torch.cat(sums).split(_WORDS):
        total = total * _FACTOR + (each * numbers[: len(each)]).sum()
    return total


_FACTOR = 0x5851F42D4C957F2D


def _products(rows: Tensor, numbers: Tensor) -> Tensor:
    """For every row of words the sum of their products with the numbers."""
    if rows.device.type == "cpu":
        return torch.mv(rows, numbers)
    return (rows * numbers).sum(dim=1)


def _words(x: Tensor) -> Tensor:
    """The bits of a tensor as integers of 64 bits; zeros fill the last one."""
    flat = x.contiguous().view(-1)
    per_word = 8 // x.element_size()
    if len(flat) % per_word or flat.storage_offset() % per_word:
        padded = flat.new_zeros(-(-len(flat) // per_word) * per_word)
        padded[: len(flat)] = flat
        flat = padded
    return flat.view(torch.int64)


@functools.cache
def _numbers(device: torch.device) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(0)
    numbers = torch.randint(
        -(2**63), 2**63 - 1, (_WORDS,), generator=generator, device="cpu", dtype=torch.int64
    )
    return (numbers | 1).to(device)
