"""What it takes to pull a prompt's prefix from another prefill node, beside computing it: two prefill nodes
and a decode node on this machine, SmolLM2, prompts in turns.

    python -m benchmarks.prefix_pull [--json] [--prompts 3] [--tokens 128 512 1024 1536] [--transport auto]

Every prompt is a prefix and a short rest that is computed in any case. TTFT is the client's, through the
router; "pull" is what the pulling node says, from its command to the KV in its cache.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
from dataclasses import dataclass, field
from typing import Final

from benchmarks.local_cluster import running_cluster
from kvrelay.client import AsyncClient, GenerationResult
from kvrelay.core.ids import RequestId
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.embedded_model import ensure_smollm2

REST_TOKENS: Final = 16
SAMPLING: Final = SamplingParams(max_tokens=2, ignore_eos=True)


@dataclass
class Seen:
    """Of prompts of one length, in turns."""

    computed_s: list[float] = field(default_factory=list)
    pulled_s: list[float] = field(default_factory=list)
    pull_s: list[float] = field(default_factory=list)
    num_pulled_tokens: int = 0

    def figures(self) -> dict[str, float]:
        """Medians; the ratio is of each pulled prompt to the one computed beside it."""
        ratios = [own / other for own, other in zip(self.pulled_s, self.computed_s, strict=True)]
        return {
            "computed_ttft_ms": 1e3 * statistics.median(self.computed_s),
            "pulled_ttft_ms": 1e3 * statistics.median(self.pulled_s),
            "pull_ms": 1e3 * statistics.median(self.pull_s),
            "pulled_over_computed": statistics.median(ratios),
            "pulled_tokens": self.num_pulled_tokens,
        }


class Asker:
    """Prompts that no node has seen, and where they are prefilled."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._rng = random.Random(0)
        self._number = 0

    def prompt(self, num_tokens: int) -> tuple[int, ...]:
        return tuple(self._rng.randrange(1000, 40000) for _ in range(num_tokens + REST_TOKENS))

    async def ask(self, prompt: tuple[int, ...], order: str) -> GenerationResult:
        """`order` as `ordered_router` has it."""
        self._number += 1
        return await self._client.complete(prompt, sampling=SAMPLING, request_id=f"{self._number}.{order}")

    async def compare(self, num_tokens: int, seen: Seen) -> None:
        """One prompt computed on the second node, one pulled there from the first, which has computed it."""
        computed = await self.ask(self.prompt(num_tokens), "prefill-1.-.0")
        prompt = self.prompt(num_tokens)
        first = await self.ask(prompt, "prefill-0.-.0")
        pulled = await self.ask(prompt, f"prefill-1.prefill-0.{num_tokens}")
        if pulled.token_ids != first.token_ids:
            raise SystemExit(f"a pulled prefix gave another answer: {pulled.token_ids}, {first.token_ids}")
        explanation = await self._client.explain(RequestId(pulled.request_id))
        seen.computed_s.append(computed.ttft_s)
        seen.pulled_s.append(pulled.ttft_s)
        seen.pull_s.append(explanation.measured.pull_s)
        seen.num_pulled_tokens = pulled.report.num_pulled_tokens


async def measure(args: argparse.Namespace) -> dict[str, object]:
    node_args = ["--model", str(ensure_smollm2()), "--dtype", "float32", "--num-blocks", "2048"]
    node_args += ["--transport", args.transport, "--threads", str(args.threads)]
    seen = {num_tokens: Seen() for num_tokens in args.tokens}
    with running_cluster(2, 1, node_args, router_module="benchmarks.ordered_router") as (address, _):
        async with AsyncClient([address]) as client:
            asker = Asker(client)
            await asker.compare(max(args.tokens), Seen())  # connects and warms up
            for _ in range(args.prompts):
                for num_tokens, of_length in seen.items():
                    await asker.compare(num_tokens, of_length)
    return {
        "by_tokens": {str(num_tokens): found.figures() for num_tokens, found in seen.items()},
        "prompts": args.prompts,
        "transport": args.transport,
        "threads": args.threads,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--prompts", type=int, default=3)
    parser.add_argument("--tokens", type=int, nargs="+", default=[128, 512, 1024, 1536], help="of the prefix")
    parser.add_argument("--transport", default="auto")
    share = max(1, (os.cpu_count() or 1) // 2)
    parser.add_argument("--threads", type=int, default=share, help="of each engine")
    args = parser.parse_args()
    figures = asyncio.run(measure(args))
    if args.json:
        print(json.dumps(figures))
        return
    print(f"A prefix pulled beside computed: medians of {args.prompts} prompts of each length, in turns")
    print(f"{'tokens':>8}{'TTFT computed':>16}{'TTFT pulled':>14}{'pull':>10}{'pulled/computed':>18}")
    by_tokens = figures["by_tokens"]
    assert isinstance(by_tokens, dict)
    for num_tokens, row in by_tokens.items():
        print(
            f"{num_tokens:>8}{row['computed_ttft_ms']:>13.1f} ms{row['pulled_ttft_ms']:>11.1f} ms"
            f"{row['pull_ms']:>7.1f} ms{row['pulled_over_computed']:>18.3f}"
        )


if __name__ == "__main__":
    main()
