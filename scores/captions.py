"""CIDEr-D and BLEU-4 of one caption per image, as COCO's and NoCaps' servers count them.

The scorers and the PTB tokenizer are pycocoevalcap's. The tokenizer is a Java program; another one moves
CIDEr by more than ViSFT does, so without Java the scores have other names: `cider_simple_tok`,
`bleu4_simple_tok`.
"""

import re
import subprocess
import tempfile
from pathlib import Path
from unittest.mock import patch

from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer import ptbtokenizer

FEW = 100  # images; CIDEr weighs words by how many images' references have them


def caption_scores(references: dict, candidates: dict) -> dict:
    """Corpus scores as fractions (COCO prints them times 100).

    references: {image_id: its captions}; candidates: {image_id: one caption}
    Returns cider, bleu4; per_image, {image_id: its CIDEr}, whose mean is cider; notes, what the user should
    know. Without Java the names are cider_simple_tok and bleu4_simple_tok.
    Raises ValueError naming the images that lack a candidate or references, or are unknown.
    """
    check_images(references, candidates)
    if lacking := [i for i, captions in references.items() if not captions]:
        raise ValueError(f"{len(lacking)} images have no reference caption, the first is {lacking[0]}")
    name, notes = "", []
    tokenize = ptb_tokens
    if not has_java():
        name, tokenize = "_simple_tok", simple_tokens
        notes.append("no Java, so no PTB tokens: the scores are not comparable with published ones")
    if len(references) < FEW:
        notes.append(f"{len(references)} images are too few for CIDEr to mean much (of one it is 0)")
    references = tokenize(references)
    candidates = tokenize({i: [candidates[i]] for i in references})
    cider, per_image = Cider().compute_score(references, candidates)
    bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
    per_image = dict(zip(references, map(float, per_image), strict=True))
    return {f"cider{name}": float(cider), f"bleu4{name}": bleu[3], "per_image": per_image, "notes": notes}


def has_java() -> bool:
    try:  # macOS has a `java` that only says that there is none
        return subprocess.run(["java", "-version"], capture_output=True).returncode == 0
    except OSError:
        return False


def ptb_tokens(captions: dict) -> dict:
    """{id: captions} -> the same as lower-case Penn Treebank tokens without punctuation."""
    lines = {i: [{"caption": " ".join(caption.split())} for caption in c] for i, c in captions.items()}
    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    with tempfile.TemporaryDirectory() as folder:  # it writes beside its own file, which may be read-only
        (Path(folder) / jar.name).symlink_to(jar)
        utf8 = patch.dict("os.environ", LC_ALL="C.UTF-8")  # Java would read the file in the locale's encoding
        with utf8, patch.object(ptbtokenizer, "__file__", f"{folder}/ptbtokenizer.py"):
            tokens = ptbtokenizer.PTBTokenizer().tokenize(lines)
    count = sum(map(len, captions.values()))
    assert sum(map(len, tokens.values())) == count, f"Java's tokenizer did not answer for {count} captions"
    return tokens


def simple_tokens(captions: dict) -> dict:
    """The same by a rule of ours: runs of letters, digits and apostrophes."""
    return {i: [" ".join(re.findall(r"[\w']+", text.lower())) for text in c] for i, c in captions.items()}


def check_images(expected, predicted) -> None:
    """Raises ValueError naming images that have no prediction, and predictions for images not in the set."""
    for what, ids in (
        ("have no prediction", [i for i in expected if i not in predicted]),
        ("are predicted for, but are not in the annotations", [i for i in predicted if i not in expected]),
    ):
        if ids:
            shown = ", ".join(map(str, ids[:5])) + (", ..." if len(ids) > 5 else "")
            raise ValueError(f"{len(ids)} images {what}: {shown}")
