"""Templates that nobody vouches for: values that grow by being shared are refused, all else goes on as written."""

from __future__ import annotations

import pytest

from trivium.base.errors import DataError
from trivium.base.sandbox import Caps, SandboxedTemplate

CAPS = Caps(template_chars=1 << 12, output_chars=1 << 16, steps=100_000, seconds=30.0)
DOUBLED = (
    "[ns.x, ns.x]",
    "(ns.x, ns.x)",
    "{'a': ns.x, 'b': ns.x}",
    "dict(a=ns.x, b=ns.x)",
    "[ns.x, ns.x]|sum(start=[])",
    "['', '']|map('default', ns.x, true)|list",
    "ns.x + ns.x",
    "ns.x * 2",
)


def rendered(text: str) -> str:
    return SandboxedTemplate(text, source="a template", caps=CAPS).run({})


@pytest.mark.parametrize("doubled", DOUBLED)
@pytest.mark.parametrize("used", ["{{ ns.x }}", "{{ ns.x|tojson }}", "{{ ns.x == ns.y }}", ""])
def test_what_doubles_in_every_round_is_refused(doubled: str, used: str) -> None:
    loop = f"{{% for _ in range(60) %}}{{% set ns.x = {doubled} %}}{{% endfor %}}"
    with pytest.raises(DataError, match="a value of more than 65536 characters"):
        rendered(f"{{% set ns = namespace(x=[1], y=[1]) %}}{loop}{used}")


@pytest.mark.parametrize("text", ["{% set ns.x = ns %}", "{% set a = [ns] %}", "{% set a = namespace(x=ns) %}"])
def test_a_namespace_stands_in_nothing(text: str) -> None:
    with pytest.raises(DataError, match="a namespace inside something else"):
        rendered("{% set ns = namespace() %}" + text)


def test_long_separators_are_refused() -> None:
    with pytest.raises(DataError, match="separators that long"):
        rendered("{{ [1, 2]|tojson(separators=('a' * 100, ':')) }}")
    assert rendered("{{ [1, {'a': 2}]|tojson(separators=(',', ':')) }}") == '[1,{"a":2}]'


def test_what_stays_small_is_as_in_jinja() -> None:
    text = (
        "{% set ns = namespace(x=[], y=0) %}"
        "{% for key, value in {'a': 1, 'b': [2, 3]}.items() %}{% set ns.x = ns.x + [(key, value)] %}{% endfor %}"
        "{% set a, b = 1, (2, 3) %}{% set other = ns %}{% set other.y = 'y' %}"
        "{{ ns.x }} {{ a }}{{ b }}{{ ns.y }} {% if a in [1, 2] %}in{% endif %} {{ ns.x|map('first')|join('-') }}"
        "{% for each in [4, 5] %} {{ loop.index }}:{{ each }}{% endfor %}"
    )
    assert rendered(text) == "[('a', 1), ('b', [2, 3])] 1(2, 3)y in a-b 1:4 2:5"
