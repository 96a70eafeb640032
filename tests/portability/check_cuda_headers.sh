#!/bin/sh
# usage: check_cuda_headers.sh SOURCE_DIR
#
# CUDA's headers are backends/cuda's affair: all else compiles where there is no toolkit.
cd "$1" || exit 1
pattern='# *include *[<"](cuda|cublas|cub|thrust|cutlass|cooperative_groups|mma|nv|device_|driver_|vector_)[a-zA-Z_/]*(\.h|\.hpp|\.cuh)?[>"]|# *include .*\.cuh?[>"]'
found=$(grep -rnE "$pattern" qwen3next.hpp core blocks backends model weights text generate cli bench examples tests \
  --include='*.hpp' --include='*.cpp' | grep -v '^backends/cuda/')
[ -z "$found" ] && exit 0
echo "CUDA's headers outside of backends/cuda:" >&2
echo "$found" >&2
exit 1
