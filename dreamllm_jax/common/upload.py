"""Brings to a bucket, in a thread of its own, what a run writes while it trains: no step waits for the network."""

import logging
import threading
from collections.abc import Callable
from typing import Any

_logger = logging.getLogger(__name__)


class Upload:
    """Calls a function in a thread whenever it was asked to, once for all who asked while it ran.

    So no two calls run at a time, and the last one begins after the last asking. That it fails is told once, until it
    succeeds again; the next asking is the next attempt.

    Args:
      write: brings to `target` how things stand when it is called.
    """

    def __init__(self, write: Callable[[], None], target: Any):
        self._write, self._target = write, target
        self._asked = self._done = 0
        self._works = False
        self._problem: Exception | None = None
        self._changed = threading.Condition()

    def ask(self) -> None:
        """Lets it be written soon, and waits for nothing."""
        with self._changed:
            self._asked += 1
            if not self._works:
                self._works = True
                threading.Thread(target=self._work, daemon=True, name=f"upload of {self._target}").start()

    def finish(self, timeout: float | None = None) -> None:
        """Waits until all that was asked for is done; what has failed is tried once more.

        Raises:
          TimeoutError: it is not done within so many seconds.
          Exception: what the last attempt has raised.
        """
        if self._problem is not None:
            self.ask()
        with self._changed:
            if not self._changed.wait_for(lambda: self._done == self._asked, timeout):
                raise TimeoutError(f"{self._target} was not written within {timeout:g} s")
            if self._problem is not None:
                raise self._problem

    def _work(self) -> None:
        while True:
            with self._changed:
                asked = self._asked
                if self._done == asked:
                    self._works = False
                    return
            problem = None
            try:
                self._write()
            except Exception as error:  # of the bucket
                problem = error
                if self._problem is None:
                    _logger.warning("%s could not be copied, which is tried again: %s", self._target, error)
            with self._changed:
                self._done, self._problem = asked, problem
                self._changed.notify_all()
