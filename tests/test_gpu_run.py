"""`make gpu` on a machine without a card: the script, its parts, and what becomes of failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from spectral_kernels.benchmarks import gpu, gpu_parts, place, run
from spectral_kernels.benchmarks.case import OURS, Case, Contender, Problem, relative_error
from spectral_kernels.benchmarks.gpu_parts import PARTS, Part

ROOT = Path(__file__).parents[1]


@pytest.fixture
def session(tmp_path):
    return gpu.Session(tmp_path / "run.json", 100.0, rehearse=True)


def saved(session):
    return run.read(session.path)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "sees no card" in capsys.readouterr().out


def test_an_unknown_part_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--parts", "facts,waves", "--json", str(tmp_path / "x.json")])
    assert "waves" in capsys.readouterr().err


def test_parts_are_named_by_family_or_by_all_words():
    of_family = [part.name for part in gpu.chosen(PARTS, "kron_factor")]
    assert of_family == ["kron_factor triton", "kron_factor cuda"]
    assert [part.name for part in gpu.chosen(PARTS, "newton_schulz cuda wgmma")] == [
        "newton_schulz cuda wgmma"
    ]
    assert list(gpu.chosen(PARTS, None)) == list(PARTS)


def test_every_family_is_measured_and_what_is_off_by_default_comes_last():
    names = [part.name for part in PARTS]
    assert len(set(names)) == len(names)
    for family in run.FAMILIES:
        assert {f"{family.name} {backend}" for backend in ("triton", "cuda")} <= set(names)
        for rehearsing in (False, True):
            keys = [case.key for case in gpu_parts.cases_of(family.name, rehearsing)]
            assert keys and len(set(keys)) == len(keys)
    risky = [i for i, name in enumerate(names) if name.endswith((" wgmma", " queue"))]
    assert risky == list(range(len(names) - 4, len(names) - 1)) and names[-1] == "plots"


def test_a_part_that_fails_is_written_down_and_the_next_one_runs(session):
    def broken(_):
        raise RuntimeError("out of memory")

    session.part(Part("first", here=broken))
    assert saved(session)["parts"]["first"].startswith("failed: RuntimeError: out of memory")
    session.part(Part("second", here=lambda session: session.more.update(second=[1, 2])))
    assert saved(session)["second"] == [1, 2]
    assert saved(session)["parts"]["second"].startswith("done")
    assert gpu.summary(session) == 1


def test_no_part_begins_when_the_time_is_over(session):
    session.budget = 0.0
    session.part(Part("late", here=lambda _: pytest.fail("it ran")))
    assert saved(session)["parts"] == {"late": "left out: no time"}


def test_a_part_without_its_backend_is_left_out(session):
    session.facts["backends"] = {"cuda": "it was not built", "triton": None}
    session.part(Part("gram cuda", "cuda", here=lambda _: pytest.fail("it ran")))
    assert saved(session)["parts"] == {"gram cuda": "left out: it was not built"}


def test_a_case_that_a_backend_does_not_take_is_no_failure(session):
    blank = {"key": "polar 3x4 float32", "isa": "cuda", "contenders": []}
    why = "RuntimeError: backend cannot run polar: cuda: it does not implement it"
    session.row(blank | {"failure": why})
    session.row(blank | {"failure": "RuntimeError: an illegal address"})
    record = saved(session)
    assert record["left_out"] == [{"key": "polar 3x4 float32", "isa": "cuda", "failure": why}]
    assert [row["failure"] for row in record["rows"]] == ["RuntimeError: an illegal address"]


def identity_case(*more: Contender) -> Case:
    x = torch.eye(8)

    def build(device: torch.device) -> Problem:
        assert device.type == "cpu"
        return Problem(
            [
                Contender(OURS, lambda: x + 0.0),
                Contender("torch", lambda: x.clone(), torch=True),
                *more,
            ],
            error=lambda out: relative_error(out, x.double()),
            baseline="torch",
            work=({"fp32": 4e12, "memory": 1e12},),
        )

    return Case("gram", "8x8", torch.float32, build)


def test_a_row_holds_errors_times_shares_of_the_ceilings_and_failures():
    def broken():
        raise RuntimeError("no kernel image")

    peaks = {"fp32": 2e3, "memory": 1e3}
    card = place.Card("reference", torch.device("cpu"), peaks=peaks)
    case = identity_case(Contender("broken", broken))
    row = run.run_case(case, 1, 0.0, place=card)
    assert row["failure"] is None and row["isa"] == "reference"
    ours, _, other = row["contenders"]
    assert ours["error"] == 0.0
    assert ours["low_s"] <= ours["median_s"] <= ours["high_s"]
    # 4 TFLOP at 2 a second take longer than 1 TB at 1 a second.
    assert row["bound"] == "fp32"
    assert ours["share_of_peak"] == pytest.approx(2.0 / ours["median_s"])
    assert other["failure"] == "RuntimeError: no kernel image" and "median_s" not in other
    assert "no kernel image" in gpu.shown(row)


def test_without_ceilings_there_is_no_share():
    card = place.Card("reference", torch.device("cpu"))
    row = run.run_case(identity_case(), 1, 0.0, place=card)
    assert row["bound"] is None and row["share_of_peak"] is None


def test_recordings_are_compared_with_recordings(monkeypatch):
    fast, slow = (place.Timing(x, x, x, 5) for x in (1.0, 3.0))
    eager = {OURS: slow, "torch": slow}
    monkeypatch.setattr(place.Card, "times", lambda *_: (eager, {OURS: fast, "torch": slow}))
    card = place.Card("reference", torch.device("cpu"))
    ours, other = run.run_case(identity_case(), 1, 0.0, place=card)["contenders"]
    assert other["speedup"] == 1.0 and other["graph"]["speedup"] == 3.0
    assert ours["graph"]["median_s"] == 1.0 and "(graph 1.00 s)" in gpu.shown(
        {"failure": None, "contenders": [ours]}
    )


def test_the_picture_is_that_of_the_benchmarks(session):
    pytest.importorskip("matplotlib")
    card = place.Card("reference", torch.device("cpu"))
    session.row(run.run_case(identity_case(), 1, 0.0, place=card))
    session.row(session.rows[0] | {"failure": "it hangs", "contenders": []})
    session.facts = {"card": "none"}
    gpu_parts._plots(session)
    assert session.path.with_suffix(".png").stat().st_size > 0


def test_tests_that_hang_are_ended(monkeypatch):
    monkeypatch.setenv("SPECTRAL_KERNELS_SOURCE", str(ROOT))
    command = [sys.executable, "-c", "print('3 passed', flush=True); import time; time.sleep(60)"]
    found = gpu.finished(command, 5.0)
    assert found["exit"] is None and found["counts"] == {"passed": 3}


def process(*lines: str) -> list[str]:
    """One that writes a line of a part for each; `die`, `hang` and `half` are what they say."""
    code = "import json, os, sys, time\nfile = open(sys.argv[1], 'a')\n"
    for line in lines:
        code += {
            "die": "os.kill(os.getpid(), 9)\n",
            "hang": "time.sleep(60)\n",
            "half": "file.write('{\"row\": '); file.flush()\n",
        }.get(line, f"file.write({line!r} + chr(10)); file.flush()\n")
    return [sys.executable, "-c", code]


BEGIN, ROW = (
    json.dumps({kind: {"key": "a", "isa": "b", "failure": "no", "contenders": []}})
    for kind in ("begin", "row")
)


@pytest.mark.parametrize(
    ("lines", "why", "rows"),
    [
        ([BEGIN, ROW, BEGIN, "half", "die"], "signal 9 ended it", 2),
        ([BEGIN, ROW, BEGIN, "hang"], "nothing for 0.5 s: it hangs", 2),
        (["hang"], "the part's time was over", 0),
    ],
)
def test_what_was_measured_before_a_crash_or_hang_is_kept(lines, why, rows, session, monkeypatch):
    """And what comes behind is done by another process, which skips what was begun."""
    session.patience = 0.5
    skipped = []

    def command(part, path, skip):
        skipped.append(skip)
        chosen = lines if len(skipped) == 1 else [BEGIN, ROW]
        return [*process(*chosen), str(path)]

    monkeypatch.setattr(session, "_command", command)
    session.limit = 30.0 if rows else 2.0
    began = time.monotonic()
    session.part(Part("a part", work=lambda _: None))
    assert time.monotonic() - began < 30.0
    record = saved(session)
    assert record["parts"]["a part"].startswith("failed")
    if rows:
        assert skipped == [0, 2]
        # One that the first has measured, the one that it was lost in, one of the second.
        assert [row["failure"] for row in record["rows"]] == ["no", why, "no"]
    else:
        assert why in record["parts"]["a part"] and record["rows"] == []


def test_cases_that_crash_again_and_again_are_given_up(session, monkeypatch):
    command = process(BEGIN, "die")
    monkeypatch.setattr(session, "_command", lambda _, path, __: [*command, str(path)])
    session.part(Part("a part", work=lambda _: None))
    assert len(saved(session)["rows"]) == gpu.ATTEMPTS


def test_the_script_runs_in_place_within_eight_minutes(tmp_path):
    environment = os.environ | {
        "PYTHON": sys.executable,
        "SPECTRAL_KERNELS_BUILD": "0",
        "OUT": str(tmp_path),
    }
    command = [str(ROOT / ".ci" / "gpu"), "--rehearse", "--parts", "facts,ceilings"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = tmp_path.glob("gpu-rehearsal-*.json")
    record = json.loads(path.read_text())
    assert record["budget_s"] <= 460
    assert record["ceilings"]["memory"] > 0.0
    assert record["machine"]["torch"] == torch.__version__


def rehearsed(path: Path, parts: str, *more: str) -> tuple[int, dict]:
    code = gpu.main(["--rehearse", "--parts", parts, "--json", str(path), *more])
    return code, run.read(path)


@pytest.mark.triton
@pytest.mark.kernel
@pytest.mark.parametrize(
    "parts",
    [
        "symmetric_matmul triton",
        pytest.param(
            "newton_schulz triton,inverse_root triton,kron_factor triton", marks=pytest.mark.long
        ),
        pytest.param("deva triton,eigenbasis triton", marks=pytest.mark.long),
    ],
)
def test_a_rehearsal_goes_through_its_parts(parts, tmp_path):
    code, record = rehearsed(tmp_path / "run.json", parts, "--budget", "1e3", "--limit", "250")
    assert code == 0
    assert all(outcome.startswith("done") for outcome in record["parts"].values()), record["parts"]
    families = [family for family in run.FAMILIES if f"{family.name} triton" in parts]
    measured = {row["op"] for row in record["rows"]}
    assert measured == {op for family in families for op in family.ops}
    for row in record["rows"]:
        assert row["failure"] is None and row["isa"] == "triton"
        assert not [x for x in row["contenders"] if "failure" in x], row
        assert row["contenders"][0]["median_s"] > 0.0


@pytest.mark.triton
@pytest.mark.kernel
def test_a_rehearsal_with_a_crash_and_a_wrong_result(tmp_path, capsys):
    code, record = rehearsed(
        tmp_path / "run.json",
        "kron_factor triton",
        *("--inject", "kron_factors_update_=crash", "--inject", "kron_precondition=wrong"),
    )
    crashed, wrong = record["rows"]
    assert code == 1 and crashed["failure"] == "signal 9 ended it"
    assert "more than twice plain torch's" in wrong["failure"]
    assert all("median_s" not in entry for entry in wrong["contenders"])
    said = capsys.readouterr().out
    assert "failed: kron_factors_update_ 8x8 float32, triton: signal 9 ended it" in said
