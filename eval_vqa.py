"""Algorithm 3 with a multimodal model as T_o: visual question answering (Table 7), before and after ViSFT.

    torchrun --nproc_per_node 8 eval_vqa.py --blip2 Salesforce/blip2-opt-2.7b --kind vqav2 \\
        --compare out/visft/lora_005000.safetensors --images coco/val2014 \\
        --questions v2_OpenEnded_mscoco_val2014_questions.json \\
        --annotations v2_mscoco_val2014_annotations.json
    torchrun --nproc_per_node 8 eval_vqa.py --vlm llava-hf/llava-1.5-7b-hf --kind pope --compare LORA \\
        --images coco/val2014 --questions coco_pope_{random,popular,adversarial}.json
    python eval_vqa.py --kind vqav2 --questions Q.json --annotations A.json --results before.json after.json

BLIP-2's defaults are LAVIS's zero-shot configuration, which gives OPT-2.7B the paper's 51.9 on VQAv2's val.
TextVQA and POPE, and --vlm, are beyond the paper. The last form scores answers that are there already.
Answers are kept as they come, so that --resume goes on after a kill. Writes OUT/results_{before,after}.json
in the official format (POPE: a .jsonl for each setting), and OUT/result.json.
"""

import argparse
from pathlib import Path

import numpy as np
import torch.distributed as dist
from tqdm import tqdm

import answers
import evaluation
import files
from data import vqa
from data.pictures import Pictures, collate, locate
from ranks import launch, start

NAMES = {"vqav2": "VQAv2", "okvqa": "OK-VQA", "gqa": "GQA"}  # Table 7's columns
NAMES |= {"textvqa": "TextVQA", "pope": "POPE"}
LAVIS, OFFICIAL = {"lavis": vqa.lavis_accuracy}, {"official": vqa.official_accuracy}
RULES = {"vqav2": LAVIS | OFFICIAL, "okvqa": LAVIS | OFFICIAL, "gqa": {"exact match": vqa.exact_match}}
RULES |= {"textvqa": {"textvqa": vqa.textvqa_accuracy} | OFFICIAL}


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--kind", choices=NAMES, required=True, help="which set's files and rules")
    questions = "official JSON (GQA: testdev_balanced_questions; POPE: its settings' files)"
    add("--questions", required=True, nargs="+", metavar="FILE", help=questions)
    add(
        "--annotations", metavar="FILE", help="official JSON of VQAv2 and OK-VQA (others: in their questions)"
    )
    add("--images", metavar="DIR", help="COCO's, GQA's or TextVQA's images")
    by = "by spaCy (auto: OK-VQA's, as LAVIS)"
    add("--lemmatize", choices=["auto", "yes", "no"], default="auto", help=by)
    answers.add_generation_options(p, prompt="with one {} for the question")
    evaluation.add_options(p, "out/vqa", batch=16)
    args = p.parse_args()
    names = [f"POPE {vqa.setting(file)}" for file in args.questions] if args.kind == "pope" else []
    names = names or [NAMES[args.kind]]
    if len(set(names)) < len(args.questions):
        raise ValueError(
            "--questions takes one file; of POPE's three settings, each once, by their own names"
        )
    variants = evaluation.check_options(args)
    variants = answers.check_generation_options(args, variants, args.kind, len(names))
    if (args.kind in ("vqav2", "okvqa")) != bool(args.annotations):
        raise ValueError("--annotations is needed, but with --kind gqa, textvqa, pope: they have the answers")
    if not args.results and args.prompt.count("{}") != 1:
        raise ValueError(f"--prompt needs one {{}} for the question, got {args.prompt!r}")
    lemmatized = args.lemmatize == "yes" or (args.lemmatize == "auto" and args.kind == "okvqa")
    lemmas = vqa.lemmatizer() if lemmatized else None
    if args.lemmatize == "yes" and lemmas is None:
        how = "python -m spacy download en_core_web_sm"
        raise ValueError(f"--lemmatize yes needs spaCy and its en_core_web_sm: {how}")

    # --- setup
    ranks = start(args, p)

    # --- data
    read = (vqa.read(args.kind, file, args.annotations)[: args.limit] for file in args.questions)
    sets = dict(zip(names, read, strict=True))
    if empty := [
        file for file, questions in zip(args.questions, sets.values(), strict=True) if not questions
    ]:
        raise ValueError(f"{empty[0]}: no questions in it")
    E = [q for questions in sets.values() for q in questions]
    if args.results:
        asked = [*sets.values()] * len(variants)
        said = [vqa.read_results(file, q, args.kind) for file, q in zip(args.results, asked, strict=True)]
        parts = [said[at : at + len(sets)] for at in range(0, len(said), len(sets))]
        said = {
            v: {k: a for part in p for k, a in part.items()} for v, p in zip(variants, parts, strict=True)
        }
        return report(args, sets, said, lemmas, {}, [])
    of_image: dict[str, list[vqa.Question]] = {}  # an image goes through M once for all its questions
    for q in E:
        of_image.setdefault(q.image, []).append(q)
    pictures, groups = locate(args.images, of_image, args.questions[0]), list(of_image.values())

    # --- model
    model = answers.open_model(args, ranks)
    set_M, notes = model.attach(args.lora)
    settings = answers.generation_settings(args)
    protocol = {"generation": settings, "prompt": args.prompt, **model.protocol}
    prompts, of_prompts = model.prompts(args.prompt, [q.text for q in E])
    prompts = dict(zip([q.id for q in E], prompts, strict=True))

    # --- resume
    hashes = [files.sha256(file) for file in (*args.questions, args.lora) if file]
    # Alg. 3, line 1: initialize results list R_o, with what a killed run has left behind
    R_o = answers.Answers(args, ranks, {**protocol, "files": hashes})
    done = {i for i, group in enumerate(groups) if R_o.have([q.id for q in group], variants)}
    batches = evaluation.loader(Pictures(pictures, model.transform), args, ranks, collate, done)

    # --- loop
    # Alg. 3, line 2: for x in E_o(x)
    for index, x, unread in tqdm(batches, NAMES[args.kind], disable=ranks.rank > 0):
        if unread:
            raise ValueError(next(iter(unread.values())))
        asked = [q.id for i in index for q in groups[i]]
        image_of = [at for at, i in enumerate(index) for _ in groups[i]]  # its place in x
        texts = {}
        for variant in variants:
            set_M(variant)
            f = model.see(x)[image_of]  # Alg. 3, line 3: extract feature f* = M(x; dW*) for input x
            # Alg. 3, line 4: predicting R_o = [R_o, T_o(f*)]
            texts[variant] = model.generate(f, [prompts[q] for q in asked], settings, args.batch)
        R_o.add(asked, texts)

    # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o) on E_o
    mine = range(ranks.rank, len(groups), ranks.world)
    everyones = R_o.gather(q.id for i in mine for q in groups[i])
    said = {variant: {q.id: everyones[q.id][variant] for q in E} for variant in variants}
    report(args, sets, said, lemmas, protocol, notes + of_prompts, model.files)


# --- save


def scores_of(kind: str, questions: list[vqa.Question], given: list[str]) -> dict[str, np.ndarray | float]:
    """By rule, and by rule and kind of answer: of each question, or one of all (POPE's precision and F1)."""
    if kind == "pope":
        return vqa.pope_scores(given, [q.answers[0] for q in questions])
    scores, kinds = {}, np.array([q.kind for q in questions])
    for rule, accuracy in RULES[kind].items():
        each = [accuracy(answer, q.answers) for answer, q in zip(given, questions, strict=True)]
        scores[rule] = np.array(each)
        parts = sorted(set(kinds) - {""})
        scores |= {f"{rule}, {part}": scores[rule][kinds == part] for part in parts}
    return scores


def report(args, sets: dict, said: dict[str, dict], lemmas, protocol: dict, notes: list, weights=()) -> None:
    """The official results files, the paper's table, every rule and answer type, OUT/result.json."""
    if dist.get_rank() > 0:
        return
    lemmatized = "spaCy en_core_web_sm" if lemmas else "no"
    counts = [f"{name}: {len(questions)} questions" for name, questions in sets.items()]
    notes = [*counts, f"answers lemmatized: {lemmatized}", *notes]
    if args.kind == "okvqa" and not lemmas:
        notes.append("LAVIS lemmatizes answers to OK-VQA: install spaCy and en_core_web_sm to do the same")
    for variant, given in {} if args.results else said.items():
        E = [q for questions in sets.values() for q in questions]
        for end, text in vqa.results(args.kind, E, given).items():
            files.write(path := Path(args.out) / f"results_{variant}{end}", text)
            notes.append(f"{path}: the answers")
    rows = []
    for name, questions in sets.items():
        scores = {}
        for variant, given in said.items():
            final = [lemmas(given[q.id]) if lemmas else given[q.id] for q in questions]
            scores[variant] = scores_of(args.kind, questions, final)
        for metric, score in scores[variant].items():
            of_variants = {variant: of_metrics[metric] for variant, of_metrics in scores.items()}
            n = None if np.ndim(score) else len(questions)
            rows.append(evaluation.result_row(name, metric, of_variants, n))
    print(*notes, sep="\n")
    first = [next(row for row in rows if row["set"] == name) for name in sets]
    title = f"{first[0]['metric']}, %" if args.vlm or args.kind in ("textvqa", "pope") else "Table 7, %"
    print(evaluation.table([title, *sets], [[v, *(row[v] for row in first)] for v in said]) + "\n")
    print(evaluation.rows_table(rows))
    protocol = {
        **protocol,
        "lemmatized": lemmatized,
        "rules": list(RULES.get(args.kind, ["POPE"])),
        "notes": notes,
    }
    paths = [*args.questions, args.annotations, args.lora, *(args.results or ()), *weights]
    evaluation.write_result(args, {"rows": rows, "protocol": protocol}, paths)


if __name__ == "__main__":
    launch(main)
