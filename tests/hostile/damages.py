"""What can be wrong with a checkpoint: ways to damage one, each a function of a random generator and a folder that says what
it did.  HF and GGUF list them by container, the likelier ones twice.
"""

import json
import math
import os
import struct

from containers import ARRAY, STRING, Gguf, Safetensors

HUGE = [0, 1, 2, 31, 255, 4097, 65535, 10**6, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**40, 2**53, 2**62, 2**63 - 1,
        2**63, 2**64 - 1]


# ---- damage to bytes ------------------------------------------------------------------------------------------------

def where(rng, size):
    """A position: mostly in the first kilobytes, where the lengths and counts are."""
    limit = rng.choice([64, 512, 4096, 32768, size])
    return rng.randrange(max(1, min(limit, size)))


def truncate(rng, raw):
    del raw[rng.choice([0, 1, 7, 8, 9, where(rng, len(raw)), len(raw) - 1, len(raw) // 2]):]


def flip_bits(rng, raw):
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        raw[where(rng, len(raw))] ^= 1 << rng.randrange(8)


def put_number(rng, raw):
    at, value = where(rng, len(raw)) & ~3, rng.choice(HUGE)
    raw[at:at + 8] = struct.pack("<Q", value) if rng.random() < 0.5 else struct.pack("<I", value % 2**32)


def remove_range(rng, raw):
    at = where(rng, len(raw))
    del raw[at:at + rng.choice([1, 3, 8, 32, 1000])]


def insert_range(rng, raw):
    at = where(rng, len(raw))
    raw[at:at] = rng.randbytes(rng.choice([1, 3, 8, 32, 1000]))


def repeat_range(rng, raw):
    at, size = where(rng, len(raw)), rng.choice([8, 64, 1000])
    raw[at:at] = raw[at:at + size]


def clear_range(rng, raw):
    at, size = where(rng, len(raw)), rng.choice([4, 64, 1000])
    raw[at:at + size] = bytes([rng.choice([0, 255, 91, 123, 34])]) * min(size, len(raw) - at)


def append(rng, raw):
    raw += rng.randbytes(rng.choice([1, 32, 4096]))


def swap_ranges(rng, raw):
    size = rng.choice([4, 8, 64])
    a, b = where(rng, len(raw)), where(rng, len(raw))
    raw[a:a + size], raw[b:b + size] = raw[b:b + size], raw[a:a + size]


BYTES = [truncate, flip_bits, put_number, remove_range, insert_range, repeat_range, clear_range, append, swap_ranges]


# ---- damage to JSON -------------------------------------------------------------------------------------------------

def odd_value(rng):
    deep = rng.choice([100, 1000, 100000])
    return rng.choice([*HUGE, -1, -2**63, 0.5, 1e308, -0.0, None, True, "", "x" * 100000, [], {}, [[]], "\u0000", "4"] +
                      [Raw("[" * deep + "]" * deep), Raw('{"a":' * deep + "1" + "}" * deep), Raw("1e999"), Raw("NaN"),
                       Raw("1" * 400), Raw('"\xff\xfe"'), Raw('"\\ud800"'), Raw("[" * deep)])


class Raw(str):
    """Text that stands in the JSON as it is, well-formed or not."""


def dump(value):
    """JSON with Raw values; in Latin-1, so that bytes that are no UTF-8 can be written."""
    raws = []

    def mark(v):
        if isinstance(v, Raw):
            raws.append(v)
            return f"@raw{len(raws) - 1}@"
        if isinstance(v, dict):
            return {k: mark(x) for k, x in v.items()}
        return [mark(x) for x in v] if isinstance(v, list) else v

    text = json.dumps(mark(value), ensure_ascii=True)
    for i, raw in enumerate(raws):
        text = text.replace(f'"@raw{i}@"', raw)
    return text.encode("latin-1")


def damage_json(rng, value):
    """Something, somewhere inside, is another value, missing or doubled."""
    at = value
    for _ in range(rng.choice([0, 0, 0, 1, 2, 6])):
        children = at.values() if isinstance(at, dict) else at
        inner = [x for x in children if isinstance(x, (dict, list)) and x]
        if not inner:
            break
        at = rng.choice(inner)
    key = rng.choice(list(at)) if isinstance(at, dict) else rng.randrange(len(at))
    action = rng.randrange(5)
    if action == 0:
        del at[key]
    elif action == 1 and isinstance(at, list):
        at.extend(at[:1000])
    elif action == 2 and isinstance(at, dict):
        at[rng.choice(["", "a" * 10000, "rope_parameters", "layer_types", "quantization_config"])] = odd_value(rng)
    else:
        at[key] = odd_value(rng)
    return value


# ---- damage to a Hugging Face folder --------------------------------------------------------------------------------

def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def hf_bytes(rng, folder):
    path = rng.choice([p for p in folder.iterdir() if p.suffix in (".json", ".safetensors")])
    raw = bytearray(path.read_bytes())
    damage = rng.choice(BYTES)
    damage(rng, raw)
    path.write_bytes(raw)
    return f"{damage.__name__} in {path.name}"


def hf_json(rng, folder):
    path = rng.choice([p for p in folder.iterdir() if p.suffix == ".json"] + [folder / "config.json"] * 3)
    path.write_bytes(dump(damage_json(rng, json.loads(path.read_text()))))
    return f"values of {path.name}"


def hf_config(rng, folder):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    keys = [k for k, v in config.items() if isinstance(v, (int, float))]
    chosen = rng.sample(keys, rng.choice([1, 1, 2, 4]))
    for key in chosen:
        config[key] = rng.choice(HUGE + [-1, 0.5, 4096, 65536])
    path.write_text(json.dumps(config))
    return f"config {', '.join(chosen)}"


def hf_header(rng, folder):
    path = rng.choice(shards(folder))
    st = Safetensors.parse(path.read_bytes())
    names = [n for n in st.header if n != "__metadata__"]
    name = rng.choice(names)
    entry = st.header[name]
    begin, end = entry["data_offsets"]
    actions = {
        "dtype": lambda: entry.update(dtype=rng.choice(["F64", "I8", "BOOL", "F8_E4M3", "F4", "F16", "F32", "X", ""])),
        "no dimension": lambda: entry.update(shape=[]),
        "odd shape": lambda: entry.update(shape=[rng.choice(HUGE) for _ in range(rng.choice([1, 2, 3, 9]))]),
        "zero": lambda: entry.update(shape=[0, *entry["shape"]], data_offsets=[begin, begin]),
        "transposed": lambda: entry.update(shape=entry["shape"][::-1]),
        "offsets": lambda: entry.update(data_offsets=[rng.choice(HUGE), rng.choice(HUGE)]),
        "reversed": lambda: entry.update(data_offsets=[end, begin]),
        "shifted": lambda: entry.update(data_offsets=[begin + 1, end + 1]),
        "overlap": lambda: entry.update(data_offsets=st.header[rng.choice(names)]["data_offsets"]),
        "renamed": lambda: st.header.update({rng.choice(["", "x" * 5000, "lm_head.weight", "\u00e9\n"]):
                                             st.header.pop(name)}),
        "lost": lambda: st.header.pop(name),
        "doubled": lambda: setattr(st, "text", json.dumps(st.header).encode()[:-1] + b", " +
                                   json.dumps({name: entry}).encode()[1:]),
        "values": lambda: setattr(st, "text", dump(damage_json(rng, st.header))),
        "length": lambda: setattr(st, "length", rng.choice(HUGE)),
        "metadata": lambda: st.header.update(__metadata__=odd_value(rng)) or setattr(st, "text", dump(st.header)),
    }
    action = rng.choice(list(actions))
    actions[action]()
    path.write_bytes(st.pack())
    return f"{action}: {name} of {path.name}"


ODD_NUMBERS = {
    "NaN": lambda n: b"\xff" * n, "infinity": lambda n: b"\x00\x00\x80\x7f" * (n // 4),
    "huge": lambda n: b"\xff\xff\x7f\x7f" * (n // 4), "bf16 huge": lambda n: b"\x7f\x7f" * (n // 2),
    "f16 huge": lambda n: b"\xff\x7b" * (n // 2), "bf16 infinity": lambda n: b"\x80\x7f" * (n // 2),
    "minus infinity": lambda n: b"\x80\xff" * (n // 2), "zero": bytes,
}


def odd_data(rng, data, begin, end):
    kind = rng.choice(list(ODD_NUMBERS))
    if rng.random() < 0.4:  # a few numbers, not all
        begin += rng.randrange(max(1, end - begin)) & ~3
        end = min(end, begin + rng.choice([4, 4, 64]))
    fill = ODD_NUMBERS[kind](end - begin)
    data[begin:begin + len(fill)] = fill
    return kind


def hf_data(rng, folder):
    path = rng.choice(shards(folder))
    st = Safetensors.parse(path.read_bytes())
    names = [n for n in st.header if n != "__metadata__"]
    chosen = rng.choice([names, [n for n in names if "gate.weight" in n or "norm" in n or "A_log" in n] or names])
    name = rng.choice(chosen)
    kind = odd_data(rng, st.data, *st.header[name]["data_offsets"])
    path.write_bytes(st.pack())
    return f"{kind} in {name}"


def hf_index(rng, folder):
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        names = [n for n in Safetensors.parse((folder / "model.safetensors").read_bytes()).header if n != "__metadata__"]
        (folder / "model.safetensors").rename(folder / "model-1.safetensors")
        index = {"metadata": {}, "weight_map": {n: "model-1.safetensors" for n in names}}
    else:
        index = json.loads(path.read_text())
    names = list(index["weight_map"])
    odd = rng.choice(["../model.safetensors", "/etc/passwd", "..", ".", "", "config.json", "missing.safetensors", "a" * 300,
                      "a/b", "\\x", "x\u0000y", "/dev/zero", "model.safetensors.index.json", 7, None, ["x"], Raw('"\xff"')])
    for name in rng.choice([names, names[:1]]):
        index["weight_map"][name] = odd
    if rng.random() < 0.2:
        index = rng.choice([[], {}, {"weight_map": {}}, {"weight_map": []}, {"weight_map": odd}])
    path.write_bytes(dump(index))
    return f"index names {odd!r:.40}"


def text_files(rng, folder):
    name, text = rng.choice([
        ("chat_template.jinja", b"{{" * 100000), ("chat_template.jinja", b"{% if x %}" * 50000), ("chat_template.jinja", b""),
        ("chat_template.jinja", bytes(range(256)) * 10), ("tokenizer.json", b"[" * 1000000), ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"), ("generation_config.json", b'{"eos_token_id": [' + b"1," * 100000 + b"1]}"),
        ("generation_config.json", b'{"temperature": 1e308, "top_k": -5, "eos_token_id": -1}'),
        ("generation_config.json", b'{"top_p": 0, "min_p": 7, "repetition_penalty": 1e-300}'),
        ("tokenizer_config.json", b'{"chat_template": [{"name": 1}]}'), ("config.json", b'{"a":' * 1000000)])
    (folder / name).write_bytes(text)
    return f"{name} is {text[:20]!r}"


def hf_tokenizer(rng, folder):
    path = folder / "tokenizer.json"
    t = json.loads(path.read_text())
    vocab, merges, added = t["model"]["vocab"], t["model"]["merges"], t["added_tokens"]
    many = 30000
    actions = {
        "huge id": lambda: vocab.update({rng.choice(list(vocab)): rng.choice(HUGE)}),
        "huge added id": lambda: rng.choice(added).update(id=rng.choice(HUGE)),
        "shared id": lambda: vocab.update({rng.choice(list(vocab)): 5}),
        "odd merge": lambda: merges.insert(0, rng.choice(["", " ", "a", "a b c", "zz zz", "\u00e9 x", ["a"], ["a", "b", "c"]])),
        "doubled merge": lambda: merges.append(merges[0]),
        "many added": lambda: added.extend(dict(added[-1], id=400 + i, content=f"<{i}>") for i in range(many)),
        "long added": lambda: rng.choice(added).update(content="x" * 1000000),
        "empty added": lambda: rng.choice(added).update(content=""),
        "lost bytes": lambda: [vocab.pop(k) for k in rng.sample(list(vocab), len(vocab) // 2)],
        "no merges": merges.clear,
        "values": lambda: damage_json(rng, t),
    }
    action = rng.choice(list(actions))
    actions[action]()
    path.write_bytes(dump(t))
    return f"tokenizer: {action}"


def file_system(rng, folder):
    """A file that is none, for any input: `folder` is a checkpoint folder or that of a GGUF."""
    path = rng.choice([p for p in sorted(folder.iterdir()) if p.is_file()])
    path.unlink()
    kind = rng.choice(["missing", "folder", "loop", "dangling", "fifo", "zeros", "null", "empty", "locked", "text"])
    if kind == "folder":
        path.mkdir()
    elif kind == "loop":
        path.symlink_to(path.name)
    elif kind == "dangling":
        path.symlink_to("nowhere")
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "zeros":
        path.symlink_to("/dev/zero")
    elif kind == "null":
        path.symlink_to("/dev/null")
    elif kind == "empty":
        path.touch()
    elif kind == "locked":
        path.touch(mode=0)
    elif kind == "text":
        path.write_text("hello " * 100)
    return f"{kind}: {path.name}"


# ---- damage to a GGUF -----------------------------------------------------------------------------------------------

def gguf_files(folder):
    return sorted(folder.glob("*.gguf"))


def gguf_bytes(rng, folder):
    path = rng.choice(gguf_files(folder))
    raw = bytearray(path.read_bytes())
    damage = rng.choice(BYTES)
    damage(rng, raw)
    path.write_bytes(raw)
    return f"{damage.__name__} in {path.name}"


def gguf_parts(rng, folder):
    path = rng.choice(gguf_files(folder))
    g = Gguf.parse(path.read_bytes())
    t = rng.choice(g.tensors)
    arrays = [k for k in g.keys if k[1] == ARRAY] or [[b"a", ARRAY, [4, 0, []]]]
    array = rng.choice(arrays)

    def shape():
        t.ne[rng.randrange(len(t.ne))] = rng.choice(HUGE)

    def dimensions():
        t.ne[:] = rng.choice([[], [0], t.ne + [1], t.ne * 3, [t.ne[0]], t.ne[::-1], [2**32, 2**32], [2**63, 2]])

    actions = {
        "tensor count": lambda: setattr(g, "tensor_count", rng.choice(HUGE)),
        "key count": lambda: setattr(g, "key_count", rng.choice(HUGE)),
        "version": lambda: setattr(g, "version", rng.choice([0, 1, 2, 4, 0x03000000, 2**32 - 1])),
        "shape": shape, "dimensions": dimensions,
        "type": lambda: setattr(t, "type", rng.choice([*range(45), 2**32 - 1])),
        "offset": lambda: setattr(t, "offset", rng.choice([*HUGE, t.offset + 1, t.offset + 32, t.offset - 32])),
        "overlap": lambda: setattr(t, "offset", rng.choice(g.tensors).offset),
        "doubled name": lambda: setattr(t, "name", rng.choice(g.tensors).name),
        "renamed": lambda: setattr(t, "name", rng.choice([b"", b"x" * 5000, b"\xff\n", b"blk.0.nextn.eh_proj.weight"])),
        "lost": lambda: g.tensors.remove(t),
        "array count": lambda: array[2].__setitem__(1, rng.choice(HUGE)),
        "array type": lambda: array[2].append(rng.choice([*range(14), 2**32 - 1])),
        "doubled key": lambda: g.keys.append(rng.choice(g.keys)),
        "lost key": lambda: g.keys.remove(rng.choice(g.keys)),
        "alignment": lambda: g.keys.append([b"general.alignment", 4, rng.choice(HUGE)]),
        "no data": lambda: g.data.clear(),
    }
    action = rng.choice(list(actions))
    actions[action]()
    path.write_bytes(g.pack())
    return f"{action}: {t.name.decode(errors='replace'):.40} of {path.name}"


def gguf_metadata(rng, folder):
    path = gguf_files(folder)[0]
    g = Gguf.parse(path.read_bytes())
    chosen = rng.sample([k for k in g.keys if k[1] not in (STRING, ARRAY) or rng.random() < 0.3], rng.choice([1, 1, 2, 4]))
    for key in chosen:
        if rng.random() < 0.7 and key[1] not in (STRING, ARRAY):
            if key[1] in (6, 12):
                key[2] = rng.choice([0.0, -1.0, math.nan, math.inf, 1e30, 1e-30])
            else:
                key[1:] = rng.choice([[4, rng.choice(HUGE)], [10, rng.choice(HUGE)], [11, -1], [5, -2**31]])
        else:
            key[1:] = rng.choice([[6, math.nan], [7, 2], [STRING, b"x" * 100000], [STRING, b"\xff"], [ARRAY, [4, 1, [1]]],
                                  [ARRAY, [STRING, 2, [b"", b"a"]]], [ARRAY, [7, 0, []]]])
    path.write_bytes(g.pack())
    return f"metadata {', '.join(k[0].decode() for k in chosen)}"


def gguf_tokenizer(rng, folder):
    path = gguf_files(folder)[0]
    g = Gguf.parse(path.read_bytes())
    tokens, types, merges = (g.key("tokenizer.ggml." + k)[2] for k in ("tokens", "token_type", "merges"))
    template = g.key("tokenizer.chat_template")

    def resize(array, n):
        array[2] = (array[2] * (n // len(array[2]) + 1))[:n]
        array[1] = n

    actions = {
        "types": lambda: types.__setitem__(2, [rng.choice([1, 3, 4, 5, 6]) for _ in types[2]]),
        "odd types": lambda: types[2].__setitem__(rng.randrange(len(types[2])), rng.choice([0, 7, -1, 2**31 - 1])),
        "few tokens": lambda: resize(tokens, 10),
        "many tokens": lambda: (resize(tokens, 100000), resize(types, 100000)),
        "many added tokens": lambda: (tokens.__setitem__(2, [b"a%d" % i for i in range(50000)]),
                                      types.__setitem__(2, [4] * 50000), tokens.__setitem__(1, 50000),
                                      types.__setitem__(1, 50000)),
        "token": lambda: tokens[2].__setitem__(rng.randrange(300), rng.choice([b"", b"\xff\xfe", b" ", b"a", b"x" * 10**6])),
        "merge": lambda: merges[2].__setitem__(0, rng.choice([b"", b" ", b"a", b"a b c", b"\xff \xff", b"zz zz"])),
        "many merges": lambda: resize(merges, 100000),
        "template": lambda: template.__setitem__(2, rng.choice([b"{{" * 10**6, b"{% raw %}" * 10**5, b"", b"\xff" * 1000])),
    }
    action = rng.choice(list(actions))
    actions[action]()
    path.write_bytes(g.pack())
    return f"tokenizer: {action}"


def gguf_data(rng, folder):
    path = rng.choice(gguf_files(folder))
    g = Gguf.parse(path.read_bytes())
    order = sorted(g.tensors, key=lambda t: t.offset)
    i = rng.randrange(len(order))
    end = order[i + 1].offset if i + 1 < len(order) else len(g.data)
    kind = odd_data(rng, g.data, order[i].offset, end)
    path.write_bytes(g.pack())
    return f"{kind} in {order[i].name.decode()}"


HF = [hf_bytes, hf_bytes, hf_json, hf_config, hf_header, hf_header, hf_data, hf_index, hf_tokenizer, text_files, file_system]
GGUF = [gguf_bytes, gguf_bytes, gguf_parts, gguf_parts, gguf_metadata, gguf_tokenizer, gguf_data, file_system]
