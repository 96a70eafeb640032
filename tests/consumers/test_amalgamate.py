#!/usr/bin/env python3
"""tools/amalgamate.py: what it writes is the same each time and needs nothing new; what can't be one file is refused.

    usage: test_amalgamate.py SINGLE_HEADER    (as the build wrote it)
"""

import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import unittest

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT / "tools"))
sys.dont_write_bytecode = True
import amalgamate  # noqa: E402

HEADER = pathlib.Path(sys.argv.pop(1))


def write_tree(root, files):
    for name, text in files.items():
        path = pathlib.Path(root, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


class Output(unittest.TestCase):
    text = HEADER.read_text(encoding="utf-8")

    def test_is_what_the_sources_say_and_left_alone_if_it_is(self):
        before = HEADER.stat().st_mtime_ns
        subprocess.run([sys.executable, ROOT / "tools/amalgamate.py", HEADER], check=True)
        self.assertEqual(HEADER.read_text(encoding="utf-8"), self.text, "the build's copy was out of date")
        self.assertEqual(HEADER.stat().st_mtime_ns, before, "written again without need: everything would be rebuilt")

    def test_outside_of_git_only_the_stamp_differs(self):
        with tempfile.TemporaryDirectory() as copy:
            for name in [*amalgamate.FOLDERS, "cmake", "tools"]:
                shutil.copytree(ROOT / name, pathlib.Path(copy, name), ignore=shutil.ignore_patterns("__pycache__"))
            for name in ["CMakeLists.txt", amalgamate.ENTRY]:
                shutil.copy(ROOT / name, copy)
            out = pathlib.Path(copy, "out", "qwen3next.hpp")
            subprocess.run([sys.executable, pathlib.Path(copy, "tools/amalgamate.py"), out], check=True)
            stamp, rest = out.read_text(encoding="utf-8").split("\n", 1)
            self.assertRegex(stamp, r"^// qwen3next \d+\.\d+\.\d+, not from a git checkout$")
            self.assertEqual(rest, self.text.split("\n", 1)[1])

    def test_stands_alone(self):
        self.assertEqual(re.findall(r'^\s*#\s*include\s*".*', self.text, re.M), [])
        foreign = {name for name in re.findall(r"^\s*#\s*include\s*<([^>]+)>", self.text, re.M) if re.search(r"[./]", name)}
        system = {name for name in foreign if name.startswith(("sys/", "linux/"))}
        system |= {"fcntl.h", "unistd.h", "windows.h", "io.h", "cpuid.h", "immintrin.h", "arm_neon.h", "sched.h"}
        optional = {"liburing.h"}
        self.assertEqual(foreign - system - optional, {"nlohmann/json.hpp", "utf8proc.h", "xsimd/xsimd.hpp", "Eigen/Core"},
                         "another dependency: README, the package and its pkg-config file must know it")

    def test_puts_its_name_on_its_macros(self):
        macros = set(re.findall(r"^\s*#\s*define\s+(\w+)", self.text, re.M))
        self.assertEqual({m for m in macros if not m.startswith("QWEN3NEXT_")} - {"NOMINMAX", "WIN32_LEAN_AND_MEAN"}, set())

    def test_leaves_cuda_to_the_build(self):
        self.assertNotIn("QWEN3NEXT_CUDA", self.text)
        self.assertNotIn("backends/cuda/", self.text)

    def test_is_ascii(self):
        for number, line in enumerate(self.text.split("\n"), 1):
            self.assertTrue(line.isascii(), f"line {number}: {line}")

    def test_names_every_instruction_set_that_dispatch_asks_for(self):
        declared = set(re.findall(r"^QWEN3NEXT_DECLARE_LEVEL\((\w+)\)", self.text, re.M))
        listed = set(re.findall(r"^//   (?:x86_64|aarch64|others)\s+(\w+)", self.text, re.M))
        self.assertEqual(listed, declared)


class Refusals(unittest.TestCase):
    def refusal(self, files, orphans={}, absent=()):
        with tempfile.TemporaryDirectory() as root:
            write_tree(root, files)
            with self.assertRaises(amalgamate.Refused) as refused:
                amalgamate.Amalgamation(root, "all.hpp", ("core",), orphans, set(absent)).text()
            return str(refused.exception)

    def test_cycle(self):
        message = self.refusal({"all.hpp": '#include "core/a.hpp"\n', "core/a.hpp": '#include "core/b.hpp"\n',
                                "core/b.hpp": '\n#include "core/a.hpp"\n'})
        self.assertIn("core/b.hpp:2: a cycle of includes, core/a.hpp -> core/b.hpp -> core/a.hpp: move", message)

    def test_include_that_is_not_from_the_root(self):
        message = self.refusal({"all.hpp": '#include "core/a.hpp"\n', "core/a.hpp": '#include "b.hpp"\n', "core/b.hpp": ""})
        self.assertIn('core/a.hpp:1: no file "b.hpp": write includes from the root', message)

    def test_name_with_two_meanings(self):
        message = self.refusal({"all.hpp": '#include "core/a.hpp"\n', "core/a.hpp": '#include "core/b.hpp"\n',
                                "core/b.hpp": "", "core/core/b.hpp": ""})
        self.assertIn('"core/b.hpp" is core/b.hpp or core/core/b.hpp: rename', message)

    def test_header_pasted_where_a_condition_may_hide_it(self):
        files = {"all.hpp": '#ifdef FAST\n#include "core/a.hpp"\n#else\n#include "core/b.hpp"\n#endif\n',
                 "core/a.hpp": '#include "core/c.hpp"\n', "core/b.hpp": '#include "core/c.hpp"\n', "core/c.hpp": ""}
        message = self.refusal(files)
        self.assertIn("core/b.hpp:1: needs core/c.hpp, which is pasted at core/a.hpp:1 inside '#if defined(FAST)'", message)
        files["all.hpp"] = '#include "core/c.hpp"\n' + files["all.hpp"]  # the advice that it gives
        with tempfile.TemporaryDirectory() as root:
            write_tree(root, files)
            text = amalgamate.Amalgamation(root, "all.hpp", ("core",), {}).text()
        self.assertEqual(text.count("begin core/c.hpp"), 1)

    def test_same_condition_again_is_good(self):
        twice = '#ifdef FAST  // why\n#include "core/a.hpp"\n#endif\n' * 2
        with tempfile.TemporaryDirectory() as root:
            write_tree(root, {"all.hpp": twice, "core/a.hpp": "int a;\n"})
            self.assertEqual(amalgamate.Amalgamation(root, "all.hpp", ("core",), {}).text().count("int a;"), 1)

    def test_absent_macro(self):
        files = {"all.hpp": '#include "core/a.hpp"\n#ifdef GPU\n#include "core/gpu.hpp"\n#if 1\nint gpu;\n#endif\n'
                            '#else\n#ifdef FAST\nint fast;\n#endif\nint cpu;\n#endif\n#ifndef GPU\nint without;\n#endif\n',
                 "core/a.hpp": "int a;\n", "core/gpu.hpp": '#include "core/b.hpp"\nint card;\n', "core/b.hpp": "int b;\n"}
        with tempfile.TemporaryDirectory() as root:
            write_tree(root, files)  # gpu.hpp and what it includes are no orphans either
            text = amalgamate.Amalgamation(root, "all.hpp", ("core",), {}, {"GPU"}).text()
        self.assertEqual([line for line in text.split("\n") if line and not line.startswith("// ")],
                         ["int a;", "#ifdef FAST", "int fast;", "#endif", "int cpu;", "int without;"])
        self.assertIn("all.hpp:1: GPU inside of #if: write #ifdef", self.refusal({"all.hpp": "#if defined(GPU)\n#endif\n"}, absent={"GPU"}))
        self.assertIn("all.hpp:2: #elif after #ifdef of an absent macro",
                      self.refusal({"all.hpp": "#ifdef GPU\n#elif 1\n#endif\n"}, absent={"GPU"}))

    def test_orphan(self):
        message = self.refusal({"all.hpp": "", "core/a.hpp": ""})
        self.assertIn("core/a.hpp: no header that all.hpp reaches includes it: include it where", message)

    def test_folder_of_orphans(self):
        with tempfile.TemporaryDirectory() as root:
            write_tree(root, {"all.hpp": "int all;\n", "core/gpu/a.hpp": "int a;\n"})
            self.assertNotIn("int a;", amalgamate.Amalgamation(root, "all.hpp", ("core",), {"core/gpu/": "why"}).text())

    def test_stale_list_of_orphans(self):
        files = {"all.hpp": '#include "core/a.hpp"\n', "core/a.hpp": ""}
        self.assertIn("core/a.hpp is on the list ORPHANS but is reached", self.refusal(files, {"core/a.hpp": "why"}))
        self.assertIn("core/b.hpp is on the list ORPHANS but is no file", self.refusal(files, {"core/b.hpp": "why"}))

    def test_open_condition(self):
        self.assertIn("core/a.hpp: '#if A' has no #endif",
                      self.refusal({"all.hpp": '#include "core/a.hpp"\n', "core/a.hpp": "#if A\n"}))


if __name__ == "__main__":
    unittest.main()
