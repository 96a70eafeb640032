#!/usr/bin/env python3
"""Compare greedy completions and token ids with llama.cpp's on the same GGUF.

    tools/check_against_llama_cpp.py build/release/qwen3next LLAMA_BUILD/bin model.gguf

For each prompt both programs continue the raw text (no template) with temperature 0, and the two texts are compared up to
white space at their ends; llama-tokenize, if the build has it, is compared with `tokenize`. Exit code 1 if anything
differs. Two engines round differently, so where the best two logits are close (within about 0.05 on a trained model in 4 bits,
see `qwen3next logits`) either token may come, and the texts part: that is no proof of a fault.
"""
import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path

PROMPTS = [
    "Once upon a time",
    "One day, a little girl named Lily found a",
    "The old man looked at the sea and said: \"",
    "1, 2, 3, 4, 5,",
    "Question: What is the capital of France?\nAnswer:",
    "It was a dark night.\n\nTom didn't know",
    "Le petit chat s'est cach\u00e9 \u2014 na\u00efve \U0001F431",
]
TOKENIZER_TEXTS = [*PROMPTS, "  two  spaces\t\ttabs \n\n\n lines\r\n", "I'll we've 3.14159 x+=1; // it's",
                   "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u3053\u3093\u306b\u3061\u306f", "\u041f\u0440\u0438\u0432\u0435\u0442"]


def output_of(command, text=""):
    """stdout of a command with `text` on its stdin."""
    done = subprocess.run(command, input=text.encode(), capture_output=True)
    if done.returncode:
        sys.stderr.buffer.write(done.stderr[-2000:])
        sys.exit(f"{shlex.join(map(str, command))}: exit code {done.returncode}")
    return done.stdout.decode(errors="backslashreplace")


def first_difference(ours, theirs):
    """None if equal, else where and what."""
    if ours == theirs:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), min(len(ours), len(theirs)))
    start = max(at - 10, 0)
    return f"differ at {at} of {len(theirs)}: ours {ours[start : at + 30]!r}, llama.cpp {theirs[start : at + 30]!r}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="qwen3next, or a command line in quotes")
    parser.add_argument("llama_bin", type=Path, help="folder with llama-completion (or an older llama-cli)")
    parser.add_argument("model", type=Path, help="a GGUF file")
    parser.add_argument("-n", type=int, default=64, help="tokens per completion (default: %(default)s)")
    parser.add_argument("--prompts", type=Path, help="a JSON array of prompts instead of the built-in ones")
    parser.add_argument("--program-args", default="", help="more options for `run`, for example '--kv f16 --threads 2'")
    parser.add_argument("--llama-args", default="", help="more options for llama.cpp, for example '-t 2'")
    args = parser.parse_args()
    program = shlex.split(args.program)
    prompts = json.loads(args.prompts.read_text()) if args.prompts else PROMPTS
    llama = next((args.llama_bin / name for name in ("llama-completion", "llama-cli")
                  if (args.llama_bin / name).exists()), None)
    if llama is None:
        parser.error(f"{args.llama_bin}: neither llama-completion nor llama-cli there")

    different = 0
    for prompt in prompts:
        ours = output_of([*program, "run", args.model, "-p", prompt, "--raw", "--temp", "0", "-n", str(args.n), "--quiet",
                          *shlex.split(args.program_args)])
        theirs = output_of([llama, "-m", args.model, "-p", prompt, "--no-escape", "-no-cnv", "--no-display-prompt",
                            "--temp", "0", "-n", str(args.n), "-c", "2048", "--no-warmup", *shlex.split(args.llama_args)])
        theirs = theirs.rstrip().removesuffix("[end of text]")
        difference = first_difference(ours.rstrip(), theirs.rstrip())
        different += difference is not None
        print(f"{'ok  ' if difference is None else 'DIFF'} run {prompt!r}: {difference or repr(ours[:50])}",
              flush=True)

    tokenize = args.llama_bin / "llama-tokenize"
    if not tokenize.exists():
        print(f"(no {tokenize}: token ids not compared)")
    for text in [*TOKENIZER_TEXTS, *(prompts if args.prompts else [])] if tokenize.exists() else []:
        ours = json.loads(output_of([*program, "tokenize", args.model], text))
        theirs = json.loads(output_of([tokenize, "-m", args.model, "--stdin", "--ids", "--no-bos", "--no-escape",
                                       "--no-parse-special", "--log-disable"], text))
        difference = first_difference(ours, theirs)
        different += difference is not None
        print(f"{'ok  ' if difference is None else 'DIFF'} tokenize {text!r}: {difference or f'{len(ours)} ids'}", flush=True)

    print("all equal" if not different else f"{different} differ")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
