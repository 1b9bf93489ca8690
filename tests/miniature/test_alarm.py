"""The miniature as README runs it: it improves without alarm, and without its guard it is flagged. Minutes: run by hand."""

import json
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow


def command(module, *arguments):
    environment = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(
        [sys.executable, "-m", module, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done


def test_a_hacked_run_is_flagged_and_the_normal_one_is_not(tmp_path):
    normal, hacked, cache = tmp_path / "normal", tmp_path / "hacked", f"--config.data.cache_dir={tmp_path / 'cache'}"
    done = command("rfl_jax.train", "--config=configs/mini.py", f"--workdir={normal}", cache)
    assert "ALARM" not in done.stderr + done.stdout
    result = json.loads((normal / "evaluation.json").read_text())
    for figure in ("face_sim", "judge_sim"):
        assert result[figure]["tuned"] > 1.15 * result[figure]["base"]
    assert result["motion"]["tuned"] > 0.85 * result["motion"]["base"]
    assert result["copying"]["tuned"] < 1.05 * result["copying"]["base"]
    assert result["sharpness"]["tuned"] > result["sharpness"]["base"]
    # Another command makes a page with the same numbers, from what the first one's last line says.
    assert f"next: python -m rfl_jax.report {normal}" in done.stdout
    command("rfl_jax.report", normal, "-o", tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert all(f"{result[figure][way]:.4f}" in page for figure in ("judge_sim", "motion") for way in ("base", "tuned"))
    assert "Alarm at step" not in page

    terms = [f"--config.reward.terms.{name}.weight=0" for name in ("motion", "anti_copy")]
    guardless = (*terms, "--config.reward.kl_weight=0")
    short = ("--config.max_steps=20", "--config.eval_every=20")
    done = command("rfl_jax.train", "--config=configs/mini.py", f"--workdir={hacked}", cache, *guardless, *short)
    assert "ALARM at step 20: the reward rose" in done.stderr
    assert "ALARM at step 20: the reward rose" in done.stdout
    lines = [json.loads(line) for line in (hacked / "metrics.jsonl").read_text().splitlines()]
    assert "motion fell" in lines[19]["alarm"]
    command("rfl_jax.report", hacked, "-o", tmp_path / "hacked.html")
    assert "Alarm at step 20" in (tmp_path / "hacked.html").read_text()

    # Going back at an alarm, the same settings end within the alarm's bounds, which are on the clips that it looks at, and with a gain.
    lowered = tmp_path / "lowered"
    looks = ("--config.eval_every=10", "--config.eval.validation_samples=96")
    guarded = (*guardless, "--config.guard.on_alarm=lower", *looks)
    done = command("rfl_jax.train", "--config=configs/mini.py", f"--workdir={lowered}", cache, *guarded)
    assert "back to the weights of step " in done.stdout
    result = json.loads((lowered / "evaluation.json").read_text())
    assert result["motion"]["tuned"] > 0.8 * result["motion"]["base"]
    assert result["judge_sim"]["tuned"] > result["judge_sim"]["base"] + 0.01
