"""A thousand at once, a document's worth of odd requests, and how soon it is ready: slow, with figures."""

import asyncio
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest
from serving import Server, make_model

CROWD = 1000


async def _crowd(url):
    """A thousand short requests at once; the answers, and how long /health took meanwhile."""
    limits = httpx.Limits(max_connections=CROWD, max_keepalive_connections=CROWD)
    request = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", PROBE, url, stdout=subprocess.PIPE)
    await process.stdout.readline()
    async with httpx.AsyncClient(base_url=url, limits=limits, timeout=300) as http:
        begun = time.monotonic()
        answers = await asyncio.gather(*[
            http.post("/v1/chat/completions", json=request | {"seed": number}) for number in range(CROWD)
        ])  # fmt: skip
        took = time.monotonic() - begun
    process.terminate()
    health = [float(line) for line in (await process.stdout.read()).split()]
    await process.wait()
    return answers, health, took


PROBE = """
import sys, time
import httpx
with httpx.Client(base_url=sys.argv[1], timeout=60) as http:
    http.get("/health")
    print("begun", flush=True)
    while True:
        begun = time.perf_counter()
        assert http.get("/health").status_code == 200
        print(time.perf_counter() - begun, flush=True)
        time.sleep(0.02)
"""
"""In a process of its own, whose times are not those of the thousand clients."""


@pytest.mark.slow
def test_a_thousand_at_once(server):
    process = psutil.Process(server.process.pid)
    before = process.memory_info().rss
    answers, health, took = asyncio.run(_crowd(server.url))
    assert [answer.status_code for answer in answers] == [200] * CROWD
    assert len({answer.json()["id"] for answer in answers}) == CROWD
    grown = (process.memory_info().rss - before) / 2**20
    median, last = statistics.median(health), statistics.quantiles(health, n=100)[98]
    print(f"{CROWD} in {took:.1f} s; /health median {median * 1000:.1f} ms, 99% {last * 1000:.1f} ms, "
          f"most {max(health) * 1000:.1f} ms of {len(health)}; {grown:.0f} MiB more")  # fmt: skip
    assert len(health) > 20
    assert max(health) < 0.05
    assert grown < 300


@pytest.mark.parametrize("examples", [4, pytest.param(60, marks=pytest.mark.slow)])
def test_the_openapi_document_finds_no_fault_of_the_server(make_server, tmp_path, examples):
    server = make_server(max_tokens=8, log_requests=False)
    program = Path(sys.executable).with_name("schemathesis")
    command = [program, "run", f"{server.url}/openapi.json", "--checks", "not_a_server_error",
               "--max-examples", str(examples), "--seed", "1", "--request-timeout", "60",
               *([] if examples > 9 else ["--phases", "examples,fuzzing"])]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path, timeout=1500)
    assert done.returncode == 0, done.stdout[-4000:]
    assert "9 selected / 9 total" in done.stdout


@pytest.mark.slow
def test_ready_within_three_seconds(tmp_path):
    model = make_model(tmp_path / "nano", vocab_size=4096, hidden_size=192, num_hidden_layers=4, intermediate_size=576,
                       q_lora_rank=96, kv_lora_rank=48, qk_nope_head_dim=32, qk_rope_head_dim=16, v_head_dim=32,
                       n_routed_experts=16, moe_intermediate_size=96, num_experts_per_tok=4)  # fmt: skip
    took = []
    for _ in range(3):
        begun = time.monotonic()
        server = Server(model)
        took.append(time.monotonic() - begun)
        used = psutil.Process(server.process.pid).cpu_times()
        print(f"ready after {took[-1]:.2f} s, {used.user + used.system:.2f} s of them processor time")
        with server.http() as http:
            assert http.get("/ready").status_code == 200
        assert server.terminate() == 0
    assert min(took) < 3
