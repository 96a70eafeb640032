#!/usr/bin/env bash
# The single header alone, as somebody without a build system has it: in two files at once, without a warning, with the
# plainest flags, by g++ and (if it is there) clang++, compiled once for many files, and once per instruction set.  Each
# program must tell the story that the installed program tells.
#   usage: test_single_header.sh HEADER SOURCE_DIR PROGRAM OBJECT_DIR
# OBJECT_DIR holds a build's kernel objects, found by name: compiling them all again would take a minute.
set -euo pipefail
header=$1 source=$2 program=$3 objects=$4
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAIL: $*" >&2; exit 1; }

# Nothing but the header, the example and the model: no project header can be reached.
mkdir "$work/include"
cp "$header" "$work/include"
cp "$source"/examples/consumers/single_header/*.cpp "$work"
cd "$work"
model=$source/weights/tiny/qwen3next-tiny.gguf
# Words that are no near tie on any machine: sums are rounded differently by each.
beginning="Once upon a time, a little fox"
expected="$beginning$("$program" run "$model" -p "$beginning" -n 60 --temp 0 --quiet)"
[ ${#expected} -gt 150 ] || fail "the program's own story is short: $expected"
warnings="-Wall -Wextra -Wconversion -Wshadow -Werror"

# story NAME BACKEND: the program NAME tells the story and describes its backend as BACKEND says.
story() {
  local told
  told=$("./$1" "$model" 2> "$1.err") || fail "$1: $(cat "$1.err")"
  [ "$told" = "$expected" ] || fail "$1 tells another story:"$'\n'"$told"$'\n'"expected:"$'\n'"$expected"
  grep -qE "$2" "$1.err" || fail "$1 runs on '$(cat "$1.err")', expected $2"
  echo "$1: good"
}

# compile COMPILER FLAGS... -- NAME FILE...: each file to an object NAME.FILE.o, two at a time.
compile() {
  local flags=() name file running=()
  while [ "$1" != -- ]; do flags+=("$1"); shift; done
  name=$2
  shift 2
  for file in "$@"; do
    "${flags[@]}" -std=c++20 -I include -c "$file" -o "$name.$file.o" & running+=($!)
  done
  for file in "${running[@]}"; do wait "$file" || fail "$name does not compile: ${flags[*]}"; done
}

# In two files, plainest flags: no optimisation, any processor of this kind.
compile g++ -O0 -pthread $warnings -- plain main.cpp story.cpp
g++ -pthread plain.*.o -lutf8proc -o plain
story plain '^cpu, native, [0-9]+ threads$'

# The same by clang++, for this processor.
if command -v clang++ > /dev/null; then
  compile clang++ -O1 -march=native -pthread $warnings -- by_clang main.cpp story.cpp
  clang++ -pthread by_clang.*.o -lutf8proc -o by_clang
  story by_clang '^cpu, native, [0-9]+ threads$'
else
  echo "clang++ is not here: not tried"
fi

# The engine in one file of three, with all that can be asked for; the others only see declarations.
cat > engine.cpp <<'END'
#define QWEN3NEXT_LIBRARY
#include "qwen3next.hpp"
END
! g++ -std=c++20 -I include -M main.cpp | grep -q Eigen || fail "Eigen is included without being asked for"
all="-DQWEN3NEXT_COMPILED -DQWEN3NEXT_QUANTIZE -DQWEN3NEXT_REFERENCE"
eigen=$(printf '#include <Eigen/Core>' | g++ -E -x c++ - > /dev/null 2>&1 || echo -isystem /usr/include/eigen3)
compile g++ -O1 -march=native -pthread $warnings $all $eigen -- engine main.cpp story.cpp engine.cpp
[ "$(stat -c %s engine.story.cpp.o)" -lt $(($(stat -c %s engine.engine.cpp.o) / 5)) ] ||
  fail "QWEN3NEXT_COMPILED does not spare story.cpp the engine"
g++ -pthread engine.*.o -lutf8proc -o engine
story engine '^cpu, native, [0-9]+ threads$'

# Kernels for every machine, made of the header itself by the table in its first lines.  One for real; of the others it
# is enough that the compiler sees what it sees in the build, whose objects are linked.
machine=$(uname -m)
grep -q "^//   $machine " include/qwen3next.hpp || machine=others
isas=$(grep "^//   $machine " include/qwen3next.hpp | cut -c 4-)
last=$(awk '{ isa = $2 } END { print isa }' <<< "$isas")
linked=()
while read -r _ isa flags; do
  tokens() { g++ -std=c++20 -E -P -DQWEN3NEXT_ISA="$isa" $flags "$@" | grep -v '^#pragma' | grep '[^ ]'; }
  cmp <(tokens -x c++ include/qwen3next.hpp) <(tokens -I "$source" "$source/backends/cpu/kernels_isa.cpp") ||
    fail "the header's kernels for $isa are not those of the build"
  [ "$isa" = "$last" ] || linked+=("$(find "$objects/CMakeFiles/qwen3next_kernels_$isa.dir" -name '*.o')")
done <<< "$isas"
flags=$(awk -v isa="$last" '$2 == isa { $1 = $2 = ""; print }' <<< "$isas")
g++ -std=c++20 -O3 -ffp-contract=off $warnings -x c++ -c include/qwen3next.hpp -DQWEN3NEXT_ISA="$last" $flags -o "$last.o"
bash "$source/tests/ops/check_exported_symbols.sh" "$last.o"
printf '#include "main.cpp"\n#include "story.cpp"\n' > both.cpp
compile g++ -O0 -pthread $warnings -DQWEN3NEXT_MULTI_ISA -- every both.cpp
g++ -pthread every.both.cpp.o "$last.o" "${linked[@]}" -lutf8proc -o every
story every "^$("$program" run "$model" -p a -n 1 --verbose 2>&1 | sed -n 's/^backend: //p')\$"
