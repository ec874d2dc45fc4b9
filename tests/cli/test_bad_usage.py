"""Bad input to every command: exit status 2, one readable complaint that names what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

BAD_USAGE = [
    (["nonsense"], "nonsense"),
    (["router", "--port", "x"], "--port"),
    (["router", "--port", "70000"], "router.grpc_port"),
    (["router", "--port", "-1"], "router.grpc_port"),
    (["router", "--host", ""], "router.listen_host"),
    (["router", "--log-level", "loud"], "router.log_level"),
    (["router", "--config", "/nonexistent/kvrelay.toml"], "does not exist"),
    (["router", "--max-atempts", "2"], "did you mean --max-attempts?"),
    (["router", "--max-attempts", "two"], "must be an integer"),
    (["router", "--port", "5", "--http-port", "5"], "must differ"),
    (["router", "stray"], "stray"),
    (["prefill", "--router", "nowhere"], "not host:port"),
    (["prefill", "--dtype", "int3"], "float32 or bfloat16"),
    (["prefill", "--model", ""], "engine.model"),
    (["prefill", "--engine", "vlm"], "torch"),
    (["prefill", "--num-blocks", "0"], "engine.num_blocks"),
    (["prefill", "--transport", "pigeon"], "transfer.transport"),
    (["prefill", "--threads", "0"], "engine.num_threads"),
    (["prefill", "--drain-timeout", "-1"], "node.drain_timeout_s"),
    (["decode", "--kv-bytes", "lots"], "--kv-bytes"),
    (["decode", "--transfer-port", "70000"], "transfer.listen_port"),
    (["decode", "--connect-timeout-s", "1"], "ambiguous"),
    (["decode", "--max-model-len", "1"], "engine.max_model_len"),
    (["up", "--prefill", "0"], "cluster.prefill"),
    (["up", "--decode", "-1"], "cluster.decode"),
    (["up", "--once", ""], "PROMPT must not be empty"),
    (["up", "--once", "hi", "--max-tokens", "0"], "max_tokens"),
    (["up", "--dtype", "float8"], "engine.dtype"),
    (["up", "--port", "99999"], "router.grpc_port"),
    (["up", "--prefil", "2"], "did you mean --prefill?"),
    (["generate"], "PROMPT"),
    (["generate", ""], "PROMPT must not be empty"),
    (["generate", "hi", "--top-p", "2"], "sampling.top_p"),
    (["generate", "hi", "--top-p", "0"], "sampling.top_p"),
    (["generate", "hi", "--temperature", "-1"], "sampling.temperature"),
    (["generate", "hi", "--temperature", "nan"], "sampling.temperature"),
    (["generate", "hi", "--max-tokens", "0"], "sampling.max_tokens"),
    (["generate", "hi", "--max-tokens", "many"], "--max-tokens"),
    (["generate", "hi", "--top-k", "-1"], "sampling.top_k"),
    (["generate", "hi", "--min-p", "1.5"], "sampling.min_p"),
    (["generate", "hi", "--seed", "-1"], "sampling.seed"),
    (["generate", "hi", "--logprobs", "99"], "sampling.num_logprobs"),
    (["generate", "hi", "--stop-token-id", "-1"], "sampling.stop_token_ids"),
    (["generate", "hi", "--max-tokens", "2", "--min-tokens", "3"], "sampling.min_tokens"),
    (["generate", "hi", "--json-schema", "/nonexistent.json"], "--json-schema"),
    (["generate", "hi", "--json-schema", "x.json", "--regex", "a"], "either --json-schema or --regex"),
    (["generate", "hi", "--regex", ""], "sampling.grammar"),
    (["generate", "hi", "--repetition-penalty", "0"], "sampling.repetition_penalty"),
    (["generate", "hi", "--presence-penalty", "9"], "sampling.presence_penalty"),
    (["generate", "hi", "--frequency-penalty", "9"], "sampling.frequency_penalty"),
    (["generate", "hi", "--timeout", "0"], "timeout_s"),
    (["generate", "hi", "--request-id", "x" * 1000], "request_id"),
    (["generate", "hi", "--router", "a:b:c:99999999"], "a:b:c:99999999"),
    (["generate", "hi", "--raw", "--system", "x"], "--system"),
    (["generate", "1,x", "--token-ids"], "token ids"),
    (["generate", "1,99999999999", "--token-ids"], "token ids"),
    (["generate", "hi", "--zzz"], "--zzz"),
    (["status", "--interval", "0"], "--interval"),
    (["status", "--router", ""], "address"),
    (["status", "stray"], "stray"),
    (["config"], "check"),
    (["config", "check"], "FILE"),
    (["config", "check", "/nonexistent/kvrelay.toml"], "does not exist"),
]


@pytest.mark.parametrize(
    ("arguments", "complaint"), BAD_USAGE, ids=[" ".join(arguments)[:50] for arguments, _ in BAD_USAGE]
)
def test_bad_usage_is_refused_with_what_is_wrong(arguments: list[str], complaint: str, invoke: Any) -> None:
    outcome = invoke(*arguments)
    assert outcome.code == 2
    assert complaint in outcome.err + outcome.out
    assert "Traceback" not in outcome.err


@pytest.mark.parametrize("command", ["router", "prefill", "decode", "up"])
def test_every_service_lists_all_faults_of_its_config_before_it_starts(
    command: str, invoke: Any, tmp_path: Path
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[router]\ngrpc_port = 'x'\n[engine]\nnum_blocks = 0\n[nod]\n")
    outcome = invoke(command, "--config", str(file))
    assert outcome.code == 2
    for line, key in ((2, "router.grpc_port"), (4, "engine.num_blocks"), (5, "nod")):
        assert f"{file}:{line}: {key}" in outcome.err


def test_the_environment_names_a_config_file_too(
    invoke: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "bad.toml"
    file.write_text("[router]\ngrpc_port = 'x'\n")
    monkeypatch.setenv("KVRELAY_CONFIG", str(file))
    assert f"{file}:2: router.grpc_port" in invoke("router").err
