"""The specification in plain PyTorch: every operator, float64-capable, without speed tricks.

One file a family. The signatures are those of `torch.ops.spectral_kernels`, except that rows of
coefficients are (a, b, c) triples. It is what the tests hold the kernels against, and the backend
"reference" where there is no compiled one: any float dtype, any device, one matrix after another.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from .._operators import TABLE

__all__ = list(TABLE)


def __getattr__(name: str) -> Callable[..., Any]:
    """For type checkers, which do not see the assignments below."""
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


_modules = {op: importlib.import_module(f".{row.module}", __name__) for op, row in TABLE.items()}
# After all of them: a module may have the name of an operator.
globals().update({op: getattr(module, op) for op, module in _modules.items()})
