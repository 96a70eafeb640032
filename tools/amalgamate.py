#!/usr/bin/env python3
"""Writes the whole library as one header.

    usage: tools/amalgamate.py OUT.hpp

Starts at qwen3next.hpp and replaces each #include of a project header by that header's text, the first time; system
headers stay where they are; what is for a macro on the list ABSENT alone is left out.  What comes out depends on the sources and the last commit alone.  OUT is written only if
it changes, so that what is built from it is not built again.

It refuses what would not mean the same in one file, and says how to repair it:
  - a header that includes itself by way of others
  - an #include that names nothing from the root of the tree, or two files at once
  - a header that is pasted inside an #if and needed outside of it as well
  - an orphan: a header that nobody reaches and that is not on the list below
  - a macro of the list ABSENT in anything but #ifdef and #ifndef
"""

import os
import pathlib
import re
import subprocess
import sys

ENTRY = "qwen3next.hpp"
FOLDERS = ("core", "blocks", "model", "backends", "weights", "text", "generate")  # the library's, searched for orphans
ORPHANS = {  # header, or folder with a slash: why the library does without
    "backends/cuda/": "for a GPU: what is not plain C++ is compiled by nvcc",
    "backends/observed_routing.hpp": "what routers pick: for the program's experts",
    "backends/traced_backend.hpp": "time and traffic of every operation: for the program's bench",
    "model/parameters.hpp": "parameters by part of the model: for the program's inspect",
    "model/traffic.hpp": "what a pass must read at least: for the program's bench",
}
ABSENT = {"QWEN3NEXT_CUDA"}  # defined by our own build alone: what it includes needs objects that nvcc compiles
BANNER = """\
// qwen3next {version}, {stamp}
// SPDX-License-Identifier: Apache-2.0   https://www.apache.org/licenses/LICENSE-2.0
// Written by tools/amalgamate.py out of {count} headers, each between its "begin" and "end".  Edit those, not this.
//
// Instruction sets for QWEN3NEXT_MULTI_ISA (what that is: below):
{isas}"""

INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')
CONDITIONAL = re.compile(r"\s*#\s*(ifdef|ifndef|if|elif|else|endif)\b(.*)")
PRAGMA_ONCE = re.compile(r"\s*#\s*pragma\s+once\b")


class Refused(Exception):
    """The sources can't be one file; the message says why and what to do."""


class Amalgamation:
    def __init__(self, root, entry=ENTRY, folders=FOLDERS, orphans=ORPHANS, absent=ABSENT):
        self.root, self.entry, self.folders, self.orphans, self.absent = pathlib.Path(root), entry, folders, orphans, absent
        self.pasted = {}  # header: (the conditions that surround it, where it was included)
        self.left_out = set()  # headers that are included for an absent macro, directly or not
        self.lines = []

    def text(self):
        self.paste(self.entry, [], [], "the start")
        self.check_orphans()
        return re.sub(r"\n{3,}", "\n\n", "\n".join(self.lines)) + "\n"

    def paste(self, name, chain, conditions, where):
        if name in chain:
            raise Refused(f"{where}: a cycle of includes, {' -> '.join([*chain[chain.index(name):], name])}: "
                          "move what both need into a header of its own")
        if name in self.pasted:
            needed, (around, first) = conditions, self.pasted[name]
            if missing := [c for c in around if c not in needed]:
                raise Refused(f"{where}: needs {name}, which is pasted at {first} inside '#if {missing[0]}' and would "
                              f"be missing without it: include it before that #if, too")
            return
        self.pasted[name] = (list(conditions), where)
        begin = [f"// ---- begin {name} " + "-" * max(4, 103 - len(name)), ""]
        body, own = [], []  # own: this file's open conditions
        self.lines += begin
        for number, line in self.present_lines(name):
            here = f"{name}:{number}"
            if include := INCLUDE.match(line):
                self.paste(self.resolve(include[1], name, here), [*chain, name], conditions + own, here)
                continue
            if directive := CONDITIONAL.match(line):
                self.follow(own, directive[1], re.sub(r"//.*", "", directive[2]).strip(), here)
            if not PRAGMA_ONCE.match(line):
                self.lines.append(line.rstrip())
        if own:
            raise Refused(f"{name}: '#if {own[-1]}' has no #endif")
        self.lines += ["", f"// ---- end {name}", ""]

    def present_lines(self, name):
        """Lines of a header, by number, as if the absent macros were not there: they aren't."""
        branches = []  # of the open conditions; True or False: for an absent macro, and whether it is taken
        for number, line in enumerate(self.root.joinpath(name).read_text(encoding="utf-8").splitlines(), 1):
            if directive := CONDITIONAL.match(line):
                kind, condition = directive[1], re.sub(r"//.*", "", directive[2]).strip()
                if kind in ("ifdef", "ifndef") and condition in self.absent:
                    branches.append(kind == "ifndef")
                    continue
                if macros := self.absent & set(re.findall(r"\w+", condition)):
                    raise Refused(f"{name}:{number}: {macros.pop()} inside of #{kind}: write #ifdef or #ifndef")
                if kind in ("if", "ifdef", "ifndef"):
                    branches.append(None)
                elif branches and branches[-1] is not None:
                    if kind == "elif":
                        raise Refused(f"{name}:{number}: #elif after #ifdef of an absent macro: write #else and #if")
                    branches[-1:] = [not branches[-1]] if kind == "else" else []
                    continue
                elif branches and kind == "endif":
                    branches.pop()
            if False not in branches:
                yield number, line
            elif include := INCLUDE.match(line):
                self.leave_out(self.resolve(include[1], name, f"{name}:{number}"))

    def leave_out(self, name):
        if name in self.left_out:
            return
        self.left_out.add(name)
        for number, line in enumerate(self.root.joinpath(name).read_text(encoding="utf-8").splitlines(), 1):
            if include := INCLUDE.match(line):
                self.leave_out(self.resolve(include[1], name, f"{name}:{number}"))

    def resolve(self, include, includer, where):
        beside = (pathlib.PurePosixPath(includer).parent / include).as_posix()
        if not self.root.joinpath(include).is_file():
            raise Refused(f'{where}: no file "{include}": write includes from the root of the tree, as in '
                          '"core/error.hpp", and those of other libraries in <>')
        if beside != include and self.root.joinpath(beside).is_file():
            raise Refused(f'{where}: "{include}" is {include} or {beside}: rename one of them')
        return include

    @staticmethod
    def follow(own, kind, condition, where):
        """Keeps `own`, the stack of open conditions, in step with a directive."""
        if kind in ("if", "ifdef", "ifndef"):
            own.append({"if": "{}", "ifdef": "defined({})", "ifndef": "!defined({})"}[kind].format(condition))
            return
        if not own:
            raise Refused(f"{where}: #{kind} without #if")
        before = own.pop()
        if kind != "endif":  # of several branches, none is inside another
            own.append(f"!({before})" + (f" && {condition}" if kind == "elif" else ""))

    def check_orphans(self):
        headers = {p.relative_to(self.root).as_posix() for folder in self.folders
                   for p in self.root.joinpath(folder).rglob("*.hpp")}
        folders = tuple(name for name in self.orphans if name.endswith("/"))
        for name in sorted(headers - self.pasted.keys() - self.left_out - self.orphans.keys()):
            if name.startswith(folders):
                continue
            raise Refused(f"{name}: no header that {self.entry} reaches includes it: include it where it is used, delete "
                          "it, or put it on the list ORPHANS of tools/amalgamate.py with the reason")
        for name in sorted(self.orphans.keys() - set(folders) - (headers - self.pasted.keys())):
            raise Refused(f"tools/amalgamate.py: {name} is on the list ORPHANS but is {'reached' if name in headers else 'no file'}: "
                          "take it off")


def version(root):
    found = re.search(r"project\(qwen3next VERSION (\S+)", root.joinpath("CMakeLists.txt").read_text(encoding="utf-8"))
    if not found:
        raise Refused("CMakeLists.txt: no line 'project(qwen3next VERSION ...': it is where the version comes from")
    return found[1]


def isas(root):
    """The table of instruction sets and their compiler flags, as cmake/CpuKernels.cmake has them."""
    text = root.joinpath("cmake/CpuKernels.cmake").read_text(encoding="utf-8")
    text = text[text.index("function(qwen3next_add_cpu_kernels "):]
    lines, flags, machine = [], {}, "others"
    command = re.compile(r'MATCHES "\^\((\w+)|(else)\(\)|set\((\w+) ([^)]*)\)|qwen3next_add_cpu_kernel\(\$\{target\} (\w+)([^)]*)\)')
    for processor, other, name, value, isa, own in command.findall(text):
        expand = lambda words: " ".join(re.sub(r"\$\{(\w+)\}", lambda m: flags[m[1]], words).split())
        if processor or other:
            machine = processor or "others"
        elif name:
            flags[name] = expand(value)
        else:
            lines.append(f"//   {machine:8} {isa:13} {expand(own)}".rstrip() + "\n")
    if not lines:
        raise Refused("cmake/CpuKernels.cmake: no line 'qwen3next_add_cpu_kernel(${target} NAME FLAGS...)': "
                      "the table of instruction sets comes from there")
    return "".join(lines)


def stamp(root, headers):
    """The last commit that touched any of the headers; a release's archive has no git and no date."""
    def git(*arguments):
        run = subprocess.run(["git", "-C", str(root), *arguments, "--", *headers], capture_output=True, text=True)
        return run.stdout.strip() if run.returncode == 0 else ""
    try:
        if root.joinpath(".git").exists() and (commit := git("log", "-1", "--format=%cs, commit %H")):
            return commit[:-28] + (" and changes" if git("status", "--porcelain") else "")
    except OSError:  # no git
        pass
    return "not from a git checkout"


def main(arguments):
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print(__doc__.strip(), file=sys.stderr)
        return 2
    root, out = pathlib.Path(__file__).resolve().parent.parent, pathlib.Path(arguments[0])
    try:
        amalgamation = Amalgamation(root)
        text = amalgamation.text()
        headers = sorted(amalgamation.pasted)
        banner = BANNER.format(version=version(root), stamp=stamp(root, headers), count=len(headers),
                               isas=isas(root))
    except Refused as refused:
        print(refused, file=sys.stderr)
        return 1
    # A guard, not #pragma once, which compilers warn of where the header itself is compiled (once per ISA).
    text = f"{banner}//\n#ifndef QWEN3NEXT_HPP\n#define QWEN3NEXT_HPP\n\n{text}\n#endif  // QWEN3NEXT_HPP\n"
    if out.is_file() and out.read_text(encoding="utf-8") == text:
        return 0
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_suffix(".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
