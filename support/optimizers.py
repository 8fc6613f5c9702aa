"""SGD and LARS whose steps can be skipped without waiting for the GPU, and clipping of gradients."""

from collections.abc import Iterable, Iterator
from typing import Any

import timm.optim
import torch


class SkippableStep(torch.optim.Optimizer):
    """Skips a step with gradients that are not finite, as PyTorch's fused AdamW does.

    With this attribute, GradScaler does not wait for the device to decide whether to call `step`, but calls it with
    `found_inf` set: 1 if a gradient is not finite, else 0. A skipped step changes neither parameters nor momentum.
    """

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        found_inf = getattr(self, "found_inf", None)
        self.found_inf = self.grad_scale = None  # SGD itself handles them only when fused
        if found_inf is None or found_inf.device.type == "cpu":
            if found_inf is None or not found_inf:
                super().step(closure)
            return
        before = {name: value.clone() for name, value in self._values()}
        super().step(closure)
        for name, value in self._values():
            # A momentum buffer that this step has created starts at 0.
            torch.where(found_inf > 0, before.get(name, value.new_zeros(())), value, out=value)

    def _values(self) -> Iterator[tuple[Any, torch.Tensor]]:
        """Yield ((parameter, kind), tensor) of all parameters with a gradient and of their momentum."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            yield (parameter, "value"), parameter
            if "momentum_buffer" in self.state.get(parameter, {}):
                yield (parameter, "momentum"), self.state[parameter]["momentum_buffer"]


class Sgd(SkippableStep, torch.optim.SGD):
    """SGD whose steps can be skipped."""


class Lars(SkippableStep, timm.optim.Lars):
    """LARS as in DINO: the trust ratio of weights w with gradient g and decay λ is ‖w‖ / ‖g + λw‖.

    timm uses ‖w‖ / (‖g‖ + λ‖w‖ + 1e-8), and no trust ratio if λ is 0.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for parameter in group["params"] if decay else ():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=decay)
            # The decay is part of the gradient now.
            group |= {"weight_decay": 0.0, "always_adapt": group["decay"], "eps": 0.0}
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay


def build_optimizer(name: str, network: torch.nn.Module) -> torch.optim.Optimizer:
    """Return the optimizer. Biases and 1-d parameters have no weight decay. The loop sets learning rate and decay."""
    decayed: list[torch.nn.Parameter] = []
    plain: list[torch.nn.Parameter] = []
    for parameter_name, parameter in network.named_parameters():
        if parameter.requires_grad:
            (plain if parameter_name.endswith(".bias") or parameter.ndim == 1 else decayed).append(parameter)
    groups = [{"params": decayed, "decay": True}, {"params": plain, "decay": False, "weight_decay": 0.0}]
    if name == "adamw":
        return torch.optim.AdamW(groups, fused=True)
    return {"sgd": Sgd, "lars": Lars}[name](groups, lr=0, momentum=0.9)


def clip_each_gradient(parameters: Iterable[torch.Tensor], max_norm: float) -> torch.Tensor:
    """Clip the gradient norm of each parameter separately, as DINO does. 0 does not clip.

    Returns:
        [number of gradients], the norms before clipping
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(gradients))
    if max_norm:
        factors = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        if norms.is_cuda:
            multiply_each(gradients, factors)
        else:
            torch._foreach_mul_(gradients, list(factors))
    return norms


def multiply_each(tensors: list[torch.Tensor], factors: torch.Tensor) -> None:
    """Multiply each of n tensors in place by its factor in `factors`, [n].

    For a GPU: `_foreach_mul_` with n factors takes n launches, this takes a few, and memory of the size of the tensors.
    """
    sizes = [tensor.numel() for tensor in tensors]
    of_each_number = torch.cat([factor.expand(size) for factor, size in zip(factors, sizes, strict=True)])
    parts = zip(of_each_number.split(sizes), tensors, strict=True)
    torch._foreach_mul_(tensors, [part.view_as(tensor) for part, tensor in parts])
