"""Programs that stand in for gcloud and kubectl: they take the real ones' arguments, strictly, and play a life.

What they accept was read from the references of `gcloud compute tpus` (Google Cloud CLI 528) and of kubectl 1.33.
`Cloud` puts them on a PATH of its own. A life is a list of attempts, one for each time that slices are asked for:

    {"refused": MESSAGE}     the request itself is refused
    {"failed": MESSAGE}      it is accepted, and fails in the queue
    {"waits": 2, "runs": 3, "ends": STATE}    it waits for so many looks, then runs for so many; STATE is preempted,
                             finished, stopped, absent, failed; with "silent" a preempted slice's request stays ACTIVE
    "setup": INDEX           that host fails its setup
    "unavailable": N         so many of its deletions are not answered, and not heard of
    "lost": ["create", ...]  these are done, but not answered
    "taken": True            the slices are taken away while they are set up, and the request stays ACTIVE

For GKE an attempt is {"waits": 1, "runs": 1, "ends": STATUS}, for each time that the JobSet starts its pods; STATUS is
the exit status of one of them, or "disrupted"; with "setup": INDEX that host cannot get its image. What happens then,
the failure policies of JobSet and Jobs say.
"""

import argparse
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

_WIDE = "project format verbosity account configuration quiet!"
_SSH = (
    "zone node worker batch-size ssh-key-file strict-host-key-checking ssh-key-expire-after internal-ip! plain! "
    "dry-run! force-key-file-overwrite! tunnel-through-iap!"
)
# Command -> its words: NAME positional, NAME? optional; --flags with a value, required*, and switches!.
GCLOUD = {
    "queued-resources create": (
        "name",
        "zone accelerator-type* runtime-version* node-id node-count node-prefix async! spot! reserved! guaranteed! "
        "network subnetwork internal-ips! service-account scopes labels metadata tags description range data-disk "
        "valid-until-duration valid-until-time valid-after-duration valid-after-time shielded-secure-boot!",
    ),
    "queued-resources describe": ("name", "zone"),
    "queued-resources delete": ("name", "zone async! force!"),
    "queued-resources ssh": ("name", f"{_SSH} command* output-directory ssh-flag"),
    "queued-resources scp": ("sources destination", f"{_SSH} scp-flag recurse! compress!"),
    "tpu-vm describe": ("name", "zone"),
}
KUBECTL = {
    "apply": ("", "filename* namespace server-side!"),
    "get": ("kind name?", "namespace selector output ignore-not-found!"),
    "logs": ("name?", "namespace selector tail max-log-requests follow! prefix! all-containers!"),
    "delete": ("kind name", "namespace timeout ignore-not-found!"),
}


class Refused(Exception):
    """What a program prints as its error."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise Refused(message)


def parse(argv: list[str]) -> tuple[str, argparse.Namespace]:
    """The command that the words `gcloud ...` or `kubectl ...` mean.

    Raises:
      Refused: they mean none.
    """
    program, *words = argv
    if program == "gcloud":
        if words[:2] != ["compute", "tpus"]:
            raise Refused(f"Invalid choice: '{' '.join(words[:2])}'")
        name, words, table, wide = " ".join(words[2:4]), words[4:], GCLOUD, _WIDE
    else:
        name, words, table, wide = words[0], words[1:], KUBECTL, ""
    if name not in table:
        raise Refused(f"Invalid choice: '{name}'")
    positional, flags = table[name]
    parser = _Parser(allow_abbrev=False, add_help=False)
    for one in positional.split():
        parser.add_argument(one.rstrip("?"), nargs="?" if one.endswith("?") else None)
    for flag in f"{flags} {wide}".split():
        kind = {"action": "store_true"} if flag.endswith("!") else {"required": flag.endswith("*")}
        parser.add_argument(f"--{flag.rstrip('!*')}", **kind)
    given = parser.parse_args(words)
    if program == "gcloud":
        if not given.project or not given.zone:
            raise Refused("The required property [project] or [zone] is not currently set.")
        if name.endswith("create"):
            if bool(given.node_id) == bool(given.node_count):
                raise Refused("Exactly one of (--node-id | --node-count : --node-prefix) must be specified.")
            if given.node_count and int(given.node_count) < 2:
                raise Refused("Invalid value for [--node-count]: Node count must be greater than 1")
            if given.spot and given.reserved:
                raise Refused("spot and reserved")
    return name, given


class World:
    """What there is in the cloud, kept in a file between calls."""

    def __init__(self, folder: Path):
        self.file = folder / "world.json"
        self.state = json.loads(self.file.read_text())

    def save(self) -> None:
        self.file.write_text(json.dumps(self.state))

    @property
    def life(self) -> dict:
        """The present attempt."""
        return self.state["lives"][self.state["attempt"]]

    def gcloud(self, name: str, given: argparse.Namespace) -> str:
        state = self.state
        where = f"projects/{given.project}/locations/{given.zone}/queuedResources"
        if name == "queued-resources create":
            if state["request"]:
                raise Refused(f"ALREADY_EXISTS: Resource '{where}/{given.name}' already exists")
            state["attempt"] += 1
            if "refused" in self.life:
                raise Refused(self.life["refused"])
            slices = int(given.node_count or 1)
            nodes = [f"{given.node_prefix}-{i}" for i in range(slices)] if given.node_count else [given.node_id]
            kind, size = re.fullmatch(r"(v\w+)-(\d+)", given.accelerator_type).groups()
            chips = int(size) // (2 if kind in ("v4", "v5p") else 1)
            hosts = 1 if kind not in ("v4", "v5p") and chips <= 8 else max(chips // 4, 1)
            state["request"] = {"nodes": nodes, "hosts": hosts, "looks": 0, "runs": 0, "files": [], "command": None}
            return self._answer("create")
        request = state["request"]
        target = (given.destination if name.endswith("scp") else given.name).split(":")[0]
        if not request or target not in ("mine", *request["nodes"]):
            raise Refused(f"NOT_FOUND: Resource '{where}' was not found")
        if name == "queued-resources describe":
            return json.dumps({"name": f"{where}/mine", "state": self._look()})
        if name == "queued-resources delete":
            if self._phase() == "ACTIVE" and not given.force:
                raise Refused("FAILED_PRECONDITION: the queued resource is in use; use --force")
            if self.life.get("unavailable", 0) > 0:
                self.life["unavailable"] -= 1
                self.save()
                raise Refused("UNAVAILABLE: The service is currently unavailable.")
            state["request"] = None
            return self._answer("delete")
        if self._phase() != "ACTIVE" and name == "tpu-vm describe":
            raise Refused(f"NOT_FOUND: {target} was deleted")
        if self._phase() != "ACTIVE":
            raise Refused(f"INVALID_ARGUMENT: {target} is not in state READY")
        if name == "tpu-vm describe":
            if given.name not in request["nodes"]:
                raise Refused(f"NOT_FOUND: {given.name}")
            gone = self.life["ends"] == "preempted" and request["runs"] > self.life["runs"]
            return json.dumps({"state": "PREEMPTED"} if gone else {"state": "READY", "health": "HEALTHY"})
        if name == "queued-resources scp":
            if not Path(given.sources).exists():
                raise Refused(f"scp: {given.sources}: no such file")
            request["files"] = [given.destination.split(":")[1]]
            return ""
        return self._ssh(given)

    def _answer(self, verb: str) -> str:
        if verb in self.life.get("lost", []):
            self.life["lost"].remove(verb)
            self.save()
            raise Refused("There was a problem: Connection reset by peer")
        return ""

    def _phase(self) -> str:
        request = self.state["request"]
        if "failed" in self.life:
            return "FAILED" if request["looks"] > 1 else "WAITING_FOR_RESOURCES"
        if request["looks"] <= self.life.get("waits", 0):
            return "WAITING_FOR_RESOURCES"
        preempted = self.life["ends"] == "preempted" and request["runs"] > self.life["runs"]
        if preempted and not self.life.get("silent"):
            return "SUSPENDED" if request["runs"] > self.life["runs"] + 1 else "SUSPENDING"
        return "ACTIVE"

    def _look(self) -> dict:
        request = self.state["request"]
        request["looks"] += 1
        phase = self._phase()
        if phase in ("SUSPENDING", "SUSPENDED"):
            request["runs"] += 1
        failed = {"failedData": {"error": {"code": 8, "message": self.life["failed"]}}} if phase == "FAILED" else {}
        return {"state": phase, **failed}

    def _ssh(self, given: argparse.Namespace) -> str:
        request = self.state["request"]
        hosts = [f"t1v-n-{node}-w-{i}" for node in request["nodes"] for i in range(request["hosts"])]
        home = "/opt/dreamllm_jax"
        script = given.command.removeprefix(f"sudo bash {home}/launch/host/")
        everywhere = (given.node, given.worker) == ("all", "all")
        if given.command.startswith("sudo mkdir"):
            if "dreamllm_jax.tar.gz" not in request["files"]:
                raise Refused("tar: dreamllm_jax.tar.gz: no such file")
            request["files"].append(home)
            return ""
        if given.command.startswith(("sudo tail", "sudo cat")):
            return f"the log of {hosts[int(given.node) * request['hosts'] + int(given.worker)]}\n"
        if given.command == "sudo systemctl stop --no-block dreamllm":
            self.life["ends"], self.life["runs"] = "stopped", 0
            return ""
        assert everywhere, given
        if script == "setup.sh":
            assert home in request["files"]
            if self.life.get("taken"):
                request["runs"] = self.life["runs"] + 1
                self.save()
                raise Refused("Connection closed by remote host")
            if "setup" in self.life:
                failing = hosts[self.life["setup"]]
                print("##### Command execution on worker 1 failed with exit status 1. Continuing.", file=sys.stderr)
                raise Refused(f"host {failing}: setup failed at: python3 -m uv pip install")
            request["files"].append("service")
            return "".join(f"host {host}: ready\n" for host in hosts)
        if script.startswith("start.sh "):
            assert "service" in request["files"]
            if self.life["ends"] == "absent" and request["command"]:
                self.life["ends"], self.life["runs"] = "finished", 1
            request["command"], request["runs"] = shlex.split(script)[1:], 0
            self.state["started"].append(request["command"])
            return self._answer("start")
        assert script.startswith("state.sh || echo dreamllm_jax host="), given.command
        if self.life.get("taken") and request["runs"] > self.life["runs"]:
            raise Refused(f"[{hosts[0]}] Connection refused")
        if request["command"] is None:
            lines = [f"host={host} state=absent status=0 restarts=0 said=" for host in hosts]
        else:
            request["runs"] += 1
            running = request["runs"] <= self.life["runs"]
            if not running and self.life["ends"] == "preempted":
                raise Refused(f"[{hosts[0]}] Connection refused")
            lines = []
            for index, host in enumerate(hosts):
                ended = self.life["ends"]
                if ended == "absent" and index:  # one host was booted, the others missed it
                    ended = "failed"
                status = {"stopped": 75, "failed": 1}.get(ended, 0)
                said = f"step {request['runs']}" if running else {"failed": "error: no room"}.get(ended, "")
                shown = "running" if running else ended
                lines.append(f"host={host} state={shown} status={0 if running else status} restarts=0 said={said}")
        return "".join(f"dreamllm_jax {line}\n" for line in lines)

    def kubectl(self, name: str, given: argparse.Namespace) -> str:
        state = self.state
        if name == "apply":
            manifest = json.loads(sys.stdin.read())
            if "refused" in state["lives"][0]:
                raise Refused(state["lives"][0]["refused"])
            if state.get("jobset"):
                return f"jobset.jobset.x-k8s.io/{manifest['metadata']['name']} unchanged\n"
            state["jobset"] = {"manifest": manifest, "looks": 0, "restarts": 0, "counted": 0, "terminal": ""}
            state["attempt"] = 0
            return f"jobset.jobset.x-k8s.io/{manifest['metadata']['name']} created\n"
        jobset = state["jobset"]
        if not jobset and getattr(given, "ignore_not_found", False):
            return ""
        if not jobset:
            raise Refused('Error from server (NotFound): jobsets.jobset.x-k8s.io "mine" not found')
        if name == "delete":
            state["jobset"] = None
            return ""
        if name == "logs":
            return "[pod/mine-slice-0-0-abcde/host] step 1\n"
        if given.kind == "pods":
            assert given.selector == "jobset.sigs.k8s.io/jobset-name=mine"
            return json.dumps({"items": self._pods()})
        assert (given.kind, given.name) == ("jobset", "mine")
        self._control()
        restarting = {"type": "Restarting", "status": "True", "message": "restarted by a rule"}
        status = {"restarts": jobset["restarts"], "conditions": [restarting] * bool(jobset["restarts"])}
        if jobset["terminal"]:
            status |= {"terminalState": jobset["terminal"], "conditions": [{"status": "True", "message": "it is over"}]}
        return json.dumps(jobset["manifest"] | {"status": status})

    def _control(self) -> None:
        """Time passes: what the controllers of JobSet and Job do when pods end."""
        jobset, life = self.state["jobset"], self.life
        jobset["looks"] += 1
        if jobset["terminal"] or jobset["looks"] <= life["waits"] + life["runs"]:
            return
        spec = jobset["manifest"]["spec"]
        ended = life["ends"]
        if ended == 0:
            jobset["terminal"] = "Completed"
            return
        reason = job_failure_reason(spec["replicatedJobs"][0]["template"]["spec"], ended)
        action = jobset_action(spec["failurePolicy"], reason)
        counted = action == "RestartJobSet"
        if counted and jobset["counted"] >= spec["failurePolicy"]["maxRestarts"]:
            jobset["terminal"] = "Failed"
            return
        jobset["counted"] += counted
        jobset["restarts"] += 1
        jobset["looks"] = 0
        self.state["attempt"] += 1

    def _pods(self) -> list[dict]:
        jobset = self.state["jobset"]
        (slices,) = jobset["manifest"]["spec"]["replicatedJobs"]
        job = slices["template"]["spec"]
        running = jobset["looks"] > self.life["waits"]
        phase = {"Completed": "Succeeded", "Failed": "Failed", "": "Running" if running else "Pending"}
        status = {"phase": phase[jobset["terminal"]]}
        if not running:
            message = "0/9 nodes are available: 9 Insufficient google.com/tpu."
            status["conditions"] = [{"reason": "Unschedulable", "message": message}]
        if jobset["terminal"]:
            status["containerStatuses"] = [{"state": {"terminated": {"exitCode": self.life["ends"]}}}]
        names = [(i, j) for i in range(slices["replicas"]) for j in range(job["completions"])]
        pods = [{"metadata": {"name": f"mine-slice-{i}-{j}-abcde"}, "status": status} for i, j in names]
        if "setup" in self.life:
            waiting = {"reason": "ImagePullBackOff", "message": "Back-off pulling image"}
            pods[self.life["setup"]]["status"] = {"containerStatuses": [{"state": {"waiting": waiting}}]}
        return pods


def job_failure_reason(job: dict, ended: int | str) -> str:
    """Why a Job whose pod ended so fails; its podFailurePolicy's first matching rule decides.

    https://kubernetes.io/docs/concepts/workloads/controllers/job/#pod-failure-policy
    """
    assert job["backoffLimit"] == 0 and job["template"]["spec"]["restartPolicy"] == "Never"
    for rule in job["podFailurePolicy"]["rules"]:
        if "onExitCodes" in rule and isinstance(ended, int):
            matches = (ended in rule["onExitCodes"]["values"]) == (rule["onExitCodes"]["operator"] == "In")
        else:
            conditions = [(one["type"], one["status"]) for one in rule.get("onPodConditions", [])]
            matches = ended == "disrupted" and ("DisruptionTarget", "True") in conditions
        if matches:
            assert rule["action"] == "FailJob"
            return "PodFailurePolicy"
    return "BackoffLimitExceeded"


def jobset_action(policy: dict, reason: str) -> str:
    """What a JobSet does when one of its Jobs fails; the first matching rule decides.

    https://jobset.sigs.k8s.io/docs/tasks/failure_policy/
    """
    for rule in policy["rules"]:
        if reason in rule.get("onJobFailureReasons", [reason]):
            return rule["action"]
    return "RestartJobSet"


class Cloud:
    """A folder with the programs, and what was asked of them."""

    def __init__(self, folder: Path, lives: list[dict] = ()):
        self.folder = folder
        folder.mkdir()
        state = {"lives": list(lives), "attempt": -1, "request": None, "started": [], "jobset": None}
        (folder / "world.json").write_text(json.dumps(state))
        (folder / "calls").touch()
        for program in ("gcloud", "kubectl"):
            path = folder / program
            path.write_text(f'#!/bin/sh\nexec {sys.executable} -S {__file__} {folder} {program} "$@"\n')
            path.chmod(0o755)

    @property
    def calls(self) -> list[list[str]]:
        """Each call's words."""
        return [json.loads(line) for line in (self.folder / "calls").read_text().splitlines()]

    @property
    def verbs(self) -> list[str]:
        """Of each call that changed something, which; ssh by the script that it ran."""
        verbs = []
        for call in self.calls:
            name, given = parse(call)
            verb = name.split()[-1]
            if verb == "ssh":
                verb = next(
                    (one for one in ("setup", "start", "state", "stop") if f"{one}.sh" in given.command),
                    given.command.split()[1],
                )
            if verb not in ("describe", "state", "get"):
                verbs.append(verb)
        return verbs

    @property
    def state(self) -> dict:
        return World(self.folder).state

    def run(self, command: list[str], **variables: str) -> subprocess.CompletedProcess:
        """Runs a program that finds these first."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("CLOUDSDK_", "TPU_"))}
        environment |= {"PATH": f"{self.folder}:{os.environ['PATH']}", "PYTHON": sys.executable} | variables
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


def main(folder: Path, argv: list[str]) -> int:
    with (folder / "calls").open("a") as calls:
        calls.write(json.dumps(argv) + "\n")
    world = World(folder)
    try:
        name, given = parse(argv)
        if argv[0] == "gcloud":
            sys.stdout.write(world.gcloud(name, given))
        else:
            sys.stdout.write(world.kubectl(name, given))
        return 0
    except Refused as refused:
        shown = refused.args[0]
        if argv[0] == "gcloud" and not shown.startswith(("host ", "[")):
            shown = f"ERROR: (gcloud.{'.'.join(argv[1:5])}) {shown}"
        else:
            shown = f"error: {shown}"
        print(shown, file=sys.stderr)
        return 1
    finally:
        world.save()


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
