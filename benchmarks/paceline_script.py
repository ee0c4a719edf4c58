"""A job trained in a given layout through `paceline.Session`, by turns (turns.py).

torchrun --standalone --nproc-per-node N benchmarks/paceline_script.py JOB_FILE LAYOUT FOLDER
"""

from __future__ import annotations

import contextlib
import itertools
import sys
from pathlib import Path

from peer_script import MANY, SEED, without_dropout
from turns import Player

import paceline


def main() -> None:
    job_file, layout, folder = sys.argv[1], sys.argv[2], Path(sys.argv[3])
    job = paceline.load_job(job_file)
    with paceline.Session(job, layout, seed=SEED, total_steps=MANY) as session:
        player = Player(folder, session.world.rank, lambda: session.group.barrier("a turn"))
        batches = session.batches(epochs=MANY)
        for turn in player.turns():
            with without_dropout(session.model) if turn.compared else contextlib.nullcontext():
                for batch in itertools.islice(batches, turn.steps):
                    result = session.step(batch)
                    player.stepped(result.samples, result.loss if turn.compared else None)


if __name__ == "__main__":
    main()
