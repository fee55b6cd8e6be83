"""nano's tasks: answers are right, grids have one solution, and nothing that is tested is trained on."""

import ast
import functools
import hashlib
import itertools
import json
import math
import random
import re
import statistics

import pytest
from tokenizers import Tokenizer

from benchmarks.checkers import CHECKERS
from benchmarks.nano.example import Example, split_of
from benchmarks.nano.generators import stories, sudoku
from benchmarks.nano.generators.structured import object_key
from benchmarks.nano.tasks import RUNGS, TASKS, held_out, tasks_to, training_stream
from mlx_dgemma.loading import EMBEDDED

QUICK = [name for name in TASKS if name != "sudoku9"]
FOR_TRAINING = [name for name in QUICK if name != "composed"]  # it has no example of that split
HELD_OUT = ("test", "validation")
CANVAS = 96


def some(task: str, split: str = "test") -> tuple[Example, ...]:
    return held_out(task, 4 if task == "sudoku9" else 40, split)


def last_said(example: Example) -> str:
    return example.messages[-1]["content"]


# --- answers


def corrupted(answer: str, rng: random.Random) -> list[str]:
    """Near misses; white space around an answer does not count."""
    places = [place for place, letter in enumerate(answer) if letter.isalnum()]
    misses = [answer.strip()[:-1], answer.strip()[1:], answer + " 7", ""]
    for place in (places[-1], rng.choice(places)):
        misses.append(answer[:place] + ("7" if answer[place] != "7" else "3") + answer[place + 1 :])
    return misses


@pytest.mark.parametrize("task", TASKS)
def test_every_answer_is_right_and_a_corrupted_one_is_wrong(task):
    rng = random.Random(0)
    for example in some(task):
        is_right = functools.partial(CHECKERS[example.checker], fields=vars(example))
        assert example.task == task and is_right(example.answer)
        for text in corrupted(example.answer, rng):
            if example.checker == "final":  # which reads what is behind the last "=" alone
                assert is_right(text) == (text.rpartition("= ")[2] == example.answer.rpartition("= ")[2])
            elif example.checker != "sudoku" or len(text) < len(example.answer):
                assert not is_right(text), (example, text)
        if example.checker == "sudoku":
            rows = example.answer.split()
            assert not is_right("\n".join([rows[1], rows[0], *rows[2:]])), "its givens have moved"


def said(value) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def test_objects_are_those_that_are_asked_for():
    for example in some("json"):
        pairs = [pair.split("=") for pair in example.prompt.split()[1:]]
        assert [[key, said(value)] for key, value in json.loads(example.answer).items()] == pairs
    for example in some("edit"):
        change, _, shown = example.prompt.partition(" in ")
        before, after = json.loads(shown), json.loads(example.answer)
        (name,) = (key for key in after if before[key] != after[key])
        assert change == f"set {name}={said(after[name])}" and list(before) == list(after)
    for example in some("extract"):
        asked, _, sentence = example.prompt.removeprefix("extract ").partition(": ")
        found = json.loads(example.answer)
        assert list(found) == asked.split(", ") and all(str(value) in sentence for value in found.values())
    for example in some("table"):
        names, _, rows = example.prompt.removeprefix("table ").partition(": ")
        found = json.loads(example.answer)
        assert [[said(value) for value in row.values()] for row in found] == [row.split() for row in rows.split("; ")]
        assert all(list(row) == names.split() for row in found)


def test_lists_are_those_that_are_asked_for():
    for example in some("reverse"):
        assert example.answer.split() == example.prompt.split()[:0:-1]
    for example in some("sort"):
        assert example.answer.split() == sorted(example.prompt.split()[1:])
    for example in some("count"):
        first, last = map(int, re.findall(r"\d+", example.prompt))
        assert example.answer == " ".join(map(str, range(first, last + 1)))


def test_conversations_end_with_what_was_changed_or_told():
    for example in some("chat"):
        *earlier, last = example.prompt
        assert [message["role"] for message in example.prompt] == ["user", "assistant"] * (len(earlier) // 2) + ["user"]
        if last["content"].startswith("set "):
            name, _, value = last["content"].removeprefix("set ").partition("=")
            before, after = json.loads(earlier[-1]["content"]), json.loads(example.answer)
            assert said(after[name]) == value and after == before | {name: after[name]} != before
        else:
            (word,) = set(example.answer.rstrip(".").split()[-1:])
            assert sum(word in message["content"] for message in earlier if message["role"] == "user") == 1


def test_questions_are_answered_by_what_is_said():
    for example in some("recall"):
        name = example.prompt.removesuffix("?").split()[-1]
        assert re.findall(r"\d+", example.prompt) == [example.answer]
        assert f"The code of {name} is {example.answer}." in example.prompt
    for example in some("question"):
        facts = example.prompt.rpartition(". ")[0].split(". ")
        assert 4 <= len(facts) <= 7 and len(facts) == len(set(facts))
        words = {word for fact in facts for word in fact.split()}
        assert set(example.answer.rstrip(".").split()) - words <= {"The", "is"}


def test_workings_are_right_line_by_line_and_their_digits_are_the_result():
    for example in held_out("arithmetic", 200):
        *working, last = f"{example.thought or ''}\n{example.answer}".strip().split("\n")
        lines = [line.rsplit(" = ", 1) for line in [*working, last]]
        assert all(eval(left) == int(right) for left, right in lines) and lines[-1][0] == example.prompt
        *digits, top = [int(right) for _, right in lines[:-1]]
        assert int(str(top) + "".join(str(digit % 10) for digit in reversed(digits))) == int(lines[-1][1])
    assert {example.thought is None for example in held_out("arithmetic", 200)} == {True, False}


# --- code

REQUEST = re.compile(
    r"(?P<name>\w+)\(\w+\): (?P<fold>sum|multiply|collect|count|maximum of) "
    r"(?P<form>the squares of the|twice the|the negated|the) \w+s(?: (?P<sign>plus|times) (?P<n>\d+))?"
    r"(?: (?P<kept>above|below|equal to|divisible by|that are odd|that are even)(?: (?P<m>\d+))?)?"
)
VALUES = [[], [2], [3, 4, 7, 60, 12, 0, -8, 31], list(range(-5, 65))]


def meant(request: str, values: list[int]):
    """What the words say, read by other means than the generator's."""
    found = REQUEST.fullmatch(request)
    n, m = int(found["n"] or 0), int(found["m"] or 0)
    tests = {
        "above": lambda v: v > m,
        "below": lambda v: v < m,
        "equal to": lambda v: v == m,
        "divisible by": lambda v: v % m == 0,
        "that are odd": lambda v: v % 2 != 0,
        "that are even": lambda v: v % 2 == 0,
        None: lambda v: True,
    }
    forms = {"the squares of the": lambda v: v**2, "twice the": lambda v: v + v, "the negated": lambda v: 0 - v}
    signs = {"plus": lambda v: v + n, "times": lambda v: v * n, None: lambda v: v}
    form = forms.get(found["form"], signs[found["sign"]])
    kept = [form(value) for value in values if tests[found["kept"]](value)]
    folds = {"sum": sum, "multiply": math.prod, "collect": list, "count": len}
    return folds[found["fold"]](kept) if found["fold"] in folds else max(kept, default=None)


def called(request: str, code: str, values: list[int]):
    ast.parse(code)
    names: dict = {}
    exec(code, names)
    return names[request.partition("(")[0]](values)


def test_functions_do_what_is_described():
    for example in held_out("function", 150):
        request = example.prompt.removeprefix("python ")
        for values in VALUES:
            assert called(request, example.answer, values) == meant(request, values), example


def test_removed_lines_put_back_do_what_is_described():
    for example in held_out("infill", 100):
        request, _, shown = example.prompt.removeprefix("fill ").partition("\n")
        assert shown.count("___") == 1 and 1 <= len(example.answer.split("\n")) <= 3
        for values in VALUES:
            assert called(request, shown.replace("___", example.answer), values) == meant(request, values), example


# --- Sudoku


def test_small_puzzles_have_one_solution_of_288_grids():
    assert len(sudoku.grids()) == len(set(sudoku.grids())) == 288
    for example in some("sudoku") + some("minimal"):
        puzzle = example.prompt.removeprefix("sudoku ").replace(" ", "")
        fitting = [g for g in sudoku.grids() if all(p in (".", d) for p, d in zip(puzzle, g, strict=True))]
        assert fitting == [example.answer.replace("\n", "")] and sudoku.solutions(puzzle) == 1
        if example.task == "sudoku":
            assert 4 <= puzzle.count(".") <= 9
            continue
        for cell in range(16):
            fewer = puzzle[:cell] + "." + puzzle[cell + 1 :]
            assert puzzle[cell] == "." or sudoku.solutions(fewer) > 1, "a given could be left out"
    assert sudoku.solutions("." * 16) == 288 and sudoku.solutions("11" + "." * 14) == 0


def cells(puzzle: str) -> list[int]:
    return [0 if cell == "." else int(cell) for cell in puzzle.replace(" ", "")]


def test_large_puzzles_have_one_solution():
    for example in some("sudoku9"):
        puzzle = cells(example.prompt.removeprefix("sudoku "))
        assert list(sudoku.search(puzzle.copy())) == [cells(example.answer.replace("\n", ""))]
    assert len(list(itertools.islice(sudoku.search([0] * 81), 2))) == 2


def test_large_puzzles_are_of_both_grades():
    made = [cells(sudoku.sudoku9(random.Random(seed)).prompt.removeprefix("sudoku ")) for seed in range(30)]
    assert 2 <= sum(sudoku.technique(puzzle) == sudoku.HARD for puzzle in made) <= 12


EASY = "53..7.... 6..195... .98....6. 8...6...3 4..8.3..1 7...2...6 .6....28. ...419..5 ....8..79"
HARD = "8........ ..36..... .7..9.2.. .5...7... ....457.. ...1...3. ..1....68 ..85...1. .9....4.."  # by Inkala, 2012


def test_techniques_of_known_puzzles():
    assert sudoku.technique(cells(EASY)) == sudoku.EASY
    assert sudoku.technique(cells(HARD)) == sudoku.HARD
    hidden = "." * 9 + " 1........ .......1. " + "." * 9 + " .1....... " + " ".join(["." * 9] * 4)
    assert sudoku._naked({c: sudoku.candidates(cells(hidden), c) for c in range(81) if not cells(hidden)[c]}) is None


# --- stories


def test_entropy_is_the_mean_of_minus_log_probability():
    rng = random.Random(1)
    costs = [-stories.log_probability(stories.sample(rng)) for _ in range(2000)]
    error = statistics.stdev(costs) / math.sqrt(len(costs))
    assert abs(statistics.fmean(costs) - stories.entropy()) < 4 * error < 0.1 * stories.entropy()


def test_probabilities_are_those_of_the_grammar():
    for choices in stories.GRAMMAR.values():
        assert sum(probability for probability, _ in choices) == pytest.approx(1)
    (opening,) = (p for p, text in stories.GRAMMAR["opening"] if text.startswith("There"))
    story = "There was a old fox by the river. It was happy. The end."
    expected = opening * 0.25 * 0.3 * 0.3 * 0.85 * 0.1 * 0.4 * 0.1
    assert stories.log_probability(story) == pytest.approx(math.log(expected))
    for wrong in ("", story[:-1], story + " ", story.replace("old", "blue"), story.replace("It was happy. ", "  ")):
        assert stories.log_probability(wrong) == -math.inf


# --- what is held out

# of the first four of a task: scores are of them; a change here is a change of what is scored
GOLDEN = {
    "json": "42225f8cd3cc",
    "extract": "837617c79e74",
    "edit": "9de18cd401b2",
    "function": "9b4cbd7a4c38",
    "sudoku": "4152c30232dc",
    "arithmetic": "c52367803312",
    "reverse": "9c98cb03b386",
    "sort": "704ccd93fb45",
    "count": "2b527879dad6",
    "composed": "65555398c84d",
    "question": "8365cf646746",
    "infill": "14485977d263",
    "recall": "3c5de917b10b",
    "table": "01a4dc0d56e1",
    "story": "755c0041d870",
    "chat": "1f39e1bb846d",
    "minimal": "294b7590ac67",
    "sudoku9": "4b69e0ccf50c",
}


def test_what_is_held_out_stays_what_it_is():
    assert {task: fingerprint(task) for task in TASKS} == GOLDEN


def fingerprint(task: str) -> str:
    found = [[e.prompt, e.answer, e.thought, e.checker] for split in HELD_OUT for e in held_out(task, 4, split)]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:12]


def test_prompts_are_distinct_and_more_begin_with_the_same():
    for task in QUICK:
        examples = some(task)
        by = "answer" if TASKS[task].may_repeat else "prompt"
        assert len({str(getattr(example, by)) for example in examples}) == len(examples) == 40
        assert held_out(task, 10) == examples[:10] and not set(some(task, "validation")[0].keys) & set(examples[0].keys)


def found_in(example: Example) -> list[str]:
    """Contents, read from what is said and not from `keys`."""
    texts = [message["content"] for message in example.messages] + [example.answer]
    keys = [object_key(json.loads(text)) for said in texts for text in re.findall(r"\{[^{}]*\}", said)]
    if example.task == "chat" and not keys:
        keys.append("introduction " + " ".join(sorted(texts[:-2:2])))
    if example.task in ("sudoku", "minimal", "sudoku9"):
        keys.append("grid " + example.answer.replace("\n", ""))
    if example.task in ("count", "arithmetic"):
        keys.append(example.prompt)
    if example.task in ("function", "composed", "infill"):
        code = example.answer if example.task != "infill" else example.prompt.replace("___", example.answer)
        keys.append("function " + code[code.index("def ") :].partition("\n")[2])
    return keys


def leaks(count: int = 3000) -> dict[str, int]:
    """Training examples that show what is held out, by task."""
    answers = {e.keys[0] for task in QUICK if task != "story" for split in HELD_OUT for e in some(task, split)}
    found: dict[str, int] = {}
    for example in itertools.islice(training_stream(3, dict.fromkeys(FOR_TRAINING, 1.0)), count):
        if example.task == "story":
            continue
        shown = [example.keys[0], *found_in(example)]
        if not set(shown).isdisjoint(answers) or any(split_of(key) != "train" for key in shown):
            found[example.task] = found.get(example.task, 0) + 1
    return found


def test_nothing_that_is_held_out_is_trained_on():
    assert leaks() == {}


def test_what_is_not_held_out_would_be_seen(monkeypatch):
    for task in QUICK:
        some(task), some(task, "validation")
    monkeypatch.setattr(Example, "split", property(lambda example: split_of(example.keys[0])))
    assert leaks().keys() == {"edit", "chat", "table"}, "the contents of prompts"
    monkeypatch.setattr(Example, "split", "train")
    assert leaks().keys() == set(FOR_TRAINING) - {"story"}


def test_a_composed_function_is_held_out_whatever_its_names():
    collections = {"values": "value", "items": "item", "numbers": "number", "scores": "score", "prices": "price"}
    seen = set()
    for example in some("composed"):
        body = example.answer.partition("\n")[2]
        (named,) = re.findall(r"for (\w+) in (\w+):", body)
        for collection, item in collections.items():
            renamed = re.sub(rf"\b{named[0]}\b", item, re.sub(rf"\b{named[1]}\b", collection, body))
            seen.add((renamed == body, split_of(f"function {renamed}")))
    assert seen == {(True, "test"), (False, "test"), (False, "validation")}


def test_streams_are_fixed_by_their_seeds_and_have_what_is_asked_for():
    shares = {"json": 1.0, "count": 3.0}
    first, again, other = (list(itertools.islice(training_stream(seed, shares), 400)) for seed in (0, 0, 1))
    assert first == again != other
    assert 250 < sum(example.task == "count" for example in first) < 350
    assert {example.task for example in first} == set(shares)
    assert held_out.__wrapped__("json", 20) == held_out("json", 20)


def test_rungs_add_tasks():
    assert [len(tasks_to(rung)) for rung in RUNGS] == [10, 15, 17, 18] and tasks_to(RUNGS[-1]) == list(TASKS)


def test_some_answers_take_more_than_two_canvases():
    tokenizer = Tokenizer.from_file(str(EMBEDDED / "tokenizer.json"))
    for task in ("count", "table"):
        lengths = [len(tokenizer.encode(example.answer, add_special_tokens=False).ids) for example in some(task)]
        assert max(lengths) > 2 * CANVAS and min(lengths) < CANVAS, task
