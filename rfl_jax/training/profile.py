"""Where a step's time goes: the profiler's trace of some steps, divided by the phases that operators are named after."""

import json
import re
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
from etils import epath
from jax.profiler import ProfileData

from rfl_jax.files import is_remote, write_whole
from rfl_jax.hosts import is_writer
from rfl_jax.sampling.rollout import PHASES

OTHER = "other"
# Operators whose time is that of the operators they hold.
_CONTROL = ("while", "conditional", "call", "async")
_PHASE = re.compile(r"rfl\.(" + "|".join(PHASES) + r")\b")
_OPERATOR = re.compile(r'^\s*(?:ROOT )?%?([\w.\-]+) = .*op_name="([^"]*)"', re.MULTILINE)


class Compiled:
    """A jitted function that keeps the text of the programs it became.

    Args:
        jitted: to be called as it would be.
    """

    def __init__(self, jitted: Any) -> None:
        self._jitted = jitted
        self._programs: dict[Any, Any] = {}

    def __call__(self, *args: Any) -> Any:
        leaves, structure = jax.tree.flatten(args)
        key = structure, tuple((leaf.shape, str(leaf.dtype)) for leaf in leaves)
        if key not in self._programs:
            self._programs[key] = self._jitted.lower(*args).compile()
        return self._programs[key](*args)

    def texts(self) -> list[str]:
        return [program.as_text() for program in self._programs.values()]


def phases_of(texts: Iterable[str]) -> dict[tuple[str, str], str]:
    """The phase of each named operator, by module and operator."""
    found = {}
    for text in texts:
        module = re.search(r"HloModule ([\w.\-]+)", text)
        for operator, name in _OPERATOR.findall(text):
            phase = _PHASE.search(name)
            found[module[1] if module else "", operator] = phase[1] if phase else OTHER
    return found


def _operators(trace: ProfileData) -> Iterator[list[tuple[int, int, str, str]]]:
    """Of each line of a trace its operators: start and end in ns, module, name. Of accelerators if it has any."""
    planes = list(trace.planes)
    devices = [plane for plane in planes if plane.name.startswith("/device:") and "CPU" not in plane.name]
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


def shares(traces: Iterable[ProfileData], phases: dict[tuple[str, str], str]) -> dict[str, float]:
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
        steps: first and last; None for none.
        workdir: of the run; the trace itself goes to its profile/, for TensorBoard or xprof.
        programs: of the step.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: epath.Path, programs: list[Compiled]) -> None:
        self._steps = steps
        self._workdir = workdir
        self._programs = programs
        self._local: Path | None = None
        self._figures: list[dict[str, Any]] = []

    def before(self, step: int) -> None:
        """Begins the trace if this is the first step of it. The program is compiled by then, unless it is step 1."""
        if self._steps and step == self._steps[0]:
            self._local = Path(tempfile.mkdtemp())
            jax.profiler.start_trace(str(self._local))

    def after(self, step: int, figures: dict[str, Any]) -> dict[str, Any] | None:
        """Takes a step's figures; after the last traced step returns what profile.json says."""
        if self._local is None or not self._steps:
            return None
        self._figures.append(figures)
        if step < self._steps[1]:
            return None
        jax.profiler.stop_trace()
        local, self._local = self._local, None
        files = sorted(local.rglob("*.xplane.pb"))
        found = shares(
            (ProfileData.from_file(str(file)) for file in files),
            phases_of(text for program in self._programs for text in program.texts()),
        )
        seconds = sum(f["step_time_s"] for f in self._figures) / len(self._figures)
        mfu = [f["mfu"] for f in self._figures if f["mfu"] is not None]
        result = {
            "steps": list(self._steps),
            "step_time_s": seconds,
            "mfu": sum(mfu) / len(mfu) if mfu else None,
            "phases": {phase: share * seconds for phase, share in found.items()},
        }
        if is_writer():
            self._keep(local)
            write_whole(self._workdir / "profile.json", json.dumps(result, indent=1) + "\n")
        shutil.rmtree(local)
        return result

    def _keep(self, local: Path) -> None:
        target = self._workdir / "profile"
        if not is_remote(self._workdir):
            shutil.copytree(local, target, dirs_exist_ok=True)
            return
        for file in (f for f in local.rglob("*") if f.is_file()):
            write_whole(target / str(file.relative_to(local)), file.read_bytes())

    def close(self) -> None:
        """Ends a trace that an interruption left open."""
        if self._local is not None:
            jax.profiler.stop_trace()
            shutil.rmtree(self._local)
            self._local = None
