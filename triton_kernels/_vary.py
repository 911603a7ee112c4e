"""DeVA's direction: matrix signs of means in the eigenbases, varied by energies of their lines.

What is a number a matrix is summed over chunks or lines, in their order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import (
    DTYPES,
    NONFINITE,
    PLACE_COLUMNS,
    corner,
    element,
    launch,
    placed,
    scaled,
    span_of,
    widened,
)
from ._factor_kernels import outer_of
from ._factor_lists import MOMENTA, SQUARES
from ._fused import (
    LINES,
    Fused,
    Moments,
    blocks_of_lines,
    constants_of,
    line_starts,
)
from ._groups import Rule
from ._layout import COLS, COLUMNS, ROWS, TALL, WIDE
from ._pack import Parts, chunk_of, of_wide, put_wide, summary_of
from .newton_schulz import orthogonalize

_ALONG = 128
_BLOCK = 256


@triton.jit
def _direction_kernel(
    x, layout, chunks, state, momenta, largest, squares, exponent, factor, out,
    beta, fresh,
    MOMENTUM: tl.constexpr, MOMENTUM_UNIT: tl.constexpr, NESTEROV: tl.constexpr,
    SIGNS: tl.constexpr, PACK: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    # Measures what is iterated on, or puts it in a workspace with the norm 1.
    matrix, row, col, inside = chunk_of(chunks, layout, MOMENTUM_UNIT, CHUNK_ROWS, CHUNK_COLS)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    value = of_wide(x, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    at = placed(momenta, matrix, 0, row, col, rows, cols, MOMENTUM, MOMENTUM_UNIT)
    mean = beta * widened(tl.load(at, mask=inside, other=0.0)) + fresh * value
    finite = tl.abs(mean) < float("inf")
    if NESTEROV:
        mean = beta * mean + fresh * value
        finite = finite & (tl.abs(mean) < float("inf"))
    mean = tl.where(finite, mean, 0.0)
    if SIGNS:
        mean = tl.where(mean > 0.0, 1.0, tl.where(mean < 0.0, -1.0, 0.0))
    if PACK:
        mean = scaled(mean, -tl.load(exponent + matrix)) * tl.load(factor + matrix)
        put_wide(mean, out, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)
    else:
        if tl.max(tl.where(finite, 0, 1)) > 0:
            tl.store(state + matrix, NONFINITE)
        tl.store(largest + tl.program_id(0), tl.max(tl.abs(mean)))
        wide = mean.to(tl.float64)
        tl.store(squares + tl.program_id(0), tl.sum(wide * wide))


@triton.jit
def _lines_kernel(
    x, layout, blocks, starts, momenta, firsts, means, grads, beta, fresh,
    MOMENTUM: tl.constexpr, SHORT_LINES: tl.constexpr, MEANS: tl.constexpr, GRADS: tl.constexpr,
    LINES: tl.constexpr, ALONG: tl.constexpr,
):  # fmt: skip
    # Lengths of rows, or columns, of means and gradients as they stand in wide workspaces.
    at = blocks + tl.program_id(0) * 2
    matrix = tl.load(at).to(tl.int64)
    line = tl.load(at + 1) * LINES + tl.arange(0, LINES)
    height = element(layout, matrix, ROWS, COLUMNS)
    width = element(layout, matrix, COLS, COLUMNS)
    tall = element(layout, matrix, TALL, COLUMNS)
    start, ld = corner(layout, matrix, WIDE)
    short = tl.minimum(height, width).to(tl.int32)
    long = tl.maximum(height, width).to(tl.int32)
    place = momenta + matrix * PLACE_COLUMNS
    base = tl.load(place).to(tl.pointer_type(MOMENTUM))
    if SHORT_LINES:
        size, length = short, long
        by_line = tl.load(place + 1 + tall)
        by_step = tl.load(place + 2 - tall)
        own = tl.load(starts + matrix)
    else:
        size, length = long, short
        by_line = tl.load(place + 2 - tall)
        by_step = tl.load(place + 1 + tall)
        own = tl.load(starts + matrix) + short
    exists = line < size
    of_means = tl.zeros((LINES, ALONG), tl.float64)
    of_grads = tl.zeros((LINES, ALONG), tl.float64)
    for begin in range(0, length, ALONG):
        to = begin + tl.arange(0, ALONG)
        mask = exists[:, None] & (to < length)[None, :]
        if SHORT_LINES:
            offsets = line[:, None].to(tl.int64) * ld + to[None, :]
        else:
            offsets = line[:, None] + to[None, :].to(tl.int64) * ld
        value = tl.load(x + start + offsets, mask=mask, other=0.0)
        if GRADS:
            wide = value.to(tl.float64)
            of_grads += wide * wide
        if MEANS:
            offsets = line[:, None].to(tl.int64) * by_line + to[None, :].to(tl.int64) * by_step
            old = widened(tl.load(base + offsets, mask=mask, other=0.0))
            wide = (beta * old + fresh * value).to(tl.float64)
            of_means += wide * wide
    if MEANS:
        found = tl.sqrt(tl.sum(of_means, 1)) * tl.load(firsts + matrix).to(tl.float64)
        tl.store(means + own + line, found.to(tl.float32), mask=exists)
    if GRADS:
        found = tl.sqrt(tl.sum(of_grads, 1))
        tl.store(grads + own + line, found.to(tl.float32), mask=exists)


@triton.jit
def _totals_kernel(
    layout, chunks, squares, parts,
    SQUARE: tl.constexpr, SQUARE_UNIT: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    matrix, row, col, inside = chunk_of(chunks, layout, SQUARE_UNIT, CHUNK_ROWS, CHUNK_COLS)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    at = placed(squares, matrix, 0, row, col, rows, cols, SQUARE, SQUARE_UNIT)
    value = widened(tl.load(at, mask=inside, other=0.0)).to(tl.float64)
    tl.store(parts + tl.program_id(0), tl.sum(value))


@triton.jit
def _line_sum(lines, first, count, BLOCK: tl.constexpr):
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + lanes
        sums += tl.load(lines + first + at, mask=at < count, other=0.0).to(tl.float64)
    return tl.sum(sums, 0)


@triton.jit
def _mean_eps_kernel(
    spans, parts, layout, starts, lines, seconds, out, beta, fresh, eps, BLOCK: tl.constexpr
):
    # eps of the mean of the new second moments, without their bias.
    matrix = tl.program_id(0).to(tl.int64)
    height = element(layout, matrix, ROWS, COLUMNS)
    width = element(layout, matrix, COLS, COLUMNS)
    short = tl.minimum(height, width).to(tl.int32)
    long = tl.maximum(height, width).to(tl.int32)
    first, count = span_of(spans, matrix)
    lanes = tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + lanes
        sums += tl.load(parts + first + at, mask=at < count, other=0.0)
    own = tl.load(starts + matrix)
    seen = _line_sum(lines, own, short, BLOCK) * _line_sum(lines, own + short, long, BLOCK)
    total = beta * tl.sum(sums, 0) + fresh * seen
    mean = total / (height * width).to(tl.float64)
    tl.store(out + matrix, (eps * mean * tl.load(seconds + matrix)).to(tl.float32))


@triton.jit
def _vary_kernel(
    o, out, layout, chunks, state, squares, seen, top, starts, seconds, scales, eps, absolute,
    beta, fresh,
    SQUARE: tl.constexpr, SQUARE_UNIT: tl.constexpr, VARIES: tl.constexpr,
    RELATIVE: tl.constexpr, OUTSIDE: tl.constexpr,
    CHUNK_ROWS: tl.constexpr, CHUNK_COLS: tl.constexpr,
):  # fmt: skip
    # scale O sqrt(top / V) with its eps, V <- beta V + fresh seen.
    matrix, row, col, inside = chunk_of(chunks, layout, SQUARE_UNIT, CHUNK_ROWS, CHUNK_COLS)
    rows = tl.arange(0, CHUNK_ROWS)
    cols = tl.arange(0, CHUNK_COLS)
    value = of_wide(o, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS).to(tl.float32)
    value = tl.load(scales + matrix) * value
    if VARIES:
        at = placed(squares, matrix, 0, row, col, rows, cols, SQUARE, SQUARE_UNIT)
        v = beta * widened(tl.load(at, mask=inside, other=0.0))
        v += fresh * outer_of(seen, starts, layout, matrix, row + rows, col + cols)
        if tl.max(tl.where(tl.abs(v) < float("inf"), 0, 1)) > 0:
            tl.store(state + matrix, NONFINITE)
        v = v * tl.load(seconds + matrix)
        small = tl.load(eps + matrix) if RELATIVE else absolute
        bottom = tl.sqrt(v) + small if OUTSIDE else tl.sqrt(v + small)
        # One root of the product: two would not scale exactly with an odd power of two.
        above = tl.sqrt(outer_of(top, starts, layout, matrix, row + rows, col + cols))
        gamma = above / tl.where(bottom == 0.0, 1.0, bottom)
        gamma = tl.where(bottom == 0.0, tl.where(above == 0.0, 1.0, float("inf")), gamma)
        value = tl.where(inside, value * gamma, 0.0)
    put_wide(value, out, layout, matrix, row, col, CHUNK_ROWS, CHUNK_COLS)


@dataclass(frozen=True)
class Variation:
    """What a direction is varied by.

    Attributes:
        variance: "momentum", "gradient", "instant" or "none".
        eps, eps_mode: beside the second moments.
        nesterov, signs: of what the matrix sign is taken.
    """

    variance: str
    eps: float
    eps_mode: str
    nesterov: bool
    signs: bool


def varied(
    fused: Fused, x: Tensor, moments: Moments, rule: Rule, variation: Variation, scales: Tensor
) -> tuple[Tensor, Tensor | None]:
    """The direction in the eigenbases, and lines whose products are new in the second moments.

    Args:
        fused: the matrices.
        x: their gradients in the eigenbases.
        moments: how the moments move.
        rule: of the matrix sign.
        variation: see `Variation`.
        scales: fp32, of every matrix.
    """
    layout = fused.layout
    o = _sign_of(fused, x, moments, rule, variation)
    varies = variation.variance != "none"
    seen = top = eps = layout.table
    lines = None
    if varies:
        lines, top = _lines(fused, x, moments, variation.variance)
        seen = lines
        if variation.eps_mode == "relative":
            eps = _relative_eps(fused, moments, variation.eps, lines)
    v = fused.places(SQUARES) if varies else fused.places(MOMENTA)
    out = layout.empty(WIDE, torch.float32)
    launch(
        _vary_kernel,
        layout.chunks.shape[0],
        o,
        out,
        layout.table,
        layout.chunks,
        fused.state,
        v.table,
        seen,
        top,
        line_starts(layout)[0],
        fused.rates.seconds,
        scales,
        eps,
        variation.eps,
        moments.beta2,
        moments.fresh2,
        VARIES=varies,
        RELATIVE=variation.eps_mode == "relative",
        OUTSIDE=variation.eps_mode == "outside",
        **constants_of(SQUARE=v),
    )
    return out, lines


def _sign_of(fused: Fused, x: Tensor, moments: Moments, rule: Rule, variation: Variation) -> Tensor:
    """The matrix sign of the means, in a workspace."""
    layout, m = fused.layout, fused.places(MOMENTA)
    chunks, device = layout.chunks.shape[0], layout.device
    largest = torch.empty(chunks, dtype=torch.float32, device=device)
    squares = torch.empty(chunks, dtype=torch.float64, device=device)
    bad = torch.zeros(chunks, dtype=torch.int32, device=device)

    def pass_over(numbers: tuple[Tensor, Tensor, Tensor], *, packs: bool) -> None:
        launch(
            _direction_kernel,
            chunks,
            x,
            layout.table,
            layout.chunks,
            fused.state,
            m.table,
            largest,
            squares,
            *numbers,
            moments.beta1,
            moments.fresh1,
            NESTEROV=variation.nesterov,
            SIGNS=variation.signs,
            PACK=packs,
            **constants_of(MOMENTUM=m),
        )

    pass_over((layout.table, layout.table, x), packs=False)
    parts = Parts(largest, squares, bad, largest)
    state = torch.empty(layout.count, dtype=torch.int32, device=device)
    summary = summary_of(parts, layout, state, floored=not rule.schatten8)
    packed = layout.empty(WIDE, rule.compute_dtype)
    pass_over((summary.exponent, summary.factor, packed), packs=True)
    found = orthogonalize(layout, fused.group.plan, rule, packed, summary, None)
    assert found is not None
    return found


def _lines(fused: Fused, x: Tensor, moments: Moments, variance: str) -> tuple[Tensor, Tensor]:
    """Lengths of lines that second moments see, and those that are above them."""
    layout, m = fused.layout, fused.places(MOMENTA)
    starts, count = line_starts(layout)
    means = torch.empty(count, dtype=torch.float32, device=layout.device)
    grads = means if variance == "momentum" else torch.empty_like(means)
    for short in (True, False):
        blocks = blocks_of_lines(layout, short)
        launch(
            _lines_kernel,
            blocks.shape[0],
            x,
            layout.table,
            blocks,
            starts,
            m.table,
            fused.rates.firsts,
            means,
            grads,
            moments.beta1,
            moments.fresh1,
            MOMENTUM=DTYPES[m.dtype],
            SHORT_LINES=short,
            MEANS=variance != "instant",
            GRADS=variance != "momentum",
            LINES=LINES,
            ALONG=_ALONG,
        )
    return (means if variance == "momentum" else grads), (grads if variance == "instant" else means)


def _relative_eps(fused: Fused, moments: Moments, eps: float, lines: Tensor) -> Tensor:
    """eps beside second moments that are on average 1."""
    layout, v = fused.layout, fused.places(SQUARES)
    parts = torch.empty(layout.chunks.shape[0], dtype=torch.float64, device=layout.device)
    out = torch.empty(layout.count, dtype=torch.float32, device=layout.device)
    launch(
        _totals_kernel,
        layout.chunks.shape[0],
        layout.table,
        layout.chunks,
        v.table,
        parts,
        **constants_of(SQUARE=v),
    )
    launch(
        _mean_eps_kernel,
        layout.count,
        layout.spans,
        parts,
        layout.table,
        line_starts(layout)[0],
        lines,
        fused.rates.seconds,
        out,
        moments.beta2,
        moments.fresh2,
        eps,
        BLOCK=_BLOCK,
    )
    return out
