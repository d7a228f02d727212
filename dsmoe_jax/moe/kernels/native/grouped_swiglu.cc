// The experts' SwiGLU on CPU: grouped matrix products whose weights are read where they lie.
//
// XLA's own products pack both operands. With the hundred rows that an expert gets, packing its
// weights costs as much as it saves, and a weight gradient is written twice (product, then update
// of the stack). Here only the rows are packed; a weight is read once, a gradient written once.
//
// Rows become columns: inside, activations are transposed, (features, rows), so that every product
// is `C_mn (+)= A_mk B_kn` with a weight or a transposed activation as A, read by broadcasting, and
// B packed into panels of columns. One micro-kernel serves all nine products.
//
// Work is cut into items that share nothing they write, taken from a queue by XLA's threads; every
// sum has a fixed order, so results do not depend on the number of threads.
//
// Letters: n rows of a chunk, d hidden size, f expert width, e experts, N rows in all.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <numeric>
#include <vector>

#include "parallel.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace dsmoe {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kChunk = 240;  // rows of an expert computed together

// exp(x) to about 1e-7: 2^i times a polynomial on [-ln 2 / 2, ln 2 / 2].
Vec Exp(Vec x) {
  x = x > 88.0f ? Vec{} + 88.0f : x < -87.0f ? Vec{} - 87.0f : x;
  const Vec scaled = x * 1.44269504088896341f;
  const Vec half = scaled < 0.0f ? Vec{} - 0.5f : Vec{} + 0.5f;
  const IntVec power = __builtin_convertvector(scaled + half, IntVec);
  const Vec whole = __builtin_convertvector(power, Vec);
  const Vec r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
  Vec series = Vec{} + 1.0f / 5040;
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = series * r + c;
  const IntVec bits = (power + 127) << 23;
  Vec two_to_power;
  std::memcpy(&two_to_power, &bits, sizeof bits);
  return series * two_to_power;
}

// hidden = silu(gate) * up
void Swiglu(const float* gate, const float* up, float* hidden, int64_t n) {
  ForEachVector(n, [=](int64_t i, auto left) {
    const Vec g = Load(gate + i, left), u = Load(up + i, left);
    Store(hidden + i, g / (1.0f + Exp(-g)) * u, left);
  });
}

// From d_hidden: d_gate, d_up, and hidden again.
void SwigluBackward(const float* gate, const float* up, const float* d_hidden, float* hidden,
                    float* d_gate, float* d_up, int64_t n) {
  ForEachVector(n, [=](int64_t i, auto left) {
    const Vec g = Load(gate + i, left), u = Load(up + i, left), d = Load(d_hidden + i, left);
    const Vec sigmoid = 1.0f / (1.0f + Exp(-g)), silu = g * sigmoid;
    Store(hidden + i, silu * u, left);
    Store(d_up + i, d * silu, left);
    Store(d_gate + i, d * u * (sigmoid + silu * (1.0f - sigmoid)), left);
  });
}

// Some consecutive rows of one expert.
struct Chunk {
  int64_t expert, start, n;
};

struct Groups {
  std::vector<Chunk> chunks;            // of all experts, the largest first
  std::vector<std::vector<Chunk>> of_expert;
  int64_t rows = 0;                     // in any group; those behind are padding

  Groups(const int32_t* sizes, int64_t experts, int64_t total) : of_expert(experts) {
    for (int64_t e = 0; e < experts; ++e) {
      const int64_t size = std::max<int64_t>(0, std::min<int64_t>(sizes[e], total - rows));
      const int64_t parts = (size + kChunk - 1) / kChunk;
      const int64_t height = parts ? RoundUp((size + parts - 1) / parts) : 1;
      for (int64_t at = 0; at < size; at += height)
        of_expert[e].push_back({e, rows + at, std::min(height, size - at)});
      chunks.insert(chunks.end(), of_expert[e].begin(), of_expert[e].end());
      rows += size;
    }
    std::stable_sort(chunks.begin(), chunks.end(),
                     [](const Chunk& a, const Chunk& b) { return a.n > b.n; });
  }

  int64_t size(int64_t expert) const {
    int64_t sum = 0;
    for (const Chunk& chunk : of_expert[expert]) sum += chunk.n;
    return sum;
  }

  // The largest first.
  std::vector<int64_t> ExpertsBySize() const {
    std::vector<int64_t> experts(of_expert.size());
    std::iota(experts.begin(), experts.end(), 0);
    std::stable_sort(experts.begin(), experts.end(),
                     [&](int64_t a, int64_t b) { return size(a) > size(b); });
    return experts;
  }
};

using F32 = ffi::Buffer<ffi::F32>;
using F32Out = ffi::ResultBuffer<ffi::F32>;

// rows_ND, sizes_E, gate_EFD, up_EFD, down_EDF -> out_ND and what the gradients need: the two
// projections, each expert's chunk (f, n) at offset start * f.
ffi::Error Forward(ffi::ThreadPool pool, F32 rows, ffi::Buffer<ffi::S32> sizes, F32 gate, F32 up,
                   F32 down, F32Out out, F32Out gate_out, F32Out up_out) {
  const int64_t total = rows.dimensions()[0], d = rows.dimensions()[1], f = gate.dimensions()[1];
  const Groups groups(sizes.typed_data(), sizes.element_count(), total);
  float* y = out->typed_data();
  std::fill(y + groups.rows * d, y + total * d, 0.0f);
  ForEach(pool, groups.chunks.size(), [&](int64_t i) {
    const Chunk& chunk = groups.chunks[i];
    const int64_t n = chunk.n, weight = chunk.expert * f * d;
    thread_local Panels x, h;
    thread_local std::vector<float> hidden, transposed;
    hidden.resize(f * n), transposed.resize(d * n);
    float* g = gate_out->typed_data() + chunk.start * f;
    float* u = up_out->typed_data() + chunk.start * f;
    x.Pack({rows.typed_data() + chunk.start * d, 1, d}, d, n);
    Multiply({gate.typed_data() + weight, d, 1}, f, x, g, n, false);
    Multiply({up.typed_data() + weight, d, 1}, f, x, u, n, false);
    Swiglu(g, u, hidden.data(), f * n);
    h.Pack({hidden.data(), n, 1}, f, n);
    Multiply({down.typed_data() + weight, f, 1}, d, h, transposed.data(), n, false);
    Transpose(transposed.data(), n, d, n, y + chunk.start * d, d);
  });
  return ffi::Error::Success();
}

// The same inputs, the projections and d_out_ND -> d_rows_ND, the gradients of the three weights,
// and scratch for hidden, d_gate, d_up in the layout of the projections.
ffi::Error Backward(ffi::ThreadPool pool, F32 rows, ffi::Buffer<ffi::S32> sizes, F32 gate, F32 up,
                    F32 down, F32 gates, F32 ups, F32 d_out, F32Out d_rows, F32Out d_gate,
                    F32Out d_up, F32Out d_down, F32Out hiddens, F32Out d_gates, F32Out d_ups) {
  const int64_t total = rows.dimensions()[0], d = rows.dimensions()[1], f = gate.dimensions()[1];
  const Groups groups(sizes.typed_data(), sizes.element_count(), total);
  float* dx = d_rows->typed_data();
  std::fill(dx + groups.rows * d, dx + total * d, 0.0f);
  const auto rows_of = [&](const Chunk& chunk) {
    const int64_t n = chunk.n, weight = chunk.expert * f * d, at = chunk.start * f;
    thread_local Panels dy, dg, du;
    thread_local std::vector<float> d_hidden, transposed;
    d_hidden.resize(f * n), transposed.resize(d * n);
    dy.Pack({d_out.typed_data() + chunk.start * d, 1, d}, d, n);
    Multiply({down.typed_data() + weight, 1, f}, f, dy, d_hidden.data(), n, false);
    SwigluBackward(gates.typed_data() + at, ups.typed_data() + at, d_hidden.data(),
                     hiddens->typed_data() + at, d_gates->typed_data() + at,
                     d_ups->typed_data() + at, f * n);
    dg.Pack({d_gates->typed_data() + at, n, 1}, f, n);
    du.Pack({d_ups->typed_data() + at, n, 1}, f, n);
    Multiply({gate.typed_data() + weight, 1, d}, d, dg, transposed.data(), n, false);
    Multiply({up.typed_data() + weight, 1, d}, d, du, transposed.data(), n, true);
    Transpose(transposed.data(), n, d, n, dx + chunk.start * d, d);
  };
  // Of expert e, over all its chunks: the gradient of down, or those of gate and up.
  const auto weights_of = [&](int64_t e, bool of_down) {
    const int64_t weight = e * f * d;
    const std::vector<Chunk>& chunks = groups.of_expert[e];
    float* dg = d_gate->typed_data() + weight;
    float* du = d_up->typed_data() + weight;
    float* dd = d_down->typed_data() + weight;
    if (chunks.empty()) {
      for (float* zero : of_down ? std::vector{dd} : std::vector{dg, du})
        std::fill_n(zero, f * d, 0.0f);
    }
    thread_local Panels x, h;
    for (size_t c = 0; c < chunks.size(); ++c) {
      const int64_t n = chunks[c].n, at = chunks[c].start;
      if (of_down) {
        h.Pack({hiddens->typed_data() + at * f, 1, n}, n, f);
        Multiply({d_out.typed_data() + at * d, 1, d}, d, h, dd, f, c > 0);
      } else {
        x.Pack({rows.typed_data() + at * d, d, 1}, n, d);
        Multiply({d_gates->typed_data() + at * f, n, 1}, f, x, dg, d, c > 0);
        Multiply({d_ups->typed_data() + at * f, n, 1}, f, x, du, d, c > 0);
      }
    }
  };
  const std::vector<int64_t> experts = groups.ExpertsBySize();
  if (2 * pool.num_threads() * groups.size(experts[0]) <= groups.rows) {
    // Expert by expert, so that its weights find in the cache what its rows have left there.
    ForEach(pool, experts.size(), [&](int64_t i) {
      for (const Chunk& chunk : groups.of_expert[experts[i]]) rows_of(chunk);
      for (bool of_down : {true, false}) weights_of(experts[i], of_down);
    });
  } else {  // one expert would keep a thread busy while the others wait
    ForEach(pool, groups.chunks.size(), [&](int64_t i) { rows_of(groups.chunks[i]); });
    ForEach(pool, 2 * experts.size(), [&](int64_t i) { weights_of(experts[i / 2], i % 2); });
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsmoe

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    GroupedSwigluForward, dsmoe::Forward,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<S32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Ret<F32>().Ret<F32>().Ret<F32>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(
    GroupedSwigluBackward, dsmoe::Backward,
    ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
        .Arg<F32>().Arg<S32>().Arg<F32>().Arg<F32>().Arg<F32>()
        .Arg<F32>().Arg<F32>().Arg<F32>()
        .Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>().Ret<F32>());
