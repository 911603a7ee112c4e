"""Calls that make every Triton kernel appear in every variant that the library launches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
from spectral_kernels import triton_kernels
from spectral_kernels._options import DevaOptions, ShampooOptions, SoapOptions, chosen
from spectral_kernels.coefficients import resolve
from torch import Tensor

# fp16 compiles to the kernels of bf16 with another type.
_DTYPES = (torch.float32, torch.bfloat16)
_MUON = resolve("muon").rows

# One matrix of every size class: three padded short sides, the small tile, the large one.
_SHORT_SIDES = (12, 30, 60, 200, 700)


def _zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype, device="cpu")


def calls() -> Iterator[Callable[[], object]]:
    """Operators on small zeros: only shapes, dtypes and options matter."""
    operator = triton_kernels.operator
    for dtype in _DTYPES:
        for short in _SHORT_SIDES:
            for shape in ((short, 2 * short), (2 * short, short)):
                yield partial(operator("gram"), _zeros(*shape, dtype=dtype))
                for method, norm in (("standard", "frobenius"), ("gram", "schatten8")):
                    if shape[0] > shape[1] and norm == "schatten8":
                        continue
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
                if short == _SHORT_SIDES[-1]:
                    yield partial(_muon, shape, dtype, neurons=True)
                    yield partial(_muon, shape, dtype, neurons=True, sphere=True)
                    yield partial(_muon, shape, dtype, sphere=True)
    for dtype in _DTYPES:
        for short in _SHORT_SIDES[3:]:
            yield partial(_factors, (short, 2 * short), dtype)
    for n in _SHORT_SIDES[3:]:
        yield partial(_squares, n)
    for shape in ((208, 416), (416, 208), (30, 45)):
        for dtype, moments in ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16)):
            yield partial(_soap, shape, dtype, moments)
            for graft in ("adam", "sgd", "none"):
                yield partial(_shampoo, shape, dtype, moments, graft)
        yield partial(_deva, shape, torch.float32, "momentum", "relative")
        yield partial(_deva, shape, torch.bfloat16, "instant", "outside")
        yield partial(_deva, shape, torch.float32, "gradient", "inside")
        yield partial(_deva, shape, torch.float32, "none", "relative")
    yield partial(_deva, (700, 1400), torch.bfloat16, "momentum", "relative")
    yield partial(_adapted, (60, 120))
    yield partial(_rounded, (60, 120))


def large() -> None:
    """Both forms on a matrix of which both sides are whole tiles."""
    for method in ("standard", "gram"):
        triton_kernels.operator("newton_schulz")(
            _zeros(768, 1536, dtype=torch.bfloat16),
            _MUON,
            method=method,
            restarts=(3,),
            compute_dtype=torch.bfloat16,
            eps=0.0,
            norm="schatten8",
            norm_factor=1.0,
        )


def _muon(
    shape: tuple[int, int], dtype: torch.dtype, *, neurons: bool = False, sphere: bool = False
) -> None:
    """A step; those on spheres have their momentum in bfloat16."""
    param, grad = _zeros(*shape, dtype=dtype), _zeros(*shape, dtype=dtype)
    triton_kernels.operator("muon_step_")(
        [param],
        [grad],
        [_zeros(*shape, dtype=torch.bfloat16 if sphere else torch.float32)],
        [_zeros(shape[0], 1) if neurons else _zeros(0)],
        [torch.zeros((), dtype=torch.float32, device="cpu")],
        torch.zeros((), dtype=torch.int64, device="cpu"),
        torch.zeros((), dtype=torch.float64, device="cpu"),
        momentum=0.95,
        nesterov=True,
        beta2=0.95 if neurons else None,
        neuron_eps=1e-8,
        weight_decay=0.0 if sphere else 0.1,
        cautious=neurons,
        hyperball=sphere,
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


def _factors(shape: tuple[int, int], dtype: torch.dtype) -> None:
    m, n = shape
    nothing = torch.zeros(0, dtype=torch.float32, device="cpu")
    triton_kernels.operator("kron_factors_update_")(
        _zeros(m, m),
        _zeros(n, n),
        _zeros(*shape, dtype=dtype),
        torch.zeros((), dtype=torch.int64, device="cpu"),
        beta=0.9,
        weight=0.1,
        left_root=nothing,
        right_root=nothing,
    )
    triton_kernels.operator("kron_precondition")(
        _zeros(*shape, dtype=dtype), _zeros(m, m, dtype=dtype), _zeros(n, n, dtype=dtype)
    )


def _squares(n: int) -> None:
    """What inverse roots and basis refreshes launch, without what they read back."""
    from spectral_kernels.triton_kernels._batch import gram, product
    from spectral_kernels.triton_kernels.inverse_root import roots_of

    a = torch.eye(n, dtype=torch.float32, device="cpu")[None]
    roots_of(a, 4, ridge=0.0, relative_ridge=1e-6)
    product(a, a)
    gram(a)


def _rounded(shape: tuple[int, int]) -> None:
    """Moments of the steps with factors, in bfloat16."""
    from spectral_kernels.triton_kernels._rounding import rounded_at_random

    rounded_at_random(_zeros(1, *shape), torch.ones(1, dtype=torch.float64, device="cpu"))


def _eye(n: int) -> Tensor:
    return torch.eye(n, dtype=torch.float32, device="cpu")


def _given(shape: tuple[int, int], dtype: torch.dtype, moments: torch.dtype) -> list[list[Tensor]]:
    """Parameter, gradient, first and second moments."""
    return [[_zeros(*shape, dtype=own)] for own in (dtype, dtype, moments, moments)]


def _counts() -> tuple[list[Tensor], Tensor, Tensor]:
    """Steps, skips, and the learning rate."""
    return (
        [torch.zeros((), dtype=torch.float32, device="cpu")],
        torch.zeros((), dtype=torch.int64, device="cpu"),
        torch.zeros((), dtype=torch.float64, device="cpu"),
    )


def _soap(shape: tuple[int, int], dtype: torch.dtype, moments: torch.dtype) -> None:
    """A step between refreshes."""
    triton_kernels.operator("soap_step_")(
        *_given(shape, dtype, moments),
        *([_eye(n)] for n in (*shape, *shape)),
        *_counts(),
        **chosen(SoapOptions, {}, refresh=[0]),
    )


def _shampoo(shape: tuple[int, int], dtype: torch.dtype, moments: torch.dtype, graft: str) -> None:
    """A step between refreshes."""
    *matrices, squares = _given(shape, dtype, moments)
    triton_kernels.operator("shampoo_step_")(
        *matrices,
        *([_eye(n)] for n in (*shape, *shape)),
        squares if graft == "adam" else [_zeros(0)],
        [torch.zeros(2, dtype=torch.int64, device="cpu")],
        *_counts(),
        **chosen(ShampooOptions, {"graft": graft}, refresh=[0]),
    )


def _deva(shape: tuple[int, int], dtype: torch.dtype, variance: str, eps_mode: str) -> None:
    """A step between refreshes."""
    triton_kernels.operator("deva_step_")(
        *_given(shape, dtype, dtype),
        *([_eye(n)] for n in (*shape, *shape)),
        *_counts(),
        **chosen(
            DevaOptions,
            {"variance": variance, "eps_mode": eps_mode},
            rows=_MUON,
            scales=[1.0],
            refresh=[0],
        ),
    )


def _adapted(shape: tuple[int, int]) -> None:
    """What a step launches where no kernel takes all of an option."""
    for eps_mode in ("relative", "outside"):
        triton_kernels.operator("deva_step_")(
            *_given(shape, torch.float32, torch.float32),
            *([_zeros(0)] for _ in range(4)),
            *_counts(),
            **chosen(
                DevaOptions,
                {"eps_mode": eps_mode, "normalize_grads": True},
                rows=_MUON,
                scales=[1.0],
                refresh=[0],
            ),
        )
