"""One process of plain PyTorch, without paceline: what every layout has to reproduce."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate

from paceline.job import Job
from paceline.train.order import epoch_order
from paceline.train.seeds import derive, seed_everything


def train_plainly(job: Job, micro: int, seed: int) -> dict[str, torch.Tensor]:
    """Train `job` as a script would; keys as in `equality_worker.train`."""
    seed_everything(derive(seed, "model"))
    model = job.model()
    model.train()
    data = job.data("train")
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    losses = []
    assert job.epochs is not None
    map_style = not isinstance(data, IterableDataset)
    num_samples = len(data) if map_style else sum(1 for _ in data)
    steps = job.epochs * -(-num_samples // job.batch_size)
    scheduler = job.schedule(optimizer, steps) if job.schedule else None
    for epoch in range(job.epochs):
        samples = [data[int(i)] for i in epoch_order(seed, epoch, num_samples)] if map_style else list(data)
        for begin in range(0, num_samples, job.batch_size):
            batch = samples[begin : begin + job.batch_size]
            losses.append(_step(job, model, batch, micro))
            if job.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            optimizer.zero_grad()
    result = {"losses": torch.tensor(losses), "metrics": _evaluate(job, model)}
    for step, gradients in enumerate(optimizer.seen):
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                result[f"gradient.{step}.{number}"] = gradient
    return result | {f"state.{key}": value for key, value in model.state_dict().items()}


def _step(job: Job, model: torch.nn.Module, samples: list[Any], micro: int) -> float:
    """Backward over a global batch: micro-batches of nearly equal size, weighed by their samples or weights."""
    size, longer = divmod(len(samples), micro)
    parts, begin = [], 0
    for number in range(micro):
        end = begin + size + (number < longer)
        if end > begin:
            parts.append(default_collate(samples[begin:end]))
        begin = end
    computed = [job.loss(model(part[0]), part) for part in parts]
    if isinstance(computed[0], tuple):
        total = sum(s for s, _ in computed) / sum(w for _, w in computed)
    else:
        total = sum(loss * len(part[0]) for loss, part in zip(computed, parts, strict=True)) / len(samples)
    total.backward()
    return float(total.detach())


def _evaluate(job: Job, model: torch.nn.Module) -> torch.Tensor:
    model.eval()
    data = job.data("test")
    map_style = not isinstance(data, IterableDataset)
    batch = default_collate([data[i] for i in range(len(data))] if map_style else list(data))
    with torch.no_grad():
        outputs = model(batch[0])
        values = [f(outputs, batch) for f in (job.loss, *job.metrics.values())]
    return torch.tensor([float(v[0] / v[1]) if isinstance(v, tuple) else float(v) for v in values])
