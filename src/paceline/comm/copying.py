"""Writing into memory that other processors hold in their caches.

An ordinary store first fetches the cache line that it changes, and takes it away from whoever has it. Where two
processors share no cache, every line that the other has read since costs a trip between them: on an AMD EPYC torch's
copy writes at 8 GB/s when a line takes 220 ns and more between them, at 52 when it takes about 100. The processor's own
copy instruction (`rep movsb`, which the C library's `memmove` uses for sizes such as these) writes whole lines and
fetches none: 20 to 43 GB/s in the first case, the same 52 in the second (docs/decisions/0019).
"""

from __future__ import annotations

import ctypes

import torch

_LEAST_BYTES = 32 << 10
"""Below it torch's copy takes no longer than finding out whether another may be made."""
_AT_ONCE_BYTES = 256 << 10
"""Of 1 MiB at once the C library that was measured, glibc 2.36, stores as torch does."""

_memmove = ctypes.CDLL(None).memmove
_memmove.restype = None
_memmove.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)


def write(place: torch.Tensor, values: torch.Tensor) -> None:
    """`place.copy_(values)`, faster where `place` is memory that other workers of this host have read.

    Args:
        place: of any type and shape, on a CPU.
        values: as for `copy_`; it is as fast as that where they are of another type, not contiguous or small, and
            where torch copies with several threads.
    """
    num_bytes = values.numel() * values.element_size()
    if num_bytes < _LEAST_BYTES or not _is_plain_copy(place, values) or torch.get_num_threads() > 1:
        place.copy_(values)
        return
    to, source = place.data_ptr(), values.data_ptr()
    while num_bytes > _AT_ONCE_BYTES:
        _memmove(to, source, _AT_ONCE_BYTES)
        to, source, num_bytes = to + _AT_ONCE_BYTES, source + _AT_ONCE_BYTES, num_bytes - _AT_ONCE_BYTES
    _memmove(to, source, num_bytes)


def _is_plain_copy(place: torch.Tensor, values: torch.Tensor) -> bool:
    """Whether the bytes of `values`, in their order, are what is to stand in `place`."""
    return (
        place.dtype == values.dtype
        and place.shape == values.shape
        and values.is_contiguous()
        and place.is_contiguous()
        and values.is_cpu
        and not values.is_conj()
        and not values.is_neg()
    )
