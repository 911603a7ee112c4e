"""The character-level transformer of char_gpt.py as a workload: progress, plot, diagnostics.

python examples/characters.py
"""

from __future__ import annotations

import char_gpt
import torch
from shared.workload import Task, main
from torch import Tensor, nn

WIDTH = 128


class Characters(Task):
    """The character-level transformer of char_gpt.py, at half its width."""

    name = "char-gpt"
    steps = 400
    unit = "tokens"
    per_step = char_gpt.BATCH * char_gpt.CONTEXT

    def __init__(self) -> None:
        self.text = char_gpt.Text.load()
        self.sha256 = self.text.sha256

    def model(self) -> nn.Module:
        return char_gpt.CharGPT(self.text.characters, WIDTH)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        return model.loss(self.text.batch(self.text.train, generator))

    def evaluate(self, model: nn.Module) -> float:
        fixed = torch.Generator().manual_seed(1234)
        return float(model.loss(self.text.batch(self.text.held_back, fixed, 256)))


if __name__ == "__main__":
    main(Characters())
