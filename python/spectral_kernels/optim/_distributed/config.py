"""How an optimizer is spread over ranks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ... import _checks


@dataclass(frozen=True)
class Distributed:
    """How an optimizer is spread over ranks; that it is, DTensors say themselves.

    Args:
        group: a ProcessGroup, or a DeviceMesh of one dimension, that plain parameters are split
            over: each matrix is stepped by one of its ranks, which must all hold the same
            parameters and gradients, as under DDP. None for DTensors, which bring their mesh along.
        wire: the same on all ranks. None: weights and gradients travel to the owner, and weights
            back, as they are, so that they are those of one process, bit for bit. torch.bfloat16:
            gradients travel, and updates back, both rounded to bfloat16, 4 bytes an element in
            place of 12. A step is then that of one process with the rounded gradient, but that
            every element of its update is off by at most a 256th part, bfloat16's unit roundoff.
        keep_weights: owners keep a copy of the weights of what they own, so that gradients travel
            to them and weights come back, 8 bytes an element in float32 in place of 12, with the
            same bits. Every step compares checksums of the weights with those that the step before
            has written; what somebody else has changed since then travels once more.
        hops: "one": parts go to the owner, and back, at once. "each": along one dimension of the
            mesh after another, beginning with the last one, so that a rank sends to those of its
            lines in the mesh alone. "auto": "each" on meshes of more than 64 ranks. The same bits.
        bucket_bytes: matrices that travel together have at most so many bytes, unless it takes more
            of them to give every rank one.
        patience: seconds that state_dict(), load_state_dict() and consolidate() wait for ranks that
            have not called them.

    Raises:
        TypeError, ValueError: a value that cannot work.
    """

    group: Any = None
    wire: torch.dtype | None = None
    keep_weights: bool = False
    hops: str = "auto"
    bucket_bytes: int = 256 << 20
    patience: float = 60.0

    def __post_init__(self) -> None:
        if self.wire not in (None, torch.bfloat16):
            raise ValueError(f"wire must be None or torch.bfloat16, not {self.wire!r}")
        if not isinstance(self.keep_weights, bool):
            raise TypeError(f"keep_weights must be True or False, not {self.keep_weights!r}")
        if self.keep_weights and self.wire is not None:
            raise ValueError(
                f"keep_weights is for exact exchanges: with wire={self.wire} no weights travel"
            )
        _checks.choice("hops", self.hops, ("auto", "one", "each"))
        _checks.integer("bucket_bytes", self.bucket_bytes, 1)
        _checks.number("patience", self.patience)


def config(given: Any) -> Distributed | None:
    """What a constructor's `distributed` means: None, a group, a mesh, or all of it."""
    known = given is None or isinstance(given, Distributed)
    found = given if known else Distributed(group=given)
    if found is not None and found.group is not None:
        _check_group(found.group)
    return found


def _check_group(group: Any) -> None:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(f"distributed must be a mesh of one dimension, not of {group.ndim}")
    elif not isinstance(group, ProcessGroup):
        raise TypeError(
            "distributed must be a ProcessGroup, a DeviceMesh or optim.Distributed, not "
            f"{type(group).__name__}"
        )
