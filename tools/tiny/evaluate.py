"""Measurements of a trained model: losses, expert load, MTP acceptance, recall, samples."""
import math

import numpy as np
import torch

from .data import chatml, recall
from .model import EOT_ID

MOST = 1 << 30  # documents per validation set at most (less in a smoke run)


def pad_rows(docs, device, multiple=64):
    n = -(-max(map(len, docs)) // multiple) * multiple
    ids = np.full((len(docs), n), EOT_ID, np.int64)
    for row, d in zip(ids, docs):
        row[:len(d)] = d
    return torch.from_numpy(ids).to(device), torch.tensor([len(d) for d in docs], device=device)


def batches(docs, tokens=16384):
    docs = sorted(docs, key=len)
    while docs:
        n = max(1, tokens // len(docs[-1]))
        yield docs[-n:]
        docs = docs[:-n]


@torch.no_grad()
def nll(model, data, stream, limit=1024, most=None):
    """Mean loss per predicted token, each document on its own from an empty state, its end token included."""
    model.eval()
    device = next(model.parameters()).device
    docs = [data.doc(stream, i)[:limit] for i in range(min(data.count(stream), MOST, most or MOST))]
    total = count = 0
    loads = 0
    for part in batches([d for d in docs if len(d) > 1]):
        ids, lens = pad_rows(part, device)
        h = model.trunk(ids)
        real = torch.arange(ids.shape[1], device=device)[None] < lens[:, None]
        loads = loads + model.balance(real.flatten())[1] * real.sum()
        keep = torch.arange(ids.shape[1] - 1, device=device)[None] < (lens - 1)[:, None]
        h, target = h[:, :-1][keep], ids[:, 1:][keep]
        for a, b in zip(h.split(8192), target.split(8192)):
            total += torch.nn.functional.cross_entropy(model.logits(a).float(), b, reduction="sum").item()
            count += len(b)
    return {"nll": total / count, "ppl": math.exp(min(20, total / count)), "tokens": count, "sum": total}, loads / loads.sum(1, keepdim=True)


def report_losses(model, data):
    out, loads = {}, []
    for stream in ("valid_story", "valid_books", "valid_dialogue", "valid_story_chat"):
        r, load = nll(model, data, stream, limit=4096)
        size = data.info["valid_bytes"].get(stream)
        if size:
            r["bits_per_byte"] = r["sum"] / math.log(2) / size
        out[stream] = {k: round(v, 4) for k, v in r.items() if k != "sum"}
        loads.append(load)
    r, _ = nll(model, data, "story", limit=4096, most=500)  # the same measure on training stories
    out["train_story"] = {k: round(v, 4) for k, v in r.items() if k != "sum"}
    return out, torch.stack(loads).mean(0)


def report_load(load):
    """Per layer: smallest and largest share of the tokens times the number of experts (1 = even), entropy / ln(experts)."""
    n = load.shape[1]
    entropy = -(load * load.clamp(min=1e-12).log()).sum(1) / math.log(n)
    return [{"min": round(l.min().item() * n, 3), "max": round(l.max().item() * n, 3), "entropy": round(e.item(), 4)}
            for l, e in zip(load, entropy)]


@torch.no_grad()
def generate(model, ids, new, temperature=0.0, top_p=0.8, top_k=20, seed=0):
    """Greedy or sampled continuation of equally long prompts [B, T] through transformers' own cache."""
    torch.manual_seed(seed)
    model.eval()
    args = dict(do_sample=True, temperature=temperature, top_p=top_p, top_k=top_k) if temperature else dict(do_sample=False)
    out = model.lm.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, use_cache=True,
                            eos_token_id=[EOT_ID, EOT_ID + 2], pad_token_id=EOT_ID, **args)
    model.router_logits.clear()
    return out


@torch.no_grad()
def acceptance(model, ids, first, lens, depth=3):
    """Greedy drafts of every position of ids [B, T] against the text itself, exactly as a runtime would draft them:
    later drafts read the head's own hidden state and the drafted token, and attend to the first pass's keys."""
    model.eval()
    emb = model.lm.model.embed_tokens
    T = ids.shape[1]
    n = T - 1 - depth
    h = model.trunk(ids)
    x_emb, x_hid = [emb(ids[:, 1:n + 1])], [h[:, :n]]
    idx = torch.arange(n, device=ids.device)
    alive = (idx[None] + 2 >= first) & (idx[None] + 1 + depth < lens[:, None])
    tried, kept = [], []
    for d in range(depth):
        chain = idx.repeat(d + 1)
        step = torch.arange(d + 1, device=ids.device).repeat_interleave(n)
        same = chain[:, None] == chain[None]
        mask = ((step[None] == 0) & (chain[None] <= chain[:, None])) | (same & (step[None] <= step[:, None]))
        rope = model.rope(h, (chain + step)[None])
        out = model.mtp(torch.cat(x_emb, 1), torch.cat(x_hid, 1), rope, mask[None, None])[:, -n:]
        draft = model.logits(out).argmax(-1)
        tried.append(alive.sum().item())
        alive = alive & (draft == ids[:, 2 + d:2 + d + n])
        kept.append(alive.sum().item())
        x_emb.append(emb(draft)); x_hid.append(out)
    model.router_logits.clear()
    return tried, kept


@torch.no_grad()
def report_acceptance(model, data, prompts=64, prompt=48, new=160):
    device = next(model.parameters()).device
    docs = [data.doc("valid_story", i) for i in range(data.count("valid_story"))]
    docs = [d for d in docs if len(d) > prompt + 8][:prompts]
    ids = torch.from_numpy(np.stack([d[:prompt] for d in docs]).astype(np.int64)).to(device)
    out = generate(model, ids, new)
    lens = torch.tensor([(row[prompt:] == EOT_ID).nonzero()[0, 0].item() + prompt + 1 if (row[prompt:] == EOT_ID).any() else len(row)
                         for row in out], device=device)
    tried, kept = acceptance(model, out, prompt, lens)
    # agreement with the trunk's own choice on the written stories (teacher-forced)
    ids, lens = pad_rows(docs, device)
    h = model.trunk(ids)
    n = ids.shape[1] - 2
    draft = model.logits(model.mtp(model.lm.model.embed_tokens(ids[:, 1:n + 1]), h[:, :n], model.rope(h[:, :n]))).argmax(-1)
    choice = model.logits(h[:, 1:n + 1]).argmax(-1)
    inside = torch.arange(n, device=device)[None] + 2 < lens[:, None]
    model.router_logits.clear()
    return {"greedy_continuations": {"tried": tried, "accepted": kept, "rate_given_earlier_accepted": [round(k / max(1, t), 4) for k, t in zip(kept, tried)],
                                     "mean_tokens_per_step_with_3_drafts": round(1 + sum(kept) / max(1, tried[0]), 3)},
            "agreement_on_written_stories_depth_1": round((draft == choice)[inside].float().mean().item(), 4)}


@torch.no_grad()
def report_recall(model, data, lengths=(256, 512, 1024, 2048, 4096), samples=64, seed=99):
    """Share of questions whose whole answer is the greedy choice; the facts stand at the start, the question at the end."""
    model.eval()
    device = next(model.parameters()).device
    out = {}
    for length in lengths:
        rng = np.random.default_rng([seed, length])
        rows = [recall(data, rng, length - 4, asks=1) for _ in range(samples)]
        right = total = 0
        per = max(1, 65536 // length)
        for i in range(0, samples, per):
            part = rows[i:i + per]
            ids, _ = pad_rows([r[0] for r in part], device)
            h = model.trunk(ids)
            for j, (_, spans) in enumerate(part):
                for a, b in spans:
                    right += bool((model.logits(h[j, a - 1:b - 1]).argmax(-1) == ids[j, a:b]).all()); total += 1
        out[str(length)] = round(right / total, 4)
    model.router_logits.clear()
    return out


SAMPLES = [
    ("Once upon a time", None), ("One day, a little dog named Max", None), ("The old fisherman", None),
    (None, [("user", "Tell me a story about a frog.")]),
    (None, [("system", "You are a friendly storyteller."), ("user", "Please tell me a story about a robot and a flower.")]),
    (None, [("user", "Hello! Who are you?")]),
    (None, [("user", "What color is the sky?")]),
    (None, [("user", "Count from 3 to 9.")]),
    (None, [("user", "Remember this: The secret code of the red door is 7315."), ("assistant", "Okay, I will remember that."),
            ("user", "Tell me a joke."), ("assistant", "What do you call a sleeping dinosaur? A dino-snore!"),
            ("user", "What is the secret code of the red door?")]),
]


def report_samples(model, data, new=220, temperature=0.7):
    device = next(model.parameters()).device
    out = []
    for i, (text, turns) in enumerate(SAMPLES):
        prompt = text if text else chatml(turns) + "<|im_start|>assistant\n"
        ids = torch.tensor([data.tok.encode(prompt).ids], device=device)
        got = generate(model, ids, new, temperature, seed=i)[0, ids.shape[1]:].tolist()
        out.append({"prompt": prompt, "output": data.tok.decode(got, skip_special_tokens=True)})
    return out
