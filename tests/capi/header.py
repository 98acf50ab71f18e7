"""The structs of tinyusfm.h and of the examples in other languages, read as text and laid out by C's rules."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.capi.conftest import SOURCE, run

C_TYPES = {"uint32_t": "u4", "int32_t": "i4", "int64_t": "i8", "uint64_t": "u8", "double": "f8", "char": "c1"}
CS_TYPES = {"uint": "u4", "int": "i4", "long": "i8", "ulong": "u8", "double": "f8", "IntPtr": "p8"}
RUST_TYPES = {"u32": "u4", "i32": "i4", "i64": "i8", "u64": "u8", "f64": "f8"}


@dataclass(frozen=True)
class Field:
    """One field: kind is a letter (u, i, f, c, p) and the bytes of one item."""

    name: str
    kind: str
    items: int = 1


def of_header() -> dict[str, list[Field]]:
    """Struct, without ``tusfm_``, -> its fields."""
    text = _without_comments((SOURCE / "include" / "tinyusfm.h").read_text(encoding="utf-8"))
    values = {name: int(value) for name, value in re.findall(r"#define (TUSFM_\w+) (\d+)$", text, flags=re.M)}
    structs = {}
    for name, body in re.findall(r"typedef struct tusfm_(\w+) \{(.*?)\} tusfm_\w+;", text, flags=re.S):
        structs[name] = [field for line in body.split(";") if line.strip() for field in _of_c(line.strip(), values)]
    return structs


def _of_c(line: str, values: dict[str, int]) -> list[Field]:
    if found := re.search(r"\(\*(\w+)\)\(", line):
        return [Field(found[1], "p8")]
    words = line.removeprefix("const ")
    kind, rest = words.split(None, 1)
    fields = []
    for part in rest.split(","):
        found = re.fullmatch(r"(\*?)(\w+)(?:\[(.+)\])?", part.strip())
        assert found is not None, line
        items = 1
        for word in (found[3] or "1").split("*"):
            items *= values.get(word.strip()) or int(word)
        pointer = found[1] or kind == "tusfm_log"
        fields.append(Field(found[2], "p8" if pointer else C_TYPES[kind], items))
    return fields


def of_c_sharp(path: Path) -> dict[str, list[Field]]:
    """Struct as it is called there -> its fields."""
    structs = {}
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    for name, body in re.findall(r"struct (\w+)\s*\{(.*?)\}", text, flags=re.S):
        fields = []
        for line in (line.strip() for line in body.split(";")):
            if line:
                found = re.fullmatch(r"(?:\[.*SizeConst = (\d+)\)\] )?public (\w+)(\[\])? (.+)", line)
                assert found is not None and bool(found[1]) == bool(found[3]), line
                kind, items = CS_TYPES[found[2]], int(found[1] or 1)
                fields += [Field(word.strip(), kind, items) for word in found[4].split(",")]
        structs[name] = fields
    return structs


def of_rust(path: Path) -> dict[str, list[Field]]:
    """Struct as it is called there -> its fields."""
    structs = {}
    text = re.sub(r"//.*", "", path.read_text(encoding="utf-8"))
    for name, body in re.findall(r"#\[repr\(C\)\]\s*struct (\w+) \{(.*?)\}", text, flags=re.S):
        fields = []
        for word, kind in re.findall(r"(?:r#)?(\w+): (\*const \w+|\[\w+; \d+\]|\w+)", body):
            array = re.fullmatch(r"\[(\w+); (\d+)\]", kind)
            if kind.startswith("*"):
                fields.append(Field(word, "p8"))
            else:
                fields.append(Field(word, RUST_TYPES[array[1] if array else kind], int(array[2]) if array else 1))
        structs[name] = fields
    return structs


def layout(fields: list[Field]) -> list[tuple[str, str, int, int]]:
    """(name, kind, place, bytes) of every field, each aligned to the size of its items."""
    place, found = 0, []
    for field in fields:
        size = int(field.kind[1:])
        place = (place + size - 1) // size * size
        found.append((field.name, field.kind, place, size * field.items))
        place += size * field.items
    return found


def by_compiler(name: str, fields: list[Field], folder: Path) -> list[tuple[int, int]]:
    """(place, bytes) of every field of a struct, as the C compiler says."""
    lines = ["#include <stddef.h>", "#include <stdio.h>", '#include "tinyusfm.h"', "int main(void) {"]
    for field in fields:
        lines.append(
            f'printf("%zu %zu\\n", offsetof(tusfm_{name}, {field.name}), sizeof ((tusfm_{name} *)0)->{field.name});'
        )
    (folder / f"{name}.c").write_text("\n".join([*lines, "return 0; }"]), encoding="utf-8")
    run("cc", "-std=c11", "-I", SOURCE / "include", folder / f"{name}.c", "-o", folder / name)
    numbers = [int(word) for word in run(folder / name).split()]
    return list(zip(numbers[::2], numbers[1::2], strict=True))


def _without_comments(text: str) -> str:
    return re.sub(r"/\*.*?\*/", "", text, flags=re.S)
