#!/usr/bin/env bash
# What README shows works as it stands there: the library snippet with its own compiler line, and the program's commands.
#   usage: test_readme.sh PROGRAM SOURCE_DIR BUILD_DIR
set -euo pipefail
program=$1 source=$2 build=$3
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAIL: $*" >&2; exit 1; }
# The one line of README that begins so, indented as code.
line() { grep -E "^    $1" "$source/README.md" | head -1 | grep . || fail "README has no line '$1 ...'"; }
# The CMake block of README that says $1, after what every project begins with.
project() {
  echo 'cmake_minimum_required(VERSION 3.20)'
  echo 'project(app LANGUAGES CXX)'
  echo 'add_executable(app app.cpp)'
  awk -v start="^$1" '/^```cmake$/ { block = ""; on = 1; next } /^```$/ { if (on && block ~ start) printf "%s", block; on = 0 }
    on { block = block $0 "\n" }' "$source/README.md" | grep . || fail "README has no CMake block with $1"
}
tells() { (cd "$source" && "$1" > "$work/story") && [ "$(wc -c < "$work/story")" -gt 100 ] || fail "$2 wrote next to nothing"; }

# The first C++ block, with the single header beside it, by the line that README gives.
mkdir "$work/single"
awk '/^```cpp$/ { on = 1; next } /^```$/ { if (on) exit } on' "$source/README.md" > "$work/single/app.cpp"
grep -q 'int main' "$work/single/app.cpp" || fail "README has no C++ program"
cp "$build/amalgamated/qwen3next.hpp" "$work/single"
(cd "$work/single" && eval "$(line 'g\+\+.*-march=native') -o app") || fail "README's line for the single header"
tells "$work/single/app" "README's program, single header"

# The same, installed: by find_package and by pkg-config.
mkdir "$work/installed"
cp "$work/single/app.cpp" "$work/installed"
install=$(line 'cmake --install')
(cd "$source" && eval "$(sed "s,build/release,$build,; s,PREFIX,$work/prefix," <<< "$install")") > "$work/log" || fail "$install"
project find_package > "$work/installed/CMakeLists.txt"
(cd "$work/installed" && cmake -B build -DCMAKE_PREFIX_PATH="$work/prefix" && cmake --build build) > "$work/log" 2>&1 ||
  fail "README's find_package: $(tail "$work/log")"
tells "$work/installed/build/app" "README's program, find_package"
(cd "$work/installed" && export PKG_CONFIG_PATH="$work/prefix/lib/pkgconfig" && eval "$(line 'g\+\+.*pkg-config') -o app") ||
  fail "README's line with pkg-config"
tells "$work/installed/app" "README's program, pkg-config"

# As a folder: that it is found is enough here, tests/consumers/test_add_subdirectory.sh builds such a project.
mkdir "$work/folder"
cp "$work/single/app.cpp" "$work/folder"
ln -s "$source" "$work/folder/qwen3next"
project add_subdirectory > "$work/folder/CMakeLists.txt"
(cd "$work/folder" && cmake -B build) > "$work/log" 2>&1 || fail "README's add_subdirectory: $(tail "$work/log")"

# Every command of the table answers --help; `run` as shown tells a story with the bundled model.
model="$source/weights/tiny/qwen3next-tiny.gguf"
for command in $(sed -n '/^| command/,/^$/p' "$source/README.md" | grep -oE '^\| `[a-z]+' | tr -d '|` '); do
  "$program" "$command" --help > "$work/help" || fail "$command --help"
  grep -q -i 'example' "$work/help" || fail "$command --help shows no example"
done
"$program" run "$model" -p "Once upon a time" -n 100 > "$work/run" 2> "$work/run.err" || fail "run"
[ "$(wc -c < "$work/run")" -gt 100 ] || fail "run wrote next to nothing"
"$program" run "$model" --chat -p "Why is the sky blue?" -n 40 > "$work/chat" 2>> "$work/run.err" || fail "run --chat"
[ -s "$work/chat" ] || fail "run --chat wrote nothing"
echo "README: snippet and commands work"
