"""Table 3: what is combined and named, and the script as a user runs it."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_words import drawn, some_words, write_lmdb

import backbone as vit
import eval_ocr
import lora
import training

MINI = ("--model", "eva_mini", "--weights", "random", "--workers", 0)
SMALL = (*MINI, "--size", 56, 112, "--width", 32, "--charset", 36, "--warmup", 2, "--log-every", 2)


# --- the table


def answers(sets: dict[str, int], right: dict[str, int]) -> dict:
    return {
        f"{name}/{i + 1:09d}": ("word", "word" if i < right[name] else "ward")
        for name, n in sets.items()
        for i in range(n)
    }


def rows_of(sets: dict[str, int], **right) -> tuple[dict, list[str]]:
    lists = {name: range(n) for name, n in sets.items()}
    rows, notes = eval_ocr.table_rows(lists, {v: answers(sets, r) for v, r in right.items()})
    return {(r["set"], r["metric"]): r for r in rows}, notes


def test_combined_is_over_words_and_names_what_is_missing():
    sets = {"evaluation/SVT": 2, "IIIT5k": 6, "IC13_857": 4, "mine": 8}  # IIIT5k: PARSeq's name
    before = {"evaluation/SVT": 0, "IIIT5k": 6, "IC13_857": 1, "mine": 0}
    rows, notes = rows_of(sets, before=before, after={**before, "mine": 8})
    large = rows["six sets, large lists (without IC03_867, IC13_1015, IC15_2077, SVTP)", "accuracy"]
    assert large["before"] == 100 * 6 / 8 and large["n"] == 8 and large["difference"] == 0
    small = rows["six sets, small lists (without IC03_860, IC15_1811, SVTP)", "accuracy"]
    assert small["before"] == pytest.approx(100 * 7 / 12)
    everything = rows["all sets found", "accuracy"]
    assert (everything["before"], everything["after"]) == (35, 75) and everything["n"] == 20
    assert everything["p"] == pytest.approx(2 / 2**8) and 0 < everything["low"] < 40 < everything["high"]
    assert rows["mine", "edit similarity"]["before"] == 75  # one letter of four
    assert rows["SVTP", "accuracy"]["before"] is None and "SVTP: not found" in notes
    assert "evaluation/SVT: 2 words; the published list has 647" in notes
    with pytest.raises(ValueError, match="a/SVT and b/SVT are both SVT"):
        rows_of({"a/SVT": 1, "b/SVT": 1}, before={"a/SVT": 1, "b/SVT": 1})


def test_published_lists_add_up():
    """Protocols in print: 8,251 words in the large lists, 7,820 in the small, 11,779 in nine."""
    counts = [sum(eval_ocr.SIZES[name] for name in lists) for lists in eval_ocr.COMBINED.values()]
    assert counts == [8251, 7820, 11779]


# --- the script


@pytest.fixture(scope="module")
def sets(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sets")
    write_lmdb(folder / "MJ", some_words(40, 1))
    write_lmdb(folder / "ST", some_words(24, 2))
    write_lmdb(folder / "test" / "SVT", [*some_words(9, 3), "!?"])
    write_lmdb(folder / "test" / "mine", some_words(5, 4))
    return folder


def command(sets: Path, out: Path, **changed) -> list:
    options = {
        "train": [sets / "MJ", sets / "ST"],
        "test": [sets / "test"],
        "out": out,
        "iters": 6,
        "batch": 8,
    }
    options |= {"lr": 1e-3, **changed}
    flat = (x for k, v in options.items() for x in (f"--{k}", *(v if isinstance(v, list) else [v])))
    return [*SMALL, *flat]


def dW(path: Path, zero=False) -> Path:
    backbone = vit.load("eva_mini", "random")
    lora.attach(backbone.vit, rank=4)
    torch.manual_seed(1)
    for name, p in lora.parameters(backbone.vit).items():
        if not (zero and name.endswith("lora_B")):
            torch.nn.init.normal_(p)
    lora.save(backbone.vit, path, backbone="eva_mini", step=5000)
    return path


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def read_words(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "words.jsonl").read_text().splitlines()]


def test_a_zero_dW_changes_exactly_nothing_and_another_does(sets, tmp_path, run):
    code, out, err = run(
        "eval_ocr", *command(sets, tmp_path / "z", compare=dW(tmp_path / "zero.st", zero=True))
    )
    assert code == 0, err
    for row in result(tmp_path / "z")["rows"]:
        if row["n"]:
            assert row["difference"] == row["low"] == row["high"] == 0 and row["before"] == row["after"]
    heads = [load_file(tmp_path / "z" / v / "ocr.safetensors") for v in ("before", "after")]
    assert all(torch.equal(value, heads[1][name]) for name, value in heads[0].items())
    assert all(line["before"] == line["after"] for line in read_words(tmp_path / "z"))
    assert "| eva_mini ViSFT | 2.8M | 5000 |" in out and "six sets, large lists (without" in out
    assert "1 labels without a digit or letter" in out and "SVT: 10 words; the published" in out
    assert out.count("of 40 words for training") == 1

    options = command(sets, tmp_path / "a", compare=dW(tmp_path / "dW.st"))
    assert run("eval_ocr", *options)[0] == 0
    before, after = (load_file(tmp_path / "a" / v / "ocr.safetensors") for v in ("before", "after"))
    assert all(torch.equal(value, heads[0][name]) for name, value in before.items())  # dW is out of the way
    assert any(not torch.equal(value, after[name]) for name, value in before.items())
    # --lora and --lora none are the two halves of --compare
    for variant, options in (("after", {"lora": tmp_path / "dW.st"}), ("before", {})):
        assert run("eval_ocr", *command(sets, tmp_path / variant, **options))[0] == 0
        alone = load_file(tmp_path / variant / variant / "ocr.safetensors")
        both = load_file(tmp_path / "a" / variant / "ocr.safetensors")
        assert all(torch.equal(value, both[name]) for name, value in alone.items())


def test_trained_heads_are_scored_alone_and_unlike_features_refused(sets, tmp_path, run):
    file = dW(tmp_path / "dW.st")
    assert run("eval_ocr", *command(sets, tmp_path / "a", compare=file))[0] == 0
    heads = [tmp_path / "a" / v / "ocr.safetensors" for v in ("before", "after")]
    score = [*MINI, "--test", sets / "test", "--out", tmp_path / "b", "--compare", file, "--head"]
    code, _, err = run("eval_ocr", *score, *heads)
    assert code == 0, err
    assert result(tmp_path / "b")["rows"] == result(tmp_path / "a")["rows"]
    assert read_words(tmp_path / "b") == read_words(tmp_path / "a")
    assert result(tmp_path / "a")["training_words"] == 48 and result(tmp_path / "b")["training_words"] is None
    for options, says in (
        ([*score, *reversed(heads)], "to score before, was trained with lora"),
        ([*score, heads[0]], "1 files to score before and after: one for each"),
        ([*score, *heads, "--size", 112], "size [56, 112], not [112, 112]"),
        ([*score, *heads, "--imagenet-norm"], "imagenet_norm False, not True"),
        ([*score, *heads, "--train", sets / "MJ"], "or --head FILE to score one"),
        ([*score, file, file], "not one of our head files"),
    ):
        code, _, err = run("eval_ocr", *options)
        assert code == 2 and says in err and err.count("\n") == 1, err


def test_stopped_and_resumed_is_bit_identical(sets, tmp_path, run, monkeypatch):
    options = {"save-every": 2, "compare": dW(tmp_path / "dW.st")}
    assert run("eval_ocr", *command(sets, tmp_path / "whole", **options))[0] == 0
    add, seen = training.Log.add, []

    def interrupted(self, step, *rest):
        add(self, step, *rest)
        seen.append(step)
        if len(seen) == 6 + 3:  # in `after`, between its checkpoints
            raise KeyboardInterrupt

    monkeypatch.setattr(training.Log, "add", interrupted)
    assert run("eval_ocr", *command(sets, tmp_path / "parts", **options))[0] == 130
    code, _, err = run("eval_ocr", *command(sets, tmp_path / "parts", **options))
    assert code == 2 and "holds a run: pass --resume" in err
    assert run("eval_ocr", *command(sets, tmp_path / "parts", **options), "--resume", "--workers", 1)[0] == 0
    assert seen[9:] == [3, 4, 5, 6]
    for variant in ("before", "after"):
        whole, parts = (load_file(tmp_path / n / variant / "ocr.safetensors") for n in ("whole", "parts"))
        assert all(torch.equal(value, parts[name]) for name, value in whole.items())
    assert result(tmp_path / "parts")["rows"] == result(tmp_path / "whole")["rows"]
    code, _, err = run("eval_ocr", *command(sets, tmp_path / "parts", **{**options, "lr": 1}), "--resume")
    assert code == 2 and "lr was" in err
    assert eval_ocr.MAY_CHANGE >= {"train", "test", "limit"}


def test_two_ranks_are_one_with_twice_the_batch(sets, tmp_path, run, run_ranks):
    codes, outs = run_ranks(2, "eval_ocr", *command(sets, tmp_path / "two", batch=4))
    assert codes == [0, 0], outs
    assert [out.count("all sets found") for out in outs] == [2, 0]  # printed once, with its two metrics
    assert run("eval_ocr", *command(sets, tmp_path / "one"))[0] == 0
    a, b = (load_file(tmp_path / n / "before" / "ocr.safetensors") for n in ("two", "one"))
    difference = math.sqrt(sum((a[n] - b[n]).square().sum() for n in b))
    # fp32 sums in another order, enlarged by Adam's tiny divisors
    assert difference < 1e-3 * math.sqrt(sum(v.square().sum() for v in b.values()))
    assert result(tmp_path / "two")["training_words"] == result(tmp_path / "one")["training_words"] == 48
    assert [line["image_id"] for line in read_words(tmp_path / "two")] == [
        line["image_id"] for line in read_words(tmp_path / "one")
    ]
    assert len(read_words(tmp_path / "two")) == 15


def test_a_cache_gives_the_same_and_M_sees_each_training_word_once(
    sets, tmp_path, run, run_ranks, monkeypatch
):
    seen, forward = [], vit.Backbone.forward

    def counted(self, images, valid=None):
        seen.append(len(images))
        return forward(self, images, valid)

    monkeypatch.setattr(vit.Backbone, "forward", counted)

    def pictures(name: str, folder: Path = sets, **options) -> int:
        seen.clear()
        options = {"iters": 20, "compare": tmp_path / "dW.st", **options}
        assert run("eval_ocr", *command(folder, tmp_path / name, **options))[0] == 0
        return sum(seen)

    def unlike(a: str, b: str, variant: str) -> float:
        """The difference of two runs' heads, in parts of their norm."""
        a, b = (load_file(tmp_path / n / variant / "ocr.safetensors") for n in (a, b))
        norms = [math.sqrt(sum(v.square().sum() for v in x)) for x in (b.values(), [a[n] - b[n] for n in b])]
        return norms[1] / norms[0]

    dW(tmp_path / "dW.st")
    kept = {"cache": tmp_path / "kept"}
    assert pictures("each") == 2 * (20 * 8 + 15)
    assert pictures("once", **kept) == 2 * (64 + 15)
    assert pictures("again", **kept) == 2 * 15
    assert run_ranks(2, "eval_ocr", *command(sets, tmp_path / "ranks", batch=4, iters=20, **kept))[0] == [
        0,
        0,
    ]
    for variant in ("before", "after"):
        # Batches of other words: fp32 sums in another order, enlarged by Adam's tiny divisors
        assert unlike("once", "each", variant) < 1e-3
        assert unlike("again", "once", variant) == 0
    assert unlike("ranks", "once", "before") < 1e-3
    (tmp_path / "other" / "test").mkdir(parents=True)
    write_lmdb(tmp_path / "other" / "MJ", some_words(40, 1), image_000000003=drawn("zzz"))
    write_lmdb(tmp_path / "other" / "ST", some_words(24, 2))
    write_lmdb(tmp_path / "other" / "test" / "mine", some_words(5, 4))
    assert pictures("other", tmp_path / "other", **kept) == 2 * (64 + 5)  # the same labels, another picture


def test_limit_is_partial(sets, tmp_path, run):
    assert run("eval_ocr", *command(sets, tmp_path, limit=2, iters=1))[0] == 0
    found = result(tmp_path)
    assert found["partial"] and {r["n"] for r in found["rows"] if r["set"] in ("SVT", "mine")} == {2}
    assert np.isclose(sum(r["n"] for r in found["rows"] if r["set"] == "all sets found"), 8)


def test_bad_options_and_data_are_one_line(sets, tmp_path, run):
    good = command(sets, tmp_path / "new")
    write_lmdb(tmp_path / "cut" / "set", ["one", "two"], image_000000002=None)
    for options, says in (
        ([*good, "--iters", 0], "--iters must be at least 1"),
        ([*good, "--lr", "inf"], "--lr must be positive"),
        ([*good, "--width", 12], "--width must be a multiple of 8"),
        ([*good, "--cache", tmp_path, "--skip-bad-images"], "it cannot go with --skip-bad-images"),
        ([*good, "--size", 50], "multiples of the patch, 14"),
        ([*good, "--size", 56], "17 tokens are too few"),
        ([*good, "--size", 1, 2, 3], "--size takes a side, or height and width"),
        ([*MINI, "--test", sets / "test"], "give --train DIR"),
        ([*good, "--train", tmp_path / "absent"], "absent: no data.mdb"),
        ([*good, "--test", tmp_path / "absent"], "absent: no data.mdb"),
        ([*good, "--test", tmp_path / "cut"], "no image-000000002 of 2 words"),
        ([*good, "--train", tmp_path / "cut", "--out", tmp_path / "other"], "or use --skip-bad-images"),
        (
            [*good, "--train", tmp_path / "cut", "--out", tmp_path / "kept", "--cache", tmp_path / "kept"],
            "no image-000000002 of 2 words",
        ),
    ):
        code, _, err = run("eval_ocr", *options)
        assert code == 2 and says in err and "Traceback" not in err, (options, err)
    assert not (tmp_path / "new" / "result.json").exists()
