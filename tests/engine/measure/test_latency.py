"""Timing: what is timed, in which order, for how long, and what makes a figure noisy. Decoders here move a clock that else stands still."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from bitpress.engine.errors import Cancelled
from bitpress.engine.measure import latency as latency_module
from bitpress.engine.measure import quiet
from bitpress.engine.measure.latency import Plan, measure_latency


class Clock:
    """Time that passes only when somebody says so: the machine may be as busy as it likes."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of both modules, stopped."""
    stopped = Clock()
    monkeypatch.setattr(latency_module, "time", stopped)
    monkeypatch.setattr(quiet, "time", stopped)
    return stopped


class Sleeper:
    """Takes `first` seconds for a prefill and `then` for a step; writes its name into a shared diary."""

    def __init__(self, name: str, clock: Clock, first: float, then: float, diary: list[str]) -> None:
        self.name, self.clock, self.first, self.then, self.diary = name, clock, first, then, diary
        self.steps: list[int] = []

    def prefill(self, ids: torch.Tensor) -> torch.Tensor:
        self.clock.now += self.first
        self.diary.append(self.name)
        self.steps.append(0)
        return torch.tensor([0.0, 1.0, 0.0])

    def step(self, token_id: int) -> torch.Tensor:
        assert token_id == 1  # the greedy choice of the logits above
        self.clock.now += self.then
        self.steps[-1] += 1
        return torch.tensor([0.0, 1.0, 0.0])


def two_sides(clock: Clock) -> tuple[dict[str, Sleeper], list[str]]:
    diary: list[str] = []
    return {"dense": Sleeper("dense", clock, 0.02, 0.008, diary), "compressed": Sleeper("compressed", clock, 0.02, 0.004, diary)}, diary


PROMPT = torch.arange(10)


def test_figures_are_those_of_the_decoder(bitpress_home: Path, clock: Clock) -> None:
    sides, _ = two_sides(clock)
    found = measure_latency(sides, PROMPT, Plan(prompt=10, new=5, warm_up=1, rounds=4))
    for side, step in (("dense", 0.008), ("compressed", 0.004)):
        latency = found[side]
        assert (latency.ttft_s, latency.tpot_p50_s, latency.tpot_p95_s) == pytest.approx((0.02, step, step))
        assert (latency.prefill_tokens_per_s, latency.decode_tokens_per_s) == pytest.approx((500, 1 / step))


def test_a_side_with_a_loop_of_its_own_is_timed_by_what_it_tells(bitpress_home: Path, clock: Clock) -> None:
    class Told:
        def tell(self, prompt_T: torch.Tensor, new: int, on_token: Callable[[], object]) -> None:
            for index in range(new):
                clock.now += 0.004 if index else 0.03
                on_token()

    found = measure_latency({"theirs": Told(), **two_sides(clock)[0]}, PROMPT, Plan(prompt=10, new=5, warm_up=1, rounds=4))["theirs"]
    assert (found.ttft_s, found.tpot_p50_s, found.decode_tokens_per_s) == pytest.approx((0.03, 0.004, 250))


def test_slow_steps_show_in_the_tail_and_in_the_rate(bitpress_home: Path, clock: Clock) -> None:
    class Stumbler(Sleeper):
        def step(self, token_id: int) -> torch.Tensor:
            self.then = 0.010 if self.steps[-1] == 3 else 0.002
            return super().step(token_id)

    found = measure_latency({"dense": Stumbler("dense", clock, 0.02, 0.0, [])}, PROMPT, Plan(prompt=10, new=11, warm_up=0, rounds=3))["dense"]
    assert (found.tpot_p50_s, found.tpot_p95_s) == pytest.approx((0.002, 0.010))
    assert found.decode_tokens_per_s == pytest.approx(10 / 0.028)


def test_sides_take_turns_and_warm_ups_do_not_count(bitpress_home: Path, clock: Clock) -> None:
    sides, diary = two_sides(clock)
    found = measure_latency(sides, PROMPT, Plan(prompt=10, new=3, warm_up=3, rounds=4))
    assert diary == ["dense", "compressed"] * 7
    assert found["dense"].conditions["rounds"] == 4
    assert sides["dense"].steps[3:] == [2] * 4


def test_time_ends_the_rounds_but_not_before_three(bitpress_home: Path, clock: Clock) -> None:
    sides, _ = two_sides(clock)
    assert measure_latency(sides, PROMPT, Plan(prompt=10, new=3, warm_up=0, rounds=100, seconds=0.0))["dense"].conditions["rounds"] == 3


def test_conditions_are_complete(bitpress_home: Path, clock: Clock) -> None:
    sides, _ = two_sides(clock)
    conditions = measure_latency(sides, PROMPT, Plan(prompt=10, new=3, warm_up=1, rounds=3))["dense"].conditions
    assert {"batch", "prompt", "new", "warm_up", "rounds", "threads", "load_average", "other_cores", "noisy"} == set(conditions)
    assert (conditions["batch"], conditions["prompt"], conditions["new"], conditions["threads"]) == (1, 10, 3, torch.get_num_threads())


def test_a_held_lock_is_waited_for_and_then_said(bitpress_home: Path) -> None:
    with FileLock(bitpress_home / "timing.lock"), quiet.quiet_machine(1, lock_seconds=0.2) as noise:
        pass
    assert any("another timing" in reason for reason in noise.reasons)
    with quiet.quiet_machine(1, lock_seconds=0.2) as noise:
        pass
    assert not any("another timing" in reason for reason in noise.reasons)


def test_the_lock_is_let_go_after_an_error(bitpress_home: Path) -> None:
    with pytest.raises(ZeroDivisionError), quiet.quiet_machine(1):
        1 / 0  # noqa: B018
    FileLock(bitpress_home / "timing.lock").acquire(timeout=0).lock.release()


def test_cores_taken_by_others_are_a_reason_and_our_own_are_not(bitpress_home: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet.os, "cpu_count", lambda: 2)
    for others, reasons in ((1.5, 1), (0.1, 0)):
        busy, own = iter([0.0, others + 2.0]), iter([0.0, 2.0])  # one second in which others and our two threads are busy
        monkeypatch.setattr(quiet, "_busy_seconds", lambda busy=busy: next(busy))
        monkeypatch.setattr(quiet, "_own_seconds", lambda own=own: next(own))
        with quiet.quiet_machine(2) as noise:
            clock.now += 1.0
        assert noise.other_cores == pytest.approx(others)
        assert len(noise.reasons) == reasons, noise


def test_a_wide_spread_of_steps_is_a_reason(bitpress_home: Path, clock: Clock) -> None:
    class Stumbler(Sleeper):
        def step(self, token_id: int) -> torch.Tensor:
            self.then = 0.02 if self.steps[-1] % 5 else 0.001
            return super().step(token_id)

    found = measure_latency({"dense": Stumbler("dense", clock, 0.01, 0.001, [])}, PROMPT, Plan(prompt=10, new=11, warm_up=0, rounds=3))
    assert any("half of the steps" in reason for reason in found["dense"].conditions["noisy"])


def test_a_plan_is_shortened_to_the_context() -> None:
    plan = Plan().fitted(128)
    assert plan.prompt + plan.new <= 128
    assert (plan.prompt, plan.new) == (64, 64)
    assert Plan().fitted(8192) == Plan()


def test_cancel_between_rounds(bitpress_home: Path, clock: Clock) -> None:
    sides, diary = two_sides(clock)
    with pytest.raises(Cancelled):
        measure_latency(sides, PROMPT, Plan(prompt=10, new=2, warm_up=0), should_stop=lambda: len(diary) >= 4)
    assert len(diary) == 4
