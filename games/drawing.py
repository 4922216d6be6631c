"""Draw panoramas of the built-in cities by ray casting: one ray per column of the picture, numpy only.

A column looks in one compass direction. The walls that its ray meets decide whether a pixel shows sky, wall
or ground, and at which point of these, in metres. Windows, shops and lane markings are computed from that
point. Signs and trees are pictures pasted on upright rectangles. Look at the board of a sign:

    python -c "from games import drawing; drawing.board('Red', 'Star', 0, 256).save('board.png')"

Positions are metres (east, north), headings degrees clockwise from north, colors RGB from 0 to 255.
"""
import math
import random
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from games.streets import COLORS, EMBLEMS, SPECS, axes, bearing, cross, distances, pieces_of

EYE = 2.5           # camera above the ground
ROAD = 5            # half-widths: asphalt, and from wall to wall
WALL = 10
SIGN = 8            # width of a sign: 56 pixels per view suffice to read it (docs/lab-book.md)
POSTS, STRIP, TOP = 0.9, 2.3, 10.3      # a sign from the ground up: posts, a strip with the name, the board
FULL = 512          # pixels of a sign's width at most; others are SMALL or less, in powers of two
SMALL = 128
SHOP = 4.4          # height of the ground floor
FAR = 200           # walls beyond this are left out
GLASS = (62, 78, 98)
DARK = "#1e1e22"


# -------------------------------------------------------------------------------------------- signs and trees

font = lru_cache(maxsize=64)(ImageFont.load_default)        # Pillow's own, so many pixels high


@cache
def emblem(name, pixels):
    """Return the silhouette of one of EMBLEMS, an "L" image of pixels x pixels, drawn at 4 times the size for
    smooth edges."""
    mask = Image.new("L", (4 * pixels,) * 2)
    draw = ImageDraw.Draw(mask)
    for kind, fill, *numbers in SPECS["shapes"][name]:
        getattr(draw, kind)([4 * pixels * x for x in numbers], fill)
    return mask.resize((pixels, pixels), Image.Resampling.BOX)


def board(color, emblem_name, kind, pixels):
    """Return the board of a sign, an RGB image: the landmark's color with the emblem on a disc of the
    emblem's own color; kind 0 fills the square, 1 is a disc on black, 2 a square with its corners cut off, on
    white."""
    color, own, end = COLORS[color], COLORS[EMBLEMS[emblem_name]], pixels - 1
    image = Image.new("RGB", (pixels, pixels), (color, "black", "white")[kind])
    draw, edge, cut = ImageDraw.Draw(image), round(0.02 * pixels), 0.3 * pixels
    if kind == 1:
        draw.ellipse((edge, edge, end - edge, end - edge), color)
    else:
        far = end - cut
        draw.polygon((cut, 0, far, 0, end, cut, end, far, far, end, cut, end, 0, far, 0, cut), color)
        draw.rectangle((0, 0, end, end), None, DARK, edge)
    middle, size = (pixels / 2,) * 2, round(0.42 * pixels)
    draw.circle(middle, 0.4 * pixels, "white")
    draw.circle(middle, 0.35 * pixels, own)
    ink = "black" if np.dot(own, (0.3, 0.59, 0.11)) > 125 else "white"
    image.paste(ink, ((pixels - size) // 2,) * 2, emblem(emblem_name, size))
    return image


@lru_cache(maxsize=512)     # of 0.1 MB each; those as wide as FULL, which only wide pictures show, of 1.3 MB
def _sign(mark, width, background, ink):
    """Return a landmark's whole sign, (rows, width, 4) uint8 with alpha: board, posts, and a strip of one
    color with the name in another."""
    pixels = max(width, SMALL)
    scale = pixels / SIGN
    image = Image.new("RGBA", (pixels, round(TOP * scale)))
    draw, top, bottom = ImageDraw.Draw(image), (TOP - STRIP) * scale, (TOP - POSTS) * scale
    for x in (0.2, 0.8):
        draw.rectangle(((x - 0.02) * pixels, bottom, (x + 0.02) * pixels, TOP * scale), "#46464a")
    image.paste(board(mark.color, mark.emblem, mark.board, pixels), (0, 0))
    draw.rectangle((0, top, pixels, bottom), background)
    for line, middle in ((f"{mark.color} {mark.emblem}", 0.27), (mark.word, 0.75)):
        size = 0.7 * scale      # 0.7 m, less where the line is too long
        size *= min(1, 0.94 * pixels / font(size).getlength(line))
        draw.text((pixels / 2, top + (bottom - top) * middle), line, ink, font(size), "mm",
                  stroke_width=pixels // 256)
    return np.asarray(image.resize((width, round(width * TOP / SIGN)), Image.Resampling.BOX))


@cache
def _tree(kind):
    """Return a tree, "round", "palm" or "cypress": (256, 160, 4) uint8 with alpha, 5 m wide and 8 m tall."""
    rng, image = random.Random(kind), Image.new("RGBA", (160, 256))
    draw = ImageDraw.Draw(image)
    draw.rectangle((74, 90, 86, 256), "#584230")
    for i in range(90):
        color = tuple(int(v * (0.6 + i / 180)) for v in (68, 124, 55))      # lighter and lighter
        if kind == "palm":
            angle = rng.uniform(-3.4, 0.3)
            x, y = math.cos(angle), math.sin(angle)
            draw.line((80, 75, 80 + 37 * x, 58 + 30 * y, 80 + 74 * x, 75 + 46 * y + 34 * abs(x)), color, 6)
        else:
            leaves = {"round": ((rng.gauss(80, 24), rng.gauss(88, 32)), 20),
                      "cypress": ((rng.gauss(80, 9), rng.uniform(15, 215)), 15)}
            draw.circle(*leaves[kind], color)
    return np.asarray(image)


# ------------------------------------------------------------------------------------------------------ walls

def _at(a, b, along, right):
    """Return the point `along` metres from a towards b and `right` metres to the right of that line."""
    forward, side = axes(a, b)
    return a + along * forward + right * side


def _fronts(town, rng):
    """Return the fronts of all houses: [(p, q), ...], p to q with the house on the left. A corner is cut back
    to 13.5 m along its bisector, behind any sign, and has a front across it."""
    # {(node, neighbor, side): metres from the node to where the walls along a street begin}, on its right (1)
    # and its left (-1) as one leaves the node
    starts, fronts = {}, []
    for node, here in enumerate(town.nodes):
        others = [sum(edge) - node for edge in town.edges if node in edge]
        turns = sorted((bearing(here, town.nodes[other]), other) for other in others)
        for (heading, first), (next_heading, second) in pairwise([*turns, turns[0]]):
            half = math.radians((next_heading - heading) % 360) / 2
            start = max(WALL / math.tan(half), -WALL)
            if half < 1.3:
                start = max(start + 2, (13.5 - WALL * math.sin(half)) / math.cos(half))
            starts[node, first, 1] = starts[node, second, -1] = start
            ends = [_at(here, town.nodes[other], start, right)
                    for other, right in ((first, WALL), (second, -WALL))]
            if math.dist(*ends) > 1:
                fronts.append(ends)
    for a, b in town.edges:
        here, there = town.nodes[[a, b]]
        for side in (1, -1):
            begin, end = starts[a, b, side], math.dist(here, there) - starts[b, a, -side]
            pieces = max(1, round((end - begin) / rng.uniform(*town.look["fronts"])))
            cuts = [_at(here, there, along, side * WALL) for along in np.linspace(begin, end, pieces + 1)]
            fronts += [pair[::-side] for pair in pairwise(cuts)]
    return fronts


@cache
def _walls(town):
    """Return all walls of a town, (M,) records: ends p and q, height and so on."""
    rng, rows, look = random.Random(f"houses of {town.name}"), [], town.look
    for p, q in _fronts(town, rng):
        tower = rng.random() < look["towers"]
        floors, storey = rng.randint(*look["floors"]), rng.uniform(3.1, 3.7)
        if tower:
            floors = round(floors * rng.uniform(2, 4))
        color = np.array(rng.choice(look["walls"])) * rng.uniform(0.88, 1.08)
        bay, seed, awning = rng.uniform(2.4, 3.4), rng.random(), rng.choice(SPECS["awnings"])
        back = (q, p) - 12 * axes(p, q)[1]
        room = distances(back[:, None], *town.ends).min() > WALL        # for the other three walls
        rows += [(*ends, SHOP + storey * floors, color, storey, bay, seed, awning, 0, 0)
                 for ends in pairwise((p, q, *back, p))][:4 if room else 1]
    walls = np.rec.array(rows, names="p,q,height,color,storey,bay,seed,awning,width,light",
                         formats="2f4,2f4,f4,3f4,f4,f4,f4,3f4,f4,f4")
    east, north = (walls.q - walls.p).T
    walls.width = np.hypot(east, north)
    walls.light = 0.84 + 0.16 * np.cos(2 * np.arctan2(north, east) - 1)      # in the sun or in the shade
    return walls


def _cast(eye, rays, p, q):
    """Cast rays (..., 2) from eye against segments p-q: distance, inf where missed, and share of p-q."""
    with np.errstate(divide="ignore", invalid="ignore"):
        det = cross(rays, q - p)
        distance, share = cross(p - eye, q - p) / det, cross(p - eye, rays) / det
    return np.where((share >= 0) & (share <= 1) & (distance > 0.2), distance, np.inf), share


def _mix(a, b, weight):
    return a + (np.float32(b) - a) * weight[:, None]


def _fraction(x):
    return x - np.floor(x)      # several times as fast as x % 1


def _noise(x, y, seed, scale):
    """Return a number in [0, 1) that differs from one whole (x, y) to the next."""
    return _fraction(np.sin(np.floor(x) * 12.9 + np.floor(y) * 78.2 + seed) * scale)


def _paint_walls(look, wall, z, u, distance):
    """Return colors (N, 3) of points on walls (N,), z metres up, u metres along, `distance` metres away."""
    (wide, tall, frame), below = look["window"], wall.height - z
    color, light = wall.color, wall.light
    row, column = (z - SHOP) / wall.storey, u / wall.bay
    y, x = np.abs(_fraction(row) - 0.52), np.abs(_fraction(column) - 0.5)
    pane = _noise(row, column, wall.seed * 40, 43.7)
    upper = (z > SHOP) & (below > 0.95)
    color[upper & (x < wide / 2 + 0.05) & (y < tall / 2 + 0.05)] = frame
    inside = upper & (x < wide / 2) & (y < tall / 2) & ((x > 0.02) | (distance > 40))
    color[inside] = np.float32(GLASS) * (0.7 + 0.6 * pane[inside, None])
    x = np.abs(_fraction(u / 4.2) - 0.5)        # across a shop
    inside = (z > 0.5) & (z < 2.9) & (x < 0.42)
    color[inside] = np.float32((46, 52, 60)) + 70 * ((0.5 - x) * pane)[inside, None]
    awning = (z >= 2.9) & (z < 3.7) & (x < 0.46)
    stripe = np.where(_fraction(u[awning] / 1.2) < 0.5, 0.75, 1.1)
    color[awning] = wall.awning[awning] * stripe[:, None]
    light[(below < 0.7) | ((z > SHOP - 0.4) & (z < SHOP))] *= 1.14      # cornices
    light[(below > 0.7) & (below < 0.95)] *= 0.6                        # and a shadow
    return _mix(color * light[:, None], look["sky"][1], 1 - np.exp(-distance / 600))


# --------------------------------------------------------------------------------------------- ground and sky

def _paint_ground(town, eye, xy, distance):
    """Return colors (N, 3) of points xy (2, N) on the ground, `distance` metres from eye; the nearest street
    counts."""
    nearest = np.full((3, len(distance)), np.inf, np.float32)
    for a, b in zip(*town.ends[:, distances(eye, *town.ends) < 60]):
        x, y = xy - np.float32(a)[:, None]
        size = np.float32(np.linalg.norm(b - a))
        east, north = np.float32((b - a) / size)
        ahead, aside = x * east + y * north, x * north - y * east
        away = (ahead - np.clip(ahead, 0, size))**2 + aside**2
        street = away, np.abs(aside), np.minimum(ahead, size - ahead)       # the last from the nearer end
        nearest = np.where(away < nearest[0], street, nearest)
    off, across, along = nearest
    off = np.sqrt(off)
    light = 0.97 + 0.06 * _noise(*xy * 4, 0, 437.5) * np.maximum(1 - distance / 30, 0)
    joints = (off > ROAD) & (distance < 25) & (_fraction(xy / 1.6).min(0) < 0.045)
    light[joints | (off > ROAD - 0.5) & (off < ROAD)] *= 0.88       # and the gutter
    light[(off >= ROAD) & (off < ROAD + 0.35)] *= 1.12              # the kerb
    color = np.float32(town.look["ground"])[np.digitize(off, (ROAD, WALL + 4))]
    dashes = (across < 0.14) & (along > 17) & (_fraction(along / 6) < 0.5)
    zebra = (along > 10.5) & (along < 14) & (off < ROAD - 0.6) & (_fraction(across / 1.2 + 0.25) < 0.5)
    color[dashes | zebra] = 226
    return _mix(color * light[:, None], town.look["sky"][1], 1 - np.exp(-distance / 500))


def _paint_sky(look, eye, xy, rise):
    """Return colors (N, 3) of the sky in directions xy (2, N), `rise` = tangent of the elevation; other
    clouds for each eye."""
    zenith, horizon = look["sky"]
    color = _mix(np.float32(horizon), zenith, np.minimum(rise / (rise + 0.6) * 1.3, 1))
    x, y = xy / (rise + 0.25) * 2.2 + (eye % np.float32((97, 89)))[:, None]     # on a ceiling of clouds
    puff = np.sin(x + 1.3 * np.sin(y * 0.8)) + np.sin(y * 1.3 + 1.7 * np.sin(x * 0.6))
    puff += 0.5 * np.sin(3.1 * x + 2 * np.sin(2.7 * y))
    cover = np.clip(puff - 2 + 2.4 * look["clouds"], 0, 1)
    return _mix(color, 250, cover * 0.8 * np.minimum(1, rise * 6))


# ------------------------------------------------------------------------------------------------ the picture

def _scene(town, eye, rays, rise):
    """Return walls, ground and sky seen from eye along rays (C, 2); rise (R, 1) = tangent of the elevation of
    each row, top to bottom. -> picture (R, C, 3) float32, metres to the nearest wall (C,)."""
    look, walls = town.look, _walls(town)
    p, q = walls.p, walls.q
    away = np.minimum(*(np.hypot(*(ends - eye).T) for ends in (p, q)))
    walls = walls[(away < FAR) & (cross(q - p, eye - p) < 0)]       # and facing us
    hit, share = _cast(eye, rays[:, None], walls.p, walls.q)      # (C, M)
    tops = (walls.height - EYE) / hit        # tangent of the elevation, 0 where missed
    # the nearest wall, and the one that stands out highest behind it
    first, second = hit.argmin(1), tops.argmax(1)
    reach, low = hit.min(1), tops[np.arange(len(rays)), first]
    ground, sky = rise < -EYE / reach, rise > tops.max(1)
    picture = np.empty((len(rise), len(rays), 3), np.float32)
    r, c = np.nonzero(sky)
    picture[r, c] = _paint_sky(look, eye, rays.T.take(c, 1), rise[r, 0])
    r, c = np.nonzero(ground)
    distance = -EYE / rise[r, 0]
    picture[r, c] = _paint_ground(town, eye, rays.T.take(c, 1) * distance + eye[:, None], distance)
    r, c = np.nonzero(~(ground | sky))
    up = rise[r, 0]
    which = np.where(up <= low[c], first[c], second[c])
    distance, wall = hit[c, which], walls.take(which)       # some 25 times as fast as walls[which]
    picture[r, c] = _paint_walls(look, wall, EYE + up * distance, share[c, which] * wall.width, distance)
    return picture, reach


@cache
def _trees(town):
    """Return where trees stand, [(2,), ...]: on both pavements, half-way between two panoramas, away from the
    corners."""
    rng, trees = random.Random(f"trees of {town.name}"), []
    for here, there in zip(*town.ends) if town.look["trees"] else ():
        pieces = pieces_of(here, there)
        spots = [_at(here, there, math.dist(here, there) / pieces * (k + 0.5), right)
                 for k in range(1, pieces - 1) for right in (-7, 7)]
        trees += [xy for xy in spots if rng.random() < 0.6 and distances(xy, *town.ends).min() > 6.5]
    return trees


def _sprites(town, eye, density):
    """Return signs and trees around eye, farthest first: (place, point that it faces, width, top, image
    (rows, columns, 4)). density: columns of the picture per radian."""
    look = town.look
    found = [(xy, eye, 5, 8, _tree(look["trees"])) for xy in _trees(town) if 3 < math.dist(xy, eye) < 90]
    for mark in town.landmarks:
        xy, reader, distance = np.array(mark.xy), town.panoramas[mark.at], math.dist(mark.xy, eye)
        if distance < 120:
            width = next((w for w in (8, 16, 32, 64, SMALL) if w >= 0.9 * SIGN * density / distance), FULL)
            image = _sign(mark, width, *look["strip"])
            if np.dot(eye - xy, reader - xy) < 0:       # seen from behind, it is grey
                image = image * np.uint8((0, 0, 0, 1)) + np.uint8((96, 96, 100, 0))
            found.append((xy, reader, SIGN, TOP, image))
    return sorted(found, key=lambda sprite: -math.dist(sprite[0], eye))


def _paste(picture, eye, rays, rise, reach, xy, reader, width, top, image):
    """Paste one sprite over the picture, where no wall is nearer."""
    left = axes(xy, reader)[1] * width / 2
    hit, share = _cast(eye, rays, *np.float32((xy + left, xy - left)))
    c = np.flatnonzero(hit < reach)
    v = (top - EYE - rise * hit[c]) / top       # (rows, columns), 0 at the top
    r, k = np.nonzero((v >= 0) & (v < 1))
    rows, columns = image.shape[:2]
    row, column = (v[r, k] * rows).astype(int), np.minimum((share[c[k]] * columns).astype(int), columns - 1)
    texel = np.float32(image[row, column])
    picture[r, c[k]] = _mix(picture[r, c[k]], texel[:, :3], texel[:, 3] / 255)


def panorama(town, index, rotation, width):
    """Return the equirectangular picture at panorama `index` of a streets.Town: (width / 2, width, 3) uint8.
    Heading h is at longitude h - 180 + rotation, the middle of the first and last columns at -180 and 180
    degrees, of the first and last rows at straight up and straight down (released code). Each pixel is the
    mean of 2 x 2 rays."""
    eye = np.float32(town.panoramas[index])
    across, down = (((np.arange(2 * n) + 0.5) / 2 - 0.5) / (n - 1) - 0.5 for n in (width, width // 2))
    headings = np.radians(across * 360 + 180 - rotation)
    rise = np.float32(np.tan(np.radians(np.clip(-180 * down, -89.9, 89.9))))[:, None]
    directions = np.float32([np.sin(headings), np.cos(headings)]).T
    sprites = _sprites(town, eye, width / math.pi)
    blocks = []
    step = 2**16 // len(rise) * 2       # a few columns at a time stay in the processor's cache
    for rays in np.split(directions, range(step, len(directions), step)):
        picture, reach = _scene(town, eye, rays, rise)
        for sprite in sprites:
            _paste(picture, eye, rays, rise, reach, *sprite)
        mean = sum(picture[i::2, j::2] for i in (0, 1) for j in (0, 1)) / 4
        blocks.append((np.clip(mean, 0, 255) + 0.5).astype(np.uint8))
    return np.concatenate(blocks, 1)
