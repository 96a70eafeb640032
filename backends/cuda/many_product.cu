#include "backends/cuda/many_product.hpp"

namespace qwen3next::cuda {

void multiply_many(const Device& device, const ManyProduct& product, int rows, int log_splits) {
  const auto with = rows <= 8    ? multiply_many<8>
                    : rows <= 16 ? multiply_many<16>
                    : rows <= 32 ? multiply_many<32>
                    : rows <= 64 ? multiply_many<64>
                                 : multiply_many<128>;
  with(device, product, log_splits);
}

}  // namespace qwen3next::cuda
