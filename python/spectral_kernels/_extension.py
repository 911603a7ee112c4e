"""The compiled part, if there is one.

`MODULE` is `spectral_kernels._C` or None, `REASON` says why it is None. It asks torch by its stable
interface alone, so one build serves every torch from the version on that it was built for; under an
older one it raises at import: its kernels would be missing without a word otherwise.
"""

from __future__ import annotations

import importlib
import warnings
from types import ModuleType

import torch

_REBUILD = (
    "reinstall it with `pip install --no-build-isolation --force-reinstall --no-deps .` "
    "from its source folder"
)


def _minor(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("+")[0].split(".")[:2])


def _load() -> tuple[ModuleType | None, str]:
    try:
        module = importlib.import_module("spectral_kernels._C")
    except ModuleNotFoundError as error:
        if error.name != "spectral_kernels._C":
            raise
        warnings.warn(
            "spectral_kernels has no compiled part, since there was no C++ compiler when it was "
            "installed: everything runs on plain torch, slowly. Install a compiler (CXX names it), "
            f"then {_REBUILD}",
            RuntimeWarning,
            stacklevel=2,
        )
        return None, "the compiled part was not built (no C++ compiler when it was installed)"
    except ImportError as error:
        raise ImportError(
            f"the compiled part of spectral_kernels does not load with torch {torch.__version__}: "
            f"it was built for another Python or C++ library, or for a later torch; {_REBUILD} "
            f"({error})"
        ) from error
    least: str = module.least_torch
    if _minor(torch.__version__) < _minor(least):
        raise ImportError(
            f"spectral_kernels was built for torch {least} and later, but torch "
            f"{torch.__version__} is running; {_REBUILD}"
        )
    return module, ""


MODULE, REASON = _load()
_warned_of_faults = False


def warn_of_faults() -> None:
    """Says once in a process that a decomposition was wrong and had to be computed again."""
    global _warned_of_faults
    if MODULE is None or _warned_of_faults or not MODULE.faults():
        return
    _warned_of_faults = True
    warnings.warn(
        f"a decomposition did not multiply to its matrix ({faults()}): LAPACK computed it again on "
        "one thread, and it counts as a failure where that did not help either. `python -m "
        "spectral_kernels.info` and a report of what it prints are welcome",
        RuntimeWarning,
        stacklevel=4,
    )


def faults() -> str:
    """How many decompositions were computed again, by routine; "none"."""
    counts = {} if MODULE is None else MODULE.fault_counts()
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
