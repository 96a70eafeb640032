"""Corpus -> tokenizer and token arrays. `prepare()` writes DIR/tokenizer.json and DIR/tokens.npz; `Rows` builds batches."""
import hashlib
import json
import lzma
import random
from pathlib import Path

import numpy as np

from . import chats

VOCAB = 8192
EOT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
ADDED = [EOT, IM_START, IM_END] + [f"<|{s}|>" for s in (
    "object_ref_start object_ref_end box_start box_end quad_start quad_end vision_start vision_end vision_pad image_pad "
    "video_pad").split()] + ["<tool_call>", "</tool_call>"] + [f"<|{s}|>" for s in (
        "fim_prefix fim_middle fim_suffix fim_pad repo_name file_sep").split()] + [
    "<tool_response>", "</tool_response>", "<think>", "</think>"]
SPECIAL = 14  # the first 14 are special; the others show in decoded text
SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
DIALOGUES = {"taskmaster-4": 0.2, "chatterbot-corpus": 1.0, "oasst": 1.0}  # share of each that is used
FILES = ["stories-train.txt", "stories-extra.txt", "stories-asp.txt", "stories-valid.txt", "books.txt", "dialogue.jsonl"]


def straighten(text):
    return text.translate({0x201C: '"', 0x201D: '"', 0x201E: '"', 0x2018: "'", 0x2019: "'", 0x201A: "'"})


def held_out(text, percent):
    return hashlib.sha256(text.encode()).digest()[0] * 100 < percent * 256


def chatml(turns):
    return "".join(f"{IM_START}{role}\n{text}{IM_END}\n" for role, text in turns)


def read_corpus(folder):
    """{name: [document, ...]} and {file: sha256 of the raw content}."""
    docs, hashes = {}, {}
    for name in FILES:
        raw = lzma.open(Path(folder) / (name + ".xz")).read()
        hashes[name] = hashlib.sha256(raw).hexdigest()
        text = raw.decode()
        if name.endswith("jsonl"):
            docs["dialogue"] = []
            for line in filter(None, text.split("\n")):
                d = json.loads(line)
                turns = [(m["role"], straighten(m["content"]).strip()) for m in d["messages"]]
                keep = DIALOGUES.get(d["source"], 0)
                if keep == 1 or (keep and held_out("keep" + line, 100 * keep)):
                    docs["dialogue"].append(chatml(turns))
        else:
            docs[name[:-4]] = [d.strip() for d in straighten(text).split(EOT) if d.strip()]
    return docs, hashes


def train_tokenizer(texts):
    """Byte-level BPE with Qwen's normaliser, split and control tokens; VOCAB ids in all."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    t = Tokenizer(models.BPE(continuing_subword_prefix="", end_of_word_suffix=""))
    t.normalizer = normalizers.NFC()
    byte_level = dict(add_prefix_space=False, trim_offsets=False, use_regex=False)
    t.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(**byte_level)])
    t.decoder, t.post_processor = decoders.ByteLevel(**byte_level), processors.ByteLevel(**byte_level)
    t.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCAB - len(ADDED), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    assert t.get_vocab_size() == VOCAB - len(ADDED), t.get_vocab_size()
    for i, s in enumerate(ADDED):
        a = AddedToken(s, normalized=False, special=i < SPECIAL)
        t.add_special_tokens([a]) if i < SPECIAL else t.add_tokens([a])
    assert t.get_vocab_size() == VOCAB and t.token_to_id(EOT) == VOCAB - len(ADDED)
    return t


def tokenizer_config():
    return {"tokenizer_class": "Qwen2Tokenizer", "model_max_length": 4096, "bos_token": None, "eos_token": IM_END, "pad_token": EOT,
            "unk_token": None, "add_bos_token": False, "add_prefix_space": False, "clean_up_tokenization_spaces": False,
            "errors": "replace", "split_special_tokens": False, "additional_special_tokens": ADDED[1:SPECIAL],
            "added_tokens_decoder": {str(VOCAB - len(ADDED) + i): {
                "content": s, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": i < SPECIAL}
                for i, s in enumerate(ADDED)}}


def prepare(corpus, out, seed=1, variants=3, limit=None, tokenizer=None, log=print):
    """Write out/tokenizer.json (a copy of `tokenizer` if that is given), out/tokens.npz (one flat uint16 array and its document
    offsets per stream) and out/data.json."""
    out = Path(out); out.mkdir(parents=True, exist_ok=True)
    if tokenizer:
        (out / "tokenizer.json").write_bytes(Path(tokenizer).read_bytes())
    rng = random.Random(seed)
    docs, hashes = read_corpus(corpus)
    stories = docs["stories-train"] + docs["stories-extra"] + docs["stories-asp"]
    books = [d for d in docs["books"] if not held_out(d, 1)]
    books_valid = [d[:6000] for d in docs["books"] if held_out(d, 1)]
    dialogue = [d for d in docs["dialogue"] if not held_out(d, 2)]
    dialogue_valid = [d for d in docs["dialogue"] if held_out(d, 2)]
    if limit:  # a short run through everything
        stories, books, dialogue = stories[:limit], books[:limit // 20 + 2], dialogue[:limit]
    talk = [chats.chat(rng) for _ in range(limit or 40000)]
    sample = rng.sample(books, min(len(books), 900))
    tokenizer_file = out / "tokenizer.json"
    if not tokenizer_file.exists():
        full = docs["stories-train"] + docs["stories-extra"] + docs["stories-asp"] if not limit else docs["stories-train"]
        texts = full + sample + dialogue + [t for c in talk[:4000] for _, t in c]
        # the control tokens are no text: BPE must not learn their letters
        train_tokenizer(t.replace(IM_START, "").replace(IM_END, "") for t in texts).save(str(tokenizer_file))
        log("tokenizer trained")
    from tokenizers import Tokenizer
    tok = Tokenizer.from_file(str(tokenizer_file))

    def encode(texts, end=EOT):
        return [np.array(e.ids, np.uint16) for e in tok.encode_batch([t + end for t in texts])]

    streams = {"books": encode(books), "dialogue": encode(dialogue), "talk": encode([chatml(c) for c in talk])}
    streams["story"] = encode(stories)
    streams["story_chat"] = []
    for v in range(variants):
        if v:
            streams["story"] += encode([chats.name_swap(rng, s) for s in stories])
        told = [s if v == 0 else chats.name_swap(rng, s) for s in stories]
        streams["story_chat"] += encode([chatml(chats.story_chat(rng, s)) for s in told])
    streams["counting"] = encode([chats.counting(rng) for _ in range(limit or 6000)], "\n" + EOT)
    streams["valid_story"] = encode(docs["stories-valid"])
    streams["valid_books"] = encode(books_valid)
    streams["valid_dialogue"] = encode(dialogue_valid)
    streams["valid_story_chat"] = encode([chatml(chats.story_chat(rng, s)) for s in docs["stories-valid"]])
    sizes = {"valid_story": docs["stories-valid"], "valid_books": books_valid, "valid_dialogue": dialogue_valid}
    # facts: six pieces each, tokenised apart, so that a row can be put together from them
    facts = [chats.fact(rng) for _ in range(limit or 24000)]
    keys = {k: i for i, k in enumerate(sorted({f[0] for f in facts}))}
    for j, piece in enumerate(["statement", "question", "before", "value", "after"]):
        streams["fact_" + piece] = encode([f[j + 1] for f in facts], "")
    arrays = {"fact_key": np.array([keys[f[0]] for f in facts], np.int32)}
    for name, parts in streams.items():
        arrays[name] = np.concatenate(parts)
        arrays[name + "_at"] = np.cumsum([0] + [len(p) for p in parts]).astype(np.int64)
    np.savez_compressed(out / "tokens.npz", **arrays)
    info = {"seed": seed, "variants": variants, "sha256_raw": hashes,
            "tokens": {k: int(len(v)) for k, v in arrays.items() if k + "_at" in arrays},
            "documents": {k[:-3]: len(v) - 1 for k, v in arrays.items() if k.endswith("_at")},
            "valid_bytes": {k: sum(len(d.encode()) for d in v) for k, v in sizes.items()},
            "tokenizer_sha256": hashlib.sha256(tokenizer_file.read_bytes()).hexdigest()}
    (out / "data.json").write_text(json.dumps(info, indent=1))
    log(json.dumps(info))
    return info


class Tokens:
    """The arrays of tokens.npz: `doc(stream, i)`, `count(stream)`."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        z = np.load(Path(folder) / "tokens.npz")
        self.arrays = {k: z[k] for k in z.files}
        self.info = json.loads((Path(folder) / "data.json").read_text())
        self.tok = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        ids = lambda s: np.array(self.tok.encode(s).ids, np.uint16)
        self.user, self.assistant, self.end = ids(IM_START + "user\n"), ids(IM_START + "assistant\n"), ids(IM_END + "\n")
        self.eot, self.blank, self.newline = ids(EOT), ids("\n\n"), ids("\n")
        self.remember = [ids(s) for s in ("Remember this: ", "Please remember: ", "", "Listen: ", "Here is something to remember: ")]
        self.accept = [ids(s) for s in ("Okay, I will remember that.", "I will remember it.", "All right.", "Thank you, I know that now.")]
        self.q, self.a = ids("Question: "), ids("Answer: ")

    def count(self, stream):
        return len(self.arrays[stream + "_at"]) - 1

    def doc(self, stream, i):
        at = self.arrays[stream + "_at"]
        return self.arrays[stream][at[i]:at[i + 1]]


def calibration_text(data, seed=7):
    """About 33 thousand tokens of the training texts, for `qwen3next quantize --calibrate`."""
    rng, texts = random.Random(seed), []
    for name, share in (("story", 9000), ("story_chat", 12000), ("talk", 6000), ("books", 6000)):
        size = 0
        while size < share:
            d = data.doc(name, rng.randrange(data.count(name)))[:900]
            texts.append(data.tok.decode(d.tolist(), skip_special_tokens=False)); size += len(d)
    rng.shuffle(texts)
    return "".join(texts)


def recall(data, rng, length, asks=None):
    """A row of about `length` tokens: facts told among stories, asked for at the end. -> ids, [(start, end) of each value]."""
    n = data.count("fact_statement")
    dense = asks is None and rng.random() < 0.35
    k = rng.integers(4, 16) if dense else rng.integers(1, 5)
    picked, seen = [], set()
    while len(picked) < k:
        i = int(rng.integers(n)); key = int(data.arrays["fact_key"][i])
        if key not in seen:
            seen.add(key); picked.append(i)
    asked = list(rng.permutation(picked))[: (k if dense else asks or rng.integers(1, 4))]
    chat = rng.random() < 0.5
    f = {p: (lambda i, p=p: data.doc("fact_" + p, i)) for p in ("statement", "question", "before", "value", "after")}
    tell = lambda i: [data.user, data.remember[rng.integers(5)], f["statement"](i), data.end, data.assistant,
                      data.accept[rng.integers(4)], data.end] if chat else [f["statement"](i), data.blank]
    question = lambda i: ([data.user, f["question"](i), data.end, data.assistant, f["before"](i)] if chat
                          else [data.q, f["question"](i), data.newline, data.a, f["before"](i)])
    close = [data.end] if chat else [data.newline]
    size = lambda parts: sum(len(p) for p in parts)
    fixed = sum(size(tell(i)) + 6 for i in picked) + sum(size(question(i)) + len(f["value"](i)) + 4 for i in asked) + 2
    if length < fixed + 20 and asks:
        asked, picked = asked[:1], [i for i in picked if i == asked[0]]
    filler, room = [], (0 if dense and rng.random() < 0.7 else length - fixed)
    # stories between the facts when measured; in training mostly texts of which there are more
    usual = "story_chat" if chat else "story"
    other = usual if asks or rng.random() < 0.2 else "talk" if chat else "books"
    while room > 24:
        source = other if rng.random() < 0.9 else usual
        d = data.doc(source, int(rng.integers(data.count(source))))[:-1]
        if source == "books" and len(d) > 600:
            start = int(rng.integers(len(d) - 600))
            d = d[start:start + int(rng.integers(100, 600))]
        if len(d) > room - 4:
            if asks is None and len(filler) and rng.random() < 0.7:
                break
            if chat:  # a cut document would leave an open turn: pad with copies of a short one
                d = np.concatenate([data.user, d[6:room - 12], data.end])[:room]
            else:
                d = d[:room - 4]
        filler.append([d] if chat else [d, data.blank]); room -= size(filler[-1])
    # the first fact stands at the very beginning when measured, else anywhere
    slots = sorted(int(rng.integers(len(filler) + 1)) for _ in picked)
    if asks:
        slots = [0] * len(picked)
    parts = []
    for j in range(len(filler) + 1):
        for i, s in zip(picked, slots):
            if s == j:
                parts += tell(i)
        if j < len(filler):
            parts += filler[j]
    spans = []
    for i in asked:
        parts += question(i)
        start = size(parts); parts.append(f["value"](i))
        spans.append((start, start + len(parts[-1])))
        parts += [f["after"](i)] + close
    return np.concatenate(parts + [data.eot]), spans


class Rows:
    """Map-style dataset: item i is a [rows, length + 2] int64 batch that depends on (seed, i) alone."""

    def __init__(self, data, mix, length, rows, seed, steps=1 << 20):
        self.data, self.length, self.rows, self.seed, self.steps = data, length, rows, seed, steps
        self.names, weights = zip(*mix.items())
        # `mix` gives shares of tokens; documents are drawn, so divide by the mean tokens a draw brings
        mean = [min(length * (0.8 if n == "recall" else 0.6 if n == "books" else 1), self.mean_length(n)) for n in self.names]
        p = np.array([w / m for w, m in zip(weights, mean)]); self.p = p / p.sum()

    def mean_length(self, name):
        return 1e9 if name in ("recall", "books") else len(self.data.arrays[name]) / self.data.count(name)

    def __len__(self):
        return self.steps

    def draw(self, rng):
        name = self.names[rng.choice(len(self.names), p=self.p)]
        if name == "recall":
            return recall(self.data, rng, int(self.length * rng.choice([0.25, 0.5, 1.0, 1.0])) - 8)[0]
        d = self.data.doc(name, int(rng.integers(self.data.count(name))))
        if name == "books" and len(d) > self.length // 2:
            start = 0 if rng.random() < 0.2 else int(rng.integers(max(1, len(d) - self.length // 2)))
            d = d[start:start + int(rng.integers(self.length // 3, self.length + 1))]
        return d

    def __getitem__(self, step):
        rng = np.random.default_rng([self.seed, step])
        batch = np.empty((self.rows, self.length + 2), np.int64)
        for row in batch:
            at = 0
            while at < len(row):
                d = self.draw(rng)[: len(row) - at]
                row[at:at + len(d)] = d; at += len(d)
        return batch
