"""Rematerialisation: what a layer keeps for its backward pass, and what it computes again.

A layer names the intermediates that are worth keeping with `keep`. A policy is "none" (keep everything), or names
joined by "+" of what is kept beside the layer's input, with three shorthands: "full" (recompute everything: nothing is
kept), "dots" (all named intermediates: the outputs of the matrix products and of the attention are kept, and only
elementwise operations computed again), "offload" (as "dots", but kept in the host's memory).
"""

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

NAMES = ("attention", "gate", "up")
SHORTHANDS = ("none", "dots", "full", "offload")


def keep(x: jax.Array, name: str) -> jax.Array:
    """Names an intermediate: "attention" (its inputs, its output, and the residual after it), "gate" or "up"."""
    assert name in NAMES
    return checkpoint_name(x, name)


def check(policy: str) -> None:
    """Refuses what is no policy.

    Raises:
      ValueError: naming what there is.
    """
    if policy not in SHORTHANDS and (not policy or set(policy.split("+")) - set(NAMES)):
        raise ValueError(
            f"unknown remat policy {policy!r}: choose from {', '.join(SHORTHANDS)}, or join {', '.join(NAMES)} by '+'"
        )


def kept_by(policy: str) -> tuple[str, ...]:
    """The names of what a policy keeps; of "none", which keeps everything, nothing needs to be named."""
    return {"none": (), "full": (), "dots": NAMES, "offload": NAMES}.get(policy, tuple(policy.split("+")))


def rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Wraps the body of a scanned stack of layers.

    Raises:
      ValueError: an unknown policy.
    """
    check(policy)
    if policy == "none":
        return block
    policies = jax.checkpoint_policies
    if policy == "offload":
        chosen = policies.save_and_offload_only_these_names(
            names_which_can_be_saved=[],
            names_which_can_be_offloaded=list(NAMES),
            offload_src="device",
            offload_dst="pinned_host",
        )
    else:
        chosen = policies.save_only_these_names(*kept_by(policy))
    # Inside a scan nothing can undo the recomputation, so the barriers against it are not needed.
    return nn.remat(block, policy=chosen, prevent_cse=False)
