"""What one `kvrelay up` does: prepare the model, start, answer or wait, stop; and never leave a process."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, cast

from kvrelay.cli.answer_report import summary_lines
from kvrelay.cli.ask import Question, ask, write_out
from kvrelay.cli.config import ClusterConfig
from kvrelay.cli.config_file import LoadedConfig, Override, Overrides, load_config
from kvrelay.cli.embedded_choice import with_embedded_model
from kvrelay.cli.exit_codes import EXIT_INTERRUPTED
from kvrelay.cli.local_cluster import LaunchPlan, LocalCluster
from kvrelay.cli.options import DEFAULT_ROUTER
from kvrelay.cli.progress import Progress
from kvrelay.cli.setting_flags import as_argument
from kvrelay.core.errors import ConfigError
from kvrelay.core.sampling import SamplingParams
from kvrelay.engine.config import EngineConfig, EngineKind

_STOP_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_LOCAL_HOST: Final = "127.0.0.1"
_NODE_SECTIONS: Final = ("engine", "transfer", "node")


@dataclass(frozen=True, slots=True)
class UpTask:
    """One `kvrelay up` whose settings are known to be sound. `question` None: stay until told to stop."""

    config: ClusterConfig
    engine: EngineConfig
    config_file: Path | None
    overrides: Overrides
    question: Question | None
    keep_logs: bool

    def plan(self, folder: Path) -> LaunchPlan:
        """The services' command lines: the same file, and the flags that concern them."""
        file = ["--config", str(self.config_file.absolute())] if self.config_file else []
        return LaunchPlan(
            config=self.config,
            folder=folder,
            router_arguments=(*file, *self._arguments("router")),
            node_arguments=(*file, *self._arguments(*_NODE_SECTIONS)),
            proxy_arguments=(*file, *self._arguments("proxy")),
        )

    def _arguments(self, *sections: str) -> list[str]:
        return [
            as_argument(key, override.value)
            for key, override in self.overrides.items()
            if key.split(".")[0] in sections
        ]


def prepare_up(
    config_file: Path | None, overrides: Overrides, once: str | None, max_tokens: int, keep_logs: bool
) -> UpTask:
    """Check all settings, and the question, before anything starts.

    Raises:
        ConfigError, InvalidRequest: what is wrong with them.
    """
    loaded = load_config(config_file, overrides, ("cluster", "router", "proxy", *_NODE_SECTIONS))
    engine = cast(EngineConfig, loaded.built["engine"])
    overrides = {**_own_defaults(loaded, is_staying=once is None), **overrides}
    question = None if once is None else _question(once, max_tokens, engine)
    cluster = cast(ClusterConfig, loaded.built["cluster"])
    return UpTask(cluster, engine, config_file, overrides, question, keep_logs)


def _own_defaults(loaded: LoadedConfig, *, is_staying: bool) -> Overrides:
    """Where a local cluster's defaults are not a lone router's: it listens on this machine only; and one
    that nobody else will ask takes any free ports, so that it can run beside another."""
    defaults: dict[str, dict[str, object]] = {
        "router": {"listen_host": _LOCAL_HOST},
        "proxy": {"host": _LOCAL_HOST},
    }
    if not is_staying:
        defaults["router"] |= {"grpc_port": 0, "http_port": 0}
        defaults["proxy"] |= {"port": 0}
    return {
        f"{section}.{name}": Override(f"--{section}.{name}", value)
        for section, values in defaults.items()
        for name, value in values.items()
        if name not in cast("dict[str, object]", loaded.given.get(section, {}))
    }


def run_up(task: UpTask) -> int:
    """Do it; returns the exit status.

    Raises:
        ConfigError: the model or the log folder can't be had.
        ChildDiedError: a service ended by itself.
        KVRelayError: the question could not be answered.
    """
    with _log_folder(task) as folder, Progress() as progress:
        return asyncio.run(_run(_with_model(task, progress), folder, progress))


def _question(prompt: str, max_tokens: int, engine: EngineConfig) -> Question:
    sampling = SamplingParams(max_tokens=max_tokens)
    if engine.engine == EngineKind.SIM:
        # It has no tokenizer: the text's bytes stand in for its tokens.
        return Question(token_ids=tuple(prompt.encode()), sampling=sampling)
    return Question(text=prompt, sampling=sampling)


def _with_model(task: UpTask, progress: Progress) -> UpTask:
    """Make the embedded model's folder once, here, rather than in every node at the same time."""
    engine = with_embedded_model(task.engine, lambda done, text: progress.update(f"{done:4.0%} {text}"))
    found = {"engine.model": Override("--model", engine.model)}
    if engine.tokenizer:
        found["engine.tokenizer"] = Override("--tokenizer", engine.tokenizer)
    if engine.served_name:
        found["engine.served_name"] = Override("--served-name", engine.served_name)
    if engine.num_threads is None:
        # Prefill and decode run at the same time, and a step waits for its slowest thread.
        num_threads = max(1, (os.cpu_count() or 1) // (task.config.prefill + task.config.decode))
        found["engine.num_threads"] = Override("--threads", num_threads)
    return replace(task, engine=engine, overrides={**task.overrides, **found})


@contextmanager
def _log_folder(task: UpTask) -> Iterator[Path]:
    """The folder for logs. A temporary one is removed after a clean end, unless it was asked for."""
    try:
        named = Path(task.config.log_dir).absolute() if task.config.log_dir else None
        folder = named or Path(tempfile.mkdtemp(prefix="kvrelay-up-"))
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"cluster.log_dir can't be used: {error}") from error
    print(f"logs are in {folder}", file=sys.stderr, flush=True)
    yield folder
    if not named and not task.keep_logs:
        shutil.rmtree(folder, ignore_errors=True)


async def _run(task: UpTask, folder: Path, progress: Progress) -> int:
    cluster = LocalCluster(task.plan(folder), progress.update)
    work = asyncio.ensure_future(_work(task, cluster, progress))
    with _signals_stop(work, cluster):
        try:
            await work
        except asyncio.CancelledError:
            was_staying = cluster.is_ready and task.question is None
            return 0 if was_staying else EXIT_INTERRUPTED
        finally:
            await cluster.stop()
    return 0


@contextmanager
def _signals_stop(work: asyncio.Future[None], cluster: LocalCluster) -> Iterator[None]:
    """The first signal ends `work`, and so stops the cluster in order; the next one kills it."""
    was_told = False

    def on_signal() -> None:
        nonlocal was_told
        if was_told or work.done():
            cluster.send_kill()
        was_told = True
        work.cancel()

    loop = asyncio.get_running_loop()
    for number in _STOP_SIGNALS:
        loop.add_signal_handler(number, on_signal)
    try:
        yield
    finally:
        for number in _STOP_SIGNALS:
            loop.remove_signal_handler(number)


async def _work(task: UpTask, cluster: LocalCluster, progress: Progress) -> None:
    await cluster.start()
    progress.finish()
    if task.question is None:
        print(_ready_text(cluster), file=sys.stderr, flush=True)
        await cluster.wait_for_death()
    else:
        await cluster.while_alive(_answer(cluster.address, task.question))


def _ready_text(cluster: LocalCluster) -> str:
    config = cluster.plan.config
    facts = cluster.router.facts if cluster.router else {}
    asked = "" if cluster.address == DEFAULT_ROUTER else f" --router {cluster.address}"
    return (
        f"ready: router {cluster.address} (HTTP {facts.get('http_address', 'off')}),"
        f" {config.prefill} prefill and {config.decode} decode node(s)\n"
        f"{_proxy_text(cluster)}"
        f'ask it with: kvrelay generate{asked} "Name three rivers."\n'
        "Ctrl-C stops it"
    )


def _proxy_text(cluster: LocalCluster) -> str:
    if cluster.proxy is None:
        return ""
    return f"OpenAI API: http://{cluster.proxy.facts['http_address']}/v1\n"


async def _answer(address: str, question: Question) -> None:
    from kvrelay.client import AsyncClient

    async with AsyncClient([address]) as client:
        state = await client.cluster_state()
        result = await ask(client, question, write_out)
    print("\n\n" + "\n".join(summary_lines(result, state)), flush=True)
