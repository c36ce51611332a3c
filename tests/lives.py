"""The lives of a training run: processes that train a very small model and can be killed at any moment.

They are forked from a server that has imported everything, so that a life begins in a second.
"""

import contextlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from types import MappingProxyType
from typing import NamedTuple

import jax
import orbax.checkpoint as ocp

from dreamllm_jax.checkpoints import steps as checkpoints
from dreamllm_jax.common import exits
from dreamllm_jax.data import loader
from dreamllm_jax.parallel import distributed
from dreamllm_jax.parallel.compilation import keep_programs
from dreamllm_jax.runs.start import start_run
from dreamllm_jax.training import loop
from dreamllm_jax.training.claim import Claim
from launch.local_pod import free_port
from tests.forks import SERVER

PHASES = ("start", "data", "step", "save", "restore")


def micro(path: str, **changes) -> dict:
    """A configuration whose steps take milliseconds, for the data set at `path`."""
    settings = {
        "model": {
            "language_model": {
                "kind": "llama",
                "vocab_size": 400,
                "hidden_size": 16,
                "intermediate_size": 16,
                "num_hidden_layers": 1,
                "num_attention_heads": 2,
                "num_key_value_heads": 2,
                "max_position_embeddings": 64,
            },
            "vision_encoder": {
                "kind": "clip",
                "hidden_size": 8,
                "intermediate_size": 8,
                "num_hidden_layers": 2,
                "num_attention_heads": 1,
                "image_size": 8,
                "patch_size": 4,
            },
            "image_decoder": {
                "kind": "stable_diffusion",
                "denoiser": {
                    "sample_size": 4,
                    "in_channels": 12,
                    "out_channels": 12,
                    "block_out_channels": [8],
                    "down_block_types": ["CrossAttnDownBlock2D"],
                    "up_block_types": ["CrossAttnUpBlock2D"],
                    "layers_per_block": 1,
                    "cross_attention_dim": 8,
                    "attention_head_dim": 1,
                    "norm_num_groups": 4,
                    "use_linear_projection": True,
                },
                "autoencoder": {"kind": "pixel", "patch_size": 2},
            },
            "num_queries": 2,
            "remat": "none",
        },
        "parameters": {
            "trainable": [["(language_model|dream_queries|visual_projector|connector)/.*", True], [".*", False]]
        },
        "data": {"path": path, "corpora": {"pairs": {}, "interleaved": {}}, "window": 4, "workers": 2},
        "rows": {"per_step": 8, "length": 32, "see_slots": 2, "dream_slots": 2, "dream_size": 8},
        "objective": {"kind": "joint", "drop_prob": 0.2, "image_chunk": 0},
        # With a large epsilon a step is proportional to the gradient, and rounding is not blown up.
        "optimizer": {"learning_rate": 1e-2, "warmup_ratio": 0.2, "eps": 0.1, "ema_decay": 0.9},
        "checkpoint": {"every": 5, "keep": 2},
        "steps": 60,
        "log_every": 4,
        "timeout": 0.0,
    }
    return settings | changes


class Host(NamedTuple):
    """One of several processes that train together."""

    port: int
    count: int
    index: int


def train(
    config: dict,
    workdir: str,
    devices: int,
    host: Host | None,
    fails_at: int,
    unreadable: int,
    interleaved: bool,
    patience: float,
    pause: float,
    slow_save: float,
    lingers: float,
    phase,
    told: str,
) -> None:
    """One life.

    Args:
      devices: how many this process simulates.
      fails_at: the batch that cannot be read; 0 for none.
      unreadable: the checkpoint that this process cannot read; 0 for none.
      interleaved: the mesh goes through the processes' devices in turns, as it does through those of TPU slices.
      patience: seconds that this process waits longer for a sign of another than is configured.
      pause: seconds that reading a batch takes longer, so that a run does not end before it is told to.
      slow_save: seconds for which a checkpoint that is written has not got its name yet.
      lingers: seconds by which this process ends later than it is done.
      phase: a shared integer that tells what it is doing.
      told: the file that receives what it says.
    """
    os.dup2(os.open(told, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    os.environ["XLA_FLAGS"] = " ".join([*flags, f"--xla_force_host_platform_device_count={devices}"])

    def during(name: str, function: Callable) -> Callable:
        def wrapped(*args, **kwargs):
            before, phase.value = phase.value, PHASES.index(name)
            try:
                return function(*args, **kwargs)
            finally:
                phase.value = before

        return wrapped

    read, batches = loader.Loader.__next__, itertools.count(1)

    def next_batch(loader):
        if next(batches) == fails_at:
            raise OSError("the disk is gone")
        time.sleep(pause)
        return read(loader)

    def read_arrays(directory, abstract, original=checkpoints._read):
        if directory.parent.name == str(unreadable):
            raise OSError(f"{directory} is out of reach")
        return original(directory, abstract)

    def name_checkpoint(manager, step, original=ocp.CheckpointManager._finalize_checkpoint):
        time.sleep(slow_save)
        return original(manager, step)

    checkpoints._read = read_arrays
    ocp.CheckpointManager._finalize_checkpoint = name_checkpoint
    loader.Loader.__next__ = during("data", next_batch)
    checkpoints.Checkpoints.save = during("save", checkpoints.Checkpoints.save)
    checkpoints.Checkpoints.restore = during("restore", checkpoints.Checkpoints.restore)
    make_mesh = loop.make_mesh

    def mesh_in_turns(config):
        return make_mesh(config, [device for start in range(devices) for device in jax.devices()[start::devices]])

    watchdog = loop.Watchdog
    loop.Watchdog = lambda timeout, silence: watchdog(timeout, silence + patience)
    if interleaved:
        loop.make_mesh = mesh_in_turns
    compiled = loop.train_step_of
    loop.train_step_of = lambda *given: during("step", compiled(*given))
    try:
        if host:
            distributed.start(f"localhost:{host.port}", host.count, host.index, 120)
        with Claim(workdir):
            run = start_run(config, workdir)
            keep_programs(run.workdir)
            loop.train(run.experiment, run.tokenizer, run.workdir, run.initial, run.record)
        time.sleep(lingers)
    except exits.Preempted as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(exits.PREEMPTED)
    finally:
        # Waits for the others, as a program does when it ends; those of multiprocessing do not before Python 3.13.
        # JAX aborts whoever is still there when the host with its service has gone.
        jax.distributed.shutdown()


class Life:
    """A running process."""

    def __init__(
        self,
        config: dict,
        workdir,
        devices: int = 2,
        host: Host | None = None,
        *,
        fails_at: int = 0,
        unreadable: int = 0,
        interleaved: bool = False,
        patience: float = 0.0,
        pause: float = 0.0,
        slow_save: float = 0.0,
        lingers: float = 0.0,
    ):
        self._phase = SERVER.Value("i", 0)
        self.told = f"{workdir}{host.index if host else ''}.log"
        given = (
            config,
            str(workdir),
            devices,
            host,
            fails_at,
            unreadable,
            interleaved,
            patience,
            pause,
            slow_save,
            lingers,
            self._phase,
            self.told,
        )
        self.process = SERVER.Process(target=train, args=given, daemon=True)
        self.process.start()

    @property
    def phase(self) -> str:
        return PHASES[self._phase.value]

    def wait_for(self, phase: str, timeout: float = 120) -> bool:
        """Waits until it is in this phase; False if it ended before."""
        limit = time.monotonic() + timeout
        while self.phase != phase:
            if not self.process.is_alive():
                return False
            assert time.monotonic() < limit, f"{phase} did not come within {timeout} s"
            time.sleep(2e-4)
        return True

    def said(self) -> str:
        with open(self.told) as file:
            return file.read()

    def end(self, timeout: float = 300) -> int:
        """Its exit status, waited for."""
        self.process.join(timeout)
        assert not self.process.is_alive(), "the run did not end"
        return self.process.exitcode


@contextlib.contextmanager
def together(
    config: dict, workdir, devices: list[int], alone: Mapping[int, dict] = MappingProxyType({}), **everyone
) -> Iterator[list[Life]]:
    """Processes that train as one, each with so many devices; those still running are killed at the end.

    Args:
      alone: what happens to some of them, by their number; arguments of `Life`, as are those of `everyone`.
    """
    port = free_port()
    lives = [
        Life(config, workdir, here, Host(port, len(devices), i), **everyone, **alone.get(i, {}))
        for i, here in enumerate(devices)
    ]
    try:
        yield lives
    finally:
        for life in lives:
            life.process.kill()
            life.process.join()
