"""Puts the kernels under optimizers that people use already.

The user's script stays as it is: `swap_in()` replaces the matrix work inside known optimizers, also
in modules that are imported later. Its handle says what it replaced and takes it out again, at the
end of a `with` block too. Before anything is replaced, names and parameters are compared with those
of the version that the replacement was written for, and both run on small matrices. What differs is
refused with a sentence and left alone. Inside `torch.compile` an optimizer keeps its own code.
"""

from __future__ import annotations

import atexit
import inspect
import logging
import sys
import threading
from collections.abc import Iterable, Mapping
from types import FunctionType, ModuleType, TracebackType

from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .. import _dispatch
from ._adapter import Adapter
from ._functions import Function
from ._imports import ImportHook
from ._points import Calls, Options, Refused, Replacement, put_in
from ._report import Report, Tally
from .deva import Deva
from .dion import Dion
from .distributed_shampoo import DistributedShampoo
from .emerging_optimizers import EmergingOptimizers
from .gram_newton_schulz import GramNewtonSchulz
from .heavyball import HeavyBall
from .jordan_muon import JordanMuon
from .pytorch_optimizer import PytorchOptimizer
from .soap import Soap
from .torch_muon import TorchMuon

__all__ = ["Swap", "swap_in"]

ADAPTERS: tuple[type[Adapter], ...] = (
    TorchMuon,
    DistributedShampoo,
    Soap,
    Deva,
    JordanMuon,
    GramNewtonSchulz,
    Dion,
    EmergingOptimizers,
    HeavyBall,
    PytorchOptimizer,
)

Target = ModuleType | type[Optimizer] | Optimizer | FunctionType | str

_log = logging.getLogger("spectral_kernels")
_lock = threading.RLock()


def swap_in(
    target: Target | None = None,
    *,
    backend: str = "auto",
    allow_ridge: bool = False,
    report: bool = False,
) -> Swap:
    """Replaces the matrix work inside optimizers that are in use by this library's kernels.

    Known are torch.optim.Muon, Meta's Distributed Shampoo, the public SOAP and DeVA classes, which
    are recognised by their methods wherever they were copied to, Keller Jordan's Muon, and the
    packages gram-newton-schulz, dion, emerging-optimizers, heavyball and pytorch-optimizer; each
    one's module in `spectral_kernels.swap` says what is replaced there. Parameters, state and
    `state_dict` stay the optimizer's own, and updates agree with its own within the error of the
    dtype that it computes in. A call that the kernels do not cover, such as a complex parameter or
    a tensor on a device without kernels, runs the optimizer's own code.

    Args:
        target: what to swap: None for everything known, imported or not yet; a name out of
            "torch.optim.Muon", "distributed_shampoo", "SOAP", "DeVA", "KellerJordan/Muon",
            "gram-newton-schulz", "dion", "emerging-optimizers", "heavyball", "pytorch-optimizer"
            (in any case), imported or not yet; a module; an optimizer class, or an optimizer, which
            stands for its class. Functions and methods are replaced for every user of a module or
            class. A function of a module, the script itself too, is replaced if it takes a matrix
            and small trials of it give a Newton-Schulz iteration of that over its Frobenius norm,
            whatever its coefficients; else it is refused with the difference. In code that
            torch.compile has compiled it stays.
        backend: "auto", or one that has to run: "cpu", "cuda", "triton", "reference".
        allow_ridge: let Distributed Shampoo's `EigenConfig` be computed as an iterative root with a
            relative ridge of 1e-6 (1e-12 in float64). That is faster, and another function of
            eigenvalues below that share of the largest.
        report: print the handle to stderr when the program ends, with an estimate of the time that
            was saved: of every shape, three calls of each original are timed beside its
            replacement, on copies, which costs as much.

    Returns:
        A handle. `with swap_in():` takes everything out at the end of the block.

    Raises:
        TypeError, ValueError: a target that is of no kind above, or not known.
        RuntimeError: a backend that was asked for cannot run.
    """
    swap = _swapped(target, Options(_usable(backend), bool(allow_ridge), measure=bool(report)))
    if report:
        atexit.register(lambda: print(swap, file=sys.stderr))
    return swap


def _swapped(target: Target | None, options: Options) -> Swap:
    adapters, modules = _resolve(target)
    swap = Swap(adapters, options, waits=modules is None)
    for adapter in adapters:
        for module in adapter.loaded() if modules is None else modules:
            if adapter.holds(module):
                swap._apply(adapter, module)
    if isinstance(target, FunctionType):
        swap._warn_of(adapters[0].name)
    return swap


class Swap:
    """What one call of `swap_in` did, and the way back."""

    def __init__(self, adapters: list[type[Adapter]], options: Options, *, waits: bool) -> None:
        self._adapters = adapters
        self._options = options
        self._replacements: list[Replacement] = []
        self._put_back: list[Replacement] = []
        self._refused: dict[str, str] = {}
        self._found: set[type[Adapter]] = set()
        self._functions: list[str] = []
        self._look: RemovableHandle | None = None
        self._hook = ImportHook(self._wants, self._imported) if waits else None
        if self._hook is not None:
            self._hook.install()

    @property
    def replaced(self) -> list[str]:
        """Functions and methods that are replaced now."""
        return [str(replacement.point) for replacement in self._replacements]

    @property
    def waiting(self) -> list[str]:
        """Targets whose modules have not been imported yet."""
        if self._hook is None:
            return []
        modules = [adapter.name for adapter in self._adapters if adapter not in self._found]
        return modules + list(self._functions)

    @property
    def refused(self) -> Mapping[str, str]:
        """What was left alone, and why."""
        return dict(self._refused)

    @property
    def calls(self) -> Mapping[str, Calls]:
        """Calls of every function that is replaced or was, by its name in `replaced`."""
        return {str(one.point): one.calls for one in (*self._put_back, *self._replacements)}

    @property
    def seconds_saved(self) -> float | None:
        """The originals' estimated time less that of the replacements; None without `report`."""
        meters = [calls.meter for calls in self.calls.values() if calls.meter is not None]
        saved = [meter.saved for meter in meters if meter.saved is not None]
        return sum(saved) if meters and saved else None

    def undo(self) -> None:
        """Puts everything back and stops waiting. A second call does nothing.

        Raises:
            RuntimeError: somebody has replaced a replacement since. Then nothing is put back: undo
                that change first.
        """
        with _lock:
            foreign = [place for one in self._replacements for place in one.foreign()]
            if foreign:
                raise RuntimeError(
                    f"{', '.join(foreign)} changed after swap_in replaced it: undo that first"
                )
            if self._hook is not None:
                self._hook.remove()
                self._hook = None
            if self._look is not None:
                self._look.remove()
                self._look = None
            for replacement in reversed(self._replacements):
                replacement.take_out()
            self._put_back += self._replacements
            self._replacements = []

    def __enter__(self) -> Swap:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.undo()

    def report(self) -> Report:
        """What `str()` shows, as data."""
        return Report(
            replaced=_tallies(self._replacements),
            put_back=_tallies(self._put_back),
            waiting=self.waiting,
            refused=dict(self._refused),
            saved=self.seconds_saved,
        )

    def __str__(self) -> str:
        return str(self.report())

    def _wants(self, module_name: str) -> bool:
        return any(adapter.wants(module_name) for adapter in self._adapters)

    def _imported(self, module: ModuleType) -> None:
        for adapter in self._adapters:
            if not (adapter.wants(module.__name__) and adapter.holds(module)):
                continue
            # A reload has overwritten what was replaced in the module itself.
            self._replacements = [
                one for one in self._replacements if one.point.owner is not module
            ]
            self._apply(adapter, module)
            self._warn_of(adapter.subject(module))

    def _warn_of(self, subject: str) -> None:
        reason = self._refused.get(subject)
        if reason is not None:
            _log.warning("%s keeps its own code: %s", subject, reason)

    def _await(self, names: Iterable[str]) -> None:
        """Replaces functions of these names, of the script or of named modules, once they exist.

        They are looked for at every step of an optimizer.
        """
        self._functions += names
        self._look = register_optimizer_step_pre_hook(lambda *_: self._look_for_functions())

    def _look_for_functions(self) -> None:
        for name in list(self._functions):
            module_name, _, attribute = name.rpartition(".")
            module = sys.modules.get(module_name or "__main__")
            function = vars(module).get(attribute) if module is not None else None
            if not isinstance(function, FunctionType):
                continue
            self._functions.remove(name)
            adapter, holder = Function.of(function)
            self._adapters.append(adapter)
            self._apply(adapter, holder)
            self._warn_of(adapter.name)
        if not self._functions and self._look is not None:
            self._look.remove()
            self._look = None

    def _apply(self, adapter: type[Adapter], module: ModuleType) -> None:
        with _lock:
            self._found.add(adapter)
            try:
                if not self._options.devices:
                    raise Refused(f"{_dispatch.unavailable('cpu')}, and plain torch is no faster")
                one = adapter(self._options)
                points = one.points(module)
                self._replacements += put_in(
                    points, lambda: one.prove(points), measure=self._options.measure
                )
            except Refused as refused:
                self._refused[adapter.subject(module)] = str(refused)


def _tallies(replacements: list[Replacement]) -> dict[str, dict[str, Tally]]:
    found: dict[str, dict[str, Tally]] = {}
    for replacement in replacements:
        point = replacement.point
        owner = str(point).removesuffix(f".{point.name}")
        tallies = found.setdefault(owner, {})
        tally = replacement.calls.tally()
        tallies[point.name] = tallies[point.name] + tally if point.name in tallies else tally
    return found


def _usable(backend: str) -> str | None:
    if backend not in ("auto", *_dispatch.BACKENDS):
        raise ValueError(
            f"backend must be one of auto, {', '.join(_dispatch.BACKENDS)}, not {backend!r}"
        )
    if backend == "auto":
        return None
    reason = _dispatch.unavailable(backend)
    if reason is not None:
        raise RuntimeError(f"backend {backend!r} cannot run: {reason}")
    return backend


def _resolve(
    target: Target | None,
) -> tuple[list[type[Adapter]], list[ModuleType] | None]:
    """The adapters, and the modules to apply them to or None for all, now and later."""
    if target is None:
        return list(ADAPTERS), None
    if isinstance(target, str):
        named = [adapter for adapter in ADAPTERS if adapter.name.lower() == target.lower()]
        if not named:
            known = ", ".join(adapter.name for adapter in ADAPTERS)
            raise ValueError(f"unknown target {target!r}: expected one of {known}")
        return named, None
    if isinstance(target, FunctionType):
        adapter, module = Function.of(target)
        return [adapter], [module]
    if isinstance(target, Optimizer):
        target = type(target)
    if isinstance(target, ModuleType):
        classes = [
            value
            for value in list(vars(target).values())
            if isinstance(value, type) and issubclass(value, Optimizer)
        ]
        names = {target.__name__}
    elif isinstance(target, type) and issubclass(target, Optimizer):
        classes, names = [base for base in target.__mro__ if base is not Optimizer], set()
    else:
        raise TypeError(
            f"target must be a module, an optimizer, its class, a function, a name or None, not "
            f"{target!r}"
        )
    modules = _reached(_modules(names.union(*map(_code_of, classes))))
    adapters = [adapter for adapter in ADAPTERS if any(map(adapter.holds, modules))]
    if not adapters:
        known = ", ".join(adapter.name for adapter in ADAPTERS)
        raise ValueError(f"{target!r} holds nothing that can be swapped: known are {known}")
    return adapters, modules


def _code_of(optimizer: type) -> set[str]:
    """The modules that a class and its methods come from: torch renames its classes' module."""
    return {optimizer.__module__} | {
        inspect.unwrap(method).__globals__["__name__"]
        for method in vars(optimizer).values()
        if inspect.isfunction(method)
    }


def _reached(modules: list[ModuleType]) -> list[ModuleType]:
    """Modules, those of functions that they imported by name, and so on inside their packages."""
    found = {module.__name__: module for module in modules}
    waiting = list(modules)
    while waiting:
        module = waiting.pop()
        package = module.__name__.partition(".")[0]
        if package == "torch":
            continue
        names = set()
        for value in list(vars(module).values()):
            if inspect.isfunction(value) and (
                module in modules or value.__module__.partition(".")[0] == package
            ):
                names.add(value.__module__)
            elif isinstance(value, ModuleType) and value.__name__.partition(".")[0] == package:
                names.add(value.__name__)
        new = [module for module in _modules(names) if module.__name__ not in found]
        found.update((module.__name__, module) for module in new)
        waiting += new
    return [found[name] for name in sorted(found)]


def _modules(names: Iterable[str]) -> list[ModuleType]:
    return [
        sys.modules[name] for name in sorted(names) if isinstance(sys.modules.get(name), ModuleType)
    ]
