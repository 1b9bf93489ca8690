"""CLIP's tokenizer from the files that come with its weights: transformers' tokenizer.json, or vocab.json and merges.txt."""

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from rfl_jax.errors import UserError, first_line

START, END = "<|startoftext|>", "<|endoftext|>"
# How a text is cut before its pairs are merged: contractions, letters, digits one by one, other signs.
WORDS = r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
TOKENIZER = "tokenizer.json"
PAIRS = ("vocab.json", "merges.txt")


def read_tokenizer(source: Path, vocab: int, length: int) -> str:
    """The text of a `tokenizer.json` that gives texts of one length.

    Args:
        source: a tokenizer.json; or a folder with one, or with vocab.json and merges.txt.
        vocab: tokens that the network knows, of which the end marker is the last.
        length: tokens that texts are cut and, with end markers, filled up to.

    Raises:
        UserError: no such files, or not CLIP's tokenizer.
    """
    file = source / TOKENIZER if source.is_dir() else source
    pairs = [source / name for name in PAIRS]
    if file.is_file():
        try:
            tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises its bare Exception
            raise UserError(f"{file}: expected a Hugging Face tokenizer.json ({first_line(error)})") from None
    elif all(pair.is_file() for pair in pairs):
        tokenizer = _from_pairs(*pairs)
    else:
        raise UserError(f"{source}: expected a {TOKENIZER}, or a folder with one or with vocab.json and merges.txt")
    ids = tokenizer.encode("a").ids
    if tokenizer.token_to_id(END) != vocab - 1 or ids[:1] != [tokenizer.token_to_id(START)] or ids[-1] != vocab - 1:
        raise UserError(
            f"{source}: expected CLIP's tokenizer, which ends texts with {END}, the last of {vocab:,} tokens"
        )
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=vocab - 1, pad_token=END)
    return tokenizer.to_str()


def find_tokenizer(sources: Sequence[str]) -> str:
    """The folder of the first of these sources, files or folders, that has a tokenizer's files; empty without one."""
    for source in map(Path, sources):
        folder = source if source.is_dir() else source.parent
        if (folder / TOKENIZER).is_file() or all((folder / name).is_file() for name in PAIRS):
            return str(folder)
    return ""


def _from_pairs(vocab: Path, merges: Path) -> Tokenizer:
    try:
        words = json.loads(vocab.read_text(encoding="utf-8"))
        lines = [tuple(line.split()) for line in merges.read_text(encoding="utf-8").splitlines()]
        tokenizer = Tokenizer(
            models.BPE(
                vocab=words,
                merges=[line for line in lines if len(line) == 2 and line[0] != "#version:"],
                end_of_word_suffix="</w>",
                continuing_subword_prefix="",
                unk_token=END,
                fuse_unk=False,
            )
        )
        start, end = words[START], words[END]
    except Exception as error:  # the library raises its bare Exception
        raise UserError(
            f"{vocab}, {merges.name}: expected CLIP's vocabulary and merges ({first_line(error)})"
        ) from None
    blanks = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), blanks, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.post_processor = processors.RobertaProcessing((END, end), (START, start), False, False)
    tokenizer.add_special_tokens([AddedToken(word, normalized=True, special=True) for word in (START, END)])
    return tokenizer
