"""The compiled part, if there is one.

`MODULE` is `spectral_kernels._C` or None, `REASON` says why it is None. A compiled part that was
built against another torch than the running one raises at import: its kernels would be missing
without a word otherwise.
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


def _minor(version: str) -> str:
    return ".".join(version.split("+")[0].split(".")[:2])


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
            f"it was built against another torch or C++ library; {_REBUILD} ({error})"
        ) from error
    built: str = module.built_with_torch
    if _minor(built) != _minor(torch.__version__):
        raise ImportError(
            f"spectral_kernels was built with torch {built} but torch {torch.__version__} is "
            f"running; {_REBUILD}"
        )
    return module, ""


MODULE, REASON = _load()
_warned_of_faults = False


def warn_of_faults() -> None:
    """Says once in a process that a result of LAPACK was wrong and had to be computed again."""
    global _warned_of_faults
    if MODULE is None or _warned_of_faults or not MODULE.faults():
        return
    _warned_of_faults = True
    warnings.warn(
        f"LAPACK's results did not multiply to the matrix ({faults()}): they were computed again "
        "on one thread, and count as failures where that did not help either. `python -m "
        "spectral_kernels.info` and a report of what it prints are welcome",
        RuntimeWarning,
        stacklevel=4,
    )


def faults() -> str:
    """How many results of LAPACK were computed again, by routine; "none"."""
    counts = {} if MODULE is None else MODULE.fault_counts()
    return ", ".join(f"{name} {count}" for name, count in counts.items()) or "none"
