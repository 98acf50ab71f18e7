"""Publishing is all or nothing: killed, out of room or refused, the old bundle stands and nothing lies about."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from tests.conftest import Parts, child_environment
from tinyusfm_runtime.atomic import held_folder
from tinyusfm_runtime.bundle import writer as publish
from tinyusfm_runtime.bundle.reader import MANIFEST_NAME, Bundle
from tinyusfm_runtime.bundle.writer import sweep
from tinyusfm_runtime.errors import BundleError, OutputError, TamperedError

ROUNDS = 40
OLD, NEW = "2026-01-01T00:00:00Z", "2027-01-01T00:00:00Z"


def names(folder: Path) -> list[str]:
    """What lies in a folder, hidden things included."""
    return sorted(path.name for path in folder.iterdir())


def refusal(parts: Parts, path: Path, **changes: object) -> str:
    """The one line with which publishing is refused."""
    with pytest.raises(OutputError) as caught:
        parts.publish(path, **changes)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def pid_that_is_gone() -> int:
    """A process id that was in use a moment ago."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


def test_a_new_bundle_appears_whole(fake_parts: Parts, tmp_path: Path) -> None:
    path = fake_parts.publish(tmp_path / "deep/er/b.bundle")
    assert path == tmp_path / "deep/er/b.bundle"
    assert names(path.parent) == ["b.bundle"]
    bundle = Bundle.open(path)
    assert bundle.manifest.created_utc == OLD
    assert set(bundle.manifest.files) == set(fake_parts.files)
    assert not any(file.stat().st_mode & 0o222 for file in path.rglob("*") if file.is_file()), "a bundle is read-only"


def test_the_time_is_filled_in(fake_parts: Parts, tmp_path: Path) -> None:
    created = Bundle.open(fake_parts.publish(tmp_path / "b", created_utc=None)).manifest.created_utc
    assert len(created) == 20 and created.endswith("Z") and abs(time.time() - _seconds(created)) < 60


def _seconds(created: str) -> float:
    from calendar import timegm

    return timegm(time.strptime(created, "%Y-%m-%dT%H:%M:%SZ"))


def test_the_same_parts_give_the_same_bytes(fake_parts: Parts, tmp_path: Path) -> None:
    one, two = (Bundle.open(fake_parts.publish(tmp_path / name)).manifest for name in ("a", "b"))
    assert one.manifest_sha256 == two.manifest_sha256


def test_an_older_bundle_is_replaced(fake_parts: Parts, tmp_path: Path) -> None:
    path = tmp_path / "b.bundle"
    fake_parts.publish(path)
    fake_parts.with_files(quant_dot_json=b"{}").publish(path, created_utc=NEW)
    bundle = Bundle.open(path)
    assert bundle.manifest.created_utc == NEW and bundle.read("quant.json") == b"{}"
    assert names(tmp_path) == ["b.bundle"]


def test_a_spoilt_bundle_and_an_empty_folder_may_be_replaced(fake_parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert Bundle.open(fake_parts.publish(tmp_path / "empty")).manifest.artefacts
    path = fake_parts.publish(tmp_path / "spoilt")
    (path / "extra").write_bytes(b"x")
    with pytest.raises(TamperedError):
        Bundle.open(path)
    assert Bundle.open(fake_parts.publish(path)).manifest.artefacts and not (path / "extra").exists()


def test_what_is_no_bundle_is_not_overwritten(fake_parts: Parts, tmp_path: Path) -> None:
    file, folder, link = tmp_path / "file", tmp_path / "photos", tmp_path / "link"
    file.write_bytes(b"mine")
    folder.mkdir()
    (folder / "holiday.jpg").write_bytes(b"mine")
    link.symlink_to(folder)
    for path in (file, folder, link):
        assert "not overwritten" in refusal(fake_parts, path)
    assert file.read_bytes() == b"mine" and link.is_symlink() and names(folder) == ["holiday.jpg"]
    assert names(tmp_path) == ["file", "link", "photos"]


def test_a_parent_that_is_a_file(fake_parts: Parts, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    refusal(fake_parts, tmp_path / "file/b.bundle")
    assert names(tmp_path) == ["file"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP])
def test_where_names_cannot_be_exchanged_nothing_is_overwritten(
    fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    import ctypes

    class Refusing:
        """A C library whose file system cannot do it."""

        def renameat2(self, *arguments: object) -> int:
            ctypes.set_errno(code)
            return -1

    path = fake_parts.publish(tmp_path / "b.bundle")
    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Refusing())
    assert "refuses to overwrite" in refusal(fake_parts, path, created_utc=NEW)
    assert Bundle.open(path).manifest.created_utc == OLD
    assert names(tmp_path) == ["b.bundle"]
    fake_parts.publish(tmp_path / "other.bundle")


def test_the_system_call_works_by_number_as_well(
    fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes
    import platform

    if platform.machine() not in publish._SYSCALL:
        pytest.skip(f"no number known for {platform.machine()}")
    real = ctypes.CDLL(None, use_errno=True)

    class Old:
        """A C library from before the wrapper."""

        syscall = real.syscall

    monkeypatch.setattr(ctypes, "CDLL", lambda *args, **kwargs: Old())
    path = fake_parts.publish(tmp_path / "b.bundle")
    fake_parts.publish(path, created_utc=NEW)
    assert Bundle.open(path).manifest.created_utc == NEW


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "no room"), (errno.EDQUOT, "no room"), (errno.EACCES, "no permission"), (errno.EROFS, "read-only"),
     (errno.EIO, "output error")],
)  # fmt: skip
def test_a_failing_disk_is_one_clear_line_and_leaves_nothing(
    fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, words: str
) -> None:
    real_fsync, calls = os.fsync, []

    def fsync(handle: int) -> None:
        calls.append(handle)
        if len(calls) == 4:
            raise OSError(code, os.strerror(code))
        real_fsync(handle)

    old = fake_parts.publish(tmp_path / "b.bundle")
    monkeypatch.setattr(os, "fsync", fsync)
    assert words in refusal(fake_parts, old, created_utc=NEW)
    calls.clear()
    assert words in refusal(fake_parts, tmp_path / "made/for/it.bundle")
    assert names(tmp_path) == ["b.bundle"], "parents made for it are taken away as well"
    assert Bundle.open(old).manifest.created_utc == OLD


def test_an_interrupt_leaves_nothing(fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(handle: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fake_parts.publish(tmp_path / "b.bundle")
    assert names(tmp_path) == []


def test_every_file_and_folder_is_flushed_before_it_has_its_name(
    fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_fsync, flushed = os.fsync, []

    def fsync(handle: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{handle}").readlink())
        real_fsync(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    path = fake_parts.publish(tmp_path / "b.bundle")
    before = {Path(*flush.relative_to(tmp_path).parts[1:]) for flush in flushed[:-1]}
    assert before == {Path(), *(entry.relative_to(path) for entry in path.rglob("*"))}
    assert flushed[-1] == tmp_path, "and the parent after the rename"
    assert all(flush.relative_to(tmp_path).parts[0].startswith(".b.bundle.tmp-") for flush in flushed[:-1])


def test_what_cannot_be_opened_is_not_published(
    fake_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real_open = os.open

    def lossy(path: object, flags: int, *args: int, **kwargs: int) -> int:
        handle = real_open(path, flags, *args, **kwargs)  # type: ignore[arg-type]
        if str(path).endswith("parity.json") and flags & os.O_CREAT:
            os.write(handle, b"written by the disk itself")
        return handle

    monkeypatch.setattr(os, "open", lossy)
    with pytest.raises(TamperedError):
        fake_parts.publish(tmp_path / "b.bundle")
    assert names(tmp_path) == []


def test_parts_that_make_no_bundle_are_refused_before_anything_is_written(fake_parts: Parts, tmp_path: Path) -> None:
    bad: list[dict[str, object]] = [
        {"files": {**fake_parts.files, "../x": b""}},
        {"files": {**fake_parts.files, MANIFEST_NAME: b"{}"}},
        {"files": {**fake_parts.files, "artefacts/fake-fp32/model.onnx": b"other"}},
        {"files": {name: content for name, content in fake_parts.files.items() if "reference" not in name}},
        {"artefacts": ()},
        {"artefacts": fake_parts.artefacts * 2},
    ]
    for changes in bad:
        with pytest.raises(BundleError):
            fake_parts.publish(tmp_path / "b.bundle", **changes)
        assert names(tmp_path) == []


def test_stale_temporaries_are_swept_and_living_ones_are_not(fake_parts: Parts, tmp_path: Path) -> None:
    gone = pid_that_is_gone()
    stale, living = (f".b.bundle.tmp-{pid}-0011aabb" for pid in (gone, os.getpid()))
    foreign, other = ".b.bundle.tmp-x", f".c.bundle.tmp-{gone}-0011aabb"
    for name in (stale, living, foreign, other):
        (tmp_path / name / "golden").mkdir(parents=True)
        (tmp_path / name / "golden/frames.safetensors").write_bytes(b"x")
    fake_parts.publish(tmp_path / "b.bundle")
    assert names(tmp_path) == sorted([living, foreign, other, "b.bundle"])


def test_a_locked_temporary_of_an_unknown_process_is_left_alone(tmp_path: Path) -> None:
    """In another container the process id says nothing; the lock does."""
    folder = tmp_path / f".b.bundle.tmp-{pid_that_is_gone()}-0011aabb"
    folder.mkdir()
    with held_folder(folder):
        assert sweep(tmp_path / "b.bundle") == []
    assert sweep(tmp_path / "b.bundle") == [folder]


def test_an_old_unlocked_temporary_is_stale_even_if_its_process_id_lives(tmp_path: Path) -> None:
    folder = tmp_path / f".b.bundle.tmp-{os.getpid()}-0011aabb"
    folder.mkdir()
    assert sweep(tmp_path / "b.bundle") == []
    an_hour_ago = time.time() - 3600
    os.utime(folder, (an_hour_ago, an_hour_ago))
    assert sweep(tmp_path / "b.bundle") == [folder]


def test_a_link_named_like_a_temporary_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/file").write_bytes(b"x")
    (tmp_path / f".b.bundle.tmp-{pid_that_is_gone()}-0011aabb").symlink_to(tmp_path / "mine")
    assert sweep(tmp_path / "b.bundle") == []
    assert names(tmp_path / "mine") == ["file"]


PUBLISH = """
    import os, sys
    from pathlib import Path
    from tinyusfm_runtime.bundle import writer as publish
    from tinyusfm_runtime.bundle.reader import Bundle
    seed, path = Bundle.open(sys.argv[1]), Path(sys.argv[2])
    files = {name: seed.read(name) for name in seed.manifest.files}
    files |= {f"reports/r{i}.json": bytes([i]) * 30_000 for i in range(12)}
    def publish_one(created):
        publish.write_bundle(
            path, spec=seed.manifest.spec, artefacts=seed.manifest.artefacts, weights_sha256="0" * 64,
            calibration_id=None, tools={}, files=files, created_utc=created,
        )
    if sys.argv[3] == "naive":  # the control: written in place, as a naive exporter does
        def in_place(path, files):
            for name, content in files.items():
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
        publish.publish_folder = in_place
    def publish_many(count):
        publish_one("0")
        print("ready", os.getpid(), flush=True)
        for i in range(count):
            publish_one("12"[i % 2])
    if sys.argv[4] != "0":
        publish_many(int(sys.argv[4]))
    for line in sys.stdin if sys.argv[4] == "0" else ():  # one victim a line; forking saves the imports
        child = os.fork()
        if child == 0:
            publish_many(1_000_000)
        os.waitpid(child, 0)
        print("dead", flush=True)
"""


def publisher(seed: Path, path: Path, writer: str, count: int) -> subprocess.Popen[str]:
    """A process that publishes ``count`` times; with 0, one that forks off an endless publisher a line of input."""
    command = [sys.executable, "-c", textwrap.dedent(PUBLISH), str(seed), str(path), writer, str(count)]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, env=child_environment()
    )


def torn_after_kills(seed: Path, path: Path, writer: str, rounds: int) -> int:
    """Kills a publishing process at random moments and counts how often no bundle could be opened."""
    rng, torn, seen = random.Random(7), 0, set()
    with publisher(seed, path, writer, 0) as parent:
        assert parent.stdin is not None and parent.stdout is not None
        for _ in range(rounds):
            parent.stdin.write("next\n")
            word, pid = parent.stdout.readline().split()
            assert word == "ready"
            time.sleep(rng.uniform(0.0, 0.06))
            os.kill(int(pid), signal.SIGKILL)
            assert parent.stdout.readline() == "dead\n"
            try:
                seen.add(Bundle.open(path).manifest.created_utc)
            except BundleError:
                torn += 1
        parent.stdin.close()
    assert seen <= {"0", "1", "2"}
    return torn


@pytest.mark.slow
def test_killed_at_any_moment_the_old_bundle_or_the_new_one_is_there(
    fake_parts: Parts, fake_bundle: Path, tmp_path: Path
) -> None:
    path = tmp_path / "b.bundle"
    assert torn_after_kills(fake_bundle, path, "atomic", ROUNDS) == 0
    fake_parts.publish(path, created_utc=NEW)
    assert names(tmp_path) == ["b.bundle"], "no leftovers after the next run"
    assert Bundle.open(path).manifest.created_utc == NEW


@pytest.mark.slow
def test_the_kills_would_tear_a_bundle_written_in_place(fake_bundle: Path, tmp_path: Path) -> None:
    """The control: the same kills, a naive writer."""
    assert torn_after_kills(fake_bundle, tmp_path / "b.bundle", "naive", 8) > 0


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_the_old_bundle_and_no_temporary(fake_parts: Parts, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("this container may not mount a tmpfs")
    try:
        old = fake_parts.publish(disk / "b.bundle")
        large = fake_parts.with_files(reports__large_dot_json=bytes(6 << 20))
        assert "no room" in refusal(large, old, created_utc=NEW)
        assert "no room" in refusal(large, disk / "other.bundle")
        assert names(disk) == ["b.bundle"]
        assert Bundle.open(old).manifest.created_utc == OLD
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_file_size_limit_leaves_nothing(tmp_path: Path) -> None:
    code = """
    import resource, signal, sys
    from tinyusfm_runtime.errors import OutputError
    from tinyusfm_runtime.bundle.writer import publish_folder
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))
    try:
        publish_folder(sys.argv[1], {"reports/a.json": b"{}", "reports/b.json": bytes(200_000)})
    except OutputError as error:
        print(error)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path / "b.bundle")],
        capture_output=True, text=True, check=True, env=child_environment(),
    )  # fmt: skip
    assert "cannot be written: a file would be larger" in done.stdout
    assert names(tmp_path) == []


def test_two_publishers_at_once_leave_one_whole_bundle(fake_bundle: Path, tmp_path: Path) -> None:
    path, opened = tmp_path / "b.bundle", 0
    with publisher(fake_bundle, path, "atomic", 10) as one, publisher(fake_bundle, path, "atomic", 10) as two:
        assert one.stdout is not None and two.stdout is not None
        assert one.stdout.readline() and two.stdout.readline()
        while one.poll() is None or two.poll() is None:
            Bundle.open(path)
            opened += 1
    assert (one.returncode, two.returncode) == (0, 0)
    assert opened > 3
    Bundle.open(path)
    assert names(tmp_path) == ["b.bundle"]
