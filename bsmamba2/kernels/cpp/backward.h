// The way back: gradients of what `forward.h` computes. Nothing is kept from the way there but what went in: the states
// before all chunks are computed again, then each chunk from the last one back.
//
// Letters as there. Besides, with w_j = 2^{−M − r_j} dt_j and o_i = 2^{r_i + M}: W = w x, E = o dy, P the gradient of the
// state behind the chunk. Then, for heads whose decays are narrow,
//
//     dW = Gᵀ E + B (2^R P)    dG = E Wᵀ    dC = E Sᵀ + dG B    dB = W (2^R P)ᵀ + dGᵀ C    P ← 2^R P + Cᵀ E
//
// and dt·A of a frame k multiplies every path from a frame before k, or from the state, to k or one after it, or to the next
// state. `rates` sums the paths' gradients: for narrow heads all that end at k or later less those that begin there, a
// difference, of which a step that is no jump leaves enough; for the other heads path by path. In bfloat16 what cancels in
// that difference has to be rounded alike: E, W and P are, `as` the products take them.

#pragma once

#include "forward.h"

namespace {

template <typename T>
class Gradients : public Sequence<T> {
    using Base = Sequence<T>;
    using Base::A, Base::columns, Base::D, Base::decays_until, Base::diagonal, Base::heads, Base::into, Base::narrow,
        Base::octaves, Base::out, Base::s, Base::same, Base::scores, Base::sums;

   public:
    using Base::convolved, Base::found, Base::has_state, Base::state;

    Gradients(const Sizes& sizes, const float* A, const float* D) : Base(sizes, A, D) {
        Base::jump = JUMP;
        Base::skip = false;
        const int64_t Q = padded(s.q), largest = std::max({Q * columns(), s.n * columns(), Q * Q, Q * s.n});
        later.resize(s.n * s.inner());
        dy.resize(Q * s.inner());
        dinputs.resize((Q + std::max<int64_t>(s.taps, 1) - 1) * s.width());
        if (s.taps) {
            argument.resize(Q * s.width());
            tail.resize((s.taps - 1) * s.width());
            dtaps.resize(s.taps * s.width());
            dbias.resize(s.width());
        }
        dA.resize(s.h);
        dD.resize(s.h);
        sigmoid_z.resize(s.inner());
        reader.resize(s.n * Q);
        for (auto* one : {&E, &W, &transposed_E, &transposed_W, &dW}) one->resize(Q * columns());
        for (auto* one : {&transposed_G, &dG, &mixed}) one->resize(Q * Q);
        for (auto* one : {&transposed_dB, &transposed_dC}) one->resize(s.n * Q);
        for (auto* one : {&both, &direct, &rates}) one->resize(Q * s.h);
        state_decay_grad.resize(s.h);
        for (auto* one : {&for_left, &for_right, &for_E, &for_W}) one->resize(largest);
    }

    std::vector<float> later;       // P · 2^M, (n, h·p)
    bool has_later = false;
    std::vector<float> dy;          // (Q, h·p)
    std::vector<float> dinputs;     // of x, B and C, and of the argument of SiLU, with the frames that follow: (q + taps − 1, w)
    std::vector<float> argument;    // of SiLU, (q, w)
    std::vector<float> dtaps, dbias;
    std::vector<double> dA, dD;

    // From dy, and with y without the frame itself in `found`: gradients of x, B and C into `dinputs`, that of dt, and P
    // before the chunk where it is wanted. `next` is the state behind the chunk.
    NOINLINE void chunk_back(
        const Rows<T>& rows, const float* dt, int64_t dt_row, int64_t q, const float* next, bool earlier, float* ddt,
        int64_t ddt_row) {
        const int64_t Q = padded(q), w = s.width();
        turn_reader(rows, q, Q);
        std::fill(scores.begin() + q * Q, scores.begin() + Q * Q, 0.f);
        std::fill(dy.begin() + q * s.inner(), dy.begin() + Q * s.inner(), 0.f);
        transposed(scores.data(), Q, Q, Q, transposed_G.data(), Q);
        std::fill(dG.begin(), dG.end(), 0.f);
        std::fill(transposed_dB.begin(), transposed_dB.end(), 0.f);
        std::fill(transposed_dC.begin(), transposed_dC.end(), 0.f);
        for (int64_t first = 0; first < s.h; first += heads()) {
            const int64_t last = std::min(s.h, first + heads()), begin = first * s.p, N = (last - first) * s.p;
            float* P = later.data() + begin;
            for (int64_t h = first; h < last; ++h) {
                if (!narrow[h])
                    for (int64_t i = 0; i < q; ++i) {
                        const double r = sums[i * s.h + h];
                        out[i * s.h + h] = r < -SPAN ? 0.f : exp2_of(r + MIDDLE);
                    }
                spread(rows, h, q, Q, (h - first) * s.p, N);
            }
            transposed(E.data(), N, Q, N, transposed_E.data(), Q);
            transposed(W.data(), N, Q, N, transposed_W.data(), Q);
            const Factor<T> right_E = right(E.data(), N, Q, N, for_E), right_W = right(transposed_W.data(), Q, N, Q, for_W);
            for (int64_t h = first; h < last; ++h) scale_state_grad(h, q, next);
            if (has_later) {
                multiply(q, N, s.n, {rows.B, rows.B_row}, right(P, s.inner(), s.n, N, for_right), dW.data(), N, false);
                multiply(s.n, Q, N, left(P, s.inner(), s.n, N, for_left), right_W, transposed_dB.data(), Q, true);
            }
            if (has_state)
                multiply(
                    s.n, Q, N, left(&state[begin], s.inner(), s.n, N, for_left), right(transposed_E.data(), Q, N, Q, for_right),
                    transposed_dC.data(), Q, true);
            if (std::all_of(&narrow[first], &narrow[first] + (last - first), [](char one) { return one; })) {
                multiply(q, N, Q, left(transposed_G.data(), Q, q, Q, for_left), right_E, dW.data(), N, has_later);
                multiply(q, Q, N, left(E.data(), N, q, N, for_left), right_W, dG.data(), Q, true);
                for (int64_t h = first; h < last; ++h) narrow_head(rows, h, (h - first) * s.p, N, dt, dt_row, q);
            } else {
                for (int64_t h = first; h < last; ++h) one_head_back(rows, h, (h - first) * s.p, N, dt, dt_row, q, Q);
            }
            if (earlier) {
                for (int64_t h = first; h < last; ++h) restore(h, q);
                multiply(s.n, N, Q, {reader.data(), Q}, right_E, P, s.inner(), has_later);
            }
        }
        has_later = earlier;
        through_scores(rows, dt, dt_row, q, Q, w);
        for (int64_t i = 0; i < q; ++i)
            for (int64_t h = 0; h < s.h; ++h) {
                const int64_t k = i * s.h + h;
                ddt[i * ddt_row + h] = float(direct[k] + diagonal[i] * both[k] + A[h] * rates[k]);
                dA[h] += rates[k] * dt[i * dt_row + h];
                dD[h] += both[k];
            }
    }

    // A frame i from the gradient of y · SiLU(z) / rms: that of z, and dy.
    NOINLINE void gate_back(const Rows<T>& rows, int64_t i, const T* z, const T* gradient, float eps, T* dz) {
        const int64_t width = s.inner();
        float *y = &found[i * width], *to = &dy[i * width];
        const T* x = rows.x + i * rows.x_row;
        Wide squares{}, along{};
        for (int64_t h = 0; h < s.h; ++h)
            for (int64_t c = h * s.p; c < (h + 1) * s.p; c += LANES) {
                const Wide open = sigmoid(load(z + c));
                const Wide whole = load(y + c) + load(x + c) * same[i * s.h + h];
                const Wide gated = whole * load(z + c) * open;
                squares += gated * gated;
                along += gated * load(gradient + c);
                store(open, &sigmoid_z[c]);
                store(whole, to + c);
            }
        const float scale = inverse_root(squares, width, eps);
        const float less = float(scale * scale * scale * total(along) / double(width));
        for (int64_t c = 0; c < width; c += LANES) {
            const Wide open = load(&sigmoid_z[c]), argument = load(z + c), whole = load(to + c), silu = argument * open;
            const Wide dgated = load(gradient + c) * scale - whole * silu * less;
            store(dgated * whole * silu_slope(argument, open), dz + c);
            store(dgated * silu, to + c);
        }
    }

    // From the gradients of SiLU's values in `dinputs` to those of xBC's frames [from, from + q), the taps and the bias; `dx`
    // is that of the first of these frames, `dbefore` of the frames before the first of all.
    NOINLINE void convolve_back(
        const T* x, int64_t row, const T* before, const float* taps, int64_t from, int64_t q, T* dx, int64_t dx_row,
        T* dbefore) {
        const int64_t w = s.width(), past = s.taps - 1;
        for (int64_t k = 0; k < q * w; k += LANES) {
            const Wide a = load(&argument[k]);
            store(load(&dinputs[k]) * silu_slope(a, sigmoid(a)), &dinputs[k]);
        }
        std::copy(tail.begin(), tail.end(), dinputs.begin() + q * w);
        for (int64_t i = from ? 0 : -past; i < q; ++i) {
            T* to = i < 0 ? dbefore + (i + past) * w : dx + i * dx_row;
            for (int64_t c = 0; c < w; c += LANES) {
                Wide sum{};
                for (int64_t tap = 0; tap < s.taps; ++tap)
                    if (i + past - tap >= 0) sum += load(taps + tap * w + c) * load(&dinputs[(i + past - tap) * w + c]);
                store(sum, to + c);
            }
        }
        for (int64_t tap = 0; tap < s.taps; ++tap)
            for (int64_t i = 0; i < q; ++i) {
                const int64_t frame = from + i - past + tap;
                const T* other = frame < 0 ? before + (frame + past) * w : x + frame * row;
                float* sum = &dtaps[tap * w];
                const float* one = &dinputs[i * w];
                for (int64_t c = 0; c < w; c += LANES) store(load(sum + c) + load(one + c) * load(other + c), sum + c);
            }
        for (int64_t i = 0; i < q; ++i)
            for (int64_t c = 0; c < w; c += LANES) store(load(&dbias[c]) + load(&dinputs[i * w + c]), &dbias[c]);
        std::copy(dinputs.begin(), dinputs.begin() + past * w, tail.begin());
    }

    void begin_back(const float* dstate) {
        has_later = dstate != nullptr;
        if (dstate) scaled(dstate, later.size(), MIDDLE, later.data());
        for (auto* one : {&tail, &dtaps, &dbias}) std::fill(one->begin(), one->end(), 0.f);
        for (auto* one : {&dA, &dD}) std::fill(one->begin(), one->end(), 0.);
    }

   private:
    static constexpr float JUMP = 8;  // octaves of one step

    std::vector<T> reader, for_left, for_right, for_E, for_W;  // Cᵀ as left factor, (n, Q); buffers for other factors
    std::vector<float> tail, sigmoid_z, E, W, transposed_E, transposed_W, dW, transposed_G, dG, mixed, transposed_dB, transposed_dC;
    std::vector<double> both, direct, rates, state_decay_grad;  // x·dy; of dt by its factor; of dt·A; of the decay across the chunk

    NOINLINE void turn_reader(const Rows<T>& rows, int64_t q, int64_t Q) {
        if (q < Q) std::fill(reader.begin(), reader.end(), T(0));
        for (int64_t k = 0; k < s.n; ++k)
            for (int64_t i = 0; i < q; ++i) reader[k * Q + i] = rows.C[i * rows.C_row + k];
    }

    // Columns of E and W of a head, with zeros behind the last frame.
    NOINLINE void spread(const Rows<T>& rows, int64_t h, int64_t q, int64_t Q, int64_t column, int64_t N) {
        for (int64_t i = 0; i < Q; ++i) {
            float *e = &E[i * N + column], *w = &W[i * N + column];
            if (i >= q) {
                std::fill(e, e + s.p, 0.f);
                std::fill(w, w + s.p, 0.f);
                continue;
            }
            const T* x = rows.x + i * rows.x_row + h * s.p;
            const float *d = &dy[i * s.inner() + h * s.p], o = out[i * s.h + h], v = into[i * s.h + h];
            for (int64_t c = 0; c < s.p; c += LANES) {
                store(as<T>(load(d + c) * o), e + c);
                store(as<T>(load(x + c) * v), w + c);
            }
        }
    }

    // What a head's state behind the chunk says of its decay across it, and P · 2^R (2^{−M} for a head by itself).
    NOINLINE void scale_state_grad(int64_t h, int64_t q, const float* next) {
        state_decay_grad[h] = 0;
        if (!has_later) return;
        const double end = sums[(q - 1) * s.h + h];
        const float kept = end < -SPAN ? 0.f : exp2_of(end), factor = narrow[h] ? kept : exp2_of(-MIDDLE);
        const float* other = narrow[h] ? next : has_state ? state.data() : nullptr;
        const float back = narrow[h] ? exp2_of(-end) : 1.f;
        Wide sum{};
        for (int64_t k = 0; k < s.n; ++k) {
            const int64_t row = k * s.inner() + h * s.p;
            for (int64_t c = row; c < row + s.p; c += LANES) {
                const Wide P = load(&later[c]), scaled = P * factor;
                if (other) sum += (std::is_same_v<T, float> || !narrow[h] ? P : as<T>(scaled) * back) * load(other + c);
                store(scaled, &later[c]);
            }
        }
        state_decay_grad[h] = total(sum) * (narrow[h] ? 1.f : kept);
    }

    NOINLINE void restore(int64_t h, int64_t q) {
        if (narrow[h] || !has_later) return;
        const double end = sums[(q - 1) * s.h + h];
        const float factor = end < -FAR ? 0.f : exp2_of(end + MIDDLE);
        for (int64_t k = 0; k < s.n; ++k)
            for (int64_t c = 0; c < s.p; ++c) later[k * s.inner() + h * s.p + c] *= factor;
    }

    // dx of a head and what its rates and steps get, from dW.
    NOINLINE void narrow_head(
        const Rows<T>& rows, int64_t h, int64_t column, int64_t N, const float* dt, int64_t dt_row, int64_t q) {
        double rate = state_decay_grad[h];
        for (int64_t j = q - 1; j >= 0; --j) {
            const int64_t k = j * s.h + h, row = j * s.inner() + h * s.p;
            const T* x = rows.x + j * rows.x_row + h * s.p;
            float* dx = &dinputs[j * s.width() + h * s.p];
            const float *d = &dy[row], *y = &found[row], *dw = &dW[j * N + column], *e = &E[j * N + column];
            const float *w = &W[j * N + column], v = into[k], u = same[k], factor = exp2_of(-MIDDLE - sums[k]);
            Wide moved{}, self{}, read{}, left{};
            for (int64_t c = 0; c < s.p; c += LANES) {
                const Wide gradient = load(d + c), frame = load(x + c), weighed = load(dw + c);
                moved += frame * weighed;
                self += frame * gradient;
                read += load(y + c) * load(e + c);
                left += load(w + c) * weighed;
                store(weighed * v + gradient * u, dx + c);
            }
            both[k] = total(self);
            direct[k] = factor * total(moved);
            rate += factor * total(read) - total(left);
            rates[k] = rate;
        }
    }

    // A head in a group with one that is not narrow.
    NOINLINE void one_head_back(
        const Rows<T>& rows, int64_t h, int64_t column, int64_t N, const float* dt, int64_t dt_row, int64_t q, int64_t Q) {
        const int64_t begin = h * s.p;
        if (narrow[h]) {
            const Factor<T> heads_E = right(&E[column], N, Q, s.p, for_right);
            multiply(q, s.p, Q, left(transposed_G.data(), Q, q, Q, for_left), heads_E, &dW[column], N, has_later);
            const Factor<T> heads_W = right(&transposed_W[column * Q], Q, s.p, Q, for_right);
            multiply(q, Q, s.p, left(&E[column], N, q, s.p, for_left), heads_W, dG.data(), Q, true);
            narrow_head(rows, h, column, N, dt, dt_row, q);
            return;
        }
        const double end = sums[(q - 1) * s.h + h];
        std::vector<double> read(q + 1), departed(q + 1);
        std::vector<float> y(q * s.p), x(Q * s.p), transposed_x(s.p * Q), own_T(Q * Q), dx(q * s.p), paths(Q);
        if (has_state) {
            multiply(
                q, s.p, s.n, {rows.C, rows.C_row}, right(&state[begin], s.inner(), s.n, s.p, for_right), y.data(), s.p, false);
            for (int64_t i = 0; i < q; ++i) read[i] = dot(&E[i * N + column], &y[i * s.p]);
        }
        for (int64_t j = 0; j < q; ++j)
            for (int64_t c = 0; c < s.p; ++c)
                x[j * s.p + c] = float(rows.x[j * rows.x_row + begin + c]) * dt[j * dt_row + h];
        transposed(x.data(), s.p, Q, s.p, transposed_x.data(), Q);
        multiply(
            q, Q, s.p, left(&dy[begin], s.inner(), q, s.p, for_left), right(transposed_x.data(), Q, s.p, Q, for_right),
            mixed.data(), Q, false);
        std::fill(own_T.begin(), own_T.end(), 0.f);
        for (int64_t k = 0; k < q; ++k) rates[k * s.h + h] = 0;
        for (int64_t i = q - 1; i >= 0; --i) {
            decays_until(i, h, Q);
            double crossing = 0;
            for (int64_t j = 0; j < i; ++j) {
                const float weight = octaves[j] * scores[i * Q + j];
                dG[i * Q + j] += octaves[j] * mixed[i * Q + j];
                own_T[j * Q + i] = weight;
                paths[j] += weight * mixed[i * Q + j];
                crossing += paths[j];
            }
            rates[i * s.h + h] = crossing;
        }
        multiply(
            q, s.p, Q, left(own_T.data(), Q, q, Q, for_left), right(&dy[begin], s.inner(), Q, s.p, for_right), dx.data(), s.p,
            false);
        for (int64_t j = 0; j < q; ++j) {
            const int64_t k = j * s.h + h;
            const T* frame = rows.x + j * rows.x_row + begin;
            const float *d = &dy[j * s.inner() + begin], *dw = &dW[j * N + column];
            float* to = &dinputs[j * s.width() + begin];
            double moved = 0, self = 0, inside = 0;
            for (int64_t c = 0; c < s.p; ++c) {
                const float more = has_later ? dw[c] : 0.f;
                moved += double(frame[c]) * more;
                self += double(frame[c]) * d[c];
                inside += double(frame[c]) * dx[j * s.p + c];
                to[c] = into[k] * more + dt[j * dt_row + h] * dx[j * s.p + c] + same[k] * d[c];
            }
            departed[j] = into[k] * moved;
            both[k] = self;
            direct[k] = inside + (end - sums[k] < -FAR ? 0. : exp2_of(end - sums[k]) * moved);
        }
        double before = 0, after = 0;
        for (int64_t k = 0; k < q; ++k) {
            rates[k * s.h + h] += state_decay_grad[h] + before;
            before += departed[k];
        }
        for (int64_t k = q - 1; k >= 0; --k) rates[k * s.h + h] += after += read[k];
    }

    double dot(const float* a, const float* b) const {
        Wide sum{};
        for (int64_t c = 0; c < s.p; c += LANES) sum += load(a + c) * load(b + c);
        return total(sum);
    }

    // What comes to B and C, into `dinputs`.
    NOINLINE void through_scores(const Rows<T>& rows, const float* dt, int64_t dt_row, int64_t q, int64_t Q, int64_t w) {
        for (int64_t i = 0; i < q; ++i) {
            float* row = &dG[i * Q];
            std::fill(row + i, row + Q, 0.f);
            double self = 0;
            for (int64_t h = 0; h < s.h; ++h) self += both[i * s.h + h] * dt[i * dt_row + h];
            row[i] = float(self);
        }
        float *dB = &dinputs[s.inner()], *dC = dB + s.n;
        untwist(transposed_dB.data(), q, Q, dB);
        untwist(transposed_dC.data(), q, Q, dC);
        transposed(dG.data(), Q, Q, Q, mixed.data(), Q);
        multiply(q, s.n, K(q), left(dG.data(), Q, q, Q, for_left), frames(rows.B, rows.B_row, q, Q), dC, w, true);
        multiply(q, s.n, K(q), left(mixed.data(), Q, q, Q, for_left), frames(rows.C, rows.C_row, q, Q), dB, w, true);
    }

    static int64_t K(int64_t q) { return std::is_same_v<T, float> ? q : padded(q); }

    // (n, Q) → rows of `dinputs`.
    NOINLINE void untwist(const float* from, int64_t q, int64_t Q, float* to) {
        for (int64_t i = 0; i < q; ++i)
            for (int64_t k = 0; k < s.n; ++k) to[i * s.width() + k] = from[k * Q + i];
    }

    // Rows of B or C as a right factor.
    Factor<T> frames(const T* from, int64_t row, int64_t q, int64_t Q) {
        if constexpr (std::is_same_v<T, float>) {
            return {from, row};
        } else {
            std::fill(for_right.begin(), for_right.begin() + Q * s.n, T(0));
            for (int64_t i = 0; i < q; i += 2) {
                const bool two = i + 1 < q;
                pair(from + i * row, from + (two ? i + 1 : i) * row, 1.f, two ? 1.f : 0.f, &for_right[i * s.n], s.n);
            }
            return {for_right.data(), s.n};
        }
    }
};

}  // namespace
