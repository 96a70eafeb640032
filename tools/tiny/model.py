"""The miniature model: transformers' own Qwen3-Next modules, an MTP head made of them, the optimiser and the export."""
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch import nn
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next import modeling_qwen3_next as hf

from .data import ADDED, VOCAB

EOT_ID = VOCAB - len(ADDED)
SHAPE = dict(
    vocab_size=VOCAB, hidden_size=256, num_hidden_layers=8, full_attention_interval=4, num_attention_heads=4,
    num_key_value_heads=2, head_dim=64, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=64,
    linear_value_head_dim=64, linear_conv_kernel_dim=4, num_experts=32, num_experts_per_tok=4, moe_intermediate_size=256,
    shared_expert_intermediate_size=256, intermediate_size=256, norm_topk_prob=True, tie_word_embeddings=True,
    max_position_embeddings=4096, rms_norm_eps=1e-6, hidden_act="silu", decoder_sparse_step=1, initializer_range=0.02,
    bos_token_id=None, eos_token_id=EOT_ID + 2, pad_token_id=EOT_ID)
ROPE = dict(rope_theta=100000.0, partial_rotary_factor=0.25)


def make_config(**changes):
    c = Qwen3NextConfig(**{**SHAPE, **changes}, rope_parameters={"rope_type": "default", **ROPE})
    c._attn_implementation = "sdpa"
    c._experts_implementation = "grouped_mm"
    return c


# -- the delta rule, chunked (section "Chunked form" of the paper; fp32) ------------------------------------------------

class UnitLowerInverse(torch.autograd.Function):
    """(I + A)^-1 for strictly lower A, by doubling the size of the diagonal blocks that are already inverted."""

    @staticmethod
    def forward(ctx, A):
        n = A.shape[-1]
        i = torch.arange(n, device=A.device)
        T = torch.eye(n, device=A.device, dtype=A.dtype).expand_as(A)
        b = 1
        while b < n:
            below = (i[:, None] // (2 * b) == i[None] // (2 * b)) & (i[:, None] // b > i[None] // b)
            T = T - (A * below if b == 1 else T @ (A * below) @ T)
            b *= 2
        ctx.save_for_backward(T)
        return T

    @staticmethod
    def backward(ctx, dT):
        (T,) = ctx.saved_tensors
        Tt = T.transpose(-1, -2)
        return -(Tt @ dT @ Tt).tril(-1)


def chunk_gated_delta_rule(query, key, value, g, beta, chunk_size=64, initial_state=None, output_final_state=False,
                           use_qk_l2norm_in_kernel=False, **kwargs):
    """Same arguments and result as transformers' torch_chunk_gated_delta_rule, with far fewer kernel launches."""
    B, L, Hk, K = key.shape
    Hv, V = value.shape[-2:]
    dtype, C, pad = query.dtype, chunk_size, -L % chunk_size
    q, k, v, beta, g = (x.transpose(1, 2).float() for x in (query, key, value, beta, g))
    if use_qk_l2norm_in_kernel:
        q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    q = q * K ** -0.5
    if q.shape[1] != Hv:
        q, k = (x.repeat_interleave(Hv // x.shape[1], dim=1) for x in (q, k))
    if pad:
        q, k, v = (F.pad(x, (0, 0, 0, pad)) for x in (q, k, v))
        beta, g = (F.pad(x, (0, pad)) for x in (beta, g))
    q, k, v = (x.reshape(B, Hv, -1, C, x.shape[-1]) for x in (q, k, v))
    beta, G = beta.reshape(B, Hv, -1, C, 1), g.reshape(B, Hv, -1, C).cumsum(-1)
    causal = torch.ones(C, C, dtype=torch.bool, device=q.device).tril()
    D = (G[..., :, None] - G[..., None, :]).masked_fill(~causal, float("-inf")).exp()
    T = UnitLowerInverse.apply(((k * beta) @ k.transpose(-1, -2) * D).tril(-1))
    U, W = T @ (v * beta), T @ (k * beta * G.exp()[..., None])
    inside = q @ k.transpose(-1, -2) * D
    q_out, k_out, decay = q * G.exp()[..., None], k * (G[..., -1:] - G).exp()[..., None], G[..., -1].exp()[..., None, None]
    S = torch.zeros(B, Hv, K, V, device=q.device) if initial_state is None else initial_state.float()
    states, news = [], []
    for U_c, W_c, k_c, d_c in zip(U.unbind(2), W.unbind(2), k_out.unbind(2), decay.unbind(2)):
        states.append(S)
        news.append(U_c - W_c @ S)
        S = d_c * S + k_c.transpose(-1, -2) @ news[-1]
    o = q_out @ torch.stack(states, 2) + inside @ torch.stack(news, 2)
    o = o.reshape(B, Hv, -1, V)[:, :, :L].transpose(1, 2).contiguous()
    return o.to(dtype), (S if output_final_state else None)


def causal_conv1d(hidden_states=None, weight=None, bias=None, activation=None, x=None, **kwargs):
    """Depthwise causal convolution [B, channels, L] as a sum of shifted products (cuDNN's depthwise backward is slow)."""
    x = hidden_states if x is None else x
    n, L = weight.shape[-1], x.shape[-1]
    padded = F.pad(x, (n - 1, 0))
    y = sum(padded[..., j:j + L] * weight[:, j, None] for j in range(n))
    return F.silu(y) if activation else y


def use_fast_parts(model):
    """Put the two functions above in place of transformers' own, whichever way this version of it calls them."""
    hf.torch_chunk_gated_delta_rule = chunk_gated_delta_rule
    hf.causal_conv1d_fn = causal_conv1d
    for m in model.modules():
        if isinstance(m, hf.Qwen3NextGatedDeltaNet):
            for name, function in (("chunk_gated_delta_rule", chunk_gated_delta_rule), ("causal_conv1d_fn", causal_conv1d)):
                if hasattr(m, name):
                    setattr(m, name, function)


# -- model ---------------------------------------------------------------------------------------------------------------

class MTP(nn.Module):
    """The multi-token prediction head, with the release's parameter names (`mtp.*`)."""

    def __init__(self, config):
        super().__init__()
        H, eps = config.hidden_size, config.rms_norm_eps
        self.pre_fc_norm_embedding, self.pre_fc_norm_hidden = hf.Qwen3NextRMSNorm(H, eps), hf.Qwen3NextRMSNorm(H, eps)
        self.fc = nn.Linear(2 * H, H, bias=False)
        attention = config.layer_types.index("full_attention")
        self.layers = nn.ModuleList([hf.Qwen3NextDecoderLayer(config, attention)])
        self.norm = hf.Qwen3NextRMSNorm(H, eps)

    def forward(self, embedding, hidden, rope, mask=None):
        x = self.fc(torch.cat([self.pre_fc_norm_embedding(embedding), self.pre_fc_norm_hidden(hidden)], -1))
        return self.norm(self.layers[0](x, position_embeddings=rope, attention_mask=mask))


class Tiny(nn.Module):
    """Trunk, MTP head, router statistics and residual dropout."""

    def __init__(self, config, dropout=0.0):
        super().__init__()
        self.config, self.dropout = config, dropout
        self.lm = Qwen3NextForCausalLM(config)
        self.lm.lm_head.weight = self.lm.model.embed_tokens.weight
        self.lm.model.embed_tokens.padding_idx = None  # the pad token also ends documents: train it
        self.mtp = MTP(config)
        self.router_logits = []
        use_fast_parts(self)
        self._init()
        for m in self.modules():
            if isinstance(m, hf.Qwen3NextTopKRouter):
                m.register_forward_hook(lambda mod, args, out: self.router_logits.append(out[0]))
            if isinstance(m, (hf.Qwen3NextGatedDeltaNet, hf.Qwen3NextAttention, hf.Qwen3NextSparseMoeBlock)):
                m.register_forward_hook(self._drop)

    def _drop(self, module, args, out):
        if not (self.training and self.dropout):
            return None
        if isinstance(out, tuple):
            return (F.dropout(out[0], self.dropout), *out[1:])
        return F.dropout(out, self.dropout)

    @torch.no_grad()
    def _init(self):
        depth = 2 * self.config.num_hidden_layers
        for name, p in self.named_parameters():
            if "norm" in name:
                p.fill_(1.0 if "linear_attn.norm" in name else 0.0)
            elif name.endswith("A_log"):
                p.uniform_(1, 16).log_()
            elif name.endswith("dt_bias"):  # softplus(dt_bias) log-uniform in [0.001, 0.1], as in the Gated DeltaNet paper
                dt = torch.exp(torch.rand_like(p) * math.log(100) + math.log(1e-3))
                p.copy_(dt + torch.log(-torch.expm1(-dt)))
            elif "conv1d" in name:
                p.uniform_(-0.5, 0.5)
            elif name.endswith(("out_proj.weight", "o_proj.weight", "down_proj", "down_proj.weight")):
                p.normal_(0, 0.04 / math.sqrt(depth))
            else:
                p.normal_(0, 0.02 if "embed" in name else 0.04)

    def rope(self, h, positions=None):
        if positions is None:
            positions = torch.arange(h.shape[1], device=h.device)[None]
        return self.lm.model.rotary_emb(h, positions)

    def trunk(self, ids):
        """Hidden states after the final norm."""
        self.router_logits.clear()
        m = self.lm.model
        h = m.embed_tokens(ids)
        rope = self.rope(h)
        for layer in m.layers:
            h = layer(h, position_embeddings=rope, attention_mask=None)
        return m.norm(h)

    def logits(self, h):
        return self.lm.lm_head(h)

    def balance(self, keep=None):
        """Load-balancing loss over the whole batch (or the rows `keep`), layer by layer (1.0 is perfect), and each expert's share."""
        k, n = self.config.num_experts_per_tok, self.config.num_experts
        losses, loads = [], []
        for z in self.router_logits:
            z = z if keep is None else z[keep]
            p = z.float().softmax(-1)
            load = torch.zeros(n, device=z.device).scatter_add_(
                0, p.topk(k, -1)[1].flatten(), torch.ones(z.shape[0] * k, device=z.device)) / (z.shape[0] * k)
            losses.append(n * (load * p.mean(0)).sum()); loads.append(load)
        return torch.stack(losses).mean(), torch.stack(loads)


def cross_entropy(logits_of, hidden, targets, chunk=16384):
    """Mean loss without ever holding all the logits: chunks are recomputed in the backward pass."""
    h, t = hidden.reshape(-1, hidden.shape[-1]), targets.reshape(-1)
    part = lambda a, b: F.cross_entropy(logits_of(a).float(), b, reduction="sum")
    total = 0
    for a, b in zip(h.split(chunk), t.split(chunk)):
        total = total + (torch.utils.checkpoint.checkpoint(part, a, b, use_reentrant=False) if h.requires_grad else part(a, b))
    return total / t.numel()


def losses(model, batch, mtp_steps=1):
    """Loss of the trunk and of each MTP step for a [rows, length + 2] batch (length + 1 + mtp_steps - 1 columns are used)."""
    ids = batch[:, :-2]
    L = ids.shape[1]
    h = model.trunk(ids)
    main = cross_entropy(model.logits, h, batch[:, 1:L + 1])
    extra = []
    rope, emb = None, model.lm.model.embed_tokens
    for s in range(mtp_steps):  # step s reads the embedding of token t+1+s and predicts token t+2+s
        n = L - s
        h = h[:, :n]
        rope = model.rope(h)
        h = model.mtp(emb(batch[:, 1 + s:1 + s + n]), h, rope)
        extra.append(cross_entropy(model.logits, h, batch[:, 2 + s:2 + s + n]))
    return main, extra


# -- optimiser -----------------------------------------------------------------------------------------------------------

def orthogonalise(M, steps=5):
    """Newton-Schulz iteration of Muon on a batch of matrices [N, r, c]."""
    X = M.to(torch.bfloat16 if M.is_cuda else torch.float32)
    flip = X.shape[-2] > X.shape[-1]
    if flip:
        X = X.transpose(-1, -2)
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        A = X @ X.transpose(-1, -2)
        X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
    return (X.transpose(-1, -2) if flip else X).float()


class MuonAdamW:
    """Muon for the matrices, AdamW for the rest; fp32 master copies, bf16 (or fp32) model weights."""

    def __init__(self, model, lr=4e-3, wd=0.2, adam_lr=3e-3, adam_wd=0.05, momentum=0.95, betas=(0.9, 0.98)):
        self.lr, self.wd, self.adam_lr, self.momentum, self.betas, self.t = lr, wd, adam_lr, momentum, betas, 0
        groups, self.adam = {}, []
        for name, p in model.named_parameters():
            if p.ndim == 3 and "experts" in name:
                r = 256 if p.shape[1] % 256 == 0 else p.shape[1]  # gate and up apart
                groups.setdefault((r, p.shape[2]), []).append(p)
            elif p.ndim == 2 and not any(s in name for s in ("embed", "lm_head", "gate.weight", "in_proj_ba")):
                groups.setdefault(tuple(p.shape), []).append(p)
            else:
                decay = adam_wd if p.ndim == 2 else 0.0
                master = p.detach().float().clone()
                self.adam.append((p, master, torch.zeros_like(master), torch.zeros_like(master), decay))
        self.muon = []
        for (r, c), params in groups.items():
            master = torch.cat([p.detach().float().reshape(-1, r, c) for p in params])
            self.muon.append((params, master, torch.zeros_like(master)))

    @torch.no_grad()
    def step(self, scale):
        self.t += 1
        for params, master, buf in self.muon:
            N, r, c = master.shape
            g = torch.cat([p.grad.reshape(-1, r, c) for p in params]).float()
            buf.lerp_(g, 1 - self.momentum)
            update = orthogonalise(g.lerp(buf, self.momentum))
            lr = self.lr * scale
            master.mul_(1 - lr * self.wd).add_(update, alpha=-lr * 0.2 * math.sqrt(max(r, c)))
            at = 0
            for p in params:
                n = p.numel() // (r * c)
                p.copy_(master[at:at + n].view(p.shape)); at += n
        b1, b2 = self.betas
        lr = self.adam_lr * scale
        norm = torch.stack(torch._foreach_norm([a[0].grad.float() for a in self.adam])).norm()
        clip = (1.0 / (norm + 1e-6)).clamp(max=1.0)
        for p, master, m, v, decay in self.adam:
            g = p.grad.float() * clip
            m.lerp_(g, 1 - b1); v.lerp_(g * g, 1 - b2)
            master.mul_(1 - lr * decay)
            master.addcdiv_(m / (1 - b1 ** self.t), (v / (1 - b2 ** self.t)).sqrt() + 1e-8, value=-lr)
            p.copy_(master)
        for p in [p for params, *_ in self.muon for p in params] + [a[0] for a in self.adam]:
            p.grad = None


# -- export --------------------------------------------------------------------------------------------------------------

def release_tensors(model):
    """Name -> tensor, as in a Qwen3-Next release: one matrix per expert, MTP under `mtp.`, tied head left out."""
    out = {}
    for name, p in [*model.lm.named_parameters(), *(("mtp." + n, p) for n, p in model.mtp.named_parameters())]:
        p = p.detach().to(torch.bfloat16).cpu()
        if name == "lm_head.weight":
            continue
        if name.endswith("experts.gate_up_proj"):
            for e, (gate, up) in enumerate(zip(*p.chunk(2, 1))):
                out[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate.contiguous()
                out[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up.contiguous()
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(p):
                out[name.replace("down_proj", f"{e}.down_proj.weight")] = down.contiguous()
        else:
            out[name] = p.contiguous()
    return out


def config_json(config):
    keys = [k for k in SHAPE if k not in ("full_attention_interval",)]
    c = {"architectures": ["Qwen3NextForCausalLM"], "model_type": "qwen3_next"}
    c |= {k: getattr(config, k) for k in keys}
    c |= {"full_attention_interval": 4, "attention_bias": False, "attention_dropout": 0.0, "mlp_only_layers": [],
          "rope_theta": ROPE["rope_theta"], "partial_rotary_factor": ROPE["partial_rotary_factor"], "rope_scaling": None,
          "output_router_logits": False, "router_aux_loss_coef": 0.001, "use_cache": True, "torch_dtype": "bfloat16"}
    return c


def export(model, folder, tokenizer, tokenizer_config, template=None):
    """A Hugging Face folder: config, weights in BF16, tokenizer, generation defaults, chat template."""
    from safetensors.torch import save_file
    folder = Path(folder); folder.mkdir(parents=True, exist_ok=True)
    save_file(release_tensors(model), folder / "model.safetensors", metadata={"format": "pt"})
    dump = lambda name, x: (folder / name).write_text(json.dumps(x, indent=2) + "\n")
    dump("config.json", config_json(model.config))
    dump("generation_config.json", {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "pad_token_id": EOT_ID,
                                    "eos_token_id": [EOT_ID + 2, EOT_ID]})
    dump("tokenizer_config.json", tokenizer_config)
    (folder / "tokenizer.json").write_bytes(Path(tokenizer).read_bytes())
    if template and Path(template).exists():
        (folder / "chat_template.jinja").write_bytes(Path(template).read_bytes())


def sizes(model):
    """Parameters by kind and the bytes of a mixed-type GGUF (3-bit gates and ups, 4-bit downs, 5-bit dense)."""
    n = {"gate_exps": 0, "up_exps": 0, "down_exps": 0, "embedding": 0, "dense": 0, "router": 0, "small": 0}
    for name, t in release_tensors(model).items():
        kind = ("embedding" if "embed" in name else "gate_exps" if ".experts." in name and "gate_proj" in name else
                "up_exps" if ".experts." in name and "up_proj" in name else "down_exps" if ".experts." in name else
                "router" if "mlp.gate" in name else "small" if t.ndim != 2 or "shared_expert_gate" in name or "in_proj_ba" in name
                else "dense")
        n[kind] += t.numel()
    bits = {"gate_exps": 3.4375, "up_exps": 3.4375, "down_exps": 4.5, "embedding": 6.5625, "dense": 5.5, "router": 32, "small": 32}
    return {"parameters": n, "total": sum(n.values()), "gguf_bytes_estimate": int(sum(n[k] * bits[k] / 8 for k in n)) + 300_000}
