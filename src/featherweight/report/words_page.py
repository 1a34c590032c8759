"""The sliding window as one HTML page that steps through a sentence; needs nothing else, not even scripts."""

from __future__ import annotations

import html
import json
import string
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from featherweight.quantities import format_percent
from featherweight.report.json import plain
from featherweight.report.words import IDEA, windows_content
from featherweight.whole import write_text

if TYPE_CHECKING:
    from featherweight.embeddings.windows import Lesson

MOST_COLUMNS = 40


def write(lesson: Lesson, path: Path) -> None:
    """Write the page whole or not at all. Raises OutputError."""
    write_text(render(lesson), path)


def render(lesson: Lesson) -> str:
    """The whole page. Words are escaped, also inside the script: a text may hold anything."""
    content = windows_content(lesson)
    data = json.dumps(plain(content), ensure_ascii=False).replace("<", "\\u003c").replace("\u2028", "\\u2028")
    reach = ", drawn anew at each position" if lesson.reach_chances else ""
    page = (files("featherweight.report") / "words.html").read_text(encoding="utf-8")
    return string.Template(page).substitute(
        idea=html.escape(IDEA.replace("[centre]", "centre")),
        facts=html.escape(f"{len(lesson.words)} words, window {lesson.window}{reach}"),
        pairs=str(len(lesson.pairs)),
        examples=str(len(lesson.examples)),
        table=_table(lesson),
        extras=_extras(lesson),
        data=data,
    )


def _table(lesson: Lesson) -> str:
    """Every position as a row: the window moves down the sentence. Of a long one only the window is written."""
    rows = []
    whole = len(lesson.words) <= MOST_COLUMNS
    for p in lesson.positions:
        shown = range(len(lesson.words)) if whole else sorted((p.at, *p.context))
        cells = "".join(
            f'<td class="{"centre" if j == p.at else "context" if j in p.context else "outside"}">'
            f"{html.escape(lesson.words[j])}</td>"
            for j in shown
        )
        rows.append(f'<tr data-at="{p.at}"><th>{p.at + 1}</th>{cells}<td class="num">{len(p.context)}</td></tr>')
    return "".join(rows)


def _extras(lesson: Lesson) -> str:
    """Tables of the chances that were asked for."""
    parts = []
    if lesson.keep_chances:
        kept = set(lesson.kept)
        words = " ".join(
            html.escape(w) if i in kept else f"<s>{html.escape(w)}</s>" for i, w in enumerate(lesson.given)
        )
        rows = [(w, str(lesson.counts[w]), format_percent(c)) for w, c in lesson.keep_chances.items()]
        parts.append(f"<h2>Subsampling</h2><p>{words}</p>" + _rows(("word", "count", "kept"), rows))
    if lesson.reach_chances:
        used = [(str(d), format_percent(c)) for d, c in enumerate(lesson.reach_chances, 1)]
        parts.append("<h2>Dynamic window</h2>" + _rows(("distance", "used"), used))
    if lesson.noise_shares:
        shares = sorted(lesson.noise_shares.items(), key=lambda item: -item[1])
        rows = [(w, str(lesson.counts[w]), format_percent(c)) for w, c in shares]
        parts.append("<h2>Negative samples</h2>" + _rows(("word", "count", "drawn"), rows))
    return "".join(parts)


def _rows(head: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    top = "".join(f"<th>{name}</th>" for name in head)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in rows)
    return f'<table class="chances"><tr>{top}</tr>{body}</table>'
