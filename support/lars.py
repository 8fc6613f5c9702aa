"""LARS, on timm's. Importing timm takes longer than importing torch."""

import timm.optim
import torch


class Lars(timm.optim.Lars):
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
