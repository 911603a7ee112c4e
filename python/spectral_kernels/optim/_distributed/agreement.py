"""What the ranks agree on, and how all of them hear of what one has met."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .config import Distributed
from .members import Exchange, Member, plain

if TYPE_CHECKING:
    from .._base import MatrixOptimizer

# What a rank may say of an error that it met before anything was sent.
_SAID = {error.__name__: error for error in (TypeError, ValueError, RuntimeError)}


class Agreement:
    """What ranks say to one another about an optimizer.

    Attributes:
        optimizer: whose.
        how: the values that it was given.
        exchanges: one for every mesh.
    """

    def __init__(self, optimizer: MatrixOptimizer, how: Distributed) -> None:
        self.optimizer = optimizer
        self.how = how
        self.exchanges: list[Exchange] = []
        self._copies_compared = False
        self._heard: BaseException | None = None

    def compare(self, exchange: Exchange, members: Sequence[Member]) -> None:
        """That all ranks have the same parameters and values."""
        lines = [self._description(member) for member in members]
        channel = exchange.channel
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
        if len(set(channel.objects(digest, "compare what they hold"))) == 1:
            return
        of_all = channel.objects(lines, "compare what they hold")
        for rank, theirs in enumerate(of_all):
            if len(theirs) != len(of_all[0]):
                raise ValueError(
                    f"rank {channel.members[0]} has {len(of_all[0])} parameters, rank "
                    f"{channel.members[rank]} has {len(theirs)}: groups must be the same on all "
                    "ranks"
                )
            for one, other in zip(of_all[0], theirs, strict=True):
                if one != other:
                    raise ValueError(
                        "groups must be the same on all ranks, but rank "
                        f"{channel.members[0]} has {one} and rank {channel.members[rank]} {other}"
                    )

    def _description(self, member: Member) -> str:
        key = member.key
        return (
            f"{member.name} of shape {tuple(key.shape)}, {key.dtype}, placements "
            f"{member.placements}, {'matrix' if member.is_matrix else 'adamw'}, with "
            f"{self._values(member.index)}, wire {self.how.wire}, bucket_bytes "
            f"{self.how.bucket_bytes}, keep_weights {self.how.keep_weights}, hops {self.how.hops}"
        )

    def _values(self, index: int) -> str:
        """The values of a group, of which a tensor on a device is not waited for."""
        group = self.optimizer.param_groups[index]
        values = {}
        for name in self.optimizer._names[group["algorithm"]]:
            value = group.get(name)
            if isinstance(value, Tensor):
                value = float(value) if value.device.type == "cpu" else "a tensor"
            values[name] = value
        return f"{group['algorithm']} {values}"

    def fingerprint(self, exchange: Exchange) -> int:
        """A number that is the same on all ranks if the values of their groups are."""
        indices = sorted({member.index for member in exchange.members})
        return zlib.crc32("".join(map(self._values, indices)).encode()) >> 2

    def compare_copies(self, grads: Mapping[Tensor, Tensor]) -> None:
        """That ranks which hold the same parameters hold the same weights and gradients.

        The first step looks, since later ones keep them the same, and nothing else would show that
        nobody has averaged the gradients: of a matrix only its owner's would count.
        """
        if self._copies_compared:
            return
        error: BaseException | None = None
        for exchange in self.exchanges:
            error = self._unlike_copies(exchange, grads) or error
        error = self.passed_on(error)
        if error is not None:
            raise error
        self._copies_compared = True

    @staticmethod
    def _unlike_copies(exchange: Exchange, grads: Mapping[Tensor, Tensor]) -> ValueError | None:
        """What is said of copies that are not the same."""
        channel = exchange.channel
        copies = [member for member in exchange.members if member.on_all]
        if not copies:
            return None
        own = [(_bit_sum(plain(member.key)), _bit_sum(grads.get(member.key))) for member in copies]
        of_all = channel.objects(own, "compare their copies")
        for member, sums in zip(copies, zip(*of_all, strict=True), strict=True):
            for which, sum_of_each in enumerate(zip(*sums, strict=True)):
                if len(set(sum_of_each)) > 1:
                    what = ("weights", "gradients")[which]
                    return ValueError(
                        f"the {what} of {member.name} are not the same on the ranks "
                        f"{channel.members}, which all hold it whole: give them the same "
                        "weights, and average gradients before step(), as DDP does"
                    )
        return None

    def tell(self, error: BaseException | None) -> None:
        """Raises on all ranks where one of them has met an error. All call it."""
        for exchange in self.exchanges:
            error = self.told(exchange, error)
        error = self.passed_on(error)
        if error is not None:
            self.hear(error)
            raise error

    def passed_on(self, error: BaseException | None) -> BaseException | None:
        """The error, or one that another mesh's ranks have heard of after this one's were asked."""
        for exchange in self.exchanges:
            if not exchange.linked:
                continue
            [has] = exchange.channel.most([int(error is not None)], "tell one another of errors")
            if has:
                error = self.told(exchange, error)
        return error

    def hear(self, error: BaseException) -> None:
        """Notes an error that all ranks know of."""
        self._heard = error

    @staticmethod
    def told(exchange: Exchange, error: BaseException | None) -> BaseException | None:
        """The error that this rank has met, or else the first that another of the mesh has."""
        own = None if error is None else (type(error).__name__, str(error))
        of_all = exchange.channel.objects(own, "tell one another of errors")
        if error is not None:
            return error
        for member, said in zip(exchange.channel.members, of_all, strict=True):
            if said is not None:
                kind, text = said
                return _SAID.get(kind, RuntimeError)(f"{text} (on rank {member})")
        return None


def _bit_sum(x: Tensor | None) -> int:
    """A sum over the bits of a tensor, by which different ones differ almost surely."""
    if x is None:
        return 0
    x = torch.view_as_real(x) if x.is_complex() else x
    as_ints = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    return int(x.contiguous().view(as_ints).sum(dtype=torch.int64))
