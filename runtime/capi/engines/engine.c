#include "engine.h"

#include <stdlib.h>
#include <string.h>

static const engine_kind *const kinds[] = {
#if defined(TUSFM_WITH_INTEGER)
    &engine_integer,
#endif
#if defined(TUSFM_WITH_ORT)
    &engine_ort,
#endif
#if defined(TUSFM_WITH_OPENVINO)
    &engine_ov,
#endif
#if defined(TUSFM_WITH_TENSORRT)
    &engine_trt,
#endif
#if defined(TUSFM_WITH_STUB)
    &engine_stub,
#endif
    NULL};

const engine_kind *engine_kind_of(const char *name) {
    for (size_t i = 0; kinds[i]; i++)
        if (strcmp(kinds[i]->name, name) == 0) return kinds[i];
    return NULL;
}

tusfm_status *engine_open(const engine_kind *kind, const engine_request *request, int full_depth, engine **opened) {
    engine *e = calloc(1, sizeof *e);
    if (!e) return no_memory();
    e->kind = kind;
    e->exit_index = -1;
    tusfm_status *failed;
    if (request_is_chain(request)) {
        e->kind = &engine_chain;
        failed = chain_open(e, kind, request, full_depth);
    } else {
        failed = kind->open(e, request);
    }
    if (!failed && (!e->output_count || strcmp(e->outputs[0].name, LOGITS_NAME) != 0))
        failed = status_new(TUSFM_ENGINE, "the model's first output is not %s in float32", LOGITS_NAME);
    if (failed) {
        engine_close(e);
        return failed;
    }
    *opened = e;
    return NULL;
}

tusfm_status *engine_run(engine *e, const void *input) { return e->kind->run(e, input); }

void engine_cancel(engine *e) { e->kind->cancel(e); }

void engine_close(engine *e) {
    if (!e) return;
    e->kind->close(e);
    free(e);
}

const engine_output *engine_find(const engine *e, const char *name) {
    for (size_t i = 0; i < e->output_count; i++)
        if (strcmp(e->outputs[i].name, name) == 0) return &e->outputs[i];
    return NULL;
}

const engine_file *request_file(const engine_request *request, const char *name) {
    for (size_t i = 0; i < request->file_count; i++)
        if (strcmp(request->files[i].name, name) == 0) return &request->files[i];
    return NULL;
}

const char *threads_word(int32_t count) { return count == 1 ? "thread" : "threads"; }

/* A name that ends with '*' stands for the first file of the folder that begins so. */
static void *open_one(const char *folder, const char *name, char *why, size_t why_size) {
    size_t length = strlen(name);
    char beginning[64], found[128];
    if (name[length - 1] != '*') return library_open(folder, name, why, why_size);
    if (!folder || length >= sizeof beginning) return NULL;
    copy_line(beginning, length, name);
    return library_find(folder, beginning, found, sizeof found) ? library_open(folder, found, why, why_size) : NULL;
}

tusfm_status *engine_library(const char *folder, const char *const *names, const char *what, void **library) {
    char why[300] = "there is no such file", beside[1024];
    const char *places[2] = {folder, NULL};
    if (!folder) places[0] = library_folder(beside, sizeof beside) ? beside : NULL;
    for (int i = 0; i < (folder ? 1 : 2); i++) /* a folder that was named is the only place */
        for (const char *const *name = names; *name; name++)
            if ((*library = open_one(places[i], *name, why, sizeof why))) return NULL;
    return status_new(TUSFM_MISSING,
                      "%s is not installed: put its library beside this one or name its folder in "
                      "options.engine_folder (%.160s)",
                      what, why);
}
