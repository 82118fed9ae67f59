"""BLIP-2 (arXiv 2301.12597) with a vision tower M that ViSFT has tuned; the rest of it stays as it was.

    blip = Blip2("Salesforce/blip2-opt-2.7b", torch.bfloat16, "cuda")   # or a local folder; OPT or T5 inside
    set_M, notes = blip.attach("lora.safetensors")      # set_M("after"): M with dW; "before": as it was
    seen = blip.see(images)                     # (B, Q, D_lm): M's tokens, as the language model sees them
    prompts, notes = blip.prompts("Question: {} Short answer:", ["What is this?"] * B)
    texts = blip.generate(seen, prompts, GENERATION)

    blip = Blip2("Salesforce/blip2-itm-vit-g", ..., retrieval=True)     # its first stage: ITC and ITM

The models are transformers'. What is done here instead of in their `generate` and `forward`: M runs once per
image however many texts go with it, and prompts have LAVIS's tokens whatever the folder's tokenizer adds.
"""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from safetensors import safe_open
from timm.data import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torchvision import transforms
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

import lora

# Small beside M and the language model; transformers by itself keeps the Q-Former only, and only under fp16
FP32 = ["query_tokens", "qformer", "language_projection", "vision_projection", "text_projection", "itm_head"]
FP32 += ["word_embeddings", "position_embeddings"]  # of the first stage's captions
LANGUAGE_MODELS = ("opt", "t5")  # those of the released BLIP-2s
QUESTION_TOKENS, CAPTION_TOKENS = 32, 35  # of LAVIS's models: max_txt_len; retrieval
RERANKED, OUT = 128, -100.0  # k_test of LAVIS's retrieval, and the score of what it does not re-rank
WORDS = 50  # of a question or caption, at most: LAVIS's text processors
LENGTH_PENALTY = {"opt": 0.0, "t5": -1.0}  # of answers: the defaults of LAVIS's predict_answers


class Blip2:
    """A frozen BLIP-2 of transformers'.

    path: a folder, or a name on the hub; retrieval: its first stage instead of the one with a language model
    dtype: of M and the language model, cast as they are read; the rest stays fp32 (LAVIS)
    transform: PIL image -> (3, h, w), LAVIS's: squashed to the model's square, bicubic, CLIP's statistics
    Raises FileNotFoundError, or ValueError for a model of another kind or weights that are not all there.
    """

    def __init__(self, path: str, dtype: torch.dtype, device: torch.device | str, retrieval: bool = False):
        config = read_config(path, retrieval)
        theirs = getattr(transformers, architecture(retrieval))
        model_class = type(theirs.__name__, (theirs,), {"_keep_in_fp32_modules_strict": FP32})
        self.model, loading = model_class.from_pretrained(path, dtype=dtype, output_loading_info=True)
        check_loading("--blip2", path, loading)
        self.model.to(device).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.config, self.dtype, self.device = config, dtype, self.model.device
        self.files = [str(p) for p in sorted(Path(path).glob("*.safetensors"))]  # if it is a folder
        self.version = f"{path} {getattr(config, '_commit_hash', None) or ''}".strip()
        self.protocol = {"blip2": self.version, "prompt tokens at most": QUESTION_TOKENS}
        self.is_opt = not retrieval and config.text_config.model_type == "opt"
        side = config.vision_config.image_size
        squash = transforms.Resize((side, side), transforms.InterpolationMode.BICUBIC)
        normalize = transforms.Normalize(OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
        self.transform = transforms.Compose([squash, transforms.ToTensor(), normalize])

    # --- M and dW

    def attach(self, path: str | Path | None) -> tuple[Callable[[str], None], list[str]]:
        """Load dW, if any, into M; returns a function that sets M to `before` or `after`, and notes.

        transformers' fused qkv has timm's rows (q, k, v), so names are all that differs. EVA-ViT-G has 40
        blocks and BLIP-2 uses 39: dW of the last has no place here. Raises ValueError if dW does not fit.
        """
        tower, notes = lora.attentions(self.model), []
        if path:
            spare = spare_block(path, self.config)
            lora.load(tower, path, without=spare)
            if spare:
                notes.append(f"{path}: {spare} left out: BLIP-2 stops after {len(tower['blocks'])} blocks")

        def set_M(variant: str) -> None:
            lora.switch(tower, on=variant == "after")

        return set_M, notes

    @torch.no_grad()
    def vision(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, N, D), all tokens, after BLIP-2's own LayerNorm. Raises FloatingPointError."""
        return finite(self.model.vision_model(images.to(self.device, self.dtype)).last_hidden_state)

    def _see(self, f: Tensor) -> Tensor:
        """f (B, N, D) -> (B, Q, D_q): the Q-Former's queries, which have attended to f."""
        queries = self.model.query_tokens.expand(len(f), -1, -1)
        return self.model.qformer(query_embeds=queries, encoder_hidden_states=f).last_hidden_state

    # --- a language model behind M

    def see(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) -> (B, Q, D_lm): what the language model sees of the images, by M as it is set."""
        return self.queries(self.vision(images))

    @torch.no_grad()
    def queries(self, f: Tensor) -> Tensor:
        """f (B, N, D) -> (B, Q, D_lm): what the language model sees of the images."""
        return self.model.language_projection(self._see(f)).to(f.dtype)

    def prompt_tokens(self, prompts: Sequence[str]) -> list[list[int]]:
        """LAVIS's: OPT's begin with </s>, T5's end with it; cut on the right to QUESTION_TOKENS in all."""
        ids = self.tokenizer(list(prompts), add_special_tokens=False).input_ids
        config = self.config.text_config
        if self.is_opt:
            return [[config.bos_token_id, *t[: QUESTION_TOKENS - 1]] for t in ids]
        return [[*t[: QUESTION_TOKENS - 1], config.eos_token_id] for t in ids]

    def prompts(self, template: str, questions: Sequence[str]) -> tuple[list[str], list[str]]:
        """The template with each question in the place of its {}, as LAVIS cleans it; notes."""
        prompts = [template.replace("{}", clean_question(question)) for question in questions]
        ids = self.tokenizer(prompts, add_special_tokens=False).input_ids
        cut = sum(len(t) >= QUESTION_TOKENS for t in ids)
        return prompts, [f"{cut} prompts were cut to {QUESTION_TOKENS} tokens"] * bool(cut)

    @torch.no_grad()
    def generate(self, queries: Tensor, prompts: Sequence[str], settings: dict, batch: int = 16) -> list[str]:
        """The language model's continuations, each up to the first line break.

        queries: (n, Q, D_lm); settings: of transformers' GenerationConfig; batch: prompts at a time
        """
        texts = []
        for at in range(0, len(prompts), batch):
            ids, mask = self._pad(self.prompt_tokens(prompts[at : at + batch]), left=self.is_opt)
            q = queries[at : at + batch]
            words = self.model.language_model.get_input_embeddings()(ids)  # (b, T, D_lm)
            x = torch.cat([q, words.to(q.dtype)], 1)  # (b, Q + T, D_lm)
            mask = torch.cat([mask.new_ones(q.shape[:2]), mask], 1)
            out = self.model.language_model.generate(
                inputs_embeds=x, attention_mask=mask, generation_config=self._generation(settings)
            )
            texts += self.tokenizer.batch_decode(out, skip_special_tokens=True)
        return [text.strip() for text in texts]

    def _generation(self, settings: dict) -> GenerationConfig:
        config = self.config.text_config
        stop, start = config.eos_token_id, getattr(config, "decoder_start_token_id", None)
        if self.is_opt:  # LAVIS: stops at the line break that ended each training text, not at </s>
            stop = self.tokenizer("\n", add_special_tokens=False).input_ids[0]
        special = dict(eos_token_id=stop, pad_token_id=config.pad_token_id, decoder_start_token_id=start)
        return GenerationConfig(do_sample=False, **special, **settings)

    def _pad(self, ids: list[list[int]], left: bool = False) -> tuple[Tensor, Tensor]:
        """(n, T) tokens and their mask, padded to the longest."""
        side = "left" if left else "right"
        rows = pad_sequence([torch.tensor(t) for t in ids], True, self.tokenizer.pad_token_id, side)
        mask = pad_sequence([torch.ones(len(t), dtype=torch.long) for t in ids], True, 0, side)
        return rows.to(self.device), mask.to(self.device)

    # --- retrieval with the first stage

    @torch.no_grad()
    def image_features(self, f: Tensor) -> Tensor:
        """f (B, N, D) -> (B, Q, d), L2-normalized float32. ITC: a caption's largest similarity over the Q."""
        return F.normalize(self.model.vision_projection(self._see(f)), dim=-1)

    def caption_tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """[CLS], the words of `clean_caption`, [SEP]; at most CAPTION_TOKENS."""
        cleaned = [clean_caption(caption) for caption in captions]
        return self.tokenizer(cleaned, truncation=True, max_length=CAPTION_TOKENS).input_ids

    @torch.no_grad()
    def text_features(self, tokens: list[list[int]], batch: int = 256) -> Tensor:
        """(n, d), L2-normalized float32."""
        features = []
        for at in range(0, len(tokens), batch):
            ids, mask = self._pad(tokens[at : at + batch])
            embedded = self.model.embeddings(input_ids=ids)
            seen = self.model.qformer(query_embeds=embedded, query_length=0, attention_mask=mask)
            features.append(F.normalize(self.model.text_projection(seen.last_hidden_state[:, 0]), dim=-1))
        return torch.cat(features)

    @torch.no_grad()
    def match_pairs(self, f: Tensor, tokens: list[list[int]], pairs: Tensor, batch: int = 64) -> Tensor:
        """ITM of (n, 2) pairs of a caption's and an image's row: (n,). f: (I, N, D)"""
        logits = [self.match(f[p[:, 1]], [tokens[t] for t in p[:, 0].tolist()]) for p in pairs.split(batch)]
        return torch.cat(logits) if logits else torch.zeros(0, device=self.device)

    @torch.no_grad()
    def match(self, f: Tensor, tokens: list[list[int]]) -> Tensor:
        """ITM: (n,) the logit of `match`, mean over the queries, of n images f (n, N, D) and n captions."""
        ids, mask = self._pad(tokens)
        queries = self.model.query_tokens.expand(len(f), -1, -1)
        mask = torch.cat([mask.new_ones(queries.shape[:2]), mask], 1)
        seen = self.model.qformer(
            query_embeds=self.model.embeddings(input_ids=ids, query_embeds=queries),
            query_length=queries.shape[1],
            attention_mask=mask,
            encoder_hidden_states=f,
        ).last_hidden_state[:, : queries.shape[1]]
        return self.model.itm_head(seen)[..., 1].mean(1)


# --- ranking, as LAVIS


def contrast(images: Tensor, texts: Tensor) -> Tensor:
    """ITC: (T, I) cosine similarities, the largest over the queries. images: (I, Q, d); texts: (T, d)"""
    return torch.stack([(texts @ queries.T).amax(1) for queries in images], 1)


def candidates(similarity: Tensor, k: int = RERANKED) -> tuple[Tensor, Tensor]:
    """(T, I) bool, twice: each caption's k most similar images, and each image's k most similar captions."""
    chosen = []
    for dim in (1, 0):
        top = similarity.topk(min(k, similarity.shape[dim]), dim).indices
        chosen.append(torch.zeros_like(similarity, dtype=torch.bool).scatter_(dim, top, True))
    return chosen[0], chosen[1]


def rerank(similarity: Tensor, chosen: Tensor, matched: Tensor) -> Tensor:
    """(T, I): ITM + ITC where chosen, OUT elsewhere. matched: (T, I) ITM logits, read where chosen"""
    return torch.where(chosen, similarity + matched, OUT)


# --- what can be refused before anything is loaded


def architecture(retrieval: bool) -> str:
    return "Blip2ForImageTextRetrieval" if retrieval else "Blip2ForConditionalGeneration"


def check(path: str, lora_file: str | None, kind: str) -> dict:
    """Refuse what cannot work; returns LAVIS's prompt and decoding for questions, or kind `caption`."""
    config = read_config(path, retrieval=False)
    if lora_file:
        spare_block(lora_file, config)
    if kind == "caption":  # of COCO; it has none for NoCaps with OPT. No prompt before finetuning
        lengths = dict(min_new_tokens=8, max_new_tokens=30, length_penalty=1.0)
        return {"prompt": "a photo of", "beams": 5, **lengths}
    penalty = LENGTH_PENALTY[config.text_config.model_type]
    lengths = dict(min_new_tokens=1, max_new_tokens=10, length_penalty=penalty)
    return {"prompt": "Question: {} Short answer:", "beams": 5, **lengths}


def open_config(option: str, path: str, example: str) -> transformers.PretrainedConfig:
    """The config of any of transformers' models; option, example: for what is told. FileNotFoundError."""
    if Path(path).is_dir() and not (Path(path) / "config.json").is_file():
        raise FileNotFoundError(f"{option} {path}: no config.json in it")
    if not Path(path).is_dir() and path.count("/") != 1:
        raise FileNotFoundError(f"{option} {path}: neither a folder nor a name on the hub, such as {example}")
    try:
        return AutoConfig.from_pretrained(path)
    except Exception as error:  # no such folder, no network, not JSON, a type that transformers does not know
        why = f"neither a model's folder nor one on the hub that can be reached: {str(error).splitlines()[0]}"
        raise FileNotFoundError(f"{option} {path}: {why}") from error


def read_config(path: str, retrieval: bool) -> transformers.PretrainedConfig:
    """The model's config, before anything is loaded. Raises as Blip2 does."""
    wanted = architecture(retrieval)
    example = "Salesforce/blip2-itm-vit-g" if retrieval else "Salesforce/blip2-opt-2.7b"
    config = open_config("--blip2", path, example)
    name = (config.architectures or ["unknown"])[0]
    if config.model_type != "blip-2" or name != wanted:
        raise ValueError(f"--blip2 {path} is {name} ({config.model_type}), not {wanted} such as {example}")
    if not retrieval and (language := config.text_config.model_type) not in LANGUAGE_MODELS:
        supported = f"{' and '.join(LANGUAGE_MODELS)} are supported"
        raise ValueError(f"--blip2 {path}: its language model is {language}; {supported}")
    return config


def spare_block(path: str | Path, config: transformers.PretrainedConfig, spare: int = 1) -> str | None:
    """The name of a LoRA file's last block if BLIP-2 has one less. Raises ValueError if they do not fit.

    spare: how many blocks more than the model's tower the file may have
    """
    lora.read_header(path)
    with safe_open(path, "pt") as file:
        widths = {name: file.get_slice(name).get_shape()[-1] for name in file.keys() if "lora_A" in name}
    blocks = {int(n) for name in widths for n in re.findall(r"^blocks\.(\d+)\.", name)}
    width = max(widths.values(), default=0)
    depth, dim = config.vision_config.num_hidden_layers, config.vision_config.hidden_size  # the model's M
    if blocks != set(range(len(blocks))) or not 0 <= len(blocks) - depth <= spare or width != dim:
        tower = f"the tower of {config.model_type} has {depth} of {dim}"
        raise ValueError(f"{path} is of {len(blocks)} blocks of width {width}, {tower}")
    return f"blocks.{depth}." if len(blocks) > depth else None


def check_loading(option: str, path: str, loading: dict) -> None:
    """Raises ValueError if from_pretrained's report has weights that are missing, or LoRA."""
    alien = [name for name in loading["unexpected_keys"] if "lora_" in name]
    if wrong := [*loading["missing_keys"], *loading["mismatched_keys"], *alien]:
        raise ValueError(f"{option} {path}: {len(wrong)} weights are missing or do not fit: {wrong[:3]}")


def finite(f: Tensor) -> Tensor:
    """M's features, if they are finite. Raises FloatingPointError."""
    if not f.isfinite().all():
        why = "M's features are not finite"
        raise FloatingPointError(f"{why}: try --backbone-dtype fp32, or another LoRA")
    return f


def clean_caption(caption: str) -> str:
    """As LAVIS's blip_caption: lower case, some punctuation for a space, at most WORDS words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', " ", caption.lower()).split()[:WORDS])


def clean_question(question: str) -> str:
    """As LAVIS's blip_question: lower case, some punctuation dropped, at most WORDS words."""
    return " ".join(re.sub(r'[.!"()*#:;~]', "", question.lower()).rstrip(" ").split(" ")[:WORDS])
