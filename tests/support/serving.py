"""A real `benthic serve` in a process of its own, and a model small enough to start at once."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai

from benthic.config.presets import PRESETS
from benthic.convert.huggingface import save_hf
from benthic.data.tokenizer import Tokenizer
from benthic.model import build_model

PROGRAM = [sys.executable, "-c", "from benthic.cli import main; main()"]
TEXTS = ["hello there, how are you today?", "I am well. Thank you 🙂", '{"name": "get_weather", "arguments": {}}']
START_SECONDS = 120
"""Long, for a machine that does other things too."""


def make_model(out: Path, *, seed: int = 3, context: int = 512, **changes) -> Path:
    """A model with random weights that are wide enough to prefer some tokens clearly."""
    tokenizer = Tokenizer.train(TEXTS * 3, 300)
    tokenizer.save(out / "tokenizer")
    sizes = {"vocab_size": tokenizer.vocab_size, "initializer_range": 0.3, "max_position_embeddings": context}
    config = PRESETS["tiny"].model_copy(update=sizes | changes)
    save_hf(build_model(config, seed=seed), config, out / "tokenizer", out / "model")
    return out


class Server:
    """`benthic serve` with these arguments, until it is stopped."""

    def __init__(self, *arguments, environment=None, program=PROGRAM):
        command = [*program, "serve", *map(str, arguments), "--port", "0"]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, env=os.environ | (environment or {})
        )
        self.log = ""
        # Read all the time: a full pipe would hold the server up.
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.url = self._wait_for(r"serving .* at (http://\S+)", START_SECONDS)

    def _read(self):
        while data := os.read(self.process.stderr.fileno(), 65536):
            self.log += data.decode(errors="replace")

    def _wait_for(self, pattern, seconds):
        end = time.monotonic() + seconds
        while (found := re.search(pattern, self.log)) is None:
            if time.monotonic() > end or not self._reader.is_alive():
                self.process.kill()
                raise AssertionError(f"{pattern!r} not seen; the server said: {self.log}")
            time.sleep(0.02)
        return found[1]

    def client(self, key="none", **settings):
        """OpenAI's client, which checks every shape."""
        return openai.OpenAI(
            base_url=f"{self.url}/v1", api_key=key, timeout=120,
            **({"max_retries": 0, "_strict_response_validation": True} | settings),
        )  # fmt: skip

    def http(self, **settings):
        return httpx.Client(base_url=self.url, timeout=120, **settings)

    def rest_of_log(self):
        """What it has said so far, the last request's line included."""
        time.sleep(0.3)
        return self.log

    def terminate(self, seconds=60):
        """SIGTERM, and the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.process.kill()
            self.process.wait()
            self._reader.join()
            self.process.stderr.close()
