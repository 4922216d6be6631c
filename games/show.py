"""Save a route of a built-in city: its map, and the street views at its start, turning points and
destination.

    python -m games.show new-york --route 3 --out /tmp/new-york
"""
import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from games import drawing, views
from games.cities import ROUTES, build, marks_of, plan_of
from games.streets import CITIES, bearing, geocode, town
from harness.ranges import FOLDER, command_line, integer, one_of
from harness.terminal import command


def _read_route(folder, index, held_out):
    """Return Route `index` of a folder; ValueError if there is no such route."""
    path = Path(folder) / ("held_out_infos.json" if held_out else "route_infos.json")
    if not path.is_file():
        raise ValueError(f"{path}: no such file; only new-york has held-out routes")
    routes = json.loads(path.read_text(encoding="utf-8"))[0]
    if not 0 <= index < len(routes):
        raise ValueError(f"{path}: no route {index}, expected 0 to {len(routes) - 1}")
    return routes[index]


def _path_of(plan, route):
    """Return the panorama numbers of a route of this city: start, turning points, destination."""
    numbers = {tuple(geocode(plan.city, xy)): i for i, xy in enumerate(plan.panoramas)}
    points = [route["start_place"]["relocated_geocode"], *route["route_results"]["geocode_list"]]
    return [numbers[tuple(point)] for point in points]


def draw_map(folder, route_index, held_out=False, pixels=900):
    """Return a route on the map of its surroundings, a square RGB image, north up: streets, the board of
    every landmark, the names of those on the route, the start (green), the turning points and the destination
    (red)."""
    plan = plan_of(str(folder))[0]
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
    for mark in filter(None, marks_of(plan, path)):
        (x, y), above = at(mark.xy), mark.xy[1] >= plan.panoramas[mark.at][1]      # away from the street
        y, anchor = (y - 0.6 * size, "ms") if above else (y + 0.6 * size, "ma")
        draw.text((x, y), mark.name, (0, 0, 0), drawing.font(16), anchor,
                  stroke_width=3, stroke_fill=(255, 255, 255))
    return image


def main(arguments=None):
    """Save a route's map and the views at its start, turning points and destination."""
    parser = command_line("python -m games.show", "Save a map of a built-in city's route and the four street "
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
    try:
        folder = build(args.city, args.out, width=args.width)
        plan, route = town(args.city), _read_route(folder, args.route, args.held_out)
        files = [Path(args.out) / f"{args.city}-route-{args.route}{'-held-out' * args.held_out}-map.png"]
        draw_map(folder, args.route, args.held_out).save(files[0])
        path = _path_of(plan, route)
        points = plan.panoramas[path]
        headings = [bearing(a, b) for a, b in zip(points, points[1:])]
        for i, (number, heading) in enumerate(zip(path, headings[:1] + headings)):     # as one arrives
            panorama = folder / "street_views" / f"{plan.ids[number]}.jpg"
            grid = views.grid(panorama, round(heading), args.size)
            files.append(Path(str(files[0]).replace("-map", f"-{i}")))
            grid.save(files[-1])
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(route["milestone_info"])
    print("saved " + ", ".join(map(str, files)))


if __name__ == "__main__":
    command(main)
