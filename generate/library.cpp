// What is compiled once for those who link the library.
#define QWEN3NEXT_LIBRARY
#define QWEN3NEXT_REFERENCE
#define QWEN3NEXT_QUANTIZE
#include "qwen3next.hpp"
