"""The reward of videos: the sum of its terms, each by its weight; and what of the face's the guards leave."""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rfl_jax.config import Config
from rfl_jax.networks.terms import prepared_for
from rfl_jax.rewards.face import LOSS_WEIGHT, FaceReward, Score, Seen, real_score, reward_loss
from rfl_jax.rewards.motion import copying, motion, moving_share, own_share
from rfl_jax.rewards.term import REAL, Prepared, Term, TermScore
from rfl_jax.sampling.sampler import Batch

# Sum of a term's valid scores or drifts, and how many there are.
Tally = tuple[Float[Array, ""], Array]
# What is told of some terms by name: tallies of their scores, and of the drifts of those that hold their mean.
Told = tuple[dict[str, Tally], dict[str, Tally]]

LOOKED_AT = 0x100C  # folded into the run's key


@dataclasses.dataclass(frozen=True)
class Reward:
    """What a batch of videos is rewarded by.

    Attributes:
        losses: of all terms, of each sample.
        score: of the faces.
        guards: metrics of the guards, means over the samples.
        tallies: of each term in `reward.terms`, by name.
        drifts: of each term that holds its mean, by name.
    """

    losses: Float[Array, " b"]
    score: Score
    guards: dict[str, Array]
    tallies: dict[str, Tally]
    drifts: dict[str, Tally]


def rewarded(cfg: Config, score: Score, batch: Batch) -> tuple[Float[Array, " b"], dict[str, Array]]:
    """The loss of the face's score of each sample, and the guards' metrics, means over the samples.

    Args:
        cfg: of the run.
        score: of the samples.
        batch: what the score compares with, see `FaceReward.score`, and the real clips' "motion" and "copying" [b] where those are asked for.
    """
    judged, metrics = score.score, {}
    if cfg.face_term.ceiling:
        ceiling = real_score(cfg.reward, batch)
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


def reward_of(
    cfg: Config,
    faces: FaceReward,
    terms: Mapping[str, Term],
    video: Float[Array, "b t h w 3"],
    batch: Batch,
    update: Array | int,
    key: Array,
    untrained: Float[Array, "b t h w 3"] | None = None,
    pushes: Mapping[str, Array] | None = None,
) -> Reward:
    """What videos are rewarded by.

    Args:
        cfg: of the run.
        faces: the face networks.
        terms: those besides the face's, by name.
        video: decoded.
        batch: what of the real clips the terms want.
        update: done before; tells which terms are due.
        key: of the run. With the update it decides which frames terms look at that do not see all, whatever the mesh and the clips,
            and whether or not the run was interrupted.
        untrained: what the network before training makes of the same noise, where a term compares with that.
        pushes: of terms that hold their mean, by name, see `rfl_jax.training.hold`; none by default.
    """
    key = jax.random.fold_in(jax.random.fold_in(key, LOOKED_AT), update)
    seen = faces.see(video, key)
    score = faces.score(seen, batch)
    loss, guards = rewarded(cfg, score, batch)
    if not cfg.reward.terms:
        return Reward(loss, score, guards, {}, {})
    known = {name: prepared_for(name, term, batch) for name, term in terms.items()}
    if untrained is not None:
        before = faces.see(jax.lax.stop_gradient(untrained), key)
        known = {
            name: _anew(term, before, known[name]) if term.cfg.against == "untrained" else known[name]
            for name, term in terms.items()
        }

    def of_terms(names: list[str], seen: Seen) -> tuple[Float[Array, " b"], Told]:
        """What terms add to the losses, and what is told of those besides the face's."""
        total, tallies, drifts = jnp.zeros_like(loss), {}, {}
        for name in names:
            weight = cfg.terms[name].weight
            if name in terms:
                found = terms[name](seen, known[name])
                value, tallies[name] = _of_term(terms[name], seen, known[name], found)
                if terms[name].cfg.hold:
                    pushed, drifts[name] = _held(terms[name], found, (pushes or {}).get(name, 0.0))
                    total = total + pushed
            else:
                value, _ = rewarded(cfg, faces.score(seen, batch), batch)
            # What is only watched has no gradient.
            total = total + weight * (value if weight else jax.lax.stop_gradient(value))
        return total, (tallies, drifts)

    turns: dict[int, list[str]] = {}
    for name, term in cfg.terms.items():
        turns.setdefault(term.every, []).append(name)
    total, tallies, drifts = jnp.zeros_like(loss), {}, {}
    for every, names in turns.items():
        ours = partial(of_terms, names)
        value, told = (
            ours(seen) if every == 1 else _in_turn(ours, seen, update % every == 0, with_gradient=not cfg.nft.group)
        )
        total, tallies, drifts = total + every * value, tallies | told[0], drifts | told[1]
    # The face is looked at in every update, whether it is trained on or not.
    faces_tally = {name: _tally(score.score, score.valid) for name in cfg.terms if name not in terms}
    return Reward(total, score, guards, tallies | faces_tally, drifts)


def _in_turn(
    terms: Callable[[Seen], tuple[Float[Array, " b"], Told]], seen: Seen, due: Array | bool, *, with_gradient: bool
) -> tuple[Float[Array, " b"], Told]:
    """What terms give in an update in which they are due, in the others of which nothing of them runs: zeros."""

    def summed(frames: Array) -> tuple[Array, tuple[Float[Array, " b"], Told]]:
        found = terms(seen.at(frames))
        return jnp.sum(found[0]), found

    def taught(frames: Array) -> tuple[tuple[Float[Array, " b"], Told], Array]:
        if not with_gradient:
            return terms(seen.at(frames)), jnp.zeros_like(frames)
        pull, found = jax.grad(summed, has_aux=True)(frames)
        return found, pull

    def left_out(frames: Array) -> Any:
        return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(taught, frames))

    # Forward and backward pass are in one branch: activations do not leave it. What leaves is the derivative by the pixels, which
    # stands for all that was done to them.
    frames = jax.lax.stop_gradient(seen.frames)
    (value, told), pull = jax.lax.cond(due, taught, left_out, frames)
    by_frame = jnp.sum(pull * (seen.frames - frames), (1, 2, 3), dtype=jnp.float32)
    by_video = by_frame[: seen.count * seen.length].reshape(seen.count, seen.length)
    return value + jnp.sum(by_video, axis=1), told


def _tally(score: Float[Array, " b"], valid: Array) -> Tally:
    score = jax.lax.stop_gradient(score)
    return jnp.sum(jnp.where(valid, score, 0.0)), jnp.sum(valid)


def _anew(term: Term, seen: Seen, prepared: Prepared) -> Prepared:
    """What a term is handed, with other videos in place of the real clips."""
    prepared = {**prepared, **term.prepare(seen)}
    return {**prepared, REAL: term(seen, prepared).score} if term.cfg.ceiling else prepared


def _of_term(term: Term, seen: Seen, prepared: Prepared, found: TermScore) -> tuple[Float[Array, " b"], Tally]:
    """The losses of a term's scores, none of the samples of which it says nothing; and its tally."""
    judged = jnp.minimum(found.score, term.ceiling(seen, prepared)) if term.cfg.ceiling else found.score
    return jnp.where(found.valid, term.loss(judged), 0.0), _tally(found.score, found.valid)


def _held(term: Term, found: TermScore, push: Array | float) -> tuple[Float[Array, " b"], Tally]:
    """What a term that holds its mean adds to the losses, a push of 1 as strong as its score of weight 1; and the tally of drifts."""
    if found.drift is None:
        raise ValueError(f"{type(term).__name__} holds no mean: its scores tell no drift")
    pushed = push * jnp.where(found.valid, found.drift, 0.0) / term.std * LOSS_WEIGHT
    return pushed, _tally(found.drift, found.valid)
