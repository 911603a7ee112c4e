"""What a parameter's name says of its role."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

# Components that wrappers put into names: compiled, data-parallel and sharded modules, recomputed
# activations, Lightning Fabric, and PEFT's adapters around a layer or beside it.
_WRAPPERS = frozenset(
    {
        "_orig_mod",
        "module",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "base_layer",
        "original_module",
        "modules_to_save",
    }
)

# Components of a parameter's name, in the words that common models use.
_EMBEDDING = re.compile(
    r"(.*_)?(emb|embs|embed|embeds|embedder|embedding|embeddings)(_.*)?|w[tp]e|codebooks?|latents?"
)
_TOKEN = re.compile(r"(.*_)?tokens?")
# Tables of whole vocabularies, whatever module holds them.
_TABLE = re.compile(r"(tok|token|tokens|word|words|vocab|vocabulary)_(emb|embs|embed.*)|wte")
# Tables that are a parameter themselves: of places, and of what asks an attention.
_PLACES = "(.*_)?pos(ition(s|al)?)?(_([hwdtxyz]|table|enc|encoding))?"
_OWN_TABLE = re.compile(rf"{_PLACES}|(.*_)?(queries|prototypes?)")
_NORM = re.compile(r"(.*_)?(bias|norm)(_.*)?|ln\d*|ln_.*|weight_g|(.*_)?log")
# The last component of a layer's name that says it is one, whatever it is a layer of.
_LAYER = re.compile(
    r"(.*_)?(proj|project|projection|projector|linear|lin|dense|fc|mlp|conv|mapping)"
    r"(_?\d+|_in|_out)?"
)
_DEPTHWISE = re.compile(r"(.*_)?(dw|depthwise)(_?conv\d*)?|dwconv\d*|conv_?dw\d*|depthwise_?.*")
_EXPERTS = re.compile(r"(.*_)?experts?(_.*)?")

# Heads of a model, in any place.
_MODEL_HEAD = re.compile(
    r"(.*_)?(lm|mlm|cls|shared|output|vocab|classification|classifier|prediction)_heads?"
    r"|(.*_)?logits|un_?embed(ding)?s?|embed_out|vocab_(proj.*|out.*)"
)
# Of a model, or deeper down of attention.
_HEAD = re.compile(r"(.*_)?(head|heads|classifier)(_(dist|aux)\w*)?|score|scores")
# Names that a last layer may have, and one in the middle too.
_OUTPUT = re.compile(r"outputs?(_(layer|proj|projection))?|readout|decoder|generator|fc_out")
_ATTENTION = re.compile(r".*(attn|attention).*")


def components(name: str) -> list[str]:
    """The components of a name in lower case, without those of wrappers."""
    parts = name.lower().split(".")
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return [part for part in parts if part not in _WRAPPERS]


def by_name(name: str, ndim: int = 2) -> str | None:
    """Why a parameter's name sends it to AdamW, or None.

    Args:
        name: dotted, as `named_parameters` gives it.
        ndim: dimensions of the parameter: kernels of convolutions are no tables and no gains.
    """
    parts = components(name)
    if is_head(parts):
        return "head"
    if ndim >= 3 and any(map(_DEPTHWISE.fullmatch, parts[-2:])):
        return "depthwise"
    # The table that an encoder and a decoder share.
    if is_table(parts) or parts[-2:] == ["shared", "weight"]:
        return "embedding"
    if ndim >= 4 or _is_layer(parts):
        return None
    return of_own(parts)


def of_own(parts: Sequence[str]) -> str | None:
    """Why AdamW takes a parameter that no module of a known kind holds, or None."""
    if _OWN_TABLE.fullmatch(parts[-1]):
        return "embedding"
    for part in parts:
        if _EMBEDDING.fullmatch(part) or _TOKEN.fullmatch(part):
            return "embedding"
        if _NORM.fullmatch(part):
            return "norm or bias"
    return None


def is_head(parts: Sequence[str], inside: int | None = None) -> bool:
    """Whether the components say that a model's output layer is meant.

    Args:
        parts: components of a parameter's name.
        inside: how many of them lead to the first repeated block; None: as numbers among them say.
    """
    if any(map(_MODEL_HEAD.fullmatch, parts)):
        return True
    if inside is None:
        inside = next((i for i, part in enumerate(parts) if i and part.isdigit()), len(parts))
    for depth, part in enumerate(parts[:inside]):
        if _ATTENTION.fullmatch(part):
            return False
        if _HEAD.fullmatch(part):
            return True
        # Such a name stands for the layer itself, in the model or one level down.
        itself = depth == len(parts) - 2
        if itself and (part == "decoder" or (depth <= 1 and _OUTPUT.fullmatch(part))):
            return True
    return False


def is_table(parts: Sequence[str]) -> bool:
    """Whether a linear layer is named as the table of a vocabulary."""
    return len(parts) > 1 and _TABLE.fullmatch(parts[-2]) is not None


def is_expert(parts: Sequence[str]) -> bool:
    """Whether a name tells of experts."""
    return any(map(_EXPERTS.fullmatch, parts))


def _is_layer(parts: Sequence[str]) -> bool:
    """Whether a weight is that of a projection, which may serve an embedding or a norm."""
    return len(parts) > 1 and parts[-1] == "weight" and _LAYER.fullmatch(parts[-2]) is not None


def likely_tables(matrices: Sequence[tuple[str, Sequence[int]]]) -> list[str]:
    """Those of some matrices that look like embeddings or heads by their shapes, in words.

    They are far from square, and one of their sides is rare: hidden layers repeat.
    """
    sides = Counter(side for _, shape in matrices for side in {*shape})
    few = len(matrices) < 4
    return [
        f"{name} of shape {tuple(shape)}"
        for name, shape in matrices
        if min(shape) > 1
        and (
            max(shape) >= 8 * min(shape)
            if few
            else max(shape) > 4 * min(shape) and min(sides[side] for side in shape) <= 2
        )
    ]
