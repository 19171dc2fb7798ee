"""Replayed steps: the buffers, the positions and the results are those of the loop that is called; what cannot be captured goes on without and says why."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from bitpress.engine import decode_batch, decode_graph
from bitpress.engine.decode import Decoder
from bitpress.engine.decode_batch import BatchDecoder
from bitpress.engine.decode_graph import Stepper


class FakeRecorder:
    """Warms up as the real one does and records the callable. A replay fills the one tensor of its result, as a graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        for _ in range(decode_graph.WARM_UP):
            result = call()
        self.recorded += 1

        def replay() -> Tensor:
            self.replayed += 1
            return result.copy_(call())

        return replay


class Broken:
    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        call()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")


@pytest.fixture
def fake(monkeypatch) -> FakeRecorder:
    recorder = FakeRecorder()
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: recorder)
    monkeypatch.setattr(decode_batch, "WINDOW", 16)
    return recorder


def ids(length: int) -> Tensor:
    return torch.randint(2, 320, (length,), generator=torch.Generator().manual_seed(2))


def stepped(decoder: Decoder, ids_T: Tensor) -> Tensor:
    """Two pieces, then single tokens, so that positions come from both."""
    decoder.prefill(ids_T[:5])
    decoder.extend(ids_T[5:9])
    return torch.stack([decoder.step(int(token)) for token in ids_T[9:]])


@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_replayed_decoder_gives_the_logits_of_the_plain_loop(tiny_models, family, fake) -> None:
    model, tokens = tiny_models(family), ids(40)
    decoder = Decoder(model, dtype=torch.float32)
    found = [stepped(decoder, tokens) for _ in range(2)]
    assert fake.recorded == 3 and fake.replayed == 62, "windows of 16, 32 and 64 positions are recorded once"
    with torch.no_grad():
        expected = model(input_ids=tokens[None]).logits[0, 9:].float()
    torch.testing.assert_close(found[0], expected, atol=2e-5, rtol=1e-4)
    assert torch.equal(found[0], found[1])
    assert decoder.position == 40 and decoder.conditions["graph"] == "captured"


def test_a_replayed_batch_gives_what_it_gives_called(tiny_models, fake, monkeypatch) -> None:
    model, tokens = tiny_models("llama"), ids(60)
    found = batch_logits(BatchDecoder(model, 2, dtype=torch.float32), tokens)
    assert fake.recorded == 2 and fake.replayed == 20
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: None)
    torch.testing.assert_close(found, batch_logits(BatchDecoder(model, 2, dtype=torch.float32), tokens), atol=1e-6, rtol=1e-6)


def batch_logits(batch: BatchDecoder, ids_T: Tensor) -> Tensor:
    """Results are kept, so that one which the next replay overwrites is seen."""
    batch.prefill(0, ids_T[:4])
    batch.prefill(1, ids_T[4:13])
    return torch.stack([batch.step(ids_T[at : at + 2]) for at in range(20, 60, 2)])


def test_a_capture_that_fails_is_told_and_nothing_else_changes(tiny_models, monkeypatch) -> None:
    model, tokens = tiny_models("llama"), ids(30)
    plain = stepped(Decoder(model, dtype=torch.float32), tokens)
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: Broken())
    decoder = Decoder(model, dtype=torch.float32)
    torch.testing.assert_close(stepped(decoder, tokens), plain, atol=2e-5, rtol=1e-4)
    assert decoder.conditions["graph"] == "not captured: RuntimeError: operation not permitted when stream is capturing"


def test_a_compiler_is_used_when_asked_for_and_its_failure_told(tiny_models, monkeypatch) -> None:
    tokens, calls = ids(60), []
    plain = BatchDecoder(tiny_models("llama"), 2, dtype=torch.float32)
    assert not {"graph", "compiled"} & plain.conditions.keys()
    expected = batch_logits(plain, tokens)
    monkeypatch.setattr(torch, "compile", lambda call, dynamic: lambda: (calls.append(1), call())[1])
    compiled = BatchDecoder(tiny_models("llama"), 2, dtype=torch.float32, compiled=True)
    assert torch.equal(batch_logits(compiled, tokens), expected) and len(calls) == 21
    assert compiled.conditions["compiled"] == "torch.compile"

    def fails(call, dynamic):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch, "compile", fails)
    without = BatchDecoder(tiny_models("llama"), 2, dtype=torch.float32, compiled=True)
    assert torch.equal(batch_logits(without, tokens), expected)
    assert without.conditions["compiled"] == "not compiled: RuntimeError: no compiler"


def test_nothing_is_recorded_on_a_cpu() -> None:
    assert decode_graph.recorder_for(torch.device("cpu")) is None
    state = torch.zeros(1)
    assert Stepper(lambda seen: torch.tensor(seen), state, None)(7) == 7


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_device_replays_agree_with_calls(tiny_models, monkeypatch) -> None:
    model, tokens = tiny_models("llama").cuda(), ids(60)
    decoder, batch = Decoder(model), BatchDecoder(model, 2)
    found = stepped(decoder, tokens[:40]), batch_logits(batch, tokens)
    assert decoder.conditions["graph"] == batch.conditions["graph"] == "captured"
    monkeypatch.setattr(decode_graph, "recorder_for", lambda device: None)
    torch.testing.assert_close(found[0], stepped(Decoder(model), tokens[:40]), atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(found[1], batch_logits(BatchDecoder(model, 2), tokens), atol=1e-3, rtol=1e-3)
