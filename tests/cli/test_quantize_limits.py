#!/usr/bin/env python3
"""quantize under pressure: little memory, full disks, Ctrl-C, kill -9, folders that are not there, a source that shrinks.

    tests/cli/test_quantize_limits.py build/release/qwen3next .

The model is one layer of the 80B's shape with few of its experts, in sparse files: it takes no disk and real time.
"""

import json
import os
import pathlib
import resource
import shutil
import signal
import struct
import subprocess
import tempfile
import time

from checking import PROGRAM, TINY, check, finish

PART = ".quantize.part"
H, V, EXPERTS, WIDTH = 2048, 1024, 160, 512


def sparse_model(folder):
    """A Hugging Face folder of about 1 GiB that holds zeros."""
    config = {
        "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_size": H, "vocab_size": V,
        "num_hidden_layers": 1, "layer_types": ["full_attention"], "num_attention_heads": 16, "num_key_value_heads": 2,
        "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32, "linear_key_head_dim": 128,
        "linear_value_head_dim": 128, "linear_conv_kernel_dim": 4, "num_experts": EXPERTS, "num_experts_per_tok": 10,
        "moe_intermediate_size": WIDTH, "shared_expert_intermediate_size": WIDTH, "norm_topk_prob": True,
        "rms_norm_eps": 1e-6, "rope_theta": 1e7, "partial_rotary_factor": 0.25, "max_position_embeddings": 262144,
        "tie_word_embeddings": False, "decoder_sparse_step": 1, "mlp_only_layers": [], "hidden_act": "silu",
    }
    p = "model.layers.0."
    shapes = {
        "model.embed_tokens.weight": [V, H], "lm_head.weight": [V, H], "model.norm.weight": [H],
        p + "input_layernorm.weight": [H], p + "post_attention_layernorm.weight": [H],
        p + "self_attn.q_proj.weight": [8192, H], p + "self_attn.k_proj.weight": [512, H],
        p + "self_attn.v_proj.weight": [512, H], p + "self_attn.o_proj.weight": [H, 4096],
        p + "self_attn.q_norm.weight": [256], p + "self_attn.k_norm.weight": [256],
        p + "mlp.gate.weight": [EXPERTS, H], p + "mlp.shared_expert_gate.weight": [1, H],
        p + "mlp.shared_expert.gate_proj.weight": [WIDTH, H], p + "mlp.shared_expert.up_proj.weight": [WIDTH, H],
        p + "mlp.shared_expert.down_proj.weight": [H, WIDTH],
    }
    for e in range(EXPERTS):
        for name, shape in (("gate", [WIDTH, H]), ("up", [WIDTH, H]), ("down", [H, WIDTH])):
            shapes[f"{p}mlp.experts.{e}.{name}_proj.weight"] = shape
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2
        for n in shape:
            size *= n
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + end)
    return end


def run(*arguments, **options):
    return subprocess.run([PROGRAM, *map(str, arguments)], capture_output=True, text=True, **options)


def start_and_wait_for_part(source, out):
    """A run that has written something and has most of its work before it."""
    process = subprocess.Popen([PROGRAM, "quantize", str(source), str(out), "--type", "Q4_K_M"],
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    part = pathlib.Path(str(out) + PART)
    while process.poll() is None and not (part.exists() and part.stat().st_size > 1 << 20):
        time.sleep(0.01)
    return process


def names(folder):
    return sorted(os.listdir(folder))


def memory(work, source, size):
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    done = run("quantize", source, work / "big.gguf", "--type", "Q8_0", "--quiet")
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
    print(f"peak resident memory {peak / 2**20:.0f} MiB for {size / 2**20:.0f} MiB of weights")
    check("a model larger than the memory limit is quantised", done.returncode == 0, done.stderr)
    check("resident memory stays small", before * 1024 < peak < 600 << 20, f"{before} KiB before, {peak} bytes at its peak")
    (work / "big.gguf").unlink()


def disk_full(work):
    limit = 20 << 20
    done = run("quantize", TINY, work / "full.gguf", "--type", "BF16",
               preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    check("a full disk is an error", done.returncode == 1, f"{done.returncode} {done.stderr}")
    check("it says so in a line", "full.gguf: cannot write it: File too large; free some space" in done.stderr
          and done.stderr.count("\n") == 1, done.stderr)
    check("nothing is left", not names(work), names(work))


def interrupted(work, source):
    process = start_and_wait_for_part(source, work / "cut.gguf")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    check("Ctrl-C ends with 130", process.returncode == 130, f"{process.returncode} {errors}")
    check("nothing is left", not names(work), names(work))


def killed(work, source):
    process = start_and_wait_for_part(source, work / "tiny.gguf")
    done = run("quantize", source, work / "tiny.gguf")
    check("two runs do not write one file", done.returncode == 1 and "another process" in done.stderr, done.stderr)
    process.kill()
    process.communicate()
    check("a killed run leaves one file", names(work) == ["tiny.gguf" + PART], names(work))
    # The next run is of another model: it begins anew, and cleans up.
    done = run("quantize", TINY, work / "tiny.gguf", "--type", "Q8_0")
    check("the next run succeeds", done.returncode == 0 and "went on" not in done.stderr, done.stderr)
    check("and leaves its result only", names(work) == ["tiny.gguf"], names(work))
    run("quantize", TINY, work / "again.gguf", "--type", "Q8_0", "--threads", 1)
    check("which does not depend on what was there, nor on threads",
          (work / "tiny.gguf").read_bytes() == (work / "again.gguf").read_bytes())
    for name in names(work):
        (work / name).unlink()


def shrinking(work, source):
    process = start_and_wait_for_part(source, work / "short.gguf")
    os.truncate(source / "model.safetensors", 100 << 20)
    _, errors = process.communicate()
    # Noticed between two batches, or by the page that is not there.
    check("a source that becomes shorter is an error", process.returncode == 1, f"{process.returncode} {errors}")
    check("which says so", "bytes when it was opened" in errors or "became shorter" in errors, errors)
    for name in names(work):
        check("at most the unfinished file is left", name == "short.gguf" + PART, name)
        (work / name).unlink()


def places(work):
    done = run("quantize", TINY, work / "no" / "x.gguf")
    check("a missing folder is named", done.returncode == 1 and "create the folder first" in done.stderr, done.stderr)
    shutil.copy(TINY, work / "same.gguf")
    done = run("quantize", work / "same.gguf", work / "same.gguf", "--force")
    check("the source is not overwritten", done.returncode == 1 and "is the source itself" in done.stderr, done.stderr)
    check("not even by another name of it",
          "is the source itself" in run("quantize", work / "same.gguf", work / "." / "same.gguf", "--force").stderr)
    (work / "same.gguf").unlink()
    if os.geteuid() != 0:  # root may write everywhere
        (work / "locked").mkdir(mode=0o500)
        done = run("quantize", TINY, work / "locked" / "x.gguf")
        check("a folder that may not be written to is named",
              done.returncode == 1 and "choose a folder that you may write to" in done.stderr, done.stderr)
        (work / "locked").rmdir()
    check("nothing is left", not names(work), names(work))


with tempfile.TemporaryDirectory() as name:
    root = pathlib.Path(name)
    work = root / "out"
    work.mkdir()
    size = sparse_model(root / "model")
    memory(work, root / "model", size)
    disk_full(work)
    interrupted(work, root / "model")
    killed(work, root / "model")
    places(work)
    shrinking(work, root / "model")
finish()
