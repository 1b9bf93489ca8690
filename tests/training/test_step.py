"""The step: gradients where they belong, the same on one device and on eight, whatever trains."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from etils import epath
from flax import nnx
from jax.sharding import AxisType

from rfl_jax.errors import UserError
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.dit import DiT
from rfl_jax.rewards.face import SCORE_MEAN, SCORE_STD
from rfl_jax.sampling.schedule import plan_phases, sigmas
from rfl_jax.sharding import check_rules
from rfl_jax.training import setup as run_setup
from rfl_jax.training.setup import set_up
from rfl_jax.training.state import Frozen, Networks
from rfl_jax.training.step import Sampler, bind_experts, dit_forward_flops, make_loss, make_sampler, start_noise
from tests.golden import relative


def use_devices(monkeypatch, count):
    """A mesh of the first devices only."""

    def mesh(sizes):
        devices = np.array(jax.devices()[:count]).reshape([max(n, 1) for n in sizes.values()])
        return jax.sharding.Mesh(devices, tuple(sizes), axis_types=(AxisType.Auto,) * len(sizes))

    monkeypatch.setattr(run_setup, "make_mesh", mesh)


def snapshot(tree):
    return jax.tree.map(np.asarray, tree)


def test_eight_devices_equal_one(monkeypatch, settings, tmp_path):
    results = []
    for count, (data, fsdp), local in ((1, (1, 1), 8), (8, (2, 4), 1)):
        use_devices(monkeypatch, count)
        cfg = settings(
            **{"mesh.data": data, "mesh.fsdp": fsdp, "train_batch_size": 8, "per_device_train_batch_size": local}
        )
        run = set_up(cfg, epath.Path(tmp_path))
        batch = run.place(next(run.iterator()))
        state, metrics = run.step(run.state, run.frozen, batch, run.key)
        moments = jax.tree.leaves(state.opt_state, is_leaf=lambda x: isinstance(x, jax.Array))
        if count == 8:
            # Adapters and their moments really lie in pieces.
            assert any(not m.sharding.is_fully_replicated for m in moments)
            assert any(not p.sharding.is_fully_replicated for p in jax.tree.leaves(state.params))
        results.append((snapshot(state.params), {k: np.asarray(v, np.float64) for k, v in metrics.items()}))
    (one, m1), (eight, m8) = results
    for key, tolerance in (("loss", 1e-4), ("face_score", 1e-4), ("grad_norm", 1e-3)):
        np.testing.assert_allclose(m8[key], m1[key], rtol=tolerance, err_msg=key)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(eight), strict=True):
        # One Adam step turns rounding in tiny gradients into differences of the rate's size; most entries agree.
        assert np.quantile(np.abs(a - b), 0.99) < 1e-4


def test_loss_is_the_designs_and_only_adapters_change(monkeypatch, settings, tmp_path):
    use_devices(monkeypatch, 1)
    run = set_up(settings(), epath.Path(tmp_path))
    before, adapters = snapshot(run.frozen), snapshot(run.state.params)
    assert set(adapters) == {"dit2"}
    assert {str(path[-1]) for path, _ in nnx.to_flat_state(run.state.params["dit2"])} == {"lora_a", "lora_b"}
    batch = run.place(next(run.iterator()))
    state, metrics = run.step(run.state, run.frozen, batch, run.key)
    # Adapters start at zero: no divergence, and the loss is the reward's alone.
    assert metrics["kl_loss"] == 0
    assert metrics["no_face_fraction"] == 0
    np.testing.assert_allclose(metrics["loss"], -(metrics["face_score"] - SCORE_MEAN) / SCORE_STD * 0.1, rtol=1e-5)
    state, metrics = run.step(state, run.frozen, batch, run.key)
    assert metrics["kl_loss"] > 0
    for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(snapshot(run.frozen)), strict=True):
        assert np.array_equal(a, b)
    changed = [
        not np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(adapters), jax.tree.leaves(snapshot(state.params)), strict=True)
    ]
    assert all(changed)


def test_accumulated_micro_batches_equal_one_batch(monkeypatch, settings, tmp_path):
    use_devices(monkeypatch, 1)
    results = []
    for size, count in ((4, 1), (2, 2)):
        cfg = settings(train_batch_size=4, per_device_train_batch_size=size, gradient_accumulation_steps=count)
        run = set_up(cfg, epath.Path(tmp_path))
        _, metrics = run.step(run.state, run.frozen, run.place(next(run.iterator())), run.key)
        results.append(metrics)
    for key, tolerance in (("loss", 1e-4), ("face_score", 1e-4), ("grad_norm", 1e-3)):
        np.testing.assert_allclose(results[0][key], results[1][key], rtol=tolerance)


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        ({"lora_base_model": "", "trainable_models": "dit2"}, {"dit2"}),
        ({"lora_base_model": "dit,dit2", "mid_timestep": 2}, {"dit", "dit2"}),
        (
            {"lora_base_model": "", "trainable_models": "vae,text_encoder", "max_grad_norm": 10.0},
            {"vae", "text_encoder"},
        ),
    ],
)
def test_what_is_named_trains_and_nothing_else(monkeypatch, settings, tmp_path, changes, trained):
    use_devices(monkeypatch, 1)
    run = set_up(settings(**changes), epath.Path(tmp_path))
    assert set(run.state.params) == trained
    before, frozen = snapshot(run.state.params), snapshot(run.frozen)
    batch = run.place(next(run.iterator()))
    state, first = run.step(run.state, run.frozen, batch, run.key)
    state, second = run.step(state, run.frozen, batch, run.key)
    assert first["kl_loss"] == pytest.approx(0, abs=1e-9)
    if trained & {"dit", "dit2"}:
        assert second["kl_loss"] > 0
    for name in trained:
        pairs = zip(jax.tree.leaves(before[name]), jax.tree.leaves(snapshot(state.params[name])), strict=True)
        assert np.mean([not np.array_equal(a, b) for a, b in pairs]) > 0.9, name
    for a, b in zip(jax.tree.leaves(frozen), jax.tree.leaves(snapshot(run.frozen)), strict=True):
        assert np.array_equal(a, b)


def test_adapter_gradient_equals_finite_differences(monkeypatch, settings, tmp_path):
    use_devices(monkeypatch, 1)
    run = set_up(settings(train_batch_size=1, per_device_train_batch_size=1), epath.Path(tmp_path))
    batch = {k: v[0] for k, v in run.place(next(run.iterator())).items()}
    loss = make_loss(run.cfg, run.networks, run.sampler)
    rng = np.random.default_rng(0)
    params = jax.tree.map(lambda p: p + 0.02 * rng.normal(size=p.shape).astype(np.float32), run.state.params)
    value = jax.jit(lambda p: loss(p, run.frozen, batch, run.key, jnp.int32(0))[0])
    grads = jax.jit(jax.grad(lambda p: loss(p, run.frozen, batch, run.key, jnp.int32(0))[0]))(params)
    norm = optax.tree.norm(grads)
    h = 3e-2
    ahead, behind = (value(jax.tree.map(lambda p, g, s=s: p + s * h * g / norm, params, grads)) for s in (1, -1))
    # The start noise and the detected points move with the weights; neither is differentiated, the points by design.
    assert (ahead - behind) / (2 * h) == pytest.approx(float(norm), rel=0.1)


def test_noise_is_a_function_of_seed_sample_and_step():
    key = jax.random.key(0)

    def draw(samples, step, mode="fresh"):
        return np.asarray(start_noise(key, jnp.array(samples), jnp.int32(step), (2, 3), mode))

    a = draw([4, 9], 0)
    assert np.array_equal(draw([9, 4], 0), a[::-1])
    assert not np.array_equal(draw([4, 9], 1), a)
    fixed = draw([4, 9], 0, "fixed")
    assert np.array_equal(fixed[0], fixed[1])
    assert np.array_equal(fixed, draw([1, 2], 5, "fixed"))


def test_a_network_without_gradient_steps_cannot_train(settings):
    with pytest.raises(UserError, match="dit serves no step with gradient"):
        make_sampler(settings(lora_base_model="dit"), DIT_PRESETS["mini"])
    sampler = make_sampler(
        settings(max_timestep_boundary=0.9, min_timestep_boundary=0.8, mid_timestep=0), DIT_PRESETS["mini"]
    )
    # Steps above the maximal timestep carry no gradient.
    assert [(p.expert, p.start, p.gradient) for p in sampler.phases] == [
        ("dit", 0, False),
        ("dit", 3, True),
        ("dit2", 5, True),
    ]


def test_sharding_rules_cover_every_parameter_and_none_is_unused(monkeypatch, settings, tmp_path):
    use_devices(monkeypatch, 1)
    run = set_up(settings(), epath.Path(tmp_path))
    adapters, weights = run.state.params["dit2"], run.frozen.rest["dit2"]
    check_rules([adapters, weights], "dit", run.mesh, adapted=True)
    check_rules([weights], "dit", run.mesh, adapted=False)
    with pytest.raises(KeyError, match="matches no parameter"):
        check_rules([weights], "dit", run.mesh, adapted=True)
    with pytest.raises(KeyError, match="no sharding rule for"):
        check_rules([weights], "umt5", run.mesh, adapted=False)


def test_first_frame_in_the_latents_has_timestep_zero_and_guidance_extrapolates():
    cfg = dataclasses.replace(
        DIT_PRESETS["mini"],
        in_dim=48,
        out_dim=48,
        dim=32,
        ffn_dim=32,
        num_heads=2,
        num_layers=1,
        first_frame_in_latents=True,
        boundary=None,
    )
    rng = np.random.default_rng(0)
    model = DiT(cfg, rngs=nnx.Rngs(0))
    graph, weights = nnx.split(model)
    frozen = Frozen({"dit": weights}, {})
    levels = sigmas(8, 5.0)
    sampler = Sampler(cfg, levels, plan_phases(levels, boundary=None, mid=4, final=7), 3.0)
    batch = {
        "y": rng.normal(size=(2, 3, 4, 4, 48)).astype(np.float32),
        "context": rng.normal(size=(2, cfg.text_len, cfg.text_dim)).astype(np.float32),
        "negative_context": rng.normal(size=(1, cfg.text_len, cfg.text_dim)).astype(np.float32),
    }
    networks = Networks({"dit": graph}, {"dit": graph}, ())
    experts, keep = bind_experts(networks, sampler, {}, frozen, batch)
    x = keep(jnp.asarray(rng.normal(size=(2, 3, 4, 4, 48)).astype(np.float32)))
    assert np.array_equal(x[:, 0], batch["y"][:, 0])
    tokens = np.full((2, 12), 500.0, np.float32) * (np.arange(12) >= 4)
    with_text = model(x, tokens, batch["context"])
    without = model(x, tokens, np.repeat(batch["negative_context"], 2, 0))
    assert relative(experts["dit"].velocity(x, jnp.full(2, 500.0)), without + 3.0 * (with_text - without)) < 1e-5
    # Nothing of it trains: no reference, and nothing to diverge from.
    assert experts["dit"].reference is None


def test_forward_flops_are_the_designs():
    cfg = DIT_PRESETS["wan2_2_i2v_a14b"]
    for tokens, tera in ((18_900, 755), (32_760, 1_678), (75_600, 6_523)):
        assert dit_forward_flops(cfg, tokens) / 1e12 == pytest.approx(tera, rel=2e-3)
