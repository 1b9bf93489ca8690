"""The original trainer's score of a batch."""

import jax.numpy as jnp

from rfl_jax.rewards.face import cosine_with_pool, usable_pool


def pooled_score(embeddings, mask, pool):
    """The mean over all frames of the batch that have a face, where ours is one a sample."""
    cosines = cosine_with_pool(*map(jnp.asarray, (embeddings, pool)), usable_pool(jnp.asarray(pool)))
    return jnp.sum(cosines * mask) / jnp.maximum(jnp.sum(mask), 1)
