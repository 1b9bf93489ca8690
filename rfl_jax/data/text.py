"""Prompts to token ids, as the official pipeline makes them (Wan-Video/Wan2.2 `wan/modules/tokenizers.py`)."""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import ftfy
import numpy as np
from jaxtyping import Int
from tokenizers import Tokenizer

from rfl_jax.errors import UserError


def clean(text: str) -> str:
    """Mends mojibake, unescapes HTML twice, and makes every run of white space one blank."""
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return re.sub(r"\s+", " ", text).strip()


class PromptTokenizer:
    """A Hugging Face `tokenizer.json` with fixed-length output.

    Args:
        path: the file, or the folder that holds it.
        length: tokens a prompt is cut and padded to, end marker included.

    Raises:
        UserError: no such file, or not a tokenizer.
    """

    def __init__(self, path: Path | str, length: int) -> None:
        file = Path(path)
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"{file}: no such file, expected a tokenizer.json")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises its bare Exception
            raise UserError(f"{file}: expected a Hugging Face tokenizer.json ({error})") from None
        pad = self._tokenizer.token_to_id("<pad>")
        self._tokenizer.enable_truncation(length)
        self._tokenizer.enable_padding(length=length, pad_id=0 if pad is None else pad, pad_token="<pad>")

    def __call__(self, prompts: Sequence[str]) -> tuple[Int[np.ndarray, "b s"], Int[np.ndarray, "b s"]]:
        """Ids and 0/1 mask of cleaned prompts."""
        encoded = self._tokenizer.encode_batch([clean(p) for p in prompts])
        return (
            np.array([e.ids for e in encoded], np.int32),
            np.array([e.attention_mask for e in encoded], np.int32),
        )
