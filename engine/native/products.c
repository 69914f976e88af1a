// Products of few rows with a matrix in bfloat16 or 8 bits, as in the linear layers of a decode step: what oneDNN computes,
// faster.
//
// A step of so few rows takes as long as reading the weights, if the processor computes while it reads. oneDNN reads and
// computes by turns. Here the next part of the weights is fetched while several rows are multiplied by the last one.
//
// A group is the 4 bytes of a row that one instruction multiplies: 2 elements in bfloat16, 4 in 8 bits. Weights are stored
// as oneDNN stores them, [columns / BLOCK, groups, BLOCK, elements of a group]. engine/packed_linear.py checks that, and
// calls this where the processor has the instructions.

#if defined(__x86_64__) && (defined(__clang__) || __GNUC__ >= 10)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16,avx512vnni")))
#define BLOCK 64      // columns computed at a time, in four registers a row
#define TILE_ROWS 6   // rows computed at a time: 24 of 32 registers hold their sums
#define GROUPS 64     // read at a time: 16 KiB of weights, which stay in the first cache for all rows
#define GROUP_BYTES 4 // of a row
#define MOST_ROWS 64
#define LINE 64       // bytes of a cache line

// Keeps the compiler from combining operations: results in 8 bits are bit for bit those of more rows, from oneDNN and torch.
#define ROUNDED(value) __asm__("" : "+v"(value))

#define MULTIPLY_BFLOAT16(sum, weight, row)                                                                            \
    _mm512_castps_si512(_mm512_dpbf16_ps(_mm512_castsi512_ps(sum), (__m512bh)(weight), (__m512bh)(row)))
#define MULTIPLY_INT8(sum, weight, row) _mm512_dpbusd_epi32(sum, row, weight)

// Add the products of ROWS rows and of so many groups of weights to sums [ROWS, BLOCK] of 4 bytes each. A row is `stride`
// bytes after the one before. Before each group, `step` bytes from `ahead` on are fetched into the cache.
#define DEFINE_TILE(NAME, ROWS, MULTIPLY)                                                                              \
    TARGET static void NAME(const char *rows, int64_t stride, const char *weights, int64_t groups, char *sums,         \
                            const char *ahead, int64_t step) {                                                         \
        __m512i sum[ROWS][4];                                                                                          \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++)                                                         \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) sum[r][v] =                                            \
                _mm512_loadu_si512(sums + (r * 4 + v) * LINE);                                                         \
        for (int64_t group = 0; group < groups; group++) {                                                             \
            __m512i weight[4];                                                                                         \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) weight[v] =                                            \
                _mm512_loadu_si512(weights + (group * 4 + v) * LINE);                                                  \
            for (const char *end = ahead + step; ahead < end; ahead += LINE) _mm_prefetch(ahead, _MM_HINT_T0);         \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                   \
                int32_t bits;                                                                                          \
                memcpy(&bits, rows + r * stride + group * GROUP_BYTES, sizeof bits);                                   \
                const __m512i row = _mm512_set1_epi32(bits);                                                           \
                _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) sum[r][v] = MULTIPLY(sum[r][v], weight[v], row);   \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++)                                                         \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++)                                                        \
                _mm512_storeu_si512(sums + (r * 4 + v) * LINE, sum[r][v]);                                             \
    }

#define DEFINE_TILES(NAME, MULTIPLY)                                                                                   \
    DEFINE_TILE(NAME##_1, 1, MULTIPLY)                                                                                 \
    DEFINE_TILE(NAME##_2, 2, MULTIPLY)                                                                                 \
    DEFINE_TILE(NAME##_3, 3, MULTIPLY)                                                                                 \
    DEFINE_TILE(NAME##_4, 4, MULTIPLY)                                                                                 \
    DEFINE_TILE(NAME##_5, 5, MULTIPLY)                                                                                 \
    DEFINE_TILE(NAME##_6, 6, MULTIPLY)                                                                                 \
    static Tile *const NAME[] = {0, NAME##_1, NAME##_2, NAME##_3, NAME##_4, NAME##_5, NAME##_6};

typedef void Tile(const char *, int64_t, const char *, int64_t, char *, const char *, int64_t);
DEFINE_TILES(bfloat16_tiles, MULTIPLY_BFLOAT16)
DEFINE_TILES(int8_tiles, MULTIPLY_INT8)

// Compute sums [rows, BLOCK] of a block's columns over groups [first, last). rows [rows, groups] and weights [groups, BLOCK]
// are groups.
static void sum_groups(Tile *const *tiles, const char *in, int64_t rows, int64_t groups, int64_t first, int64_t last,
                       const char *weights, char *sums) {
    const int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    // The first tiles fetch what is read next. A single tile reads in order, which the processor foresees.
    const int64_t step = count >= 4 ? LINE : count >= 2 ? 2 * LINE : 0;
    last = last < groups ? last : groups;
    memset(sums, 0, rows * BLOCK * 4);
    for (int64_t group = first; group < last; group += GROUPS) {
        const int64_t some = last - group < GROUPS ? last - group : GROUPS;
        const char *read = weights + group * BLOCK * GROUP_BYTES, *next = read + some * BLOCK * GROUP_BYTES;
        for (int64_t tile = 0; tile < count; tile++) {
            const int64_t top = rows * tile / count, height = rows * (tile + 1) / count - top;
            tiles[height](in + (top * groups + group) * GROUP_BYTES, groups * GROUP_BYTES, read, some,
                          sums + top * BLOCK * 4, next + tile * some * step, tile < 4 ? step : 0);
        }
    }
}

TARGET static inline __m512 read_bfloat16(const uint16_t *from) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)from));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
}

TARGET static inline void write_bfloat16(uint16_t *to, __m512 values) {
    _mm256_storeu_si256((__m256i *)to, (__m256i)_mm512_cvtneps_pbh(values));
}

// Compute out [rows, columns] = in [rows, inner] * weights + bias [columns], all in bfloat16, on so many threads of torch's
// pool. rows: at most MOST_ROWS. columns: a multiple of BLOCK. bias may be 0.
//
// part: the products of so many elements are added up before they are added to the sum, which decides how it is rounded. A
// multiple of 2 * GROUPS.
TARGET void multiply_bfloat16(const char *in, int64_t rows, int64_t inner, const char *weights, const uint16_t *bias,
                              uint16_t *out, int64_t columns, int64_t part, int64_t threads) {
    const int64_t groups = inner / 2;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < columns / BLOCK; block++) {
        float sums[MOST_ROWS * BLOCK] __attribute__((aligned(LINE))), parts[MOST_ROWS * BLOCK] __attribute__((aligned(LINE)));
        const char *from = weights + block * groups * BLOCK * GROUP_BYTES;
        sum_groups(bfloat16_tiles, in, rows, groups, 0, part / 2, from, (char *)sums);
        for (int64_t group = part / 2; group < groups; group += part / 2) {
            sum_groups(bfloat16_tiles, in, rows, groups, group, group + part / 2, from, (char *)parts);
            for (int64_t at = 0; at < rows * BLOCK; at += 16)
                _mm512_store_ps(sums + at, _mm512_add_ps(_mm512_load_ps(sums + at), _mm512_load_ps(parts + at)));
        }
        for (int64_t row = 0; row < rows; row++)
            for (int64_t at = 0; at < BLOCK; at += 16) {
                __m512 sum = _mm512_load_ps(sums + row * BLOCK + at);
                if (bias) sum = _mm512_add_ps(sum, read_bfloat16(bias + block * BLOCK + at));
                write_bfloat16(out + row * columns + block * BLOCK + at, sum);
            }
    }
}

// Round each row of in [rows, inner], bfloat16 or float32, to 8 bits: out [rows, inner], in which 128 stands for 0, and
// scales [rows], by which the row was divided. inner: a multiple of 16.
TARGET void round_rows(const char *in, int64_t rows, int64_t inner, int64_t bfloat16, uint8_t *out, float *scales) {
#define READ(at)                                                                                                       \
    (bfloat16 ? read_bfloat16((const uint16_t *)in + row * inner + (at))                                               \
              : _mm512_loadu_ps((const float *)in + row * inner + (at)))
    for (int64_t row = 0; row < rows; row++) {
        __m512 largest = _mm512_setzero_ps();
        __mmask16 invalid = 0;
        for (int64_t at = 0; at < inner; at += 16) {
            const __m512 values = READ(at);
            invalid |= _mm512_cmp_ps_mask(values, values, _CMP_UNORD_Q);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(values));
        }
        float scale = _mm512_reduce_max_ps(largest) / 127;
        scale = scale < 0x1p-126f ? 0x1p-126f : scale;
        const uint32_t nan = 0x7fc00000;
        if (invalid) memcpy(&scale, &nan, sizeof scale); // so that the whole row becomes NaN
        scales[row] = scale;
        for (int64_t at = 0; at < inner; at += 16) {
            const __m512i rounded = _mm512_cvtps_epi32(_mm512_div_ps(READ(at), _mm512_set1_ps(scale)));
            const __m512i shifted = _mm512_add_epi32(rounded, _mm512_set1_epi32(128));
            _mm_storeu_si128((__m128i *)(out + row * inner + at), _mm512_cvtepi32_epi8(shifted));
        }
    }
#undef READ
}

// Compute out [rows, columns], bfloat16 or float32, from what round_rows gave, as multiply_bfloat16 does.
//
// column_scales: [columns]. shifts: [columns]: the sum of a column's weights, negated. bias: [columns] of out's type, or 0.
TARGET void multiply_int8(const char *in, const float *row_scales, int64_t rows, int64_t inner, const char *weights,
                          const float *column_scales, const int32_t *shifts, const char *bias, char *out, int64_t columns,
                          int64_t bfloat16, int64_t threads) {
    const int64_t groups = inner / 4;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < columns / BLOCK; block++) {
        int32_t sums[MOST_ROWS * BLOCK] __attribute__((aligned(LINE)));
        sum_groups(int8_tiles, in, rows, groups, 0, groups, weights + block * groups * BLOCK * GROUP_BYTES, (char *)sums);
        for (int64_t row = 0; row < rows; row++)
            for (int64_t at = 0; at < BLOCK; at += 16) {
                const int64_t column = block * BLOCK + at;
                __m512i sum = _mm512_load_si512(sums + row * BLOCK + at);
                sum = _mm512_add_epi32(sum, _mm512_slli_epi32(_mm512_loadu_si512(shifts + column), 7));
                __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(column_scales + column));
                ROUNDED(value);
                value = _mm512_mul_ps(value, _mm512_set1_ps(row_scales[row]));
                ROUNDED(value);
                if (bias)
                    value = _mm512_add_ps(value, bfloat16 ? read_bfloat16((const uint16_t *)bias + column)
                                                          : _mm512_loadu_ps((const float *)bias + column));
                if (bfloat16)
                    write_bfloat16((uint16_t *)out + row * columns + column, value);
                else
                    _mm512_storeu_ps((float *)out + row * columns + column, value);
            }
    }
}

#endif
