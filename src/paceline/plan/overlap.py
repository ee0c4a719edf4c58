"""Adding up gradients while the backward pass goes on: how much of it is left to wait for."""

from __future__ import annotations

from collections.abc import Sequence

_GPU_BYTES, _NETWORK_BYTES, _SHARE_BYTES = 25 << 20, 1 << 20, 512 << 10


def bucket_bytes(device: str, *, over_network: bool, sharers: int = 1) -> int | None:
    """How many bytes of gradients workers send together, while they compute the others; None: all, in the end.

    Through a network as many as are worth a message. Within a host of CPUs all of them: what carries them takes its
    time from the very cores that compute.

    Args:
        sharers: workers of a host that have one copy of the parameters: each sends its share of these bytes.
    """
    if device == "cuda":
        return _GPU_BYTES
    if not over_network:
        return None
    return _NETWORK_BYTES if sharers == 1 else sharers * _SHARE_BYTES


def exposed_s(blocks: Sequence[tuple[float, float]], bucket: int, whole_s: float) -> float:
    """Seconds from the end of the last backward pass until all gradients are added up.

    Gradients of a block come evenly while its backward pass goes on; those of one that alone fills a bucket come at its
    end, as they may be of one parameter. As soon as a bucket is full it is on its way, one after the other.

    Args:
        blocks: of each block, in the order of the backward pass: its seconds, and bytes of gradients.
        bucket: see `bucket_bytes`.
        whole_s: of adding up all of them at once.
    """
    total = sum(num_bytes for _, num_bytes in blocks)
    now_s = busy_until_s = waiting = 0.0
    for block_s, num_bytes in blocks:
        begin_s, now_s = now_s, now_s + block_s
        sent: list[tuple[float, float]] = []
        if not num_bytes or waiting + num_bytes < bucket:
            waiting += num_bytes
        elif num_bytes <= bucket:
            first = bucket - waiting
            sent.append((begin_s + block_s * first / num_bytes, bucket))
            waiting = num_bytes - first
        else:
            sent += [(begin_s, waiting), (now_s, num_bytes)]
            waiting = 0.0
        for at_s, sent_bytes in sent:
            busy_until_s = max(busy_until_s, at_s) + whole_s * sent_bytes / total
    if waiting:
        busy_until_s = max(busy_until_s, now_s) + whole_s * waiting / total
    return max(0.0, busy_until_s - now_s)
