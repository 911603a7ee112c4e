"""Tensors in every layout, with margins that must stay, and the comparison of bits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

LAYOUTS = ("contiguous", "transposed", "sliced", "offset", "last", "batch_last")


class Placed:
    """A copy of `x` in a given layout, in a buffer whose other elements are NaN and must stay."""

    margin = 64

    def __init__(self, x: Tensor, layout: str) -> None:
        strides = self._strides(x.shape, layout)
        start = self.margin + (layout == "offset")
        span = sum((n - 1) * stride for n, stride in zip(x.shape, strides, strict=True)) + 1
        size = start + max(span, 0) + self.margin
        self.buffer = torch.full((size,), math.nan, dtype=x.dtype)
        self.tensor = self.buffer.as_strided(x.shape, strides, start)
        self.tensor.copy_(x)
        self._inside = torch.zeros(size, dtype=torch.bool)
        self._inside.as_strided(x.shape, strides, start).fill_(True)
        self._before = bits(self.buffer)

    @staticmethod
    def _strides(shape: Sequence[int], layout: str) -> tuple[int, ...]:
        order = list(range(len(shape)))
        if layout == "transposed":
            order[-2:] = order[:-3:-1]
        elif layout == "batch_last":
            order = order[-2:] + order[:-2]
        gap = 2 if layout in ("sliced", "last") else 1
        strides, stride = [0] * len(shape), gap
        for axis in reversed(order):
            strides[axis] = stride
            stride *= max(shape[axis], 1) * (gap if layout == "sliced" else 1)
        return tuple(strides)

    def assert_untouched_around(self) -> None:
        changed = (bits(self.buffer) != self._before) & ~self._inside
        assert not changed.any(), (
            f"wrote outside the tensor at {changed.nonzero().flatten().tolist()}"
        )


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def bits(x: Tensor) -> Tensor:
    """The bit patterns, in which NaN equals NaN and 0 differs from -0."""
    return x.clone().view(_BITS[x.element_size()]) if x.is_floating_point() else x.clone()


def same_bits(a: Any, b: Any) -> bool:
    """Whether two nests of tensors agree in every bit, shape and dtype."""
    pairs = zip(tree_leaves(a), tree_leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and x.shape == y.shape and torch.equal(bits(x), bits(y))
        for x, y in pairs
        if isinstance(x, Tensor)
    )


class Wrapped(Tensor):
    """A wrapper subclass, which has no storage of its own, and lets nothing be done with it."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    def __tensor_flatten__(self):
        return ["inner"], None

    @classmethod
    def __tensor_unflatten__(cls, inner, context, size, stride):
        return cls(inner["inner"])

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise AssertionError(f"{function} was called on a wrapper")
