"""What every target of `swap_in` has: a name, the modules that it lives in, and its points."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import ClassVar

from torch.optim import Optimizer

from ._points import Options, Point


class Adapter:
    """One target. Subclasses say where it is found and what is replaced there.

    Attributes:
        name: what `swap_in` and its reports call it.
        modules: names of the modules that hold it. A name with a leading dot is a last component:
            ".soap" is any module of that name in any package, since that code is copied around.
    """

    name: ClassVar[str]
    modules: ClassVar[tuple[str, ...]]

    def __init__(self, options: Options) -> None:
        self.options = options

    @classmethod
    def wants(cls, module_name: str) -> bool:
        """Whether a module of this name may hold it."""
        return any(
            f".{module_name}".endswith(name) if name.startswith(".") else module_name == name
            for name in cls.modules
        )

    @classmethod
    def holds(cls, module: ModuleType) -> bool:
        """Whether a module is the one meant, and not another of the same name."""
        return cls.wants(module.__name__)

    @classmethod
    def subject(cls, module: ModuleType) -> str:
        """What a refusal is reported under."""
        return module.__name__

    @classmethod
    def loaded(cls) -> list[ModuleType]:
        """The modules that hold it and are imported already, whatever they are called."""
        defining = {optimizer.__module__ for optimizer in _subclasses(Optimizer)}
        return [
            module
            for name, module in list(sys.modules.items())
            if isinstance(module, ModuleType)
            and (cls.wants(name) or name in defining)
            and cls.holds(module)
        ]

    def points(self, module: ModuleType) -> list[Point]:
        """What is replaced in a module.

        Raises:
            Refused: something that the replacements rely on is missing.
        """
        raise NotImplementedError

    def prove(self, points: list[Point]) -> None:
        """Runs original and replacement on small matrices and compares them.

        Raises:
            Refused: they differ.
        """
        raise NotImplementedError


def optimizer_classes(module: ModuleType) -> Iterator[type[Optimizer]]:
    """The optimizer classes that a module defines."""
    for value in list(vars(module).values()):
        if (
            isinstance(value, type)
            and issubclass(value, Optimizer)
            and value.__module__ == module.__name__
        ):
            yield value


def _subclasses(base: type) -> Iterator[type]:
    for derived in base.__subclasses__():
        yield derived
        yield from _subclasses(derived)
