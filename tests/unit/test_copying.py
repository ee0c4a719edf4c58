"""Copies with the processor's copy instruction: the same bits as torch's own, in any layout and type."""

import pytest
import torch

from paceline.comm import copying
from paceline.comm.copying import write
from paceline.comm.memory_map import DTYPES

KIB = 1 << 10


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def moved(monkeypatch):
    """The sizes that the C library was asked to copy."""
    sizes = []
    plain = copying._memmove

    def counting(to, source, num_bytes):
        sizes.append(num_bytes)
        plain(to, source, num_bytes)

    monkeypatch.setattr(copying, "_memmove", counting)
    return sizes


def bytes_of(tensor):
    return tensor.contiguous().view(-1).view(torch.uint8)


@pytest.mark.parametrize("num_bytes", [0, 8, 32 * KIB - 8, 32 * KIB, 256 * KIB, 256 * KIB + 8, 1000 * KIB])
def test_all_sizes_arrive_whole_and_nothing_beside_them_changes(num_bytes, moved):
    values = torch.randint(256, (num_bytes,), dtype=torch.uint8)
    around = torch.full((num_bytes + 128,), 7, dtype=torch.uint8)
    write(around[64 : 64 + num_bytes], values)
    assert torch.equal(around[64 : 64 + num_bytes], values)
    assert (around[:64] == 7).all()
    assert (around[64 + num_bytes :] == 7).all()
    assert sum(moved) == (num_bytes if num_bytes >= 32 * KIB else 0)
    assert max(moved, default=0) <= 256 * KIB


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_type_keeps_its_bits(dtype, moved):
    values = torch.randint(2 if dtype == torch.bool else 256, (128 * KIB,), dtype=torch.uint8).view(dtype)
    place = torch.zeros_like(values)
    write(place, values)
    assert torch.equal(bytes_of(place), bytes_of(values))
    assert sum(moved) == 128 * KIB


NUMEL = 64 * KIB
COMPLEX = torch.complex(torch.arange(float(NUMEL)), torch.ones(NUMEL))


@pytest.mark.parametrize(
    ("values", "place"),
    [
        (torch.arange(NUMEL), torch.zeros(NUMEL)),
        (torch.arange(float(NUMEL)).view(256, 256).t(), torch.zeros(256, 256)),
        (torch.arange(float(NUMEL)).view(256, 256), torch.zeros(256, 256).t()),
        (
            torch.arange(float(NUMEL)).view(16, 64, 8, 8).to(memory_format=torch.channels_last),
            torch.zeros(16, 64, 8, 8),
        ),
        (torch.arange(256.0), torch.zeros(256, 256)),
        (COMPLEX.conj(), torch.zeros(NUMEL, dtype=torch.complex64)),
        (torch._neg_view(torch.arange(float(NUMEL))), torch.zeros(NUMEL)),
    ],
    ids=[
        "another type",
        "transposed",
        "into transposed",
        "channels last",
        "broadcast",
        "conjugated",
        "negated",
    ],
)
def test_what_is_not_a_plain_copy_of_bytes_is_left_to_torch(values, place, moved):
    expected = place.clone().copy_(values)
    write(place, values)
    assert torch.equal(place, expected)
    assert not moved


def test_several_threads_copy_as_torch_does(moved):
    torch.set_num_threads(2)
    place, values = torch.zeros(NUMEL), torch.arange(float(NUMEL))
    write(place, values)
    assert torch.equal(place, values)
    assert not moved
