"""Small tokenizers and templates that behave as those of public model families do."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{% set content = m.content %}"
    "{% if m.role == 'assistant' and '</think>' in content %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>"
    "{% endfor %}{% if add_generation_prompt %}"
    "<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_DATED = (
    "{{ bos_token }}<|start_header_id|>system<|end_header_id|>\n\n"
    "Today Date: {{ strftime_now('%d %b %Y %H:%M:%S') }}<|eot_id|>"
    + LLAMA.removeprefix("{{ bos_token }}")
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
    "{% set role = 'model' if m.role == 'assistant' else m.role %}"
    "<start_of_turn>{{ role }}\n{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
GEMMA_SILENT = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{% if messages[0].role == 'system' %}{% set system = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}{{ bos_token }}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{% if loop.last and system is defined %}"
    "[INST]{{ system + '\n\n' + m.content }}[/INST]{% else %}[INST]{{ m.content }}[/INST]"
    "{% endif %}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
DEEPSEEK = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}"
    "{% elif m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
LLAMA2 = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }} {{ eos_token }}"
    "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}"
    "{% endfor %}"
)
GLM = (
    "[gMASK]{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
PHI = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


@dataclass(frozen=True)
class Family:
    """What a model directory is made of.

    Attributes:
        plain: added tokens that are not called special.
        generation: content of generation_config.json; None writes none.
        words: "bytes" for a byte-level vocabulary, "metaspace" for a sentencepiece-like one.
    """

    template: Any
    special: tuple[str, ...]
    eos: str | None
    bos: str | None = None
    plain: tuple[str, ...] = ()
    generation: Any = None
    words: str = "bytes"
    keeps_space_behind: bool = True


IM = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
HEADERS = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>")
TURNS = ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>")
FAMILIES = {
    "qwen2.5": Family(CHATML, IM, "<|im_end|>", generation={"eos_token_id": [2, 0]}),
    "qwen3": Family(QWEN3, IM, "<|im_end|>", plain=("<think>", "</think>", "<tool_call>")),
    "qwen base": Family(CHATML, IM, "<|endoftext|>"),
    "llama 3": Family(LLAMA, (*HEADERS, "<|eot_id|>"), "<|end_of_text|>", HEADERS[0]),
    "llama 3.2": Family(LLAMA_DATED, (*HEADERS, "<|eot_id|>"), "<|eot_id|>", HEADERS[0]),
    "gemma": Family(GEMMA, TURNS, "<eos>", "<bos>", plain=("\n\n", "<h1>")),
    "gemma, silent": Family(GEMMA_SILENT, TURNS, "<eos>", "<bos>"),
    "mistral": Family(MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), "</s>", "<s>"),
    "deepseek r1": Family(
        DEEPSEEK, ("<bos>", "<eos>"), "<eos>", "<bos>", ("<|User|>", "<|Assistant|>", "<think>")
    ),
    "llama 2": Family(LLAMA2, ("<s>", "</s>"), "</s>", "<s>", words="metaspace"),
    "glm": Family(
        GLM,
        ("<|endoftext|>", "[gMASK]", "<|system|>", "<|user|>", "<|assistant|>"),
        "<|endoftext|>",
        generation={"eos_token_id": [0, 3]},
    ),
    "phi 3": Family(
        PHI,
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        "<|endoftext|>",
        keeps_space_behind=False,
    ),
    "hermes": Family(
        [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": PHI}],
        IM,
        "<|im_end|>",
    ),
}


def write_family(path: Path, family: Family, config: dict[str, Any] | None = None) -> Path:
    """A directory with the family's tokenizer and template and, without weights, a config.json."""
    path.mkdir(parents=True, exist_ok=True)
    names = list(family.special) + [name for name in family.plain if name.strip()]
    build = _build_bytes if family.words == "bytes" else _build_metaspace
    tokenizer = build(names)
    strips = not family.keeps_space_behind
    tokenizer.add_special_tokens(
        [AddedToken(t, normalized=False, rstrip=strips, special=True) for t in family.special]
    )
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in family.plain])
    tokenizer.save(str(path / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "chat_template": family.template,
        "eos_token": family.eos,
        "bos_token": family.bos,
    }
    settings = {key: value for key, value in settings.items() if value is not None}
    (path / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config or {"model_type": "qwen2"}))
    if family.generation is not None:
        (path / "generation_config.json").write_text(json.dumps(family.generation))
    return path


def _build_bytes(names: list[str]) -> Tokenizer:
    """Bytes, and the merges that make words of "the" and a line end with a letter or space."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("t", "h"), ("th", "e"), ("\u0120", "the"), ("\u010a", "\u010a"), ("<", "|")]
    pieces = [*names, *letters, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _build_metaspace(names: list[str]) -> Tokenizer:
    """Characters with a space before the first one, and bytes for characters it does not know."""
    letters = ["\u2581", *map(chr, range(33, 127))]
    pieces = [*names, "<unk>", *[f"<0x{i:02X}>" for i in range(256)], *letters, "\u2581a"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={p: i for i, p in enumerate(pieces)},
            merges=[("\u2581", "a")],
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Sequence([])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer
