"""A function that the user names, of a script too: known by its arithmetic, not by its version.

On small matrices it runs in float64, whatever it rounds to, and the numbers that it multiplies with
are noted. If a Newton-Schulz iteration with those numbers gives the same on matrices of every form,
the kernels compute it; that is asked anew for all other arguments, such as a number of steps.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import FunctionType, ModuleType
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .. import coefficients as _coefficients
from .._lists import SCALES, scale_factor
from ..newton_schulz import newton_schulz
from ._adapter import Adapter
from ._orthogonalizer import Row
from ._points import Point, Refused, agree, trial_matrix, unfit

# Of what a function rounds to; a trial of it must not.
_ROUNDED = {
    "bfloat16": torch.bfloat16,
    "half": torch.float16,
    "float": torch.float32,
}
_FLOATS = (*_ROUNDED.values(), torch.float64)
_PRODUCTS = ("mul", "div", "add", "sub", "clamp", "mm", "matmul")
# What a trial passes where a function has no default.
_NUMBERS = {"steps": 5, "step": 5, "iters": 5, "iterations": 5, "eps": 1e-7, "epsilon": 1e-7}
_SHAPES = ((4, 6), (6, 4), (5, 5))
# In float64, where a floor under the norm may be added to it instead.
_EXACT = 1e-6
_DTYPES = (torch.float32, torch.bfloat16)
# As it is, where it rounds to 16 bits: the rows of Polar Express make 0.11 of those roundings on
# one of the trial matrices. What it computes has been found in float64 before.
_ROUGH = 0.25


@dataclass(frozen=True)
class Rule:
    """What a function computes for some arguments.

    Attributes:
        rows: of the iteration.
        eps: the norm's floor.
        scale: of the result, out of `_lists.SCALES`.
        compute: the dtype that it rounds to, None for its argument's.
        results: dtype of a matrix -> that of its result.
        batches: whether it takes batches of matrices.
    """

    rows: tuple[Row, ...]
    eps: float
    scale: str
    compute: torch.dtype | None
    results: Mapping[torch.dtype, torch.dtype]
    batches: bool


class _Exact(TorchFunctionMode):
    """Computes in float64 what a function would round, and notes the numbers that it uses."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers: list[float] = []
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        given = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name in _ROUNDED:
            self.dtypes.append(_ROUNDED[name])
            return args[0].clone()
        if any(word in name for word in _PRODUCTS):
            self._note([*args, *given.values()])
        args = [self._full(value) for value in args]
        return func(*args, **{key: self._full(value) for key, value in given.items()})

    def _note(self, values: Sequence[Any]) -> None:
        kinds = (int, float)
        self.numbers += [
            float(v) for v in values if isinstance(v, kinds) and not isinstance(v, bool)
        ]

    def _full(self, value: Any) -> Any:
        if not isinstance(value, torch.dtype) or value not in _FLOATS:
            return value
        if value != torch.float64:
            self.dtypes.append(value)
        return torch.float64


def _eager() -> contextlib.AbstractContextManager[Any]:
    """Compiles nothing, where something may be compiled: to ask imports torch's compiler."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


class Function(Adapter):
    """One function of a module. `of` makes a class for each."""

    function: ClassVar[FunctionType]
    attribute: ClassVar[str]

    @classmethod
    def of(cls, function: FunctionType) -> tuple[type[Function], ModuleType]:
        """The adapter of a function, and the module that holds it.

        Raises:
            ValueError: no module does.
        """
        module = sys.modules.get(function.__module__)
        names = (
            [name for name, value in vars(module).items() if value is function] if module else []
        )
        if module is None or not names:
            raise ValueError(
                f"{function.__module__}.{function.__qualname__} is in no module under a name of "
                "its own, so there is no place to replace it"
            )
        attribute = function.__name__ if function.__name__ in names else names[0]
        values = {
            "name": f"{module.__name__}.{attribute}",
            "modules": (module.__name__,),
            "function": staticmethod(function),
            "attribute": attribute,
        }
        return type("Function", (cls,), values), module

    @classmethod
    def holds(cls, module: ModuleType) -> bool:
        """Whether it is in a module."""
        return vars(module).get(cls.attribute) is cls.function

    @classmethod
    def subject(cls, module: ModuleType) -> str:
        """The function, since others of its module are not asked for."""
        return cls.name

    def points(self, module: ModuleType) -> list[Point]:
        """The function, also where it has been imported by name."""
        self._rules: dict[Any, Rule | str] = {}
        try:
            self._signature = inspect.signature(self.function)
        except (TypeError, ValueError) as error:
            raise Refused(f"the parameters of {self.name} are unknown: {error}") from error
        parameters = list(self._signature.parameters.values())
        if not parameters or any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters):
            raise Refused(f"{self.name}{self._signature} does not say what it takes")
        self._matrix = parameters[0].name
        own = inspect.Parameter("own", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        fast = self._fast()
        fast.__signature__ = self._signature.replace(  # type: ignore[attr-defined]
            parameters=[own.replace(kind=parameters[0].kind), *parameters]
        )
        return [Point(module, self.attribute, fast, self._declines, imported_by_name=True)]

    def prove(self, points: list[Point]) -> None:
        """The arguments that it has by default, or that its names say."""
        self._own = points[0].check()
        arguments: dict[str, Any] = {}
        for name, parameter in list(self._signature.parameters.items())[1:]:
            if parameter.default is parameter.empty:
                known = [value for word, value in _NUMBERS.items() if name.endswith(word)]
                if not known:
                    raise Refused(f"{self.name} needs {name}, which no trial can choose")
                arguments[name] = known[0]
        rule = self._rule_of(self._rest(self._signature.bind(None, **arguments)))
        if isinstance(rule, str):
            raise Refused(rule)

    def _fast(self) -> Callable[..., Tensor]:
        def fast(own: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
            bound = self._signature.bind(*args, **kwargs)
            rule = self._rule_of(self._rest(bound))
            assert isinstance(rule, Rule)
            return self._computed(rule, bound.arguments[self._matrix])

        return fast

    def _computed(self, rule: Rule, x: Tensor) -> Tensor:
        compute = x.dtype if rule.compute is None else rule.compute
        y = newton_schulz(
            x.to(rule.results[x.dtype]),
            coefficients=rule.rows,
            eps=rule.eps,
            compute_dtype=compute,
            backend=self.options.backend,
        )
        return y if rule.scale == "none" else y.mul_(scale_factor(rule.scale, *x.shape[-2:]))

    def _declines(self, *args: Any, **kwargs: Any) -> str | None:
        """Arguments that a trial does not recognise, and what is no matrix."""
        try:
            bound = self._signature.bind(*args, **kwargs)
        except TypeError as error:
            return str(error)
        x = bound.arguments[self._matrix]
        if not isinstance(x, Tensor):
            return f"a {type(x).__name__}"
        reason = unfit(x, self.options, dtypes=_DTYPES, batches=True)
        if reason is not None:
            return reason
        rule = self._rule_of(self._rest(bound))
        if isinstance(rule, str):
            return rule
        return f"{x.ndim}-D" if x.ndim > 2 and not rule.batches else None

    def _rest(self, bound: inspect.BoundArguments) -> tuple[tuple[str, Any], ...]:
        """All arguments but the matrix, with defaults."""
        bound.apply_defaults()
        return tuple((name, v) for name, v in bound.arguments.items() if name != self._matrix)

    def _rule_of(self, rest: tuple[tuple[str, Any], ...]) -> Rule | str:
        """The rule for some arguments, or why there is none."""
        try:
            known = self._rules.get(rest)
        except TypeError:
            return "arguments that a trial cannot repeat"
        if known is None:
            with (
                torch.no_grad(),
                torch.autocast("cpu", enabled=False),
                torch.device("cpu"),
                torch.random.fork_rng(devices=[]),
                _eager(),
            ):
                known = self._recognised(dict(rest))
            self._rules[rest] = known
        return known

    def _recognised(self, rest: Mapping[str, Any]) -> Rule | str:
        own = self._own
        try:
            trials = [64.0 * trial_matrix(*shape, dtype=torch.float64) for shape in _SHAPES]
            with _Exact() as noted:
                found = [own(trial, **rest) for trial in trials]
            numbers = noted.numbers[: len(noted.numbers) // len(_SHAPES)]
            compute = next((dtype for dtype in noted.dtypes if dtype != torch.float64), None)
            rows, scale = _fitted(self.name, numbers, found)
            eps = min((n for n in numbers if 0.0 < n < 1e-3), default=0.0)
            results = {d: own(trial_matrix(4, 6, dtype=d), **rest).dtype for d in _DTYPES}
            rule = Rule(rows, eps, scale, compute, results, self._takes_batches(rest))
            self._compare(rule, rest)
        except Refused as refused:
            return str(refused)
        except Exception as error:
            return f"a trial of {self.name} failed with {type(error).__name__}: {error}"
        return rule

    def _takes_batches(self, rest: Mapping[str, Any]) -> bool:
        batch = torch.stack([trial_matrix(4, 6, seed) for seed in (1.1, 1.2)])
        single = torch.stack([self._own(each.clone(), **rest) for each in batch])
        try:
            whole = self._own(batch, **rest)
        except Exception:
            # Its own code says so, in whatever way; such calls are left to it.
            return False
        return whole.shape == single.shape and bool((whole - single).abs().max() <= _ROUGH)

    def _compare(self, rule: Rule, rest: Mapping[str, Any]) -> None:
        """The function as it is, against the kernels."""
        for shape, dtype in itertools.product(_SHAPES, _DTYPES):
            mine, theirs = (trial_matrix(*shape, dtype=dtype) for _ in range(2))
            agree(self.name, self._computed(rule, mine), self._own(theirs, **rest), _ROUGH)


def _fitted(
    name: str, numbers: Sequence[float], found: Sequence[Tensor]
) -> tuple[tuple[Row, ...], str]:
    """The rows and the scale with which an iteration gives what a function returned."""
    nearest, least = "", float("inf")
    for label, rows in _hypotheses(numbers):
        error, scale = _error(rows, found)
        if error <= _EXACT:
            return rows, scale
        if error < least:
            nearest, least = label, error
    raise Refused(
        f"{name} does not compute a Newton-Schulz iteration of the matrix over its Frobenius norm "
        f"(relative difference {least:.1e} from the nearest, {nearest})"
    )


def _error(rows: Sequence[Row], found: Sequence[Tensor]) -> tuple[float, str]:
    """How far an iteration with the best scale is from what a function returned."""
    plain = [_iterated(trial_matrix(*shape, dtype=torch.float64), rows) for shape in _SHAPES]
    errors = {}
    for scale in SCALES:
        errors[scale] = 0.0
        for mine, theirs in zip(plain, found, strict=True):
            if theirs.shape != mine.shape:
                raise Refused(f"it returns {tuple(theirs.shape)} for {tuple(mine.shape)}")
            difference = theirs - scale_factor(scale, *mine.shape) * mine
            error = float(difference.abs().max() / theirs.abs().max().clamp(min=1e-300))
            # NaN is no agreement.
            errors[scale] = max(errors[scale], error) if error == error else float("inf")
    best = min(reversed(SCALES), key=lambda scale: errors[scale])
    return errors[best], best


def _iterated(x: Tensor, rows: Sequence[Row]) -> Tensor:
    x = x / torch.linalg.matrix_norm(x)
    for a, b, c in rows:
        r = x @ x.mT
        x = a * x + (b * r + c * r @ r) @ x
    return x


def _hypotheses(numbers: Sequence[float]) -> Iterator[tuple[str, tuple[Row, ...]]]:
    """Rows that the numbers of a function may be, and rows that are known, for comparison."""
    factors = {1.0, *(n for n in numbers if 1.0 < n < 1.5)}
    seen = set()
    for width, start, end in itertools.product((3, 2), range(5), range(3)):
        body = numbers[start : len(numbers) - end]
        if not body or len(body) % width:
            continue
        rows = [tuple(body[i : i + width]) for i in range(0, len(body), width)]
        orders = itertools.permutations(range(width))
        # A number may have been subtracted.
        signs = itertools.product((1.0, -1.0), repeat=width - 1)
        for order, sign, factor in itertools.product(orders, signs, factors):
            full = [_row([row[i] for i in order], sign) for row in rows]
            a, b, c = full[0]
            full[0] = a / factor, b / factor**3, c / factor**5
            hypothesis = tuple(full)
            if hypothesis not in seen:
                seen.add(hypothesis)
                yield "one with its own numbers", hypothesis
    for known in _coefficients.names():
        yield known, tuple(_coefficients.resolve(known).rows)


def _row(numbers: Sequence[float], sign: Sequence[float]) -> Row:
    a, b, *rest = numbers
    return a, sign[0] * b, sign[1] * rest[0] if rest else 0.0
