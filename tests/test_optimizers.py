import pytest
import torch

from support.optimizers import Lars, Sgd


class OnDevice(torch.Tensor):
    """A tensor that claims to be on a GPU, so that no step reads its value."""

    device = torch.device("cuda", 0)


@pytest.mark.parametrize("make", [Sgd, Lars])
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_skipped_step_changes_nothing(make, where):
    """Steps 1 and 3 of 5 are skipped: parameters and momentum are those of the three others alone."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in ((3, 4), (5,))]
    gradients = torch.randn(5, 17, generator=generator)
    results = []
    for skipped in ((), (0, 2)):
        parameters = [torch.nn.Parameter(value.clone()) for value in start]
        groups = [{"params": parameters, "decay": True, "weight_decay": 0.1}]
        optimizer = make(groups, lr=0.1, momentum=0.9)
        for step in range(5):
            if skipped or step not in (0, 2):
                values = gradients[step].split([12, 5])
                for parameter, value in zip(parameters, values, strict=True):
                    parameter.grad = (
                        torch.full_like(parameter, torch.nan) if step in skipped else value.view_as(parameter).clone()
                    )
                found_inf = torch.tensor(float(step in skipped))
                optimizer.found_inf = found_inf if where == "cpu" else found_inf.as_subclass(OnDevice)
                optimizer.step()
        results.append([*parameters, *(optimizer.state[p]["momentum_buffer"] for p in parameters)])
    for own, expected in zip(*results, strict=True):
        assert torch.equal(own, expected)
