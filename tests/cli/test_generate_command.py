"""`kvrelay generate` against a scripted router."""

from __future__ import annotations

import io
import json
import signal
from pathlib import Path
from typing import Any

import pytest

from kvrelay.core.errors import (
    ContextLengthExceeded,
    EngineFailed,
    KVRelayError,
    NodeUnavailable,
    Overloaded,
    UnknownModel,
)
from kvrelay.core.sampling import Grammar, GrammarKind


def test_the_answer_is_streamed_to_stdout(invoke: Any, fake_router: Any) -> None:
    outcome = invoke("generate", "--router", fake_router.address, "Name three rivers.")
    assert (outcome.code, outcome.out, outcome.err) == (0, "Rhône, Rhein, Aare.\n", "")


def test_a_prompt_becomes_a_chat_unless_it_is_raw(invoke: Any, fake_router: Any) -> None:
    invoke("generate", "-r", fake_router.address, "--system", "Be brief.", "Hello ü")
    assert fake_router.prompt_text() == "[system]Be brief.[user]Hello ü[assistant]"
    invoke("generate", "-r", fake_router.address, "--raw", "Hello ü")
    assert fake_router.prompt_text() == "Hello ü"


def test_a_dash_reads_the_prompt_from_stdin(
    invoke: Any, fake_router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("from stdin é\n".encode())))
    assert invoke("generate", "-r", fake_router.address, "--raw", "-").code == 0
    assert fake_router.prompt_text() == "from stdin é\n"


def test_stdin_that_is_no_text_is_refused(
    invoke: Any, fake_router: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe")))
    outcome = invoke("generate", "-r", fake_router.address, "-")
    assert outcome.code == 2
    assert "not UTF-8" in outcome.err


def test_token_ids_go_in_and_come_out_as_they_are(invoke: Any, fake_router: Any) -> None:
    fake_router.has_tokenizer = False
    outcome = invoke("generate", "-r", fake_router.address, "--token-ids", "1, 2,3")
    assert fake_router.calls[-1].request.token_ids == (1, 2, 3)
    assert outcome.out.split() == [
        str(token) for token in fake_router.tokenizer.encode(fake_router.answer).ids
    ]


def test_every_sampling_flag_reaches_the_router(invoke: Any, fake_router: Any) -> None:
    flags = (
        "--max-tokens 30 --temperature 0.5 --top-k 7 --top-p 0.9 --min-p 0.1 --repetition-penalty 1.1"
        " --presence-penalty 0.2 --frequency-penalty 0.3 --seed 42 --stop-token-id 5 --stop-token-id 6"
        " --ignore-eos --logprobs 2 --timeout 50 --request-id mine --model tiny"
    )
    assert invoke("generate", "-r", fake_router.address, *flags.split(), "hi").code == 0
    call = fake_router.calls[-1]
    sampling = call.request.sampling
    assert (sampling.max_tokens, sampling.temperature, sampling.top_k, sampling.top_p) == (30, 0.5, 7, 0.9)
    assert (sampling.min_p, sampling.repetition_penalty) == (0.1, 1.1)
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.seed) == (0.2, 0.3, 42)
    assert (sampling.stop_token_ids, sampling.ignore_eos, sampling.num_logprobs) == ((5, 6), True, 2)
    assert (call.model, call.request_id) == ("tiny", "mine")
    assert 0 < call.timeout_s <= 50


def test_min_tokens_and_grammars_reach_the_router(invoke: Any, fake_router: Any, tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text('{"type": "object"}')
    assert invoke("generate", "-r", fake_router.address, "--json-schema", str(schema), "hi").code == 0
    assert fake_router.calls[-1].request.sampling.grammar == Grammar(
        GrammarKind.JSON_SCHEMA, '{"type": "object"}'
    )
    flags = ["--regex", "[ab]+", "--min-tokens", "3"]
    assert invoke("generate", "-r", fake_router.address, *flags, "hi").code == 0
    sampling = fake_router.calls[-1].request.sampling
    assert (sampling.grammar, sampling.min_tokens) == (Grammar(GrammarKind.REGEX, "[ab]+"), 3)


def test_json_is_one_object_with_text_tokens_report_and_timings(invoke: Any, fake_router: Any) -> None:
    outcome = invoke("generate", "-r", fake_router.address, "--json", "--logprobs", "1", "hi")
    found = json.loads(outcome.out)
    assert found["request_id"] == fake_router.calls[-1].request_id
    assert found["text"] == fake_router.answer
    assert found["token_ids"] == fake_router.tokenizer.encode(fake_router.answer).ids
    assert found["finish_reason"] == "stop"
    assert found["report"]["kv_bytes"] == 4096
    assert found["ttft_s"] > 0
    assert len(found["itl_s"]) == len(found["token_ids"]) - 1
    assert found["logprobs"][0] == {"chosen": -0.5, "top": [[1, -0.5]]}


def test_stats_go_to_stderr_and_leave_the_answer_alone(invoke: Any, fake_router: Any) -> None:
    outcome = invoke("generate", "-r", fake_router.address, "--stats", "hi")
    assert outcome.out == "Rhône, Rhein, Aare.\n"
    for text in (
        "p0 -> d0",
        "19 tokens, 2 of them cached",
        "TTFT",
        "ITL p50",
        "4.10 kB in 2 messages over memory",
    ):
        assert text in outcome.err


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (
            ContextLengthExceeded("prompt_token_ids holds too many", field="prompt_token_ids"),
            2,
            "prompt_token_ids",
        ),
        (UnknownModel("no model 'x'", field="model"), 2, "`kvrelay status` shows which models"),
        (KVRelayError("something odd"), 1, "something odd"),
    ],
)
def test_a_refusal_is_one_line_and_its_kind_the_exit_status(
    error: KVRelayError, code: int, text: str, invoke: Any, fake_router: Any
) -> None:
    fake_router.error = error
    outcome = invoke("generate", "-r", fake_router.address, "hi")
    assert (outcome.code, outcome.out) == (code, "")
    assert text in outcome.err
    assert len(outcome.err.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (Overloaded("the queue is full", retry_after_s=0.01), 3),
        (NodeUnavailable("no decode node"), 3),
        (EngineFailed("the engine failed"), 1),
    ],
)
def test_an_error_that_lasts_through_all_retries_has_its_kinds_exit_status(
    error: KVRelayError, code: int, invoke: Any, fake_router: Any
) -> None:
    fake_router.error = error
    outcome = invoke("generate", "-r", fake_router.address, "--timeout", "60", "hi")
    assert outcome.code == code
    assert error.message in outcome.err
    assert len(fake_router.calls) > 1


def test_no_router_says_which_address_and_what_to_do(invoke: Any) -> None:
    outcome = invoke("generate", "--router", "127.0.0.1:1", "hi")
    assert outcome.code == 3
    assert "127.0.0.1:1" in outcome.err
    assert "is the router running?" in outcome.err


def test_ctrl_c_cancels_at_the_router(spawn: Any, fake_router: Any) -> None:
    fake_router.hangs = True
    fake_router.answer = "a\nb"
    process = spawn("generate", "--router", fake_router.address, "hi")
    assert process.stdout.readline() == "a\n"
    process.send_signal(signal.SIGINT)
    process.communicate()
    assert process.returncode == 130
    fake_router.cancelled.get(timeout=60)


def test_a_reader_that_goes_away_ends_the_command_quietly(spawn: Any, fake_router: Any) -> None:
    fake_router.answer = "x" * 200 + "\n"
    fake_router.hangs = True
    process = spawn("generate", "--router", fake_router.address, "--json", "hi")
    process.stdout.close()
    fake_router.hangs = False
    process.wait(60)
    assert "Traceback" not in process.stderr.read()
