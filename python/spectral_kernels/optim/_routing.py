"""Which parameters take the matrix rule and which AdamW."""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

ALGORITHMS = ("matrix", "adamw")

# Components of a parameter's name, in the words that common models use.
_EMBEDDING = re.compile(r"(.*_)?(emb|embs|embed|embeds|embedding|embeddings)(_.*)?|w[tp]e")
_TOKEN = re.compile(r"(.*_)?tokens?")
_HEAD = re.compile(r"(.*_)?(head|heads|classifier)|score")
_NORM = re.compile(r"(.*_)?(bias|norm)(_.*)?|ln\d*|ln_.*")
_WRAPPERS = ("_orig_mod", "module")


def by_name(name: str) -> str | None:
    """Why a parameter's name sends it to AdamW, or None."""
    components = [part for part in name.lower().split(".") if part not in _WRAPPERS]
    for depth, component in enumerate(components):
        if _EMBEDDING.fullmatch(component) or _TOKEN.fullmatch(component):
            return "embedding"
        # Deeper down, heads are those of attention.
        if depth < 2 and _HEAD.fullmatch(component):
            return "head"
        if _NORM.fullmatch(component):
            return "norm or bias"
    return None


def param_groups(
    model: nn.Module,
    *,
    matrix: Mapping[str, Any] | None = None,
    adamw: Mapping[str, Any] | None = None,
    overrides: Mapping[str, str] | None = None,
    verbose: bool = True,
) -> list[dict[str, Any]]:
    """Parameter groups of a model: hidden matrices by the matrix rule, all others by AdamW.

    AdamW gets what has fewer than two dimensions (biases, norms), embeddings, weights that several
    modules share (tied heads), heads (by name, or a linear layer that is the model's last direct
    child), and parameters of three or more than five dimensions, which are matrices only if their
    group says so. Frozen parameters are left out.

    Args:
        model: any module.
        matrix, adamw: hyper-parameters of the two groups, such as {"lr": 0.02}.
        overrides: shell patterns of parameter names, such as {"*.experts.*": "matrix"}, to "matrix"
            or "adamw"; the first one that fits decides.
        verbose: print which parameter went where, and why.

    Returns:
        One or two groups of named parameters with an `algorithm`, for the optimizers here.

    Raises:
        ValueError: nothing to optimize, or an override that names no algorithm or fits nothing.
    """
    overrides = {} if overrides is None else overrides
    for pattern, algorithm in overrides.items():
        if algorithm not in ALGORITHMS:
            raise ValueError(
                f"overrides[{pattern!r}] must be one of {', '.join(ALGORITHMS)}, not {algorithm!r}"
            )
    named = [(name, param) for name, param in model.named_parameters() if param.requires_grad]
    if not named:
        raise ValueError(f"{type(model).__name__} has no parameter that requires grad")
    for pattern in overrides:
        if not any(fnmatch.fnmatchcase(name, pattern) for name, _ in named):
            raise ValueError(f"overrides[{pattern!r}] fits no parameter")
    owners = _owners(model)
    routed = []
    for name, param in named:
        chosen = next((a for o, a in overrides.items() if fnmatch.fnmatchcase(name, o)), None)
        reason = _why_adamw(name, param, owners[param]) if chosen is None else "override"
        if chosen is None:
            chosen = "matrix" if reason is None else "adamw"
        routed.append((name, param, chosen, reason or "hidden matrix"))
    if verbose:
        print(_table(routed))
    groups: list[dict[str, Any]] = []
    for algorithm, values in (("matrix", matrix), ("adamw", adamw)):
        members = [(name, param) for name, param, chosen, _ in routed if chosen == algorithm]
        if members:
            groups.append({**(values or {}), "params": members, "algorithm": algorithm})
    return groups


def _owners(model: nn.Module) -> dict[Tensor, list[tuple[nn.Module, bool]]]:
    """The modules that hold each parameter, and whether they are the model's last linear child."""
    children = [child for child in model.children() if any(True for _ in child.parameters())]
    last = children[-1] if children and isinstance(children[-1], nn.Linear) else None
    owners: dict[Tensor, list[tuple[nn.Module, bool]]] = {}
    for module in model.modules():
        for param in module.parameters(recurse=False):
            owners.setdefault(param, []).append((module, module is last))
    return owners


def _why_adamw(name: str, param: Tensor, owners: list[tuple[nn.Module, bool]]) -> str | None:
    if param.ndim < 2:
        return "norm or bias"
    if len(owners) > 1:
        return "tied"
    module, is_last = owners[0]
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if "norm" in type(module).__name__.lower():
        return "norm or bias"
    if is_last:
        return "head"
    if param.ndim == 3 or param.ndim > 5:
        return f"{param.ndim}-D, undeclared"
    return by_name(name)


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
