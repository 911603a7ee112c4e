"""Backends "cpu" and "cuda": the compiled operators, under the reference's signatures."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch


def operator(name: str, library: str = "spectral_kernels") -> Callable[..., Any]:
    """`torch.ops.<library>.<name>`, with nested sequences flattened for its schema."""
    packet = getattr(getattr(torch.ops, library), name)
    if name == "newton_schulz":

        def newton_schulz(x: torch.Tensor, rows: Any, **options: Any) -> torch.Tensor:
            return packet(x, _flat(rows), **options)

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
