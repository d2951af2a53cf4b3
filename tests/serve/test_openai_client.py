"""Every shape that OpenAI's own client checks, strictly, against the real process."""

import codecs
import json

import jsonschema
import openai
import pytest

from benthic.data.tokenizer import Tokenizer

HELLO = [{"role": "user", "content": "hello"}]
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather", "description": "Weather of a city.",
        "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "integer"}},
            "required": ["city", "days"], "additionalProperties": False,
        },
    },
}  # fmt: skip


@pytest.fixture(scope="module")
def client(server):
    with server.client() as client:
        yield client


@pytest.fixture(scope="module")
def lenient(server):
    """For what OpenAI's own server sends although its schema says otherwise: a null in streamed completions, base64."""
    with server.client(_strict_response_validation=False) as client:
        yield client


def chat(client, **given):
    return client.chat.completions.create(**{"model": "small", "messages": HELLO, "max_tokens": 12, "seed": 1} | given)


def joined(chunks, index=0):
    return "".join(c.delta.content or "" for chunk in chunks for c in chunk.choices if c.index == index)


def test_chat(client):
    raw = client.chat.completions.with_raw_response.create(model="small", messages=HELLO, max_tokens=5)
    assert raw.headers["x-request-id"].startswith("req_")
    answer = raw.parse()
    (choice,) = answer.choices
    assert (answer.object, answer.model, choice.message.role) == ("chat.completion", "small", "assistant")
    assert choice.finish_reason in ("stop", "length")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    body = json.loads(raw.text)
    assert body["choices"][0]["message"]["refusal"] is None
    assert body["choices"][0]["logprobs"] is None


def test_stream_is_the_same_answer(client):
    whole = chat(client)
    chunks = list(chat(client, stream=True, stream_options={"include_usage": True}))
    assert joined(chunks) == whole.choices[0].message.content
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]][-1] == whole.choices[0].finish_reason
    assert (chunks[-1].choices, chunks[-1].usage.completion_tokens) == ([], whole.usage.completion_tokens)
    assert all(chunk.usage is None and "usage" in chunk.model_fields_set for chunk in chunks[:-1])


def test_stream_without_usage(server, client):
    assert all("usage" not in chunk.model_fields_set for chunk in chat(client, stream=True))
    request = {"model": "small", "messages": HELLO, "max_tokens": 3, "stream": True}
    with server.http() as http:
        response = http.post("/v1/chat/completions", json=request)
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert all(line.startswith("data: ") for line in response.text.split("\n\n") if line)


def test_several_choices(client):
    whole = chat(client, n=3, temperature=1.5)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [choice.message.content for choice in whole.choices]
    assert len(set(texts)) > 1
    chunks = list(chat(client, n=3, temperature=1.5, stream=True))
    assert [joined(chunks, index) for index in range(3)] == texts
    alone = chat(client, temperature=1.5, seed=2)
    assert alone.choices[0].message.content == texts[1]


def test_logprobs(client):
    answer = chat(client, logprobs=True, top_logprobs=3, temperature=0)
    content = answer.choices[0].logprobs.content
    assert len(content) == answer.usage.completion_tokens
    assert all(len(token.top_logprobs) == 3 for token in content)
    assert all(token.logprob == max(top.logprob for top in token.top_logprobs) <= 0 for token in content)
    spoken = b"".join(bytes(token.bytes) for token in content)
    assert codecs.getincrementaldecoder("utf-8")("replace").decode(spoken) == answer.choices[0].message.content
    chunks = list(chat(client, logprobs=True, top_logprobs=3, temperature=0, stream=True))
    streamed = [token for chunk in chunks for c in chunk.choices if c.logprobs for token in c.logprobs.content]
    assert streamed == content
    assert not chat(client, logprobs=True).choices[0].logprobs.content[0].top_logprobs


def test_sampling_settings_have_their_effect(client):
    likeliest = chat(client, temperature=0, max_tokens=4, logprobs=True).choices[0]
    assert chat(client, temperature=2, top_p=0, max_tokens=4).choices[0].message.content == likeliest.message.content
    first = likeliest.message.content[0]
    assert first not in chat(client, temperature=0, stop=first).choices[0].message.content
    assert chat(client, temperature=0, stop=[first]).choices[0].finish_reason == "stop"
    pushed = chat(client, temperature=0, max_tokens=4, logit_bias={"72": 100}, logprobs=True).choices[0]
    assert len({token.token for token in pushed.logprobs.content}) == 1
    shunned = chat(client, temperature=0, max_tokens=4, logit_bias={"72": 12}, frequency_penalty=2, logprobs=True)
    assert shunned.choices[0].logprobs.content


def test_usage_counts_cached_tokens(client):
    text = [{"role": "user", "content": "how are you today? " * 40}]
    first, again = (chat(client, messages=text, max_tokens=2).usage for _ in range(2))
    assert first.prompt_tokens == again.prompt_tokens
    assert again.prompt_tokens_details.cached_tokens > 0


def test_content_in_parts_and_all_roles(client):
    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert chat(client, messages=[{"role": "user", "content": parts}]).choices == chat(client).choices
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO, {"role": "assistant", "content": "I am"}, *HELLO]
    assert chat(client, messages=messages).choices


def test_answers_can_be_sent_back_as_they_came(client):
    answer = chat(client).choices[0].message
    said = {**answer.model_dump(), "annotations": [], "audio": None, "function_call": None}
    expected = chat(client, messages=[*HELLO, answer, *HELLO]).choices
    assert chat(client, messages=[*HELLO, said, *HELLO]).choices == expected
    refusals = [{"content": None, "refusal": "no"}, {"content": [{"type": "refusal", "refusal": "no"}]}]
    plain = chat(client, messages=[*HELLO, {"role": "assistant", "content": "no"}, *HELLO]).choices
    for refusal in refusals:
        assert chat(client, messages=[*HELLO, {"role": "assistant", **refusal}, *HELLO]).choices == plain


def test_null_stands_for_the_default(client):
    assert chat(client, stream=None, stop=None, n=None, tools=None).choices == chat(client).choices
    assert list(chat(client, stream=True, stream_options={"include_usage": None}))[-1].choices
    whole = client.completions.create(model="small", prompt="hello", max_tokens=3, seed=1, echo=None, stream=None)
    assert not whole.choices[0].text.startswith("hello")


def test_a_function_without_parameters_takes_none(client):
    tools = [{"type": "function", "function": {"name": "now"}}]
    for seed in range(3):
        answer = chat(client, tools=tools, tool_choice="required", max_tokens=200, temperature=1.5, seed=seed)
        assert answer.choices[0].message.tool_calls[0].function.arguments == "{}"


SIZE = {"type": "object", "properties": {"size": {"enum": [1, 2]}}, "required": ["size"], "additionalProperties": False}


def test_an_answer_is_after_the_schema_or_a_call(client, served_model):
    tokenizer = Tokenizer.load(served_model)
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SIZE}}
    asked = {"tools": [WEATHER], "response_format": form, "max_tokens": 200, "temperature": 2}
    called, answered = 0, 0
    for bias in ({str(tokenizer.encode(beginning)[0]): 9} for beginning in "<{"):
        for seed in range(4):
            (choice,) = chat(client, seed=seed, logit_bias=bias, **asked).choices
            if calls := choice.message.tool_calls:
                called += 1
                for call in calls:
                    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
            elif choice.finish_reason == "stop":
                answered += 1
                jsonschema.validate(json.loads(choice.message.content), SIZE)
    assert called
    assert answered
    with pytest.raises(openai.BadRequestError, match="not together with tools"):
        chat(client, tools=[WEATHER], extra_body={"response_format": {"type": "regex", "regex": "x"}})


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_forced_tool_call(client, choice):
    other = {"type": "function", "function": {"name": "other", "parameters": {"type": "object", "properties": {}}}}
    tools = [WEATHER] if choice == "required" else [other, WEATHER]
    answer = chat(client, tools=tools, tool_choice=choice, max_tokens=200, temperature=1)
    (call,) = answer.choices[0].message.tool_calls
    assert (answer.choices[0].finish_reason, call.type, call.function.name) == ("tool_calls", "function", "get_weather")
    jsonschema.validate(json.loads(call.function.arguments), WEATHER["function"]["parameters"])
    chunks = list(chat(client, tools=tools, tool_choice=choice, max_tokens=200, temperature=1, stream=True))
    (delta,) = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert (delta.index, delta.type) == (0, "function")
    assert (delta.function.name, delta.function.arguments) == (call.function.name, call.function.arguments)
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_results_of_tools_are_read(client):
    call = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}}
    messages = [*HELLO, {"role": "assistant", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "rain"}]  # fmt: skip
    with_result = chat(client, messages=messages, tools=[WEATHER])
    assert with_result.usage.prompt_tokens > chat(client, tools=[WEATHER]).usage.prompt_tokens
    assert chat(client, tools=[WEATHER], tool_choice="none").usage.prompt_tokens == chat(client).usage.prompt_tokens


@pytest.mark.parametrize("seed", range(4))
def test_answers_after_a_schema(client, seed):
    schema = {
        "type": "object", "additionalProperties": False, "required": ["kind", "size", "tags"],
        "properties": {
            "kind": {"enum": ["fish", "crab"]}, "size": {"type": "integer", "minimum": 0, "maximum": 99},
            "tags": {"type": "array", "items": {"type": "boolean"}, "maxItems": 3},
        },
    }  # fmt: skip
    form = {"type": "json_schema", "json_schema": {"name": "animal", "schema": schema, "strict": True}}
    answer = chat(client, response_format=form, max_tokens=200, temperature=1.5, seed=seed)
    assert answer.choices[0].finish_reason == "stop"
    jsonschema.validate(json.loads(answer.choices[0].message.content), schema)


def test_answers_after_a_regular_expression_and_as_any_object(client):
    form = {"type": "regex", "regex": "[0-9]{3}-(abc|xyz)"}
    answer = chat(client, extra_body={"response_format": form}, n=3, temperature=2, max_tokens=30)
    for choice in answer.choices:
        head, _, tail = choice.message.content.partition("-")
        assert len(head) == 3
        assert head.isdigit()
        assert tail in ("abc", "xyz")
    anything = chat(client, response_format={"type": "json_object"}, max_tokens=300, seed=5).choices[0]
    assert anything.message.content.startswith("{")
    if anything.finish_reason == "stop":
        assert isinstance(json.loads(anything.message.content), dict)


def test_parsing_into_a_class(client):
    from pydantic import BaseModel

    class Animal(BaseModel):
        legs: bool
        name: bool

    answer = client.chat.completions.parse(model="small", messages=HELLO, response_format=Animal, max_tokens=100)
    assert isinstance(answer.choices[0].message.parsed, Animal)


def test_completions(client, lenient):
    answer = client.completions.create(model="small", prompt=["hello", "how are"], n=2, max_tokens=6, seed=1)
    assert (answer.object, [choice.index for choice in answer.choices]) == ("text_completion", [0, 1, 2, 3])
    chunks = list(lenient.completions.create(model="small", prompt="hello", max_tokens=6, seed=1, stream=True,
                                            stream_options={"include_usage": True}))  # fmt: skip
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == answer.choices[0].text
    assert chunks[-1].usage.completion_tokens <= 6
    raw = client.completions.create(model="small", prompt=[[1, 70, 71], [1, 72]], max_tokens=2)
    assert raw.usage.prompt_tokens == 5


def test_completion_logprobs(client, lenient):
    answer = client.completions.create(model="small", prompt="hello", max_tokens=5, logprobs=2, temperature=0)
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset)
    assert all(max(top.values()) == own for top, own in zip(found.top_logprobs, found.token_logprobs, strict=True))
    assert found.text_offset[0] == 0
    chunks = list(lenient.completions.create(model="small", prompt="hello", max_tokens=5, logprobs=2, temperature=0,
                                            stream=True))  # fmt: skip
    streamed = [c.logprobs for chunk in chunks for c in chunk.choices if c.logprobs]
    assert [offset for one in streamed for offset in one.text_offset] == found.text_offset
    assert [value for one in streamed for value in one.token_logprobs] == found.token_logprobs


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_scoring_a_prompt(client, served_model, max_tokens):
    import torch

    import benthic

    ids = [1, 70, 71, 90, 200, 5, 6, 0, 80]
    answer = client.completions.create(
        model="small", prompt=ids, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0
    )
    found = answer.choices[0].logprobs
    assert len(found.tokens) == len(ids) + max_tokens  # a token that ends the text is there too
    with torch.inference_mode():
        logits_TV = benthic.load(served_model)(torch.tensor([ids]))[0].double()
    expected = logits_TV.log_softmax(-1)
    assert (found.token_logprobs[0], found.top_logprobs[0]) == (0.0, {})
    for position, index in enumerate(ids[1:], start=1):
        assert found.token_logprobs[position] == pytest.approx(float(expected[position - 1, index]), abs=2e-4)
        likeliest = float(expected[position - 1].max())
        assert max(found.top_logprobs[position].values()) == pytest.approx(likeliest, abs=2e-4)
    assert answer.usage.completion_tokens == max_tokens


def test_an_echo_ends_where_the_text_ends(client):
    asked = {"model": "small", "prompt": "hello", "seed": 1, "temperature": 2, "logprobs": 1}
    for seed in range(20):
        alone = client.completions.create(**asked | {"seed": seed}, max_tokens=100).choices[0]
        if alone.finish_reason == "stop":
            break
    assert alone.finish_reason == "stop"
    echoed = client.completions.create(**asked | {"seed": seed}, echo=True).choices[0]
    assert (echoed.finish_reason, echoed.text) == ("stop", "hello" + alone.text)


def test_models(client):
    (model,) = client.models.list().data
    assert client.models.retrieve("small") == model
    assert (model.id, model.object) == ("small", "model")


def test_embeddings(client, lenient, served_model):
    import torch

    import benthic

    answer = lenient.embeddings.create(model="small", input=["hello", "how are you"])
    plain = client.embeddings.create(model="small", input=["hello", "how are you"], encoding_format="float")
    tokenizer = benthic.Tokenizer.load(served_model)
    ids = [tokenizer.bos_id, *tokenizer.encode("hello")]
    with torch.inference_mode():
        expected_D = benthic.load(served_model).hidden(torch.tensor([ids]))[0][0].double().mean(0)
    assert plain.data[0].embedding == pytest.approx(expected_D.tolist(), abs=1e-5)
    for one, other in zip(answer.data, plain.data, strict=True):
        assert one.embedding == pytest.approx(other.embedding, abs=1e-6)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > len(ids)


def test_errors_are_of_the_right_class(client):
    with pytest.raises(openai.NotFoundError) as wrong:
        chat(client, model="large")
    assert (wrong.value.code, wrong.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("large")
    with pytest.raises(openai.BadRequestError) as wrong:
        chat(client, messages=[{"role": "user", "content": "x y " * 5000}])
    assert wrong.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as wrong:
        chat(client, extra_body={"nonsense": 1})
    assert wrong.value.param == "nonsense"
    assert wrong.value.type == "invalid_request_error"
