"""What `swap_in` did, as text; and that of several processes, added up.

Only the standard library is used, and nothing of this package: `_startup/sitecustomize.py` loads
this file by its path while a program ends, which may never have imported torch.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Tally:
    """Calls of one function that was replaced.

    Attributes:
        taken: calls that ran on the kernels.
        left: reason -> calls that were left to the original.
        seconds: spent on the kernels, where that is measured.
        by: process -> calls taken, in a sum of several.
    """

    taken: int
    left: dict[str, int]
    seconds: float | None = None
    by: dict[str, int] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """All of them."""
        return self.taken + sum(self.left.values())

    def __add__(self, other: Tally) -> Tally:
        left = Counter(self.left) + Counter(other.left)
        by = Counter(self.by) + Counter(other.by)
        taken = self.taken + other.taken
        return Tally(taken, dict(left), _sum((self.seconds, other.seconds)), dict(by))

    def __sub__(self, earlier: Tally) -> Tally:
        """The calls since an earlier moment."""
        left = Counter(self.left) - Counter(earlier.left)
        seconds = None if self.seconds is None else self.seconds - (earlier.seconds or 0.0)
        return Tally(self.taken - earlier.taken, dict(left), seconds)

    def __str__(self) -> str:
        many = Counter(self.left)
        reasons = ", ".join(f"{reason}: {count}" for reason, count in many.most_common())
        left = f", {many.total()} left as they were ({reasons})" if many else ""
        spent = f", {self.seconds:.3g} s" if self.seconds is not None and self.taken else ""
        split = ", ".join(f"{count} in {process}" for process, count in self.by.items())
        by = f" ({split})" if len(self.by) > 1 else ""
        return f"{self.taken} call{'' if self.taken == 1 else 's'}{by}{spent}{left}"


Tallies = dict[str, dict[str, Tally]]


@dataclass
class Report:
    """What one process, or several, replaced.

    Attributes:
        replaced, put_back: module or class -> function -> its calls, of what is replaced still and
            of what was for a while.
        waiting: targets whose modules have not been imported.
        refused: module -> why it keeps its own code.
        saved: estimated seconds.
        notes: other sentences.
    """

    replaced: Tallies
    put_back: Tallies
    waiting: list[str]
    refused: dict[str, str]
    saved: float | None
    notes: list[str] = field(default_factory=list)

    @property
    def calls(self) -> int:
        """Of all functions."""
        return sum(
            tally.calls
            for tallies in (self.replaced, self.put_back)
            for functions in tallies.values()
            for tally in functions.values()
        )

    def __str__(self) -> str:
        lines = [
            *_listed("replaced in", self.replaced),
            *_listed("replaced for a while in", self.put_back),
        ]
        lines += [f"  waiting for {name}, not imported yet" for name in self.waiting]
        lines += [f"  refused {name}: {reason}" for name, reason in self.refused.items()]
        lines = lines or ["  nothing replaced"]
        if self.saved is not None:
            lines.append(f"  saved {self.saved:.3g} s, by timing the originals on copies")
        return "\n".join(["swap_in:", *lines, *(f"  {note}" for note in self.notes)])


def since(now: Report, earlier: Report) -> Report:
    """A report without the calls and savings of an earlier one of the same process."""
    saved = None if now.saved is None else now.saved - (earlier.saved or 0.0)
    return Report(
        _without(now.replaced, earlier.replaced),
        _without(now.put_back, earlier.put_back),
        now.waiting,
        now.refused,
        saved,
    )


def written(report: Report | None, path: Path, process: str) -> None:
    """Writes the report of a process where `total` finds it; None: it has only begun."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"process": process, "report": report and asdict(report)}))
    part.replace(path)


def total(folder: Path) -> Report:
    """The sum of all reports in a folder."""
    sum_: Report | None = None
    notes = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if found["report"] is None:
            notes.append(f"{found['process']} ended without a report: its calls are not counted")
            continue
        one = _read(found["report"], found["process"])
        sum_ = one if sum_ is None else _plus(sum_, one)
    if sum_ is None:
        sum_ = Report({}, {}, [], {}, None)
        notes = notes or ["no process imported torch"]
    sum_.notes = notes
    return sum_


def collected(folder: str) -> str:
    """The text of the sum, after which the folder is removed."""
    try:
        return str(total(Path(folder)))
    finally:
        shutil.rmtree(folder)


def _read(found: dict[str, Any], process: str) -> Report:
    def tallies(raw: dict[str, dict[str, dict[str, Any]]]) -> Tallies:
        return {
            owner: {
                name: Tally(tally["taken"], tally["left"], tally["seconds"], _by(process, tally))
                for name, tally in functions.items()
            }
            for owner, functions in raw.items()
        }

    return Report(
        tallies(found["replaced"]),
        tallies(found["put_back"]),
        found["waiting"],
        found["refused"],
        found["saved"],
    )


def _by(process: str, tally: dict[str, Any]) -> dict[str, int]:
    return {process: tally["taken"]} if tally["taken"] else {}


def _plus(a: Report, b: Report) -> Report:
    return Report(
        _merged(a.replaced, b.replaced),
        _merged(a.put_back, b.put_back),
        [name for name in a.waiting if name in b.waiting],
        a.refused | b.refused,
        _sum((a.saved, b.saved)),
    )


def _merged(a: Tallies, b: Tallies) -> Tallies:
    result = {owner: dict(functions) for owner, functions in a.items()}
    for owner, functions in b.items():
        mine = result.setdefault(owner, {})
        for name, tally in functions.items():
            mine[name] = mine[name] + tally if name in mine else tally
    return result


def _without(now: Tallies, earlier: Tallies) -> Tallies:
    return {
        owner: {
            name: tally - earlier[owner][name] if name in earlier.get(owner, {}) else tally
            for name, tally in functions.items()
        }
        for owner, functions in now.items()
    }


def _sum(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def _listed(title: str, tallies: Tallies) -> Iterator[str]:
    for owner, functions in tallies.items():
        yield f"  {title} {owner}:"
        yield from (f"    {name}: {tally}" for name, tally in functions.items())
