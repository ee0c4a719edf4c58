"""A proof sees what is wrong with a split: errors that are planted in paceline are caught and named."""

from __future__ import annotations

import pytest
from groups import run_group
from split_error_worker import prove_all

from paceline.records import Proof

PLANTED = [
    ("forget_a_reduction_unseen", "transformer", "tp=2", "gradient", "embedding.weight"),
    ("swap_heads", "transformer", "tp=2", "gradient", "blocks.0.attention.qkv.weight"),
    ("scale_wrongly", "transformer", "dp_shard=2", "gradient norm", None),
    ("lose_a_shard", "transformer", "dp_shard=2,zero=1", "gradient", None),
    ("keep_a_stale_tied_weight", "transformer", "pp=2,micro=2", "gradient", "embedding.weight"),
    ("mix_up_micro_batches", "transformer", "pp=2,micro=2", "loss", None),
]
RIGHT = [
    ("nothing", "transformer", layout)
    for layout in ("tp=2", "dp_shard=2", "dp_shard=2,zero=1", "pp=2,micro=2")
]
PIECES = [
    ("forget_a_reduction", "transformer", "tp=2"),
    ("fail_every_piece", "deep", "tp=2"),
    ("know_one_function_wrongly", "transformer", "tp=2"),
    ("nothing", "own_function", "tp=2"),
]


@pytest.fixture(scope="module")
def told() -> dict[str, str]:
    asked = [entry[:3] for entry in (*PLANTED, *RIGHT, *PIECES)]
    return run_group(prove_all, 2, asked, timeout_s=60.0, limit_s=200.0)[0]


@pytest.mark.parametrize(("error", "job", "layout", "kind", "name"), PLANTED)
def test_a_planted_error_is_caught_and_named(error, job, layout, kind, name, told):
    proof = Proof.model_validate_json(told[f"{error}/{job}/{layout}"])
    assert proof.status == "different"
    wrong = [d for d in proof.worst if not d.within_tolerance]
    assert kind in {d.kind for d in wrong}
    if name is not None:
        assert name in {d.name for d in wrong}, [d.describe() for d in wrong]


@pytest.mark.parametrize(("error", "job", "layout"), RIGHT)
def test_without_the_error_the_same_layout_is_equal(error, job, layout, told):
    proof = Proof.model_validate_json(told[f"{error}/{job}/{layout}"])
    assert proof.status == "equal"
    assert proof.left_whole == {}


def test_a_piece_that_fails_its_proof_is_left_whole_and_the_rest_is_divided(told):
    """The blocks use SiLU, which is known wrongly; embeddings and output head do not."""
    proof = Proof.model_validate_json(told["know_one_function_wrongly/transformer/tp=2"])
    assert set(proof.left_whole) == {f"blocks.{number}" for number in range(4)}
    assert all("relative error" in why for why in proof.left_whole.values())
    assert proof.status == "equal"


def test_a_piece_that_torch_does_not_show_is_left_whole(told):
    proof = Proof.model_validate_json(told["nothing/own_function/tp=2"])
    assert set(proof.left_whole) == {"blocks.1"}
    assert proof.status == "equal"


def test_what_is_wrong_outside_the_pieces_too_is_seen_by_the_proof_of_the_whole(told):
    """The output head stands between the pieces."""
    proof = Proof.model_validate_json(told["forget_a_reduction/transformer/tp=2"])
    assert set(proof.left_whole) == {f"blocks.{number}" for number in range(4)}
    assert all(why.endswith("in gradient of argument 0") for why in proof.left_whole.values())
    assert proof.status == "different"


def test_where_no_piece_passes_its_proof_the_layout_is_refused(told):
    text = told["fail_every_piece/deep/tp=2"]
    assert text.startswith("nothing in the model can be divided by tp=2: ")
    assert "does not compute the same on parts" in text
    assert "Next step: " in text
