"""Both experts in one run: each learns, alone in its steps; stopped, resumed, judged and exported as one."""

import dataclasses
import json
import runpy
import signal
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from etils import epath
from safetensors import safe_open

from convert import store
from convert.mapping import whole as read_whole
from rfl_jax.config import Config, parse
from rfl_jax.errors import UserError
from rfl_jax.evaluation.evaluate import evaluate
from rfl_jax.export import main as export_main
from rfl_jax.miniature.world import ASSETS, DIT_FILES
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.real import real_loss
from rfl_jax.sampling.sampler import make_sampler
from rfl_jax.sampling.trained import read_trained
from rfl_jax.training.loop import train
from tests.golden import relative
from tests.runs import open_run, read_metrics, train_run
from tests.training.test_guards import equal, snapshot
from tests.training.test_step import flat, gradients

EXPERTS = ("dit", "dit2")
BOTH = {"lora_base_model": "dit,dit2", "mid_timestep": 1}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"lora_base_model": EXPERTS},
            "config.lora_base_model: dit serves no step with gradient: it takes steps 0 to 2, those with gradient are "
            "steps 4 to 7; expected dit2, or mid_timestep of at most 2",
        ),
        (
            {"lora_base_model": EXPERTS, "mid_timestep": 0, "final_timestep": 2},
            "config.lora_base_model: dit2 serves no step with gradient: it takes steps 3 to 7, those with gradient are "
            "steps 0 to 2; expected dit, or final_timestep of at least 3",
        ),
        (
            {"lora_base_model": (), "trainable_models": EXPERTS, "max_timestep_boundary": 0.92},
            "config.trainable_models: dit serves no step with gradient: it takes steps 0 to 2, those with gradient are "
            "steps 4 to 7; expected dit2, or mid_timestep of at most 2 and max_timestep_boundary of at least 0.9375",
        ),
        (
            {"final_timestep": 5, "max_timestep_boundary": 0.5, "min_timestep_boundary": 0.5},
            "config.lora_base_model: dit2 serves no step with gradient: it takes step 7, those with gradient are none; "
            "expected final_timestep of at least 7",
        ),
        (
            {"lora_base_model": EXPERTS, "preset": "wan2_2_ti2v_5b"},
            "config.lora_base_model: dit2 takes no denoising step, expected dit",
        ),
    ],
)
def test_an_expert_that_nothing_could_teach_is_refused_with_the_way_out(changes, message):
    with pytest.raises(UserError) as refused:
        make_sampler(Config(**changes))
    assert str(refused.value) == message


def test_the_way_out_is_one():
    both = {"lora_base_model": EXPERTS}
    for changes in ({"mid_timestep": 2}, {"mid_timestep": 2, "max_timestep_boundary": 0.9375}):
        spans = make_sampler(Config(**both, **changes)).spans
        assert [(span.expert, span.start) for span in spans if span.gradient] == [("dit", 2), ("dit2", 3)]


def test_the_config_of_both_experts_draws_two_steps_of_each():
    file = Path(__file__).parents[2] / "configs" / "wan2_2_i2v_a14b_both_experts.py"
    cfg = parse(runpy.run_path(str(file))["get_config"]())
    assert cfg.trained == cfg.adapted == EXPERTS
    drawn = make_sampler(cfg).drawn
    assert {(span.expert, span.start, span.stop): count for span, count in drawn.items()} == {
        ("dit", 0, 3): 2,
        ("dit2", 3, 8): 2,
    }


@pytest.mark.slow
def test_every_mesh_gives_the_gradients_of_one_device_to_both(settings, tmp_path):
    short = {**BOTH, "reward.compat": "roll", "num_inference_steps": 4, "final_timestep": 3}
    short |= {"mid_timestep": 0, "window.mode": "random", "window.steps": 2}
    run = open_run(settings(**short, train_batch_size=4, per_device_train_batch_size=4), tmp_path)
    assert [span.expert for span in run.inputs.sampler.drawn] == list(EXPERTS)
    want_loss, _, want = gradients(run)
    mesh = {"mesh.data": 1, "mesh.fsdp": 2, "mesh.context": 2}
    loss, _, found = gradients(
        open_run(settings(**mesh, **short, train_batch_size=4, per_device_train_batch_size=2), tmp_path)
    )
    np.testing.assert_allclose(loss, want_loss, rtol=1e-4)
    for name in EXPERTS:
        assert np.abs(flat(want[name])).max() > 0
        assert relative(flat(found[name]), flat(want[name])) < 1e-4, name


def test_real_clips_teach_each_expert_by_itself(settings, tmp_path):
    run = open_run(settings(**BOTH, **{"real.weight": 1.0}), tmp_path)
    batch = {name: x[0] for name, x in run.inputs.batches.place_share(next(run.iterator())).items()}
    rng = np.random.default_rng(0)

    @jax.jit
    def gradient(params):
        return jax.grad(
            lambda p: real_loss(run.cfg, run.networks, run.inputs.sampler, p, run.frozen, batch, run.inputs.key, 0)
        )(params)

    def moved(part):
        return jax.tree.map(lambda p: p + 0.02 * rng.normal(size=p.shape).astype(np.float32), part)

    params = {name: moved(part) for name, part in run.state.params.items()}
    first, second = gradient(params), gradient(params | {"dit2": moved(params["dit2"])})
    assert np.abs(flat(first["dit"])).max() > 0
    # What the other expert is does not matter to it, and to itself it does.
    assert np.array_equal(flat(first["dit"]), flat(second["dit"]))
    assert relative(flat(first["dit2"]), flat(second["dit2"])) > 0.01


def export(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["export", *map(str, arguments)])
    export_main()


@pytest.mark.slow
def test_both_experts_learn_and_come_out_of_an_interrupted_run_bit_for_bit(
    settings, tmp_path, clip_folder, monkeypatch, capsys
):
    cfg = settings(
        max_steps=3,
        save_steps=3,
        eval_every=3,
        **BOTH,
        **{"window.mode": "random", "window.steps": 2, "ema.decay": 0.9, "kl.target": 0.1, "real.weight": 0.1},
        **{"eval.file_name": str(clip_folder / "metadata.csv"), "eval.num_samples": 2, "eval.validation_samples": 2},
    )
    whole, parts = epath.Path(tmp_path / "whole"), epath.Path(tmp_path / "parts")
    for folder in (whole, parts):
        folder.mkdir()
    run = open_run(cfg, whole)
    begun = {name: flat(part) for name, part in run.state.params.items()}
    trained = train(run, RunFolder(whole))

    again = open_run(cfg, parts)

    def interrupted(*args):
        signal.raise_signal(signal.SIGINT)
        return again.update.step(*args)

    update = dataclasses.replace(again.update, step=interrupted)
    assert train(dataclasses.replace(again, update=update), RunFolder(parts)).step == 1
    resumed = train_run(cfg, parts)
    assert equal(snapshot(resumed.state), snapshot(trained.state))
    lines = read_metrics(whole)
    assert read_metrics(parts) == lines

    for line in lines:
        norms = [line[f"grad_norm_{name}"] for name in EXPERTS]
        assert min(norms) > 0
        assert np.hypot(*norms) == pytest.approx(line["grad_norm"], rel=1e-5)
    about = json.loads((whole / "run.json").read_text())
    assert about["trained_parameters"] == dict.fromkeys(EXPERTS, flat(trained.state.params["dit"]).size)
    for name in EXPERTS:
        assert not np.array_equal(begun[name], flat(trained.state.params[name])), name

    # Videos are judged with both: without the adapters of one they are others.
    tuned, held_out = trained.state.tuned, trained.validation.held_out
    base = held_out.untrained(tuned)
    videos = [
        held_out.judge(params, [0])[0].video.astype(int)
        for params in (tuned, base, tuned | {"dit": base["dit"]}, tuned | {"dit2": base["dit2"]})
    ]
    assert all(np.abs(video - other).max() > 0 for i, video in enumerate(videos) for other in videos[:i])
    result = evaluate(held_out, {"base": base, "tuned": tuned}, RunFolder(whole), trained.step, "average")
    assert result["judge_sim"]["tuned"] == pytest.approx(lines[-1]["eval_judge_sim"], abs=1e-4)

    # One call writes both, each by its name in the format; they are what is read from the run.
    out, want = tmp_path / "out", read_trained(cfg, str(whole))
    capsys.readouterr()
    for kind, names in (
        ("diffusers", ("face_transformer.safetensors", "face_transformer_2.safetensors")),
        ("comfyui", ("face_high_noise.safetensors", "face_low_noise.safetensors")),
        ("original", ("face_dit.safetensors", "face_dit2.safetensors")),
        ("peft", ("transformer/face.safetensors", "transformer_2/face.safetensors")),
    ):
        arguments = ("--workdir", whole, "--format", kind, "--dst", out / "face.safetensors")
        export(monkeypatch, *arguments)
        files = [out / name for name in names]
        lora = f"dit={files[0]},dit2={files[1]}"
        assert (
            capsys.readouterr()
            .out.splitlines()[-1]
            .startswith(f"next: python -m rfl_jax.sample --config=mini --lora={lora} ")
        )
        for file, name in zip(files, EXPERTS, strict=True):
            with safe_open(file, framework="numpy") as opened:
                assert (opened.metadata()["network"], opened.metadata()["step"]) == (name, "3")
        found = read_trained(cfg, ",".join(map(str, files)))
        for name in EXPERTS:
            assert all(np.array_equal(found[name][key], x) for key, x in want[name].items())
        with pytest.raises(UserError, match=rf"--dst: {files[0]}: exists already"):
            export(monkeypatch, *arguments)
    assert {file.parent.name for file in out.rglob("adapter_config.json")} == {"transformer", "transformer_2"}
    assert not (out / "face.safetensors").exists()
    export(monkeypatch, "--workdir", whole, "--network", "dit", "--dst", out / "high.safetensors")
    assert read_trained(cfg, str(out / "high.safetensors")).keys() == {"dit"}

    capsys.readouterr()
    export(monkeypatch, "--workdir", whole, "--merged", "--format", "original", "--dst", out / "merged.safetensors")
    assert capsys.readouterr().out.count("next: python -m convert dit --src") == 2
    for name in EXPERTS:
        kernels = [
            read_whole(store.convert("dit", [str(file)], dtype="float32", **hints)[1]["blocks.ffn.up.kernel"])
            for file, hints in (
                (out / f"merged_{name}.safetensors", {"num_heads": 4, "text_len": 32}),
                (ASSETS / DIT_FILES[name], {}),
            )
        ]
        product = want[name]["blocks.ffn.up.lora_a"] @ want[name]["blocks.ffn.up.lora_b"]
        assert np.abs(product).max() > 0
        # The source is float16: so is what the product was added to.
        np.testing.assert_allclose(kernels[0] - kernels[1], product, atol=2e-3)
