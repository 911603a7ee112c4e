"""What is sent: packed uneven exchanges, two of them in flight, and errors that say where."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

# How many channels this process has opened over each set of ranks: the same number on all of them.
_opened: dict[tuple[int, ...], int] = {}


class Channel:
    """A process group, and what is sent over it.

    Attributes:
        group: the process group.
        members: the global rank of each of its ranks.
        size, rank: of the group, and of this process in it.
        device: where what is sent lies.
        patience: seconds to wait in `meet`.
    """

    def __init__(self, group: Any, device: torch.device, patience: float) -> None:
        self.group = group
        self.members = dist.get_process_group_ranks(group)
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.device = device
        self.patience = patience
        self._by_messages = _is_gloo(group, device)
        self._key = ""
        self._meetings = 0

    @contextlib.contextmanager
    def saying(self, what: str) -> Iterator[None]:
        """Errors of the group say what was going on."""
        try:
            yield
        except RuntimeError as error:
            raise RuntimeError(
                f"the ranks {self.members} could not {what}: {error} (a rank that died, that "
                "stopped, or that did not come)"
            ) from error

    def objects(self, given: Any, what: str) -> list[Any]:
        """Something of every rank, on every rank."""
        found: list[Any] = [None] * self.size
        with self.saying(what):
            dist.all_gather_object(found, given, group=self.group)
        return found

    def most(self, numbers: Sequence[int], what: str) -> list[int]:
        """The largest of all ranks, number by number."""
        found = torch.tensor(numbers, dtype=torch.int32, device=self.device)
        with self.saying(what):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=self.group)
        return found.tolist()

    def exchange(
        self, send: Sequence[Sequence[Tensor]], sizes: Sequence[int], dtype: torch.dtype
    ) -> Flight:
        """Sends flat tensors to every rank, and receives so many elements from each."""
        received = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        sent = [sum(piece.numel() for piece in pieces) for pieces in send]
        if not self._by_messages:
            nothing = torch.empty(0, dtype=dtype, device=self.device)
            packed = torch.cat([nothing, *itertools.chain(*send)])
            work = dist.all_to_all_single(
                received, packed, list(sizes), sent, group=self.group, async_op=True
            )
            return Flight([work], packed, received, list(sizes))
        # What stays here goes where it is received, and is not packed.
        into = received.split(list(sizes))
        _pack(send[self.rank], into[self.rank])
        sent[self.rank] = 0
        packed = torch.empty(sum(sent), dtype=dtype, device=self.device)
        out = packed.split(sent)
        works = []
        for to, source in self._peers():
            _pack(send[to], out[to])
            works += self._messages(out[to], to, into[source], source)
        return Flight(works, packed, received, list(sizes))

    def everyone(self, send: Sequence[Tensor], sizes: Sequence[int], dtype: torch.dtype) -> Flight:
        """Sends flat tensors to all ranks, of which the k-th sends sizes[k] elements."""
        if not self._by_messages:
            most = max(sizes)
            padding = torch.zeros(most - sizes[self.rank], dtype=dtype, device=self.device)
            packed = torch.cat([*send, padding])
            received = torch.empty(most * self.size, dtype=dtype, device=self.device)
            work = _all_gather()(received, packed, group=self.group, async_op=True)
            return Flight([work], packed, received, [most] * self.size)
        received = torch.empty(sum(sizes), dtype=dtype, device=self.device)
        into = received.split(list(sizes))
        packed = into[self.rank]
        _pack(send, packed)
        works = []
        for to, source in self._peers():
            works += self._messages(packed, to, into[source], source)
        return Flight(works, packed, received, list(sizes))

    def _peers(self) -> Iterator[tuple[int, int]]:
        """The others in turn, to whom this rank sends and from whom it receives at once."""
        for step in range(1, self.size):
            yield (self.rank + step) % self.size, (self.rank - step) % self.size

    def _messages(self, sent: Tensor, to: int, received: Tensor, source: int) -> list[Any]:
        """Starts to send one flat tensor and to receive another, in parts."""
        works = [dist.irecv(part, group=self.group, group_src=source) for part in _parts(received)]
        return works + [dist.isend(part, group=self.group, group_dst=to) for part in _parts(sent)]

    def open(self, what: str) -> None:
        """Waits for all ranks as long as the group does, since they may begin far apart.

        Warns:
            UserWarning: after `patience` seconds some had not come.

        Raises:
            RuntimeError: after the group's timeout some had not.
        """
        members = tuple(self.members)
        first = not self._key
        if first:
            # Without a word to the others, who may not be there.
            ranks = "-".join(map(str, members))
            self._key = f"spectral_kernels/{ranks}/{_opened.get(members, 0)}"
        try:
            self._meet(what, max(self.patience, timeout_of(self.group, self.device)), warn=True)
        except BaseException:
            self._key = "" if first else self._key
            raise
        if first:
            _opened[members] = _opened.get(members, 0) + 1

    def meet(self, what: str) -> None:
        """Waits until all ranks are here, so that no collective waits for one that never comes.

        Raises:
            RuntimeError: after `patience` seconds some had not come.
        """
        self._meet(what, self.patience, warn=False)

    def _meet(self, what: str, seconds: float, *, warn: bool) -> None:
        store = dist.distributed_c10d._get_default_store()
        key = f"{self._key}/{self._meetings}"
        store.set(f"{key}/{self.rank}", what)
        missing = self._missing(store, key, min(self.patience, seconds))
        if missing and warn and seconds > self.patience:
            more = seconds - self.patience
            said = self._waited(what, self.patience, missing)
            warnings.warn(f"{said}; waiting for {more:g} s more", stacklevel=2)
            missing = self._missing(store, key, more)
        if missing:
            store.delete_key(f"{key}/{self.rank}")
            raise RuntimeError(
                f"{self._waited(what, seconds, missing)}: call it outside of `if rank == 0`, and "
                "look for errors of theirs"
            )
        if self._meetings:
            # Whoever is here has left the meeting before.
            store.delete_key(f"{self._key}/{self._meetings - 1}/{self.rank}")
        self._meetings += 1

    def _missing(self, store: Any, key: str, seconds: float) -> list[int]:
        """The ranks that have not come after so many seconds."""
        keys = {f"{key}/{rank}": member for rank, member in enumerate(self.members)}
        try:
            store.wait(list(keys), datetime.timedelta(seconds=seconds))
        except RuntimeError:
            return [member for each, member in keys.items() if not store.check([each])]
        return []

    def _waited(self, what: str, seconds: float, missing: Sequence[int]) -> str:
        return (
            f"{what} of an optimizer that is spread over {self.size} ranks is called by all of "
            f"them; after {seconds:g} s the ranks {missing} had not"
        )


def timeout_of(group: Any, device: torch.device) -> float:
    """The seconds after which a collective of a group gives up."""
    return float(group._get_backend(device).options._timeout.total_seconds())


# Bytes of a message. In parts, the kernel copies one while the other end reads the one before.
_MESSAGE = 4 << 20


def _is_gloo(group: Any, device: torch.device) -> bool:
    """Whether messages between pairs of ranks are faster than collectives, which they are on gloo.

    Of 14 MB on each of two processes of one host, the gather takes 29 ms, all_to_all_single 15 and
    messages of 4 MiB 8.7 (torch 2.13, loopback). Elsewhere collectives know of the network.
    """
    gloo = getattr(dist, "ProcessGroupGloo", None)
    return gloo is not None and isinstance(group._get_backend(device), gloo)


def _pack(pieces: Sequence[Tensor], into: Tensor) -> None:
    if pieces:
        torch.cat(list(pieces), out=into)


def _parts(flat: Tensor) -> Sequence[Tensor]:
    return flat.split(max(1, _MESSAGE // flat.element_size())) if flat.numel() else ()


def _all_gather() -> Any:
    """The gather of equal tensors into one, which torch 2.13 has given another name."""
    return getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass
class Flight:
    """An exchange that has been started; what it sends and receives lives until it has ended.

    Attributes:
        works: its handles.
        sent, received: flat tensors.
        sizes: elements from every rank.
    """

    works: Sequence[Any]
    sent: Tensor
    received: Tensor
    sizes: list[int]

    def wait(self) -> list[Tensor]:
        """What every rank has sent."""
        for work in self.works:
            work.wait()
        return list(self.received.split(self.sizes))

    def onward(self) -> None:
        """Nothing: what is here has arrived where it was to go."""
