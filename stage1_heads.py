"""Stage 1, Algorithm 1: train one in-domain task head T_n on the frozen vision foundation model M.

The paper's run (8 GPUs, eva_g, 150k steps), and one on a laptop:

    torchrun --nproc_per_node 8 stage1_heads.py --task detection
    python stage1_heads.py --task detection --model eva_mini --weights random --coco DIR --iters 200

Reads COCO 2017 in --coco and the backbone in --weights. Writes OUT/TASK.safetensors (the head and all that is
needed to use it), OUT/last.pt (to --resume from) and OUT/log.jsonl. The tasks can be trained side by side.
"""

import argparse
from pathlib import Path

import torch

import backbone as vit
import common
import heads
from data import coco
from data.streams import annotation_file, open_stream
from heads import by_task

# Sec. 4.2; the batch is per GPU, of 8
PAPER = dict.fromkeys(("detection", "segmentation", "panoptic"), {"iters": 150_000, "batch": 1, "lr": 5e-5})
PAPER["captioning"] = {"iters": 100_000, "batch": 32, "lr": 4e-4}
PAPER["pose"] = {"iters": 60_000, "batch": 64, "lr": 5e-4}  # not in the paper; ViTPose's (210 epochs)


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=by_task.HEADS, required=True, help="which head to train (Table 1)")
    p.add_argument("--iters", type=int, help="steps (Sec. 4.2: 150k; captioning 100k)")
    p.add_argument("--batch", type=int, help="images per process and step (Sec. 4.2: 1; captioning 32)")
    p.add_argument("--lr", type=float, help="peak learning rate (Sec. 4.2: 5e-5; captioning 4e-4)")
    p.add_argument("--out", help="folder for all that this run writes (default: out/TASK)")
    p.add_argument("--save-every", type=int, default=5000, help="steps between checkpoints")
    common.add_training_options(p)
    args = p.parse_args()
    for name, value in PAPER[args.task].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"out/{args.task}"
    common.check_training_options(args)
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    annotation_file(args.task, args)

    # --- setup
    ranks = common.start(args)
    out = Path(args.out)

    # --- data
    dataset = open_stream(args.task, args)

    # --- model
    backbone = vit.load(args.model, args.weights, ranks.dtype, ranks.device, args.seed, not args.no_cls)
    if args.imagenet_norm:
        backbone.mean, backbone.std = vit.IMAGENET_NORM
    if args.compile:
        backbone.compile_blocks()
    # Alg. 1, line 1: initialize an in-domain task head T_n and freeze M (a Backbone is always frozen)
    torch.manual_seed(args.seed)
    head = by_task.HEADS[args.task](backbone.dim, dataset.classes).to(ranks.device).train()
    trained = dict(head.named_parameters())
    T = common.parallel(head, ranks.device)

    # --- optimizer
    optimizer = common.sharded_adamw([{"params": list(trained.values())}])
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)

    # --- resume
    state = head.state_dict()  # also what is not trained by gradient: running means
    run = common.Checkpoint(out, args, state, optimizer, scaler, data=dataset.fingerprint)
    first = run.load() if args.resume else 0
    log = common.Log(out, first, args.iters, args.log_every)
    log.say(dataset.notes)
    stream = coco.batches(dataset, args.batch, backbone, ranks, first, args.workers)

    # --- loop
    for step in range(first, args.iters):  # Alg. 1, line 2
        lr = common.learning_rate(step, args.lr, args.warmup, args.iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, valid, y = common.to_device(next(stream), ranks.device)
        ranks.seed(args.seed, step)  # dropout, the same when resumed

        with torch.no_grad(), ranks.autocast():
            f = backbone(images, valid)  # Alg. 1, line 3: extract feature f = M(x) for input x

        loss, parts = T(f, y)  # Alg. 1, line 4: minimize L_n(y, T_n(f)) on D to obtain T_n*
        parts["grad_norm"] = common.minimize(loss, optimizer, scaler)

        save = (step + 1) % args.save_every == 0 or step + 1 == args.iters
        log.add(step + 1, args.task, y, loss, parts, lr, save)

        # --- save
        if save:  # the checkpoint last: what is resumed from it is complete
            if ranks.rank == 0:
                header = dict(step=step + 1, **common.features_of(args))
                heads.save(head, out / f"{args.task}.safetensors", args.task, **header)
            run.save(step + 1)
    log.say([f"{out / args.task}.safetensors: T* after {args.iters} steps"])


if __name__ == "__main__":
    common.launch(main)
