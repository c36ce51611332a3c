"""A run's directory has one writer: `writer.json` in it says who that is, and is renewed while that one lives.

It is written over only as it was last read, which TensorStore leaves to the file system or the bucket: of several who
want the directory at a time one gets it, and whoever loses it learns so. No clocks are compared: a writer on another
machine is taken for gone when its file was seen to stay as it is for long enough.
"""

import contextlib
import dataclasses
import json
import logging
import os
import socket
import threading
import time
import uuid
from pathlib import Path

import jax
import tensorstore
from etils import epath

from dreamllm_jax.common.configuration import read
from dreamllm_jax.common.directories import absolute, is_remote
from dreamllm_jax.parallel.distributed import gather
from dreamllm_jax.training.watchdog import end_all

_logger = logging.getLogger(__name__)
FILE = "writer.json"
_PATIENCE = 10.0  # seconds to wait for the bucket at the end
_BYTES = 1024  # of the file, whoever writes it


@dataclasses.dataclass(frozen=True)
class Writer:
    """A process that writes.

    Attributes:
      id: of its claim alone.
      machine: where its number means something: this boot, and the namespace of processes; empty if unknown.
      started: when the process was started, in the machine's ticks, for numbers are used again.
      since: when it claimed the directory, in seconds since 1970 by its own clock, as `seen`, its last sign of life.
    """

    id: str
    host: str
    process: int
    machine: str
    started: str
    since: float
    seen: float

    def __str__(self) -> str:
        times = f"since {_told(self.since)}, last sign of life {_told(self.seen)} UTC"
        return f"process {self.process} on {self.host}, {times}"


class Claim:
    """A context manager: inside, this process alone, or the pod whose first process it is, writes in `workdir`.

    To be entered by all hosts, before anything there is changed. A claim counts no more when its process is gone from
    this machine, or when it was of another one and nothing was heard of it for `lapse` seconds, which are waited for. A
    writer whose claim was taken, or removed by somebody, ends with status 1 and one line, and its other hosts with it.

    Args:
      interval: seconds between two signs of life.

    Raises:
      OSError: another process writes there, or nobody can; the message says which, and the way out.
    """

    def __init__(self, workdir: epath.PathLike, interval: float = 10.0, lapse: float = 60.0):
        self._directory, self._interval, self._lapse = absolute(workdir), interval, lapse
        self._generation = b""  # of the file as it was last written here
        self._left = threading.Event()

    def __enter__(self) -> "Claim":
        problem: Exception | None = None
        if jax.process_index() == 0:
            try:
                self._take()
            except OSError as error:
                problem = error
            except Exception as error:  # of TensorStore; the others wait
                problem = OSError(f"{self._directory} cannot be claimed ({error}): choose another --workdir")
        told = gather("" if problem is None else str(problem) or repr(problem))[0]
        if told:
            raise problem or OSError(told)
        return self

    def __exit__(self, *_) -> None:
        if not self._generation:
            return
        self._left.set()
        self._renewing.join(_PATIENCE)
        with contextlib.suppress(Exception):  # then it lapses
            self._store.write(FILE, None, if_equal=self._generation).result(_PATIENCE)
        if self._made:
            with contextlib.suppress(OSError):  # there is something in it
                os.rmdir(self._directory)

    def _take(self) -> None:
        self._made = not is_remote(self._directory) and not self._directory.exists()
        if self._made:
            self._directory.mkdir(parents=True, exist_ok=True)
        self._store = _open(self._directory)
        process, identity = os.getpid(), uuid.uuid4().hex
        while not self._generation:  # where it has changed meanwhile, it is looked at again
            found = self._store.read(FILE).result()
            if found.state == "value":
                other = self._read(found.value)
                if other.id == identity:  # it was written, but the answer was lost
                    self._generation = found.stamp.generation
                    break
                self._outlive(other, found.stamp.generation)
            now = time.time()
            self._me = Writer(identity, socket.gethostname(), process, _machine(), _started(process), now, now)
            self._generation = self._write(found.stamp.generation)
        self._renewing = threading.Thread(target=self._renew, daemon=True, name="renewal of the claim")
        self._renewing.start()

    def _read(self, content: bytes) -> Writer:
        try:
            return read(Writer, json.loads(content))
        except ValueError:
            raise OSError(
                f"{self._directory / FILE} is damaged, or of another version of this program: where no run lives, "
                "remove it"
            ) from None

    def _write(self, generation: bytes) -> bytes:
        """Writes over what was read with this generation; gives the new one, empty if another has written meanwhile."""
        content = json.dumps(dataclasses.asdict(dataclasses.replace(self._me, seen=time.time())), indent=1)
        # Always as long: where a process was killed as it wrote, TensorStore writes over what that one had begun and
        # does not cut off what was longer.
        return self._store.write(FILE, f"{content:{_BYTES - 1}}\n", if_equal=generation).result().generation

    def _outlive(self, writer: Writer, generation: bytes) -> None:
        """Raises OSError if the writer is alive; of one on another machine, it waits to see."""
        if _is_here(writer):
            if not _is_gone(writer):
                raise OSError(self._refusal(writer))
            return
        _logger.warning("%s has a writer: %s; waiting %g s for a sign of it", self._directory, writer, self._lapse)
        limit = time.monotonic() + self._lapse
        while time.monotonic() < limit:
            time.sleep(min(1.0, self._interval))
            now = self._store.read(FILE).result()
            if now.state != "value":
                return
            if now.stamp.generation != generation:
                raise OSError(self._refusal(self._read(now.value)))

    def _refusal(self, writer: Writer) -> str:
        return (
            f"{self._directory} has a writer: {writer}. Stop it, or choose another --workdir; where it cannot be "
            f"reached, remove {self._directory / FILE}, upon which it ends within {2 * self._interval:g} s"
        )

    def _renew(self) -> None:
        while not self._left.wait(self._interval):
            try:
                if generation := self._write(self._generation):
                    self._generation = generation
                    continue
                found = self._store.read(FILE).result()
            except Exception:  # out of reach, for others too
                continue
            if found.state != "value":
                end_all(f"{self._directory} is claimed by nobody, for {FILE} was removed", 1)
            try:
                other = self._read(found.value)
            except OSError as problem:  # perhaps a later version has taken over
                end_all(str(problem), 1)
            if other.id != self._me.id:
                end_all(f"{self._directory} was taken over by another writer: {other}", 1)
            self._generation = found.stamp.generation  # it was written, but the answer was lost


def _open(directory: epath.Path) -> tensorstore.KvStore:
    if not is_remote(directory):
        return tensorstore.KvStore.open({"driver": "file", "path": f"{directory}/"}).result()
    bucket, _, path = str(directory).partition("://")[2].partition("/")
    return tensorstore.KvStore.open({"driver": "gcs", "bucket": bucket, "path": f"{path}/"}).result()


def _told(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(seconds))


def _machine() -> str:
    """This boot of this machine, and what numbers its processes; empty where there is no /proc."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _status(process: int) -> list[str]:
    """The fields after its name of a process of this machine: its state first; none if they cannot be read."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return []


def _started(process: int) -> str:
    return next(iter(_status(process)[19:]), "")


def _is_here(writer: Writer) -> bool:
    return bool(writer.machine) and writer.machine == _machine()


def _is_gone(writer: Writer) -> bool:
    """Whether a process of this machine has ended, also if nobody has asked how, or if another has its number now."""
    try:
        os.kill(writer.process, 0)
    except ProcessLookupError:
        return True
    except PermissionError:  # of another user
        pass
    status = _status(writer.process)
    return bool(status) and (status[0] in "ZX" or status[19] != writer.started)
