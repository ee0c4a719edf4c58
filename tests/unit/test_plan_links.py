"""What exchanges take on links, against forms that can be computed by hand."""

from __future__ import annotations

import pytest
from planning_examples import CABLE, MEMORY, linked, profile

from paceline.plan import links
from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.links import KINDS, Link, MeasuredCollective, Placement
from paceline.records import Layout


def test_a_curve_goes_through_its_points_and_on():
    curve = Curve.of({1: 2.0, 2: 3.0, 4: 7.0})
    assert [curve(x) for x in (0, 1, 1.5, 2, 3, 4, 6)] == pytest.approx([1.0, 2.0, 2.5, 3.0, 5.0, 7.0, 11.0])
    assert Curve(points=((4.0, 2.0),))(8) == 4.0
    assert Curve.line(1.0, 0.5)(10) == 6.0


def test_a_curve_never_falls_and_averages_what_noise_turned_round():
    curve = Curve.of({1: 1.0, 2: 3.0, 3: 2.0, 4: 1.5, 5: 8.0})
    assert [cost for _, cost in curve.points] == pytest.approx([1.0, 6.5 / 3, 6.5 / 3, 6.5 / 3, 8.0])
    values = [curve(x / 10) for x in range(80)]
    assert values == sorted(values)


@pytest.mark.parametrize("points", [(), ((1.0, 2.0), (1.0, 3.0)), ((1.0, 2.0), (2.0, 1.0)), ((-1.0, 0.0),)])
def test_what_is_no_curve_is_refused(points):
    with pytest.raises(ValueError):  # noqa: PT011 - pydantic's error is one
        Curve(points=points)


def test_formulas_of_collectives():
    link = Link(name="a", latency_s=1e-5, bytes_per_s=1e9)
    b = 8e6
    assert link.seconds("all-reduce", 4, b) == pytest.approx(6e-5 + 1.5 * b / 1e9)
    assert link.seconds("all-gather", 4, b) == pytest.approx(3e-5 + 0.75 * b / 1e9)
    assert link.seconds("broadcast", 8, b) == pytest.approx(3e-5 + b / 1e9)
    assert link.seconds("message", 2, b) == pytest.approx(1e-5 + b / 1e9)
    shared = link.model_copy(update={"is_shared": True})
    assert shared.seconds("all-reduce", 4, b) == pytest.approx(6e-5 + 4 * 1.5 * b / 1e9)
    # The next message needs the way for as long as its bytes take.
    assert link.seconds("stream", 2, b) == pytest.approx(b / 1e9)
    with pytest.raises(ValueError, match="no collective 'gossip'"):
        link.seconds("gossip", 2, b)


def test_what_was_measured_stands_in_place_of_the_formula():
    measured = MeasuredCollective(
        kind="all-reduce", workers=2, seconds=Curve(points=((4.0, 2e-4), (1e6, 1.2e-3)))
    )
    link = Link(name="a", latency_s=1.0, bytes_per_s=1.0, measured=(measured,))
    assert link.seconds("all-reduce", 2, 1e6) == pytest.approx(1.2e-3)
    # Four workers: three times as many messages, and 1.5 instead of 1.0 times the bytes.
    assert link.seconds("all-reduce", 4, 1e6) == pytest.approx(3 * 2e-4 + 1.5 * 1e-3)


def test_messages_take_what_they_took_however_many_workers_there_were():
    kinds = ("message", "stream")
    curve = Curve(points=((4.0, 2e-4), (1e6, 1.2e-3)))
    measured = tuple(MeasuredCollective(kind=kind, workers=8, seconds=curve) for kind in kinds)
    link = Link(name="a", latency_s=1.0, bytes_per_s=1.0, measured=measured)
    assert all(link.seconds(kind, 2, 1e6) == pytest.approx(1.2e-3) for kind in kinds)


def test_each_cut_of_a_pipeline_has_its_own_way_and_bytes():
    """Four stages over two hosts of two workers: only the middle cut crosses, and nobody shares its cable."""
    forecaster = Forecaster(profile((1.0,) * 4, 16, ()), linked(2, 2))
    hops = forecaster.parts(Layout(pp=4, micro=4)).sending.hops
    within, cable = forecaster.linked.within, forecaster.linked.between
    assert cable is not None
    num_bytes = forecaster.stages_of(Layout(pp=4, micro=4))[0].output_bytes
    assert [hop.there_s for hop in hops] == pytest.approx(
        [link.seconds("message", 2, num_bytes) for link in (within, cable, within)]
    )
    assert [hop.busy_s for hop in hops] == pytest.approx(
        [link.seconds("stream", 2, num_bytes) for link in (within, cable, within)]
    )
    assert hops[0].medium == hops[2].medium != hops[1].medium


def test_pipelines_that_share_a_cable_wait_for_each_others_messages():
    forecaster = Forecaster(profile((1.0,) * 4, 16, ()), linked(2, 2))
    cable = forecaster.linked.between
    assert cable is not None
    layout = Layout(pp=2, dp_replicate=2, micro=2)
    sent = forecaster.parts(layout).sending
    num_bytes = forecaster.stages_of(layout)[0].output_bytes
    (hop,) = sent.hops
    # Each is there as soon as it would be alone; the next may follow when both pipelines have sent theirs.
    assert hop.there_s == pytest.approx(cable.seconds("message", 2, num_bytes))
    assert hop.busy_s == pytest.approx(cable.seconds("stream", 2, 2 * num_bytes))
    assert sent.behind_s == pytest.approx(hop.busy_s / 2)
    more = layout.model_copy(update={"micro": 4})
    assert forecaster.parts(more).sending.behind_s == pytest.approx(sent.behind_s / 2)


def test_several_hosts_send_each_byte_once_over_their_cable():
    b = 1e7
    within = Link(name="m", latency_s=0.0, bytes_per_s=1e15)
    cable = Link(name="c", latency_s=0.0, bytes_per_s=1e8)
    place = Placement(hosts=2, per_host=4)
    assert links.seconds(within, cable, "all-reduce", place, b) == pytest.approx(b / 1e8, rel=1e-3)
    assert links.seconds(within, cable, "all-gather", place, b) == pytest.approx(0.5 * b / 1e8, rel=1e-3)
    # Four groups of one worker on each host use the cable at once.
    apart = Placement(hosts=2, per_host=1, beside=4)
    assert links.seconds(within, cable, "all-reduce", apart, b) == pytest.approx(4 * b / 1e8)


def test_a_collective_of_more_bytes_never_takes_less():
    for kind in KINDS:
        for place in (
            Placement(hosts=1, per_host=4),
            Placement(hosts=3, per_host=2),
            Placement(hosts=2, per_host=1),
        ):
            times = [links.seconds(MEMORY, CABLE, kind, place, float(b)) for b in (0, 1, 1e3, 1e6, 1e9)]
            assert times == sorted(times), (kind, place)


def test_groups_are_where_the_ranks_of_the_mesh_are():
    forecaster = Forecaster(profile(batch_size=16), linked(2, 4))
    layout = Layout(pp=2, dp_replicate=2, tp=2)
    # Outermost first: pp apart by 4, data by 2, tp by 1; a host has 4.
    assert forecaster.place(layout, "tp") == Placement(hosts=1, per_host=2, beside=2)
    assert forecaster.place(layout, "data") == Placement(hosts=1, per_host=2, beside=2)
    assert forecaster.place(layout, "pp") == Placement(hosts=2, per_host=1, beside=4)
    assert forecaster.place(Layout(dp_replicate=8), "data") == Placement(hosts=2, per_host=4, beside=1)


def test_of_three_hosts_half_of_the_bytes_wait_for_the_end_of_the_backward_pass():
    job = profile((1.0,) * 4, 12, (), shares_update=True)
    terms = Forecaster(job, linked(3, 2)).forecast(Layout(dp_replicate=6)).terms
    # 160 MB, a worker's half of it; the cable carries both workers' four thirds of that; four messages.
    whole_s = 4 / 3 * 160e6 / 1.25e8 + 4e-4
    added_s = 160e6 * 5e-11 + 80e6 * 5e-11
    # Four blocks of 2 samples: three of them are backward while the first half of the bytes travels.
    hidden_s = 3 * (2e-4 + 2 * 2e-3)
    assert terms.gradients_s == pytest.approx(added_s + whole_s - hidden_s)
