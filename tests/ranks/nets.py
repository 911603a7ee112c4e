"""Small nets, their weights and their gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from ranks.layouts import local, part_of

# Rows that four ranks share evenly and not, fewer rows than ranks, one column, a convolution, and
# what takes AdamW.
SHAPES: dict[str, tuple[int, ...]] = {
    "even": (16, 24),
    "uneven": (18, 33),
    "tall": (33, 18),
    "one_row": (1, 18),
    "one_column": (5, 1),
    "three_rows": (3, 7),
    "conv": (6, 4, 3, 3),
    "bias": (18,),
    "short_bias": (3,),
}


def weights(dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        for name, shape in shapes.items()
    }


def gradients(
    step: int, dtype: torch.dtype, shapes: dict[str, tuple[int, ...]] = SHAPES
) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(77 + step)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype)
        for name, shape in shapes.items()
    }


class Net(nn.Module):
    """Parameters of given shapes."""

    def __init__(self, tensors: dict[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor.clone()))


def give(net: nn.Module, grads: dict[str, Tensor], but: Iterable[str] = ()) -> None:
    """Sets the gradients, each as its parameter lies."""
    for name, param in net.named_parameters():
        if name in but:
            param.grad = None
        elif isinstance(param, DTensor):
            param.grad = distribute_tensor(
                grads[name], param.device_mesh, param.placements, src_data_rank=None
            )
        else:
            param.grad = grads[name].clone()


def set_weights(net: Net, values: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, param in net.named_parameters():
            local(param).copy_(part_of(param, values[name]))
