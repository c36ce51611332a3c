"""What asynchronous saving costs: the time of a step with a checkpoint every ten steps, and with none.

    python -m benchmarks.saving [--config=configs/tiny.py] [--steps=100] [--repeats=3]

Trains the configuration from its beginning, by turns with and without checkpoints, on the devices that are there, and
compares the time of all steps after the first twenty. The last checkpoint, which ends each run, is in neither.
"""

import argparse
import runpy
import statistics
import tempfile
from pathlib import Path

from absl import flags

from dreamllm_jax.parallel.compilation import keep_programs
from dreamllm_jax.runs.start import start_run
from dreamllm_jax.training.loop import train
from dreamllm_jax.training.metrics import read_metrics

WARM = 20
EVERY = 10


def seconds_per_step(config: dict, steps: int, every: int, workdir: Path) -> float:
    config = config | {"steps": steps, "log_every": WARM, "checkpoint": {"every": every, "keep": 1}}
    run = start_run(config, workdir)
    train(run.experiment, run.tokenizer, run.workdir)
    return statistics.mean(line["seconds_per_step"] for line in read_metrics(workdir)[WARM : steps - steps % WARM])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/tiny.py")
    parser.add_argument("--steps", type=int, default=101)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    flags.FLAGS.mark_as_parsed()
    config = runpy.run_path(arguments.config)["get_config"]()
    measured: dict[int, list[float]] = {EVERY: [], arguments.steps: []}
    with tempfile.TemporaryDirectory() as folder:
        keep_programs(Path(folder))
        for repeat in range(arguments.repeats):
            for every, seconds in measured.items():
                workdir = Path(folder) / f"{repeat}-{every}"
                seconds.append(seconds_per_step(config.to_dict(), arguments.steps, every, workdir))
    saving, plain = (statistics.median(seconds) for seconds in measured.values())
    for name, seconds in (("a checkpoint every 10 steps", measured[EVERY]), ("none", measured[arguments.steps])):
        print(f"{name}: {', '.join(f'{1000 * one:.1f}' for one in seconds)} ms a step")
    print(f"overhead {saving / plain - 1:+.1%}")


if __name__ == "__main__":
    main()
