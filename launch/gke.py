"""Trains on TPU slices of a GKE cluster: writes the JobSet of a run, and hands it to kubectl.

    python launch/gke.py apply --name=mine --topology=v5p-128x2 --image=IMAGE --spot -- \\
        python -m dreamllm_jax.train --config=configs/stage2_igpt.py:7b --workdir=gs://bucket/run \\
        --config.parameters.init_from=gs://bucket/stage1 --config.data.path=gs://bucket/data

The JobSet starts all hosts together, and again after a preemption and on status 75 and 76, as often as needed; after
other failures at most --retries times. `manifest` prints it (JSON, which is YAML too) for whoever keeps such files.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # from a checkout that is not installed

from dreamllm_jax.common.exits import HUNG, PREEMPTED
from dreamllm_jax.parallel.chips import find_topology
from launch.shell import Failed, Shell, add_required, check_workdir, parse, read_environment

# What GKE calls the chips: https://cloud.google.com/kubernetes-engine/docs/concepts/plan-tpus
ACCELERATORS = {
    "v4": "tpu-v4-podslice",
    "v5e": "tpu-v5-lite-podslice",
    "v5p": "tpu-v5p-slice",
    "v6e": "tpu-v6e-slice",
}
OF_JOBSET = "jobset.sigs.k8s.io/jobset-name"
FIRST_HOST = "jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0"


def make_jobset(arguments: argparse.Namespace, command: list[str]) -> dict[str, Any]:
    """The JobSet that the command line describes: a Job a slice, a pod a host.

    Raises:
      ValueError: a name or a slice that the cluster would refuse.
    """
    topology = find_topology(arguments.topology)
    # Of a pod: NAME-slice-INDEX-INDEX-xxxxx, at most 63 characters.
    if not re.fullmatch(r"[a-z]([-a-z0-9]{0,38}[a-z0-9])?", arguments.name):
        raise ValueError(f"--name={arguments.name}: at most 40 lower-case letters, digits and -, first a letter")
    if arguments.retries < 0:
        raise ValueError("--retries must not be negative")
    hosts = topology.hosts // topology.slices
    chips = {"google.com/tpu": topology.chips_per_host}
    where = {
        "cloud.google.com/gke-tpu-accelerator": ACCELERATORS[topology.chip.kind],
        "cloud.google.com/gke-tpu-topology": topology.shape,
    }
    pod = {
        "restartPolicy": "Never",  # the hosts start together or not at all
        "nodeSelector": where,
        "terminationGracePeriodSeconds": 900,  # to save; a spot machine grants less
        # Slices talk over the hosts' own network, without a detour through the pods'.
        "hostNetwork": True,
        # The first process of a container ignores signals that it has no handler for, as Python has none at first.
        "shareProcessNamespace": True,
        "dnsPolicy": "ClusterFirstWithHostNet",
        "containers": [
            {
                "name": "host",
                "image": arguments.image,
                "command": command,
                "env": [{"name": key, "value": value} for key, value in read_environment().items()],
                "resources": {"requests": chips, "limits": chips},
            }
        ],
    }
    metadata: dict[str, Any] = {
        "name": arguments.name,
        # A slice is a node pool; each Job has one to itself.
        "annotations": {"alpha.jobset.sigs.k8s.io/exclusive-topology": "cloud.google.com/gke-nodepool"},
    }
    if arguments.spot:
        where["cloud.google.com/gke-spot"] = "true"
        pod["tolerations"] = [{"key": "cloud.google.com/gke-spot", "operator": "Equal", "value": "true"}]
    if arguments.reservation:
        where["cloud.google.com/reservation-name"] = arguments.reservation
    if arguments.service_account:
        pod["serviceAccountName"] = arguments.service_account
    if arguments.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": arguments.queue}
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,  # one host less, and the slice cannot go on
        # These end the Job with the reason PodFailurePolicy, others with BackoffLimitExceeded.
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onPodConditions": [{"type": "DisruptionTarget", "status": "True"}]},
                {"action": "FailJob", "onExitCodes": {"operator": "In", "values": [PREEMPTED, HUNG]}},
            ]
        },
        "template": {"spec": pod},
    }
    again = {
        "name": "again",
        "action": "RestartJobSetAndIgnoreMaxRestarts",
        "onJobFailureReasons": ["PodFailurePolicy"],
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {"maxRestarts": arguments.retries, "rules": [again]},
            "replicatedJobs": [{"name": "slice", "replicas": topology.slices, "template": {"spec": job}}],
            "ttlSecondsAfterFinished": 7 * 24 * 3600,  # until then it can be looked at
        },
    }


def describe(jobset: dict[str, Any], pods: list[dict[str, Any]]) -> list[str]:
    """The state of a run in lines: how it is, then each host."""
    status = jobset.get("status", {})
    conditions = [one for one in status.get("conditions", []) if one["status"] == "True"]
    why = f" ({conditions[-1]['message']})" if conditions and conditions[-1].get("message") else ""
    state = status.get("terminalState") or ("Running" if any(_phase(pod) == "Running" for pod in pods) else "Waiting")
    lines = [f"{jobset['metadata']['name']}: {state}, started again {status.get('restarts', 0)} times{why}"]
    for pod in sorted(pods, key=lambda pod: pod["metadata"]["name"]):
        lines.append(f"host {pod['metadata']['name']}: {_phase(pod)}{_detail(pod['status'])}")
    return lines


def _detail(status: dict[str, Any]) -> str:
    """How a pod ended, or what it waits for: a place, its image."""
    container = next(iter(status.get("containerStatuses", [])), {}).get("state", {})
    if "terminated" in container:
        return f" with status {container['terminated']['exitCode']}"
    waits = [container["waiting"]] if "waiting" in container else []
    waits += [one for one in status.get("conditions", []) if one.get("reason") == "Unschedulable"]
    return "".join(f": {one['reason']}: {one.get('message', '')}".rstrip(": ") for one in waits)


def _phase(pod: dict[str, Any]) -> str:
    return pod["status"].get("phase", "Pending")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="action", required=True)
    told = {
        "manifest": "print the JobSet of the command that stands after --",
        "apply": "hand it to the cluster",
        "status": "tell the state of the run and of its hosts",
        "logs": "follow the first host's log, or --all hosts'",
        "delete": "let the run save and end, and remove it",
    }
    for action, help in told.items():
        command = commands.add_parser(action, help=help, description=help)
        command.add_argument("--namespace", default="default")
        command.add_argument("--dry-run", action="store_true", help="print the commands instead")
        add_required(command, "--name", "RUN_NAME", "name of the run in the cluster")
        command.set_defaults(takes_command=action in ("manifest", "apply"))
        if action in ("manifest", "apply"):
            add_required(command, "--topology", "TOPOLOGY", "as v5p-128, or v5p-128x2 for two slices")
            add_required(command, "--image", "IMAGE", "image with this project, built with launch/Dockerfile")
            tier = command.add_mutually_exclusive_group()
            tier.add_argument("--spot", action="store_true", help="on spot machines")
            tier.add_argument("--reservation", default="", help="on machines of this reservation")
            command.add_argument("--service_account", default="", help="Kubernetes service account of the pods")
            command.add_argument("--queue", default="", help="Kueue's LocalQueue")
            command.add_argument("--retries", type=int, default=3, help="after failures of other kinds (3)")
        if action == "logs":
            command.add_argument("--all", action="store_true", help="of all hosts, each line with its host's name")
    return parser


def main(argv: list[str]) -> None:
    arguments, command = parse(make_parser(), argv)
    check_workdir(command)
    shell, name, namespace = Shell(arguments.dry_run), arguments.name, f"--namespace={arguments.namespace}"
    try:
        match arguments.action:
            case "manifest":
                print(json.dumps(make_jobset(arguments, command), indent=2))
            case "apply":
                manifest = json.dumps(make_jobset(arguments, command), indent=2)
                look = ["kubectl", "get", "jobset", name, "--ignore-not-found", "--output=json", namespace]
                there = "" if arguments.dry_run else shell.read(look)
                if there and json.loads(there).get("status", {}).get("terminalState"):
                    print(f"{name} has ended; it is removed, and the command continues its run", flush=True)
                    shell.run(["kubectl", "delete", "jobset", name, namespace])
                shell.run(["kubectl", "apply", "--filename=-", namespace], given=manifest + "\n")
            case "status":
                pods = ["kubectl", "get", "pods", f"--selector={OF_JOBSET}={name}", "--output=json", namespace]
                jobset = shell.read(["kubectl", "get", "jobset", name, "--output=json", namespace])
                found = shell.read(pods)
                if jobset:
                    print("\n".join(describe(json.loads(jobset), json.loads(found)["items"])))
            case "logs":
                which = f"{OF_JOBSET}={name}" + ("" if arguments.all else f",{FIRST_HOST}")
                follow = ["--follow", "--tail=100", "--prefix", "--max-log-requests=1024"]
                shell.follow(["kubectl", "logs", f"--selector={which}", *follow, namespace])
            case "delete":
                shell.run(["kubectl", "delete", "jobset", name, namespace])
    except ValueError as error:
        sys.exit(f"error: {error}")
    except Failed as failed:
        sys.exit(f"error: {(failed.said.strip().splitlines() or [failed])[-1]}")
    except KeyboardInterrupt:
        sys.exit("\nthe run goes on in the cluster")


if __name__ == "__main__":
    main(sys.argv[1:])
