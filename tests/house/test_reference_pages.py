"""Reference pages are the program's: errors, recipes, and the JSON schema of a manifest."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from tinyusfm_export.recipe import load_recipe, recipe_names
from tinyusfm_runtime import errors
from tinyusfm_runtime.bundle.reader import Bundle

ROOT = Path(__file__).resolve().parents[2]
REFERENCE = ROOT / "docs" / "reference"


def schema_faults(data: Any, schema: dict[str, Any], place: str = "manifest") -> list[str]:
    """What of some data does not fit the parts of a JSON schema that ours uses."""
    if "anyOf" in schema:
        return (
            [] if any(not schema_faults(data, each, place) for each in schema["anyOf"]) else [f"{place} fits nothing"]
        )
    kinds = {"object": dict, "array": list, "string": str, "integer": int, "number": (int, float), "boolean": bool}
    if "type" in schema and schema["type"] != "null" and not isinstance(data, kinds[schema["type"]]):
        return [f"{place} is no {schema['type']}"]
    if schema.get("type") == "null":
        return [] if data is None else [f"{place} is not null"]
    found = [f"{place} is not {schema['const']}"] if "const" in schema and data != schema["const"] else []
    found += [f"{place} is none of them"] if "enum" in schema and data not in schema["enum"] else []
    if isinstance(data, dict):
        properties, extra = schema.get("properties", {}), schema.get("additionalProperties", True)
        found += [f"{place}.{key} is missing" for key in schema.get("required", ()) if key not in data]
        for key, value in data.items():
            inner = properties.get(key, extra)
            if inner is False:
                found.append(f"{place}.{key} is unknown")
            elif isinstance(inner, dict):
                found += schema_faults(value, inner, f"{place}.{key}")
    if isinstance(data, list) and "items" in schema:
        found += [
            fault for i, item in enumerate(data) for fault in schema_faults(item, schema["items"], f"{place}[{i}]")
        ]
    return found


def test_the_schema_fits_a_manifest_and_catches_a_wrong_one(fake_bundle: Path) -> None:
    schema = json.loads((REFERENCE / "bundle.schema.json").read_text(encoding="utf-8"))
    manifest = Bundle.open(fake_bundle).manifest.to_json()
    assert schema_faults(manifest, schema) == []
    for wrong in (
        {**manifest, "schema": 1},
        {**manifest, "more": 1},
        {**manifest, "spec": {**manifest["spec"], "task": "x"}},
    ):
        assert schema_faults(wrong, schema)
    del manifest["drift"]
    assert schema_faults(manifest, schema) == ["manifest.drift is missing"]


def test_every_error_has_its_cause_and_mend() -> None:
    page = (REFERENCE / "errors.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| ([\d][^|]*?) \|", page, re.MULTILINE))
    kinds = {name: getattr(errors, name) for name in errors.__all__ if name != "EdgeError"}
    assert set(rows) == set(kinds)
    assert all(rows[name].startswith(str(kind.exit_code)) for name, kind in kinds.items())


@pytest.mark.parametrize("name", recipe_names())
def test_recipes_stand_with_their_numbers(name: str) -> None:
    page, recipe = (REFERENCE / "recipes.md").read_text(encoding="utf-8"), load_recipe(name)
    (row,) = [line for line in page.splitlines() if line.startswith(f"| `{name}` |")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    measured = "yes" if recipe.measured else "no"
    assert cells[2:4] == [", ".join(recipe.targets), ", ".join(recipe.precisions)]
    assert cells[4:] == [f"{recipe.budget_ms:g}", measured]
