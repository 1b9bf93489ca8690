"""What a run trained, for other tools: `python -m rfl_jax.export --workdir RUN --dst FILE.safetensors`.

Adapters in the naming of `--format`, or with `--merged` the whole network with the adapters merged into it: of a run with
`ema.decay` their average, or with `--raw` the weights themselves. Where both experts trained, each has a file of its own, with
its name in that naming: FILE_transformer.safetensors and FILE_transformer_2.safetensors. RUN is a folder or gs://.
"""

import argparse
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from etils import epath
from ml_collections import ConfigDict
from tqdm import tqdm

from convert import dit, export, store
from rfl_jax.chips import answer_libtpu
from rfl_jax.config import parse
from rfl_jax.errors import ArgumentParser, UserError, refuse_in_one_line
from rfl_jax.files import write_whole
from rfl_jax.models.lora import is_adapters
from rfl_jax.runs import RunFolder, find_checkpoint, licence_header, read_network, takes_average, trained_networks
from rfl_jax.sources import experts_of, find_sources
from rfl_jax.terminal import command_line, tell_next

NETWORKS = ("dit", "dit2")


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a run trained in one network.

    Attributes:
        network: "dit" or "dit2".
        arrays: adapters, or all weights, by dotted path.
        metadata: base model, network, step, "average" or "raw" weights, hash of the configuration; rank and alpha of
            adapters; the step's score; licences of the face networks.
        config: the run's configuration, to be parsed.
    """

    network: str
    arrays: dict[str, np.ndarray]
    metadata: dict[str, str]
    config: dict[str, Any]

    @property
    def adapted(self) -> bool:
        """Whether adapters were trained, and not all weights."""
        return is_adapters(self.arrays)


def trained_experts(checkpoint: epath.Path, network: str = "") -> list[str]:
    """The DiTs that a checkpoint has something trained of, or the one of them that is asked for.

    Args:
        checkpoint: from `find_checkpoint`.
        network: "dit" or "dit2"; all by default.

    Raises:
        UserError: none trained, or another.
    """
    trained = trained_networks(checkpoint)
    networks = [name for name in trained if name in NETWORKS and network in ("", name)]
    if not networks:
        raise UserError(f"--network: {network or 'dit'}: the run trained {', '.join(trained)}")
    return networks


def read_expert(folder: RunFolder, checkpoint: epath.Path, network: str, *, raw: bool = False) -> Trained:
    """The trained weights of one network in a run's checkpoint.

    Args:
        folder: of the run.
        checkpoint: from `find_checkpoint`.
        network: one of `trained_experts`.
        raw: the weights themselves, where the checkpoint has their average.

    Raises:
        UserError: the run's configuration or its metrics cannot be read, or there is no average beside the raw weights.
    """
    config = folder.read_config()
    preset, rank = config.get("preset"), config.get("lora_rank")
    if type(preset) is not str or type(rank) is not int:
        raise UserError(f"{folder.config}: preset={preset!r}, lora_rank={rank!r}, expected the configuration of a run")
    average = takes_average(checkpoint, raw=raw)
    arrays = read_network(checkpoint, network, average=average)
    metadata = {
        "base_model": preset,
        "network": network,
        "step": checkpoint.name,
        "weights": "average" if average else "raw",
        "config_sha256": hashlib.sha256(folder.config.read_bytes()).hexdigest(),
    }
    if is_adapters(arrays):
        metadata |= {"rank": str(rank), "alpha": str(rank)}
    score = _score(folder, int(checkpoint.name))
    if score is not None:
        metadata["face_score"] = f"{score:.6f}"
    metadata |= licence_header(folder.read_licences())
    return Trained(network, arrays, metadata, config)


def _score(folder: RunFolder, step: int) -> float | None:
    """The reward of the step that the weights of a step are of: an alarm may have put back earlier ones."""
    lines = {line["step"]: line for _, line in folder.read_lines()}
    step = lines.get(step, {}).get("back_to", step)
    score = lines.get(step, {}).get("face_score")
    if not isinstance(score, float | None):
        raise UserError(f"{folder.metrics}: face_score of step {step}: {score!r}, expected a number")
    return score


def _parser() -> argparse.ArgumentParser:
    parser = ArgumentParser(
        prog="python -m rfl_jax.export", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", required=True, help="folder of the run")
    parser.add_argument("--step", default="", help="of the checkpoint, or best; default: the last")
    parser.add_argument("--raw", action="store_true", help="the weights themselves, where the run keeps their average")
    parser.add_argument("--network", default="", choices=("", *NETWORKS), help="one of two that trained")
    parser.add_argument(
        "--format", default="diffusers", choices=tuple(export.LORA_FORMATS), help="naming of the layers"
    )
    parser.add_argument("--merged", action="store_true", help="the whole network, adapters merged")
    parser.add_argument("--dtype", choices=store.CAST_TO, help="of merged weights; default: as the network's were")
    parser.add_argument("--dst", required=True, metavar="FILE.safetensors")
    return parser


def main() -> None:
    args = _parser().parse_args()
    file = Path(args.dst)
    if file.suffix != ".safetensors":
        raise UserError(f"--dst: {args.dst}: expected a name that ends in .safetensors")
    if args.merged and args.format not in dit.NAMINGS:
        raise UserError(f"--format: {args.format}: whole weights have the naming {' or '.join(dit.NAMINGS)}")
    if args.dtype and not args.merged:
        raise UserError("--dtype: of merged weights only; adapters are float32")
    folder = RunFolder(epath.Path(args.workdir))
    # Found once: where the run still trains, both experts are to be of one step.
    checkpoint = find_checkpoint(folder, args.step)
    networks = trained_experts(checkpoint, args.network)
    files = {name: export.expert_file(file, args.format, name) if networks[1:] else file for name in networks}
    for own in files.values():
        if own.exists() or own.with_name(f"{own.name}.index.json").exists():
            raise UserError(f"--dst: {own}: exists already, expected a new file")
    found = (read_expert(folder, checkpoint, name, raw=args.raw) for name in networks)
    if args.merged:
        # One after the other: a network in full may fill the memory.
        for trained in found:
            own = files[trained.network]
            own.parent.mkdir(parents=True, exist_ok=True)
            _write_merged(trained, own, args.format, args.dtype)
            source = str(own) if own.exists() else f"{own}.index.json"
            tell_next(command_line("convert", ["dit", "--src", source, "--dst", str(own.with_suffix(""))]))
        return
    read = list(found)
    whole = [trained.network for trained in read if not trained.adapted]
    if whole:
        others = [f", or --network {trained.network}" for trained in read if trained.adapted]
        raise UserError(f"--merged: expected, as the run trained {' and '.join(whole)} in full{''.join(others)}")
    for trained in read:
        files[trained.network].parent.mkdir(parents=True, exist_ok=True)
        _write_adapters(trained, files[trained.network], args.format)
    lora = ",".join(f"{name}={own}" for name, own in files.items())
    preset = [f"--config={read[0].config['preset']}", f"--lora={lora}"]
    tell_next(command_line("rfl_jax.sample", [*preset, "--image=FACE.png", "--prompt=TEXT", "--out=video.mp4"]))


def _write_adapters(trained: Trained, file: Path, kind: str) -> None:
    config = file.with_name("adapter_config.json")
    if kind == "peft":
        # Before the file: on a disk that is full after it the same command would find it done.
        write_whole(config, json.dumps(export.adapter_config(trained.arrays), indent=1) + "\n")
    write_whole(file, export.adapter_file(trained.arrays, kind, trained.metadata))
    print(f"{file}: {len(trained.arrays) // 2} adapted layers in {kind} naming")
    if kind == "peft":
        print(f"{config}")


def _write_merged(trained: Trained, file: Path, naming: str, dtype: str | None) -> None:
    cfg = parse(ConfigDict(trained.config))
    sources = find_sources(cfg, experts=experts_of(cfg))
    _, arrays = export.whole_network(trained.arrays, sources.dit if trained.network == "dit" else sources.dit2)
    tensors = export.entries(arrays, dit.NAMINGS[naming], dtype)
    with tqdm(total=sum(t.nbytes for t in tensors), unit="B", unit_scale=True, desc=file.name, disable=None) as bar:
        for written in export.write_safetensors(file, tensors, trained.metadata, bar.update):
            print(written)


if __name__ == "__main__":
    answer_libtpu()
    logging.set_verbosity(logging.FATAL)
    with refuse_in_one_line("export"):
        main()
