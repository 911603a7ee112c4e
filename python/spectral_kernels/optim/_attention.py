"""Where attention modules keep several matrices in one parameter, as far as they tell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ._forms import MatrixDims
from ._roles import inner_of
from ._split import Split

# What a parameter may be split by: its projections, or the heads of each.
CHOICES = ("qkv", "heads")

# Names of projections, in lower case: queries, keys and values one below the other; the three
# interleaved head by head, so that only heads are blocks of rows; and each of them by itself.
_FUSED = {"qkv", "wqkv", "c_attn", "qkv_proj", "to_qkv", "in_proj", "attn_qkv", "proj_qkv"}
_INTERLEAVED = {"query_key_value"}
_QUERIES = {"q_proj", "query", "wq", "to_q", "q_lin", "q", "c_q", "query_proj"}
_KEYS = {"k_proj", "key", "wk", "to_k", "k_lin", "k", "c_k", "key_proj"}
_VALUES = {"v_proj", "value", "wv", "to_v", "v_lin", "v", "c_v", "value_proj"}

_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead")
_KEY_HEADS = (
    *("num_key_value_heads", "num_kv_heads", "n_kv_heads", "n_kv_head", "kv_heads"),
    "n_local_heads",
)
_WIDTHS = ("head_dim", "attention_head_size", "head_size", "hidden_size_per_attention_head")


def splits_of(model: nn.Module, by: str) -> dict[Tensor, tuple[Split, MatrixDims | None]]:
    """The parameters that are several matrices, with their `split` and `matrix_dims`.

    nn.MultiheadAttention tells of its own; of other modules with the usual names of projections,
    those that tell their numbers of heads, or whose fused projection is three times as high as
    wide. A projection that is stored transposed, as transformers' Conv1D, is read by `matrix_dims`.

    Args:
        model: any module.
        by: "qkv" or "heads".
    """
    found: dict[Tensor, tuple[Split, MatrixDims | None]] = {}
    for module in model.modules():
        if isinstance(module, nn.MultiheadAttention):
            found.update(_of_torch(module, by))
            continue
        for name, child in module.named_children():
            layer = _innermost(child)
            weight = getattr(layer, "weight", None)
            if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
                continue
            transposed = type(layer).__name__ == "Conv1D"
            wide, high = weight.shape if transposed else (weight.shape[1], weight.shape[0])
            split = _split_of(module, name.lower(), high, wide, by)
            if split is not None:
                found[weight] = split, ((1,), (0,)) if transposed else None
    return found


def _of_torch(
    module: nn.MultiheadAttention, by: str
) -> Iterator[tuple[Tensor, tuple[Split, MatrixDims | None]]]:
    if module.in_proj_weight is not None:
        yield module.in_proj_weight, (3 if by == "qkv" else 3 * module.num_heads, None)
    elif by == "heads" and module.num_heads > 1:
        for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
            yield getattr(module, name), (module.num_heads, None)


def _innermost(module: nn.Module) -> nn.Module:
    while (inner := inner_of(module)) is not None:
        module = module.get_submodule(inner)
    return module


def _split_of(module: nn.Module, name: str, high: int, wide: int, by: str) -> Split:
    """The parts of a projection of an attention module, None where it is one or nobody tells."""
    heads = _told(module, _HEADS)
    keys = _told(module, _KEY_HEADS) or heads
    if name in _FUSED | _INTERLEAVED:
        if heads is None or keys is None:
            return 3 if by == "qkv" and name in _FUSED and high == 3 * wide else None
        count = heads + 2 * keys
        width = _told(module, _WIDTHS) or high // count
        if width * count != high:
            return None
        if by == "heads":
            return count
        if name in _INTERLEAVED:
            return None
        return 3 if keys == heads else (heads * width, keys * width, keys * width)
    if by == "heads" and name in _QUERIES | _KEYS | _VALUES:
        count = (heads if name in _QUERIES else keys) or 1
        width = _told(module, _WIDTHS) or high // count
        return count if count > 1 and width * count == high else None
    return None


def _told(module: nn.Module, names: tuple[str, ...]) -> int | None:
    """A number that a module, or its configuration, has under one of some names."""
    for owner in (module, getattr(module, "config", None)):
        for name in names:
            value: Any = getattr(owner, name, None)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
    return None
