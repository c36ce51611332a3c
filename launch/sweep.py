"""Trains every variant that a configuration declares in its `SWEEP`, each in a directory of its own.

    python launch/sweep.py --config=configs/ablations/queries.py:parent=tiny --to=runs/queries [--config.steps=500 ...]
    python launch/sweep.py --config=configs/ablations/queries.py --to=gs://bucket/queries \
        --submit="sbatch --job-name={name} --wrap={command}"

`SWEEP` is a list of variants, each a dict: what `get_config` takes (`{"queries": 16}`), and settings by their flag
(`{"config.optimizer.learning_rate": 1e-3}`). Runs are trained here one after the other, those that are finished left
out; one that ends with status 75 or 76 is started again. Killed and started again, this program goes on where it was.
With --submit each run is handed to that command instead, in which {name}, {workdir} and {command} stand for the run's.
"""

import argparse
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from dreamllm_jax.checkpoints import saved  # noqa: E402
from dreamllm_jax.common.configuration import ConfigError  # noqa: E402
from dreamllm_jax.common.directories import is_remote  # noqa: E402
from dreamllm_jax.common.exits import HUNG, PREEMPTED  # noqa: E402
from dreamllm_jax.experiment import recipes  # noqa: E402
from dreamllm_jax.experiment.experiment import read_experiment  # noqa: E402
from launch.shell import Children  # noqa: E402

RESTARTS = 100  # of one run, before it is given up


class Run(NamedTuple):
    """One variant."""

    name: str
    workdir: str
    steps: int
    command: list[str]

    @property
    def finished(self) -> bool:
        try:
            return saved.find(self.workdir).step >= self.steps
        except FileNotFoundError:
            return False


def expand(config: str, to: str, overrides: Sequence[str]) -> list[Run]:
    """The runs of a configuration's sweep, every one of them checked.

    Args:
      config: FILE.py[:argument].
      to: the directory of their directories.
      overrides: flags `--config.setting=value` that all of them are given.

    Raises:
      ConfigError: no sweep, two variants alike, or one that cannot be trained; the message names it.
    """
    file, _, argument = config.partition(":")
    variants = getattr(recipes.module(file), "SWEEP", None)
    if not variants:
        raise ConfigError(
            f"{file} declares no SWEEP: a list of variants such as [{{'queries': 16}}, {{'queries': 64}}]"
        )
    runs: dict[str, Run] = {}
    for variant in variants:
        name = ",".join(f"{key.rsplit('.', 1)[-1]}={value}" for key, value in variant.items()).replace("/", "-")
        words = [f"{key}={value}" for key, value in variant.items() if not key.startswith("config.")]
        flags = [f"--{key}={value}" for key, value in variant.items() if key.startswith("config.")]
        chosen = ",".join([*([argument] if argument else []), *words])
        try:
            settings = recipes.override(recipes.load(file, chosen), [*overrides, *flags])
            experiment = read_experiment(settings.to_dict())
        except ValueError as error:
            raise ConfigError(f"{file}, variant {name}: {error}") from None
        if name in runs:
            raise ConfigError(f"{file} has the variant {name} twice")
        workdir = f"{to.rstrip('/')}/{name}"
        command = [sys.executable, "-m", "dreamllm_jax.train", f"--config={file}{':' if chosen else ''}{chosen}"]
        runs[name] = Run(name, workdir, experiment.steps, [*command, f"--workdir={workdir}", *overrides, *flags])
    return list(runs.values())


def locked(run: Run) -> int | None:
    """Waits for a process that this program, killed, has left behind in the run's directory."""
    if is_remote(run.workdir):
        return None
    path = Path(f"{run.workdir}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(f"== {run.name}: waiting for the process that still trains it", flush=True)
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    return descriptor


def train(run: Run, children: Children) -> int:
    """Trains a run to its end, or until this program is asked to stop; its last status.

    The lock stays locked as long as the run's process lives, whatever becomes of this program.
    """
    lock = locked(run)
    held = () if lock is None else (lock,)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        for attempt in range(RESTARTS):
            # What was stopped at its last step is started again: it may still have to look at held-out documents.
            if (run.finished and not attempt) or children.stopped:
                return 0
            status = children.start(run.command, env=environment, pass_fds=held).wait()
            if status not in (PREEMPTED, HUNG) or children.stopped:
                return status
            print(f"== {run.name}: status {status}, started again", flush=True)
            time.sleep(1)
        return status
    finally:
        if lock is not None:
            os.close(lock)


def submission(template: str, run: Run) -> list[str]:
    """The command that hands a run over: `{command}` alone is its words, within a word it is one line."""
    words: list[str] = []
    for word in shlex.split(template):
        line = shlex.join(run.command)
        filled = word.replace("{name}", run.name).replace("{workdir}", run.workdir)
        words += run.command if filled == "{command}" else [filled.replace("{command}", line)]
    return words


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="FILE.py[:ARGUMENT]", help="the sweep")
    parser.add_argument("--to", required=True, metavar="DIR", help="the directory of the runs' directories")
    parser.add_argument("--submit", default="", metavar="COMMAND", help="hands a run over instead of training it here")
    parser.add_argument("--dry-run", action="store_true", help="print what would be executed")
    arguments, overrides = parser.parse_known_args()
    if wrong := [word for word in overrides if not (word.startswith("--config.") and "=" in word)]:
        sys.exit(f"error: unexpected {wrong[0]!r}; settings of all runs are given as --config.setting=value")
    if arguments.submit and "{command}" not in arguments.submit:
        sys.exit("error: --submit has no {command}, the place of the training command")
    try:
        runs = expand(arguments.config, arguments.to, overrides)
    except ValueError as error:
        sys.exit(f"error: {error}")

    # Asked to stop, a run saves, and then this program ends too.
    children, failed = Children(dict.fromkeys((signal.SIGTERM, signal.SIGINT), signal.SIGTERM)), []
    for number, run in enumerate(runs, 1):
        title = f"== {number} of {len(runs)}: {run.name}"
        asked = not (arguments.dry_run and is_remote(run.workdir))  # which needs no account then
        if asked and run.finished:
            print(f"{title}: finished", flush=True)
            continue
        try:
            command = submission(arguments.submit, run) if arguments.submit else run.command
        except ValueError as error:
            sys.exit(f"error: --submit={arguments.submit}: {error}")
        print(f"{title}: {shlex.join(command)}", flush=True)
        if arguments.dry_run:
            continue
        try:
            status = subprocess.run(command, check=False).returncode if arguments.submit else train(run, children)
        except FileNotFoundError:
            sys.exit(f"error: there is no program {command[0]}")
        if children.stopped:
            print("== asked to stop: the same command goes on", flush=True)
            sys.exit(PREEMPTED)
        if status:
            failed.append(f"{run.name} (status {status})")
    if failed:
        sys.exit(f"error: {len(failed)} of {len(runs)} runs failed: {', '.join(failed)}")
    if not arguments.submit and not arguments.dry_run:
        print(f"== compare them: python -m dreamllm_jax.report {arguments.to}", flush=True)


if __name__ == "__main__":
    main()
