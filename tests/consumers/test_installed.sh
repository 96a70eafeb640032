#!/usr/bin/env bash
# What `cmake --install` leaves, moved to another folder and used by those who know nothing of the build: a CMake project
# with find_package (the compiled library, then the header alone), and a compiler line with pkg-config.
#   usage: test_installed.sh BUILD_DIR SOURCE_DIR
set -euo pipefail
build=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAIL: $*" >&2; exit 1; }
model=$source/weights/tiny/qwen3next-tiny.gguf
clean() { env -i PATH="$PATH" HOME="$work" "$@"; }  # nothing of this session's variables

cmake --install "$build" --prefix "$work/first" > "$work/log" || fail "install: $(tail -5 "$work/log")"
mv "$work/first" "$work/prefix"
prefix=$work/prefix
for file in include/qwen3next.hpp bin/qwen3next share/doc/qwen3next/LICENSE; do
  [ -s "$prefix/$file" ] || fail "$file is not installed"
done
[ "$(find "$prefix/include" -type f | wc -l)" -eq 1 ] || fail "more than one header is installed"
if grep -rIl -e "$build" -e "$source" -e "$work/first" "$prefix"; then fail "these name folders of the build"; fi
clean "$prefix/bin/qwen3next" --version > /dev/null || fail "the installed program does not start"

# Words that are no near tie on any machine: sums are rounded differently by each.
beginning="Once upon a time, a little fox"
expected="$beginning$("$prefix/bin/qwen3next" run "$model" -p "$beginning" -n 60 --temp 0 --quiet)"
backend="^$("$prefix/bin/qwen3next" run "$model" -p a -n 1 --verbose 2>&1 | sed -n 's/^backend: //p')\$"
# story NAME PROGRAM BACKEND: PROGRAM tells the installed program's story, on a backend that BACKEND describes.
story() {
  local told
  told=$(clean "$2" "$model" 2> "$work/err") || fail "$1: $(cat "$work/err")"
  [ "$told" = "$expected" ] || fail "$1 tells another story:"$'\n'"$told"$'\n'"expected:"$'\n'"$expected"
  grep -qE "$3" "$work/err" || fail "$1 runs on '$(cat "$work/err")', expected $3"
  echo "$1: good"
}
# project NAME SOURCE OPTIONS...: configures and builds a CMake project.
project() {
  clean cmake -S "$2" -B "$work/$1" -DCMAKE_PREFIX_PATH="$prefix" "${@:3}" > "$work/$1.log" 2>&1 ||
    fail "$1 does not configure: $(cat "$work/$1.log")"
  clean cmake --build "$work/$1" --parallel 2 > "$work/$1.log" 2>&1 || fail "$1 does not build: $(cat "$work/$1.log")"
}

cp -r "$source/examples/consumers/find_package" "$work/consumer"
project compiled "$work/consumer"
story compiled "$work/compiled/story" "$backend"

sed -i 's/qwen3next::qwen3next/qwen3next::headers/' "$work/consumer/CMakeLists.txt"
project headers "$work/consumer" -DCMAKE_CXX_FLAGS="-O1 -march=native"
story headers "$work/headers/story" "^cpu, native, "

flags=$(PKG_CONFIG_PATH=$(dirname "$(find "$prefix" -name qwen3next.pc)") pkg-config --cflags --libs qwen3next) ||
  fail "pkg-config does not know qwen3next"
(cd "$work" && clean g++ -std=c++20 consumer/main.cpp $flags -o piped) || fail "g++ with pkg-config's flags: $flags"
story pkg-config "$work/piped" "$backend"

# What is missing is named by its package.
clean cmake -S "$work/consumer" -B "$work/missing" -DCMAKE_PREFIX_PATH="$prefix" \
  -DCMAKE_DISABLE_FIND_PACKAGE_nlohmann_json=ON > "$work/log" 2>&1 && fail "configures without nlohmann-json"
grep -q "apt-get install nlohmann-json3-dev" "$work/log" || fail "the error names no package: $(cat "$work/log")"
echo "missing dependency: good"
