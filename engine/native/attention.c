// Attention of one-token queries over the paged cache of a CPU: what GatherKernel does for decodes, without gathering.
//
// Plain loops, which the compiler turns into vector instructions. Each task is one sequence and one key/value head. It
// reads the keys and values once, some tokens at a time, and keeps for each query head that shares them the greatest
// score so far, the sum of the weights and the weighted sum of the values (the online softmax of FlashAttention).
//
// engine/native/library.py declares the same structures; engine/attention/cpu.py calls attend_decodes.

#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#pragma GCC target("avx2,fma")  // cpu.py asks whether the processor has them
#endif

#include <stdint.h>
#include <string.h>

#define TOKENS 16       // read at a time
#define HEADS 16        // query heads computed at a time; they and their sums are on the stack
#define LINE 64         // bytes of a cache line
#define LEAST -1e30f    // below every score
#define INLINE static inline __attribute__((always_inline))

// A layer's cache: keys and values, [kv_heads, blocks, block_size, head_dim]; head_stride counts elements.
typedef struct {
    const char *keys, *values;
    int64_t head_stride, kv_heads, head_dim, block_size, bfloat16;
} Cache;

// The sequences of a step: tables [rows, width] of their blocks, and how many tokens each attends to, [rows].
typedef struct {
    const int64_t *tables, *contexts;
    int64_t rows, width;
} Decodes;

INLINE float widen(uint16_t value) {
    uint32_t bits = (uint32_t)value << 16;
    float wide;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
}

// By its bits, since the compiler may reorder arithmetic as if there were no NaN.
INLINE int is_nan(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits & 0x7fffffff) > 0x7f800000;
}

INLINE uint16_t narrow(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    return is_nan(value) ? 0x7fc0 : (uint16_t)nearest;
}

INLINE void read_floats(float *to, const char *from, int64_t count, int bfloat16) {
    if (bfloat16)
        for (int64_t i = 0; i < count; i++) to[i] = widen(((const uint16_t *)from)[i]);
    else
        memcpy(to, from, count * sizeof *to);
}

// exp() with a relative error below 4e-6 (the polynomial of Cephes), which compilers can vectorise; NaN stays NaN.
INLINE float exponential(float x) {
    float bounded = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    int32_t power = (int32_t)(bounded * 1.44269504f + 128.5f) - 128;
    float rest = bounded - power * 0.693359375f + power * 2.12194440e-4f;
    float series = 1.9875691500e-4f;
    series = series * rest + 1.3981999507e-3f;
    series = series * rest + 8.3334519073e-3f;
    series = series * rest + 4.1665795894e-2f;
    series = series * rest + 1.6666665459e-1f;
    series = series * rest + 5.0000001201e-1f;
    series = series * rest * rest + rest + 1.0f;
    uint32_t bits;
    memcpy(&bits, &series, sizeof bits);
    bits += (uint32_t)power << 23;
    memcpy(&series, &bits, sizeof series);
    return is_nan(x) ? x : series;
}

// Attend with `group` queries [group, dim] to the tokens [begin, end) of a sequence; `cache` points to their head.
INLINE void attend(int bfloat16, int64_t dim, const Cache *cache, const int64_t *table, int64_t begin, int64_t end,
                   int64_t group, const char *query, char *out, float scale, float cap) {
    const int64_t size = bfloat16 ? 2 : 4;
    float queries[group][dim], sums[group][dim], greatest[group], total[group];
    float keys[TOKENS][dim], values[TOKENS][dim];
    read_floats(queries[0], query, group * dim, bfloat16);
    for (int64_t g = 0; g < group; g++) {
        greatest[g] = LEAST, total[g] = 0;
        for (int64_t d = 0; d < dim; d++) queries[g][d] *= scale, sums[g][d] = 0;
    }
    for (int64_t place = begin, next; place < end; place = next) {
        int64_t offset = place % cache->block_size, count = cache->block_size - offset;
        count = count < TOKENS ? count : TOKENS;
        count = count < end - place ? count : end - place;
        next = place + count;
        int64_t at = (table[place / cache->block_size] * cache->block_size + offset) * dim * size;
        if (next < end) {
            int64_t then = table[next / cache->block_size] * cache->block_size + next % cache->block_size;
            for (int64_t byte = then * dim * size; byte < (then + TOKENS) * dim * size; byte += LINE) {
                __builtin_prefetch(cache->keys + byte);
                __builtin_prefetch(cache->values + byte);
            }
        }
        read_floats(keys[0], cache->keys + at, count * dim, bfloat16);
        read_floats(values[0], cache->values + at, count * dim, bfloat16);
        for (int64_t g = 0; g < group; g++) {
            float weights[TOKENS], most = greatest[g];
            for (int64_t t = 0; t < count; t++) {
                float score = 0;
                for (int64_t d = 0; d < dim; d++) score += queries[g][d] * keys[t][d];
                // cap * tanh(score / cap)
                weights[t] = cap > 0 ? cap - 2 * cap / (exponential(score * (2 / cap)) + 1) : score;
            }
            for (int64_t t = count; t < TOKENS; t++) weights[t] = LEAST;
            for (int64_t t = 0; t < TOKENS; t++) most = weights[t] > most ? weights[t] : most;
            if (most > greatest[g]) {
                float shrink = exponential(greatest[g] - most);
                greatest[g] = most, total[g] *= shrink;
                for (int64_t d = 0; d < dim; d++) sums[g][d] *= shrink;
            }
            for (int64_t t = 0; t < TOKENS; t++) weights[t] = exponential(weights[t] - most);
            for (int64_t t = 0; t < count; t++) {
                total[g] += weights[t];
                for (int64_t d = 0; d < dim; d++) sums[g][d] += weights[t] * values[t][d];
            }
        }
    }
    for (int64_t g = 0; g < group; g++)
        for (int64_t d = 0; d < dim; d++) {
            float mean = sums[g][d] / total[g];
            if (bfloat16)
                ((uint16_t *)out)[g * dim + d] = narrow(mean);
            else
                ((float *)out)[g * dim + d] = mean;
        }
}

// Attend with queries [rows, heads, head_dim], of which a row's first element is query_stride elements after the last
// one's, in threads of torch's pool. The result is out, [rows, heads, head_dim]. window, softcap: 0 for none.
void attend_decodes(const Cache *cache, const Decodes *step, const char *query, int64_t query_stride, int64_t heads,
                    char *out, float scale, int64_t window, float softcap, int64_t threads) {
    const int64_t dim = cache->head_dim, group = heads / cache->kv_heads, size = cache->bfloat16 ? 2 : 4;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(dynamic, 1)
    for (int64_t task = 0; task < step->rows * cache->kv_heads; task++) {
        int64_t row = task / cache->kv_heads, head = task % cache->kv_heads, end = step->contexts[row];
        int64_t begin = window > 0 && window < end ? end - window : 0;
        Cache part = *cache;
        part.keys += head * cache->head_stride * size;
        part.values += head * cache->head_stride * size;
        const int64_t *table = step->tables + row * step->width;
        for (int64_t first = 0; first < group; first += HEADS) {
            const int64_t some = group - first < HEADS ? group - first : HEADS;
            const char *from = query + (row * query_stride + (head * group + first) * dim) * size;
            char *to = out + (row * heads + head * group + first) * dim * size;
            // Constants let the compiler unroll the inner loops.
            if (cache->bfloat16)
                switch (dim) {
                    case 64: attend(1, 64, &part, table, begin, end, some, from, to, scale, softcap); break;
                    case 128: attend(1, 128, &part, table, begin, end, some, from, to, scale, softcap); break;
                    default: attend(1, dim, &part, table, begin, end, some, from, to, scale, softcap);
                }
            else
                switch (dim) {
                    case 64: attend(0, 64, &part, table, begin, end, some, from, to, scale, softcap); break;
                    case 128: attend(0, 128, &part, table, begin, end, some, from, to, scale, softcap); break;
                    default: attend(0, dim, &part, table, begin, end, some, from, to, scale, softcap);
                }
        }
    }
}
