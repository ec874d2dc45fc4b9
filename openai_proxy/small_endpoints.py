"""Models, tokens, health and figures: everything that does not generate."""

from __future__ import annotations

import asyncio
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from kvrelay.core.cluster_view import ModelInfo
from kvrelay.core.errors import KVRelayError
from kvrelay.openai_proxy.answer_parts import json_answer
from kvrelay.openai_proxy.errors import bad_request
from kvrelay.openai_proxy.schema.tokens import DetokenizeBody, TokenizeBody
from kvrelay.openai_proxy.service import ProxyService
from kvrelay.openai_proxy.tool_calls.prompt import tool_prompt

HEALTH_TIMEOUT_S = 2.0


def _service(request: Request) -> ProxyService:
    service: ProxyService = request.app.state.service
    return service


async def list_models(request: Request) -> Response:
    """The models that the cluster serves now."""
    models = await _service(request).client.list_models()
    return json_answer({"object": "list", "data": [_model(info) for info in models]})


async def get_model(model: str, request: Request) -> Response:
    """One model; 404 if it is not served."""
    return json_answer(_model(await _service(request).client.find_model(model)))


def _model(info: ModelInfo) -> dict[str, Any]:
    return {
        "id": info.name,
        "object": "model",
        "created": 0,
        "owned_by": "kvrelay",
        "max_model_len": info.max_model_len,
    }


async def tokenize(body: TokenizeBody, request: Request) -> Response:
    """Token ids of a text or a conversation."""
    service = _service(request)
    info = await service.client.find_model(body.model)
    tokenizer = await service.client.tokenizer(info.name)
    if body.messages is not None:
        if tokenizer.chat_template is None:
            raise bad_request("messages: the model has no chat template", "messages")
        source = tokenizer.chat_template.source
        prompt = tool_prompt(body.messages, body.tools, source, service.config.tool_format)
        token_ids = await service.client.tokenize_chat(
            prompt.messages,
            tools=prompt.tools,
            model=info.name,
            add_generation_prompt=body.add_generation_prompt,
            template_variables=body.chat_template_kwargs,
        )
    else:
        token_ids = await service.client.tokenize(
            body.prompt or "", model=info.name, add_special_tokens=body.add_special_tokens
        )
    shown = None
    if body.return_token_strs:
        shown = [tokenizer.tokenizer.id_to_token(token_id) or "" for token_id in token_ids]
    return json_answer(
        {
            "count": len(token_ids),
            "max_model_len": info.max_model_len,
            "tokens": list(token_ids),
            "token_strs": shown,
        }
    )


async def detokenize(body: DetokenizeBody, request: Request) -> Response:
    """Text of token ids."""
    service = _service(request)
    info = await service.client.find_model(body.model)
    if body.tokens and max(body.tokens) >= info.vocab_size:
        raise bad_request(
            f"tokens: {max(body.tokens)} is not in the vocabulary of {info.vocab_size}", "tokens"
        )
    text = await service.client.detokenize(
        body.tokens, model=info.name, skip_special_tokens=body.skip_special_tokens
    )
    return json_answer({"prompt": text})


async def health(request: Request) -> Response:
    """200 while a router answers and a model is served, else 503 with the reason."""
    try:
        async with asyncio.timeout(HEALTH_TIMEOUT_S):
            models = await _service(request).client.list_models()
    except TimeoutError:
        return JSONResponse({"status": "unhealthy", "reason": "no router answers"}, 503)
    except KVRelayError as error:
        return JSONResponse({"status": "unhealthy", "reason": error.message}, 503)
    names = [info.name for info in models if info.num_prefill_nodes and info.num_decode_nodes]
    if not names:
        return JSONResponse({"status": "unhealthy", "reason": "no model has both kinds of nodes"}, 503)
    return JSONResponse({"status": "ok", "models": names})


async def metrics(request: Request) -> Response:
    """Prometheus' text format."""
    return Response(_service(request).metrics.exposition(), media_type=CONTENT_TYPE_LATEST)
