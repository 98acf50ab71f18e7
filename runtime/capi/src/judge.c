#include "judge.h"

#include "exact.h"
#include "want.h"

#include <string.h>

/* The thresholds of a label, or NULL. */
static const json_t *rules_of(const model_spec *spec, const char *label) {
    const json_t *thresholds = json_object_get(spec->reading, "thresholds");
    for (size_t i = 0; label && i < json_array_size(thresholds); i++) {
        const json_t *rule = json_array_get(thresholds, i);
        if (strcmp(want_string(rule, "label"), label) == 0) return rule;
    }
    return NULL;
}

static double side(const json_t *pair, size_t at) { return json_number_value(json_array_get(pair, at)); }

static int inside(const json_t *pair, double value) { return side(pair, 0) <= value && value <= side(pair, 1); }

/* A size that the anatomy never has, and a spacing that its frames never have. */
static int32_t implausible(const label_reading *label, const model_spec *spec, const placement *place) {
    int32_t found = 0;
    if (!spec->anatomy || !place->has_spacing) return 0;
    double row = place->spacing_mm[0] * (double)place->box[2] / (double)place->crop[2];
    double column = place->spacing_mm[1] * (double)place->box[3] / (double)place->crop[3];
    double size = label->measured.hc_mm;
    if (spec->postprocess != POST_ELLIPSE_HC)
        size = tue_max(label->measured.box_px[2] * row, label->measured.box_px[3] * column);
    if (!inside(json_object_get(spec->anatomy, "size_mm"), size)) found |= TUSFM_ODD_SIZE;
    const json_t *limits = json_object_get(spec->anatomy, "spacing_mm");
    if (!inside(limits, row) || !inside(limits, column)) found |= TUSFM_ODD_SPACING;
    return found;
}

static int32_t state_of(int has_rules, int32_t reasons) {
    return !has_rules ? TUSFM_UNCHECKED : reasons ? TUSFM_DOUBTFUL : TUSFM_GOOD;
}

static void judge_label(label_reading *label, const model_spec *spec, const placement *place, int strange) {
    const json_t *rules = rules_of(spec, label->name);
    const tue_measurement *m = &label->measured;
    int32_t reasons = 0;
    label->reasons = 0;
    label->trust = rules ? TUSFM_NONE : TUSFM_UNCHECKED;
    if (!m->found) return;
    if (rules && !(m->confidence >= want_number(rules, "confidence"))) reasons |= TUSFM_LOW_CONFIDENCE;
    const json_t *agreement = json_object_get(rules, "agreement");
    double agrees = label->has_ellipse ? m->agreement : 0.0;
    if (json_is_number(agreement) && !(agrees >= json_number_value(agreement))) reasons |= TUSFM_LOW_AGREEMENT;
    if (m->touches_border) reasons |= m->cut_by_sector ? TUSFM_AT_SECTOR : TUSFM_AT_BORDER;
    reasons |= implausible(label, spec, place);
    if (strange) reasons |= TUSFM_STRANGE;
    label->reasons = reasons;
    label->trust = state_of(rules != NULL, reasons);
}

/* A classifier's top probability by the threshold of the class that has it. */
static void judge_scores(answer *made, const model_spec *spec, int strange) {
    size_t best = 0;
    for (int32_t i = 1; i < made->score_count; i++)
        if (made->scores[i] > made->scores[best]) best = (size_t)i;
    const json_t *rules = rules_of(spec, json_string_value(json_array_get(spec->labels, best)));
    made->reasons = rules && !(made->confidence >= want_number(rules, "confidence")) ? TUSFM_LOW_CONFIDENCE : 0;
    if (strange) made->reasons |= TUSFM_STRANGE;
    made->trust = state_of(rules != NULL, made->reasons);
}

void judge(answer *made, const model_spec *spec, const placement *place) {
    static const int32_t order[] = {TUSFM_DOUBTFUL, TUSFM_UNCHECKED, TUSFM_GOOD, TUSFM_NONE};
    int strange = made->drift.strange, seen[4] = {0};
    made->trust = TUSFM_UNCHECKED, made->reasons = 0;
    if (!made->valid) return;
    if (spec->task == TASK_CLASSIFY) {
        judge_scores(made, spec, strange);
        return;
    }
    for (int32_t i = 0; i < made->labels.count; i++) {
        label_reading *label = &made->labels.all[i];
        judge_label(label, spec, place, strange);
        made->reasons |= label->reasons;
        seen[label->trust] = 1;
    }
    for (int i = 0; i < 4; i++)
        if (seen[order[i]]) {
            made->trust = order[i];
            return;
        }
}
