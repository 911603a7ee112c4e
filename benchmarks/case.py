"""What a benchmark is: one operation on one shape in one dtype, ours beside named contenders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .inputs import parameter_shapes

OURS = "spectral_kernels"
MEMORY = "memory"

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

# Useful FLOPs by the rate they run at ("fp64", "fp32" or "bf16"), and under "memory" the bytes of
# all operands, read or written once.
Work = Mapping[str, float]

# The matrices of a list of parameters.
Shapes = tuple[tuple[int, int], ...]


@dataclass
class Contender:
    """One way to do the work.

    Attributes:
        name: as printed.
        run: what is timed.
        output: what is compared with float64, from a fresh state; None: what `run` returns.
        judged: whether it computes the same function, so that its error means something.
        work: what it does itself, where that is known: for the share of the ceiling that it has.
        torch: whether it is torch's own way, which a user has without any library.
    """

    name: str
    run: Callable[[], Any]
    output: Callable[[], Any] | None = None
    judged: bool = True
    work: Work | None = None
    torch: bool = False


@dataclass
class Problem:
    """A case with its inputs made.

    Attributes:
        contenders: ours first.
        error: relative error of an output against float64; of a list of matrices, one each.
        baseline: what sets the bound on our error: the name of a contender, or the output of plain
            torch in the same storage dtype.
        work: the cheapest ways of doing it within the accuracy rule; () if it is not counted.
        period: calls after which the work repeats (a basis refresh every 10 steps: 10).
    """

    contenders: list[Contender]
    error: Callable[[Any], float | list[float]]
    baseline: str | Callable[[], Any]
    work: Sequence[Work] = ()
    period: int = 1


@dataclass(frozen=True)
class Case:
    """One row group of the table.

    Attributes:
        op: the operator.
        shape: as in "64x128x128", or the name of a list of parameters.
        dtype: the storage dtype.
        build: makes the problem on a device; imports and allocations happen here.
        variant: options that are not the default ones.
        goals: contender -> the speed-up to reach.
        error_goals: contender -> the most that our error may be of its error.
        quick: part of `--quick`.
    """

    op: str
    shape: str
    dtype: torch.dtype
    build: Callable[[torch.device], Problem] = field(compare=False, repr=False)
    variant: str = ""
    goals: Mapping[str, float] = field(default_factory=dict, compare=False)
    error_goals: Mapping[str, float] = field(default_factory=dict, compare=False)
    quick: bool = False

    @classmethod
    def of_matrices(
        cls,
        op: str,
        shape: str | Sequence[int],
        dtype: torch.dtype,
        build: Callable[[tuple[int, ...], torch.dtype, torch.device], Problem],
        *,
        square: bool = False,
        **options: Any,
    ) -> Case:
        """Of matrices of one shape; "1024" is one of 1024 x 1024 where they are square."""
        if isinstance(shape, str):
            shape = square_shape(shape) if square else parse_shape(shape)
        sizes = tuple(shape)
        return cls(op, shape_name(sizes), dtype, partial(build, sizes, dtype), **options)

    @classmethod
    def of_list(
        cls,
        op: str,
        shape: str,
        dtype: torch.dtype,
        build: Callable[[Shapes, torch.dtype, torch.device], Problem],
        **options: Any,
    ) -> Case:
        """Of a step over a list of parameters, see `inputs.parameter_shapes`."""
        return cls(op, shape, dtype, partial(build, parameter_shapes(shape), dtype), **options)

    @property
    def key(self) -> str:
        """Names the case in result files."""
        parts = (self.op, self.shape, dtype_name(self.dtype), self.variant)
        return " ".join(part for part in parts if part)


@dataclass(frozen=True)
class Family:
    """The cases of one file.

    Attributes:
        name: the family.
        ops: the operators it measures.
        cases: the standing list.
        case: any other shape of an operator: (op, shape, dtype).
        acceptance: cases with goals.
        card: what is measured on a card, if that is not the standing list.
    """

    name: str
    ops: tuple[str, ...]
    cases: Callable[[], Iterable[Case]]
    case: Callable[[str, str, torch.dtype], Case]
    acceptance: Callable[[], Iterable[Case]] = tuple
    card: Callable[[], Iterable[Case]] = tuple


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def shape_name(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def parse_shape(shape: str) -> tuple[int, ...]:
    """(64, 128, 128) of "64x128x128"."""
    try:
        sizes = tuple(int(part) for part in shape.split("x"))
    except ValueError:
        sizes = ()
    if len(sizes) < 2 or min(sizes) < 1:
        raise ValueError(f"shape must be like 768x3072 or 64x128x128, not {shape!r}")
    return sizes


def square_shape(shape: str) -> tuple[int, ...]:
    """As `parse_shape`, of square matrices; "1024" is one of 1024 x 1024."""
    sizes = parse_shape(f"{shape}x{shape}" if shape.isdigit() else shape)
    if sizes[-1] != sizes[-2]:
        raise ValueError(f"shape must be of square matrices, not {shape!r}")
    return sizes


def one_by_one(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """A function of matrices on every matrix of some batches in turn, as a batch."""
    each = zip(*(x.flatten(0, -3) for x in batches), strict=True)
    results = torch.stack([function(*matrices) for matrices in each])
    return results.reshape(*batches[0].shape[:-2], *results.shape[-2:])


def relative_error(output: Tensor, exact: Tensor) -> float:
    """The largest ||output - exact||_F / ||exact||_F of a batch; infinite for a NaN."""
    difference = (output.double() - exact).flatten(0, -3) if exact.ndim > 2 else output - exact
    wanted = exact.flatten(0, -3) if exact.ndim > 2 else exact
    ratio = torch.linalg.matrix_norm(difference) / torch.linalg.matrix_norm(wanted)
    return float(ratio.nan_to_num(nan=torch.inf).max())


def list_errors(outputs: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """The relative error of every matrix of a list: as one, a large one would hide a small one."""
    return [relative_error(a, b) for a, b in zip(outputs, exact, strict=True)]


def worst_entry(ours: Sequence[float], baseline: Sequence[float]) -> int:
    """The entry of a list whose error is the largest multiple of its baseline's."""
    tiny = torch.finfo(torch.float64).tiny
    ratios = [a / max(b, tiny) for a, b in zip(ours, baseline, strict=True)]
    return max(range(len(ratios)), key=ratios.__getitem__)


def within_rule(ours: float, baseline: float, dtype: torch.dtype) -> bool:
    """The accuracy rule: at most twice the error of plain torch, and half an ulp of room."""
    room = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps / 2
    return ours <= 2.0 * baseline + room
