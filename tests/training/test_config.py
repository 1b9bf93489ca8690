"""The configuration refuses by name; schedules are those of transformers; the original's yaml is read."""

import dataclasses

import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import roll
from rfl_jax.config import Config, default_config, dumps, parse
from rfl_jax.errors import UserError
from rfl_jax.training.optim import learning_rate


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
    config = ConfigDict(default_config().to_dict())
    *groups, last = key.split(".")
    target = config
    for group in groups:
        target = target[group]
    with target.ignore_type():
        target[last] = value
    with pytest.raises(UserError, match=message):
        parse(config)


def test_what_trains_and_what_is_rematerialised():
    cfg = dataclasses.replace(Config(), trainable_models="dit, vae", lora_base_model="dit2")
    assert cfg.trained == ("dit", "dit2", "vae")
    assert cfg.adapted == ("dit2",)
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
num_gpus_per_node: 8
actor_train:
  model_args:
    dtype: bf16
    model_config_kwargs:
      model_name: wan2_2
      model_paths: ./paths.json
      trainable_models: dit2
      use_gradient_checkpointing_offload: true
      num_inference_steps: 10
      final_timestep: 9
  training_args:
    learning_rate: 1e-6
    lr_scheduler_type: cosine
  data_args:
    file_name: ./metadata.csv
    preprocessing_num_workers: 2
  strategy_args:
    strategy_name: deepspeed_train
"""


def test_the_originals_yaml_is_read_and_what_has_no_meaning_is_listed_once(tmp_path, capsys):
    file = tmp_path / "config.yaml"
    file.write_text(ROLL)
    cfg = parse(roll.get_config(str(file)))
    assert (cfg.seed, cfg.save_steps, cfg.learning_rate, cfg.lr_scheduler_type) == (7, 5, 1e-6, "cosine")
    assert (cfg.num_inference_steps, cfg.policy, cfg.file_name) == (10, "offload", "./metadata.csv")
    out = capsys.readouterr().err
    assert "ignored: exp_name, num_gpus_per_node, preprocessing_num_workers" in out
    file.write_text("just text")
    with pytest.raises(UserError, match="expected a mapping"):
        roll.get_config(str(file))
    file.write_text(ROLL.replace("1e-6", "quick"))
    with pytest.raises(UserError, match="learning_rate: expected float, got 'quick'"):
        roll.get_config(str(file))
