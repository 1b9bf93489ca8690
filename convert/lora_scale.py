"""The scale of a low-rank product, from wherever the tool that wrote a file has left it.

| where | what it says |
|---|---|
| the tensor `<layer>.alpha` | alpha of this layer |
| `lora_adapter_metadata` in the header (diffusers) | PEFT's settings, each behind the name of its component |
| `alpha`, `lora_alpha`, `network_alpha`, `ss_network_alpha` (kohya) in the header | alpha of all layers |
| adapter_config.json (PEFT) | PEFT's settings |

The scale is alpha / rank, with rank-stabilised adapters alpha / sqrt(rank). Of those LyCORIS stores an alpha of its own in
the tensor, alpha * sqrt(rank), so that who divides by the rank is right; the header has the alpha that was asked for. An
alpha of a tensor is therefore over the rank, and where adapters are rank-stabilised the header has to say the same.
"""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rfl_jax.errors import UserError
from rfl_jax.files import parse_json, read_json

DIFFUSERS = "lora_adapter_metadata"
# Names of alpha in a header, and of the rank that goes with it.
PLAIN = {
    "alpha": ("rank", "r", "lora_rank"),
    "lora_alpha": ("r", "lora_r", "lora_rank", "rank"),
    "network_alpha": ("network_dim", "rank"),
    "ss_network_alpha": ("ss_network_dim",),
}
KOHYA = "ss_network_alpha"
# How kohya's tools and LyCORIS record the options of a network, as JSON; and what calls adapters rank-stabilised, there
# or in the header itself.
KOHYA_OPTIONS = "ss_network_args"
STABILIZED = ("use_rslora", "rs_lora", "rslora")
# What kohya's tools write where there is no one number for all layers.
NO_NUMBER = ("", "None", "Dynamic")
TOLERANCE = 0.01  # an alpha of bfloat16 has three digits


@dataclasses.dataclass(frozen=True)
class Settings:
    """What one place says of all layers.

    Attributes:
        where: the header's key, or the file beside.
        rank: of all layers but those that `rank_pattern` names; None: not said.
        alpha: of all layers but those that `alpha_pattern` names.
        rank_pattern, alpha_pattern: PEFT's, by a regular expression of the end of a layer's name.
        rank_stabilized: alpha is over the root of the rank.
        targets: ends of the adapted layers' names, or a regular expression of whole names; None: not said.
        of_some: layers of another rank are none of its business.
    """

    where: str
    rank: int | None
    alpha: float
    rank_pattern: Mapping[str, int] = dataclasses.field(default_factory=dict)
    alpha_pattern: Mapping[str, float | int] = dataclasses.field(default_factory=dict)
    rank_stabilized: bool = False
    targets: Sequence[str] | str | None = None
    of_some: bool = False

    def adapts(self, names: Sequence[str]) -> bool:
        """Whether a layer is one of those that the settings are of."""
        if self.targets is None or self.targets == "all-linear":
            return True
        if isinstance(self.targets, str):
            return any(re.fullmatch(self.targets, name) for name in names)
        return any(name == target or name.endswith(f".{target}") for name in names for target in self.targets)

    def rank_of(self, names: Sequence[str]) -> int | None:
        """The rank said of a layer, by its names."""
        return _matching(self.rank_pattern, names, self.rank)

    def scale_of(self, names: Sequence[str], rank: int) -> float:
        """The scale said of a layer."""
        alpha = _matching(self.alpha_pattern, names, self.alpha)
        return alpha / (math.sqrt(rank) if self.rank_stabilized else rank)


def _matching(pattern: Mapping[str, Any], names: Sequence[str], otherwise: Any) -> Any:
    """As PEFT's get_pattern_key: the first pattern that is the end of a name."""
    for key, value in pattern.items():
        if any(re.match(rf"(.*\.)?({key})$", name) for name in names):
            return value
    return otherwise


def combine(names: Sequence[str], rank: int, alpha: tuple[str, float] | None, settings: Sequence[Settings]) -> float:
    """The scale of one product; 1 where nothing is said of it.

    Args:
        names: of the layer, in every naming.
        rank: of its factors.
        alpha: key and value of its own tensor.
        settings: of the file.

    Raises:
        UserError: two places say different things.
    """
    said = [(alpha[0], alpha[1] / rank)] if alpha else []
    for place in settings:
        if not place.adapts(names):
            raise UserError(f"{place.where} does not name {names[0]} among its target_modules: is it of another file?")
        expected = place.rank_of(names)
        if expected is not None and expected != rank:
            if place.of_some and alpha:
                continue
            raise UserError(f"{place.where} says rank {expected} of {names[0]}, whose tensors have rank {rank}")
        said.append((place.where, place.scale_of(names, rank)))
    for where, scale in said[1:]:
        if not math.isclose(scale, said[0][1], rel_tol=TOLERANCE):
            raise UserError(f"{said[0][0]} says scale {said[0][1]:g} of {names[0]}, but {where} says {scale:g}")
    return said[0][1] if said else 1.0


def of_header(metadata: Mapping[str, str], component: str) -> list[Settings]:
    """What a safetensors header says.

    Args:
        metadata: the header's texts.
        component: whose settings are meant, where there are several: "transformer" or "transformer_2".

    Raises:
        UserError: it says something that is no number.
    """
    found = []
    if DIFFUSERS in metadata:
        where = f"{DIFFUSERS} in the header"
        content = parse_json(metadata[DIFFUSERS], where)
        if content:
            found.append(_of_peft(where, _of_component(where, content, component)))
    stabilized = bool(is_stabilized(metadata))
    for name, ranks in PLAIN.items():
        where = f"{name} in the header"
        alpha = _number(where, metadata.get(name, ""))
        rank_name = next((key for key in ranks if key in metadata), "")
        rank = _number(f"{rank_name} in the header", metadata.get(rank_name, ""))
        if alpha is None:
            continue
        if name == KOHYA and alpha == 0:
            # kohya's way to say: as the rank.
            if rank is None:
                continue
            alpha = rank
        rank = None if rank is None else int(rank)
        found.append(Settings(where, rank, alpha, rank_stabilized=stabilized, of_some=name == KOHYA))
    return found


def is_stabilized(metadata: Mapping[str, str]) -> str:
    """Where a header says that its alphas are over the root of the rank; empty if nowhere.

    Raises:
        UserError: its options are no JSON object.
    """
    text = metadata.get(KOHYA_OPTIONS, "")
    options = {} if text in (*NO_NUMBER, "null") else parse_json(text, f"{KOHYA_OPTIONS} in the header")
    for where, place in (("", metadata), (f" of {KOHYA_OPTIONS}", options)):
        for name in STABILIZED:
            if str(place.get(name, "")).lower() in ("true", "1"):
                return f"{name}{where} in the header"
    return ""


def _number(where: str, text: str) -> float | None:
    if text in NO_NUMBER:
        return None
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {text!r}, expected a number")
    return number


def _of_component(where: str, content: dict[str, Any], component: str) -> dict[str, Any]:
    if "lora_alpha" in content or "r" in content:
        return content
    components = sorted({key.rpartition(".")[0] for key in content if key.endswith((".r", ".lora_alpha"))})
    if component not in components and len(components) != 1:
        raise UserError(f"{where}: has settings of {', '.join(components) or 'nothing'}, expected {component}'s")
    prefix = f"{component if component in components else components[0]}."
    return {key.removeprefix(prefix): value for key, value in content.items() if key.startswith(prefix)}


def of_sidecar(config: Path) -> Settings:
    """What an adapter_config.json says.

    Raises:
        UserError: it is none of PEFT's for LoRA.
    """
    return _of_peft(str(config), read_json(config))


def _of_peft(where: str, content: dict[str, Any]) -> Settings:
    expected = f"{where}: expected PEFT's settings of a LoRA"
    if content.get("peft_type", "LORA") != "LORA":
        raise UserError(expected)
    if content.get("use_dora"):
        raise UserError(f"{where}: is a DoRA (use_dora), which is not read: expected a LoRA")
    rank: Any = content.get("r")
    alpha: Any = content.get("lora_alpha")
    ranks, alphas = content.get("rank_pattern") or {}, content.get("alpha_pattern") or {}
    targets = content.get("target_modules")
    try:
        numbers = [rank, alpha, *ranks.values(), *alphas.values()]
        for key in (*ranks, *alphas, *([targets] if isinstance(targets, str) else ())):
            re.compile(key)
    except (AttributeError, TypeError, re.error) as error:
        raise UserError(f"{expected}: rank_pattern and alpha_pattern by name of layer ({error})") from None
    whole = all(type(x) is int and x > 0 for x in (rank, *ranks.values()))
    if not whole or not all(type(x) in (int, float) and math.isfinite(x) for x in numbers):
        raise UserError(f"{expected}: r={rank!r}, lora_alpha={alpha!r}, expected numbers")
    if not isinstance(targets, str | list | None):
        raise UserError(f"{expected}: target_modules is {type(targets).__name__}, expected names")
    return Settings(where, rank, float(alpha), ranks, alphas, bool(content.get("use_rslora")), targets)
