"""The mean of a term held where the term wants it: a push on all videos alike, whose strength adapts.

A term that asks every video to keep what it had holds each of them back, the likeness that it gains included. Most of that is
more than is wanted: some videos may move more and others less, if the mean stays. A push is a derivative that is the same for all of
them, and the only question is how strong it has to be. It is answered as a thermostat does, by a proportional and an integral part
(a PI controller; with the integral part alone it would be the method of multipliers, which swings about what it holds).
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# For a drift that answers late, by Adam's momentum, and is told with an error of 0.1, as by the miniature's batches of eight, see
# `test_a_push_holds_a_mean_that_answers_late`. Twice the strength and five times the gathering swing, also on the miniature.
MEMORY = 0.5  # of the moving mean of drifts
STRENGTH = 5.0  # of the push by that mean: a drift of 0.1 is met by a push half as strong as a term of weight 1
GATHERED = 0.2  # of the push by the sum of all drifts
MOST = 5.0  # of that sum, on either side

# "recent": the moving mean of drifts; "sum": what has gathered.
Held = dict[str, Float[Array, ""]]


def unheld() -> Held:
    """Before the first update."""
    return {"recent": jnp.float32(0), "sum": jnp.float32(0)}


def push(held: Held) -> Float[Array, ""]:
    """How strongly the mean is pushed down (above 0) or up (below), in weights of a term."""
    return STRENGTH * held["recent"] + held["sum"]


def followed(held: Held, drift: Float[Array, ""], count: Int[Array, ""]) -> Held:
    """After an update.

    Args:
        held: before.
        drift: sum of those of the update's videos, each above 0 where it has more than what it is compared with.
        count: of the videos that tell one; without any nothing changes.
    """
    mean = drift / jnp.maximum(count, 1)
    after = {
        "recent": MEMORY * held["recent"] + (1 - MEMORY) * mean,
        "sum": jnp.clip(held["sum"] + GATHERED * mean, -MOST, MOST),
    }
    return {name: jnp.where(count > 0, after[name], held[name]) for name in held}
