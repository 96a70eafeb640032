#pragma once
// The routed experts: tokens gathered by expert, so that each expert's matrices are read once for all its tokens.
//
// Three steps with a barrier between:
//   1. h = silu(gate x) * up x     shared out by (expert, rows)
//   2. h quantised, in panels      shared out by rows of h, then by expert
//   3. out = sum weight * down h   shared out by columns of out
// Experts may come in waves, a range of ids each, as memory has room for them (backends/expert_supply.hpp): step 1
// takes those of a wave as they arrive, 2 and 3 the whole wave. Sums over experts run in the order of their ids: the
// same for any number of tokens, threads and waves.

#include <algorithm>
#include <span>
#include <vector>

#include "backends/cpu/linear.hpp"
#include "backends/expert_supply.hpp"

namespace qwen3next::cpu {

class ExpertLayer {
 public:
  void operator()(const Kernels& k, const Team& team, const HostTensor& out, const HostTensor& x,
                  const HostRouting& routing, ExpertSupply& supply) {
    if (x.n_rows == 0) return;
    gather(routing, x.n_rows, supply.count());
    supply.begin(picks_, x.n_rows);
    for (std::size_t i = 0; i < jobs_.size(); ++i) jobs_[i].expert = &supply.view(static_cast<int>(i));
    const int D = x.n_cols, width = jobs_.front().expert->gate.rows;
    workspaces_.reserve(k, team, std::max(D, width), max_count_);
    each_ = x.n_rows > k.row_tokens ? pieces_each : 1;
    if (any_quantised(&ExpertView::gate) || any_quantised(&ExpertView::up))
      x_.prepare(k, team, x.data, x.stride, x.n_rows, D);
    auto* h =
        reinterpret_cast<float*>(h_scratch_.get(sizeof(float) * static_cast<std::size_t>(x.n_rows) *
                                                static_cast<std::size_t>(routing.k) * static_cast<std::size_t>(width)));
    team.split(x.n_rows, out.n_cols, [&](int begin, int end) {
      for (int t = begin; t < end; ++t) std::fill_n(out.row(t), out.n_cols, 0.0f);
    });
    for (ExpertSupply::Range wave = supply.next_wave(); wave.begin < wave.end; wave = supply.next_wave()) {
      for (auto arrived = supply.arrived(); !arrived.empty(); arrived = supply.arrived())
        hidden(k, team, arrived, x, h, width);
      add_down(k, team,
               std::span(jobs_).subspan(static_cast<std::size_t>(wave.begin),
                                        static_cast<std::size_t>(wave.end - wave.begin)),
               h, width, out);
    }
  }

 private:
  static constexpr int row_unit = 16;

  // The tokens [begin, begin + count) of tokens_ and weights_ are this expert's.
  struct Job {
    const ExpertView* expert;  // its data are there once it has arrived
    int begin, count;
    int first_panel;  // of its rows of h
  };
  // Rows of activations, quantised and not.
  struct Input {
    const QuantizedRows* quantized;
    const float* data;
    std::ptrdiff_t stride;
    int n;
  };
  // Room of one thread: y, z [count, chunk] and what the products need.
  struct Workspace {
    float *y, *z, *rows, *expanded;
    std::byte* strips;
    Scratch::Pieces panels;  // of the expert at hand
  };
  class Workspaces {
   public:
    void reserve(const Kernels& k, const Team& team, int n, int count) {
      const auto tokens = static_cast<std::size_t>(count), threads = static_cast<std::size_t>(team.size());
      const std::size_t values =
          std::max(tokens * row_chunk, std::min<std::size_t>(tokens, max_row_tokens) * few_tokens_chunk);
      y_ = scratch_[0].pieces(threads, values * sizeof(float));
      z_ = scratch_[1].pieces(threads, values * sizeof(float));
      rows_ = scratch_[2].pieces(
          threads, std::min<std::size_t>(tokens, float_token_block) * static_cast<std::size_t>(n) * sizeof(float));
      expanded_ = scratch_[5].pieces(threads, row_chunk * static_cast<std::size_t>(n) * sizeof(float));
      strips_ = scratch_[3].pieces(threads, strips_bytes(k, n));
      panels_each_ = static_cast<std::size_t>(Panels(count, k.max_panel).count);
      panels_ = scratch_[4].pieces(threads * panels_each_, k.panel_bytes(n, k.max_panel));
    }
    Workspace operator[](int thread) const noexcept {
      return {reinterpret_cast<float*>(y_[thread]),
              reinterpret_cast<float*>(z_[thread]),
              reinterpret_cast<float*>(rows_[thread]),
              reinterpret_cast<float*>(expanded_[thread]),
              strips_[thread],
              {panels_[static_cast<std::size_t>(thread) * panels_each_], panels_.stride}};
    }

   private:
    Scratch scratch_[6];
    Scratch::Pieces y_{}, z_{}, rows_{}, expanded_{}, strips_{}, panels_{};
    std::size_t panels_each_ = 0;
  };

  // Step 1 for the jobs `which`: rows of h [pairs, width] at the jobs' places.
  void hidden(const Kernels& k, const Team& team, std::span<const std::int32_t> which, const HostTensor& x, float* h,
              int width) {
    const Input in{&x_, x.data, x.stride, x.n_cols};
    std::int64_t pairs = 0;
    shares_.clear();
    for (const std::int32_t i : which) {
      const Job& job = jobs_[static_cast<std::size_t>(i)];
      const std::size_t bytes = (job.expert->gate.row_bytes() + job.expert->up.row_bytes()) * row_unit;
      shares_.add(width, row_unit, static_cast<std::int64_t>(bytes) * (8 + job.count));
      pairs += job.count;
    }
    team.pieces(each_, 2 * pairs * width * x.n_cols, [&](int piece, int pieces, int thread) {
      const Workspace space = workspaces_[thread];
      shares_.mine(piece, pieces, [&](int i, int begin, int end) {
        const Job& job = jobs_[static_cast<std::size_t>(which[static_cast<std::size_t>(i)])];
        const ExpertView& e = *job.expert;
        const std::int32_t* tokens = tokens_.data() + job.begin;
        if (uses_strips(k, job.count, e.gate.type) || uses_strips(k, job.count, e.up.type))
          collect(k, in, tokens, job.count, space.panels);
        const int chunk = std::min(chunk_of(k, e.gate, job.count), chunk_of(k, e.up, job.count));
        for (int r = begin; r < end; r += chunk) {
          const int n = std::min(chunk, end - r);
          const auto next = static_cast<std::size_t>(i) + 1;
          Soon soon = rows_ahead(e.gate, r + n, chunk);
          if (r + n >= end)
            soon = next < which.size()
                       ? rows_ahead(jobs_[static_cast<std::size_t>(which[next])].expert->gate, 0, row_chunk)
                       : Soon{nullptr, 0};
          multiply(k, e.gate, r, n, in, tokens, job.count, space, space.y, chunk, rows_ahead(e.up, r, n));
          multiply(k, e.up, r, n, in, tokens, job.count, space, space.z, chunk, soon);
          for (int s = 0; s < job.count; ++s) {
            k.swiglu(h + static_cast<std::ptrdiff_t>(job.begin + s) * width + r, space.y + s * chunk,
                     space.z + s * chunk, n);
          }
        }
      });
    });
  }

  // Steps 2 and 3 for jobs that are neighbours.
  void add_down(const Kernels& k, const Team& team, std::span<Job> jobs, const float* h, int width,
                const HostTensor& out) {
    const int first_pair = jobs.front().begin, pairs = jobs.back().begin + jobs.back().count - first_pair;
    const float* rows = h + static_cast<std::ptrdiff_t>(first_pair) * width;
    if (any_quantised(&ExpertView::down)) h_.prepare(k, team, rows, width, pairs, width);
    const Input in{&h_, rows, width, width};
    auto positions = [&](const Job& job) { return identity_.data() + (job.begin - first_pair); };
    pack_hidden(k, team, jobs, in, positions);
    const int H = out.n_cols, units = (H + row_unit - 1) / row_unit;
    team.pieces(each_, std::int64_t{pairs} * width * H, [&](int piece, int pieces, int thread) {
      const int first = units * piece / pieces * row_unit, last = std::min(units * (piece + 1) / pieces * row_unit, H);
      if (first >= last) return;
      Workspace space = workspaces_[thread];
      for (std::size_t i = 0; i < jobs.size(); ++i) {
        const Job& job = jobs[i];
        const WeightView& down = job.expert->down;
        space.panels = {panels_[job.first_panel], panels_.stride};
        const int chunk = chunk_of(k, down, job.count);
        for (int r = first; r < last; r += chunk) {
          const int n = std::min(chunk, last - r);
          Soon soon = rows_ahead(down, r + n, chunk);
          if (r + n >= last)
            soon = i + 1 < jobs.size() ? rows_ahead(jobs[i + 1].expert->down, first, row_chunk) : Soon{nullptr, 0};
          multiply(k, down, r, n, in, positions(job), job.count, space, space.y, chunk, soon);
          for (int s = 0; s < job.count; ++s) {
            const auto pair = static_cast<std::size_t>(job.begin + s);
            k.add(out.row(tokens_[pair]) + r, space.y + s * chunk, weights_[pair], n);
          }
        }
      }
    });
  }

  // A counting sort of (token, expert) pairs by expert; ids below 0 are picks that others serve.
  void gather(const HostRouting& routing, int T, int n_experts) {
    const auto pairs = static_cast<std::size_t>(T) * static_cast<std::size_t>(routing.k);
    starts_.assign(static_cast<std::size_t>(n_experts) + 1, 0);
    tokens_.resize(pairs);
    weights_.resize(pairs);
    for (std::size_t i = identity_.size(); i < pairs; ++i) identity_.push_back(static_cast<std::int32_t>(i));
    for (std::size_t i = 0; i < pairs; ++i) {
      if (routing.ids[i] >= 0) ++starts_[static_cast<std::size_t>(routing.ids[i]) + 1];
    }
    jobs_.clear();
    picks_.clear();
    max_count_ = 0;
    for (std::size_t e = 0; e < static_cast<std::size_t>(n_experts); ++e) {
      const int count = starts_[e + 1];
      starts_[e + 1] += starts_[e];
      if (count == 0) continue;
      jobs_.push_back({nullptr, starts_[e], count, 0});
      picks_.push_back({static_cast<std::int32_t>(e), count});
      max_count_ = std::max(max_count_, count);
    }
    for (std::size_t i = 0; i < pairs; ++i) {
      if (routing.ids[i] < 0) continue;
      const auto at = static_cast<std::size_t>(starts_[static_cast<std::size_t>(routing.ids[i])]++);
      tokens_[at] = static_cast<std::int32_t>(i / static_cast<std::size_t>(routing.k));
      weights_[at] = routing.weights[i];
    }
  }

  bool any_quantised(WeightView ExpertView::*matrix) const noexcept {
    return std::any_of(jobs_.begin(), jobs_.end(),
                       [&](const Job& job) { return info((job.expert->*matrix).type).quantised; });
  }

  static bool uses_strips(const Kernels& k, int count, DType type) noexcept {
    return info(type).quantised && count > k.row_tokens;
  }

  // Packs the chosen rows into panels.
  static void collect(const Kernels& k, const Input& in, const std::int32_t* chosen, int count,
                      const Scratch::Pieces& out) noexcept {
    const Panels panels(count, k.max_panel);
    const std::byte* rows[64];
    for (int p = 0; p < panels.count; ++p) {
      for (int t = 0; t < panels.width(p); ++t) rows[t] = in.quantized->row(chosen[panels.begin(p) + t]);
      k.pack_panel(rows, panels.width(p), in.n, out[p]);
    }
  }

  // How many rows of a matrix are multiplied at once.
  static int chunk_of(const Kernels& k, const WeightView& w, int count) noexcept {
    return info(w.type).quantised && count <= k.row_tokens ? few_tokens_chunk : row_chunk;
  }

  // The panels of h, for all who multiply with them.
  template <class PositionsOf>
  void pack_hidden(const Kernels& k, const Team& team, std::span<Job> jobs, const Input& in, PositionsOf positions) {
    int panels = 0;
    for (Job& job : jobs) {
      job.first_panel = panels;
      if (uses_strips(k, job.count, job.expert->down.type)) panels += Panels(job.count, k.max_panel).count;
    }
    if (panels == 0) return;
    panels_ = panel_scratch_.pieces(static_cast<std::size_t>(panels), k.panel_bytes(in.n, k.max_panel));
    const auto n = static_cast<int>(jobs.size());
    team.each(n, std::int64_t{16} * panels / n * k.max_panel * in.n, [&](int i, int) {
      const Job& job = jobs[static_cast<std::size_t>(i)];
      if (uses_strips(k, job.count, job.expert->down.type))
        collect(k, in, positions(job), job.count, {panels_[job.first_panel], panels_.stride});
    });
  }

  // y[s, j] = row r + j of w times chosen input s;  y [count, chunk].
  static void multiply(const Kernels& k, const WeightView& w, int r, int n, const Input& in, const std::int32_t* chosen,
                       int count, const Workspace& space, float* y, int chunk, const Soon& soon) noexcept {
    const auto type = index(w.type);
    if (!info(w.type).quantised) {
      for (int begin = 0; begin < count; begin += float_token_block) {
        const int T = std::min(float_token_block, count - begin);
        for (int s = 0; s < T; ++s) std::copy_n(in.data + chosen[begin + s] * in.stride, in.n, space.rows + s * in.n);
        float_rows_product(k, w, r, n, space.rows, in.n, T, space.expanded, y + begin * chunk, chunk);
      }
    } else if (count <= k.row_tokens) {
      const std::byte* rows[few_tokens_chunk];
      row_pointers(w, r, n, rows);
      const std::byte* operands[max_row_tokens];
      for (int s = 0; s < count; ++s) operands[s] = in.quantized->operand(chosen[s]);
      k.row_product[type](rows, n, in.n, operands, count, y, chunk);
    } else {
      strips_product(
          k, w, r, n, Panels(count, k.max_panel), [&](int p) { return space.panels[p]; }, space.strips, y, chunk, soon);
    }
    apply_scale(k, w, y, chunk, count, n);
  }

  std::vector<Job> jobs_;
  std::vector<ExpertSupply::Pick> picks_;  // of the same experts
  std::vector<int> starts_;
  std::vector<std::int32_t> tokens_, identity_;
  std::vector<float> weights_;
  int max_count_ = 0, each_ = 1;
  QuantizedRows x_, h_;
  Scratch h_scratch_, panel_scratch_;
  Scratch::Pieces panels_{};
  Workspaces workspaces_;
  Shares shares_;
};

}  // namespace qwen3next::cpu
