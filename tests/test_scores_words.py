"""How words count: by hand, and against a search over all edits."""

import itertools

import pytest

from scores.words import edit_distance, grade


@pytest.mark.parametrize(
    "label, text, right, similarity",
    [
        ("Hello", "hello", 1, 1),  # case
        ("don't!", "DONT", 1, 1),  # punctuation
        ("caf\u00e9", "caf", 1, 1),  # outside a-z, 0-9
        ("!!", "", 1, 1),  # nothing left of either
        ("!!", "a", 0, 0),
        ("kitten", "sitting", 0, 1 - 3 / 7),  # Levenshtein's textbook pair: 3 edits
        ("flaw", "lawn", 0, 1 - 2 / 4),
        ("abc", "", 0, 0),
        ("10", "1O", 0, 0.5),
    ],
)
def test_grades_by_hand(label, text, right, similarity):
    assert grade(label, text) == (right, pytest.approx(similarity))


def test_edit_distance_is_the_shortest_path():
    """Against a search over all edits, for all words of up to four letters of two."""
    every = ["".join(t) for n in range(4) for t in itertools.product("ab", repeat=n)]

    def neighbours(w):
        for i in range(len(w) + 1):
            yield from (w[:i] + c + w[i:] for c in "ab")
            if i < len(w):
                yield w[:i] + w[i + 1 :]
                yield from (w[:i] + c + w[i + 1 :] for c in "ab")

    for start in every:
        distance, frontier = {start: 0}, [start]
        while frontier:
            following = []
            for w in frontier:
                for v in neighbours(w):
                    if len(v) <= 6 and v not in distance:
                        distance[v] = distance[w] + 1
                        following.append(v)
            frontier = following
        assert all(edit_distance(start, end) == distance[end] for end in every)
