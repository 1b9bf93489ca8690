"""Counted operations are the design's and the compiler's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rfl_jax.config import Config, KLSection, RealSection, RewardSection, SamplingSection, WindowSection
from rfl_jax.models.wan.config import DIT_PRESETS
from rfl_jax.models.wan.dit import DiT
from rfl_jax.rewards.term import TermSettings
from rfl_jax.sampling.real import trained_experts
from rfl_jax.sampling.sampler import make_sampler
from rfl_jax.training.flops import decoded_frames, dit_flops, dit_forward, forward_passes, int8_flops

A14B = DIT_PRESETS["wan2_2_i2v_a14b"]


@pytest.mark.parametrize(("tokens", "tera"), [(18_900, 755), (32_760, 1_678), (75_600, 6_523)])
def test_forward_is_the_designs(tokens, tera):
    assert dit_forward(A14B, tokens).total / 1e12 == pytest.approx(tera, rel=2e-3)


@pytest.mark.parametrize(("policy", "tera"), [("full", 16_980), ("save_attention", 16_980 - (14_706 - 13_504))])
def test_a_step_executes_the_designs(policy, tera):
    cfg = Config(remat_policy=policy)
    needed, executed = dit_flops(cfg, make_sampler(cfg), (21, 60, 60), 1)
    assert executed / 1e12 == pytest.approx(tera, rel=0.02)
    assert needed < executed
    assert dit_flops(cfg, make_sampler(cfg), (21, 60, 60), 3)[1] == pytest.approx(3 * executed)


@pytest.mark.parametrize("every", [2, 4])
def test_steps_that_are_not_compared_spare_the_reference(every):
    each, some = Config(), Config(kl=KLSection(every=every))
    sampler = make_sampler(some)
    spared = 4 - 4 // every
    for a, b in zip(*(dit_flops(cfg, sampler, (21, 60, 60), 2) for cfg in (each, some)), strict=True):
        assert a - b == pytest.approx(2 * spared * dit_forward(A14B, 18_900).total)
    assert forward_passes(each, sampler)["dit2"] - forward_passes(some, sampler)["dit2"] == spared


def test_the_untrained_networks_video_takes_every_step_once_more_without_gradient():
    with_motion = {"motion": TermSettings("motion", against="untrained")}
    real, untrained = (Config(reward=RewardSection(terms=terms)) for terms in ((), tuple(with_motion.items())))
    sampler = make_sampler(real)
    for a, b in zip(*(dit_flops(cfg, sampler, (21, 60, 60), 2) for cfg in (real, untrained)), strict=True):
        assert b - a == pytest.approx(2 * 8 * dit_forward(A14B, 18_900).total)


def test_a_prediction_without_gradient_is_a_forward_pass():
    both, alone = (
        Config(remat_policy="save_attention", sampling=SamplingSection(guidance_scale=5.0, guidance_gradient=way))
        for way in ("both", "conditional")
    )
    one = dit_forward(A14B, 18_900)
    (needed, executed), (less, run) = (dit_flops(cfg, make_sampler(cfg), (21, 60, 60), 1) for cfg in (both, alone))
    # Four steps with gradient, whose backward pass and second forward pass are left out.
    assert needed - less == pytest.approx(4 * (one.linear + 2 * one.attention))
    assert executed - run == pytest.approx(4 * (2 * one.linear + 2.5 * one.attention))
    again, passes = (forward_passes(cfg, make_sampler(cfg))["dit2"] for cfg in (both, alone))
    assert again - passes == 4 * 2


@pytest.mark.parametrize(("policy", "forward"), [("none", 1), ("full", 2), ("nested", 2)])
def test_real_data_takes_one_step_with_gradient_in_the_mean_over_updates(policy, forward):
    without = Config(remat_policy=policy)
    each, some = (dataclasses.replace(without, real=RealSection(weight=0.1, every=every)) for every in (1, 4))
    sampler, one = make_sampler(without), dit_forward(A14B, 18_900)
    base, more, less = (dit_flops(cfg, sampler, (21, 60, 60), 2)[1] for cfg in (without, each, some))
    # Forward, perhaps again, and backward: once for layers that stay, two and a half times for attention.
    assert more - base == pytest.approx(2 * (forward * one.total + one.linear + 2.5 * one.attention))
    assert less - base == pytest.approx((more - base) / 4)
    reads = [forward_passes(cfg, sampler)["dit2"] for cfg in (without, each, some)]
    assert reads[1] - reads[0] == 4 * (reads[2] - reads[0]) == forward + 1


def test_windows_cost_what_their_steps_cost():
    def cost(**window):
        cfg = Config(window=WindowSection(**window))
        return dit_flops(cfg, make_sampler(cfg), (21, 60, 60), 1)

    forward = dit_forward(A14B, 18_900)
    every, two, one = cost(), cost(steps=2), cost(steps=1)
    assert cost(mode="random", steps=2) == cost(mode="uniform", steps=2) == cost(mode="list", list=("4", "6")) == two
    assert cost(stop_input_gradient=True) == every
    # A step without gradient spares the reference, the forward pass again, and the backward pass.
    assert every[1] - two[1] == pytest.approx(2 * (two[1] - one[1]))
    assert two[1] - one[1] == pytest.approx(2 * forward.total + forward.linear + 2.5 * forward.attention)
    # One forward pass more than where the last step has the gradient.
    assert cost(mode="random", steps=1, direct=True)[1] - one[1] == pytest.approx(forward.total)
    # The real-data loss stays that of the networks that train.
    direct = Config(window=WindowSection(steps=1, direct=True))
    assert trained_experts(direct, make_sampler(direct)) == ("dit2",)


def test_steps_cost_the_same_of_either_expert():
    both = Config(
        lora_base_model=("dit", "dit2"),
        trainable_models=(),
        mid_timestep=0,
        window=WindowSection(mode="random", steps=4),
    )
    sampler, latents = make_sampler(both), (21, 60, 60)
    assert dit_flops(both, sampler, latents, 2) == dit_flops(Config(), make_sampler(Config()), latents, 2)
    # Two of three steps and two of five: forward, again and backward, and their references; the others forward alone.
    assert forward_passes(both, sampler) == {"dit": 1 + 2 * (1 + 2 + 1), "dit2": 3 + 2 * (1 + 2 + 1)}
    real = dataclasses.replace(both, real=RealSection(weight=0.1))
    assert forward_passes(real, sampler) == {"dit": 9 + 3, "dit2": 11 + 3}


def test_frames_before_those_scored_are_decoded_forward():
    assert decoded_frames(Config(), 21) == (0, 21)
    # A window of 5 begins at 1 to 16.
    assert decoded_frames(Config(reward=RewardSection(frames=5)), 21) == (np.mean(range(1, 17)), 5)
    assert decoded_frames(Config(reward=RewardSection(frames=5)), 5) == (0, 5)


@pytest.mark.parametrize(
    ("changes", "passes"),
    [
        ({}, 3 + 1 + 4),
        ({"kl": KLSection(every=4)}, 3 + 1 + 1),
        # Weights that train in full are not int8; the other expert's are.
        ({"lora_base_model": ()}, 3),
        ({"frozen_activations": ""}, 0),
    ],
)
def test_forward_passes_without_gradient_are_of_8_bits(changes, passes):
    cfg = Config(**{"frozen_weights": "int8", "frozen_activations": "int8"} | changes)
    found = int8_flops(cfg, make_sampler(cfg), (21, 60, 60), 2)
    assert found == pytest.approx(2 * passes * dit_forward(A14B, 18_900).linear)


def test_the_compiler_counts_the_same():
    cfg = dataclasses.replace(DIT_PRESETS["mini"], num_layers=1, dim=256, num_heads=8, ffn_dim=512)
    graph, weights = nnx.split(nnx.eval_shape(lambda: DiT(cfg, remat_policy="none", rngs=nnx.Rngs(0))))
    x = jax.ShapeDtypeStruct((1, 4, 16, 16, cfg.in_dim), jnp.float32)
    context = jax.ShapeDtypeStruct((1, cfg.text_len, cfg.text_dim), jnp.float32)
    forward = jax.jit(lambda w, x, c: nnx.merge(graph, w)(x, jnp.zeros(1), c))
    cost = forward.lower(weights, x, context).compile().cost_analysis()
    # Embeddings, head, elementwise work and the turning of pairs, which grows with a head's width, on top.
    assert cost["flops"] == pytest.approx(dit_forward(cfg, 4 * 8 * 8).total, rel=0.15)
