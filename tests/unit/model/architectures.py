"""Tiny random models of the architectures that the tests of `sdar/model` go through."""

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

VOCABULARY = 64
"""More than any tokenizer of a test has, as published embeddings are padded."""

_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 8}
_GPT2 = {"vocab_size": VOCABULARY, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MAMBA = {
    "mamba_d_ssm": 32,
    "mamba_n_heads": 4,
    "mamba_d_head": 8,
    "mamba_n_groups": 1,
    "mamba_d_state": 8,
    "lm_head_multiplier": 0.25,
}

ARCHITECTURES = {
    "cohere": _DECODER | {"logit_scale": 0.0625},
    "cohere2": _DECODER | {"logit_scale": 0.0625},
    "falcon_h1": _DECODER | _MAMBA,
    "gemma2": _DECODER | {"final_logit_softcapping": 0.5, "sliding_window": 8},
    "gemma3_text": _DECODER | {"sliding_window": 8},
    "gpt2": _GPT2 | {"resid_pdrop": 0.3, "embd_pdrop": 0.3, "attn_pdrop": 0.3},
    "gpt_neox": _DECODER | {"tie_word_embeddings": False},
    "gpt_oss": _DECODER | {"num_local_experts": 4, "sliding_window": 8},
    "granite": _DECODER | {"logits_scaling": 8.0, "embedding_multiplier": 3.0},
    "granitemoe": _DECODER | {"logits_scaling": 8.0, "num_local_experts": 4},
    "llama": _DECODER | {"tie_word_embeddings": True},
    "mistral": _DECODER | {"sliding_window": 8},
    "mixtral": _DECODER | {"num_local_experts": 4, "router_jitter_noise": 0.3},
    "nemotron": _DECODER,
    "olmo2": _DECODER,
    "phi3": _DECODER | {"resid_pdrop": 0.3, "embd_pdrop": 0.3},
    "qwen2": _DECODER | {"tie_word_embeddings": True},
    "qwen3": _DECODER | {"tie_word_embeddings": True},
    "qwen3_moe": _DECODER | _EXPERTS | {"tie_word_embeddings": False},
    "starcoder2": _DECODER | {"residual_dropout": 0.3, "embedding_dropout": 0.3},
}


def make_model(name, *, seed=0, **changes):
    """A model whose logits are some units apart, so that a wrong scale shows."""
    config = CONFIG_MAPPING[name](**ARCHITECTURES[name] | changes)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.3)
    return model.eval()
