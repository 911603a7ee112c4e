"""Passes over the caller's matrices: scale, norm and finiteness; momentum; into workspaces."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import PASS_WARPS
from ._device import (
    ALIGNED_COLUMN_MAJOR,
    ALIGNED_ROW_MAJOR,
    DOUBTFUL,
    DTYPES,
    NONFINITE,
    NORMAL,
    STRIDED,
    ZERO,
    corner,
    element,
    exponent_of,
    launch,
    narrowed,
    placed,
    provided,
    rounded_at_random,
    scaled,
    span_of,
    tile_of,
    widened,
    within,
)
from ._layout import (
    ALIGNED_NUMBERS,
    CHUNK_COLS,
    CHUNK_ROWS,
    COLS,
    COLUMNS,
    ROWS,
    SHORT,
    TALL,
    WIDE,
    Layout,
    padded,
)
from ._places import Places
from ._reach import Reach, reach_of

_SUMMARY = 256


@dataclass(frozen=True)
class Mix:
    """What is iterated on: X alone, or a mix of gradient and momentum.

    Attributes:
        grads: X, or the gradients.
        momenta: the buffers, or None.
        momentum: how much of a buffer is kept.
        nesterov: mix the gradient in once more.
        negate: the gradients are taken with the other sign.
        beside: matrices that have to be finite too, or None.
    """

    grads: Places
    momenta: Places | None = None
    momentum: float = 0.0
    nesterov: bool = False
    negate: bool = False
    beside: Places | None = None

    def arguments(self) -> tuple[object, ...]:
        """As the kernels take it."""
        momenta = self.grads if self.momenta is None else self.momenta
        sign = -1.0 if self.negate else 1.0
        return (self.grads.table, momenta.table, self.momentum, (1.0 - self.momentum), sign)

    def constants(self) -> dict[str, object]:
        """Compile-time arguments."""
        return {
            "GRAD": DTYPES[self.grads.dtype],
            "GRAD_UNIT": self.grads.unit,
            "MIXED": self.momenta is not None,
            "MOMENTUM": tl.float32 if self.momenta is None else DTYPES[self.momenta.dtype],
            "MOMENTUM_UNIT": STRIDED.value if self.momenta is None else self.momenta.unit,
            "NESTEROV": self.nesterov,
            "CHUNK_ROWS": CHUNK_ROWS,
            "CHUNK_COLS": CHUNK_COLS,
            "num_warps": PASS_WARPS,
        }


class Parts(NamedTuple):
    """What a chunk each was found to have.

    Attributes:
        largest: fp32, the largest magnitude.
        squares: fp64, the sum of squares.
        bad: int32, 1 where something is not finite.
        tops: fp32, the largest magnitude of what stands beside.
    """

    largest: Tensor
    squares: Tensor
    bad: Tensor
    tops: Tensor


class Summary(NamedTuple):
    """One number a matrix, on the device.

    Attributes:
        state: int32, zero, normal or non-finite.
        exponent: int32, of the largest magnitude.
        factor: fp32, what X 2^-exponent is multiplied by to have the norm 1.
        floor: fp32, the norm's floor over the Frobenius norm.
        largest: fp32, the largest magnitude.
    """

    state: Tensor
    exponent: Tensor
    factor: Tensor
    floor: Tensor
    largest: Tensor


@triton.jit
def chunk_of(
    chunks, layout, UNIT: tl.constexpr, CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr
):
    """Matrix, first row and column of this program, and which of its elements exist."""
    matrix, row, col = tile_of(chunks)
    row = row.to(tl.int64) * CHUNK_ROWS
    col = col.to(tl.int64) * CHUNK_COLS
    height = element(layout, matrix, ROWS, COLUMNS)
    width = element(layout, matrix, COLS, COLUMNS)
    rows = within(row, tl.arange(0, CHUNK_ROWS), height, UNIT == ALIGNED_COLUMN_MAJOR)
    cols = within(col, tl.arange(0, CHUNK_COLS), width, UNIT == ALIGNED_ROW_MAJOR)
    return matrix, row, col, rows[:, None] & cols[None, :]


@triton.jit
def put_wide(x, out, layout, matrix, row, col, CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr):
    """Writes a chunk to a wide workspace."""
    start, ld = corner(layout, matrix, WIDE)
    base = out + start
    # Padding is written too; what lies beyond it belongs to a neighbour.
    _, short = corner(layout, matrix, SHORT)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    value = narrowed(x, out.dtype.element_ty)
    if element(layout, matrix, TALL, COLUMNS) != 0:
        padded = within(row, rows, ld, True)[:, None] & within(col, cols, short)[None, :]
        offsets = rows[:, None] + cols[None, :] * ld
        tl.store(base + (col * ld + row) + offsets, value, padded)
    else:
        padded = within(row, rows, short)[:, None] & within(col, cols, ld, True)[None, :]
        offsets = rows[:, None] * ld + cols[None, :]
        tl.store(base + (row * ld + col) + offsets, value, padded)


@triton.jit
def of_wide(x, layout, matrix, row, col, CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr):
    """A chunk of a wide workspace, as the caller has it; 0 beyond its padding."""
    start, ld = corner(layout, matrix, WIDE)
    base = x + start
    _, short = corner(layout, matrix, SHORT)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    if element(layout, matrix, TALL, COLUMNS) != 0:
        padded = within(row, rows, ld, True)[:, None] & within(col, cols, short)[None, :]
        offsets = rows[:, None] + cols[None, :] * ld
        value = tl.load(base + (col * ld + row) + offsets, mask=padded, other=0.0)
    else:
        padded = within(row, rows, short)[:, None] & within(col, cols, ld, True)[None, :]
        offsets = rows[:, None] * ld + cols[None, :]
        value = tl.load(base + (row * ld + col) + offsets, mask=padded, other=0.0)
    return value


@triton.jit
def _mixed(grads, momenta, matrix, row, col, inside, momentum, fresh, sign,
           GRAD: tl.constexpr, GRAD_UNIT: tl.constexpr, MIXED: tl.constexpr, MOMENTUM: tl.constexpr,
           MOMENTUM_UNIT: tl.constexpr, NESTEROV: tl.constexpr,
           CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr):  # fmt: skip
    """The direction, the new momentum and where it goes, and whether all of it was finite."""
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    at = placed(grads, matrix, 0, row, col, rows, cols, GRAD, GRAD_UNIT)
    grad = widened(tl.load(at, mask=inside, other=0.0)) * sign
    finite = tl.abs(grad) < float("inf")
    direction = grad
    new = grad
    if MIXED:
        at = placed(momenta, matrix, 0, row, col, rows, cols, MOMENTUM, MOMENTUM_UNIT)
        old = widened(tl.load(at, mask=inside, other=0.0))
        finite = finite & (tl.abs(old) < float("inf"))
        new = momentum * old + fresh * grad
        direction = fresh * grad + momentum * new if NESTEROV else new
    return direction, new, at, finite


@triton.jit
def _measure_kernel(
    grads, momenta, momentum, fresh, sign, layout, chunks, largest, squares, bad,
    beside, tops, GRAD: tl.constexpr, GRAD_UNIT: tl.constexpr, MIXED: tl.constexpr,
    MOMENTUM: tl.constexpr, MOMENTUM_UNIT: tl.constexpr, NESTEROV: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr, BESIDE: tl.constexpr,
    BESIDE_TYPE: tl.constexpr, BESIDE_UNIT: tl.constexpr,
):  # fmt: skip
    matrix, row, col, inside = chunk_of(chunks, layout, GRAD_UNIT, CHUNK_ROWS, CHUNK_COLS)
    x, _, _, finite = _mixed(
        grads, momenta, matrix, row, col, inside, momentum, fresh, sign,
        GRAD, GRAD_UNIT, MIXED, MOMENTUM, MOMENTUM_UNIT, NESTEROV, CHUNK_ROWS, CHUNK_COLS,
    )  # fmt: skip
    if BESIDE:
        rows = tl.arange(0, CHUNK_ROWS)
        cols = tl.arange(0, CHUNK_COLS)
        at = placed(beside, matrix, 0, row, col, rows, cols, BESIDE_TYPE, BESIDE_UNIT)
        w = widened(tl.load(at, mask=inside, other=0.0))
        finite = finite & (tl.abs(w) < float("inf"))
        tl.store(tops + tl.program_id(0), tl.max(tl.abs(w)))
    chunk = tl.program_id(0)
    tl.store(bad + chunk, tl.max(tl.where(finite, 0, 1)))
    x = tl.where(finite, x, 0.0)
    tl.store(largest + chunk, tl.max(tl.abs(x)))
    wide = x.to(tl.float64)
    tl.store(squares + chunk, tl.sum(wide * wide))


@triton.jit
def _reached(
    widest, matrix, layout, scales, lr, rate, kept, decay, most,
    BY_ROWS: tl.constexpr, SPHERE: tl.constexpr, LR_LOADED: tl.constexpr,
):  # fmt: skip
    """No |element| of a new parameter is larger, `widest` being that of the old one."""
    if LR_LOADED:
        loaded = tl.load(lr)
        rate = loaded.to(tl.float32)
        kept = (1.0 - loaded * decay).to(tl.float32)
    if BY_ROWS or SPHERE:
        height = element(layout, matrix, ROWS, COLUMNS)
        size = tl.sqrt((height * element(layout, matrix, COLS, COLUMNS)).to(tl.float32))
    if SPHERE:
        # |W - rate U| >= |1 - rate| |W|, so that nothing that is divided by vanishes.
        return tl.where(tl.abs(rate) < 0.5, size * widest, float("inf"))
    else:
        # Not everything decays where that is cautious.
        step = tl.abs(rate * tl.load(scales + matrix)) * most
        if BY_ROWS:
            step *= size
        return tl.maximum(tl.abs(kept), 1.0) * widest + step


@triton.jit
def _summary_kernel(
    spans, largest, squares, bad, state, exponent, factor, floor, top, eps, norm_factor,
    beside, layout, scales, lr, rate, kept, decay, most, limit,
    FLOORED: tl.constexpr, REACHES: tl.constexpr, BY_ROWS: tl.constexpr, SPHERE: tl.constexpr,
    LR_LOADED: tl.constexpr, BOUNDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0)
    first, count = span_of(spans, matrix)
    lanes = tl.arange(0, BLOCK)
    tops = tl.zeros((BLOCK,), tl.float32)
    sums = tl.zeros((BLOCK,), tl.float64)
    bads = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + lanes
        inside = at < count
        tops = tl.maximum(tops, tl.load(largest + first + at, mask=inside, other=0.0))
        sums += tl.load(squares + first + at, mask=inside, other=0.0)
        bads = tl.maximum(bads, tl.load(bad + first + at, mask=inside, other=0))
    most = tl.max(tops, 0)
    norm = tl.sqrt(tl.sum(sums, 0))
    e = tl.where(most > 0.0, exponent_of(most), 0)
    unit = ((e.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    lowest = tl.where(most > 0.0, norm, 1.0)
    divisor = lowest
    if FLOORED:
        divisor = tl.maximum(norm_factor * lowest, eps)
    found = tl.where(most > 0.0, NORMAL, ZERO)
    if REACHES:
        widest = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, count, BLOCK):
            at = start + lanes
            widest = tl.maximum(widest, tl.load(beside + first + at, mask=at < count, other=0.0))
        reached = _reached(
            tl.max(widest, 0), matrix, layout, scales, lr, rate, kept, decay, most, BY_ROWS, SPHERE,
            LR_LOADED,
        )  # fmt: skip
        found = tl.where(reached < limit, found, DOUBTFUL)
        if LR_LOADED:
            found = tl.where(tl.abs(tl.load(lr).to(tl.float32)) < float("inf"), found, NONFINITE)
    if BOUNDED:
        # Within 2^-50 and 2^50.
        usual = (most >= 8.881784197001252e-16) & (most <= 1125899906842624.0)
        found = tl.where(usual | (most == 0.0), found, NONFINITE)
    found = tl.where(tl.max(bads, 0) > 0, NONFINITE, found)
    tl.store(state + matrix, found)
    tl.store(exponent + matrix, e)
    tl.store(factor + matrix, (unit / divisor).to(tl.float32))
    tl.store(floor + matrix, (eps / lowest).to(tl.float32))
    tl.store(top + matrix, most)


@triton.jit
def _pack_kernel(
    grads, momenta, momentum, fresh, sign, layout, chunks, state, exponent, factor, out, steps,
    GRAD: tl.constexpr, GRAD_UNIT: tl.constexpr, MIXED: tl.constexpr, MOMENTUM: tl.constexpr,
    MOMENTUM_UNIT: tl.constexpr,
    NESTEROV: tl.constexpr, CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
    SCALED: tl.constexpr, SIGNS: tl.constexpr, KEEP: tl.constexpr, PROPAGATE: tl.constexpr,
):  # fmt: skip
    matrix, row, col, inside = chunk_of(chunks, layout, GRAD_UNIT, CHUNK_ROWS, CHUNK_COLS)
    x, new, at, _ = _mixed(
        grads, momenta, matrix, row, col, inside, momentum, fresh, sign,
        GRAD, GRAD_UNIT, MIXED, MOMENTUM, MOMENTUM_UNIT, NESTEROV, CHUNK_ROWS, CHUNK_COLS,
    )  # fmt: skip
    found = tl.load(state + matrix)
    bad = found == NONFINITE
    if MIXED and not KEEP:
        if tl.bfloat16 == MOMENTUM:
            rows = row + tl.arange(0, CHUNK_ROWS)
            cols = col + tl.arange(0, CHUNK_COLS)
            new = rounded_at_random(new, tl.load(steps + matrix), rows, cols)
        # What is doubtful is written later, if it is.
        tl.store(at, new, mask=inside if PROPAGATE else provided(inside, found < NONFINITE))
    if SIGNS:
        x = tl.where(x > 0.0, 1.0, tl.where(x < 0.0, -1.0, 0.0))
    if SCALED:
        x = scaled(x, -tl.load(exponent + matrix)) * tl.load(factor + matrix)
    x = tl.where(provided(inside, bad), float("nan") if PROPAGATE else 0.0, x)
    put_wide(x, out, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)


@triton.jit
def _settle_kernel(
    grads, momenta, momentum, fresh, sign, layout, chunks, state, steps,
    GRAD: tl.constexpr, GRAD_UNIT: tl.constexpr, MIXED: tl.constexpr, MOMENTUM: tl.constexpr,
    MOMENTUM_UNIT: tl.constexpr, NESTEROV: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    matrix, row, col, inside = chunk_of(chunks, layout, GRAD_UNIT, CHUNK_ROWS, CHUNK_COLS)
    if tl.load(state + matrix) == DOUBTFUL:
        _, new, at, _ = _mixed(
            grads, momenta, matrix, row, col, inside, momentum, fresh, sign,
            GRAD, GRAD_UNIT, MIXED, MOMENTUM, MOMENTUM_UNIT, NESTEROV, CHUNK_ROWS, CHUNK_COLS,
        )  # fmt: skip
        if tl.bfloat16 == MOMENTUM:
            rows = row + tl.arange(0, CHUNK_ROWS)
            cols = col + tl.arange(0, CHUNK_COLS)
            new = rounded_at_random(new, tl.load(steps + matrix), rows, cols)
        tl.store(at, new, mask=inside)


def settle(mix: Mix, layout: Layout, state: Tensor, steps: Tensor | None = None) -> None:
    """Writes the momenta of what is still DOUBTFUL when the parameters have been written.

    Args:
        mix, layout, steps: as for `pack`.
        state: of the matrices.
    """
    launch(
        _settle_kernel,
        layout.chunks.shape[0],
        *mix.arguments(),
        layout.table,
        layout.chunks,
        state,
        layout.table if steps is None else steps,
        **mix.constants(),
    )


def summarize(
    mix: Mix,
    layout: Layout,
    state: Tensor | None = None,
    *,
    norm_factor: float = 1.0,
    eps: float = 0.0,
    floored: bool = True,
    reach: Reach | None = None,
    bounded: bool = False,
) -> Summary:
    """Scale, norm and finiteness of every matrix, in two launches.

    Args:
        mix: what is measured.
        layout: of its matrices.
        state: where that of the summary is, at a multiple of 16 bytes; None: in new memory.
        norm_factor, eps: `factor` is that of X / max(norm_factor ||X||_F, eps).
        floored: False leaves both out of `factor`, for a norm that is known later.
        reach: of the step of the matrices beside; the state is DOUBTFUL where that may lead out of
            their range, and NONFINITE throughout if the learning rate is not finite.
        bounded: the state is NONFINITE of what is so large or small that squares leave fp32.
    """
    chunks, device = layout.chunks.shape[0], layout.device
    largest = torch.empty(chunks, dtype=torch.float32, device=device)
    squares = torch.empty(chunks, dtype=torch.float64, device=device)
    bad = torch.empty(chunks, dtype=torch.int32, device=device)
    tops = largest if mix.beside is None else torch.empty_like(largest)
    launch(
        _measure_kernel,
        chunks,
        *mix.arguments(),
        layout.table,
        layout.chunks,
        largest,
        squares,
        bad,
        (mix.beside or mix.grads).table,
        tops,
        **mix.constants(),
        BESIDE=mix.beside is not None,
        BESIDE_TYPE=DTYPES[(mix.beside or mix.grads).dtype],
        BESIDE_UNIT=(mix.beside or mix.grads).unit,
    )
    parts = Parts(largest, squares, bad, tops)
    if state is None:
        state = torch.empty(layout.count, dtype=torch.int32, device=device)
    return summary_of(
        parts,
        layout,
        state,
        norm_factor=norm_factor,
        eps=eps,
        floored=floored,
        reach=reach,
        bounded=bounded,
    )


def summary_of(
    parts: Parts,
    layout: Layout,
    state: Tensor,
    *,
    norm_factor: float = 1.0,
    eps: float = 0.0,
    floored: bool = True,
    reach: Reach | None = None,
    bounded: bool = False,
) -> Summary:
    """The same of what was measured."""
    device = layout.device
    exponent = torch.empty(layout.count, dtype=torch.int32, device=device)
    each = padded(layout.count, ALIGNED_NUMBERS)
    values = torch.empty(3, each, dtype=torch.float32, device=device)
    summary = Summary(state, exponent, *values.narrow(1, 0, layout.count).unbind())
    launch(
        _summary_kernel,
        layout.count,
        layout.spans,
        parts.largest,
        parts.squares,
        parts.bad,
        state,
        exponent,
        *summary[2:],
        eps,
        norm_factor,
        parts.tops,
        layout.table,
        *reach_of(reach, layout),
        FLOORED=floored,
        REACHES=reach is not None,
        BY_ROWS=reach is not None and reach.by_rows,
        SPHERE=reach is not None and reach.sphere,
        LR_LOADED=reach is not None and reach.delivery.on_device,
        BOUNDED=bounded,
        BLOCK=_SUMMARY,
    )
    return summary


def pack(
    mix: Mix,
    layout: Layout,
    summary: Summary,
    dtype: torch.dtype,
    *,
    unit_scale: bool = True,
    signs: bool = False,
    keep: bool = False,
    propagate: bool = False,
    steps: Tensor | None = None,
) -> Tensor:
    """The mix in a wide workspace; the momenta are written on the way.

    A non-finite matrix is NaN throughout where `propagate`, else 0, and its momentum stays.

    Args:
        mix, layout: as for `summarize`.
        summary: what that gave.
        dtype: of the workspace.
        unit_scale: multiplied by 2^-exponent and `factor`.
        signs: the signs of the elements in their place.
        keep: leave the momenta alone.
        propagate: see above.
        steps: int64, of every matrix, by which momenta in bfloat16 are rounded.
    """
    out = layout.empty(WIDE, dtype)
    launch(
        _pack_kernel,
        layout.chunks.shape[0],
        *mix.arguments(),
        layout.table,
        layout.chunks,
        summary.state,
        summary.exponent,
        summary.factor,
        out,
        layout.table if steps is None else steps,
        **mix.constants(),
        SCALED=unit_scale,
        SIGNS=signs,
        KEEP=keep,
        PROPAGATE=propagate,
    )
    return out
