"""Before and after, on clips that were held out, judged by a network that was not the reward.

`python -m rfl_jax.evaluate --workdir=RUN [--data=FILE.csv]` writes RUN/evaluation.json.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from etils import epath
from flax import nnx
from ml_collections import ConfigDict
from tqdm import tqdm

from rfl_jax import cli
from rfl_jax.config import parse
from rfl_jax.data.prepare import open_judge
from rfl_jax.data.videos import to_uint8, write_video
from rfl_jax.errors import UserError
from rfl_jax.files import write_whole
from rfl_jax.hosts import is_writer, place
from rfl_jax.rewards.face import Score, cosine_with_pool, usable_pool
from rfl_jax.sampling.rollout import rollout
from rfl_jax.sharding import replicated
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.setup import Setup, evaluation_key, set_up
from rfl_jax.training.state import Frozen, States, TrainState
from rfl_jax.training.step import bind_experts, latent_shape, start_noise

FIGURES = ("face_sim", "judge_sim", "motion", "face_fraction")
BATCH = 8  # clips sampled together


def motion(kps: np.ndarray, mask: np.ndarray) -> float:
    """Mean absolute displacement of the five points between neighbouring frames that both have a face, in pixels."""
    both = mask[1:] & mask[:-1]
    return float(np.abs(np.diff(kps, axis=0))[both].mean()) if both.any() else 0.0


def evaluate(run: Setup, state: TrainState, workdir: epath.Path) -> dict[str, Any]:
    """Samples every held-out clip with the untrained and the trained weights from the same noise.

    Args:
        run: its `cfg.eval` names clips and judge.
        state: what was trained.
        workdir: where evaluation.json and evaluation/*.mp4 are written.

    Returns:
        The content of evaluation.json.
    """
    cfg = run.cfg
    key = evaluation_key(run.key)
    reward = run.networks.build("reward", {}, run.frozen)
    judge_graph, judge_weights = nnx.split(open_judge(reward, cfg.eval.judge_model_path))
    whole = replicated(run.mesh)
    judge_weights = jax.tree.map(lambda x: place(x, whole), judge_weights)

    # All weights are arguments: what a jitted function closes over becomes a constant of its program.
    @functools.partial(jax.jit, out_shardings=whole)
    def sample(
        params: States, frozen: Frozen, judge_weights: nnx.State, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Score, jax.Array]:
        sampler = run.rollout
        experts, keep = bind_experts(run.networks, sampler, params, frozen, batch)
        start = batch.get("prefix")
        if start is None:
            first = jnp.zeros_like(batch["sample"])
            start = start_noise(key, batch["sample"], first, latent_shape(sampler, batch), "fresh")
        # Without references: the KL is not asked for.
        experts = {name: dataclasses.replace(e, reference=None) for name, e in experts.items()}
        latents = rollout(experts, start, sampler.levels, sampler.phases, keep=keep).latents
        video = jnp.clip(run.networks.build("vae", params, frozen).decode(latents), -1, 1)
        score = run.networks.build("reward", params, frozen)(video, batch["pool"])
        judge = nnx.merge(judge_graph, judge_weights)
        frames = video.reshape(-1, *video.shape[2:])
        embeddings = judge.embed(frames, score.kps.reshape(-1, 5, 2), score.mask.reshape(-1))
        pool = batch["judge_pool"]
        mask = usable_pool(pool, use_first_frame=cfg.reward.use_first_frame)
        judged = cosine_with_pool(embeddings.reshape(*score.mask.shape, -1), pool, mask)
        return video, score, judged

    params = {"base": untrained(run, state), "tuned": state.params}
    clips = []
    for start in tqdm(range(0, len(run.held_out), BATCH), desc="evaluate", disable=None):
        items = run.held_out[start : start + BATCH]
        loaded = [item.load() for item in items]
        batch = {n: np.stack([values[n] for values in loaded]) for n in (*run.batch_names, "judge_pool")}
        if items[0].prefix:
            batch["prefix"] = np.stack([item.load_prefix(0) for item in items])
        batch |= {"sample": np.arange(start, start + len(items), dtype=np.int32), **run.constants}
        with jax.set_mesh(run.mesh):
            found = {
                name: jax.tree.map(np.asarray, sample(weights, run.frozen, judge_weights, batch, key))
                for name, weights in params.items()
            }
        for i, item in enumerate(items):
            clip: dict[str, Any] = {"video": item.row.video.name, "prompt": item.row.prompt}
            for name, (video, score, judged) in found.items():
                mask = score.mask[i]
                clip[name] = {
                    "face_sim": float(score.score[i]),
                    "judge_sim": float(judged[i][mask].mean()) if mask.any() else 0.0,
                    "motion": motion(score.kps[i], mask),
                    "face_fraction": float(mask.mean()),
                }
                if is_writer():
                    write_video(workdir / "evaluation" / f"{start + i:03d}_{name}.mp4", to_uint8(video[i]))
            clips.append(clip)
    result: dict[str, Any] = {
        figure: {name: float(np.mean([c[name][figure] for c in clips])) for name in ("base", "tuned")}
        for figure in FIGURES
    }
    result["clips"] = clips
    if is_writer():
        write_whole(workdir / "evaluation.json", json.dumps(result, indent=1) + "\n")
    return result


def untrained(run: Setup, state: TrainState) -> States:
    """The trainable weights as they were before training: adapters whose product is zero, or the frozen copies."""

    def without_product(path: tuple, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if "lora_b" in jax.tree_util.keystr(path) else x

    return {
        name: jax.tree_util.tree_map_with_path(without_product, params)
        if name in run.networks.adapted
        else jax.tree.map(lambda x: x.astype(jnp.float32), run.frozen.reference[name])
        for name, params in state.params.items()
    }


def show(result: dict[str, Any]) -> None:
    """A table on the terminal."""
    print(f"{'held-out clips: ' + str(len(result['clips'])):24s}{'base':>10s}{'tuned':>10s}{'change':>10s}")
    for figure in FIGURES:
        base, tuned = result[figure]["base"], result[figure]["tuned"]
        change = f"{(tuned / base - 1) * 100:+.1f} %" if base else "-"
        print(f"{figure:24s}{base:10.4f}{tuned:10.4f}{change:>10s}")


def main() -> None:
    workdir = epath.Path(_WORKDIR.value or "")
    file = workdir / "config.json"
    if not _WORKDIR.value or not file.exists():
        raise UserError(f"--workdir: {_WORKDIR.value}: expected the folder of a run, with its config.json")
    values = json.loads(file.read_text())
    if _DATA.value:
        values["eval"]["file_name"] = _DATA.value
    cfg = parse(ConfigDict(values))
    if not cfg.eval.file_name:
        raise UserError("--data: expected a csv of held-out clips, as the run's config names none")
    run = set_up(cfg, workdir)
    checkpoints = Checkpoints(workdir / "checkpoints")
    latest = checkpoints.latest()
    if latest is None:
        raise UserError(f"{workdir}/checkpoints: holds no checkpoint")
    state, _, _ = checkpoints.restore(latest, run.state)
    checkpoints.close()
    show(evaluate(run, state, workdir))
    print(f"{workdir / 'evaluation.json'}")


if __name__ == "__main__":
    _WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
    _DATA = flags.DEFINE_string("data", None, "csv of held-out clips; default: the run's eval.file_name.")
    cli.run(main, "evaluate")
