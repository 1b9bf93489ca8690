"""A run in which all people count prepares, trains, validates, evaluates and shows each of them."""

import csv
import dataclasses

import jax
import numpy as np
import pytest
from etils import epath

from rfl_jax.config import default_config, parse
from rfl_jax.data.videos import to_uint8, write_video
from rfl_jax.errors import UserError
from rfl_jax.evaluation.evaluate import evaluate
from rfl_jax.evaluation.measures import ByPerson
from rfl_jax.miniature import world
from rfl_jax.planning.abstract import make_plan
from rfl_jax.planning.compile import _forward_flops, step_flops
from rfl_jax.reporting.collect import read_run
from rfl_jax.reporting.page import render
from rfl_jax.rewards.arcface import CROP
from rfl_jax.rewards.embedder import make_embedder
from rfl_jax.rewards.people import PEOPLE
from rfl_jax.runs import RunFolder
from rfl_jax.sharding import make_mesh
from rfl_jax.training.loop import train
from tests.runs import FRAMES, drawn, open_run, read_metrics

PAIRS = {
    "num_inference_steps": 2, "mid_timestep": 1, "final_timestep": 1, "reward.people": "all",
    "reward.detector_size": 2 * world.SIZE, "data.height": world.SIZE, "data.width": 2 * world.SIZE,
    "data.max_pixels": 2 * world.SIZE**2,
}  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """The csv of two clips of two people side by side, and one of one person beside a wall."""
    folder = tmp_path_factory.mktemp("pairs")
    video = np.asarray(drawn(4, 6, FRAMES))
    # Two whom the small detector finds beside each other, the same backwards in time, and one beside a wall.
    left, right = video[0], video[1]
    pictures = (left, right), (left[::-1], right[::-1]), (np.broadcast_to(right[:, :, :1], right.shape), right)
    rows = [("video", "prompt")]
    for i, pair in enumerate(pictures):
        name = f"pair_{i}.mp4"
        write_video(folder / name, to_uint8(np.concatenate(pair, 2)), fps=8)
        rows.append((name, "Two people look around."))
    with (folder / "metadata.csv").open("w", newline="") as stream:
        csv.writer(stream).writerows(rows)
    return str(folder / "metadata.csv")


@pytest.mark.slow
def test_a_run_of_several_people_shows_each(settings, pairs, tmp_path):
    cfg = settings(
        **PAIRS,
        file_name=pairs,
        eval_every=2,
        **{"eval.file_name": pairs, "eval.num_samples": 3, "reward.ceiling": True},
    )
    folder = RunFolder(epath.Path(tmp_path / "run"))
    run = open_run(cfg, tmp_path / "run")
    for clip, people in zip(run.inputs.clips.training, (2, 2, 1), strict=True):
        arrays = clip.load_people((*cfg.people_arrays, "judge_people_pool"))
        assert arrays["people_boxes"].shape == (PEOPLE, FRAMES, 4)
        for name in arrays:
            assert arrays[name].any((1, 2)).sum() == people, name
        # Beside them lies what the largest face needs, as ever.
        assert clip.load(("pool",))["pool"].any()
    trained = train(run, folder)
    line = read_metrics(tmp_path / "run")[-1]
    assert line["no_face_fraction"] < 1
    assert line["ceiling_fraction"] is not None
    assert line["grad_norm"] > 0

    held_out = trained.validation.held_out
    params = {"base": held_out.untrained(trained.state.params), "tuned": trained.state.params}
    result = evaluate(held_out, params, folder, 2, "raw")
    assert line["eval_judge_sim"] == pytest.approx(result["judge_sim"]["tuned"], rel=1e-3, abs=1e-5)
    for clip in result["clips"][:2]:
        assert clip["reference"]["swaps"] == 0
        for way in ("reference", "base", "tuned"):
            assert len(clip[way]["people"]) == 2
            for one in clip[way]["people"]:
                assert len(one["boxes"]) == FRAMES
        for one in clip["reference"]["people"]:
            assert one["face_fraction"] == 1
            assert one["judge_sim"] > 0.5
        # All are there in every frame of the real clip: the clip's mean is theirs.
        for name in ("face_sim", "judge_sim"):
            assert clip["tuned"][name] == pytest.approx(
                np.mean([one[name] for one in clip["tuned"]["people"]]), abs=1e-5
            )
    # One person alone is shown as in other runs.
    assert "people" not in result["clips"][2]["tuned"]
    assert "swaps" not in result["clips"][2]["tuned"]

    page = render(read_run(folder), most=3)
    assert page.count('<ul class="people">') == 2
    assert page.count('<i class="box person2" hidden>') == 2 * 3
    assert page.count('<i class="box person1" hidden>') == 3 * 3
    base, tuned = (result["clips"][0][way]["people"][1]["judge_sim"] for way in ("base", "tuned"))
    assert f"person 2: judge {base:.3f} → {tuned:.3f}" in page


def test_exchanged_faces_are_counted_as_often_as_they_change():
    judge = np.zeros((6, 3, 3))
    judge[:] = np.eye(3)
    judge[2:4] = np.eye(3)[[1, 0, 2]]
    there, boxes = np.ones((6, 3), bool), np.zeros((6, 3, 4))
    people = ByPerson(np.ones((6, 3)), judge, there, there, boxes)
    assert people.swaps() == 2
    # Who is not found, or not in the real clip, is exchanged with nobody.
    absent = there.copy()
    absent[2:4, 0] = False
    assert dataclasses.replace(people, found=absent).swaps() == 0
    assert dataclasses.replace(people, counts=absent).swaps() == 0
    assert dataclasses.replace(people, judge=np.broadcast_to(np.eye(3), judge.shape)).swaps() == 0
    assert [one["judge_sim"] for one in people.measures()] == pytest.approx([4 / 6, 4 / 6, 1])


def test_a_plan_knows_the_people_and_what_their_faces_take(settings):
    def plan(people):
        cfg = settings(**(PAIRS | {"reward.people": people}))
        return cfg, make_plan(cfg, make_mesh(dataclasses.asdict(cfg.mesh), jax.devices()[:1]))

    (one, largest), (many, planned) = plan("largest"), plan("all")
    assert planned.args[2]["people_pool"].shape == (1, 2, PEOPLE, FRAMES, planned.embedder.embedding)
    assert planned.args[2].keys() - largest.args[2].keys() == {"people_pool", "people_boxes"}
    with jax.set_mesh(planned.mesh):
        jax.eval_shape(planned.step, *planned.args)
    # Four faces a frame instead of one, forward and backward.
    more = step_flops(many, planned)[0] - step_flops(one, largest)[0]
    embed = _forward_flops(make_embedder, planned.embedder, (1, CROP, CROP, 3))
    assert more == pytest.approx(planned.samples * planned.frames * 2 * (PEOPLE - 1) * embed, rel=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reward.people": "both"}, "config.reward.people: expected largest or all, got 'both'"),
        (
            {"reward.people": "all", "reward.frames": 1},
            "config.reward.people: expected largest, as people are followed",
        ),
    ],
)
def test_wrong_people_are_refused_by_their_key(changes, message):
    config = default_config()
    config.update_from_flattened_dict(changes)
    with pytest.raises(UserError, match=message) as refused:
        parse(config)
    assert "\n" not in str(refused.value)


def test_the_default_counts_the_largest_face():
    cfg = parse(default_config())
    assert cfg.reward.people == "largest"
    assert cfg.people_arrays == ()
