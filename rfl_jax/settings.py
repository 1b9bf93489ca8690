"""Settings that their types describe: what a value may be, its meaning in one line, its text at the edge.

A section is a frozen dataclass of fields `name: Annotated[TYPE, RANGE, "Meaning."] = default`, or of further sections.
A TYPE is bool, int, float, str, a Literal of texts, `Names`, `StepRange` or `Rows`; a RANGE is one of the classes below, or absent.
Flags, ConfigDicts and JSON hold the edge form of a value (bool, int, float or text; of `Rows` groups), the dataclass the type itself.
"""

import dataclasses
import re
from collections.abc import Callable, Collection, Iterator
from typing import Annotated, Any, Literal, Protocol, TypeVar, get_args, get_origin, get_type_hints, runtime_checkable

from rfl_jax.errors import did_you_mean

Number = int | float
Names = tuple[str, ...]  # at the edge separated by commas
StepRange = tuple[int, int] | None  # first and last, at the edge 3-5 or 3; None: empty text
Rows = tuple[tuple[str, Any], ...]  # sections by name, at the edge a group of groups of settings

NOUNS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    Names: "names separated by commas",
    StepRange: "steps such as 3-5, or 3",
    Rows: "groups of settings by name",
}


@runtime_checkable
class Range(Protocol):
    """Values of a type that make sense."""

    def check(self, value: Any) -> bool:
        """Whether the value is one of them."""
        ...

    def expected(self, noun: str) -> str:
        """The text that follows "expected" in a refusal; `noun` is the type's."""
        ...


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """Numbers from `least` on; one more number may stand for something else, which `meaning` tells."""

    least: Number
    besides: Number | None = None
    meaning: str = ""

    def check(self, value: Number) -> bool:
        return value >= self.least or value == self.besides

    def expected(self, noun: str) -> str:
        text = f"{noun} of at least {self.least}"
        return text if self.besides is None else f"{text}, or {self.besides} for {self.meaning}"


@dataclasses.dataclass(frozen=True)
class Above:
    """Numbers greater than `bound`, and at most `most`."""

    bound: Number
    most: Number | None = None

    def check(self, value: Number) -> bool:
        return value > self.bound and (self.most is None or value <= self.most)

    def expected(self, noun: str) -> str:
        if self.most is not None:
            return f"more than {self.bound} and at most {self.most}"
        return f"{noun} above {self.bound}" if self.bound else "a positive number"


@dataclasses.dataclass(frozen=True)
class Within:
    """Numbers from `least` to `most`; `text` says so in other words where a rule ties them to another setting."""

    least: Number
    most: Number
    text: str = ""

    def check(self, value: Number) -> bool:
        return self.least <= value <= self.most

    def expected(self, noun: str) -> str:
        return self.text or f"{noun} from {self.least} to {self.most}"


@dataclasses.dataclass(frozen=True)
class Below:
    """Numbers from `least` on, below `bound`."""

    least: Number
    bound: Number

    def check(self, value: Number) -> bool:
        return self.least <= value < self.bound

    def expected(self, noun: str) -> str:
        return f"{noun} of at least {self.least} and below {self.bound}"


@dataclasses.dataclass(frozen=True)
class MultipleOf:
    """Positive multiples of `step`, plus `rest`."""

    step: int
    rest: int = 0

    def check(self, value: int) -> bool:
        return value >= self.step and value % self.step == self.rest

    def expected(self, noun: str) -> str:
        if self.rest:
            return f"{self.step}n+{self.rest}, at least {self.step + self.rest}"
        return f"a multiple of {self.step}"


@dataclasses.dataclass(frozen=True)
class OneOf:
    """One of the texts, which may include the empty one; what a table's keys gain later counts as well."""

    choices: Collection[str]

    def check(self, value: str) -> bool:
        return value in self.choices

    def expected(self, noun: str) -> str:
        *most, last = filter(None, self.choices)
        text = (
            f"one of {', '.join((*most, last))}"
            if len(most) > 2
            else " or ".join(filter(None, (", ".join(most), last)))
        )
        return text + (", or empty" if "" in self.choices else "")


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Texts NAME=VALUE."""

    def check(self, value: Names) -> bool:
        return all(re.fullmatch(r"\w+=[^=]+", pair) for pair in value)

    def expected(self, noun: str) -> str:
        return "NAME=VALUE separated by commas, or empty"


@dataclasses.dataclass(frozen=True)
class Numbers:
    """Whole numbers from 0 on."""

    def check(self, value: Names) -> bool:
        return all(re.fullmatch(r"\d+", number, re.ASCII) for number in value)

    def expected(self, noun: str) -> str:
        return "whole numbers of at least 0 separated by commas, or empty"


@dataclasses.dataclass(frozen=True)
class Listed:
    """Some of the names; none of them too where `empty`."""

    choices: Names
    empty: bool = False

    def check(self, value: Names) -> bool:
        return set(value) <= set(self.choices) and (self.empty or bool(value))

    def expected(self, noun: str) -> str:
        return f"some of {', '.join(self.choices)}" + (", or empty" if self.empty else "")


@dataclasses.dataclass(frozen=True)
class Table:
    """Groups of settings, each by a name of lower-case letters, digits and underscores; whose setting `type` decides which settings
    the others are.

    Attributes:
        section: the section of a type; a ValueError says what was expected instead.
    """

    section: Callable[[str], type]

    def check(self, value: Rows) -> bool:
        return all(re.fullmatch(r"[a-z][a-z0-9_]*", name) for name, _ in value)

    def expected(self, noun: str) -> str:
        return f"{noun}, in a config file"

    def build(self, values: Any, key: str) -> tuple[Rows, dict[str, str]]:
        """The rows of an edge form in the order of their names, without those that cannot be read, and what is wrong, by key. A
        row without a type has that of its name.
        """
        if not isinstance(values, dict):
            return (), {key: f"expected {NOUNS[Rows]}, got {values!r}"}
        rows, faults = [], {}
        for name, row in sorted((str(name), row) for name, row in values.items()):
            where = f"{key}.{name}"
            if not self.check(((name, row),)):
                faults[where] = f"expected a name of lower-case letters, digits and underscores, got {name!r}"
            elif not isinstance(row, dict):
                faults[where] = f"expected a group of settings, got {row!r}"
            elif not isinstance(kind := row.get("type") or name, str):
                faults[f"{where}.type"] = f"expected str, got {kind!r}"
            else:
                try:
                    section, inner = build(self.section(kind), {**row, "type": kind}, f"{where}.")
                except ValueError as error:
                    section, inner = None, {f"{where}.type": str(error)}
                faults |= inner
                rows += [] if inner else [(name, section)]
        return tuple(rows), faults


def names(text: str) -> Names:
    """The names in a text that commas separate."""
    return tuple(name.strip() for name in text.split(",") if name.strip())


def step_range(text: str) -> StepRange:
    """First and last of "3-5" or "3"; None of an empty text.

    Raises:
        ValueError: the text is of another form, counts from 0 or backwards.
    """
    found = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
    if not text:
        return None
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise ValueError(text)
    return first, last


@dataclasses.dataclass(frozen=True)
class Setting:
    """One setting of a section.

    Attributes:
        key: its name, after the names of its sections and dots.
        kind: its type.
        range: values that make sense; None: all of the type.
        meaning: one line of documentation.
        default: of its type, not in the edge form.
    """

    key: str
    kind: Any
    range: Range | None
    meaning: str
    default: Any

    @property
    def edge(self) -> type:
        """The type of the edge form."""
        if self.kind == Rows:
            return dict
        return self.kind if self.kind in (bool, int, float) else str

    @property
    def expected(self) -> str:
        """Type and range in words."""
        return self.range.expected(NOUNS[self.kind]) if self.range else NOUNS[self.kind]

    def read(self, value: Any) -> Any:
        """The value of an edge form. A whole number may stand for a float, None for an empty text.

        Raises:
            ValueError: of another type, or out of range; the message tells what was expected.
        """
        if isinstance(self.range, Table):
            rows, faults = self.range.build(value, self.key)
            if faults:
                raise ValueError("; ".join(faults.values()))
            return rows
        if self.edge is float and type(value) is int:
            value = float(value)
        if self.edge is str and value is None:
            value = ""
        if isinstance(value, bool) != (self.edge is bool) or not isinstance(value, self.edge):
            raise ValueError(f"expected {self.edge.__name__}, got {value!r}")
        try:
            found = names(value) if self.kind == Names else step_range(value) if self.kind == StepRange else value
        except ValueError:
            raise ValueError(f"expected {self.expected}, got {value!r}") from None
        if self.range and not self.range.check(found):
            raise ValueError(f"expected {self.expected}, got {value!r}")
        return found

    def write(self, value: Any) -> bool | int | float | str | dict[str, Any]:
        """The edge form of a value."""
        if self.kind == Rows:
            return {name: edge_form(section) for name, section in value}
        if self.kind == Names:
            return ",".join(value)
        if self.kind == StepRange:
            return "" if value is None else "-".join(map(str, sorted(set(value))))
        return value


def own_settings(kind: type) -> dict[str, Setting]:
    """The settings of a section by name, without those of its own sections."""
    found = {}
    hints = get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        if get_origin(hints[field.name]) is Annotated:
            hint, *ranges, meaning = get_args(hints[field.name])
            if get_origin(hint) is Literal:
                hint, ranges = str, [OneOf(get_args(hint))]
            found[field.name] = Setting(field.name, hint, ranges[0] if ranges else None, meaning, field.default)
    return found


def sections(kind: type) -> dict[str, type]:
    """The sections that are fields of a section, by name."""
    hints = get_type_hints(kind).items()
    return {name: hint for name, hint in hints if isinstance(hint, type) and dataclasses.is_dataclass(hint)}


def settings(kind: type, prefix: str = "") -> Iterator[Setting]:
    """All settings of a section in order, those of its own sections last."""
    for setting in own_settings(kind).values():
        yield dataclasses.replace(setting, key=prefix + setting.key)
    for name, section in sections(kind).items():
        yield from settings(section, f"{prefix}{name}.")


T = TypeVar("T")


def build(kind: type[T], values: dict[str, Any], prefix: str = "") -> tuple[T, dict[str, str]]:
    """A section of edge forms.

    Args:
        kind: the section.
        values: by name; settings that are absent keep their defaults.
        prefix: of its settings' keys.

    Returns:
        The section, with defaults in place of what cannot be read; and what is wrong with those settings, by key.
    """
    own, nested = own_settings(kind), sections(kind)
    fields: dict[str, Any] = {}
    faults: dict[str, str] = {}
    listed = f", expected one of {', '.join(sorted({*own, *nested}))}"
    for name, value in values.items():
        key = prefix + name
        if name in own and isinstance(table := own[name].range, Table):
            fields[name], inner = table.build(value, key)
            faults |= inner
        elif name in own:
            try:
                fields[name] = own[name].read(value)
            except ValueError as error:
                faults[key] = str(error)
        elif name not in nested:
            if near := did_you_mean(name, {*own, *nested}, prefix):
                faults[key] = f"unknown key{near}"
            else:  # the list once
                faults[key], listed = f"unknown key{listed}", ""
        elif isinstance(value, dict):
            fields[name], inner = build(nested[name], value, f"{key}.")
            faults |= inner
        else:
            faults[key] = f"expected a group of settings, got {value!r}"
    return kind(**fields), faults


def edge_form(section: Any) -> dict[str, Any]:
    """The edge forms of a section's values by name, those of its own sections as dictionaries."""
    own = {name: setting.write(getattr(section, name)) for name, setting in own_settings(type(section)).items()}
    return own | {name: edge_form(getattr(section, name)) for name in sections(type(section))}
