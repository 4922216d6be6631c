"""Save a route of a built-in city: its map, and the street views at its start, turning points and
destination.

    python -m games.show new-york --route 3 --out /tmp/new-york
"""
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from games import drawing, views
from games.cities import build, marks_of, milestones, paths_of
from games.streets import CITIES, bearing, town
from harness.ranges import FOLDER, command_line, integer, one_of
from harness.terminal import command


def draw_map(plan, path, pixels=900):
    """Return a path, see cities.paths_of, on the map of its surroundings, a square RGB image, north up:
    streets, the board of every landmark, the names of those on the path, the start (green), the turning
    points and the destination (red)."""
    points = plan.panoramas[list(path)]
    reach = max(np.ptp(points, axis=0).max() / 2 + 70, 160)
    scale, middle = pixels / (2 * reach), (points.max(0) + points.min(0)) / 2

    def at(*places):
        """Return x, y, x, y, ... of places on the map."""
        return ((np.array(places) - middle) * (scale, -scale) + pixels / 2).ravel().tolist()
    asphalt, pavement, soil = plan.city.look["ground"]
    image = Image.new("RGB", (pixels, pixels), soil)
    draw = ImageDraw.Draw(image)
    for width, color in ((2 * drawing.WALL, pavement), (2 * drawing.ROAD, asphalt)):
        for ends in zip(*plan.ends):
            draw.line(at(*ends), color, round(width * scale))
        for xy in plan.nodes:
            draw.circle(at(xy), width * scale / 2, color)
    draw.line(at(*points), "white", round(2.5 * scale), "curve")
    for i, xy in enumerate(points):
        color = "#c82828" if i == len(points) - 1 else "white" if i else "#28a03c"
        draw.circle(at(xy), 4 * scale, color, "black")
        draw.text(at(xy), str(i or "S"), "black", drawing.font(6 * scale), "mm")
    size = round(9 * scale)
    for mark in plan.landmarks:
        corner = [round(v - size / 2) for v in at(mark.xy)]
        image.paste(drawing.board(mark.color, mark.emblem, mark.board, size), corner)
    for mark in filter(None, marks_of(plan, path)):
        (x, y), above = at(mark.xy), mark.xy[1] >= plan.panoramas[mark.at][1]      # away from the street
        y, anchor = (y - 0.6 * size, "ms") if above else (y + 0.6 * size, "ma")
        draw.text((x, y), mark.name, "black", drawing.font(16), anchor, stroke_width=3, stroke_fill="white")
    return image


def main(arguments=None):
    """Save a route's map and the views at its start, turning points and destination."""
    parser = command_line("python -m games.show", "Save a map of a built-in city's route and the four street "
                          "views (front, right / back, left) at its start, turning points and destination.")
    parser.add_argument("city", type=one_of(tuple(CITIES)), help=", ".join(CITIES))
    parser.add_argument("--route", type=integer(0), default=0, metavar="N",
                        help="which of the city's routes (0)")
    parser.add_argument("--out", type=FOLDER, default="city", metavar="FOLDER",
                        help="where to, the city's data included (city)")
    parser.add_argument("--size", type=integer(1, 2048), default=640, help="pixels of one view (640)")
    args = parser.parse_args(arguments)
    plan = town(args.city)
    paths, _ = paths_of(plan)       # the second: of held-out routes
    if args.route >= len(paths):
        parser.error(f"--route {args.route}: expected one of {len(paths)} routes, counted from 0")
    path = paths[args.route]
    headings = [bearing(*plan.panoramas[[a, b]]) for a, b in zip(path, path[1:])]
    try:
        views_folder = build(args.city, args.out, width=max(256, 4 * args.size)) / "street_views"
        pictures = {"map": draw_map(plan, path)}
        for i, (number, heading) in enumerate(zip(path, headings[:1] + headings)):     # as one arrives
            panorama = views_folder / f"{plan.ids[number]}.jpg"
            pictures[i] = views.grid(panorama, round(heading), args.size)
        files = [Path(args.out, f"{args.city}-route-{args.route}-{what}.png") for what in pictures]
        for file, picture in zip(files, pictures.values()):
            picture.save(file)
    except (OSError, ValueError) as error:
        parser.exit(2, f"error: {error}\n")
    print(milestones(plan, path))
    print("saved " + ", ".join(map(str, files)))


if __name__ == "__main__":
    command(main)
