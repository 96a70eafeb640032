#!/usr/bin/env bash
# The cross-compiled program tells the native one's story, greedily, and on every processor picks the kernels meant for it.
#   usage: same_story.sh SOURCE_DIR NATIVE_PROGRAM EMULATOR.. PROGRAM
#   QEMU_CPUS="cortex-a53:neon max:neon_i8mm" lists processors for qemu and the kernels expected there
set -euo pipefail
source=$1 native=$2
shift 2
fail() { echo "FAIL: $*" >&2; exit 1; }
[ -x "$native" ] || fail "no $native to compare with: build preset release first"

model=$source/weights/tiny/qwen3next-tiny.gguf
run=(run "$model" -p "Once upon a time, a little fox" -n 32 --temp 0 --verbose)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$native" "${run[@]}" > "$work/expected" 2> /dev/null
for entry in ${QEMU_CPUS:-:}; do
  cpu=${entry%%:*} kernels=${entry#*:}
  if ! env ${cpu:+QEMU_CPU=$cpu} "$@" "${run[@]}" > "$work/story" 2> "$work/messages"; then
    cat "$work/messages" >&2
    fail "$* ${cpu:+on $cpu}"
  fi
  backend=$(grep '^backend:' "$work/messages" | tr -d '\r')
  echo "${cpu:-here}: $backend"
  [ -z "$kernels" ] || [[ $backend == "backend: cpu, $kernels,"* ]] || fail "expected kernels $kernels"
  cmp "$work/expected" "$work/story" || fail "another story ${cpu:+on $cpu}: $(cat "$work/story")"
done
