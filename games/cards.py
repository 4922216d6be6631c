"""Playing cards: from a hand to the picture that the model sees.

    python -c "from games import cards; cards.draw_hand([('K', 'hearts')], (600, 400)).save('hand.png')"
"""
import re
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

RANKS = ("A", "2", "3", "4", "5", "6", "7", "8", "9", "10", "J", "Q", "K")
FACES = ("J", "Q", "K")
LOOKS = {"black": ("spades", "clubs"), "red": ("hearts", "diamonds")}
LOOKS["all"] = LOOKS["black"] + LOOKS["red"]


def face_values(rule):
    """Return {"J": 10, "Q": 10, "K": 10} for "10", {"J": 11, "Q": 12, "K": 13} for "11-12-13"."""
    parts = str(rule).split("-")
    if len(parts) not in (1, 3) or not all(re.fullmatch("[1-9][0-9]{0,5}", part) for part in parts):
        raise ValueError(f"rule {rule!r}: expected one positive integer for J, Q and K, as in '10', "
                         "or three, as in '11-12-13'")
    return dict(zip(FACES, map(int, parts * (3 // len(parts)))))


def card_values(ranks, rule):
    """Return the values of `ranks` (a list of RANKS) under `rule`: A is 1, a number card its number, J, Q, K
    by the rule."""
    values = {"A": 1, **face_values(rule)}
    return [values[rank] if rank in values else int(rank) for rank in ranks]


# Every card is drawn once, 1000 x 1400 pixels, and scaled down. Shapes are polygons (N, 2), y downwards.

def _oval(x, y, rx, ry=None):
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    return np.stack([x + rx * np.cos(t), y + (ry or rx) * np.sin(t)], 1)


def _bar(x, y, width, height):
    return [(x + i * width / 2, y + j * height / 2) for i, j in ((-1, -1), (1, -1), (1, 1), (-1, 1))]


COLORS = {"table": (0x35, 0x65, 0x4D), "paper": (253, 253, 250),
          "line": (40, 40, 60), "edge": (150, 150, 150),
          "gold": (244, 196, 72), "skin": (248, 218, 188), "steel": (196, 206, 216), "wood": (150, 100, 60),
          "leaf": (70, 130, 80), "lip": (190, 60, 60),
          "J": (206, 150, 66), "Q": (124, 70, 34), "K": (110, 100, 94)}
# how a card is drawn: left and right exchanged; rank and suit in colours no deck has
STYLES = ("plain", "mirrored", "recoloured")
RECOLOURED = {"spades": (20, 60, 205), "clubs": (0, 130, 60),
              "hearts": (235, 120, 0), "diamonds": (150, 40, 180)}
BLACK, RED = {"ink": (16, 16, 20), "robe": (48, 76, 150)}, {"ink": (206, 18, 32), "robe": (178, 38, 46)}
# rank: (rows of the two side columns, rows of the middle column), from -1, the highest, to 1, the lowest
PIPS = {"A": ((), (0,)), "2": ((), (-1, 1)), "3": ((), (-1, 0, 1)), "4": ((-1, 1), ()), "5": ((-1, 1), (0,)),
        "6": ((-1, 0, 1), ()), "7": ((-1, 0, 1), (-1 / 2,)), "8": ((-1, 0, 1), (-1 / 2, 1 / 2)),
        "9": ((-1, -1 / 3, 1 / 3, 1), (0,)), "10": ((-1, -1 / 3, 1 / 3, 1), (-2 / 3, 2 / 3))}
# The upper half of a court card, from back to front: hair, robe and face, then headgear and what the hand
# carries.
LOCKS = {"J": [_oval(500, 370, 132, 120), _oval(395, 440, 45), _oval(605, 440, 45)],
         "Q": [_oval(500, 430, 150, 195)], "K": [_oval(500, 375, 128, 140)]}
BUST = [("robe", [(372, 500), (628, 500), (760, 560), (806, 705), (194, 705), (240, 560)]),
        ("gold", [(290, 540), (330, 524), (340, 705), (270, 705)]),
        ("gold", [(710, 540), (670, 524), (660, 705), (730, 705)]),
        ("gold", [(420, 500), (580, 500), (610, 705), (390, 705)]),
        ("paper", [(366, 505), (420, 462), (500, 545), (580, 462), (634, 505), (500, 625)]),
        ("skin", _oval(500, 372, 90, 116))]
REGALIA = {
    "J": [("gold", _oval(610, 195, 80, 26)), ("robe", _oval(500, 250, 142, 72)),
          ("gold", _bar(500, 290, 256, 36)),
          ("wood", _bar(738, 480, 18, 440)), ("steel", [(738, 140), (778, 250), (738, 300), (698, 250)])],
    "Q": [("gold", [(402, 290), (370, 205), (436, 240), (500, 180), (564, 240), (630, 205), (598, 290)]),
          ("paper", _bar(500, 284, 208, 26)), ("paper", _oval(370, 205, 17)), ("paper", _oval(500, 180, 17)),
          ("paper", _oval(630, 205, 17)), ("leaf", _bar(738, 480, 12, 440)), ("ink", _oval(738, 247, 32)),
          ("ink", _oval(776, 285, 32)), ("ink", _oval(738, 323, 32)), ("ink", _oval(700, 285, 32)),
          ("gold", _oval(738, 285, 22))],
    "K": [("K", _oval(500, 440, 96, 120)), ("skin", _oval(500, 352, 84, 94)),
          ("gold", [(392, 292), (352, 160), (432, 222), (500, 130), (568, 222), (648, 160), (608, 292)]),
          ("robe", _bar(500, 284, 232, 36)), ("ink", _oval(352, 160, 15)), ("ink", _oval(500, 130, 15)),
          ("ink", _oval(648, 160, 15)),
          ("steel", [(722, 690), (722, 250), (737, 200), (752, 250), (752, 690)]),
          ("gold", _bar(737, 520, 120, 28))]}
FEATURES = [_oval(464, 358, 10), _oval(536, 358, 10), _bar(464, 332, 40, 6), _bar(536, 332, 40, 6),
            [(500, 360), (488, 402), (506, 402)]]
INDEX_ONLY = 120    # pixels: a card less high than this shows its rank and suit large, and nothing else


def _suit_shapes(suit):
    """Return the polygons that make up a suit mark, in the box -0.5..0.5."""
    t = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    y = 5 * np.cos(2 * t) + 2 * np.cos(3 * t) + np.cos(4 * t) - 13 * np.cos(t)
    heart = np.stack([16 * np.sin(t) ** 3, y - 2.5], 1) / 30
    stem = [(-0.03, 0), (0.03, 0), (0.06, 0.3), (0.18, 0.5), (-0.18, 0.5), (-0.06, 0.3)]
    return {"spades": [heart * (0.9, -0.88) + (0, -0.06), stem],
            "clubs": [_oval(0, -0.26, 0.23), _oval(-0.25, 0.1, 0.23), _oval(0.25, 0.1, 0.23),
                      _oval(0, 0, 0.1), stem],
            "hearts": [heart],
            "diamonds": [[(0, -0.52), (0.2, -0.23), (0.39, 0), (0.2, 0.23),
                          (0, 0.52), (-0.2, 0.23), (-0.39, 0), (-0.2, -0.23)]]}[suit]


def _fill(draw, shapes, color, x=0, y=0, scale=1, outline=None):
    """Fill polygons scaled by `scale` (a number or (x, y) factors) and moved to (x, y)."""
    for shape in shapes:
        points = (np.array(shape) * scale + (x, y)).tolist()
        draw.polygon(list(map(tuple, points)), color, outline, 5)


def _glyph(card, rank, color, x, y, width, height):
    """Write a rank `height` high and at most `width` wide, its top centre at (x, y)."""
    font = ImageFont.load_default(500)
    left, top, right, bottom = font.getbbox(rank, stroke_width=12)
    mask = Image.new("L", (right - left, bottom - top))
    ImageDraw.Draw(mask).text((-left, -top), rank, 255, font, stroke_width=12)
    width = min(width, round(mask.width * height / mask.height))
    mask = mask.resize((width, height), Image.Resampling.LANCZOS)
    card.paste(color, (x - mask.width // 2, y), mask)


def _draw_face(card, rank, mark, colors):
    """Draw indices in two corners; pips, the lower ones upside down, or a framed bust and its half turn."""
    draw = ImageDraw.Draw(card)
    _glyph(card, rank, colors["ink"], 98, 55, 150, 150)
    _fill(draw, mark, colors["ink"], 98, 285, 120)
    if rank in FACES:
        _fill(draw, mark, colors["ink"], 268, 182, 124)
        for name, shape in [*((rank, lock) for lock in LOCKS[rank]), *BUST, *REGALIA[rank]]:
            _fill(draw, [shape], colors[name], outline=colors["line"])
        _fill(draw, FEATURES, colors["line"])
        _fill(draw, [_oval(500, 432, 26, 8)], colors["lip"])
        _fill(draw, mark, colors["ink"], 500, 655, 72)
    card.paste(card.crop((0, 0, 1000, 700)).rotate(180), (0, 700))
    if rank in FACES:
        draw.rectangle((190, 690, 809, 709), colors["gold"], colors["line"], 5)
        draw.rectangle((190, 100, 809, 1299), None, colors["line"], 8)
        return
    sides, middle = PIPS[rank]
    size = 480 if rank == "A" else 200
    for x, row in [(x, row) for x in (315, 685) for row in sides] + [(500, row) for row in middle]:
        _fill(draw, mark, colors["ink"], x, 700 + 470 * row, (size, size if row <= 0 else -size))


@lru_cache(maxsize=256)
def draw_card(rank, suit, height, style="plain"):
    """Return one card as an RGBA image, `height` pixels high and 5/7 as wide, transparent outside its round
    corners. style: of STYLES."""
    colors, mark = {**COLORS, **(RED if suit in LOOKS["red"] else BLACK)}, _suit_shapes(suit)
    if style == "recoloured":
        colors["ink"] = RECOLOURED[suit]
    card, corners = Image.new("RGB", (1000, 1400), colors["paper"]), Image.new("L", (1000, 1400))
    if height < INDEX_ONLY:
        _glyph(card, rank, colors["ink"], 500, 90, 860, 660)
        _fill(ImageDraw.Draw(card), mark, colors["ink"], 500, 1070, 520)
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
    canvas = Image.new("RGB", (width, height), COLORS["table"])
    for i, (rank, suit) in enumerate(hand):
        card = draw_card(rank, suit, card_height, style)
        left = round((i + 0.5) * width / len(hand) - card.width / 2)
        canvas.paste(card, (left, (height - card.height) // 2), card)
    return canvas
