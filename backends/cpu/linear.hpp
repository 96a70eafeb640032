#pragma once
// y = W x for matrices of any type that share one x: shares the rows out over threads.

#include <algorithm>
#include <span>
#include <vector>

#include "backends/backend.hpp"
#include "backends/cpu/kernel_table.hpp"
#include "backends/cpu/parallel.hpp"
#include "backends/host_tensor.hpp"
#include "blocks/weight_view.hpp"

namespace qwen3next::cpu {

inline std::size_t index(DType type) noexcept { return static_cast<std::size_t>(type); }

constexpr int row_chunk = 64;          // rows handed to a kernel at once
constexpr int few_tokens_chunk = 512;  // the same in decode: memory is read fastest where it is read on and on
constexpr int float_token_block = 48;  // tokens whose fp32 rows stay in L2 while weights pass
constexpr int pieces_each = 4;         // of a long work, for each thread
constexpr int expand_tokens = 9;       // from so many on, rows of F8_E4M3 are expanded once for all

inline void row_pointers(const WeightView& w, int begin, int count, const std::byte** rows) noexcept {
  int group = begin / w.group_rows, inside = begin % w.group_rows;
  const std::size_t bytes = w.row_bytes();
  for (int i = 0; i < count; ++group, inside = 0) {
    const std::byte* row =
        w.data + static_cast<std::size_t>(group) * w.group_stride + static_cast<std::size_t>(inside) * bytes;
    const int run = std::min(count - i, w.group_rows - inside);
    for (int j = 0; j < run; ++j, row += bytes) rows[i++] = row;
  }
}

// Tokens in panels of equal width, at most max_panel.
struct Panels {
  Panels(int n, int max_panel) : tokens(n), count((n + max_panel - 1) / max_panel) {}
  int tokens, count;
  int begin(int panel) const noexcept { return static_cast<int>(static_cast<std::int64_t>(tokens) * panel / count); }
  int width(int panel) const noexcept { return begin(panel + 1) - begin(panel); }
};

// Rows [begin, begin + count) of a matrix, as far as they exist and lie in one piece.
inline Soon rows_ahead(const WeightView& w, int begin, int count) noexcept {
  if (begin >= w.rows) return {nullptr, 0};
  const int n = std::min({count, w.rows - begin, w.group_rows - begin % w.group_rows});
  return {w.row(begin), static_cast<std::size_t>(n) * w.row_bytes()};
}

// Room for the strips of row_chunk rows: they are unpacked together, so that a panel passes by once for all of them,
// and fit into the second cache (4096 columns of the largest form: 450 KB).
inline std::size_t strips_bytes(const Kernels& k, int n) noexcept {
  return static_cast<std::size_t>(row_chunk / k.lanes) * k.strip_bytes(n);
}

// y[t, j] = row begin + j of a quantised w times token t, for n <= row_chunk rows and all panels.  `soon` is what will
// be unpacked after that.
template <class PanelAt>
void strips_product(const Kernels& k, const WeightView& w, int begin, int n, const Panels& panels, PanelAt panel_at,
                    std::byte* strips, float* y, std::ptrdiff_t y_stride, const Soon& soon) noexcept {
  const auto type = index(w.type);
  const std::size_t strip_bytes = k.strip_bytes(w.cols);
  const int count = (n + k.lanes - 1) / k.lanes;
  const std::byte* rows[row_chunk];
  row_pointers(w, begin, n, rows);
  auto lanes_of = [&](int s) { return std::min(k.lanes, n - s * k.lanes); };
  auto strip = [&](int s) { return strips + static_cast<std::size_t>(s) * strip_bytes; };
  for (int s = 0; s < count; ++s) k.pack_strip[type](rows + s * k.lanes, lanes_of(s), w.cols, strip(s));
  const auto products = static_cast<std::size_t>(panels.count * count);
  std::size_t done = 0;
  for (int p = 0; p < panels.count; ++p) {
    for (int s = 0; s < count; ++s, ++done) {
      const std::size_t from = soon.bytes * done / products, to = soon.bytes * (done + 1) / products;
      k.strip_product[type](strip(s), lanes_of(s), w.cols, panel_at(p), panels.width(p),
                            y + panels.begin(p) * y_stride + s * k.lanes, y_stride, {soon.data + from, to - from});
    }
  }
}

// Row r of any matrix as floats.
inline void expand_row(const Kernels& k, const WeightView& w, int r, float* out) noexcept {
  if (w.type == DType::f8_e4m3)
    k.dequantize_f8(w.row(r), w.grid_row(r), w.grid.type, w.cols, out);
  else
    k.dequantize(w.type, w.row(r), w.cols, out);
  if (w.scale != 1) k.scale_row(out, w.scale, w.cols);
}

// y[t, j] = row begin + j of w times x[t], for n <= row_chunk rows of a matrix of floats or F8_E4M3, T tokens,
// x [T, w.cols].  `expanded` has room for row_chunk rows of floats.
inline void float_rows_product(const Kernels& k, const WeightView& w, int begin, int n, const float* x,
                               std::ptrdiff_t x_stride, int T, float* expanded, float* y,
                               std::ptrdiff_t y_stride) noexcept {
  const std::byte* rows[row_chunk];
  row_pointers(w, begin, n, rows);
  DType type = w.type;
  if (type == DType::f8_e4m3) {
    const std::byte* factors[row_chunk];
    for (int i = 0; i < n; ++i) factors[i] = w.grid_row(begin + i);
    if (T < expand_tokens) {
      k.f8_product(rows, factors, w.grid.type, n, w.cols, x, x_stride, T, y, y_stride);
      return;
    }
    for (int i = 0; i < n; ++i, expanded += w.cols) {
      k.dequantize_f8(rows[i], factors[i], w.grid.type, w.cols, expanded);
      rows[i] = reinterpret_cast<const std::byte*>(expanded);
    }
    type = DType::f32;
  }
  for (int t = 0; t < T; t += float_token_block) {
    k.float_product[index(type)](rows, n, x + t * x_stride, x_stride, std::min(float_token_block, T - t), w.cols,
                                 y + t * y_stride, y_stride);
  }
}

// The factor that a whole matrix has: y [T, n].
inline void apply_scale(const Kernels& k, const WeightView& w, float* y, std::ptrdiff_t y_stride, int T,
                        int n) noexcept {
  if (w.scale == 1) return;
  for (int t = 0; t < T; ++t) k.scale_row(y + t * y_stride, w.scale, n);
}

// Work in pieces of `unit` rows, one range of pieces per thread, equal in cost.
class Shares {
 public:
  void clear() noexcept { parts_.clear(), total_ = 0; }
  void add(int rows, int unit, std::int64_t cost_per_unit) {
    parts_.push_back({rows, unit, cost_per_unit, total_});
    total_ += cost_per_unit * ((rows + unit - 1) / unit);
  }
  // f(part, row begin, row end) for what is `thread`'s of all parts.
  template <class F>
  void mine(int thread, int threads, F f) const {
    const std::int64_t low = total_ / threads * thread,
                       high = thread + 1 == threads ? total_ : total_ / threads * (thread + 1);
    for (std::size_t i = 0; i < parts_.size(); ++i) {
      const Part& p = parts_[i];
      const int units = (p.rows + p.unit - 1) / p.unit;
      auto first_from = [&](std::int64_t cost) {  // units that start at `cost` or later
        const std::int64_t ahead = cost - p.start;
        if (ahead <= 0) return 0;
        return static_cast<int>(std::min<std::int64_t>((ahead + p.cost - 1) / p.cost, units));
      };
      const int begin = first_from(low) * p.unit, end = std::min(first_from(high) * p.unit, p.rows);
      if (begin < end) f(static_cast<int>(i), begin, end);
    }
  }

 private:
  struct Part {
    int rows, unit;
    std::int64_t cost, start;
  };
  std::vector<Part> parts_;
  std::int64_t total_ = 0;
};

// Rows of activations as the quantised kernels want them.
class QuantizedRows {
 public:
  // Quantises rows x[0..T) of n values.
  void prepare(const Kernels& k, const Team& team, const float* x, std::ptrdiff_t stride, int T, int n) {
    rows_ = row_scratch_.pieces(static_cast<std::size_t>(T), quantized_row_bytes(n));
    operands_ = operand_scratch_.pieces(static_cast<std::size_t>(T), k.operand_bytes(n));
    team.split(T, n, [&](int begin, int end) {
      for (int t = begin; t < end; ++t) {
        k.quantize(x + t * stride, n, rows_[t]);
        k.make_operand(rows_[t], n, operands_[t]);
      }
    });
  }
  const std::byte* row(int t) const noexcept { return rows_[t]; }
  const std::byte* operand(int t) const noexcept { return operands_[t]; }

 private:
  Scratch row_scratch_, operand_scratch_;
  Scratch::Pieces rows_{}, operands_{};
};

class Linear {
 public:
  using Item = Projection<WeightView, HostTensor>;

  void operator()(const Kernels& k, const Team& team, const HostTensor& x, std::span<const Item> items) {
    const int T = x.n_rows, D = x.n_cols;
    if (T == 0) return;
    bool any_quantised = false, any_f8 = false;
    for (const Item& item : items) {
      any_f8 |= item.weight.type == DType::f8_e4m3;
      any_quantised |= info(item.weight.type).quantised;
    }
    const bool strips = T > k.row_tokens;
    if (any_quantised && strips)
      pack_panels(k, team, x);
    else if (any_quantised)
      quantized_.prepare(k, team, x.data, x.stride, T, D);

    shares_.clear();
    std::int64_t work = 0;
    for (const Item& item : items) {
      work += static_cast<std::int64_t>(item.weight.rows) * D * T;
      const int unit = strips ? k.lanes : 4;
      shares_.add(item.weight.rows, unit, static_cast<std::int64_t>(item.weight.row_bytes()) * unit);
    }
    const Scratch::Pieces strip =
        strip_scratch_.pieces(static_cast<std::size_t>(team.size()), any_quantised && strips ? strips_bytes(k, D) : 0);
    const Scratch::Pieces expanded = expanded_scratch_.pieces(
        static_cast<std::size_t>(team.size()),
        any_f8 && T >= expand_tokens ? sizeof(float) * row_chunk * static_cast<std::size_t>(D) : 0);
    team.pieces(strips ? pieces_each : 1, work, [&](int piece, int pieces, int thread) {
      shares_.mine(piece, pieces, [&](int i, int begin, int end) {
        const Item& item = items[static_cast<std::size_t>(i)];
        if (!info(item.weight.type).quantised)
          float_rows(k, item, x, begin, end, reinterpret_cast<float*>(expanded[thread]));
        else if (strips)
          strip_rows(k, item, T, begin, end, strip[thread]);
        else
          few_tokens(k, item, T, begin, end);
        apply_scale(k, item.weight, item.y.row(0) + begin, item.y.stride, T, end - begin);
      });
    });
  }

 private:
  void pack_panels(const Kernels& k, const Team& team, const HostTensor& x) {
    const Panels panels(x.n_rows, k.max_panel);
    const int D = x.n_cols;
    panels_ = panel_scratch_.pieces(static_cast<std::size_t>(panels.count), k.panel_bytes(D, k.max_panel));
    const auto rows = static_cast<std::size_t>(k.max_panel);
    const Scratch::Pieces row =
        row_scratch_.pieces(static_cast<std::size_t>(team.size()) * rows, quantized_row_bytes(D));
    team.each(panels.count, std::int64_t{16} * k.max_panel * D, [&](int p, int thread) {
      const std::byte* pointers[64];
      for (int t = 0; t < panels.width(p); ++t) {
        std::byte* quantized = row[static_cast<std::size_t>(thread) * rows + static_cast<std::size_t>(t)];
        k.quantize(x.row(panels.begin(p) + t), D, quantized);
        pointers[t] = quantized;
      }
      k.pack_panel(pointers, panels.width(p), D, panels_[p]);
    });
  }

  void strip_rows(const Kernels& k, const Item& item, int T, int begin, int end, std::byte* strips) const noexcept {
    const Panels panels(T, k.max_panel);
    for (int r = begin; r < end; r += row_chunk) {
      strips_product(
          k, item.weight, r, std::min(row_chunk, end - r), panels, [&](int p) { return panels_[p]; }, strips,
          item.y.row(0) + r, item.y.stride, rows_ahead(item.weight, r + row_chunk, row_chunk));
    }
  }

  void few_tokens(const Kernels& k, const Item& item, int T, int begin, int end) const noexcept {
    const auto type = index(item.weight.type);
    const std::byte *rows[few_tokens_chunk], *operands[max_row_tokens];
    for (int t = 0; t < T; ++t) operands[t] = quantized_.operand(t);
    for (int r = begin; r < end; r += few_tokens_chunk) {
      const int n = std::min(few_tokens_chunk, end - r);
      row_pointers(item.weight, r, n, rows);
      k.row_product[type](rows, n, item.weight.cols, operands, T, item.y.row(0) + r, item.y.stride);
    }
  }

  static void float_rows(const Kernels& k, const Item& item, const HostTensor& x, int begin, int end,
                         float* expanded) noexcept {
    // Rows of floats pass by as often as there are blocks of tokens; F8 rows are expanded once.
    const int block = item.weight.type == DType::f8_e4m3 ? x.n_rows : float_token_block;
    for (int t = 0; t < x.n_rows; t += block) {
      const int T = std::min(block, x.n_rows - t);
      for (int r = begin; r < end; r += row_chunk) {
        const int n = std::min(row_chunk, end - r);
        float_rows_product(k, item.weight, r, n, x.row(t), x.stride, T, expanded, item.y.row(t) + r, item.y.stride);
      }
    }
  }

  QuantizedRows quantized_;
  Shares shares_;
  Scratch panel_scratch_, row_scratch_, strip_scratch_, expanded_scratch_;
  Scratch::Pieces panels_{};
};

}  // namespace qwen3next::cpu
