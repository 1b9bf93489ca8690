"""A plan is the run it plans: the same arguments, the bytes that a run really takes, and every feature compiled for TPU."""

import dataclasses
import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import pytest

from rfl_jax.chips import ACCELERATOR_TYPES, CHIPS, Chip, devices_of
from rfl_jax.config import Config, NoiseSection
from rfl_jax.miniature.world import SIZE
from rfl_jax.plan import show
from rfl_jax.planning.abstract import bytes_per_device, make_plan, on_devices
from rfl_jax.planning.compile import compile_plan, largest_arguments
from rfl_jax.planning.search import changed, least_bytes, variants, walk
from rfl_jax.remat import NAMES
from tests import COMPILER
from tests.runs import open_run

MINI = ["--config=configs/mini.py", "--config.data.num_frames=5", "--config.train_batch_size=4"]


# As a user has it: one device, not the tests' eight.
ONE_DEVICE = os.environ | {"XLA_FLAGS": COMPILER, "PYTHONPATH": "."}


def plan(*arguments, timeout=600):
    command = [sys.executable, "-m", "rfl_jax.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=ONE_DEVICE, timeout=timeout, check=False)


GUARDED = {
    "noise.prefix_cache": "off",
    "ema.decay": 0.99,
    "kl.target": 0.1,
    "real.weight": 0.1,
    "motion.weight": 1.0,
    "motion.copy_weight": 1.0,
}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        GUARDED,
        {"trainable_models": "dit2,vae,text_encoder"},
        {"lora_base_model": "dit,dit2", "mid_timestep": 2, "ema.decay": 0.99, "real.weight": 0.1},
    ],
)
def test_arguments_are_those_of_the_run(settings, tmp_path, changes):
    cfg = settings(
        **{"mesh.fsdp": 2, "mesh.context": 2, "data.max_pixels": 64 * 64, **changes}, per_device_train_batch_size=1
    )
    run = open_run(cfg, tmp_path)
    plan = make_plan(cfg, run.mesh)
    assert (plan.prefix is None) == (run.update.prefix is None)
    key = run.inputs.key
    batch = run.update.start(run.frozen, run.inputs.batches.place_share(next(run.iterator())), key)
    real = (run.state, run.frozen, batch, key)
    planned = plan.args
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(planned), jax.tree.leaves(real), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if b.committed and not jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), name
    # What is reported is what lies on a device, the average among it.
    loaded = (run.state.params, run.state.average, run.frozen)
    found = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(loaded))
    assert bytes_per_device((planned[0].params, planned[0].average, planned[1])) == found
    assert bool(run.state.average) == ("ema.decay" in changes)


@pytest.mark.slow
def test_bytes_are_those_of_a_real_run(tmp_path, clip_folder):
    batch = ["--config.per_device_train_batch_size=4"]
    found = plan(*MINI, *batch, "--topology=local", "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["fits"]
    assert report["mesh"] == {"data": 1, "fsdp": 1, "context": 1}
    planned = report["activations"]

    # The growth of resident memory from before the compiled step to its peak.
    script = tmp_path / "measure.py"
    script.write_text(
        "import sys, threading, gc, jax\n"
        "from etils import epath\n"
        "from ml_collections import ConfigDict\n"
        "from rfl_jax.config import parse\n"
        "from rfl_jax.runs import RunFolder\n"
        "from rfl_jax.training.setup import set_up\n"
        "sys.path.insert(0, '.')\n"
        "from configs.mini import miniature\n"
        "config = miniature(sys.argv[2], '')\n"
        "config.train_batch_size = config.per_device_train_batch_size = 4\n"
        "run = set_up(parse(config), RunFolder(epath.Path(sys.argv[1])))\n"
        "batch, key = run.inputs.batches.place_share(next(run.iterator())), run.inputs.key\n"
        "step = run.update.step.lower(run.state, run.frozen, batch, key).compile()\n"
        "gc.collect()\n"
        "def resident():\n"
        "    return int(open('/proc/self/statm').read().split()[1]) * 4096\n"
        "peak, done = 0, threading.Event()\n"
        "def watch():\n"
        "    global peak\n"
        "    while not done.wait(0.002):\n"
        "        peak = max(peak, resident())\n"
        "before = resident()\n"
        "thread = threading.Thread(target=watch)\n"
        "thread.start()\n"
        "jax.block_until_ready(step(run.state, run.frozen, batch, key))\n"
        "done.set()\n"
        "thread.join()\n"
        "print(peak - before)\n"
    )
    measured = subprocess.run(
        [sys.executable, script, tmp_path, clip_folder / "metadata.csv"],
        capture_output=True,
        text=True,
        env=ONE_DEVICE,
        timeout=600,
        check=False,
    )
    assert measured.returncode == 0, measured.stderr
    assert planned == pytest.approx(int(measured.stdout.split()[-1]), rel=0.2)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu)")
def test_every_feature_compiles_for_tpu(settings, capsys):
    cfg = settings(
        **{"mesh.data": 1, "mesh.fsdp": 1, "mesh.context": 4, "data.max_pixels": SIZE * SIZE}, train_batch_size=4, per_device_train_batch_size=4,
        dtype="bfloat16", attention="flash", lora_rank=8, remat_policy="offload", frozen_memory="pinned_host",
        optimizer_memory="pinned_host", mid_timestep=6,
    )  # fmt: skip
    planned, mesh = on_devices(cfg, devices_of("v5p-8"))
    report = compile_plan(planned, make_plan(planned, mesh), predicting=True)
    assert report.fits
    assert report.devices == 4
    # In host memory wait the block inputs of 2 steps, 6 layers, 4 samples, 8 of 32 tokens, 128 channels, 2 bytes, and the kernels of
    # the expert's 6 layers, 128 wide, in 2 bytes a weight, over 4 devices; with them the adapters' moments.
    kernels = 6 * (8 * 128 * 128 + 2 * 128 * 384) * 2 / 4
    assert report.host >= 2 * 6 * 4 * 8 * 128 * 2 + kernels
    assert report.optimizer < 100
    assert {"all-to-all", "collective-permute", "all-gather"} <= set(report.traffic)
    # Four tensors a layer are exchanged, in 6 layers of 2 steps, for the velocity, its reference and its gradient.
    assert report.traffic["all-to-all"].count >= 3 * 4 * 6 * 2
    assert report.executed_flops > report.model_flops > 0

    predicted = report.predicted
    assert predicted.seconds > report.step_time_s > 0
    assert set(predicted.phases) == {"no_grad_steps", "grad_steps", "vae", "reward", "optimizer", "other"}
    assert list(predicted.phases["grad_steps"]) == ["forward", "recomputed", "backward"]
    passes = [seconds for phase in predicted.phases.values() for seconds in phase.values()]
    assert sum(passes) == pytest.approx(sum(predicted.kinds.values())) == pytest.approx(predicted.seconds)
    assert all(predicted.kinds.values())
    assert predicted.largest[0].seconds == max(part.seconds for part in predicted.largest)
    assert 0 < predicted.mfu < report.step_time_s / predicted.seconds
    assert any("host memory" in note for note in predicted.notes)
    show(planned, report, "v5p-8")
    shown = capsys.readouterr().out
    assert "update, predicted" in shown
    assert "grad_steps, backward" in shown
    show(planned, dataclasses.replace(report, predicted=None, limit=1.05 * report.peak), "v5p-8")
    shown = capsys.readouterr().out
    assert "narrowly" in shown
    assert "a lower bound; --predict predicts" in shown


def test_bad_topologies_are_refused_in_one_line():
    for name in ("", "v9z-3", "v4-8"):
        found = plan(*MINI, f"--topology={name}")
        assert found.returncode == 2
        assert found.stdout == ""
        lines = [line for line in found.stderr.splitlines() if line.startswith("plan: ")]
        assert len(lines) == 1
        assert "--topology" in lines[0]


def test_variants_keep_the_batch_and_fill_the_devices():
    tried = list(variants(Config(train_batch_size=4), 16))
    assert {c["mesh.fsdp"] * c["mesh.context"] for c in tried} == {16}
    # Four samples cannot be spread over sixteen or eight groups.
    assert {c["mesh.context"] for c in tried} == {4, 8, 16}
    assert {c["remat_policy"] for c in tried} == set(NAMES)
    # The axes need not be powers of two, and each micro-batch has its samples.
    assert {c["mesh.context"] for c in variants(Config(train_batch_size=6), 6)} == {1, 2, 3, 6}
    accumulated = Config(train_batch_size=6, gradient_accumulation_steps=2)
    assert {c["mesh.context"] for c in variants(accumulated, 6)} == {2, 6}
    assert not list(variants(Config(train_batch_size=1, per_device_train_batch_size=2), 4))
    # A cache that the configuration refuses is offered, one that cannot be is not.
    uncached = Config(train_batch_size=4, noise=NoiseSection(prefix_cache="off"))
    assert {c["noise.prefix_cache"] for c in variants(uncached, 4)} == {"auto"}
    endless = Config(train_batch_size=4, noise=NoiseSection(prefix_cache="off", per_sample=0))
    assert all("noise.prefix_cache" not in c for c in variants(endless, 4))
    assert len({json.dumps(c) for c in tried}) == len(tried)


@pytest.mark.slow
def test_the_walk_ends_with_the_fastest_that_fits(monkeypatch, settings):
    cfg = settings(**{"mesh.data": 1, "mesh.fsdp": 1, "mesh.context": 1}, train_batch_size=2)
    devices = jax.devices()[:1]
    peaks = {}
    for policy in ("none", "full"):
        variant, mesh = on_devices(changed(cfg, {"remat_policy": policy}), devices)
        made = make_plan(variant, mesh)
        peaks[policy] = compile_plan(variant, made).peak
        assert least_bytes(variant, made) <= peaks[policy]
    assert peaks["full"] < peaks["none"]
    # A device on which not everything can be kept, but what "full" keeps.
    memory = (peaks["none"] + peaks["full"]) / 2
    monkeypatch.setitem(CHIPS, devices[0].device_kind, Chip(1e12, memory, 1e12, 1e12, 4, 16, None))
    tried = list(walk(cfg, devices, fastest=True))
    assert tried[0].cfg.policy == "none"
    assert not tried[0].report.fits
    fitting = [entry for entry in tried if entry.report.fits]
    best = min(fitting, key=lambda entry: entry.report.seconds_a_sample)
    assert best.cfg.policy in ("save_attention", "full")
    assert best.report.peak <= memory
    # Nothing that could not have been faster was compiled after it.
    assert all(entry.report.seconds_a_sample <= best.report.seconds_a_sample for entry in tried)
    monkeypatch.setitem(CHIPS, devices[0].device_kind, Chip(1e12, 1.0, 1e12, 1e12, 4, 16, None))
    refused = list(walk(cfg, devices, fastest=False))
    assert not any(entry.report.fits or entry.report.compile_s for entry in refused)
    names = largest_arguments(made.args)
    assert len(names) == 5
    assert "kernel" in names[0]


@pytest.mark.slow
def test_search_finds_the_fastest_that_fits():
    found = plan(*MINI, "--config.per_device_train_batch_size=4", "--topology=local", "--search", "--json")
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["fits"]
    # Where memory is not limited, nothing is computed again.
    assert report["remat_policy"] == "none"
    assert "--config.remat_policy=none" in report["change"]


def test_a_search_without_variants_is_refused():
    found = plan("--config=configs/mini.py", "--config.train_batch_size=3", "--topology=v5p-8", "--search",
                 "--config.per_device_train_batch_size=2")  # fmt: skip
    assert found.returncode == 2
    assert "config.train_batch_size: 3 fills no mesh" in found.stderr


def test_accelerator_types_have_their_number_of_chips():
    for name, topology in ACCELERATOR_TYPES.items():
        chips = 1
        for size in topology.split(":")[1].split("x"):
            chips *= int(size)
        assert chips == int(name.split("-")[1]) // (2 if name.startswith("v5p") else 1)
