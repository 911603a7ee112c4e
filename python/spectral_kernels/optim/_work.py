"""What a step of an optimizer works on: shares of groups, parts of them, and plans."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import Tensor

from . import _adamw
from ._forms import Form, layouts
from ._groups import Group, Values


def same_objects(one: Sequence[Any], other: Sequence[Any]) -> bool:
    return len(one) == len(other) and all(map(operator.is_, one, other))


@dataclass
class Part:
    """The matrices of one group on one device: what one call of the list operator works on.

    Attributes:
        lists: parameters, every state in the operator's order, step counts.
        sources: for every parameter its place among the group's gradients, and its form, None where
            the gradient is a matrix as it is.
        names: for every entry its parameter's name.
        offsets: for every entry its place in a staggered schedule.
        staged: parameters that cannot be viewed as matrices, with the copies that stand for them.
        options: the operator's options.
        made_from: the values that they were made from.
        seen: the parameters have been looked at, where a rule asks something of them.
    """

    lists: list[list[Tensor]]
    sources: list[tuple[int, Form | None]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    staged: list[tuple[Tensor, Form, Tensor]] = field(default_factory=list)
    options: dict[str, Any] = field(default_factory=dict)
    made_from: Values | None = None
    seen: bool = False


@dataclass
class Share:
    """The parameters of a group that have a gradient and take one algorithm.

    Attributes:
        params, grads: those, and their gradients; of what is spread over ranks the plain tensors
            that are stepped here.
        positions: their places in the group.
        keys: the group's own tensors, which their state is filed under.
    """

    params: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    positions: list[int] = field(default_factory=list)
    keys: list[Tensor] = field(default_factory=list)

    def add(self, param: Tensor, grad: Tensor, position: int, key: Tensor) -> None:
        """Appends a parameter."""
        self.params.append(param)
        self.grads.append(grad)
        self.positions.append(position)
        self.keys.append(key)

    def only(self, kept: Callable[[Tensor], bool]) -> Share:
        """Those whose key is kept."""
        share = Share()
        for each in zip(self.params, self.grads, self.positions, self.keys, strict=True):
            if kept(each[-1]):
                share.add(*each)
        return share


@dataclass
class Current:
    """The values of a group as they are now, None for an algorithm that it does not hold."""

    matrix: dict[str, Any] | None
    adamw: dict[str, Any] | None


# A group with its place among the groups, its values, and what of it has a gradient.
Work: TypeAlias = tuple[int, Group, Current, tuple[Share, Share]]
MatrixCall: TypeAlias = tuple[Part, list[Tensor], Values, Tensor]
AdamwCall: TypeAlias = tuple[_adamw.Part, list[Tensor], Values, Group]


@dataclass
class Plan:
    """What a step is made of, valid while parameters, their memory and their state stay.

    Attributes:
        params: the parameters.
        layouts: where their elements lie.
        states: every value of their state, the same objects.
        listed: dicts of blocks among those, with the objects in them.
        based, based_layouts: state of which parts hold views, and where its elements lie.
        parts: by device.
        adamw: the same for AdamW.
    """

    params: list[Tensor]
    layouts: list[tuple[Any, ...]]
    states: list[Any]
    listed: list[tuple[list[Tensor], dict[str, Tensor]]]
    based: list[Tensor]
    based_layouts: list[tuple[Any, ...]]
    parts: list[Part] = field(default_factory=list)
    adamw: list[_adamw.Part] = field(default_factory=list)

    def fits(self, params: list[Tensor], states: list[Any]) -> bool:
        """Whether nothing has changed since it was made."""
        return (
            same_objects(self.params, params)
            and self.layouts == layouts(params)
            and same_objects(self.states, states)
            and all(same_objects(known, [*now.values()]) for known, now in self.listed)
            and self.based_layouts == layouts(self.based)
        )
