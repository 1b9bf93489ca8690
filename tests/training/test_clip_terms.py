"""Terms by CLIP in a run: trained on and watched, resumed, planned, known by their files, refused in a line."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from etils import epath
from flax import nnx

from convert import store
from convert.licence import UNKNOWN
from rfl_jax.config import EvalSection
from rfl_jax.errors import UserError
from rfl_jax.miniature.world import ASSETS, EMBEDDER_FILE
from rfl_jax.networks.table import TERMS
from rfl_jax.networks.terms import abstract_terms, open_terms, term_keys, term_licences
from rfl_jax.planning.abstract import make_plan
from rfl_jax.runs import RunFolder
from rfl_jax.sharding import make_mesh
from rfl_jax.training.inputs import prepare_inputs
from rfl_jax.training.loop import train
from rfl_jax.training.validation import Terms, alarm
from tests.clips import SMALL, converted_clip
from tests.runs import open_run, read_metrics, train_run
from tests.training.test_terms import WINDOWS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return converted_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture
def terms(folder):
    """One that is trained on and one that is watched, beside the face."""
    own = {"path": str(folder), "frames": 2}
    beauty, fits = {"type": "aesthetic", "weight": 0.5, **own}, {"type": "pick_score", "weight": 0.0, **own}
    return {"reward.terms": {"face": {}, "beauty": beauty, "fits": fits}}


@pytest.mark.slow
def test_a_run_trains_on_one_and_watches_another(settings, terms, tmp_path, clip_folder):
    header, *rows = (clip_folder / "metadata.csv").read_text().splitlines()
    file = tmp_path / "metadata.csv"
    file.write_text("\n".join([header, *(f"{clip_folder}/{row}" for row in rows[:2])]) + "\n")
    cfg = settings(
        **WINDOWS, **terms, file_name=str(file), max_steps=1, eval_every=1,
        **{"eval.file_name": str(file), "eval.num_samples": 2},
    )  # fmt: skip
    run = open_run(cfg, tmp_path / "run")
    # What reads prompts is not there, as it is not wanted.
    weights = run.frozen.rest[TERMS][1]["clip"]
    assert "vision" in weights
    assert "text" not in weights
    trained = train(run, RunFolder(epath.Path(tmp_path / "run")))
    (line,) = read_metrics(tmp_path / "run")
    for name in ("beauty", "fits"):
        assert np.isfinite(line[f"reward/{name}"])
        assert np.isfinite(line[f"eval_reward/{name}"])
    about = json.loads((tmp_path / "run" / "run.json").read_text())
    assert set(about["terms"]) == {"beauty", "fits"}
    assert set(about["licences"]) >= {"detector", "term_beauty", "term_fits"}
    # The real clips' own scores, and what the prompt is, are kept beside them.
    clip = trained.validation.held_out.clips[0]
    kept = clip.load_terms(term_keys(cfg))
    assert kept["reward/fits/text"].shape == (SMALL.projection,)
    real = trained.validation.held_out.real(0)
    assert real.terms["reward/fits"].score == pytest.approx(float(kept["reward/fits/real"]), rel=0.02)
    assert len(real.terms["reward/beauty"].frames) == cfg.data.num_frames


@pytest.mark.slow
def test_a_run_that_was_stopped_goes_on_to_the_last_bit(settings, terms, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train_run(settings(**WINDOWS, **terms, max_steps=3, save_steps=1), whole)
    for steps in (1, 3):
        train_run(settings(**WINDOWS, **terms, max_steps=steps, save_steps=1), parts)
    lines = read_metrics(whole)
    assert lines == read_metrics(parts)
    assert len({line["reward/beauty"] for line in lines}) == 3


def test_a_plan_counts_their_weights_and_operations(settings, terms):
    cfg = settings(**WINDOWS, **terms)
    mesh = make_mesh(dataclasses.asdict(cfg.mesh), jax.devices()[:1])
    planned = make_plan(cfg, mesh)
    _, frozen, batch, _ = planned.args
    assert batch["reward/fits/text"].shape[-1] == SMALL.projection
    assert "reward/beauty/text" not in batch
    loaded = nnx.split(open_terms(cfg, "train"))[1]
    assert jax.tree.structure(frozen.rest[TERMS]) == jax.tree.structure(loaded)
    for ours, theirs in zip(jax.tree.leaves(frozen.rest[TERMS]), jax.tree.leaves(loaded), strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    # Two frames: forward where it is watched; forward, again, and backward to the pixels where it is trained on.
    tokens = (SMALL.image_size // SMALL.patch) ** 2 + 1
    layer = 4 * SMALL.vision_dim**2 + 2 * SMALL.vision_dim * SMALL.vision_ffn + 2 * tokens * SMALL.vision_dim
    forward = 2 * 2 * tokens * SMALL.vision_layers * layer
    assert planned.terms["fits"] > forward
    assert planned.terms["beauty"] > planned.terms["fits"] + 1.5 * forward


def with_path(terms, path):
    """The same with what is watched alone, from another folder."""
    return {"reward.terms": {"face": {}, "fits": {**terms["reward.terms"]["fits"], "path": str(path)}}}


def test_what_was_prepared_is_known_by_the_files_not_by_where_they_lie(settings, terms, folder, tmp_path):
    key = term_keys(settings(**terms))["fits"]
    (folder.parent / "elsewhere").symlink_to(folder)
    assert term_keys(settings(**with_path(terms, folder.parent / "elsewhere")))["fits"] == key
    other = settings(**with_path(terms, converted_clip(tmp_path, seed=9)))
    assert term_keys(other)["fits"] != key
    assert term_licences(other) == {"term_fits": UNKNOWN}


def test_the_alarm_counts_from_what_a_score_is_worth_nothing_at(settings, terms):
    watched = Terms.of(settings(**terms))
    assert watched.watched == ("reward/fits",)
    base = {
        "face_sim": 0.5,
        "motion": 1.0,
        "copying": 0.4,
        "face_fraction": 1.0,
        "reward/fits": 21.5,
        "reward/beauty": 5.0,
    }
    risen = {**base, "reward/beauty": 6.0}
    # A fifth of the 6 above what unrelated pictures have.
    assert not alarm(base, [{**risen, "reward/fits": 20.4}], EvalSection(), watched)
    assert "reward/fits, which is watched" in alarm(base, [{**risen, "reward/fits": 20.2}], EvalSection(), watched)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({}, "config.reward.terms.a.path: expected a folder written by python -m convert clip, got ''"),
        ({"path": "nowhere"}, "config.reward.terms.a.path: expected a folder written by python -m convert clip, got 'nowhere'"),
    ],
)  # fmt: skip
def test_a_path_that_leads_nowhere_is_refused_by_its_key(settings, row, message):
    cfg = settings(**{"reward.terms": {"face": {}, "a": {"type": "hps", **row}}})
    for use in (lambda: open_terms(cfg, "train"), lambda: abstract_terms(cfg, "train", "cpu"), lambda: term_keys(cfg)):
        with pytest.raises(UserError) as refused:
            use()
        assert str(refused.value) == message


def test_networks_that_a_term_cannot_use_are_refused_before_a_clip_is_read(settings, terms, folder, tmp_path):
    cfg, arrays = store.convert("clip", [str(folder.parent / "source")])
    store.save(str(tmp_path / "headless"), "clip", cfg, arrays)
    cfg, arrays = store.convert("arcface", [str(ASSETS / EMBEDDER_FILE)])
    store.save(str(tmp_path / "other"), "arcface", cfg, arrays)
    for kind, name, message in (
        ("aesthetic", "headless", "fits.path: .* expected a CLIP with the aesthetic predictor's head"),
        ("hps", "other", "fits.path: expected a folder written by python -m convert clip, got .*, which holds arcface weights"),
        ("hps", "headless", "headless/tokenizer.json: expected what python -m convert clip --tokenizer writes there"),
    ):  # fmt: skip
        table = with_path(terms, tmp_path / name)
        table["reward.terms"]["fits"]["type"] = kind
        with pytest.raises(UserError, match=message) as refused:
            prepare_inputs(settings(**WINDOWS, **table), RunFolder(epath.Path(tmp_path / "run")), jax.devices()[:1])
        assert "\n" not in str(refused.value)


def test_settings_out_of_range_are_refused_by_their_key(settings):
    with pytest.raises(
        UserError, match=r"config\.reward\.terms\.hps\.frames: expected a whole number of at least 1, got 0"
    ):
        settings(**{"reward.terms": {"face": {}, "hps": {"frames": 0}}})
