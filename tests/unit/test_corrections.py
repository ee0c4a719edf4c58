"""What layouts that were tried tell of others."""

from __future__ import annotations

import pytest
from planning_examples import linked, profile

from paceline.plan.corrections import corrected
from paceline.plan.forecast import Forecaster
from paceline.plan.places import Places
from paceline.plan.profile import Correction, Tried
from paceline.plan.unexplained import Unexplained
from paceline.plan.ways import corrections_of
from paceline.records import Layout

TRIED = (
    ("dp_replicate=2", 1.1, "data"),
    ("dp_shard=2,zero=1", 1.3, "sharded"),
    ("dp_shard=2,zero=3", 0.9, "gathered"),
    ("tp=2", 1.2, "tensor"),
    ("pp=2,micro=4", 1.5, ""),
    ("pp=2,micro=4", 0.9, "pipeline"),
)


@pytest.mark.parametrize(("text", "ratio", "way"), TRIED)
def test_a_forecast_of_what_was_tried_is_what_it_took(text, ratio, way):
    made, cluster = profile(), linked()
    layout = Layout.parse(text)
    step_s = Forecaster(made, cluster).forecast(layout).step_s * ratio
    found = corrected(made, cluster, [Tried(layout=layout, step_s=step_s)])
    forecast = Forecaster(found, cluster).forecast(layout)
    assert forecast.step_s == pytest.approx(step_s, rel=1e-9)
    (correction,) = found.corrections
    assert correction.ways == ((way,) if way else ("pipeline",))
    assert (correction.step_s != 0) == (way != "")
    assert (correction.action_s > 0) == (way == "")
    assert forecast.error_s / step_s < Forecaster(made, cluster).relative_error(layout)


@pytest.mark.parametrize("text", ["dp_replicate=", "dp_shard=", "pp="])
def test_what_eight_wait_for_two_wait_a_third_of(text):
    made, cluster = profile((1.0,) * 8, tps=()), linked(8, 1)
    eight, two = (Layout.parse(f"{text}{n}{',micro=4' * (text == 'pp=')}") for n in (8, 2))
    before = [Forecaster(made, cluster).forecast(layout) for layout in (eight, two)]
    step_s = 1.5 * before[0].step_s
    found = corrected(made, cluster, [Tried(layout=eight, step_s=step_s)])
    after = [Forecaster(found, cluster).forecast(layout) for layout in (eight, two)]
    assert after[0].step_s == pytest.approx(step_s)
    name = "overhead_s" if text == "pp=" else "unexplained_s"
    more_s = [getattr(one.terms, name) for one in after]
    assert more_s[1] == pytest.approx(more_s[0] / 3)


@pytest.mark.parametrize("ratio", [0.9, 1.4])
@pytest.mark.parametrize("text", ["dp_replicate=2", "dp_shard=2,zero=3", "pp=2,micro=4"])
def test_what_was_tried_on_unequal_hosts_is_what_it_took_there(text, ratio):
    made, cluster = profile(tps=()), linked(2, 1, speeds=(1.0, 0.5))
    layout = Layout.parse(text)
    step_s = Forecaster(made, cluster).forecast(layout).step_s * ratio
    found = corrected(made, cluster, [Tried(layout=layout, step_s=step_s)])
    assert Forecaster(found, cluster).forecast(layout).step_s == pytest.approx(step_s, rel=1e-9)


@pytest.mark.parametrize(("action_s", "step_s"), [(2e-3, 5e-3), (2e-3, -5e-3), (0.0, 4e-3)])
def test_two_pipelines_tell_what_an_action_takes_from_what_a_step_takes(action_s, step_s):
    made, cluster = profile(tps=()), linked(2, 1)
    slowly = Correction(ways=("pipeline",), action_s=action_s)
    slow = Forecaster(made.model_copy(update={"corrections": (slowly,)}), cluster)
    layouts = [Layout.parse(f"pp=2,micro={micro}") for micro in (2, 8)]
    tried = [Tried(layout=x, step_s=slow.forecast(x).step_s + step_s) for x in layouts]
    found = corrected(made, cluster, tried)
    (correction,) = found.corrections
    assert correction.action_s == pytest.approx(action_s, abs=1e-7)
    assert correction.step_s == pytest.approx(step_s, rel=1e-3)
    after = Forecaster(found, cluster)
    between = Layout.parse("pp=2,micro=4")
    assert after.forecast(between).step_s == pytest.approx(slow.forecast(between).step_s + step_s, rel=1e-4)
    for one in tried:
        assert after.forecast(one.layout).step_s == pytest.approx(one.step_s, rel=1e-4)


@pytest.mark.parametrize("step_s", [4e-3, -4e-3])
def test_an_action_costs_what_pipelines_over_more_workers_have_shown(step_s):
    """Of one pipeline over two workers all could be the step's, and many micro-batches cost nothing."""
    made, cluster = profile((1.0,) * 8, tps=()), linked(8, 1)
    slowly = Correction(ways=("pipeline",), action_s=3e-3)
    slow = Forecaster(made.model_copy(update={"corrections": (slowly,)}), cluster)
    two, many, *eight = (
        Layout.parse(text) for text in ("pp=2,micro=2", "pp=2,micro=8", "pp=8,micro=8", "pp=8,micro=16")
    )
    tried = [
        Tried(layout=x, step_s=slow.forecast(x).step_s + (step_s if x is two else 0)) for x in (two, *eight)
    ]
    found = corrected(made, cluster, tried)
    assert {one.workers: one.action_s for one in found.corrections} == pytest.approx(
        {2: 3e-3, 8: 3e-3}, rel=1e-3
    )
    after = Forecaster(found, cluster)
    assert after.forecast(two).step_s == pytest.approx(tried[0].step_s)
    assert after.forecast(many).step_s == pytest.approx(slow.forecast(many).step_s + step_s, rel=1e-3)
    # Of one number of micro-batches over eight nothing is known of actions, and nothing is borrowed.
    alone = corrected(made, cluster, tried[:2])
    assert {one.action_s for one in alone.corrections} != {3e-3}


@pytest.mark.parametrize("text", ["dp_replicate=2", "dp_shard=2,zero=1", "dp_shard=2,zero=3", "tp=2"])
def test_micro_batches_pay_as_two_layouts_have_shown(text):
    made, cluster = profile(), linked()
    before = Forecaster(made, cluster)
    layouts = [Layout.parse(text if micro == 1 else f"{text},micro={micro}") for micro in (1, 2, 4)]
    more_s = (3e-3, 5e-3, 9e-3)
    took_s = [before.forecast(x).step_s + more for x, more in zip(layouts, more_s, strict=True)]
    tried = [Tried(layout=x, step_s=s) for x, s in zip(layouts[:2], took_s[:2], strict=True)]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    assert [after.forecast(x).step_s for x in layouts] == pytest.approx(took_s)


def test_a_process_alone_is_what_was_tried_with_as_many_threads():
    made, cluster = profile(), linked()
    before = Forecaster(made, cluster)
    layouts = [Layout(threads=threads, micro=micro) for threads in (1, 2) for micro in (1, 2)]
    took_s = [
        before.forecast(x).step_s + more for x, more in zip(layouts, (1e-3, 2e-3, 5e-3, 4e-3), strict=True)
    ]
    tried = [Tried(layout=x, step_s=s) for x, s in zip(layouts, took_s, strict=True)]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    assert [after.forecast(x).step_s for x in layouts] == pytest.approx(took_s)
    two = Layout(dp_replicate=2)
    assert after.forecast(two).step_s == before.forecast(two).step_s


def test_what_a_further_micro_batch_seems_to_save_is_not_saved_again_and_again():
    made, cluster = profile(), linked()
    before = Forecaster(made, cluster)
    layouts = [Layout.parse(f"dp_replicate=2,micro={micro}") for micro in (1, 2, 4)]
    took_s = [before.forecast(x).step_s + more for x, more in zip(layouts, (5e-3, 2e-3, 2e-3), strict=True)]
    tried = [Tried(layout=x, step_s=s) for x, s in zip(layouts[:2], took_s[:2], strict=True)]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    assert [after.forecast(x).step_s for x in layouts] == pytest.approx(took_s)


def test_gradients_of_weights_as_actions_of_their_own_are_tried_by_themselves():
    made, cluster = profile((1.0,) * 4, tps=()), linked(2, 1)
    layouts = [Layout.parse(f"pp=2,micro={m}{s}") for m, s in ((2, ""), (8, ""), (2, ",schedule=zb-h1"))]
    before = Forecaster(made, cluster)
    more_s = (4e-3, 10e-3, 12e-3)
    tried = [
        Tried(layout=x, step_s=before.forecast(x).step_s + s) for x, s in zip(layouts, more_s, strict=True)
    ]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    for one in tried:
        assert after.forecast(one.layout).step_s == pytest.approx(one.step_s, rel=1e-4)


@pytest.mark.parametrize("weight_s", [0.0, 1e-3, 5e-3])
def test_two_of_them_tell_what_an_action_of_gradients_of_weights_takes(weight_s):
    made, cluster = profile((1.0,) * 4, tps=()), linked(2, 1)
    slowly = Correction(ways=("pipeline",), action_s=2e-3, weight_action_s=weight_s, split_step_s=3e-3)
    slow = Forecaster(made.model_copy(update={"corrections": (slowly,)}), cluster)
    texts = [f"pp=2,micro={m}{s}" for s in ("", ",schedule=zb-h1") for m in (2, 8)]
    tried = [Tried(layout=x, step_s=slow.forecast(x).step_s) for x in map(Layout.parse, texts)]
    (correction,) = corrected(made, cluster, tried).corrections
    assert correction.action_s == pytest.approx(2e-3, rel=1e-3)
    assert correction.weight_action_s == pytest.approx(weight_s, abs=1e-6)
    after = Forecaster(corrected(made, cluster, tried), cluster)
    between = Layout.parse("pp=2,micro=4,schedule=zb-h1")
    assert after.forecast(between).step_s == pytest.approx(slow.forecast(between).step_s, rel=1e-3)


def test_gradients_of_weights_are_not_sent():
    """Where that was not tried: over a network an action of theirs takes nothing beside its blocks."""
    made = profile((1.0,) * 4, tps=())
    layout = Layout.parse("pp=2,micro=8,schedule=zb-h1")
    for over_network, shares in ((True, 2.0), (False, 3.0)):
        cluster = linked(2, 1) if over_network else linked(1, 2)
        one = Correction(ways=("pipeline",), action_s=2e-3, over_network=over_network)
        found = Forecaster(made.model_copy(update={"corrections": (one,)}), cluster).forecast(layout)
        assert found.terms.overhead_s == pytest.approx(layout.micro * shares * 2e-3)


def test_pipelines_that_share_a_cable_pay_for_micro_batches_as_two_have_shown():
    made, cluster = profile((1.0,) * 4, tps=()), linked(4, 1)
    before = Forecaster(made, cluster)

    def pipeline(data: str, micro: int) -> Layout:
        return Layout.parse(f"pp=2,{data},micro={micro}")

    each = [("dp_replicate=2", 2, 4e-3), ("dp_replicate=2", 8, 16e-3), ("dp_shard=2,zero=1", 2, 5e-3)]
    tried = [
        Tried(layout=pipeline(data, m), step_s=before.forecast(pipeline(data, m)).step_s + more_s)
        for data, m, more_s in each
    ]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    for data, first_s in (("dp_replicate=2", 4e-3), ("dp_shard=2,zero=1", 5e-3)):
        for micro in (2, 4, 8):
            more_s = (
                after.forecast(pipeline(data, micro)).step_s - before.forecast(pipeline(data, micro)).step_s
            )
            assert more_s == pytest.approx(first_s + (micro - 2) * 2e-3, rel=1e-6), (data, micro)


@pytest.mark.parametrize(("few_s", "between_s"), [(None, 12e-3), (8e-3, 12e-3), (2e-3, 8e-3)])
def test_pipelines_beside_copies_pay_for_gradients_of_weights_by_themselves(few_s, between_s):
    """A straight line, or as much for each micro-batch; and the same beside shards, where that was not tried."""
    made, cluster = profile((1.0,) * 4, tps=()), linked(4, 1)
    before = Forecaster(made, cluster)
    more_s = {"micro=2": 4e-3, "micro=8": 4e-3, "micro=8,schedule=zb-h1": 20e-3}
    if few_s is not None:
        more_s["micro=2,schedule=zb-h1"] = few_s
    tried = []
    for text, seconds in more_s.items():
        layout = Layout.parse(f"pp=2,dp_replicate=2,{text}")
        tried.append(Tried(layout=layout, step_s=before.forecast(layout).step_s + seconds))
    sharded = Layout.parse("pp=2,dp_shard=2,micro=2,zero=1")
    tried.append(Tried(layout=sharded, step_s=before.forecast(sharded).step_s + 7e-3))
    after = Forecaster(corrected(made, cluster, tried), cluster)
    for one in tried:
        assert after.forecast(one.layout).step_s == pytest.approx(one.step_s, rel=1e-6)
    for data, first_s in (("dp_replicate=2", 4e-3), ("dp_shard=2,zero=1", 7e-3)):
        layout = Layout.parse(f"pp=2,{data},micro=4,schedule=zb-h1")
        found_s = after.forecast(layout).step_s - before.forecast(layout).step_s
        assert found_s == pytest.approx(between_s + first_s - 4e-3, rel=1e-6)


@pytest.mark.parametrize("schedule", ["1f1b", "zb-h1"])
def test_between_two_pipelines_a_third_takes_no_more_than_a_line_between_them(schedule):
    """Also where messages, which were measured by themselves, were forecast to take far longer than they do."""
    made, cluster = profile((1e-3,) * 4, tps=()), linked(2, 1)
    bare = Forecaster(made, cluster)
    few, between, many, more = (Layout.parse(f"pp=2,micro={m},schedule={schedule}") for m in (2, 4, 8, 16))
    taken_s = 0.2 * bare.forecast(few).step_s
    tried = [Tried(layout=few, step_s=taken_s), Tried(layout=many, step_s=1.6 * taken_s)]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    found_s = after.forecast(between).step_s
    assert found_s == pytest.approx(1.2 * taken_s)
    assert found_s < 0.5 * bare.forecast(between).step_s
    assert after.floor_s(between) <= after.least_s(between) <= found_s * (1 + 1e-12)
    assert after.forecast(more).step_s > 1.6 * taken_s


def test_what_two_ways_take_together_is_added_to_what_each_takes():
    made, cluster = profile((1.0,) * 4, tps=()), linked(4, 1)
    before = Forecaster(made, cluster)
    texts = (
        "dp_replicate=4",
        "pp=4,micro=4",
        "pp=2,dp_replicate=2,micro=2",
        "dp_shard=4,zero=1",
        "dp_replicate=2,dp_shard=2,zero=1",
    )
    tried = [
        Tried(layout=Layout.parse(text), step_s=before.forecast(Layout.parse(text)).step_s + more_s)
        for text, more_s in zip(texts, (1e-3, 2e-3, 9e-3, 4e-3, 7e-3), strict=True)
    ]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    for one in tried:
        assert after.forecast(one.layout).step_s == pytest.approx(one.step_s, rel=1e-4)
    for text in ("pp=2,dp_replicate=2,micro=4", "pp=2,dp_replicate=2,micro=2,schedule=gpipe"):
        layout = Layout.parse(text)
        assert after.forecast(layout).step_s > before.forecast(layout).step_s + 7e-3
    alone = Layout.parse("dp_replicate=2")
    assert after.forecast(alone).step_s == pytest.approx(before.forecast(alone).step_s + 0.5e-3)


def test_what_was_tried_within_a_host_and_over_the_network_is_kept_apart():
    made, cluster = profile(tps=()), linked(2, 2)
    before = Forecaster(made, cluster)
    texts = ("dp_replicate=2", "dp_replicate=4")
    tried = [
        Tried(layout=Layout.parse(text), step_s=before.forecast(Layout.parse(text)).step_s + more_s)
        for text, more_s in zip(texts, (1e-3, 8e-3), strict=True)
    ]
    after = Forecaster(corrected(made, cluster, tried), cluster)
    for one in tried:
        assert after.forecast(one.layout).step_s == pytest.approx(one.step_s)


def test_what_was_tried_moves_forecasts_of_the_same_way_and_no_others():
    made, cluster = profile(), linked()
    before = Forecaster(made, cluster)
    step_s = before.forecast(Layout.parse("pp=2,micro=4")).step_s
    after = Forecaster(
        corrected(made, cluster, [Tried(layout=Layout.parse("pp=2,micro=4"), step_s=1.4 * step_s)]), cluster
    )

    def moved(text: str) -> float:
        layout = Layout.parse(text)
        return after.forecast(layout).step_s / before.forecast(layout).step_s

    assert moved("dp_replicate=4") == moved("tp=2") == 1.0
    assert moved("pp=2,micro=8") > moved("pp=2,micro=2") > 1.0
    assert moved("pp=2,dp_replicate=2,micro=2") > 1.0


@pytest.mark.parametrize("text", ["dp_replicate=2", "dp_shard=2,zero=3", "tp=2", "pp=2,micro=4"])
def test_what_took_a_tenth_of_its_forecast_is_believed_for_itself_and_for_others_by_half(text):
    made, cluster = profile(), linked()
    layout = Layout.parse(text)
    before_s = Forecaster(made, cluster).forecast(layout).step_s
    found = corrected(made, cluster, [Tried(layout=layout, step_s=before_s / 10)])
    forecaster = Forecaster(found, cluster)
    assert forecaster.forecast(layout).step_s == pytest.approx(before_s / 10)
    assert 0 <= forecaster.floor_s(layout) <= forecaster.least_s(layout) <= before_s / 10 * (1 + 1e-9)
    # Of a cluster on which exchanges, too, take next to nothing something is left.
    within = cluster.within.model_copy(update={"latency_s": 0.0, "bytes_per_s": 1e15})
    faster = cluster.model_copy(update={"within": within})
    assert 0 < Forecaster(found, faster).forecast(layout).step_s <= before_s / 10 * (1 + 1e-9)
    other = layout.model_copy(update={"recompute": "full"})
    bare_s = Forecaster(made, cluster).forecast(other).step_s
    assert forecaster.forecast(other).step_s >= bare_s / 2 * (1 - 1e-9)


@pytest.mark.parametrize("text", ["dp_replicate=", "dp_shard=", "pp="])
def test_between_two_numbers_of_workers_corrections_lie_on_a_line_over_the_logarithm(text):
    made, cluster = profile((1.0,) * 8, tps=()), linked(8, 1)

    def layout(workers: int) -> Layout:
        return Layout.parse(f"{text}{workers}" + (",micro=8" if text == "pp=" else ""))

    bare = Forecaster(made, cluster)
    more_s = {2: 0.030, 8: -0.006}
    tried = [Tried(layout=layout(n), step_s=bare.forecast(layout(n)).step_s + s) for n, s in more_s.items()]
    found = corrected(made, cluster, tried)
    (ways,) = {one.ways for one in found.corrections}
    places = Places(cluster)
    for workers, weights in ((2, {2: 1.0}), (8, {8: 1.0}), (4, {2: 0.5, 8: 0.5})):
        given = corrections_of(found.corrections, layout(workers), ways, places)
        assert {one.workers: weight for one, weight in given} == pytest.approx(weights)
    if text != "pp=":
        between_s = Forecaster(found, cluster).forecast(layout(4)).step_s
        assert between_s == pytest.approx(bare.forecast(layout(4)).step_s + 0.012)


def test_only_exchanges_are_taken_off_what_is_like_nothing_that_was_tried():
    """Eight waited for each other less than was foreseen; two of a pipeline without messages have nothing to lose."""
    made, cluster = profile((1.0,) * 8, tps=()), linked(8, 1)
    bare = Forecaster(made, cluster)
    eight, two = Layout.parse("pp=8,micro=8"), Layout.parse("pp=2,micro=8")
    tried = Tried(layout=eight, step_s=bare.forecast(eight).step_s * 0.4)
    forecaster = Forecaster(corrected(made, cluster, [tried]), cluster)
    assert forecaster.forecast(eight).step_s == pytest.approx(tried.step_s)
    before, after = bare.forecast(two), forecaster.forecast(two)
    kept_s = 0.9 * (before.step_s - before.terms.messages_s)
    assert kept_s * (1 - 1e-9) <= after.step_s < before.step_s
    assert forecaster.floor_s(two) <= forecaster.least_s(two) <= after.step_s


def test_pipelines_of_several_stages_a_worker_or_of_fewer_micro_batches_are_not_like_what_was_tried():
    """Two of one stage each waited less than was foreseen; with two stages each there is not as much to wait for."""
    made, cluster = profile((1.0,) * 8, tps=()), linked(2, 1)
    bare = Forecaster(made, cluster)
    plain, fewer = Layout.parse("pp=2,micro=4"), Layout.parse("pp=2,micro=2")
    others = [Layout.parse(f"pp=2,micro=4,schedule={name}") for name in ("interleaved", "bfs")]
    tried = Tried(layout=plain, step_s=bare.forecast(plain).step_s * 0.6)
    forecaster = Forecaster(corrected(made, cluster, [tried]), cluster)
    assert forecaster.forecast(plain).step_s == pytest.approx(tried.step_s)
    for layout in (fewer, *others):
        before, after = bare.forecast(layout), forecaster.forecast(layout)
        kept_s = 0.9 * (before.step_s - before.terms.messages_s)
        assert kept_s * (1 - 1e-9) <= after.step_s < before.step_s
        assert forecaster.floor_s(layout) <= forecaster.least_s(layout) <= after.step_s


def test_where_many_actions_took_more_than_their_share_few_take_theirs():
    made, cluster = profile((1.0,) * 8, tps=()), linked(4, 1)
    bare = Forecaster(made, cluster)
    few, many = (Layout.parse(f"pp=4,micro={micro}") for micro in (4, 16))
    tried = [
        Tried(layout=few, step_s=bare.forecast(few).step_s + 5e-3),
        Tried(layout=many, step_s=bare.forecast(many).step_s + 500e-3),
    ]
    found = corrected(made, cluster, tried)
    (correction,) = found.corrections
    assert correction.step_s < 0
    after = Forecaster(found, cluster)
    for one in tried:
        assert after.forecast(one.layout).step_s == pytest.approx(one.step_s, rel=1e-4)
    two, between = Layout.parse("pp=4,micro=2"), Layout.parse("pp=4,micro=8")
    more_s = [after.forecast(x).step_s - bare.forecast(x).step_s for x in (two, few, between, many)]
    assert 0 < more_s[0] < more_s[1] < more_s[2] < more_s[3]
    # With gradients of weights as actions of their own there are three actions for two; else it is the same.
    split = Tried(layout=few.model_copy(update={"schedule": "zb-h1"}), step_s=tried[0].step_s)
    with_split = Forecaster(corrected(made, cluster, [*tried, split]), cluster)
    assert with_split.forecast(split.layout).step_s == pytest.approx(split.step_s, rel=1e-4)
    for layout in (between, many):
        whole_s = with_split.forecast(layout).step_s
        in_parts_s = with_split.forecast(layout.model_copy(update={"schedule": "zb-h1"})).step_s
        assert whole_s < in_parts_s < 1.6 * whole_s
    # Nothing is taken off a pipeline of two for what eight paid too much.
    small = Layout.parse("pp=2,micro=4")
    assert after.forecast(small).step_s >= bare.forecast(small).step_s


def test_what_two_did_not_wait_for_eight_are_not_spared_three_times():
    made, cluster = profile(tps=()), linked(8, 1)
    two, eight = Layout.parse("dp_replicate=2"), Layout.parse("dp_replicate=8")
    bare = Forecaster(made, cluster)
    saved_s = 0.05 * bare.forecast(two).step_s
    found = corrected(made, cluster, [Tried(layout=two, step_s=bare.forecast(two).step_s - saved_s)])
    after = Forecaster(found, cluster)
    assert after.forecast(two).step_s == pytest.approx(bare.forecast(two).step_s - saved_s)
    # It passed while they computed, and each of eight computes a quarter of that.
    assert bare.forecast(eight).step_s - after.forecast(eight).step_s == pytest.approx(saved_s / 4)
    both = Layout.parse("pp=2,dp_replicate=2,micro=2")
    assert bare.forecast(both).step_s - after.forecast(both).step_s == pytest.approx(saved_s / 2)


def test_what_was_tried_is_forecast_as_it_was_found_and_what_lies_between_on_a_line():
    """ZB-H1 with many micro-batches took no longer than with few: no line of costs goes through both."""
    made, cluster = profile(tps=()), linked(1, 2)
    bare = Forecaster(made, cluster)
    few, between, many = (Layout(pp=2, micro=m, schedule="zb-h1") for m in (2, 4, 8))
    whole = [Layout(pp=2, micro=m) for m in (2, 8)]
    took_s = {few: 1.3 * bare.forecast(few).step_s, many: 1.02 * bare.forecast(many).step_s}
    took_s |= {x: 1.1 * bare.forecast(x).step_s for x in whole}
    tried = [Tried(layout=x, step_s=s) for x, s in took_s.items()]
    found = corrected(made, cluster, tried)
    told = Forecaster(found, cluster)
    for layout, step_s in took_s.items():
        assert told.forecast(layout).step_s == pytest.approx(step_s), layout
    rests = [one.rest_s for one in found.tried if one.layout in (few, many)]
    assert min(map(abs, rests)) > 1e-3
    alone = found.model_copy(
        update={"tried": tuple(one.model_copy(update={"rest_s": 0.0}) for one in found.tried)}
    )
    without_s = Forecaster(alone, cluster).forecast(between).step_s
    line_s = rests[0] + (rests[1] - rests[0]) / 3
    assert told.forecast(between).step_s == pytest.approx(without_s + line_s)
    # Corrected again nothing changes.
    assert corrected(found, cluster, found.tried) == found


@pytest.mark.parametrize(
    ("cuts", "rest_s", "on_a_line"),
    [
        ({2: 3, 4: 3, 8: 3}, 0.02, True),
        ({2: 3, 4: 3, 8: 5}, 0.01, False),
        ({2: 5, 4: 3, 8: 3}, 0.04, False),
        ({2: 5, 4: 4, 8: 3}, 0.02, False),
    ],
)
def test_between_two_pipelines_a_third_is_like_the_one_that_is_cut_as_it_is(cuts, rest_s, on_a_line):
    few, between, many = (Layout(pp=2, micro=micro) for micro in (2, 4, 8))
    tried = Tried(layout=few, step_s=1.0, rest_s=0.01), Tried(layout=many, step_s=1.0, rest_s=0.04)
    made, cluster = profile().model_copy(update={"tried": tried}), linked()
    found = Unexplained(made, cluster, Places(cluster), lambda layout: (0, cuts[layout.micro], 6))
    assert found.corrected_s(between, 1.0) == pytest.approx(1.0 + rest_s)
    assert (found.neighbours(between) is not None) == on_a_line


def test_lines_that_fit_badly_move_nothing_that_was_tried_nor_halve_what_lies_beside_it():
    """Where many micro-batches took twice their terms, gradients of weights by themselves seem to take less than
    nothing: so it was of a model of few wide products on two cores."""
    made, cluster = profile(tps=()), linked(1, 2)
    took = {"pp=2,micro=2": 1.0, "pp=2,micro=8": 2.0}
    took |= {"pp=2,micro=2,schedule=zb-h1": 0.95, "pp=2,micro=8,schedule=zb-h1": 1.2}
    bare = Forecaster(made, cluster)
    tried = [
        Tried(layout=layout, step_s=bare.forecast(layout).step_s * ratio)
        for layout, ratio in ((Layout.parse(text), ratio) for text, ratio in took.items())
    ]
    found = Forecaster(corrected(made, cluster, tried), cluster)
    for one in tried:
        assert found.forecast(one.layout).step_s == pytest.approx(one.step_s, rel=1e-9), one.layout
    few = Layout(pp=2, micro=1, schedule="zb-h1")
    assert found.forecast(few).step_s > 0.85 * bare.forecast(few).step_s
    assert found.least_s(few) <= found.forecast(few).step_s
