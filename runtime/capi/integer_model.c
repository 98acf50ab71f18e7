/* Reads a table of tensors as a model. Nothing in the table is believed. */
#include "integer_model.h"

#include <stdio.h>
#include <stdlib.h>

static const size_t element_bytes[] = {1, 1, 2, 4, 8, 4};

/* A role of a kind's tensors: where the operation keeps it, its type, and whether its first axis is the outputs. */
enum role_target {
    ROLE_WEIGHT,
    ROLE_BIAS,
    ROLE_SHIFT,
    ROLE_FACTOR,
    ROLE_TABLE,
    ROLE_WORDS,
    ROLE_CONSTANTS,
    ROLE_LEFT,
    ROLE_RIGHT,
    ROLE_OUT,
    ROLE_ROWS_FIRST,
    ROLE_ROWS_SHARE,
    ROLE_COLUMNS_FIRST,
    ROLE_COLUMNS_SHARE,
    ROLE_FACTOR32,
    ROLE_INDEX,
    ROLE_BLANK
};

typedef struct wanted_tensor {
    const char *role;
    int32_t target, dtype, dims;
    int64_t shape[3];
} wanted_tensor;

static int32_t say(char *text, size_t bytes, const char *what) {
    if (text && bytes) snprintf(text, bytes, "%s: export the bundle again", what);
    return TUE_INT_BAD_MODEL;
}

static int32_t is_sound(const tue_int_tensor *t) {
    if (!t->name || (!t->data && t->bytes) || t->dims < 0 || t->dims > TUE_INT_MAX_DIMS) return 0;
    if (t->dtype < TUE_INT_U8 || t->dtype > TUE_INT_I64) return 0;
    size_t elements = 1;
    for (int32_t i = 0; i < t->dims; i++) {
        if (t->shape[i] < 0 || t->shape[i] > (1 << 26)) return 0;
        elements *= (size_t)t->shape[i];
        if (elements > (size_t)1 << 26) return 0;
    }
    return elements * element_bytes[t->dtype] == t->bytes;
}

/* Looks from `*at` on, and leaves there where the name was found: an operation's tensors lie next to each other. */
static const tue_int_tensor *find_from(const tue_int_tensor *tensors, size_t count, const char *name, size_t *at) {
    for (size_t i = 0; i < count; i++, *at = *at + 1 < count ? *at + 1 : 0)
        if (strcmp(tensors[*at].name, name) == 0) return &tensors[*at];
    return NULL;
}

static const tue_int_tensor *find(const tue_int_tensor *tensors, size_t count, const char *name) {
    size_t at = 0;
    return find_from(tensors, count, name, &at);
}

/* A table of int32 of that many rows and columns, copied, so that its place in memory does not matter. */
static int32_t *table_of(const tue_int_tensor *tensors, size_t count, const char *name, int64_t rows, int64_t columns) {
    const tue_int_tensor *t = find(tensors, count, name);
    int32_t dims = columns ? 2 : 1;
    if (!t || t->dtype != TUE_INT_I32 || t->dims != dims || t->shape[0] != rows) return NULL;
    if (columns && t->shape[1] != columns) return NULL;
    int32_t *copy = malloc(t->bytes ? t->bytes : 1);
    if (copy) memcpy(copy, t->data, t->bytes);
    return copy;
}

static int32_t read_buffers(const tue_int_tensor *tensors, size_t count, tue_int_model *m) {
    int32_t *rows = table_of(tensors, count, "buffers", m->buffer_count, 3), good = rows != NULL;
    for (int32_t i = 0; good && i < m->buffer_count; i++) {
        int32_t dtype = rows[3 * i], height = rows[3 * i + 1], width = rows[3 * i + 2];
        good = (dtype == TUE_INT_U8 || dtype == TUE_INT_I16 || dtype == TUE_INT_I32 || dtype == TUE_INT_F32) &&
               height >= 1 && width >= 1 && (int64_t)height * width <= (1 << 26);
        m->buffers[i].dtype = dtype, m->buffers[i].rows = height, m->buffers[i].columns = width;
    }
    free(rows);
    return good;
}

static int32_t is_plain(const char *name, size_t size) {
    for (size_t i = 0; i < size; i++) {
        char c = name[i];
        if (!((c >= 'a' && c <= 'z') || (c >= 'A' && c <= 'Z') || (c >= '0' && c <= '9') || c == '_' || c == '.'))
            return 0;
    }
    return size > 0 && size < TUE_NAME_BYTES;
}

/* The next line of the names, or 0 where there is none that can be used. */
static int32_t take_name(const char **at, const char *end, char name[TUE_NAME_BYTES]) {
    const char *stop = *at;
    while (stop < end && *stop != '\n') stop++;
    size_t size = (size_t)(stop - *at);
    if (!is_plain(*at, size)) return 0;
    memcpy(name, *at, size);
    name[size] = 0;
    *at = stop < end ? stop + 1 : end;
    return 1;
}

static int32_t read_ports(const tue_int_tensor *tensors, size_t count, tue_int_model *m) {
    const tue_int_tensor *names = find(tensors, count, "names");
    if (!names || names->dtype != TUE_INT_U8 || names->dims != 1 || names->bytes > 4096) return 0;
    const char *at = names->data, *end = at + names->bytes;
    int32_t *rows = table_of(tensors, count, "ports", m->port_count, 6), good = rows != NULL;
    for (int32_t i = 0; good && i < m->port_count; i++) {
        tue_int_named_port *p = &m->ports[i];
        const int32_t *row = rows + 6 * i;
        good = take_name(&at, end, p->name) && row[1] >= 1 && row[1] <= 4 &&
               (row[0] == TUE_INT_F32 || (i == 0 && row[0] == TUE_INT_U8));
        p->port.name = p->name, p->port.dtype = row[0], p->port.dims = row[1], p->port.elements = 1;
        for (int32_t a = 0; good && a < row[1]; a++) {
            good = row[2 + a] >= 1 && row[2 + a] <= (1 << 26);
            p->port.shape[a] = row[2 + a];
            p->port.elements *= (size_t)p->port.shape[a];
            good = good && p->port.elements <= (size_t)1 << 26;
        }
        for (int32_t j = 0; good && j < i; j++) good = strcmp(m->ports[j].name, p->name) != 0;
    }
    free(rows);
    return good && at == end && (names->bytes == 0 || ((const char *)names->data)[names->bytes - 1] != '\n');
}

#define CHANNELS(o)                                                                  \
    {"bias", ROLE_BIAS, TUE_INT_I32, 1, {o}}, {"shift", ROLE_SHIFT, TUE_INT_I8, 1, {o}}, \
        {"factor", ROLE_FACTOR, TUE_INT_I16, 1, {o}}

/* The tensors that an operation has to have; returns how many. */
static int32_t list_wanted(const tue_int_op *op, const tue_int_model *m, wanted_tensor out[5]) {
    const tue_int_buffer *source = &m->buffers[op->source], *target = &m->buffers[op->target];
    int64_t in = source->columns, o = target->columns, heads = op->f[0];
    wanted_tensor layer[] = {CHANNELS(o), {"weight", ROLE_WEIGHT, TUE_INT_I8, 2, {o, in}},
                             {"table", ROLE_TABLE, TUE_INT_U8, 1, {256}}};
    wanted_tensor window[] = {CHANNELS(o), {"weight", ROLE_WEIGHT, TUE_INT_I8, 3, {o, 9, in}}};
    wanted_tensor single[] = {CHANNELS(o), {"weight", ROLE_WEIGHT, TUE_INT_I8, 2, {o, 9}}};
    wanted_tensor norm[] = {{"constants", ROLE_CONSTANTS, TUE_INT_I64, 1, {2}},
                            {"factor", ROLE_FACTOR, TUE_INT_I16, 1, {in}}};
    wanted_tensor head[] = {{"left", ROLE_LEFT, TUE_INT_I8, 1, {heads}},
                            {"right", ROLE_RIGHT, TUE_INT_I8, 1, {heads}},
                            {"factor", ROLE_FACTOR, TUE_INT_I16, 1, {heads}},
                            {"out", ROLE_OUT, TUE_INT_I16, 1, {heads}}};
    wanted_tensor axes[] = {{"rows_first", ROLE_ROWS_FIRST, TUE_INT_I32, 1, {op->f[2]}},
                            {"rows_share", ROLE_ROWS_SHARE, TUE_INT_I16, 1, {op->f[2]}},
                            {"columns_first", ROLE_COLUMNS_FIRST, TUE_INT_I32, 1, {op->f[3]}},
                            {"columns_share", ROLE_COLUMNS_SHARE, TUE_INT_I16, 1, {op->f[3]}}};
    wanted_tensor fill[] = {{"table", ROLE_WORDS, TUE_INT_I16, 2, {target->rows, o}}};
    wanted_tensor affine[] = {{"factor", ROLE_FACTOR32, TUE_INT_I32, 1, {in}}, {"bias", ROLE_BIAS, TUE_INT_I32, 1, {in}}};
    wanted_tensor gather[] = {{"index", ROLE_INDEX, TUE_INT_I32, 1, {target->rows}},
                              {"blank", ROLE_BLANK, TUE_INT_I32, 1, {o}}};
    const wanted_tensor *from = NULL;
    int32_t count = 0;
    switch (op->kind) {
        case TUE_LINEAR: from = layer, count = op->f[6] == 1 ? 5 : 4; break;
        case TUE_CONVOLUTION: from = window, count = 4; break;
        case TUE_DEPTHWISE: from = single, count = 4; break;
        case TUE_NORM: from = norm, count = op->f[2] == TUE_MODE_CODES ? 2 : 1; break;
        case TUE_ATTENTION: from = head, count = 4; break;
        case TUE_RESIZE: from = axes, count = 4; break;
        case TUE_FILL: from = fill, count = 1; break;
        case TUE_AFFINE: from = affine, count = 2; break;
        case TUE_GATHER: from = gather, count = op->f[0] == 1 ? 2 : 1; break;
        default: break;
    }
    if (from) memcpy(out, from, (size_t)count * sizeof *out);
    return count;
}

static void set_role(tue_int_op *op, int32_t target, const void *data) {
    switch (target) {
        case ROLE_WEIGHT: op->weight = data; break;
        case ROLE_BIAS: op->bias = data; break;
        case ROLE_SHIFT: op->shift = data; break;
        case ROLE_FACTOR: op->factor = data; break;
        case ROLE_TABLE: op->table = data; break;
        case ROLE_WORDS: op->words = data; break;
        case ROLE_CONSTANTS: op->constants = data; break;
        case ROLE_LEFT: op->left = data; break;
        case ROLE_RIGHT: op->right = data; break;
        case ROLE_OUT: op->out = data; break;
        case ROLE_ROWS_FIRST: op->first[0] = data; break;
        case ROLE_ROWS_SHARE: op->share[0] = data; break;
        case ROLE_COLUMNS_FIRST: op->first[1] = data; break;
        case ROLE_COLUMNS_SHARE: op->share[1] = data; break;
        case ROLE_FACTOR32: op->factor32 = data; break;
        case ROLE_INDEX: op->index = data; break;
        case ROLE_BLANK: op->blank = data; break;
        default: break;
    }
}

/* Finds an operation's tensors; `used` counts them, `at` is where the next copy goes (NULL: only counting bytes). */
static int32_t bind(const tue_int_tensor *tensors, size_t count, tue_int_model *m, int32_t number, size_t *used,
                    uint8_t **at, size_t *bytes) {
    tue_int_op *op = &m->ops[number];
    wanted_tensor wanted[5];
    int32_t total = list_wanted(op, m, wanted);
    size_t place = 0;
    for (int32_t i = 0; i < total; i++) {
        char name[32];
        snprintf(name, sizeof name, "%d.%s", (int)number, wanted[i].role);
        const tue_int_tensor *t = find_from(tensors, count, name, &place);
        if (!t || t->dtype != wanted[i].dtype || t->dims != wanted[i].dims) return 0;
        for (int32_t a = 0; a < t->dims; a++)
            if (t->shape[a] != wanted[i].shape[a]) return 0;
        (*used)++;
        if (wanted[i].target == ROLE_WEIGHT) { /* packed from where it lies */
            op->weight = t->data;
            continue;
        }
        size_t size = (t->bytes + 63) & ~(size_t)63;
        *bytes += size;
        if (*at) {
            memcpy(*at, t->data, t->bytes);
            set_role(op, wanted[i].target, *at);
            *at += size;
        }
    }
    op->source_type = m->buffers[op->source].dtype;
    op->outputs = m->buffers[op->target].columns;
    op->inputs = m->buffers[op->source].columns * (op->kind == TUE_CONVOLUTION ? 9 : 1);
    if (op->kind == TUE_DEPTHWISE) op->inputs = 9;
    return 1;
}

static const int32_t field_counts[TUE_KINDS] = {
    [TUE_PATCHES] = 1, [TUE_TOKENS] = 1, [TUE_LINEAR] = 7, [TUE_NORM] = 5,  [TUE_ATTENTION] = 5,
    [TUE_CONVOLUTION] = 4, [TUE_DEPTHWISE] = 4, [TUE_RESIZE] = 6, [TUE_HALVE] = 3, [TUE_CODES] = 3,
    [TUE_MEAN] = 6, [TUE_PEAK] = 1, [TUE_SUM] = 2, [TUE_OUTPUT] = 3, [TUE_GATHER] = 1};

static int32_t read_ops(const tue_int_tensor *tensors, size_t count, tue_int_model *m) {
    int32_t *rows = table_of(tensors, count, "operations", m->op_count, 12), good = rows != NULL;
    for (int32_t i = 0; good && i < m->op_count; i++) {
        const int32_t *row = rows + 12 * i;
        tue_int_op *op = &m->ops[i];
        op->kind = row[0], op->source = row[1], op->target = row[2];
        memcpy(op->f, row + 3, sizeof op->f);
        good = op->kind >= TUE_PATCHES && op->kind < TUE_KINDS && op->source >= 0 && op->source < m->buffer_count &&
               op->target >= 0 && op->target < m->buffer_count;
        for (int32_t j = good ? field_counts[op->kind] : 9; j < 9; j++) good = good && op->f[j] == 0;
    }
    free(rows);
    return good;
}

static int32_t bind_all(const tue_int_tensor *tensors, size_t count, tue_int_model *m) {
    size_t used = 5, bytes = 0, again = 0;
    uint8_t *at = NULL;
    for (int32_t i = 0; i < m->op_count; i++)
        if (!bind(tensors, count, m, i, &used, &at, &bytes)) return TUE_INT_BAD_MODEL;
    if (used != count) return TUE_INT_BAD_MODEL;
    m->constants = at = malloc(bytes ? bytes + 64 : 64);
    if (!at) return TUE_INT_NO_MEMORY;
    at += (64 - (uintptr_t)at % 64) % 64;
    for (int32_t i = 0; i < m->op_count; i++) bind(tensors, count, m, i, &used, &at, &again);
    return TUE_INT_OK;
}

static int32_t check_all(tue_int_model *m, char *text, size_t text_bytes) {
    uint8_t written[TUE_MAX_PORTS] = {0};
    char line[160];
    for (int32_t i = 0; i < m->op_count; i++) {
        const char *wrong = tue_int_check(&m->ops[i], m);
        if (!wrong && m->ops[i].kind == TUE_OUTPUT && written[m->ops[i].f[0]]++) wrong = "its output is written twice";
        if (wrong) {
            snprintf(line, sizeof line, "operation %d of the integer model: %s", (int)i, wrong);
            return say(text, text_bytes, line);
        }
    }
    for (int32_t i = 1; i < m->port_count; i++)
        if (!written[i]) return say(text, text_bytes, "the integer model does not write each of its outputs");
    size_t elements = (size_t)m->buffers[0].rows * (size_t)m->buffers[0].columns;
    if (m->buffers[0].dtype != m->ports[0].port.dtype || elements != m->ports[0].port.elements)
        return say(text, text_bytes, "the integer model's input does not fit its first buffer");
    return TUE_INT_OK;
}

/* No more memory and products than a model of this family needs (model_file.py). */
static int is_affordable(const tue_int_model *m) {
    static const int64_t item[] = {1, 1, 2, 4, 8, 4};
    int64_t bytes = 0, products = 0;
    for (int32_t i = 0; i < m->buffer_count; i++)
        bytes += (int64_t)m->buffers[i].rows * m->buffers[i].columns * item[m->buffers[i].dtype];
    for (int32_t i = 0; i < m->op_count; i++) {
        const tue_int_op *op = &m->ops[i];
        const tue_int_buffer *from = &m->buffers[op->source], *to = &m->buffers[op->target];
        int64_t each = op->weight ? op->inputs : 1;
        if (op->kind == TUE_ATTENTION) each = 2 * (int64_t)from->rows;
        int64_t out = (int64_t)to->rows * to->columns, in = (int64_t)from->rows * from->columns;
        if (out > ((int64_t)1 << 38) / (each > 0 ? each : 1)) return 0;
        products += out * each > in ? out * each : in;
    }
    return bytes <= ((int64_t)1 << 28) && products <= ((int64_t)1 << 38);
}

int32_t tue_int_read_model(const tue_int_tensor *tensors, size_t count, tue_int_model *m, char *text,
                           size_t text_bytes) {
    for (size_t i = 0; i < count; i++)
        if (!is_sound(&tensors[i])) return say(text, text_bytes, "a tensor's bytes do not fit its shape");
    int32_t *head = table_of(tensors, count, "model", 4, 0);
    if (!head) return say(text, text_bytes, "this is no integer model");
    int32_t version = head[0];
    m->buffer_count = head[1], m->op_count = head[2], m->port_count = head[3];
    free(head);
    if (version != TUE_INT_VERSION) return say(text, text_bytes, "the integer model is of another version");
    if (m->buffer_count < 1 || m->buffer_count > TUE_MAX_BUFFERS || m->op_count < 1 || m->op_count > TUE_MAX_OPS ||
        m->port_count < 2 || m->port_count > TUE_MAX_PORTS)
        return say(text, text_bytes, "the integer model's counts are out of range");
    m->buffers = calloc((size_t)m->buffer_count, sizeof *m->buffers);
    m->ops = calloc((size_t)m->op_count, sizeof *m->ops);
    m->ports = calloc((size_t)m->port_count, sizeof *m->ports);
    if (!m->buffers || !m->ops || !m->ports) return TUE_INT_NO_MEMORY;
    if (!read_buffers(tensors, count, m)) return say(text, text_bytes, "the integer model's buffers are not usable");
    if (!read_ports(tensors, count, m)) return say(text, text_bytes, "the integer model's ports are not usable");
    if (!read_ops(tensors, count, m)) return say(text, text_bytes, "the integer model's operations are not usable");
    int32_t status = bind_all(tensors, count, m);
    if (status == TUE_INT_BAD_MODEL)
        return say(text, text_bytes, "the integer model's tensors are not those its operations need");
    if (!status && !is_affordable(m)) return say(text, text_bytes, "the integer model takes more memory or time than any of ours");
    return status ? status : check_all(m, text, text_bytes);
}

void tue_int_free_model(tue_int_model *m) {
    free(m->buffers), free(m->ops), free(m->ports), free(m->constants);
    memset(m, 0, sizeof *m);
}
