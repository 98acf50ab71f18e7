/* Counts allocations and looks at memory:  growth BUNDLE PREDICTS OPENS
 * Prints "allocations N  memory_kb M  opens_kb K": allocations of all PREDICTS predictions and stream results after a
 * warm-up, growth of resident memory over them, and over OPENS openings. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tinyusfm.h>
#include <unistd.h>

static atomic_llong allocations;
static atomic_int counting;

extern void *__libc_malloc(size_t);
extern void *__libc_calloc(size_t, size_t);
extern void *__libc_realloc(void *, size_t);

void *malloc(size_t size) {
    if (atomic_load(&counting)) atomic_fetch_add(&allocations, 1);
    return __libc_malloc(size);
}
void *calloc(size_t count, size_t size) {
    if (atomic_load(&counting)) atomic_fetch_add(&allocations, 1);
    return __libc_calloc(count, size);
}
void *realloc(void *old, size_t size) {
    if (atomic_load(&counting)) atomic_fetch_add(&allocations, 1);
    return __libc_realloc(old, size);
}

static long resident_kb(void) {
    long pages = 0, unused = 0;
    FILE *file = fopen("/proc/self/statm", "re");
    if (!file) return 0;
    if (fscanf(file, "%ld %ld", &unused, &pages) != 2) pages = 0;
    fclose(file);
    return pages * (sysconf(_SC_PAGESIZE) / 1024);
}

static void need(tusfm_status *failed) {
    if (!failed) return;
    fprintf(stderr, "growth: %s\n", tusfm_status_text(failed));
    exit(1);
}

static tusfm_session *open_one(const char *bundle) {
    tusfm_session *session = NULL;
    tusfm_options options;
    tusfm_options_init(&options, sizeof options);
    options.recheck_s = 0.05;
    options.engine_folder = getenv("TUSFM_ENGINES");
    options.target = getenv("TUSFM_TARGET");
    need(tusfm_open(bundle, &options, &session));
    return session;
}

static void count_one(void *user, const tusfm_reading *reading) { *(long long *)user += reading->seq != 0; }

/* Frames of the same stream, answered in this thread where the engine allows that. */
static void in_place(tusfm_session *session, tusfm_frame *frame, long long frames) {
    tusfm_info info;
    long long given = 0;
    tusfm_info_init(&info, sizeof info);
    need(tusfm_get_info(session, &info));
    for (long long i = 0; i < frames * info.in_place; i++) {
        frame->seq++;
        need(tusfm_answer(session, frame, NULL, count_one, &given));
    }
    if (info.in_place && given != frames) {
        fprintf(stderr, "growth: %lld readings of %lld frames\n", given, frames);
        exit(1);
    }
}

int main(int count, char **words) {
    static unsigned char pixels[200 * 300];
    if (count < 4) return 2;
    long long predicts = atoll(words[2]), opens = atoll(words[3]), streamed = predicts / 10;
    tusfm_frame frame;
    tusfm_reading reading;
    int32_t there = 0;
    tusfm_frame_init(&frame, sizeof frame);
    tusfm_reading_init(&reading, sizeof reading);
    frame.pixels = pixels, frame.rows = 200, frame.columns = 300;
    for (int i = 0; i < 200 * 300; i++) pixels[i] = (unsigned char)(i % 251);
    tusfm_session *session = open_one(words[1]);
    for (int i = 0; i < 50; i++) need(tusfm_predict(session, &frame, &reading));
    long before = resident_kb();
    atomic_store(&counting, 1);
    for (long long i = 0; i < predicts; i++) need(tusfm_predict(session, &frame, &reading));
    atomic_store(&counting, 0);
    long grown = resident_kb() - before;
    for (int i = 0; i < 200; i++) { /* a stream, warm after some results */
        frame.seq++;
        need(tusfm_submit(session, &frame));
        need(tusfm_newest(session, 5, &reading, &there));
        need(tusfm_overlay(session, &reading, &there));
    }
    in_place(session, &frame, 50);
    before = resident_kb() - grown; /* a stream's own memory comes once */
    atomic_store(&counting, 1);
    in_place(session, &frame, streamed);
    for (long long i = 0; i < streamed; i++) {
        frame.seq++;
        need(tusfm_submit(session, &frame));
        need(tusfm_newest(session, 5, &reading, &there));
        need(tusfm_overlay(session, &reading, &there));
    }
    atomic_store(&counting, 0);
    long after = resident_kb();
    tusfm_close(session);
    for (int i = 0; i < 5; i++) tusfm_close(open_one(words[1]));
    long first = resident_kb();
    for (long long i = 0; i < opens; i++) tusfm_close(open_one(words[1]));
    printf("allocations %lld memory_kb %ld opens_kb %ld\n", (long long)atomic_load(&allocations), after - before,
           resident_kb() - first);
    return 0;
}
