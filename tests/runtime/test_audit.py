"""The audit log: whole after whatever happens to its writer, and no tampering goes unseen (each with its control)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import child_environment
from tests.runtime.live_driver import driver, live_result, phantoms
from tinyusfm_edge.cli.main import main
from tinyusfm_runtime.errors import InputError, OutputError
from tinyusfm_runtime.results import LiveState, StateChange
from tinyusfm_runtime.sinks import RunFacts, audit, open_sink
from tinyusfm_runtime.sinks.audit.chain import SCHEMA, START, check_line, record_line, verify_file

BUNDLE_ID = "ab" * 32
RESULT_KEYS = {"reading", "second_pass", "drift_status"} | {
    "event", "index", "seq", "valid", "stale", "withheld", "degraded", "answered", "age_ms", "state", "level", "target",
    "precision", "dropped",
}  # fmt: skip


def bodies(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line)["body"] for line in path.read_bytes().splitlines()]


@pytest.fixture
def log(tmp_path: Path) -> tuple[Path, str]:
    """A log of one orderly run, and its head."""
    path = tmp_path / "audit.jsonl"
    with open_sink(f"audit:{path}", facts=RunFacts(bundle_id=BUNDLE_ID, rate_hz=30.0)) as sink:
        for seed in range(6):
            sink.write_live(live_result(seed, dropped_since_last=seed % 2))  # type: ignore[attr-defined]
    return path, sink.head  # type: ignore[attr-defined]


def test_a_run_of_a_session_is_told_without_patients(fake_bundle: Path, plug_in: object, tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with driver(fake_bundle, late=frozenset({4}), broken=frozenset({2}), drop=frozenset({1, 3})) as live:
        with open_sink(f"audit:{path}", bundle_id=live.session.manifest.manifest_sha256) as sink:
            live.run(phantoms(6), [sink])
        bundle_id = live.session.manifest.manifest_sha256
    found = bodies(path)
    assert found[0]["event"] == "open" and found[0]["bundle"] == bundle_id
    results = [body for body in found if body["event"] == "result"]
    assert [body["seq"] for body in results] == [0, 2, 4, 5]
    assert [body["dropped"] for body in results] == [0, 1, 1, 0]
    assert [body["answered"] for body in results] == [True, False, True, True]
    assert [body["withheld"] for body in results] == [False, False, True, False]
    assert all(set(body) == RESULT_KEYS for body in results), "nothing else is ever written"
    assert [(b["before"], b["after"]) for b in found if b["event"] == "state"][:2] == [
        ("lost", "live"),
        ("live", "degraded"),
    ]
    assert found[-1]["results"] == 4 and found[-1]["dropped"] == 2 and found[-1]["failed"] is None
    report = verify_file(path)
    assert report and report.closed and report.head == sink.head  # type: ignore[attr-defined]
    assert report.records == len(found)


def test_no_free_text_enters_the_log(tmp_path: Path) -> None:
    secret = "Doe^Jane"
    path = tmp_path / "audit.jsonl"
    with audit.open_sink(str(path)) as sink:
        sink.write_live(live_result(1, error=secret, engine=secret, prediction=None))
        sink.on_state(StateChange(before=LiveState.LIVE, after=LiveState.LOST, t_ns=5, reason=secret))
    with pytest.raises(RuntimeError), audit.open_sink(str(path)):
        raise RuntimeError(secret)
    assert secret not in path.read_text(encoding="utf-8")
    assert bodies(path)[-1]["failed"] == "RuntimeError"
    assert verify_file(path)


# one control for each way to tamper: the change, and words of the verdict


def edit(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[3].replace(b'"stale":false', b'"stale":true'), *lines[4:]]


def edit_and_rehash(lines: list[bytes]) -> list[bytes]:
    """Edits one record and gives it a fitting hash; only the next one's ``prev`` tells."""
    record = json.loads(lines[3])
    new, _ = record_line(record["n"], record["prev"], {**record["body"], "age_ms": 1.0})
    return [*lines[:3], new, *lines[4:]]


def delete(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], *lines[4:]]


def insert(lines: list[bytes]) -> list[bytes]:
    new, _ = record_line(4, json.loads(lines[3])["hash"], json.loads(lines[3])["body"])
    return [*lines[:4], new, *lines[4:]]


def reorder(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[4], lines[3], *lines[5:]]


def respace(lines: list[bytes]) -> list[bytes]:
    return [*lines[:3], lines[3].replace(b",", b", "), *lines[4:]]


def replace_version(lines: list[bytes]) -> list[bytes]:
    return [lines[0].replace(b'"schema":1', b'"schema":2'), *lines[1:]]


def truncate(lines: list[bytes]) -> list[bytes]:
    return lines[:-2]


def rewrite(lines: list[bytes]) -> list[bytes]:
    """Edits a record and writes all that follow again: a whole chain, but another one."""
    prev, made = START, []
    for n, line in enumerate(lines):
        line, prev = record_line(n, prev, {**json.loads(line)["body"], "age_ms": 1.0})
        made.append(line)
    return made


TAMPERINGS: dict[Callable[[list[bytes]], list[bytes]], str] = {
    edit: "edited", edit_and_rehash: "does not follow", delete: "does not follow", insert: "does not follow",
    reorder: "does not follow", respace: "edited", replace_version: "another version",
}  # fmt: skip
NEED_THE_HEAD = (truncate, rewrite)


@pytest.mark.parametrize("tamper", TAMPERINGS, ids=lambda f: f.__name__)
def test_tampering_is_caught(
    log: tuple[Path, str], tamper: Callable[[list[bytes]], list[bytes]], capsys: pytest.CaptureFixture[str]
) -> None:
    path, _ = log
    assert main(["audit", "verify", str(path)]) == 0, "the untouched log holds"
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    report = verify_file(path)
    assert not report and TAMPERINGS[tamper] in str(report.fault)
    capsys.readouterr()
    assert main(["audit", "verify", str(path)]) == 1
    assert "BROKEN" in capsys.readouterr().out
    with pytest.raises(OutputError, match="cannot go on"):
        audit.open_sink(str(path))


@pytest.mark.parametrize("tamper", NEED_THE_HEAD, ids=lambda f: f.__name__)
def test_what_only_a_known_head_finds(log: tuple[Path, str], tamper: Callable[[list[bytes]], list[bytes]]) -> None:
    path, head = log
    assert main(["audit", "verify", str(path), "--head", head]) == 0
    path.write_bytes(b"".join(tamper(path.read_bytes().splitlines(keepends=True))))
    assert verify_file(path), "without the head it looks whole"
    report = verify_file(path, head=head)
    assert not report and "known head" in str(report.fault)
    assert main(["audit", "verify", str(path), "--head", head.upper()]) == 1


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_single_changed_byte_goes_unseen(log: tuple[Path, str], data: st.DataObject) -> None:
    path, head = log
    content = bytearray(path.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= data.draw(st.integers(1, 255))
    spoilt = path.with_name("spoilt.jsonl")
    spoilt.write_bytes(bytes(content))
    assert not verify_file(spoilt, head=head)


def test_a_log_that_grew_still_holds_its_old_head(log: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    path, head = log
    with audit.open_sink(str(path)) as sink:
        sink.write_live(live_result(9))
    assert sink.head != head and sink.records == 11
    assert main(["audit", "verify", str(path), "--head", head]) == 0
    assert "found at record 7" in capsys.readouterr().out


KILLED = """
import os, sys
from tests.runtime.live_driver import live_result
from tinyusfm_runtime.sinks import audit
sink = audit.open_sink(sys.argv[1])
for seed in range(4):
    sink.write_live(live_result(seed))
print(sink.head, flush=True)
os.write(sink._fd, b'{"body":{"event":"resu')
os.kill(os.getpid(), 9)
"""


def test_a_killed_run_is_continued_and_says_so(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", KILLED, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=900, check=False)
    assert done.returncode == -9, done.stderr
    torn = verify_file(path)
    assert not torn and torn.torn_bytes == 22 and torn.records == 5 and "breaks off" in str(torn.fault)
    with audit.open_sink(str(path)) as sink:
        sink.write_live(live_result(7))
    report = verify_file(path, head=done.stdout.strip())
    assert report and report.closed and report.head_at == 4
    events = [body["event"] for body in bodies(path)]
    assert events == ["open", *["result"] * 4, "open", "recovered", "result", "close"]
    assert bodies(path)[6]["cut_bytes"] == 22


def test_two_runs_cannot_write_one_log(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with audit.open_sink(str(path)) as first:
        with pytest.raises(OutputError, match="another run"):
            audit.open_sink(str(path))
        first.write_live(live_result(1))
    assert verify_file(path).records == 3


FULL = """
import resource, signal, sys
from tests.runtime.live_driver import live_result
from tinyusfm_runtime.errors import OutputError
from tinyusfm_runtime.sinks import audit
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sink = audit.open_sink(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (2048, 2048))
try:
    for seed in range(100):
        sink.write_live(live_result(1))
except OutputError as error:
    print(error)
"""


def test_a_full_disk_leaves_a_whole_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=child_environment(), timeout=900, check=False)
    assert "cannot write the audit log" in done.stdout, done.stderr
    report = verify_file(path)
    assert report and not report.closed and report.records > 2 and not report.torn_bytes


def test_what_is_not_a_log(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        verify_file(tmp_path / "none")
    with pytest.raises(InputError, match="64 hexadecimal"):
        verify_file(tmp_path / "none", head="xyz")
    for content in (b"[]\n", b"\xff\xfe\n", b"{}\n", b"\n", b"x" * 200_000):
        (tmp_path / "other").write_bytes(content)
        assert not verify_file(tmp_path / "other")
    with pytest.raises(OutputError):
        audit.open_sink(str(tmp_path))
    with pytest.raises(OutputError, match="cannot write the audit log"):
        audit.open_sink(str(tmp_path / "no" / "folder"))
    (tmp_path / "empty").touch()
    assert verify_file(tmp_path / "empty").records == 0


def test_numbers_that_are_not_finite_do_not_break_the_chain(tmp_path: Path) -> None:
    path = tmp_path / "audit.jsonl"
    with audit.open_sink(str(path)) as sink:
        sink.write_live(live_result(1, age_ms=float("nan")))
    assert verify_file(path) and bodies(path)[1]["age_ms"] is None


def test_a_record_is_what_the_docstring_says() -> None:
    line, digest = record_line(0, START, {"event": "x"})
    assert line == (
        b'{"body":{"event":"x"},"hash":"' + digest.encode() + b'","n":0,"prev":"' + START.encode() + b'","schema":1}\n'
    )
    assert SCHEMA == 1 and check_line(line, 0, START)[0] is None
