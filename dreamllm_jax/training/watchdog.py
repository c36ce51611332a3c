"""Ends a run that no longer gets anywhere: a step that does not finish, a host that is gone, a host that has failed."""

import contextlib
import faulthandler
import os
import sys
import threading
import time
import traceback

import jax
from jax._src import distributed as jax_distributed

from dreamllm_jax.common.exits import HUNG

_ALIVE, _ENDED = "dreamllm_jax/alive/", "dreamllm_jax/ended/"
_SERVES = "*"  # marks the sign of the host that runs the service
_INTERVAL = 2.0  # seconds between two looks


class Watchdog:
    """A context manager with a thread that watches the run inside, and ends the process if it hangs.

    Of several hosts each says every few seconds that it is alive, and why it ends if it fails or hangs, through the
    service by which JAX coordinates them; the others end alike when they hear of it, or nothing for too long. Whoever
    is left when the service's host has ended is aborted by JAX: that one goes last.

    Args:
      timeout: seconds without a finished step after which the process ends with status `HUNG`; 0 watches nothing.
      silence: seconds without a sign of another host after which it does the same.
    """

    def __init__(self, timeout: float, silence: float):
        self._timeout, self._silence = timeout, silence
        self._finished = threading.Event()
        self._progress = self._answer = time.monotonic()
        self._heard: dict[str, tuple[str, float]] = {}  # process -> its latest sign, and when that came
        self._service = "0"  # the process that runs the service

    def __enter__(self) -> "Watchdog":
        if self._timeout:
            for target in (self._watch, *([self._talk] if jax.process_count() > 1 else [])):
                threading.Thread(target=target, daemon=True, name=f"watchdog {target.__name__}").start()
        return self

    def __exit__(self, kind, error, _) -> None:
        self._finished.set()
        if error is not None and self._timeout and jax.process_count() > 1:
            traceback.print_exception(error)
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
            end_all(f"process {jax.process_index()} failed: {text}", 1)

    def alive(self) -> None:
        """To be called whenever the run has got somewhere."""
        self._progress = time.monotonic()

    def _watch(self) -> None:
        while not self._finished.wait(_INTERVAL):
            now = time.monotonic()
            if now - self._answer > self._silence and jax.process_count() > 1:  # nobody can be told
                _end(f"nothing was heard of process {self._service} for {self._silence:g} s", HUNG)
            silent = [process for process, (_, when) in self._heard.items() if now - when > self._silence]
            if silent:
                end_all(f"nothing was heard of process {' and '.join(silent)} for {self._silence:g} s", HUNG)
            if now - self._progress > self._timeout:
                faulthandler.dump_traceback(all_threads=True)
                end_all(f"no step was finished for {self._timeout:g} s; above is what every thread was doing", HUNG)

    def _talk(self) -> None:
        client, me, count = _client(), str(jax.process_index()), 0
        self._heard = {str(i): ("", time.monotonic()) for i in range(jax.process_count()) if str(i) != me}
        while not self._finished.wait(_INTERVAL):
            count += 1
            try:
                sign = f"{count}{_SERVES if _serves() else ''}"
                client.key_value_set(f"{_ALIVE}{me}", sign, allow_overwrite=True)
                signs, ended = client.key_value_dir_get(_ALIVE), _ended(client)
            except Exception:  # the service does not answer; `_watch` counts how long
                continue
            if ended and not self._finished.is_set():
                _outlive()
                _end(*ended)
            self._answer = now = time.monotonic()
            for key, sign in signs:
                process = key.rsplit("/", 1)[1]
                if sign.endswith(_SERVES):
                    self._service = process
                if process in self._heard and self._heard[process][0] != sign:
                    self._heard[process] = sign, now


def end_all(message: str, status: int) -> None:
    """Ends this process and lets the others hear of it, for this reason or for another's that came before."""
    client = _client()
    with contextlib.suppress(Exception):  # where the service does not answer, nobody can be told
        if first := _ended(client):
            message, status = first
        elif client is not None:
            client.key_value_set(f"{_ENDED}{jax.process_index()}", f"{status} {message}", allow_overwrite=True)
    _outlive()
    _end(message, status)


def _ended(client) -> tuple[str, int] | None:
    """Why another host has ended, and with which status, if one has."""
    for _, said in client.key_value_dir_get(_ENDED) if client is not None else ():
        status, _, message = said.partition(" ")
        return message, int(status)
    return None


def _outlive() -> None:
    """The host that runs the service, through which the others hear why, goes last."""
    if _serves():
        time.sleep(3 * _INTERVAL)


def _client():
    return jax_distributed.global_state.client


def _serves() -> bool:
    """Whether this process runs the service: on TPUs that need not be process 0."""
    return jax_distributed.global_state.service is not None


def _end(message: str, status: int) -> None:
    print(f"error: {message}; this process ends, the last checkpoint is kept", file=sys.stderr, flush=True)
    os._exit(status)
