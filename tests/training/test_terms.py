"""Several terms of the reward in one run: the loss sums them, each is logged, validated, watched and shown by itself."""

import dataclasses
import json
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from flax import nnx

from rfl_jax.config import Config, EvalSection, RewardSection, default_config, dumps, parse
from rfl_jax.errors import UserError
from rfl_jax.evaluation.evaluate import evaluate
from rfl_jax.networks.terms import term_keys
from rfl_jax.planning.abstract import make_plan
from rfl_jax.planning.compile import step_flops
from rfl_jax.reporting.collect import read_run
from rfl_jax.reporting.page import render
from rfl_jax.rewards.face import LOSS_WEIGHT
from rfl_jax.rewards.term import Term, TermScore, TermSettings
from rfl_jax.rewards.terms import find_term
from rfl_jax.runs import RunFolder
from rfl_jax.settings import AtLeast
from rfl_jax.sharding import make_mesh
from rfl_jax.training.flops import dit_flops
from rfl_jax.training.hold import followed, push, unheld
from rfl_jax.training.loop import train
from rfl_jax.training.rewarded import reward_of
from rfl_jax.training.validation import Terms, alarm
from tests.rewards.test_face import make_reward
from tests.runs import open_run, read_metrics

WINDOWS = {"num_inference_steps": 2, "mid_timestep": 1, "final_timestep": 1}
LEVEL = "tests.training.test_terms:Level"
RUNS = []


class Level(Term):
    """The mean of the pixels, times a weight of its own; counts how often it runs."""

    @dataclasses.dataclass(frozen=True)
    class Settings(TermSettings):
        gain: Annotated[float, AtLeast(0), "Factor of the score."] = 1.0
        file: Annotated[str, "A file that it reads."] = ""

    title, unit = "level", "of 1"
    mean, std = 0.25, 0.5

    def __init__(self, cfg):
        self.cfg = cfg
        self.own = nnx.Param(jnp.float32(2))

    @classmethod
    def files(cls, cfg):
        return (cfg.file,) if cfg.file else ()

    def __call__(self, seen, prepared):
        jax.debug.callback(lambda: RUNS.append(1))
        per_frame = self.cfg.gain * self.own[...] * jnp.mean(seen.video, (2, 3, 4))
        return TermScore(jnp.mean(per_frame, 1), jnp.arange(len(per_frame)) == 0, per_frame)


def with_terms(**terms):
    return parsed({"reward.terms": terms})


def parsed(changes):
    config = default_config()
    config.update_from_flattened_dict(changes)
    return parse(config)


class Against(Level):
    """How much brighter than what was prepared, which is the mean of the pixels; three times as much is its drift."""

    holds = True

    def prepare(self, seen):
        return {"mean": jnp.mean(seen.video, (1, 2, 3, 4))}

    def __call__(self, seen, prepared):
        found = super().__call__(seen, prepared)
        more = found.score - prepared["mean"]
        return dataclasses.replace(found, score=more, drift=3 * more)


@pytest.fixture(scope="module")
def reward():
    """`reward(cfg, update, real) -> (loss, gradient by the pixels, tallies)` of two grey videos, whose second one says nothing. The
    drifts are among the tallies.
    """
    faces = make_reward()
    video = jnp.full((2, 5, 32, 32, 3), 0.25)

    def call(cfg, update=0, real=1.0, untrained=None, pushes=None):
        terms = {name: find_term(term.type)(term) for name, term in cfg.other_terms.items()}
        batch = {"pool": jnp.ones((2, 5, 8)), **{f"reward/{name}/real": jnp.full(2, real) for name in terms}}
        batch |= {f"reward/{name}/mean": jnp.full(2, 0.125) for name, term in terms.items() if type(term) is Against}

        def total(video, update):
            before = None if untrained is None else untrained * video
            found = reward_of(cfg, faces, terms, video, batch, update, jax.random.key(0), before, pushes)
            return jnp.mean(found.losses), found.tallies | {
                f"{name}/drift": drift for name, drift in found.drifts.items()
            }

        (loss, tallies), slope = jax.jit(jax.value_and_grad(total, has_aux=True))(video, jnp.int32(update))
        jax.effects_barrier()
        return float(loss), np.asarray(slope), {name: tuple(map(float, tally)) for name, tally in tallies.items()}

    return call


def test_the_loss_sums_standardised_scores_of_those_that_are_valid(reward):
    level = -(2 * 0.25 - 0.25) / 0.5 * LOSS_WEIGHT
    loss, slope, tallies = reward(with_terms(face={}, a={"type": LEVEL}, b={"type": LEVEL, "weight": 0.5, "gain": 2.0}))
    # Grey pictures have no face, and the second sample has no score: the mean is over both.
    assert loss == pytest.approx((level - 0.5 * (2 * 2 * 0.25 - 0.25) / 0.5 * LOSS_WEIGHT) / 2, rel=1e-5)
    assert tallies == {"face": (0, 0), "a": (0.5, 1), "b": (1.0, 1)}
    pixels = slope[0].size
    np.testing.assert_allclose(slope[0], -(2 + 0.5 * 4) / 0.5 * LOSS_WEIGHT / 2 / pixels, rtol=1e-5)
    assert not slope[1].any()


def test_a_watched_term_is_seen_and_not_trained_on(reward):
    # Grey pictures have no face: the term that is trained on gives nothing here.
    loss, slope, tallies = reward(with_terms(face={}, a={"type": LEVEL, "weight": 0.0}))
    assert loss == 0
    assert not slope.any()
    assert tallies == {"face": (0, 0), "a": (0.5, 1)}


def test_beyond_the_ceiling_a_term_has_no_gradient(reward):
    cfg = with_terms(a={"type": LEVEL, "ceiling": True})
    loss, slope, tallies = reward(cfg, real=0.4)
    assert loss == pytest.approx(-(0.4 - 0.25) / 0.5 * LOSS_WEIGHT / 2, rel=1e-5)
    assert not slope.any()
    assert tallies == {"a": (0.5, 1)}
    assert reward(cfg, real=0.6)[1].any()


def test_a_term_may_compare_with_the_untrained_networks_video(reward):
    kind = "tests.training.test_terms:Against"
    cfg = with_terms(a={"type": kind, "against": "untrained", "every": 2}, b={"type": kind}, c={"type": LEVEL})
    _, slope, tallies = reward(cfg, untrained=3.0)
    assert tallies["a"] == pytest.approx((2 * 0.25 - 3 * 0.25, 1))
    assert tallies["b"] == pytest.approx((2 * 0.25 - 0.125, 1))
    assert tallies["c"] == (0.5, 1)
    # What is compared with has no gradient, though it was made of the same pixels.
    np.testing.assert_allclose(slope, reward(cfg, untrained=0.0)[1], rtol=1e-6)
    # Its ceiling is what that video scores.
    limited = with_terms(a={"type": kind, "against": "untrained", "ceiling": True})
    assert not reward(limited, untrained=0.5)[1].any()
    assert reward(limited, untrained=1.5)[1].any()


def test_every_third_update_has_a_term_three_times_as_strong_and_the_others_do_not_run_it(reward):
    loss, slope, tallies = reward(with_terms(a={"type": LEVEL}))
    cfg = with_terms(a={"type": LEVEL, "every": 3})
    RUNS.clear()
    found = [reward(cfg, update) for update in range(6)]
    assert len(RUNS) == 2
    assert np.mean([x[0] for x in found]) == pytest.approx(loss)
    np.testing.assert_allclose(np.mean([x[1] for x in found], 0), slope, rtol=1e-5)
    assert [bool(x[1].any()) for x in found] == [True, False, False] * 2
    assert [x[2]["a"] for x in found] == [tallies["a"], (0, 0), (0, 0)] * 2


def test_a_term_that_holds_its_mean_pushes_all_videos_alike(reward):
    kind = "tests.training.test_terms:Against"
    row = {"type": kind, "weight": 0.5}
    loss, slope, tallies = reward(with_terms(a=row))
    drift = 3 * (2 * 0.25 - 0.125)
    held, pushed, told = reward(with_terms(a=row | {"hold": True}), pushes={"a": jnp.float32(-2)})
    assert held - loss == pytest.approx(-2 * drift / 2 / 0.5 * LOSS_WEIGHT, rel=1e-5)
    assert told == tallies | {"a/drift": pytest.approx((drift, 1))}
    pixels = slope[0].size
    np.testing.assert_allclose((pushed - slope)[0], -2 * 3 * 2 / 2 / 0.5 * LOSS_WEIGHT / pixels, rtol=1e-4)
    assert not (pushed - slope)[1].any()
    # Nothing is pushed before anything has drifted, and nothing where it is not the term's turn.
    np.testing.assert_array_equal(reward(with_terms(a=row | {"hold": True}), pushes={"a": jnp.float32(0)})[1], slope)
    seldom = with_terms(a=row | {"hold": True, "every": 2})
    taught, left = (reward(seldom, update, pushes={"a": jnp.float32(-2)}) for update in (0, 1))
    np.testing.assert_allclose(taught[1], 2 * pushed, rtol=1e-5)
    assert taught[2] == told
    assert not left[1].any()
    assert left[2] == {"a": (0, 0), "a/drift": (0, 0)}
    # A term that is only watched may hold its mean.
    alone = with_terms(face={}, a=row | {"weight": 0.0, "hold": True})
    np.testing.assert_allclose(reward(alone, pushes={"a": jnp.float32(-2)})[1], pushed - slope, rtol=1e-4)


SEVERAL = {
    "face": {},
    "motion": {"weight": 0.5, "against": "untrained", "hold": True},
    "light": {"type": "examples.own_reward:Brightness", "weight": 0.5, "every": 2},
    "level": {"type": LEVEL, "weight": 0.0},
    "sharpness": {"weight": 0.25},
}
SHOWN = [f"reward/{name}" for name in ("level", "light", "motion", "sharpness")]


def test_a_run_of_several_terms_trains_validates_and_reports_each(settings, tmp_path, clip_folder):
    header, *rows = (clip_folder / "metadata.csv").read_text().splitlines()
    file = tmp_path / "metadata.csv"
    file.write_text("\n".join([header, *(f"{clip_folder}/{row}" for row in rows[:2])]) + "\n")
    cfg = settings(
        **WINDOWS, file_name=str(file), eval_every=2,
        **{"reward.terms": SEVERAL, "eval.file_name": str(file), "eval.num_samples": 2},
    )  # fmt: skip
    folder = RunFolder(epath.Path(tmp_path / "run"))
    run = open_run(cfg, tmp_path / "run")
    # Its weights are there as those of other networks are, and stay.
    assert float(run.frozen.rest["terms"][0]["own"][...]) == 2
    trained = train(run, folder)
    first, second = read_metrics(tmp_path / "run")
    for line in (first, second):
        assert line["reward/face"] == line["face_score"]
        assert 0 < line["reward/motion"] <= 1
        assert 0 < line["reward/sharpness"] <= 1
        assert line["reward/level"] is not None
    # Adapters begin at zero, with what the network makes untrained.
    assert first["reward/motion"] == 1 > second["reward/motion"]
    assert abs(first["reward/motion/drift"]) < 1e-4 < abs(second["reward/motion/drift"])
    assert first["reward/motion/push"] == 0
    held = followed(unheld(), jnp.float32(first["reward/motion/drift"]), jnp.int32(1))
    assert second["reward/motion/push"] == pytest.approx(float(push(held)))
    held = followed(held, jnp.float32(second["reward/motion/drift"]), jnp.int32(1))
    assert jax.tree.map(float, trained.state.held) == {"motion": pytest.approx(jax.tree.map(float, held))}
    # In the second update it is not this term's turn.
    assert 0 < first["reward/light"] <= 1
    assert second["reward/light"] is None
    for clip in run.inputs.clips.training:
        assert all(clip.term_file(key).exists() for key in term_keys(cfg).values())
        assert float(clip.load_terms(term_keys(cfg))["reward/light/real"]) > 0.5

    validation = json.loads((tmp_path / "run" / "validation.json").read_text())
    assert validation["terms"] == SHOWN
    held_out = trained.validation.held_out
    result = evaluate(
        held_out, {"base": held_out.untrained(trained.state.params), "tuned": trained.state.params}, folder, 2, "raw"
    )
    assert list(result["terms"]) == SHOWN
    assert result["terms"]["reward/level"] == {"title": "level", "better": "higher", "unit": "of 1"}
    for name in SHOWN:
        assert second[f"eval_{name}"] == validation["validations"][0][name]
        assert second[f"eval_{name}"] == pytest.approx(result[name]["tuned"], rel=1e-3, abs=1e-5)
        for way in ("base", "tuned"):
            found = [clip[way][name] for clip in result["clips"]]
            assert result[name][way] == pytest.approx(np.mean(found))
            for clip in result["clips"]:
                assert len(clip[way]["frames"][name]) == len(clip[way]["frames"]["box"])
        assert result["statistics"][name]["rose"] + result["statistics"][name]["fell"] <= 2
    # The real clip is as bright as itself; the network's videos are not quite.
    real = held_out.real(0).measures()
    assert real["reward/light"] > max(result["clips"][0][way]["reward/light"] for way in ("base", "tuned"))

    page = render(read_run(folder), most=2)
    for title in (
        "level (of 1)",
        "brightness like the real clip&#39;s",
        "motion like the real clip&#39;s",
        "sharpness beside frame 0",
    ):
        assert title in page
    for name in ("level", "light", "sharpness"):
        assert f'aria-label="reward: {name}"' in page
    # What is trained against another video than it is validated against has a chart for each.
    for chart in ("reward: motion, against the untrained", "held out: motion, against the real clip"):
        assert f'aria-label="{chart}"' in page
    assert 'aria-label="reward: motion"' not in page
    assert set(json.loads((tmp_path / "run" / "run.json").read_text())["terms"]) == {
        "light",
        "level",
        "motion",
        "sharpness",
    }

    # Measures of other terms are not compared with: the step is judged anew.
    fewer = settings(**WINDOWS, file_name=str(file), eval_every=2, max_steps=4, **{"eval.file_name": str(file)})
    again = train(open_run(fewer, tmp_path / "run"), folder)
    assert [entry["step"] for entry in again.validation.entries] == [2, 4]
    assert not any(name.startswith("reward/") for entry in again.validation.entries for name in entry)


def test_the_face_alone_in_the_table_is_the_default_to_the_last_bit(settings, tmp_path):
    results = []
    for terms in ({}, {"face": {}}):
        run = open_run(settings(**WINDOWS, **{"reward.terms": terms}), tmp_path)
        batch = run.inputs.batches.place_share(next(run.iterator()))
        results.append(jax.device_get(run.update(run.state, run.frozen, batch, run.inputs.key)[1]))
    want, found = results
    assert found.pop("reward/face") == found["face_score"]
    assert want.keys() == found.keys()
    for name, value in want.items():
        assert np.array_equal(value, found[name]), name


def test_prepared_arrays_are_known_by_what_they_depend_on(tmp_path, monkeypatch):
    def key(name="a", **changes):
        return term_keys(with_terms(**{name: {"type": LEVEL, **changes}}))[name]

    # Not by the name, nor by what becomes of the score.
    assert key("b", weight=0.5, every=2, ceiling=True) == key()
    assert key(gain=2.0) != key()
    file = tmp_path / "weights"
    file.write_bytes(b"1")
    first = key(file=str(file))
    file.write_bytes(b"2")
    assert key(file=str(file)) != first
    monkeypatch.setattr(Level, "version", 2)
    assert key() != first
    # By the code of a term that is not on board.
    module = tmp_path / "mine_for_keys.py"
    code = "from rfl_jax.rewards.term import Term\nclass Mine(Term):\n    pass\n"
    module.write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    mine = {"type": "mine_for_keys:Mine"}
    before = term_keys(with_terms(a=mine))["a"]
    module.write_text(code + "# edited\n")
    assert term_keys(with_terms(a=mine))["a"] != before
    # The face's pool is the clip's own.
    assert term_keys(with_terms(face={}, motion={})).keys() == {"motion"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward.terms": {"motoin": {}}}, "config.reward.terms.motoin.type: expected one of face, motion, .*did you mean motion"),
        ({"reward.terms": {"a": {"type": "nowhere:A"}}}, r"config.reward.terms.a.type: expected MODULE:CLASS .*No module named"),
        ({"reward.terms": {"a": {"type": "json:dumps"}}}, "config.reward.terms.a.type: expected a subclass of rfl_jax"),
        ({"reward.terms": {"face": {"wieght": 1.0}}}, "config.reward.terms.face.wieght: unknown key, did you mean"),
        ({"reward.terms": {"face": {"weight": -1.0}}}, "config.reward.terms.face.weight: expected a number of at least 0"),
        ({"reward.terms": {"face": {"every": 0}}}, "config.reward.terms.face.every: expected a whole number of at least 1"),
        ({"reward.terms": {"face": {"ceiling": 1}}}, "config.reward.terms.face.ceiling: expected bool"),
        ({"reward.terms": {"landmarks": {"scale": 0.0}}}, "config.reward.terms.landmarks.scale: expected a positive number"),
        ({"reward.terms": {"sharpness": {"region": "eye"}}}, "config.reward.terms.sharpness.region: expected face or frame"),
        ({"reward.terms": {"A": {}}}, "config.reward.terms.A: expected a name of lower-case letters"),
        ({"reward.terms": {"a": {"type": "face"}, "b": {"type": "face"}}}, "config.reward.terms: expected at most one term"),
        ({"reward.terms": {"face": {"weight": 0.0}}}, "config.reward.terms: expected a term with a weight above 0"),
        ({"reward.terms": {"face": {}}, "reward.ceiling": True}, "config.reward.ceiling: expected false, as each term"),
        ({"reward.terms": {"anti_copy": {}}, "reward.frames": 1}, "config.reward.frames: expected 0, as the term anti_copy"),
        ({"reward.terms": {"face": {"against": "untrained"}}}, "config.reward.terms: expected against real in the row face"),
        ({"reward.terms": {"sharpness": {"hold": True}}}, "config.reward.terms: expected hold false in the row sharpness, whose term tells no drift"),
        ({"reward.terms": {"motion": {"hold": 3}}}, "config.reward.terms.motion.hold: expected bool, got 3"),
        ({"reward.terms": {"motion": {"against": "base"}}}, "config.reward.terms.motion.against: expected real or untrained"),
        (
            {"reward.terms": {"motion": {"against": "untrained"}}, "trainable_models": "vae", "lora_base_model": ""},
            "config.reward.terms: expected against real in every row, as no DiT trains",
        ),
        ({"reward.terms": {"motion": {}}, "motion.weight": 0.5}, "config.motion.weight: expected 0, as reward.terms does not"),
    ],
)  # fmt: skip
def test_wrong_terms_are_refused_by_their_key(changes, message):
    with pytest.raises(UserError, match=message) as refused:
        parsed(changes)
    assert "\n" not in str(refused.value)


def test_a_table_is_what_it_was_after_its_way_through_json():
    cfg = with_terms(face={}, sharp={"type": "sharpness", "region": "frame"}, a={"type": LEVEL, "gain": 3.0})
    assert parsed({"reward.terms": json.loads(dumps(cfg))["reward"]["terms"]}) == cfg
    assert cfg.terms["sharp"].region == "frame"
    assert cfg.face_term == TermSettings("face")
    # Without a table the face alone, by the settings that were always there.
    assert Config(reward=RewardSection(ceiling=True)).terms == {"face": TermSettings("face", ceiling=True)}


def test_the_alarm_looks_at_each_term_that_is_watched():
    watched = Terms.of(with_terms(face={}, motion={"weight": 0.0}, a={"type": LEVEL, "weight": 0.0}))
    base = {
        "face_sim": 0.7,
        "motion": 1.0,
        "copying": 0.4,
        "face_fraction": 1.0,
        "reward/motion": 0.9,
        "reward/a": -1.0,
    }
    risen = {**base, "face_sim": 0.8}

    def found(now, bounds=None, terms=watched):
        return alarm(base, [risen, now], bounds or EvalSection(), terms)

    assert not found({**risen, "reward/motion": 0.75, "reward/a": -1.1})
    told = found({**risen, "reward/motion": 0.7})
    assert "the reward rose (0.700 to 0.800), but reward/motion, which is watched, fell from 0.900 to 0.700" in told
    assert "20% (eval.max_term_loss)" in told
    # A share of what it was, whatever its sign.
    assert "reward/a" in found({**risen, "reward/a": -1.3})
    assert not found({**risen, "reward/motion": 0.7}, EvalSection(max_term_loss=0.3))
    # Without a reward that rose nothing was hacked.
    assert not alarm(base, [{**base, "reward/motion": 0.1}], EvalSection(), watched)

    # The reward is what is trained on: a face that is not is watched, and what is may fall.
    other = Terms.of(with_terms(motion={}))
    assert other.watched == ("face_sim",)
    assert "face_sim, which is watched" in alarm(
        base, [{**base, "reward/motion": 1.0, "face_sim": 0.5}], EvalSection(), other
    )
    both = Terms.of(with_terms(face={"weight": 2.0}, a={"type": LEVEL}))
    assert both.reward({"face_sim": 0.32, "reward/a": 1.0}) == pytest.approx(2 * 0.32 / 0.16 + 1.0 / 0.5)
    assert not both.watched


def test_a_plan_knows_what_terms_are_handed_and_what_they_take(settings):
    def plan(**changes):
        cfg = settings(**WINDOWS, **changes)
        return cfg, make_plan(cfg, make_mesh(dataclasses.asdict(cfg.mesh), jax.devices()[:1]))

    cfg, planned = plan(**{"reward.terms": SEVERAL | {"motion": {"weight": 0.5}}})
    batch = planned.args[2]
    assert {
        "reward/light/brightness",
        "reward/motion/motion",
        "reward/motion/known",
        "reward/level/real",
    } <= batch.keys()
    with jax.set_mesh(planned.mesh):
        _, metrics = jax.eval_shape(planned.step, *planned.args)
    assert metrics["reward/motion"].shape == ()
    # Motion goes through the detector forward and backward, brightness through no network.
    assert planned.terms["motion"] > 10 * planned.terms["light"] > 0
    bare, without = plan()
    assert without.terms == {}
    more = step_flops(cfg, planned)[0] - step_flops(bare, without)[0]
    assert more == pytest.approx(planned.samples * sum(planned.terms.values()), rel=1e-3)
    # The untrained network's video is sampled, decoded and looked at besides.
    against, second = plan(**{"reward.terms": SEVERAL})
    steps = [dit_flops(x, y.sampler, y.latents, y.samples)[0] for x, y in ((cfg, planned), (against, second))]
    assert step_flops(against, second)[0] - step_flops(cfg, planned)[0] > 1.2 * (steps[1] - steps[0]) > 0
    _, seldom = plan(**{"reward.terms": {**SEVERAL, "motion": {"every": 4}}})
    assert seldom.terms["motion"] == pytest.approx(planned.terms["motion"] / 4)
