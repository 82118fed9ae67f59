"""Questions about images and the rules by which answers count (Table 7): VQAv2, OK-VQA and GQA.

There are two rules, and they differ by tenths of a point. Both compare an answer with each nine of the ten
humans', min(matches / 3, 1), and take the mean of the ten. `official` (GT-Vision-Lab/VQA) normalizes all of
them unless the humans agree, and then none; `lavis`, with which BLIP-2's and the paper's figures were made,
always normalizes the prediction, and of the humans' answers only the punctuation, unless they agree.
"""

import json
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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
    try:
        if kind == "gqa":
            return [
                Question(id, f"{q['imageId']}.jpg", q["question"], (q["answer"],), _structure(q))
                for id, q in _json(questions).items()
            ]
        content = _json(questions)
        asked = _unique(content["questions"], questions)
        answered = _unique(_json(annotations)["annotations"], annotations)
        _same(asked, answered, questions, annotations)
        items, subset = [], content.get("data_subtype", "val2014")
        for id, q in asked.items():
            a, image = answered[id], q["image_id"]
            if a["image_id"] != image:
                raise ValueError(f"question {id} is on image {image}, its annotation on {a['image_id']}")
            if len(a["answers"]) != HUMANS:
                raise ValueError(f"annotation {id} has {len(a['answers'])} answers, not {HUMANS}")
            answers = tuple(one["answer"] for one in a["answers"])
            name = f"COCO_{subset}_{image:012d}.jpg"
            items.append(Question(id, name, q["question"], answers, a.get("answer_type", "other")))
        return items
    except (KeyError, TypeError, AttributeError) as error:
        what = f"{type(error).__name__}: {error}"
        raise ValueError(f"{questions}, {annotations}: not {kind}'s official files ({what})") from error


def _structure(question: dict) -> str:
    return question.get("types", {}).get("structural") or "other"


def _json(path: str | Path):
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error


def _unique(items: list[dict], path: str | Path) -> dict:
    by_id = {item["question_id"]: item for item in items}
    if many := len(items) - len(by_id):
        id, times = Counter(item["question_id"] for item in items).most_common(1)[0]
        raise ValueError(f"{path}: question ids must be unique; {many} are not, {id} is there {times} times")
    return by_id


def _same(items: dict, others: dict, path: str | Path, other: str | Path) -> None:
    for a, b, a_path, b_path in ((items, others, path, other), (others, items, other, path)):
        if lost := [id for id in a if id not in b]:
            many = f"{len(lost)} of {len(a)} questions of {a_path}"
            raise ValueError(f"{many} are not in {b_path}, the first is {lost[0]}")


def read_results(path: str | Path, questions: list[Question]) -> dict:
    """{question id: answer} from a file in the official format, a list of {question_id, answer}.

    GQA's own has questionId and prediction. Raises ValueError if it answers other questions.
    """
    try:
        rows = [{"question_id": row.get("question_id", row.get("questionId")), **row} for row in _json(path)]
        answers = {id: row.get("answer", row.get("prediction")) for id, row in _unique(rows, path).items()}
    except (TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no results file, a list of question_id and answer") from error
    if bad := [id for id, answer in answers.items() if not isinstance(answer, str)]:
        raise ValueError(f"{path}: question {bad[0]} has no answer")
    _same({q.id: q for q in questions}, answers, "the question set", path)
    return answers


def results(kind: str, answers: dict) -> list[dict]:
    """{question id: answer} in the official format of `kind`."""
    key, value = ("questionId", "prediction") if kind == "gqa" else ("question_id", "answer")
    return [{key: question, value: answer} for question, answer in answers.items()]


# --- rules


def drop_punctuation(text: str) -> str:
    """Each mark becomes nothing if a space is beside it anywhere, or a comma between digits; else a space."""
    thousands, dropped = re.search(r"\d,\d", text) is not None, text
    for mark in PUNCTUATION:
        nothing = thousands or f"{mark} " in text or f" {mark}" in text
        dropped = dropped.replace(mark, "" if nothing else " ")
    return re.sub(r"\.(?!\d)", "", dropped, count=32)  # 32: the evaluators pass re.UNICODE as the count


def plain_words(text: str) -> str:
    """Lower case, digits for number words, no articles, apostrophes restored."""
    words = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def normalize(text: str) -> str:
    return plain_words(drop_punctuation(text))


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def _accuracy(answer: str, humans: Sequence[str]) -> float:
    """Mean over the ten of min(matches among the other nine / 3, 1)."""
    matches = sum(human == answer for human in humans)
    return sum(min((matches - (human == answer)) / 3, 1) for human in humans) / len(humans)


def lavis_accuracy(answer: str, humans: tuple[str, ...]) -> float:
    if len(set(humans)) > 1:
        humans = [drop_punctuation(human) for human in humans]
    return _accuracy(normalize(_one_line(answer)), humans)


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
