"""Compiles the training step for a TPU slice that need not be there: does it fit, how fast is it, what does it cost?

python -m dreamllm_jax.plan --config=configs/stage2_igpt.py:7b --topology=v5p-16 [--fit] [--effort=low] [--json=FILE]
"""

import json
import os
import sys

# Before JAX is imported: the compiler is asked, not a TPU, even where there is one; and without its remarks.
os.environ.update(JAX_PLATFORMS="cpu", TPU_SKIP_MDS_QUERY="1", ALLOW_MULTIPLE_LIBTPU_LOAD="1")
_QUIET = {
    "TPU_ACCELERATOR_TYPE": "v5p-8",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_LOG_DIR": "disabled",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
}
for _name, _value in _QUIET.items():
    os.environ.setdefault(_name, _value)

from absl import flags  # noqa: E402
from ml_collections import ConfigDict  # noqa: E402

from dreamllm_jax import command_line  # noqa: E402
from dreamllm_jax.common.configuration import ConfigError  # noqa: E402
from dreamllm_jax.experiment.experiment import Experiment, read_experiment  # noqa: E402
from dreamllm_jax.parallel.chips import Topology, find_topology  # noqa: E402
from dreamllm_jax.planning.estimate import as_json, describe, remedy  # noqa: E402
from dreamllm_jax.planning.search import fit  # noqa: E402
from dreamllm_jax.planning.step import compile_step  # noqa: E402
from dreamllm_jax.runs.start import with_initial  # noqa: E402

command_line.define_config()
flags.adopt_module_key_flags(command_line)  # --help tells of --config too
_TOPOLOGY = flags.DEFINE_string("topology", "", "The slice: v5p-128, v5e-16, two slices v5p-128x2, or v5p:4x4x4.")
_FIT = flags.DEFINE_bool("fit", False, "Find the largest rows.per_step and the cheapest model.remat that fit.")
_EFFORT = flags.DEFINE_enum("effort", "normal", ["low", "normal"], "low: compiles faster, memory is rough, no times.")
_ROWS = flags.DEFINE_integer("rows_per_chip", 0, "Instead of the configuration's rows.per_step.", lower_bound=0)
_JSON = flags.DEFINE_string("json", "", "A file that receives the figures.")


def main(config: ConfigDict | None) -> None:
    if config is None or not _TOPOLOGY.value:
        sys.exit("error: give --config=FILE.py and --topology=SLICE, such as v5p-16")
    topology = find_topology(_TOPOLOGY.value)
    experiment = _experiment(config.to_dict(), topology)
    step = fit(experiment, topology) if _FIT.value else compile_step(experiment, topology, _EFFORT.value)
    print(describe(step))
    if _JSON.value:
        with open(_JSON.value, "w") as file:
            json.dump(as_json(step), file, indent=2)
            file.write("\n")
    if not step.memory.fits:
        raise ConfigError(remedy(step))


def _experiment(config: dict, topology: Topology) -> Experiment:
    """Neither weights nor data are opened, unless only the weights know the model's shape."""
    if "language_model" not in config.get("model", {}):
        config, _ = with_initial(config, None)
    if _ROWS.value:
        config = {**config, "rows": {**config.get("rows", {}), "per_step": _ROWS.value * topology.chips}}
    return read_experiment(config)


if __name__ == "__main__":
    command_line.run(main)
