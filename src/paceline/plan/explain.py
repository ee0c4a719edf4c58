"""Why a layout lost, in words."""

from __future__ import annotations

from paceline.plan.terms import Forecast

_WORDS = {
    "compute_s": "computation",
    "tensor_s": "exchanges of tensor parallelism",
    "bubble_s": "waiting for other stages",
    "messages_s": "messages between stages",
    "gather_s": "gathering of sharded parameters",
    "gradients_s": "exchange of gradients",
    "optimizer_s": "the optimizer",
    "data_s": "reading the data",
    "fixed_s": "what every step costs",
    "overhead_s": "running a pipeline's actions",
    "unexplained_s": "more than the sum of its parts, as a timed step has shown",
}


def limited_by(forecast: Forecast) -> str:
    """What takes most of a step beside computation; computation, where that is less than a tenth."""
    terms = {name: getattr(forecast.terms, name) for name in _WORDS if name != "compute_s"}
    name = max(terms, key=lambda n: terms[n])
    return _WORDS[name] if terms[name] >= 0.1 * forecast.step_s else _WORDS["compute_s"]


_TELLING = 1 / 3
"""Of what a layout takes longer: a term that makes up less of it is no reason, if a trial shows more."""


def why_it_lost(loser: Forecast, winner: Forecast) -> str:
    """One sentence: `tp=4: 38 of its 52 ms are exchanges of tensor parallelism, 36 ms more than in dp_replicate=4`."""
    more = {name: getattr(loser.terms, name) - getattr(winner.terms, name) for name in _WORDS}
    if loser.step_s < winner.step_s:
        return f"{loser.layout} is faster than {winner.layout} by too little to tell, and that does the same with less."
    unexplained_s = more.pop("unexplained_s")
    name = max(more, key=lambda n: more[n])
    own_s, longer_s = getattr(loser.terms, name), loser.step_s - winner.step_s
    unit, factor = ("ms", 1e3) if loser.step_s < 1 else ("s", 1.0)
    if longer_s > 0 and more[name] < min(unexplained_s, _TELLING * longer_s):
        return (
            f"{loser.layout}: when such layouts were timed it took {unexplained_s * factor:.3g} {unit} more than "
            f"{winner.layout} of what their parts do not explain."
        )
    if longer_s <= 0 or more[name] <= 0:
        return f"{loser.layout} takes as long as {winner.layout}."
    if own_s > loser.step_s:
        # A term that is taken off makes the others more than the step.
        return f"{loser.layout}: {_WORDS[name]} takes {more[name] * factor:.3g} {unit} more than in {winner.layout}."
    return (
        f"{loser.layout}: {own_s * factor:.3g} of its {loser.step_s * factor:.3g} {unit} are {_WORDS[name]}, "
        f"{more[name] * factor:.3g} {unit} more than in {winner.layout}."
    )
