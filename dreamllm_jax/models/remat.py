"""Rematerialisation: what a layer keeps for its backward pass."""

import flax.linen as nn
import jax

_POLICIES = {
    "full": None,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def rematerialised(block: type[nn.Module], policy: str) -> type[nn.Module]:
    """Wraps the body of a scanned stack of layers.

    Args:
      block: the Linen class of one layer.
      policy: "none" keeps every intermediate, "dots" the outputs of the matrix products with weights, "full" only the
        layer's input.

    Raises:
      ValueError: an unknown policy.
    """
    if policy == "none":
        return block
    if policy not in _POLICIES:
        raise ValueError(f"unknown remat policy {policy!r}: choose from {['none', *_POLICIES]}")
    # Inside a scan nothing can undo the recomputation, so the barriers against it are not needed.
    return nn.remat(block, policy=_POLICIES[policy], prevent_cse=False)
