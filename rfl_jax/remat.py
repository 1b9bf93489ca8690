"""Rematerialisation policies by name.

The backward pass of the last denoising steps needs every block's activations. What is kept, recomputed or
moved to host memory is chosen by one word of the config.
"""

from collections.abc import Callable

import jax
from jax.ad_checkpoint import checkpoint_name

BLOCK_INPUT = "block_input"
ATTENTION_OUTPUT = "attention_output"
VAE_CACHE = "vae_cache"
REFERENCE_VELOCITY = "reference_velocity"


def _offload(name: str) -> Callable:
    """Values of that name wait in pinned host memory."""
    return jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[name],
        offload_src="device",
        offload_dst="pinned_host",
    )


POLICIES: dict[str, Callable | None] = {
    # Nothing but the block's inputs survives (jax.checkpoint's default).
    "full": None,
    # The same inside a block; besides, `rollout` keeps one denoising step's block inputs at a time, for one more
    # forward pass a step.
    "nested": None,
    # Attention is the most expensive thing to recompute and its output the cheapest to keep.
    "save_attention": jax.checkpoint_policies.save_only_these_names(ATTENTION_OUTPUT),
    # Block inputs wait in pinned host memory. The *input* carries the name: with the name on the output the
    # residual would stay on the device.
    "offload": _offload(BLOCK_INPUT),
}
OFFLOAD_VAE_CACHES = _offload(VAE_CACHE)
# Of whole denoising steps that are rematerialised: a forward pass of the network for the size of the latents.
KEEP_REFERENCE = jax.checkpoint_policies.save_only_these_names(REFERENCE_VELOCITY)
VAE_CACHES = ("keep", "offload", "recompute")
NAMES = ("none", *POLICIES)


def steps_options(policy: str) -> dict[str, bool]:
    """How `rollout` treats its steps with gradient under a policy. Offloaded block inputs need steps that are written
    out: the TPU compiler cannot carry them through a loop in a loop (libtpu 0.0.42).
    """
    return {"nested": policy == "nested", "unroll": policy == "offload"}


def remat(function: Callable, policy: str) -> Callable:
    """Wraps `function` for rematerialisation under the policy of that name (`none` returns it as it is)."""
    if policy == "none":
        return function
    # Inside a scan the loop itself keeps XLA from merging the recomputation away, so no barrier is needed.
    return jax.checkpoint(function, policy=POLICIES[policy], prevent_cse=False)


__all__ = [
    "ATTENTION_OUTPUT",
    "BLOCK_INPUT",
    "KEEP_REFERENCE",
    "NAMES",
    "OFFLOAD_VAE_CACHES",
    "POLICIES",
    "REFERENCE_VELOCITY",
    "VAE_CACHE",
    "VAE_CACHES",
    "checkpoint_name",
    "remat",
    "steps_options",
]
