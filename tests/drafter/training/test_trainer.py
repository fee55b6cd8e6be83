"""Gradients, learning, and what a checkpoint has to hold."""

import dataclasses

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_dgemma.config import GenerationConfig
from mlx_dgemma.drafter.geometry import BlockConfig
from mlx_dgemma.drafter.training import answers, result
from mlx_dgemma.drafter.training.anchors import observe
from mlx_dgemma.drafter.training.estimate import FLOAT, block_bytes, parameters
from mlx_dgemma.drafter.training.heldout import measure
from mlx_dgemma.drafter.training.options import Options
from mlx_dgemma.drafter.training.pipeline import _network
from mlx_dgemma.drafter.training.trainer import Trainer, learning_rate
from mlx_dgemma.errors import InputError
from mlx_dgemma.generate import stream_generate
from tests.convert.fixtures import WIDE
from tests.drafter.training.small import DSPARK, SIZES, VOCAB, random_network, random_text, small_config
from tests.helpers import random_model, with_text

PROMPTS = [random_text(4 + number % 3, number) for number in range(12)]


def trainer(model, network, path, texts=None, trained=None, held=(), **options):
    options = Options(**{"batch": 2, "steps": 4, "anchors": 6, "lr": 3e-3} | options)
    texts = texts or [random_text(14 + number, 100 + number) for number in range(len(PROMPTS))]
    trained = list(range(len(PROMPTS))) if trained is None else trained
    return Trainer(model, network, PROMPTS, texts, trained, held, options, path / "state.safetensors")


def flat(tree):
    return dict(tree_flatten(tree))


@pytest.mark.parametrize("family", [{}, DSPARK], ids=["dflash", "dspark"])
def test_gradients_reach_every_parameter_and_not_the_main_model(family, tiny, tmp_path):
    network = random_network(small_config(**family))
    before = {path: np.array(array) for path, array in flat(tiny.parameters()).items()}
    one = trainer(tiny, network, tmp_path)
    gradients, loss, accepted = one.gradients(0)
    assert {path for path, g in flat(gradients).items() if mx.abs(g).max().item() > 0} == set(
        flat(network.parameters())
    )
    assert loss > 0 and 0 <= accepted <= network.config.drafts
    one.step(0)
    assert all(np.array_equal(array, before[path]) for path, array in flat(tiny.parameters()).items())


@pytest.mark.parametrize("kind", ["floats", "quantised"])
def test_gradients_are_those_of_the_loss(kind, tiny, tmp_path):
    """Against finite differences, along a random direction of all parameters: those by way of the context, too."""
    model = tiny
    if kind == "quantised":
        model = random_model(WIDE | {"text_config": WIDE["text_config"] | {"vocab_size": 131}})
        nn.quantize(model, group_size=32, bits=8)
    # without the confidence head, whose target is a constant to the gradient and not to the loss
    config = BlockConfig.for_model(model.config, **SIZES | DSPARK | {"confidence": None})
    network = random_network(config)
    one = trainer(model, network, tmp_path, batch=1)
    gradients = flat(one.gradients(0)[0])
    weights = flat(network.parameters())
    for part in ("fc.", "layers.0.self_attn.k_proj", "layers.1.self_attn.v_proj", "markov_head", "hidden_norm"):
        mx.random.seed(4)
        way = {path: mx.random.normal(g.shape) for path, g in gradients.items() if path.startswith(part)}
        step = 1e-2 / sum((w**2).sum().item() for w in way.values()) ** 0.5

        def moved(sign, way=way, step=step):
            network.load_weights(
                [(path, w + sign * step * way[path]) for path, w in weights.items() if path in way], False
            )
            return one.gradients(0)[1]

        expected = sum((gradients[path] * w).sum().item() for path, w in way.items())
        found = (moved(1) - moved(-1)) / (2 * step)
        network.load_weights(list(weights.items()))
        assert found == pytest.approx(expected, rel=0.05, abs=2e-3), part


def test_micro_batches_do_not_change_the_gradient(tiny, tmp_path):
    network = random_network(small_config(**DSPARK))
    whole = flat(trainer(tiny, network, tmp_path).gradients(0)[0])
    for blocks in (1, 4):
        budget = blocks * block_bytes(network.config, 24, 20) / 1e9
        parts = flat(trainer(tiny, network, tmp_path, micro_batch_gb=budget).gradients(0)[0])
        for path, gradient in whole.items():
            assert mx.abs(gradient - parts[path]).max().item() <= 1e-5 * max(1, mx.abs(gradient).max().item()), path


@pytest.mark.parametrize("family", [{}, DSPARK], ids=["dflash", "dspark"])
def test_blocks_need_what_is_estimated(family, tmp_path):
    """Counted on MLX's CPU, where logits outweigh the rest."""
    model = random_model(with_text(vocab_size=16_384))
    config = BlockConfig.for_model(model.config, **SIZES | {"positions": 16} | family)
    one = trainer(model, random_network(config), tmp_path, batch=1, micro_batch_gb=64)
    text = observe(model, PROMPTS[0], random_text(20), config.taps)
    anchors = text.places[:6]
    mx.clear_cache()
    before = mx.get_active_memory() + 2 * FLOAT * parameters(config)  # gradients of a micro-batch, and their sum
    mx.reset_peak_memory()
    one._of_text(text, anchors, 1.0)
    estimated = len(anchors) * block_bytes(config, len(text.ids), len(anchors))
    assert 0.7 * estimated < mx.get_peak_memory() - before < 1.1 * estimated


def test_it_learns(tmp_path):
    """A model that counts: the next token is the last one plus one."""
    model = random_model(seed=3)
    counting = [[10 + (number + i) % 100 for i in range(20)] for number in range(12)]
    network = random_network(small_config(), 2)
    one = trainer(model, network, tmp_path, texts=counting, trained=range(9), held=[9, 10, 11], steps=60, lr=1e-2)
    losses = [one.step(number)[0] for number in range(60)]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    texts = [observe(model, PROMPTS[n], counting[n], network.config.taps) for n in (9, 10, 11)]
    after = measure(network, model, texts, 1e9)
    before = measure(random_network(small_config(), 2), model, texts, 1e9)
    assert after.lengths[-1] > before.lengths[-1] + 0.5
    assert after.most[0] == 1 and after.places == 3 * 20 and list(after.lengths) == sorted(after.lengths)


def test_a_checkpoint_holds_all_that_matters(tiny, tmp_path):
    def fresh(name):
        (tmp_path / name).mkdir(exist_ok=True)
        return trainer(tiny, random_network(small_config(**DSPARK)), tmp_path / name, held=[11], trained=range(11))

    whole, halved = fresh("whole"), fresh("halved")
    whole.run(save_every=100)
    for _ in range(2):
        halved.progress.add(*halved.step(halved.progress.step))
        halved.progress.step += 1
    halved.save()
    resumed = fresh("halved")
    resumed.run(save_every=1)
    for path, array in flat(whole.network.parameters()).items():
        assert mx.array_equal(array, flat(resumed.network.parameters())[path]), path
    assert resumed.progress.step == whole.progress.step == 4
    assert [entry["step"] for entry in whole.progress.history] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_training_that_diverges_leaves_the_checkpoint(what, tiny, tmp_path, monkeypatch):
    one = trainer(tiny, random_network(small_config()), tmp_path)
    one.step(0)
    one.progress.step = 1
    one.save()
    before = one._state.read_bytes()
    right = one.gradients

    def wrong(number):
        gradients, loss, accepted = right(number)
        if what == "loss":
            return gradients, float("nan"), accepted
        return tree_map(lambda array: array * float("inf"), gradients), loss, accepted

    monkeypatch.setattr(one, "gradients", wrong)
    with pytest.raises(InputError, match=f"step 2: the {what} is not finite; lower --lr"):
        one.run(save_every=1)
    assert one._state.read_bytes() == before
    assert all(mx.isfinite(array).all().item() for array in flat(one.network.parameters()).values())


def test_weights_that_are_no_numbers_are_not_written(tiny, tmp_path):
    network = random_network(small_config())
    one = trainer(tiny, network, tmp_path)
    network.norm.weight = network.norm.weight * 1e6
    for dtype, scale in (("float16", 1.0), ("float32", float("nan"))):
        network.norm.weight = network.norm.weight * scale
        with pytest.raises(InputError, match=f"norm.weight is not finite in {dtype}; lower --lr"):
            result.write(tmp_path, one, Options(dtype=dtype), None, {})
        assert not list(tmp_path.iterdir())
    with pytest.raises(InputError, match="step 0: the drafter's logits are not finite"):
        trainer(tiny, network, tmp_path, held=[0]).run(save_every=1)
    assert not list(tmp_path.iterdir())


def test_sizes_that_no_array_has(tiny):
    config = dataclasses.replace(small_config(), intermediate_size=99999999999)
    with pytest.raises(InputError, match="a drafter of these sizes has no arrays in MLX"):
        _network(tiny, config, None, Options())


def test_every_answer_once_an_epoch_and_anchors_at_random(tiny, tmp_path):
    one = trainer(tiny, random_network(small_config()), tmp_path, batch=5)
    drawn = [number for step in range(12) for number in one._chosen(step)]
    assert all(sorted(drawn[first : first + 12]) == list(range(12)) for first in range(0, 60, 12))
    assert drawn[:12] != drawn[12:24]
    first, again, other = (one._anchors(step, 0, 7).tolist() for step in (0, 0, 1))
    assert first == again != other and first == sorted(set(first)) and len(first) == 6
    assert min(first) >= len(PROMPTS[7]) - 1 and max(first) < len(PROMPTS[7]) + 21 - 1


def test_an_answer_without_a_place_for_a_block(tiny, tmp_path):
    network = random_network(small_config())
    texts = [[7], [7], [7, 8, 9]]
    one = Trainer(tiny, network, [[2], [2], [2]], texts, [0, 2], [1], Options(batch=3, steps=1), tmp_path / "state")
    assert one._chosen(0) == [2, 2, 2] and one.measure() is None and one.step(0)[0] > 0
    with pytest.raises(InputError, match="no answer is long enough"):
        Trainer(tiny, network, [[2], [2]], texts, [0], [1], Options(), tmp_path / "state")


def test_learning_rate():
    options = Options(lr=1.0, warmup=0.1)
    rates = [learning_rate(step, 100, options) for step in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[10] == 1
    assert rates[10:] == sorted(rates[10:], reverse=True) and rates[-1] < 0.02


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_answers_side_by_side_are_those_of_ar_mode(temperature, nano, tmp_path):
    model, tokenizer = nano
    texts = ["reverse river stone", "json age=31 city=Oslo", "47 - 23", "12 + 30", "3 + 4", "reverse apple cloud tiger"]
    prompts = [
        tokenizer.apply_chat_template([{"role": "user", "content": t}], add_generation_prompt=True) for t in texts
    ]
    old, model.generation_config = model.generation_config, model.generation_config.replace(temperature=temperature)
    try:
        made = answers.write(model, prompts, Options(max_tokens=24, at_once=3, seed=5), tmp_path / "answers.jsonl")
        for number, ids in enumerate(prompts):
            one = stream_generate(model, tokenizer, ids, mode="ar", seed=5 + number, max_tokens=24)
            assert made[number] == [token for response in one for token in response.tokens]
    finally:
        model.generation_config = old
    assert max(map(len, answers.groups(prompts, 3))) > 1


def test_a_torn_line_counts_for_nothing(tiny, tmp_path):
    tiny.generation_config = GenerationConfig(eos_token_ids=(1, 5))
    options, path = Options(max_tokens=6, at_once=4), tmp_path / "answers.jsonl"
    whole = answers.write(tiny, PROMPTS, options, path)
    data = path.read_bytes()
    for cut in (len(data) // 3, len(data) // 2, len(data) - 1, 0):
        path.write_bytes(data[:cut])
        assert answers.write(tiny, PROMPTS, options, path) == whole
        assert path.read_bytes() == data
    assert all(0 <= token < VOCAB for ids in whole for token in ids)
