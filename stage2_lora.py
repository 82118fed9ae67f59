"""Stage 2, Algorithm 2: tune LoRA on the q and v of M through the frozen task heads of stage 1.

The paper's run (8 GPUs, eva_g, 50k steps), and one on a laptop:

    torchrun --nproc_per_node 8 stage2_lora.py
    python stage2_lora.py --model eva_mini --weights random --coco DIR --heads out --iters 200

Reads COCO 2017 in --coco, the backbone in --weights and a head for each task in --heads. Writes
OUT/lora.safetensors and, every --save-every steps, OUT/lora_NNNNNN.safetensors (the paper's default ViSFT is
lora_005000; with --full OUT/M.safetensors in their place), OUT/last.pt (to --resume from) and OUT/log.jsonl.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import files
import lora
import tasks
import training
from backbone import add_backbone_options, backbone_settings, check_backbone_options, open_backbone
from data.stream import batches
from ranks import add_process_options, launch, refuse_unused, start, to_device

DEFAULT = ["detection", "segmentation", "captioning"]  # of --tasks; Table 12, first row


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = p.add_argument
    add("--heads", nargs="+", default=["out"], help="head files, or folders with [TASK/]TASK.safetensors")
    add("--tasks", nargs="+", choices=tasks.NAMES, default=DEFAULT, help="Table 12")
    probs = "P(alpha) of the --tasks (Sec. 4.2: 0.4 captioning, 0.3 others)"
    add("--probs", nargs="+", type=float, help=probs)
    add("--rank", type=int, default=64, help="r of LoRA (Sec. 3.2: 64; Table 9)")
    add("--lora-alpha", type=float, default=1.0, help="LoRA's scale x rank (the release: 1; Eq. 1: the rank)")
    of_blocks = "train dW of blocks FIRST to LAST alone, from 0 (default: all; a control: not in the paper)"
    add("--lora-blocks", nargs=2, type=int, metavar=("FIRST", "LAST"), help=of_blocks)
    add("--full", action="store_true", help="all of M in LoRA's place (a control: not in the paper)")
    words = "captioning: the words of the head; others are <unk> (default: the data must make the same words)"
    add("--head-words", action="store_true", help=words)
    add("--head-lr-ratio", type=float, default=0.0, help="heads' rate / --lr (0 = frozen: Alg. 2; Table 11)")
    equal = "bring each step's gradient to the norm at which it is clipped (a control: not in the paper)"
    add("--equal-gradients", action="store_true", help=equal)
    add("--iters", type=int, default=50_000, help="steps (Sec. 4.2: 50k)")
    add("--batch", nargs="+", default=[], metavar="N|TASK=N", help="per process (Sec. 4.2: 1; captioning 8)")
    add("--lr", type=float, default=1e-5, help="peak learning rate of LoRA (Sec. 4.2: 1e-5)")
    blocks = (
        "recompute so many of the first blocks in the backward pass (Sec. 4.2: checkpointing; 0 = none; "
        "auto: as few as the GPU's memory asks, CPU: all); the gradients are the same"
    )
    add("--checkpoint-blocks", default="auto", metavar="N|auto", help=blocks)
    add("--out", default="out/visft", help="folder for all that this run writes")
    add_backbone_options(p)  # --model, --weights, --no-cls, --imagenet-norm
    tasks.add_size_options(p)  # --image-scale, --size
    training.add_options(p)  # --coco and what of it is used; --warmup, --resume, --save-every, --compile, ...
    add_process_options(p)  # --backbone-dtype, --workers, --seed
    args = p.parse_args()
    args.probs = task_probs(args.tasks, args.probs)
    args.batch = task_batches(args.tasks, args.batch)
    training.check_options(args)
    tasks.check_size(args)
    check_backbone_options(args)
    if args.full:
        refuse_unused(args, p, "rank lora_alpha lora_blocks", "with --full, which tunes all of M")
    if args.head_words and "captioning" not in args.tasks:
        raise ValueError("--head-words has no effect without captioning among the --tasks")
    if args.rank < 1 or not args.lora_alpha > 0 or not args.head_lr_ratio >= 0:
        raise ValueError("--rank must be at least 1, --lora-alpha positive, --head-lr-ratio at least 0")
    if args.checkpoint_blocks != "auto" and not args.checkpoint_blocks.isdecimal():
        raise ValueError(f"--checkpoint-blocks {args.checkpoint_blocks}: expected auto or a number of blocks")
    known = backbone_settings(args) | {"size": args.size}  # what both stages must agree on
    head_files = {t: tasks.find_head(args.heads, t, known) for t in args.tasks}
    for task in args.tasks:
        tasks.annotations(task, args)

    # --- setup
    ranks = start(args, p)
    out = Path(args.out)

    # --- data
    own = head_files["captioning"] if args.head_words else None
    words = own and files.read_header(own, "head")["config"]["vocabulary"]
    datasets = tasks.open_streams(args.tasks, args, words)

    # --- model
    # What trains is fp32; with --full that is M, which 16 bit would round back to where it was
    backbone = open_backbone(args, ranks, torch.float32 if args.full else ranks.dtype)
    heads = {task: tasks.load_head(path, backbone.dim).to(ranks.device) for task, path in head_files.items()}
    for task, dataset in datasets.items():
        tasks.check_M(head_files[task], backbone.fingerprint)
        tasks.check_classes(heads[task], dataset.classes, head_files[task])
    # Alg. 2, line 1: initialize LoRA weights dW, freeze M (a Backbone is always frozen) and T_n*
    torch.manual_seed(args.seed)  # whatever was built before, dW starts from the seed
    if args.full:
        trained = dict(backbone.vit.requires_grad_().named_parameters())
    else:
        lora.attach(backbone.vit, args.rank, args.lora_alpha)
        trained = in_blocks(lora.parameters(backbone.vit), args.lora_blocks, len(backbone.vit.blocks))
    groups = [{"params": list(trained.values()), "peak": args.lr}]
    # Sec. 4.2: gradient checkpointing. The gradients are the same, bit for bit, for any number of blocks
    backbone.recompute = None if args.checkpoint_blocks == "auto" else int(args.checkpoint_blocks)
    if args.compile:
        backbone.compile_blocks()
    M = training.parallel(backbone, ranks.device)
    T = {task: head.requires_grad_(False).eval() for task, head in heads.items()}  # eval: no dropout noise
    for task, head in heads.items() if args.head_lr_ratio > 0 else ():  # Table 11: trained as in stage 1
        peak = args.lr * args.head_lr_ratio
        groups.append({"params": list(head.requires_grad_().train().parameters()), "peak": peak})
        # What is not trained by gradient, too: running means
        trained |= {f"{task}.{name}": value for name, value in head.state_dict().items()}
        T[task] = training.parallel(head, ranks.device)
    moments = 8 * sum(p.numel() for group in groups for p in group["params"])  # AdamW's, bytes
    backbone.memory = ranks.free_memory() - moments

    # --- optimizer
    optimizer = training.sharded_adamw(groups)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)

    # --- resume
    made_of = {f"{task} data": dataset.fingerprint for task, dataset in datasets.items()}
    made_of |= {f"{task} head": files.fingerprint(path) for task, path in head_files.items()}
    made_of |= {"M": files.fingerprint(args.weights)}
    may_change = training.MAY_CHANGE | {"checkpoint_blocks"}  # the same numbers, bit for bit
    run = training.Checkpoint(out, args, trained, optimizer, scaler, made_of, may_change)
    first = run.load() if args.resume else 0
    log = training.Log(out, first, args.iters, args.log_every)
    log.say(sorted({note for dataset in datasets.values() for note in dataset.notes}))

    # Alg. 2, line 3, for all steps at once: from the seed, so all ranks agree without a word between them
    order = task_order(args.tasks, args.probs, args.iters, args.seed)
    streams = {}
    for task, dataset in datasets.items():
        seen = order[:first].count(task)  # batches
        streams[task] = batches(dataset, args.batch[task], backbone, ranks, seen, args.workers)

    # --- loop
    for step in range(first, args.iters):  # Alg. 2, line 2
        factor = training.learning_rate(step, 1.0, args.warmup, args.iters)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]

        task = order[step]  # Alg. 2, line 3: select an in-domain task T_n* according to P(alpha_n)
        images, valid, y = to_device(log.next(streams[task]), ranks.device)
        ranks.seed(args.seed, step)  # what a loss draws at random, the same when resumed

        with ranks.autocast():
            f = M(images, valid)  # Alg. 2, line 4: extract feature f' = M(x; dW) for input x

        loss, parts = T[task](f, y)  # Alg. 2, line 5: minimize L'_n(y, T_n(f')) on D to obtain dW*
        parts["grad_norm"] = training.minimize(loss, optimizer, scaler, args.equal_gradients)

        save = (step + 1) % args.save_every == 0 or step + 1 == args.iters
        log.add(step + 1, task, y, loss, parts, factor * args.lr, save)

        # --- save
        if save:  # the checkpoint last: what is resumed from it is complete
            if ranks.rank == 0:
                header = dict(step=step + 1, **backbone_settings(args))
                if args.full:
                    files.save(backbone.vit.state_dict(), out / "M.safetensors")
                for name in (f"lora_{step + 1:06d}", "lora") if not args.full else ():
                    lora.save(backbone.vit, out / f"{name}.safetensors", **header)
                if args.head_lr_ratio > 0:
                    for task, head in heads.items():
                        tasks.save_head(head, out / f"{task}.safetensors", task, **header)
            run.save(step + 1)
    log.say([f"{out}: {'M' if args.full else 'dW'}* after {args.iters} steps"])


def in_blocks(parameters: dict, wanted: list[int] | None, depth: int) -> dict:
    """A and B of blocks FIRST to LAST; dW of the others stays 0, their A and B frozen. Raises ValueError."""
    first, last = wanted or (0, depth - 1)
    if not 0 <= first <= last < depth:
        raise ValueError(f"--lora-blocks {first} {last}: M has the blocks 0 to {depth - 1}")
    inside = {n: p for n, p in parameters.items() if first <= int(n.split(".")[1]) <= last}
    for name in parameters.keys() - inside.keys():
        parameters[name].requires_grad_(False)
    return inside


def task_probs(chosen: list[str], probs: list[float] | None) -> list[float]:
    """P(alpha_n), by default the paper's, rescaled. Raises ValueError if --probs is no distribution."""
    if len(set(chosen)) < len(chosen):
        raise ValueError(f"--tasks names a task twice: {' '.join(chosen)}")
    if probs is None:
        probs = [tasks.find(task).prob for task in chosen]
        return [prob / sum(probs) for prob in probs]
    if len(probs) != len(chosen):
        raise ValueError(f"--probs has {len(probs)} values for {len(chosen)} --tasks ({' '.join(chosen)})")
    if not (min(probs) >= 0 and abs(sum(probs) - 1) < 1e-6):
        raise ValueError(f"--probs must be at least 0 and sum to 1, got {probs} (sum {sum(probs):g})")
    return [prob / sum(probs) for prob in probs]


def task_order(chosen: list[str], probs: list[float], iters: int, seed: int) -> list[str]:
    """The task of every step, drawn from P(alpha_n)."""
    return np.random.default_rng(seed).choice(chosen, size=iters, p=probs).tolist()


def task_batches(chosen: list[str], values: list[str]) -> dict[str, int]:
    """Batch per task, from `--batch 2` or `--batch detection=1 captioning=8`. Raises ValueError for else."""
    sizes = {task: tasks.find(task).batch2 for task in chosen}
    for value in ",".join(values).split(",") if values else []:
        task, _, number = value.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (task and task not in chosen):
            raise ValueError(f"--batch {value}: expected N or TASK=N, N >= 1, TASK one of {' '.join(chosen)}")
        sizes.update({task: int(number)} if task else dict.fromkeys(chosen, int(number)))
    return sizes


if __name__ == "__main__":
    launch(main)
