"""load_model requires the right tensors and shares tied parameters. load finds end tokens, and checks the tokenizer
against the model."""

import json

import pytest
import tokenizers
import torch

import quantize
from checkpoint import read_checkpoint, save_checkpoint
from formats import GroupedInt8, Int4, Int8, Unquantized
from layers.kv_cache import KVCache
from layers.linear import quantizable_linears
from layers.packing import can_capture
from loading import load, load_model
from tests.byte_models import END, TEMPLATE, VOCAB_SIZE, random_folder
from tests.tiny import call_main, give_input_orders, quantize_embedding
from utils.errors import UsageError


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a model with a tied head, in 32, 8 and 4 bits."""
    folder = random_folder(tmp_path_factory.mktemp("tied"), max_seq_len=64, tie_embeddings=True)
    for mode in ("int8", "int4"):
        call_main(quantize.main, "--checkpoint_path", folder / "model.pth", "--mode", mode)
    return folder


def rewrite(path, to, change):
    config, quantization, tensors = read_checkpoint(path)
    change(tensors)
    save_checkpoint(to, config, tensors, quantization)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("use_kernels", [True, False])
def test_tied_embeddings_are_one_parameter(folder, use_kernels, dtype):
    model = load_model(folder / "model.pth", dtype=dtype, use_kernels=use_kernels)
    assert model.is_tied and model.dtype == dtype
    assert model.lm_head.weight.dtype == (torch.int32 if model.lm_head.is_packed else dtype)
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_a_quantized_head_is_not_tied(folder):
    model = load_model(folder / "model_int8.pth")
    assert model.lm_head.weight.data_ptr() != model.embed_tokens.weight.data_ptr()
    assert model.weight_format.name == "int8" and model.embed_tokens.weight.dtype == torch.bfloat16
    assert model.lm_head.scales.dtype == torch.float32


def test_a_head_of_its_own_counts(folder, tmp_path):
    head = torch.randn(260, 32)
    rewrite(folder / "model.pth", tmp_path / "model.pth", lambda tensors: tensors.update({"lm_head.weight": head}))
    model = load_model(tmp_path / "model.pth", dtype=torch.float32, use_kernels=False)
    assert torch.equal(model.lm_head.weight, head) and not torch.equal(model.embed_tokens.weight, head)


def test_layers_in_other_formats(folder, tmp_path):
    """A file may give each layer a format of its own. A head that stays in 16 bits is tied."""
    config, quantization, tensors = read_checkpoint(folder / "model_int8.pth")
    original = read_checkpoint(folder / "model.pth")[2]
    others = {
        "layers.1.feed_forward.gate_up_proj": Int4(32),
        "layers.0.feed_forward.down_proj": Int4(32, torch.float16),
        "layers.0.attention.o_proj": GroupedInt8(16),
        "layers.1.attention.o_proj": GroupedInt8(32, torch.float16),
    }
    del tensors["lm_head.weight"], tensors["lm_head.scales"]
    for name, other in others.items():
        tensors |= {f"{name}.{part}": t for part, t in other.quantize(original[f"{name}.weight"]).items()}
    layers = {"lm_head": None} | {name: other.to_dict() for name, other in others.items()}
    path, tokens = tmp_path / "model.pth", torch.arange(9)[None]
    for overrides, error in [(layers, None), ({"lm_heat": None}, "lm_heat, which is no linear"), ([1], "layers are")]:
        save_checkpoint(path, config, tensors, quantization | {"layers": overrides})
        if error:
            with pytest.raises(UsageError, match=error):
                load_model(path)
    save_checkpoint(path, config, tensors, quantization | {"layers": layers})
    model = load_model(path, dtype=torch.float32)
    plain = load_model(path, dtype=torch.float32, use_kernels=False)
    assert model.is_tied and model.weight_format == Int8()
    assert all(plain.get_submodule(name).format == other for name, other in others.items())
    unquantized = load_model(folder / "model.pth", dtype=torch.float32, use_kernels=False)
    for layer, linear in quantizable_linears(plain):
        unquantized.get_submodule(layer).set_tensor("weight", linear.dequantize(torch.float32))
    with torch.inference_mode():
        start, models = torch.zeros(1, dtype=torch.long), (model, plain, unquantized)
        logits = [model(tokens, start, KVCache(model, 1, 9)) for model in models]
    assert torch.equal(logits[1], logits[2])
    # The kernels sum in another order. A float32 sum of some 100 products is off by up to 100 * 2^-24 of its terms
    assert (logits[0] - logits[1]).norm() < 1e-5 * logits[1].norm()


@pytest.mark.parametrize("is_tied", [True, False])
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_embedding(folder, tmp_path, mode, is_tied, monkeypatch):
    """A quantized embedding gives the logits of the dequantized weights, and a tied one is in memory once."""
    (quantized,) = folder.glob(f"model_{mode}*.pth")
    path, tokens = quantize_embedding(quantized, tmp_path / "model.pth", is_tied), torch.arange(80).view(2, 40)
    models = {
        "kernels": load_model(path, dtype=torch.float32),
        "PyTorch": load_model(path, dtype=torch.float32, use_kernels=False),
        "unquantized": load_model(folder / "model.pth", dtype=torch.float32, use_kernels=False),
    }
    with monkeypatch.context() as context:
        context.setattr("kernels.build.load_cpp_kernels", lambda: None)
        models["no compiler"] = load_model(path, dtype=torch.float32)
    plain, unquantized = models["PyTorch"], models["unquantized"]
    for name, linear in quantizable_linears(plain):
        unquantized.get_submodule(name).set_tensor("weight", linear.dequantize(torch.float32))
    unquantized.embed_tokens.set_tensor("weight", plain.embed_tokens.dequantize(torch.float32))
    logits = {}
    for name, model in models.items():
        assert name == "unquantized" or model.is_tied == is_tied
        with torch.inference_mode():
            cache = KVCache(model, 2, 41)
            prompt = model(tokens, torch.tensor([0, 0]), cache)
            logits[name] = prompt, model(tokens[:, :1], torch.tensor([40, 40]), cache)
    assert plain.embed_tokens.format.is_quantized and can_capture(models["kernels"], 2, 1)
    for ours, expected in zip(logits["kernels"], logits["unquantized"], strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)
    for name in ("PyTorch", "no compiler"):
        assert all(map(torch.equal, logits[name], logits["unquantized"]))


@pytest.mark.parametrize(
    "name, dtype",
    [("lm_head.scales", torch.float64), ("lm_head.weight", torch.int32), ("norm.weight", torch.int8)],
)
def test_types_of_a_quantized_checkpoint(folder, tmp_path, name, dtype):
    path = tmp_path / "model.pth"
    rewrite(folder / "model_int8.pth", path, lambda tensors: tensors.update({name: tensors[name].to(dtype)}))
    with pytest.raises(UsageError, match=f"tensor {name} is missing, left over or of the wrong shape"):
        load_model(path)
    if name.startswith("lm_head"):  # as the embedding's
        quantize_embedding(path, path)
        with pytest.raises(UsageError, match=f"tensor {name.replace('lm_head', 'embed_tokens')} is missing"):
            load_model(path)


@pytest.fixture(scope="module")
def act_order(folder):
    path = folder / "act_order.pth"
    give_input_orders(folder / "model_int4.g32.pth", path)
    return path


def test_orders_of_inputs(act_order, monkeypatch):
    """Layers with an input_order give the logits of a model with reordered columns, with kernels, without, and
    dequantized."""
    models = {
        "kernels": load_model(act_order, dtype=torch.float32),
        "PyTorch": load_model(act_order, dtype=torch.float32, use_kernels=False),
        "in order": load_model(act_order, dtype=torch.float32, use_kernels=False),
    }
    with monkeypatch.context() as context:
        context.setattr("kernels.build.load_cpp_kernels", lambda: None)
        models["no compiler"] = load_model(act_order, dtype=torch.float32)
    in_order = models["in order"]
    for _, linear in quantizable_linears(in_order):
        weight = linear.dequantize(torch.float32)[:, linear.input_order.argsort()]
        linear.set_format(Unquantized())
        linear.set_tensor("weight", weight)
    norms = [(layer.pre_attention_norm, layer.attention.qkv_proj) for layer in in_order.layers]
    norms += [(layer.pre_ffn_norm, layer.feed_forward.gate_up_proj) for layer in in_order.layers]
    for norm, linear in [*norms, (in_order.norm, in_order.lm_head)]:
        norm.weight.data = norm.weight[linear.input_order.argsort()]
    for _, linear in quantizable_linears(in_order):
        linear.input_order = None
    tokens, logits = torch.arange(160).view(2, 80), {}  # more tokens than the kernels take, and then a few
    with torch.inference_mode():
        for name, model in models.items():
            cache = KVCache(model, 2, 62)
            prompt = model(tokens[:, :60], torch.tensor([0, 0]), cache)
            logits[name] = torch.cat([prompt, model(tokens[:, 60:62], torch.tensor([60, 60]), cache)], dim=1)
    assert can_capture(models["kernels"], 2, 2)
    for name in ("kernels", "PyTorch", "no compiler"):
        # The kernels sum in another order: see test_layers_in_other_formats
        assert (logits[name] - logits["in order"]).norm() < 1e-5 * logits["in order"].norm()


def test_broken_orders_of_inputs(act_order, tmp_path):
    path, name = tmp_path / "model.pth", "layers.0.attention.o_proj.input_order"

    def assert_refused(match: str):
        with pytest.raises(UsageError, match=match) as e:
            load_model(path)
        assert "\n" not in str(e.value)

    for change in (lambda order: order.clone().fill_(1), lambda order: order - 1, lambda order: order + 1):
        rewrite(act_order, path, lambda tensors, change=change: tensors.update({name: change(tensors[name])}))
        assert_refused(f"tensor {name} is no order of the layer's 32 inputs; convert it again")
    for change in (lambda order: order[1:], lambda order: order.long()):
        rewrite(act_order, path, lambda tensors, change=change: tensors.update({name: change(tensors[name])}))
        assert_refused(f"tensor {name} is missing, left over or of the wrong shape")
    rewrite(act_order, path, lambda tensors: tensors.pop(name))
    assert_refused(f"tensor {name} is missing")
    config, quantization, tensors = read_checkpoint(act_order)
    without = [layer for layer in quantization["act_order"] if f"{layer}.input_order" != name]
    for layers, match in [
        (without, f"tensor {name} is missing, left over"), (["norm"], "gives norm an order of inputs, which it cannot"),
        ("lm_head", "act_order is 'lm_head', not a list of layers"), ([1], r"act_order is \[1\], not a list"),
    ]:
        save_checkpoint(path, config, tensors, quantization | {"act_order": layers})
        assert_refused(match)


BOT = 259  # <|bot|>


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, (0, ord("."))),  # a base model
        ({"eos_token": "</s>"}, (0, ord("."), END)),
        ({"eos_token": {"content": "</s>"}, "chat_template": TEMPLATE}, (0, ord("."), END)),
        ({"chat_template": TEMPLATE}, (0, ord("."), END)),
        ({"eos_token": "<|bot|>", "chat_template": TEMPLATE}, (0, ord("."), BOT, END)),
        ({"eos_token": "<|bot|>", "chat_template": "{{ raise_exception('no') }}"}, (0, ord("."), BOT)),
        ({"eos_token": "<missing>", "chat_template": "{{ messages[1].content }}"}, (0, ord("."))),
        ({"eos_token": None, "chat_template": 5}, (0, ord("."))),
    ],
)
def test_end_tokens(tmp_path, settings, expected):
    """Config, tokenizer and template name end tokens, and each token counts once."""
    folder = random_folder(tmp_path, max_seq_len=64)
    rewrite_config(folder / "model.pth", eos_ids=(0, ord(".")))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load(folder / "model.pth")[0].config.eos_ids == expected


def rewrite_config(path, **fields):
    data = torch.load(path, weights_only=True)
    data["config"].update(fields)
    torch.save(data, path)


@pytest.mark.parametrize("special", [True, False])
def test_more_tokens_than_the_embedding_has(tmp_path, special):
    """Special tokens beyond the embedding are encoded as text. Others are refused, in one line."""
    folder = random_folder(tmp_path, max_seq_len=64)
    tok = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tok.add_tokens([tokenizers.AddedToken("<image>", special=special)])
    tok.save(str(folder / "tokenizer.json"))
    settings = {"eos_token": "<image>", "pad_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings if special else {}))
    if special:
        model, tokenizer = load(folder / "model.pth")
        assert tokenizer.vocab_size == VOCAB_SIZE and model.config.eos_ids == (END,)
        for ids in (tokenizer.encode("<image></s>"), [*tokenizer.encode_parts(["<image>"]), END]):
            assert ids == [*b"<image>", END] and tokenizer.decode([*ids, VOCAB_SIZE]) == "<image>"
    else:
        with pytest.raises(UsageError, match="the tokenizer's 261 tokens exceed the model's 260$"):
            load(folder / "model.pth")
