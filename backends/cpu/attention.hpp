#pragma once
// Causal attention over the KV cache, a block of 256 positions at a time, with the softmax built up on the way
// (FlashAttention, arXiv:2205.14135):
//   m' = max(m, max s)   l' = l exp(m - m') + sum exp(s - m')   o' = o exp(m - m') + exp(s - m') V;   out = o / l
//
// The query heads of one KV head, for several tokens, are the rows of one piece of work, so that keys and values are
// read once for all of them.  Few tokens: the context is split into pieces of fixed length, merged in order.

#include <algorithm>
#include <cmath>
#include <vector>

#include "backends/backend.hpp"
#include "backends/cpu/linear.hpp"

namespace qwen3next::cpu {

class Attention {
 public:
  void operator()(const Kernels& k, const Team& team, const HostTensor& out, const HostTensor& q,
                  const HostTensor& keys, const HostTensor& values, AttentionShape shape,
                  std::span<const Segment<HostKvCache>> segments) {
    append(k, team, keys, values, shape, segments);
    plan(shape, segments);
    const int D = shape.head_dim, group = shape.heads / shape.kv_heads;
    rows_ = static_cast<std::size_t>(std::max(group, max_rows));
    const std::size_t row = static_cast<std::size_t>(D) * sizeof(float);
    spaces_ = space_scratch_.pieces(static_cast<std::size_t>(team.size()),
                                    rows_ * (2 * row + (block + 3) * sizeof(float)) + block * row);
    // Of each split: for each row l, m, then o [D].
    partial_ = partial_scratch_.pieces(partials_, rows_ * (row + 2 * sizeof(float)));
    std::int64_t positions = 0;
    for (const Work& w : work_) positions += (w.last - w.first) * block * w.count;
    const auto pieces = static_cast<int>(work_.size());
    team.each(pieces, 2 * positions * group * D / std::max(1, pieces), [&](int i, int thread) {
      piece(k, out, q, shape, segments, work_[static_cast<std::size_t>(i)], spaces_[thread]);
    });
    if (partials_ > 0) merge(k, team, out, shape, segments);
  }

 private:
  static constexpr int block = HostKvCache::block_positions;
  static constexpr int max_rows = 64;     // queries (tokens x heads of a group) of a piece of work
  static constexpr int few_tokens = 8;    // up to here the context is split
  static constexpr int split_blocks = 8;  // into pieces of at least 2048 positions,
  static constexpr int max_splits = 64;   // and at most 64 of them

  // Tokens [token, token + count) of a segment against blocks [first, last) for one KV head.
  struct Work {
    int segment, kv_head, token, count;
    std::int64_t first, last;
    int partial;  // -1: the whole context, straight to `out`
    int splits;   // of the same rows: this one and those after it, 0 unless the first
  };

  static void append(const Kernels& k, const Team& team, const HostTensor& keys, const HostTensor& values,
                     AttentionShape shape, std::span<const Segment<HostKvCache>> segments) {
    const int D = shape.head_dim;
    for (const auto& s : segments) {
      HostKvCache& cache = *s.state;
      const std::int64_t first = cache.extend(s.count);
      const DType type = stored_type(cache.type());
      team.split(s.count, 2 * shape.kv_heads * D, [&](int begin, int end) {
        for (int t = begin; t < end; ++t) {
          for (int h = 0; h < shape.kv_heads; ++h) {
            k.store_kv(type, keys.row(s.begin + t) + h * D, D, cache.key_row(first + t, h));
            k.store_kv(type, values.row(s.begin + t) + h * D, D, cache.value_row(first + t, h));
          }
        }
      });
    }
  }

  // Depends on the shape, the counts and the lengths only, never on the number of threads.
  void plan(AttentionShape shape, std::span<const Segment<HostKvCache>> segments) {
    work_.clear();
    partials_ = 0;
    const int tile = std::max(1, max_rows / (shape.heads / shape.kv_heads));
    for (int i = 0; i < static_cast<int>(segments.size()); ++i) {
      const auto& s = segments[static_cast<std::size_t>(i)];
      const std::int64_t past = s.state->length() - s.count;
      for (int head = 0; head < shape.kv_heads; ++head) {
        for (int t = 0; t < s.count; t += tile) {
          const int count = std::min(tile, s.count - t);
          const std::int64_t blocks = (past + t + count + block - 1) / block;
          std::int64_t length = blocks;
          if (s.count <= few_tokens)
            length = std::max<std::int64_t>(split_blocks, (blocks + max_splits - 1) / max_splits);
          const int splits = static_cast<int>((blocks + length - 1) / length);
          for (int p = 0; p < splits; ++p) {
            work_.push_back({i, head, t, count, p * length, std::min((p + 1) * length, blocks),
                             splits == 1 ? -1 : static_cast<int>(partials_), p == 0 ? splits : 0});
            if (splits > 1) ++partials_;
          }
        }
      }
    }
  }

  void piece(const Kernels& k, const HostTensor& out, const HostTensor& q, AttentionShape shape,
             std::span<const Segment<HostKvCache>> segments, const Work& w, std::byte* space) const noexcept {
    const auto& segment = segments[static_cast<std::size_t>(w.segment)];
    const HostKvCache& cache = *segment.state;
    const int D = shape.head_dim, group = shape.heads / shape.kv_heads, rows = w.count * group;
    const std::int64_t past = cache.length() - segment.count;
    const DType type = stored_type(cache.type());

    auto* floats = reinterpret_cast<float*>(space);
    float* query = floats;                                           // [rows, D]
    float* sum = query + rows_ * static_cast<std::size_t>(D);        // [rows, D]
    float* expanded = sum + rows_ * static_cast<std::size_t>(D);     // [block, D] of a q8_0 cache
    float* scores = expanded + block * static_cast<std::size_t>(D);  // [rows, block]
    float *total = scores + rows_ * block, *top = total + rows_, *shrink = top + rows_;
    std::int32_t visible[4096];
    for (int r = 0; r < rows; ++r) {
      std::copy_n(q.row(segment.begin + w.token + r / group) + (w.kv_head * group + r % group) * D, D, query + r * D);
      std::fill_n(sum + r * D, D, 0.0f);
      total[r] = 0;
      top[r] = -1e30f;
    }
    const float scale = 1 / std::sqrt(static_cast<float>(D));
    const std::byte* pointers[block];
    for (std::int64_t b = w.first; b < w.last; ++b) {
      const std::int64_t start = b * block;
      const int n = static_cast<int>(std::min<std::int64_t>(block, past + w.token + w.count - start));
      for (int r = 0; r < rows; ++r)
        visible[r] = static_cast<std::int32_t>(std::clamp<std::int64_t>(past + w.token + r / group + 1 - start, 0, n));
      const Plane keys = plane(k, type, cache.keys(b, w.kv_head), cache.row_bytes(), n, D, expanded);
      for (int p = 0; p < n; ++p) pointers[p] = keys.data + p * keys.stride;
      k.float_product[index(keys.type)](pointers, n, query, D, rows, D, scores, block);
      k.online_softmax(scores, block, rows, visible, n, scale, top, total, shrink);
      for (int r = 0; r < rows; ++r) {
        if (shrink[r] != 1) k.scale_row(sum + r * D, shrink[r], D);
      }
      const Plane values = plane(k, type, cache.values(b, w.kv_head), cache.row_bytes(), n, D, expanded);
      k.weighted_sum[index(values.type)](1, sum, D, rows, D, scores, block, 1, values.data, values.stride, n);
    }
    if (w.partial < 0) {
      for (int r = 0; r < rows; ++r) {
        k.scale_row(sum + r * D, 1 / total[r], D);
        std::copy_n(sum + r * D, D, out.row(segment.begin + w.token + r / group) + (w.kv_head * group + r % group) * D);
      }
    } else {
      auto* partial = reinterpret_cast<float*>(partial_[w.partial]);
      for (int r = 0; r < rows; ++r, partial += D + 2) {
        partial[0] = total[r];
        partial[1] = top[r];
        std::copy_n(sum + r * D, D, partial + 2);
      }
    }
  }

  struct Plane {
    DType type;
    const std::byte* data;
    std::ptrdiff_t stride;
  };
  // n rows of the cache as something that products read: q8_0 is expanded.
  static Plane plane(const Kernels& k, DType type, const std::byte* data, std::size_t stride, int n, int D,
                     float* expanded) noexcept {
    if (type != DType::q8_0) return {type, data, static_cast<std::ptrdiff_t>(stride)};
    for (int p = 0; p < n; ++p) k.dequantize(type, data + static_cast<std::size_t>(p) * stride, D, expanded + p * D);
    return {DType::f32, reinterpret_cast<const std::byte*>(expanded), D * static_cast<std::ptrdiff_t>(sizeof(float))};
  }

  void merge(const Kernels& k, const Team& team, const HostTensor& out, AttentionShape shape,
             std::span<const Segment<HostKvCache>> segments) const {
    const int D = shape.head_dim, group = shape.heads / shape.kv_heads;
    team.each(static_cast<int>(work_.size()), std::int64_t{max_splits} * D, [&](int i, int) {
      const Work& w = work_[static_cast<std::size_t>(i)];
      if (w.splits < 2) return;
      const auto& segment = segments[static_cast<std::size_t>(w.segment)];
      for (int r = 0; r < w.count * group; ++r) {
        auto part = [&](int p) { return reinterpret_cast<const float*>(partial_[w.partial + p]) + r * (D + 2); };
        float top = part(0)[1], total = 0;
        for (int p = 1; p < w.splits; ++p) top = std::max(top, part(p)[1]);
        float* o = out.row(segment.begin + w.token + r / group) + (w.kv_head * group + r % group) * D;
        std::fill_n(o, D, 0.0f);
        for (int p = 0; p < w.splits; ++p) {
          const float weight = std::exp(part(p)[1] - top);
          total += weight * part(p)[0];
          k.add(o, part(p) + 2, weight, D);
        }
        k.scale_row(o, 1 / total, D);
      }
    });
  }

  std::vector<Work> work_;
  std::size_t partials_ = 0, rows_ = 0;
  Scratch space_scratch_, partial_scratch_;
  Scratch::Pieces spaces_{}, partial_{};
};

}  // namespace qwen3next::cpu
