"""Draws the ratios of ``compare.py --json FILE`` as SVG: ``python tests/bench/plot.py FILE docs/performance.svg``."""

from __future__ import annotations

import json
import sys
from html import escape
from pathlib import Path

# bar, its base
BARS = [
    ("enqueue of SQL", "one raw transaction"),
    ("enqueue of a function", "one raw transaction"),
    ("run_many", "one raw transaction"),
    ("run, 1 thread", "autocommit"),
    ("transaction() with 3 INSERTs", "BEGIN, 3 INSERTs, COMMIT"),
    ("run, 16 threads", "one connection and a lock, 16 threads"),
    ("run, 64 threads", "one connection and a lock, 64 threads"),
    ("await run, 64 tasks", "aiosqlite, 64 tasks"),
    ("read of one row by key", "bare read of one row by key"),
]
ROW, LEFT, WIDTH = 26, 300, 420


def draw(figures: dict[str, dict[str, float]]) -> str:
    ratios = [
        (mode, name, base, figures[mode][name] / figures[mode][base])
        for mode in ("FULL", "NORMAL")
        for name, base in BARS
        if name in figures[mode] and base in figures[mode]
    ]
    largest = max(ratio for *_, ratio in ratios)
    lines = []
    for place, (mode, name, base, ratio) in enumerate(ratios):
        top = 30 + place * ROW
        length = WIDTH * ratio / largest
        colour = "#3b6ea5" if mode == "FULL" else "#8fb3d9"
        lines.append(f'<text x="{LEFT - 8}" y="{top + 13}" text-anchor="end">{escape(name)}, {mode}</text>')
        lines.append(f'<rect x="{LEFT}" y="{top}" width="{length:.1f}" height="{ROW - 8}" fill="{colour}"/>')
        text = f"{ratio:.2f} × {escape(base)}"
        lines.append(f'<text x="{LEFT + length + 6:.1f}" y="{top + 13}">{text}</text>')
    one = LEFT + WIDTH / largest
    height = 40 + len(ratios) * ROW
    lines.append(f'<line x1="{one:.1f}" x2="{one:.1f}" y1="22" y2="{height - 10}" stroke="#999" stroke-dasharray="3"/>')
    title = f"Python {figures['python']}, SQLite {figures['sqlite']}, fsync {figures['fsync_ms']:.2f} ms"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 320}" height="{height}" '
        f'font-family="sans-serif" font-size="12"><text x="{LEFT}" y="15">{title}</text>\n'
        + "\n".join(lines)
        + "\n</svg>\n"
    )


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))), encoding="utf-8")
