"""Where everything is in the built-in cities: streets, panoramas, landmarks; and the specs of the cities.

A city is a seeded plan of intersections (grids, rings, hexagons, ...) joined up by streets, with panoramas
some 20 m apart, and landmarks: signs at most corners and beside half of the streets. See how a plan comes
out:

    python -c "from games import streets; print(streets.town('london').corners)"

Positions are metres (east, north) from the city's origin, headings degrees clockwise from north.
"""
import base64
import hashlib
import math
import random
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

# Of the generator: raise it when the same spec would give other cities, routes or pictures.
VERSION = 2
COLORS = {"Red": (214, 26, 32), "Orange": (255, 132, 0), "Yellow": (255, 226, 26), "Green": (24, 146, 50),
          "Cyan": (40, 214, 226), "Blue": (26, 62, 206), "Purple": (116, 30, 150), "Pink": (255, 140, 200)}
EMBLEMS = {"Star": "Cyan", "Moon": "Purple", "Heart": "Red", "Crown": "Yellow",      # each on a disc of a
           "Fish": "Blue", "Tree": "Green", "Ring": "Orange", "Cross": "Pink"}       # color of its own
DEGREE = math.pi / 180 * 6371000    # metres in a degree of latitude


@dataclass(frozen=True)
class City:
    """The spec of one city: everything else follows from it."""
    origin: tuple[float, float]     # (lat, lon)
    types: tuple[str, str, str]     # last words of the landmarks' names, one a board
    longest: float                  # metres: longer streets are not built
    plan: tuple                     # street plans laid over one another, see _points()
    look: dict                      # for games/drawing.py


@dataclass(frozen=True)
class Landmark:
    name: str
    color: str
    emblem: str
    board: int          # index into City.types
    xy: tuple[float, float]
    at: int             # the panorama where its sign is to be read: the sign faces it


@dataclass(frozen=True, eq=False)    # hashed by identity: a key of caches
class Town:
    """A city laid out. The panoramas of the nodes come first: panorama i < len(nodes) is at node i."""
    name: str
    city: City
    nodes: np.ndarray           # (N, 2)
    edges: tuple                # ((a, b), ...), a < b
    neighbors: tuple            # of each node: {neighbor: index of the edge}
    panoramas: np.ndarray       # (P, 2)
    ids: tuple                  # of each panorama, 22 characters
    corners: dict               # node: its Landmark
    places: dict                # edge: the Landmark beside it


# --------------------------------------------------------------------------------------------------- geometry

def bearing(a, b):
    """Return the compass heading from point a to point b, degrees in [0, 360)."""
    return math.degrees(math.atan2(b[0] - a[0], b[1] - a[1])) % 360


def apart(a, b):
    """Return the unsigned angle between two headings, degrees in [0, 180]."""
    return abs((a - b + 180) % 360 - 180)


def geocode(city, xy):
    """Return [lat, lon], to the centimetre."""
    lat, lon = city.origin
    return [round(lat + xy[1] / DEGREE, 7), round(lon + xy[0] / (DEGREE * math.cos(math.radians(lat))), 7)]


def distances(points, a, b):
    """Return the distances of points (..., 2) to the segments from a (..., 2) to b (..., 2)."""
    along = b - a
    share = np.clip(((points - a) * along).sum(-1) / (along * along).sum(-1), 0, 1)
    return np.linalg.norm(points - a - share[..., None] * along, axis=-1)


def pieces_of(a, b):
    """Return into how many equal pieces, some 20 m each, the panoramas cut the street from node a to node
    b."""
    return max(3, round(math.dist(a, b) / 20))


# ---------------------------------------------------------------------------------------------------- streets

def _points(rng, kind, center, rotation, *shape):
    """Return the intersections of one plan, (N, 2), before it is merged with the others.

    lattice (dx, dy, columns, rows, stagger, skip): rows dy apart, each shifted by `stagger` columns against
    the one before; skip leaves out the middle of every hexagon.
    rings (gap, count): 1, 6, 12, ... points around the center.
    scatter (radius, gap): anywhere, at least gap apart."""
    if kind == "lattice":
        dx, dy, columns, rows, stagger, skip = shape
        points = [((i - (columns - 1) / 2 + (stagger * j) % 1) * dx, (j - (rows - 1) / 2) * dy)
                  for j in range(rows) for i in range(columns) if not (skip and (i - j // 2 - j) % 3 == 0)]
    elif kind == "rings":
        gap, count = shape
        turns = [(k * gap, 2 * math.pi * i / (6 * k or 1))
                 for k in range(count + 1) for i in range(6 * k or 1)]
        points = [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in turns]
    else:
        radius, gap = shape
        points = []
        for _ in range(6000):
            point = rng.uniform(-radius, radius), rng.uniform(-radius, radius)
            if math.hypot(*point) < radius and all(math.dist(point, other) > gap for other in points):
                points.append(point)
    jitter = 3.5 if kind == "lattice" else 5
    points = [(x + rng.uniform(-jitter, jitter), y + rng.uniform(-jitter, jitter)) for x, y in points]
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    return np.array(points) @ np.array([[cos, -sin], [sin, cos]]) + center    # clockwise, as headings are


def _connect(points, longest, shortest=60, angle=38, clear=38):
    """Return streets between points, shortest first (a greedy triangulation): none crosses another, meets one
    at less than `angle` degrees or passes a point within `clear` metres. -> [(a, b), ...]"""
    pairs = [(math.dist(points[a], points[b]), a, b)
             for a in range(len(points)) for b in range(a + 1, len(points))]
    edges, headings = [], [[] for _ in points]
    for _, a, b in sorted(pair for pair in pairs if shortest <= pair[0] <= longest):
        there, back = bearing(points[a], points[b]), bearing(points[b], points[a])
        if any(apart(new, old) < angle for new, end in ((there, a), (back, b)) for old in headings[end]):
            continue
        near = distances(points, points[a], points[b]) < clear
        near[[a, b]] = False
        if near.any() or _crossed(points, edges, a, b):
            continue
        edges.append((a, b))
        headings[a].append(there)
        headings[b].append(back)
    return edges


def _crossed(points, edges, a, b):
    """Tell whether the street a-b would cross one of the edges."""
    others = [edge for edge in edges if not {a, b} & set(edge)]
    if not others:
        return False
    p, q = points[[c for c, _ in others]], points[[d for _, d in others]]

    def side(start, end, point):
        along, away = end - start, point - start
        return np.sign(along[..., 0] * away[..., 1] - along[..., 1] * away[..., 0])
    a, b = points[a], points[b]
    return bool(((side(a, b, p) != side(a, b, q)) & (side(p, q, a) != side(p, q, b))).any())


def _streets(city, rng):
    """Return (nodes (N, 2), edges [(a, b), ...]): the plans merged, joined up, rid of dead ends."""
    points = np.zeros((0, 2))
    for plan in city.plan:
        new = _points(rng, *plan)
        room = [np.linalg.norm(points - point, axis=1).min(initial=math.inf) > 62 for point in new]
        points = np.concatenate([points, new[room]])
    edges = _connect(points, city.longest)
    while True:
        degree = np.bincount(np.array(edges).ravel(), minlength=len(points))
        if degree.min() >= 2:
            return points, edges
        number = np.cumsum(degree >= 2) - 1
        edges = [(int(number[a]), int(number[b])) for a, b in edges if degree[a] >= 2 and degree[b] >= 2]
        points = points[degree >= 2]


# -------------------------------------------------------------------------------------------------- landmarks

def _corner(points, neighbors, node, rng):
    """Return where a sign can stand at a node, or None: some 10 m away, between two streets. Of all such
    spots one where the side is beyond doubt whichever street one arrives by (4 degrees from the border
    between two of SIDES), and, if there is one, where the sign is not cut by the border of two views (it is
    30 degrees wide)."""
    streets = sorted(bearing(points[node], points[other]) for other in neighbors)
    spots = []
    for first, second in zip(streets, streets[1:] + [streets[0] + 360]):
        for heading in np.arange(first + 26, second - 25, 2) if second - first <= 150 else ():
            clear = min(heading - first, second - heading)
            margin = min(22.5 - abs((heading - street + 22.5) % 45 - 22.5) for street in streets)
            seam = min(abs((heading - street) % 90 - 45) for street in streets)
            if margin >= 4:
                spots.append((2 * min(seam, 15) + min(clear, 32) + 6 * rng.random(), heading, clear))
    if not spots:
        return None
    _, heading, clear = max(spots)
    far = min(max(5.2 / math.sin(math.radians(clear)), 10), 12.5)
    return points[node] + far * np.array([math.sin(math.radians(heading)), math.cos(math.radians(heading))])


def _beside(points, edges, edge, spots, rng):
    """Return (panorama, where a sign can stand beside it) on an edge, or None. spots: {panorama: xy} along
    the edge."""
    a, b = points[list(edges[edge])]
    along = (b - a) / np.linalg.norm(b - a)
    others = np.array([e for i, e in enumerate(edges) if i != edge])
    choices = [(panorama, xy + side * 8 * np.array([along[1], -along[0]])) for panorama, xy in spots.items()
               for side in (-1, 1) if min(np.linalg.norm(xy - a), np.linalg.norm(xy - b)) >= 20]
    choices = [choice for choice in choices if distances(choice[1], *points[others.T]).min() > 14]
    return rng.choice(choices) if choices else None


def _name(used, xy, rng):
    """Return (color, emblem, board) for a new landmark: the least used ones first, none that is used within
    400 m."""
    kinds = [(color, emblem, board) for color in COLORS for emblem in EMBLEMS for board in range(3)]
    rng.shuffle(kinds)
    kinds.sort(key=lambda kind: len(used.get(kind, ())))
    far = (kind for kind in kinds if all(math.dist(xy, other) > 400 for other in used.get(kind, ())))
    kind = next(far, kinds[0])
    used.setdefault(kind, []).append(xy)
    return kind


@lru_cache(maxsize=None)     # there are not many
def town(name):
    """Return the city laid out: the same in any process. ValueError if there is no such city."""
    if name not in CITIES:
        raise ValueError(f"unknown city {name!r}, expected one of {', '.join(CITIES)}")
    city, rng, used = CITIES[name], random.Random(f"{name} {VERSION}"), {}
    nodes, edges = _streets(city, rng)
    neighbors = [{} for _ in nodes]
    panoramas, spots = list(nodes), []
    for i, (a, b) in enumerate(edges):
        neighbors[a][b] = neighbors[b][a] = i
        pieces = pieces_of(nodes[a], nodes[b])
        between = [nodes[a] + (nodes[b] - nodes[a]) * k / pieces for k in range(1, pieces)]
        spots.append(dict(enumerate(between, len(panoramas))))
        panoramas += between

    def landmark(at, xy):
        xy = tuple(map(float, xy))
        color, emblem, board = _name(used, xy, rng)
        words = [other.types[board] for other in CITIES.values()]
        word = rng.choice(words) if name in BROAD else city.types[board]
        return Landmark(f"{color} {emblem} {word}", color, emblem, board, xy, at)
    corners, places = {}, {}
    for node in range(len(nodes)):
        xy = _corner(nodes, neighbors[node], node, rng) if rng.random() < 0.78 else None
        if xy is not None:
            corners[node] = landmark(node, xy)
    for edge in range(len(edges)):
        spot = _beside(nodes, edges, edge, spots[edge], rng) if rng.random() < 0.55 else None
        if spot:
            places[edge] = landmark(*spot)
    ids = tuple(_identity(name, i) for i in range(len(panoramas)))
    return Town(name, city, nodes, tuple(edges), tuple(neighbors), np.array(panoramas), ids, corners, places)


def _identity(name, i):
    """Return 22 characters, like those of the released panoramas."""
    return base64.urlsafe_b64encode(hashlib.sha256(f"{name} {i}".encode()).digest())[:22].decode()


# ------------------------------------------------------------------------------------------------- the cities

def _grid(center, rotation, dx, dy, columns, rows):
    return ("lattice", center, rotation, dx, dy, columns, rows, 0, False)


def _look(walls, floors, towers, fronts, window, sky, clouds, ground, trees, strip):
    """Return what games/drawing.py needs: colors of walls; storeys (from, to) and the share of towers; widths
    of houses, m; windows (share of the width, of the height, color of the frame); sky (zenith, horizon) and
    its clouds, 0 to 1; asphalt, pavement, soil; the kind of tree; the strip with the name (background,
    letters)."""
    def rgb(text):
        return tuple(tuple(bytes.fromhex(color)) for color in text.split())
    return {"walls": rgb(walls), "floors": floors, "towers": towers, "fronts": fronts,
            "window": (*window[:2], *rgb(window[2])), "sky": rgb(sky), "clouds": clouds,
            "ground": rgb(ground), "trees": trees, "strip": rgb(strip)}


NEW_YORK = _look("984c3c 8c5a48 b4a08c 6c5850 c4b49c 745040", (4, 8), 0.16, (12, 22), (0.42, 0.6, "d4c8b4"),
                 "4c90d8 c4dcf0", 0.45, "505256 9c9c98 8c9470", None, "1c1c20 ffffff")
CITIES = {
    "new-york": City(
        (40.7359, -73.9911), ("Diner", "Deli", "Theater"), 122,
        (_grid((-240, 240), 29, 82, 92, 6, 6), _grid((245, 235), 2, 84, 90, 6, 6),
         _grid((-245, -245), -8, 90, 80, 6, 6), _grid((245, -240), 47, 80, 94, 6, 6)),
        NEW_YORK),
    "milan": City(
        (45.4642, 9.1900), ("Trattoria", "Gelateria", "Teatro"), 128,
        (("rings", (0, 0), 12, 92, 4), ("scatter", (0, 0), 0, 520, 92)),
        _look("c8a070 d6b88a b98a5e dcc8a0", (4, 6), 0, (16, 26), (0.36, 0.62, "6a7a5c"),
              "6aa2dc c8dcec", 0.3, "6c6a68 a8a49c b0a68c", "cypress", "fff4e0 7a1f1f")),
    "new-delhi": City(
        (28.6139, 77.2090), ("Chai House", "Sweets", "Bazaar"), 128,
        (("lattice", (0, 0), 20, 104, 90, 11, 11, 0.5, True),),
        _look("d8b48c e0c8a8 c89070 e8dcc8", (2, 4), 0, (10, 18), (0.5, 0.5, "8c5a3c"),
              "a8b0b4 dccfb4", 0.1, "7c746a b49c7c b89a6c", "round", "1f5c3c fff0c8")),
    "buenos-aires": City(
        (-34.6037, -58.3816), ("Parrilla", "Heladeria", "Milonga"), 118,
        (_grid((0, -200), 12, 100, 100, 9, 5), _grid((0, 260), 50, 100, 100, 7, 5)),
        _look("e8e0d0 d8c8b0 c0b8b0 f0e8dc", (5, 9), 0.05, (14, 22), (0.4, 0.7, "4c4c50"),
              "3c8ce0 b4d8f4", 0.5, "58585c a4a4a4 8c9c6c", "round", "e8f0fc 1f4c8c")),
    "london": City(
        (51.5074, -0.1278), ("Pub", "Books", "Inn"), 116,
        (("scatter", (0, 0), 0, 480, 72),),
        _look("8c4c3c a06050 d8ccb8 74443c", (3, 4), 0, (8, 13), (0.4, 0.62, "f0f0ec"),
              "98a4b0 ccd2d8", 1.0, "4c4e52 94969a 6c8858", "round", "141e3c f4e6b4")),
    "hong-kong": City(
        (22.3193, 114.1694), ("Noodles", "Tea Room", "Tailor"), 126,
        (_grid((-60, 130), 64, 70, 118, 9, 4), _grid((60, -240), 18, 120, 68, 5, 7)),
        _look("b8c4c4 a8b4a8 d0c8c0 c4a8a0 98a8b8", (12, 26), 0.2, (9, 15), (0.72, 0.5, "d8dcdc"),
              "8cb0c0 d4e0e0", 0.7, "4a4c50 8c8c8c 789078", None, "c01818 ffe060")),
    "new-york-uptown": City(
        (40.8075, -73.9626), ("Diner", "Deli", "Theater"), 120,
        (_grid((-240, 0), 29, 80, 96, 6, 10), _grid((240, 220), -20, 88, 84, 6, 5),
         _grid((240, -240), 60, 86, 86, 6, 5)),
        NEW_YORK),
    "melbourne": City(
        (-37.8136, 144.9631), ("Espresso", "Arcade", "Surf Shop"), 122,
        (_grid((0, 0), -20, 96, 72, 10, 6), ("scatter", (0, 0), 0, 500, 88)),
        _look("7c6c64 a89484 c8c0b4 5c6870", (2, 5), 0.14, (11, 20), (0.62, 0.55, "383c40"),
              "2f7fd8 a4d0f0", 0.4, "5c5e62 a0a0a0 98a868", "round", "f0f0e8 20242c")),
    "lagos": City(
        (6.5244, 3.3792), ("Buka", "Market", "Tailors"), 124,
        (("scatter", (-180, 0), 0, 340, 78), _grid((300, 0), 40, 86, 86, 5, 8)),
        _look("e8d078 d89c60 b8c8a0 e8e4d4 c87c5c", (1, 3), 0.04, (8, 16), (0.3, 0.36, "5c4030"),
              "88b8d8 e8e0cc", 0.6, "847466 b0885c b47844", "palm", "fff7d0 206030")),
    "san-francisco": City(
        (37.7749, -122.4194), ("Bakery", "Records", "Taqueria"), 125,
        (_grid((-150, 200), 9, 72, 120, 10, 5), _grid((100, -280), 46, 96, 96, 8, 4)),
        _look("e8c8d0 b8d8d8 e8e0b8 c8d0e8 f0ece4 d8c0a0", (2, 4), 0.03, (7, 10), (0.5, 0.68, "fcfcfc"),
              "7cb4e8 e0e8ec", 0.9, "66686c b0b0ac a89c7c", None, "fcfcf4 2c5070")),
    "paris": City(
        (48.8566, 2.3522), ("Bistro", "Boulangerie", "Cinema"), 122,
        (("rings", (-190, 120), 0, 90, 3), ("rings", (240, -160), 25, 86, 3),
         ("scatter", (0, 0), 0, 520, 90)),
        _look("e4d8bc dcd0b4 e8e0cc d0c4a8", (6, 7), 0, (14, 24), (0.36, 0.74, "b4aa92"),
              "88b4e0 dce4e8", 0.7, "64666a b4b0a4 a4a48c", "round", "1f4c34 f4e8b8")),
    "tokyo": City(
        (35.6762, 139.6503), ("Ramen", "Sushi", "Karaoke"), 104,
        (("lattice", (0, 0), 33, 88, 78, 11, 11, 0.5, False),),
        _look("d4d8dc b4bcc4 e8e8e4 a09890 c4d0d4", (3, 10), 0.1, (6, 12), (0.8, 0.45, "a8b0b8"),
              "78a8d8 d0dce4", 0.5, "54565a a8aaae 909488", None, "f8f8f8 c01828")),
    "cairo": City(
        (30.0444, 31.2357), ("Cafe", "Juice Bar", "Museum"), 120,
        (("scatter", (-150, 120), 0, 320, 70), _grid((260, -140), 16, 90, 76, 6, 7)),
        _look("d0b088 c4a074 dcc49c b89468", (4, 9), 0.03, (10, 18), (0.34, 0.5, "a07850"),
              "a4c0d4 e8d8b0", 0, "78706a c0a880 d0b07c", "palm", "284858 f0d890")),
    "lima": City(
        (-12.0464, -77.0428), ("Cevicheria", "Cantina", "Gallery"), 124,
        (_grid((-230, 0), 4, 92, 92, 6, 8), ("lattice", (280, 0), 32, 110, 74, 6, 8, 0.5, False)),
        _look("d89048 4888a8 d8b448 b85848 e0d8c0", (2, 4), 0, (10, 18), (0.32, 0.66, "6c4428"),
              "b4bcc4 d4d8d8", 1.2, "6c6a66 a89c8c b4a07c", "cypress", "70201c f8e8d0")),
}
# The paper's nine benchmark cities.
OTHERS = ("milan", "new-delhi", "buenos-aires", "london", "hong-kong", "new-york-uptown", "melbourne",
          "lagos", "san-francisco")
# For pre-training, with the words of all cities in their names, as a foundation model knows them all.
BROAD = ("paris", "tokyo", "cairo", "lima")
