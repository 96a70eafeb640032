#!/usr/bin/env python3
"""What the program keeps between processes: /save and /load, --cache-dir; damaged files cost time, never words.

    tests/cli/test_sessions.py build/release/qwen3next .
"""

import json
import os
import re
import subprocess
import tempfile

from checking import PROGRAM, SOURCE, TINY, check, finish


def run(*args, stdin=""):
    done = subprocess.run([PROGRAM, *map(str, args)], input=stdin, capture_output=True, text=True)
    return done.returncode, done.stdout, done.stderr


def flip(path, at):
    with open(path, "r+b") as file:
        file.seek(at)
        byte = file.read(1)
        file.seek(at)
        file.write(bytes([byte[0] ^ 1]))


with tempfile.TemporaryDirectory() as folder:
    # A conversation goes on from its file as it would have gone on.
    talk = [TINY, "--temp", "0", "-n", "30"]
    saved = os.path.join(folder, "talk.json")
    status, whole, err = run("chat", *talk, stdin=f"Tell me a story.\n/save {saved}\nAnd then?\n")
    check("save", status == 0 and re.search(r"saved 2 messages and the state of \d+ tokens", err), err)
    check("readable", len(json.load(open(saved))["messages"]) == 2)
    for damaged in (False, True):
        if damaged:
            flip(saved + ".state", os.path.getsize(saved + ".state") // 2)
        status, rest, err = run("chat", *talk, stdin=f"/load {saved}\nAnd then?\n/stats\n")
        check("load", status == 0 and len(rest) > 5 and "loaded 2 messages" in err, err)
        check("reused or not", ("reused 0 of" in err and "damaged" in err) if damaged else "(timeline)" in err, err)
        check("the same words", damaged or whole.endswith(rest), rest)

    # A prompt that another process has read.
    prompt = os.path.join(folder, "prompt.txt")
    open(prompt, "w").write(open(os.path.join(SOURCE, "CONTRIBUTING.md")).read()[:4000])
    cache = os.path.join(folder, "states")
    ask = ["run", TINY, "--raw", "-f", prompt, "-n", "20", "--temp", "0", "-v", "--cache-dir", cache]
    _, first, err = run(*ask)
    check("read", "reused 0 of" in err, err)
    files = os.listdir(cache)
    check("one file", len(files) == 1, str(files))
    _, second, err = run(*ask)
    check("reused", "(disk)" in err and len(second) > 10, err)
    _, third, err = run(*ask, "--kv", "q8_0")
    check("other KV type", "reused 0 of" in err, err)
    flip(os.path.join(cache, files[0]), 100000)
    status, fourth, err = run(*ask)
    check("damaged", status == 0 and "reused 0 of" in err and "damaged" in err and fourth == first, err)
    status, _, err = run(*ask, "--cache-size", "much")
    check("a size", status == 2 and "--cache-size" in err, err)

    status, out, err = run("bench", TINY, "--turns", "3", "-d", "700", "-p", "50", "-n", "16", "--json")
    turns = json.loads(out)["results"]
    check("turns", [t["kind"] for t in turns] == ["turn"] * 3, err)
    check("only the tail", all(t["tokens"] - t["reused"] < 80 for t in turns[1:]), out)
finish()
