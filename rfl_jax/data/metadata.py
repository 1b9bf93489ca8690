"""The list of clips: a csv with columns video and prompt."""

import contextlib
import csv
import dataclasses
import io
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from rfl_jax.errors import UserError

COLUMNS = ("video", "prompt")
HINT = 'text with a comma, a quote or a line break needs quotes around it: a.mp4,"She nods, and smiles"'


@dataclasses.dataclass(frozen=True)
class Clip:
    """One clip.

    Attributes:
        number: the line of the file that it starts at, counting the header as row 1.
        video: path of the file, relative ones resolved against the csv's folder.
        prompt: caption.
    """

    number: int
    video: Path
    prompt: str


def read_metadata(file: Path | str) -> list[Clip]:
    """Rows of a csv as `read_table` reads them.

    Raises:
        UserError: what `read_table` refuses, or a row without a video.
    """
    rows = []
    for number, record in read_table(file, COLUMNS):
        if not record["video"].strip():
            raise UserError(f"{file}: row {number}: expected a video and a prompt")
        rows.append(Clip(number, find_file(Path(file).parent, record["video"]), record["prompt"]))
    return rows


def read_table(file: Path | str, required: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Clip numbers and rows of a comma-separated UTF-8 file, which may start with a byte order mark. Columns are named in
    lower case; blank lines count as rows but are left out.

    Raises:
        UserError: no such file, not UTF-8, a column missing or named twice, a row that has not one field for each column
            or whose quotes do not enclose a field, or no rows.
    """
    columns = f"expected a csv with columns {', '.join(required)}"
    try:
        data = Path(file).read_bytes()
    except IsADirectoryError:
        raise UserError(f"{file}: is a folder, {columns}") from None
    except FileNotFoundError:
        raise UserError(f"{file}: no such file, {columns}") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}, {columns}") from None
    header, rows = None, []
    for number, fields in _records(file, _decode(file, data)):
        if header is None:
            header = _header(file, fields, required)
            continue
        # A spreadsheet ends every row with commas where a column beside the table was once in use.
        while len(fields) > len(header) and not fields[-1].strip():
            fields.pop()
        if len(fields) != len(header):
            raise UserError(
                f"{file}: row {number}: {len(fields)} fields, expected {len(header)} ({', '.join(header)}); {HINT}"
            )
        rows.append((number, dict(zip(header, fields, strict=True))))
    if header is None:
        raise UserError(f"{file}: is empty, {columns}")
    if not rows:
        raise UserError(f"{file}: no rows, expected at least one below the header")
    return rows


def find_file(folder: Path, name: str) -> Path:
    """The file that a table's row names: as written, else without blanks around it, with Windows' separators, or with
    its letters composed in the other of Unicode's ways; as written if there is none.
    """
    for path in (name, name.strip(), name.strip().replace("\\", "/")):
        for form in (path, unicodedata.normalize("NFC", path), unicodedata.normalize("NFD", path)):
            with contextlib.suppress(OSError):  # a name that is too long
                if (folder / form).exists():
                    return folder / form
    return folder / name


def _decode(file: Path | str, data: bytes) -> str:
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UserError(f"{file}: is in UTF-16, expected a UTF-8 csv (a spreadsheet saves it as 'CSV UTF-8')")
    bad = data.find(b"\0")
    if bad < 0:
        try:
            return data.decode("utf-8").lstrip("\ufeff")
        except UnicodeDecodeError as error:
            bad = error.start
    what = "a NUL byte" if data[bad] == 0 else f"byte 0x{data[bad]:02x}"
    row = len(data[:bad].replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n"))
    raise UserError(f"{file}: row {row}: {what}, expected a UTF-8 csv (a spreadsheet saves it as 'CSV UTF-8')")


def _records(file: Path | str, text: str) -> list[tuple[int, list[str]]]:
    """Records that are not blank, with the lines that they start at."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    records = []
    start = 1
    try:
        for fields in reader:
            if len(fields) > 1 or "".join(fields).strip():
                records.append((start, fields))
            start = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{file}: row {start}: expected a UTF-8 csv ({error}); {HINT}") from None
    for number, fields in records:
        if any(field[:1].isspace() and field.lstrip().startswith('"') for field in fields):
            raise UserError(f"{file}: row {number}: a blank before a quote, expected none; {HINT}")
    return records


def _header(file: Path | str, fields: Sequence[str], required: Sequence[str]) -> list[str]:
    header = [field.strip().casefold() for field in fields]
    while header and not header[-1]:
        header.pop()
    expected = f"expected columns {', '.join(required)}, separated by commas; found {', '.join(map(repr, header))}"
    for name in required:
        if name not in header:
            raise UserError(f"{file}: column {name} is missing, {expected}")
    for name in header:
        if name and header.count(name) > 1:
            raise UserError(f"{file}: column {name} is there {header.count(name)} times, {expected}")
    return header
