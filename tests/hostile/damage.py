#!/usr/bin/env python3
"""Damages checkpoints in seeded ways and runs the program on each: whatever a file holds, the program must end within
seconds, with exit status 0, or with 1 and one line that says why.  No signal, no hang, no heap of a size that no file
justifies (an address-space limit of 6 GiB), and no NaN that looks like a result.

    tests/hostile/damage.py build/release/qwen3next . --cases 600 --jobs 2
    tests/hostile/damage.py build/asan/qwen3next . --cases 600 --no-limit --seconds 60     # sanitizers need the addresses
    tests/hostile/damage.py build/release/qwen3next . --only 17 --keep /tmp/case           # one case, to look at

The valid inputs: Hugging Face folders (golden checkpoints single and sharded, and a miniature made here, in BF16 and FP8) and GGUFs that
`quantize` writes from the miniature, one of them split.  Each is first run undamaged.
"""

import argparse
import concurrent.futures
import json
import math
import os
import random
import resource
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

from containers import FP8, MINIATURE, Gguf, miniature, tokenizer_json
from damages import GGUF, HF, gguf_files

MESSAGES = json.dumps([{"role": "user", "content": "hello"}]).encode()


class Inputs:
    """The valid checkpoints, and how to make a damaged one."""

    def __init__(self, program, source, work):
        golden = source / "tests/golden"
        self.folders = {}
        for name in ("release", "sharded", "fused"):
            folder = work / name
            shutil.copytree(golden / "model" / name, folder, ignore=shutil.ignore_patterns("expected*"))
            self.add_text(folder, golden, source, json.loads((folder / "config.json").read_text())["vocab_size"])
            self.folders[name] = folder
        for name, fp8 in (("mini", False), ("fp8", True)):
            folder = work / name
            folder.mkdir()
            (folder / "config.json").write_text(json.dumps(MINIATURE | ({"quantization_config": FP8} if fp8 else {})))
            (folder / "model.safetensors").write_bytes(miniature(fp8=fp8).pack())
            self.add_text(folder, golden, source, MINIATURE["vocab_size"])
            self.folders[name] = folder
        for kind in ("Q4_K_M", "Q8_0", "Q3_K_M", "F16", "Q4_0", "IQ4_NL", "MXFP4"):
            folder = work / kind
            folder.mkdir()
            subprocess.run([program, "quantize", work / "mini", folder / "model.gguf", "--type", kind, "--quiet"],
                           check=True)
            self.folders[kind] = folder
        split = work / "split"
        split.mkdir()
        for i, part in enumerate(Gguf.parse((work / "Q4_K_M/model.gguf").read_bytes()).split(3)):
            (split / f"model-{i + 1:05}-of-00003.gguf").write_bytes(part.pack())
        self.folders["split"] = split

    @staticmethod
    def add_text(folder, golden, source, vocabulary):
        (folder / "tokenizer.json").write_text(tokenizer_json(golden / "text/tokenizer.json", vocabulary), encoding="utf-8")
        shutil.copy(source / "weights/tiny/chat_template.jinja", folder)
        (folder / "generation_config.json").write_text('{"temperature": 0.7, "top_k": 20, "top_p": 0.8, "eos_token_id": [1, 2]}')
        (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>", "pad_token": {"content": "<|endoftext|>"}}')

    def case(self, number, seed, into):
        """A damaged copy; what to give the program, and what was done."""
        rng = random.Random(f"{seed}/{number}")
        names = list(self.folders)
        name = names[number % len(names)]
        shutil.copytree(self.folders[name], into)
        damages = HF if (into / "config.json").exists() else GGUF
        damage = damages[number // len(names) % len(damages)]
        return self.model(into), f"{name}: {damage.__name__}: {damage(rng, into)}"

    @staticmethod
    def model(folder):
        if (folder / "config.json").is_symlink() or (folder / "config.json").exists() or not any(
                p.suffix == ".gguf" for p in folder.iterdir()):
            return folder
        return gguf_files(folder)[0]


def commands(model, folder):
    out = folder.parent / "out"
    return [(["inspect", model], b""), (["inspect", model, "--json"], b""),
            (["logits", model, "--tokens", "1,2,3", "--out", out / "logits.npy", "-q"], b""),
            (["run", model, "-n", "2", "-p", "hello", "-q"], b""),
            (["tokenize", model], b"hello the hell <|im_end|>"), (["template", model], MESSAGES),
            (["quantize", model, out / "again.gguf", "--type", "Q8_0", "-q", "--force"], b"")]


class Runner:
    def __init__(self, program, limit, seconds):
        self.program, self.limit, self.seconds = program, limit, seconds

    def start(self, arguments, text):
        """Exit status and what is wrong with how it ended, if anything."""
        def limits():
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            if self.limit:
                resource.setrlimit(resource.RLIMIT_AS, (self.limit, self.limit))

        environment = dict(os.environ, UBSAN_OPTIONS="print_stacktrace=1",
                           ASAN_OPTIONS="detect_leaks=0:allocator_may_return_null=0:max_allocation_size_mb=6144")
        try:
            done = subprocess.run([self.program, *map(str, arguments)], input=text, capture_output=True,
                                  timeout=self.seconds, preexec_fn=limits, env=environment)
        except subprocess.TimeoutExpired:
            return None, f"still running after {self.seconds} s"
        err = done.stderr.decode(errors="replace")
        last = err.strip().splitlines()[-1:] or [""]
        lines = [line for line in err.splitlines() if line.startswith("qwen3next: error:")]
        if "Sanitizer" in err or "runtime error:" in err:
            return done.returncode, "sanitizer: " + err[:3000]
        if done.returncode not in (0, 1):
            return done.returncode, f"exit status {done.returncode}: {last[0][:300]}"
        if done.returncode == 1 and len(lines) != 1:
            return 1, f"exit status 1 with {len(lines)} error lines: {err[:300]!r}"
        if done.returncode == 1 and (len(lines[0]) > 1500 or "unexpected:" in lines[0]):
            return 1, f"not a message for people: {lines[0][:300]}"
        return done.returncode, None

    def check(self, model, folder):
        """Runs all commands; statuses, problems."""
        out = folder.parent / "out"
        out.mkdir()
        statuses, problems = [], []
        for arguments, text in commands(model, folder):
            status, problem = self.start(arguments, text)
            statuses.append(status)
            if problem is None and status == 0 and arguments[0] == "logits" and not finite(out / "logits.npy"):
                problem = "logits that are not numbers, and exit status 0"
            if problem is None and status == 0 and arguments[0] == "quantize":
                again, problem = self.start(["inspect", out / "again.gguf"], b"")
                if again != 0:
                    problem = f"what it wrote cannot be opened: {problem}"
            if problem:
                problems.append(f"{arguments[0]}: {problem}")
        left = [p.name for p in out.iterdir() if p.name not in ("logits.npy", "again.gguf")]
        if left:
            problems.append(f"left behind: {left}")
        return statuses, problems


def finite(npy):
    raw = npy.read_bytes()
    begin = 10 + struct.unpack_from("<H", raw, 8)[0]
    return all(math.isfinite(x) for (x,) in struct.iter_unpack("<f", raw[begin:]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", type=Path)
    parser.add_argument("source", type=Path, help="the repository")
    parser.add_argument("--cases", type=int, default=600)
    parser.add_argument("--only", type=int, help="run this case alone")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=10, help="a run that takes longer hangs")
    parser.add_argument("--no-limit", action="store_true", help="without the limit of 6 GiB of address space")
    parser.add_argument("--keep", type=Path, help="copy the inputs of failing cases here")
    parser.add_argument("-v", "--verbose", action="store_true")
    o = parser.parse_args()
    runner = Runner(o.program.resolve(), None if o.no_limit else 6 << 30, o.seconds)

    with tempfile.TemporaryDirectory(prefix="qwen3next-damage-") as work:
        work = Path(work)
        inputs = Inputs(runner.program, o.source.resolve(), work)
        for name, folder in inputs.folders.items():  # or the damage would show nothing
            case = work / "valid"
            shutil.copytree(folder, case / "model")
            statuses, problems = runner.check(inputs.model(case / "model"), case / "model")
            if any(statuses) or problems:
                sys.exit(f"{name}, undamaged: exit statuses {statuses}, {problems}")
            shutil.rmtree(case)

        def run(number):
            case = work / f"case-{number}"
            case.mkdir()
            try:
                model, what = inputs.case(number, o.seed, case / "model")
                statuses, problems = runner.check(model, case / "model")
                if problems and o.keep:
                    shutil.copytree(case / "model", o.keep / f"{number}", symlinks=True, dirs_exist_ok=True)
                return number, what, statuses, problems
            finally:
                shutil.rmtree(case)

        failed = refused = runs = 0
        numbers = range(o.cases) if o.only is None else [o.only]
        with concurrent.futures.ThreadPoolExecutor(o.jobs) as pool:
            for number, what, statuses, problems in pool.map(run, numbers):
                failed += bool(problems)
                refused += any(statuses)
                runs += len(statuses)
                if problems or o.verbose:
                    print(f"case {number}: {what}: {statuses}", flush=True)
                for problem in problems:
                    print(f"  FAILED {problem}", flush=True)
        print(f"{len(numbers)} damaged checkpoints, {runs} runs: {refused} refused by one command at least, "
              f"{len(numbers) - refused} harmless, {failed} failed")
        sys.exit(failed != 0)


if __name__ == "__main__":
    main()
