"""Measures a GPT of 13 M parameters with all that `measure_all` does, whole or in blocks.

    python in_blocks_worker.py FOLDER WHY

An empty WHY: whole. Leaves `profile.json` and `cluster.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from gpt_job import gpt

from paceline.comm.world import gather_cluster, join
from paceline.train.allocator import keep_freed_memory
from paceline.train.planning import measure_all
from paceline.train.session import Datasets


def main(folder: Path, why: str) -> None:
    job = gpt(512, blocks=4, vocabulary=1024, batch_size=16)
    world = join("cpu", 60.0)
    everyone = world.group(1)
    assert everyone is not None
    keep_freed_memory()
    cluster = gather_cluster(everyone, world)
    found = measure_all(
        job,
        Datasets(job, 0),
        world,
        everyone,
        cluster,
        seed=0,
        threads=1,
        budget_s=1.0,
        why_in_blocks=why,
    )
    assert found is not None
    for name, record in zip(("profile", "cluster"), found, strict=True):
        (folder / f"{name}.json").write_text(json.dumps(record.to_json()))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
