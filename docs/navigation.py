"""Puts a page for every family into the navigation of mkdocs.yml, in the order of their table.

A family that has none in docs/families gets one of its public docstrings.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import MutableMapping
from pathlib import Path
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


def on_files(files: Any, config: MutableMapping[str, Any]) -> Any:
    """What mkdocs calls when it has found the pages."""
    from mkdocs.structure.files import File

    for family in FAMILIES:
        name = f"{_FOLDER}{family}.md"
        if not Path(config["docs_dir"], name).is_file():
            files.append(File.generated(config, name, content=page_of(family)))
    return files


def page_of(family: str) -> str:
    """The page of a family, of its docstrings."""
    module = importlib.import_module(f"spectral_kernels.{family}")
    parts = [f"# {family}", inspect.getdoc(module) or ""]
    for name in module.__all__:
        public = getattr(module, name)
        parts.append(f"## {name}")
        if inspect.isfunction(public):
            parts.append(f"```python\n{name}{inspect.signature(public)}\n```")
        parts.append(f"```text\n{inspect.getdoc(public)}\n```")
    return "\n\n".join(parts) + "\n"
