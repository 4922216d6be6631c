"""Built-in cities for V-IRL navigation: routes through them, and a folder in the released data format for each.

The street views of the paper are not ours to give away, so these cities are made up: a seeded street plan with signs
for landmarks (scenes/streets.py), routes along the streets, and panoramas that are drawn when first asked for
(scenes/draw.py). Look at a route:

    python -m scenes.cities new-york --route 3 --out /tmp/new-york
"""
import hashlib
import json
import math
import pickle
import random
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from harness.files import aside, replace, sweep, write_atomically
from harness.ranges import FOLDER, command_line, integer, one_of
from harness.terminal import command
from scenes import draw as drawing
from scenes.streets import BROAD, CITIES, COLORS, OTHERS, VERSION, apart, bearing, geocode, town  # noqa: F401

COMPASS = ("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest")     # 45 degrees apart
ROUTES = {"new-york": (1000, 200)}     # city: (routes, held-out ones); of all others (100, 0)
SIDES = ("front", "right front", "right", "right behind", "behind", "left behind", "left", "left front")     # likewise


# ----------------------------------------------------------------------------------------------------------- routes

def word(heading):
    """A heading in words: "southeast"."""
    return COMPASS[round(heading / 45) % 8]


def _turns(old, new):
    """Whether going from heading old to new is a turn worth an instruction: no U-turn, and another compass word."""
    return 20 <= apart(old, new) <= 155 and word(round(old)) != word(round(new))


def _walk(plan, rng):
    """A random route of 2 to 5 legs, one street each, as the panorama numbers of its start, its turning points and its
    destination (at a corner's landmark, or at a place on the last street); None where the walk got stuck."""
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
                choices += [(mark.at, new) for mark in (plan.corners.get(node), plan.places.get(edge)) if mark]
        if not choices:
            return None
        node, heading = rng.choice(choices)
        path.append(node)
    return tuple(path)


def _marks(plan, path):
    """The landmark (or None) where each leg of a path ends."""
    at = {mark.at: mark for mark in (*plan.corners.values(), *plan.places.values())}
    return [at.get(point) for point in path[1:]]


def _blocks(plan, path):
    """milestone_info of a path: one block a leg, as the released data writes them."""
    blocks = []
    for i, (a, b, mark) in enumerate(zip(path, path[1:], _marks(plan, path)), 1):
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
    """One entry of route_infos.json."""
    def place(mark):
        return mark and {"name": mark.name, "geocode": geocode(plan.city, mark.xy)}
    *marks, last = map(place, _marks(plan, path))
    points = [geocode(plan.city, plan.panoramas[point]) for point in path]
    return {"start_place": {"relocated_geocode": points[0]}, "init_heading": 0, "dest_place": last,
            "route_results": {"geocode_list": points[1:], "landmark_list": marks}, "milestone_info": _blocks(plan, path)}


def _routes(plan, rng, count):
    """`count` different routes; within one, no two legs end at the same name."""
    paths = {}      # in order, unlike a set
    while len(paths) < count:
        path = _walk(plan, rng)
        names = [mark.name for mark in _marks(plan, path) if mark] if path else [""] * 2
        if len(set(names)) == len(names):
            paths[path] = None
    return [_route(plan, path) for path in paths]


# -------------------------------------------------------------------------------------------------------- the folder

def build(name, root, *, width=256):
    """The city as a folder in the released format, root/<name>-<width>-<digest>, made on first use; -> Path.

    route_infos.json (100 routes; "new-york": 1000, and 200 others in held_out_infos.json), gps_pano_mapping.pkl,
    city.json, and an empty street_views/: `draw` fills it, width x width/2 pixels a panorama, on demand. Several
    processes may call this at once. ValueError: unknown city, or a width that is not an even number from 64 to 8192.
    """
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
    """Eight characters that differ wherever the city does: another generator never finds stale files."""
    return hashlib.sha256(repr((VERSION, COLORS, plan.name, plan.city, plan.corners, plan.places)).encode()).hexdigest()[:8]


@lru_cache(maxsize=32)
def _plan_of(folder):
    """(town, {panorama id: number}, width) of a folder that build() wrote; ValueError: another one, another version."""
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
    """Draw the panorama .../street_views/<id>.jpg of a built-in city and save it and its .metadata.json, each at once.
    Several processes may do so together. ValueError: not in a built-in city's folder, or no panorama of that city."""
    path = Path(panorama)
    plan, numbers, width = _plan_of(str(path.parent.parent))
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


# ------------------------------------------------------------------------------------------------------------ pictures

def _read_route(folder, index, held_out):
    """Route `index` of a folder; ValueError if there is no such route."""
    path = Path(folder) / ("held_out_infos.json" if held_out else "route_infos.json")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; only new-york has held-out routes")
    routes = json.loads(path.read_text(encoding="utf-8"))[0]
    if not 0 <= index < len(routes):
        raise ValueError(f"{path}: no route {index}, expected 0 to {len(routes) - 1}")
    return routes[index]


def _path_of(plan, route):
    """The panorama numbers of a route of this city: start, turning points, destination."""
    numbers = {tuple(geocode(plan.city, xy)): i for i, xy in enumerate(plan.panoramas)}
    points = [route["start_place"]["relocated_geocode"], *route["route_results"]["geocode_list"]]
    return [numbers[tuple(point)] for point in points]


def draw_map(folder, route_index, held_out=False, pixels=900):
    """A route on the map of its surroundings, a square RGB image, north up: streets, the board of every landmark, the
    names of those on the route, the start (green), the turning points and the destination (red)."""
    plan = _plan_of(str(folder))[0]
    path = _path_of(plan, _read_route(folder, route_index, held_out))
    points = plan.panoramas[path]
    reach = max(np.ptp(points, axis=0).max() / 2 + 70, 160)
    scale, middle = pixels / (2 * reach), (points.max(0) + points.min(0)) / 2

    def at(xy):
        return tuple((np.asarray(xy) - middle) * (scale, -scale) + pixels / 2)
    asphalt, pavement, soil = plan.city.look["ground"]
    image = Image.new("RGB", (pixels, pixels), soil)
    draw = ImageDraw.Draw(image)
    for width, color in ((2 * drawing.WALL, pavement), (2 * drawing.ROAD, asphalt)):
        for a, b in plan.edges:
            draw.line([at(plan.nodes[a]), at(plan.nodes[b])], color, round(width * scale))
        for xy in plan.nodes:
            draw.circle(at(xy), width * scale / 2, color)
    draw.line([at(xy) for xy in points], (255, 255, 255), round(2.5 * scale), "curve")
    for i, xy in enumerate(points):
        color = (40, 160, 60) if i == 0 else (200, 40, 40) if i == len(points) - 1 else (255, 255, 255)
        draw.circle(at(xy), 4 * scale, color, (0, 0, 0))
        draw.text(at(xy), "S" if i == 0 else str(i), (0, 0, 0), drawing.font(6 * scale), "mm")
    size, marks = round(9 * scale), [*plan.corners.values(), *plan.places.values()]
    for mark in marks:
        corner = tuple(round(v - size / 2) for v in at(mark.xy))
        image.paste(drawing.board(mark.color, mark.emblem, mark.board, size), corner)
    for mark in filter(None, _marks(plan, path)):
        (x, y), above = at(mark.xy), mark.xy[1] >= plan.panoramas[mark.at][1]      # away from the street
        y, anchor = (y - 0.6 * size, "ms") if above else (y + 0.6 * size, "ma")
        draw.text((x, y), mark.name, (0, 0, 0), drawing.font(16), anchor, stroke_width=3, stroke_fill=(255, 255, 255))
    return image


def main(arguments=None):
    """Save a route's map and the views at its start, turning points and destination."""
    parser = command_line("python -m scenes.cities", "Save a map of a built-in city's route and the four street "
                          "views (front, right / back, left) at its start, turning points and destination.")
    parser.add_argument("city", type=one_of(tuple(CITIES)), help=", ".join(CITIES))
    parser.add_argument("--route", type=integer(0), default=0, metavar="N",
                        help="which of the city's routes (0)")
    parser.add_argument("--held-out", action="store_true", help="one of new-york's held-out routes")
    parser.add_argument("--out", type=FOLDER, default="city", metavar="FOLDER",
                        help="where to, the city's data included (city)")
    parser.add_argument("--width", type=integer(64, 8192, step=2), default=2560,
                        help="pixels of a panorama (2560)")
    parser.add_argument("--size", type=integer(1, 8192), default=640, help="pixels of one view (640)")
    args = parser.parse_args(arguments)
    count = ROUTES.get(args.city, (100, 0))[args.held_out]
    if not count:
        parser.error("--held-out: expected with new-york, the only city with held-out routes")
    if args.route >= count:
        parser.error(f"--route {args.route}: expected an integer from 0 to {count - 1}")
    from scenes import views        # which imports this module
    try:
        folder = build(args.city, args.out, width=args.width)
        plan, route = town(args.city), _read_route(folder, args.route, args.held_out)
        files = [Path(args.out) / f"{args.city}-route-{args.route}{'-held-out' * args.held_out}-map.png"]
        draw_map(folder, args.route, args.held_out).save(files[0])
        path = _path_of(plan, route)
        points = plan.panoramas[path]
        headings = [bearing(a, b) for a, b in zip(points, points[1:])]
        for i, (number, heading) in enumerate(zip(path, headings[:1] + headings)):     # as one arrives
            grid = views.grid(str(folder / "street_views" / f"{plan.ids[number]}.jpg"), round(heading), args.size)
            files.append(Path(str(files[0]).replace("-map", f"-{i}")))
            grid.save(files[-1])
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(route["milestone_info"])
    print("saved " + ", ".join(map(str, files)))


if __name__ == "__main__":
    command(main)
