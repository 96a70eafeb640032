#!/usr/bin/env python3
"""Record commands on a terminal and draw them as an animated SVG, as README shows it.

usage: record_demo.py OUT.svg COMMAND [COMMAND ...]      (each COMMAND is one shell line, shown behind a prompt)

Runs each command on a pseudo-terminal, notes when each piece of output came, and writes text that appears at those
times. Viewers without animation show the whole text. Understands bold, dim and reset; nothing else is expected.
"""
import argparse
import html
import os
import pty
import re
import time

COLUMNS, LINE, CHAR, MARGIN = 100, 19, 8.4, 14
STYLE = """
text { font: 14px ui-monospace, 'DejaVu Sans Mono', Menlo, Consolas, monospace; fill: #d6deeb; white-space: pre }
.bold { font-weight: bold; fill: #ffffff } .dim { fill: #7f8ea3 } .prompt { fill: #8bd5a0 }
tspan { animation: appear 0.01s backwards } @keyframes appear { from { opacity: 0 } }
"""


def run(command, start):
    """Yield (seconds since start, text) as the command writes to its terminal."""
    pid, fd = pty.fork()
    if pid == 0:
        os.environ.update(COLUMNS=str(COLUMNS), TERM="xterm")
        os.execvp("/bin/sh", ["/bin/sh", "-c", command])
    while True:
        try:
            data = os.read(fd, 4096)
        except OSError:  # Linux's way of saying that the other side is closed
            break
        if not data:
            break
        yield time.monotonic() - start, data.decode("utf-8", "replace")
    os.waitpid(pid, 0)


def screen(events):
    """Cut (time, class, text) into lines of at most COLUMNS characters."""
    lines, column = [[]], 0
    for when, style, text in events:
        for piece in re.split(r"(\n)", text.replace("\r", "")):
            if piece == "\n":
                lines.append([])
                column = 0
            while piece and piece != "\n":
                room = COLUMNS - column
                if room <= 0:
                    lines.append([])
                    column, room = 0, COLUMNS
                lines[-1].append((when, style, piece[:room]))
                column += len(piece[:room])
                piece = piece[room:]
    while lines and not lines[-1]:
        lines.pop()
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out")
    parser.add_argument("commands", nargs="+")
    args = parser.parse_args()

    start, events = time.monotonic(), []
    for command in args.commands:
        now = time.monotonic() - start
        events += [(now, "prompt", "$ "), (now, "bold", command + "\n")]
        style = ""
        for when, text in run(command, start):
            for piece in re.split(r"(\x1b\[[0-9;?]*[a-zA-Z])", text):
                if piece.startswith("\x1b["):
                    style = {"\x1b[2m": "dim", "\x1b[1m": "bold"}.get(piece, "")
                elif piece:
                    events.append((when, style, piece))
        events.append((time.monotonic() - start, "", "\n"))

    lines = screen(events)
    width, height = COLUMNS * CHAR + 2 * MARGIN, len(lines) * LINE + 2 * MARGIN
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}">',
           f"<style>{STYLE}</style>", '<rect width="100%" height="100%" rx="8" fill="#11161f"/>']
    for row, line in enumerate(lines):
        spans = "".join(f'<tspan class="{style}" style="animation-delay:{when:.2f}s">{html.escape(text)}</tspan>'
                        for when, style, text in line)
        out.append(f'<text x="{MARGIN}" y="{MARGIN + LINE * row + 14}" xml:space="preserve">{spans}</text>')
    out.append("</svg>\n")
    with open(args.out, "w", encoding="utf-8") as file:
        file.write("\n".join(out))


if __name__ == "__main__":
    main()
