"""BLIP-2: batches against one prompt at a time, M once per image against once per question, ITM's pairs.

    python benchmarks/blip2.py

Random BLIP-2s (tests/tiny_blip2.py; --width and --layers of the language model), 10 new tokens, greedy or by
5 beams, as eval_vqa.py asks. `transformers` is its own generate, one question at a time, M each time, as a
script after its model card does. Interleaved; medians. On a GPU in bf16, on a CPU in fp32. So small a model
is limited by the calls of operations, one by one as long as sixteen at once: what batches save here is an
upper bound for a CPU, and about right for a GPU whose language model is far from filling it.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
import transformers

sys.path[0] = str(Path(__file__).parents[1])  # else `import blip2` and `import lora` are the benchmarks

import blip2  # noqa: E402
import evaluation  # noqa: E402
from tests import tiny_blip2  # noqa: E402

QUESTIONS = ["what is this?", "how many dogs are there in the picture?", "is it a yellow bus?", "why?"]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=4, help="of 4 questions each")
    p.add_argument("--width", type=int, default=64, help="of the language model")
    p.add_argument("--layers", type=int, default=2, help="of the language model")
    p.add_argument("--rounds", type=int, default=3, help="timed rounds of each")
    p.add_argument("--threads", type=int, default=2, help="of torch")
    args = p.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sizes = dict(width=args.width, layers=args.layers)
        model = blip2.Blip2(str(tiny_blip2.write(f"{folder}/opt", **sizes)), dtype, device)
        first = blip2.Blip2(str(tiny_blip2.write(f"{folder}/r", "retrieval")), dtype, device, retrieval=True)
    images = torch.randn(args.images, 3, tiny_blip2.SIDE, tiny_blip2.SIDE, device=device, dtype=dtype)
    of_image = [i for i in range(args.images) for _ in QUESTIONS]
    prompts = [f"Question: {q} Short answer:" for _ in range(args.images) for q in QUESTIONS]
    captions = first.caption_tokens(QUESTIONS)
    pairs = torch.cartesian_prod(torch.arange(args.images), torch.arange(len(QUESTIONS))).flip(1).to(device)

    def settings(beams: int) -> dict:
        return dict(max_new_tokens=10, min_new_tokens=10, num_beams=beams)  # 10: the same work for all

    def ours(beams: int, batch: int) -> None:
        model.generate(model.queries(model.vision(images))[of_image], prompts, settings(beams), batch)

    def theirs(beams: int) -> None:
        holder = torch.full((1, tiny_blip2.QUERIES), model.config.image_token_index, device=device)
        for i, prompt in zip(of_image, prompts, strict=True):
            ids = torch.tensor([model.prompt_tokens([prompt])[0]], device=device)
            given = dict(pixel_values=images[i][None], input_ids=torch.cat([holder, ids], 1))
            model.model.generate(**given, generation_config=model._generation(settings(beams)))

    def m_per_question() -> None:
        for i in of_image:
            model.vision(images[i][None])

    def match(batch: int) -> None:
        first.match_pairs(first.vision(images), captions, pairs, batch)

    work = {}
    for beams in (1, 5):
        work[f"{beams} beams", "transformers, one by one"] = lambda beams=beams: theirs(beams)
        for batch in (1, 16):
            work[f"{beams} beams", f"batch {batch}"] = lambda beams=beams, batch=batch: ours(beams, batch)
    work["M", "per question, one by one"] = m_per_question
    work["M", "once per image, all at once"] = lambda: model.vision(images)
    for batch in (1, 16):
        work["ITM pairs", f"batch {batch}"] = lambda batch=batch: match(batch)
    seconds = {key: [] for key in work}
    for _ in range(args.rounds + 1):  # the first is the warm-up
        for key, run in work.items():
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[key].append(time.perf_counter() - start)
    medians = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    slowest = {}
    for (what, _), value in medians.items():
        slowest.setdefault(what, value)
    rows = [
        [what, how, len(prompts) / value, slowest[what] / value] for (what, how), value in medians.items()
    ]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    print(
        f"{name}, {args.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(evaluation.table(["what", "how", "per second", "times as fast"], rows))
    print(json.dumps({**vars(args), "per_second": {" / ".join(r[:2]): round(r[2], 2) for r in rows}}))


if __name__ == "__main__":
    main()
