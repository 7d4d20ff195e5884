"""The report in a real browser, where one is installed: it fits a phone, and its filters work by mouse and by keys."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from mmkd.evaluation.answer import evaluate
from mmkd.evaluation.report import ModelFiles, build_comparison, build_report

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
PHONE = {"width": 390, "height": 844, "deviceScaleFactor": 1, "mobile": True}
FLAGS = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --remote-debugging-pipe --no-first-run"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed (Debian: apt-get install chromium)")


class Browser:
    """One page, spoken to over the browser's debugging pipe (messages end with a zero byte)."""

    def __init__(self, profile: Path) -> None:
        to_child, self.outgoing = os.pipe()
        self.incoming, from_child = os.pipe()
        command = f"exec {shlex.quote(BROWSER)} {FLAGS} --user-data-dir={shlex.quote(str(profile))} 3<&{to_child} 4>&{from_child}"
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(["bash", "-c", command], pass_fds=(to_child, from_child), **streams)
        os.close(to_child), os.close(from_child)
        self.number, self.session, self.rest, self.events = 0, None, b"", []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters}
        message |= {"sessionId": self.session} if self.session else {}
        os.write(self.outgoing, json.dumps(message).encode() + b"\0")
        while (answer := self.receive()).get("id") != self.number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def receive(self) -> dict:
        while b"\0" not in self.rest:
            more = os.read(self.incoming, 2**20)
            assert more, "the browser has ended"
            self.rest += more
        message, _, self.rest = self.rest.partition(b"\0")
        return json.loads(message)

    def open(self, path: Path) -> None:
        self.call("Page.navigate", url=path.as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self.receive())

    def ask(self, expression: str):
        result = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def press(self, key: str, code: int) -> None:
        for kind in ("keyDown", "keyUp"):
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.outgoing), os.close(self.incoming)


@pytest.fixture
def open_page(tmp_path: Path):
    """Opens a file at a phone's width."""
    browser = Browser(tmp_path / "profile")
    browser.call("Emulation.setDeviceMetricsOverride", **PHONE)

    def open_file(path: Path) -> Browser:
        browser.open(path)
        return browser

    yield open_file
    browser.close()


@pytest.fixture
def answered(tmp_path: Path, data: Path, benchmark_of, fake_tower):
    """Evaluations of three models, the second and the third wrong ever more often."""
    for role, wrong in (("teacher", 1), ("student", 4), ("control", 7)):
        answers = {f"{kind}-{i}": "wrong" for kind in ("red", "blue") for i in range(wrong)}
        out = tmp_path / "run" / "evaluation" / role / "tiny"
        evaluate(fake_tower(answers, role), benchmark_of(), out, data_root=data, progress=False)
    return tmp_path / "run"


SHOWN = "[...document.querySelectorAll('.item')].filter(item => item.offsetParent).length"


def no_complaint(page: Browser) -> None:
    """Nothing was fetched, and the console is empty."""
    requests = [e["params"]["request"]["url"] for e in page.events if e.get("method") == "Network.requestWillBeSent"]
    assert all(url.startswith(("file:", "data:", "about:")) for url in requests)
    complaints = ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")
    assert [event for event in page.events if event.get("method") in complaints] == []


def test_the_report_in_a_browser(answered: Path, open_page) -> None:
    page = open_page(build_report(answered))
    assert page.ask("document.documentElement.scrollWidth") <= PHONE["width"]
    everything = page.ask(SHOWN)
    assert everything == page.ask("document.querySelectorAll('.item').length") > 20
    assert page.ask("[...document.images].every(image => image.naturalWidth > 0)")

    page.ask("document.getElementById('m-student-wrong').click()")
    wrong = page.ask(SHOWN)
    assert wrong == page.ask("document.querySelectorAll('.item.student-wrong').length") > 0
    page.ask("document.getElementById('m-control-right').click()")
    assert page.ask(SHOWN) == 0  # the control is wrong wherever the student is
    page.ask("document.getElementById('m-control-all').click()")
    assert page.ask(SHOWN) == wrong

    page.ask("document.getElementById('m-student-all').focus()")
    page.press("ArrowRight", 39)
    assert page.ask("document.activeElement.id") == "m-student-right"
    assert page.ask("document.activeElement.checked") and page.ask(SHOWN) == everything - wrong
    no_complaint(page)


def test_a_comparison_in_a_browser(answered: Path, open_page, tmp_path: Path) -> None:
    names = {"a model with quite a long name": "student", "other <b>": "control", "teacher": "teacher"}
    models = {name: ModelFiles(answered / "evaluation" / role) for name, role in names.items()}
    build_comparison(models, tmp_path / "page.html", "Three")
    page = open_page(tmp_path / "page.html")
    assert page.ask("document.documentElement.scrollWidth") <= PHONE["width"]
    everything = page.ask(SHOWN)
    page.ask("document.getElementById('m-m1-wrong').click()")
    assert 0 < page.ask(SHOWN) == page.ask("document.querySelectorAll('.item.m1-wrong').length") < everything
    # The student's lead over the control: a dot right of the middle.
    place = "document.querySelector('.pair {}').getBoundingClientRect()"
    middle = page.ask(f"({place}.left + {place}.right) / 2".replace("{}", ".track"))
    assert page.ask(place.replace("{}", ".dot") + ".left") > middle
    no_complaint(page)
