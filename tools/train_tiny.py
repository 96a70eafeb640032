#!/usr/bin/env python3
"""Train the bundled miniature Qwen3-Next and export it as a Hugging Face folder.

    tools/train_tiny.py --corpus CORPUS --out OUT             # tokenizer, data, training, measurements, export: the shipped run
    tools/train_tiny.py --corpus CORPUS --out OUT --smoke     # the same with a smaller model in a minute or two on a CPU

OUT gets data/ (tokenizer.json, tokens.npz, data.json), hf/ (the model), calibration.txt (for `quantize --calibrate`) and
train_log.json (settings, loss curve, results).
`--prepared DIR` takes data/ from an earlier run. The learning rate follows the clock, so that a run always ends in time:
warm-up, constant, then a straight line to zero. The stories are few (two million tokens): strong weight decay and dropout keep
the model from knowing them by heart; the validation lines tell. `best.pt` in OUT holds the weights of the best validation;
`--export-best` exports those. Needs torch, transformers (5.x), tokenizers, safetensors, numpy.
"""
import argparse
import hashlib
import json
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

# Shares of the tokens: first mostly prose, then (while the learning rate falls) more stories and chat. The filler of recall rows
# is a quarter stories, so that 60 M tokens hold every story about seven times, in three versions with other names.
EARLY = {"story": 0.05, "story_chat": 0.06, "books": 0.61, "dialogue": 0.02, "talk": 0.08, "recall": 0.16, "counting": 0.02}
LATE = {"story": 0.15, "story_chat": 0.20, "books": 0.35, "dialogue": 0.01, "talk": 0.10, "recall": 0.17, "counting": 0.02}
# (until this share of the time, row length, mixture)
PHASES = [(0.55, 1024, EARLY), (0.86, 1024, LATE), (0.94, 2048, LATE), (1.0, 4096, LATE)]
WARM_UP, DECAY_FROM = 200, 0.5  # steps; share of the time


def arguments():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--corpus", help="folder with stories-train.txt.xz ... dialogue.jsonl.xz")
    p.add_argument("--prepared", help="data folder of an earlier run (instead of --corpus)")
    p.add_argument("--out", required=True)
    p.add_argument("--minutes", type=float, default=7.8, help="training time; the schedule fits itself to it")
    p.add_argument("--steps", type=int, default=1 << 30, help="end after so many steps, if they come before the minutes")
    p.add_argument("--tokenizer", help="tokenizer.json to keep, so that ids stay those of an earlier model [trained on the corpus]")
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--tokens-per-step", type=int, default=32768)
    p.add_argument("--lr", type=float, default=5e-3, help="Muon (matrices)")
    p.add_argument("--wd", type=float, default=1.0, help="decoupled weight decay of the matrices")
    p.add_argument("--adam-lr", type=float, default=3e-3, help="AdamW (embedding, router, norms, small parameters)")
    p.add_argument("--dropout", type=float, default=0.15, help="on each residual branch")
    p.add_argument("--balance", type=float, default=0.02, help="weight of the load-balancing loss")
    p.add_argument("--mtp-weights", type=float, nargs="+", default=[0.3, 0.1], help="weight of each MTP step; as many steps as numbers")
    p.add_argument("--eval-every", type=float, default=100, help="seconds between validations")
    p.add_argument("--export-best", action="store_true", help="export the weights of the best validation instead of the last")
    p.add_argument("--no-report", action="store_true", help="skip the measurements at the end")
    p.add_argument("--smoke", action="store_true", help="tiny data, a few steps")
    p.add_argument("--template", help="chat template to export", default=str(Path(__file__).resolve().parent.parent / "weights/tiny/chat_template.jinja"))
    return p.parse_args()


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def train(a, data, model, device, log):
    import torch
    from torch.utils.data import DataLoader
    from tiny.data import Rows
    from tiny.evaluate import nll
    from tiny.model import MuonAdamW, losses
    opt = MuonAdamW(model, lr=a.lr, wd=a.wd, adam_lr=a.adam_lr)
    curve, valid, phases, total, step, tokens = [], [], [], a.minutes * 60, 0, 0
    start = time.time()
    next_eval = a.eval_every
    (Path(a.out) / "best.pt").unlink(missing_ok=True)
    sums, since = None, 0

    def validate():
        r = [round(nll(model, data, s)[0]["nll"], 4) for s in ("valid_story", "valid_story_chat", "valid_books")]
        seen = round(nll(model, data, "story", most=120)[0]["nll"], 4)
        valid.append([step, round(time.time() - start, 1), *r, seen])
        log(f"  valid story {r[0]}, in chats {r[1]}, books {r[2]}; seen stories {seen}")
        if r[0] == min(v[2] for v in valid):
            torch.save(model.state_dict(), Path(a.out) / "best.pt")

    for phase, (until, length, mix) in enumerate(PHASES):
        rows = max(1, a.tokens_per_step // length)
        loader = DataLoader(Rows(data, mix, length, rows, a.seed * 100 + phase), batch_size=None, num_workers=0 if a.smoke else 8,
                            pin_memory=device == "cuda", **({} if a.smoke else {"prefetch_factor": 4}))
        first = step
        for batch in loader:
            elapsed = time.time() - start
            f = max(elapsed / total, step / a.steps) if not a.smoke else step / 4
            if f >= until:
                break
            scale = min(1.0, (step + 1) / WARM_UP, max(0.0, (1 - f) / (1 - DECAY_FROM)))
            model.train()
            batch = batch.to(device, non_blocking=True)
            main, extra = losses(model, batch, len(a.mtp_weights))
            balance, _ = model.balance()
            loss = main + sum(w * e for w, e in zip(a.mtp_weights, extra)) + a.balance * balance
            loss.backward()
            opt.step(scale)
            step += 1; tokens += rows * length; since += 1
            now = torch.stack([main.detach(), *[e.detach() for e in extra], balance.detach()])
            sums = now if sums is None else sums + now
            if step % (50 if not a.smoke else 1) == 0:
                values = [round(v, 4) for v in (sums / since).tolist()]
                sums, since = None, 0
                seconds = time.time() - start
                curve.append([step, round(seconds, 1), tokens, round(scale, 4), *values])
                log(f"step {step} {seconds:.0f}s {tokens / 1e6:.1f}M tokens, {(tokens / seconds) / 1e3:.0f}k/s, lr x{scale:.3f}, "
                    f"loss {values[0]:.4f}, mtp {values[1:-1]}, balance {values[-1]:.4f}, row {length}")
                if not values[0] < 50:
                    raise SystemExit("the loss is not a number")
            if elapsed > next_eval:
                next_eval += a.eval_every
                validate()
        log(f"phase {phase}: rows of {length}, steps {first}..{step}")
        phases.append({"rows": rows, "length": length, "first_step": first, "end_step": step})
    seconds = round(time.time() - start, 1)
    validate()
    return {"steps": step, "tokens": tokens, "seconds": seconds, "phases": phases,
            "curve_columns": ["step", "seconds", "tokens", "lr scale", "loss"] + [f"mtp {i + 1}" for i in range(len(a.mtp_weights))] + ["balance"],
            "curve": curve, "valid_columns": ["step", "seconds", "valid stories", "valid stories in chats", "held-out books", "seen stories"], "valid": valid}


def check_trunk(M, model, data, device, log):
    """Our loop over the layers must be transformers' model, and must not see the future."""
    import torch
    model.eval()
    ids = torch.from_numpy(data.doc("books", 0)[None, :128].astype("int64")).to(device)
    with torch.no_grad():
        ours, theirs = model.logits(model.trunk(ids)).float(), model.lm(input_ids=ids).logits.float()
        changed = ids.clone(); changed[:, 100] += 1
        later = model.logits(model.trunk(changed)).float()
    model.router_logits.clear()
    norm = lambda x: x.norm().item()
    far, future, past = (norm(ours - theirs) / norm(theirs), norm((later - ours)[:, :100]) / norm(ours), norm((later - ours)[:, 100:]))
    log(f"trunk against transformers: {far:.1e}; change seen before it: {future:.1e}, after it: {past:.1e}")
    if far > 0.05 or future > 0.05 or past == 0:
        raise SystemExit("the trunk differs from transformers' model")


def main():
    a = arguments()
    out = Path(a.out); out.mkdir(parents=True, exist_ok=True)
    log_file = open(out / "log.txt", "a")

    def log(text):
        print(text, flush=True)
        print(text, file=log_file, flush=True)

    import torch
    import tokenizers
    import transformers
    from tiny import data as D, evaluate as E, model as M
    prepared = Path(a.prepared) if a.prepared else out / "data"
    if not (prepared / "tokens.npz").exists():
        D.prepare(a.corpus, prepared, a.seed, limit=300 if a.smoke else None, tokenizer=a.tokenizer, log=log)
    data = D.Tokens(prepared)
    torch.manual_seed(a.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if a.smoke:
        a.tokens_per_step, a.eval_every, E.MOST = 256, 0, 3
        PHASES[:] = [(0.5, 128, EARLY), (0.75, 128, LATE), (1.0, 256, LATE)]
    model = M.Tiny(M.make_config(**({"num_hidden_layers": 4, "num_experts": 8} if a.smoke else {})), a.dropout)
    for p in model.parameters():
        p.data = p.data.bfloat16()
    model = model.to(device)
    size = M.sizes(model)
    log(f"{size}; device {device}; torch {torch.__version__}, transformers {transformers.__version__}")
    result = {"settings": {k: v for k, v in vars(a).items() if k not in ("corpus", "prepared", "out", "template", "tokenizer")},
              "mixtures": {"early": EARLY, "late": LATE}, "warm_up": WARM_UP, "decay_from": DECAY_FROM,
              "config": M.config_json(model.config), "size": size, "data": data.info,
              "versions": {"python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
                           "tokenizers": tokenizers.__version__},
              "device": torch.cuda.get_device_name() if device == "cuda" else "CPU"}
    check_trunk(M, model, data, device, log)
    result |= train(a, data, model, device, log)
    if a.export_best and (out / "best.pt").exists():
        model.load_state_dict(torch.load(out / "best.pt", map_location=device))
        log("taking the weights of the best validation")
    M.export(model, out / "hf", prepared / "tokenizer.json", D.tokenizer_config(), a.template)
    (out / "calibration.txt").write_text(D.calibration_text(data))
    result["sha256"] = {f: sha256(out / "hf" / f) for f in ("model.safetensors", "tokenizer.json")}
    save = lambda: (out / "train_log.json").write_text(json.dumps(result, indent=None, separators=(",", ":")))
    save()
    log("exported")
    if not a.no_report:
        few = {"samples": 2, "lengths": (256,)} if a.smoke else {}
        steps = [("losses", lambda: E.report_losses(model, data)), ("recall", lambda: E.report_recall(model, data, **few)),
                 ("mtp", lambda: E.report_acceptance(model, data, **({"prompts": 4, "new": 8} if a.smoke else {}))),
                 ("samples", lambda: E.report_samples(model, data, new=4 if a.smoke else 220))]
        for name, run in steps:  # one failing measurement must not cost the others
            try:
                value = run()
                if name == "losses":
                    value, load = value
                    result["expert_load"] = E.report_load(load)
                    result["expert_share"] = [[round(x, 5) for x in row] for row in load.tolist()]
                result[name] = value
                log(json.dumps({name: value}, ensure_ascii=False, indent=1))
            except Exception as error:
                log(f"{name}: {type(error).__name__}: {error}")
            save()
        log(json.dumps(result.get("expert_load")))
    log("done")


if __name__ == "__main__":
    main()
