// Products and exponentials of small float32 tiles, in the vector registers of the CPU at hand.
//
// Written with the vector extension of GCC and Clang: one source for AVX2, AVX-512 and NEON, which
// the compiler turns into fused multiply-adds.

#pragma once

#include <cmath>
#include <cstdint>

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

// Rows and vectors of a product that is summed in registers: enough sums to hide the latency of an
// addition, few enough for 16 registers.
constexpr int ROWS = 6;
constexpr int VECTORS = 2;

constexpr float LN_2 = 0.69314718055994530942f;

typedef float Vector __attribute__((vector_size(4 * WIDTH)));
typedef float Unaligned __attribute__((vector_size(4 * WIDTH), aligned(4), may_alias));
typedef int32_t Bits __attribute__((vector_size(4 * WIDTH)));

static inline Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
static inline void store(float* to, Vector x) { *reinterpret_cast<Unaligned*>(to) = x; }
static inline Vector fill(float x) { return Vector{} + x; }
static inline Vector maximum(Vector a, Vector b) { return a > b ? a : b; }

static inline float add_up(Vector x) {
    float sum = 0.0f;
    for (int i = 0; i < WIDTH; ++i) sum += x[i];
    return sum;
}

static inline float find_largest(Vector x) {
    float most = x[0];
    for (int i = 1; i < WIDTH; ++i) most = most > x[i] ? most : x[i];
    return most;
}

// 2 ** x for x <= 127, within two units in the last place; 0 below 2 ** -126, and NaN for NaN.
//
// The whole part goes into the exponent; the rest, at most a half, through its Taylor polynomial.
static inline Vector raise_two(Vector x) {
    // Added to a float, this leaves its whole part in the low bits.
    const Vector rounder = fill(12582912.0f);
    const Bits vanishes = x < fill(-126.0f);
    x = vanishes ? fill(-126.0f) : x;
    const Vector rounded = x + rounder;
    const Vector rest = x - (rounded - rounder);
    Vector power = rest * 1.5403530393381610e-4f + 1.3333558146428443e-3f;
    power = power * rest + 9.6181291076284772e-3f;
    power = power * rest + 5.5504108664821580e-2f;
    power = power * rest + 2.4022650695910071e-1f;
    power = power * rest + 6.9314718055994531e-1f;
    power = power * rest + 1.0f;
    // Between vectors of one size, a cast keeps the bits.
    const Bits scaled = (Bits)power + ((Bits)rounded << 23);
    return vanishes ? Vector{} : (Vector)scaled;
}

// c[R, V * WIDTH] = a[R, depth] b[depth, V * WIDTH], added to what is there if ADD.
template <int R, int V, bool ADD>
static inline void multiply_tile(const float* a, long stride_a, const float* b, long stride_b,
                                 float* c, long stride_c, int depth) {
    Vector sum[R][V];
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < V; ++j) sum[r][j] = ADD ? load(c + r * stride_c + j * WIDTH) : Vector{};
    for (int k = 0; k < depth; ++k) {
        Vector row[V];
        for (int j = 0; j < V; ++j) row[j] = load(b + k * stride_b + j * WIDTH);
        for (int r = 0; r < R; ++r)
            for (int j = 0; j < V; ++j) sum[r][j] += a[r * stride_a + k] * row[j];
    }
    for (int r = 0; r < R; ++r)
        for (int j = 0; j < V; ++j) store(c + r * stride_c + j * WIDTH, sum[r][j]);
}

template <int V, bool ADD>
static void multiply_rows(int rows, const float* a, long stride_a, const float* b, long stride_b,
                          float* c, long stride_c, int depth) {
    int r = 0;
    for (; r + ROWS <= rows; r += ROWS)
        multiply_tile<ROWS, V, ADD>(a + r * stride_a, stride_a, b, stride_b, c + r * stride_c,
                                    stride_c, depth);
    for (; r + 4 <= rows; r += 4)
        multiply_tile<4, V, ADD>(a + r * stride_a, stride_a, b, stride_b, c + r * stride_c,
                                 stride_c, depth);
    for (; r < rows; ++r)
        multiply_tile<1, V, ADD>(a + r * stride_a, stride_a, b, stride_b, c + r * stride_c,
                                 stride_c, depth);
}

// c[rows, columns] (+)= a[rows, depth] b[depth, columns]; columns are a multiple of WIDTH.
template <bool ADD>
static void multiply(int rows, int columns, int depth, const float* a, long stride_a,
                     const float* b, long stride_b, float* c, long stride_c) {
    int j = 0;
    for (; j + VECTORS * WIDTH <= columns; j += VECTORS * WIDTH)
        multiply_rows<VECTORS, ADD>(rows, a, stride_a, b + j, stride_b, c + j, stride_c, depth);
    for (; j < columns; j += WIDTH)
        multiply_rows<1, ADD>(rows, a, stride_a, b + j, stride_b, c + j, stride_c, depth);
}
