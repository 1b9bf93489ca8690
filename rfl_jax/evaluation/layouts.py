"""An evaluation's videos in the folders that the field's own benchmarks read: VBench-I2V and OpenS2V-Eval.

What is laid out is what their scripts look for, by the names that these build:

* `vbench-i2v`: github.com/Vchitect/VBench at 45e79ec, `evaluate_i2v.py --mode=custom_input`; `VBench.build_full_info_json` and
  `build_custom_image_dict` in vbench/__init__.py, `get_prompt_from_filename` in vbench/utils.py.
* `opens2v`: github.com/PKU-YuanGroup/OpenS2V-Nexus at b452831, eval/get_facesim.py and its neighbours.
"""

import collections
import contextlib
import dataclasses
import io
import json
import shlex
import shutil
import unicodedata
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import av
from etils import epath

from rfl_jax.errors import UserError, did_you_mean, is_full
from rfl_jax.evaluation.evaluate import NAMES
from rfl_jax.files import aside, is_remote, naming, read_json, stays_below
from rfl_jax.runs import RunFolder

# What names files for VBench.
NAMINGS = ("prompt", "number")
# Bytes of a file's name on the file systems of Linux.
LONGEST_NAME = 255
# All that VBench offers for videos of one's own but camera_motion, which asks for "camera pans left" and the like in names.
DIMENSIONS = (
    *("i2v_subject", "i2v_background", "subject_consistency", "background_consistency"),
    *("motion_smoothness", "dynamic_degree", "aesthetic_quality", "imaging_quality"),
)
# OpenS2V takes for the face's picture the first whose path has a folder man, woman, crop_man or crop_woman, and asks no more of it.
FACES = "Images/singleface/woman"


@dataclasses.dataclass(frozen=True)
class Sample:
    """A held-out clip of an evaluation.

    Attributes:
        number: among the evaluation's clips, from 0.
        prompt: that it was sampled from.
        image: its first frame, a PNG.
        videos: "base" and "tuned", each the content of an mp4.
    """

    number: int
    prompt: str
    image: bytes
    videos: Mapping[str, bytes]


@dataclasses.dataclass(frozen=True)
class Layout:
    """Attributes:
    videos: name of each sample's video in the folders base and tuned.
    images: path of each sample's image.
    prompts: content of prompts.json, which the benchmark's scripts may be given.
    """

    videos: list[str]
    images: list[str]
    prompts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Attributes:
    repository: whose clone has the scripts, and the folder in it to call them from.
    lay_out: says where each sample goes; takes the samples, and one of `NAMINGS` or nothing.
    command: of the folder, quoted for a shell; scores `$way`, which is base and then tuned.
    """

    repository: str
    lay_out: Callable[[Sequence[Sample], str], Layout]
    command: Callable[[str], str]


def export(folder: RunFolder, benchmark: str, dst: epath.Path, naming_by: str = "") -> str:
    """Lays the videos of a run's evaluation out for a benchmark: `dst` is there whole, or not at all.

    Args:
        folder: of a run that was evaluated.
        benchmark: one of `BENCHMARKS`.
        dst: new or empty folder: base/ and tuned/ with the videos, the images, prompts.json, and seeds.json with the run's seed
            and the clip's number, which a sample's noise follows from.
        naming_by: one of `NAMINGS`; the prompt by default.

    Returns:
        The command that scores base and tuned, to be called in the benchmark's clone.

    Raises:
        UserError: no such benchmark, `dst` is taken or cannot be written, no evaluation, a video of it is missing, or a prompt
            cannot be a name.
    """
    if benchmark not in BENCHMARKS:
        near = did_you_mean(benchmark, BENCHMARKS)
        raise UserError(f"--export: {benchmark}: expected {' or '.join(BENCHMARKS)}{near}")
    if naming_by not in ("", *NAMINGS):
        raise UserError(f"--names: {naming_by}: expected {' or '.join(NAMINGS)}")
    _refuse_taken(dst)
    seed = folder.read_config().get("seed")
    samples = read_samples(folder)
    layout = BENCHMARKS[benchmark].lay_out(samples, naming_by)
    seeds = {
        f"{name}.mp4": {"seed": seed, "clip": sample.number}
        for name, sample in zip(layout.videos, samples, strict=True)
    }
    try:
        # Of a link to an empty folder what it leads to: that is what is replaced.
        whole = Path(dst).resolve()
        unfinished = Path(aside(whole))
        with naming(whole), _removed_on_failure(unfinished):
            for sample, name, image in zip(samples, layout.videos, layout.images, strict=True):
                for way, video in sample.videos.items():
                    _write(unfinished / way / f"{name}.mp4", video)
                _write(unfinished / image, sample.image)
            for name, content in (("prompts", layout.prompts), ("seeds", seeds)):
                _write(unfinished / f"{name}.json", f"{json.dumps(content, indent=1)}\n".encode())
            unfinished.replace(whole)
    except OSError as error:
        if is_full(error):
            raise
        raise UserError(f"--dst: {dst}: cannot be written ({error.strerror or error})") from None
    command = BENCHMARKS[benchmark].command(shlex.quote(str(whole)))
    return f"for way in {' '.join(NAMES)}; do {command}; done"


def _refuse_taken(dst: epath.Path) -> None:
    """Raises `UserError` unless it is a local folder that is new or empty."""
    expected = "expected a new or empty folder"
    if is_remote(dst):
        raise UserError(f"--dst: {dst}: {expected} on this machine, as the benchmarks' scripts read no other")
    if dst.exists() and not dst.is_dir():
        raise UserError(f"--dst: {dst}: is a file, {expected}")
    if dst.is_dir() and any(dst.iterdir()):
        raise UserError(f"--dst: {dst}: is not empty, {expected}")


@contextlib.contextmanager
def _removed_on_failure(folder: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write(file: Path, content: bytes) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(content)


def read_samples(folder: RunFolder) -> list[Sample]:
    """The clips of a run's evaluation.

    Raises:
        UserError: the run was not evaluated, or a file of its evaluation is missing or unreadable.
    """
    file = folder.evaluation
    if not file.exists():
        make = f"python -m rfl_jax.evaluate --workdir={folder}"
        raise UserError(f"{file}: no such file, expected a run that was evaluated: {make}")
    samples = []
    try:
        for number, clip in enumerate(read_json(file)["clips"]):
            prompt, names = clip["prompt"], {way: clip[way]["file"] for way in ("reference", *NAMES)}
            if not all(isinstance(text, str) for text in (prompt, *names.values())):
                raise TypeError("texts")
            samples.append((number, prompt, names))
    except (KeyError, TypeError):
        samples.clear()
    if not samples:
        raise UserError(f"{file}: expected the clips of an evaluation, with prompts and files")
    return [_read_sample(folder, *sample) for sample in samples]


def _read_sample(folder: RunFolder, number: int, prompt: str, names: Mapping[str, str]) -> Sample:
    for name in names.values():
        if not stays_below(name):
            raise UserError(f"{folder.evaluation}: {name} lies outside the run's folder")
    files = {way: folder.path / name for way, name in names.items()}
    videos = {way: _read_video(file) for way, file in files.items()}
    # Of the real clip its image; of the others whether they can be opened.
    images = {way: _first_frame(videos[way], file) for way, file in files.items()}
    return Sample(number, prompt, images["reference"], {way: videos[way] for way in NAMES})


def _read_video(file: epath.Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: no such video, which evaluation.json names") from None


def _first_frame(video: bytes, file: epath.Path) -> bytes:
    """The first frame of a video as a PNG."""
    try:
        with av.open(io.BytesIO(video), "r") as container:
            frame = next(container.decode(video=0), None)
    except (av.FFmpegError, IndexError) as error:
        raise UserError(f"{file}: expected a readable video ({error})") from None
    if frame is None:
        raise UserError(f"{file}: expected a readable video (no frames)")
    buffer = io.BytesIO()
    frame.to_image().save(buffer, "PNG")
    return buffer.getvalue()


def _vbench(samples: Sequence[Sample], naming_by: str) -> Layout:
    """PROMPT-INDEX.mp4 and PROMPT.png: to a video belongs the image that its name without the index names."""
    layout = Layout([], [], {})
    images: dict[str, tuple[int, bytes]] = {}
    counts = collections.Counter[str]()
    for sample in samples:
        name = f"{sample.number:03d}" if naming_by == "number" else sample.prompt
        file = f"{name}-{counts[name]}.mp4"
        if reason := _no_name(name, file):
            raise _refused(sample, reason)
        number, image = images.setdefault(name, (sample.number, sample.image))
        if image != sample.image:
            raise _refused(sample, f"is clip {number}'s too, which begins with another image")
        layout.videos.append(file.removesuffix(".mp4"))
        layout.images.append(f"images/{name}.png")
        layout.prompts[file] = sample.prompt
        counts[name] += 1
    return layout


def _no_name(name: str, file: str) -> str:
    """Why a prompt cannot name a file; empty: it can."""
    bad = next((c for c in name if c == "/" or unicodedata.category(c) in ("Cc", "Cs")), "")
    if bad:
        return f"holds {bad!r}, which no file's name can"
    if not name.strip("."):  # a name that begins with dots has no ending after them
        return "is no name of a file"
    length = len(file.encode())
    return f"makes a file's name of {length} bytes, expected at most {LONGEST_NAME}" if length > LONGEST_NAME else ""


def _refused(sample: Sample, reason: str) -> UserError:
    shown = repr(sample.prompt if len(sample.prompt) <= 60 else f"{sample.prompt[:57]}...")
    return UserError(f"clip {sample.number}: prompt {shown} {reason}; --names=number names files by the clips' numbers")


def _opens2v(samples: Sequence[Sample], naming_by: str) -> Layout:
    """singleface_N.mp4, and by that key in prompts.json the image and what else the benchmark's own has."""
    if naming_by:
        raise UserError("--names: of vbench-i2v only; opens2v has names of its own, singleface_1.mp4 and so on")
    keys = [f"singleface_{sample.number + 1}" for sample in samples]
    images = [f"{FACES}/{sample.number + 1}.png" for sample in samples]
    prompts = {
        key: {"img_paths": [image], "prompt": sample.prompt, "synthesis_flag": "wrong", "class_label": ["Woman"]}
        for key, image, sample in zip(keys, images, samples, strict=True)
    }
    return Layout(keys, images, prompts)


BENCHMARKS = {
    "vbench-i2v": Benchmark(
        "Vchitect/VBench",
        _vbench,
        lambda dst: (
            f"python evaluate_i2v.py --mode=custom_input --videos_path={dst}/$way --custom_image_folder={dst}/images "
            f"--output_path={dst}/results/$way --dimension {' '.join(DIMENSIONS)}"
        ),
    ),
    "opens2v": Benchmark(
        "PKU-YuanGroup/OpenS2V-Nexus, folder eval",
        _opens2v,
        lambda dst: (
            f"python get_facesim.py --input_video_folder={dst}/$way --input_image_folder={dst} "
            f"--input_json_file={dst}/prompts.json --output_json_file={dst}/results/$way/facesim.json --model_path=../ckpts"
        ),
    ),
}
