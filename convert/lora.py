"""Low-rank adapters and weight differences of the DiT, in the namings that circulate.

| who writes it | example |
|---|---|
| PEFT | `base_model.model.blocks.0.self_attn.q.lora_A.weight`, alpha in adapter_config.json |
| diffusers | `transformer.blocks.0.attn1.to_q.lora_A.weight`, alpha in the header |
| lightx2v, ComfyUI | `diffusion_model.blocks.0.self_attn.q.lora_down.weight`, `.alpha`, `.diff`, `.diff_b`, `.diff_m` |
| kohya | `lora_unet_blocks_0_self_attn_q.lora_down.weight`, `.alpha` |
| VideoX-Fun | `lora_unet__blocks_0_self_attn_q.lora_down.weight`, `.alpha` |
| DiffSynth (the original trainer) | `blocks.0.self_attn.q.lora_A.default.weight` |
| ai-toolkit | `diffusion_model.transformer_2.blocks.0.self_attn.q.lora_A.weight`: both experts in one file |
"""

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from convert import lora_scale
from convert.mapping import MOST_NAMED, Assignment, LazyArray, Rule, Shapes, transpose
from convert.readers import WRAPPERS, Checkpoint, Index
from convert.recognise import looks_like
from rfl_jax.errors import UserError
from rfl_jax.models.lora import TARGETS

# What tools put before a module's name, in any order and number.
PREFIXES = ("base_model.model.", "model.", "diffusion_model.", "module.", "pipe.", "dit.", "transformer.")
# The same, where it tells the network: the high-noise expert, and the low-noise one.
EXPERTS = {
    "transformer_1.": "dit",
    "high_noise.": "dit",
    "high_noise_model.": "dit",
    "transformer_2.": "dit2",
    "low_noise.": "dit2",
    "low_noise_model.": "dit2",
    "dit2.": "dit2",
}
EXPERT_NAMES = {"dit": "high-noise expert", "dit2": "low-noise expert"}
# How `--expert` calls them.
EXPERT_OPTIONS = {"high": "dit", "low": "dit2"}
KOHYA = "lora_unet_"
KOHYA_PREFIX = re.compile(r"^lora_unet_+(?:orig_mod_+)?")
# What follows a module's name, and which of its tensors it changes. PEFT's adapters can have names.
SUFFIXES = {
    re.compile(r"\.lora_A(\.[^.]+)?\.weight$"): "down",
    re.compile(r"\.lora_B(\.[^.]+)?\.weight$"): "up",
    re.compile(r"\.(lora_down(\.[^.]+)?|lora\.down|lora_linear_layer\.down)\.weight$"): "down",
    re.compile(r"\.(lora_up(\.[^.]+)?|lora\.up|lora_linear_layer\.up)\.weight$"): "up",
    re.compile(r"\.alpha$"): "alpha",
    re.compile(r"\.diff$"): "weight",
    re.compile(r"\.diff_b$"): "bias",
    re.compile(r"\.diff_m$"): "modulation",
}


class UnfitError(UserError):
    """A file that does not fit a network.

    Attributes:
        count: of its faults.
    """

    def __init__(self, message: str, count: int) -> None:
        super().__init__(message)
        self.count = count


@dataclasses.dataclass(frozen=True)
class Key:
    """A key of a file, taken apart.

    Attributes:
        name: the key.
        module: what it is of, without prefixes.
        part: a value of `SUFFIXES`.
        expert: "dit" or "dit2" where a prefix says so.
        prefix: that says so.
    """

    name: str
    module: str
    part: str
    expert: str
    prefix: str


def take_apart(key: str) -> Key | None:
    """None for a key that is of no adapter."""
    bare = WRAPPERS.sub("", key)
    found = next(((s, match) for s in SUFFIXES if (match := s.search(bare))), None)
    if found is None:
        return None
    suffix, match = found
    module, expert, said = bare[: match.start()], "", ""
    while prefix := next((p for p in (*PREFIXES, *EXPERTS) if module.startswith(p)), ""):
        module = module.removeprefix(prefix)
        if prefix in EXPERTS:
            expert, said = EXPERTS[prefix], prefix
    return Key(key, KOHYA_PREFIX.sub(KOHYA, module), SUFFIXES[suffix], expert, said)


def experts_of(keys: Iterable[str]) -> tuple[str, ...]:
    """The experts that the prefixes of a file's keys name: "dit", "dit2", both or none. Beside adapters of the low-noise
    expert those without such a prefix are of the high-noise one.
    """
    found = {key.expert for key in map(take_apart, keys) if key}
    if "dit2" in found and len(found) > 1:
        return "dit", "dit2"
    return tuple(found - {""}) if len(found) == 1 else ()


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
        file: safetensors, or a pickle, or the folder of one.
        namings: key tables of the network.
        target: shapes of the network.
        expert: "dit" or "dit2", whose adapters are meant where the file has those of both.

    Attributes:
        deltas: what the file adds, by tensor and layer.
        ranks: of its products.

    Raises:
        UserError: naming all keys that belong to no tensor of this network, or have no partner, or another shape, or
            change the same; two places that say different scales; numbers that are not finite; adapters of both
            experts and no `expert`.
    """

    def __init__(
        self, file: Path | str, namings: Mapping[str, Sequence[Rule]], target: Shapes, expert: str = ""
    ) -> None:
        self.file = Path(file)
        self.deltas: dict[tuple[str, int | None], Delta] = {}
        self.ranks: set[int] = set()
        self._checkpoint = Checkpoint([self.file], prefixes=())
        self._places = _places(namings, target)
        self._target = target
        self._problems: list[str] = []
        keys = self._keys_of(expert)
        modules: dict[str, dict[str, str]] = {}
        for key in keys:
            parts = modules.setdefault(key.module, {})
            if key.part in parts:
                self._problems.append(f"{key.name} and {parts[key.part]} are both of {key.module}, expected one")
            else:
                parts[key.part] = key.name
        changes = [change for module, parts in modules.items() for change in self._changes(module, parts)]
        # Where the factors do not fit, what else could be said would be of another network.
        if not self._problems:
            for key in keys:
                self._checkpoint.read(key.name)
            self._scale(changes, "transformer_2" if {key.expert for key in keys} == {"dit2"} else "transformer")
        if not changes and not self._problems:
            self._problems.append("holds no adapters")
        if self._problems:
            self._refuse()

    def _refuse(self) -> None:
        message = f"{self.file}: {listed(self._problems)}; {looks_like(self._checkpoint.shapes)}"
        raise UnfitError(message, len(self._problems))

    def _keys_of(self, expert: str) -> list[Key]:
        """The keys of the one expert that is meant."""
        keys = []
        for name in self._checkpoint.shapes:
            key = take_apart(name)
            if key is None:
                self._problems.append(f"unexpected tensor {name}")
            else:
                keys.append(key)
        first = [key for key in keys if key.expert != "dit2"]
        second = [key for key in keys if key.expert == "dit2"]
        if first and second:
            if not expert:
                raise UserError(
                    f"{self.file}: holds adapters of both experts ({first[0].name}, {second[0].name}), expected those of"
                    " one: choose with --expert high or --expert low (of a run: dit=FILE or dit2=FILE)"
                )
            return second if expert == "dit2" else first
        named = {key.expert for key in keys} - {""}
        if expert and named and named != {expert}:
            prefix = next(key.prefix for key in keys if key.prefix)
            raise UserError(
                f"{self.file}: holds adapters of the {EXPERT_NAMES[named.pop()]} alone ({prefix}), expected those of the"
                f" {EXPERT_NAMES[expert]}"
            )
        return keys

    def _changes(self, module: str, parts: Mapping[str, str]) -> list[tuple[Delta, str, str]]:
        """The differences of one module, scale 1, each with the module's name and the key of its alpha."""
        changes = []
        for tensor, down, up in self._pairs(parts):
            place = self._places.get((module, tensor))
            if place is None:
                self._problems.append(f"{down} belongs to no tensor of this network")
                continue
            delta = Delta(place, down, up, 1.0, self._read)
            before = self.deltas.get((place.target, place.layer))
            if before:
                self._problems.append(f"{before.down} and {down} both change {place.key}, expected one of them")
            elif wrong := self._wrong_shape(delta):
                self._problems.append(wrong)
            else:
                self.deltas[place.target, place.layer] = delta
                changes.append((delta, module, parts.get("alpha", "") if up else ""))
        return changes

    def _pairs(self, parts: Mapping[str, str]) -> list[tuple[str, str, str]]:
        """The tensor that is changed and the keys of what changes it, one or two."""
        pairs = []
        if "down" in parts and "up" in parts:
            pairs.append(("weight", parts["down"], parts["up"]))
        elif half := parts.get("down", parts.get("up")):
            self._problems.append(f"{half} has no partner")
        elif "alpha" in parts:
            self._problems.append(f"{parts['alpha']} has no factors")
        pairs += [(tensor, parts[tensor], "") for tensor in ("weight", "bias", "modulation") if tensor in parts]
        return pairs

    def _scale(self, changes: Sequence[tuple[Delta, str, str]], component: str) -> None:
        """Gives every product the scale that the file, its header and its own sidecar say."""
        products = [(delta, module, alpha) for delta, module, alpha in changes if delta.up]
        try:
            settings = lora_scale.of_header(self._checkpoint.metadata, component)
            stabilized = lora_scale.is_stabilized(self._checkpoint.metadata)
        except UserError as error:
            raise UserError(f"{self.file}: {error}") from None
        config = self._checkpoint.files[0].with_name("adapter_config.json")
        unused = ""
        if products and config.exists():
            if self._is_pefts([delta.down for delta, _, _ in products]):
                settings.append(lora_scale.of_sidecar(config))
            else:
                unused = f" ({config.name} beside it is of PEFT's files, whose keys are others)"
        names: dict[tuple[str, int | None], list[str]] = {}
        for (module, _), place in self._places.items():
            if not module.startswith(KOHYA):
                names.setdefault((place.target, place.layer), []).append(module)
        unsaid = False
        for delta, module, alpha_key in products:
            at = delta.place.target, delta.place.layer
            rank = self._checkpoint.shapes[delta.down][0]
            self.ranks.add(rank)
            try:
                alpha = (alpha_key, self._number(alpha_key)) if alpha_key else None
                if alpha and stabilized and not settings:
                    raise UserError(
                        f"{stabilized} says that the scale is over the root of the rank, but not whether {alpha_key} is: "
                        f"expected {lora_scale.KOHYA} beside it"
                    )
                scale = lora_scale.combine([module, *names[at]], rank, alpha, settings)
            except UserError as error:
                self._problems.append(str(error).removeprefix(f"{self.file}: "))
                continue
            unsaid = unsaid or not (alpha or settings)
            self.deltas[at] = dataclasses.replace(delta, scale=scale)
        if unsaid and not self._problems:
            _say(f"{self.file}: says no alpha{unused}, so its adapters count as they are (scale 1)")

    def _is_pefts(self, keys: Sequence[str]) -> bool:
        """Whether a file is one that PEFT writes an adapter_config.json for."""
        if not all(re.search(r"\.lora_A(\.[^.]+)?\.weight$", key) for key in keys):
            return False
        if all(key.startswith("base_model.model.") for key in keys):
            return True
        bare = not any(key.startswith((*PREFIXES, *EXPERTS, KOHYA)) for key in keys)
        return bare and self._checkpoint.files[0].stem == "adapter_model"

    def _read(self, key: str) -> np.ndarray:
        return self._checkpoint.read(key).astype(np.float32)

    def _number(self, key: str) -> float:
        value = self._read(key)
        if value.size != 1:
            raise UserError(f"{key} has shape {list(value.shape)}, expected one number")
        return float(value.reshape(()))

    def _wrong_shape(self, delta: Delta) -> str | None:
        shape = self._target[delta.place.target][0 if delta.place.layer is None else 1 :]
        source = delta.place.transform.inverse(np.broadcast_to(np.float32(0), shape)).shape
        down = self._checkpoint.shapes[delta.down]
        if not delta.up:
            if tuple(down) != source:
                return f"{delta.down} has shape {list(down)}, expected {list(source)}"
            return None
        up = self._checkpoint.shapes[delta.up]
        rank = down[0] if len(down) > 1 and len(up) > 1 else 0
        inner = int(np.prod(down[1:]))
        if not rank or inner != int(np.prod(source[1:])) or up[0] != source[0] or int(np.prod(up[1:])) != rank:
            return f"{delta.down} {list(down)} and {delta.up} {list(up)} do not make {list(source)}"
        return None


def listed(problems: Sequence[str]) -> str:
    """The first faults, and how many there are."""
    more = f" (+{len(problems) - MOST_NAMED} more)" if len(problems) > MOST_NAMED else ""
    return f"{'; '.join(problems[:MOST_NAMED])}{more}"


@functools.cache
def _say(text: str) -> None:
    """A line on stderr, once."""
    print(text, file=sys.stderr, flush=True)


def _places(namings: Mapping[str, Sequence[Rule]], target: Shapes) -> dict[tuple[str, str], Assignment]:
    """Where a module's tensor is, by the module's name in every naming, kohya's included."""
    places: dict[tuple[str, str], Assignment] = {}
    for rules in namings.values():
        for rule in rules:
            if rule.target is None or rule.target not in target:
                continue
            for layer in range(target[rule.target][0]) if rule.stacked else [None]:
                key = rule.key(layer)
                place = Assignment(key, rule.target, layer, rule.transform)
                module, _, tensor = key.rpartition(".")
                # The modulation is a tensor of no layer of its own: a difference can be named after either.
                alone = tensor not in ("weight", "bias")
                for name, part in [(module, tensor), *([(key, "weight")] if alone else [])]:
                    places[name, part] = places[KOHYA + name.replace(".", "_"), part] = place
    return places


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
    problems = []
    for (name, layer), delta in lora.deltas.items():
        if layer is None or not delta.up or not name.endswith(suffixes):
            problems.append(f"{delta.down} is no adapter of {', '.join(targets)}")
        else:
            stacks.setdefault(name.removesuffix(".kernel"), {})[layer] = delta.factors()
    for name, factors in stacks.items():
        missing = sorted(set(range(layers)) - factors.keys())
        if missing:
            example = lora.deltas[f"{name}.kernel", min(factors)].down
            problems.append(
                f"{example} has no counterpart in block{'s' * (len(missing) > 1)} {', '.join(map(str, missing))}"
            )
    if problems:
        raise UserError(f"{lora.file}: {listed(problems)}")
    arrays = {}
    for name, factors in stacks.items():
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
