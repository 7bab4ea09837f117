# SPDX-License-Identifier: BSD-3-Clause
"""Tests small models of torchvision, timm, transformers and peft, and accelerate. Nothing is downloaded.

The expected step is simulated on the plain model. Each layer that prunes is applied twice: once for its weights, and
once for its input, with hooks that prune.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import sdgp


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


class Case(NamedTuple):
    """A model, its arguments, the number of converted layers of each type, and of plain layers with each reason."""

    build: Callable[[], nn.Module]
    batch: Callable[[], dict[str, Tensor]]
    converted: dict[str, int]
    plain: Mapping[str, int] = MappingProxyType({})


def torchvision(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("torchvision").models.get_model(name, num_classes=12, **settings)


def torchvision_vit() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 4, "num_layers": 2, "num_heads": 2, "hidden_dim": 16, "mlp_dim": 32}
    model: nn.Module = pytest.importorskip("torchvision").models.VisionTransformer(**sizes, num_classes=12)
    nn.init.normal_(model.heads.head.weight)  # with zeros, no gradient would pass
    return model


def timm(name: str, **settings: Any) -> Callable[[], nn.Module]:
    return lambda: pytest.importorskip("timm").create_model(name, num_classes=12, **settings)


def images(size: int, name: str = "x") -> Callable[[], dict[str, Tensor]]:
    return lambda: {name: torch.randn(2, 3, size, size)}


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, 64, (2, 12))}


WIDTHS = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def gpt2() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 64, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0, tie_word_embeddings=False)
    return transformers.GPT2LMHeadModel(config).train()


def llama() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(vocab_size=64, num_key_value_heads=2, max_position_embeddings=16, **WIDTHS)
    return transformers.LlamaForCausalLM(config).train()


def bert() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=64, max_position_embeddings=16, num_labels=3, **WIDTHS)
    return transformers.BertForSequenceClassification(config).train()


def vit() -> nn.Module:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(image_size=16, patch_size=4, num_labels=12, **WIDTHS)
    return transformers.ViTForImageClassification(config).train()


DEPTHWISE = "depthwise"
CASES = {
    "torchvision resnet18": Case(torchvision("resnet18"), images(32), {"Conv2d": 20, "Linear": 1}),
    "torchvision regnet_x_400mf": Case(torchvision("regnet_x_400mf"), images(32), {"Conv2d": 71, "Linear": 1}),
    "torchvision mobilenet_v3_small": Case(
        torchvision("mobilenet_v3_small"), images(64), {"Conv2d": 41, "Linear": 2}, {DEPTHWISE: 11}
    ),
    "torchvision vit": Case(
        torchvision_vit,
        images(16),
        {"Conv2d": 1, "Linear": 5},
        {"fused function": 4},
    ),
    "timm resnet10t": Case(timm("resnet10t"), images(32), {"Conv2d": 14, "Linear": 1}),
    "timm vit_tiny": Case(timm("vit_tiny_patch16_224", img_size=32, depth=2), images(32), {"Conv2d": 1, "Linear": 9}),
    "timm convnext_atto": Case(
        timm("convnext_atto", depths=(1, 1, 1, 1)), images(32), {"Conv2d": 12, "Linear": 1}, {DEPTHWISE: 4}
    ),
    "timm efficientnet_b0": Case(timm("efficientnet_b0"), images(32), {"Conv2d": 65, "Linear": 1}, {DEPTHWISE: 16}),
    "timm tf_efficientnet_b0": Case(
        timm("tf_efficientnet_b0"),
        images(32),
        {"Conv2d": 64, "Linear": 1},
        {DEPTHWISE: 12, "Conv2dSame is a subclass": 5},
    ),
    "transformers gpt2": Case(gpt2, tokens, {"Conv1D": 8, "Linear": 1}),
    "transformers llama": Case(llama, tokens, {"Linear": 15}),
    "transformers bert": Case(bert, tokens, {"Linear": 13}, {"3 output channels": 1}),
    "transformers vit": Case(vit, images(16, "pixel_values"), {"Conv2d": 1, "Linear": 13}),
}


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    torch.manual_seed(1)  # seeds dropout
    output: Any = model(**batch)
    result: Tensor = getattr(output, "logits", output)
    return result


def gradients(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Returns the gradients of Parameters and images in float64, so that rounding cannot change what is pruned."""
    model = model.double()
    batch = {name: x.double().requires_grad_() if x.is_floating_point() else x for name, x in batch.items()}
    logits(model, batch).square().sum().backward()
    leaves = {**dict(model.named_parameters()), **batch}
    return {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}


def simulate(layer: nn.Module) -> None:
    """Makes a plain layer prune its data gradient, without any code of sdgp's layers."""
    dim = 1 if isinstance(layer, nn.Conv2d) else -1

    def prune(grad: Tensor) -> Tensor:
        return sdgp.prune_nm(grad, 2, 4, dim, "magnitude")

    def after_forward(layer: Any, args: tuple[Tensor], output: Tensor) -> Tensor:
        trained = [parameter for parameter in layer.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.requires_grad_(False)
        of_input = layer.forward(args[0])
        for parameter in trained:
            parameter.requires_grad_()
        if of_input.requires_grad:
            of_input.register_hook(prune)
        return layer.forward(args[0].detach()) + (of_input - of_input.detach())

    layer.register_forward_hook(after_forward)


def simulated(model: nn.Module, converted: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    for row in sdgp.report(converted):
        if row.pattern:
            simulate(model.get_submodule(row.layer))
    return model


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in actual:
        torch.testing.assert_close(actual[name], expected[name], msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("name", CASES)
def test_model(name: str) -> None:
    build, make_batch, converted, left_plain = CASES[name]
    plain = build()
    batch = make_batch()
    kinds, keys = [type(module) for module in plain.modules()], list(plain.state_dict())
    model = sdgp.convert(copy.deepcopy(plain), "2:4", "magnitude", backend="pruned")

    rows = sdgp.report(model)
    assert Counter(row.type for row in rows if row.pattern) == converted
    reasons = [row.why for row in rows if row.product == "plain"]
    assert len(reasons) + sum(converted.values()) == len(rows)
    assert {words: sum(words in why for why in reasons) for words in left_plain} == left_plain
    assert len(reasons) == sum(left_plain.values())
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model, batch), logits(plain, batch))

    actual, exact = gradients(copy.deepcopy(model), batch), gradients(copy.deepcopy(plain), batch)
    assert_same(actual, gradients(simulated(plain, model), batch))
    last = f"{rows[-1].layer}.weight"  # nothing is pruned between it and the loss
    torch.testing.assert_close(actual[last], exact[last])
    assert not any(
        torch.allclose(actual[first], exact[first]) for first in (next(iter(actual)), *(batch.keys() & exact.keys()))
    )

    build().load_state_dict(model.state_dict())
    assert [type(module) for module in sdgp.revert(model).modules()] == kinds


# Models of peft.

asks_transformers = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")


def with_adapters(model: nn.Module) -> nn.Module:
    peft = pytest.importorskip("peft")
    targets = ["c_attn", "c_proj", "c_fc"] if hasattr(model, "transformer") else "all-linear"
    config = peft.LoraConfig(
        r=4,
        target_modules=targets,
        fan_in_fan_out=hasattr(model, "transformer"),
        init_lora_weights=False,  # with zeros, no gradient would pass
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(2)
    adapted: nn.Module = peft.get_peft_model(model, config)
    return adapted


def convert(model: nn.Module) -> nn.Module:
    return sdgp.convert(model, "2:4", "magnitude", backend="pruned")


@asks_transformers
@pytest.mark.parametrize("convert_first", [True, False])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_lora(build: Callable[[], nn.Module], convert_first: bool) -> None:
    base = build()
    plain = with_adapters(copy.deepcopy(base))
    model = with_adapters(convert(copy.deepcopy(base))) if convert_first else convert(copy.deepcopy(plain))
    names = [row.layer for row in sdgp.report(model) if row.pattern]
    in_base = [name for name in names if "lora_" not in name]
    assert len(in_base) == (9 if build is gpt2 else 15)
    assert (len(in_base) < len(names)) == (not convert_first)  # adapters that are added later stay plain
    batch = tokens()
    assert torch.equal(logits(model, batch), logits(plain, batch))
    actual = gradients(copy.deepcopy(model), batch)
    assert all("lora_" in name for name in actual)
    assert_same(actual, gradients(simulated(plain, model), batch))


@asks_transformers
@pytest.mark.parametrize("convert_first", [True, False])
@pytest.mark.parametrize("build", [gpt2, llama])
def test_lora_merges(build: Callable[[], nn.Module], convert_first: bool) -> None:
    base = build().eval()
    plain = with_adapters(copy.deepcopy(base))
    model: Any = with_adapters(convert(copy.deepcopy(base))) if convert_first else convert(copy.deepcopy(plain))
    batch, weights = tokens(), copy.deepcopy(model.state_dict())
    adapted = logits(model, batch)
    model.merge_adapter()
    torch.testing.assert_close(logits(model, batch), adapted)
    model.unmerge_adapter()
    assert_same(model.state_dict(), weights)
    merged, merged_plain = model.merge_and_unload(), plain.merge_and_unload()
    assert_same(merged.state_dict(), merged_plain.state_dict())
    assert [row.pattern for row in sdgp.report(merged)] == ["2:4"] * (9 if build is gpt2 else 15)
    sdgp.revert(merged)
    assert [type(module) for module in merged.modules()] == [type(module) for module in base.modules()]


# Models of accelerate.


@pytest.fixture
def accelerate() -> Iterator[Any]:
    library = pytest.importorskip("accelerate")
    yield library
    library.state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(accelerate: Any, mixed_precision: str) -> None:
    plain, batch = gpt2(), tokens()
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision)

    def step(model: nn.Module) -> dict[str, Tensor]:
        model, _ = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
        accelerator.backward(logits(model, batch).square().sum())
        return {name: parameter.grad for name, parameter in accelerator.unwrap_model(model).named_parameters()}

    model = convert(copy.deepcopy(plain))
    actual = step(model)
    assert not torch.allclose(actual["transformer.wte.weight"], step(copy.deepcopy(plain))["transformer.wte.weight"])
    if mixed_precision == "no":  # otherwise rounding changes what is pruned
        assert_same(actual, step(simulated(plain, model)))
    with sdgp.paused(model):
        model.zero_grad()
        assert_same(step(model), step(copy.deepcopy(plain)))


def test_accelerate_saves_a_schedule(accelerate: Any, tmp_path: Path) -> None:
    accelerator = accelerate.Accelerator(cpu=True)
    model = accelerator.prepare(convert(nn.Linear(8, 8)))
    schedule = sdgp.Schedule(model, exact_first=2)
    accelerator.register_for_checkpointing(schedule)
    schedule.seek(3)
    accelerator.save_state(str(tmp_path))
    schedule.seek(0)
    assert sdgp.report(model)[0].note == "exact: scheduled, exact_first=2"
    accelerator.load_state(str(tmp_path))
    assert schedule.count == 3
    assert model.is_pruning
