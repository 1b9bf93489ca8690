"""What trains, what stays, and how the networks are put together from both."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from rfl_jax.config import TRAINABLE, Config
from rfl_jax.models.lora import add_lora
from rfl_jax.models.umt5 import UMT5Encoder
from rfl_jax.models.wan.dit import DiT
from rfl_jax.models.wan.vae import VAE
from rfl_jax.rewards.face import FaceReward

States = dict[str, nnx.State]


@dataclasses.dataclass
class TrainState:
    """What a step changes.

    Attributes:
        step: optimizer updates done.
        params: trainable weights of each trained network, float32.
        opt_state: optimizer state of `params`.
    """

    step: Any
    params: States
    opt_state: Any


jax.tree_util.register_dataclass(TrainState, ["step", "params", "opt_state"], [])


@dataclasses.dataclass
class Frozen:
    """What a step only reads.

    Attributes:
        rest: the other weights of each network.
        reference: frozen copies of networks trained in full, for the KL and the evaluation.
    """

    rest: States
    reference: States


jax.tree_util.register_dataclass(Frozen, ["rest", "reference"], [])


@dataclasses.dataclass(frozen=True)
class Networks:
    """The static halves (graph definitions) of all networks.

    Attributes:
        graphs: by name; adapters included where there are any.
        base: graphs of the DiTs without adapters.
        adapted: networks that train by adapters.
    """

    graphs: Mapping[str, nnx.GraphDef]
    base: Mapping[str, nnx.GraphDef]
    adapted: tuple[str, ...]

    def merge(self, name: str, state: nnx.State) -> Any:
        """A network of which nothing trains, with its weights."""
        return nnx.merge(self.graphs[name], state)

    def build(self, name: str, params: States, frozen: Frozen) -> Any:
        """The network with its current weights."""
        states = [s[name] for s in (params, frozen.rest) if name in s]
        return nnx.merge(self.graphs[name], *states)

    def build_reference(self, name: str, frozen: Frozen) -> Any:
        """The DiT before training."""
        if name in self.adapted:
            return nnx.merge(self.base[name], frozen.rest[name])
        return nnx.merge(self.base[name], frozen.reference[name], frozen.rest[name])


def _trains_in_full(name: str):  # noqa: ANN202
    """Filter of the parameters that train when a network trains in full: of the VAE only what decodes."""

    def chosen(path: tuple, value: Any) -> bool:
        return isinstance(value, nnx.Param) and (name != "vae" or path[0] in ("decoder", "post_quant"))

    return chosen


def split_networks(
    cfg: Config,
    *,
    dits: Mapping[str, DiT],
    vae: VAE,
    reward: FaceReward,
    text_encoder: UMT5Encoder | None,
) -> tuple[Networks, States, Frozen]:
    """Divides the networks into what trains (float32 masters) and what stays.

    Args:
        cfg: names what trains, and how.
        dits: "dit" and "dit2", or "dit" alone where one network serves all steps.
        text_encoder: only where it trains.
    """
    modules: dict[str, Any] = {**dits, "vae": vae, "reward": reward}
    if text_encoder is not None:
        modules["text_encoder"] = text_encoder
    graphs, base, params, rest, reference = {}, {}, {}, {}, {}
    for name, module in modules.items():
        base[name] = nnx.split(module)[0]
        if name in cfg.adapted:
            # The same adapters whatever else is loaded.
            key = jax.random.fold_in(jax.random.key(cfg.seed), TRAINABLE.index(name))
            add_lora(module, rank=cfg.lora_rank, targets=cfg.lora_target_modules, key=key)
            graphs[name], params[name], rest[name] = nnx.split(module, nnx.LoRAParam, ...)
        elif name in cfg.trained:
            graphs[name], trained, rest[name] = nnx.split(module, _trains_in_full(name), ...)
            # A copy: training donates the masters' buffers.
            reference[name] = jax.tree.map(jnp.copy, trained)
            params[name] = jax.tree.map(lambda x: jnp.array(x, jnp.float32), trained)
        else:
            graphs[name], rest[name] = nnx.split(module)
    dit_base = {name: base[name] for name in dits}
    adapted = tuple(name for name in cfg.adapted if name in dits)
    return Networks(graphs, dit_base, adapted), params, Frozen(rest, reference)


def create_state(params: States, tx: optax.GradientTransformation) -> TrainState:
    """The state before the first update."""
    return TrainState(jnp.int32(0), params, tx.init(params))
