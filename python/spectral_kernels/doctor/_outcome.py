"""What a check of the doctor says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

PASSED, FAILED, NOT_APPLICABLE, BY_DESIGN = "passed", "failed", "not applicable", "by design"


class Wrong(Exception):
    """A check's way to say that something is wrong; its text is the sentence shown."""


class NotApplicable(Exception):
    """A check's way to say that it does not concern what is checked; its text says why."""


@dataclass(frozen=True)
class Finding:
    """The outcome of one check.

    Attributes:
        section: the heading it stands under.
        name: what was checked.
        subject: whom: an optimizer, an operator, a number of threads.
        outcome: "passed", "failed", "not applicable", or "by design", a failure that is a
            documented property of the subject and does not count.
        sentence: what was seen.
    """

    section: str
    name: str
    subject: str
    outcome: str
    sentence: str

    def plain(self) -> dict[str, Any]:
        """As plain values for JSON."""
        return asdict(self)


def examine(section: str, name: str, subject: str, check: Callable[[], str]) -> Finding:
    """Runs a check. What it returns is the sentence of a pass, any exception is a failure."""
    try:
        return Finding(section, name, subject, PASSED, check())
    except Wrong as wrong:
        return Finding(section, name, subject, FAILED, str(wrong))
    except NotApplicable as reason:
        return Finding(section, name, subject, NOT_APPLICABLE, str(reason))
    except Exception as error:
        said = f"{error}".strip().splitlines()
        sentence = f"raises {type(error).__name__}: {said[0][:160] if said else ''}"
        return Finding(section, name, subject, FAILED, sentence)
