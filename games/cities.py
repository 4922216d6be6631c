"""Built-in cities for V-IRL navigation: routes through them, and a folder in the released data format for
each.

The street views of the paper are not ours to give away, so these cities are made up: a seeded street plan
with signs for landmarks (games/streets.py), routes along the streets, and panoramas that are drawn when first
asked for (games/drawing.py). Look at a route:

    python -m games.show new-york --route 3 --out /tmp/new-york
"""
import hashlib
import json
import math
import pickle
import random
from functools import lru_cache
from pathlib import Path

from PIL import Image

from games import drawing
from games.compass import SIDES, word
from games.streets import COLORS, VERSION, apart, bearing, geocode, town
from harness.files import aside, replace, sweep, write_atomically

ROUTES = {"new-york": (1000, 200)}     # city: (routes, held-out ones); of all others (100, 0)


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
    for leg in range(legs):
        here, choices = path[-1], []
        for node, edge in plan.neighbors[here].items():
            new = bearing(plan.nodes[here], plan.nodes[node])
            if node in path or (heading is not None and not _turns(heading, new)):
                continue
            if leg < legs - 1:
                choices.append((node, new))
            else:
                marks = plan.corners.get(node), plan.places.get(edge)
                choices += [(mark.at, new) for mark in marks if mark]
        if not choices:
            return None
        node, heading = rng.choice(choices)
        path.append(node)
    return tuple(path)


def marks_of(plan, path):
    """Return the landmark (or None) where each leg of a path ends."""
    at = {mark.at: mark for mark in (*plan.corners.values(), *plan.places.values())}
    return [at.get(point) for point in path[1:]]


def _blocks(plan, path):
    """Return milestone_info of a path: one block a leg, as the released data writes them."""
    blocks = []
    for i, (a, b, mark) in enumerate(zip(path, path[1:], marks_of(plan, path)), 1):
        a, b = plan.panoramas[a], plan.panoramas[b]
        heading = bearing(a, b)
        remark = "No landmark nearby"
        if mark:
            remark = f"{mark.name} is on your {SIDES[round((bearing(b, mark.xy) - heading) / 45) % 8]}"
        heading = round(heading) % 360
        lines = {"intersection_idx": i, "landmarks": remark, "distance": f"{math.dist(a, b):.0f} meters",
                 "human_heading": heading, "to_next_intersection_heading": f"{heading} ({word(heading)})"}
        blocks.append("{\n" + "".join(f'"{key}": "{value}",\n' for key, value in lines.items()) + "}")
    return ",\n".join(blocks)


def _route(plan, path):
    """Return one entry of route_infos.json."""
    def place(mark):
        return mark and {"name": mark.name, "geocode": geocode(plan.city, mark.xy)}
    *marks, last = map(place, marks_of(plan, path))
    points = [geocode(plan.city, plan.panoramas[point]) for point in path]
    return {"start_place": {"relocated_geocode": points[0]}, "init_heading": 0, "dest_place": last,
            "route_results": {"geocode_list": points[1:], "landmark_list": marks},
            "milestone_info": _blocks(plan, path)}


def _routes(plan, rng, count):
    """Return `count` different routes; within one, no two legs end at the same name."""
    paths = {}      # in order, unlike a set
    while len(paths) < count:
        path = _walk(plan, rng)
        names = [mark.name for mark in marks_of(plan, path) if mark] if path else [""] * 2
        if len(set(names)) == len(names):
            paths[path] = None
    return [_route(plan, path) for path in paths]


# ------------------------------------------------------------------------------------------------- the folder

def build(name, root, *, width=256):
    """Return the Path of the city as a folder in the released format, made on first use.

    It is root/<name>-<width>-<digest>.

    route_infos.json (100 routes; "new-york": 1000, and 200 others in held_out_infos.json),
    gps_pano_mapping.pkl, city.json, and an empty street_views/: `draw` fills it, width x width/2 pixels a
    panorama, on demand. Several processes may call this at once. ValueError: unknown city, or a width that is
    not an even number from 64 to 8192."""
    plan = town(name)
    if not (isinstance(width, int) and width % 2 == 0 and 64 <= width <= 8192):
        raise ValueError(f"width {width!r}: expected an even number from 64 to 8192")
    folder = Path(root) / f"{name}-{width}-{_digest(plan)}"
    if folder.is_dir():
        sweep(folder.parent, f".{folder.name}-*")
        sweep(folder / "street_views", ".*-*")
        return folder
    own, held_out = ROUTES.get(name, (100, 0))
    routes = _routes(plan, random.Random(f"routes of {name} {VERSION}"), own + held_out)
    mapping = {tuple(geocode(plan.city, xy)): identity for identity, xy in zip(plan.ids, plan.panoramas)}
    files = {"route_infos.json": [routes[:own], own],
             "city.json": {"city": name, "width": width, "version": VERSION, "digest": _digest(plan)}}
    if held_out:
        files["held_out_infos.json"] = [routes[own:], held_out]
    with aside(folder) as private:
        (private / "street_views").mkdir()
        for file, content in files.items():
            (private / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (private / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(mapping, protocol=4))
    return folder


@lru_cache(maxsize=None)
def _digest(plan):
    """Return eight characters that differ wherever the city does: another generator never finds stale
    files."""
    everything = VERSION, COLORS, plan.name, plan.city, plan.corners, plan.places
    return hashlib.sha256(repr(everything).encode()).hexdigest()[:8]


@lru_cache(maxsize=32)
def plan_of(folder):
    """Return (town, {panorama id: number}, width) of a folder that build() wrote; ValueError: another one,
    another version."""
    path = Path(folder) / "city.json"
    try:
        city = json.loads(path.read_text(encoding="utf-8"))
        plan, width, digest = town(city["city"]), city["width"], city["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"{path}: not a built-in city's file; build the city again") from None
    if digest != _digest(plan) or not isinstance(width, int):
        raise ValueError(f"{path}: made by another version of this program; build the city again")
    return plan, {identity: i for i, identity in enumerate(plan.ids)}, width


def draw(panorama):
    """Draw the panorama .../street_views/<id>.jpg of a built-in city and save it and its .metadata.json, each
    at once. Several processes may do so together. ValueError: not in a built-in city's folder, or no panorama
    of that city."""
    path = Path(panorama)
    plan, numbers, width = plan_of(str(path.parent.parent))
    if path.suffix != ".jpg" or path.stem not in numbers:
        raise ValueError(f"{path}: {plan.name} has no panorama of that name")
    number = numbers[path.stem]
    rotation = round(random.Random(path.stem).uniform(0, 360), 2)
    picture = Image.fromarray(drawing.panorama(plan, number, rotation, width))
    lat, lon = geocode(plan.city, plan.panoramas[number])
    metadata = json.dumps({"panoId": path.stem, "lat": lat, "lng": lon, "rotation": rotation})
    path.parent.mkdir(exist_ok=True)
    write_atomically(path.with_suffix(".metadata.json"), metadata)      # before the jpg, which needs it
    replace(path, lambda file: picture.save(file, "JPEG", quality=95, subsampling=0))
