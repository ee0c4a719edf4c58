"""What workers are forecast to hold, and what fits their hosts."""

from __future__ import annotations

import random

import pytest
from planning_examples import GIB, linked, profile, random_linked, random_profile, sending

from paceline.errors import LayoutError
from paceline.plan.corrections import corrected
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import Correction, Tried
from paceline.plan.room import memory_margin, room_bytes
from paceline.plan.search import layouts, search
from paceline.records import Cluster, Layout

SEEDS = range(25)
MIB = 1 << 20


@pytest.mark.parametrize("seed", SEEDS)
def test_hosts_of_more_memory_never_shrink_the_choice(seed):
    drawn = random.Random(seed)
    forecaster = Forecaster(random_profile(drawn), random_linked(drawn))
    every = list(layouts(forecaster))
    there = forecaster.linked
    fitting: list[set[Layout]] = []
    for times in (1, 2, 4):
        hosts = tuple(
            h.model_copy(update={"memory_bytes": times * h.memory_bytes // 3}) for h in there.cluster.hosts
        )
        linked = there.model_copy(update={"cluster": Cluster(hosts=hosts)})
        fitting.append(
            {x for x in every if forecaster.forecast(x).memory.own <= room_bytes(linked, x, None, 0.1)}
        )
    assert fitting[0] <= fitting[1] <= fitting[2]


@pytest.mark.parametrize("seed", SEEDS)
def test_of_hosts_of_more_memory_a_plan_is_no_slower(seed):
    """Pipelines are cut by what there is room for."""
    drawn = random.Random(seed)
    job, there = random_profile(drawn), random_linked(drawn)
    fitting: list[set[Layout]] = []
    fastest_s: list[float] = []
    for times in (1, 2, 4, 40):
        hosts = tuple(
            h.model_copy(update={"memory_bytes": times * h.memory_bytes // 4}) for h in there.cluster.hosts
        )
        target = there.model_copy(update={"cluster": Cluster(hosts=hosts)})
        forecaster = Forecaster(job, target)
        every = list(layouts(forecaster))
        fitting.append({x for x in every if forecaster.needed_bytes(x) <= room_bytes(target, x)})
        if fitting[-1]:
            fastest_s.append(search(forecaster, number=1).fastest[0].step_s)
    assert fitting[0] <= fitting[1] <= fitting[2] <= fitting[3]
    assert fastest_s == sorted(fastest_s, reverse=True)


def test_a_pipeline_is_cut_as_there_is_room():
    """Where three of four blocks on one worker are fastest over a slow link, and two and two all that fits."""
    job, layout = sending(profile((1.0,) * 4, 16), 1e6, 2e6, 1e4, 1e4), Layout(pp=2, micro=4)
    even = Forecaster(sending(job, *[1e5] * 4), linked(2, 1))
    assert even.cuts_of(layout) == (0, 2, 4)
    needed = int(even.needed_bytes(layout) / (1 - memory_margin(linked()))) + MIB
    tight, ample = linked(2, 1, worker_bytes=needed), linked(2, 1)
    assert Forecaster(job, ample).cuts_of(layout) == (0, 3, 4)
    forecaster = Forecaster(job, tight)
    assert forecaster.cuts_of(layout) == (0, 2, 4)
    assert not forecaster.has_room(layout)
    assert forecaster.needed_bytes(layout) <= room_bytes(tight, layout)
    assert forecaster.least_s(layout) <= Forecaster(job, ample).forecast(layout).step_s
    assert Forecaster(job, ample).forecast(layout).step_s < forecaster.forecast(layout).step_s
    # The same where a worker's memory is asked for, whatever its host has.
    assert Forecaster(job, ample, memory_bytes=needed).cuts_of(layout) == (0, 2, 4)
    # With no room for any cut the message is of the one that lacks least.
    with pytest.raises(LayoutError, match="no layout fits"):
        search(Forecaster(job, linked(2, 1, worker_bytes=needed // 2)))


def test_fewer_workers_have_more_of_their_hosts_memory():
    there = linked(hosts=2, per_host=4, worker_bytes=GIB)
    # Hosts are filled one after the other: six workers are four and two.
    assert [there.worker_bytes(n) // GIB for n in (1, 2, 4, 6, 8)] == [4, 2, 1, 1, 1]
    launched = there.model_copy(update={"launcher_bytes": GIB})
    assert launched.worker_bytes(1) == 3 * GIB
    gpus = tuple(host.model_copy(update={"device": "cuda"}) for host in there.cluster.hosts)
    assert there.model_copy(update={"cluster": Cluster(hosts=gpus)}).worker_bytes(1) == GIB


def test_a_job_that_only_one_process_fits_is_trained_by_one():
    """Each worker's share of the host is too little for any layout of all of them."""
    job = profile(shares_update=False)
    needed = Forecaster(job, linked()).forecast(Layout(recompute="full")).memory.own
    tight = linked(worker_bytes=int(needed / (1 - memory_margin(linked())) / 4) + 1)
    assert {f.layout.workers for f in search(Forecaster(job, tight)).fastest} == {1}


def test_what_tried_layouts_held_is_in_the_forecasts_of_their_way():
    job, there = profile(), linked()
    two, four = Layout(dp_replicate=2), Layout(dp_replicate=4)
    held = Forecaster(job, there).forecast(two).memory.total + 5 * MIB
    found = corrected(job, there, [Tried(layout=two, step_s=1.0, peak_bytes=held)])
    assert found.unexplained_bytes == {"data": 5 * MIB}
    assert Forecaster(found, there).forecast(two).memory.total == held
    assert Forecaster(found, there).forecast(four).memory.unexplained == 5 * MIB
    assert Forecaster(found, there).forecast(Layout()).memory.unexplained == 0


def test_a_pipeline_holds_what_one_of_its_kind_held():
    """That which keeps what gradients of weights need, and that which does not."""
    job, there = profile(), linked()
    whole = Layout(pp=2, micro=4)
    apart = whole.model_copy(update={"schedule": "zb-h1"})
    held = {x: Forecaster(job, there).forecast(x).memory.total + n * MIB for x, n in ((whole, 1), (apart, 5))}
    tried = [Tried(layout=x, step_s=1.0, peak_bytes=num_bytes) for x, num_bytes in held.items()]
    found = Forecaster(corrected(job, there, tried), there)
    assert {x: found.forecast(x).memory.total for x in held} == held
    # Of a kind that was not tried as much as of the other.
    one = Forecaster(corrected(job, there, tried[1:]), there)
    assert one.forecast(whole).memory.unexplained == one.forecast(apart).memory.unexplained == 5 * MIB


def test_the_worst_moment_may_be_an_evaluation():
    """Of 64 samples that hold 50 MB each, beside 10 MB whatever their number."""
    job, there = profile((1.0,) * 3, 16), linked()
    parts = {"evaluation_samples": 64, "evaluated_bytes": 5e7, "evaluation_bytes": 1e7}
    evaluating = Forecaster(job.model_copy(update=parts), there)

    def temporary(**keys: int) -> int:
        memory = evaluating.forecast(Layout(**keys)).memory
        assert memory.saved == 0
        return memory.temporary

    assert temporary() == 64 * 50_000_000 + 10_000_000
    assert evaluating.forecast(Layout()).memory.gradients == 0
    assert temporary(tp=2) == 32 * 50_000_000 + 10_000_000
    assert temporary(micro=4) == temporary(dp_replicate=2, micro=2) == 16 * 50_000_000 + 10_000_000
    # What is gathered for a block is there as well.
    assert temporary(dp_shard=4, zero=3) == 16 * 50_000_000 + 50_000_000
    # Two micro-batches of what crosses a cut are on their way.
    assert temporary(pp=2, micro=4) == 16 * 50_000_000 + 10_000_000 + 2 * 16 * 100_000
    small = Forecaster(job.model_copy(update={**parts, "evaluated_bytes": 1e3}), there)
    assert small.forecast(Layout()).memory == Forecaster(job, there).forecast(Layout()).memory


def test_evaluations_of_tried_layouts_are_in_the_forecasts_of_their_way():
    parts = {"evaluation_samples": 64, "evaluated_bytes": 5e7}
    job, there = profile().model_copy(update=parts), linked()
    two = Layout(dp_replicate=2)
    steps, evaluation = Forecaster(job, there).memories(two)
    tried = Tried(
        layout=two,
        step_s=1.0,
        peak_bytes=steps.total + MIB,
        evaluation_peak_bytes=evaluation.total + 5 * MIB,
    )
    found = corrected(job, there, [tried])
    assert found.unexplained_bytes == {"data": MIB}
    assert found.unexplained_evaluation_bytes == {"data": 5 * MIB}
    assert Forecaster(found, there).forecast(two).memory.total == evaluation.total + 5 * MIB


def test_of_what_is_computed_again_the_fastest_that_fits_is_taken():
    """Selective recomputation that takes longer than full, as where a processor has to tell a GPU what to keep."""
    job = profile(shares_update=False)
    whole = Forecaster(job, linked()).forecast(Layout()).memory.own
    slow = job.model_copy(update={"recomputed_shares": {"selective": ((16.0, 3.0),)}})
    for what, wanted in ((job, "selective"), (slow, "full")):
        forecaster = Forecaster(what, linked(hosts=1, per_host=1, worker_bytes=whole))
        found = search(forecaster, number=1000, memory_bytes=whole - 1, margin=0.0).fastest
        fits = [x for x in map(forecaster.forecast, layouts(forecaster)) if x.memory.own < whole]
        assert found[0].step_s == min(x.step_s for x in fits)
        assert [x.layout.recompute for x in found if x.layout.micro == 1] == [wanted]


def test_less_than_foreseen_may_be_held_where_something_is_computed_again():
    job, how = profile(), Layout(recompute="selective")
    foreseen = Forecaster(job, linked()).forecast(how).memory
    less = job.model_copy(update={"recomputed_bytes": {"selective": -1e5}})
    found = Forecaster(less, linked()).forecast(how).memory
    assert found.total == pytest.approx(foreseen.total - job.batch_size * 1e5)
    nothing = job.model_copy(update={"recomputed_bytes": {"selective": -1e12}})
    found = Forecaster(nothing, linked()).forecast(how).memory
    assert (found.saved, found.temporary) == (0, 0)


def test_stages_of_one_host_share_its_memory_out():
    """Four workers on the host, or two on each of two, of which the last block's stage holds more."""
    job, layout = (
        profile((1.0, 1.0, 1.0, 4.0), 16, (), shares_update=False),
        Layout(pp=2, dp_replicate=2, micro=4),
    )
    together, apart = Forecaster(job, linked(per_host=4)), Forecaster(job, linked(hosts=2, per_host=2))
    worst = together.forecast(layout).memory.own
    assert together.needed_bytes(layout) < 0.95 * worst
    assert apart.needed_bytes(layout) == apart.forecast(layout).memory.own == worst
    even = Layout(dp_replicate=4)
    assert together.needed_bytes(even) == together.forecast(even).memory.own


def test_gradients_come_while_what_was_saved_goes():
    """Three blocks of 40 MB of parameters; a sample saves 3 MB in each, and has 1 MB of temporaries."""

    def worst(samples: int, **keys: int) -> tuple[int, int, int]:
        forecaster = Forecaster(profile((1.0,) * 3, samples, ()), linked())
        memory = forecaster.forecast(Layout(**keys)).memory
        return memory.saved, memory.gradients, memory.temporary

    # Where little is saved the last moment of the backward pass is the worst, else the first.
    assert worst(4) == (12_000_000, 120_000_000, 4_000_000)
    assert worst(40) == (360_000_000, 40_000_000, 40_000_000)
    # Of a second micro-batch the first moment is the worst, as all gradients are there.
    assert worst(40, micro=2) == (180_000_000, 120_000_000, 20_000_000)


def test_sharding_keeps_a_shard_and_what_is_whole_for_a_moment():
    job, b = profile((1.0,) * 3, 16, ()), 40_000_000
    forecaster = Forecaster(job, linked())
    whole = forecaster.forecast(Layout(dp_shard=4, zero=1)).memory
    nothing = forecaster.forecast(Layout(dp_shard=4, zero=3)).memory
    assert (whole.parameters, whole.gradients, whole.state) == (3 * b, 3 * b, 2 * 3 * b // 4)
    assert (nothing.parameters, nothing.gradients) == (3 * b // 4, 3 * b // 4 + b)
    # Gathered, and its gradients end to end, beside the temporaries of four samples.
    assert nothing.temporary == 2 * b + 4_000_000


@pytest.mark.parametrize(
    ("spread", "saved", "micro"), [(0.0, 0.05, 2), (0.01, 0.05, 2), (0.03, 0.05, 1), (0.0, 0.025, 1)]
)
def test_micro_batches_that_save_less_than_measurements_can_tell_are_not_taken(spread, saved, micro):
    job = profile((1.0,) * 3, 16, ()).model_copy(update={"spread": spread})
    forecaster = Forecaster(job, linked(1, 1))
    saved_s = saved * forecaster.forecast(Layout(micro=1)).step_s
    faster = Correction(ways=("alone",), micro_s=-saved_s, micro=2)
    faster_in_two = job.model_copy(update={"corrections": (faster,)})
    plain, two = (Forecaster(faster_in_two, linked(1, 1)).forecast(Layout(micro=m)).step_s for m in (1, 2))
    assert 0.98 - saved < two / plain < 1.01 - saved
    found = search(Forecaster(faster_in_two, linked(1, 1)), number=5).fastest
    assert found[0].layout.micro == micro
    assert {1, 2} <= {x.layout.micro for x in found}
    # Where memory asks for two, two it is.
    most = Forecaster(faster_in_two, linked(1, 1)).forecast(Layout(micro=1)).memory.own - 1
    tight = search(Forecaster(faster_in_two, linked(1, 1)), number=1, memory_bytes=most, margin=0.0).fastest[
        0
    ]
    assert tight.layout.micro > 1
