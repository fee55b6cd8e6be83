"""What the models are asked: fixed, short, answered by any instruction model; and nano's own kinds of requests."""

EDIT = 'set age=44 in {"name": "Bob", "age": 31, "city": "Oslo", "job": "baker", "active": true}'

# label -> text; an edit first, where drafts are good, and prose last, where they are not
GENERAL = {
    "edit": "Repeat this JSON with the age set to 44, and write nothing else: "
    '{"name": "Bob", "age": 31, "city": "Oslo", "job": "baker", "active": true}',
    "code": "Write a Python function that returns the n-th Fibonacci number, with a docstring. Code only.",
    "list": "List the first ten prime numbers and the square of each, one pair a line.",
    "prose": "Why is the sky blue? Answer in one paragraph.",
}
NANO = {
    "edit": EDIT,
    "json": "json name=Ann age=31 city=Oslo",
    "code": "python total(values): sum the values above 7",
    "sudoku": "sudoku .42. .1.. 43.. 1.3.",
}
