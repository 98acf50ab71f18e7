"""``profile --host`` and ``tune --host``: the measurement on a device, over SSH.

The bundles go there through the connection, the report comes back through it, and nothing else leaves the two
machines. On the device everything lies in one temporary folder. The program's standard input stays open as long as the
connection lives: when it ends, the device stops the measurement and removes the folder by itself.
"""

from __future__ import annotations

import io
import shlex
import subprocess
import tarfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tinyusfm_runtime.bundle.reader import MANIFEST_NAME, Bundle
from tinyusfm_runtime.errors import EngineError, InputError, UnsupportedError
from tinyusfm_runtime.strict_json import parse_json
from tinyusfm_runtime.trust.statement import SIGNATURE_NAME

MARK = "tinyusfm-profile "
"""Begins the line that carries the exit code; what a login prints before it is passed over."""
SSH_FAILED = 255
"""Exit code of ssh itself."""
MAX_ANSWER_BYTES = 256 << 20
_SCRIPT = r"""
d=$(mktemp -d "${TMPDIR:-/tmp}/tinyusfm-profile.XXXXXX") || exit 73
p=; w=
end() { for k in $p $w; do kill "$k" 2>/dev/null; done; [ -n "$p" ] && wait "$p" 2>/dev/null; rm -rf "$d"; }
trap end EXIT
trap 'exit 129' HUP TERM INT
head -c @SIZE@ > "$d/in.tar" && tar -xf "$d/in.tar" -C "$d" || exit 74
rm -f "$d/in.tar"
exec 3<&0
if [ -f "$d/this.whl" ]; then
  @PYTHON@ -m zipfile -e "$d/this.whl" "$d/site" || exit 75
  PYTHONPATH="$d/site"; export PYTHONPATH
fi
( cd "$d" && exec @PYTHON@ -m tinyusfm_edge @WORDS@ ) > "$d/log" 2>&1 < /dev/null &
p=$!
( cat > /dev/null; kill -TERM $$ ) <&3 2>/dev/null &
w=$!
wait "$p"; rc=$?
p=
printf '%s%s\n' '@MARK@' "$rc"
touch "$d/out.json"
tar -cf - -C "$d" out.json log
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class Device:
    """Where a measurement runs.

    Attributes:
        host: ``user@device``, as ssh takes it.
        ssh: the program with its own options.
        python: interpreter there.
        wheel: wheel of this toolkit that is copied there, or None where it is installed.
    """

    host: str
    ssh: Sequence[str] = ("ssh",)
    python: str = "python3"
    wheel: Path | None = None

    def __post_init__(self) -> None:
        """Checks the host.

        Raises:
            InputError: it would be an option of ssh, or is empty.
        """
        if not self.host or self.host.startswith("-") or any(letter.isspace() for letter in self.host):
            raise InputError(f"--host {self.host!r}: give user@device or the name of an ssh host")


def profile_on(device: Device, bundle: Path, words: Sequence[str]) -> tuple[dict[str, Any], str]:
    """Runs ``profile`` on a device.

    Args:
        device: where.
        bundle: a bundle's folder here; every byte of it is verified first.
        words: further words of the command.

    Returns:
        The report, and what the command printed there.

    Raises:
        UnsupportedError: the device cannot be reached, or the command could not run there.
        EngineError: the measurement failed there.
        BundleError, InputError: the bundle here cannot be used.
    """
    there = ["profile", "this.bundle", "--json", "out.json", *words]
    return command_on(device, there, bundle_files(bundle, "this.bundle"))


def command_on(device: Device, words: Sequence[str], files: Mapping[str, bytes]) -> tuple[dict[str, Any], str]:
    """Runs a command of this toolkit on a device.

    Args:
        device: where.
        words: behind ``tinyusfm-edge``; the command writes its report to ``out.json``.
        files: path there -> content, laid into the folder where it runs.

    Returns:
        The report, and what the command printed there.

    Raises:
        UnsupportedError: the device cannot be reached, or the command could not run there.
        EngineError: the measurement failed there.
    """
    packed = _packed(files, device.wheel)
    fields = {
        "SIZE": str(len(packed)), "PYTHON": shlex.quote(device.python), "MARK": MARK,
        "WORDS": " ".join(shlex.quote(word) for word in words),
    }  # fmt: skip
    script = _SCRIPT
    for name, text in fields.items():
        script = script.replace(f"@{name}@", text)
    command = [*device.ssh, "-T", "-o", "BatchMode=yes", "--", device.host, f"sh -c {shlex.quote(script)}"]
    return _answer(device, words[0], *_talk(command, packed))


def _talk(command: Sequence[str], packed: bytes) -> tuple[bytes, bytes, int]:
    """Sends the bundle and reads the answer.

    Standard input stays open until the answer has come.
    """
    try:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    except OSError as error:
        raise UnsupportedError(f"{command[0]} cannot be started: {error.strerror or error}") from error
    assert process.stdin is not None and process.stdout is not None and process.stderr is not None
    try:
        try:
            process.stdin.write(packed)
            process.stdin.flush()
        except BrokenPipeError:
            pass  # the reason stands in what ssh prints
        answer = process.stdout.read(MAX_ANSWER_BYTES)
        process.stdin.close()
        errors = process.stderr.read(1 << 16)
        return answer, errors, process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
        for stream in (process.stdin, process.stdout, process.stderr):
            try:
                stream.close()
            except BrokenPipeError:
                continue


def _answer(device: Device, name: str, answer: bytes, errors: bytes, code: int) -> tuple[dict[str, Any], str]:
    _, *behind = answer.split(MARK.encode(), 1)
    said = " ".join(errors.decode("utf-8", "replace").split())[-300:]
    if not behind:
        why = {SSH_FAILED: "ssh failed", 73: "no temporary folder there", 74: "the bundle did not arrive whole"}
        raise UnsupportedError(f"{device.host}: {why.get(code, f'exit code {code}')}: {said or 'the connection ended'}")
    line, _, packed = behind[0].partition(b"\n")
    try:
        with tarfile.open(fileobj=io.BytesIO(packed)) as tar:
            files = {one: _member(tar, one) for one in ("out.json", "log")}
        log, report = files["log"].decode("utf-8", "replace"), files["out.json"]
        if line.strip() != b"0" or not report:
            last = (log.strip().splitlines() or ["it printed nothing"])[-1]
            raise EngineError(f"{device.host}: {name} ended with {line.decode('ascii', 'replace')}: {last}")
        data = parse_json(report)
    except (tarfile.TarError, KeyError, ValueError, RecursionError) as error:
        raise UnsupportedError(f"{device.host}: the answer was cut off ({error}); nothing was kept") from error
    if not isinstance(data, dict):
        raise UnsupportedError(f"{device.host}: the answer is no report")
    return {**data, "host": device.host.rpartition("@")[2]}, log


def _member(tar: tarfile.TarFile, name: str) -> bytes:
    stream = tar.extractfile(name)
    if stream is None:
        raise KeyError(name)
    return stream.read(MAX_ANSWER_BYTES)


def bundle_files(bundle: Path, name: str) -> dict[str, bytes]:
    """Every file of a bundle, verified, under a folder's name.

    Args:
        bundle: its folder here.
        name: folder there, such as ``this.bundle``.

    Raises:
        BundleError, InputError: it cannot be used.
    """
    opened = Bundle.open(bundle, on_device=False)
    names = [*opened.manifest.files, MANIFEST_NAME]
    names += [SIGNATURE_NAME] if (bundle / SIGNATURE_NAME).is_file() else []
    try:
        return {f"{name}/{one}": (bundle / one).read_bytes() for one in names}
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error


def _packed(files: Mapping[str, bytes], wheel: Path | None) -> bytes:
    """The files, and the wheel where one is given, as one tar."""
    buffer = io.BytesIO()
    try:
        with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for name, content in files.items():
                _add(tar, name, content)
            if wheel is not None:
                _add(tar, "this.whl", wheel.read_bytes())
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror or error}") from error
    return buffer.getvalue()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))


__all__ = ["MARK", "MAX_ANSWER_BYTES", "SSH_FAILED", "Device", "bundle_files", "command_on", "profile_on"]
