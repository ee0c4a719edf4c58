"""Under which name what was measured of a job is kept."""

from pathlib import Path
from types import SimpleNamespace

import pytest
from pydantic import create_model

from paceline.launch import measuring
from paceline.plan.profile import Profile


def key(precision: str = "fp32") -> str:
    return measuring.Measuring._make_key(
        SimpleNamespace(
            _loaded=SimpleNamespace(path=Path(__file__), options={}, job=SimpleNamespace(batch_size=8)),
            _cluster=SimpleNamespace(to_json=dict),
            _precision=precision,
            _everyone=SimpleNamespace(transport="gloo"),
            _datasets=SimpleNamespace(matmul=SimpleNamespace(library="torch")),
        )
    )


def test_what_was_kept_before_a_record_had_a_field_is_not_found(monkeypatch: pytest.MonkeyPatch):
    before = key()
    assert key() == before
    assert key("bf16") != before
    about = {"__base__": Profile, "__doc__": Profile.__doc__}
    monkeypatch.setattr(measuring, "Profile", create_model("Profile", **about))
    assert key() == before
    monkeypatch.setattr(measuring, "Profile", create_model("Profile", **about, later_s=(float, 0.0)))
    assert key() != before
