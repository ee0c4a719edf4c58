from __future__ import annotations

import dataclasses

import pytest

from paceline.errors import RunError
from paceline.job import Job
from paceline.train.target import Length, Target, plan_length

job = Job(
    model=lambda: None,
    data=lambda split: None,
    loss=lambda outputs, batch: None,
    optimizer=lambda params: None,
    batch_size=4,
    metrics={"accuracy": lambda outputs, batch: None},
)


@pytest.mark.parametrize(
    ("text", "first", "now", "reached"),
    [
        ("loss=1.5", 4.0, 1.6, False),
        ("loss=1.5", 4.0, 1.5, True),
        ("accuracy=0.9", 0.1, 0.89, False),
        ("accuracy=0.9", 0.1, 0.91, True),
        ("accuracy=0.9", 0.95, 0.93, False),
    ],
)
def test_a_target_is_reached_from_the_side_where_the_metric_began(text, first, now, reached):
    assert Target.parse(text, job).reached(first, now) is reached


def test_an_unknown_metric_names_the_known_ones():
    with pytest.raises(RunError, match="no metric 'acuracy'") as caught:
        Target.parse("acuracy=0.9", job)
    assert "loss, accuracy" in caught.value.next_step


@pytest.mark.parametrize("text", ["loss", "loss=", "loss=low", "loss=nan"])
def test_a_target_without_a_number_is_refused(text):
    with pytest.raises(RunError, match="has no number"):
        Target.parse(text, job)


def test_the_command_line_wins_over_the_job_and_steps_over_epochs():
    timed = dataclasses.replace(job, epochs=3)
    assert plan_length(timed, steps=None, epochs=None, batches_per_epoch=10) == Length(30, 3)
    assert plan_length(timed, steps=7, epochs=None, batches_per_epoch=10) == Length(7, None)
    assert plan_length(timed, steps=None, epochs=2, batches_per_epoch=10) == Length(20, 2)
    assert plan_length(timed, steps=None, epochs=2, batches_per_epoch=None) == Length(None, 2)
    assert (
        plan_length(dataclasses.replace(timed, steps=5), steps=None, epochs=None, batches_per_epoch=1).steps
        == 5
    )


def test_no_length_is_an_error():
    with pytest.raises(RunError, match="no length") as caught:
        plan_length(job, steps=None, epochs=None, batches_per_epoch=10)
    assert "--steps or --epochs" in caught.value.next_step


def test_a_length_below_one_is_refused():
    with pytest.raises(RunError, match="--steps is 0"):
        plan_length(job, steps=0, epochs=None, batches_per_epoch=10)
