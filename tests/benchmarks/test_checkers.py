"""What each checker takes for right, and mistakes in a file of prompts, each in one line."""

import json

import pytest

from benchmarks import checkers, examples
from benchmarks.checkers import Judges
from benchmarks.examples import chosen, digest
from mlx_dgemma.errors import InputError, UsageError

GRID = "1234 3412 2143 4321"
THREE_ELSEWHERE = ["0.3", "-3", "\u22123", "3.5", "3,5", "0,3", "13", "x3", "1/3", "3/4"]
NINE = "534678912 672195348 198342567 859761423 426853791 713924856 961537284 287419635 345286179"
SHOWN = "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"
OURS = Judges.named([])


def always(text, fields):
    return fields.get("easy", False)


def broken(text, fields):
    raise KeyError("out of cheese")


def vague(text, fields):
    return 1


@pytest.mark.parametrize(
    ("checker", "answer", "right", "wrong"),
    [
        ("exact", "a  b", ["a  b", "\n a  b\n"], ["a b", "a  b.", "A  b", ""]),
        ("exact", ["yes", "Yes"], ["yes", "Yes"], ["YES", "no"]),
        (
            "json",
            '{"a": 1, "b": [true, null]}',
            ['{"b":[true,null],"a":1.0}', '```json\n{"a": 1, "b": [true, null]}\n```'],
            [
                '{"a": 1, "b": [1, null]}',
                '{"a": true, "b": [true, null]}',
                '{"a": 1, "b": [null, true]}',
                '{"a": 2, "a": 1, "b": [true, null]}',
                '{"a": 1, "b": [true, null], "c": 1}',
                'It is {"a": 1, "b": [true, null]}',
                '{"a": 1, "b": [true',
                "",
                "[" * 100_000,
            ],
        ),
        ("json", "1", ["1", "1.0", " 1 "], ["true", '"1"', "NaN", "[1]"]),
        ("final", "132", ["132", "47 + 85 = 132", "7 + 5 = 12\n47 + 85 = 132\n", "So it is\n132"], ["47 + 85", "1132"]),
        ("final", "7 + 5 = 12\n47 + 85 = 132", ["132", "= 132"], ["12", "132 = 47 + 85", "7 + 5 = 12\n"]),
        ("contains", "Paris", ["It is Paris.", "Paris", "(Paris)"], ["paris", "Parisian", "comParis", ""]),
        ("contains", "3", ["3", "It is 3.", "3, 4", "a,3", "(3)", "and/3"], THREE_ELSEWHERE),
        ("contains", "C++", ["C++ is", "use C++."], ["C+", "C++y"]),
    ],
)
def test_what_is_right(checker, answer, right, wrong):
    fields = {"prompt": "x", "answer": answer}
    judge = checkers.CHECKERS[checker]
    assert [text for text in right if not judge(text, fields)] == []
    assert [text for text in wrong if judge(text, fields)] == []


@pytest.mark.parametrize("separator", [" ", "\n"])
def test_a_sudoku_is_right_whatever_its_solution_is(separator):
    other = GRID.replace("1", "x").replace("2", "1").replace("x", "2")
    fields = {"prompt": "sudoku 1... .... .1.. ....", "answer": GRID}
    assert checkers.sudoku(GRID.replace(" ", separator), fields)
    assert checkers.sudoku(f"First {other}, then:\n\n{GRID}\n", fields), "the last one counts"
    assert checkers.sudoku(f"{other}\n\n{GRID}", fields) and not checkers.sudoku(f"{GRID} {other}", fields)
    assert not checkers.sudoku(other, fields), "the given is not kept"
    assert checkers.sudoku(other, fields | {"prompt": "2... .... .... ...."})


@pytest.mark.parametrize(
    "text",
    [
        "1234 3412 2143 432.",  # a blank is left
        "1234 3412 2143",  # a row is missing
        "1234 3412 2143 432",
        "1234 3412 2143 4325",
        f"{GRID} 1234",  # a row too many: which four are meant?
        f"{GRID}\n\n1111 2222",
        f"{GRID}\n----\n1111 2222",
        "1234 2341 3412 4123",  # boxes
        "1234 3412 1243 4321",  # columns
        "1224 3412 2143 4321",  # rows
        "",
    ],
)
def test_a_sudoku_is_wrong(text):
    assert not checkers.sudoku(text, {"prompt": "1... .... .... ...."})


@pytest.mark.parametrize(
    "text",
    [
        GRID + ".",
        GRID.replace(" ", ", "),
        "\n".join(f"| {' | '.join(row)} |" for row in GRID.split()),
        "\n".join(["| 1 | 2 | 3 | 4 |", "|---|:-:|---|---|", *(f"| {' | '.join(row)} |" for row in GRID.split()[1:])]),
        "\n".join(f"[{', '.join(row)}]," for row in GRID.split()),
        "1 2 | 3 4\n3 4 | 1 2\n----+----\n2 1 | 4 3\n4 3 | 2 1",
        "\n".join(" ".join(row) for row in GRID.split()) + "\n\nEvery row has 1 2 3 4 once.",
        f"**{GRID}**",
    ],
)
def test_a_sudoku_is_right_however_its_rows_are_set(text):
    fields = {"prompt": "1... .... .... ...."}
    assert checkers.sudoku(text, fields) and not checkers.sudoku(text, {"prompt": "2... .... .... ...."})


def test_a_sudoku_of_nine():
    fields = {"messages": [{"role": "user", "content": [{"type": "text", "text": f"Solve\n{SHOWN}"}]}]}
    assert checkers.puzzle(fields) == SHOWN.split()
    assert checkers.sudoku(NINE, fields) and not checkers.sudoku(NINE.replace("534", "543"), fields)
    swapped = NINE.split()
    swapped[0], swapped[3] = swapped[3], swapped[0]
    assert not checkers.sudoku(" ".join(swapped), {"prompt": " ".join(["." * 9] * 9)}), "boxes"


def test_a_story_is_right_if_the_grammar_has_it():
    story = "There was a old fox by the river. It was happy. The end."
    assert checkers.CHECKERS["story"](f"{story}\n", {"prompt": "story"})
    for wrong in ("", story[:-1], story.replace("fox", "wolf"), story + " The end.", story.replace("The end.", "")):
        assert not checkers.CHECKERS["story"](wrong, {"prompt": "story"})
    endless = story.replace("It was happy.", "It was happy. " * 2000)
    assert checkers.CHECKERS["story"](endless, {"prompt": "story"}) is False


# --- files


def read(path, judges):
    """As the command does."""
    found = examples.read(path)
    judges.require_judged(found)
    return found


def write(path, *lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


def test_a_file_of_examples(tmp_path):
    path = write(
        tmp_path / "p.jsonl",
        {"prompt": "a", "answer": "1", "task": "x", "source": "ignored"},
        "",
        {"messages": [{"role": "user", "content": "b"}], "answer": ["2"], "enable_thinking": True},
        {"prompt": "c", "answer": "3", "task": "x", "checker": "final"},
        {"prompt": "1... .... .... ....", "task": "y", "checker": "sudoku"},
        {"prompt": "d", "answer": "4", "task": "z", "thought": "2 + 2"},
        {"prompt": "e", "answer": "4", "task": "z", "thought": "2 + 2", "enable_thinking": False},
        {"prompt": "f", "answer": "4", "task": "z", "thought": None},
    )
    found = read(path, OURS)
    assert [(e.number, e.task, e.checker, e.enable_thinking) for e in found] == [
        (0, "x", "exact", None),
        (1, "all", "exact", True),
        (2, "x", "final", None),
        (3, "y", "sudoku", None),
        (4, "z", "exact", True),
        (5, "z", "exact", False),
        (6, "z", "exact", None),
    ]
    assert found[1].where == f"{path}, line 3" and found[1].prompt == [{"role": "user", "content": "b"}]
    assert [e.number for e in chosen(found, None, 1)] == [0, 1, 3, 4]
    assert [e.number for e in chosen(found, ["y", "x"], None)] == [0, 2, 3]
    with pytest.raises(UsageError, match="--task no: there are x, all, y, z"):
        chosen(found, ["no"], None)


def test_a_digest_is_of_what_is_said_and_where(tmp_path):
    lines = [{"prompt": "a", "answer": "1"}, {"prompt": "b", "answer": "2"}]
    first = read(write(tmp_path / "a", *lines), OURS)
    spaced = read(
        write(tmp_path / "b", *(json.dumps(line, indent=None, separators=(" ,", " :")) for line in lines)), OURS
    )
    swapped = read(write(tmp_path / "c", *lines[::-1]), OURS)
    assert digest(first) == digest(spaced) != digest(swapped)
    assert digest(first[:1]) != digest(swapped[1:]), "its place decides on its seeds"


BAD = {
    "half a letter in a name": ('{"prompt": "x", "answer": "y", "task": "\\ud800"}', "printable letters"),
    "a name of two lines": ('{"prompt": "x", "answer": "y", "task": "a\\nb"}', "printable letters"),
    "a long name": ('{"prompt": "x", "answer": "y", "task": "' + "a" * 41 + '"}', "at most 40"),
    "no JSON": ('{"prompt": ', "not JSON"),
    "a bare prompt": ('"say something"', "a prompt alone"),
    "no prompt": ({"answer": "1"}, "prompt"),
    "no answer": ({"prompt": "a"}, '"answer" must be the text'),
    "an answer that is no text": ({"prompt": "a", "answer": 7}, '"answer" must be the text'),
    "no answers": ({"prompt": "a", "answer": []}, '"answer" must be the text'),
    "an unknown checker": ({"prompt": "a", "answer": "1", "checker": "poem"}, "not 'poem'; --checker NAME="),
    "a place is not taken from a file": ({"prompt": "a", "checker": f"{__name__}:always"}, "checker must be one of"),
    "a checker that is no name": ({"prompt": "a", "answer": "1", "checker": ["json"]}, "checker must be a name"),
    "an answer that is no JSON": ({"prompt": "a", "answer": "{", "checker": "json"}, '"answer" is not JSON'),
    "an answer that is everywhere": ({"prompt": "a", "answer": " ", "checker": "contains"}, "in every text"),
    "no puzzle": ({"prompt": "sudoku 1234", "checker": "sudoku"}, "no 4x4 or 9x9 grid"),
    "a task without a name": ({"prompt": "a", "answer": "1", "task": ""}, "task must be a name"),
    "thinking in words": ({"prompt": "a", "answer": "1", "enable_thinking": "yes"}, "enable_thinking must be true"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_named(name, tmp_path):
    line, said = BAD[name]
    path = write(tmp_path / "p.jsonl", {"prompt": "a", "answer": "1"}, line)
    with pytest.raises(InputError) as error:
        read(path, OURS)
    assert str(error.value).startswith(f"{path}, line 2: ") and said in str(error.value)
    assert not isinstance(error.value, UsageError)


# --- checkers of one's own


def test_one_of_ones_own_is_given_the_line(tmp_path):
    path = write(tmp_path / "p", {"prompt": "a", "checker": "mine", "easy": True}, {"prompt": "b", "answer": "1"})
    mixed = Judges.named([f"mine={__name__}:always"])
    first, second = read(path, mixed)
    assert mixed.is_right(first, "") and mixed.is_right(second, "1") and not mixed.is_right(second, "2")
    alone = Judges.named([f"{__name__}:always"])
    assert [alone.is_right(example, "1") for example in read(path, alone)] == [True, False]


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("magic", "checker 'magic' does not exist; there are exact, json"),
        ("no.such.module:f", "cannot be imported (ModuleNotFoundError"),
        ("math:no_such_function", "cannot be imported (AttributeError"),
        ("math:pi", "pi is not a function"),
        ("x=magic", "'magic' does not exist"),
    ],
)
def test_a_checker_that_is_not_there(name, said):
    with pytest.raises(UsageError) as error:
        Judges.named([name])
    assert said in str(error.value)


def test_there_is_one_in_place_of_all():
    with pytest.raises(UsageError, match="there can be one in place of all"):
        Judges.named(["exact", "json"])


@pytest.mark.parametrize(
    ("function", "said"),
    [("broken", "raised KeyError: 'out of cheese'"), ("vague", "must return True or False, not 1")],
)
def test_a_checker_that_fails_names_the_line(function, said, tmp_path):
    judges = Judges.named([f"{__name__}:{function}"])
    (example,) = read(write(tmp_path / "p", {"prompt": "a"}), judges)
    with pytest.raises(InputError) as error:
        judges.is_right(example, "text")
    assert f"line 1: checker {__name__}:{function} " in str(error.value) and said in str(error.value)
