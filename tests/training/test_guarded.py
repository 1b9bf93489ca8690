"""Guards against a reward that is hacked: each changes what it says, and one that is off leaves no trace."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rfl_jax.config import Config, MotionSection, RewardSection
from rfl_jax.planning.abstract import make_plan
from rfl_jax.rewards.align import TEMPLATE
from rfl_jax.rewards.face import Score, reward_loss
from rfl_jax.sharding import make_mesh
from rfl_jax.training.budget import MOST, adapted
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.guard import lowered
from rfl_jax.training.hold import MOST as MOST_HELD
from rfl_jax.training.hold import STRENGTH, followed, push, unheld
from rfl_jax.training.loop import METRICS
from rfl_jax.training.rewarded import rewarded
from tests.runs import open_run
from tests.training.test_alarm import copied
from tests.training.test_guards import equal, snapshot

WINDOWS = {"num_inference_steps": 2, "mid_timestep": 1, "final_timestep": 1}
GUARDED = {
    "real.weight": 0.25,
    "real.every": 2,
    "kl.target": 1e-4,
    "reward.ceiling": True,
    "motion.weight": 1.0,
    "motion.copy_weight": 0.5,
}


def scored(values, valid, seed=0):
    """Scores of videos whose faces move somehow."""
    rng = np.random.default_rng(seed)
    b, t = len(values), 4
    kps = jnp.asarray(TEMPLATE + rng.normal(0, 3, (b, t, 5, 2)), jnp.float32)
    valid = jnp.asarray(valid)
    mask = jnp.broadcast_to(valid[:, None], (b, t))
    return Score(jnp.asarray(values), jnp.zeros((b, t)), mask, kps, jnp.zeros((b, t, 4)), valid)


def gradient(cfg, score, batch):
    """Losses, their derivatives by the scores, metrics."""

    def total(values):
        loss, metrics = rewarded(cfg, dataclasses.replace(score, score=values), batch)
        return jnp.sum(loss), (loss, metrics)

    (_, (loss, metrics)), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(score.score)
    return np.asarray(loss), np.asarray(slope), metrics


def test_a_score_beyond_the_real_clips_has_no_gradient():
    pool = np.zeros((3, 4, 3), np.float32)
    # After the first row, which does not count, pairs of a cosine of 0.8.
    pool[:, 1:] = np.linalg.cholesky(np.full((3, 3), 0.8) + 0.2 * np.eye(3))
    score = scored([0.7, 0.9, 0.9], [True, True, False])
    batch = {"pool": jnp.asarray(pool)}
    plain, slope, none = gradient(Config(), score, batch)
    assert none == {}
    loss, capped, metrics = gradient(Config(reward=RewardSection(ceiling=True)), score, batch)
    np.testing.assert_allclose(loss, [plain[0], float(reward_loss(jnp.float32(0.8))), 0], rtol=1e-5)
    np.testing.assert_allclose(capped, [slope[0], 0, 0])
    assert metrics["ceiling_fraction"] == pytest.approx(1 / 3)


def test_what_stands_still_or_copies_has_less_of_its_reward():
    score = scored([0.7, 0.7, 0.7], [True, True, False])
    real = {"pool": jnp.ones((3, 2, 2)), "motion": jnp.array([8.0, 1e-3, 8.0]), "copying": jnp.array([1e-3, 0.99, 0.1])}
    plain, slope, _ = gradient(Config(), score, real)
    _, moving, metrics = gradient(Config(motion=MotionSection(weight=1.0)), score, real)
    moved = float(jnp.mean(jnp.abs(jnp.diff(score.kps[0], axis=0))))
    # In proportion to the motion, at most whole.
    np.testing.assert_allclose(moving, slope * np.array([moved / 8, 1, 1]), rtol=1e-5)
    assert metrics["motion"] < 8
    assert metrics["reward_share"] == pytest.approx((moved / 8 + 1) / 3)
    loss, own, metrics = gradient(Config(motion=MotionSection(copy_weight=1.0)), score, real)
    assert 0 < own[0] / slope[0] < 1
    assert own[1] == slope[1]
    np.testing.assert_allclose(loss[:2] / plain[:2], own[:2] / slope[:2], rtol=1e-5)
    _, both, _ = gradient(Config(motion=MotionSection(1.0, 1.0)), score, real)
    np.testing.assert_allclose(both[:2], moving[:2] * own[:2] / slope[:2], rtol=1e-5)


def test_the_weight_of_the_kl_follows_its_budget():
    target = 0.01

    def after(factor, kl):
        return float(adapted(jnp.float32(factor), jnp.float32(kl), target))

    assert after(2, target) == pytest.approx(2)
    assert after(2, 1.5 * target) == pytest.approx(2 * 1.5**0.1)
    assert after(2, target / 1.5) == pytest.approx(2 / 1.5**0.1)
    # By a tenth at most, never below the weight of the configuration nor without end.
    assert after(2, 1e9) == pytest.approx(2 * np.exp(0.1))
    assert after(2, 0) == pytest.approx(2 * np.exp(-0.1))
    assert after(1, 0) == 1
    assert after(MOST, 1) == MOST
    # A KL that answers to its weight slowly, as a network does, ends within the budget and stays there.
    factor, kl, course = 1.0, 0.0, []
    for _ in range(600):
        kl += 0.02 * (0.1 / factor - kl)
        factor = after(factor, kl)
        course.append(kl)
    assert max(course) > 2 * target
    assert max(course[-100:]) < 1.1 * target
    assert min(course[-100:]) > target / 1.5


def test_a_push_holds_a_mean_that_answers_late():
    # Pulled away steadily; what pushes it back is felt a tenth in each update, as by Adam's momentum.
    rng = np.random.default_rng(0)
    drift, speed, held, course = 0.0, 0.0, unheld(), []
    for _ in range(400):
        speed += 0.1 * (0.01 - 0.012 * float(push(held)) - speed)
        drift += speed
        told = drift + rng.normal(0, 0.1)
        held = followed(held, jnp.float32(8 * told), jnp.int32(8))
        course.append(drift)
    assert max(course) < 0.25
    assert abs(np.mean(course[50:])) < 0.02
    assert np.std(course[50:]) < 0.1
    # Videos that tell nothing change nothing, and what gathers has an end.
    assert followed(held, jnp.float32(0), jnp.int32(0)) == held
    for _ in range(100):
        held = followed(held, jnp.float32(-1), jnp.int32(1))
    assert float(held["sum"]) == -MOST_HELD
    assert float(push(held)) == pytest.approx(-MOST_HELD - STRENGTH)


def test_guards_of_a_run(settings, tmp_path, clip_folder):
    header, *rows = (clip_folder / "metadata.csv").read_text().splitlines()
    file = tmp_path / "metadata.csv"
    file.write_text("\n".join([header, *(f"{clip_folder}/{row}" for row in rows[:2])]) + "\n")
    run = open_run(settings(file_name=str(file), **WINDOWS, **GUARDED), tmp_path)
    batches, key = run.inputs.batches, run.inputs.key
    batch = batches.place_share(next(run.iterator()))
    assert batch["latents"].shape == (*batch["y"].shape[:-1], run.inputs.sampler.dit.out_dim)
    assert (np.asarray(batch["motion"]) > 0).all()
    assert (np.asarray(batch["copying"]) > 0).all()

    def numbers(metrics):
        return {name: float(x) for name, x in metrics.items() if not np.ndim(x)}

    # What the clips add to the loss is their share of it.
    second = dataclasses.replace(copied(run.state), step=jax.device_put(np.int32(1), run.state.step.sharding))
    taught, left = (numbers(run.update(s, run.frozen, batch, key)[1]) for s in (copied(run.state), second))
    assert taught["loss"] - left["loss"] == pytest.approx(0.25 * taught["real_loss"], rel=1e-4)
    assert taught["face_score"] == left["face_score"]
    assert taught["grad_norm"] != left["grad_norm"]

    state, found = run.state, []
    for _ in range(4):
        state, metrics = run.update(state, run.frozen, batch, key)
        found.append(numbers(metrics))
    # Every second update, and no other, is taught by the clips.
    assert [np.isnan(x["real_loss"]) for x in found] == [False, True, False, True]
    for x in found:
        assert 0 <= x["ceiling_fraction"] <= 1
        assert 0 < x["reward_share"] < 1
        assert x["motion"] > 0
    # Adapters start at zero, and so does the KL; then it is over its budget.
    assert found[0]["kl_loss"] == 0
    expected = 1.0
    for x in found:
        assert x["kl_weight"] == pytest.approx(expected, rel=1e-6)
        expected = float(adapted(jnp.float32(expected), jnp.float32(x["kl_loss"]), 1e-4))
    assert float(state.factors["kl_target"]) == pytest.approx(expected, rel=1e-6)
    assert expected > 1.1

    # An alarm's factor is one more, and halves the budget that the other one keeps to.
    raised, metrics = run.update(lowered(state, 2.0), run.frozen, batch, key)
    assert float(metrics["kl_weight"]) == pytest.approx(2 * expected, rel=1e-6)
    used = 2 * metrics["kl_loss"]
    assert float(raised.factors["kl_target"]) == pytest.approx(float(adapted(jnp.float32(expected), used, 1e-4)))
    assert float(raised.factors["kl"]) == 2
    assert run.update.step._cache_size() == 1

    # It is in the checkpoint; one that a checkpoint has not is 1, and one that is not asked for is left out.
    with Checkpoints(epath.Path(tmp_path / "checkpoints")) as checkpoints:
        checkpoints.save(1, raised, key, {})
        alarms = {name: raised.factors[name] for name in ("learning_rate", "kl")}
        without = dataclasses.replace(raised, factors=alarms)
        checkpoints.save(2, without, key, {})
        checkpoints.wait()
        assert equal(snapshot(checkpoints.restore(1, raised)[0]), snapshot(raised))
        begun = dataclasses.replace(raised, factors=alarms | {"kl_target": jnp.float32(1)})
        restored = checkpoints.restore(2, begun)[0]
        assert {name: float(x) for name, x in restored.factors.items()} == {
            "learning_rate": 0.5,
            "kl": 2,
            "kl_target": 1,
        }
        assert equal(snapshot(checkpoints.restore(1, without)[0]), snapshot(without))
        # What holds a term likewise.
        held = {"motion": {"recent": jnp.float32(0.1), "sum": jnp.float32(-2)}}
        checkpoints.save(3, dataclasses.replace(raised, held=held), key, {})
        checkpoints.wait()
        both = dataclasses.replace(raised, held={name: unheld() for name in ("anti_copy", "motion")})
        restored = checkpoints.restore(3, both)[0]
        assert equal(snapshot(restored.held), snapshot({"anti_copy": unheld(), **held}))
        assert checkpoints.restore(3, raised)[0].held == {}
        other = dataclasses.replace(raised, held={"anti_copy": unheld()})
        for step in (1, 3):
            assert equal(snapshot(checkpoints.restore(step, other)[0].held), snapshot(other.held))


@pytest.mark.slow
def test_guards_on_a_mesh_are_those_of_one_device(settings, tmp_path):
    # The other pre-processing rounds pixels to 8 bits before detection, which rounding errors may turn.
    smooth = {"reward.compat": "roll"}
    results = []
    for fsdp, context in ((1, 1), (2, 2)):
        mesh = {"mesh.fsdp": fsdp, "mesh.context": context, "per_device_train_batch_size": 2 // fsdp}
        run = open_run(settings(**WINDOWS, **GUARDED, **smooth, **mesh), tmp_path)
        batch = run.inputs.batches.place_share(next(run.iterator()))
        results.append(jax.device_get(run.update(run.state, run.frozen, batch, run.inputs.key)[1]))
    want, found = results
    for name in ("loss", "real_loss", "motion", "copying", "reward_share", "ceiling_fraction"):
        np.testing.assert_allclose(found[name], want[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(found["grad_norm"], want["grad_norm"], rtol=1e-3)


def test_guards_that_are_off_leave_no_trace(settings):
    cfg = settings(**WINDOWS)
    plan = make_plan(cfg, make_mesh(dataclasses.asdict(cfg.mesh), jax.devices()[:1]))
    with jax.set_mesh(plan.mesh):
        state, metrics = jax.eval_shape(plan.step, *plan.args)
    assert plan.args[2].keys() == {"clip", "noise_index", "y", "context", "pool", "prefix"}
    assert metrics.keys() == {*METRICS, "finite", "video"}
    assert state.factors.keys() == {"learning_rate", "kl"}
