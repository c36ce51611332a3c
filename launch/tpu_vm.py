"""Trains on Cloud TPU VMs, one slice or several, through gcloud. A slice is named as `dreamllm_jax.plan` names it.

    launch/tpu_vm.sh keep --name=mine --topology=v5p-128 --spot -- \\
        python -m dreamllm_jax.train --config=configs/stage2_igpt.py:7b --workdir=gs://bucket/run \\
        --config.parameters.init_from=gs://bucket/stage1 --config.data.path=gs://bucket/data

`keep` does all: it asks for the slices, waits, installs this commit on every host, starts the command there, asks for
new slices and starts it again whenever they are taken away, and deletes them when the run is finished. The others are
its steps. Everything is said by the options, so `keep` can be interrupted and given again, here or elsewhere.
"""

import argparse
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout that is not installed

from dreamllm_jax.common.exits import PREEMPTED
from dreamllm_jax.parallel.chips import Topology, find_topology
from launch.shell import ROOT, Failed, Shell, add_required, check_workdir, parse

GIT = ("git", "-C", str(ROOT))
HOME = "/opt/dreamllm_jax"  # on the hosts; launch/host/dreamllm.service names it too

# What is installed on a TPU VM: https://cloud.google.com/tpu/docs/runtimes
RUNTIMES = {
    "v4": "tpu-ubuntu2204-base",
    "v5e": "v2-alpha-tpuv5-lite",
    "v5p": "v2-alpha-tpuv5",
    "v6e": "v2-alpha-tpuv6e",
}
# States of a queued resource: https://cloud.google.com/tpu/docs/queued-resources
WAITING = ("CREATING", "ACCEPTED", "WAITING_FOR_RESOURCES", "PROVISIONING", "DELETING", "SUSPENDING")
# What gcloud says where it got no answer, so that nobody knows whether the request arrived.
UNANSWERED = re.compile(
    r"UNAVAILABLE|INTERNAL:|DEADLINE_EXCEEDED|(?i:timed out|timeout|connection (reset|refused|aborted|closed)"
    r"|network is unreachable|name or service not known|temporary failure|\b50[0234]\b)"
)
TRIES = 3  # to install and start
NO_ROOM = re.compile(r"no more capacity|insufficient .*capacity|stockout|resource_pool_exhausted", re.IGNORECASE)


class Host(NamedTuple):
    """What launch/host/state.sh says of one host."""

    name: str
    state: str  # absent, running, finished, stopped or failed
    status: int
    restarts: int
    said: str

    def __str__(self) -> str:
        status = f" with status {self.status}" if self.state == "failed" else ""
        return f"host {self.name}: {self.state}{status}, started again {self.restarts} times: {self.said}"


@dataclasses.dataclass(frozen=True)
class Job:
    """The slices of one queued resource, and the run on their hosts.

    Attributes:
      place: flags that say where, of every command.
      wanted: flags that say what, of the request alone.
    """

    shell: Shell
    name: str
    topology: Topology
    place: tuple[str, ...]
    wanted: tuple[str, ...]

    def gcloud(self, group: str, verb: str, *words: str) -> list[str]:
        return ["gcloud", "compute", "tpus", group, verb, *words, *self.place]

    def hosts(self, verb: str, *words: str) -> list[str]:
        """A command for all hosts of all slices."""
        alive = [
            f"--{verb}-flag=-oServerAlive{what}" for what in ("Interval=30", "CountMax=4")
        ]  # a dead host is missed
        return self.gcloud("queued-resources", verb, *words, "--node=all", "--worker=all", "--quiet", *alive)

    def remote(self, script: str, *words: str) -> list[str]:
        """Runs one of launch/host/ on all hosts."""
        command = shlex.join(["sudo", "bash", f"{HOME}/launch/host/{script}", *words])
        return self.hosts("ssh", self.name, f"--command={command}")

    @property
    def nodes(self) -> list[str]:
        """Names of the slices."""
        several = self.topology.slices > 1
        return [f"{self.name}-{index}" for index in range(self.topology.slices)] if several else [self.name]

    def describe(self) -> tuple[str, str]:
        """State of the request and why it failed; MISSING if there is none."""
        try:
            said = self.shell.read(self.gcloud("queued-resources", "describe", self.name, "--format=json"))
        except Failed as failed:
            if "NOT_FOUND" in failed.said:
                return "MISSING", ""
            raise
        state = json.loads(said)["state"] if said else {"state": "ACTIVE"}
        return state["state"], state.get("failedData", {}).get("error", {}).get("message", "")

    def create(self) -> None:
        slices = self.topology.slices
        nodes = [f"--node-count={slices}", f"--node-prefix={self.name}"] if slices > 1 else [f"--node-id={self.name}"]
        self.shell.run(self.gcloud("queued-resources", "create", self.name, *nodes, *self.wanted, "--async"))

    def setup(self, commit: str) -> None:
        """Installs a commit on all hosts, unless a run is in progress."""
        running = [host.name for host in self.states() if host.state == "running"]
        if running:
            sys.exit(f"error: a run is in progress on {running[0]}: launch/tpu_vm.sh stop, or keep to watch it")
        archive = Path(tempfile.gettempdir()) / f"dreamllm_jax-{commit[:12]}.tar.gz"
        self.shell.run([*GIT, "archive", "--format=tar.gz", f"--output={archive}", commit])
        self.shell.run(self.hosts("scp", str(archive), f"{self.name}:dreamllm_jax.tar.gz"))
        anew = f"sudo mkdir -p {HOME} && sudo rm -rf {HOME}/dreamllm_jax {HOME}/configs"
        unpack = f"--command={anew} && sudo tar -xzf dreamllm_jax.tar.gz -C {HOME}"
        self.shell.run(self.hosts("ssh", self.name, unpack))
        self.shell.run(self.remote("setup.sh"))

    def start(self, command: list[str]) -> None:
        self.shell.run(self.remote("start.sh", *command))

    def states(self) -> list[Host]:
        """Of all hosts.

        Raises:
          Failed: some cannot be reached.
        """
        absent = "echo dreamllm_jax host=$(hostname) state=absent status=0 restarts=0 said="
        script = f"--command=sudo bash {HOME}/launch/host/state.sh || {absent}"
        command = self.hosts("ssh", self.name, script)
        said = self.shell.read(command)
        pattern = r"^dreamllm_jax host=(\S+) state=(\w+) status=(\d+) restarts=(\d+) said=(.*)$"
        hosts = [
            Host(name, state, int(status), int(restarts), line)
            for name, state, status, restarts, line in re.findall(pattern, said, re.MULTILINE)
        ]
        if len(hosts) != self.topology.hosts and not self.shell.dry_run:
            raise Failed(command, 1, f"{len(hosts)} of {self.topology.hosts} hosts answered")
        return sorted(hosts)

    def slices(self) -> dict[str, str]:
        """Name of each slice, and its state and health."""
        told = {}
        for node in self.nodes:
            said = json.loads(self.shell.read(self.gcloud("tpu-vm", "describe", node, "--format=json")) or "{}")
            told[node] = f"{said.get('state', '')} {said.get('health', '')}".rstrip()
        return told

    def stop(self) -> None:
        """Asks the run to save and end, and does not wait for it: all hosts must be told soon."""
        self.shell.run(self.hosts("ssh", self.name, "--command=sudo systemctl stop --no-block dreamllm"))

    def logs(self, to: str) -> None:
        """Follows the log of the first host, or collects those of all in a directory, a folder a slice."""

        def ssh(node: int, worker: int, command: str) -> list[str]:
            where = f"--node={node}", f"--worker={worker}", f"--command=sudo {command} {HOME}/run.log"
            return self.gcloud("queued-resources", "ssh", self.name, *where)

        if not to:
            self.shell.follow(ssh(0, 0, "tail --lines=100 --follow"))
            return
        # One after the other, for gcloud's own --output-directory loses its value (528).
        for index, node in enumerate(self.nodes):
            for worker in range(self.topology.hosts // self.topology.slices):
                said = self.shell.read(ssh(index, worker, "cat"))
                if not self.shell.dry_run:
                    path = Path(to) / node / f"{worker}.log"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_text(said)
                    print(path, flush=True)

    def delete(self) -> None:
        """Deletes the request and its slices."""
        self.shell.run(self.gcloud("queued-resources", "delete", self.name, "--force", "--quiet"))

    def status(self) -> None:
        state, reason = self.describe()
        self.shell.tell(f"{self.name}: {state} {reason}".rstrip())
        if state != "ACTIVE":
            return
        for node, said in self.slices().items():
            self.shell.tell(f"slice {node}: {said}")
        for host in self.states():
            self.shell.tell(str(host))


def keep(job: Job, commit: str, command: list[str], poll: float, delete: bool) -> None:
    """Sees to it that the command runs until it is finished; ends with the status of the run if that is not 0."""
    started = finished = False
    told = ""

    def tell(line: str) -> None:
        nonlocal told
        if line != told:
            print(f"{time.strftime('%H:%M:%S')} {job.name}: {line}", flush=True)
        told = line

    while True:
        try:
            if finished:  # only its slices are left
                state, _ = job.describe()
                if state == "MISSING":
                    return
                if state not in WAITING:
                    job.delete()
                    return
                tell(state)
                time.sleep(poll)
                continue
            state, reason, hosts = _look(job)
            running = [host for host in hosts if host.state == "running"]
            if state == "MISSING":
                tell("asking for slices")
                _create(job)
            elif state in WAITING:
                tell(state)
            elif state == "SUSPENDED" or (state == "FAILED" and NO_ROOM.search(reason)):
                tell(f"{state} {reason}".rstrip() + ": asking again")
                job.delete()
                started = False
            elif state == "FAILED":
                sys.exit(f"error: {job.name} was refused: {reason}; launch/tpu_vm.sh delete removes the request")
            elif running:
                tell(f"{len(running)} of {len(hosts)} hosts run, started again {running[0].restarts} times")
                started = True
            elif not started or any(host.state == "absent" for host in hosts):  # absent: it was booted
                tell("starting")
                started = _start(job, commit, command, poll)
            elif all(host.state == "finished" for host in hosts):
                tell("finished")
                if not delete:
                    return
                finished = True
                continue
            else:
                _end(job, hosts)
        except Failed as failed:  # this machine is offline, or slices are being taken away: that will show
            tell(f"cannot be reached, and is asked again: {_errors(failed)}")
        time.sleep(poll)


def _look(job: Job) -> tuple[str, str, list[Host]]:
    """State of the request, why it failed, and the hosts if there are any."""
    state, reason = job.describe()
    try:
        return state, reason, job.states() if state == "ACTIVE" else []
    except Failed:
        if _taken(job):
            return "SUSPENDED", "", []  # the request does not know it yet
        raise


def _taken(job: Job) -> bool:
    """Whether slices were taken away."""
    return any(said.startswith(("PREEMPTED", "TERMINATED")) for said in job.slices().values())


def _runs(job: Job) -> bool:
    """Whether the command runs, though its start was not answered."""
    try:
        return any(host.state == "running" for host in job.states())
    except Failed:
        return False


def _create(job: Job) -> None:
    """Asks for slices, once; that there is no room for the moment is no error.

    Raises:
      Failed: the answer did not come, so that it has to be seen whether the request did.
    """
    try:
        job.create()
    except Failed as failed:
        if NO_ROOM.search(failed.said) or "ALREADY_EXISTS" in failed.said:  # the latter was heard before
            return
        if UNANSWERED.search(failed.said):
            raise
        sys.exit(f"error: {job.name} was refused: {_errors(failed)}")


def _start(job: Job, commit: str, command: list[str], poll: float) -> bool:
    """Installs and starts, in a few tries; False if it has to be looked again: what is there changed meanwhile."""
    for left in range(TRIES - 1, -1, -1):
        try:
            job.setup(commit)
            job.start(command)
            return True
        except Failed as failed:
            if job.describe()[0] != "ACTIVE" or _taken(job) or _runs(job):
                return False
            problem = _errors(failed)
            if left:
                print(f"{job.name} could not be started, and is tried again: {problem}", file=sys.stderr, flush=True)
                time.sleep(poll)
    sys.exit(f"error: {job.name} could not be started: {problem}. The slices are still there, and cost")


def _end(job: Job, hosts: list[Host]) -> None:
    """Ends with the status of a run that did not finish."""
    failed = [host for host in hosts if host.state == "failed"]
    for host in failed or hosts:
        print(host)
    if not failed:
        print(f"{job.name}: the run was stopped; the same command continues it. The slices are still there, and cost")
        sys.exit(PREEMPTED)
    print(f"{job.name}: the run failed. The slices are still there, and cost: launch/tpu_vm.sh logs, or delete")
    sys.exit(failed[0].status)


def _errors(failed: Failed) -> str:
    """What our scripts on the hosts, or gcloud, call an error; otherwise the last line."""
    lines = [line.strip() for line in failed.said.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return "; ".join(dict.fromkeys(errors)) or next(
        (line for line in lines if line.startswith("ERROR: ")), (lines or ["it said nothing"])[-1]
    )


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    told = {
        "create": "ask for the slices",
        "setup": "install a commit on all hosts",
        "run": "start the command that stands after --",
        "keep": "all of it, until the run is finished",
        "logs": "follow the first host's log, or collect all with --to",
        "status": "tell the state of the slices, and of the run on each host",
        "stop": "let the run save and end; the slices stay, and cost",
        "delete": "delete the slices",
    }
    for action, help in told.items():
        command = commands.add_parser(action, help=help, description=help)
        command.set_defaults(takes_command=action in ("run", "keep"))
        add_required(command, "--name", "RUN_NAME", "name of the request, and of its slices")
        add_required(command, "--topology", "TOPOLOGY", "as v5p-128, or v5p-128x2 for two slices")
        add_required(command, "--project", "CLOUDSDK_CORE_PROJECT", "the Cloud project")
        add_required(command, "--zone", "CLOUDSDK_COMPUTE_ZONE", "as us-east5-a: gcloud compute tpus locations list")
        command.add_argument("--dry-run", action="store_true", help="print the commands instead")
        if action in ("create", "keep"):
            tier = command.add_mutually_exclusive_group()
            tier.add_argument("--spot", action="store_true", help="cheap, and taken away at any time")
            tier.add_argument("--reserved", action="store_true", help="from the project's reservation")
            command.add_argument("--runtime", help="version of the TPU VM's image (that of the chip)")
            command.add_argument("--gcloud", default="", help="further flags of `gcloud ... queued-resources create`")
        if action in ("setup", "keep"):
            command.add_argument("--commit", default="HEAD", help="what is installed (HEAD)")
        if action == "keep":
            command.add_argument("--poll", type=float, default=60.0, help="seconds between looks (60)")
            command.add_argument("--no-delete", action="store_true", help="leave the slices when the run is finished")
        if action == "logs":
            command.add_argument("--to", default="", help="directory that receives the logs of all hosts")
    return parser


def make_job(arguments: argparse.Namespace) -> Job:
    topology = find_topology(arguments.topology)
    chips = topology.chips // topology.slices
    kind = {"v5e": "v5litepod"}.get(topology.chip.kind, topology.chip.kind)
    wanted = []
    if arguments.action in ("create", "keep"):
        wanted = [f"--accelerator-type={kind}-{chips * topology.chip.cores}"]
        wanted += [f"--runtime-version={arguments.runtime or RUNTIMES[topology.chip.kind]}"]
        wanted += ["--spot"] * arguments.spot + ["--reserved"] * arguments.reserved + shlex.split(arguments.gcloud)
    place = (f"--project={arguments.project}", f"--zone={arguments.zone}")
    return Job(Shell(arguments.dry_run), arguments.name, topology, place, tuple(wanted))


def find_commit(name: str) -> str:
    """What will be installed; with HEAD nothing may be left out."""
    changed = _git("status", "--porcelain").splitlines() if name == "HEAD" else []
    if changed:
        names = ", ".join(line[3:] for line in changed)
        sys.exit(f"error: not committed, and so not on the hosts: {names}; commit it, or name a --commit")
    return _git("rev-parse", f"{name}^{{commit}}").strip()


def _git(*words: str) -> str:
    done = subprocess.run([*GIT, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: git {words[0]}: {done.stderr.strip()}")
    return done.stdout


def main(argv: list[str]) -> None:
    arguments, command = parse(make_parser(), argv)
    try:
        job = make_job(arguments)
    except ValueError as error:
        sys.exit(f"error: {error}")
    if arguments.action == "keep" or job.topology.hosts > 1:
        check_workdir(command)
    commit = find_commit(arguments.commit) if arguments.action in ("setup", "keep") else ""
    try:
        match arguments.action:
            case "setup":
                job.setup(commit)
            case "run":
                job.start(command)
            case "logs":
                job.logs(arguments.to)
            case "keep" if arguments.dry_run:
                job.create()
                job.setup(commit)
                job.start(command)
                job.status()
                if not arguments.no_delete:
                    job.delete()
            case "keep":
                keep(job, commit, command, arguments.poll, not arguments.no_delete)
            case action:  # create, status, stop, delete
                getattr(job, action)()
    except Failed as failed:
        sys.exit(f"error: {_errors(failed)}")
    except KeyboardInterrupt:
        sys.exit("\nnothing is watched any more; the slices and the run are as they were (and cost)")


if __name__ == "__main__":
    os.environ.setdefault("CLOUDSDK_CORE_DISABLE_PROMPTS", "1")
    main(sys.argv[1:])
