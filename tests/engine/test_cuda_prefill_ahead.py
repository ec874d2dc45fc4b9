"""CUDA's runner over a device that exists in virtual time: what it launches when, and reports when.

The kernels are the CPU's, the device's queue is made up: each layer takes the device `layer_s` and the host,
which launches it, `launch_s`. The host's clock passes only while it launches or waits.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from kvrelay.engine.config import EngineConfig
from kvrelay.engine.cuda.plain_draw import PreparedDraw
from kvrelay.engine.cuda.prefill_step import PrefillStep
from kvrelay.engine.cuda.runner import CudaRunner
from kvrelay.engine.executor import DrawnToken
from kvrelay.engine.host_tier import BlockCopy
from kvrelay.engine.torch_engine import TorchEngine

NUM_LAYERS, BUDGET = 6, 32
SETTINGS = {"num_blocks": 64, "block_size": 4, "max_num_seqs": 8, "max_num_batched_tokens": BUDGET}


class Mark:
    def __init__(self, device, passed_s):
        self._device = device
        self.passed_s = passed_s

    def query(self):
        return self.passed_s <= self._device.now_s

    def synchronize(self):
        self._device.now_s = max(self._device.now_s, self.passed_s)


class VirtualDevice:
    """`marks` are those of all steps, in order; `idle_s` is what the device waited between two of them."""

    def __init__(self, layer_s, launch_s):
        self.layer_s, self.launch_s = layer_s, launch_s
        self.now_s = self.idle_s = 0.0
        self.marks = []

    def mark(self):
        self.now_s += self.launch_s
        free_s = self.marks[-1].passed_s if self.marks else self.now_s
        self.idle_s += max(0.0, self.now_s - free_s)
        self.marks.append(Mark(self, max(self.now_s, free_s) + self.layer_s))
        return self.marks[-1]

    def clock(self):
        return self.now_s


class VirtualKV:
    """The host's store, with the marks of a GPU's."""

    def __init__(self, store, device):
        self._store = store
        self.mark = device.mark
        self.written = []

    def __getattr__(self, name):
        return getattr(self._store, name)

    def mark_written(self, *, at):
        self.written.append(at)

    def mark_freed(self):
        return


class GreedySampler:
    def prepare(self, chunks):
        num = len(chunks)
        ids, best = torch.empty(num, dtype=torch.int64), torch.empty(num)
        return PreparedDraw(ids, best, ids.clone(), best.clone(), ids.clone(), best.clone())

    def draw(self, logits, keys, temperatures, token_ids, best):
        token_ids.copy_(logits.argmax(1))
        best.copy_(logits.amax(1))


@pytest.fixture(scope="module")
def model(tmp_path_factory, save_model):
    return save_model(tmp_path_factory.mktemp("six") / "llama", "Llama", num_hidden_layers=NUM_LAYERS)


@pytest.fixture
def build(model):
    """An engine, and the device that it runs on; no step fits a graph."""

    def build_on(layer_s=3.0, launch_s=0.5, **changes):
        engine = TorchEngine(EngineConfig(str(model), layers_per_group=1, **{**SETTINGS, **changes}))
        device = VirtualDevice(layer_s, launch_s)
        graphs = SimpleNamespace(max_rows=0, sampler=GreedySampler())
        runner = CudaRunner(engine._executor, graphs, VirtualKV(engine.kv, device), device.clock)
        engine._executor = engine._ahead_executor = runner
        return engine, device

    return build_on

    return build


class Listener:
    """Writes down when each layer is reported, and checks that the device had passed its mark."""

    def __init__(self, engine, device):
        self.reports = []
        self._device = device
        engine.set_kv_ready_listener(self)

    def __call__(self, ready):
        device = self._device
        self.reports.append(
            (ready.key, ready.tokens.start, ready.layers.start, device.now_s, len(device.marks))
        )

    def check(self, steps):
        """`steps`: key and first token of each, in order. A step has a mark for each layer and one for its
        end."""
        expected = [(key, start, layer) for key, start in steps for layer in range(NUM_LAYERS)]
        assert [report[:3] for report in self.reports] == expected
        for index, (_, _, layer, reported_s, _) in enumerate(self.reports):
            mark = self._device.marks[index // NUM_LAYERS * (NUM_LAYERS + 1) + layer]
            assert mark.passed_s <= reported_s, "reported before it was there"
            assert reported_s - mark.passed_s < NUM_LAYERS * self._device.launch_s, "a whole launch late"


def run(engine):
    """What was drawn, by key, and how many marks there were when it was known."""
    drawn = {}
    while engine.has_work():
        step = engine.step()
        engine.check()
        assert not step.failures
        for output in step.outputs:
            drawn[output.key] = (output.token_id, len(engine.kv.mark.__self__.marks))
    return drawn


def submit(engine, requests):
    for key, request in requests.items():
        engine.submit_prefill(request, key)


@pytest.fixture
def requests(request_of, prompt_of):
    return {key: request_of(prompt_of(BUDGET, variant)) for variant, key in enumerate("abcd")}


def test_prompts_in_a_queue_give_the_tokens_of_each_alone_and_leave_no_gap(build, requests):
    alone = {}
    for key, request in requests.items():
        engine, _ = build()
        submit(engine, {key: request})
        alone |= {key: token for key, (token, _) in run(engine).items()}
    engine, device = build()
    listener = Listener(engine, device)
    submit(engine, requests)
    drawn = run(engine)
    assert {key: token for key, (token, _) in drawn.items()} == alone
    assert [num_marks for _, num_marks in drawn.values()] == [
        (NUM_LAYERS + 1) * min(index + 2, 4) for index in range(4)
    ], "the next step was whole on the device when a token was read"
    assert device.idle_s == 0.0
    listener.check([(key, 0) for key in "abcd"])


def test_without_a_step_ahead_the_device_waits_between_prompts(build, requests):
    engine, device = build()
    engine._ahead_executor = None
    listener = Listener(engine, device)
    submit(engine, requests)
    run(engine)
    assert device.idle_s > 0.0
    listener.check([(key, 0) for key in "abcd"])


def test_chunks_of_one_prompt_leave_no_gap(build, request_of, prompt_of):
    engine, device = build()
    listener = Listener(engine, device)
    submit(engine, {"a": request_of(prompt_of(3 * BUDGET))})
    assert len(run(engine)) == 1
    assert device.idle_s == 0.0
    listener.check([("a", start) for start in range(0, 3 * BUDGET, BUDGET)])


def test_layers_are_reported_between_those_of_the_step_that_is_being_queued(build, requests):
    engine, device = build(layer_s=3.0, launch_s=0.8)
    listener = Listener(engine, device)
    submit(engine, {key: requests[key] for key in "ab"})
    run(engine)
    num_marks = {num_marks for key, *_, num_marks in listener.reports if key == "a"}
    assert num_marks & set(range(NUM_LAYERS + 2, 2 * NUM_LAYERS + 2)), (
        "while the second step is partly queued"
    )
    listener.check([(key, 0) for key in "ab"])


def test_nothing_is_queued_ahead_of_steps_that_take_the_host_longer_than_the_device(build, requests):
    engine, device = build(layer_s=0.5, launch_s=3.0)
    listener = Listener(engine, device)
    submit(engine, requests)
    drawn = run(engine)
    assert [num_marks for _, num_marks in drawn.values()] == [
        (NUM_LAYERS + 1) * (index + 1) for index in range(4)
    ], "a token would have waited for the launch of the next step"
    listener.check([(key, 0) for key in "abcd"])


def test_what_comes_too_late_to_be_queued_in_time_waits_for_the_token(build, requests):
    engine, device = build()
    submit(engine, {"a": requests["a"]})
    while len(device.marks) < NUM_LAYERS or not device.marks[NUM_LAYERS - 2].query():
        assert engine.step().is_partial
    submit(engine, {"b": requests["b"]})
    assert [num_marks for _, num_marks in run(engine).values()] == [NUM_LAYERS + 1, 2 * (NUM_LAYERS + 1)]
    assert device.idle_s > 0.0


def test_what_the_device_cant_draw_is_not_queued_ahead(build, requests, request_of, prompt_of):
    engine, device = build()
    Listener(engine, device)
    submit(engine, {"a": requests["a"], "b": request_of(prompt_of(BUDGET, 5), num_logprobs=2)})
    drawn = run(engine)
    assert [num_marks for _, num_marks in drawn.values()] == [NUM_LAYERS + 1, 2 * (NUM_LAYERS + 1)]


def test_decode_and_prefill_in_one_step_is_computed_in_the_step(build, drive, request_of, prompt_of):
    requests = [request_of(prompt_of(20, variant), max_tokens=6) for variant in range(3)]
    engine, _ = build()
    expected = [drive(engine).generate(request)[0] for request in requests]
    assert drive(build()[0]).generate(*requests) == expected


def test_gathers_wait_for_restored_blocks_from_their_sequences_turn_on(build):
    engine, device = build()
    runner, kv = engine._executor, engine.kv
    runner._eager = SimpleNamespace(move_blocks=lambda copies, before_receive: None)
    runner.move_blocks([BlockCopy(3, 0, to_host=False)], before_receive=False)
    restored = device.marks[-1]
    device.mark()  # a step that is queued behind
    assert kv.written == []
    runner.reveal_restored()
    runner.reveal_restored()
    assert kv.written == [restored]


def test_results_come_behind_the_end_of_a_step():
    device = VirtualDevice(layer_s=3.0, launch_s=0.5)
    reported = []
    step = PrefillStep([], reported.append, device.mark, device.clock)
    for _ in range(3):
        step.layer_queued()
    step.queued(lambda: [DrawnToken(5)])
    turns = 1
    while not step.advance():
        turns += 1
    assert reported == [0, 1, 2]
    assert turns == 3, "one layer a turn"
    assert device.now_s < device.marks[-1].passed_s
    assert step.results() == [DrawnToken(5)]
    assert device.now_s == device.marks[-1].passed_s
