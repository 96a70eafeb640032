"""GGUF and safetensors files as lists of parts that can be changed one by one and put together again, damage and all."""

import json
import random
import struct
from dataclasses import dataclass, field

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "B", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9


@dataclass
class Tensor:
    name: bytes
    ne: list
    type: int
    offset: int


@dataclass
class Gguf:
    """keys: [name, type, value]; the value is a number, bytes, or [element type, count, values]
    (and what it claims the element type to be, if that is another)."""
    version: int = 3
    keys: list = field(default_factory=list)
    tensors: list = field(default_factory=list)
    data: bytearray = field(default_factory=bytearray)
    tensor_count: int | None = None  # what the header claims; None: the truth
    key_count: int | None = None

    def key(self, name):
        return next((k for k in self.keys if k[0] == name.encode()), None)

    @staticmethod
    def parse(raw):
        at = 4

        def take(code):
            nonlocal at
            value = struct.unpack_from("<" + code, raw, at)[0]
            at += struct.calcsize("<" + code)
            return value

        def text():
            nonlocal at
            size = take("Q")
            at += size
            return bytes(raw[at - size:at])

        def value(kind):
            if kind == STRING:
                return text()
            if kind == ARRAY:
                element, count = take("I"), take("Q")
                return [element, count, [value(element) for _ in range(count)]]
            return take(SCALARS[kind])

        g = Gguf(version=take("I"))
        tensors, keys = take("Q"), take("Q")
        for _ in range(keys):
            name, kind = text(), take("I")
            g.keys.append([name, kind, value(kind)])
        for _ in range(tensors):
            name = text()
            ne = [take("Q") for _ in range(take("I"))]
            g.tensors.append(Tensor(name, ne, take("I"), take("Q")))
        g.data = bytearray(raw[(at + 31) // 32 * 32:])
        return g

    def header(self):
        def text(b):
            return struct.pack("<Q", len(b)) + b

        def value(kind, v):
            if kind == STRING:
                return text(v)
            if kind == ARRAY:
                return struct.pack("<IQ", v[-1] if len(v) > 3 else v[0], v[1]) + b"".join(value(v[0], x) for x in v[2])
            code = SCALARS.get(kind, "I")
            if code in "fd":
                return struct.pack("<" + code, v)
            size = struct.calcsize("<" + code)
            return (int(v) % (1 << 8 * size)).to_bytes(size, "little")

        u64 = (1 << 64) - 1
        out = [b"GGUF", struct.pack("<I", self.version),
               struct.pack("<Q", len(self.tensors) if self.tensor_count is None else self.tensor_count),
               struct.pack("<Q", len(self.keys) if self.key_count is None else self.key_count)]
        for name, kind, v in self.keys:
            out += [text(name), struct.pack("<I", kind), value(kind, v)]
        for t in self.tensors:
            out += [text(t.name), struct.pack("<I", len(t.ne))] + [struct.pack("<Q", n & u64) for n in t.ne]
            out.append(struct.pack("<IQ", t.type, t.offset & u64))
        return b"".join(out)

    def pack(self):
        header = self.header()
        return header + bytes(-len(header) % 32) + bytes(self.data)

    def split(self, count):
        """The same model in `count` files, as llama-gguf-split makes them."""
        parts = []
        ends = sorted(t.offset for t in self.tensors)[1:] + [len(self.data)]
        order = sorted(self.tensors, key=lambda t: t.offset)
        for i in range(count):
            first, last = len(order) * i // count, len(order) * (i + 1) // count
            part = Gguf(keys=[k for k in self.keys if k[0] != b"general.padding"] if i == 0 else [])
            part.keys = part.keys + [[b"split.no", 2, i], [b"split.count", 2, count],
                                     [b"split.tensors.count", 5, len(order)]]
            for t, end in list(zip(order, ends))[first:last]:
                part.tensors.append(Tensor(t.name, t.ne, t.type, len(part.data)))
                part.data += self.data[t.offset:end]
                part.data += bytes(-len(part.data) % 32)
            parts.append(part)
        return parts


@dataclass
class Safetensors:
    header: dict
    data: bytearray
    text: bytes | None = None    # the header's text; None: of `header`
    length: int | None = None    # what the file claims of it

    @staticmethod
    def parse(raw):
        size = struct.unpack_from("<Q", raw)[0]
        return Safetensors(json.loads(raw[8:8 + size]), bytearray(raw[8 + size:]))

    def pack(self):
        text = json.dumps(self.header).encode() if self.text is None else self.text
        length = len(text) if self.length is None else self.length
        return struct.pack("<Q", length) + text + bytes(self.data)


MINIATURE = {
    "architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next", "hidden_act": "silu",
    "vocab_size": 384, "hidden_size": 256, "num_hidden_layers": 2, "full_attention_interval": 2,
    "rms_norm_eps": 1e-6, "max_position_embeddings": 4096, "tie_word_embeddings": False,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 64, "rope_theta": 1e6, "partial_rotary_factor": 0.5,
    "linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 32, "linear_value_head_dim": 32,
    "linear_conv_kernel_dim": 4, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256, "norm_topk_prob": True, "eos_token_id": 379,
}


FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}


def miniature(seed=1, fp8=False):
    """A checkpoint whose rows are whole blocks of every quantised type: random BF16 weights of |w| < 1/8, or the
    projections as F8_E4M3 with a scale for every 128 x 128 values, as in the FP8 release."""
    c, rng = MINIATURE, random.Random(seed)
    H, I, V, K = c["hidden_size"], c["moe_intermediate_size"], c["vocab_size"], c["linear_conv_kernel_dim"]
    D, heads = c["head_dim"], c["num_attention_heads"]
    key, value, Hv = 32, 64, c["linear_num_value_heads"]
    shapes = {"model.embed_tokens.weight": [V, H], "model.norm.weight": [H], "lm_head.weight": [V, H],
              "mtp.fc.weight": [H, 2 * H], "mtp.norm.weight": [H], "mtp.pre_fc_norm_embedding.weight": [H],
              "mtp.pre_fc_norm_hidden.weight": [H]}
    for prefix, full in (("model.layers.0.", False), ("model.layers.1.", True), ("mtp.layers.0.", True)):
        layer = {"input_layernorm.weight": [H], "post_attention_layernorm.weight": [H],
                 "mlp.gate.weight": [c["num_experts"], H], "mlp.shared_expert_gate.weight": [1, H]}
        if full:
            layer |= {"self_attn.q_proj.weight": [2 * heads * D, H], "self_attn.k_proj.weight": [D, H],
                      "self_attn.v_proj.weight": [D, H], "self_attn.o_proj.weight": [H, heads * D],
                      "self_attn.q_norm.weight": [D], "self_attn.k_norm.weight": [D]}
        else:
            layer |= {"linear_attn.in_proj_qkvz.weight": [2 * key + 2 * value, H],
                      "linear_attn.in_proj_ba.weight": [2 * Hv, H], "linear_attn.conv1d.weight": [2 * key + value, 1, K],
                      "linear_attn.A_log": [Hv], "linear_attn.dt_bias": [Hv], "linear_attn.norm.weight": [32],
                      "linear_attn.out_proj.weight": [H, value]}
        for expert in [f"experts.{e}." for e in range(c["num_experts"])] + ["shared_expert."]:
            layer |= {f"mlp.{expert}gate_proj.weight": [I, H], f"mlp.{expert}up_proj.weight": [I, H],
                      f"mlp.{expert}down_proj.weight": [H, I]}
        shapes |= {prefix + name: shape for name, shape in layer.items()}
    high = bytes((0x3C, 0x3D, 0xBC, 0xBD)[i % 4] for i in range(256))  # signs and exponents
    header, data = {}, bytearray()

    def add(name, dtype, shape, values):
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(data), len(data) + len(values)]}
        data.extend(values)

    for name, shape in shapes.items():
        n = 1
        for d in shape:
            n *= d
        if fp8 and name.endswith(("_proj.weight", "qkvz.weight")):
            grid = [-(-d // 128) for d in shape]
            add(name, "F8_E4M3", shape, bytes(b & 0xBF for b in rng.randbytes(n)))  # |w| < 2, times 1/32
            add(name + "_scale_inv", "BF16", grid, b"\x00\x3d" * (grid[0] * grid[1]))
            continue
        values = bytearray(2 * n)
        values[0::2], values[1::2] = rng.randbytes(n), rng.randbytes(n).translate(high)
        add(name, "BF16", shape, values)
    return Safetensors(header, data)


def tokenizer_json(source, size):
    """The golden tokenizer's settings around a vocabulary of `size` ids: every byte (if there is room, else ASCII), a few
    merges, Qwen's control tokens at the end."""
    with open(source, encoding="utf-8") as file:
        tokenizer = json.load(file)
    printable = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174]
    spelling = {b: chr(b) for b in printable}
    spelling |= {b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in spelling)}
    tokens = [spelling[b] for b in (range(256) if size >= 300 else [10, 32, *range(33, 127)])]
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("t", "h"), ("th", "e"), (spelling[32], "the")]
    tokens += ["".join(pair) for pair in merges]
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</tool_call>", "<think>", "</think>"]
    tokenizer["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    tokenizer["model"]["merges"] = [" ".join(pair) for pair in merges]
    tokenizer["added_tokens"] = [
        {"id": size - 10 + i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False, "special": text.startswith("<|")} for i, text in enumerate(control)]
    return json.dumps(tokenizer, ensure_ascii=False)
