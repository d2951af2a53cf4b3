"""The page's files as they are: nothing from outside, nothing inline, every id there, scripts that parse."""

import re
import shutil
import subprocess

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
