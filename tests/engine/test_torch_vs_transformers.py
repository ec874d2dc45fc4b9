"""The torch engine computes what transformers computes: every family, token for token."""

from __future__ import annotations

import json

import pytest
import torch
import transformers
from safetensors.torch import load_file

from kvrelay.core.errors import ConfigError
from kvrelay.core.request import FinishReason
from kvrelay.engine.config import EngineConfig
from kvrelay.engine.torch_engine import TorchEngine

LLAMA3_SCALING = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-one-kv-head": ("Llama", {"num_key_value_heads": 1}),
    "llama-no-gqa": ("Llama", {"num_key_value_heads": 4}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-rope3": ("Llama", {"rope_parameters": LLAMA3_SCALING}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 24}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-untied": ("Qwen2", {"tie_word_embeddings": False}),
    "qwen3": ("Qwen3", {"tie_word_embeddings": False, "head_dim": 32}),
    "qwen3-tied": ("Qwen3", {"tie_word_embeddings": True, "head_dim": 32}),
}


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def family_folder(request, tmp_path_factory, save_model):
    family, changes = FAMILIES[request.param]
    return save_model(tmp_path_factory.mktemp("families") / request.param, family, **changes)


def build(folder, **changes):
    settings = {"num_blocks": 200, "block_size": 8, "max_num_batched_tokens": 64, "max_num_seqs": 16}
    return TorchEngine(EngineConfig(model=str(folder), **{**settings, **changes}))


@torch.inference_mode()
def greedy(folder, prompt, num_tokens):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    result = model.generate(
        torch.tensor([prompt]),
        attention_mask=torch.ones(1, len(prompt), dtype=torch.int64),
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return result[0, len(prompt) :].tolist()


def test_greedy_tokens_equal_transformers(family_folder, drive, request_of, prompt_of):
    prompts = [
        prompt_of(length, variant)
        for length, variant in ((1, 0), (2, 1), (7, 2), (40, 3), (150, 3), (150, 4))
    ]
    expected = [greedy(family_folder, prompt, 24) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) > 3, "a model that always says the same shows nothing"
    requests = [request_of(prompt, max_tokens=24) for prompt in prompts]
    together = drive(build(family_folder))
    assert together.generate(*requests) == expected
    assert together.generate(*requests) == expected, "with prefix-cache hits"
    assert together.engine.load().prefix_hit_tokens > 0
    assert [drive(build(family_folder)).generate(request)[0] for request in requests[:4]] == expected[:4]


def test_logprobs_equal_transformers(family_folder, drive, request_of, prompt_of):
    prompt = prompt_of(30)
    driver = drive(build(family_folder))
    driver.engine.submit(request_of(prompt, max_tokens=1, num_logprobs=5), "a")
    driver.run()
    model = transformers.AutoModelForCausalLM.from_pretrained(family_folder, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([prompt])).logits[0, -1].log_softmax(0).topk(5)
    logprobs = driver.outputs["a"][0].logprobs
    assert [token_id for token_id, _ in logprobs.top] == expected.indices.tolist()
    assert [value for _, value in logprobs.top] == pytest.approx(expected.values.tolist(), abs=1e-4)
    assert logprobs.chosen == logprobs.top[0][1]


def test_bfloat16_logprobs_stay_close_to_float32(family_folder, drive, request_of, prompt_of):
    values = []
    for dtype in ("float32", "bfloat16"):
        driver = drive(build(family_folder, dtype=dtype))
        driver.engine.submit(request_of(prompt_of(60), max_tokens=1, num_logprobs=20), "a")
        driver.run()
        values.append(dict(driver.outputs["a"][0].logprobs.top))
    common = values[0].keys() & values[1].keys()
    assert len(common) >= 10
    assert max(abs(values[0][token] - values[1][token]) for token in common) < 0.5


def test_one_row_is_the_same_bits_alone_and_among_others(family_folder, drive, request_of, prompt_of):
    requests = [request_of(prompt_of(20, variant), num_logprobs=1, max_tokens=5) for variant in range(6)]
    together = drive(build(family_folder, max_num_batched_tokens=256))
    for index, request in enumerate(requests):
        together.engine.submit(request, f"k{index}")
    together.run()
    for index, request in enumerate(requests):
        alone = drive(build(family_folder, max_num_batched_tokens=256))
        alone.engine.submit(request, "a")
        alone.run()
        ours = [output.logprobs.chosen for output in alone.outputs["a"]]
        assert ours == [output.logprobs.chosen for output in together.outputs[f"k{index}"]]


def test_scattered_blocks_read_the_same_as_contiguous_ones(tiny_llama, drive, request_of, prompt_of):
    requests = [request_of(prompt_of(9, variant), max_tokens=60) for variant in range(8)]
    expected = [drive(build(tiny_llama)).generate(request)[0] for request in requests]
    crowded = build(tiny_llama, num_blocks=8 * 9, block_size=8)
    assert drive(crowded).generate(*requests) == expected


def test_eos_token_stops(tiny_llama, drive, request_of, prompt_of):
    driver = drive(build(tiny_llama))
    assert driver.engine.info.eos_token_ids == (2,)
    requests = [
        request_of(prompt_of(5, seed), temperature=50.0, seed=seed, max_tokens=400, ignore_eos=False)
        for seed in range(8)
    ]
    results = driver.generate(*requests)
    stopped = [
        outputs for outputs in driver.outputs.values() if outputs[-1].finish_reason is FinishReason.STOP
    ]
    assert stopped, "400 nearly uniform draws out of 211 tokens hit every token"
    assert all(outputs[-1].token_id == 2 for outputs in stopped)
    assert all(2 not in tokens[:-1] for tokens in results)


def test_sharded_weights_load_through_their_index(tiny_llama, tmp_path, drive, request_of, prompt_of):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    assert len(list((tmp_path / "sharded").glob("model-*.safetensors"))) > 1
    request = request_of(prompt_of(12))
    assert drive(build(tmp_path / "sharded")).generate(request) == drive(build(tiny_llama)).generate(request)


def test_progress_rises_to_one_and_names_the_model(tiny_llama):
    reports = []
    TorchEngine(EngineConfig(model=str(tiny_llama), num_blocks=8), lambda *report: reports.append(report))
    fractions = [fraction for fraction, _ in reports]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0, abs=0.05)
    assert "llama" in reports[0][1]


def test_fingerprint_tells_models_apart_and_ignores_the_served_name(tiny_llama, tmp_path, save_model):
    other = save_model(tmp_path / "other", "Llama")
    state = load_file(other / "model.safetensors")
    state["model.norm.weight"][3] += 0.25
    model = transformers.AutoModelForCausalLM.from_pretrained(other)
    model.load_state_dict(state, strict=False)
    model.save_pretrained(other)
    first, renamed = build(tiny_llama), build(tiny_llama, served_name="other")
    assert first.info.fingerprint == renamed.info.fingerprint
    assert first.info.model != renamed.info.model
    assert build(other).info.fingerprint.difference(first.info.fingerprint).startswith("model:")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1e4}}, "yarn"),
        ({"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ({"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"hidden_size": "many"}, "hidden_size"),
        ({"intermediate_size": 97}, "gate_proj"),
        ({"num_hidden_layers": 4}, r"model\.layers\.3"),
    ],
)
def test_unsupported_models_are_refused_by_name(tmp_path, save_model, changes, named):
    folder = save_model(tmp_path / "m", "Llama")
    change_config(folder, **changes)
    with pytest.raises(ConfigError, match=named):
        build(folder)


def test_sliding_window_limits_the_context(tmp_path, save_model):
    folder = save_model(tmp_path / "m", "Mistral", sliding_window=100)
    assert build(folder).info.max_model_len == 100
    with pytest.raises(ConfigError, match="sliding_window"):
        build(folder, max_model_len=200)


@pytest.mark.parametrize("damage", ["missing", "config", "weights", "index"])
def test_broken_folders_are_refused_clearly(tmp_path, save_model, damage):
    folder = save_model(tmp_path / "m", "Llama")
    if damage == "missing":
        folder = tmp_path / "nowhere"
    elif damage == "config":
        (folder / "config.json").write_text("{")
    elif damage == "weights":
        (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    else:
        (folder / "model.safetensors.index.json").write_text(
            '{"weight_map": {"a": "../../gone.safetensors"}}'
        )
    with pytest.raises(ConfigError, match=str(tmp_path)):
        build(folder)


def test_kv_pool_size_follows_from_its_bytes(tiny_llama):
    info = build(tiny_llama, num_blocks=None, kv_bytes=100_000).info
    layout = build(tiny_llama, num_blocks=None, kv_bytes=100_000).kv.layout
    assert layout.total_bytes <= 100_000 < layout.total_bytes + layout.token_bytes * layout.block_size
    assert info.max_model_len == info.num_blocks * info.block_size
    with pytest.raises(ConfigError, match="kv_bytes"):
        build(tiny_llama, num_blocks=None, kv_bytes=2000)


def test_unsound_weights_fail_the_sequence_and_leave_no_blocks(
    tiny_llama, tmp_path, drive, request_of, prompt_of
):
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    model.save_pretrained(tmp_path / "nan")
    driver = drive(build(tmp_path / "nan"))
    driver.engine.submit(request_of(prompt_of(20)), "a")
    driver.run()
    assert [failure.key for failure in driver.failures] == ["a"]
    assert driver.engine.load().num_empty_blocks == driver.engine.info.num_blocks
