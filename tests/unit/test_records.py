from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from paceline.errors import LayoutError
from paceline.records import SCHEDULE_NAMES, Cluster, Host, Layout, Plan, Trial

layouts = st.builds(
    Layout, dp_replicate=st.integers(1, 64), micro=st.integers(1, 8), threads=st.none() | st.integers(1, 9)
)
split_layouts = st.builds(
    Layout,
    pp=st.integers(2, 8),
    dp_replicate=st.integers(1, 4),
    dp_shard=st.integers(2, 8),
    tp=st.integers(1, 8),
    schedule=st.sampled_from(SCHEDULE_NAMES),
    stages=st.none() | st.integers(1, 4),
    zero=st.sampled_from([None, 1, 2]),
)


@given(layouts | split_layouts)
def test_a_layout_reads_back_from_its_text_and_its_json(layout):
    assert Layout.parse(str(layout)) == layout
    assert Layout.from_json(layout.to_json()) == layout


def test_an_empty_layout_says_what_to_give():
    with pytest.raises(LayoutError, match="is empty") as caught:
        Layout.parse("")
    assert "auto" in caught.value.next_step


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dp=2", "unknown key 'dp'"),
        ("dp_replicat=2", "perhaps 'dp_replicate' was meant"),
        ("dp_replicate=0", "dp_replicate is '0'"),
        ("dp_replicate=two", "dp_replicate is 'two'"),
        ("dp_replicate", "dp_replicate is ''"),
        ("dp_replicate=2,dp_replicate=2", "twice"),
        ("cp=2", "cp=2 cannot be trained by this version"),
        ("dp_replicate=2,ep=4", "ep=4 cannot be trained by this version"),
        ("pp=2,schedule=1f2b", "perhaps '1f1b' was meant"),
        ("tp=2,schedule=gpipe", "gives schedule, and pp is 1"),
        ("dp_replicate=2,zero=1", "gives zero, and dp_shard is 1"),
        ("dp_shard=2,zero=4", "zero is 4"),
        ("pp=2,dp_shard=2,zero=3", "zero=3 in a pipeline"),
        ("pp=2,schedule=zbv,recompute=full", "schedule=zbv with recompute=full"),
        ("tp=2,recompute=some", "use one of none, selective, full"),
    ],
)
def test_a_layout_that_cannot_be_is_refused_in_words(text, words):
    with pytest.raises(LayoutError) as caught:
        Layout.parse(text)
    assert words in str(caught.value)
    assert caught.value.next_step


@given(layout=layouts, batch_size=st.integers(1, 1000))
def test_the_batch_sizes_that_are_suggested_work(layout, batch_size):
    try:
        layout.check_batch(batch_size)
    except LayoutError as error:
        assert batch_size % (layout.dp_replicate * layout.micro)
        words = error.next_step.replace(",", "").split()
        numbers = [int(w) for w in words if w.isdecimal()]
        assert numbers
        for number in numbers:
            layout.check_batch(number)
        assert min(abs(n - batch_size) for n in numbers) < layout.dp_replicate * layout.micro
    else:
        assert batch_size % (layout.dp_replicate * layout.micro) == 0


def test_records_are_frozen_and_refuse_unknown_fields():
    layout = Layout(dp_replicate=2)
    with pytest.raises(ValidationError):
        layout.micro = 2  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Layout.from_json({"dp": 2})


def test_a_plan_survives_json():
    host = Host(name="a", device="cpu", device_name="x", cores=2, memory_bytes=1, workers=2)
    assert Cluster.from_json(Cluster(hosts=(host,)).to_json()).workers == 2
    trial = Trial(layout=Layout(), label="one", workers=1, threads=1, step_s=(0.1, 0.2))
    plan = Plan(layout=Layout(), label="one", reason="r", chosen_by="trial", trials=(trial,))
    assert Plan.from_json(plan.to_json()) == plan
