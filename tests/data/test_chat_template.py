"""A template from an imported model can neither run code nor take the machine."""

import resource
import time

import pytest

from benthic.data.chat_template import MAX_SOURCE, ChatTemplate
from benthic.data.template_sandbox import MAX_SECONDS
from benthic.errors import InputError

HOSTILE = {
    "code": "{{ messages.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['time'] }}",
    "mutation": "{{ messages.append(1) }}",
    "range": "{% for i in range(1000000000) %}x{% endfor %}",
    "repeat": "{{ 'x' * 10000000000 }}",
    "power": "{{ 10 ** 10000000 }}",
    "loop": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "quiet filter": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "output": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "macro": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "product": "{{ 'x' * 1000 * 1000 * 1000 * 1000 }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "center": "{{ 'x'.center(10000000000) }}",
    "zfill": "{{ 'x'.zfill(10000000000) }}",
    "rjust in a filter": "{{ ['x'] | map('center', 10000000000) | list }}",
    "expandtabs": "{{ ('\\t' * 1000).expandtabs(1000000000) }}",
    "indent": "{{ ('\\n' * 1000) | indent(1000000000, true, true) }}",
    "tojson indent": "{{ [1] | tojson(indent=10000000000) }}",
    "format": "{{ '{:10000000000d}'.format(1) }}",
    "nested format": "{{ '{:{}}'.format('x', 10000000000) }}",
    "format filter": "{{ '%10000000000d' | format(1) }}",
    "replace": "{{ ('x' * 1000000).replace('x', 'x' * 1000000) }}",
    "replace filter": "{{ ('x' * 1000000) | replace('x', 'x' * 1000000) }}",
    "join": "{{ (['x' * 1000000] * 100000) | join('') }}",
    "join method": "{{ ('x' * 1000000).join('y' * 1000000) }}",
    "batch": "{{ [1] | batch(10000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(10000000000) | list }}",
    "round": "{{ 1.5 | round(1000000000, 'floor') }}",
    "lipsum": "{{ lipsum(100000) }}",
    "doubling by ~": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by set": "{% set n = namespace(x='x') %}{% for i in range(60) %}{% set y %}{{ n.x }}{{ n.x }}{% endset %}"
    "{% set n.x = y %}{% endfor %}",
    "doubling by macro": "{% macro m(x) %}{{ x }}{{ x }}{% endmacro %}{% set n = namespace(x='x') %}"
    "{% for i in range(60) %}{% set n.x = m(n.x) %}{% endfor %}",
    "many of one": "{% set x = 'x' * 1000000 %}{% set y %}" + "{{ x }}" * 5000 + "{% endset %}",
    "much text": "{% set y %}{% for i in range(99999) %}" + "x" * 100_000 + "{% endfor %}{% endset %}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}{% endfor %}"
    "{{ n.x }}",
    "nested lists as JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% endfor %}{{ n.x | tojson }}",
    "nested namespaces": "{% set n = namespace(x=1) %}{% for i in range(60) %}"
    "{% set n.x = namespace(a=n.x, b=n.x) %}{% endfor %}{{ n.x }}",
    "compared lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(60) %}{% set n.x = [n.x, n.x] %}"
    "{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "redefined check": "{% set check_time = cycler %}{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% endfor %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_templates_end_in_one_line(name):
    started = time.thread_time()
    with pytest.raises(InputError) as refused:
        ChatTemplate(HOSTILE[name]).render([{"role": "user", "content": "x"}])
    assert "\n" not in str(refused.value)
    assert time.thread_time() - started < MAX_SECONDS + 1
    # In kibibytes on Linux; not one of them is let to fill the memory before it is stopped.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 << 20


def test_a_template_of_many_megabytes_is_not_compiled():
    with pytest.raises(InputError, match="at most"):
        ChatTemplate("x" * (MAX_SOURCE + 1))


def test_ordinary_work_is_let_through():
    source = (
        "{{ m | tojson }}{{ 5 % 3 }}{{ 'a' + 'b' }}{{ [1] + [2] }}{{ '-' * 3 }}{{ 2 * 3.5 }}{{ 'a' ~ 1 ~ none }}"
        "{{ 'a-b'.replace('-', '--').split('--')[-1].lstrip() }}{{ ['x', 'y'] | join(', ') }}{{ 'é' | center(3) }}"
        "{% set n = namespace(k=1) %}{% set n.k = n.k + 1 %}{{ n.k == 2 and 'z' in 'xyz' }}{{ 'a\nb' | indent(2) }}"
    )
    expected = '{"a": "<é\'>"}2ab[1, 2]---7.0a1Nonebx, y é Truea\n  b'
    assert ChatTemplate(source).render([], m={"a": "<é'>"}) == expected


def test_a_long_conversation_is_rendered():
    messages = [{"role": "user", "content": "x</think>" * 2000}, {"role": "assistant", "content": "y" * 20_000}] * 100
    source = "{% for m in messages %}{{ m.role ~ m.content.replace('</think>', '<answer>') }}{% endfor %}"
    expected = "".join(m["role"] + m["content"].replace("</think>", "<answer>") for m in messages)
    assert ChatTemplate(source).render(messages) == expected


def test_templates_render_as_hugging_faces_do():
    source = (
        "{% for m in messages %}\n  {% if loop.first %}\n[{{ m.role }}]\n  {% endif %}\n"
        "{{ m['content'] | trim }}\n"
        "{% if m.tool %}{% continue %}{% endif %}!{% endfor %}"
    )
    messages = [{"role": "user", "content": " a "}, {"role": "assistant", "content": "b", "tool": True}]
    from transformers.utils.chat_template_utils import render_jinja_template

    (expected,), _ = render_jinja_template([messages], chat_template=source)
    assert ChatTemplate(source).render(messages) == expected
