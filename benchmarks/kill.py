"""Kills miniature runs at random moments, starts them again by the same command until they end, and compares each with a
run that nobody disturbed.

`python -m benchmarks.kill --times=100 --seed=0 --dir=DIR` prints a line for every kill and at the end one for
`benchmarks/RESULTS.md`. The same command goes on with the kills that are still to be done. What has to be equal to the last
bit: metrics.jsonl without its times, validation.json, evaluation.json, exported adapters, and the arrays of all checkpoints
that are kept. Exit status 1: a run was lost, and lies in DIR.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rfl_jax.chips import answer_libtpu
from rfl_jax.miniature.data import draw_clips

ROOT = Path(__file__).parents[1]
STEPS, SAVE_EVERY, EVAL_EVERY = 6, 3, 2
SETTINGS = (
    "--config=configs/mini.py", "--config.data.num_frames=5", "--config.train_batch_size=1", "--config.per_device_train_batch_size=1",
    "--config.num_inference_steps=4", "--config.mid_timestep=2", "--config.final_timestep=3", f"--config.max_steps={STEPS}",
    f"--config.save_steps={SAVE_EVERY}", f"--config.eval_every={EVAL_EVERY}", "--config.sample_every=3", "--config.warmup_steps=0",
)  # fmt: skip
CLIPS = {"train": (4, 5), "held_out": (2, 6)}  # clips and seed
CLOCK = ("step_time_s", "mfu")  # of metrics.jsonl
# What follows a moment at which a kill is aimed is over within so many seconds.
SOON_S = 0.3
POLL_S = 0.02


@dataclasses.dataclass(frozen=True)
class Aim:
    """A moment to kill at.

    Attributes:
        name: for the report.
        begun: whether it has come, asked of the workdir again and again; None: when the process starts.
        within_s: the kill comes so many seconds after it at most, uniformly.
    """

    name: str
    begun: Callable[[Path], bool] | None
    within_s: float


def steps_done(workdir: Path) -> int:
    """Whole lines of metrics.jsonl."""
    file = workdir / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def being_written(folder: Path) -> bool:
    """Whether a checkpoint is on its way in a folder."""
    return folder.is_dir() and any("tmp" in entry.name for entry in folder.iterdir())


def aims(durations: Mapping[str, float], start: Path, preparing: bool) -> list[Aim]:
    """Where the next kill may be aimed at.

    Args:
        durations: of an undisturbed run and of its phases, in seconds.
        start: the workdir as it is.
        preparing: whether its clips are still to be prepared.
    """
    done = steps_done(start)

    def validating(workdir: Path) -> bool:
        steps = steps_done(workdir)
        return steps > done and (steps + 1) % EVAL_EVERY == 0

    uniform = Aim("any time", None, durations["all"])
    if preparing:
        return [uniform, Aim("preparation", lambda workdir: (workdir / "cache").exists(), durations["preparation"])]
    return [
        uniform,
        Aim("checkpoint", lambda workdir: being_written(workdir / "checkpoints"), SOON_S),
        Aim("best checkpoint", lambda workdir: being_written(workdir / "best"), SOON_S),
        Aim("validation", validating, durations["validation"]),
        Aim("export", lambda workdir: steps_done(workdir) >= STEPS, durations["export"]),
    ]


def durations_of(seen: Mapping[str, float]) -> dict[str, float]:
    """Seconds of an undisturbed run and of its phases, of what `Campaign.run_to_the_end` saw of it."""
    validated = 2 * EVAL_EVERY
    return {
        "all": seen["end"],
        "preparation": seen["step 1"] - seen["cache"],
        "validation": seen[f"step {validated}"] - seen[f"step {validated - 1}"],
        "export": seen["end"] - seen[f"step {STEPS}"],
    }


class Campaign:
    """Runs in a folder of which all but one are killed.

    Args:
        folder: for everything; what is there goes on.
        settings: further flags of the command.
    """

    def __init__(self, folder: Path, settings: Sequence[str] = ()) -> None:
        self.folder = folder
        self._settings = settings
        self._clips = folder / "clips"
        for name, (count, seed) in CLIPS.items():
            if not (self._clips / name / "metadata.csv").exists():
                shutil.rmtree(self._clips / name, ignore_errors=True)
                draw_clips(self._clips / name, count, seed, frames=5)
        self._environment = os.environ | {
            "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(folder / "jax")),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "RFL_JAX_CACHE": str(folder / "user_cache"),
            "XLA_FLAGS": "",
        }

    @property
    def reference(self) -> Path:
        """The undisturbed run."""
        return self.folder / "reference"

    def start(self, workdir: Path) -> subprocess.Popen:
        """The command, which is the same for a run's beginning and for its going on. Its lines go to WORKDIR.log."""
        files = [f"--config.file_name={self._clips}/train/metadata.csv"]
        files.append(f"--config.eval.file_name={self._clips}/held_out/metadata.csv")
        command = [sys.executable, "-m", "rfl_jax.train", *SETTINGS, *files, *self._settings, f"--workdir={workdir}"]
        with workdir.with_suffix(".log").open("a") as log:
            return subprocess.Popen(command, cwd=ROOT, env=self._environment, stdout=log, stderr=log)

    def run_to_the_end(self, workdir: Path) -> dict[str, float]:
        """Starts the command and lets it end. Returns after how many seconds what was first seen: "cache" and "step N" done;
        and "end".

        Raises:
            SystemExit: it ended with an error.
        """
        seen: dict[str, float] = {}
        process, begin = self.start(workdir), time.monotonic()
        while process.poll() is None:
            done, now = steps_done(workdir), time.monotonic() - begin
            if (workdir / "cache").exists():
                seen.setdefault("cache", now)
            seen.setdefault(f"step {done}", now)
            time.sleep(POLL_S)
        if process.returncode:
            raise SystemExit(f"{workdir}: LOST: exit status {process.returncode}, see {workdir.with_suffix('.log')}")
        return seen | {"end": time.monotonic() - begin}

    def kill_at(self, workdir: Path, aim: Aim, after_s: float) -> float | None:
        """Starts the command and kills it at a moment. Returns after how many seconds; None if it had ended before.

        Raises:
            SystemExit: it ended by itself with an error.
        """
        process, begin = self.start(workdir), time.monotonic()
        while process.poll() is None and aim.begun and not aim.begun(workdir):
            time.sleep(POLL_S)
        end = time.monotonic() + after_s
        while process.poll() is None and time.monotonic() < end:
            time.sleep(POLL_S)
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
        process.wait()
        if process.returncode == -signal.SIGKILL:
            return time.monotonic() - begin
        if process.returncode:
            raise SystemExit(f"{workdir}: LOST: exit status {process.returncode}, see {workdir.with_suffix('.log')}")
        return None

    def kill_until_it_ends(
        self, workdir: Path, rng: np.random.Generator, durations: Mapping[str, float], most: int
    ) -> Iterator[dict[str, Any]]:
        """Kills a run up to `most` times and lets it end; yields a record of each kill.

        Raises:
            SystemExit: the run is lost, or differs from the undisturbed one.
        """
        kills = 0
        while kills < most:
            choice = aims(durations, workdir, preparing=not steps_done(workdir) and kills < 2)
            aim = choice[rng.integers(len(choice))]
            seconds = self.kill_at(workdir, aim, rng.uniform(0, aim.within_s))
            if seconds is None:
                break
            kills += 1
            yield {"run": workdir.name, "aim": aim.name, "seconds": round(seconds, 2), "step": steps_done(workdir)}
        else:
            self.run_to_the_end(workdir)
        if found := differences(self.reference, workdir):
            raise SystemExit(f"{workdir}: LOST: {'; '.join(found)}")


def comparable_lines(workdir: Path) -> list[str]:
    """Lines of metrics.jsonl without what the clock decides; numbers as written."""
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return [json.dumps({k: v for k, v in line.items() if k not in CLOCK}) for line in lines]


def arrays_below(folder: Path) -> dict[str, bytes]:
    """The files of arrays in a folder of checkpoints."""
    files = [file for file in folder.rglob("*") if file.is_file() and "state" in file.relative_to(folder).parts[1:2]]
    # What Orbax notes of its writing has times in it.
    notes = ("_", "commit_success")
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if not f.name.startswith(notes)}


def differences(reference: Path, workdir: Path) -> list[str]:
    """In what a run's folder differs from that of an undisturbed run."""
    found = []
    if comparable_lines(workdir) != comparable_lines(reference):
        found.append("metrics.jsonl differs")
    files = ["validation.json", "evaluation.json", *sorted(f.name for f in reference.glob("*_lora.safetensors"))]
    for name in files:
        want = (reference / name).read_bytes() if (reference / name).exists() else None
        if want != ((workdir / name).read_bytes() if (workdir / name).exists() else None):
            found.append(f"{name} differs")
    for name in ("checkpoints", "best"):
        want, got = arrays_below(reference / name), arrays_below(workdir / name)
        wrong = sorted(file for file in want.keys() | got.keys() if want.get(file) != got.get(file))
        if wrong:
            found.append(f"{name}: {', '.join(wrong[:3])}{' ...' if len(wrong) > 3 else ''} differs")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=100, help="kills in all (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--most", type=int, default=8, help="kills of one run (default: %(default)s)")
    parser.add_argument("--dir", type=Path, help="for the runs; what is there goes on (default: a temporary folder)")
    args = parser.parse_args()
    answer_libtpu()
    folder = args.dir or Path(tempfile.mkdtemp(prefix="kill-"))
    folder.mkdir(parents=True, exist_ok=True)
    campaign, log, measured = Campaign(folder), folder / "kills.jsonl", folder / "durations.json"
    if not measured.exists():
        print(f"an undisturbed run in {campaign.reference}", flush=True)
        # Twice: what is compiled once says nothing of how long a run takes.
        for workdir in (folder / "first", campaign.reference):
            shutil.rmtree(workdir, ignore_errors=True)
            seen = campaign.run_to_the_end(workdir)
        if found := differences(folder / "first", campaign.reference):
            raise SystemExit(f"two undisturbed runs differ: {'; '.join(found)}")
        measured.write_text(json.dumps(durations_of(seen)))
    durations = json.loads(measured.read_text())
    print(", ".join(f"{name} {seconds:.1f} s" for name, seconds in durations.items()), flush=True)
    kills = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    runs = max((int(kill["run"].removeprefix("run_")) + 1 for kill in kills), default=0)
    begin = time.monotonic()
    while len(kills) < args.times:
        workdir, rng = folder / f"run_{runs:03d}", np.random.default_rng([args.seed, runs])
        shutil.rmtree(workdir, ignore_errors=True)
        most = min(int(rng.integers(1, args.most + 1)), args.times - len(kills))
        for kill in campaign.kill_until_it_ends(workdir, rng, durations, most):
            kills.append(kill)
            with log.open("a") as stream:
                stream.write(json.dumps(kill) + "\n")
            print(f"kill {len(kills)}/{args.times}: {kill}", flush=True)
        print(f"{workdir.name}: ended as the undisturbed one", flush=True)
        shutil.rmtree(workdir)
        runs += 1
    aimed = ", ".join(f"{name} {count}" for name, count in Counter(kill["aim"] for kill in kills).most_common())
    print(
        f"{len(kills)} kills ({aimed}) of {runs} runs in {(time.monotonic() - begin) / 60:.0f} min, 0 lost, all equal"
    )


if __name__ == "__main__":
    main()
