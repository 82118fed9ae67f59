"""CIDEr and BLEU-4: published figures, the tokens, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest

from scores.captions import caption_scores, has_java, ptb_tokens
from tests.conftest import SHARED, needs_real_data


def read(*parts: str):
    return json.loads((SHARED / Path(*parts)).read_text())


@needs_real_data
@pytest.mark.skipif(not has_java(), reason="needs Java")
def test_published_caption_figures_come_out(capfd):
    expected = read("caption_eval", "expected.json")
    references = read("caption_eval", "clipscore_example", "refs.json")
    for name in ("good_captions.json", "bad_captions.json"):
        scores = caption_scores(references, read("caption_eval", "clipscore_example", name))
        wanted = expected[f"clipscore_example/{name}"]
        assert scores["cider"] == pytest.approx(wanted["CIDEr"], abs=5e-5)
        assert scores["bleu4"] == pytest.approx(wanted["Bleu_4"], abs=5e-5)
    folder = SHARED / "caption_eval" / "nlg_eval_example"
    hyp, *refs = ((folder / f"{n}.txt").read_text().splitlines() for n in ("hyp", "ref1", "ref2"))
    scores = caption_scores(dict(enumerate(zip(*refs, strict=True))), dict(enumerate(hyp)))
    wanted = expected["nlg_eval_example"]
    assert scores["cider"] == pytest.approx(wanted["CIDEr"], abs=5e-7)
    assert scores["bleu4"] == pytest.approx(wanted["Bleu_4"], abs=5e-7)
    assert np.mean(list(scores["per_image"].values())) == pytest.approx(scores["cider"])
    assert "2 images are too few" in scores["notes"][0]


@pytest.mark.skipif(not has_java(), reason="needs Java")
def test_captions_of_any_kind_keep_their_lines():
    """Line separators within a caption, and captions without a word, do not shift the others."""
    tokens = ptb_tokens({7: ["A\u2028dog's\nball.", ""], 3: ["Café, red!"], 5: [""]})
    assert tokens == {7: ["a dog 's ball", ""], 3: ["café red"], 5: [""]}


def test_without_java_the_scores_have_other_names(monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    assert not has_java()
    references = {
        i: [f"A {c} cat, sitting on the mat.", "the dog"] for i, c in enumerate(("red", "blue", "big"))
    }
    scores = caption_scores(references, {i: c[0].lower() for i, c in references.items()})
    assert {"cider_simple_tok", "bleu4_simple_tok"} < set(scores) and not {"cider", "bleu4"} & set(scores)
    assert scores["bleu4_simple_tok"] == pytest.approx(1) and "no Java" in scores["notes"][0]


def test_bad_captions_are_named():
    for candidates, says in (
        ({1: "a"}, "have no prediction: 2"),
        ({1: "a", 2: "b", 3: "c"}, "annotations: 3"),
    ):
        with pytest.raises(ValueError, match=says):
            caption_scores({1: ["a"], 2: ["b"]}, candidates)
    with pytest.raises(ValueError, match="no reference caption, the first is 2"):
        caption_scores({1: ["a"], 2: []}, {1: "a", 2: "b"})
