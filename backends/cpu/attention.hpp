#pragma once
// Causal attention over the KV cache, a block of 256 positions at a time, with the softmax built up on the way
// (FlashAttention, arXiv:2205.14135):
//   m' = max(m, max s)   l' = l exp(m - m') + sum exp(s - m')   o' = o exp(m - m') + exp(s - m') V;   out = o / l
//
// The query heads of one KV head, for several tokens, are the rows of one piece of work, so that keys and values are
// read once for all of them.  Few tokens: the context is split into pieces whose length its own length decides, merged
// in order, and each token does what it does alone, block by block in turns: its result is the same bit for bit.

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
      const auto parts = static_cast<std::size_t>(w.parts());
      floats = std::max(floats, parts * k.attention_space(w.rows() / w.parts(), D, block, type));
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

  // The first step alone: keys and values into the caches.
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

 private:
  static constexpr int block = HostKvCache::block_positions;
  static constexpr int max_rows = 64;     // queries (tokens x heads of a group) of a piece of work
  static constexpr int few_tokens = 8;    // up to here the context is split, and tokens are apart
  static constexpr int split_blocks = 8;  // into pieces of at least 2048 positions,
  static constexpr int max_splits = 64;   // and at most 64 of them

  // Tokens [token, token + count) of a segment and query heads [head, head + heads), which share a KV head, against
  // blocks [first, last).
  struct Work {
    int segment, kv_head, head, heads, token, count;
    bool apart;  // each token's rows have a softmax of their own, or all have one
    std::int64_t first, last;
    int partial;  // -1: the whole context, straight to `out`
    int splits;   // of the same rows: this one and those after it, 0 unless the first
    int rows() const noexcept { return count * heads; }
    int parts() const noexcept { return apart ? count : 1; }
    // Row r is a token and a head of it: where that is in q and in out.
    float* of(const HostTensor& x, int begin, int r, int D) const noexcept {
      return x.row(begin + token + r / heads) + (head + r % heads) * D;
    }
  };

  // Depends on the shape, the counts and the lengths only, never on the number of threads.
  void plan(AttentionShape shape, std::span<const Segment<HostKvCache>> segments) {
    work_.clear();
    partials_ = 0;
    const int group = shape.heads / shape.kv_heads, heads = std::min(group, max_rows), tile = max_rows / heads;
    for (int i = 0; i < static_cast<int>(segments.size()); ++i) {
      const auto& s = segments[static_cast<std::size_t>(i)];
      const std::int64_t past = s.state->length() - s.count;
      for (int head = 0; head < shape.heads; head += std::min(heads, group - head % group)) {
        for (int t = 0, count; t < s.count; t += count) {
          const bool few = s.count <= few_tokens;
          count = std::min(tile, s.count - t);
          // A token that begins a block may split the context otherwise than those before it.
          if (few) count = std::min(count, static_cast<int>(block - (past + t) % block));
          const std::int64_t blocks = (past + t + count + block - 1) / block;
          std::int64_t length = blocks;
          if (few) length = std::max<std::int64_t>(split_blocks, (blocks + max_splits - 1) / max_splits);
          const int splits = static_cast<int>((blocks + length - 1) / length);
          for (int p = 0; p < splits; ++p) {
            work_.push_back({i, head / group, head, std::min(heads, group - head % group), t, count, few, p * length,
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
    const int D = shape.head_dim, rows = w.rows(), parts = w.parts();
    const int part_rows = rows / parts, part_tokens = w.count / parts;
    const std::int64_t past = cache.length() - segment.count + w.token;
    const DType type = stored_type(cache.type());
    Kernels::AttentionRows all[few_tokens] = {};
    const float* query[max_rows];
    for (int r = 0; r < rows; ++r) query[r] = w.of(q, segment.begin, r, D);
    auto* floats = reinterpret_cast<float*>(space);
    for (int i = 0; i < parts; ++i) {
      all[i].queries = part_rows;
      all[i].D = D;
      k.attention_start(all[i], floats, block, query + i * part_rows);
      floats += k.attention_space(part_rows, D, block, type);
    }
    for (std::int64_t b = w.first; b < w.last; ++b) {
      const std::byte* next = b + 1 < w.last ? cache.keys(b + 1, w.kv_head) : nullptr;
      for (int i = 0; i < parts; ++i) {
        const Kernels::AttentionRows& a = all[i];
        const std::int64_t before = past + i * part_tokens - b * block;  // the part's first token, in this block
        const int n = static_cast<int>(std::min<std::int64_t>(block, before + part_tokens));
        for (int r = 0; r < part_rows; ++r)
          a.visible[r] = static_cast<std::int32_t>(std::clamp<std::int64_t>(before + r / w.heads + 1, 0, n));
        k.attention_block(a, {type, n, cache.keys(b, w.kv_head), cache.values(b, w.kv_head),
                              static_cast<std::ptrdiff_t>(cache.row_bytes()), i + 1 == parts ? next : nullptr});
      }
    }
    auto* partial = w.partial < 0 ? nullptr : reinterpret_cast<float*>(partial_[w.partial]);
    for (int r = 0; r < rows; ++r) {
      const Kernels::AttentionRows& a = all[r / part_rows];
      const int own = r % part_rows;
      float* sum = a.sum + own * D;
      if (!partial) {
        k.scale_row(sum, 1 / a.total[own], D);
        std::copy_n(sum, D, w.of(out, segment.begin, r, D));
      } else {
        partial[0] = a.total[own];
        partial[1] = a.top[own];
        std::copy_n(sum, D, partial + 2);
        partial += D + 2;
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
