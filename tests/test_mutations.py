"""The list of seeded bugs fits the sources, so that tests/mutations/run.py can put them in."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
spec = importlib.util.spec_from_file_location("mutations_run", ROOT / "tests/mutations/run.py")
assert spec is not None and spec.loader is not None
run = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run)

MUTATIONS = run.mutations()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda m: m["name"])
def test_a_bug_fits_its_file(mutation):
    text = (ROOT / mutation["file"]).read_text()
    changed = run.mutated(mutation, text)
    assert changed != text
    if mutation["file"].endswith(".py"):
        compile(changed, mutation["file"], "exec")
    for name in mutation["tests"].split():
        assert (ROOT / name).is_file(), name


def test_the_list_is_long_enough_and_has_no_name_twice():
    names = [mutation["name"] for mutation in MUTATIONS]
    assert len(names) >= 40 and len(set(names)) == len(names)
    assert {re.split(r"[/.]", m["file"])[0] for m in MUTATIONS} == {"csrc", "python"}


def test_a_text_that_does_not_occur_once_is_refused():
    one = {"name": "x", "file": "f", "old": "a", "new": "b"}
    assert run.mutated(one, "cad") == "cbd"
    for text in ("", "aa"):
        with pytest.raises(ValueError, match="occurs"):
            run.mutated(one, text)


def test_results_are_of_the_list():
    results = json.loads(run.RESULTS.read_text())["results"]
    assert set(results) <= {mutation["name"] for mutation in MUTATIONS}
    outcomes = [result["outcome"] for result in results.values()]
    killed = outcomes.count("killed")
    assert killed >= 0.95 * (len(outcomes) - outcomes.count("no verdict"))
