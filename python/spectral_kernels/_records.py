"""The form of every JSON file that is written here: one record a line."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

__all__ = ["text"]

_DEPTH = 3


def text(record: Any) -> str:
    """A record as JSON with a final newline.

    The outermost dict or list has a line for each of its entries, and so has, two levels deep, what
    holds nothing but dicts and lists; all else stays on the line where it begins.
    """
    return _lines(record, 0) + "\n"


def _lines(value: Any, depth: int) -> str:
    if not (isinstance(value, dict | list | tuple) and value) or depth == _DEPTH:
        return json.dumps(value)
    members: Iterable[Any] = value.values() if isinstance(value, dict) else value
    if depth and not all(isinstance(member, dict | list | tuple) for member in members):
        return json.dumps(value)
    space = "\n" + " " * (depth + 1)
    if isinstance(value, dict):
        # json.dumps turns keys that are no strings into strings.
        names = (json.dumps({name: 0})[1:-2].rstrip() for name in value)
        entries = [
            f"{name} {_lines(member, depth + 1)}"
            for name, member in zip(names, value.values(), strict=True)
        ]
        return "{" + space + f",{space}".join(entries) + space[:-1] + "}"
    entries = [_lines(member, depth + 1) for member in value]
    return "[" + space + f",{space}".join(entries) + space[:-1] + "]"
