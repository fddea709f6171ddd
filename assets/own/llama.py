from transformers import LlamaConfig, LlamaForCausalLM


def build(width, shape):
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=shape.outputs, hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=2,
        num_attention_heads=width // 16, num_key_value_heads=width // 32, tie_word_embeddings=False,
        max_position_embeddings=shape.inputs, use_cache=False))
