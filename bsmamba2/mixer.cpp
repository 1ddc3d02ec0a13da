// What a Mamba-2 mixer does between its two projections, on a CPU, without gradients: convolution, scan and gate of one
// sequence after the other, chunk by chunk, in buffers that stay in a core's cache.
//
//     xBC → causal conv, SiLU → x, B, C      y = scan(x, dt, A, B, C, D)      y · SiLU(z) / rms
//
// Each of convolution and gate may be absent; the scan alone is the function of `bsmamba2.ssd`, which has the formulas.
// Besides, the RMS norm of a frame.
// A thread takes whole sequences. The matrix products are oneDNN's small ones, as PyTorch has them (`brgemm`): with AMX or
// AVX-512 units where there are any. Built when first wanted, by `bsmamba2.native`.
//
// Every loop is a function that is not inlined (`APART`): the compiler runs short of registers when it sees them together.
//
// Letters as in `bsmamba2.config` (b sequences, t frames, h heads, p head width, n state) and `bsmamba2.ssd`: q frames of
// a chunk, r_i sum of dt·A until frame i in octaves, R at the end, S the state. Within a chunk
//
//     y_i = Σ_{j<i} 2^{r_i − r_j} G_ij dt_j x_j + (G_ii dt_i + D) x_i + 2^{r_i} C_i S,    G = C Bᵀ
//
// and 2^{r_i − r_j} = 2^{r_i + M} · 2^{−M − r_j}, so that one product with G serves all heads whose decays span less than
// 2M octaves in the chunk. For a head that forgets faster, the decays go into a matrix of its own. The state is kept times
// 2^{−M}, where it needs no factor but that of the rows.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/native/CPUBlas.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#define APART __attribute__((noinline))

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
inline Number power_of_two(Number octaves_in_low_bits, Number rest) {
    Number series = rest * 1.5403530e-4f + 1.3333558e-3f;
    series = series * rest + 9.6181291e-3f;
    series = series * rest + 5.5504109e-2f;
    series = series * rest + 2.4022651e-1f;
    series = series * rest + 6.9314718e-1f;
    series = series * rest + 1.f;
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

inline Wide silu(Wide x) { return x / (exp2_of(x * -1.44269504f) + 1.f); }

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

struct Sizes {
    int64_t b, t, h, p, n, q, taps;
    int64_t inner() const { return h * p; }
    int64_t width() const { return inner() + 2 * n; }
};

// A chunk's x, B and C, each row contiguous.
template <typename T>
struct Rows {
    const T *x, *B, *C;
    int64_t x_row, B_row, C_row;
};

// The buffers of a thread and what is done with them.
template <typename T>
class Sequence {
   public:
    Sequence(const Sizes& sizes, const float* A, const float* D) : s(sizes), A(A), D(D) {
        const int64_t q = padded(s.q);
        kernel.resize(s.n * q);
        transposed.resize(s.n * q);
        scores.resize(q * q);
        masked.resize(q * q);
        own.resize(q * q);
        diagonal.resize(q);
        octaves.resize(q);
        sums.resize(q * s.h);
        into.resize(q * s.h);
        out.resize(q * s.h);
        same.resize(q * s.h);
        narrow.resize(s.h);
        found.resize(q * s.inner());
        weighed.resize(q * columns());
        packed.resize(s.n * columns());
        added.resize(s.n * columns());
        state.resize(s.n * s.inner());
        convolved.resize(s.taps ? q * s.width() : 0);
    }

    std::vector<float> state, found;  // S · 2^{−M}, (n, h·p); y, (q, h·p)
    std::vector<T> convolved;         // x, B and C, (q, h·p + 2n)
    bool has_state = false;

    // y of a chunk into `found`, and the state behind it into `state`, if anything follows. dt: rows of h.
    APART void chunk(const Rows<T>& rows, const float* dt, int64_t dt_row, int64_t q, bool follows) {
        const int64_t Q = padded(q);
        turn(rows, q, Q);
        multiply(q, Q, s.n, rows.C, rows.C_row, kernel.data(), Q, scores.data(), Q, false);
        for (int64_t i = 0; i < q; ++i) {
            diagonal[i] = scores[i * Q + i];
            float* row = &scores[i * Q];
            std::fill(row + i, row + Q, 0.f);
            for (int64_t j = 0; j < Q; j += LANES) store(load(row + j), &masked[i * Q + j]);
        }
        decays(dt, dt_row, q);
        for (int64_t first = 0; first < s.h; first += heads()) {
            const int64_t last = std::min(s.h, first + heads()), begin = first * s.p, N = (last - first) * s.p;
            float* y = found.data() + begin;
            if (has_state) {
                pack_state(begin, N);
                multiply(q, N, s.n, rows.C, rows.C_row, right_state(begin), state_row(N), y, s.inner(), false);
            }
            const bool together = std::all_of(&narrow[first], &narrow[first] + (last - first), [](char one) { return one; });
            if (!together)
                for (int64_t h = first; h < last; ++h) one_head(rows, h, dt, dt_row, q, Q);
            if (together || follows)
                for (int64_t h = first; h < last; ++h) weigh(rows, h, q, Q, &into[h], s.h, (h - first) * s.p, N);
            if (together) multiply(q, N, Q, masked.data(), Q, weighed.data(), N, y, s.inner(), has_state);
            if (follows) multiply(s.n, N, Q, left_kernel(), Q, weighed.data(), N, added.data(), N, false);
            mix(rows, first, last, q);
            if (follows) carry(first, last, q);
        }
        has_state = has_state || follows;
    }

   private:
    const Sizes s;
    const float *A, *D;
    std::vector<T> kernel, transposed, masked, own, weighed, packed;  // Bᵀ as right and left factor; G; x; S
    std::vector<float> scores, diagonal, octaves, into, out, same, added;
    std::vector<double> sums;
    std::vector<char> narrow;

    int64_t heads() const { return std::max<int64_t>(1, GROUP / s.p); }
    int64_t columns() const { return std::min(s.h, heads()) * s.p; }

    // Bᵀ, (n, Q), with zeros behind the last frame.
    APART void turn(const Rows<T>& rows, int64_t q, int64_t Q) {
        if (q < Q) {
            std::fill(kernel.begin(), kernel.end(), T(0));
            std::fill(transposed.begin(), transposed.end(), T(0));
        }
        if constexpr (std::is_same_v<T, float>) {
            for (int64_t k = 0; k < s.n; ++k)
                for (int64_t j = 0; j < q; ++j) kernel[k * Q + j] = rows.B[j * rows.B_row + k];
        } else {
            auto* pairs = reinterpret_cast<uint32_t*>(kernel.data());
            for (int64_t j = 0; j < q; ++j) {
                const T* row = rows.B + j * rows.B_row;
                for (int64_t k = 0; k < s.n / 2; ++k) {
                    pairs[k * Q + j] = uint32_t(row[2 * k].x) | uint32_t(row[2 * k + 1].x) << 16;
                    transposed[2 * k * Q + j] = row[2 * k];
                    transposed[(2 * k + 1) * Q + j] = row[2 * k + 1];
                }
            }
        }
    }

    const T* left_kernel() const { return std::is_same_v<T, float> ? kernel.data() : transposed.data(); }

    // r and the factors of rows and columns, (q, h).
    APART void decays(const float* dt, int64_t dt_row, int64_t q) {
        const double octave = 1.4426950408889634;
        for (int64_t i = 0; i < q; ++i) {
            const float* step = dt + i * dt_row;
            double* now = &sums[i * s.h];
            for (int64_t h = 0; h < s.h; ++h) {
                const double taken = double(step[h]) * (double(A[h]) * octave);
                now[h] = (i ? now[h - s.h] : 0.) + (taken < -SPAN ? -SPAN : taken);  // more is nothing left
            }
            for (int64_t h = 0; h < s.h; ++h) {
                into[i * s.h + h] = exp2_of(-MIDDLE - now[h]) * step[h];
                out[i * s.h + h] = exp2_of(now[h] + MIDDLE);
                same[i * s.h + h] = diagonal[i] * step[h] + D[h];
            }
        }
        for (int64_t h = 0; h < s.h; ++h) narrow[h] = !(sums[(q - 1) * s.h + h] < -SPAN);
        for (int64_t h = 0; h < s.h; ++h) {
            if (narrow[h]) continue;
            // Of a head of its own: only what goes into the state, 2^{R − r_j} dt_j, in the scale of the state.
            const double end = sums[(q - 1) * s.h + h];
            for (int64_t j = 0; j < q; ++j)
                into[j * s.h + h] = end - sums[j * s.h + h] < -FAR
                    ? 0.f
                    : exp2_of(end - sums[j * s.h + h]) * dt[j * dt_row + h];
            for (int64_t i = 0; i < q; ++i)
                if (sums[i * s.h + h] < -SPAN) out[i * s.h + h] = 0.f;
        }
    }

    // A head's x times a weight for each frame, as columns of a right factor (Q, N), with zeros behind the last frame.
    APART void weigh(
        const Rows<T>& rows, int64_t h, int64_t q, int64_t Q, const float* weights, int64_t weights_row, int64_t column,
        int64_t N) {
        constexpr int64_t step = std::is_same_v<T, float> ? 1 : 2;
        for (int64_t j = 0; j < Q; j += step, weights += step * weights_row) {
            T* to = &weighed[j * N + step * column];
            const T* x = rows.x + j * rows.x_row + h * s.p;
            if (j >= q) {
                std::fill(to, to + step * s.p, T(0));
            } else if constexpr (std::is_same_v<T, float>) {
                for (int64_t c = 0; c < s.p; c += LANES) store(load(x + c) * weights[0], to + c);
            } else {
                const bool two = j + 1 < q;
                pair(x, two ? x + rows.x_row : x, weights[0], two ? weights[weights_row] : 0.f, to, s.p);
            }
        }
    }

    // The state as the right factor of C: itself in float32, as pairs in bfloat16.
    APART void pack_state(int64_t begin, int64_t N) {
        if constexpr (!std::is_same_v<T, float>)
            for (int64_t k = 0; k < s.n; k += 2) {
                const float* row = &state[k * s.inner() + begin];
                pair(row, row + s.inner(), 1.f, 1.f, &packed[k * N], N);
            }
    }

    const T* right_state(int64_t begin) const {
        if constexpr (std::is_same_v<T, float>) return state.data() + begin;
        else return packed.data();
    }

    int64_t state_row(int64_t N) const { return std::is_same_v<T, float> ? s.inner() : N; }

    // A head by itself, in a group with one whose decays span too much. For that one the decays go into a matrix of its
    // own, each weight 2^{r_i − r_j} G_ij in one, none above |G_ij|.
    APART void one_head(const Rows<T>& rows, int64_t h, const float* dt, int64_t dt_row, int64_t q, int64_t Q) {
        float* y = found.data() + h * s.p;
        if (narrow[h]) {
            weigh(rows, h, q, Q, &into[h], s.h, 0, s.p);
            multiply(q, s.p, Q, masked.data(), Q, weighed.data(), s.p, y, s.inner(), has_state);
            return;
        }
        const double* r = &sums[h];
        for (int64_t i = 0; i < q; ++i) {
            float& past = out[i * s.h + h];
            for (int64_t c = 0; c < s.p; ++c) y[i * s.inner() + c] = has_state ? past * y[i * s.inner() + c] : 0.f;
            past = 1.f;
            for (int64_t j = 0; j < i; ++j) octaves[j] = float(r[i * s.h] - r[j * s.h]);
            for (int64_t j = 0; j < Q; j += LANES) {  // the scores from the diagonal on are zero
                const Wide past = load(&octaves[j]);
                store((past < -FAR ? Wide{} : exp2_of(past)) * load(&scores[i * Q + j]), &own[i * Q + j]);
            }
        }
        weigh(rows, h, q, Q, dt + h, dt_row, 0, s.p);
        multiply(q, s.p, Q, own.data(), Q, weighed.data(), s.p, y, s.inner(), true);
    }

    // y ← same · x + out · y.
    APART void mix(const Rows<T>& rows, int64_t first, int64_t last, int64_t q) {
        for (int64_t i = 0; i < q; ++i)
            for (int64_t h = first; h < last; ++h) {
                const float u = same[i * s.h + h], v = out[i * s.h + h];
                const T* x = rows.x + i * rows.x_row + h * s.p;
                float* y = &found[i * s.inner() + h * s.p];
                for (int64_t c = 0; c < s.p; c += LANES) store(load(x + c) * u + load(y + c) * v, y + c);
            }
    }

    // S ← 2^R S + what came in, all times 2^{−M}.
    APART void carry(int64_t first, int64_t last, int64_t q) {
        const int64_t N = (last - first) * s.p;
        for (int64_t h = first; h < last; ++h) {
            const double end = sums[(q - 1) * s.h + h];
            const float kept = end < -FAR ? 0.f : exp2_of(end), share = exp2_of(narrow[h] ? end : -MIDDLE);
            for (int64_t k = 0; k < s.n; ++k) {
                float* S = &state[k * s.inner() + h * s.p];
                const float* more = &added[k * N + (h - first) * s.p];
                for (int64_t c = 0; c < s.p; c += LANES) {
                    const Wide in = load(more + c) * share;
                    store(has_state ? load(S + c) * kept + in : in, S + c);
                }
            }
        }
    }
};

// SiLU of the causal convolution of frames [from, from + q), (q, width). Frames before the first are those of `before`,
// (taps − 1, width).
template <typename T>
APART void convolve(
    const Sizes& s, const T* x, int64_t row, const T* before, const float* taps, const float* bias, int64_t from, int64_t q,
    T* to) {
    const int64_t width = s.width(), past = s.taps - 1;
    std::vector<const T*> rows(s.taps);
    for (int64_t i = from; i < from + q; ++i, to += width) {
        for (int64_t tap = 0, frame = i - past; tap < s.taps; ++tap, ++frame)
            rows[tap] = frame < 0 ? before + (frame + past) * width : x + frame * row;
        for (int64_t c = 0; c < width; c += LANES) {
            __builtin_prefetch(rows.back() + row + c);  // of the next frame: rows are too short for the hardware to see it
            Wide sum = load(bias + c);
            for (int64_t tap = 0; tap < s.taps; ++tap) sum += load(taps + tap * width + c) * load(rows[tap] + c);
            store(silu(sum), to + c);
        }
    }
}

inline float inverse_root(Wide squares, int64_t width, float eps) {
    double sum = 0;
    for (int64_t k = 0; k < LANES; ++k) sum += squares[k];
    return float(1 / std::sqrt(sum / double(width) + eps));
}

// A frame: y · SiLU(z) / rms. The next frame is `next` further on.
template <typename T>
APART void gate(float* y, const T* z, int64_t next, float eps, int64_t width, T* to) {
    Wide squares{};
    for (int64_t c = 0; c < width; c += LANES) {
        __builtin_prefetch(z + next + c);
        __builtin_prefetch(to + c, 1);
        const Wide gated = load(y + c) * silu(load(z + c));
        squares += gated * gated;
        store(gated, y + c);
    }
    const float scale = inverse_root(squares, width, eps);
    for (int64_t c = 0; c < width; c += LANES) store(load(y + c) * scale, to + c);
}

// Frames: x / rms · weight.
template <typename T>
APART void normalise(const T* x, const float* weight, float eps, int64_t frames, int64_t width, T* to) {
    for (const T* end = x + frames * width; x < end; x += width, to += width) {
        Wide squares{};
        for (int64_t c = 0; c < width; c += LANES) squares += load(x + c) * load(x + c);
        const float scale = inverse_root(squares, width, eps);
        for (int64_t c = 0; c < width; c += LANES) store(load(x + c) * scale * load(weight + c), to + c);
    }
}

template <typename T>
const T* of(const Tensor& x, int64_t sequence) {
    return x.const_data_ptr<T>() + sequence * x.stride(0);
}

// x, B, C and z: (b, t, ·), contiguous rows; the state (b, n, h·p). With taps, x is all three before the convolution.
struct Inputs {
    Tensor x, B, C, dt, A, D;
    std::optional<Tensor> z, taps, bias, before, state;
    double eps;
    bool keep;
};

template <typename T>
std::tuple<Tensor, Tensor> run(const Sizes& s, const Inputs& in) {
    Tensor y = at::empty({s.b, s.t, s.inner()}, in.x.options());
    Tensor last = at::empty({in.keep ? s.b : 0, s.n, s.inner()}, in.dt.options());
    at::parallel_for(0, s.b, 1, [&](int64_t begin, int64_t end) {
        Sequence<T> sequence(s, in.A.const_data_ptr<float>(), in.D.const_data_ptr<float>());
        const float up = exp2_of(MIDDLE), down = exp2_of(-MIDDLE);
        for (int64_t b = begin; b < end; ++b) {
            sequence.has_state = in.state.has_value();
            if (in.state) {
                const float* given = of<float>(*in.state, b);
                for (int64_t c = 0; c < s.n * s.inner(); ++c) sequence.state[c] = down * given[c];
            }
            const T *x = of<T>(in.x, b), *before = in.before ? of<T>(*in.before, b) : nullptr;
            for (int64_t from = 0; from < s.t; from += s.q) {
                const int64_t q = std::min(s.q, s.t - from);
                Rows<T> rows;
                if (s.taps) {
                    T* to = sequence.convolved.data();
                    convolve(
                        s, x, in.x.stride(1), before, in.taps->const_data_ptr<float>(), in.bias->const_data_ptr<float>(), from,
                        q, to);
                    rows = {to, to + s.inner(), to + s.inner() + s.n, s.width(), s.width(), s.width()};
                } else {
                    rows = {
                        x + from * in.x.stride(1),
                        of<T>(in.B, b) + from * in.B.stride(1),
                        of<T>(in.C, b) + from * in.C.stride(1),
                        in.x.stride(1),
                        in.B.stride(1),
                        in.C.stride(1)};
                }
                sequence.chunk(
                    rows, of<float>(in.dt, b) + from * in.dt.stride(1), in.dt.stride(1), q, in.keep || from + q < s.t);
                T* to = y.mutable_data_ptr<T>() + (b * s.t + from) * s.inner();
                for (int64_t i = 0; i < q; ++i, to += s.inner()) {
                    float* frame = &sequence.found[i * s.inner()];
                    if (in.z)
                        gate(frame, of<T>(*in.z, b) + (from + i) * in.z->stride(1), in.z->stride(1), float(in.eps), s.inner(), to);
                    else
                        for (int64_t c = 0; c < s.inner(); c += LANES) store(load(frame + c), to + c);
                }
            }
            if (in.keep) {
                float* to = last.mutable_data_ptr<float>() + b * s.n * s.inner();
                for (int64_t c = 0; c < s.n * s.inner(); ++c) to[c] = up * sequence.state[c];
            }
        }
        at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
    });
    return {y, last};
}

std::tuple<Tensor, Tensor> dispatch(const Sizes& s, const Inputs& in) {
    return in.x.scalar_type() == at::kFloat ? run<float>(s, in) : run<BFloat16>(s, in);
}

std::tuple<Tensor, Tensor> scan(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& D,
    const std::optional<Tensor>& state, int64_t chunk, bool keep) {
    const int64_t h = A.size(0);
    const Sizes s{x.size(0), x.size(1), h, x.size(2) / h, B.size(2), chunk, 0};
    return dispatch(s, {x, B, C, dt, A, D, {}, {}, {}, {}, state, 0, keep});
}

std::tuple<Tensor, Tensor> mix(
    const Tensor& z, const Tensor& xBC, const Tensor& dt, const Tensor& A, const Tensor& D, const Tensor& taps,
    const Tensor& bias, const std::optional<Tensor>& before, const std::optional<Tensor>& state, double eps, int64_t chunk,
    bool keep) {
    const int64_t h = A.size(0), inner = z.size(2), n = (xBC.size(2) - inner) / 2;
    const Sizes s{z.size(0), z.size(1), h, inner / h, n, chunk, taps.size(0)};
    return dispatch(s, {xBC, xBC, xBC, dt, A, D, z, taps, bias, before, state, eps, keep});
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    Tensor y = at::empty_like(x);
    const int64_t width = weight.size(0);
    const float* gain = weight.const_data_ptr<float>();
    at::parallel_for(0, x.numel() / width, 256, [&](int64_t begin, int64_t end) {
        const auto run = [&](const auto* from, auto* to) {
            normalise(from + begin * width, gain, float(eps), end - begin, width, to + begin * width);
        };
        if (x.scalar_type() == at::kFloat) run(x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
        else run(x.const_data_ptr<BFloat16>(), y.mutable_data_ptr<BFloat16>());
    });
    return y;
}

}  // namespace

TORCH_LIBRARY(bsmamba2, library) {
    library.def(
        "scan(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? state, int chunk, bool keep) -> "
        "(Tensor, Tensor)");
    library.def(
        "mix(Tensor z, Tensor xBC, Tensor dt, Tensor A, Tensor D, Tensor taps, Tensor bias, Tensor? before, Tensor? state, "
        "float eps, int chunk, bool keep) -> (Tensor, Tensor)");
    library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(bsmamba2, CPU, library) {
    library.impl("scan", scan);
    library.impl("mix", mix);
    library.impl("rms_norm", rms_norm);
}
