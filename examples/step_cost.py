"""What a DeVA step costs beside a Muon step, here and in its authors' code.

    SPECTRAL_KERNELS_PEERS=FOLDER python examples/step_cost.py

FOLDER holds a clone of github.com/Tsedao/Decoupled-Variance-Adaptation; without it only this
library is timed. The hidden matrices of char_gpt.py, gradients of one batch, on one thread: CPU
time of cycles of ten steps, so that refreshes count, in turns; their median. A step is also put
beside forward and backward pass of that batch, since the paper states whole training steps.

Source of the 54 %: arXiv 2602.06880, table 2, seconds of DeVA over seconds of Muon.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import char_gpt
import spectral_kernels as sk
import torch
from torch import nn
from torch.optim import Optimizer

CYCLE, CYCLES = 10, 5
CLONE = "Decoupled-Variance-Adaptation"
PUBLISHED = 16.49 / 10.72 - 1.0

Make = Callable[[list[nn.Parameter]], Optimizer]


def public_folder() -> Path | None:
    """Where the clone is."""
    folder = Path(os.environ.get("SPECTRAL_KERNELS_PEERS", "")) / CLONE
    return folder if folder.is_dir() else None


@contextlib.contextmanager
def public_code() -> Iterator[tuple[ModuleType, ModuleType] | None]:
    """The clone's modules deva and muon, or None."""
    folder = public_folder()
    if folder is None:
        yield None
        return
    sys.path.insert(0, str(folder))
    try:
        deva, muon = (importlib.import_module(f"optimizers.{name}") for name in ("deva", "muon"))
        yield deva, muon
    finally:
        sys.path.remove(str(folder))


def makers(public: tuple[ModuleType, ModuleType] | None) -> dict[str, Make]:
    """Both optimizers, by whom."""
    made: dict[str, Make] = {
        "Muon": lambda params: sk.optim.Muon(params, 1e-3),
        "DeVA": lambda params: sk.optim.DeVA(params, 1e-3),
    }
    if public is not None:
        deva, muon = public
        made["public Muon"] = lambda params: muon.SingleDeviceMuon(params, lr=1e-3)
        made["public DeVA"] = lambda params: deva.DeVASchattenNorm(
            params, lr=1e-3, precondition_frequency=CYCLE
        )
    return made


def measure(cycles: int = CYCLES) -> dict[str, float]:
    """CPU milliseconds a step: of every optimizer, and of the model under "model"."""
    text = char_gpt.Text.load()
    batch = text.batch(text.train, torch.Generator().manual_seed(0))
    found: dict[str, list[float]] = {"model": []}
    contenders = {}
    with public_code() as public:
        for name, make in makers(public).items():
            torch.manual_seed(0)
            model = char_gpt.CharGPT(text.characters)
            model.loss(batch).backward()
            params = [param for param in model.blocks.parameters() if param.ndim == 2]
            grads = [param.grad.clone() for param in params]
            contenders[name] = (make(params), params, grads)
            found[name] = []
    for cycle in range(cycles + 1):
        for name, (optimizer, params, grads) in contenders.items():
            spent = 0.0
            for _ in range(CYCLE):
                # The public Muon writes what it is given.
                for param, grad in zip(params, grads, strict=True):
                    param.grad.copy_(grad)
                start = time.process_time()
                optimizer.step()
                spent += time.process_time() - start
            # The first cycle sets up.
            if cycle:
                found[name].append(spent / CYCLE)
        start = time.process_time()
        model.loss(batch).backward()
        found["model"].append(time.process_time() - start)
    return {name: 1e3 * statistics.median(times) for name, times in found.items()}


def table(found: dict[str, float]) -> list[str]:
    """Milliseconds, and what DeVA adds to a training step of Muon."""
    batch = char_gpt.BATCH * char_gpt.CONTEXT
    lines = [
        "## DeVA's step beside Muon's",
        "",
        f"Hidden matrices of the character transformer, width {char_gpt.WIDTH}; forward and "
        f"backward pass of {batch} tokens: {found['model']:.0f} CPU ms.",
        "",
        "| | Muon, ms | DeVA, ms | ratio | DeVA adds to a training step |",
        "|---|---|---|---|---|",
    ]
    for who, prefix in (("this library", ""), ("its authors' code", "public ")):
        if f"{prefix}DeVA" in found:
            muon, deva = found[f"{prefix}Muon"], found[f"{prefix}DeVA"]
            added = (deva - muon) / (found["model"] + muon)
            lines.append(f"| {who} | {muon:.1f} | {deva:.1f} | {deva / muon:.1f} | {added:.0%} |")
    if "public DeVA" in found:
        muon, deva = found["public Muon"], found["public DeVA"]
        model = (deva - muon) / PUBLISHED - muon
        left = (found["DeVA"] - found["Muon"]) / (model + found["Muon"])
        lines += [
            "",
            f"With a batch so large ({batch * model / found['model']:.0f} tokens) that the "
            f"authors' DeVA adds the published {PUBLISHED:.0%} to their Muon, {left:.0%} are left "
            "here: a calculation from the figures above.",
        ]
    return [*lines, ""]


def main() -> None:
    torch.set_num_threads(1)
    print("\n".join(table(measure())))


if __name__ == "__main__":
    main()
