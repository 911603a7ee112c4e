"""Backends "cpu" and "cuda": the compiled operators, under the reference's signatures."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def operator(name: str) -> Callable[..., Any]:
    """`torch.ops.spectral_kernels.<name>`, with rows of coefficients flattened for its schema."""
    packet = getattr(torch.ops.spectral_kernels, name)
    if name == "newton_schulz":

        def newton_schulz(x: torch.Tensor, rows: Any, **options: Any) -> torch.Tensor:
            return packet(x, _flat(rows), **options)

        return newton_schulz
    if name in ("muon_step_", "deva_step_"):

        def step(*lists: Any, rows: Any, **options: Any) -> None:
            packet(*lists, rows=_flat(rows), **options)

        return step
    return packet


def _flat(rows: Any) -> list[float]:
    return [float(value) for row in rows for value in row]
