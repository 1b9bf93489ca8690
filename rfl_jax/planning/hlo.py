"""Reading a compiled program's text: its instructions, its loops, and what it sends between devices."""

import dataclasses
import math
import re
from collections.abc import Iterator

COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "f8e4m3fn": 8, "f8e5m2": 8}

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^(ROOT )?%?([\w.\-]+) = (.*)$")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_OPCODE = re.compile(r"\s*([a-z][a-z0-9\-]*)\(")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"\b(?:to_apply|calls|called_computation|body|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"?(\d+)')
_CONDITION = re.compile(r"\bcondition=%?([\w.\-]+)")
_LOWER = re.compile(r"\bdirection=LT\b")
# A space other than a device's own memory: S(1) is fast memory, S(5) the host's.
_ELSEWHERE = re.compile(r"\bS\([1-9]")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
        name: without its percent sign.
        shape: the result's type, as it stands there.
        opcode: what is done.
        operands: names of what it takes.
        argument: the text between its parentheses.
        attributes: the text after them.
        root: whether it is what its computation gives.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    argument: str
    attributes: str
    root: bool

    @property
    def op_name(self) -> str:
        """The scopes and the operation that it was traced from; empty where it does not tell."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def cycles(self) -> int | None:
        """What the TPU compiler estimates; None where it does not."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    @property
    def target(self) -> str:
        """Of a custom call."""
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def chain(self) -> str | None:
        """Of a collective that is spread over fusions: each of them holds a copy, with the same number."""
        found = re.search(r'\bchain_id="(\d+)"', self.attributes)
        return found[1] if found else None

    @property
    def collective(self) -> str | None:
        """Its kind of `COLLECTIVES`; of an asynchronous one its start has it, and its end none."""
        kind = self.opcode.removesuffix("-start")
        return kind if kind in COLLECTIVES else None

    @property
    def called(self) -> list[str]:
        """Computations that it runs, a loop's condition left out."""
        names = _CALLED.findall(self.attributes)
        if branches := _BRANCHES.search(self.attributes):
            names += [name.strip().lstrip("%") for name in branches[1].split(",")]
        return list(dict.fromkeys(names))

    @property
    def sent(self) -> int:
        """Bytes of a collective's result on one device."""
        # A start's result holds its operand as well.
        if self.opcode.endswith("-start") and self.collective != "all-reduce":
            return max((bytes_of(found[0]) for found in _ARRAY.finditer(self.shape)), default=0)
        return bytes_of(self.shape)


def bytes_of(shape: str, *, device: bool = False) -> int:
    """Bytes of a type's arrays.

    Args:
        shape: a type's text.
        device: count only what lies in a device's own large memory.
    """
    total = 0
    for kind, dims, layout in _ARRAY.findall(shape):
        if device and _ELSEWHERE.search(layout):
            continue
        digits = re.sub(r"\D", "", kind)
        bits = _BITS.get(kind) or (int(digits) if digits else 0)
        total += math.prod(int(d) for d in dims.split(",") if d) * bits // 8
    return total


def elements(shape: str) -> list[str]:
    """Of a tuple's type, the types in it."""
    found, depth, begin = [], 0, 1
    for place, letter in enumerate(shape):
        depth += (letter in "([{") - (letter in ")]}")
        if (letter == "," and depth == 1) or (place and depth == 0):
            found.append(shape[begin:place].strip())
            begin = place + 1
    return found


def dimensions(shape: str) -> tuple[int, ...]:
    """Of a type's first array."""
    found = _ARRAY.search(shape)
    return tuple(int(d) for d in found[2].split(",") if d) if found else ()


def group(attributes: str) -> tuple[int, ...] | None:
    """Devices that a collective's first group is of, by their place in the mesh; None: all of them.

    All groups are alike: the mesh is a grid.
    """
    if listed := _LISTED.search(attributes):
        return tuple(int(i) for i in listed[1].split(","))
    if (mesh := _MESH.search(attributes)) and ":" not in mesh[2]:  # parts of axes are written with a colon
        axes = [(name, int(size)) for name, size in re.findall(r"'([^']*)'=(\d+)", mesh[1])]
        along = re.findall(r"'([^']*)'", mesh[2])
        devices, stride = [0], 1
        for name, size in reversed(axes):
            if name in along:
                devices = [device + stride * i for i in range(size) for device in devices]
            stride *= size
        return tuple(sorted(devices))
    if iota := _IOTA.search(attributes):
        shape = [int(d) for d in iota[2].split(",")]
        order = [int(d) for d in iota[3].split(",")] if iota[3] else list(range(len(shape)))
        strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
        devices = [0]
        for axis in order:
            devices = [device + strides[axis] * i for device in devices for i in range(shape[axis])]
        return tuple(devices[: int(iota[1].split(",")[-1])])
    return None


class Program:
    """A program's computations by name, its own under "ENTRY", and their instructions by theirs (`named`).

    Args:
        text: `compiled.as_text()`.
    """

    def __init__(self, text: str) -> None:
        self.computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] | None = None
        for line in text.splitlines():
            if head := _COMPUTATION.match(line):
                current = self.computations.setdefault("ENTRY" if head[1] else head[2], [])
            elif line == "}":
                current = None
            elif current is not None and (found := _INSTRUCTION.match(line.strip())):
                current.append(_instruction(found[2], found[3], root=bool(found[1])))
        self.named = {instruction.name: instruction for body in self.computations.values() for instruction in body}

    def rounds(self, loop: Instruction) -> int | None:
        """How often a loop runs: as it says itself, or by the constant that its condition compares the counter with,
        which starts at 0; None if neither tells.
        """
        if trips := _TRIPS.search(loop.attributes):
            return int(trips[1])
        condition = _CONDITION.search(loop.attributes)
        body = self.computations.get(condition[1], []) if condition else []
        root = next((i for i in body if i.root), None)
        if root is None:
            return None
        # The comparison may stand in a fusion that is given the constant.
        compared = [root, *(i for name in root.called for i in self.computations.get(name, ()))]
        if not any(i.opcode == "compare" and _LOWER.search(i.attributes) for i in compared):
            return None
        limits = [int(i.argument) for i in body if i.opcode == "constant" and i.name in root.operands]
        return limits[0] if len(limits) == 1 else None

    def held(self, instruction: Instruction) -> Iterator[Instruction]:
        """The instructions that a fusion or an asynchronous start is made of."""
        if instruction.opcode in ("fusion", "async-start"):
            for name in instruction.called:
                for inner in self.computations.get(name, ()):
                    yield inner
                    yield from self.held(inner)

    def begun(self, instruction: Instruction) -> list[Instruction]:
        """The collectives that begin with an instruction. Of those spread over fusions, the first begins them."""
        if instruction.collective:
            return [instruction]
        held = list(self.held(instruction))
        first = any(i.target == "AsyncCollectiveStart" for i in held)
        return [i for i in held if i.collective and (first or i.chain is None)]


def _instruction(name: str, right: str, *, root: bool) -> Instruction:
    end = _closing(right, 0) + 1 if right.startswith("(") else len(right.partition(" ")[0])
    shape, rest = right[:end], right[end:]
    opcode = _OPCODE.match(rest)
    if opcode is None:
        return Instruction(name, shape, "", (), "", rest, root)
    close = _closing(rest, opcode.end() - 1)
    argument = rest[opcode.end() : close]
    operands = tuple(_NAME.findall(argument))
    return Instruction(name, shape, opcode[1], operands, argument, rest[close + 1 :], root)


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at `start` is closed."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, start):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.start()
    return len(text)


@dataclasses.dataclass
class Traffic:
    """What one kind of collective does in one run of a program.

    Attributes:
        count: how often it runs.
        bytes: of its results on one device, all runs together.
    """

    count: int = 0
    bytes: int = 0


def collectives(program: Program) -> dict[str, Traffic]:
    """Traffic by kind of collective, of one device's run of the whole program.

    Args:
        program: as compiled. A loop whose number of rounds it does not tell counts once.
    """
    total = {kind: Traffic() for kind in COLLECTIVES}

    def walk(name: str, times: int) -> None:
        for instruction in program.computations.get(name, ()):
            for begun in program.begun(instruction):
                traffic = total[begun.collective or ""]
                traffic.count += times
                traffic.bytes += times * begun.sent
            if instruction.opcode in ("while", "call", "conditional"):
                rounds = (program.rounds(instruction) or 1) if instruction.opcode == "while" else 1
                for called in instruction.called:
                    walk(called, times * rounds)

    walk("ENTRY", 1)
    return {kind: traffic for kind, traffic in total.items() if traffic.count}
