"""Drafters by name, and objects that are taken for one."""

from importlib import import_module

import pytest

from mlx_dgemma import drafter
from mlx_dgemma.drafter import DRAFTERS, Entry, check, check_name, check_object, make, memory
from mlx_dgemma.drafter.lookup import Lookup
from mlx_dgemma.drafter.oracle import Oracle
from mlx_dgemma.drafter.protocol import Draft
from mlx_dgemma.errors import InputError, UsageError


class Whole:
    """Has all that is asked for, `extend` and `fresh` included."""

    taps: tuple[int, ...] = (0, 2)

    def reset(self):
        pass

    def propose(self, context, width):
        return Draft(())

    def extend(self, tokens, features):
        pass


def without(name: str, **others):
    """A `Whole` that lacks `name`, or has `others` instead."""
    members = {key: value for key, value in vars(Whole).items() if not key.startswith("__")} | others
    members.pop(name, None)
    return type("Part", (), members)()


def test_every_name_has_its_factory():
    for entry in DRAFTERS.values():
        assert callable(import_module(entry.module, drafter.__name__).make)
        assert entry.argument is None or entry.argument


def test_lookup_is_made_by_name_anew_each_time(tiny):
    one, other = make("lookup", tiny), make("lookup", tiny)
    assert isinstance(one, Lookup)
    assert one is not other
    assert make(None, tiny) is None


@pytest.mark.parametrize("name", ["oracle", "Lookup", "", "look", "lookup ", ":lookup", "nonesuch:x"])
def test_an_unknown_name_is_told_those_that_exist(tiny, name):
    with pytest.raises(UsageError) as error:
        make(name, tiny)
    assert repr(name) in str(error.value)
    for known in DRAFTERS:
        assert known in str(error.value)


@pytest.mark.parametrize("name", ["lookup:x", "lookup:", "lookup:lookup"])
def test_lookup_takes_no_argument(tiny, name):
    with pytest.raises(UsageError, match=f"'{name}': write lookup$"):
        make(name, tiny)


def test_names_that_need_an_argument(monkeypatch, tiny):
    made = []
    monkeypatch.setitem(DRAFTERS, "tested", Entry(".lookup", "<path>"))
    monkeypatch.setattr("mlx_dgemma.drafter.lookup.make", lambda model, argument: made.append((model, argument)))
    for name in ("tested", "tested:"):
        with pytest.raises(UsageError, match="write tested:<path>"):
            make(name, tiny)
    with pytest.raises(UsageError, match="tested:<path>"):
        check_name("nonesuch")
    assert check_name("tested:/a:b") == ("tested", "/a:b")
    make("tested:C:/x", tiny)
    assert made == [(tiny, "C:/x")]


@pytest.mark.parametrize("given", ["lookup", "canvas", None, Whole()])
def test_options_of_another_drafter_are_refused(tiny, given):
    with pytest.raises(UsageError, match=r"drafter_bits is an option of the drafter block; (this is|name it)"):
        make(given, tiny, drafter_bits=4)
    make(given, tiny, drafter_bits=None)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("canvas:999x9", {}, "length of a canvas drafter"),
        ("block:/no/such/place", {}, "no such folder"),
        ("block:nano", {"drafter_bits": 5}, "drafter_bits must be 4 or 8, not 5"),
        ("block:nano", {"draft_head_bits": 3}, "draft_head_bits must be 4 or 8, not 3"),
        ("block:nano", {"draft_vocab": "/no/file"}, "neither a number nor a file"),
        ("lookup", {"draft_vocab": "5"}, "draft_vocab is an option of the drafter block"),
    ],
)
def test_what_is_wrong_without_any_model_is_said_before_one_is_loaded(name, options, said):
    check("block:nano", {"drafter_bits": 4, "draft_head_bits": None, "draft_vocab": "500"})
    check("block:someone/something", {})  # not asked for yet
    with pytest.raises(InputError, match=said):
        check(name, options)


def test_objects_are_taken_as_they_are_or_made_fresh(tiny):
    oracle, whole, lookup = Oracle([1]), Whole(), Lookup()
    assert make(oracle, tiny) is oracle
    assert make(whole, tiny) is whole
    fresh = make(lookup, tiny)
    assert isinstance(fresh, Lookup)
    assert fresh is not lookup


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        (without("reset"), r"no method reset\(\)"),
        (without("propose"), r"no method propose\(\)"),
        (without("", propose=3), r"no method propose\(\)"),
        (without("taps"), "taps must be a tuple of layers 0-2, not None"),
        (without("", taps=[3]), r"layers 0-2, not \[3\]"),
        (without("", taps=(-1,)), r"not \(-1,\)"),
        (without("", taps=(0, True)), r"not \(0, True\)"),
        (without("", taps=(1.0,)), r"not \(1.0,\)"),
        (without("", taps=1), "not 1"),
        (without("", taps="01"), "not '01'"),
        (without("extend"), r"taps but no method extend\(\)"),
        (7, r"7 has no method reset\(\)"),
        (Whole.propose, r"no method reset\(\)"),
    ],
)
def test_objects_that_are_no_drafters_are_told_what_they_lack(tiny, broken, said):
    with pytest.raises(UsageError, match=said) as error:
        make(broken, tiny)
    assert "drafter" in str(error.value)
    assert "\n" not in str(error.value)


def test_objects_that_are_drafters():
    for whole in (Whole(), without("extend", taps=()), without("", taps=[]), without("", taps=(2, 0, 1)), Oracle(())):
        check_object(whole, 3)


@pytest.mark.parametrize("says", [lambda context: None, lambda context: -1, lambda context: "1", lambda: 3])
def test_memory_that_is_no_number_of_bytes(says):
    drafter = Lookup()
    assert memory(drafter, 9) == memory(None, 9) == 0
    drafter.memory = lambda context: 7 * context
    assert memory(drafter, 9) == 63
    drafter.memory = says
    with pytest.raises(UsageError, match=r"memory\(9\) says no number of bytes"):
        memory(drafter, 9)
