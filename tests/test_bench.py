"""The benchmark: whom it lets pass, what it counts, and that a table and a JSON file come out."""
import json

import pytest
import torch

from benchmarks import kernels as bench
from benchmarks import rivals
from kernels import attention
from kernels.visible import Visible
from tables import cases

CEILINGS = {"TFLOP/s": 0.1, "GB/s": 10}
TINY = rivals.table("""
    causal  2  9  9  4 2 16
    ragged  3  8  8  4 2 16
    resumed 3  5 12  4 2 16
    cross   4 16 40  2 1 16
    vision  4 40 40  2 2 16
    decode  4  1 12  4 2 16
""")


@pytest.fixture(autouse=True)
def known_ceilings(monkeypatch):
    monkeypatch.setattr(bench, "measure_ceilings", lambda dtype: CEILINGS)


def attention_cases(kind, sizes=None):
    return list(rivals.attention_cases(kind, sizes or TINY[kind], torch.float32))


def logprob_case(name="logprob"):
    return next(rivals.logprob_cases(name, (12, 8, 50), torch.float32))


def run(case):
    return {row["implementation"]: row for row in bench.bench(case, CEILINGS, 0)}


@cases("name", [*TINY, "logprob", "logprob-entropy"])
def test_cases_agree(name):
    for case in attention_cases(name) if name in TINY else [logprob_case(name)]:
        rows = run(case)
        timed = {way: row for way, row in rows.items() if "ms" in row}
        assert timed.keys() >= {"ours", "naive"}
        assert name not in TINY or any(way.startswith("sdpa math") for way in timed)
        assert all(row["error"] < 1e-5 and row["ratio"] == row["ms"] / rows["ours"]["ms"]
                   for row in timed.values())
        assert all(row["no"] != "WrongResult" for way, row in rows.items() if way not in timed)
    if name == "logprob":
        assert "torch chunks" in timed or not hasattr(torch.nn, "LinearCrossEntropyOptions")


def test_the_exact_answers_are_those_of_the_naive_form():
    """Compute them in pieces; what is no padding sees as alone."""
    case = attention_cases("ragged")[1]
    args, upstream = case.inputs
    exact, naive = (case.prepare(way, args, upstream)() for way in (case.exact, case.ways["naive"]))
    assert all(torch.allclose(x, y, atol=1e-6) for x, y in zip(exact, naive))
    assert rivals.see_whom("ragged", 3, 8, 8)["lengths"].tolist() == [8, 4, 1] == case.real.sum(1).tolist()
    alone = rivals.naive_attention(*(x[1:2] for x in args), torch.ones(8, 8, dtype=torch.bool).tril())
    assert torch.allclose(exact[0][1, :4], alone[0, :4], atol=1e-6)            # row 1, where padding begins


@cases("part, spoil", [
    (0, lambda x: x * 1.001), (0, lambda x: x.masked_fill(x == x.max(), torch.nan)),
    (1, lambda x: x + 0.01 * (x - x.detach()))], ids=["off", "nan", "steep: the same value"])
def test_a_wrong_result_gets_no_time(part, spoil, capsys):
    """Of the forward pass, or of the backward pass alone."""
    case = attention_cases("causal")[part]
    case.ways["naive"] = lambda q, k, v: spoil(attention.attention(q, k, v, Visible(causal=True)))
    rows = run(case)
    assert rows["naive"]["no"] == "WrongResult" and "ms" not in rows["naive"] and "ms" in rows["ours"]
    table = capsys.readouterr().out
    assert "| no: WrongResult" in table and "| ours " in table


def test_errors_are_held_against_those_of_the_naive_form():
    """Let twice as much pass as the naive form is off by, but not three times; of the naive form itself, what
    is rounding."""
    def off(by):
        return lambda hidden, *rest: rivals.naive_loss(hidden, *rest) * (1 + by)

    case = logprob_case()
    for naive, wrong in ((9e-5, ["worse"]), (2e-4, ["naive", "bad", "worse"])):
        case.ways = {"naive": off(naive), "bad": off(1.7e-4), "worse": off(2.7e-4), "ours": rivals.our_loss}
        assert [name for name, row in run(case).items() if row.get("no") == "WrongResult"] == wrong


def test_what_rivals_raise_is_told_and_what_ours_raises_is_raised():
    def fails(error):
        def way(*args):
            raise error
        return way

    case = logprob_case()
    case.ways = {"naive": rivals.naive_loss, "ours": rivals.our_loss,
                 "gone": fails(ModuleNotFoundError("No module named x"))}
    gone = run(case)["gone"]
    assert (gone["no"], gone["message"]) == ("ModuleNotFoundError", "No module named x")
    case.ways["ours"] = fails(TypeError("ours"))
    with pytest.raises(TypeError, match="ours"):
        run(case)


def test_flops_and_bytes():
    forward, backward = attention_cases("ragged", (2, 16, 16, 4, 2, 8))                 # lengths 16 and 2
    pairs, queries = 16 * 17 // 2 + 2 * 3 // 2, 18
    assert (forward.flops, backward.flops) == (4 * 8 * 4 * pairs, 10 * 8 * 4 * pairs)
    assert (forward.bytes, backward.bytes) == (4 * 8 * 2 * (4 + 2) * queries, 4 * 8 * 4 * (4 + 2) * queries)
    decode, = attention_cases("decode", (2, 1, 8, 4, 2, 8))                                   # 8 and 5 keys
    assert decode.flops == 4 * 8 * 4 * 13 and decode.bytes == 4 * 8 * (2 * 4 * 2 + 2 * 2 * 13)
    assert logprob_case().flops == 3 * 2 * 12 * 8 * 50


def test_main(tmp_path, capsys):
    bench.main(["--seconds", "1e-9", "--only", "cross", "--json", str(tmp_path / "bench.json")])
    table = capsys.readouterr().out
    found = json.loads((tmp_path / "bench.json").read_bytes())
    parts = {(row["case"], row["part"]) for row in found["rows"]}
    assert parts == {("cross", "forward"), ("cross", "backward")}
    assert found["machine"]["torch"] == torch.__version__ and found["ceilings"] == CEILINGS
    assert all(len(row["all_ms"]) == 3 for row in found["rows"] if "ms" in row)
    assert "TFLOP/s" in table
    assert len({line.count("|") for line in table.splitlines() if line.startswith("|")}) == 1


def test_main_ends_where_ours_is_wrong(monkeypatch):
    monkeypatch.setattr(rivals, "attention", lambda *qkv, **masks: attention.attention(*qkv, **masks) * 1.01)
    with pytest.raises(bench.WrongResult, match="decode-1 forward"):
        bench.main(["--seconds", "1e-9", "--only", "decode-1"])
