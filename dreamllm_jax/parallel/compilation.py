"""How programs are compiled: where they are kept, and what the compiler is told beside the program itself."""

import jax
from etils import epath

from dreamllm_jax.parallel.chips import chip_of

CACHE = "compiled"

# Options of the TPU compiler, each with its reason. Without these five nothing else happens while a layer's weights are
# gathered; with them, a gather is spread over the steps of a product that does not need it.
TPU_OPTIONS: dict[str, bool | int | str] = {
    "xla_enable_async_all_gather": True,  # gathers may begin before their result is needed
    "xla_tpu_enable_async_collective_fusion": True,  # and run inside other operations' fusions
    "xla_tpu_enable_async_collective_fusion_fuse_all_gather": True,  # gathers too, not only reductions
    "xla_tpu_enable_async_collective_fusion_multiple_steps": True,  # several of them one after the other
    "xla_tpu_overlap_compute_collective_tc": True,  # on the core that multiplies
}

# The compiler that comes with jax 0.11 takes this one for v5e alone, and refuses the program elsewhere.
_V5E_ONLY = "xla_tpu_enable_async_collective_fusion_fuse_all_gather"


def compiler_options(device: jax.Device) -> dict[str, bool | int | str] | None:
    """What the compiler is told for a device and its like; None but for TPUs."""
    if device.platform != "tpu":
        return None
    chip = chip_of(device)
    refused = jax.__version_info__ >= (0, 11) and not (chip and chip.kind == "v5e")
    return {name: value for name, value in TPU_OPTIONS.items() if not (refused and name == _V5E_ONLY)}


def keep_programs(workdir: epath.PathLike) -> None:
    """Keeps compiled programs with the run, so that a preempted one starts again without compiling.

    A folder that the user chose, by JAX_COMPILATION_CACHE_DIR, has precedence.
    """
    if not jax.config.jax_compilation_cache_dir:
        jax.config.update("jax_compilation_cache_dir", str(epath.Path(workdir) / CACHE))
