"""A program elsewhere finds the installed library: by pkg-config, by find_package, in C, C++, Rust and C#."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from tests.capi.conftest import SOURCE, MakeStub, run

PROJECT = """
cmake_minimum_required(VERSION 3.20)
project(consumer LANGUAGES C CXX)
find_package(tinyusfm 0.1 REQUIRED)
add_executable(in_c predict.c)
target_link_libraries(in_c PRIVATE tinyusfm::tinyusfm)
add_executable(in_cpp predict.cpp)
target_compile_features(in_cpp PRIVATE cxx_std_17)
target_link_libraries(in_cpp PRIVATE tinyusfm::tinyusfm)
"""


@pytest.fixture(scope="module")
def prefix(build_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the library was installed, and then moved: nothing may point back."""
    folder = tmp_path_factory.mktemp("installed")
    run("cmake", "--install", build_folder, "--prefix", folder / "first")
    return Path(shutil.move(folder / "first", folder / "moved"))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    """A grey image with a bright square."""
    rows = [bytes(220 if 30 <= x < 90 and 20 <= y < 70 else 10 for x in range(128)) for y in range(96)]
    path = tmp_path / "image.pgm"
    path.write_bytes(b"P5 128 96 255\n" + b"".join(rows))
    return path


def library_path(prefix: Path) -> dict[str, str]:
    return {**os.environ, "LD_LIBRARY_PATH": str(prefix / "lib")}


def test_by_pkg_config(prefix: Path, tmp_path: Path, make_stub: MakeStub, image: Path) -> None:
    if shutil.which("pkg-config") is None:
        pytest.skip("pkg-config is not installed: sudo make capi-deps")
    environment = {**os.environ, "PKG_CONFIG_PATH": str(prefix / "lib" / "pkgconfig")}
    flags = run("pkg-config", "--cflags", "--libs", "tinyusfm", env=environment).split()
    run("cc", "-std=c11", SOURCE / "examples" / "predict.c", "-o", tmp_path / "program", *flags)
    said = run(tmp_path / "program", make_stub(), image, "0.2", "0.2", env=library_path(prefix))
    assert said.startswith("stub-fp32 on stub f32") and "found 1" in said


def test_by_find_package(prefix: Path, tmp_path: Path, make_stub: MakeStub, image: Path) -> None:
    project = tmp_path / "consumer"
    project.mkdir()
    (project / "CMakeLists.txt").write_text(PROJECT, encoding="utf-8")
    for name in ("predict.c", "predict.cpp"):
        shutil.copy(SOURCE / "examples" / name, project)
    run("cmake", "-S", project, "-B", project / "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    run("cmake", "--build", project / "build")
    assert "found 1" in run(project / "build" / "in_c", make_stub(), image, "0.2", "0.2", env=library_path(prefix))
    assert "30 frames" in run(project / "build" / "in_cpp", make_stub(), env=library_path(prefix))


def test_the_library_asks_for_no_cpp_compiler(tmp_path: Path) -> None:
    """A cross compiler would build a C++ library first, only to try it."""
    words = ("cmake", "-S", SOURCE, "-DCMAKE_CXX_COMPILER=no-such-compiler", "-B")
    run(*words, tmp_path / "without", "-DTUSFM_CXX=OFF")
    with pytest.raises(AssertionError, match="is not a full path"):
        run(*words, tmp_path / "with")


def test_from_rust(prefix: Path, tmp_path: Path, make_stub: MakeStub) -> None:
    if shutil.which("rustc") is None:
        pytest.skip("rustc is not installed")
    run("rustc", "-O", SOURCE / "examples" / "predict.rs", "-L", prefix / "lib", "-o", tmp_path / "program")
    assert "found" in run(tmp_path / "program", make_stub(), env=library_path(prefix))


def test_from_c_sharp(prefix: Path, tmp_path: Path, make_stub: MakeStub, image: Path) -> None:
    if shutil.which("mcs") is None or shutil.which("mono") is None:
        pytest.skip("mono is not installed: apt-get install mono-mcs")
    run("mcs", "-warnaserror", "-nowarn:0649", f"-out:{tmp_path / 'Predict.exe'}", SOURCE / "examples" / "Predict.cs")
    assert "found 1" in run(
        "mono", tmp_path / "Predict.exe", make_stub(), image, "0.2", "0.2", env=library_path(prefix)
    )


def test_examples_are_short() -> None:
    examples = list((SOURCE / "examples").iterdir())
    assert {path.suffix for path in examples} >= {".c", ".cpp", ".rs", ".cs"}
    for path in examples:
        assert len(path.read_text(encoding="utf-8").splitlines()) < 80, path.name


def test_the_programs_of_the_header_and_the_page_compile(prefix: Path, tmp_path: Path) -> None:
    header = (SOURCE / "include" / "tinyusfm.h").read_text(encoding="utf-8")
    program = header[header.index("#include <stdio.h>") : header.index(" *     cc program.c")]
    lines = [line.removeprefix(" *").removeprefix("     ") for line in ("     " + program).splitlines()]
    (tmp_path / "program.c").write_text("\n".join(lines), encoding="utf-8")
    run("cc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-I", prefix / "include", tmp_path / "program.c", "-L",
        prefix / "lib", "-ltinyusfm", "-o", tmp_path / "program")  # fmt: skip
    assert (tmp_path / "program").is_file()
