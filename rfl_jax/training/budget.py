"""The KL within a budget: its weight grows while the KL is above, and falls back while it is below."""

import jax.numpy as jnp
from jaxtyping import Array, Float

RATE = 0.1  # of the logarithm: an update raises the weight by 11 % at most
MOST = 1000.0  # times `reward.kl_weight`


def adapted(factor: Float[Array, ""], kl: Float[Array, ""], target: Float[Array, ""] | float) -> Float[Array, ""]:
    """The factor of the KL's weight after an update: factor * (kl / target)^0.1, within 1..1000.

    Like the adaptive penalty of PPO (Schulman et al. 2017), which doubles or halves the weight outside of a band around its
    target. A network here answers to a weight only after many updates, meanwhile such steps add up far beyond what is needed;
    so the step here is the smaller the nearer the KL is to its target, and never more than that of e times the target. A budget may
    be left over: the weight does not fall below what the configuration says.

    Args:
        factor: before.
        kl: of the update.
        target: what it should not exceed.
    """
    distance = jnp.clip(jnp.log(kl / target), -1, 1)
    return jnp.clip(factor * jnp.exp(RATE * distance), 1, MOST)
