"""The benchmarks themselves: that they measure what they say, and refuse speed without accuracy."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import sys
import time
import types
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

pytest.importorskip("rich", reason="the extra 'cli' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'cli' is not installed")

import readme_tables  # noqa: E402
import spectral_kernels as sk  # noqa: E402
from rich.console import Console  # noqa: E402
from spectral_kernels import _extension, cli, coefficients  # noqa: E402
from spectral_kernels.benchmarks import (  # noqa: E402
    demo,
    distributed,
    distributed_costs,
    distributed_ranks,
    inputs,
    inverse_root,
    isa_comparison,
    newton_schulz,
    peers,
    plots,
    report,
    run,
    scaling,
    steps,
    sweep,
    timing,
)
from spectral_kernels.benchmarks.case import (  # noqa: E402
    OURS,
    Case,
    Contender,
    Problem,
    list_errors,
    parse_shape,
    relative_error,
    square_shape,
    within_rule,
)

_PAGES = ("benchmarks", "distributed", "doctor")
BUDGET = 0.01  # little more than the least number of rounds


@pytest.fixture(autouse=True)
def alone_and_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    peers.point(["none"])
    yield
    peers.point([])
    torch.set_num_threads(before)


def small_case(op: str, dtype: torch.dtype = torch.float32) -> Case:
    family = next(family for family in run.FAMILIES if op in family.ops)
    shape = "8x12+12x8" if op.endswith("_step_") else "2x24x24"
    return family.case(op, shape, dtype)


def broken_case(error: float) -> Case:
    """Ours differs from torch by a relative error."""
    x = torch.eye(8)
    return Case(
        "gram",
        "8x8",
        torch.float32,
        build=lambda: Problem(
            [
                Contender(OURS, lambda: x * (1.0 + error)),
                Contender("torch", lambda: x * (1.0 + 1e-6)),
            ],
            error=lambda out: relative_error(out, x.double()),
            baseline="torch",
        ),
        goals={"torch": 1e9},
    )


@pytest.mark.parametrize("op", run.OPS)
def test_every_operator_has_a_case_that_runs_and_keeps_the_rule(op):
    row = run.run_case(small_case(op), threads=1, budget=BUDGET)
    assert row["failure"] is None
    assert row["contenders"][0]["name"] == OURS
    for entry in row["contenders"]:
        assert entry["median_s"] > 0.0
        assert entry["low_s"] <= entry["median_s"] <= entry["high_s"]
    json.dumps(row)


@pytest.mark.parametrize("op", ["gram", "newton_schulz", "kron_factors_update_", "muon_step_"])
def test_16_bit_cases(op):
    row = run.run_case(small_case(op, torch.bfloat16), threads=1, budget=BUDGET)
    assert row["failure"] is None


def test_every_operator_is_measured_by_one_family():
    from spectral_kernels import _dispatch

    assert sorted(run.OPS) == sorted(_dispatch.OPERATORS)


def test_no_two_cases_have_one_key():
    for cases in ([c for f in run.FAMILIES for c in f.cases()], sweep.cases(4)):
        keys = [case.key for case in cases]
        assert len(set(keys)) == len(keys)


def test_the_acceptance_list_has_goals():
    cases = [case for family in run.FAMILIES for case in family.acceptance()]
    assert {case.op for case in cases} >= {
        "gram",
        "newton_schulz",
        "muon_step_",
        "kron_factors_update_",
        "inverse_root",
        "refresh_eigenbasis",
        "deva_step_",
        "soap_step_",
        "shampoo_step_",
    }
    assert all(case.goals for case in cases)


def test_a_broken_accuracy_rule_shows_no_speed():
    row = run.run_case(broken_case(1e-3), threads=1, budget=BUDGET)
    assert "more than twice plain torch's" in row["failure"]
    assert all("median_s" not in entry for entry in row["contenders"])
    text = rendered(report.table("gram", [row]))
    assert "more than twice" in text
    assert "x  " not in text.split("more than twice")[1]


def test_a_nan_breaks_the_rule():
    row = run.run_case(broken_case(math.nan), threads=1, budget=BUDGET)
    assert row["failure"] is not None


def test_a_kept_rule_shows_speed_and_a_missed_goal():
    row = run.run_case(broken_case(1.5e-6), threads=1, budget=BUDGET)
    assert row["failure"] is None
    assert ">= 1e+09x" in rendered(report.table("gram", [row]))
    assert any("missed: gram 8x8 float32" in line for line in report.summary([row]))


def test_a_contender_that_cannot_run_is_named_and_the_rest_goes_on():
    def broken() -> torch.Tensor:
        raise RuntimeError("no such kernel\nwith details")

    case = broken_case(1e-6)
    problem = case.build()
    problem.contenders.append(Contender("other", broken))
    row = run.run_case(dataclasses.replace(case, build=lambda: problem), 1, BUDGET)
    assert row["failure"] is None
    assert row["contenders"][2]["failure"] == "RuntimeError: no such kernel"
    assert "no such kernel" in rendered(report.table("gram", [row]))


def test_ours_that_cannot_run_fails_the_case():
    def broken() -> Problem:
        raise ValueError("no")

    row = run.run_case(dataclasses.replace(broken_case(0.0), build=broken), 1, BUDGET)
    assert row["failure"] == "ValueError: no"
    assert "failed: gram 8x8 float32: ValueError: no" in "\n".join(report.summary([row]))


def test_threads_are_restored():
    before = torch.get_num_threads()
    run.run_case(small_case("gram"), threads=before + 1, budget=BUDGET)
    assert torch.get_num_threads() == before


def test_the_rule():
    half_ulp = 2.0**-24
    assert within_rule(2e-6 + half_ulp, 1e-6, torch.float32)
    assert not within_rule(2.2e-6, 1e-6, torch.float32)
    assert not within_rule(1e-8, 0.0, torch.float64)
    assert not within_rule(math.nan, 1.0, torch.float32)


def test_relative_error_is_of_the_worst_matrix():
    exact = torch.stack([torch.eye(3), 100.0 * torch.eye(3)]).double()
    off = exact.clone()
    off[0] *= 1.1
    assert relative_error(off, exact) == pytest.approx(0.1)
    assert list_errors(list(off), list(exact)) == pytest.approx([0.1, 0.0])


def test_a_list_is_judged_entry_by_entry():
    """As one, the small second entry's error of 1e-3 would be lost beside the large first."""
    exact = [1000.0 * torch.eye(8).double(), torch.eye(8).double()]

    def moved(*errors: float) -> list[torch.Tensor]:
        return [x * (1.0 + error) for x, error in zip(exact, errors, strict=True)]

    def row_of(*errors: float) -> dict:
        problem = Problem(
            [
                Contender(OURS, lambda: moved(*errors)),
                Contender("torch", lambda: moved(1e-4, 1e-5)),
            ],
            error=lambda out: list_errors(out, exact),
            baseline="torch",
        )
        case = dataclasses.replace(broken_case(0.0), build=lambda: problem)
        return run.run_case(case, threads=1, budget=BUDGET)

    bad = row_of(1e-4, 1e-3)
    assert bad["failure"] == "entry 1: error 1.0e-03 is more than twice plain torch's 1.0e-05"
    good = row_of(1e-5, 1.5e-5)
    assert good["failure"] is None and good["worst_entry"] == 1
    assert good["contenders"][0]["error"] == pytest.approx(1.5e-5)
    assert good["contenders"][1]["error"] == good["baseline_error"] == pytest.approx(1e-5)
    assert "errors of entry 1" in rendered(report.table("gram", [good]))
    json.dumps(good)


def test_shapes():
    assert parse_shape("64x128x32") == (64, 128, 32)
    assert square_shape("96") == (96, 96)
    for wrong in ("", "12", "axb", "0x4", "3x-1"):
        with pytest.raises(ValueError, match="shape must be like"):
            parse_shape(wrong)
    assert inputs.parameter_shapes("3x4+5x6") == ((3, 4), (5, 6))


def test_measure_takes_turns_and_keeps_all_calls():
    order = []
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    timings = timing.measure(calls, budget=BUDGET, period=2)
    assert set(timings) == set("abc")
    timed = order[6:]  # after two calls each to warm up
    assert len(timed) >= 3 * 2 * 5
    for i in range(0, len(timed), 3):
        assert sorted(timed[i : i + 3]) == list("abc")


def test_a_period_is_averaged_over_its_phases():
    summary = timing._summary([1.0, 1.0, 10.0] * 5, period=3)
    assert summary.median == pytest.approx(4.0)
    assert summary.samples == 15


def test_a_hopeless_contender_is_timed_once(monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: next(clock) * 1e-6)
    slow = []

    def crawl() -> None:
        slow.append(1)
        for _ in range(1000):
            next(clock)

    timings = timing.measure({"fast": lambda: None, "slow": crawl}, budget=1e-6)
    assert len(slow) == 1
    assert timings["slow"].samples == 1
    assert timings["fast"].samples > 1


def test_a_hopeless_periodic_contender_is_timed_for_one_period():
    calls = []

    def crawl():  # the first call sets up, and every fourth after it is the dear one
        time.sleep(0.05 if not calls else 0.02 if len(calls) % 4 == 2 else 0.002)
        calls.append(None)

    timings = timing.measure({"slow": crawl}, budget=1e-6, period=4)
    assert timings["slow"].samples == 4
    assert 0.005 < timings["slow"].median < 0.02


def test_load_counts_others_only():
    if timing._busy_seconds() is None:
        pytest.skip("no /proc/stat")
    with timing.Load() as load:
        random_work = random.Random(0)
        for _ in range(200_000):
            random_work.random()
    assert load.others is None or 0.0 <= load.others <= 1.0


@pytest.mark.parametrize("threads", [1, 2])
def test_the_fma_peak_is_a_rate(threads):
    peak = timing.fma_peak("fp32", threads)
    assert peak is None or 0.5 < peak < 1e4


@pytest.mark.parametrize(("p", "most"), [(1, 26), (2, 30), (3, 35), (4, 34), (8, 37)])
def test_work_of_a_root_is_that_of_its_products(p, most):
    a = inputs.factor((10, 10), torch.float32, 1e-6)
    ((rate, flops),) = inverse_root.work(a, p)[0].items()
    assert rate == "fp32" and flops % 10**3 == 0
    # Coupled Newton takes above 90 at this condition.
    assert 18 <= flops / 10**3 <= most


def test_work_of_newton_schulz_is_that_of_the_cost_table():
    rows = coefficients.resolve("quintic").rows
    (standard, gram) = newton_schulz.work((3, 20, 40), torch.float64, rows)
    assert standard["fp64"] == 3 * (15 * 20**2 * 40 + 5 * 20**3)
    # Three steps of the standard form, then two on R: 3 s^2 l and 5 s^3.
    assert gram["fp64"] == 3 * (12 * 20**2 * 40 + 8 * 20**3)
    # In bf16 all five on R, with two products of Q and X where the operands are 16-bit numbers.
    (_, gram) = newton_schulz.work((3, 20, 40), torch.bfloat16, rows)
    expected = {"bf16": 3 * 5 * 20**2 * 40, "fp32": 3 * 17 * 20**3}
    if "bf16" not in gram:
        expected = {"fp32": 3 * (3 * 20**2 * 40 + 17 * 20**3)}
    assert gram == expected


def test_inputs_have_their_spectra():
    a = inputs.factor((2, 16, 16), torch.float64, 1e-3, rank=12)
    values = torch.linalg.eigvalsh(a)
    assert torch.equal(a, a.mT)
    torch.testing.assert_close(values[:, -1], torch.ones(2, dtype=torch.float64))
    assert values[:, :4].abs().max() < 1e-14
    s = torch.linalg.svdvals(inputs.decaying((8, 12), torch.float64, low=1e-2))
    torch.testing.assert_close(s, torch.logspace(0, -2, 8, dtype=torch.float64))
    q, drifted = inputs.drifted_factor(24, 1e-4)
    diagonal = (q.mT @ drifted @ q).diagonal()
    assert (diagonal.diff() <= 1e-15).all()


def test_slow_trainings_take_fewer_steps():
    assert demo.affordable_steps(300, 0.1) == 300
    assert demo.affordable_steps(300, 1.0) == 60
    assert demo.affordable_steps(300, 1e3) == 20
    assert demo.affordable_steps(5, 1e3) == 5


def test_trainings_start_alike_and_move():
    begin = steps.start(((6, 10),))
    compared = steps.Steps(begin, torch.float32)
    moved = compared.oracle(lambda params: torch.optim.SGD(params, lr=0.1))
    wanted = -0.1 * (begin.gradients[0][0].float() + begin.gradients[1][0].float()).double()
    torch.testing.assert_close(moved[0], wanted, rtol=1e-5, atol=1e-8)
    assert moved[0].abs().max() > 0


def test_results_are_written_read_and_compared(tmp_path):
    row = run.run_case(small_case("gram"), 1, BUDGET)
    path = tmp_path / "r.json"
    run.write(path, "bench", {"cpu": "x"}, [row])
    assert run.read(path)["rows"] == json.loads(json.dumps([row]))
    text = rendered(report.comparison([row], [row]))
    assert "1.00x as fast" in text
    path.write_text("[]")
    with pytest.raises(ValueError, match="not a result file"):
        run.read(path)


def test_pictures_are_drawn(tmp_path):
    rows = [run.run_case(small_case(op), 1, BUDGET) for op in ("gram", "newton_schulz")]
    plots.speedups(rows, tmp_path / "speed.png", "here")
    results = [training(run_.name) for run_ in demo.RUNS]
    plots.losses(results, tmp_path / "loss.png", "here")
    plots.step_times(results, tmp_path / "time.png", "here")
    for name in ("speed", "loss", "time"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")


def test_no_picture_without_comparisons(tmp_path):
    plots.speedups([], tmp_path / "speed.png", "here")
    assert not (tmp_path / "speed.png").exists()


def test_scaling_fits_the_exponent_of_the_upper_half():
    sizes = [64, 128, 256, 512, 1024]
    assert scaling.exponent(sizes, [2e-9 * n**3 for n in sizes]) == pytest.approx(3.0)
    assert scaling.exponent(sizes, [1e-3 + 1e-30 * n for n in sizes]) == pytest.approx(0.0)
    assert scaling.exponent([64], [1.0]) is None


def test_scaling_draws(tmp_path):
    family = run.FAMILIES[0]
    rows = [
        run.run_case(family.case("gram", f"{n}x{n}", torch.float32), 1, BUDGET, check=False)
        for n in (8, 16)
    ]
    groups = {("gram", "float32"): rows}
    scaling.draw(groups, groups, tmp_path / "growth.png", "here")
    assert (tmp_path / "growth.png").exists()
    assert "gram" in rendered(scaling._table("n", groups, axis=-1))


def test_scaling_from_the_command_to_its_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(scaling, "_BATCHES", (1, 2, 4))
    monkeypatch.setattr(scaling, "_BUDGET", BUDGET)
    path = tmp_path / "growth.json"
    # "--growth" is what "--scaling" was called.
    options = ["bench", "--growth", "128", "--op", "gram", "--threads", "1,2", "--json", str(path)]
    assert cli.main(options) == 0
    record = run.read(path)
    assert record["kind"] == "growth" and (tmp_path / "growth.png").exists()
    shapes = [(row["shape"], row["threads"]) for row in record["rows"]]
    by_n, by_batch = ["64x64", "128x128"], ["1x64x64", "2x64x64", "4x64x64"]
    assert shapes == [(s, t) for group in (by_n, by_batch) for t in (1, 2) for s in group]
    assert "time ~ n^a" in capsys.readouterr().out


def test_scaling_sizes():
    assert scaling.measured_sizes(2048, 4096) == [64, 128, 256, 512, 1024, 2048]
    assert scaling.measured_sizes(4096, 1024)[-1] == 1024


def test_a_sweep_is_the_same_every_time_and_bounded():
    cases = sweep.cases(20)
    assert [case.key for case in cases] == [case.key for case in sweep.cases(20)]
    sizes = [parse_shape(case.shape) for case in cases if case.op == "newton_schulz"]
    assert len(sizes) == 20
    assert any(len(shape) == 3 for shape in sizes)
    assert any(size % 32 for shape in sizes for size in shape)
    assert max(max(shape) / min(shape[-2:]) for shape in sizes) > 4


@pytest.mark.skipif(_extension.MODULE is None, reason=_extension.REASON or "")
def test_a_comparison_of_sets_runs_every_one_with_torch_capped_alike(tmp_path, capfd):
    """The paths, not the times: a process a set, which multiplies bf16 in what the set has."""
    least, *others = _extension.MODULE.supported_isas()
    if not others:
        pytest.skip("this processor has the baseline only")
    isas = [least, others[-1]]
    path = tmp_path / "ladder.json"
    options = ["bench", "--isa", ",".join(isas), "--op", "gram,newton_schulz", "--shape", "40x48"]
    cases = ["--dtype", "float32,bfloat16", "--threads", "1", "--peers", "none"]
    assert cli.main([*options, *cases, "--json", str(path)]) == 0
    record = run.read(path)
    assert record["kind"] == "ladder" and (tmp_path / "ladder.png").exists()
    assert list(record["machine"]["sets"]) == isas
    assert [row["isa"] for row in record["rows"]] == [isa for isa in isas for _ in range(4)]
    for row in record["rows"]:
        caps = record["machine"]["sets"][row["isa"]]["caps"]
        assert tuple(caps.values()) == run._CAPS[row["isa"]]
        has_pairs = row["dtype"] == "bfloat16" and row["isa"] in ("avx512bf16", "amx")
        assert ("bf16" in row["peak_gflops_a_thread"]) == has_pairs
        goals = [entry["goal"] for entry in row["contenders"] if "goal" in entry]
        assert goals == ([10.0] if row["dtype"] == "bfloat16" and not has_pairs else [])
    said = capfd.readouterr().out
    assert "instruction sets side by side" in said and said.count("written: ") == 1


def test_sets_to_compare():
    with pytest.raises(ValueError, match="--isa must be one of baseline"):
        isa_comparison.sets("avx2,mmx" if _extension.MODULE is None else "baseline,mmx")
    if _extension.MODULE is not None:
        assert set(isa_comparison.sets("all")) <= set(_extension.MODULE.supported_isas())
        with pytest.raises(ValueError, match="names a set twice"):
            isa_comparison.sets("baseline,baseline")


def test_readme_tables(tmp_path):
    rows = [run.run_case(small_case(op), 1, BUDGET) for op in ("gram", "newton_schulz")]
    facts = {"cpu": "EPYC", "cores": 2, "isa": "avx2", "torch": "2.13", "date": "2026-11-22T01:02"}
    run.write(tmp_path / "r.json", "bench", facts, rows)
    markdown = tmp_path / "README.md"
    text = "# Head\n<!-- table r.json op=gram threads=1 -->\nold\n<!-- end table -->\ntail\n"
    markdown.write_text(text)
    assert readme_tables.main(["--check", str(markdown)]) == 1
    assert markdown.read_text() == text
    assert readme_tables.main([str(markdown)]) == 0
    written = markdown.read_text()
    assert written.count("| gram 2x24x24 float32 | 1 |") == 2  # torch.bmm and a loop
    assert "newton_schulz" not in written and "old" not in written
    assert written.startswith("# Head\n<!-- table r.json op=gram threads=1 -->\n| operation |")
    assert written.endswith("<!-- end table -->\ntail\n")
    assert readme_tables.main(["--check", str(markdown)]) == 0
    markdown.write_text(text.replace("op=gram", "op=none"))
    with pytest.raises(ValueError, match="has no rows"):
        readme_tables.main([str(markdown)])


def test_the_ceiling_that_binds():
    peaks = {"fp32": 100.0, "bf16": 1000.0, "memory": 10.0}
    large = 1e9  # bytes: 0.05 s of two threads
    assert run._bound([{"fp32": 2e9}], peaks, 2) == ("fp32", 0.01)
    assert run._bound([{"fp32": 2e9, "memory": large}], peaks, 2) == ("memory", 0.05)
    assert run._bound([{"fp32": 2e10, "memory": large}], peaks, 2) == ("fp32", 0.1)
    # What the caches hold does not bind, and needs no rate; the cheaper form counts.
    assert run._bound([{"fp32": 2e9, "memory": 1e6}], {"fp32": 100.0}, 2) == ("fp32", 0.01)
    assert run._bound([{"fp32": 4e9}, {"bf16": 2e9, "fp32": 2e9}], peaks, 2) == ("fp32", 0.011)
    assert run._bound([{"fp64": 2e9}], peaks, 2) == (None, None)
    assert run._bound([], peaks, 2) == (None, None)


def test_contenders_have_a_share_of_their_own():
    row = run.run_case(small_case("gram"), 1, BUDGET)
    ours, *others = row["contenders"]
    assert row["bound"] == "fp32" and ours["share_of_peak"] == row["share_of_peak"] > 0.0
    assert [entry["name"] for entry in others] == ["torch.bmm", "torch loop"]
    for entry in others:
        # Whole products: twice the work of one triangle.
        ratio = entry["share_of_peak"] / ours["share_of_peak"]
        assert ratio == pytest.approx(2.0 * ours["median_s"] / entry["median_s"])
        assert entry["torch"]
    assert report.summary([row])[1].endswith(
        "of 1 cases are not slower than the best of torch's own ways"
    )


def test_tables_choose_what_ours_is_compared_with(tmp_path):
    row = run.run_case(small_case("gram"), 1, BUDGET)
    others = [entry["name"] for entry in row["contenders"] if "speedup" in entry]
    facts = {"cpu": "EPYC", "cores": 2, "isa": "avx2", "torch": "2.13", "date": "2026-11-22T01:02"}
    run.write(tmp_path / "r.json", "bench", facts, [row])
    for names, lines in ((others[:1], 1), (others, len(others))):
        chosen = f"key={row['key']}".replace(" ", "+")
        against = f"against={','.join(names)}".replace(" ", "+")
        text = f"<!-- table r.json {chosen} {against} -->\n<!-- end table -->"
        table = readme_tables.rewritten(text, tmp_path)
        assert table.count(f"| {row['key']} | 1 |") == lines


@pytest.mark.parametrize(
    "page", ["README.md", "docs/benchmarks.md", "docs/distributed.md", "docs/doctor.md"]
)
def test_tables_of_the_docs_are_those_of_their_files(page):
    assert readme_tables.main(["--check", str(Path(__file__).parent.parent / page)]) == 0


def test_costs_over_ranks_are_those_of_the_committed_page():
    path = Path(distributed_costs.__file__).parent / "results" / "distributed_costs.md"
    assert distributed_costs.page() == path.read_text()


def test_what_a_step_over_two_ranks_is_predicted_to_take():
    shapes = ((8, 6), (5, 4), (5, 4))
    layout = distributed_costs.Layout(1, 2)
    (bucket,) = distributed_costs.planned("muon", shapes, layout)
    # The largest to one rank, the others to the second; of 5 rows the first rank holds 3.
    assert [dict(own) for own in bucket.owned] == [{(8, 6): 1}, {(5, 4): 2}]
    held = 24 + 2 * 12, 24 + 2 * 8
    assert bucket.held.tolist() == list(held)
    assert [each.tolist() for each in bucket.sent] == [[24, 24], [24, 24]]
    assert [each.tolist() for each in bucket.received] == [[24, 24], [24, 24]]
    assert distributed_costs.moved([bucket]).tolist() == [24 * 12, 24 * 12]

    def exchange(most: float, ranks: int) -> float:
        return 1.0 + most

    costs = distributed_costs.Costs(
        step=lambda shape: {(8, 6): 100.0, (5, 4): 70.0}[shape],
        pieces=exchange,
        everyone=exchange,
        copied=0.5,
        begin=7.0,
    )
    found = distributed_costs.predicted([bucket], layout, costs)
    assert (found.computing, found.mean) == (140.0, 120.0)
    assert found.exchanging == (1.0 + 24 * 8) + (1.0 + 24 * 4)
    # Rank 0 copies 48 elements of 8 bytes and 48 of 4, rank 1 40 of 8 and 40 of 4.
    busy = max(100.0 + 0.5 * (48 * 8 + 48 * 4), 140.0 + 0.5 * (40 * 8 + 40 * 4))
    assert found.total == 7.0 + busy + found.exchanging
    narrow = dataclasses.replace(costs, cores=1)
    both = 240.0 + 0.5 * 88 * 12
    assert distributed_costs.predicted([bucket], layout, narrow).total == (
        7.0 + both + found.exchanging
    )
    hidden = dataclasses.replace(costs, hidden=0.5)
    assert distributed_costs.predicted([bucket], layout, hidden).total == (
        7.0 + busy + found.exchanging - 0.5 * min(busy, found.exchanging)
    )
    # Where all hold all, each sends what it owns and gets as much as the fullest has.
    (bucket,) = distributed_costs.planned("muon", shapes, distributed_costs.Layout(2, 1))
    assert [each.tolist() for each in bucket.received] == [[0, 0], [48, 48]]
    assert distributed_costs.replicated(shapes, 2, narrow).total == 7.0 + 2 * 240.0


def test_replicas_send_on_what_they_were_given():
    layout = distributed_costs.Layout(2, 2)
    (bucket,) = distributed_costs.planned("muon", ((4, 6),) * 4, layout)
    # Half of every matrix comes from the other rank of the owner's replica, and goes to all.
    assert bucket.sent[0].tolist() == [12] * 4 and bucket.received[0].tolist() == [12] * 4
    assert bucket.sent[1].tolist() == [36] * 4 and bucket.received[1].tolist() == [36] * 4


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--ranks", "0"], "--ranks must be like 1,2,4"),
        (["--ranks", "2,x"], "--ranks must be like 1,2,4"),
        (["--ranks", "16"], "at most 8 processes"),
        (["--ranks", "2", "--op", "gram"], "--ranks takes --op of muon_step_"),
    ],
)
def test_ranks_that_make_no_sense(arguments, words, capsys):
    assert cli.main(["bench", *arguments]) == 2
    assert words in capsys.readouterr().err


def found_alone(ranks, campaign):
    """What one rank might have measured."""
    assert ranks == 1 and campaign.shapes == ((24, 16), (16, 24))
    found = distributed_ranks.Found(copied=(1e-9, 1e-9))
    for name, took in (("replicated", 4.0), ("ddp", 6.0)):
        found.steps["muon", name] = [(took, took / 2)] * 3
        found.begin["muon", name] = [(1.0, 0.5)] * 3
    cost = distributed_costs.matrix("muon", (24, 16))[0]
    found.loads["muon", "ddp"] = [2 * cost], 0
    found.matrices = {("muon", shape): 2.0 for shape in campaign.shapes}
    found.pieces = found.everyone = [(0, (0.5, 0.25)), (0, (0.75, 0.5))]
    return [found]


@pytest.mark.parametrize(
    "processes", [found_alone, pytest.param(distributed_ranks.run, marks=pytest.mark.long)]
)
def test_steps_of_one_process_are_predicted_and_measured(tmp_path, monkeypatch, capsys, processes):
    monkeypatch.setattr(run, "BUDGET", 0.01)
    monkeypatch.setattr(distributed, "run_ranks", processes)
    path = tmp_path / "ranks.json"
    shapes = ["--op", "muon_step_", "--shape", "24x16+16x24"]
    assert cli.main(["bench", "--ranks", "1", *shapes, "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert "errors of 2 predictions" in printed and "On paper" in printed
    rows = run.read(path)["rows"]
    assert [row["key"] for row in rows] == ["muon replicated 1", "muon ddp 1"]
    for row in rows:
        assert row["failure"] is None and row["predicted_s"] > 0.0
        assert row["error"] == row["predicted_s"] / row["median_s"] - 1.0
    if processes is found_alone:
        assert [row["predicted_s"] for row in rows] == [5.0, pytest.approx(5.0, abs=1e-4)]
        assert [row["of_replicated"] for row in rows] == [1.0, 1.5]
        assert [row["cpu_s"] for row in rows] == [2.0, 3.0]
        assert rows[0]["cpu_predicted_s"] == 4.5 and rows[0]["cpu_error"] == 1.25
    assert distributed.summary([{**rows[1], "error": 0.4}])[0].endswith("NOT within 15% and 30%")


def test_peers_are_found_where_they_are_pointed_at(tmp_path):
    (tmp_path / "soap.py").write_text("class SOAP: pass\n")
    assert peers.find("soap") is None
    before = list(sys.path)
    peers.point([f"soap={tmp_path}"])
    try:
        assert peers.find("soap").SOAP.__name__ == "SOAP"
        assert peers.versions()["soap"] == "a checkout"
    finally:
        sys.modules.pop("soap", None)
        peers._paths.clear()
    assert sys.path == before


def test_a_peer_that_lacks_a_requirement_says_so(tmp_path):
    (tmp_path / "soap.py").write_text("import something_that_is_not_installed\n")
    peers.point([f"soap={tmp_path}"])
    try:
        with pytest.raises(ModuleNotFoundError, match="something_that_is_not_installed"):
            peers.find("soap")
    finally:
        peers._paths.clear()


def training(name: str) -> dict:
    return {
        "name": name,
        "losses": [4.0 - 0.01 * i for i in range(30)],
        "seconds": [0.1 * (i + 1) for i in range(30)],
        "optimizer_seconds": [5.0] + [0.02] * 29,
        "held_back_loss": 3.5,
    }


def test_the_closing_table():
    results = [training(one.name) for one in demo.RUNS]
    results[2]["optimizer_seconds"] = [0.005] * 30
    results[3]["held_back_loss"] = 3.6
    text = rendered(demo.closing_table(results))
    assert "4.00x" in text  # the first step does not count
    assert [line.split("  ")[1] for line in text.splitlines() if "our" in line] == [
        "our Muon",
        "our Shampoo",
        "our SOAP",
        "our DeVA",
    ]
    assert demo.verdict(results) == [
        "swap_in moves the held-back loss by 0.0000, another seed by 0.1000"
    ]


@pytest.fixture(scope="module")
def char_gpt() -> types.ModuleType:
    module = demo.load_example()
    module.WIDTH, module.LAYERS, module.BATCH, module.CONTEXT = 32, 1, 4, 16
    return module


def test_the_example_trains_with_every_optimizer(char_gpt):
    text = char_gpt.Text.load()
    first = {}
    for name in char_gpt.OPTIMIZERS:
        history = char_gpt.train(name, text, 4)
        assert len(history.losses) == len(history.seconds) == len(history.optimizer_seconds) == 4
        assert math.isfinite(history.held_back_loss)
        first[name] = history.losses[0]
    assert len(set(first.values())) == 1  # one seed, one start
    with pytest.raises(ValueError, match="must be one of adamw"):
        char_gpt.make_optimizers("sgd", char_gpt.CharGPT(8))


def test_counters_of_failures_fail_the_example_and_the_benchmark(char_gpt):
    """A step that was left out costs nothing and trains nothing."""
    param = torch.nn.Parameter(torch.ones(3, 4))
    optimizers = [torch.optim.SGD([param], lr=0.1), sk.optim.Shampoo([param])]
    param.grad = torch.ones(3, 4)
    optimizers[1].step()
    assert char_gpt.failures(optimizers) == ""
    param.grad = torch.full((3, 4), torch.nan)
    optimizers[1].step()
    assert char_gpt.failures(optimizers) == "Shampoo: skipped is 1"
    eye = torch.eye(3, dtype=torch.float64)
    for value, fails in ((1.0, False), (torch.nan, True)):
        begin = steps.Start([eye], [[value * eye]], [(eye, eye)], [(eye, eye)], [eye])
        training = steps.Training(begin, torch.float32, lambda p: sk.optim.Muon(p, lr=0.1))
        with pytest.raises(RuntimeError, match="Muon: skipped is 1") if fails else nullcontext():
            training.moved(1)


def test_the_example_learns(char_gpt):
    losses = char_gpt.train("muon", char_gpt.Text.load(), 60).losses
    assert sum(losses[-5:]) / 5 < losses[0] - 0.4


def rendered(renderable: object) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()
