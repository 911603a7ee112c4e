"""The lists of a Muon step but for the addresses of their tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from spectral_kernels._options import MuonLists, MuonOptions
from spectral_kernels._step_checks import check_muon
from torch import Tensor

from ._addresses import Addresses
from ._checks import TRITON
from ._config import architecture
from ._counters import Counters, counters_of
from ._groups import Group, Kind, Rows, groups_of, rule_of
from ._known import KnownLists
from ._layout import kept, upload


@dataclass(frozen=True, eq=False)
class Listing:
    """What a step launches for.

    Attributes:
        groups: of all matrices, with their places among params, grads, buffers, second moments.
        counters: of all matrices.
        rows: of all places and counts; their owners are the tensors, list behind list.
        scales: of the matrix in every slot, see `Counters`.
    """

    groups: tuple[Group, ...]
    counters: Counters
    rows: Rows
    scales: tuple[float, ...]

    @property
    def narrow(self) -> bool:
        """Whether there are buffers in bfloat16."""
        return any(group.dtypes[2] == torch.bfloat16 for group in self.groups)


def _found(lists: MuonLists, options: MuonOptions) -> Listing:
    used = lists[:3] if options.beta2 is None else lists[:4]
    kinds = [[Kind.of(x) for x in tensors] for tensors in used]
    count, rows = len(lists.params), Rows()
    arch = architecture(lists.params[0].device)
    groups = groups_of(kinds, rule_of(options), options.restarts_of(count), arch, rows)
    before = lists._fields.index("step_counts") * count
    counters = counters_of(groups, [Kind.of(x) for x in lists.step_counts], before, rows)
    rows.close()
    scales = [0.0] * counters.size
    for group in groups:
        scales[group.slots] = [float(options.scales[entry]) for entry in group.entries]
    return Listing(groups, counters, rows, tuple(scales))


_KNOWN: KnownLists[MuonLists, MuonOptions, Listing] = KnownLists(
    lambda lists, options: check_muon(lists, options, TRITON), _found
)


def listing_of(lists: MuonLists, options: MuonOptions) -> tuple[Listing, Addresses]:
    """What is known of lists with at least one parameter, and the addresses of their tensors.

    Raises:
        TypeError, ValueError: bad input.
    """
    arch = architecture(lists.params[0].device)
    restarts = tuple(options.restarts_of(len(lists.params)))
    key = arch, rule_of(options), restarts, tuple(options.scales), options.beta2 is None
    return _KNOWN.of(lists, options, key)


@kept(256)
def scales_of(listing: Listing, device: torch.device) -> Tensor:
    """fp32, of the matrix in every slot."""
    return upload(torch.tensor(listing.scales, dtype=torch.float32, device="cpu"), device)
