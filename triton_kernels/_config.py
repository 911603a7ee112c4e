"""Tiles, warps and stages: a static table by architecture, storage dtype and size.

The choice is a pure function of the architecture, the dtype and the shape of a matrix, never of its
neighbours or of a measurement at run time, so the same matrix gets the same bits in any list.

Every entry says where it comes from. "derived": from the shared memory and registers that
ahead-of-time compilation reports and from the wave model of the design notes, not from a run.
`tools/triton_tune.py` measures candidates on a card, and is the only thing that does.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from ._device import IS_INTERPRETED


@dataclass(frozen=True)
class Config:
    """How a product is compiled.

    Attributes:
        tile: rows and columns of an output tile.
        depth: of a step along the sum.
        warps, stages: as Triton takes them.
        origin: "derived", or the card that it was measured on.
        across: columns of an output tile of wide products between workspaces, if that is no square:
            for matrices with a padded longer side that is a multiple of it.
    """

    tile: int
    depth: int
    warps: int
    stages: int
    origin: str = "derived"
    across: int = 0

    def options(self) -> dict[str, int]:
        """Launch arguments of a product kernel."""
        return {
            "TILE": self.tile,
            "DEPTH": self.depth,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }

    @functools.lru_cache(maxsize=64)  # noqa: B019 - of a few configurations that stay
    def halved(self) -> Config:
        """A quarter of the tile, with the same order of summation."""
        warps = max(self.warps // 2, 4)
        return dataclasses.replace(self, tile=self.tile // 2, warps=warps, across=0)


# Short sides up to this are iterated on in one program where X is 16-bit, if the long side is at
# most _SMALL_LONG: the largest class that compiles without spills. With fp32 operands every class
# spills (three TF32 products unrolled), so those matrices take a launch a product.
_SMALL = {"sm_80": 32, "sm_86": 32, "sm_90": 64, "sm_100": 32, "gfx942": 32, "interpreter": 64}
_SMALL_LONG = 16384

# Short sides above this take the large tile.
LARGE = 512

# architecture -> (bytes of an element, is large) -> configuration.
TABLE: dict[str, dict[tuple[int, bool], Config]] = {
    "sm_80": {
        (2, False): Config(64, 32, 4, 4),
        (2, True): Config(128, 32, 8, 3),
        (4, False): Config(64, 32, 4, 3),
        (4, True): Config(64, 32, 4, 3),
    },
    "sm_86": {  # 99 KiB of shared memory: 8.6, 8.9 and 12.0 too
        (2, False): Config(64, 32, 4, 3),
        (2, True): Config(128, 32, 8, 3),
        (4, False): Config(64, 32, 4, 2),
        (4, True): Config(64, 32, 4, 2),
    },
    "sm_90": {
        (2, False): Config(64, 64, 4, 4),
        (2, True): Config(128, 64, 8, 3),
        (4, False): Config(64, 32, 4, 3),
        (4, True): Config(64, 32, 4, 3),
    },
    "sm_100": {
        (2, False): Config(64, 64, 4, 4),
        (2, True): Config(128, 64, 8, 3),
        (4, False): Config(64, 32, 4, 3),
        (4, True): Config(64, 32, 4, 3),
    },
    "gfx942": {
        (2, False): Config(64, 32, 4, 2),
        (2, True): Config(128, 32, 8, 2),
        (4, False): Config(64, 32, 4, 2),
        (4, True): Config(64, 32, 4, 2),
    },
    "interpreter": {
        (size, large): Config(64, 64, 4, 1) for size in (2, 4) for large in (False, True)
    },
}

# Of large 16-bit matrices: a tile of 128 x 256 takes three quarters of what two square ones load.
# Compiled ahead of time it has no spills where it ends in a workspace, but for sm_100, for which
# there is none. No card has shown it ahead of TABLE's, so nothing takes it by itself:
# `tools/triton_tune.py` tries it, and what that finds belongs into TABLE.
CANDIDATES: dict[str, Config] = {"sm_90": Config(128, 64, 8, 3, across=256)}

_SHARED_MEMORY_OF_86 = ((8, 6), (8, 9), (12, 0), (12, 1))


@functools.cache
def architecture(device: torch.device) -> str:
    """The row of the table that a device takes."""
    if IS_INTERPRETED:
        return "interpreter"
    if torch.version.hip:
        return "gfx942"
    capability = torch.cuda.get_device_capability(device)
    if capability in _SHARED_MEMORY_OF_86:
        return "sm_86"
    return "sm_100" if capability >= (10, 0) else "sm_90" if capability >= (9, 0) else "sm_80"


def config_for(arch: str, dtype: torch.dtype, short: int) -> Config:
    """The configuration of products on matrices with a short side of `short`."""
    return TABLE[arch][dtype.itemsize, short > LARGE]


# architecture -> padded short side -> configuration of the kernel that does all steps.
SMALL_TABLE: dict[str, dict[int, Config]] = {
    arch: {
        16: Config(16, 128, 4, 2),
        32: Config(32, 128, 4, 2),
        64: Config(64, 64, 8, 2),
    }
    for arch in TABLE
}
for _arch in ("sm_80", "sm_86", "sm_90", "sm_100"):
    SMALL_TABLE[_arch][32] = Config(32, 64, 8, 2)
SMALL_TABLE["sm_80"][32] = SMALL_TABLE["sm_86"][32] = Config(32, 32, 8, 2)


def small_config(arch: str, short: int) -> Config:
    """The configuration of all steps in one program; its tile is the padded short side."""
    table = SMALL_TABLE[arch]
    return table[min(tile for tile in table if tile >= short)]


# Of the passes over the caller's matrices.
PASS_WARPS = 8

# Elements of the wide workspace of one group of a list step; longer lists take more launches.
GROUP_ELEMENTS = 2**28


# Of parameters, gradients and factors that one batch of a step with factors holds.
STACK_ELEMENTS = 2**25

# Elements of all workspaces of one group of a step with factors.
FUSED_ELEMENTS = 2**28


def precision_of(arch: str) -> str:
    """How fp32 operands are multiplied so that the error is that of fp32.

    Three TF32 products on the tensor cores of NVIDIA cards; CDNA 3 has no such mode, but fp32
    matrix instructions.
    """
    return "ieee" if arch in ("gfx942", "interpreter") else "tf32x3"


def is_small(arch: str, dtype: torch.dtype, short: int, long: int) -> bool:
    """Whether one program does all iterations on a matrix."""
    return dtype.itemsize == 2 and short <= _SMALL[arch] and long <= _SMALL_LONG
