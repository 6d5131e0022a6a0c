"""Models small enough for a test, and batches for them."""

import torch

V, H, S = 97, 32, 12
SIZES = {
    "vocab_size": V, "hidden_size": H, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 32,
}  # fmt: skip

# Its hidden states are divided by 4 before the head.
MINICPM3 = {
    "dim_model_base": 8, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}  # fmt: skip


def made(name="Llama", **settings):
    """A model of the class {name}ForCausalLM, with the same weights at every call."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | settings)
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    # Larger than initial weights, so that a missing scale or softcap shows.
    for parameter in model.parameters():
        parameter.data.mul_(3.0)
    if (bias := model.get_output_embeddings().bias) is not None:
        bias.data.normal_()
    return model.train()


def with_biased_head(name="Llama", **settings):
    """As `made`, but the head has a bias."""
    model = made(name, **settings)
    head = torch.nn.Linear(H, V)
    head.weight.data.copy_(model.get_output_embeddings().weight.data)
    head.bias.data.normal_()
    model.set_output_embeddings(head)
    return model


def batch(seed=0, size=4, ignored=3):
    """input_ids and labels [B, S]; the first labels of each row are ignored, more of them in later rows."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, V, (size, S), generator=generator)
    labels = tokens.clone()
    for row in range(size):
        labels[row, : ignored + row % 4] = -100
    return {"input_ids": tokens, "labels": labels}
