"""Order of files by their names.

Numbers by value where names are numbers, else natural order.

* Names that are numbers (``-2``, ``0.05``, ``1700000000.3``, ``0,1``) come by value.
* Other names come in natural order: ``img2`` before ``img10``. A number with one point inside a name is a decimal
  number (``t0.05`` before ``t0.1``), unless zeros at its end show that it is two counters (``1.9`` before ``1.10``).
* A minus is a sign at the beginning of a name and behind ``_ = ( ,`` or a space; behind anything else it is a hyphen.
* Names that come to the same place are a tie: the text decides, and the tie is reported.

It does not open files.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

from tinyusfm_runtime.images.kinds import SUFFIXES

WHOLE_NUMBER = re.compile(r"[-+\u2212]?(?:[0-9]+(?:[.,][0-9]+)?|[.,][0-9]+)(?:[eE][-+][0-9]{1,3})?")
"""A name that is a number, as Python or a spreadsheet writes it; a comma counts as the decimal point."""
HEXADECIMAL = re.compile(r"0[xX][0-9a-fA-F]{1,16}")
"""A name that is a hexadecimal number; without the 0x it is taken as text."""
_NUMBER = re.compile(r"((?:^|(?<=[_=(, ]))[-\u2212])?([0-9]+(?:[.,][0-9]+)*)")
_TEXT, _VALUE = 1, 0
AS_DECIMALS = "numbers in file names are taken as decimal numbers: 0.05 comes before 0.1, and 1.10 before 1.9"
AS_COUNTERS = "numbers with a point in file names are taken as two counters, as zeros end some: 1.9 comes before 1.10"

Key = tuple[tuple[int, Decimal, str], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Ordered:
    """Paths in order.

    Attributes:
        paths: in order.
        numeric: True if all names are numbers.
        ties: how many names share their place with the one before.
        notes: what a user should know about the order, one line each.
    """

    paths: tuple[Path, ...]
    numeric: bool
    ties: int
    notes: tuple[str, ...]


def in_order(paths: Iterable[Path]) -> Ordered:
    """Orders files by their names.

    Args:
        paths: files of one folder.

    Returns:
        The order, and what there is to report of it.
    """
    found = list(paths)
    stems = [_ascii_digits(stem(path)) for path in found]
    hexadecimal = len(found) > 0 and all(HEXADECIMAL.fullmatch(name) for name in stems)
    stems = [str(int(name, 16)) for name in stems] if hexadecimal else stems
    numeric = len(found) > 0 and all(WHOLE_NUMBER.fullmatch(name) for name in stems)
    decimals = numeric or not _are_counters(stems)
    keys = [_number_key(name) if numeric else _natural(name, decimals=decimals) for name in stems]
    ranked = sorted(zip(keys, found, strict=True), key=lambda pair: (pair[0], pair[1].name.casefold(), pair[1].name))
    ties = sum(here[0] == before[0] for before, here in zip(ranked, ranked[1:], strict=False))
    notes = []
    if not numeric and _would_be_numbers(stems, ranked):
        notes.append("names such as 1e3 are not taken as numbers: 1e+3 would be")
    if ties:
        notes.append(f"{ties} file names come to the same place in the order (such as 1 and 01): their text decides")
    if len(found) > 1 and _readings_differ(stems, keys, decimals=decimals):
        notes.append(AS_DECIMALS if decimals else AS_COUNTERS)
    return Ordered(paths=tuple(path for _, path in ranked), numeric=numeric, ties=ties, notes=tuple(notes))


def _ascii_digits(name: str) -> str:
    """The name with decimal digits of every script as 0 to 9."""
    if name.isascii():
        return name
    return "".join(str(unicodedata.decimal(letter, letter)) for letter in name)


def _would_be_numbers(stems: list[str], ranked: list[tuple[Key, Path]]) -> bool:
    """Whether names such as 1e3 would come in another order as numbers."""
    if not all(WHOLE_NUMBER.fullmatch(re.sub(r"[eE](?=[0-9])", "e+", name)) for name in stems):
        return False
    values = [float(_ascii_digits(stem(path)).replace(",", ".").replace("\u2212", "-")) for _, path in ranked]
    return values != sorted(values)


def natural_key(path: Path) -> list[tuple[int, Decimal, str]]:
    """Sort key of one name under which ``img2`` comes before ``img10``.

    Equal keys fall back to the text.

    A whole folder is better ordered by ``in_order``, which also sees whether all names are numbers.
    """
    name = _ascii_digits(stem(path))
    found = _number_key(name) if WHOLE_NUMBER.fullmatch(name) else _natural(name, decimals=True)
    return [*found, (2, Decimal(0), path.name)]


def stem(path: Path) -> str:
    """The name without an image's suffix; any other point belongs to the name."""
    name = path.name
    at = name.rfind(".")
    known = at > 0 and (name[at:].lower() in SUFFIXES or (name[at + 1 :].isalnum() and not name[at + 1 :].isdigit()))
    return name[:at] if known else name


def _number_key(name: str) -> Key:
    return ((_VALUE, Decimal(name.replace(",", ".").replace("\u2212", "-")), ""),)


def _natural(name: str, *, decimals: bool) -> Key:
    parts: list[tuple[int, Decimal, str]] = []
    at = 0
    text = name.casefold()
    for match in _NUMBER.finditer(text):
        if match.start() > at:
            parts.append((_TEXT, Decimal(0), text[at : match.start()]))
        at = match.end()
        sign, digits = (-1 if match[1] else 1), _parts(match[2])
        if decimals and len(digits) == 2:
            parts.append((_VALUE, sign * Decimal(".".join(digits)), ""))
        else:
            parts += [(_VALUE, (sign if not index else 1) * Decimal(part), "") for index, part in enumerate(digits)]
    if at < len(text):
        parts.append((_TEXT, Decimal(0), text[at:]))
    return tuple(parts)


def _parts(number: str) -> list[str]:
    return number.replace(",", ".").split(".")


def _are_counters(stems: Iterable[str]) -> bool:
    """True if numbers with a point are two counters.

    Zeros end some of them, and their lengths differ.
    """
    # behind the colon of a clock time stand seconds with decimals
    fractions = [
        part[1]
        for name in stems
        for match in _NUMBER.finditer(name)
        if len(part := _parts(match[2])) == 2 and name[: match.start()][-1:] != ":"
    ]
    return any(part.endswith("0") for part in fractions) and len({len(part) for part in fractions}) > 1


def _readings_differ(stems: list[str], keys: list[Key], *, decimals: bool) -> bool:
    """True if counters and decimal numbers would give two orders.

    Counters: 1.9 before 1.10. Decimal numbers: 1.10 before 1.9.
    """
    other = [_natural(name, decimals=not decimals) for name in stems]
    here = sorted(range(len(stems)), key=lambda index: (keys[index], stems[index]))
    return here != sorted(range(len(stems)), key=lambda index: (other[index], stems[index]))


__all__ = [
    "AS_COUNTERS",
    "AS_DECIMALS",
    "HEXADECIMAL",
    "WHOLE_NUMBER",
    "Key",
    "Ordered",
    "in_order",
    "natural_key",
    "stem",
]
