// Products of float32 matrices on CPU, `C_mn (+)= A_mk B_kn`, for a narrow B and an A that is read
// once: A stays where it lies (a weight of an expert, far larger than its rows), only B is packed.
//
// A tile of C (8 x 24; 6 x 16 with AVX2 alone) is kept in registers while k runs.
// Where A is read by columns its tiles are gathered first, a block at a time; the next block is
// fetched into the cache meanwhile.

#ifndef DSMOE_JAX_MOE_NATIVE_PRODUCT_H_
#define DSMOE_JAX_MOE_NATIVE_PRODUCT_H_

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

namespace dsmoe {

constexpr int64_t kLane = 8;  // floats of a vector
// Rows of a tile of C, and vectors of each: its sums, a row of B and a number of A stay in registers.
// With more than there are, sums are stored and loaded again for every k, at half of the speed; 4 x 3
// for AVX2, which fills its 16 to the last, reached 60 % of what 6 x 2 does.
#if defined(__AVX512VL__)
constexpr int64_t kTile = 8, kVectors = 3;  // 32 registers of a vector each
#elif defined(__AVX2__)
constexpr int64_t kTile = 6, kVectors = 2;  // 16 of them
#else
constexpr int64_t kTile = 4, kVectors = 3;  // 32 of half a vector (NEON)
#endif
constexpr int64_t kPanel = kVectors * kLane;  // columns of a panel of B
constexpr int64_t kDepth = 256;               // of one pass over k: a tile of A, a panel of B fit L1
// Rows of A whose tiles are packed together.
constexpr int64_t kBlock = (kTile == 6 ? 8 : 4) * kTile;
constexpr int64_t kLine = 16;          // floats of a cache line

typedef float Vec __attribute__((vector_size(4 * kLane), aligned(4)));
typedef int32_t IntVec __attribute__((vector_size(4 * kLane), aligned(4)));

inline int64_t RoundUp(int64_t n) { return (n + kLane - 1) / kLane * kLane; }

// A whole vector: by memcpy it would pass through the stack.
using Whole = std::integral_constant<int64_t, kLane>;

inline Vec Load(const float* from, Whole) { return *reinterpret_cast<const Vec*>(from); }

inline void Store(float* to, Vec v, Whole) { *reinterpret_cast<Vec*>(to) = v; }

// Calls body(i, number of floats) for each vector of n floats; the last may be shorter.
template <typename Body>
inline void ForEachVector(int64_t n, const Body& body) {
  int64_t i = 0;
  for (; i + kLane <= n; i += kLane) body(i, Whole());
  if (i < n) body(i, n - i);
}

// The first n floats of a vector, the others 0.
inline Vec Load(const float* from, int64_t n) {
  Vec v{};
  std::memcpy(&v, from, 4 * n);
  return v;
}

inline void Store(float* to, Vec v, int64_t n) { std::memcpy(to, &v, 4 * n); }

// A matrix seen by its strides.
struct View {
  const float* at;
  int64_t row, column;
};

// to[j, i] = from[i, j] for 8 x 8 floats, in registers: pairs, then fours, then eights.
inline void Transpose8(const float* from, int64_t from_row, float* to, int64_t to_row) {
  Vec a[8], b[8];
  for (int i = 0; i < 8; ++i) a[i] = *reinterpret_cast<const Vec*>(from + i * from_row);
  for (int i = 0; i < 8; i += 2) {
    b[i] = __builtin_shufflevector(a[i], a[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
    b[i + 1] = __builtin_shufflevector(a[i], a[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
  }
  for (int i = 0; i < 8; ++i) {
    if (i & 2) continue;
    a[i] = __builtin_shufflevector(b[i], b[i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
    a[i + 2] = __builtin_shufflevector(b[i], b[i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
  }
  for (int i = 0; i < 4; ++i) {
    const Vec low = __builtin_shufflevector(a[i], a[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
    const Vec high = __builtin_shufflevector(a[i], a[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    *reinterpret_cast<Vec*>(to + i * to_row) = low;
    *reinterpret_cast<Vec*>(to + (i + 4) * to_row) = high;
  }
}

// to[j, i] = from[i, j] for i < m, j < n.
inline void Transpose(const float* from, int64_t from_row, int64_t m, int64_t n, float* to,
               int64_t to_row) {
  for (int64_t i = 0; i < m; i += 8) {
    for (int64_t j = 0; j < n; j += 8) {
      if (i + 8 <= m && j + 8 <= n) {
        Transpose8(from + i * from_row + j, from_row, to + j * to_row + i, to_row);
      } else {
        for (int64_t p = i; p < std::min(i + 8, m); ++p)
          for (int64_t q = j; q < std::min(j + 8, n); ++q)
            to[q * to_row + p] = from[p * from_row + q];
      }
    }
  }
}

// B_kn packed: panel p holds kPanel columns (the last one fewer) of all k rows, row by row.
struct Panels {
  std::vector<float> data;
  int64_t k = 0, n = 0;

  int64_t padded() const { return RoundUp(n); }
  int64_t width(int64_t first) const { return std::min<int64_t>(kPanel, padded() - first); }
  const float* panel(int64_t first) const { return data.data() + first * k; }

  void Pack(View b, int64_t rows, int64_t columns) {
    k = rows, n = columns;
    data.resize(k * padded());
    for (int64_t first = 0; first < n; first += kPanel) {
      const int64_t w = width(first), real = std::min(w, n - first);
      float* to = data.data() + first * k;
      if (b.column == 1) {
        for (int64_t i = 0; i < k; ++i, to += w) {
          const float* from = b.at + i * b.row + first;
          if (real == kPanel) {
            std::copy_n(from, kPanel, to);  // of known length: no call
          } else {
            std::copy_n(from, real, to);
            std::fill(to + real, to + w, 0.0f);
          }
        }
      } else {  // each column is a row in memory
        Transpose(b.at + first * b.column, b.column, real, k, to, w);
        for (int64_t i = 0; i < k; ++i) std::fill(to + i * w + real, to + (i + 1) * w, 0.0f);
      }
    }
  }
};

// C[m, 8 V] (+)= A[m, k] B[k, 8 V], accumulators in registers.
template <int M, int V>
inline void Tile(View a, int64_t k, const float* b, float* c, int64_t c_row, bool add, int64_t columns) {
  Vec sum[M][V];
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < V; ++v) sum[i][v] = Vec{};
    __builtin_prefetch(c + i * c_row, 1);  // to be written when the sums are there
    __builtin_prefetch(c + i * c_row + V * kLane - 1, 1);
  }
  for (int64_t p = 0; p < k; ++p) {
    Vec bs[V];
    for (int v = 0; v < V; ++v) bs[v] = *reinterpret_cast<const Vec*>(b + (p * V + v) * kLane);
    for (int i = 0; i < M; ++i) {
      const float scalar = a.at[i * a.row + p * a.column];
      for (int v = 0; v < V; ++v) sum[i][v] += scalar * bs[v];
    }
  }
  for (int i = 0; i < M; ++i) {
    for (int v = 0; v < V; ++v) {
      float* to = c + i * c_row + v * kLane;
      const int64_t left = columns - v * kLane;
      if (left >= kLane) {
        Vec& out = *reinterpret_cast<Vec*>(to);
        out = add ? out + sum[i][v] : sum[i][v];
      } else {
        for (int64_t j = 0; j < left; ++j) to[j] = add ? to[j] + sum[i][v][j] : sum[i][v][j];
      }
    }
  }
}

using TileFunction = void (*)(View, int64_t, const float*, float*, int64_t, bool, int64_t);

template <int M>
TileFunction TileOfHeight(int64_t vectors) {
  return vectors == 1 ? Tile<M, 1> : vectors == 2 ? Tile<M, 2> : Tile<M, kVectors>;
}

inline TileFunction ChooseTile(int64_t rows, int64_t vectors) {
  switch (rows) {
    case 1: return TileOfHeight<1>(vectors);
    case 2: return TileOfHeight<2>(vectors);
    case 3: return TileOfHeight<3>(vectors);
  }
  if constexpr (kTile > 4) {
    switch (rows) {
      case 4: return TileOfHeight<4>(vectors);
      case 5: return TileOfHeight<5>(vectors);
    }
  }
  if constexpr (kTile > 6) {
    switch (rows) {
      case 6: return TileOfHeight<6>(vectors);
      case 7: return TileOfHeight<7>(vectors);
    }
  }
  return TileOfHeight<kTile>(vectors);
}

// Some rows of A as tiles of kTile, each (depth, kTile): a column of A is spread over as many pages.
inline void PackTiles(View a, int64_t rows, int64_t depth, float* packed) {
  for (int64_t p = 0; p < depth; ++p) {
    const float* from = a.at + p * a.column;
    float* to = packed + p * kTile;
    int64_t i0 = 0;
    if (a.row == 1)
      for (; i0 + kTile <= rows; i0 += kTile) std::copy_n(from + i0, kTile, to + i0 * depth);
    for (; i0 < rows; i0 += kTile)
      for (int64_t i = i0; i < std::min(i0 + kTile, rows); ++i)
        to[i0 * depth + i - i0] = from[i * a.row];
  }
}

// Fetches A ahead of time, a few cache lines a call: weights come from memory, where reading rows or
// columns of a tile looks like no pattern to the hardware.
struct Prefetcher {
  View a;                 // from its first element on
  int64_t rows, depth;    // what will be read
  int64_t next = 0;

  void Fetch(int64_t n) {
    const bool by_row = a.column == 1;
    const int64_t lines = (by_row ? depth : rows) / kLine + 1;  // of one row (or column)
    const int64_t end = std::min(next + n, (by_row ? rows : depth) * lines);
    for (; next < end; ++next) {
      const int64_t major = next / lines, minor = next % lines * kLine;
      __builtin_prefetch(a.at + (by_row ? major * a.row + minor : minor + major * a.column), 0, 2);
    }
  }
};

// C[m, n] (+)= A[m, k] B[k, n]; C has rows of c_row floats.
inline void Multiply(View a, int64_t m, const Panels& b, float* c, int64_t c_row, bool add) {
  float packed[kBlock * kDepth];
  const int64_t panels = (b.n + kPanel - 1) / kPanel;
  for (int64_t k0 = 0; k0 < b.k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, b.k - k0);
    for (int64_t block = 0; block < m; block += kBlock) {
      const int64_t rows = std::min(kBlock, m - block), after = std::min(kBlock, m - block - rows);
      const View here{a.at + block * a.row + k0 * a.column, a.row, a.column};
      Prefetcher ahead{{here.at + rows * a.row, a.row, a.column}, after, depth};
      if (a.column != 1) PackTiles(here, rows, depth, packed);
      for (int64_t i0 = 0; i0 < rows; i0 += kTile) {
        View tile{here.at + i0 * a.row, a.row, 1};
        if (a.column != 1) tile = {packed + i0 * depth, 1, kTile};
        const int64_t height = std::min(kTile, rows - i0);
        for (int64_t first = 0; first < b.n; first += kPanel) {
          ahead.Fetch(kTile * kDepth / kLine / panels + 1);
          const int64_t w = b.width(first);
          ChooseTile(height, w / kLane)(tile, depth, b.panel(first) + k0 * w,
                                        c + (block + i0) * c_row + first, c_row, add || k0 > 0,
                                        std::min(w, b.n - first));
        }
      }
    }
  }
}

}  // namespace dsmoe

#endif  // DSMOE_JAX_MOE_NATIVE_PRODUCT_H_
