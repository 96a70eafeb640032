#!/usr/bin/env python3
"""Makes tests/golden/text/: what the `tokenizers` package and Jinja (set up as in transformers) give.

Needs tokenizers, transformers and jinja2, and ../shared beside the repository; writes only derived data (token ids,
hashes, renderings of conversations written here) and a small tokenizer trained on the sentences below.
"""
import copy
import json
import lzma
import random
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers.utils.chat_template_utils import _compile_jinja_template

REPO = Path(__file__).resolve().parent.parent
SHARED = REPO.parent / "shared"
OUT = REPO / "tests" / "golden" / "text"

PATTERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
           r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CONTROL = ["endoftext", "im_start", "im_end", "object_ref_start", "object_ref_end", "box_start", "box_end", "quad_start",
           "quad_end", "vision_start", "vision_end", "vision_pad", "image_pad", "video_pad"]
PLAIN = ["<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
         "<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]

SENTENCES = """
The miller had three sons, and when he died the youngest got nothing but the cat. "Don't worry," said the cat, "I'll see
to it that you're happy." They walked through the forest, over the hills and down to the river, where the king's coach
would pass at 10:45. It's a long story; we've told it before, and she'd heard it twice. What was the weather like? It was
raining, and the rain was falling on the roof, on the road and on the sea. Nobody knows how many people were there: 12,
345 or 6789? They'd counted them again and again, but I'm sure that they can't count. The water was cold and the night
was long, so the children were telling each other stories about the moon, the stars and the singing stones.
Der Müller hatte drei Söhne, und als er starb, bekam der jüngste nur den Kater. Straße, Größe, Übermut und Äpfel.
Il était une fois un meunier qui avait trois fils; à sa mort, le plus jeune reçut le chat. Où est-il allé, là-bas?
El molinero tenía tres hijos. ¿Qué hizo el más pequeño? ¡Se llevó el gato al río y habló con el rey!
У мельника было три сына, и младшему достался только кот. Не горюй, сказал кот, всё будет хорошо.
磨坊主有三个儿子，最小的只得到了一只猫。别担心，猫说，一切都会好的。 粉屋には三人の息子がいました。ネコは言いました。
방앗간 주인에게는 세 아들이 있었습니다. كان للطحان ثلاثة أبناء. לטוחן היו שלושה בנים. คนโม่แป้งมีลูกชายสามคน
int main() { for (int i = 0; i < 10; ++i) { printf("%d\\n", i * i); } return 0; }   // the squares
def square(x):\n    return x * x\n\nclass Cat(object):\n    def __init__(self, name):\n        self.name = name
""".strip()

HARD = [
    "", " ", "a", "Hello, world!", "It's I'M we'Re THEY'VE he'll she'D don't 'tis 'S'", "x'sy 'll'l 'R 're' ''s",
    "'\u017f it'\u017fx", "1234567890 3.14159 1,000,000 ²³½Ⅷ ٣٤", "a\r\nb\r\n\r\nc\rd\n\n\ne", "end. \n\n next", "!!!\n\n\nx",
    "   leading", "trailing   ", "a  b   c    d", " \n \n  x", "\t\ttabs\tand spaces \t x", "nb\u00a0sp \u00a0\u00a0x",
    "\u3000全角\u3000", "line\u2028sep\u2029par\u0085nel", "zero\u200bwidth\ufeffbom", "e\u0301 e\u0323\u0301 e\u0301\u0323",
    "A\u030a \u212b \u00c5", "q\u0307\u0323", "\u1112\u1161\u11ab\u1100\u1173\u11af 한글", "\u0958 \u0915\u093c क़",
    "\u0344 \u0340\u0341 \u2126", "\u0061\u0334\u0323\u0301\u0300", "ﬁ ﬀ ŉ ǆ ①", "สวัสดีชาวโลก ก็ที่นี่", "नमस्ते दुनिया क्षत्रिय",
    "你好，世界！", "日本語のテキスト、ｶﾀｶﾅ", "Привет, мир! Ёлка", "שלום עולם", "مرحبا بالعالم ﷺ", "Ελληνικά ά ΐ",
    "👩\u200d👩\u200d👧\u200d👦 👍🏽 🇩🇪🇫🇷 ❤️", "\U0002ebf0\U00016d40\U00010d40 new", "\U000e0001\U0010ffff\ue000",
    "<|im_start|>user\nhi<|im_end|>\n", "<|im_start|", "<<|im_end|>>", "<think>\nso\n</think>\n\nx", "<tool_call> </tool_call>",
    "<|fim_prefix|>a<|fim_suffix|>b<|fim_middle|>", "a <think> b", "<think>\u0338", "<|endoftext|><|endoftext|>",
    "<tool_response>\n{}\n</tool_response>", "http://example.org/a?b=c&d=%20#e", "x = {'a': [1, 2], \"b\": None}\n",
    "for(int i=0;i<10;++i){\n\tprintf(\"%d\\n\",i);\n}\n", "\x00\x01\x7f\x80\x9f", "ı İ ẞ ß", "naïve café résumé", "a" * 200,
    " " * 100, "\n" * 70, "ab" * 100, "\u0301" * 60, "😀" * 30, "don't" * 20, "-" * 81, "=" * 64 + "\n", "0" * 40, "\u064b\u0651",
]


def fnv(data, value=0xCBF29CE484222325):
    for byte in data:
        value = ((value ^ byte) * 0x100000001B3) & 0xFFFFFFFFFFFFFFFF
    return value


def hash_ids(ids):
    return "%016x" % fnv(b"".join(i.to_bytes(4, "little") for i in ids))


def save(name, value):
    (OUT / name).write_text(json.dumps(value, ensure_ascii=True, indent=None, separators=(",", ":"))
                            .replace('},{"', '},\n{"') + "\n")


def train_small():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=False, use_regex=False)])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=1000, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
                                  show_progress=False)
    tokenizer.train_from_iterator(SENTENCES.split("\n"), trainer)
    tokenizer.add_special_tokens([AddedToken(f"<|{t}|>", normalized=False, special=True) for t in CONTROL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in PLAIN])
    tokenizer.save(str(OUT / "tokenizer.json"))


def encodings(source, texts):
    """Ids with control tokens as text and, where they differ, parsed."""
    as_text, parse = Tokenizer.from_str(source), Tokenizer.from_str(source)
    as_text.encode_special_tokens = True
    cases = []
    for text in texts:
        case = {"text": text, "ids": as_text.encode(text, add_special_tokens=False).ids}
        parsed = parse.encode(text, add_special_tokens=False).ids
        if parsed != case["ids"]:
            case["parsed"] = parsed
        cases.append(case)
    return cases


def make_tokenizer_goldens():
    train_small()
    small = (OUT / "tokenizer.json").read_text()
    real = (SHARED / "tokenizer" / "tokenizer.json").read_text()
    save("small_ids.json", encodings(small, HARD + SENTENCES.split("\n")))
    save("qwen_ids.json", encodings(real, HARD))
    normalized = json.loads(small)
    for token in normalized["added_tokens"]:
        token["normalized"] = True
    save("normalized_ids.json", encodings(json.dumps(normalized),
                                          ["<think>\u0338", "a<think>b<|im_end|>e\u0301", "e\u0301<|im_end|>\u0301"]))
    with lzma.open(SHARED / "corpus" / "udhr" / "udhr.jsonl.xz", "rt") as file:
        texts = [json.loads(line) for line in file]
    tokenizer = Tokenizer.from_str(real)
    udhr = {}
    for text in texts:
        ids = tokenizer.encode(text["text"], add_special_tokens=False).ids
        udhr[text["lang"]] = [len(ids), hash_ids(ids)]
    save("udhr.json", udhr)


def make_unicode_goldens():
    """One hash over all code points for each question that text/unicode.hpp answers."""
    codes = [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    classes = dict.fromkeys(codes, "o")
    for name, pattern in (("l", r"\p{L}"), ("n", r"\p{N}"), ("s", r"\s")):
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        for begin in range(0, len(codes), 4096):
            text = "".join(chr(c) + "\x00" for c in codes[begin:begin + 4096])
            for piece, _ in split.pre_tokenize_str(text):
                if len(piece) == 1 and piece != "\x00":
                    classes[ord(piece)] = name
    nfc = normalizers.NFC().normalize_str
    value = 0xCBF29CE484222325
    for c in codes:
        value = fnv(nfc("e" + chr(c) + "\u0334\u0323\u0301\u1100" + chr(c) + "\u1161" + chr(c)).encode(), value)
    save("unicode.json", {"classes": "%016x" % fnv("".join(classes[c] for c in codes).encode()), "nfc": "%016x" % value})


TOOL = {"type": "function", "function": {"name": "get_weather", "description": "Weather at a place \u2013 now",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": 1}},
                       "required": ["city"]}}}


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text):
    return {"role": "tool", "content": text}


def call(name, arguments, wrapped=True):
    inner = {"name": name, "arguments": arguments}
    return {"id": "c1", "type": "function", "function": inner} if wrapped else inner


SANE = [  # what well-behaved clients send: our own template must agree on these
    ([user("Hi")], None),
    ([{"role": "system", "content": "Be brief."}, user("Hi"), assistant("Hello!"), user("Why?")], None),
    ([user("Weather in Zürich?")], [TOOL]),
    ([{"role": "system", "content": "S"}, user("Weather?"), assistant("", tool_calls=[call("get_weather", {"city": "Zürich", "days": 2})]),
      tool("sunny"), assistant("Sunny.")], [TOOL, TOOL]),
    ([user("Two"), assistant("Looking.", tool_calls=[call("f", {"x": 1.0}), call("g", '{"raw": true}', False)]),
      tool("one"), tool("two"), assistant("Done"), user("Thanks")], [TOOL]),
    ([user("u"), {"role": "system", "content": "late system"}, user("v")], None),
    ([user("u"), assistant("a", tool_calls=[call("f", {})]), tool("last")], [TOOL]),
    ([user("日本語 😀\n\n"), assistant("\n\nx\n")], None),
    ([user("q"), assistant("a", tool_calls=[])], []),
]

ODD = [
    ([user("q"), assistant("<think>\nold\n</think>\n\nanswer"), user("r")], None),
    ([user("q"), assistant("<think>\nnew\n</think>\n\nanswer")], None),
    ([user("q"), assistant("answer", reasoning_content="\n\nbecause\n\n")], None),
    ([user("q"), assistant("\n\nanswer", reasoning_content="")], None),
    ([user("q"), assistant("a", reasoning_content=None), tool("t"), assistant("b", reasoning_content="r"), tool("u")], None),
    ([user("q"), assistant("first", reasoning_content="r1", tool_calls=[call("f", {"a": [1, 2.5, None]})]), tool("t"),
      assistant("second", reasoning_content="r2")], [TOOL]),
    ([user("q"), assistant("x</think>y</think>\n\nz<think>w")], None),
    ([user("q"), assistant("no close <think> here")], None),
    ([user("<tool_response>\nfake\n</tool_response>"), assistant("a", reasoning_content="kept?")], None),
    ([user("real"), user("<tool_response>x</tool_response>"), assistant("a", reasoning_content="kept")], None),
    ([tool("orphan")], None),
    ([tool("a"), tool("b"), user("c"), tool("d")], None),
    ([assistant("starts")], None),
    ([user(None), user([{"type": "text", "text": "x"}]), {"role": "user"}, user(3), user({"a": 1})], None),
    ([assistant(None, tool_calls=[call("f", None), call(None, [1, "é\n\"\\", {"k": False}])])], None),
    ([assistant("c", tool_calls=[{"function": {}, "name": "outer", "arguments": {"n": 1e-05, "m": 1e16, "o": -0.0}}])], None),
    ([assistant("c", tool_calls=[call("f", {"big": 123456789012345678901234567890, "i": -2**63, "u": 2**64 - 1, "e": 1e22,
                                            "p": 123456.789, "s": 5e-324, "z": 0.0001, "y": 1e15})])], None),
    ([assistant("", tool_calls=[{"arguments": {}}, {"name": 1.0, "arguments": ""}, {"name": ["it's", 'q"', "\u200b\n", True], "arguments": 0}])], None),
    ([{"role": "developer", "content": "dropped"}, user("x"), {"content": "no role"}, {"role": None}, {"role": 5}], None),
    ([user("x")], [{"b": 1, "a": {"z": [], "y": {}}, "\u00fc": "\x01\x1f\x7f\u2028/", "q": "\"\\\b\f\r\t"}]),
    ([{"role": "system", "content": ""}, user("empty system")], None),
    ([{"role": "system", "content": ""}, user("empty system")], [TOOL]),
    ([user("a"), assistant("b", tool_calls=0), assistant("c", tool_calls=None), assistant("d", tool_calls={})], None),
    # refused by Jinja
    ([], None), ([], [TOOL]),
    ([{"role": "system", "content": None}], None),
    ([{"role": "system"}], [TOOL]),
    ([{"role": "system", "content": [{"type": "text", "text": "x"}]}], None),
    ([{"role": "system", "content": 5}], None),
    ([assistant("a", tool_calls=[{"name": "f"}])], None),
    ([assistant("a", tool_calls=[{"function": {"name": "f"}, "arguments": 1}])], None),
    ([assistant("a", tool_calls=[None])], None),
    ([assistant("a", tool_calls="f")], None),
    ([assistant("a", tool_calls=True)], None),
    ([assistant("a", tool_calls={"name": "f", "arguments": {}})], None),
    ([assistant("a", tool_calls=[{"function": "f", "name": "g", "arguments": {}}])], None),
]


def random_conversation(rng):
    parts = ["hello", "Grüße", "\n", "\n\n", "<think>", "</think>", "<tool_response>", "</tool_response>", "\n</think>\n\n",
             "<|im_end|>", '"', "\\", "你好", "😀"]

    def text():
        return "".join(rng.choice(parts) for _ in range(rng.randrange(5)))

    messages = []
    for _ in range(rng.randrange(1, 7)):
        message = {"role": rng.choice(["user", "assistant", "assistant", "tool", "tool", "system"]), "content": text()}
        if rng.random() < 0.3:
            message["reasoning_content"] = rng.choice([text(), None, 1])
        if rng.random() < 0.3:
            message["tool_calls"] = [call(text(), rng.choice([{"k": text()}, text(), rng.random()]), rng.random() < 0.7)
                                     for _ in range(rng.randrange(3))]
        messages.append(message)
    return messages, rng.choice([None, [TOOL]])


def render(template, messages, tools, prompt):
    try:
        return template.render(messages=messages, tools=tools, documents=None, add_generation_prompt=prompt)
    except Exception:  # Jinja's and Python's own: the library must refuse too
        return None


def make_template_goldens():
    templates = {kind: _compile_jinja_template((SHARED / "tokenizer" / f"chat_template.{kind}.jinja").read_text())
                 for kind in ("instruct", "thinking")}
    rng = random.Random(20240911)
    cases = []
    for i, (messages, tools) in enumerate(SANE + ODD + [random_conversation(rng) for _ in range(24)]):
        prompt = i % 4 != 3
        case = {"messages": messages, "tools": tools, "add_generation_prompt": prompt}
        for kind, template in templates.items():
            case[kind] = render(template, copy.deepcopy(messages), tools, prompt)
        cases.append(case)
    save("conversations.json", cases)
    own = REPO / "weights" / "tiny" / "chat_template.jinja"
    if own.exists():
        template = _compile_jinja_template(own.read_text())
        for messages, tools in SANE:
            for prompt in (False, True):
                expected = render(templates["instruct"], messages, tools, prompt)
                assert render(template, messages, tools, prompt) == expected, f"{own} renders {messages} differently"


if __name__ == "__main__":
    OUT.mkdir(parents=True, exist_ok=True)
    make_tokenizer_goldens()
    make_unicode_goldens()
    make_template_goldens()
    print("wrote", OUT, sum(f.stat().st_size for f in OUT.iterdir()), "bytes")
