#!/usr/bin/env python3
"""The memory of a long context: as planned, taken as the text grows, nothing before.

    tests/cli/test_context_memory.py build/release/qwen3next .
"""

import json
import os
import subprocess
import tempfile

from checking import PROGRAM, TINY, check, finish

MIB = 1 << 20


def peak(*args):
    """The most memory that was resident, in bytes."""
    child = subprocess.Popen([PROGRAM, "run", TINY, "-n", "1", "--batch", "512", "--threads", "2", *args],
                             stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, usage = os.wait4(child.pid, 0)
    check(" ".join(args), os.waitstatus_to_exitcode(status) == 0)
    return usage.ru_maxrss * 1024


def planned(kv, length):
    out = subprocess.run([PROGRAM, "inspect", TINY, "--json", "--kv", kv, "--ctx", str(length), "--yarn", "245"],
                         capture_output=True, check=True).stdout
    return json.loads(out)["memory"]["kv_cache"]


million = ["--ctx", "1000000", "--yarn", "245"]
check("nothing up front", abs(peak("-p", "Once", *million) - peak("-p", "Once", "--ctx", "4096")) < 4 * MIB)

# Types differ by their rows alone: those of the attention layers, and of the MTP layer, which is fed along.
length = 12000
with tempfile.TemporaryDirectory() as folder:
    text = os.path.join(folder, "text.txt")
    with open(text, "w") as f:
        f.write(" and" * length)  # a token each
    wide, narrow = (peak("-f", text, "--kv", kv, *million) for kv in ("f32", "q8_0"))
plan = planned("f32", length) - planned("q8_0", length)
check("as planned", abs(wide - narrow - plan) < 4 * MIB, (wide - narrow, plan))

finish()
