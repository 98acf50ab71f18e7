"""The engine cache: keyed, hashed, atomic; stale is told from foreign and tampered, and nobody else may write there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.conftest import child_environment
from tinyusfm_runtime.device.owned_files import default_root, read_owned, write_owned
from tinyusfm_runtime.engines.trt.cache import ANY_AMPERE, CachedEngine, EngineCache, EngineKey
from tinyusfm_runtime.errors import InputError, OutputError, TamperedError, UnsupportedError

KEY = EngineKey(
    content_sha256="ab" * 32,
    gpu="Orin (8 SMs)",
    compute_capability="8.7",
    library="tensorrt",
    library_version="10.3.0",
    driver="CUDA 12.6",
    flags={"hardware_compatible": False, "dla": False},
)
PORTABLE = replace(KEY, flags={"hardware_compatible": True, "dla": False})
OTHER_GPU = replace(KEY, gpu="RTX 4090 (128 SMs)", compute_capability="8.9")


def entry(key: EngineKey = KEY) -> CachedEngine:
    return CachedEngine(
        key=key, origin="built here", seconds=1.0, files={}, gates={}, created_utc="2026-01-01T00:00:00Z"
    )


@pytest.fixture
def cache(tmp_path: Path) -> EngineCache:
    return EngineCache(tmp_path / "cache")


def only_folder(cache: EngineCache) -> Path:
    (found,) = (path.parent for path in cache.root.rglob("entry.json"))
    return found


def test_what_was_stored_is_loaded(cache: EngineCache) -> None:
    cache.store(entry(), {"plan": b"engine", "runtime": b"kernels"})
    found = cache.load(KEY)
    assert found.content == {"plan": b"engine", "runtime": b"kernels"} and found.key == KEY
    assert {oct(path.stat().st_mode & 0o777) for path in only_folder(cache).iterdir()} == {"0o600"}
    assert only_folder(cache).stat().st_mode & 0o777 == 0o700


def test_nothing_built_says_what_to_run_and_what_there_is(cache: EngineCache) -> None:
    with pytest.raises(UnsupportedError, match="no engine was built yet .*tinyusfm-edge build BUNDLE"):
        cache.load(KEY)
    cache.store(entry(OTHER_GPU), {"plan": b"engine"})
    with pytest.raises(UnsupportedError, match="engines of other GPUs.*RTX-4090"):
        cache.load(KEY)


@pytest.mark.parametrize("field", ["library", "library_version", "driver"])
def test_stale_entries_are_told(cache: EngineCache, field: str) -> None:
    cache.store(entry(replace(KEY, **{field: "older"})), {"plan": b"engine"})
    with pytest.raises(UnsupportedError, match="stale.*'older'"):
        cache.load(KEY)
    assert cache.find(KEY) is not None, "so that build can replace it"


def test_other_content_is_another_entry(cache: EngineCache) -> None:
    cache.store(entry(), {"plan": b"engine"})
    assert cache.find(replace(KEY, content_sha256="cd" * 32)) is None


def test_an_engine_of_another_gpu_is_refused(cache: EngineCache) -> None:
    cache.store(entry(OTHER_GPU), {"plan": b"engine"})
    only_folder(cache).rename(only_folder(cache).with_name("Orin-8-SMs-sm8.7"))
    with pytest.raises(UnsupportedError, match="built for RTX 4090.*this is Orin"):
        cache.find(KEY)


def test_a_portable_engine_serves_other_gpus_from_ampere_on(cache: EngineCache) -> None:
    cache.store(entry(PORTABLE), {"plan": b"engine"})
    assert only_folder(cache).name == ANY_AMPERE
    assert cache.load(OTHER_GPU).content["plan"] == b"engine"
    turing = replace(OTHER_GPU, compute_capability="7.5")
    assert cache.find(turing) is None


def test_a_newer_entry_replaces_the_older_and_its_files(cache: EngineCache) -> None:
    cache.store(entry(), {"plan": b"old"})
    cache.store(entry(), {"plan": b"new"})
    assert cache.load(KEY).content["plan"] == b"new"
    assert len(list(only_folder(cache).iterdir())) == 2


def test_a_killed_store_leaves_the_old_entry(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(entry(), {"plan": b"old"})
    real = Path.replace

    def die(self: Path, target: Path) -> Path:
        if target.name == "entry.json":
            raise OSError(28, "No space left on device")
        return real(self, target)

    monkeypatch.setattr(Path, "replace", die)
    with pytest.raises(OutputError, match="No space left"):
        cache.store(entry(), {"plan": b"new"})
    monkeypatch.setattr(Path, "replace", real)
    assert cache.load(KEY).content["plan"] == b"old"


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_is_found(tmp_path: Path, data: st.DataObject) -> None:
    cache = EngineCache(tmp_path / "cache")
    cache.remove(KEY)
    cache.store(entry(), {"plan": b"the engine's code", "runtime": b"kernels"})
    path = data.draw(st.sampled_from(sorted(only_folder(cache).iterdir())))
    raw = bytearray(path.read_bytes())
    position = data.draw(st.integers(0, len(raw) - 1))
    raw[position] ^= data.draw(st.integers(1, 255))
    path.write_bytes(bytes(raw))
    try:
        found = cache.find(KEY)
    except (TamperedError, UnsupportedError) as error:
        assert "\n" not in str(error)
    else:  # white space in the JSON: nothing that is said has changed
        assert found is not None and found.content == {"plan": b"the engine's code", "runtime": b"kernels"}
        assert found.to_json() == json.loads((only_folder(cache) / "entry.json").read_text())


@pytest.mark.parametrize("spoil", ["truncate", "remove", "link", "hard link", "no json", "self-made"])
def test_tampered_entries_are_refused(cache: EngineCache, spoil: str, tmp_path: Path) -> None:
    cache.store(entry(), {"plan": b"engine" * 50})
    folder = only_folder(cache)
    (plan,) = folder.glob("engine-*.plan")
    if spoil == "truncate":
        plan.write_bytes(plan.read_bytes()[:10])
    elif spoil == "remove":
        plan.unlink()
    elif spoil == "link":
        plan.rename(tmp_path / "elsewhere")
        plan.symlink_to(tmp_path / "elsewhere")
    elif spoil == "hard link":
        os.link(plan, tmp_path / "second")
    elif spoil == "no json":
        (folder / "entry.json").write_bytes(b"{")
    else:
        data = json.loads((folder / "entry.json").read_text())
        data["gates"] = {"here": {"passed": True}}
        (folder / "entry.json").write_text(json.dumps(data))
    with pytest.raises(TamperedError, match="--rebuild"):
        cache.load(KEY)
    cache.remove(KEY)
    assert cache.find(KEY) is None


@pytest.mark.parametrize("part", ["root", "entry folder", "file"])
def test_what_others_may_write_to_is_refused(cache: EngineCache, part: str) -> None:
    cache.store(entry(), {"plan": b"engine"})
    folder = only_folder(cache)
    place = {"root": cache.root, "entry folder": folder, "file": next(folder.glob("engine-*"))}[part]
    place.chmod(place.stat().st_mode | 0o020)
    with pytest.raises(TamperedError, match="written to by others"):
        cache.find(KEY)


def test_a_cache_of_another_user_is_refused(cache: EngineCache, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.store(entry(), {"plan": b"engine"})
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(TamperedError, match="belongs to another user"):
        cache.find(KEY)
    with pytest.raises(TamperedError):
        cache.store(entry(), {"plan": b"engine"})


def test_timing_measurements_come_back_and_damaged_ones_count_as_none(cache: EngineCache) -> None:
    assert cache.timing(KEY) == b""
    cache.keep_timing(KEY, b"")
    assert not cache.root.exists()
    cache.keep_timing(KEY, b"measured\n\x00")
    assert cache.timing(KEY) == b"measured\n\x00"
    (path,) = cache.root.rglob("*.cache")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert cache.timing(KEY) == b""
    assert cache.timing(replace(KEY, library_version="11.0")) == b""


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("TINYUSFM_EDGE_CACHE", raising=False)
    assert default_root() == tmp_path / "tinyusfm-edge"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_root() == tmp_path / ".cache" / "tinyusfm-edge"
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "mine"))
    assert default_root() == tmp_path / "mine"
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", "mine")
    with pytest.raises(InputError, match="absolute"):
        default_root()


CROWD = """
import sys, time
from pathlib import Path
from tests.runtime.test_engine_cache import KEY, entry
from tinyusfm_runtime.engines.trt.cache import EngineCache
cache, end_s, count = EngineCache(Path(sys.argv[1])), time.monotonic() + float(sys.argv[3]), 0
while time.monotonic() < end_s:
    if sys.argv[2] == "write":
        cache.store(entry(), {"plan": bytes([count % 256]) * 100_000, "runtime": b"r" * (count % 9 + 1)})
    else:
        found = cache.load(KEY)
        assert len(set(found.content["plan"])) == 1
    count += 1
print(count)
"""


def test_readers_and_writers_beside_each_other_never_see_half_an_entry(cache: EngineCache) -> None:
    cache.store(entry(), {"plan": b"eeee", "runtime": b"kernels"})
    command = [sys.executable, "-c", CROWD, str(cache.root)]
    crowd = [
        subprocess.Popen(
            [*command, what, "6"], env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for what in ("write", "write", "read", "read")
    ]
    for process in crowd:
        said, error = process.communicate(timeout=900)
        assert process.returncode == 0, error
        assert int(said) > 0
    assert sorted(path.suffix for path in only_folder(cache).iterdir()) == [".cache", ".json", ".plan"]


def test_a_reader_that_comes_while_the_first_entry_is_written_finds_all_of_it_or_nothing(
    cache: EngineCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The very first entry: a reader that looked for the lock before it was there must not read the half of it."""
    writing, go_on = threading.Event(), threading.Event()

    def slowly(path: Path, raw: bytes) -> None:
        writing.set()
        go_on.wait(30)
        write_owned(path, raw)

    monkeypatch.setattr("tinyusfm_runtime.engines.trt.cache.write_owned", slowly)
    true_open, first = os.open, []

    def no_lock_yet(path: object, flags: int, *more: int) -> int:
        if str(path).endswith(".lock") and not flags & os.O_CREAT and not first:
            first.append(path)  # the reader comes just before the writer made its lock
            writer.start()
            writing.wait(30)
            threading.Timer(0.2, go_on.set).start()
            raise FileNotFoundError
        return true_open(path, flags, *more)  # type: ignore[arg-type]

    writer = threading.Thread(target=cache.store, args=(entry(), {"plan": b"engine"}))
    monkeypatch.setattr(os, "open", no_lock_yet)
    found = cache.find(KEY)
    monkeypatch.setattr(os, "open", true_open)
    if not writer.ident:
        writer.start()
        go_on.set()
    writer.join()
    assert found is None or found.content["plan"] == b"engine"
    assert cache.load(KEY).content["plan"] == b"engine"


def test_a_record_is_read_while_it_is_replaced(tmp_path: Path) -> None:
    """What the gates and the timing keep has no lock: a reader sees the old or the new one, never a refusal."""
    path, end_s, done = tmp_path / "a.json", time.monotonic() + 1.0, []
    write_owned(path, bytes(2000))

    def write() -> None:
        while time.monotonic() < end_s:
            write_owned(path, bytes([len(done) % 256]) * 2000)
            done.append(1)

    writers = [threading.Thread(target=write) for _ in range(2)]
    for thread in writers:
        thread.start()
    reads = 0
    while any(thread.is_alive() for thread in writers):
        assert len(set(read_owned(path))) == 1
        reads += 1
    assert reads and done


def test_a_file_that_was_replaced_between_looking_and_reading_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, true_open = tmp_path / "a.json", os.open
    write_owned(path, b"old")

    def replaced(place: object, flags: int, *more: int) -> int:
        handle = true_open(place, flags, *more)  # type: ignore[arg-type]
        if place == path and not flags & os.O_CREAT:
            monkeypatch.setattr(os, "open", true_open)
            write_owned(path, b"new")
        return handle

    monkeypatch.setattr(os, "open", replaced)
    assert read_owned(path) == b"new"
    os.link(path, tmp_path / "b.json")
    with pytest.raises(TamperedError, match="no plain file of ours"):
        read_owned(path)


def test_a_writer_that_is_killed_holds_nobody_up(cache: EngineCache) -> None:
    cache.store(entry(), {"plan": b"engine"})
    lock = next(cache.root.rglob("*.lock"))
    code = "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR), 2); print(1, flush=True); input()"
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(lock)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "1\n"
    holder.kill()
    holder.communicate()
    assert cache.load(KEY).content["plan"] == b"engine"
