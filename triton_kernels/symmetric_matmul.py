"""Products known to be symmetric: tiles on and below the diagonal, mirrored on the way out."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from spectral_kernels._backend import operator
from torch import Tensor

from ._config import Config, architecture, config_for, precision_of
from ._device import (
    ALIGNED_UNIT,
    DTYPES,
    NONFINITE,
    STRIDED,
    corner,
    element,
    launch,
    multiplied,
    narrowed,
    placed,
    provided,
    tile_of,
    within,
)
from ._layout import (
    COLS,
    COLUMNS,
    LONG,
    ROWS,
    SHORT,
    WIDE,
    Layout,
    layout_of,
)
from ._pack import Mix, pack, summarize
from ._places import Places, matrices_of, places_of, swapped_unit

_LARGEST_PLACED = 64


@triton.jit
def coefficient(scalar, table, matrix, column, columns, PER_MATRIX: tl.constexpr):
    """A scalar, times one number a matrix."""
    if PER_MATRIX:
        return scalar * tl.load(table + matrix * columns + column)
    else:
        return scalar


@triton.jit(do_not_specialize=("columns", "alpha_column", "beta_column", "gamma_column"))
def _symmetric_kernel(
    a, b, c, d, out, places, layout, tiles, state, factors, columns, alpha, beta, gamma, delta,
    alpha_column, beta_column, gamma_column, squares,
    SPACE: tl.constexpr, OUT_SPACE: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_C: tl.constexpr, HAS_D: tl.constexpr, PER_MATRIX: tl.constexpr,
    PLACED: tl.constexpr, PLACED_DTYPE: tl.constexpr, PLACED_UNIT: tl.constexpr,
    MIRRORED_UNIT: tl.constexpr,
    ADD_PLACED: tl.constexpr, SKIP: tl.constexpr, SQUARES: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    matrix, row, col = tile_of(tiles)
    lanes = tl.arange(0, TILE)
    inner = tl.arange(0, DEPTH)
    start, ld = corner(layout, matrix, SPACE)
    weight = coefficient(alpha, factors, matrix, alpha_column, columns, PER_MATRIX)
    acc = tl.zeros((TILE, TILE), tl.float32)
    if TRANSPOSED:
        # a^T b of operands whose rows are summed over.
        _, depth = corner(layout, matrix, SHORT)
        block = inner[:, None] * ld + lanes[None, :]
        a_at = a + start + row.to(tl.int64) * TILE + block
        b_at = b + start + col.to(tl.int64) * TILE + block
        for _ in range(0, depth, DEPTH):
            acc = multiplied(tl.trans(tl.load(a_at)), tl.load(b_at), acc, PRECISION)
            a_at += DEPTH * ld
            b_at += DEPTH * ld
    else:
        block = lanes[:, None] * ld + inner[None, :]
        a_at = a + start + row.to(tl.int64) * TILE * ld + block
        b_at = b + start + col.to(tl.int64) * TILE * ld + block
        # A matrix that is done has the weight 0.
        depth = tl.where(weight == 0.0, 0, ld) if PER_MATRIX else ld
        for _ in range(0, depth, DEPTH):
            acc = multiplied(tl.load(a_at), tl.trans(tl.load(b_at)), acc, PRECISION)
            a_at += DEPTH
            b_at += DEPTH
    value = acc * weight
    out_start, out_ld = corner(layout, matrix, OUT_SPACE)
    here = out_start + row.to(tl.int64) * TILE * out_ld + col.to(tl.int64) * TILE
    block = lanes[:, None] * out_ld + lanes[None, :]
    if HAS_C:
        factor = coefficient(beta, factors, matrix, beta_column, columns, PER_MATRIX)
        value += factor * tl.load(c + here + block).to(tl.float32)
    if HAS_D:
        value += delta * tl.load(d + here + block).to(tl.float32)
    # On the diagonal both halves come from the lower one: rounding may differ between them.
    upper = (row == col) & (lanes[:, None] < lanes[None, :])
    factor = coefficient(gamma, factors, matrix, gamma_column, columns, PER_MATRIX)
    value += tl.where((row == col) & (lanes[:, None] == lanes[None, :]), factor, 0.0)
    if PLACED:
        size = element(layout, matrix, ROWS, COLUMNS)
        other = element(layout, matrix, COLS, COLUMNS)
        size = tl.maximum(size, other) if OUT_SPACE == LONG else tl.minimum(size, other)
        first_row = row.to(tl.int64) * TILE
        first_col = col.to(tl.int64) * TILE
        # Both sides of a symmetric matrix are as long as its lines.
        in_16s: tl.constexpr = PLACED_UNIT >= ALIGNED_UNIT
        inside = within(first_row, lanes, size, in_16s)[:, None]
        inside = inside & within(first_col, lanes, size, in_16s)[None, :]
        if ADD_PLACED:
            lower = placed(
                places, matrix, 0, first_row, first_col, lanes, lanes, PLACED_DTYPE, PLACED_UNIT
            )
            old = tl.load(lower, mask=inside & (upper == 0), other=0.0).to(tl.float32)
            value += coefficient(beta, factors, matrix, beta_column, columns, PER_MATRIX) * old
        if SKIP:
            inside = provided(inside, tl.load(state + matrix) != NONFINITE)
    if row == col:
        value = tl.where(upper, tl.trans(value), value)
    if SQUARES:
        wide = value.to(tl.float64)
        total = tl.sum(tl.sum(wide * wide, 1), 0)
        tl.store(squares + tl.program_id(0), total if row == col else 2.0 * total)
    if PLACED:
        value = narrowed(value, PLACED_DTYPE)
        lower = placed(
            places, matrix, 0, first_row, first_col, lanes, lanes, PLACED_DTYPE, PLACED_UNIT
        )
        tl.store(lower, value, mask=inside)
        if row != col:
            mirrored = placed(
                places, matrix, 1, first_row, first_col, lanes, lanes, PLACED_DTYPE, MIRRORED_UNIT
            )
            tl.store(mirrored, value, mask=inside)
    else:
        value = narrowed(value, out.dtype.element_ty)
        tl.store(out + here + block, value)
        if row != col:
            there = out_start + col.to(tl.int64) * TILE * out_ld + row.to(tl.int64) * TILE
            tl.store(out + there + (lanes[:, None] + lanes[None, :] * out_ld), value)


class Terms(NamedTuple):
    """alpha A B^T + beta C + gamma I + delta D, a sum that a product is part of.

    Attributes:
        alpha, beta, gamma, delta: see above.
        c, d: workspaces where the result goes to one.
        factors: fp32 (matrices, k); alpha, beta and gamma are multiplied by the `columns` of it.
        columns: see above.
    """

    alpha: float = 1.0
    beta: float = 0.0
    c: Tensor | None = None
    gamma: float = 0.0
    delta: float = 0.0
    d: Tensor | None = None
    factors: Tensor | None = None
    columns: tuple[int, int, int] = (0, 0, 0)


PRODUCT = Terms()


def symmetric(
    layout: Layout,
    config: Config,
    a: Tensor,
    b: Tensor,
    out: Tensor | Places,
    terms: Terms = PRODUCT,
    *,
    space: tl.constexpr = SHORT,
    out_space: tl.constexpr = SHORT,
    transposed: bool = False,
    add: bool = False,
    state: Tensor | None = None,
    squares: Tensor | None = None,
) -> None:
    """out = alpha A B^T + beta C + gamma I + delta D where that is symmetric, in one launch.

    A B^T is X X^T (a = b, space WIDE; X^T X with `transposed`), or the product of two commuting
    symmetric matrices (space SHORT or LONG).

    Args:
        layout, config: of all workspaces.
        a, b: workspaces in `space`.
        out: a workspace in `out_space`, or the caller's matrices, which are then written where
            `state` is not NONFINITE.
        terms: what is added, with its workspaces in `out_space`.
        squares: fp64, receives the sum of squares that every tile stands for.
        add: C is what `out`, the caller's matrices, holds: its lower triangle is read.
    """
    alpha, beta, c, gamma, delta, d, factors, columns = terms
    given = out if isinstance(out, Places) else None
    target = a if isinstance(out, Places) else out
    if given is not None and config.tile > _LARGEST_PLACED:
        # Masks and strided addresses take the registers of a large tile.
        config = config.halved()
    tiles = layout.triangle(out_space, config.tile)
    table = layout.table
    has = (c is not None, d is not None, factors is not None, state is not None)
    squared = squares is not None
    launch(
        _symmetric_kernel,
        tiles.shape[0],
        a,
        b,
        a if c is None else c,
        a if d is None else d,
        target,
        table if given is None else given.table,
        table,
        tiles,
        table if state is None else state,
        table if factors is None else factors,
        0 if factors is None else factors.shape[1],
        alpha,
        beta,
        gamma,
        delta,
        *columns,
        table if squares is None else squares,
        TRANSPOSED=transposed,
        ADD_PLACED=add,
        SQUARES=squared,
        **_constants(
            architecture(layout.device),
            config,
            (space.value, out_space.value),
            has,
            None if given is None else (given.dtype, given.unit),
        ),
    )


class Repeated:
    """alpha A B^T + beta C of workspaces, as `symmetric` has it, launched again and again."""

    def __init__(
        self, layout: Layout, config: Config, space: tl.constexpr = SHORT, *, has_c: bool = False
    ) -> None:
        self._tiles = layout.triangle(SHORT, config.tile)
        self._programs = self._tiles.shape[0]
        self._table = layout.table
        has = has_c, False, False, False
        spaces = space.value, SHORT.value
        self._options = {
            "TRANSPOSED": False,
            "ADD_PLACED": False,
            "SQUARES": False,
            **_constants(architecture(layout.device), config, spaces, has, None),
        }

    def __call__(
        self,
        a: Tensor,
        b: Tensor,
        out: Tensor,
        alpha: float = 1.0,
        beta: float = 0.0,
        c: Tensor | None = None,
    ) -> None:
        """One launch."""
        table = self._table
        launch(
            _symmetric_kernel,
            self._programs,
            a,
            b,
            a if c is None else c,
            a,
            out,
            table,
            table,
            self._tiles,
            table,
            table,
            0,
            alpha,
            beta,
            0.0,
            0.0,
            0,
            0,
            0,
            table,
            **self._options,
        )


@functools.lru_cache(maxsize=1024)
def _constants(
    arch: str,
    config: Config,
    spaces: tuple[int, int],
    has: tuple[bool, bool, bool, bool],
    placed: tuple[torch.dtype, int] | None,
) -> dict[str, object]:
    """Compile-time arguments, some of them."""
    unit = STRIDED.value if placed is None else placed[1]
    return {
        "SPACE": tl.constexpr(spaces[0]),
        "OUT_SPACE": tl.constexpr(spaces[1]),
        "HAS_C": has[0],
        "HAS_D": has[1],
        "PER_MATRIX": has[2],
        "SKIP": has[3],
        "PLACED": placed is not None,
        "PLACED_DTYPE": tl.float32 if placed is None else DTYPES[placed[0]],
        "PLACED_UNIT": unit,
        "MIRRORED_UNIT": swapped_unit(unit),
        "PRECISION": precision_of(arch),
        **config.options(),
    }


@operator
def gram(x: Tensor) -> Tensor:
    """X X^T, exactly symmetric; see `spectral_kernels.gram`."""
    out = x.new_empty(*x.shape[:-1], x.shape[-2])
    if not out.numel() or not x.numel():
        return out.zero_()
    m, n = x.shape[-2:]
    config = config_for(architecture(x.device), x.dtype, m)
    given, places = matrices_of(x), matrices_of(out)
    layout = layout_of(((m, n),) * len(given), (config.tile,) * 2, x.device)
    mix = Mix(places_of(given, x.dtype, x.device))
    summary = summarize(mix, layout)
    packed = pack(mix, layout, summary, x.dtype, unit_scale=False, propagate=True)
    tall = m > n
    symmetric(
        layout,
        config,
        packed,
        packed,
        places_of(places, x.dtype, x.device),
        space=WIDE,
        out_space=LONG if tall else SHORT,
        transposed=tall,
    )
    return out
