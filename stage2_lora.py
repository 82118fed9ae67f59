"""Stage 2, Algorithm 2: tune LoRA on the q and v of M through the frozen task heads of stage 1.

    torchrun --nproc_per_node 8 stage2_lora.py                        # the paper's run: 8 GPUs, eva_g, 50k steps
    python stage2_lora.py --model eva_mini --weights random --coco DIR --heads out --tasks detection --iters 200 --warmup 20

Reads COCO 2017 in --coco, the backbone in --weights and one head per task in --heads. Writes OUT/lora.safetensors and, at
every --save-every steps, OUT/lora_NNNNNN.safetensors (the paper's default ViSFT is lora_005000), OUT/last.pt (to --resume
from) and OUT/log.jsonl.
"""

import argparse
from pathlib import Path

import numpy as np
import torch

import backbone as vit
import common
import heads
import lora
from data import coco

PAPER = {"detection": {"prob": 0.3, "batch": 1}}  # Sec. 4.2; batch is per GPU, of 8


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--heads", nargs="+", default=["out"], help="stage 1's head files, or folders that hold TASK.safetensors "
                   "or TASK/TASK.safetensors (default: out)")  # fmt: skip
    p.add_argument("--tasks", nargs="+", choices=PAPER, default=list(PAPER), help="in-domain tasks to learn from (Table 12)")
    p.add_argument("--probs", nargs="+", type=float, help="P(alpha), one for each of --tasks (Sec. 4.2: captioning 0.4, "
                   "detection 0.3, segmentation 0.3; of fewer tasks, these rescaled)")  # fmt: skip
    p.add_argument("--rank", type=int, default=64, help="r of LoRA (Sec. 3.2: 64; Table 9)")
    p.add_argument("--lora-alpha", type=float, default=1.0, help="the update is scaled by this / rank (the authors' released "
                   "weights: 1; Eq. 1 as printed: the rank)")  # fmt: skip
    p.add_argument("--head-lr-ratio", type=float, default=0.0, help="learning rate of the heads relative to LoRA's (0 = heads "
                   "frozen, Algorithm 2; Table 11: 0, 0.1, 1)")  # fmt: skip
    p.add_argument("--iters", type=int, default=50_000, help="steps (Sec. 4.2: 50k)")
    p.add_argument("--batch", nargs="+", default=[], metavar="N|TASK=N", help="images per process and step, for all "
                   "tasks or for one (Sec. 4.2: 1; captioning 8)")  # fmt: skip
    p.add_argument("--lr", type=float, default=1e-5, help="peak learning rate of LoRA (Sec. 4.2: 1e-5)")
    p.add_argument("--no-recompute", action="store_true", help="keep all activations instead of gradient checkpointing")
    p.add_argument("--out", default="out/visft", help="folder for everything this run writes (default: out/visft)")
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints (Sec. 4.2: 5k)")
    common.add_training_options(p)
    args = p.parse_args()
    args.probs = task_probs(args.tasks, args.probs)
    args.batch = task_batches(args.tasks, args.batch)
    common.check_training_options(args)
    if args.rank < 1 or not args.lora_alpha > 0 or not args.head_lr_ratio >= 0:
        raise ValueError("--rank must be at least 1, --lora-alpha positive, --head-lr-ratio at least 0")
    head_files = {task: heads.find(args.heads, task) for task in args.tasks}
    for path in head_files.values():
        heads.check_made_with(path, common.features_of(args))
    for task in args.tasks:
        coco.annotation_file(args.coco, task, args.split)

    # --- setup
    ranks = common.start(args)
    out = Path(args.out)

    # --- model
    backbone = vit.load(args.model, args.weights, ranks.dtype, ranks.device, args.seed, use_cls=not args.no_cls)
    backbone.recompute = not args.no_recompute  # gradient checkpointing (Sec. 4.2)
    norm = coco.IMAGENET_NORM if args.imagenet_norm else (backbone.mean, backbone.std)
    task_heads = {task: heads.load(path, backbone.dim).to(ranks.device) for task, path in head_files.items()}

    # --- data
    exclude = coco.read_ids(args.exclude_images) if args.exclude_images else ()
    options = dict(seed=args.seed, scale=args.image_scale, fraction=args.data_fraction, exclude=exclude)
    options["skip_bad"] = args.skip_bad_images
    datasets = {task: coco.DATASETS[task](args.coco, norm, args.split, **options) for task in args.tasks}
    for task, dataset in datasets.items():
        heads.check_categories(task_heads[task], dataset.categories, head_files[task])
    if ranks.rank == 0:
        print(*(note for dataset in datasets.values() for note in dataset.data.notes), sep="\n", flush=True)
        out.mkdir(parents=True, exist_ok=True)

    # Alg. 2, line 1: initialize LoRA weights dW, freeze M (Backbone is born frozen) and T_n*, n in {1, ..., N}
    lora.attach(backbone.vit, args.rank, args.lora_alpha)
    trained = lora.parameters(backbone.vit)
    groups = [{"params": list(trained.values()), "peak": args.lr}]
    for task, head in task_heads.items():
        head.requires_grad_(args.head_lr_ratio > 0).eval()  # no dropout: its noise would only reach dW
        if args.head_lr_ratio > 0:
            groups.append({"params": list(head.parameters()), "peak": args.lr * args.head_lr_ratio})
            trained |= {f"{task}.{name}": parameter for name, parameter in head.named_parameters()}
    M = common.parallel(backbone, ranks.device)
    T = {task: common.parallel(head, ranks.device) if args.head_lr_ratio > 0 else head for task, head in task_heads.items()}

    # --- optimizer
    optimizer = common.sharded_adamw(groups)
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)

    # --- resume
    fingerprints = {task: dataset.fingerprint for task, dataset in datasets.items()}
    state = dict(args=args, trained=trained, optimizer=optimizer, scaler=scaler, data=fingerprints)
    first = common.resume(out, **state) if args.resume else 0
    log = common.Log(out, first, args.iters, args.log_every)

    # Alg. 2, line 3, for all steps at once: from the seed, so the same on every rank without a word between them
    schedule = np.random.default_rng(args.seed).choice(args.tasks, size=args.iters, p=args.probs)
    streams = {
        task: coco.batches(
            dataset, args.batch[task], backbone.patch, ranks.rank, ranks.world, start=int((schedule[:first] == task).sum()),
            workers=args.workers, pin=ranks.device.type == "cuda",
        )
        for task, dataset in datasets.items()
    }  # fmt: skip

    # --- loop
    for step in range(first, args.iters):  # Alg. 2, line 2
        factor = common.learning_rate(step, 1.0, args.warmup, args.iters)
        for group in optimizer.param_groups:
            group["lr"] = factor * group["peak"]

        task = str(schedule[step])  # Alg. 2, line 3: select an in-domain task T_n* according to P(alpha_n)
        images, valid, y = common.to_device(next(streams[task]), ranks.device)

        with ranks.autocast():
            f = M(images, valid)  # Alg. 2, line 4: extract feature f' = M(x; dW) for input x

        loss, parts = T[task](f, y)  # Alg. 2, line 5: minimize L'_n(y, T_n(f')) to obtain dW*
        parts["grad_norm"] = common.minimize(loss, optimizer, scaler)

        due = (step + 1) % args.save_every == 0 or step + 1 == args.iters
        log.add(step + 1, task, y, loss, parts, factor * args.lr, due)

        # --- save
        if due:
            common.save(out, step + 1, **state)
            if ranks.rank == 0:
                header = dict(step=step + 1, **common.features_of(args))
                for name in (f"lora_{step + 1:06d}", "lora"):
                    lora.save(backbone.vit, out / f"{name}.safetensors", **header)
                if args.head_lr_ratio > 0:
                    for name, head in task_heads.items():
                        heads.save(head, out / f"{name}.safetensors", name, **header)
    if ranks.rank == 0:
        print(f"{out / 'lora.safetensors'}: dW* after {args.iters} steps")


def task_probs(tasks: list[str], probs: list[float] | None) -> list[float]:
    """P(alpha_n) for each task; the paper's, rescaled, by default. Raises ValueError if --probs is not a distribution."""
    if len(set(tasks)) < len(tasks):
        raise ValueError(f"--tasks names a task twice: {' '.join(tasks)}")
    if probs is None:
        probs = [PAPER[task]["prob"] for task in tasks]
        return [prob / sum(probs) for prob in probs]
    if len(probs) != len(tasks):
        raise ValueError(f"--probs has {len(probs)} values for {len(tasks)} --tasks ({' '.join(tasks)})")
    if not (min(probs) >= 0 and abs(sum(probs) - 1) < 1e-6):
        raise ValueError(f"--probs must be at least 0 and sum to 1, got {' '.join(map(str, probs))} (sum {sum(probs):g})")
    return [prob / sum(probs) for prob in probs]


def task_batches(tasks: list[str], values: list[str]) -> dict[str, int]:
    """Batch per task from `--batch 2` or `--batch detection=1 captioning=8`. Raises ValueError for anything else."""
    batches = {task: PAPER[task]["batch"] for task in tasks}
    for value in ",".join(values).split(",") if values else []:
        task, _, number = value.rpartition("=")
        if not number.isdecimal() or int(number) < 1 or (task and task not in tasks):
            raise ValueError(f"--batch {value}: expected N or TASK=N, N at least 1 and TASK one of {' '.join(tasks)}")
        batches.update({task: int(number)} if task else dict.fromkeys(tasks, int(number)))
    return batches


if __name__ == "__main__":
    common.launch(main)
