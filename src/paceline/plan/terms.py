"""What a forecast consists of: seconds of a step, term by term, and bytes of a worker."""

from __future__ import annotations

from paceline.records import Layout, Record


class Terms(Record):
    """Seconds of a step, of the worker that has most to do; they add up to the step."""

    compute_s: float = 0.0
    """Forward and backward passes, what is computed again included."""
    tensor_s: float = 0.0
    """What tensor parallelism exchanges within them."""
    bubble_s: float = 0.0
    """Waiting for other stages of the pipeline."""
    messages_s: float = 0.0
    """What sending between stages adds to that."""
    gather_s: float = 0.0
    """All-gathers of sharded parameters."""
    gradients_s: float = 0.0
    """Adding up gradients over the workers that have the same parameters."""
    optimizer_s: float = 0.0
    data_s: float = 0.0
    fixed_s: float = 0.0
    """Of every step, and meetings of workers."""
    overhead_s: float = 0.0
    """Running a pipeline's actions, beside their blocks."""
    unexplained_s: float = 0.0
    """What a measured step of this way of splitting took beyond the other terms; negative where they are too much."""

    @property
    def step_s(self) -> float:
        return float(sum(getattr(self, name) for name in type(self).model_fields))


class Memory(Record):
    """Bytes of one worker at its worst moment; they add up. See `plan/memory.py`."""

    base: int = 0
    parameters: int = 0
    gradients: int = 0
    state: int = 0
    """Of the optimizer."""
    saved: int = 0
    """What forward passes keep for backward passes."""
    temporary: int = 0
    """Within a block, and what is gathered or exchanged."""
    mapped: int = 0
    """What other workers of the host have as well, and is there once: the code of libraries, and of parameters and
    gradients that lie in common memory those of the others' shares that this one reads."""
    unexplained: int = 0
    """What a worker of this way of splitting has held beyond all that, when it was tried; negative where it is less."""

    @property
    def total(self) -> int:
        """Resident memory."""
        return sum(getattr(self, name) for name in type(self).model_fields)

    @property
    def own(self) -> int:
        """What the worker takes of its host's memory: all but what others have as well."""
        return self.total - self.mapped


class Forecast(Record):
    """Of one layout."""

    layout: Layout
    terms: Terms
    memory: Memory
    """Of the worker that needs most."""
    samples: int
    """Of a step."""
    error_s: float = 0.0
    """How far the step may be from its forecast: from the spread of what was measured, and from past forecasts."""

    @property
    def step_s(self) -> float:
        return self.terms.step_s

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.step_s
