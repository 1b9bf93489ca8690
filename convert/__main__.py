"""Weights in and out.

`python -m convert COMPONENT --src PATH... --dst DIR` writes a checkpoint as Orbax weights, `inspect DIR` shows what such
a folder holds, `export --workdir RUN --dst FILE.safetensors` writes what a run trained for other tools.
"""

import argparse
import ast
import logging as stdlib_logging
import os
import runpy
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from absl import logging
from etils import epath
from tqdm import tqdm

from convert import adapters, origin, store, verify
from convert.clip_tokenizer import TOKENIZER, find_tokenizer, read_tokenizer
from convert.licence import licence_of
from convert.lora import EXPERT_OPTIONS, parse_strength
from rfl_jax.chips import answer_libtpu
from rfl_jax.errors import ArgumentParser, UserError, refuse_in_one_line
from rfl_jax.fetch import fetch
from rfl_jax.files import is_remote, write_whole
from rfl_jax.models.clip import CLIPConfig
from rfl_jax.terminal import command_line, tell_next

INTERRUPTED = 130


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for kind in (*store.KINDS, "lora"):
        one = commands.add_parser(kind, help=f"convert {kind} weights")
        one.add_argument(
            "--src", nargs="+", required=True,
            help="checkpoint files, a folder of shards, a pickle or an ONNX file; gs://..., or hub:org/name[@revision][:pattern]",
        )  # fmt: skip
        one.add_argument("--dst", required=True, help="folder to write; it must not exist yet")
        one.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="sizes that weights do not tell")
        if kind in ("dit", "lora"):
            one.add_argument(
                "--expert", default="", choices=tuple(EXPERT_OPTIONS),
                help="whose adapters are meant, where a file has those of both",
            )  # fmt: skip
        if kind == "lora":
            continue
        one.add_argument("--dtype", choices=store.CAST_TO, help="default: as in the source, bfloat16 for 8-bit weights")
        one.add_argument("--verify", action="store_true", help="compare with ONNX Runtime, or with diffusers")
        if kind == "clip":
            one.add_argument(
                "--tokenizer", default="", metavar="PATH",
                help="tokenizer.json, or a folder with it or with vocab.json and merges.txt; default: beside the weights",
            )  # fmt: skip
        if kind == "dit":
            one.add_argument(
                "--lora", nargs="+", default=[], metavar="FILE[:STRENGTH]", help="adapters to merge into the weights"
            )
    inspect = commands.add_parser("inspect", help="what converted weights are, and where they come from")
    inspect.add_argument("directory")
    commands.add_parser("export", help="what a run trained, for other tools")
    return parser


def main() -> None:
    if sys.argv[1:2] == ["export"]:
        _hand_on_export()
        return
    args = _parser().parse_args()
    if args.command == "inspect":
        kind = origin.show(args.directory)
        tell_next(_after_inspection(kind, args.directory))
    elif args.command == "lora":
        _convert_lora(args)
    else:
        _convert(args)


def _hand_on_export() -> None:
    """Runs `python -m rfl_jax.export` with the rest of the command line.

    Reading a run needs its configuration, which lies above this library; run by name, the library imports none of it.
    """
    del sys.argv[1]
    runpy.run_module("rfl_jax.export", run_name="__main__", alter_sys=True)


def _hints(settings: list[str]) -> dict[str, Any]:
    hints = {}
    for item in settings:
        key, _, value = item.partition("=")
        try:
            hints[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"--set {item}: expected KEY=VALUE") from None
    return hints


def _convert(args: argparse.Namespace) -> None:
    if epath.Path(args.dst).exists():
        raise UserError(f"{args.dst}: exists already, expected a new folder")
    loras = [parse_strength(text) for text in getattr(args, "lora", [])]
    files = [file for source in args.src for file in fetch(source)]
    named = [(name, file, strength) for name, strength in loras for file in fetch(name)]
    merged = [(file, strength) for _, file, strength in named]
    if args.verify:
        verify.check_possible(args.command, merged)
    expert = getattr(args, "expert", "")
    if expert and not loras:
        raise UserError("--expert: says whose adapters of --lora are meant, expected --lora")
    cfg, arrays = store.convert(
        args.command, files, dtype=args.dtype, loras=merged, expert=EXPERT_OPTIONS.get(expert, ""), **_hints(args.set)
    )
    print(cfg)
    licensed = files if args.command in (*store.ONNX, "clip") else []
    licence = "; ".join(dict.fromkeys(licence_of(file) for file in licensed))
    tokenizer = _read_tokenizer(args, files, cfg) if args.command == "clip" else ""
    if licence:
        print(f"licence: {licence}")
    described = origin.of_sources(args.src, files, args.dtype, loras=named, expert=expert, licence=licence)
    total = sum(array.nbytes for array in arrays.values())
    before = signal.signal(signal.SIGINT, _interrupted)
    with tqdm(total=total, unit="B", unit_scale=True, desc=args.dst, disable=None) as bar:
        try:
            store.save(args.dst, args.command, cfg, arrays, origin=described, progress=bar.update)
            if tokenizer:
                write_whole(epath.Path(args.dst) / TOKENIZER, tokenizer)
        except BaseException:
            _remove_unfinished(args.dst)
            raise
        finally:
            signal.signal(signal.SIGINT, before)
    if args.verify:
        for line in verify.compare(args.command, files, args.dst):
            print(line)
    print(f"{args.dst}: {len(arrays)} arrays, {store.count(arrays):,} parameters")
    tell_next(command_line("convert", ["inspect", args.dst]))


def _read_tokenizer(args: argparse.Namespace, files: list[str], cfg: CLIPConfig) -> str:
    """The tokenizer that `--tokenizer` names, else one beside the weights; empty where there is none, which is told."""
    named = args.tokenizer and fetch(args.tokenizer)[0]
    found = named or find_tokenizer(files)
    if found:
        return read_tokenizer(Path(found), cfg.vocab, cfg.text_len)
    print("no tokenizer beside the weights: terms that read prompts need one, --tokenizer names it")
    return ""


def _interrupted(*_: Any) -> NoReturn:
    # The threads that write would complain of the interruption one by one.
    stdlib_logging.disable(stdlib_logging.CRITICAL)
    threading.excepthook = lambda _: None
    raise KeyboardInterrupt


def _convert_lora(args: argparse.Namespace) -> None:
    if epath.Path(args.dst).exists():
        raise UserError(f"{args.dst}: exists already, expected a new folder")
    files = [file for source in args.src for file in fetch(source)]
    settings = dict(item.partition("=")[::2] for item in args.set)
    if len(files) != 1 or set(settings) - {"preset"}:
        raise UserError("lora: expected one file, and no setting but preset")
    cfg, arrays = adapters.convert(files[0], settings.get("preset", ""), EXPERT_OPTIONS.get(args.expert, ""))
    store.save(args.dst, "lora", cfg, arrays, origin=origin.of_sources(args.src, files, "float32", expert=args.expert))
    print(f"{args.dst}: {len(arrays) // 2} adapted layers of {cfg.preset}, rank {cfg.rank}")
    tell_next(_after_inspection("lora", args.dst))


def _after_inspection(kind: str, directory: str) -> str:
    """Training that begins with adapters; of weights whether training with them fits."""
    if kind == "lora":
        return command_line("rfl_jax.train", ["--config=CONFIG", "--workdir=DIR", f"--config.init_lora={directory}"])
    return command_line("rfl_jax.plan", ["--config=CONFIG", "--topology=local"])


def _remove_unfinished(directory: str) -> None:
    """What an interrupted conversion leaves beside its destination, which itself never appeared."""
    path = epath.Path(directory)
    if is_remote(path):
        return
    # Pieces on their way to the disk may arrive while their folder is being removed.
    for _ in range(100):
        left = list(Path(path.parent).glob(f"{path.name}.orbax-checkpoint-tmp*"))
        for folder in left:
            shutil.rmtree(folder, ignore_errors=True)
        if not left:
            break
        time.sleep(0.1)


if __name__ == "__main__":
    answer_libtpu()
    logging.set_verbosity(logging.FATAL)
    try:
        with refuse_in_one_line("convert"):
            main()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            # What waits for the disk would have its say while the interpreter ends.
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
