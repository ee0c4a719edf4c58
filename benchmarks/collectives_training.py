"""Steps of DDP and FSDP2 of a small GPT on gloo and on `shm`, and of DDP with a thread for the collectives."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import Work
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

import paceline.comm.process_group as shm

WIDTH, HEADS, LAYERS, WORDS, LENGTH, BATCH = 192, 6, 4, 2000, 64, 4
STEPS = 4
"""In a round; after each step another training has its turn."""


class Gpt(nn.Module):
    """2.5 million parameters, 10 MB of gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        layers = [
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        ]
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = self.words(words) + self.places.weight
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH)
        for layer in self.layers:
            hidden = layer(hidden, mask, is_causal=True)
        return self.head(hidden)


class _Threaded(Work):
    """A collective that a thread carries out."""

    def __init__(
        self, call: Callable[[], Any], thread: ThreadPoolExecutor, tensors: list[torch.Tensor]
    ) -> None:
        super().__init__()
        self._future: Future[Any] = Future()
        self._tensors = tensors
        thread.submit(self._run, call)

    def _run(self, call: Callable[[], Any]) -> None:
        torch.set_num_threads(1)
        try:
            call()
        except Exception as error:
            self._future.set_exception(error)
        else:
            self._future.set_result(self._tensors)

    def wait(self, timeout: Any = None) -> bool:
        self._future.wait()
        return True

    def get_future(self) -> Future[Any]:
        return self._future

    getFuture = get_future  # noqa: N815


def in_a_thread(group: shm.SharedMemoryGroup) -> shm.SharedMemoryGroup:
    """Let a thread of its own carry out the group's all-reduces: the other way of being asynchronous."""
    thread = ThreadPoolExecutor(1)
    inline = group.allreduce

    def allreduce(tensors: list[torch.Tensor], opts: Any = None) -> Work:
        return _Threaded(lambda: inline(tensors, opts), thread, tensors)

    group.allreduce = allreduce
    return group


class Training:
    """One model, one way of training it."""

    def __init__(self, rank: int, group: dist.ProcessGroup, way: str, bucket_mb: float) -> None:
        torch.manual_seed(0)
        self._rank = rank
        self._model: nn.Module = Gpt()
        self._num_steps = 0
        if way == "DDP":
            self._model = DistributedDataParallel(self._model, process_group=group, bucket_cap_mb=bucket_mb)
        else:
            mesh = DeviceMesh.from_group(group, "cpu")
            for layer in self._model.layers:
                fully_shard(layer, mesh=mesh)
            fully_shard(self._model, mesh=mesh)
        self._optimizer = torch.optim.SGD(self._model.parameters(), 0.05)

    def step(self) -> float:
        """The loss of the own share."""
        self._num_steps += 1
        generator = torch.Generator().manual_seed(1000 * self._num_steps + self._rank)
        words = torch.randint(0, WORDS, (BATCH, LENGTH + 1), generator=generator)
        logits = self._model(words[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), words[:, 1:].flatten())
        loss.backward()
        self._optimizer.step()
        self._optimizer.zero_grad()
        return loss.item()


def measure(rank: int, world: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """`{way: {backend: [s per step, …]}}`. Raises if the losses of two backends differ."""
    made: dict[str, dict[str, Training]] = {}
    for way, bucket_mb in (("DDP", 25.0), ("DDP, buckets of 1 MB", 1.0), ("FSDP2", 0.0)):
        made[way] = {
            "gloo": Training(rank, dist.new_group(), way.partition(",")[0], bucket_mb),
            "shm": Training(rank, dist.new_group(backend="shm"), way.partition(",")[0], bucket_mb),
        }
        if way.startswith("DDP"):
            threaded = in_a_thread(dist.new_group(backend="shm"))
            made[way]["shm, in a thread"] = Training(rank, threaded, "DDP", bucket_mb)
    times: dict[str, dict[str, list[float]]] = {way: {name: [] for name in made[way]} for way in made}
    losses: dict[str, dict[str, list[float]]] = {way: {name: [] for name in made[way]} for way in made}
    meeting = dist.new_group(backend="shm")
    for number in range(STEPS * (rounds + 1)):
        for way, trainings in made.items():
            for name, training in trainings.items():
                dist.barrier(group=meeting)
                begin_s = time.perf_counter()
                losses[way][name].append(training.step())
                # The first round is for warming up.
                if number >= STEPS:
                    times[way][name].append(time.perf_counter() - begin_s)
    for way, of_backends in losses.items():
        for name, told in of_backends.items():
            worst = max(abs(a - b) for a, b in zip(told, of_backends["gloo"], strict=True))
            if worst > 1e-4:
                raise ValueError(f"{way} on {name}: the losses differ from gloo's by {worst}")
    return times


def table(times: dict[str, dict[str, list[float]]]) -> list[str]:
    lines = ["| training | gloo | shm | faster | shm, in a thread |", "|---|---|---|---|---|"]
    for way, found in times.items():
        told = {}
        for name, values in found.items():
            low, median, high = statistics.quantiles([v * 1e3 for v in values], n=4)
            told[name] = f"{median:.1f} ms [{low:.1f}–{high:.1f}], least {min(values) * 1e3:.1f}"
        ratio = statistics.median(found["gloo"]) / statistics.median(found["shm"])
        lines.append(
            f"| {way} | {told['gloo']} | {told['shm']} | {ratio:.2f}× | {told.get('shm, in a thread', '–')} |"
        )
    return lines
