// Products of few rows with a matrix of bfloat16, as in the linear layers of a decode step: what oneDNN computes, faster.
//
// A step of so few rows takes as long as reading the weights, if the processor computes while it reads. oneDNN reads and
// computes by turns. Here the next part of the weights is fetched while several rows are multiplied by the last one.
//
// engine/packed_linear.py calls this where the processor has the instructions, and weights are stored as follows.

#if defined(__x86_64__)

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#define TARGET __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define BLOCK 64    // columns computed at a time, in four registers a row
#define TILE_ROWS 6 // rows computed at a time: 24 of 32 registers hold their sums
#define PAIRS 64    // read at a time: 16 KiB of weights, which stay in the first cache for all rows
#define MOST_ROWS 64
#define LINE 64     // bytes of a cache line

// Add the products of `rows` rows and `pairs` pairs of weights to sums [rows, BLOCK]. A row is `inner` elements after the
// one before. weights: [pairs, BLOCK, 2]. Before each pair `step` bytes from `ahead` on are fetched into the cache.
#define DEFINE_TILE(ROWS)                                                                                              \
    TARGET static void tile_##ROWS(const uint16_t *rows, int64_t inner, const uint16_t *weights, int64_t pairs,        \
                                   float *sums, const char *ahead, int64_t step) {                                     \
        __m512 sum[ROWS][4];                                                                                           \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++)                                                         \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) sum[r][v] = _mm512_loadu_ps(sums + r * BLOCK + v * 16);\
        for (int64_t pair = 0; pair < pairs; pair++) {                                                                 \
            const __m512i *from = (const __m512i *)(weights + pair * BLOCK * 2);                                       \
            __m512bh weight[4];                                                                                        \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) weight[v] = (__m512bh)_mm512_loadu_si512(from + v);    \
            for (const char *end = ahead + step; ahead < end; ahead += LINE) _mm_prefetch(ahead, _MM_HINT_T0);         \
            _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++) {                                                   \
                int32_t two;                                                                                           \
                memcpy(&two, rows + r * inner + pair * 2, sizeof two);                                                 \
                __m512bh row = (__m512bh)_mm512_set1_epi32(two);                                                       \
                _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++)                                                    \
                    sum[r][v] = _mm512_dpbf16_ps(sum[r][v], weight[v], row);                                           \
            }                                                                                                          \
        }                                                                                                              \
        _Pragma("GCC unroll 6") for (int r = 0; r < ROWS; r++)                                                         \
            _Pragma("GCC unroll 4") for (int v = 0; v < 4; v++) _mm512_storeu_ps(sums + r * BLOCK + v * 16, sum[r][v]);\
    }

DEFINE_TILE(1)
DEFINE_TILE(2)
DEFINE_TILE(3)
DEFINE_TILE(4)
DEFINE_TILE(5)
DEFINE_TILE(6)

static void (*const tiles[])(const uint16_t *, int64_t, const uint16_t *, int64_t, float *, const char *, int64_t) = {
    0, tile_1, tile_2, tile_3, tile_4, tile_5, tile_6};

// Compute out [rows, columns] = in [rows, inner] * weights + bias, rounded to bfloat16, on so many threads of torch's pool.
//
// rows: at most MOST_ROWS. weights: [columns / BLOCK, inner / 2, BLOCK, 2], as oneDNN stores them. bias: [columns]; may
// be 0. inner is even, columns a multiple of BLOCK.
TARGET void multiply_bfloat16(const uint16_t *in, int64_t rows, int64_t inner, const uint16_t *weights,
                              const uint16_t *bias, uint16_t *out, int64_t columns, int64_t threads) {
    const int64_t count = (rows + TILE_ROWS - 1) / TILE_ROWS;
    // The first tiles of a part fetch the next part. A single tile reads in order, which the processor foresees.
    const int64_t step = count >= 4 ? LINE : count >= 2 ? 2 * LINE : 0;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (int64_t block = 0; block < columns / BLOCK; block++) {
        float sums[MOST_ROWS * BLOCK] __attribute__((aligned(LINE)));
        memset(sums, 0, rows * BLOCK * sizeof *sums);
        for (int64_t pair = 0; pair < inner / 2; pair += PAIRS) {
            const int64_t pairs = inner / 2 - pair < PAIRS ? inner / 2 - pair : PAIRS;
            const uint16_t *part = weights + (block * inner / 2 + pair) * BLOCK * 2;
            const char *next = (const char *)(part + pairs * BLOCK * 2);
            for (int64_t tile = 0; tile < count; tile++) {
                const int64_t first = rows * tile / count, some = rows * (tile + 1) / count - first;
                tiles[some](in + first * inner + pair * 2, inner, part, pairs, sums + first * BLOCK,
                            next + tile * pairs * step, tile < 4 ? step : 0);
            }
        }
        for (int64_t row = 0; row < rows; row++)
            for (int v = 0; v < BLOCK / 16; v++) {
                const int64_t column = block * BLOCK + v * 16;
                __m512 sum = _mm512_load_ps(sums + row * BLOCK + v * 16);
                if (bias) {
                    __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)(bias + column)));
                    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
                }
                _mm256_storeu_si256((__m256i *)(out + row * columns + column), (__m256i)_mm512_cvtneps_pbh(sum));
            }
    }
}

#endif
