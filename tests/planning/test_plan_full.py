"""The full-size step compiled for real slices: minutes each, run by hand (`pytest -m slow`)."""

import json
import re
from importlib.util import find_spec

import jax
import pytest

from rfl_jax.chips import devices_of
from rfl_jax.planning.abstract import make_plan, on_devices
from rfl_jax.planning.compile import LEAST
from rfl_jax.planning.search import PREDICTED
from tests.planning.test_plan import plan

A14B = ["--config=configs/wan2_2_i2v_a14b.py:original", "--json"]
pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("libtpu") is None, reason="needs libtpu")]


def mesh(fsdp, context):
    return ["--config.mesh.data=1", f"--config.mesh.fsdp={fsdp}", f"--config.mesh.context={context}"]


@pytest.mark.parametrize(("topology", "axes", "gib"), [("v5p-8", (1, 4), 45), ("v6e-16", (2, 8), 25)])
def test_the_14b_step_fits(topology, axes, gib):
    found = plan(*A14B, *mesh(*axes), "--config.remat_policy=save_attention", f"--topology={topology}", timeout=1500)
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    # Adapters of rank 32 have 153 million parameters, and Adam two moments of each, in 4 bytes.
    assert report["optimizer"] * report["devices"] == pytest.approx(2 * 4 * 153e6, rel=0.01)
    # The low-noise expert alone: the prefix is cached.
    assert report["weights"] * report["devices"] > 28.5e9
    assert report["peak"] < gib * 2**30


def test_a_chip_too_small_is_refused_with_what_was_needed():
    found = plan(*A14B, *mesh(1, 4), "--config.remat_policy=nested", "--topology=v5e-4", timeout=3000)
    assert found.returncode == 1, found.stderr
    report = json.loads(found.stdout)
    assert not report["fits"]
    assert report["needed"] > report["limit"]


def test_forward_passes_without_gradient_multiply_integers(settings):
    changes = {"kl.every": 4, "mesh.context": 4, "remat_policy": "full", "attention": "flash"}
    cfg = settings(dtype="bfloat16", frozen_weights="int8", frozen_activations="int8", **changes)
    cfg, mesh = on_devices(cfg, devices_of("v5p:2x2x1"))
    made = make_plan(cfg, mesh)
    with jax.set_mesh(mesh):
        text = made.step.lower(*made.args).compile(compiler_options={"xla_optimization_level": LEAST}).as_text()
    # Ten linear layers in the loop over the layers of the step before the gradient, and in that of the reference.
    assert len(re.findall(r"= s32\[[\d,]*\]\S* convolution\(", text)) == 2 * 10


def test_a_search_ranks_what_fits_by_predicted_time():
    found = plan("--config=configs/mini.py", "--config.data.num_frames=5", "--config.train_batch_size=4", "--config.per_device_train_batch_size=4",
                 "--topology=v5e-4", "--search", "--predict", "--json", timeout=6000)  # fmt: skip
    assert found.returncode == 0, found.stderr
    report = json.loads(found.stdout)
    told = re.findall(r"^tried (.*): fits, ([\d.]+) s predicted$", found.stderr, re.MULTILINE)
    assert len(told) == PREDICTED
    assert report["change"] == min(told, key=lambda line: float(line[1]))[0]
    assert report["predicted"]["seconds"] == pytest.approx(min(float(seconds) for _, seconds in told), abs=0.01)
