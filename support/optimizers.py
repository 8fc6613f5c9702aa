"""SGD and LARS whose steps can be skipped without waiting for the GPU. timm, which has LARS, is slow to import."""

import timm.optim
import torch


class SkippableStep:
    """Skips a step with gradients that are not finite, as PyTorch's fused AdamW does.

    With this attribute, GradScaler does not wait for the device to decide whether to call `step`, but calls it with
    `found_inf` set: 1 if a gradient is not finite, else 0. A skipped step changes neither parameters nor momentum.
    """

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure=None):
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

    def _values(self):
        """Yield ((parameter, kind), tensor) of all parameters with a gradient and of their momentum."""
        for parameter in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            yield (parameter, "value"), parameter
            if "momentum_buffer" in self.state.get(parameter, {}):
                yield (parameter, "momentum"), self.state[parameter]["momentum_buffer"]


class Sgd(SkippableStep, torch.optim.SGD):
    """SGD whose steps can be skipped."""


class Lars(SkippableStep, timm.optim.Lars):
    """LARS as in DINO: the trust ratio of weights w with gradient g and decay λ is ‖w‖ / ‖g + λw‖.

    timm uses ‖w‖ / (‖g‖ + λ‖w‖), and no trust ratio if λ is 0.
    """

    @torch.no_grad()
    def step(self, closure=None):
        decays = [group["weight_decay"] for group in self.param_groups]
        for group, decay in zip(self.param_groups, decays, strict=True):
            for parameter in group["params"] if decay else ():
                if parameter.grad is not None:
                    parameter.grad.add_(parameter, alpha=decay)
            group |= {"weight_decay": 0.0, "always_adapt": group["decay"]}  # the decay is part of the gradient now
        super().step(closure)
        for group, decay in zip(self.param_groups, decays, strict=True):
            group["weight_decay"] = decay
