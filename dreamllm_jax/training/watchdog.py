"""Ends a run that no longer gets anywhere: a step that does not finish, a host that is gone, a host that has failed."""

import faulthandler
import os
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed as jax_distributed

from dreamllm_jax.exits import HUNG

_ALIVE, _FAILED = "dreamllm_jax/alive/", "dreamllm_jax/failed/"


class Watchdog:
    """A context manager with a thread that watches the run inside, and ends the process if it hangs.

    Of several hosts each says every few seconds that it is alive, and why it fails if it does, through the service by
    which JAX coordinates them; the others end when they hear of a failure, or nothing for too long.

    Args:
      timeout: seconds without a finished step after which the process ends with status `HUNG`; 0 watches nothing.
      silence: seconds without a sign of another host after which it does the same.
      interval: seconds between two looks.
    """

    def __init__(self, timeout: float, silence: float, interval: float = 2.0):
        self._timeout, self._silence, self._interval = timeout, silence, interval
        self._finished = threading.Event()
        self._progress = self._answer = time.monotonic()
        self._heard: dict[str, tuple[str, float]] = {}  # process -> its latest sign, and when that came

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            for target in (self._watch, *([self._talk] if jax.process_count() > 1 else [])):
                threading.Thread(target=target, daemon=True, name=f"watchdog {target.__name__}").start()
        return self

    def __exit__(self, kind, error, _) -> None:
        self._finished.set()
        if error is not None and self._timeout and jax.process_count() > 1:
            self._fail(error)

    def _fail(self, error: BaseException) -> None:
        """Ends this process with its reason, or with another host's if that failed first; the others hear of it."""
        client, me = _client(), str(jax.process_index())
        if first := self._failure(client):
            _end(first, 1)
        traceback.print_exception(error)
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        client.key_value_set(f"{_FAILED}{me}", text, allow_overwrite=True)
        self._outlive()
        _end(f"process {me} failed: {text}", 1)

    def _failure(self, client) -> str:
        """What another host has failed of, if one has."""
        failures = ((key.rsplit("/", 1)[1], text) for key, text in client.key_value_dir_get(_FAILED))
        return next((f"process {process} failed: {text}" for process, text in failures), "")

    def _outlive(self) -> None:
        """Process 0 runs the service through which the others are told: it goes last."""
        if jax.process_index() == 0:
            time.sleep(2 * self._interval)

    def alive(self) -> None:
        """To be called whenever the run has got somewhere."""
        self._progress = time.monotonic()

    def _watch(self) -> None:
        while not self._finished.wait(self._interval):
            now = time.monotonic()
            silent = [process for process, (_, when) in self._heard.items() if now - when > self._silence]
            if now - self._answer > self._silence and jax.process_count() > 1:
                silent = ["0"]  # which runs the service
            if silent:
                _end(f"nothing was heard of process {' and '.join(silent)} for {self._silence:g} s", HUNG)
            if now - self._progress > self._timeout:
                faulthandler.dump_traceback(all_threads=True)
                _end(f"no step was finished for {self._timeout:g} s; above is what every thread was doing", HUNG)

    def _talk(self) -> None:
        client, me, count = _client(), str(jax.process_index()), 0
        self._heard = {str(i): ("", time.monotonic()) for i in range(jax.process_count()) if str(i) != me}
        while not self._finished.wait(self._interval):
            count += 1
            try:
                client.key_value_set(f"{_ALIVE}{me}", str(count), allow_overwrite=True)
                signs, failure = client.key_value_dir_get(_ALIVE), self._failure(client)
            except Exception:  # the service does not answer; `_watch` counts how long
                continue
            if failure and not self._finished.is_set():
                self._outlive()
                _end(failure, 1)
            self._answer = now = time.monotonic()
            for key, sign in signs:
                process = key.rsplit("/", 1)[1]
                if process in self._heard and self._heard[process][0] != sign:
                    self._heard[process] = sign, now


def _client():
    return jax_distributed.global_state.client


def _end(message: str, status: int) -> None:
    print(f"error: {message}; this process ends, the last checkpoint is kept", file=sys.stderr, flush=True)
    os._exit(status)
