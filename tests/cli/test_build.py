"""``export --target tensorrt``, ``build`` and ``--recipe``: what is written, warned of and refused, with exit codes."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from tests.fakes import tensorrt as fake_tensorrt
from tests.fakes.tensorrt import World, real_module
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.cli.progress import Ticker
from tinyusfm_runtime import plugins
from tinyusfm_runtime.bundle.reader import ArtefactState, Bundle
from tinyusfm_runtime.spec import PostProcess

TIMING = b"what a device measured" * 20


@pytest.fixture(scope="module")
def student(student: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The small student without an ellipse, since an untrained one's jumps with the last bit of its logits."""
    from tinyusfm_edge.models.checkpoint import load_student_file, save_student

    path = tmp_path_factory.mktemp("masked") / "small.safetensors"
    loaded = load_student_file(student)
    save_student(path, loaded.module, replace(loaded.spec, postprocess=PostProcess.MASK))
    return path


@pytest.fixture(scope="module")
def bundle(
    student: Path,
    data: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """A small student exported to TensorRT in INT8, with one engine built ahead of time."""
    real_module()
    out = tmp_path_factory.mktemp("bundles") / "trt.bundle"
    gate = out.parent / "gate.json"
    gate.write_text('{"dice_mean": 0.9, "dice_worst": 0.8, "differing_pixels": 0.1}', encoding="ascii")
    line = ["export", str(student), "--target", "tensorrt", "--int8", "--data", str(data), "--gate", str(gate)]
    timing = out.parent / "tensorrt-10.3.0-Orin-16-SMs-sm8.7.cache"
    timing.write_bytes(hashlib.sha256(TIMING).hexdigest().encode() + b"\n" + TIMING)
    line += ["--timing-cache", str(timing)]
    assert main([*line, "--compute-capability", "8.9", "--out", str(out)]) == 0
    return out


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> World:
    monkeypatch.setenv("TINYUSFM_EDGE_CACHE", str(tmp_path / "cache"))
    return fake_tensorrt.install(monkeypatch)


def test_the_bundle_carries_verified_onnx_and_waits_for_its_device(bundle: Path) -> None:
    opened = Bundle.open(bundle)
    (artefact,) = opened.manifest.artefacts
    assert artefact.name == "tensorrt-int8" and artefact.state is ArtefactState.UNVERIFIED and artefact.gated
    assert artefact.pending.startswith("engine not yet verified on its GPU") and artefact.rest_precision == "f16"
    assert artefact.gate is not None and artefact.gate["passed"] is True
    assert "graph optimisation off" in str(artefact.gate["engine"]) and "no TensorRT engine" in str(
        artefact.gate["engine"]
    )
    files = opened.artefact_files(artefact)
    timing = "tensorrt-10.3.0-Orin-16-SMs-sm8.7.timing"
    assert set(files) == {"model.onnx", f"tensorrt-rtx-{real_module().__version__}-sm89.engine", timing}
    assert files[timing] == TIMING
    assert any(path.endswith(timing) for path in opened.manifest.files), "it is hashed, and so signed"
    assert opened.manifest.tools["tensorrt-rtx"] == real_module().__version__


def test_timing_caches_that_no_device_wrote_are_refused(
    student: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    real_module()
    (tmp_path / "a.cache").write_bytes(b"0" * 64 + b"\n" + TIMING)
    (tmp_path / "a.bin").write_bytes(TIMING)
    line = ["export", str(student), "--data", str(data), "--out", str(tmp_path / "o.bundle"), "--fp16"]
    for target, name, words in (
        ("tensorrt", "a.cache", "its hash does not match"), ("tensorrt", "a.bin", "is no timing cache"),
        ("tensorrt", "gone.cache", "cannot be read"), ("onnx", "a.cache", "are for target tensorrt"),
    ):  # fmt: skip
        assert main([*line, "--timing-cache", str(tmp_path / name), "--target", target]) == 2
        assert words in capsys.readouterr().err


def test_export_warns_and_require_verified_refuses(
    student: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("COLUMNS", "250")  # the words below stand in one line, however long the folder's name
    real_module()
    gate = tmp_path / "gate.json"
    gate.write_text('{"dice_mean": 0.9, "dice_worst": 0.8}', encoding="ascii")
    out = tmp_path / "out.bundle"
    line = ["export", str(student), "--target", "tensorrt", "--fp16", "--data", str(data), "--gate", str(gate)]
    line += ["--out", str(out)]
    assert main([*line, "--require-verified"]) == 3
    shown = capsys.readouterr().err
    assert "cannot be checked on this machine: drop --require-verified" in shown and not out.exists()
    assert main(line) == 0
    shown = capsys.readouterr()
    assert (
        f"tensorrt-fp16 is unverified: engine not yet verified on its GPU: run `tinyusfm-edge build {out}` there"
        in shown.err
    )
    assert "ONNX passed; engine not built yet" in shown.out


def test_build_here_and_run(
    bundle: Path,
    world: World,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[str] = []
    monkeypatch.setattr(Ticker, "update", lambda _, what, _share: told.append(what))
    assert main(["run", str(bundle), "phantom:0-1"]) == 3
    said = capsys.readouterr().err
    assert f"tinyusfm-edge build {bundle}`" in said and "BUNDLE" not in said
    assert main(["build", str(bundle), "--json", str(tmp_path / "build.json")]) == 0
    shown = capsys.readouterr()
    assert "passed: gate against the stored PyTorch reference" in shown.out and "built in" in shown.out
    assert any("Building engine" in what for what in told), "progress is shown"
    report = json.loads((tmp_path / "build.json").read_text())
    assert report["passed"] and report["gpu"] == "Fake RTX (20 SMs)" and "not run by us" in report["note"]
    assert main(["run", str(bundle), "phantom:0-1"]) == 0
    assert "UNVERIFIED" not in capsys.readouterr().out
    assert main(["build", str(bundle)]) == 0
    assert "tensorrt-int8: cached" in capsys.readouterr().out and world.builds == 1
    assert main(["verify", str(bundle), "--gate", str(bundle.parent / "gate.json")]) == 0
    assert not world.cudart.faults and not world.cudart.leaks()


def test_a_missed_gate_on_the_device_is_exit_code_1(
    bundle: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    world.shift = 50.0
    assert main(["build", str(bundle)]) == 1
    assert "error: tensorrt-int8: " in capsys.readouterr().err
    assert main(["run", str(bundle), "phantom:0-1"]) == 2
    assert "not yet verified" in capsys.readouterr().err


def test_the_cache_folder_can_be_named(
    bundle: Path, world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(bundle), "--cache", str(tmp_path / "elsewhere")]) == 0
    assert f"TINYUSFM_EDGE_CACHE={tmp_path / 'elsewhere'}" in capsys.readouterr().out
    assert list((tmp_path / "elsewhere").rglob("entry.json"))


@pytest.mark.parametrize(
    ("spoil", "code", "message"),
    [
        ("stale", 3, "stale"),
        ("tampered", 2, "--rebuild"),
        ("foreign", 3, "engines of other GPUs"),
        ("no gpu", 3, "no NVIDIA GPU"),
        ("no cuda runtime", 3, "[tensorrt]'"),
    ],
)
def test_bad_caches_and_missing_pieces_are_one_line(
    bundle: Path, world: World, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    spoil: str, code: int, message: str,
) -> None:  # fmt: skip
    assert main(["build", str(bundle)]) == 0
    if spoil == "stale":
        world.cudart.driver = 13010
    elif spoil == "tampered":
        (plan,) = (Path(str(_cache())) / "engines").rglob("*.plan")
        plan.write_bytes(plan.read_bytes()[:-1] + b"x")
    elif spoil == "foreign":
        world.cudart.name = "Another GPU"
    elif spoil == "no gpu":
        world.cudart.devices = 0
    else:
        from tinyusfm_runtime.engines.trt import cuda

        monkeypatch.undo()
        fake_tensorrt.put(monkeypatch, world, "tensorrt_rtx")
        monkeypatch.setattr(cuda, "load_library", partial(cuda.load_library, places=[]))
    capsys.readouterr()
    assert main(["run", str(bundle), "phantom:0-1"]) == code
    shown = capsys.readouterr().err.strip().splitlines()
    assert len(shown) == 1 and message in shown[0] and shown[0].startswith("error: ")


def _cache() -> Path:
    from tinyusfm_runtime.device.owned_files import default_root

    return default_root()


@pytest.mark.parametrize(
    ("line", "code", "message"),
    [
        (["--recipe", "toaster"], 2, "there is no recipe 'toaster'"),
        (["--target", "tensorrt", "--compute-capability", "9.0"], 2, "compute capability '9.0'"),
        (["--target", "onnx", "--compute-capability", "8.6"], 2, "not among the targets"),
        (["--target", "tensorrt", "--bf16"], 3, "does not write bf16"),
    ],
)
def test_bad_options_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: list[str], code: int, message: str
) -> None:
    real_module()
    assert main(["export", *line, "--out", str(tmp_path / "x.bundle")]) == code
    shown = capsys.readouterr().err.strip().splitlines()
    assert message in shown[-1] and not list(tmp_path.iterdir())


def test_building_without_an_engine_to_build(
    tmp_path: Path, fake_bundle: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["build", str(tmp_path / "none.bundle")]) == 2
    assert main(["build", str(fake_bundle)]) == 2
    assert "nothing to build" in capsys.readouterr().err


def test_a_recipe_fills_in_what_is_not_given(
    student: Path,
    data: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    real_module()
    recipe = tmp_path / "board.toml"
    recipe.write_text(
        'version = 1\nabout = "a board"\ntargets = ["tensorrt"]\nprecisions = ["fp16"]\nthreads = 1\n'
        '[budget]\nframe_ms = 16.0\nmeasured = false\nnote = "half"\n[gate]\ndice_mean = 0.9\ndice_worst = 0.8\n',
        encoding="ascii",
    )
    out = tmp_path / "b.bundle"
    assert main(["export", str(student), "--recipe", str(recipe), "--data", str(data), "--out", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "16 ms per frame in the engine (NOT measured: nobody ran it on such a device)" in shown
    (artefact,) = Bundle.open(out).manifest.artefacts
    assert artefact.name == "tensorrt-fp16"
    assert artefact.gate is not None and artefact.gate["limits"]["dice_mean"] == 0.9


def test_doctor_names_each_missing_piece(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    real_module()
    if plugins.available("engines", "trt").usable:
        pytest.skip("nothing is missing here")
    assert main(["doctor"]) == 0
    shown = capsys.readouterr().out
    words = " ".join(shown.split())
    assert "TensorRT execution: not run by us" in words and "missing piece NVIDIA GPU" in words and "mend: " in words
    assert max(map(len, shown.splitlines())) <= 100
    assert main(["doctor", "--json", "-"]) == 0
    pieces = json.loads(capsys.readouterr().out)["pieces"]
    assert {"TensorRT", "CUDA runtime", "NVIDIA GPU"} <= {piece["name"] for piece in pieces}
    assert all(piece["works"] or piece["mend"] for piece in pieces)
