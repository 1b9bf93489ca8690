"""The run's configuration: ConfigDict at the edge, frozen dataclasses inside.

Top-level keys are the original's, with its names and meanings; what is added is grouped. Each setting's type carries its
range and its meaning: `python -m rfl_jax.config > docs/settings.md` prints them.
"""

from rfl_jax.config.config import TRAINABLE, Config
from rfl_jax.config.page import default_text, grouped, markdown
from rfl_jax.config.reading import check_keys, config_file, default_config, dumps, parse, plain
from rfl_jax.config.sections import (
    EvalSection,
    KLSection,
    MotionSection,
    NFTSection,
    NoiseSection,
    RealSection,
    RewardSection,
    SamplingSection,
    WindowSection,
)

__all__ = [
    "TRAINABLE",
    "Config",
    "EvalSection",
    "KLSection",
    "MotionSection",
    "NFTSection",
    "NoiseSection",
    "RealSection",
    "RewardSection",
    "SamplingSection",
    "WindowSection",
    "check_keys",
    "config_file",
    "default_config",
    "default_text",
    "dumps",
    "grouped",
    "markdown",
    "parse",
    "plain",
]
