"""What came of one kind of attack, and how one attack is made: shared by the parts of ``broken.py``."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from tinyusfm_runtime.bundle.manifest import file_entry, manifest_bytes, read_manifest
from tinyusfm_runtime.errors import EdgeError

HANGS_S = 60.0
"""By the clock; nothing here waits for anything."""


@dataclass(kw_only=True)
class Outcome:
    """What came of one kind of attack.

    Attributes:
        name: of the attack.
        tries: how many were made.
        slowest_s: longest one.
        counts: outcome -> how often.
        faults: what must not happen, in words.
        limit: what is promised, in words.
    """

    name: str
    tries: int = 0
    slowest_s: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    limit: str = ""

    def row(self) -> str:
        """One line for people."""
        return f"{self.name:<38} {self.tries:>6}  slowest {self.slowest_s:6.2f} s  {self._counted()}  {self._verdict()}"

    def table_row(self) -> str:
        """One row of the reliability table, in Markdown."""
        cells = (self.name, f"{self.tries}", self._counted(), f"{self.slowest_s:.2f} s", self.limit, self._verdict())
        return "| " + " | ".join(cells) + " |"

    def _counted(self) -> str:
        return ", ".join(f"{name} {count}" for name, count in sorted(self.counts.items()))

    def _verdict(self) -> str:
        if not self.tries and not self.faults:
            return "not run"
        return "holds" if not self.faults else f"MISSED: {self.faults[0]} ({len(self.faults)})"


TABLE_HEADER = "| attack | tries | outcomes | slowest | limit | |\n|---|---|---|---|---|---|"
"""Above the rows of ``Outcome.table_row``."""


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """One random damage: bits, a cut, a tail, zeros, a part twice, an odd number in text."""
    if not raw:
        return b"\0"
    place, length = rng.randrange(len(raw)), rng.randrange(1, 64)
    kind = rng.randrange(6)
    if kind == 0:
        return raw[:place] + bytes([raw[place] ^ (1 << rng.randrange(8))]) + raw[place + 1 :]
    if kind == 1:
        return raw[:place]
    if kind == 2:
        return raw + rng.randbytes(length)
    if kind == 3:
        return raw[:place] + bytes(length) + raw[place + length :]
    if kind == 4:
        return raw[:place] + raw[place : place + length] + raw[place:]
    odd = rng.choice([b"1e999", b"-1", b"NaN", b"9" * 400, b"null", b"[" * 200, b"\xff\xfe", b"../x", b"\0"])
    return raw[:place] + odd + raw[place + len(odd) :]


def try_once(outcome: Outcome, call: Callable[[], object], limit_s: float) -> str:
    """Runs one attack; typed errors are right, anything else is a fault.

    Seconds are those of this process on a CPU, so that other work on the machine does not count; nothing may hang
    either.

    Args:
        outcome: where it is counted.
        call: the attack.
        limit_s: longest time allowed.

    Returns:
        ``accepted``, or the name of the error.
    """
    start, began = time.process_time(), time.perf_counter()
    try:
        call()
        found = "accepted"
    except EdgeError as error:
        found = type(error).__name__
    except Exception as error:
        found = f"untyped {type(error).__name__}"
        outcome.faults.append(f"{found}: {str(error)[:80]}")
    took, waited = time.process_time() - start, time.perf_counter() - began
    outcome.tries += 1
    outcome.counts[found] += 1
    outcome.slowest_s = max(outcome.slowest_s, took)
    if took > limit_s:
        outcome.faults.append(f"{took:.1f} s, {limit_s:g} allowed")
    if waited > HANGS_S:
        outcome.faults.append(f"it took {waited:.0f} s by the clock")
    return found


def hashed_again(raw: bytes, name: str, content: bytes) -> bytes:
    """A manifest that names the hash of what an attacker put into one file.

    Args:
        raw: the manifest.
        name: of the file; one that is not listed is listed with the first artefact.
        content: the file's new content.
    """
    manifest = read_manifest(raw)
    entry = file_entry(content)
    artefacts = tuple(
        replace(a, files={path: entry if path == name else old for path, old in a.files.items()})
        for a in manifest.artefacts
    )
    if name not in manifest.files:
        artefacts = (replace(artefacts[0], files={**artefacts[0].files, name: entry}), *artefacts[1:])
    return manifest_bytes(replace(manifest, files={**manifest.files, name: entry}, artefacts=artefacts))


__all__ = ["HANGS_S", "TABLE_HEADER", "Outcome", "hashed_again", "mutate", "try_once"]
