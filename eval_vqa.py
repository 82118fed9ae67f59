"""Algorithm 3 with BLIP-2 as T_o: zero-shot visual question answering (Table 7), before and after ViSFT.

    torchrun --nproc_per_node 8 eval_vqa.py --blip2 Salesforce/blip2-opt-2.7b --kind vqav2 \\
        --compare out/visft/lora_005000.safetensors --images coco/val2014 \\
        --questions v2_OpenEnded_mscoco_val2014_questions.json \\
        --annotations v2_mscoco_val2014_annotations.json
    python eval_vqa.py --kind vqav2 --questions Q.json --annotations A.json --results before.json after.json

The defaults are LAVIS's zero-shot configuration, which gives BLIP-2 OPT-2.7B the paper's 51.9 on VQAv2's val.
The second form scores answers that are there already. Answers are kept as they come, so that --resume goes on
after a kill. Writes OUT/results_{before,after}.json in the official format, and OUT/result.json.
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
RULES = {"lavis": vqa.lavis_accuracy, "official": vqa.official_accuracy}
LENGTH_PENALTY = {"opt": 0.0, "t5": -1.0}  # the defaults of LAVIS's predict_answers


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--kind", choices=NAMES, required=True, help="which set's files and rules")
    add("--questions", required=True, metavar="FILE", help="official JSON (GQA: testdev_balanced_questions)")
    add("--annotations", metavar="FILE", help="official JSON (GQA has its answers beside its questions)")
    add("--images", metavar="DIR", help="COCO's or GQA's images")
    add("--prompt", default="Question: {} Short answer:", help="with one {} (LAVIS)")
    by = "by spaCy (auto: OK-VQA's, as LAVIS)"
    add("--lemmatize", choices=["auto", "yes", "no"], default="auto", help=by)
    penalty = "of beams, 0 = off (default, LAVIS: 0 with OPT, -1 with T5)"
    answers.add_generation_options(p, least=1, most=10, length_penalty=penalty)
    evaluation.add_options(p, "out/vqa", batch=16)
    args = p.parse_args()
    variants = answers.check_generation_options(args, evaluation.check_options(args))
    if (args.kind == "gqa") == bool(args.annotations):
        raise ValueError("--annotations is needed, but with --kind gqa, whose questions have their answers")
    if args.prompt.count("{}") != 1:
        raise ValueError(f"--prompt needs one {{}} for the question, got {args.prompt!r}")
    lemmatized = args.lemmatize == "yes" or (args.lemmatize == "auto" and args.kind == "okvqa")
    lemmas = vqa.lemmatizer() if lemmatized else None
    if args.lemmatize == "yes" and lemmas is None:
        how = "python -m spacy download en_core_web_sm"
        raise ValueError(f"--lemmatize yes needs spaCy and its en_core_web_sm: {how}")

    # --- setup
    ranks = start(args, p)

    # --- data
    E = vqa.read(args.kind, args.questions, args.annotations)[: args.limit]
    if args.results:
        said = [vqa.read_results(path, E) for path in args.results]
        return report(args, E, dict(zip(variants, said, strict=True)), lemmas, {}, [])
    of_image: dict[str, list[vqa.Question]] = {}  # an image goes through M once for all its questions
    for q in E:
        of_image.setdefault(q.image, []).append(q)
    pictures, groups = locate(args.images, of_image, args.questions), list(of_image.values())

    # --- model
    import blip2  # transformers: seconds that --help need not wait

    blip = blip2.Blip2(args.blip2, ranks.dtype, ranks.device)
    set_M, notes = blip.attach(args.lora)
    settings = answers.generation_settings(args, LENGTH_PENALTY[blip.config.text_config.model_type])
    protocol = {"generation": settings, "prompt": args.prompt, "prompt tokens at most": blip2.QUESTION_TOKENS}
    prompts = {q.id: args.prompt.replace("{}", blip2.clean_question(q.text)) for q in E}

    # --- resume
    hashes = [files.sha256(file) for file in (args.questions, args.lora) if file]
    # Alg. 3, line 1: initialize results list R_o, with what a killed run has left behind
    R_o = answers.Answers(args, ranks, {**protocol, "blip2": blip.version, "files": hashes})
    done = {i for i, group in enumerate(groups) if R_o.have([q.id for q in group], variants)}
    batches = evaluation.loader(Pictures(pictures, blip.transform), args, ranks, collate, done)

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
            f = blip.vision(x)  # Alg. 3, line 3: extract feature f* = M(x; dW*) for input x
            queries = blip.queries(f)[image_of]
            # Alg. 3, line 4: predicting R_o = [R_o, T_o(f*)]
            texts[variant] = blip.generate(queries, [prompts[q] for q in asked], settings, args.batch)
        R_o.add(asked, texts)

    # Alg. 3, line 6: accumulate results, Metric(E_o(y), R_o) on E_o
    mine = range(ranks.rank, len(groups), ranks.world)
    everyones = R_o.gather(q.id for i in mine for q in groups[i])
    said = {variant: {q.id: everyones[q.id][variant] for q in E} for variant in variants}
    if cut := blip.count_cut(list(prompts.values())):
        notes.append(f"{cut} prompts were cut to {blip2.QUESTION_TOKENS} tokens")
    report(args, E, said, lemmas, {**protocol, "blip2": blip.version}, notes, blip.files)


# --- save


def report(args, E, said: dict[str, dict], lemmas, protocol: dict, notes: list[str], weights=()) -> None:
    """The official results files, the paper's table, every rule and answer type, OUT/result.json."""
    if dist.get_rank() > 0:
        return
    name, rules = NAMES[args.kind], {"exact match": vqa.exact_match} if args.kind == "gqa" else RULES
    lemmatized = "spaCy en_core_web_sm" if lemmas else "no"
    notes = [f"{name}: {len(E)} questions", f"answers lemmatized: {lemmatized}", *notes]
    if args.kind == "okvqa" and not lemmas:
        notes.append("LAVIS lemmatizes answers to OK-VQA: install spaCy and en_core_web_sm to do the same")
    scores = {}
    for variant, given in said.items():
        if not args.results:
            path = Path(args.out) / f"results_{variant}.json"
            files.write_json(path, vqa.results(args.kind, given))
            notes.append(f"{path}: the answers")
        final = [lemmas(given[q.id]) if lemmas else given[q.id] for q in E]
        for rule, accuracy in rules.items():
            score = [accuracy(answer, q.answers) for answer, q in zip(final, E, strict=True)]
            scores.setdefault(rule, {})[variant] = np.array(score)
    rows, kinds = [], np.array([q.kind for q in E])
    for rule, of_variants in scores.items():
        rows.append(evaluation.result_row(name, rule, of_variants))
        for kind in sorted(set(kinds)):
            part = {variant: score[kinds == kind] for variant, score in of_variants.items()}
            rows.append(evaluation.result_row(name, f"{rule}, {kind}", part))
    print(*notes, sep="\n")
    print(evaluation.table(["Table 7, %", name], [[variant, rows[0][variant]] for variant in said]) + "\n")
    print(evaluation.rows_table(rows))
    protocol = {**protocol, "lemmatized": lemmatized, "rules": list(rules), "notes": notes}
    paths = [args.questions, args.annotations, args.lora, *(args.results or ()), *weights]
    evaluation.write_result(args, {"rows": rows, "protocol": protocol}, paths)


if __name__ == "__main__":
    launch(main)
