// What a Mamba-2 mixer does between its two projections, on a CPU: convolution, scan and gate of one sequence after the
// other, chunk by chunk, in buffers that stay in a core's cache; and the gradients of that.
//
//     xBC → causal conv, SiLU → x, B, C      y = scan(x, dt, A, B, C, D)      y · SiLU(z) / rms
//
// Each of convolution and gate may be absent; the scan alone is the function of `bsmamba2.ssd`. Besides, the RMS norm of a
// frame. A thread takes whole sequences. What is done with one is in `forward.h` and `backward.h`; here are the operators,
// which `bsmamba2.kernels.cpu` builds when they are first wanted.

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <optional>

#include "backward.h"

namespace {

template <typename T>
const T* of(const Tensor& x, int64_t sequence) {
    return x.const_data_ptr<T>() + sequence * x.stride(0);
}

// The frames of a sequence in the order in which they are read: backwards, the first is the last that is stored.
template <typename T>
struct Frames {
    T* first;
    int64_t row;

    Frames(T* stored, const Tensor& x, int64_t sequence, bool backwards)
        : first(stored + sequence * x.stride(0) + (backwards ? (x.size(1) - 1) * x.stride(1) : 0)),
          row(backwards ? -x.stride(1) : x.stride(1)) {}

    T* at(int64_t frame) const { return first + frame * row; }
};

// x, B, C and z: (b, t, ·), contiguous rows; the state (b, n, h·p). With taps, x is all three before the convolution.
struct Inputs {
    Tensor x, B, C, dt, A, D;
    std::optional<Tensor> z, taps, bias, before, state;
    double eps;
    bool backwards;

    template <typename T>
    Frames<const T> read(const Tensor& x, int64_t b) const {
        return {x.const_data_ptr<T>(), x, b, backwards};
    }
    template <typename T>
    Frames<T> written(const Tensor& x, int64_t b) const {
        return {x.mutable_data_ptr<T>(), x, b, backwards};
    }
    // Without a convolution: factors of products as they are stored, whose rows must go forwards.
    template <typename T>
    Rows<T> rows(int64_t b, int64_t from) const {
        const auto at = [&](const Tensor& x) { return of<T>(x, b) + from * x.stride(1); };
        return {at(x), at(B), at(C), x.stride(1), B.stride(1), C.stride(1)};
    }
};

// A chunk's x, B and C: as they are given, or from the convolution, into a buffer.
template <typename T>
Rows<T> frames(const Sizes& s, const Inputs& in, int64_t b, int64_t from, int64_t q, T* to, float* argument = nullptr) {
    if (!s.taps) return in.rows<T>(b, from);
    const auto x = in.read<T>(in.x, b);
    convolve(
        s, x.first, x.row, of<T>(*in.before, b), in.taps->const_data_ptr<float>(), in.bias->const_data_ptr<float>(), from, q,
        to, argument);
    return {to, to + s.inner(), to + s.inner() + s.n, s.width(), s.width(), s.width()};
}

template <typename From, typename To>
void converted(const From* from, int64_t width, To* to) {
    for (int64_t c = 0; c < width; c += LANES) store(load(from + c), to + c);
}

template <typename T>
Tensor run(const Sizes& s, const Inputs& in, bool keep, const Tensor& y) {
    Tensor last = at::empty({keep ? s.b : 0, s.n, s.inner()}, in.dt.options());
    at::parallel_for(0, s.b, 1, [&](int64_t begin, int64_t end) {
        Sequence<T> sequence(s, in.A.const_data_ptr<float>(), in.D.const_data_ptr<float>());
        for (int64_t b = begin; b < end; ++b) {
            const auto steps = in.read<float>(in.dt, b);
            const auto to = in.written<T>(y, b);
            sequence.begin(in.state ? of<float>(*in.state, b) : nullptr);
            for (int64_t from = 0; from < s.t; from += s.q) {
                const int64_t q = std::min(s.q, s.t - from);
                const Rows<T> rows = frames(s, in, b, from, q, sequence.convolved.data());
                sequence.chunk(rows, steps.at(from), steps.row, q, keep || from + q < s.t);
                for (int64_t i = 0; i < q; ++i) {
                    float* frame = &sequence.found[i * s.inner()];
                    if (in.z) {
                        const auto z = in.read<T>(*in.z, b);
                        gate(frame, z.at(from + i), z.row, float(in.eps), s.inner(), to.at(from + i));
                    } else {
                        converted(frame, s.inner(), to.at(from + i));
                    }
                }
            }
            if (keep)
                scaled(
                    sequence.state.data(), sequence.state.size(), MIDDLE, last.mutable_data_ptr<float>() + b * s.n * s.inner());
        }
        at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
    });
    return last;
}

// What came in, by its gradients; dz, dx, dB and dC: (b, t, ·), contiguous rows, given; with taps, dx is that of all three
// before the convolution. Those that lie once in the model, A, D, taps and bias, come for each sequence.
struct Outputs {
    std::optional<Tensor> dz;
    Tensor dx, dB, dC;
    Tensor ddt, dA, dD, dtaps, dbias, dbefore, dstate;
};

template <typename To, typename From>
void copy(const std::vector<From>& from, const Tensor& to, int64_t b) {
    std::copy(from.begin(), from.end(), to.mutable_data_ptr<To>() + b * int64_t(from.size()));
}

template <typename T>
void run_back(
    const Sizes& s, const Inputs& in, const Tensor& dy, const std::optional<Tensor>& dlast, const Outputs& outputs) {
    const int64_t chunks = (s.t + s.q - 1) / s.q;
    at::parallel_for(0, s.b, 1, [&](int64_t begin, int64_t end) {
        Gradients<T> g(s, in.A.const_data_ptr<float>(), in.D.const_data_ptr<float>());
        std::vector<std::vector<float>> states(chunks + 1);  // before each chunk, and behind the last
        for (int64_t b = begin; b < end; ++b) {
            const auto steps = in.read<float>(in.dt, b);
            const auto gradients = in.read<T>(dy, b);
            const auto ddt = in.written<float>(outputs.ddt, b);
            const auto dx = in.written<T>(outputs.dx, b);
            g.begin(in.state ? of<float>(*in.state, b) : nullptr);
            g.begin_back(dlast ? of<float>(*dlast, b) : nullptr);
            for (int64_t c = 0; c < chunks; ++c) {
                if (g.has_state) states[c] = g.state;
                const int64_t from = c * s.q, q = std::min(s.q, s.t - from);
                if (c + 1 == chunks && !dlast) break;
                const Rows<T> rows = frames(s, in, b, from, q, g.convolved.data());
                g.absorb(rows, steps.at(from), steps.row, q);
            }
            if (dlast) states[chunks] = g.state;  // else nothing asks for it
            for (int64_t c = chunks - 1; c >= 0; --c) {
                const int64_t from = c * s.q, q = std::min(s.q, s.t - from);
                const bool earlier = c > 0 || in.state;
                const Rows<T> rows = frames(s, in, b, from, q, g.convolved.data(), g.argument.data());
                g.has_state = earlier;
                if (earlier) g.state.swap(states[c]);
                g.chunk(rows, steps.at(from), steps.row, q, false);
                for (int64_t i = 0; i < q; ++i) {
                    const T* gradient = gradients.at(from + i);
                    if (in.z)
                        g.gate_back(
                            rows, i, in.read<T>(*in.z, b).at(from + i), gradient, float(in.eps),
                            in.written<T>(*outputs.dz, b).at(from + i));
                    else
                        converted(gradient, s.inner(), &g.dy[i * s.inner()]);
                }
                g.chunk_back(
                    rows, steps.at(from), steps.row, q, states[c + 1].data(), earlier, ddt.at(from), ddt.row);
                if (s.taps) {
                    const auto x = in.read<T>(in.x, b);
                    g.convolve_back(
                        x.first, x.row, of<T>(*in.before, b), in.taps->const_data_ptr<float>(), from, q, dx.at(from), dx.row,
                        outputs.dbefore.mutable_data_ptr<T>() + b * outputs.dbefore.stride(0));
                } else {
                    const auto dB = in.written<T>(outputs.dB, b), dC = in.written<T>(outputs.dC, b);
                    for (int64_t i = 0; i < q; ++i) {
                        const float* frame = &g.dinputs[i * s.width()];
                        converted(frame, s.inner(), dx.at(from + i));
                        converted(frame + s.inner(), s.n, dB.at(from + i));
                        converted(frame + s.inner() + s.n, s.n, dC.at(from + i));
                    }
                }
                if (earlier) g.state.swap(states[c]);
            }
            copy<float>(g.dA, outputs.dA, b);
            copy<float>(g.dD, outputs.dD, b);
            copy<float>(g.dtaps, outputs.dtaps, b);
            copy<float>(g.dbias, outputs.dbias, b);
            if (in.state)
                scaled(
                    g.later.data(), g.later.size(), -MIDDLE, outputs.dstate.mutable_data_ptr<float>() + b * s.n * s.inner());
        }
        at::native::cpublas::brgemm_release(!std::is_same_v<T, float>);
    });
}

Tensor dispatch(const Sizes& s, const Inputs& in, bool keep, const Tensor& y) {
    return in.x.scalar_type() == at::kFloat ? run<float>(s, in, keep, y) : run<BFloat16>(s, in, keep, y);
}

// Pointers know no sizes: a tensor that does not fit is an error here, before anything is read or written. `rows` may lie
// anywhere, if each is contiguous and none overlaps the next; what is not rows is contiguous as a whole.
void require(const char* name, const Tensor& x, at::IntArrayRef sizes, at::ScalarType type, bool rows = false) {
    TORCH_CHECK(
        x.device().is_cpu() && x.scalar_type() == type && x.sizes() == sizes, "bsmamba2: ", name, " is ", x.sizes(), " of ",
        x.scalar_type(), " on ", x.device(), ", and must be ", sizes, " of ", type, " on cpu");
    const bool apart = rows && x.stride(2) == 1 && (x.size(1) < 2 || x.stride(1) >= x.size(2));
    TORCH_CHECK(x.numel() == 0 || apart || x.is_contiguous(), "bsmamba2: ", name, " is not contiguous: ", x.strides());
}

// The sizes of a problem, after a check of everything that comes in. x: (b, t, h·p), or with taps (b, t, h·p + 2n).
Sizes checked(const Inputs& in, int64_t chunk) {
    const Tensor& one = in.z ? *in.z : in.x;
    TORCH_CHECK(
        in.x.dim() == 3 && one.dim() == 3 && in.B.dim() == 3 && in.A.dim() == 1 && (!in.taps || in.taps->dim() == 2),
        "bsmamba2: x, B, C and z have 3 axes, A has 1, taps has 2");
    const int64_t h = in.A.size(0), inner = one.size(2), taps = in.taps ? in.taps->size(0) : 0;
    const int64_t n = in.taps ? (in.x.size(2) - inner) / 2 : in.B.size(2);
    TORCH_CHECK(
        h > 0 && inner > 0 && inner % (32 * h) == 0 && n > 0 && n % 32 == 0 && (!in.taps || taps > 0),
        "bsmamba2: ", inner, " features in ", h, " heads and a state of ", n, " are not multiples of 32 for each head, or there is no tap");
    TORCH_CHECK(chunk > 0 && chunk <= 1024 && in.x.size(1) > 0, "bsmamba2: there must be a frame, and a chunk of 1 to 1,024");
    const Sizes s{in.x.size(0), in.x.size(1), h, inner / h, n, chunk, taps};
    const auto type = in.x.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "bsmamba2: x is ", type, ", and must be float32 or bfloat16");
    require("dt", in.dt, {s.b, s.t, h}, at::kFloat, true);
    require("A", in.A, {h}, at::kFloat);
    require("D", in.D, {h}, at::kFloat);
    if (in.state) require("state", *in.state, {s.b, n, inner}, at::kFloat);
    require("x", in.x, {s.b, s.t, in.taps ? s.width() : inner}, type, true);
    if (in.taps) {
        require("z", *in.z, {s.b, s.t, inner}, type, true);
        require("taps", *in.taps, {taps, s.width()}, at::kFloat);
        require("bias", *in.bias, {s.width()}, at::kFloat);
        require("before", *in.before, {s.b, taps - 1, s.width()}, type);
    } else {
        require("B", in.B, {s.b, s.t, n}, type, true);
        require("C", in.C, {s.b, s.t, n}, type, true);
    }
    return s;
}

void check_gradients(const Sizes& s, const Inputs& in, const Tensor& dy, const std::optional<Tensor>& dlast) {
    require("dy", dy, {s.b, s.t, s.inner()}, in.x.scalar_type(), true);
    if (dlast) require("dlast", *dlast, {s.b, s.n, s.inner()}, at::kFloat);
}

std::tuple<Tensor, Tensor> scan(
    const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const Tensor& D,
    const std::optional<Tensor>& state, int64_t chunk, bool keep) {
    const Inputs in{x, B, C, dt, A, D, {}, {}, {}, {}, state, 0, false};
    const Sizes s = checked(in, chunk);
    Tensor y = at::empty(x.sizes(), x.options());
    return {y, dispatch(s, in, keep, y)};
}

Tensor conv_scan_gate(
    const Tensor& z, const Tensor& xBC, const Tensor& dt, const Tensor& A, const Tensor& D, const Tensor& taps,
    const Tensor& bias, const Tensor& before, const std::optional<Tensor>& state, double eps, int64_t chunk, bool backwards,
    bool keep, Tensor y) {
    const Inputs in{xBC, xBC, xBC, dt, A, D, z, taps, bias, before, state, eps, backwards};
    const Sizes s = checked(in, chunk);
    require("y", y, {s.b, s.t, s.inner()}, xBC.scalar_type(), true);
    return dispatch(s, in, keep, y);
}

Outputs outputs_for(const Sizes& s, const Inputs& in, const Tensor& dx) {
    const auto floats = in.dt.options();
    Outputs made;
    made.dx = dx;
    made.ddt = at::empty({s.b, s.t, s.h}, floats);
    made.dA = at::empty({s.b, s.h}, floats);
    made.dD = at::empty({s.b, s.h}, floats);
    made.dtaps = at::empty({s.b, s.taps, s.taps ? s.width() : 0}, floats);
    made.dbias = at::empty({s.b, s.taps ? s.width() : 0}, floats);
    made.dstate = at::empty({in.state ? s.b : 0, s.n, s.inner()}, floats);
    return made;
}

void dispatch_back(
    const Sizes& s, const Inputs& in, const Tensor& dy, const std::optional<Tensor>& dlast, const Outputs& outputs) {
    if (in.x.scalar_type() == at::kFloat) run_back<float>(s, in, dy, dlast, outputs);
    else run_back<BFloat16>(s, in, dy, dlast, outputs);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> scan_backward(
    const Tensor& dy, const std::optional<Tensor>& dlast, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
    const Tensor& C, const Tensor& D, const std::optional<Tensor>& state, int64_t chunk) {
    const Inputs in{x, B, C, dt, A, D, {}, {}, {}, {}, state, 0, false};
    const Sizes s = checked(in, chunk);
    check_gradients(s, in, dy, dlast);
    Outputs outputs = outputs_for(s, in, at::empty({s.b, s.t, s.inner()}, x.options()));
    outputs.dB = at::empty({s.b, s.t, s.n}, x.options());
    outputs.dC = at::empty({s.b, s.t, s.n}, x.options());
    dispatch_back(s, in, dy, dlast, outputs);
    return {outputs.dx, outputs.ddt, outputs.dA, outputs.dB, outputs.dC, outputs.dD, outputs.dstate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> conv_scan_gate_backward(
    const Tensor& dy, const std::optional<Tensor>& dlast, const Tensor& z, const Tensor& xBC, const Tensor& dt,
    const Tensor& A, const Tensor& D, const Tensor& taps, const Tensor& bias, const Tensor& before,
    const std::optional<Tensor>& state, double eps, int64_t chunk, bool backwards, Tensor dz, Tensor dxBC) {
    const Inputs in{xBC, xBC, xBC, dt, A, D, z, taps, bias, before, state, eps, backwards};
    const Sizes s = checked(in, chunk);
    check_gradients(s, in, dy, dlast);
    require("dz", dz, z.sizes(), z.scalar_type(), true);
    require("dxBC", dxBC, xBC.sizes(), z.scalar_type(), true);
    Outputs outputs = outputs_for(s, in, dxBC);
    outputs.dz = dz;
    outputs.dbefore = at::empty_like(before);
    dispatch_back(s, in, dy, dlast, outputs);
    return {outputs.ddt, outputs.dA, outputs.dD, outputs.dtaps, outputs.dbias, outputs.dbefore, outputs.dstate};
}

Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps) {
    const int64_t width = weight.numel();
    TORCH_CHECK(width > 0 && width % 32 == 0, "bsmamba2: the width of a norm is ", width, ", and must be a multiple of 32");
    TORCH_CHECK(x.dim() > 0 && x.size(-1) == width, "bsmamba2: x is ", x.sizes(), ", and its last axis must be ", width);
    const auto type = x.scalar_type();
    TORCH_CHECK(type == at::kFloat || type == at::kBFloat16, "bsmamba2: x is ", type, ", and must be float32 or bfloat16");
    require("x", x, x.sizes(), type);
    require("weight", weight, {width}, at::kFloat);
    Tensor y = at::empty_like(x);
    const float* gain = weight.const_data_ptr<float>();
    at::parallel_for(0, x.numel() / width, 256, [&](int64_t begin, int64_t end) {
        const auto run = [&](const auto* from, auto* to) {
            normalise(from + begin * width, gain, float(eps), end - begin, width, to + begin * width);
        };
        if (type == at::kFloat) run(x.const_data_ptr<float>(), y.mutable_data_ptr<float>());
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
        "conv_scan_gate(Tensor z, Tensor xBC, Tensor dt, Tensor A, Tensor D, Tensor taps, Tensor bias, Tensor before, Tensor? state, "
        "float eps, int chunk, bool backwards, bool keep, Tensor(a!) y) -> Tensor");
    library.def(
        "scan_backward(Tensor dy, Tensor? dlast, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor D, Tensor? state, "
        "int chunk) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def(
        "conv_scan_gate_backward(Tensor dy, Tensor? dlast, Tensor z, Tensor xBC, Tensor dt, Tensor A, Tensor D, Tensor taps, Tensor bias, "
        "Tensor before, Tensor? state, float eps, int chunk, bool backwards, Tensor(a!) dz, Tensor(b!) dxBC) -> "
        "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
    library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
}

TORCH_LIBRARY_IMPL(bsmamba2, CPU, library) {
    library.impl("scan", scan);
    library.impl("conv_scan_gate", conv_scan_gate);
    library.impl("scan_backward", scan_backward);
    library.impl("conv_scan_gate_backward", conv_scan_gate_backward);
    library.impl("rms_norm", rms_norm);
}
