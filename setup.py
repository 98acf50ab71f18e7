"""The optional compiled kernels; everything else about the distribution stands in pyproject.toml.

Without a C compiler the installation succeeds all the same and the runtime uses numpy: same bytes, more time.
In place, for work on the sources: ``python setup.py build_ext --inplace``.
"""

from __future__ import annotations

import sys

from setuptools import Extension, setup

FOLDER = "runtime/capi"
MSVC = sys.platform == "win32"

native = Extension(
    "tinyusfm_runtime._native",
    sources=[f"{FOLDER}/{name}.c" for name in ("native_module", "preprocess", "components", "moments", "crc64")],
    depends=[f"{FOLDER}/{name}.h" for name in ("tue_numerics", "dispatch", "runs")],
    include_dirs=[FOLDER],
    define_macros=[("Py_LIMITED_API", "0x030A0000")],
    extra_compile_args=["/O2", "/std:c11"] if MSVC else ["-O3", "-std=c11", "-fvisibility=hidden"],
    py_limited_api=True,
    optional=True,
)

setup(ext_modules=[native], options={"bdist_wheel": {"py_limited_api": "cp310"}})
