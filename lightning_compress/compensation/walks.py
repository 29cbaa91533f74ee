"""Runs that stop on the way, so that many batches advance side by side from layer to layer."""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from lightning_compress.modules.isolation import random_states, restore_random_states_

MOST_THREADS = 256
"""So many threads may compute for all walks together."""
_FLAGS: tuple[tuple[Callable[[], Any], Callable[[Any], Any]], ...] = (
    (torch.get_default_dtype, torch.set_default_dtype),
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)
"""What runs switch for a while, but belongs to the whole process: a walk that stops within must not leave it so."""


class _Ended(BaseException):
    """Ends a run that nobody takes up again; no handler of the model's own is to stop it."""


class Walk:
    """Holds a run in a thread of its own that stops where it calls `stop`, until `go_on` is called from outside.

    Only one of them runs at a time. Torch's modes belong to threads: the run has no gradients and no inference mode.
    Where they belong to the process, such as the default dtype, each run has its own and leaves that outside as it was.
    So are the global random states: runs that begin alike draw alike, wherever others stop and go on.

    Args:
        run: what is run, with the walk.

    Example:
        >>> walk = Walk(lambda walk: [walk.stop(place) for place in "ab"])
        >>> walk.go_on(), walk.go_on(), walk.go_on()
        ('a', 'b', None)
    """

    def __init__(self, run: Callable[[Walk], Any]) -> None:
        self._run = run
        self._turn, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._place: Any = None
        self._flags, self._random = [read() for read, _ in _FLAGS], random_states()
        self._error: BaseException | None = None
        self._is_ended = False
        context = contextvars.copy_context()
        self._thread = threading.Thread(target=context.run, args=(self._in_thread,), daemon=True)

    def stop(self, place: Any) -> None:
        """Stop here; called by the run, which goes on when it is told to. A call from elsewhere does nothing."""
        if threading.current_thread() is not self._thread:
            return
        self._place = place
        self._back.release()
        self._turn.acquire()
        if self._is_ended:
            raise _Ended

    def go_on(self) -> Any:
        """Run until the next stop, and return its place; None at the end.

        Raises:
            Exception: what the run raised.
        """
        if self._is_ended:
            return None
        if self._thread.ident is None:
            self._thread.start()
        with self._own_flags():
            self._turn.release()
            self._back.acquire()
        if self._error is not None:
            raise self._error
        return self._place

    def end(self) -> None:
        """Give the run up where it stands."""
        if not self._is_ended:
            self._is_ended = True
            if self._thread.ident is not None:
                with self._own_flags():
                    self._turn.release()
                    self._thread.join()

    @contextmanager
    def _own_flags(self) -> Iterator[None]:
        outside, random = [read() for read, _ in _FLAGS], random_states()
        _set(self._flags)
        restore_random_states_(self._random)
        yield
        self._flags, self._random = [read() for read, _ in _FLAGS], random_states()
        _set(outside)
        restore_random_states_(random)

    def _in_thread(self) -> None:
        self._turn.acquire()
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._run(self)
        except _Ended:
            pass
        except BaseException as error:  # it is raised where the run is waited for
            self._error = error
        self._place, self._is_ended = None, True
        self._back.release()


def _set(values: Sequence[Any]) -> None:
    for (read, write), value in zip(_FLAGS, values, strict=True):
        if read() != value:
            write(value)


@contextmanager
def small_teams(walks: int) -> Iterator[None]:
    """Bound the threads of a number of walks while they run, in which nothing is compiled.

    Torch starts a team of its own for each of their threads.

    A thread takes over the number that is set when it first computes in parallel; outside, this one has what it had.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(max(1, min(before, MOST_THREADS // walks)))
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        torch.set_num_threads(before)
