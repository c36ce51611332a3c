"""What the launch scripts share: commands that are run, or only printed."""

import argparse
import contextlib
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = ROOT / "launch" / "tpu.env"


class Failed(Exception):
    """A command that ended with another status than 0.

    Attributes:
      said: all that it printed.
    """

    def __init__(self, command: list[str], status: int, said: str):
        super().__init__(f"{shlex.join(command)}\nended with status {status}")
        self.said = said


class Shell:
    """Runs commands, or only prints them, quoted so that they can be pasted."""

    def __init__(self, dry_run: bool):
        self.dry_run = dry_run

    def tell(self, line: str) -> None:
        """Prints a line, but none among commands that are only printed."""
        if not self.dry_run:
            print(line, flush=True)

    def run(self, command: list[str], given: str = "") -> str:
        """Shows a command and what it prints while it runs, and returns the latter.

        Args:
          given: its standard input.

        Raises:
          Failed: its status is not 0.
        """
        shown = f"{shlex.join(command)} << 'END'\n{given}END" if given else shlex.join(command)
        if self.dry_run:
            print(shown)
            return ""
        print(f"+ {shlex.join(command)}", file=sys.stderr, flush=True)
        said = []
        with _popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
            with contextlib.suppress(BrokenPipeError), process.stdin:  # it may end without reading
                process.stdin.write(given)
            for line in process.stdout:
                sys.stderr.write(line)
                said.append(line)
        if process.returncode:
            raise Failed(command, process.returncode, "".join(said))
        return "".join(said)

    def follow(self, command: list[str]) -> None:
        """Lets a command print where this program prints, and keeps nothing of it; errors as of `run`."""
        if self.dry_run:
            print(shlex.join(command))
            return
        with _popen(command) as process:
            process.wait()
        if process.returncode:
            raise Failed(command, process.returncode, f"{shlex.join(command[:5])} ended with {process.returncode}")

    def read(self, command: list[str]) -> str:
        """What a command prints to its standard output; errors as of `run`."""
        if self.dry_run:
            print(shlex.join(command))
            return ""
        with _popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            output, errors = process.communicate()
        if process.returncode:
            raise Failed(command, process.returncode, output + errors)
        return output


class Children:
    """Processes to which the signals that this one gets are passed on, to those as well that are only just started.

    Args:
      signals: what this process may get -> what its children then get.

    Attributes:
      stopped: whether there was such a signal.
    """

    def __init__(self, signals: Mapping[int, int]):
        self.stopped = 0
        self._signals, self._running, self._told = signals, [], []
        for number in signals:
            signal.signal(number, self._pass_on)

    def _pass_on(self, number: int, _) -> None:
        self.stopped = self._signals[number]
        for process in self._running:
            self._tell(process)

    def _tell(self, process: subprocess.Popen) -> None:
        self._told.append(process)
        if process.poll() is None:
            process.send_signal(self.stopped)

    def start(self, command: list[str], **options) -> subprocess.Popen:
        """Starts one, in a session of its own: Ctrl-C reaches it once, through here, and not from the terminal too."""
        process = subprocess.Popen(command, start_new_session=True, **options)
        self._running.append(process)
        if self.stopped and process not in self._told:  # the signal came while it was started
            self._tell(process)
        return process


def _popen(command: list[str], **streams) -> subprocess.Popen:
    try:
        return subprocess.Popen(command, text=True, errors="replace", **streams)
    except FileNotFoundError:
        sys.exit(f"error: {command[0]} is not installed on this machine (see docs/launch.md)")


def add_required(parser: argparse.ArgumentParser, flag: str, variable: str, help: str) -> None:
    """Adds an option that must be given, by itself or by a variable of the environment."""
    parser.add_argument(flag, default=os.environ.get(variable, ""), help=f"{help} (or set {variable})")
    parser.set_defaults(required=[*(parser.get_default("required") or []), (flag, variable, help)])


def parse(parser: argparse.ArgumentParser, argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Parses what stands before `--`, and returns the command that stands after it, which `takes_command` asks for.

    The program ends where that, or a required option, is missing.
    """
    mark = argv.index("--") if "--" in argv else len(argv)
    arguments, command = parser.parse_args(argv[:mark]), argv[mark + 1 :]
    if arguments.takes_command and not command:
        parser.error("give the command after --, as in: -- python -m dreamllm_jax.train --config=... --workdir=...")
    if command and not arguments.takes_command:
        parser.error(f"{arguments.action} takes no command after --")
    for flag, variable, help in arguments.required:
        if not getattr(arguments, flag.removeprefix("--")):
            sys.exit(f"error: give {flag}=..., or set {variable}: {help}")
    return arguments, command


def check_workdir(command: list[str]) -> None:
    """Ends the program where a run would write to a host's own disk."""
    workdir = next((word.removeprefix("--workdir=") for word in command if word.startswith("--workdir=")), "gs://")
    if not workdir.startswith("gs://"):
        sys.exit(f"error: --workdir={workdir} would be another directory on each host, and lost with it: give gs://...")


def read_environment() -> dict[str, str]:
    """The variables of launch/tpu.env."""
    lines = [line.strip() for line in ENVIRONMENT.read_text().splitlines()]
    pairs = [shlex.split(line)[0].split("=", 1) for line in lines if line and not line.startswith("#")]
    return dict(pairs)
