"""The commands that README, pages and examples show."""

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
PAGES = [
    ROOT / "README.md",
    *(ROOT / "docs" / name for name in yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]),
]
# A comment in front of a block says why it is not run.
BLOCK = re.compile(r"(?:<!-- parsed only: (?P<why>[^>]+) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
OURS = re.compile(r"rfl_jax|convert|benchmarks")


@dataclasses.dataclass(frozen=True)
class Block:
    """Attributes:
    page: that shows it.
    why: it is not run; empty: it is.
    text: lines of `language`.
    """

    page: Path
    why: str
    language: str
    text: str


def blocks(*languages: str) -> list[Block]:
    """The blocks of some languages on all pages, in order."""
    found = [(page, match) for page in PAGES for match in BLOCK.finditer(page.read_text())]
    return [
        Block(page, match["why"] or "", match["language"], match["text"])
        for page, match in found
        if match["language"] in languages
    ]


def commands(text: str) -> Iterator[list[str]]:
    """Words of every command, those that another command is given to run included; without settings of the environment."""
    lexer = shlex.shlex(text.replace("\\\n", " "), posix=True, punctuation_chars="&|;\n")
    lexer.whitespace, lexer.whitespace_split, lexer.commenters = " \t", True, ""
    words: list[str] = []
    for word in [*lexer, "\n"]:
        if set(word) <= set("&|;\n"):
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words
            words = []
        elif word.startswith("--command="):
            yield from commands(word.removeprefix("--command="))
            words.append("--command=")
        else:
            words.append(word)


def ours(words: list[str]) -> tuple[str, list[str]] | None:
    """Module and arguments, if the command is one of this project's."""
    python = words[0].rpartition("/")[2] in ("python", "python3")
    if not (python and words[1:2] == ["-m"] and OURS.match(words[2])):
        return None
    return words[2], words[3:]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder like a clone's, and what the pages take to be yours."""
    from tests.test_config import ROLL

    for path in ROOT.iterdir():
        if not path.name.startswith(".") and path.name != "runs":
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "reward_fl_config.yaml").write_text(ROLL)
    monkeypatch.chdir(tmp_path)
    return tmp_path
