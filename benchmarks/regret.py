"""What the planner's choice loses against the best layout that there is, and against rules of thumb.

    python benchmarks/regret.py --results build/cells --out regret.md     # 55 pairs; root, for the boxes
    python benchmarks/regret.py --jobs text conv --boxes here two-1g      # these jobs on these clusters
    python benchmarks/regret.py --from build/cells                        # the tables again, from the files

A pair is a job on a cluster (cell_clusters.py). Every layout of the space (cell_space.py) is measured, in interleaved
rounds, after the planner has taken one by its forecasts alone. *Regret* is the time that its choice loses against the
fastest that was measured; *tau* compares the rankings of all layouts by forecast and by measurement (Kendall's tau-b),
once more without those pairs of layouts that differ by no more than their noise. Rules of thumb: data parallelism over
all workers; tensor parallelism in each host and a pipeline over hosts; FSDP over all workers; one process with all of
its host's threads. `forecast.py --from` makes its tables of the same files.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Sequence
from statistics import mean

from cell_clusters import CLUSTERS
from cell_space import RULES
from cells import (
    HELD_OUT,
    JOBS,
    Pair,
    failures,
    finish,
    head,
    heading,
    measured_pairs,
    ms,
    percent,
    with_measuring,
)
from rankings import Ranking, ranking

PAIRS = (
    *((job, "here") for job in ("text", "image", "conv", "mlp-wide")),
    *((job, "two-1g") for job in ("text", "driving", "gpt-small", "mlp-tiny")),
    *((job, "two-100m") for job in ("image", "conv", "speech")),
    *((job, "four-1g") for job in ("text", "gpt-small", "conv")),
    *((job, "two-by-two") for job in ("text", "driving", "gpt-small")),
    *((job, "unequal") for job in ("image", "driving")),
    *(
        ("tcn", "here"),
        ("sets", "here"),
        ("tcn", "two-1g"),
        ("sets", "two-1g"),
        ("tcn", "two-100m"),
        ("sets", "unequal"),
        ("tables", "here"),
        ("graph", "here"),
        ("tables", "two-1g"),
        ("graph", "two-1g"),
        ("tables", "two-100m"),
        ("graph", "unequal"),
        *((job, cluster) for job in ("seq2seq", "resnet", "towers") for cluster in ("here", "two-1g")),
        ("seq2seq", "two-100m"),
        ("resnet", "unequal"),
        ("towers", "two-100m"),
        *(
            (job, cluster)
            for job in ("mobile", "dense", "pyramid")
            for cluster in ("here", "two-1g", "unequal")
        ),
    ),
    *((job, cluster) for job in HELD_OUT for cluster in ("here", "two-1g", "two-100m", "unequal")),
)
"""Twenty-four jobs, of which six are held out; six clusters."""


def table(pairs: Sequence[Pair], title: str) -> str:
    found = [one for pair in pairs if (one := ranking(pair)) is not None]
    lines = [title, ""]
    lines += head(
        "job", "cluster", "layouts", "taken by forecast", "ms", "best measured", "ms", "regret", "noise", "tau",
        "tau beyond noise",
    )  # fmt: skip
    lines += [_row(one) for one in found]
    if found:
        lines += ["", _sentence(found), "", *_rules(found)]
    missing = [pair.name for pair in pairs if ranking(pair) is None]
    if missing:
        lines += ["", f"The planner's choice was not measured for {', '.join(missing)}."]
    clusters = dict.fromkeys(pair.cluster for pair in pairs)
    lines += ["", *(f"- `{name}`: {CLUSTERS[name].describe()}" for name in clusters), "", *failures(pairs)]
    return "\n".join(lines).rstrip() + "\n"


def _row(one: Ranking) -> str:
    noise = math.hypot(one.taken.noise, one.best.noise)
    cells = [
        one.pair.job,
        one.pair.cluster,
        str(len(one.pair.timed)),
        one.taken.layout,
        ms(one.taken.measured_s),
        one.best.layout,
        ms(one.best.measured_s),
        percent(one.regret),
        percent(noise),
        f"{one.tau:.2f}",
        f"{one.tau_beyond_noise:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def _sentence(found: Sequence[Ranking]) -> str:
    regrets = [one.regret for one in found]
    taus = [one.tau for one in found if not math.isnan(one.tau)]
    beyond = [one.tau_beyond_noise for one in found if not math.isnan(one.tau_beyond_noise)]
    return (
        f"{len(found)} pairs: mean regret {mean(regrets):.1%}, worst {max(regrets):.1%}; mean tau {mean(taus):.2f}, "
        f"of layouts that differ by more than noise {mean(beyond):.2f}."
    )


def _rules(found: Sequence[Ranking]) -> list[str]:
    """What each rule loses on each pair, and whether the planner is ever worse than the best of them."""
    lines = head("job", "cluster", "planner", *RULES, "worse than the best rule")
    for one in found:
        lost = [percent(one.regret_of(one.rules[rule])) if rule in one.rules else "–" for rule in RULES]
        worse = f"yes ({one.best_rule})" if one.is_worse_than_a_rule else "no"
        lines.append(
            f"| {one.pair.job} | {one.pair.cluster} | {percent(one.regret)} | {' | '.join(lost)} | {worse} |"
        )
    by_rule = {rule: [one.regret_of(one.rules[rule]) for one in found if rule in one.rules] for rule in RULES}
    means = [percent(mean(lost)) if lost else "–" for lost in by_rule.values()]
    worst = [percent(max(lost)) if lost else "–" for lost in by_rule.values()]
    mine = [one.regret for one in found]
    worse_pairs = [one.pair.name for one in found if one.is_worse_than_a_rule]
    lines += [
        f"| mean | | {percent(mean(mine))} | {' | '.join(means)} | {len(worse_pairs)} of {len(found)} |",
        f"| worst | | {percent(max(mine))} | {' | '.join(worst)} | |",
        "",
        f"The planner's choice is worse than the best rule of thumb beyond noise for {', '.join(worse_pairs)}."
        if worse_pairs
        else "The planner's choice is never worse than the best rule of thumb beyond noise.",
    ]
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    with_measuring(parser, (name for name, cluster in CLUSTERS.items() if not cluster.is_curve))
    options = parser.parse_args()
    wanted = list(PAIRS)
    if options.jobs or options.boxes:
        wanted = list(itertools.product(options.jobs or JOBS, options.boxes or ["here"]))
    pairs = measured_pairs(wanted, options)
    finish(table(pairs, heading("regret.py", pairs)), options.out)


if __name__ == "__main__":
    main()
