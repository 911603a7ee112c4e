"""Puts a page for every family into the navigation of mkdocs.yml, in the order of their table."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any

from spectral_kernels._operators import FAMILIES

_FOLDER = "families/"


def on_config(config: MutableMapping[str, Any]) -> MutableMapping[str, Any]:
    """What mkdocs calls when it has read its configuration."""
    for section in config["nav"]:
        if isinstance(section, dict):
            for title, pages in section.items():
                if pages == _FOLDER:
                    section[title] = [f"{_FOLDER}{family}.md" for family in FAMILIES]
    return config
