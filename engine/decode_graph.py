"""Steps of static shapes, captured once and replayed as a CUDA graph: one launch where a step has hundreds. Knows callables and tensors; no model.

A step reads its tokens and positions from tensors that stay where they are and leaves its logits in one; for every window of positions there is
one graph. What cannot be captured is called as before, and `words` says why.
"""

from collections.abc import Callable
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

WARM_UP = 3  # calls before a capture: kernels are chosen, compiled and given their buffers there


class Recorder(Protocol):
    """What can record a call."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """Call it some times, then record it. Returns what replays it and gives the tensor that it leaves its result in."""


class CudaRecorder:
    """A CUDA graph a call."""

    def record(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """As `Recorder`. Raises whatever a call that cannot be captured raises."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            result = call()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def recorder_for(device: torch.device) -> Recorder | None:
    """What records calls on this device, None where nothing does."""
    return CudaRecorder() if device.type == "cuda" else None


class Stepper:
    """`run(seen)`, replayed where that can be. state: what `run` moves on by itself, put back after recording. compiled: through `torch.compile` first."""

    def __init__(self, run: Callable[[int], Tensor], state: Tensor, recorder: Recorder | None, compiled: bool = False) -> None:
        self.run, self.state, self.recorder, self.compiled = run, state, recorder, compiled
        self.not_captured = self.not_compiled = ""
        self._made: dict[int, Callable[[], Tensor]] = {}

    def __call__(self, seen: int) -> Tensor:
        """The step that looks at `seen` positions. Its result is a tensor of the caller's own."""
        if seen not in self._made:
            self._made[seen] = self._recorded(self._compiled(partial(self.run, seen)))
        return self._made[seen]()

    @property
    def words(self) -> dict[str, str]:
        """For the conditions of a figure; empty where nothing was asked for."""
        graph = {"graph": f"not captured: {self.not_captured}" if self.not_captured else "captured"} if self.recorder else {}
        compiled = {"compiled": f"not compiled: {self.not_compiled}" if self.not_compiled else "torch.compile"} if self.compiled else {}
        return {**graph, **compiled}

    def _compiled(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if not self.compiled or self.not_compiled:
            return call
        before = self.state.clone()
        try:
            made: Callable[[], Tensor] = torch.compile(call, dynamic=False)
            made()  # it compiles at the first call
            return made
        except Exception as error:  # a compiler has errors of many kinds, and none of them may end a text
            self.not_compiled = _in_words(error)
            return call
        finally:
            self.state.copy_(before)

    def _recorded(self, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
        if self.recorder is None or self.not_captured:
            return call
        before = self.state.clone()
        try:
            replay = self.recorder.record(call)
            return lambda: replay().clone()
        except Exception as error:  # as above: a driver, a kernel, an operation that waits for the device
            self.not_captured = _in_words(error)
            return call
        finally:
            self.state.copy_(before)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no reason given'])[0][:200]}"
