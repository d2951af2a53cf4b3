import codecs

import pytest
import torch

from benthic.config.schema import InferenceConfig
from benthic.errors import InputError
from benthic.inference.engine import Engine


def drained(stream):
    """Pieces of a stream and the completion it returned."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def ids_of(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    return ids


def greedy_by_full_forwards(engine, ids, length):
    """Greedy tokens and their log-probabilities, with everything read anew for each token."""
    tokens, logprobs = [], []
    for _ in range(length):
        with torch.inference_mode():
            logits_V = engine.model(torch.tensor([ids + tokens]))[0, -1]
        token = int(logits_V.argmax())
        if token in engine.tokenizer.stop_ids:
            break
        tokens.append(token)
        logprobs.append(float(logits_V.log_softmax(0)[token]))
    return tokens, logprobs


@pytest.mark.parametrize("prompt", ["hello", "how are you today?", "🙂 x"])
def test_greedy_text_is_that_of_full_forwards(engine, prompt):
    ids = [engine.tokenizer.bos_id, *engine.tokenizer.encode(prompt)]
    (completion,) = engine.generate(prompt, temperature=0.0, max_new_tokens=12)
    tokens, logprobs = greedy_by_full_forwards(engine, ids, 12)
    assert list(completion.token_ids) == tokens
    written = b"".join(map(engine.tokenizer.token_bytes, tokens))
    assert completion.text == codecs.getincrementaldecoder("utf-8")("replace").decode(written)
    assert completion.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_streamed_text_is_generated_text(engine):
    for seed in range(4):
        pieces, completion = drained(engine.stream("hello", seed=seed, temperature=1.5))
        assert "".join(pieces) == completion.text
        assert [completion] == engine.generate(["hello"], seed=seed, temperature=1.5)


def test_seeds_reproduce_and_differ(engine):
    once, again, other = (engine.generate("hello", seed=seed, temperature=2.0)[0] for seed in (1, 1, 2))
    assert once == again
    assert once.token_ids != other.token_ids


def test_prompts_together_answer_as_they_do_alone(engine):
    prompts = ["hello", "I am", "well. Thank you"]
    together = engine.generate(prompts, seed=5)
    assert together == [engine.generate(prompt, seed=5)[0] for prompt in prompts]


def test_an_emoji_split_across_tokens_appears_whole(scripted, tokenizer):
    script = ids_of(tokenizer, "ok 🦑!")
    assert len(tokenizer.encode("🦑")) > 1
    case = scripted(script)
    pieces, completion = drained(case.engine.stream(case.prompt))
    assert completion.text == "ok 🦑!"
    assert "🦑" in "|".join(pieces)
    assert not any("\ufffd" in piece for piece in pieces)
    assert completion.finish_reason == "stop"


def test_a_stop_string_split_across_tokens_ends_the_text_before_it(scripted, tokenizer):
    case = scripted(ids_of(tokenizer, "one two STOP three"))
    assert len(tokenizer.encode("STOP")) > 1
    pieces, completion = drained(case.engine.stream(case.prompt, stop=("nope", "STOP")))
    assert "".join(pieces) == completion.text == "one two "
    assert completion.finish_reason == "stop"
    assert len(completion.token_ids) < len(tokenizer.encode("one two STOP three"))


def test_the_beginning_of_a_stop_string_is_released_at_the_end(scripted, tokenizer):
    case = scripted(ids_of(tokenizer, "one two STO"))
    assert case.engine.generate([case.prompt], stop=("STOP",))[0].text == "one two STO"


@pytest.mark.parametrize("role", ["user", "assistant", "system"])
def test_a_role_marker_ends_the_text(scripted, tokenizer, role):
    case = scripted([*ids_of(tokenizer, "yes"), tokenizer.role_ids[role], *ids_of(tokenizer, "no")])
    (completion,) = case.engine.generate([case.prompt])
    assert (completion.text, completion.finish_reason) == ("yes", "stop")


def test_length_ends_the_text(scripted, tokenizer):
    case = scripted(ids_of(tokenizer, "one two three"))
    (completion,) = case.engine.generate([case.prompt], max_new_tokens=2)
    assert (len(completion.token_ids), len(completion.logprobs), completion.finish_reason) == (2, 2, "length")


def test_stops_where_the_model_can_read_no_further(scripted, config, tokenizer):
    limit = config.max_position_embeddings
    case = scripted([50] * limit)
    (completion,) = case.engine.generate([case.prompt], max_new_tokens=10 * limit)
    assert len(case.prompt) + len(completion.token_ids) == limit
    assert completion.finish_reason == "length"


def test_a_conversation_reads_only_what_is_new(engine, monkeypatch):
    read = []
    hidden = engine.model.transformer.hidden

    def counting(tokens_BT, **context):
        read.append(tokens_BT.shape[1])
        return hidden(tokens_BT, **context)

    monkeypatch.setattr(engine.model.transformer, "hidden", counting)
    prompt = engine.tokenizer.encode("hello there, how are you today? I am well. " * 5)
    assert len(prompt) > 64  # a chunk can be shared
    _, first = drained(engine.stream(prompt, temperature=0.0, max_new_tokens=3))
    longer = [*prompt, *first.token_ids, *engine.tokenizer.encode(" well")]
    read.clear()
    _, second = drained(engine.stream(longer, temperature=0.0, max_new_tokens=3))
    assert read[0] == len(longer) - second.cached_tokens
    assert second.cached_tokens == 64
    fresh = Engine(engine.model, engine.tokenizer)
    assert second == fresh.generate([longer], temperature=0.0, max_new_tokens=3)[0]


def test_an_abandoned_answer_leaves_the_engine_usable(engine):
    prompt = [engine.tokenizer.bos_id, *engine.tokenizer.encode("hello")]
    abandoned = engine.stream(prompt, temperature=0.0)
    next(abandoned)
    abandoned.close()
    other = [engine.tokenizer.bos_id, *engine.tokenizer.encode("how are")]
    _, completion = drained(engine.stream(other, temperature=0.0))
    assert [completion] == engine.generate([other], temperature=0.0)
    assert engine.stats().running == engine.stats().waiting == engine.stats().pages_used == 0


def test_a_step_broken_off_leaves_the_engine_usable(engine, monkeypatch):
    expected = engine.generate("hello", temperature=0.0)
    hidden = engine.model.transformer.hidden

    def interrupted(tokens_BT, **context):
        monkeypatch.setattr(engine.model.transformer, "hidden", hidden)
        hidden(tokens_BT, **context)
        raise KeyboardInterrupt

    stream = engine.stream("hello there", temperature=0.0)
    monkeypatch.setattr(engine.model.transformer, "hidden", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(stream)
    assert engine.stats().running == engine.stats().pages_used == 0
    assert engine.generate("hello", temperature=0.0) == expected


def test_streams_may_be_read_by_turns(engine):
    alone = [drained(engine.stream(text, seed=3))[1] for text in ("hello", "how are you")]
    streams = [engine.stream(text, seed=3) for text in ("hello", "how are you")]
    first = [next(stream) for stream in streams]
    rest = [drained(stream) for stream in streams]
    assert [completion for _, completion in rest] == alone
    assert [start + "".join(pieces) for start, (pieces, _) in zip(first, rest, strict=True)] == [c.text for c in alone]


def test_a_request_overrides_the_defaults(engine):
    short = Engine(engine.model, engine.tokenizer, InferenceConfig(max_new_tokens=2, temperature=0.0))
    assert len(short.generate("hello")[0].token_ids) <= 2
    longest = short.generate("hello", max_new_tokens=9)[0]
    assert longest.token_ids == engine.generate("hello", temperature=0.0, max_new_tokens=9)[0].token_ids


@pytest.mark.parametrize(
    ("prompt", "sampling", "words"),
    [
        ("", {}, ["prompt", "empty"]),
        ([], {}, ["prompt", "empty"]),
        ("hello " * 300, {}, ["prompt", "tokens", "max_position_embeddings=256"]),
        ([1, 99999], {}, ["99999"]),
        ([-1], {}, ["-1"]),
        ("hello", {"temperature": -1}, ["temperature", "-1"]),
        ("hello", {"top_p": 0}, ["top_p"]),
        ("hello", {"max_new_tokens": 0}, ["max_new_tokens"]),
        ("hello", {"seed": -3}, ["seed", "-3"]),
        ("hello", {"seed": 2**64}, ["seed"]),
        ("hello", {"stop": ("",)}, ["stop"]),
        ("hello", {"constraint": 5}, ["constraint", "5", "Constraint"]),
        ("hello", {"logit_bias": {300: 1.0}}, ["logit_bias", "300"]),
        ("hello", {"temprature": 1}, ["temprature", "temperature"]),
    ],
)
def test_wrong_input_is_refused_in_one_line_before_the_first_piece(engine, prompt, sampling, words):
    with pytest.raises(InputError) as refusal:
        engine.stream(prompt, **sampling)
    assert "\n" not in str(refusal.value)
    assert all(word in str(refusal.value) for word in words)
