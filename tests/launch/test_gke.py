"""The JobSet of a run, and whole lives of it: what Kubernetes' and JobSet's documented rules make of its policies."""

import json
import re
import shlex
import sys

import pytest

from tests.launch.cloud import Cloud

WORKDIR = "--workdir=gs://bucket/run"
COMMAND = ["python", "-m", "dreamllm_jax.train", "--config=configs/stage2_igpt.py", WORKDIR, "--config.a=('b', 'c d')"]

# The part of JobSet's API v1alpha2 and of the Kubernetes types in it that a run may use; nothing else passes.
# https://jobset.sigs.k8s.io/docs/reference/jobset.v1alpha2/, https://kubernetes.io/docs/reference/kubernetes-api/
_RESOURCES = {"requests": {str: int}, "limits": {str: int}}
_CONTAINER = {
    "name*": str,
    "image*": str,
    "command": [str],
    "env": [{"name*": str, "value": str}],
    "resources": _RESOURCES,
}
_POD = {
    "restartPolicy": {"Never", "OnFailure"},
    "nodeSelector": {str: str},
    "terminationGracePeriodSeconds": int,
    "hostNetwork": bool,
    "shareProcessNamespace": bool,
    "dnsPolicy": {"ClusterFirst", "ClusterFirstWithHostNet"},
    "serviceAccountName": str,
    "tolerations": [{"key": str, "operator": {"Equal", "Exists"}, "value": str, "effect": {"NoSchedule"}}],
    "containers*": [_CONTAINER],
}
_RULE = {
    "action*": {"FailJob", "Ignore", "Count", "FailIndex"},
    "onExitCodes": {"operator*": {"In", "NotIn"}, "values*": [int], "containerName": str},
    "onPodConditions": [{"type*": str, "status*": {"True", "False", "Unknown"}}],
}
_JOB = {
    "parallelism": int,
    "completions": int,
    "completionMode": {"Indexed", "NonIndexed"},
    "backoffLimit": int,
    "podFailurePolicy": {"rules*": [_RULE]},
    "template*": {"metadata": {"labels": {str: str}}, "spec": _POD},
}
_ACTIONS = {"FailJobSet", "RestartJobSet", "RestartJobSetAndIgnoreMaxRestarts"}
_REASONS = {"BackoffLimitExceeded", "DeadlineExceeded", "FailedIndexes", "MaxFailedIndexesExceeded", "PodFailurePolicy"}
_AGAIN = {"name*": str, "action*": _ACTIONS, "onJobFailureReasons": [_REASONS], "targetReplicatedJobs": [str]}
SCHEMA = {
    "apiVersion*": {"jobset.x-k8s.io/v1alpha2"},
    "kind*": {"JobSet"},
    "metadata*": {"name*": str, "labels": {str: str}, "annotations": {str: str}},
    "spec*": {
        "failurePolicy": {"maxRestarts": int, "rules": [_AGAIN]},
        "replicatedJobs": [{"name*": str, "replicas": int, "template*": {"spec": _JOB}}],
        "ttlSecondsAfterFinished": int,
    },
}


def check(value, schema, where=""):
    """Fails with the place of what the schema does not know, lacks, or has in another type."""
    if isinstance(schema, type):
        assert type(value) is schema, f"{where}: {value!r}"
    elif isinstance(schema, set):
        assert value in schema, f"{where}: {value!r}"
    elif isinstance(schema, list):
        assert isinstance(value, list) and value, f"{where}: {value!r}"
        for index, one in enumerate(value):
            check(one, schema[0], f"{where}[{index}]")
    elif str in schema:
        for key, one in value.items():
            check(key, str, where)
            check(one, schema[str], f"{where}.{key}")
    else:
        known = {key.rstrip("*"): one for key, one in schema.items()}
        assert value.keys() <= known.keys(), f"{where} has {value.keys() - known.keys()}"
        missing = {key[:-1] for key in schema if key.endswith("*")} - value.keys()
        assert not missing, f"{where} lacks {missing}"
        for key, one in value.items():
            check(one, known[key], f"{where}.{key}")


@pytest.fixture
def launch(checkout, tmp_path):
    def launch(action, *flags, lives=(), command=(), cloud=None, name="mine"):
        cloud = cloud or Cloud(tmp_path / "cloud", lives)
        words = [sys.executable, str(checkout / "launch" / "gke.py"), action, f"--name={name}", *flags]
        return cloud, cloud.run(words + ["--", *command] * bool(command))

    return launch


APPLY = ["--topology=v5p-16x2", "--image=registry/image:1"]


@pytest.mark.parametrize(
    ("topology", "accelerator", "shape", "slices", "hosts", "chips"),
    [
        ("v4-8", "tpu-v4-podslice", "2x2x1", 1, 1, 4),
        ("v5e-8", "tpu-v5-lite-podslice", "2x4", 1, 1, 8),
        ("v5e-16", "tpu-v5-lite-podslice", "4x4", 1, 4, 4),
        ("v5p-1024", "tpu-v5p-slice", "8x8x8", 1, 128, 4),
        ("v6e-256x4", "tpu-v6e-slice", "16x16", 4, 64, 4),
    ],
)
@pytest.mark.parametrize("flags", [[], ["--spot", "--queue=q"], ["--reservation=r", "--service_account=s"]])
def test_jobset(launch, topology, accelerator, shape, slices, hosts, chips, flags):
    _, done = launch("manifest", f"--topology={topology}", "--image=i", *flags, command=COMMAND)
    assert done.returncode == 0, done.stderr
    jobset = json.loads(done.stdout)
    check(jobset, SCHEMA)
    (replicated,) = jobset["spec"]["replicatedJobs"]
    job = replicated["template"]["spec"]
    pod = job["template"]["spec"]
    assert replicated["replicas"] == slices and job["completions"] == job["parallelism"] == hosts
    (container,) = pod["containers"]
    assert container["command"] == COMMAND and container["resources"]["limits"] == {"google.com/tpu": chips}
    assert {"name": "JAX_COORDINATOR_PORT", "value": "8476"} in container["env"]
    where = {
        "cloud.google.com/gke-tpu-accelerator": accelerator,
        "cloud.google.com/gke-tpu-topology": shape,
        **({"cloud.google.com/gke-spot": "true"} if "--spot" in flags else {}),
        **({"cloud.google.com/reservation-name": "r"} if "--reservation=r" in flags else {}),
    }
    assert pod["nodeSelector"] == where
    # The longest name of a pod is a DNS label, which JobSet's webhook checks too.
    assert re.fullmatch(r"[a-z][-a-z0-9]{0,62}", f"mine-slice-{slices - 1}-{hosts - 1}-abcde")


def test_the_schema_is_strict(launch):
    _, done = launch("manifest", *APPLY, command=COMMAND)
    for path, wrong in (
        (["spec", "replicas"], 1),
        (["spec", "failurePolicy", "rules", 0, "action"], "Restart"),
        (["spec", "replicatedJobs", 0, "template", "spec", "parallelism"], "2"),
        (["spec", "replicatedJobs", 0, "template", "spec", "podFailurePolicy", "rules", 0, "action"], None),
    ):
        jobset = json.loads(done.stdout)
        inner = jobset
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = wrong
        with pytest.raises(AssertionError, match=re.escape(str(path[-1]))):
            check(jobset, SCHEMA)


def looks(launch, cloud, count):
    lines = []
    for _ in range(count):
        _, done = launch("status", cloud=cloud)
        assert done.returncode == 0, done.stderr
        lines.append(done.stdout.splitlines())
    return lines


def attempt(ends, waits=0):
    return {"waits": waits, "runs": 1, "ends": ends}


def test_queued_running_preempted_recreated_resumed_finished(launch):
    lives = [attempt("disrupted", waits=1), attempt(75), attempt(76), attempt(75), attempt("disrupted"), attempt(0)]
    cloud, done = launch("apply", *APPLY, "--retries=0", lives=lives, command=COMMAND)
    assert done.returncode == 0, done.stderr
    seen = looks(launch, cloud, 13)
    assert seen[0][0] == "mine: Waiting, started again 0 times"
    assert (
        seen[0][1]
        == "host mine-slice-0-0-abcde: Pending: Unschedulable: 0/9 nodes are available: 9 Insufficient google.com/tpu."
    )
    assert seen[1][0] == "mine: Running, started again 0 times" and len(seen[1]) == 1 + 4
    assert seen[-1][0] == "mine: Completed, started again 5 times (it is over)"
    assert seen[-1][1] == "host mine-slice-0-0-abcde: Succeeded with status 0"
    assert cloud.verbs == ["apply"]  # the cluster did the rest


@pytest.mark.parametrize("retries", [0, 2])
def test_other_failures_are_limited(launch, retries):
    """Preemptions between them do not count."""
    lives = [one for _ in range(retries) for one in (attempt(1), attempt("disrupted"), attempt(75))] + [attempt(134)]
    cloud, _ = launch("apply", *APPLY, f"--retries={retries}", lives=lives, command=COMMAND)
    last = looks(launch, cloud, 2 * len(lives) + 1)[-1]
    assert last[0] == f"mine: Failed, started again {3 * retries} times (it is over)"
    assert last[1] == "host mine-slice-0-0-abcde: Failed with status 134"


def test_a_run_that_has_ended_is_applied_again(launch):
    """JobSets that have ended stay for a week; kubectl would leave such a one as it is."""
    cloud, _ = launch("apply", *APPLY, "--retries=0", lives=[attempt(1), attempt(0)], command=COMMAND)
    assert looks(launch, cloud, 3)[-1][0].startswith("mine: Failed")
    _, done = launch("apply", *APPLY, cloud=cloud, command=COMMAND)
    assert done.returncode == 0 and "mine has ended; it is removed" in done.stdout
    assert cloud.verbs == ["apply", "delete", "apply"]
    assert looks(launch, cloud, 1)[-1][0] == "mine: Running, started again 0 times"
    _, done = launch("apply", *APPLY, cloud=cloud, command=COMMAND)  # one that runs is left alone
    assert cloud.verbs[3:] == ["apply"]


def test_quota_is_told(launch):
    quota = (
        "Error from server (Forbidden): exceeded quota: tpus, requested: google.com/tpu=16, limited: google.com/tpu=8"
    )
    cloud, done = launch("apply", *APPLY, lives=[{"refused": quota}], command=COMMAND)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].endswith(quota) and cloud.state["jobset"] is None


def test_a_host_without_its_image_is_named(launch):
    cloud, _ = launch("apply", *APPLY, lives=[attempt(0) | {"setup": 1}], command=COMMAND)
    ((first, *hosts),) = looks(launch, cloud, 1)
    assert first == "mine: Running, started again 0 times"
    assert hosts[1] == "host mine-slice-0-1-abcde: Pending: ImagePullBackOff: Back-off pulling image"


def test_logs_and_delete(launch):
    cloud, _ = launch("apply", *APPLY, lives=[attempt(0)], command=COMMAND)
    _, done = launch("logs", cloud=cloud)
    assert done.returncode == 0 and "[pod/mine-slice-0-0-abcde/host] step 1" in done.stdout
    _, done = launch("delete", cloud=cloud)
    assert done.returncode == 0 and cloud.state["jobset"] is None
    _, done = launch("status", cloud=cloud)
    assert done.returncode == 1 and 'error: Error from server (NotFound): jobsets.jobset.x-k8s.io "mine"' in done.stderr


def test_dry_run_prints_what_would_be_executed(launch):
    cloud, done = launch("apply", *APPLY, "--spot", "--dry-run", lives=[attempt(0)], command=COMMAND)
    assert done.returncode == 0 and not cloud.calls, done.stderr
    assert cloud.run(["bash", "-c", done.stdout]).returncode == 0
    assert cloud.calls == [["kubectl", "apply", "--filename=-", "--namespace=default"]]
    _, manifest = launch("manifest", *APPLY, "--spot", command=COMMAND, cloud=cloud)
    assert cloud.state["jobset"]["manifest"] == json.loads(manifest.stdout)
    for action in ("status", "logs", "delete"):
        _, done = launch(action, "--dry-run", cloud=cloud)
        assert done.stdout and all(shlex.split(line)[0] == "kubectl" for line in done.stdout.splitlines())
    assert len(cloud.calls) == 1


@pytest.mark.parametrize(
    ("flags", "options", "message"),
    [
        (["--image=i"], {"command": COMMAND}, "give --topology=..., or set TOPOLOGY"),
        (["--topology=v4-8"], {"command": COMMAND}, "give --image=..., or set IMAGE: image with this project"),
        (APPLY, {}, "give the command after --"),
        (APPLY, {"command": ["python", "--workdir=run"]}, "--workdir=run would be another directory on each host"),
        (APPLY, {"command": COMMAND, "name": "My_run"}, "--name=My_run: at most 40 lower-case letters"),
        (APPLY, {"command": COMMAND, "name": "a" * 41}, "at most 40 lower-case letters"),
        ([*APPLY, "--retries=-1"], {"command": COMMAND}, "--retries must not be negative"),
        (["--topology=v3-8", "--image=i"], {"command": COMMAND}, "no chip 'v3': there are v4, v5e, v5p, v6e"),
    ],
)
def test_errors_are_one_line(launch, flags, options, message):
    cloud, done = launch("apply", *flags, **options)
    assert done.returncode in (1, 2) and not cloud.calls
    (error,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert message in error
