"""A reward of one's own without a gradient: any function of finished videos, in NumPy, another library or over the network.

A config takes it up as `config.reward.terms = {"face": {}, "light": {"type": "examples.own_rule:Exposure"}}`, beside
`config.nft.group = 4`: videos are compared then, and no gradient goes through rewards.
"""

import jax
import jax.numpy as jnp
import numpy as np

from rfl_jax.rewards.face import Seen
from rfl_jax.rewards.term import Prepared, Term, TermScore


def well_exposed(videos: np.ndarray) -> np.ndarray:
    """Scores [b, t] of each frame of videos [b, t, h, w, 3] of 0..255: 1 where less than a twentieth of it is black or white."""
    clipped = np.all(videos < 8, axis=-1) | np.all(videos > 247, axis=-1)
    return (clipped.mean((2, 3)) < 0.05).astype(np.float32)


class Exposure(Term):
    """Share of a video's frames that are neither under- nor overexposed."""

    title = "well exposed frames"
    mean, std = 0.8, 0.2

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        video = jax.lax.stop_gradient(seen.video)
        pixels = jnp.clip(jnp.rint((video + 1) * 127.5), 0, 255).astype(jnp.uint8)
        # Runs on the host, in the process that trains: such a run has one process.
        per_frame = jax.pure_callback(well_exposed, jax.ShapeDtypeStruct(video.shape[:2], jnp.float32), pixels)
        return TermScore(jnp.mean(per_frame, 1), jnp.ones(len(per_frame), bool), per_frame)
