"""Turn the released table of panoramas, a pickle from the internet, into JSON, without running any code in
it.

    python -m games.unpickle FOLDER/gps_pano_mapping.pkl
"""
import json
import os
from pathlib import Path

from games.routes import read_mapping
from harness.ranges import command_line, text
from harness.terminal import command


def main(argv=None):
    """Write the table again as JSON, beside the pickle."""
    parser = command_line("python -m games.unpickle", "Turn a pickled table of panoramas into JSON, without "
                          "running any code that it may hold.")
    parser.add_argument("pickle", type=text("a file", os.path.isfile),
                        help="FOLDER/gps_pano_mapping.pkl; the JSON is written beside it")
    path = Path(parser.parse_args(argv).pickle)
    out = path.with_suffix(".json")
    try:
        rows = [[*geocode, name] for geocode, name in read_mapping(path).items()]
        out.write_text("[\n" + ",\n".join(map(json.dumps, rows)) + "\n]\n", encoding="utf-8")
    except (OSError, ValueError) as error:
        parser.exit(1, f"{error}\n")
    print(f"{out}: {len(rows)} panoramas, read instead of {path.name} from now on")


if __name__ == "__main__":
    command(main)
