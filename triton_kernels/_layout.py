"""Where the matrices of a list stand in padded workspaces, and tables that are kept on a device.

Workspaces hold the matrices oriented to be wide (s x l, s <= l), rows and columns padded with zeros
to whole tiles, so that products need no masks and every row is aligned whatever the caller's shapes
are. Zero rows and columns stay zero under everything that is done there.
"""

from __future__ import annotations

import functools
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ParamSpec, TypeVar

import torch
import triton.language as tl
from spectral_kernels._backend import is_capturing
from torch import Tensor

from ._device import IS_INTERPRETED, LAYOUT_COLUMNS

# The three shapes that a matrix of a layout may have.
SHORT = tl.constexpr(0)  # s x s
WIDE = tl.constexpr(1)  # s x l
LONG = tl.constexpr(2)  # l x l

# Columns of a layout's table: rows and columns as the caller has them, whether they are swapped,
# then offset and leading dimension in each of the three spaces.
ROWS = tl.constexpr(0)
COLS = tl.constexpr(1)
TALL = tl.constexpr(2)
COLUMNS = LAYOUT_COLUMNS

# Elements of a chunk of the passes that read the caller's matrices. A program of the interpreter
# costs the same whatever its size.
CHUNK_ROWS, CHUNK_COLS = (64, 256) if IS_INTERPRETED else (32, 128)

# Numbers of 32 bits in 16 bytes. Triton compiles anew for addresses that are no multiples of these,
# so that they would have it do so for lengths of lists.
ALIGNED_NUMBERS = 4

_BAND = 8  # rows of tiles that share their columns in the cache

Shape = tuple[int, int]

P = ParamSpec("P")
R = TypeVar("R")

# What CUDA graphs read; nobody tells when a graph is gone.
_held: list[object] = []


def _stream() -> int:
    """The current stream of the current device, on which tables are uploaded."""
    return torch.cuda.current_stream().cuda_stream if torch.cuda.is_initialized() else 0


# Streams that a table is kept for; work on others uploads it anew.
_MOST_STREAMS = 16


def kept(most: int = 1024) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """functools.lru_cache for functions whose results hold what `upload` brought to a device.

    A result is used on the stream that it was uploaded on, which has it when later work runs, and
    may reuse its memory once it is dropped. A CUDA graph reads its tables at every replay, so what
    one uses stays for good; what is uploaded while one is recorded is there only after a replay,
    and is kept for nobody else.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        known: OrderedDict[object, dict[int, R]] = OrderedDict()

        @functools.wraps(function)
        def found(*args: P.args, **kwargs: P.kwargs) -> R:
            key = args, tuple(kwargs.items())
            by_stream = known.get(key, {})
            if is_capturing():
                result = next(iter(by_stream.values())) if by_stream else function(*args, **kwargs)
                _held.append(result)
                return result
            stream = _stream()
            if stream not in by_stream:
                by_stream[stream] = function(*args, **kwargs)
                known[key] = by_stream
                if len(by_stream) > _MOST_STREAMS:
                    del by_stream[next(iter(by_stream))]
            known.move_to_end(key)
            if len(known) > most:
                known.popitem(last=False)
            return by_stream[stream]

        found.cache_clear = known.clear  # type: ignore[attr-defined]
        return found

    return decorate


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A small table on the device, without waiting for it."""
    if device.type == "cpu":
        return table.contiguous()
    source = table.contiguous().pin_memory()
    result = source.to(device, non_blocking=True)
    if is_capturing():
        _held.append((source, result))  # every replay copies it again
    return result


@dataclass(frozen=True, eq=False)
class Layout:
    """Workspaces of a list of matrices; one object, see `layout_of`, for all lists of their shapes.

    Attributes:
        shapes: (m, n) of every matrix.
        padding: short and long sides are padded to multiples of it.
        device: where they are.
        table: int64, see the columns above.
        sizes: elements of a workspace in each space.
        chunks: (matrix, row, column) of every chunk of the padded matrices, as the caller has them.
        spans: (first, count) of the chunks of every matrix.
    """

    shapes: tuple[Shape, ...]
    padding: tuple[int, int]
    device: torch.device
    table: Tensor
    sizes: tuple[int, int, int]
    chunks: Tensor
    spans: Tensor
    _made: dict[object, Tensor] = field(default_factory=dict, repr=False)
    _split: dict[object, tuple[tuple[int, tuple[int, ...] | None], ...]] = field(
        default_factory=dict, repr=False
    )

    @property
    def count(self) -> int:
        """The number of matrices."""
        return len(self.shapes)

    @functools.cached_property
    def shortest(self) -> int:
        """The shortest side of any matrix."""
        return min(map(min, self.shapes))

    def empty(self, space: tl.constexpr, dtype: torch.dtype) -> Tensor:
        """An uninitialised workspace."""
        return torch.empty(self.sizes[space.value], dtype=dtype, device=self.device)

    def triangle(self, space: tl.constexpr, tile: int) -> Tensor:
        """(matrix, row, column) of the tiles on and below the diagonals of square matrices."""
        return self._table(_tiles, tile, space.value, True, None)

    def triangle_spans(self, space: tl.constexpr, tile: int) -> Tensor:
        """(first, count) of the tiles of every matrix in `triangle`."""
        return self._table(_triangle_spans, tile, space.value)

    def tiles(
        self,
        tile: int,
        chosen: tuple[int, ...] | None = None,
        space: tl.constexpr = WIDE,
        across: int = 0,
    ) -> Tensor:
        """(matrix, row, column) of all tiles, of all matrices or of some of them.

        Tiles are `across` columns wide, or square.
        """
        return self._table(_tiles, tile, space.value, False, chosen, across)

    def by_width(
        self, across: int, chosen: tuple[int, ...] | None
    ) -> tuple[tuple[int, tuple[int, ...] | None], ...]:
        """The matrices whose longer sides are multiples of `across`, and with 0 all others."""
        if not across:
            return ((0, chosen),)
        key = across, chosen
        if key not in self._split:
            own = tuple(range(self.count)) if chosen is None else chosen
            fits = [_sides(self.shapes[i], self.padding)[1] % across == 0 for i in own]
            parts = {
                width: tuple(i for i, fit in zip(own, fits, strict=True) if fit == bool(width))
                for width in (across, 0)
            }
            self._split[key] = tuple((width, part) for width, part in parts.items() if part)
        return self._split[key]

    def _table(self, make: Callable[..., Tensor], *key: object) -> Tensor:
        """A table of one of the functions below, which is on the stream that this layout is on."""
        found = self._made.get((make, key))
        if found is None:
            found = make(self, *key)
            if not is_capturing():
                self._made[make, key] = found
        return found


def padded(size: int, padding: int) -> int:
    """The next multiple of `padding`."""
    return -(-size // padding) * padding


def _sides(shape: Shape, padding: tuple[int, int]) -> tuple[int, int]:
    """Short and long side, padded."""
    return padded(min(shape), padding[0]), padded(max(shape), padding[1])


@kept()
def layout_of(shapes: tuple[Shape, ...], padding: tuple[int, int], device: torch.device) -> Layout:
    """The layout of matrices of these shapes."""
    rows, chunks, spans = [], [], []
    at, chunk_count = [0, 0, 0], 0
    for i, (m, n) in enumerate(shapes):
        short, long = _sides((m, n), padding)
        rows.append((m, n, int(m > n), at[0], short, at[1], long, at[2], long))
        at = [at[0] + short * short, at[1] + short * long, at[2] + long * long]
        height, width = (long, short) if m > n else (short, long)
        grid = _grid(i, -(-height // CHUNK_ROWS), -(-width // CHUNK_COLS))
        spans.append((chunk_count, len(grid)))
        chunk_count += len(grid)
        chunks.append(grid)
    return Layout(
        shapes,
        padding,
        device,
        upload(torch.tensor(rows, dtype=torch.int64, device="cpu"), device),
        (at[0], at[1], at[2]),
        upload(torch.cat(chunks), device),
        upload(torch.tensor(spans, dtype=torch.int32, device="cpu"), device),
    )


@kept()
def _tiles(
    layout: Layout,
    tile: int,
    space: int,
    triangular: bool,
    chosen: tuple[int, ...] | None,
    across: int = 0,
) -> Tensor:
    grids = []
    for i in range(layout.count) if chosen is None else chosen:
        short, long = _sides(layout.shapes[i], layout.padding)
        height = long if space == LONG.value else short
        width = short if space == SHORT.value else long
        grid = _grid(i, height // tile, width // (across or tile))
        grid = grid[grid[:, 1] >= grid[:, 2]] if triangular else grid
        grids.append(grid[(grid[:, 1] // _BAND).argsort(stable=True)])
    return upload(torch.cat(grids), layout.device)


@kept()
def _triangle_spans(layout: Layout, tile: int, space: int) -> Tensor:
    sides = [_sides(shape, layout.padding)[space == LONG.value] // tile for shape in layout.shapes]
    counts = torch.tensor(
        [side * (side + 1) // 2 for side in sides], dtype=torch.int32, device="cpu"
    )
    return upload(torch.stack([counts.cumsum(0).int() - counts, counts], 1), layout.device)


def _grid(matrix: int, height: int, width: int) -> Tensor:
    """(matrix, row, column), rows varying fastest."""
    pairs = torch.cartesian_prod(
        *(torch.arange(size, dtype=torch.int32, device="cpu") for size in (width, height))
    ).flip(1)
    return torch.cat([torch.full_like(pairs[:, :1], matrix), pairs], 1)
