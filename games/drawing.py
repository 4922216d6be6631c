"""Panoramas of the built-in cities, by ray casting: one ray a column of the picture, numpy only.

A column looks in one compass direction. The walls its ray meets give, per pixel, sky, wall or ground, and
where on the wall or the ground the pixel lies in metres; windows, shops and lane markings are functions of
those metres. Signs and trees are pictures pasted on upright rectangles. Look at one:

    python -c "from games import drawing; drawing.board('Red', 'Star', 0, 256).save('board.png')"

Positions are metres (east, north), headings degrees clockwise from north, colors RGB from 0 to 255.
"""
import math
import random
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from games.streets import COLORS, EMBLEMS, bearing, distances, pieces_of

EYE = 2.5           # camera above the ground
ROAD = 5            # half-widths: asphalt, and from wall to wall
WALL = 10
SIGN = 8            # width of a sign: so wide that 56 pixels a view suffice to read it (docs/lab-book.md)
POSTS, STRIP, TOP = 0.9, 2.3, 10.3      # a sign from the ground up: posts, a strip with the name, the board
FULL = 512          # pixels of a sign's width at most; others are SMALL or less, in powers of two
SMALL = 128
SHOP = 4.4          # height of the ground floor
FAR = 200           # walls beyond this are left out
GLASS = (62, 78, 98)
AWNINGS = ((150, 60, 50), (60, 84, 70), (60, 70, 100), (120, 105, 80), (80, 80, 84), (150, 125, 80))


# ------------------------------------------------------------------------------------------------------ signs

@lru_cache(maxsize=64)
def font(size):
    """Return Pillow's own font, so many pixels high."""
    return ImageFont.load_default(size)


@lru_cache(maxsize=16)
def emblem(name, pixels):
    """Return the silhouette of one of EMBLEMS, an "L" image of pixels x pixels, drawn at 4 times the size for
    smooth edges."""
    n = 4 * pixels
    mask = Image.new("L", (n, n))
    draw = ImageDraw.Draw(mask)

    def polygon(*points):
        draw.polygon([(x * n, y * n) for x, y in points], 255)

    def disc(x, y, rx, ry=None, fill=255):
        draw.ellipse(((x - rx) * n, (y - (ry or rx)) * n, (x + rx) * n, (y + (ry or rx)) * n), fill)
    if name == "Star":
        corners = [(i * math.pi / 5, (0.54, 0.22)[i % 2]) for i in range(10)]
        polygon(*((0.5 + r * math.sin(angle), 0.54 - r * math.cos(angle)) for angle, r in corners))
    elif name == "Moon":
        disc(0.5, 0.5, 0.5)
        disc(0.74, 0.4, 0.42, fill=0)
    elif name == "Heart":
        disc(0.26, 0.3, 0.26)
        disc(0.74, 0.3, 0.26)
        polygon((0.05, 0.44), (0.95, 0.44), (0.5, 0.98))
        polygon((0.26, 0.3), (0.74, 0.3), (0.5, 0.6))
    elif name == "Crown":
        polygon((0, 0.15), (0.27, 0.5), (0.5, 0.05), (0.73, 0.5), (1, 0.15), (0.92, 0.92), (0.08, 0.92))
    elif name == "Fish":
        disc(0.38, 0.5, 0.38, 0.26)
        polygon((0.6, 0.5), (1, 0.16), (1, 0.84))
        disc(0.2, 0.44, 0.05, fill=0)
    elif name == "Tree":
        polygon((0.5, 0), (0.78, 0.36), (0.22, 0.36))
        polygon((0.5, 0.12), (0.88, 0.62), (0.12, 0.62))
        polygon((0.5, 0.3), (1, 0.88), (0, 0.88), (0.43, 0.88), (0.43, 1), (0.57, 1), (0.57, 0.88), (1, 0.88))
    elif name == "Ring":
        disc(0.5, 0.5, 0.5)
        disc(0.5, 0.5, 0.25, fill=0)
    else:   # Cross
        polygon((0.34, 0), (0.66, 0), (0.66, 1), (0.34, 1))
        polygon((0, 0.34), (1, 0.34), (1, 0.66), (0, 0.66))
    return mask.resize((pixels, pixels), Image.Resampling.BOX)


def board(color, emblem_name, kind, pixels):
    """Return the board of a sign, an RGB image: the landmark's color with the emblem on a disc of the
    emblem's own color; kind 0 fills the square, 1 is a disc on black, 2 a square with its corners cut off, on
    white."""
    color = COLORS[color]
    image = Image.new("RGB", (pixels, pixels), ((30, 30, 34), (0, 0, 0), (255, 255, 255))[kind])
    draw, edge, cut = ImageDraw.Draw(image), round(0.02 * pixels), 0.3 * pixels
    if kind == 0:
        draw.rectangle((edge, edge, pixels - 1 - edge, pixels - 1 - edge), color)
    elif kind == 1:
        draw.ellipse((edge, edge, pixels - 1 - edge, pixels - 1 - edge), color)
    else:
        end = pixels - 1
        draw.polygon([(cut, 0), (end - cut, 0), (end, cut), (end, end - cut),
                      (end - cut, end), (cut, end), (0, end - cut), (0, cut)], color)
        draw.rectangle((0, 0, end, end), None, (30, 30, 34), edge)
    own = COLORS[EMBLEMS[emblem_name]]
    for radius, fill in ((0.4, (255, 255, 255)), (0.35, own)):
        draw.ellipse(((0.5 - radius) * pixels,) * 2 + ((0.5 + radius) * pixels,) * 2, fill)
    bright = np.dot(own, (0.3, 0.59, 0.11)) > 125
    size = round(0.42 * pixels)
    ink = (0, 0, 0) if bright else (255, 255, 255)
    image.paste(ink, ((pixels - size) // 2,) * 2, emblem(emblem_name, size))
    return image


def _sign(color, emblem_name, kind, name, strip, pixels):
    """Return the whole sign, (rows, pixels, 4) uint8 with alpha: board, name, posts. strip: colors
    (background, letters)."""
    scale = pixels / SIGN
    image = Image.new("RGBA", (pixels, round(TOP * scale)))
    draw, top, bottom = ImageDraw.Draw(image), (TOP - STRIP) * scale, (TOP - POSTS) * scale
    for x in (0.2, 0.8):
        draw.rectangle(((x - 0.02) * pixels, bottom, (x + 0.02) * pixels, TOP * scale), (70, 70, 74, 255))
    image.paste(board(color, emblem_name, kind, pixels), (0, 0))
    draw.rectangle((0, top, pixels, bottom), (*strip[0], 255))
    color, emblem_name, kind = name.split(" ", 2)
    for line, middle in ((f"{color} {emblem_name}", 0.27), (kind, 0.75)):
        size = 0.7 * scale      # 0.7 m, less where the line is too long
        size *= min(1, 0.94 * pixels / font(size).getlength(line))
        draw.text((pixels / 2, top + (bottom - top) * middle), line, (*strip[1], 255), font(size), "mm",
                  stroke_width=pixels // 256)
    return image


@lru_cache(maxsize=64)
def _large(*sign):
    return np.asarray(_sign(*sign, FULL))


@lru_cache(maxsize=2048)    # those of some cities are kept for good; 0.1 MB each at most
def _small(*sign, width):
    image = _sign(*sign, SMALL)
    return np.asarray(image.resize((width, round(width * TOP / SIGN)), Image.Resampling.BOX))


@lru_cache(maxsize=8)
def _tree(kind):
    """Return a tree, "round", "palm" or "cypress": (256, 160, 4) uint8 with alpha, 5 m wide and 8 m tall."""
    rng, image = random.Random(kind), Image.new("RGBA", (160, 256))
    draw = ImageDraw.Draw(image)
    draw.rectangle((74, 90, 86, 256), (88, 66, 48, 255))
    for i in range(90):
        color = tuple(int(v * (0.6 + i / 180)) for v in (68, 124, 55)) + (255,)    # lighter and lighter
        if kind == "palm":
            angle = rng.uniform(-3.4, 0.3)
            end = 80 + 74 * math.cos(angle), 75 + 46 * math.sin(angle) + 34 * abs(math.cos(angle))
            draw.line((80, 75, (80 + end[0]) / 2, 58 + 30 * math.sin(angle), *end), color, 6)
            continue
        round_ = rng.gauss(80, 24), rng.gauss(88, 32), 20
        slim = rng.gauss(80, 9), rng.uniform(15, 215), 15
        x, y, r = round_ if kind == "round" else slim
        draw.ellipse((x - r, y - r, x + r, y + r), color)
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------------ walls

def _starts(town):
    """Return where the walls along a street begin at a node: {(node, neighbor, side): metres from the node},
    side 1 right and -1 left of the street as one leaves the node; and the walls across the corners, [(p, q),
    ...]. The corner is cut back to 13.5 m along its bisector, behind any sign."""
    starts, corners = {}, []
    for node, streets in enumerate(town.neighbors):
        here = town.nodes[node]
        headings = {other: bearing(here, town.nodes[other]) for other in streets}
        order = sorted(streets, key=headings.get)
        for first, second in zip(order, order[1:] + order[:1]):
            half = math.radians((headings[second] - headings[first]) % 360 or 360) / 2
            start = max(WALL / math.tan(half), -WALL)
            if half < 1.3:
                start = max(start + 2, (13.5 - WALL * math.sin(half)) / math.cos(half))
            starts[node, first, 1] = starts[node, second, -1] = start
            ends = [_beside(here, town.nodes[other], start, side * WALL)
                    for other, side in ((first, 1), (second, -1))]
            room = min(math.dist(here, town.nodes[first]), math.dist(here, town.nodes[second]))
            if math.dist(*ends) > 1 and start < 0.6 * room:
                corners.append(ends)
    return starts, corners


def _beside(a, b, along, right):
    """Return the point `along` metres from a towards b and `right` metres to the right of that line."""
    direction = (b - a) / np.linalg.norm(b - a)
    return a + along * direction + right * np.array([direction[1], -direction[0]])


def _streets(town, eye, radius):
    """Return both ends, (S, 2) each, of the streets within `radius` metres of eye."""
    a, b = (town.nodes[[edge[end] for edge in town.edges]] for end in (0, 1))
    near = distances(eye, a, b) < radius
    return a[near], b[near]


def _fronts(town, rng):
    """Return the fronts of all houses: [(p, q), ...], p to q with the house on the left."""
    starts, fronts = _starts(town)     # across the corners, to begin with
    for a, b in town.edges:
        for side in (1, -1):
            here, there = town.nodes[a], town.nodes[b]
            begin, end = starts[a, b, side], math.dist(here, there) - starts[b, a, -side]
            pieces = max(1, round((end - begin) / rng.uniform(*town.city.look["fronts"])))
            cuts = [_beside(here, there, along, side * WALL) for along in np.linspace(begin, end, pieces + 1)]
            if end - begin > 5:
                fronts += zip(cuts[1:], cuts) if side == 1 else zip(cuts, cuts[1:])
    return fronts


@lru_cache(maxsize=16)
def _walls(town):
    """Return all walls of a town: {"p", "q": (M, 2) ends, "height": (M,), "color": (M, 3), ...}, float32."""
    rng, rows, look = random.Random(f"houses of {town.name}"), [], town.city.look
    ends = _streets(town, town.nodes.mean(0), math.inf)
    for p, q in _fronts(town, rng):
        tower = rng.random() < look["towers"]
        floors, storey = rng.randint(*look["floors"]), rng.uniform(3.1, 3.7)
        floors = round(floors * rng.uniform(2, 4)) if tower else floors
        color = np.array(rng.choice(look["walls"])) * rng.uniform(0.88, 1.08)
        bay, seed, awning = rng.uniform(2.4, 3.4), rng.random(), rng.choice(AWNINGS)
        rest = (SHOP + storey * floors, *color, storey, bay, seed, *awning)
        rows.append((*p, *q, *rest))
        x, y = (q - p) / np.linalg.norm(q - p) * 12
        back = np.array((q, p)) + (-y, x)
        if distances(back[:, None], *ends).min() > WALL:        # room for the other three walls
            rows += [(*q, *back[0], *rest), (*back[0], *back[1], *rest), (*back[1], *p, *rest)]
    rows = np.array(rows, np.float32)
    along = rows[:, 2:4] - rows[:, :2]
    # in the sun or in the shade
    light = 0.84 + 0.16 * np.cos(2 * np.arctan2(along[:, 1], along[:, 0]) - 1)
    return {"p": rows[:, :2], "q": rows[:, 2:4], "width": np.hypot(*along.T),
            "light": light.astype(np.float32),
            "height": rows[:, 4], "color": rows[:, 5:8], "storey": rows[:, 8], "bay": rows[:, 9],
            "seed": rows[:, 10], "awning": rows[:, 11:14]}


def _cross(a, b):
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def _cast(eye, rays, p, q):
    """Cast rays (C, 2) from eye against segments p-q (M, 2): distance (C, M), inf where missed, and share of
    p-q (C, M)."""
    w, e = (p - eye)[None], (q - p)[None]
    with np.errstate(divide="ignore", invalid="ignore"):
        det = _cross(rays[:, None], e)
        distance, share = _cross(w, e) / det, _cross(w, rays[:, None]) / det
    return np.where((share >= 0) & (share <= 1) & (distance > 0.2), distance, np.inf), share


def _mix(a, b, weight):
    return a + (b - a) * weight[:, None]


def _fraction(x):
    return x - np.floor(x)      # several times as fast as x % 1


def _paint_walls(look, walls, index, z, u, distance):
    """Return colors (N, 3) of points on the walls `index` (N,), z metres up, u metres along, `distance`
    metres away."""
    (wide, tall, frame), height = look["window"], walls["height"][index]
    color, light = walls["color"][index], walls["light"][index]
    row, column = (z - SHOP) / walls["storey"][index], u / walls["bay"][index]
    y, x = np.abs(_fraction(row) - 0.52), np.abs(_fraction(column) - 0.5)
    pane = np.sin(np.floor(row) * 12.9 + np.floor(column) * 78.2 + walls["seed"][index] * 40) * 43.7
    pane = _fraction(pane)                                              # each window's own number in [0, 1)
    upper = (z > SHOP) & (height - z > 0.95)
    color[upper & (x < wide / 2 + 0.05) & (y < tall / 2 + 0.05)] = frame
    inside = np.flatnonzero(upper & (x < wide / 2) & (y < tall / 2) & ((x > 0.02) | (distance > 40)))
    color[inside] = np.array(GLASS, np.float32) * (0.7 + 0.6 * pane[inside, None])
    low = np.flatnonzero(z < SHOP)                                      # shops, 4.2 m each
    color[low] = _paint_shops(color[low], walls["awning"][index[low]], z[low], u[low], pane[low])
    light = np.where((height - z < 0.7) | ((z > SHOP - 0.4) & (z < SHOP)), 1.14 * light, light)     # cornices
    light = np.where((height - z > 0.7) & (height - z < 0.95), 0.6 * light, light)      # and a shadow
    return _mix(color * light[:, None], np.array(look["sky"][1], np.float32), 1 - np.exp(-distance / 600))


def _paint_shops(color, awning, z, u, pane):
    """Return the same for the ground floor alone."""
    across = np.abs(_fraction(u / 4.2) - 0.5)
    pane = np.array((46, 52, 60), np.float32) + 70 * ((0.5 - across) * pane)[:, None]
    color = np.where(((z > 0.5) & (z < 2.9) & (across < 0.42))[:, None], pane, color)
    stripe = np.where(_fraction(u / 1.2) < 0.5, 0.75, 1.1)
    return np.where(((z >= 2.9) & (z < 3.7) & (across < 0.46))[:, None], awning * stripe[:, None], color)


# --------------------------------------------------------------------------------------------- ground and sky

def _paint_ground(look, a, b, x, y, distance):
    """Return colors (N, 3) of points on the ground; a, b (S, 2): ends of the streets around, of which the
    nearest counts."""
    def place(start, forward):
        """Return metres along the street from one end, and to the right of it."""
        x1, y1 = x - start[..., 0], y - start[..., 1]
        return x1 * forward[..., 0] + y1 * forward[..., 1], x1 * forward[..., 1] - y1 * forward[..., 0]
    size = np.linalg.norm(b - a, axis=1).astype(np.float32)
    forward, a = ((b - a) / size[:, None]).astype(np.float32), a.astype(np.float32)
    best, nearest = np.full(len(x), np.inf, np.float32), np.zeros(len(x), np.int64)
    for i in range(len(a)):
        along, across = place(a[i], forward[i])
        along -= np.clip(along, 0, size[i])
        off = along * along + across * across
        nearest[off < best] = i
        np.minimum(best, off, out=best)
    along, across = place(a[nearest], forward[nearest])
    # from the nearer end
    off, across, along = np.sqrt(best), np.abs(across), np.minimum(along, size[nearest] - along)
    grain = np.sin(np.floor(x * 4) * 12.9 + np.floor(y * 4) * 78.2) * 437.5
    light = 0.97 + 0.06 * _fraction(grain) * np.maximum(1 - distance / 30, 0)
    joint = (off > ROAD) & (distance < 25) & (np.minimum(_fraction(x / 1.6), _fraction(y / 1.6)) < 0.045)
    light[joint] *= 0.88
    light[(off > ROAD - 0.5) & (off < ROAD)] *= 0.88        # gutter and kerb
    light[(off >= ROAD) & (off < ROAD + 0.35)] *= 1.12
    color = np.array(look["ground"], np.float32)[(off >= ROAD).astype(int) + (off >= WALL + 4)]
    dashes = (across < 0.14) & (along > 17) & (_fraction(along / 6) < 0.5)
    zebra = (along > 10.5) & (along < 14) & (off < ROAD - 0.6) & (_fraction(across / 1.2 + 0.25) < 0.5)
    color[dashes | zebra] = 226
    return _mix(color * light[:, None], np.array(look["sky"][1], np.float32), 1 - np.exp(-distance / 500))


def _paint_sky(look, x, y, rise, eye):
    """Return colors (N, 3) of the sky in directions (x, y), `rise` = tangent of the elevation; other clouds
    for each eye."""
    zenith, horizon = np.array(look["sky"], np.float32)
    color = _mix(horizon, zenith, np.minimum(rise / (rise + 0.6) * 1.3, 1))
    # on a ceiling of clouds
    x, y = x / (rise + 0.25) * 2.2 + eye[0] % 97, y / (rise + 0.25) * 2.2 + eye[1] % 89
    puff = np.sin(x + 1.3 * np.sin(y * 0.8)) + np.sin(y * 1.3 + 1.7 * np.sin(x * 0.6))
    puff += 0.5 * np.sin(3.1 * x + 2 * np.sin(2.7 * y))
    cover = np.clip(puff - 2 + 2.4 * look["clouds"], 0, 1)
    return _mix(color, np.float32(250), cover * 0.8 * np.minimum(1, rise * 6))


# ------------------------------------------------------------------------------------------------ the picture

def _scene(town, eye, rays, rise):
    """Return walls, ground and sky seen from eye along rays (C, 2); rise (R,) = tangent of the elevation of
    each row, top to bottom. -> picture (R, C, 3) float32, metres to the nearest wall (C,)."""
    look, walls, rise = town.city.look, _walls(town), rise[:, None]
    p, q = walls["p"], walls["q"]
    away = np.minimum(np.hypot(*(p - eye).T), np.hypot(*(q - eye).T))
    close = np.flatnonzero((away < FAR) & (_cross(q - p, eye - p) < 0))     # and facing us
    hit, share = _cast(eye, rays, p[close], q[close])     # (C, M)
    column = np.arange(len(rays))
    tops = (walls["height"][close] - EYE) / hit     # tangent of the elevation, 0 where missed
    # the nearest wall, and the one that stands out highest behind it
    first, second = hit.argmin(1), tops.argmax(1)
    reach, low, high = hit[column, first], tops[column, first], tops[column, second]
    picture = np.empty((len(rise) * len(rays), 3), np.float32)
    ground, sky = (rise < -EYE / reach) | ((rise <= 0) & np.isinf(reach)), rise > high

    def pixels(mask):
        """Return their numbers in the picture, columns, and tangents of the elevation."""
        index = np.flatnonzero(mask)
        r, c = np.divmod(index.astype(np.int32), len(rays))
        return index, c, rise[r, 0]
    index, c, up = pixels(sky)
    picture[index] = _paint_sky(look, *rays.T[:, c], up, eye)
    index, c, up = pixels(ground)
    east, north = rays.T[:, c] * (-EYE / up) + eye[:, None]
    picture[index] = _paint_ground(look, *_streets(town, eye, 60), east, north, -EYE / up)
    index, c, up = pixels(~(ground | sky))
    which = np.where(up <= low[c], first[c], second[c])
    distance, wall = hit[c, which], close[which]
    u = share[c, which] * walls["width"][wall]
    picture[index] = _paint_walls(look, walls, wall, EYE + up * distance, u, distance)
    return picture.reshape(len(rise), len(rays), 3), reach


def _sprites(town, eye, density):
    """Return signs and trees around eye, farthest first: (distance, left end, right end, top, image (rows,
    columns, 4)), ends as seen by who looks at the front. density: columns of the picture a radian."""
    found, eye = [], np.asarray(eye, float)
    for mark in (*town.corners.values(), *town.places.values()):
        distance = math.dist(mark.xy, eye)
        if distance < 120:
            xy = np.array(mark.xy)
            left = _left(town.panoramas[mark.at], xy) * SIGN / 2
            width = next((w for w in (8, 16, 32, 64, SMALL) if w >= 0.9 * SIGN * density / distance), FULL)
            sign = (mark.color, mark.emblem, mark.board, mark.name, town.city.look["strip"])
            image = _large(*sign) if width == FULL else _small(*sign, width=width)
            found.append((distance, xy + left, xy - left, TOP, image))
    for xy in _trees(town):
        distance = math.dist(xy, eye)
        if 3 < distance < 90:
            left = _left(eye, xy) * 2.5
            found.append((distance, xy + left, xy - left, 8.0, _tree(town.city.look["trees"])))
    return sorted(found, key=lambda sprite: -sprite[0])


def _left(reader, xy):
    """Return the unit vector to the left as the reader looks at xy."""
    x, y = (reader - xy) / np.linalg.norm(reader - xy)
    return np.array([y, -x])


@lru_cache(maxsize=16)
def _trees(town):
    """Return where trees stand, [(2,), ...]: on both pavements, half-way between two panoramas, away from the
    corners."""
    rng, trees = random.Random(f"trees of {town.name}"), []
    ends = _streets(town, town.nodes.mean(0), math.inf)
    for a, b in town.edges if town.city.look["trees"] else ():
        here, there = town.nodes[a], town.nodes[b]
        piece = math.dist(here, there) / pieces_of(here, there)
        spots = [_beside(here, there, piece * (k + 0.5), right) for k in range(1, pieces_of(here, there) - 1)
                 for right in (-7, 7)]
        trees += [xy for xy in spots if rng.random() < 0.6 and distances(xy, *ends).min() > 6.5]
    return trees


def _paste(picture, eye, rays, rise, reach, sprite):
    """Paste one sprite over the picture, where no wall is nearer. From behind, a sign is grey."""
    _, p, q, top, image = sprite
    hit, share = (x[:, 0] for x in _cast(eye, rays, p[None].astype(np.float32), q[None].astype(np.float32)))
    c = np.flatnonzero(hit < reach)
    if not len(c):
        return
    begin, end = np.searchsorted(-rise, [-(top - EYE) / hit[c].min(), EYE / hit[c].min()])
    v = (top - EYE - rise[begin:end, None] * hit[c]) / top         # (rows, columns), 0 at the top
    r, k = np.nonzero((v >= 0) & (v < 1))
    rows, columns = image.shape[:2]
    row, column = (v[r, k] * rows).astype(int), np.minimum((share[c[k]] * columns).astype(int), columns - 1)
    texel = image[row, column].astype(np.float32)
    if _facing(p, q, eye) < 0:      # never a tree
        texel[:, :3] = (96, 96, 100)
    r, c = r + begin, c[k]
    picture[r, c] = _mix(picture[r, c], texel[:, :3], texel[:, 3] / 255)


def _facing(p, q, eye):
    """Return a number that is positive where eye sees the front of the upright rectangle that has its left
    end at p."""
    return float(_cross(np.asarray(eye) - p, q - p))


def panorama(town, index, rotation, width, detail=2):
    """Return the equirectangular picture at panorama `index` of a streets.Town: (width / 2, width, 3) uint8.
    Heading h is at longitude h - 180 + rotation, the middle of the first and last columns at -180 and 180
    degrees, of the first and last rows at straight up and straight down (released code). Each pixel is the
    mean of detail x detail rays."""
    eye, height = town.panoramas[index].astype(np.float32), width // 2
    x, y = ((np.arange(n * detail) + 0.5) / detail - 0.5 for n in (width, height))
    headings = np.radians((x / (width - 1) - 0.5) * 360 + 180 - rotation)
    rise = np.tan(np.radians(np.clip((0.5 - y / (height - 1)) * 180, -89.9, 89.9))).astype(np.float32)
    sprites = _sprites(town, eye, width * detail / (2 * math.pi))
    blocks = []
    step = max(64, 2**17 // len(rise) // detail * detail)
    for start in range(0, len(headings), step):     # a few columns at a time stay in the processor's cache
        part = headings[start:start + step]
        rays = np.stack([np.sin(part), np.cos(part)], -1).astype(np.float32)
        picture, reach = _scene(town, eye, rays, rise)
        for sprite in sprites:
            _paste(picture, eye, rays, rise, reach, sprite)
        mean = sum(picture[i::detail, j::detail] for i in range(detail) for j in range(detail)) / detail**2
        blocks.append((np.clip(mean, 0, 255) + 0.5).astype(np.uint8))
    return np.concatenate(blocks, 1)
