"""The gradient noise scale of a run in words, and lent to a plan."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from paceline.errors import RunError
from paceline.report.markup import text
from paceline.report.noise import KnownNoise, known_noise, noise_sentence
from paceline.report.page import render
from paceline.report.reader import read_log
from paceline.report.summary import print_summary


def noise_event(**changes):
    return {
        "event": "noise", "time_s": 1.0, "step": 390, "samples": 64, "parts": 2, "squared_gradient": 0.02, "trace": 3.1,
        "noise_scale": 192.4, "low": 121.0, "high": 311.0, "measurements": 65, "every": 10, "cost_s": 0.001, **changes,
    }  # fmt: skip


@pytest.fixture
def write_noise(write_run, run_events):
    """A run with these events of noise: the path of its events."""
    return lambda *events: write_run([run_events("one_step")[0], *events])


def test_a_sentence_says_what_the_batch_size_makes_of_it(write_noise):
    log = read_log(write_noise(noise_event(noise_scale=900.0), noise_event()))
    assert noise_sentence(log) == (
        "The gradient noise scale, which is the critical batch size, is 192 samples (95 %: 120 to 310; "
        "65 measurements). With batches of 64, 75 % of the samples' worth is used: a target takes 1.33× the fewest "
        "samples and 4.01× the fewest steps. Batches of 128 would take 0.62× the steps and 1.25× the samples."
    )
    assert text(noise_sentence(log)) in render(log)
    console = Console(file=io.StringIO(), width=400)
    print_summary(console, log)
    assert "is 192 samples" in console.file.getvalue()


def test_what_is_lost_in_noise_is_said_and_what_was_not_measured_is_not(write_noise):
    unknown = read_log(write_noise(noise_event(noise_scale=None, low=None, high=None)))
    assert "is not known: in 65 measurements" in noise_sentence(unknown)
    assert noise_sentence(read_log(write_noise())) == ""
    assert "Batch size" not in render(read_log(write_noise()))


def test_a_run_lends_its_noise_scale_to_a_plan(write_noise):
    directory = write_noise(noise_event()).parent
    known = known_noise(directory, "shakespeare")
    assert known.samples == 192.4
    assert known.source == f"95 %: 120 to 310, from {directory}, step 390"
    assert known_noise(12.0, "any") == KnownNoise(12.0)
    assert known_noise(None, "any") is None


@pytest.mark.parametrize(
    ("events", "job", "words"),
    [
        ([noise_event()], "image", "has trained 'shakespeare', and this is 'image'"),
        ([], "shakespeare", "has measured no gradient noise scale"),
        ([noise_event(noise_scale=None)], "shakespeare", "could not tell its gradient noise scale"),
    ],
)  # fmt: skip
def test_a_run_that_cannot_lend_it_says_why(write_noise, events, job, words):
    with pytest.raises(RunError, match="Next step: ") as caught:
        known_noise(write_noise(*events).parent, job)
    assert words in str(caught.value)
