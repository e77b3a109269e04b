"""Models of transformers, tiny and with random weights, each with an input."""

from __future__ import annotations

from collections.abc import Callable

import torch
import transformers
from torch import Tensor

VOCABULARY = 99
LENGTH = 9

_SMALL = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
_TEXT = dict(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, pad_token_id=0)


def _text(padding: str) -> dict[str, Tensor]:
    """Two texts, of which the first is shorter and padded on the left, on the right or not at all."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, VOCABULARY, (2, LENGTH), generator=generator)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    if padding != "none":
        mask[0, slice(0, 3) if padding == "left" else slice(-3, None)] = 0
        ids = ids.masked_fill(mask == 0, 0)
    return {"input_ids": ids, "attention_mask": mask}


def _text_to_text(padding: str) -> dict[str, Tensor]:
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=torch.Generator().manual_seed(2))
    return {**_text(padding), "decoder_input_ids": ids}


def _image(padding: str) -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(3))}


def _speech(padding: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(4)
    ids = torch.randint(3, VOCABULARY, (2, 5), generator=generator)
    return {"input_features": torch.randn(2, 8, 20, generator=generator), "decoder_input_ids": ids}


def _bert():
    config = transformers.BertConfig(**_TEXT, **_SMALL)
    return transformers.BertForMaskedLM(config)


def _gpt2():
    config = transformers.GPT2Config(**_TEXT, n_embd=32, n_layer=2, n_head=4, n_positions=32)
    return transformers.GPT2LMHeadModel(config)


def _llama():
    config = transformers.LlamaConfig(**_TEXT, **_SMALL, num_key_value_heads=2)
    return transformers.LlamaForCausalLM(config)


def _mistral():
    config = transformers.MistralConfig(**_TEXT, **_SMALL, num_key_value_heads=2, sliding_window=4)
    return transformers.MistralForCausalLM(config)


def _gemma2():
    config = transformers.Gemma2Config(
        **_TEXT, **_SMALL, num_key_value_heads=2, head_dim=8, sliding_window=4, attn_logit_softcapping=2.0
    )
    return transformers.Gemma2ForCausalLM(config)


def _t5():
    config = transformers.T5Config(
        **_TEXT, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config)


def _vit():
    config = transformers.ViTConfig(**_SMALL, image_size=16, patch_size=4, num_labels=5)
    return transformers.ViTForImageClassification(config)


def _whisper():
    config = transformers.WhisperConfig(
        **_TEXT,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=16,
        decoder_start_token_id=1,
    )
    return transformers.WhisperForConditionalGeneration(config)


MODELS: dict[str, tuple[Callable[[], transformers.PreTrainedModel], Callable[[str], dict[str, Tensor]]]] = {
    "bert": (_bert, _text),
    "gpt2": (_gpt2, _text),
    "llama": (_llama, _text),
    "mistral": (_mistral, _text),
    "gemma2": (_gemma2, _text),
    "t5": (_t5, _text_to_text),
    "vit": (_vit, _image),
    "whisper": (_whisper, _speech),
}
CAUSAL = ("gpt2", "llama", "mistral", "gemma2")


def make(name: str, implementation: str = "eager", seed: int = 0) -> transformers.PreTrainedModel:
    """A model in evaluation mode; equal seeds give equal weights, whatever runs its attention."""
    torch.manual_seed(seed)
    model = MODELS[name][0]().eval()
    model.set_attn_implementation(implementation)
    return model


def inputs(name: str, padding: str = "none") -> dict[str, Tensor]:
    return MODELS[name][1](padding)
