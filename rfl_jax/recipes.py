"""Recipes: what a run rewards and holds on to besides its networks and clips. Config files begin with one of them."""

from collections.abc import Callable

from ml_collections import ConfigDict

from rfl_jax.errors import UserError, did_you_mean


def original(config: ConfigDict) -> ConfigDict:
    """ROLL's: the face alone, a KL of weight 1, gradient through all denoising steps of the low-noise expert. The defaults of
    `rfl_jax.config` are this recipe.
    """
    return config


def guarded(config: ConfigDict) -> ConfigDict:
    """What wins on the miniature (docs/frontier.md), for A14B at three quarters of the original's FLOPs. The face alone is best kept by
    a head that holds still; two more terms ask for the motion and the change that the network showed before training, so that
    less of the KL will do. Gradient goes through one random step, and an average of the weights takes some of its variance away.
    """
    terms = {
        "face": {"weight": 1.0},
        "motion": {"weight": 1.0, "against": "untrained", "hold": False},
        "anti_copy": {"weight": 1.7, "against": "untrained", "hold": False},
    }
    config.update_from_flattened_dict(
        {
            "reward.terms": terms,
            "reward.kl_weight": 0.3,
            "window.mode": "random",
            "window.steps": 1,
            "ema.decay": 0.95,
        }
    )
    return config


RECIPES: dict[str, Callable[[ConfigDict], ConfigDict]] = {"guarded": guarded, "original": original}


def with_recipe(config: ConfigDict, name: str) -> ConfigDict:
    """The settings with those of a recipe, named after a colon: `--config=configs/wan2_2_i2v_a14b.py:original`.

    Raises:
        UserError: there is none of that name.
    """
    if name not in RECIPES:
        expected = f"--config: recipe {name!r}: expected one of {', '.join(RECIPES)}"
        raise UserError(expected + did_you_mean(name, RECIPES))
    return RECIPES[name](config)
