"""Running a pipeline: one worker's part of a step, action after action of the schedule."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from paceline.comm.links import StageLinks
from paceline.plan.schedules import Action, Schedule, make_schedule
from paceline.records import Layout
from paceline.split.absent import AbsentCalls, AbsentPieces
from paceline.split.apply import SplitModel
from paceline.split.flight import Flight, backward, backward_of_inputs
from paceline.split.pieces import Piece
from paceline.split.pipeline import PipelineStage
from paceline.train.data import GlobalBatch, Part
from paceline.train.seeds import derive, generators_kept, seed_torch

Call = Callable[[Any], Any]


class Pipeline:
    """The stages of one worker."""

    def __init__(
        self,
        split: SplitModel,
        layout: Layout,
        device: torch.device,
        call: Call,
        within: Callable[[], contextlib.AbstractContextManager[Any]],
    ) -> None:
        """
        Args:
            call: `(batch) -> outputs` of the model.
            within: what it is called in.
        """
        self._within = within
        assert split.stages is not None
        self._split, self._layout, self._device, self._call = split, layout, device, call
        self._stages = split.stages
        schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
        self._rank = split.mesh.pipeline.rank
        self.links = StageLinks(split.mesh.pipeline, schedule.worker_of, self._stages.num_stages)
        self.in_parts = schedule.in_parts
        """Whether gradients of inputs and of weights are computed apart."""
        absent, absent_calls = AbsentPieces(device), AbsentCalls(device)
        own = [s for s in range(self._stages.num_stages) if schedule.worker_of(s) == self._rank]
        self._modes = {
            stage: PipelineStage(
                stage,
                self._stages,
                split.calls,
                self.links,
                absent,
                absent_calls,
                split.names,
                device,
                self._compute,
                in_parts=schedule.in_parts,
            )
            for stage in own
        }
        self.first_stage_of = {schedule.worker_of(s): s for s in reversed(range(self._stages.num_stages))}
        """A stage of each of the pipeline's workers, by which it is reached."""
        self._weights = {stage: split.trained_on(stage) for stage in own}
        self._first, self._last = 0, self._stages.num_stages - 1
        self._under_way = 0
        """Micro-batches of an evaluation that this worker, which has the first stage, has begun and not heard of."""
        self._orders: dict[int, list[Action]] = {}
        self._seed = 0
        self._calls_seen = 0

    @property
    def has_last(self) -> bool:
        """Whether the model's outputs come to this worker."""
        return self._last in self._modes

    def step(
        self,
        batch: GlobalBatch,
        seed_of: Callable[[Part], int],
        loss_of: Callable[[Part, Any], torch.Tensor],
        begin_part: Callable[[Part], None],
    ) -> None:
        """Forward and backward over the micro-batches of `batch`.

        Args:
            seed_of: of a micro-batch's random numbers.
            loss_of: `(part, outputs)` -> what to differentiate; called where the last stage is.
            begin_part: called before the forward and before the backward pass of a micro-batch.
        """
        flights: dict[tuple[int, int], Flight] = {}
        left: dict[tuple[int, int], Callable[[], None] | None] = {}
        for action in self._actions(len(batch.parts)):
            part = batch.parts[action.micro]
            key = action.stage, action.micro
            begin_part(part)
            if action.kind == "F":
                flight, outputs = self._forward(action.stage, part, seed_of(part))
                if action.stage == self._last:
                    flight.loss = loss_of(part, outputs)
                del outputs
                flights[key] = flight
            elif action.kind == "B":
                backward(flights.pop(key), action.stage, self.links, self._device)
            elif action.kind == "I":
                left[key] = backward_of_inputs(
                    flights.pop(key), action.stage, self.links, self._device, self._weights[action.stage]
                )
            else:
                weights = left.pop(key)
                if weights is not None:
                    weights()
        self.links.flush()

    def _actions(self, num_micro: int) -> list[Action]:
        """What this worker does in a step; the last batch of an epoch may have fewer micro-batches than others."""
        if num_micro not in self._orders:
            layout = self._layout
            schedule = make_schedule(layout.schedule, layout.pp, num_micro, layout.stages)
            self._orders[num_micro] = schedule.actions(self._rank)
        return self._orders[num_micro]

    def evaluate(self, part: Part, seed: int) -> Any:
        """The model's outputs for a micro-batch, on the worker that has the last stage; absent tensors elsewhere.

        At most as many as there are workers are on their way: what the first stages sent ahead would lie in memory.
        """
        if self._first in self._modes and self._under_way == self._layout.pp:
            self._hear_of_one()
        outputs = None
        for stage in sorted(self._modes):
            outputs = self._forward(stage, part, seed)[1]
        if self._first in self._modes:
            self._under_way += 1
        if self.has_last:
            self.links.send(torch.zeros(1, device=self._device), self._last, self._first, "done")
        self.links.settle(self._layout.pp)
        return outputs

    def end_evaluation(self) -> None:
        """After the last micro-batch."""
        while self._under_way:
            self._hear_of_one()
        self.links.flush()

    def _hear_of_one(self) -> None:
        """Wait until the oldest micro-batch under way has come to the last stage."""
        self.links.receive(torch.zeros(1, device=self._device), self._last, self._first, "done")
        self._under_way -= 1

    def _forward(self, stage: int, part: Part, seed: int) -> tuple[Flight, Any]:
        seed_torch(seed, self._device)
        self._seed, self._calls_seen = seed, 0
        mode = self._modes[stage]
        with self._within():
            with mode.running() as flight:
                outputs = self._call(part.batch)
            outputs = mode.collect(outputs)
        return flight, outputs

    def _compute(self, piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a piece with random numbers of its own: the code between the pieces draws the same on all stages."""
        self._calls_seen += 1
        with generators_kept(self._device):
            seed_torch(derive(self._seed, piece.name, self._calls_seen), self._device)
            return self._split.compute(piece, forward, args, kwargs)


def schedule_of(layout: Layout) -> Schedule | None:
    """The order of a pipeline's work; None where there is no pipeline.

    Raises:
        LayoutError: the schedule cannot take the layout's sizes.
    """
    if layout.pp == 1:
        return None
    return make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
