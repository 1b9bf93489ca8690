"""The page of a run in a real browser: videos play, plots have content, numbers are evaluation.json's, nothing is missing."""

import base64
import dataclasses
import json
import re
import shlex

import numpy as np
import pytest
from etils import epath

from rfl_jax.data.videos import write_video
from rfl_jax.errors import UserError
from rfl_jax.evaluation.measures import MEASURES
from rfl_jax.reporting import collect
from rfl_jax.reporting.animation import _frames
from rfl_jax.reporting.collect import embed, read_run
from rfl_jax.reporting.page import render, verdict
from rfl_jax.runs import RunFolder
from tests.reporting.conftest import CLIPS, FRAMES, HOSTILE, SIZE, moving, report


def opened(driver, file, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 500}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    driver.get(f"file://{file}")


def waits_for(driver, condition):
    """Until a script's result, or a function's, is true."""
    from selenium.webdriver.support.ui import WebDriverWait

    ask = condition if callable(condition) else lambda d: d.execute_script(condition)
    return WebDriverWait(driver, 30).until(ask)


def pressed(driver, *keys):
    from selenium.webdriver import ActionChains

    ActionChains(driver).send_keys(*keys).perform()


def rectangles(driver, query):
    """Left, top, right and bottom of what is found in the first clip."""
    return driver.execute_script(
        "return [...document.querySelector('.clip').querySelectorAll(arguments[0])].map(e => e.getBoundingClientRect())"
        ".map(r => [r.left, r.top, r.right, r.bottom])",
        query,
    )


def plays_in_step(driver, clip):
    """Videos in sight play, and what stands over and under them is the evaluation's of the frame that they are at."""
    driver.execute_script("document.querySelector('.clip').scrollIntoView()")
    waits_for(
        driver, "const v = document.querySelector('.clip video'); return !v.paused && v.currentTime > 0 && v.videoWidth"
    )
    assert driver.execute_script("return document.querySelector('.clip video').videoWidth") == SIZE
    waits_for(driver, "return +document.querySelector('.ways').dataset.at > 1")
    driver.execute_script("document.getElementById('play').click()")
    waits_for(driver, "return [...document.querySelectorAll('video')].every(v => v.paused)")
    for at in (3, FRAMES - 1):
        driver.execute_script(
            "const s = document.querySelector('.seek input'); s.value = arguments[0]; s.dispatchEvent(new Event('input'))", at
        )  # fmt: skip
        waits_for(driver, f"return document.querySelector('.ways').dataset.at === '{at}'")
        frames = driver.execute_script(
            "return [...document.querySelector('.clip').querySelectorAll('video')]"
            f".map(v => Math.floor(v.currentTime / v.duration * {FRAMES}))"
        )
        assert frames == [at] * 3
        said = driver.execute_script(
            "return [...document.querySelector('.clip').querySelectorAll('.now')].map(e => e.textContent)"
        )
        heads, curves = rectangles(driver, ".head"), rectangles(driver, ".curve")
        boxes, screens = rectangles(driver, ".box"), rectangles(driver, ".screen")
        for i, way in enumerate(("reference", "base", "tuned")):
            value, box = (clip[way]["frames"][name][at] for name in ("judge_sim", "box"))
            assert said[i] == ("no face" if value is None else f"{value:.3f}")
            left, _, right, _ = curves[i]
            assert heads[i][0] == pytest.approx(left + at / (FRAMES - 1) * (right - left), abs=1)
            left, top, right, _ = screens[i]
            drawn = np.subtract(boxes[i], [left, top, left, top]) * SIZE / (right - left)
            if box is None:
                assert boxes[i] == [0, 0, 0, 0]
            else:
                np.testing.assert_allclose(drawn, box, atol=0.2)
    assert clip["tuned"]["frames"]["box"][-1] is None
    # A curve takes its video to where it is pressed.
    driver.execute_script("""
        const curve = document.querySelector('.curve'), { left, width } = curve.getBoundingClientRect();
        curve.dispatchEvent(new PointerEvent('pointerdown', { clientX: left + width / 4, buttons: 1 }));
    """)
    waits_for(driver, f"return document.querySelector('.ways').dataset.at === '{(FRAMES - 1) // 4}'")
    # It has a point for each frame with a face.
    line = driver.execute_script(
        "return [...document.querySelector('.clip').querySelectorAll('.curve .tuned')].map(e => e.getAttribute('d'))"
    )
    assert len(re.findall(r"[ML]", line[0])) == FRAMES - 1


def compares(driver):
    """Before and after lie over each other, and the slider, which keys move, says how much is seen of which."""
    assert rectangles(driver, ".base .screen") == rectangles(driver, ".tuned .screen")
    ((left, top, right, bottom),) = rectangles(driver, ".wipe input")
    # Where an element is clipped it is not found.
    side = """
        document.querySelector('.wipe').style.pointerEvents = 'none';
        const found = document.elementFromPoint(arguments[0], arguments[1]).closest('figure').className;
        document.querySelector('.wipe').style.pointerEvents = '';
        return found;
    """

    def seen(share):
        return driver.execute_script(side, left + share * (right - left), top + 0.9 * (bottom - top))

    assert [seen(0.45), seen(0.55)] == ["base", "tuned"]
    driver.execute_script("document.querySelector('.wipe input').focus()")
    pressed(driver, *["\ue014"] * 20)  # the right arrow
    assert [seen(0.65), seen(0.75)] == ["base", "tuned"]
    # So does a press on the picture.
    driver.execute_script(
        "arguments[0].scrollIntoView({ block: 'center' })", driver.find_element("css selector", ".wipe")
    )
    ((left, top, right, bottom),) = rectangles(driver, ".wipe input")
    x, y = left + 0.25 * (right - left), (top + bottom) / 2
    for kind in ("mousePressed", "mouseReleased"):
        driver.execute_cdp_cmd(
            "Input.dispatchMouseEvent", {"type": kind, "x": x, "y": y, "button": "left", "clickCount": 1}
        )
    assert [seen(0.2), seen(0.3)] == ["base", "tuned"]


def answers_keys(driver):
    """Keys do what is said of them, unless they are switched off or belong to what has the focus."""

    def state():
        return driver.execute_script("""return [
            document.getElementById('play').textContent, document.querySelector('main').className,
            document.activeElement.dataset.clip, document.querySelector('.ways').dataset.at]""")

    clips = driver.execute_script("return [...document.querySelectorAll('.clip')].map(c => c.dataset.clip)")
    driver.execute_script("document.activeElement.blur()")
    for keys, expected in (
        ("j", ["Pause", "slide", clips[1], None]),
        ("k", ["Pause", "slide", clips[0], None]),
        ("b", ["Pause", "slide bare", clips[0], None]),
        ("bs", ["Pause", "", clips[0], None]),
        ("s ", ["Play", "slide", clips[0], None]),
    ):
        if expected[0] == "Pause" and state()[0] == "Play":
            pressed(driver, " ")
        pressed(driver, keys)
        assert state()[:3] == expected[:3]
    # What is told of the frame follows the pause with the next picture.
    waits_for(
        driver,
        "const v = document.querySelector('.clip video');"
        f"return +document.querySelector('.ways').dataset.at === Math.floor(v.currentTime / v.duration * {FRAMES})",
    )
    at = int(state()[3])
    pressed(driver, "\ue014" if at < FRAMES - 1 else "\ue012")
    waits_for(driver, f"return Math.abs(document.querySelector('.ways').dataset.at - {at}) === 1")
    # What has the focus is seen to have it.
    assert driver.execute_script("return getComputedStyle(document.activeElement).outlineStyle") == "solid"
    driver.execute_script("document.getElementById('keys').click()")
    before = state()
    pressed(driver, "bsj ")
    assert state() == before
    driver.execute_script("document.getElementById('keys').click()")


def prints(driver):
    """On paper before and after stand beside each other, as pictures."""
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    assert driver.execute_script(
        "return [...document.querySelectorAll('video, .bar, .seek, .wipe')].every(e => getComputedStyle(e).display === 'none')"
    )
    assert driver.execute_script("return [...document.images].map(i => i.naturalWidth)") == [SIZE] * 3 * CLIPS
    (_, before, after), texts = (
        rectangles(driver, "img"),
        driver.execute_script("return [...document.images].map(i => i.alt)"),
    )
    assert before[2] < after[0]
    assert before[3] - before[1] == pytest.approx(before[2] - before[0], abs=1)
    assert [text.rpartition(", ")[2] for text in texts[:3]] == [
        f"{name}: the frame in the middle" for name in ("real clip", "before", "after")
    ]
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@pytest.mark.parametrize("width", [1280, 390])
def test_the_page_plays_and_shows_in_a_browser(folder, browser, tmp_path, width):
    from axe_core_python.selenium import Axe

    page = tmp_path / "report.html"
    done = report(folder, "-o", page)
    assert done.returncode == 0, done.stderr
    export = shlex.join(["python", "-m", "rfl_jax.export", "--workdir", str(folder), "--dst", "lora.safetensors"])
    assert done.stdout.splitlines()[-1] == f"next: {export}"
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

    # The best first, then from the worst on, each with its three videos.
    order = browser.execute_script("return [...document.querySelectorAll('.clip')].map(c => c.dataset.clip)")
    gains = {c["video"]: c["tuned"]["judge_sim"] - c["base"]["judge_sim"] for c in result["clips"]}
    *others, best = sorted(gains, key=gains.get)
    assert order == [best, *others]
    assert browser.execute_script("return document.querySelectorAll('video').length") == 3 * CLIPS
    ranks = browser.execute_script("return [...document.querySelectorAll('.rank')].map(r => r.textContent)")
    assert ranks == ["gains most", "gains least"]

    plays_in_step(browser, next(clip for clip in result["clips"] if clip["video"] == best))
    compares(browser)
    answers_keys(browser)
    prints(browser)
    # A check of accessibility by others' rules: nothing that they find serious.
    found = Axe().run(browser)["violations"]
    assert [(v["id"], v["nodes"]) for v in found if v["impact"] in ("serious", "critical")] == []

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
    assert console == []
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

    # Who wants no motion gets none: the frames in the middle, until Play is pressed.
    browser.execute_cdp_cmd(
        "Emulation.setEmulatedMedia", {"features": [{"name": "prefers-reduced-motion", "value": "reduce"}]}
    )
    browser.get(f"file://{page}")
    browser.execute_script("document.querySelector('.clip').scrollIntoView()")
    waits_for(browser, f"return document.querySelector('.ways').dataset.at === '{FRAMES // 2}'")
    assert browser.execute_script("return [...document.querySelectorAll('video')].every(v => v.paused)")
    browser.execute_script("document.getElementById('play').click()")
    waits_for(browser, f"return document.querySelector('.ways').dataset.at !== '{FRAMES // 2}'")

    # A run that is not evaluated shows its samples by the same means.
    (folder / "evaluation.json").unlink()
    write_video(folder / "samples" / "step_000001.mp4", moving(0, 1)[0])
    page.write_text(render(read_run(RunFolder(folder)), most=3))
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    browser.get(f"file://{page}")
    browser.execute_script("document.querySelector('.clip').scrollIntoView()")
    waits_for(browser, "return document.querySelector('video').currentTime > 0")
    pressed(browser, " ")
    assert browser.execute_script("return document.querySelector('video').paused")
    assert [entry for entry in browser.get_log("browser") if entry["level"] in ("SEVERE", "WARNING")] == []


def test_names_and_prompts_stay_text_and_only_the_pages_own_script_runs(folder):
    page = render(read_run(RunFolder(folder)), most=CLIPS)
    assert page.count("&lt;img src=x onerror=") >= 2 * CLIPS
    assert "<img src=x" not in page
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


def test_the_page_tells_the_licences_of_the_face_networks(folder):
    page = render(read_run(RunFolder(folder)), most=0)
    assert re.search(r"licence, detector</th><td>somebody&#39;s detector: research only</td>", page)
    assert re.search(r"licence, embedder</th><td>unknown licence &amp; no name</td>", page)
    # Earlier releases did not write them.
    about = json.loads((folder / "run.json").read_text())
    del about["licences"]
    (folder / "run.json").write_text(json.dumps(about))
    assert "licence," not in render(read_run(RunFolder(folder)), most=0)


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
    content = base64.b64decode(embed(file).source.partition(",")[2])
    assert len(content) < file.stat().length / 2
    small = epath.Path(tmp_path / "small.mp4")
    small.write_bytes(content)
    import av

    with av.open(str(small)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert np.stack(frames).shape == (9, 480, 240, 3)


def test_videos_are_shown_whatever_bytes_their_tags_are_of(tmp_path, monkeypatch):
    plain, broken = epath.Path(tmp_path / "plain.mp4"), epath.Path(tmp_path / "broken.mp4")
    write_video(plain, np.random.default_rng(0).integers(0, 255, (9, 64, 64, 3), np.uint8), fps=24)
    assert b"Lavf" in plain.read_bytes()  # the tag that says who made it
    broken.write_bytes(plain.read_bytes().replace(b"Lavf", b"\xff\xfe\x80\xc3"))
    assert embed(broken).poster == embed(plain).poster
    monkeypatch.setattr(collect, "EMBEDDED_BYTES", 0)
    assert embed(broken) == embed(plain)
    assert _frames(broken, 64) == _frames(plain, 64)


@pytest.mark.parametrize("judged", ["average", "raw"])
def test_the_page_tells_which_weights_were_judged(folder, judged):
    run = read_run(RunFolder(folder))
    run = dataclasses.replace(
        run, about={**run.about, "tuned": "average"}, evaluation={**run.evaluation, "weights": judged}
    )
    page = render(run, most=CLIPS)
    assert ("judged and handed on" in page) == (judged == "average")
    assert ("evaluate --raw" in page) == (judged == "raw")


@pytest.mark.parametrize(
    ("better", "interval", "colour"),
    [
        ("higher", [0.1, 0.2], "good"), ("higher", [-0.2, -0.1], "bad"), ("lower", [-0.2, -0.1], "good"), ("lower", [0.1, 0.2], "bad"),
        # What may be chance, what is neither better nor worse, and one clip, which tells no interval.
        ("higher", [-0.1, 0.2], ""), ("lower", [0.0, 0.2], ""), ("", [0.1, 0.2], ""), ("higher", None, ""),
    ],
)  # fmt: skip
def test_a_change_has_a_colour_where_its_interval_leaves_out_zero(better, interval, colour):
    assert verdict(better, interval) == colour


def test_what_is_no_run_is_refused_in_one_line(refused, folder, tmp_path):
    for arguments, message in (
        ([tmp_path], "expected the folder of a run"),
        ([folder, "-o", tmp_path], "is a folder, expected a file"),
        ([folder, "--gallery", "-1"], "--gallery: expected a number of at least 0"),
        ([folder, "--galery", "1"], "--galery"),
    ):
        assert message in refused(*arguments)
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
