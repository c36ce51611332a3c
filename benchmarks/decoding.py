"""What writing one token reads and writes in the memory of each chip of a slice, by the TPU compiler.

JAX_PLATFORMS=cpu TPU_SKIP_MDS_QUERY=1 python -m benchmarks.decoding --llm=qwen3-8b --topology=v5e-8 --tensor=8 --rows=16

Needs no TPU. Prints a line of JSON, bytes of one chip: `floor` is the language model's weights but for its embeddings, and
the cache; `ratio` is what the compiled loop's body moves over that.
"""

import argparse
import json
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dreamllm_jax.common.configuration import read
from dreamllm_jax.experiment import published
from dreamllm_jax.generation.text import STRETCH, Reading, write
from dreamllm_jax.model import DreamLLM, DreamLLMConfig, abstract_params
from dreamllm_jax.parallel.chips import find_topology
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, mesh_spec, param_shardings, use
from dreamllm_jax.planning.hlo import executions, parse
from dreamllm_jax.planning.program import traffic
from dreamllm_jax.towers.language_models.cache import KVCache


def bytes_of(x: jax.ShapeDtypeStruct) -> int:
    """Of one chip's shard."""
    return math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize


def abstract_cache(config: DreamLLMConfig, rows: int, length: int) -> KVCache:
    """The cache's shapes, laid out as it is made."""
    mesh = jax.sharding.get_mesh()
    cache = jax.eval_shape(lambda: config.language_model.cache(rows, length, jnp.bfloat16))

    def laid_out(x: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        spec = mesh_spec(("layers", "rows", "kv_heads", None, None), x.shape) if x.ndim == 5 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(laid_out, cache)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llm", default="7b", choices=list(published.CHOICES["llm"]))
    parser.add_argument("--topology", default="v5e-8")
    parser.add_argument("--data", type=int, default=1)
    parser.add_argument("--tensor", type=int, default=8)
    parser.add_argument("--rows", type=int, default=1)
    parser.add_argument("--length", type=int, default=2048, help="entries of the cache")
    arguments = parser.parse_args()

    settings = published.tuning(f"llm={arguments.llm}").model.to_dict() | {"dtype": "bfloat16"}
    config = read(DreamLLMConfig, settings, "model")
    sharding = ShardingConfig(data=arguments.data, fsdp=1, tensor=arguments.tensor)
    mesh = make_mesh(sharding, find_topology(arguments.topology).devices())
    weights = abstract_params(config)
    everywhere = NamedSharding(mesh, PartitionSpec())
    params = {
        "language_model": jax.tree.map(
            lambda x, where: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=where),
            nn.unbox(weights)["language_model"],
            param_shardings(weights, mesh, sharding)["language_model"],
        )
    }
    shape = arguments.rows, config.language_model.vocab_size
    with use(mesh, sharding):
        cache = abstract_cache(config, arguments.rows, arguments.length)
        logits, seen = (jax.ShapeDtypeStruct(shape, dtype, sharding=everywhere) for dtype in (jnp.float32, bool))
        reading = Reading(cache, logits, seen)
        compiled = write.lower(DreamLLM(config), params, reading, STRETCH, (config.special_tokens.eos,)).compile()

    module = parse(compiled.as_text())
    moved = sum(
        part.count * traffic(module, part.computation, one)
        for part in executions(module)[0]
        if part.computation != module.entry and not part.fused
        for one in module.computations[part.computation].values()
    )
    floor = sum(map(bytes_of, jax.tree.leaves(params))) + bytes_of(cache.k) + bytes_of(cache.v)
    if not config.language_model.tie_word_embeddings:
        floor -= bytes_of(params["language_model"]["embed_tokens"]["embedding"])
    peak = compiled.memory_analysis().peak_memory_in_bytes
    print(json.dumps({"floor": floor, "moved": moved, "ratio": round(moved / floor, 3), "peak": peak}))


if __name__ == "__main__":
    main()
