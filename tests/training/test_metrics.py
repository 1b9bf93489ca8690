"""Figures reach metrics.jsonl, TensorBoard and Weights & Biases; one live line; a step's time is divided by its phases."""

import dataclasses
import io
import json
import struct
import time

import numpy as np
import pytest
from etils import epath
from PIL import Image
from tensorboardX.proto.event_pb2 import Event

from rfl_jax.config import Config
from rfl_jax.errors import UserError
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.phases import PHASES
from rfl_jax.training import record as record_module
from rfl_jax.training.profile import phases_of, self_times, shares
from rfl_jax.training.record import check_wandb, open_record
from tests.runs import read_metrics, train_run


def line(step, **more):
    names = ("loss", "face_score", "kl_loss", "grad_norm", "no_face_fraction", "learning_rate", "step_time_s")
    return {"step": step, **dict.fromkeys(names, 0.5), "mfu": None, **more}


def clip(value=0):
    return np.full((5, 16, 32, 3), value, np.uint8)


class Terminal(io.StringIO):
    def isatty(self):
        return True


def events(folder):
    """Summaries of TensorBoard's event file: records of a length, its checksum, and data with its own."""
    (file,) = folder.iterdir()
    data, at, found = file.read_bytes(), 0, []
    while at < len(data):
        (length,) = struct.unpack_from("<Q", data, at)
        event = Event.FromString(data[at + 12 : at + 12 + length])
        found += [(event.step, value) for value in event.summary.value]
        at += length + 16
    return found


def test_figures_and_samples_reach_tensorboard(tmp_path):
    folder = RunFolder(epath.Path(tmp_path))
    with open_record(Config(logging_steps=2), folder, start=0, total=4) as out:
        for step in (1, 2, 3, 4):
            out.write(line(step, **({"eval_face_sim": 0.25, "alarm": "motion fell"} if step == 3 else {})))
        out.video(4, np.stack([clip(40 * t)[0] for t in range(5)]))
    assert folder.sample(4).exists()
    found = events(tmp_path / "tensorboard")
    # Every second step, and the one that was validated; what is text or unknown is no scalar.
    assert [step for step, value in found if value.tag == "loss"] == [2, 3, 4]
    assert [(step, value.simple_value) for step, value in found if value.tag == "eval_face_sim"] == [(3, 0.25)]
    assert not {"mfu", "alarm", "step"} & {value.tag for _, value in found}
    ((step, sample),) = [(step, value) for step, value in found if value.tag == "sample"]
    picture = Image.open(io.BytesIO(sample.image.encoded_image_string))
    assert (step, picture.n_frames, picture.size) == (4, 5, (32, 16))
    picture.seek(3)
    assert np.abs(np.asarray(picture.convert("RGB")).astype(int) - 120).max() < 3
    assert [entry["step"] for entry in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_one_line_lives_on_a_terminal_and_nothing_elsewhere(tmp_path, monkeypatch):
    monkeypatch.delenv("CI", raising=False)

    def output(stream, folder, **environment):
        monkeypatch.setattr("sys.stderr", stream)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        (tmp_path / folder).mkdir()
        with open_record(Config(), RunFolder(epath.Path(tmp_path / folder)), start=0, total=3) as out:
            for step in (1, 2, 3):
                out.write(line(step))
            out.note("ALARM at step 3: motion fell")
            out.saved(3)
        return stream.getvalue()

    live = output(Terminal(), "live")
    assert "3/3" in live
    assert "face 0.5000" in live
    # Written over, except where a line that stays makes room.
    assert live.count("\n") == 2
    assert "ALARM at step 3: motion fell\n" in live
    assert "step 3/3  face" not in live
    quiet = ["ALARM at step 3: motion fell", "step 3/3  face 0.5000  loss +0.5000  kl 5.00e-01  grad 5.00e-01  0.50 s"]
    assert output(io.StringIO(), "piped").splitlines() == quiet
    assert output(Terminal(), "ci", CI="true").splitlines() == quiet


def test_weights_and_biases_is_told_where_it_is_asked_for(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    cfg = Config(wandb_project="faces")
    check_wandb(cfg)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    with open_record(cfg, RunFolder(epath.Path(tmp_path)), start=0, total=2) as out:
        out.write(line(1))
        out.write(line(2, eval_judge_sim=0.625))
        out.video(2, clip())
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # Its own process writes, and may be a moment behind.
    for _ in range(200):
        content = log.read_bytes()
        if b"sample" in content:
            break
        time.sleep(0.1)
    for word in (b"face_score", b"eval_judge_sim", b"faces", b"lora_rank", b"sample"):
        assert word in content
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/videos/*.mp4"))

    monkeypatch.setattr(record_module.importlib.util, "find_spec", lambda name: None)
    check_wandb(Config())
    with pytest.raises(UserError, match=r"config.wandb_project: expected .* pip install wandb"):
        check_wandb(cfg)


def test_the_time_of_a_step_is_divided_by_phase(settings, tmp_path):
    cfg = settings(max_steps=3, save_steps=3, **{"profile.steps": "2-3", "noise.prefix_cache": "off"})
    train_run(cfg, tmp_path)
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["steps"] == [2, 3]
    times = [entry["step_time_s"] for entry in map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())]
    assert found["step_time_s"] == pytest.approx(np.mean(times[1:]))
    assert sum(found["phases"].values()) == pytest.approx(found["step_time_s"])
    # Every phase took time. What the compiler adds of its own (copies, broadcasts) belongs to none.
    assert set(PHASES) <= set(found["phases"])
    assert found["phases"].get("other", 0) < 0.5 * found["step_time_s"]
    assert found["phases"]["vae"] > found["phases"]["optimizer"]
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    # Tracing changes nothing that is computed.
    (tmp_path / "plain").mkdir()
    train_run(dataclasses.replace(cfg, profile=Config().profile), tmp_path / "plain")
    assert read_metrics(tmp_path / "plain") == read_metrics(tmp_path)
    assert not (tmp_path / "plain" / "profile.json").exists()


@dataclasses.dataclass
class Part:
    """A plane, a line or an event of a trace."""

    name: str
    planes: list = dataclasses.field(default_factory=list)
    lines: list = dataclasses.field(default_factory=list)
    events: list = dataclasses.field(default_factory=list)
    stats: tuple = ()
    start_ns: int = 0
    duration_ns: int = 0


PROGRAM = """HloModule jit_step, entry
  %fusion.1 = f32[8] fusion(%p), metadata={op_name="jit(step)/while/body/rfl.grad_steps/add" source_line=1}
  ROOT %dot.2 = f32[8] dot(%p), metadata={op_name="jit(step)/transpose(jvp(rfl.vae))/dot_general"}
  while.3 = f32[8] while(%p), metadata={op_name="jit(step)/while"}
  copy.4 = f32[8] copy(%p), metadata={op_name="jit(step)/copy"}
"""


def test_operators_are_counted_once_and_on_the_accelerator_if_there_is_one():
    phases = phases_of([PROGRAM])
    assert phases["jit_step", "fusion.1"] == "grad_steps"
    assert phases["jit_step", "dot.2"] == "vae"
    assert phases["jit_step", "copy.4"] == "other"
    # A loop of 100 holds two operators and one inside another.
    nested = [(0, 100, "m", "while.3"), (0, 40, "m", "dot.2"), (10, 20, "m", "fusion.1"), (50, 70, "m", "copy.4")]
    assert sorted(self_times(nested)) == [
        ("m", "copy.4", 20),
        ("m", "dot.2", 30),
        ("m", "fusion.1", 10),
        ("m", "while.3", 40),
    ]

    def event(name, start, duration, **stats):
        return Part(name, stats=tuple(stats.items()), start_ns=start, duration_ns=duration)

    operators = [
        event("%while.3 = f32[8] while(...)", 0, 100),
        event("%fusion.1 = f32[8] fusion(...)", 0, 60),
        event("%dot.2 = f32[8] dot(...)", 60, 20),
        event("%unknown.9 = f32[8] add(...)", 100, 20),
    ]
    tpu = Part("/device:TPU:0", lines=[Part("XLA Ops", events=operators), Part("Steps", events=[event("1", 0, 999)])])
    host = Part("/host:CPU", lines=[Part("t", events=[event("x", 0, 500, hlo_op="dot.2", hlo_module="jit_step")])])
    found = shares([Part("trace", planes=[host, tpu])], phases)
    assert found == {"grad_steps": 0.6, "vae": 0.2, "other": 0.2}
    assert shares([Part("trace", planes=[host])], phases) == {"vae": 1.0}
    # libtpu without a TPU.
    assert shares([Part("trace", planes=[Part("/device:CUSTOM:Megascale Trace"), host])], phases) == {"vae": 1.0}
    # What another program does at that time is not the step's.
    other = Part("/host:CPU", lines=[Part("t", events=[event("x", 0, 500, hlo_op="dot.2", hlo_module="jit_other")])])
    assert shares([Part("trace", planes=[other])], phases) == {"other": 1.0}
