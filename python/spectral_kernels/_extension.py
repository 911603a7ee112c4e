"""The compiled part, if there is one.

`MODULE` is `spectral_kernels._C` or None, `REASON` says why it is None. A compiled part that was
built against another torch than the running one raises at import: its kernels would be missing
without a word otherwise.
"""

from __future__ import annotations

import importlib
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
