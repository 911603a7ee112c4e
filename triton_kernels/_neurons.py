"""What is done to an update by rows, between the iteration and the parameters.

Rows are normalised by their second moments (NorMuon), and parameters kept on their spheres (MuonH):
sums of squares of rows, second moments and factors, what keeps the length, and the update, a launch
each. A row's sum is over columns in their order, and the length of a matrix over its rows in
theirs, whatever else is in the list.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import PASS_WARPS
from ._device import (
    DOUBTFUL,
    DTYPES,
    NONFINITE,
    PLACE_COLUMNS,
    corner,
    element,
    launch,
    tile_of,
    widened,
)
from ._layout import COLS, COLUMNS, ROWS, TALL, WIDE, Layout, kept, upload
from ._matmul import Delivery, deliver
from ._places import Places

_ROWS = 32  # of a program that sums
_COLS = 128
_BLOCK = 256  # rows that one program averages at a time
_TILE = 64


@kept(256)
def _row_blocks(layout: Layout) -> tuple[Tensor, Tensor, int]:
    """(matrix, row block), the first row of every matrix among all, and how many there are."""
    blocks = [(i, b) for i, (m, _) in enumerate(layout.shapes) for b in range(-(-m // _ROWS))]
    heights = torch.tensor([0, *(m for m, _ in layout.shapes)], dtype=torch.int64, device="cpu")
    starts = heights.cumsum(0)
    table = torch.tensor(blocks, dtype=torch.int32, device="cpu")
    device = layout.device
    return upload(table, device), upload(starts[:-1], device), int(starts[-1])


@triton.jit
def _check_kernel(places, layout, state, BLOCK: tl.constexpr):
    matrix = tl.program_id(0).to(tl.int64)
    base = tl.load(places + matrix * PLACE_COLUMNS).to(tl.pointer_type(tl.float32))
    stride = tl.load(places + matrix * PLACE_COLUMNS + 1)
    count = element(layout, matrix, ROWS, COLUMNS).to(tl.int32)
    lanes = tl.arange(0, BLOCK)
    bad = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, BLOCK):
        at = start + lanes
        v = tl.load(base + at * stride, mask=at < count, other=0.0)
        bad = tl.maximum(bad, tl.where((v >= 0.0) & (v < float("inf")), 0, 1))
    if tl.max(bad, 0) > 0:
        tl.store(state + matrix, NONFINITE)


@triton.jit
def _rows_of(layout, blocks, ROWS_AT_ONCE: tl.constexpr):
    """A program's rows: matrix, rows, which exist, how wide; start and strides in the workspace."""
    at = blocks + tl.program_id(0) * 2
    matrix = tl.load(at).to(tl.int64)
    row = tl.load(at + 1) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    start, ld = corner(layout, matrix, WIDE)
    inside = row < element(layout, matrix, ROWS, COLUMNS).to(tl.int32)
    width = element(layout, matrix, COLS, COLUMNS).to(tl.int32)
    tall = element(layout, matrix, TALL, COLUMNS).to(tl.int32)
    along = tall + (1 - tall) * ld
    across = tall * ld + (1 - tall)
    return matrix, row.to(tl.int64), inside, width, start, along, across


@triton.jit
def _sums_kernel(x, layout, blocks, starts, sums, ROWS_AT_ONCE: tl.constexpr, DEPTH: tl.constexpr):
    matrix, row, inside, width, start, along, across = _rows_of(layout, blocks, ROWS_AT_ONCE)
    lanes = tl.arange(0, DEPTH)
    acc = tl.zeros((ROWS_AT_ONCE, DEPTH), tl.float32)
    for first in range(0, width, DEPTH):
        col = first + lanes
        offsets = row[:, None] * along + col.to(tl.int64)[None, :] * across
        mask = inside[:, None] & (col < width)[None, :]
        value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        acc += value * value
    total = tl.sum(acc.to(tl.float64), 1)
    tl.store(sums + tl.load(starts + matrix) + row, total, mask=inside)


@triton.jit
def _products_kernel(
    x, layout, blocks, starts, places, lengths, dots,
    DTYPE: tl.constexpr, ROWS_AT_ONCE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    # Sums of W_ij^2 and W_ij X_ij over the columns of every row.
    matrix, row, inside, width, start, along, across = _rows_of(layout, blocks, ROWS_AT_ONCE)
    base = tl.load(places + matrix * PLACE_COLUMNS).to(tl.pointer_type(DTYPE))
    by_row = tl.load(places + matrix * PLACE_COLUMNS + 1)
    by_col = tl.load(places + matrix * PLACE_COLUMNS + 2)
    lanes = tl.arange(0, DEPTH)
    length = tl.zeros((ROWS_AT_ONCE,), tl.float64)
    dot = tl.zeros((ROWS_AT_ONCE,), tl.float64)
    for first in range(0, width, DEPTH):
        col = (first + lanes).to(tl.int64)
        mask = inside[:, None] & (col < width)[None, :]
        offsets = row[:, None] * along + col[None, :] * across
        value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        offsets = row[:, None] * by_row + col[None, :] * by_col
        w = widened(tl.load(base + offsets, mask=mask, other=0.0)).to(tl.float64)
        length += tl.sum(w * w, 1)
        dot += tl.sum(w * value.to(tl.float64), 1)
    at = tl.load(starts + matrix) + row
    tl.store(lengths + at, length, mask=inside)
    tl.store(dots + at, dot, mask=inside)


@triton.jit
def _sphere_kernel(
    sums, lengths, dots, factors, same, starts, layout, lr, rate, scales,
    NEURONS: tl.constexpr, LR_LOADED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # What W and X are multiplied by, so that W keeps its length.
    matrix = tl.program_id(0).to(tl.int64)
    count = element(layout, matrix, ROWS, COLUMNS).to(tl.int32)
    first = tl.load(starts + matrix)
    lanes = tl.arange(0, BLOCK)
    own = tl.zeros((BLOCK,), tl.float64)
    squared = tl.zeros((BLOCK,), tl.float64)
    mixed = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + lanes
        inside = at < count
        factor = tl.full((BLOCK,), 1.0, tl.float64)
        if NEURONS:
            factor = tl.load(factors + first + at, mask=inside, other=0.0).to(tl.float64)
        own += factor * factor * tl.load(sums + first + at, mask=inside, other=0.0)
        squared += tl.load(lengths + first + at, mask=inside, other=0.0)
        mixed += factor * tl.load(dots + first + at, mask=inside, other=0.0)
    o, w, dot = tl.sum(own, 0), tl.sum(squared, 0), tl.sum(mixed, 0)
    if NEURONS:
        each = tl.load(same + matrix).to(tl.float64)
        o *= each * each
        dot *= each
    if LR_LOADED:
        rate = tl.load(lr).to(tl.float32)
    step = tl.where(o > 0.0, rate * tl.sqrt(w / tl.where(o > 0.0, o, 1.0)), 0.0)
    ratio = (w - 2.0 * step * dot + step * step * o) / tl.where(w > 0.0, w, 1.0)
    ratio = tl.where(step * w > 0.0, tl.maximum(ratio, 0.0), 1.0)
    # Neither NaN nor infinity may be lost in a comparison.
    ratio = tl.where((o < float("inf")) & (w < float("inf")), ratio, float("nan"))
    kept = 1.0 / tl.sqrt(ratio)
    tl.store(scales + matrix * 2, kept.to(tl.float32))
    tl.store(scales + matrix * 2 + 1, (step * kept).to(tl.float32))


@triton.jit(do_not_specialize=("late",))
def _moments_kernel(
    sums, starts, layout, places, state, factors, lengths, beta2, fresh, eps, late,
    SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    # Those of what is doubtful are written `late`, if they are.
    matrix = tl.program_id(0).to(tl.int64)
    base = tl.load(places + matrix * PLACE_COLUMNS).to(tl.pointer_type(tl.float32))
    stride = tl.load(places + matrix * PLACE_COLUMNS + 1)
    count = element(layout, matrix, ROWS, COLUMNS).to(tl.int32)
    width = element(layout, matrix, COLS, COLUMNS).to(tl.float64)
    first = tl.load(starts + matrix)
    written = count
    if SKIP:
        found = tl.load(state + matrix)
        if (late != 0) & (found != DOUBTFUL):
            return
        written = tl.where((late != 0) | (found < NONFINITE), count, 0)
    lanes = tl.arange(0, BLOCK)
    before = tl.zeros((BLOCK,), tl.float64)
    after = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, count, BLOCK):
        at = start + lanes
        inside = at < count
        total = tl.load(sums + first + at, mask=inside, other=0.0)
        old = tl.load(base + at * stride, mask=inside, other=0.0)
        v = beta2 * old + fresh * (total / width).to(tl.float32)
        factor = 1.0 / (tl.sqrt(v) + eps)
        tl.store(base + at * stride, v, mask=at < written)
        tl.store(factors + first + at, factor, mask=inside)
        scaled = factor.to(tl.float64)
        before += total
        after += scaled * scaled * total
    length = tl.sum(after, 0)
    same = tl.sqrt(tl.sum(before, 0) / tl.where(length == 0.0, 1.0, length))
    # Without a direction there is no length to keep.
    tl.store(lengths + matrix, tl.where(length == 0.0, 0.0, same).to(tl.float32))


@triton.jit(do_not_specialize=("look",))
def _rows_kernel(
    x, factors, lengths, starts, tiles, places, layout, state, scales, lr, rate, kept, decay, look,
    PLACED_DTYPE: tl.constexpr, PLACED_UNIT: tl.constexpr, UPDATE: tl.constexpr,
    LR_LOADED: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr, TILE: tl.constexpr,
    NEURONS: tl.constexpr, SPHERE: tl.constexpr,
):  # fmt: skip
    matrix, row, col = tile_of(tiles)
    if UPDATE and SKIP:  # noqa: SIM102 - known when compiling, unlike the next
        if (look != 0) & (tl.load(state + matrix) != DOUBTFUL):
            return
    row = row.to(tl.int64) * TILE
    col = col.to(tl.int64) * TILE
    lanes = tl.arange(0, TILE)
    start, ld = corner(layout, matrix, WIDE)
    block = lanes[:, None] * ld + lanes[None, :]
    value = tl.load(x + start + row * ld + col + block).to(tl.float32)
    if NEURONS:
        height = element(layout, matrix, ROWS, COLUMNS)
        tall = element(layout, matrix, TALL, COLUMNS)
        neuron = tl.where(tall != 0, col, row) + lanes
        factor = tl.load(
            factors + tl.load(starts + matrix) + neuron, mask=neuron < height, other=0.0
        ) * tl.load(lengths + matrix)
        by_row = tl.where(tall != 0, 1.0, factor)
        by_col = tl.where(tall != 0, factor, 1.0)
        value = value * (by_row[:, None] * by_col[None, :])
    deliver(
        value, matrix, row, col, lanes, lanes, places, layout, state, scales, lr, rate, kept,
        decay, look, PLACED_DTYPE, PLACED_UNIT, UPDATE, LR_LOADED, SKIP, CAUTIOUS, SPHERE,
    )  # fmt: skip


def check_moments(layout: Layout, moments: Places, state: Tensor) -> None:
    """Marks matrices of which a second moment is no finite number of at least 0."""
    launch(_check_kernel, layout.count, moments.table, layout.table, state, BLOCK=_BLOCK)


@dataclass(frozen=True)
class Averages:
    """Second moments of rows.

    Attributes:
        moments: fp32, (m, 1) of every matrix; updated but where the state is NONFINITE.
        beta2, eps: see `spectral_kernels.muon_step_`.
    """

    moments: Places
    beta2: float
    eps: float


def by_neurons(
    layout: Layout,
    tile: int,
    x: Tensor,
    averages: Averages | None,
    out: Delivery,
    *,
    sphere: bool = False,
) -> None:
    """Delivers X, by its rows or to spheres.

    Args:
        layout: of all matrices.
        tile: what their sides are padded to multiples of.
        x: the wide workspace.
        averages: X goes with its rows over the roots of these, its length kept; None: as it is.
        out: where the result goes.
        sphere: W keeps its length, see `spectral_kernels.muon_step_`.
    """
    device = layout.device
    blocks, starts, rows = _row_blocks(layout)
    sums = torch.empty(rows, dtype=torch.float64, device=device)
    factors = torch.empty(rows, dtype=torch.float32, device=device)
    lengths = torch.empty(layout.count, dtype=torch.float32, device=device)
    launch(
        _sums_kernel,
        blocks.shape[0],
        x,
        layout.table,
        blocks,
        starts,
        sums,
        ROWS_AT_ONCE=_ROWS,
        DEPTH=_COLS,
    )

    def average(late: int) -> None:
        assert averages is not None
        launch(
            _moments_kernel,
            layout.count,
            sums,
            starts,
            layout.table,
            averages.moments.table,
            layout.table if out.state is None else out.state,
            factors,
            lengths,
            averages.beta2,
            1.0 - averages.beta2,
            averages.eps,
            late,
            SKIP=not out.propagate,
            BLOCK=_BLOCK,
        )

    if averages is not None:
        average(0)
    if sphere:
        squares = torch.empty_like(sums)
        dots = torch.empty_like(sums)
        launch(
            _products_kernel,
            blocks.shape[0],
            x,
            layout.table,
            blocks,
            starts,
            out.places.table,
            squares,
            dots,
            DTYPE=DTYPES[out.places.dtype],
            ROWS_AT_ONCE=_ROWS,
            DEPTH=_COLS,
        )
        assert out.lr is not None
        pairs = torch.empty(layout.count, 2, dtype=torch.float32, device=device)
        launch(
            _sphere_kernel,
            layout.count,
            sums,
            squares,
            dots,
            factors,
            lengths,
            starts,
            layout.table,
            out.lr if out.on_device else layout.table,
            1.0 if out.on_device else float(out.lr),
            pairs,
            NEURONS=averages is not None,
            LR_LOADED=out.on_device,
            BLOCK=_BLOCK,
        )
        out = replace(out, scales=pairs)
    size = min(tile, _TILE)
    for unit, chosen in out.places.units.wide:
        tiles = layout.tiles(size, chosen)
        for look in out.looks:
            launch(
                _rows_kernel,
                tiles.shape[0],
                x,
                factors,
                lengths,
                starts,
                tiles,
                *_placed_first(out, layout),
                look,
                **out.constants(),
                PLACED_UNIT=unit,
                TILE=size,
                NEURONS=averages is not None,
                SPHERE=sphere,
                num_warps=PASS_WARPS,
            )
    if averages is not None and not out.propagate:
        average(1)


def _placed_first(out: Delivery, layout: Layout) -> tuple[object, ...]:
    """The arguments of a delivery with the table of the layout behind that of its places."""
    places, *rest = out.arguments(layout)
    return (places, layout.table, *rest)
