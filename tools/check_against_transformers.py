#!/usr/bin/env python3
"""Compare the program's logits with transformers' on random checkpoints of odd shapes.

    tools/check_against_transformers.py build/release/qwen3next --count 50

Every case draws all dimensions, dtypes and file layouts at random, writes the checkpoint, computes the expected logits
with transformers in fp32 (make_goldens.py has the details, the MTP block among them) and runs

    PROGRAM logits FOLDER --tokens 1,2,3 --out F.npy --backend BACKEND [--mtp]

NMSE = sum((ours - theirs)^2) / sum(theirs^2) over all logits must be at most 3e-8 (reference) and 2e-4 (cpu). One line per
case: status, NMSE per backend (mtp+ marks the MTP head), shape. Exit code 1 if any case fails. Case i of seed S is always
the same: `--seed S --first i --count 1 --keep DIR` repeats one and keeps its files.
"""
import argparse
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy
from make_goldens import FULL, LINEAR, Case, interval_layers, quiet, run_oracle, shape, write_checkpoint

BOUNDS = {"reference": 3e-8, "cpu": 2e-4}
MIXABLE = ["A_log", "dt_bias", "norm", "mlp.gate.", "conv1d", "embed_tokens", "lm_head", "experts", "self_attn",
           "in_proj_ba", "out_proj", "shared_expert", "mtp.fc"]


def random_rope(r, head_dim):
    """theta, partial rotary factor, YaRN. Odd numbers of rotated dims occur: (n+1)/2 pairs with exponents -2i/n."""
    def rotated(partial):
        return int(head_dim * partial)

    partials = [p for p in (0.25, 0.25, 0.5, 0.75, 1.0) if 1 <= rotated(p) and rotated(p) + rotated(p) % 2 <= head_dim]
    rope = {"theta": r.choice([10000, 10000.0, 1000000, 10000000]), "partial": r.choice(partials)}
    if r.random() < 0.3 and rotated(rope["partial"]) % 2 == 0:  # transformers has YaRN for an even number only
        scaling = {r.choice(["rope_type", "rope_type", "type"]): "yarn", "factor": r.choice([2.0, 4.0, 8.0]),
                   "original_max_position_embeddings": r.choice([16, 32, 64, 1000])}
        if r.random() < 0.3:
            scaling |= {"beta_fast": r.choice([4.0, 16.0]), "beta_slow": r.choice([0.5, 2.0])}
        if r.random() < 0.3:
            scaling["attention_factor"] = r.choice([1.0, 1.25])
        rope["scaling"] = scaling
    return rope


def random_case(seed):
    """A Case with everything random."""
    r = random.Random(seed)
    hidden = r.choice([r.randint(8, 128), 8 * r.randint(1, 16), 32 * r.randint(1, 8)])
    kv_heads, key_heads = r.randint(1, 4), r.randint(1, 5)
    head_dim = r.choice([r.randint(4, 48), 4 * r.randint(1, 16)])
    key_dim = r.choice([r.randint(2, 40), 8 * r.randint(1, 8)])
    value_dim = r.choice([key_dim, r.randint(2, 40), 8 * r.randint(1, 8)])
    experts = r.randint(3, 40)
    top_k = r.choice([r.randint(1, experts), r.randint(1, min(experts, 8)), min(experts, 2)])
    config = shape(
        hidden, r.randint(20, 300), (kv_heads * r.randint(1, 4), kv_heads, head_dim),
        (key_heads, key_heads * r.randint(1, 4), key_dim, value_dim, r.randint(2, 5)),
        (experts, top_k, r.randint(4, 48), r.randint(4, 64)),
        norm_topk_prob=r.random() < 0.6, tie_word_embeddings=r.random() < 0.3, rms_norm_eps=r.choice([1e-6, 1e-6, 1e-5]))
    count, interval = r.randint(1, 6), r.randint(1, 4) if r.random() < 0.5 else 0
    layers = interval_layers(count, interval) if interval else [r.choice([LINEAR, LINEAR, FULL]) for _ in range(count)]
    dtypes = r.sample(MIXABLE, r.randint(1, 6)) if r.random() < 0.4 else []
    return Case(
        name=f"random-{seed}", config=config, layers=layers, seed=seed, interval=interval,
        tokens=r.choice([1, 2, 63, 64, 65, 129, r.randint(3, 60), r.randint(3, 200), r.randint(66, 200)]),
        dtype=r.choice(["BF16", "BF16", "F16", "F32"]), dtypes={p: r.choice(["BF16", "F16", "F32"]) for p in dtypes},
        new_style=r.random() < 0.5, rope=random_rope(r, head_dim), fused=r.random() < 0.4,
        shards=r.choice([1, 1, 2, 3, 5]), mtp=r.random() < 0.4, fp8=random_fp8(seed))


def random_fp8(seed):
    """The dtype of the scales of an FP8 checkpoint, or none."""
    r = random.Random(seed ^ 0xE4A3)
    return r.choice(["BF16", "F32"]) if r.random() < 0.3 else ""


def is_misaligned(case):
    return random.Random(case.seed ^ 0x5AFE).random() < 0.15


def misalign(folder):
    """Move the data of every file to an odd offset, as the format allows: one more space after the header."""
    for file in folder.glob("*.safetensors"):
        raw = file.read_bytes()
        size = int.from_bytes(raw[:8], "little")
        file.write_bytes((size + 1).to_bytes(8, "little") + raw[8 : 8 + size] + b" " + raw[8 + size :])


def describe(case):
    c = case.config
    layers = "".join("l" if kind == LINEAR else "F" for kind in case.layers)
    flags = [f"{case.shards} shards" if case.shards > 1 else "", "fused" if case.fused else "",
             "new config" if case.new_style else "", f"interval {case.interval}" if case.interval else "",
             "tied" if c["tie_word_embeddings"] else "", "" if c["norm_topk_prob"] else "no topk norm",
             "yarn" if case.rope.get("scaling") else "",
             f"fp8, {case.fp8} scales" if case.fp8 else "", "misaligned" if is_misaligned(case) else "", f"mixed {len(case.dtypes)}" if case.dtypes else ""]
    return (f"T={case.tokens} H={c['hidden_size']} V={c['vocab_size']} {layers} "
            f"attn {c['num_attention_heads']}/{c['num_key_value_heads']}x{c['head_dim']} rope {case.rope['partial']} "
            f"gdn {c['linear_num_key_heads']}x{c['linear_key_head_dim']}/{c['linear_num_value_heads']}x"
            f"{c['linear_value_head_dim']} conv {c['linear_conv_kernel_dim']} moe {c['num_experts_per_tok']}/"
            f"{c['num_experts']}x{c['moe_intermediate_size']}+{c['shared_expert_intermediate_size']} {case.dtype} "
            + ", ".join(f for f in flags if f))


def nmse(ours, theirs):
    """Over the whole arrays; infinite where ours is not finite."""
    ours, theirs = ours.astype(numpy.float64), theirs.astype(numpy.float64)
    if not numpy.isfinite(ours).all():
        return float("inf")
    return ((ours - theirs) ** 2).sum() / (theirs**2).sum()


def run_program(command, folder, tokens, backend, mtp, timeout):
    """-> (float32 logits, None) or (None, what went wrong)"""
    out = Path(folder) / f"logits-{backend}{'-mtp' if mtp else ''}.npy"
    command = [*command, "logits", str(folder), "--tokens", ",".join(map(str, tokens)), "--out", str(out),
               "--backend", backend] + (["--mtp"] if mtp else [])
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return None, f"no answer in {timeout} s"
    if done.returncode:
        return None, f"exit code {done.returncode}: {(done.stderr.strip().splitlines() or ['(stderr empty)'])[-1]}"
    try:
        return numpy.load(out), None
    except (OSError, ValueError) as error:
        return None, f"no logits: {error}"


def check(case, folder, args):
    """Run one case -> (ok, report)"""
    write_checkpoint(case, folder)
    expected, _ = run_oracle(case, folder, gap=0, logit_gap=args.logit_gap)
    if is_misaligned(case):  # now: transformers itself wants aligned files
        misalign(folder)
    tokens = expected["tokens"].tolist()
    heads = [("", expected["logits"].numpy(), False)]
    if "mtp_logits" in expected:
        heads.append(("mtp+", expected["mtp_logits"].numpy(), True))
    ok, report = True, []
    for backend in args.backends:
        for prefix, theirs, mtp in heads:
            ours, error = run_program(args.command, folder, tokens, backend, mtp, args.timeout)
            if error is None and (ours.shape != theirs.shape or ours.dtype != numpy.float32):
                error = f"{ours.dtype}{list(ours.shape)} instead of float32{list(theirs.shape)}"
            if error is not None:
                ok = False
                report.append(f"{prefix}{backend} {error}")
                continue
            value = nmse(ours, theirs)
            ok = ok and value <= BOUNDS[backend]
            report.append(f"{prefix}{backend} {value:.1e}{'' if value <= BOUNDS[backend] else ' (!)'}")
            args.worst[prefix + backend] = max(args.worst.get(prefix + backend, 0.0), value)
    return ok, "  ".join(report)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="qwen3next, or a command line in quotes (options for every run may follow it)")
    parser.add_argument("--count", type=int, default=20)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--backends", default="reference,cpu", help="comma-separated (default: %(default)s)")
    parser.add_argument("--keep", type=Path, metavar="DIR", help="write the checkpoints here and keep them")
    parser.add_argument("--logit-gap", type=float, default=0.004,
                        help="redraw tokens whose k-th and next router logits are closer than this (default: %(default)s)")
    parser.add_argument("--timeout", type=float, default=120, help="seconds per run of the program")
    args = parser.parse_args()
    args.command, args.backends, args.worst = shlex.split(args.program), args.backends.split(","), {}
    if unknown := set(args.backends) - set(BOUNDS):
        parser.error(f"no bound for backend {', '.join(unknown)}; there are {', '.join(BOUNDS)}")
    if not args.command or not shutil.which(args.command[0]):
        parser.error(f"{args.program}: no such program")
    quiet()

    failed = []
    with tempfile.TemporaryDirectory(prefix="qwen3next-check-") as scratch:
        for i in range(args.first, args.first + args.count):
            case = random_case(args.seed * 100_003 + i)
            if args.keep:
                ok, report = check(case, args.keep / f"case-{args.seed}-{i}", args)
            else:
                with tempfile.TemporaryDirectory(dir=scratch) as folder:
                    ok, report = check(case, Path(folder), args)
            print(f"{'ok  ' if ok else 'FAIL'} {i:4d}  {report}  | {describe(case)}", flush=True)
            if not ok:
                failed.append(i)
    print(f"{args.count - len(failed)} of {args.count} agree; worst NMSE:",
          ", ".join(f"{name} {value:.1e}" for name, value in args.worst.items()))
    if failed:
        print(f"failed: {', '.join(map(str, failed))}; repeat one with --seed {args.seed} --first N --count 1 --keep DIR")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
