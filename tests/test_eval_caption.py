"""Captions of NoCaps and COCO, end to end on a tiny BLIP-2; scores/captions.py has tests of its own."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import eval_caption
from scores import captions as caption_scores
from tests import tiny_blip2
from tests.conftest import SHARED
from tests.test_blip2 import lora_file

WORDS = "a red star near two people riding yellow bikes on the street with dogs and wood".split()


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return tiny_blip2.write(tmp_path_factory.mktemp("blip2"), "opt")


def write_nocaps(folder: Path, each: int = 2) -> dict:
    """`each` noise images of each domain with three captions."""
    rng = np.random.default_rng(0)
    content = {"images": [], "annotations": []}
    folder.mkdir(exist_ok=True)
    for i in range(3 * each):
        name = f"{i:016x}.jpg"
        Image.fromarray(rng.integers(0, 256, (50, 70, 3), dtype=np.uint8)).save(folder / name)
        image = {"id": i, "file_name": name, "domain": eval_caption.DOMAINS[i % 3]}
        content["images"].append(image)
        for _ in range(3):
            caption = " ".join(rng.choice(WORDS, 8))
            content["annotations"].append(
                {"image_id": i, "caption": caption, "id": len(content["annotations"])}
            )
    (folder / "nocaps.json").write_text(json.dumps(content))
    return content


@pytest.fixture
def no_java(monkeypatch):
    """Another tokenizer, which takes no seconds to start."""
    monkeypatch.setattr(caption_scores, "has_java", lambda: False)


def test_scores_are_the_published_ones(tmp_path, run):
    """CLIPScore's example (PTB tokens): CIDEr 0.5637 with the good captions, 0.2790 with the bad."""
    folder = SHARED / "caption_eval"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/caption_eval, which is not here")
    references = json.loads((folder / "clipscore_example/refs.json").read_text())
    ids = {name: i for i, name in enumerate(references)}
    captions = [{"image_id": ids[name], "caption": c} for name, cs in references.items() for c in cs]
    images = [{"id": i, "file_name": name} for name, i in ids.items()]
    (tmp_path / "refs.json").write_text(json.dumps({"images": images, "annotations": captions}))
    for kind in ("bad", "good"):
        given = json.loads((folder / f"clipscore_example/{kind}_captions.json").read_text())
        rows = [{"image_id": ids[name], "caption": caption} for name, caption in given.items()]
        (tmp_path / f"{kind}.json").write_text(json.dumps(rows))
    files = [tmp_path / "bad.json", tmp_path / "good.json"]
    options = ["--captions", tmp_path / "refs.json", "--results", *files, "--out", tmp_path / "out"]
    code, out, err = run("eval_caption", *options)
    assert code == 0, err
    rows = {row["metric"]: row for row in json.loads((tmp_path / "out/result.json").read_text())["rows"]}
    expected = json.loads((folder / "expected.json").read_text())
    for variant, kind in (("before", "bad"), ("after", "good")):
        known = expected[f"clipscore_example/{kind}_captions.json"]
        assert rows["cider"][variant] == pytest.approx(100 * known["CIDEr"], abs=0.005)
        assert rows["bleu4"][variant] == pytest.approx(100 * known["Bleu_4"], abs=0.005)


def test_domains_have_document_frequencies_of_their_own(tmp_path, run, no_java):
    content = write_nocaps(tmp_path)
    given = {i["id"]: " ".join(np.random.default_rng(i["id"]).choice(WORDS, 6)) for i in content["images"]}
    for name, captions in (("before", given), ("after", {i: c + " a star" for i, c in given.items()})):
        rows = [{"image_id": i, "caption": c} for i, c in captions.items()]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    files = [tmp_path / "before.json", tmp_path / "after.json"]
    options = ["--captions", tmp_path / "nocaps.json", "--results", *files, "--out", tmp_path / "out"]
    code, out, err = run("eval_caption", *options)
    assert code == 0, err
    rows = json.loads((tmp_path / "out/result.json").read_text())["rows"]
    cider = {row["set"]: row for row in rows if row["metric"].startswith("cider")}
    assert list(cider) == [f"NoCaps {d}" for d in (*eval_caption.DOMAINS, "overall")]
    references = {i["id"]: [] for i in content["images"]}
    for a in content["annotations"]:
        references[a["image_id"]].append(a["caption"])
    whole = caption_scores.caption_scores(references, given)
    near = {i: references[i] for i in (1, 4)}
    part = caption_scores.caption_scores(near, {i: given[i] for i in near})
    metric = next(k for k in part if k.startswith("cider"))
    assert cider["NoCaps near-domain"]["before"] == pytest.approx(100 * part[metric])
    assert cider["NoCaps overall"]["before"] == pytest.approx(100 * whole[metric])
    of_whole = 100 * np.mean([whole["per_image"][i] for i in near])
    assert abs(cider["NoCaps near-domain"]["before"] - of_whole) > 0.1  # not the same number
    row = cider["NoCaps overall"]
    assert row["low"] <= row["difference"] <= row["high"] and row["n"] == 6
    bleu = next(row for row in rows if row["metric"].startswith("bleu") and "overall" in row["set"])
    assert bleu["difference"] is not None and bleu["low"] is None  # of the corpus: no interval
    assert "too few for CIDEr" in out


def test_before_and_after_end_to_end_and_resumed(tmp_path, run, blip, no_java):
    content = write_nocaps(tmp_path)
    file = lora_file(tmp_path / "lora.safetensors", tiny_blip2.BLOCKS)
    common = ["--blip2", blip, "--images", tmp_path, "--captions", tmp_path / "nocaps.json", "--workers", "0"]
    common += ["--compare", file, "--batch", "2"]
    code, out, err = run("eval_caption", *common, "--out", tmp_path / "out")
    assert code == 0, err
    before, after = (
        json.loads((tmp_path / f"out/results_{v}.json").read_text()) for v in ("before", "after")
    )
    assert [row["image_id"] for row in before] == [image["id"] for image in content["images"]]
    assert before != after and set(before[0]) == {"image_id", "caption"}
    result = json.loads((tmp_path / "out/result.json").read_text())
    wanted = {"num_beams": 5, "max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 1.0}
    assert wanted.items() <= result["protocol"]["generation"].items() and not result["partial"]

    path = tmp_path / "out/answers_0.jsonl"
    whole = path.read_text().splitlines(keepends=True)
    path.write_text("".join(whole[:4]))  # the settings, one batch and half of the next
    code, out, err = run("eval_caption", *common, "--out", tmp_path / "out", "--resume")
    assert code == 0, err
    assert json.loads((tmp_path / "out/result.json").read_text())["rows"] == result["rows"]
    assert json.loads((tmp_path / "out/results_after.json").read_text()) == after
    assert path.read_text().count('"item"') == 3 + 4  # the half batch again, whole, and the last


def test_formats(tmp_path):
    content = write_nocaps(tmp_path)
    E, _ = eval_caption.read(tmp_path / "nocaps.json")
    assert [item.domain for item in E[:3]] == list(eval_caption.DOMAINS)
    assert E[1].references == [a["caption"] for a in content["annotations"] if a["image_id"] == 1]
    mini = SHARED / "retrieval/dataset_coco_mini.json"
    if not mini.is_file():
        pytest.skip("needs ../shared/data/retrieval, which is not here")
    E, _ = eval_caption.read(mini)
    assert len(E) == 50 and all(len(item.references) == 5 for item in E)
    assert all((SHARED / "coco" / item.image).is_file() for item in E)


def test_bad_files_are_refused(tmp_path, run):
    content = write_nocaps(tmp_path)

    def told(captions=content, results=()) -> str:
        (tmp_path / "nocaps.json").write_text(json.dumps(captions))
        (tmp_path / "r.json").write_text(json.dumps(results))
        files = ["--captions", tmp_path / "nocaps.json", "--results", tmp_path / "r.json"]
        code, _, err = run("eval_caption", *files, "--out", tmp_path / "out")
        assert code == 2 and err.count("\n") == 1, err
        return err

    bare = {**content, "annotations": content["annotations"][3:]}
    assert "1 of 6 images have no caption, the first is 0" in told(bare)
    assert "id 0 is there before, at images[0] of 7" in told(
        {**content, "images": content["images"] + content["images"][:1]}
    )
    stray = {"image_id": 99, "caption": "a"}
    assert "annotations[0] of 1 (image_id 99): unknown image id 99" in told(
        {**content, "annotations": [stray]}
    )
    odd = {**content, "images": [{**image, "domain": "far"} for image in content["images"]]}
    assert "domain must be one of" in told(odd)
    some = [{"image_id": i, "caption": "a star"} for i in range(5)]
    assert "1 images have no prediction: 5" in told(results=some)
    assert "image_id 0 is there before" in told(results=some + some[:1])
    assert "no list called results" in told(results={"a": 1})
    extra = [{"image_id": i, "caption": "a star"} for i in range(7)]
    assert "not in the annotations" in told(results=extra)
