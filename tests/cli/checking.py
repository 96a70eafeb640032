"""What the program's tests in Python share: `TEST.py build/release/qwen3next SOURCE_DIR` is how they are called."""

import os
import sys

PROGRAM, SOURCE = map(os.path.abspath, sys.argv[1:3])
TINY = os.path.join(SOURCE, "weights/tiny/qwen3next-tiny.gguf")
failures = 0


def check(what, good, more=""):
    global failures
    if not good:
        failures += 1
        print(f"FAILED: {what}\n  {more}")


def finish():
    print("FAILED" if failures else "all good")
    sys.exit(failures > 0)
