"""Folders with nothing but the configuration of a model."""

from transformers import AutoConfig


def config_only(folder, kind="llama", **sizes):
    given = {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 5,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 500,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        **sizes,
    }
    AutoConfig.for_model(kind, **given).save_pretrained(folder)
    return str(folder)
