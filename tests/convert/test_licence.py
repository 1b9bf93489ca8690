"""Whose face weights a file holds: by content under any name, else by names, else unknown."""

import shutil
import sys

import pytest

from convert import store
from convert.__main__ import main as convert_main
from convert.licence import _BY_CONTENT, UNKNOWN, licence_of
from rfl_jax.miniature.world import ASSETS, DETECTOR_FILE, EMBEDDER_FILE, JUDGE_FILE
from tests.golden import ROOT, needs_golden

RESEARCH = "non-commercial research only (insightface's README)"
COMMERCIAL = "Apache-2.0, meant for commercial use too (fal's model card)"


@pytest.mark.parametrize(
    ("asset", "whose"),
    [(DETECTOR_FILE, "detector"), (EMBEDDER_FILE, "embedder"), (JUDGE_FILE, "judging embedder")],
)
def test_the_miniatures_files_are_known_under_any_name(tmp_path, asset, whose):
    file = tmp_path / "w600k_r50.onnx"
    shutil.copy(ASSETS / asset, file)
    assert licence_of(str(file)) == f"the miniature's {whose}: Apache-2.0 (NOTICE)"


@needs_golden
def test_a_published_file_is_known_under_any_name(tmp_path):
    file = tmp_path / "glintr100.onnx"
    shutil.copy(ROOT / "face" / "models" / "det_500m.onnx", file)
    assert licence_of(str(file)) == f"buffalo_s' and buffalo_sc's detector: {RESEARCH}"


NAMED = {
    "buffalo_l/w600k_r50.onnx": RESEARCH,
    "faces/w600k_mbf.onnx": RESEARCH,
    "faces/det_10g.onnx": RESEARCH,
    "faces/scrfd_2.5g_bnkps_shape320x320.onnx": RESEARCH,
    "antelopev2/glintr100.onnx": RESEARCH,
    "models--fal--AuraFace-v1/snapshots/af6d057c/glintr100.onnx": COMMERCIAL,
    "auraface/old/antelopev2/glintr100.onnx": RESEARCH,
    # AuraFace's detector has insightface's name and content.
    "AuraFace-v1/scrfd_10g_bnkps.onnx": RESEARCH,
    "faces/glintr100.onnx": UNKNOWN,
    "antelopev2/my_embedder.onnx": UNKNOWN,
    "faces/w600k_r50_mine.onnx": UNKNOWN,
}


@pytest.mark.parametrize("name", NAMED)
def test_other_content_is_told_by_its_names(tmp_path, name):
    file = tmp_path / name
    file.parent.mkdir(parents=True)
    file.write_bytes(b"of no known file")
    line = licence_of(str(file))
    assert line.endswith(NAMED[name])
    assert line == UNKNOWN or " by its " in line


def test_no_line_breaks_and_every_hash_is_one():
    for digest, line in _BY_CONTENT.items():
        assert len(bytes.fromhex(digest)) == 32
        assert line.isprintable()


def test_conversion_tells_the_licence_and_what_was_converted_remembers_it(tmp_path, monkeypatch, capsys):
    file, folder = tmp_path / "w600k_r50.onnx", tmp_path / "converted"
    shutil.copy(ASSETS / EMBEDDER_FILE, file)
    line = "the miniature's embedder: Apache-2.0 (NOTICE)"
    monkeypatch.setattr(sys, "argv", ["convert", "arcface", "--src", str(file), "--dst", str(folder)])
    convert_main()
    assert f"\nlicence: {line}\n" in capsys.readouterr().out
    file.unlink()
    assert licence_of(str(folder)) == line
    monkeypatch.setattr(sys, "argv", ["convert", "inspect", str(folder)])
    convert_main()
    assert f"licence     {line}\n" in capsys.readouterr().out


def test_what_an_earlier_release_converted_has_an_unknown_licence(tmp_path):
    cfg, arrays = store.convert("arcface", [str(ASSETS / EMBEDDER_FILE)])
    store.save(str(tmp_path / "converted"), "arcface", cfg, arrays)
    assert licence_of(str(tmp_path / "converted")) == UNKNOWN
