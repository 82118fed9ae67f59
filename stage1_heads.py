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

import feature_cache
import files
import tasks
import training
from backbone import add_backbone_options, backbone_settings, check_backbone_options, open_backbone
from data.stream import batches
from ranks import add_process_options, launch, refuse_unused, start, to_device


def main() -> None:
    # --- options
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--task", choices=tasks.NAMES, required=True, help="which head to train (Table 1)")
    p.add_argument("--iters", type=int, help="steps (Sec. 4.2: 150k; captioning 100k)")
    p.add_argument("--batch", type=int, help="images per process and step (Sec. 4.2: 1; captioning 32)")
    p.add_argument("--lr", type=float, help="peak learning rate (Sec. 4.2: 5e-5; captioning 4e-4)")
    p.add_argument("--out", help="folder for all that this run writes (default: out/TASK)")
    kept = "keep M's features of the images in this folder: M sees each but once; needs --size"
    p.add_argument("--cache", metavar="DIR", help=kept)
    tasks.add_head_options(p)  # --queries, --layers, --points, --dropout
    add_backbone_options(p)  # --model, --weights, --no-cls, --imagenet-norm
    tasks.add_size_options(p)  # --image-scale, --size
    training.add_options(p)  # --coco and what of it is used; --warmup, --resume, --save-every, --compile, ...
    add_process_options(p)  # --backbone-dtype, --workers, --seed
    args = p.parse_args()
    task = tasks.find(args.task)
    for name in ("iters", "batch", "lr"):
        if getattr(args, name) is None:
            setattr(args, name, getattr(task, name))
    args.out = args.out or f"out/{args.task}"
    training.check_options(args)
    tasks.check_size(args)
    if args.batch < 1:
        raise ValueError(f"--batch must be at least 1, got {args.batch}")
    if args.cache and not args.size:
        raise ValueError("--cache needs --size: augmented images are never twice the same")
    if args.cache:
        refuse_unused(args, p, "skip_bad_images", "with --cache, which needs every image")
    sizes = tasks.head_sizes(args.task, args)
    check_backbone_options(args)
    tasks.annotations(args.task, args)

    # --- setup
    ranks = start(args, p)
    out = Path(args.out)

    # --- data
    dataset = tasks.open_stream(args.task, args)

    # --- model
    backbone = open_backbone(args, ranks)
    if args.compile:
        backbone.compile_blocks()
    # Alg. 1, line 1: initialize an in-domain task head T_n and freeze M (a Backbone is always frozen)
    torch.manual_seed(args.seed)
    head = task.Head(backbone.dim, dataset.classes, **sizes).to(ranks.device).train()
    trained = dict(head.named_parameters())
    T = training.parallel(head, ranks.device)

    # --- optimizer
    optimizer = training.sharded_adamw([{"params": list(trained.values())}])
    scaler = torch.amp.GradScaler(ranks.device.type, enabled=ranks.dtype == torch.float16)

    # --- resume
    state = head.state_dict()  # also what is not trained by gradient: running means
    made_of = {"data": dataset.fingerprint, "M": files.fingerprint(args.weights)}
    run = training.Checkpoint(out, args, state, optimizer, scaler, made_of, training.MAY_CHANGE | {"cache"})
    first = run.load() if args.resume else 0
    log = training.Log(out, first, args.iters, args.log_every)
    log.say(dataset.notes)
    kept = feature_cache.of_stream(args, dataset, backbone, ranks) if args.cache else None  # (n, D, H, W)
    dataset.seen = kept is None
    stream = batches(dataset, args.batch, backbone, ranks, first, args.workers)

    # --- loop
    for step in range(first, args.iters):  # Alg. 1, line 2
        lr = training.learning_rate(step, args.lr, args.warmup, args.iters)
        for group in optimizer.param_groups:
            group["lr"] = lr
        images, valid, y = to_device(log.next(stream), ranks.device)
        ranks.seed(args.seed, step)  # dropout, the same when resumed

        with torch.no_grad(), ranks.autocast():
            # Alg. 1, line 3: extract feature f = M(x) for input x
            f = backbone(images, valid) if kept is None else feature_cache.look_up(kept, dataset, y, ranks)

        loss, parts = T(f, y)  # Alg. 1, line 4: minimize L_n(y, T_n(f)) on D to obtain T_n*
        parts["grad_norm"] = training.minimize(loss, optimizer, scaler)

        save = (step + 1) % args.save_every == 0 or step + 1 == args.iters
        log.add(step + 1, args.task, y, loss, parts, lr, save)

        # --- save
        if save:  # the checkpoint last: what is resumed from it is complete
            if ranks.rank == 0:
                header = dict(step=step + 1, size=args.size, M=backbone.fingerprint)
                header |= backbone_settings(args)
                tasks.save_head(head, out / f"{args.task}.safetensors", args.task, **header)
            run.save(step + 1)
    log.say([f"{out / args.task}.safetensors: T* after {args.iters} steps"])


if __name__ == "__main__":
    launch(main)
