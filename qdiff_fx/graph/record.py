"""Reading JSON that may have been edited or made to do harm: every field typed, bounded, and none unknown."""

from __future__ import annotations

import keyword
import math
import re
from typing import Any, NoReturn, TypeVar

from qdiff_fx.errors import CheckpointError

_Kind = TypeVar("_Kind")

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_TEXT_LIMIT = 4096
MAXIMUM_DEPTH = 32
"""How deeply structures of inputs and outputs may nest."""

INTEGER_RANGE = range(-(2**63), 2**63)
"""What an operator's int argument can hold."""


def refuse(where: str, problem: str) -> NoReturn:
    """Raise CheckpointError for a stored value."""
    raise CheckpointError(f"{where}: {problem}; edited or damaged, save the model again")


class Record:
    """One JSON object. Take each field once; `finish` refuses what is left."""

    def __init__(self, value: Any, where: str) -> None:
        if not isinstance(value, dict):
            refuse(where, f"holds {_shown(value)}, want an object")
        self.where = where
        self._values: dict[str, Any] = dict(value)

    def __contains__(self, key: str) -> bool:
        return key in self._values

    def at(self, key: str) -> str:
        """The place of a field, for errors."""
        return f"{self.where}: {key}"

    def raw(self, key: str) -> Any:
        """The field, whatever it is. Raises CheckpointError if it is missing."""
        if key not in self._values:
            refuse(self.where, f"field {key!r} is missing")
        return self._values.pop(key)

    def take(self, key: str, kind: type[_Kind]) -> _Kind:
        """The field, which must be a `kind`."""
        return expect(self.raw(key), kind, self.at(key))

    def integer(self, key: str, lowest: int, highest: int) -> int:
        """The int field in [lowest, highest]."""
        value = self.take(key, int)
        if not lowest <= value <= highest:
            refuse(self.at(key), f"{_shown(value)}, want an integer in {lowest}..{highest}")
        return value

    def text(self, key: str) -> str:
        """The string field, of bounded length."""
        return text(self.raw(key), self.at(key))

    def identifier(self, key: str) -> str:
        """The string field that is a plain Python identifier."""
        return identifier(self.raw(key), self.at(key))

    def items(self, key: str) -> list[tuple[str, Any]]:
        """The list field, each item with its place."""
        return [(f"{self.at(key)}[{index}]", item) for index, item in enumerate(self.take(key, list))]

    def finish(self) -> None:
        """Raise CheckpointError if a field was not taken."""
        if self._values:
            refuse(self.where, f"unknown fields {_shown(sorted(self._values))}")


def expect(value: Any, kind: type[_Kind], where: str) -> _Kind:
    """`value`, which must be exactly a `kind` (a bool is no int)."""
    if type(value) is not kind:
        refuse(where, f"{_shown(value)}, want {kind.__name__}")
    return value


def text(value: Any, where: str) -> str:
    """A string of bounded length that UTF-8 can hold."""
    string = expect(value, str, where)
    if len(string) > _TEXT_LIMIT or any("\ud800" <= character <= "\udfff" for character in string):
        refuse(where, f"{_shown(string)}, want plain text of at most {_TEXT_LIMIT} characters")
    return string


def identifier(value: Any, where: str) -> str:
    """A string that fx may paste into source: [A-Za-z_][A-Za-z0-9_]*, no keyword, no dunder."""
    name = text(value, where)
    if not is_identifier(name):
        refuse(where, f"{_shown(name)}, want a name of letters, digits and underscores")
    return name


def is_identifier(name: str) -> bool:
    """Whether fx may paste `name` into source."""
    return bool(_IDENTIFIER.fullmatch(name)) and not keyword.iskeyword(name) and not name.startswith("__")


def finite(value: Any, where: str) -> float:
    """A finite float."""
    number = expect(value, float, where)
    if not math.isfinite(number):
        refuse(where, f"{number}, want a finite number")
    return number


def _shown(value: Any) -> str:
    """At most 60 characters of the value; integers of any size."""
    if isinstance(value, int) and not isinstance(value, bool) and value not in INTEGER_RANGE:
        return "an integer of more than 64 bits"
    return f"{value!r:.60}"
