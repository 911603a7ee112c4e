"""Where the tensors of a list are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor


class Addresses(tuple[int, ...]):
    """Addresses of tensors, and the same as int64."""

    tensor: Tensor

    def __new__(cls, numbers: Iterable[int]) -> Addresses:
        """As they are counted."""
        counted = array("q", numbers)
        found = super().__new__(cls, counted)
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        found.tensor = torch.frombuffer(counted, dtype=torch.int64) if counted else empty
        return found

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Addresses:
        """Those of some tensors."""
        return cls(map(Tensor.data_ptr, tensors))
