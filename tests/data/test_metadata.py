"""Tables of clips and of requests."""

import unicodedata
from pathlib import Path

import pytest

from rfl_jax.data.metadata import Clip, find_file, read_metadata
from rfl_jax.errors import UserError
from rfl_jax.sample import read_requests

CASES = Path(__file__).parents[3] / "shared" / "cases"


def read(folder, content):
    (folder / "rows.csv").write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_metadata(folder / "rows.csv")


def test_byte_order_mark_quotes_and_commas(tmp_path):
    rows = read(tmp_path, '\ufeffvideo,prompt,other\na.mp4,"A ""face"", smiling",1\nsub/b.mp4,plain,2\n')
    assert rows == [Clip(2, tmp_path / "a.mp4", 'A "face", smiling'), Clip(3, tmp_path / "sub/b.mp4", "plain")]


@pytest.mark.parametrize(
    "content",
    [
        "Video,Prompt\na.mp4,x\n\nb.mp4,y",
        " VIDEO ,\tprompt \r\na.mp4,x\r\n\r\nb.mp4,y\r\n",
        "video,prompt\ra.mp4,x\r\rb.mp4,y\r",
        "video,prompt,,\na.mp4,x,,\n   \nb.mp4,y,,\n",
        ",video,prompt\n0,a.mp4,x\n\n1,b.mp4,y\n",
        '\ufeff"video","prompt"\n"a.mp4","x"\n\n"b.mp4","y"\n',
    ],
    ids=["capitals", "blanks and windows", "cr", "empty columns", "index", "quoted"],
)
def test_spellings_of_one_table(tmp_path, content):
    assert read(tmp_path, content) == [Clip(2, tmp_path / "a.mp4", "x"), Clip(4, tmp_path / "b.mp4", "y")]


def test_a_row_is_numbered_by_the_line_it_starts_at(tmp_path):
    rows = read(tmp_path, 'video,prompt\n\na.mp4,"two\nlines"\nb.mp4,y\n')
    assert [(row.number, row.prompt) for row in rows] == [(3, "two\nlines"), (5, "y")]


BAD = {
    "surplus": ("video,prompt\na.mp4,She smiles, and nods\n", "row 2: 3 fields, expected 2 .* needs quotes around it"),
    "surplus beside an empty column": ("video,prompt,\na.mp4,She smiles, and nods\n", "row 2: 3 fields, expected 2"),
    "surplus in a later row": ("video,prompt\na.mp4,x\n\nb.mp4,y,z\n", "row 4: 3 fields, expected 2"),
    "too few": ("video,prompt\na.mp4\n", r"row 2: 1 fields, expected 2 \(video, prompt\)"),
    "too few beside others": ("video,prompt,seed\na.mp4,x\n", "row 2: 2 fields, expected 3"),
    "no video": ("video,prompt\n,x\n", "row 2: expected a video and a prompt"),
    "missing column": ("video,text\na.mp4,x\n", "column prompt is missing, .* found 'video', 'text'"),
    "semicolons": ("video;prompt\na.mp4;x, y\n", "column video is missing, .* by commas; found 'video;prompt'"),
    "tabs": ("video\tprompt\na.mp4\tx\n", r"column video is missing, .* by commas; found 'video\\tprompt'"),
    "doubled column": ("video,prompt,Prompt\na.mp4,x,y\n", "column prompt is there 2 times"),
    "no header": ("a.mp4,x\nb.mp4,y\n", "column video is missing, .* found 'a.mp4', 'x'"),
    "header alone": ("video,prompt\n", "no rows"),
    "empty": ("", "is empty"),
    "blank before a quote": ('video,prompt\na.mp4,x\nb.mp4, "She nods"\n', "row 3: a blank before a quote"),
    "text after a quote": ('video,prompt\na.mp4,"She" nods\n', "row 2: expected a UTF-8 csv"),
    "quote never closed": ('video,prompt\na.mp4,"open\nb.mp4,y\n', "row 2: expected a UTF-8 csv .*needs quotes"),
    "nul": ("video,prompt\na.mp4,x\nb.mp4,y\0z\n", "row 3: a NUL byte"),
    "latin-1": (
        "video,prompt\r\na.mp4,x\r\nb.mp4,\xe9\r\n".encode("latin-1"),
        "row 3: byte 0xe9, expected a UTF-8 csv",
    ),
    "utf-16": ("video,prompt\na.mp4,x\n".encode("utf-16"), "is in UTF-16, expected a UTF-8 csv"),
    "utf-16 without mark": ("video,prompt\na.mp4,x\n".encode("utf-16-le"), "row 1: a NUL byte, expected a UTF-8 csv"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_tables_are_refused_by_row(tmp_path, name):
    content, message = BAD[name]
    with pytest.raises(UserError, match=message):
        read(tmp_path, content)


def test_requests_are_read_by_the_same_rules(tmp_path):
    file = tmp_path / "rows.csv"
    for content, message in (
        ("prompt\nShe smiles, and nods\n", "row 2: 2 fields, expected 1"),
        ("prompt;seed\nx;1\n", "column prompt is missing, .* found 'prompt;seed'"),
        ("prompt,video\nx,.\n", "row 2: .* is a folder, expected a video"),
        ("prompt,image\nx,.\n", "row 2: .* is a folder, expected an image"),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            read_requests(str(file), 0)
    file.write_text("Prompt, Seed ,image\nx,3, \n\ny,4,\n")
    assert [(n, r.prompt, r.seed) for n, r in read_requests(str(file), 0)] == [
        ("0002.mp4", "x", 3),
        ("0004.mp4", "y", 4),
    ]


def test_absent_tables_and_folders_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="no such file, expected a csv with columns video, prompt"):
        read_metadata(tmp_path / "none.csv")
    with pytest.raises(UserError, match="is a folder, expected a csv"):
        read_metadata(tmp_path)
    (tmp_path / "rows.csv").write_text("video,prompt\na.mp4,x\n")
    monkeypatch.chdir(tmp_path)
    assert read_metadata("rows.csv") == [Clip(2, Path("a.mp4"), "x")]


def test_files_are_found_however_their_names_are_written(tmp_path):
    composed, decomposed = (unicodedata.normalize(form, "José 映像.mp4") for form in ("NFC", "NFD"))
    (tmp_path / "sub").mkdir()
    for name in ("sub/b.mp4", "sub/c\\d.mp4", composed, "take2:final.mp4", "-x.mp4"):
        (tmp_path / name).touch()
    assert find_file(tmp_path, "sub\\b.mp4") == tmp_path / "sub/b.mp4"
    assert find_file(tmp_path, "sub/c\\d.mp4") == tmp_path / "sub/c\\d.mp4"
    assert find_file(tmp_path, decomposed).samefile(tmp_path / composed)
    assert find_file(tmp_path, " -x.mp4 ") == tmp_path / "-x.mp4"
    assert find_file(tmp_path, "take2:final.mp4") == tmp_path / "take2:final.mp4"
    assert find_file(Path("elsewhere"), str(tmp_path / "-x.mp4")) == tmp_path / "-x.mp4"
    assert find_file(tmp_path, "none\\x.mp4") == tmp_path / "none\\x.mp4"
    assert find_file(tmp_path, "x" * 5000) == tmp_path / ("x" * 5000)


@pytest.mark.skipif(not CASES.is_dir(), reason="no cases from bug reports on this machine")
def test_a_reported_caption_is_not_cut():
    with pytest.raises(UserError, match="row 2: 4 fields, expected 2"):
        read_metadata(CASES / "csv" / "comma_unquoted.csv")
