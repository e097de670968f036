"""rag_rl.trainers.step_ppo_models: the value model starts at zero and shares what it can."""

from __future__ import annotations

import pytest
import torch

from rag_rl.tiny import FOLDER
from rag_rl.trainers.step_ppo_models import ValueHead, ValueModel


@pytest.fixture
def policy():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(FOLDER / "reader")


def lora():
    from peft import LoraConfig

    return LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")


def values(model):
    ids = torch.arange(10, 22).reshape(2, 6)
    return model.score(model.backbone(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state)


@pytest.mark.parametrize("config", [None, lora()], ids=["full", "lora"])
def test_nothing_is_expected_at_first(policy, config):
    found = values(ValueModel(policy, config))
    assert found.shape == (2, 6, 1)
    assert not found.any()


def test_the_head_stays_in_full_precision():
    head = ValueHead(8)
    torch.nn.init.ones_(head.linear.weight)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = head(torch.full((1, 1, 8), 1 / 3, dtype=torch.float32))
    assert found.dtype == torch.float32
    assert found.item() == pytest.approx(8 / 3, abs=1e-6)


def test_an_adapter_shares_the_frozen_weights(policy):
    from peft import get_peft_model

    value = ValueModel(policy, lora())
    model = get_peft_model(policy, lora())
    own = {weight.data_ptr() for weight in model.parameters() if not weight.requires_grad}
    frozen = [weight for weight in value.parameters() if not weight.requires_grad]
    assert len(frozen) > 10
    assert {weight.data_ptr() for weight in frozen} <= own
    names = {name for name, weight in value.named_parameters() if weight.requires_grad}
    assert all("lora_" in name or name.startswith("score.") for name in names)
    assert set(value.trained_state()) == names
    # The adapters are two: what one learns the other does not know.
    trained = {weight.data_ptr() for weight in value.parameters() if weight.requires_grad}
    assert not trained & {weight.data_ptr() for weight in model.parameters()}


def test_without_an_adapter_it_is_a_model_of_its_own(policy):
    value = ValueModel(policy)
    assert not {w.data_ptr() for w in value.parameters()} & {w.data_ptr() for w in policy.parameters()}
    assert all(weight.requires_grad for weight in value.parameters())


@pytest.mark.parametrize("config", [None, lora()], ids=["full", "lora"])
def test_trained_weights_come_back(policy, config):
    one, two = ValueModel(policy, config), ValueModel(policy, config)
    with torch.no_grad():
        for weight in one.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn_like(weight) * 0.05)
    assert not torch.equal(values(one), values(two))
    two.load_trained_state(one.trained_state())
    assert torch.equal(values(one), values(two))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning")
def test_every_adapter_learns_under_gradient_checkpointing(policy):
    policy.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    value = ValueModel(policy, lora()).train()
    with torch.no_grad():
        for name, weight in value.named_parameters():
            if "lora_B" in name or name.startswith("score."):
                weight.normal_(std=0.1)
    values(value).sum().backward()
    for name, weight in value.named_parameters():
        assert not weight.requires_grad or weight.grad.abs().max() > 0, name
