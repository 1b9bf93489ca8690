"""Videos from prompts and first frames.

python -m rfl_jax.sample --config=FILE [--lora=RUN_OR_FILE] --image=FACE.png --prompt="..." --out=VIDEO.mp4
python -m rfl_jax.sample --config=FILE [--lora=RUN_OR_FILE] --csv=ROWS.csv --out=FOLDER
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags
from etils import epath
from ml_collections import ConfigDict

from rfl_jax import cli
from rfl_jax.config import Config, parse
from rfl_jax.data.metadata import find_file, read_table
from rfl_jax.data.videos import first_frame, read_image, write_video
from rfl_jax.errors import UserError
from rfl_jax.hosts import is_writer
from rfl_jax.runs import RunFolder
from rfl_jax.sampling.options import Options, Request, options_of
from rfl_jax.sampling.pipeline import open_pipeline
from rfl_jax.terminal import chosen_flags, command_line, tell_next

FPS = 16  # of the published checkpoints' clips (Wan2.2 `sample_fps`); the 5B's are 24


def guidance_of(text: str | None) -> tuple[float, float] | None:
    """Scales of the two experts: HIGH,LOW, or one for both.

    Raises:
        UserError: anything else.
    """
    if text is None:
        return None
    try:
        high, *rest = map(float, text.split(","))
        (low,) = rest or [high]
    except ValueError:
        raise UserError(f"--guidance: expected a number, or HIGH,LOW, got {text}") from None
    return high, low


def read_requests(file: str, seed: int) -> list[tuple[str, Request]]:
    """File names and requests of a csv with the columns prompt, and as wanted image (or video, whose first frame is
    taken), end_image, seed and out.

    Args:
        file: the csv; paths in it are relative to its folder.
        seed: of its first row; the next rows count on where they give none.

    Raises:
        UserError: naming file and row.
    """
    folder = Path(file).parent
    found: dict[str, Request] = {}
    for i, (number, row) in enumerate(read_table(file, ("prompt",))):
        named = {name: row.get(name, "") for name in ("image", "video", "end_image")}
        images = {name: find_file(folder, text) for name, text in named.items() if text.strip()}
        try:
            image = read_image(images["image"]) if "image" in images else None
            if image is None and "video" in images:
                image = first_frame(images["video"])
            end = read_image(images["end_image"]) if "end_image" in images else None
            name = row.get("out") or f"{number:04d}.mp4"
            if name in found or Path(name).name != name or not name.endswith(".mp4"):
                raise UserError(f"expected a prompt, and in out a name of its own that ends in .mp4, got {name}")
            found[name] = Request(row["prompt"], image, end, int(row.get("seed") or seed + i))
        except ValueError:
            raise UserError(f"{file}: row {number}: seed: expected a whole number, got {row['seed']}") from None
        except UserError as error:
            raise UserError(f"{file}: row {number}: {error}") from None
    return list(found.items())


def _config() -> Config:
    """The configuration of the command line, else that of the run in --lora."""
    if _CONFIG.value is None and _LORA.value and (run := RunFolder(epath.Path(_LORA.value))).exists():
        return parse(ConfigDict(run.read_config()))
    return cli.load_config(_CONFIG)


def main() -> None:
    cfg = _config()
    if bool(_CSV.value) == (_PROMPT.value is not None):
        raise UserError("--prompt: expected either a prompt or --csv=FILE")
    if not _OUT.value:
        raise UserError("--out: expected " + ("a folder" if _CSV.value else "a file that ends in .mp4"))
    out = epath.Path(_OUT.value)
    if _CSV.value:
        if _IMAGE.value or _END_IMAGE.value:
            raise UserError("--image: expected none, as --csv names the images")
        if out.exists() and not out.is_dir():
            raise UserError(f"--out: {out}: is a file, expected a folder")
        requests = read_requests(_CSV.value, _SEED.value)
    else:
        if out.suffix != ".mp4":
            raise UserError(f"--out: {out}: expected a file that ends in .mp4")
        image = read_image(_IMAGE.value) if _IMAGE.value else None
        end = read_image(_END_IMAGE.value) if _END_IMAGE.value else None
        requests = [(out.name, Request(str(_PROMPT.value), image, end, _SEED.value))]
        out = out.parent
    options = _options(cfg)
    pipeline = open_pipeline(cfg, lora=_LORA.value or "", step=_STEP.value, raw=_RAW.value)
    for number, video in pipeline.sample([request for _, request in requests], options):
        file = out / requests[number][0]
        if is_writer():
            write_video(file, video, fps=_FPS.value)
            print(f"{file}: {video.shape[0]} frames of {video.shape[2]}x{video.shape[1]}")
    if is_writer():
        step, seed = _STEP.value or "", _SEED.value + len(requests)
        tell_next(next_command(sys.argv[1:], lora=_LORA.value or "", step=step, raw=_RAW.value, seed=seed))


def next_command(arguments: Sequence[str], *, lora: str, step: str, raw: bool, seed: int) -> str:
    """The export of the run that was seen; other videos of adapters that were; training where neither was.

    Args:
        arguments: of this command.
        lora, step, raw: of its flags.
        seed: the first that it did not use.
    """
    if not lora:
        kept = chosen_flags(arguments, lambda name: name.partition(".")[0] == "config")
        return command_line("rfl_jax.train", [*kept, "--workdir=DIR"])
    if RunFolder(epath.Path(lora)).exists():
        chosen = [*(["--step", step] if step else []), *(["--raw"] if raw else [])]
        return command_line("rfl_jax.export", ["--workdir", lora, *chosen, "--dst", "lora.safetensors"])
    kept = chosen_flags(arguments, lambda name: name not in ("seed", "out"))
    many = bool(chosen_flags(arguments, lambda name: name == "csv"))
    return command_line("rfl_jax.sample", [*kept, f"--seed={seed}", "--out=NEXT" if many else "--out=NEXT.mp4"])


def _options(cfg: Config) -> Options:
    try:
        return options_of(
            cfg,
            steps=_STEPS.value,
            shift=_SHIFT.value,
            guidance=guidance_of(_GUIDANCE.value),
            negative_prompt=_NEGATIVE.value,
            solver=_SOLVER.value,
            frames=_FRAMES.value,
            height=_HEIGHT.value,
            width=_WIDTH.value,
        )
    except UserError as error:
        raise UserError(f"--{error}") from None


if __name__ == "__main__":
    _CONFIG = cli.define_config()
    cli.define_distributed()
    _LORA = flags.DEFINE_string("lora", None, "Folder of a run, or file of adapters; [NETWORK=]FILE, comma-separated.")
    _STEP = flags.DEFINE_string("step", "", "Checkpoint of the run: a number, or best; default: the last.")
    _RAW = flags.DEFINE_boolean("raw", False, "The weights themselves, where the run keeps their average (ema.decay).")
    _IMAGE = flags.DEFINE_string("image", None, "First frame; none makes a video of text alone.")
    _END_IMAGE = flags.DEFINE_string("end_image", None, "Last frame.")
    _PROMPT = flags.DEFINE_string("prompt", None, "Caption.")
    _CSV = flags.DEFINE_string("csv", None, "Many: columns prompt, and image or video, end_image, seed, out.")
    _OUT = flags.DEFINE_string("out", None, "Video to write; with --csv a folder.")
    _STEPS = flags.DEFINE_integer("steps", None, "Denoising steps; default: config.num_inference_steps.")
    _SHIFT = flags.DEFINE_float("shift", None, "Of the schedule; default: config.sampling.shift.")
    _GUIDANCE = flags.DEFINE_string("guidance", None, "Scale, or HIGH,LOW for the two experts; 1 is none.")
    _NEGATIVE = flags.DEFINE_string("negative_prompt", None, "What guidance steers away from.")
    _SEED = flags.DEFINE_integer("seed", 0, "Of the noise; rows of a csv count on from it.")
    _SOLVER = flags.DEFINE_string("solver", None, "euler (default, as in training) or unipc.")
    _FRAMES = flags.DEFINE_integer("frames", None, "4n+1; default: config.data.num_frames.")
    _HEIGHT = flags.DEFINE_integer("height", None, "Pixels; default: the first frame's shape.")
    _WIDTH = flags.DEFINE_integer("width", None, "Pixels.")
    _FPS = flags.DEFINE_integer("fps", FPS, "Frames a second.", lower_bound=1)
    cli.run(main, "sample")
