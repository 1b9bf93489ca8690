"""Where a step's time goes: the profiler's trace of some steps, divided by the phases that operators are named after."""

import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
from jax.profiler import ProfileData

from rfl_jax.config import Config
from rfl_jax.files import is_remote, write_whole
from rfl_jax.hosts import Compiled, is_writer
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.phases import OTHER, PHASES, phase_of
from rfl_jax.training.progress import Progress
from rfl_jax.training.update import Update

# Operators whose time is that of the operators they hold.
_CONTROL = ("while", "conditional", "call", "async")
_OPERATOR = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)


def phases_of(texts: Iterable[str]) -> dict[tuple[str, str], str]:
    """The phase of each named operator, by module and operator."""
    found = {}
    for text in texts:
        module = re.search(r"HloModule ([\w.\-]+)", text)
        for operator, name in _OPERATOR.findall(text):
            found[module[1] if module else "", operator] = phase_of(name) or OTHER
    return found


@runtime_checkable
class Trace(Protocol):
    """What is read of a `jax.profiler.ProfileData`: planes of lines of events."""

    @property
    def planes(self) -> Iterable[Any]: ...


def _operators(trace: Trace) -> Iterator[list[tuple[int, int, str, str]]]:
    """The operators of each line of a trace: start and end in ns, module, name. Those of accelerators, if it has any."""
    planes = list(trace.planes)
    devices = [
        plane
        for plane in planes
        # libtpu lists a plane without lines where there is no TPU.
        if plane.name.startswith("/device:") and "CPU" not in plane.name and any(True for _ in plane.lines)
    ]
    for plane in devices or planes:
        for line in plane.lines:
            operators = []
            for event in line.events:
                stats = dict(event.stats)
                name = stats.get("hlo_op")
                if name is None and "TPU" in plane.name and line.name == "XLA Ops":
                    name = event.name
                if name is not None:
                    start = int(event.start_ns)
                    operator = str(name).split(" = ")[0].lstrip("%")
                    operators.append(
                        (start, start + int(event.duration_ns), str(stats.get("hlo_module", "")), operator)
                    )
            if operators:
                yield operators


def self_times(operators: list[tuple[int, int, str, str]]) -> list[tuple[str, str, int]]:
    """Module, name and time in ns of each operator of a line, without that of the operators inside it."""
    found, open_ = [], []

    def close(until: int) -> None:
        while open_ and open_[-1][1] <= until:
            start, end, module, name, inner = open_.pop()
            found.append((module, name, end - start - inner))
            if open_:
                open_[-1][4] += end - start

    for start, end, module, name in sorted(operators, key=lambda o: (o[0], -o[1])):
        close(start)
        open_.append([start, end, module, name, 0])
    close(1 << 63)
    return found


def shares(traces: Iterable[Trace], phases: dict[tuple[str, str], str]) -> dict[str, float]:
    """Share of each phase in the operators' time, in the order of `PHASES`, then the rest."""
    modules = {module for module, _ in phases}
    busy: dict[str, float] = {}
    for trace in traces:
        for operators in _operators(trace):
            for module, name, time in self_times(operators):
                if name.startswith(_CONTROL):
                    continue
                # Not every device tells the module; then the name decides.
                known = [module] if module in modules else sorted(modules) if not module else []
                phase = next((phases[m, name] for m in known if (m, name) in phases), OTHER)
                busy[phase] = busy.get(phase, 0) + time
    total = sum(busy.values())
    return {phase: busy[phase] / total for phase in (*PHASES, OTHER) if busy.get(phase)}


class Profiler:
    """Traces the steps that `profile.steps` names and writes profile.json.

    Args:
        cfg: of the run.
        folder: of the run; the trace itself goes to its profile/, for TensorBoard or xprof.
        update: whose programs, `Compiled`, are traced.
        note: shows a line.
    """

    def __init__(self, cfg: Config, folder: RunFolder, update: Update, note: Callable[[str], None]) -> None:
        self._steps = cfg.profile.steps
        self._folder = folder
        self._programs = [program for program in (update.step, update.prefix) if isinstance(program, Compiled)]
        self._note = note
        self._local: Path | None = None
        self._lines: list[dict[str, Any]] = []

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends a trace that an interruption left open."""
        if self._local is not None:
            jax.profiler.stop_trace()
            shutil.rmtree(self._local)
            self._local = None

    def before(self, step: int) -> None:
        """Begins the trace if this is the first step of it. The program is compiled by then, unless it is step 1."""
        if self._steps and step == self._steps[0]:
            self._local = Path(tempfile.mkdtemp())
            jax.profiler.start_trace(str(self._local))

    def after(self, progress: Progress, line: dict[str, Any], *, stopping: bool) -> dict[str, Any]:
        """Takes a step's metrics; after the last traced step writes profile.json."""
        del stopping
        if self._local is not None and self._steps:
            self._lines.append(line)
            if progress.step >= self._steps[1]:
                jax.profiler.stop_trace()
                local, self._local = self._local, None
                self._finish(local, self._steps)
                shutil.rmtree(local)
        return {}

    def _finish(self, local: Path, steps: tuple[int, int]) -> None:
        found = shares(
            (ProfileData.from_file(str(file)) for file in sorted(local.rglob("*.xplane.pb"))),
            phases_of(text for program in self._programs for text in program.texts()),
        )
        seconds = sum(line["step_time_s"] for line in self._lines) / len(self._lines)
        mfu = [line["mfu"] for line in self._lines if line["mfu"] is not None]
        phases = {phase: share * seconds for phase, share in found.items()}
        result = {
            "steps": list(steps),
            "step_time_s": seconds,
            "mfu": sum(mfu) / len(mfu) if mfu else None,
            "phases": phases,
        }
        if is_writer():
            self._keep(local)
            write_whole(self._folder.profile, json.dumps(result, indent=1) + "\n")
        times = "  ".join(f"{phase} {seconds:.2f} s" for phase, seconds in phases.items())
        self._note(f"steps {steps[0]}-{steps[1]}: {times}")

    def _keep(self, local: Path) -> None:
        target = self._folder.trace
        if not is_remote(target):
            shutil.copytree(local, target, dirs_exist_ok=True)
            return
        for file in (f for f in local.rglob("*") if f.is_file()):
            write_whole(target / str(file.relative_to(local)), file.read_bytes())
