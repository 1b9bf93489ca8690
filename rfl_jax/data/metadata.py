"""The list of clips: a csv with columns video and prompt."""

import csv
import dataclasses
from pathlib import Path

from rfl_jax.errors import UserError

COLUMNS = ("video", "prompt")


@dataclasses.dataclass(frozen=True)
class Row:
    """One clip.

    Attributes:
        number: its row in the file, counting the header as row 1.
        video: path of the file, relative ones resolved against the csv's folder.
        prompt: caption.
    """

    number: int
    video: Path
    prompt: str


def read_metadata(file: Path | str) -> list[Row]:
    """Rows of a csv, which may start with a byte order mark.

    Raises:
        UserError: no such file, not UTF-8, a missing column, a row with a missing field, or no rows.
    """
    file = Path(file)
    if not file.is_file():
        raise UserError(f"{file}: no such file, expected a csv with columns {', '.join(COLUMNS)}")
    try:
        with file.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            missing = [c for c in COLUMNS if c not in (reader.fieldnames or [])]
            if missing:
                raise UserError(f"{file}: column {missing[0]} is missing, expected columns {', '.join(COLUMNS)}")
            rows = []
            for record in reader:
                number = reader.line_num
                if not record["video"] or record["prompt"] is None:
                    raise UserError(f"{file}: row {number}: expected a video and a prompt")
                rows.append(Row(number, file.parent / record["video"], record["prompt"]))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file}: expected a UTF-8 csv ({error})") from None
    if not rows:
        raise UserError(f"{file}: no rows, expected at least one clip")
    return rows
