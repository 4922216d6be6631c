"""Make built-in cities for V-IRL navigation: routes through them, and a folder in the released data format
for each.

The street views of the paper are not ours to give away, so these cities are made up: a seeded street plan
with signs for landmarks (games/streets.py), routes along the streets, and panoramas that are drawn when first
asked for (games/drawing.py). Make one:

    python -c "from games import cities; print(cities.build('lagos', '/tmp'))"
"""
import hashlib
import json
import math
import pickle
import random
from functools import cache
from pathlib import Path

from PIL import Image

from games import drawing
from games.compass import SIDES, word
from games.streets import COLORS, VERSION, apart, bearing, geocode, town
from harness.files import aside, replace, sweep, write_atomically
from harness.ranges import integer

ROUTES = {"new-york": (1000, 200)}     # city: (routes, held-out ones); of all others (100, 0)
WIDTH = integer(64, 8192, step=2)      # pixels of a panorama
# One block of milestone_info, as the released data writes them.
BLOCK = ('{{\n"intersection_idx": "{}",\n"landmarks": "{}",\n"distance": "{:.0f} meters",\n'
         '"human_heading": "{}",\n"to_next_intersection_heading": "{} ({})",\n}}')


# ----------------------------------------------------------------------------------------------------- routes

def _turns(old, new):
    """Tell whether going from heading old to new is a turn worth an instruction: no U-turn, and another
    compass word."""
    return 20 <= apart(old, new) <= 155 and word(round(old)) != word(round(new))


def _walk(plan, rng):
    """Return a random route of 2 to 5 legs, one street each, as the panorama numbers of its start, its
    turning points and its destination (at a corner's landmark, or at a place on the last street); None where
    the walk got stuck."""
    legs = rng.choices((2, 3, 4, 5), (22, 38, 26, 14))[0]
    path, heading = [rng.randrange(len(plan.nodes))], None
    while len(path) <= legs:
        here, choices = path[-1], []
        for node, edge in plan.neighbors[here].items():
            new = bearing(plan.nodes[here], plan.nodes[node])
            if node not in path and (heading is None or _turns(heading, new)):
                marks = plan.corners.get(node), plan.places.get(edge)
                stops = [node] if len(path) < legs else [mark.at for mark in marks if mark]
                choices += [(stop, new) for stop in stops]
        if not choices:
            return None
        node, heading = rng.choice(choices)
        path.append(node)
    return tuple(path)


def _marks(plan, path):
    """Return the landmark (or None) where each leg of a path ends."""
    at = {mark.at: mark for mark in plan.landmarks}
    return [at.get(point) for point in path[1:]]


@cache
def _paths(plan):
    """Return the paths of all routes of a town and of its held-out ones, two lists without repeats; on one
    path, no two legs end at the same name."""
    rng = random.Random(f"routes of {plan.name} {VERSION}")
    own, held_out = ROUTES.get(plan.name, (100, 0))
    paths = {}      # in order, unlike a set
    while len(paths) < own + held_out:
        path = _walk(plan, rng)
        names = [mark.name for mark in _marks(plan, path) if mark] if path else [""] * 2
        if len(set(names)) == len(names):
            paths[path] = None
    return list(paths)[:own], list(paths)[own:]


def _milestones(plan, path):
    """Return milestone_info of a path: one block per leg."""
    blocks = []
    for i, (a, b, mark) in enumerate(zip(path, path[1:], _marks(plan, path)), 1):
        a, b = plan.panoramas[a], plan.panoramas[b]
        heading, remark = bearing(a, b), "No landmark nearby"
        if mark:
            remark = f"{mark.name} is on your {SIDES[round((bearing(b, mark.xy) - heading) / 45) % 8]}"
        heading = round(heading) % 360
        blocks.append(BLOCK.format(i, remark, math.dist(a, b), heading, heading, word(heading)))
    return ",\n".join(blocks)


def _route(plan, path):
    """Return one entry of route_infos.json."""
    *marks, last = (mark and {"name": mark.name, "geocode": geocode(plan.city, mark.xy)}
                    for mark in _marks(plan, path))
    start, *points = (geocode(plan.city, plan.panoramas[point]) for point in path)
    return {"start_place": {"relocated_geocode": start}, "init_heading": 0, "dest_place": last,
            "route_results": {"geocode_list": points, "landmark_list": marks},
            "milestone_info": _milestones(plan, path)}


# ------------------------------------------------------------------------------------------------- the folder

def build(name, root, *, width=256):
    """Return the Path of the city as a folder in the released format, made on first use.

    It is root/<name>-<width>-<digest>.

    route_infos.json (100 routes; "new-york": 1000, and 200 others in held_out_infos.json),
    gps_pano_mapping.pkl, city.json, and an empty street_views/: `draw` fills it, width x width/2 pixels a
    panorama, on demand. Several processes may call this at once. ValueError: unknown city, or a width that is
    not an even number from 64 to 8192."""
    plan = town(name)
    if not WIDTH.holds(width):
        raise ValueError(f"width {WIDTH.refusal(width)}")
    folder = Path(root) / f"{name}-{width}-{_digest(plan)}"
    if folder.is_dir():
        sweep(folder.parent, f".{folder.name}-*")
        sweep(folder / "street_views", ".*-*")
        return folder
    files = {"city.json": {"city": name, "width": width, "version": VERSION, "digest": _digest(plan)}}
    for file, paths in zip(("route_infos.json", "held_out_infos.json"), _paths(plan)):
        if paths:
            files[file] = [_route(plan, path) for path in paths], len(paths)
    mapping = {tuple(geocode(plan.city, xy)): identity for identity, xy in zip(plan.ids, plan.panoramas)}
    with aside(folder) as private:
        (private / "street_views").mkdir()
        for file, content in files.items():
            (private / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (private / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(mapping, protocol=4))
    return folder


@cache
def _digest(plan):
    """Return eight characters that differ wherever the city does: another generator never finds stale
    files."""
    everything = VERSION, COLORS, plan.name, plan.city, plan.corners, plan.places
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:8]


def _plan_of(folder):
    """Return (town, width) of a folder that build() wrote; ValueError: another one, another version."""
    path = Path(folder) / "city.json"
    try:
        city = json.loads(path.read_text(encoding="utf-8"))
        plan, width, digest = town(city["city"]), city["width"], city["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a built-in city's file; build the city again") from None
    if digest != _digest(plan) or not isinstance(width, int):
        raise ValueError(f"{path}: made by another version of this program; build the city again")
    return plan, width


def draw(panorama):
    """Draw the panorama .../street_views/<id>.jpg of a built-in city and save it and its .metadata.json, each
    at once. Several processes may do so together. ValueError: not in a built-in city's folder, or no panorama
    of that city."""
    path = Path(panorama)
    plan, width = _plan_of(path.parent.parent)
    if path.suffix != ".jpg" or path.stem not in plan.ids:
        raise ValueError(f"{path}: {plan.name} has no panorama of that name")
    number = plan.ids.index(path.stem)
    rotation = round(random.Random(path.stem).uniform(0, 360), 2)
    picture = Image.fromarray(drawing.panorama(plan, number, rotation, width))
    lat, lon = geocode(plan.city, plan.panoramas[number])
    metadata = json.dumps({"panoId": path.stem, "lat": lat, "lng": lon, "rotation": rotation})
    path.parent.mkdir(exist_ok=True)
    write_atomically(path.with_suffix(".metadata.json"), metadata)      # before the jpg, which needs it
    replace(path, lambda file: picture.save(file, "JPEG", quality=95, subsampling=0))
