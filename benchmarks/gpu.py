"""What a GPU makes of attention, a layer, the decoder and the whole training step, beside PyTorch on the same GPU.

`python -m benchmarks.gpu --minutes=8 --out=DIR` writes DIR/gpu.md and DIR/gpu.json anew after every figure: whoever ends it
loses nothing. Each side measures each part in a process of its own. Where memory or time is too short for all layers of a DiT,
fewer are measured, and the table tells what all would take. What fails is a line of the table, and DIR/gpu.log has its traceback.
Weights are random. On a CPU all sizes are small, and PyTorch is left out. Exit status 1: attention is wrong.
"""

import argparse
import dataclasses
import json
import os
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.gpu_parts import MARK, PARTS, SIDES, Job, Record
from benchmarks.torch_step import GIB, spread
from rfl_jax.errors import ArgumentParser, RunError, UserError, did_you_mean, refuse_in_one_line

ROOT = Path(__file__).parents[1]
BOUND = 2e-2  # of attention's relative errors in bfloat16
KERNELS = ("auto", "xla", "flash", "cudnn")  # as the configuration names them
PATIENCE = 3  # a process is ended after so many times its estimate
COLUMNS = (
    "part", "what", "ours, s", "first run, s", "TFLOP/s", "of peak", "memory, GiB", "error", "PyTorch, s",
    "PyTorch / ours", "its memory, GiB", "notes",
)  # fmt: skip
# A process has almost all of the device's memory.
ENVIRONMENT = {"XLA_CLIENT_MEM_FRACTION": "0.95", "PYTORCH_ALLOC_CONF": "expandable_segments:True"}
# Small programs are compiled for longer than they run.
QUICK = " --xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"


@dataclasses.dataclass
class Results:
    """What is known.

    Attributes:
        out: folder of the tables.
        about: the machine, by side.
        rows: records by part and case, then by side.
    """

    out: Path
    about: dict[str, Record]
    rows: dict[tuple[str, str], dict[str, Record]] = dataclasses.field(default_factory=dict)

    def add(self, name: str, side: str, record: Record) -> None:
        """Completes what is known of a case, whose first failure stays, and writes the tables."""
        sides = self.rows.setdefault((name, record["case"]), {})
        sides[side] = {**record, **sides.get(side, {})}
        listed = [{"part": name, **sides} for (name, _), sides in self.rows.items()]
        texts = {"gpu.md": self.page(), "gpu.json": json.dumps({"about": self.about, "rows": listed}, indent=1)}
        for file, text in texts.items():
            unfinished = self.out / f".{file}.tmp"
            unfinished.write_text(text + "\n")
            unfinished.replace(self.out / file)
        print(f"{name}, {side}: {record['case']} {record.get('failed', '')}", file=sys.stderr)

    def forget(self, name: str, side: str) -> None:
        """Drops a side's records of a part."""
        for key in [key for key in self.rows if key[0] == name]:
            self.rows[key].pop(side, None)
            if not self.rows[key]:
                del self.rows[key]

    def page(self) -> str:
        """The table."""
        said = {k: x.get("failed") or f"{x['device']}, {x['versions']}" for k, x in self.about.items()}
        lines = [f"Ours: {said['ours']}. PyTorch: {said['torch']}.", ""]
        lines += ["Median (least to most) of the runs. Weights are random, made on the device.", ""]
        rows = [COLUMNS, ["---"] * len(COLUMNS), *(_cells(self.about, *key, of) for key, of in self.rows.items())]
        return "\n".join(
            lines + [f"| {' | '.join(' '.join(c.replace('|', '/').split()) for c in row)} |" for row in rows]
        )


def _cells(about: dict[str, Record], part: str, case: str, sides: dict[str, Record]) -> Iterator[str]:
    ours, torch = (sides.get(side, {}) for side in SIDES)
    seconds = {side: statistics.median(record["seconds"]) for side, record in sides.items() if "seconds" in record}
    rate = ours["flops"] / seconds["ours"] if "flops" in ours and "ours" in seconds else None
    peak = about["ours"].get("flops")
    yield from (part, case)
    yield spread(ours["seconds"]) if "ours" in seconds else ""
    yield f"{ours['first_s']:.3g}" if "ours" in seconds else ""
    yield f"{rate / 1e12:.3g}" if rate else ""
    yield f"{rate / peak:.1%}" if rate and peak else ""
    yield _memory(ours)
    yield f"{ours['error']:.1e}" if "error" in ours else ""
    yield spread(torch["seconds"]) if "torch" in seconds else about["torch"].get("failed", "")
    yield _ratio(part, ours, torch) if len(seconds) == 2 else ""
    yield _memory(torch)
    yield "; ".join([*_notes("", part, ours), *_notes("PyTorch: ", part, torch)])


def _ratio(part: str, ours: Record, torch: Record) -> str:
    """PyTorch's time over ours with as many layers on both sides: as measured, else all, if that is known of both."""
    if ours.get("layers") == torch.get("layers"):
        return f"{statistics.median(torch['seconds']) / statistics.median(ours['seconds']):.2f}"
    if any("layers" in record and "rest_s" not in record for record in (ours, torch)):
        return ""
    return f"{_with_all_layers(part, torch) / _with_all_layers(part, ours):.2f}"


def _with_all_layers(part: str, record: Record) -> float:
    """The median, scaled to all layers but for what they have no share in; as long as that is not known, nothing."""
    seconds, rest = statistics.median(record["seconds"]), record.get("rest_s", 0.0)
    return rest + (seconds - rest) * PARTS[part].layers[0] / record["layers"] if "layers" in record else seconds


def _memory(record: Record) -> str:
    return f"{record['peak'] / GIB:.1f}" if record.get("peak") else ""


def _notes(who: str, part: str, record: Record) -> Iterator[str]:
    if "kernel" in record:
        yield record["kernel"]
    if record.get("exhausted"):
        yield f"{who}out of memory with {', '.join(map(str, record['exhausted']))} layers"
    if "layers" in record and "seconds" in record:
        seconds = _with_all_layers(part, record)
        most = "" if "rest_s" in record else "at most "
        yield f"{who}{record['layers']} layers, by which {PARTS[part].layers[0]} take {most}{seconds:.3g} s"
    if "phases" in record:
        yield ", ".join(f"{name} {seconds:.2g} s" for name, seconds in record["phases"].items())
    if "failed" in record:
        yield f"{who}{record['failed'][:200]}"


def ask(side: str, job: Job, limit_s: float, out: Path, flags: str = "") -> Iterator[Record]:
    """The records of a side's process as they come; of one that was ended the last one says so.

    Args:
        side: of `SIDES`.
        job: what it measures.
        limit_s: how long it may take.
        out: folder of the log of what processes complain about.
        flags: of XLA, besides the environment's.
    """
    command = [sys.executable, "-m", "benchmarks.gpu_parts", side, json.dumps(dataclasses.asdict(job))]
    environment = {**ENVIRONMENT, **os.environ, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + flags}
    with (out / "gpu.log").open("a") as log:
        print(f"{job.name}, {side}", file=log, flush=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment, cwd=ROOT)
    timer = threading.Timer(limit_s, process.kill)
    timer.start()
    try:
        for line in process.stdout or ():
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
        if process.wait():
            why = f"status {process.returncode}" if timer.is_alive() else f"its limit of {limit_s:.0f} s"
            yield {"case": "", "failed": f"ended by {why}"}
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def affordable(name: str, side: str, left_s: float, processes: int) -> Sequence[int]:
    """Layers to try, most first: those that are done in an equal share of the time, else the fewest if there is time.

    Args:
        name: of a part.
        side: of it.
        left_s: for all processes that are left.
        processes: so many.
    """
    layers = PARTS[name].layers
    within = [n for n in layers if estimate(name, side, n) <= left_s / processes]
    return within or [n for n in layers[-1:] if estimate(name, side, n) <= left_s]


def estimate(name: str, side: str, layers: int) -> float:
    """Seconds that a process may take."""
    fixed, of_layer = PARTS[name].seconds[side]
    return fixed + of_layer * layers


def out_of_memory(record: Record) -> bool:
    """Whether a device had no room, as XLA and PyTorch say it."""
    return bool(re.search("resource_exhausted|out.of.memory", record.get("failed", ""), re.IGNORECASE))


def measure(args: argparse.Namespace) -> Results:
    """Measures what there is time for.

    Raises:
        UserError: JAX finds no device.
    """
    deadline = time.monotonic() + 60 * args.minutes
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "gpu.log").unlink(missing_ok=True)
    about = {"ours": next(ask("ours", Job("about"), 60 * args.minutes, args.out))}
    if "failed" in about["ours"]:
        raise UserError(f"JAX finds no device ({about['ours']['failed']})")
    cpu = about["ours"]["platform"] == "cpu"
    about["torch"] = {"failed": "no GPU"} if cpu else next(ask("torch", Job("about"), 60 * args.minutes, args.out))
    results = Results(args.out, about)
    todo = [(name, side) for name in args.parts for side in SIDES if "failed" not in about[side]]
    for i, (name, side) in enumerate(todo):
        tries = affordable(name, side, deadline - time.monotonic(), len(todo) - i)
        if args.small or cpu:
            tries = [min(2, *PARTS[name].layers)] if tries else []
        if not tries:
            results.add(name, side, {"case": "", "failed": "left out for want of time"})
        for n, layers in enumerate(tries):
            limit = min(deadline - time.monotonic(), PATIENCE * estimate(name, side, layers))
            job = Job(name, args.small or cpu, layers, args.attention)
            fewer = {} if job.small or layers == PARTS[name].layers[0] else {"layers": layers, "exhausted": tries[:n]}
            exhausted = False
            for record in ask(side, job, limit, args.out, QUICK if cpu else ""):
                results.add(name, side, {**record, **fewer})
                exhausted = exhausted or out_of_memory(record)
            if not exhausted or layers == tries[-1]:
                break
            results.forget(name, side)
    return results


def arguments() -> argparse.Namespace:
    """The command line's."""
    parser = ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="that all may take (default: 8)")
    parser.add_argument("--parts", default=",".join(PARTS), help=f"in turn (default: {','.join(PARTS)})")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu"), help="folder of the tables (default: runs/gpu)")
    parser.add_argument("--attention", default="auto", choices=KERNELS, help="our kernel (default: auto)")
    parser.add_argument("--small", action="store_true", help="small sizes, as a CPU has them anyway")
    args = parser.parse_args()
    args.parts = args.parts.split(",")
    for name in args.parts:
        if name not in PARTS:
            raise UserError(f"--parts: {name}: expected of {','.join(PARTS)}{did_you_mean(name, PARTS)}")
    if not args.minutes > 0:
        raise UserError(f"--minutes: {args.minutes:g}: expected more than 0")
    return args


def main() -> None:
    args = arguments()
    results = measure(args)
    print(results.page())
    errors = [sides["ours"]["error"] for sides in results.rows.values() if "error" in sides.get("ours", {})]
    # Negated, so that what is not a number is refused too.
    if not all(error <= BOUND for error in errors):
        raise RunError(f"attention: expected errors up to {BOUND:.0e}, see {args.out / 'gpu.md'}")


if __name__ == "__main__":
    with refuse_in_one_line("gpu"):
        main()
