"""A run's folder under hostile circumstances: two processes at once, torn and foreign files, folders that
come from elsewhere, text that acts on a terminal, locales that know no ±."""

import ast
import contextlib
import errno
import fcntl
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from distributed.processes import Processes
from harness import files, folder, terminal
from harness.settings import Args
from study import __main__ as study
from study import records
from study.runner import Run, Runner
from tables import rows
from variants import SFT_LOSSES

ROOT = Path(train.__file__).parent


GAME = "--task gp-l --attempts 2 --max-new-tokens 4 --eval-hands 2 --device cpu"
LEARN = f"{GAME} --eval-every 0 --save-every 1"
SHORT = {              # what stands for the first word of a command line
    "sft": f"--algo sft --batch-size 4 {LEARN}", "eval": f"--algo eval {GAME}",
    "ppo": f"--algo ppo --hands 4 --samples 1 --minibatches 1 {LEARN}", "resume": "--device cpu --resume"}


def run(line, main=train.main):
    first, *more = line.split()
    main(SHORT.get(first, first).split() + more)


@pytest.fixture(scope="module")
def runs(small, tmp_path_factory):
    """Return a folder with a run of SFT and one of PPO, each with two checkpoints."""
    root = tmp_path_factory.mktemp("runs")
    for algo in ("sft", "ppo"):
        run(f"{algo} --model {small[0]} --steps 2 --out {root / algo}")
    return root


@pytest.fixture
def sft(runs, tmp_path):
    """Return a copy of the run of SFT."""
    return shutil.copytree(runs / "sft", tmp_path / "sft")


def refused(line, main=train.main):
    """Run a command line that is to be refused. Return what is said, one line."""
    with pytest.raises(SystemExit) as stop, contextlib.redirect_stderr(io.StringIO()) as err:
        run(line, main)
    said = err.getvalue().strip() if stop.value.code == 2 else str(stop.value.code)
    assert "\n" not in said and len(said) > 20, said
    return said


def content(path):
    """Return all that lies in a folder, but for locks."""
    found = [file for file in path.rglob("*") if file.name != files.LOCK]
    return {file.relative_to(path): file.is_file() and file.read_bytes() for file in found}


# ------------------------------------------------------------------------------------------------------------
# One process per folder

@pytest.mark.parametrize("command", ["resume", "sft --model {}", "eval --model {}", "ppo --model {}"])
def test_a_folder_in_use_is_refused_and_not_touched(small, sft, command):
    before = content(sft)
    with files.lock(sft):
        said = refused(f"{command.format(small[0])} --out {sft}")
    assert re.search(rf"{sft}: in use by 'process {os.getpid()} on \S+, since 20.*another --out", said)
    assert content(sft) == before


@pytest.mark.parametrize("held", ['{"pid": 1}', "\0\xff", "[" * 100_000, "", "[1]"])
def test_a_holder_that_did_not_say_who_it_is(tmp_path, held):
    with files.lock(tmp_path):
        (tmp_path / files.LOCK).write_text(held)
        with pytest.raises(files.Held, match="in use by '.*'; wait") as error:
            files.lock(tmp_path)
        assert str(error.value).isprintable() and len(str(error.value)) < 400
    files.lock(tmp_path).close()


def test_the_dead_hold_nothing(tmp_path):
    script = ("import sys, time; from harness import files; lock = files.lock(sys.argv[1]);"
              "print(flush=True); time.sleep(60)")
    argv = [sys.executable, "-c", script, tmp_path / "run"]
    process = subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE)
    assert process.stdout.readline() == b"\n"
    with pytest.raises(files.Held, match=f"process {process.pid} "):
        files.lock(tmp_path / "run")
    process.kill()
    process.communicate()
    files.lock(tmp_path / "run").close()


def test_a_worker_that_is_started_again_waits_for_the_one_before(tmp_path):
    lock = files.lock(tmp_path)
    threading.Timer(0.3, lock.close).start()
    with files.lock(tmp_path, patience=60), pytest.raises(files.Held):
        files.lock(tmp_path, patience=0.1)


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks(tmp_path, monkeypatch, capsys, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)
    files.lock(tmp_path / "run").close()
    assert "no lock" in capsys.readouterr().err


def starts_at_once(args, n):
    """Let so many processes, for which threads stand, choose their folders at the same moment."""
    barrier, alone = threading.Barrier(n), SimpleNamespace(restarted=False, launch=None)

    def choose(k):
        barrier.wait()
        try:
            return folder.choose(args, alone, held)[0]
        except ValueError as error:
            return error

    with contextlib.ExitStack() as held, ThreadPoolExecutor(n) as pool:
        return list(pool.map(choose, range(n)))


def test_of_many_starts_one_gets_the_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for args, name in ((Args(task="gp-l", algo="sft"), "runs/gp-l-sft"), (Args(out="x"), "x")):
        found = starts_at_once(args, 8)
        assert found.count(name) == 1 and sum(isinstance(one, files.Held) for one in found) == 7


def test_default_folders(tmp_path, monkeypatch):
    """A run that has begun keeps its folder; --resume takes it."""
    monkeypatch.chdir(tmp_path)
    path = Path("runs/gp-l-sft")
    path.mkdir(parents=True)
    (path / "log.jsonl").touch()
    assert "expected a folder without a run" in str(starts_at_once(Args(algo="sft"), 1)[0])
    assert starts_at_once(Args(algo="sft", resume=True), 1) == ["runs/gp-l-sft"]
    with files.lock(path):
        assert "gp-l-sft: in use by" in str(starts_at_once(Args(algo="sft", resume=True), 1)[0])
    assert "expected a run in runs/gp-l-ppo" in str(starts_at_once(Args(resume=True), 1)[0])
    assert not Path("runs/gp-l-ppo").exists()


@pytest.mark.parametrize("log, launch, resumes", [
    ('{"event": "start", "step": 0, "launch": "a"}', "a", True), ("", "a", False),
    ('{"event": "start", "step": 0, "launch": "a"}', "b", False)])
def test_a_worker_that_is_started_again_resumes_its_own_run_alone(tmp_path, log, launch, resumes):
    (tmp_path / "log.jsonl").write_text(log)
    args, again = Args(out=str(tmp_path)), SimpleNamespace(restarted=True, launch=launch)
    with contextlib.ExitStack() as held:
        if resumes:
            assert folder.choose(args, again, held) == (str(tmp_path), True)
        else:
            with pytest.raises(ValueError, match="expected a folder without a run"):
                folder.choose(args, again, held)


@pytest.mark.parametrize("name, prepare", [
    ("run", Path.touch), ("run/below", Path.touch),
    ("run", lambda run: run.symlink_to("/nowhere/at/all")),
    ("run", lambda run: (run / files.LOCK).mkdir(parents=True)),
    ("run", lambda run: (run.mkdir(), (run / files.LOCK).symlink_to(run / "victim"))),
    ("/proc/run", Path.exists), ("x" * 300, Path.exists)])
@pytest.mark.parametrize("algo", ["sft", "eval"])
def test_a_folder_that_cannot_be_one(small, tmp_path, name, prepare, algo):
    prepare(tmp_path / "run")
    before = content(tmp_path)
    said = refused(f"{algo} --model {small[0]} --out {tmp_path / name}")
    assert str(tmp_path / name) in said
    assert "choose another --out" in said or "File name too long" in said
    assert content(tmp_path) == before


@pytest.mark.parametrize("line, words", rows("""
    --prompts nowhere.json                               | No such file or directory: 'nowhere.json'
    --prompts bad.json                                   | bad.json: not a JSON object of templates
    --task virl-l --routes city                          | city/route_infos.json
    --task virl-l --look city                            | city/route_infos.json
    --target 1000000                                     | no solvable hand in 10000
    --tune attention --lora-rank 2 --lora-modules fc1    | --lora-modules fc1: none of these layers learns
"""))
def test_what_shows_before_the_run_is_there(small, tmp_path, monkeypatch, line, words):
    """In one line, and before a log says that it has begun."""
    monkeypatch.chdir(tmp_path)
    Path("bad.json").write_text("{")
    Path("city").mkdir()
    Path("city/route_infos.json").write_text("[1]")
    assert words in refused(f"sft --model {small[0]} --out run {line}")
    assert not Path("run/log.jsonl").exists() or "--target" in line


def test_a_linked_folder_of_runs(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "disk")
    run(f"sft --model {small[0]} --steps 1")
    assert (tmp_path / "disk/gp-l-sft/final/config.json").exists()


# ------------------------------------------------------------------------------------------------------------
# Made once

def test_the_first_to_end_wins(tmp_path):
    with files.aside(tmp_path / "made") as slow:
        with files.aside(tmp_path / "made") as quick:
            (quick / "who").write_text("quick")
        (slow / "who").write_text("slow")
    assert content(tmp_path) == {Path("made"): False, Path("made/who"): b"quick"}


def test_what_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), files.aside(tmp_path / "made") as private:
        (private / "half").touch()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fails", [False, True])
def test_a_file_is_replaced_as_a_whole_and_no_link_is_followed(tmp_path, fails):
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file").symlink_to("victim")

    def write(file):
        file.write(b"new")
        if fails:
            raise OSError(28, "No space left on device")
    with pytest.raises(OSError) if fails else contextlib.nullcontext():
        files.replace(tmp_path / "file", write)
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == {"victim": "precious", "file": "precious" if fails else "new"}


def test_two_studies_at_once(tmp_path):
    """The second does nothing; with nothing to do it needs no lock."""
    runner = Runner([Run("a-0", ())], tmp_path / "runs", tmp_path / "records/a.jsonl")
    with files.lock(tmp_path / "records"):
        with pytest.raises(files.Held, match="another --runs and --records"):
            runner.work()
        files.append_line(runner.file, {"name": "a-0", "curve": []})
        assert Runner(runner.runs, runner.root, runner.file).work() == []


# ------------------------------------------------------------------------------------------------------------
# Lines of JSON


# Content, and how many lines are good; or less than 0: which one is foreign.
LOGS = rows(r"""
    whole                             | GOOD\nGOOD\n                              | 2
    nothing                           |                                           | 0
    cut off                           | GOOD\n{"event"                            | 1
    cut off in a letter               | GOOD\n{"event": "\xc3                     | 1
    without the last line break       | GOOD\nGOOD                                | 2
    from Windows                      | GOOD\r\nGOOD\r\n                          | 2
    zeros, as after a power failure   | GOOD\n\0\0\0\0\0                          | 1
    cut off and gone on               | {"event"\nGOOD\n                          | -1
    two in one                        | GOOD\n{"event"GOOD\n                      | -2
    not JSON                          | GOOD\nhello\nGOOD                         | -2
    no object                         | [1]\nGOOD                                 | -1
    a number                          | 7\n                                       | -1
    null                              | GOOD\nnull\n                              | -2
    empty                             | GOOD\n\nGOOD                              | -2
    without an event                  | {"step": 1}\n                             | -1
    without a step                    | {"event": "step"}\n                       | -1
    a step in words                   | {"event": "step", "step": "one"}\n        | -1
    an event that is none             | {"event": null, "step": 1}\n              | -1
    not text                          | GOOD\n\x00\xff\x1b[2J\n                   | -2
    UTF-16                            | UTF-16\n                                  | -1
    deep                              | DEEP\n                                    | -1
""")


def log_named(name):
    """Return the content of a log, and how many of its lines are good."""
    [(text, good)] = [case for other, *case in LOGS if other == name]
    line, content = b'{"event": "step", "step": 1}', text.encode().decode("unicode_escape").encode("latin-1")
    for word, stands_for in ((b"GOOD", line), (b"DEEP", b"[" * 100_000),
                             (b"UTF-16", line.decode().encode("utf-16"))):
        content = content.replace(word, stands_for)
    return content, int(good)


@pytest.mark.parametrize("name", [name for name, *_ in LOGS])
def test_lines(tmp_path, name):
    content, good = log_named(name)
    (tmp_path / "log").write_bytes(content)
    if good >= 0:
        assert len(files.read_lines(tmp_path / "log", folder.LINE)) == good
    else:
        words = rf"{tmp_path}/log, line {-good}: expected .*event and step, found .*; delete that line"
        with pytest.raises(ValueError, match=words) as error:
            files.read_lines(tmp_path / "log", folder.LINE)
        assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["cut off", "not JSON", "empty", "not text", "no object"])
def test_a_runs_log(sft, name, monkeypatch):
    """On --resume and for a plot a cut-off last line is left out, another foreign one is named."""
    log, (foreign, good) = sft / "log.jsonl", log_named(name)
    lines = log.read_bytes()
    log.write_bytes(lines + (foreign if good < 0 else b'{"event'))
    monkeypatch.chdir(sft.parent)
    if good < 0:
        n = lines.count(b"\n") - good
        for said in (refused(f"resume --out {sft}"), refused(f"plot {sft}", study.main)):
            assert f"{log}, line {n}: " in said
    else:
        run(f"resume --out {sft}")
        assert log.read_bytes().startswith(lines) and b'"step": 2, "config"' in log.read_bytes()
        run(f"plot {sft}", study.main)


# Which lines of a log are there, and what is put in place of a word in it.
@pytest.mark.parametrize("events, word, other, words", rows("""
                |         |          | not of a run that has ended
    start       |         |          | not of a run that has ended
    step        |         |          | not of a run that has ended
    start, step | seconds | second   | not of a run that has ended
    start, step | gp-l    | chess    | a log of another version
    start, step |         |          | expected an evaluation before its first step
    start, step, eval | eval", "step": 0, "tflops | eval", "step": 1, "tflops | expected an evaluation
"""))
def test_logs_that_cannot_be_plotted(sft, events, word, other, words):
    log = sft / "log.jsonl"
    lines = [line for line in log.read_text().splitlines() if json.loads(line)["event"] in events.split(", ")]
    log.write_text("".join(line.replace(f'"{word}"', f'"{other}"') + "\n" for line in lines))
    said = refused(f"plot {sft}", study.main)
    assert str(sft) in said and words in said
    log.unlink()
    log.mkdir()
    assert "cannot be read (Is a directory)" in refused(f"plot {sft}", study.main)


def test_runs_that_were_tested_otherwise_are_not_plotted_together(runs, sft):
    log = sft / "log.jsonl"
    log.write_bytes(log.read_bytes().replace(b'"rule-ood": {', b'"fake-rule": {'))
    said = refused(f"plot {runs / 'ppo'} {sft}", study.main)
    assert f"{sft}: expected an evaluation" in said


def test_records(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"name": "a", "curve": []}\n{"name": "b", "cur')
    assert list(records.read(tmp_path)) == ["a"]
    files.append_line(file, {"name": "c", "curve": []})        # what was cut off is gone
    assert list(records.read(tmp_path)) == ["a", "c"]
    file.write_bytes(file.read_bytes() + b'{"name": "d", "curve": []}')
    files.append_line(file, {"name": "e", "curve": []})
    assert list(records.read(tmp_path)) == ["a", "c", "d", "e"]
    file.write_bytes(b"<<<<<<< HEAD\n" + file.read_bytes())
    with pytest.raises(ValueError, match="a.jsonl, line 1: expected a JSON object with name and curve"):
        records.read(tmp_path)


@pytest.mark.parametrize("where", ["start", "step"])
def test_a_log_that_cannot_be_written(small, tmp_path, monkeypatch, where):
    out, real = tmp_path / "run", folder.RunFolder.log

    def log(self, **record):
        if record["event"] == where:
            self.log_file.unlink()
            self.log_file.mkdir()
        real(self, **record)
    monkeypatch.setattr(folder.RunFolder, "log", log)
    said = refused(f"sft --model {small[0]} --steps 2 --out {out}")
    words = "cannot be written (Is a directory); make room, and --resume"
    assert f"{out}/log.jsonl: {words} --out {out} goes on from" in said


# ------------------------------------------------------------------------------------------------------------
# Checkpoints: damaged, foreign, hostile

LAST, BEFORE = "checkpoints/step_000002", "checkpoints/step_000001"


@pytest.mark.parametrize("name, harm", [(name, harm) for name in (
    "config.json", "tokenizer.json", "record.json", "tensors.safetensors") for harm in ("cut", "gone")])
def test_a_damaged_file_is_named(sft, name, harm):
    path = sft / LAST / name
    whole = path.read_bytes()
    path.unlink()
    if harm == "cut":
        path.write_bytes(whole[:-1])
    said = refused(f"resume --out {sft}")
    assert re.search(f"{LAST}/{name}: not (a|found|valid)", said)
    shutil.rmtree(sft / LAST)
    run(f"resume --out {sft}")


@pytest.mark.parametrize("name", (             # as `ls -F` shows folders and links
    "step_000099 step_000099@ step_5 step_5/ step_abc/ step_000002.bak/ step_ step_-00001/ "
    "step_٠٠٠٠٠٩/").split())
def test_what_is_called_like_a_checkpoint_and_is_none(sft, name):
    other = sft / "checkpoints" / name.strip("@/")
    {"@": lambda path: path.symlink_to("nowhere"), "/": Path.mkdir}.get(name[-1], Path.touch)(other)
    run(f"resume --steps 3 --override --keep 1 --out {sft}")
    assert other.is_symlink() or other.exists()                # it does not go with the old ones
    assert (sft / "checkpoints/step_000003").exists()


def test_a_record_of_another_version(sft):
    record = json.loads((sft / LAST / "record.json").read_text()) | {"config": {"algo": "sft"}}
    (sft / LAST / "record.json").write_text(json.dumps(record))
    assert re.search(f"{LAST}: .*another version", refused(f"resume --out {sft}"))


def test_checkpoints_of_a_run_without_its_log(small, sft):
    """A new run there would drop its own as older than these, and be resumed from one of these."""
    (sft / "log.jsonl").unlink()
    assert "expected a folder without a run" in refused(f"sft --model {small[0]} --out {sft}")


def test_another_algorithm_cannot_go_on(sft):
    said = refused(f"resume --algo ppo --out {sft}")
    assert re.search(f"--algo ppo cannot go on with a run of --algo sft; .* --model .*{LAST} and", said)
    assert "--algo ppo cannot go on" in refused(f"resume --algo ppo --override --out {sft}")


@pytest.mark.parametrize("begun, goes_on", [("sft", "ppo"), ("ppo", "sft")])
def test_weights_of_any_algorithm_begin_another(runs, tmp_path, begun, goes_on):
    run(f"{goes_on} --steps 1 --model {runs / begun / LAST} --out {tmp_path / 'run'}")
    assert (tmp_path / "run/final").exists()


class Payload:
    """An object that leaves a file behind as it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize("name, words", [
    ("rank_0.pt", None), ("tensors.safetensors", "not a whole safetensors file")])
@pytest.mark.parametrize("way", ["resume --out {sft}", "eval --model {last} --out {other}"])
def test_a_checkpoint_runs_nothing(sft, tmp_path, name, words, way):
    victim, line = tmp_path / "victim", way.format(sft=sft, last=sft / LAST, other=tmp_path / "eval")
    torch.save({"x": Payload(victim)}, tmp_path / "payload")
    for payload in ((tmp_path / "payload").read_bytes(), pickle.dumps(Payload(victim))):
        (sft / LAST / name).write_bytes(payload)
        if words:
            assert words in refused(line)
        else:
            run(line)
    assert not victim.exists()


@pytest.mark.parametrize("planted", ["config.json", "log.jsonl.tmp", "config.json.tmp", ".final", ".lock"])
def test_a_folder_from_elsewhere_overwrites_nothing_outside(sft, tmp_path, planted):
    """Links in a run's folder to files (or a folder) of the user's."""
    home = tmp_path / "home"
    home.mkdir()
    (home / "precious").write_text("precious")
    link = sft / planted
    link.parent.mkdir(exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(home if planted == ".final" else home / "precious")
    line = f"resume --steps 3 --override --out {sft}"
    if planted == ".lock":
        assert f"{sft}: cannot write there" in refused(line)
    else:
        run(line)
    assert content(home) == {Path("precious"): b"precious"}


# ------------------------------------------------------------------------------------------------------------
# What trusts what

def test_resume_runs_no_file_that_the_record_names(small, tmp_path):
    mine, out = tmp_path / "mine.py", tmp_path / "run"
    mine.write_text("import variants, pathlib\npathlib.Path(__file__ + '.ran').touch()\n"
                    "SFT_LOSSES = {'mine': variants.SFT_LOSSES['nll']}\n")
    ran = Path(f"{mine}.ran")
    run(f"sft --model {small[0]} --steps 1 --custom {mine} --out {out}")
    ran.unlink()
    words = f"--custom {mine}; to run that file again, give --custom FILE with --resume"
    assert words in refused(f"resume --out {out}")
    assert "--custom" in refused(f"resume --override --out {out}") and not ran.exists()
    moved = mine.rename(tmp_path / "moved.py")
    run(f"resume --custom {moved} --out {out}")
    assert Path(f"{moved}.ran").exists()
    SFT_LOSSES.pop("mine")


def calls():
    """Yield every call in the sources: (file, function, names of its keywords, plain arguments)."""
    for file in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")):
        if file.parent.name in ("tests", "build", "runs"):
            continue
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                values = (*node.args, *(word.value for word in node.keywords))
                words = {word.arg for word in node.keywords}
                plain = [getattr(value, "value", None) for value in values]
                yield str(file.relative_to(ROOT)), ast.unparse(node.func), words, plain


RUNNING = re.compile(
    r"(pickle|marshal|shelve|joblib|torch|np|numpy|yaml|dill|dcp)\.(load|loads|Unpickler|unsafe_load)$|"
    r"^(eval|exec|compile|__import__)$|runpy\.|os\.(system|popen)$|importlib\.import_module|FileSystemReader")
READING = re.compile(
    r"^(io\.)?open$|(path|file|\))\.open$|(read_text|write_text|fdopen|NamedTemporaryFile)$", re.I)


def test_no_source_runs_what_it_reads():
    """No pickle is read but by games/routes.py, whose reader imports nothing; --custom's code alone runs."""
    assert [file for file, what, words, _ in calls() if RUNNING.search(what) or "shell" in words] == [
        "harness/settings.py"]


def test_every_text_file_says_its_encoding():
    """And so does what a process says."""
    for file, what, words, plain in calls():
        binary = any(isinstance(x, str) and re.fullmatch(r"[rwxa+]*b[rwxa+]*", x) for x in plain)
        says = what.startswith("subprocess.") and {"text", "universal_newlines"} & words
        if says or READING.search(what) and not binary:
            assert "encoding" in words, f"{file}: {what}"


# ------------------------------------------------------------------------------------------------------------
# What a person is shown

@pytest.mark.parametrize("text, shown", [
    ("plain ± é 你好 🂡", "plain ± é 你好 🂡"), ("a\n\tb", "a\n\tb"), ("\x1b[2J", r"\x1b[2J"),
    ("a\rb\b\a", r"a\rb\x08\x07"), ("\x9b31m\x85\x7f\0", r"\x9b31m\x85\x7f\x00"),
    ("\u202egnp.exe\u2069", r"\u202egnp.exe\u2069"), ("\u2028\u2029", r"\u2028\u2029"),
    ("\ud800", r"\ud800"), (r"\x1b", r"\x1b"), ("\x0b\x0c\x1c", r"\x0b\x0c\x1c")])
def test_visible(text, shown):
    assert terminal.visible(text) == shown


def test_transcripts_and_lines_hold_nothing_that_acts(tmp_path, capsys):
    run = folder.RunFolder(Args(out=str(tmp_path)), Processes("cpu"))
    said = [("user", "Bar \x1b]0;owned\a \udc80"), ("assistant", "\u202eé")]
    run.transcript(1, SimpleNamespace(transcript=said, pictures=[]))
    said = (tmp_path / "transcripts/step_000001.txt").read_text(encoding="utf-8")
    assert said == "[user]\nBar \\x1b]0;owned\\x07 \\udc80\n\n[assistant]\n\\u202eé\n"
    run.processes.print("step", "\x1b[31m")
    assert capsys.readouterr().out == "step \\x1b[31m\n"
    assert r"/no\x1b[31mwhere" in refused(f"sft --model /no\x1b[31mwhere --out {tmp_path / 'run'}")


SAYS = "import sys; from harness import terminal; terminal.command(lambda: {})"
NARROW = {"ascii": {"PYTHONIOENCODING": "ascii"}, "latin-1": {"PYTHONIOENCODING": "latin-1"},
          "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}}


@pytest.mark.parametrize("locale", NARROW)
def test_a_narrow_locale_ends_nothing(locale):
    script = SAYS.format(r"[print('5 \xb1 1 \U0001f0a1'), sys.exit('Z\xfcrich \xb1')]")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT,
                          env=os.environ | NARROW[locale])
    sign = b"\xb1" if locale == "latin-1" else rb"\xb1"
    assert done.stdout == b"5 " + sign + rb" 1 \U0001f0a1" + b"\n" and done.returncode == 1
    assert sign in done.stderr and b"Traceback" not in done.stderr


@pytest.mark.parametrize("script, closed", [("print('x' * 10**6)", "stdout"),
                                            ("[print('x'), sys.exit(0)]", "stdout"),
                                            ("[print('x', file=sys.stderr), 1/0]", "stderr")])
def test_a_reader_that_has_gone_is_no_fault(script, closed):
    gone, kept = os.pipe()
    os.close(gone)
    with open(os.devnull, "wb") as nowhere:
        process = subprocess.Popen([sys.executable, "-c", SAYS.format(script)], cwd=ROOT,
                                   **{"stdout": nowhere, "stderr": subprocess.PIPE} | {closed: kept})
        _, err = process.communicate(timeout=60)
    os.close(kept)
    assert process.returncode == 141 and not err


def test_every_command_says_it_so():
    for file in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")):
        source = file.read_text(encoding="utf-8")
        if "__main__\"" in source and file.parent.name not in ("tests", "build"):
            assert "command(" in source.split('"__main__"')[1], file


def test_a_commit_is_marked_where_its_python_differs(tmp_path, monkeypatch):
    """The study appends its records to files that git tracks: they leave the mark of the code alone."""
    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b", *words], cwd=tmp_path, check=True)

    monkeypatch.setattr(folder, "__file__", str(tmp_path / "harness/folder.py"))
    code, table = tmp_path / "code.py", tmp_path / "records.jsonl"
    for file in (code, table):
        file.write_text("1\n", encoding="utf-8")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "Begin")
    found = [folder.git_commit()]
    for file in (table, code):
        file.write_text("2\n", encoding="utf-8")
        found.append(folder.git_commit())
    commit = found[0]
    assert commit and "+" not in commit and found == [commit, commit, commit + "+"]
