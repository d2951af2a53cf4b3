"""The page's files as they are: nothing from outside, nothing inline, every id there, scripts that parse."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from benthic.serve.page import FILES, FOLDER

HTML = (FOLDER / "index.html").read_text()
SCRIPTS = sorted(FOLDER.glob("*.js"))
NAMES_IN_SVG = {"http://www.w3.org/2000/svg"}


def test_every_file_is_served_and_no_other(server):
    assert {path.name for path in FOLDER.iterdir()} == {file.name for file in FILES.values()}
    with server.http() as http:
        for path, file in FILES.items():
            response = http.get(path)
            assert response.content == file.read_bytes()
            policy = response.headers["content-security-policy"]
            assert "default-src 'none'" in policy
            assert "unsafe" not in policy
            assert "http" not in policy
            assert response.headers["x-content-type-options"] == "nosniff"
        for path in ("/static/", "/static/../page.py", "/static/%2e%2e/page.py", "/index.html"):
            assert http.get(path).status_code == 404


def test_nothing_comes_from_outside_or_stands_inline():
    for file in FOLDER.iterdir():
        addresses = set(re.findall(r"https?://[^\s\"')]+|(?<=[\"'(])//[^\s\"')]+", file.read_text()))
        assert addresses <= NAMES_IN_SVG, file
    assert not re.search(r"<script(?![^>]*\ssrc=)|<style|\sstyle=|\son\w+=|javascript:", HTML)
    for script in SCRIPTS:
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|\.style\b",
                             script.read_text())  # fmt: skip
    assert "@import" not in (FOLDER / "page.css").read_text()
    assert "url(" not in (FOLDER / "page.css").read_text()


def test_ids_and_labels():
    ids = re.findall(r'\sid="([^"]+)"', HTML)
    assert len(ids) == len(set(ids))
    page = (FOLDER / "page.js").read_text()
    used = set(re.findall(r'\$\("([\w-]+)"\)', page)) | set(
        re.findall(r"\w+", re.search(r"NUMBERS = \[(.*?)\]", page)[1])
    )
    assert used <= set(ids)
    referenced = re.findall(r'\s(?:for|aria-controls|aria-describedby)="([^"]+)"', HTML)
    assert set(referenced) <= set(ids)
    fields = re.findall(r'<(?:input|textarea|select)[^>]*\sid="([^"]+)"', HTML)
    assert set(fields) <= set(re.findall(r'<label[^>]*\sfor="([^"]+)"', HTML))
    assert '<html lang="en">' in HTML


@pytest.mark.skipif(shutil.which("node") is None, reason="node reads the scripts")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_parse(script, tmp_path):
    module = tmp_path / (script.stem + ".mjs")
    module.write_text(script.read_text())
    done = subprocess.run(["node", "--check", module], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


SCENARIOS = {
    "a conversation is kept, and drafts are told": """
        await say("hello");
        same(roles(stored()[0]), "user assistant");
        same(stored()[0].messages[1].content, "one two");
        same($("messages").children.length, 2);
        same($("speed").textContent.includes("MTP drafts accepted 75% of 4"), true);
    """,
    "drafts are told while an answer is written": """
        $("model").value = "small";
        server.pieces = Array(60).fill("x"); server.pauseMs = 40;
        $("prompt").value = "hello"; $("form").fire("submit");
        await until(() => $("speed").textContent.includes("accepted 50% of 10"));
        $("stop").fire("click");
        await until(() => $("stop").disabled);
        same(roles(stored()[0]), "user assistant");
    """,
    "other tabs keep what is theirs": """
        await say("mine");
        const other = { id: "other", messages: [{ role: "user", content: "theirs" }] };
        localStorage.setItem("benthic.conversations", JSON.stringify([other, ...stored()]));
        await say("more");
        same(stored().map(roles), ["user assistant user assistant", "user"]);
        localStorage.setItem("benthic.conversations", JSON.stringify(stored().filter((one) => one.id === "other")));
        tellWindow("storage");
        same($("conversations").children.length, 1);
        $("conversations").children[0].children[1].fire("click");  // delete
        same(stored(), []);
    """,
    "what has no room costs nothing else": """
        await say("first");
        localStorage.room = 400;
        server.pieces = ["x".repeat(1000)];
        $("new").fire("click");
        await say("second");
        same(stored().map(roles), ["user", "user assistant"]);
        same($("messages").children.length, 2);
    """,
    "regenerating replaces an answer, or leaves it": """
        await say("hello");
        server.pieces = ["three"];
        $("again").fire("click");
        await until(() => $("stop").disabled);
        same(stored()[0].messages[1].content, "three");
        server.status = 429;
        $("again").fire("click");
        await until(() => $("stop").disabled);
        same(stored()[0].messages[1].content, "three");
        same($("messages").children.length, 2);
        same($("error").textContent, "full");
    """,
    "what failed can be asked again": """
        server.status = 429;
        await say("hello");
        same($("again").disabled, false);
        server.status = 200;
        $("again").fire("click");
        await until(() => $("stop").disabled);
        same(roles(stored()[0]), "user assistant");
    """,
    "choosing the open conversation changes nothing": """
        server.pieces = Array(20).fill("x"); server.pauseMs = 5;
        $("prompt").value = "hello"; $("form").fire("submit");
        await pause(30);
        $("conversations").children[0].children[0].fire("click");
        await until(() => $("stop").disabled);
        same(stored()[0].messages[1].content, "x".repeat(20));
        same($("messages").children.length, 2);
    """,
    "choosing another stops the answer and keeps what there is": """
        await say("first");
        server.pieces = Array(50).fill("x"); server.pauseMs = 5;
        $("new").fire("click");
        $("prompt").value = "second"; $("form").fire("submit");
        await pause(60);
        $("conversations").children[1].children[0].fire("click");
        await until(() => $("stop").disabled);
        same($("messages").textContent.includes("first"), true);
        same(stored().map(roles), ["user assistant", "user assistant"]);
        $("conversations").children[0].children[1].fire("click");  // delete one that is not open
        same(stored().map((one) => one.messages[0].content), ["first"]);
    """,
    "nothing is sent twice at once": """
        server.pieces = Array(20).fill("x"); server.pauseMs = 5;
        $("prompt").value = "hello"; $("form").fire("submit");
        $("prompt").value = "again"; $("form").fire("submit");
        await until(() => $("stop").disabled);
        same(server.asked.filter((one) => one.path === "/v1/chat/completions").length, 1);
        same($("prompt").value, "again");
    """,
}
BLOCKED = """
    await say("hello");
    same($("messages").children.length, 2);
    $("key").value = "secret"; $("key").fire("change");
    await until(() => server.asked.at(-1).options.headers.authorization === "Bearer secret");
"""


def run_page(tmp_path, scenario, first=""):
    """The page's scripts as they are, in node, with what stands for a browser."""
    for script in [*SCRIPTS, Path(__file__).parent / "page" / "dom.mjs"]:
        shutil.copy(script, tmp_path)
    (tmp_path / "package.json").write_text('{"type": "module"}')
    names = "$, pause, roles, same, say, server, stored, tellWindow, until"
    text = (
        f'import {{ {names} }} from "./dom.mjs";\n{first}\nawait import("./page.js");\n{scenario}\nprocess.exit(0);\n'
    )
    (tmp_path / "scenario.js").write_text(text)
    done = subprocess.run(
        ["node", "scenario.js"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the scripts")
@pytest.mark.parametrize("scenario", SCENARIOS.values(), ids=SCENARIOS)
def test_conversations(tmp_path, scenario):
    run_page(tmp_path, scenario)


@pytest.mark.skipif(shutil.which("node") is None, reason="node runs the scripts")
def test_a_browser_that_keeps_nothing(tmp_path):
    run_page(tmp_path, BLOCKED, "localStorage.blocked = sessionStorage.blocked = true;")
