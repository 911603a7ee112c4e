"""The step of an optimizer that is spread over ranks: gather, list operator, scatter, write."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ... import _checks
from .. import _adamw
from . import checksum, state, wire
from .config import Distributed
from .members import Bucket, Exchange, Member, plain
from .roster import Roster

if TYPE_CHECKING:
    from .._base import MatrixOptimizer
    from .._work import AdamwCall, MatrixCall, Work


class Spread(Roster):
    """An optimizer whose parameters several ranks share."""

    def __init__(self, optimizer: MatrixOptimizer, how: Distributed) -> None:
        super().__init__(optimizer, how)
        self._steps = 0
        self._broken = ""
        # Whether a step has moved anything, or state was loaded.
        self._begun = False

    def step(self) -> tuple[bool, bool]:
        """One step of everything. Weights are written when the last exchange has ended.

        Returns:
            Whether any matrix has a gradient, here or at its owner, and anything of AdamW's.
        """
        if self._broken:
            raise RuntimeError(self._broken)
        self._steps += 1
        optimizer = self.optimizer
        work: list[Work] = []
        grads: dict[Tensor, Tensor] = {}
        owned: dict[Bucket, list[MatrixCall]] = {}
        here: tuple[list[MatrixCall], list[AdamwCall]] = [], []
        error: Exception | None = None
        try:
            work = optimizer._work()
            self._check_grads(work)
            grads = {
                key: grad
                for _, _, _, shares in work
                for share in shares
                for key, grad in zip(share.keys, share.grads, strict=True)
            }
            # Everything is planned, and its state checked, before the ranks agree to begin.
            owned = self._owned_calls(work)
            here = optimizer._calls(self._rest(work, set()))
        except Exception as found:
            error = found
        skipped, still = self._agree(error, grads)
        if skipped or still:
            for key in skipped & grads.keys():
                optimizer._counter(plain(key).device).add_(1)
            here = optimizer._calls(self._rest(work, skipped | still))
        moves = bool(grads.keys() - still)
        if optimizer._watch is not None and moves:
            optimizer._watch.begin()
        written: list[tuple[Tensor, Tensor]] = []
        with self._whole_or_broken():
            for exchange in self.exchanges:
                if not all(member.key in still for member in exchange.members):
                    written += self._through_owners(exchange, owned, grads)
        for target, piece in written:
            target.copy_(piece.view(target.shape))
        self._note_weights(still)
        optimizer._run_all(*here)
        self._begun = self._begun or moves
        return any(matrix.keys for _, _, _, (matrix, _) in work), bool(here[1])

    def _check_grads(self, work: Sequence[Work]) -> None:
        """That gradients can travel as the parameters do, without losing a bit."""
        for _, group, _, (matrix, _) in work:
            for key, grad in zip(matrix.keys, matrix.grads, strict=True):
                member = self.members.get(key)
                if member is None or member.item is None:
                    continue
                self.check_wire(member.name, group)
                if torch.promote_types(grad.dtype, key.dtype) != key.dtype:
                    raise TypeError(
                        f"the gradient of {member.name} is {grad.dtype}, which {key.dtype} of the "
                        "parameter does not hold, and it travels to its owner in that dtype"
                    )

    def _agree(
        self, error: BaseException | None, grads: dict[Tensor, Tensor]
    ) -> tuple[set[Tensor], set[Tensor]]:
        """Of which parameters AdamW's gradient is not finite on some rank, and which only get
        state: at the very first steps those of a mesh all of whose gradients are zeros on all
        ranks, while lr is 0.

        Raises:
            TypeError, ValueError, RuntimeError: on all ranks, where one of them has met that, or
                where values differ between them, where some have a gradient and others have none,
                or where copies are not the same; nothing has been changed.
        """
        skipped: set[Tensor] = set()
        fresh = not self._begun and self.optimizer._stands_still()
        alone = {key: grad for key, grad in grads.items() if key not in self.members}
        still = set(alone) if fresh and _are_zeros(alone.values()) else set()
        for exchange in self.exchanges:
            # The largest of x and of -x, or of 1 - x, tell whether all have the same.
            mark = self.fingerprint(exchange)
            has = [int(member.key in grads) for member in exchange.members]
            lacks = [1 - each for each in has]
            bad = [
                int(member.key in grads and self._is_skipped(member, grads[member.key]))
                for member in exchange.members
            ]
            new = self._has_new_weights(exchange)
            own = [grads[x.key] for x in exchange.members if x.key in grads]
            moves = int(not (fresh and _are_zeros(own)))
            mine = [int(error is not None), mark, -mark, moves, *has, *lacks, *bad, *new]
            with self._whole_or_broken():
                found = exchange.channel.most(mine, f"begin step {self._steps}")
            count = len(exchange.members)
            some_have, some_lack, some_bad = (
                found[4 + i * count : 4 + (i + 1) * count] for i in range(3)
            )
            for bucket, is_new in zip(exchange.buckets, found[4 + 3 * count :], strict=True):
                bucket.copies = 2 if is_new else bucket.usual_copies
            if found[0]:
                error = self.told(exchange, error)
            elif found[1] != -found[2]:
                error = self._unequal(exchange)
            elif any(map(operator.and_, some_have, some_lack)):
                error = self._uneven(exchange, has)
            if not found[3]:
                still.update(member.key for member in exchange.members)
            skipped.update(
                member.key
                for member, is_bad in zip(exchange.members, some_bad, strict=True)
                if is_bad
            )
        with self._whole_or_broken():
            error = self.passed_on(error)
        if error is not None:
            raise error
        self.compare_copies(grads)
        return skipped, still

    @staticmethod
    def _has_new_weights(exchange: Exchange) -> list[int]:
        """For every bucket 1 where owners keep weights, and this rank has others than those."""
        kept = [member for bucket in exchange.buckets if bucket.keeps for member in bucket.members]
        now = dict(zip(kept, checksum.of([plain(member.key) for member in kept]), strict=True))
        return [
            int(bucket.keeps and any(now[x] != x.checksum for x in bucket.members))
            for bucket in exchange.buckets
        ]

    def _note_weights(self, still: set[Tensor]) -> None:
        """Notes the weights that a step has written, of which the owners have copies."""
        written = [
            member
            for exchange in self.exchanges
            for bucket in exchange.buckets
            for member in bucket.members
            if bucket.keeps and not all(x.key in still for x in exchange.members)
        ]
        sums = checksum.of([plain(member.key) for member in written])
        for member, each in zip(written, sums, strict=True):
            member.checksum = each

    def _unequal(self, exchange: Exchange) -> Exception:
        """What is said of ranks whose groups have different values."""
        try:
            self.compare(exchange, exchange.members)
        except ValueError as error:
            return error
        return RuntimeError("the values of groups differ between ranks: nothing was stepped")

    def _is_skipped(self, member: Member, grad: Tensor) -> bool:
        """Whether AdamW leaves a parameter alone for this rank's part of its gradient."""
        if member.is_matrix or member.on_all:
            return False
        group = self.optimizer.param_groups[member.index]
        return group["nonfinite"] == "skip" and not _adamw.all_finite(grad)

    @staticmethod
    def _uneven(exchange: Exchange, own: Sequence[int]) -> RuntimeError | None:
        """What is said where some ranks have a gradient and others have none."""
        channel = exchange.channel
        of_all = channel.objects(list(own), "compare their gradients")
        for member, has in zip(exchange.members, zip(*of_all, strict=True), strict=True):
            if len(set(has)) > 1:
                with_, without = (
                    [rank for rank, each in zip(channel.members, has, strict=True) if each == flag]
                    for flag in (1, 0)
                )
                return RuntimeError(
                    f"{member.name} has a gradient on the ranks {with_} and none on {without}: "
                    "nothing was stepped"
                )
        return None

    @contextlib.contextmanager
    def _whole_or_broken(self) -> Iterator[None]:
        """Notes that a step has ended in its middle: owners' state may be one step ahead."""
        try:
            yield
        except BaseException as error:
            for member in self.members.values():
                member.checksum = None
            self._broken = (
                f"step {self._steps} ended between two exchanges ({error}): no weight was written, "
                "but the ranks' state may differ by a step; load a checkpoint"
            )
            raise

    def loaded(self) -> None:
        """State has been loaded."""
        self._broken = ""
        self._begun = True
        self.name_state()
        for member in self.members.values():
            member.checksum = None

    def _through_owners(
        self,
        exchange: Exchange,
        owned: Mapping[Bucket, Sequence[MatrixCall]],
        grads: dict[Tensor, Tensor],
    ) -> list[tuple[Tensor, Tensor]]:
        """Steps what owners step. Returns parameters with their new values, not written yet."""
        channel, buckets = exchange.channel, exchange.buckets
        written: list[tuple[Tensor, Tensor]] = []
        coming: Any = None
        going: Any = None
        for which, bucket in enumerate(buckets):
            if which == 0:
                coming = self._gather(exchange, 0, grads)
            flight = coming
            if which + 1 < len(buckets):
                coming = self._gather(exchange, which + 1, grads)
            self._fill(exchange, which, flight)
            self._run_owned(bucket, owned[bucket])
            if coming is not None and coming is not flight:
                coming.onward()
            whole = [None if member.whole is None else member.whole[0] for member in bucket.members]
            if bucket.wire is not None:
                whole = [None if update is None else update.to(bucket.wire) for update in whole]
            with channel.saying(self._where(exchange, which, "scatter")):
                send = bucket.route.spread_out if bucket.on_all else bucket.route.scatter
                flight = send(channel, whole, bucket.sent_dtype)
            if going is not None:
                written += self._came_back(exchange, which - 1, going)
            going = flight
        if going is not None:
            written += self._came_back(exchange, len(buckets) - 1, going)
        return written

    def _run_owned(self, bucket: Bucket, calls: Sequence[MatrixCall]) -> None:
        """Steps whole matrices, or, where updates travel, the zeros in their place."""
        before = [] if bucket.wire is None else wire.counts(calls)
        self.optimizer._run_all(calls, [])
        if bucket.wire is not None:
            wire.mark(calls, before, bucket.wire)

    def _where(self, exchange: Exchange, which: int, phase: str) -> str:
        members = exchange.buckets[which].members
        return (
            f"end bucket {which + 1} of {len(exchange.buckets)}, {phase}, from "
            f"{members[0].name} to {members[-1].name}, in step {self._steps}"
        )

    def _came_back(
        self, exchange: Exchange, which: int, flight: Any
    ) -> list[tuple[Tensor, Tensor]]:
        bucket = exchange.buckets[which]
        with exchange.channel.saying(self._where(exchange, which, "scatter")):
            parts = bucket.route.scattered(flight)
        found = []
        for member, part in zip(bucket.members, parts, strict=True):
            if not part.numel():
                continue
            if bucket.wire is not None:
                part = self._moved(member, part)
            elif not bucket.lasts and member.item and member.item.owner == exchange.channel.rank:
                # Where it lies, another bucket comes before weights are written.
                part = part.clone()
            found.append((plain(member.key), part))
        return found

    def _moved(self, member: Member, update: Tensor) -> Tensor:
        """This rank's part of the new weights, of which an update has come."""
        group = self.optimizer.param_groups[member.index]
        decay = 1.0 - float(_checks.learning_rate(group["lr"])) * group["weight_decay"]
        cautious = bool(group.get("cautious_weight_decay", False))
        return wire.moved(plain(member.key), update, decay, cautious=cautious)

    def _gather(self, exchange: Exchange, which: int, grads: dict[Tensor, Tensor]) -> Any:
        """Starts to send weights and gradients to their owners; an absent gradient as NaN."""
        bucket = exchange.buckets[which]
        if bucket.on_all:
            return None
        pieces = []
        for member in bucket.members:
            weights = plain(member.key)
            grad = grads.get(member.key)
            if grad is None:
                grad = torch.full_like(weights, math.nan)
            grad = grad.to(bucket.sent_dtype)
            pieces.append([weights, grad][-bucket.copies :])
        whole = self._whole_of(bucket)
        with exchange.channel.saying(self._where(exchange, which, "gather")):
            return bucket.route.gather(
                exchange.channel, pieces, whole, bucket.sent_dtype, bucket.copies
            )

    @staticmethod
    def _whole_of(bucket: Bucket) -> list[list[Tensor] | None]:
        """Where what travels to owners becomes whole: all of it, or the gradient alone."""
        return [member.whole and member.whole[-bucket.copies :] for member in bucket.members]

    def _fill(self, exchange: Exchange, which: int, flight: Any) -> None:
        """Whole weights, or zeros for updates, and gradients of what is owned here."""
        bucket = exchange.buckets[which]
        if flight is not None:
            with exchange.channel.saying(self._where(exchange, which, "gather")):
                bucket.route.gathered(flight, self._whole_of(bucket))
        for at in bucket.route.owned:
            member = bucket.members[at]
            assert member.whole is not None
            if bucket.wire is not None:
                # What is not stepped stays like this: left alone.
                member.whole[0].fill_(-0.0)
            elif bucket.on_all:
                member.whole[0].copy_(plain(member.key))

    def _owned_calls(self, work: Sequence[Work]) -> dict[Bucket, list[MatrixCall]]:
        """For every bucket the calls for the whole matrices in it that are owned here."""
        buckets = [bucket for exchange in self.exchanges for bucket in exchange.buckets]
        found: dict[Bucket, list[MatrixCall]] = {}
        for batch, bucket in enumerate(buckets, 1):
            owned = {bucket.members[at].key: bucket.members[at] for at in bucket.route.owned}
            found[bucket] = []
            for index, group, current, (matrix, _) in work:
                share = matrix.only(owned.__contains__)
                for i, key in enumerate(share.keys):
                    whole = owned[key].whole
                    assert whole is not None
                    share.params[i] = whole[0]
                    share.grads[i] = share.grads[i] if bucket.on_all else whole[-1]
                found[bucket] += self.optimizer._matrix_calls(index, group, current, share, batch)
        return found

    def _rest(self, work: Sequence[Work], skipped: set[Tensor]) -> list[Work]:
        """What every rank steps for itself, but for some."""
        rest: list[Work] = []
        for index, group, current, (matrix, adamw) in work:
            local = matrix.only(lambda key: not self._is_owned(key) and key not in skipped)
            kept = adamw.only(lambda key: key not in skipped)
            rest.append((index, group, current, (local, kept)))
        return rest

    def _is_owned(self, key: Tensor) -> bool:
        member = self.members.get(key)
        return member is not None and member.item is not None

    # State.

    def state_dict(self, found: dict[str, Any]) -> dict[str, Any]:
        """A state dict with this rank's part of every tensor, as DTensors. All ranks call it."""
        return state.as_dtensors(self, found)

    def consolidate(self, found: dict[str, Any], to: int | None) -> dict[str, Any] | None:
        """A state dict of whole tensors on one rank, or on all. All ranks call it."""
        return state.consolidated(self, found, to)

    def brought_here(
        self, found: dict[Tensor, dict[str, Any] | None]
    ) -> dict[Tensor, dict[str, Any] | None]:
        """Of saved state, what this rank has to have: whole at the owner. All ranks call it."""
        return state.brought_here(self, found)

    def fitted(
        self, given: dict[str, Any]
    ) -> tuple[list[dict[str, Any]], dict[Tensor, dict[str, Any]]]:
        """Groups and state of a state dict, checked on all ranks, which all call it."""
        for exchange in self.exchanges:
            exchange.channel.meet("load_state_dict()")
        self._heard = None
        try:
            state.check_rank(self, given)
            result = self.optimizer._fitted(given)
        except Exception as error:
            # The others wait to hear of an error that this rank has met alone.
            if error is not self._heard:
                self.tell(error)
            raise
        self.tell(None)
        return result


def _are_zeros(grads: Iterable[Tensor]) -> bool:
    return not any(bool(grad.any()) for grad in grads)
