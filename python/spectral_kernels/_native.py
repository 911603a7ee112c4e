"""Backends "cpu" and "cuda": the compiled operators, under the reference's signatures."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


def operator(name: str, library: str = "spectral_kernels") -> Callable[..., Any]:
    """`torch.ops.<library>.<name>`, with nested sequences flattened for its schema."""
    packet = _past_autograd(getattr(getattr(torch.ops, library), name))
    if name in ("soap_step_", "deva_step_"):
        packet = _telling_what_started(packet, on_cpu=library != "spectral_kernels")
    if name == "newton_schulz":

        def newton_schulz(x: Tensor, rows: Any, **options: Any) -> Tensor:
            result: Tensor = packet(x, _flat(rows), **options)
            return result

        return newton_schulz
    if name == "muon_step_":

        def muon_step_(*lists: Any, rows: Any, restarts: Any, **options: Any) -> None:
            packet(
                *lists,
                rows=_flat(rows),
                restarts=[step for steps in restarts for step in steps],
                restart_ends=list(itertools.accumulate(len(steps) for steps in restarts)),
                **options,
            )

        return muon_step_
    if name == "deva_step_":

        def deva_step_(*lists: Any, rows: Any, **options: Any) -> None:
            packet(*lists, rows=_flat(rows), **options)

        return deva_step_
    return packet


def _flat(rows: Any) -> list[float]:
    return [float(value) for row in rows for value in row]


def any_requires_grad(values: Iterable[Any]) -> bool:
    """Whether a tensor among them, or in a list of them, requires grad."""
    return any(
        isinstance(x, Tensor) and x.requires_grad
        for value in values
        for x in (value if isinstance(value, list | tuple) else (value,))
    )


def _past_autograd(packet: Callable[..., Any]) -> Callable[..., Any]:
    """Straight to the kernel, unless something requires grad, which _fake.py refuses in Python."""

    def call(*args: Any, **options: Any) -> Any:
        if torch.compiler.is_compiling() or (torch.is_grad_enabled() and any_requires_grad(args)):
            return packet(*args, **options)
        with torch._C._AutoDispatchBelowAutograd():
            return packet(*args, **options)

    return call


# Bases that were seen not to be zeros, which would mark a matrix without a step. Looking waits for
# the device, so it is done once a tensor.
_started = WeakIdKeyDictionary()


def _telling_what_started(packet: Callable[..., Any], *, on_cpu: bool) -> Callable[..., Any]:
    """The second bit of an entry's `refresh` says that its bases are known not to be zeros."""

    def call(*lists: Any, refresh: Sequence[Any], **options: Any) -> None:
        params, of_entries = lists[0], (*lists[6:8], refresh)
        fits = len(params) > 0 and all(len(each) == len(params) for each in of_entries)
        served = on_cpu or (fits and not params[0].is_cpu)
        if not fits or not served or torch.compiler.is_compiling():
            packet(*lists, refresh=refresh, **options)
            return
        bases = list(zip(*lists[6:8], strict=True))
        known = [all(not x.numel() or x in _started for x in both) for both in bases]
        flags = [int(bool(flag)) | 2 * each for flag, each in zip(refresh, known, strict=True)]
        packet(*lists, refresh=flags, **options)
        unknown = [x for both, each in zip(bases, known, strict=True) if not each for x in both]
        unknown = [x for x in unknown if x.numel()]
        if not unknown:
            return
        started = torch.stack([x.flatten(-2).any(-1).all() for x in unknown]).tolist()
        _started.update((x, True) for x, each in zip(unknown, started, strict=True) if each)

    return call
