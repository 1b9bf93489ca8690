"""Weights in and out.

`python -m convert COMPONENT --src PATH... --dst DIR` writes a checkpoint as Orbax weights, `inspect DIR` shows what such
a folder holds, `export --workdir RUN --dst FILE.safetensors` writes what a run trained for other tools.
"""

import argparse
import ast
import json
import logging as stdlib_logging
import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from convert import adapters, dit, export, origin, store, verify
from convert.lora import parse_strength
from rfl_jax.config import parse
from rfl_jax.errors import UserError, refuse_in_one_line
from rfl_jax.fetch import fetch
from rfl_jax.files import is_remote, write_whole
from rfl_jax.sources import experts_of, find_sources

INTERRUPTED = 130
DTYPES = ("float32", "bfloat16", "float16")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="python -m convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for kind in (*store.KINDS, "lora"):
        one = commands.add_parser(kind, help=f"convert {kind} weights")
        one.add_argument(
            "--src", nargs="+", required=True,
            help="checkpoint files, a folder of shards, a pickle or an ONNX file; gs://..., or hub:org/name[:pattern]",
        )  # fmt: skip
        one.add_argument("--dst", required=True, help="folder to write; it must not exist yet")
        one.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="sizes that weights do not tell")
        if kind == "lora":
            continue
        one.add_argument("--dtype", choices=DTYPES, help="default: as in the source, bfloat16 for 8-bit weights")
        one.add_argument("--verify", action="store_true", help="compare with ONNX Runtime, or with diffusers")
        if kind == "dit":
            one.add_argument(
                "--lora", nargs="+", default=[], metavar="FILE[:STRENGTH]", help="adapters to merge into the weights"
            )
    inspect = commands.add_parser("inspect", help="what converted weights are, and where they come from")
    inspect.add_argument("directory")
    out = commands.add_parser("export", help="what a run trained, for other tools")
    out.add_argument("--workdir", required=True, help="folder of the run")
    out.add_argument("--step", default="", help="of the checkpoint, or best; default: the last")
    out.add_argument("--network", default="", choices=("", "dit", "dit2"), help="needed where both train")
    out.add_argument("--format", default="diffusers", choices=tuple(export.LORA_FORMATS), help="naming of the layers")
    out.add_argument("--merged", action="store_true", help="the whole network, adapters merged")
    out.add_argument("--dtype", choices=DTYPES, help="of merged weights; default: as the network's were")
    out.add_argument("--dst", required=True, metavar="FILE.safetensors")
    return parser


def main() -> None:
    args = _parser().parse_args()
    if args.command == "inspect":
        origin.show(args.directory)
    elif args.command == "export":
        _export(args)
    elif args.command == "lora":
        _convert_lora(args)
    else:
        _convert(args)


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
    merged = [(file, strength) for name, strength in loras for file in fetch(name)]
    if args.verify:
        verify.check_possible(args.command, merged)
    cfg, arrays = store.convert(args.command, files, dtype=args.dtype, loras=merged, **_hints(args.set))
    print(cfg)
    described = origin.of_sources(args.src, files, loras, args.dtype)
    total = sum(array.nbytes for array in arrays.values())
    before = signal.signal(signal.SIGINT, _interrupted)
    with tqdm(total=total, unit="B", unit_scale=True, desc=args.dst, disable=None) as bar:
        try:
            store.save(args.dst, args.command, cfg, arrays, origin=described, progress=bar.update)
        except BaseException:
            _remove_unfinished(args.dst)
            raise
        finally:
            signal.signal(signal.SIGINT, before)
    if args.verify:
        for line in verify.compare(args.command, files, args.dst):
            print(line)
    print(f"{args.dst}: {len(arrays)} arrays, {store.count(arrays):,} parameters")


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
    cfg, arrays = adapters.convert(files[0], settings.get("preset", ""))
    store.save(args.dst, "lora", cfg, arrays, origin=origin.of_sources(args.src, files, [], "float32"))
    print(f"{args.dst}: {len(arrays) // 2} adapted layers of {cfg.preset}, rank {cfg.rank}")


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


def _export(args: argparse.Namespace) -> None:
    file = Path(args.dst)
    if file.suffix != ".safetensors":
        raise UserError(f"--dst: {args.dst}: expected a name that ends in .safetensors")
    if file.exists() or file.with_name(f"{file.name}.index.json").exists():
        raise UserError(f"--dst: {args.dst}: exists already, expected a new file")
    if args.merged and args.format not in dit.NAMINGS:
        raise UserError(f"--format: {args.format}: whole weights have the naming {' or '.join(dit.NAMINGS)}")
    if args.dtype and not args.merged:
        raise UserError("--dtype: of merged weights only; adapters are float32")
    trained = export.read_run(epath.Path(args.workdir), args.step, args.network)
    if not args.merged and not trained.adapted:
        raise UserError(f"--merged: expected, as the run trained {trained.network} in full")
    file.parent.mkdir(parents=True, exist_ok=True)
    if not args.merged:
        write_whole(file, export.adapter_file(trained.arrays, args.format, trained.metadata))
        print(f"{file}: {len(trained.arrays) // 2} adapted layers in {args.format} naming")
        if args.format == "peft":
            config = file.with_name("adapter_config.json")
            write_whole(config, json.dumps(export.adapter_config(trained.arrays), indent=1) + "\n")
            print(f"{config}")
        return
    cfg = parse(ConfigDict(trained.config))
    sources = find_sources(cfg, experts=experts_of(cfg))
    _, arrays = export.whole_network(trained, sources.dit if trained.network == "dit" else sources.dit2)
    tensors = export.entries(arrays, dit.NAMINGS[args.format], args.dtype)
    with tqdm(total=sum(t.nbytes for t in tensors), unit="B", unit_scale=True, desc=file.name, disable=None) as bar:
        for written in export.write_safetensors(file, tensors, trained.metadata, bar.update):
            print(written)


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    try:
        with refuse_in_one_line("convert"):
            main()
    except SystemExit as stop:
        if stop.code == INTERRUPTED:
            # What waits for the disk would have its say while the interpreter ends.
            sys.stderr.flush()
            os._exit(INTERRUPTED)
        raise
