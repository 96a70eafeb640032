#!/usr/bin/env python3
"""Write a GGUF of every mixture and every block type, and compare its logits with those of llama.cpp on the same file.

    tools/check_types_in_llama_cpp.py build/release/qwen3next MODEL [--only Q4_0,IQ4_XS] [-n 48]

llama.cpp (the llama-cpp-python package) continues each prompt greedily; `qwen3next logits` then reads prompt and
continuation. Where its best token is another one, the texts part there: a near tie, if the two tokens' logits lie within
--tie. Both engines round activations to 8 bits, each in its own way, so logits differ by what that costs; `nmse` is the
difference's power relative to that of the logits around their mean. Exit code 1 if a file does not load or a text parts
at more than a near tie. Needs numpy, llama-cpp-python.
"""
import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np

MIXES = "Q8_0 Q6_K Q5_K_M Q4_K_M Q3_K_M Q4_0 IQ4_NL MXFP4".split()
TYPES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4 NVFP4".split()
PROMPTS = ["Once upon a time", "One day, a little girl named Lily found a", "It was a dark night.\n\nTom didn't know"]


def greedy(model: llama_cpp.Llama, prompt: str, count: int) -> tuple[list[int], int, np.ndarray]:
    """Tokens, how many of them are the prompt's, and the logits after each."""
    tokens = model.tokenize(prompt.encode(), add_bos=False)
    start = len(tokens)
    model.reset()
    model.eval(tokens)
    for _ in range(count):
        tokens.append(int(model.scores[len(tokens) - 1].argmax()))
        model.eval(tokens[-1:])
    return tokens, start, np.array(model.scores[: len(tokens)])


def compare(args: argparse.Namespace, name: str, options: list[str], folder: Path) -> bool:
    file, ours_file = folder / "model.gguf", folder / "logits.npy"
    subprocess.run([args.program, "quantize", args.model, file, *options, "--force", "--quiet"], check=True)
    model = llama_cpp.Llama(str(file), n_ctx=512, n_threads=args.threads, logits_all=True, verbose=False)
    error = power = 0.0
    partings, positions = [], 0
    for prompt in PROMPTS:
        tokens, start, theirs = greedy(model, prompt, args.n)
        subprocess.run([args.program, "logits", file, "--tokens", ",".join(map(str, tokens)), "--out", ours_file,
                        "--quiet"], check=True)
        ours = np.load(ours_file).astype(np.float64)
        centred = theirs - theirs.mean(axis=1, keepdims=True)
        error += ((ours - ours.mean(axis=1, keepdims=True) - centred) ** 2).sum()
        power += (centred**2).sum()
        for i in range(start - 1, len(tokens) - 1):
            positions += 1
            if (best := int(ours[i].argmax())) != tokens[i + 1]:
                partings.append(max(ours[i, best] - ours[i, tokens[i + 1]],
                                    theirs[i, tokens[i + 1]] - theirs[i, best]))
    model.close()
    good = all(gap <= args.tie for gap in partings)
    print(f"{'ok  ' if good else 'DIFF'} {name:18} {file.stat().st_size / 1e6:6.1f} MB  nmse {error / power:.1e}  "
          f"{positions - len(partings)} of {positions} tokens equal"
          + (f", the others within {max(partings):.3f}" if partings else ""), flush=True)
    return good


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("model", type=Path, help="a Hugging Face folder or a GGUF, best in BF16")
    parser.add_argument("-n", type=int, default=48, help="tokens to continue each prompt with (default: %(default)s)")
    parser.add_argument("--tie", type=float, default=0.25, help="logits that near ties lie within (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", type=lambda text: text.split(","), help="some mixtures or types")
    args = parser.parse_args()
    cases = [(f"mixture {name}", name, ["--type", name]) for name in MIXES]
    cases += [(f"all {name}", name, ["--type", "BF16", "--tensor-type", f"blk.*={name}"]) for name in TYPES]
    with tempfile.TemporaryDirectory() as folder:
        results = [compare(args, label, options, Path(folder))
                   for label, name, options in cases if not args.only or name in args.only]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())
