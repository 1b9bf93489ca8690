"""What of the networks trains, what stays, and how they are put together from both."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from rfl_jax import hosts
from rfl_jax.config import TRAINABLE, Config
from rfl_jax.models.lora import add_lora
from rfl_jax.networks.table import places, sharding_table
from rfl_jax.sharding import check_rules

States = dict[str, nnx.State]


@dataclasses.dataclass
class Frozen:
    """Weights that a step only reads.

    Attributes:
        rest: the weights of each network that do not train.
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
        """A network in which nothing trains, with its weights."""
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

    def check_sharding(self, cfg: Config, params: States, frozen: Frozen, mesh: Mesh) -> None:
        """Raises KeyError where a parameter has no sharding rule, or a rule no parameter."""
        for name in self.graphs:
            states = [states[name] for states in (params, frozen.rest) if name in states]
            if not jax.tree.leaves(states):  # terms of the reward without networks
                continue
            adapted = name in self.adapted
            check_rules(states, sharding_table(name), mesh, adapted=adapted, quantized=cfg.quantizes(name))


def _trains_in_full(name: str) -> Callable[[tuple[Any, ...], Any], bool]:
    """Filter of the parameters that train when a network trains in full: of the VAE only those that decode."""

    def chosen(path: tuple[Any, ...], value: Any) -> bool:
        return isinstance(value, nnx.Param) and (name != "vae" or path[0] in ("decoder", "post_quant"))

    return chosen


def split_networks(cfg: Config, modules: Mapping[str, Any]) -> tuple[Networks, States, Frozen]:
    """Divides networks into what trains (float32 masters) and what stays.

    Args:
        cfg: names what trains, and how.
        modules: by name: the DiTs that the step calls ("dit", "dit2", or "dit" alone where one network serves all
            steps), "vae", "reward", and "text_encoder" where it trains.
    """
    graphs, base, params, rest, reference = {}, {}, {}, {}, {}
    for name, module in modules.items():
        if name in ("dit", "dit2"):
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
    adapted = tuple(name for name in cfg.adapted if name in modules)
    return Networks(graphs, base, adapted), params, Frozen(rest, reference)


def frozen_places(cfg: Config, frozen: Frozen, mesh: Mesh) -> Frozen:
    """Shardings of frozen weights, arrays or their shapes."""
    return Frozen(
        *(
            {name: places(cfg, name, state, mesh) for name, state in states.items()}
            for states in (frozen.rest, frozen.reference)
        )
    )


def untrained(networks: Networks, frozen: Frozen, params: States) -> States:
    """The trainable weights as they were before training: adapters whose product is zero, or the frozen copies."""

    def without_product(path: tuple[Any, ...], x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x) if "lora_b" in jax.tree_util.keystr(path) else x

    return {
        name: jax.tree_util.tree_map_with_path(without_product, part)
        if name in networks.adapted
        else jax.tree.map(lambda x: x.astype(jnp.float32), frozen.reference[name])
        for name, part in params.items()
    }


def split_placed(cfg: Config, name: str, module: Any, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """A network in which nothing trains as its static half and its weights on the mesh."""
    graph, state = nnx.split(module)
    return graph, jax.tree.map(hosts.place, state, places(cfg, name, state, mesh))
