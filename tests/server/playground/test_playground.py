"""The playground: its routes and headers, and the page in a real browser, where there is one."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from engine import checkpoint as checkpoints
from server import playground
from server.playground import PATHS
from tests.server.playground.browser import CONTROL, EXECUTABLE, Browser

if TYPE_CHECKING:
    from tests.server.conftest import Live, Serve

FILES = PATHS - {"/playground/"}  # which redirects
KEY = "alice-0123456789abcdef"
ADMIN = "admin-0123456789abcdef"
SECONDS_A_STEP = 0.006
READY = "!document.querySelector('#generate').disabled"
TOKENS = "document.querySelectorAll('.token').length"
needs_browser = pytest.mark.skipif(EXECUTABLE is None, reason="needs chromium")


# Routes


def test_every_file_has_the_headers_that_confine_the_page(live: Live) -> None:
    for path in FILES:
        response = live.http.get(path)
        assert response.status_code == 200
        policy = response.headers["content-security-policy"].split("; ")
        assert sorted(policy) == [
            *("base-uri 'none'", "connect-src 'self'", "default-src 'none'", "form-action 'none'"),
            *("frame-ancestors 'none'", "img-src data:", "script-src 'self'", "style-src 'self'"),
        ]
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "no-referrer"
        assert response.headers["cache-control"] == "no-cache"
    types = {path: live.http.get(path).headers["content-type"] for path in FILES}
    assert types["/playground"] == "text/html; charset=utf-8"
    assert types["/playground/playground.css"] == "text/css; charset=utf-8"
    assert types["/playground/playground.js"] == "text/javascript; charset=utf-8"


def test_head_and_what_the_client_has_already(live: Live) -> None:
    for path in ("/playground", "/playground/run.js"):
        whole, head = live.http.get(path), live.http.head(path)
        assert (head.status_code, head.content) == (200, b"")
        assert head.headers["content-length"] == str(len(whole.content))
        etag = whole.headers["etag"]
        for known in (etag, f'"other", W/{etag}', "*"):
            again = live.http.get(path, headers={"If-None-Match": known})
            assert (again.status_code, again.content) == (304, b"")
            assert again.headers["etag"] == etag
            assert "content-security-policy" in again.headers
        assert live.http.get(path, headers={"If-None-Match": '"other"'}).status_code == 200
        assert live.http.post(path).status_code == 405


def test_what_is_not_there(live: Live, serve: Serve) -> None:
    for path in ("/playground/nothing.js", "/playground/index.html", "/playground/../settings.py"):
        response = live.http.get(path)
        assert response.status_code == 404
        assert response.json()["error_type"] == "not_found"
    assert live.http.get("/playground/").headers["location"].endswith("/playground")
    with serve(playground=False) as off:
        assert off.http.get("/playground").status_code == 404


def test_the_page_needs_no_key_but_what_it_asks_for_does(serve: Serve) -> None:
    with serve(api_keys=KEY) as live:
        for path in PATHS:
            assert live.http.get(path).status_code in (200, 307), path
        assert live.http.get("/playground/nothing.js").status_code == 401
        assert live.http.get("/info").status_code == 401
        assert live.post("/generate_stream").status_code == 401
    with serve(api_keys=KEY, playground=False) as live:
        assert live.http.get("/playground").status_code == 401


def test_the_page_uses_its_own_files_alone_and_inserts_text_as_text() -> None:
    for file in playground.FILES:
        text = file.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?://|//cdn|@import|url\(", text), file.name
        assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(r"localStorage|sessionStorage|\.cookie", text)
        for name in re.findall(r'(?:src|href)="(?!data:)([^"]+)"', text):
            assert f"/{name}" in PATHS
        for name in re.findall(r'from "\./([^"]+)"', text):
            assert f"/playground/{name}" in PATHS


# The page


@pytest.fixture(scope="module")
def slow(serve: Serve) -> Iterator[Live]:
    """Slow enough to be watched."""
    with serve(step_seconds=SECONDS_A_STEP) as live:
        yield live


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.fixture
def page(browser: Browser, slow: Live) -> Iterator[Browser]:
    """The page, freshly loaded; the test fails if it broke a rule or raised an error."""
    browser.problems.clear()
    browser.look(1280, 900)
    browser.open(f"{slow.url}/playground")
    browser.wait_for(READY)
    yield browser
    assert browser.problems == []
    slow.wait_until_idle()


def fill(page: Browser, **values: Any) -> None:
    for name, value in values.items():
        page.run(f"document.getElementById({name!r}).value = {str(value)!r}")


def texts(page: Browser, selector: str) -> list[str]:
    script = f"Array.from(document.querySelectorAll({selector!r}), n => n.textContent)"
    found: list[str] = page.run(script)
    return found


def number(page: Browser, name: str) -> list[str]:
    return texts(page, f"[data-number={name}]")


def finish(page: Browser) -> None:
    page.wait_for(f"{READY} && {TOKENS} > 0")


SHADES = """
new Set(Array.from(document.querySelectorAll(".token"), t => getComputedStyle(t).backgroundColor))
.size
"""

# How far text stands out from what is behind it (WCAG 2.2, contrast ratio).
CONTRAST = """
(selector => {
  const seen = document.createElement("canvas").getContext("2d", {willReadFrequently: true});
  const luminance = (colours) => {
    for (const colour of colours) { seen.fillStyle = colour; seen.fillRect(0, 0, 1, 1); }
    const [r, g, b] = Array.from(seen.getImageData(0, 0, 1, 1).data, c => {
      c /= 255; return c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return Array.from(document.querySelectorAll(selector), node => {
    const behind = [];
    for (let at = node; at; at = at.parentElement)
      behind.unshift(getComputedStyle(at).backgroundColor);
    const [one, two] = [luminance(behind), luminance([getComputedStyle(node).color])];
    return (Math.max(one, two) + 0.05) / (Math.min(one, two) + 0.05);
  });
})
"""


@needs_browser
def test_a_prompt_a_slider_and_shaded_text(page: Browser, slow: Live) -> None:
    assert "2 layers of 8 experts, 8 neurons each" in texts(page, "#model")[0]
    assert texts(page, "#policy-text") == ["4 of 8 experts = 50%"]  # what auto means
    assert texts(page, "#quality-text") == ["+1% perplexity at 4 of 8, measured on held-out text."]
    assert page.run("document.querySelectorAll('#quality-chart .chosen-point').length") == 1
    page.run("document.getElementById('prompt').select()")
    page.type("hello")
    page.run("document.getElementById('k').focus()")
    for key in ("Home", "ArrowRight"):
        page.press(key)
    assert texts(page, "#policy-text") == ["2 of 8 experts = 25%"]
    assert page.run("document.querySelector('[name=policy]:checked').value") == "top_k"
    assert "Not measured" in texts(page, "#quality-text")[0]
    fill(page, max_new_tokens=150, temperature=0)
    pictures = page.run(WATCH.replace("BUTTON", "generate"))
    assert pictures > 3  # it moves
    expected = slow.generate("hello", max_new_tokens=150, experts={"top_k": 2})["generated_text"]
    assert texts(page, ".text") == ["hello" + expected]
    assert number(page, "tokens") == ["150"]
    assert number(page, "ratio") == ["25%"]
    assert 1 < float(number(page, "speed")[0]) < 1.5 / SECONDS_A_STEP
    assert page.run(SHADES) == 1
    # Some tokens are parts of a character, and leave no text to point at.
    shown = next(i for i, text in enumerate(texts(page, ".token")) if text.strip())
    page.hover(f".token[data-index='{shown}']")
    assert texts(page, ".inspect")[0].startswith(f"Token {shown + 1} of 150, ")
    assert "25% of the experts" in texts(page, ".inspect")[0]
    assert page.run("document.querySelector('.token').title") == "25% of the experts"
    label = page.run("document.querySelector('canvas').getAttribute('aria-label')")
    assert re.search(r"layer 1: \d of 8 used; layer 2: \d of 8 used", label)
    assert [row[:1] for row in texts(page, "tbody th")] == ["1", "2"]


# Clicks, and counts the different pictures of the heat map until all is done.
WATCH = """
new Promise(done => {
  const seen = new Set();
  document.getElementById("BUTTON").click();
  const look = () => {
    seen.add(document.querySelector("canvas").toDataURL());
    document.getElementById("generate").disabled ? requestAnimationFrame(look) : done(seen.size);
  };
  requestAnimationFrame(look);
})
"""


@needs_browser
def test_mass_differs_from_token_to_token_and_so_do_shades(page: Browser) -> None:
    fill(page, max_new_tokens=20, temperature=1, seed=3, mass=60)
    page.click("[value=mass]")
    assert texts(page, "#policy-text") == ["as few as hold 60% of the predicted activation"]
    page.click("#generate")
    finish(page)
    assert page.run(SHADES) > 1


@needs_browser
def test_compare_shows_both_and_their_speeds_readable_everywhere(page: Browser) -> None:
    fill(page, max_new_tokens=30, temperature=0)
    page.click("#compare")
    page.wait_for("!document.getElementById('verdict').hidden")
    assert texts(page, ".run h2") == ["4 of 8 experts", "Dense"]
    assert number(page, "ratio") == ["50%", "100%"]
    assert number(page, "tokens") == ["30", "30"]
    assert all(value.endswith(" ms") for value in number(page, "first"))
    speeds = [float(value) for value in number(page, "speed")]
    verdict = texts(page, "#verdict")[0]
    times = float(verdict.split("\N{MULTIPLICATION SIGN}")[0])
    assert times == pytest.approx(speeds[0] / speeds[1], abs=0.02)
    assert "the speed of dense, with 50% of its experts." in verdict
    for dark in (False, True):
        page.look(1280, 900, dark=dark)
        page.wait_for("document.getAnimations().length === 0")  # buttons fade into their colours
        ground = page.run("getComputedStyle(document.body).backgroundColor")
        assert (ground == "rgb(17, 18, 22)") == dark
        for selector in (".token", ".given", ".hint", "button:enabled", "dt", "dd", "#model", "td"):
            ratios = page.run(f"{CONTRAST}({selector!r})")
            assert min(ratios) >= 4.5, (selector, dark)
    for width in (360, 320):
        page.look(width, 740)
        assert page.run("document.documentElement.scrollWidth") == width
        assert page.run("document.querySelector('canvas').clientWidth") > 200


@needs_browser
def test_stop_aborts_on_the_server(page: Browser, slow: Live) -> None:
    before = slow.metrics().get("ambidex_aborts_total", 0)
    fill(page, max_new_tokens=3000, temperature=0)
    page.click("#generate")
    page.wait_for(f"{TOKENS} > 5")
    page.click("#stop-button")
    page.wait_for(READY)
    assert texts(page, ".state") == ["stopped"]
    slow.wait_until_idle()
    assert slow.metrics()["ambidex_aborts_total"] == before + 1
    assert int(number(page, "tokens")[0]) < 3000


@needs_browser
def test_errors_in_plain_words(page: Browser) -> None:
    fill(page, prompt="x" * 5000)
    page.click("#generate")
    page.wait_for("!document.getElementById('error').hidden")
    (message,) = texts(page, "#error")
    assert message == (
        "The server cannot do this: inputs must have from 1 to 4095 tokens, got 5000."
    )
    assert [p for p in page.problems if "422" not in p] == []  # the browser notes the status
    page.problems.clear()
    fill(page, prompt="")
    page.click("#generate")
    page.wait_for("document.getElementById('error').textContent.includes('prompt is empty')")


OUTLINED = """
() => {
  const at = document.activeElement; // of a radio button its label shows the focus
  const shown = at.matches("[type=radio]") ? at.nextElementSibling : at;
  return getComputedStyle(shown).outlineStyle !== "none";
}
"""


@needs_browser
def test_by_keyboard_alone_and_without_motion(page: Browser) -> None:
    page.look(1280, 900, still=True)
    page.run(f"window.outlined = {OUTLINED}")
    fill(page, max_new_tokens=40, temperature=0)
    stops = []
    while page.run("document.activeElement.id") != "generate":
        page.press("Tab")
        assert len(stops) < 15
        stops.append(page.run("document.activeElement.id || document.activeElement.tagName"))
        assert page.run("outlined()"), stops
    assert stops[0] == "prompt"
    page.press("Enter")
    finish(page)
    while not page.run("document.activeElement.matches('.text')"):
        page.press("Tab")
        assert len(stops) < 30
        stops.append("")
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        page.press(key)
    (line,) = texts(page, "#announce")
    assert line.startswith("Token 2 of 40, ")
    assert texts(page, ".inspect") == [line]
    page.press("End")
    assert texts(page, ".inspect")[0].startswith("Token 40 of 40, ")
    page.run("document.getElementById('prompt').focus()")
    assert page.run(WATCH.replace("BUTTON", "generate")) <= 4
    fill(page, max_new_tokens=3000)
    page.press("Enter", CONTROL)
    page.wait_for(
        f"document.querySelector('.state').textContent === 'generating …' && {TOKENS} > 3"
    )
    page.press("Escape")
    page.wait_for(READY)


@needs_browser
def test_a_key_opens_the_api_and_is_kept_nowhere(browser: Browser, serve: Serve) -> None:
    with serve(api_keys=KEY) as live:
        browser.open(f"{live.url}/playground")
        browser.wait_for("!document.getElementById('error').hidden")
        assert "needs an API key" in texts(browser, "#error")[0]
        assert browser.run("document.activeElement.id") == "key"
        browser.type(KEY)
        browser.press("Tab")
        browser.wait_for(READY)
        fill(browser, max_new_tokens=3)
        browser.click("#generate")
        finish(browser)
        assert number(browser, "tokens") == ["3"]
        assert (
            browser.run("localStorage.length + sessionStorage.length + document.cookie.length") == 0
        )
        browser.open("about:blank")
    assert [p for p in browser.problems if "401" not in p] == []


@needs_browser
def test_a_broken_rule_would_be_seen(browser: Browser, slow: Live) -> None:
    browser.open(f"{slow.url}/playground")
    browser.problems.clear()
    browser.run("document.body.setAttribute('style', 'color: red')")
    browser.run("fetch('http://127.0.0.1:1/').catch(() => 0)")
    assert len(browser.problems) >= 2
    assert all("Content Security Policy" in problem for problem in browser.problems)


@needs_browser
def test_the_page_follows_a_reload(
    browser: Browser, serve: Serve, checkpoint_dir: Path, tmp_path: Path
) -> None:
    """Before it generates it asks what is served by now."""
    shutil.copytree(checkpoint_dir, tmp_path / "first")
    with serve(
        model=tmp_path / "first", watch=tmp_path, watch_interval=3600, admin_key=ADMIN
    ) as live:
        browser.open(f"{live.url}/playground")
        browser.wait_for(READY)
        assert texts(browser, "#model")[0].startswith("first")
        loaded = checkpoints.load(checkpoint_dir)
        checkpoints.save(tmp_path / "second", loaded.model, loaded.tokenizer, {"steps": 1})
        headers = {"Authorization": f"Bearer {ADMIN}"}
        assert live.http.post("/admin/reload", headers=headers).json()["result"] == "success"
        fill(browser, prompt="hello", max_new_tokens=3)
        browser.click("#generate")
        finish(browser)
        assert texts(browser, "#model")[0].startswith("second")
        assert number(browser, "tokens") == ["3"]
