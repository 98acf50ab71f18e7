/* tusfm-check: does a bundle answer its golden frames on this device as it did when it was exported?
 *
 *     tusfm-check BUNDLE [--engine NAME] [--engines FOLDER] [--threads N] [--json] [options]
 *
 * One line for each artefact: passed, refused, or not here (its library is missing, or was not built in). Ends with 0: all
 * that are here passed; 1: one is refused; 2: the bundle or the command cannot be used; 3: none is here. */
#include "tinyusfm.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { PASSED = 0, REFUSED = 1, UNUSABLE = 2, NOT_HERE = 3, SCHEMA = 1 };

static const char usage[] =
    "usage: tusfm-check BUNDLE [--engine NAME] [--engines FOLDER] [--threads N] [--json] [--allow-unverified]\n"
    "       [--allow-precision] [--require-signed STORE] [--device-class NAME]\n";
static const char *const state_names[] = {"passed", "refused", "", "not here"};

typedef struct settings {
    const char *bundle, *engine;
    int json;
    tusfm_options options;
    tusfm_trust_options trust;
} settings;

/* What became of one artefact. */
typedef struct outcome {
    int state;
    int32_t golden_frames;
    double ms;
    char engine[300], executed[200], text[700];
} outcome;

/* ---- words of the command ---- */

static int option(settings *s, const char *word, const char *value) {
    if (strcmp(word, "--engine") == 0) s->engine = value;
    else if (strcmp(word, "--engines") == 0) s->options.engine_folder = value;
    else if (strcmp(word, "--threads") == 0) s->options.threads = atoi(value);
    else if (strcmp(word, "--require-signed") == 0) s->trust.store = value, s->options.trust = &s->trust;
    else if (strcmp(word, "--device-class") == 0) s->trust.device_class = value;
    else return 0;
    return 1;
}

static int parse(int count, char **words, settings *s) {
    memset(s, 0, sizeof *s);
    tusfm_options_init(&s->options, sizeof s->options);
    tusfm_trust_options_init(&s->trust, sizeof s->trust);
    s->options.all_golden = 1;
    s->options.recheck_s = 0;
    for (int i = 1; i < count; i++) {
        if (strcmp(words[i], "--json") == 0) s->json = 1;
        else if (strcmp(words[i], "--allow-unverified") == 0) s->options.allow_unverified = 1;
        else if (strcmp(words[i], "--allow-precision") == 0) s->options.allow_precision = 1;
        else if (strncmp(words[i], "--", 2) != 0 && !s->bundle) s->bundle = words[i];
        else if (i + 1 < count && option(s, words[i], words[i + 1])) i++;
        else return 0;
    }
    return s->bundle != NULL;
}

static int same_word(const char *a, const char *b) {
    for (; *a && *b; a++, b++) {
        char x = *a >= 'A' && *a <= 'Z' ? (char)(*a - 'A' + 'a') : *a;
        if (x != *b) return 0;
    }
    return *a == *b;
}

/* An engine is asked for by its name, its target or its library's. */
static int is_asked(const settings *s, const tusfm_artefact *a) {
    static const char *const libraries[][2] = {{"onnxruntime", "ort"}, {"tensorrt", "trt"}};
    if (!s->engine || same_word(s->engine, a->engine) || same_word(s->engine, a->target)) return 1;
    for (size_t i = 0; i < sizeof libraries / sizeof *libraries; i++)
        if (same_word(s->engine, libraries[i][0]) && strcmp(a->engine, libraries[i][1]) == 0) return 1;
    return 0;
}

/* ---- JSON ---- */

static void word_of(const char *name, const char *value) {
    printf("\"%s\": \"", name);
    for (; *value; value++) {
        unsigned char letter = (unsigned char)*value;
        if (letter < ' ') printf("\\u%04x", letter);
        else if (letter == '"' || letter == '\\') printf("\\%c", letter);
        else putchar(letter);
    }
    putchar('"');
}

static void write_json(const tusfm_artefact *a, const outcome *o, int first) {
    printf("%s\n {", first ? "" : ",");
    word_of("artefact", a->name), printf(", ");
    word_of("target", a->target), printf(", ");
    word_of("precision", a->precision), printf(", ");
    word_of("state", state_names[o->state]), printf(", ");
    word_of("engine", o->engine), printf(", ");
    word_of("executed", o->executed), printf(", \"golden_frames\": %d, \"golden_ms\": %.3f, ", o->golden_frames, o->ms);
    word_of("text", o->text);
    putchar('}');
}

static void write_line(const tusfm_artefact *a, const outcome *o) {
    if (o->state == PASSED) printf("%-16s passed    %d golden frames; %s\n", a->name, o->golden_frames, o->engine);
    else printf("%-16s %-9s %s\n", a->name, state_names[o->state], o->text);
}

/* ---- checking ---- */

static void copy(char *to, size_t size, const char *from) { snprintf(to, size, "%s", from); }

static void judge(tusfm_status *failed, outcome *o) {
    int32_t code = tusfm_status_code(failed);
    o->state = code == TUSFM_MISSING || code == TUSFM_UNSUPPORTED ? NOT_HERE : REFUSED;
    copy(o->text, sizeof o->text, tusfm_status_text(failed));
    tusfm_status_free(failed);
}

static outcome check(const settings *s, const tusfm_artefact *a) {
    outcome o = {.state = PASSED};
    tusfm_options options = s->options;
    tusfm_session *session = NULL;
    tusfm_info info;
    options.target = a->target, options.precision = a->precision;
    tusfm_info_init(&info, sizeof info);
    tusfm_status *failed = tusfm_open(s->bundle, &options, &session);
    if (!failed) failed = tusfm_get_info(session, &info);
    if (failed) {
        judge(failed, &o);
    } else {
        o.golden_frames = info.golden_frames, o.ms = info.golden_ms;
        copy(o.engine, sizeof o.engine, info.engine);
        copy(o.executed, sizeof o.executed, info.executed);
    }
    tusfm_close(session);
    return o;
}

static int unusable(const settings *s, const char *text) {
    fprintf(stderr, "tusfm-check: %s\n", text);
    if (s->json) {
        printf("{\"schema\": %d, \"passed\": false, ", SCHEMA);
        word_of("error", text);
        puts("}");
    }
    return UNUSABLE;
}

int main(int count, char **words) {
    settings s;
    tusfm_artefact a;
    int seen[4] = {0}, asked = 0;
    if (!parse(count, words, &s)) {
        fputs(usage, stderr);
        return UNUSABLE;
    }
    tusfm_artefact_init(&a, sizeof a);
    a.count = 1;
    for (int32_t i = 0; i < a.count; i++) {
        tusfm_status *failed = tusfm_get_artefact(s.bundle, &s.options, i, &a);
        if (failed) {
            int code = unusable(&s, tusfm_status_text(failed));
            tusfm_status_free(failed);
            return code;
        }
        if (!is_asked(&s, &a)) continue;
        outcome o = check(&s, &a);
        if (s.json && !asked) printf("{\"schema\": %d, \"engines\": [", SCHEMA);
        if (s.json) write_json(&a, &o, !asked);
        else write_line(&a, &o);
        fflush(stdout);
        seen[o.state] = 1, asked = 1;
    }
    if (!asked) return unusable(&s, "the bundle has no artefact for that engine: leave --engine out to see what it has");
    int code = seen[REFUSED] ? REFUSED : seen[PASSED] ? PASSED : NOT_HERE;
    if (s.json) printf("\n], \"passed\": %s}\n", code == PASSED ? "true" : "false");
    if (code == NOT_HERE) fprintf(stderr, "tusfm-check: no engine of the bundle is here\n");
    return code;
}
