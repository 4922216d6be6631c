"""Settings: a wrong one is refused in one line before anything is written, and every right command passes."""

import ast
import dataclasses
import json
import re
import shlex
from pathlib import Path

import pytest

import train
from benchmarks import kernels as bench
from distributed.processes import Processes
from games import cities
from harness import ranges
from harness.check import settle
from harness.load import agree
from harness.settings import PRESETS, Args, SettingError, flag_of, parse, resumed
from harness.tiny import CONFIG
from llama.config import Config
from study import __main__ as study
from study import plan
from tables import rows

HERE = Path(train.__file__).parent
TINY = Config.from_dict(CONFIG)
TEXT = {**CONFIG["text_config"], "model_type": "llama"}
del TEXT["cross_attention_layers"]


class Accepted(BaseException):
    """Raised in place of reading a model: the settings are a run."""


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Return a function, in an empty folder: command line -> the refusal, or None if it was accepted."""
    def accept(*_):
        raise Accepted

    def run(line):
        before = files()
        try:
            train.main(shlex.split(line))
        except Accepted:
            return None
        except SystemExit as stop:
            said = capsys.readouterr().err
            assert stop.code == 2 and said.startswith("train.py: error: ") and said.count("\n") == 1, said
            assert files() == before                           # nothing was written
            return said

    files = lambda: sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "load", accept)
    return run


# ------------------------------------------------------------------------------------------------------------
# train.py: command lines that are refused, with words of the message

REFUSED = """
    # what is not of its kind
    --lr fast: expected a number above 0
    --lr 0: expected a number above 0
    --lr -1e-3: expected
    --max-grad-norm -1: expected a number above 0
    --max-grad-norm inf: expected
    --clip nan: expected a number above 0 and below 1
    --clip 1: expected
    --gamma 2: expected a number from 0 to 1
    --lam 1.0001: expected
    --steps -1: expected an integer from 1
    --steps 0: expected
    --steps 1e3: expected an integer
    --steps 2.5: expected an integer
    --steps '': expected an integer
    --steps 99999999999999999999: expected
    --seed -1: expected an integer from 0
    --seed 9223372036854775808: expected an integer from 0 to 9223372036854775807
    --token-budget 0: expected
    --keep 0: expected
    --epochs 0: expected
    --samples 0: expected
    --rollout-batch 0: expected
    --eval-hands -1: expected an integer from 0
    --transcript-every 0: expected
    --lora-rank -1: expected an integer from 0
    --algo sft | --mistakes 2: expected a number from 0 to 1
    --temperature 0: expected a number from 0.01 to 100; greedy
    --temperature -1: expected
    --algo sft --sft-data own | --temperature 0: expected a number from 0.01 to 100; greedy answers (0) leave
    --eval-temperature -0.1: expected 0 (greedy) or
    --betas 0.9: expected two numbers from 0 to below 1, joined by a comma
    --betas 0.9,1: expected two
    --betas nan,0.9: expected two
    --betas 0.9,0.9,0.9: expected two
    --dual-clip 1: expected a number above 1
    --task chess: expected one of gp-l, gp-vl, virl-l, virl-vl
    --algo dpo: expected one of ppo, sft
    --advantage best: expected one of gae, gae-loo
    --loss mse: expected one of ppo,
    --algo sft | --sft-loss mse: expected one of nll,
    --out '': expected a folder
    # what no program could take for a setting
    --nonsense | unrecognized arguments: --nonsense
    --eval-hand 3 | unrecognized arguments: --eval-hand
    --lr: expected one argument
    # lists
    --eval-sets id,rule-odd: expected one of id, id-unseen, id-face, rule-ood
    --eval-sets id,id: expected
    --eval-sets id,: expected
    --eval-sets ,: expected
    --eval-sets '': expected
    --eval-sets id,mirrored: expected one of id, id-unseen, id-face, rule-ood, visual-ood, visual-ood-unseen
    --task virl-vl --eval-sets five-cards | relative-wording
    --task gp-vl --eval-sets target-13 | varied
    --rules 10,eleven: expected one positive integer for J, Q and K
    --rules 10,: expected
    --rules 10,10: expected
    --task virl-l | --rules absolute,10: expected one of absolute, relative
    --compat sixth: expected one of official, added-penalties
    --compat '': expected
    --compat official,ratio-10: expected official alone
    --lora-rank 4 | --lora-modules q_proj,w: expected one of attention, mlp
    # the game
    --rule eleven: expected one positive integer for J, Q and K
    --rule 0: expected
    --rule 10-11: expected
    --task virl-l | --rule 10: expected one of absolute, relative
    --look green: expected one of black, red, all
    --task virl-l | --look atlantis: expected a folder of routes or one of new-york,
    --attempts 0: expected
    --target 0: expected
    --task virl-l | --target 30: works only with --task gp-l or gp-vl
    --after-failure end: works only with --task virl-l or virl-vl
    --routes x: works only with --task virl-l or virl-vl
    --task virl-l | --routes no: expected a folder of routes in the released format
    --task virl-l | --routes milan: expected a folder of routes
    --task virl-l --eval-sets visual-ood | --ood-routes no: expected a folder of routes
    --task virl-l | --ood-routes .: works only with --eval-sets visual-ood
    --custom nowhere.py: expected a Python file that runs; FileNotFoundError
    # the model
    --model no: expected tiny, a checkpoint or a folder with a config.json; no/config.json
    --model .: expected tiny
    --algo pretrain | --preset paper: expected tiny with --algo pretrain
    --tune vision: expected with pictures to learn from: --task gp-vl
    # settings of another algorithm
    --algo sft | --hands 3: works only with --algo ppo
    --algo sft | --gamma 0.5: works only with --algo ppo
    --algo sft | --kl-coef 0.1: works only with --algo ppo
    --algo sft | --transcript-every 1: works only with --algo ppo
    --algo sft | --temperature 1.0: works only with --algo ppo or --sft-data own
    --algo sft | --clip 0.2: works only with --algo ppo or --sft-loss psft or iw-sft
    --batch-size 8: works only with --algo sft or pretrain
    --sft-loss dft: works only with --algo sft
    --algo pretrain | --sft-data own: works only with --algo sft
    --mistakes 0.5: works only with --algo sft or pretrain
    --algo sft --sft-data own | --mistakes 0.5: works only with --sft-data expert
    --algo sft --attempts 1 | --mistakes 0.5: works only with --attempts above 1
    --task virl-vl | --describe: works only with --algo sft or pretrain
    --task virl-l --algo sft | --describe: works only with --task virl-vl
    --algo eval | --lr 0.001: works only with --algo sft, ppo or pretrain
    --algo eval | --steps 3: works only with
    --algo eval | --seed 3: works only with
    --algo eval | --resume: works only with
    --algo eval | --eval-hands 0: expected at least 1 with --algo eval
    --algo pretrain | --rules 10,5: works only with --algo sft or ppo
    --algo pretrain | --lora-rank 4: works only with --algo sft or ppo
    --algo sft | --compat leaking-gae: expected official alone, or what
    --compat unwrapped-angles: expected official alone, or what --task gp-l
    --override: works only with --resume
    --resume: expected a run in runs/gp-l-ppo
    --out nowhere | --resume: expected a run in nowhere
    # settings of a variant
    --clip-high 0.3: works only with --loss clip-higher or dapo
    --dual-clip 2.0: works only with --loss dual-clip
    --loss reinforce | --clip 0.1: works only with --loss ppo, grpo
    --loss dapo | --unit token: works only with --loss ppo, clip-higher, dual-clip or reinforce
    --kl-in reward: works only with --kl-coef above 0
    --kl-coef 0 | --kl-estimator k1: works only with --kl-coef above 0
    --lora-alpha 8.0: works only with --lora-rank above 0
    --lora-modules mlp: works only with --lora-rank above 0
    --advantage rloo | --critic shared: works only with --advantage gae, gae-loo
    --advantage rloo | --value-coef 1.0: works only with --advantage gae, gae-loo
    --advantage rloo | --lam 0.9: works only with --advantage gae, gae-loo or gae-two-level
    --token-gamma 0.9: works only with --advantage gae-token
    --token-lam 0.9: works only with --advantage gae-token
    --advantage gae-token --unit token | --gamma 0.5: works only with --advantage gae, gae-loo
    # settings at odds with each other
    --samples 1 | --advantage grpo: expected --samples of at least 2
    --advantage gae-token: expected --unit token
    --shard on: expected several ranks (torchrun --nproc-per-node 2)
    --algo pretrain | --shard on: expected several ranks
"""


def command_of(line):
    """Split "words | --flag VALUE: message" -> (the command line, with the flag; the message)."""
    before, _, message = line.strip().rpartition(" | ")
    culprit = message.split(": ")[0]
    return f"{before} {culprit}" if culprit.startswith("--") else before, message


def lines_of(table):
    return [line.strip() for line in table.splitlines() if line.strip() and not line.strip().startswith("#")]


@pytest.mark.parametrize("line", lines_of(REFUSED))
def test_is_refused(start, line):
    command, message = command_of(line)
    assert message in start(command)


@pytest.mark.parametrize("flag, name, text, words", rows("""
    --custom  | syntax.py  | 1 +                       | SyntaxError
    --custom  | ends.py    | exit(0)                   | SystemExit: 0
    --custom  | empty.py   | x = 1                     | ESTIMATORS
    --custom  | entry.py   | LOSSES = {'mine': print}  | Loss(function, ...) as 'mine'
"""))
def test_files_that_are_none(start, flag, name, text, words):
    Path(name).write_text(text)
    said = start(f"{flag} {name}")
    assert f"{flag} {name}: expected" in said and words in said


def test_useless_settings_beside_ones_own_file(start):
    Path("mine.py").write_text("ESTIMATORS = {}")
    said = start("--task virl-l --custom mine.py --target 30")
    assert "--target 30: works only with another --task than virl-l" in said
    assert "--hands 3: works only with --algo ppo" in start("--algo sft --custom mine.py --hands 3")


def test_the_hardware_tells_how_threads_wait(monkeypatch):
    monkeypatch.setenv("GOMP_SPINCOUNT", "77")
    assert "GOMP_SPINCOUNT=77" in Processes("cpu").hardware


def test_folders_that_are_none(start):
    assert "File name too long" in start(f"--model {300 * 'long'}")
    assert r"--model '\x1b[2J': expected tiny" in start("--model \x1b[2J")
    for name, text, words in rows(f"""
            text  | {json.dumps(TEXT)}     | --task gp-vl: expected gp-l, as text is a text-only model
            torn  | {{                     | --model torn: expected tiny, a checkpoint or a folder
            other | {{"model_type": "bert"}} | --model other: expected tiny, a checkpoint or a folder
            """):
        Path(name).mkdir()
        Path(name, "config.json").write_text(text)
        assert words in start(f"--task gp-vl --model {name}")
    assert "--tune vision: expected with pictures" in start("--model text --tune vision")
    assert start("--model text") is None


def test_devices_that_are_none(start, monkeypatch):
    for name, backend in (("cuda", "cuda"), ("mps", "backends.mps")):
        monkeypatch.setattr(f"torch.{backend}.is_available", lambda: False)
        assert f"--device {name}: expected cpu, or another that this" in start(f"--device {name}")


# ------------------------------------------------------------------------------------------------------------
# Ranges, from the dataclass itself: a new setting without one fails here

FIELDS = {f.name: f for f in dataclasses.fields(Args)}
NUMBERS = [name for name, field in FIELDS.items() if field.type in (int, float, tuple)]


@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_have_a_range(start, name):
    words = ["", " ", *"nan -nan inf -inf 1e400 x 0x10 -1 -1e-9 1, ,1 1,2,3".split()]
    for word in [*words, "1.5", "1e3", "9" * 30, "9" * 5000] if FIELDS[name].type is int else words:
        with pytest.raises(SettingError) as refused:
            parse([flag_of(name), word])
        assert str(refused.value).startswith(f"{flag_of(name)} {word.strip() or repr(word)}: expected ")
    for value in (float("nan"), float("inf"), -1, -0.5, True, "x", [1], 10**400):
        with pytest.raises(SettingError, match=f"{flag_of(name)} .*: expected"):
            settle(Args(**{name: value}), TINY)


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_says_what_it_may_be(name):
    kind = FIELDS[name].metadata["kind"]
    assert kind.expect() and FIELDS[name].metadata["help"]
    assert kind.fit("") is kind.fit([]) is None


def test_presets_name_only_what_is_left_open():
    """And right values of it."""
    for line in PRESETS.values():
        assert all(FIELDS[name].default is None for name in parse(line.split())[1])


def test_what_a_setting_needs_is_there():
    """A misspelt need would never be met."""
    for clause in "; ".join(field.metadata["needs"] for field in FIELDS.values()).split("; "):
        for word in clause.replace(" or ", ", ").split(", "):
            if word.startswith("--"):
                flag, _, word = word.partition(" ")
            if word and not word.startswith("above"):
                assert FIELDS[flag[2:].replace("-", "_")].metadata["kind"].fit(word) is not None, clause


def test_the_settings_of_a_resumed_run_are_checked(start):
    args = Args(model="text", out="run")
    Path("text").mkdir()
    Path("text/config.json").write_text(json.dumps(TEXT))
    settle(args, TINY)
    Path("run").mkdir()
    Path("run/log.jsonl").write_text("")
    for changes, words in rows("""
            {}                      | None
            {"max_grad_norm": -1.0} | --max-grad-norm -1.0: expected a number above 0
            {"lr": "fast"}          | --lr fast: expected
            {"loss": "mse"}         | --loss mse: expected one of
            {"betas": [0.9]}        | --betas 0.9: expected two
            {"eval_sets": "id,id"}  | --eval-sets id,id: expected
            """):
        Path("run/config.json").write_text(json.dumps(dataclasses.asdict(args) | json.loads(changes)))
        assert words in str(start("--resume --out run"))


def test_what_follows_from_the_machine_is_found_anew():
    config = dataclasses.asdict(Args(device="cpu", rescore="off"))
    args = resumed(Args(resume=True, rescore="auto"), {"resume", "rescore"}, config, "run")
    assert (args.device, args.rescore) == ("auto", "auto")


def test_help_fits_two_screens_and_help_all_explains_every_setting(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    said = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as stop:
            train.main([flag])
        assert stop.value.code == 0
        said[flag] = capsys.readouterr().out
    assert said["--help"].count("\n") <= 100 and said["--help"] != said["--help-all"]
    assert all(f"  {flag_of(name)}" in said["--help-all"] for name in FIELDS)


# ------------------------------------------------------------------------------------------------------------
# Command lines that pass

ACCEPTED = """
    --task gp-vl --algo ppo
    --steps 1 --seed 9223372036854775807 --lr 1e-300 --weight-decay 0 --warmup 1 --betas 0,0.999
    --betas '0.9, 0.95' --eval-sets 'id, rule-ood , visual-ood'
    --eval-temperature 0 --eval-hands 0 --eval-every 0
    --hands 1 --samples 1 --minibatches 1 --attempts 1 --token-budget 1 --keep 1 --rollout-batch 1
    --clip 0.999 --gamma 1 --lam 0 --value-clip 0 --entropy-coef 0 --temperature 100
    --target 36 --rule 5 --look all --rules '10, 11-12-13'
    --rule 1 --target 1
    --task virl-l --rule relative --look milan --hide-landmarks --after-failure walk-on
    --task virl-vl --algo sft --describe
    --algo sft --sft-data own --temperature 0.5
    --algo sft --sft-loss psft --clip 0.2 --minibatches 64 --mistakes 1
    --algo sft --tune attention --lora-rank 4 --lora-modules q_proj,v_proj
    --task gp-vl --tune vision
    --algo pretrain --tune mlp --batch-size 1
    --algo eval --eval-sets id,five-cards,fake-rule
    --loss dapo --clip-high 0.3 --advantage grpo
    --loss dual-clip --dual-clip 2 --unit token --advantage gae-two-level --token-lam 0.9 --lam 0.9
    --kl-coef 0.1 --kl-in reward --kl-estimator k1
    --compat ratio-10,sixth-attempt
    --compat official --algo sft
    --out new/folder --preset paper
"""


@pytest.mark.parametrize("line", ACCEPTED.strip().splitlines())
def test_is_accepted(start, line):
    assert start(line) is None


def printed():
    """Yield all command lines of train.py in the pages and docstrings, as lists of words."""
    lines = []
    for page in (HERE / "README.md", *HERE.glob("*/README.md"), *HERE.glob("docs/**/*.md")):
        parts = page.read_text().split("```")
        lines += [" ".join(span.split()) for text in parts[::2] for span in re.findall("`([^`]+)`", text)]
        lines += [line for block in parts[1::2] for line in block.replace("\\\n", " ").splitlines()]
    for file in (*HERE.glob("*.py"), *HERE.glob("[!t]*/*.py")):
        lines += (ast.get_docstring(ast.parse(file.read_text())) or "").splitlines()
    for said in re.findall(r"train\.py (--.*)", "\n".join(lines)):
        words = shlex.split(re.split(r"#|&&|\$\(|:", said)[0])
        if words[0] != "--help":
            yield words


def test_the_commands_in_the_documentation_pass(tmp_path, working_folder):
    seen = list(printed())
    assert len(seen) > 10
    data = dict.fromkeys(("nyc_1k_routes", "vln_mini"), str(cities.build("milan", working_folder)))
    for words in seen:
        args, typed = parse([data.get(word, word) for word in words])
        if not (args.resume or args.custom):
            settle(args, TINY, typed)


def test_the_commands_of_the_study_pass():
    lines = {run.argv: run.ranks for experiment in study.EXPERIMENTS.values() for run in experiment.runs([0])}
    assert len(lines) > 100
    for argv, ranks in lines.items():
        args, typed = parse(argv)
        settle(args, TINY, typed, ranks)


# ------------------------------------------------------------------------------------------------------------
# The other command lines

OTHERS = {
    study: """
        mian | experiment mian: expected one of all, plot, main
        main | --seeds a: expected an integer from 0 to 99; or several
        main | --seeds 0,0: expected
        main | --seeds 0,: expected
        main | --seeds -1: expected
        main | --seeds 100: expected
        main | --workers 0: expected an integer from 1
        main | --ranks 0: expected an integer from 1
        main | --only zzz: expected part of the name of a run of main
        all --only zzz --plan | --only zzz: expected part of the name of a run of all
        main | --model nowhere: expected a folder with a config.json
        main | --runs '': expected a folder
        plot | RUN ...: expected with plot
        main nowhere | RUN ...: expected with plot
        plot nowhere | plot nowhere: expected a folder that train.py wrote""",
    plan: """
        --gpus 0: expected an integer from 1
        --gpus 2.5: expected
        --gpu-memory -1: expected a number above 0
        --gpu-memory nan: expected
        --model TYPO: expected tiny, Llama-3.2-11B-Vision,
        --model Llama-3.2-11B-Vision-Instructt | expected tiny
        --model . | or a folder with a config.json; config.json: not found
        --algo eval: works only with train.py; planned are SFT and PPO
        --resume: works only with train.py
        --algo sft | --hands 3: works only with --algo ppo
        --gpus 33 | --hands 32: expected at least 33
        --nonsense | unrecognized arguments: --nonsense""",
    bench: """
        --json nowhere/x.json: expected a file that can be written
        --json .: expected a file
        --only nonsense: expected part of one of logprob"""}


@pytest.mark.parametrize("module, line", [(module, line) for module, table in OTHERS.items()
                                          for line in lines_of(table)])
def test_other_commands_refuse(tmp_path, monkeypatch, capsys, module, line):
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    command, message = command_of(line)
    with pytest.raises(SystemExit) as stop:
        module.main(shlex.split(command))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and said.count("\n") == 1 and message in said, said
    assert [path.name for path in tmp_path.rglob("*")] == ["file"]


# ------------------------------------------------------------------------------------------------------------
# Kinds and ranks

@pytest.mark.parametrize("kind, right, wrong", [               # words, parted by slashes
    (ranges.integer(2, 8, step=2), "2/8/ 4", "1/3/9/10/2.0/²/1e0"),
    (ranges.above(0), "1e-300/5", "0/-0.0/nan/1e301"),
    (ranges.between(0, 1), "0/1/.5", "-1e-12/1.0000001"),
    (ranges.inside(0, 1), "0.5", "0/1"),
    (ranges.several(ranges.one_of(("a", "b"))), "a/a,b/ b , a ", "/,/a,/a,a/a,c"),
    (ranges.several(ranges.integer(0, 9)), "0/0, 1", "0,00/0,10/a"),
    (ranges.pair("two", ranges.above(0)), "1,2/1, 1", "1/1,0/1,2,3/a,b/"),
])
def test_kinds(kind, right, wrong):
    for word in right.split("/"):
        assert kind.fit(kind(word)) == kind(word)              # what is read is of the kind, too
    for word in wrong.split("/"):
        with pytest.raises(ranges.argparse.ArgumentTypeError, match="expected"):
            kind(word)


def test_a_refusal_is_one_line():
    assert ranges.integer(1).refusal("1\n2") == r"'1\n2': expected an integer from 1 to 10^9"
    assert ranges.integer(1).refusal("\x1b[2J").startswith(r"'\x1b[2J'")


def test_a_refusal_of_one_rank_is_that_of_all(monkeypatch):
    """A file may be missing on one node alone."""
    processes = Processes("cpu")
    monkeypatch.setattr("harness.load.gather", lambda own: own + ["--prompts p.json: expected a JSON file"])
    with pytest.raises(SettingError, match="--prompts p.json"):
        agree(processes, Args(algo="eval"))
