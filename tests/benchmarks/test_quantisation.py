"""What a recipe costs: divergence by hand and of models with themselves, a whole row, and mistakes in one line."""

import json
import weakref
from dataclasses import asdict

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_map

from benchmarks import quantisation
from benchmarks.engine import Answered
from benchmarks.engines import Ours
from benchmarks.nano.tasks import held_out
from benchmarks.quantisation import KINDS, NOISE, divergences, texts
from benchmarks.records import Record, Run
from mlx_dgemma import convert
from mlx_dgemma.model import DiffusionGemma


@pytest.fixture(scope="module")
def one(nano):
    """One text a task."""
    return texts(*nano, 1, 0)


def damaged(model, by):
    other = DiffusionGemma(model.config)
    other.update(tree_map(lambda w: w * (1 + by * mx.random.normal(w.shape, key=mx.random.key(0))), model.parameters()))
    return other


def test_divergence_by_hand():
    p, q = (mx.log(mx.array([row])) for row in ([0.5, 0.5], [0.25, 0.75]))
    halves, same = 0.5 * np.log(2) + 0.5 * np.log(2 / 3), mx.concatenate([p, p])
    measured = divergences([(p,) * 4, (same,) * 4], [(q,) * 4, (same,) * 4])
    assert measured.keys() == set(KINDS)
    assert list(measured.values()) == pytest.approx([halves / 3] * 4, rel=1e-5)  # of three positions


def test_a_model_does_not_diverge_from_itself_and_more_from_a_more_damaged_one(nano, one):
    original, again, little, much = (
        [text.logs(model) for text in one[:1]]
        for model in (nano[0], nano[0], damaged(nano[0], 0.01), damaged(nano[0], 0.1))
    )
    assert divergences(original, again) == dict.fromkeys(KINDS, 0.0)
    first, second = divergences(original, little), divergences(original, much)
    assert all(0 < first[kind] < second[kind] for kind in KINDS)


def test_what_is_divergent_is_what_the_modes_compute(nano, one):
    model, text = nano[0], one[0]
    causal, *noised = text.logs(model)
    assert [len(part) for part in (causal, *noised)] == [len(text.prompt + text.answer), *[len(text.answer)] * 3]
    z = model.logits(model.encode(mx.array([text.prompt + text.answer]), model.make_cache()))[0]
    assert mx.allclose(mx.softmax(z, axis=-1), mx.exp(causal), atol=1e-4)
    assert mx.argmax(causal[len(text.prompt) - 1 : -1], axis=-1).tolist() == text.answer
    assert mx.argmax(noised[0], axis=-1).tolist() == text.answer


def test_canvases_are_noised_as_much_as_said_and_alike_for_one_seed(nano, one):
    length, pad = nano[0].config.canvas_length, nano[0].generation_config.pad_token_id
    for text in one:
        clean = text.answer + [pad] * (length - len(text.answer))
        changed = (text.canvases != clean).mean(axis=1)
        assert changed == pytest.approx(NOISE, abs=0.02)  # a uniform id may be the one that stood there
    again, other = (texts(*nano, 1, seed) for seed in (0, 1))
    assert all((a.canvases == b.canvases).all() for a, b in zip(one, again, strict=True))
    assert any((a.canvases != b.canvases).any() for a, b in zip(one, other, strict=True))


def test_the_command_writes_a_row_of_each_recipe(tmp_path, capsys, monkeypatch):
    engines = []

    class Watched(Ours):
        def __init__(self, setup):
            assert not any(engine() for engine in engines), "there are weights twice"
            super().__init__(setup)
            engines.append(weakref.ref(self))

    monkeypatch.setattr(quantisation, "Ours", Watched)
    monkeypatch.setattr(quantisation, "TASKS", ("reverse",))
    quantisation.main(["--recipe", "default", "--count", "1", "--json", str(tmp_path / "q.json")])
    result, printed = json.loads((tmp_path / "q.json").read_text()), capsys.readouterr().out.splitlines()
    original, default = result["rows"].values()
    assert list(result["rows"]) == ["original", "default"] and result["prompts a task"] == 1
    assert set(original["kl"].values()) == {0.0} and 0 < default["kl"]["causal"] < 0.1
    assert 4 < default["bits"] < original["bits"] == 16
    assert default["ar"]["exact"] == 100 and default["ar"]["tasks"] == {"reverse": 100}
    assert original["records"]["ar"][0]["text"] == held_out("reverse", 1)[0].answer
    assert len(engines) == 4, "original and recipe, in both modes"
    points = default["ar"]["difference"]
    assert points["value"] == 0 and points["low"] == pytest.approx(-points["high"]) and 50 < points["high"] < 100
    assert default["steps"] == default["records"]["diffusion"][0]["denoise_forwards"] > 0
    assert printed[-6].startswith(f"| default | {default['bits']:.2f} | {default['kl']['causal']:.2g} |")
    assert printed[-1] == "| default | 100.0 / 100.0 |"


def run(rights):
    """Answers to as many prompts, right where there is a 1."""
    answered = Answered(text="", tokens=1, canvases=1, denoise_forwards=1, encode_forwards=1, finish_reason="stop")
    records = [
        Record(**asdict(answered), task="t", prompt=number, seed=0, right=letter == "1")
        for number, letter in enumerate(rights)
    ]
    return Run("run", {}, records)


def test_a_difference_is_in_points_and_paired():
    ours, theirs = (run(rights) for rights in ("1100" * 25, "1000" * 25))
    points = quantisation.difference(ours, theirs)
    assert points.value == pytest.approx(25) and 15 < points.low < 25 < points.high < 36
    assert quantisation.shown(points).startswith("+25.0 [+1")


BAD = {
    "no prompts": (["--count", "0"], 2, "--count must lie in 1-200, not 0"),
    "too many prompts": (["--count", "201"], 2, "--count must lie in 1-200, not 201"),
    "an unknown recipe": (["--recipe", "3bit"], 2, "3bit: no such recipe (default, "),
    "no such place": (["--json", "/no/such/folder/q.json"], 2, "/no/such/folder"),
    "an unknown model": (["--model", "/no/such"], 1, "/no/such"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(name, capsys):
    argv, status, said = BAD[name]
    with pytest.raises(SystemExit) as end:
        quantisation.main(argv)
    error = capsys.readouterr().err
    assert end.value.code == status and len(error.splitlines()) == 1 and said in error


def test_what_is_quantised_already_has_no_original(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quantisation, "Comparison", None)  # nothing is answered for that
    folder = convert("nano", tmp_path / "q4", quantize=True, progress=False)
    with pytest.raises(SystemExit) as end:
        quantisation.main(["--model", str(folder)])
    assert end.value.code == 1 and "q4: is quantised; name the floats" in capsys.readouterr().err
