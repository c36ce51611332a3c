"""What the TPU compiler makes of a small model's gradients in bfloat16; prints what is wrong with it, a line each.

A program of its own (`python -m tests.narrow_sums`), for it compiles for eight chips that are not there.
"""

import dataclasses

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict

from dreamllm_jax.data.batch import empty_batch
from dreamllm_jax.layers.lora import LoraConfig
from dreamllm_jax.model import DreamLLM, abstract_params
from dreamllm_jax.objectives.joint import JointConfig
from dreamllm_jax.parallel.chips import find_topology
from dreamllm_jax.parallel.feeding import rows_sharding
from dreamllm_jax.parallel.mesh import ShardingConfig, make_mesh, param_shardings, use
from dreamllm_jax.planning import hlo
from dreamllm_jax.planning.program import COLLECTIVE
from dreamllm_jax.training.step import loss_and_gradients
from tests.tiny import MLP, row_shape, tiny_config

ROWS, LENGTH, SLOTS, VOCABULARY = 16, 1024, 16, 520
FEW = 64  # so many numbers may be added up in bfloat16


def compiled() -> str:
    """The text of the compiled joint loss with the gradients of everything, two chunks of tokens and of images."""
    sharding = ShardingConfig()
    mesh = make_mesh(sharding, find_topology("v5p-16").devices())
    config = tiny_config(dtype="bfloat16", visual_projector=MLP, connector=MLP)
    biased = {"attention_bias": True, "mlp_bias": True, "lora": LoraConfig(rank=4, alpha=8.0)}
    llama = dataclasses.replace(config.language_model, hidden_size=256, vocab_size=VOCABULARY, **biased)
    config = dataclasses.replace(config, language_model=llama, special_tokens=None)
    joint = JointConfig(drop_prob=0.5, loss_chunk=LENGTH // 2, image_chunk=SLOTS)
    objective = joint.make(DreamLLM(config))
    rows, weights = rows_sharding(mesh, sharding, ROWS), abstract_params(config)

    def given(tree):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct((ROWS, *x.shape[1:]), x.dtype, sharding=rows), tree)

    shardings = flatten_dict(param_shardings(weights, mesh, sharding), sep="/")
    leaves = {
        path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=shardings[path])
        for path, leaf in flatten_dict(nn.unbox(weights), sep="/").items()
    }
    batch = given(empty_batch(1, row_shape(config, LENGTH, SLOTS, SLOTS)))
    drawn = jax.eval_shape(objective.draws, jax.random.key(0), batch)
    with use(mesh, sharding):
        step = jax.jit(
            lambda leaves, batch, draws: loss_and_gradients(objective, leaves, {}, batch, draws),
            out_shardings=(None, shardings),
        )
        lowered = step.lower(leaves, batch, given(drawn))
    return lowered.compile(compiler_options={"optimization_level": 9}).as_text()


def faults(text: str) -> list[str]:
    """Sums of many numbers in bfloat16, and collectives of the head's size in loops."""
    module = hlo.parse(text)
    found = []
    for part in hlo.executions(module)[0]:
        computation = module.computations[part.computation]
        for one in computation.values():
            if one.opcode in ("reduce", "scatter") and one.arrays[0].dtype == "bf16":
                if module.root(one.called()).opcode != "add":
                    continue
                summed = computation[one.operands[0]].bytes / one.bytes
                table = one.opcode == "scatter" and VOCABULARY in one.arrays[0].dims
                if table or (one.opcode == "reduce" and summed >= FEW):
                    found.append(f"{one.opcode} of {summed:g} in bfloat16: {one.op_name}")
            in_loop = COLLECTIVE.fullmatch(one.opcode) and part.count > 1
            if in_loop and any(VOCABULARY in array.dims for array in one.arrays):
                found.append(f"{part.count:g} times {one.opcode} of {one.shape}: {one.op_name}")
    return found


if __name__ == "__main__":
    print("\n".join(faults(compiled())))
