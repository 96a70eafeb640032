#!/usr/bin/env python3
"""Writes docs/api.md, the reference of the library's public names, out of their headers.

    usage: tools/make_api_reference.py            writes docs/api.md
           tools/make_api_reference.py --check    fails if it is not what the headers say

Understands this code's own way of writing: a comment above a declaration, or at its end, belongs to it; a comment above
several declarations without an empty line between them belongs to all.  A public function or type without a comment is
an error: whoever adds one documents it.
"""

import dataclasses
import pathlib
import re
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent
REFERENCE = ROOT / "docs/api.md"

# Section: headers and the names out of them, in the order of the reference.
SECTIONS = [
    ("Opening a model", [
        ("qwen3next.hpp", ["Model", "Options"]),
        ("backends/backend_kind.hpp", ["Backend"]),
        ("generate/engine.hpp", ["available_isas"]),
        ("model/memory_plan.hpp", ["MemoryPlan"]),
        ("weights/checkpoint.hpp", ["Checkpoint"]),
        ("model/config.hpp", ["Config", "LayerType", "YarnScaling"]),
    ]),
    ("Sessions", [
        ("qwen3next.hpp", ["Session", "SessionOptions", "Snapshot", "Turn", "decode_together"]),
        ("generate/reuse.hpp", ["Reuse", "describe"]),
        ("generate/prefix_cache.hpp", ["PrefixStatistics"]),
        ("backends/backend.hpp", ["KvType"]),
        ("generate/engine.hpp", ["Progress", "LogitsSink"]),
    ]),
    ("Generating", [
        ("generate/generate.hpp", ["GenerateOptions", "OnText", "Generated", "StopReason"]),
        ("generate/sampler.hpp", ["Sampling", "Sampler"]),
    ]),
    ("Conversations", [
        ("generate/chat.hpp", ["Answer", "OnEvent"]),
        ("text/tool_calls.hpp", ["AnswerEvent"]),
        ("text/tool_call_syntax.hpp", ["ToolCall"]),
        ("text/chat_template.hpp", ["ChatTemplate", "TemplateKind"]),
    ]),
    ("Tokens", [
        ("text/tokenizer.hpp", ["Tokenizer", "Special", "Utf8Stream"]),
    ]),
    ("Quantising (`QWEN3NEXT_QUANTIZE`)", [
        ("generate/calibrate.hpp", ["calibrate", "CalibrationOptions"]),
        ("weights/quantize.hpp", ["Calibration", "quantize", "QuantizeOptions", "QuantizeProgress", "QuantizeSummary",
                                  "Fallback"]),
    ]),
    ("Errors", [
        ("core/error.hpp", ["Error", "Cancelled"]),
    ]),
]

INTRODUCTION = """\
# qwen3next: the API

Written by `tools/make_api_reference.py` out of the headers' own comments; do not edit. Everything is in namespace
`qwen3next` and comes with `#include "qwen3next.hpp"`, whose first screen says how to compile.
"""


class Trouble(Exception):
    pass


@dataclasses.dataclass
class Declaration:
    text: str  # without comments, bodies and initialiser lists; one line
    name: str
    above: list  # lines of the comment above it or its group
    trailing: str  # the comment at its end
    body: str = ""  # of a class, struct or enum
    members: list = dataclasses.field(default_factory=list)  # groups of declarations

    @property
    def doc(self):
        return [self.trailing] if self.trailing else self.above

    @property
    def is_type(self):
        return re.match(r"(class|struct|enum)\b", self.text) is not None

    @property
    def is_function(self):
        return not self.is_type and not self.text.startswith("using ") and "(" in self.text.split("=")[0]


def scan(text, where):
    """The groups of declarations in a namespace or class body: lists without an empty line or comment inside."""
    groups, group, comment, pos, public = [], [], [], 0, True

    def close():
        nonlocal group, comment
        if group and public:
            groups.append(group)
        group, comment = [], []

    while pos < len(text):
        line_end = text.find("\n", pos)
        line_end = len(text) if line_end < 0 else line_end
        line = text[pos:line_end].strip()
        if not line:
            close()
        elif line.startswith("//"):
            if group:
                close()
            if not re.match(r"// -{3,}", line):
                comment.append(re.sub(r"^// ?", "", line))
        elif line.startswith("#"):
            while line.endswith("\\"):
                line_end = text.find("\n", line_end + 1)
                line = text[pos:line_end].strip()
            close()
        elif label := re.match(r"(public|private|protected):", line):
            close()
            public = label[1] == "public"
        else:
            end, head, body = declaration(text, pos, where)
            rest = re.match(r"[ \t]*(//.*)?", text[end:])
            trailing = re.sub(r"^// ?", "", rest[1] or "")
            line_end = end + rest.end()
            while trailing and (more := re.match(r"\n( {24,}// ?)([^\n]*)", text[line_end:])):  # aligned below it
                trailing += " " + more[2]
                line_end += more.end()
            if made := make(head, body, comment, trailing):
                group.append(made)
        pos = line_end + 1
    close()
    return groups


def declaration(text, pos, where):
    """From `pos`: (end, the text before a body, the body)."""
    start, depth, head, body_begin, body = pos, 0, None, 0, ""
    while pos < len(text):
        c = text[pos]
        if text.startswith("//", pos):
            pos = text.index("\n", pos)
        elif c in "\"'" and not (c == "'" and text[pos - 1].isalnum()):
            pos += 1
            while text[pos] != c:
                pos += 2 if text[pos] == "\\" else 1
        elif c in "([{":
            if c == "{" and depth == 0 and head is None:
                head, body_begin = text[start:pos], pos + 1
            depth += 1
        elif c in ")]}":
            depth -= 1
            if c == "}" and depth == 0:
                body = body or text[body_begin:pos]
                following = text[pos + 1:].lstrip()[:1]
                if (function_like(head) or head.lstrip().startswith("namespace")) and following not in ("{", ",", ";"):
                    return pos + 1, head, body
        elif c == ";" and depth == 0:
            # A brace without a function before it initialised a variable: keep it.
            if head is not None and re.match(r"\s*(template\s*<[^{]*>\s*)?(class|struct|enum)\b", head):
                return pos + 1, head, body
            if head is not None and function_like(head):
                return pos + 1, head, body
            return pos + 1, text[start:pos], ""
        pos += 1
    raise Trouble(f"{where}: no end of the declaration {text[start:start + 60]!r}")


def function_like(head):
    return "(" in head and not re.match(r"\s*(class|struct|enum)\b", head)


def make(head, body, comment, trailing):
    text = " ".join(re.sub(r"//[^\n]*", "", head).split())
    text = re.sub(r"\) : \w+_\w*\(.*|\) : \w+_?\(.*", ")", text)  # constructors' initialisers
    text = text.replace("( ", "(")
    if re.match(r"(friend|namespace|static_assert|template|static constexpr|inline constexpr)\b", text) or "= delete" in text:
        return None
    text = re.sub(r"^inline ", "", text)
    if match := re.match(r"(?:class|struct|enum(?: class)?)\s+(\w+)", text):
        name = match[1]
    elif match := re.match(r"using (\w+)", text):
        name = match[1]
    elif text.startswith("using "):
        return None
    elif "(" in text.split("=")[0]:
        match = re.search(r"([\w~]+|operator\S+)\(", text)
        name = match[1] if match else text
    else:
        match = re.search(r"(\w+)\s*(?:=.*|\{.*)?$", text)
        name = match[1] if match else text
    return Declaration(text, name, list(comment), trailing, body)


def load(header):
    text = ROOT.joinpath(header).read_text(encoding="utf-8")
    bodies = re.findall(r"^namespace qwen3next \{\n(.*?)^\}  // namespace qwen3next$", text, re.M | re.S)
    found = {}
    for body in bodies:
        for group in scan(body, header):
            for item in group:
                if item.is_type and item.body and not item.text.startswith("enum"):
                    item.members = scan(item.body, f"{header}: {item.name}")
                found.setdefault(item.name, []).append(item)
    return found


def paragraph(doc):
    """Comment lines as Markdown: indented ones and those with gaps stay as they are."""
    out, code = [], False
    for line in doc:
        as_is = line.startswith("  ") and line.strip()
        if as_is and not code:
            out += ["", "```"] if out else ["```"]
        elif code and not as_is:
            out += ["```", ""]
        code = bool(as_is)
        out.append(line if as_is else re.sub(r"<(?=[|\w/])", r"\\<", line.replace("  ", " ")))
    return "\n".join(out + (["```"] if code else [])).strip()


def data_rows(item, doc):
    """A row for each variable of a declaration, as in `int a = 0, b = 0;`."""
    match = re.match(r"(?P<type>.*?[^,])\s+(?P<rest>\w+\s*(?:[={,].*)?)$", item.text)
    parts = re.split(r",\s*(?=\w+\s*(?:=|,|$))", match["rest"])
    escape = lambda s: s.replace("|", "\\|")
    for part in parts:
        name, value = re.match(r"(\w+)\s*(?:=\s*(.*)|\{(.*)\})?$", part).group(1, 2)
        yield (f"| `{name}` | `{escape(match['type'])}` | {f'`{escape(value)}`' if value else ''} "
               f"| {escape(paragraph(doc))} |")


def render_members(item, header):
    out, rows = [], []

    def flush():
        nonlocal rows
        if rows:
            out.extend(["", "| | type | default | |", "|---|---|---|---|", *rows])
        rows = []

    for group in item.members:
        variables = [m for m in group if not m.is_function and not m.is_type and not m.text.startswith("using")]
        if len(variables) > 1 and variables[0].above:
            flush()
            out += ["", paragraph(variables[0].above)]
        for variable in variables:
            doc = variable.doc if len(variables) == 1 else [variable.trailing]
            rows += data_rows(variable, doc)
        others = [m for m in group if m.is_function or m.is_type]
        others = [m for m in others if m.text != f"{item.name}()"]  # says nothing
        if not others:
            continue
        flush()
        docs = [others[0].above] if others[0].above else []
        docs += [[f"`{m.name}`: {m.trailing}" if len(others) > 1 else m.trailing] for m in others if m.trailing]
        if not docs and any(m.is_function for m in others):
            raise Trouble(f"{header}: {item.name}::{others[0].name} has no comment: say what it does, in what unit or "
                          "shape, and what it throws")
        out += ["", "```cpp", *[code(m) for m in others], "```", "\n\n".join(paragraph(d) for d in docs)]
    flush()
    return out


def code(item):
    if not item.is_type:
        return item.text + ";"
    body = item.body.strip()
    if "\n" not in body and "//" not in body:
        return f"{item.text} {{ {' '.join(body.split())} }};"
    return "\n".join([f"{item.text} {{", *("  " + line.strip() for line in body.split("\n")), "};"])


def render(item, header):
    out = ["", f"### {item.name}", "", f"`{header}`"]
    if not item.doc:
        raise Trouble(f"{header}: {item.name} has no comment: say what it is")
    if not item.is_type:
        return out + ["", "```cpp", item.text + ";", "```", paragraph(item.doc)]
    out += ["", paragraph(item.doc)]
    if item.text.startswith("enum"):
        return out + ["", "```cpp", code(item), "```"]
    return out + render_members(item, header)


def reference():
    lines, headers = [INTRODUCTION], {}
    for title, files in SECTIONS:
        names = [name for _, wanted in files for name in wanted]
        lines.append(f"- {title}: " + ", ".join(f"[{n}](#{n.lower()})" for n in names))
    for title, files in SECTIONS:
        lines += ["", f"## {title}"]
        for header, names in files:
            found = headers.setdefault(header, load(header))
            for name in names:
                if name not in found:
                    raise Trouble(f"{header}: no {name} there any more: correct SECTIONS in tools/make_api_reference.py")
                whole = [d for d in found[name] if d.body or not d.is_type]
                lines += render(whole[0], header)
    text = "\n".join(lines)
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


def main(arguments):
    if arguments not in ([], ["--check"]):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    try:
        text = reference()
    except Trouble as trouble:
        print(trouble, file=sys.stderr)
        return 1
    if arguments == ["--check"]:
        if not REFERENCE.is_file() or REFERENCE.read_text(encoding="utf-8") != text:
            print("docs/api.md is not what the headers say: run tools/make_api_reference.py and commit it", file=sys.stderr)
            return 1
        return 0
    REFERENCE.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
