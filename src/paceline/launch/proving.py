"""Proving a layout within a run, before it trains in it."""

from __future__ import annotations

from collections.abc import Callable

from paceline.comm.mesh import Mesh
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.job import Job
from paceline.records import Layout, Proof
from paceline.split.finding import Found
from paceline.train.proof import prove_and_find
from paceline.train.room import PROOF_BYTES, why_no_room
from paceline.train.session import Datasets


class Proving:
    """Proofs of a run's layouts, each once. Its calls are collective calls of the workers of a mesh."""

    def __init__(
        self, job: Job, world: World, datasets: Datasets, seed: int, write: Callable[..., None]
    ) -> None:
        """
        Args:
            write: an event, on rank 0.
        """
        self._job, self._world, self._datasets, self._seed, self._write = job, world, datasets, seed, write
        self._proven: dict[Layout, Found | None] = {}
        """By layout, whatever its threads."""

    def prove(self, mesh: Mesh) -> tuple[Proof, Found | None]:
        """The proof of the mesh's layout, and where the model is split."""
        layout = mesh.layout
        take_cores(self._world.local_rank, min(self._world.local_size, layout.workers), layout.threads)
        proof, found = prove_and_find(
            self._job, mesh, self._datasets, seed=self._seed, device=self._world.device
        )
        self._write("proof", status=proof.status, **proof.to_json())
        if proof.status != "different":
            self._proven[_key(layout)] = found
        return proof, found

    def prove_if_possible(self, mesh: Mesh) -> tuple[Proof | None, Found | None]:
        """The same; no proof of one worker, of what was proven before, or where there is no room for one."""
        key = _key(mesh.layout)
        if key in self._proven:
            return None, self._proven[key]
        if mesh.everyone.size == 1 or not self._has_room(mesh):
            return None, None
        return self.prove(mesh)

    def _has_room(self, mesh: Mesh) -> bool:
        """Whether one process can hold what a proof compares with; if not, that is said."""
        splits = mesh.layout.splits_model
        reason = why_no_room(self._job, self._world.device.type, PROOF_BYTES) if splits else ""
        reason = mesh.everyone.gather_json(reason, "room for a proof")[0]
        if reason:
            self._write("message", level="warning", text=f"The layout was not proven: {reason}.")
        return not reason


def _key(layout: Layout) -> Layout:
    return layout.model_copy(update={"threads": None})
