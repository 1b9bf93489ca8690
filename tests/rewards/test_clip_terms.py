"""Terms by CLIP: published scores and their gradients by the pixels, the frames that are looked at, prompts that are read once."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from convert import store
from rfl_jax.errors import UserError
from rfl_jax.models.clip import PIXEL_MEAN, PIXEL_STD
from rfl_jax.rewards.clip_terms import TEXT, by_nearest
from rfl_jax.rewards.embedder import unit
from rfl_jax.rewards.face import Seen
from rfl_jax.rewards.term import REAL, prepare_term
from rfl_jax.rewards.terms import find_term
from tests.clips import HEAD, SMALL, converted_clip, publish, random_head, random_state, torch_clip
from tests.devices import make_mesh
from tests.golden import relative
from tests.rewards.test_face import make_reward

PROMPT = "a person"
SIZE = SMALL.image_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small random CLIP with head and tokenizer, converted."""
    return converted_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def term(folder):
    """`term(name, **settings)` of `folder`, as preparation has it."""

    def make(name, **settings):
        kind = find_term(name)
        return kind(kind.Settings(name, path=str(folder), **settings), store.open_component("clip", [str(folder)]))

    return make


FACES = functools.cache(make_reward)


@pytest.fixture(autouse=True, scope="module")
def _made():
    """Not while something is traced."""
    FACES()


def seen(video, key=None):
    """Videos without faces."""
    b, t = video.shape[:2]
    frames = jnp.asarray(video).reshape(-1, *video.shape[2:])
    found = jnp.zeros((b * t, 5, 2)), jnp.zeros((b * t, 4)), jnp.zeros(b * t, bool)
    return Seen(FACES(), frames, found, b, t, key=key)


def scored(term, video, prepared, key=None):
    """What a term says of videos."""
    graph, weights = nnx.split(term)
    return jax.jit(lambda weights, *told: nnx.merge(graph, weights)(seen(told[0], told[2]), told[1]))(
        weights, jnp.asarray(video), prepared, key
    )


def prepared_for(term, video):
    """What a term keeps of clips."""
    graph, weights = nnx.split(term)
    return jax.jit(lambda weights, video, tokens: prepare_term(nnx.merge(graph, weights), seen(video), {}, tokens))(
        weights, jnp.asarray(video), tokens(term)
    )


def pixels(b=2, t=5, seed=0, side=SIZE):
    return np.random.default_rng(seed).uniform(-1, 1, (b, t, side, side, 3)).astype(np.float32)


def tokens(term):
    found = type(term).tokens(term.cfg, PROMPT)
    return {name: jnp.asarray(np.stack([x, x])) for name, x in found.items()}


def published(torch, name, video, ids):
    """The score [b, t] by transformers' network and the authors' formulas, and its gradient by the pixels."""
    model = torch_clip(random_state())
    x = torch.from_numpy(video.copy()).requires_grad_()
    images = ((x.flatten(0, 1) + 1) / 2 - torch.from_numpy(PIXEL_MEAN)) / torch.from_numpy(PIXEL_STD)
    out = model(torch.from_numpy(np.asarray(ids, np.int64)[:1]), images.moveaxis(-1, 1))
    if name == "aesthetic":
        scores, head = out.image_embeds, {key: torch.from_numpy(value) for key, value in random_head().items()}
        for i in HEAD:
            scores = scores @ head[f"layers.{i}.weight"].T + head[f"layers.{i}.bias"]
    else:
        factor = model.logit_scale.exp() if name == "pick_score" else 1
        scores = factor * out.image_embeds @ out.text_embeds.T
    scores = scores.reshape(video.shape[:2])
    scores.sum().backward()
    return scores.detach().numpy(), x.grad.numpy()


@pytest.mark.parametrize("name", ["aesthetic", "pick_score", "hps"])
def test_scores_and_gradients_are_the_publishers(term, name):
    torch = pytest.importorskip("torch")
    pytest.importorskip("transformers")
    one, video = term(name, frames=5), pixels()
    ids = tokens(term("hps"))["ids"]
    want, slope = published(torch, name, video, ids)
    graph, weights = nnx.split(one)

    @jax.jit
    def score(video, weights, tokens):
        found = nnx.merge(graph, weights)
        prepared = prepare_term(found, seen(video), {}, tokens)
        result = found(seen(video), prepared)
        return jnp.sum(result.per_frame), result

    (_, found), pull = jax.value_and_grad(score, has_aux=True)(jnp.asarray(video), weights, tokens(one))
    assert relative(found.per_frame, want) < 1e-4
    assert relative(found.score, want.mean(1)) < 1e-4
    assert relative(pull, slope) < 1e-3
    assert found.valid.all()


def test_training_reads_no_prompts_and_has_no_weights_for_it(term):
    for name in ("aesthetic", "pick_score"):
        whole = term(name)
        prepared = prepared_for(whole, pixels())
        assert (TEXT in prepared) == (name != "aesthetic")
        before = scored(whole, pixels(seed=1), prepared).score
        whole.slim()
        assert not any("text" in path for path, _ in nnx.to_flat_state(nnx.state(whole)))
        np.testing.assert_array_equal(scored(whole, pixels(seed=1), prepared).score, before)


def test_the_own_score_of_a_clip_is_kept_with_its_prompt(term):
    one = term("hps")
    prepared = prepared_for(one, pixels())
    np.testing.assert_allclose(prepared[REAL], scored(one, pixels(), prepared).score, rtol=1e-5)
    assert prepared[TEXT].shape == (2, SMALL.projection)
    np.testing.assert_allclose(np.linalg.norm(prepared[TEXT], axis=1), 1, rtol=1e-5)


def test_frames_are_drawn_alike_for_a_key_and_each_as_often():
    video = pixels(b=1, t=7)
    draw = jax.jit(lambda seed: seen(video, jax.random.key(seed)).drawn(3))
    draws = np.asarray(jax.jit(jax.vmap(draw))(jnp.arange(600)))
    assert (np.diff(draws, axis=1) > 0).all()
    shares = np.bincount(draws.ravel(), minlength=7) / len(draws)
    # Three standard deviations of a share of 3/7.
    assert np.abs(shares - 3 / 7).max() < 3 * np.sqrt(3 / 7 * 4 / 7 / len(draws))
    np.testing.assert_array_equal(draws[:3], [draw(i) for i in range(3)])
    assert len({tuple(x) for x in draws[:20]}) > 5


def test_without_a_key_frames_are_evenly_spaced_and_few_are_all():
    video = pixels(b=1, t=9)
    assert seen(video).drawn(3).tolist() == [1, 4, 7]
    assert seen(video).drawn(1).tolist() == [4]
    for key in (None, jax.random.key(0)):
        for count in (9, 12):
            assert seen(video, key).drawn(count).tolist() == list(range(9))


def test_a_score_is_the_mean_of_the_frames_that_were_drawn(term):
    few, every, video = term("aesthetic", frames=2), term("aesthetic", frames=5), pixels()
    whole = np.asarray(scored(every, video, {}).per_frame)
    key = jax.random.key(3)
    which = np.asarray(seen(video, key).drawn(2))
    np.testing.assert_allclose(scored(few, video, {}, key).score, whole[:, which].mean(1), rtol=1e-5)
    slope = np.asarray(jax.grad(lambda x: jnp.sum(scored(few, x, {}, key).score))(jnp.asarray(video)))
    moved = np.abs(slope).max((2, 3, 4)) > 0
    assert (moved == np.isin(np.arange(5), which)[None]).all()


def test_between_the_frames_that_were_looked_at_the_nearest_counts():
    found = by_nearest(jnp.asarray([[1.0, 2.0]]), np.array([1, 4]), 6)
    assert found.tolist() == [[1, 1, 1, 2, 2, 2]]


def test_on_a_mesh_scores_and_gradients_are_those_of_one_device(term):
    one, faces, video = term("hps", frames=3), FACES(), pixels(t=5, side=40)
    graph, weights = nnx.split((one, faces))
    prepared = {TEXT: unit(jax.random.normal(jax.random.key(1), (2, SMALL.projection)))}

    def total(video, weights, prepared):
        one, faces = nnx.merge(graph, weights)
        return jnp.sum(one(faces.see(video, jax.random.key(7)), prepared).score)

    results = []
    for shape in ((1, 1, 1), (1, 2, 2)):
        with jax.set_mesh(make_mesh(*shape)):
            results.append(jax.device_get(jax.jit(jax.value_and_grad(total))(jnp.asarray(video), weights, prepared)))
    (want, slope), (found, other) = results
    assert found == pytest.approx(want, rel=1e-4)
    assert relative(other, slope) < 1e-3


def test_what_a_term_cannot_use_is_refused_in_a_line(tmp_path):
    kind = find_term("aesthetic")
    publish(tmp_path / "source", random_state())
    cfg, arrays = store.convert("clip", [str(tmp_path / "source")])
    store.save(str(tmp_path / "headless"), "clip", cfg, arrays)
    headless = store.open_component("clip", [str(tmp_path / "headless")])
    with pytest.raises(ValueError, match="expected a CLIP with the aesthetic predictor's head"):
        kind(kind.Settings("aesthetic"), headless)
    other = find_term("pick_score")
    with pytest.raises(UserError, match=r"tokenizer\.json: expected what python -m convert clip .*\(no such file\)"):
        other.tokens(other.Settings("pick_score", path=str(tmp_path / "headless")), PROMPT)
    (tmp_path / "headless" / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json: expected what python -m convert clip") as refused:
        other.tokens(other.Settings("pick_score", path=str(tmp_path / "headless")), PROMPT)
    assert "\n" not in str(refused.value)
