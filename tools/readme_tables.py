"""Writes result files into the tables of a Markdown file.

    python tools/readme_tables.py README.md
    python tools/readme_tables.py --check README.md

A table stands between `<!-- table FILE key=value ... -->` and `<!-- end table -->`. FILE is
relative to the Markdown file; keys (key, op, shape, dtype, threads, isa, variant) choose rows,
`against` those that they are compared with; several values by comma, + for a space. Of a training's
file all runs are shown, of the doctor's all faults, of steps over ranks all rows; a Markdown file
is shown as it is, a folder as a line for each family, with its page there or its module: what runs
where. `--check` writes nothing and fails where a table is not what its file says.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from spectral_kernels import _operators
from spectral_kernels.benchmarks import demo, distributed, run
from spectral_kernels.benchmarks.case import OURS
from spectral_kernels.benchmarks.timing import seconds

_TABLE = re.compile(r"(<!-- table (\S+)([^>]*?) *-->\n).*?(<!-- end table -->)", re.DOTALL)
_KEYS = ("key", "op", "shape", "dtype", "threads", "isa", "variant")
_AGAINST = "against"


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("markdown", nargs="+", type=Path)
    parser.add_argument("--check", action="store_true", help="only say what is not up to date")
    options = parser.parse_args(argv)
    stale = []
    for path in options.markdown:
        before = path.read_text()
        after = rewritten(before, path.parent)
        if after != before:
            stale.append(path)
            if not options.check:
                path.write_text(after)
    if options.check:
        for path in stale:
            print(f"{path}: tables differ from their result files", file=sys.stderr)
    return 1 if options.check and stale else 0


def rewritten(text: str, folder: Path) -> str:
    """The Markdown with every table made anew.

    Raises:
        ValueError: an unknown key, or a table without rows.
        FileNotFoundError: a result file that does not exist.
    """
    return _TABLE.sub(
        lambda found: found[1] + _table(folder / found[2], _choice(found[3])) + found[4], text
    )


def _choice(keys: str) -> dict[str, list[str]]:
    chosen = {}
    for pair in keys.split():
        key, _, values = pair.partition("=")
        if key not in (*_KEYS, _AGAINST):
            raise ValueError(f"a table is chosen by {', '.join((*_KEYS, _AGAINST))}, not {key!r}")
        chosen[key] = values.replace("+", " ").split(",")
    return chosen


def _table(path: Path, chosen: Mapping[str, Sequence[str]]) -> str:
    if path.is_dir():
        return "\n".join(_families(path)) + "\n"
    if path.suffix == ".md":
        return path.read_text()
    record = run.read(path)
    if record["kind"] == "doctor":
        return "\n".join(_scoreboard(record)) + "\n"
    if "runs" in record:
        lines = _training(record["runs"])
    elif record["kind"] == "ranks":
        lines = _ranks(record["rows"])
    else:
        rows = [
            row
            for row in record["rows"]
            if all(str(row[key]) in values for key, values in chosen.items() if key != _AGAINST)
        ]
        if not rows:
            raise ValueError(f"{path} has no rows with {dict(chosen)}")
        lines = [
            "| operation | threads | time | of peak | error | against | time | error | speed-up |",
            "|---|---|---|---|---|---|---|---|---|",
            *(line for row in rows for line in _lines(row, chosen.get(_AGAINST))),
        ]
    facts = record["machine"]
    place = f"{facts['cpu']}, {facts['cores']} cores, {facts['isa']}"
    lines += ["", f"{place}, torch {facts['torch']}, {facts['date'][:10]}."]
    return "\n".join(lines) + "\n"


def _families(pages: Path) -> Iterator[str]:
    """What runs where."""
    yield "| family | operators | CPU (C++) | Triton | CUDA C++ | reference |"
    yield "|---|---|---|---|---|---|"
    for family in _operators.FAMILIES:
        own = {name: row for name, row in _operators.TABLE.items() if row.family == family}
        left_out = [f"`{name}`" for name, row in own.items() if not row.cuda]
        cuda = f"○ without {', '.join(left_out)}" if left_out else "○"
        page = f"{pages.parent.name}/{pages.name}/{family}.md"
        if not (pages / f"{family}.md").is_file():  # the site has one of its docstrings
            page = f"python/spectral_kernels/{family}.py"
        names = ", ".join(f"`{name}`" for name in own)
        yield f"| [{family}]({page}) | {names} | ✓ | ○ | {cuda} | ✓ |"


_MARKS = {"passed": "yes", "failed": "**no**", "not applicable": "–", "by design": "by design"}


def _scoreboard(record: Mapping[str, Any]) -> list[str]:
    """Every fault against every optimizer, and the sum of those that were seen."""
    checks = [check for check in record["checks"] if check["section"] == "optimizers"]
    columns = list(dict.fromkeys((c["implementation"], c["subject"]) for c in checks))
    found = {(c["name"], c["implementation"], c["subject"]): c["outcome"] for c in checks}
    headings = [name if owner == "torch" else f"{owner} {name}" for owner, name in columns]
    lines = [f"| right under | {' | '.join(headings)} |", "|---" * (len(columns) + 1) + "|"]
    for name in dict.fromkeys(check["name"] for check in checks):
        marks = [_MARKS[found[name, *column]] for column in columns]
        lines.append(f"| {name} | {' | '.join(marks)} |")
    sums = []
    for column in columns:
        own = [found[key] for key in found if key[1:] == column]
        tried = sum(outcome != "not applicable" for outcome in own)
        sums.append(f"{sum(outcome == 'failed' for outcome in own)} of {tried}")
    lines.append(f"| faults seen | {' | '.join(sums)} |")
    facts = record["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts["peers"].items())
    place = f"{facts['cpu']}, {facts['cores']} cores, {facts['instruction_sets'][-1]}"
    lines += ["", f"{place}, torch {facts['torch']}, {facts['date'][:10]}; {versions}."]
    return lines


def _lines(row: Mapping[str, Any], against: Sequence[str] | None) -> list[str]:
    """One line a contender, or one of each in `against`."""
    if row["failure"]:
        return [f"| {row['key']} | {row['threads']} | {row['failure']} | | | | | | |"]
    ours = next(entry for entry in row["contenders"] if entry["name"] == OURS)
    share = row.get("share_of_peak")
    begin = (
        f"| {row['key']} | {row['threads']} | {seconds(ours['median_s'])} | "
        f"{f'{share:.0%}' if share is not None else ''} | {_error(ours)} |"
    )
    others = [
        entry
        for entry in row["contenders"]
        if "speedup" in entry and (against is None or entry["name"] in against)
    ]
    return [
        f"{begin} {entry['name']} | {seconds(entry['median_s'])} | {_error(entry)} | "
        f"{entry['speedup']:.2f}x |"
        for entry in others
    ] or [f"{begin} | | | |"]


def _ranks(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Steps over processes, measured and predicted, and how far the predictions are off."""
    lines = [
        "| optimizer, layout | processes | step | of each for itself | predicted | error | CPU |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        share = "" if row["layout"] == "replicated" else f"{row['of_replicated']:.2f}"
        lines.append(
            f"| {row['key'].rsplit(' ', 1)[0]} | {row['ranks']} | {seconds(row['median_s'])} | "
            f"{share} | {seconds(row['predicted_s'])} | {row['error']:+.0%} | "
            f"{row['cpu_error']:+.0%} |"
        )
    closing = [line.strip() for line in distributed.summary(rows)]
    return [*lines, "", " ".join(f"{line[0].upper()}{line[1:]}." for line in closing)]


def _error(entry: Mapping[str, Any]) -> str:
    return "" if entry["error"] is None else f"{entry['error']:.1e}"


def _training(results: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [
        "| optimizer | held-back loss | optimizer, ms a step | share of the step | whole run, s |",
        "|---|---|---|---|---|",
    ]
    for result in results:
        share = sum(result["optimizer_seconds"]) / result["seconds"][-1]
        lines.append(
            f"| {result['name']} | {result['held_back_loss']:.3f} | "
            f"{demo.optimizer_milliseconds(result):.1f} | {share:.0%} | "
            f"{result['seconds'][-1]:.1f} |"
        )
    return lines


if __name__ == "__main__":
    sys.exit(main())
