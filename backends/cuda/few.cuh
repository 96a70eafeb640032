#pragma once
// Products with at most eight rows of activations: what linear_few and experts_few share.
//
// The rows lie in shared memory as f16, or f32 for f32 weights.  The units of work are 16 rows of a matrix (4 of an f32
// one); a unit's strips are dealt out to `split` warps, whose sums meet in shared memory and are added in their order.
// So a row's arithmetic depends on the matrices alone: not on how many rows there are, nor on time.
//
// Between two uses of a kernel a layer's weights pass through the caches, so its code comes from memory, and fetching
// it takes longer than running it once.  Hence kernels for one type and one row, and loops that are not unrolled: the
// code that a decode step runs is to be short.

#include <cuda_fp16.h>

#include <cstdint>

#include "backends/cuda/fragments.cuh"
#include "backends/cuda/launch.cuh"
#include "backends/cuda/scalar.cuh"
#include "backends/cuda/weights.hpp"

namespace qwen3next::cuda {

inline constexpr int few_rows = 8;  // an n8 tile
inline constexpr int f32_unit_rows = 4, f32_strip_cols = 128;
inline constexpr int most_depth = 4;  // strips that a warp has asked for

__host__ __device__ constexpr int unit_rows(DType type) { return type == DType::f32 ? f32_unit_rows : strip_rows; }
__host__ __device__ inline int units_of(const Matrix& m) {
  return (m.rows + unit_rows(m.type) - 1) / unit_rows(m.type);
}

// The types that a kernel is compiled for.
enum Types : unsigned { q4_k_alone = 1, q6_k_alone = 2, f32_alone = 4, usual_types = 7, all_types = 15 };
__host__ __device__ constexpr unsigned types_of(DType type) {
  return type == DType::q4_k ? 1 : type == DType::q6_k ? 2 : type == DType::f32 ? 4 : 8;
}
// Whether `type` is `one`, in a kernel for `types`: known beforehand where they are one.
template <unsigned types>
__device__ __forceinline__ bool is(DType type, Types one) {
  return types == one || ((types & one) != 0 && types_of(type) == one);
}
// Those that big models mostly come in.
__host__ __device__ constexpr bool usual(DType type) { return (types_of(type) & usual_types) != 0; }

// Warps that share a unit, as a power of two: the largest that leaves none idle.
inline int log2_split_of(int warps, int strips) {
  int log2 = 0;
  while (2 << log2 <= warps && 2 << log2 <= strips) ++log2;
  return log2;
}

// To f16, beyond its range the largest there is; a NaN stays one.
__device__ __forceinline__ __half2 to_halves(float a, float b) {
  const __half2 most = __float2half2_rn(65504);
  return __hmax2_nan(__hmin2_nan(__floats2half2_rn(a, b), most), __hneg2(most));
}
__device__ __forceinline__ uint4 eight_halves(const float (&v)[8]) {
  uint4 bits;
  auto* pair = reinterpret_cast<__half2*>(&bits);
#pragma unroll
  for (int k = 0; k < 4; ++k) pair[k] = to_halves(v[2 * k], v[2 * k + 1]);
  return bits;
}
__device__ __forceinline__ float sum_of_halves(const uint4& bits) {
  const auto* pair = reinterpret_cast<const __half2*>(&bits);
  float sum = 0;
#pragma unroll
  for (int k = 0; k < 4; ++k) {
    const float2 two = __half22float2(pair[k]);
    sum += two.x + two.y;
  }
  return sum;
}
// The same of v, and of what that left.
__device__ __forceinline__ __half2 in_two_parts(float v) {
  const float high = __low2float(to_halves(v, 0));
  return to_halves(high, v - high);
}

__device__ __forceinline__ float half_to_float(std::uint16_t bits) { return __half2float(__ushort_as_half(bits)); }

// *at += value, without waiting for what was there; nobody else may add to it meanwhile.
__device__ __forceinline__ void add_to_memory(float* at, float value) {
  asm volatile("red.relaxed.gpu.global.add.f32 [%0], %1;" ::"l"(at), "f"(value) : "memory");
}

// Asks for the line of memory that `at` lies in.
__device__ __forceinline__ void prefetch(const void* at) { asm volatile("prefetch.global.L2 [%0];" ::"l"(at)); }

__host__ __device__ inline int row_stride(int strips) { return strips * strip_cols + 32; }  // neighbours in other banks
inline int bytes_of_rows(unsigned types, int rows, int strips) {
  return rows * ((types != f32_alone ? 2 * row_stride(strips) + 32 * strips : 0) +
                 ((types & f32_alone) != 0 ? 4 * strips * strip_cols : 0));
}

// Rows of activations in shared memory, for weights of `types`.
template <unsigned types>
struct SharedRows {
  static constexpr bool with_half = types != f32_alone;

  std::uint16_t* half;   // [rows, stride]
  std::uint16_t* upper;  // [rows, 8 strips]: sums of 32 columns, and what rounding them to f16 left
  std::uint16_t* lower;
  float* single;  // [rows, 256 strips], if there are f32 weights
  int rows, strips;
  bool with_single;

  __device__ SharedRows(std::byte* at, int n_rows, int n_strips, bool singles)
      : single(reinterpret_cast<float*>(at)),
        rows(n_rows),
        strips(n_strips),
        with_single(types == f32_alone || ((types & f32_alone) != 0 && singles)) {
    half = reinterpret_cast<std::uint16_t*>(at + (with_single ? rows * strips * strip_cols * 4 : 0));
    upper = half + rows * row_stride(strips);
    lower = upper + rows * 8 * strips;
  }

  // Eight columns from 8 i of a row, by all lanes of a warp: neighbours have neighbouring i.
  __device__ __forceinline__ void store(int row, int i, const float (&v)[8]) const {
    if constexpr (with_half) store_bits(row, i, eight_halves(v));
    if (with_single) {
      auto* to = reinterpret_cast<float4*>(single + row * strips * strip_cols + 8 * i);
      to[0] = make_float4(v[0], v[1], v[2], v[3]), to[1] = make_float4(v[4], v[5], v[6], v[7]);
    }
  }
  __device__ __forceinline__ void store_bits(int row, int i, uint4 bits) const {
    *reinterpret_cast<uint4*>(half + row * row_stride(strips) + 8 * i) = bits;
    float sum = sum_of_halves(bits);
    sum += __shfl_xor_sync(0xffffffff, sum, 1);
    sum += __shfl_xor_sync(0xffffffff, sum, 2);
    if (i % 4 == 0) {
      const __half2 parts = in_two_parts(sum);
      upper[row * 8 * strips + i / 4] = __half_as_ushort(__low2half(parts));
      lower[row * 8 * strips + i / 4] = __half_as_ushort(__high2half(parts));
    }
  }

  // What a lane needs of activation row `row` for strip s.
  __device__ __forceinline__ StripInput input(int row, int s, int lane) const {
    const int t = lane % 4, sums = row * 8 * strips + s * 8 + 2 * t;
    return {reinterpret_cast<const uint4*>(half + row * row_stride(strips) + s * strip_cols) + t,
            reinterpret_cast<const std::uint32_t*>(upper + sums), reinterpret_cast<const std::uint32_t*>(lower + sums)};
  }
};

// Eight neighbours, aligned.
__device__ __forceinline__ void load_eight(float (&v)[8], const float* at) {
  // Not to be kept in L1: what earlier kernels write is read once.
  const float4 a = __ldcg(reinterpret_cast<const float4*>(at)), b = __ldcg(reinterpret_cast<const float4*>(at) + 1);
  v[0] = a.x, v[1] = a.y, v[2] = a.z, v[3] = a.w, v[4] = b.x, v[5] = b.y, v[6] = b.z, v[7] = b.w;
}
// Eight neighbours of a row; those beyond `cols` are 0.
__device__ __forceinline__ void load_eight(float (&v)[8], const float* row, int begin, int cols) {
  if (begin + 8 <= cols && aligned_to_16(row)) return load_eight(v, row + begin);
#pragma unroll
  for (int k = 0; k < 8; ++k) v[k] = begin + k < cols ? row[begin + k] : 0.0f;
}

// A row as it is: x.half, or x.data if f32 is wanted too.
template <unsigned types>
__device__ __forceinline__ void prepare_plain_row(const SharedRows<types>& to, const CudaTensor& x, int n) {
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int chunks = to.strips * strip_cols / 8;
  const std::ptrdiff_t row = n * x.stride;
  const bool whole = x.n_cols % 8 == 0 && aligned_to_16(x.half + row);
#pragma unroll 1
  for (int i = thread; i < chunks; i += threads) {
    if (whole && !to.with_single) {
      uint4 bits = make_uint4(0, 0, 0, 0);
      if (8 * i < x.n_cols) bits = __ldcg(reinterpret_cast<const uint4*>(x.half + row + 8 * i));
      to.store_bits(n, i, bits);
      continue;
    }
    float v[8];
#pragma unroll 1
    for (int k = 0; k < 8; ++k) {
      const int c = 8 * i + k;
      v[k] = c >= x.n_cols ? 0.0f : to.with_single ? __ldcg(x.data + row + c) : half_to_float(__ldcg(x.half + row + c));
    }
    to.store(n, i, v);
  }
}

// 16 rows of a matrix (4 of an f32 one): where they begin, and the row of activations that they are multiplied with.
struct Unit {
  const std::byte* data;  // from the beginning of what `pick` picked, if that is not -1
  int row;                // -1: all
  int pick = -1;
};

// What is asked for at once: one run of bytes, or of f32 128 columns of four rows that are `row_bytes` apart.
struct Piece {
  const std::byte* from;  // from the beginning of what `pick` picked, if that is not -1
  int pick, bytes, row_bytes;
};

// A warp's share of shared memory for weights on their way: strips are asked for `depth` ahead, whatever their type.
// From compute capability 9.0 on by bulk copies, an instruction each, which tell a barrier in shared memory when they
// are done; before by cp.async.
class StripRing {
 public:
  StripRing(const StripRing&) = delete;
  __device__ StripRing(std::byte* at, std::uint64_t* barriers, int slot_bytes, int depth, int warp, int lane)
      : slots_(address(at) + static_cast<std::uint32_t>(warp * depth * slot_bytes)),
        start_(at + warp * depth * slot_bytes),
        barriers_(address(barriers + warp * most_depth)),
        slot_bytes_(slot_bytes),
        depth_(depth) {
#if __CUDA_ARCH__ >= 900
    if (lane < depth) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barriers_ + 8 * lane) : "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    __syncwarp();
#endif
  }

  template <class Cursor>
  __device__ __forceinline__ void fill(Cursor& cursor, int lane) {
#pragma unroll 1
    for (int i = 0; i < depth_; ++i) ask(cursor, lane);
  }

  // Asks for what `cursor` has next; to be called also when there is nothing more.
  template <class Cursor>
  __device__ __forceinline__ void ask(Cursor& cursor, int lane) {
    Piece piece;
    if (cursor.next(piece))
      ask(cursor.address(piece), piece, lane);
    else
      ask_nothing();
  }
  // fill() in two steps, where it is not known yet what was picked.
  template <class Cursor>
  __device__ __forceinline__ void plan(Cursor& cursor, Piece (&pieces)[most_depth]) const {
#pragma unroll
    for (int i = 0; i < most_depth; ++i) {
      pieces[i].bytes = 0;
      if (i < depth_) cursor.next(pieces[i]);
    }
  }
  template <class Cursor>
  __device__ __forceinline__ void fill(const Cursor& cursor, const Piece (&pieces)[most_depth], int lane) {
#pragma unroll
    for (int i = 0; i < most_depth; ++i) {
      if (i >= depth_) break;
      if (pieces[i].bytes > 0)
        ask(cursor.address(pieces[i]), pieces[i], lane);
      else
        ask_nothing();
    }
  }

  // The oldest strip that was asked for, once it is there; all lanes must have read it before the next ask().
  __device__ __forceinline__ const std::byte* take() {
#if __CUDA_ARCH__ >= 900
    const std::uint32_t barrier = barriers_ + static_cast<std::uint32_t>(8 * get_);
    std::uint32_t done;
    do {
      asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
                   : "=r"(done)
                   : "r"(barrier), "r"(phase_)
                   : "memory");
    } while (!done);
#else
    if (depth_ == 1) asm volatile("cp.async.wait_group 0;" ::: "memory");
    if (depth_ == 2) asm volatile("cp.async.wait_group 1;" ::: "memory");
    if (depth_ == 3) asm volatile("cp.async.wait_group 2;" ::: "memory");
    if (depth_ == most_depth) asm volatile("cp.async.wait_group 3;" ::: "memory");
    __syncwarp();
#endif
    const std::byte* slot = start_ + get_ * slot_bytes_;
    if (++get_ == depth_) get_ = 0, phase_ ^= 1;
    return slot;
  }

 private:
  __device__ __forceinline__ static std::uint32_t address(const void* p) {
    return static_cast<std::uint32_t>(__cvta_generic_to_shared(p));
  }
  __device__ __forceinline__ void ask(const std::byte* from, const Piece& piece, int lane) {
    const std::uint32_t to = slots_ + static_cast<std::uint32_t>(put_ * slot_bytes_);
#if __CUDA_ARCH__ >= 900
    const std::uint32_t barrier = barriers_ + static_cast<std::uint32_t>(8 * put_);
    if (lane == 0) {
      asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(piece.bytes)
                   : "memory");
      if (piece.row_bytes == 0) {
        copy(to, from, piece.bytes, barrier);
      } else {
        const int row = piece.bytes / f32_unit_rows;
#pragma unroll 1
        for (int done = 0; done < piece.bytes; done += row, from += piece.row_bytes)
          copy(to + done, from, row, barrier);
      }
    }
#else
    if (piece.row_bytes == 0) {
#pragma unroll 4
      for (int i = lane * 16; i < piece.bytes; i += 512) copy(to + i, from + i);
    } else {
#pragma unroll
      for (int i = 0; i < f32_unit_rows; ++i) copy(to + i * 512 + lane * 16, from + i * piece.row_bytes + lane * 16);
    }
#endif
    ask_nothing();
  }
  __device__ __forceinline__ void ask_nothing() {
#if __CUDA_ARCH__ < 900
    asm volatile("cp.async.commit_group;");
#endif
    put_ = put_ + 1 == depth_ ? 0 : put_ + 1;
  }
#if __CUDA_ARCH__ >= 900
  // Weights are read once a step: they are the first to leave the L2 cache, code and activations stay.
  __device__ __forceinline__ static void copy(std::uint32_t to, const std::byte* from, int bytes,
                                              std::uint32_t barrier) {
    asm volatile(
        "{ .reg .b64 once; createpolicy.fractional.L2::evict_first.b64 once, 1.0;\n"
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], once; "
        "}" ::"r"(to),
        "l"(from), "r"(bytes), "r"(barrier)
        : "memory");
  }
#else
  __device__ __forceinline__ static void copy(std::uint32_t to, const std::byte* from) {
    asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
  }
#endif
  std::uint32_t slots_;
  const std::byte* start_;
  std::uint32_t barriers_;
  int slot_bytes_, depth_, put_ = 0, get_ = 0;
  std::uint32_t phase_ = 0;
};

// What a thread block multiplies.  `Sections` has sections of units of one type:
//   int count;  DType type(i);  int strip_bytes(i);  int first(i), last(i);  Unit unit(i, unit);
//   const std::byte* address(from, pick): of a unit's data
//   int columns(i): rows of activations of a unit;  bool paired(i): units 2 j and 2 j + 1 are finished together;
//   void done(i, unit, row of the unit, column, sum, sum of the unit after it if they are a pair)
template <unsigned types>
struct FewBlock {
  SharedRows<types> in;
  float* sums;      // [2][rounds * lanes of units][split][columns][16]
  int half_floats;  // of one of the two
  int log2_split;   // warps that share a unit
  int rounds;       // units of a warp between two barriers
  int half = 0;
};
__host__ __device__ inline int sum_bytes(int warps, int rounds, int columns) {
  return 2 * rounds * warps * columns * 64;
}

// The strips of a warp, section after section.
template <unsigned types, class Sections>
class StripCursor {
 public:
  __device__ StripCursor(const Sections& of, const FewBlock<types>& block, int warp, int warps)
      : of_(of),
        first_(warp & ((1 << block.log2_split) - 1)),
        split_(1 << block.log2_split),
        own_(warp >> block.log2_split),
        lanes_(warps >> block.log2_split),
        strips_(block.in.strips) {
    open(0);
  }
  __device__ __forceinline__ bool next(Piece& piece) {
    while (unit_ >= last_) {
      if (section_ + 1 >= of_.count) return false;
      open(section_ + 1);
    }
    if (strip_ == first_) {
      const Unit unit = of_.unit(section_, unit_);
      data_ = unit.data, pick_ = unit.pick;
    }
    piece.pick = pick_;
    if (is_f32()) {
      piece.bytes = f32_unit_rows * f32_strip_cols * 4, piece.row_bytes = strips_ * strip_cols * 4;
      piece.from = data_ + strip_ * (f32_strip_cols * 4);
    } else {
      piece.bytes = strip_bytes_, piece.row_bytes = 0;
      piece.from = data_ + strip_ * strip_bytes_;
    }
    strip_ += split_;
    if (strip_ >= count_) strip_ = first_, unit_ += lanes_;
    return true;
  }
  __device__ __forceinline__ const std::byte* address(const Piece& piece) const {
    return of_.address(piece.from, piece.pick);
  }

 private:
  __device__ __forceinline__ void open(int section) {
    section_ = section;
    type_ = of_.type(section);
    strip_bytes_ = of_.strip_bytes(section);
    count_ = is_f32() ? strips_ * (strip_cols / f32_strip_cols) : strips_;
    unit_ = of_.first(section) + own_, last_ = first_ < count_ ? of_.last(section) : 0;
    strip_ = first_;
  }
  __device__ __forceinline__ bool is_f32() const { return is<types>(type_, f32_alone); }
  const Sections& of_;
  const std::byte* data_ = nullptr;
  int pick_ = -1;
  int first_, split_, own_, lanes_, strips_, count_ = 0;  // strips of 256 columns; of a unit
  int section_ = 0, unit_ = 0, last_ = 0, strip_ = 0, strip_bytes_ = 0;
  DType type_ = DType::f32;
};

__device__ __forceinline__ void store_sums(float* to, const float (&acc)[4], int columns, int lane) {
  const int g = lane / 4, n = lane % 4 * 2;
  if (n < columns) to[n * 16 + g] = acc[0], to[n * 16 + g + 8] = acc[2];
  if (n + 1 < columns) to[(n + 1) * 16 + g] = acc[1], to[(n + 1) * 16 + g + 8] = acc[3];
}

// Adds up the warps' sums of the units [first, first + count) and hands them out; those of a pair together.
template <int height, unsigned types, class Sections>
__device__ __forceinline__ void finish_units(const Sections& of, int section, const FewBlock<types>& block,
                                             const float* sums, int first, int count, int columns) {
  const auto sum_of = [&](int unit, int n, int row) {
    const float* from = sums + ((unit << block.log2_split) * columns + n) * 16 + row;
    float sum = 0;
#pragma unroll 4
    for (int k = 0; k < 1 << block.log2_split; ++k) sum += from[k * columns * 16];
    return sum;
  };
  const int step = of.paired(section) ? 2 : 1;
#pragma unroll 1
  for (int i = static_cast<int>(threadIdx.x); i < count / step * columns * height; i += static_cast<int>(blockDim.x)) {
    const int row = i % height, of_row = i / height;
    const int pair = columns == 1 ? of_row : of_row / columns, n = of_row - pair * columns, unit = pair * step;
    const float sum = sum_of(unit, n, row);
    of.done(section, first + unit, row, n, sum, step == 2 ? sum_of(unit + 1, n, row) : 0.0f);
  }
}

// A unit's product with up to eight rows, as sums[column][16]: strips k, k + split, ... of it.
template <DType type>
struct UnitProduct {
  static constexpr int pieces_of_strip = 1;
  float acc[4];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (float& a : acc) a = 0;
  }
  template <unsigned types>
  __device__ __forceinline__ void add(const std::byte* slot, const SharedRows<types>& rows, int s, int row,
                                      int /*columns*/, int lane) {
    const int g = lane / 4;
    strip_product<type>(slot, rows.input(row >= 0 ? row : g < rows.rows ? g : 0, s, lane), lane, acc);
  }
  __device__ __forceinline__ void store(float* to, int columns, int lane) const { store_sums(to, acc, columns, lane); }
};
// f32, with up to N rows: a warp takes 128 columns of four rows at a time.
template <int N>
struct SingleProduct {
  static constexpr int pieces_of_strip = strip_cols / f32_strip_cols;
  float acc[f32_unit_rows][N];

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < f32_unit_rows; ++i) {
#pragma unroll
      for (float& a : acc[i]) a = 0;
    }
  }
  template <unsigned types>
  __device__ __forceinline__ void add(const std::byte* slot, const SharedRows<types>& rows, int s, int of_row,
                                      int columns, int lane) {
    float4 w[f32_unit_rows];
#pragma unroll
    for (int i = 0; i < f32_unit_rows; ++i) w[i] = *reinterpret_cast<const float4*>(slot + i * 512 + lane * 16);
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n >= columns) break;
      const float* const row = rows.single + (of_row >= 0 ? of_row : n) * rows.strips * strip_cols;
      const float4 v = *reinterpret_cast<const float4*>(row + s * f32_strip_cols + lane * 4);
#pragma unroll
      for (int i = 0; i < f32_unit_rows; ++i) {
        acc[i][n] = fmaf(w[i].x, v.x, acc[i][n]), acc[i][n] = fmaf(w[i].y, v.y, acc[i][n]);
        acc[i][n] = fmaf(w[i].z, v.z, acc[i][n]), acc[i][n] = fmaf(w[i].w, v.w, acc[i][n]);
      }
    }
  }
  __device__ __forceinline__ void store(float* to, int columns, int lane) const {
#pragma unroll
    for (int n = 0; n < N; ++n) {
      if (n >= columns) break;
#pragma unroll
      for (int i = 0; i < f32_unit_rows; ++i) {
        const float sum = warp_sum(acc[i][n]);
        if (lane == 0) to[n * 16 + i] = sum;
      }
    }
  }
};

// The units of one section, by all warps of the block.
template <class Product, int height, unsigned types, class Sections, class Cursor>
__device__ __forceinline__ void multiply_section(const Sections& of, int section, FewBlock<types>& block,
                                                 StripRing& ring, Cursor& cursor) {
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const int split = 1 << block.log2_split, lanes = static_cast<int>(blockDim.x) / 32 >> block.log2_split;
  const int k = warp & (split - 1), own = warp >> block.log2_split;
  const int pieces = block.in.strips * Product::pieces_of_strip;
  const int begin = of.first(section), end = of.last(section), batch = block.rounds * lanes;
  const int columns = of.columns(section);
  Product product;
#pragma unroll 1
  for (int first = begin; first < end; first += batch) {
    float* sums = block.sums + block.half * block.half_floats;
#pragma unroll 1
    for (int unit = first + own; unit < min(first + batch, end); unit += lanes) {
      const int row = of.unit(section, unit).row;
      product.clear();
#pragma unroll 1
      for (int s = k; s < pieces; s += split) {
        product.add(ring.take(), block.in, s, row, columns, lane);
        __syncwarp();
        ring.ask(cursor, lane);
      }
      product.store(sums + ((unit - first) * split + k) * columns * 16, columns, lane);
    }
    __syncthreads();
    finish_units<height>(of, section, block, sums, first, min(batch, end - first), columns);
    block.half ^= 1;
  }
}

// Types that big models rarely come in: a call each, so that they take no registers from the others.
template <DType type, unsigned types, class Sections, class Cursor>
__device__ __noinline__ void multiply_section_apart(const Sections& of, int section, FewBlock<types>& block,
                                                    StripRing& ring, Cursor& cursor) {
  multiply_section<UnitProduct<type>, strip_rows>(of, section, block, ring, cursor);
}

// All sections, of `types`.  The ring is filled, and the rows are in shared memory.
template <unsigned types, class Sections, class Cursor>
__device__ __forceinline__ void multiply_sections(const Sections& of, FewBlock<types>& block, StripRing& ring,
                                                  Cursor& cursor) {
#pragma unroll 1
  for (int i = 0; i < of.count; ++i) {
    if (of.first(i) >= of.last(i)) continue;
    const DType type = of.type(i);
    if (is<types>(type, q4_k_alone)) {
      multiply_section<UnitProduct<DType::q4_k>, strip_rows>(of, i, block, ring, cursor);
    } else if (is<types>(type, q6_k_alone)) {
      multiply_section<UnitProduct<DType::q6_k>, strip_rows>(of, i, block, ring, cursor);
    } else if (is<types>(type, f32_alone)) {
      if (of.columns(i) == 1)
        multiply_section<SingleProduct<1>, f32_unit_rows>(of, i, block, ring, cursor);
      else
        multiply_section<SingleProduct<few_rows>, f32_unit_rows>(of, i, block, ring, cursor);
    } else if constexpr (types == all_types) {
      with_type(type, [&](auto t) {
        if constexpr (!usual(t.value)) multiply_section_apart<t.value>(of, i, block, ring, cursor);
      });
    }
  }
}

// The kernel.  A multiprocessor stands still while its memory is divided anew between L1 and shared: all of these
// kernels ask for the same division.
template <auto kernel>
auto with_shared_memory() {
  [[maybe_unused]] static const bool asked =
      (check(
           cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared),
           "asking for shared memory"),
       true);
  return kernel;
}

// Bytes of a piece, and of 256 columns of a unit.
inline int piece_bytes(DType type) {
  return type == DType::f32 ? f32_unit_rows * f32_strip_cols * 4 : strip_layout(type).bytes;
}
inline int strip_bytes(DType type) {
  return type == DType::f32 ? f32_unit_rows * strip_cols * 4 : strip_layout(type).bytes;
}

}  // namespace qwen3next::cuda
