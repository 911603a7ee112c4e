"""Every Python block of the documentation runs, page by page, and every page and link is there."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import spectral_kernels as sk
import torch
from spectral_kernels._operators import FAMILIES
from support.packages import DOUBLES, modules_of

DOCS = Path(__file__).parent.parent / "docs"
PAGES = sorted(DOCS.glob("*.md")) + sorted((DOCS / "families").glob("*.md"))
PAGES += sorted((DOCS / "migrate").glob("*.md")) + sorted((DOCS / "papers").glob("*.md"))
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = re.compile(r"^# needs: (.+)$", re.MULTILINE)

pytestmark = pytest.mark.usefixtures("native")


def name_of(page: Path) -> str:
    return str(page.relative_to(DOCS))


def blocks(page: Path) -> list[tuple[int, str]]:
    """Line and source of every block."""
    text = page.read_text()
    return [(text[: m.start()].count("\n") + 2, m.group(1)) for m in BLOCK.finditer(text)]


@pytest.fixture(autouse=True)
def surroundings() -> Iterator[None]:
    """The public packages are small stand-ins here, and nothing is left behind."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with modules_of([DOUBLES]):
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name_of)
def test_blocks_run(
    page: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    script = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, "__main__", script)
    namespace = vars(script)
    for line, source in blocks(page):
        needs = NEEDS.search(source)
        missing = [
            name
            for name in (needs.group(1).split(", ") if needs else [])
            if importlib.util.find_spec(name) is None
        ]
        if not missing:
            # Line numbers of the page, for tracebacks.
            code = compile("\n" * (line - 1) + source, str(page), "exec")
            exec(code, namespace)


def test_the_packages_of_recipes_are_known() -> None:
    """A misspelt name would leave its block out for ever."""
    named = {
        name
        for page in PAGES
        for _, source in blocks(page)
        for group in NEEDS.findall(source)
        for name in group.split(", ")
    }
    assert named == {
        *("lightning", "transformers", "accelerate", "trl", "datasets", "timm", "torchvision"),
    }


def test_every_page_is_in_the_navigation() -> None:
    text = (DOCS.parent / "mkdocs.yml").read_text().partition("nav:")[2]
    families = re.search(r"^  - Families: (families/)$", text, re.MULTILINE)
    assert families is not None
    config = {"nav": ["index.md", {"Families": families[1]}]}
    spec = importlib.util.spec_from_file_location("navigation", DOCS / "navigation.py")
    assert spec is not None and spec.loader is not None
    navigation = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(navigation)
    _, section = navigation.on_config(config)["nav"]
    listed = {*re.findall(r"[\w/-]+\.md", text), *section["Families"]}
    # A family without a page has one made of its docstrings.
    made = {f"families/{family}.md" for family in FAMILIES}
    assert listed - made == {name_of(page) for page in PAGES} - made
    assert {name for name in listed if name.startswith("families/")} == made


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "examples/README.md", "tools/README.md"]
)
def test_links_of_the_repository_lead_somewhere(page: str) -> None:
    path = DOCS.parent / page
    targets = re.findall(r"\]\((?!http)([^)#]+)", path.read_text())
    assert targets or page == "tools/README.md"
    for target in targets:
        assert (path.parent / target).is_file(), target


def test_the_first_screen_of_the_readme() -> None:
    """One sentence, install, six lines of code, one picture, a table of four rows."""
    first, *sections = re.split(
        r"^## ", (DOCS.parent / "README.md").read_text(), flags=re.MULTILINE
    )
    kinds = re.findall(r"^```(sh|python)$|^(!)\[|^<!-- (table) ", first, flags=re.MULTILINE)
    assert ["".join(kind) for kind in kinds] == ["sh", "python", "!", "table"]
    (code,) = BLOCK.findall(first)
    assert len(code.strip().splitlines()) - code.count("\n\n") <= 6
    rows = [line for line in first.splitlines() if line.startswith("| ")]
    assert len(rows) == 1 + 4
    # The same four on the other vendor's processor; all other figures are in docs/benchmarks.md.
    measured = [section for section in sections if "<!-- table benchmarks" in section]
    assert [section.splitlines()[0] for section in measured] == [
        "The same steps on an Intel processor"
    ]


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_and_snippets_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\((?!http)([^)#]+)", text):
        assert (page.parent / target).is_file(), target
    for snippet in re.findall(r'--8<-- "([^"]+)"', text):
        assert (DOCS / snippet).read_text().startswith("| ")


def test_bands_of_the_coefficients() -> None:
    row = re.compile(r"^\| `(\w+)` \| (\d+) \| ([\d.]+)–([\d.]+) \| ([\d.]+)–([\d.]+) \|", re.M)
    found = row.findall((DOCS / "families" / "newton_schulz.md").read_text())
    assert len(found) == 8
    for name, steps, *band in found:
        chosen = sk.coefficients.resolve(name)
        assert len(chosen.rows) == int(steps)
        for low, (least, most) in ((-2.0, band[:2]), (-3.0, band[2:])):
            s = torch.logspace(low, 0.0, 20001, dtype=torch.float64)
            s /= chosen.norm_factor
            for a, b, c in chosen.rows:
                s = a * s + b * s**3 + c * s**5
            assert (f"{float(s.min()):.3f}", f"{float(s.max()):.3f}") == (least, most), name


def test_every_page_of_a_family_and_target_is_one() -> None:
    from spectral_kernels.swap import ADAPTERS

    assert {path.stem for path in (DOCS / "families").glob("*.md")} <= set(FAMILIES)
    index = (DOCS / "migrate" / "index.md").read_text()
    for adapter in ADAPTERS:
        assert f"`{adapter.name}`" in index
