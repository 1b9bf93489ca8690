"""The page of a run in a real browser: videos play, plots have content, numbers are evaluation.json's, nothing is missing."""

import base64
import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from rfl_jax.config import default_config, dumps, parse
from rfl_jax.data.videos import write_video
from rfl_jax.errors import UserError
from rfl_jax.evaluation.evaluate import summary
from rfl_jax.evaluation.measures import MEASURES, Scored
from rfl_jax.reporting import collect
from rfl_jax.reporting.collect import embed, read_run
from rfl_jax.reporting.page import render
from rfl_jax.runs import RunFolder
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
    }  # fmt: skip
    (run / "run.json").write_text(json.dumps(about))
    clips = []
    for i in range(CLIPS):
        found = {"reference": scored(i, 1, 0.9), "base": scored(i, 1, 0.6), "tuned": scored(i + 10, 0.5, 0.5 + 0.1 * i)}
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


def opened(driver, file, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(f"file://{file}")


def waits_for(driver, condition):
    """Until a script's result, or a function's, is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    ask = condition if callable(condition) else lambda d: d.execute_script(condition)
    return WebDriverWait(driver, 30).until(ask)


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_plays_and_shows_in_a_browser(folder, browser, tmp_path, width):
    page = tmp_path / "report.html"
    done = report(folder, "-o", page)
    assert done.returncode == 0, done.stderr
    opened(browser, page, width)

    # The numbers are the evaluation's, and nothing in names or prompts became markup.
    result = json.loads((folder / "evaluation.json").read_text())
    for name in MEASURES:
        for way in ("base", "tuned"):
            cell = browser.execute_script(
                "return document.querySelector(`[data-table=${arguments[0]}][data-way=${arguments[1]}]`).firstChild.data",
                name, way,
            )  # fmt: skip
            assert cell.strip() == f"{result[name][way]:.4f}"
    assert browser.execute_script("return document.querySelector('h1').textContent") == folder.name
    assert f"A <b>person</b> & friends. {HOSTILE}" in browser.execute_script(
        "return document.querySelector('.clip').textContent"
    )

    # Worst first, each with its three videos.
    order = browser.execute_script("return [...document.querySelectorAll('.clip')].map(c => c.dataset.clip)")
    gains = {c["video"]: c["tuned"]["judge_sim"] - c["base"]["judge_sim"] for c in result["clips"]}
    assert order == sorted(gains, key=gains.get)
    assert browser.execute_script("return document.querySelectorAll('video').length") == 3 * CLIPS

    # Those in sight play: time passes, frames are decoded, the box is drawn where the face is.
    browser.execute_script("document.querySelector('.clip').scrollIntoView()")
    waits_for(
        browser,
        "const v = document.querySelector('.clip video'); return !v.paused && v.currentTime > 0 && v.videoWidth",
    )
    assert browser.execute_script("return document.querySelector('.clip video').videoWidth") == SIZE
    waits_for(browser, "return +document.querySelector('.clip video').dataset.frame > 1")
    drawn = """const c = document.querySelector('.clip canvas');
        return c.getContext('2d').getImageData(0, 0, c.width, c.height).data.some((x, i) => i % 4 === 3 && x > 0)"""
    waits_for(browser, drawn)
    browser.execute_script("document.getElementById('boxes').click()")
    waits_for(browser, drawn.replace("return c", "return !c"))
    browser.execute_script("document.getElementById('play').click()")
    waits_for(browser, "return [...document.querySelectorAll('video')].every(v => v.paused)")

    # Plots have lines, and each is as wide as its card.
    charts = browser.execute_script(
        "return [...document.querySelectorAll('.chart')].map(c => [c.querySelectorAll('path').length,"
        " c.querySelector('svg').getBoundingClientRect().width, c.getBoundingClientRect().width])"
    )
    assert len(charts) >= 10
    for paths, inner, outer in charts:
        assert paths > 10
        assert 0.8 * outer < inner < outer
    # Nothing sticks out, nothing is asked of a network, nothing complains.
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    console = [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")]
    # That pixels are read back so often is this test's doing.
    assert [entry for entry in console if "getImageData" not in entry["message"]] == []
    asked = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    urls = [m["params"]["request"]["url"] for m in asked if m["method"] == "Network.requestWillBeSent"]
    assert urls
    assert all(url.startswith(("file:", "data:", "blob:")) for url in urls)
    # Even markup that found its way in could do nothing.
    title = browser.execute_script("return document.title")
    assert title == f"{folder.name}: reward feedback run"
    browser.execute_script("""
        document.querySelector('main').insertAdjacentHTML('beforeend', arguments[0]);
        const script = document.createElement('script');
        script.textContent = "document.title = 'hit'";
        document.body.append(script);
    """, HOSTILE)  # fmt: skip
    refused = []

    def counted(_):
        refused.extend(e for e in browser.get_log("browser") if "Content Security Policy" in e["message"])
        return len(refused) >= 3

    waits_for(browser, counted)
    assert browser.execute_script("return document.title") == title


def test_names_and_prompts_stay_text_and_only_the_pages_own_script_runs(folder):
    page = render(read_run(RunFolder(folder)), most=CLIPS)
    assert page.count("&lt;img src=x onerror=") >= 2 * CLIPS
    assert "<img" not in page
    policy = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)">', page)[1]
    assert "default-src 'none'" in policy
    nonce = re.search(r"script-src 'nonce-([\w-]+)'", policy)[1]
    assert set(re.findall(r"<(?:script|style)[^>]*>", page)) == {
        f'<script nonce="{nonce}">', f'<style nonce="{nonce}">', f'<style nonce="{nonce}" type="text/css">'
    }  # fmt: skip
    # Another page, another.
    assert nonce not in render(read_run(RunFolder(folder)), most=0)


def test_the_alarm_is_on_the_page(folder):
    page = render(read_run(RunFolder(folder)), most=0)
    assert "Alarm at step 30" in page
    assert "back to" not in page
    record = json.loads((folder / "validation.json").read_text())
    done = {"action": "lower", "back_to": 20, "learning_rate_factor": 0.5, "kl_factor": 2.0}
    (folder / "validation.json").write_text(json.dumps(record | {"validations": [record["validations"][0] | done]}))
    page = render(read_run(RunFolder(folder)), most=0)
    assert "; back to the weights of step 20, learning rate x 0.5, KL x 2." in page
    record["validations"][0]["alarm"] = ""
    (folder / "validation.json").write_text(json.dumps(record))
    assert "Alarm" not in render(read_run(RunFolder(folder)), most=0)


def test_a_run_that_goes_on_is_shown_as_far_as_it_is(folder):
    for name in ("evaluation.json", "validation.json", "profile.json"):
        (folder / name).unlink()
    write_video(folder / "samples" / "step_000001.mp4", moving(0, 1)[0])
    # The last line is being written.
    with (folder / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 31, "lo')
    page = render(read_run(RunFolder(folder)), most=3)
    assert "step 30 of 30" in page
    assert "Not evaluated yet" in page
    assert page.count("<video") == 1
    (folder / "metrics.jsonl").unlink()
    (folder / "run.json").unlink()
    assert "step 0 of 0" in render(read_run(RunFolder(folder)), most=3)


def test_large_videos_are_made_smaller_for_the_page(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 255, (9, 600, 300, 3), np.uint8)
    file = epath.Path(tmp_path / "large.mp4")
    write_video(file, noise)
    assert file.stat().length > collect.EMBEDDED_BYTES
    content = base64.b64decode(embed(file).partition(",")[2])
    assert len(content) < file.stat().length / 2
    small = epath.Path(tmp_path / "small.mp4")
    small.write_bytes(content)
    import av

    with av.open(str(small)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (9, 480, 240, 3)


def test_what_is_no_run_is_refused_in_one_line(folder, tmp_path):
    for arguments, message in (
        ([tmp_path], "expected the folder of a run"),
        ([folder, "-o", tmp_path], "is a folder, expected a file"),
        ([folder, "--gallery", "-1"], "--gallery: expected a number of at least 0"),
        ([folder, "--galery", "1"], "--galery"),
    ):
        done = report(*arguments)
        assert done.returncode == 2
        assert len(done.stderr.strip().splitlines()) == 1
        assert message in done.stderr
    (folder.parent / "outside.mp4").write_bytes(b"private")
    content = (folder / "evaluation.json").read_text()
    for name in ("../outside.mp4", f"{folder.parent}/outside.mp4", "evaluation/../../outside.mp4", "..\\\\outside.mp4"):
        (folder / "evaluation.json").write_text(content.replace("evaluation/000_base.mp4", name))
        with pytest.raises(UserError, match=r"evaluation\.json: .*outside\.mp4 lies outside the run's folder"):
            render(read_run(RunFolder(folder)), most=CLIPS)
    (folder / "evaluation.json").write_text(content)
    (folder / "evaluation" / "000_base.mp4").unlink()
    with pytest.raises(UserError, match=r"000_base\.mp4: no such video"):
        render(read_run(RunFolder(folder)), most=CLIPS)
    (folder / "evaluation.json").write_text(json.dumps({"face_sim": {"base": 1, "tuned": 1}, "clips": []}))
    with pytest.raises(UserError, match=r"expected statistics, .* rfl_jax\.evaluate"):
        read_run(RunFolder(folder))
    (folder / "evaluation.json").write_text(json.dumps({"statistics": 3, "clips": []}))
    with pytest.raises(UserError, match=r"expected run\.json, .* as it wrote them"):
        render(read_run(RunFolder(folder)), most=CLIPS)
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(UserError, match=r"evaluation\.json: expected a JSON object"):
        read_run(RunFolder(folder))
