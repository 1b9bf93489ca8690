"""A small moving picture of what training changed, for a README or a message: before beside after, frame by frame."""

import io

import av
from etils import epath
from PIL import Image, ImageDraw, ImageFont

from rfl_jax.data.pyav import open_video
from rfl_jax.errors import UserError
from rfl_jax.reporting.collect import Run

COLUMNS = {"reference": "real clip", "base": "before", "tuned": "after"}
SUFFIXES = (".gif", ".webp")
GAP, BAR = 4, 20  # pixels between pictures, and of the titles above them
INK, PAPER = (235, 235, 235), (24, 24, 27)


def animate(run: Run, suffix: str, *, most: int, side: int = 160, fps: int = 8) -> bytes:
    """The clips whose person the judging embedder sees return the most, each a row of real clip, before and after.

    Args:
        run: with an evaluation.
        suffix: ".gif" or ".webp".
        most: clips at most.
        side: pixels of the longer side of each picture.
        fps: frames a second.

    Raises:
        UserError: the run was not evaluated, or a video of it cannot be read.
    """
    if not run.evaluation:
        raise UserError(f"{run.folder.evaluation}: no such file, expected a run that was evaluated")
    clips = sorted(run.evaluation["clips"], key=lambda c: c["base"]["judge_sim"] - c["tuned"]["judge_sim"])[:most]
    rows = [[_frames(run.evaluation_video(clip[way]["file"]), side) for way in COLUMNS] for clip in clips]
    count = min(len(column) for row in rows for column in row)
    pictures = [_sheet([[column[i] for column in row] for row in rows]) for i in range(count)]
    # The last frame, where a lost person is lost the most, stands for a second.
    durations = [1000 // fps] * (count - 1) + [1000]
    found = io.BytesIO()
    options = {"quality": 85, "method": 6} if suffix == ".webp" else {"optimize": True}
    pictures[0].save(
        found, suffix.lstrip("."), save_all=True, append_images=pictures[1:], duration=durations, loop=0, **options
    )
    return found.getvalue()


def _frames(file: epath.Path, side: int) -> list[Image.Image]:
    try:
        with open_video(io.BytesIO(file.read_bytes())) as container:
            images = [frame.to_image() for frame in container.decode(video=0)]
    except (OSError, av.FFmpegError, IndexError) as error:
        raise UserError(f"{file}: expected a readable video ({error})") from None
    if not images:
        raise UserError(f"{file}: expected a readable video (no frames)")
    scale = side / max(images[0].size)
    size = tuple(round(n * scale) for n in images[0].size)
    return [image.resize(size, Image.Resampling.LANCZOS) for image in images]


def _sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """One frame of all videos, under their titles."""
    width = rows[0][0].width
    size = len(COLUMNS) * (width + GAP) - GAP, BAR + sum(row[0].height + GAP for row in rows) - GAP
    sheet = Image.new("RGB", size, PAPER)
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, title in enumerate(COLUMNS.values()):
        draw.text((i * (width + GAP) + width / 2, BAR / 2), title, INK, font, anchor="mm")
    top = BAR
    for row in rows:
        for i, picture in enumerate(row):
            sheet.paste(picture.resize((width, row[0].height)), (i * (width + GAP), top))
        top += row[0].height + GAP
    return sheet
