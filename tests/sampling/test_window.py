"""Windows: which steps carry gradient, what their gradient is, and what it costs."""

import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rfl_jax.config import Config, KLSection, WindowSection
from rfl_jax.errors import UserError
from rfl_jax.remat import steps_options
from rfl_jax.sampling.denoise import align_directly, denoise
from rfl_jax.sampling.rollout import Expert, rollout
from rfl_jax.sampling.sampler import make_sampler
from rfl_jax.sampling.schedule import Span, make_sigmas, plan_spans
from rfl_jax.sampling.window import draw_frames, draw_steps
from rfl_jax.training.flops import taken

SIGMAS = make_sigmas(8, 5.0)
SPAN = Span("dit2", 4, 8, gradient=True)
SPANS = (Span("dit", 0, 3, gradient=False), Span("dit2", 3, 4, gradient=False), SPAN)
START = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 3, 3, 4)), jnp.float32)
PULL = jnp.asarray(np.random.default_rng(1).normal(size=START.shape), jnp.float32)


def toy(w):
    return lambda x, t: jnp.tanh(w * x) + 1e-3 * t[:, None, None, None, None]


def expert(w):
    return Expert(toy(w), toy(0.5), toy(jax.lax.stop_gradient(w)))


def loss(w, spans=SPANS, **options):
    both = {"dit": expert(w), "dit2": expert(w)}
    out = rollout(both, START, SIGMAS, spans, **options)
    return jnp.sum(PULL * jnp.sin(out.latents)), jnp.mean(out.kl)


def gradients(*arguments, **options):
    """Of the latents' part of the loss and of the KL."""
    return np.array(jax.jacrev(lambda w: jnp.stack(loss(w, *arguments, **options)))(0.7))


def chosen_of(window, **changes):
    """The steps with gradient of each network, or (how many, of how many) where they are drawn."""
    sampler = make_sampler(Config(window=WindowSection(**window), **changes))
    found = {}
    for span in sampler.direct or sampler.spans:
        if span.gradient:
            many = range(span.start, span.stop)
            steps = [(sampler.drawn[span], len(many))] if span in sampler.drawn else list(many)
            found[span.expert] = found.get(span.expert, []) + steps
    return found


BOTH = {"lora_base_model": ("dit", "dit2"), "trainable_models": (), "mid_timestep": 1}


@pytest.mark.parametrize(
    ("window", "changes", "steps"),
    [
        ({}, {}, {"dit2": [4, 5, 6, 7]}),
        ({"stop_input_gradient": True}, {}, {"dit2": [4, 5, 6, 7]}),
        ({"steps": 2}, {}, {"dit2": [6, 7]}),
        ({"steps": 4}, {}, {"dit2": [4, 5, 6, 7]}),
        ({"mode": "uniform", "steps": 2}, {}, {"dit2": [5, 7]}),
        ({"mode": "uniform", "steps": 3}, BOTH, {"dit": [2], "dit2": [4, 6]}),
        ({"mode": "list", "list": ("6", "4")}, {}, {"dit2": [4, 6]}),
        ({"mode": "random", "steps": 1}, {}, {"dit2": [(1, 4)]}),
        ({"mode": "random", "steps": 4}, {}, {"dit2": [4, 5, 6, 7]}),
        ({"mode": "random", "steps": 2}, BOTH, {"dit": [(1, 2)], "dit2": [(1, 5)]}),
        ({"mode": "random", "steps": 4}, BOTH, {"dit": [(1, 2)], "dit2": [(3, 5)]}),
        # Steps of the network that does not train are not among them.
        ({"steps": 2}, {**BOTH, "lora_base_model": ("dit",)}, {"dit": [1, 2]}),
        ({"steps": 6}, {"lora_base_model": (), "trainable_models": ("text_encoder",), "mid_timestep": 1},
         {"dit": [2], "dit2": [3, 4, 5, 6, 7]}),
        ({"direct": True, "steps": 1}, {}, {"dit2": [7]}),
        ({"direct": True, "mode": "random", "steps": 1}, BOTH, {"dit": [1, 2], "dit2": [3, 4, 5, 6, 7]}),
    ],
)  # fmt: skip
def test_a_window_is_these_steps(window, changes, steps):
    assert chosen_of(window, **changes) == steps


@pytest.mark.parametrize(
    ("window", "changes", "message"),
    [
        ({"steps": 5}, {}, r"window.steps: expected at most 4 \(steps 4 to 7 of dit2\), got 5"),
        ({"mode": "list", "list": ("2", "7")}, {}, r"window.list: expected some of steps 4 to 7 of dit2, got 2,7"),
        ({"mode": "random", "steps": 1}, BOTH, r"window.steps: expected some step of dit2 too \(steps 1 to 2 of dit and"),
        ({"steps": 2}, BOTH, r"window.steps: expected some step of dit too .*, got 2"),
        ({"mode": "list", "list": ("1",)}, BOTH, r"window.list: expected some step of dit2 too .*, got 1"),
        ({"steps": 1, "direct": True}, BOTH, r"window.steps: expected some step of dit too .*, or window.mode=random, got 1"),
        ({"steps": 1}, {"lora_base_model": (), "trainable_models": ("vae",)}, "window.steps: expected 0, as nothing"),
        ({"mode": "random", "steps": 2}, {"kl": KLSection(2)}, "kl.every: expected 1, as the window draws the steps, got 2"),
        ({"steps": 1, "direct": True}, {"kl": KLSection(4)}, "kl.every: expected 1, as window.direct takes one step"),
        ({"steps": 3}, {"kl": KLSection(2)}, r"kl.every: expected a divisor of the steps with gradient \(3 of dit2\), got 2"),
    ],
)  # fmt: skip
def test_windows_that_are_none_are_refused(window, changes, message):
    with pytest.raises(UserError, match="config." + message):
        make_sampler(Config(window=WindowSection(**window), **changes))


@pytest.mark.parametrize("policy", ["full", "nested", "offload"])
def test_separate_steps_have_the_hand_built_gradient(policy):
    # DRTune: sum over the steps of (sigma[i+1] - sigma[i]) dv(x[i])/dw, times the gradient of the result.
    x, constants = START, []
    for i in range(8):
        constants.append(x)
        x = x + (SIGMAS[i + 1] - SIGMAS[i]) * toy(0.7)(x, jnp.full(2, SIGMAS[i] * 1000))

    def by_hand(w):
        v = [toy(w)(constants[i], jnp.full(2, SIGMAS[i] * 1000)) for i in range(8)]
        moved = sum(jnp.sum(PULL * jnp.cos(x) * (SIGMAS[i + 1] - SIGMAS[i]) * v[i]) for i in range(4, 8))
        target = [toy(0.5)(constants[i], jnp.full(2, SIGMAS[i] * 1000)) for i in range(8)]
        kl = sum(jnp.mean((v[i] - target[i]) ** 2) / (2 * SIGMAS[i] ** 2) for i in range(4, 8)) / 4
        return jnp.stack([moved, kl])

    want = jax.jacrev(by_hand)(0.7)
    found = gradients(separate=True, **steps_options(policy))
    np.testing.assert_allclose(found, want, rtol=1e-5)
    assert np.all(np.abs(found / gradients() - 1) > 1e-3)


@pytest.mark.parametrize(("count", "separate"), [(1, False), (2, True)])
def test_the_mean_over_all_draws_is_the_gradient_of_all_steps_apart(count, separate):
    # One step alone is apart from the others by itself.
    some = jax.jit(lambda drawn: jax.jacrev(lambda w: jnp.stack(loss(w, drawn={SPAN: drawn}, separate=separate)))(0.7))
    found = [some(jnp.array(steps)) for steps in itertools.combinations(range(4, 8), count)]
    np.testing.assert_allclose(np.mean(found, 0), gradients(separate=True), rtol=1e-5)
    assert np.ptp(found, 0).min() > 0


def test_pairs_of_drawn_steps_count_less():
    # Of three steps two: each step's own gradient in full, what goes through two of them N (K - 1) / (K (N - 1)) = 3/4 times.
    span = Span("dit2", 5, 8, gradient=True)
    spans = (*SPANS[:1], Span("dit2", 3, 5, gradient=False), span)
    draws = list(itertools.combinations(range(5, 8), 2))
    some = jax.jit(lambda drawn: jax.grad(lambda w: loss(w, spans, drawn={span: drawn})[0])(0.7))
    apart = gradients(spans, separate=True)[0]
    fixed = [plan_spans(SIGMAS, boundary=0.9, mid=5, final=7, among=draw) for draw in draws]
    # Each step is in two of the draws, each pair in one.
    pairs = sum(gradients(one)[0] for one in fixed) - 2 * apart
    assert abs(pairs) > 0.01 * abs(apart)
    found = np.mean([some(jnp.array(draw)) for draw in draws])
    np.testing.assert_allclose(found, apart + 0.75 * pairs, rtol=1e-5)


def test_drawn_steps_change_no_value_and_those_between_hand_the_gradient_on():
    drawn = jnp.array([4, 6])
    value, kl = jax.jit(lambda w: loss(w, drawn={SPAN: drawn}))(0.7)
    np.testing.assert_allclose(value, loss(0.7)[0], rtol=1e-6)
    # The same steps named once and for all, each counted once.
    spans = plan_spans(SIGMAS, boundary=0.9, mid=4, final=7, among=(4, 6))
    assert [(span.start, span.gradient) for span in spans[2:]] == [(4, True), (5, False), (6, True), (7, False)]
    np.testing.assert_allclose(kl, loss(0.7, spans)[1], rtol=1e-6)

    def by_hand(weight):
        def of(w):
            x = START
            for i in range(8):
                t, size = jnp.full(2, SIGMAS[i] * 1000), SIGMAS[i + 1] - SIGMAS[i]
                v = toy(w)(x, t) if i in (4, 6) else jax.lax.stop_gradient(toy(w)(x, t))
                v = weight * v + (1 - weight) * jax.lax.stop_gradient(v)
                x = x + size * v
            return jnp.sum(PULL * jnp.sin(x))

        return jax.grad(of)(0.7)

    np.testing.assert_allclose(gradients(spans)[0], by_hand(1), rtol=1e-5)
    np.testing.assert_allclose(gradients(drawn={SPAN: drawn})[0], by_hand(2), rtol=1e-5)


def test_what_is_kept_has_no_gradient_through_steps_without():
    def given(x):
        return x.at[:, :1].set(7.0)

    spans = plan_spans(SIGMAS, boundary=None, mid=6, final=7, among=(6,))

    def latents(push, drawn):
        pushed = Expert(lambda x, t: toy(0.7)(x, t) + push, None, toy(0.7))
        return rollout({"dit": pushed}, START, SIGMAS, spans, keep=given, drawn=drawn).latents

    grad = jax.grad(lambda push: jnp.sum(PULL * latents(push, None)))(jnp.zeros_like(START))
    assert np.all(grad[:, :1] == 0)
    assert np.all(grad[:, 1:] != 0)


def counting(log):
    """Networks that write down, as they run, for what they do."""

    def make(name, w):
        def velocity(kind, w, x, t):
            def tell(t):
                log.append((name, kind, round(float(t[0]), 2)))
                return np.float32(0)

            return toy(w)(x, t) + jax.pure_callback(
                tell, jax.ShapeDtypeStruct((), jnp.float32), jax.lax.stop_gradient(t)
            )

        still = partial(velocity, "still", jax.lax.stop_gradient(w))
        return Expert(partial(velocity, "gradient", w), partial(velocity, "reference", 0.5), still)

    return lambda w: {name: make(name, w) for name in ("dit", "dit2")}


@pytest.mark.parametrize(
    ("window", "changes"),
    [
        ({"steps": 2}, {}),
        ({"mode": "uniform", "steps": 3}, {}),
        ({"mode": "random", "steps": 2}, {}),
        ({"mode": "random", "steps": 3}, BOTH),
        ({"mode": "list", "list": ("4", "6"), "stop_input_gradient": True}, {}),
        ({"direct": True, "mode": "random", "steps": 1}, {}),
    ],
)
def test_what_runs_is_what_is_counted(window, changes):
    cfg = Config(window=WindowSection(**window), remat_policy="none", **changes)
    sampler, log = make_sampler(cfg), []
    clips = jnp.arange(2)

    def scored(w, update):
        x, kl = denoise(
            cfg, sampler, counting(log)(w), lambda x: x, START, key=jax.random.key(0), update=update, clips=clips
        )
        return jnp.sum(PULL * x) + jnp.mean(kl)

    step = jax.jit(jax.value_and_grad(scored))
    choices = []
    for update in range(5):
        log.clear()
        jax.block_until_ready(step(0.7, update))
        for name in ("dit", "dit2"):
            want = [steps for steps in taken(cfg, sampler) if steps.expert == name]
            for kind in ("still", "gradient", "reference"):
                count = sum(getattr(steps, "references" if kind == "reference" else kind) for steps in want)
                assert len([entry for entry in log if entry[:2] == (name, kind)]) == count, (name, kind)
        choices.append(sorted(entry for entry in log if entry[1] == "gradient"))
    assert (len(set(map(str, choices))) > 1) == (cfg.window.mode == "random")


def test_memory_is_that_of_the_steps_with_gradient():
    wide = jnp.asarray(np.random.default_rng(0).normal(size=(4, 4096)) / 64, jnp.float32)

    def network(w):
        return lambda x, t: jnp.tanh(x @ w) @ wide.T

    def temporary(spans, drawn=None):
        def value(w, drawn):
            one = Expert(network(w), None, network(jax.lax.stop_gradient(w)))
            drawn = None if drawn is None else {spans[-1]: drawn}
            return jnp.sum(rollout({"dit": one}, START, SIGMAS, spans, drawn=drawn).latents ** 2)

        return jax.jit(jax.grad(value)).lower(wide, drawn).compile().memory_analysis().temp_size_in_bytes

    every = (Span("dit", 0, 8, gradient=True),)
    one, all_ = temporary((Span("dit", 0, 7, gradient=False), Span("dit", 7, 8, gradient=True))), temporary(every)
    drawn = temporary(every, jnp.zeros(1, jnp.int32))
    assert drawn < 1.25 * one < 0.5 * all_


def test_draws_are_functions_of_seed_and_update():
    spans = {SPAN: 2, Span("dit", 0, 3, gradient=True): 1}
    draw = jax.jit(lambda seed, update: draw_steps(spans, jax.random.key(seed), update)[SPAN])

    def pairs(seed):
        return [tuple(map(int, draw(seed, update))) for update in range(200)]

    found = pairs(0)
    assert found[7] == tuple(map(int, draw_steps(spans, jax.random.key(0), 7)[SPAN]))
    # Each pair in rising order, as often as another within five standard deviations.
    assert set(found) == set(itertools.combinations(range(4, 8), 2))
    assert all(abs(found.count(pair) - 200 / 6) < 5 * (200 / 6) ** 0.5 for pair in set(found))
    assert pairs(1) != found
    starts = [int(draw_frames(jax.random.key(0), update, 3, 8)) for update in range(60)]
    assert set(starts) == set(range(1, 6))


@pytest.mark.parametrize("nested", [False, True])
def test_direct_gives_clean_latents_back_and_its_gradient_is_the_hand_built_one(nested):
    noise = jnp.asarray(np.random.default_rng(2).normal(size=START.shape), jnp.float32)
    spans = (Span("dit", 0, 3, gradient=True), Span("dit2", 3, 8, gradient=True))
    right = Expert(lambda x, t: noise - START, None, toy(0.0))
    align = partial(align_directly, keep=lambda x: x, clean=START, noise=noise, sigmas=SIGMAS, nested=nested)
    np.testing.assert_allclose(
        align({"dit": right, "dit2": right}, spans, step=jnp.int32(5))[0], START, rtol=1e-5, atol=1e-5
    )

    def ours(w, u, step):
        x, kl = align({"dit": expert(w), "dit2": expert(u)}, spans, step=step)
        return jnp.sum(PULL * jnp.sin(x)) + jnp.mean(kl)

    def by_hand(w, s, r):
        x = (1 - s) * START + s * noise
        t = jnp.full(2, s * 1000)
        v = toy(w)(x, t)
        recovered = (x + (r - s) * v - r * noise) / (1 - r)
        kl = jnp.mean((v - toy(0.5)(x, t)) ** 2) / (2 * s**2)
        return jnp.sum(PULL * jnp.sin(recovered)) + kl

    both = jax.jit(jax.value_and_grad(ours, (0, 1)))
    for step in range(8):
        high = step < 3
        value, grads = both(0.7, 0.6, step)
        want = jax.value_and_grad(by_hand)(0.7 if high else 0.6, SIGMAS[step], SIGMAS[step + 1])
        np.testing.assert_allclose((value, grads[0 if high else 1]), want, rtol=1e-3)
        assert grads[1 if high else 0] == 0
