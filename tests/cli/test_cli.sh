#!/bin/bash
# The program as its users meet it: exit statuses, what goes to stdout and what to stderr, files, pipes, Ctrl-C.
#
#   tests/cli/test_cli.sh build/release/qwen3next .
#
# Runs on the golden checkpoints, on a toy folder made of one of them, and on the bundled model where it is there.
set -u
program=$(realpath "$1")
source=$(realpath "$2")
release=$source/tests/golden/model/release  # random weights, MTP head, no tokenizer
golden_text=$source/tests/golden/text       # a tokenizer without a model
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work" || exit 1
failures=0
checks=0

# try STATUS ARGS.. : runs the program with stdin from ./in; what it printed is in ./out and ./err.
: > in
try() {
  local expected=$1
  shift
  "$program" "$@" < in > out 2> err
  local status=$?
  what="qwen3next $*"
  check "exit status $expected, got $status" test $status -eq "$expected"
}

# check SAYING COMMAND.. : counts a failure unless the command succeeds.
check() {
  local saying=$1
  shift
  checks=$((checks + 1))
  if ! "$@"; then
    failures=$((failures + 1))
    echo "FAILED: $what"
    echo "  expected: $saying"
    head -c 600 err | sed 's/^/  stderr: /'
  fi
}
stdout_is() { check "stdout '$1'" test "$(cat out)" = "$1"; }
says() { check "stderr says '$1'" grep -qF -- "$1" err; }
prints() { check "stdout says '$1'" grep -qF -- "$1" out; }
silent() { check "nothing on stderr" test ! -s err; }
one_line() { check "one line on stderr" test "$(wc -l < err)" -eq 1; }
python() { check "python: $1" python3 -c "$1"; }

# --- a model small enough to be made here: the golden weights with a tokenizer of the printable ASCII characters ---------

toy=$work/toy
mkdir toy
cp "$release"/config.json "$release"/model.safetensors toy
cp "$source/weights/tiny/chat_template.jinja" toy
python3 - "$golden_text/tokenizer.json" toy/tokenizer.json <<'PYTHON'
import json, sys
tokenizer = json.load(open(sys.argv[1]))
vocab = {chr(c): i for i, c in enumerate(range(33, 127))}
vocab["\u0120"], vocab["\u010a"] = 94, 95  # space and line feed, in the byte-level alphabet
tokenizer["model"]["vocab"], tokenizer["model"]["merges"] = vocab, []
names = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
template = tokenizer["added_tokens"][0]
tokenizer["added_tokens"] = [dict(template, id=96 + i, content=n, special=n.startswith("<|")) for i, n in enumerate(names)]
json.dump(tokenizer, open(sys.argv[2], "w"))
PYTHON

# The same without a token that could end its texts, and with room for long ones.
cp -r toy endless
python3 - <<'PYTHON'
import json
tokenizer, config = json.load(open("toy/tokenizer.json")), json.load(open("toy/config.json"))
tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] not in ("<|endoftext|>", "<|im_end|>")]
config["max_position_embeddings"] = 1 << 20
config.pop("eos_token_id", None)
json.dump(tokenizer, open("endless/tokenizer.json", "w"))
json.dump(config, open("endless/config.json", "w"))
PYTHON

# --- usage ----------------------------------------------------------------------------------------------------------------

commands='run chat inspect quantize bench perplexity experts logits tokenize detokenize template'
try 0 --help
for command in $commands; do prints "  $command "; done
for command in $commands; do
  try 0 $command --help
  prints "Example"
done
try 0 --version
check "a version" grep -qE '^qwen3next [0-9]+\.[0-9]+' out
try 2
try 2 rnu "$release"
says "did you mean 'run'?"
one_line
try 2 run
try 2 run "$release" --no-such-option
one_line
says "run --help"
try 2 run "$toy" -p hi --temp warm
try 2 run "$toy" -p hi --chat --raw
try 2 run "$toy" -p hi -f in
try 2 run "$toy" -p hi --system 'You are brief.'
try 2 run "$toy" -p hi --kv f8
try 2 run "$toy" -p hi --backend tpu
try 2 logits "$release" --out l.npy
try 2 bench "$release" -p 0 -n 0
try 2 quantize "$release" q.gguf --type Q9

# --- errors: one line, what and where ----------------------------------------------------------------------------------------

for command in 'run -p hi' 'inspect' 'bench' 'logits --tokens 1 --out l.npy' 'tokenize' 'template' 'chat'; do
  set -- $command
  try 1 "$1" "$work/nowhere" "${@:2}"
  says "qwen3next: error: "
  says "nowhere"
  one_line
done
try 1 run "$release" -p hi
says "tokenizer.json"
CUDA_VISIBLE_DEVICES=-1 try 1 run "$toy" -p hi --backend cuda  # not built in, or no GPU to be seen
says "--backend cuda: "
says "use cpu"
one_line
try 1 run "$toy" -p hi --memory 1MiB
says "MiB or more"
try 1 run "$toy" -p hi --gpu-memory 1GiB
says "add --backend cuda"
try 2 run "$toy" -p hi --mtp 5
try 1 run "$source/tests/golden/model/sharded" -p hi --mtp 2
says "no MTP head"
try 1 run "$toy" -p hi --isa vax
says "'vax'; choose from "
try 1 run "$toy" -p hi --backend reference --isa avx2
try 1 run "$toy" -p hi --backend reference --kv q8_0
try 1 run "$toy" -p hi --top-p 2
says "top_p"
try 1 run "$toy" -p ''
says "empty"
try 1 run "$toy" -p 'a prompt longer than that' --ctx 4
one_line
try 1 run "$toy" -f nowhere.txt
says "nowhere.txt"
if [ -e /dev/full ]; then
  what="detokenize > /dev/full"
  echo '[1]' | "$program" detokenize toy > /dev/full 2> err
  check "exit status 1" test $? -eq 1
fi

# --- run ---------------------------------------------------------------------------------------------------------------------

try 0 run toy -p 'Once upon' -n 40 --temp 0
says "prompt 9 tokens"
says "generated "
cp out greedy
try 0 run toy -p 'Once upon' -n 40 --temp 0 --quiet
silent
check "the same text again" cmp -s out greedy
printf 'Once upon\n' > in
try 0 run toy -n 40 --temp 0 --quiet
check "the same from stdin, whose last line break is dropped" cmp -s out greedy
try 0 run toy -f in -n 40 --temp 0 --quiet
check "the same from a file" cmp -s out greedy
: > in
try 0 run toy -p 'Once upon' -n 40 --temp 0 --quiet --raw
check "the same with --raw" cmp -s out greedy
try 0 run toy -p 'Once upon' -n 40 --temp 0 --quiet --mtp 0 --memory auto --threads 1
check "the same with one thread" cmp -s out greedy
try 0 run toy -p 'Once upon' -n 40 --temp 0 --mtp 3
check "the same with guesses" cmp -s out greedy
says "a pass, guesses right: "
try 0 run toy -p 'Once upon' -n 40 --temp 2 --top-k 0 --top-p 1 --seed 1 --quiet
cp out seed1
try 0 run toy -p 'Once upon' -n 40 --temp 2 --top-k 0 --top-p 1 --seed 1 --quiet
check "the same for the same seed" cmp -s out seed1
try 0 run toy -p 'Once upon' -n 40 --temp 2 --top-k 0 --top-p 1 --seed 2 --quiet
check "another text for another seed" bash -c '! cmp -s out seed1'
try 0 run toy -p '<|im_start|>' -n 1
says "prompt 12 tokens"
try 0 run toy -p '<|im_start|>' -n 1 --raw
says "prompt 1 token"
try 0 run toy -p hi -n 5 --verbose --presence-penalty -1 --kv q8_0 --ctx 100
says "backend: cpu"
try 0 run toy -p hi -n 5 --backend reference
first=$(head -c 1 greedy)
if [ -n "$first" ]; then
  try 0 run toy -p 'Once upon' -n 40 --temp 0 --stop "$first"
  says "stop string"
  check "nothing before the stop string" test ! -s out
fi
what="run | head -c 3"
bash -c '"$0" run endless -p "Once upon" --temp 1 --quiet 2> err | head -c 3 > out' "$program"
silent

# --- Ctrl-C -------------------------------------------------------------------------------------------------------------------

# interrupt STATUS ARGS.. : SIGINT after a moment.  (bash starts background jobs with SIGINT ignored, hence python.)
interrupt() {
  local expected=$1
  shift
  what="Ctrl-C: qwen3next $*"
  python3 - "$program" "$@" > status <<'PYTHON'
import signal, subprocess, sys, time
p = subprocess.Popen(sys.argv[1:], stdin=subprocess.PIPE, stdout=open("out", "wb"), stderr=open("err", "wb"),
                     preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
time.sleep(1.5)
p.send_signal(signal.SIGINT)
try:
    print(p.wait(60))
except subprocess.TimeoutExpired:
    p.kill()
    print("still running")
PYTHON
  check "exit status $expected, got $(cat status)" test "$(cat status)" = "$expected"
}
interrupt 130 run endless -p 'Once upon' --temp 1
check "the text so far" test -s out
says "cancelled"
interrupt 130 run toy -n 5  # waits for a prompt
interrupt 130 bench toy -p 0 -n 3000 -r 1000
yes 'a long text' | head -c 4000000 > long.txt
interrupt 130 perplexity toy long.txt
yes 'and so on' | head -c 400000 > prompt.txt
interrupt 130 run endless -f prompt.txt -n 1  # in the middle of the prompt
check "no text" test ! -s out

# --- chat ---------------------------------------------------------------------------------------------------------------------

printf 'Hi\n/save talk.json\n/stats\n/reset\n/load talk.json\nAnd you?\n/help\n/quit\nnot read\n' > in
try 0 chat toy -n 8 --temp 0 --system 'Be brief.'
says "saved 3 messages"
says "loaded 3 messages"
says "/reset"
python 'import json; t = json.load(open("talk.json")); assert t["version"] == 1 and [m["role"] for m in t["messages"]] == ["system", "user", "assistant"]'
printf '/load talk.json\n' > in
echo '{"version": 1, "messages": [{"role": "king", "content": "x"}]}' > talk.json
try 1 chat toy
says "king"
printf '/dance\n' > in
try 1 chat toy
says "/help"
: > in
try 0 run toy --chat -p Hi -n 8 --temp 0 --quiet
silent
echo '[{"type": "function", "function": {"name": "f", "parameters": {}}}]' > tools.json
try 0 run toy --chat -p Hi -n 8 --tools tools.json

# --- logits -------------------------------------------------------------------------------------------------------------------

# npy FILE ROWS COLS: checks header, shape, size, and that all values are finite.
npy() {
  python "
import ast, struct, math
data = open('$1', 'rb').read()
assert data[:8] == b'\x93NUMPY\x01\x00'
n = struct.unpack('<H', data[8:10])[0]
assert (10 + n) % 64 == 0
head = ast.literal_eval(data[10:10 + n].decode())
assert head == {'descr': '<f4', 'fortran_order': False, 'shape': ($2, $3)}, head
values = struct.unpack('<%df' % ($2 * $3), data[10 + n:])
assert all(map(math.isfinite, values))"
}
try 0 logits "$release" --tokens 1,2,3,199 --out l.npy
npy l.npy 4 200
try 0 logits "$release" --tokens 1,2,3,199 --out m.npy --mtp
npy m.npy 3 200
echo '[1, 2, 3, 199]' > in
try 0 logits "$release" --tokens-file - --out l2.npy
check "the same logits from a file" cmp -s l.npy l2.npy
: > in
try 1 logits "$release" --tokens 1,2,200 --out no.npy
says "expected 0..199"
try 1 logits "$release" --tokens 1,x --out no.npy
try 1 logits "$release" --tokens 1 --mtp --out no.npy
try 1 logits "$source/tests/golden/model/sharded" --tokens 1,2 --mtp --out no.npy
says "MTP"
try 1 logits "$release" --tokens 1 --out nowhere/l.npy
what="logits that failed" check "no file" bash -c '! ls no.npy* 2> /dev/null'

# --- text ---------------------------------------------------------------------------------------------------------------------

for text in 'Hello, world' $'two\n lines\n' '' 'naïve 東京 🦊' '<|im_start|>'; do
  printf '%s' "$text" > in
  cp in text
  try 0 tokenize "$golden_text"
  silent
  check "one line" test "$(wc -l < out)" -eq 1
  python 'import json; assert all(isinstance(i, int) for i in json.load(open("out")))'
  cp out in
  try 0 detokenize "$golden_text"
  check "the text back" cmp -s out text
done
printf '<|im_start|>' > in
try 0 tokenize "$golden_text" --special
python 'import json; assert len(json.load(open("out"))) == 1'
echo '[1, "two"]' > in
try 1 detokenize "$golden_text"
echo '[1, 2' > in
try 1 detokenize "$golden_text"
one_line
echo '{"messages": [{"role": "user", "content": "Hi"}]}' > in
try 0 template toy
stdout_is $'<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant'
echo '[{"role": "user", "content": "Hi"}]' > in
try 0 template toy --no-generation-prompt
stdout_is $'<|im_start|>user\nHi<|im_end|>'
echo '{"tools": []}' > in
try 1 template toy
echo 'Hi' > in
try 1 template toy
one_line
: > in

# --- perplexity, bench, inspect -------------------------------------------------------------------------------------------------

head -c 1000 long.txt > short.txt
try 0 perplexity toy short.txt --ctx 100
python 'import json, math; p = json.load(open("out")); assert p["tokens"] == 990 and p["windows"] == 10 and abs(p["ppl"] - math.exp(p["nll"])) < 1e-6 * p["ppl"]'
silent
try 0 perplexity toy short.txt
python 'import json; p = json.load(open("out")); assert p["tokens"] == 999 and p["ctx"] == 2048'
try 1 perplexity toy in
try 0 bench "$release" -p 40 -n 8 -d 0,100,50 -r 2 --json
python '
import json
b = json.load(open("out"))
assert b["read_bandwidth_gb_s"] > 0
assert [(r["kind"], r["tokens"], r["depth"]) for r in b["results"]] == [(k, n, d) for d in (0, 100, 50) for k, n in (("prefill", 40), ("decode", 8))]
for r in b["results"]:
    assert r["tokens_per_second"] > 0 and r["bytes_per_token"] > 0 and r["percent_of_roof"] > 0 and len(r["samples"]) == 2
decode = {r["depth"]: r["bytes_per_token"] for r in b["results"] if r["kind"] == "decode"}
assert decode[0] < decode[50] < decode[100]'
try 0 bench "$release" -p 0 -n 4 -r 1
prints "decode 4"
check "no prefill" bash -c '! grep -q prefill out'
try 0 bench "$release" -p 40 -n 6 -d 0,30 -r 2 --ops --parallel 1,3 --json
python '
import json
b = json.load(open("out"))
parallel = {(r["sequences"], r["depth"]): r for r in b["results"] if r["kind"] == "parallel"}
decode = {r["depth"]: r for r in b["results"] if r["kind"] == "decode"}
assert sorted(parallel) == [(1, 0), (1, 30), (3, 0), (3, 30)]
for depth in (0, 30):
    assert abs(parallel[1, depth]["bytes_per_token"] / decode[depth]["bytes_per_token"] - 1) < 1e-6
    assert parallel[3, depth]["bytes_per_token"] < decode[depth]["bytes_per_token"]
assert b["integer_gmac_s"] > 0 and b["floating_gmac_s"] > 0
assert [(o["kind"], o["sequences"], o["depth"]) for o in b["operations"]] == \
    [(k, s, d) for d in (0, 30) for k, s in (("prefill", 1), ("decode", 1), ("decode", 1), ("decode", 3))]
for o in b["operations"]:
    assert o["passes"] == (2 if o["kind"] == "prefill" else 12)
    ops = o["operations"]
    assert {"embed", "linear lm_head", "experts", "router", "attention", "gated_delta_rule"} <= {x["name"] for x in ops}
    assert abs(sum(x["seconds"] for x in ops) / o["seconds"] - 1) < 1e-9 and ops[-1]["name"] == "between" and ops[-1]["seconds"] >= 0'
try 0 bench "$release" -p 0 -n 4 -r 1 --ops --parallel 2
prints "decode 2 x 4"
prints "decode x2 at depth 0"
prints "a pass"
try 0 bench "$release" -p 0 -n 20 -d 0,10 -r 2 --mtp 3 --accept 0.7 --json
python '
import json
b = json.load(open("out"))
mtp = [r for r in b["results"] if r["kind"] == "mtp"]
assert [(r["depth"], r["drafts"], r["accept"], r["tokens"]) for r in mtp] == [(0, 3, 0.7, 20), (10, 3, 0.7, 20)]
for r in mtp:
    assert len(r["acceptance"]) == 3 and all(0 <= a <= 1 for a in r["acceptance"]) and 1 <= r["tokens_per_pass"] <= 4
    assert abs(r["gain"] * r["plain_tokens_per_second"] / r["tokens_per_second"] - 1) < 1e-9 and r["possible_gain"] > 0.2'
try 0 bench "$release" -p 0 -n 6 -r 1 --mtp auto --accept 1
prints "auto x 6"
try 2 bench "$release" -p 0 --accept 0.5
try 1 bench "$source/tests/golden/model/sharded" -p 0 --mtp 1
says "no MTP head"
try 2 bench "$release" -p 4 -n 0 --parallel 2
try 2 bench "$release" --backend reference --ops
try 1 bench "$release" -n 4 -d 5000
one_line
try 0 inspect "$release"
prints "layers.*.mlp.experts.*.up_proj.weight"

# --- quantize -------------------------------------------------------------------------------------------------------------------

try 0 quantize toy q.gguf --type Q8_0
says "bits per weight"
try 1 quantize toy q.gguf --type Q8_0
says "--force"
try 0 quantize toy q.gguf --type bf16 --force --quiet
silent
try 0 run q.gguf -p 'Once upon' -n 40 --temp 0 --quiet
check "the text of the folder that it was made of" cmp -s out greedy
try 0 inspect q.gguf
try 2 quantize toy q2.gguf --tensor-type ffn
try 1 quantize toy q2.gguf --tensor-type '(=Q8_0'
try 1 quantize toy q2.gguf --threads 1000000
what="quantize that failed" check "no file left" bash -c '! ls q2.gguf* *.part 2> /dev/null'

# --- the bundled model -------------------------------------------------------------------------------------------------------------

bundled=$(ls "$source"/weights/tiny/*.gguf 2> /dev/null | head -n 1)
if [ -n "$bundled" ]; then
  try 0 run "$bundled" -p 'Once upon a time' -n 30
  check "a text" test "$(wc -c < out)" -gt 30
  try 0 run "$bundled" --chat -p 'Hello!' -n 30
  try 0 bench "$bundled" -p 64 -n 8 -r 1 --json
fi

echo "$checks checks, $failures failures"
test $failures -eq 0
