#!/usr/bin/env bash
# What README shows works as it stands there: the library snippet with its own compiler line, and the program's commands.
#   usage: test_readme.sh PROGRAM SOURCE_DIR
set -euo pipefail
program=$1 source=$2
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
fail() { echo "FAIL: $*" >&2; exit 1; }

# The first C++ block, compiled header only by the line beside it.
awk '/^```cpp$/ { on = 1; next } /^```$/ { if (on) exit } on' "$source/README.md" > "$work/app.cpp"
grep -q 'int main' "$work/app.cpp" || fail "README has no C++ program"
line=$(grep -m1 -E '^    g\+\+ ' "$source/README.md")
line=${line/path\/to\/qwen3next/$source}
(cd "$work" && eval "$line -o app") || fail "README's compiler line: $line"
(cd "$source" && "$work/app" > "$work/story")
[ "$(wc -c < "$work/story")" -gt 100 ] || fail "README's program wrote next to nothing"

# Every command of the table answers --help; `run` as shown tells a story with the bundled model.
model="$source/weights/tiny/qwen3next-tiny.gguf"
for command in $(grep -oE '^\| `[a-z]+' "$source/README.md" | tr -d '|` '); do
  "$program" "$command" --help > "$work/help" || fail "$command --help"
  grep -q -i 'example' "$work/help" || fail "$command --help shows no example"
done
"$program" run "$model" -p "Once upon a time" -n 100 > "$work/run" 2> "$work/run.err" || fail "run"
[ "$(wc -c < "$work/run")" -gt 100 ] || fail "run wrote next to nothing"
"$program" run "$model" --chat -p "Why is the sky blue?" -n 40 > "$work/chat" 2>> "$work/run.err" || fail "run --chat"
[ -s "$work/chat" ] || fail "run --chat wrote nothing"
echo "README: snippet and commands work"
