"""Playing cards: from a hand to the picture that the model sees.

    python -c "from games import cards; cards.draw_hand([('K', 'hearts')], (600, 400)).save('hand.png')"
"""
import colorsys
import random
import re
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RANKS = tuple("A 2 3 4 5 6 7 8 9 10 J Q K".split())
FACES = RANKS[-3:]
LOOKS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds")}
LOOKS["all"] = LOOKS["black"] + LOOKS["red"]


def card_values(rule):
    """Return {rank: value}: A counts 1, a number card its number, J, Q and K 10 by the rule "10", 11, 12 and
    13 by "11-12-13". ValueError for a bad rule."""
    if not re.fullmatch("N(-N-N)?".replace("N", "[1-9][0-9]{0,5}"), rule):
        raise ValueError(f"rule {rule!r}: expected one positive integer for J, Q and K, as in '10', "
                         "or three, as in '11-12-13'")
    faces = rule.split("-")
    return dict(zip(RANKS, [*range(1, 11), *map(int, faces * (3 // len(faces)))]))


# Every card is drawn once, 1000 x 1400 pixels, and scaled down. Shapes are polygons (N, 2), y downwards.
_T = np.linspace(0, 2 * np.pi, 72, endpoint=False)


def _oval(x, y, rx, ry=None):
    return np.stack([x + rx * np.cos(_T), y + (ry or rx) * np.sin(_T)], 1)


def _polygon(*xy):
    return np.reshape(xy, (-1, 2))


def _shapes(text):
    """Return [(name of a color, polygon)] of lines as "gold oval 610 195 80 26": an oval has a centre and one
    or two radii, a polygon corners "x,y"."""
    lines = (line.replace(",", " ").split() for line in text.strip().splitlines())
    kinds = {"oval": _oval, "polygon": _polygon}
    return [(color, kinds[kind](*map(float, numbers))) for color, kind, *numbers in lines]


def _colors(text):
    """Return {name: color} of words "name #rrggbb"."""
    words = text.split()
    return dict(zip(words[::2], words[1::2]))


COLORS = _colors("""
    table #35654d  paper #fdfdfa  line #28283c  edge #969696  gold #f4c448  skin #f8dabc  steel #c4ced8
    wood #96643c  leaf #468250  lip #be3c3c  J #ce9642  Q #7c4622  K #6e645e""")
BLACK, RED = _colors("ink #101014  robe #304c96"), _colors("ink #ce1220  robe #b2262e")
# how a card is drawn: left and right exchanged; each hand in an ink and on a table of its own
STYLES = ("plain", "mirrored", "varied")


def _shades(hues, *shades):
    """Return [(red, green, blue)] of hues around the circle, each in shades (saturation, brightness)."""
    return [tuple(round(255 * part) for part in colorsys.hsv_to_rgb(k / hues, *shade))
            for k in range(hues) for shade in shades]


INKS, TABLES = _shades(12, (1, 0.75), (0.9, 0.45), (0.6, 0.2)), _shades(8, (0.5, 0.3), (0.5, 0.5), (0.5, 0.8))
# rank, rows of the two side columns, rows of the middle column, in sixths, from -6, the highest, to 6
PIPS = {rank.strip(): [[int(row) / 6 for row in column.split()] for column in columns]
        for rank, *columns in (line.split("|") for line in """
    A  |           | 0
    2  |           | -6 6
    3  |           | -6 0 6
    4  | -6 6      |
    5  | -6 6      | 0
    6  | -6 0 6    |
    7  | -6 0 6    | -3
    8  | -6 0 6    | -3 3
    9  | -6 -2 2 6 | 0
    10 | -6 -2 2 6 | -4 4
    J  |           |
    Q  |           |
    K  |           | """.split("\n")[1:])}

# The upper half of a court card, from back to front: hair, robe and face, then headgear and what the hand
# carries.
BUST = """
    robe polygon 372,500 628,500 760,560 806,705 194,705 240,560
    gold polygon 290,540 330,524 340,705 270,705
    gold polygon 710,540 670,524 660,705 730,705
    gold polygon 420,500 580,500 610,705 390,705
    paper polygon 366,505 420,462 500,545 580,462 634,505 500,625
    skin oval 500 372 90 116"""
COURT = {rank: _shapes(hair + BUST + regalia) for rank, hair, regalia in (
    ("J", """
        J oval 500 370 132 120
        J oval 395 440 45
        J oval 605 440 45""", """
        gold oval 610 195 80 26
        robe oval 500 250 142 72
        gold polygon 372,272 628,272 628,308 372,308
        wood polygon 729,260 747,260 747,700 729,700
        steel polygon 738,140 778,250 738,300 698,250"""),
    ("Q", """
        Q oval 500 430 150 195""", """
        gold polygon 402,290 370,205 436,240 500,180 564,240 630,205 598,290
        paper polygon 396,271 604,271 604,297 396,297
        paper oval 370 205 17
        paper oval 500 180 17
        paper oval 630 205 17
        leaf polygon 732,260 744,260 744,700 732,700
        ink oval 738 247 32
        ink oval 776 285 32
        ink oval 738 323 32
        ink oval 700 285 32
        gold oval 738 285 22"""),
    ("K", """
        K oval 500 375 128 140""", """
        K oval 500 440 96 120
        skin oval 500 352 84 94
        gold polygon 392,292 352,160 432,222 500,130 568,222 648,160 608,292
        robe polygon 384,266 616,266 616,302 384,302
        ink oval 352 160 15
        ink oval 500 130 15
        ink oval 648 160 15
        steel polygon 722,690 722,250 737,200 752,250 752,690
        gold polygon 677,506 797,506 797,534 677,534"""))}
FEATURES = _shapes("""
    line oval 464 358 10
    line oval 536 358 10
    line polygon 444,329 484,329 484,335 444,335
    line polygon 516,329 556,329 556,335 516,335
    line polygon 500,360 488,402 506,402
    lip oval 500 432 26 8""")
# Suit marks, in the box -0.5..0.5.
_Y = 5 * np.cos(2 * _T) + 2 * np.cos(3 * _T) + np.cos(4 * _T) - 13 * np.cos(_T)
_HEART = np.stack([16 * np.sin(_T) ** 3, _Y - 2.5], 1) / 30
_STEM = """
    ink polygon -0.03,0 0.03,0 0.06,0.3 0.18,0.5 -0.18,0.5 -0.06,0.3"""
MARKS = {
    "spades": [("ink", _HEART * (0.9, -0.88) + (0, -0.06)), *_shapes(_STEM)],
    "clubs": _shapes("""
        ink oval 0 -0.26 0.23
        ink oval -0.25 0.1 0.23
        ink oval 0.25 0.1 0.23
        ink oval 0 0 0.1""" + _STEM),
    "hearts": [("ink", _HEART)],
    "diamonds": _shapes("ink polygon 0,-0.52 0.2,-0.23 0.39,0 0.2,0.23 0,0.52 -0.2,0.23 -0.39,0 -0.2,-0.23")}
INDEX_ONLY = 120    # pixels: a card less high than this shows its rank and suit large, and nothing else


def _fill(draw, shapes, colors, x=0, y=0, scale=1, outline=None):
    """Fill polygons scaled by `scale` (a number or (x, y) factors) and moved to (x, y)."""
    for color, shape in shapes:
        draw.polygon((shape * scale + (x, y)).ravel().tolist(), colors[color], outline, 5)


def _glyph(card, rank, color, x, y, width, height):
    """Write a rank `height` high and at most `width` wide, its top centre at (x, y)."""
    font = ImageFont.load_default(500)
    left, top, right, bottom = font.getbbox(rank, stroke_width=12)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), rank, 255, font, stroke_width=12)
    width = min(width, round(mask.width * height / mask.height))
    mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    card.paste(color, (x - width // 2, y), mask)


def _draw_face(card, rank, mark, colors):
    """Draw indices in two corners; pips, the lower ones upside down, or a framed bust and its half turn."""
    draw = ImageDraw.Draw(card)
    _glyph(card, rank, colors["ink"], 98, 55, 150, 150)
    _fill(draw, mark, colors, 98, 285, 120)
    if rank in FACES:
        _fill(draw, mark, colors, 268, 182, 124)
        _fill(draw, COURT[rank], colors, outline=colors["line"])
        _fill(draw, FEATURES, colors)
        _fill(draw, mark, colors, 500, 655, 72)
        draw.rectangle((190, 690, 809, 709), colors["gold"], colors["line"], 5)
        draw.rectangle((190, 100, 809, 1299), None, colors["line"], 8)
    card.paste(card.crop((0, 0, 1000, 700)).rotate(180), (0, 700))
    sides, middle = PIPS[rank]
    size = 480 if rank == "A" else 200
    for x, rows in ((315, sides), (685, sides), (500, middle)):
        for row in rows:
            _fill(draw, mark, colors, x, 700 + 470 * row, (size, size if row <= 0 else -size))


@lru_cache(maxsize=8192)
def draw_card(rank, suit, height, style="plain", ink=None):
    """Return one card as an RGBA image, `height` pixels high and 5/7 as wide, transparent outside its round
    corners. style: of STYLES; ink: a color (red, green, blue) in place of black and red."""
    colors, mark = COLORS | (RED if suit in LOOKS["red"] else BLACK), MARKS[suit]
    if ink:
        colors["ink"] = ink
    card, corners = Image.new("RGB", (1000, 1400), colors["paper"]), Image.new("L", (1000, 1400))
    if height < INDEX_ONLY:
        _glyph(card, rank, colors["ink"], 500, 90, 860, 660)
        _fill(ImageDraw.Draw(card), mark, colors, 500, 1070, 520)
    else:
        _draw_face(card, rank, mark, colors)
        ImageDraw.Draw(card).rounded_rectangle((0, 0, 999, 1399), 70, None, colors["edge"], 6)
    ImageDraw.Draw(corners).rounded_rectangle((0, 0, 999, 1399), 70, 255)
    card.putalpha(corners)
    card = card.resize((round(height / 1.4), height), Image.Resampling.BOX)
    return card.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if style == "mirrored" else card


def draw_hand(hand, size, style="plain"):
    """Return a hand [(rank, suit), ...] side by side on the green table: an RGB image of `size` (width,
    height) pixels, whose width the cards share evenly. Five at (224, 56) are as large as four (the height is
    what limits both), but no longer one to a 56-pixel tile; a wider picture would not help, as the model
    scales it down to its four tiles. At (1200, 1200) they are 4/5 as large. style: of STYLES; a mirrored hand
    keeps its order, each card is mirrored where it lies."""
    width, height = size
    card_height = max(7, int(min(0.96 * height, 1.4 * 0.9 * width / len(hand))))
    rng, table, ink = random.Random(str(hand)), COLORS["table"], None
    if style == "varied":
        table, ink = rng.choice(TABLES), rng.choice(INKS)
    canvas = Image.new("RGB", (width, height), table)
    for i, (rank, suit) in enumerate(hand):
        card = draw_card(rank, suit, card_height, style, ink)
        left = round((i + 0.5) * width / len(hand) - card.width / 2)
        canvas.paste(card, (left, (height - card.height) // 2), card)
    return canvas
