"""Write navigation's built-in cities as folders, in the format of the street views and routes released with
the paper (V-IRL).

The street views of the paper are not ours to give away, so these cities are made up: a street plan with signs
for landmarks and routes along the streets (games/streets.py), and panoramas that are drawn when first asked
for (games/drawing.py). Make one:

    python -c "from games import cities; print(cities.build('lagos', '/tmp'))"
"""
import json
import math
import pickle
import random
from itertools import pairwise
from pathlib import Path

from PIL import Image

from games import drawing
from games.compass import SIDES, word
from games.streets import bearing, town
from harness.files import aside, replace, write_atomically

# One block of milestone_info, as the released data writes them.
BLOCK = ('{{\n"intersection_idx": "{}",\n"landmarks": "{}",\n"distance": "{:.0f} meters",\n'
         '"human_heading": "{}",\n"to_next_intersection_heading": "{} ({})",\n}}')


def _route(plan, path):
    """Return one entry of route_infos.json. path: the panoramas where each leg begins and ends."""
    at = {mark.at: mark for mark in plan.landmarks}
    blocks, marks = [], []
    for i, (a, b) in enumerate(pairwise(path), 1):
        mark, a, b = at.get(b), plan.panoramas[a], plan.panoramas[b]
        heading, remark = bearing(a, b), "No landmark nearby"
        if mark:
            remark = f"{mark.name} is on your {SIDES[round((bearing(b, mark.xy) - heading) / 45) % 8]}"
        heading = round(heading) % 360
        blocks.append(BLOCK.format(i, remark, math.dist(a, b), heading, heading, word(heading)))
        marks.append(mark and {"name": mark.name, "geocode": plan.geocode(mark.xy)})
    start, *points = (plan.geocode(plan.panoramas[point]) for point in path)
    return {"start_place": {"relocated_geocode": start}, "init_heading": 0, "dest_place": marks.pop(),
            "route_results": {"geocode_list": points, "landmark_list": marks},
            "milestone_info": ",\n".join(blocks)}


# ------------------------------------------------------------------------------------------------- the folder

def build(name, root, *, width=256):
    """Return the Path of the city as a folder in the released format, made on first use.

    It is root/<name>-<width>-<digest>.

    route_infos.json (100 routes; "new-york": 1000, and 200 others in held_out_infos.json),
    gps_pano_mapping.pkl, city.json, and an empty street_views/: `draw` fills it, width (an even number) x
    width/2 pixels a panorama, on demand. Several processes may call this at once."""
    plan = town(name)
    folder = Path(root) / f"{name}-{width}-{plan.digest}"
    if folder.is_dir():
        return folder
    files = {"city.json": {"city": name, "width": width}}
    for file, paths in {"route_infos.json": plan.routes, "held_out_infos.json": plan.held_out}.items():
        if paths:
            files[file] = [_route(plan, path) for path in paths], len(paths)
    mapping = {tuple(plan.geocode(xy)): identity for identity, xy in zip(plan.ids, plan.panoramas)}
    with aside(folder) as private:
        (private / "street_views").mkdir()
        for file, content in files.items():
            (private / file).write_text(json.dumps(content, indent=1), encoding="utf-8")
        (private / "gps_pano_mapping.pkl").write_bytes(pickle.dumps(mapping, protocol=4))
    return folder


def draw(panorama):
    """Draw the panorama .../street_views/<id>.jpg of a built-in city and save it and its .metadata.json, each
    at once. Several processes may do so together."""
    path = Path(panorama)
    city = json.loads((path.parent.parent / "city.json").read_text(encoding="utf-8"))
    plan = town(city["city"])
    number = plan.ids.index(path.stem)
    rotation = round(random.Random(path.stem).uniform(0, 360), 2)
    picture = Image.fromarray(drawing.panorama(plan, number, rotation, city["width"]))
    lat, lon = plan.geocode(plan.panoramas[number])
    metadata = json.dumps({"panoId": path.stem, "lat": lat, "lng": lon, "rotation": rotation})
    write_atomically(path.with_suffix(".metadata.json"), metadata)      # before the jpg, which needs it
    replace(path, lambda file: picture.save(file, "JPEG", quality=95, subsampling=0))
