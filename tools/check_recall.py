#!/usr/bin/env python3
"""The bundled model's recall task through the program: a fact at the start, stories, the question at the end, at the
trained length and beyond it with YaRN. The answer, taken greedily, must begin with the whole value.

usage: tools/check_recall.py PROGRAM MODEL.gguf CORPUS TOKENIZER.json [--samples 16] [--cases 4096:0,8192:2,16384:4]

A case is LENGTH:FACTOR; 0 is without YaRN. Needs numpy, tokenizers, and the corpus that the model was trained on.
"""
import argparse
import subprocess
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tiny.data import Tokens, prepare, recall


def answer(args, prompt, factor):
    command = [args.program, "run", args.model, "--raw", "-f", prompt, "-n", "12", "--temp", "0", "-q", "--kv", args.kv]
    if factor:
        command += ["--yarn", str(factor)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return done.stdout


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("program", "model", "corpus", "tokenizer"):
        parser.add_argument(name)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--cases", default="4096:0,4096:2,8192:2,16384:4")
    parser.add_argument("--kv", default="f16")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(args.corpus), folder, limit=600, tokenizer=args.tokenizer, log=lambda *_: None)
        data, tokenizer = Tokens(folder), Tokenizer.from_file(args.tokenizer)
        prompt = Path(folder) / "prompt.txt"
        for length, factor in (map(float, case.split(":")) for case in args.cases.split(",")):
            rng = np.random.default_rng([99, int(length)])
            right = 0
            for _ in range(args.samples):
                ids, spans = recall(data, rng, int(length) - 32, asks=1)
                begin, end = map(int, spans[0])
                prompt.write_text(tokenizer.decode(ids[:begin], skip_special_tokens=False))
                value = tokenizer.decode(ids[begin:end], skip_special_tokens=False).strip()
                right += answer(args, prompt, factor).strip().startswith(value)
            print(f"{int(length)} tokens, YaRN {factor:g}, KV {args.kv}: {right} of {args.samples}", flush=True)


if __name__ == "__main__":
    main()
