"""Products of batches of equally shaped matrices, (count, rows, columns) as torch has them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
import triton.language as tl
from torch import Tensor

from ._config import architecture, config_for
from ._layout import (
    LONG,
    SHORT,
    WIDE,
    Layout,
    kept,
    layout_of,
    padded,
    upload,
)
from ._matmul import Operand, wide
from ._pack import Mix, Summary, pack, summarize
from ._places import matrices_of, places_of
from .symmetric_matmul import Terms, symmetric


def product(a: Tensor, b: Tensor) -> Tensor:
    """A B in fp32, accumulated in the same order whatever the size of the batch.

    Args:
        a: (count, p, k) fp32, or 16-bit as b.
        b: (count, k, q).
    """
    count, p, k = a.shape
    q = b.shape[-1]
    if a.dtype != b.dtype:
        a, b = a.float(), b.float()
    config = config_for(architecture(a.device), a.dtype, min(p, k, q))
    rows, inner, cols = (padded(size, config.tile) for size in (p, k, q))
    out = torch.empty(count, rows, cols, dtype=torch.float32, device=a.device)
    wide(
        _layout(count, rows, inner, cols, a.device),
        config,
        Operand(_framed(a, rows, inner), SHORT),
        Operand(_framed(b, inner, cols), LONG),
        out,
    )
    return out[:, :p, :q]


def _framed(x: Tensor, rows: int, cols: int) -> Tensor:
    """x with zeros around."""
    return F.pad(x, (0, cols - x.shape[-1], 0, rows - x.shape[-2])).contiguous()


class _ProductLayout(Layout):
    """Left factors as SHORT, right ones as LONG, products of any shape as WIDE."""

    def tiles(
        self,
        tile: int,
        chosen: tuple[int, ...] | None = None,
        space: tl.constexpr = WIDE,
        across: int = 0,
    ) -> Tensor:
        rows, cols = self.shapes[0]
        return _product_tiles(self.count, rows // tile, cols // (across or tile), self.device)

    def by_width(
        self, across: int, chosen: tuple[int, ...] | None
    ) -> tuple[tuple[int, tuple[int, ...] | None], ...]:
        return ((0 if across and self.shapes[0][1] % across else across, chosen),)


@kept()
def _product_tiles(count: int, rows: int, cols: int, device: torch.device) -> Tensor:
    grid = torch.cartesian_prod(
        *(torch.arange(size, dtype=torch.int64, device="cpu") for size in (count, cols, rows))
    )
    return upload(grid[:, [0, 2, 1]].to(torch.int32), device)


@kept()
def _layout(count: int, rows: int, inner: int, cols: int, device: torch.device) -> Layout:
    sizes = rows * inner, rows * cols, inner * cols
    table = [
        (rows, cols, 0, i * sizes[0], inner, i * sizes[1], cols, i * sizes[2], cols)
        for i in range(count)
    ]
    nothing = torch.empty(0, 3, dtype=torch.int32, device=device)
    numbers = upload(torch.tensor(table, dtype=torch.int64, device="cpu"), device)
    shapes = ((rows, cols),) * count
    return _ProductLayout(shapes, (1, 1), device, numbers, sizes, nothing, nothing)


def from_both_sides(x: Tensor, left: Tensor | None, right: Tensor | None) -> Tensor:
    """left X right in the cheaper order; None stands for the identity."""
    if left is None or right is None:
        x = x if left is None else product(left, x)
        return x if right is None else product(x, right)
    p, m, n, q = *left.shape[-2:], *right.shape[-2:]
    if p * n * (m + q) <= m * q * (n + p):
        return product(product(left, x), right)
    return product(left, product(x, right))


class Packed:
    """A batch in padded workspaces, for its symmetric products.

    Attributes:
        layout: of the workspaces.
        summary: of the matrices.
    """

    def __init__(self, x: Tensor) -> None:
        m, n = x.shape[-2:]
        dtype = x.dtype
        self._config = config_for(architecture(x.device), dtype, min(m, n))
        given = matrices_of(x)
        self.layout = layout_of(((m, n),) * len(given), (self._config.tile,) * 2, x.device)
        mix = Mix(places_of(given, dtype, x.device))
        self.summary: Summary = summarize(mix, self.layout)
        self._wide = pack(mix, self.layout, self.summary, dtype, unit_scale=False)
        self._tall = m > n

    def add_gram(
        self, factors: Sequence[Tensor], side: int, *, beta: float, weight: float, state: Tensor
    ) -> None:
        """F <- beta F + weight X X^T in place (side -2), or X^T X (-1), where `state` allows it."""
        long = (side == -2) == self._tall
        places = [place for factor in factors for place in matrices_of(factor)]
        symmetric(
            self.layout,
            self._config,
            self._wide,
            self._wide,
            places_of(places, factors[0].dtype, self.layout.device),
            Terms(alpha=weight, beta=beta),
            space=WIDE,
            out_space=LONG if long else SHORT,
            transposed=long,
            add=True,
            state=state,
        )


def gram(x: Tensor, space: tl.constexpr = SHORT) -> Tensor:
    """X^T X of (count, n, n) fp32 matrices, exactly symmetric."""
    count, n, _ = x.shape
    config = config_for(architecture(x.device), x.dtype, n)
    size = padded(n, config.tile)
    layout = layout_of(((n, n),) * count, (config.tile,) * 2, x.device)
    out = torch.empty(count, size, size, dtype=torch.float32, device=x.device)
    framed = _framed(x, size, size)
    symmetric(layout, config, framed, framed, out, space=space, transposed=True)
    return out[:, :n, :n]


def flattened(x: Tensor) -> Tensor:
    """(..., m, n) as (count, m, n)."""
    return x.reshape(-1, *x.shape[-2:])


def scaled_by(x: Tensor, exponent: Tensor) -> Tensor:
    """x 2^exponent in two factors, each in range; exact where the result is normal."""
    half = torch.div(exponent, 2, rounding_mode="floor")
    first, second = (torch.exp2(e.double()).to(x.dtype) for e in (half, exponent - half))
    return x * first * second
