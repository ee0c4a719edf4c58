"""temporary"""
from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Action:
    kind: str
    stage: int
    micro: int
class Schedule:
    def __init__(self, name, pp, m): self.name, self.pp, self.m = name, pp, m; self.num_stages = pp
    def worker_of(self, stage): return stage % self.pp
    def actions(self, worker):
        m = self.m; warm = m if self.name == "gpipe" else min(self.pp - worker - 1, m)
        out = [Action("F", worker, i) for i in range(warm)]; b = 0
        for i in range(warm, m):
            out += [Action("F", worker, i), Action("B", worker, b)]; b += 1
        return out + [Action("B", worker, i) for i in range(b, m)]
def make_schedule(name, pp, num_micro, stages_per_worker=None): return Schedule(name, pp, num_micro)
