"""`python -m convert COMPONENT --src PATH... --dst DIR`: checkpoints to Orbax weights."""

import argparse
import ast
import sys
from typing import NoReturn

from absl import logging
from etils import epath

from convert import store, verify
from rfl_jax.errors import UserError, refuse_in_one_line


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(message)


def main() -> None:
    parser = _Parser(prog="python -m convert", description=__doc__)
    parser.add_argument("component", choices=store.KINDS)
    parser.add_argument("--src", nargs="+", required=True, help="checkpoint files, a folder of shards, or an ONNX file")
    parser.add_argument("--dst", required=True, help="folder to write; it must not exist yet")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="default: as in the source")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="sizes that weights do not tell")
    parser.add_argument("--verify", action="store_true", help="compare a face network with ONNX Runtime")
    args = parser.parse_args()
    if args.verify and args.component not in store.ONNX:
        raise UserError(f"--verify: expected one of {', '.join(store.ONNX)}, got {args.component}")
    if epath.Path(args.dst).exists():
        raise UserError(f"{args.dst}: exists already, expected a new folder")
    hints = {}
    for item in args.set:
        key, _, value = item.partition("=")
        try:
            hints[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise UserError(f"--set {item}: expected KEY=VALUE") from None
    cfg, arrays = store.convert(args.component, args.src, dtype=args.dtype, **hints)
    print(cfg)
    store.save(args.dst, args.component, cfg, arrays)
    if args.verify:
        for name, error in verify.errors(args.component, args.src[0], cfg, arrays).items():
            print(f"{name}: largest difference from ONNX Runtime {error:.1e} of the largest value")
    print(f"{args.dst}: {len(arrays)} arrays, {store.count(arrays):,} parameters")


if __name__ == "__main__":
    logging.set_verbosity(logging.ERROR)
    with refuse_in_one_line("convert"):
        main()
    sys.exit(0)
