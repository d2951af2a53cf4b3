"""Weights and cache in fewer bits, as the command line and the settings ask for them."""

import pytest

from benthic.config.presets import PRESETS
from benthic.precision.latents import CACHE_DTYPES, LatentFormat

CHAT = {"model": "small", "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8, "temperature": 0}


def answer(server):
    with server.http() as http:
        said = http.post("/v1/chat/completions", json=CHAT | {"logprobs": True})
        (model,) = http.get("/status").json()["models"]
    assert said.status_code == 200
    return said.json()["choices"][0], model["cache_bytes"]


def test_a_server_keeps_weights_and_cache_as_it_is_told(server, make_server):
    plain, _ = answer(server)
    rounded, size = answer(make_server("--cache-precision", "fp8", precision="int8"))
    assert rounded["logprobs"] != plain["logprobs"]
    page = 64 * (PRESETS["tiny"].num_hidden_layers + PRESETS["tiny"].num_nextn_predict_layers)
    page *= LatentFormat(PRESETS["tiny"], CACHE_DTYPES["fp8"]).row_bytes
    assert size % page == 0
    assert size == pytest.approx(2**30, abs=page)
