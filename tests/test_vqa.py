"""VQA: official files, rules on real and hand-worked cases, eval_vqa.py end to end on a tiny BLIP-2."""

import argparse
import json
import os
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from answers import Answers, add_generation_options, generation_settings
from data import vqa
from tests import tiny_blip2
from tests.conftest import SHARED
from tests.test_blip2 import lora_file

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def by_construction() -> Path:
    folder = SHARED / "vqa/accuracy_by_construction"
    if not folder.is_dir():
        pytest.skip("needs ../shared/data/vqa, which is not here")
    return folder


@pytest.fixture(scope="module")
def blip(tmp_path_factory) -> Path:
    return tiny_blip2.write(tmp_path_factory.mktemp("blip2"), "opt")


def write_set(folder: Path, images: int = 5, each: int = 3) -> list[str]:
    """Noise images with `each` questions per image, in an order that is not the images'; options for them."""
    rng, questions, annotations = np.random.default_rng(0), [], []
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for i in range(1, images + 1):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"images/COCO_val2014_{i:012d}.jpg")
    for n in range(images * each):
        image, key = n % images + 1, 1000 - n
        text = ["What is this?", "How many dogs are there in the picture?", "Is it a yellow bus?"][
            n // images % 3
        ]
        questions.append({"question_id": key, "image_id": image, "question": text})
        answers = [{"answer": "yes", "answer_id": k, "answer_confidence": "yes"} for k in range(10)]
        kind = ["yes/no", "number", "other"][n % 3]
        annotations.append({"question_id": key, "image_id": image, "answer_type": kind, "answers": answers})
    (folder / "q.json").write_text(json.dumps({"data_subtype": "val2014", "questions": questions}))
    (folder / "a.json").write_text(json.dumps({"annotations": annotations[::-1]}))
    files = ["--questions", folder / "q.json", "--annotations", folder / "a.json"]
    return ["--kind", "vqav2", *files, "--images", folder / "images", "--workers", "0", "--batch", "2"]


# --- answers


def test_items_are_done_when_all_variants_of_all_are():
    found = object.__new__(Answers)
    found.of_item = {1: {"before": "a"}, 2: {"before": "a", "after": "b"}}
    assert found.have([2], ["before", "after"]) and found.have([1, 2], ["before"])
    assert not found.have([1], ["before", "after"]) and not found.have([2, 3], ["before"])


@pytest.mark.parametrize("beams, given, used", [(5, 0.3, 0.3), (5, 0.0, 0.0), (1, 0.3, None)])
def test_the_length_penalty_is_the_options_where_there_are_beams(beams, given, used):
    p = argparse.ArgumentParser()
    add_generation_options(p, prompt="")
    args = p.parse_args([])
    args.beams, args.length_penalty = beams, given
    settings = generation_settings(args)
    assert settings.get("length_penalty") == used and settings["num_beams"] == beams


# --- rules


@pytest.mark.parametrize("results", ["plain", "needs_normalising"])
def test_accuracy_by_construction(by_construction, run, tmp_path, results):
    """Real answers chosen so that the official rule gives 70.00, over all and per answer type."""
    files = ["v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"]
    files = ["--questions", by_construction / files[0], "--annotations", by_construction / files[1]]
    answers = by_construction / f"results_{results}.json"
    code, out, err = run("eval_vqa", "--kind", "vqav2", *files, "--results", answers, "--out", tmp_path)
    assert code == 0, err
    rows = {row["metric"]: row for row in json.loads((tmp_path / "result.json").read_text())["rows"]}
    for metric in ("official", "official, yes/no", "official, number", "official, other"):
        assert rows[metric]["after"] == pytest.approx(70.0) and rows[metric]["before"] is None
    assert rows["official"]["n"] == 192 and "| after | 70.00 |" in out
    expected = json.loads((by_construction / "expected.json").read_text())["per_question"]
    E = vqa.read("vqav2", str(files[1]), str(files[3]))
    given = vqa.read_results(answers, E)
    for q in E:
        assert 100 * vqa.official_accuracy(given[q.id], q.answers) == pytest.approx(expected[str(q.id)])


@pytest.mark.parametrize(
    "answer, humans, lavis, official",
    [
        ("yes", ["yes"] * 10, 1, 1),
        ("Yes.", ["yes"] * 10, 1, 0),  # unanimous: the official rule normalizes nothing
        ("yes.", ["yes."] * 10, 0, 1),  # LAVIS normalizes the answer alone, then
        ("two", ["2"] * 10, 1, 0),
        ("2", ["two"] * 10, 0, 0),  # LAVIS leaves the humans' number words
        ("2", ["two"] * 9 + ["many"], 0, 1),
        ("a dog", ["dog"] * 9 + ["the dog"], 1, 1),
        ("dog", ["a dog"] * 5 + ["dog"] * 5, 1, 1),
        ("dog", ["a dog"] * 8 + ["dog"] * 2, 0.6, 1),
        ("dont", ["don't"] * 9 + ["do not"], 1, 1),
        ("don't", ["dont"] * 9 + ["no"], 0, 1),
        ("dog", ["dog"] * 1 + ["cat"] * 9, 0.3, 0.3),
        ("dog", ["dog"] * 3 + ["cat"] * 7, 0.9, 0.9),
        ("dog", ["dog"] * 4 + ["cat"] * 6, 1, 1),
        ("dog\n", ["dog"] * 4 + ["cat"] * 6, 1, 1),
    ],
)
def test_rules_by_hand(answer, humans, lavis, official):
    """One match of ten: nine of the ten leave-one-outs see it, so 9/10 x 1/3 = 0.3; and so on."""
    assert vqa.lavis_accuracy(answer, tuple(humans)) == pytest.approx(lavis)
    assert vqa.official_accuracy(answer, tuple(humans)) == pytest.approx(official)


@pytest.mark.parametrize(
    "text, normal",
    [
        ("The Ten o'clock news", "10 o'clock news"),
        ("wont", "won't"),
        ("couldnt've", "couldn't've"),
        ("hed", "he'd"),
        ("none", "0"),
        ("1,000", "1000"),  # a comma between digits: every mark goes
        ("black-white", "black white"),
        ("black, white", "black white"),
        ("u.s.a.", "usa"),
        ("3.5", "3.5"),
        ("is it?", "is it"),
    ],
)
def test_normalization_by_hand(text, normal):
    assert vqa.normalize(text) == normal


def test_lemmatizer_changes_nouns_and_verbs_only(monkeypatch):
    """LAVIS's rule on a stand-in for spaCy, whose model is not on the package index."""

    class Token:
        def __init__(self, text):
            self.text, self.lemma_ = text, text.rstrip("s")
            self.pos_ = {"dogs": "NOUN", "runs": "VERB"}.get(text, "ADJ")

    class Spacy:
        @staticmethod
        def load(name):
            assert name == "en_core_web_sm"
            return lambda answer: [Token(word) for word in answer.split()]

    monkeypatch.setitem(sys.modules, "spacy", Spacy)
    assert vqa.lemmatizer()("dogs runs across") == "dog run across"
    monkeypatch.setitem(sys.modules, "spacy", None)
    assert vqa.lemmatizer() is None


def test_gqa_is_read_and_matched(tmp_path):
    content = {
        "07": {"imageId": "n1", "question": "Is it?", "answer": "yes", "types": {"structural": "verify"}}
    }
    (tmp_path / "gqa.json").write_text(json.dumps(content))
    (q,) = vqa.read("gqa", str(tmp_path / "gqa.json"), None)
    assert (q.id, q.image, q.answers, q.kind) == ("07", "n1.jpg", ("yes",), "verify")
    assert vqa.exact_match("Yes.", q.answers) == 1 and vqa.exact_match("no", q.answers) == 0
    (tmp_path / "r.json").write_text(vqa.results("gqa", [q], {"07": "yes"})[".json"])
    assert vqa.read_results(tmp_path / "r.json", [q]) == {"07": "yes"}


# --- bad input


def test_bad_files_are_refused(tmp_path, run, blip):
    options = write_set(tmp_path / "set")
    out = ["--blip2", blip, "--out", tmp_path / "out"]
    questions = json.loads((tmp_path / "set/q.json").read_text())
    annotations = json.loads((tmp_path / "set/a.json").read_text())

    def told(q=questions, a=annotations) -> str:
        (tmp_path / "set/q.json").write_text(json.dumps(q))
        (tmp_path / "set/a.json").write_text(json.dumps(a))
        code, _, err = run("eval_vqa", *options, *out)
        assert code == 2 and "Traceback" not in err, err
        return err.splitlines()[-1]

    less = {**questions, "questions": questions["questions"][1:]}
    assert "1 of 15 questions" in told(q=less) and "the first is 1000" in told(q=less)
    assert "the first is 986" in told(a={"annotations": annotations["annotations"][1:]})
    twice = {**questions, "questions": questions["questions"] + questions["questions"][:1]}
    assert "must be unique; 1 are not, 1000 is there 2 times" in told(q=twice)
    nine = json.loads(json.dumps(annotations))
    del nine["annotations"][0]["answers"][0]
    assert "annotation 986 has 9 answers, not 10" in told(a=nine)
    moved = json.loads(json.dumps(annotations))
    moved["annotations"][0]["image_id"] = 77
    assert "question 986 is on image 5, its annotation on 77" in told(a=moved)
    assert "questions[0] of 1: no field question_id" in told(q={"questions": [{}]})
    (tmp_path / "set/images/COCO_val2014_000000000002.jpg").write_bytes(b"no image")
    assert "000000000002.jpg: UnidentifiedImageError" in told()
    (tmp_path / "set/images/COCO_val2014_000000000002.jpg").unlink()
    assert "1 of 5 images are not in" in told()


def test_results_of_another_question_set_are_refused(tmp_path, run):
    options = write_set(tmp_path / "set")[:6]
    for rows, told in (
        ([{"question_id": 1, "answer": "yes"}], "15 of 15 questions of the question set are not in"),
        ([{"question_id": i, "answer": "x"} for i in range(986, 1002)], "1 of 16 questions of"),
        ([{"question_id": 1}], "results[0] of 1 (question_id 1): answer must be text, got None"),
        ({"a": 1}, "is not a results file"),
    ):
        (tmp_path / "r.json").write_text(json.dumps(rows))
        code, _, err = run("eval_vqa", *options, "--results", tmp_path / "r.json", "--out", tmp_path / "out")
        assert code == 2 and told in err, err


@pytest.mark.parametrize(
    "words, told",
    [
        (["--blip2", "absent", "--images", "."], "neither a folder nor a name on the hub"),
        (["--images", "."], "--blip2 or --vlm, and --images are needed"),
        (["--results", "r.json", "--images", "."], "--images has no part in it"),
        (["--blip2", "BLIP", "--images", ".", "--prompt", "what"], "--prompt needs one {}"),
        (["--blip2", "BLIP", "--images", ".", "--beams", "0"], "--beams must be at least 1"),
        (
            ["--blip2", "BLIP", "--images", ".", "--min-new-tokens", "11"],
            "--max-new-tokens must be at least 11",
        ),
        (["--blip2", "BLIP", "--images", ".", "--lemmatize", "yes"], "needs spaCy"),
        (["--blip2", "BLIP", "--images", ".", "--lora", "absent"], "no LoRA file at absent"),
        (
            ["--blip2", "BLIP", "--images", ".", "--kind", "gqa"],
            "--annotations is needed, but with --kind gqa",
        ),
    ],
)
def test_impossible_options(run, blip, monkeypatch, words, told):
    monkeypatch.setitem(sys.modules, "spacy", None)
    words = [str(blip) if word == "BLIP" else word for word in words]
    given = ["--kind", "vqav2", "--questions", "q.json", "--annotations", "a.json"]
    code, out, err = run("eval_vqa", *given, *words)
    assert code == 2 and told in err and not out, err


# --- end to end


def answers_of(out: Path, variant: str = "before") -> list[dict]:
    return json.loads((out / f"results_{variant}.json").read_text())


def test_before_and_after_end_to_end(tmp_path, run, blip):
    """Every human gave the model's answer of before, so 100 before; after, what has not changed."""
    options = [*write_set(tmp_path / "set"), "--blip2", blip]
    file = lora_file(tmp_path / "lora.safetensors", tiny_blip2.BLOCKS + 1)
    code, out, err = run("eval_vqa", *options, "--compare", file, "--out", tmp_path / "a")
    assert code == 0 and "blocks.3. left out" in out, err
    before, after = (answers_of(tmp_path / "a", variant) for variant in ("before", "after"))
    asked = json.loads((tmp_path / "set/q.json").read_text())["questions"]
    assert [row["question_id"] for row in before] == [q["question_id"] for q in asked]
    same = sum(a == b for a, b in zip(before, after, strict=True))
    assert same < 15 and len({row["answer"] for row in before}) > 3

    annotations = json.loads((tmp_path / "set/a.json").read_text())
    said = {row["question_id"]: row["answer"] for row in before}
    for annotation in annotations["annotations"]:
        for answer in annotation["answers"]:
            answer["answer"] = vqa.normalize(said[annotation["question_id"]])
    (tmp_path / "set/a.json").write_text(json.dumps(annotations))
    code, out, err = run("eval_vqa", *options, "--compare", file, "--out", tmp_path / "b", "--limit", 10)
    result = json.loads((tmp_path / "b/result.json").read_text())
    row = result["rows"][0]
    normal = [[vqa.normalize(row["answer"]) for row in rows] for rows in (before, after)]
    kept = sum(a == b for a, b in list(zip(*normal, strict=True))[:10])
    assert row["metric"] == "lavis" and row["before"] == 100 and row["after"] == pytest.approx(10 * kept)
    assert (
        row["difference"] == pytest.approx(10 * kept - 100) and row["low"] <= row["difference"] <= row["high"]
    )
    assert row["n"] == 10 and result["partial"] and len(answers_of(tmp_path / "b")) == 10
    assert result["protocol"]["generation"]["length_penalty"] == 0
    assert any(str(blip) in path for path in result["sha256"])


def test_one_image_goes_through_m_once_for_all_its_questions(tmp_path, run, blip, monkeypatch):
    import blip2

    seen = []
    vision = blip2.Blip2.vision
    monkeypatch.setattr(blip2.Blip2, "vision", lambda self, x: seen.append(len(x)) or vision(self, x))
    code, *_ = run("eval_vqa", *write_set(tmp_path / "set"), "--blip2", blip, "--out", tmp_path / "out")
    assert code == 0 and sum(seen) == 5  # of 15 questions


def test_killed_and_resumed_is_uninterrupted(tmp_path, run, run_ranks, blip, monkeypatch):
    """SIGKILL after some answers: the resumed run does not ask again, and ends with the same files."""
    options = [*write_set(tmp_path / "set"), "--blip2", blip]
    code, *_ = run("eval_vqa", *options, "--out", tmp_path / "whole")
    assert code == 0
    out = tmp_path / "cut"
    path, add = out / "answers_0.jsonl", Answers.add

    def killed(self, items, answers):
        add(self, items, answers)
        if len(self.of_item) > 6:
            os.kill(os.getpid(), signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Answers, "add", killed)
        codes, outs = run_ranks(1, "eval_vqa", *options, "--out", out)
    assert codes == [-signal.SIGKILL], outs
    kept = path.read_text()
    assert kept.count('"item"') == 12  # of 15: the questions of 2 + 2 of 5 images
    path.write_text(kept + '{"item": 986, "answ')  # a line cut off
    code, _, err = run("eval_vqa", *options, "--out", out)
    assert code == 2 and "holds answers: pass --resume" in err
    code, _, err = run("eval_vqa", *options, "--out", out, "--beams", 2, "--resume")
    assert code == 2 and "generation was" in err
    code, _, err = run("eval_vqa", *options, "--out", out, "--resume")
    assert code == 0, err
    assert path.read_text().startswith(kept)
    assert path.read_text().count('"item"') == 15 + 1  # the line cut off; nothing was asked twice
    assert answers_of(out) == answers_of(tmp_path / "whole")
    results = [json.loads((folder / "result.json").read_text()) for folder in (out, tmp_path / "whole")]
    assert results[0]["rows"] == results[1]["rows"]


def test_two_ranks_are_one_process(tmp_path, run, run_ranks, blip):
    options = [*write_set(tmp_path / "set"), "--blip2", blip]
    code, *_ = run("eval_vqa", *options, "--out", tmp_path / "one")
    codes, outs = run_ranks(2, "eval_vqa", *options, "--out", tmp_path / "two")
    assert code == 0 and codes == [0, 0], outs
    assert answers_of(tmp_path / "one") == answers_of(tmp_path / "two")
    parts = [(tmp_path / f"two/answers_{rank}.jsonl").read_text().count('"item"') for rank in (0, 1)]
    assert parts == [9, 6]  # 5 images of 3 questions
