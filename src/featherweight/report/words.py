"""The sliding window in the terminal and as JSON: every word in its turn as the centre."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.text import Text

from featherweight.quantities import format_percent
from featherweight.report.terminal import INDENT, Column, Grid, heading, indented, lines

if TYPE_CHECKING:
    from featherweight.embeddings.windows import Lesson

OUTSIDE = "."
MOST_SHOWN = 200  # lines of a list; the JSON has all
IDEA = (
    "Every word takes its turn as the [centre]; the words around it, as far as the window reaches, are its context. "
    "At the edges of the sentence the window is cut off."
)


def windows_content(lesson: Lesson) -> dict[str, Any]:
    """The lesson as one JSON object; indices count from 0."""
    words = lesson.words
    positions = [
        {"at": p.at, "centre": words[p.at], "window": p.reach, "context": [words[j] for j in p.context],
         "context_at": list(p.context)}
        for p in lesson.positions
    ]  # fmt: skip
    content: dict[str, Any] = {
        "given": lesson.given,
        "window": lesson.window,
        "words": words,
        "positions": positions,
        "skip_gram": {"count": len(lesson.pairs), "pairs": [list(p) for p in lesson.pairs]},
        "cbow": {
            "count": len(lesson.examples),
            "examples": [{"contexts": list(c), "centre": w} for c, w in lesson.examples],
        },
    }
    if lesson.reach_chances:
        content["dynamic"] = {"chance_by_distance": lesson.reach_chances}
    if lesson.keep_chances:
        content["subsample"] = {"keep_chance": lesson.keep_chances, "kept_at": list(lesson.kept)}
    if lesson.noise_shares:
        content["negative"] = {"share": lesson.noise_shares, "drawn": [list(n) for n in lesson.negatives]}
    return content


def windows_parts(lesson: Lesson) -> list[RenderableType]:
    """The windows, then the lists of what is learnt from them, then the chances that were asked for."""
    reach = f"window {lesson.window}" + (", drawn anew at each position" if lesson.reach_chances else "")
    words = f"{len(lesson.words)} words, {reach}"
    return [
        *_subsample_parts(lesson),
        heading("Windows", words),
        *lines([IDEA], "dim"),
        Text(""),
        indented(WindowsView(lesson)),
        *_dynamic_parts(lesson),
        *_pair_parts(lesson),
        *_cbow_parts(lesson),
        *_noise_parts(lesson),
    ]


@dataclass(frozen=True)
class WindowsView:
    """One row a position. Where the whole sentence fits it stands still and the window moves; else the window alone."""

    lesson: Lesson

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay out for the width at hand."""
        lesson = self.lesson
        number = len(str(len(lesson.words)))
        wide = [cell_len(w) + 2 for w in lesson.words]
        counts = [_count(len(p.context), "pair") for p in lesson.positions]
        whole = number + 2 + sum(wide) + len(wide) + max(map(len, counts), default=0) + INDENT <= options.max_width
        for p, count in zip(lesson.positions, counts, strict=True):
            line = Text(f"{p.at + 1:>{number}}  ", style="dim", no_wrap=whole)
            shown = range(len(lesson.words)) if whole else sorted((p.at, *p.context))
            for j in shown:
                line.append_text(_cell(lesson.words[j], p.at == j, j in p.context, wide[j] if whole else 0))
                line.append(" ")
            line.append(f" {count}", style="dim")
            yield line


def _cell(word: str, centre: bool, context: bool, width: int) -> Text:
    """A word as centre, as context, or outside; `width` 0 leaves it unpadded."""
    text = f"[{word}]" if centre else f" {word} " if context else f" {OUTSIDE} "
    style = "bold reverse" if centre else "bold cyan" if context else "dim"
    if not width:
        return Text(text.strip(), style=style)
    return Text.assemble((text, style), " " * (width - cell_len(text)))


def _count(n: int, what: str) -> str:
    return f"{n} {what}" + ("" if n == 1 else "s")


def _pair_parts(lesson: Lesson) -> list[RenderableType]:
    """Skip-gram: from each centre to each of its context words, one line a position."""
    parts: list[RenderableType] = [
        heading("Skip-gram", f"{_count(len(lesson.pairs), 'pair')} (centre, context): predict each context word alone")
    ]
    at, shown = 0, lesson.positions[:MOST_SHOWN]
    for p in shown:
        mine = range(at, at + len(p.context))
        at += len(p.context)
        if lesson.negatives:
            for k in mine:
                centre, context = lesson.pairs[k]
                false = ", ".join(lesson.negatives[k]) or "none"
                parts += lines([f"({centre}, {context})  not: {false}"])
        else:
            words = "  ".join("({}, {})".format(*lesson.pairs[k]) for k in mine)
            parts += lines([words or f"{lesson.words[p.at]}: no context, so nothing to learn"])
    return parts + _left_out(len(lesson.positions) - len(shown))


def _cbow_parts(lesson: Lesson) -> list[RenderableType]:
    """CBOW: from all context words together to the centre."""
    parts: list[RenderableType] = [
        heading(
            "CBOW",
            f"{_count(len(lesson.examples), 'example')} (contexts -> centre): predict the centre from their mean",
        )
    ]
    parts += lines(f"{' '.join(contexts)} -> {centre}" for contexts, centre in lesson.examples[:MOST_SHOWN])
    return parts + _left_out(len(lesson.examples) - MOST_SHOWN)


def _left_out(n: int) -> list[RenderableType]:
    return lines([f"and {n} more; --json lists all"], "dim") if n > 0 else []


def _dynamic_parts(lesson: Lesson) -> list[RenderableType]:
    """How likely a word is in reach, by its distance."""
    if not lesson.reach_chances:
        return []
    made = Grid([Column("distance", "right"), Column("used", "right")])
    for distance, chance in enumerate(lesson.reach_chances[:MOST_SHOWN], 1):
        made.add(str(distance), format_percent(chance))
    words = "Each position draws its window from 1 to the one asked for, so near words are learnt from more often."
    return [
        heading("Dynamic window", "how often a word is used, by its distance"),
        *lines([words], "dim"),
        indented(made),
    ]


def _subsample_parts(lesson: Lesson) -> list[RenderableType]:
    """Which words were dropped before the windows were laid, and every word's chance to stay."""
    if not lesson.keep_chances:
        return []
    kept = set(lesson.kept)
    line = Text()
    for i, word in enumerate(lesson.given):
        line.append(f"{word} " if i in kept else f"({word}) ", style="" if i in kept else "dim strike")
    dropped = len(lesson.given) - len(kept)
    detail = f"{dropped} of {len(lesson.given)} words dropped, in brackets; windows reach over the gaps"
    return [
        heading("Subsampling", detail),
        indented(line),
        Text(""),
        indented(_chances("kept", lesson.keep_chances, lesson)),
    ]


def _noise_parts(lesson: Lesson) -> list[RenderableType]:
    """What negatives are drawn from."""
    if not lesson.noise_shares:
        return []
    shares = dict(sorted(lesson.noise_shares.items(), key=lambda item: -item[1])[:MOST_SHOWN])
    words = "Drawn by count^0.75; the true word is never a negative, so such a draw is dropped."
    return [
        heading("Negative samples", "how likely each word is drawn"),
        *lines([words], "dim"),
        indented(_chances("drawn", shares, lesson)),
    ]


def _chances(name: str, chances: Mapping[str, float], lesson: Lesson) -> Grid:
    made = Grid([Column("word", cut="end"), Column("count", "right"), Column(name, "right")])
    for word, chance in chances.items():
        made.add(word, str(lesson.counts[word]), format_percent(chance))
    return made
