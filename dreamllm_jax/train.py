"""Trains a DreamLLM, or continues a run:

python -m dreamllm_jax.train --config=configs/tiny.py --workdir=runs/tiny [--config.optimizer.learning_rate=1e-3]
python -m dreamllm_jax.train --config=configs/tiny.py --check

Status 75: asked to stop, everything is saved; 76: it hung. In both cases start it again with the same words.
"""

import sys

import jax
from absl import flags
from ml_collections import ConfigDict

from dreamllm_jax import command_line
from dreamllm_jax.common.exits import PREEMPTED, Preempted
from dreamllm_jax.parallel import compilation, distributed
from dreamllm_jax.runs import check
from dreamllm_jax.runs.start import start_run
from dreamllm_jax.training.claim import Claim
from dreamllm_jax.training.loop import train

command_line.define_config()
flags.adopt_module_key_flags(command_line)  # --help tells of --config too
_CHECK = flags.DEFINE_bool("check", False, "Check the configuration, say what it comes to, and train nothing.")
_COORDINATOR = flags.DEFINE_string("coordinator", "", "host:port of process 0; not needed on Cloud TPU or one host.")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes take part, one a host.")
_PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0.")
_TIMEOUT = flags.DEFINE_integer("timeout", distributed.TIMEOUT, "Seconds that hosts wait for each other at the start.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Directory of the run (local or gs://): the same again continues it.")


def main(config: ConfigDict | None) -> None:
    if config is None or not (_WORKDIR.value or _CHECK.value):
        sys.exit("error: give --config=FILE.py and --workdir=DIR")
    if _CHECK.value:
        jax.config.update("jax_platforms", "cpu")  # shapes need no accelerator, which may be in use
        print(check.describe(config.to_dict()))
        return
    distributed.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value, _TIMEOUT.value)
    with Claim(_WORKDIR.value):
        run = start_run(config.to_dict(), _WORKDIR.value)
        compilation.keep_programs(run.workdir)
        try:
            train(run.experiment, run.tokenizer, run.workdir, run.initial, run.record)
        except Preempted as stopped:
            print(stopped, file=sys.stderr)
            sys.exit(PREEMPTED)


if __name__ == "__main__":
    command_line.run(main)
