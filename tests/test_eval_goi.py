"""Table 4: the probe against torch's own, the cache of features, and the script as users run it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from test_eval_ocr import MINI, dW
from test_goi import record, write
from torch import nn

import backbone as vit
import eval_goi
import feature_cache
import lora

COLOURS = {"circle": (220, 30, 30), "star": (30, 200, 30), "cross": (30, 30, 220), "square": (230, 230, 40)}


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory) -> Path:
    """A world where the class is the colour of the picture, so that any features tell it."""
    folder, rng = tmp_path_factory.mktemp("goi"), np.random.default_rng(0)
    for name, count in (("train", 40), ("val", 13)):
        lines = []
        for i in range(count):
            shape = list(COLOURS)[i % 4]
            colour = tuple(
                int(c) for c in np.clip(np.array(COLOURS[shape]) + rng.integers(-25, 25, 3), 0, 255)
            )
            lines.append(record(shape, tuple(colour), options=tuple(COLOURS)))
        write(folder / f"{name}.jsonl", lines)
    return folder


def command(jsonl: Path, out: Path, *more) -> list:
    data = ["--train", jsonl / "train.jsonl", "--val", jsonl / "val.jsonl"]
    return [*MINI, "--size", 28, *data, "--out", out, *more]


def result(out: Path) -> dict:
    return json.loads((out / "result.json").read_text())


def test_fit_side_by_side_is_each_on_its_own():
    """Against torch's AdamW on one linear layer, batch by batch."""
    torch.manual_seed(0)
    f, labels = torch.randn(300, 6) * torch.arange(1, 7) + 3, torch.randint(5, (300,))
    fitted = eval_goi.fit(f, labels, 5, [1e-3, 1e-2], epochs=3, seed=7)
    x = (f - f.mean(0)) / f.std(0)
    for lr, probe in zip([1e-3, 1e-2], fitted, strict=True):
        layer = nn.Linear(6, 5)
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
        optimizer, rng = (
            torch.optim.AdamW(layer.parameters(), lr, weight_decay=1e-4),
            np.random.default_rng(7),
        )
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        for _ in range(3):
            order = rng.permutation(300)
            for rows in (order[:256], order[256:]):
                optimizer.zero_grad()
                nn.functional.cross_entropy(layer(x[rows]), labels[rows]).backward()
                optimizer.step()
                scheduler.step()
        assert torch.allclose(probe.linear.weight, layer.weight, atol=1e-6)
        assert torch.allclose(probe(f), layer(x), atol=1e-5)


def test_probe_takes_the_rate_that_is_best_on_the_held_out_part(monkeypatch):
    torch.manual_seed(0)
    f = torch.randn(200, 4)
    labels = (f[:, 0] > 0).long().numpy()
    calls, fit = [], eval_goi.fit

    def spied(f, labels, classes, lrs, *rest):
        calls.append((len(f), list(lrs)))
        return fit(f, labels, classes, lrs, *rest)

    monkeypatch.setattr(eval_goi, "fit", spied)
    monkeypatch.setattr(eval_goi, "LRS", [1e-9, 1e-2])  # the first learns nothing to speak of
    args = type("Args", (), dict(seed=0, epochs=5))
    labels = 1 - labels  # argmax of untrained zeros is class 0
    labels[:120] = 1
    _, lr = eval_goi.probe(f.numpy() * 1.0, labels, 2, args, torch.device("cpu"))
    assert calls[0] == (180, [1e-9, 1e-2]) and calls[1] == (200, [lr])
    assert lr == 1e-2


def test_a_rate_is_best_by_its_loss_not_by_how_many_are_right(monkeypatch):
    """One hardly right on all, loss log(1 + e^-0.1); the other sure of three in four, hardly wrong on one."""
    f = np.arange(200, dtype=np.float32)[:, None]

    def hardly(f):
        return torch.cat([torch.full_like(f, 0.1), torch.zeros_like(f)], 1)

    def sure(f):
        return torch.cat([torch.where(f % 4 == 0, -0.01, 10.0), torch.zeros_like(f)], 1)

    answers = {1e-3: hardly, 1e-2: sure}
    monkeypatch.setattr(eval_goi, "LRS", list(answers))
    monkeypatch.setattr(eval_goi, "fit", lambda f, labels, classes, lrs, *rest: [answers[lr] for lr in lrs])
    args = type("Args", (), dict(seed=0, epochs=1))
    T_o, lr = eval_goi.probe(f, np.zeros(200, np.int64), 2, args, torch.device("cpu"))
    assert T_o is sure and lr == 1e-2


def test_ranked_classes_by_hand():
    probe = eval_goi.Probe(torch.zeros(7), torch.ones(7), 7)
    with torch.no_grad():
        probe.linear.weight.copy_(torch.diag(torch.arange(7.0)))
    f = np.ones((1, 7), np.float32)
    assert eval_goi.rank_classes(probe, f, "cpu").tolist() == [[6, 5, 4, 3, 2]]
    two = eval_goi.Probe(torch.zeros(7), torch.ones(7), 2)
    assert eval_goi.rank_classes(two, f, "cpu").shape == (1, 2)


def test_the_script_reads_the_class_and_the_cache_gives_the_same(jsonl, tmp_path, run, monkeypatch):
    code, out, err = run("eval_goi", *command(jsonl, tmp_path))
    assert code == 0, err
    first = result(tmp_path)
    top1, top5 = first["rows"]
    assert top1["before"] > 80 and top5["before"] == 100 and top1["n"] == 13 and top1["after"] is None
    assert first["classes"] == sorted(COLOURS) and "classes: 4 named by the data" in out
    assert "| eva_mini | 2.8M | 0 |" in out
    objects = [json.loads(line) for line in (tmp_path / "objects.jsonl").read_text().splitlines()]
    right = sum(o["before"][0] == o["label"] for o in objects)
    assert 100 * right / 13 == pytest.approx(top1["before"]) and objects[4]["line"] == 5
    files = sorted((tmp_path / "features").glob("*.npy"))
    assert len(files) == 2 and np.load(files[0]).dtype == np.float32

    def never(*args):
        raise AssertionError("features were computed again")

    with monkeypatch.context() as patch:
        patch.setattr(vit.Backbone, "forward", never)
        assert run("eval_goi", *command(jsonl, tmp_path))[0] == 0
    again = result(tmp_path)
    assert again["rows"] == first["rows"]
    fresh = tmp_path / "fresh"
    assert run("eval_goi", *command(jsonl, fresh))[0] == 0
    assert result(fresh)["rows"] == first["rows"]
    for file in files:
        assert np.array_equal(np.load(file), np.load(fresh / "features" / file.name))


def test_a_stale_or_broken_cache_is_never_used(jsonl, tmp_path, run, monkeypatch):
    """Counting the pictures that M sees: all 53 again whenever anything they depend on is another."""
    seen, forward = [], vit.Backbone.forward

    def counted(self, images, valid=None):
        seen.append(len(images))
        return forward(self, images, valid)

    monkeypatch.setattr(vit.Backbone, "forward", counted)

    def pictures(*more, code=0, folder=jsonl) -> int:
        seen.clear()
        assert run("eval_goi", *command(folder, tmp_path / "out", *more))[0] == code
        return sum(seen)

    one, two = dW(tmp_path / "one.st"), tmp_path / "two.st"
    backbone = vit.load("eva_mini", "random")
    lora.load(backbone.vit, one)
    with torch.no_grad():
        next(iter(lora.parameters(backbone.vit).values()))[0, 0] += 1e-3
    lora.save(backbone.vit, two, backbone="eva_mini")
    assert pictures() == 53 and pictures() == 0
    assert pictures("--seed", 1) == 53  # other random weights
    assert pictures("--lora", one) == 53 and pictures("--lora", one) == 0
    assert pictures("--lora", two) == 53  # one number of one matrix is another
    assert pictures("--compare", one) == 0  # both halves are there
    for layer in lora.layers(backbone.vit).values():
        layer.alpha *= 2
    lora.save(backbone.vit, two, backbone="eva_mini")
    assert pictures("--lora", two) == 53  # the same numbers at another scale
    assert pictures("--size", 42) == 53 and pictures("--imagenet-norm") == 53
    assert pictures("--backbone-dtype", "bf16") == 53
    assert pictures("--limit", 10) == 20
    changed = tmp_path / "changed"
    changed.mkdir()
    for name in ("train", "val"):
        lines = (jsonl / f"{name}.jsonl").read_text().splitlines()
        write(
            changed / f"{name}.jsonl", lines if name == "train" else [*lines[:-1], record("star", (1, 2, 3))]
        )
    assert pictures(folder=changed) == 13  # val alone
    assert pictures() == 0
    for file in (tmp_path / "out" / "features").glob("*.npy"):
        file.write_bytes(file.read_bytes()[:-100])  # as a full disk leaves it
    assert pictures() == 53

    def interrupted(self, images, valid=None):
        if len(seen) == 1:
            raise KeyboardInterrupt
        return counted(self, images, valid)

    monkeypatch.setattr(vit.Backbone, "forward", interrupted)
    assert pictures("--seed", 2, "--batch", 8, code=130) == 8
    monkeypatch.setattr(vit.Backbone, "forward", counted)
    assert pictures("--seed", 2, "--batch", 8) == 53


def test_a_zero_dW_changes_exactly_nothing(jsonl, tmp_path, run):
    code, out, err = run("eval_goi", *command(jsonl, tmp_path, "--compare", dW(tmp_path / "z.st", zero=True)))
    assert code == 0, err
    for row in result(tmp_path)["rows"]:
        assert row["difference"] == row["low"] == row["high"] == 0 and row["p"] == 1
    assert "| eva_mini ViSFT | 2.8M | 5000 |" in out
    files = list((tmp_path / "features").glob("*.npy"))
    assert len(files) == 4 and len({file.read_bytes() for file in files}) == 2
    assert run("eval_goi", *command(jsonl, tmp_path / "b", "--compare", dW(tmp_path / "d.st")))[0] == 0
    files = list((tmp_path / "b" / "features").glob("*.npy"))
    assert len({file.read_bytes() for file in files}) == 4


def test_two_ranks_write_one_cache(jsonl, tmp_path, run, run_ranks):
    codes, outs = run_ranks(2, "eval_goi", *command(jsonl, tmp_path / "two", "--batch", 5))
    assert codes == [0, 0], outs
    assert [out.count("Top-1 Acc") for out in outs] == [1, 0]
    assert run("eval_goi", *command(jsonl, tmp_path / "one"))[0] == 0
    for file in (tmp_path / "one" / "features").glob("*.npy"):
        other = np.load(tmp_path / "two" / "features" / file.name)
        assert np.allclose(np.load(file), other, atol=1e-5)  # another batch size, another order of sums
    assert [r["n"] for r in result(tmp_path / "two")["rows"]] == [13, 13]
    assert not list((tmp_path / "two" / "features").glob("*.tmp"))


def test_coco_built_records_run_end_to_end(real_coco, tmp_path, run):
    code, out, err = run("eval_goi", *MINI, "--size", 56, "--coco", real_coco, "--out", tmp_path)
    assert code == 0, err
    found = result(tmp_path)
    assert "not M3IT" in found["data"] and "not M3IT: 49 boxes" in out and "classes: COCO's 80" in out
    assert (
        found["rows"][0]["n"] == 48 and 0 <= found["rows"][0]["before"] <= found["rows"][1]["before"] <= 100
    )


def test_bad_options_and_data_are_one_line(jsonl, tmp_path, run):
    good = command(jsonl, tmp_path / "new")
    broken = write(tmp_path / "broken.jsonl", [record("star"), "{"])
    for options, says in (
        ([*good, "--epochs", 0], "--epochs and --size must be at least 1"),
        ([*good, "--size", 30], "--size a multiple of 14"),
        ([*good, "--no-cls"], "the probe reads [CLS]"),
        ([*good, "--coco", tmp_path], "or --coco DIR"),
        ([*MINI, "--train", jsonl / "train.jsonl"], "give --train JSONL and --val JSONL"),
        ([*good, "--val", tmp_path / "absent"], "no such file"),
        ([*good, "--val", broken, "--strict"], "1 not JSON (line 2)"),
        ([*MINI, "--coco", tmp_path, "--out", tmp_path / "new"], "annotations_trainval2017.zip"),
        ([*good, "--limit", 1], "too few to train on"),
    ):
        code, _, err = run("eval_goi", *options)
        assert code == 2 and says in err and err.count("\n") == 1, (options, err)
    assert not (tmp_path / "new").exists()


def test_only_a_cache_of_the_shape_and_the_type_is_complete(tmp_path):
    for name, array, good in (
        ("whole", np.zeros((3, 4), np.float32), True),
        ("short", np.zeros((2, 4), np.float32), False),
        ("double", np.zeros((3, 4)), False),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        assert feature_cache.complete(tmp_path / f"{name}.npy", (3, 4)) == good
    assert not feature_cache.complete(tmp_path / "absent.npy", (3, 4))
