"""The state of one parameter: made, checked, and taken from a state dict."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ._forms import Form, Layout, Slot


def as_matrices(name: str, tensor: Tensor, form: Form) -> Tensor:
    matrices = form.view(tensor)
    if matrices is None:
        raise ValueError(f"{name} has strides {tensor.stride()}, which have no view as matrices")
    return matrices


def as_blocks(value: Any) -> Any:
    """Blocks by their number as str, from a list, as earlier versions kept them, or a dict.

    Functions of torch.distributed.checkpoint take nested dicts apart, but no lists, and give them
    back with str as keys.
    """
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    return {str(block): x for block, x in value.items()} if isinstance(value, Mapping) else value


def new_state(param: Tensor, form: Form | None, layout: Layout) -> dict[str, Any]:
    # State that is made in inference mode could never be changed outside of it.
    with torch.inference_mode(False):
        return {
            name: as_blocks([each.create(param, form) for each in slot])
            if isinstance(slot, list)
            else slot.create(param, form)
            for name, slot in layout.items()
        }


def loaded_state(
    name: str, state: dict[str, Any], layout: Layout, param: Tensor, form: Form | None
) -> dict[str, Any]:
    state = {
        key: as_blocks(value) if isinstance(layout.get(key), list) else value
        for key, value in state.items()
    }
    _check_keys(name, state, layout)
    return {
        key: {
            block: each.load(f"{key}[{block}] of {name}", state[key][block], param, form)
            for block, each in as_blocks(slot).items()
        }
        if isinstance(slot, list)
        else slot.load(f"{key} of {name}", state[key], param, form)
        for key, slot in layout.items()
    }


def check_state(name: str, state: dict[str, Any], layout: Layout, param: Tensor) -> None:
    """State that fits the group's values as they are now."""
    _check_keys(name, state, layout)
    for key, slot in layout.items():
        if isinstance(slot, list):
            for block, each in as_blocks(slot).items():
                each.check(f"{key}[{block}] of {name}", state[key][block], param)
        else:
            slot.check(f"{key} of {name}", state[key], param)
            _check_precision(f"{key} of {name}", state[key], slot, param)


def _check_precision(name: str, value: Tensor, slot: Slot, param: Tensor) -> None:
    """That a moment is in bfloat16 if the group says so, and only then."""
    if slot.dtype is None and slot.shape is None:
        narrow = slot.dtype_beside(param) == torch.bfloat16
        if (value.dtype == torch.bfloat16) != narrow:
            raise ValueError(
                f"{name} is {value.dtype} and state_dtype {slot.narrow}, which was written after "
                "the state was made: load_state_dict(state_dict()) brings the state into it"
            )


def _check_keys(name: str, state: dict[str, Any], layout: Layout) -> None:
    for key, slot in layout.items():
        if key not in state:
            raise ValueError(f"the state of {name} has no {key}, but {', '.join(state)}")
        if isinstance(slot, list):
            _check_blocks(f"{key} of {name}", state[key], len(slot))


def _check_blocks(name: str, blocks: Any, count: int) -> None:
    if not isinstance(blocks, dict):
        raise TypeError(f"{name} must be a dict of blocks, not {type(blocks).__name__}")
    if len(blocks) != count:
        raise ValueError(
            f"{name} has {len(blocks)} blocks where {count} are needed: the blocks of a parameter "
            "are fixed by its first step"
        )
    if blocks.keys() != {str(block) for block in range(count)}:
        raise ValueError(f"{name} has blocks {[*blocks]}, expected '0' to '{count - 1}'")
