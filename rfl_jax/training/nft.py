"""The update that asks for no gradient of the reward: a clip's videos are compared with one another, and the DiT is taught the
better ones and away from the worse (DiffusionNFT, arXiv 2509.16117).

DiffusionNFT mixes the velocity v of the network that trains with that of the network that made the videos, v_old, into one to be
learnt, v+ = v_old + b (v - v_old), and one to be left, v- = v_old - b (v - v_old), and minimises

    (1 + a) / 2 |v+ - u|^2 + (1 - a) / 2 |v- - u|^2

where u = noise - video at some noise level, and a in -1..1 says how much better than the clip's others a video is. Here every update
makes its videos anew, so v_old is v, and the gradient is b times that of a |v - u|^2: flow matching on the network's own
videos, each weighed by its advantage. That is what is computed, with b = 1, as one forward and one backward pass.
"""

from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rfl_jax.config import Config
from rfl_jax.sampling.denoise import draw_one, predict
from rfl_jax.sampling.phases import phase_scope
from rfl_jax.sampling.real import squared_error
from rfl_jax.sampling.rollout import Expert, Latents
from rfl_jax.sampling.sampler import Sampler


def advantages(rewards: Float[Array, " b"], valid: Bool[Array, " b"], group: int) -> Float[Array, " b"]:
    """How much better each video is than its group, in standard deviations of all such differences, cut to -1..1 as the paper's
    rewards are; 0 of videos that say nothing, of those without a rival that does, and where all are alike.

    Args:
        rewards: of the videos.
        valid: which of them say something.
        group: videos of a group, which follow each other.
    """
    told = valid.reshape(-1, group)
    found = jnp.where(told, rewards.reshape(-1, group), 0.0)
    mean = jnp.sum(found, axis=1, keepdims=True) / jnp.maximum(jnp.sum(told, axis=1, keepdims=True), 1)
    ahead = jnp.where(told, found - mean, 0.0)
    spread = jnp.sqrt(jnp.sum(ahead**2) / jnp.maximum(jnp.sum(told), 1))
    # Rewards are of the order of 0.1: what is a millionth of that is rounding.
    return jnp.clip(ahead / jnp.maximum(spread, 1e-7), -1.0, 1.0).reshape(-1)


def weighed_matching(
    cfg: Config,
    sampler: Sampler,
    experts: Mapping[str, Expert],
    keep: Callable[[Latents], Latents],
    videos: Latents,
    advantage: Float[Array, " b"],
    *,
    key: Array,
    update: Array | int,
    clips: Int[Array, " b"],
) -> tuple[Float[Array, " b"], Float[Array, "1 b"]]:
    """Advantage times the error of flow matching of each video, and the KL, at the noise of one of the sampler's steps.

    Args:
        cfg: of the run.
        sampler: the steps.
        experts: with a batch's conditioning.
        keep: writes what is given of a clip into its latents; what it overwrites does not count.
        videos: latents that the network made; no gradient goes through them.
        advantage: of each.
        key: the run's.
        update: how many updates were made; with the key it decides the step and the noises.
        clips: numbers of the clips. A clip's videos meet the same noise, so that they differ in themselves alone.
    """
    videos, advantage = map(jax.lax.stop_gradient, (videos, advantage))
    step, noise = draw_one(sampler, key, update, clips, videos.shape[1:])
    sigma = jnp.asarray(sampler.sigmas)[step]
    with phase_scope("grad_steps"):
        x = keep((1 - sigma) * videos + sigma * noise)
        v, kl = predict(experts, sampler.direct, x, sigma, step, nested=cfg.policy == "nested")
        return advantage * squared_error(v, keep, videos, noise), kl[None]
