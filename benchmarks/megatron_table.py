"""The weak-scaling table of Narayanan et al. 2021 (Megatron-LM), table 1, with what follows from it.

GPT models of 1.7 to 1,008 billion parameters on 32 to 3,072 A100 80 GB, in fp16, with all activations computed again.
The micro-batches and the interleaving, which the table does not list, are those of the authors' script for it,
examples/sc21/run_table_1.sh of Megatron-LM.
"""

from __future__ import annotations

import dataclasses

from paceline.records import Layout

S, V = 2048, 51200
"""Positions of a sample, and words of the vocabulary."""
PEAK_TFLOPS = 312.0
"""Of an A100 in fp16."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table."""

    billions: str
    heads: int
    h: int
    """Hidden size."""
    layers: int
    tp: int
    pp: int
    gpus: int
    batch: int
    tflops_per_gpu: float
    percent_of_peak: float
    aggregate_pflops: float
    micro_samples: int
    """From the authors' script, as is what follows."""
    chunks: int = 1
    """Stages of a worker."""

    @property
    def dp(self) -> int:
        return self.gpus // (self.tp * self.pp)

    @property
    def parameters(self) -> float:
        """The paper's equation 2."""
        h, layers = self.h, self.layers
        return 12 * layers * h**2 * (1 + 13 / (12 * h) + (V + S) / (12 * layers * h))

    @property
    def step_flops(self) -> float:
        """The paper's equation 3: forward, backward, and forward again."""
        h, layers = self.h, self.layers
        return 96 * self.batch * S * layers * h**2 * (1 + S / (6 * h) + V / (16 * layers * h))

    @property
    def step_s(self) -> float:
        """Published."""
        return self.step_flops / (self.tflops_per_gpu * 1e12 * self.gpus)

    @property
    def layout(self) -> Layout:
        schedule = "interleaved" if self.chunks > 1 else "1f1b"
        return Layout(
            pp=self.pp,
            dp_replicate=self.dp,
            tp=self.tp,
            micro=self.batch // (self.dp * self.micro_samples),
            schedule=schedule,
            stages=self.chunks if self.chunks > 1 else None,
            recompute="full",
        )


ROWS = (
    Row("1.7", 24, 2304, 24, 1, 1, 32, 512, 137, 44, 4.4, 16),
    Row("3.6", 32, 3072, 30, 2, 1, 64, 512, 138, 44, 8.8, 16),
    Row("7.5", 32, 4096, 36, 4, 1, 128, 512, 142, 46, 18.2, 16),
    Row("18.4", 48, 6144, 40, 8, 1, 256, 1024, 135, 43, 34.6, 8),
    Row("39.1", 64, 8192, 48, 8, 2, 512, 1536, 138, 44, 70.8, 4),
    Row("76.1", 80, 10240, 60, 8, 4, 1024, 1792, 140, 45, 143.8, 2, 3),
    Row("145.6", 96, 12288, 80, 8, 8, 1536, 2304, 148, 47, 227.1, 2, 2),
    Row("310.1", 128, 16384, 96, 8, 16, 1920, 2160, 155, 50, 297.4, 1, 2),
    Row("529.6", 128, 20480, 105, 8, 35, 2520, 2520, 163, 52, 410.2, 1, 3),
    Row("1008.0", 160, 25600, 128, 8, 64, 3072, 3072, 163, 52, 502.0, 1),
)


def check(row: Row) -> None:
    """The table's own numbers fit together."""
    assert abs(row.tflops_per_gpu / (PEAK_TFLOPS) * 100 - row.percent_of_peak) < 1.0, row
    assert abs(row.tflops_per_gpu * row.gpus / 1e3 / row.aggregate_pflops - 1) < 0.01, row
    assert abs(row.parameters / 1e9 - float(row.billions)) < max(0.06, 0.001 * float(row.billions)), row
    assert row.layers % (row.pp * row.chunks) == 0, row
    assert row.batch % (row.dp * row.micro_samples) == 0, row
