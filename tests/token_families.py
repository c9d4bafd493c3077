"""Tokenizers of ten families and chat templates of six styles, made in a moment and offline."""

import json
from functools import lru_cache

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

WORDS = (
    "the film was good and the plot was bad Paris Rome is a capital of France user assistant system model slow story"
)
CORPUS = [
    WORDS,
    "Review: a quiet, moving, slow story of one family.\n\nGood! It's 42.",
    WORDS.title(),
    "café naïve",
] * 8
NAMED = ["<unk>", "<s>", "</s>"]
BYTES = [f"<0x{i:02X}>" for i in range(256)]
# The pattern of Llama 3, shortened: numbers by threes, punctuation with the line breaks after it.
TIKTOKEN = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TOOLS = "{% if tools %}Tools: {{ tools | tojson }}\n{% endif %}"
CALLS = "{% if m.tool_calls %}{{ m.tool_calls | tojson }}{% endif %}"


def _framed(first, last):
    """A post-processor that puts special tokens around every text."""
    around = " ".join([*first, "$A", *last])
    return processors.TemplateProcessing(single=around, special_tokens=[(t, NAMED.index(t)) for t in {*first, *last}])


def _byte_level(prefix=False, pattern=None):
    tokenizer = Tokenizer(models.BPE())
    parts = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    if pattern:
        split = pre_tokenizers.Split(Regex(pattern), "isolated")
        parts = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.pre_tokenizer, tokenizer.decoder = parts, decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=420, special_tokens=NAMED, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _sentence_piece(scheme):
    """BPE over whole texts with a sign for the space, as Llama 2 has it."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=scheme == "always")
    trainer = trainers.BpeTrainer(
        vocab_size=560, special_tokens=[*NAMED, *BYTES], show_progress=False, max_token_length=12
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in NAMED]
    state["model"]["byte_fallback"] = True
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = _framed(["<s>"], [])
    return tokenizer


def _unigram(scheme):
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=NAMED,
        unk_token="<unk>",
        show_progress=False,
        initial_alphabet=list("{}[]:\"'\n"),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def _word_piece():
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=300, special_tokens=NAMED, show_progress=False)
    )
    tokenizer.post_processor = _framed(["<s>"], ["</s>"])
    return tokenizer


def _trimming():
    tokenizer = _byte_level(prefix=True)
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _with(tokenizer, processor):
    tokenizer.post_processor = processor
    return tokenizer


FAMILIES = {
    "byte-level": _byte_level,
    "byte-level, prefix space, trimmed offsets": _trimming,
    "tiktoken": lambda: _with(_byte_level(pattern=TIKTOKEN), _framed(["<s>"], [])),
    "sentencepiece, prepended": lambda: _sentence_piece("prepend"),
    "sentencepiece, first": lambda: _sentence_piece("first"),
    "sentencepiece, never": lambda: _sentence_piece("never"),
    "sentencepiece, always": lambda: _sentence_piece("always"),
    "unigram": lambda: _with(_unigram("first"), _framed(["<s>"], ["</s>"])),
    "unigram that ends texts": lambda: _with(_unigram("always"), _framed([], ["</s>"])),
    "wordpiece": _word_piece,
}

CHATML = (
    "{% if tools %}<|im_start|>tools\n" + TOOLS + "<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}" + CALLS + "<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA_2 = (
    "{% for m in messages %}{% if m.role == 'system' %}<s>[INST] <<SYS>>\n{{ m.content }}\n<</SYS>>\n\n"
    "{% elif m.role == 'assistant' %} {{ m.content }}" + CALLS + " </s>"
    "{% else %}{% if loop.first or loop.previtem.role != 'system' %}<s>[INST] {% endif %}"
    "{% if loop.last or loop.nextitem.role == 'assistant' %}" + TOOLS + "{% endif %}{{ m.content }} [/INST]"
    "{% endif %}{% endfor %}"
)
ZEPHYR = (
    TOOLS + "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}" + CALLS + "{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
GEMMA_3 = (
    "<s>" + TOOLS + "{% for m in messages %}{% if m.role == 'system' %}<start_of_turn>user\n{{ m.content }}\n\n"
    "{% else %}{% if loop.first or loop.previtem.role != 'system' %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n{% endif %}"
    "{{ m.content | trim }}" + CALLS + "<end_of_turn>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
PHI_3 = (
    TOOLS + "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}" + CALLS + "<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% else %}{{ eos_token }}{% endif %}"
)
LLAMA_3 = (
    "{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "<s><|start_header_id|>system<|end_header_id|>\n\nToday Date: {{ date_string }}\n\n" + TOOLS + "<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}"
    + CALLS
    + "<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _special(*strings, **flags):
    return [AddedToken(s, special=True, normalized=False, **flags) for s in strings]


# Template, control tokens, and what ends a turn. As in the originals, Phi 3's swallow the white space after them, and
# those of Gemma stop the model without being among the tokenizer's named ones.
STYLES = {
    "chatml": (CHATML, _special("<|im_start|>", "<|im_end|>"), "<|im_end|>"),
    "llama 2": (LLAMA_2, [], "</s>"),
    "zephyr": (ZEPHYR, [], "</s>"),
    "gemma 3": (
        GEMMA_3,
        [*_special("<start_of_turn>"), AddedToken("<end_of_turn>", normalized=False)],
        "<end_of_turn>",
    ),
    "phi 3": (PHI_3, _special("<|user|>", "<|assistant|>", "<|system|>", "<|end|>", rstrip=True), "<|end|>"),
    "llama 3": (LLAMA_3, _special("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), "<|eot_id|>"),
}


@lru_cache(None)
def _backend(family):
    return FAMILIES[family]().to_str()


@lru_cache(None)
def tokenizer_of(family, style):
    """A tokenizer of a family with the chat template of a style, and the tokens that stop its model."""
    template, tokens, end = STYLES[style]
    backend = Tokenizer.from_str(_backend(family))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", name_or_path=f"{family}/{style}"
    )
    tokenizer.add_tokens(tokens)
    tokenizer.chat_template = template
    return tokenizer, sorted({tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(end)})
