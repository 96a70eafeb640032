// The gated delta rule for many rows, in chunks of 64, on tensor cores.
//
// In a chunk, G = running sum of g, A_ij = beta_i (k_i . k_j) exp(G_i - G_j) for j < i, T = (I + A)^-1:
//   U = T diag(beta) V      W = T diag(beta exp G) K      P_ij = (q_i . k_j) exp(G_i - G_j) for j <= i
//   V' = U - W S            O = diag(exp G) Q S + P V'    S = exp(G_C) S + (diag(exp(G_C - G)) K)^T V'
// No exponent is positive.  `prepare_chunks` does the first line, all chunks and heads at once; `scan_chunks` the
// second, chunk after chunk, a thread block for 32 value columns of a head.
//
// Precision: T in f32; products of factors of 11 bits with f32 sums.  f16 holds q, k, W and P, none of whose values
// exceeds 1 (the delta rule does not expand); V', U and S, which have the range of v, are tf32.

#include <algorithm>

#include "backends/cuda/delta.cuh"

namespace qwen3next::cuda {

namespace {

constexpr int chunk = 64, threads = 256;
constexpr int scan_columns = 32;

// ---- Products of tiles: c += a b
// ----------------------------------------------------------------------------------------- g = lane / 4, t = lane % 4.
// c: rows g, g + 8, columns 2t, 2t + 1 of 16 x 8.

__device__ inline void multiply_f16(float (&c)[4], const unsigned (&a)[4], unsigned b0, unsigned b1) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
// a: rows g, g + 8 of the first column of t, then of the second; b likewise.
__device__ inline void multiply_tf32(float (&c)[4], float a0, float a1, float a2, float a3, float b0, float b1) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, "
      "%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(__float_as_uint(a0)), "r"(__float_as_uint(a1)), "r"(__float_as_uint(a2)), "r"(__float_as_uint(a3)),
        "r"(__float_as_uint(b0)), "r"(__float_as_uint(b1)));
}
__device__ inline float tf32(float x) {
  unsigned bits;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(x));
  return __uint_as_float(bits);
}
__device__ inline unsigned half_pair(float x, float y) {
  const __half2 h = __floats2half2_rn(x, y);
  return *reinterpret_cast<const unsigned*>(&h);
}
// Rows 8 i + 2t, + 1 of column g, of four times 8 rows of 8 f16, of which this lane points at one.
__device__ inline void load_transposed(unsigned (&pairs)[4], const __half* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
               : "r"(static_cast<unsigned>(__cvta_generic_to_shared(row)))
               : "memory");
}
__device__ inline float2 float_pair(unsigned h) { return __half22float2(*reinterpret_cast<const __half2*>(&h)); }

__device__ inline unsigned scaled(unsigned pair, float first, float second) {
  const float2 h = float_pair(pair);
  return half_pair(first * h.x, second * h.y);
}

// Factors of tf32 products over 16 columns (of k, or of rows of the chunk).  Lane (g, t) has columns 2t, 2t + 1, 2t + 8
// and 2t + 9 of them, as it does of f16 products: those of two tiles of results are what it has of a factor.  As first
// factor: 16 rows, 8 f16 a lane, of row g then of g + 8.  As second: 8 columns of the result, 4 f16 a lane, or in
// shared memory 4 f32 from place 4t on.
__device__ inline uint4 image_of(const float (&even)[4], const float (&odd)[4]) {
  return {half_pair(even[0], even[1]), half_pair(odd[0], odd[1]), half_pair(even[2], even[3]),
          half_pair(odd[2], odd[3])};
}

// --- All chunks at once ---

// What scan_chunks needs, of (chunk, head) after (chunk, head).
struct Chunks {
  uint4 *W, *Q;  // first factors [4, Dk / 16, 32 lanes]; Q holds diag(exp G) Q
  uint2* K;      // second factor [Dk / 8, 4, 32 lanes]: diag(exp(G_C - G)) K
  uint4* P;      // first factor [4, 4, 32 lanes]; tiles above the diagonal are not written
  float* U;      // [64, Dv]
  float* decay;  // exp(G_C)
};

struct ChunkRows {
  const float *qkv, *beta, *g;  // of the first chunk's first row
  std::ptrdiff_t qkv_stride, beta_stride, g_stride;
  int rows, key_heads, value_heads, value_dim;
};

constexpr int square = chunk + 8;  // a row of A and T: lanes' pairs of 8 rows lie in different banks

template <int Dk>
struct PrepareShared {
  __half k[chunk][Dk + 8], q[chunk][Dk + 8];
  float A[chunk][square];  // later 64 columns of v
  float T[chunk][square];  // blocks above the diagonal: temporary
  float G[chunk], beta[chunk], from_start[chunk], scaled_beta[chunk], to_end[chunk];
};

// More than e^-40 of what was is less than what rounding leaves of anything; far larger exponents would take the digits
// from the running sum.
constexpr float strongest_decay = -40;

template <int Dk>
__global__ void __launch_bounds__(threads, 2) prepare_chunks(const ChunkRows p, const Chunks out) {
  extern __shared__ __align__(16) unsigned char memory[];
  auto& x = *reinterpret_cast<PrepareShared<Dk>*>(memory);
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int head = static_cast<int>(blockIdx.x), begin = static_cast<int>(blockIdx.y) * chunk;
  const int rows = min(chunk, p.rows - begin), key_head = head / (p.value_heads / p.key_heads);
  const std::size_t item =
      static_cast<std::size_t>(blockIdx.y) * static_cast<std::size_t>(p.value_heads) + static_cast<std::size_t>(head);
  const float* v = p.qkv + begin * p.qkv_stride + 2 * p.key_heads * Dk + head * p.value_dim;
  let_successor_start();
  wait_for_predecessor();

  for (int line = tid; line < chunk * p.value_dim / 32; line += threads) {  // v is needed at the end
    const int row = line / (p.value_dim / 32);
    if (row < rows)
      asm volatile("prefetch.global.L2 [%0];" ::"l"(v + row * p.qkv_stride + line % (p.value_dim / 32) * 32));
  }

  // q and k to unit length; what is beyond the last row is 0.
  constexpr int own = Dk / 32;
#pragma unroll 4
  for (int i = 0; i < chunk / 8; ++i) {
    const int row = warp * (chunk / 8) + i;
    const float* in = p.qkv + (begin + row) * p.qkv_stride + key_head * Dk + lane * own;
    float q[own], k[own], qq = 0, kk = 0;
#pragma unroll
    for (int j = 0; j < own; j += 2) {
      float2 a{0, 0}, b{0, 0};
      if (row < rows) {
        a = *reinterpret_cast<const float2*>(in + j);
        b = *reinterpret_cast<const float2*>(in + p.key_heads * Dk + j);
      }
      q[j] = a.x, q[j + 1] = a.y, k[j] = b.x, k[j + 1] = b.y;
      qq += a.x * a.x + a.y * a.y, kk += b.x * b.x + b.y * b.y;
    }
    const float rq = rsqrtf(warp_sum(qq) + 1e-6f), rk = rsqrtf(warp_sum(kk) + 1e-6f);
#pragma unroll
    for (int j = 0; j < own; j += 2) {
      *reinterpret_cast<unsigned*>(&x.q[row][lane * own + j]) = half_pair(rq * q[j], rq * q[j + 1]);
      *reinterpret_cast<unsigned*>(&x.k[row][lane * own + j]) = half_pair(rk * k[j], rk * k[j + 1]);
    }
  }
  if (warp == 0) {
    float of_lane[2], beta[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * lane + i;
      of_lane[i] = row < rows ? fmaxf(p.g[(begin + row) * p.g_stride + head], strongest_decay) : 0;
      beta[i] = row < rows ? p.beta[(begin + row) * p.beta_stride + head] : 0;
    }
    float sum = of_lane[0] + of_lane[1];
    for (int offset = 1; offset < 32; offset *= 2) {
      const float other = __shfl_up_sync(0xffffffff, sum, offset);
      if (lane >= offset) sum += other;
    }
    const float total = __shfl_sync(0xffffffff, sum, 31);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = 2 * lane + i;
      const float G = i == 0 ? sum - of_lane[1] : sum;
      x.G[row] = G, x.beta[row] = beta[i], x.from_start[row] = expf(G), x.scaled_beta[row] = beta[i] * expf(G);
      x.to_end[row] = expf(fminf(total - G, 0.0f));
    }
    if (lane == 0) out.decay[item] = expf(total);
  }
  __syncthreads();

  // A and P, and on the way Q: 16 rows a warp.  All columns, though those above the diagonal are 0: to branch costs
  // more.
  {
    const bool of_k = warp < 4;
    const int m = of_k ? warp : 7 - warp, row = m * 16 + g;
    const __half(*left)[Dk + 8] = of_k ? x.k : x.q;
    uint4* const Q = out.Q + (item * 4 + static_cast<std::size_t>(m)) * (Dk * 2) + lane;
    const float scale[2] = {x.from_start[row], x.from_start[row + 8]};
    float c[8][4] = {};
#pragma unroll 2
    for (int at = 0; at < Dk; at += 16) {
      unsigned a[4];
#pragma unroll
      for (int i = 0; i < 4; ++i)
        a[i] = *reinterpret_cast<const unsigned*>(&left[row + i % 2 * 8][at + i / 2 * 8 + 2 * t]);
#pragma unroll
      for (int n = 0; n < 8; ++n) {
        multiply_f16(c[n], a, *reinterpret_cast<const unsigned*>(&x.k[n * 8 + g][at + 2 * t]),
                     *reinterpret_cast<const unsigned*>(&x.k[n * 8 + g][at + 8 + 2 * t]));
      }
      if (!of_k) {
        Q[at * 2] = {scaled(a[0], scale[0], scale[0]), scaled(a[2], scale[0], scale[0]),
                     scaled(a[1], scale[1], scale[1]), scaled(a[3], scale[1], scale[1])};
      }
    }
    const float G[2] = {x.G[row], x.G[row + 8]}, beta[2] = {x.beta[row], x.beta[row + 8]};
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      const int j = n * 8 + 2 * t;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int i = row + half * 8 - (of_k ? 1 : 0);  // the last j
        const float factor = of_k ? beta[half] : 1.0f;
        float &first = c[n][2 * half], &second = c[n][2 * half + 1];
        first = j <= i ? factor * first * __expf(fminf(G[half] - x.G[j], 0.0f)) : 0;
        second = j + 1 <= i ? factor * second * __expf(fminf(G[half] - x.G[j + 1], 0.0f)) : 0;
        if (of_k) *reinterpret_cast<float2*>(&x.A[row + half * 8][j]) = {first, second};
      }
    }
    uint4* const P = out.P + (item * 4 + static_cast<std::size_t>(m)) * (4 * 32) + lane;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (!of_k && s <= m) P[s * 32] = image_of(c[2 * s], c[2 * s + 1]);
    }
  }
  float4 next_v[4];  // of 64 columns of v
  const auto load_v = [&](int first) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = (tid + i * threads) / 16, at = first + tid % 16 * 4;
      next_v[i] = {0, 0, 0, 0};
      if (row < rows && at < p.value_dim) next_v[i] = *reinterpret_cast<const float4*>(v + row * p.qkv_stride + at);
    }
  };
  load_v(0);
  __syncthreads();

  // T = (I + A)^-1: of 4 blocks of 16 on the diagonal by substitution, a column a thread; the rest from
  //   (T1      )   with T21 = -T2 A21 T1,
  //   (T21  T2 )   for blocks of 16, then of 32.
  if (tid < chunk) {
    const int block = tid / 16 * 16, j = tid % 16;
    float column[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      float sum = i == j ? 1.0f : 0.0f;
#pragma unroll
      for (int m = 0; m < i; ++m) sum -= x.A[block + i][block + m] * column[m];
      column[i] = sum;
    }
#pragma unroll
    for (int i = 0; i < 16; ++i) x.T[block + i][block + j] = column[i];
  } else {  // meanwhile the image of K
    uint2* const K = out.K + item * (Dk * 16) + lane;
    for (int i = warp - 2; i < Dk / 4; i += threads / 32 - 2) {
      const int n = i / 2, first = i % 2 * 32;
      unsigned k[4];  // of 8 columns, rows 2t, 2t + 1 of 4 times 8
      load_transposed(k, &x.k[first + lane][n * 8]);
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 scale = *reinterpret_cast<const float2*>(&x.to_end[first + j * 8 + 2 * t]);
        k[j] = scaled(k[j], scale.x, scale.y);
      }
      K[(n * 4 + first / 16) * 32] = {k[0], k[1]};
      K[(n * 4 + first / 16 + 1) * 32] = {k[2], k[3]};
    }
  }
  __syncthreads();
  // Four columns of a block a thread; products lie above the diagonal until the next step.
  const auto combine = [&](int size, int first, int i, int j) {
    const int second = first + size;
    float4 sum{0, 0, 0, 0};
    const auto add = [&](float factor, const float* row) {
      const float4 r = *reinterpret_cast<const float4*>(row);
      sum.x += factor * r.x, sum.y += factor * r.y, sum.z += factor * r.z, sum.w += factor * r.w;
    };
    const bool works = i < size;
    if (works) {
#pragma unroll 4
      for (int m = j / 16 * 16; m < size; ++m) add(x.A[second + i][first + m], &x.T[first + m][first + j]);
      *reinterpret_cast<float4*>(&x.T[first + i][second + j]) = sum;
    }
    __syncthreads();
    sum = {0, 0, 0, 0};
    if (works) {
#pragma unroll 4
      for (int m = 0; m < i / 16 * 16 + 16; ++m) add(-x.T[second + i][second + m], &x.T[first + m][second + j]);
      *reinterpret_cast<float4*>(&x.T[second + i][first + j]) = sum;
    }
    __syncthreads();
  };
  combine(16, tid % 128 / 64 * 32, tid < 128 ? tid % 64 / 4 : 16, tid % 4 * 4);
  combine(32, 0, tid / 8, tid % 8 * 4);

  // A warp makes 16 rows of half of the columns of W, and of each 64 columns of U.
  const int m = warp % 4, half = warp / 4;
  const auto share_v = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float4 r = next_v[i];
      *reinterpret_cast<float4*>(&x.A[(tid + i * threads) / 16][tid % 16 * 4]) = {tf32(r.x), tf32(r.y), tf32(r.z),
                                                                                  tf32(r.w)};
    }
  };
  share_v();
  load_v(64);
  {
    unsigned a[4][4];
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int j = s * 16 + i / 2 * 8 + 2 * t;
        const float2 from = *reinterpret_cast<const float2*>(&x.T[m * 16 + g + i % 2 * 8][j]);
        const float2 scale = *reinterpret_cast<const float2*>(&x.scaled_beta[j]);
        a[s][i] = half_pair(from.x * scale.x, from.y * scale.y);
      }
    }
    uint4* const W = out.W + (item * 4 + static_cast<std::size_t>(m)) * (Dk * 2) + lane;
#pragma unroll 2
    for (int i = 0; i < Dk / 32; ++i) {
      const int tile = half * (Dk / 32) + i;
      float c[2][4] = {};
#pragma unroll
      for (int n = 0; n < 2; ++n) {
#pragma unroll
        for (int s = 0; s < 4; s += 2) {
          if (s > m) continue;
          unsigned k[4];
          load_transposed(k, &x.k[s * 16 + lane][tile * 16 + n * 8]);
          multiply_f16(c[n], a[s], k[0], k[1]);
          if (s + 1 <= m) multiply_f16(c[n], a[s + 1], k[2], k[3]);
        }
      }
      W[tile * 32] = image_of(c[0], c[1]);
    }
  }
  float a[8][4];
#pragma unroll
  for (int s = 0; s < 8; ++s) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int j = s * 8 + t + i / 2 * 4;
      a[s][i] = s < 2 * m + 2 ? tf32(x.T[m * 16 + g + i % 2 * 8][j] * x.beta[j]) : 0;
    }
  }
  float* const U =
      out.U + (item * chunk + static_cast<std::size_t>(m * 16 + g)) * static_cast<std::size_t>(p.value_dim);
  for (int first = 0; first < p.value_dim; first += 64) {
    if (first > 0) {
      __syncthreads();
      share_v();
      load_v(first + 64);
    }
    __syncthreads();
#pragma unroll 2
    for (int n = half * 4; n < half * 4 + 4; ++n) {
      float c[2][4] = {};
#pragma unroll
      for (int s = 0; s < 8; ++s) {
        multiply_tf32(c[s % 2], a[s][0], a[s][1], a[s][2], a[s][3], x.A[s * 8 + t][n * 8 + g],
                      x.A[s * 8 + t + 4][n * 8 + g]);
      }
      float* to = U + first + n * 8 + 2 * t;
      *reinterpret_cast<float2*>(to) = {c[0][0] + c[1][0], c[0][1] + c[1][1]};
      *reinterpret_cast<float2*>(to + 8 * p.value_dim) = {c[0][2] + c[1][2], c[0][3] + c[1][3]};
    }
  }
}

// --- Chunk after chunk ---

struct ScanRows {
  float* S;    // [Hv, Dv, Dk]
  float* out;  // of the first chunk's first row
  std::ptrdiff_t out_stride;
  int rows, value_heads, value_dim;
};

// 8 warps.  Warps 0-3 make V' of 16 rows each, warps 4-7 the output of 16 rows each; all of them hold S^T, of Dk / 8
// columns each.  In shared memory, in tf32, are S^T and V'^T: what is a factor for all warps.
template <int Dk>
__global__ void __launch_bounds__(threads, 1) scan_chunks(const ScanRows p, const Chunks in) {
  constexpr int tiles = Dk / 64, steps = Dk / 16;
  __shared__ __align__(16) float S[scan_columns][Dk + 16];
  __shared__ __align__(16) float V[scan_columns][chunk + 16];
  const int tid = static_cast<int>(threadIdx.x), warp = tid / 32, lane = tid % 32, g = lane / 4, t = lane % 4;
  const int groups = p.value_dim / scan_columns, head = static_cast<int>(blockIdx.x) / groups;
  const int column = static_cast<int>(blockIdx.x) % groups * scan_columns;
  const bool makes_V = warp < 4;
  const int m = warp % 4, chunks = (p.rows + chunk - 1) / chunk;
  let_successor_start();
  wait_for_predecessor();

  uint4 left[steps], left_P[4];
  uint2 right_K[tiles][4];
  float U[4][4], decay = 0;
  const auto item = [&](int c) {
    return static_cast<std::size_t>(c) * static_cast<std::size_t>(p.value_heads) + static_cast<std::size_t>(head);
  };
  const auto load_left = [&](int c) {
    const uint4* from = (makes_V ? in.W : in.Q) + (item(c) * 4 + static_cast<std::size_t>(m)) * (steps * 32) + lane;
#pragma unroll
    for (int s = 0; s < steps; ++s) left[s] = from[s * 32];
  };
  const auto load_U = [&](int c) {
    const float* from =
        in.U + (item(c) * chunk + static_cast<std::size_t>(m * 16 + g)) * static_cast<std::size_t>(p.value_dim) +
        column + 2 * t;
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float2 a = *reinterpret_cast<const float2*>(from + n * 8);
      const float2 b = *reinterpret_cast<const float2*>(from + 8 * p.value_dim + n * 8);
      U[n][0] = a.x, U[n][1] = a.y, U[n][2] = b.x, U[n][3] = b.y;
    }
  };
  const auto load_P = [&](int c) {
    const uint4* from = in.P + (item(c) * 16 + static_cast<std::size_t>(m * 4)) * 32 + lane;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (s <= m) left_P[s] = from[s * 32];
    }
  };
  const auto load_K = [&](int c) {
    const uint2* from = in.K + (item(c) * (Dk / 8) + static_cast<std::size_t>(warp * tiles)) * 128 + lane;
#pragma unroll
    for (int n = 0; n < tiles; ++n) {
#pragma unroll
      for (int s = 0; s < 4; ++s) right_K[n][s] = from[(n * 4 + s) * 32];
    }
    decay = in.decay[item(c)];
  };
  // c += left image * 16 places of rows n * 8 + g of `right`
  const auto add_products = [&](float(&c)[4][4], uint4 image, const float* right, int stride) {
    const float2 a = float_pair(image.x), a2 = float_pair(image.y), b = float_pair(image.z), b2 = float_pair(image.w);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
      const float4 r = *reinterpret_cast<const float4*>(right + (n * 8 + g) * stride + 4 * t);
      multiply_tf32(c[n], a.x, b.x, a.y, b.y, r.x, r.y);
      multiply_tf32(c[n], a2.x, b2.x, a2.y, b2.y, r.z, r.w);
    }
  };

  load_left(0), load_K(0);
  if (makes_V)
    load_U(0);
  else
    load_P(0);

  float own[2][tiles][4];  // S^T: rows 16 i + g, + 8, columns 8 (warp * tiles + n) + 2t, + 1
  float* const S_begin =
      p.S +
      (static_cast<std::size_t>(head) * static_cast<std::size_t>(p.value_dim) + static_cast<std::size_t>(column + g)) *
          Dk +
      warp * tiles * 8 + 2 * t;
  const auto each_pair = [&](auto work) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
#pragma unroll
      for (int n = 0; n < tiles; ++n) work(i * 8, n * 8, own[i / 2][n][i % 2 * 2], own[i / 2][n][i % 2 * 2 + 1]);
    }
  };
  const auto share_S = [&] {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      float* row = &S[i * 8 + g][warp * tiles / 2 * 16 + 4 * t];
      const int pair = i % 2 * 2;
      if constexpr (tiles == 2) {
        *reinterpret_cast<float4*>(row) = {tf32(own[i / 2][0][pair]), tf32(own[i / 2][0][pair + 1]),
                                           tf32(own[i / 2][1][pair]), tf32(own[i / 2][1][pair + 1])};
      } else {
        *reinterpret_cast<float2*>(row + warp % 2 * 2) = {tf32(own[i / 2][0][pair]), tf32(own[i / 2][0][pair + 1])};
      }
    }
  };
  each_pair([&](int row, int at, float& a, float& b) {
    const float2 from = *reinterpret_cast<const float2*>(S_begin + row * Dk + at);
    a = from.x, b = from.y;
  });
  share_S();

  const float scale = rsqrtf(static_cast<float>(Dk));
  for (int c = 0; c < chunks; ++c) {
    const int next = min(c + 1, chunks - 1);
    __syncthreads();       // S is there
    float sum[4][4] = {};  // W S, or Q S
#pragma unroll
    for (int s = 0; s < steps; ++s) add_products(sum, left[s], &S[0][s * 16], Dk + 16);
    load_left(next);
    if (makes_V) {
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i)
          V[n * 8 + 2 * t + i % 2][m * 16 + g / 2 * 4 + g % 2 + i / 2 * 2] = tf32(U[n][i] - sum[n][i]);
      }
      load_U(next);
    }
    __syncthreads();  // V' is there, S is read
    each_pair([&](int, int, float& a, float& b) { a *= decay, b *= decay; });
#pragma unroll
    for (int s = 0; s < 4; ++s) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float4 a = *reinterpret_cast<const float4*>(&V[i * 16 + g][s * 16 + 4 * t]);
        const float4 b = *reinterpret_cast<const float4*>(&V[i * 16 + g + 8][s * 16 + 4 * t]);
#pragma unroll
        for (int n = 0; n < tiles; ++n) {
          const float2 k = float_pair(right_K[n][s].x), k2 = float_pair(right_K[n][s].y);
          multiply_tf32(own[i][n], a.x, b.x, a.y, b.y, k.x, k.y);
          multiply_tf32(own[i][n], a.z, b.z, a.w, b.w, k2.x, k2.y);
        }
      }
    }
    load_K(next);
    share_S();
    if (makes_V) continue;
#pragma unroll
    for (int s = 0; s < 4; ++s) {
      if (s <= m) add_products(sum, left_P[s], &V[0][s * 16], chunk + 16);
    }
    load_P(next);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = c * chunk + m * 16 + g + half * 8;
      if (row >= p.rows) continue;
      float* to = p.out + row * p.out_stride + head * p.value_dim + column + 2 * t;
#pragma unroll
      for (int n = 0; n < 4; ++n)
        *reinterpret_cast<float2*>(to + n * 8) = {scale * sum[n][2 * half], scale * sum[n][2 * half + 1]};
    }
  }
  each_pair([&](int row, int at, float& a, float& b) { *reinterpret_cast<float2*>(S_begin + row * Dk + at) = {a, b}; });
}

// --- Host ---

template <int Dk>
void run_chunks(const Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor qkv, CudaTensor beta,
                CudaTensor g, DeltaShape shape, float* S) {
  const auto heads = static_cast<std::size_t>(shape.value_heads), Dv = static_cast<std::size_t>(shape.value_dim);
  constexpr std::size_t image = std::size_t{Dk} * 128, image_P = 16 * 32 * sizeof(uint4);
  const std::size_t item = 3 * image + image_P + chunk * Dv * sizeof(float) + sizeof(float);
  // So many chunks at a time as the card prepares in two waves: what is prepared of them is still in the L2 cache when
  // it is read.
  const int at_once = std::max(4, 4 * device.properties().multiprocessors / shape.value_heads);
  const int rows = qkv.n_rows, step = std::min(at_once * chunk, (rows + chunk - 1) / chunk * chunk);
  const std::size_t items = heads * static_cast<std::size_t>(step / chunk);
  std::byte* space = scratch.get(items * item);
  const auto take = [&](std::size_t bytes) {
    std::byte* begin = space;
    space += items * bytes;
    return static_cast<void*>(begin);
  };
  Chunks chunks{};
  chunks.W = static_cast<uint4*>(take(image)), chunks.Q = static_cast<uint4*>(take(image));
  chunks.K = static_cast<uint2*>(take(image)), chunks.P = static_cast<uint4*>(take(image_P));
  chunks.U = static_cast<float*>(take(chunk * Dv * sizeof(float)));
  chunks.decay = static_cast<float*>(take(sizeof(float)));
  for (int begin = 0; begin < rows; begin += step) {
    const int count = std::min(step, rows - begin);
    const ChunkRows p{qkv.data + begin * qkv.stride,
                      beta.data + begin * beta.stride,
                      g.data + begin * g.stride,
                      qkv.stride,
                      beta.stride,
                      g.stride,
                      count,
                      shape.key_heads,
                      shape.value_heads,
                      shape.value_dim};
    launch(device, prepare_chunks<Dk>,
           dim3(static_cast<unsigned>(shape.value_heads), static_cast<unsigned>((count + chunk - 1) / chunk)), threads,
           sizeof(PrepareShared<Dk>), p, chunks);
    const ScanRows s{S, out.data + begin * out.stride, out.stride, count, shape.value_heads, shape.value_dim};
    launch(device, scan_chunks<Dk>, static_cast<unsigned>(shape.value_heads * shape.value_dim / scan_columns), threads,
           0, s, chunks);
  }
}

}  // namespace

bool chunks_fit(DeltaShape s) noexcept { return (s.key_dim == 64 || s.key_dim == 128) && s.value_dim % 64 == 0; }

void delta_chunks(const Device& device, DeviceScratch& scratch, CudaTensor out, CudaTensor qkv, CudaTensor beta,
                  CudaTensor g, DeltaShape shape, float* S) {
  const auto run = shape.key_dim == 128 ? run_chunks<128> : run_chunks<64>;
  run(device, scratch, out, qkv, beta, g, shape, S);
}

}  // namespace qwen3next::cuda
