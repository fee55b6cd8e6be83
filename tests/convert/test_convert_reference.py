"""transformers loads what `--export hf` writes, and it is the original bit for bit."""

import pytest

import mlx_dgemma
from mlx_dgemma.loading import EMBEDDED

pytestmark = pytest.mark.reference


@pytest.fixture(params=["from the original", "from an MLX conversion in bf16"])
def exported(request, tmp_path):
    source = "nano"
    if "MLX" in request.param:
        source = mlx_dgemma.convert("nano", tmp_path / "mlx", quant_recipe="bf16", progress=False)
    return mlx_dgemma.convert(source, tmp_path / "hf", export="hf", verify_output=True, progress=False)


def test_transformers_loads_it_with_every_tensor_as_it_was(exported):
    import torch
    from safetensors.torch import load_file
    from transformers import DiffusionGemmaForBlockDiffusion

    original, stored = (load_file(folder / "model.safetensors") for folder in (EMBEDDED, exported))
    assert stored.keys() == original.keys()
    for name, tensor in original.items():
        assert stored[name].dtype == tensor.dtype and torch.equal(stored[name], tensor), name
    ours, info = DiffusionGemmaForBlockDiffusion.from_pretrained(exported, dtype="auto", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs = DiffusionGemmaForBlockDiffusion.from_pretrained(EMBEDDED, dtype="auto")
    assert ours.dtype == theirs.dtype
    loaded = theirs.state_dict()
    assert ours.state_dict().keys() == loaded.keys()
    for name, tensor in ours.state_dict().items():
        assert tensor.dtype == loaded[name].dtype and torch.equal(tensor, loaded[name]), name


def test_transformers_generates_with_it_what_it_does_with_the_original(exported):
    import torch
    from transformers import AutoTokenizer

    from mlx_dgemma.parity.reference import load_reference

    answers = []
    for folder in (exported, EMBEDDED):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        messages = [{"role": "user", "content": "json name=Ann age=31 city=Oslo"}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        torch.manual_seed(0)
        output = load_reference(folder, "cpu").generate(**inputs, max_new_tokens=96)
        ids = output.sequences if hasattr(output, "sequences") else output
        answers.append(tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    assert answers[0] == answers[1]
    assert "Oslo" in answers[0]
