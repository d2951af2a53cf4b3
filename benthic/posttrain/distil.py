"""Distillation as from DeepSeek-R1: a teacher's answers, those that the rewards approve of, to fine-tune on.

Every answer is kept in ``asked.jsonl`` as soon as it is judged, whatever it is worth, so that a call that was ended
goes on where it was. At the end ``answers.jsonl`` has the conversations to learn from, each with where it came from,
and ``manifest.json`` what was asked of whom, what was kept and what was not. (arXiv 2501.12948, section 2.4, and 2.3.3
for the sampling that rejects.)
"""

import hashlib
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from benthic.config.posttrain import DistilConfig, ProblemsConfig
from benthic.data.chat import in_words
from benthic.errors import InputError, WorkFailed
from benthic.files import read_json_object, sha256, sync, write_atomically
from benthic.lock import locked
from benthic.posttrain.judge import Case, Judge, Verdict, Weighted
from benthic.posttrain.problems import Family, Problem, read_problems
from benthic.posttrain.teacher import NoAnswer, Refused, Teacher, Told
from benthic.train.ledger import made_with_now

JOURNAL = "asked.jsonl"
ANSWERS = "answers.jsonl"
MANIFEST = "manifest.json"
_FIRST = 20_000_000
"""Numbers of families' problems from here on are asked: reinforcement learning and `benthic problems` are elsewhere."""
_HELD_OUT = 500
"""Of a family, as ``posttrain.rl.held_out`` has it."""
_MOST_FAILED = 10
"""Problems in a row that no answer came to, each asked several times."""
_MOST_UNJUDGED = 20
"""Answers that could not be judged, when none could."""
_IDENTITY = ("model", "problems", "held_out", "system", "max_new_tokens", "temperature", "top_p", "seed")
"""Settings that make answers what they are; others may change from one call to the next."""

Progress = Callable[[str, int, int | None], None]


class Question(NamedTuple):
    """One request."""

    source: int
    number: int
    """Of the problem within its source."""
    sample: int
    problem: Problem

    @property
    def key(self) -> tuple[int, int, int]:
        """What tells it from all others."""
        return self.source, self.number, self.sample


class Entry(NamedTuple):
    """What the last pass needs to know of an answer in the journal."""

    place: int
    """Of its line, in bytes."""
    outcome: str
    reward: float | None
    digest: bytes
    """Of prompt and answer."""


def distil(config: DistilConfig, teacher: Teacher, out: Path, progress: Progress = lambda *_: None) -> dict[str, Any]:
    """Ask, judge and write, or go on with it; returns what ``manifest.json`` then says.

    Args:
        config: what is asked, and what is kept.
        teacher: closed by whoever opened it.
        out: a folder of its own.
        progress: told of the answers that there are.

    Raises:
        InputError: problems or rewards cannot be used, or ``out`` was begun with other ones, or by another teacher.
        WorkFailed: the teacher has failed too often in a row, or no answer can be judged. What there is, is kept.
    """
    begun = time.monotonic()
    sources = [_open(one, config.held_out) for one in config.problems]
    names = list(dict.fromkeys(reward.name for source in sources for reward in source.rewards))
    with locked(out):
        identity = _identity(config, teacher, sources)
        earlier = _begin(out, identity)
        total = sum(1 for _ in _questions(config, sources))
        left = (question for question in _questions(config, sources) if question.key not in earlier)
        with Judge(names, config.reward_seconds) as judge, _open_journal(out / JOURNAL) as journal:
            asking = _Asking(config, teacher, judge)
            with closing(asking.entries(left)) as entries:
                for done, entry in enumerate(entries, start=len(earlier) + 1):
                    journal.write((json.dumps(entry) + "\n").encode())
                    journal.flush()
                    progress("answers", done, total)
        manifest = _finish(config, sources, out, identity)
        manifest |= {
            "without_answer": asking.without_answer,
            "seconds": time.monotonic() - begun,
            "made_with": made_with_now(),
        }
        write_atomically(out / MANIFEST, json.dumps(manifest, indent=1))
    return manifest


class Source(NamedTuple):
    """Problems in order."""

    name: str
    rewards: tuple[Weighted, ...]
    fingerprint: str
    problems: Callable[[int], Iterator[tuple[int, Problem]]]
    """The first so many, with their numbers."""

    @property
    def worth(self) -> float:
        """All the reward that an answer can get."""
        return sum(abs(reward.weight) for reward in self.rewards)


def _open(config: ProblemsConfig, held_out: int | None) -> Source:
    if config.family is not None:
        family = Family(config, _HELD_OUT if held_out is None else held_out)
        try:
            family.training(_FIRST)
        except InputError as error:
            raise InputError(str(error).replace("posttrain.rl", "posttrain.distil", 1)) from None
        return Source(family.name, family.rewards, family.fingerprint, lambda count: _of_family(family, count))
    path = Path(config.file or "")
    if not path.is_file():
        raise InputError(f"posttrain.distil.problems: {path}: no such file; give a .jsonl file")
    rewards = tuple(Weighted(reward.name, reward.weight) for reward in config.rewards)
    problems = read_problems(path, rewards)
    asked = problems[: len(problems) - (held_out or 0)]
    if not asked:
        raise InputError(f"{path}: {len(problems)} problems, and held_out = {held_out or 0} leave none to ask")
    return Source(path.stem, rewards, sha256(path), lambda count: iter(list(enumerate(asked))[:count]))


def _of_family(family: Family, count: int) -> Iterator[tuple[int, Problem]]:
    seen = set[str]()
    for number in range(count):
        problem = family.training(_FIRST + number)
        if problem.prompt not in seen:  # small families repeat themselves
            seen.add(problem.prompt)
            yield number, problem


def _questions(config: DistilConfig, sources: list[Source]) -> Iterator[Question]:
    for place, source in enumerate(sources):
        for number, problem in source.problems(config.count):
            for sample in range(config.samples):
                yield Question(place, number, sample, problem)


# ---------------------------------------------------------------------- the journal


def _identity(config: DistilConfig, teacher: Teacher, sources: list[Source]) -> dict[str, Any]:
    settings = config.model_dump(mode="json", include=set(_IDENTITY))
    return {"teacher": teacher.name, **settings, "sources": [source.fingerprint for source in sources]}


def _begin(out: Path, identity: dict[str, Any]) -> set[tuple[int, int, int]]:
    """The questions that were answered in an earlier call. Raises InputError if that was another's."""
    journal = out / JOURNAL
    if not journal.exists():
        if (out / ANSWERS).exists() or (out / MANIFEST).exists():
            raise InputError(f"{out}: holds {ANSWERS} or {MANIFEST}, but no {JOURNAL}; give another --out")
        write_atomically(journal, json.dumps({"identity": identity}) + "\n")
        return set()
    with journal.open("rb") as lines:
        before = _parsed(lines.readline()).get("identity")
    if not isinstance(before, dict):
        raise InputError(f"{journal}: does not say what it is of; give another --out")
    for key, value in identity.items():
        if before.get(key) != value:
            raise InputError(
                f"{journal}: was begun with another {key}: {str(before.get(key))[:80]!r}, not {str(value)[:80]!r}; "
                "give another --out"
            )
    return {_key(entry) for _, entry in _entries(journal)}


def _entries(journal: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Whole lines with their places; one that a kill tore is left out, and what it was of asked again."""
    with journal.open("rb") as lines:
        place = len(lines.readline())
        for line in lines:
            entry = _parsed(line)
            if line.endswith(b"\n") and {"source", "number", "sample", "outcome", "messages"} <= entry.keys():
                yield place, entry
            place += len(line)


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _key(entry: Mapping[str, Any]) -> tuple[int, int, int]:
    return int(entry["source"]), int(entry["number"]), int(entry["sample"])


# ---------------------------------------------------------------------- asking


class _Asking:
    """Questions go out as many at once as are allowed; their answers are judged and written here, one after another."""

    def __init__(self, config: DistilConfig, teacher: Teacher, judge: Judge) -> None:
        self._config, self._teacher, self._judge = config, teacher, judge
        self.without_answer = 0
        self._in_a_row = 0
        self._judged = self._unjudged = 0

    def entries(self, questions: Iterator[Question]) -> Generator[dict[str, Any], None, None]:
        """What the journal is to say, as it comes."""
        waiting: dict[Future[dict[str, Any]], Question] = {}
        pool = ThreadPoolExecutor(self._config.at_once, thread_name_prefix="benthic-teacher")
        try:
            while True:
                for question in itertools.islice(questions, self._config.at_once - len(waiting)):
                    waiting[pool.submit(_ask, self._config, self._teacher, question)] = question
                if not waiting:
                    return
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    entry = self._entry(future, waiting.pop(future))
                    if entry is not None:
                        yield entry
        finally:
            if waiting:
                self._teacher.close()
            pool.shutdown(cancel_futures=True)

    def _entry(self, future: Future[dict[str, Any]], question: Question) -> dict[str, Any] | None:
        """None where no answer came."""
        try:
            entry = future.result()
        except NoAnswer as error:
            self.without_answer += 1
            self._in_a_row += 1
            if self._in_a_row >= _MOST_FAILED:
                raise WorkFailed(f"{self._in_a_row} problems in a row got no answer: {error}") from None
            return None
        self._in_a_row = 0
        if entry["outcome"] == "answered" and question.problem.rewards:
            self._count(_judged(self._judge, question.problem, entry))
        return entry

    def _count(self, verdict: Verdict) -> None:
        """Raise WorkFailed if no answer at all can be judged."""
        troubled = len(verdict.troubles) == len(verdict.parts)
        self._unjudged += troubled
        self._judged += not troubled
        if self._unjudged >= _MOST_UNJUDGED and not self._judged:
            raise WorkFailed(f"rewards: none of {self._unjudged} answers could be judged: {verdict.why}")


def _open_journal(path: Path) -> BinaryIO:
    """To append whole lines: a torn one at the end is cut off first."""
    file = path.open("r+b")
    end = 0
    for line in file:
        end += len(line) if line.endswith(b"\n") else 0
    file.truncate(end)
    file.seek(end)
    return file


def _ask(config: DistilConfig, teacher: Teacher, question: Question) -> dict[str, Any]:
    """What the journal says of a question. Raises NoAnswer and what else :meth:`Teacher.ask` does, but Refused."""
    messages = list(question.problem.messages)
    told_first = [{"role": "system", "content": config.system}] if config.system is not None else []
    digest = hashlib.blake2b(f"{config.seed} {question.key}".encode(), digest_size=8).digest()
    seed, begun = int.from_bytes(digest, "big") >> 33, time.monotonic()  # 31 bits: not every endpoint takes more
    entry: dict[str, Any] = {
        "source": question.source, "number": question.number, "sample": question.sample, "seed": seed,
        "when": datetime.now(UTC).isoformat(timespec="seconds"), "messages": messages,
    }  # fmt: skip
    try:
        told = teacher.ask([*told_first, *messages], seed)
    except Refused as error:
        return {**entry, "outcome": "refused", "why": str(error)}
    seconds = round(time.monotonic() - begun, 3)
    answer = {"content": told.text.strip(), **({"reasoning_content": told.reasoning} if told.reasoning else {})}
    return {**entry, "outcome": _outcome(told), "seconds": seconds, "tokens": told.tokens, "answer": answer}


def _outcome(told: Told) -> str:
    if not told.finished:
        return "unfinished"
    return "answered" if told.text.strip() else "empty"


def _judged(judge: Judge, problem: Problem, entry: dict[str, Any]) -> Verdict:
    """The verdict, which goes into the entry. Rewards see an answer as a student would write it."""
    text = in_words([{"role": "assistant", **entry["answer"]}])[0]["content"]
    verdict = judge.judge(Case(problem.prompt, text, problem.facts, problem.rewards))
    entry |= {"reward": verdict.value, "rewards": verdict.parts}
    if verdict.troubles:
        entry |= {"troubles": verdict.troubles, "why": verdict.why}
    return verdict


# ---------------------------------------------------------------------- keeping


def _finish(config: DistilConfig, sources: list[Source], out: Path, identity: dict[str, Any]) -> dict[str, Any]:
    """Write the answers that are kept; returns the manifest's account."""
    found: dict[tuple[int, int], dict[int, Entry]] = {}
    counts, troubles = dict[str, int](), dict[str, int]()
    tokens = 0
    for place, entry in _entries(out / JOURNAL):
        source, number, sample = _key(entry)
        if source >= len(sources) or sample >= config.samples:
            continue  # of an earlier call that asked for more
        answer = entry.get("answer") or {}
        digest = hashlib.blake2b(json.dumps([entry["messages"], answer]).encode()).digest()
        found.setdefault((source, number), {})[sample] = Entry(place, entry["outcome"], entry.get("reward"), digest)
        tokens += entry.get("tokens") or 0
        for trouble in (entry.get("troubles") or {}).values():
            troubles[trouble] = troubles.get(trouble, 0) + 1
    kept: list[int] = []
    by_source = [0] * len(sources)
    for (source, _), answers in sorted(found.items()):
        chosen = _choose(config, sources[source], answers, counts)
        by_source[source] += len(chosen)
        kept += chosen
    if not kept:
        told = ", ".join(f"{count} {name}" for name, count in counts.items()) or "none came"
        raise WorkFailed(f"{out}: no answer was kept ({told}); {JOURNAL} has them all")
    _write_answers(config, sources, out, kept, identity)
    return {
        "teacher": identity["teacher"],
        "settings": config.model_dump(mode="json", exclude={"api_key_env"}),
        "sources": [
            {"name": source.name, "fingerprint": source.fingerprint, "kept": count}
            for source, count in zip(sources, by_source, strict=True)
        ],
        "asked": sum(len(answers) for answers in found.values()),
        "kept": len(kept),
        "left_out": counts,
        "reward_troubles": troubles,
        "teacher_tokens": tokens,
        "answers_sha256": sha256(out / ANSWERS),
    }


def _choose(config: DistilConfig, source: Source, answers: dict[int, Entry], counts: dict[str, int]) -> list[int]:
    """Places of the answers to a problem that are kept; the others are counted by what is wrong with them."""
    least = config.least_reward if config.least_reward is not None else source.worth
    good: list[tuple[float, int, Entry]] = []
    for sample, entry in sorted(answers.items()):
        if entry.outcome != "answered":
            reason = entry.outcome
        elif source.rewards and (entry.reward is None or entry.reward < least):
            reason = "below the least reward"
        elif entry.digest in (other.digest for _, _, other in good):
            reason = "the same again"
        else:
            good.append((-(entry.reward or 0.0), sample, entry))
            continue
        counts[reason] = counts.get(reason, 0) + 1
    if len(good) > config.keep:
        counts["more than are kept"] = counts.get("more than are kept", 0) + len(good) - config.keep
    return [entry.place for _, _, entry in sorted(good)[: config.keep]]


def _write_answers(
    config: DistilConfig, sources: list[Source], out: Path, places: list[int], identity: dict[str, Any]
) -> None:
    """Conversations in the order of their problems, whatever the order in which they came."""
    settings = {key: identity[key] for key in ("system", "max_new_tokens", "temperature", "top_p")}
    draft = out / f".{ANSWERS}.tmp"
    with (out / JOURNAL).open("rb") as journal, draft.open("w", encoding="utf-8") as file:
        for place in places:
            journal.seek(place)
            entry = _parsed(journal.readline())
            provenance = {
                "teacher": identity["teacher"], "settings": settings, "source": sources[entry["source"]].name,
                **{key: entry.get(key) for key in ("number", "sample", "seed", "when", "seconds", "reward", "rewards")},
            }  # fmt: skip
            messages = [*entry["messages"], {"role": "assistant", **entry["answer"]}]
            file.write(json.dumps({"messages": messages, "provenance": provenance}) + "\n")
        file.flush()
        os.fsync(file.fileno())
    draft.replace(out / ANSWERS)
    sync(out)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """What ``manifest.json`` of a folder that :func:`distil` has written says; nothing if it is none of these."""
    path = folder / MANIFEST
    if not (folder / JOURNAL).is_file() or not path.is_file():
        return None
    found = read_json_object(path)
    return found if "answers_sha256" in found else None
