"""Rows normalised by their second moments (NorMuon), between the iteration and the parameters.

Three launches: sums of squares of rows, second moments and factors, and the update. A row's sum
is over columns in their order, and the length of a matrix over its rows in theirs, whatever else
is in the list.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._device import NONFINITE, PLACE_COLUMNS, corner, element, launch, tile_of
from ._layout import COLS, COLUMNS, ROWS, TALL, WIDE, Layout, Places, Shape, kept, upload
from ._matmul import Delivery, deliver

_ROWS = 32  # of a program that sums
_COLS = 128
_BLOCK = 256  # rows that one program averages at a time
_TILE = 64


@kept(256)
def _row_blocks(shapes: tuple[Shape, ...], device: torch.device) -> tuple[Tensor, Tensor, int]:
    """(matrix, row block), the first row of every matrix among all, and how many there are."""
    blocks = [(i, b) for i, (m, _) in enumerate(shapes) for b in range(-(-m // _ROWS))]
    heights = torch.tensor([0, *(m for m, _ in shapes)], dtype=torch.int64, device="cpu")
    starts = heights.cumsum(0)
    table = torch.tensor(blocks, dtype=torch.int32, device="cpu")
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
def _sums_kernel(x, layout, blocks, starts, sums, ROWS_AT_ONCE: tl.constexpr, DEPTH: tl.constexpr):
    at = blocks + tl.program_id(0) * 2
    matrix = tl.load(at).to(tl.int64)
    row = tl.load(at + 1) * ROWS_AT_ONCE + tl.arange(0, ROWS_AT_ONCE)
    start, ld = corner(layout, matrix, WIDE)
    height = element(layout, matrix, ROWS, COLUMNS).to(tl.int32)
    width = element(layout, matrix, COLS, COLUMNS).to(tl.int32)
    tall = element(layout, matrix, TALL, COLUMNS).to(tl.int32)
    along = tall + (1 - tall) * ld
    across = tall * ld + (1 - tall)
    lanes = tl.arange(0, DEPTH)
    inside = row < height
    acc = tl.zeros((ROWS_AT_ONCE, DEPTH), tl.float32)
    for first in range(0, width, DEPTH):
        col = first + lanes
        offsets = row.to(tl.int64)[:, None] * along + col.to(tl.int64)[None, :] * across
        mask = inside[:, None] & (col < width)[None, :]
        value = tl.load(x + start + offsets, mask=mask, other=0.0).to(tl.float32)
        acc += value * value
    total = tl.sum(acc.to(tl.float64), 1)
    tl.store(sums + tl.load(starts + matrix) + row, total, mask=inside)


@triton.jit
def _moments_kernel(
    sums, starts, layout, places, state, factors, lengths, beta2, fresh, eps,
    SKIP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    matrix = tl.program_id(0).to(tl.int64)
    base = tl.load(places + matrix * PLACE_COLUMNS).to(tl.pointer_type(tl.float32))
    stride = tl.load(places + matrix * PLACE_COLUMNS + 1)
    count = element(layout, matrix, ROWS, COLUMNS).to(tl.int32)
    width = element(layout, matrix, COLS, COLUMNS).to(tl.float64)
    first = tl.load(starts + matrix)
    written = count
    if SKIP:
        written = tl.where(tl.load(state + matrix) == NONFINITE, 0, count)
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


@triton.jit
def _rows_kernel(
    x, factors, lengths, starts, tiles, places, layout, state, scales, lr, rate, kept, decay,
    PLACED_DTYPE: tl.constexpr, PLACED_UNIT: tl.constexpr, UPDATE: tl.constexpr,
    LR_LOADED: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    matrix, row, col = tile_of(tiles)
    row = row.to(tl.int64) * TILE
    col = col.to(tl.int64) * TILE
    lanes = tl.arange(0, TILE)
    start, ld = corner(layout, matrix, WIDE)
    height = element(layout, matrix, ROWS, COLUMNS)
    tall = element(layout, matrix, TALL, COLUMNS)
    neuron = tl.where(tall != 0, col, row) + lanes
    factor = tl.load(
        factors + tl.load(starts + matrix) + neuron, mask=neuron < height, other=0.0
    ) * tl.load(lengths + matrix)
    block = lanes[:, None] * ld + lanes[None, :]
    value = tl.load(x + start + row * ld + col + block).to(tl.float32)
    by_row = tl.where(tall != 0, 1.0, factor)
    by_col = tl.where(tall != 0, factor, 1.0)
    value = value * (by_row[:, None] * by_col[None, :])
    deliver(
        value, matrix, row, col, lanes, lanes, places, layout, state, scales, lr, rate, kept,
        decay, PLACED_DTYPE, PLACED_UNIT, UPDATE, LR_LOADED, SKIP, CAUTIOUS,
    )  # fmt: skip


def check_moments(layout: Layout, moments: Places, state: Tensor) -> None:
    """Marks matrices of which a second moment is no finite number of at least 0."""
    launch(_check_kernel, layout.count, moments.table, layout.table, state, BLOCK=_BLOCK)


def by_neurons(
    layout: Layout,
    tile: int,
    x: Tensor,
    moments: Places,
    out: Delivery,
    beta2: float,
    eps: float,
) -> None:
    """Delivers X with its rows over the roots of their second moments, its length kept.

    Args:
        layout: of all matrices.
        tile: what their sides are padded to multiples of.
        x: the wide workspace.
        moments: fp32, (m, 1) of every matrix; updated but where the state is NONFINITE.
        out: where the result goes.
        beta2, eps: see `spectral_kernels.muon_step_`.
    """
    device = layout.device
    blocks, starts, rows = _row_blocks(layout.shapes, device)
    sums = torch.empty(rows, dtype=torch.float64, device=device)
    factors = torch.empty(rows, dtype=torch.float32, device=device)
    lengths = torch.empty(layout.count, dtype=torch.float32, device=device)
    launch(
        _sums_kernel,
        len(blocks),
        x,
        layout.table,
        blocks,
        starts,
        sums,
        ROWS_AT_ONCE=_ROWS,
        DEPTH=_COLS,
    )
    launch(
        _moments_kernel,
        layout.count,
        sums,
        starts,
        layout.table,
        moments.table,
        layout.table if out.state is None else out.state,
        factors,
        lengths,
        beta2,
        1.0 - beta2,
        eps,
        SKIP=not out.propagate,
        BLOCK=_BLOCK,
    )
    size = min(tile, _TILE)
    for unit, chosen in out.by_unit(layout).items():
        tiles = layout.tiles(size, None if len(chosen) == layout.count else tuple(chosen))
        launch(
            _rows_kernel,
            len(tiles),
            x,
            factors,
            lengths,
            starts,
            tiles,
            *_placed_first(out, layout),
            **out.constants(),
            PLACED_UNIT=unit,
            TILE=size,
        )


def _placed_first(out: Delivery, layout: Layout) -> tuple[object, ...]:
    """The arguments of a delivery with the table of the layout behind that of its places."""
    places, *rest = out.arguments(layout)
    return (places, layout.table, *rest)
