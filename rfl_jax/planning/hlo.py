"""Reading a compiled program's text: what it sends between devices, loops counted as often as they run."""

import dataclasses
import re
from collections.abc import Mapping

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_SHAPE = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\]")
_CALLED = re.compile(r"\b(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LIMIT = re.compile(r"^ROOT .* compare\(%[\w.\-]+, %([\w.\-]+)\), direction=LT")
_OPCODE = re.compile(r"\s([a-z][a-z\-]*)\(")


@dataclasses.dataclass
class Traffic:
    """What one kind of collective does in one run of a program.

    Attributes:
        count: how often it runs.
        bytes: of its results on one device, all runs together.
    """

    count: int = 0
    bytes: int = 0


def _bytes_of(text: str) -> int:
    total = 0
    for kind, dims in _SHAPE.findall(text):
        digits = re.sub(r"\D", "", kind)
        bits = _BITS.get(kind) or (int(digits) if digits else 0)
        size = 1
        for d in filter(None, dims.split(",")):
            size *= int(d)
        total += size * bits // 8
    return total


def instructions(text: str) -> Mapping[str, list[str]]:
    """Lines of each computation; the program's own under "ENTRY"."""
    found: dict[str, list[str]] = {}
    current: list[str] | None = None
    for line in text.splitlines():
        if head := _COMPUTATION.match(line):
            current = found.setdefault("ENTRY" if head[1] else head[2], [])
        elif line == "}":
            current = None
        elif current is not None:
            current.append(line.strip())
    return found


def _rounds(line: str, computations: Mapping[str, list[str]]) -> int:
    """How often a loop runs: as it says itself, or by the constant that its condition compares the counter with, which
    starts at 0; 1 if neither tells.
    """
    if trips := _TRIPS.search(line):
        return int(trips[1])
    condition = _CONDITION.search(line)
    lines = computations.get(condition[1], []) if condition else []
    limit = next((found[1] for x in lines if (found := _LIMIT.search(x))), None)
    for x in lines:
        if limit and (constant := re.match(rf"%{re.escape(limit)} = s32\[\]\S* constant\((\d+)\)", x)):
            return int(constant[1])
    return 1


def collectives(text: str) -> dict[str, Traffic]:
    """Traffic by kind of collective, of one device's run of the whole program.

    Args:
        text: `compiled.as_text()`. A loop whose number of rounds it does not tell counts once.
    """
    computations = instructions(text)
    total = {kind: Traffic() for kind in COLLECTIVES}

    def walk(name: str, times: int) -> None:
        for line in computations.get(name, ()):
            _, _, right = line.partition(" = ")
            opcode = _OPCODE.search(right)
            kind = opcode[1].removesuffix("-start") if opcode else ""
            if kind in total:
                shape = right[: right.find(f" {opcode[1]}(")] if opcode else ""
                size = _bytes_of(shape)
                # An asynchronous start's result holds its operand as well.
                if opcode and opcode[1].endswith("-start"):
                    size = size if kind == "all-reduce" else max(_bytes_of(s) for s in shape.split("], "))
                total[kind].count += times
                total[kind].bytes += times * size
            rounds = _rounds(line, computations) if " while(" in line else 1
            called = _CALLED.findall(line)
            if branches := _BRANCHES.search(line):
                called += [b.strip().lstrip("%") for b in branches[1].split(",")]
            for other in dict.fromkeys(called):
                walk(other, times * rounds)

    walk("ENTRY", 1)
    return {kind: traffic for kind, traffic in total.items() if traffic.count}
