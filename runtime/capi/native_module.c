/* Makes the shared object an importable module, so that every build tool finds and places it. It has no contents:
 * native.py reaches the functions of tue_numerics.h through ctypes, without the interpreter lock. */
#define PY_SSIZE_T_CLEAN
#ifndef Py_LIMITED_API
#define Py_LIMITED_API 0x030A0000
#endif
#include <Python.h>

static struct PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_native", "Compiled kernels; called through tinyusfm_runtime.native.", 0, NULL, NULL, NULL,
    NULL, NULL,
};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&module); }
