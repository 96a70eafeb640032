#!/usr/bin/env bash
# A program with the CUDA backend where no GPU is to be seen: the rest of it works, and --backend cuda is one clear error.
#   usage: test_no_gpu.sh PROGRAM SOURCE_DIR
set -euo pipefail
program=$1 model=$2/weights/tiny/qwen3next-tiny.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAIL: $*" >&2; exit 1; }
export CUDA_VISIBLE_DEVICES=-1

"$program" run "$model" -p "Once upon a time" -n 5 --quiet > "$work/out" || fail "the cpu backend does not run"
for command in "run $model -p hi -n 1" "bench $model -p 8 -n 1 -r 1" "logits $model --tokens 1,2 --out $work/l.npy"; do
  status=0
  "$program" $command --backend cuda > "$work/out" 2> "$work/err" || status=$?
  [ "$status" -eq 1 ] || fail "$command --backend cuda: exit status $status, expected 1"
  [ ! -s "$work/out" ] || fail "$command --backend cuda: something on stdout"
  [ "$(wc -l < "$work/err")" -eq 1 ] || fail "$command --backend cuda: not one line: $(cat "$work/err")"
  grep -qE "^qwen3next: error: --backend cuda: .*(driver is missing|no NVIDIA GPU).*use cpu" "$work/err" ||
    fail "$command --backend cuda: an unclear error: $(cat "$work/err")"
done
echo "without a GPU: good"
