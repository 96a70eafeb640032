#!/usr/bin/env python3
"""Make the golden checkpoints of tests/golden/model with Hugging Face transformers as the oracle.

Each golden is a small random Qwen3-Next checkpoint, laid out as a release has it (config.json and safetensors), plus
expected.safetensors with what transformers' fp32 model computes from it:

    tokens      I32 [T]        the input
    logits      F32 [T, V]     one row per token
    hidden.{i}  F32 [T, H]     residual stream after decoder layer i
    hidden.final F32 [T, H]    after model.norm (the input of lm_head and of the MTP block)
    mtp_logits  F32 [T-1, V]   only with mtp.*: row t from hidden.final of token t and the embedding of token t+1

The MTP block is not in transformers; it is assembled here from transformers' own layers. The weights are rounded to the
stated dtype first, and the oracle runs on the rounded weights in fp32: it loads the files that are shipped (of FP8, the same
with its values written out). Tokens are drawn so that no router decision is nearly a tie, since a tie may fall either way without anybody being wrong.
check_against_transformers.py makes its random checkpoints with the functions of this file.

usage: tools/make_goldens.py [--out tests/golden/model] [NAME ...]     needs torch, transformers >= 5, safetensors
"""
import argparse
import copy
import json
import platform
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import transformers
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as hf

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
CONFIG_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
LINEAR, FULL = "linear_attention", "full_attention"
BLOCK = 128  # of FP8 scales


@dataclass
class Case:
    """One checkpoint: its shape (`config`, HF names) and how its files are written."""
    name: str
    config: dict                       # the fields of config.json that give the shape; see full_config
    layers: list                       # LINEAR or FULL per layer
    tokens: int = 64                   # T
    seed: int = 1
    dtype: str = "BF16"                # of the tensors that `dtypes` does not name
    dtypes: dict = field(default_factory=dict)   # part of a tensor name -> dtype
    interval: int = 0                  # write full_attention_interval instead of layer_types
    new_style: bool = False            # rope_parameters instead of top-level keys
    rope: dict = field(default_factory=dict)     # theta, partial, scaling (dict or None)
    fused: bool = False                # mlp.experts.gate_up_proj instead of one tensor per expert
    shards: int = 1
    mtp: bool = False
    fp8: str = ""                      # dtype of the scales: the projections as F8_E4M3 in blocks of 128 x 128
    about: str = ""


# ---- config.json -----------------------------------------------------------------------------------------------------


def full_config(case):
    """config.json as the release has it (old style, transformers 4.57) or as transformers 5 saves it (new style)."""
    c = {
        "architectures": ["Qwen3NextForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "bos_token_id": 1, "eos_token_id": 2, "decoder_sparse_step": 1, "hidden_act": "silu", "initializer_range": 0.02,
        "intermediate_size": 64, "max_position_embeddings": 4096, "mlp_only_layers": [], "model_type": "qwen3_next",
        "norm_topk_prob": True, "num_hidden_layers": len(case.layers), "output_router_logits": False,
        "rms_norm_eps": 1e-6, "router_aux_loss_coef": 0.001, "tie_word_embeddings": False, "use_cache": True,
    } | case.config
    if case.interval:
        c["full_attention_interval"] = case.interval
    else:
        c["layer_types"] = case.layers
    theta, partial, scaling = case.rope["theta"], case.rope["partial"], case.rope.get("scaling")
    if case.new_style:
        c["dtype"] = CONFIG_DTYPES[case.dtype]
        c["rope_parameters"] = {"partial_rotary_factor": partial, "rope_theta": theta, "rope_type": "default"}
        c["rope_parameters"] |= scaling or {}
        c["transformers_version"] = "5.0.0"
    else:
        c["torch_dtype"] = CONFIG_DTYPES[case.dtype]
        c |= {"rope_theta": theta, "partial_rotary_factor": partial, "rope_scaling": scaling}
        c["transformers_version"] = "4.57.0"
    if case.fp8:
        c["quantization_config"] = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                                    "weight_block_size": [BLOCK, BLOCK]}
    return dict(sorted(c.items()))


# ---- weights ---------------------------------------------------------------------------------------------------------


def random_tensors(case, c):
    """All tensors of the checkpoint in fp32, by their names in the release."""
    rng = torch.Generator().manual_seed(case.seed)
    tensors = {}
    hidden, width, shared = c["hidden_size"], c["moe_intermediate_size"], c["shared_expert_intermediate_size"]
    experts = c["num_experts"]

    def normal(*shape):
        return torch.randn(shape, generator=rng)

    def uniform(low, high, n):
        return low + (high - low) * torch.rand(n, generator=rng)

    def linear(name, rows, columns, gain=1.0):
        tensors[name + ".weight"] = normal(rows, columns) * gain / columns**0.5

    def norm(name, n):  # stored around zero
        tensors[name + ".weight"] = 0.25 * normal(n)

    def gated_delta_net(p):
        key_heads, value_heads = c["linear_num_key_heads"], c["linear_num_value_heads"]
        key, value = key_heads * c["linear_key_head_dim"], value_heads * c["linear_value_head_dim"]
        linear(p + "in_proj_qkvz", 2 * key + 2 * value, hidden, 1.2)
        linear(p + "in_proj_ba", 2 * value_heads, hidden, 1.5)
        kernel = c["linear_conv_kernel_dim"]
        tensors[p + "conv1d.weight"] = normal(2 * key + value, 1, kernel) * 1.5 / kernel**0.5
        tensors[p + "A_log"] = uniform(0.5, 16.0, value_heads).log()
        # softplus(dt_bias) spread over 0.002 .. 0.5: heads that remember hundreds of tokens beside some that forget
        dt = uniform(-6.2, -0.7, value_heads).exp()
        tensors[p + "dt_bias"] = dt + (-(-dt).expm1()).log()
        tensors[p + "norm.weight"] = 1 + 0.25 * normal(c["linear_value_head_dim"])  # plain: no 1+
        linear(p + "out_proj", hidden, value, 1.5)

    def attention(p):
        heads, kv_heads, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        linear(p + "q_proj", heads * 2 * dim, hidden, 1.2)
        linear(p + "k_proj", kv_heads * dim, hidden, 1.2)
        linear(p + "v_proj", kv_heads * dim, hidden, 1.2)
        linear(p + "o_proj", hidden, heads * dim, 1.8)
        norm(p + "q_norm", dim)
        norm(p + "k_norm", dim)

    def moe(p):
        linear(p + "gate", experts, hidden, 1.8)
        gate_up = normal(experts, 2 * width, hidden) * 1.4 / hidden**0.5
        down = normal(experts, hidden, width) * 1.4 / width**0.5
        if case.fused:
            tensors[p + "experts.gate_up_proj"], tensors[p + "experts.down_proj"] = gate_up, down
        else:
            for e in range(experts):
                tensors[f"{p}experts.{e}.gate_proj.weight"] = gate_up[e, :width].clone()
                tensors[f"{p}experts.{e}.up_proj.weight"] = gate_up[e, width:].clone()
                tensors[f"{p}experts.{e}.down_proj.weight"] = down[e].clone()
        linear(p + "shared_expert.gate_proj", shared, hidden, 1.4)
        linear(p + "shared_expert.up_proj", shared, hidden, 1.4)
        linear(p + "shared_expert.down_proj", hidden, shared, 1.4)
        linear(p + "shared_expert_gate", 1, hidden, 1.5)

    def decoder_layer(p, kind):
        norm(p + "input_layernorm", hidden)
        norm(p + "post_attention_layernorm", hidden)
        gated_delta_net(p + "linear_attn.") if kind == LINEAR else attention(p + "self_attn.")
        moe(p + "mlp.")

    logit_scale = 2.0 / hidden**0.5
    embedding_scale = logit_scale if c["tie_word_embeddings"] else 0.5
    tensors["model.embed_tokens.weight"] = normal(c["vocab_size"], hidden) * embedding_scale
    for i, kind in enumerate(case.layers):
        decoder_layer(f"model.layers.{i}.", kind)
    norm("model.norm", hidden)
    if not c["tie_word_embeddings"]:
        tensors["lm_head.weight"] = normal(c["vocab_size"], hidden) * logit_scale
    if case.mtp:
        linear("mtp.fc", hidden, 2 * hidden, 1.2)
        norm("mtp.pre_fc_norm_embedding", hidden)
        norm("mtp.pre_fc_norm_hidden", hidden)
        decoder_layer("mtp.layers.0.", FULL)
        norm("mtp.norm", hidden)
    return tensors


def is_fp8(name):
    """Whether the FP8 release quantises this tensor: projections, but the small ones and the heads."""
    exempt = ("in_proj_ba", "shared_expert_gate", "mtp.fc", "mlp.gate.", "embed_tokens", "lm_head")
    return ("proj" in name or "experts." in name) and not any(part in name for part in exempt)


def to_fp8(weight, scale_dtype):
    """[..., R, C] -> (F8_E4M3 codes, scales [..., ceil(R/128), ceil(C/128)], what they mean in fp32)"""
    rows, columns = weight.shape[-2:]
    padding = (0, -columns % BLOCK, 0, -rows % BLOCK)
    blocks = torch.nn.functional.pad(weight, padding).unflatten(-2, (-1, BLOCK)).unflatten(-1, (-1, BLOCK))
    scales = (blocks.abs().amax(dim=(-3, -1)) / 448).to(scale_dtype)

    def spread(s):
        return s.float().repeat_interleave(BLOCK, -2).repeat_interleave(BLOCK, -1)[..., :rows, :columns]

    codes = (weight / spread(scales)).clamp(-448, 448).to(torch.float8_e4m3fn)
    return codes, scales, codes.float() * spread(scales)


def stored_tensors(case, c, meant=False):
    """The tensors as the files have them; or, if `meant`, FP8 ones as the fp32 values that they stand for."""
    tensors = {}
    for name, tensor in random_tensors(case, c).items():
        if case.fp8 and is_fp8(name):
            codes, scales, value = to_fp8(tensor, DTYPES[case.fp8])
            tensors[name] = value if meant else codes
            if not meant:
                tensors[name + "_scale_inv"] = scales
            continue
        dtype = next((d for part, d in case.dtypes.items() if part in name), case.dtype)
        tensors[name] = tensor.to(DTYPES[dtype]).contiguous()
    return tensors


def write_checkpoint(case, folder, meant=False):
    """Write config.json and model.safetensors (or shards with their index)."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    c = full_config(case)
    tensors = stored_tensors(case, c, meant)
    if meant:
        c.pop("quantization_config", None)
    (folder / "config.json").write_text(json.dumps(c, indent=2) + "\n")
    if case.shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names, weight_map = list(tensors), {}
    for s in range(case.shards):
        file = f"model-{s + 1:05d}-of-{case.shards:05d}.safetensors"
        part = names[len(names) * s // case.shards : len(names) * (s + 1) // case.shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


# ---- the oracle ------------------------------------------------------------------------------------------------------


class Mtp(torch.nn.Module):
    """The multi-token-prediction block, of transformers' own layers."""

    def __init__(self, config):
        super().__init__()
        config = copy.deepcopy(config)
        config.num_hidden_layers, config.layer_types = 1, [FULL]
        size, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding = hf.Qwen3NextRMSNorm(size, eps)
        self.pre_fc_norm_hidden = hf.Qwen3NextRMSNorm(size, eps)
        self.fc = torch.nn.Linear(2 * size, size, bias=False)
        self.layers = torch.nn.ModuleList([hf.Qwen3NextDecoderLayer(config, 0)])
        self.norm = hf.Qwen3NextRMSNorm(size, eps)
        self.rotary = hf.Qwen3NextRotaryEmbedding(config)

    def load(self, folder):
        """Load mtp.* from the checkpoint, upcast to fp32, experts fused as transformers wants them."""
        state = {}
        for file in sorted(Path(folder).glob("model*.safetensors")):
            with safe_open(file, "pt") as f:
                state |= {n[4:]: f.get_tensor(n).float() for n in f.keys() if n.startswith("mtp.")}
        p, mlp = "layers.0.mlp.experts.", self.layers[0].mlp
        if p + "gate_up_proj" not in state:
            def stack(kind):
                return torch.stack([state.pop(f"{p}{e}.{kind}_proj.weight") for e in range(mlp.gate.num_experts)])
            state[p + "gate_up_proj"] = torch.cat([stack("gate"), stack("up")], dim=1)
            state[p + "down_proj"] = stack("down")
        self.load_state_dict(state, strict=True)
        return self

    def forward(self, embeddings, hidden):
        """embeddings of tokens 1..T-1, hidden (after model.norm) of tokens 0..T-2, both [1, T-1, H]"""
        n = hidden.shape[1]
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embeddings), self.pre_fc_norm_hidden(hidden)], dim=-1))
        mask = torch.full((n, n), float("-inf")).triu(1)[None, None]
        x = self.layers[0](x, position_embeddings=self.rotary(x, torch.arange(n)[None]), attention_mask=mask)
        return self.norm(x)


class Oracle:
    """transformers' fp32 model (and MTP block) of a checkpoint folder."""

    def __init__(self, folder, mtp):
        self.model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
            output_loading_info=True)
        wrong = {k: v for k, v in report.items() if v and k != "unexpected_keys"}
        wrong |= {"unexpected_keys": u} if (u := [k for k in report["unexpected_keys"] if "mtp" not in k]) else {}
        assert not wrong, f"{folder}: transformers does not take these files as they are: {wrong}"
        self.model.eval()
        self.mtp = Mtp(self.model.config).load(folder).eval() if mtp else None
        assert {p.dtype for p in self.model.parameters()} == {torch.float32}
        self.routers = [layer.mlp.gate for layer in self.model.model.layers]

    @torch.no_grad()
    def __call__(self, tokens):
        """-> (expected tensors, min over routers of (probability gap, logit gap) at each position [T, 2])"""
        expected = {"tokens": torch.tensor(tokens, dtype=torch.int32)}
        gaps = torch.full((len(tokens), 2), float("inf"))

        def note_gap(first):  # `first` is the position of the row whose token the router of row 0 has just seen
            def hook(router, _, output):
                if router.top_k == router.num_experts:
                    return
                logits = output[0].double()
                top = logits.topk(router.top_k + 1).values[:, -2:]
                probabilities = (top - logits.logsumexp(-1, keepdim=True)).exp()
                gap = torch.stack([probabilities[:, 0] - probabilities[:, 1], top[:, 0] - top[:, 1]], dim=-1).float()
                gaps[first:] = torch.minimum(gaps[first:], gap)
            return hook

        hooks = [r.register_forward_hook(note_gap(0)) for r in self.routers]
        for i, layer in enumerate(self.model.model.layers):
            hooks.append(layer.register_forward_hook(lambda _, __, x, i=i: expected.update({f"hidden.{i}": x[0]})))
        ids = torch.tensor([tokens])
        hidden = self.model.model(input_ids=ids, use_cache=False).last_hidden_state
        expected["hidden.final"] = hidden[0]
        expected["logits"] = self.model.lm_head(hidden)[0]
        if self.mtp and len(tokens) > 1:
            hooks.append(self.mtp.layers[0].mlp.gate.register_forward_hook(note_gap(1)))
            h = self.mtp(self.model.model.embed_tokens(ids[:, 1:]), hidden[:, :-1])
            expected["mtp_logits"] = self.model.lm_head(h)[0]
        for hook in hooks:
            hook.remove()
        return {n: t.contiguous().clone() for n, t in expected.items()}, gaps


def run_oracle(case, folder, gap=1e-4, logit_gap=0.02, tries=2000):
    """Draw tokens and compute what is expected of them -> (expected tensors, smallest gaps).

    Where the k-th and the next router probability (and their logits) are closer than the bounds, the token of that
    position is drawn again; earlier rows do not change then, so this comes to an end.
    """
    if case.fp8:  # transformers would need a GPU: it gets the values that the codes and scales stand for
        with tempfile.TemporaryDirectory() as meant:
            write_checkpoint(case, meant, meant=True)
            oracle = Oracle(meant, case.mtp)
    else:
        oracle = Oracle(folder, case.mtp)
    rng = torch.Generator().manual_seed(case.seed + 1_000_003)
    vocab = oracle.model.config.vocab_size
    tokens = torch.randint(vocab, (case.tokens,), generator=rng)
    for _ in range(tries):
        expected, gaps = oracle(tokens.tolist())
        close = ((gaps[:, 0] < gap) | (gaps[:, 1] < logit_gap)).nonzero().flatten()
        if not len(close):
            return expected, gaps.min(dim=0).values.tolist()
        tokens[close] = torch.randint(vocab, (len(close),), generator=rng)
    raise RuntimeError(f"{case.name}: still a router tie after {tries} draws; take another seed")


# ---- the goldens -----------------------------------------------------------------------------------------------------


def interval_layers(n, interval):
    return [LINEAR if (i + 1) % interval else FULL for i in range(n)]


def shape(hidden, vocab, attention, gdn, moe, **more):
    """attention = (heads, kv heads, dim); gdn = (key heads, value heads, key dim, value dim, conv kernel);
    moe = (experts, top-k, width, shared width)"""
    names = ["num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
             "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim", "linear_conv_kernel_dim",
             "num_experts", "num_experts_per_tok", "moe_intermediate_size", "shared_expert_intermediate_size"]
    return {"hidden_size": hidden, "vocab_size": vocab} | dict(zip(names, [*attention, *gdn, *moe])) | more


GOLDENS = [
    Case("release", shape(48, 200, (4, 2, 32), (2, 4, 16, 16, 4), (8, 2, 16, 16)), interval_layers(4, 4),
         tokens=150, seed=11, interval=4, rope={"theta": 10000000, "partial": 0.25}, mtp=True,
         about="the release in miniature: bf16, an expert a tensor, old-style config, MTP; T crosses two chunks"),
    Case("fused", shape(40, 200, (2, 1, 48), (2, 8, 8, 12, 3), (5, 2, 12, 20), norm_topk_prob=False,
                        tie_word_embeddings=True), [FULL, FULL, LINEAR, LINEAR],
         tokens=65, seed=12, dtype="F32", new_style=True, rope={"theta": 1000000.0, "partial": 0.5}, fused=True,
         about="f32, fused experts, new-style config, irregular layer_types, tied, no top-k norm, Hv = 4 Hk, Dk != Dv, "
               "conv 3"),
    Case("sharded", shape(72, 230, (6, 3, 20), (3, 3, 16, 10, 5), (7, 3, 18, 30)), interval_layers(3, 3),
         tokens=64, seed=13, dtype="F16", interval=3, rope={"theta": 10000, "partial": 0.5}, shards=3,
         about="f16 in three shards, 6 Q and 3 KV heads, Hv = Hk, 7 experts top 3, conv 5, hidden 72, T one whole chunk"),
    Case("yarn", shape(32, 160, (4, 1, 32), (1, 2, 16, 16, 4), (6, 2, 16, 16), max_position_embeddings=256),
         interval_layers(2, 2), tokens=100, seed=14, interval=2, mtp=True,
         rope={"theta": 10000, "partial": 0.5, "scaling": {"rope_type": "yarn", "factor": 4.0,
                                                           "original_max_position_embeddings": 64}},
         about="bf16, YaRN factor 4 over 64 positions (T = 100), MTP"),
    Case("fp8", shape(136, 150, (2, 1, 80), (2, 4, 20, 24, 4), (4, 2, 12, 132)), interval_layers(2, 2),
         tokens=40, seed=15, interval=2, rope={"theta": 10000000, "partial": 0.25}, mtp=True, fp8="BF16",
         about="F8_E4M3 with bf16 scales for 128 x 128 values, which cut through heads; hidden 136, MTP"),
]

README = """# Golden checkpoints

Small random Qwen3-Next checkpoints and what Hugging Face transformers computes from them in fp32. Made by
`tools/make_goldens.py` (its first comment lists the tensors of `expected.safetensors`); do not edit by hand.

Made with transformers {transformers}, torch {torch}, Python {python}. A second run on the same machine gives the same files
bit for bit; another one may differ in the last bits of the expected values. The MTP block is assembled from transformers'
own layers. "Gap" is the smallest distance of the k-th and the next router probability and, after the slash, of their logits.

| folder | seed | T | gap | logit std | what |
|---|---|---|---|---|---|
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    root = Path(__file__).resolve().parent.parent
    parser.add_argument("--out", type=Path, default=root / "tests/golden/model")
    parser.add_argument("names", nargs="*", metavar="NAME", help="only these (README.md is then left alone)")
    args = parser.parse_args()
    if unknown := set(args.names) - {case.name for case in GOLDENS}:
        parser.error(f"no golden {', '.join(unknown)}; there are {', '.join(c.name for c in GOLDENS)}")
    quiet()
    readme = README.format(transformers=transformers.__version__, torch=torch.__version__,
                           python=platform.python_version())
    for case in GOLDENS:
        if args.names and case.name not in args.names:
            continue
        folder = args.out / case.name
        shutil.rmtree(folder, ignore_errors=True)
        write_checkpoint(case, folder)
        expected, gap = run_oracle(case, folder)
        save_file(expected, folder / "expected.safetensors")
        for file in folder.iterdir():
            file.chmod(0o644)  # safetensors makes them private
        size = sum(f.stat().st_size for f in folder.iterdir())
        row = (f"| {case.name} | {case.seed} | {case.tokens} | {gap[0]:.1e} / {gap[1]:.1e} | "
               f"{expected['logits'].std():.2f} | {case.about} |")
        print(row, f"{size / 1024:.0f} KiB", flush=True)
        readme += row + "\n"
    if not args.names:
        (args.out / "README.md").write_text(readme)


def quiet():
    """One thread (the order of sums is part of the result) and no progress bars."""
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
