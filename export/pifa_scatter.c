/* PifaScatter for onnxruntime on CPUs: y[..., j] = [y_p, y_n][..., order[j]] in float64, float32 and float16.

   The onnxruntime wheels ship no header. What is declared here is the part of its C API (versions 17 on) that is
   used: functions are reached by their place in its table, which never changes, as the table only grows. */

#include <stddef.h>
#include <stdint.h>
#include <string.h>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#define API_VERSION 17
#define EXPORT __attribute__((visibility("default")))

typedef struct Status Status;
typedef struct Value Value;
typedef struct Shape Shape;
typedef struct Context Context;
typedef struct Options Options;
typedef struct Domain Domain;

enum { FLOAT = 1, INT64 = 7, FLOAT16 = 10, DOUBLE = 11, INVALID_ARGUMENT = 2 };

typedef void *const *Api;

typedef struct {
    Api (*get_api)(uint32_t version);
    const char *(*version)(void);
} ApiBase;

#define AT(slot, result, ...) ((result(*)(__VA_ARGS__))api[slot])
#define CREATE_STATUS AT(0, Status *, int, const char *)
#define CREATE_DOMAIN AT(26, Status *, const char *, Domain **)
#define DOMAIN_ADD AT(27, Status *, Domain *, const void *)
#define ADD_DOMAIN AT(28, Status *, Options *, Domain *)
#define TENSOR_DATA AT(51, Status *, Value *, void **)
#define ELEMENT_TYPE AT(60, Status *, const Shape *, int *)
#define DIMENSION_COUNT AT(61, Status *, const Shape *, size_t *)
#define DIMENSIONS AT(62, Status *, const Shape *, int64_t *, size_t)
#define TENSOR_SHAPE AT(65, Status *, const Value *, Shape **)
#define INPUT AT(90, Status *, const Context *, size_t, const Value **)
#define OUTPUT AT(91, Status *, Context *, size_t, const int64_t *, size_t, Value **)
#define RELEASE_SHAPE AT(99, void, Shape *)
#define PARALLEL_FOR AT(274, Status *, const Context *, void (*)(void *, size_t), size_t, size_t, void *)

#define TRY(call)                    \
    do {                             \
        Status *status_ = (call);    \
        if (status_) return status_; \
    } while (0)

enum { MOST_DIMENSIONS = 16 };

/* What to copy. */
typedef struct {
    const char *y_p, *y_n;
    char *y;
    const int64_t *order;
    int64_t rows, rows_a_block, rank, out;
    size_t size; /* bytes an element */
    int merges;  /* both parts keep their own order: what AVX-512 expands in one pass */
} Job;

/* The fallback: one element after the other, whatever the order. */
#define SCATTER_ROW(type, name)                                                                                   \
    static void name(const type *y_p, const type *y_n, type *y, const int64_t *order, int64_t rank, int64_t out) { \
        for (int64_t j = 0; j < out; j++) y[j] = order[j] < rank ? y_p[order[j]] : y_n[order[j] - rank];           \
    }
SCATTER_ROW(uint64_t, scatter_row_64)
SCATTER_ROW(uint32_t, scatter_row_32)
SCATTER_ROW(uint16_t, scatter_row_16)

#if defined(__AVX512F__)
/* Both parts are read front to back: each output takes the next element of the one or of the other. */
static void merge_row_32(const uint32_t *y_p, const uint32_t *y_n, uint32_t *y, const int64_t *order, int64_t rank,
                         int64_t out) {
    const __m512i limit = _mm512_set1_epi64(rank);
    int64_t j = 0;
    for (; j + 16 <= out; j += 16) {
        const __mmask16 pivot = (__mmask16)(_mm512_cmplt_epi64_mask(_mm512_loadu_si512(order + j), limit) |
                                            _mm512_cmplt_epi64_mask(_mm512_loadu_si512(order + j + 8), limit) << 8);
        const __m512i others = _mm512_maskz_expandloadu_epi32((__mmask16)~pivot, y_n);
        _mm512_storeu_si512(y + j, _mm512_mask_expandloadu_epi32(others, pivot, y_p));
        const int taken = __builtin_popcount(pivot);
        y_p += taken, y_n += 16 - taken;
    }
    for (; j < out; j++) y[j] = order[j] < rank ? *y_p++ : *y_n++;
}
#endif

#if defined(__AVX512VBMI2__)
static void merge_row_16(const uint16_t *y_p, const uint16_t *y_n, uint16_t *y, const int64_t *order, int64_t rank,
                         int64_t out) {
    const __m512i limit = _mm512_set1_epi64(rank);
    int64_t j = 0;
    for (; j + 32 <= out; j += 32) {
        __mmask32 pivot = 0;
        for (int part = 0; part < 4; part++) {
            const __m512i places = _mm512_loadu_si512(order + j + 8 * part);
            pivot |= (__mmask32)_mm512_cmplt_epi64_mask(places, limit) << 8 * part;
        }
        const __m512i others = _mm512_maskz_expandloadu_epi16(~pivot, y_n);
        _mm512_storeu_si512(y + j, _mm512_mask_expandloadu_epi16(others, pivot, y_p));
        const int taken = __builtin_popcount(pivot);
        y_p += taken, y_n += 32 - taken;
    }
    for (; j < out; j++) y[j] = order[j] < rank ? *y_p++ : *y_n++;
}
#endif

static void scatter_row(const Job *job, int64_t row) {
    const void *y_p = job->y_p + row * job->rank * (int64_t)job->size;
    const void *y_n = job->y_n + row * (job->out - job->rank) * (int64_t)job->size;
    void *y = job->y + row * job->out * (int64_t)job->size;
    if (job->size == 8) {
        scatter_row_64(y_p, y_n, y, job->order, job->rank, job->out);
    } else if (job->size == 4) {
#if defined(__AVX512F__)
        if (job->merges) {
            merge_row_32(y_p, y_n, y, job->order, job->rank, job->out);
            return;
        }
#endif
        scatter_row_32(y_p, y_n, y, job->order, job->rank, job->out);
    } else {
#if defined(__AVX512VBMI2__)
        if (job->merges) {
            merge_row_16(y_p, y_n, y, job->order, job->rank, job->out);
            return;
        }
#endif
        scatter_row_16(y_p, y_n, y, job->order, job->rank, job->out);
    }
}

static void scatter_block(void *job_, size_t block) {
    const Job *job = job_;
    const int64_t first = (int64_t)block * job->rows_a_block, end = first + job->rows_a_block;
    for (int64_t row = first; row < (end < job->rows ? end : job->rows); row++) scatter_row(job, row);
}

/* Refuses an order that would read outside of its row; sets `merges`. */
static int check_order(Job *job) {
    int64_t next_pivot = 0, next_other = job->rank;
    job->merges = 1;
    for (int64_t j = 0; j < job->out; j++) {
        const int64_t place = job->order[j];
        if (place < 0 || place >= job->out) return 0;
        if (place < job->rank ? place != next_pivot++ : place != next_other++) job->merges = 0;
    }
    return 1;
}

typedef struct {
    Api api;
    const void *data;
    int64_t dims[MOST_DIMENSIONS];
    size_t count;
    int type;
} Tensor;

static Status *read_shape(Api api, const Shape *shape, Tensor *tensor) {
    TRY(ELEMENT_TYPE(shape, &tensor->type));
    TRY(DIMENSION_COUNT(shape, &tensor->count));
    if (tensor->count > MOST_DIMENSIONS) return CREATE_STATUS(INVALID_ARGUMENT, "PifaScatter: more than 16 dimensions");
    return DIMENSIONS(shape, tensor->dims, tensor->count);
}

static Status *read_tensor(Api api, const Context *context, size_t index, Tensor *tensor) {
    const Value *value = NULL;
    Shape *shape = NULL;
    TRY(INPUT(context, index, &value));
    if (!value) return CREATE_STATUS(INVALID_ARGUMENT, "PifaScatter: an input is missing; it takes y_p, y_n, order");
    TRY(TENSOR_SHAPE(value, &shape));
    Status *status = read_shape(api, shape, tensor);
    RELEASE_SHAPE(shape);
    if (status) return status;
    return TENSOR_DATA((Value *)value, (void **)&tensor->data);
}

static Status *compute(void *kernel, Context *context) {
    const Api api = kernel;
    Tensor y_p, y_n, order;
    TRY(read_tensor(api, context, 0, &y_p));
    TRY(read_tensor(api, context, 1, &y_n));
    TRY(read_tensor(api, context, 2, &order));
    const size_t last = y_p.count - 1;
    if (y_p.count < 1 || y_n.count != y_p.count || memcmp(y_p.dims, y_n.dims, last * sizeof *y_p.dims) ||
        order.count != 1 || order.dims[0] != y_p.dims[last] + y_n.dims[last])
        return CREATE_STATUS(INVALID_ARGUMENT, "PifaScatter: y_p [..., r], y_n [..., n] and order [r + n] do not fit");
    Job job = {.y_p = y_p.data, .y_n = y_n.data, .order = order.data, .rows = 1, .rank = y_p.dims[last]};
    job.out = order.dims[0];
    job.size = y_p.type == DOUBLE ? 8 : y_p.type == FLOAT ? 4 : 2;
    if (!check_order(&job)) return CREATE_STATUS(INVALID_ARGUMENT, "PifaScatter: order names a row that is not there");
    for (size_t i = 0; i < last; i++) job.rows *= y_p.dims[i];

    Value *value = NULL;
    y_p.dims[last] = job.out;
    TRY(OUTPUT(context, 0, y_p.dims, y_p.count, &value));
    TRY(TENSOR_DATA(value, (void **)&job.y));
    job.rows_a_block = 1 + 65536 / (job.out * (int64_t)job.size + 1); /* less is not worth handing to a thread */
    const int64_t blocks = (job.rows + job.rows_a_block - 1) / job.rows_a_block;
    if (blocks > 1) return PARALLEL_FOR(context, scatter_block, (size_t)blocks, 0, &job);
    if (blocks == 1) scatter_block(&job, 0);
    return NULL;
}

/* The operator as onnxruntime wants it described: a table of callbacks. The first argument of most is the table. */
typedef struct Op Op;
struct Op {
    uint32_t version;
    void *(*create_kernel)(const Op *, Api, const void *info);
    const char *(*name)(const Op *);
    const char *(*provider)(const Op *);
    int (*input_type)(const Op *, size_t);
    size_t (*input_count)(const Op *);
    int (*output_type)(const Op *, size_t);
    size_t (*output_count)(const Op *);
    void (*compute_v1)(void *, Context *);
    void (*destroy)(void *);
    int (*input_characteristic)(const Op *, size_t);
    int (*output_characteristic)(const Op *, size_t);
    int (*input_memory)(const Op *, size_t);
    int (*variadic_input_arity)(const Op *);
    int (*variadic_input_homogeneity)(const Op *);
    int (*variadic_output_arity)(const Op *);
    int (*variadic_output_homogeneity)(const Op *);
    Status *(*create_kernel_v2)(const Op *, Api, const void *info, void **kernel);
    Status *(*compute)(void *, Context *);
    Status *(*infer_shape)(const Op *, void *);
    int (*start_version)(const Op *);
    int (*end_version)(const Op *);
    size_t (*may_inplace)(int **, int **);
    void (*release_may_inplace)(int *, int *);
    size_t (*alias_map)(int **, int **);
    void (*release_alias_map)(int *, int *);
    int element_type; /* our own, behind what onnxruntime reads */
};

static const char *op_name(const Op *op) { return (void)op, "PifaScatter"; }
static const char *op_provider(const Op *op) { return (void)op, "CPUExecutionProvider"; }
static size_t op_input_count(const Op *op) { return (void)op, 3; }
static size_t op_output_count(const Op *op) { return (void)op, 1; }
static int op_input_type(const Op *op, size_t index) { return index == 2 ? INT64 : op->element_type; }
static int op_output_type(const Op *op, size_t index) { return (void)index, op->element_type; }
static int op_required(const Op *op, size_t index) { return (void)op, (void)index, 0; }
static int op_memory(const Op *op, size_t index) { return (void)op, (void)index, 0; }
static int op_one(const Op *op) { return (void)op, 1; }
static int op_last_version(const Op *op) { return (void)op, INT32_MAX; }
static void op_destroy(void *kernel) { (void)kernel; }

static Status *op_create(const Op *op, Api api, const void *info, void **kernel) {
    (void)op, (void)info;
    *kernel = (void *)api; /* a kernel has no state of its own */
    return NULL;
}

#define OP(type)                                                                                               \
    {                                                                                                          \
        .version = API_VERSION, .name = op_name, .provider = op_provider, .input_type = op_input_type,         \
        .input_count = op_input_count, .output_type = op_output_type, .output_count = op_output_count,         \
        .destroy = op_destroy, .input_characteristic = op_required, .output_characteristic = op_required,      \
        .input_memory = op_memory, .variadic_input_arity = op_one, .variadic_input_homogeneity = op_one,       \
        .variadic_output_arity = op_one, .variadic_output_homogeneity = op_one, .create_kernel_v2 = op_create, \
        .compute = compute, .start_version = op_one, .end_version = op_last_version, .element_type = type      \
    }

static const Op OPS[] = {OP(DOUBLE), OP(FLOAT), OP(FLOAT16)};

EXPORT Status *RegisterCustomOps(Options *options, const ApiBase *base) {
    const Api api = base->get_api(API_VERSION);
    if (!api) return NULL; /* older than 1.17: it says so itself, and the model's functions run */
    static Domain *domain = NULL; /* the library's own, for as long as the process lives: sessions refer to it */
    if (!domain) {
        Domain *fresh = NULL;
        TRY(CREATE_DOMAIN("ai.pifa", &fresh));
        for (size_t i = 0; i < sizeof OPS / sizeof *OPS; i++) TRY(DOMAIN_ADD(fresh, &OPS[i]));
        domain = fresh;
    }
    return ADD_DOMAIN(options, domain);
}
