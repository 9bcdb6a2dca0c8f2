"""Tool calls in each dialect: which one a template speaks, what the grammar allows, what the reader finds."""

from __future__ import annotations

import json
from typing import Any

import jsonschema
import pytest

from tests.serve.running import Running, running
from tests.serve.stub import TOOL, StubEngine
from tests.serve.test_answers import CLOCK, WEATHER
from trivium.serve.tool_reader import ToolReader
from trivium.serve.tools import Dialect, dialect_of, plan_tools

pytestmark = pytest.mark.timeout(150)
PARAMETERS = 'with tools write {"name": the name, "parameters": {…}}'
ARGUMENTS = '{{ tools }}{\\"name\\": \\"{{ c.name }}\\", \\"arguments\\": {{ c.arguments }}}'
TEMPLATES = {  # by form: a template, and the id of the trigger's token where it is a control token
    "text": ("tools <tool_call>", None),
    "control": ("tools <tool_call>", TOOL),
    "list": ("tools [TOOL_CALLS]", None),
    "control-list": ("tools [TOOL_CALLS]", TOOL),
    "parameters": (PARAMETERS, None),
    "arguments": (ARGUMENTS, None),
}
PLAIN = ("parameters", "arguments")
VALID = '{"city": "Rome", "days": 3}'
SCHEMA: Any = WEATHER["function"]["parameters"]  # type: ignore[index]


def dialect(form: str) -> Dialect:
    template, trigger = TEMPLATES[form]
    special = {} if trigger is None else {"<tool_call>": trigger, "[TOOL_CALLS]": trigger}
    found = dialect_of(template, special)
    assert found is not None and found.trigger_id == trigger
    return found


def tokens(text: str, spoken: Dialect) -> list[int]:
    """Byte for byte, the trigger by its token where it has one."""
    if spoken.trigger_id is None:
        return list(text.encode())
    first, *rest = text.split(spoken.trigger)
    return [*first.encode(), *(token for part in rest for token in (spoken.trigger_id, *part.encode()))]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("form", TEMPLATES)
def test_calls_are_found_in_text_however_it_is_cut(form: str, size: int) -> None:
    spoken = dialect(form)
    plan = plan_tools([WEATHER, CLOCK], "auto", True, spoken)
    assert plan is not None
    arguments = '{"city": "Ro\\"}{me", "days": [1, {"a": "]"}]}'
    written = spoken.trigger + spoken.begin("weather") + arguments + spoken.end
    several = written + spoken.between + spoken.trigger + spoken.begin("clock") + "{}" + spoken.end
    talk = f"é {spoken.begin('clock')}{{}} <tool but no call {{[ "
    calls = [("weather", arguments)]
    cases: list[tuple[str, str, list[tuple[str, str]], bool]] = [
        (written, "", calls, True),
        (several, "", [*calls, ("clock", "{}")], True),
        (talk, talk, [], False),
        ("plain <tool_cal", "plain <tool_cal", [], False),
        (written[: -len(spoken.end) - 1], "", [("weather", arguments[:-1])], False),
        (talk + written, talk + written, [], False) if form in PLAIN else (talk + written, talk, calls, True),
    ]
    for text, content, expected, whole in cases:
        assert read(plan_reader(plan), tokens(text, spoken), size) == (content, expected, whole)


def plan_reader(plan: Any) -> ToolReader:
    return ToolReader(plan, lambda token: bytes([token]), {TOOL})


def read(reader: ToolReader, ids: list[int], size: int) -> tuple[str, list[tuple[str, str]], bool]:
    """What comes of ``ids``, ``size`` at a time; unfinished characters wait for their rest, as in the engine."""
    said, calls, waiting = "", [], b""
    for start in range(0, len(ids), size):
        part = ids[start : start + size]
        waiting += bytes(token for token in part if token < 256)
        text = waiting.decode(errors="ignore")
        waiting = waiting[len(text.encode()) :]
        more, found = reader.push(text, part)
        said += more
        for call in found:
            if call.name is not None:
                calls.append((call.name, ""))
            calls[call.index] = calls[call.index][0], calls[call.index][1] + call.arguments
    return said + reader.flush(), calls, reader.whole


def answer(server: Running, form: str, reply: str, **more: Any) -> Any:
    """What comes of a model that says ``reply`` where the grammar lets it."""
    spoken = dialect(form)
    server.server._service.dialect = spoken
    server.engine.reply = tokens(reply, spoken)
    asked = {"tools": [WEATHER], "max_tokens": 400} | more
    return server.chat(**asked).json()["choices"][0]


@pytest.fixture(scope="module")
def obedient() -> Any:
    engine = StubEngine()
    engine.follow = True
    with running(engine) as server:
        yield server


@pytest.mark.parametrize("form", [form for form in TEMPLATES if form not in PLAIN])
def test_a_call_may_follow_text(obedient: Running, form: str) -> None:
    """With "auto" the model writes what it likes; once it begins a call, the rest of it is valid."""
    spoken = dialect(form)
    for arguments, name in ((VALID, "weather"), ('{"city": "Paris", "days": 77}', "weather"), (VALID, "wxyz")):
        call = spoken.trigger + spoken.begin(name) + arguments + spoken.end
        found = answer(obedient, form, "Let me look. " + call)
        assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", "Let me look. ")
        (one,) = found["message"]["tool_calls"]
        assert one["function"]["name"] == "weather"
        told = json.loads(one["function"]["arguments"])
        jsonschema.validate(told, SCHEMA)
        assert arguments != VALID or name != "weather" or told == json.loads(VALID)


@pytest.mark.parametrize("form", TEMPLATES)
def test_what_the_grammar_takes_for_text_is_no_call(obedient: Running, form: str) -> None:
    """A call's likeness without its trigger, or without one after something was said, is text and stays text."""
    spoken = dialect(form)
    likeness = "Sure: " + spoken.begin("weather") + '{"city": "Paris", "days": "x"}' + spoken.end + " "
    found = answer(obedient, form, likeness)
    assert (found["finish_reason"], found["message"]["content"]) == ("stop", likeness)
    assert "tool_calls" not in found["message"]


@pytest.mark.parametrize("form", TEMPLATES)
@pytest.mark.parametrize("choice", ["auto", "required"])
def test_an_answer_may_be_calls_alone(obedient: Running, form: str, choice: str) -> None:
    spoken = dialect(form)
    one = spoken.trigger + spoken.begin("weather") + VALID + spoken.end
    for count in (1, 2) if spoken.between else (1,):
        found = answer(obedient, form, spoken.between.join([one] * count), tool_choice=choice)
        assert (found["finish_reason"], found["message"]["content"]) == ("tool_calls", None)
        assert [call["function"]["arguments"] for call in found["message"]["tool_calls"]] == [VALID] * count
    bent = answer(obedient, form, one.replace("Rome", "Paris"), tool_choice=choice)
    jsonschema.validate(json.loads(bent["message"]["tool_calls"][0]["function"]["arguments"]), SCHEMA)


@pytest.mark.parametrize("form", TEMPLATES)
def test_a_call_that_was_cut_is_not_reported_as_one(obedient: Running, form: str) -> None:
    spoken = dialect(form)
    one = spoken.trigger + spoken.begin("weather") + VALID + spoken.end
    for most in range(1, len(tokens(one, spoken)) + 1):
        found = answer(obedient, form, one, max_tokens=most, tool_choice="required", parallel_tool_calls=False)
        assert found["finish_reason"] == ("tool_calls" if most == len(tokens(one, spoken)) else "length")


@pytest.mark.parametrize(
    "template",
    [
        None,
        "{{ messages }}",
        "{% for tool in tools %}{{ tool.name }}{% endfor %}",
        "{% if tools %}<｜tool▁calls▁begin｜>{% for c in m['tool_calls'] %}<｜tool▁call▁begin｜>"
        "{{ c['function']['name'] }}<｜tool▁sep｜>{{ c['function']['arguments'] }}"
        "<｜tool▁call▁end｜>{% endfor %}{% endif %}",
        "{% if tools %}namespace functions { {{ tool['name'] }} {{ tool['parameters'] }} }{% endif %}"
        "<|start|>assistant to=functions.{{ call['name'] }}<|channel|>commentary json<|message|>"
        "{{ call['arguments'] }}<|call|>",
        "{% if tools %}<tools>{{ tools }}</tools><tool_call>\n<function={{ c.name }}>\n<parameter=x>\n1\n</parameter>\n"
        "</function>\n</tool_call>{% endif %}",
        "{% if tools %}<tool_call>{{ c.name }}<arg_key>x</arg_key><arg_value>1</arg_value></tool_call>{% endif %}",
        "{% if tools %}[TOOL_CALLS]{{ c.name }}[ARGS]{{ c.arguments }}{% endif %}",
        '{% if tools %}<|tool_call|>[{"name": x, "arguments": y}]{% endif %}',
        '{% if tools %}<tool_call>[{"name": x, "arguments": y}]</tool_call>{% endif %}',
        '{% if tools %}{{ \'<tool_call>\\n[\' }}{% for c in calls %}{"name": x, "arguments": y}{% endfor %}{% endif %}',
        '{% for t in tools %}{"name": "{{ t.name }}", "description": "{{ t.d }}", "parameters": {{ t.p }}}{% endfor %}',
        """{% for t in tools %}{{ '{"name": "' + t.name + '", \\"description\\": ' }}x, "parameters":{% endfor %}""",
        '{% for t in tools %}{"type": "function", "function": {"name": "{{ t.name }}", "parameters": 1}}{% endfor %}',
        'with tools write [{"name": the name, "arguments": {}}, more]',
        'with tools write [\\n  {\\"name\\": the name, \\"arguments\\": {}}]',
        "{% if tools %}{{- '[' -}}{%- for c in calls -%}{{- '{\"name\": ' + c.name }}, \"arguments\": 1}{% endfor %}",
        'with tools write {"tool_calls": [{"name": the name, "arguments": {}}]}',
        'with tools write {"tool_call": {"name": the name, "arguments": {}}}',
    ],
    ids=[
        "none",
        "chat",
        "no-form",
        "deepseek",
        "harmony",
        "xml",
        "keys-and-values",
        "named-args",
        "other-marks",
        "list-after-a-mark",
        "list-after-a-mark-in-pieces",
        "definitions",
        "definitions-in-pieces",
        "definitions-held",
        "list",
        "list-in-lines",
        "list-in-pieces",
        "object-of-lists",
        "object-of-one",
    ],
)
def test_a_form_of_calls_that_is_not_known_is_none(template: str | None) -> None:
    assert dialect_of(template, {}) is None


def test_the_form_that_a_template_shows_is_taken() -> None:
    def key(template: str) -> str | None:
        found = dialect_of(template, {})
        return None if found is None else f"{found.trigger}{found.key}"

    assert key(PARAMETERS) == "parameters"
    assert key(ARGUMENTS) == "arguments"
    in_pieces = (
        """{% if tools %}{{ '{"name": "' + call.name + '", ' }}{{ '"parameters": ' }}{{ call.arguments }}}{% endif %}"""
    )
    assert key(in_pieces) == "parameters"
    defined = (
        '{% for t in tools %}{"name": "{{ t.name }}", "description": "{{ t.text }}", "parameters": {}}{% endfor %}'
    )
    assert key(defined + ' write: {"name": the name, "arguments": {}}') == "arguments"
    assert key("""{{ tools[0] }}{{ 'Write: ' }}{{ '{"name": ' + x + ', "parameters": {}}' }}""") == "parameters"
    assert key('{% if tools %}<tool_call>{"name": x, "arguments": y}</tool_call>{% endif %}') == "<tool_call>arguments"


def test_a_template_without_tools_refuses_them() -> None:
    with running() as server:
        server.server._service.dialect = dialect_of("{{ messages }}", {})
        answer = server.chat(tools=[WEATHER])
        assert (answer.status, answer.error["param"]) == (400, "tools")
        twice = server.chat(tools=[CLOCK, CLOCK])
        assert twice.status == 400
        assert server.chat(tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "no"}}).status == 400
