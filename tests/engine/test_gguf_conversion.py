from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from gguf.quants import dequantize, quantize
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from kvrelay.core.errors import ConfigError
from kvrelay.engine.gguf_conversion import convert_gguf

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["Ġ t", "h e", "Ġt he", "4 2"]
CONTROL, NORMAL = 3, 1
GGUF_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def ignore_progress(fraction: float, text: str) -> None:
    pass


def byte_alphabet() -> list[str]:
    """GPT-2's printable stand-ins for the 256 bytes."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(256 - len(printable))]


def vocabulary() -> list[str]:
    return SPECIAL_TOKENS + byte_alphabet() + [merge.replace(" ", "") for merge in MERGES]


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def tiny_llama(request: pytest.FixtureRequest) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary()),
        max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        rms_norm_eps=1e-5,
        tie_word_embeddings=request.param,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def interleave_rotary_rows(weight: np.ndarray, head_dim: int) -> np.ndarray:
    """llama.cpp's row order, spelled row by row: HF rows i and i + head_dim / 2 become neighbours."""
    half = head_dim // 2
    order = [
        head + offset
        for head in range(0, len(weight), head_dim)
        for i in range(half)
        for offset in (i, i + half)
    ]
    return weight[order]


def gguf_tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    tensors = {}
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        parts = name.removesuffix(".weight").split(".", 3)
        if parts[:2] == ["model", "layers"]:
            if parts[3] in ("self_attn.q_proj", "self_attn.k_proj"):
                weight = interleave_rotary_rows(weight, model.config.head_dim)
            tensors[f"blk.{parts[2]}.{GGUF_LAYER_NAMES[parts[3]]}.weight"] = weight
    tensors["token_embd.weight"] = model.model.embed_tokens.weight.detach().numpy()
    tensors["output_norm.weight"] = model.model.norm.weight.detach().numpy()
    if not model.config.tie_word_embeddings:
        tensors["output.weight"] = model.lm_head.weight.detach().numpy()
    return tensors


def write_gguf(
    path: Path,
    model: LlamaForCausalLM,
    *,
    architecture: str = "llama",
    pre: str = "smollm",
    quantized: bool = False,
    extra: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    writer, config = GGUFWriter(path, architecture), model.config
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(vocabulary())
    writer.add_token_types([CONTROL] * 3 + [NORMAL] * (len(vocabulary()) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}<|im_start|>{{ m['content'] }}<|im_end|>{% endfor %}")
    for name, weight in gguf_tensors(model).items():
        if quantized and weight.ndim == 2:
            q4_1 = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(weight, q4_1), raw_dtype=q4_1)
        else:
            writer.add_tensor(name, weight)
    extra(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def convert(source: Path, folder: Path) -> Path:
    folder.mkdir()
    convert_gguf(source, folder, ignore_progress)
    return folder


def test_the_converted_model_computes_what_the_original_does(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    folder = convert(write_gguf(tmp_path / "m.gguf", tiny_llama), tmp_path / "hf")
    converted = AutoModelForCausalLM.from_pretrained(folder).eval()
    token_ids = torch.arange(3, 103).unsqueeze(0)
    with torch.inference_mode():
        assert torch.equal(converted(token_ids).logits, tiny_llama(token_ids).logits)
    assert converted.dtype == torch.float32
    assert converted.config.eos_token_id == converted.generation_config.eos_token_id == 2
    assert converted.config.rms_norm_eps == 1e-5


def test_quantized_tensors_are_dequantized_exactly(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    folder = convert(write_gguf(tmp_path / "m.gguf", tiny_llama, quantized=True), tmp_path / "hf")
    q4_1 = GGMLQuantizationType.Q4_1
    for name, converted in load_file(folder / "model.safetensors").items():
        original = tiny_llama.state_dict()[name].numpy()
        expected = dequantize(quantize(original, q4_1), q4_1) if original.ndim == 2 else original
        assert np.array_equal(converted.numpy(), expected), name


def test_progress_ends_at_one_and_never_goes_back(tiny_llama: LlamaForCausalLM, tmp_path: Path) -> None:
    fractions: list[float] = []
    source = write_gguf(tmp_path / "m.gguf", tiny_llama)
    convert_gguf(source, tmp_path, lambda fraction, text: fractions.append(fraction))
    assert fractions == sorted(fractions)
    assert fractions[-1] == 1.0


def test_the_converted_tokenizer_merges_splits_digits_and_knows_special_tokens(
    tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(
        convert(write_gguf(tmp_path / "m.gguf", tiny_llama), tmp_path / "hf")
    )
    pieces = tokenizer.convert_ids_to_tokens(
        tokenizer.encode("<|im_start|>in the 42", add_special_tokens=False)
    )
    assert pieces == ["<|im_start|>", "i", "n", "Ġthe", "Ġ", "4", "2"]
    assert tokenizer.encode("the", add_special_tokens=False) == tokenizer.encode("the")
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (2, 2, 1)
    text = "naïve 你好 🙂\r\n\t  x"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|im_start|>hi<|im_end|>"


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architecture": "qwen2"}, "qwen2"),
        ({"pre": "tekken"}, "tekken"),
        ({"extra": lambda w: w.add_string("llama.rope.scaling.type", "yarn")}, "rope scaling"),
        ({"extra": lambda w: w.add_rope_dimension_count(8)}, "partial rotary"),
        ({"extra": lambda w: w.add_tensor("rope_freqs.weight", np.ones(8, np.float32))}, "rope_freqs"),
    ],
    ids=["architecture", "pre-tokenizer", "rope-scaling", "partial-rotary", "tensor"],
)
def test_what_is_not_understood_is_refused_by_name(
    changes: dict[str, object], named: str, tiny_llama: LlamaForCausalLM, tmp_path: Path
) -> None:
    source = write_gguf(tmp_path / "m.gguf", tiny_llama, **changes)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=named):
        convert(source, tmp_path / "hf")


@pytest.mark.parametrize("content", [b"", b"not a gguf file at all", b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_no_gguf_is_refused(content: bytes, tmp_path: Path) -> None:
    source = tmp_path / "m.gguf"
    source.write_bytes(content)
    with pytest.raises(ConfigError, match=r"m\.gguf is not a readable GGUF"):
        convert(source, tmp_path / "hf")
