"""The audit log's chain, and the check of a whole file.

Each record carries the hash of the one before.

One JSON object per line, keys sorted, no spaces: ``{"body":{...},"hash":H,"n":N,"prev":P,"schema":1}``.
``H`` is the SHA-256, in hex, of the line's canonical JSON without ``hash``; ``prev`` is the hash of
the line before, 64 zeros for the first; ``n`` counts from 0.

What it proves and what not: a line that was edited, deleted, inserted or moved breaks the chain. No
key is involved, so someone who rewrites every later line as well makes a whole chain again, and
cutting lines off the end leaves one. Both are found with a *head*: the last hash, written down
elsewhere. A file that has grown since still holds that head.

It does not know what the bodies say (sinks/audit.py does).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from tinyusfm_runtime.errors import InputError
from tinyusfm_runtime.strict_json import parse_json

SCHEMA = 1
START = "0" * 64
"""``prev`` of the first record."""
MAX_LINE_BYTES = 1 << 16


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """Whether a log is whole. True in a condition if it is.

    Attributes:
        records: records that hang together, counted from the start.
        head: hash of the last of them, 64 zeros if there is none.
        fault: why the chain does not hold, one line, or None.
        closed: the last record is an orderly end; a log that is being written, was killed, or lost its end is not.
        head_at: number of the record whose hash is the head that was asked for, or None.
        torn_bytes: bytes of a last line that breaks off (a killed writer leaves such a line).
    """

    records: int
    head: str
    fault: str | None = None
    closed: bool = False
    head_at: int | None = None
    torn_bytes: int = 0

    def __bool__(self) -> bool:
        return self.fault is None


def record_line(n: int, prev: str, body: Mapping[str, Any]) -> tuple[bytes, str]:
    """Makes one record.

    Args:
        n: its number, from 0.
        prev: hash of the record before, or ``START``.
        body: plain data; numbers must be finite.

    Returns:
        The line with its newline, and its hash.
    """
    record = {"schema": SCHEMA, "n": n, "prev": prev, "body": dict(body)}
    digest = hashlib.sha256(_canonical(record)).hexdigest()
    return _canonical({**record, "hash": digest}) + b"\n", digest


def verify_file(path: str | Path, *, head: str | None = None) -> AuditReport:
    """Checks a log from its first byte to its last.

    Args:
        path: the file.
        head: a hash that must stand in the chain, as printed when the log was closed, or None.

    Returns:
        The verdict; a log that does not hold is a report, not an error.

    Raises:
        InputError: there is no such file, it cannot be read, or the head is not 64 hexadecimal digits.
    """
    if head is not None and (len(head) != 64 or set(head.lower()) - set("0123456789abcdef")):
        raise InputError("a head is 64 hexadecimal digits, as printed when the log was closed")
    try:
        with Path(path).open("rb") as file:
            return _verify(file, None if head is None else head.lower())
    except OSError as error:
        raise InputError(f"the audit log {path} cannot be read: {error.strerror or type(error).__name__}") from error


def _verify(file: BinaryIO, head: str | None) -> AuditReport:
    n, prev, closed, head_at, torn = 0, START, False, None, 0
    fault = None
    for line in _lines(file):
        if not line.endswith(b"\n"):
            torn = len(line)
            fault = f"record {n} breaks off: the writer was killed, or the end was cut"
            break
        fault, record = check_line(line, n, prev)
        if fault is not None or record is None:
            break
        prev = record["hash"]
        closed = record["body"].get("event") == "close"
        head_at = n if prev == head else head_at
        n += 1
    if fault is None and head is not None and head_at is None:
        fault = "the known head is not in it: its end was cut off, or it was written again"
    return AuditReport(records=n, head=prev, fault=fault, closed=closed, head_at=head_at, torn_bytes=torn)


def check_line(line: bytes, n: int, prev: str) -> tuple[str | None, dict[str, Any] | None]:
    """Checks one line against its place.

    Returns:
        (fault, None) or (None, record).
    """
    try:
        record = parse_json(line)
        whole = isinstance(record, dict) and set(record) == {"schema", "n", "prev", "body", "hash"}
    except ValueError:
        whole = False
    if not whole or not isinstance(record["body"], dict):
        return f"record {n} is not a record of an audit log", None
    if record["schema"] != SCHEMA:
        return f"record {n} has another version than {SCHEMA}", None
    if _canonical(record) + b"\n" != line:
        return f"record {n} was edited: it is not written as this log writes", None
    claimed = record.pop("hash")
    if hashlib.sha256(_canonical(record)).hexdigest() != claimed:
        return f"record {n} was edited: its hash does not fit its content", None
    if record["n"] != n or record["prev"] != prev:
        return f"record {n} does not follow the one before: records were deleted, inserted or moved", None
    return None, {**record, "hash": claimed}


def _lines(file: BinaryIO) -> Iterator[bytes]:
    """Lines of bounded length, so that no file can fill the memory."""
    while line := file.readline(MAX_LINE_BYTES):
        yield line if line.endswith(b"\n") or len(line) < MAX_LINE_BYTES else line + b"\n"


def _canonical(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


__all__ = ["MAX_LINE_BYTES", "SCHEMA", "START", "AuditReport", "check_line", "record_line", "verify_file"]
