"""Questions about images and the rules by which answers count: VQAv2, OK-VQA, GQA (Table 7), TextVQA, POPE.

There are three rules for ten humans' answers, which differ by tenths of a point. All compare an answer with
each nine of the ten, min(matches / 3, 1), and take the mean of the ten. `official` (GT-Vision-Lab/VQA)
normalizes all of them unless the humans agree, and then none; `lavis`, with which BLIP-2's and the paper's
figures were made, always normalizes the prediction, and of the humans' answers only the punctuation, unless
they agree; `textvqa` (EvalAI's answer processor, in M4C's and LLaVA's evaluators) always normalizes all.
"""

import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from files import Items, expecting, read_json, shown

HUMANS = 10
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'  # in this order
NUMBERS = "zero one two three four five six seven eight nine ten".split()
NUMBERS = {"none": "0", **{word: str(i) for i, word in enumerate(NUMBERS)}}
ARTICLES = {"a", "an", "the"}
# The evaluators restore one lost apostrophe in these words (those with a capital are never met: answers are
# in lower case by then, and are left out here)
CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't
must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've
somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's something'd
something'd've something'll that's there'd there'd've there're there's they'd they'd've they'll they're
they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've
who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'll
y'all'd've you'd you'd've you'll you're you've
""".split()
CONTRACTIONS = {
    word[:at] + word[at + 1 :]: word for word in CONTRACTED for at, letter in enumerate(word) if letter == "'"
} | {"somebody'd": "somebodyd"}  # sic


@dataclass(frozen=True)
class Question:
    """id: as in the files (GQA: a string; POPE: SETTING/ID, as each setting begins at 1)

    answers: the ten humans', or the one of GQA and POPE; kind: of the answer; POPE: the setting
    """

    id: int | str
    image: str
    text: str
    answers: tuple[str, ...]
    kind: str


# --- files


def read(kind: str, questions: str, annotations: str | None) -> list[Question]:
    """The questions of vqav2, okvqa, gqa, textvqa or one setting of pope in the order of the official file.

    Raises FileNotFoundError, or ValueError naming what is not as it should be: ids that are there twice,
    questions without annotation and the reverse, without ten answers (POPE: without yes or no).
    """
    if kind == "pope":
        return _read_pope(questions)
    if kind == "textvqa":
        _, q = _lists(questions, "data")
        keys, images, texts = _ids(q), q.column("image_id", str), q.column("question", str)
        answers = [_ten(q, k, given) for k, given in enumerate(q.column("answers", list))]
        if odd := [k for k, given in enumerate(answers) if not {str}.issuperset(map(type, given))]:
            q.refuse(odd[0], f"answers must be texts, got {shown(list(answers[odd[0]]))}")
        return [
            Question(key, f"train_images/{image}.jpg", text, given, "")
            for key, image, text, given in zip(keys, images, texts, answers, strict=True)
        ]
    if kind == "gqa":
        with expecting(questions, "gqa's official file: an object of questions by their ids"):
            content = read_json(questions)
            keys, items = list(content), Items(questions, list(content.values()), "questions")
            images, texts, answers = (items.column(k, str) for k in ("imageId", "question", "answer"))
            types = Items(questions, items.column("types", dict, default={}), "types of the questions")
            kinds = types.column("structural", str, default="other")
            return [
                Question(key, f"{image}.jpg", text, (answer,), kind or "other")
                for key, image, text, answer, kind in zip(keys, images, texts, answers, kinds, strict=True)
            ]
    asked, answered = (_lists(p, k) for p, k in ((questions, "questions"), (annotations, "annotations")))
    if type(subset := asked[0].get("data_subtype", "val2014")) is not str:
        raise ValueError(f"{questions}: data_subtype must be text, got {shown(subset)}")
    q, a = asked[1], answered[1]
    keys, images, texts = _ids(q), q.column("image_id", int), q.column("question", str)
    place_of = {key: k for k, key in enumerate(_ids(a))}
    on, given = a.column("image_id", int), a.column("answers", list)
    kinds = a.column("answer_type", str, default="other")
    _same(dict.fromkeys(keys), place_of, questions, annotations)
    found = []
    for key, image, text in zip(keys, images, texts, strict=True):
        k = place_of[key]
        if on[k] != image:
            a.refuse(k, f"question {shown(key)} is on image {image}, its annotation on {on[k]}")
        _ten(a, k, given[k], f"annotation {shown(key)}")
        answers = tuple(Items(annotations, given[k], f"{a.where(k)}: answers").column("answer", str))
        found.append(Question(key, f"COCO_{subset}_{image:012d}.jpg", text, answers, kinds[k]))
    return found


def _ten(items: Items, k: int, given: list, what: str = "the question") -> tuple[str, ...]:
    if len(given) != HUMANS:
        items.refuse(k, f"{what} has {len(given)} answers, not {HUMANS}")
    return tuple(map(items.whole, given))


def setting(path: str | Path) -> str:
    """Which of POPE's a file is: random, of coco_pope_random.json; of another name all of it."""
    return Path(path).stem.rpartition("pope_")[2]


def _read_pope(path: str | Path) -> list[Question]:
    q = Items(path, read_lines(path), "lines")
    keys, images, texts = _ids(q), q.column("image", str), q.column("text", str)
    for k, label in enumerate(labels := q.column("label", str)):
        if label not in ("yes", "no"):
            q.refuse(k, f"label must be yes or no, got {shown(label)}")
    return [
        Question(f"{setting(path)}/{key}", image, text, (label,), setting(path))
        for key, image, text, label in zip(keys, images, texts, labels, strict=True)
    ]


def read_lines(path: str | Path) -> list:
    """What the lines of a JSONL file hold. Raises FileNotFoundError, or ValueError naming the line."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    found = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            found += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: line {number} is not JSON: {error}") from error
    return found


def _lists(path: str | Path, name: str) -> tuple[dict, Items]:
    content = read_json(path)
    if not isinstance(content, dict):
        raise ValueError(f"{path} is a list, LAVIS's perhaps: expected the official file, with a list {name}")
    return content, Items(path, content.get(name), name)


def _ids(items: Items) -> list:
    keys = items.column("question_id", int, str)
    if len(set(keys)) < len(keys):
        key, times = Counter(keys).most_common(1)[0]
        many = len(keys) - len(set(keys))
        why = f"question ids must be unique; {many} are not, {shown(key)} is there {times} times"
        items.refuse(keys.index(key), why)
    return keys


def _same(items: dict, others: dict, path: str | Path, other: str | Path) -> None:
    for a, b, a_path, b_path in ((items, others, path, other), (others, items, other, path)):
        if lost := [key for key in a if key not in b]:
            raise ValueError(
                f"{len(lost)} of {len(a)} questions of {a_path} are not in {b_path}, "
                f"the first is {shown(lost[0])}"
            )


def read_results(path: str | Path, questions: list[Question], kind: str = "") -> dict:
    """{question id: answer} from a file in the official format, a list of {question_id, answer}.

    GQA's own has questionId and prediction; POPE's is a line {question, answer} for each of one setting's
    questions, in their order. Raises ValueError if it answers other questions.
    """
    if kind == "pope":
        rows = Items(path, read_lines(path), "lines")
        if len(rows.items) != len(questions):
            raise ValueError(f"{path} has {len(rows.items)} answers to {len(questions)} questions")
        for k, (row, q) in enumerate(zip(rows.items, questions, strict=True)):
            if f"{q.kind}/{row.get('question_id', q.id.partition('/')[2])}" != q.id:
                rows.refuse(k, f"answers must be in the order of the questions, expected {q.id}")
        return dict(zip((q.id for q in questions), rows.column("answer", str), strict=True))
    if type(rows := read_json(path)) is not list:
        raise ValueError(f"{path} is not a results file, a list of question_id and answer")
    rows = Items(path, rows, "results").items
    rows = [{"question_id": row.get("questionId"), "answer": row.get("prediction"), **row} for row in rows]
    rows = Items(path, rows, "results")
    answers = dict(zip(_ids(rows), rows.column("answer", str), strict=True))
    _same({q.id: q for q in questions}, answers, "the question set", path)
    return answers


def results(kind: str, questions: list[Question], answers: dict) -> dict[str, str]:
    """{how a file's name ends: its text}: the answers, by their questions' ids, in the official format.

    POPE's scorer reads a file for each setting, JSON lines.
    """
    if kind == "pope":
        found: dict[str, str] = {}
        for q in questions:
            key = q.id.partition("/")[2]
            row = {"question_id": int(key) if key.isdecimal() else key, "question": q.text}
            row["answer"] = answers[q.id]
            found[f"_{q.kind}.jsonl"] = found.get(f"_{q.kind}.jsonl", "") + json.dumps(row) + "\n"
        return found
    key, value = ("questionId", "prediction") if kind == "gqa" else ("question_id", "answer")
    return {".json": json.dumps([{key: q.id, value: answers[q.id]} for q in questions], indent=1)}


# --- rules


def drop_punctuation(text: str) -> str:
    """Each mark becomes nothing if a space is beside it anywhere, or a comma between digits; else a space."""
    bare = re.search(r"\d,\d", text) is not None
    found = text
    for mark in PUNCTUATION:
        found = found.replace(mark, "" if bare or f"{mark} " in text or f" {mark}" in text else " ")
    return re.sub(r"\.(?!\d)", "", found, count=32)  # 32: the evaluators pass re.UNICODE as the count


def plain_words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes restored."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize(text: str) -> str:
    return plain_words(drop_punctuation(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _accuracy(answer: str, humans: list[str]) -> float:
    """Mean over the ten of min(matches among the other nine / 3, 1)."""
    matches = sum(human == answer for human in humans)
    return sum(min((matches - (human == answer)) / 3, 1) for human in humans) / len(humans)


def lavis_accuracy(answer: str, humans: tuple[str, ...]) -> float:
    agree = len(set(humans)) == 1
    return _accuracy(normalize(_one_line(answer)), [h if agree else drop_punctuation(h) for h in humans])


def official_accuracy(answer: str, humans: tuple[str, ...]) -> float:
    answer, humans = _one_line(answer), [_one_line(human) for human in humans]
    if len(set(humans)) > 1:
        answer, humans = normalize(answer), [normalize(human) for human in humans]
    return _accuracy(answer, humans)


def textvqa_accuracy(answer: str, humans: tuple[str, ...]) -> float:
    """Of M4C's evaluator, which LLaVA's takes over: 's parted from its word, and all of them normalized."""

    def processed(text: str) -> str:
        text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's")
        return normalize(_one_line(text.strip()))

    return _accuracy(processed(answer), [processed(human) for human in humans])


def exact_match(answer: str, truth: tuple[str, ...]) -> float:
    """GQA, as LAVIS: both normalized."""
    return float(normalize(answer) == normalize(truth[0]))


def says_no(answer: str) -> bool:
    """POPE's reading of an answer: no if its first sentence has the word No, no or not; else yes."""
    return not {"No", "no", "not"}.isdisjoint(answer.partition(".")[0].replace(",", "").split(" "))


def pope_scores(answers: list[str], truths: list[str]) -> dict[str, np.ndarray | float]:
    """POPE's, where yes is what is to be found: of each question, or of all (precision, F1), in 0..1.

    recall: of those whose truth is yes. 0 where the official scorer divides by 0: nothing found
    """
    said = np.array([not says_no(answer) for answer in answers])
    true = np.array([truth == "yes" for truth in truths])
    hits = float((said & true).sum())
    precision = hits / said.sum() if said.any() else 0.0
    f1 = 2 * hits / (said.sum() + true.sum()) if hits else 0.0
    each = {
        "accuracy": said == true,
        "recall": said[true] if true.any() else np.zeros(1),
        "share of yes": said,
    }
    each = {name: values.astype(float) for name, values in each.items()}
    return {**each, "precision": float(precision), "F1": float(f1)}


def lemmatizer():
    """answer -> the same with nouns and verbs as lemmas (LAVIS, on OK-VQA), or None without spaCy's model."""
    try:
        import spacy

        analyze = spacy.load("en_core_web_sm")
    except (ImportError, OSError):
        return None

    def lemmas(answer: str) -> str:
        return " ".join(t.lemma_ if t.pos_ in ("NOUN", "VERB") else t.text for t in analyze(answer))

    return lemmas
