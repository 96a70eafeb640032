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
    const int D = shape.head_dim;
    std::size_t floats = 0;
    std::int64_t positions = 0;
    for (const Work& w : work_) {
      const DType type = stored_type(segments[static_cast<std::size_t>(w.segment)].state->type());
      floats = std::max(floats, k.attention_space(w.rows(), D, block, type));
      positions += (w.last - w.first) * block * w.rows();
    }
    spaces_ = space_scratch_.pieces(static_cast<std::size_t>(team.size()), floats * sizeof(float));
    // Of each split: for each row l, m, then o [D].
    partial_ = partial_scratch_.pieces(partials_, max_rows * (static_cast<std::size_t>(D) + 2) * sizeof(float));
    const auto pieces = static_cast<int>(work_.size());
    team.each(pieces, 2 * positions * D / std::max(1, pieces), [&](int i, int thread) {
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

  // Tokens [token, token + count) of a segment and query heads [head, head + heads), which share a KV head, against
  // blocks [first, last).
  struct Work {
    int segment, kv_head, head, heads, token, count;
    std::int64_t first, last;
    int partial;  // -1: the whole context, straight to `out`
    int splits;   // of the same rows: this one and those after it, 0 unless the first
    int rows() const noexcept { return count * heads; }
    // Row r is a token and a head of it: where that is in q and in out.
    float* of(const HostTensor& x, int begin, int r, int D) const noexcept {
      return x.row(begin + token + r / heads) + (head + r % heads) * D;
    }
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
    const int group = shape.heads / shape.kv_heads, heads = std::min(group, max_rows), tile = max_rows / heads;
    for (int i = 0; i < static_cast<int>(segments.size()); ++i) {
      const auto& s = segments[static_cast<std::size_t>(i)];
      const std::int64_t past = s.state->length() - s.count;
      for (int head = 0; head < shape.heads; head += std::min(heads, group - head % group)) {
        for (int t = 0; t < s.count; t += tile) {
          const int count = std::min(tile, s.count - t);
          const std::int64_t blocks = (past + t + count + block - 1) / block;
          std::int64_t length = blocks;
          if (s.count <= few_tokens)
            length = std::max<std::int64_t>(split_blocks, (blocks + max_splits - 1) / max_splits);
          const int splits = static_cast<int>((blocks + length - 1) / length);
          for (int p = 0; p < splits; ++p) {
            work_.push_back({i, head / group, head, std::min(heads, group - head % group), t, count, p * length,
                             std::min((p + 1) * length, blocks), splits == 1 ? -1 : static_cast<int>(partials_),
                             p == 0 ? splits : 0});
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
    const int D = shape.head_dim, rows = w.rows();
    const std::int64_t past = cache.length() - segment.count;
    Kernels::AttentionRows a{};
    a.queries = rows;
    a.D = D;
    const float* query[max_rows];
    for (int r = 0; r < rows; ++r) query[r] = w.of(q, segment.begin, r, D);
    k.attention_start(a, reinterpret_cast<float*>(space), block, query);
    for (std::int64_t b = w.first; b < w.last; ++b) {
      const std::int64_t start = b * block;
      const int n = static_cast<int>(std::min<std::int64_t>(block, past + w.token + w.count - start));
      for (int r = 0; r < rows; ++r) {
        a.visible[r] =
            static_cast<std::int32_t>(std::clamp<std::int64_t>(past + w.token + r / w.heads + 1 - start, 0, n));
      }
      k.attention_block(
          a, {stored_type(cache.type()), n, cache.keys(b, w.kv_head), cache.values(b, w.kv_head),
              static_cast<std::ptrdiff_t>(cache.row_bytes()), b + 1 < w.last ? cache.keys(b + 1, w.kv_head) : nullptr});
    }
    if (w.partial < 0) {
      for (int r = 0; r < rows; ++r) {
        k.scale_row(a.sum + r * D, 1 / a.total[r], D);
        std::copy_n(a.sum + r * D, D, w.of(out, segment.begin, r, D));
      }
    } else {
      auto* partial = reinterpret_cast<float*>(partial_[w.partial]);
      for (int r = 0; r < rows; ++r, partial += D + 2) {
        partial[0] = a.total[r];
        partial[1] = a.top[r];
        std::copy_n(a.sum + r * D, D, partial + 2);
      }
    }
  }

  void merge(const Kernels& k, const Team& team, const HostTensor& out, AttentionShape shape,
             std::span<const Segment<HostKvCache>> segments) const {
    const int D = shape.head_dim;
    team.each(static_cast<int>(work_.size()), std::int64_t{max_splits} * D, [&](int i, int) {
      const Work& w = work_[static_cast<std::size_t>(i)];
      if (w.splits < 2) return;
      const auto& segment = segments[static_cast<std::size_t>(w.segment)];
      for (int r = 0; r < w.rows(); ++r) {
        auto part = [&](int p) { return reinterpret_cast<const float*>(partial_[w.partial + p]) + r * (D + 2); };
        float top = part(0)[1], total = 0;
        for (int p = 1; p < w.splits; ++p) top = std::max(top, part(p)[1]);
        float* o = w.of(out, segment.begin, r, D);
        std::fill_n(o, D, 0.0f);
        for (int p = 0; p < w.splits; ++p) {
          const float weight = std::exp2(part(p)[1] - top);
          total += weight * part(p)[0];
          k.add(o, part(p) + 2, weight, D);
        }
        k.scale_row(o, 1 / total, D);
      }
    });
  }

  std::vector<Work> work_;
  std::size_t partials_ = 0;
  Scratch space_scratch_, partial_scratch_;
  Scratch::Pieces spaces_{}, partial_{};
};

}  // namespace qwen3next::cpu
