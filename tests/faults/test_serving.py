"""What happens to a server when requests are wrong, hostile, slow or given up: against the real process."""

import concurrent.futures
import json
import random
import re
import shutil
import socket
import string
import sys
import time
from contextlib import contextmanager, suppress

import httpx
import openai
import psutil
import pytest
from serving import Server, make_model

HELLO = [{"role": "user", "content": "hello"}]
NO_END = {str(index): -100 for index in range(8)}
"""Bias against the tokens that end a text."""
LONG = {"model": "small", "messages": HELLO, "max_tokens": 400, "logit_bias": NO_END, "stream": True}


@pytest.fixture(scope="module")
def http(server):
    with server.http() as client:
        yield client


def ask(http, path="/v1/chat/completions", **given):
    return http.post(path, json={"model": "small", "messages": HELLO, "max_tokens": 3} | given)


def refused(response, status=400, param=None, code=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert param is None or error["param"] == param
    assert code is None or error["code"] == code
    assert response.headers["x-request-id"]
    return error


def within(seconds, condition):
    """How long it took for a condition to hold."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, "not in time"
        time.sleep(0.01)
    return time.monotonic() - begun


def model_status(http):
    return http.get("/status").json()["models"][0]


# 15. Keys


@pytest.fixture(scope="module")
def locked(served_model, tmp_path_factory):
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("# ours\nalpha-key\n\nbeta-key\n")
    running = Server(
        f"small={served_model}", "--api-key", "gamma-key", "--set", f"serve.api_key_file={json.dumps(str(keys))}",
        environment={"BENTHIC_API_KEY": "delta-key"},
    )  # fmt: skip
    yield running
    assert running.terminate() == 0


def test_every_route_wants_a_key(locked):
    with locked.http() as http:
        described = http.get("/openapi.json", headers={"authorization": "Bearer alpha-key"}).json()["paths"]
        paths = [path.replace("{model}", "small") for path in described]
        assert len(paths) >= 9
        more = ["/openapi.json", "/docs", "/redoc", "/v1/models/", "//v1/models", "/v1//models", "/V1/models",
                "/v1/./models", "/static/../v1/models", "/%761/models", "/v1/models%2f", "/health/../v1/models",
                "/health/", "/health%00", "/nothing", "/static/none.js"]  # fmt: skip
        for path in [*paths, *more]:
            if path in ("/health", "/ready"):
                continue
            for method in ("GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "PATCH"):
                for given in ({}, {"authorization": "Bearer wrong"}, {"authorization": "Basic alpha-key"},
                              {"authorization": "Bearer"}, {"authorization": "Bearer alpha-ke"}):  # fmt: skip
                    response = http.send(http.build_request(method, locked.url + path, headers=given))
                    assert response.status_code == 401, (method, path, given)
        assert http.get("/").status_code == http.get("/health").status_code == http.get("/ready").status_code == 200


@pytest.mark.parametrize("key", ["alpha-key", "beta-key", "gamma-key", "delta-key"])
def test_each_key_is_taken(locked, key):
    with locked.client(key) as client:
        assert client.models.list().data
    with locked.client(key[:-1]) as client, pytest.raises(openai.AuthenticationError) as wrong:
        client.models.list()
    assert wrong.value.code == "invalid_api_key"


def test_keys_are_compared_in_constant_time():
    from unittest import mock

    from benthic.serve import access

    keys = access.Keys(["one", "two", "three"])
    with mock.patch.object(access.hmac, "compare_digest", wraps=access.hmac.compare_digest) as compare:
        found = [keys.find(given) for given in (b"one", b"three", b"four", b"")]
    assert compare.call_count == 4 * 3  # each with all, whether or not one was the right one
    assert found[0] != found[1]
    assert found[2:] == [None, None]


@pytest.mark.parametrize(("arguments", "said"), [
    (["--host", "0.0.0.0"], "no API key"), (["--host", "a..b", "--api-key", "k"], "serve.host = a..b"),
    (["--set", "serve.api_key_file='/dev/null'"], "holds no API key"), (["--api-key", " "], "must not be empty"),
])  # fmt: skip
def test_wrong_addresses_and_keys_are_refused_in_one_line(served_model, arguments, said):
    import subprocess

    from serving import PROGRAM

    command = [*PROGRAM, "serve", str(served_model), "--port", "0", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert said in done.stderr


def test_an_address_in_use_is_refused_and_leaves_no_socket():
    from benthic.config.schema import ServeConfig
    from benthic.errors import InputError
    from benthic.serve.server import _bind

    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = ServeConfig(port=taken.getsockname()[1])
        with pytest.raises(InputError, match="Address already in use"):
            _bind(config)  # a socket left open would be warned of, and warnings are errors here


def test_other_names_are_refused_without_a_key(http):
    refused(http.get("/v1/models", headers={"host": "evil.example:80"}), 403)
    for local in ("localhost:1234", "127.0.0.1", "127.0.0.2:80", "[::1]:80"):
        assert http.get("/v1/models", headers={"host": local}).status_code == 200
    for other in ("128.0.0.1", "127.0.0.1.evil.example", "localhost.evil.example", ""):
        refused(http.get("/v1/models", headers={"host": other}), 403)


def test_names_that_are_given_are_kept_to_on_a_public_address_too(make_server):
    server = make_server(host="0.0.0.0", public_without_key=True, hosts=["Ours.example"])
    with server.http() as http:
        refused(http.get("/v1/models", headers={"host": "evil.example"}), 403)
        for name in ("ours.example:8000", "localhost"):
            assert http.get("/v1/models", headers={"host": name}).status_code == 200


# 16, 17, 19, 20, 21, 22, 24: what requests say


DEEP = b"[" * 10_000


@pytest.mark.parametrize("body", [
    b"", b"{", b"[]", b"null", b"3", b'"x"', b'{"model": "small", "temperature": NaN}', b'{"model": Infinity}',
    b'{"model": "\xff\xfe"}', b"\xff", DEEP, DEEP + b"]" * 10_000, b'{"a":' * 10_000 + b"1" + b"}" * 10_000,
    b'{"model": "small", "n": ' + b"9" * 5000 + b"}", b'{"model": 1e999}', b'{"model": "\\ud800"}', b"\x00" * 100,
    b'{"model": "small", "messages": [{"role": "user", "content": "\\ud800"}]}',
])  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
def test_bodies_that_are_no_request(http, path, body):
    refused(http.post(path, content=body, headers={"content-type": "application/json"}))


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "multipart/form-data"])
def test_wrong_content_types(http, kind):
    refused(http.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind}), 415)


@pytest.mark.parametrize("seed", range(3))
def test_random_bodies_are_never_a_fault_of_the_server(http, seed):
    rng = random.Random(seed)
    values = [None, True, -1, 0, 1.5, 10**30, "", "x", "\u0000", [], [[]], {}, {"type": "text"}, [1, "a"], "🙂" * 50]
    fields = ["messages", "prompt", "input", "n", "stop", "logit_bias", "tools", "tool_choice", "response_format",
              "stream", "stream_options", "logprobs", "seed", "max_tokens", "temperature", "top_p"]  # fmt: skip
    for _ in range(60):
        path = rng.choice(["/v1/chat/completions", "/v1/completions", "/v1/embeddings"])
        given = {field: rng.choice(values) for field in rng.sample(fields, rng.randint(1, 5))}
        response = http.post(path, json={"model": "small", "max_tokens": 1} | given)
        assert response.status_code < 500, (path, given, response.text)


def test_bodies_too_large(make_server):
    server = make_server(max_body_mib=0.25)
    process = psutil.Process(server.process.pid)
    with server.http() as http:
        refused(ask(http, messages=[{"role": "user", "content": "x" * 300_000}]), 413)
        before = process.memory_info().rss

        def endless():
            for _ in range(200):
                yield b" " * 2**20

        headers = {"content-type": "application/json"}
        with suppress(httpx.TransportError):  # it may be cut off while it is still sending
            refused(http.post("/v1/chat/completions", content=endless(), headers=headers), 413)
        assert process.memory_info().rss - before < 64 * 2**20
        assert ask(http).status_code == 200


def test_long_prompts_are_refused_unread_and_hold_up_nobody(make_server):
    """A tokenizer takes seconds for megabytes, and there are two threads for it."""
    server = make_server()
    process = psutil.Process(server.process.pid)
    long = {"/v1/chat/completions": {"messages": [{"role": "user", "content": "how are you? " * 290_000}]},
            "/v1/completions": {"prompt": ["x", "how are you? " * 290_000]},
            "/v1/embeddings": {"input": "how are you? " * 290_000}}  # fmt: skip
    with server.http() as http, concurrent.futures.ThreadPoolExecutor(24) as pool:
        before = process.memory_info().rss

        def send(path):
            body = json.dumps({"model": "small", **long[path]})
            headers = {"content-type": "application/json"}
            return httpx.post(server.url + path, content=body, headers=headers, timeout=120)

        sent = [pool.submit(send, path) for path in [*long] * 8]
        slowest = 0.0
        while not all(one.done() for one in sent):
            begun = time.monotonic()
            assert ask(http).status_code in (200, 503)
            slowest = max(slowest, time.monotonic() - begun)
        for one in sent:
            if one.result().status_code != 503:  # too many of them at once
                refused(one.result(), 400, code="context_length_exceeded")
        assert sum(one.result().status_code == 400 for one in sent) >= 8
        assert slowest < 2
        assert process.memory_info().rss - before < 400 * 2**20
        assert ask(http).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("path", "given", "param"), [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x y " * 2000}]}, "messages"),
    ("/v1/chat/completions", {"messages": []}, "messages"),
    ("/v1/completions", {"prompt": ""}, "prompt"), ("/v1/completions", {"prompt": []}, "prompt"),
    ("/v1/completions", {"prompt": [[]]}, None), ("/v1/completions", {"prompt": [1, -1]}, None),
    ("/v1/completions", {"prompt": [1, 299_999]}, "prompt"), ("/v1/completions", {"prompt": [1, 10**30]}, None),
    ("/v1/completions", {"prompt": ["x", ""]}, "prompt"), ("/v1/completions", {"prompt": [1] * 600}, "prompt"),
])  # fmt: skip
def test_wrong_prompts(http, path, given, param, stream):
    body = {"model": "small", "stream": stream, "max_tokens": 3} | given
    response = http.post(path, json=body)
    refused(response, 400, param)
    assert response.headers["content-type"] == "application/json"


MANY_BIASES = {f"{index:0{width}}": 1 for width in range(3, 7) for index in range(300)}
"""1,200, and each token is one that there is."""


@pytest.mark.parametrize(("param", "value"), [
    ("temperature", -0.1), ("temperature", 2.1), ("temperature", "1"), ("top_p", -1), ("top_p", 1.01), ("n", 0),
    ("n", 10**12), ("n", 129), ("logprobs", 3), ("top_logprobs", 21), ("top_logprobs", -1), ("stop", ""),
    ("stop", ["a"] * 5), ("stop", [1]), ("stop", "x" * 5000), ("logit_bias", {"1": 101}), ("logit_bias", {"-1": 1}),
    ("logit_bias", {"99999": 1}), ("logit_bias", {"x": 1}), ("logit_bias", MANY_BIASES),
    ("seed", 2**63), ("seed", 1.5), ("max_tokens", 0),
    ("max_tokens", 10**12), ("max_tokens", -1), ("presence_penalty", 2.5), ("frequency_penalty", -3), ("min_p", 2),
    ("top_k", -1), ("repetition_penalty", 0), ("repetition_penalty", 1e-38), ("stream", "yes"), ("user", 3),
])  # fmt: skip
def test_settings_out_of_range(http, param, value):
    error = refused(ask(http, **({"logprobs": True} | {param: value})))
    assert error["param"].partition(".")[0].partition("[")[0] == param


def test_settings_at_their_limits_harm_nobody(http):
    """Where MTP modules draft, tokens are drawn for drafts too: an error there would be everybody's."""
    extremes = {
        "temperature": [1e-50, 1e-7, 2], "top_p": [0, 1e-50, 1], "min_p": [0, 1], "top_k": [0, 1],
        "repetition_penalty": [0.01, 10], "presence_penalty": [-2, 2], "frequency_penalty": [-2, 2],
    }  # fmt: skip
    rng = random.Random(0)
    for _ in range(60):
        given = {key: rng.choice(values) for key, values in extremes.items() if rng.random() < 0.7}
        response = ask(http, max_tokens=20, seed=1, logit_bias={"40": 100, "50": -100} | NO_END, **given)
        assert response.status_code == 200, (given, response.text)
    assert http.get("/health").status_code == 200


def test_the_field_at_fault_has_its_name(http):
    error = refused(ask(http, max_tokens=None, max_completion_tokens=10**9))
    assert error["param"] == "max_completion_tokens"
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": "y"}}
    assert refused(ask(http, response_format=form))["param"] == "response_format.json_schema.schema"
    parts = [{"type": "text", "text": 3}]
    assert refused(ask(http, messages=[{"role": "user", "content": parts}]))["param"] == "messages[0].content"
    refused(ask(http, messages=[{"role": "user", "content": "x", "refusal": "no"}]), 400)
    for message in ({"role": "assistant", "content": "x", "refusal": 3}, {"role": "user", "content": "x", "text": 3}):
        assert refused(ask(http, messages=[message]))["param"] == f"messages[0].{[*message][-1]}"
    assert "HEAD" in http.post("/health").headers["allow"]


def test_unknown_models_and_methods(http):
    refused(ask(http, model="nobody's"), 404, "model", "model_not_found")
    refused(http.get("/v1/models/nobody"), 404)
    refused(http.get("/v1/nothing"), 404)
    for method, path, allowed in (("GET", "/v1/chat/completions", "POST"), ("DELETE", "/v1/models", "GET")):
        response = http.request(method, path)
        refused(response, 405)
        assert allowed in response.headers["allow"]


def nested(depth):
    schema = '{"type": "object", "properties": {"a": ' * depth + "{}" + "}}" * depth
    return f'{{"type": "json_schema", "json_schema": {{"name": "x", "schema": {schema}}}}}'


BOMBS = {
    "intersections": {"allOf": [{"type": "string", "pattern": f".*[a-z]{{{i}}}.*"} for i in range(5, 60)]},
    "recursive": {"$ref": "#"}, "remote": {"$ref": "http://169.254.169.254/latest"},
    "cycle": {"$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}, "$ref": "#/$defs/a"},
    "nonsense": {"type": "nonsense"}, "wrong type": {"type": 5}, "huge enum": {"enum": [f"x{i}" for i in range(10**5)]},
    "lengths": {"type": "string", "minLength": 10**9, "maxLength": 10**12}, "nothing": {"not": {}},
    "bad pattern": {"type": "string", "pattern": "["},
}  # fmt: skip


def test_schema_bombs(http):
    for name, schema in BOMBS.items():
        begun = time.monotonic()
        form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
        refused(ask(http, response_format=form), 400, "response_format")
        tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
        if name not in ("lengths", "nothing", "huge enum"):
            refused(ask(http, tools=[tool]), 400, "tools")
        assert time.monotonic() - begun < 20, name
    for body in (nested(5000), nested(150)):
        text = json.dumps({"model": "small", "messages": HELLO})[:-1] + f', "response_format": {body}}}'
        response = http.post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
        refused(response)
    for regex in ("[", "(?=a)b", "(" * 5000, "a" * 20_000, "(?P<a>x)(?P=a)", ""):
        refused(ask(http, response_format={"type": "regex", "regex": regex}))
    refused(ask(http, tools=[{"type": "function", "function": {"name": "f", "parameters": []}}]))
    assert ask(http).status_code == 200
    assert http.get("/health").status_code == 200


@pytest.mark.parametrize(
    "address", ["file:///etc/passwd", "http://169.254.169.254/latest", "http://127.0.0.1:{port}/x"]
)
def test_addresses_in_messages_are_not_opened(http, address):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(0.3)
        url = address.format(port=listener.getsockname()[1])
        for part in ({"type": "image_url", "image_url": {"url": url}}, {"type": "file", "file": {"file_id": url}},
                     {"type": "input_audio", "input_audio": {"data": url, "format": "wav"}}):  # fmt: skip
            refused(ask(http, messages=[{"role": "user", "content": [part]}]))
        with pytest.raises(TimeoutError):
            listener.accept()


# 18. Slowness


def test_slow_headers_and_bodies_are_cut_off(make_server):
    server = make_server(header_seconds=1.0, body_seconds=1.0)
    address = server.url.removeprefix("http://").split(":")
    beginnings = [
        b"", b"GET /health HTTP/1.1\r\nhost: localhost\r\n",
        b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        b"content-length: 100\r\n\r\n{",
    ]  # fmt: skip
    sockets = [socket.create_connection(address, timeout=30) for _ in range(30)]
    for number, one in enumerate(sockets):
        one.sendall(beginnings[number % len(beginnings)])
    with server.http() as http:
        assert ask(http).status_code == 200
    begun = time.monotonic()
    ends = [one.recv(65536) for one in sockets]
    assert time.monotonic() - begun < 20
    assert all(b" 408 " in end for end in ends[2::3])
    assert not any(end for number, end in enumerate(ends) if number % 3 != 2)
    for one in sockets:
        one.close()


def test_headers_without_end(server):
    with socket.create_connection(server.url.removeprefix("http://").split(":"), timeout=30) as one:
        one.sendall(b"GET /health HTTP/1.1\r\n")
        with suppress(OSError):
            for _ in range(200):
                one.sendall(b"x-filler: " + b"x" * 8000 + b"\r\n")
        assert b" 431 " in one.recv(65536)
    with server.http() as http:
        assert http.get("/health").status_code == 200


# 23. Templates

HOSTILE = {
    "code": "{{ ''.__class__.__mro__[1].__subclasses__() }}", "loops": "{% for i in range(10**9) %}x{% endfor %}",
    "grows": "{% set s = namespace(x='x') %}{% for i in range(99) %}{% set s.x = s.x ~ s.x %}{% endfor %}{{ s.x }}",
    "complains": "{{ raise_exception('not like this') }}",
}  # fmt: skip


def test_hostile_templates(served_model, tmp_path):
    models = [f"small={served_model}"]
    for name, template in HOSTILE.items():
        folder = shutil.copytree(served_model, tmp_path / name)
        (folder / "tokenizer" / "chat_template.jinja").write_text(template)
        models.append(f"{name}={folder}")
    server = Server(*models)
    with server.http() as http:
        assert [model["id"] for model in http.get("/v1/models").json()["data"]] == ["small", *HOSTILE]
        for name in HOSTILE:
            refused(ask(http, model=name), 400, "messages")
            assert ask(http).status_code == 200
        refused(ask(http, chat_template="{{ 1 }}"), 400, "chat_template")
        refused(ask(http, chat_template_kwargs={}), 400, "chat_template_kwargs")
    assert server.terminate() == 0


# 25, 26, 28. Crowds, and clients that go


@pytest.fixture(scope="module")
def long_model(tmp_path_factory):
    return make_model(tmp_path_factory.mktemp("long") / "small", context=16384)


@pytest.fixture(scope="module")
def narrow(long_model):
    """A server that works on one request at a time, and lets two wait."""
    running = Server(
        f"small={long_model}", "--set", "serve.max_batch=1", "--set", "serve.max_queue=2",
        "--set", "serve.max_tokens=16000", "--set", "serve.stall_seconds=1.0",
    )  # fmt: skip
    yield running
    assert running.terminate() == 0


ENDLESS = LONG | {"max_tokens": 15000}


@contextmanager
def busy(server, requests):
    """That many endless answers under way, each on a connection of its own."""
    clients = [server.http() for _ in range(requests)]
    streams = [client.stream("POST", "/v1/chat/completions", json=ENDLESS) for client in clients]
    responses = [stream.__enter__() for stream in streams]
    assert [response.status_code for response in responses] == [200] * requests
    yield clients, responses
    for response, client in zip(responses, clients, strict=True):
        response.close()
        client.close()


def raw(body, path="/v1/chat/completions"):
    """A request as it goes over the wire."""
    lines = (f"POST {path} HTTP/1.1", "host: localhost", "content-type: application/json",
             f"content-length: {len(body)}", "", "")  # fmt: skip
    return "\r\n".join(lines).encode() + body


def idle(http):
    status = model_status(http)
    return status["running"] == status["waiting"] == 0 == status["cache_usage"]


def test_clients_that_go_leave_nothing_behind(narrow):
    with narrow.http() as http:
        within(30, lambda: idle(http))
        for stream in (True, False):
            for prompt in ("hello", "hello there, how are you today? " * 500):  # while it decodes, while it reads
                messages = [{"role": "user", "content": prompt}]
                request = httpx.Request("POST", narrow.url + "/v1/chat/completions",
                                        json=ENDLESS | {"stream": stream, "messages": messages})  # fmt: skip
                with socket.create_connection(narrow.url.removeprefix("http://").split(":")) as one:
                    one.sendall(raw(request.content))
                    within(30, lambda: model_status(http)["running"] == 1)
                within(1, lambda: idle(http))
        with busy(narrow, 1):
            within(30, lambda: model_status(http)["running"] == 1)
            with busy(narrow, 2):
                within(30, lambda: model_status(http)["waiting"] == 2)
            within(1, lambda: model_status(http)["waiting"] == 0)
        within(1, lambda: idle(http))


def test_a_full_queue(narrow):
    with narrow.http() as http:
        within(30, lambda: idle(http))
        with busy(narrow, 3):
            # Before it is tokenised: this prompt is far too long, and nobody has looked.
            response = ask(http, messages=[{"role": "user", "content": "x y " * 50_000}])
            refused(response, 429, code="queue_full")
            assert 1 <= int(response.headers["retry-after"]) <= 60
            assert min(_timed(http, "/health") for _ in range(5)) < 0.05
        within(5, lambda: idle(http))
        assert ask(http).status_code == 200


def _timed(http, path):
    begun = time.monotonic()
    assert http.get(path).status_code == 200
    return time.monotonic() - begun


def test_what_can_never_have_room_is_no_matter_of_waiting(narrow):
    with narrow.http() as http:
        within(30, lambda: idle(http))
        refused(ask(http, n=4), 400, "n")  # one at work, two that wait
        response = http.post("/v1/completions", json={"model": "small", "prompt": ["a"] * 4})
        refused(response, 400, "prompt")
        for _ in range(20):  # all that there is room for at once, whether or not the engine has begun with one
            assert ask(http, n=3, max_tokens=1).status_code == 200


def test_a_reader_of_one_large_answer_that_stalls(narrow):
    asked = json.dumps({"model": "small", "input": ["hello"] * 1000, "encoding_format": "float"}).encode()
    process = psutil.Process(narrow.process.pid)
    with socket.socket() as one:
        one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        one.connect(("127.0.0.1", int(narrow.url.rpartition(":")[2])))
        one.sendall(raw(asked, "/v1/embeddings"))
        here = one.getsockname()

        def connected():
            return any(tuple(other.raddr) == here for other in process.net_connections() if other.raddr)

        within(30, connected)
        within(120, lambda: not connected())
        one.settimeout(5)
        received = b""
        with suppress(ConnectionResetError):
            while data := one.recv(65536):
                received += data
    assert len(received) < int(re.search(rb"content-length: (\d+)", received)[1])


def test_a_reader_that_stalls(narrow):
    process = psutil.Process(narrow.process.pid)
    with narrow.http() as http:
        within(30, lambda: idle(http))
        before = process.memory_info().rss
        body = json.dumps(ENDLESS | {"logprobs": True, "top_logprobs": 20}).encode()
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(("127.0.0.1", int(narrow.url.rpartition(":")[2])))
            one.sendall(raw(body))
            within(30, lambda: model_status(http)["running"] == 1)
            within(60, lambda: idle(http))
            one.settimeout(5)
            received = b""
            with suppress(ConnectionResetError):
                while data := one.recv(65536):
                    received += data
            assert b"[DONE]" not in received
        assert process.memory_info().rss - before < 100 * 2**20
    assert "stopped reading" in narrow.rest_of_log()


def test_a_deadline(make_server, long_model):
    server = make_server("--set", f"serve.models={{long={json.dumps(str(long_model))}}}",
                         request_seconds=1.0, max_tokens=16000)  # fmt: skip
    with server.http() as http:
        given = ENDLESS | {"model": "long"}
        refused(http.post("/v1/chat/completions", json=given | {"stream": False}), 504, code="deadline_exceeded")
    with server.client() as client, pytest.raises(openai.APIError, match="not finished within 1 s"):
        list(client.chat.completions.create(**given))


def test_preparation_is_a_part_of_the_time(make_server):
    server = make_server(request_seconds=2.0, grammar_seconds=60.0)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": BOMBS["intersections"]}}
    with server.http() as http:
        begun = time.monotonic()
        refused(ask(http, response_format=form), 504, code="deadline_exceeded")
        assert time.monotonic() - begun < 20
        server.process.terminate()  # while it still compiles
    begun = time.monotonic()
    assert server.terminate() == 0
    assert time.monotonic() - begun < 30


def test_the_first_token_is_timed_from_the_arrival(make_server):
    server = make_server()
    with server.http() as http:
        begun = time.monotonic()
        assert ask(http, max_tokens=1, response_format={"type": "json_object"}).status_code == 200  # starts a process
        took = time.monotonic() - begun
        text = http.get("/metrics").text
        told = float(re.search(r"^benthic_time_to_first_token_seconds_sum{.*} (.*)$", text, re.MULTILINE)[1])
        assert took / 2 < told < took
        assert 'benthic_requests_finished_total{model="small",reason="length"} 1.0' in text
        assert 'benthic_requests_finished_total{model="small",reason="stop"} 0.0' in text


# 27. The engine fails

FAILING = """
import os
from benthic.inference.scheduler import Scheduler
from benthic.cli import main

real, steps = Scheduler.step, 0

def step(self):
    global steps
    steps += 1
    if steps > 30:
        raise RuntimeError("the secret prompt")
    return real(self)

Scheduler.step = step
main()
"""


def until_the_end(response):
    """What is received, and whether the end was a proper one."""
    received = b""
    try:
        for data in response.iter_bytes():
            received += data
    except httpx.RemoteProtocolError:
        return received, False
    return received, True


def test_the_engine_fails_in_the_middle_of_an_answer(served_model):
    server = Server(f"small={served_model}", program=[sys.executable, "-c", FAILING])
    with server.http() as http:
        with http.stream("POST", "/v1/chat/completions", json=LONG | {"max_tokens": 300}) as response:
            received, clean = until_the_end(response)
        assert not clean
        events = [json.loads(line[6:]) for line in received.decode().split("\n\n") if line]
        assert len(events) > 1
        assert set(events[-1]["error"]) == {"message", "type", "param", "code"}
        assert b"[DONE]" not in received
        assert b"secret" not in received
        assert http.get("/health").status_code == http.get("/ready").status_code == 503
        refused(ask(http), 500)
    with server.client() as client, pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="small", messages=HELLO)
    assert server.terminate() == 0


# 29. The end


def test_sigterm_under_load(served_model):
    server = Server(f"small={served_model}", "--set", "serve.max_batch=4")
    given = LONG | {"max_tokens": 60, "stream": False}
    form = {"type": "json_object"}  # has a process of its own compile a grammar
    with server.http() as http, concurrent.futures.ThreadPoolExecutor(12) as pool:
        assert ask(http, response_format=form).status_code == 200
        assert psutil.Process(server.process.pid).children()
        answers = [pool.submit(httpx.post, server.url + "/v1/chat/completions", json=given, timeout=120)
                   for _ in range(12)]  # fmt: skip
        within(60, lambda: model_status(http)["running"] + model_status(http)["waiting"] == 12)
        children = psutil.Process(server.process.pid).children(recursive=True)
        server.process.terminate()
        within(30, lambda: http.get("/ready").status_code == 503)
        response = ask(http)
        refused(response, 503)
        assert response.headers["retry-after"]
        assert http.get("/health").status_code == 200
        assert [answer.result().status_code for answer in answers] == [200] * 12
        assert server.terminate() == 0
    assert not any(child.is_running() for child in children)


def test_what_takes_longer_than_the_end_can_wait_is_told_so(long_model):
    server = Server(
        f"small={long_model}", "--set", "serve.max_batch=2", "--set", "serve.max_tokens=16000",
        "--set", "serve.drain_seconds=0.5",
    )  # fmt: skip
    answered = []
    with server.http() as http, concurrent.futures.ThreadPoolExecutor(8) as pool:

        def stream():
            with httpx.stream("POST", server.url + "/v1/chat/completions", json=ENDLESS, timeout=120) as response:
                return until_the_end(response)

        streams = [pool.submit(stream) for _ in range(2)]
        whole = [pool.submit(httpx.post, server.url + "/v1/chat/completions", json=ENDLESS | {"stream": False},
                             timeout=120) for _ in range(3)]  # fmt: skip
        within(60, lambda: model_status(http)["running"] + model_status(http)["waiting"] == 5)
        begun = time.monotonic()
        server.process.terminate()
        for one in whole:
            refused(one.result(), 503)
        for one in streams:
            received, clean = one.result()
            assert not clean
            answered.append(json.loads(received.decode().split("\n\n")[-2][6:]))
        assert server.terminate() == 0
        assert time.monotonic() - begun < 10
    assert [event["error"]["code"] for event in answered] == ["unavailable"] * 2
    assert "Traceback" not in server.rest_of_log()


# 30. The same whatever else happens


def test_the_same_answer_alone_in_a_crowd_and_from_the_cache(server):
    prompts = ["hello there, how are you today? " * 12 + word for word in ("I", "am", "well", "🙂")]
    settings = {"model": "small", "max_tokens": 24, "logprobs": True, "top_logprobs": 5, "temperature": 1.3}

    def answer(number):
        messages = [{"role": "user", "content": prompts[number]}]
        with server.client() as client:
            made = client.chat.completions.create(messages=messages, seed=number, **settings)
        return made.choices, made.usage.prompt_tokens_details.cached_tokens

    alone = [answer(number) for number in range(4)]
    again = [answer(number) for number in range(4)]
    assert all(cached for _, cached in again)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        crowd = list(pool.map(answer, [0, 1, 2, 3] * 4))
    for number, (choices, _) in enumerate(alone):
        assert choices == again[number][0]
        assert all(choices == crowd[number + 4 * turn][0] for turn in range(4))


def test_characters_and_stop_strings_across_tokens(server):
    with server.client() as client:

        def written(regex, **given):
            form = {"response_format": {"type": "regex", "regex": regex}}
            made = {"model": "small", "messages": HELLO, "max_tokens": 60, "temperature": 1, "extra_body": form} | given
            chunks = list(client.chat.completions.create(stream=True, **made))
            pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
            assert client.chat.completions.create(**made | {"seed": 1}).choices[0].message.content
            assert "\ufffd" not in "".join(pieces)
            return [piece for piece in pieces if piece], chunks[-1].choices[0].finish_reason

        # The tokenizer knows one of these three; of the others each byte is a token.
        assert written("🙂🐟é") == (["🙂", "🐟", "é"], "stop")
        assert written("abcdefgh", stop=["de"]) == (["a", "b", "c"], "stop")
        pieces, reason = written("abcdexgh", stop=["def", "hi"])
        assert ("".join(pieces), reason) == ("abcdexgh", "stop")
        # Broken off within a character: what there is of it is no character.
        for tokens in range(1, 9):
            form = {"response_format": {"type": "regex", "regex": "🐟🐟"}}
            made = client.chat.completions.create(model="small", messages=HELLO, extra_body=form, max_tokens=tokens)
            assert made.choices[0].message.content in ("", "🐟", "🐟🐟")


# Nothing of what is said is written down


def test_prompts_are_not_logged(server, http):
    word = "".join(random.choices(string.ascii_letters, k=24))
    ask(http, messages=[{"role": "user", "content": word}])
    ask(http, messages=[{"role": "user", "content": word, "x": 1}])
    ask(http, chat_template=word)
    http.get(f"/v1/models?key={word}")
    log = server.rest_of_log()
    assert re.search(r"req_\w+ POST /v1/chat/completions 200 [\d.]+s", log)
    assert word not in log


def test_prompts_are_logged_when_asked_for(make_server):
    server = make_server(log_prompts=True)
    with server.http() as http:
        ask(http, messages=[{"role": "user", "content": "remember me"}])
    assert "remember me" in server.rest_of_log()


def test_nobody_else_is_called(server):
    connections = psutil.Process(server.process.pid).net_connections()
    assert all(not one.raddr or one.raddr.ip == "127.0.0.1" for one in connections)
