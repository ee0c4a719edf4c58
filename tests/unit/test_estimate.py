"""What was measured here, scaled to a described cluster."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from planning_examples import CABLE, GIB, MEMORY, linked, profile

from paceline.errors import ClusterError
from paceline.plan.curves import Curve
from paceline.plan.described import DescribedCluster, DescribedHost
from paceline.plan.estimate import GPU_BASE_BYTES, GPU_ERROR, LAUNCH_S, estimate
from paceline.plan.forecast import Forecaster
from paceline.plan.kept import check_fits, read_kept
from paceline.plan.links import Link, Placement, seconds
from paceline.plan.presets import DEVICES, INTERCONNECTS, Device
from paceline.plan.profile import Correction, LinkedCluster, Profile, Tried
from paceline.plan.search import layouts, search
from paceline.records import Layout

HERE = linked(1, 2)


def measured(*, flops: float = 6e7, operations: int = 10) -> Profile:
    """Of a machine with 1e11 FLOP/s: 0.6 of the ms that a sample takes forward in each block are products."""
    found = profile(tps=(2,))
    (costs,) = found.costs
    blocks = tuple(
        block.model_copy(update={"flops": flops * block.forward_s(1) / 1.1e-3, "operations": operations})
        for block in costs.blocks
    )
    return found.model_copy(
        update={"costs": (costs.model_copy(update={"blocks": blocks, "product_flops_per_s": 1e11}),)}
    )


def host(name: str = "a", **changes: Any) -> DescribedHost:
    plain = DescribedHost(
        name=name,
        workers=2,
        cores=2,
        memory_bytes=32 * GIB,
        device=None,
        speed=None,
        precision="fp32",
        efficiency=1.0,
        within=None,
        between=CABLE,
    )
    return plain.model_copy(update=changes)


def cluster(*hosts: DescribedHost) -> DescribedCluster:
    return DescribedCluster(name="a test's", hosts=hosts, sources=("CABLE: as drawn",))


def gpu(**changes: Any) -> Device:
    plain = Device(
        name="chip",
        memory_bytes=80 * GIB,
        flops_per_s={"bf16": 1e14},
        memory_bytes_per_s=1e12,
        source="drawn",
    )
    return plain.model_copy(update=changes)


def corrections(action_s: float, step_s: float) -> tuple[Correction, ...]:
    return Correction(ways=("pipeline",), action_s=action_s), Correction(ways=("data",), step_s=step_s)


def on_gpus(device: Device, **changes: Any) -> DescribedHost:
    return host(device=device, precision="bf16", within=INTERCONNECTS["nvlink4"].link, **changes)


def test_the_machine_that_measured_described_gives_its_own_forecasts():
    job = measured()
    job = job.model_copy(update={"corrections": corrections(1e-3, 2e-3)})
    found = estimate(job, HERE, cluster(host()))
    assert found.profile == job
    own, other = Forecaster(job, HERE), Forecaster(found.profile, found.linked)
    for layout in layouts(own):
        assert own.forecast(layout) == other.forecast(layout)


@settings(max_examples=12, deadline=None)
@given(speeds=st.lists(st.floats(0.1, 100.0), min_size=1, max_size=3))
def test_doubling_all_speeds_halves_computation(speeds):
    def forecaster(factor: float) -> Forecaster:
        hosts = [host(f"h{n}", speed=factor * speed) for n, speed in enumerate(speeds)]
        found = estimate(measured(), HERE, cluster(*hosts))
        return Forecaster(found.profile, found.linked)

    one, two = forecaster(1.0), forecaster(2.0)
    for layout in list(layouts(one))[::7]:
        slow, fast = one.forecast(layout).terms, two.forecast(layout).terms
        if layout.pp == 1:
            # Exchanges are not halved: another worker of a pipeline may be the busiest.
            assert fast.compute_s == pytest.approx(slow.compute_s / 2)
            assert fast.optimizer_s == pytest.approx(slow.optimizer_s / 2)
        assert fast.data_s == pytest.approx(slow.data_s / 2)
        assert fast.step_s <= slow.step_s


@settings(max_examples=25, deadline=None)
@given(
    flops=st.floats(1e12, 1e16),
    bandwidth=st.floats(1e11, 1e13),
    share=st.floats(0, 1.2),
    operations=st.integers(0, 1000),
)
def test_doubling_a_gpu_halves_computation_down_to_what_launching_takes(flops, bandwidth, share, operations):
    job = measured(flops=share * 1e8, operations=operations)

    def step(factor: float) -> float:
        device = gpu(flops_per_s={"bf16": flops * factor}, memory_bytes_per_s=bandwidth * factor)
        found = estimate(job, None, cluster(on_gpus(device, workers=1)))
        return Forecaster(found.profile, found.linked).forecast(Layout(threads=1)).terms.compute_s

    slow, fast = step(1.0), step(2.0)
    launching_s = 3 * operations * LAUNCH_S * len(job.costs[0].model)
    assert slow / 2 * (1 - 1e-9) <= fast <= slow * (1 + 1e-9)
    assert fast >= launching_s * (1 - 1e-9)
    if operations == 0:
        assert fast == pytest.approx(slow / 2)


def test_products_go_by_operations_and_the_rest_by_bandwidth():
    found = estimate(measured(operations=0), None, cluster(on_gpus(gpu(), workers=1)))
    (costs,) = found.profile.costs
    # 1e14 of 1e11 FLOP/s; an addition of a byte takes 5e-11 s, which is 6e10 of 1e12 bytes/s.
    forward_s = costs.blocks[1].forward_s
    per_sample_s, fixed_s = forward_s(2.0) - forward_s(1.0), forward_s(0.0)
    products_s = 6e7 / 1e11
    assert per_sample_s == pytest.approx(products_s * 1e-3 + (1e-3 - products_s) * 0.06)
    assert fixed_s == pytest.approx(1e-4 * 0.06)
    assert costs.optimizer_s_per_byte == pytest.approx(1e-10 * 0.06)
    assert costs.fixed_s == measured().costs[0].fixed_s
    assert found.profile.device == "cuda"
    # Half of the products and of the operations are in each half of a block.
    division = costs.blocks[1].divisions[0]
    whole = measured().costs[0].blocks[1].divisions[0].forward_s
    slope_s = whole(2.0) - whole(1.0)
    assert division.forward_s(2.0) - division.forward_s(1.0) == pytest.approx(
        products_s / 2 * 1e-3 + (slope_s - products_s / 2) * 0.06
    )


def test_the_example_in_the_documentation_is_right():
    """docs/clusters.md computes these numbers by hand."""
    job = measured()
    (costs,) = job.costs
    forward_s = costs.blocks[0].forward_s.model_copy(update={"points": ((8.0, 10e-3),)})
    block = costs.blocks[0].model_copy(update={"forward_s": forward_s, "flops": 5e7, "operations": 0})
    costs = costs.model_copy(update={"blocks": (block,), "row": (), "add_s_per_byte": 3 / 20e9})
    job = job.model_copy(update={"costs": (costs,)})
    there = cluster(on_gpus(DEVICES["a100-80gb"], efficiency=0.7))
    assert estimate(job, None, there).profile.costs[0].blocks[0].forward_s(8.0) == pytest.approx(
        0.086e-3, rel=0.01
    )
    block = block.model_copy(update={"operations": 40})
    job = job.model_copy(update={"costs": (costs.model_copy(update={"blocks": (block,)}),)})
    assert estimate(job, None, there).profile.costs[0].blocks[0].forward_s(8.0) == pytest.approx(0.2e-3)


def test_what_trials_have_shown_is_of_cores_alone():
    tried = (Tried(layout=Layout(dp_replicate=2), step_s=1.0),)
    update = {"corrections": corrections(1e-3, -2e-3), "tried": tried, "past_error": 0.05}
    job = measured().model_copy(update=update)
    cores = estimate(job, HERE, cluster(host(speed=2.0))).profile
    assert (cores.corrections, cores.tried) == (corrections(5e-4, -1e-3), ())
    assert cores.past_error == 0.05
    gpus = estimate(job, HERE, cluster(on_gpus(gpu()))).profile
    assert (gpus.corrections, gpus.past_error) == ((), GPU_ERROR)


def test_without_a_bandwidth_all_goes_by_operations_and_half_of_the_peak_is_half():
    costs = [
        estimate(
            measured(operations=0), None, cluster(on_gpus(gpu(memory_bytes_per_s=None), efficiency=share))
        )
        .profile.costs[0]
        .blocks[1]
        .forward_s(3.0)
        for share in (1.0, 0.5)
    ]
    assert costs == pytest.approx([3.1e-3 * 1e-3, 2 * 3.1e-3 * 1e-3])


def test_an_operation_takes_its_time_on_a_gpu():
    found = estimate(measured(operations=10_000), None, cluster(on_gpus(gpu(), workers=1)))
    block = found.profile.costs[0].blocks[1]
    assert block.forward_s(1.0) == pytest.approx(10_000 * LAUNCH_S)
    assert block.backward_s(1.0) == pytest.approx(2 * 10_000 * LAUNCH_S)


def test_a_gpu_is_held_against_the_fastest_single_worker_here():
    job = measured(operations=0)
    (one,) = job.costs

    def slower(factor: float, **changes: int):
        blocks = tuple(
            b.model_copy(
                update={n: getattr(b, n).scaled(factor) for n in ("forward_s", "backward_s")}
                | {"divisions": ()}
            )
            for b in one.blocks
        )
        return one.model_copy(update={"blocks": blocks, **changes})

    several = (slower(1.0), slower(0.6, threads=2), slower(0.8, threads=4), slower(0.3, active=2))
    found = estimate(job.model_copy(update={"costs": several}), None, cluster(on_gpus(gpu(), speed=10.0)))
    (costs,) = found.profile.costs
    assert costs.blocks[1].forward_s(1.0) == pytest.approx(0.06 * one.blocks[1].forward_s(1.0))
    assert (costs.threads, costs.active) == (1, 1)


def test_unequal_devices_wait_for_the_slowest_that_is_used():
    fast, slow = (
        on_gpus(gpu()),
        on_gpus(gpu(flops_per_s={"bf16": 2.5e13}, memory_bytes_per_s=2.5e11), name="b"),
    )
    job = measured(operations=0)
    both = estimate(job, None, cluster(fast, slow))
    assert both.linked.speeds == pytest.approx((1.0, 0.25))
    forecaster = Forecaster(both.profile, both.linked)
    two, four = (forecaster.forecast(Layout(dp_replicate=n, threads=1)) for n in (2, 4))
    assert four.terms.compute_s > 1.9 * two.terms.compute_s
    alone = estimate(job, None, cluster(slow))
    same = Forecaster(alone.profile, alone.linked).forecast(Layout(dp_replicate=2, threads=1))
    assert same.terms.compute_s == pytest.approx(4 * two.terms.compute_s)


links = st.builds(
    Link,
    name=st.just("drawn"),
    latency_s=st.floats(0, 1e-3),
    bytes_per_s=st.floats(1e7, 1e11),
    is_shared=st.booleans(),
    cables=st.integers(1, 4),
)


@settings(max_examples=12, deadline=None)
@given(
    within=st.lists(links, min_size=3, max_size=3),
    between=st.lists(links, min_size=3, max_size=3),
    at=st.integers(0, 2),
    which=st.sampled_from(["within", "between"]),
    faster=st.sampled_from([{"bytes_per_s": 3.0}, {"latency_s": 0.3}, {"cables": 2}]),
)
def test_a_faster_link_of_one_host_makes_nothing_slower(within, between, at, which, faster):
    hosts = [host(f"h{n}", within=within[n], between=between[n]) for n in range(3)]
    link = getattr(hosts[at], which)
    better = link.model_copy(update={key: getattr(link, key) * factor for key, factor in faster.items()})
    changed = [*hosts]
    changed[at] = hosts[at].model_copy(update={which: better})
    slow, fast = (
        Forecaster(found.profile, found.linked)
        for found in (estimate(measured(), HERE, cluster(*some)) for some in (hosts, changed))
    )
    for layout in list(layouts(slow))[::12]:
        assert fast.forecast(layout).step_s <= slow.forecast(layout).step_s * (1 + 1e-9), layout
        assert fast.floor_s(layout) <= fast.least_s(layout) * (1 + 1e-9)
        assert fast.least_s(layout) <= fast.forecast(layout).step_s * (1 + 1e-9)


def test_a_slow_cable_counts_as_soon_as_its_host_is_used():
    slow = CABLE.model_copy(update={"bytes_per_s": CABLE.bytes_per_s / 10})
    hosts = host("a"), host("b"), host("c", between=slow)
    even = estimate(measured(), HERE, cluster(host("a"), host("b"), host("c")))
    uneven = estimate(measured(), HERE, cluster(*hosts))
    assert uneven.linked.has_unequal_links
    assert not even.linked.has_unequal_links
    four, six = (Layout(dp_replicate=n, threads=1) for n in (4, 6))
    job = measured().model_copy(update={"batch_size": 12})
    times = [
        [Forecaster(job, found.linked).forecast(layout).step_s for layout in (four, six)]
        for found in (even, uneven)
    ]
    assert times[0][0] == times[1][0]
    assert times[1][1] > 1.5 * times[0][1]


@settings(max_examples=30, deadline=None)
@given(sharing=st.integers(1, 8), cables=st.integers(1, 8), link=links)
def test_cables_are_shared_out(sharing, cables, link):
    assume(link.latency_s < 1e-4)
    one = link.model_copy(update={"cables": cables})
    place = Placement(hosts=2, per_host=1, beside=sharing)
    found = seconds(MEMORY, one, "all-reduce", place, 1e7)
    assert found == pytest.approx(link.seconds("all-reduce", 2, 1e7 * max(1.0, sharing / cables)))


def test_what_the_numbers_rest_on_is_said():
    hosts = [on_gpus(DEVICES["a100-80gb"], name=f"dgx{n}", efficiency=0.7) for n in range(2)]
    notes = "\n".join(estimate(measured(), None, cluster(*hosts)).notes)
    assert "Estimated, not measured: a test's (2 hosts, 4 workers)" in notes
    assert "dgx0 to dgx1: A100 SXM4 80 GB computes products of matrices 2,184 times as fast as here" in notes
    assert "70% of its 312 TFLOP/s in bf16 are assumed, and 100 GFLOP/s were measured here" in notes
    assert "CABLE: as drawn." in notes
    assert "are taken as here" in notes
    plain = "\n".join(estimate(measured(), HERE, cluster(host(cores=8))).notes)
    assert "the file gives no speed" in plain
    assert "Workers have at most 1 threads" in plain


def test_what_was_not_measured_here_is_asked_for():
    with pytest.raises(ClusterError, match=r"how fast chip .*cannot be told"):
        estimate(profile(), None, cluster(on_gpus(gpu())))
    assert estimate(profile(), None, cluster(on_gpus(gpu(), speed=8.0))).profile.costs[0].optimizer_s_per_byte
    with pytest.raises(ClusterError, match="2 workers and no link within, and none was measured"):
        estimate(measured(), None, cluster(host()))
    with pytest.raises(ClusterError, match="no link within"):
        estimate(measured(), linked(1, 1), cluster(host()))
    assert estimate(measured(), None, cluster(host(workers=1))).linked.within.name == "none"


def test_eight_hosts_of_eight_gpus_are_searched():
    hosts = [on_gpus(DEVICES["a100-80gb"], name=f"dgx{n}", workers=8) for n in range(8)]
    found = estimate(measured().model_copy(update={"batch_size": 512}), None, cluster(*hosts))
    best = search(Forecaster(found.profile, found.linked), number=1).fastest[0]
    assert best.layout.workers > 1
    assert best.memory.base == GPU_BASE_BYTES


def test_what_was_kept_is_read_and_held_against_the_job(tmp_path):
    job = measured()
    (tmp_path / "profile.json").write_text(json.dumps(job.to_json()))
    assert read_kept(tmp_path) == (job, None)
    (tmp_path / "cluster.json").write_text(json.dumps(HERE.to_json()))
    kept, here = read_kept(tmp_path / "profile.json")
    assert kept == job
    assert isinstance(here, LinkedCluster)
    assert here == HERE
    check_fits(job, tmp_path, "a test", 16)
    with pytest.raises(ClusterError, match="was measured with batch_size 16, and this is 32"):
        check_fits(job, tmp_path, "a test", 32)
    with pytest.raises(ClusterError, match="was measured with job a test, and this is other"):
        check_fits(job, tmp_path, "other", 16)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is no profile"),
        ('{"job": 1}', "is no profile"),
        ("[]", "is no profile"),
    ],
)
def test_what_is_no_profile_is_refused(tmp_path, text, words):
    if text is not None:
        (tmp_path / "profile.json").write_text(text)
    with pytest.raises(ClusterError, match=words):
        read_kept(tmp_path)


def test_a_curve_can_be_kept_from_falling_below_something():
    bent, line, flat, one = (
        ((2.0, 1.0), (4.0, 3.0), (8.0, 4.0)),
        ((0.0, 1.0), (1.0, 2.0)),
        ((0.0, 1.0),),
        ((2.0, 3.0),),
    )
    for curve, least in itertools.product(
        map(Curve.of, map(dict, (bent, line, flat, one))), (0.0, 0.5, 2.0, 3.5, 20.0)
    ):
        held = curve.at_least(least)
        for size in (0.0, 1.0, 1.3, 2.0, 2.9, 3.5, 5.0, 7.7, 8.0, 11.0, 32.0):
            assert held(size) == pytest.approx(max(least, curve(size))), (least, size)


def test_a_changed_copy_of_a_record_forgets_what_was_derived_from_the_old():
    (costs,) = profile((1.0, 2.0)).costs
    assert len(costs.model) == 2
    assert len(costs.model_copy(update={"row": (0, 1, 1)}).model) == 3
    there = linked(2, 2)
    assert (there.per_host, there.links_of(0)) == (2, ((MEMORY, CABLE),))
    changed = there.model_copy(update={"between": MEMORY, "cluster": linked(2, 4).cluster})
    assert (changed.per_host, changed.links_of(0)) == (4, ((MEMORY, MEMORY),))
    assert costs.model_copy() == costs
