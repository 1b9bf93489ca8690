"""A plan is the run it plans: the same arguments, the bytes that a run really takes, and every feature compiled for TPU."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import jax
import pytest
from etils import epath

from rfl_jax.config import Config
from rfl_jax.plan import changes
from rfl_jax.planning.abstract import make_plan
from rfl_jax.planning.chips import ACCELERATOR_TYPES
from rfl_jax.training.setup import set_up
from tests.runs import use_devices

MINI = ["--config=configs/mini.py", "--config.train_batch_size=4"]


def plan(*arguments, timeout=600):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    command = [sys.executable, "-m", "rfl_jax.plan", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout, check=False)


@pytest.mark.parametrize("changes", [{}, {"noise.prefix_cache": "off"}, {"trainable_models": "dit2,vae,text_encoder"}])
def test_arguments_are_those_of_the_run(monkeypatch, settings, tmp_path, changes):
    use_devices(monkeypatch)
    cfg = settings(
        **{"mesh.fsdp": 2, "mesh.context": 2, "data.max_pixels": 64 * 64, **changes}, per_device_train_batch_size=1
    )
    run = set_up(cfg, epath.Path(tmp_path))
    plan = make_plan(cfg, run.mesh)
    assert (plan.prefix is None) == (run.jitted_prefix is None)
    batch = run.start(run.frozen, run.place(next(run.iterator())), run.key)
    real = (run.state, run.frozen, batch, run.key)
    planned = plan.args
    assert jax.tree.structure(planned) == jax.tree.structure(real)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(planned), jax.tree.leaves(real), strict=True):
        name = jax.tree_util.keystr(path)
        assert (a.shape, a.dtype) == (b.shape, b.dtype), name
        if b.committed and not jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), name


def test_bytes_are_those_of_a_real_run(tmp_path):
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
        "from rfl_jax.training.setup import set_up\n"
        "sys.path.insert(0, '.')\n"
        "from configs.mini import get_config\n"
        "config = get_config()\n"
        "config.train_batch_size = config.per_device_train_batch_size = 4\n"
        "run = set_up(parse(config), epath.Path(sys.argv[1]))\n"
        "batch = run.place(next(run.iterator()))\n"
        "step = run.jitted.lower(run.state, run.frozen, batch, run.key).compile()\n"
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
        "jax.block_until_ready(step(run.state, run.frozen, batch, run.key))\n"
        "done.set()\n"
        "thread.join()\n"
        "print(peak - before)\n"
    )
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"} | {"PYTHONPATH": "."}
    measured = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, env=environment, timeout=600, check=False
    )
    assert measured.returncode == 0, measured.stderr
    assert planned == pytest.approx(int(measured.stdout.split()[-1]), rel=0.2)


@pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu (pip install libtpu)")
def test_every_feature_compiles_for_tpu():
    mesh = ["--config.mesh.data=1", "--config.mesh.fsdp=1", "--config.mesh.context=4"]
    found = plan(
        *MINI, *mesh, "--config.per_device_train_batch_size=4", "--config.dtype=bfloat16", "--config.attention=splash",
        "--config.remat_policy=offload", "--topology=v5p-8", "--json",
    )  # fmt: skip
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    assert report["fits"]
    assert report["devices"] == 4
    # Block inputs of 4 steps, 6 layers, 4 samples, 8 of 32 tokens, 128 channels, 2 bytes wait in host memory.
    assert report["host"] >= 4 * 6 * 4 * 8 * 128 * 2
    assert {"all-to-all", "collective-permute", "all-gather"} <= set(report["traffic"])
    # Four tensors a layer are exchanged, in 6 layers of 4 steps, for the velocity, its reference and its gradient.
    assert report["traffic"]["all-to-all"]["count"] >= 3 * 4 * 6 * 4
    assert report["step_time_s"] > 0
    assert report["executed_flops"] > report["model_flops"] > 0


def test_bad_topologies_are_refused_in_one_line():
    for name in ("", "v9z-3"):
        found = plan(*MINI, f"--topology={name}")
        assert found.returncode == 2
        assert found.stdout == ""
        lines = [line for line in found.stderr.splitlines() if line.startswith("plan: ")]
        assert len(lines) == 1
        assert "--topology" in lines[0]


def test_changes_keep_the_batch_and_fill_the_devices():
    tried = [changed for changed, _ in changes(Config(train_batch_size=4), 16)]
    assert {c["mesh.fsdp"] * c["mesh.context"] for c in tried} == {16}
    # Four samples cannot be spread over sixteen or eight groups.
    assert {c["mesh.context"] for c in tried} == {4, 8, 16}
    assert {c["remat_policy"] for c in tried} == {"full", "save_attention", "offload", "nested"}


def test_accelerator_types_have_their_number_of_chips():
    for name, topology in ACCELERATOR_TYPES.items():
        chips = 1
        for size in topology.split(":")[1].split("x"):
            chips *= int(size)
        assert chips == int(name.split("-")[1]) // (2 if name.startswith("v5p") else 1)
