"""Tells when a module has been imported.

At run time only `sys` is used: `_startup/sitecustomize.py` loads this file by its path before a
program begins, and must not import in its place what the program might call its own modules.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


class ImportHook:
    """Calls `imported(module)` right behind the import of every module that `wanted` names.

    The other finders find and load the module; only the end of its execution is observed, and its
    spec and loader are those that it would have had.
    """

    def __init__(
        self, wanted: Callable[[str], bool], imported: Callable[[ModuleType], None]
    ) -> None:
        self._wanted = wanted
        self._imported = imported

    def install(self) -> None:
        """Starts."""
        sys.meta_path.insert(0, self)

    def remove(self) -> None:
        """Stops."""
        if self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec that the other finders give, with a loader that reports."""
        if not self._wanted(fullname):
            return None
        for finder in list(sys.meta_path):
            if isinstance(finder, ImportHook):
                continue
            find = getattr(finder, "find_spec", None)
            spec = None if find is None else find(fullname, path, target)
            if spec is None:
                continue
            if spec.loader is not None and hasattr(spec.loader, "exec_module"):
                spec.loader = _Loader(spec.loader)  # type: ignore[assignment]
            found: ModuleSpec = spec
            return found
        return None


class _Loader:
    """A loader that tells all hooks, in the order of their installation."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        created: ModuleType | None = self._loader.create_module(spec)
        return created

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        for hook in list(reversed(sys.meta_path)):
            if isinstance(hook, ImportHook) and hook._wanted(module.__name__):
                hook._imported(module)
