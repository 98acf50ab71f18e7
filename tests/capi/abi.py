"""The ABI as a list: every struct's fields with places and sizes, every function, every number of every enum.

python -m tests.capi.abi > tests/capi/abi.json        after something was added; what stands there must stay
"""

from __future__ import annotations

import ctypes as c
import json
import re
from typing import Any

from tests.capi import binding
from tests.capi.conftest import SOURCE


def listing() -> dict[str, Any]:
    """Today's list."""
    header = (SOURCE / "include" / "tinyusfm.h").read_text(encoding="utf-8")
    plain = re.sub(r"/\*.*?\*/", "", header, flags=re.S)
    enums = {}
    for name, body in re.findall(r"enum (tusfm_\w+) \{(.*?)\}", plain, flags=re.S):
        enums[name] = {word: int(number) for word, number in re.findall(r"(TUSFM_\w+) = (-?\d+)", body)}
    functions = {}
    for words in re.findall(r"TUSFM_API ([^;{]*?\));", plain, flags=re.S):
        line = " ".join(words.split())
        if found := re.search(r"(tusfm_\w+)\(", line):
            functions[found[1]] = line
    structs = {
        name: [[field, getattr(struct, field).offset, getattr(struct, field).size] for field, *_ in struct._fields_]  # type: ignore[misc]
        for name, struct in binding.STRUCTS.items()
    }
    pointers = c.sizeof(c.c_void_p)
    return {"abi": binding.ABI, "pointer_bytes": pointers, "structs": structs, "functions": functions, "enums": enums}


if __name__ == "__main__":
    print(json.dumps(listing(), indent=1, sort_keys=True))
