"""Metrics over a test split, added up over batches and workers."""

from __future__ import annotations

import math
from typing import Any

import torch

from paceline.comm.group import Group
from paceline.job import Job
from paceline.train.calling import sum_and_weight
from paceline.train.data import Part


class Totals:
    """One worker's sums and weights of the loss and of each metric, and the number of its samples."""

    def __init__(self, job: Job) -> None:
        self._functions = {"loss": job.loss, **job.metrics}
        self._finish = job.finish
        self._rows = torch.zeros(len(self._functions) + 1, 2, dtype=torch.float64)
        """One for each function, and the samples."""

    def add(self, outputs: Any, part: Part, *, counts: bool) -> None:
        """What the model has given for a part of a batch.

        Args:
            counts: not where another worker adds the same; the functions are called all the same, as they may wait for
                each other.
        """
        if part.share.borrowed:
            return
        for row, (name, function) in enumerate(self._functions.items()):
            value = function(outputs, part.batch)
            if counts:
                self._rows[row] += sum_and_weight(name, value, part.share.samples)
        if counts:
            self._rows[-1, 0] += part.share.samples

    def over(self, group: Group) -> tuple[dict[str, float], int]:
        """Metrics by name, and the number of samples, of all workers together. A collective call."""
        rows = group.sum_(self._rows.to(group.device), "evaluation sums").to("cpu")
        metrics = {}
        for row, name in enumerate(self._functions):
            value = float(rows[row, 0] / rows[row, 1]) if rows[row, 1] else math.nan
            finish = self._finish.get(name)
            metrics[name] = finish(value) if finish is not None else value
        return metrics, int(rows[-1, 0])
