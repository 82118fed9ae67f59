"""Questions about images and the rules by which answers count (Table 7): VQAv2, OK-VQA and GQA.

There are two rules, and they differ by tenths of a point. Both compare an answer with each nine of the ten
humans', min(matches / 3, 1), and take the mean of the ten. `official` (GT-Vision-Lab/VQA) normalizes all of
them unless the humans agree, and then none; `lavis`, with which BLIP-2's and the paper's figures were made,
always normalizes the prediction, and of the humans' answers only the punctuation, unless they agree.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

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
    """id: as in the files (GQA: a string); answers: the ten humans', or GQA's one; kind: of the answer"""

    id: int | str
    image: str
    text: str
    answers: tuple[str, ...]
    kind: str


# --- files


def read(kind: str, questions: str, annotations: str | None) -> list[Question]:
    """The questions of vqav2, okvqa or gqa in the order of their official file.

    Raises FileNotFoundError, or ValueError naming what is not as it should be: ids that are there twice,
    questions without annotation and the reverse, annotations without ten answers.
    """
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
        if len(given[k]) != HUMANS:
            a.refuse(k, f"annotation {shown(key)} has {len(given[k])} answers, not {HUMANS}")
        answers = tuple(Items(annotations, given[k], f"{a.where(k)}: answers").column("answer", str))
        found.append(Question(key, f"COCO_{subset}_{image:012d}.jpg", text, answers, kinds[k]))
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


def read_results(path: str | Path, questions: list[Question]) -> dict:
    """{question id: answer} from a file in the official format, a list of {question_id, answer}.

    GQA's own has questionId and prediction. Raises ValueError if it answers other questions.
    """
    if type(rows := read_json(path)) is not list:
        raise ValueError(f"{path} is not a results file, a list of question_id and answer")
    rows = Items(path, rows, "results").items
    rows = [{"question_id": row.get("questionId"), "answer": row.get("prediction"), **row} for row in rows]
    rows = Items(path, rows, "results")
    answers = dict(zip(_ids(rows), rows.column("answer", str), strict=True))
    _same({q.id: q for q in questions}, answers, "the question set", path)
    return answers


def results(kind: str, answers: dict) -> list[dict]:
    """{question id: answer} in the official format of `kind`."""
    key, value = ("questionId", "prediction") if kind == "gqa" else ("question_id", "answer")
    return [{key: question, value: answer} for question, answer in answers.items()]


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


def exact_match(answer: str, truth: tuple[str, ...]) -> float:
    """GQA, as LAVIS: both normalized."""
    return float(normalize(answer) == normalize(truth[0]))


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
