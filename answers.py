"""What the evaluations that have a language model write share: options, and answers kept as they come."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

import torch.distributed as dist

from ranks import Ranks, gather

# --- generation


def add_generation_options(p: argparse.ArgumentParser, least: int, most: int, length_penalty: str) -> None:
    """--blip2 and how its language model writes; least, most: tokens; length_penalty: the option's help"""
    add = p.add_argument_group("generation").add_argument
    blip2 = "transformers' BLIP-2 with OPT or T5: a folder, or a name on the hub"
    add("--blip2", metavar="DIR|NAME", help=blip2)
    add("--beams", type=int, default=5, help="of the beam search (LAVIS: 5; 1 = greedy)")
    add("--max-new-tokens", type=int, default=most, help="of an answer, at most")
    add("--min-new-tokens", type=int, default=least, help="of an answer, at least")
    add("--length-penalty", type=float, help=length_penalty)
    repetition = "1 = off (LAVIS since 2023-12: 1.15 in captions)"
    add("--repetition-penalty", type=float, default=1.0, help=repetition)
    add("--resume", action="store_true", help="go on with the answers in --out")
    add("--results", nargs="+", metavar="FILE", help="score these instead of asking a model: [before] after")


def check_generation_options(args: argparse.Namespace, variants: list[str]) -> list[str]:
    """Refuse what cannot work; returns the variants, which with --results are the files'."""
    if args.results:
        for option in ("blip2", "images", "lora", "limit", "resume"):
            if getattr(args, option):
                raise ValueError(f"--results scores answers that are there: --{option} has no part in it")
        if len(args.results) > 2:
            raise ValueError(f"--results takes one file, or two to compare, got {len(args.results)}")
        return ["after"] if len(args.results) == 1 else ["before", "after"]
    if not args.blip2 or not args.images:
        raise ValueError("--blip2 and --images are needed, or --results to score answers that are there")
    limits = {"beams": 1, "min_new_tokens": 0, "max_new_tokens": max(1, args.min_new_tokens)}
    for name, least in limits.items():
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    if not args.repetition_penalty > 0:
        raise ValueError(f"--repetition-penalty must be positive, got {args.repetition_penalty}")
    if not Path(args.images).is_dir():
        raise FileNotFoundError(f"--images {args.images}: no such folder")
    from blip2 import read_config, spare_block  # transformers: seconds that --help need not wait

    config = read_config(args.blip2, retrieval=False)
    if args.lora:
        spare_block(args.lora, config)
    return variants


def generation_settings(args: argparse.Namespace, length_penalty: float) -> dict:
    """transformers' names; length_penalty: if the option does not say"""
    names = ("max_new_tokens", "min_new_tokens", "repetition_penalty")
    settings = {"num_beams": args.beams, **{name: getattr(args, name) for name in names}}
    if args.beams > 1:
        settings["length_penalty"] = length_penalty if args.length_penalty is None else args.length_penalty
    return settings


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
