"""The values of a group: those of the matrix rule, and AdamW's beside them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeAlias

from . import _names, _rules

Group: TypeAlias = dict[str, Any]
Values: TypeAlias = Mapping[str, Any]

# These mean the same to both kinds in every optimizer.
ALWAYS_SHARED = ("lr", "maximize")
# What only a group of both kinds has.
ONLY_AUTO = (*_rules.ADAMW_FIELDS, "unwritten")


def fields(adamw: Values) -> Group:
    """AdamW's values under the names that they have in a group of both kinds."""
    return {f"adamw_{name}": value for name, value in adamw.items()}


def adamw_values(group: Values, matrix: Iterable[str], shared: Sequence[str]) -> Group:
    """AdamW's values in a group of both kinds.

    An adamw_ field comes first, then what somebody wrote under the plain name, then the default of
    torch.optim.AdamW. group["unwritten"] holds the defaults that nobody wrote: a value counts as
    written as soon as it differs from them.

    Args:
        group: values under their names in the group.
        matrix: names of the matrix rule's values.
        shared: those of them that mean the same to AdamW.
    """
    unwritten = group.get("unwritten") or {}
    own = {*matrix}.difference(shared, ALWAYS_SHARED)
    values = {}
    for name, default in _rules.ADAMW_DEFAULTS.items():
        field, plain = group.get(f"adamw_{name}"), group.get(name)
        if field is not None:
            values[name] = field
        elif plain is None or name in own:
            values[name] = default
        elif name in unwritten:
            values[name] = _written(plain, unwritten[name], default)
        else:
            values[name] = plain
        if name == "betas" and field is None and name in shared and values[name][1] == 1.0:
            # AdaGrad's sum, which AdamW does not have.
            values[name] = (values[name][0], default[1])
    values["lr"] = adamw_lr(group)
    return values


def adamw_lr(group: Values) -> Any:
    """AdamW's learning rate: the group's, or adamw_lr, which follows the group's in proportion."""
    lr, own, at = (group.get(name) for name in ("lr", "adamw_lr", "adamw_lr_at"))
    if own is None:
        return lr
    return own * (lr / at) if at else own


def _written(value: Any, unwritten: Any, default: Any) -> Any:
    if isinstance(value, Sequence):
        parts = zip(value, unwritten, default, strict=True)
        return tuple(_written(*part) for part in parts)
    return default if value == unwritten else value


def filled(
    group: Group, defaults: Values, adamw: Values, unwritten: Values, *, has_matrix: bool
) -> Group:
    """A group of both kinds with every value that it does not bring along.

    Args:
        group: as the user wrote it.
        defaults: of the constructor.
        adamw: the constructor's values for AdamW.
        unwritten: defaults that the constructor's caller did not write.
        has_matrix: whether it holds a matrix now.
    """
    given = dict(adamw)
    own = {}
    if not has_matrix:
        # Its own values can only be meant for AdamW.
        given = {name: value for name, value in given.items() if name not in group}
        own = fields({"eps": group["eps"]} if group.get("eps") is not None else {})
    return {
        **defaults,
        **dict.fromkeys(_rules.ADAMW_FIELDS),
        "unwritten": {name: value for name, value in unwritten.items() if name not in group},
        **fields(given),
        **own,
        **group,
        "algorithm": "auto",
    }


def with_base(values: Group) -> Group:
    """Notes for which learning rate of the group adamw_lr was given."""
    if values["adamw_lr"] is values["lr"]:
        values["adamw_lr"] = None
    if values["adamw_lr"] is None:
        values["adamw_lr_at"] = None
    elif values["adamw_lr_at"] is None:
        values["adamw_lr_at"] = float(values["lr"])
    return values


def joined(matrix: Values, adamw: Values, routes: Sequence[bool], unwritten: Values) -> Group:
    """The group that an earlier version saved as two, one of each algorithm.

    Args:
        matrix, adamw: the saved halves.
        routes: for every parameter of the group whether it is a matrix.
        unwritten: defaults of the optimizer that loads.
    """
    group = {**matrix, "algorithm": "auto", **adamw_fields(matrix, adamw, unwritten)}
    for name in ("params", "param_names"):
        # Names that were given beside the parameters were left whole in both halves.
        whole = len(matrix.get(name, ())) == len(routes)
        if name in matrix and name in adamw and not whole:
            halves = iter(adamw[name]), iter(matrix[name])
            group[name] = [next(halves[is_matrix]) for is_matrix in routes]
    return group


def adamw_fields(matrix: Values, adamw: Values, unwritten: Values) -> Group:
    """The fields that keep saved values of AdamW beside those of the matrix rule."""
    kept = {
        name: value
        for name, value in unwritten.items()
        if matrix.get(name) == value and adamw.get(name) == _rules.ADAMW_DEFAULTS[name]
    }
    values = {
        name: adamw[name]
        for name in _rules.ADAMW
        if name in adamw and name not in kept and name not in ALWAYS_SHARED
    }
    found = {**dict.fromkeys(_rules.ADAMW_FIELDS), **fields(values), "unwritten": kept}
    if "maximize" in adamw and adamw["maximize"] != matrix.get("maximize"):
        found["adamw_maximize"] = adamw["maximize"]
    if "lr" in adamw and "lr" in matrix:
        found.update(_saved_rates(matrix, adamw))
    return found


def _saved_rates(matrix: Values, adamw: Values) -> Group:
    """adamw_lr and its base, from the rates that a scheduler started with where it moved both."""
    base, own = float(matrix["lr"]), float(adamw["lr"])
    first, own_first = matrix.get("initial_lr"), adamw.get("initial_lr")
    if first and own_first is not None:
        first, own_first = float(first), float(own_first)
        if abs(own_first * (base / first) - own) <= 1e-6 * own:
            base, own = first, own_first
    return {} if own == base else {"adamw_lr": own, "adamw_lr_at": base}


# What decides how a parameter is read: it belongs to the optimizer, not to what it loads.
_READING = ("batched", "matrix_dims", "split")


def by_name(
    saved: Sequence[Group], mine: Sequence[Group], routes: Sequence[Sequence[bool]]
) -> list[Group] | None:
    """Saved groups as this optimizer has them, or None where their order has to tell.

    Groups that hold the same names at other places are taken apart and put together anew. Names
    that are the same, are not known here, or are missing leave it to the order.

    Args:
        saved, mine: groups.
        routes: for every parameter of `mine` whether it is a matrix.

    Raises:
        ValueError: a parameter that takes another algorithm than when it was saved, one that is at
            another place beside unknown ones, or groups of several values that are one now.
    """
    theirs, ours = ([_plain_names(group) for group in groups] for groups in (saved, mine))
    if theirs == ours or None in theirs or None in ours:
        return None
    found = {
        name: (group, key)
        for group, names in zip(saved, theirs, strict=True)
        for name, key in zip(names or (), group["params"], strict=True)
    }
    known = [name for names in ours for name in names or ()]
    if len({*known}) < len(known) or len(found) < sum(len(group["params"]) for group in saved):
        return None
    if found.keys() != {*known}:
        _check_places(theirs, ours)
        return None
    _check_algorithms(found, mine, ours, routes)
    return [
        _gathered(index, group, [found[name] for name in names or ()])
        for index, (group, names) in enumerate(zip(mine, ours, strict=True))
    ]


def _plain_names(group: Group) -> list[str] | None:
    """The names of a group without those of wrappers, or None."""
    names = group.get("param_names")
    if names is None or len(names) != len(group["params"]):
        return None
    return [".".join(_names.components(name)) for name in names]


def _check_places(theirs: Sequence[Any], ours: Sequence[Any]) -> None:
    """Refuses a name that the optimizer has at another place."""
    places = {name: (i, j) for i, names in enumerate(ours) for j, name in enumerate(names)}
    for i, names in enumerate(theirs):
        for j, name in enumerate(names):
            if places.get(name, (i, j)) != (i, j):
                raise ValueError(
                    f"the loaded state dict has {name} as parameter {j} of group {i}, this "
                    f"optimizer as parameter {places[name][1]} of group {places[name][0]}, and "
                    "their other names are not the same"
                )


def _check_algorithms(
    found: Mapping[str, tuple[Group, Any]],
    mine: Sequence[Group],
    ours: Sequence[Any],
    routes: Sequence[Sequence[bool]],
) -> None:
    """Refuses parameters that take another algorithm than when they were saved."""
    moved = {}
    for group, names, each in zip(mine, ours, routes, strict=True):
        for name, given, is_matrix in zip(names, group["param_names"], each, strict=True):
            before = found[name][0].get("algorithm")
            if before in ("matrix", "adamw") and (before == "matrix") != is_matrix:
                moved[given] = before
    if moved:
        name, before = next(iter(moved.items()))
        others = f" and {len(moved) - 1} more" if len(moved) > 1 else ""
        raise ValueError(
            f"the loaded state dict has {name}{others} under {before!r}, this optimizer does not: "
            f"param_groups(model, overrides={moved!r}) keeps what was saved"
        )


def _gathered(index: int, group: Group, members: Sequence[tuple[Group, Any]]) -> Group:
    """One saved group for one of the optimizer's, out of those that its parameters were in."""
    sources = {id(source): source for source, _ in members}
    if not sources:
        return {name: value for name, value in group.items() if name != "params"} | {"params": []}
    apart = ("params", "param_names", *_READING)
    values = [
        {name: value for name, value in source.items() if name not in apart}
        for source in sources.values()
    ]
    if any(each != values[0] for each in values):
        raise ValueError(
            f"param_groups[{index}] holds parameters that the loaded state dict has in groups of "
            "several values"
        )
    own = {name: group[name] for name in (*_READING, "param_names") if name in group}
    return {**values[0], **own, "params": [key for _, key in members]}
