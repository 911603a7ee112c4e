"""Inputs of the benchmarks: reproducible, never zeros, spectra stated."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from spectral_kernels import _extension
from torch import Tensor

PARAMETER_LISTS: dict[str, tuple[tuple[int, int], ...]] = {
    "small-list": ((256, 256),) * 4 + ((1024, 256), (256, 1024)),
    "gpt2-block": ((768, 768),) * 4 + ((3072, 768), (768, 3072)),
    "gpt2-small": (((768, 768),) * 4 + ((3072, 768), (768, 3072))) * 12,
    "lora": ((16, 4096), (4096, 16)) * 112,
    "llama-430m-layer": ((1024, 1024),) * 4 + ((1024, 4096),) * 2 + ((4096, 1024),),
}


# On cards: layers of transformers, batches of heads, low rank and convolutions; long ones last.
CARD_SHAPES = (
    *("768x768", "768x3072", "1024x4096", "2048x2048", "4096x4096", "2048x8192"),
    *("12x768x768", "24x768x3072", "8x2048x2048", "64x128x4096", "64x128x7168", "24x256x1536"),
    *("224x16x4096", "126x64x576", "3x257x1000", "4096x14336", "64x1024x2816", "50304x768"),
)

_CPU = torch.device("cpu")


def parameter_shapes(shape: str) -> tuple[tuple[int, int], ...]:
    """The matrices of a named list; "256x1024+64x64" is a list written out."""
    if shape in PARAMETER_LISTS:
        return PARAMETER_LISTS[shape]
    shapes = []
    for part in shape.split("+"):
        m, _, n = part.partition("x")
        if not (m.isdigit() and n.isdigit() and int(m) and int(n)):
            raise ValueError(
                f"shape must be {', '.join(PARAMETER_LISTS)}, or matrices like 256x1024+64x64, "
                f"not {shape!r}"
            )
        shapes.append((int(m), int(n)))
    return tuple(shapes)


def gaussian(
    shape: Sequence[int], dtype: torch.dtype, seed: int = 0, *, device: torch.device = _CPU
) -> Tensor:
    """Standard normal elements, the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(device, dtype)


def decaying(
    shape: Sequence[int],
    dtype: torch.dtype,
    low: float = 1e-4,
    seed: int = 0,
    *,
    device: torch.device = _CPU,
) -> Tensor:
    """Random singular vectors, singular values from 1 down to `low`, evenly spaced in logarithm."""
    *batch, m, n = shape
    s = torch.logspace(0.0, math.log10(low), min(m, n), dtype=torch.float64, device=device)
    x = torch.stack(
        [
            (orthonormal(m, min(m, n), seed + 2 * i, device) * s)
            @ orthonormal(n, min(m, n), seed + 2 * i + 1, device).mT
            for i in range(math.prod(batch))
        ]
    )
    return x.reshape(*shape).to(dtype)


def factor(
    shape: Sequence[int],
    dtype: torch.dtype,
    low: float,
    *,
    rank: int | None = None,
    seed: int = 0,
    device: torch.device = _CPU,
) -> Tensor:
    """Symmetric matrices with eigenvalues from 1 down to `low`, 0 beyond `rank`."""
    *batch, n, _ = shape
    values = spectrum(n, low, rank, device)
    a = torch.stack(
        [
            with_spectrum(orthonormal(n, n, seed + i, device), values)
            for i in range(math.prod(batch))
        ]
    )
    return a.reshape(*shape).to(dtype)


def drifted_factor(
    n: int, low: float, *, rank: int | None = None, seed: int = 0, device: torch.device = _CPU
) -> tuple[Tensor, Tensor]:
    """A float64 eigenbasis and the factor some updates later, its covariance slightly turned.

    The columns are in descending order of diag(Q^T A Q), so that a refresh that sorts and one that
    does not have the same answer.
    """
    values = spectrum(n, low, rank, device)
    q = orthonormal(n, n, seed, device)
    noise = gaussian((n, n), torch.float64, seed + 1, device=device)
    turned, triangle = torch.linalg.qr(q + 0.02 / math.sqrt(n) * noise)
    turned = turned * triangle.diagonal().sign()
    a = 0.6 * with_spectrum(q, values) + 0.4 * with_spectrum(turned, values)
    return q[:, (q * (a @ q)).sum(0).argsort(descending=True, stable=True)], a


def spectrum(n: int, low: float, rank: int | None = None, device: torch.device = _CPU) -> Tensor:
    """Eigenvalues from 1 down to `low`, evenly spaced in logarithm, 0 beyond `rank`."""
    values = torch.logspace(0.0, math.log10(low), n, dtype=torch.float64, device=device)
    if rank is not None:
        values[rank:] = 0.0
    return values


def with_spectrum(q: Tensor, values: Tensor) -> Tensor:
    """Q diag(values) Q^T, exactly symmetric."""
    a = (q * values) @ q.mT
    return (a + a.mT) / 2


@functools.lru_cache(maxsize=8)
def orthonormal(n: int, columns: int, seed: int, device: torch.device = _CPU) -> Tensor:
    return torch.linalg.qr(gaussian((n, columns), torch.float64, seed + 1000, device=device))[0]


# Instruction sets with 16-bit products.
_BF16_ISAS = ("avx512bf16", "amx")


def rate_of(dtype: torch.dtype, device: torch.device = _CPU) -> str:
    """The rate that products of a storage dtype run at: 16-bit only where it has instructions."""
    if dtype == torch.float64:
        return "fp64"
    if device.type == "cuda":
        return {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype, "fp32")
    module = _extension.MODULE
    if dtype == torch.bfloat16 and module is not None and module.current_isa() in _BF16_ISAS:
        return "bf16"
    return "fp32"
