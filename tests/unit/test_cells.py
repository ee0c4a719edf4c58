"""The arithmetic of benchmarks/forecast.py, regret.py and knee.py, on results that are written down."""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import pytest
from planning_examples import linked, profile

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import cell_worker
import cells
import forecast
import knee
import regret
from cell_clusters import CLUSTERS, enlarged
from cell_space import FSDP, HOST_TENSOR, ONE, PURE_DATA, curve_space, rules_of_thumb, whole_space
from cells import Cell, Pair
from rankings import kendall_tau, ranking

from paceline.plan.forecast import Forecaster
from paceline.records import Layout

ONE_PROCESS, DATA, PIPELINE = "dp_replicate=1,threads=2", "dp_replicate=2,threads=1", "pp=2,micro=4,threads=1"


def cell(
    layout: str, forecast_s: float | None, *round_s: float, cluster: str = "here", job: str = "conv"
) -> Cell:
    median_s = sorted(round_s)[len(round_s) // 2] if round_s else None
    error_s = None if forecast_s is None else forecast_s / 10
    return Cell(job, cluster, layout, forecast_s, error_s, {}, round_s=list(round_s), median_step_s=median_s)


def pair(*of: Cell, choice: str = DATA, job: str = "conv", cluster: str = "here") -> Pair:
    rules = {ONE: ONE_PROCESS, PURE_DATA: DATA, HOST_TENSOR: "tp=2,threads=1"}
    return Pair(job, cluster, "2026-11-24", "2.13", 2, 64, list(of), choice, rules)


def test_kendall_tau_by_hand():
    assert kendall_tau([1, 2, 3, 4], [1, 2, 3, 4]) == 1
    assert kendall_tau([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    # Of six pairs one is the other way round.
    assert kendall_tau([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # Of three pairs two are the same way round; one is a tie of the first: 2 / √(2 · 3).
    assert kendall_tau([1, 1, 2], [1, 2, 3]) == pytest.approx(2 / math.sqrt(6))
    assert math.isnan(kendall_tau([1.0], [2.0]))


def test_layouts_within_noise_of_each_other_do_not_count():
    forecast_s, measured_s = [1.0, 2.0, 3.0], [1.0, 3.0, 2.9]
    assert kendall_tau(forecast_s, measured_s) == pytest.approx(1 / 3)
    assert kendall_tau(forecast_s, measured_s, [0.03] * 3) == 1


def test_regret_is_against_the_fastest_even_without_a_forecast():
    found = ranking(
        pair(
            cell(ONE_PROCESS, 2.0, 2.0, 2.0),
            cell(DATA, 1.0, 1.2, 1.2),
            cell(PIPELINE, 1.5, 1.1, 1.1),
            cell("tp=2,threads=1", None, 1.0, 1.0),
        )
    )
    assert found is not None
    assert found.best.layout == "tp=2,threads=1"
    assert found.regret == pytest.approx(0.2)
    # The forecast swaps two of the three that it knows.
    assert found.tau == pytest.approx(1 / 3)
    assert found.best_rule == HOST_TENSOR
    assert found.is_worse_than_a_rule
    assert found.regret_of(found.rules[ONE]) == pytest.approx(1.0)


def test_a_choice_within_noise_of_a_rule_is_not_worse():
    noisy = ranking(pair(cell(ONE_PROCESS, 1.0, 0.95, 1.05), cell(DATA, 0.9, 1.0, 1.1)))
    assert noisy is not None
    assert noisy.regret > 0
    assert not noisy.is_worse_than_a_rule
    quiet = ranking(pair(cell(ONE_PROCESS, 1.0, 1.0, 1.0), cell(DATA, 0.9, 1.1, 1.1)))
    assert quiet is not None
    assert quiet.is_worse_than_a_rule


def test_what_is_nearly_the_fastest_is_timed_once_more_with_the_choice():
    close = [cell(f"dp_replicate=1,micro={n},threads=1", 1.0, 1 + n / 100) for n in range(1, 13)]
    assert cell_worker.contenders(pair(*close, choice=close[3].layout)) == close[:6]
    assert cell_worker.contenders(pair(*close, choice=close[11].layout)) == [*close[:5], close[11]]
    apart = [cell(ONE_PROCESS, 1.0, 1.0), cell(DATA, 1.0, 1.2), cell(PIPELINE, 1.0, 1.3)]
    assert cell_worker.contenders(pair(*apart)) == apart[:2]
    assert cell_worker.contenders(pair(*apart, choice=ONE_PROCESS)) == []
    assert cell_worker.contenders(pair()) == []


def test_regret_is_told_by_what_was_timed_once_more():
    timed = [cell(ONE_PROCESS, 1.0, 1.0), cell(DATA, 0.9, 1.05), cell("tp=2,threads=1", 1.3, 1.2)]
    several = pair(*timed)
    several.again = [cell(ONE_PROCESS, 1.0, 1.5), cell(DATA, 1.0, 1.3)]
    found = ranking(several)
    assert found is not None
    assert found.best.layout == DATA
    assert found.regret == 0
    assert found.regret_of(found.rules[ONE]) == pytest.approx(1.5 / 1.3 - 1)
    # This was not: it is held against what the other took at the same time.
    assert found.regret_of(found.rules[HOST_TENSOR]) == pytest.approx(1.2 / 1.05 - 1)
    assert not found.is_worse_than_a_rule
    assert found.tau == ranking(pair(*timed)).tau


def test_a_choice_that_was_not_measured_has_no_ranking():
    failed = pair(cell(ONE_PROCESS, 1.0, 1.0, 1.0), cell(DATA, 0.5))
    failed.cells[1].trouble = "it failed"
    assert ranking(failed) is None
    text = regret.table([failed], "title")
    assert "not measured for conv@here" in text
    assert f"| conv | here | {DATA} | it failed |" in text


def test_short_steps_of_hosts_that_pause_are_measured_by_rounds():
    short = Cell("conv", "four-1g", DATA, 0.01, round_s=[0.01, 0.012, 0.011], median_step_s=0.004)
    assert short.measured_s == 0.011
    assert Cell("conv", "here", DATA, 0.01, round_s=short.round_s, median_step_s=0.004).measured_s == 0.004
    long = Cell("conv", "four-1g", DATA, 0.1, round_s=[0.1, 0.12, 0.11], median_step_s=0.1)
    assert long.measured_s == 0.1


def test_errors_are_summed_up_without_what_was_tried():
    found = [cell(DATA, 1.1, 1.0, 1.0), cell(PIPELINE, 1.3, 1.0, 1.0), cell(ONE_PROCESS, 9.0, 1.0, 1.0)]
    found[2].was_tried = True
    count, error, middle, most, *_, inside = forecast.summary(
        forecast.counted(found), {("conv", "here"): 1.0}
    )
    assert (count, error, middle, most, inside) == ("2", "20.0%", "20.0%", "30.0%", "50%")
    assert forecast.percentile(range(1, 101), 0.95) == 95
    text = forecast.table([pair(*found, job="text"), pair(*found)], "title")
    assert f"| conv | here | {ONE_PROCESS} (tried) | 9000.00 ± 900.00 | 1000.00 | +800.0% | 0.0% |" in text


def test_the_drift_of_a_pair_is_taken_from_the_layouts_that_were_tried():
    found = [
        cell(DATA, 1.0, 1.2),
        cell(ONE_PROCESS, 1.0, 1.3),
        cell("tp=2,threads=1", 1.0, 1.25),
        cell(PIPELINE, 1.0, 1.5),
    ]
    for one in found[:3]:
        one.was_tried = True
    slower = pair(*found)
    assert forecast.drift(slower) == pytest.approx(1.25)
    assert forecast.drift(pair(found[3])) == 1.0
    _, error, _, _, still, most, *_ = forecast.summary(found[3:], {("conv", "here"): forecast.drift(slower)})
    assert (error, still, most) == ("33.3%", "16.7%", "16.7%")
    assert "Drift: conv@here +25.0%." in forecast.table([slower], "title")


def test_rules_of_thumb_are_in_the_space():
    for hosts, per_host in ((1, 2), (2, 1), (2, 2), (4, 1)):
        cluster = linked(hosts, per_host).cluster
        space = whole_space(cluster, 64)
        rules = rules_of_thumb(cluster, 64)
        assert len(rules) == 4
        assert set(rules.values()) <= set(space)
        assert len(space) == len(set(space))
        assert all(layout.workers <= cluster.workers for layout in space)
        assert all(Layout.parse(str(layout)) == layout for layout in space)
    assert rules[PURE_DATA] == Layout(dp_replicate=4, threads=1)
    assert rules[FSDP] == Layout(dp_shard=4, zero=3, threads=1)
    two_by_two = rules_of_thumb(linked(2, 2).cluster, 64)
    assert two_by_two[HOST_TENSOR] == Layout(pp=2, tp=2, micro=8, threads=1)
    assert two_by_two[ONE] == Layout(threads=2)


def test_the_batch_decides_what_is_possible():
    cluster = linked(2, 1).cluster
    assert all(layout.data_parallel == 1 and layout.micro in (1, 3) for layout in whole_space(cluster, 3)), (
        "a batch of three"
    )
    assert PURE_DATA not in rules_of_thumb(cluster, 3)


def test_a_curve_has_each_number_of_workers_and_plain_data_parallelism():
    found = curve_space(Forecaster(profile(), linked(4, 1)))
    assert {layout.workers for layout in found} == {1, 2, 3, 4}
    assert Layout(dp_replicate=4, threads=1) in found
    assert sum(layout.workers == 4 for layout in found) <= 4


def test_slow_layouts_are_timed_by_themselves_and_none_is_left_out():
    found = [cell(f"pp=2,micro={n}", s) for n, s in enumerate((0.1, 0.2, 0.3, 5.0, None, 0.7), 2)]
    bytes_of = {one.layout: 4.0 for one in found}
    plan = list(cell_worker.batches(found, bytes_of, room_bytes=8.0))
    assert [[one.forecast_s for one in batch.cells] for batch in plan] == [
        [0.1, 0.2], [0.3], [0.7], [5.0], [None],
    ]  # fmt: skip
    assert [batch.is_slow for batch in plan] == [False, False, True, True, True]


def test_results_are_read_again_and_measured_no_more(tmp_path, monkeypatch):
    one = pair(cell(DATA, 1.0, 1.0, 1.1))
    one.curve = [(1, ONE_PROCESS, 2.0), (2, DATA, 1.0)]
    one.write(tmp_path / "conv@here.json")
    assert Pair.read(tmp_path / "conv@here.json") == one
    parser = argparse.ArgumentParser()
    cells.with_measuring(parser, CLUSTERS)
    monkeypatch.setattr(cells.signal, "signal", lambda *_: None)
    resumed = parser.parse_args(["--results", str(tmp_path)])
    assert cells.measured_pairs([("conv", "here")], resumed) == [one]
    again = parser.parse_args(["--from", str(tmp_path)])
    assert cells.measured_pairs([("text", "here"), ("conv", "here")], again) == [one]
    with pytest.raises(SystemExit, match=r"has none of text@here"):
        cells.measured_pairs([("text", "here")], again)


def test_a_failed_pair_is_a_row_and_is_measured_again_if_asked(tmp_path, monkeypatch):
    parser = argparse.ArgumentParser()
    cells.with_measuring(parser, CLUSTERS)
    monkeypatch.setattr(cells.signal, "signal", lambda *_: None)
    monkeypatch.setattr(cells, "_WORKER", tmp_path / "worker.py")
    (tmp_path / "worker.py").write_text("raise ValueError('a word')\n")
    here = type(CLUSTERS["here"])
    monkeypatch.setattr(here, "start", lambda self, command, timeout_s, tell: [_ended(command)])
    options = parser.parse_args(["--results", str(tmp_path)])
    (failed,) = cells.measured_pairs([("conv", "here")], options)
    assert failed.failure == "a worker of host 0 ended with exit code 1: ValueError: a word"
    assert "ValueError: a word" in forecast.table([failed], "title")
    (tmp_path / "worker.py").write_text("")
    assert cells.measured_pairs([("conv", "here")], options) == [failed]
    (again,) = cells.measured_pairs(
        [("conv", "here")], parser.parse_args(["--results", str(tmp_path), "--retry"])
    )
    assert not again.failure


def _ended(command):
    import subprocess

    done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    return cells.Ended(0, done.returncode, done.stdout, done.stderr, False, False)


def curve_of(forecast_s: dict[int, float], measured_s: dict[int, float]) -> knee.Curve:
    layouts = {n: f"dp_replicate={n},threads=1" for n in measured_s}
    one = pair(
        *(cell(layouts[n], 1.0, s, s, cluster="eight-1g") for n, s in measured_s.items()), cluster="eight-1g"
    )
    one.curve = [(n, layouts[n], forecast_s[n]) for n in measured_s]
    found = knee.curve(one)
    assert found is not None
    return found


def test_knee_and_turn_predicted_and_measured():
    ideal = {1: 1.0, 2: 0.5, 4: 0.25, 8: 0.125}
    flat = {1: 1.0, 2: 0.5, 4: 0.48, 8: 0.6}
    found = curve_of(ideal, flat)
    assert found.knees() == (8, 2)
    assert found.turns() == (8, 4)
    assert found.apart(found.knees()) == 2
    assert found.apart(found.turns()) == 1
    assert "| 8 | 2 | 8 | 4 | the turn |" in "\n".join(knee._summary([found]))


def test_slower_than_one_is_foreseen_or_not():
    found = curve_of({1: 1.0, 2: 1.2, 4: 0.8, 8: 2.0}, {1: 1.0, 2: 1.1, 4: 1.5, 8: 1.0})
    assert [found.slower_than_one(point) for point in found.points[1:]] == ["right", "wrong", "within noise"]


def test_what_two_workers_measured_forecasts_more():
    small = Pair("conv", "small-1g", profile=profile().to_json(), linked=linked(2, 1).to_json())
    layouts = [Layout(dp_replicate=n, threads=1) for n in (2, 4, 8)]
    large = pair(*(cell(str(x), 9.0, 1.0, 1.0) for x in layouts), cluster="eight-1g")
    found = knee.from_small(small, large)
    assert [one.layout for one in found] == [str(x) for x in layouts[1:]]
    eight = Forecaster(profile(), enlarged(linked(2, 1), 8))
    assert found[1].forecast_s == pytest.approx(eight.forecast(layouts[2]).step_s)
    assert eight.forecast(layouts[2]).step_s == pytest.approx(
        Forecaster(profile(), linked(8, 1)).forecast(layouts[2]).step_s
    )
