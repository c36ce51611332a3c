"""Threads that wait for the storage, which may not answer for ever."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future
from typing import Any

_PATIENCE = 5.0  # seconds to wait for what is being read, for a program ends best without it


class Readers:
    """Calls functions in threads, as a `ThreadPoolExecutor` does; but one that does not return keeps nobody for long.

    When it is closed, whoever waits for a call learns so at once; and a program can end while a call hangs.

    Args:
      most: how many threads.
    """

    def __init__(self, most: int):
        self._most = most
        self._threads: list[threading.Thread] = []
        self._tasks: queue.SimpleQueue[tuple[Future, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._open: set[Future] | None = set()  # what is not done; None when closed
        self._lock = threading.Lock()

    def submit(self, call: Callable[[], Any]) -> Future:
        """What the call gives, in the future.

        Raises:
          CancelledError: it is closed.
        """
        future: Future = Future()
        with self._lock:
            if self._open is None:
                raise CancelledError
            self._open.add(future)
            if len(self._threads) < self._most:
                self._threads.append(threading.Thread(target=self._work, daemon=True, name="reader of documents"))
                self._threads[-1].start()
        self._tasks.put((future, call))
        return future

    def close(self) -> None:
        """Ends the threads, each after what it is just doing, which is waited for only for a while."""
        with self._lock:
            undone, self._open = self._open or (), None
            for future in undone:
                future.set_exception(CancelledError())
        for _ in self._threads:
            self._tasks.put(None)
        limit = time.monotonic() + _PATIENCE
        for thread in self._threads:
            thread.join(max(limit - time.monotonic(), 0))

    def _work(self) -> None:
        while task := self._tasks.get():
            future, call = task
            if future.done():  # closed
                continue
            try:
                result, error = call(), None
            except BaseException as problem:  # whoever waits for it is told
                result, error = None, problem
            with self._lock:
                if self._open is None:
                    continue
                self._open.remove(future)
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)
