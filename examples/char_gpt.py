"""A character-level transformer on English text that comes with Python, trained by any optimizer.

    python examples/char_gpt.py --optimizer muon --steps 300

Optimizers: adamw; torch-muon, which is torch.optim.Muon with AdamW for the rest; and this library's
muon, shampoo, soap and deva, which train the rest by AdamW themselves. `--swap` puts this library's
kernels under torch.optim.Muon; the code that builds it stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pydoc_data import topics

import spectral_kernels as sk
import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, CONTEXT, BATCH = 256, 4, 2, 64, 8
WARM_UP = 20

# Learning rates of the matrices and of everything else.
MUON_LR, SHAMPOO_LR, SOAP_LR, DEVA_LR, ADAMW_LR = 0.02, 3e-3, 3e-3, 3e-3, 1e-3
OPTIMIZERS = ("adamw", "torch-muon", "muon", "shampoo", "soap", "deva")


class Block(nn.Module):
    """Attention and a two-layer perceptron, each behind a norm and around a residual."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (
            nn.Linear(width, width, bias=False) for _ in range(4)
        )
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm1(x)
        heads = (
            project(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for project in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(*heads, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class CharGPT(nn.Module):
    """Predicts the next character."""

    def __init__(self, characters: int, width: int = WIDTH) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(characters, width)
        self.position_embedding = nn.Embedding(CONTEXT, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(LAYERS)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, characters, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.token_embedding(tokens) + self.position_embedding(positions)
        return self.head(self.norm(self.blocks(x)))

    def loss(self, tokens: Tensor) -> Tensor:
        """Cross entropy of every character of (batch, CONTEXT + 1) given those before it."""
        return F.cross_entropy(self(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())


@dataclass
class Text:
    """Python's own reference documentation as tokens, the last tenth held back."""

    train: Tensor
    held_back: Tensor
    characters: int
    sha256: str

    @classmethod
    def load(cls, device: str = "cpu") -> Text:
        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        index = {character: i for i, character in enumerate(sorted(set(text)))}
        tokens = torch.tensor([index[character] for character in text], device=device)
        cut = len(tokens) * 9 // 10
        digest = hashlib.sha256(text.encode()).hexdigest()
        return cls(tokens[:cut], tokens[cut:], len(index), digest)

    @staticmethod
    def batch(tokens: Tensor, generator: torch.Generator, size: int = BATCH) -> Tensor:
        """`size` windows of CONTEXT + 1 characters from random places."""
        starts = torch.randint(len(tokens) - CONTEXT - 1, (size, 1), generator=generator)
        return tokens[(starts + torch.arange(CONTEXT + 1)).to(tokens.device)]


def make_optimizers(name: str, model: CharGPT) -> list[torch.optim.Optimizer]:
    """One optimizer for everything, or torch's Muon and AdamW side by side."""
    if name == "adamw":
        return [torch.optim.AdamW(model.parameters(), lr=ADAMW_LR)]
    if name == "torch-muon":
        matrices = [p for p in model.blocks.parameters() if p.ndim == 2]
        others = [p for p in model.parameters() if all(p is not matrix for matrix in matrices)]
        return [
            torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01),
            torch.optim.AdamW(others, lr=ADAMW_LR),
        ]
    groups = sk.optim.param_groups(model, adamw={"lr": ADAMW_LR}, verbose=False)
    if name == "muon":
        return [sk.optim.Muon(groups, lr=MUON_LR, weight_decay=0.01)]
    if name == "shampoo":
        return [sk.optim.Shampoo(groups, lr=SHAMPOO_LR)]
    if name == "soap":
        return [sk.optim.SOAP(groups, lr=SOAP_LR)]
    if name == "deva":
        return [sk.optim.DeVA(groups, lr=DEVA_LR)]
    raise ValueError(f"optimizer must be one of {', '.join(OPTIMIZERS)}, not {name!r}")


@dataclass
class History:
    """What a training did, a list entry a step.

    Attributes:
        losses: of the batches trained on.
        seconds: spent on the training until the end of every step.
        optimizer_seconds: of every step, the optimizer alone.
        held_back_loss: at the end, on text never trained on.
        failures: what an optimizer has skipped or failed at; "" where it did all its work.
    """

    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    optimizer_seconds: list[float] = field(default_factory=list)
    held_back_loss: float = float("nan")
    failures: str = ""


class Training:
    """One model with its optimizers; the seed decides its weights and the order of the text.

    Attributes:
        history: so far. Its seconds are those spent in `step`, so that several trainings can take
            turns.
    """

    def __init__(self, name: str, text: Text, steps: int, seed: int = 0) -> None:
        torch.manual_seed(seed)
        self.history = History()
        self._text = text
        self._model = CharGPT(text.characters).to(text.train.device)
        self._optimizers = make_optimizers(name, self._model)
        self._schedules = [
            torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: min((step + 1) / WARM_UP, 1.0) * (1.0 - 0.9 * step / steps)
            )
            for optimizer in self._optimizers
        ]
        self._generator = torch.Generator().manual_seed(seed)

    def step(self) -> float:
        """Trains on one batch, whose loss it returns."""
        history, start = self.history, now()
        loss = self._model.loss(self._text.batch(self._text.train, self._generator))
        self._model.zero_grad()
        loss.backward()
        before = now()
        for optimizer in self._optimizers:
            optimizer.step()
        history.optimizer_seconds.append(now() - before)
        for schedule in self._schedules:
            schedule.step()
        history.losses.append(loss.item())
        history.seconds.append((history.seconds or [0.0])[-1] + now() - start)
        return history.losses[-1]

    def end(self) -> History:
        """The history, with what is known at the end alone."""
        with torch.no_grad():
            fixed = torch.Generator().manual_seed(1234)
            windows = self._text.batch(self._text.held_back, fixed, 256)
            self.history.held_back_loss = self._model.loss(windows).item()
        self.history.failures = failures(self._optimizers)
        return self.history


def train(
    name: str,
    text: Text,
    steps: int,
    seed: int = 0,
    on_step: Callable[[float], None] = lambda loss: None,
) -> History:
    """A whole `Training`."""
    training = Training(name, text, steps, seed)
    for _ in range(steps):
        on_step(training.step())
    return training.end()


def failures(optimizers: Sequence[torch.optim.Optimizer]) -> str:
    """Counters of failures that have risen: training goes on without those steps, only worse."""
    counts = [
        f"{type(optimizer).__name__}: {counter} is {getattr(optimizer, counter)}"
        for optimizer in optimizers
        for counter in ("skipped", "failed_roots")
        if getattr(optimizer, counter, 0)
    ]
    return ", ".join(counts)


def now() -> float:
    """Seconds, once the device has done what it was told."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="muon")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--swap", action="store_true", help="our kernels under torch.optim.Muon")
    options = parser.parse_args()
    text = Text.load("cuda" if torch.cuda.is_available() else "cpu")
    print(f"{len(text.train):,} characters, sha256 {text.sha256}")
    losses: list[float] = []

    def say(loss: float) -> None:
        losses.append(loss)
        if len(losses) % 25 == 0:
            print(f"step {len(losses):4d}  loss {sum(losses[-25:]) / 25:.3f}", flush=True)

    with sk.swap_in() if options.swap else contextlib.nullcontext():
        history = train(options.optimizer, text, options.steps, options.seed, say)
    milliseconds = 1e3 * sum(history.optimizer_seconds) / options.steps
    share = sum(history.optimizer_seconds) / history.seconds[-1]
    print(f"held back: loss {history.held_back_loss:.3f}")
    print(f"optimizer: {milliseconds:.2f} ms a step, {share:.0%} of the time")
    if history.failures:
        raise SystemExit(f"failed: {history.failures}")


if __name__ == "__main__":
    main()
