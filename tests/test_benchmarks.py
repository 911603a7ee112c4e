"""Cases, their measurement and the pages made of it."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import time
from pathlib import Path

import pytest
import readme_tables  # noqa: E402
import torch
from rich.console import Console  # noqa: E402
from spectral_kernels import _extension, cli, coefficients  # noqa: E402
from spectral_kernels.benchmarks import (  # noqa: E402
    demo,
    inputs,
    inverse_root,
    isa_comparison,
    newton_schulz,
    place,
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

pytest.importorskip("rich", reason="the extra 'cli' is not installed")
pytest.importorskip("matplotlib", reason="the extra 'cli' is not installed")

_PAGES = ("benchmarks", "distributed", "doctor")
BUDGET = 0.01  # little more than the least number of rounds


pytestmark = pytest.mark.usefixtures("without_peers")


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
        build=lambda _: Problem(
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
    problem = case.build(torch.device("cpu"))
    problem.contenders.append(Contender("other", broken))
    row = run.run_case(dataclasses.replace(case, build=lambda _: problem), 1, BUDGET)
    assert row["failure"] is None
    assert row["contenders"][2]["failure"] == "RuntimeError: no such kernel"
    assert "no such kernel" in rendered(report.table("gram", [row]))


def test_ours_that_cannot_run_fails_the_case():
    def broken(_: torch.device) -> Problem:
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
        case = dataclasses.replace(broken_case(0.0), build=lambda _: problem)
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


def test_a_ceiling_does_not_sink(monkeypatch):
    rates = iter([100.0, 68.0, 101.0])
    monkeypatch.setattr(place, "fma_peak", lambda rate, threads: next(rates))
    monkeypatch.setattr(place, "_highest", {})
    assert [place.CPU.peak("fp32", 2) for _ in range(3)] == [100.0, 100.0, 101.0]


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


def test_what_torch_may_be_slow_at_is_measured_last():
    sizes = [case.dtype.itemsize for case in demo.quick_cases()]
    assert sizes == sorted(sizes, key=lambda size: size < 4) and 2 in sizes and 4 in sizes


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


def test_a_disturbed_stretch_does_not_show_in_the_time_of_a_step():
    quiet = [0.5] + [0.010, 0.030] * 40  # the first sets up
    assert plots.steady(quiet[:-1]) == pytest.approx(0.020, rel=0.03)
    disturbed = quiet[:20] + [9.0] * 20 + quiet[40:-1]
    assert plots.steady(disturbed) == pytest.approx(plots.steady(quiet[:-1]), rel=0.05)
    assert plots.steady([3.0]) == 3.0
    assert plots.steady([3.0, 1.0, 2.0]) == 1.5


def test_a_disturbed_machine_is_named():
    assert report.disturbance([None]) == []
    assert report.disturbance([0.02, None]) == ["other processes used 2% of the cores meanwhile"]
    (line,) = report.disturbance([0.5, 0.3])
    assert line.startswith("other processes used 40% of the cores meanwhile: times are disturbed")


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


def training(name: str) -> dict:
    return {
        "name": name,
        "losses": [4.0 - 0.01 * i for i in range(30)],
        "seconds": [0.1 * (i + 1) for i in range(30)],
        "optimizer_seconds": [5.0] + [0.02] * 29,
        "held_back_loss": 3.5,
    }


def rendered(renderable: object) -> str:
    console = Console(width=140, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(renderable)
    return console.export_text()
