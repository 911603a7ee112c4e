"""The options of every list step: names, defaults and ranges, once for all who take them.

A field of a record is an option of the compiled operator, of the same name. Public functions check
what they are given by `checked`; rules of optimizers are made from the same fields; the backends
written in Python take the record itself, see `takes`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, TypeVar, dataclass_transform

import torch
from torch import Tensor

from . import _checks
from ._backend import check_choice, check_list, check_range

NONFINITE = ("skip", "propagate", "raise")
# Of Newton-Schulz iterations.
METHODS = ("auto", "standard", "gram")
NORMS = ("frobenius", "schatten8")
# Of inverse roots and Shampoo.
ROOT_METHODS = ("auto", "iteration", "eigen", "newton", "newton_db")
GRAFTS = ("none", "sgd", "adagrad", "rmsprop", "adam")
GRAFT_EPS_MODES = ("relative", "absolute")
KL_ORDERS = ("sequential", "simultaneous")
# Of DeVA.
DEVA_NORMS = ("schatten", "linf")
VARIANCES = ("momentum", "gradient", "instant", "low_memory", "none")
EPS_MODES = ("relative", "outside", "inside")
# What `optim.DeVA` calls a combination of norm, variance and sign.
DEVA_VARIANTS = {
    "schatten": ("schatten", "momentum", False),
    "instant": ("schatten", "instant", False),
    "sign": ("schatten", "momentum", True),
    "low_memory": ("schatten", "low_memory", True),
    "linf": ("linf", "momentum", False),
}
# Of the public classes DeVASchattenNorm and its sign-stabilised form, DeVASchattenNormIns, and
# DeVAEuclideanNorm; the low-memory one calls a function that does not exist.
_PUBLIC_VARIANCES = {"schatten": ("momentum", "instant"), "linf": ("momentum",)}

# Of the roots of second moments, as in the public code of NorMuon.
NEURON_EPS = 1e-8

Row = Sequence[float]


# What a value may be: `taken` is of what somebody gave, and normalises it; `kept` is the last look
# of an operator at a value of the right kind.


@dataclass(frozen=True)
class Range:
    """Numbers low <= x < high, or <= high if closed; None too if optional."""

    low: float = 0.0
    high: float = math.inf
    closed: bool = False
    optional: bool = False

    def taken(self, name: str, value: Any) -> float | None:
        if type(value) is float and self.low <= value < self.high:
            return value  # what it nearly always is: this runs in every step
        if value is None and self.optional:
            return None
        return _checks.number(name, value, self.low, self.high, include_high=self.closed)

    def kept(self, name: str, value: Any) -> None:
        if not (value is None and self.optional):
            check_range(name, value, self.low, self.high, closed=self.closed)


@dataclass(frozen=True)
class Whole:
    """Integers low..high."""

    low: int
    high: int

    def taken(self, name: str, value: Any) -> int:
        return _checks.integer(name, value, self.low, self.high)

    def kept(self, name: str, value: Any) -> None:
        _checks.integer(name, value, self.low, self.high)


@dataclass(frozen=True)
class Flag:
    """True or False."""

    def taken(self, name: str, value: Any) -> bool:
        return value if type(value) is bool else _checks.flag(name, value)

    def kept(self, name: str, value: Any) -> None:
        pass


@dataclass(frozen=True)
class Choice:
    """One of some names."""

    names: tuple[str, ...]

    def taken(self, name: str, value: Any) -> str:
        return _checks.choice(name, value, self.names)

    def kept(self, name: str, value: Any) -> None:
        check_choice(name, value, self.names)


@dataclass(frozen=True)
class ComputeDtype:
    """A floating-point dtype; None is given for bfloat16."""

    def taken(self, name: str, value: Any) -> torch.dtype:
        if value is None:
            return torch.bfloat16
        self.kept(name, value)
        found: torch.dtype = value
        return found

    def kept(self, name: str, value: Any) -> None:
        if value not in _checks.FLOATS:
            raise TypeError(f"{name} must be float64, float32, bfloat16 or float16, not {value!r}")


COMPUTE_DTYPE = ComputeDtype()

Kind = Range | Whole | Flag | Choice | ComputeDtype


def _field(kind: Kind | None, default: Any = dataclasses.MISSING) -> Any:
    return dataclasses.field(default=default, metadata={"kind": kind})


def _number(default: float | None, high: float = math.inf, *, closed: bool = False) -> Any:
    return _field(Range(0.0, high, closed, optional=default is None), default)


def _flag(default: bool) -> Any:
    return _field(Flag(), default)


def _choice(default: str, names: tuple[str, ...]) -> Any:
    return _field(Choice(names), default)


@dataclass(frozen=True)
class Options:
    """What the records have in common.

    Attributes:
        kinds: option -> what it may be, for every one that has a rule of its own.
        defaults: option -> its default, for every one that has one.
        entry_lists: options with one value an entry of the lists.
    """

    kinds: ClassVar[Mapping[str, Kind]] = {}
    defaults: ClassVar[Mapping[str, Any]] = {}
    entry_lists: ClassVar[tuple[str, ...]] = ()

    def check(self, entries: int) -> None:
        """Raises TypeError or ValueError for a value that no operator can work with."""
        for name, kind in self.kinds.items():
            kind.kept(name, getattr(self, name))
        for name in self.entry_lists:
            check_list(name, getattr(self, name), entries)


Record = TypeVar("Record", bound=Options)


@dataclass_transform(kw_only_default=True, frozen_default=True)
def _record(cls: type[Record]) -> type[Record]:
    """A frozen dataclass that knows what its fields may be."""
    made = dataclass(frozen=True, kw_only=True)(cls)
    fields = dataclasses.fields(made)
    made.kinds = {f.name: kind for f in fields if (kind := f.metadata["kind"]) is not None}
    made.defaults = {f.name: f.default for f in fields if f.default is not dataclasses.MISSING}
    return made


def check_rows(rows: Sequence[Row]) -> None:
    """(a, b, c) for every step of a Newton-Schulz iteration."""
    if not rows or any(len(row) != 3 for row in rows):
        raise ValueError(f"rows must hold (a, b, c) for every step, not {rows!r}")


def check_restarts(rows: Sequence[Row], restarts: Sequence[int]) -> None:
    """Steps before which the Gram form starts anew."""
    if not all(1 <= step < len(rows) for step in restarts):
        raise ValueError(f"restarts must be steps in 1..{len(rows) - 1}, not {tuple(restarts)}")


def check_norm_factor(value: float) -> None:
    """What coefficients ask the norm to be multiplied by."""
    if not 0.0 < value < math.inf:
        raise ValueError(f"norm_factor must be positive and finite, not {value}")


@_record
class NewtonSchulzOptions(Options):
    """Of `newton_schulz`."""

    rows: Sequence[Row] = _field(None)
    method: str = _choice("auto", METHODS)
    restarts: Sequence[int] = _field(None, ())
    compute_dtype: torch.dtype = _field(COMPUTE_DTYPE)
    eps: float = _number(0.0)
    norm: str = _choice("frobenius", NORMS)
    norm_factor: float = _field(None, 1.0)

    def check(self, entries: int) -> None:
        super().check(entries)
        check_rows(self.rows)
        check_restarts(self.rows, self.restarts)
        check_norm_factor(self.norm_factor)


@_record
class MuonOptions(Options):
    """Of `muon_step_`."""

    entry_lists: ClassVar[tuple[str, ...]] = ("scales",)

    momentum: float = _number(0.95, 1.0)
    nesterov: bool = _flag(True)
    beta2: float | None = _number(None, 1.0)
    neuron_eps: float = _number(NEURON_EPS)
    weight_decay: float = _number(0.0)
    cautious: bool = _flag(False)
    hyperball: bool = _flag(False)
    rows: Sequence[Row] = _field(None)
    scales: Sequence[float] = _field(None)
    method: str = _choice("auto", METHODS)
    restarts: Sequence[Sequence[int]] = _field(None)
    compute_dtype: torch.dtype = _field(COMPUTE_DTYPE, torch.bfloat16)
    eps: float = _number(0.0)
    norm: str = _choice("frobenius", NORMS)
    norm_factor: float = _field(None, 1.0)
    maximize: bool = _flag(False)
    nonfinite: str = _choice("skip", NONFINITE)

    def compute_dtype_of(self, param: Tensor) -> torch.dtype:
        """What a parameter's products are computed in: float64 parameters use float64."""
        return torch.float64 if param.dtype == torch.float64 else self.compute_dtype

    def iteration_of(self, param: Tensor, restarts: Sequence[int]) -> NewtonSchulzOptions:
        """What a parameter's momentum is iterated on by."""
        return NewtonSchulzOptions(
            rows=self.rows,
            method=self.method,
            restarts=restarts,
            compute_dtype=self.compute_dtype_of(param),
            eps=self.eps,
            norm=self.norm,
            norm_factor=self.norm_factor,
        )

    def restarts_of(self, entries: int) -> list[tuple[int, ...]]:
        """Those of every entry; no list at all is none for any."""
        return [tuple(steps) for steps in self.restarts] or [()] * entries

    def check(self, entries: int) -> None:
        super().check(entries)
        check_hyperball(hyperball=self.hyperball, weight_decay=self.weight_decay)
        check_rows(self.rows)
        restarts = self.restarts_of(entries)
        check_list("restarts", restarts, entries)
        for steps in dict.fromkeys(restarts):  # few are not alike
            check_restarts(self.rows, steps)
        check_norm_factor(self.norm_factor)


def check_hyperball(*, hyperball: bool, weight_decay: float) -> None:
    """On a sphere nothing decays."""
    if hyperball and weight_decay != 0.0:
        raise ValueError(
            f"a hyperball undoes weight decay: weight_decay must be 0, not {weight_decay}"
        )


@_record
class ShampooOptions(Options):
    """Of `shampoo_step_`."""

    entry_lists: ClassVar[tuple[str, ...]] = ("refresh",)

    beta1: float = _number(0.9, 1.0)
    beta2: float = _number(0.95, 1.0, closed=True)
    graft_beta2: float = _number(0.95, 1.0)
    root: int = _field(Whole(1, 8), 4)
    ridge: float = _number(0.0)
    relative_ridge: float = _number(1e-6)
    root_method: str = _choice("auto", ROOT_METHODS)
    weight_decay: float = _number(0.0)
    graft: str = _choice("adam", GRAFTS)
    graft_eps: float = _number(1e-8)
    graft_eps_mode: str = _choice("relative", GRAFT_EPS_MODES)
    kl: bool = _flag(False)
    kl_order: str = _choice("sequential", KL_ORDERS)
    debias: bool = _flag(True)
    maximize: bool = _flag(False)
    nonfinite: str = _choice("skip", NONFINITE)
    refresh: Sequence[int] = _field(None)

    @property
    def weight(self) -> float:
        """1 - beta2, or 1 for beta2 = 1, which is AdaGrad's sum."""
        return 1.0 - self.beta2 if self.beta2 < 1.0 else 1.0

    @property
    def squares(self) -> bool:
        """Whether the graft has a second moment."""
        return self.graft not in ("none", "sgd")

    def check(self, entries: int) -> None:
        super().check(entries)
        check_kl(kl=self.kl, root=self.root)
        check_root_method(self.root_method, self.root)


def check_kl(*, kl: bool, root: int) -> None:
    """KL-Shampoo has square roots."""
    if kl and root != 2:
        raise ValueError(
            f"kl weights its factors by inverse square roots: root must be 2, not {root}"
        )


def check_root_method(method: str, p: int) -> None:
    """Denman-Beavers has square roots of square roots."""
    if method == "newton_db" and p not in (2, 4, 8):
        raise ValueError(f"newton_db takes square roots: p must be 2, 4 or 8, not {p}")


@_record
class SoapOptions(Options):
    """Of `soap_step_`."""

    entry_lists: ClassVar[tuple[str, ...]] = ("refresh",)

    beta1: float = _number(0.95, 1.0)
    beta2: float = _number(0.95, 1.0)
    shampoo_beta: float = _number(0.95, 1.0)
    eps: float = _number(1e-8)
    weight_decay: float = _number(0.0)
    correct_bias: bool = _flag(True)
    normalize_grads: bool = _flag(False)
    skip_first: bool = _flag(True)
    permute_squares: bool = _flag(False)
    maximize: bool = _flag(False)
    nonfinite: str = _choice("skip", NONFINITE)
    refresh: Sequence[int] = _field(None)


@_record
class DevaOptions(Options):
    """Of `deva_step_`."""

    entry_lists: ClassVar[tuple[str, ...]] = ("scales", "refresh")

    beta1: float = _number(0.95, 1.0)
    beta2: float = _number(0.95, 1.0)
    shampoo_beta: float = _number(0.95, 1.0)
    eps: float = _number(1e-8)
    eps_mode: str = _choice("relative", EPS_MODES)
    weight_decay: float = _number(0.0)
    norm: str = _choice("schatten", DEVA_NORMS)
    variance: str = _choice("momentum", VARIANCES)
    nesterov: bool = _flag(True)
    sign: bool = _flag(False)
    correct_bias: bool = _flag(True)
    normalize_grads: bool = _flag(False)
    rows: Sequence[Row] = _field(None)
    scales: Sequence[float] = _field(None)
    compute_dtype: torch.dtype = _field(COMPUTE_DTYPE, torch.bfloat16)
    reference: bool = _flag(False)
    maximize: bool = _flag(False)
    nonfinite: str = _choice("skip", NONFINITE)
    refresh: Sequence[int] = _field(None)

    def compute_dtype_of(self, param: Tensor) -> torch.dtype:
        """What a parameter's products are computed in: float64 parameters use float64."""
        return torch.float64 if param.dtype == torch.float64 else self.compute_dtype

    def iteration_of(self, param: Tensor) -> NewtonSchulzOptions:
        """What a parameter's direction is iterated on by."""
        dtype = self.compute_dtype_of(param)
        return NewtonSchulzOptions(
            rows=self.rows, method="standard", compute_dtype=dtype, norm="schatten8"
        )

    @property
    def debiased(self) -> bool:
        """Whether the moments are, before the ratio is taken."""
        return self.correct_bias and not self.reference

    @property
    def public_schatten(self) -> bool:
        """Whether the trajectory is that of the public classes with a matrix sign."""
        return self.reference and self.norm == "schatten"

    def check(self, entries: int) -> None:
        super().check(entries)
        check_variant(self.norm, self.variance, self.eps_mode, reference=self.reference)
        if self.norm == "schatten":
            check_rows(self.rows)


def check_variant(norm: str, variance: str, eps_mode: str, *, reference: bool) -> None:
    """The combinations of options that DeVA has."""
    if norm == "linf" and variance == "low_memory":
        raise ValueError("variance='low_memory' keeps row and column sums, which norm='linf' lacks")
    if reference and eps_mode != "inside":
        raise ValueError(f"reference=True has its eps inside the root, not eps_mode={eps_mode!r}")
    if reference and variance not in _PUBLIC_VARIANCES[norm]:
        raise ValueError(
            f"reference=True with norm={norm!r} has variance "
            f"{' or '.join(_PUBLIC_VARIANCES[norm])}, not {variance!r}"
        )


def checked(record: type[Options], given: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """Every option of an operator, by name.

    Args:
        record: the options.
        given: what a public function was given, checked and normalised; what it does not have,
            has its default.
        own: options that the function found itself, as they are, in the place of those.

    Raises:
        TypeError, ValueError: a value out of its range, naming it.
    """
    taken = {
        name: kind.taken(name, given[name]) if name in given else record.defaults[name]
        for name, kind in record.kinds.items()
        if name not in own
    }
    return {**taken, **own}


def chosen(record: type[Options], values: Mapping[str, Any], **own: Any) -> dict[str, Any]:
    """The same out of values that were checked before, by name, and defaults for the rest."""
    found = {name: values.get(name, default) for name, default in record.defaults.items()}
    return {**found, **own}


# The lists of a step: entry i of every one belongs to one parameter or block.


class MuonLists(NamedTuple):
    """Of `muon_step_`."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    second_moments: Sequence[Tensor]
    step_counts: Sequence[Tensor]
    skipped: Tensor
    lr: Tensor


class ShampooLists(NamedTuple):
    """Of `shampoo_step_`."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    momentum_buffers: Sequence[Tensor]
    lefts: Sequence[Tensor]
    rights: Sequence[Tensor]
    left_roots: Sequence[Tensor]
    right_roots: Sequence[Tensor]
    graft_squares: Sequence[Tensor]
    root_failures: Sequence[Tensor]
    step_counts: Sequence[Tensor]
    skipped: Tensor
    lr: Tensor


class BasisLists(NamedTuple):
    """Of `soap_step_` and `deva_step_`."""

    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    exp_avgs: Sequence[Tensor]
    exp_avg_sqs: Sequence[Tensor]
    lefts: Sequence[Tensor]
    rights: Sequence[Tensor]
    left_bases: Sequence[Tensor]
    right_bases: Sequence[Tensor]
    step_counts: Sequence[Tensor]
    skipped: Tensor
    lr: Tensor


Lists = TypeVar("Lists", MuonLists, ShampooLists, BasisLists)


def takes(
    lists: type[Lists], record: type[Record]
) -> Callable[[Callable[[Lists, Record], None]], Callable[..., None]]:
    """A step of two records under the compiled operator's signature: tensors, options by name."""

    def decorate(function: Callable[[Lists, Record], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def named(*tensors: Any, **options: Any) -> None:
            function(lists(*tensors), record(**options))

        return named

    return decorate


def iterates(
    function: Callable[[Tensor, NewtonSchulzOptions], Tensor],
) -> Callable[..., Tensor]:
    """A function of a matrix and a record under the signature of `newton_schulz`'s operator."""

    @functools.wraps(function)
    def named(x: Tensor, rows: Sequence[Row], **options: Any) -> Tensor:
        return function(x, NewtonSchulzOptions(rows=rows, **options))

    return named


class FactorsUpdate(NamedTuple):
    """A call of `kron_factors_update_`; size 0 where a factor or a root is absent."""

    left: Tensor
    right: Tensor
    grad: Tensor
    skipped: Tensor
    beta: float
    weight: float
    left_root: Tensor
    right_root: Tensor


def updates(function: Callable[[FactorsUpdate], None]) -> Callable[..., None]:
    """A function of a record under the signature of `kron_factors_update_`'s operator."""

    @functools.wraps(function)
    def named(*tensors: Any, **options: Any) -> None:
        function(FactorsUpdate(*tensors, **options))

    return named
