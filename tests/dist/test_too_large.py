"""Jobs whose model is too large for a worker: measured block by block, and trained in a layout that splits them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from command import ENVIRONMENT, of_kind, read_events

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parents[1] / "benchmarks"))

from box import Box, BoxHost
from box_limits import BoxError, this_hierarchy
from box_namespaces import require_root
from box_processes import require_success

from paceline.comm.world import listen_on_loopback
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import LinkedCluster, Profile
from paceline.plan.search import layouts
from paceline.records import Layout

MIB = 1 << 20


def measured(folder: Path, job: str, why: str, *, workers: int = 1) -> tuple[Profile, LinkedCluster]:
    """In processes of their own, as memory is what these hold at most."""
    folder.mkdir()
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    script = [str(HERE / "in_blocks_worker.py"), str(folder), job, why]
    command = [sys.executable, *(torchrun if workers > 1 else []), *script]
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=200, env=ENVIRONMENT, check=False
    )
    assert process.returncode == 0, process.stderr
    profile, linked = (json.loads((folder / f"{name}.json").read_text()) for name in ("profile", "cluster"))
    return Profile.from_json(profile), LinkedCluster.from_json(linked)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_in_blocks_a_job_is_found_to_hold_what_it_holds_whole(tmp_path):
    whole, linked = measured(tmp_path / "whole", "gpt", "")
    blocks, linked_too = measured(tmp_path / "blocks", "gpt", "a test asks for it")
    assert (whole.how_measured, blocks.how_measured) == (
        "",
        "The model was measured block by block, as a test asks for it.",
    )
    row, other = whole.costs[0].model, blocks.costs[0].model
    assert [block.name for block in row] == [block.name for block in other]
    for what in ("parameter_bytes", "trained_bytes", "saved_bytes", "output_bytes", "flops"):
        assert [getattr(b, what) for b in row] == [getattr(b, what) for b in other], what
    assert blocks.costs[0].crossing_bytes == whole.costs[0].crossing_bytes
    assert blocks.state_per_byte == pytest.approx(whole.state_per_byte, rel=0.01)
    assert blocks.shares_update == whole.shares_update
    trained = sum(block.trained_bytes for block in row)
    assert trained > 50 * MIB
    for text in ("micro=1,threads=1", "micro=4,threads=1"):
        layout = Layout.parse(text)
        totals = [
            Forecaster(p, there).forecast(layout).memory.total
            for p, there in ((whole, linked), (blocks, linked_too))
        ]
        # Whole steps hold some 20 MiB of half a gigabyte more than their blocks tell (docs/log.md).
        assert totals[1] == pytest.approx(totals[0], rel=0.08)


def check_cuts(folder: Path, forecaster: Forecaster) -> None:
    """What was measured says where the training cuts a pipeline."""
    cuts = forecaster.cuts_of(Layout(pp=2, micro=2, threads=1))
    assert len(cuts) == 3
    assert json.loads((folder / "cuts.json").read_text()) == list(cuts)


def test_two_workers_measure_blocks_at_once_with_their_statistics_and_their_parts(tmp_path):
    profile, linked = measured(tmp_path / "found", "normed", "a test asks for it", workers=2)
    assert [costs.active for costs in profile.costs] == [1, 2]
    alone, together = profile.costs
    with_norm = [block for block in together.model if block.statistics]
    assert with_norm
    assert all(block.forward_among_s is not None for block in with_norm)
    assert not any(block.forward_among_s for block in alone.model)
    assert {d.tp for block in together.model for d in block.divisions} == {2}
    divided = [d.parameter_bytes for block in together.model for d in block.divisions]
    assert 0.5 <= sum(divided) / sum(block.parameter_bytes for block in together.model) < 0.7
    # One layout of each way of splitting was tried, as all of them fit.
    assert {str(one.layout).partition(",")[0] for one in profile.tried} >= {
        "dp_replicate=2",
        "dp_shard=2",
        "pp=2",
        "tp=2",
    }
    assert all(one.peak_bytes is None or one.peak_bytes > profile.base_bytes for one in profile.tried)
    assert linked.cluster.workers == 2
    check_cuts(tmp_path / "found", Forecaster(profile, linked))


def test_four_workers_of_a_host_divide_blocks_by_four_and_by_two(tmp_path):
    profile, linked = measured(tmp_path / "found", "normed", "", workers=4)
    alone, together = profile.costs
    assert {d.tp for block in together.model for d in block.divisions} == {2, 4}
    bytes_of = {tp: sum(block.divided(tp).parameter_bytes for block in together.model) for tp in (1, 2, 4)}
    assert bytes_of[4] < bytes_of[2] < bytes_of[1]
    # Fewer workers at once are as much quicker with divided blocks as with whole ones.
    faster = {
        tp: sum(block.divided(tp).forward_s(16) for block in alone.model)
        / sum(block.divided(tp).forward_s(16) for block in together.model)
        for tp in (2, 4)
    }
    assert faster[2] == pytest.approx(faster[4])
    divided = {(one.layout.tp, one.layout.dp_replicate) for one in profile.tried if one.layout.tp > 1}
    assert divided == {(4, 1), (2, 2)}
    forecaster = Forecaster(profile, linked)
    assert {layout.tp for layout in layouts(forecaster)} == {1, 2, 4}
    assert forecaster.forecast(Layout(tp=2, pp=2, micro=4, threads=1)).terms.tensor_s > 0


def test_hosts_of_one_worker_each_divide_blocks_among_them(tmp_path):
    """Two processes that are told that they are on two hosts; whole and in blocks."""
    for folder, why in ((tmp_path / "whole", ""), (tmp_path / "blocks", "a test asks for it")):
        folder.mkdir()
        with listen_on_loopback(0) as listener:
            port = str(listener.getsockname()[1])
        places = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "GLOO_SOCKET_IFNAME": "lo"}
        command = [sys.executable, str(HERE / "in_blocks_worker.py"), str(folder), "normed", why]
        started = [
            subprocess.Popen(
                command,
                stderr=subprocess.PIPE,
                text=True,
                env={**ENVIRONMENT, **places, "RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port},
            )
            for rank in range(2)
        ]
        said = [process.communicate(timeout=200)[1] for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        profile, linked = (json.loads((folder / f"{name}.json").read_text()) for name in ("profile", "cluster"))
        forecaster = Forecaster(Profile.from_json(profile), LinkedCluster.from_json(linked))
        assert len(forecaster.linked.cluster.hosts) == 2
        layout = Layout(tp=2, threads=1)
        assert layout in {one.layout for one in forecaster.profile.tried}
        assert forecaster.forecast(layout).terms.tensor_s > 0
        assert layout in set(layouts(forecaster))
        check_cuts(folder, forecaster)


@pytest.fixture
def two_small_hosts():
    """Each has less than the job's parameters, gradients and Adam's moments take."""
    try:
        require_root(delayed=False)
        this_hierarchy()
    except BoxError as error:
        pytest.skip(f"NO CLUSTER IN A BOX HERE: {error}")
    with Box([BoxHost(memory_bytes=1000 * MIB)] * 2) as box:
        yield box


@pytest.mark.netns
@pytest.mark.timeout(600)
def test_a_model_that_fits_no_worker_is_planned_and_trained_over_two(two_small_hosts, tmp_path):
    train = [sys.executable, "-m", "paceline", "train", str(HERE / "large_job.py"), "--layout=auto"]
    environment = {"PACELINE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    ended = two_small_hosts.start_workers(
        [*train, f"--out={tmp_path / 'run'}"], timeout_s=560, environment=environment
    )
    require_success(ended)
    assert not any(end.killed_for_memory for end in ended)
    events = read_events(tmp_path / "run")
    state_bytes = 16 * of_kind(events, "model")[0]["parameters"]
    assert state_bytes > 1000 * MIB
    told = [message["text"] for message in of_kind(events, "message")]
    assert any(text.startswith("The model was measured block by block, as training the whole") for text in told)
    refused = next(text for text in told if text.startswith("Not timed, as there is no room for them"))
    assert "dp_replicate=1" in refused
    assert "dp_replicate=2" in refused
    assert any("The layout was not proven: it takes about" in text for text in told)
    layout = Layout.from_json(of_kind(events, "plan")[0]["layout"])
    assert layout.workers == 2
    assert layout.splits_model
    timed = [Layout.from_json(trial["layout"]) for trial in of_kind(events, "trial")]
    assert all(one.splits_model for one in timed)
    assert of_kind(events, "end")[0]["status"] == "finished"
    assert len(of_kind(events, "step")) == 4
