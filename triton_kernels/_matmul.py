"""Products with a wide factor, and what becomes of a result in the caller's tensors."""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._config import Config, architecture, precision_of
from ._device import (
    ALIGNED,
    ALIGNED_COLUMN_MAJOR,
    ALIGNED_ROW_MAJOR,
    DOUBTFUL,
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
from ._layout import COLS, COLUMNS, ROWS, SHORT, TALL, WIDE, Layout
from ._places import EVERYTHING, Chosen, Places

_LARGEST_SPREAD = 64


@dataclass(frozen=True)
class Delivery:
    """Where results go.

    W <- (1 - lr decay) W - lr scale X with `lr`, else W <- X. With `cautious` elements of W whose
    sign is against that of X do not decay.

    Attributes:
        places: the matrices W.
        lr: one number, on any device, or None.
        decay: weight decay over the learning rate.
        scales: fp32, one a matrix.
        state: where it is NONFINITE, W keeps every bit, unless `propagate`. Where it is DOUBTFUL,
            the new W is looked at before it is written, and NONFINITE if it would not be finite.
        propagate, cautious: see above.
    """

    places: Places
    lr: Tensor | None = None
    decay: float = 0.0
    scales: Tensor | None = None
    state: Tensor | None = None
    propagate: bool = True
    cautious: bool = False

    def arguments(self, layout: Layout) -> tuple[object, ...]:
        """As the kernels take it."""
        rate, kept, loaded = 1.0, 1.0, self.on_device
        if self.lr is not None and not loaded:
            rate = float(self.lr)
            kept = 1.0 - rate * self.decay
        return (
            self.places.table,
            layout.table if self.state is None else self.state,
            layout.table if self.scales is None else self.scales,
            self.lr if loaded else layout.table,
            rate,
            kept,
            self.decay,
        )

    @property
    def looks(self) -> tuple[int, ...]:
        """What kernels that are launched for tiles take as `look`, a launch each."""
        return (1, 0) if self.doubts else (0,)

    @property
    def doubts(self) -> bool:
        """Whether a state may be DOUBTFUL."""
        return self.lr is not None and not self.propagate

    @property
    def on_device(self) -> bool:
        """Whether the learning rate has to be read by the kernel."""
        return self.lr is not None and self.lr.device.type != "cpu"

    def constants(self) -> dict[str, object]:
        """Compile-time arguments."""
        return {
            "PLACED_DTYPE": DTYPES[self.places.dtype],
            "UPDATE": self.lr is not None,
            "LR_LOADED": self.on_device,
            "SKIP": not self.propagate,
            "CAUTIOUS": self.cautious,
        }


_NOTHING: dict[str, object] = {
    "PLACED_DTYPE": DTYPES[torch.float32],
    "UPDATE": False,
    "LR_LOADED": False,
    "SKIP": False,
    "CAUTIOUS": False,
}


def delivery_of(
    out: Delivery | None, layout: Layout
) -> tuple[tuple[object, ...], dict[str, object], tuple[Chosen, ...]]:
    """Arguments and constants of kernels that deliver or do not, and the launches it takes."""
    if out is None:
        return (*(layout.table,) * 4, 1.0, 1.0, 0.0), _NOTHING, EVERYTHING
    return out.arguments(layout), out.constants(), out.places.units.wide


@triton.jit
def infinite_from(dtype: tl.constexpr):
    """The least fp32 number that is rounded to infinity."""
    if dtype == tl.float16:
        return 65520.0
    elif dtype == tl.bfloat16:
        return 3.3961775292304957e38
    else:
        return float("inf")


@triton.jit
def deliver(
    value, matrix, first_row, first_col, rows, cols, places, layout, state, scales, lr, rate, kept,
    decay, look,
    PLACED_DTYPE: tl.constexpr, PLACED_UNIT: tl.constexpr, UPDATE: tl.constexpr,
    LR_LOADED: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr,
    SPHERE: tl.constexpr = False,
):  # fmt: skip
    """See `Delivery`; rows and columns are those of the wide matrix.

    With `look` of 1 nothing is written but the state of a matrix that would not be finite; with -1
    nothing of what is doubtful.
    """
    height = element(layout, matrix, ROWS, COLUMNS)
    width = element(layout, matrix, COLS, COLUMNS)
    swapped = element(layout, matrix, TALL, COLUMNS)
    inside = within(
        first_row, rows, tl.minimum(height, width), PLACED_UNIT == ALIGNED_COLUMN_MAJOR
    )[:, None]
    across = within(first_col, cols, tl.maximum(height, width), PLACED_UNIT == ALIGNED_ROW_MAJOR)[
        None, :
    ]
    inside = inside & across
    at = placed(
        places, matrix, swapped, first_row, first_col, rows, cols, PLACED_DTYPE, PLACED_UNIT
    )
    if UPDATE:
        if SKIP:
            found = tl.load(state + matrix)
            inside = provided(inside, (found < NONFINITE) | ((look >= 0) & (found == DOUBTFUL)))
        if LR_LOADED:
            loaded = tl.load(lr)
            rate = loaded.to(tl.float32)
            kept = (1.0 - loaded * decay).to(tl.float32)
        old = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        if SPHERE:
            # W stays on its sphere: what it and X are multiplied by has lr in it already.
            value = tl.load(scales + matrix * 2) * old - tl.load(scales + matrix * 2 + 1) * value
        elif CAUTIOUS:
            # Where both are not 0 and differ in sign; a product could vanish.
            sign = tl.where(value > 0.0, 1.0, tl.where(value < 0.0, -1.0, 0.0))
            moved = (rate * tl.load(scales + matrix)) * value
            value = tl.where(sign * old < 0.0, old, kept * old) - moved
        else:
            value = kept * old - (rate * tl.load(scales + matrix)) * value
    if UPDATE and SKIP:
        if look == 1:
            lost = tl.where(tl.abs(value) < infinite_from(PLACED_DTYPE), 0, 1)
            if tl.max(tl.where(inside, lost, 0)) > 0:
                tl.store(state + matrix, NONFINITE)
        else:
            tl.store(at, narrowed(value, PLACED_DTYPE), mask=inside)
    else:
        tl.store(at, narrowed(value, PLACED_DTYPE), mask=inside)


@triton.jit(do_not_specialize=("columns", "alpha_column", "beta_column", "look"))
def _wide_kernel(
    a, b, c, out, layout, tiles, factors, columns, alpha, beta, alpha_column, beta_column,
    places, state, scales, lr, rate, kept, decay, look,
    A_SPACE: tl.constexpr, B_SPACE: tl.constexpr, A_TRANSPOSED: tl.constexpr,
    B_TRANSPOSED: tl.constexpr, HAS_C: tl.constexpr, PER_MATRIX: tl.constexpr,
    DELIVER: tl.constexpr, PLACED_DTYPE: tl.constexpr, PLACED_UNIT: tl.constexpr,
    UPDATE: tl.constexpr, LR_LOADED: tl.constexpr, SKIP: tl.constexpr, CAUTIOUS: tl.constexpr,
    PRECISION: tl.constexpr, TILE: tl.constexpr, ACROSS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    matrix, row, col = tile_of(tiles)
    if UPDATE and SKIP:  # noqa: SIM102 - known when compiling, unlike the next
        if (look != 0) & (tl.load(state + matrix) != DOUBTFUL):
            return
    row = row.to(tl.int64) * TILE
    col = col.to(tl.int64) * ACROSS
    lanes = tl.arange(0, TILE)
    cols = tl.arange(0, ACROSS)
    inner = tl.arange(0, DEPTH)
    a_start, a_ld = corner(layout, matrix, A_SPACE)
    b_start, b_ld = corner(layout, matrix, B_SPACE)
    depth = a_ld
    if A_TRANSPOSED:
        a_at = a + a_start + row + (inner[:, None] * a_ld + lanes[None, :])
        a_step = DEPTH * a_ld
    else:
        a_at = a + a_start + row * a_ld + (lanes[:, None] * a_ld + inner[None, :])
        a_step = DEPTH
    if B_TRANSPOSED:
        b_at = b + b_start + col * b_ld + (cols[:, None] * b_ld + inner[None, :])
        b_step = DEPTH
    else:
        b_at = b + b_start + col + (inner[:, None] * b_ld + cols[None, :])
        b_step = DEPTH * b_ld
    acc = tl.zeros((TILE, ACROSS), tl.float32)
    for _ in range(0, depth, DEPTH):
        x, y = tl.load(a_at), tl.load(b_at)
        if A_TRANSPOSED:
            x = tl.trans(x)
        if B_TRANSPOSED:
            y = tl.trans(y)
        acc = multiplied(x, y, acc, PRECISION)
        a_at += a_step
        b_at += b_step
    if PER_MATRIX:
        alpha *= tl.load(factors + matrix * columns + alpha_column)
        beta *= tl.load(factors + matrix * columns + beta_column)
    value = acc * alpha
    start, ld = corner(layout, matrix, WIDE)
    here = start + row * ld + col
    block = lanes[:, None] * ld + cols[None, :]
    if HAS_C:
        value += beta * tl.load(c + here + block).to(tl.float32)
    if DELIVER:
        deliver(
            value, matrix, row, col, lanes, cols, places, layout, state, scales, lr, rate, kept,
            decay, look, PLACED_DTYPE, PLACED_UNIT, UPDATE, LR_LOADED, SKIP, CAUTIOUS,
        )  # fmt: skip
    else:
        tl.store(out + here + block, narrowed(value, out.dtype.element_ty))


class Operand(NamedTuple):
    """A workspace as a factor.

    Attributes:
        values: the workspace.
        space: SHORT, WIDE or LONG.
        transposed: for its square spaces.
    """

    values: Tensor
    space: tl.constexpr = WIDE
    transposed: bool = False


def wide(
    layout: Layout,
    config: Config,
    a: Operand,
    b: Operand,
    out: Tensor | Delivery,
    *,
    alpha: float = 1.0,
    beta: float = 0.0,
    c: Tensor | None = None,
    factors: Tensor | None = None,
    columns: tuple[int, int] = (0, 0),
) -> None:
    """out = alpha A B + beta C, wide; one launch, or up to three into the caller's tensors.

    One more for each of these looks at parameters that may leave their range, see `Delivery`.

    Args:
        layout, config: of all workspaces.
        a, b: SHORT times WIDE, or WIDE times LONG.
        out: a wide workspace other than b's, or the caller's matrices.
        c: a wide workspace.
        factors: fp32 (matrices, k); alpha and beta are multiplied by the `columns` of it.
    """
    delivery = out if isinstance(out, Delivery) else None
    target = a.values if isinstance(out, Delivery) else out
    arguments, constants, launches = delivery_of(delivery, layout)
    looks = (0,) if delivery is None else delivery.looks
    arch, table = architecture(layout.device), layout.table
    for unit, chosen in launches:
        # Element by element a large tile takes more registers than there are.
        spread = delivery is not None and unit < ALIGNED and config.tile > _LARGEST_SPREAD
        fitting = config.halved() if spread else config
        # So does what becomes of a tile that is no square in the caller's tensors.
        across = fitting.across if delivery is None else 0
        parts = layout.by_width(across, chosen)
        for (across, own), look in itertools.product(parts, looks):
            tiles = layout.tiles(fitting.tile, own, across=across)
            launch(
                _wide_kernel,
                tiles.shape[0],
                a.values,
                b.values,
                a.values if c is None else c,
                target,
                table,
                tiles,
                table if factors is None else factors,
                0 if factors is None else factors.shape[1],
                alpha,
                beta,
                *columns,
                *arguments,
                look,
                HAS_C=c is not None,
                PER_MATRIX=factors is not None,
                DELIVER=delivery is not None,
                PLACED_UNIT=unit,
                **constants,
                ACROSS=across or fitting.tile,
                **_constants(arch, fitting, (*a[1:], *b[1:])),
            )


class RepeatedWide:
    """alpha A B + beta C of workspaces, A SHORT and the others WIDE, launched again and again."""

    def __init__(self, layout: Layout, config: Config) -> None:
        self._table = layout.table
        self._nothing = delivery_of(None, layout)[0]
        arch = architecture(layout.device)
        self._launches = []
        for across, own in layout.by_width(config.across, None):
            tiles = layout.tiles(config.tile, own, across=across)
            options = {
                "HAS_C": True,
                "PER_MATRIX": False,
                "DELIVER": False,
                "PLACED_UNIT": STRIDED.value,
                **_NOTHING,
                "ACROSS": across or config.tile,
                **_constants(arch, config, (SHORT, False, WIDE, False)),
            }
            self._launches.append((tiles, tiles.shape[0], options))

    def __call__(
        self, a: Tensor, b: Tensor, out: Tensor, alpha: float, beta: float, c: Tensor
    ) -> None:
        """A launch for every shape of tiles."""
        table = self._table
        for tiles, programs, options in self._launches:
            launch(
                _wide_kernel,
                programs,
                a,
                b,
                c,
                out,
                table,
                tiles,
                table,
                0,
                alpha,
                beta,
                0,
                0,
                *self._nothing,
                0,
                **options,
            )


@functools.lru_cache(maxsize=256)
def _constants(
    arch: str, config: Config, operands: tuple[tl.constexpr, bool, tl.constexpr, bool]
) -> dict[str, object]:
    """Compile-time arguments, some of them."""
    return {
        "A_SPACE": operands[0],
        "A_TRANSPOSED": operands[1],
        "B_SPACE": operands[2],
        "B_TRANSPOSED": operands[3],
        "PRECISION": precision_of(arch),
        **config.options(),
    }
