#include "spec.h"

#include "canonical.h"
#include "sha256.h"
#include "want.h"

#include <math.h>
#include <string.h>

enum { SIDE_MIN = 16, SIDE_MAX = 4096, MAX_LABELS = 65536, PATCH = 16, MAX_SECTOR_NAME = 80 };

static tusfm_status *one_of(const char *value, const char *const *names, int count, int *found, const char *what) {
    for (int i = 0; i < count; i++)
        if (strcmp(value, names[i]) == 0) {
            *found = i;
            return NULL;
        }
    return status_new(TUSFM_BUNDLE, "the model's %s '%.40s' is not known", what, value);
}

static const char *const tasks[] = {"segment", "classify", "features"};

const char *task_name(int task) { return tasks[task]; }

static tusfm_status *check_name(const char *name) {
    static const char allowed[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789._-";
    if (!*name || *name == '.' || *name == '-' || strspn(name, allowed) != strlen(name))
        return status_new(TUSFM_BUNDLE, "model name '%.80s': use letters, digits, '.', '-' and '_'", name);
    return NULL;
}

static tusfm_status *parse_preprocess(const json_t *data, model_spec *spec) {
    static const wanted keys[] = {{"height", "i"}, {"width", "i"}, {"grey", "b"}, {"aspect", "s"},
                                  {"crop", "a0"},  {"mean", "a"},  {"std", "a"}};
    static const char *const aspects[] = {"stretch", "letterbox"};
    TRY(want_object(data, keys, sizeof keys / sizeof *keys, "the model's preprocessing"));
    int64_t rows = want_integer(data, "height"), columns = want_integer(data, "width");
    if (rows < SIDE_MIN || columns < SIDE_MIN || rows > SIDE_MAX || columns > SIDE_MAX)
        return status_new(TUSFM_BUNDLE, "the model's input: each side must be 16 to 4096");
    spec->rows = (int32_t)rows, spec->columns = (int32_t)columns;
    spec->grey = want_true(data, "grey");
    TRY(one_of(want_string(data, "aspect"), aspects, 2, &spec->letterbox, "aspect"));
    double scale[3];
    TRY(want_numbers(json_object_get(data, "mean"), 3, scale, "the model's mean"));
    for (int i = 0; i < 3; i++)
        if (!(scale[i] > -10 && scale[i] < 10)) return status_new(TUSFM_BUNDLE, "the model's mean must lie in (-10, 10)");
    TRY(want_numbers(json_object_get(data, "std"), 3, scale, "the model's std"));
    for (int i = 0; i < 3; i++)
        if (!(scale[i] > 0 && scale[i] < 10)) return status_new(TUSFM_BUNDLE, "the model's std must lie in (0, 10)");
    const json_t *crop = json_object_get(data, "crop");
    spec->has_crop = !json_is_null(crop);
    if (!spec->has_crop) return NULL;
    int64_t sides[4];
    TRY(want_integers(crop, 4, sides, "the model's crop"));
    for (int i = 0; i < 4; i++) {
        if (sides[i] < 0 || sides[i] > 1 << 16)
            return status_new(TUSFM_BUNDLE, "the model's crop is out of range");
        spec->crop[i] = (int32_t)sides[i];
    }
    return NULL;
}

static tusfm_status *parse_exits(const json_t *data, model_spec *spec) {
    static const wanted keys[] = {{"blocks", "a"}, {"entropy", "a"}, {"patience", "i"}};
    if (json_is_null(data)) return NULL;
    TRY(want_object(data, keys, 3, "the model's early exits"));
    const json_t *blocks = json_object_get(data, "blocks"), *entropy = json_object_get(data, "entropy");
    size_t count = json_array_size(blocks);
    if (count < 1 || count > 98 || json_array_size(entropy) != count)
        return status_new(TUSFM_BUNDLE, "the model's early exits need as many entropies as blocks");
    json_int_t before = 0;
    for (size_t i = 0; i < count; i++) {
        const json_t *block = json_array_get(blocks, i), *level = json_array_get(entropy, i);
        if (!json_is_integer(block) || json_integer_value(block) <= before || !json_is_number(level) ||
            !(json_number_value(level) >= 0 && json_number_value(level) <= 1))
            return status_new(TUSFM_BUNDLE, "the model's early exits must rise from 1, entropies lie between 0 and 1");
        before = json_integer_value(block);
    }
    int64_t patience = want_integer(data, "patience");
    if (patience < 0 || patience == 1 || patience > INT32_MAX)
        return status_new(TUSFM_BUNDLE, "the model's patience must be 0 or at least 2");
    spec->exit_blocks = blocks, spec->exit_entropy = entropy;
    spec->exit_count = (int32_t)count, spec->exit_patience = (int32_t)patience;
    if (spec->task != TASK_CLASSIFY) return status_new(TUSFM_BUNDLE, "early exits are for classifiers");
    return NULL;
}

static int is_share(const json_t *value) {
    return json_is_number(value) && json_number_value(value) >= 0 && json_number_value(value) <= 1;
}

static int is_read_label(const model_spec *spec, const char *label) {
    size_t first = spec->task == TASK_SEGMENT && spec->label_count > 1 ? 1 : 0;
    for (size_t i = first; i < (size_t)spec->label_count; i++)
        if (strcmp(json_string_value(json_array_get(spec->labels, i)), label) == 0) return 1;
    return 0;
}

static tusfm_status *check_thresholds(const json_t *thresholds, const model_spec *spec) {
    static const wanted keys[] = {{"label", "s"}, {"confidence", "n"}, {"agreement", "n0"}};
    size_t count = json_array_size(thresholds);
    if (count < 1) return status_new(TUSFM_BUNDLE, "reading thresholds name each label once, and at least one");
    for (size_t i = 0; i < count; i++) {
        const json_t *rule = json_array_get(thresholds, i), *agreement;
        TRY(want_object(rule, keys, 3, "a reading threshold"));
        agreement = json_object_get(rule, "agreement");
        if (!is_share(json_object_get(rule, "confidence")) || (!json_is_null(agreement) && !is_share(agreement)))
            return status_new(TUSFM_BUNDLE, "reading thresholds must lie in 0..1");
        const char *label = want_string(rule, "label");
        if (!is_read_label(spec, label))
            return status_new(TUSFM_BUNDLE, "reading thresholds for '%.40s', which is none of the labels", label);
        for (size_t j = 0; j < i; j++)
            if (strcmp(label, want_string(json_array_get(thresholds, j), "label")) == 0)
                return status_new(TUSFM_BUNDLE, "reading thresholds name each label once, and at least one");
    }
    return NULL;
}

static tusfm_status *check_rates(const json_t *rates) {
    static const wanted keys[] = {{"frames", "i"},           {"groups", "i"},
                                  {"good", "i"},             {"doubtful", "i"},
                                  {"none", "i"},             {"wrong", "i"},
                                  {"good_but_wrong", "i"},   {"doubtful_but_right", "i"},
                                  {"good_but_wrong_limit", "n"}, {"wrong_means", "s"},
                                  {"frames_sha256", "s"}};
    TRY(want_object(rates, keys, sizeof keys / sizeof *keys, "the rates"));
    int64_t frames = want_integer(rates, "frames"), sum = 0;
    for (int i = 0; i < 8; i++) {
        int64_t count = want_integer(rates, keys[i].key);
        if (count < 0 || count > frames || frames < 1)
            return status_new(TUSFM_BUNDLE, "the rates of the reading thresholds are not counts of frames");
        if (i >= 2 && i <= 4) sum += count;
    }
    int64_t slipped = want_integer(rates, "good_but_wrong");
    if (sum != frames || slipped > want_integer(rates, "good") || slipped > want_integer(rates, "wrong") ||
        !is_share(json_object_get(rates, "good_but_wrong_limit")))
        return status_new(TUSFM_BUNDLE, "the rates of the reading thresholds do not add up");
    return NULL;
}

static tusfm_status *parse_reading(const json_t *data, model_spec *spec) {
    static const wanted keys[] = {{"thresholds", "a"}, {"rates", "o"}};
    if (json_is_null(data)) return NULL;
    TRY(want_object(data, keys, 2, "the reading rules"));
    if (spec->task == TASK_FEATURES)
        return status_new(TUSFM_BUNDLE, "a feature model gives no reading that could be good or doubtful");
    TRY(check_thresholds(json_object_get(data, "thresholds"), spec));
    TRY(check_rates(json_object_get(data, "rates")));
    spec->reading = data;
    return NULL;
}

static tusfm_status *rising(const json_t *pair, const char *what) {
    double sides[2];
    TRY(want_numbers(pair, 2, sides, what));
    if (!(0 < sides[0] && sides[0] < sides[1])) return status_new(TUSFM_BUNDLE, "%s must rise and be positive", what);
    return NULL;
}

static tusfm_status *parse_anatomy(const json_t *data, model_spec *spec) {
    static const wanted keys[] = {{"name", "s"}, {"size_mm", "a"}, {"spacing_mm", "a"}};
    if (json_is_null(data)) return NULL;
    TRY(want_object(data, keys, 3, "the anatomy"));
    TRY(rising(json_object_get(data, "size_mm"), "anatomy size_mm"));
    TRY(rising(json_object_get(data, "spacing_mm"), "anatomy spacing_mm"));
    spec->anatomy = data;
    return NULL;
}

static tusfm_status *parse_probe(const json_t *data, model_spec *spec) {
    static const wanted keys[] = {{"name", "s"}, {"kind", "s"}, {"apex", "a"}, {"radii", "a"}, {"angles_deg", "a"}};
    static const char *const kinds[] = {"sector", "linear"};
    if (json_is_null(data)) return NULL;
    double apex[2], radii[2], angles[2];
    int linear = 0;
    TRY(want_object(data, keys, 5, "the probe"));
    TRY(one_of(want_string(data, "kind"), kinds, 2, &linear, "kind of probe"));
    TRY(want_numbers(json_object_get(data, "apex"), 2, apex, "probe apex"));
    TRY(want_numbers(json_object_get(data, "radii"), 2, radii, "probe radii"));
    TRY(want_numbers(json_object_get(data, "angles_deg"), 2, angles, "probe angles_deg"));
    int fits = linear ? angles[0] == 0 && angles[1] == 0 : -90 < angles[0] && angles[0] < angles[1] && angles[1] < 90;
    if (!fits || !(0 <= radii[0] && radii[0] < radii[1]))
        return status_new(TUSFM_BUNDLE, "the probe's radii must rise from 0 up, its angles from left to right");
    spec->probe = data;
    return NULL;
}

/* Only a model whose artefacts were pruned has one (numerics/sector.py); it is never null. */
static tusfm_status *parse_sector(const json_t *data, model_spec *spec) {
    static const wanted keys[] = {{"name", "s"}, {"kept", "a"}};
    if (!data) return NULL;
    TRY(want_object(data, keys, 2, "the sector"));
    const char *name = want_string(data, "name");
    const json_t *kept = json_object_get(data, "kept");
    TRY(check_name(name));
    if (strlen(name) > MAX_SECTOR_NAME) return status_new(TUSFM_BUNDLE, "the sector's name is too long");
    size_t rows = (size_t)spec->rows / PATCH, columns = (size_t)spec->columns / PATCH, ones = 0;
    if (json_array_size(kept) != rows || spec->rows % PATCH || spec->columns % PATCH)
        return status_new(TUSFM_BUNDLE, "the sector has other rows of patches than the model's input");
    for (size_t i = 0; i < rows; i++) {
        const char *row = json_string_value(json_array_get(kept, i));
        if (!row || strlen(row) != columns || strspn(row, "01") != columns)
            return status_new(TUSFM_BUNDLE, "every row of the sector must be as many digits 0 or 1 as the input has patches");
        for (size_t j = 0; j < columns; j++) ones += row[j] == '1';
    }
    if (ones == 0 || ones == rows * columns)
        return status_new(TUSFM_BUNDLE, "the sector must keep some patches and leave some out");
    if (spec->second_pass != PASS_NEVER) return status_new(TUSFM_BUNDLE, "a model has a second pass or a sector, not both");
    spec->sector = name;
    return NULL;
}

static tusfm_status *parse_labels(const json_t *labels, model_spec *spec) {
    size_t count = json_array_size(labels);
    if (count > MAX_LABELS) return status_new(TUSFM_BUNDLE, "the model has more than %d labels", MAX_LABELS);
    for (size_t i = 0; i < count; i++)
        if (!json_is_string(json_array_get(labels, i)))
            return status_new(TUSFM_BUNDLE, "the model's labels must be texts");
    spec->labels = labels, spec->label_count = (int32_t)count;
    return NULL;
}

static tusfm_status *parse(const json_t *data, model_spec *spec) {
    static const wanted keys[] = {
        {"name", "s"},         {"task", "s"},       {"labels", "a"},       {"preprocess", "o"},   {"postprocess", "s"},
        {"threshold", "n"},    {"architecture", "o"}, {"licence", "s"},    {"origin", "s"},       {"intended_use", "s"},
        {"weights_sha256", "s"}, {"exits", "o0"},   {"second_pass", "s"},  {"min_area", "n"},     {"reading", "o0"},
        {"anatomy", "o0"},     {"probe", "o0"},     {"sector", "o"}};
    static const char *const posts[] = {"none", "mask", "ellipse_hc"}, *const passes[] = {"never", "small", "always"};
    size_t count = sizeof keys / sizeof *keys - !json_object_get(data, "sector");
    TRY(want_object(data, keys, count, "the model"));
    spec->name = want_string(data, "name");
    spec->intended_use = want_string(data, "intended_use");
    TRY(check_name(spec->name));
    TRY(one_of(want_string(data, "task"), tasks, 3, &spec->task, "task"));
    TRY(one_of(want_string(data, "postprocess"), posts, 3, &spec->postprocess, "post-processing"));
    TRY(one_of(want_string(data, "second_pass"), passes, 3, &spec->second_pass, "second pass"));
    spec->threshold = want_number(data, "threshold");
    if (!(spec->threshold > 0 && spec->threshold < 1))
        return status_new(TUSFM_BUNDLE, "the model's threshold must lie between 0 and 1");
    spec->min_area = want_number(data, "min_area");
    if (!(spec->min_area >= 0 && spec->min_area < 1))
        return status_new(TUSFM_BUNDLE, "the model's min_area must be a share from 0 to below 1");
    if (spec->second_pass != PASS_NEVER && spec->task != TASK_SEGMENT)
        return status_new(TUSFM_BUNDLE, "a second pass is for models that give a mask");
    TRY(parse_labels(json_object_get(data, "labels"), spec));
    TRY(parse_preprocess(json_object_get(data, "preprocess"), spec));
    TRY(parse_exits(json_object_get(data, "exits"), spec));
    TRY(parse_reading(json_object_get(data, "reading"), spec));
    TRY(parse_anatomy(json_object_get(data, "anatomy"), spec));
    TRY(parse_probe(json_object_get(data, "probe"), spec));
    return parse_sector(json_object_get(data, "sector"), spec);
}

tusfm_status *spec_parse(const json_t *data, model_spec *spec) {
    memset(spec, 0, sizeof *spec);
    spec->whole = data;
    return status_within(parse(data, spec), "the manifest's model cannot be read");
}

/* Whole numbers become such with a fraction, as Python keeps them. */
static int as_reals(json_t *array) {
    for (size_t i = 0; i < json_array_size(array); i++) {
        const json_t *value = json_array_get(array, i);
        if (json_is_integer(value) && json_array_set_new(array, i, json_real((double)json_integer_value(value)))) return 0;
    }
    return 1;
}

tusfm_status *spec_digest(const model_spec *spec, char sha256[65]) {
    static const char *const places[][2] = {{"exits", "entropy"}, {"anatomy", "size_mm"}, {"anatomy", "spacing_mm"},
                                            {"probe", "apex"},    {"probe", "radii"},     {"probe", "angles_deg"}};
    text compact = {0};
    json_t *copy = json_deep_copy(spec->whole);
    tusfm_status *failed = copy ? NULL : no_memory();
    for (size_t i = 0; !failed && i < sizeof places / sizeof *places; i++)
        if (!as_reals(json_object_get(json_object_get(copy, places[i][0]), places[i][1]))) failed = no_memory();
    if (!failed) failed = canonical_write(&compact, copy, 0, NULL);
    if (!failed) failed = sha256_hex(compact.bytes, compact.count, sha256);
    text_free(&compact);
    json_decref(copy);
    return failed;
}
