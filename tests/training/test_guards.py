"""What must not spoil a run: numbers that are none, a second run in the folder, a full disk, a changed configuration."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from rfl_jax.errors import RunError
from rfl_jax.runs import RunFolder
from rfl_jax.training.loop import train
from tests.runs import open_run, read_metrics


def snapshot(tree):
    # The step donates its state.
    return [np.array(x) for x in jax.tree.leaves(tree)]


def equal(a, b):
    return all(np.array_equal(x, y, equal_nan=True) for x, y in zip(a, b, strict=True))


def with_nan(frozen, network="dit2"):
    """Frozen weights of which one number is none."""
    blocks = frozen.rest[network]["blocks"]["ffn"]["up"]
    spoilt = jax.tree.map(lambda x: x, frozen)
    kernel = blocks["kernel"][...]
    spoilt.rest[network]["blocks"]["ffn"]["up"]["kernel"][...] = kernel.at[(0,) * kernel.ndim].set(jnp.nan)
    return spoilt


def test_updates_that_are_not_finite_are_skipped_and_too_many_end_the_run(settings, tmp_path):
    cfg = settings(max_steps=9, save_steps=1, max_bad_steps=3)
    run, folder = open_run(cfg, tmp_path / "run"), RunFolder(epath.Path(tmp_path / "run"))
    broken, calls, states = with_nan(run.frozen), [], []

    def step(state, frozen, batch, key):
        calls.append(1)
        state, metrics = run.update.step(state, broken if len(calls) in (2, 4, 5, 6) else frozen, batch, key)
        states.append(snapshot(state))
        return state, metrics

    with pytest.raises(RunError) as failure:
        train(dataclasses.replace(run, update=dataclasses.replace(run.update, step=step)), folder)
    text = str(failure.value)
    assert "step 6: dit2.blocks." in text
    assert "lora_a is not finite" in text
    assert "3 steps in a row" in text
    assert "checkpoint is that of step 3" in text
    # A skipped update leaves weights, moments and the schedule's place as they were, to the last bit.
    assert equal(states[0], states[1])
    assert equal(states[2], states[5])
    assert not equal(states[1], states[2])
    lines = read_metrics(tmp_path / "run")
    assert [line["skipped_updates"] for line in lines] == [0, 1, 0, 1, 1, 1]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, True, True]
    text = (tmp_path / "run" / "metrics.jsonl").read_text()
    assert "NaN" not in text
    assert all(json.loads(line) for line in text.splitlines())
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == ["1", "3"]
    # The same command goes on from there.
    cfg = dataclasses.replace(cfg, max_steps=4)
    trained = train(open_run(cfg, tmp_path / "run"), folder)
    assert trained.finished
    assert [line["step"] for line in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
