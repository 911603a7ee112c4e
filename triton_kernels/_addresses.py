"""Where the tensors of a list are."""

from __future__ import annotations

from array import array
from collections.abc import Iterable

import torch
from torch import Tensor


class Addresses(tuple[int, ...]):
    """Addresses of tensors, and the same as int64."""

    tensor: Tensor

    @classmethod
    def of(cls, tensors: Iterable[Tensor]) -> Addresses:
        """Those of some tensors."""
        numbers = array("q", map(Tensor.data_ptr, tensors))
        found = cls(numbers)
        empty = torch.empty(0, dtype=torch.int64, device="cpu")
        found.tensor = torch.frombuffer(numbers, dtype=torch.int64) if numbers else empty
        return found
