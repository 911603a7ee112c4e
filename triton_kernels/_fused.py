"""What steps with factors launch for the matrices of a group, see `FactorGroup`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ._config import PASS_WARPS, architecture, precision_of
from ._device import DTYPES, launch
from ._factor_kernels import (
    _adam_kernel,
    _factors_kernel,
    _look_kernel,
    _rates_kernel,
    _turn_kernel,
    _write_kernel,
)
from ._factor_lists import (
    GRADS,
    LONG_FACTOR,
    LONG_TURN,
    MOMENTA,
    PARAMS,
    SHORT_FACTOR,
    SHORT_TURN,
    SQUARES,
    FactorGroup,
    factor_layout,
)
from ._groups import Table
from ._layout import (
    ALIGNED_NUMBERS,
    CHUNK_COLS,
    CHUNK_ROWS,
    LONG,
    SHORT,
    WIDE,
    Layout,
    kept,
    padded,
    upload,
)
from ._pack import Mix, pack, summarize
from ._places import Places
from .symmetric_matmul import Terms, symmetric

LINES = 16  # rows or columns that one program sums over
_ALONG = 128
_RATES = 128

# Which sides of `Fused.turned` are flipped: into bases, out of them, and between roots.
INTO = True, False
OUT_OF = False, True
BETWEEN = False, False

# Of sums that are looked at before they are rounded.
_MOST = torch.finfo(torch.float32).max * (1.0 - 2.0**-12)


@kept(256)
def _numbers(values: tuple[float, ...], device: torch.device) -> Tensor:
    return upload(torch.tensor(values, dtype=torch.float64, device="cpu"), device)


@kept()
def blocks_of_lines(layout: Layout, short: bool) -> Tensor:
    """(matrix, block) of the lines of one side."""
    pairs = [
        (i, block)
        for i, shape in enumerate(layout.shapes)
        for block in range(-(-(min(shape) if short else max(shape)) // LINES))
    ]
    return upload(torch.tensor(pairs, dtype=torch.int32, device="cpu"), layout.device)


@kept()
def line_starts(layout: Layout) -> tuple[Tensor, int]:
    """Where numbers a row and a column of every matrix begin, and how many there are.

    Those of its shorter side come first.
    """
    counts = torch.tensor([0, *map(sum, layout.shapes)], dtype=torch.int64, device="cpu").cumsum(0)
    return upload(counts[:-1], layout.device), int(counts[-1])


class Rates(NamedTuple):
    """How far the matrix in every slot goes, fp32.

    Attributes:
        rates: of the update.
        keeps: what of a parameter stays.
        firsts, seconds: what moments are multiplied by, for their bias.
        steps: int64, taken up to now.
    """

    rates: Tensor
    keeps: Tensor
    firsts: Tensor
    seconds: Tensor
    steps: Tensor


def rates_of(
    steps: Tensor,
    lr: Tensor,
    decay: float,
    betas: tuple[float, float],
    *,
    times_kept: bool = False,
    bias: bool = False,
    debias: tuple[bool, bool] = (False, False),
) -> Rates:
    """The rates of a step.

    Args:
        steps: int64, of every slot.
        lr: one number, on any device.
        decay: weight decay over the learning rate.
        betas: of the moments.
        times_kept: the rate is multiplied by what of a parameter stays.
        bias: and by the bias corrections of Adam.
        debias: whether the moments are corrected for theirs instead.
    """
    size = padded(len(steps), ALIGNED_NUMBERS)
    out = torch.empty(4, size, dtype=torch.float32, device=steps.device)
    loaded = lr.device.type != "cpu"
    rate = 0.0 if loaded else float(lr)
    kept = 1.0 - rate * decay
    launch(
        _rates_kernel,
        -(-len(steps) // _RATES),
        steps,
        _numbers(betas, steps.device),
        lr if loaded else steps,
        out,
        len(steps),
        size,
        rate * kept if times_kept else rate,
        kept,
        decay,
        LR_LOADED=loaded,
        TIMES_KEPT=times_kept,
        BIAS=bias,
        FIRST=debias[0],
        SECOND=debias[1],
        BLOCK=_RATES,
    )
    return Rates(*out.unbind(), steps)  # type: ignore[call-arg]


class Moments(NamedTuple):
    """How much of the moments stays, and what of the new is added."""

    beta1: float
    fresh1: float
    beta2: float
    fresh2: float


class Fused:
    """The matrices of a group in a step.

    Attributes:
        group: see `FactorGroup`.
        layout: of its workspaces.
        state: int32, of every matrix.
        rates: of the same.
    """

    def __init__(self, group: FactorGroup, table: Table, states: Tensor, rates: Rates) -> None:
        self.group = group
        self.layout = factor_layout(group, states.device)
        self.state = states[group.slots]
        self._table = table
        self.rates = Rates(*(x[group.slots] for x in rates))

    def places(self, which: int) -> Places:
        """Those of one of the lists."""
        return self.group.places(self._table, which)

    def packed(self, *, negate: bool, bounded: bool = False) -> Tensor:
        """Gradients in a workspace, 0 where they or the momenta are not finite.

        With `bounded` those are marked too whose squares would leave float32.
        """
        mix = Mix(self.places(GRADS), negate=negate, beside=self.places(MOMENTA))
        summary = summarize(mix, self.layout, self.state, bounded=bounded)
        return pack(mix, self.layout, summary, torch.float32, unit_scale=False)

    def turned(self, x: Tensor, flips: tuple[bool, bool]) -> Tensor:
        """S X T, where each of the two may be flipped."""
        group, config = self.group, self.group.config
        tiles = self.layout.tiles(config.tile)
        sides = (group.short, SHORT_TURN, True), (group.long, LONG_TURN, False)
        for (present, which, left), flipped in zip(sides, flips, strict=True):
            if not present:
                continue
            squares = self.places(which)
            out = self.layout.empty(WIDE, torch.float32)
            launch(
                _turn_kernel,
                tiles.shape[0],
                x,
                squares.table,
                out,
                self.layout.table,
                tiles,
                LEFT=left,
                FLIPPED=flipped,
                UNIT=squares.unit,
                PRECISION=precision_of(architecture(self.layout.device)),
                **config.options(),
            )
            x = out
        return x

    def check_factors(self, x: Tensor, *, beta: float, weight: float) -> None:
        """Marks where factors would not be finite."""
        for present, which, short in self._sides():
            if present:
                blocks = blocks_of_lines(self.layout, short)
                launch(
                    _factors_kernel,
                    blocks.shape[0],
                    x,
                    self.places(which).table,
                    self.layout.table,
                    blocks,
                    self.state,
                    beta,
                    weight,
                    _MOST,
                    WIDE_LINES=short,
                    LINES=LINES,
                    ALONG=_ALONG,
                )

    def add_to_factors(self, x: Tensor, *, beta: float, weight: float) -> None:
        """F <- beta F + weight X X^T, or X^T X, of what is not marked."""
        for present, which, short in self._sides():
            if present:
                symmetric(
                    self.layout,
                    self.group.config,
                    x,
                    x,
                    self.places(which),
                    Terms(alpha=weight, beta=beta),
                    space=WIDE,
                    out_space=SHORT if short else LONG,
                    transposed=not short,
                    add=True,
                    state=self.state,
                )

    def _sides(self) -> tuple[tuple[bool, int, bool], ...]:
        group = self.group
        return (group.short, SHORT_FACTOR, True), (group.long, LONG_FACTOR, False)

    def adam(self, x: Tensor, moments: Moments, eps: float) -> Tensor:
        """What moments of X, after this step, make the direction of the step."""
        out = self.layout.empty(WIDE, torch.float32)
        m, v = self.places(MOMENTA), self.places(SQUARES)
        launch(
            _adam_kernel,
            self.layout.chunks.shape[0],
            x,
            out,
            self.layout.table,
            self.layout.chunks,
            self.state,
            m.table,
            v.table,
            *moments,
            eps,
            **constants_of(MOMENTUM=m, SQUARE=v),
        )
        return out

    def write(
        self,
        update: Tensor,
        x: Tensor,
        moments: Moments,
        rates: Tensor,
        *,
        squares: bool = True,
        lines: Tensor | None = None,
    ) -> None:
        """Marks where parameters would not be finite, and writes those of the rest with moments.

        Args:
            update: what parameters move by, times `rates` of every matrix.
            x: what moments are of.
            moments: how they move.
            rates: see above.
            squares: whether there are second moments.
            lines: fp32, see `line_starts`, of which second moments are products; None: of squares.
        """
        w, m = self.places(PARAMS), self.places(MOMENTA)
        v = self.places(SQUARES) if squares else m
        keeps, steps = self.rates.keeps, self.rates.steps
        chunks = self.layout.chunks
        launch(
            _look_kernel,
            chunks.shape[0],
            update,
            self.layout.table,
            chunks,
            self.state,
            w.table,
            rates,
            keeps,
            **constants_of(PARAM=w),
        )
        launch(
            _write_kernel,
            chunks.shape[0],
            update,
            x,
            self.layout.table,
            chunks,
            self.state,
            w.table,
            m.table,
            v.table,
            rates,
            keeps,
            steps,
            x if lines is None else lines,
            line_starts(self.layout)[0],
            *moments,
            SQUARES=squares,
            OUTER=lines is not None,
            **constants_of(PARAM=w, MOMENTUM=m, SQUARE=v),
        )


def constants_of(**places: Places) -> dict[str, object]:
    """Compile-time arguments of a pass over chunks."""
    found: dict[str, object] = {
        "CHUNK_ROWS": CHUNK_ROWS,
        "CHUNK_COLS": CHUNK_COLS,
        "num_warps": PASS_WARPS,
    }
    for name, of in places.items():
        found[name] = DTYPES[of.dtype]
        found["UNIT" if name == "PARAM" else f"{name}_UNIT"] = of.unit
    return found
