"""What a model's modules say of the roles of its parameters."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import ParametrizationList

from . import _names
from ._forms import Form, MatrixDims, form_of

# How the matrix of a one-dimensional convolution lies in its kernel, as that of the others does.
KERNEL_1D: MatrixDims = ((0,), (1, 2))

# What holds a whole model, or a layer, and adds nothing to its parameters: the child's name alone
# tells it, or the class (also a derived one) and the child's name.
_INNER = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_forward_module")
_WRAPPERS = {
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "AveragedModel": "module",
    "DeepSpeedEngine": "module",
    "PeftModel": "base_model",
    "BaseTuner": "model",
    "BaseTunerLayer": "base_layer",
}
_LINEAR = (nn.Linear, nn.MultiheadAttention, nn.RNNBase, nn.RNNCellBase)
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, _NormBase)
_NOWHERE = 1 << 30
_COUNTS = ("num_experts", "n_experts", "num_local_experts", "n_routed_experts")
# Tables of places and of kinds of token, which no output layer stands against.
_PLACES = re.compile(r"(.*_)?(pos|position|positions|positional|type|segment)(_.*)?|wpe")


@dataclass(frozen=True)
class Role:
    """What takes a parameter: "matrix", "batched", "kernel" (of one dimension) or "adamw"."""

    kind: str
    reason: str


@dataclass
class Place:
    """One place of a parameter.

    Attributes:
        module: the module that it belongs to; of a parametrization, the module that has it.
        parts: components of its name.
        inside: how many of them lead to the first repeated block.
    """

    module: nn.Module
    parts: list[str]
    inside: int


@dataclass
class Found:
    """A parameter of a model.

    Attributes:
        name: as in the model without wrappers.
        raw: as in the model.
        param: the parameter.
        places: where it is.
    """

    name: str
    raw: str
    param: Tensor
    places: list[Place] = field(default_factory=list)


def inner_of(module: nn.Module) -> str | None:
    """The child that a wrapper wraps, or None for another module."""
    children = module._modules
    for name in _INNER:
        if children.get(name) is not None:
            return name
    for cls in type(module).__mro__:
        child = _WRAPPERS.get(cls.__name__)
        if child is not None and children.get(child) is not None:
            return child
    return None


def parameters_of(model: nn.Module) -> list[Found]:
    """Every parameter of a model once, in the order of `named_parameters`."""
    found: dict[Tensor, Found] = {}
    modules = dict(model.named_modules())
    clean, inside = _names_of(model)
    for path, module in modules.items():
        for attribute, param in module._parameters.items():
            if param is None:
                continue
            raw = f"{path}.{attribute}" if path else attribute
            name = f"{clean[path]}.{attribute}" if clean[path] else attribute
            each = found.setdefault(param, Found(name, raw, param))
            owner = path
            if isinstance(module, ParametrizationList):
                last = path.rpartition(".")[2]
                owner = f".{path}".removesuffix(f".parametrizations.{last}")[1:]
                name = f"{clean[owner]}.{last}".removeprefix(".")
            parts = _names.components(name)
            each.places.append(Place(modules[owner], parts, min(inside[owner], len(parts))))
    members = list(found.values())
    if len({each.name for each in members}) < len(members):
        for each in members:
            each.name = each.raw
    return members


def _names_of(model: nn.Module) -> tuple[dict[str, str], dict[str, int]]:
    """For the path of every module: that without wrappers, and how much of it leads to a block."""
    clean, inside = {"": ""}, {"": _NOWHERE}
    seen = {model}

    def visit(module: nn.Module, path: str) -> None:
        inner, own = inner_of(module), clean[path]
        for name, child in module._modules.items():
            # As `named_modules`: a module in several places counts at the first one.
            if child is None or child in seen:
                continue
            seen.add(child)
            full = f"{path}.{name}" if path else name
            clean[full] = own if name == inner else f"{own}.{name}" if own else name
            inside[full] = inside[path]
            if inside[path] == _NOWHERE and _repeats(module):
                inside[full] = len(_names.components(own)) if own else 0
            visit(child, full)

    visit(model, "")
    return clean, inside


def _repeats(module: nn.Module) -> bool:
    """Whether the children of a module are blocks of a kind."""
    if isinstance(module, nn.ModuleList):
        return True
    if not isinstance(module, nn.Sequential):
        return False
    kinds = [type(child) for child in module.children() if _parts(child)]
    return len({*kinds}) < len(kinds)


def _parts(module: nn.Module) -> list[nn.Module]:
    """The children that have parameters."""
    return [child for child in module.children() if any(True for _ in child.parameters())]


def kind_of(module: nn.Module) -> str:
    """What a module's class makes of its own parameters.

    "linear", "conv", "embedding", "norm" or "other".
    """
    if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return "embedding"
    if isinstance(module, _ConvNd):
        return "conv"
    if isinstance(module, _LINEAR):
        return "linear"
    if isinstance(module, _NORMS):
        return "norm"
    name = type(module).__name__.lower()
    if "expert" in name:
        return "other"
    for word, kind in (("linear", "linear"), ("conv1d", "linear"), ("embed", "embedding")):
        if word in name:
            return kind
    return "norm" if "norm" in name else "other"


class Roles:
    """The roles in one model: heads are found once."""

    def __init__(self, model: nn.Module, members: list[Found]) -> None:
        self._heads = {id(part) for head in _last_layers(model) for part in head.modules()}
        self._words = {
            place.module.num_embeddings
            for each in members
            for place in each.places
            if isinstance(place.module, nn.Embedding)
            and not any(map(_PLACES.fullmatch, place.parts))
        }

    def of(self, each: Found) -> Role:
        """The role of a parameter: the strictest of its places."""
        roles = [self._at(place, each.param) for place in each.places]
        strict = [role for role in roles if role.kind == "adamw"]
        kinds = {(type(place.module), place.parts[-1]) for place in each.places}
        if len(roles) > 1 and (strict or len(kinds) > 1):
            return Role("adamw", "tied")
        return strict[0] if strict else roles[0]

    def _at(self, place: Place, param: Tensor) -> Role:
        if param.ndim < 2:
            return Role("adamw", "norm or bias")
        if param.numel() and param.numel() == max(param.shape):
            return Role("adamw", "vector")
        kind = kind_of(place.module)
        if kind in ("embedding", "norm"):
            return Role("adamw", "embedding" if kind == "embedding" else "norm or bias")
        if self._is_head(place, param):
            return Role("adamw", "head")
        if kind == "linear" and _names.is_table(place.parts):
            return Role("adamw", "embedding")
        if kind == "conv" and _is_depthwise(place.module):
            return Role("adamw", "depthwise")
        if kind == "conv" and param.ndim == 3:
            form = form_of(param.shape, batched=False, matrix_dims=KERNEL_1D)
            return _matrix("kernel", form)
        if kind == "other":
            found = _of_experts(place, param)
            if found is not None:
                return found
            reason = _names.of_own(place.parts)
            if reason is not None:
                return Role("adamw", reason)
        if param.ndim == 3 or param.ndim > 5:
            return Role("adamw", f"{param.ndim}-D, undeclared")
        return _matrix("matrix", form_of(param.shape, batched=False, matrix_dims=None))

    def _is_head(self, place: Place, param: Tensor) -> bool:
        if id(place.module) in self._heads or _names.is_head(place.parts, place.inside):
            return True
        # A layer outside of all blocks with an output for every word.
        return (
            kind_of(place.module) == "linear"
            and param.ndim == 2
            and place.inside >= len(place.parts)
            and param.shape[0] in self._words
            and param.shape[0] != param.shape[1]
        )


def _matrix(kind: str, form: Form) -> Role:
    if min(form.shape[-2:]) == 1:
        return Role("adamw", "vector")
    return Role(kind, "hidden matrix" if kind == "matrix" else "convolution")


def _is_depthwise(module: nn.Module) -> bool:
    assert isinstance(module, _ConvNd)
    groups = module.groups
    channels = module.out_channels if isinstance(module, _ConvTransposeNd) else module.in_channels
    return groups > 1 and groups == channels


def _of_experts(place: Place, param: Tensor) -> Role | None:
    """Experts in one tensor are a batch of matrices, their biases one of vectors."""
    count = param.shape[0]
    batches = [
        other
        for other in place.module._parameters.values()
        if other is not None and other.ndim == 3 and other.shape[0] == count
    ]
    told = (
        "expert" in type(place.module).__name__.lower()
        or _names.is_expert(place.parts)
        or any(getattr(place.module, name, None) == count for name in _COUNTS)
    )
    if not told or not batches:
        return None
    if param.ndim == 2:
        return Role("adamw", "of experts, no batch")
    if param.ndim != 3:
        return None
    return Role("adamw", "vector") if min(param.shape[1:]) == 1 else Role("batched", "experts")


def _trunk(model: nn.Module) -> nn.Module:
    """The module whose children are a model's parts, below wrappers and modules around it."""
    module = model
    while True:
        inner = inner_of(module)
        if inner is not None:
            module = module.get_submodule(inner)
            continue
        parts = _parts(module)
        own = any(param is not None for param in module._parameters.values())
        if own or len(parts) != 1 or isinstance(module, nn.ModuleList):
            return module
        module = parts[0]


def _last_layers(model: nn.Module) -> Iterator[nn.Module]:
    """A linear layer that is the last part of a model, and those that stand beside it."""
    trunk = _trunk(model)
    while isinstance(trunk, nn.Sequential) and isinstance(_end(trunk), nn.Sequential):
        trunk = _parts(trunk)[-1]
    parts = _parts(trunk)
    if kind_of(trunk) != "other" or isinstance(trunk, nn.ModuleList) or not parts:
        return
    last = _linear(parts[-1])
    if last is None:
        return
    yield parts[-1]
    for part in reversed(parts[:-1]):
        beside = _linear(part)
        # It reads what the last one reads, and cannot be what the last one reads.
        if (
            beside is None
            or beside.in_features != last.in_features
            or beside.out_features == last.in_features
        ):
            return
        yield part


def _end(module: nn.Module) -> nn.Module | None:
    parts = _parts(module)
    return parts[-1] if parts else None


def _linear(module: nn.Module) -> nn.Linear | None:
    while (inner := inner_of(module)) is not None:
        module = module.get_submodule(inner)
    return module if isinstance(module, nn.Linear) else None
