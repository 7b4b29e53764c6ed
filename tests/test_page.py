"""The page in a real browser: what it shows is what the engine says, on a phone and on a desk, by keyboard, for a screen reader."""

import dataclasses
import json
import shutil
from collections.abc import Iterator

import jax
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, sync_playwright
from served import CASCADE, Running, serving, toy

import kvcascade as kvc
from kvcascade.cache.errors import BadInput
from kvcascade.cache.spec import parse
from kvcascade.cache.whole import nbytes
from kvcascade.model import chat, generate
from kvcascade.model.programs import traced
from kvcascade.serve.story import watch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(not CHROMIUM, reason="no Chromium")]
SAID = "tell me about a river"


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    with serving() as found:
        yield found


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture(params=[(400, "dark"), (1280, "light")], ids=["phone", "desk"])
def page(request, browser) -> Iterator[Page]:
    width, scheme = request.param
    found = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    wrong: list[str] = []
    found.on("pageerror", lambda error: wrong.append(str(error)))
    yield found
    found.close()
    assert not wrong


def fits(page: Page) -> None:
    """Nothing reaches past the side, and axe finds nothing to say."""
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert not (found := Axe().run(page)).violations_count, found.generate_report()


def shown(page: Page) -> list[list[int]]:
    """Of each token in the cache how many of the chosen layers' heads have it in each tier, and in none."""
    return page.eval_on_selector_all(
        "#tokens span[data-tiers]", "all => all.map(each => each.dataset.tiers.split(',').map(Number))"
    )


def counted(places: np.ndarray, tiers: int) -> list[list[int]]:
    return [[int((places[..., at] == tier).sum()) for tier in (*range(tiers), -1)] for at in range(places.shape[-1])]


def talked(page: Page, running: Running) -> np.ndarray:
    """Say something by keyboard alone; the places that the cache itself has at the end."""
    page.goto(f"{running.url}/ui")
    page.wait_for_selector("#cache option", state="attached")
    page.select_option("#cache", label=CASCADE)
    page.fill("#count", "12")
    page.focus("#say")
    page.keyboard.type(SAID)
    page.keyboard.press("Control+Enter")
    page.wait_for_selector("#stop:not([disabled])")
    page.wait_for_selector("#send:not([disabled])", timeout=60_000)
    prompt = chat.encode(toy(), [{"role": "user", "content": SAID}])
    empty = generate.empty_cache(toy().config, parse(CASCADE), 1, 128)
    steps = generate.generate(toy().config, toy().params, empty, [prompt], 12, chunk=64)
    tokens = np.concatenate([new for new, _ in steps])[:12, 0].tolist()
    answer = tokens[: tokens.index(256)] if 256 in tokens else tokens
    assert page.text_content("#log p:last-child span:last-child") == toy().encoding.decode_bytes(answer).decode(
        errors="replace"
    )
    told = watch(toy(), parse(CASCADE), prompt, 12, compiled=traced).steps
    last = told[-1]
    places = np.full((last["layers"], last["heads"], last["tokens"]), -9)
    for step in told:
        for layer, head, position, tier in np.asarray(step["changes"]).reshape(-1, 4):
            places[layer, head, position] = tier
    return places


def test_a_conversation_is_seen_sinking(page: Page, running: Running) -> None:
    """Colours are the tiers that the engine reports, of all heads and of one; the slider goes back in time; the meter is right."""
    places = talked(page, running)
    tiers = len(parse(CASCADE).parts[0][2].tiers)
    assert shown(page) == counted(places, tiers)
    page.select_option("#layer", "1")
    page.select_option("#head", "0")
    assert shown(page) == counted(places[1:, :1], tiers)
    colours = "document.querySelectorAll('#legend i')[%d]"
    background = lambda what: page.evaluate(f"getComputedStyle({what}).backgroundColor")
    for at, each in enumerate(shown(page)):
        what = f"document.querySelector('#tokens span[data-position=\"{at}\"]')"
        if each[-1]:
            assert page.evaluate(f"{what}.className") == "gone"
        else:
            assert background(what) == background(colours % each.index(1))
    page.focus("#time")
    page.keyboard.press("Home")
    assert len(shown(page)) == places.shape[-1] - 11
    page.select_option("#layer", "")
    page.select_option("#head", "")
    page.keyboard.press("End")
    held = nbytes(generate.empty_cache(toy().config, parse(CASCADE), 1, 128))  # all slots are full
    assert (page.text_content("#bytes") or "").startswith(f"{held:,} bytes are held")
    fits(page)


def test_a_second_turn_errors_and_a_new_chat(page: Page, running: Running) -> None:
    """What was said is sent again; an error is told and the message is kept; a new chat is empty."""
    talked(page, running)
    page.fill("#say", "and the sea?")
    page.click("#send")
    page.wait_for_function("document.querySelectorAll('#log p').length === 4")
    page.wait_for_selector("#send:not([disabled])", timeout=60_000)
    assert len(shown(page)) > 60
    page.fill("#say", "x" * 200)
    page.click("#send")
    page.wait_for_function("document.querySelector('#error').textContent.includes('context')")
    assert page.input_value("#say") == "x" * 200 and page.locator("#log p").count() == 4
    page.click("#new")
    assert not page.locator("#log p").count() and not shown(page)
    page.wait_for_function("document.querySelector('#metrics').textContent.includes('tokens so far')")
    fits(page)


def test_a_story_in_a_file_loads_nothing(page: Page, tmp_path) -> None:
    """The page by itself, also of a text that would end a script."""
    told = kvc.watch(toy(), "a </script><script>alert(1)</script> & more of it than fits", CASCADE, 6)
    file = tmp_path / "watch.html"
    file.write_text(told.page(), "utf-8")
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(file.as_uri())
    assert asked == [file.as_uri()] and page.locator("#say").is_hidden()
    last = told.steps[-1]
    assert len(shown(page)) == last["tokens"] and "</script>" in (page.text_content("#tokens") or "")
    page.click("#play")
    page.wait_for_function("document.querySelector('#play').textContent === 'Play'", timeout=20_000)
    assert page.input_value("#time") == str(len(told.steps) - 1)
    fits(page)
    assert "srcdoc" in told._repr_html_() and json.loads(json.dumps(told.steps))


def test_what_cannot_be_watched_is_told() -> None:
    for cache, words in (("full on blocks", "on blocks"), ("kvzip 9 then recent 8", "twice")):
        with pytest.raises(BadInput, match=words):
            watch(toy(), parse(cache), [1, 2, 3], 4, compiled=traced)
    broken = jax.tree.map(lambda x: x * np.nan, toy().params)
    with pytest.raises(BadInput, match="not numbers"):
        watch(dataclasses.replace(toy(), params=broken), parse(CASCADE), [1, 2, 3], 4, compiled=traced)
