/* Model files held against a list of operators before a library reads them: no other kinds, no control flow, no data
 * outside the file. Python checks shapes and attributes as well (tinyusfm_runtime/graphs). */
#ifndef TUSFM_ALLOWED_H
#define TUSFM_ALLOWED_H

#include "engine.h"

tusfm_status *check_onnx(const engine_file *file);
tusfm_status *check_ir(const engine_file *file);

#endif
