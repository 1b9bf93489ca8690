"""How long a compiled step will take, by phase: what the TPU compiler reckons with, kernels as measured, links as they are.

The compiler writes its estimate of the cycles into most operators of a scheduled program. To what it leaves open:

* Attention kernels take the cycles of their scheduled instructions (`KERNELS`), by the size of their grid.
* Collectives take their bytes over the links that the slice has. What runs beside other work, collectives and copies, is waited
  for only where it takes longer than the work between its start and its end; all collectives share the links, all copies the
  memory.
* Other operators take the bytes that they read and write over the memory's bandwidth.

Nothing else is in it: no stalls, no start of programs, no host. It is what a step takes where the compiler is right.
"""

import dataclasses
import functools
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from typing import Any, NamedTuple

from rfl_jax.chips import GIB, Chip, chip_of
from rfl_jax.errors import UserError
from rfl_jax.models.attention import tiles_for
from rfl_jax.models.flash import LANES, Tiles
from rfl_jax.planning.hlo import Instruction, Program, bytes_of, dimensions, elements, group
from rfl_jax.planning.links import Links
from rfl_jax.sampling.phases import OTHER, PHASES, phase_of

PASSES = ("forward", "recomputed", "backward")
KINDS = {
    "products": "matrix products and convolutions",
    "attention": "attention kernels",
    "collectives": "waiting for collectives",
    "copies": "copies and changes of layout",
    "other": "other operators",
}


class KernelCycles(NamedTuple):
    """What attention takes.

    Attributes:
        forward: cycles of one core for a tile of queries, a tile of keys and a head 128 wide.
        backward: the same of the backward pass.
        cores: that share the heads of a call.
    """

    forward: float
    backward: float
    cores: int


# By kind of device and tiles: python -m benchmarks.attention_tiles --topology=NAME --tiles=1024x1024x512, the cycles over the 19 x
# 19 pairs of tiles of 18,900 tokens and the heads; --tiles=1024x2048x512 over the 74 x 37 of 75,600 tokens, of which 32,760 take
# 2 to 4 % more. The prompt's 512 keys, in tiles of half the size, take half of it within 10 %.
KERNELS: dict[tuple[str, Tiles], KernelCycles] = {
    ("TPU v5 lite", Tiles(1024, 1024, 512)): KernelCycles(4950, 9760, 1),
    ("TPU v5", Tiles(1024, 1024, 512)): KernelCycles(5080, 10340, 2),
    ("TPU v6 lite", Tiles(1024, 1024, 512)): KernelCycles(3230, 5360, 1),
    ("TPU v5 lite", Tiles(1024, 2048, 512)): KernelCycles(9370, 18810, 1),
    ("TPU v5", Tiles(1024, 2048, 512)): KernelCycles(9620, 19410, 2),
    ("TPU v6 lite", Tiles(1024, 2048, 512)): KernelCycles(5910, 9830, 1),
}

# Operators that are no work of their own.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "opt-barrier"),
    *("partition-id", "replica-id", "iota"),
}
_COPYING = {
    *("copy", "transpose", "reshape", "reverse", "broadcast", "convert", "concatenate", "pad"),
    *("slice", "dynamic-slice", "dynamic-update-slice"),
}
_HOST = re.compile(r"\bS\(5\)")


class Part(NamedTuple):
    """What time is told apart by: phase (`PHASES`, "other"), pass (`PASSES`) and kind (`KINDS`)."""

    phase: str
    passed: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Share:
    """The seconds of one part, whose fields it has."""

    phase: str
    passed: str
    kind: str
    seconds: float


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The time of one update, in seconds.

    Attributes:
        seconds: all of it.
        phases: by phase and pass.
        kinds: by kind of operator.
        largest: the three parts that take most.
        mfu: the operations that the update needs over what the devices could do meanwhile.
        hidden: of collectives and copies that run beside other work.
        notes: what is not in it, or not known.
    """

    seconds: float
    phases: dict[str, dict[str, float]]
    kinds: dict[str, float]
    largest: list[Share]
    mfu: float
    hidden: float
    notes: list[str]


@dataclasses.dataclass
class Run:
    """What one run of a computation takes.

    Attributes:
        seconds: all of it.
        parts: seconds by part.
        hidden: seconds of what ran beside it.
        host: bytes to and from the host's memory.
    """

    seconds: float = 0.0
    parts: defaultdict[Part, float] = dataclasses.field(default_factory=lambda: defaultdict(float))
    hidden: float = 0.0
    host: int = 0

    def work(self, part: Part, seconds: float) -> None:
        self.seconds += seconds
        self.parts[part] += seconds

    def add(self, other: "Run", times: int = 1) -> None:
        self.seconds += times * other.seconds
        for part, seconds in other.parts.items():
            self.parts[part] += times * seconds
        self.hidden += times * other.hidden
        self.host += times * other.host


class Predictor:
    """Times one program.

    Args:
        program: as compiled for TPU, scheduled.
        links: of the slice.
        chip: the devices'; its clock is known.
        kind: the devices' kind as jax names it.
    """

    def __init__(self, program: Program, links: Links, chip: Chip, kind: str) -> None:
        assert chip.clock is not None
        self._program = program
        self._links = links
        self._chip = chip
        self._clock = chip.clock
        self._kind = kind
        self.notes: dict[str, None] = {}
        self._cached = functools.cache(self._computation)

    def run(self) -> Run:
        """The whole program."""
        return self._cached("ENTRY", (OTHER, "forward"))

    def _computation(self, name: str, inherited: tuple[str, str]) -> Run:
        """One run of a computation.

        Args:
            name: its name.
            inherited: phase and pass of operators that name none.
        """
        run = Run()
        # When the links and the memory are free again, and when what was started ends.
        free = {"collectives": 0.0, "copies": 0.0}
        flying: dict[str, tuple[str, float, float]] = {}
        for instruction in self._program.computations[name]:
            where = _where(instruction, inherited)
            started, ended = self._started(instruction), self._ended(instruction)
            if started is not None:
                key, kind, seconds = started
                begin = max(run.seconds, free[kind])
                free[kind] = begin + seconds
                flying[key] = kind, seconds, begin + seconds
                run.host += _host_bytes(instruction)
            elif ended is not None:
                kind, seconds, end = flying.pop(ended, ("copies", 0.0, 0.0))
                waited = max(0.0, end - run.seconds)
                run.hidden += max(0.0, seconds - waited)
                run.work(Part(*where, kind), waited)
            elif instruction.opcode in ("while", "call", "conditional"):
                self._control(run, instruction, where)
            elif instruction.opcode not in _FREE or instruction.cycles is not None:
                kind, seconds = self._operator(instruction)
                if kind == "collectives":
                    # The links may still be busy with what was started before.
                    seconds += max(0.0, free[kind] - run.seconds)
                    free[kind] = run.seconds + seconds
                run.work(Part(*where, kind), seconds)
        return run

    def _control(self, run: Run, instruction: Instruction, where: tuple[str, str]) -> None:
        called = [self._cached(name, where) for name in instruction.called if name in self._program.computations]
        if instruction.opcode == "conditional":
            # One branch is taken.
            called = [max(called, key=lambda branch: branch.seconds)]
        times = 1
        if instruction.opcode == "while":
            rounds = self._program.rounds(instruction)
            if rounds is None:
                self.notes[f"a loop of {where[0]} whose rounds are not known counts once"] = None
            times = 1 if rounds is None else rounds
        for other in called:
            run.add(other, times)

    def _started(self, instruction: Instruction) -> tuple[str, str, float] | None:
        """Of what goes on beside others: the key by which its end is found, its kind, its seconds."""
        begun = self._program.begun(instruction)
        if instruction.opcode == "fusion":
            chains = [c for c in begun if c.chain is not None]
            return (f"chain {chains[0].chain}", "collectives", self._sent(chains)) if chains else None
        if not instruction.opcode.endswith("-start"):
            return None
        if begun:
            return instruction.name, "collectives", self._sent(begun)
        if _host_bytes(instruction):
            # Over a link whose speed is not known.
            return instruction.name, "copies", 0.0
        return instruction.name, "copies", _moved(instruction) / self._chip.bandwidth

    def _ended(self, instruction: Instruction) -> str | None:
        if instruction.opcode.endswith("-done"):
            return self._origin(instruction.operands[0])
        if instruction.opcode == "fusion":
            held = list(self._program.held(instruction))
            if any(i.target == "AsyncCollectiveDone" for i in held):
                return next((f"chain {i.chain}" for i in held if i.chain is not None), None)
        return None

    def _origin(self, name: str) -> str:
        """The start that an end belongs to: between them may stand updates, which name each other."""
        instruction = self._program.named[name]
        return self._origin(instruction.operands[0]) if instruction.opcode.endswith("-update") else name

    def _operator(self, instruction: Instruction) -> tuple[str, float]:
        """Kind and seconds of what nothing runs beside."""
        begun = self._program.begun(instruction)
        if begun:
            # A fusion may work on what it has exchanged.
            return "collectives", self._sent(begun) + (instruction.cycles or 0) / self._clock
        if instruction.target == "tpu_custom_call":
            return self._kernel(instruction)
        kind = self._kind_of(instruction)
        if instruction.cycles is not None:
            return kind, instruction.cycles / self._clock
        if instruction.opcode == "custom-call" or instruction.opcode.endswith("-update"):
            return kind, 0.0  # annotations, room for results, and what goes on by itself
        operators = {instruction.opcode, *(i.opcode for i in self._program.held(instruction))}
        if operators & {"gather", "scatter"}:
            self.notes["the compiler reckons nothing for gathers and scatters: their bytes alone are in it"] = None
        return kind, self._touched(instruction) / self._chip.bandwidth

    def _kind_of(self, instruction: Instruction) -> str:
        operators = {i.opcode for i in (instruction, *self._program.held(instruction))} - _FREE - {"fusion"}
        if operators & {"convolution", "dot"}:
            return "products"
        return "copies" if operators <= _COPYING else "other"

    def _sent(self, collectives: Sequence[Instruction]) -> float:
        return sum(self._links.seconds(c.collective or "", c.sent, group(c.attributes)) for c in collectives)

    def _touched(self, instruction: Instruction) -> int:
        """Bytes of a device's large memory that an operator reads and writes."""
        operands = [self._program.named[name].shape for name in instruction.operands]
        if instruction.opcode == "dynamic-update-slice":
            return 2 * bytes_of(operands[1], device=True)  # in place
        return sum(bytes_of(shape, device=True) for shape in (instruction.shape, *operands))

    def _kernel(self, instruction: Instruction) -> tuple[str, float]:
        """Of a kernel of `rfl_jax.models.flash`: its queries and keys are its first operands."""
        found = re.search(r"flash_(forward|backward)", f"{instruction.name} {instruction.op_name}")
        if found is None:
            self.notes[f"kernel {instruction.name} is not known: its reading and writing alone is in it"] = None
            return "other", self._touched(instruction) / self._chip.bandwidth
        (heads, queries, width), (_, keys, _) = (
            dimensions(self._program.named[name].shape) for name in instruction.operands[:2]
        )
        tiles = tiles_for(keys)
        measured = KERNELS.get((self._kind, tiles))
        if measured is None:
            self.notes["attention kernels were not measured for these devices: taken at the peak of arithmetic"] = None
            operations = {"forward": 4, "backward": 10}[found[1]] * heads * queries * keys * width
            return "attention", operations / self._chip.flops
        pairs = queries * keys / (tiles.queries * tiles.keys) * width / LANES
        cycles = measured.forward if found[1] == "forward" else measured.backward
        return "attention", math.ceil(heads / measured.cores) * pairs * cycles / self._clock


def _where(instruction: Instruction, inherited: tuple[str, str]) -> tuple[str, str]:
    """Phase and pass of an operator. Recomputation is part of the backward pass, and its name has both."""
    name = instruction.op_name
    phase = phase_of(name)
    if "rematted_computation" in name:
        passed = "recomputed"
    elif "transpose(jvp" in name:
        passed = "backward"
    else:
        passed = "forward" if phase else inherited[1]
    return phase or inherited[0], passed


def _host_bytes(instruction: Instruction) -> int:
    """Bytes that an asynchronous copy moves to or from the host's memory."""
    return _given(instruction) if _HOST.search(instruction.shape) else 0


def _given(instruction: Instruction) -> int:
    """Bytes of what an asynchronous copy gives."""
    first, second = elements(instruction.shape)[:2]
    # A copy's start tells its result first, others their operands before it.
    return bytes_of(second if first.startswith("(") else first)


def _moved(instruction: Instruction) -> int:
    """Bytes of a device's large memory that an asynchronous copy reads and writes."""
    if instruction.opcode == "copy-start":
        return bytes_of(instruction.shape, device=True)
    return _given(instruction)  # of what it takes, a slice reads as much


def check_predictable(topology: str, devices: Sequence[Any]) -> None:
    """Raises UserError where nothing can be predicted of the devices of a topology."""
    chip = chip_of(devices[0])
    if devices[0].platform != "tpu" or chip is None or chip.clock is None:
        raise UserError(f"--predict: {topology}: expected a slice of v5e, v5p or v6e, whose clocks are known")


def predict(programs: Sequence[Program], links: Links, chip: Chip, kind: str, *, operations: float) -> Prediction:
    """The time of an update that runs these programs one after another.

    Args:
        programs: as compiled for TPU.
        links: of the slice.
        chip: the devices'; its clock is known.
        kind: the devices' kind as jax names it.
        operations: that the update needs of each device.
    """
    total, notes = Run(), {}
    for program in programs:
        predictor = Predictor(program, links, chip, kind)
        total.add(predictor.run())
        notes |= predictor.notes
    if total.host:
        notes[f"{total.host / GIB:.1f} GiB to and from host memory are taken as hidden"] = None
    phases: dict[str, dict[str, float]] = {}
    for phase in (*PHASES, OTHER):
        for passed in PASSES:
            seconds = sum(s for part, s in total.parts.items() if (part.phase, part.passed) == (phase, passed))
            if seconds:
                phases.setdefault(phase, {})[passed] = seconds
    return Prediction(
        seconds=total.seconds,
        phases=phases,
        kinds={kind: sum((s for part, s in total.parts.items() if part.kind == kind), 0.0) for kind in KINDS},
        largest=[Share(*part, seconds) for part, seconds in sorted(total.parts.items(), key=lambda p: -p[1])[:3]],
        mfu=operations / chip.flops / total.seconds,
        hidden=total.hidden,
        notes=list(notes),
    )
