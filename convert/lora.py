"""Low-rank adapters and weight differences of the DiT, in the namings that circulate.

| who writes it | example |
|---|---|
| PEFT | `base_model.model.blocks.0.self_attn.q.lora_A.weight`, alpha in adapter_config.json |
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight` |
| lightx2v, ComfyUI | `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`, `.diff`, `.diff_b`, `.diff_m` |
| kohya | `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.alpha` |
| DiffSynth (the original trainer) | `blocks.0.self_attn.q.lora_A.default.weight` |
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert.mapping import MOST_NAMED, Assignment, LazyArray, Rule, Shapes, transpose
from convert.readers import Checkpoint, Index
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS

PREFIXES = ("base_model.model.", "diffusion_model.", "transformer.", "transformer_2.", "model.diffusion_model.")
KOHYA = "lora_unet_"
# What follows a module's name, and which of its tensors it changes.
SUFFIXES = {
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".alpha": "alpha",
    ".diff": "weight",
    ".diff_b": "bias",
    ".diff_m": "modulation",
}


@dataclasses.dataclass(frozen=True)
class Delta:
    """What a file adds to one tensor.

    Attributes:
        place: the tensor of the network, and the change of layout.
        down, up: keys of the factors [r, in] and [out, r]; `up` is empty where `down` is the difference itself.
        scale: of the product.
        read: returns a tensor of the file, float32.
    """

    place: Assignment
    down: str
    up: str
    scale: float
    read: Callable[[str], np.ndarray]

    def factors(self) -> tuple[np.ndarray, np.ndarray]:
        """A [in, r] and B [r, out] with the scale in B."""
        down, up = self.read(self.down), self.read(self.up)
        return down.reshape(down.shape[0], -1).T, up.reshape(up.shape[0], -1).T * np.float32(self.scale)

    def value(self, shape: Sequence[int], index: Index) -> np.ndarray:
        """The part of the difference that belongs to a part of the network's tensor of this shape."""
        if not self.up:
            return self.place.transform.forward(self.read(self.down) * np.float32(self.scale))[index]
        a, b = self.factors()
        if self.place.transform is transpose:
            rows, columns = index
            return a[rows] @ b[:, columns]
        source = self.place.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape
        return self.place.transform.forward((a @ b).T.reshape(source))[index]


class Lora:
    """A file of adapters, every key of it assigned to a tensor of a network.

    Args:
        file: safetensors.
        namings: key tables of the network.
        target: shapes of the network.

    Raises:
        UserError: naming all keys that belong to no tensor of this network, or have no partner, or another shape.
    """

    def __init__(self, file: Path | str, namings: Mapping[str, Sequence[Rule]], target: Shapes) -> None:
        self.file = Path(file)
        self.deltas: dict[tuple[str, int | None], Delta] = {}
        self.ranks: set[int] = set()
        self._checkpoint = Checkpoint([self.file], prefixes=())
        places = _places(namings, target)
        found: dict[str, dict[str, str]] = {}
        problems = []
        for key in self._checkpoint.shapes:
            suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
            if suffix is None:
                problems.append(f"unexpected tensor {key}")
            else:
                found.setdefault(_module(key.removesuffix(suffix)), {})[SUFFIXES[suffix]] = key
        alpha = _sidecar_alpha(self.file)
        for module, keys in found.items():
            for tensor, down, up in _pairs(keys, problems):
                place = places.get((module, tensor))
                if place is None:
                    problems.append(f"{down} belongs to no tensor of this network")
                    continue
                shape = target[place.target][1:] if place.layer is not None else target[place.target]
                delta = self._delta(place, down, up, keys.get("alpha"), alpha)
                wrong = self._wrong_shape(delta, shape)
                if wrong:
                    problems.append(wrong)
                else:
                    self.deltas[place.target, place.layer] = delta
        if not self.deltas and not problems:
            problems.append("holds no adapters")
        if problems:
            more = f" (+{len(problems) - MOST_NAMED} more)" if len(problems) > MOST_NAMED else ""
            raise UserError(f"{file}: {'; '.join(problems[:MOST_NAMED])}{more}")

    def _read(self, key: str) -> np.ndarray:
        return self._checkpoint.read(key).astype(np.float32)

    def _delta(self, place: Assignment, down: str, up: str, alpha_key: str | None, alpha: float | None) -> Delta:
        scale = 1.0
        if up:
            rank = self._checkpoint.shapes[down][0]
            self.ranks.add(rank)
            if alpha_key is not None:
                alpha = float(self._read(alpha_key).reshape(-1)[0])
            # Without an alpha the product is meant as it is.
            scale = 1.0 if alpha is None else alpha / rank
        return Delta(place, down, up, scale, self._read)

    def _wrong_shape(self, delta: Delta, shape: Sequence[int]) -> str | None:
        source = delta.place.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape
        down = self._checkpoint.shapes[delta.down]
        if not delta.up:
            if tuple(down) != source:
                return f"{delta.down} has shape {list(down)}, expected {list(source)}"
            return None
        up = self._checkpoint.shapes[delta.up]
        rank, inner = down[0], int(np.prod(down[1:]))
        if inner != int(np.prod(source[1:])) or up[0] != source[0] or int(np.prod(up[1:])) != rank:
            return f"{delta.down} {list(down)} and {delta.up} {list(up)} do not make {list(source)}"
        return None


def _pairs(keys: Mapping[str, str], problems: list[str]) -> Iterator[tuple[str, str, str]]:
    if "down" in keys and "up" in keys:
        yield "weight", keys["down"], keys["up"]
    elif half := keys.get("down", keys.get("up")):
        problems.append(f"{half} has no partner")
    elif "alpha" in keys:
        problems.append(f"{keys['alpha']} has no factors")
    for tensor in ("weight", "bias", "modulation"):
        if tensor in keys:
            yield tensor, keys[tensor], ""


def _module(name: str) -> str:
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    return name


def _places(namings: Mapping[str, Sequence[Rule]], target: Shapes) -> dict[tuple[str, str], Assignment]:
    """Where a module's tensor is, by the module's name in every naming, kohya's included."""
    places = {}
    for rules in namings.values():
        for rule in rules:
            if rule.target is None or rule.target not in target:
                continue
            for layer in range(target[rule.target][0]) if rule.stacked else [None]:
                key = rule.key(layer)
                place = Assignment(key, rule.target, layer, rule.transform)
                module, _, tensor = key.rpartition(".")
                # diffusers calls the modulation by another name; differences of it are published in the original's.
                for name in (module, KOHYA + module.replace(".", "_")):
                    places[name, tensor] = place
    return places


def _sidecar_alpha(file: Path) -> float | None:
    """PEFT's alpha, from the adapter_config.json beside the file."""
    config = file.parent / "adapter_config.json"
    if not config.exists():
        return None
    try:
        content = json.loads(config.read_text())
        alpha, rank = content["lora_alpha"], content["r"]
        patterns = content.get("alpha_pattern") or content.get("rank_pattern") or content.get("use_rslora")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{config}: expected PEFT's adapter configuration ({error})") from None
    if patterns or not isinstance(alpha, int | float) or not isinstance(rank, int):
        raise UserError(f"{config}: expected one lora_alpha and one r for all layers")
    return float(alpha)


def merge(arrays: Mapping[str, LazyArray], loras: Sequence[tuple[Lora, float]]) -> dict[str, LazyArray]:
    """The arrays with all differences added, each at its strength, when they are read.

    Args:
        arrays: of the network.
        loras: files and strengths.
    """
    added: dict[str, dict[int | None, list[Callable[[Index], np.ndarray]]]] = {}
    for lora, strength in loras:
        for (name, layer), delta in lora.deltas.items():
            shape = arrays[name].shape if layer is None else arrays[name].shape[1:]

            def part(
                index: Index, delta: Delta = delta, shape: Sequence[int] = shape, strength: float = strength
            ) -> np.ndarray:
                return np.float32(strength) * delta.value(shape, index)

            added.setdefault(name, {}).setdefault(layer, []).append(part)
    return {name: array.plus(added[name]) if name in added else array for name, array in arrays.items()}


def adapters(lora: Lora, targets: Sequence[str], layers: int) -> dict[str, np.ndarray]:
    """The file as adapters to go on training from, by our paths (`blocks.self_attn.q.lora_a`), scale 1.

    Args:
        lora: of low-rank products only, of one rank.
        targets: the original's names of adapted layers (lora_target_modules).
        layers: of the network; a product must be there for all of them or for none.

    Raises:
        UserError: the file changes something else.
    """
    if len(lora.ranks) != 1:
        raise UserError(f"{lora.file}: expected adapters of one rank, found {sorted(lora.ranks)}")
    suffixes = tuple(f".{TARGETS[target]}.kernel" for target in targets)
    stacks: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for (name, layer), delta in lora.deltas.items():
        if layer is None or not delta.up or not name.endswith(suffixes):
            raise UserError(f"{lora.file}: {delta.down} is no adapter of {', '.join(targets)}")
        stacks.setdefault(name.removesuffix(".kernel"), {})[layer] = delta.factors()
    arrays = {}
    for name, factors in stacks.items():
        missing = sorted(set(range(layers)) - factors.keys())
        if missing:
            raise UserError(f"{lora.file}: has no adapter of {name} in layer {missing[0]}, but in others")
        for i, leaf in enumerate(("lora_a", "lora_b")):
            arrays[f"{name}.{leaf}"] = np.stack([factors[layer][i] for layer in range(layers)])
    return arrays


def named(arrays: Mapping[str, np.ndarray], rules: Sequence[Rule], pattern: str) -> dict[str, np.ndarray]:
    """Adapter matrices of our paths under another naming, in PyTorch's layout.

    Args:
        arrays: `blocks....lora_a` [l, in, r] and `lora_b` [l, r, out].
        rules: key table of the network in that naming.
        pattern: of a key, with {module} and {half}: "A" or "B".
    """
    modules = {rule.target: rule for rule in rules if rule.stacked and rule.target and rule.target.endswith(".kernel")}
    out = {}
    for name, array in sorted(arrays.items()):
        base, _, leaf = name.rpartition(".")
        rule = modules[f"{base}.kernel"]
        for layer in range(array.shape[0]):
            module = rule.key(layer).removesuffix(".weight")
            out[pattern.format(module=module, half=leaf[-1].upper())] = np.ascontiguousarray(array[layer].T)
    return out


def parse_strength(text: str) -> tuple[str, float]:
    """`FILE[:STRENGTH]` as file and strength, 1 where none is given."""
    match = re.fullmatch(r"(.+?):(-?\d+(?:\.\d+)?)", text)
    return (match[1], float(match[2])) if match else (text, 1.0)
