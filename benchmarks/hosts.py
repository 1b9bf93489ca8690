"""Runs of two hosts of which one is killed, frozen, cut from the network or has a wrong clock.

`python -m benchmarks.hosts [--dir=DIR] [--only=FAULT]` prints for every fault how many seconds after it each host had ended, and
its last line; then both are started again by the same command, and what the run ends with is compared with that of an
undisturbed one. A fault that ends a run has to end it within 60 seconds, each host with one line and exit status 1.

Each host is a process in a network namespace of its own, the two joined by a pair of virtual cards, one of which is taken
down; that needs root and iproute2. A wrong clock needs libfaketime (`apt install faketime`, or --faketime=FILE). What is not
there is said, and left out. Exit status 1: something was not as it has to be.
"""

import argparse
import contextlib
import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.kill import ROOT, comparable_lines, steps_done
from rfl_jax.chips import answer_libtpu
from rfl_jax.miniature.data import draw_clips

LIMIT_S = 60.0
STEPS = 8
SLOWEST_S = 3600
PORT = 8476
FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1")
SETTINGS = (
    "--config=configs/mini.py", "--config.data.num_frames=5", "--config.mesh.data=2", "--config.mesh.fsdp=1", "--config.train_batch_size=2",
    "--config.per_device_train_batch_size=1", "--config.eval.file_name=", "--config.num_inference_steps=4",
    "--config.mid_timestep=2", "--config.final_timestep=3", "--config.sample_every=0", "--config.save_steps=1",
    f"--config.max_steps={STEPS}", "--distributed",
)  # fmt: skip


@dataclasses.dataclass
class Host:
    """A process of a run.

    Attributes:
        process: it.
        log: its output.
        before: length of the log when the fault came.
        ended_s: how long after the fault it had ended.
    """

    process: subprocess.Popen
    log: Path
    before: int = 0
    ended_s: float | None = None

    def processes(self) -> list[int]:
        """It and its children, the supervised command among them."""
        found, left = [], [self.process.pid]
        while left:
            pid = left.pop()
            found.append(pid)
            with contextlib.suppress(OSError):
                left += map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        return found

    def send(self, number: int) -> None:
        """A signal to all of them."""
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def said(self) -> list[str]:
        """What it said since the fault, besides the lines of steps."""
        text = self.log.read_bytes()[self.before :].decode(errors="replace")
        return [line for line in text.splitlines() if line.strip() and not line.startswith("step ")]


def command(*words: str) -> None:
    """Runs a command of the system; what it says is dropped unless it fails."""
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}: {done.stderr.strip()}")


class Net:
    """Two network namespaces with a cable between them."""

    def __init__(self) -> None:
        self.names = [f"rfl{os.getpid()}-{i}" for i in (0, 1)]

    def __enter__(self) -> "Net":
        for name in self.names:
            command("ip", "netns", "add", name)
        first, second = self.names
        command("ip", "link", "add", "card", "netns", first, "type", "veth", "peer", "name", "card", "netns", second)
        for i, name in enumerate(self.names):
            command("ip", "-n", name, "address", "add", f"{self.address(i)}/24", "dev", "card")
            for card in ("lo", "card"):
                command("ip", "-n", name, "link", "set", card, "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            command("ip", "netns", "delete", name)

    @staticmethod
    def address(i: int) -> str:
        return f"10.77.0.{i + 1}"

    def inside(self, i: int) -> list[str]:
        """What to put before a command to run it on a host, whose name is its address: there is no one to ask for it."""
        named = f'hostname {self.address(i)} && exec "$@"'
        return ["ip", "netns", "exec", self.names[i], "unshare", "--uts", "sh", "-c", named, "sh"]

    def set_cable(self, state: str) -> None:
        """`down` cuts the second host off, `up` joins it again."""
        command("ip", "-n", self.names[1], "link", "set", "card", state)


class Pair:
    """Runs of two hosts.

    Args:
        folder: for clips, runs and logs.
        net: that they are in.
    """

    def __init__(self, folder: Path, net: Net) -> None:
        self.folder, self.net = folder, net
        self._clips = folder / "clips"
        if not self._clips.exists():
            draw_clips(self._clips, 4, seed=5, frames=5)

    def start(self, workdir: Path, wrong_clock: dict[str, str] | None = None) -> list[Host]:
        """The same command on both; `wrong_clock` is added to the second's environment."""
        found = []
        for i in (0, 1):
            environment = os.environ | {
                "JAX_COORDINATOR_ADDRESS": f"{self.net.address(0)}:{PORT}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
                "JAX_COMPILATION_CACHE_DIR": os.environ.get("JAX_COMPILATION_CACHE_DIR", str(self.folder / "jax")),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                "RFL_JAX_CACHE": str(self.folder / "user_cache"),
                "XLA_FLAGS": "",
            }
            words = [sys.executable, "-u", "-m", "rfl_jax.train", *SETTINGS, f"--workdir={workdir}"]
            words.append(f"--config.file_name={self._clips}/metadata.csv")
            log = workdir.with_name(f"{workdir.name}.{i}.log")
            with log.open("a") as stream:
                process = subprocess.Popen(
                    [*self.net.inside(i), *words],
                    cwd=ROOT,
                    env=environment | ((wrong_clock or {}) if i else {}),
                    stdout=stream,
                    stderr=stream,
                )
            found.append(Host(process, log))
        return found

    def run_to_the_end(self, workdir: Path, wrong_clock: dict[str, str] | None = None) -> None:
        """Raises: SystemExit: it did not end well."""
        hosts = self.start(workdir, wrong_clock)
        for host in hosts:
            if host.process.wait(timeout=SLOWEST_S):
                raise SystemExit(f"{host.log}: exit status {host.process.returncode}")

    def wait_for_steps(self, hosts: list[Host], workdir: Path, count: int) -> None:
        """Until so many steps are done."""
        while steps_done(workdir) < count:
            if any(host.process.poll() is not None for host in hosts):
                raise SystemExit(f"{hosts[0].log}: ended before the fault")
            time.sleep(0.05)
        for host in hosts:
            host.before = host.log.stat().st_size


def watch(hosts: list[Host], begin: float, limit_s: float) -> None:
    """Notes when each of them ends, until all have or the time is over."""
    while any(host.ended_s is None for host in hosts) and time.monotonic() - begin < limit_s:
        for host in hosts:
            if host.ended_s is None and host.process.poll() is not None:
                host.ended_s = time.monotonic() - begin
        time.sleep(0.05)


def disturb(pair: Pair, workdir: Path, fault: str) -> Iterator[str]:
    """Starts a run, lets a fault happen after its second step; yields what was wrong then.

    Args:
        pair: of hosts.
        workdir: of the run.
        fault: "killed", "frozen" or "cut off": what happens to the second host.
    """
    hosts = pair.start(workdir)
    pair.wait_for_steps(hosts, workdir, 2)
    first, second = hosts
    begin = time.monotonic()
    if fault == "cut off":
        pair.net.set_cable("down")
    else:
        second.send(signal.SIGKILL if fault == "killed" else signal.SIGSTOP)
    watched = [first] if fault != "cut off" else hosts
    watch(watched, begin, LIMIT_S)
    if fault == "frozen":
        # It wakes up in a run that is over.
        second.send(signal.SIGCONT)
        woken = time.monotonic()
        watch([second], woken, LIMIT_S)
        watched = hosts
    for number, host in enumerate(hosts):
        if host not in watched:
            continue
        since = "waking" if fault == "frozen" and number else "it"
        if host.ended_s is None:
            yield f"host {number} had not ended {LIMIT_S:.0f} s after {since}"
            continue
        said = host.said()
        last = said[-1][:200] if said else "nothing"
        print(
            f"  host {number}: ended {host.ended_s:.1f} s after {since}, status {host.process.returncode}, "
            f"{len(said)} lines: {last}",
            flush=True,
        )
        if host.process.returncode != 1:
            yield f"host {number}: exit status {host.process.returncode}"
        if len(said) != 1:
            yield f"host {number}: {len(said)} lines: " + " | ".join(said)
    for host in hosts:
        if host.process.poll() is None:
            host.send(signal.SIGKILL)
        host.process.wait()
    if fault == "cut off":
        pair.net.set_cable("up")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dir", type=Path, help="for the runs (default: a temporary folder)")
    parser.add_argument("--only", default="", help="a fault: killed, frozen, cut off, clock ahead or clock jumps")
    parser.add_argument("--faketime", type=Path, default=FAKETIME, help="libfaketime (default: %(default)s)")
    args = parser.parse_args()
    answer_libtpu()
    if os.geteuid() or not shutil.which("ip"):
        raise SystemExit("network namespaces need root and iproute2")
    folder = args.dir or Path(tempfile.mkdtemp(prefix="hosts-"))
    folder.mkdir(parents=True, exist_ok=True)
    wrong = []
    with Net() as net:
        pair = Pair(folder, net)
        reference = folder / "reference"
        if not (reference / "dit2_lora.safetensors").exists():
            pair.run_to_the_end(reference)
        for fault in ("killed", "frozen", "cut off", "clock ahead", "clock jumps"):
            if args.only not in ("", fault):
                continue
            print(f"second host {fault}:" if "clock" not in fault else f"second host's {fault}:", flush=True)
            workdir = folder / fault.replace(" ", "_")
            shutil.rmtree(workdir, ignore_errors=True)
            if "clock" in fault:
                if not args.faketime.exists():
                    print(f"  left out: {args.faketime} is not there")
                    continue
                run_with_wrong_clock(pair, workdir, fault, args.faketime)
            else:
                wrong += [f"{fault}: {text}" for text in disturb(pair, workdir, fault)]
                done = steps_done(workdir)
                begin = time.monotonic()
                pair.run_to_the_end(workdir)
                print(f"  the same command went on after step {done} and ended in {time.monotonic() - begin:.0f} s")
            same = comparable_lines(workdir) == comparable_lines(reference)
            print(f"  metrics.jsonl is {'that' if same else 'NOT that'} of the undisturbed run", flush=True)
            wrong += [] if same else [f"{fault}: metrics.jsonl differs"]
    print(*wrong, sep="\n")
    sys.exit(bool(wrong))


def run_with_wrong_clock(pair: Pair, workdir: Path, fault: str, library: Path) -> None:
    """A run whose second host's clock is three hours ahead, or jumps back by a day after the second step."""
    file = workdir.with_name("clock")
    file.write_text("+3h" if fault == "clock ahead" else "+0")
    # Its monotonic clock goes as ever, as a real one does when the time of day is set.
    clock = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(file),
        "FAKETIME_CACHE_DURATION": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "DONT_FAKE_MONOTONIC": "1",
    }
    if fault == "clock ahead":
        pair.run_to_the_end(workdir, clock)
        return
    hosts = pair.start(workdir, clock)
    pair.wait_for_steps(hosts, workdir, 2)
    file.write_text("-1d")
    for host in hosts:
        if host.process.wait(timeout=SLOWEST_S):
            raise SystemExit(f"{host.log}: exit status {host.process.returncode}")
    print("  the run ended as ever")


if __name__ == "__main__":
    main()
