"""eval_heads.py: published figures, truth against itself, ranks, and the script as a user runs it."""

import json
import os
import shutil
import signal
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import backbone as vit
import eval_heads
import lora
import tasks
from data import persons, stream, validation
from data.captions import Captions
from data.segmentation import Segmentation, read_segments
from scores import captions

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
needs_shared = pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/data, which is not here")
MINI = ("--model", "eva_mini", "--weights", "random", "--workers", 0, "--image-scale", 0.2)


def read(*parts: str):
    return json.loads((SHARED / Path(*parts)).read_text())


# --- average precision


def truth(task: str, folder: Path, split: str = "val2017", categories=None) -> tuple:
    """A scorer for a task and the answers that a perfect head would give."""
    items = persons.PersonBoxes(folder, split) if task == "pose" else validation.Images(folder, task, split)
    return items, eval_heads.scorer_of(task)(items, Namespace(out=".", seed=0))


def scored(scorer, kept: list) -> tuple:
    """Predictions in COCO's format, their scores, what each image contributes."""
    predictions = scorer.predictions(kept)
    return predictions, *scorer.score(predictions, kept)


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_truth_against_itself_scores_100(real_coco, task):
    items, scorer = truth(task, real_coco)
    outlines, kept = Segmentation(real_coco, "val2017"), []
    data = outlines.data
    for row, image_id in enumerate(data.ids):
        mine = slice(data.first[row], data.first[row + 1])
        labels = torch.from_numpy(data.labels[mine])
        answer = {"image_id": int(image_id), "labels": labels, "scores": torch.ones(len(labels))}
        if task == "detection":
            answer["boxes_xyxy"] = torch.from_numpy(data.boxes_xyxy[mine])
        else:
            masks = [torch.from_numpy(m).bool() for m in outlines.masks(row)]
            answer["masks"] = torch.stack(masks) if masks else torch.zeros(0, 4, 4, dtype=torch.bool)
        kept.append(scorer.keep(answer, "before"))
    results, scores, _ = scored(scorer, kept)
    name = "box" if task == "detection" else "mask"
    assert scores[f"{name} AP"] == pytest.approx(100, abs=1e-9) and len(results) == len(data.labels)
    json.dumps(results)
    worse = [r for r in results if r["image_id"] != results[0]["image_id"]]
    assert scorer.score(worse)[0][f"{name} AP"] < 99.9


def test_nothing_found_scores_0(scenes):
    items, scorer = truth("detection", scenes)
    results, scores, _ = scored(scorer, [[] for _ in items.image_ids])
    assert results == [] and scores["box AP"] == 0 and {v for v in scores.values() if v is not None} == {0}


# --- panoptic


def test_panoptic_truth_against_itself_scores_100(real_coco, tmp_path):
    items, scorer = truth("panoptic", real_coco)
    scorer.out, kept = tmp_path, {}
    for variant in ("before", "after"):
        kept[variant] = []
        for image_id in items.image_ids:
            known = scorer.truth[image_id]
            ids = read_segments(scorer.pngs / known["file_name"])
            infos = [
                {k: s[k] for k in ("id", "category_id")} for s in known["segments_info"] if not s["iscrowd"]
            ]
            infos = infos[variant == "before" :]  # one segment less before
            ids = np.where(np.isin(ids, [s["id"] for s in infos]), ids, 0)
            answer = {"image_id": image_id, "segments": torch.from_numpy(ids), "segments_info": infos}
            kept[variant].append(scorer.keep(answer, variant))
    predictions, scores, after = scored(scorer, kept["after"])
    assert set(scores.values()) == {100.0} and len(scores) == 9
    written = predictions["annotations"][0]
    assert (tmp_path / "predictions_after" / written["file_name"]).is_file() and json.dumps(predictions)
    _, worse, before = scored(scorer, kept["before"])
    again, counts = scorer.score(predictions, folder=tmp_path / "predictions_after")
    assert again == scores and np.array_equal(counts, after)  # from the files alone
    low, high = scorer.intervals(before, after)["PQ"]
    assert worse["PQ"] < 100 and 0 < low <= 100 - worse["PQ"] + 1e-9 and low < high
    assert scorer.intervals(after, after)["PQ"] == (0, 0)


def test_the_panoptic_interval_is_paired():
    """However unlike the images are: none of that is in the difference of a run from itself."""
    scorer = eval_heads.PanopticQuality.__new__(eval_heads.PanopticQuality)
    scorer.categories, scorer.seed = [{"id": 1, "name": "sky", "isthing": False}], 0
    counts = np.array([[[0.9, 1, 0, 0]], [[0, 0, 5, 5]], [[0.6, 1, 3, 0]]])  # (n, C, 4)
    assert scorer.intervals(counts, counts)["PQ"] == (0, 0)
    assert scorer.intervals(counts, counts * 0 + counts[0])["PQ"][0] >= 0


def test_a_broken_panoptic_answer_is_named(real_coco, tmp_path):
    items, scorer = truth("panoptic", real_coco)
    answer = {
        "image_id": items.image_ids[0],
        "segments": torch.ones(4, 4, dtype=torch.int32),
        "segments_info": [],
    }
    with pytest.raises(ValueError, match=r"\.png: prediction of"):
        scorer.keep(answer, "before")


# --- captions


def test_captions_are_scored_by_image(scenes, monkeypatch):
    """Made-up answers in the captioner's form; the paired interval is that of the per-image CIDEr."""
    monkeypatch.setattr(captions, "has_java", lambda: False)
    items, scorer = truth("captioning", scenes)
    assert sorted(map(len, scorer.references.values())) == [5, 5, 5, 5] and items.categories == []
    kept = {
        variant: [
            scorer.keep({"image_id": i, "caption": scorer.references[i][k % 5], "tokens": [1]}, variant)
            for k, i in enumerate(items.image_ids, start)
        ]
        for variant, start in (("before", 0), ("after", 1))
    }
    kept["before"][0]["caption"] = "nothing of the kind"
    of_variants = {variant: scored(scorer, answers) for variant, answers in kept.items()}
    before, after = (scores["cider_simple_tok"] for _, scores, _ in of_variants.values())
    low, high = scorer.intervals(of_variants["before"][2], of_variants["after"][2])["cider_simple_tok"]
    assert before < after and low <= after - before <= high
    assert of_variants["after"][0][0].keys() == {"image_id", "caption"}


# --- items


def test_evaluation_sizes_are_the_releases(real_coco):
    """Detection: long side 672; segmentation: fitted into 73 patches; captioning: 18 patches, squashed."""
    image = torch.zeros(3, 480, 640, dtype=torch.uint8)
    for task, size in (("detection", (504, 672)), ("segmentation", (766, 1022)), ("captioning", (252, 252))):
        resized, target = validation.prepare(image, task, patch=14)
        assert tuple(resized.shape[1:]) == target["size"] == size and target["orig_size"] == (480, 640)
    items = validation.Images(real_coco, "panoptic", "val2017", scale=0.5)
    assert len(items) == 2 and items.categories[0] == {"id": 1, "name": "person", "isthing": True}
    items = validation.Images(real_coco, "detection", "val2017", limit=3)
    assert [items[i][1]["image_id"] for i in range(3)] == items.image_ids == sorted(items.image_ids)


def test_images_without_annotations_count_where_finding_nothing_is_right(scenes, tmp_path):
    shutil.copytree(scenes, tmp_path / "coco")
    for kind in ("instances", "captions"):
        path = tmp_path / "coco" / "annotations" / f"{kind}_val2017.json"
        content = json.loads(path.read_text())
        content["annotations"] = [a for a in content["annotations"] if a["image_id"] != 3]
        path.write_text(json.dumps(content))
    for task, ids in (("detection", [1, 2, 3, 4]), ("segmentation", [1, 2, 3, 4]), ("captioning", [1, 2, 4])):
        items = validation.Images(tmp_path / "coco", task, "val2017")
        assert items.image_ids == ids and f"{4 - len(ids)} without annotation left out" in items.notes[0]


@pytest.mark.parametrize(
    "task, size", [("detection", (252, 336)), ("segmentation", (378, 504)), ("captioning", (126, 126))]
)
def test_scale_is_of_every_size(task, size):
    """Half of them: long sides 672 / 2; 1022 / 2 in whole patches, 36; 18 / 2 patches."""
    resized, target = validation.prepare(torch.zeros(3, 480, 640, dtype=torch.uint8), task, 14, scale=0.5)
    assert tuple(resized.shape[1:]) == target["size"] == size


# --- the script


@pytest.fixture(scope="module")
def made(scenes, tmp_path_factory) -> Path:
    """A random head for each task of the made-up world, and a dW that changes much."""
    out = tmp_path_factory.mktemp("made")
    torch.manual_seed(0)
    for task in ("detection", "segmentation", "panoptic", "pose"):
        args = Namespace(coco=scenes, split="val2017", image_scale=0.2, size=None, limit=None, persons=None)
        head = tasks.find(task).Head(192, validation.open_items(task, args).categories)
        for p in head.parameters():
            nn.init.normal_(p, std=0.08) if p.dim() > 1 else None  # else all queries answer alike
        tasks.save_head(head, out / f"{task}.safetensors", task, backbone="eva_mini", no_cls=False)
    backbone = vit.load("eva_mini", "random")
    lora.attach(backbone.vit, 4)
    for p in lora.parameters(backbone.vit).values():
        nn.init.normal_(p)
    lora.save(backbone.vit, out / "lora.safetensors", backbone="eva_mini")
    return out


def options(task, scenes, made, out, *more) -> list:
    return ["--task", task, *MINI, "--coco", scenes, "--head", made, "--out", out, *more]


@pytest.mark.parametrize("task", ["detection", "segmentation"])
def test_compare_is_both_runs_in_one(scenes, made, tmp_path, run, task):
    """And neither the batch nor the order of the variants changes what is found."""
    outs, limit = {name: tmp_path / name for name in ("none", "lora", "both")}, ("--limit", 3)
    assert run("eval_heads", *options(task, scenes, made, outs["none"], *limit, "--batch", 3))[0] == 0
    tuned = made / "lora.safetensors"
    assert run("eval_heads", *options(task, scenes, made, outs["lora"], *limit, "--lora", tuned))[0] == 0
    code, text, _ = run("eval_heads", *options(task, scenes, made, outs["both"], *limit, "--compare", tuned))
    assert code == 0 and "| set | metric | before | after |" in text and "AP by pycocotools" in text
    result = json.loads((outs["both"] / "result.json").read_text())
    assert result["partial"] and len(result["rows"]) == 12 and result["sha256"][str(tuned)]
    assert set(result["rows"][0]) == {"set", "metric", "before", "after", "difference", "low", "high", "n"}
    row = result["rows"][0]
    assert row["n"] == 3 and row["difference"] == row["after"] - row["before"] and row["low"] is None
    before, after = (
        json.loads((outs["both"] / f"predictions_{v}.json").read_text()) for v in ("before", "after")
    )
    assert after == json.loads((outs["lora"] / "predictions_after.json").read_text()) != before
    batched = json.loads((outs["none"] / "predictions_before.json").read_text())
    assert len(batched) == len(before) == 300
    if task == "detection":
        same = [a["category_id"] == b["category_id"] for a, b in zip(batched, before, strict=True)]
        assert np.mean(same) > 0.98  # a batch sums in another order, and some of the random scores are close
        for key in ("bbox", "score"):
            a, b = ([p[key] for p in found] for found in (batched, before))
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=0.02)


@pytest.mark.parametrize(
    "task, items", [("detection", 1), ("detection", 3), ("panoptic", 3), ("captioning", 3), ("pose", 3)]
)
def test_two_ranks_are_one_process_to_the_digit(
    scenes, made, captioner, tmp_path, run, run_ranks, task, items
):
    """With one item fewer, and one more, than ranks."""
    head, more = captioner if task == "captioning" else made, ("--limit", items)
    assert run("eval_heads", *options(task, scenes, head, tmp_path / "one", *more))[0] == 0
    codes, outs = run_ranks(2, "eval_heads", *options(task, scenes, head, tmp_path / "two", *more))
    assert codes == [0, 0], outs
    one, two = (json.loads((tmp_path / n / "result.json").read_text())["rows"] for n in ("one", "two"))
    assert one == two
    files = [(tmp_path / n / "predictions_before.json").read_bytes() for n in ("one", "two")]
    found = json.loads(files[0])
    assert files[0] == files[1]
    if task == "pose":
        assert found  # one of a random head's persons stands for all that look like it
    else:
        each = 100 if task == "detection" else 1
        assert len(found["annotations"] if task == "panoptic" else found) == each * items
    pngs = [sorted((tmp_path / n / "predictions_before").glob("*.png")) for n in ("one", "two")]
    assert [p.read_bytes() for p in pngs[0]] == [p.read_bytes() for p in pngs[1]]
    assert len(pngs[0]) == items * (task == "panoptic")


def test_what_cannot_be_is_one_line(scenes, real_coco, made, tmp_path, run):
    good = options("detection", scenes, made, tmp_path / "new")
    absent = tmp_path / "absent"
    for more, says in (
        (["--coco", absent], "annotations_trainval2017.zip"),
        (["--head", absent], "stage1_heads.py --task detection"),
        (["--head", made / "segmentation.safetensors"], "no detection head"),
        (["--head", ROOT / "README.md"], "not one of our head files"),
        (["--no-cls"], "trained with no_cls False, not True"),
        (["--persons", absent], "--persons is for --task pose"),
        (["--task", "pose", "--persons", absent], "no such file"),
        (["--image-scale", 0], "--image-scale must be in"),
        (["--lora", absent], "no LoRA file"),
        (["--batch", 0], "--batch must be at least 1"),
        (["--coco", real_coco], "knows 14 categories"),
    ):
        code, _, err = run("eval_heads", *good, *more)
        assert code == 2 and says in err and err.count("\n") == 1, (more, err)
        assert not (tmp_path / "new").exists()


@pytest.fixture(scope="module")
def captioner(scenes, made) -> Path:
    """A random captioner whose captions end, and differ from image to image."""
    torch.manual_seed(0)
    head = tasks.find("captioning").Head(192, Captions(scenes, "train2017", min_count=1).vocabulary)
    for name, p in head.named_parameters():
        p.data *= 1 if p.dim() < 2 else 8 if name.startswith(("fc", "embedding")) else 3
    head.fc.bias.data[-1] = 3
    tasks.save_head(head, made / "captioning.safetensors", "captioning", backbone="eva_mini", no_cls=False)
    return made / "captioning.safetensors"


def caption_rows(scenes, said: dict) -> list[list]:
    """[before, after] of each row that the captions {variant: COCO results} deserve, CIDEr first."""
    content = json.loads((scenes / "annotations" / "captions_val2017.json").read_text())
    references = {s["image_id"]: [] for s in next(iter(said.values()))}
    for a in content["annotations"]:
        if a["image_id"] in references:
            references[a["image_id"]].append(a["caption"])
    scores = []
    for variant in ("before", "after"):
        candidates = {s["image_id"]: s["caption"] for s in said.get(variant, ())}
        found = captions.caption_scores(references, candidates) if candidates else {}
        scores.append([100 * v for v in found.values() if isinstance(v, float)] or [None] * 2)
    return [pytest.approx(list(both), abs=1e-9) for both in zip(*scores, strict=True)]


@pytest.mark.skipif(not captions.has_java(), reason="needs Java")
def test_captions_are_scored_by_the_script(scenes, made, captioner, tmp_path, run):
    more = ("--limit", 2, "--lora", made / "lora.safetensors")
    code, text, err = run("eval_heads", *options("captioning", scenes, captioner, tmp_path, *more))
    assert code == 0 and "no Java" not in text, err
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    said = {"after": json.loads((tmp_path / "predictions_after.json").read_text())}
    assert [r["metric"] for r in rows] == ["CIDEr", "BLEU-4"] and len(said["after"]) == 2
    assert [[r["before"], r["after"]] for r in rows] == caption_rows(scenes, said)


def test_captions_before_and_after(scenes, made, captioner, tmp_path, run, monkeypatch):
    """They are those of the images on their own, after: through merged weights; the rows are their scores."""
    monkeypatch.setattr(captions, "has_java", lambda: False)
    tuned = made / "lora.safetensors"
    more = ("--batch", 3, "--compare", tuned)
    code, text, err = run("eval_heads", *options("captioning", scenes, captioner, tmp_path, *more))
    assert code == 0, err
    head, backbone, said = tasks.load_head(captioner, 192), vit.load("eva_mini", "random"), {}
    lora.load(backbone.vit, tuned)
    items = validation.Images(scenes, "captioning", "val2017", scale=0.2)
    items.patch = backbone.patch
    for variant, become in (("after", lora.merge), ("before", lora.unmerge)):
        become(backbone.vit)
        lora.switch(backbone.vit, on=False) if variant == "before" else None
        said[variant] = []
        for image, target in (items[i] for i in range(4)):
            images, valid, y = items.collate([(image, target)], backbone.patch, backbone.mean, backbone.std)
            with torch.no_grad():
                (answer,) = head.predict(backbone(images, valid), y)
            said[variant].append({"image_id": target["image_id"], "caption": answer["caption"]})
        assert json.loads((tmp_path / f"predictions_{variant}.json").read_text()) == said[variant]
    assert len({s["caption"] for s in said["after"]}) > 1 and said["before"] != said["after"]

    result = json.loads((tmp_path / "result.json").read_text())
    cider, bleu = rows = result["rows"]
    assert [r["metric"] for r in rows] == ["cider_simple_tok", "bleu4_simple_tok"] and "no Java" in text
    assert [[r["before"], r["after"]] for r in rows] == caption_rows(scenes, said)
    assert all(r["difference"] == r["after"] - r["before"] and r["n"] == 4 for r in rows)
    assert cider["difference"] and cider["low"] <= cider["difference"] <= cider["high"]
    assert bleu["low"] is None and "4 images are too few" in text and not result["partial"]


@pytest.mark.parametrize("task", ["detection", "segmentation", "pose", "panoptic", "captioning"])
def test_missing_and_unknown_predictions_are_named(real_coco, tmp_path, task):
    """An image with nothing found is no missing one, but in panoptic segmentation and captioning."""
    items, scorer = truth(task, real_coco)
    scorer.out, first = tmp_path, items.image_ids[0]
    answer = {"image_id": 12345678, "labels": torch.zeros(1).long(), "scores": torch.ones(1)}
    answer |= {"boxes_xyxy": torch.ones(1, 4), "masks": torch.ones(1, 4, 4).bool(), "caption": "a cat"}
    answer |= {"keypoints": torch.ones(17, 3), "score": 1.0, "area": 1.0, "segments_info": []}
    answer["segments"] = torch.zeros(4, 4, dtype=torch.int32)
    known = items.image_ids if task == "captioning" else ()
    with pytest.raises(ValueError, match="1 images are predicted for, but .*: 12345678"):
        scored(scorer, [scorer.keep({**answer, "image_id": i}, "before") for i in (*known, 12345678)])
    if task == "captioning":
        kept = [scorer.keep({**answer, "image_id": i}, "before") for i in items.image_ids[1:]]
    elif task == "panoptic":
        kept = [({"image_id": i}, np.zeros((len(scorer.categories), 4))) for i in items.image_ids[1:]]
    else:
        scores = scored(scorer, [])[1]
        assert {v for v in scores.values() if v is not None} == {0}
        return
    with pytest.raises(ValueError, match=f"1 images have no prediction: {first}"):
        scored(scorer, kept)


def test_images_are_normalized_as_told(scenes, made, tmp_path, run, monkeypatch):
    seen, collate = [], stream.collate
    spy = staticmethod(lambda s, patch, mean, std: seen.append((mean, std)) or collate(s, patch, mean, std))
    monkeypatch.setattr(validation.Images, "collate", spy)
    for more in ((), ("--imagenet-norm",)):
        assert run("eval_heads", *options("detection", scenes, made, tmp_path, "--limit", 1, *more))[0] == 0
    clip = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
    assert seen == [clip, ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))]


def test_ctrl_c_is_one_line_and_leaves_nothing(scenes, made, tmp_path, run, monkeypatch):
    def predict(self, f, y):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(tasks.find("detection").Head, "predict", predict)
    code, _, err = run("eval_heads", *options("detection", scenes, made, tmp_path / "out"))
    assert code == 130 and err.splitlines()[-1].startswith("eval_heads.py: interrupted")
    assert "Traceback" not in err and not (tmp_path / "out").exists()


def test_a_bad_image_is_named(scenes, made, tmp_path, run):
    shutil.copytree(scenes, tmp_path / "coco")
    picture = tmp_path / "coco" / "val2017" / f"{2:012d}.jpg"
    picture.write_bytes(picture.read_bytes()[:700])
    code, _, err = run("eval_heads", *options("detection", tmp_path / "coco", made, tmp_path / "out"))
    assert code == 2 and "000000000002.jpg cannot be decoded" in err.splitlines()[-1]


@pytest.mark.parametrize("task", ["detection", "panoptic", "pose"])
def test_a_failed_scoring_loses_nothing_and_can_be_repeated(scenes, made, tmp_path, run, task, monkeypatch):
    """Predictions are written before they are scored; --results scores them, with the same result."""
    command = options(task, scenes, made, tmp_path / "out", "--compare", made / "lora.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(eval_heads, "report", lambda *_: (_ for _ in ()).throw(MemoryError("scoring")))
        with pytest.raises(MemoryError):
            run("eval_heads", *command)
    names = [tmp_path / "out" / f"predictions_{variant}.json" for variant in ("before", "after")]
    assert all(name.is_file() for name in names) and not (tmp_path / "out" / "result.json").exists()
    again = ["--task", task, "--coco", scenes, "--out", tmp_path / "again", "--results", *names]
    assert run("eval_heads", *again)[0] == 0
    assert run("eval_heads", *command)[0] == 0
    rows = [json.loads((tmp_path / out / "result.json").read_text())["rows"] for out in ("again", "out")]
    assert rows[0] == rows[1] and rows[0][0]["before"] is not None
    for more, said in ((["--head", made], "--head has no effect"), (["--limit", 2], "--limit has no effect")):
        code, _, err = run("eval_heads", *again, *more)
        assert code == 2 and said in err
