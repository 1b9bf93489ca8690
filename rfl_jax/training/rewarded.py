"""What of a sample's score is rewarded, by the guards that are on."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from rfl_jax.config import Config
from rfl_jax.rewards.face import Score, real_agreement, reward_loss, usable_pool
from rfl_jax.rewards.motion import copying, motion, moving_share, own_share
from rfl_jax.sampling.sampler import Batch


def rewarded(cfg: Config, score: Score, batch: Batch) -> tuple[Float[Array, " b"], dict[str, Array]]:
    """The loss of each sample's reward, and the guards' metrics, means over the samples.

    Args:
        cfg: of the run.
        score: of the samples.
        batch: "pool" of the real clips' faces, and their "motion" and "copying" [b] where those are asked for.
    """
    judged, metrics = score.score, {}
    if cfg.reward.ceiling:
        pool = batch["pool"]
        ceiling = real_agreement(pool, usable_pool(pool, use_first_frame=cfg.reward.use_first_frame))
        judged = jnp.minimum(judged, ceiling)
        metrics["ceiling_fraction"] = jnp.mean((score.valid & (score.score >= ceiling)).astype(jnp.float32))
    # Samples without a face say nothing: no reward and no gradient of it.
    loss = jnp.where(score.valid, reward_loss(judged), 0.0)
    if not (cfg.motion.weight or cfg.motion.copy_weight):
        return loss, metrics
    share = score.valid.astype(jnp.float32)
    if cfg.motion.weight:
        found = motion(score.kps, score.mask)
        metrics["motion"] = jnp.mean(found)
        share = share * moving_share(found, batch["motion"], cfg.motion.weight)
    if cfg.motion.copy_weight:
        found = copying(score.kps, score.mask)
        metrics["copying"] = jnp.mean(found)
        share = share * own_share(found, batch["copying"], cfg.motion.copy_weight)
    return share * loss, metrics | {"reward_share": jnp.mean(share)}
