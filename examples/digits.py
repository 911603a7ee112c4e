"""Handwritten digits that come with scikit-learn, and the two networks that read them.

python examples/digits.py --task mlp
python examples/digits.py --task conv
python examples/digits.py --task autoencoder
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from shared.workload import Task, digest, main
from torch import Tensor, nn

BATCH = 128
HELD_OUT = 360


class Digits(Task):
    """1797 images of 8 x 8 pixels in ten classes; the last 360 are held out."""

    unit = "images"
    per_step = BATCH

    def __init__(self) -> None:
        from sklearn.datasets import load_digits

        data = load_digits()
        self.pixels = torch.tensor(data.data, dtype=torch.float32) / 16.0
        self.labels = torch.tensor(data.target)
        self.sha256 = digest(self.pixels, self.labels)

    def batch(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Of the images to train on."""
        rows = torch.randint(len(self.labels) - HELD_OUT, (BATCH,), generator=generator)
        return self.pixels[rows], self.labels[rows]


class Classifier(Digits):
    """Cross entropy of the class."""

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        pixels, labels = self.batch(generator)
        return F.cross_entropy(model(pixels), labels)

    def evaluate(self, model: nn.Module) -> float:
        pixels, labels = self.pixels[-HELD_OUT:], self.labels[-HELD_OUT:]
        return float(F.cross_entropy(model(pixels), labels))


class Perceptron(Classifier):
    """Three layers."""

    name = "digits-mlp"

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)
        )


class Convolutional(Classifier):
    """Three convolutions, two of them strided, and a linear layer."""

    name = "digits-conv"
    steps = 100

    def model(self) -> nn.Module:
        return nn.Sequential(
            nn.Unflatten(1, (1, 8, 8)),
            nn.Conv2d(1, 32, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(512, 10),
        )


class Autoencoder(Digits):
    """The deep autoencoder that second-order methods are compared on: 64 pixels to 8 numbers."""

    name = "autoencoder"
    steps = 300
    score = "held-out error"

    def model(self) -> nn.Module:
        sizes = (64, 256, 128, 64, 8, 64, 128, 256, 64)
        layers: list[nn.Module] = []
        for place, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False)):
            layers += [nn.Linear(inputs, outputs)]
            # The code and the last layer are linear.
            if place not in (3, len(sizes) - 2):
                layers += [nn.Tanh()]
        return nn.Sequential(*layers)

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        pixels, _ = self.batch(generator)
        return F.mse_loss(model(pixels), pixels)

    def evaluate(self, model: nn.Module) -> float:
        pixels = self.pixels[-HELD_OUT:]
        return float(F.mse_loss(model(pixels), pixels))


TASKS = {"mlp": Perceptron, "conv": Convolutional, "autoencoder": Autoencoder}


def run(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    which = argparse.ArgumentParser(add_help=False)
    which.add_argument("--task", choices=TASKS, default="mlp")
    chosen, rest = which.parse_known_args(argv)
    main(TASKS[chosen.task](), rest)


if __name__ == "__main__":
    run()
