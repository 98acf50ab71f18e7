/* The lists are those of tinyusfm_runtime/graphs/onnx_operators.py and ir_operators.py; a test holds them together.
 * Numbers of fields: onnx.proto. Nothing is allocated. */
#include "allowed.h"

#include <string.h>

static const char *const onnx_kinds =
    " Abs Add And ArgMax ArgMin AveragePool BatchNormalization Cast Ceil Clip Concat Constant Conv ConvInteger"
    " ConvTranspose DequantizeLinear Div DynamicQuantizeLinear Elu Equal Erf Exp Flatten Floor Gather Gelu Gemm"
    " GlobalAveragePool GlobalMaxPool Greater GreaterOrEqual GroupNormalization HardSigmoid HardSwish Identity"
    " InstanceNormalization LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax MatMul MatMulInteger Max"
    " MaxPool Min Mul Neg Not Or PRelu Pow QLinearConv QLinearMatMul QuantizeLinear Reciprocal ReduceL2 ReduceMax"
    " ReduceMean ReduceMin ReduceSum ReduceSumSquare Relu Reshape Resize Round Sigmoid Sign Slice Softmax Softplus"
    " Split Sqrt Squeeze Sub Tanh Transpose Unsqueeze Where ";
static const char *const ir_kinds =
    " Abs Add AvgPool BatchNormInference Broadcast Ceiling Clamp Concat Const Convert Convolution Divide Elu Equal Erf"
    " Exp FakeQuantize Floor Gather Gelu Greater GreaterEqual GroupConvolution HSigmoid HSwish Interpolate Less"
    " LessEqual Log LogSoftmax LogicalAnd LogicalNot LogicalOr MVN MatMul MaxPool Maximum Minimum Mish Multiply Negative"
    " NotEqual PRelu Parameter Power Range ReLU ReduceL2 ReduceMax ReduceMean ReduceMin ReduceSum Reshape Result Round"
    " Select ShapeOf Sigmoid Sign Slice SoftMax SoftPlus Split Sqrt SquaredDifference Squeeze Subtract Swish Tanh"
    " Transpose Unsqueeze VariadicSplit ";

enum { LONGEST = 40, VARINT = 0, FIXED64 = 1, LENGTH = 2, FIXED32 = 5 };

static int is_listed(const char *list, const uint8_t *name, size_t length) {
    char word[LONGEST + 3] = " ";
    if (length == 0 || length > LONGEST || memchr(name, 0, length) || memchr(name, ' ', length)) return 0;
    memcpy(word + 1, name, length);
    word[length + 1] = ' ';
    return strstr(list, word) != NULL;
}

/* ---- ONNX: protobuf, walked by its lengths ---- */

typedef struct span {
    const uint8_t *at, *end;
} span;

typedef struct field {
    uint32_t number, wire;
    uint64_t value; /* of a VARINT */
    span body;      /* of a LENGTH */
} field;

static int read_varint(span *s, uint64_t *value) {
    *value = 0;
    for (int shift = 0; shift < 64 && s->at < s->end; shift += 7) {
        uint8_t byte = *s->at++;
        *value |= (uint64_t)(byte & 0x7f) << shift;
        if (byte < 0x80) return 1;
    }
    return 0;
}

/* 1: a field; 0: the end; -1: broken. */
static int next_field(span *s, field *f) {
    uint64_t key, length;
    if (s->at == s->end) return 0;
    if (!read_varint(s, &key)) return -1;
    f->number = (uint32_t)(key >> 3), f->wire = (uint32_t)(key & 7);
    if (f->wire == VARINT) return read_varint(s, &f->value) ? 1 : -1;
    length = f->wire == FIXED64 ? 8 : 4;
    if (f->wire != FIXED64 && f->wire != FIXED32 && (f->wire != LENGTH || !read_varint(s, &length))) return -1;
    if (length > (uint64_t)(s->end - s->at)) return -1;
    f->body = (span){s->at, s->at + length};
    s->at += length;
    return 1;
}

static tusfm_status *refuse(const char *what) {
    return status_new(TUSFM_ENGINE, "the model holds %s, which no model of ours has: do not use it", what);
}

static tusfm_status *check_tensor(span tensor) {
    field f;
    int more;
    while ((more = next_field(&tensor, &f)) > 0)
        if (f.number == 13 || (f.number == 14 && f.value != 0)) return refuse("data outside its file");
    return more < 0 ? refuse("a broken tensor") : NULL;
}

static tusfm_status *check_attribute(span attribute) {
    field f;
    int more;
    while ((more = next_field(&attribute, &f)) > 0) {
        if (f.number == 6 || f.number == 11) return refuse("a graph inside an operator (control flow)");
        if (f.number == 22 || f.number == 23) return refuse("sparse tensors");
        if (f.number == 5 || f.number == 10) TRY(check_tensor(f.body));
    }
    return more < 0 ? refuse("a broken attribute") : NULL;
}

static tusfm_status *check_node(span node) {
    field f;
    int more, kinds = 0;
    while ((more = next_field(&node, &f)) > 0) {
        size_t length = f.wire == LENGTH ? (size_t)(f.body.end - f.body.at) : 0;
        if (f.number == 4) {
            kinds++;
            if (!is_listed(onnx_kinds, f.body.at, length)) return refuse("an operator of another kind");
        }
        if (f.number == 7 && length && !(length == 7 && memcmp(f.body.at, "ai.onnx", 7) == 0))
            return refuse("an operator of another domain");
        if (f.number == 5) TRY(check_attribute(f.body));
    }
    return more < 0 || kinds != 1 ? refuse("a broken operator") : NULL;
}

static tusfm_status *check_graph(span graph) {
    field f;
    int more;
    while ((more = next_field(&graph, &f)) > 0) {
        if (f.number == 15) return refuse("sparse weights");
        if (f.number == 1) TRY(check_node(f.body));
        if (f.number == 5) TRY(check_tensor(f.body));
    }
    return more < 0 ? refuse("a broken graph") : NULL;
}

tusfm_status *check_onnx(const engine_file *file) {
    span model = {file->data, file->data + file->size};
    field f;
    int more, graphs = 0;
    while ((more = next_field(&model, &f)) > 0) {
        if (f.number == 20 || f.number == 25) return refuse("functions or training");
        if (f.number != 7) continue;
        if (f.wire != LENGTH || graphs++) return refuse("several graphs");
        TRY(check_graph(f.body));
    }
    return more < 0 || graphs != 1 ? refuse("no graph that can be read") : NULL;
}

/* ---- OpenVINO IR: XML, of which only tags are looked at ---- */

static const uint8_t *find(const uint8_t *at, const uint8_t *end, const char *word) {
    size_t length = strlen(word);
    for (; (size_t)(end - at) >= length; at++)
        if (memcmp(at, word, length) == 0) return at;
    return NULL;
}

static tusfm_status *check_layer(const uint8_t *tag, const uint8_t *end) {
    const uint8_t *kind = find(tag, end, " type=\""), *close;
    if (!kind || find(kind + 1, end, " type=\"")) return refuse("a layer without a kind, or with two");
    kind += 7;
    close = memchr(kind, '"', (size_t)(end - kind));
    return close && is_listed(ir_kinds, kind, (size_t)(close - kind)) ? NULL : refuse("a layer of another kind");
}

tusfm_status *check_ir(const engine_file *file) {
    const uint8_t *at = file->data, *end = at + file->size;
    while (at < end && memchr(" \t\r\n", *at, 4)) at++;
    if (!(end - at > 5 && (memcmp(at, "<?xml", 5) == 0 || memcmp(at, "<net", 4) == 0)) || memchr(at, 0, (size_t)(end - at)))
        return status_new(TUSFM_ENGINE, "model.xml is not XML: do not use it");
    if (find(at, end, "<!")) return refuse("a document type, entities or comments");
    if (find(at, end, "<body") || find(at, end, "<port_map")) return refuse("a graph inside a layer (control flow)");
    int layers = 0;
    for (const uint8_t *tag = find(at, end, "<layer"); tag; tag = find(tag + 6, end, "<layer")) {
        if (tag + 6 < end && tag[6] == 's') continue; /* <layers> */
        const uint8_t *close = memchr(tag, '>', (size_t)(end - tag));
        if (!close) return refuse("a tag that does not end");
        TRY(check_layer(tag, close));
        layers++;
    }
    return layers ? NULL : refuse("no layers");
}
