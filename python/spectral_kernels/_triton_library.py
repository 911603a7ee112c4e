"""torch.ops.spectral_kernels_triton: the operators of the Triton backend, whole.

`torch.compile` calls these. What a kernel is launched with depends on addresses and on tables of a
list, so it cannot look into them: to it each is one opaque call, with the schema of the compiled
part, without which there are none.
Outside of `torch.compile` the functions behind them are called directly, which takes less time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import _checks, _dispatch, _extension
from ._fake import FAKES
from ._operators import TABLE

NAME = "spectral_kernels_triton"


def _triples(flat: Sequence[float]) -> list[tuple[float, ...]]:
    return [tuple(flat[i : i + 3]) for i in range(0, len(flat), 3)]


def _nested(op: str, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Arguments as the functions take them; changes `options`."""
    if "rows" in options:
        options["rows"] = _triples(options["rows"])
    if "restart_ends" in options:
        ends, flat = options.pop("restart_ends"), options["restarts"]
        options["restarts"] = [tuple(flat[i:j]) for i, j in itertools.pairwise([0, *ends])]
    if op == "newton_schulz":
        x, rows, *rest = args
        return (x, _triples(rows), *rest)
    return args


def _kernel(op: str) -> Callable[..., Any]:
    def kernel(*args: Any, **options: Any) -> Any:
        if not TABLE[op].in_place:
            for x in args:
                if isinstance(x, Tensor):
                    _checks.no_autograd("an argument", x, op)
        args = _nested(op, args, options)
        return _dispatch.function_of("triton", op)(*args, **options)

    return kernel


if _extension.MODULE is not None:
    _library = torch.library.Library(NAME, "DEF")
    for _op, _fake in FAKES.items():
        _schema = str(getattr(torch.ops.spectral_kernels, _op).default._schema)
        _library.define(_schema.partition("::")[2], tags=(torch.Tag.pt2_compliant_tag,))
        for _device in ("CUDA", "CPU"):
            _library.impl(_op, _kernel(_op), _device)
        torch.library.register_fake(f"{NAME}::{_op}", _fake, lib=_library)
