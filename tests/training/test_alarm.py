"""What is kept and what is done against a hacked reward: the average of the weights, and a run's way back at an alarm."""

import dataclasses
import json
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rfl_jax.errors import UserError
from rfl_jax.export import read_expert
from rfl_jax.models.weights import flat_arrays
from rfl_jax.runs import RunFolder, find_checkpoint
from rfl_jax.sampling.trained import read_trained
from rfl_jax.training import checkpoint as checkpoint_module
from rfl_jax.training.checkpoint import Checkpoints
from rfl_jax.training.guard import lowered
from rfl_jax.training.loop import train
from tests.runs import open_run, read_metrics
from tests.training.test_guards import equal, snapshot, with_nan

DECAY = 0.15


@pytest.fixture
def climbing(settings, clip_folder):
    """`climbing(key=value) -> Config` of a run whose reward rises, and copying with it."""

    def make(**changes):
        held_out = {"eval.file_name": str(clip_folder / "metadata.csv"), "eval.num_samples": 4}
        windows = {"num_inference_steps": 2, "mid_timestep": 1, "final_timestep": 1}
        batch = {"train_batch_size": 4, "per_device_train_batch_size": 4, "learning_rate": 5e-3, "save_steps": 100}
        common = {**held_out, **windows, **batch, "eval_every": 2, "max_steps": 6, "ema.decay": DECAY}
        return settings(**(common | changes))

    return make


def copied(state):
    # The step donates its state.
    return jax.tree.map(jnp.copy, state)


def test_the_average_follows_good_updates_and_factors_scale_rate_and_kl(climbing, tmp_path):
    run = open_run(climbing(), tmp_path)
    batch = run.inputs.batches.place_share(next(run.iterator()))
    state, expected = run.state, snapshot(run.state.params)
    assert equal(snapshot(state.average), expected)
    assert state.tuned is state.average
    # Warm-up, the decay of the configuration from the second update on; a skipped update is none.
    for d, frozen in ((0.1, run.frozen), (None, with_nan(run.frozen)), (DECAY, run.frozen), (DECAY, run.frozen)):
        before = snapshot(state)
        state, _ = run.update(state, frozen, batch, run.inputs.key)
        if d is None:
            assert equal(snapshot(state), before)
        else:
            assert not equal(snapshot(state.params), expected)
            expected = [d * a + (1 - d) * p for a, p in zip(expected, snapshot(state.params), strict=True)]
            for a, b in zip(expected, snapshot(state.average), strict=True):
                np.testing.assert_allclose(b, a, rtol=1e-6, atol=1e-9)

    results = []
    for change in (lambda s: s, lambda s: lowered(s, 1.0), lambda s: lowered(s, 3.0)):
        after, metrics = run.update(change(copied(state)), run.frozen, batch, run.inputs.key)
        moved = [a - b for a, b in zip(snapshot(after.params), snapshot(state.params), strict=True)]
        results.append((moved, {name: float(metrics[name]) for name in ("loss", "learning_rate", "kl_loss")}))
    (whole, first), (half, second), (_, third) = results
    assert second == first | {"learning_rate": first["learning_rate"] / 2}
    for a, b in zip(whole, half, strict=True):
        np.testing.assert_allclose(b, a / 2, atol=1e-7)
    assert first["kl_loss"] > 1e-4
    assert third["loss"] - second["loss"] == pytest.approx(2 * first["kl_loss"], rel=1e-2)
    assert not equal(results[2][0], half)
    # All of them by one program.
    assert run.update.step._cache_size() == 1


class KilledError(Exception):
    pass


def start(run, path, call=0, act=None):
    """Trains from the beginning or the last checkpoint. At the beginning of a step, counted from this start, something may
    happen.
    """
    calls = []

    def step(*args):
        calls.append(1)
        if len(calls) == call:
            act()
        return run.update.step(*args)

    update = dataclasses.replace(run.update, step=step)
    return train(dataclasses.replace(run, state=copied(run.state), update=update), RunFolder(epath.Path(path)))


def kill():
    raise KilledError


def record_of(path):
    return json.loads((path / "validation.json").read_text())


def restored(folder, step, like):
    with Checkpoints(folder) as checkpoints:
        return checkpoints.restore(step, like)[0]


def test_an_alarm_lowers_the_rate_and_the_run_resumes_to_the_last_bit(climbing, tmp_path):
    # At this rate copying rises by 0.01 in two steps and by 0.04 in four.
    cfg = climbing(learning_rate=1e-2, **{"guard.on_alarm": "lower", "eval.max_copying_rise": 0.02})
    whole, parts, killed = (epath.Path(tmp_path / name) for name in ("whole", "parts", "killed"))
    # What a sudden end before the last step leaves: the alarm's checkpoint alone.
    run = open_run(cfg, whole)
    trained = start(run, whole, 6, lambda: shutil.copytree(whole, killed))
    record, lines = record_of(whole), read_metrics(whole)
    first, second = record["validations"][:2]
    assert "action" not in first
    assert "copying of the first frame rose" in second["alarm"]
    done = {"action": "lower", "back_to": 2, "learning_rate_factor": 0.5, "kl_factor": 2.0}
    assert {name: second[name] for name in done} == {name: lines[3][name] for name in done} == done
    assert [line["learning_rate"] for line in lines[:5]] == pytest.approx([1e-2] * 4 + [5e-3])
    # The next batch, not the second step's again.
    assert len({line["face_score"] for line in lines}) == 6

    # Interrupted where the validation was due that gives the alarm, and killed after it.
    assert not start(run, parts, 4, lambda: signal.raise_signal(signal.SIGINT)).finished
    assert [entry["step"] for entry in record_of(parts)["validations"]] == [2]
    with pytest.raises(KilledError):
        start(run, parts, 1, kill)
    back, best = restored(parts / "checkpoints", 4, run.state), restored(parts / "best", 2, run.state)
    assert equal(snapshot((back.params, back.average)), snapshot((best.params, best.average)))
    moments, others = (jax.tree.leaves(state.opt_state) for state in (back, best))
    assert [int(a) - int(b) for a, b in zip(moments, others, strict=True) if not a.ndim] == [0, 2]
    assert equal(*([x for x in snapshot(leaves) if x.ndim] for leaves in (moments, others)))
    assert (int(back.step), int(best.step)) == (4, 2)

    for path in (parts, killed):
        again = start(run, path)
        assert read_metrics(path) == lines
        assert record_of(path) == record
        assert equal(snapshot(again.state), snapshot(trained.state))

    # The average is what is handed on, unless the weights themselves are asked for.
    assert json.loads((whole / "run.json").read_text())["tuned"] == "average"
    for raw, weights, word in ((False, trained.state.average, "average"), (True, trained.state.params, "raw")):
        want = {name: np.asarray(x) for name, x in flat_arrays(weights["dit2"]).items()}
        exported = read_expert(RunFolder(whole), find_checkpoint(RunFolder(whole)), "dit2", raw=raw)
        assert exported.metadata["weights"] == word
        for found in (exported.arrays, read_trained(cfg, str(whole), raw=raw)["dit2"]):
            assert found.keys() == want.keys()
            assert all(np.array_equal(found[name], want[name]) for name in want)
    assert not equal(snapshot(trained.state.average), snapshot(trained.state.params))
    without = dataclasses.replace(trained.state, average={})
    assert (trained.state.weights, without.weights) == ("average", "raw")
    assert without.tuned is trained.state.params


def test_an_alarm_ends_the_run_with_the_best_weights(climbing, tmp_path, monkeypatch):
    cfg = climbing(**{"guard.on_alarm": "stop", "eval.max_motion_loss": 0.01})
    run, folder = open_run(cfg, tmp_path), RunFolder(epath.Path(tmp_path))
    begun = snapshot((run.state.params, run.state.average))
    trained = start(run, tmp_path)
    # No validation without alarm: the weights that it began with.
    assert (trained.finished, trained.step, trained.validation.best_step) == (True, 2, None)
    assert equal(snapshot((trained.state.params, trained.state.average)), begun)
    assert trained.validation.end == "an alarm (config.guard.on_alarm)"
    (entry,) = record_of(folder.path)["validations"]
    assert (entry["action"], entry["back_to"]) == ("stop", 0)
    assert equal(snapshot(restored(folder.checkpoints, 2, run.state)), snapshot(trained.state))
    # The same again finds nothing to do; where an alarm only warns it goes on.
    assert start(run, tmp_path, 1, kill).step == 2
    warned = dataclasses.replace(cfg, guard=dataclasses.replace(cfg.guard, on_alarm="warn"))
    with pytest.raises(KilledError):
        start(dataclasses.replace(run, cfg=warned), tmp_path, 1, kill)

    # An average that a checkpoint has not begins at its weights; one that is not wanted is dropped.
    alone = dataclasses.replace(run.state, average={})
    with Checkpoints(folder.checkpoints) as checkpoints:
        assert checkpoints.restore(2, alone)[0].average == {}
        # As earlier releases wrote it.
        parts = ("step", "params", "opt_state")
        monkeypatch.setattr(checkpoint_module, "_items", lambda state: {name: getattr(state, name) for name in parts})
        checkpoints.save(9, trained.state, run.inputs.key, {})
        checkpoints.wait()
        monkeypatch.undo()
        earlier = checkpoints.restore(9, run.state)[0]
    assert equal(snapshot(earlier.average), snapshot(trained.state.params))
    assert snapshot(earlier.factors) == [1, 1]
    with pytest.raises(UserError, match=r"--raw: .*/9 holds no average"):
        read_expert(folder, find_checkpoint(folder, "9"), "dit2", raw=True)
