#!/usr/bin/env python3
"""Long texts: perplexity by position, speed by depth beyond the trained length, Ctrl-C on the way there.

    tests/cli/test_long_context.py build/release/qwen3next .
"""

import json
import math
import os
import signal
import struct
import subprocess
import tempfile
import time

from checking import PROGRAM, SOURCE, TINY, check, finish


def run(*args, text=""):
    done = subprocess.run([PROGRAM, *map(str, args)], input=text, capture_output=True, text=True, encoding="utf-8")
    return done.returncode, done.stdout, done.stderr


def rows(path):
    with open(path, "rb") as f:
        data = f.read()
    header = eval(data[10:10 + int.from_bytes(data[8:10], "little")])
    width = header["shape"][1]
    numbers = struct.unpack(f"<{header['shape'][0] * width}f", data[-4 * header["shape"][0] * width:])
    return [numbers[i:i + width] for i in range(0, len(numbers), width)]


# Each bucket is the mean over the windows of what the logits say of the tokens that stand there.
with tempfile.TemporaryDirectory() as folder:
    text, wide = os.path.join(folder, "text.txt"), 37
    with open(text, "w") as f:
        f.write("Once upon a time there was a little fox who lived near a big river and liked to swim. " * 4)
    ids = json.loads(run("tokenize", TINY, text=open(text).read())[1])
    status, out, err = run("perplexity", TINY, text, "--ctx", wide, "-q", "--backend", "reference")
    check("perplexity", status == 0, err)
    sums, result = {}, json.loads(out)
    for begin in range(0, len(ids), wide):
        window = ids[begin:begin + wide]
        logits = os.path.join(folder, "logits.npy")
        status, _, err = run("logits", TINY, "--backend", "reference", "--tokens", ",".join(map(str, window)), "--out",
                             logits)
        check("logits", status == 0, err)
        for position, (row, token) in enumerate(zip(rows(logits), window[1:]), 1):
            nats = math.log(sum(math.exp(x) for x in row)) - row[token]
            sums.setdefault(1 << (position.bit_length() - 1), []).append(nats)
    found = {b["from"]: b for b in result["by_position"]}
    check("buckets", list(found) == sorted(sums) and len(ids) > 2 * wide, result)
    for start, nats in sums.items():
        bucket, mean = found.get(start, {}), sum(nats) / len(nats)
        check(f"from {start}", bucket["tokens"] == len(nats) and abs(bucket["nll"] - mean) < 1e-5 * (1 + mean)
              and abs(bucket["ppl"] - math.exp(bucket["nll"])) < 1e-6 * bucket["ppl"], (bucket, mean))
    total = sum(b["tokens"] * b["nll"] for b in found.values()) / result["tokens"]
    check("all of it", abs(total - result["nll"]) < 1e-9, result)

# Beyond the trained length of 4096 only with YaRN; depths in any order, each of its own.
bench = ["bench", TINY, "-p", 16, "-n", 4, "-r", 1, "--json", "--kv", "q8_0"]
status, _, err = run(*bench, "-d", "5000")
check("too long", status == 1 and "--yarn" in err and err.count("\n") == 1, err)
status, out, err = run(*bench, "-d", "0,5000,300", "--yarn", 2)
results = json.loads(out)["results"] if status == 0 else []
check("bench -d", [(r["kind"], r["depth"]) for r in results] ==
      [(kind, depth) for depth in (0, 5000, 300) for kind in ("prefill", "decode")], err)
decode = {r["depth"]: r["bytes_per_token"] for r in results if r["kind"] == "decode"}
check("bytes grow with the depth", decode and decode[0] < decode[300] < decode[5000], decode)

# Ctrl-C on the way to a depth that takes hours: what was measured before is there.
if os.name == "posix":
    child = subprocess.Popen([PROGRAM, *map(str, bench), "-d", "0,1000000", "--yarn", "245"], stdout=subprocess.PIPE,
                             stderr=subprocess.PIPE, text=True)
    time.sleep(3)
    child.send_signal(signal.SIGINT)
    start = time.time()
    out, err = child.communicate(timeout=60)
    check("Ctrl-C: status", child.returncode == 130, (child.returncode, err))
    check("Ctrl-C: soon", time.time() - start < 30, time.time() - start)
    results = json.loads(out)["results"] if out else []
    check("Ctrl-C: what was measured", [(r["kind"], r["depth"]) for r in results] == [("prefill", 0), ("decode", 0)], out)

finish()
