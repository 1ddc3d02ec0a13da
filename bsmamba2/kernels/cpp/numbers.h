// Numbers and matrix products of the native kernel: sixteen floats at a time, 2^x, SiLU, and the operands of oneDNN's small
// products, as PyTorch has them (`brgemm`): with AMX or AVX-512 units where there are any.
//
// Every loop is a function that is not inlined (`NOINLINE`): the compiler runs short of registers when it sees them together.

#pragma once

#include <ATen/native/CPUBlas.h>
#include <c10/util/BFloat16.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define NOINLINE __attribute__((noinline))

namespace {

using at::BFloat16;
using at::Tensor;
using at::native::cpublas::brgemm;

constexpr int64_t GROUP = 256;  // columns of a product, whole heads: its operands then stay in the cache
constexpr double MIDDLE = 60;   // M: factors from 2⁻⁶⁰ to 2⁶⁰ leave a float as much to spare
constexpr double SPAN = 2 * MIDDLE;
constexpr float FAR = 100;  // octaves of decay beyond which all is forgotten; numbers much smaller are slow ones

int64_t padded(int64_t count, int64_t to = 32) { return (count + to - 1) / to * to; }

template <typename To, typename From>
inline To bits(From from) {
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

// --- numbers ----------------------------------------------------------------------------------------------
// Sixteen at a time, in float: one register of AVX-512, two of AVX2, four of NEON. All widths are multiples of that.

constexpr int64_t LANES = 16;
using Wide = float __attribute__((vector_size(4 * LANES)));
using Words = uint32_t __attribute__((vector_size(4 * LANES)));
using Halves = uint16_t __attribute__((vector_size(2 * LANES)));

inline Wide load(const float* from) {
    Wide x;
    std::memcpy(&x, from, sizeof x);
    return x;
}

inline void store(Wide x, float* to) { std::memcpy(to, &x, sizeof x); }

inline Words rounded(Wide x) { return Words(x) + 0x8000; }  // to the nearest bfloat16, in the upper half of each word

// What becomes of a number in a product in T.
template <typename T>
inline Wide as(Wide x) {
    if constexpr (std::is_same_v<T, float>) return x;
    else return Wide(rounded(x) & 0xffff0000u);
}

// bfloat16 is the upper half of a float. Compilers take detours with these two.
inline Wide load(const BFloat16* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
#ifdef __AVX512F__
    return Wide(_mm512_slli_epi32(_mm512_cvtepu16_epi32(__m256i(halves)), 16));
#else
    return Wide(__builtin_convertvector(halves, Words) << 16);
#endif
}

inline void store(Wide x, BFloat16* to) {
#ifdef __AVX512BF16__
    const auto halves = _mm512_cvtneps_pbh(__m512(x));
#else
    const Halves halves = __builtin_convertvector(rounded(x) >> 16, Halves);
#endif
    std::memcpy(to, &halves, sizeof halves);
}

// 2^x for |x| ≤ 126, to 2e-7. Added to 1.5 · 2²³, a float is rounded to whole octaves, which then stand in its lowest
// bits, and are added to the exponent; the rest of x goes into the series of e^(x ln 2).
constexpr float LOW_BITS = 12582912;

template <typename Number, typename Word>
inline Number power_of_two(Number octaves_in_low_bits, Number state_decay_grad) {
    Number series = state_decay_grad * 1.5403530e-4f + 1.3333558e-3f;
    series = series * state_decay_grad + 9.6181291e-3f;
    series = series * state_decay_grad + 5.5504109e-2f;
    series = series * state_decay_grad + 2.4022651e-1f;
    series = series * state_decay_grad + 6.9314718e-1f;
    series = series * state_decay_grad + 1.f;
    return bits<Number>(bits<Word>(series) + (bits<Word>(octaves_in_low_bits) << 23));
}

inline float exp2_of(double x) {
    x = x < 126 ? x : 126;
    x = x < -126 ? -126 : x;
    const float octaves = float(x) + LOW_BITS;
    return power_of_two<float, uint32_t>(octaves, float(x - double(octaves - LOW_BITS)));
}

inline Wide exp2_of(Wide x) {
    x = x < 126.f ? x : Wide{} + 126.f;
    x = x > -126.f ? x : Wide{} - 126.f;
    const Wide octaves = x + LOW_BITS;
    return power_of_two<Wide, Words>(octaves, x - (octaves - LOW_BITS));
}

inline double total(Wide x) {
    double sum = 0;
    for (int64_t k = 0; k < LANES; ++k) sum += x[k];
    return sum;
}

// 1 / x for x from 2⁻¹²⁶ to 2¹²⁶, to 2e-7: a division takes three times as long.
inline Wide inverse(Wide x) {
#ifdef __AVX512F__
    const Wide near = Wide(_mm512_rcp14_ps(__m512(x)));
    return near * (2.f - x * near);
#else
    return 1.f / x;
#endif
}

inline Wide sigmoid(Wide x) { return inverse(exp2_of(x * -1.44269504f) + 1.f); }

inline Wide silu(Wide x) { return x * sigmoid(x); }

// The derivative of SiLU at x, from σ(x).
inline Wide silu_slope(Wide x, Wide open) { return open * (1.f + x * (1.f - open)); }

// --- operands of products ---------------------------------------------------------------------------------
// The right factor of a bfloat16 product has pairs of its rows interleaved: row k of column j at [k / 2][j][k % 2].

inline void multiply(
    int64_t M, int64_t N, int64_t K, const float* A, int64_t a, const float* B, int64_t b, float* C, int64_t c, bool add) {
    brgemm(M, N, K, a, b, c, add, A, B, C, false);
}

inline void multiply(
    int64_t M, int64_t N, int64_t K, const BFloat16* A, int64_t a, const BFloat16* B, int64_t b, float* C, int64_t c,
    bool add) {
    brgemm(M, N, K, a, b, c, add, A, B, C, true);
}

// Rows 2k and 2k + 1, each times a factor, as one row of pairs.
template <typename In>
inline void pair(const In* even, const In* odd, float u, float v, BFloat16* to, int64_t columns) {
    for (int64_t c = 0; c < columns; c += LANES) {
        const Words words = (rounded(load(even + c) * u) >> 16) | (rounded(load(odd + c) * v) & 0xffff0000u);
        std::memcpy(to + 2 * c, &words, sizeof words);
    }
}

// Rows of floats as a factor of a product in T.
template <typename T>
struct Factor {
    const T* data;
    int64_t row;
};

inline Factor<float> left(const float* from, int64_t row, int64_t, int64_t, std::vector<float>&) { return {from, row}; }
inline Factor<float> right(const float* from, int64_t row, int64_t, int64_t, std::vector<float>&) { return {from, row}; }

NOINLINE inline Factor<BFloat16> left(
    const float* from, int64_t row, int64_t rows, int64_t columns, std::vector<BFloat16>& buffer) {
    for (int64_t i = 0; i < rows; ++i)
        for (int64_t c = 0; c < columns; c += LANES) store(load(from + i * row + c), &buffer[i * columns + c]);
    return {buffer.data(), columns};
}

NOINLINE inline Factor<BFloat16> right(
    const float* from, int64_t row, int64_t rows, int64_t columns, std::vector<BFloat16>& buffer) {
    for (int64_t i = 0; i < rows; i += 2) pair(from + i * row, from + (i + 1) * row, 1.f, 1.f, &buffer[i * columns], columns);
    return {buffer.data(), columns};
}

template <typename T>
inline void multiply(
    int64_t M, int64_t N, int64_t K, Factor<T> A, Factor<T> B, float* C, int64_t c, bool add) {
    multiply(M, N, K, A.data, A.row, B.data, B.row, C, c, add);
}

// (rows, columns) → (columns, rows), multiples of 16.
NOINLINE inline void transposed(const float* from, int64_t row, int64_t rows, int64_t columns, float* to, int64_t to_row) {
    for (int64_t i = 0; i < rows; i += LANES)
        for (int64_t c = 0; c < columns; ++c) {
            Wide column;
            for (int64_t k = 0; k < LANES; ++k) column[k] = from[(i + k) * row + c];
            store(column, to + c * to_row + i);
        }
}

struct Sizes {
    int64_t b, t, h, p, n, q, taps;
    int64_t inner() const { return h * p; }
    int64_t width() const { return inner() + 2 * n; }
};

}  // namespace
