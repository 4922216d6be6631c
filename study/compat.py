"""What each behaviour of the released code does to the tiny run (variants/official.py).

    python -m study compat

Every run is PPO with GAE, as there. Its last evaluation plays the game as the run did, with the switch on; then its weights are judged again in the
default game, so that what training made of the model stands apart from what the judge makes of it.
"""

from study import records
from study.runner import Run
from study.variants import GAMES, STEPS, TITLES, last
from variants import official
from variants.official import OF_GAME

question = "What each behaviour of the released code does to PPO with GAE, as its own judge reports it and in the default game."
PICTURES = ["misread-first"]                           # does nothing without them
SWITCHES = {"gp-l": ["", *(switch for switch in OF_GAME["gp"] if switch not in PICTURES), *official.PPO, "official"],
            "gp-vl": ["", *PICTURES], "virl-l": ["", *OF_GAME["virl"], "official"]}
METRICS = GAMES | {"gp-vl": "success"}
UPDATES = STEPS | {("gp-vl", "ppo"): 20}


def name_of(task, switch, seed):
    return f"{task}-compat-{switch or 'none'}-{seed}"


def runs(seeds):
    found = [Run(f"{task}-init-0", ("--task", task, "--algo", "eval")) for task in SWITCHES]
    for seed in seeds:
        for task, switches in SWITCHES.items():
            for switch in switches:
                name = name_of(task, switch, seed)
                steps = str(UPDATES[task, "ppo"])
                ranks = 2 if switch == "rank-advantages" else 1                # of one there is nothing to see
                found += [
                    Run(name, ("--task", task, "--advantage", "gae", "--seed", str(seed), "--steps", steps,
                               "--eval-every", "0", "--skip-first-eval", "--probe-hands", "0", "--keep", "1",
                               *(("--compat", switch) if switch else ())),
                        after=(f"{task}-init-0",), ranks=ranks),
                    Run(f"judged-{name}", ("--task", task, "--algo", "eval", "--model", f"{{root}}/{name}/final"), after=(name,))]
    return found


def table(found):
    """Markdown: a row a switch; what the run itself reports, and in the default game what it is worth, with the change against the run without."""
    head = ["task", "switch", *(f"{how}: {TITLES[name]}" for how in ("as it reports", "in the default game") for name in TITLES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for task, switches in SWITCHES.items():
        metric, init = METRICS[task], [found[f"{task}-init-0"]]
        cells = ["{:.1f} ± {:.1f}".format(*records.rate(last(init, name), metric)) for name in TITLES]
        lines.append(f"| {task} | (init) | | | " + " | ".join(cells) + " |")
        plain = [found[name] for seed in range(100) if (name := f"judged-{name_of(task, '', seed)}") in found]
        for switch in switches:
            names = [name for seed in range(100) if f"judged-{(name := name_of(task, switch, seed))}" in found]
            own, judged = [found[name] for name in names], [found[f"judged-{name}"] for name in names]
            if own:
                cells = ["{:.1f} ± {:.1f}".format(*records.rate(last(own, name), metric)) for name in TITLES]
                for name in TITLES:
                    cell = "{:.1f} ± {:.1f}".format(*records.rate(last(judged, name), metric))
                    if switch and len(judged) == len(plain):
                        cell += " ({:+.1f} ± {:.1f})".format(*records.change(last(judged, name), last(plain, name), metric))
                    cells.append(cell)
                lines.append(f"| {task} | {switch or 'none'} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
