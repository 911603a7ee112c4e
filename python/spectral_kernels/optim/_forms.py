"""How a parameter is read as a batch of matrices, and what state it carries."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .._checks import state_dtype

MatrixDims: TypeAlias = tuple[int | tuple[int, ...], int | tuple[int, ...]]


@dataclass(frozen=True)
class Form:
    """A parameter as (..., m, n): its dimensions reordered to batch, rows, columns and merged.

    Attributes:
        order: the reordered dimensions.
        shape: (..., m, n).
    """

    order: tuple[int, ...]
    shape: tuple[int, ...]

    @cached_property
    def ordered(self) -> bool:
        """Whether no dimension moves."""
        return self.order == tuple(range(len(self.order)))

    @cached_property
    def trivial(self) -> bool:
        """Whether the parameter is its matrices."""
        return self.ordered and len(self.shape) == len(self.order)

    def view(self, x: Tensor) -> Tensor | None:
        """The matrices of x without a copy, or None where its strides forbid it."""
        if self.trivial:
            return x
        try:
            return (x if self.ordered else x.permute(self.order)).view(self.shape)
        except RuntimeError:
            return None

    def matrices(self, x: Tensor) -> Tensor:
        """The matrices of x, a view where possible."""
        view = self.view(x)
        return x.permute(self.order).reshape(self.shape) if view is None else view

    def write(self, x: Tensor, matrices: Tensor) -> None:
        """Copies matrices into x."""
        permuted = x.permute(self.order)
        permuted.copy_(matrices.view(permuted.shape))


def form_of(shape: Sequence[int], *, batched: bool, matrix_dims: MatrixDims | None) -> Form:
    """The form of a parameter: 2-D as it is, 4-D and 5-D as (out, rest), others as declared.

    Raises:
        ValueError: fewer than two dimensions, dimensions that `matrix_dims` does not fit, or three
            or more than five that nobody declared.
    """
    count = len(shape)
    if matrix_dims is not None:
        rows, cols = (_dims(dims, count, matrix_dims) for dims in matrix_dims)
        if set(rows) & set(cols) or len({*rows, *cols}) != len(rows) + len(cols):
            raise ValueError(f"matrix_dims names a dimension twice: {matrix_dims!r}")
    elif count < 2:
        raise ValueError("the matrix rule needs at least two dimensions")
    elif count == 2 or batched:
        rows, cols = (count - 2,), (count - 1,)
    elif count in (4, 5):
        rows, cols = (0,), tuple(range(1, count))
    else:
        raise ValueError(
            f"a parameter with {count} dimensions is ambiguous: declare batched=True in its group "
            "for a batch of matrices, matrix_dims=(rows, columns), or algorithm='adamw'"
        )
    batch = tuple(dim for dim in range(count) if dim not in rows and dim not in cols)
    return Form(
        order=(*batch, *rows, *cols),
        shape=(
            *(shape[dim] for dim in batch),
            math.prod(shape[dim] for dim in rows),
            math.prod(shape[dim] for dim in cols),
        ),
    )


def _dims(dims: int | tuple[int, ...], count: int, matrix_dims: MatrixDims) -> tuple[int, ...]:
    given = (dims,) if isinstance(dims, int) else tuple(dims)
    if not given or not all(-count <= dim < count for dim in given):
        raise ValueError(
            f"matrix_dims must name dimensions of a parameter with {count}, not {matrix_dims!r}"
        )
    return tuple(dim % count for dim in given)


@dataclass(frozen=True)
class Slot:
    """One state tensor of a parameter.

    Attributes:
        shape: its shape, None for the parameter's own.
        dtype: None for float32, or float64 under a float64 parameter.
        narrow: in the place of float32, where dtype is None.
        identity: starts as identity matrices instead of zeros.
        optional: may be absent, a size-0 tensor, in saved state.
        present: is not absent in new state.
        host: lives on the CPU wherever the parameter is.
    """

    shape: tuple[int, ...] | None
    dtype: torch.dtype | None = None
    narrow: torch.dtype | None = None
    identity: bool = False
    optional: bool = False
    present: bool = True
    host: bool = False

    def create(self, param: Tensor, form: Form | None) -> Tensor:
        """The tensor before the first step; one of the parameter's shape has its strides."""
        dtype = self.dtype_beside(param)
        device = torch.device("cpu") if self.host else param.device
        if self.shape is None:
            like = torch.zeros_like(param, dtype=dtype, memory_format=torch.preserve_format)
            if form is None or form.view(like) is not None:
                return like
            # The parameter's strides have no view as matrices, so its state takes plain ones.
            return torch.zeros(param.shape, dtype=dtype, device=device)
        out = torch.zeros(self.shape if self.present else 0, dtype=dtype, device=device)
        if self.identity and out.numel():
            out.diagonal(dim1=-2, dim2=-1).fill_(1.0)
        return out

    def load(self, name: str, value: object, param: Tensor, form: Form | None) -> Tensor:
        """A copy of a saved value in this slot's dtype, device and strides."""
        if isinstance(value, (int, float)):
            value = torch.tensor(float(value), dtype=torch.float64, device="cpu")
        self.check(name, value, param)
        assert isinstance(value, Tensor)
        present = not self.optional or tuple(value.shape) == self._shape(param)
        return replace(self, present=present).create(param, form).copy_(value)

    def check(self, name: str, value: object, param: Tensor) -> None:
        """A tensor of this slot's shape."""
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, not {type(value).__name__}")
        shape = self._shape(param)
        if tuple(value.shape) != shape and not (self.optional and value.numel() == 0):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {shape}")

    def bytes(self, param: Tensor) -> int:
        """Its size in memory."""
        dtype = self.dtype_beside(param)
        return math.prod(self._shape(param)) * dtype.itemsize if self.present else 0

    def dtype_beside(self, param: Tensor) -> torch.dtype:
        """Its dtype, for a parameter."""
        if self.dtype is not None:
            return self.dtype
        full = state_dtype(param.dtype)
        return full if self.narrow is None or full == torch.float64 else self.narrow

    def _shape(self, param: Tensor) -> tuple[int, ...]:
        return tuple(param.shape) if self.shape is None else self.shape


Layout: TypeAlias = Mapping[str, Slot | list[Slot]]


def side(batch: Sequence[int], size: int, *, present: bool = True, identity: bool = False) -> Slot:
    """A factor, root or basis over one side of a batch of matrices."""
    return Slot((*batch, size, size), identity=identity, optional=True, present=present)


def step_slot(form: Form, blocks: int = 1) -> Slot:
    """Step counts: one a matrix of a batch, and one a block where there are several."""
    batch = form.shape[:-2]
    return Slot(batch if blocks == 1 else (blocks, *batch), torch.float32)


def adamw_layout(param: Tensor, *, amsgrad: bool, on_device: bool) -> Layout:
    """The state of torch.optim.AdamW; of its capturable kind `on_device`, if that is a GPU."""
    step = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    counter = Slot((), step, host=True)
    if on_device and param.is_cuda:
        counter = Slot((), torch.float32)
    moment = Slot(None, param.dtype)
    layout = {"step": counter, "exp_avg": moment, "exp_avg_sq": moment}
    return {**layout, "max_exp_avg_sq": moment} if amsgrad else layout


def layouts(tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    """For every tensor where its elements lie, and how they are read."""
    return [(x.data_ptr(), x.shape, x.stride(), x.dtype, x.device) for x in tensors]
