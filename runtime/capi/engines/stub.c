/* An engine without a library, for tests: logits are (code / 255 - 0.3) * 20 of the input's own pixels, or, for a
 * classifier, the mean code of K vertical strips. Its file "model.stub" is a line of words that bend it:
 *   sleep=MS  sleep_from=N  hang_from=N  fail_from=N  fail_to=N  nan_from=N  shift_from=N  classes=K  tokens=N
 *   version=TEXT
 * With tokens it gives two more outputs: "tokens", mean codes of N strips, and "peak", the largest code. */
#include "engine.h"

#include <math.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

typedef struct stub {
    const model_spec *spec;
    float *logits;
    int64_t runs, sleep_ms, sleep_from, hang_from, fail_from, fail_to, nan_from, shift_from;
    int32_t classes, tokens;
    float *auxiliary; /* tokens, then the peak */
    atomic_int cancelled, hangs;
    mutex lock;
    condition wake;
} stub;

static int64_t word(const engine_file *file, const char *name, int64_t otherwise) {
    char text[256];
    size_t count = file->size < sizeof text - 1 ? file->size : sizeof text - 1;
    memcpy(text, file->data, count);
    text[count] = 0;
    const char *found = strstr(text, name);
    return found ? strtoll(found + strlen(name), NULL, 10) : otherwise;
}

static void version_of(const engine_file *file, char version[64]) {
    char text[256];
    size_t count = file->size < sizeof text - 1 ? file->size : sizeof text - 1;
    memcpy(text, file->data, count);
    text[count] = 0;
    const char *found = strstr(text, "version=");
    snprintf(version, 64, "%s", found ? found + 8 : "1");
    version[strcspn(version, " \n")] = 0;
}

static tusfm_status *stub_open(engine *e, const engine_request *request) {
    const engine_file *file = request_file(request, "model.stub");
    if (!file || request->file_count != 1) return status_new(TUSFM_ENGINE, "the stub engine needs exactly model.stub");
    stub *s = calloc(1, sizeof *s);
    if (!s) return no_memory();
    e->state = s;
    mutex_init(&s->lock);
    condition_init(&s->wake);
    s->spec = request->spec;
    s->sleep_ms = word(file, "sleep=", 0), s->sleep_from = word(file, "sleep_from=", 0);
    s->hang_from = word(file, "hang_from=", INT64_MAX), s->fail_from = word(file, "fail_from=", INT64_MAX);
    s->fail_to = word(file, "fail_to=", INT64_MAX), s->nan_from = word(file, "nan_from=", INT64_MAX);
    s->shift_from = word(file, "shift_from=", INT64_MAX), s->classes = (int32_t)word(file, "classes=", 1);
    if (s->classes < 1 || s->classes > 256) return status_new(TUSFM_ENGINE, "the stub engine has 1 to 256 classes");
    size_t plane = (size_t)s->spec->rows * (size_t)s->spec->columns;
    int segments = s->spec->task == TASK_SEGMENT;
    size_t count = (size_t)s->classes * (segments ? plane : 1);
    s->logits = calloc(count, sizeof *s->logits);
    if (!s->logits) return no_memory();
    e->outputs[0] = (engine_output){.name = LOGITS_NAME, .data = s->logits, .count = count,
                                    .axes = segments ? 4 : 2, .shape = {1, s->classes, s->spec->rows, s->spec->columns}};
    e->output_count = 1;
    s->tokens = (int32_t)word(file, "tokens=", 0);
    if (s->tokens < 0 || s->tokens > 4096) return status_new(TUSFM_ENGINE, "the stub engine has 0 to 4096 tokens");
    s->auxiliary = calloc((size_t)s->tokens + 1, sizeof *s->auxiliary);
    if (!s->auxiliary) return no_memory();
    if (s->tokens) {
        e->outputs[1] = (engine_output){.name = "tokens", .data = s->auxiliary, .count = (size_t)s->tokens, .axes = 2,
                                        .shape = {1, s->tokens}};
        e->outputs[2] = (engine_output){.name = "peak", .data = s->auxiliary + s->tokens, .count = 1, .axes = 2, .shape = {1, 1}};
        e->output_count = 3;
    }
    snprintf(e->description, sizeof e->description, "stub f32 %d %s", request->threads, threads_word(request->threads));
    snprintf(e->executed, sizeof e->executed, "f32");
    version_of(file, e->version);
    return NULL;
}

static void wait_for(stub *s, int64_t end_ns) {
    mutex_lock(&s->lock);
    while (!atomic_load(&s->cancelled) && now_ns() < end_ns) condition_wait_until(&s->wake, &s->lock, end_ns);
    mutex_unlock(&s->lock);
}

static void strips(const stub *s, const uint8_t *pixels, size_t count, float *out) {
    size_t rows = (size_t)s->spec->rows, columns = (size_t)s->spec->columns;
    for (size_t k = 0; k < count; k++) {
        size_t from = k * columns / count, to = (k + 1) * columns / count, sum = 0;
        for (size_t y = 0; y < rows; y++)
            for (size_t x = from; x < to; x++) sum += pixels[y * columns + x];
        out[k] = (float)sum / (float)(rows * (to > from ? to - from : 1)) / 32.0f;
    }
}

static void compute(stub *s, const uint8_t *pixels) {
    size_t rows = (size_t)s->spec->rows, columns = (size_t)s->spec->columns, plane = rows * columns;
    float shift = s->runs >= s->shift_from ? 10.0f : 0.0f;
    strips(s, pixels, (size_t)s->tokens, s->auxiliary);
    int peak = 0;
    for (size_t i = 0; i < plane; i++) peak = pixels[i] > peak ? pixels[i] : peak;
    s->auxiliary[s->tokens] = (float)peak / 8.0f;
    if (s->spec->task != TASK_SEGMENT) {
        strips(s, pixels, (size_t)s->classes, s->logits);
        for (size_t k = 0; k < (size_t)s->classes; k++) s->logits[k] += shift;
        return;
    }
    for (size_t k = 0; k < (size_t)s->classes; k++)
        for (size_t i = 0; i < plane; i++) {
            float value = ((float)pixels[i] / 255.0f - 0.3f) * 20.0f + shift;
            s->logits[k * plane + i] = k ? value * (1.0f / (float)(k + 1)) : s->classes > 1 ? 0.0f : value;
        }
}

static tusfm_status *stub_run(engine *e, const void *input) {
    stub *s = e->state;
    int64_t number = s->runs;
    atomic_store(&s->cancelled, 0);
    if (s->sleep_ms && number >= s->sleep_from) wait_for(s, now_ns() + s->sleep_ms * 1000000);
    if (number >= s->hang_from) { /* does not listen to cancel, but ends after 3 s, so that a test can */
        int64_t end = now_ns() + (int64_t)3000 * 1000000;
        mutex_lock(&s->lock);
        while (now_ns() < end) condition_wait_until(&s->wake, &s->lock, end);
        mutex_unlock(&s->lock);
    }
    compute(s, input);
    s->runs++;
    if (atomic_load(&s->cancelled)) return status_new(TUSFM_ENGINE, "the stub engine was cancelled");
    if (number >= s->fail_from && number < s->fail_to) return status_new(TUSFM_ENGINE, "the stub engine failed");
    if (number >= s->nan_from) s->logits[0] = NAN;
    return NULL;
}

static void stub_cancel(engine *e) {
    stub *s = e->state;
    mutex_lock(&s->lock);
    atomic_store(&s->cancelled, 1);
    condition_wake_all(&s->wake);
    mutex_unlock(&s->lock);
}

static void stub_close(engine *e) {
    stub *s = e->state;
    if (!s) return;
    condition_free(&s->wake);
    mutex_free(&s->lock);
    free(s->logits);
    free(s->auxiliary);
    free(s);
}

const engine_kind engine_stub = {.name = "stub",
                                 .library = "numpy",
                                 .own = 1,
                                 .open = stub_open,
                                 .run = stub_run,
                                 .cancel = stub_cancel,
                                 .close = stub_close};
