"""`make gpu` on a machine without a card: the script, its parts, and what becomes of failures."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from spectral_kernels.benchmarks import gpu

ROOT = Path(__file__).parents[1]


@pytest.fixture
def session(tmp_path):
    record = {"parts": {}, "ceilings": {"float32_tflops": 2.0, "copy_tb_s": 1.0}}
    return gpu.Session(torch.device("cpu"), tmp_path / "run.json", 100.0, record)


def saved(session):
    return json.loads(session.path.read_text())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "sees no card" in capsys.readouterr().out


def test_an_unknown_part_is_named(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--rehearse", "--parts", "facts,waves", "--json", str(tmp_path / "x.json")])
    assert "waves" in capsys.readouterr().err


def test_a_part_that_fails_is_written_down_and_the_next_one_runs(session):
    def broken(_):
        raise RuntimeError("out of memory")

    session.part("first", broken)
    assert saved(session)["parts"]["first"].startswith("failed: RuntimeError: out of memory")
    session.part("second", lambda _: [1, 2])
    assert saved(session)["second"] == [1, 2]
    assert saved(session)["parts"]["second"].startswith("done")


def test_no_part_begins_when_the_time_is_over(session):
    session.budget = 0.0
    session.part("late", lambda _: pytest.fail("it ran"))
    assert saved(session)["parts"] == {"late": "left out: no time"}


def test_a_row_holds_errors_times_floors_and_failures(session):
    x = torch.ones(4, 4)

    def broken():
        raise RuntimeError("no kernel image")

    calls = {"ours": lambda: x + 1e-3, "torch": lambda: x.clone(), "broken": broken}
    error = gpu._relative(x.double())
    row = gpu._row(session, "a row", calls, error, 4e12, 1e12, torch.float32, 0.0)
    # 4 TFLOP at 2 a second take longer than 1 TB at 1 a second.
    assert row["floor_s"] == 2.0
    ours = row["contenders"]["ours"]
    assert ours["error"] == pytest.approx(1e-3, rel=1e-3)
    assert ours["min_s"] <= ours["median_s"] <= ours["max_s"]
    assert ours["share_of_floor"] == 2.0 / ours["median_s"]
    assert "no kernel image" in row["contenders"]["broken"]["failure"]
    assert row["contenders"]["broken"]["share_of_floor"] is None


def test_without_ceilings_there_is_no_floor(session):
    del session.record["ceilings"]
    row = gpu._row(session, "a row", {"ours": lambda: None}, None, 1.0, 1.0, torch.float32, 0.0)
    assert row["floor_s"] is None and row["contenders"]["ours"]["share_of_floor"] is None


def test_the_picture_compares_with_the_fastest_of_torch(session):
    pytest.importorskip("matplotlib")
    times = {"ours": 1.0, "torch": 3.0, "torch.compile": 2.0}
    contenders = {name: {"median_s": value} for name, value in times.items()}
    session.record["gram"] = [{"key": "gram 4x4", "contenders": contenders}]
    session.record["facts"] = {"card": "none"}
    assert list(gpu._bars(session.record["gram"])) == [("gram 4x4 ours", 2.0)]
    assert gpu.plots(session) == ["run.png"]
    assert session.path.with_suffix(".png").stat().st_size > 0


def test_tests_that_hang_are_ended(session):
    command = [sys.executable, "-c", "print('3 passed', flush=True); import time; time.sleep(60)"]
    found = gpu._finished(command, 5.0, ROOT)
    assert found["exit"] is None and found["counts"] == {"passed": 3}


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
    assert record["ceilings"]["copy_tb_s"] > 0.0
    assert record["facts"]["torch"] == torch.__version__


@pytest.mark.triton
@pytest.mark.kernel
@pytest.mark.parametrize(
    "parts",
    [
        "facts,ceilings,gram,kron_factor,plots",
        pytest.param("spectra,newton_schulz,inverse_root,steps", marks=pytest.mark.long),
    ],
)
def test_a_rehearsal_goes_through_its_parts(parts, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "_TINY_SHAPES", ((6, 10),))
    monkeypatch.setattr(gpu, "_LEAST_ROUNDS", 1)
    monkeypatch.setattr(gpu, "_MOST_ROUNDS", 1)
    path = tmp_path / "run.json"
    assert gpu.main(["--rehearse", "--parts", parts, "--json", str(path)]) == 0
    record = json.loads(path.read_text())
    assert all(outcome.startswith("done") for outcome in record["parts"].values()), record["parts"]
    for part in set(parts.split(",")) & set(gpu._TIMED):
        for row in record[part]:
            assert not [x for x in row["contenders"].values() if "failure" in x], row
            ours = row["contenders"].get("triton", row["contenders"].get("ours"))
            assert ours["median_s"] > 0.0
