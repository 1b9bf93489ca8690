"""The rollout agrees with the original trainer: schedule, latents, KL and every adapter gradient."""

import json

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors.numpy import load_file

from convert import dit, lora
from rfl_jax.models.lora import add_lora
from rfl_jax.models.weights import fill, flat_shapes
from rfl_jax.sampling.rollout import Expert, rollout
from rfl_jax.sampling.schedule import make_sigmas, plan_spans
from tests.golden import ROOT, case, channels_last, needs_golden, relative


@needs_golden
def test_schedule():
    schedules = json.loads((ROOT / "euler" / "schedules.json").read_text())
    for found in _dictionaries(schedules):
        if {"sigmas", "timesteps"} <= found.keys():
            steps = len(found["sigmas"]) - 1
            sigmas = make_sigmas(steps, found.get("shift", 5.0))
            np.testing.assert_allclose(sigmas, found["sigmas"], atol=1e-6)
            np.testing.assert_allclose(sigmas * 1000, found["timesteps"], rtol=1e-6, atol=1e-3)


def _dictionaries(x):
    if isinstance(x, dict):
        yield x
        for value in x.values():
            yield from _dictionaries(value)
    elif isinstance(x, list):
        for value in x:
            yield from _dictionaries(value)


@needs_golden
def test_latents_kl_and_adapter_gradients():
    folder, config, io = case("rollout")
    hints = {"num_heads": config["model"]["num_heads"], "text_len": config["model"]["text_len"]}
    high = dit.load(folder / "weights_dit.safetensors", **hints)
    low = dit.load(folder / "weights_dit2.safetensors", **hints)
    shapes = flat_shapes(low)
    file = lora.Lora(folder / "weights_lora.safetensors", dit.NAMINGS, shapes)
    adapters = lora.adapters(file, config["lora"]["targets"], low.cfg.num_layers)
    base_graph, base = nnx.split(low)
    tuned = add_lora(
        nnx.merge(base_graph, base),
        rank=config["lora"]["rank"],
        targets=config["lora"]["targets"],
        key=jax.random.key(0),
    )
    graph, trainable, frozen = nnx.split(fill(tuned, adapters, partial=True), nnx.LoRAParam, ...)

    y, context = (jnp.asarray(x) for x in (channels_last(io["in.y"]), io["in.context"]))
    sigmas = make_sigmas(config["steps"], config["shift"])
    spans = plan_spans(sigmas, boundary=0.9, mid=config["first_grad_step"], final=config["last_step"])
    uses_low = np.concatenate([[p.expert == "dit2"] * (p.stop - p.start) for p in spans])
    assert np.array_equal(uses_low, io["out.uses_low_noise_expert"])

    def bind(model):
        return lambda x, t: model(jnp.concatenate([x, y], -1), t, context)

    def run(trainable):
        experts = {
            "dit": Expert(bind(high), None, bind(high)),
            "dit2": Expert(
                bind(nnx.merge(graph, trainable, frozen)),
                bind(nnx.merge(base_graph, base)),
                bind(nnx.merge(graph, jax.lax.stop_gradient(trainable), frozen)),
            ),
        }
        return rollout(experts, jnp.asarray(channels_last(io["in.start_noise"])), sigmas, spans)

    def loss(trainable, weight):
        out = run(trainable)
        inner = jnp.sum(out.latents * channels_last(io["in.c"]))
        kl = jnp.mean(out.kl)
        return weight[0] * inner + weight[1] * kl, (out, inner, kl)

    grad = jax.jit(jax.grad(loss, has_aux=True))
    _, (out, inner, kl) = grad(trainable, jnp.ones(2))
    assert relative(out.trajectory[:, 0], channels_last(io["out.latents_after_step"])) < 1e-4
    assert relative(out.latents, channels_last(io["out.final_latents"])) < 1e-4
    assert relative(out.kl[:, 0], io["out.kl_per_grad_step"]) < 1e-3
    assert abs(kl - io["out.kl"][0]) / io["out.kl"][0] < 1e-3
    assert abs(inner - io["out.inner_product"][0]) < 1e-4 * abs(io["out.inner_product"][0]) + 1e-4

    keys = load_file(folder / "weights_lora.safetensors").keys()
    for term, weight in (("inner_product", (1, 0)), ("kl", (0, 1)), ("total", (1, 1))):
        got = {
            ".".join(map(str, k)): np.asarray(v[...])
            for k, v in nnx.to_flat_state(grad(trainable, jnp.array(weight, jnp.float32))[0])
        }
        named = lora.named(got, dit.NAMINGS["original"], "{module}.lora_{half}.weight")
        assert named.keys() == keys
        for key, value in named.items():
            assert relative(value, io[f"grad.{term}.{key}"]) < 1e-3, (term, key)
