// The way forwards: convolution, scan and gate of a sequence, chunk by chunk.
//
// Letters as in `bsmamba2.config` (b sequences, t frames, h heads, p head width, n state) and `bsmamba2.ssd`: q frames of
// a chunk, r_i sum of dt·A until frame i in octaves, R at the end, S the state. Within a chunk
//
//     y_i = Σ_{j<i} 2^{r_i − r_j} G_ij dt_j x_j + (G_ii dt_i + D) x_i + 2^{r_i} C_i S,    G = C Bᵀ
//
// and 2^{r_i − r_j} = 2^{r_i + M} · 2^{−M − r_j}, so that one product with G serves all heads whose decays span less than
// 2M octaves in the chunk. For a head that forgets faster, the decays go into a matrix of its own. The state is kept times
// 2^{−M}, where it needs no factor but that of the rows. Q is q, filled up to a multiple of 32.

#pragma once

#include "numbers.h"

namespace {

// A chunk's x, B and C, each row contiguous.
template <typename T>
struct Rows {
    const T *x, *B, *C;
    int64_t x_row, B_row, C_row;
};

// 2^octaves times a state or its gradient.
inline void scaled(const float* from, size_t count, double octaves, float* to) {
    const float factor = exp2_of(octaves);
    for (size_t k = 0; k < count; ++k) to[k] = factor * from[k];
}

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

    // Of a sequence, from the state before it, (n, h·p), if there is one.
    void begin(const float* given) {
        has_state = given != nullptr;
        if (given) scaled(given, state.size(), -MIDDLE, state.data());
    }

    // y of a chunk into `found`, and the state behind it into `state`, if anything follows. dt: rows of h.
    NOINLINE void chunk(const Rows<T>& rows, const float* dt, int64_t dt_row, int64_t q, bool follows) {
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
            if (has_state)
                multiply(
                    q, N, s.n, {rows.C, rows.C_row}, right(&state[begin], s.inner(), s.n, N, packed), y, s.inner(), false);
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

    // The state alone, without y.
    NOINLINE void absorb(const Rows<T>& rows, const float* dt, int64_t dt_row, int64_t q) {
        const int64_t Q = padded(q);
        turn(rows, q, Q);
        decays(dt, dt_row, q);
        for (int64_t first = 0; first < s.h; first += heads()) {
            const int64_t last = std::min(s.h, first + heads()), N = (last - first) * s.p;
            for (int64_t h = first; h < last; ++h) weigh(rows, h, q, Q, &into[h], s.h, (h - first) * s.p, N);
            multiply(s.n, N, Q, left_kernel(), Q, weighed.data(), N, added.data(), N, false);
            carry(first, last, q);
        }
        has_state = true;
    }

   protected:
    const Sizes s;
    const float *A, *D;
    std::vector<T> kernel, transposed, masked, own, weighed, packed;  // Bᵀ as right and left factor; G; x; S
    std::vector<float> scores, diagonal, octaves, into, out, same, added;
    std::vector<double> sums;
    std::vector<char> narrow;  // of a head: one factor for rows and one for columns will do
    float jump = SPAN;         // most octaves of one step of such a head
    bool skip = true;          // whether y has the frame itself in it

    int64_t heads() const { return std::max<int64_t>(1, GROUP / s.p); }
    int64_t columns() const { return std::min(s.h, heads()) * s.p; }

    // Bᵀ, (n, Q), with zeros behind the last frame.
    NOINLINE void turn(const Rows<T>& rows, int64_t q, int64_t Q) {
        if (q < Q) {
            std::fill(kernel.begin(), kernel.end(), T(0));
            std::fill(transposed.begin(), transposed.end(), T(0));
        }
        if constexpr (std::is_same_v<T, float>) {
            for (int64_t k = 0; k < s.n; ++k)
                for (int64_t j = 0; j < q; ++j) kernel[k * Q + j] = rows.B[j * rows.B_row + k];
        } else {
            for (int64_t j = 0; j < q; ++j) {
                const T* row = rows.B + j * rows.B_row;
                for (int64_t k = 0; k < s.n / 2; ++k) {
                    std::copy(row + 2 * k, row + 2 * k + 2, &kernel[2 * (k * Q + j)]);
                    transposed[2 * k * Q + j] = row[2 * k];
                    transposed[(2 * k + 1) * Q + j] = row[2 * k + 1];
                }
            }
        }
    }

    const T* left_kernel() const { return std::is_same_v<T, float> ? kernel.data() : transposed.data(); }

    // r and the factors of rows and columns, (q, h).
    NOINLINE void decays(const float* dt, int64_t dt_row, int64_t q) {
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
        if (jump < SPAN)
            for (int64_t i = 0; i < q; ++i)
                for (int64_t h = 0; h < s.h; ++h)
                    if (sums[i * s.h + h] - (i ? sums[(i - 1) * s.h + h] : 0.) < -jump) narrow[h] = false;
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
    NOINLINE void weigh(
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

    // A head by itself, in a group with one whose decays span too much. For that one the decays go into a matrix of its
    // own, each weight 2^{r_i − r_j} G_ij in one, none above |G_ij|.
    NOINLINE void one_head(const Rows<T>& rows, int64_t h, const float* dt, int64_t dt_row, int64_t q, int64_t Q) {
        float* y = found.data() + h * s.p;
        if (narrow[h]) {
            weigh(rows, h, q, Q, &into[h], s.h, 0, s.p);
            multiply(q, s.p, Q, masked.data(), Q, weighed.data(), s.p, y, s.inner(), has_state);
            return;
        }
        for (int64_t i = 0; i < q; ++i) {
            float& past = out[i * s.h + h];
            for (int64_t c = 0; c < s.p; ++c) y[i * s.inner() + c] = has_state ? past * y[i * s.inner() + c] : 0.f;
            past = 1.f;
            decays_until(i, h, Q);
            for (int64_t j = 0; j < Q; j += LANES) store(load(&octaves[j]) * load(&scores[i * Q + j]), &own[i * Q + j]);
        }
        weigh(rows, h, q, Q, dt + h, dt_row, 0, s.p);
        multiply(q, s.p, Q, own.data(), Q, weighed.data(), s.p, y, s.inner(), true);
    }

    // Into `octaves`: 2^{r_i − r_j} of a head for all j < i; any number from there on.
    NOINLINE void decays_until(int64_t i, int64_t h, int64_t Q) {
        const double* r = &sums[h];
        for (int64_t j = 0; j < i; ++j) octaves[j] = float(r[i * s.h] - r[j * s.h]);
        for (int64_t j = 0; j < Q; j += LANES) {
            const Wide past = load(&octaves[j]);
            store(past < -FAR ? Wide{} : exp2_of(past), &octaves[j]);
        }
    }

    // y ← same · x + out · y.
    NOINLINE void mix(const Rows<T>& rows, int64_t first, int64_t last, int64_t q) {
        for (int64_t i = 0; i < q; ++i)
            for (int64_t h = first; h < last; ++h) {
                const float u = skip ? same[i * s.h + h] : 0.f, v = out[i * s.h + h];
                const T* x = rows.x + i * rows.x_row + h * s.p;
                float* y = &found[i * s.inner() + h * s.p];
                for (int64_t c = 0; c < s.p; c += LANES) store(load(x + c) * u + load(y + c) * v, y + c);
            }
    }

    // S ← 2^R S + what came in, all times 2^{−M}.
    NOINLINE void carry(int64_t first, int64_t last, int64_t q) {
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

// SiLU of the causal convolution of frames [from, from + q), (q, width), and where wanted its argument. Frames before the
// first are those of `before`, (taps − 1, width). TAPS is their number if it is known, else 0.
template <int TAPS, typename T>
NOINLINE void convolve_by(
    const Sizes& s, const T* x, int64_t row, const T* before, const float* weights, const float* bias, int64_t from, int64_t q,
    T* to, float* argument) {
    const int64_t width = s.width(), taps = TAPS ? TAPS : s.taps, past = taps - 1;
    std::vector<const T*> rows(taps);
    for (int64_t i = from; i < from + q; ++i, to += width) {
        for (int64_t tap = 0, frame = i - past; tap < taps; ++tap, ++frame)
            rows[tap] = frame < 0 ? before + (frame + past) * width : x + frame * row;
        for (int64_t c = 0; c < width; c += LANES) {
            __builtin_prefetch(rows.back() + row + c);  // of the next frame: rows are too short for the hardware to see it
            Wide sum = load(bias + c);
            for (int64_t tap = 0; tap < taps; ++tap) sum += load(weights + tap * width + c) * load(rows[tap] + c);
            store(silu(sum), to + c);
            if (argument) store(sum, argument + (i - from) * width + c);
        }
    }
}

template <typename T>
void convolve(
    const Sizes& s, const T* x, int64_t row, const T* before, const float* weights, const float* bias, int64_t from, int64_t q,
    T* to, float* argument = nullptr) {
    (s.taps == 4 ? convolve_by<4, T> : convolve_by<0, T>)(s, x, row, before, weights, bias, from, q, to, argument);
}

inline float inverse_root(Wide squares, int64_t width, float eps) {
    return float(1 / std::sqrt(total(squares) / double(width) + eps));
}

// A frame: y · SiLU(z) / rms. The next frame is `next` further on.
template <typename T>
NOINLINE void gate(float* y, const T* z, int64_t next, float eps, int64_t width, T* to) {
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
NOINLINE void normalise(const T* x, const float* weight, float eps, int64_t frames, int64_t width, T* to) {
    for (const T* end = x + frames * width; x < end; x += width, to += width) {
        Wide squares{};
        for (int64_t c = 0; c < width; c += LANES) squares += load(x + c) * load(x + c);
        const float scale = inverse_root(squares, width, eps);
        for (int64_t c = 0; c < width; c += LANES) store(load(x + c) * scale * load(weight + c), to + c);
    }
}

}  // namespace
