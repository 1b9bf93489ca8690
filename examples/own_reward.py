"""A reward of one's own: a video stays as bright as the real clip.

A config takes it up as `config.reward.terms = {"face": {}, "light": {"type": "examples.own_reward:Brightness", "weight": 0.5}}`.
"""

import dataclasses
from typing import Annotated

import jax.numpy as jnp
from jax import Array

from rfl_jax.rewards.face import Seen
from rfl_jax.rewards.term import Prepared, Term, TermScore, TermSettings
from rfl_jax.settings import Above


class Brightness(Term):
    """1 for frames as bright as the real clip is on average, towards 0 for darker and brighter ones."""

    @dataclasses.dataclass(frozen=True)
    class Settings(TermSettings):
        tolerance: Annotated[float, Above(0), "Difference, of 2, at which the score has fallen to 1/e."] = 0.1

    title = "brightness like the real clip's"
    mean, std = 0.8, 0.2

    def prepare(self, seen: Seen) -> dict[str, Array]:
        return {"brightness": jnp.mean(seen.video, (1, 2, 3, 4))}

    def __call__(self, seen: Seen, prepared: Prepared) -> TermScore:
        difference = jnp.mean(seen.video, (2, 3, 4)) - prepared["brightness"][:, None]
        per_frame = jnp.exp(-jnp.abs(difference) / self.cfg.tolerance)
        return TermScore(jnp.mean(per_frame, 1), jnp.ones(len(per_frame), bool), per_frame)
