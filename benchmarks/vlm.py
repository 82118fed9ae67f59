"""LLaVA: batches against one question at a time, M once per image, memory of loading; LLaVA-1.5 computed.

    python benchmarks/vlm.py

A random LLaVA (tests/tiny_vlm.py) with 5 questions on each image, 8 new tokens, greedy, as eval_vqa.py asks.
`transformers` is its own generate, one question at a time, M each time, as a script after its model card.
Interleaved; medians. On a GPU in fp16, on a CPU in fp32. So small a model is limited by the calls of
operations, which batches share: an upper bound for a CPU, and about right for a GPU that is far from full.

Loading is of a LLaVA of 230 MB in 16 bit, in a process of its own: the most private memory that it had while
loading, over the weights' (pages of the file, which are mapped and can be dropped at any time, apart). A type
that is the file's is not even copied.

LLaVA-1.5-7B's memory and arithmetic are COMPUTED, on torch's fake tensors, from transformers' own forward:
one image, and a batch of questions of 60 tokens with their image's 576 before them, in fp16.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import torch
import transformers

sys.path[0] = str(Path(__file__).parents[1])  # else `import vlm` and `import lora` are the benchmarks

import evaluation  # noqa: E402
import vlm  # noqa: E402
from tests import tiny_vlm  # noqa: E402

QUESTIONS = [
    "what is this?",
    "how many dogs are there in the picture?",
    "is it a yellow bus?",
    "why?",
    "where?",
]
PROMPT = 60  # tokens of a chat with a question in it


def private_memory() -> int:
    """Bytes of this process that no file holds."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


def load_here(folder: str, dtype: str) -> None:
    """In a process of its own: prints the most private memory while loading, over the weights' bytes."""
    vlm.read(folder)
    before, most, done = private_memory(), 0, threading.Event()

    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = vlm.Vlm(folder, getattr(torch, dtype), "cpu")
    done.set()
    watcher.join()
    weights = sum(p.nbytes for p in model.model.parameters())
    print(json.dumps({"weights": weights, "peak": max(0, max(most, private_memory()) - before) / weights}))


def loading(folder: Path, width: int, layers: int) -> list[list]:
    """Rows: the type on the disk, the type that is loaded, MB, peak over weights."""
    rows = []
    tiny_vlm.write(folder, width=width, layers=layers)
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float16)
    model.save_pretrained(folder)  # halved
    del model
    for dtype in ("float16", "bfloat16"):
        command = [sys.executable, __file__, "--load", str(folder), dtype]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found = json.loads(done.stdout.splitlines()[-1])
        rows.append(["float16", dtype, found["weights"] / 1e6, found["peak"]])
    return rows


def full_size(batch: int) -> list[list]:
    """Rows of LLaVA-1.5-7B: what, GB, TFLOP; transformers' defaults are its sizes."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    sys.path.append(str(Path(__file__).parent))  # after the root, for lora
    from memory import LiveBytes

    config = transformers.LlavaConfig(image_token_index=32000)
    config.text_config.vocab_size = 32064
    with torch.device("meta"):
        model = transformers.AutoModelForImageTextToText.from_config(config, dtype=torch.float16)
    with FakeTensorMode(), torch.no_grad(), LiveBytes() as live:
        model._apply(
            lambda t: torch.empty(t.shape, dtype=torch.float16 if t.is_floating_point() else t.dtype)
        )
        weights = live.now
        f = torch.stack([*model.model.get_image_features(torch.zeros(1, 3, 336, 336).half()).pooler_output])
        M, before = (live.peak - weights) / 1e9, live.flops
        x = torch.zeros(batch, f.shape[1] + PROMPT, config.text_config.hidden_size).half()
        now = live.now - x.nbytes
        out = model.model.language_model(inputs_embeds=x, use_cache=True)
        peak, kept = (live.peak - now) / 1e9, (live.now - now - x.nbytes - out.last_hidden_state.nbytes) / 1e9
        return [
            ["weights", weights / 1e9, None],
            [f"M and the projector, an image: {f.shape[1]} tokens", M, before / 1e12],
            [f"the language model, {batch} questions", peak, (live.flops - before) / 1e12],
            ["of which kept for the answers", kept, None],
        ]


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--images", type=int, default=4, help="of 5 questions each")
    p.add_argument("--width", type=int, default=64, help="of the language model")
    p.add_argument("--layers", type=int, default=2, help="of the language model")
    p.add_argument("--rounds", type=int, default=5, help="timed rounds of each")
    p.add_argument(
        "--loaded", type=int, nargs=2, default=[1024, 12], help="width and layers of what is loaded"
    )
    p.add_argument("--threads", type=int, default=2, help="of torch")
    p.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.load:
        return load_here(*args.load)
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    with tempfile.TemporaryDirectory() as folder:
        small = tiny_vlm.write(f"{folder}/small", width=args.width, layers=args.layers)
        model = vlm.Vlm(str(small), dtype, device)
        loaded = loading(Path(folder) / "big", *args.loaded)
    images = torch.randn(args.images, 3, tiny_vlm.SIDE, tiny_vlm.SIDE, device=device, dtype=dtype)
    of_image = [i for i in range(args.images) for _ in QUESTIONS]
    prompts = QUESTIONS * args.images
    settings = dict(num_beams=1, max_new_tokens=8, min_new_tokens=8)  # 8: the same work for all

    def ours(batch: int) -> None:
        model.generate(model.see(images)[of_image], prompts, settings, batch)

    def theirs() -> None:
        for i, prompt in zip(of_image, prompts, strict=True):
            ids = torch.tensor(model.prompt_tokens([prompt]), device=device)
            given = dict(pixel_values=images[i][None], input_ids=ids, attention_mask=torch.ones_like(ids))
            model.model.generate(**given, generation_config=model._generation(settings))

    def m_one_by_one(which) -> None:
        for i in which:
            model.see(images[i][None])

    work = {
        ("questions", "transformers, one by one"): theirs,
        ("questions", "batch 1"): lambda: ours(1),
        ("questions", "batch 16"): lambda: ours(16),
        ("M", "per question, one by one"): lambda: m_one_by_one(of_image),
        ("M", "once per image, one by one"): lambda: m_one_by_one(range(args.images)),
        ("M", "once per image, all at once"): lambda: model.see(images),
    }
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
    rows = [[*key, len(prompts) / value, slowest[key[0]] / value] for key, value in medians.items()]
    name = torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or "cpu"
    print(
        f"{name}, {args.threads} threads, torch {torch.__version__}, transformers {transformers.__version__}"
    )
    print(evaluation.table(["what", "how", "questions per second", "times as fast"], rows))
    columns = ["file", "loaded as", "weights, MB", "most private memory / weights"]
    print("\n" + evaluation.table(columns, loaded))
    computed = full_size(16)
    print("\n" + evaluation.table(["LLaVA-1.5-7B in fp16, computed", "GB", "TFLOP"], computed))
    answer = {"per_second": {" / ".join(r[:2]): round(r[2], 2) for r in rows}, "loading": loaded}
    print(json.dumps({**vars(args), **answer, "computed": computed}))


if __name__ == "__main__":
    main()
