"""Tensors on a card that is not there: they have devices, shapes and strides, and no values.

Whatever asks for a value raises, as does a copy to the host; so what passes waits for nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from spectral_kernels import _cuda, _dispatch
from torch._subclasses.fake_tensor import FakeTensorMode

# Backend, arguments and options of a call that would have run.
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


@contextlib.contextmanager
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Call]]:
    """Fake tensors inside, which every backend takes; the operators' calls are kept, not run."""
    calls: list[Call] = []

    def record(name: str) -> Any:
        return lambda *args, **options: calls.append((name, args, options))

    monkeypatch.setattr(_dispatch, "unavailable", lambda backend: None)
    monkeypatch.setattr(_dispatch, "_triton_rejection", lambda *_: None)
    monkeypatch.setattr(_dispatch, "function_of", lambda backend, op: record(backend))
    monkeypatch.setattr(_dispatch._native, "operator", lambda op: record("cuda"))
    monkeypatch.setattr(_cuda, "rejection", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    monkeypatch.setattr(torch.Tensor, "data_ptr", lambda x: id(x) << 20)
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield calls
