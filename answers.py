"""What the evaluations that have a language model write share: options, and answers kept as they come.

The models, blip2.Blip2 and vlm.Vlm, are asked alike: attach(LoRA), see(images), prompts(template, questions),
generate(seen, prompts, settings). check() of their modules knows their authors' prompts and decoding.
"""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from ranks import Ranks, gather

# --- generation


def add_generation_options(p: argparse.ArgumentParser, prompt: str) -> None:
    """The model, its prompt and how it writes; prompt: that option's help."""
    group = p.add_argument_group("generation (defaults: the model authors', as PAPER.md has them)")
    add, which = group.add_argument, group.add_mutually_exclusive_group()
    opt = "transformers' BLIP-2 with OPT or T5: a folder, or a name on the hub"
    which.add_argument("--blip2", metavar="DIR|NAME", help=opt)
    llavas = "or another of transformers': LLaVA, LLaVA-NeXT, PaliGemma, Idefics3, SmolVLM"
    which.add_argument("--vlm", metavar="DIR|NAME", help=llavas)
    add("--prompt", help=prompt)
    add("--beams", type=int, help="of the beam search, 1 = greedy (BLIP-2: 5; others: 1)")
    add("--max-new-tokens", type=int, help="of an answer, at most")
    add("--min-new-tokens", type=int, help="of an answer, at least")
    add("--length-penalty", type=float, help="of beams, 0 = off")
    repetition = "1 = off (LAVIS since 2023-12: 1.15 in captions)"
    add("--repetition-penalty", type=float, default=1.0, help=repetition)
    add("--resume", action="store_true", help="go on with the answers in --out")
    add("--results", nargs="+", metavar="FILE", help="score these instead of asking a model: [before] after")


def check_generation_options(
    args: argparse.Namespace, variants: list[str], kind: str, sets: int = 1
) -> list[str]:
    """Refuse what cannot work; returns the variants, which with --results are the files'.

    Leaves the model authors' prompt and decoding in args, where the user gave none.
    kind: of the questions, or `caption`; sets: of how many sets there is a results file each
    """
    if args.results:
        for option in ("blip2", "vlm", "images", "lora", "limit", "resume"):
            if getattr(args, option):
                raise ValueError(f"--results scores answers that are there: --{option} has no part in it")
        if (many := len(args.results)) not in (sets, 2 * sets):
            each = "one file, or two to compare" if sets == 1 else f"{sets} files, or {2 * sets} to compare"
            raise ValueError(f"--results takes {each}, got {many}")
        return ["after"] if many == sets else ["before", "after"]
    if not (args.blip2 or args.vlm) or not args.images:
        raise ValueError(
            "--blip2 or --vlm, and --images are needed, or --results to score answers that are there"
        )
    for name, value in _module(args).check(args.blip2 or args.vlm, args.lora, kind).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    limits = {"beams": 1, "min_new_tokens": 0, "max_new_tokens": max(1, args.min_new_tokens)}
    for name, least in limits.items():
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not args.repetition_penalty > 0:
        raise ValueError(f"--repetition-penalty must be positive, got {args.repetition_penalty}")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"--images {args.images}: no such folder")
    return variants


def _module(args: argparse.Namespace):
    """blip2 or vlm. They import transformers: seconds that --help need not wait."""
    if args.blip2:
        import blip2 as module
    else:
        import vlm as module
    return module


def open_model(args: argparse.Namespace, ranks: Ranks):
    """The model of --blip2 or --vlm on this rank's device."""
    module = _module(args)
    model_class = module.Blip2 if args.blip2 else module.Vlm
    return model_class(args.blip2 or args.vlm, ranks.dtype, ranks.device)


def generation_settings(args: argparse.Namespace) -> dict:
    """The options under transformers' names."""
    names = ("max_new_tokens", "min_new_tokens", "repetition_penalty")
    settings = {"num_beams": args.beams, **{name: getattr(args, name) for name in names}}
    return settings | ({"length_penalty": args.length_penalty} if args.beams > 1 else {})


class Answers:
    """OUT/answers_RANK.jsonl: this rank's answers as they come, and those that a killed run left behind.

    settings: what the answers depend on, a line at each start
    Raises ValueError if there are answers without --resume, or with it answers under other settings.
    """

    def __init__(self, args: argparse.Namespace, ranks: Ranks, settings: dict):
        out, settings = Path(args.out), json.loads(json.dumps(settings))
        paths = sorted(out.glob("answers_*.jsonl"))
        if paths and not args.resume:
            raise ValueError(f"--out {out} holds answers: pass --resume to go on with them, or another --out")
        self.of_item: dict = {}  # {item: {variant: answer}}
        for line in (line for path in paths for line in path.read_text().splitlines()):
            try:
                content = json.loads(line)
            except ValueError:  # cut off by a kill
                continue
            then = content.get("settings", settings)
            names = [name for name in {**then, **settings} if then.get(name) != settings.get(name)]
            if names:
                changed = "; ".join(f"{name} was {then.get(name)}, is {settings.get(name)}" for name in names)
                raise ValueError(f"--resume {out}: changed: {changed}; put it back, or take a new --out")
            if "item" in content:
                self.of_item[content["item"]] = content["answers"]
        out.mkdir(parents=True, exist_ok=True)
        dist.barrier()  # everyone has read
        path = out / f"answers_{ranks.rank}.jsonl"
        torn = path.exists() and not path.read_text().endswith("\n")
        self.file = open(path, "a")
        if torn:
            self.file.write("\n")
        self._write([{"settings": settings}])

    def have(self, items: Iterable, variants: list[str]) -> bool:
        return all(variant in self.of_item.get(item, ()) for item in items for variant in variants)

    def add(self, items: list, answers: dict[str, list]) -> None:
        """answers: {variant: one for each of the items}"""
        new = {item: {v: texts[i] for v, texts in answers.items()} for i, item in enumerate(items)}
        self.of_item |= new
        self._write([{"item": item, "answers": of_variants} for item, of_variants in new.items()])

    def gather(self, mine: Iterable) -> dict:
        """{item: {variant: answer}} of all ranks; mine: the items of this rank's share."""
        return gather({item: self.of_item[item] for item in mine})

    def _write(self, lines: list[dict]) -> None:
        self.file.write("".join(json.dumps(line) + "\n" for line in lines))
        self.file.flush()  # safe from a kill of this process, if not from one of the machine
