"""Whole lives of training runs on Cloud TPU VMs, from the request to the end, as a stand-in for gcloud plays them."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launch.cloud import Cloud, Refused, parse

WORKDIR = "--workdir=gs://bucket/run"
COMMAND = ["python", "-m", "dreamllm_jax.train", "--config=configs/stage2_igpt.py", WORKDIR, "--config.a=('b', 'c d')"]
RUNS = {"waits": 1, "runs": 2, "ends": "finished"}
STEPS = ["scp", "mkdir", "setup", "start"]


@pytest.fixture
def launch(checkout, tmp_path):
    """Runs launch/tpu_vm.sh in a cloud with these lives."""

    def launch(action, *flags, lives=(), command=(), topology="v5p-16", cloud=None, where=True):
        cloud = cloud or Cloud(tmp_path / "cloud", lives)
        words = ["bash", str(checkout / "launch" / "tpu_vm.sh"), action, *flags]
        words += ["--name=mine", f"--topology={topology}"] + ["--project=p", "--zone=z"] * where
        words += ["--poll=0"] * (action == "keep") + ["--", *command] * bool(command)
        return cloud, cloud.run(words)

    return launch


@pytest.fixture
def keep(launch):
    def keep(*lives, flags=(), **options):
        return launch("keep", *flags, lives=lives, command=COMMAND, **options)

    return keep


def test_queued_running_preempted_recreated_resumed_finished(keep):
    lost = {"waits": 1, "runs": 1, "ends": "preempted"}
    lives = [lost | {"waits": 2, "runs": 2}, lost | {"silent": True}, RUNS]
    cloud, done = keep(*lives, flags=["--spot"], topology="v5p-16x2")
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STEPS, "delete", "create", *STEPS, "delete", "create", *STEPS, "delete"]
    assert cloud.state["started"] == [COMMAND] * 3 and cloud.state["request"] is None
    lines = [line.split(": ", 1)[1] for line in done.stdout.splitlines()]
    unreachable = "ERROR: (gcloud.compute.tpus.tpu-vm.describe) NOT_FOUND: mine-0 was deleted"
    assert lines[:5] == [
        "asking for slices",
        "WAITING_FOR_RESOURCES",
        "starting",
        "4 of 4 hosts run, started again 0 times",
        f"cannot be reached, and is asked again: {unreachable}",
    ]
    assert "SUSPENDED: asking again" in lines and lines[-1] == "finished"


def test_a_deletion_that_is_not_answered_is_asked_for_again(keep):
    lost = {"waits": 1, "runs": 1, "ends": "preempted", "unavailable": 2}
    cloud, done = keep(lost, RUNS)
    assert done.returncode == 0, done.stderr
    assert "queued-resources.delete) UNAVAILABLE: The service is currently unavailable." in done.stdout
    assert cloud.state["request"] is None and cloud.state["started"] == [COMMAND] * 2


def test_answers_that_are_lost_cost_no_slices(keep):
    """A request that was heard is not made twice, and a run that has finished gets no new slices."""
    unheard = {"refused": "UNAVAILABLE: The service is currently unavailable."}
    cloud, done = keep(unheard, RUNS | {"lost": ["create", "start", "delete"]})
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", "create", *STEPS, "delete"] and cloud.state["request"] is None


def test_slices_that_are_taken_away_during_the_setup_are_asked_for_again(keep):
    taken = {"waits": 1, "runs": 0, "ends": "preempted", "silent": True, "taken": True}
    cloud, done = keep(taken, RUNS)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STEPS[:3], "delete", "create", *STEPS, "delete"]


def test_no_room_is_asked_for_again(keep):
    no_room = 'There is no more capacity in the zone "z"; you can try in another zone [EID: 0x1]'
    cloud, done = keep({"refused": no_room}, {"failed": "Insufficient reserved capacity."}, RUNS)
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", "create", "delete", "create", *STEPS, "delete"]


QUOTA = "RESOURCE_EXHAUSTED: Quota limit 'TPUV5sPerProjectPerZoneForTPUAPI' has been exceeded. Limit: 0 in zone z."


@pytest.mark.parametrize("how", ["refused", "failed"])
def test_quota_is_told_and_not_asked_for_again(keep, how):
    cloud, done = keep({how: QUOTA})
    assert done.returncode == 1
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert error.startswith("error: mine was refused: ") and QUOTA in error
    assert cloud.verbs == ["create"]


def test_a_host_that_fails_its_setup_is_named(keep):
    cloud, done = keep(RUNS | {"setup": 1})
    assert done.returncode == 1 and cloud.verbs == ["create", *["scp", "mkdir", "setup"] * 3]
    expected = "error: mine could not be started: host t1v-n-mine-w-1: setup failed at: python3 -m uv pip install"
    assert expected in done.stderr and "still there, and cost" in done.stderr


def test_a_run_that_fails_is_not_started_again(keep):
    cloud, done = keep({"waits": 0, "runs": 1, "ends": "failed"})
    assert done.returncode == 1 and cloud.verbs == ["create", *STEPS]
    assert "host t1v-n-mine-w-0: failed with status 1, started again 0 times: error: no room" in done.stdout
    assert "still there, and cost" in done.stdout


def test_a_host_that_was_booted_is_started_again(keep):
    cloud, done = keep({"waits": 0, "runs": 1, "ends": "absent"})
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STEPS, *STEPS, "delete"]


def test_keep_given_again_only_watches(launch, keep):
    cloud, done = launch("create", lives=[RUNS | {"waits": 0}])
    look(cloud)
    for action, command in (("setup", ()), ("run", COMMAND)):
        _, done = launch(action, cloud=cloud, command=command)
        assert done.returncode == 0, done.stderr
    _, done = launch("setup", cloud=cloud)
    assert done.returncode == 1
    assert "error: a run is in progress on t1v-n-mine-w-0: launch/tpu_vm.sh stop" in done.stderr
    _, done = keep(cloud=cloud, flags=["--no-delete"])
    assert done.returncode == 0, done.stderr
    assert cloud.verbs == ["create", *STEPS] and "finished" in done.stdout
    assert cloud.state["started"] == [COMMAND]


def look(cloud):
    """Time passes."""
    cloud.run(shlex.split("gcloud compute tpus queued-resources describe mine --project=p --zone=z"))


def test_stopped_by_hand_it_stays_stopped(keep):
    cloud, done = keep({"waits": 0, "runs": 1, "ends": "stopped"})
    assert done.returncode == 75 and cloud.verbs == ["create", *STEPS]
    assert "the same command continues it" in done.stdout


def test_status_logs_stop_and_delete(launch, tmp_path):
    cloud, _ = launch("create", lives=[{"waits": 0, "runs": 9, "ends": "finished"}], topology="v5p-16x2")
    look(cloud)
    for action, flags, expected in (
        ("setup", [], "host t1v-n-mine-1-w-1: ready"),
        ("run", [], ""),
        ("status", [], "slice mine-1: READY HEALTHY\nhost t1v-n-mine-0-w-0: running, started again 0 times: step 1"),
        ("logs", [], "the log of t1v-n-mine-0-w-0"),
        ("logs", [f"--to={tmp_path}/logs"], "mine-1/1.log"),
        ("stop", [], ""),
        ("status", [], "host t1v-n-mine-1-w-1: stopped"),
        ("delete", [], ""),
        ("status", [], "mine: MISSING"),
    ):
        command = COMMAND if action == "run" else ()
        _, done = launch(action, *flags, cloud=cloud, command=command, topology="v5p-16x2")
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout + done.stderr, (action, done.stdout, done.stderr)
    collected = {str(path.relative_to(tmp_path)): path.read_text() for path in (tmp_path / "logs").rglob("*.log")}
    hosts = [(slice, worker) for slice in range(2) for worker in range(2)]
    assert collected == {f"logs/mine-{i}/{j}.log": f"the log of t1v-n-mine-{i}-w-{j}\n" for i, j in hosts}


@pytest.mark.parametrize(
    ("topology", "asked"),
    [
        ("v4-8", "--node-id=mine --accelerator-type=v4-8 --runtime-version=tpu-ubuntu2204-base"),
        ("v5e-16", "--node-id=mine --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"),
        ("v5p-1024", "--node-id=mine --accelerator-type=v5p-1024 --runtime-version=v2-alpha-tpuv5"),
        (
            "v6e-256x4",
            "--node-count=4 --node-prefix=mine --accelerator-type=v6e-256 --runtime-version=v2-alpha-tpuv6e",
        ),
    ],
)
@pytest.mark.parametrize("tier", ["--spot", "--reserved", ""])
def test_dry_run_prints_what_would_be_executed(launch, topology, asked, tier):
    further = "--network=mine --subnetwork=mine --internal-ips --service-account=a@b"
    flags = ["--dry-run", f"--gcloud={further}", *([tier] if tier else [])]
    cloud, done = launch("keep", *flags, command=COMMAND, topology=topology)
    assert done.returncode == 0 and not cloud.calls, done.stderr
    lines = [shlex.split(line) for line in done.stdout.splitlines()]
    asking = f"gcloud compute tpus queued-resources create mine {asked} {tier} {further} --async --project=p --zone=z"
    assert lines[0] == asking.split()
    given = [parse(line)[1] for line in lines if line[0] == "gcloud"]  # which the real one would take
    assert [line[0] for line in lines if line[0] != "gcloud"] == ["git"]
    (start,) = [one.command for one in given if "start.sh" in getattr(one, "command", "")]
    assert shlex.split(start)[3:] == COMMAND
    # Pasted into a shell, they are what would have been executed.
    cloud.run(["bash", "-c", done.stdout])
    assert cloud.calls == [line for line in lines if line[0] == "gcloud"]


@pytest.mark.skipif(not shutil.which("gcloud"), reason="the real gcloud is not installed")
@pytest.mark.slow
def test_the_real_gcloud_understands(launch, tmp_path, monkeypatch):
    lines = []
    for action in ("keep", "logs", "stop"):
        flags = ["--to=logs"] * (action == "logs") + ["--spot", "--gcloud=--network=mine"] * (action == "keep")
        command = COMMAND if action == "keep" else ()
        _, done = launch(
            action, "--dry-run", *flags, command=command, topology="v5p-16x2", cloud=Cloud(tmp_path / action)
        )
        lines += [line for line in done.stdout.splitlines() if line.startswith("gcloud ")]
    assert len(lines) == 16
    monkeypatch.setenv("CLOUDSDK_CONFIG", str(tmp_path / "gcloud"))
    # The linter splits at blanks, whatever the quotes say: the remote commands become one word.
    plain = [[re.sub(r"(--command)=.*", r"\1=x", word, flags=re.DOTALL) for word in shlex.split(one)] for one in lines]
    for line in sorted({" ".join(words) for words in plain}):
        lint = ["gcloud", "meta", "lint-gcloud-commands", f"--command-string={line}"]
        done = subprocess.run(lint, capture_output=True, text=True, timeout=120, check=False)
        assert done.returncode == 0 and '"success": true' in done.stdout, f"{line}\n{done.stdout}{done.stderr}"


@pytest.mark.parametrize(
    ("action", "flags", "options", "message"),
    [
        ("create", [], {"where": False}, "give --project=..., or set CLOUDSDK_CORE_PROJECT"),
        ("create", [], {"topology": ""}, "give --topology=..., or set TOPOLOGY: as v5p-128"),
        ("create", [], {"topology": "v5p-100"}, "'v5p-100' is no slice of v5p: there are v5p-8,"),
        ("create", [], {"topology": "v7-8"}, "no chip 'v7'"),
        ("run", [], {}, "give the command after --"),
        (
            "keep",
            [],
            {"command": ["a", "--workdir=runs/a"]},
            "--workdir=runs/a would be another directory",
        ),
        ("keep", ["--commit=nothing"], {"command": COMMAND}, "git rev-parse"),
        ("setup", [], {"lives": [RUNS]}, "NOT_FOUND"),
    ],
)
def test_errors_are_one_line(launch, action, flags, options, message):
    cloud, done = launch(action, *flags, **options)
    assert done.returncode in (1, 2) and "Traceback" not in done.stderr
    (error,) = [line for line in done.stderr.splitlines() if "error: " in line]
    assert message in error, done.stderr
    assert not cloud.calls or action == "setup"


def test_what_is_not_committed_is_told(keep, checkout):
    (checkout / "new.py").touch()
    try:
        cloud, done = keep(RUNS)
    finally:
        (checkout / "new.py").unlink()
    assert done.returncode == 1 and not cloud.calls
    assert "error: not committed, and so not on the hosts: new.py; commit it, or name a --commit" in done.stderr


def test_without_gcloud(checkout):
    launch = [sys.executable, str(checkout / "launch" / "tpu_vm.py"), "status", "--name=mine", "--topology=v4-8"]
    environment = {"PATH": "/nowhere", "CLOUDSDK_CORE_PROJECT": "p", "CLOUDSDK_COMPUTE_ZONE": "z"}
    done = subprocess.run(launch, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (
        1,
        "error: gcloud is not installed on this machine (see docs/launch.md)\n",
    )


@pytest.mark.parametrize(
    "words",
    [
        "gcloud compute tpus queued-resources create mine --project=p --zone=z --node-id=mine",
        "gcloud compute tpus queued-resources create mine --project=p --zone=z --node-id=mine --node-count=2 "
        "--accelerator-type=v4-8 --runtime-version=x",
        "gcloud compute tpus queued-resources describe mine --project=p --zone=z --worker=all",
        "gcloud compute tpus queued-resources ssh mine --project=p --zone=z --worker=all",
        "gcloud compute tpus queued-resources list --project=p --zone=z",
        "gcloud compute tpus queued-resources delete mine --project=p --zone=z --forc",
        "gcloud compute tpus tpu-vm describe mine --project=p",
        "kubectl apply",
        "kubectl get pods --zone=z",
        "kubectl describe mine",
    ],
)
def test_the_stand_ins_are_strict(words):
    with pytest.raises(Refused):
        parse(words.split())


def test_no_jax_is_needed(checkout):
    """From a laptop that has nothing but Python and gcloud."""
    program = f"import sys; sys.path.insert(0, {str(checkout)!r}); import launch.tpu_vm, launch.gke, launch.local_pod"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert Path(checkout, "launch", "tpu_vm.py").exists()
