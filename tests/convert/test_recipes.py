"""Recipes, the plans they make, and the block that mlx_lm, mlx-vlm and our own loader read."""

import json
import re

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten

from mlx_dgemma.convert.command import RECIPE_NAMES
from mlx_dgemma.convert.recipes import DEFAULTS, RECIPES, Scheme, get_recipe, modules, plan, uniform
from mlx_dgemma.convert.sources import text_shapes
from mlx_dgemma.errors import InputError, UsageError
from mlx_dgemma.loading import load_model
from tests.convert.fixtures import VISION, WIDE, named, quantised
from tests.convert.test_names import CONFIG
from tests.helpers import random_model, with_text, write_checkpoint

REAL = text_shapes(CONFIG)
SHAPES = {name: array.shape for name, array in named(random_model(WIDE)).items()}
PROMPT = mx.array([[3, 1, 4, 1, 5, 9, 2, 6, 5, 3]])
Q = uniform()  # what -q alone means
LAYER = "model.decoder.layers.1"


def schemes(name: str, tensors=REAL) -> dict:
    return plan(get_recipe(name), modules(tensors)).schemes


def test_modules_are_what_mlx_can_quantise():
    model = random_model(WIDE)
    leaves = tree_flatten(model.leaf_modules(), is_leaf=nn.Module.is_module)
    expected = {path: module.weight.shape for path, module in leaves if hasattr(module, "to_quantized")}
    assert modules(SHAPES | VISION) == expected
    assert len(modules(REAL)) == 30 * 2 + 25 * 4 + 5 * 3 + 30 * 3 + 30 + 3 + 1


@pytest.mark.parametrize(
    ("module", "default", "community", "plain"),
    [
        (f"{LAYER}.experts.gate_up_proj", (4, 64), (4, 64), (4, 64)),
        (f"{LAYER}.experts.down_proj", (4, 64), (4, 64), (4, 64)),
        (f"{LAYER}.self_attn.q_proj", (8, 64), (8, 64), (4, 64)),
        (f"{LAYER}.self_attn.o_proj", (8, 64), (8, 64), (4, 64)),
        (f"{LAYER}.mlp.down_proj", (8, 64), (8, 64), (4, 64)),
        (f"{LAYER}.router.proj", None, (8, 64), (8, 64)),
        ("model.decoder.embed_tokens", None, (8, 64), (4, 64)),
        ("model.decoder.self_conditioning.up_proj", None, (4, 64), (4, 64)),
    ],
)
def test_what_becomes_of_each_kind_of_module(module, default, community, plain):
    for name, expected in (("default", default), ("mlx-community-4bit", community)):
        assert schemes(name)[module] == (expected and Scheme(*expected)), name
    assert plan(Q, modules(REAL)).schemes[module] == Scheme(*plain)
    assert schemes("8bit")[module] == Scheme(8, 64)
    assert schemes("bf16")[module] is None
    for mode, (bits, group_size) in DEFAULTS.items():
        own = Scheme(bits, group_size, mode)
        alike = plan(uniform(mode=mode), modules(REAL)).schemes[module]
        assert alike == (Scheme(8, 64) if "router" in module else own)
        if mode in RECIPES:
            assert schemes(mode)[module] == (own if "experts" in module else default and Scheme(*default))


def test_mlx_communitys_recipe_is_mlx_vlms_predicate():
    """As `mlx_vlm.convert -q` has it in mlx_vlm/models/diffusion_gemma/diffusion_gemma.py."""
    ends = ("embed_tokens", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    for path, scheme in schemes("mlx-community-4bit").items():
        is_eight = path.endswith(ends) or ".self_attn." in path or "router" in path
        assert scheme == Scheme(8 if is_eight else 4, 64)


def test_sizes_of_the_26b():
    """performance.md: about 17 GB by default, mlx-community's about 16.5 GB with the vision tower of 1.1 GB."""
    default, community = (plan(RECIPES[name], modules(REAL)) for name in ("default", "mlx-community-4bit"))
    assert default.nbytes(REAL) == pytest.approx(16.0e9, rel=0.03)
    assert community.nbytes(REAL) == pytest.approx(15.1e9, rel=0.03)
    assert plan(RECIPES["bf16"], modules(REAL)).bits_per_weight(REAL) == 16
    assert default.block()["bits"] == community.block()["bits"] == 4


@pytest.mark.parametrize("name", [*RECIPES, "uniform"])
def test_the_block_loads_and_sizes_are_what_mlx_lm_counts(tmp_path, name):
    from mlx_lm.utils import compute_bits_per_weight

    chosen = plan(Q if name == "uniform" else RECIPES[name], modules(SHAPES))
    model = random_model(WIDE)
    tensors = quantised(model, chosen)
    assert chosen.bits_per_weight(SHAPES, itemsize=4) == pytest.approx(compute_bits_per_weight(model), rel=1e-3)
    assert chosen.nbytes(SHAPES, itemsize=4) == sum(array.nbytes for array in tensors.values())
    folder = write_checkpoint(tmp_path, WIDE, model)
    block = chosen.block()
    extra = {} if block is None else {"quantization": block, "quantization_config": block}
    (folder / "config.json").write_text(json.dumps(dict(sorted((WIDE | extra).items()))))
    loaded = load_model(folder)
    for path, module in tree_flatten(loaded.leaf_modules(), is_leaf=nn.Module.is_module):
        scheme = chosen.schemes.get(path)
        found = Scheme(module.bits, module.group_size, module.mode) if "scales" in module else None
        assert found == scheme, path
    assert mx.allclose(loaded.encode(PROMPT, loaded.make_cache()), model.encode(PROMPT, model.make_cache()), atol=1e-3)


@pytest.mark.parametrize("recipe", [uniform(), uniform(bits=6, group_size=32), uniform(mode="mxfp8"), RECIPES["8bit"]])
def test_the_block_is_the_one_that_mlx_lm_writes(recipe):
    """mlx_lm.utils.quantize_model with the predicate of its Gemma 4, which writes no mode for routers."""
    from mlx_lm.utils import quantize_model

    chosen = plan(recipe, modules(SHAPES))
    usual = recipe.rules[-1].scheme
    predicate = lambda path, _: {"group_size": 64, "bits": 8} if path.endswith("router.proj") else True  # noqa: E731
    _, written = quantize_model(
        random_model(WIDE), {}, usual.group_size, usual.bits, mode=usual.mode, quant_predicate=predicate
    )
    block, theirs = chosen.block(), dict(written["quantization"])
    for path in [path for path, value in theirs.items() if isinstance(value, dict)]:
        own = {"mode": "affine"} | theirs.pop(path)
        assert block.pop(path, usual.settings()) == own
    assert block == theirs == usual.settings()


def test_what_is_left_alone_is_false_in_the_block():
    block = plan(RECIPES["default"], modules(REAL)).block()
    assert block["model.decoder.embed_tokens"] is False
    assert block["model.decoder.layers.7.router.proj"] is False
    assert block[f"{LAYER}.self_attn.k_proj"] == {"group_size": 64, "bits": 8, "mode": "affine"}
    assert f"{LAYER}.experts.down_proj" not in block  # as for all


def test_a_block_for_another_tree():
    block = plan(RECIPES["default"], modules(REAL)).block(lambda path: [] if "self_cond" in path else [path + "!"] * 2)
    assert block[f"{LAYER}.mlp.up_proj!"]["bits"] == 8
    assert not any("self_cond" in path for path in block)


def test_a_group_that_does_not_divide_is_refused_with_the_remedy():
    shapes = {name: array.shape for name, array in named(random_model(with_text(hidden_size=64))).items()}
    first = next(path for path, shape in modules(shapes).items() if shape[-1] % 64)
    with pytest.raises(
        InputError, match=rf"groups of 64 do not divide the width 32 of {first} \(and \d+ more\); .* by a rule"
    ) as e:
        plan(RECIPES["8bit"], modules(shapes))
    assert "\n" not in str(e.value)


def test_nothing_to_quantise_is_no_block():
    assert plan(RECIPES["bf16"], modules(REAL)).block() is None


@pytest.mark.parametrize(
    ("settings", "scheme"),
    [
        ({}, Scheme(4, 64, "affine")),
        ({"bits": 3}, Scheme(3, 64, "affine")),
        ({"group_size": 128, "bits": 6}, Scheme(6, 128, "affine")),
        ({"mode": "nvfp4"}, Scheme(4, 16, "nvfp4")),
        ({"mode": "mxfp8", "bits": 8, "group_size": 32}, Scheme(8, 32, "mxfp8")),
    ],
)
def test_what_q_options_alone_mean(settings, scheme):
    recipe = uniform(**settings)
    assert recipe("model.decoder.embed_tokens") == scheme
    assert recipe(f"{LAYER}.router.proj") == Scheme(8, 64)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"bits": 7}, "bits in mode affine must be 2 or 3 or 4 or 5 or 6 or 8, not 7"),
        ({"bits": True}, "not True"),
        ({"group_size": 16}, "group_size in mode affine must be 32 or 64 or 128, not 16"),
        ({"mode": "nvfp4", "group_size": 32}, "group_size in mode nvfp4 must be 16, not 32"),
        ({"mode": "mxfp4", "bits": 8}, "bits in mode mxfp4 must be 4, not 8"),
        ({"mode": "gguf"}, "mode must be one of affine, mxfp4, nvfp4, mxfp8, not 'gguf'"),
        ({"mode": ["affine"]}, "mode must be one of"),
    ],
)
def test_what_mlx_does_not_have_is_refused(settings, said):
    with pytest.raises(UsageError, match=re.escape(said)):
        uniform(**settings)


def test_every_scheme_is_one_that_mlx_has_and_its_size_is_right():
    weight = mx.random.normal((6, 256)).astype(mx.bfloat16)
    for mode in DEFAULTS:
        for bits in range(10):
            for group_size in (8, 16, 32, 64, 128, 256):
                try:
                    scheme = Scheme.of(mode, bits, group_size)
                except UsageError:
                    continue
                arrays = mx.quantize(weight, group_size=group_size, bits=bits, mode=mode)
                assert scheme.nbytes(weight.shape, 2) == sum(array.nbytes for array in arrays)


def rules(tmp_path, entries):
    path = tmp_path / "mine.json"
    path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
    return path


def test_rules_of_a_file_apply_in_order(tmp_path):
    path = rules(
        tmp_path,
        [
            {"pattern": "*.layers.0.*", "bits": False},
            {"pattern": r"re:self_attn\.[qk]_proj$", "bits": 6},
            {"pattern": "*.experts.*", "mode": "nvfp4"},
            {"pattern": "*.embed_tokens", "bits": 8, "group_size": 32, "mode": "affine"},
        ],
    )
    chosen = plan(get_recipe(path), modules(REAL)).schemes
    assert chosen["model.decoder.layers.0.self_attn.q_proj"] is None
    assert chosen[f"{LAYER}.self_attn.q_proj"] == Scheme(6, 64)
    assert chosen[f"{LAYER}.self_attn.v_proj"] is None
    assert chosen[f"{LAYER}.experts.down_proj"] == Scheme(4, 16, "nvfp4")
    assert chosen["model.decoder.embed_tokens"] == Scheme(8, 32)


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ("{oops", "not a recipe in JSON"),
        ("[" * 100_000, "not a recipe in JSON"),
        ({"pattern": "*"}, "must hold a JSON list of rules"),
        ([], "must hold a JSON list of rules"),
        (["*"], "rule 1: must be an object with a \"pattern\", not '*'"),
        ([{"bits": 4}], 'rule 1: must be an object with a "pattern"'),
        ([{"pattern": "*", "bits": 4}, {"pattern": "*", "bit": 4}], "rule 2: unknown key 'bit'"),
        ([{"pattern": "*", "bits": 9}], "rule 1: bits in mode affine must be"),
        ([{"pattern": "*", "bits": "4"}], "rule 1: bits in mode affine must be"),
        ([{"pattern": "*", "bits": None}], "rule 1: bits must not be null"),
        ([{"pattern": "*", "bits": 4, "mode": "nvfp4", "group_size": 64}], "rule 1: group_size in mode nvfp4"),
        ([{"pattern": "*", "mode": "fp3"}], "rule 1: mode must be one of"),
        ([{"pattern": "*"}], "rule 1: says nothing"),
        ([{"pattern": "*", "bits": False, "mode": "affine"}], 'rule 1: "bits": false goes with nothing else'),
        ([{"pattern": "re:(", "bits": 4}], "rule 1: missing ), unterminated subpattern"),
        ([{"pattern": "*", "bits": 4}, {"pattern": "*.atn.*", "bits": 4}], "rule 2: '*.atn.*' matches no module"),
        ([{"pattern": "*vision*", "bits": 4}], "rule 1: '*vision*' matches no module that can be quantised"),
    ],
)
def test_mistakes_in_a_file_are_one_line_with_file_and_rule(tmp_path, entries, said):
    path = rules(tmp_path, entries)
    with pytest.raises(InputError, match=re.escape(said)) as caught:
        plan(get_recipe(path), modules(REAL))
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_names_those_there_are():
    with pytest.raises(UsageError, match=r"4bit: no such recipe \(default, mlx-community-4bit, 8bit, bf16, mxfp4, "):
        get_recipe("4bit")


def test_the_help_names_the_recipes_that_there_are():
    """`--help` lists them without loading MLX, so it cannot ask."""
    assert RECIPE_NAMES.split(", ") == list(RECIPES)
