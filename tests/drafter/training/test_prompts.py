"""A prompts file: its forms, what is wrong with a line, and which prompts are held out."""

import json
from pathlib import Path

import pytest

from mlx_dgemma.drafter.training import prompts
from mlx_dgemma.errors import InputError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "reverse river stone"}]


def written(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
    return path


def test_every_form_of_a_prompt(tmp_path, nano):
    path = written(
        tmp_path, "3 + 4", b"", {"prompt": "3 + 4", "answer": "7"}, {"messages": MESSAGES}, {"prompt": MESSAGES}, b""
    )
    lines = prompts.read(path)
    assert [line.prompt for line in lines] == ["3 + 4", "3 + 4", MESSAGES, MESSAGES]
    assert [line.where.rpartition(" ")[2] for line in lines] == ["1", "3", "4", "5"]
    encoded = prompts.encode(lines, nano[1])
    assert encoded[0] == encoded[1] != encoded[2] == encoded[3]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"prompt": "a"', "not JSON"),
        (b'"\xff"', "not UTF-8"),
        (b"3", "not a prompt"),
        (b"[]", "not a prompt"),
        (b'""', "not a prompt"),
        (b'{"prompt": "  "}', "not a prompt"),
        (b'{"prompt": 3}', "not a prompt"),
        (b'{"messages": []}', "not a prompt"),
        (b'{"messages": [3]}', "not a prompt"),
        (b'{"text": "a"}', 'either "prompt" or "messages"'),
        (b'{"prompt": "a", "messages": []}', 'either "prompt" or "messages"'),
        (b"[" * 100_000, "not JSON"),
        (
            b'{"messages": [{"role": "user", "content": "a"}, {"role": "robot", "content": "b"}]}',
            "message 1: role must",
        ),
        (b'{"messages": [{"role": ["user"], "content": "a"}]}', "message 0: role must be one of system, user"),
        (b'{"messages": [{"role": null, "content": "a"}]}', "message 0: role must"),
    ],
)
def test_a_broken_line_is_named(line, reason, tmp_path):
    path = written(tmp_path, "fine", "fine", line, "fine")
    with pytest.raises(InputError, match=reason) as error:
        prompts.read(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and "\n" not in str(error.value)


def test_a_prompt_that_cannot_be_encoded_is_named(tmp_path, nano):
    path = written(tmp_path, "fine", {"messages": [{"role": "user"}]})
    with pytest.raises(InputError, match="line 2: message 0 must have"):
        prompts.encode(prompts.read(path), nano[1])
    path = written(tmp_path, b'"\\ud800"')
    with pytest.raises(InputError, match="line 1: the prompt is not text"):
        prompts.encode(prompts.read(path), nano[1])


def test_roles(tmp_path):
    messages = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user", "model", "user")]
    assert prompts.read(written(tmp_path, {"messages": messages}))[0].prompt == messages


def test_a_byte_order_mark(tmp_path):
    path = written(tmp_path, b'\xef\xbb\xbf"first"', b"\xef\xbb\xbf3")
    with pytest.raises(InputError, match="line 2: not JSON"):
        prompts.read(path)
    path = written(tmp_path, b'\xef\xbb\xbf{"prompt": "first"}', "second")
    assert [line.prompt for line in prompts.read(path)] == ["first", "second"]


@pytest.mark.parametrize("data", [b"", b"\n \n", b"\xef\xbb\xbf"])
def test_an_empty_file(data, tmp_path):
    with pytest.raises(InputError, match="holds no prompt"):
        prompts.read(written(tmp_path, data))


def test_a_file_that_is_not_there(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            prompts.read(path)


def test_what_is_held_out_follows_from_the_content(tmp_path):
    lines = prompts.read(written(tmp_path, *[f"prompt {number}" for number in range(400)]))
    trained, held = prompts.split(lines, 0.1)
    assert sorted(trained + held) == list(range(400)) and 20 < len(held) < 60
    other = prompts.read(written(tmp_path, *[f"prompt {number}" for number in reversed(range(400))], "prompt 7"))
    kept = {other[number].prompt for number in prompts.split(other, 0.1)[1]}
    assert kept == {lines[number].prompt for number in held}
    assert prompts.split(lines, 0) == (list(range(400)), [])


def test_few_prompts(tmp_path):
    two = prompts.read(written(tmp_path, "a", "b"))
    assert [len(numbers) for numbers in prompts.split(two, 0.001)] == [1, 1]
    one = prompts.read(written(tmp_path, "a"))
    assert prompts.split(one, 0.001) == ([0], [])
    with pytest.raises(InputError, match="all 1 prompts are held out"):
        prompts.split(one, 0.9999999)


def test_a_prompt_is_the_lone_turn_that_it_is():
    """Or the same prompt, written otherwise, would be trained on and held out."""
    lines = [b'{"prompt": "hi"}', b'"hi"', b'{"messages": [{"role": "user", "content": "hi"}]}']
    others = [
        b'{"messages": [{"role": "system", "content": "hi"}]}',
        b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]}',
    ]
    keys = [prompts.parse(line, Path("p"))[0].key for line in (*lines, *others)]
    assert len(set(keys[:3])) == 1 and len(set(keys)) == 3
