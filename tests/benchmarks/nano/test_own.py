"""Fine-tuning on one's own data: a run of a few steps teaches it, and lines that cannot be learnt are named."""

import json

import pytest

from benchmarks.nano import train
from mlx_dgemma.errors import InputError
from tests.benchmarks.nano.fixtures import tensors

pytestmark = [pytest.mark.reference, pytest.mark.usefixtures("not_compiled")]


OWN = [
    {"prompt": "say the word", "answer": "apple pie"},
    {"prompt": [{"role": "user", "content": "and the number"}], "answer": "4 7 1 1"},
    {"prompt": "think first", "answer": "done", "thought": "one two"},
]


@pytest.fixture(scope="module")
def tuned(begun, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    own = folder / "own.jsonl"
    own.write_text("".join(json.dumps(line) + "\n" for line in OWN))
    command = ["--init", str(begun), "--data", str(own), "--freeze", "router", "experts", "--batch", "4"]
    train.main([*command, "--steps", "25", "--decay", "5", "--out", str(folder / "tuned")])
    return folder / "tuned"


def test_fine_tuning_teaches_ones_own_data_and_keeps_what_is_frozen(begun, tuned):

    before, after = tensors(begun), tensors(tuned)
    changed = {name for name in before if not before[name].equal(after[name])}
    assert changed and not any("router" in name or "experts" in name or "vision" in name for name in changed)
    assert any("layer_scalar" in name for name in changed) and any("q_proj" in name for name in changed)


def test_what_was_fine_tuned_answers_here(tuned):
    """The checkpoint loads as it is, and greedy ar mode says what it was taught."""
    from mlx_dgemma import generate, load

    model, tokenizer = load(str(tuned))
    assert generate(model, tokenizer, OWN[0]["prompt"], mode="ar", temperature=0.0) == OWN[0]["answer"]


def test_a_fine_tuning_does_not_go_on_with_other_data(begun, tuned, tmp_path, ended):
    own = tmp_path / "own.jsonl"
    own.write_text('{"prompt": "a", "answer": "b"}\n')
    command = ["--init", str(begun), "--data", str(own), "--freeze", "router", "experts", "--batch", "4"]
    status, err = ended([*command, "--steps", "25", "--decay", "5", "--out", str(tuned)])
    assert status == 2 and "was begun with other --data;" in err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "c"}', '"answer" must be'),
        ('{"prompt": "c", "answer": "\\ud800"}', "surrogates"),
        ('{"prompt": "\\ud800", "answer": "d"}', "not text"),
        ('{"prompt": "c", "answer": "d", "enable_thinking": true}', 'no "thought"'),
        ('{"prompt": "c", "answer": "d", "thought": "e", "enable_thinking": false}', 'a "thought"'),
        ('{"messages": [{"role": "user"}], "answer": "d"}', "'role' and 'content'"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}], "answer": "d"}', "holds image"),
    ],
)
def test_a_line_that_cannot_be_learnt_is_named(loaded, tmp_path, line, said):
    from mlx_lm.tokenizer_utils import TokenizerWrapper

    from benchmarks.nano.own import encoded, read

    path = tmp_path / "own.jsonl"
    path.write_text('{"prompt": "a", "answer": "b"}\n' + line + "\n")
    with pytest.raises(InputError, match=f"{path}, line 2: .*{said}"):
        encoded(read(path), TokenizerWrapper(loaded[1]), 6)
