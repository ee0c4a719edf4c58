"""A job trained in a given layout through `paceline.Session`, by turns (turns.py).

torchrun --standalone --nproc-per-node N benchmarks/paceline_script.py JOB_FILE LAYOUT FOLDER
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

from turns import Player

import paceline

MANY = 1_000_000


def main() -> None:
    job_file, layout, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    job = paceline.load_job(job_file)
    with paceline.Session(job, layout, total_steps=MANY) as session:
        player = Player(folder, session.world.rank, lambda: session.group.barrier("a turn"))
        batches = session.batches(epochs=MANY)
        for steps in player.turns():
            for batch in itertools.islice(batches, steps):
                player.stepped(session.step(batch).samples)


if __name__ == "__main__":
    main()
