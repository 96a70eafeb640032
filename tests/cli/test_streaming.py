#!/usr/bin/env python3
"""The program with a memory budget: the same words, within the budget; errors that say how much is needed.

    tests/cli/test_streaming.py build/release/qwen3next .
"""

import json
import os
import subprocess
import tempfile

from checking import PROGRAM, TINY, check, finish

MIB = 1 << 20


def run(*args):
    """Exit status, stdout, stderr, and the most memory that was resident, in bytes."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen([PROGRAM, *map(str, args)], stdout=out, stderr=err, stdin=subprocess.DEVNULL)
        _, status, usage = os.wait4(child.pid, 0)
        out.seek(0), err.seek(0)
        return os.waitstatus_to_exitcode(status), out.read().decode(), err.read().decode(), usage.ru_maxrss * 1024


with tempfile.TemporaryDirectory() as folder:
    model = os.path.join(folder, "bf16.gguf")
    status, _, err, _ = run("quantize", TINY, model, "--type", "BF16")
    check("quantize", status == 0, err)
    size = os.path.getsize(model)
    story = ["-p", "Once upon a time", "-n", 60, "--temp", 0, "--ctx", 256, "--threads", 2]
    status, words, err, _ = run("run", model, *story)
    check("mapped", status == 0 and len(words) > 100, err)

    # What the program itself takes, with the tokenizer: a run that touches no weights.
    _, _, _, program = run("tokenize", model)
    for budget in (48 * MIB, 64 * MIB):
        assert budget < size * 0.6
        status, streamed, err, peak = run("run", model, *story, "--memory", f"{budget // MIB}MiB", "-v")
        check(f"{budget}: same words", status == 0 and streamed == words, err)
        check(f"{budget}: kept", peak <= budget * 1.05 + program, f"{peak} bytes resident, the program's own {program}")
        for part in ("experts streamed", "dense weights", "expected hits", "of picks were there", "looking ahead"):
            check(f"{budget}: -v says '{part}'", part in err, err)
    status, streamed, err, _ = run("run", model, *story, "--memory", "1TiB")
    check("all of it fits", status == 0 and streamed == words, err)

    status, _, err, _ = run("run", model, *story, "--memory", "5MiB")
    check("too small", status == 1 and "MiB or more" in err and err.count("\n") == 1, err)
    for nonsense in ("lots", "-3", "0", "12parsecs", "3GiBB", "1.5.2GiB", ""):
        status, _, err, _ = run("run", model, *story, f"--memory={nonsense}")
        check(f"--memory '{nonsense}'", status == 2 and (not nonsense or "as 20GiB" in err), (status, err))
    status, _, err, _ = run("run", model, *story, "--backend", "reference", "--memory", "64MiB")
    check("reference", status == 1 and "reference" in err, err)

    status, fewer, err, _ = run("run", model, *story, "--experts-used", 2)
    check("fewer experts are said", status == 0 and "(2 of 4 experts a token)" in err and fewer != words, err)
    status, _, err, _ = run("run", model, *story, "--experts-used", 5)
    check("more than the model's", status == 1 and "1..4" in err, err)

    profile = os.path.join(folder, "profile.json")
    text = os.path.join(folder, "text.txt")
    with open(text, "w") as f:
        f.write(words)
    status, _, err, _ = run("experts", model, text, "--save", profile)
    check("experts --save", status == 0, err)
    status, streamed, err, _ = run("run", model, *story, "--memory", "48MiB", "--expert-profile", profile)
    check("with a profile", status == 0 and streamed == words, err)
    status, _, err, _ = run("run", model, *story, "--memory", "48MiB", "--expert-profile", text)
    check("no profile", status == 1 and "text.txt" in err, err)

    status, out, err, _ = run("inspect", model, "--memory", "48MiB", "--ctx", 256, "--json")
    plan = json.loads(out)["memory"]["streaming"] if status == 0 else {}
    check("inspect: the budget", plan.get("budget") == 48 * MIB, err)
    check("inspect: experts", 0 < plan.get("experts_held", 0) < plan.get("experts", 0) == 288, plan)
    check("inspect: the sum", plan.get("needed", 1 << 60) < 48 * MIB and plan.get("read_bandwidth", 0) > 0, plan)
    status, out, err, _ = run("inspect", model, "--memory", "48MiB", "--ctx", 256)
    check("inspect: text", status == 0 and "expected hits" in out and "tokens/s" in out, out + err)
    status, out, err, _ = run("bench", model, "--memory", "48MiB", "-p", 64, "-n", 16, "-r", 1, "--json")
    results = json.loads(out)["results"] if status == 0 else []
    check("bench", len(results) == 2 and all("percent_of_disk" in r for r in results), out + err)

finish()
