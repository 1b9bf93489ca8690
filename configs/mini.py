"""The miniature: drawn faces, networks of the true architectures at small width, a few minutes on two CPU cores.

`python -m rfl_jax.train --config=configs/mini.py --workdir=runs/mini` needs nothing else. Its result stands in the
README.
"""

from ml_collections import ConfigDict

from rfl_jax.config import default_config
from rfl_jax.miniature.data import clips
from rfl_jax.miniature.world import FRAMES, SIZE, asset_paths, judge_path
from rfl_jax.recipes import with_recipe


def get_config(recipe: str = "guarded") -> ConfigDict:
    config = with_recipe(miniature(str(clips("train")), str(clips("held_out"))), recipe)
    config.max_steps = 50
    config.eval_every = config.sample_every = 25
    # Motion differs so much from clip to clip that the change of its mean over 24 is known to 5 % only, over 96 to 3 %.
    config.eval.num_samples = 96
    return config


def miniature(training: str, held_out: str) -> ConfigDict:
    """The settings with these csv files of clips, the reward the face's alone; an empty `held_out`: no evaluation."""
    config = default_config()
    config.update(asset_paths())
    config.preset = "mini"
    config.dtype = "float32"
    config.file_name = training
    config.train_batch_size = config.per_device_train_batch_size = 8
    config.max_steps = 40
    config.learning_rate = 2e-3
    config.warmup_steps = 5
    config.lora_rank = 8
    config.seed = 0
    config.save_steps = 20
    config.sample_every = 20
    config.eval_every = 10
    config.remat_policy = "none"
    config.reward.detector_size = SIZE
    config.data.num_frames = FRAMES
    config.data.max_pixels = SIZE * SIZE
    config.eval.file_name = held_out
    config.eval.judge_model_path = judge_path()
    config.eval.num_samples = config.eval.validation_samples = 24
    return config
