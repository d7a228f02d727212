// What lies around the experts' products on CPU: the choice of experts, sorting by expert, copying
// tokens to their rows and adding rows up by token.
//
// XLA sorts where counting would do, and goes through memory once for each of the K experts of a
// token. Every sum here has a fixed order; results do not depend on the number of threads.
//
// Letters: T tokens, D hidden size, E experts, K chosen ones, N = T * K assignments, R rows.

#include <cstdint>
#include <cstring>
#include <vector>

#include "parallel.h"
#include "product.h"
#include "xla/ffi/api/ffi.h"

namespace dsmoe {
namespace {

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;
using F32Out = ffi::ResultBuffer<ffi::F32>;
using S32Out = ffi::ResultBuffer<ffi::S32>;

constexpr int64_t kPart = 256;  // rows or tokens of an item of work

// Floats as integers of the same order: -NaN < -inf < ... < -0 < 0 < ... < inf < NaN.
IntVec Key(Vec x) {
  IntVec bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits < 0 ? bits ^ 0x7fffffff : bits;
}

// The K largest of each row of scores_TE, largest first and of equals the first, and their places.
// Eight tokens at a time, one a lane: each score sinks into their lists of the best so far.
ffi::Error TopK(ffi::ThreadPool pool, F32 scores, F32Out values, S32Out places) {
  const int64_t total = scores.dimensions()[0], e = scores.dimensions()[1];
  const int64_t k = values->dimensions()[1];
  ForEachPart(pool, total, kPart, [&](int64_t first, int64_t end) {
    std::vector<float> by_expert(e * kLane);
    std::vector<IntVec> best(k), place(k);
    for (int64_t t = first; t < end; t += kLane) {
      const int64_t n = std::min(kLane, end - t);
      const float* score = scores.typed_data() + t * e;
      Transpose(score, e, n, e, by_expert.data(), kLane);
      for (int64_t i = 0; i < e; ++i) {
        IntVec key = Key(*reinterpret_cast<const Vec*>(&by_expert[i * kLane]));
        IntVec index = IntVec{} + int32_t(i), sinks{};
        for (int64_t j = 0; j < std::min(i + 1, k); ++j) {
          // What has been displaced displaces all behind it, or equals would change places.
          sinks |= j == i ? ~IntVec{} : key > best[j];
          const IntVec old_key = best[j], old_index = place[j];
          best[j] = sinks ? key : old_key;
          place[j] = sinks ? index : old_index;
          key = sinks ? old_key : key;
          index = sinks ? old_index : index;
        }
      }
      for (int64_t lane = 0; lane < n; ++lane) {
        for (int64_t j = 0; j < k; ++j) {
          const int64_t at = (t + lane) * k + j;
          places->typed_data()[at] = place[j][lane];
          values->typed_data()[at] = score[lane * e + place[j][lane]];
        }
      }
    }
  });
  return ffi::Error::Success();
}

// Sorts assignments by group, keeping the order within one; the group after the last is nobody's.
ffi::Error Group(S32 ids, S32Out order, S32Out rank, S32Out sizes) {
  const int64_t n = ids.element_count(), groups = sizes->element_count();
  const auto group = [&](int64_t i) { return std::min<uint32_t>(ids.typed_data()[i], groups); };
  std::vector<int32_t> next(groups + 2, 0);  // where the next one of a group goes
  for (int64_t i = 0; i < n; ++i) ++next[group(i) + 1];
  std::copy_n(next.begin() + 1, groups, sizes->typed_data());
  for (int64_t g = 0; g < groups; ++g) next[g + 1] += next[g];
  for (int64_t i = 0; i < n; ++i) {
    const int32_t row = next[group(i)]++;
    rank->typed_data()[i] = row;
    order->typed_data()[row] = i;
  }
  return ffi::Error::Success();
}

// rows_RD: of the token of each assignment order_R.
ffi::Error Gather(ffi::ThreadPool pool, F32 tokens, S32 order, F32Out rows, int64_t k) {
  const int64_t d = tokens.dimensions()[1];
  ForEachPart(pool, order.element_count(), kPart, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) {
      const float* from = tokens.typed_data() + order.typed_data()[r] / k * d;
      std::copy_n(from, d, rows->typed_data() + r * d);
    }
  });
  return ffi::Error::Success();
}

// y_TD: the sum over k of gates_TK times the row that rank_TK names.
ffi::Error Sum(ffi::ThreadPool pool, F32 rows, F32 gates, S32 rank, F32Out sums) {
  const int64_t d = rows.dimensions()[1], k = rank.dimensions()[1];
  ForEachPart(pool, rank.dimensions()[0], kPart, [&](int64_t first, int64_t end) {
    for (int64_t t = first; t < end; ++t) {
      const float* gate = gates.typed_data() + t * k;
      const int32_t* row = rank.typed_data() + t * k;
      float* sum = sums->typed_data() + t * d;
      ForEachVector(d, [=](int64_t at, auto left) {
        Vec total{};
        for (int64_t j = 0; j < k; ++j)
          total += gate[j] * Load(rows.typed_data() + row[j] * d + at, left);
        Store(sum + at, total, left);
      });
    }
  });
  return ffi::Error::Success();
}

// The transpose of Sum: d_rows_RD, and d_gates_TK as products of rows with d_sums.
ffi::Error SumBackward(ffi::ThreadPool pool, F32 rows, F32 gates, S32 order, F32 d_sums,
                       F32Out d_rows, F32Out d_gates) {
  const int64_t d = rows.dimensions()[1], k = gates.dimensions()[1];
  ForEachPart(pool, order.element_count(), kPart, [&](int64_t first, int64_t end) {
    for (int64_t r = first; r < end; ++r) {
      const int64_t assignment = order.typed_data()[r];
      const float* d_sum = d_sums.typed_data() + assignment / k * d;
      const float gate = gates.typed_data()[assignment];
      const float* row = rows.typed_data() + r * d;
      float* d_row = d_rows->typed_data() + r * d;
      Vec total{};
      ForEachVector(d, [&](int64_t at, auto left) {
        const Vec dy = Load(d_sum + at, left);
        total += dy * Load(row + at, left);
        Store(d_row + at, gate * dy, left);
      });
      float product = 0;
      for (int64_t i = 0; i < kLane; ++i) product += total[i];
      d_gates->typed_data()[assignment] = product;
    }
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace dsmoe

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S32 = ffi::Buffer<ffi::S32>;

XLA_FFI_DEFINE_HANDLER_SYMBOL(TopK, dsmoe::TopK,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Ret<F32>().Ret<S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Group, dsmoe::Group,
                              ffi::Ffi::Bind().Arg<S32>().Ret<S32>().Ret<S32>().Ret<S32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(Gather, dsmoe::Gather,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<S32>().Ret<F32>().Attr<int64_t>("k"));
XLA_FFI_DEFINE_HANDLER_SYMBOL(Sum, dsmoe::Sum,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<F32>().Arg<S32>().Ret<F32>());
XLA_FFI_DEFINE_HANDLER_SYMBOL(SumBackward, dsmoe::SumBackward,
                              ffi::Ffi::Bind().Ctx<ffi::ThreadPool>()
                                  .Arg<F32>().Arg<F32>().Arg<S32>().Arg<F32>()
                                  .Ret<F32>().Ret<F32>());
