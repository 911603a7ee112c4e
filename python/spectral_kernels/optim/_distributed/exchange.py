"""What the ranks of a group send one another, where they meet, and errors that say where."""

from __future__ import annotations

import contextlib
import datetime
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import Flight, Place, transport

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
        turns: see `Transport`.
    """

    def __init__(self, group: Any, device: torch.device, patience: float) -> None:
        self.group = group
        self.members = dist.get_process_group_ranks(group)
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.device = device
        self.patience = patience
        self._transport = transport(group, device)
        self.turns = self._transport.turns
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
        self, send: Sequence[Sequence[Tensor]], into: Sequence[Sequence[Place]], dtype: torch.dtype
    ) -> Flight:
        """Sends flat tensors to every rank, and receives some from each."""
        return self._transport.exchange(send, into, dtype)

    def everyone(
        self, send: Sequence[Tensor], into: Sequence[Sequence[Place]], dtype: torch.dtype
    ) -> Flight:
        """Sends the same flat tensors to all ranks, and receives those of each."""
        return self._transport.everyone(send, into, dtype)

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
