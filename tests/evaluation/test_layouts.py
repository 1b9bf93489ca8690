"""An evaluation laid out for a benchmark is what the benchmark's own scripts look for, by the names that these build."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from etils import epath
from PIL import Image

from rfl_jax.config import default_config, dumps, parse
from rfl_jax.data.videos import first_frame, read_frames, write_video
from rfl_jax.errors import UserError
from rfl_jax.evaluation.layouts import BENCHMARKS, export
from rfl_jax.runs import RunFolder

ROOT = Path(__file__).parents[2]
FRAMES, SIZE = 5, 32
# Twice the same clip, whose second sample has another noise; a prompt that ends like an index; two that differ in a dot.
CLIPS = (
    ("A person nods.", 0),
    ("A person nods.", 0),
    ("She counts: \"three\", 'two' & 100 % one-1", 1),
    ("一个人点头。", 2),
    ("A person nods", 3),
)


def moving(picture, seed):
    """A video that begins with a picture."""
    rng = np.random.default_rng(1000 + picture)
    first = np.kron(rng.integers(0, 255, (4, 4, 3), np.uint8), np.ones((SIZE // 4, SIZE // 4, 1), np.uint8))
    return np.stack([np.roll(first, seed * t, 1) for t in range(FRAMES)])


def evaluated(path, clips):
    """The folder of a run after an evaluation of clips (prompt, number of their first frame)."""
    folder = RunFolder(epath.Path(path))
    folder.path.mkdir(parents=True)
    config = default_config()
    config.preset = "mini"
    config.seed = 7
    folder.config.write_text(dumps(parse(config)))
    rows = []
    for i, (prompt, picture) in enumerate(clips):
        row = {"video": f"clip_{i}.mp4", "prompt": prompt}
        for way, seed in (("reference", 1), ("base", 2 + i), ("tuned", 20 + i)):
            row[way] = {"file": f"evaluation/{i:03d}_{way}.mp4"}
            write_video(folder.path / row[way]["file"], moving(picture, seed))
        rows.append(row)
    folder.evaluation.write_text(json.dumps({"clips": rows}))
    return folder


@pytest.fixture
def run(tmp_path):
    return evaluated(tmp_path / "a run", CLIPS)


def options(command, way):
    """What the printed command gives a script for `way`, as a shell makes words of it."""
    found = re.fullmatch(r"for way in base tuned; do (.*); done", command)
    words = shlex.split(found[1].replace("$way", way))
    assert words[0] == "python"
    flags = dict(word.removeprefix("--").split("=", 1) for word in words[2:] if "=" in word)
    return words[1], flags, words[words.index("--dimension") + 1 :] if "--dimension" in words else []


def vbench_pairs(videos_path, custom_image_folder):
    """What `evaluate_i2v.py --mode=custom_input` takes for a folder's videos and their images: by the name of an image without
    its ending its path, and by the name of a video without its ending and a last hyphen with digits the prompt that is looked up.
    """
    images = {file.stem: file for file in Path(custom_image_folder).iterdir()}
    assert {file.suffix for file in images.values()} <= {".jpg", ".jpeg", ".png"}, "others are passed over"
    pairs = {}
    for file in Path(videos_path).iterdir():
        assert file.suffix in (".mp4", ".gif"), "others are passed over"
        prompt = re.sub(r"-\d+$", "", file.stem)
        pairs[file.name] = (prompt, images[prompt], file)
    return pairs


def opens2v_pairs(input_video_folder, input_image_folder, input_json_file):
    """What `get_facesim.py` takes: videos of one person by their names, and of the images that the entry of a video's name up
    to its first dot has, the first in a folder of men or women.
    """
    entries = json.loads(Path(input_json_file).read_text(encoding="ascii"))
    pairs = {}
    for file in Path(input_video_folder).iterdir():
        assert file.suffix == ".mp4"
        assert any(word in file.name for word in ("singlehuman", "singleface", "faceobj", "humanobj"))
        entry = entries[file.name.split(".")[0]]
        folders = ("/man/", "/woman/", "/crop_woman/", "/crop_man/")
        image = next(path for path in entry["img_paths"] if any(folder in path for folder in folders))
        # What other scripts of the benchmark read: the prompt by the name without its ending, a label for each image.
        assert file.stem in entries
        assert len(entry["class_label"]) == len(entry["img_paths"])
        pairs[file.name] = (entry["prompt"], Path(input_image_folder) / image, file)
    return pairs


def check(run, pairs, seeds, way, number_of):
    """Each pair is a clip's video and the first frame of the real one, with its prompt and its noise."""
    clips = json.loads(run.evaluation.read_text())["clips"]
    assert len(pairs) == len(clips)
    for name, (prompt, image, video) in pairs.items():
        number = number_of(name)
        clip = clips[number]
        assert video.read_bytes() == (run.path / clip[way]["file"]).read_bytes()
        assert len(list(read_frames(video))) == FRAMES
        real = first_frame(str(run.path / clip["reference"]["file"]))
        np.testing.assert_array_equal(np.asarray(Image.open(image).convert("RGB")), np.asarray(real))
        assert seeds[name] == {"seed": 7, "clip": number}
        assert prompt == clip["prompt"]


@pytest.mark.parametrize("way", ["base", "tuned"])
def test_vbench_finds_to_each_video_its_prompt_and_its_image(run, tmp_path, way):
    dst = tmp_path / "it's for VBench"
    script, flags, dimensions = options(export(run, "vbench-i2v", epath.Path(dst)), way)
    assert (script, flags["mode"]) == ("evaluate_i2v.py", "custom_input")
    assert Path(flags["videos_path"]) == dst / way
    # Results lie where no script takes them for videos or images.
    assert Path(flags["output_path"]) == dst / "results" / way
    assert {"i2v_subject", "subject_consistency", "dynamic_degree"} <= set(dimensions)
    pairs = vbench_pairs(flags["videos_path"], flags["custom_image_folder"])
    names = ("A person nods.-0", "A person nods.-1", f"{CLIPS[2][0]}-0", f"{CLIPS[3][0]}-0", "A person nods-0")
    assert set(pairs) == {f"{name}.mp4" for name in names}
    prompts, seeds = (json.loads((dst / f"{name}.json").read_text()) for name in ("prompts", "seeds"))
    assert prompts == {name: prompt for name, (prompt, _, _) in pairs.items()}
    check(run, pairs, seeds, way, lambda name: seeds[name]["clip"])
    assert len({image for _, image, _ in pairs.values()}) == 4


def test_vbench_finds_images_by_number_where_prompts_cannot_be_names(tmp_path):
    clips = [("A person nods.", 0), ("A person nods.", 1), ("a/b", 2), ("", 3), ("x" * 300, 4)]
    run = evaluated(tmp_path / "run", clips)
    _, flags, _ = options(export(run, "vbench-i2v", epath.Path(tmp_path / "out"), "number"), "tuned")
    pairs = vbench_pairs(flags["videos_path"], flags["custom_image_folder"])
    seeds, prompts = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("seeds", "prompts"))
    pairs = {name: (prompts[name], *files) for name, (_, *files) in pairs.items()}
    check(run, pairs, seeds, "tuned", lambda name: int(name.split("-")[0]))


@pytest.mark.parametrize("way", ["base", "tuned"])
def test_opens2v_finds_to_each_video_its_entry_and_its_image(run, tmp_path, way):
    dst = tmp_path / "for OpenS2V"
    script, flags, _ = options(export(run, "opens2v", epath.Path(dst)), way)
    assert script == "get_facesim.py"
    assert Path(flags["output_json_file"]) == dst / "results" / way / "facesim.json"
    names = ("input_video_folder", "input_image_folder", "input_json_file")
    pairs = opens2v_pairs(**{name: flags[name] for name in names})
    seeds = json.loads((dst / "seeds.json").read_text())
    check(run, pairs, seeds, way, lambda name: int(re.fullmatch(r"singleface_(\d+)\.mp4", name)[1]) - 1)


@pytest.mark.parametrize(
    ("clips", "message"),
    [
        (
            [("a", 0), ("a/b", 1)],
            r"clip 1: prompt 'a/b' holds '/', which no file's name can; --names=number names files",
        ),
        ([("a\nb", 0)], r"clip 0: prompt 'a\\nb' holds '\\n', which no"),
        ([("", 0)], "clip 0: prompt '' is no name of a file"),
        ([("...", 0)], "clip 0: prompt '...' is no name of a file"),
        ([("é" * 125, 0)], r"clip 0: prompt 'é{57}\.\.\.' makes a file's name of 256 bytes, expected at most 255"),
        ([("a", 0), ("b", 0), ("a", 1)], "clip 2: prompt 'a' is clip 0's too, which begins with another image"),
    ],
)
def test_prompts_that_vbench_could_not_tell_apart_or_read_are_refused(tmp_path, clips, message):
    run = evaluated(tmp_path / "run", clips)
    with pytest.raises(UserError, match=message):
        export(run, "vbench-i2v", epath.Path(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["run"]
    # OpenS2V names files by keys of its own.
    export(run, "opens2v", epath.Path(tmp_path / "out"))


def test_the_longest_prompt_that_can_name_a_file_does(tmp_path):
    run = evaluated(tmp_path / "run", [("x" * 249, 0)])
    export(run, "vbench-i2v", epath.Path(tmp_path / "out"))
    assert (tmp_path / "out" / "base" / f"{'x' * 249}-0.mp4").is_file()


def missing(run):
    (run.path / "evaluation" / "001_tuned.mp4").unlink()


def cut(run):
    file = run.path / "evaluation" / "001_base.mp4"
    file.write_bytes(file.read_bytes()[:100])


def change(run, edit):
    result = json.loads(run.evaluation.read_text())
    edit(result["clips"])
    run.evaluation.write_text(json.dumps(result))


def outside(run):
    change(run, lambda clips: clips[0]["base"].update(file="../secret.mp4"))


DAMAGE = {
    "no evaluation": (
        lambda run: run.evaluation.unlink(),
        "evaluation.json: no such file, expected a run that was evaluated: python -m rfl_jax.evaluate --workdir=",
    ),
    "a missing video": (missing, "001_tuned.mp4: no such video, which evaluation.json names"),
    "a video that is cut off": (cut, "001_base.mp4: expected a readable video"),
    "a file elsewhere": (outside, "evaluation.json: ../secret.mp4 lies outside the run's folder"),
    "no clips": (lambda run: change(run, list.clear), "evaluation.json: expected the clips of an evaluation"),
    "no prompt": (
        lambda run: change(run, lambda clips: clips[1].pop("prompt")),
        "evaluation.json: expected the clips of an evaluation, with prompts and files",
    ),
    "a prompt that is none": (
        lambda run: change(run, lambda clips: clips[1].update(prompt=3)),
        "evaluation.json: expected the clips of an evaluation, with prompts and files",
    ),
}


@pytest.mark.parametrize("benchmark", BENCHMARKS)
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_evaluation_that_is_not_whole_is_refused(run, tmp_path, benchmark, damage):
    harm, message = DAMAGE[damage]
    harm(run)
    with pytest.raises(UserError, match=re.escape(message)):
        export(run, benchmark, epath.Path(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["a run"]


def test_only_a_new_or_empty_folder_is_written_to(run, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name, message in (
        ("taken", "taken: is not empty, expected a new or empty folder"),
        ("file", "file: is a file, expected a new or empty folder"),
        ("file/out", r"file/out: cannot be written \("),
        ("x" * 300, r"x: cannot be written \(File name too long\)"),
    ):
        with pytest.raises(UserError, match=f"--dst: .*{message}"):
            export(run, "opens2v", epath.Path(tmp_path / name))
    with pytest.raises(UserError, match="--dst: gs://bucket/x: expected a new or empty folder on this machine"):
        export(run, "opens2v", epath.Path("gs://bucket/x"))
    assert (tmp_path / "taken" / "mine").read_text() == (tmp_path / "file").read_text() == "mine"
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    export(run, "opens2v", epath.Path(tmp_path / "link"))
    found = sorted(p.name for p in (tmp_path / "empty").iterdir())
    assert found == ["Images", "base", "prompts.json", "seeds.json", "tuned"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a run", "empty", "file", "link", "taken"]


def test_what_is_interrupted_leaves_nothing(run, tmp_path, monkeypatch):
    written = []

    def interrupted(file, content):
        if written:
            raise KeyboardInterrupt
        written.append(file)
        return len(content)

    (tmp_path / "out").mkdir()
    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export(run, "vbench-i2v", epath.Path(tmp_path / "out"))
    assert written[0].parent.is_dir() is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a run", "out"]
    assert not any((tmp_path / "out").iterdir())


def command(*arguments):
    # No device is asked for: a backend that cannot be opened would fail.
    environment = os.environ | {"JAX_PLATFORMS": "none"}
    words = [sys.executable, "-m", "rfl_jax.evaluate", *map(str, arguments)]
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


def test_the_command_prints_what_scores_both(run, tmp_path):
    done = command(f"--workdir={run}", "--export=vbench-i2v", f"--dst={tmp_path / 'out'}")
    assert (done.returncode, done.stderr) == (0, "")
    written, scores, following = done.stdout.splitlines()
    assert written == f"written: {tmp_path / 'out'}/; in a clone of Vchitect/VBench:"
    assert following == f"next: python -m rfl_jax.report '{run}' -o report.html"
    # What a shell gives the scripts, in the place of python one that tells its arguments.
    (tmp_path / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (tmp_path / "python").chmod(0o755)
    told = subprocess.run(
        ["sh", "-c", scores], env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, capture_output=True, text=True, check=True
    ).stdout.split("evaluate_i2v.py\n")[1:]
    for way, words in zip(("base", "tuned"), told, strict=True):
        given = dict(word.removeprefix("--").split("=", 1) for word in words.splitlines() if "=" in word)
        assert len(vbench_pairs(given["videos_path"], given["custom_image_folder"])) == len(CLIPS)
        assert given["output_path"].endswith(f"/results/{way}")


def test_what_a_benchmark_does_not_have_is_refused(run, tmp_path):
    for benchmark, naming_by, message in (
        ("vbench", "", r"--export: vbench: expected vbench-i2v or opens2v, did you mean vbench-i2v\?"),
        ("opens2v", "number", "--names: of vbench-i2v only"),
        ("opens2v", "prompt", "--names: of vbench-i2v only"),
        ("vbench-i2v", "clip", "--names: clip: expected prompt or number"),
    ):
        with pytest.raises(UserError, match=message):
            export(run, benchmark, epath.Path(tmp_path / "out"), naming_by)
    assert not (tmp_path / "out").exists()


def test_the_commands_arguments_are_refused_in_one_line(run, tmp_path):
    out = f"--dst={tmp_path / 'out'}"
    for arguments, message in (
        (("--export=vbench", out), "--export: vbench: expected vbench-i2v or opens2v"),
        (("--export=opens2v",), "--dst: expected a folder to write to"),
        (("--export=opens2v", out, "--step=best"), "--step: not with --export"),
        ((out,), "--dst: of --export only"),
    ):
        done = command(f"--workdir={run}", *arguments)
        assert (done.returncode, done.stderr.count("\n")) == (2, 1), done.stderr
        assert done.stderr.startswith(f"evaluate: {message}")
    assert not (tmp_path / "out").exists()
