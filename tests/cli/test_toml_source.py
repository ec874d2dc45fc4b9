"""TOML with line numbers: right lines, every syntax error, and never an exception."""

from __future__ import annotations

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvrelay.cli.toml_source import MAX_LINES, parse_toml

SOUND = """\
# a comment
[router]
grpc_port = 1   # one

[router.core]
queue_timeout_s = 2.5
names = [
  "a", # with = sign
  "[b]",
]
text = '''
[not a header]
x = 1
'''
[node]
a.b = 1
"quoted key" = {c = 2}
"""


def test_every_key_has_its_own_line() -> None:
    source = parse_toml(SOUND)
    assert source.faults == ()
    assert source.document == tomllib.loads(SOUND)
    assert source.lines == {
        ("router",): 2,
        ("router", "grpc_port"): 3,
        ("router", "core"): 5,
        ("router", "core", "queue_timeout_s"): 6,
        ("router", "core", "names"): 7,
        ("router", "core", "text"): 11,
        ("node",): 15,
        ("node", "a"): 16,
        ("node", "a", "b"): 16,
        ("node", "quoted key"): 17,
        ("node", "quoted key", "c"): 17,
    }


def test_a_path_without_a_line_takes_that_of_the_table_around_it() -> None:
    assert parse_toml(SOUND).line_of(("router", "core", "absent")) == 5
    assert parse_toml(SOUND).line_of(("absent",)) is None


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("[a]\nx = abc\ny = 2\nz = \n", [2, 4]),
        ("[a\nx = 1\n[b]\ny = 2\n", [1]),
        ("x = 1\nx = 2\n", [2]),
        ("[a]\ny = 2\n[a]\ny = 2\n", [3]),
        ('x = "abc\ny = 2\n', [1]),
        ("x = [1,\ny = 2\n", [1]),
        ("x = [1,\n", [1]),
        ('x = """a\nb\n', [1]),
        ("just words\ny = 2\n", [1]),
        ("y = 2\nx = 1 2\n", [2]),
        ("x = [1, oops,\n  2,\n]\ny = 2\n", [1]),
    ],
)
def test_every_syntax_error_is_reported_with_its_line(text: str, lines: list[int]) -> None:
    assert [fault.line for fault in parse_toml(text).faults] == lines


def test_what_is_sound_around_syntax_errors_is_still_read() -> None:
    source = parse_toml("[a]\nx = abc\ny = 2\n[b\nz = 3\n[c]\nw = [1,\n 2]\n")
    assert source.document == {"a": {"y": 2}, "c": {"w": [1, 2]}}
    assert len(source.faults) == 2


def test_a_file_of_too_many_lines_is_refused() -> None:
    assert "lines" in parse_toml("\n" * MAX_LINES).faults[0].message


PIECES = st.sampled_from(
    [
        "[",
        "]",
        "[a]",
        "[[a]]",
        "x",
        "=",
        "1",
        '"',
        "'''",
        '"""',
        "\n",
        "#",
        "{",
        "}",
        ",",
        " ",
        ".",
        "true",
        "é",
    ]
)


@given(st.lists(PIECES, max_size=30).map("".join))
def test_any_text_is_either_what_tomllib_says_or_has_faults(text: str) -> None:
    source = parse_toml(text)
    try:
        expected = tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        assert source.faults
    else:
        assert not source.faults
        assert source.document == expected
