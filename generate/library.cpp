// What is compiled once for those who link the library.
#define QWEN3NEXT_LIBRARY
#define QWEN3NEXT_REFERENCE
#include "generate/make_engine.hpp"
#include "generate/session.hpp"
#include "weights/quantize.hpp"
