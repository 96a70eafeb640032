#!/bin/bash
# What `inspect` says: to a person (100 columns, colours on terminals only) and to a program (every documented key, sums
# that agree).
#
#   tests/cli/test_inspect.sh build/release/qwen3next .
set -u
exec python3 - "$(realpath "$1")" "$(realpath "$2")" <<'PYTHON'
import json, os, pathlib, pty, re, subprocess, sys

program, source = sys.argv[1], pathlib.Path(sys.argv[2])
golden = source / "tests/golden/model"
release, sharded = golden / "release", golden / "sharded"
models = sorted(d for d in golden.iterdir() if (d / "config.json").exists())
models += sorted((source / "weights/tiny").glob("*.gguf"))
os.chdir(source)  # short paths: where they are long, so are lines
release, sharded, *models = (p.relative_to(source) for p in (release, sharded, *models))
failures = checks = 0


def check(what, good):
    global failures, checks
    checks += 1
    if not good:
        failures += 1
        print("FAILED:", what)


def run(*args, expect=0):
    r = subprocess.run([program, "inspect", *map(str, args)], capture_output=True, text=True)
    check(f"{args}: exit status {expect}, got {r.returncode}: {r.stderr}", r.returncode == expect)
    return r.stdout if expect == 0 else r.stderr


def on_terminal(*args, **env):
    """What the program writes to a terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.pop("NO_COLOR", None)
        os.environ.update(TERM="xterm", LC_ALL="C.UTF-8", **env)
        os.execv(program, [program, "inspect", *map(str, args)])
    data = b""
    try:
        while piece := os.read(fd, 65536):
            data += piece
    except OSError:  # Linux's way of saying that the other side is closed
        pass
    os.waitpid(pid, 0)
    return data.decode()


check("there are models to inspect", len(models) >= 4)
documented = set(re.findall(r"`([a-z_]+(?:\[\])?(?:\.[a-z_]+)*)`", (source / "docs/inspect.md").read_text()))


def keys(value, prefix=""):
    """Every key below `value` as docs/inspect.md writes it: a[].b.c"""
    if isinstance(value, dict):
        for k, v in value.items():
            yield prefix + k
            yield from keys(v, prefix + k + ".")
    elif isinstance(value, list) and value and isinstance(value[0], dict):
        for k in dict.fromkeys(k for v in value for k in v):
            yield prefix[:-1] + "[]." + k


for model in models:
    text = run(model)
    long = [line for line in text.split("\n") if len(line) > 100]
    check(f"{model.name}: at most 100 columns: {long[:1]}", not long)
    check(f"{model.name}: no blanks at line ends", not re.search(r" +$", text, re.M))
    check(f"{model.name}: no escape sequences in a pipe", "\x1b" not in text and text.isascii())
    j = json.loads(run(model, "--json", "--ctx", "100"))
    for key in keys(j):
        if not key.startswith("config."):
            check(f"{model.name}: {key} is in docs/inspect.md", key in documented)
    tensors = sum(t["bytes"] for t in j["tensors"])
    for part in ("tensor_groups", "roles", "types"):
        check(f"{model.name}: bytes of {part}", sum(p["bytes"] for p in j[part]) == tensors)
    for part in ("roles", "types"):
        check(f"{model.name}: tensors of {part}", sum(p["tensors"] for p in j[part]) == len(j["tensors"]))
    check(f"{model.name}: every tensor has a role", not any(r["role"] == "other" for r in j["roles"]))
    check(f"{model.name}: weights mapped", j["memory"]["weights_mapped"] == tensors)
    check(f"{model.name}: offsets", all(t["offset"] % t["alignment"] == 0 for t in j["tensors"]))
    check(f"{model.name}: files", all(t["offset"] + t["bytes"] <= j["files"][t["file"]]["bytes"] for t in j["tensors"]))
    c = j["config"]
    layers = c["layer_types"].count("full_attention") + j["mtp"]
    kv = 2 * 2 * c["num_key_value_heads"] * c["head_dim"] * layers
    check(f"{model.name}: KV cache in f16", j["memory"]["kv_cache"] == 100 * kv)
    p, b = j["parameters"], j["bytes_per_token"]
    check(f"{model.name}: active of all parameters", 0 < p["active"] < p["total"])
    check(f"{model.name}: a last token reads more", b["first"]["total"] < b["last"]["total"])
    lines = run(model, "--tensors").strip().split("\n")
    check(f"{model.name}: a line for every tensor", len(lines) == len(j["files"]) + 1 + len(j["tensors"]))

# Without a tied head, scales and the like, what is stored is what is counted.
j = json.loads(run(release, "--json"))
check("all parameters are stored values", j["parameters"]["total"] == sum(t["values"] for t in j["types"]))
longer = json.loads(run(release, "--json", "--yarn", "4"))["config"]
check("YaRN: a longer model", longer["max_position_embeddings"] == 4 * j["config"]["max_position_embeddings"])
check("YaRN: its factor", longer["yarn"]["factor"] == 4)
check("YaRN: a factor that is none", "yarn" in run(release, "--yarn", "0.5", expect=2))
mtp = next(r for r in j["roles"] if r["role"] == "mtp")
check("those of the MTP head, too", j["parameters"]["mtp"] == mtp["values"])
check("a problem: no tokenizer", any("tokenizer" in p for p in j["problems"]))
check("a problem: no template", any("template" in p for p in j["problems"]))
text = run(release)
check("problems in words", "No tokenizer" in text and "model's release" in text)
check("why vectors are copied", "held as 1 + w" in text and "held as -exp(A_log)" in text)
check("names without numbers", "layers.*.mlp.experts.*.up_proj.weight" in text)
text = run(sharded)
check("shards", all(f"model-0000{n}-of-00003.safetensors" in text for n in (1, 2, 3)))
check("no MTP head", "No MTP head" in text)

colourful = on_terminal(release)
check("colours and blocks on a terminal", "\x1b[36m" in colourful and "\u2588" in colourful)
check("none with NO_COLOR", "\x1b" not in on_terminal(release, NO_COLOR="1"))
plain = re.sub(r"\x1b\[\d*m", "", colourful).replace("\r", "")
check("at most 100 columns there, too", max(map(len, plain.split("\n"))) <= 100)

check("--json or --tensors", "--tensors" in run(release, "--json", "--tensors", expect=2))
check("a context that is too long", "--ctx is 5000" in run(release, "--ctx", "5000", expect=1))

print(f"{checks} checks, {failures} failed")
sys.exit(failures > 0)
PYTHON
