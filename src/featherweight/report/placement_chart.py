"""Who wins over bandwidth and load, drawn once as shapes and written as SVG or, by Pillow, as PNG."""

from __future__ import annotations

import html
import io
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from featherweight.quantities import format_count

if TYPE_CHECKING:
    from featherweight.edge.breakeven import Winners

WIDTH, HEIGHT = 760, 470
LEFT, TOP, BOTTOM, LEGEND = 76, 40, 56, 250
# Eight colours told apart by people who see red and green alike (Okabe and Ito 2008), two greys after them.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#4D4D4D", "#9A9A9A", "#332288")
NOBODY = "#FFFFFF"
INK, DIM = "#1c2330", "#66707f"
_SCALE = 2


@dataclass(frozen=True, slots=True)
class Box:
    """A filled rectangle, with an outline if `line`."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    tip: str = ""
    line: str = ""


@dataclass(frozen=True, slots=True)
class Words:
    """A text; `anchor` start, middle or end; turned by 90 degrees if `upright`."""

    x: float
    y: float
    text: str
    colour: str = INK
    anchor: str = "start"
    size: int = 12
    upright: bool = False


@dataclass(frozen=True, slots=True)
class Ring:
    """The mark of what was asked."""

    x: float
    y: float


Shape = Box | Words | Ring


def shapes(won: Winners) -> list[Shape]:
    """The chart's parts from back to front."""
    right, bottom = WIDTH - LEGEND, HEIGHT - BOTTOM
    columns, rows = len(won.uplinks), len(won.loads)
    width, height = (right - LEFT) / columns, (bottom - TOP) / rows
    made: list[Shape] = [Words(LEFT, 20, f"Least {won.goal} among what keeps the rules", size=14)]
    for r, line in enumerate(won.cells):
        for c, winner in enumerate(line):
            colour = NOBODY if winner < 0 else COLOURS[winner % len(COLOURS)]
            tip = "nothing keeps the rules" if winner < 0 else won.options[winner]
            tip = f"{_plain(won.uplinks[c])} Mbit/s, {format_count(won.loads[r])} a month: {tip}"
            made.append(Box(LEFT + c * width, bottom - (r + 1) * height, width + 0.3, height + 0.3, colour, tip))
    made.append(Box(LEFT, TOP, right - LEFT, bottom - TOP, "", line=DIM))
    for c in range(0, columns, max(1, (columns - 1) // 4)):
        made.append(Words(LEFT + (c + 0.5) * width, bottom + 18, _plain(won.uplinks[c]), DIM, "middle"))
    for r in range(0, rows, max(1, (rows - 1) // 4)):
        made.append(Words(LEFT - 8, bottom - (r + 0.5) * height + 4, format_count(won.loads[r]), DIM, "end"))
    made.append(Words((LEFT + right) / 2, HEIGHT - 14, f"uplink of {won.link}, Mbit/s", DIM, "middle"))
    made.append(Words(18, (TOP + bottom) / 2, "requests a month", DIM, "middle", upright=True))
    x = LEFT + (_place(won.uplinks, won.here[0]) + 0.5) * width
    y = bottom - (_place(won.loads, won.here[1]) + 0.5) * height
    made.append(Ring(x, y))
    return [*made, *_legend(won, right + 18)]


def _place(values: tuple[float, ...], value: float) -> float:
    """Where a value lies among those of an axis, which grow by a constant factor."""
    return math.log(value / values[0]) / math.log(values[-1] / values[0]) * (len(values) - 1)


def _plain(value: float) -> str:
    """Three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _legend(won: Winners, x: float) -> list[Shape]:
    seen = {w for line in won.cells for w in line}
    made: list[Shape] = []
    y = float(TOP)
    for i in sorted(seen, key=lambda w: (w < 0, w)):
        colour = NOBODY if i < 0 else COLOURS[i % len(COLOURS)]
        made.append(Box(x, y, 13, 13, colour, line=DIM))
        name = "nothing keeps the rules" if i < 0 else won.options[i]
        made.append(Words(x + 20, y + 11, name if len(name) <= 34 else name[:33] + "…"))
        y += 22
    made.append(Ring(x + 6, y + 8))
    made.append(Words(x + 20, y + 12, "asked", DIM))
    return made


def to_svg(won: Winners) -> str:
    """SVG text that stands alone or in a page."""
    body = "".join(_svg(s) for s in shapes(won))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="who wins over bandwidth and load" font-family="system-ui, sans-serif">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>{body}</svg>'
    )


def _svg(shape: Shape) -> str:
    if isinstance(shape, Box):
        style = f'fill="{shape.colour or "none"}"' + (f' stroke="{shape.line}"' if shape.line else "")
        tip = f"<title>{html.escape(shape.tip)}</title>" if shape.tip else ""
        where = f'x="{shape.x:.1f}" y="{shape.y:.1f}" width="{shape.width:.1f}" height="{shape.height:.1f}"'
        return f'<rect {where} {style} shape-rendering="crispEdges">{tip}</rect>'
    if isinstance(shape, Ring):
        at = f'cx="{shape.x:.1f}" cy="{shape.y:.1f}"'
        return (
            f'<circle {at} r="7" fill="none" stroke="#ffffff" stroke-width="4"/>'
            f'<circle {at} r="7" fill="none" stroke="{INK}" stroke-width="2"/>'
        )
    turn = f' transform="rotate(-90 {shape.x:.1f} {shape.y:.1f})"' if shape.upright else ""
    return (
        f'<text x="{shape.x:.1f}" y="{shape.y:.1f}" font-size="{shape.size}" style="fill:{shape.colour}" '
        f'text-anchor="{shape.anchor}"{turn}>{html.escape(shape.text)}</text>'
    )


def to_png(won: Winners) -> bytes:
    """The same chart as PNG, at twice the size of the SVG's units."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (WIDTH * _SCALE, HEIGHT * _SCALE), "#ffffff")
    draw = ImageDraw.Draw(image)
    for shape in shapes(won):
        if isinstance(shape, Box):
            x, y = shape.x * _SCALE, shape.y * _SCALE
            box = (x, y, x + shape.width * _SCALE, y + shape.height * _SCALE)
            draw.rectangle(box, fill=shape.colour or None, outline=shape.line or None)
        elif isinstance(shape, Ring):
            for radius, colour, width in ((8.5, "#ffffff", 4), (7.5, INK, 2)):
                r = radius * _SCALE
                x, y = shape.x * _SCALE, shape.y * _SCALE
                draw.ellipse((x - r, y - r, x + r, y + r), outline=colour, width=width * _SCALE)
        else:
            _png_words(image, draw, shape)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def _png_words(image: object, draw: object, words: Words) -> None:
    """Text in Pillow's own font, which is always there."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(words.size * _SCALE)
    if not isinstance(image, Image.Image) or not isinstance(draw, ImageDraw.ImageDraw):
        raise TypeError("a PNG is drawn on a Pillow image")
    if not words.upright:
        anchor = {"start": "ls", "middle": "ms", "end": "rs"}[words.anchor]
        draw.text((words.x * _SCALE, words.y * _SCALE), words.text, fill=words.colour, font=font, anchor=anchor)
        return
    left, top, right, bottom = font.getbbox(words.text)
    strip = Image.new("RGB", (int(right - left) + 4, int(bottom - top) + 8), "#ffffff")
    ImageDraw.Draw(strip).text((2 - left, 4 - top), words.text, fill=words.colour, font=font)
    turned = strip.rotate(90, expand=True)
    image.paste(turned, (int(words.x * _SCALE - turned.width / 2), int(words.y * _SCALE - turned.height / 2)))
