"""Lay out the built-in cities: streets, panoramas, landmarks.

A city is a seeded plan of intersections (grids, rings, hexagons, ...) joined up by streets, with panoramas
some 20 m apart, and landmarks: signs at most corners and beside half of the streets. The specs are in
games/cities.toml. See how a plan comes out:

    python -c "from games import streets; print(streets.town('london').corners)"

Positions are metres (east, north) from the city's origin, headings degrees clockwise from north.
"""
import base64
import hashlib
import itertools
import math
import random
import tomllib
from collections import defaultdict
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import numpy as np

# Of the generator: raise it when the same spec would give other cities, routes or pictures.
VERSION = 2
DEGREE = math.pi / 180 * 6371000    # metres in a degree of latitude


@dataclass(frozen=True)
class City:
    """The spec of one city, see cities.toml: everything else follows from it."""
    origin: tuple[float, float]     # (lat, lon)
    types: tuple[str, str, str]
    longest: float
    plan: tuple
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

    @property
    def landmarks(self):
        return *self.corners.values(), *self.places.values()

    @cached_property
    def ends(self):
        """Return both ends of every street, (2, E, 2)."""
        return self.nodes[np.transpose(self.edges)]


def _read(value):
    """Return a value of cities.toml with tuples for lists, (r, g, b) for "#rrggbb", and None for "none"."""
    if isinstance(value, dict):
        return {key: _read(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return tuple(map(_read, value))
    if value == "none":
        return None
    return tuple(bytes.fromhex(value[1:])) if str(value).startswith("#") else value


SPECS = _read(tomllib.loads(Path(__file__).with_name("cities.toml").read_text(encoding="utf-8")))
COLORS, EMBLEMS = SPECS["colors"], SPECS["emblems"]     # {name: RGB}, {name: the color of its disc}
CITIES = {name: City(**spec) for name, spec in SPECS["cities"].items()}
OTHERS = tuple(CITIES)[1:10]        # the paper's nine benchmark cities
# For pre-training, with the words of all cities in their names, as a foundation model knows them all.
BROAD = tuple(CITIES)[10:]


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


def axes(a, b):
    """Return the unit vectors from point a towards b, and to the right of that."""
    x, y = (b - a) / np.linalg.norm(b - a)
    return np.array([x, y]), np.array([y, -x])


def cross(a, b):
    """Return the cross products of vectors (..., 2): positive where b is to the left of a."""
    return a[..., 0] * b[..., 1] - a[..., 1] * b[..., 0]


def distances(points, a, b):
    """Return the distances of points (..., 2) to the segments from a (..., 2) to b (..., 2)."""
    along = b - a
    share = np.clip(((points - a) * along).sum(-1) / (along * along).sum(-1), 0, 1)
    return np.linalg.norm(points - a - share[..., None] * along, axis=-1)


def pieces_of(a, b):
    """Return into how many equal pieces, some 20 m each, panoramas cut the street from node a to node b."""
    return max(3, round(math.dist(a, b) / 20))


# ---------------------------------------------------------------------------------------------------- streets

def _points(rng, kind, center, rotation, *shape):
    """Return the intersections of one plan of cities.toml, (N, 2), before it is merged with the others."""
    if kind == "lattice":
        dx, dy, columns, rows, stagger, skip = shape
        points = [((i - (columns - 1) / 2 + stagger * j % 1) * dx, (j - (rows - 1) / 2) * dy)
                  for j in range(rows) for i in range(columns) if not skip or (i - j // 2 - j) % 3]
    elif kind == "rings":
        gap, count = shape
        turns = [(k * gap, 2 * math.pi * i / (6 * k or 1))
                 for k in range(count + 1) for i in range(6 * k or 1)]
        points = [(radius * math.cos(angle), radius * math.sin(angle)) for radius, angle in turns]
    else:
        radius, gap = shape
        points = []
        for _ in range(6000):
            point = [rng.uniform(-radius, radius) for _ in "xy"]
            if math.hypot(*point) < radius and all(math.dist(point, other) > gap for other in points):
                points.append(point)
    jitter = 3.5 if kind == "lattice" else 5
    points = points + np.array([[rng.uniform(-jitter, jitter) for _ in "xy"] for _ in points])
    cos, sin = math.cos(math.radians(rotation)), math.sin(math.radians(rotation))
    return points @ np.array([[cos, -sin], [sin, cos]]) + center    # clockwise, as headings are


def _connect(points, longest, shortest=60, angle=38, clear=38):
    """Return streets between points, shortest first (a greedy triangulation): none crosses another, meets one
    at less than `angle` degrees or passes a point within `clear` metres. -> [(a, b), ...]"""
    pairs = sorted((length, a, b) for a, b in itertools.combinations(range(len(points)), 2)
                   if shortest <= (length := math.dist(points[a], points[b])) <= longest)
    edges, headings = [], [[] for _ in points]
    for _, a, b in pairs:
        there, back = bearing(points[a], points[b]), bearing(points[b], points[a])
        if any(apart(new, old) < angle for new, end in ((there, a), (back, b)) for old in headings[end]):
            continue
        near = distances(points, points[a], points[b]) < clear      # always a and b themselves
        p, q = points[np.reshape(edges, (-1, 2)).T.astype(int)]
        if near.sum() == 2 and not _crossed(points[a], points[b], p, q):
            edges.append((a, b))
            headings[a].append(there)
            headings[b].append(back)
    return edges


def _crossed(a, b, p, q):
    """Tell whether the street from a to b crosses one of those from p to q (N, 2). To meet at an end, where a
    cross product is 0, is not to cross."""
    opposite = cross(b - a, p - a) * cross(b - a, q - a) < 0        # p and q lie on different sides of it
    return (opposite & (cross(q - p, a - p) * cross(q - p, b - p) < 0)).any()


def _streets(city, rng):
    """Return (nodes (N, 2), edges [(a, b), ...]): the plans merged, joined up, rid of dead ends."""
    points = np.zeros((0, 2))
    for plan in city.plan:
        new = _points(rng, *plan)
        room = [np.linalg.norm(points - point, axis=1).min(initial=math.inf) > 62 for point in new]
        points = np.concatenate([points, new[room]])
    edges = _connect(points, city.longest)
    while True:
        degree = np.bincount(np.ravel(edges), minlength=len(points))
        if degree.min() >= 2:
            return points, edges
        number = np.cumsum(degree >= 2) - 1
        edges = [(int(number[a]), int(number[b])) for a, b in edges if min(degree[[a, b]]) >= 2]
        points = points[degree >= 2]


# -------------------------------------------------------------------------------------------------- landmarks

def _corner(points, neighbors, node, rng):
    """Return (panorama, where a sign can stand) at a node, or None: some 10 m away, between two streets. Of
    all such spots one where the side is beyond doubt whichever street one arrives by (4 degrees from the
    border between two of SIDES), and, if there is one, where the sign is not cut by the border of two views
    (it is 30 degrees wide)."""
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
    heading = math.radians(heading)
    return node, points[node] + far * np.array([math.sin(heading), math.cos(heading)])


def _beside(points, edges, edge, spots, rng):
    """Return (panorama, where a sign can stand beside it) on an edge, or None. spots: {panorama: xy} along
    the edge."""
    a, b = points[list(edges[edge])]
    right = axes(a, b)[1]
    others = points[np.transpose([other for other in edges if other != edges[edge]])]
    choices = [(panorama, xy + side * 8 * right) for panorama, xy in spots.items() for side in (-1, 1)
               if min(np.linalg.norm(xy - a), np.linalg.norm(xy - b)) >= 20]
    choices = [choice for choice in choices if distances(choice[1], *others).min() > 14]
    return rng.choice(choices) if choices else None


def _name(used, xy, rng):
    """Return (color, emblem, board) for a new landmark: the least used ones first, none that is used within
    400 m."""
    kinds = list(itertools.product(COLORS, EMBLEMS, range(3)))
    rng.shuffle(kinds)
    kinds.sort(key=lambda kind: len(used[kind]))
    far = (kind for kind in kinds if all(math.dist(xy, other) > 400 for other in used[kind]))
    kind = next(far, kinds[0])
    used[kind].append(xy)
    return kind


@cache
def town(name):
    """Return the city laid out: the same in any process. ValueError if there is no such city."""
    if name not in CITIES:
        raise ValueError(f"unknown city {name!r}, expected one of {', '.join(CITIES)}")
    city, rng, used = CITIES[name], random.Random(f"{name} {VERSION}"), defaultdict(list)
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
    corners = {node: landmark(*spot) for node in range(len(nodes))
               if rng.random() < 0.78 and (spot := _corner(nodes, neighbors[node], node, rng))}
    places = {edge: landmark(*spot) for edge in range(len(edges))
              if rng.random() < 0.55 and (spot := _beside(nodes, edges, edge, spots[edge], rng))}
    # like those of the released panoramas
    hashes = (hashlib.sha256(f"{name} {i}".encode()).digest() for i in range(len(panoramas)))
    ids = tuple(base64.urlsafe_b64encode(digest)[:22].decode() for digest in hashes)
    return Town(name, city, nodes, tuple(edges), tuple(neighbors), np.array(panoramas), ids, corners, places)
