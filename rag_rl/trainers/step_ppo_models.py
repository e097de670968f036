"""The model beside the policy that PPO needs: one that values states."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn


class ValueHead(nn.Module):
    """A linear map to one value, in full precision; zero at first, so that nothing is expected of any state.

    Args:
        width: D of the hidden states.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, 1, dtype=torch.float32)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Values hidden states.

        Args:
            hidden: (B, T, D).

        Returns:
            (B, T, 1) in float32.
        """
        with torch.autocast(hidden.device.type, enabled=False):
            values: Tensor = self.linear(hidden.float())
        return values


class ValueModel(nn.Module):
    """A copy of the policy's backbone with a head that values each state.

    With LoRA it has an adapter of its own over the policy's frozen weights, which both share: it costs the adapter and
    the head, no second copy of the model. Without, it is a whole second model, which is trained in full.

    Adapters that are switched on one model would do with less code, but not under gradient checkpointing: what is
    computed anew in the backward pass would be computed with whichever adapter is on then.

    Args:
        model: the policy, before TRL puts its adapter on.
        peft_config: of the policy; the value model's is the same. None for training in full.
    """

    base_model_prefix = "backbone"

    def __init__(self, model: Any, peft_config: Any = None) -> None:
        super().__init__()
        shared = {id(weight): weight for weight in model.parameters()} if peft_config is not None else {}
        backbone = copy.deepcopy(model.base_model, shared)
        backbone.config.use_cache = False
        width = backbone.config.get_text_config().hidden_size
        if peft_config is not None:
            from peft import get_peft_model

            own = copy.deepcopy(peft_config)
            own.task_type = "FEATURE_EXTRACTION"
            backbone = get_peft_model(backbone, own)
        self.backbone = backbone
        self.score = ValueHead(width)

    def trained_state(self) -> dict[str, Tensor]:
        """The weights that training changes.

        Returns:
            Name to a contiguous tensor on the CPU.
        """
        return {
            name: weight.detach().cpu().contiguous()
            for name, weight in self.named_parameters()
            if weight.requires_grad
        }

    def load_trained_state(self, state: dict[str, Tensor]) -> None:
        """Takes over the weights of ``trained_state``.

        Args:
            state: of a model of the same shape.
        """
        weights = dict(self.named_parameters())
        with torch.no_grad():
            for name, value in state.items():
                weights[name].copy_(value)


class NoModel(nn.Module):
    """Stands where TRL wants a reward model: rewards are known by the time that it would be asked."""
