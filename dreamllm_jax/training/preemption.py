"""Notices that the machine is about to be taken away: SIGTERM, which Cloud TPU sends at a maintenance event too."""

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import jax
from jax.experimental import multihost_utils

from dreamllm_jax.common.exits import PREEMPTED


class Preemption:
    """Whether to save and stop; asked after each step, by all hosts alike."""

    def __init__(self):
        self._noticed, self._asked = False, 0

    def reached(self) -> bool:
        """Whether this is the step at which all hosts save and stop.

        Of several hosts JAX's coordination service learns of a signal to any of them, and names a call that none has
        made yet. The calls are counted, not the steps: a signal before the first one, while a run is restored or
        compiled, names call 1, which a run that continues would never reach by its steps.
        """
        if jax.process_count() == 1:
            return self._noticed
        self._asked += 1
        if multihost_utils.reached_preemption_sync_point(self._asked):
            signal.signal(signal.SIGTERM, _exit_at_once)
            return True
        return False

    def notice(self, *_) -> None:
        """The signal's handler: another one ends the process at once."""
        self._noticed = True
        signal.signal(signal.SIGTERM, _exit_at_once)


def _exit_at_once(*_) -> None:
    print("stopped at once by a second signal; the last checkpoint is kept", file=sys.stderr, flush=True)
    os._exit(PREEMPTED)


@contextlib.contextmanager
def watch_for_preemption() -> Iterator[Preemption]:
    """While inside, SIGTERM asks the run to save and stop; several hosts leave it to JAX's own handler."""
    preemption = Preemption()
    before = signal.getsignal(signal.SIGTERM)
    if jax.process_count() == 1:
        signal.signal(signal.SIGTERM, preemption.notice)
    try:
        yield preemption
    finally:
        if jax.process_count() == 1:
            signal.signal(signal.SIGTERM, before)
