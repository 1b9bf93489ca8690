"""Weights, gradients and losses that are no numbers any more: found, and named."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool

from rfl_jax.networks.parts import States


def dotted_names(tree: Any) -> list[str]:
    """The dotted name of each leaf of a tree of weights."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value") for path, _ in leaves]


def checked_names(params: States) -> list[str]:
    """What `finite_gradients` and `finite_weights` tell of, in their order."""
    return [*dotted_names(params), "loss"]


def finite_gradients(grads: States, loss: Array) -> Bool[Array, " parts"]:
    """For each trained tensor whether its gradient is finite, and whether the loss is."""
    # The compiler computes each norm once: clipping needs them as well.
    return jnp.stack([*(jnp.isfinite(optax.tree.norm(g)) for g in jax.tree.leaves(grads)), jnp.isfinite(loss)])


def finite_weights(params: States) -> Bool[Array, " parts"]:
    """For each trained tensor whether it is finite; in the loss's place there is nothing to object to."""
    return jnp.stack([*(jnp.all(jnp.isfinite(p)) for p in jax.tree.leaves(params)), jnp.array(True)])


@jax.jit
def _all_finite(x: Array) -> Array:
    return jnp.all(jnp.isfinite(x))


def first_not_finite(weights: Mapping[str, Any]) -> str:
    """The dotted name of the first array that holds NaN or infinity; empty if none does."""
    for name, x in zip(dotted_names(weights), jax.tree.leaves(weights), strict=True):
        if not jnp.issubdtype(x.dtype, jnp.floating):
            continue
        if x.sharding.memory_kind == "pinned_host":
            x = jax.device_put(x, x.sharding.with_memory_kind("device"))
        if not _all_finite(x):
            return name
    return ""
