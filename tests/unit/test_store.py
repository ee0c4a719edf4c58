"""What is kept between runs."""

from __future__ import annotations

import time

import pytest

from paceline.measure import store


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_profile_is_found_under_the_same_job_options_and_machine_only(tmp_path):
    job = tmp_path / "job.py"
    job.write_text("job = 1")
    key = store.key_of(job, {"width": 8}, {"cores": 2})
    assert store.kept(key) is None
    store.keep(key, [{"a": 1}, {"b": 2.5}])
    assert store.kept(key) == [{"a": 1}, {"b": 2.5}]
    assert store.key_of(job, {"width": 8}, {"cores": 2}) == key
    assert store.key_of(job, {"width": 9}, {"cores": 2}) != key
    assert store.key_of(job, {"width": 8}, {"cores": 4}) != key
    job.write_text("job = 2")
    assert store.key_of(job, {"width": 8}, {"cores": 2}) != key


def test_what_is_old_or_broken_is_measured_again(cache, monkeypatch):
    store.keep("key", [1])
    now_s = time.time()
    monkeypatch.setattr(store.time, "time", lambda: now_s + store.KEPT_FOR_S + 1)
    assert store.kept("key") is None
    monkeypatch.undo()
    monkeypatch.setenv(store.VARIABLE, str(cache))
    (cache / "profiles" / "key.json").write_text('{"time": 1')
    assert store.kept("key") is None


def test_the_error_of_past_forecasts_holds_two_thirds_of_them_once_there_are_enough(cache):
    assert store.past_error() == 0.1
    for measured_s in (1.0, 1.02, 0.98, 1.5):
        store.note_forecast(1.0, measured_s, job="j")
    assert store.past_error() == 0.1
    store.note_forecast(1.0, 1.0)
    assert store.past_error() == pytest.approx(1 / 0.98 - 1)
    (cache / "forecasts.jsonl").write_text("no json")
    assert store.past_error() == 0.1


def test_a_cache_that_cannot_be_written_is_done_without(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "file" / "below"))
    store.keep("key", [1])
    store.note_forecast(1.0, 1.0)
    assert store.kept("key") is None
    assert store.past_error() == 0.1


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.delenv(store.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.directory() == tmp_path / "paceline"
