"""What torch.distributed's asynchronous calls return: operations that are done, and messages that are not."""

from __future__ import annotations

import datetime
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch._C._distributed_c10d import Work
from torch.futures import Future

from paceline.comm.flight_recorder import ANY_SOURCE, FlightRecorder
from paceline.comm.mailbox import Mailbox
from paceline.errors import CollectiveError

_NO_TIMEOUT = datetime.timedelta(0)


class FinishedWork(Work):
    """An operation that was done when the call returned."""

    def __init__(self, tensors: Sequence[Any] = ()) -> None:
        """
        Args:
            tensors: the result.
        """
        super().__init__()
        self._tensors = list(tensors)

    def wait(self, timeout: datetime.timedelta = _NO_TIMEOUT) -> bool:
        return True

    def is_completed(self) -> bool:
        return True

    def is_success(self) -> bool:
        return True

    def exception(self) -> BaseException | None:
        return None

    def synchronize(self) -> None:
        return

    def result(self) -> list[Any]:
        return self._tensors

    def get_future(self) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(self._tensors)
        return future

    getFuture = get_future  # noqa: N815


_DONE = FinishedWork()


def finished(opts: Any, tensors: Sequence[Any]) -> Work:
    """The work of a call that is done. Who does not ask for it asynchronously gets one that all share."""
    return _DONE if opts is not None and not opts.asyncOp else FinishedWork(tensors)


class Sent(FinishedWork):
    """A message on its way: its tensor may be changed at once."""

    def __init__(self, mailbox: Mailbox, what: str) -> None:
        super().__init__()
        self._mailbox, self._what = mailbox, what

    def wait(self, timeout: datetime.timedelta = _NO_TIMEOUT) -> bool:
        """At once, unless more than 1024 messages to one worker are unseen (`Mailbox.flush`)."""
        self._mailbox.flush(self._what)
        return True


class Received(Work):
    """A receive that was posted. It is filled in `wait`, or whenever another of the group's receives is waited for."""

    def __init__(self, inbox: Inbox, tensor: torch.Tensor, source: int, tag: int, record: int) -> None:
        super().__init__()
        self._inbox, self.tensor, self.source, self.tag, self.record = inbox, tensor, source, tag, record
        self.is_filled = False
        self.error: CollectiveError | None = None

    def wait(self, timeout: datetime.timedelta = _NO_TIMEOUT) -> bool:
        """Return when the message is in the tensor.

        Raises:
            CollectiveError: its sender has ended or did not send in time, or sent something else.
        """
        self._inbox.complete(self, timeout.total_seconds())
        return True

    def is_completed(self) -> bool:
        self._inbox.progress()
        return self.is_filled or self.error is not None

    def is_success(self) -> bool:
        return self.is_filled

    def exception(self) -> BaseException | None:
        return self.error

    def synchronize(self) -> None:
        self.wait()

    def result(self) -> list[torch.Tensor]:
        self.wait()
        return [self.tensor]

    def source_rank(self) -> int:
        """Who sent it, as a rank of the group."""
        return self.source

    _source_rank = source_rank

    def get_future(self) -> Future[Any]:
        """Waits for the message: nothing else in this process would fill a future."""
        future: Future[Any] = Future()
        future.set_result(self.result())
        return future

    getFuture = get_future  # noqa: N815


class Inbox:
    """The receives of one worker that are posted and not yet filled.

    A message goes to the receive that was posted first of those that it fits (source or any source, tag), as in MPI.
    """

    def __init__(self, mailbox: Mailbox, rank: int, size: int, recorder: FlightRecorder) -> None:
        self._mailbox, self._recorder = mailbox, recorder
        self._others = [other for other in range(size) if other != rank]
        self._posted: list[Received] = []

    def post(self, tensor: torch.Tensor, source: int, tag: int, record: int) -> Received:
        """Begin to receive into `tensor`.

        Args:
            source: rank in the group, or `ANY_SOURCE`.
            record: of the flight recorder, to be closed when the message has come.
        """
        work = Received(self, tensor, source, tag, record)
        self._posted.append(work)
        return work

    def progress(self) -> None:
        """Fill what can be filled without waiting."""
        # Once: a message that came between two attempts might be passed over, and then nobody would wake for it.
        self._mailbox.look()
        blocked: set[tuple[int, int]] = set()
        for work in list(self._posted):
            sources = self._others if work.source == ANY_SOURCE else [work.source]
            for source in sources:
                if (source, work.tag) not in blocked and self._try(work, source):
                    break
            else:
                blocked.update((source, work.tag) for source in sources)

    def complete(self, work: Received, wait_s: float) -> None:
        """Wait until `work` is filled, for `wait_s` at most (0: the group's time-out)."""
        deadline_s = time.perf_counter() + (wait_s if wait_s > 0 else self._mailbox.timeout_s)
        self.progress()
        while not work.is_filled:
            if work.error is not None:
                raise work.error
            try:
                if work.source == ANY_SOURCE:
                    self._mailbox.wait_for_anyone(_WHAT, deadline_s)
                else:
                    self._mailbox.wait_for_news(work.source, _WHAT, deadline_s)
            except CollectiveError as error:
                work.error = error
                raise
            self.progress()

    def _try(self, work: Received, source: int) -> bool:
        """Whether `work` is finished, well or not."""
        tensor = work.tensor
        whole = tensor.detach() if tensor.is_contiguous() else tensor.new_empty(tensor.shape)
        try:
            if not self._mailbox.take_(whole, source, _WHAT, work.tag):
                return False
        except CollectiveError as error:
            work.error = error
        else:
            if not tensor.is_contiguous():
                tensor.detach().copy_(whole)
            work.source, work.is_filled = source, True
            self._recorder.leave(work.record)
        self._posted.remove(work)
        return True


_WHAT = "a message"
