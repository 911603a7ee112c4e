"""A mixture of experts, whose weights are batches of matrices, on text that comes with Python.

    python examples/moe.py

Eight characters predict the next. Every expert's weight is one matrix of a three-dimensional
parameter, so the group says `batched=True`, and all experts are updated by one call.
"""

from __future__ import annotations

import hashlib
from pydoc_data import topics

import torch
import torch.nn.functional as F
from shared.workload import Task, main
from torch import Tensor, nn

CONTEXT, EMBEDDED, EXPERTS, HIDDEN, BATCH = 8, 16, 8, 64, 256
WIDTH = CONTEXT * EMBEDDED


class Experts(nn.Module):
    """Each input goes through the expert that its router scores highest."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.up = nn.Parameter(torch.randn(EXPERTS, HIDDEN, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDTH, HIDDEN) / HIDDEN**0.5)

    def forward(self, x: Tensor) -> Tensor:
        weights = self.router(x).softmax(-1)
        # Small enough to run every expert and keep one; what is not chosen gets no gradient.
        hidden = torch.einsum("bw,ehw->beh", x, self.up).relu()
        outputs = torch.einsum("beh,ewh->bew", hidden, self.down)
        best = F.one_hot(weights.argmax(-1), EXPERTS).to(x.dtype) * weights
        return torch.einsum("be,bew->bw", best, outputs)


class Model(nn.Module):
    """Embedding, a linear layer, the experts around a residual, a head."""

    def __init__(self, characters: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(characters, EMBEDDED)
        self.mix = nn.Linear(WIDTH, WIDTH, bias=False)
        self.experts = Experts()
        self.head = nn.Linear(WIDTH, characters, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.mix(self.embedding(tokens).flatten(1)).relu()
        return self.head(x + self.experts(x))


class MixtureOfExperts(Task):
    """Python's own documentation; its last tenth is held out."""

    name = "moe"
    steps = 200
    unit = "tokens"
    per_step = BATCH
    batched = True
    overrides = {"experts.up": "matrix", "experts.down": "matrix", "*router*": "adamw"}

    def __init__(self) -> None:
        text = "\n\n".join(topics.topics[name] for name in sorted(topics.topics))
        places = {character: i for i, character in enumerate(sorted(set(text)))}
        self.characters = len(places)
        self.tokens = torch.tensor([places[character] for character in text])
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()

    def model(self) -> nn.Module:
        return Model(self.characters)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        return self._loss(model, self.tokens[: len(self.tokens) * 9 // 10], generator, BATCH)

    def evaluate(self, model: nn.Module) -> float:
        held_out = self.tokens[len(self.tokens) * 9 // 10 :]
        return float(self._loss(model, held_out, torch.Generator().manual_seed(1), 4096))

    @staticmethod
    def _loss(model: nn.Module, tokens: Tensor, generator: torch.Generator, size: int) -> Tensor:
        starts = torch.randint(len(tokens) - CONTEXT - 1, (size, 1), generator=generator)
        windows = tokens[starts + torch.arange(CONTEXT + 1)]
        return F.cross_entropy(model(windows[:, :-1]), windows[:, -1])


if __name__ == "__main__":
    main(MixtureOfExperts())
