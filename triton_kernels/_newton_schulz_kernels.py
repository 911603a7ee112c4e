"""Newton-Schulz kernels: all steps of a small matrix in one program, and powers of the scale."""

from __future__ import annotations

import triton
import triton.language as tl

from ._device import DOUBTFUL, corner, multiplied, narrowed, span_of, widened
from ._layout import WIDE
from ._matmul import deliver


@triton.jit
def _powers_kernel(
    spans, squares, floor, out, norm_factor, COUNT: tl.constexpr, BLOCK: tl.constexpr
):
    matrix = tl.program_id(0)
    first, count = span_of(spans, matrix)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + lanes
        sums += tl.load(squares + first + at, mask=at < count, other=0.0)
    total = tl.sum(sums, 0)
    norm = tl.sqrt(tl.sqrt(tl.sqrt(total)))
    divisor = tl.maximum(norm_factor * norm, tl.load(floor + matrix))
    scale = 1.0 / tl.where(total > 0.0, divisor, 1.0)
    power = scale * 0.0 + 1.0
    for k in tl.static_range(COUNT):
        tl.store(out + matrix * COUNT + k, power.to(tl.float32))
        power *= scale


@triton.jit
def _mean_with_transpose(x):
    return 0.5 * (x + tl.trans(x))


@triton.jit
def _in_two(q, dtype: tl.constexpr):
    """The part of fp32 that fits a storage dtype, and what is left."""
    high = narrowed(q, dtype)
    return high, narrowed(q - widened(high), dtype)


@triton.jit
def _product_with(part, high, low, unit, since, PRECISION: tl.constexpr):
    """(unit I + Q) X; the low part of Q counts where it is one of several steps."""
    value = multiplied(high, part, unit * part.to(tl.float32), PRECISION)
    if part.dtype != tl.float32:  # noqa: SIM102 - known when compiling, unlike the next
        if since > 1:
            value = multiplied(low, part, value, PRECISION)
    return value


@triton.jit(do_not_specialize=("steps", "restarts"))
def _small_kernel(
    x, layout, matrices, rows, steps, restarts, floor, norm_factor,
    places, state, scales, lr, rate, kept, decay,
    SCHATTEN: tl.constexpr, PLACED_DTYPE: tl.constexpr, PLACED_UNIT: tl.constexpr,
    UPDATE: tl.constexpr, LR_LOADED: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr,
    DELIVER: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # All steps on one matrix. Q is unit I + q: of a step by itself a I is exact, and what is
    # rounded is small. Over several, q takes the unit in, and is two numbers of X's dtype: on a
    # null space Q is hundreds of times what it is elsewhere, and one would not cancel there.
    matrix = tl.load(matrices + tl.program_id(0)).to(tl.int64)
    first, ld = corner(layout, matrix, WIDE)
    base = x + first
    dtype: tl.constexpr = x.dtype.element_ty
    short = tl.arange(0, TILE)
    inner = tl.arange(0, DEPTH)
    block = short[:, None] * ld + inner[None, :]
    r = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, ld, DEPTH):
        part = tl.load(base + start + block)
        r = multiplied(part, tl.trans(part), r, PRECISION)
    r = _mean_with_transpose(r)
    scale = tl.full((), 1.0, tl.float32)
    if SCHATTEN:
        square = multiplied(r, r, tl.zeros((TILE, TILE), tl.float32), PRECISION).to(tl.float64)
        total = tl.sum(tl.sum(square * square, 1), 0)
        norm = tl.sqrt(tl.sqrt(tl.sqrt(total)))
        divisor = tl.maximum(norm_factor * norm, tl.load(floor + matrix))
        scale = (1.0 / tl.where(total > 0.0, divisor, 1.0)).to(tl.float32)
        r *= scale * scale
    unit = tl.full((), 1.0, tl.float32)
    q = tl.zeros((TILE, TILE), tl.float32)
    since = 0
    eye = tl.where(short[:, None] == short[None, :], 1.0, 0.0)
    for t in range(steps):
        a = tl.load(rows + t * 3)
        b = tl.load(rows + t * 3 + 1)
        c = tl.load(rows + t * 3 + 2)
        if ((restarts >> t) & 1) == 1:
            whole = tl.where(since > 1, unit, 0.0)
            high, low = _in_two((q + whole * eye) * scale, dtype)
            unit = (unit - whole) * scale
            r = tl.zeros((TILE, TILE), tl.float32)
            for start in range(0, ld, DEPTH):
                part = tl.load(base + start + block)
                value = _product_with(part, high, low, unit, since, PRECISION)
                part = narrowed(value, dtype)
                tl.store(base + start + block, part)
                r = multiplied(part, tl.trans(part), r, PRECISION)
            # The next pass reads what other threads wrote.
            tl.debug_barrier()
            r = _mean_with_transpose(r)
            q = tl.zeros((TILE, TILE), tl.float32)
            unit = tl.full((), 1.0, tl.float32)
            scale = tl.full((), 1.0, tl.float32)
            since = 0
        since += 1
        z = multiplied(c * r, r, b * r, PRECISION)
        q = _mean_with_transpose(multiplied(q, z, a * q + unit * z, PRECISION))
        unit *= a
        if t + 1 < steps and ((restarts >> (t + 1)) & 1) == 0:
            half = _mean_with_transpose(multiplied(r, z, a * r, PRECISION))
            r = _mean_with_transpose(multiplied(half, z, a * half, PRECISION))
    whole = tl.where(since > 1, unit, 0.0)
    high, low = _in_two((q + whole * eye) * scale, dtype)
    unit = (unit - whole) * scale
    for start in range(0, ld, DEPTH):
        part = tl.load(base + start + block)
        value = _product_with(part, high, low, unit, since, PRECISION)
        if DELIVER:
            deliver(
                value, matrix, 0, start, short, inner, places, layout, state, scales, lr, rate,
                kept, decay, -1, PLACED_DTYPE, PLACED_UNIT, UPDATE, LR_LOADED, SKIP, CAUTIOUS,
            )  # fmt: skip
        else:
            tl.store(base + start + block, narrowed(value, dtype))
    if DELIVER and UPDATE and SKIP:  # noqa: SIM102 - known when compiling, unlike the next
        # What is doubtful is delivered from here by the next kernel.
        if tl.load(state + matrix) == DOUBTFUL:
            for start in range(0, ld, DEPTH):
                part = tl.load(base + start + block)
                value = _product_with(part, high, low, unit, since, PRECISION)
                tl.store(base + start + block, narrowed(value, dtype))


@triton.jit
def _doubtful_kernel(
    x, layout, places, state, scales, lr, rate, kept, decay,
    PLACED_DTYPE: tl.constexpr, PLACED_UNIT: tl.constexpr, UPDATE: tl.constexpr,
    LR_LOADED: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr,
    TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Looks at one small matrix where that is doubtful, and then delivers it. In the kernel above
    # this would take more registers than there are.
    matrix = tl.program_id(0).to(tl.int64)
    if tl.load(state + matrix) == DOUBTFUL:
        first, ld = corner(layout, matrix, WIDE)
        short = tl.arange(0, TILE)
        inner = tl.arange(0, DEPTH)
        for turn in range(0, 2):
            for start in range(0, ld, DEPTH):
                at = x + first + start + (short[:, None] * ld + inner[None, :])
                deliver(
                    widened(tl.load(at)), matrix, 0, start, short, inner, places, layout, state,
                    scales, lr, rate, kept, decay, 1 - turn, PLACED_DTYPE, PLACED_UNIT, UPDATE,
                    LR_LOADED, SKIP, CAUTIOUS,
                )  # fmt: skip
            # The next turn reads the state that other threads wrote.
            tl.debug_barrier()
