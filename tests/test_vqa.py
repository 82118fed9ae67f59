"""VQA: official files, rules on real and hand-worked cases, eval_vqa.py on a tiny BLIP-2 and LLaVA."""

import argparse
import json
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from answers import Answers, add_generation_options, generation_settings
from data import vqa
from tests import tiny_blip2, tiny_vlm
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


@pytest.fixture(scope="module", params=["--blip2", "--vlm"])
def model(request, blip, tmp_path_factory) -> list:
    """The options of either kind of model."""
    if request.param == "--blip2":
        return ["--blip2", blip]
    return ["--vlm", tiny_vlm.write(tmp_path_factory.mktemp("llava")), "--max-new-tokens", 8]


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


# --- TextVQA


def plain_textvqa(answer: str, humans: list[str]) -> float:
    """M4C's rule once more, from its description: process every answer, then score each distinct one."""
    marks = [
        ";",
        "/",
        "[",
        "]",
        '"',
        "{",
        "}",
        "(",
        ")",
        "=",
        "+",
        "\\",
        "_",
        "-",
        ">",
        "<",
        "@",
        "`",
        ",",
        "?",
        "!",
    ]

    def processed(text):
        text = text.lower()
        for old, new in ((",", ""), ("?", ""), ("'s", " 's")):
            text = text.replace(old, new)
        text = text.strip().replace("\n", " ").replace("\t", " ").strip()
        out = text
        for mark in marks:
            beside = mark + " " in text or " " + mark in text
            out = out.replace(mark, "" if beside or re.search("(?<=[0-9]),+(?=[0-9])", text) else " ")
        kept, dropped = "", 0
        for i, letter in enumerate(out):
            if letter == "." and not out[i + 1 : i + 2].isdigit() and dropped < 32:
                dropped += 1
            else:
                kept += letter
        digits = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
        words = []
        for word in kept.lower().split():
            word = "0" if word == "none" else str(digits.index(word)) if word in digits else word
            if word not in ("a", "an", "the"):
                words.append(vqa.CONTRACTIONS.get(word, word))
        return " ".join(words)

    given, scores = [processed(human) for human in humans], {}
    for unique in set(given):
        each = []
        for i in range(len(given)):
            others = given[:i] + given[i + 1 :]
            each.append(min(1.0, others.count(unique) / 3))
        scores[unique] = sum(each) / len(each)
    return scores.get(processed(answer), 0.0)


@pytest.mark.parametrize(
    "answer, humans, score",
    [
        ("Dakota.", ["dakota"] * 10, 1.0),
        ("dakota digital", ["dakota digital"] * 2 + ["dakota"] * 8, 0.6),  # 2 x 1/3 + 8 x 2/3, of 10
        ("yes", ["Yes!"] * 1 + ["no"] * 9, 0.3),
        ("McDonald's", ["mcdonald 's"] * 3 + ["mcdonalds"] * 7, 0.9),  # 's is a word of its own
        ("10,000", ["10000"] * 4 + ["10 000"] * 6, 1.0),
        ("two", ["2"] * 10, 1.0),  # unanimous humans are normalized, too
        ("THE STOP sign?", ["stop sign"] * 4 + ["stop"] * 6, 1.0),
        ("2:10 p.m.", ["2:10 pm"] * 10, 1.0),
        ("", ["unanswerable"] * 10, 0.0),
    ],
)
def test_textvqa_rule_by_hand(answer, humans, score):
    assert vqa.textvqa_accuracy(answer, tuple(humans)) == pytest.approx(score)
    assert plain_textvqa(answer, humans) == pytest.approx(score)


def test_textvqa_rule_on_fuzzed_answers():
    """Humans who write the same thing in different ways."""
    rng, differ = np.random.default_rng(0), 0
    words = (
        "the,two,none,ten.,o'clock,dont,couldntve,joe's,'s,3.5,U.S.A.,-,--,/,(a),x-y,?,!,..,an,@home".split(
            ","
        )
    )
    words += ["1,000", "10,,0", "\n", "\t", " "]
    ways = [str.upper, str.title, lambda t: t + ".", lambda t: t.replace("'s", " 's"), lambda t: "the " + t]
    ways += [lambda t: t.replace("'", ""), lambda t: t.replace(",", ""), lambda t: t, lambda t: t + "?"]
    for _ in range(600):
        bases = [str(rng.choice(["", " "])).join(rng.choice(words, rng.integers(1, 4))) for _ in range(2)]
        texts = [rng.choice(ways)(str(rng.choice(bases))) for _ in range(11)]
        answer, humans = texts[0], texts[1:]
        expected = plain_textvqa(answer, humans)
        assert vqa.textvqa_accuracy(answer, tuple(humans)) == pytest.approx(expected), (answer, humans)
        differ += abs(vqa.official_accuracy(answer, tuple(humans)) - expected) > 1e-9
    assert differ > 20  # the official rule is another


def write_textvqa(folder: Path) -> list[str]:
    """Six questions on three noise images, and options for them."""
    rng, data = np.random.default_rng(0), []
    (folder / "train_images").mkdir(parents=True, exist_ok=True)
    for i in range(3):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"train_images/{i:016x}.jpg")
    for n in range(6):
        item = {"question_id": 34602 + n, "image_id": f"{n % 3:016x}", "question": "what is the brand?"}
        data.append({**item, "answers": ["nous les gosses"] * 10, "set_name": "val", "image_width": 80})
    content = {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1", "data": data}
    (folder / "TextVQA_0.5.1_val.json").write_text(json.dumps(content))
    questions = ["--questions", folder / "TextVQA_0.5.1_val.json", "--images", folder / "train_images"]
    return ["--kind", "textvqa", *questions, "--workers", "0", "--batch", "2"]


def test_textvqa_end_to_end(tmp_path, run, model):
    """Humans who agree with the model give 100; the results file is the official one and scores the same."""
    options = [*write_textvqa(tmp_path / "set"), *model]
    code, _, err = run("eval_vqa", *options, "--out", tmp_path / "a")
    assert code == 0, err
    given = answers_of(tmp_path / "a")
    assert [row["question_id"] for row in given] == [34602 + n for n in range(6)]
    path = tmp_path / "set/TextVQA_0.5.1_val.json"
    content = json.loads(path.read_text())
    for item, row in zip(content["data"], given, strict=True):
        item["answers"] = [row["answer"]] * 3 + ["another"] * 7
    path.write_text(json.dumps(content))
    results = ["--results", tmp_path / "a/results_before.json", "--out", tmp_path / "b"]
    code, out, err = run("eval_vqa", "--kind", "textvqa", "--questions", path, *results)
    assert code == 0 and "| textvqa, % | TextVQA |" in out and "| after | 90.00 |" in out, err
    rows = json.loads((tmp_path / "b/result.json").read_text())["rows"]
    assert [row["metric"] for row in rows] == ["textvqa", "official"] and rows[0]["n"] == 6


def test_bad_textvqa_is_refused(tmp_path, run):
    options = write_textvqa(tmp_path / "set")
    path = tmp_path / "set/TextVQA_0.5.1_val.json"
    good = json.loads(path.read_text())
    for change, told in (
        (lambda items: items[1]["answers"].pop(), "34603): the question has 9 answers, not 10"),
        (lambda items: items[1].pop("answers"), "(question_id 34603): no field answers"),  # the test set
        (lambda items: items[2]["answers"].__setitem__(0, 7), "answers must be texts, got [7,"),
        (lambda items: items[0].update(question_id=34607), "question ids must be unique"),
        (lambda items: items.clear(), "no questions in it"),
    ):
        content = json.loads(json.dumps(good))
        change(content["data"])
        path.write_text(json.dumps(content))
        code, _, err = run("eval_vqa", *options[:4], "--results", "r.json", "--out", tmp_path / "out")
        assert code == 2 and told in err and err.count("\n") == 1, err


# --- POPE

SETTINGS = ("random", "popular", "adversarial")


def write_pope(folder: Path, truths: str = "ynyynn") -> list[str]:
    """Two questions on each of three images in each setting, the same ids in each; options for them."""
    rng = np.random.default_rng(0)
    (folder / "val2014").mkdir(parents=True, exist_ok=True)
    for i in range(3):
        pixels = rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"val2014/COCO_val2014_{i:012d}.jpg")
    for k, setting in enumerate(SETTINGS):
        lines = []
        for n, truth in enumerate(truths):
            thing = ["a snowboard", "a car", "an umbrella"][(n + k) % 3]
            line = {"question_id": n + 1, "image": f"COCO_val2014_{n // 2:012d}.jpg"}
            line |= {"text": f"Is there {thing} in the image?", "label": {"y": "yes", "n": "no"}[truth]}
            lines.append(json.dumps(line) + "\n")
        (folder / f"coco_pope_{setting}.json").write_text("".join(lines))
    questions = ["--questions", *(folder / f"coco_pope_{setting}.json" for setting in SETTINGS)]
    return ["--kind", "pope", *questions, "--images", folder, "--workers", "0", "--batch", "2"]


def plain_pope(answers: list[str], labels: list[str]) -> dict[str, float]:
    """POPE's scorer once more, from its description, by counting."""
    counts = dict.fromkeys(("TP", "FP", "TN", "FN"), 0)
    for answer, label in zip(answers, labels, strict=True):
        first = answer if "." not in answer else answer[: answer.index(".")]
        words = "".join(letter for letter in first if letter != ",").split(" ")
        yes = not any(word in words for word in ("No", "not", "no"))
        counts[("T" if yes == (label == "yes") else "F") + ("P" if yes else "N")] += 1
    TP, FP, TN, FN = counts.values()
    precision, recall = TP / (TP + FP), TP / (TP + FN)
    f1 = 2 * precision * recall / (precision + recall)
    scores = {"accuracy": (TP + TN) / len(labels), "precision": precision, "recall": recall, "F1": f1}
    return {**scores, "share of yes": (TP + FP) / len(labels)}


@pytest.mark.parametrize(
    "answer, no",
    [
        ("yes", False),
        ("No", True),
        ("No, there is not.", True),
        ("There is no dog. Yes", True),
        ("Yes. There is no cat.", False),  # the first sentence alone
        ("NO", False),  # sic
        ("no.", True),
        ("None", False),
        ("I do not know", True),
        ("Not at all", False),  # sic
        ("", False),
    ],
)
def test_pope_reads_answers_as_its_scorer(answer, no):
    assert vqa.says_no(answer) == no


def test_pope_scores_by_hand_and_on_fuzzed_answers():
    """Of 3 yes and 2 no, 2 found and 1 made up: accuracy 3/5, precision 2/3, recall 2/3, F1 2/3."""
    found = vqa.pope_scores(["yes", "Yes, it is", "no", "yes", "No."], ["yes", "yes", "yes", "no", "no"])
    by_hand = {"accuracy": 3 / 5, "precision": 2 / 3, "recall": 2 / 3, "F1": 2 / 3, "share of yes": 3 / 5}
    assert {name: float(np.mean(score)) for name, score in found.items()} == pytest.approx(by_hand)
    rng = np.random.default_rng(0)
    parts = ["yes", "Yes", "no", "No", "NO", "not", "a dog", ",", ".", ". no", "None", "no,", "there is no"]
    for _ in range(300):
        answers = [str(rng.choice(["", " "])).join(rng.choice(parts, rng.integers(1, 4))) for _ in range(20)]
        labels = ["yes", *(str(rng.choice(["yes", "no"])) for _ in range(18)), "no"]
        answers[0] = "yes"  # so that the scorer has nothing to divide by 0
        found = {k: float(np.mean(v)) for k, v in vqa.pope_scores(answers, labels).items()}
        assert found == pytest.approx(plain_pope(answers, labels))


def test_pope_of_a_model_that_finds_nothing_is_0():
    found = vqa.pope_scores(["no", "no"], ["yes", "no"])
    assert (found["precision"], found["F1"], float(np.mean(found["accuracy"]))) == (0, 0, 0.5)
    assert float(np.mean(vqa.pope_scores(["no"], ["no"])["recall"])) == 0


def test_pope_end_to_end(tmp_path, run, model):
    """Three settings with the same ids; the official files of answers, scored again, give the same rows."""
    options = [*write_pope(tmp_path / "set"), *model]
    code, out, err = run("eval_vqa", *options, "--out", tmp_path / "a")
    assert code == 0, err
    assert "| accuracy, % | POPE random | POPE popular | POPE adversarial |" in out
    rows = json.loads((tmp_path / "a/result.json").read_text())["rows"]
    files = [tmp_path / f"a/results_before_{setting}.jsonl" for setting in SETTINGS]
    labels = ["yes", "no", "yes", "yes", "no", "no"]
    for setting, file in zip(SETTINGS, files, strict=True):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        assert [line["question_id"] for line in lines] == [1, 2, 3, 4, 5, 6]
        assert all(line["question"].startswith("Is there a") for line in lines)
        scores = {row["metric"]: row["before"] / 100 for row in rows if row["set"] == f"POPE {setting}"}
        given = [line["answer"] for line in lines]
        assert scores == pytest.approx(
            {k: float(np.mean(v)) for k, v in vqa.pope_scores(given, labels).items()}
        )
    assert len(rows) == 15 and all(row["n"] == 3 if row["metric"] == "recall" else 6 for row in rows)

    denied = [tmp_path / f"no_{setting}.jsonl" for setting in SETTINGS]
    for path in denied:
        path.write_text('{"answer": "no"}\n' * 6)  # as POPE's own, without ids
    results = ["--results", *denied, *files, "--out", tmp_path / "b"]
    code, _, err = run("eval_vqa", *options[:6], *results)
    assert code == 0, err
    again = json.loads((tmp_path / "b/result.json").read_text())["rows"]
    assert [row["after"] for row in again] == pytest.approx([row["before"] for row in rows])
    by_metric = {row["metric"]: row for row in again if row["set"] == "POPE random"}
    assert by_metric["accuracy"]["before"] == 50 and by_metric["share of yes"]["before"] == 0
    assert (
        by_metric["accuracy"]["low"] <= by_metric["accuracy"]["difference"] and by_metric["F1"]["low"] is None
    )

    code, _, err = run("eval_vqa", *options[:6], "--results", *files[:2], "--out", tmp_path / "b")
    assert code == 2 and "--results takes 3 files, or 6 to compare, got 2" in err
    lines = files[0].read_text().splitlines()
    files[0].write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    code, _, err = run("eval_vqa", *options[:6], "--results", *files, "--out", tmp_path / "b")
    assert code == 2 and "answers must be in the order of the questions, expected random/1" in err
    files[0].write_text("\n".join(lines[1:]))
    code, _, err = run("eval_vqa", *options[:6], "--results", *files, "--out", tmp_path / "b")
    assert code == 2 and "has 5 answers to 6 questions" in err


def test_limit_is_of_each_setting(tmp_path, run, blip):
    options = [*write_pope(tmp_path / "set"), "--blip2", blip, "--limit", 2, "--out", tmp_path / "out"]
    code, _, err = run("eval_vqa", *options)
    assert code == 0, err
    result = json.loads((tmp_path / "out/result.json").read_text())
    assert result["partial"] and {row["n"] for row in result["rows"]} == {1, 2}  # 1: yes of the two


def test_bad_pope_is_refused(tmp_path, run):
    options = write_pope(tmp_path / "set")
    path = tmp_path / "set/coco_pope_popular.json"
    good = path.read_text()
    for old, new, told in (
        ('"label": "no"', '"label": "No"', "(question_id 2): label must be yes or no, got 'No'"),
        ('"label": "no"', '"label": true', "label must be text, got True"),
        (', "label": "no"', "", "(question_id 2): no field label"),
        ('"question_id": 2', '"question_id": 1', "question ids must be unique"),
        ('{"question_id": 2', '"question_id": 2', "coco_pope_popular.json: line 2 is not JSON"),
        (good, "\n", "coco_pope_popular.json: no questions in it"),
    ):
        path.write_text(good.replace(old, new, 1))
        code, _, err = run("eval_vqa", *options[:6], "--results", "a", "b", "c", "--out", tmp_path / "out")
        assert code == 2 and told in err and err.count("\n") == 1, err
    twice = [*options[:4], options[3], "--results", "a", "b", "--out", tmp_path / "out"]
    code, _, err = run("eval_vqa", *twice)
    assert code == 2 and "of POPE's three settings, each once" in err


def test_spoiled_pope_is_read_or_refused(tmp_path):
    """Fields and bytes at random: what is read is as the lines say, else one line tells what is amiss."""
    write_pope(tmp_path / "set")
    path, rng, refused = tmp_path / "set/coco_pope_random.json", np.random.default_rng(0), 0
    good, odd = path.read_bytes(), [None, 7, 1.5, True, "", "yes", "maybe", [], {}, "\ud83d", 10**400]
    for _ in range(300):
        lines, at = good.decode().splitlines(), int(rng.integers(6))
        if rng.random() < 0.7:
            line = json.loads(lines[at])
            key = str(rng.choice(list(line)))
            line[key] = odd[rng.integers(len(odd))]
            if rng.random() < 0.3:
                del line[key]
            lines[at] = json.dumps(line)
            path.write_text("\n".join(lines))
        else:
            cut = int(rng.integers(len(good)))
            path.write_bytes(good[:cut] + [b"", b"\xff", b"\n", b"[]\n"][rng.integers(4)] + good[cut + 1 :])
        try:
            found = vqa.read("pope", path, None)
        except ValueError as error:
            assert str(path) in str(error) and "\n" not in str(error), error
            refused += 1
        else:
            rows = [json.loads(line) for line in path.read_bytes().splitlines() if line.strip()]
            told = [(f"random/{row['question_id']}".replace("\ud83d", "?"), (row["label"],)) for row in rows]
            assert [(q.id, q.answers) for q in found] == told
    assert 100 < refused < 300


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


def killed_after_some_answers() -> None:
    add = Answers.add

    def killed(self, items, answers):
        add(self, items, answers)
        if len(self.of_item) > 6:
            os.kill(os.getpid(), signal.SIGKILL)

    Answers.add = killed


def test_killed_and_resumed_is_uninterrupted(tmp_path, run, run_ranks, model):
    """SIGKILL after some answers: the resumed run does not ask again, and ends with the same files."""
    options = [*write_set(tmp_path / "set"), *model]
    code, *_ = run("eval_vqa", *options, "--out", tmp_path / "whole")
    assert code == 0
    out = tmp_path / "cut"
    path = out / "answers_0.jsonl"
    codes, outs = run_ranks(1, "eval_vqa", *options, "--out", out, prepare=killed_after_some_answers)
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


def test_two_ranks_are_one_process(tmp_path, run, run_ranks, model):
    options = [*write_set(tmp_path / "set"), *model]
    code, *_ = run("eval_vqa", *options, "--out", tmp_path / "one")
    codes, outs = run_ranks(2, "eval_vqa", *options, "--out", tmp_path / "two")
    assert code == 0 and codes == [0, 0], outs
    assert answers_of(tmp_path / "one") == answers_of(tmp_path / "two")
    parts = [(tmp_path / f"two/answers_{rank}.jsonl").read_text().count('"item"') for rank in (0, 1)]
    assert parts == [9, 6]  # 5 images of 3 questions
