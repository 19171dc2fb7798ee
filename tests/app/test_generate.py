"""The generate page: how a stream is folded from events, how the engine's state is told, what is ordered, and how a link brings it back."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from streamlit.testing.v1 import AppTest

from bitpress.app import chat
from bitpress.app.ui.desk_state import SILENT_SECONDS, engine_of
from bitpress.app.ui.stream_panel import Stream, fold, foot, panes, words
from bitpress.engine.errors import InputError
from bitpress.engine.model import library
from bitpress.engine.recipe_presets import find_preset, for_model
from bitpress.engine.runs import jobs
from bitpress.engine.runs.events import Event
from bitpress.engine.runs.orders import Inbox
from bitpress.engine.runs.status import Status, change_status
from bitpress.engine.runs.store import Run, Store

TURN = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
TEMPLATE = TURN + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


def open_page(app_root: Path, **link: str) -> AppTest:
    app = AppTest.from_file(str(app_root / "pages" / "generate.py"), default_timeout=60)
    for name, value in link.items():
        app.query_params[name] = value
    app.run()
    assert not app.exception
    return app


def button(app: AppTest, key: str) -> Any:
    return next(found for found in app.button if found.key == key)


def said(app: AppTest) -> str:
    return " ".join(element.value for kind in (app.markdown, app.caption, app.error, app.info, app.warning) for element in kind)


def event(n: int, kind: str, order: str = "o", **data: Any) -> Event:
    return Event(n, float(n), kind, {"order": order, **data})


def sample(n: int, side: str, token: int, text: str) -> Event:
    return event(n, "sample", side=side, index=n, token=token, text=text, logprob=-0.1, rank=0, top=[[text, 0.9]])


@pytest.fixture
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """Desks are put in the queue and stay there."""
    monkeypatch.setattr(jobs, "pump", lambda home=None: None)


@pytest.fixture
def finished(make_run: Callable[..., Run]) -> Run:
    return make_run(for_model(find_preset("uniform-4bit"), "tiny-stories"))


def linked(app: AppTest, name: str) -> str:
    """One part of the link, which the test frame gives as a text or as a list of one."""
    value = app.query_params[name]
    return value if isinstance(value, str) else value[0]


def newest_order() -> Any:
    desk = Store().list(kind="desk")[0]
    return Inbox(Store().folder / desk.id).take()[-1]


# --- the stream ---------------------------------------------------------------------------------------------------


def test_tokens_land_on_their_side_and_the_end_brings_the_speeds() -> None:
    stream = Stream("o", ("dense", "r"), "Once")
    fold(stream, [sample(1, "dense", 5, " a"), sample(2, "r", 5, " a"), sample(3, "dense", 6, " b")])
    assert stream.state == "writing"
    assert [token["id"] for token in stream.tokens["dense"]] == [5, 6]
    fold(stream, [event(4, "order_done", sides={"dense": {"tokens": 2, "tokens_per_s": 41.2}, "r": {"tokens": 1}})])
    assert stream.state == "done" and not stream.open
    assert foot(stream, "dense") == "2 tokens · 41.2\u2009tokens/s"
    assert foot(stream, "r") == "1 token"


def test_events_of_other_orders_and_events_seen_before_are_passed_over() -> None:
    stream = Stream("o", ("dense",), "Once")
    fold(stream, [event(1, "sample", order="other", side="dense", token=1, text="x"), sample(2, "dense", 5, " a"), event(3, "brand_new_kind")])
    fold(stream, [sample(2, "dense", 5, " a")])
    assert len(stream.tokens["dense"]) == 1
    assert stream.cursor == 3


@pytest.mark.parametrize(
    ("end", "state"),
    [
        (event(1, "order_done", stopped=True), "stopped"),
        (event(1, "order_superseded", by="p"), "superseded"),
        (event(1, "order_failed", what="Too long.", why="w", remedy="r"), "failed"),
    ],
)
def test_every_end_has_its_state_and_words(end: Event, state: str) -> None:
    stream = fold(Stream("o", ("dense",), "Once"), [end])
    assert stream.state == state
    assert words(stream)
    assert stream.error.get("what", "") == ("Too long." if state == "failed" else "")


def test_without_a_stream_the_chosen_columns_stand_empty() -> None:
    assert [side.title for side in panes(None, ["dense", "r"], {"dense": "Dense", "r": "4 bit"})] == ["Dense", "4 bit"]


# --- the engine ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "state", "broken"),
    [
        (None, "off", False),
        ({"state": "finished"}, "off", False),
        ({"state": "queued"}, "starting", False),
        ({"state": "running", "phase": "starting", "heartbeat": 100.0}, "starting", False),
        ({"state": "running", "phase": "loading", "heartbeat": 100.0}, "loading", False),
        ({"state": "running", "phase": "ready", "heartbeat": 100.0}, "ready", False),
        ({"state": "running", "phase": "generating", "heartbeat": 100.0}, "writing", False),
        ({"state": "running", "phase": "ready", "heartbeat": 100.0 - 2 * SILENT_SECONDS}, "silent", True),
        ({"state": "failed", "error": {"what": "No memory.", "why": "", "remedy": ""}}, "failed", True),
        ({"state": "interrupted"}, "failed", True),
    ],
)
def test_engine_states(fields: dict[str, Any] | None, state: str, broken: bool) -> None:
    engine = engine_of(None if fields is None else Status("20260101-120000-a1b2", "desk", **fields), now=100.0)
    assert (engine.state, engine.broken) == (state, broken)
    assert engine.note


# --- chat ---------------------------------------------------------------------------------------------------------


def write_template(template: str) -> None:
    (library.model_path("tiny-stories") / "tokenizer_config.json").write_text(json.dumps({"chat_template": template, "eos_token": {"content": "</s>"}}))
    chat._tokenizer_config.cache_clear()


def test_chat_is_rendered_with_the_models_template(app_home: Path) -> None:
    write_template(TEMPLATE)
    assert chat.render("tiny-stories", [{"role": "user", "content": "Hi"}]) == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("template", ["{{ ''.__class__.__mro__ }}", "{% for", "{{ raise_exception('no user') }}"])
def test_a_template_that_breaks_or_reaches_out_is_refused_in_words(app_home: Path, template: str) -> None:
    write_template(template)
    with pytest.raises(InputError, match="chat template cannot take this chat"):
        chat.render("tiny-stories", [{"role": "user", "content": "Hi"}])


def test_a_model_without_template_only_continues_text(app_home: Path, app_root: Path) -> None:
    chat._tokenizer_config.cache_clear()
    assert chat.template_of("tiny-stories") is None
    with pytest.raises(InputError, match="no chat template"):
        chat.render("tiny-stories", [])
    assert not open_page(app_root).get("button_group")[1:]  # only the sampling


# --- the page -----------------------------------------------------------------------------------------------------


def test_first_visit_offers_dense_a_starter_and_says_how_to_compare(app_root: Path, app_home: Path) -> None:
    app = open_page(app_root)
    assert app.multiselect[0].value == ["dense"]
    assert app.text_area[0].value == "Once upon a time"
    assert "nothing to compare with dense" in said(app)
    assert ":material/power_settings_new: off" in said(app)
    assert not [found for found in app.button if found.key == "stop"]


def test_generate_orders_what_is_on_screen_and_the_link_finds_it_again(app_root: Path, finished: Run, no_worker: None) -> None:
    app = open_page(app_root)
    app.text_area[0].set_value("A dragon")
    next(field for field in app.number_input if field.key == "max_new").set_value(7)
    button(app, "generate").click()
    app.run()
    assert not app.exception
    order = newest_order()
    assert order.args == {"sides": ["dense", finished.id], "prompt": "A dragon", "sampling": {"max_new": 7, "temperature": 0.0}}
    assert linked(app, "order") == order.id
    assert button(app, "stop")
    assert linked(app, "prompt") == "A dragon"


def test_sampled_orders_carry_temperature_top_p_and_seed(app_root: Path, app_home: Path, no_worker: None) -> None:
    app = open_page(app_root, sampling="Sampled", seed="11")
    button(app, "generate").click().run()
    assert newest_order().args["sampling"] == {"max_new": 64, "temperature": 0.8, "top_p": 0.95, "seed": 11}


def test_an_answer_streams_in_ends_and_is_found_again_by_a_fresh_tab(app_root: Path, finished: Run, no_worker: None) -> None:
    app = open_page(app_root)
    button(app, "generate").click().run()
    order, run = newest_order(), Store().get(linked(app, "desk"))
    change_status(run.path, lambda _: {"state": "running", "host": "elsewhere", "phase": "generating", "heartbeat": time.time()})
    with run.writer() as events:
        events.write("sample", {"order": order.id, "side": "dense", "index": 0, "token": 4, "text": " there", "logprob": -0.2, "rank": 0, "top": []})
    app.run()
    assert "Writing" in said(app)
    with run.writer() as events:
        events.write("sample", {"order": order.id, "side": finished.id, "index": 0, "token": 5, "text": " a", "logprob": -0.2, "rank": 0, "top": [], "kl": 0.1})
        events.write("order_done", {"order": order.id, "sides": {"dense": {"tokens": 1}}})
    app.run()
    assert button(app, "generate")
    fresh = open_page(app_root, desk=run.id, order=order.id, sides=f"dense,{finished.id}")
    table = fresh.dataframe[0].value
    assert list(table["Dense"]) == ["␣there"]
    assert "first divergence" in table.to_csv()


def test_stop_is_ordered_by_the_tab_that_asked(app_root: Path, app_home: Path, no_worker: None) -> None:
    app = open_page(app_root)
    button(app, "generate").click().run()
    asked = newest_order()
    button(app, "stop").click().run()
    assert (newest_order().kind, newest_order().session) == ("stop", asked.session)


def test_a_refused_order_is_told_in_words(app_root: Path, app_home: Path, no_worker: None) -> None:
    app = open_page(app_root)
    button(app, "generate").click().run()
    run = Store().get(linked(app, "desk"))
    change_status(run.path, lambda _: {"state": "running", "host": "elsewhere", "phase": "ready", "heartbeat": time.time()})
    with run.writer() as events:
        events.write("order_failed", {"order": newest_order().id, "what": "The prompt is too long.", "why": "300 tokens.", "remedy": "Shorten it."})
    app.run()
    assert "The prompt is too long." in said(app)
    assert button(app, "generate")


def test_a_worker_that_died_while_writing_is_noticed(app_root: Path, app_home: Path, no_worker: None) -> None:
    app = open_page(app_root)
    button(app, "generate").click().run()
    run = Store().get(linked(app, "desk"))
    change_status(run.path, lambda _: {"state": "interrupted"})
    app.run()
    assert "The engine stopped while it was writing." in said(app)
    assert button(app, "generate")


def test_an_engine_that_does_not_answer_can_be_restarted(app_root: Path, app_home: Path, no_worker: None) -> None:
    app = open_page(app_root)
    button(app, "generate").click().run()
    run = Store().get(linked(app, "desk"))
    change_status(run.path, lambda _: {"state": "running", "host": "elsewhere", "phase": "ready", "heartbeat": time.time() - 100})
    app.run()
    assert "not answering" in said(app)
    button(app, "restart").click().run()
    assert run.status().state == "cancelling"
    assert "The engine was restarted." in said(app)


def test_no_column_or_no_prompt_disables_generate(app_root: Path, app_home: Path) -> None:
    app = open_page(app_root)
    app.multiselect[0].set_value([]).run()
    assert button(app, "generate").disabled
    app.multiselect[0].set_value(["dense"])
    app.text_area[0].set_value("  ").run()
    assert button(app, "generate").disabled


def test_a_starter_replaces_the_prompt(app_root: Path, app_home: Path) -> None:
    app = open_page(app_root)
    starter = button(app, "starter-1")
    starter.click().run()
    assert app.text_area[0].value == starter.help


def test_link_with_a_desk_that_is_gone_opens_an_empty_page(app_root: Path, app_home: Path) -> None:
    app = open_page(app_root, desk="20200101-000000-0000", order="x", prompt="Kept")
    assert app.text_area[0].value == "Kept"
    assert button(app, "generate")
