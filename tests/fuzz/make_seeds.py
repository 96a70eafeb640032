#!/usr/bin/env python3
"""Writes seeds for the fuzz targets, a folder for each: make_seeds.py SOURCE OUT.  Small and valid, so that a fuzzer
starts behind the first checks."""

import json
import random
import struct
import sys
from pathlib import Path

source, out = Path(sys.argv[1]), Path(sys.argv[2])
sys.path.insert(0, str(source / "tests/hostile"))
from containers import ARRAY, STRING, Gguf, Safetensors, Tensor, tokenizer_json  # noqa: E402

U32, F32, BOOL = 4, 6, 7
rng = random.Random(1)


def seed(target, name, content):
    folder = out / target
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


# The smallest model of both layer types: 2 layers, 2 experts, width 4, vocabulary 120.
H, V, I, D, DK = 4, 120, 4, 4, 4
CONFIG = {
    "model_type": "qwen3_next", "hidden_act": "silu", "vocab_size": V, "hidden_size": H, "num_hidden_layers": 2,
    "layer_types": ["linear_attention", "full_attention"], "rms_norm_eps": 1e-6, "max_position_embeddings": 64,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": D, "rope_theta": 1e6, "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": DK, "linear_value_head_dim": DK,
    "linear_conv_kernel_dim": 2, "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": I,
    "shared_expert_intermediate_size": I,
}

HF_LAYER = {"input_layernorm.weight": [H], "post_attention_layernorm.weight": [H], "mlp.gate.weight": [2, H],
            "mlp.shared_expert_gate.weight": [1, H]}
for expert in ("experts.0", "experts.1", "shared_expert"):
    HF_LAYER |= {f"mlp.{expert}.gate_proj.weight": [I, H], f"mlp.{expert}.up_proj.weight": [I, H],
                 f"mlp.{expert}.down_proj.weight": [H, I]}
HF_ATTENTION = {"q_proj.weight": [4 * D, H], "k_proj.weight": [D, H], "v_proj.weight": [D, H], "o_proj.weight": [H, 2 * D],
                "q_norm.weight": [D], "k_norm.weight": [D]}
HF_DELTA = {"in_proj_qkvz.weight": [6 * DK, H], "in_proj_ba.weight": [4, H], "conv1d.weight": [4 * DK, 1, 2], "A_log": [2],
            "dt_bias": [2], "norm.weight": [DK], "out_proj.weight": [H, 2 * DK]}


def hf_shapes():
    shapes = {"model.embed_tokens.weight": [V, H], "model.norm.weight": [H], "lm_head.weight": [V, H]}
    for i, (prefix, mixer) in enumerate((("linear_attn.", HF_DELTA), ("self_attn.", HF_ATTENTION))):
        for name, shape in (HF_LAYER | {prefix + name: shape for name, shape in mixer.items()}).items():
            shapes[f"model.layers.{i}.{name}"] = shape
    return shapes


GGUF_LAYER = {"attn_norm.weight": [H], "post_attention_norm.weight": [H], "ffn_gate_inp.weight": [2, H],
              "ffn_gate_exps.weight": [2, I, H], "ffn_up_exps.weight": [2, I, H], "ffn_down_exps.weight": [2, H, I],
              "ffn_gate_shexp.weight": [I, H], "ffn_up_shexp.weight": [I, H], "ffn_down_shexp.weight": [H, I],
              "ffn_gate_inp_shexp.weight": [H]}
GGUF_ATTENTION = {"attn_q.weight": [4 * D, H], "attn_k.weight": [D, H], "attn_v.weight": [D, H],
                  "attn_output.weight": [H, 2 * D], "attn_q_norm.weight": [D], "attn_k_norm.weight": [D]}
GGUF_DELTA = {"attn_qkv.weight": [4 * DK, H], "attn_gate.weight": [2 * DK, H], "ssm_ba.weight": [4, H],
              "ssm_conv1d.weight": [4 * DK, 2], "ssm_a": [2], "ssm_dt.bias": [2], "ssm_norm.weight": [DK],
              "ssm_out.weight": [H, 2 * DK]}


def gguf_shapes():
    shapes = {"token_embd.weight": [V, H], "output_norm.weight": [H]}
    for i, mixer in enumerate((GGUF_DELTA, GGUF_ATTENTION)):
        shapes |= {f"blk.{i}.{name}": shape for name, shape in (GGUF_LAYER | mixer).items()}
    return shapes


def size(shape):
    n = 1
    for d in shape:
        n *= d
    return n


def safetensors(shapes, dtype="BF16"):
    st = Safetensors({}, bytearray())
    for name, shape in shapes.items():
        values = b"".join(rng.choice([b"\x80\x3d", b"\x80\xbd"]) for _ in range(size(shape)))
        st.header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(st.data), len(st.data) + len(values)]}
        st.data += values
    return st


def gguf(version=3):
    tokenizer = json.loads(tokenizer_json(source / "tests/golden/text/tokenizer.json", V))
    tokens = {i: t for t, i in tokenizer["model"]["vocab"].items()} | {
        t["id"]: t["content"] for t in tokenizer["added_tokens"]}
    types = [1 if i < len(tokenizer["model"]["vocab"]) else 3 if i in tokens else 5 for i in range(V)]
    name = "qwen3next."
    numbers = {"block_count": 2, "context_length": 64, "embedding_length": H, "attention.head_count": 2,
               "attention.head_count_kv": 1, "attention.key_length": D, "attention.value_length": D,
               "rope.dimension_count": 2, "expert_count": 2, "expert_used_count": 1, "expert_feed_forward_length": I,
               "expert_shared_feed_forward_length": I, "ssm.conv_kernel": 2, "ssm.state_size": DK, "ssm.group_count": 1,
               "ssm.time_step_rank": 2, "ssm.inner_size": 2 * DK, "full_attention_interval": 2}
    g = Gguf(version=version, keys=[[b"general.architecture", STRING, b"qwen3next"]])
    g.keys += [[(name + key).encode(), U32, value] for key, value in numbers.items()]
    g.keys += [[(name + "attention.layer_norm_rms_epsilon").encode(), F32, 1e-6], [(name + "rope.freq_base").encode(), F32, 1e6]]
    if version == 2:
        g.keys += [[b"qwen3next.rope.scaling.type", STRING, b"yarn"], [b"qwen3next.rope.scaling.factor", F32, 4.0],
                   [b"qwen3next.attention.recurrent_layers", ARRAY, [BOOL, 2, [1, 0]]]]
    text = [tokens.get(i, f"[PAD{i}]").encode() for i in range(V)]
    merges = [m.encode() for m in tokenizer["model"]["merges"]]
    g.keys += [[b"tokenizer.ggml.model", STRING, b"gpt2"], [b"tokenizer.ggml.pre", STRING, b"qwen2"],
               [b"tokenizer.ggml.tokens", ARRAY, [STRING, V, text]],
               [b"tokenizer.ggml.token_type", ARRAY, [5, V, types]],
               [b"tokenizer.ggml.merges", ARRAY, [STRING, len(merges), merges]],
               [b"tokenizer.ggml.eos_token_id", U32, V - 8], [b"general.sampling.top_k", 5, 20],
               [b"tokenizer.chat_template", STRING, b"{% if messages %}{{- messages[0] -}}{% endif %}"]]
    for tensor, shape in gguf_shapes().items():
        f32 = len(shape) == 1 or "conv1d" in tensor
        values = (b"\x00\x00\x80\x3d" if f32 else b"\x00\x2c") * size(shape)
        g.tensors.append(Tensor(tensor.encode(), shape[::-1], 0 if f32 else 1, len(g.data)))
        g.data += values + bytes(-len(values) % 32)
    return g


def main():
    config = json.dumps(CONFIG)
    model = safetensors(hf_shapes()).pack()
    seed("safetensors", "model", model)
    seed("safetensors", "two", safetensors({"a": [2, 3], "b": [4]}).pack())
    seed("shard_index", "index", json.dumps({"metadata": {"total_size": 8}, "weight_map": {"a": "x.safetensors", "b": "y"}}))
    seed("hf_folder", "model", struct.pack("<H", len(config)) + config.encode() + model)
    seed("gguf", "v3", gguf().pack())
    seed("gguf", "v2", gguf(2).pack())
    seed("gguf", "split", gguf().split(2)[0].pack())

    seed("hf_config", "mini", config)
    for path in sorted((source / "tests/golden/model").glob("*/config.json")):
        seed("hf_config", path.parent.name, path.read_bytes())
    yarn = CONFIG | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 32, "mscale": 1.0}}
    seed("hf_config", "yarn", json.dumps(yarn))

    profile = {"format": "qwen3next expert profile", "version": 1, "model": "m", "experts": 3, "tokens": [9, 7],
               "counts": [[1, 9, 0], [2, 3, 4]]}
    seed("expert_profile", "two_layers", json.dumps(profile))
    seed("state_file", "whole", struct.pack("<BH", 1, 0))
    seed("state_file", "tokens", struct.pack("<BHIQ", 1, 0, 64, 3 << 32 | 9))
    seed("state_file", "positions", struct.pack("<BHIQIQ", 1, 0, 64 + 28, 6, 64 + 36, 9))
    seed("state_file", "body", struct.pack("<BHIQ", 0, 0, 9000, 1))
    seed("state_file", "short", struct.pack("<BH", 0, 100))
    seed("tokenizer_json", "ascii", tokenizer_json(source / "tests/golden/text/tokenizer.json", V))
    seed("tokenizer_json", "bytes", tokenizer_json(source / "tests/golden/text/tokenizer.json", 384))
    seed("encode", "words", "it's 12 o'clock,  \r\n\tthe <|im_end|> \u0130\u0301\u00e9\u00e9 aaaaaaaa <tool_call>")
    seed("encode", "marks", "e" + "\u0301\u0327" * 40 + "\uac00\u11a8" + "a" * 100)

    for i, case in enumerate(json.loads((source / "tests/golden/text/conversations.json").read_text())):
        messages = {"messages": case["messages"], "tools": case["tools"]}
        seed("messages", f"{i}", json.dumps(messages, ensure_ascii=False))
        seed("session", f"{i}", json.dumps({"version": 1, "messages": case["messages"]}, ensure_ascii=False))
        seed("answer", f"{i}", struct.pack("<H", i * 7919 % 65536) + (case["thinking"] or "").encode())
    seed("template_text", "tiny", (source / "weights/tiny/chat_template.jinja").read_bytes())
    seed("template_text", "signs", "{%- if a -%} x {{+ 'a\\'{%' }}\r\n{# c -#}\n  {%+ raw %}")

    seed("answer", "json", b"\1\0<think>\nhm\n</think>\n\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"s\": \"<\\\"\"}}\n</tool_call>x")
    seed("answer", "function", b"\2\0a\n<tool_call>\n<function=f>\n<parameter=i>\n12\n</parameter>\n<parameter=o>\n{\"a\": [1]}\n"
                               b"</parameter>\n</function>\n</tool_call>\n<function=f>\n</function>")
    seed("stop_strings", "abc", b"\1\2\3\2aba##abcabababa#")
    seed("utf8", "text", "\u00e9\u20ac\U0001f600".encode() + b"\xc3\xe2\x82\xff\xed\xa0\x80")
    seed("blocks", "random", rng.randbytes(2 * 292))
    seed("blocks", "small", bytes(292) + b"\x00\x2c" * 200)
    seed("sampler", "instruct", struct.pack("<6fiQ8f", 0.7, 0.8, 0.1, 1, 0.5, 1.1, 3, 7, *range(8)))
    seed("sampler", "greedy", struct.pack("<6fiQ4f", 0, 1, 0, -2, 2, 10, 0, 7, -1e38, 3e38, 0, 1e-40))
    seed("options", "list", "[1, 2,3\n4]")
    seed("options", "regex", r"^blk\.(\d+|[a-f]{2,3})\..*(exps|shexp)?$")


main()
