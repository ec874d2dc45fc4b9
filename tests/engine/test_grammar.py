"""Grammars, with SmolLM2's tokenizer: what they let through, what they refuse, and what they may cost."""

from __future__ import annotations

import json
from random import Random

import pytest
from tokenizers import Tokenizer

from kvrelay.core.errors import ConfigError, InvalidRequest
from kvrelay.core.sampling import Grammar, GrammarKind
from kvrelay.engine.config import GrammarLimits
from kvrelay.engine.embedded_model import ensure_smollm2
from kvrelay.engine.grammar import GrammarCompiler

pytestmark = pytest.mark.model

EOS, OTHER_EOS = 2, 0
NUM_TOKENS = 49_152
VOCAB_SIZE = NUM_TOKENS + 37
"""As of a model whose embedding was padded."""

OBJECT = Grammar(GrammarKind.JSON_OBJECT)
DIGITS = Grammar(GrammarKind.REGEX, r"\d{4}-\d{2}")
SLASHES = Grammar(GrammarKind.REGEX, '/(a|b)/"\\w+"\n\\n')
STRICT = Grammar(
    GrammarKind.JSON_SCHEMA,
    json.dumps(
        {
            "$defs": {
                "step": {
                    "type": "object",
                    "properties": {"text": {"type": "string"}, "next": {"$ref": "#/$defs/maybe_step"}},
                    "required": ["text", "next"],
                    "additionalProperties": False,
                },
                "maybe_step": {"anyOf": [{"$ref": "#/$defs/step"}, {"type": "null"}]},
            },
            "type": "object",
            "properties": {
                "color": {"type": "string", "enum": ["red", "green"]},
                "size": {"anyOf": [{"type": "integer"}, {"type": "null"}]},
                "first": {"$ref": "#/$defs/step"},
                "tags": {"type": "array", "items": {"type": "string"}},
            },
            "required": ["color", "size", "first", "tags"],
            "additionalProperties": False,
        }
    ),
)
CALL = Grammar(
    GrammarKind.LARK,
    'start: "<call>" %json {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"],'
    r' "additionalProperties": false, "x-guidance": {"whitespace_pattern": " {1,2}"}} "</call>"',
)
STEP = '"first": {"text": "é\\n", "next": {"text": "", "next": null}}'
MATCHES = {
    OBJECT: ["{}", '{"a": [1, -2.5e3, {"b": null}], "ü": "\\u00e9\\"é🙂"}', '{\n  "a":\n    true\n}'],
    STRICT: [
        '{"color": "red", "size": 3, ' + STEP + ', "tags": []}',
        '{"color":"green","size":null,' + STEP + ',"tags":["a","b"]}',
    ],
    DIGITS: ["1969-07"],
    SLASHES: ['/a/"é1"\n\n'],
    CALL: ['<call>{"x": 12}</call>'],
}
MISMATCHES = {
    OBJECT: ["[1]", '"a"', "{'a': 1}", '{"a": 1,}', "{} "],
    STRICT: [
        '{"color": "blue", "size": 3, ' + STEP + ', "tags": []}',
        '{"color": "red", "size": "3", ' + STEP + ', "tags": []}',
        '{"color": "red", "size": 3, ' + STEP + ', "tags": [1]}',
        '{"color": "red", "size": 3, ' + STEP + ', "tags": [], "more": 1}',
        '{"color": "red", "size": 3, "tags": []}',
    ],
    DIGITS: ["1969-7-", "969-07", "1969-071", "x", "196٣-07"],
    CALL: ['<call>{"x": "a"}</call>', '<call>{"x":   1}</call>', '{"x": 1}'],
}


@pytest.fixture(scope="session")
def folder():
    return ensure_smollm2()


@pytest.fixture(scope="session")
def encode(folder):
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


@pytest.fixture(scope="module")
def compiler(folder):
    return GrammarCompiler(folder, VOCAB_SIZE, (EOS, OTHER_EOS), GrammarLimits())


def num_taken(matcher, token_ids):
    """How many of `token_ids` the masks let through, one after another."""
    for index, token_id in enumerate(token_ids):
        if not matcher.allowed()[token_id]:
            return index
        matcher.take([token_id])
    return len(token_ids)


def cases(table):
    return [pytest.param(grammar, text, id=text[:30]) for grammar, texts in table.items() for text in texts]


@pytest.mark.parametrize(("grammar", "text"), cases(MATCHES))
def test_what_matches_is_let_through_to_the_end(compiler, encode, grammar, text):
    matcher = compiler.start(grammar, ())
    assert num_taken(matcher, encode(text)) == len(encode(text))
    assert matcher.allowed()[[EOS, OTHER_EOS]].all()


@pytest.mark.parametrize(("grammar", "text"), cases(MISMATCHES))
def test_what_does_not_match_is_not(compiler, encode, grammar, text):
    matcher = compiler.start(grammar, ())
    ids = encode(text)
    assert num_taken(matcher, ids) < len(ids) or not matcher.allowed()[EOS]


@pytest.mark.parametrize(("grammar", "text"), cases(MATCHES))
def test_an_end_is_allowed_only_where_the_match_may_end(compiler, encode, grammar, text):
    matcher = compiler.start(grammar, ())
    for token_id in encode(text):
        assert not matcher.allowed()[[EOS, OTHER_EOS]].any()
        matcher.take([token_id])
    assert matcher.allowed().nonzero().flatten().tolist() == [OTHER_EOS, EOS], "a complete match must end"


def test_padded_ids_are_never_allowed(compiler):
    for source in ("(?s).*", r"[^x]+"):
        allowed = compiler.start(Grammar(GrammarKind.REGEX, source), ()).allowed()
        assert allowed.shape == (VOCAB_SIZE,)
        assert int(allowed[:NUM_TOKENS].sum()) > 40_000
        assert not allowed[NUM_TOKENS:].any()


@pytest.mark.parametrize("grammar", [OBJECT, STRICT])
def test_whitespace_between_tokens_of_json_is_bounded(compiler, encode, grammar):
    [space] = encode(" ")
    matcher = compiler.start(grammar, encode("{"))
    assert 0 < num_taken(matcher, [space] * 100) < 20


@pytest.mark.parametrize("grammar", [*MATCHES])
def test_a_matcher_that_starts_late_stands_where_one_that_went_along_does(compiler, encode, grammar):
    ids = encode(MATCHES[grammar][0])
    along = compiler.start(grammar, ())
    for split in range(len(ids) + 1):
        assert compiler.start(grammar, ids[:split]).allowed().equal(along.allowed()), f"after {split}"
        along.take(ids[split : split + 1])


BAD = [
    (GrammarKind.JSON_SCHEMA, '{"type":', "Expecting value"),
    (GrammarKind.JSON_SCHEMA, "[1]", "must be an object"),
    (GrammarKind.JSON_SCHEMA, 'true }], "x": [{', "Extra data"),
    (GrammarKind.JSON_SCHEMA, '{"type": "nonsense"}', "nonsense"),
    (GrammarKind.JSON_SCHEMA, '{"not": {"const": 1}}', "not"),
    (GrammarKind.JSON_SCHEMA, '{"$ref": "#/$defs/x"}', "/$defs/x"),
    (GrammarKind.JSON_SCHEMA, '{"$ref": "http://127.0.0.1:1/x"}', "127.0.0.1"),
    (GrammarKind.JSON_SCHEMA, '{"items":' * 3000 + "{}" + "}" * 3000, "recursion"),
    (GrammarKind.REGEX, "(a", "unclosed group"),
    (GrammarKind.REGEX, r"(?=a)b", "look-around"),
    (GrammarKind.REGEX, r"[^\s\S]", ""),
    (GrammarKind.LARK, "start: foo", "foo"),
    (GrammarKind.LARK, "start: " + "(" * 2000 + '"a"' + ")" * 2000, "nested"),
]


@pytest.mark.parametrize(("kind", "source", "reason"), BAD, ids=[source[:24] for _, source, _ in BAD])
def test_a_bad_grammar_is_refused_with_the_reason_on_one_line(compiler, kind, source, reason):
    with pytest.raises(InvalidRequest) as refusal:
        compiler.start(Grammar(kind, source), ())
    assert refusal.value.field == "sampling.grammar"
    assert refusal.value.message.startswith("sampling.grammar: ")
    assert reason in refusal.value.message
    assert len(refusal.value.message) < 450
    assert "\n" not in refusal.value.message


def test_output_that_does_not_match_is_refused(compiler, encode):
    with pytest.raises(InvalidRequest, match=r"sampling\.grammar"):
        compiler.start(DIGITS, encode("19x"))
    compiler.start(DIGITS, encode("19"))


def test_a_grammar_beyond_the_limits_is_refused(folder):
    names = [f"R{number}" for number in range(300)]
    rules = [f"{name}: /[a-z]{{1,{index + 1}}}\\p{{L}}/" for index, name in enumerate(names)]
    grammar = Grammar(GrammarKind.LARK, "\n".join([f"start: {' '.join(names)}", *rules]))
    compile_with(folder, GrammarLimits()).start(grammar, ())
    with pytest.raises(InvalidRequest, match="too big"):
        compile_with(folder, GrammarLimits(initial_lexer_fuel=1000)).start(grammar, ())


def test_a_mask_beyond_the_limits_is_refused(folder, encode):
    ambiguous = Grammar(GrammarKind.LARK, 'start: e\ne: e e | "a" | "b" | "c" |')
    matcher = compile_with(folder, GrammarLimits(step_max_items=2000)).start(ambiguous, ())
    with pytest.raises(InvalidRequest, match="Too many items"):
        num_taken(matcher, encode("abc") * 100)
    with pytest.raises(InvalidRequest, match="Too many items"):
        matcher.allowed()


def compile_with(folder, limits):
    return GrammarCompiler(folder, VOCAB_SIZE, (EOS,), limits)


def test_what_others_made_of_a_grammar_is_not_held_against_one_output(folder, encode):
    """Copies of a compiled grammar share the states of its lexer, whose number is bounded."""
    grammar, limits = Grammar(GrammarKind.REGEX, "[abc ]*a[abc]{200}"), GrammarLimits(max_lexer_states=3000)
    texts = ["".join(Random(seed).choices("abc", k=500)) for seed in range(4)]
    alone = [count_until_limit(compile_with(folder, limits), grammar, encode(text)) for text in texts]
    shared = compile_with(folder, limits)
    matchers = [shared.start(grammar, ()) for _ in texts]
    for matcher, text, expected in zip(matchers, texts, alone, strict=True):
        assert count_of(matcher, encode(text)) == expected > 100


def count_until_limit(compiler, grammar, token_ids):
    return count_of(compiler.start(grammar, ()), token_ids)


def count_of(matcher, token_ids):
    try:
        return num_taken(matcher, token_ids)
    except InvalidRequest:
        return matcher.num_tokens


def test_compiled_grammars_are_kept_and_bounded(folder, monkeypatch):
    compiler = compile_with(folder, GrammarLimits(num_cached=2))
    compiled = []
    compile_one = compiler._compile

    def note(grammar):
        compiled.append(grammar.source)
        return compile_one(grammar)

    monkeypatch.setattr(compiler, "_compile", note)
    for source in "abacab":
        compiler.start(Grammar(GrammarKind.REGEX, source), ())
    assert compiled == ["a", "b", "c", "b"]
    assert len(compiler._compiled) == 2


@pytest.mark.parametrize(
    ("content", "vocab_size", "eos_token_ids", "reason"),
    [
        (None, VOCAB_SIZE, (EOS,), "no tokenizer.json"),
        ("{}", VOCAB_SIZE, (EOS,), "can't be used"),
        ("", 100, (EOS,), "vocab size too small"),
        ("", VOCAB_SIZE, (), "end-of-sequence"),
        ("", VOCAB_SIZE, (VOCAB_SIZE,), "out of range"),
    ],
)
def test_without_a_tokenizer_that_fits_grammars_are_refused_by_name(
    folder, tmp_path, content, vocab_size, eos_token_ids, reason
):
    if content is not None:
        content = content or (folder / "tokenizer.json").read_text()
        (tmp_path / "tokenizer.json").write_text(content)
    compiler = GrammarCompiler(tmp_path, vocab_size, eos_token_ids, GrammarLimits())
    with pytest.raises(InvalidRequest, match=reason) as refusal:
        compiler.start(OBJECT, ())
    assert refusal.value.field == "sampling.grammar"


def test_limits_out_of_range_are_refused_by_name():
    with pytest.raises(ConfigError) as refusal:
        GrammarLimits(num_cached=0, step_max_items=True)
    assert "num_cached" in refusal.value.message
    assert "step_max_items" in refusal.value.message
