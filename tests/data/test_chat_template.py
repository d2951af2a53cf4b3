"""A template from an imported model can neither run code nor take the machine."""

import time

import pytest

from benthic.data.chat_template import MAX_SECONDS, ChatTemplate
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
