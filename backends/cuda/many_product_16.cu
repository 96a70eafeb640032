#include "backends/cuda/many_product.cuh"

namespace qwen3next::cuda {

template void multiply_many<16>(const Device& device, ManyProduct p, int log_splits);

}  // namespace qwen3next::cuda
