"""Which parameters take the matrix rule and which AdamW."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from . import _attention, _roles, _rules
from ._forms import MatrixDims, form_of
from ._split import Split, sizes_of

# What an override may say; batched are matrices too.
CHOICES = ("matrix", "batched", "adamw")
# How a group declares what its matrices are, and what it does not say.
_DECLARED: Mapping[str, Any] = {"batched": False, "matrix_dims": None}


def param_groups(
    model: nn.Module,
    *,
    matrix: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] | None = None,
    split: str | None = None,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of a model: hidden matrices by the matrix rule, all others by AdamW.

    Modules and ties decide first, names second. AdamW gets what has fewer than two dimensions or
    is a single row or column (biases, norms, gains), embeddings and weights tied to them, output
    layers (by name, a linear layer that is the model's last part, or one outside of all blocks
    with an output for every word), depthwise convolutions, and parameters of three or more than
    five dimensions unless their module tells what they are: kernels of one-dimensional
    convolutions are flattened to (out, rest), experts in one tensor are a batch of matrices.
    Frozen parameters are left out.

    Names and roles are those of the model within wrappers: torch.compile, DistributedDataParallel,
    DataParallel, FSDP, activation checkpointing, AveragedModel, PEFT's adapters.

    Args:
        model: any module.
        matrix, adamw: hyper-parameters of matrices and of AdamW, such as {"lr": 0.02}.
        overrides: shell patterns of parameter names, such as {"*.kernels": "batched"}, to
            "matrix", "batched" (the leading dimensions are a batch of matrices) or "adamw"; the
            first one that fits decides. A three-dimensional parameter may be a batch or a kernel,
            so "matrix" alone is not enough for it: say "batched", or give `matrix_dims` in matrix.
        split: "qkv" steps the queries, keys and values of a fused projection each by itself,
            "heads" also every head of them, and of projections that are apart. Those of
            nn.MultiheadAttention, and of modules that name them as usual (qkv, c_attn, qkv_proj,
            query_key_value, q_proj, ...) and tell their numbers of heads; for `Muon`, see its
            `split`. Blocks of an interleaved query_key_value are heads, so "qkv" leaves it whole.
        verbose: print which parameter went where, and why.

    Returns:
        Groups of named parameters with an `algorithm`, for the optimizers here: matrices, those of
        every split, kernels of one-dimensional convolutions, batches of matrices, and AdamW's.

    Raises:
        ValueError: nothing to optimize, an override that names no algorithm or fits nothing, or
            one whose parameter cannot be read as matrices; a split that nothing takes.
        TypeError: a parameter of a lazy module that has no shape yet.
    """
    overrides = {} if overrides is None else overrides
    for pattern, algorithm in overrides.items():
        if algorithm not in CHOICES:
            raise ValueError(
                f"overrides[{pattern!r}] must be one of {', '.join(CHOICES)}, not {algorithm!r}"
            )
    members = _roles.parameters_of(model)
    for each in members:
        if is_lazy(each.param):
            raise TypeError(f"{each.name} has no shape yet: run the lazy module once before")
    if split is not None and split not in _attention.CHOICES:
        raise ValueError(f"split must be None, {' or '.join(_attention.CHOICES)}, not {split!r}")
    splits = {} if split is None else _attention.splits_of(model, split)
    roles = _roles.Roles(model, members)
    named = [each for each in members if each.param.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter that requires grad")
    for pattern in overrides:
        if not any(_fits(each, pattern) for each in named):
            raise ValueError(f"overrides[{pattern!r}] fits no parameter")
    routed = []
    parts: dict[tuple[Split, MatrixDims | None], list[tuple[str, Tensor]]] = {}
    for each in named:
        role = roles.of(each)
        chosen = next((a for o, a in overrides.items() if _fits(each, o)), None)
        if chosen == "matrix" and role.kind == "kernel":
            chosen = "kernel"
        if chosen is not None:
            role = _roles.Role(chosen, "override")
        reason = role.reason
        if role.kind == "matrix" and each.param in splits:
            several = splits[each.param]
            reason += f", {_count_of(each.param, *several)} parts"
            parts.setdefault(several, []).append((each.name, each.param))
        routed.append((each.name, each.param, role.kind, reason))
    if split is not None and not parts:
        raise ValueError(
            f"split={split!r} finds no projection in {type(model).__name__} that tells its parts: "
            "say split in a group of Muon's"
        )
    if verbose:
        print(_table(routed))
    groups: list[dict[str, Any]] = []
    kinds = {
        "matrix": {**(matrix or {}), "algorithm": "matrix"},
        "kernel": {
            **(matrix or {}),
            "algorithm": "matrix",
            "matrix_dims": _roles.KERNEL_1D,
        },
        "batched": {**(matrix or {}), "algorithm": "matrix", "batched": True},
        "adamw": {**(adamw or {}), "algorithm": "adamw"},
    }
    apart = {param for members in parts.values() for _, param in members}
    for kind, values in kinds.items():
        taken = [
            (name, param)
            for name, param, chosen, _ in routed
            if chosen == kind and param not in apart
        ]
        if kind != "adamw":
            _check_matrices(taken, values)
        if taken:
            groups.append({**values, "params": taken})
        for (sizes, dims), split_so in parts.items() if kind == "matrix" else ():
            read = {} if dims is None else {"matrix_dims": dims}
            groups.append({**values, **read, "split": sizes, "params": split_so})
    return groups


def _count_of(param: Tensor, split: Split, matrix_dims: MatrixDims | None) -> int:
    form = form_of(param.shape, batched=False, matrix_dims=matrix_dims)
    return len(sizes_of(form.shape[-2], split))


def _check_matrices(members: Sequence[tuple[str, Tensor]], values: Mapping[str, Any]) -> None:
    given = {name: values.get(name, default) for name, default in _DECLARED.items()}
    declared = _rules.check(given, {name: _rules.MATRIX[name] for name in _DECLARED}, "matrix: ")
    for name, param in members:
        try:
            form_of(param.shape, **declared)
        except ValueError as error:
            raise ValueError(
                f"{name} of shape {tuple(param.shape)}: {error}, or overrides={{{name!r}: "
                "'batched'}"
            ) from None


def _fits(each: _roles.Found, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in (each.name, each.raw))


def _table(routed: Sequence[tuple[str, Tensor, str, str]]) -> str:
    rows = [
        (name, "x".join(map(str, param.shape)) or "scalar", algorithm, reason)
        for name, param, algorithm, reason in routed
    ]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False))
        + f"  {row[3]}"
        for row in rows
    ]
    elements: Counter[str] = Counter()
    for _, param, algorithm, _ in routed:
        elements[algorithm] += param.numel()
    totals = ", ".join(f"{algorithm} {count:,}" for algorithm, count in sorted(elements.items()))
    return "\n".join([*lines, f"elements: {totals}"])
