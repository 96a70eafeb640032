#!/usr/bin/env bash
# The sources as a folder of another project: only the library is built, and nothing of that project's is changed.
#   usage: test_add_subdirectory.sh SOURCE_DIR WORK_DIR     (WORK_DIR is kept: the library takes a minute to compile)
set -euo pipefail
source=$1 work=$2
fail() { echo "FAIL: $*" >&2; exit 1; }
mkdir -p "$work"

# Debug: that the library can be linked is asked here, not how fast it is; its kernels are optimised all the same.
# Without CUDA, whose kernels take minutes.
cmake -G Ninja -S "$source/examples/consumers/add_subdirectory" -B "$work/build" -DCMAKE_BUILD_TYPE=Debug -DQWEN3NEXT_CUDA=OFF \
  > "$work/log" 2>&1 || fail "does not configure: $(tail -20 "$work/log")"
cmake --build "$work/build" --parallel 2 > "$work/log" 2>&1 || fail "does not build: $(tail -20 "$work/log")"

[ ! -e "$work/build/qwen3next/amalgamated" ] || fail "the single header was written for a project that did not ask"
for target in qwen3next_cli test_api bench_ops example_hello; do
  if cmake --build "$work/build" --target "$target" > /dev/null 2>&1; then fail "$target is a target of the outer project"; fi
done
answer=$("$work/build/answer" "$source/weights/tiny/qwen3next-tiny.gguf") || fail "the program fails"
[ ${#answer} -gt 100 ] || fail "a short answer: $answer"
case $answer in *"("*")") ;; *) fail "the answer does not say why it ended: $answer" ;; esac
echo "$answer"
