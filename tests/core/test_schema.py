"""Loose mappings become frozen settings, or one line that says what is wrong and where."""

import dataclasses
import json
import sys
from typing import Any, Literal

import pytest

from moe_zoo.cli import common
from moe_zoo.core.registry import ConfigError, Registry
from moe_zoo.core.schema import Choice, Text, build, choice, choices, set_path, to_dict
from moe_zoo.models import ModelConfig

PARTS = Registry("part", {"plain": "test_schema:Plain", "fancy": "test_schema:Fancy"})


@dataclasses.dataclass(frozen=True)
class PlainConfig:
    size: int = 3


@dataclasses.dataclass(frozen=True)
class FancyConfig:
    glitter: float = 0.5
    size: int = 1


class Plain:
    """A plain part."""

    Config = PlainConfig

    def __init__(self, config, extra=None):
        self.config, self.extra = config, extra


class Fancy(Plain):
    """A fancy part."""

    Config = FancyConfig


@dataclasses.dataclass(frozen=True)
class Inner:
    width: int = 4
    rates: tuple[float, ...] = (1.0,)


@dataclasses.dataclass(frozen=True)
class Outer:
    steps: int
    inner: Inner = Inner()
    rate: float = 0.1
    limit: int | None = None
    label: str = "a"
    flag: bool = False
    mode: Literal["fast", "slow"] = "fast"
    table: dict[str, Any] = dataclasses.field(default_factory=dict)
    part: Choice = choice(PARTS, "plain")
    parts: tuple[Choice, ...] = choices(PARTS, {"plain": {}})


def made(**values):
    return build(Outer, {"steps": 1, **values}, "run")


def refused(text, **values):
    with pytest.raises(ConfigError) as error:
        made(**values)
    message = str(error.value)
    assert "\n" not in message
    for piece in text:
        assert piece in message, message


def test_unknown_key_is_named_with_its_path_and_the_nearest_key():
    refused(["'run.inner.widht'", "'width'", "rates"], inner={"widht": 3})
    refused(["'run.labl'", "'label'"], labl="x")


def test_missing_key_is_named():
    with pytest.raises(ConfigError, match="'run.steps'"):
        build(Outer, {}, "run")


@pytest.mark.parametrize(
    "values, path",
    [
        ({"inner": {"width": "wide"}}, "run.inner.width"),
        ({"inner": {"width": 1.5}}, "run.inner.width"),
        ({"inner": {"width": True}}, "run.inner.width"),
        ({"inner": {"width": None}}, "run.inner.width"),
        ({"inner": {"rates": 3.0}}, "run.inner.rates"),
        ({"inner": {"rates": [1.0, "x"]}}, "run.inner.rates[1]"),
        ({"inner": 5}, "run.inner"),
        ({"rate": "fast"}, "run.rate"),
        ({"rate": True}, "run.rate"),
        ({"flag": 1}, "run.flag"),
        ({"label": 3}, "run.label"),
        ({"limit": "no"}, "run.limit"),
        ({"table": [1]}, "run.table"),
        ({"mode": "fats"}, "run.mode"),
        ({"part": 3}, "run.part"),
        ({"part": {"size": 3}}, "run.part"),
        ({"parts": [1]}, "run.parts"),
    ],
)
def test_wrong_type_is_refused_with_its_path(values, path):
    refused([path + ":"], **values)


def test_whole_floats_are_integers_and_integers_are_floats():
    built = made(steps=1e4, rate=2)
    assert (built.steps, type(built.steps)) == (10_000, int)
    assert (built.rate, type(built.rate)) == (2.0, float)
    refused(["run.steps", "inf"], steps=float("inf"))


def test_none_is_allowed_where_optional():
    assert made(limit=None).limit is None
    assert made(limit=3).limit == 3


def test_literal_lists_the_valid_values_and_the_nearest():
    assert made(mode="slow").mode == "slow"
    refused(["'fats'", "did you mean 'fast'", "'slow'"], mode="fats")


def test_choice_by_name_takes_only_the_settings_of_that_class():
    built = made(part={"name": "fancy", "glitter": 1})
    assert built.part.cls is Fancy and built.part.config == FancyConfig(glitter=1.0)
    assert made(part="fancy").part.config == FancyConfig()
    refused(["'run.part.glitter'", "size"], part={"name": "plain", "glitter": 1.0})
    refused(["run.part.name", "'fancey'", "'fancy'"], part={"name": "fancey"})


def test_choice_makes_its_class_with_its_settings():
    part = made(part={"name": "plain", "size": 7}).part.make("more")
    assert type(part) is Plain and part.config.size == 7 and part.extra == "more"


def test_many_choices_are_named_by_their_keys():
    built = made(parts={"fancy": {"size": 2}, "plain": {}})
    assert [c.name for c in built.parts] == ["fancy", "plain"] and built.parts[0].config.size == 2
    assert made(parts={}).parts == ()
    refused(["run.parts.fancy.sise", "'size'"], parts={"fancy": {"sise": 2}})


@pytest.mark.parametrize("settings", [0.5, 0, Text("0.5"), Text("0")])
def test_many_choices_refuse_a_number_in_place_of_settings(settings):
    refused(["run.parts.fancy"], parts={"fancy": settings})


@pytest.mark.parametrize(
    "values", [{}, {"part": {"name": "fancy", "glitter": 2.0}, "inner": {"rates": [1, 2]}, "limit": 4, "parts": {}}]
)
def test_to_dict_is_the_inverse_of_build_and_fits_json(values):
    built = made(**values)
    again = build(Outer, json.loads(json.dumps(to_dict(built))), "run")
    assert again == built
    assert to_dict(again) == to_dict(built)


def test_model_settings_survive_json():
    variants = {"local": {"attention": {"sliding_window": 8}}}
    built = build(
        ModelConfig, {"layers": "2*(moe:local moe)", "variants": variants, "router": "switch", "losses": {}}, "model"
    )
    assert build(ModelConfig, json.loads(json.dumps(to_dict(built))), "model") == built


@pytest.mark.parametrize(
    "name, text, value",
    [
        ("flag", "true", True),
        ("flag", "False", False),
        ("limit", "none", None),
        ("limit", "12", 12),
        ("steps", "1e4", 10_000),
        ("rate", "3e-4", 3e-4),
        ("rate", "2", 2.0),
        ("label", "12", "12"),
        ("label", "none", "none"),
        ("mode", "slow", "slow"),
    ],
)
def test_text_is_read_by_the_type_of_its_field(name, text, value):
    got = getattr(made(**{name: Text(text)}), name)
    assert got == value and type(got) is type(value)


def test_text_reads_lists_and_names_of_choices():
    assert made(inner={"rates": Text("[1,2]")}).inner.rates == (1.0, 2.0)
    assert made(part=Text("fancy")).part.cls is Fancy
    assert made(part={"name": Text("fancy"), "glitter": Text("2")}).part.config.glitter == 2.0
    assert made(table={"a": Text("3"), "b": {"c": Text("x")}}).table == {"a": 3, "b": {"c": "x"}}


@pytest.mark.parametrize(
    "name, text", [("flag", "yes"), ("steps", "many"), ("steps", "1.5"), ("rate", "[1]"), ("mode", "1"), ("limit", "x")]
)
def test_text_that_does_not_fit_is_refused(name, text):
    refused([f"run.{name}:"], **{name: Text(text)})


def test_set_path_makes_sections_and_refuses_to_enter_a_value():
    tree = {"a": {"b": 1}}
    set_path(tree, "a.c.d", 2)
    assert tree == {"a": {"b": 1, "c": {"d": 2}}}
    with pytest.raises(ConfigError, match="'b' is a value"):
        set_path(tree, "a.b.e", 3)


def test_registry_answers_an_unknown_name_with_the_nearest_and_lists_first_docstring_lines():
    with pytest.raises(ConfigError, match="run.x: unknown part 'plane' .did you mean 'plain'"):
        PARTS.get("plane", "run.x")
    assert PARTS.lines() == {"fancy": "A fancy part.", "plain": "A plain part."}


def test_a_class_that_is_in_no_table_is_named_by_where_it_is():
    part = made(part={"name": "test_schema:Fancy", "glitter": 0.1}).part
    assert (part.name, part.cls, part.config) == ("test_schema:Fancy", Fancy, FancyConfig(0.1))
    assert to_dict(part) == {"name": "test_schema:Fancy", "glitter": 0.1, "size": 1}
    parts = made(parts={"test_schema:Fancy": {"size": 3}, "plain": {}}).parts
    assert [p.config.size for p in parts] == [3, 3]
    refused(["run.part.name", "'test_schema:Fanci'", "no attribute 'Fanci'", "MODULE:CLASS"], part="test_schema:Fanci")
    refused(["ModuleNotFoundError", "'no_such'"], part="no_such:Fancy")
    refused(["'test_schema:Outer'", "has no Config"], part="test_schema:Outer")
    refused(["'test_schema:made'", "is no class"], part="test_schema:made")
    refused(["ValueError"], part=":")
    refused(["'plain'", "MODULE:CLASS"], part="plane")


def test_a_class_of_ones_own_must_derive_from_what_the_table_asks_for():
    with pytest.raises(ConfigError, match="'test_schema:Fancy' is no class that derives from moe_zoo.*:Router"):
        build(ModelConfig, {"router": "test_schema:Fancy"}, "model")


def test_command_lines_find_modules_in_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "a_part_of_my_own.py").write_text("import test_schema\n\nclass Mine(test_schema.Fancy):\n    pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    found = []
    build_it = lambda argv: found.append(made(part={"name": argv[0], "size": 7}).part)
    assert common.run(build_it, ["a_part_of_my_own:Mine"]) == 0
    assert found[0].config.size == 7 and sys.path[-1] == str(tmp_path)


def test_a_silent_field_is_written_only_where_it_says_something():
    """Settings from before there was such a field are what they are now."""

    @dataclasses.dataclass(frozen=True)
    class Settings:
        size: int = 1
        extra: dict[str, int] = dataclasses.field(default_factory=dict, metadata={"silent": True})

    assert to_dict(build(Settings, {})) == {"size": 1}
    said = to_dict(build(Settings, {"extra": {"a": 2}}))
    assert said == {"size": 1, "extra": {"a": 2}} and to_dict(build(Settings, said)) == said
