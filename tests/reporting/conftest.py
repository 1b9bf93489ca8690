"""A finished run of drawn squares, the command that reports it, and a real browser."""

import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from rfl_jax.config import default_config, dumps, parse
from rfl_jax.data.videos import write_video
from rfl_jax.errors import refuse_in_one_line
from rfl_jax.evaluation.evaluate import summary
from rfl_jax.evaluation.measures import MEASURES, Scored
from rfl_jax.report import main as report_main
from rfl_jax.training.validation import alarm

CLIPS, FRAMES, SIZE = 5, 9, 64
HOSTILE = """<img src=x onerror="document.title='hit'"> ' "></video><script>document.title='hit'</script>"""
CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def moving(seed, speed):
    """A square that moves over noise, and where it is."""
    rng = np.random.default_rng(seed)
    video = np.repeat(rng.integers(0, 80, (1, SIZE, SIZE, 3), np.uint8), FRAMES, 0)
    boxes = np.zeros((FRAMES, 4))
    for t in range(FRAMES):
        x, y = 10 + round(speed * t), 20
        video[t, y : y + 20, x : x + 16] = (220, 180, 150)
        boxes[t] = x, y, x + 16, y + 20
    corners = boxes[:, [[0, 1], [2, 1], [0, 3], [2, 3]]]
    return video, boxes, np.concatenate([corners, corners.mean(1, keepdims=True)], 1)


def scored(seed, speed, level):
    video, boxes, kps = moving(seed, speed)
    rng = np.random.default_rng(seed)
    face, judge = (level + rng.uniform(-0.1, 0.1, FRAMES) for _ in range(2))
    mask = np.ones(FRAMES, bool)
    mask[FRAMES - 1] = seed % 2 == 0
    return Scored(video, face, judge, mask, kps, boxes)


@pytest.fixture
def folder(tmp_path):
    """A finished run as training leaves it, of drawn squares."""
    run = epath.Path(tmp_path / "a run & <its> page")
    run.mkdir()
    config = default_config()
    config.preset = "mini"
    config.seed = 7
    (run / "config.json").write_text(dumps(parse(config)))
    about = {
        "started": "2026-01-01T00:00:00+00:00", "versions": {"jax": "0.0"}, "steps": 30,
        "devices": {"kind": "cpu", "count": 8, "processes": 2, "mesh": {"data": 2, "fsdp": 2, "context": 2}},
        "weights": {"dit": {"high.safetensors": "abc"}}, "trained_parameters": {"dit2": 1234},
        "clips": {"trained_on": 4, "held_out": CLIPS},
        "licences": {"detector": "somebody's detector: research only", "embedder": "unknown licence & no name"},
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(about))
    clips = []
    for i in range(CLIPS):
        found = {"reference": scored(i, 1, 0.9), "base": scored(i, 1, 0.6), "tuned": scored(i + 11, 0.5, 0.5 + 0.1 * i)}
        clip = {"video": f"clip_{i} {HOSTILE}.mp4", "prompt": f"A <b>person</b> & friends. {HOSTILE}"}
        for way, one in found.items():
            write_video(run / "evaluation" / f"{i:03d}_{way}.mp4", one.video)
            clip[way] = {"file": f"evaluation/{i:03d}_{way}.mp4", "frames": one.frames()}
            clip[way] |= one.measures() if way != "reference" else {}
        clips.append(clip)
    result = summary(clips) | {"step": 30}
    (run / "evaluation.json").write_text(json.dumps(result))
    base, now = ({name: result[name][way] for name in MEASURES} for way in ("base", "tuned"))
    cfg = parse(config)
    entry = {"step": 30, **now, "alarm": alarm(base, [now], cfg.eval)}
    (run / "validation.json").write_text(
        json.dumps({"clips": [], "base": base, "validations": [entry], "best_step": 30})
    )
    rng = np.random.default_rng(0)
    names = ("loss", "face_score", "kl_loss", "grad_norm", "no_face_fraction", "learning_rate", "step_time_s")
    lines = [{"step": s, **{name: float(rng.uniform(0.1, 1)) for name in names}, "mfu": None} for s in range(1, 31)]
    lines[-1] |= {f"eval_{name}": now[name] for name in ("face_sim", "judge_sim", "motion", "copying")}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (run / "profile.json").write_text(json.dumps({"phases": {"grad_steps": 1.5, "vae": 0.5}}))
    return run


def report(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "rfl_jax.report", *map(str, arguments)], capture_output=True, text=True, check=False
    )


@pytest.fixture
def refused(monkeypatch, capsys):
    """`refused(*arguments)` is the line in which the command refuses them, with exit status 2; in this process, which takes no time."""

    def refused(*arguments):
        monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop, refuse_in_one_line("report"):
            report_main()
        assert stop.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1
        return line

    return refused


@pytest.fixture
def browser():
    if not CHROMIUM or not DRIVER:
        pytest.skip("needs chromium and chromedriver")
    webdriver = pytest.importorskip("selenium.webdriver")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for name in (
        "headless=new", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", "disable-quic", "no-first-run",
        "disable-background-networking", "disable-component-update", "disable-sync",
    ):  # fmt: skip
        options.add_argument(f"--{name}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()
