"""The optional compiled kernels; everything else about the distribution stands in pyproject.toml.

Without a C compiler the installation succeeds all the same and the runtime uses numpy: same bytes, more time.
In place, for work on the sources: ``python setup.py build_ext --inplace``.
"""

from __future__ import annotations

import sys

from setuptools import Extension, setup

FOLDER = "runtime/capi"
MSVC = sys.platform == "win32"
KERNELS = (
    *("native_module", "preprocess", "components", "moments", "shape", "ellipse", "measure", "second_pass", "crc64"),
)
# no fused multiply-adds: the numpy definition rounds after every operation
GCC_ARGS = ["-O3", "-g0", "-std=c11", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
SETS = ("avx2", "avx2_attention", "avxvnni", "avx512vnni", "neon", "neon_attention", "neondot")
PARTS = ("engine", "model", "checks", "threads", "portable", *SETS)
INTEGER = tuple(f"integer_{part}" for part in PARTS)
HEADERS = (
    *("tue_numerics", "dispatch", "runs", "exact"),
    *(
        f"integer_{part}"
        for part in ("engine", "internal", "model", "threads", "avx2", "avx2_vectors", "avx2_attention")
    ),
    *(f"integer_{part}" for part in ("heads", "layers", "neon", "plain")),
)

native = Extension(
    "tinyusfm_runtime._native",
    sources=[f"{FOLDER}/{name}.c" for name in (*KERNELS, *INTEGER)],
    depends=[f"{FOLDER}/{name}.h" for name in HEADERS],
    include_dirs=[FOLDER],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    extra_compile_args=["/O2", "/std:c11", "/fp:precise"] if MSVC else GCC_ARGS,
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp310"}})
