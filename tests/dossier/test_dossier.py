"""The papers of a bundle: a valid bill of materials, a SOUP list that says what is the manufacturer's, pages."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Parts
from tinyusfm_edge import students
from tinyusfm_edge.cli.main import main
from tinyusfm_edge.dossier.bom import check_bom, make_bom
from tinyusfm_edge.dossier.facts import MANUFACTURER, gather
from tinyusfm_edge.dossier.soup import HEADER, OURS
from tinyusfm_edge.dossier.threats import THREATS, page_markdown
from tinyusfm_runtime.bundle.reader import Bundle
from tinyusfm_runtime.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
GATE = {
    "engine": "ONNX Runtime", "passed": True, "failures": [], "frames": {"about": "phantoms", "count": 36},
    "statistics": {"dice_mean": 0.9991, "hc_p95_mm": 0.2}, "limits": {"dice_mean": 0.99, "hc_p95_mm": 1.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(fake_parts: Parts, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle that says it was made of the shipped fetal-head, its artefact one of ONNX Runtime's."""
    weights = students.card("fetal-head")["weights"]["sha256"]
    needs = {**fake_parts.artefacts[0].requirements, "library": "onnxruntime", "library_version": "1.0.0"}
    parts = fake_parts.with_artefact(gate=GATE, requirements=needs)
    return parts.publish(tmp_path_factory.mktemp("dossier") / "head.bundle", weights_sha256=weights)


@pytest.fixture(scope="module")
def papers(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its papers, as the command writes them."""
    out = tmp_path_factory.mktemp("papers") / "dossier"
    assert main(["bundle", "dossier", str(bundle), "--out", str(out)]) == 0
    return out


def metrics(bom: dict[str, Any]) -> list[dict[str, Any]]:
    found = bom["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert isinstance(found, list)
    return found


def test_the_bill_of_materials_follows_the_schema_and_has_the_card(papers: Path, bundle: Path) -> None:
    pytest.importorskip("cyclonedx", reason="install tinyusfm-edge[dossier]")
    bom = json.loads((papers / "bom.cdx.json").read_text(encoding="utf-8"))
    check_bom(bom)
    assert bom["metadata"]["component"]["type"] == "machine-learning-model"
    dice = students.card("fetal-head")["metrics"]["test"]["dice"]
    told = next(m for m in metrics(bom) if m["type"] == "dice" and "split test" in m["slice"])
    assert float(told["value"]) == pytest.approx(dice["mean"], abs=1e-5)
    assert float(told["confidenceInterval"]["lowerBound"]) == pytest.approx(dice["low"], abs=1e-5)
    assert any(m["type"] == "dice_mean" and m["value"] == "0.9991" for m in metrics(bom))
    listed = {c["name"]: c["hashes"][0]["content"] for c in bom["components"] if c["type"] == "file"}
    assert listed == {path: entry.sha256 for path, entry in Bundle.open(bundle).manifest.files.items()}
    libraries = {c["name"]: c for c in bom["components"] if c["type"] == "library"}
    assert {"tinyusfm-edge", "numpy", "onnxruntime", "protobuf"} <= set(libraries)
    assert "torch" not in libraries, "only the device's set"
    assert libraries["numpy"]["licenses"] == [{"license": {"name": "BSD License"}}]


@pytest.mark.parametrize("fault", ["type", "key", "ref"])
def test_a_bill_of_materials_that_breaks_the_schema_is_caught(bundle: Path, fault: str) -> None:
    pytest.importorskip("cyclonedx", reason="install tinyusfm-edge[dossier]")
    bom = make_bom(gather(Bundle.open(bundle)))
    if fault == "type":
        bom["metadata"]["component"]["type"] = "model"
    elif fault == "key":
        bom["metadata"]["component"]["modelCard"]["accuracy"] = 1
    else:
        del bom["components"][0]["name"]
    with pytest.raises(ValueError, match=r"CycloneDX 1\.6"):
        check_bom(bom)


def test_the_same_bundle_has_the_same_serial_number(bundle: Path) -> None:
    facts = gather(Bundle.open(bundle))
    assert make_bom(facts)["serialNumber"] == make_bom(facts)["serialNumber"]
    other = replace(facts.bundle.manifest, created_utc="2026-01-02T00:00:00Z").sealed()
    changed = Bundle(bundle, other, {})
    assert make_bom(replace(facts, bundle=changed))["serialNumber"] != make_bom(facts)["serialNumber"]


def test_hazards_are_the_manufacturers_in_every_row(papers: Path) -> None:
    rows = list(csv.reader(io.StringIO((papers / "soup.csv").read_text(encoding="utf-8"))))
    assert tuple(rows[0]) == HEADER
    assert all(set(row[OURS:]) == {MANUFACTURER} for row in rows[1:])
    engine = next(row for row in rows if row[1] == "onnxruntime")
    exercised = {row[1]: row[8] for row in rows[1:]}
    assert exercised["numpy"].startswith("golden check") and exercised["protobuf"].startswith("golden check")
    assert "no reading depends on it" in exercised["typer"] and "no reading depends on it" in exercised["rich"]
    assert "dice_mean 0.99" in engine[6] and "golden/" in engine[8] and engine[9].startswith("https://")
    assert not [cell for row in rows for cell in row if cell[:1] in "=+@" and cell]


def test_what_is_not_known_is_said(papers: Path, fake_bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    index = (papers / "index.html").read_text(encoding="utf-8")
    assert "the gate ran with 1.0.0" in index and "IEC 62304 7.1.2" in index
    assert main(["bundle", "dossier", str(fake_bundle), "--out", str(papers.parent / "other")]) == 0
    assert "no accuracy on patients" in capsys.readouterr().err


def test_pages_print_and_fetch_nothing(papers: Path) -> None:
    pages = sorted(papers.glob("*.html"))
    assert len(pages) == 6
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert "@media print" in text and "<script" not in text and "<link" not in text and 'src="http' not in text
    index = (papers / "index.html").read_text(encoding="utf-8")
    assert all(f'href="{path.name}"' in index for path in papers.iterdir() if path.name != "index.html")


def test_scores_of_other_weights_are_refused(bundle: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores.json"
    scores.write_text(json.dumps({"version": 1, "weights_sha256": "0" * 64, "reports": []}), encoding="utf-8")
    with pytest.raises(InputError, match="not measured on this bundle's student"):
        gather(Bundle.open(bundle), scores)
    report = {"split": "val", "dice": {"mean": 0.9, "low": 0.8, "high": 0.95, "num_values": 5, "num_groups": 4}}
    weights = Bundle.open(bundle).manifest.weights_sha256
    scores.write_text(json.dumps({"version": 1, "weights_sha256": weights, "reports": [report]}), encoding="utf-8")
    bom = make_bom(gather(Bundle.open(bundle), scores))
    assert metrics(bom)[0]["slice"].endswith("split val, 5 frames of 4 patients")


def test_a_program_in_c_ships_other_libraries(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    build = tmp_path / "capi"
    (build / "include" / "mbedtls").mkdir(parents=True)
    (build / "include" / "jansson.h").write_text('#define JANSSON_VERSION "2.14"\n')
    (build / "include" / "mbedtls" / "build_info.h").write_text('#define MBEDTLS_VERSION_STRING         "3.6.2"\n')
    (build / "libjansson.so").write_bytes(b"jansson")
    words = ["bundle", "dossier", str(bundle), "--runtime", "c", "--out", str(tmp_path / "d")]
    assert main([*words, "--c-build", str(build)]) == 2
    assert "CMakeCache.txt" in capsys.readouterr().err
    variables = {
        "JANSSON_LIBRARY:FILEPATH": build / "libjansson.so", "JANSSON_INCLUDE:PATH": build / "include",
        "MBEDCRYPTO_LIBRARY:FILEPATH": "/gone", "MBEDTLS_INCLUDE:PATH": build / "include",
        "CMAKE_PROJECT_VERSION:STATIC": "0.1.0",
    }  # fmt: skip
    (build / "CMakeCache.txt").write_text("".join(f"{name}={value}\n" for name, value in variables.items()))
    assert main([*words, "--c-build", str(build)]) == 0
    bom = json.loads((tmp_path / "d" / "bom.cdx.json").read_text(encoding="utf-8"))
    libraries = {c["name"]: c for c in bom["components"] if c["type"] == "library"}
    assert set(libraries) == {"libtinyusfm", "jansson", "mbedtls", "onnxruntime", "libc"}, "no Python on that device"
    versions = {name: library["version"] for name, library in libraries.items()}
    assert versions == {
        "libtinyusfm": "0.1.0", "jansson": "2.14", "mbedtls": "3.6.2", "onnxruntime": "1.0.0", "libc": "unknown",
    }  # fmt: skip
    assert libraries["jansson"]["purl"] == "pkg:generic/jansson@2.14"
    digest = hashlib.sha256(b"jansson").hexdigest()
    assert {"name": "tinyusfm:file-sha256", "value": digest} in libraries["jansson"]["properties"]
    assert libraries["mbedtls"]["licenses"] == [{"expression": "Apache-2.0 OR GPL-2.0-or-later"}]
    assert {
        "ref": "lib:libtinyusfm",
        "dependsOn": [f"lib:{n}" for n in ("jansson", "libc", "mbedtls", "onnxruntime")],
    } in (bom["dependencies"])
    soup = (tmp_path / "d" / "soup.csv").read_text(encoding="utf-8")
    assert "Python" not in soup and "golden check at every start" in soup
    capsys.readouterr()
    assert main(words) == 0
    assert "give --c-build" in capsys.readouterr().err.replace("\n", " ")
    assert main([*words[:-4], "--runtime", "rust", "--out", str(tmp_path)]) == 2
    assert main([*words[:-4], "--c-build", str(build), "--out", str(tmp_path)]) == 2


def test_the_threat_model_names_tests_that_exist() -> None:
    assert (ROOT / "docs" / "trust" / "threat-model.md").read_text(encoding="utf-8") == page_markdown()
    assert not [threat.shown_by for threat in THREATS if not (ROOT / threat.shown_by).is_file()]
