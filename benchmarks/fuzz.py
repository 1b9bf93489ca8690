"""Corrupts inputs of every kind and hands each to the function that a command hands it to.

`python -m benchmarks.fuzz --inputs=1000 --seed=0 [--dir=DIR]` prints a table of what became of them and at the end one line
for `benchmarks/RESULTS.md`. An input has to be refused in one line within 2 seconds of processor time (and 20 of the clock, as a
machine may be shared) and leave nothing behind, or be accepted. The same command goes on where it stopped, and tries faults
again.
It may be accepted with other content only where its format has no checksum over what was changed (the table says which):
there a changed number is a number. Anything else is a fault, told with its number; `--only=NUMBER` repeats it, and leaves the
input in DIR. Exit status 1: there were faults.
"""

import argparse
import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from PIL import Image
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from benchmarks.kill import Campaign
from configs import roll
from convert import store
from convert.__main__ import main as convert_main
from rfl_jax import export
from rfl_jax.chips import answer_libtpu
from rfl_jax.config import default_config, parse
from rfl_jax.data.cache import PreparedClip, write_arrays
from rfl_jax.data.dataset import check_shapes, make_iterator
from rfl_jax.data.metadata import Clip, read_metadata
from rfl_jax.data.text import PromptTokenizer
from rfl_jax.data.videos import encode_video, read_clip, read_image
from rfl_jax.errors import refuse_in_one_line
from rfl_jax.miniature.world import ASSETS, DIT_FILES, JUDGE_FILE, T5_FILE, TOKENIZER_FILE, asset_paths
from rfl_jax.reporting.collect import read_run
from rfl_jax.runs import RunFolder
from rfl_jax.sources import find_sources
from rfl_jax.training.changes import check_settings
from rfl_jax.training.checkpoint import Checkpoints, iterator_state
from rfl_jax.training.lock import Lock
from rfl_jax.training.progress import resume
from rfl_jax.training.record import open_record
from rfl_jax.training.setup import set_up
from rfl_jax.training.validation import Validation

LIMIT_S = 2.0  # of processor time, for a refusal
PATIENCE = 10  # times as much of the clock
REFUSED, SAME, OTHER, FAULT = "refused", "same content", "other content", "FAULT"


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of input.

    Attributes:
        name: in the table.
        make: writes a good one into a folder.
        damaged: pattern of the files there that may be corrupted.
        use: what a command does with the folder; returns the content that it found.
        checked: whether the format has a checksum over everything that counts.
        text: whether it is text, which is also edited as such.
    """

    name: str
    make: Callable[[Path], Any]
    damaged: str
    use: Callable[[Path], Any]
    checked: bool = False
    text: bool = False


# ---- Corruption: functions of a generator and bytes.


def place(rng: np.random.Generator, size: int) -> int:
    """A place in a file: every other time near one of its ends, where headers and directories are."""
    near = min(size, 1024)
    choice = rng.integers(4)
    if choice == 0:
        return int(rng.integers(near))
    return int(size - 1 - rng.integers(near)) if choice == 1 else int(rng.integers(size))


def span(rng: np.random.Generator, size: int) -> slice:
    """A range, mostly short."""
    start = place(rng, size)
    return slice(start, min(size, start + int(2 ** rng.uniform(0, 13))))


def flip_bits(rng: np.random.Generator, data: bytes) -> bytes:
    out = bytearray(data)
    for _ in range(int(rng.integers(1, 9))):
        out[place(rng, len(out))] ^= 1 << int(rng.integers(8))
    return bytes(out)


def cut(rng: np.random.Generator, data: bytes) -> bytes:
    return data[: place(rng, len(data))]


def zero(rng: np.random.Generator, data: bytes) -> bytes:
    where = span(rng, len(data))
    return data[: where.start] + bytes(where.stop - where.start) + data[where.stop :]


def leave_out(rng: np.random.Generator, data: bytes) -> bytes:
    where = span(rng, len(data))
    return data[: where.start] + data[where.stop :]


def double(rng: np.random.Generator, data: bytes) -> bytes:
    where = span(rng, len(data))
    return data[: where.stop] + data[where] + data[where.stop :]


def swap(rng: np.random.Generator, data: bytes) -> bytes:
    first, second = sorted((span(rng, len(data)), span(rng, len(data))), key=lambda s: s.start)
    size = min(first.stop, second.start) - first.start
    a, b = slice(first.start, first.start + size), slice(second.start, second.start + size)
    return data[: a.start] + data[b] + data[a.stop : b.start] + data[a] + data[b.stop :]


BYTES = (flip_bits, cut, zero, leave_out, double, swap)

ODD: tuple[Any, ...] = (
    *(None, True, -1, 0, 7, 1 << 70, 1e308, float("nan"), float("inf"), "", "x" * 5000, "a\nb", "\0", "<img onerror>"),
    *([], {}, [[]], {"": None}, ["a"], "../../outside", "/", "\ud800", "ключ", 0.5, "1", "nan"),
)
# Deeper than a parser goes.
DEEP = b"[" * 100_000 + b"]" * 100_000


def edit_json(rng: np.random.Generator, content: Any) -> Any:
    """A JSON value in which one value, or key, is another, is gone or is there once more."""
    holders: list[tuple[Any, Any]] = []

    def walk(value: Any) -> None:
        entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        for key, below in entries:
            holders.append((value, key))
            walk(below)

    content = copy.deepcopy(content)
    walk(content)
    odd = ODD[rng.integers(len(ODD))]
    if not holders or rng.integers(20) == 0:
        return odd
    holder, key = holders[rng.integers(len(holders))]
    choice = rng.integers(4)
    if choice == 0:
        del holder[key]
    elif choice == 1 and isinstance(holder, dict):
        holder[str(odd)] = holder.pop(key)
    elif choice == 1:
        holder.insert(key, holder[key])
    else:
        holder[key] = odd
    return content


def edit_lines(rng: np.random.Generator, data: bytes) -> bytes:
    """Text of which a line or a character is another."""
    lines = data.decode("utf-8", "surrogateescape").splitlines(keepends=True) or [""]
    number = int(rng.integers(len(lines)))
    line, marks = (
        lines[number],
        ('"', "'", ",", ";", "\t", "\r", "\0", "\ufeff", "{", "[", ":", "- ", "!", "&a ", "é", "\\"),
    )
    at = int(rng.integers(len(line) + 1))
    choice = rng.integers(5)
    if choice == 0:
        lines[number] = ""
    elif choice == 1:
        lines[number] = line * 2
    elif choice == 2:
        lines[number] = line[:at] + line[at + 1 :]
    else:
        lines[number] = line[:at] + marks[rng.integers(len(marks))] + line[at:]
    return "".join(lines).encode("utf-8", "surrogateescape")


def edit(rng: np.random.Generator, data: bytes) -> bytes:
    """An edit of what is text: JSON, lines of text, or the header of safetensors."""
    if rng.integers(50) == 0:
        return DEEP
    with contextlib.suppress(ValueError, RecursionError):
        return json.dumps(edit_json(rng, json.loads(data))).encode("utf-8", "surrogatepass")
    return edit_lines(rng, data)


def edit_header(rng: np.random.Generator, data: bytes) -> bytes:
    """Safetensors with an edited header."""
    size = int.from_bytes(data[:8], "little")
    header = edit(rng, data[8 : 8 + size])
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def corrupt(rng: np.random.Generator, kind: Kind, folder: Path) -> str:
    """Corrupts one file of an input, or takes it away. Returns what was done."""
    files = sorted(file for file in folder.glob(kind.damaged) if file.is_file())
    file = files[rng.integers(len(files))]
    if len(files) > 1 and rng.integers(12) == 0:
        file.unlink()
        return f"{file.name}: removed"
    data, done = file.read_bytes(), []
    is_text = kind.text or file.suffix in (".json", ".jsonl", ".csv", ".yaml") or data[:1] == b"{"
    for _ in range(int(rng.integers(1, 4)) if rng.integers(3) == 0 else 1):
        edits = (edit,) if is_text else (edit_header,) if file.suffix == ".safetensors" else ()
        choice = (*edits * len(BYTES), *BYTES)
        change = choice[rng.integers(len(choice))]
        with contextlib.suppress(IndexError, ValueError, UnicodeError):  # what one change has left another cannot edit
            data = change(rng, data)
            done.append(change.__name__)
    file.write_bytes(data)
    return f"{file.name}: {', '.join(done)}"


# ---- Kinds: how a good one is made, and what a command does with it.


def digest(values: Any) -> str:
    """Of arrays by name, or of anything with a meaningful repr."""
    if not isinstance(values, dict):
        return repr(values)
    found = hashlib.sha256()
    for name, x in sorted(values.items()):
        found.update(f"{name} {np.asarray(x).dtype} {np.shape(x)}".encode() + np.ascontiguousarray(x).tobytes())
    return found.hexdigest()


def converting(component: str, source: str, *more: str) -> Callable[[Path], str]:
    """`python -m convert COMPONENT --src SOURCE`."""

    def use(folder: Path) -> str:
        out = folder / "out"
        sys.argv = ["convert", component, "--src", str(folder / source), "--dst", str(out), *more]
        convert_main()
        arrays = store.restore(str(out))
        unfit = [name for name, x in arrays.items() if not np.isfinite(np.asarray(x, np.float32)).all()]
        assert not unfit, f"{unfit[0]} is not finite"
        return digest(arrays)

    return use


def beside(source: Path, name: str) -> Callable[[Path], None]:
    """A file under a name."""

    def make(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, folder / name)

    return make


def shards(folder: Path) -> None:
    """The text encoder in two shards with an index."""
    tensors = load_file(ASSETS / "umt5" / T5_FILE)
    names = sorted(tensors)
    weight_map = {}
    for number, part in enumerate((names[::2], names[1::2])):
        save_file({name: tensors[name] for name in part}, folder / f"{number}.safetensors")
        weight_map |= dict.fromkeys(part, f"{number}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def pickled(zipped: bool) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        import torch
        from safetensors.torch import load_file as load_torch

        tensors = load_torch(ASSETS / "umt5" / T5_FILE)
        torch.save(tensors, folder / "model.pth", _use_new_zipfile_serialization=zipped)

    return make


def dit_with_config(folder: Path) -> None:
    file = ASSETS / DIT_FILES["dit2"]
    (folder / "model.safetensors").symlink_to(file)
    shutil.copy(file.with_name("config.json"), folder)


def picture() -> np.ndarray:
    axes = np.mgrid[:40, :48].astype(np.float32)
    return np.stack([axes[0] * 6, axes[1] * 5, axes.sum(0) * 2], -1).astype(np.uint8)


def as_picture(name: str) -> Callable[[Path], None]:
    return lambda folder: Image.fromarray(picture()).save(folder / name)


def film(folder: Path) -> None:
    frames = np.stack([np.roll(picture(), 3 * t, 1) for t in range(9)])
    (folder / "clip.mp4").write_bytes(encode_video(frames, fps=8))


def rows(folder: Path) -> None:
    lines = ["video,prompt"] + [f'clip_{i}.mp4,"She nods, and smiles {i}."' for i in range(5)]
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")


def prepared(folder: Path) -> None:
    """A clip of the cache, and one of its noises."""
    rng = np.random.default_rng(0)
    shapes = {"ids": (6,), "mask": (6,), "context": (6, 8), "y": (2, 4, 4, 8), "pool": (5, 8)}
    arrays = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    write_arrays(epath.Path(folder / "clip.npz"), arrays)
    write_arrays(epath.Path(folder / "noise.prefix.npz"), {"latents": arrays["y"]})


def use_prepared(folder: Path) -> str:
    """What training does with it before and while it runs."""
    file, noise = (epath.Path(folder / name) for name in ("clip.npz", "noise.prefix.npz"))
    clip = PreparedClip(Clip(2, folder / "a.mp4", "a"), file, (noise,))
    check_shapes([clip, clip], 2)
    return digest(next(make_iterator([clip], ("y", "pool"), batch=1, seed=0, noises=1)))


def converted(folder: Path) -> None:
    cfg, arrays = store.convert("umt5", [str(ASSETS / "umt5" / T5_FILE)])
    store.save(str(folder / "weights"), "umt5", cfg, arrays)


def use_converted(folder: Path) -> str:
    sys.argv = ["convert", "inspect", str(folder / "weights")]
    convert_main()
    module = store.open_component("umt5", [str(folder / "weights")])
    return digest({str(i): x for i, x in enumerate(jax.tree.leaves(export_arrays(module)))})


def export_arrays(module: Any) -> Any:
    """The arrays of a module."""
    from rfl_jax.models.weights import get_arrays

    return get_arrays(module)


def use_yaml(folder: Path) -> str:
    return repr(parse(roll.get_config(str(folder / "reward.yaml"))))


def make_yaml(folder: Path) -> None:
    actor = {"model_args": {"lora_rank": 8, "trainable_models": "dit2"}, "training_args": {"learning_rate": 1e-5}}
    content = {"seed": 3, "train_batch_size": 8, "actor_train": actor, "save_steps": 50}
    (folder / "reward.yaml").write_text(yaml.safe_dump(content))


def use_paths(folder: Path) -> str:
    config = default_config()
    config.update(asset_paths() | {"model_paths": str(folder / "paths.json")})
    return repr(find_sources(parse(config), experts=2))


def make_lock(folder: Path) -> None:
    with Lock(RunFolder(epath.Path(folder))):
        holder = json.loads((folder / "lock.json").read_text())
    gone = subprocess.Popen(["true"])
    gone.wait()
    (folder / "lock.json").write_text(json.dumps(holder | {"pid": gone.pid}))


def use_lock(folder: Path) -> str:
    with Lock(RunFolder(epath.Path(folder)), beat_s=0.1, silence_s=0.2):
        return ""


def kinds() -> list[Kind]:
    """Kinds that need no run."""
    image_kinds = [
        Kind(f"picture {name}", as_picture(f"face.{name}"), "*", lambda f, n=name: digest({"": np.asarray(read_image(f / f"face.{n}"))}), name == "png")
        for name in ("png", "jpg", "webp", "gif", "tiff")
    ]  # fmt: skip
    return [
        Kind("safetensors", beside(ASSETS / "umt5" / T5_FILE, "t5.safetensors"), "*", converting("umt5", "t5.safetensors")),
        Kind("index of shards", shards, "*.json", converting("umt5", ".")),
        Kind("shards", shards, "*", converting("umt5", ".")),
        Kind("config.json beside weights", dit_with_config, "*.json", converting("dit", ".")),
        Kind("pickle, zip", pickled(True), "*", converting("umt5", "model.pth"), checked=True),
        Kind("pickle, old", pickled(False), "*", converting("umt5", "model.pth")),
        Kind("ONNX embedder", beside(ASSETS / JUDGE_FILE, "net.onnx"), "*", converting("arcface", "net.onnx")),
        Kind("ONNX detector", beside(ASSETS / "antelopev2" / "scrfd_10g_bnkps.onnx", "net.onnx"), "*", converting("scrfd", "net.onnx")),
        Kind("converted weights", converted, "weights/**/*", use_converted),
        Kind("model_paths", lambda f: (f / "paths.json").write_text(asset_paths()["model_paths"]), "*", use_paths),
        Kind("the original's yaml", make_yaml, "*", use_yaml),
        Kind("csv", rows, "*", lambda f: repr([(c.number, c.video.name, c.prompt) for c in read_metadata(f / "metadata.csv")])),
        Kind("tokenizer", beside(ASSETS / TOKENIZER_FILE, "tokenizer.json"), "*", lambda f: digest({"": PromptTokenizer(f, 16)(["She nods, and smiles."])[0]})),
        Kind("video", film, "*", lambda f: digest({"": read_clip(f / "clip.mp4", num_frames=9, max_pixels=1 << 12, multiple=8)})),
        *image_kinds,
        Kind("prepared clip", prepared, "*", use_prepared, checked=True),
        Kind("lock.json", make_lock, "lock.json", use_lock, text=True),
    ]  # fmt: skip


def kinds_of_run(workdir: Path) -> list[Kind]:
    """Kinds that are files of a run, which is at its end.

    Args:
        workdir: of the run.
    """
    cfg = parse(ConfigDict(RunFolder(epath.Path(workdir)).read_config()))
    run = set_up(cfg, RunFolder(epath.Path(workdir)), jax.devices()[:1])
    held_out = run.open_held_out()

    def whole(*left_out: str) -> Callable[[Path], Any]:
        return lambda folder: shutil.copytree(
            workdir, folder / "run", ignore=shutil.ignore_patterns("cache", "tensorboard", "samples", "best", *left_out)
        )

    def train_again(folder: Path) -> str:
        """What the training command does before its first step."""
        place = RunFolder(epath.Path(folder / "run"))
        check_settings(cfg, place)
        with Checkpoints(place.checkpoints) as checkpoints:
            progress = resume(run, checkpoints)
        with open_record(cfg, place, start=progress.step, total=progress.step) as record:
            record.amend(progress.step, {"more": 1})
        with Validation(cfg, held_out, place, progress.step, print) as validation:
            judged = [validation.entries, validation.best_step]
        leaves = {str(i): x for i, x in enumerate(jax.tree.leaves(progress.state))}
        return digest(leaves) + json.dumps([iterator_state(progress.data), judged, place.read_lines()])

    def exported(folder: Path) -> str:
        file = folder / "out.safetensors"
        sys.argv = ["export", "--workdir", str(folder / "run"), "--format", "peft", "--dst", str(file)]
        export.main()
        return hashlib.sha256(file.read_bytes()).hexdigest()

    def adapters(folder: Path) -> None:
        exported_from = folder.parent / "exported"
        whole("evaluation")(exported_from)
        sys.argv = ["export", "--workdir", str(exported_from / "run"), "--format", "peft"]
        sys.argv += ["--dst", str(folder / "adapter_model.safetensors")]
        export.main()
        shutil.rmtree(exported_from)

    lora = converting("lora", "adapter_model.safetensors", "--set", "preset=mini")
    only = [f"*_lora.{x}" for x in ("safetensors",)] + ["evaluation"]
    return [
        Kind("adapter", adapters, "*.safetensors", lora),
        Kind("adapter_config.json", adapters, "*.json", lora),
        Kind("checkpoint", whole(*only), "run/checkpoints/**/*", train_again),
        Kind("run's json, resumed", whole(*only), "run/*.json*", train_again),
        Kind("run's json, exported", whole(*only), "run/*.json*", exported),
        Kind("checkpoint, exported", whole(*only), "run/checkpoints/**/*", exported),
        Kind("run's json, reported", whole(), "run/*.json*", lambda f: repr(read_run(RunFolder(epath.Path(f / "run"))))),
    ]  # fmt: skip


# ---- The campaign.


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """What this process writes to its stderr, libraries in C among it; stdout is dropped."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file, contextlib.redirect_stdout(io.StringIO()):
        before = os.dup(2)
        os.dup2(file.fileno(), 2)
        written = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115

        def read() -> str:
            written.flush()
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            with contextlib.redirect_stderr(written):
                yield read
        finally:
            written.flush()
            os.dup2(before, 2)
            os.close(before)


def what_becomes(kind: Kind, folder: Path, limit_s: float) -> tuple[str, str, float]:
    """What a command does with an input.

    Returns:
        `REFUSED` with the line, `OTHER` (than what is not known here) with the content, or `FAULT` with what is wrong; and
        the seconds of processor time that it took.
    """
    before = set(folder.iterdir())
    with captured() as read:
        begin, clock, code, text = time.process_time(), time.monotonic(), 0, ""
        try:
            with refuse_in_one_line(kind.name):
                text = kind.use(folder)
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException as error:  # whatever it is
            last = traceback.extract_tb(error.__traceback__)[-1]
            code, text = -1, f"{type(error).__name__}: {str(error)[:200]} ({last.filename}:{last.lineno})"
        seconds = max(time.process_time() - begin, (time.monotonic() - clock) / PATIENCE)
        said = read()
    if code == -1:
        return FAULT, text, seconds
    if code == 0:
        return OTHER, text, seconds
    if code != 2 or said.count("\n") != 1:
        return FAULT, f"exit status {code}, {said.count(chr(10))} lines: {said[:600]}", seconds
    if seconds > limit_s:
        return FAULT, f"refused after {seconds:.1f} s: {said.strip()}", seconds
    if left := {f for f in set(folder.iterdir()) - before if f.name.startswith(("out", ".out"))}:
        return FAULT, f"left {', '.join(f.name for f in left)} behind: {said.strip()}", seconds
    return REFUSED, said.strip(), seconds


class Fuzzer:
    """Corrupted inputs, each decided by seed and number alone.

    Args:
        folder: for templates and inputs.
        all_kinds: kinds in turn.
        seed: of the corruption.
        limit_s: for a refusal.
    """

    def __init__(self, folder: Path, all_kinds: Sequence[Kind], seed: int, limit_s: float = LIMIT_S) -> None:
        self._folder, self._kinds, self._seed, self._limit_s = folder, all_kinds, seed, limit_s
        self._whole: dict[str, str] = {}

    def _template(self, kind: Kind) -> Path:
        return self._folder / "whole" / kind.name.replace(" ", "_")

    def prepare(self, kind: Kind) -> None:
        """Makes a good input, and finds the content that it is accepted with."""
        template = self._template(kind)
        shutil.rmtree(template, ignore_errors=True)
        template.mkdir(parents=True)
        with contextlib.redirect_stdout(io.StringIO()):
            kind.make(template)
        # Twice: what is compiled at first is not counted.
        text = ""
        for _ in range(2):
            verdict, text, _ = what_becomes(kind, self._copy(kind), self._limit_s)
            if verdict != OTHER:
                raise SystemExit(f"{kind.name}: a good input: {verdict}: {text}")
        self._whole[kind.name] = text

    def _copy(self, kind: Kind) -> Path:
        folder = self._folder / "input"
        shutil.rmtree(folder, ignore_errors=True)
        return Path(shutil.copytree(self._template(kind), folder, symlinks=True))

    def run(self, number: int) -> tuple[Kind, str, str, float]:
        """One input: its kind, the verdict, what is to be said of it, the seconds."""
        kind = self._kinds[number % len(self._kinds)]
        if kind.name not in self._whole:
            self.prepare(kind)
        folder = self._copy(kind)
        done = corrupt(np.random.default_rng([self._seed, number]), kind, folder)
        verdict, text, seconds = what_becomes(kind, folder, self._limit_s)
        if verdict == OTHER and text == self._whole[kind.name]:
            verdict, text = SAME, ""
        if verdict == OTHER and kind.checked:
            verdict, text = FAULT, "accepted with other content, though the format has checksums"
        return kind, verdict, f"{done}: {text}", seconds


def table(counts: Mapping[tuple[str, str], int], slowest: dict[str, float], checked: dict[str, bool]) -> Iterator[str]:
    """Lines of the result by kind."""
    columns = (REFUSED, SAME, OTHER, FAULT)
    yield f"{'':28s}" + "".join(f"{name:>15s}" for name in columns) + f"{'slowest refusal':>17s}  checksum"
    for name, has in checked.items():
        numbers = "".join(f"{counts.get((name, verdict), 0):15d}" for verdict in columns)
        yield f"{name:28s}{numbers}{slowest.get(name, 0):15.2f} s  {'yes' if has else 'no'}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="number of one input")
    parser.add_argument("--kinds", default="", help="only kinds whose names contain this")
    parser.add_argument("--dir", type=Path, help="for a run and the inputs (default: a temporary folder)")
    args = parser.parse_args()
    answer_libtpu()
    logging.set_verbosity(logging.FATAL)
    folder = args.dir or Path(tempfile.mkdtemp(prefix="fuzz-"))
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["RFL_JAX_CACHE"] = str(folder / "user_cache")
    campaign = Campaign(folder / "run")
    if not (campaign.reference / "evaluation.json").exists():
        print(f"a run in {campaign.reference}", flush=True)
        campaign.run_to_the_end(campaign.reference)
    all_kinds = [*kinds(), *kinds_of_run(campaign.reference)]
    fuzzer = Fuzzer(folder, all_kinds, args.seed)
    numbers = [n for n in range(args.inputs) if args.kinds in all_kinds[n % len(all_kinds)].name]
    numbers = numbers if args.only is None else [args.only]
    log = folder / f"results-{args.seed}.jsonl"
    results = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {result["number"]: result for result in results if result["verdict"] != FAULT}
    begin = time.monotonic()
    for number in tqdm([n for n in numbers if n not in done or args.only is not None], desc="inputs", disable=None):
        (folder / "current").write_text(str(number))  # a library that crashes takes this process with it
        kind, verdict, text, seconds = fuzzer.run(number)
        done[number] = {"number": number, "kind": kind.name, "verdict": verdict, "seconds": round(seconds, 3)}
        with log.open("a") as stream:
            stream.write(json.dumps(done[number]) + "\n")
        if verdict == FAULT or args.only is not None:
            tqdm.write(f"{number}: {kind.name}: {verdict}: {text}")
    results = [done[number] for number in numbers]
    counts = Counter((result["kind"], result["verdict"]) for result in results)
    slowest: dict[str, float] = {}
    for result in results:
        if result["verdict"] == REFUSED:
            slowest[result["kind"]] = max(slowest.get(result["kind"], 0), result["seconds"])
    print(*table(counts, slowest, {kind.name: kind.checked for kind in all_kinds}), sep="\n")
    totals = Counter()
    for (_, verdict), count in counts.items():
        totals[verdict] += count
    said = ", ".join(f"{totals[verdict]} {verdict}" for verdict in (REFUSED, SAME, OTHER, FAULT))
    print(
        f"{len(numbers)} inputs of {len(all_kinds)} kinds, seed {args.seed}: {said}; slowest refusal "
        f"{max(slowest.values(), default=0):.2f} s; {time.monotonic() - begin:.0f} s in all"
    )
    sys.exit(bool(totals[FAULT]))


if __name__ == "__main__":
    main()
