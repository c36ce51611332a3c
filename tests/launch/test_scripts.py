"""What runs on the hosts, what is in launch/tpu.env, and that the scripts are sound."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from dreamllm_jax.common.exits import HUNG, PREEMPTED
from dreamllm_jax.parallel.compilation import TPU_OPTIONS

ROOT = Path(__file__).parent.parent.parent
HOST = ROOT / "launch" / "host"
SCRIPTS = sorted((ROOT / "launch").rglob("*.sh"))


def test_shellcheck_finds_nothing():
    shellcheck = shutil.which("shellcheck") or Path(sys.executable).parent / "shellcheck"
    command = [shellcheck, "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert len(SCRIPTS) > 8 and done.returncode == 0, done.stdout + done.stderr


def test_the_service():
    text = (HOST / "dreamllm.service").read_text()
    assert f"RestartForceExitStatus={PREEMPTED} {HUNG}\n" in text and "\nRestart=no\n" in text
    if shutil.which("systemd-analyze"):
        done = subprocess.run(
            ["systemd-analyze", "verify", HOST / "dreamllm.service"], capture_output=True, text=True, check=False
        )
        assert "dreamllm.service:" not in done.stderr, done.stderr


def test_environment():
    """It is read alike by Bash and by launch/shell.py; every variable has its reason above it."""
    text = (ROOT / "launch" / "tpu.env").read_text()
    program = f"set -a; source {ROOT}/launch/tpu.env; env -0"
    shell = subprocess.run(["env", "-i", "bash", "-c", program], capture_output=True, text=True, check=True)
    sourced = dict(one.split("=", 1) for one in shell.stdout.split("\0") if one)
    program = "import json; from launch.shell import read_environment; print(json.dumps(read_environment()))"
    read = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    variables = json.loads(read.stdout)
    assert variables and variables.items() <= sourced.items()
    for name in variables:
        assert re.search(rf"^#.*\n{name}=", text, re.MULTILINE), name
    assert not [option for option in TPU_OPTIONS if option in text], "compilation.py passes it already"


@pytest.mark.slow
def test_libtpu_knows_its_flags():
    """An unknown one would end the program on every host."""
    pytest.importorskip("libtpu")
    program = (
        "from launch.shell import read_environment; import os; os.environ |= read_environment()\n"
        "from jax.experimental import topologies\n"
        "print(len(topologies.get_topology_desc(platform='tpu', topology_name='v5e:2x2').devices))"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    for flag, expected in (("", "4\n"), ("--xla_tpu_no_such_flag=1", "")):
        changed = program.replace("\nfrom jax", f"; os.environ['LIBTPU_INIT_ARGS'] += ' {flag}'\nfrom jax")
        done = subprocess.run(
            [sys.executable, "-c", changed], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
        )
        assert done.stdout == expected, done.stderr


@pytest.fixture
def host(tmp_path):
    """A host's /opt/dreamllm_jax, with systemctl and Python's installers played."""
    home, programs = tmp_path / "home", tmp_path / "bin"
    shutil.copytree(ROOT / "launch", home / "launch")
    programs.mkdir()
    (tmp_path / "show").touch()
    played = {
        "systemctl": f'echo "systemctl $*" >> {tmp_path}/calls; [[ $1 != show ]] || cat {tmp_path}/show',
        "python3": f'echo "python3 $*" >> {tmp_path}/calls; [[ "$*" != *"$FAILING"* ]]',
        "hostname": "echo t1v-n-1-w-3",
    }
    for name, body in played.items():
        (programs / name).write_text(f"#!/bin/bash\n{body}\n")
        (programs / name).chmod(0o755)

    def run(script: str, *words: str, show: str = "", failing: str = "nothing"):
        (tmp_path / "calls").write_text("")
        (tmp_path / "show").write_text("".join(f"{line}\n" for line in show.split()))
        places = {"UNITS": str(tmp_path), "HUGEPAGES": str(tmp_path / "hugepages"), "FAILING": failing}
        places["MARK"] = str(tmp_path / "mark")
        environment = os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"} | places
        command = ["bash", str(home / "launch" / "host" / script), *words]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        return done, (tmp_path / "calls").read_text().splitlines()

    run.home = home
    return run


RUNNING = "ActiveState=active SubState=running ExecMainStatus=0 NRestarts=2"


@pytest.mark.parametrize(
    ("show", "state"),
    [
        ("ActiveState=inactive SubState=dead ExecMainStatus=0 NRestarts=0", "absent status=0 restarts=0"),
        ("", "absent status=0 restarts=0"),  # the unit is not installed
        (RUNNING, "running status=0 restarts=2"),
        ("ActiveState=activating SubState=auto-restart ExecMainStatus=75 NRestarts=1", "running status=75 restarts=1"),
        ("ActiveState=deactivating SubState=stop-sigterm ExecMainStatus=0 NRestarts=0", "running status=0 restarts=0"),
        ("ActiveState=active SubState=exited ExecMainStatus=0 NRestarts=3", "finished status=0 restarts=3"),
        ("ActiveState=failed SubState=failed ExecMainStatus=75 NRestarts=0", "stopped status=75 restarts=0"),
        ("ActiveState=failed SubState=failed ExecMainStatus=1 NRestarts=0", "failed status=1 restarts=0"),
    ],
)
def test_state_of_a_host(host, show, state):
    done, _ = host("state.sh", show=show)
    assert done.stdout == f"dreamllm_jax host=t1v-n-1-w-3 state={state} said=\n", done.stderr
    (host.home / "run.log").write_text("step 1\nstep 2: loss=1.5\n")
    done, _ = host("state.sh", show=show)
    assert done.stdout.endswith(" said=step 2: loss=1.5\n")


def test_a_run_that_was_stopped_before_it_could_save_is_not_absent(host):
    """systemd forgets units that have ended well: only the mark, which a boot removes, says that it was started."""
    assert "state=absent" in host("state.sh")[0].stdout
    host("start.sh", "true")
    assert "state=stopped" in host("state.sh")[0].stdout
    (host.home.parent / "mark").unlink()
    assert "state=absent" in host("state.sh")[0].stdout


def test_setup_of_a_host(host, tmp_path):
    done, calls = host("setup.sh")
    assert done.returncode == 0 and done.stdout == "host t1v-n-1-w-3: ready\n", done.stderr
    assert [call for call in calls if "show" not in call] == [
        "python3 -m pip install --quiet --disable-pip-version-check uv",
        "python3 -m uv venv --quiet --allow-existing --python=3.12 venv",
        "python3 -m uv pip install --quiet --python=venv/bin/python .[tpu]",
        "systemctl daemon-reload",
    ]
    assert (tmp_path / "hugepages").read_text() == "always\n" and (tmp_path / "dreamllm.service").exists()


def test_a_setup_that_fails_says_where(host):
    done, calls = host("setup.sh", failing="uv pip install")
    assert done.returncode == 1 and "systemctl daemon-reload" not in calls
    assert "error: host t1v-n-1-w-3: setup failed at: bash launch/host/environment.sh\n" in done.stderr


def test_a_run_in_progress_is_left_alone(host):
    done, calls = host("start.sh", "true", show=RUNNING)
    assert done.returncode == 1 and all("show" in call for call in calls)
    assert "error: host t1v-n-1-w-3: a run is in progress there; stop it first\n" in done.stderr


def test_start_keeps_the_words(host):
    words = ["printf", "<%s>\\n", "a b", "('c', \"d\")", "$HOME", ""]
    done, calls = host("start.sh", *words)
    assert done.returncode == 0 and calls[-1] == "systemctl restart dreamllm", done.stderr
    said = subprocess.run(["bash", host.home / "command.sh"], capture_output=True, text=True, check=True).stdout
    assert said.splitlines() == ["<a b>", "<('c', \"d\")>", "<$HOME>", "<>"]


def test_what_the_image_is_made_of():
    """Nothing is copied that a commit does not have, and the extra that is installed exists."""
    text = (ROOT / "launch" / "Dockerfile").read_text()
    assert re.findall(r"^COPY (.*)$", text, re.MULTILINE) == [". ."]
    assert '".[tpu]"' in text and re.search(r'^ +"tpu": \[', (ROOT / "setup.py").read_text(), re.MULTILINE)


def test_skypilot():
    yaml = pytest.importorskip("yaml")
    task = yaml.safe_load((ROOT / "launch" / "skypilot.yaml").read_text())
    recovery = task["resources"]["job_recovery"]
    assert recovery["recover_on_exit_codes"] == [PREEMPTED, HUNG] and task["resources"]["use_spot"] is True
    for name in ("setup", "run"):
        subprocess.run(["bash", "-n", "-c", task[name]], check=True)
        for file in re.findall(r"launch/[\w./]+", task[name]):
            assert (ROOT / file).exists(), file
    used = set(re.findall(r"\$(\w+)", task["run"]))
    assert used == set(task["envs"])
