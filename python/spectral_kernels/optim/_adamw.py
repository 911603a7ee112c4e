"""AdamW's part of a step: torch's own functions, with the same policy for non-finite gradients."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw as torch_adamw

from ._groups import Values

_STATES = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")


@dataclass
class Part:
    """AdamW's parameters of one group on one device.

    Attributes:
        device: theirs.
        how: amsgrad, nonfinite and capturable, which its lists were made for.
        places: for every parameter its place among the group's gradients.
        params: the parameters.
        moments: exp_avg, exp_avg_sq and, with amsgrad, max_exp_avg_sq of each.
        steps: their step counts.
    """

    device: torch.device
    how: tuple[bool, str, bool]
    places: list[int] = field(default_factory=list)
    params: list[Tensor] = field(default_factory=list)
    moments: list[list[Tensor]] = field(default_factory=lambda: [[], [], []])
    steps: list[Tensor] = field(default_factory=list)

    @property
    def skips_on_device(self) -> bool:
        """Whether skipping is left to the device, which the host does not wait for."""
        return self.how[1] == "skip" and self.device.type == "cuda"

    @property
    def on_device(self) -> bool:
        """Whether steps are counted there."""
        return self.skips_on_device or (self.how[2] and self.device.type == "cuda")

    def add(self, place: int, param: Tensor, state: dict[str, Any]) -> None:
        """Appends a parameter; its step count moves to where it is needed."""
        if self.on_device != state["step"].is_cuda:
            where = self.device if self.on_device else "cpu"
            state["step"] = state["step"].to(where, torch.float32)
        self.places.append(place)
        self.params.append(param)
        self.steps.append(state["step"])
        for name, tensors in zip(_STATES[: 2 + self.how[0]], self.moments, strict=False):
            tensors.append(state[name])


def all_finite(x: Tensor) -> bool:
    """Whether x has no NaN or infinity; waits for its device."""
    # A sum is finite only if all its terms are, and costs one pass without a tensor of flags.
    return bool(x.sum().isfinite()) or bool(x.isfinite().all())


def _sums(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack([x.sum() for x in tensors])


def run(part: Part, grads: Sequence[Tensor], values: Values, skipped: Tensor, how: Values) -> None:
    """One step of torch.optim.AdamW, with `foreach` and `fused` where `how` has them.

    On a GPU a step that may skip is fused whatever they say, and no other is.

    Under nonfinite="skip" a parameter with a non-finite gradient keeps every bit, as do its moments
    and its step count, and `skipped` rises. On a GPU that is decided there, by torch's fused AdamW,
    one call a parameter.
    """
    own = [grads[place] for place in part.places]
    if part.skips_on_device:
        for i, grad in enumerate(own):
            run_on_device(part, i, grad, values, skipped)
        return
    kept = list(range(len(own)))
    # One look at all of them finds most steps clean.
    if values["nonfinite"] == "skip" and not bool(_sums(own).isfinite().all()):
        kept = [i for i, grad in enumerate(own) if all_finite(grad)]
        skipped += len(own) - len(kept)
    if not kept:
        return
    exp_avgs, exp_avg_sqs, maxima = part.moments
    torch_adamw(
        [part.params[i] for i in kept],
        [own[i] for i in kept],
        [exp_avgs[i] for i in kept],
        [exp_avg_sqs[i] for i in kept],
        [maxima[i] for i in kept] if values["amsgrad"] else [],
        [part.steps[i] for i in kept],
        capturable=part.on_device,
        amsgrad=values["amsgrad"],
        beta1=values["betas"][0],
        beta2=values["betas"][1],
        lr=values["lr"],
        weight_decay=values["weight_decay"],
        eps=values["eps"],
        maximize=values["maximize"],
        foreach=how.get("foreach"),
        # The fused kernel on a GPU wants step counts there.
        fused=how.get("fused") if part.device.type == "cpu" else None,
    )


def run_on_device(part: Part, i: int, grad: Tensor, values: Values, skipped: Tensor) -> None:
    """The step of the i-th parameter, or none, as its gradient says, without a wait."""
    found = grad.isfinite().all().logical_not().to(torch.float32)
    skipped += found.to(skipped.dtype)
    params, grads, *moments = (
        [torch.view_as_real(x) if x.is_complex() else x]
        for x in (part.params[i], grad, *[each[i] for each in part.moments if each])
    )
    lr = values["lr"]
    step = part.steps[i]
    step += 1.0 - found
    torch._fused_adamw_(
        params,
        grads,
        moments[0],
        moments[1],
        moments[2] if values["amsgrad"] else [],
        [step],
        amsgrad=values["amsgrad"],
        lr=lr.to(part.device, torch.float32, non_blocking=True) if isinstance(lr, Tensor) else lr,
        beta1=values["betas"][0],
        beta2=values["betas"][1],
        weight_decay=values["weight_decay"],
        eps=values["eps"],
        maximize=values["maximize"],
        grad_scale=None,
        found_inf=found,
    )
