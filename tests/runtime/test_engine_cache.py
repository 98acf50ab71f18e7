"""The engine cache: keyed, hashed, atomic; stale is told from foreign and tampered, and nobody else may write there."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tinyusfm_runtime.engine_cache import ANY_AMPERE, CachedEngine, EngineCache, EngineKey, default_root
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
