"""Calls that make every Triton kernel appear in every variant that the library launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from spectral_kernels import triton_kernels
from spectral_kernels.coefficients import resolve
from torch import Tensor

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MUON = resolve("muon").rows

# One matrix of every size class: three padded short sides, the small tile, the large one.
_SHORT_SIDES = (12, 30, 60, 200, 700)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


def calls() -> Iterator[Callable[[], object]]:
    """Operators on small zeros: only shapes, dtypes and options matter."""
    operator = triton_kernels.operator
    for dtype in _DTYPES:
        for short in _SHORT_SIDES:
            for shape in ((short, 2 * short), (2 * short, short)):
                yield partial(operator("gram"), _zeros(*shape, dtype=dtype))
                for method in ("standard", "gram"):
                    for norm in ("frobenius", "schatten8"):
                        yield partial(
                            operator("newton_schulz"),
                            _zeros(*shape, dtype=dtype),
                            _MUON,
                            method=method,
                            restarts=(3,),
                            compute_dtype=dtype,
                            eps=0.0,
                            norm=norm,
                            norm_factor=1.0,
                        )
                yield partial(_muon, shape, dtype)


def _muon(shape: tuple[int, int], dtype: torch.dtype) -> None:
    param, grad = _zeros(*shape, dtype=dtype), _zeros(*shape, dtype=dtype)
    triton_kernels.operator("muon_step_")(
        [param],
        [grad],
        [_zeros(*shape)],
        [torch.zeros(())],
        torch.zeros((), dtype=torch.int64),
        torch.zeros((), dtype=torch.float64),
        momentum=0.95,
        nesterov=True,
        weight_decay=0.1,
        rows=_MUON,
        scales=[1.0],
        method="auto",
        restarts=[(3,)],
        compute_dtype=torch.bfloat16 if dtype == torch.float32 else dtype,
        eps=0.0,
        norm="frobenius",
        norm_factor=1.0,
        maximize=False,
        nonfinite="skip",
    )
