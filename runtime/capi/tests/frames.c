/* Mutated frame headers:  frames BUNDLE COUNT
 * Every field of a frame is bent at random. A frame whose pixels lie inside the memory that is there is answered or refused;
 * one whose pixels would not is handed in without pixels and has to be refused. Prints how many were which. */
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <tinyusfm.h>

enum { ROOM = 1 << 23 };
static uint8_t pixels[ROOM];
static uint64_t state = 0x9e3779b97f4a7c15u;

static uint64_t draw(void) { /* xorshift64 (G. Marsaglia, 2003) */
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return state;
}

static int64_t odd_number(void) {
    static const int64_t odd[] = {0, 1, -1, 7, 8, 9, 64, 255, 256, 16384, 16385, INT32_MAX, INT32_MIN, INT64_MAX, INT64_MIN};
    uint64_t kind = draw() % 4;
    if (kind == 0) return odd[draw() % (sizeof odd / sizeof *odd)];
    return kind == 1 ? (int64_t)draw() : (int64_t)(draw() % 400) - 40;
}

static double odd_spacing(void) {
    double value;
    uint64_t bits = draw();
    memcpy(&value, &bits, sizeof value);
    return draw() % 3 ? (double)(draw() % 1000) / 1000 : value;
}

static void bend(tusfm_frame *frame) {
    int32_t number = (int32_t)odd_number();
    switch (draw() % 16) {
    case 0: frame->format = number; break;
    case 1: frame->row_stride = odd_number(); break;
    case 2: frame->rows = number; break;
    case 3: frame->columns = number; break;
    case 4: frame->roi_row = number; break;
    case 5: frame->roi_column = number; break;
    case 6: frame->roi_rows = number; break;
    case 7: frame->roi_columns = number; break;
    case 8: frame->limited_range = number; break;
    case 9: frame->phantom = number; break;
    case 10: frame->spacing_row_mm = odd_spacing(); break;
    case 11: frame->spacing_column_mm = odd_spacing(); break;
    case 12: frame->seq = odd_number(); break;
    case 13: frame->t_source_ns = odd_number(); break;
    case 14: frame->t_recv_ns = odd_number(); break;
    default: frame->struct_size = draw() % 2 ? (uint32_t)draw() : (uint32_t)(draw() % 200); break;
    }
}

/* Whether the image lies inside the memory, as the header says it does; the pixels begin in the middle of it. */
static int is_there(const tusfm_frame *frame) {
    int64_t step = frame->format == TUSFM_GREY ? 1 : frame->format == TUSFM_RGBA ? 4 : 3;
    int64_t stride = frame->row_stride ? frame->row_stride : step * frame->columns, half = ROOM / 2;
    if (frame->rows < 1 || frame->columns < 1 || frame->rows > 20000 || frame->columns > 20000) return 0;
    if (stride > half || stride < -half) return 0;
    int64_t last = stride * (frame->rows - 1), row = step * frame->columns;
    return last + row <= half && last >= -half && row <= half;
}

int main(int count, char **words) {
    tusfm_session *session = NULL;
    tusfm_reading reading;
    long long answered = 0, refused = 0, wrong = 0, number = count > 2 ? atoll(words[2]) : 1000;
    if (count < 2) return 2;
    for (int i = 0; i < ROOM; i++) pixels[i] = (uint8_t)(i % 251);
    tusfm_status *failed = tusfm_open(words[1], NULL, &session);
    tusfm_reading_init(&reading, sizeof reading);
    for (long long i = 0; !failed && i < number; i++) {
        tusfm_frame frame;
        tusfm_frame_init(&frame, sizeof frame);
        frame.rows = 90, frame.columns = 120, frame.spacing_row_mm = frame.spacing_column_mm = 0.2;
        for (uint64_t left = 1 + draw() % 5; left; left--) bend(&frame);
        int there = is_there(&frame);
        frame.pixels = there ? pixels + ROOM / 2 : NULL;
        tusfm_status *said = tusfm_predict(session, &frame, &reading);
        int32_t code = tusfm_status_code(said);
        if (code == TUSFM_OK && there) answered++;
        else if (code == TUSFM_FRAME) refused++;
        else wrong++;
        tusfm_status_free(said);
    }
    if (failed) fprintf(stderr, "frames: %s\n", tusfm_status_text(failed));
    else printf("answered %lld refused %lld wrong %lld\n", answered, refused, wrong);
    int bad = failed != NULL || wrong;
    tusfm_status_free(failed);
    tusfm_close(session);
    return bad;
}
