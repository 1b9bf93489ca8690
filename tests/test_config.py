"""The configuration refuses by name and is the same at the edge; the original's yaml is read."""

import dataclasses
import importlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import roll
from rfl_jax.config import TRAINABLE, Config, default_config, dumps, grouped, markdown, parse
from rfl_jax.errors import UserError
from rfl_jax.recipes import RECIPES, with_recipe
from rfl_jax.rewards.face import RewardConfig
from rfl_jax.settings import Rows, settings
from rfl_jax.training.optim import learning_rate

ROOT = Path(__file__).parents[1]


def changed(changes):
    """The default ConfigDict with other values by dotted key, of any type."""
    config = ConfigDict(default_config().to_dict())
    for key, value in changes.items():
        *groups, last = key.split(".")
        target = config
        for group in groups:
            target = target[group]
        with target.ignore_type():
            target[last] = value
    return config


def value_of(values, key):
    for part in key.split("."):
        values = getattr(values, part)
    return values


def test_defaults_are_the_originals():
    cfg = parse(default_config())
    assert cfg == Config()
    assert (cfg.learning_rate, cfg.lora_rank, cfg.warmup_steps, cfg.seed) == (2.5e-6, 32, 10, 42)
    assert cfg.trained == ("dit2",)
    assert '"learning_rate": 2.5e-06' in dumps(cfg)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("learning_rte", 1.0, "config.learning_rte: unknown key"),
        ("data.frames", 1, "config.data.frames: unknown key"),
        ("learning_rate", "fast", "config.learning_rate: expected float, got 'fast'"),
        ("lora_rank", 0, "config.lora_rank: expected a whole number of at least 1"),
        ("lora_rank", 2.5, "config.lora_rank: expected int"),
        ("use_gradient_checkpointing", 1, "config.use_gradient_checkpointing: expected bool"),
        ("lr_scheduler_type", "polynomial", "config.lr_scheduler_type: expected one of constant"),
        ("trainable_models", "dit3", "config.trainable_models: expected some of dit, dit2"),
        ("lora_target_modules", "q,w", "config.lora_target_modules: expected some of q, k"),
        ("mid_timestep", 9, "config.mid_timestep: expected 0..final_timestep"),
        ("final_timestep", 8, "config.final_timestep: expected less than num_inference_steps"),
        ("min_timestep_boundary", 1.5, "config.min_timestep_boundary: expected 0 <= min"),
        ("data.num_frames", 80, "config.data.num_frames: expected 4n\\+1"),
        ("noise.mode", "white", "config.noise.mode: expected fresh or fixed"),
        ("reward.detector_size", 100, "config.reward.detector_size: expected a multiple of 32"),
        ("preset", "wan3", "config.preset: expected one of"),
        ("data", 3, "config.data: expected a group of settings"),
    ],
)
def test_refusals_name_the_key(key, value, message):
    with pytest.raises(UserError, match=message):
        parse(changed({key: value}))


def test_all_faults_are_named_at_once():
    faults = {"lora_rank": 0, "learning_rate": "fast", "noise.mode": "white", "mid_timestep": 9, "learning_rte": 1}
    with pytest.raises(UserError) as refused:
        parse(changed(faults))
    *told, unknown = sorted(str(refused.value).split("; "))
    assert unknown.startswith("config.noise.mode: expected fresh or fixed, got 'white'")
    assert told == [
        "config.learning_rate: expected float, got 'fast'",
        "config.learning_rte: unknown key, did you mean learning_rate?",
        "config.lora_rank: expected a whole number of at least 1, got 0",
        "config.mid_timestep: expected 0..final_timestep (7), got 9",
    ]


def test_a_rule_is_silent_about_what_cannot_be_read():
    with pytest.raises(UserError) as refused:
        parse(changed({"final_timestep": "last", "num_inference_steps": 4, "min_timestep_boundary": 2.0}))
    assert str(refused.value).count("config.") == 2
    # A rule judges the values, not the defaults that stand in for what cannot be read.
    assert "num_inference_steps" not in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("max_steps", 0, "a whole number of at least 1, or -1 for whole epochs"),
        ("mesh.fsdp", -2, "a whole number of at least 1, or -1 for the rest"),
        ("max_grad_norm", 0.0, "a positive number"),
        ("frozen_weights", "int4", "int8, or empty"),
        ("frozen_activations", "int8", "empty, as frozen_weights is"),
        ("sampling.guidance_gradient", "conditional", "both, as sampling.guidance_scale is 1"),
        ("kl.every", 0, "a whole number of at least 1"),
        ("kl.target", 0.01, "0, as reward.kl_weight is"),
        ("kl.target", 0.02, "0, as no DiT trains"),
        ("real.weight", 0.1, "0, as no DiT trains"),
        ("motion.weight", 1.5, "a number from 0 to 1"),
        ("window.mode", "first", "one of last, random, uniform, list"),
        ("window.list", "4,six", "whole numbers of at least 0 separated by commas, or empty"),
        ("window.list", "4", "empty, unless window.mode is list"),
        ("window.direct", True, "false, unless window.steps is 1 or window.list one number"),
        ("reward.frames", 21, "at most 20, as data.num_frames is 81"),
        ("remat_policy", "some", "one of none, full, nested, save_attention, offload, or empty"),
        ("compiler_options", "fast", "NAME=VALUE separated by commas, or empty"),
        ("model_name", "wan2_1", "wan2_2"),
        ("eval.max_motion_loss", 0.0, "more than 0 and at most 1"),
        ("ema.decay", 1.0, "a number of at least 0 and below 1"),
        ("guard.on_alarm", "panic", "warn, lower or stop"),
        ("guard.on_alarm", "lower", "warn, as no held-out clips are judged (eval_every, eval.file_name)"),
        ("guard.raise_kl", 0.5, "a number of at least 1"),
        ("lora_target_modules", "", "some of q, k, v, o, ffn.0, ffn.2"),
        ("extra_inputs", "end_image", "input_image or input_image,end_image"),
        ("lora_base_model", "vae", "some of dit, dit2, or empty"),
        ("data.height", 480, "height and width both, or neither"),
        ("early_stop", 1, "0, as eval_every is"),
        ("vae_caches", "recompute", "keep, as nothing is rematerialised"),
        ("profile.steps", "5-3", "steps such as 3-5, or 3"),
        ("profile.steps", "0", "steps such as 3-5, or 3"),
    ],
)
def test_refusals_tell_the_range(key, value, expected):
    others = {"keep, as nothing": {"remat_policy": "none"}, "0, as reward.kl": {"reward.kl_weight": 0.0}}
    others["0, as no DiT"] = {"trainable_models": "vae", "lora_base_model": ""}
    (other,) = [change for reason, change in others.items() if expected.startswith(reason)] or [{}]
    with pytest.raises(UserError) as refused:
        parse(changed({key: value} | other))
    assert str(refused.value) == f"config.{key}: expected {expected}, got {value!r}"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"window.mode": "list"}, "window.list: expected numbers of steps, as window.mode is list, got ''"),
        (
            {"window.mode": "list", "window.list": "4", "window.steps": 1},
            "window.steps: expected 0, as window.list tells the steps, got 1",
        ),
        ({"window.mode": "random"}, "window.steps: expected at least 1, as window.mode is random, got 0"),
        (
            {"window.steps": 1, "window.direct": True, "window.stop_input_gradient": True},
            "window.stop_input_gradient: expected false, as window.direct takes one step, got True",
        ),
        ({"nft.group": 1}, "nft.group: expected 0, or at least 2, as a clip's videos are compared, got 1"),
        ({"nft.group": 2}, "nft.group: expected 0, unless window.steps is 1 or window.list one number, got 2"),
        (
            {"nft.group": 2, "window.steps": 1, "window.direct": True},
            "nft.group: expected 0, as no gradient goes through the rewards then, which window.direct and "
            "window.stop_input_gradient are about, got 2",
        ),
        (
            {"nft.group": 2, "window.steps": 1, "trainable_models": "vae"},
            "nft.group: expected 0, as only DiTs and the text encoder can train so, got 2",
        ),
        (
            {"nft.group": 6, "window.steps": 1},
            "nft.group: expected 0, unless noise.mode is fresh and noise.per_sample 0 or no less than nft.group, got 6",
        ),
        (
            {"reward.frames": 2, "motion.copy_weight": 0.5},
            "reward.frames: expected 0, as motion.copy_weight compares with the first frame, got 2",
        ),
    ],
)
def test_settings_of_a_window_that_contradict_each_other_are_refused(changes, message):
    with pytest.raises(UserError) as refused:
        parse(changed(changes))
    assert str(refused.value) == f"config.{message}"


LISTS = {
    "lora_target_modules": ("q, ffn.0,", ("q", "ffn.0"), "q,ffn.0"),
    "lora_base_model": ("dit,dit2", ("dit", "dit2"), "dit,dit2"),
    "trainable_models": ("", (), ""),
    "extra_inputs": ("input_image,end_image", ("input_image", "end_image"), "input_image,end_image"),
    "model_id_with_origin_paths": ("a/b:c*, a/b:d", ("a/b:c*", "a/b:d"), "a/b:c*,a/b:d"),
    "profile.steps": ("3-5", (3, 5), "3-5"),
}


@pytest.mark.parametrize("key", LISTS)
def test_lists_are_text_at_the_edge_and_tuples_inside(key):
    text, inside, again = LISTS[key]
    cfg = parse(changed({key: text}))
    assert value_of(cfg, key) == inside
    values = json.loads(dumps(cfg))
    group, _, last = key.rpartition(".")
    assert (values[group] if group else values)[last] == again
    assert parse(ConfigDict(values)) == cfg


@pytest.mark.parametrize(("text", "steps"), [("3-5", (3, 5)), ("4", (4, 4)), ("4-4", (4, 4)), ("", None), (None, None)])
def test_steps_to_trace_are_read(text, steps):
    cfg = parse(changed({"profile.steps": text}))
    assert cfg.profile.steps == steps
    assert parse(ConfigDict(json.loads(dumps(cfg)))) == cfg


def test_every_setting_is_described_and_its_default_in_range():
    described = list(settings(Config))
    values = default_config()
    assert [item.key for item in described] == [item.key for _, _, group in grouped() for item in group]
    for item in described:
        assert item.meaning.endswith(".")
        assert len(item.meaning) < 130
        edge = value_of(values, item.key)
        # A table is a group of a config file.
        edge = edge.to_dict() if item.kind == Rows else edge
        # Flags take their types from these.
        assert type(edge) is item.edge
        assert item.read(edge) == item.default


def test_the_rewards_own_defaults_are_the_configurations():
    for field in dataclasses.fields(RewardConfig):
        assert getattr(Config().reward, field.name) == field.default


def test_values_inside_have_the_annotated_types():
    script = (
        "import dataclasses, json, jaxtyping\n"
        "jaxtyping.install_import_hook(['rfl_jax'], 'beartype.beartype')\n"
        "from rfl_jax.config import Config, default_config, dumps, parse\n"
        "cfg = parse(default_config())\n"
        "dataclasses.replace(cfg, remat_policy='full', lora_target_modules=('q',))\n"
        "try:\n"
        "    dataclasses.replace(cfg, lora_target_modules='q')\n"
        "except Exception:\n"
        "    print('refused')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout == "refused\n", done.stderr


def test_the_page_of_settings_is_current():
    """Written by `python -m rfl_jax.config > docs/settings.md`."""
    assert (ROOT / "docs" / "settings.md").read_text() == markdown()


@pytest.mark.parametrize(
    "name", ["mini", "wan2_2_i2v_a14b", "wan2_2_i2v_a14b_both_experts", "wan2_2_ti2v_5b", "wan2_2_ti2v_5b_reward"]
)
def test_a_config_has_the_guards_that_win_unless_the_original_is_asked_for(name):
    made = importlib.import_module(f"configs.{name}").get_config
    cfgs = {recipe: parse(made(recipe)) for recipe in RECIPES}
    assert parse(made()) == cfgs["guarded"]
    assert {term: setting.weight > 0 for term, setting in cfgs["guarded"].terms.items()} == {
        "face": True, "motion": True, "anti_copy": True
    }  # fmt: skip
    assert cfgs["guarded"].window.mode == "random"
    # What the original does besides sizes, paths and lengths is what the defaults do.
    for section in ("reward", "kl", "real", "motion", "ema", "guard"):
        ours, default = (
            dataclasses.asdict(getattr(cfg, section)) | {"detector_size": 0} for cfg in (cfgs["original"], Config())
        )
        assert ours == default


def test_a_recipe_that_there_is_not_is_refused():
    with pytest.raises(
        UserError, match="--config: recipe 'orginal': expected one of guarded, original, did you mean original"
    ):
        with_recipe(default_config(), "orginal")


def test_what_trains_and_what_is_rematerialised():
    cfg = dataclasses.replace(Config(), trainable_models=("dit", "vae"), lora_base_model=("dit2",))
    assert cfg.trained == ("dit", "dit2", "vae")
    assert cfg.adapted == ("dit2",)
    assert [name for name in cfg.trained if cfg.trains_in_full(name)] == ["dit", "vae"]
    cfg = dataclasses.replace(cfg, frozen_weights="int8", frozen_memory="pinned_host")
    assert [cfg.quantizes(name) for name in TRAINABLE] == [False, True, False, False]
    assert [cfg.streams(name) for name in TRAINABLE] == [False, True, False, False]
    assert Config().policy == "full"
    assert dataclasses.replace(Config(), use_gradient_checkpointing=False).policy == "none"
    assert dataclasses.replace(Config(), use_gradient_checkpointing_offload=True).policy == "offload"


@pytest.mark.parametrize("name", ["constant_with_warmup", "linear", "cosine"])
def test_schedules_are_those_of_transformers(name):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = dataclasses.replace(Config(), lr_scheduler_type=name, learning_rate=0.1, warmup_steps=4)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    theirs = transformers.get_scheduler(name, optimizer, num_warmup_steps=4, num_training_steps=20)
    ours = learning_rate(cfg, 20)
    for i in range(20):
        np.testing.assert_allclose(ours(i), theirs.get_last_lr()[0], atol=1e-7)
        optimizer.step()
        theirs.step()


ROLL = """
exp_name: reward_fl
seed: 7
save_steps: 5
max_steps: 500
resume_from_checkpoint: false
train_batch_size: 16
max_grad_norm: 0.3
num_gpus_per_node: 8
models: /data/models
pretrain: ${models}
reward: {learning_rate: 7}
actor_train:
  model_args:
    dtype: bf16
    lora_rank: null
    model_config_kwargs:
      model_name: wan2_2
      model_paths: ./paths.json
      reward_model_path: ${pretrain}/antelopev2
      trainable_models: dit2
      lora_target_modules: [q, k]
      use_gradient_checkpointing_offload: true
      num_inference_steps: 10
      final_timestep: 9
  training_args:
    learning_rate: 1e-6
    lr_scheduler_type: cosine
    adam_beta2: 0.999
  data_args:
    file_name: ./metadata.csv
    preprocessing_num_workers: 2
  strategy_args:
    strategy_name: deepspeed_train
    strategy_config: {gradient_clipping: 5.0, train_batch_size: auto}
"""


def read_roll(tmp_path, text):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return parse(roll.get_config(str(file)))


def test_the_originals_yaml_is_read_and_what_has_no_meaning_is_listed_once(tmp_path, capsys):
    cfg = read_roll(tmp_path, ROLL)
    assert (cfg.seed, cfg.save_steps, cfg.learning_rate, cfg.lr_scheduler_type) == (7, 5, 1e-6, "cosine")
    assert (cfg.train_batch_size, cfg.max_grad_norm, cfg.max_steps, cfg.resume_from_checkpoint) == (16, 0.3, 500, "")
    assert (cfg.num_inference_steps, cfg.policy, cfg.file_name) == (10, "offload", "./metadata.csv")
    assert (cfg.lora_rank, cfg.lora_target_modules, cfg.dtype) == (32, ("q", "k"), "bfloat16")
    assert cfg.reward_model_path == "/data/models/antelopev2"
    ignored = "exp_name, models, num_gpus_per_node, preprocessing_num_workers, pretrain, reward, strategy_args"
    assert capsys.readouterr().err == f"{tmp_path / 'config.yaml'}: without meaning here, ignored: {ignored}\n"


PLACES = (
    "{{ {} }}",
    "model_args: {{ {} }}",
    "training_args: {{ {} }}",
    "data_args: {{nested: {{ {} }} }}",
    "actor_train: {{ {} }}",
    "actor_train: {{training_args: {{ {} }} }}",
    "actor_train: {{model_args: {{model_config_kwargs: {{ {} }} }} }}",
)


@pytest.mark.parametrize("place", PLACES)
def test_a_setting_of_the_originals_is_read_wherever_it_stands(place, tmp_path, capsys):
    texts = {"seed": "3", "weight_decay": "1e-2", "use_gradient_checkpointing": "false", "lora_rank": "null"}
    cfg = read_roll(tmp_path, place.format(", ".join(f"{key}: {text}" for key, text in texts.items())))
    assert (cfg.seed, cfg.weight_decay, cfg.use_gradient_checkpointing, cfg.lora_rank) == (3, 0.01, False, 32)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("just text", ": expected a mapping"),
        ("training_args: {learning_rate: quick}", "training_args.learning_rate: expected float, got 'quick'"),
        ("train_batch_size: 2.5", "train_batch_size: expected int, got 2.5"),
        ("seed: true", "seed: expected int, got True"),
        ("max_grad_norm: 0", "max_grad_norm: expected a positive number, got 0.0"),
        ("use_gradient_checkpointing: 1", "use_gradient_checkpointing: expected bool, got 1"),
        ("resume_from_checkpoint: true", "resume_from_checkpoint: expected a run's workdir, or false, got True"),
        ("seed: {a: 1}", "seed: expected int, got {'a': 1}"),
        ("file_name: [a.csv, b.csv]", "file_name: expected str, got ['a.csv', 'b.csv']"),
        ("tokenizer_path: ${models}/umt5", "tokenizer_path: expected ${models} to name a key of this file"),
        ("file_name: ${file_name}", "file_name: expected ${file_name} to name a key of this file"),
        ("model_args: {dtype: [bf16]}", "model_args.dtype: expected bf16 or fp32, got ['bf16']"),
        ("model_args: {dtype: fp16}", "model_args.dtype: expected bf16 or fp32, got 'fp16'"),
        (
            "training_args: {adam_beta2: 0.95}",
            "training_args.adam_beta2: expected 0.999, as it always is here, got 0.95",
        ),
        (
            "{seed: 1, actor_train: {training_args: {seed: 2}}}",
            "actor_train.training_args.seed: expected 1 as in seed, got 2",
        ),
        ("{seed: x, save_steps: 0}", "seed: expected int, got 'x'; save_steps: expected a whole number of at least 1"),
    ],
)
def test_what_cannot_be_used_of_the_originals_yaml_is_refused(text, message, tmp_path):
    with pytest.raises(UserError) as refused:
        read_roll(tmp_path, text)
    assert str(refused.value).startswith(f"{tmp_path / 'config.yaml'}: {message.removeprefix(': ')}")


def test_two_places_of_the_originals_yaml_may_agree(tmp_path):
    cfg = read_roll(tmp_path, "{learning_rate: 0.1, actor_train: {training_args: {learning_rate: 1e-1}}}")
    assert cfg.learning_rate == 0.1


def test_paths_of_the_originals_yaml_may_be_a_list(tmp_path):
    cfg = read_roll(tmp_path, "{model_paths: [high, [low-1, low-2], t5, vae], file_name: [a.csv]}")
    assert json.loads(cfg.model_paths) == ["high", ["low-1", "low-2"], "t5", "vae"]
    assert cfg.file_name == "a.csv"
