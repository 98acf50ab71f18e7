/* What a caller is told: an answer as tusfm_reading and tusfm_measurement. */
#include "drift_window.h"
#include "session.h"
#include "structs.h"

#include <stddef.h>
#include <string.h>

static void fill_ellipse(tusfm_measurement *out, const label_reading *label) {
    const tue_measurement *m = &label->measured;
    out->hc_px = m->hc_px, out->angle_deg = m->angle_deg, out->agreement = m->agreement;
    out->major_px = m->axes_px[0], out->minor_px = m->axes_px[1];
    out->centre_row = m->centre_px[0], out->centre_column = m->centre_px[1];
    if (label->has_spacing) out->hc_mm = m->hc_mm, out->major_mm = m->axes_mm[0], out->minor_mm = m->axes_mm[1];
}

static tusfm_measurement as_measurement(const label_reading *label) {
    tusfm_measurement out;
    const tue_measurement *m = &label->measured;
    tusfm_measurement_init(&out, sizeof out);
    out.label = label->name, out.has_ellipse = label->has_ellipse, out.trust = label->trust, out.reasons = label->reasons;
    if (!m->found) return out;
    out.found = 1;
    out.touches_border = m->touches_border, out.cut_by_sector = m->cut_by_sector, out.contour_points = m->contour_points;
    out.confidence = m->confidence, out.area_px = m->area_px;
    if (label->has_spacing) out.area_mm2 = m->area_mm2;
    memcpy(out.bounds_px, m->box_px, sizeof out.bounds_px);
    out.centroid_row = m->centroid_px[0], out.centroid_column = m->centroid_px[1];
    memcpy(out.contour_px, m->contour_px, sizeof out.contour_px);
    if (label->has_ellipse) fill_ellipse(&out, label);
    return out;
}

static void fill_first(tusfm_reading *out, const label_reading *label) {
    tusfm_measurement m = as_measurement(label);
    out->hc_mm = m.hc_mm, out->hc_px = m.hc_px, out->angle_deg = m.angle_deg, out->area_px = m.area_px;
    out->major_mm = m.major_mm, out->minor_mm = m.minor_mm, out->major_px = m.major_px, out->minor_px = m.minor_px;
    out->centre_row = m.centre_row, out->centre_column = m.centre_column;
    out->touches_border = m.touches_border, out->cut_by_sector = m.cut_by_sector;
    out->area_mm2 = m.area_mm2, out->agreement = m.agreement;
    memcpy(out->bounds_px, m.bounds_px, sizeof out->bounds_px);
    out->centroid_row = m.centroid_row, out->centroid_column = m.centroid_column;
}

static void fill_times(tusfm_reading *out, const tusfm_frame *frame, const timings *took) {
    out->seq = frame->seq, out->t_recv_ns = frame->t_recv_ns;
    if (frame->t_recv_ns != TUSFM_NO_TIME) out->age_ms = (double)(now_ns() - frame->t_recv_ns) / 1e6;
    out->preprocess_ms = took->preprocess_ms, out->infer_ms = took->infer_ms;
    out->postprocess_ms = took->postprocess_ms, out->total_ms = took->total_ms;
    out->second_pass_ms = took->second_pass_ms, out->drift_ms = took->drift_ms;
}

static void fill_place(tusfm_reading *out, const placement *place) {
    memcpy(out->crop, place->crop, sizeof out->crop);
    memcpy(out->box, place->box, sizeof out->box);
    out->frame_rows = place->frame_rows, out->frame_columns = place->frame_columns;
    if (place->has_spacing) out->spacing_row_mm = place->spacing_mm[0], out->spacing_column_mm = place->spacing_mm[1];
}

void reading_fill(tusfm_reading *out, const runner *r, const tusfm_frame *frame, const answer *made,
                  const placement *place, const timings *took, int32_t exit_index) {
    tusfm_reading_init(out, sizeof *out);
    out->valid = made->valid, out->verified = r->verified, out->degraded = r->index > 0, out->level = r->index;
    fill_times(out, frame, took);
    fill_place(out, place);
    if (made->has_mask) out->mask = made->mask, out->mask_rows = made->mask_rows, out->mask_columns = made->mask_columns;
    if (made->score_count) out->scores = made->scores, out->score_count = made->score_count;
    out->exit_index = exit_index;
    out->answered = 1;
    out->engine = r->description;
    out->trust = made->trust, out->reasons = made->reasons, out->confidence = made->confidence;
    out->second_pass = made->second_pass;
    const drift_reading *drift = &made->drift;
    out->drift = drift->status, out->strange = drift->strange, out->drift_kind = drift->by_features;
    out->drift_score = drift->score, out->drift_threshold = drift->threshold, out->strangest = drift->strangest;
    drift_window_alone(out);
    out->labels = &made->labels, out->label_count = made->labels.count;
    out->measured = made->labels.count > 0;
    out->found = made->score_count > 0;
    for (int32_t i = 0; i < made->labels.count; i++) out->found = out->found || made->labels.all[i].measured.found;
    if (made->labels.count) fill_first(out, &made->labels.all[0]);
}

tusfm_status *tusfm_get_measurement(const tusfm_reading *reading, int32_t index, tusfm_measurement *measurement) {
    TRY(struct_check(measurement, "the measurement"));
    if (!reading || reading->struct_size < offsetof(tusfm_reading, reserved_end) || !reading->labels || index < 0 ||
        index >= reading->labels->count)
        return status_new(TUSFM_INPUT, "the reading has no measured label %d", index);
    tusfm_measurement full = as_measurement(&reading->labels->all[index]);
    struct_give(measurement, &full, sizeof full);
    return NULL;
}
