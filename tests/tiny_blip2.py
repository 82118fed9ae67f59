"""Random BLIP-2s of half a million parameters, with tokenizers trained on a few lines: no download."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2ForImageTextRetrieval,
    PreTrainedTokenizerFast,
)

TEXT = [
    "Question: what is this? Short answer: a red star and a blue circle\n",
    "a photo of two people who are riding their bikes on the street near a yellow bus",
    "how many dogs are there in the picture? yes no one two three four white black wood",
]
QUERIES, SIDE, BLOCKS = 8, 56, 3


def byte_tokenizer(specials: list[str], template: str | None, **names) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as OPT's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=specials, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(TEXT, trainer)
    if template:
        pairs = [(token, tokenizer.token_to_id(token)) for token in specials]
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=pairs)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def write(path: str | Path, kind: str = "opt", seed: int = 0, width: int = 64, layers: int = 2) -> Path:
    """A model folder. kind: opt, t5 or retrieval; width and layers: of the language model."""
    q_former = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
    vision = dict(hidden_size=96, num_hidden_layers=BLOCKS, num_attention_heads=4, intermediate_size=64)
    vision |= dict(image_size=SIDE, patch_size=14, initializer_range=0.05)
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    names = dict(bos_token="</s>", eos_token="</s>", pad_token="<pad>", unk_token="<unk>")
    if kind == "opt":
        tokenizer = byte_tokenizer(specials, "</s> $A", **names)
        text = dict(model_type="opt", hidden_size=width, word_embed_proj_dim=width, ffn_dim=2 * width)
        text |= dict(num_hidden_layers=layers, num_attention_heads=4, max_position_embeddings=128)
        text |= dict(bos_token_id=2, pad_token_id=1, eos_token_id=2, init_std=0.3)
    elif kind == "t5":
        tokenizer = byte_tokenizer(specials, "$A </s>", **names)
        text = dict(model_type="t5", d_model=width, d_kv=width // 4, d_ff=2 * width, num_heads=4)
        text |= dict(num_layers=layers, num_decoder_layers=layers, initializer_factor=1.0)
        text |= dict(pad_token_id=1, eos_token_id=2, decoder_start_token_id=1)
    else:
        names = dict(cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", unk_token="[UNK]")
        tokenizer = byte_tokenizer([*names.values()], "[CLS] $A [SEP]", **names)
        text = dict(model_type="opt", hidden_size=32, ffn_dim=32, num_hidden_layers=1, num_attention_heads=2)
        text |= dict(word_embed_proj_dim=32)
        q_former |= dict(use_qformer_text_input=True, vocab_size=len(tokenizer) + 8, pad_token_id=2)
    if kind != "retrieval":
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        text["vocab_size"] = len(tokenizer) + 7
    config = Blip2Config(
        vision_config=vision,
        qformer_config={**q_former, "encoder_hidden_size": 96, "initializer_range": 0.2},
        text_config=text,
        num_query_tokens=QUERIES,
        image_text_hidden_size=16,
        initializer_range=0.2,
    )
    config.image_token_index = len(tokenizer) - 1 if kind != "retrieval" else None
    torch.manual_seed(seed)
    model_class = Blip2ForImageTextRetrieval if kind == "retrieval" else Blip2ForConditionalGeneration
    model = model_class(config).eval()
    torch.nn.init.normal_(model.query_tokens)  # transformers': zeros
    for name, p in model.named_parameters():
        if "language_projection" in name:
            torch.nn.init.normal_(p, std=0.5)  # else the language model hardly sees the image
        if name == "language_model.shared.weight":
            torch.nn.init.normal_(p, std=0.1)  # else the decoder, tied to it, repeats its input
            torch.nn.init.zeros_(p[1])  # <pad>
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return Path(path)
