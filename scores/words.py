"""How words count (Table 3): right or not, and how similar."""

import re


def grade(label: str, text: str) -> tuple[float, float]:
    """Whether a word is right, and its similarity, 1 - edit distance / length of the longer; both 0..1.

    Case and whatever is not a digit or a letter a-z do not count (Table 3 as clovaai and ViTSTR score).
    """
    a, b = alphanumeric(label), alphanumeric(text)
    longer = max(len(a), len(b))
    return float(a == b), 1 - edit_distance(a, b) / longer if longer else 1.0


def alphanumeric(text: str) -> str:
    return re.sub("[^0-9a-z]", "", text.lower())


def edit_distance(a: str, b: str) -> int:
    """The fewest insertions, deletions and substitutions (Levenshtein)."""
    edits = list(range(len(b) + 1))  # from what has been read of a to the first j letters of b
    for i, x in enumerate(a, 1):
        diagonal, edits[0] = edits[0], i
        for j, y in enumerate(b, 1):
            diagonal, edits[j] = edits[j], min(edits[j] + 1, edits[j - 1] + 1, diagonal + (x != y))
    return edits[-1]
