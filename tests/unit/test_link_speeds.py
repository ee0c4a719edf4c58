"""Which sizes of a collective are measured, on links of all kinds."""

from __future__ import annotations

import pytest

from paceline.train.link_speeds import _takes_too_long

KIB, MIB = 1 << 10, 1 << 20


@pytest.mark.parametrize(
    ("seconds", "num_bytes", "too_long"),
    [
        # 100 Mbit/s: 16 MiB would take 1.3 s.
        ({4: 1e-3, 64 * KIB: 6e-3, MIB: 85e-3}, 16 * MIB, True),
        # 1 Gbit/s.
        ({4: 1e-3, 64 * KIB: 2e-3, MIB: 10e-3}, 16 * MIB, False),
        # Eight hosts of an eighth of a core: nearly all of 59 ms was pauses.
        ({4: 4e-3, 64 * KIB: 59e-3}, MIB, False),
        # 3 Mbit/s: 1 MiB would take 2.8 s.
        ({4: 1e-3, 64 * KIB: 175e-3}, MIB, True),
    ],
)
def test_a_size_is_left_out_where_it_would_take_long(seconds, num_bytes, too_long):
    assert _takes_too_long(seconds, num_bytes) == too_long
