#!/bin/bash
# `experts`: its numbers against the same numbers, computed here from its trace, and its files and errors.
#
#   tests/cli/test_experts.sh build/release/qwen3next .
set -u
program=$(realpath "$1")
source=$(realpath "$2")
tiny=$source/weights/tiny/qwen3next-tiny.gguf
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
failures=0

fail() {
  failures=$((failures + 1))
  echo "FAILED: $1"
  head -c 600 err | sed 's/^/  stderr: /'
}
# try STATUS ARGS.. : `experts` of the bundled model; what it printed is in ./out and ./err.
try() {
  local expected=$1 status
  shift
  "$program" experts "$tiny" "$@" > out 2> err
  status=$?
  [ $status -eq "$expected" ] || fail "experts $*: exit status $expected, got $status"
}
says() { grep -qF -- "$1" err || fail "stderr says '$1'"; }

head -c 6000 "$source/README.md" > text
try 0 text --ctx 300 --batch 500 --json --save profile --trace trace -q
[ ! -s err ] || fail "nothing on stderr with -q"
python3 - <<'PYTHON' || fail "the statistics are what the trace says"
import json, math, struct

result, profile = json.load(open("out")), json.load(open("profile"))
head, data = open("trace", "rb").read().split(b"\n", 1)
head = json.loads(head)
L, E, k = head["layers"], head["experts"], head["experts_per_token"]
assert (head["format"], head["version"], L, E, k) == ("qwen3next routing trace", 1, 9, 32, 4)
T = result["tokens"]
picks = struct.unpack(f"<{T * L * k}H", data)
assert result["windows"] == math.ceil(T / 300) and result["ctx"] == 300 and T > 1200
assert (result["experts"], result["experts_per_token"]) == (E, k)

def row(t, l):
    return picks[(t * L + l) * k:(t * L + l + 1) * k]

half = (T + 1) // 2
counts = [[[0] * E for _ in range(L)] for _ in range(2)]
for t in range(T):
    for l in range(L):
        ids = row(t, l)
        assert list(ids) == sorted(set(ids)) and ids[-1] < E
        for e in ids:
            counts[t >= half][l][e] += 1
whole = [[a + b for a, b in zip(*rows)] for rows in zip(*counts)]
assert profile["format"] == "qwen3next expert profile" and profile["model"] == "qwen3next-tiny.gguf"
assert profile["experts"] == E and profile["tokens"] == [T] * L and profile["counts"] == whole

def near(a, b):
    assert abs(a - b) < 1e-9, (a, b)

def covered(c, fraction):
    c = sorted(c, reverse=True)
    n = fraction * len(c)
    return (sum(c[:int(n)]) + (n - int(n)) * c[min(int(n), len(c) - 1)]) / sum(c)

def loads(found, c):
    s, n = sorted(c), len(c)
    for name, value in (("least", s[0]), ("median", (s[(n - 1) // 2] + s[n // 2]) / 2), ("most", s[-1])):
        near(found[name], value * n / sum(c))
    near(found["entropy_bits"], -sum(x / sum(c) * math.log2(x / sum(c)) for x in c if x))
    for percent in (10, 25, 50):
        near(found["coverage"][str(percent)], covered(c, percent / 100))

for l, layer in enumerate(result["layers"]):
    assert layer["layer"] == l and layer["kind"] == ("mtp" if l == 8 else "attention" if l % 4 == 3 else "deltanet")
    loads(layer, whole[l])
    a, b = counts[0][l], counts[1][l]
    near(layer["drift"], sum(abs(x / sum(a) - y / sum(b)) for x, y in zip(a, b)) / 2)
    r = [(x + y) / T for x, y in zip(a, b)]
    near(layer["drift_by_chance"],
         sum(math.sqrt(2 / math.pi * x * (1 - x) * (1 / half + 1 / (T - half))) for x in r) / k / 2)
loads(result["all"], sum(whole, []))

first, second = sum(counts[0], []), sum(counts[1], [])
assert [c["share"] for c in result["caches"]] == [0.1, 0.25, 0.5, 0.75]
last = 0
for cache in result["caches"]:
    slots = cache["experts"]
    assert slots == round(cache["share"] * L * E)
    near(cache["best_fixed"], sum(sorted(second, reverse=True)[:slots]) / sum(second))
    order = sorted(range(L * E), key=lambda i: -first[i])
    near(cache["fixed_by_first_half"], sum(second[i] for i in order[:slots]) / sum(second))
    assert cache["fixed_by_first_half"] <= cache["best_fixed"] and last < cache["hit_rate"] <= 1
    assert cache["hit_rate"] > 0.9 * cache["share"] and 32970112 > cache["bytes"] > 0
    last = cache["hit_rate"]
PYTHON

# A budget for some of the experts: the same picks.
try 0 text --ctx 300 --batch 500 --trace streamed --memory 32MiB -q
cmp -s trace streamed || fail "streamed experts are picked alike"

# The same picks on one thread; from other passes and on the other backend, but for near ties, which rounding decides.
same() {  # same A B: the share of picks that two traces have in common
  python3 -c 'import sys
a, b = (open(f, "rb").read() for f in sys.argv[1:])
assert len(a) == len(b)
same = sum(x == y for x, y in zip(a, b)) / len(a)
assert same > 0.95, same' "$1" "$2"
}
try 0 text --ctx 300 --batch 500 --threads 1 --json --trace trace1 -q
cmp -s trace trace1 || fail "the same picks on one thread"
try 0 text --ctx 300 --batch 64 --json --trace trace64 -q
same trace trace64 || fail "nearly the same picks from other passes"
head -c 700 text > short
for backend in cpu reference; do try 0 short --backend $backend --trace $backend --json -q; done
same cpu reference || fail "nearly the same picks on the reference backend"

try 0 short --save profile
grep -qE '^ +3 attention ' out && grep -qE '^ +8 mtp ' out && grep -qE '^ 50 % +144 ' out || fail "tables"
says "saved profile"
try 0 short --ctx 5 --json -q
try 1 /dev/null
says "too short"
try 1 nowhere
says "nowhere"
try 1 short --ctx 5000
says "4096"
try 1 short --save nowhere/profile
says "nowhere"
try 1 short --trace nowhere/trace
[ ! -s out ] || fail "no table before the trace can be written"
try 1 short --backend reference --kv f16
says "f32"
try 1 short --backend cuda
try 1 short --memory 1MiB
says "MiB or more"
try 2
try 2 short --batch 0

# Ctrl-C in the middle leaves nothing behind.
yes 'a long text' | head -c 3000000 > long
python3 - "$program" experts "$tiny" long --save p2 --trace t2 -q > status 2> err <<'PYTHON'
import signal, subprocess, sys, time
p = subprocess.Popen(sys.argv[1:], preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
time.sleep(1.5)
p.send_signal(signal.SIGINT)
print(p.wait(60))
PYTHON
[ "$(cat status)" = 130 ] || fail "Ctrl-C: exit status 130, got $(cat status)"
[ -z "$(ls | grep -E '^(p2|t2|\.)')" ] || fail "no file left: $(ls)"

[ $failures -eq 0 ] && echo "all good"
exit $((failures > 0))
